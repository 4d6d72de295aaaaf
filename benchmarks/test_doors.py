"""Whole exits at both doors, fast and generic side on the same machine state, for every generation.

Times are the model's, not silicon's. The generic side is the library's own generic path with all its steps; what that
is at each door, compare.py says. Every exit of a round has a target of its own, emptied before the next round.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
from timing import bare

import fastexit as fx
from fastexit.insight.compare import DOORS, booted, consume, notified, unicasts

ROUNDS = 15


@pytest.mark.parametrize("side", ["fast", "generic"])
@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("kernel", fx.profiles())
def test_exit(benchmark: Callable, kernel: str, door: str, side: str) -> None:
    make, n, _ = DOORS[door]
    machine = booted(kernel, vcpus=n + 1)
    machine.fastpath = side == "fast"
    benchmark.group = f"{door} door, {n:,} exits, kernel {kernel}"
    exits = unicasts(machine, n)
    benchmark.extra_info["exits"] = n
    benchmark.pedantic(make(machine, exits), setup=lambda: consume(machine), rounds=ROUNDS, warmup_rounds=1)
    benchmark.extra_info["ns_per_exit"] = benchmark.stats.stats.median / n * 1e9
    consume(machine)
    outcomes = machine.run(exits)
    assert (outcomes["path"] == (side == "fast")).all()
    assert (outcomes["accepted"] == 1).all()
    assert notified(machine, outcomes["code"]) == n


def test_floor(benchmark: Callable) -> None:
    """What a bare Python call with three arguments costs: the unit of the Python door."""
    benchmark.group = "floor"

    def calls() -> None:
        for _ in range(2_000):
            bare(1, 2, 3)

    benchmark.pedantic(calls, rounds=ROUNDS, warmup_rounds=1)
