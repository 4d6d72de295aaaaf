"""Trace text in: lines of every shape as threads and events, and what is wrong with them.

Reads what tracefs prints (`trace`, `trace_pipe`), `trace-cmd report` and `perf script`. A line is cut at two separators
and both halves are looked up in dictionaries, because a regular expression per line would cost more than everything
after it; a line whose halves are not known yet goes through the strict pattern once. What cannot be read is never
dropped silently: it ends up in `problems`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from fastexit.trace.events import BY_BEGINNING, DEEPER, UNREADABLE, Event, Kind, parse
from fastexit.trace.shapes.line import LINE, LONGEST
from fastexit.trace.text import TraceText

_KNOWN_BODIES = 1 << 16
_STAMP = re.compile(rb"\d+\.\d+$")
"""The time at the end of what was cut out for one, a line's flags before it where times have unlike widths."""


@dataclass(eq=False, slots=True)
class Task:
    """A thread as the trace names it: ``pid`` is the thread's id, ``tgid`` its process's or -1 when not printed.

    There is one object per thread, whatever the trace calls it from line to line (``<...>`` at first, perhaps).
    """

    pid: int
    tgid: int
    comm: str

    def __str__(self) -> str:
        return f"{self.comm}-{self.pid}"


class Batch(NamedTuple):
    """Consecutive lines: entry i is line ``first + i``. ``tasks[i]`` is None where the line is no event."""

    first: int
    tasks: list[Task | None]
    events: list[Event]


class Dates(Protocol):
    """What learns from a trace's texts which kernel recorded it: kernels.Dating."""

    def see_text(self, body: bytes, line: int) -> None:
        """A text that was not seen before."""

    def see_flags(self, flags: bytes, line: int, *, by_kernel: bool) -> None:
        """The characters before a time stamp."""


