"""How often each of many things came, in bounded memory."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterable, Mapping
from typing import Any, Generic, TypeVar

import numpy as np
import numpy.typing as npt

Key = TypeVar("Key", bound=Hashable)
KEPT = 1 << 14


class Tally(Generic[Key]):
    """A Counter that forgets the rarest when there are twice ``kept`` of them: what is frequent stays, and is exact
    as long as it was never forgotten.
    """

    def __init__(self, kept: int = KEPT) -> None:
        self.counts: Counter[Key] = Counter()
        self._kept = kept

    def add(self, pairs: Iterable[tuple[Key, int]]) -> None:
        """More of these."""
        counts = self.counts
        for key, n in pairs:
            counts[key] += n
        if len(counts) > 2 * self._kept:
            self.counts = Counter(dict(counts.most_common(self._kept)))


def ranked(counts: Mapping[Key, int]) -> list[tuple[Key, int]]:
    """The most frequent first, and the smaller of two that are as frequent: an order that is not by chance.

    >>> ranked({"b": 1, "a": 1, "c": 2})
    [('c', 2), ('a', 1), ('b', 1)]
    """
    return sorted(counts.items(), key=lambda pair: (-pair[1], pair[0]))


def count(keys: npt.NDArray[Any]) -> list[tuple[int, int]]:
    """Which integers there are, and how often.

    >>> count(np.array([7, 3, 7]))
    [(3, 1), (7, 2)]
    """
    values, counts = np.unique(keys, return_counts=True)
    return list(zip(values.tolist(), counts.tolist(), strict=True))


def often(columns: list[npt.NDArray[Any]], most: int | None = None) -> list[tuple[tuple[int, ...], int]]:
    """Which rows these columns of integers have, and how often; ``most``: of each value of the first column only so
    many rows, the most frequent.

    >>> often([np.array([1, 1, 2]), np.array([5, 5, 6])])
    [((1, 5), 2), ((2, 6), 1)]
    """
    n = len(columns[0])
    if not n:
        return []
    order = np.lexsort(columns[::-1])
    sorted_columns = [column[order] for column in columns]
    new = np.zeros(n, bool)
    new[0] = True
    for column in sorted_columns:
        new[1:] |= column[1:] != column[:-1]
    starts = np.flatnonzero(new)
    counts = np.diff(starts, append=n)
    if most is not None and len(starts) > most:
        first = sorted_columns[0][starts]
        by_count = np.lexsort((-counts, first))
        begins = np.flatnonzero(np.diff(first[by_count], prepend=first[by_count][0] - 1) != 0)
        place = np.arange(len(starts)) - np.repeat(begins, np.diff(begins, append=len(starts)))
        kept = np.sort(by_count[place < most])
        starts, counts = starts[kept], counts[kept]
    values = [column[starts].tolist() for column in sorted_columns]
    return list(zip(zip(*values, strict=True), counts.tolist(), strict=True))
