"""`fastexit verify --against`, `verify(other=...)`: an own APIC is held against the model, and its faults are found."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import fastexit as fx
from fastexit import cli
from fastexit.kvm import own, spoken
from fastexit.kvm.apics import ApicFailed, face
from fastexit.kvm.comparison import replay

SAMPLE = Path(__file__).parents[1] / "examples" / "my_apic.py"
OPS = 800

GREETED = "input()\nprint('ok 1 x wrmsr lapic', flush=True)\ninput()\nprint('ok', flush=True)\ninput()\n"

FAULTS: dict[str, tuple[str, str, str]] = {
    "PPR by all eight bits": ("key=lambda p: p >> 4", "key=lambda p: -p", "PROCPRI|ack|pending"),
    "an EOI ends the lowest": ("discard(max(", "discard(min(", "ISR"),
    "all-but-self reaches the sender": ("True, apic is not self)", "True, True)", "IRR"),
    "self reaches nobody": ("(hit, apic is self,", "(hit, False,", "IRR"),
    "what is off masks nothing": ("else 0x10000  #", "else 0  #", "LVT"),
    "an interrupt stays in IRR": ("self.irr - {top}", "self.irr - set()", "IRR"),
    "clusters do not matter": ("icr >> 48 == apic.ldr >> 16 and", "", "IRR"),
    "no broadcast": ("icr >> 32 == 0xFFFFFFFF or", "", "IRR"),
    "every mode is Fixed": ("and icr >> 8 & 7 == 0", "", "IRR"),
    "messages have eight bits of destination": ("| address >> 32 & ~0xFF)", ")", "IRR"),
    "what is off accepts": ("and apic.msr[SVR] & 0x100", "", "IRR"),
    "the ICR reads 0": ("self.msr[ICR] = value if msr == ICR else self.msr[ICR]", "pass", "ICR"),
    "SVR loses its vector": ("SVR: 0x1FF", "SVR: 0x100", "SPIV"),
}


def program(tmp_path: Path, text: str) -> list[str]:
    path = tmp_path / "apic.py"
    path.write_text(text)
    return [sys.executable, str(path)]


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = cli.main(["verify", *arguments])
    out, err = capsys.readouterr()
    return code, out, err


def test_the_sample_agrees() -> None:
    with fx.kvm.ApicProgram([sys.executable, str(SAMPLE)]) as mine:
        report = fx.kvm.verify(OPS, other=mine, well_formed=True)
    assert report.agreed, report.divergence
    count = report.kinds["apic"]
    assert {"wrmsr", "rdmsr", "signal_msi", "ack", "pending"} == set(count.names)
    assert {"set_time", "set_lapic"} <= set(count.left_out)
    assert sum(count.names.values()) >= OPS


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_found_and_made_short(fault: str, tmp_path: Path) -> None:
    old, new, where = FAULTS[fault]
    text = SAMPLE.read_text()
    assert text.count(old) == 1
    with fx.kvm.ApicProgram(program(tmp_path, text.replace(old, new))) as mine:
        for seed in range(1, 6):
            found = fx.kvm.verify(OPS, other=mine, well_formed=True, seed=seed, shorten=10).divergence
            if found is not None:
                break
        assert found is not None, "not found"
        assert any(name in found.text for name in where.split("|")), found.text
        assert len(found.history) <= 8, found.history
        requests = [request.split()[0] for request, _ in found.transcript]
        assert requests[0] == "machine"
        assert [word for word in requests if word != "machine"] == [
            spoken.WORDS.get(op[0], op[0]) for op in found.history
        ]
        again = replay("apic", found.setup.keywords(), found.history, other=mine)
        assert again is not None
        assert again.text == found.text


@pytest.mark.parametrize("compiler", ["gcc", "clang"])
def test_the_sample_in_c_agrees_and_its_fault_is_found(compiler: str, tmp_path: Path) -> None:
    cc = shutil.which(compiler)
    if cc is None:
        pytest.skip(f"{compiler} is not installed")
    text = SAMPLE.with_suffix(".c").read_text()
    for name, source in (("right", text), ("wrong", text.replace("dest >> 16 == ldr >> 16 &&", ""))):
        (tmp_path / f"{name}.c").write_text(source)
        options = ["-std=c11", "-Wall", "-Wextra", "-Werror", "-O1"]
        subprocess.run([cc, *options, "-o", str(tmp_path / name), str(tmp_path / f"{name}.c")], check=True)
    with fx.kvm.ApicProgram([str(tmp_path / "right")]) as mine:
        report = fx.kvm.verify(OPS, other=mine, well_formed=True)
    assert report.agreed, report.divergence
    with fx.kvm.ApicProgram([str(tmp_path / "wrong")]) as mine:
        found = fx.kvm.verify(3 * OPS, other=mine, well_formed=True, shorten=10).divergence
    assert found is not None
    assert "IRR" in found.text


ALL = {spoken._METHODS.get(word, word) for word in spoken.CAPABILITIES}
SPOKEN = [sys.executable, str(Path(__file__).with_name("spoken_machine.py"))]


@pytest.mark.parametrize("kernel", ["sdm", "7.3", "5.10"])
def test_the_whole_protocol(kernel: str) -> None:
    """A Machine at the other end of the line agrees with itself, and is asked all that there is."""
    with fx.kvm.ApicProgram([*SPOKEN, kernel]) as mine:
        report = fx.kvm.verify(1500, other=mine, kernel=kernel)
        assert report.agreed, report.divergence
        count = report.kinds["apic"]
        assert set(count.names) == ALL - {
            "lowest",
            "get_lapic",
            "set_msr",
            "get_msr",
        }  # which are asked where the others are not
        assert not count.left_out
    with fx.kvm.ApicProgram([*SPOKEN, kernel, "wrmsr", "rdmsr", "lowest", "take", "write"]) as mine:
        report = fx.kvm.verify(500, other=mine, kernel=kernel, seed=2)
        assert report.agreed, report.divergence
        assert {"set_msr", "get_msr"} <= set(report.kinds["apic"].names)
        assert "take" in report.kinds["apic"].left_out


def test_what_a_cpu_takes_is_read_strictly(tmp_path: Path) -> None:
    said = ("none", "nmi", "sipi 18", "sipi 0x12", "init", "bang")
    greeted = "input()\nprint('ok 1 x set_msr take', flush=True)\ninput()\nprint('ok', flush=True)\n"
    text = f"{greeted}for said in {said}:\n    input(), print('ok', said, flush=True)"
    with fx.kvm.ApicProgram(program(tmp_path, text)) as mine:
        vcpu = mine.machine(apic_ids=[0]).vcpus[0]
        assert [vcpu.take() for _ in range(5)] == ["none", "nmi", "sipi 0x12", "sipi 0x12", "init"]
        with pytest.raises(ApicFailed, match=r"line 8 \(take 0\): answered 'ok bang', not ok and none, nmi"):
            vcpu.take()


def test_events_are_taken() -> None:
    """By the CPUs of both sides: an INIT that is not one, told apart."""
    seen: dict[str, int] = {}

    class Deaf(Neutral):
        def __init__(self, **settings: Any) -> None:
            super().__init__(**settings)
            for vcpu in self.vcpus:
                vcpu.set_mp_state(0)

    truth = own.taken

    def counting(vcpu: Any) -> str:
        event = truth(vcpu)
        seen[event.partition(" ")[0]] = seen.get(event.partition(" ")[0], 0) + 1
        return "nmi" if event == "init" and isinstance(vcpu.machine, Deaf) and Deaf.deaf else event

    Deaf.deaf = False  # type: ignore[attr-defined]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(own, "taken", counting)
        assert fx.kvm.verify(800, other=Deaf, only="ipis", shorten=1).agreed
        assert set(seen) == {"none", "nmi", "smi", "init", "sipi"}
        Deaf.deaf = True  # type: ignore[attr-defined]
        found = fx.kvm.verify(800, other=Deaf, only="ipis", shorten=10).divergence
    assert found is not None
    assert "expected init, yours says nmi" in found.text
    assert len(found.history) <= 4


def test_the_script_shows_it(tmp_path: Path) -> None:
    old, new, _ = FAULTS["SVR loses its vector"]
    with fx.kvm.ApicProgram(program(tmp_path, SAMPLE.read_text().replace(old, new))) as mine:
        found = fx.kvm.verify(OPS, other=mine, well_formed=True, shorten=5, ignored=("LVR",)).divergence
    assert found is not None
    story = tmp_path / "story.py"
    story.write_text(found.script())
    done = subprocess.run([sys.executable, str(story)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.strip()) == (1, found.text), done.stderr


# -------------------------------------------------------------------------------------------------- on the command line


def test_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, "--against", str(SAMPLE), "--well-formed", "--ops", "100")
    assert code == 0, out + err
    assert "no difference in 100 operations" in out
    assert "not known, left out" in out
    assert "against my_apic.py" in out


def test_a_difference_and_what_was_said(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    old, new, _ = FAULTS["SVR loses its vector"]
    command = program(tmp_path, SAMPLE.read_text().replace(old, new))
    options = ["--against", command[0], "--well-formed", "--ops", "50", "--json", "--", command[1]]
    code, out, _ = run(capsys, *options)
    found = json.loads(out)
    assert code == 1
    assert found["divergence"]["transcript"][0][0].startswith("machine ")
    assert found["divergence"]["transcript"][-1] == ["wrmsr 0 0x80f 0x1ff", "ok"]
    assert "SPIV: expected 0x1ff, got 0x100" in found["divergence"]["text"]
    assert found["host"]["kernel"] == fx.profiles()[-1]
    code, out, _ = run(capsys, "--against", " ".join(command), "--well-formed", "--ops", "50", "--kernel", "5.10")
    assert code == 1
    assert "> wrmsr 0 0x80f 0x1ff\n< ok" in out
    assert "kernel='5.10'" in out


def test_one_group_alone(capsys: pytest.CaptureFixture[str]) -> None:
    options = [
        "--against",
        str(SAMPLE),
        "--well-formed",
        "--ops",
        "60",
        "--only",
        "ipis",
        "--vcpus",
        "0,1,300",
        "--json",
    ]
    code, out, _ = run(capsys, *options)
    assert code == 0
    assert set(json.loads(out)["kinds"]["apic"]["names"]) == {"wrmsr"}
    code, _, err = run(capsys, "--against", str(SAMPLE), "--ops", "60", "--only", "timer")
    assert code == 2
    assert "knows nothing of what is to be compared" in err


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "line 1 (hello fastexit 1): ended with exit code 0"),
        ("import os\nos.kill(os.getpid(), 9)", "line 1 (hello fastexit 1): died of signal 9"),
        ("input()\nprint('hello')", "line 1 (hello fastexit 1): answered 'hello', not ok 1 NAME"),
        ("input()\nprint('ok 2 x wrmsr')", "speaks version 2 of the protocol: this is version 1"),
        ("input()\nprint('ok 1 x fly')", "knows none of wrmsr, set_msr, write"),
        ("input()\nprint('ok 1 x wrmsr')\ninput()\nprint('no')", "line 2 (machine "),
        ("input()\nprint('ok 1 x wrmsr', flush=True)\nimport time\ntime.sleep(60)", "no answer within 0.5 s"),
        ("input()\nprint('ok 1 x wrmsr\\nok\\nok')", "asked: 'ok"),
        ("input()\nprint('x' * 9999)", "answered a line of more than 4096 bytes"),
        (
            "input()\nprint('ok 1 x wrmsr', flush=True)\nfor n, _ in enumerate(open(0)):"
            " print('ok' if n < 3 else 'gq', flush=True)",
            "line 5 (wrmsr ",
        ),
        (
            f"{GREETED}print('ok ' + '00' * 1022)",
            "line 3 (lapic 0): answered 'ok 000",
        ),
        (
            f"{GREETED}print('ok zz')",
            "and 2,048 hex digits",
        ),
    ],
)
def test_what_breaks_the_rules_is_told_in_one_line(
    text: str, complaint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spoken.ApicProgram.__init__, "__kwdefaults__", {"seconds": 0.5 if "sleep" in text else 10.0})
    code, out, err = run(capsys, "--against", " ".join(program(tmp_path, text)), "--ops", "20", "--vcpus", "1")
    assert code == 2, out
    assert complaint in err
    assert err.count("\n") == 1
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["--against", "/nowhere/apic"], "cannot start '/nowhere/apic': No such file or directory"),
        (["--against", ""], "not ''"),
        (["--against", str(SAMPLE), "--trace"], "--trace is for real kernels"),
        (["--against", str(SAMPLE), "--only", "guest"], "one of ipis"),
        (["--against", str(SAMPLE), "--ignore", "FLY"], "unknown register 'FLY': one of ID"),
        (["--against", str(SAMPLE), "--kernel", "2.6"], "too old"),
        (["--ignore", "ID"], "--ignore is for an own APIC"),
        (["--", "x"], "x is for an own APIC"),
        (["--only", "apic"], "own APICs alone: --against"),
        (["--only", "ipis"], "own APICs alone: --against"),
    ],
)
def test_wrong_options_are_refused(options: list[str], complaint: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = run(capsys, *options)
    assert code == 2
    assert complaint in err
    assert err.count("\n") == 1


# -------------------------------------------------------------------------------------------------------- from Python


class Neutral(fx.Machine):
    """A Machine as an own APIC: the newest kernel's, configured as own APICs are."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**{"apicv": False, "threads": False, "hv_timer": False, "min_timer_period_us": 0} | settings)


