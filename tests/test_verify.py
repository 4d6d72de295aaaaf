"""`fastexit verify`: the model is like the kernel; differences are found, shortened, shown; nothing is left behind."""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import os
import random
from pathlib import Path

import pytest

from fastexit import cli
from fastexit import regs as r
from fastexit.cli import parser
from fastexit.ioctls import VcpuIoctls
from fastexit.jit import declare
from fastexit.kvm import comparison as v
from fastexit.kvm import device, host, judge, script, shrink
from fastexit.kvm.host import generation
from fastexit.kvm.operations import Op, describe
from fastexit.kvm.oracle import Oracle
from fastexit.kvm.own import OwnTwins
from fastexit.kvm.timers import TimerTwins
from fastexit.kvm.tracefs import TraceUnavailable
from fastexit.kvm.twins import Setup, Twins
from fastexit.profile import profiles
from fastexit.tracepoints.ring import Trace
from real_kvm import kvm

SOMEBODY = judge.Judge(
    Oracle, judge.plain("6.18"), "/dev/kvm", "from fastexit.kvm import Oracle", "Oracle(**KEYWORDS) as real"
)


def open_files() -> set[str]:
    return set(os.listdir("/proc/self/fd"))


def run_cli(*arguments: str) -> tuple[int, str]:
    with contextlib.redirect_stdout(io.StringIO()) as out:
        code = cli.main(["verify", *arguments])
    return code, out.getvalue()


# ----------------------------------------------------------------------------------------------------- with a kernel


@kvm
def test_the_model_is_like_the_kernel() -> None:
    """A slice of each seed's work; `make verify` compares millions of operations."""
    code, text = run_cli("--seconds", "6", "--seed", "20", "--json")
    report = json.loads(text)
    assert report["divergence"] is None, report["divergence"]["script"]
    assert code == 0
    assert report["operations"] > 100


@kvm
def test_ids_can_be_chosen() -> None:
    code, text = run_cli("--ops", "40", "--vcpus", "5,300,4095", "--only", "msr", "--json")
    assert code == 0
    assert json.loads(text)["kinds"]["msr"]["operations"] == 40


@kvm
def test_a_report_for_people(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["verify", "--ops", "20"]) == 0
    assert "no difference in 20 operations" in " ".join(capsys.readouterr().out.split())


@kvm
def test_the_same_seed_does_the_same() -> None:
    """What a session does may not depend on anything but its seed."""

    def life() -> list[Op]:
        rng = random.Random("5/msr/0")
        with Twins(Twins.draw(rng, host.running(), None)) as twins:
            for op in twins.beginning(rng):
                twins.step(op)
            for _ in range(60):
                twins.step(twins.draw_op(rng))
        return twins.history

    assert life() == life()


