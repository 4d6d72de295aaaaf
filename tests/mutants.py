"""Single faults in the model, by number of the trap whose rule they break; mutants.diff has them and says how."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

TABLE = Path(__file__).with_suffix(".diff")
HEAD = re.compile(r"^@@ (\d+) (\S+\.py)( traced)?: (.+)$", re.MULTILINE)


class Mutant(NamedTuple):
    """What is wrong, and how it becomes wrong: whole lines of ``file``, before and after.

    ``traced``: trace lines alone show it.
    """

    trap: int
    what: str
    file: str
    before: str
    after: str
    traced: bool = False

    def applied(self, source: str) -> str:
        """The file's text with the fault; ValueError unless there is one place for it."""
        lines, before = source.splitlines(keepends=True), self.before.splitlines(keepends=True)
        places = [at for at in range(len(lines)) if lines[at : at + len(before)] == before]
        if len(places) != 1:
            raise ValueError(f"{self.file}: {len(places)} places for {self.what!r}")
        return "".join((*lines[: places[0]], self.after, *lines[places[0] + len(before) :]))


def parsed(text: str) -> Iterator[Mutant]:
    """Every fault of a table; ValueError for a line that is neither of a head nor of a diff."""
    _, *parts = HEAD.split(text)
    for trap, file, traced, what, diff in zip(*[iter(parts)] * 5, strict=True):
        lines = diff.strip("\n").split("\n")
        if {line[:1] for line in lines} - set(" -+"):
            raise ValueError(f"no lines of a diff below {what!r}")
        before, after = ("".join(f"{line[1:]}\n" for line in lines if line[0] in kinds) for kinds in (" -", " +"))
        yield Mutant(int(trap), what, file, before, after, bool(traced))


MUTANTS = tuple(parsed(TABLE.read_text()))
