"""What pytest-benchmark leaves to us: fresh targets for each call, and sides that are timed in turn.

pytest-benchmark times one call after another of one side. A ratio of two sides needs both in every round, so that a
noisy neighbour hits both: ``interleaved`` times them so, and ``ratio`` is the median of the rounds' ratios.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Hashable, Iterable, Iterator
from typing import Any, TypeVar

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

import fastexit as fx
from fastexit.insight.compare import consume

ROUNDS = 15
WARMUP = 20
"""Calls before pytest-benchmark's first round, with one call a round."""
Name = TypeVar("Name", bound=Hashable)


def bare(a: int, b: int, c: int) -> int:
    """The unit of the Python door: a call with three arguments that does nothing."""
    return a


def turns(m: fx.Machine, calls: Callable[[], Iterable[tuple]]) -> Callable[[], tuple[tuple, dict]]:
    """Make a ``setup`` for benchmark.pedantic, which gives the arguments of one of the calls after another.

    When all have been made, the machine's targets are emptied, untimed, and the calls begin anew. So no IPI finds
    another one pending at its target.
    """

    def all_turns() -> Iterator[tuple[tuple, dict]]:
        while True:
            consume(m)
            for arguments in calls():
                yield arguments, {}

    return all_turns().__next__


def need_times(benchmark: BenchmarkFixture) -> None:
    """Skip the rest of a test, its comparison, when pytest-benchmark does not time."""
    if benchmark.disabled:
        pytest.skip("called once, not compared: pytest-benchmark times nothing (--benchmark-disable, or xdist)")


def interleaved(
    sides: dict[Name, Callable[[], Any]], rounds: int = ROUNDS, *, settle: bool = False
) -> dict[Name, list[int]]:
    """Nanoseconds of each side in each round, behind one round that warms up.

    ``settle``: each side runs once untimed right before it is timed, so that none pays for what the others have thrown
    out of the caches.
    """
    times: dict[Name, list[int]] = {name: [] for name in sides}
    gc.collect()
    gc.disable()
    try:
        for i in range(rounds + 1):
            for name, side in sides.items():
                if settle:
                    side()
                start = time.perf_counter_ns()
                side()
                spent = time.perf_counter_ns() - start
                if i:
                    times[name].append(spent)
    finally:
        gc.enable()
    return times


def ratio(times: dict[Name, list[int]], over: Name, under: Name) -> float:
    """Median of the rounds' ratios."""
    return statistics.median(a / b for a, b in zip(times[over], times[under], strict=True))
