"""Cost profiles: their sources, a user's own, the published figures, and what walk shows of them."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest

import fastexit as fx
from fastexit.cli import main
from fastexit.costs.meter import EFFECT_STAGES
from fastexit.costs.profile import STAGES, cost_profile
from fastexit.insight.walk import walk
from timedexits import ICR, OFF, RETPOLINE, ipi

ROOT = Path(__file__).parents[1]
CITATION = re.compile(r"commit [0-9a-f]{12}\b|[\w.-]+@[\w.-]+\.\w+|lkml \d{4}\.\d/\d{5}|\bassumed\b")


@pytest.mark.parametrize("name", fx.cost_profiles())
def test_every_number_has_a_source(name: str) -> None:
    """A citation or the word "assumed"; what is calibrated says on what, and its profile's file says so itself."""
    profile = cost_profile(name)
    assert set(profile.costs) == set(STAGES)
    assert CITATION.search(profile.ghz_source)
    for stage, cost in profile.costs.items():
        assert CITATION.search(cost.source), f"{stage}: {cost.source}"
        assert "calibrated" not in cost.source or CITATION.search(cost.source.replace("assumed", "")), stage


def test_tables_of_both_vendors_and_both_mitigation_sets() -> None:
    assert {RETPOLINE, OFF, "ipiv-host", "epyc"} <= set(fx.cost_profiles())
    assert cost_profile(RETPOLINE)["vendor_call"] > cost_profile(OFF)["vendor_call"]


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


GHZ = 'ghz = { value = 3, source = "here" }\n'
OTHER = 'base = "epyc"\n'


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "description is missing and 57 more, which base = NAME would give"),
        ("description = 1\n" + OTHER, "description is not a text"),
        (OTHER + 'base2 = "x"', "unknown key 'base2', not base?"),
        (OTHER + "vm_exti = 4", "unknown key 'vm_exti', not vm_exit?"),
        (OTHER + '"\\u001b[31m" = 4', "unknown key '\\x1b[31m'"),
        ('base = "skylake"', "base is none of "),
        ("base = []", "base is none of "),
        (OTHER + "vm_exit = 4", 'vm_exit is not { cycles = NUMBER, source = "..." }'),
        (OTHER + "vm_exit = { cycles = 4 }", "vm_exit: source is missing"),
        (OTHER + 'vm_exit = { source = "x" }', "vm_exit: cycles is missing"),
        (OTHER + 'vm_exit = { cycles = 4, source = "x", unit = "ns" }', "vm_exit: unknown key 'unit'"),
        (OTHER + 'vm_exit = { cycles = "4", source = "x" }', "vm_exit: cycles is not a number"),
        (OTHER + 'vm_exit = { cycles = true, source = "x" }', "vm_exit: cycles is not a number"),
        (OTHER + 'vm_exit = { cycles = 4.5, source = "x" }', "vm_exit: cycles are whole numbers, not 4.5"),
        (OTHER + 'vm_exit = { cycles = -4, source = "x" }', "vm_exit: -4 cycles is negative"),
        (OTHER + 'vm_exit = { cycles = 4, source = " " }', "vm_exit: source is not a text"),
        (
            OTHER + 'vm_exit = { cycles = 99999999999999999999, source = "x" }',
            "99999999999999999999 cycles is too much",
        ),
        (OTHER + 'vm_exit = { cycles = inf, source = "x" }', "vm_exit: cycles are whole numbers, not inf"),
        (OTHER + 'ghz = { value = 2.5e9, source = "x" }', "ghz: 2500000000.0 is no clock rate in GHz"),
        (OTHER + 'ghz = { value = 1e-300, source = "x" }', "ghz: 1e-300 is no clock rate"),
        (OTHER + 'ghz = { value = 0, source = "x" }', "ghz: 0 is no clock rate"),
        (OTHER + 'ghz = { value = nan, source = "x" }', "ghz: nan is no clock rate"),
        (OTHER + "vm_exit = ", "Invalid value"),
        pytest.param("vm_exit = " + "[" * 100_000, "nested too deeply", id="deep"),
        pytest.param(OTHER + f"vm_exit = {'9' * 5000}", "Exceeds the limit", id="long"),
    ],
)
def test_bad_table_is_refused_in_one_line(tmp_path: Path, text: str, complaint: str) -> None:
    path = write(tmp_path / "mine.toml", text)
    with pytest.raises(ValueError, match=re.escape(complaint)) as refused:
        fx.CostProfile.load(path)
    assert str(refused.value).startswith(str(path))
    assert "\n" not in str(refused.value)


