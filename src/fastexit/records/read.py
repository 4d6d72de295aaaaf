"""A trace of any shape, read into columns in one pass and in constant memory."""

from __future__ import annotations

import os
from collections.abc import Callable

import numpy as np

from fastexit.records.block import ROW_WORDS
from fastexit.records.columns import NO_TIME, RECORD, Event, Recording, Rows
from fastexit.records.interning import MOST_NAMES, MOST_THREADS, Words
from fastexit.records.scan import Scanner
from fastexit.records.store import Store, joined
from fastexit.trace.text import TraceText

BLOCK_ROWS = 1 << 14
"""About so many rows are a block."""
SAMPLES = 32
"""So many lines of each kind of event are kept as they stand."""


def read(path: str | os.PathLike[str], progress: Callable[[int], object] | None = None) -> Recording:
    """Read a trace: ftrace text, what trace-cmd and perf print, tables, excerpts; see trace.text.

    ``progress(n)`` is called as n more bytes on disk are consumed. What is damaged or cannot be read is counted and
    told in the Recording; TraceError, one line, is for a file that cannot be opened or is of a kind that needs another
    tool first.
    """
    text = TraceText(path, perf=True)
    reading = _Reading(text)
    for chunk in text.chunks(progress):
        reading.add(chunk)
    last = text.last(reading.line - 1, reading.rows)
    if last is not None:
        reading.add(last)
    return reading.done()


class _Reading:
    """A pass over a trace."""

    def __init__(self, text: TraceText) -> None:
        self._text = text
        self._words = Words()
        self._scanner = Scanner(self._words)
        self._store = Store()
        self._pending: list[Rows] = []
        self._waiting = 0
        self._latest = NO_TIME
        self._backwards = 0
        self._first_backwards = ""
        self._samples: list[tuple[int, bytes]] = []
        self._wanted = np.full(256, SAMPLES)
        self._wanted[Event.OTHER] = 0
        self.line: int = 1
        self.rows: int = 0

    def add(self, chunk: bytes) -> None:
        """Whole lines."""
        first = self.line
        rows, bad = self._scanner.scan(chunk, first)
        self.line = self._scanner.line
        self._sample(rows, chunk, first)
        if bad:
            rows = self._mended(rows, bad)
        if not len(rows):
            return
        real = self._text.real
        if not real.cpu:
            rows["cpu"] = -1
        if real.time:
            self._watch(rows)
        else:
            rows["time"] = NO_TIME
        self.rows += len(rows)
        self._pending.append(rows)
        self._waiting += len(rows)
        if self._waiting >= BLOCK_ROWS:
            self._flush()

    def _sample(self, rows: Rows, chunk: bytes, first: int) -> None:
        """Keep the first lines of each kind of event, of the rows of a chunk."""
        wanted = rows[self._wanted[rows["event"]] > 0]
        if not len(wanted) or self._text.retold:
            return
        lines = chunk.split(b"\n")
        for event in np.unique(wanted["event"]).tolist():
            numbers = wanted["line"][wanted["event"] == event][: self._wanted[event]].tolist()
            self._wanted[event] -= len(numbers)
            self._samples += [(number, lines[number - first]) for number in numbers]

    def _mended(self, rows: Rows, bad: list[tuple[int, bytes]]) -> Rows:
        """The rows with those of lines that can be read another way, all in order of lines."""
        parts = [rows]
        while bad:
            told = [(number, self._text.mend(line, number)) for number, line in bad]
            mended = [(number, line) for number, line in told if line is not None]
            numbers = np.array([number for number, _ in mended], "<u4")
            found, left = self._scanner.scan(b"\n".join(line for _, line in mended), 0)
            if len(found):
                found["line"] = numbers[found["line"]]
                parts.append(found)
            bad = [(int(numbers[i]), line) for i, line in left]
        if len(parts) == 1:
            return rows
        rows = joined(parts)
        order = np.argsort(rows["line"], kind="stable")
        return rows.view(np.uint64).reshape(-1, ROW_WORDS)[order].reshape(-1).view(RECORD)

    def _watch(self, rows: Rows) -> None:
        """Time may not go back."""
        times = np.empty(len(rows) + 1, np.int64)
        times[0], times[1:] = self._latest, rows["time"]
        self._latest = int(times[-1])
        back = np.flatnonzero(times[1:] < times[:-1])
        self._backwards += len(back)
        if len(back) and not self._first_backwards:
            at = int(back[0])
            before, after = times[at] / 1e9, times[at + 1] / 1e9
            self._first_backwards = (
                f"{self._text.path}:{rows['line'][at]}: time goes back from {before:.6f} to {after:.6f}: lines of "
                "several traces are mixed; sort them by time, or pass one trace at a time"
            )

    def _flush(self) -> None:
        if self._pending:
            self._store.add(joined(self._pending))
        self._pending = []
        self._waiting = 0

    def done(self) -> Recording:
        """Everything that was read."""
        self._flush()
        text, words = self._text, self._words
        found = []
        if self._backwards:
            more = f" (and {self._backwards - 1:,} times more)" if self._backwards > 1 else ""
            found.append(self._first_backwards + more)
        if words.too_many:
            found.append(
                f"{text.path}: more than {MOST_NAMES:,} names of events and reasons, or {MOST_THREADS:,} threads: "
                "lines with others are counted without"
            )
        threads = words.threads
        if not text.real.thread:
            threads = [thread._replace(comm="") for thread in threads]
        if not text.real.pid:
            threads = [thread._replace(pid=-1) for thread in threads]
        lines = self.line - 1
        return Recording(
            path=text.path,
            blocks=self._store,
            threads=threads,
            names=words.names,
            samples=sorted(self._samples),
            vcpu_of=words.vcpu_of,
            tables=text.tables,
            shape=text.shape,
            clock=text.clock,
            lines=lines + text.torn,
            unreadable_count=text.unreadable_count,
            unreadable=text.unreadable,
            lost=text.lost,
            lost_lines=text.lost_lines,
            problems=text.problems(lines, self.rows, between=found),
            notes=text.notes(self.rows),
        )
