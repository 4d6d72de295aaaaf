"""Two reports side by side, as tables to read: what changed most comes first."""

from __future__ import annotations

from itertools import groupby

from rich.console import Console

from fastexit.answers.difference import DIFFERENT, PER_SECOND, UNTOLD, Change, Difference
from fastexit.answers.words import clean, duration, share, short
from fastexit.pages.sheets import Column, Sheet
from fastexit.pages.text import LIMIT, show

TITLES = {
    "exits": "Exits",
    "msrs": "MSRs",
    "vectors": "Vectors accepted",
    "sent": "Who sends to whom",
    "doors": "Ways to the APIC",
    "latency": "Latency",
    "fast": "Taken fast",
    "findings": "Findings",
}


_ORDER = {PER_SECOND: 0, "count": 1, "share": 2}


def sheets(found: Difference) -> list[Sheet]:
    """A sheet for each table of each VM, rows by how much they changed."""
    made: list[Sheet] = []
    many = len({change.vm for change in found.changes if change.vm}) > 1
    for (vm, table), changes in groupby(found.changes, key=lambda change: (change.vm, change.table)):
        rows = sorted(changes, key=_weight, reverse=True)
        told = any(change.verdict for change in rows)
        title = TITLES.get(table, table) + (f", VM {vm}" if many and vm else "")
        columns = [
            Column(""),
            Column("of it", rank=1),
            *(Column(t, number=True) for t in ("before", "after", "change")),
        ]
        if told:
            columns.append(Column("verdict"))
        sheet = Sheet(f"{table}-{vm}", title, columns)
        for change in rows:
            cells = [clean(change.row), change.column, _value(change, change.before), _value(change, change.after)]
            sheet.rows.append([*cells, _change(change), *([change.verdict] if told else [])])
        if any(change.verdict == UNTOLD for change in rows):
            sheet.note = "Too few seconds to tell a difference from what each recording varies by itself."
        made.append(sheet)
    return made


def render(found: Difference, console: Console, limit: int | None = LIMIT) -> None:
    """Prints the difference; tables end after ``limit`` rows, None prints all."""
    console.print(f"before: {clean(', '.join(found.before))}", markup=False, soft_wrap=True)
    console.print(f"after:  {clean(', '.join(found.after))}", markup=False, soft_wrap=True)
    for note in found.notes:
        console.print(note, markup=False, soft_wrap=True)
    for what, texts in (("new finding", found.came), ("gone finding", found.went)):
        for text in texts:
            console.print(f"{what}: {clean(text)}", markup=False, soft_wrap=True)
    for sheet in sheets(found):
        show(sheet, console, limit)


def _weight(change: Change) -> tuple[bool, int, float]:
    """What is told to be different first, then rates, shares and times, each by how far the two are apart."""
    before, after = change.before or 0.0, change.after or 0.0
    return change.verdict == DIFFERENT, -_ORDER.get(change.column, len(_ORDER)), abs(after - before)


def _value(change: Change, value: float | None) -> str:
    if value is None:
        return "-"
    if change.column.endswith(" ns"):
        return duration(value)
    return share(value) if change.column == "share" else short(value)


def _change(change: Change) -> str:
    part = change.change
    if part is None:
        return "gone" if change.after is None else "new" if change.after else "-"
    return f"{100 * part:+.1f} %"
