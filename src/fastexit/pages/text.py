"""A report on the terminal: findings, what it looks at, exits, and on to what could not be read."""

from __future__ import annotations

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from rich.text import Text

from fastexit.answers.report import FileReport, Report
from fastexit.answers.words import clean, count, names
from fastexit.pages import sheets, summary
from fastexit.pages.sheets import Column, Sheet

LIMIT = 20
"""Rows of a table that are shown unless all are asked for."""

SECTIONS = 8
"""Up to so many VMs are all shown; more only in the overview, unless all rows are asked for."""

_STYLES = {"problem": "bold red", "warning": "bold yellow", "note": "bold cyan"}
_LEAST = 24
_GAP = 3


def render(report: Report, console: Console, limit: int | None = LIMIT) -> None:
    """Prints the whole report; tables end after ``limit`` rows and say how many more there are, None prints all."""
    quiet = 0
    shown_as = names(file.path for file in report.files)
    for i, file in enumerate(report.files):
        if limit is None or i < limit or file.refused or file.problems:
            _file(file, shown_as[file.path], console)
        else:
            quiet += 1
    if quiet:
        _say(console, (f"and {count(quiet, 'more file')} (--all)", "dim"))
    told = summary.findings(report)
    if told:
        console.print()
        _say(console, "Findings", style="bold")
    for one in told if limit is None else told[:limit]:
        where = f" ({one.where})" if one.where else ""
        _say(console, (f"{one.severity}: ", _STYLES[one.severity]), f"{one.text}{where}")
        if one.advice:
            _say(console, (f"  {one.advice}", "dim"))
    if limit is not None and len(told) > limit:
        _say(console, (f"and {len(told) - limit:,} more (--all)", "dim"))
    if len(report.vms) > 1:
        show(summary.overview(report), console, limit)
        show(summary.everywhere(report), console, limit)
    called = summary.vm_names(report)
    clocks = {file.path: file.clock for file in report.files}
    shown = report.vms if limit is None or len(report.vms) <= SECTIONS else []
    if len(shown) < len(report.vms):
        console.print()
        _say(console, ("the tables of each VM: --all, or a page (--html), or files (--csv)", "dim"))
    for vm in shown:
        if len(report.vms) > 1:
            console.print()
            console.rule(Text(called[id(vm)]), align="left")
        for sheet in sheets.of_vm(vm, clocks.get(vm.path, "ns")):
            show(sheet, console, limit)
    for sheet in sheets.of_files(report.files if limit is None else report.files[:SECTIONS]):
        show(sheet, console, limit)
    if report.costs:
        console.print()
        _say(console, f"Cycles are those of the cost profile {clean(report.costs)}, a range where a stage is assumed.")


def _say(console: Console, *parts: str | tuple[str, str], style: str = "") -> None:
    """One line, which the terminal wraps and a pipe gets whole."""
    console.print(Text.assemble(*parts, style=style), soft_wrap=True)


def _file(file: FileReport, called: str, console: Console) -> None:
    name = (called, "bold")
    if file.refused:
        _say(console, name, ": ", ("refused: ", "red"), clean(file.refused))
        return
    events = count(sum(file.events.values()), "event")
    _say(console, name, f": {clean(file.shape)}, {count(file.lines, 'line')}, {events}")
    if file.lost:
        _say(console, ("lost: ", "yellow"), f"the recorder says that it lost {count(file.lost, 'event')}")
    if file.unreadable:
        _say(console, ("unreadable: ", "yellow"), f"{count(file.unreadable, 'line')} of {file.lines:,}")
    for problem in file.problems:
        _say(console, ("problem: ", "red"), clean(problem))
    for note in file.notes:
        _say(console, ("note: ", "yellow"), clean(note))


def show(sheet: Sheet, console: Console, limit: int | None) -> None:
    """A table in the width that there is: columns of little weight go first, then long words are folded."""
    rows = sheet.rows if limit is None else sheet.rows[:limit]
    kept = _fitting(sheet.columns, rows, console.width)
    console.print()
    _say(console, sheet.title, style="bold")
    table = Table(header_style="dim", box=SIMPLE, pad_edge=False, show_edge=False)
    for i in kept:
        column = sheet.columns[i]
        if column.number:
            table.add_column(Text(column.title), justify="right", no_wrap=True)
        else:
            table.add_column(Text(column.title), overflow="fold", min_width=min(_LEAST, _width(sheet.columns, rows, i)))
    for row in rows:
        table.add_row(*(Text(row[i]) for i in kept))
    console.print(table)
    more = len(sheet.rows) - len(rows)
    if more:
        _say(console, (f"and {more:,} more (--all)", "dim"))
    if sheet.note:
        _say(console, (sheet.note, "dim"))


def _width(columns: list[Column], rows: list[list[str]], i: int) -> int:
    return max(len(columns[i].title), max((Text(row[i]).cell_len for row in rows), default=0))


def _fitting(columns: list[Column], rows: list[list[str]], room: int) -> list[int]:
    """Which columns fit, words taken at the width that they can be folded to."""
    widths = [_width(columns, rows, i) for i in range(len(columns))]
    least = [width if column.number else min(width, _LEAST) for width, column in zip(widths, columns, strict=True)]
    kept = list(range(len(columns)))
    while sum(least[i] + _GAP for i in kept) > room and (ranks := max(columns[i].rank for i in kept)):
        kept.remove(next(i for i in kept if columns[i].rank == ranks))
    return kept