class TraceReader:
    """One trace file: `batches()` reads it and looks for damage, `again()` gives the same batches once more.

    ``dating``, if any, sees the shape of every line.

    Attributes:
        path: as given.
        size: bytes on disk, the total that ``progress`` counts towards.
        lines: lines seen by `batches()`.
        events: event lines among them, of any event system.
        problems: damage, one line each, with line numbers.
        notes: oddities that do not put the result in doubt.

    Raises TraceError as TraceText does.
    """

    def __init__(self, path: str | os.PathLike[str], dating: Dates | None = None) -> None:
        self._dating = dating
        self.text: TraceText = TraceText(path, perf=True)
        self.path: str = self.text.path
        self.size: int = self.text.size
        self.lines: int = 0
        self.events: int = 0
        self.problems: list[str] = []
        self.notes: list[str] = []
        self._known: dict[bytes, Event] = {}
        self._beginnings: dict[tuple[bytes, ...], Event] = {}
        self._tasks: dict[bytes, Task] = {}  # by what stands before the CPU, with the blank behind it
        self._by_pid: dict[int, Task] = {}
        # A line is cut at these places, counted from the end of its time stamp: behind the thread, before the time.
        self._behind = self._stamp = 0
        self._widths: dict[int, int] = {}

    def batches(self, progress: Callable[[int], object] | None = None) -> Iterator[Batch]:
        """The whole file as batches of lines; ``progress(n)`` is called as n more bytes on disk are consumed."""
        self.lines = self.events = 0
        self.problems = []
        self.notes = []
        self._backwards = 0
        self._first_backwards = ""
        self._clock: dict[int, float] = {}
        self._latest = b""
        self._unended: list[bytes] = []
        self._read = 0
        for text in self.text.chunks(progress):
            yield self._seen(text.split(b"\n"))
        if (tail := self.text.last(self.lines, self.events)) is not None:
            self._unended = [tail]
            yield self._seen([tail])
        self._read = self.lines
        self._finish()

    def again(self, kept: list[Batch], progress: Callable[[int], object] | None = None) -> Iterator[Batch]:
        """What a complete `batches()` gave, once more: its first batches from ``kept``, the rest from the file.

        Everything else stays as `batches()` found it: damage is looked for once. The file is not touched when
        ``kept`` has all of it.
        """
        if kept and kept[-1].first + len(kept[-1].events) > self._read:
            yield from self._given(kept, progress)
            return
        first = 1
        for number, text in enumerate(self.text.chunks(progress)):
            batch = kept[number] if number < len(kept) else self._batch(first, text.split(b"\n"))
            first += len(batch.events)
            yield batch
        if self._unended:
            yield self._batch(first, self._unended)

    def _given(self, kept: list[Batch], progress: Callable[[int], object] | None) -> Iterator[Batch]:
        """The batches of a file that was kept as a whole, with progress as if it were read."""
        told = 0
        for batch in kept:
            yield batch
            if progress:
                done = self.size * (batch.first - 1 + len(batch.events)) // self._read
                progress(done - told)
                told = done

    def _seen(self, lines: list[bytes]) -> Batch:
        """A batch of lines that are new, counted and in order of time."""
        first = self.lines + 1
        stamps: list[bytes] = []
        batch = self._batch(first, lines, stamps)
        self.lines += len(lines)
        self.events += len(lines) - batch.tasks.count(None)
        self._check_clock(first, lines, batch.tasks, stamps)
        return batch

    def _batch(self, first: int, lines: list[bytes], stamps: list[bytes] | None = None) -> Batch:
        """Lines from number ``first`` on; ``stamps`` takes the time stamp of each."""
        known = self._known.get
        beginnings = self._beginnings.get
        task_of = self._tasks.get
        behind, stamp = self._behind, self._stamp
        tasks: list[Task | None] = []
        events: list[Event] = []
        add_task, add_event, add_stamp = tasks.append, events.append, None if stamps is None else stamps.append
        for line in lines:
            head, _, body = line.partition(b": ")
            task = task_of(head[:behind])
            event = known(body)
            if task is None or not body:
                task, event, head = self._look(lines, len(tasks), first)
                behind, stamp = self._behind, self._stamp
            elif event is None:
                event = beginnings(tuple(body.split(None, 3)[:3]))
                if event is DEEPER:
                    event = beginnings(tuple(body.split(None, 5)[:5]))
                if event is None or b": kvm_" in body:  # a second event in a line that two writers tore
                    event = self._learn(body, first + len(tasks), line)
            add_task(task)
            add_event(event)
            if add_stamp:
                add_stamp(head[stamp:])
        return Batch(first, tasks, events)

    def _look(self, lines: list[bytes], i: int, first: int) -> tuple[Task | None, Event, bytes]:
        """A line that is not cut where the one before it was: its thread, event, and what stands before the event.

        What is no canonical line and can be made one is so in ``lines`` afterwards.
        """
        line, number = lines[i], first + i
        who, _, rest = line.partition(b" [")
        head, _, body = rest.partition(b": ")
        task = self._tasks.get(who + b" ")
        stamp = self._widths.get(len(head))
        torn = b" [" in head  # by two writers: what stands first is not whose line it is
        if task is not None and stamp is not None and not torn:
            self._behind, self._stamp = -len(head) - 1, stamp
            event = self._known.get(body) or self._learn(body, number, line)
            return task, event, head
        match = LINE.fullmatch(line) if len(line) <= LONGEST else None
        if match is None:
            mended = self.text.mend(line, number) if line.strip() else None
            if mended is None or mended == line:
                return None, UNREADABLE, b""
            lines[i] = mended
            return self._look(lines, i, first)
        pid, tgid = match["pid"] or match["perf_pid"], match["tgid"] or match["perf_tgid"] or b"-1"
        task = self._task(int(pid), -1 if tgid.startswith(b"-") else int(tgid), match["comm"].strip())
        time, text = match["time"], match["body"]
        if self._dating and match["flags"]:
            self._dating.see_flags(match["flags"], number, by_kernel=self.text.shape != "trace-cmd report")
        if text == body.lstrip() and head.endswith(b" " + time) and not torn:
            self._widths[len(head)] = self._stamp = -len(time) - 1
            self._behind = -len(head) - 1
            self._tasks[who + b" "] = task
            text = body
        return task, self._learn(text, number, line), b" " + time

    def _learn(self, body: bytes, number: int, line: bytes) -> Event:
        """Parses a text that is not known yet, or not known to be repeated, and remembers it."""
        event = parse(body) if b": kvm_" not in body else UNREADABLE
        while event is UNREADABLE:
            mended = self.text.mend(line, number)
            match = LINE.fullmatch(mended) if mended is not None and mended != line else None
            if mended is None or match is None:
                return event
            line, body = mended, match["body"]
            event = parse(body)
        if self._dating and not self.text.retold:
            self._dating.see_text(body, number)
        if event.name == "kvm_exit" and event.kind == Kind.MARK:  # half a line; whole ones begin like it
            return event
        by_beginning = event.kind in BY_BEGINNING
        known: dict[Any, Event] = self._beginnings if by_beginning else self._known
        if len(known) >= _KNOWN_BODIES:
            known.clear()
        if not by_beginning:
            known[body] = event
        elif event.kind == Kind.EXIT and event.a >= 0:  # "kvm_exit: vcpu 0", and the reason only behind it
            known[tuple(body.split(None, 3)[:3])] = DEEPER
            known[tuple(body.split(None, 5)[:5])] = event
        else:
            known[tuple(body.split(None, 3)[:3])] = event
        return event

    def _task(self, pid: int, tgid: int, comm: bytes) -> Task:
        task = self._by_pid.setdefault(pid, Task(pid, tgid, "<...>"))
        if task.comm == "<...>":
            task.comm = comm.decode("utf-8", "replace")
        if task.tgid < 0:
            task.tgid = tgid
        return task

    def _check_clock(self, first: int, lines: list[bytes], tasks: list[Task | None], stamps: list[bytes]) -> None:
        """Time may not go back. Sorting an already sorted list is the cheapest test; only a failure is looked into."""
        if tasks.count(None):
            stamps = [stamp for stamp, task in zip(stamps, tasks, strict=True) if task]
        if stamps and stamps[0] >= self._latest and stamps == sorted(stamps):
            self._latest = stamps[-1]
            return
        latest = _STAMP.search(self._latest)
        now = float(latest[0]) if latest else 0.0
        for i, task in enumerate(tasks):
            match = LINE.fullmatch(lines[i]) if task else None
            if task is None or match is None:
                continue
            time = float(match["time"])
            own = self._clock.get(task.pid, 0.0)
            if time < own or time < now:
                self._backwards += 1
                who = f" of thread {task.pid} itself" if time < own else ""
                self._first_backwards = self._first_backwards or (
                    f"{self.path}:{first + i}: time{who} goes back from {max(own, now):.6f} to {time:.6f}: lines of "
                    "several traces are mixed; sort them by time, or pass one trace at a time"
                )
            now = time
            self._clock[task.pid] = time
        self._latest = stamps[-1] if stamps else self._latest

    def _finish(self) -> None:
        """What the pass found wrong, one line for each kind of damage."""
        backwards = [self._first_backwards + _and_more(self._backwards)] if self._backwards else []
        self.problems = self.text.problems(self.lines, self.events, backwards)
        self.notes = self.text.notes(self.events)
        self.lines += self.text.torn


def _and_more(n: int) -> str:
    return f" (and {n - 1:,} times more)" if n > 1 else ""
