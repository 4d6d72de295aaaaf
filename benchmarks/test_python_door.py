"""Rows 4 and 5: a WRMSR through the pure Python dispatcher; the fast path against the generic path at both doors."""

from __future__ import annotations

import statistics
from collections.abc import Callable

import pytest
import streams
from bars import Record
from timing import bare, interleaved, ratio

from fastexit.insight.compare import DOORS, compare, consume, unicasts

TARGETS = 63, 2_000
PASSES = {63: 400, 2_000: 31}
"""Rounds by number of targets: a short round needs many."""


@pytest.mark.parametrize("targets", TARGETS)
def test_wrmsr(benchmark: Callable, record: Record, targets: int) -> None:
    """Row 4: each IPI of a round has a target of its own, which takes it before the next round.

    The loop over the values is in both sides.
    """
    m = streams.machine(targets + 1)
    values = [int(value) for value in unicasts(m, targets)["value"]]
    wrmsr = m.vcpus[0].wrmsr

    def ours() -> None:
        for value in values:
            wrmsr(0x830, value)

    def nothing() -> None:
        for value in values:
            bare(0, 0x830, value)

    outcomes = {wrmsr(0x830, value) for value in values}
    assert {(o.path.name, o.completion.name, o.accepted) for o in outcomes} == {("FAST", "REENTER_GUEST", 1)}
    benchmark.group = "Python door"
    sides = {"consume": lambda: consume(m), "ours": ours, "bare": nothing}
    times = benchmark.pedantic(lambda: interleaved(sides, PASSES[targets]), rounds=1)
    ns = {side: statistics.median(times[side]) / targets for side in ("ours", "bare")}
    record.add("4", f"N = {targets + 1}", ratio(times, "ours", "bare"), **ns)


@pytest.mark.parametrize("door", DOORS)
def test_fast_over_generic(benchmark: Callable, record: Record, door: str) -> None:
    """Row 5: the founding demand."""
    benchmark.group = "fast against generic, 6.18"
    result = benchmark.pedantic(lambda: compare(streams.KERNEL, door, rounds=41), rounds=1)
    record.add(f"5 {door}", "6.18", result.ratio, fast_ns=result.fast_ns, generic_ns=result.generic_ns)
