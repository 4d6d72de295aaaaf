"""Who may call the model: every thread at once, or one after the other while a trace is written.

Models: nothing. Lines of one trace have an order, so a machine that is traced does one exit at a time; so does one
whose kernels are not compiled, for those are not atomic.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from types import TracebackType


class Gate:
    """A context manager round each exit; ``behind`` is called at its end, before the next thread comes."""

    def __init__(self, alone: bool) -> None:
        self._lock = threading.RLock() if alone else None
        self._depth = 0
        self.behind: Callable[[], object] | None = None

    def serialise(self, behind: Callable[[], object]) -> None:
        """One thread at a time from now on; before the threads begin."""
        self._lock = self._lock or threading.RLock()
        self.behind = behind

    def __enter__(self) -> None:
        if self._lock is not None:
            self._lock.acquire()
            self._depth += 1

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._lock is not None:
            self._depth -= 1
            try:
                if self._depth == 0 and self.behind is not None:
                    self.behind()
            finally:
                self._lock.release()
