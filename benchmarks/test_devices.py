"""Row 13: the irqchip's devices by the batch door: a line from its rise to IRR, the IOAPIC's page, a level EOI."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from itertools import cycle

import numpy as np
import pytest
import streams
from bars import Record
from pytest_benchmark.fixture import BenchmarkFixture
from timing import WARMUP, interleaved, need_times, ratio

from fastexit import layout as L
from fastexit import regs as R

N = 2_000
PASSES = 100
VCPUS = 64
ID = R.MSR_X2APIC_BASE + (R.APIC_ID >> 4)
Side = tuple[Callable[[], object], Callable[[], np.ndarray]]
"""What has to be so before a round, and the round."""


def ipi() -> Side:
    """The unit: a plain IPI, consumed."""
    m = streams.machine(VCPUS)
    exits = streams.ipis(m, N)
    return (lambda: None), (lambda: m.run(exits))


def line() -> Side:
    """An edge-triggered pin: up, taken, down, which is more than the way to IRR."""
    m = streams.machine(VCPUS)
    exits = streams.lines(m, N)
    return (lambda: None), (lambda: m.run(exits))


def level_eoi() -> Side:
    """Level-triggered lines up, taken by an exit that injects, down, and EOIs; without APICv, where each exits."""
    m = streams.machine(VCPUS, apicv=False)
    exits = streams.level_eois(m, N)
    return (lambda: None), (lambda: m.run(exits))


def page() -> Side:
    """Reads of the IOAPIC's window."""
    m = streams.wired(streams.machine(VCPUS))
    exits = streams.ioapic_reads(m, N)
    return (lambda: None), (lambda: m.run(exits))


def register() -> Side:
    """Reads of an APIC's register, which leave the guest as well."""
    m = streams.machine(VCPUS)
    exits = np.zeros(N, dtype=L.EXIT)
    exits["reason"], exits["msr"] = m.dispatcher.vendor.rdmsr_reason, ID
    return (lambda: None), (lambda: m.run(exits))


CASES = {
    "irq_line": (line, ipi, N, N),
    "EOI of a level interrupt": (level_eoi, register, 4 * N, N),
    "IOAPIC page access": (page, register, N, N),
}
"""A side, what it is measured over, and how many of each are in a round; of a level interrupt all four records."""


@pytest.mark.parametrize("name", CASES)
def test_device(benchmark: BenchmarkFixture, record: Record, name: str) -> None:
    """One of them, over what it is compared with."""
    ours, unit, n, units = CASES[name]
    (before, run), (_, other) = ours(), unit()
    before()
    outcomes = run()
    assert not outcomes["fault"].any()
    assert not outcomes["user"].any()
    if name == "irq_line":
        assert (outcomes["accepted"][0::3] == 1).all()
    benchmark.group = "devices"
    setups = cycle([before])
    benchmark.pedantic(run, setup=lambda: next(setups)(), rounds=PASSES, warmup_rounds=WARMUP)
    need_times(benchmark)
    times = interleaved({"before": before, "ours": run, "unit": other}, PASSES)
    ns = {"ours": statistics.median(times["ours"]) / n, "unit": statistics.median(times["unit"]) / units}
    benchmark.extra_info["over its unit"] = over = ratio(times, "ours", "unit") * units / n
    record.add("13 line" if name == "irq_line" else "13", name, over, **ns)
