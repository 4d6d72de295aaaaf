r"""A trace of any shape as canonical ftrace lines, one for each line of the file, so that line numbers stay.

A canonical line is what tracefs prints with default options::

    comm-pid [cpu] flags secs.usecs: event: text          comm-pid (tgid) [cpu] flags secs.nsecs: event: text

The flags may be missing, blanks stand as they like, the time has six digits or nine behind its point. Text that is so
already, which is nearly all text that is long, is handed over as it is, because looking at each line in Python would
cost more than reading it; who reads comes back with the lines that it could not read::

    for chunk in text.chunks():
        for line in chunk.split(b"\n"):
            while line and line.strip() and not readable(line):      # comments too
                line = text.mend(line, number)                       # a line to read instead; None: no event, and noted
    last = text.last(lines, events)    # one more, where the file ends without a line end
    text.problems(lines, events), text.notes(events)

Text of any other shape is rewritten on the way: a line that is no event is empty then, and what it was has been noted.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from fastexit.trace.beside import Beside
from fastexit.trace.files import TraceFile
from fastexit.trace.found import Table, Unreadable, shown
from fastexit.trace.shapes.learned import Learned, Real
from fastexit.trace.shapes.mender import Mender

_MARKS = b"\0", b"PERF_RECORD_LOST", b": [EVENTS DROPPED]", b"[FAILED TO PARSE]"
"""What stands in lines that look whole and are to be looked at: perf and trace-cmd print the last for fields."""
_NEWLINE = ord("\n")
_MARK = b"\xef\xbb\xbf"
"""What some editors put in front of UTF-8."""


class TraceText:
    """One trace. Each pass of `chunks()` begins anew; what it found beside events stands here when it is through.

    Args:
        path: the file.
        perf: lines of perf script that have a thread, a CPU and a time are handed over as they are, for a reader that
            knows ``comm pid [cpu] secs.usecs: kvm:event: text``; otherwise they are rewritten.

    Attributes:
        path, size: as given; bytes on disk, the total that ``progress`` counts towards.

    Raises TraceError as TraceFile does.
    """

    def __init__(self, path: str | os.PathLike[str], *, perf: bool = False) -> None:
        self._file = TraceFile(path)
        self.path: str = self._file.path
        self.size: int = self._file.size
        self._perf = perf
        self._learned: Learned | None = None
        self._beside = Beside(self.path)
        self._mender = Mender(self._known, self._beside)
        self._taken = False

    @property
    def _known(self) -> Learned:
        return self._learned or Learned([], perf=self._perf)

    def chunks(self, progress: Callable[[int], object] | None = None) -> Iterator[bytes]:
        """Whole lines, about 256 KiB at a time, each chunk without its last line end, carriage returns or NULs.

        ``progress(n)`` is called as n more bytes on disk are consumed. Line i of the file is line i of all chunks
        together.
        """
        self._beside = Beside(self.path)
        self._taken = False
        first = 1
        for chunk in self._file.chunks(progress):
            chunk = chunk.replace(b"\r", b"")
            if first == 1:
                chunk = chunk.removeprefix(_MARK)
                self._begin(chunk)
            elif self._known.empty:  # what stood before was a long preface
                if done := self._mender.rest():
                    yield b"\n".join(done)
                self._learned = None
                self._begin(chunk, first)
            lines = int(np.count_nonzero(np.frombuffer(chunk, np.uint8) == _NEWLINE)) + 1  # five times bytes.count
            if any(mark in chunk for mark in _MARKS):
                chunk = b"\n".join(self._text(chunk.split(b"\n"), first))
            known = self._known
            if known.plain:
                yield known.bulk(chunk) if known.bulk else chunk
            elif done := self._mender.rewrite(chunk.split(b"\n"), first):
                yield b"\n".join(done)
            first += lines
        if first == 1:
            self._begin(self._file.tail)
        if done := self._mender.rest():
            yield b"\n".join(done)

    def _begin(self, chunk: bytes, first: int = 1) -> None:
        """A pass over a file that begins so, or whose events do."""
        if self._learned is None:
            self._learned = Learned(chunk.split(b"\n"), perf=self._perf)
        self._mender = Mender(self._learned, self._beside, first)

    def _text(self, lines: list[bytes], first: int) -> Iterator[bytes]:
        """The lines that may be events; others have been noted and are empty."""
        for number, line in enumerate(lines, first):
            lost = b": PERF_RECORD_LOST" in line or b": [EVENTS DROPPED]" in line
            if b"\0" in line:
                self._beside.refuse(line, number)
            elif lost:
                self._beside.note(line, number)
            elif b"[FAILED TO PARSE]" in line:
                line = self._mender.one(line, number) or line
            yield b"" if lost or b"\0" in line else line

    def last(self, lines: int, events: int) -> bytes | None:
        """The last line of a file that does not end in a line end, canonical, where it is to be taken as whole.

        To be asked once, after `chunks()` is through, with the number of lines and of events in it: a header that
        promises more events tells that the line was cut.
        """
        tail = self._file.tail.replace(b"\r", b"")
        promised = self._beside.promised
        if not tail.strip() or self._file.cut or b"\0" in tail or promised >= 0 and events + 1 != promised:
            return None
        whole = self._mender.one(tail, lines + 1)
        if whole is not None:
            self._taken = True
            self._beside.oddities.append("the last line has no end; it was taken as whole")
        return whole

    def mend(self, line: bytes, number: int) -> bytes | None:
        """A canonical line to read in place of one that could not be read, or None for what is no event.

        To be asked for lines in order, for every line that is not blank and no readable event, comments too. What the
        line is has been noted when None comes back. A line that cannot be read although it came from here is to be
        given back: it is counted as unreadable then.
        """
        return self._mender.mend(line, number)

    @property
    def shape(self) -> str:
        """What wrote it: "ftrace text", "trace-cmd report", "perf script", "perf trace", "bpftrace", or "table"."""
        return self._known.shape

    @property
    def clock(self) -> str:
        """What times are in: "ns", or "ticks", written as ns, of a clock whose unit no line tells (x86-tsc, uptime)."""
        return self._known.clock

    @property
    def real(self) -> Real:
        """Which parts of lines are the file's own; others are put in."""
        return self._known.real

    @property
    def retold(self) -> bool:
        """True where events' texts were made of their fields: they tell nothing of the kernel that recorded them."""
        return self._known.retold

    @property
    def cut(self) -> str:
        """Why the file ended early, or ""."""
        return self._file.cut

    @property
    def torn(self) -> bool:
        """True where what stands behind the last line end was left out; it counts as a line."""
        return bool(self._file.tail.strip()) and not self._taken

    @property
    def tables(self) -> list[Table]:
        """Tables of counts that stand between lines or in place of them."""
        return self._beside.tables

    @property
    def unreadable(self) -> list[Unreadable]:
        """The first lines of events that could not be read."""
        return self._beside.unreadable

    @property
    def unreadable_count(self) -> int:
        """How many lines of events could not be read."""
        return self._beside.unreadable_count

    @property
    def prose(self) -> int:
        """Lines that are no trace at all: what somebody wrote between them."""
        return self._beside.prose

    @property
    def first_prose(self) -> str:
        """The first of them as a message shows it, or ""."""
        return self._beside.first_prose

    @property
    def lost(self) -> int:
        """Events that the recorder says it lost."""
        return self._beside.lost

    @property
    def lost_lines(self) -> list[int]:
        """Where it says so, the first places."""
        return self._beside.lost_lines

    def problems(self, lines: int, events: int, between: Sequence[str] = ()) -> list[str]:
        """What is damaged, a line each, after a pass that gave so many lines and events.

        What the reader itself found goes in ``between``, in front of how the file ends.
        """
        found = [*self._beside.damage(), *between]
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

    def notes(self, events: int) -> list[str]:
        """Oddities that leave the result good, a line each."""
        found = [*self._beside.oddities, *self._put_in()]
        promised = self._beside.promised
        if not self.cut and events < promised:
            found.append(
                f"the header counts {promised:,} events, the file holds {events:,}: filtered or cut at a line end"
            )
        return found

    def _put_in(self) -> list[str]:
        """What the lines do not say, and what stands for it."""
        real = self.real
        found = []
        if not real.thread:
            found.append("the lines name no thread: taken as one, or as one for each vCPU that they name")
        elif not real.pid:
            found.append("the lines have no thread ids: each name is taken for one thread")
        if not real.time:
            found.append("the lines have no time: only their order is used")
        elif self.clock != "ns":
            found.append("the clock is not in seconds (x86-tsc, uptime, counter): times are in its ticks")
        if self.prose:
            found.append(f"lines that are no trace, {self.prose:,} of them, were passed over: {self.first_prose}")
        return found
