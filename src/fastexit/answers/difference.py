"""Two reports side by side: every table as a difference, by time where both have one.

How far two recordings differ by chance cannot be told from one of each. What can be told is how much each varies from
one second to the next: a rate is called different when the two means lie further apart than that explains, and nothing
is said where there are too few seconds. Quantiles of times are compared as they are.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from fastexit.answers.report import Quantiles, Report, VmReport
from fastexit.checks import quoted

SCHEMA = "fastexit.difference/1"
LEAST_SECONDS = 5
"""Whole seconds of each side below which no rate is called different."""
LIMIT = 3.0
"""Standard errors between two means that are called different."""
DIFFERENT, ALIKE, UNTOLD = "different", "within what each varies", "cannot be told"
PER_SECOND = "per second"
Pair = tuple[float | None, float | None]
_CONDITION = re.compile(r"\s*([^<>=]+?)\s*(<=|>=|<|>)\s*([-+]?\d+(?:\.\d+)?)\s*(%?)\s*")


@dataclass
class Change:
    """One figure of both sides: ``before`` and ``after`` are None where a side has none.

    ``table`` and ``row`` say which figure, ``column`` of what: "per second", "share", "median ns", ... ``verdict`` is
    for rates: "different", "within what each varies", "cannot be told"; "" for what has no seconds to vary over.
    """

    vm: int
    table: str
    row: str
    column: str
    before: float | None
    after: float | None
    verdict: str = ""

    @property
    def name(self) -> str:
        """By which a condition names it."""
        return f"{self.table}.{self.row}.{self.column}"

    @property
    def change(self) -> float | None:
        """As a share of ``before``; None where there is none, or it is 0."""
        if self.before is None or self.after is None or not self.before:
            return None
        return self.after / self.before - 1


@dataclass
class Difference:
    """A pair of reports: files before and after, every figure's change, findings that came and went."""

    before: list[str]
    after: list[str]
    changes: list[Change] = field(default_factory=list)
    came: list[str] = field(default_factory=list)
    went: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """As JSON types; each change with its share."""
        told = asdict(self)
        for row, change in zip(told["changes"], self.changes, strict=True):
            row["change"] = change.change
        return {"schema": SCHEMA, **told}


def difference(before: Report, after: Report) -> Difference:
    """Compare two reports, VM by VM in their order; tables of other tools row by row."""
    found = Difference([f.path for f in before.files], [f.path for f in after.files])
    ours, theirs = _guests(before), _guests(after)
    if len(ours) != len(theirs):
        found.notes.append(
            f"{len(ours)} VMs before, {len(theirs)} after: compared in their order, as far as there are two"
        )
    for number, (one, other) in enumerate(zip(ours, theirs, strict=False), 1):
        found.changes += list(_vm(number, one, other))
        found.came += [f.text for f in other.findings if f.kind not in {g.kind for g in one.findings}]
        found.went += [f.text for f in one.findings if f.kind not in {g.kind for g in other.findings}]
        if not one.seconds or not other.seconds:
            found.notes.append(f"VM {number}: a side has no time, so counts are compared by their share alone")
    found.changes += list(_tables(before, after))
    return found


def _guests(report: Report) -> list[VmReport]:
    return [vm for vm in report.vms if vm.number] or report.vms


def _vm(number: int, one: VmReport, other: VmReport) -> Iterator[Change]:
    """All figures of one VM."""
    timed = bool(one.seconds and other.seconds)
    for name, table in {"exits": _exits, "counts": _counts, "latency": _latency, "fast": _fast}.items():
        for change in table(one, other, timed):
            change.vm, change.table = number, change.table or name
            yield change
    yield Change(number, "findings", "all", "count", float(len(one.findings)), float(len(other.findings)))


def _figure(row: str, column: str, pair: Pair, verdict: str = "", table: str = "") -> Iterator[Change]:
    """A figure, where a side has it."""
    if any(value is not None for value in pair):
        yield Change(0, table, row, column, *pair, verdict)


def _exits(one: VmReport, other: VmReport, timed: bool) -> Iterator[Change]:
    before, after = ({row.reason: row for row in vm.exits} for vm in (one, other))
    for reason in _union(before, after):
        a, b = before.get(reason), after.get(reason)
        if timed:
            verdict = told(*([second.get(reason, 0) for second in vm.by_second] for vm in (one, other)))
            yield from _figure(
                reason, PER_SECOND, _rates(one, other, a.count if a else 0, b.count if b else 0), verdict
            )
        yield from _figure(reason, "share", (a.share if a else 0.0, b.share if b else 0.0))
        yield from _times(reason, a.time if a else None, b.time if b else None)
    if timed:
        verdict = told(*([sum(second.values()) for second in vm.by_second] for vm in (one, other)))
        total = (sum(row.count for row in vm.exits) for vm in (one, other))
        yield from _figure("all", PER_SECOND, _rates(one, other, *total), verdict)


def _counts(one: VmReport, other: VmReport, timed: bool) -> Iterator[Change]:
    """Tables that count: by time where both have one, else as shares."""
    for table, counts_of in _COUNTED.items():
        before, after = counts_of(one), counts_of(other)
        for name in _union(before, after):
            a, b = before.get(name, 0), after.get(name, 0)
            if timed:
                yield from _figure(name, PER_SECOND, _rates(one, other, a, b), table=table)
            else:
                yield from _figure(
                    name, "share", (a / (sum(before.values()) or 1), b / (sum(after.values()) or 1)), table=table
                )