def test_what_is_no_text_is_refused_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Neither UTF-8 nor a file; a byte order mark is no mistake, whatever the locale."""
    path = tmp_path / "mine.toml"
    path.write_bytes(OTHER.encode() + b'description = "\xff"')
    with pytest.raises(ValueError, match=re.escape(f"{path}: byte 29 is not UTF-8")):
        fx.CostProfile.load(path)
    path.write_bytes(b"\xef\xbb\xbf" + OTHER.encode() + 'description = "r\u00e4ck"'.encode())
    assert fx.CostProfile.load(path).description == "r\u00e4ck"
    (tmp_path / "folder.toml").mkdir()
    assert main(["walk", "--costs", str(tmp_path / "folder.toml")]) == 2
    complaint = capsys.readouterr().err
    assert complaint.count("\n") == 1
    assert "folder.toml" in complaint


def test_file_needs_no_suffix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    write(tmp_path / "mine", OTHER)
    monkeypatch.chdir(tmp_path)
    assert main(["walk", "--costs", "mine", "--kernels", "6.18"]) == 0
    assert "(mine)" in capsys.readouterr().out


def test_own_table(tmp_path: Path) -> None:
    path = write(tmp_path / "mine.toml", OTHER + GHZ + 'vm_exit = { cycles = 9, source = "measured" }')
    mine = fx.CostProfile.load(path)
    assert (mine.name, mine["vm_exit"], mine.costs["vm_exit"].source, mine.ghz) == ("mine", 9, "measured", 3.0)
    assert mine["vm_entry"] == cost_profile("epyc")["vm_entry"]
    whole = ['description = "x"', GHZ] + [f'{stage} = {{ cycles = 1, source = "x" }}' for stage in STAGES]
    assert set(fx.CostProfile.load(write(tmp_path / "whole.toml", "\n".join(whole))).values()) == {1}
    out = ipi(costs=mine)
    assert out.cycles is not None
    with pytest.raises(OSError, match="absent"):
        fx.CostProfile.load(tmp_path / "absent.toml")


def test_unknown_profile() -> None:
    with pytest.raises(ValueError, match="unknown cost profile 'z80': one of epyc, "):
        fx.Machine(vcpus=1, costs="z80")
    with pytest.raises(TypeError, match="costs is int"):
        fx.Machine(vcpus=1, costs=1)  # type: ignore[arg-type]


@pytest.mark.parametrize("kernel", fx.profiles())
def test_walk_shows_where_the_cycles_go(kernel: str) -> None:
    walked = walk(ICR, fx.icr(dest=1, vector=0xFD), kernel=kernel, costs=RETPOLINE)
    out = walked.outcome
    assert sum(visit.cycles for visit in walked.visits) + walked.cycles_elsewhere == out.cycles
    leaving = next(visit for visit in walked.visits if visit.step == walked.ipi_step)
    assert leaving.cycles > cost_profile(RETPOLINE)["notify"]
    plain = walk(ICR, fx.icr(dest=1, vector=0xFD), kernel=kernel)
    assert [visit.step for visit in plain.visits] == [visit.step for visit in walked.visits]
    assert [visit.lines for visit in plain.visits] == [visit.lines for visit in walked.visits]
    assert "cycles" not in plain.as_dict()["steps"][0]


def test_walk_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["walk", "--costs", RETPOLINE]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    out = ipi()
    assert f"IPI left after {out.cycles_ipi:,} cycles" in shown
    assert f"guest runs again after {out.cycles:,} cycles" in shown
    mine = write(tmp_path / "mine.toml", 'base = "epyc"')
    assert main(["walk", "--costs", str(mine), "--json", "--kernels", "6.18"]) == 0
    (walked,) = json.loads(capsys.readouterr().out)["walks"]
    assert walked["costs"] == "mine"
    assert walked["outcome"]["cycles"] == sum(step["cycles"] for step in walked["steps"]) + walked["cycles_elsewhere"]
    assert main(["walk", "--costs", "z80"]) == 2
    assert "unknown cost profile 'z80'" in capsys.readouterr().err
    assert main(["walk", "--costs", str(tmp_path / "absent.toml")]) == 2
    assert main(["walk", "--costs", str(write(tmp_path / "bad.toml", "x = 1"))]) == 2
    assert "unknown key 'x'" in capsys.readouterr().err


def test_published_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is calibrated fits; each prediction has the sign of what was published, and its miss has a bound here."""
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    pairs = __import__("costmodel").PAIRS
    bounds = {
        "v2 and v3": (1, 1.5),
        "shortest MSR_WRITE, retpolines": (0.9, 1.1),
        "tscdeadline_immed, APICv": (0.9, 1.2),
        "its injection put together": (0.5, 0.8),
        "ipi, x2APIC": (0.8, 1.2),
    }
    sides = {pair.title: (pair.before, pair.modelled(False)) for pair in pairs}
    with_apicv, without = (
        next(found for title, found in sides.items() if title.startswith(start))
        for start in ("tscdeadline_immed, APICv, v1", "tscdeadline_immed, no APICv, v1, against")
    )
    assert without[1] - with_apicv[1] == pytest.approx(without[0] - with_apicv[0], abs=1)
    for pair in pairs:
        before, after = pair.modelled(False), pair.modelled(True)
        assert after <= before
        for title, (low, high) in bounds.items():
            if title in pair.title:
                assert low <= (after - before) / pair.difference <= high, pair.title
        if "figure after" in pair.calibrates:
            assert after == pytest.approx(pair.after, rel=0.001)
    assert sum(1 for pair in pairs if not pair.calibrates) > sum(1 for pair in pairs if pair.calibrates)
    sys.modules.pop("costmodel")


