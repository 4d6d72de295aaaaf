"""Where calls of no vCPU keep their lists of targets: a row for each thread that makes such calls.

Models: nothing of KVM, where each thread has a stack. kernels/hostrow.py has the rows, of which calls from C have those
that are left.
"""

from __future__ import annotations

import threading

from fastexit import layout as L
from fastexit.jit.declare import load

MOST = 32
"""Threads at a time that have a row of their own; those beyond share the first one."""


class _Pool:
    """The rows that threads of Python's have had; one that has ended leaves its row to the next."""

    def __init__(self, handle: int) -> None:
        self.handle = handle
        self.free: list[int] = []
        self.made: int = 0
        self.lock: threading.Lock = threading.Lock()

    def take(self) -> int:
        with self.lock:
            if self.free:
                return self.free.pop()
            if self.made == MOST:
                return L.HOST
            self.made += 1
            return load("take_host_row")(self.handle)


class _Held:
    """A row, for as long as its thread lives."""

    def __init__(self, pool: _Pool) -> None:
        self.pool: _Pool = pool
        self.row: int = pool.take()

    def __del__(self) -> None:
        if self.row != L.HOST:
            self.pool.free.append(self.row)


class HostRows(threading.local):
    """The calling thread's row; ``last`` is the row of its last call."""

    def __init__(self, pool: _Pool | None) -> None:
        self.pool: _Pool | None = pool
        self.last: int = L.HOST
        self._held: _Held | None = None

    @classmethod
    def of(cls, handle: int, threads: bool) -> HostRows:
        """A machine's; one without threads has one row."""
        return cls(_Pool(handle) if threads else None)

    def own(self) -> int:
        """The row for a call that may come beside others."""
        if self.pool is None:
            return L.HOST
        if self._held is None:
            self._held = _Held(self.pool)
        self.last = self._held.row
        return self.last

    def shared(self) -> int:
        """The row for a call that nobody else makes meanwhile."""
        self.last = L.HOST
        return L.HOST
