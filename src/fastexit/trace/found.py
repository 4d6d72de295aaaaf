"""What stands in a trace beside its events: tables that other tools printed, and lines that nobody can read."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import NamedTuple

SHOWN_LETTERS = 80
"""So much of a line stands in a message."""

_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]")


class Unreadable(NamedTuple):
    """A line that could not be read, shortened to what fits a message and with control characters replaced."""

    line: int
    text: str


class TableRow(NamedTuple):
    """A row of a table that another tool printed; -1 for a column that it does not have. Times are in ns."""

    label: str
    number: int
    share: float
    total: float = -1.0
    minimum: float = -1.0
    mean: float = -1.0
    maximum: float = -1.0


_ROWS = {
    "perf kvm stat": "exit reasons",
    "bcc kvmexit": "exit reasons",
    "perf-prof kvm-exit": "exit reasons",
    "kvm_stat": "events",
    "perf stat": "events",
    "perf top": "texts",
    "bpftrace map": "keys",
}


@dataclass
class Table:
    """A table in place of lines.

    ``kind`` is "perf kvm stat", "bcc kvmexit", "perf-prof kvm-exit", "kvm_stat", "perf stat", "perf top" or "bpftrace
    map". ``title`` is the event of a perf top, the name of a map, else the line above.
    """

    kind: str
    title: str
    line: int
    rows: list[TableRow] = field(default_factory=list)

    @property
    def rows_are(self) -> str:
        """What labels name: "exit reasons", "events", "texts" of the title's event, or "keys" of the title's map."""
        return _ROWS[self.kind]


def shown(line: bytes) -> str:
    """A line as a message shows it: its beginning, nothing in it that a terminal would obey."""
    return _CONTROL.sub("\ufffd", line[:SHOWN_LETTERS].decode("utf-8", "replace"))
