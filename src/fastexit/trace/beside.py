"""What stands beside the events of a trace: noted, counted, and said in one line a kind."""

from __future__ import annotations

import re

from fastexit.trace.found import Table, Unreadable, shown
from fastexit.trace.shapes.line import STACK
from fastexit.trace.shapes.tables import Tables

KEPT = 20
"""So many of the lines that cannot be read, and of the places where events were lost, are kept; all are counted."""

_LOST = re.compile(
    rb"(?:CPU:? ?\d+ |.*\d: +)\[(?:LOST )?(?P<n>\d{0,18}) ?EVENTS(?: DROPPED)?\]"
    rb"|.*PERF_RECORD_LOST(?:_SAMPLES)? lost (?P<perf>\d{1,18})|Lost (?P<bpf>\d{1,18}) events"
)
_LOOKED_AT = 1 << 11
_MAY_BE_LOST = re.compile(rb" EVENTS|\[EVENTS| lost |^Lost ")
_ENTRIES = re.compile(rb"# entries-in-buffer/entries-written: (\d{1,18})/(\d{1,18})")
_NOTHING = re.compile(
    rb"\s*(?:[^\s:]+: )?(?:.*: PERF_RECORD_(?!LOST)|CPU \d+ is empty$|cpus=\d|version = \d|Attaching \d+ probes)"
)
_EVENT = re.compile(rb"(?:^|[\s:\]])(?:kvm:)?kvm_\w+:|-\d+ +\[\d|\[\d{3}\]|\d\.\d{6}: ")


class Beside:
    """Notes of one pass over a trace.

    Attributes:
        tables: tables of counts that stand between lines or in place of them.
        unreadable_count: lines of events that could not be read; ``unreadable`` are the first of them.
        prose: lines that are no trace at all: what somebody wrote between them.
        first_prose: the first of them as a message shows it, or "".
        lost: events that the recorder says it lost; ``lost_lines`` are the first places.
        headers: where a trace begins in the middle of another.
        oddities: what leaves the result good.
        promised: events that headers count, or -1.
    """

    def __init__(self, path: str) -> None:
        self.path: str = path
        self.unreadable_count: int = 0
        self.unreadable: list[Unreadable] = []
        self.prose: int = 0
        self.first_prose: str = ""
        self.lost: int = 0
        self.lost_lines: list[int] = []
        self.headers: int = 0
        self.first_header: str = ""
        self.oddities: list[str] = []
        self.promised: int = -1
        self._tables = Tables()

    @property
    def tables(self) -> list[Table]:
        """Tables that have a row."""
        return self._tables.found

    def note(self, line: bytes, number: int) -> None:
        """A line that is no event: what it is."""
        line = line[:_LOOKED_AT]
        if line.startswith(b"#"):
            if not self._tables.see(line, number):
                self._comment(line, number)
        elif STACK.match(line) or _NOTHING.match(line) or not line.strip():
            pass
        elif _MAY_BE_LOST.search(line) and (lost := _LOST.match(line.lstrip())):
            self.lost += int(lost["n"] or lost["perf"] or lost["bpf"] or 1)
            if len(self.lost_lines) < KEPT:
                self.lost_lines.append(number)
        elif self._tables.see(line, number):
            pass
        elif b"\0" in line or _EVENT.search(line):
            self.refuse(line, number)
        else:
            self.prose += 1
            self.first_prose = self.first_prose or f"{self.path}:{number}: not ftrace text: {shown(line)!r}"

    def refuse(self, line: bytes, number: int) -> None:
        """A line of an event that cannot be read."""
        self.unreadable_count += 1
        self.unreadable.append(Unreadable(number, "binary data" if b"\0" in line else shown(line)))
        self.unreadable.sort()  # lines of a chunk are looked at twice: as bytes, then as text
        del self.unreadable[KEPT:]

    def forgive(self, number: int) -> None:
        """What made line ``number`` unreadable turned out to be that it goes on in the next one."""
        kept = [entry for entry in self.unreadable if entry.line != number]
        self.unreadable_count -= len(self.unreadable) - len(kept)
        self.unreadable = kept

    def _comment(self, line: bytes, number: int) -> None:
        if entries := _ENTRIES.match(line):
            held, written = int(entries[1]), int(entries[2])
            if self.promised >= 0:
                self.headers += 1
                where = f"{self.path}:{number}: a second trace begins here"
                self.first_header = self.first_header or f"{where}: pass the two one by one"
            self.promised = max(self.promised, 0) + held
            if written > held and len(self.oddities) < KEPT:
                self.oddities.append(f"the ring buffer kept the last {held:,} of {written:,} events")

    def damage(self) -> list[str]:
        """What of the events is not here, a line each kind."""
        more = f" (and {self.headers - 1:,} times more)" if self.headers > 1 else ""
        found = [self.first_header + more] if self.headers else []
        if self.unreadable:
            line, text = self.unreadable[0]
            what = text if text == "binary data" else f"not ftrace text: {text!r}"
            more = f" (and {self.unreadable_count - 1:,} times more)" if self.unreadable_count > 1 else ""
            found.append(f"{self.path}:{line}: {what}, left out{more}")
        if self.lost:
            found.append(
                f"{self.path}:{self.lost_lines[0]}: {self.lost:,} events or more were lost: state may be off after that"
            )
        return found
