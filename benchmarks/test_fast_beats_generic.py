"""The founding demand: the fast path beats generic WRMSR emulation. These fail when it does not.

pytest-benchmark times the calls of each side, on machines that differ in Machine.fastpath only. The verdict stands in
the fast side's test: compare.py times both sides in turn within one run, and the median of the rounds' ratios
counts. Every IPI has a target that nobody has posted to. Times are the model's, not silicon's; what the generic side
is at each door, it says as well.

What "beats" means follows the generation. From 6.12 on a fast ICR write goes straight back into the guest, so the whole
exit has to be cheaper. Before that the sender does the rest of the exit anyway, and what the patch promised is that the
IPI leaves earlier: so the time until it has left has to be shorter, and the whole exit must not become dearer.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any

import pytest
import streams
from bars import Record
from pytest_benchmark.fixture import BenchmarkFixture
from timing import WARMUP, need_times, turns

import fastexit as fx
from fastexit import regs as R
from fastexit.exits.exit import Exit
from fastexit.insight.compare import (
    DOORS,
    Comparison,
    booted,
    compare,
    compare_until_ipi,
    consume,
    fresh_targets,
    notified,
    step_of_ipi,
    unicasts,
)
from fastexit.outcome import OUTCOMES
from fastexit.profile import PROFILES
from fastexit.traits import Trait

SIDES = "fast", "generic"

CALLS = {"python": 2_000, "batch": 200}
"""pytest-benchmark's rounds: single exits at the Python door, whole batches at the other."""

NOT_DEARER = 0.95
"""Whole exits of generations whose fast path saves the sender little: 5 % are left to noise."""

EARLIER = 1.5
"""The IPI of a fast exit leaves in two thirds of the generic time or less; it is about a third on a quiet machine."""

REENTRY = {"python": 3.0, "batch": 1.1}
"""Whole exits that re-enter the guest."""

SENDERS = [
    (kernel, vendor)
    for kernel, known in PROFILES.items()
    for vendor in ("vmx", "svm")
    if vendor == "vmx" or not known.traits & (Trait.SVM_EXIT_32 | Trait.INHIBIT_X2APIC)
]
"""Generations and vendors whose fast path sends IPIs by posting. On SVM the seed's handler never sees a WRMSR, and from
5.8 to 5.15 a guest with x2APIC has no AVIC."""

left: list[float] = []
"""When the IPI of the call that is being timed has left."""


def until_ipi() -> float:
    """Tell the time, but behind a call the time at which its IPI left: pytest-benchmark's clock stops there."""
    return left.pop() if left else time.perf_counter()


def _verdict(benchmark: BenchmarkFixture, result: Comparison, demand: float) -> None:
    benchmark.extra_info.update(result._asdict())
    told = f"kernel {result.kernel}, {result.door}: fast {result.fast_ns:,.0f} ns, generic {result.generic_ns:,.0f} ns"
    assert result.ratio >= demand, f"{told}; generic over fast {result.ratio:.2f}, at least {demand:.2f}"


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("kernel", fx.profiles())
def test_whole_exit(benchmark: BenchmarkFixture, record: Record, kernel: str, door: str, side: str) -> None:
    """The whole exit; kernel 6.18 is row 5."""
    n = fresh_targets(door, "vmx", kernel)
    machine = booted(kernel, vcpus=n + 1)
    machine.fastpath = side == "fast"
    exits = unicasts(machine, n)
    values = [int(value) for value in exits["value"]]
    if door == "python":
        benchmark.group = f"whole exit, Python door, kernel {kernel}"
        call, setup = machine.vcpus[0].wrmsr, turns(machine, lambda: ((R.MSR_X2APIC_ICR, value) for value in values))
    else:
        benchmark.group = f"whole exit, batch door, {n:,} exits, kernel {kernel}"
        call, setup = machine.run, turns(machine, lambda: [(exits,)])
    benchmark.pedantic(call, setup=setup, rounds=CALLS[door], warmup_rounds=WARMUP)
    consume(machine)
    outcomes = machine.run(exits)
    assert (outcomes["path"] == (side == "fast")).all()
    assert (outcomes["accepted"] == 1).all()
    assert notified(machine, outcomes["code"]) == n
    if side == "fast":
        need_times(benchmark)
        result = compare(kernel, door, rounds=41)
        if kernel == streams.KERNEL:
            record.add(f"5 {door}", kernel, result.ratio, fast_ns=result.fast_ns, generic_ns=result.generic_ns)
        reenters = PROFILES[kernel].traits & Trait.ICR_REENTERS
        _verdict(benchmark, result, REENTRY[door] if reenters else NOT_DEARER)


@pytest.mark.benchmark(timer=until_ipi)
@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize(("kernel", "vendor"), SENDERS)
def test_ipi_leaves_earlier(benchmark: BenchmarkFixture, kernel: str, vendor: str, side: str) -> None:
    """From the exit until the IPI has left, in the Python dispatcher."""
    n = fresh_targets("python", vendor, kernel)
    machine = booted(kernel, vendor, n + 1)
    machine.fastpath = side == "fast"
    loop, v = machine.dispatcher, machine.vcpus[0]
    values = [int(value) for value in unicasts(machine, n)["value"]]
    method = step_of_ipi(kernel, vendor, fastpath=side == "fast")
    step = getattr(loop, method)
    sent = []

    def stamped(*args: Any) -> Any:
        result = step(*args)
        left[:] = [time.perf_counter()]
        sent.append(args)
        return result

    def calls() -> Iterable[tuple]:
        for value in values:
            yield v, Exit(loop.vendor.wrmsr_reason, R.MSR_X2APIC_ICR, value, loop.vendor.wrmsr_info1, length=2)

    setattr(loop, method, stamped)
    benchmark.group = f"until the IPI left, {vendor}, kernel {kernel}"
    code = benchmark.pedantic(loop.run_exit, setup=turns(machine, calls), rounds=CALLS["python"], warmup_rounds=WARMUP)
    left.clear()
    assert OUTCOMES[code].path == (fx.Path.FAST if side == "fast" else fx.Path.SLOW)
    assert len(sent) == (CALLS["python"] + WARMUP if benchmark.enabled else 1)
    if side == "fast":
        need_times(benchmark)
        _verdict(benchmark, compare_until_ipi(kernel, vendor=vendor), EARLIER)
