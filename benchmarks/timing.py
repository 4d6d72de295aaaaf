"""Interleaved rounds: every side is timed in turn, so that a noisy neighbour hits all of them."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Hashable
from typing import Any, TypeVar

ROUNDS = 15
Name = TypeVar("Name", bound=Hashable)


def bare(a: int, b: int, c: int) -> int:
    """The unit of the Python door: a call with three arguments that does nothing."""
    return a


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