class Little:
    """As little as may be: x2APIC MSRs alone, by way of a Machine, with a fault where it is told to have one."""

    class Vcpu:
        def __init__(self, vcpu: fx.Vcpu) -> None:
            self._vcpu = vcpu

        def wrmsr(self, msr: int, value: int) -> object:
            return self._vcpu.wrmsr(msr, value)

        def rdmsr(self, msr: int) -> int:
            return self._vcpu.rdmsr(msr) | (8 if msr == 0x80F else 0) * Little.faulty

    faulty = False

    def __init__(self, apic_ids: list[int], **settings: Any) -> None:
        self.machine = Neutral(apic_ids=apic_ids, **settings)
        for vcpu in self.machine.vcpus:
            vcpu.set_mp_state(0)
        self.vcpus = [self.Vcpu(vcpu) for vcpu in self.machine.vcpus]


def test_machine_against_machine() -> None:
    report = fx.kvm.verify(600, other=Neutral, shorten=1)
    assert report.agreed, report.divergence
    assert set(report.kinds) == {"msr", "apic"}
    assert "is_flat" in report.left_out["guest"]
    only = fx.kvm.verify(600, other=Neutral, only="apic", seed=2, shorten=1)
    assert only.agreed, only.divergence
    assert not only.kinds["apic"].left_out.keys() - {"lowest"}
    assert only.kinds["apic"].names["set_time"] > 5


