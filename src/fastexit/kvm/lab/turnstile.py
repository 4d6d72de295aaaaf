"""Many sessions on one wire: what all of them ask for goes over together.

Models: nothing. A trip costs the same for one record and for hundreds, and more on a busy machine, where each side has
to wait for its turn of a CPU.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from fastexit.kvm.lab.wire import Answer, Record, Wire


class _Waiting:
    """One thread's records until their answers are there."""

    def __init__(self, records: Sequence[Record]) -> None:
        self.records = records
        self.answers: list[Answer] = []
        self.error: BaseException | None = None
        self.done = threading.Lock()
        self.done.acquire()


class Turnstile:
    """Collects the records of all threads that are inside; the last one of them to ask carries everything over."""

    def __init__(self, wire: Wire) -> None:
        self._wire = wire
        self._lock = threading.Lock()
        self._inside = 0
        self._queue: list[_Waiting] = []

    @contextmanager
    def inside(self) -> Iterator[None]:
        """The calling thread is one that trips wait for."""
        with self._lock:
            self._inside += 1
        try:
            yield
        finally:
            with self._lock:
                self._inside -= 1
                queue = self._taken()
            self._carry(queue)

    def trip(self, records: Sequence[Record], seconds: float = 60.0) -> list[Answer]:
        """As `Wire.trip`; at once where nobody is inside."""
        with self._lock:
            if not self._inside:
                return self._wire.trip(records, seconds)
            mine = _Waiting(records)
            self._queue.append(mine)
            queue = self._taken()
        self._carry(queue)
        mine.done.acquire()
        if mine.error is not None:
            raise mine.error
        return mine.answers

    def _taken(self) -> list[_Waiting]:
        """All that waits, when everybody inside does; nothing otherwise."""
        if len(self._queue) < self._inside:
            return []
        queue, self._queue = self._queue, []
        return queue

    def _carry(self, queue: list[_Waiting]) -> None:
        if not queue:
            return
        try:
            answers = self._wire.trip([record for one in queue for record in one.records], 60.0 + 5.0 * len(queue))
            at = 0
            for one in queue:
                one.answers = answers[at : at + len(one.records)]
                at += len(one.records)
        except BaseException as error:
            for one in queue:
                one.error = error
        finally:
            for one in queue:
                one.done.release()
