"""Durations of many groups in bounded memory: counts, totals and maxima exactly, quantiles as well as that allows."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from fastexit.answers.places import Longs
from fastexit.answers.report import Quantiles
from fastexit.records.columns import NO_TIME

EXACT = 1 << 17
"""Up to so many durations every quantile is exact; beyond, it is that of a histogram."""
_STEPS = 5
STEPS = 1 << _STEPS
"""Buckets an octave."""
ERROR = 1 / (2 * STEPS)
"""How far a histogram's quantile may be off, as a share of it."""
_OCTAVES = 40
_BUCKETS = _OCTAVES * STEPS
_ONE = 1023 << _STEPS  # the bucket of 1.0 in a double's bits


class Durations:
    """Collects durations by group, a small number; those that are NO_TIME do not count.

    >>> d = Durations()
    >>> d.feed(np.array([0, 0, 0, 1]), np.array([10, 30, 20, NO_TIME]))
    >>> d.of(0)
    Quantiles(count=3, median=20.0, p90=30.0, p99=30.0, maximum=30.0, total=60.0)
    >>> d.of(1) is None
    True
    """

    def __init__(self, exact: int = EXACT) -> None:
        self._room = exact
        self._known = np.zeros(0, np.int64)  # groups, sorted; the arrays below have them as they came
        self._at = np.zeros(0, np.int64)
        self._samples: list[tuple[Longs, Longs]] = []
        self._histogram = np.zeros((0, _BUCKETS), np.int64)
        self._count = np.zeros(0, np.int64)
        self._total = np.zeros(0, np.float64)
        self._most = np.zeros(0, np.int64)

    def feed(self, groups: npt.NDArray[Any], values: npt.NDArray[Any]) -> None:
        """More durations, each of the group beside it."""
        told = values != NO_TIME
        if not told.any():
            return
        groups, values = groups[told].astype(np.int64), values[told].astype(np.int64)
        groups = self._indices(groups)
        size = len(self._count)
        self._count += np.bincount(groups, minlength=size)
        self._total += np.bincount(groups, values, minlength=size)
        np.maximum.at(self._most, groups, values)
        if self._room >= len(values):
            self._room -= len(values)
            self._samples.append((groups, values))
            return
        self._room = 0
        for past in self._samples:
            self._bin(*past)
        self._samples = []
        self._bin(groups, values)

    def groups(self) -> list[int]:
        """Those of which there are durations."""
        return [int(group) for group in self._known]

    def of(self, group: int) -> Quantiles | None:
        """What is known of a group; None where there is nothing."""
        return self.of_all([group])

    def of_all(self, groups: list[int]) -> Quantiles | None:
        """The same of several groups as one."""
        wanted = np.isin(self._known, groups)
        if not wanted.any():
            return None
        known = self._at[wanted]
        count = int(self._count[known].sum())
        most = float(self._most[known].max())
        ranks = [max(int(np.ceil(share * count)) - 1, 0) for share in (0.5, 0.9, 0.99)]
        if self._samples or not len(self._histogram):
            values = np.concatenate([v[np.isin(g, known)] for g, v in self._samples])
            values.partition(ranks)
            found = [float(values[rank]) for rank in ranks]
        else:
            below = self._histogram[known].sum(0).cumsum()
            buckets = np.searchsorted(below, ranks, "right")
            found = [min(_middle(int(bucket)), most) for bucket in buckets]
        median, p90, p99 = found
        return Quantiles(count, median, p90, p99, most, float(self._total[known].sum()))

    def _indices(self, groups: Longs) -> Longs:
        """Where the arrays have these groups, new ones behind the others."""
        if len(self._known):
            place = np.minimum(np.searchsorted(self._known, groups), len(self._known) - 1)
            if (self._known[place] == groups).all():
                found: Longs = self._at[place]
                return found
        fresh = np.setdiff1d(groups, self._known)
        at = np.concatenate([self._at, np.arange(len(self._at), len(self._at) + len(fresh))])
        known = np.concatenate([self._known, fresh])
        order = np.argsort(known)
        self._known, self._at = known[order], at[order]
        self._grow(len(fresh))
        return self._indices(groups)

    def _grow(self, more: int) -> None:
        self._count = np.concatenate([self._count, np.zeros(more, np.int64)])
        self._total = np.concatenate([self._total, np.zeros(more)])
        self._most = np.concatenate([self._most, np.full(more, -1, np.int64)])
        if len(self._histogram):
            self._histogram = np.concatenate([self._histogram, np.zeros((more, _BUCKETS), np.int64)])

    def _bin(self, groups: Longs, values: Longs) -> None:
        if len(self._histogram) < len(self._count):
            more = len(self._count) - len(self._histogram)
            self._histogram = np.concatenate([self._histogram, np.zeros((more, _BUCKETS), np.int64)])
        bits = np.maximum(values, 1).astype(np.float64).view(np.int64) >> (52 - _STEPS)
        buckets = np.minimum(bits - _ONE, _BUCKETS - 1)
        keys, counts = np.unique(groups * _BUCKETS + buckets, return_counts=True)
        self._histogram.reshape(-1)[keys] += counts


def _middle(bucket: int) -> float:
    """The duration in the middle of a bucket."""
    octave, step = divmod(bucket, STEPS)
    return float(1 << octave) * (1 + (step + 0.5) / STEPS)
