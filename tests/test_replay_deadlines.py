"""Replay: which generations take a trace's TSC_DEADLINE writes fast is what its kvm_hv_timer_state lines allow."""

from __future__ import annotations

import io
import lzma
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from fastexit.profile import PROFILES
from fastexit.trace import BUNDLED
from fastexit.trace.render import render
from fastexit.trace.replay import replay
from fastexit.trace.report import Report
from fastexit.traits import Trait

ALWAYS = [p.name for p in PROFILES.values() if p.traits & Trait.TSCDL_ALWAYS]
WITH_TIMER = [p.name for p in PROFILES.values() if p.traits & Trait.TSCDL_HV_TIMER]
BOTH = [name for name in PROFILES if name in ALWAYS + WITH_TIMER]

Lines = list[str]


@pytest.fixture(scope="module")
def linux() -> Lines:
    """The beginning of a boot: 77 deadlines, each with a line that says hv_timer 0."""
    with lzma.open(BUNDLED, "rt") as source:
        return [line for _, line in zip(range(2000), source, strict=False)]


@pytest.fixture
def replayed(tmp_path: Path) -> Callable[..., Report]:
    def run(lines: Lines, **options: object) -> Report:
        path = tmp_path / "trace.txt"
        path.write_text("".join(lines))
        return replay(path, **options)  # type: ignore[arg-type]

    return run


def used(lines: Lines) -> Lines:
    """A host with the preemption timer: hv_timer 1, but where a target was in the past or the vCPU blocked."""
    last = max(i for i, line in enumerate(lines) if "hv_timer 0" in line)
    return [line.replace("hv_timer 0", "hv_timer 1") if i != last else line for i, line in enumerate(lines)]


def silent(lines: Lines) -> Lines:
    return [line for line in lines if "kvm_hv_timer_state" not in line]


def said(report: Report) -> str:
    """The two sentences about deadlines."""
    out = Console(file=io.StringIO(), width=160)
    render(report, out)
    (found,) = re.findall(r"^.*TSC_DEADLINE writes besides.*\n.*", out.file.getvalue(), re.MULTILINE)  # type: ignore[attr-defined]
    return found


def test_generations_differ() -> None:
    assert {"5.8", "6.1", "6.12"} <= set(WITH_TIMER)
    assert "6.18" in ALWAYS
    assert not set(ALWAYS) & set(WITH_TIMER)


@pytest.mark.parametrize(
    ("change", "options", "fast", "timer", "words"),
    [
        (list, {}, ALWAYS, (False, "trace"), "this host did not use (every kvm_hv_timer_state line says hv_timer 0)"),
        (used, {}, BOTH, (True, "trace"), "this host used (a kvm_hv_timer_state line says hv_timer 1)"),
        (silent, {}, BOTH, (True, "assumed"), "this host is assumed to have used (no kvm_hv_timer_state line"),
        (silent, {"hv_timer": False}, ALWAYS, (False, "option"), "this host did not use (--hv-timer no)"),
        (silent, {"hv_timer": True}, BOTH, (True, "option"), "this host used (--hv-timer yes)"),
        (list, {"hv_timer": True}, BOTH, (True, "option"), "this host used (--hv-timer yes)"),
        (used, {"hv_timer": False}, ALWAYS, (False, "option"), "this host did not use (--hv-timer no)"),
        (silent, {"vendor": "svm"}, ALWAYS, (False, "vendor"), "SVM does not have"),
        (used, {"vendor": "svm", "hv_timer": False}, ALWAYS, (False, "vendor"), "SVM does not have"),
    ],
    ids=lambda value: getattr(value, "__name__", None) or (str(value) if isinstance(value, dict) else ""),
)
def test_the_trace_tells(
    linux: Lines,
    replayed: Callable[..., Report],
    change: Callable[[Lines], Lines],
    options: dict,
    fast: list[str],
    timer: tuple[bool, str],
    words: str,
) -> None:
    report = replayed(change(linux), **options)
    (vm,) = report.vms
    assert vm.deadlines == sum("msr_write 6e0" in line for line in linux) > 50
    assert vm.deadline_fast == fast
    assert vm.deadline_with_timer == WITH_TIMER
    assert (vm.hv_timer, vm.hv_timer_from) == timer
    assert vm.as_dict()["tsc_deadline"] == {
        "writes": vm.deadlines,
        "fast_in": fast,
        "with_preemption_timer": WITH_TIMER,
        "preemption_timer": {"used": timer[0], "from": timer[1]},
    }
    assert f"taken fast by: {', '.join(fast)}\n" in said(report)
    assert f"{', '.join(WITH_TIMER)}: the fast path needs the preemption timer, which {words}" in said(report)
    assumed = " ".join(vm.assumptions)
    assert ("as the trace has no kvm_hv_timer_state line" in assumed) == (timer[1] == "assumed")
    told_otherwise = change is not silent and timer[1] != "trace" and timer[0] != (change is used)
    assert ("against the kvm_hv_timer_state lines of the trace" in assumed) == told_otherwise


def test_each_vm_has_its_own_host_settings(linux: Lines, replayed: Callable[..., Report]) -> None:
    """MWAIT exits that are disabled for one VM take the timer from that VM alone."""
    second = [
        re.sub(r"-(\d+)( .*?) (\d+)\.", lambda m: f"-{int(m[1]) + 100}{m[2]} {int(m[3]) + 500}.", line, count=1)
        for line in used(linux)
        if not line.startswith("#")
    ]
    report = replayed(linux + second)
    assert [(vm.hv_timer, vm.hv_timer_from) for vm in report.vms] == [(False, "trace"), (True, "trace")]
    assert [vm.deadline_fast for vm in report.vms] == [ALWAYS, BOTH]


def test_svm_has_no_preemption_timer(linux: Lines, replayed: Callable[..., Report]) -> None:
    with pytest.raises(ValueError, match="hv_timer=True: SVM has no preemption timer"):
        replayed(linux, vendor="svm", hv_timer=True)


def test_deadlines_of_a_thread_that_is_no_vcpu_are_named(linux: Lines, replayed: Callable[..., Report]) -> None:
    """A thread that shows nothing but deadlines cannot be placed, and that is said."""
    stray = "            qemu-77      [000] .....  9999.000001: kvm_msr: msr_write 6e0 = 0x123\n"
    report = replayed([*linux, stray])
    assert "1 TSC_DEADLINE writes came from threads whose VM and vCPU no line tells: left out" in report.notes
    assert report.vms[0].deadlines == replayed(linux).vms[0].deadlines
