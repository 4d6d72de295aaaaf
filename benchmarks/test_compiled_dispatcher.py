"""Row 12: single exits of a machine with the compiled dispatcher, beside a bare Python call with three arguments."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import streams
from bars import Record
from pytest_benchmark.fixture import BenchmarkFixture
from timing import WARMUP, bare, interleaved, need_times, ratio

import fastexit as fx
from fastexit import regs as R
from fastexit.insight.compare import consume

CALLS = 2_000
"""pytest-benchmark's rounds, a call each."""
PASSES = 400
"""Rounds of the ratio."""
TARGETS = 63
CLASSES = range(0x20, 0x100, 0x10)
"""A vector of each priority class: one of a class can be in service."""
EOI, TPR, ID = (R.MSR_X2APIC_BASE + (offset >> 4) for offset in (R.APIC_EOI, R.APIC_TASKPRI, R.APIC_ID))


class Case(NamedTuple):
    """A door and what a round calls it with, what has to be so before a round, and what each call comes to."""

    door: Callable[..., Any]
    calls: list[tuple[int, ...]]
    before: Callable[[], object]
    gives: object


def machine(kernel: str = streams.KERNEL, **options: Any) -> fx.Machine:
    m = fx.Machine(vcpus=TARGETS + 1, kernel=kernel, dispatcher="compiled", **options)
    m.boot_x2apic()
    for v in m.vcpus:
        m.dispatcher.start_run(v)
    return m


def eoi() -> Case:
    """Each EOI ends the interrupt in service that is highest then; without APICv, where it does exit."""
    m = machine(apicv=False)
    v = m.vcpus[0]

    def serve() -> None:
        while v.eoi() is not None:
            pass
        for vector in CLASSES:
            m.signal_msi(R.APIC_DEFAULT_PHYS_BASE, vector)
            assert v.ack() == vector

    return Case(v.wrmsr, [(EOI, 0)] * len(CLASSES), serve, fx.Path.SLOW)


def tpr() -> Case:
    """TPR goes up and down."""
    v = machine().vcpus[0]
    return Case(v.wrmsr, [(TPR, value) for value in (0x20, 0) * 20], lambda: None, fx.Path.SLOW)


def read(msr: int, value: int) -> Case:
    """A register that is a word of the page."""
    v = machine().vcpus[1]
    return Case(v.rdmsr, [(msr,)] * 40, lambda: None, value)


def icr() -> Case:
    """An ICR write of 5.8, which is fast, but goes round the loop: each IPI has a target of its own, which takes it."""
    m = machine("5.8")
    v = m.vcpus[0]
    calls = [(R.MSR_X2APIC_ICR, fx.icr(dest=i, vector=0x41)) for i in range(1, TARGETS + 1)]
    return Case(v.wrmsr, calls, lambda: consume(m), fx.Path.FAST)


CASES = {"EOI": eoi, "TPR": tpr, "read ID": lambda: read(ID, 1), "read TPR": lambda: read(TPR, 0), "ICR, 5.8": icr}


def sides(case: Case) -> dict[str, Callable[[], object]]:
    """A round of the door and one of bare calls, with the same loop around both."""
    door, calls = case.door, case.calls

    def write() -> None:
        for msr, value in calls:
            door(msr, value)

    def nothing_written() -> None:
        for msr, value in calls:
            bare(0, msr, value)

    def read() -> None:
        for (msr,) in calls:
            door(msr)

    def nothing_read() -> None:
        for (msr,) in calls:
            bare(0, msr, 0)

    ours, nothing = (write, nothing_written) if len(calls[0]) == 2 else (read, nothing_read)
    return {"before": case.before, "ours": ours, "bare": nothing}


@pytest.mark.parametrize("name", CASES)
def test_exit(benchmark: BenchmarkFixture, record: Record, name: str) -> None:
    """One exit that is no fast re-entry, in one compiled call."""
    case = CASES[name]()
    case.before()
    for arguments in case.calls:
        result = case.door(*arguments)
        assert (result.path if isinstance(result, fx.Outcome) else result) == case.gives
    benchmark.group = "compiled dispatcher"
    benchmark.pedantic(case.door, case.calls[0], rounds=CALLS, warmup_rounds=WARMUP)
    need_times(benchmark)
    times = interleaved(sides(case), PASSES)
    ns = {side: statistics.median(times[side]) / len(case.calls) for side in ("ours", "bare")}
    benchmark.extra_info["over a bare call"] = over = ratio(times, "ours", "bare")
    record.add("12", name, over, **ns)