def test_a_class_with_two_methods(monkeypatch: pytest.MonkeyPatch) -> None:
    report = fx.kvm.verify(500, other=Little)
    assert report.agreed, report.divergence
    assert set(report.kinds["apic"].names) == {"wrmsr", "rdmsr"}
    assert {"set_time", "set_lapic", "signal_msi", "ack"} <= set(report.kinds["apic"].left_out)
    monkeypatch.setattr(Little, "faulty", True)
    found = fx.kvm.verify(2000, other=Little, shorten=5).divergence
    assert found is not None
    assert "rdmsr" in found.text
    assert len(found.history) <= 3


def test_another_generation_is_told_apart() -> None:
    """SELF_IPI of 5.8 writes the ICR."""

    class Old(Neutral):
        def __init__(self, **settings: Any) -> None:
            super().__init__(**settings | {"kernel": "5.8"})

    assert fx.kvm.verify(300, other=Old, only="ipis", kernel="5.8", shorten=1).agreed
    found = fx.kvm.verify(2000, other=Old, only="ipis", kernel="6.18", shorten=10).divergence
    assert found is not None


def test_what_cannot_be_compared_is_refused() -> None:
    with pytest.raises(TypeError, match="has no vcpus"):
        fx.kvm.verify(10, other=lambda **settings: object())
    with pytest.raises(TypeError, match="nothing can be done to it"):
        face(type("M", (), {"vcpus": [object()]})())
    with pytest.raises(ValueError, match="guest needs that"):
        fx.kvm.verify(10, other=Neutral, only="guest")
    with pytest.raises(TypeError, match="neither a Lab nor something that makes machines"):
        fx.kvm.verify(10, other=3)
    with pytest.raises(TypeError, match=r"ApicProgram is a class: one that has been made is .* ApicProgram\(...\)"):
        fx.kvm.verify(10, other=fx.kvm.ApicProgram)


def test_too_few_vcpus_are_told() -> None:
    class Few(Neutral):
        def __init__(self, **settings: Any) -> None:
            super().__init__(**settings)
            self.vcpus = self.vcpus[:1]

    with pytest.raises(TypeError, match="Few has 1 vcpus for 3 apic_ids"):
        fx.kvm.verify(50, other=Few, ids=(0, 1, 7), only="msr")


def test_an_object_may_make_machines() -> None:
    class Factory:
        made = 0

        def machine(self, **settings: Any) -> Little:
            self.made += 1
            return Little(**settings)

    factory = Factory()
    assert fx.kvm.verify(100, other=factory, only="registers").agreed
    assert factory.made == 2  # one is looked at


def test_names_are_declared_once() -> None:
    assert set(cli.parser.OWN_KINDS) == {own.OwnTwins.kind, *own.GROUPS}
    assert {spoken._METHODS.get(word, word) for word in spoken.CAPABILITIES} <= {
        *fx.kvm.apics.OF_VCPUS,
        *fx.kvm.apics.OF_MACHINES,
    }
    assert issubclass(ApicFailed, OSError)
