r"""A trace of any shape as canonical ftrace lines, one for each line of the file, so that line numbers stay.

A canonical line is what tracefs prints with default options::

    comm-pid [cpu] flags secs.usecs: event: text          comm-pid (tgid) [cpu] flags secs.nsecs: event: text

The flags may be missing, blanks stand as they like, the time has six digits or nine behind its point. Text that is so
already, which is nearly all text that is long, is handed over as it is, because looking at each line in Python would
cost more than reading it; who reads comes back with the lines that it could not read:

>>> text = TraceText(path)                                                          # doctest: +SKIP
>>> for chunk in text.chunks():                                                     # doctest: +SKIP
...     for line in chunk.split(b"\n"):
...         while line.strip() and not readable(line):      # comments too
...             line = text.mend(line, number)              # a line to read instead, or None: no event, and noted
...             if line is None: break
>>> text.problems(lines, events), text.notes(events)                                # doctest: +SKIP

Text of any other shape is rewritten on the way: a line that is no event is empty then, and what it was has been noted.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from fastexit.trace.files import TraceFile
from fastexit.trace.found import Table, Unreadable, shown

KEPT = 20
"""So many of the lines that cannot be read, and of the places where events were lost, are kept; all are counted."""

_LOST = re.compile(rb" *CPU:? ?\d+ \[(?:LOST )?(\d*) ?EVENTS(?: DROPPED)?\]")
_ENTRIES = re.compile(rb"# entries-in-buffer/entries-written: (\d+)/(\d+)")
_EMPTY = re.compile(rb"CPU \d+ is empty$")
_EVENT = re.compile(rb"kvm[_:]|-\d+ +\[|\[\d{3}\]")


class Real(NamedTuple):
    """Which parts of the lines the file has; False for a part that was put in where the canonical line needs it.

    A thread or a pid that is not there is one thread for each vCPU that lines name, a CPU is 0, a time is the line's
    number in us: in order, and no time.
    """

    thread: bool = True
    pid: bool = True
    cpu: bool = True
    time: bool = True


class TraceText:
    """One trace. Each pass of `chunks()` begins anew; what it found beside events stands here when it is through.

    Attributes:
        path, size: as given; bytes on disk, the total that ``progress`` counts towards.
        shape: what wrote it: "ftrace text", "trace-cmd report", "perf script", "perf trace", "bpftrace", or the kind of
            a table where nothing else is there.
        clock: "ns", or "ticks" for a clock whose unit the trace does not say (x86-tsc, uptime, counter): a tick is
            written as a ns.
        real: which parts of lines are the file's own.
        tables: tables of counts that stand between lines or in place of them.
        unreadable_count: lines of events that could not be read; ``unreadable`` are the first of them.
        prose: lines that are no trace at all: what somebody wrote between them, code, stacks.
        first_prose: the first of them as a message shows it, or "".
        lost: events that the recorder says it lost; ``lost_lines`` are the first places.
        cut: why the file ended early, or "".

    Raises TraceError as TraceFile does.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._file = TraceFile(path)
        self.path: str = self._file.path
        self.size: int = self._file.size
        self.shape: str = "ftrace text"
        self.clock: str = "ns"
        self.real: Real = Real()
        self._begin()

    def _begin(self) -> None:
        self.tables: list[Table] = []
        self.unreadable_count: int = 0
        self.unreadable: list[Unreadable] = []
        self.prose: int = 0
        self.first_prose: str = ""
        self.lost: int = 0
        self.lost_lines: list[int] = []
        self._headers: list[str] = []
        self._notes: list[str] = []
        self._promised = -1
        self._taken = False

    @property
    def cut(self) -> str:
        """Why the file ended early, or ""."""
        return self._file.cut

    def chunks(self, progress: Callable[[int], object] | None = None) -> Iterator[bytes]:
        """Whole lines, about 256 KiB at a time, each chunk without its last line end and without carriage returns.

        ``progress(n)`` is called as n more bytes on disk are consumed. Line i of the file is line i of all chunks
        together.
        """
        self._begin()
        first = 1
        for chunk in self._file.chunks(progress):
            chunk = chunk.replace(b"\r", b"")
            if b"\0" in chunk:
                chunk = b"\n".join(self._text(chunk.split(b"\n"), first))
            yield chunk
            first += chunk.count(b"\n") + 1

    def _text(self, lines: list[bytes], first: int) -> Iterator[bytes]:
        """The lines that are text; others have been noted and are empty."""
        for number, line in enumerate(lines, first):
            if b"\0" in line:
                self._bad(line, number)
            yield b"" if b"\0" in line else line

    def last(self, events: int) -> bytes | None:
        """The last line of a file that does not end in a line end, where it is to be taken as whole.

        To be asked once, after `chunks()` is through, with the number of events in it: a header that promises more
        events tells that the line was cut.
        """
        tail = self._file.tail.replace(b"\r", b"")
        if not tail.strip() or self._file.cut or self._promised >= 0 and events + 1 != self._promised:
            return None
        self._taken = True
        self._notes.append("the last line has no end; it was taken as whole")
        return tail

    def mend(self, line: bytes, number: int) -> bytes | None:
        """A canonical line to read in place of one that could not be read, or None for what is no event.

        To be asked for lines in order, for every line that is not blank and no readable event, comments too. What the
        line is has been noted when None comes back. A line that cannot be read although it came from here is to be
        given back: it is counted as unreadable then.
        """
        if lost := _LOST.match(line):
            self._lose(int(lost[1] or 1), number)
        elif line.startswith(b"#"):
            self._comment(line, number)
        elif line.startswith((b"cpus=", b"version =")):
            self.shape = "trace-cmd report"
        elif _EMPTY.match(line) or not line.strip():
            pass
        elif _EVENT.search(line) or b"\0" in line:
            self._bad(line, number)
        else:
            self.prose += 1
            self.first_prose = self.first_prose or f"{self.path}:{number}: not ftrace text: {shown(line)!r}"
        return None

    def _lose(self, n: int, number: int) -> None:
        self.lost += n
        if len(self.lost_lines) < KEPT:
            self.lost_lines.append(number)

    def _comment(self, line: bytes, number: int) -> None:
        if entries := _ENTRIES.match(line):
            held, written = int(entries[1]), int(entries[2])
            if self._promised >= 0:
                self._headers.append(f"{self.path}:{number}: a second trace begins here: pass the two one by one")
            self._promised = max(self._promised, 0) + held
            if written > held:
                self._notes.append(f"the ring buffer kept the last {held:,} of {written:,} events")

    def _bad(self, line: bytes, number: int) -> None:
        self.unreadable_count += 1
        self.unreadable.append(Unreadable(number, "binary data" if b"\0" in line else shown(line)))
        self.unreadable.sort()  # lines of a chunk are looked at twice: as bytes, then as text
        del self.unreadable[KEPT:]

    def problems(self, lines: int, events: int, between: Sequence[str] = ()) -> list[str]:
        """What is damaged, a line each, after a pass that gave so many lines and events.

        What the reader itself found goes in ``between``, in front of how the file ends.
        """
        found = list(self._headers)
        if self.unreadable:
            line, text = self.unreadable[0]
            what = text if text == "binary data" else f"not ftrace text: {text!r}"
            more = f" (and {self.unreadable_count - 1:,} times more)" if self.unreadable_count > 1 else ""
            found.append(f"{self.path}:{line}: {what}, left out{more}")
        if self.lost:
            found.append(
                f"{self.path}:{self.lost_lines[0]}: {self.lost:,} events or more were lost: state may be off after that"
            )
        found += between
        torn = ""
        if self.torn:
            lines += 1
            torn = f"the last line has no end and was left out: {shown(self._file.tail)!r}"
        if self.cut:
            used = f"the {events:,} events up to here were used" if events else "no event could be read"
            found.append(f"{self.path}:{lines}: {self.cut}: {used}{'; ' if torn else ''}{torn}")
        elif torn:
            found.append(f"{self.path}:{lines}: {torn}")
        return found

    @property
    def torn(self) -> bool:
        """True where what stands behind the last line end was left out; it counts as a line."""
        return bool(self._file.tail.strip()) and not self._taken

    def notes(self, events: int) -> list[str]:
        """Oddities that leave the result good, a line each."""
        found = list(self._notes)
        if not self.cut and events < self._promised:
            found.append(
                f"the header counts {self._promised:,} events, the file holds {events:,}: filtered or cut at a line end"
            )
        return found
