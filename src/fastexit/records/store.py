"""Blocks of rows that are gone through more than once: in memory as far as they fit, in an unnamed file beyond."""

from __future__ import annotations

import tempfile
import weakref
from collections.abc import Iterator

import numpy as np

from fastexit.records.columns import RECORD, Rows

KEPT_ROWS = 1 << 20
"""So many rows stay in memory, 64 MiB."""


def joined(parts: list[Rows]) -> Rows:
    """Rows one behind the other; NumPy would copy them field by field."""
    return parts[0] if len(parts) == 1 else np.concatenate([part.view(np.uint64) for part in parts]).view(RECORD)


class Store:
    """Rows as they come; iterating gives them again in the same blocks.

    >>> store = Store(kept=1)
    >>> for n in 1, 2:
    ...     store.add(np.zeros(n, RECORD))
    >>> [len(block) for block in store], [len(block) for block in store]
    ([1, 2], [1, 2])
    """

    def __init__(self, kept: int = KEPT_ROWS) -> None:
        self._room = kept
        self._blocks: list[Rows] = []
        self._sizes: list[int] = []
        self._file = tempfile.TemporaryFile()
        weakref.finalize(self, self._file.close)

    def __len__(self) -> int:
        """Rows, in all."""
        return sum(map(len, self._blocks)) + sum(self._sizes)

    def add(self, rows: Rows) -> None:
        """A block more; the array is not to be changed afterwards."""
        if not self._sizes and len(rows) <= self._room:
            self._room -= len(rows)
            self._blocks.append(rows)
            return
        self._file.write(np.ascontiguousarray(rows).data)
        self._sizes.append(len(rows))

    def __iter__(self) -> Iterator[Rows]:
        yield from self._blocks
        self._file.flush()
        at = 0
        for size in self._sizes:
            self._file.seek(at)
            at += size * RECORD.itemsize
            yield np.frombuffer(self._file.read(size * RECORD.itemsize), RECORD)
