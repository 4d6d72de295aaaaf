"""The machine's tracepoints as a file of ftrace text, while it runs: what `fastexit report` and `replay` read.

Models: nothing. Lines are the model's; their times are those of the machine's clock.
"""

from __future__ import annotations

import gzip
import lzma
from collections.abc import Callable
from pathlib import Path
from typing import IO

import numpy as np

from fastexit.machine import Machine
from fastexit.tracepoints.ring import ftrace_line

HEAD = "# tracer: nop\n#\n"
MOST_KEPT = 1 << 20
"""Records that wait to become lines, at most: 64 bytes each."""


class TraceFile:
    """Writes to ``path``, packed by its ending (.xz, .gz).

    ``lines`` counts what it has, ``lost`` what the ring had no room for.
    """

    def __init__(self, path: Path, machine: Machine, clock: Callable[[], int]) -> None:
        self._trace = machine.trace
        self._clock = clock
        self.lines: int = 0
        self.lost: int = 0
        self._file: IO[str] = _opened(path)
        self._file.write(HEAD)
        self._kept: list[tuple[int, np.ndarray]] = []
        """What `drain` took, with its time: the guest's CPUs wait for it, so no line is made there."""
        self.waiting: int = 0
        """Records that are no lines yet."""
        self._trace.clear()
        self._trace.enable()

    def drain(self) -> None:
        """Takes what the ring has; nobody else may be in the machine meanwhile."""
        trace = self._trace
        if not len(trace):
            return
        self.lost += trace.lost
        records = trace.drain()
        self._kept.append((self._clock(), records))
        self.waiting += len(records)
        if self.waiting >= MOST_KEPT:
            self._write()

    def _write(self) -> None:
        """Makes lines of what is kept."""
        if not self._kept:
            return
        times = [ns for ns, records in self._kept for _ in range(len(records))]
        for line in self._trace.lines_of(np.concatenate([records for _, records in self._kept])):
            self._file.write(ftrace_line(line, times[line.record]))
            self.lines += 1
        self._kept.clear()
        self.waiting = 0

    def close(self) -> None:
        """Switches tracing off and ends the file."""
        self._trace.disable()
        try:
            self.drain()
            self._write()
        finally:
            self._file.close()


def _opened(path: Path) -> IO[str]:
    if path.suffix == ".xz":
        return lzma.open(path, "wt", encoding="ascii")
    if path.suffix == ".gz":
        return gzip.open(path, "wt", encoding="ascii")
    return open(path, "w", encoding="ascii", buffering=1 << 16)