def _latency(one: VmReport, other: VmReport, timed: bool) -> Iterator[Change]:
    sides = []
    for vm in (one, other):
        side = {row.what: row.time for row in vm.latency}
        if vm.halts and vm.halts.asleep:
            side["asleep"] = vm.halts.asleep
        sides.append(side)
    for what in _union(*sides):
        yield from _times(what, sides[0].get(what), sides[1].get(what))


def _fast(one: VmReport, other: VmReport, timed: bool) -> Iterator[Change]:
    before, after = ({f"{r.kernel} {r.what}": r.fast / r.total for r in vm.fast if r.total} for vm in (one, other))
    for name in _union(before, after):
        yield from _figure(name, "share", (before.get(name), after.get(name)))


def _times(row: str, a: Quantiles | None, b: Quantiles | None) -> Iterator[Change]:
    yield from _figure(row, "median ns", (a.median if a else None, b.median if b else None))
    yield from _figure(row, "p99 ns", (a.p99 if a else None, b.p99 if b else None))


def _rates(one: VmReport, other: VmReport, before: float, after: float) -> Pair:
    return before / (one.seconds or 1), after / (other.seconds or 1)


def _msrs(vm: VmReport) -> dict[str, int]:
    return {f"{row.name or hex(row.msr)} {'write' if row.write else 'read'}": row.count for row in vm.msrs}


def _vectors(vm: VmReport) -> dict[str, int]:
    return {f"{row.vector} {row.source}": row.accepted for row in vm.vectors}


def _sent(vm: VmReport) -> dict[str, int]:
    return {f"{row.sender} to {row.target}": row.interrupts for row in vm.sent}


def _doors(vm: VmReport) -> dict[str, int]:
    return {f"{row.doing} by {row.door}": row.count for row in vm.doors}


_COUNTED = {"msrs": _msrs, "vectors": _vectors, "sent": _sent, "doors": _doors}


def _tables(before: Report, after: Report) -> Iterator[Change]:
    """Tables that other tools printed: rows of the same label, in tables of the same kind, in their order."""
    for one, other in zip(_printed(before), _printed(after), strict=False):
        if one["kind"] != other["kind"]:
            continue
        rows, others = ({row["label"]: row for row in table["rows"]} for table in (one, other))
        for label in _union(rows, others):
            for column, key in (("count", "number"), ("share", "share"), ("mean ns", "mean"), ("total ns", "total")):
                pair = _cell(rows.get(label), key), _cell(others.get(label), key)
                yield from _figure(label, column, pair, table=one["kind"])


def _printed(report: Report) -> list[dict[str, Any]]:
    return [table for file in report.files for table in file.tables]


def _cell(row: dict[str, Any] | None, key: str) -> float | None:
    return None if row is None or row[key] < 0 else float(row[key])


def told(before: Sequence[int], after: Sequence[int]) -> str:
    """Whether two series of counts per second have different means, as far as each one's own variation tells.

    The first and the last second of a recording are rarely whole and do not count.

    >>> told([0, 10, 12, 9, 11, 10, 3], [4, 31, 29, 30, 33, 30, 2])
    'different'
    >>> told([5], [9])
    'cannot be told'
    """
    series = before[1:-1], after[1:-1]
    if min(map(len, series)) < LEAST_SECONDS:
        return UNTOLD
    means = [sum(s) / len(s) for s in series]
    # a count varies by its own root at least, however even a short recording looks
    errors = [
        max(sum((x - mean) ** 2 for x in s) / (len(s) - 1), mean) / len(s)
        for s, mean in zip(series, means, strict=True)
    ]
    spread = math.sqrt(sum(errors))
    return DIFFERENT if abs(means[1] - means[0]) > LIMIT * spread > 0 else ALIKE


def _union(*sides: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(name for side in sides for name in side))


class Condition:
    """A limit for a figure: "exits.MSR_WRITE.per second > +10%", "latency.exit to entry.p99 ns > 5000", "findings > 0".

    With a percentage it is about the change, else about the figure ``after``. A name may leave out what follows its
    first words: then every figure below it counts. ValueError, one line, for what is no condition.
    """

    def __init__(self, text: str) -> None:
        match = _CONDITION.fullmatch(text)
        if match is None:
            raise ValueError(f'{quoted(text)} is no condition: "exits.HLT.per second > +10%", "findings > 0"')
        self.text: str = text.strip()
        name, self._sign, number, percent = match.groups()
        self.name: str = name
        self._limit, self._percent = float(number), bool(percent)

    def holds_for(self, change: Change) -> bool:
        """Whether a figure meets it; a rate that is not told to be different meets no percentage."""
        if change.name != self.name and not change.name.startswith(f"{self.name}."):
            return False
        value = change.change if self._percent else change.after
        if value is None or (self._percent and change.verdict not in ("", DIFFERENT)):
            return False
        limit = self._limit / 100 if self._percent else self._limit
        return {"<": value < limit, "<=": value <= limit, ">": value > limit, ">=": value >= limit}[self._sign]

    def met(self, found: Difference) -> list[Change]:
        """The figures that meet it; ValueError where its name is no figure's."""
        named = [c for c in found.changes if c.name == self.name or c.name.startswith(f"{self.name}.")]
        if not named:
            raise ValueError(f"--fail-if {quoted(self.name)}: no figure has that name; --json lists them")
        return [change for change in named if self.holds_for(change)]
