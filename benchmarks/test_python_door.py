"""Row 4: a WRMSR through the pure Python dispatcher, beside a bare Python call with three arguments."""

from __future__ import annotations

import statistics

import pytest
import streams
from bars import Record
from pytest_benchmark.fixture import BenchmarkFixture
from timing import WARMUP, bare, interleaved, need_times, ratio, turns

from fastexit import regs as R
from fastexit.insight.compare import consume, unicasts

CALLS = 2_000
"""pytest-benchmark's rounds, a call each."""
PASSES = {63: 400, 2_000: 31}
"""Rounds of the ratio by number of targets: a short round needs many."""


@pytest.mark.parametrize("side", ["wrmsr", "bare call"])
@pytest.mark.parametrize("targets", PASSES)
def test_wrmsr(benchmark: BenchmarkFixture, record: Record, targets: int, side: str) -> None:
    """Each IPI of a round has a target of its own, which takes it before the next round.

    Both sides have the same arguments, and the loop over them is in both sides of the ratio.
    """
    m = streams.machine(targets + 1)
    values = [int(value) for value in unicasts(m, targets)["value"]]
    wrmsr = m.vcpus[0].wrmsr
    benchmark.group = f"Python door, N = {targets + 1}"
    if side == "wrmsr":
        call, setup = wrmsr, turns(m, lambda: ((R.MSR_X2APIC_ICR, value) for value in values))
    else:
        call, setup = bare, turns(m, lambda: ((0, R.MSR_X2APIC_ICR, value) for value in values))
    benchmark.pedantic(call, setup=setup, rounds=CALLS, warmup_rounds=WARMUP)
    if side == "bare call":
        return

    def ours() -> None:
        for value in values:
            wrmsr(R.MSR_X2APIC_ICR, value)

    def nothing() -> None:
        for value in values:
            bare(0, R.MSR_X2APIC_ICR, value)

    outcomes = {wrmsr(R.MSR_X2APIC_ICR, value) for value in values}
    assert {(o.path.name, o.completion.name, o.accepted) for o in outcomes} == {("FAST", "REENTER_GUEST", 1)}
    need_times(benchmark)
    times = interleaved({"consume": lambda: consume(m), "ours": ours, "bare": nothing}, PASSES[targets])
    ns = {side: statistics.median(times[side]) / targets for side in ("ours", "bare")}
    benchmark.extra_info["over a bare call"] = over = ratio(times, "ours", "bare")
    record.add("4", f"N = {targets + 1}", over, **ns)