def test_readme_of_the_cost_model_runs() -> None:
    text = (ROOT / "docs" / "cost-model.md").read_text()
    code = re.search(r"```python\n(.*?)```", text, flags=re.DOTALL)[1]
    scope: dict = {}
    exec(code, scope)
    assert f"# {scope['out'].cycles_ipi}, {scope['out'].cycles}\n" in code


def test_every_effect_has_its_stage() -> None:
    assert set(EFFECT_STAGES) == set(fx.Effect)
    assert set(EFFECT_STAGES.values()) <= set(STAGES)


# ------------------------------------------------------------------------------------------------------ tables of dicts


def test_a_table_is_derived() -> None:
    mine = fx.CostProfile.derive(RETPOLINE, vm_exit=510, flight={"cycles": 9, "source": "a scope"}, name="rack 7")
    base = cost_profile(RETPOLINE)
    assert (mine.name, mine["vm_exit"], mine.costs["vm_exit"].source) == ("rack 7", 510, "given")
    assert (mine["flight"], mine.costs["flight"].source, mine.ghz) == (9, "a scope", base.ghz)
    assert {stage for stage in STAGES if mine[stage] != base[stage]} == {"vm_exit", "flight"}
    again = fx.CostProfile.derive(mine, ghz=3, description="hotter", vm_entry=np.int64(7))
    assert (again.name, again.ghz, again.description) == ("rack 7, changed", 3.0, "hotter")
    assert (again["vm_exit"], again["vm_entry"]) == (510, 7)
    assert again.ns(30) == 10
    assert fx.CostProfile.derive(RETPOLINE).name == f"{RETPOLINE}, changed"


def test_machines_take_dicts() -> None:
    plain = ipi(costs=RETPOLINE)
    for costs in ({"base": RETPOLINE, "vm_exit": 0}, {"base": cost_profile(RETPOLINE), "vm_exit": 0}):
        assert plain.cycles - ipi(costs=costs).cycles == cost_profile(RETPOLINE)["vm_exit"]
    whole = dict.fromkeys(STAGES, 1) | {"ghz": 2.5, "description": "ones"}
    m = fx.Machine(vcpus=1, costs=whole)
    assert (m.costs.name, set(m.costs.values())) == ("given", {1})
    restored = fx.Machine.restore(m.snapshot(), whole | {"name": "mine"})
    assert restored.costs.name == "mine"