@kvm
@pytest.mark.skipif(not declare.JIT, reason="runs a story again and again, which takes half a minute interpreted")
def test_a_difference_is_shortened_and_shown(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A fault in the model: the story that remains needs no more than it has to, and its script shows the fault."""
    truth = VcpuIoctls.get_msr

    def faulty(self: VcpuIoctls, msr: int) -> int | None:
        value = truth(self, msr)
        return value ^ 1 if msr == 0x80F and value is not None and self.index == 2 else value

    monkeypatch.setattr(VcpuIoctls, "get_msr", faulty)
    monkeypatch.setattr(shrink, "SECONDS", 15.0)
    story = tmp_path / "story.py"
    code, text = run_cli("--ops", "20000", "--seed", "7", "--only", "msr", "--json", "--script", str(story))
    found = json.loads(text)
    assert code == 1
    assert found["divergences"] == 1
    assert "get_msr 2 0x80f" in found["divergence"]["text"]
    source = story.read_text()
    assert source == found["divergence"]["script"]
    assert source.count('yield "vCPU') == 2  # into x2APIC mode, and the read

    def exit_code() -> int:
        with pytest.raises(SystemExit) as end, contextlib.redirect_stdout(io.StringIO()):
            exec(compile(source, str(story), "exec"), {})
        return int(end.value.code)

    assert exit_code() == 1
    monkeypatch.setattr(VcpuIoctls, "get_msr", truth)
    assert exit_code() == 0


@kvm
def test_trace_lines_are_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Line by line; and a line that the model lacks is found, with a script that replays it."""
    try:
        assert v.verify(600, seed=2, traced=True).agreed
    except TraceUnavailable as error:
        pytest.skip(str(error))
    report = v.verify(300, seed=2, traced=True, only="guest")
    assert report.agreed
    assert report.kinds["guest"].trace_lines > 300
    monkeypatch.setattr(Trace, "enable", lambda self: None)
    found = v.verify(300, seed=2, traced=True, only="msr").divergence
    assert found is not None
    assert len(found.history) == 1
    assert "expected nothing, KVM prints kvm_" in found.text
    assert "traced=True" in found.script()


@kvm
def test_a_late_host_is_no_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    """What twins with clocks show once and never again is counted, not reported; what shows again is."""
    truth = TimerTwins.same_count
    calls = iter(range(1 << 30))

    def once(self: TimerTwins, i: int, expected: int, got: int) -> None:
        truth(self, i, expected, got if next(calls) != 50 else got + (1 << 31))

    monkeypatch.setattr(TimerTwins, "same_count", once)
    report = v.verify(60, seed=1, only="timers")
    assert report.agreed
    assert report.kinds["timers"].late
    monkeypatch.setattr(
        TimerTwins, "same_count", lambda self, i, expected, got: truth(self, i, expected, got + (1 << 31))
    )
    assert not v.verify(60, seed=1, only="timers").agreed


@kvm
def test_a_count_that_reads_0_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """0 is as far from the whole count as it looks: a timer of seconds has not begun again."""
    truth = TimerTwins.same_count

    def reads_0(self: TimerTwins, i: int, expected: int, got: int) -> None:
        truth(self, i, 0 if expected > 1 << 31 else expected, got)

    monkeypatch.setattr(TimerTwins, "same_count", reads_0)
    assert not v.verify(60, seed=1, only="timers").agreed


@kvm
def test_so_late_is_no_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many differences that never show again are none of the clock's: the run does not agree."""
    truth = TimerTwins.same_count

    def flickers(self: TimerTwins, i: int, expected: int, got: int) -> None:
        truth(self, i, expected, got + (1 << 31))

    monkeypatch.setattr(TimerTwins, "same_count", flickers)
    monkeypatch.setattr(shrink._Search, "keeps", lambda *_: False)
    report = v.verify(1000, seconds=3, seed=1, only="timers")
    assert report.divergence is None
    assert report.too_late
    assert not report.agreed


@kvm
@pytest.mark.parametrize("error", [IndexError("no such vCPU"), TimeoutError("the guest did not come back in 5.0 s")])
def test_what_a_side_raises_is_a_difference(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    """Neither a crash of the model nor a guest that hangs ends a run without its story."""

    def broken(self: VcpuIoctls, vector: int) -> None:
        raise error

    monkeypatch.setattr(VcpuIoctls, "interrupt", broken)
    found = v.verify(2000, seed=1, only="runs").divergence
    assert found is not None
    assert f"{type(error).__name__}: {error}" in found.text
    assert found.history[-1][0] == "interrupt"
    compile(found.script(), "story", "exec")


@kvm
def test_a_script_that_cannot_be_written_is_printed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["verify", "--ops", "10", "--script", str(tmp_path)]) == 2
    monkeypatch.setattr(VcpuIoctls, "get_mp_state", lambda self: -1)

    def full(self: Path, text: str) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    assert cli.main(["verify", "--ops", "500", "--only", "msr", "--script", str(tmp_path / "story.py")]) == 1
    captured = capsys.readouterr()
    assert "No space left" in captured.err
    assert "def story(m):" in captured.out


@kvm
def test_ctrl_c_keeps_what_was_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """A difference is reported even when its story was not made as short as it could be."""
    monkeypatch.setattr(VcpuIoctls, "get_mp_state", lambda self: -1)

    def interrupted(self: shrink._Search) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(shrink._Search, "operations", interrupted)
    found = v.verify(500, seed=1, only="msr").divergence
    assert found is not None
    assert found.history


@kvm
def test_nothing_is_left_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither by a run that ends well, nor by Ctrl-C in the middle."""
    before = open_files()
    v.verify(100, seed=1)
    assert open_files() == before

    def interrupted(self: Twins, op: Op) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Twins, "step", interrupted)
    assert cli.main(["verify", "--ops", "100", "--only", "guest"]) == 130
    assert open_files() == before


@kvm
def test_replay_of_a_story() -> None:
    ops = [("set_msr", 0, r.MSR_APICBASE, 0xFEE00D00), ("set_msr", 0, r.MSR_X2APIC_ICR, 0x1_0000_04FD)]
    assert v.replay("msr", {"apic_ids": [0, 1]}, ops) is None


# -------------------------------------------------------------------------------------------------- with or without


def test_no_kvm_is_one_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    host.running.cache_clear()
    monkeypatch.setattr(device, "DEVICE", str(tmp_path / "kvm"))
    try:
        assert cli.main(["verify", "--ops", "10"]) == 2
    finally:
        host.running.cache_clear()
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    assert "no usable" in line
    assert "this machine has no KVM" in line


@pytest.mark.parametrize(
    "arguments",
    [
        ("--ops", "0"),
        ("--ops", "-5"),
        ("--seconds", "-1"),
        ("--seconds", "soon"),
        ("--vcpus", "0"),
        ("--vcpus", "1,1"),
        ("--only", "x"),
    ],
)
def test_bad_arguments(arguments: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main(["verify", *arguments])
    assert end.value.code == 2
    assert "Traceback" not in capsys.readouterr().err


def test_the_command_line_knows_every_kind() -> None:
    known = {*v.SHARES, "irqchip"}
    assert set(parser.VERIFY_KINDS) - {"traces", "hyperv"} == set(v.KINDS) - {OwnTwins.kind} == known
    assert all(cls.about for cls in v.KINDS.values())


def test_generations_of_releases() -> None:
    """A release is of the newest generation that is not newer; those before the first one count as the first."""
    numbered = [name for name in profiles() if name[0].isdigit()]
    for name, newer in itertools.pairwise(numbered):
        major, minor = map(int, newer.split("."))
        assert generation(f"{name}.44-fc") == name
        assert generation(f"{major}.{minor - 1}.99" if minor else f"{major - 1}.99") == name
    assert generation("99.1") == numbered[-1]
    assert generation("4.19.0") == profiles()[0]


def test_every_operation_can_be_told() -> None:
    page = bytearray(1024)
    page[0xF0:0xF2] = b"\xff\x01"
    ops: list[Op] = [
        ("set_msr", 1, 0x830, 0xFD),
        ("set_lapic", 0, bytes(page)),
        ("signal_msi", 0xFEE00000, 0x41),
        ("add_vcpu", 300),
        ("set_events", 0, None, True, 5, False),
        ("set_sregs", 0, 0xFEE00900, 3),
        ("wrmsr", 1, 0x80B, 0),
        ("mmio_read", 1, 0x20, 4),
        ("ready", 0),
        ("cr8", 0),
    ]
    text = script.script("a 'difference'", "guest", Setup((0, 1)).keywords(), ops, SOMEBODY)
    compile(text, "story", "exec")
    assert "page({0xf0: 0x1ff})" in text
    assert describe(ops[1]) == "set_lapic 0 {f0:1ff}"
    assert "with Oracle(**KEYWORDS) as real:" in text
    compile(script.script('"""', "timers", Setup((0, 1)).keywords(), ops, SOMEBODY), "story", "exec")
