"""KVM's tracepoints of a machine: the ring as records, and as ftrace text.

Models: tracefs as far as the events go that text.py lists, in the text of the machine's kernel. Kernels write
records only while tracing is on; off, the cost is a test of one bit. When the ring is full, later records are counted,
not kept.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from fastexit import layout as L
from fastexit.tracepoints.releases import held, printed_as
from fastexit.tracepoints.text import ARGUMENTS, CONTEXT_COLUMNS, Source, context_text, formats, text

if TYPE_CHECKING:
    from fastexit.machine import Machine

RECORD = np.dtype([("event", "<u4"), ("vcpu", "<i4"), ("args", "<u8", (7,))])
"""One record: event is layout.TP_*, vcpu the index of its vCPU (-1: none), args what the event prints."""


FIRST_PID = 1000
"""The process id that is printed for the thread of vCPU 0."""


class Line(NamedTuple):
    """One line of a trace."""

    record: int
    """Its record's number."""
    vcpu: int
    """The index of the vCPU that it is about, -1 where it is about none."""
    context: str
    """What ftrace prints in front of the time stamp: "d..1." or ".....". The fast path's signature: an IPI that leaves
    before host interrupts are on again has a d."""
    text: str
    """``event: payload``."""


class Words(NamedTuple):
    """A machine's memory without the rest of it: what its trace is read from."""

    words: np.ndarray
    mem: memoryview
    kernel: str
    release: str


class Trace:
    """``machine.trace``: switch on, read as records or text, clear.

    A generation has no line for a tracepoint that came later, so there may be fewer lines than records.
    """

    def __init__(self, machine: Machine | Words) -> None:
        self._mem = machine.mem
        self._words = machine.words
        release = printed_as(machine.kernel, machine.release)
        svm = bool(machine.mem[L.H_CONFIG] & L.CONFIG_SVM)
        self._source = Source(release, svm, self._descriptor)
        self._formats = formats(release)
        self._columns = held(CONTEXT_COLUMNS, release) or 0

    @property
    def events(self) -> frozenset[str]:
        """Names of the events that have a line in this release."""
        return frozenset(template.partition(":")[0] for template in self._formats.values())

    @property
    def enabled(self) -> bool:
        """Whether kernels write records."""
        return bool(self._mem[L.H_CONFIG] & L.CONFIG_TRACE)

    def enable(self) -> None:
        """Switch tracing on."""
        self._mem[L.H_CONFIG] |= L.CONFIG_TRACE

    def disable(self) -> None:
        """Switch tracing off; what was recorded stays."""
        self._mem[L.H_CONFIG] &= ~L.CONFIG_TRACE

    def clear(self) -> None:
        """Forget all records."""
        self._mem[L.H_TRACE_HEAD] = 0

    def __len__(self) -> int:
        return min(self._mem[L.H_TRACE_HEAD], L.TRACE_CAPACITY)

    @property
    def lost(self) -> int:
        """Records that did not fit since the last clear."""
        return max(self._mem[L.H_TRACE_HEAD] - L.TRACE_CAPACITY, 0)

    def records(self) -> np.ndarray:
        """A copy of the records since the last clear, dtype RECORD, oldest first."""
        return _records(self._raw())

    def contexts(self) -> list[str]:
        """Give the context of every line that `lines` has, see `Line`."""
        return [line.context for line in self.lines_of(self._raw())]

    def vcpus(self) -> list[int]:
        """Index of the vCPU that each line of `lines` is about, -1 where it is about none."""
        return [line.vcpu for line in self.lines_of(self._raw())]

    def lines(self) -> list[str]:
        """``event: payload`` of every record, as ftrace prints it after the time stamp."""
        return [line.text for line in self.lines_of(self._raw())]

    def text(self) -> str:
        """All records as ftrace text. The model has no clock: a record's number serves as its microsecond."""
        return "".join(ftrace_line(line, 1000 * line.record) for line in self.lines_of(self._raw()))

    def __iter__(self) -> Iterator[str]:
        return iter(self.lines())

    def drain(self) -> np.ndarray:
        """Give the records as the ring has them, a row each, and forget them: a copy and no more.

        `lines_of` makes lines of it whenever there is time. A machine that is traced for long has them all so.
        """
        raw = self._raw().copy()
        self.clear()
        return raw

    def lines_of(self, raw: np.ndarray) -> Iterator[Line]:
        """Give a line for every record of ``raw`` that this generation has a line for; `drain` gives such arrays."""
        words = raw[:, 0].tolist()
        for n, record in enumerate(_records(raw).tolist()):
            event, vcpu, arguments = record
            line = self.line(event, vcpu, arguments.tolist())
            if line is not None:
                yield Line(n, vcpu, context_text(event, words[n], self._columns), line)

    def _raw(self) -> np.ndarray:
        return self._words[L.TRACE : L.TRACE + len(self) * L.TRACE_STRIDE].reshape(-1, L.TRACE_STRIDE)

    def line(self, event: int, vcpu: int, args: list[int]) -> str | None:
        """Give the line of one record, of no vCPU where ``vcpu`` is -1; None where the release has none."""
        template = self._formats.get(event)
        if template is None:
            return None
        vcpu_id = self._mem[L.KVM + vcpu * L.KVM_STRIDE + L.K_VCPU_ID] if vcpu >= 0 else 0
        return text(template, self._source, event, vcpu_id, args)

    def _descriptor(self, vcpu_id: int) -> int:
        """Where the posted-interrupt descriptor of a vCPU lies in the machine's memory, in bytes; 0: no such vCPU."""
        ids = self._words[L.KVM + L.K_VCPU_ID : L.KVM + self._mem[L.H_NVCPUS] * L.KVM_STRIDE : L.KVM_STRIDE]
        found = np.flatnonzero(ids == vcpu_id)
        return 8 * (L.HOT + int(found[0]) * L.HOT_STRIDE) if len(found) else 0


def ftrace_line(line: Line, ns: int) -> str:
    """A line as ftrace prints it, with its newline; the thread of vCPU N is ``vcpuN``, with the process id 1000 + N."""
    task = f"vcpu{line.vcpu}" if line.vcpu >= 0 else "host"
    seconds, rest = divmod(ns, 1_000_000_000)
    who = f"{task:>16}-{FIRST_PID + line.vcpu:<7} [{max(line.vcpu, 0):03d}]"
    return f"{who} {line.context} {seconds:5d}.{rest // 1000:06d}: {line.text}\n"


def _records(raw: np.ndarray) -> np.ndarray:
    out = np.empty(len(raw), dtype=RECORD)
    out["event"] = raw[:, 0] & np.uint64(0xFF)
    out["vcpu"] = (raw[:, 0] >> np.uint64(8)).astype(np.uint32).astype(np.int64) - 1
    out["args"] = raw[:, 1:]
    for event in set(out["event"].tolist()):
        out["args"][out["event"] == event, ARGUMENTS.get(event, 3) :] = 0  # what an older record left there
    return out