@pytest.mark.parametrize(
    ("table", "kind", "complaint"),
    [
        ({"vm_exit": 3}, ValueError, "costs: description is missing and"),
        ({"base": "z80"}, ValueError, "costs: base is none of epyc, "),
        ({"base": ["epyc"]}, ValueError, "costs: base is none of epyc, "),
        ({"base": "epyc", "vm_exti": 3}, ValueError, "costs: unknown key 'vm_exti', not vm_exit?"),
        ({"base": "epyc", "vm_exit": "3"}, TypeError, "costs: vm_exit is str, not a number"),
        ({"base": "epyc", "vm_exit": True}, TypeError, "costs: vm_exit is bool, not a number"),
        ({"base": "epyc", "vm_exit": None}, TypeError, "costs: vm_exit is NoneType, not a number"),
        ({"base": "epyc", "vm_exit": 3.5}, ValueError, "costs: vm_exit: cycles are whole numbers, not 3.5"),
        ({"base": "epyc", "vm_exit": -3}, ValueError, "costs: vm_exit: -3 cycles is negative"),
        ({"base": "epyc", "vm_exit": {"ns": 3}}, ValueError, "costs: vm_exit: unknown key 'ns'"),
        ({"base": "epyc", "ghz": "fast"}, TypeError, "costs: ghz is str, not a number"),
        ({"base": "epyc", "ghz": 0}, ValueError, "costs: ghz: 0.0 is no clock rate"),
        ({"base": "epyc", "name": 5}, ValueError, "costs: name is not a text"),
        ({"base": "epyc", 7: 5}, TypeError, "costs: 7 is no name of a stage"),
    ],
)
def test_bad_dicts_are_refused(table: dict, kind: type[Exception], complaint: str) -> None:
    with pytest.raises(kind, match=re.escape(complaint)) as refused:
        fx.Machine(vcpus=1, costs=table)
    assert "\n" not in str(refused.value)


# -------------------------------------------------------------------------------------------------- the command line


def test_costs_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["costs", "list", "--json"]) == 0
    assert [row["name"] for row in json.loads(capsys.readouterr().out)] == list(fx.cost_profiles())
    assert main(["costs", "list"]) == 0
    assert "epyc" in capsys.readouterr().out
    assert main(["costs", "show", "epyc", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert {stage: row["cycles"] for stage, row in shown["stages"].items()} == dict(cost_profile("epyc"))
    assert main(["costs", "show", "epyc"]) == 0
    assert "VMRUN" in capsys.readouterr().out
    mine = write(tmp_path / "mine.toml", OTHER + 'vm_exit = { cycles = 749, source = "measured" }')
    assert main(["costs", "diff", "epyc", str(mine), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["stages"] == {"vm_exit": [748, 749]}
    assert main(["costs", "diff", "epyc", str(mine)]) == 0
    assert "1 of" in (out := capsys.readouterr().out)
    assert "+1" in out
    for wrong in (["show", "z80"], ["diff", "epyc", "absent.toml"], ["template", "--base", "z80"]):
        assert main(["costs", *wrong]) == 2
        assert capsys.readouterr().err.count("\n") == 1


def test_a_template_is_a_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["costs", "template", "--base", "epyc"]) == 0
    text = capsys.readouterr().out
    assert dict(fx.CostProfile.load(write(tmp_path / "mine.toml", text))) == dict(cost_profile("epyc"))
    filled = re.sub(r"^# (\w+ *= \{)", r"\1", text, flags=re.MULTILINE).replace("cycles = ", "cycles = 1")
    loaded = fx.CostProfile.load(write(tmp_path / "filled.toml", filled))
    assert all(str(loaded[stage]) == f"1{cost_profile('epyc')[stage]}" for stage in STAGES)
    assert main(["costs", "template", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["base"] == RETPOLINE
