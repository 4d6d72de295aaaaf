"""The command line: what it prints, as tables and JSON, and how it says no."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import fastexit as fx
from fastexit.cli import main

TRACES = Path(__file__).parents[1] / "examples" / "traces"
HEAD = 6000
"""Lines of a bundled trace that are enough to see IPIs, and few enough for interpreted kernels."""


@pytest.fixture(scope="module")
def small_trace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import gzip

    path = tmp_path_factory.mktemp("trace") / "small.txt"
    with gzip.open(TRACES / "synthetic-guest-4vcpu.txt.gz", "rt") as source:
        path.write_text("".join(line for _, line in zip(range(HEAD), source, strict=False)))
    return path


def run_json(capsys: pytest.CaptureFixture[str], *args: str) -> dict:
    assert main([*args, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def refused(capsys: pytest.CaptureFixture[str], *args: str) -> str:
    """The one line on stderr of a command that ends with exit code 2."""
    try:
        code = main(list(args))
    except SystemExit as stop:  # argparse
        code = stop.code
    said = capsys.readouterr()
    assert code == 2
    assert said.out == ""
    lines = [line for line in said.err.splitlines() if not line.startswith((" ", "usage:"))]
    assert len(lines) == 1, said.err
    assert "Traceback" not in said.err
    return lines[0]


def test_walk_puts_two_generations_side_by_side(capsys: pytest.CaptureFixture[str]) -> None:
    walks = run_json(capsys, "walk")["walks"]
    assert [w["kernel"] for w in walks] == ["seed-v3", "6.18"]
    seed, new = walks
    assert (seed["ipi_left_in_step"], new["ipi_left_in_step"]) == ("14", "11")
    assert {"13", "15", "17", "20"} <= set(new["steps_not_reached"])
    assert "17" not in seed["steps_not_reached"]
    assert seed["steps_before_ipi"] > new["steps_before_ipi"]


def test_walk_shows_the_generic_path_too(capsys: pytest.CaptureFixture[str]) -> None:
    walks = run_json(capsys, "walk", "--kernels", "6.18", "--generic")["walks"]
    assert [w["fastpath"] for w in walks] == [True, False]
    assert walks[1]["ipi_left_in_step"] == "20"


def test_walk_tells_why_the_fast_path_declined(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["walk", "--shorthand", "all-but-self", "--kernels", "6.18"]) == 0
    out = capsys.readouterr().out
    assert "fast path declined: destination shorthand" in out
    assert "IPI left in step 20" in out


def test_walk_of_a_faulting_write(capsys: pytest.CaptureFixture[str]) -> None:
    (walk,) = run_json(capsys, "walk", "--value", "0x2000", "--kernels", "6.18")["walks"]
    assert walk["outcome"]["fault"] == "GP"
    assert walk["ipi_left_in_step"] is None


def test_walk_on_svm_without_avic(capsys: pytest.CaptureFixture[str]) -> None:
    walks = run_json(capsys, "walk", "--vendor", "svm", "--no-apicv")["walks"]
    assert [w["outcome"]["path"] for w in walks] == ["SLOW", "FAST"]


def test_info_names_every_generation(capsys: pytest.CaptureFixture[str]) -> None:
    facts = run_json(capsys, "info")
    assert tuple(facts["profiles"]) == fx.profiles()
    assert main(["info"]) == 0
    assert "6.18.26" in capsys.readouterr().out


def test_replay_reports(capsys: pytest.CaptureFixture[str], small_trace: Path) -> None:
    report = run_json(capsys, "replay", str(small_trace))
    assert report["mismatches"] == []
    assert report["kvm_apic_ipi"]["exact"] == report["kvm_apic_ipi"]["total"] > 0
    assert main(["replay", str(small_trace), "--quiet"]) == 0
    assert "Taken fast, by kernel generation" in capsys.readouterr().out


def test_replay_with_a_mismatch_ends_with_1(
    capsys: pytest.CaptureFixture[str], small_trace: Path, tmp_path: Path
) -> None:
    text = small_trace.read_text()
    forged = tmp_path / "forged.txt"
    forged.write_text(text.replace("kvm_apic_ipi: dst 1 vec 64", "kvm_apic_ipi: dst 3 vec 64", 1))
    assert forged.read_text() != text
    assert main(["replay", str(forged), "--quiet"]) == 1
    assert "dst 3 vec 64" in capsys.readouterr().out


def test_replay_draws(capsys: pytest.CaptureFixture[str], small_trace: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    base = tmp_path / "picture"
    pictures = run_json(capsys, "replay", str(small_trace), "--picture", str(base))["pictures"]
    assert sorted(Path(p).name for p in pictures) == ["picture.png", "picture.svg"]
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["walk", "--kernels", "4.4"], "unknown kernel '4.4': one of seed-v3"),
        (["walk", "--vector", "300"], "VECTOR=0x12c does not fit 8 bits"),
        (["walk", "--vector", "x"], "'x' is not a number"),
        (["walk", "--mode", "Fix"], "unknown delivery mode 'Fix'"),
        (["walk", "--msr", "0x100000000"], "MSR 0x100000000 is out of range"),
        (["walk", "--value", "-1"], "MSR value -0x1 is out of range"),
        (["walk", "--vcpus", "5000"], "number of vCPUs 0x1388 is out of range"),
        (["walk", "--vendor", "via"], "invalid choice: 'via'"),
        (["replay", "/nowhere/at/all"], "/nowhere/at/all"),
        (["play"], "invalid choice: 'play'"),
        ([], "required: COMMAND"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_arguments(capsys: pytest.CaptureFixture[str], args: list[str], said: str) -> None:
    assert said in refused(capsys, *args)


def test_help_names_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0
    out = capsys.readouterr().out
    assert all(word in out for word in ("walk", "replay", "demo", "info", "trace-cmd record"))


def test_module_runs_and_a_closed_pipe_is_no_error() -> None:
    """``python -m fastexit info | head -1``: the reader goes away, nothing is said."""
    command = f"{sys.executable} -m fastexit info | head -n 1"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True)
    assert "fastexit" in done.stdout
    assert done.stderr == ""
