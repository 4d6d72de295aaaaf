"""The machine's tracepoints as a file of ftrace text, while it runs: what `fastexit report` and `replay` read.

Models: nothing. Lines are the model's; their times are those of the machine's clock.
"""

from __future__ import annotations

import gzip
import lzma
from collections.abc import Callable
from pathlib import Path
from typing import IO

from fastexit.machine import Machine

HEAD = "# tracer: nop\n#\n"
FIRST_PID = 1000
"""Threads' ids: vCPU 0 has this one. tracepoints.ring numbers them alike."""


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
        self._trace.clear()
        self._trace.enable()

    def drain(self) -> None:
        """Takes what the ring has; nobody else may be in the machine meanwhile."""
        trace = self._trace
        if not len(trace):
            return
        seconds, rest = divmod(self._clock(), 1_000_000_000)
        stamp = f"{seconds:5d}.{rest // 1000:06d}"
        for vcpu, context, line in zip(trace.vcpus(), trace.contexts(), trace.lines(), strict=True):
            task = f"vcpu{vcpu}" if vcpu >= 0 else "host"
            self._file.write(f"{task:>16}-{FIRST_PID + vcpu:<7} [{max(vcpu, 0):03d}] {context} {stamp}: {line}\n")
            self.lines += 1
        self.lost += trace.lost
        trace.clear()

    def close(self) -> None:
        """Switches tracing off and ends the file."""
        self._trace.disable()
        self.drain()
        self._file.close()


def _opened(path: Path) -> IO[str]:
    if path.suffix == ".xz":
        return lzma.open(path, "wt", encoding="ascii")
    if path.suffix == ".gz":
        return gzip.open(path, "wt", encoding="ascii")
    return open(path, "w", encoding="ascii", buffering=1 << 16)
