"""The tables of a report as people read them: titles, columns and cells in words, for a terminal and a page alike."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import groupby

from fastexit.answers.report import FastRow, FileReport, Quantiles, VmReport
from fastexit.answers.words import between, clean, count, duration, most, names, rate, share

MATRIX = 8
"""Up to this many vCPUs, who sends to whom is a square of numbers; beyond, a list."""


_NAME = 40
_SENTENCES = 4000


@dataclass(frozen=True)
class Column:
    """A column: ``number`` is set flush right; the greatest ``rank`` is left out first where room is short."""

    title: str
    number: bool = False
    rank: int = 0


@dataclass
class Sheet:
    """A table to read. ``name`` is stable; ``note`` is a sentence that belongs to it."""

    name: str
    title: str
    columns: list[Column]
    rows: list[list[str]] = field(default_factory=list)
    note: str = ""


def width(sheet: Sheet) -> int:
    """Characters that its longest cells take side by side."""
    cells = [[column.title for column in sheet.columns], *sheet.rows]
    return sum(max(len(row[i]) for row in cells) for i in range(len(sheet.columns)))


def columns(*titles: str) -> list[Column]:
    """Columns by their titles: ``#`` in front: a number; each ``?`` behind: a rank more."""
    return [
        Column(
            title.removeprefix("#").rstrip("?"), number=title.startswith("#"), rank=len(title) - len(title.rstrip("?"))
        )
        for title in titles
    ]


def of_vm(vm: VmReport, clock: str = "ns") -> list[Sheet]:
    """The tables of one VM in the order in which they are read; those that would be empty are left out."""
    sheets = [
        _clues(vm),
        _exits(vm, clock),
        _vcpus(vm, clock),
        _seconds(vm),
        _msrs(vm),
        _classes(vm),
        _vectors(vm),
        _sent(vm),
        _doors(vm),
        _halts(vm, clock),
        _latency(vm, clock),
        *_fast(vm),
        _saved(vm),
        _switches(vm),
    ]
    return [_without_empty(sheet) for sheet in sheets if sheet.rows]


def of_files(files: list[FileReport]) -> list[Sheet]:
    """Tables that another tool printed, then what could not be read."""
    sheets = []
    called = names(file.path for file in files)
    for tables in _foreign, _unreadable:
        for file in files:
            for sheet in tables(file):
                if len(files) > 1:
                    sheet.title = f"{called[file.path]}: {sheet.title}"
                sheets.append(sheet)
    return [sheet for sheet in sheets if sheet.rows]


def _clues(vm: VmReport) -> Sheet:
    sheet = Sheet("clues", "What it looks at", columns("what", "is", "from?", "evidence"))
    for what, clue in vm.clues.items():
        known = not clue.line or re.search(rf"\bline {clue.line:,}\b", clue.evidence)
        line = "" if known else f" (line {clue.line:,})"
        sheet.rows.append([clean(what), clean(clue.value), clean(clue.source), clean(clue.evidence) + line])
    return sheet


def _quantiles(time: Quantiles | None, clock: str, *what: str) -> list[str]:
    return [duration(getattr(time, name) if time else None, clock) for name in what]


def _exits(vm: VmReport, clock: str) -> Sheet:
    total = sum(row.count for row in vm.exits)
    title = f"Exits: {total:,}"
    if vm.seconds:
        title += f" in {duration(vm.seconds * 1e9)}, {rate(total / vm.seconds)} a second"
    sheet = Sheet(
        "exits",
        title,
        columns(
            "reason", "#exits", "#share", "#a second??", "#median", "#90 %????", "#99 %", "#longest?", "#of time???"
        ),
    )
    nested = any(row.nested for row in vm.exits)
    if nested:
        sheet.columns.insert(2, Column("of L2", number=True))
    for row in vm.exits:
        sheet.rows.append(
            [
                clean(row.reason),
                count(row.count),
                *([count(row.nested)] if nested else []),
                share(row.share),
                rate(row.per_second),
                *_quantiles(row.time, clock, "median", "p90", "p99", "maximum"),
                "-" if row.time_share is None else share(row.time_share),
            ]
        )
    if not any(row.time for row in vm.exits):
        sheet.note = "No times from exit to entry: the trace has no kvm_entry lines or no clock."
    else:
        sheet.note = "Times are from the exit to the next entry: the host's work, and for HLT the sleep."
    return sheet


def _vcpus(vm: VmReport, clock: str) -> Sheet:
    titles = columns("#vCPU", "thread??", "#exits", "most frequent", "#median?", "#99 %???", "most often at")
    sheet = Sheet("vcpus", f"vCPUs: {len(vm.vcpus):,}", titles)
    for row in vm.vcpus:
        hottest = max(row.rips, key=lambda pair: pair[1], default=None)
        spot = f"0x{hottest[0]:x} {share(hottest[1] / row.exits) if row.exits else ''}".strip() if hottest else ""
        sheet.rows.append(
            [
                str(row.vcpu) if row.vcpu >= 0 else "-",
                clean(row.thread[:_NAME]),
                count(row.exits),
                most(row.by_reason.items(), row.exits, limit=2),
                *_quantiles(row.time, clock, "median", "p99"),
                spot,
            ]
        )
    return sheet


def _seconds(vm: VmReport) -> Sheet:
    sheet = Sheet("seconds", "Exits by second", columns("#second", "#exits", "most frequent"))
    if len(vm.by_second) > 1:
        for i, reasons in enumerate(vm.by_second):
            if total := sum(reasons.values()):
                sheet.rows.append([f"{i:,}", count(total), most(reasons.items(), total)])
        if quiet := len(vm.by_second) - len(sheet.rows):
            sheet.note = f"In {count(quiet, 'other second')} there was no exit."
    return sheet


def _msrs(vm: VmReport) -> Sheet:
    titles = columns("MSR", "name", "access", "#times", "#share", "##GP??", "most frequent values???")
    sheet = Sheet("msrs", "MSRs", titles)
    for row in vm.msrs:
        values = ", ".join(f"0x{value:x} {share(n / row.count) if row.count else n}" for value, n in row.values[:3])
        access = "write" if row.write else "read"
        faults = count(row.faults) if row.faults else ""
        sheet.rows.append(
            [f"0x{row.msr:x}", clean(row.name), access, count(row.count), share(row.share), faults, values]
        )
    return sheet


def _classes(vm: VmReport) -> Sheet:
    """What an ICR's values ask for, in words."""
    sheet = Sheet("classes", "What is written to the ICR", columns("delivery and destination", "#times", "#share"))
    for row in vm.msrs:
        for what, n in row.classes:
            sheet.rows.append([clean(what), count(n), share(n / row.count) if row.count else "-"])
    return sheet


def _vectors(vm: VmReport) -> Sheet:
    titles = columns("vector", "name?", "from", "#accepted", "#share", "#coalesced??", "#EOIs")
    sheet = Sheet("vectors", "Interrupts by vector and source", titles)
    for row in vm.vectors:
        sheet.rows.append(
            [
                f"0x{row.vector:02x}" if row.vector >= 0 else "-",
                clean(row.name),
                clean(row.source),
                count(row.accepted),
                share(row.share),
                count(row.coalesced),
                count(row.eois),
            ]
        )
    return sheet


def _sent(vm: VmReport) -> Sheet:
    """Who interrupts whom: a square for few vCPUs, else the pairs with the most interrupts first."""
    ids = sorted({row.sender for row in vm.sent} | {row.target for row in vm.sent})
    total = sum(row.interrupts for row in vm.sent)
    title = f"Who sends to whom: {count(total, 'interrupt')} by IPIs"
    if len(ids) <= MATRIX:
        counts = {(row.sender, row.target): row.interrupts for row in vm.sent}
        sheet = Sheet("sent", title, columns("sender", *(f"#to {i}" for i in ids)))
        senders = sorted({row.sender for row in vm.sent})
        sheet.rows = [
            [f"vCPU {sender}", *(count(n) if (n := counts.get((sender, i), 0)) else "." for i in ids)]
            for sender in senders
        ]
        return sheet
    sheet = Sheet("sent", title, columns("#sender", "#target", "#interrupts", "#share"))
    for row in sorted(vm.sent, key=lambda row: (-row.interrupts, row.sender, row.target)):
        part = share(row.interrupts / total if total else 0)
        sheet.rows.append([str(row.sender), str(row.target), count(row.interrupts), part])
    return sheet


def _doors(vm: VmReport) -> Sheet:
    sheet = Sheet("doors", "How the guest reaches its APIC", columns("for", "by", "#accesses"))
    sheet.rows = [[clean(row.doing), clean(row.door), count(row.count)] for row in vm.doors]
    return sheet


def _halts(vm: VmReport, clock: str) -> Sheet:
    sheet = Sheet("halts", "HLT and wake-ups", columns("what", "#times", "#median", "#99 %", "#longest?"))
    if vm.halts is None:
        return sheet
    asleep = _quantiles(vm.halts.asleep, clock, "median", "p99", "maximum")
    sheet.rows.append(["HLT, until the next entry", count(vm.halts.hlts), *asleep])
    for what, n in ("woken after a wait", vm.halts.waits), ("woken while the host polled", vm.halts.polls):
        if n:
            sheet.rows.append([what, count(n), "", "", ""])
    return sheet


def _latency(vm: VmReport, clock: str) -> Sheet:
    titles = columns("from, to", "#IPIs", "#median", "#90 %?", "#99 %", "#longest")
    sheet = Sheet("latency", "Latency of IPIs", titles)
    for row in vm.latency:
        times = _quantiles(row.time, clock, "median", "p90", "p99", "maximum")
        sheet.rows.append([clean(row.what), count(row.time.count), *times])
    return sheet


def _alike(row: FastRow) -> tuple[object, ...]:
    return row.fast, row.total, row.refusals, row.saved, row.saved_total, row.saved_per_second, row.sooner


def _fast(vm: VmReport) -> list[Sheet]:
    """One table a class of exits; neighbouring generations that do the same share a row."""
    sheets = []
    for i, what in enumerate(dict.fromkeys(row.what for row in vm.fast)):
        rows = [row for row in vm.fast if row.what == what]
        priced = any(row.saved for row in rows)
        saved = ("#cycles saved each", "#in total??", "#a second???") if priced else ()
        sooner = ("#IPI leaves sooner by????",) if any(row.sooner for row in rows) else ()
        total = rows[0].total
        title = f"Taken fast: {count(total, what)}" if what.isprintable() else f"Taken fast: {total:,} {clean(what)}"
        sheet = Sheet(
            f"fast-{i + 1}", title, columns("kernel", "#fast", "#share", "why not the others?", *saved, *sooner)
        )
        for _, alike in groupby(rows, key=_alike):
            kernels = list(alike)
            row = kernels[0]
            reasons = "; ".join(f"{n:,} {clean(reason)}" for reason, n in row.refusals.items())
            cells = [
                row.kernel if len(kernels) == 1 else f"{row.kernel} to {kernels[-1].kernel}",
                count(row.fast),
                share(row.fast / row.total) if row.total else "-",
                reasons,
            ]
            if priced:
                cells += [between(row.saved), between(row.saved_total), between(row.saved_per_second)]
            if sooner:
                cells.append(between(row.sooner))
            sheet.rows.append(cells)
        sheets.append(sheet)
    return sheets


def _saved(vm: VmReport) -> Sheet:
    """Cycles that the newest generation's fast path saves each vCPU."""
    rows = [row for row in vm.fast if row.saved_by_vcpu]
    newest = [row for row in rows if row.kernel == rows[-1].kernel]
    title = f"Cycles saved by vCPU in {newest[0].kernel}" if newest else ""
    sheet = Sheet("saved", title, columns("#vCPU", *(f"#{clean(row.what)}s" for row in newest)))
    for vcpu in sorted({vcpu for row in newest for vcpu in row.saved_by_vcpu}):
        sheet.rows.append([str(vcpu), *(between(row.saved_by_vcpu.get(vcpu)) for row in newest)])
    return sheet


def _switches(vm: VmReport) -> Sheet:
    titles = columns("switch", "spares", "#exits now??", "#then??", "#fewer", "why???", "#cycles saved?")
    sheet = Sheet("switches", "What a switch of the host would change", titles)
    for row in vm.switches:
        gone = "; ".join(f"{n:,} {clean(what)}" for what, n in sorted(row.gone.items(), key=lambda pair: -pair[1])[:4])
        exits = ["", "", ""]
        if row.exits_before:
            fewer = share((row.exits_before - row.exits_after) / row.exits_before)
            exits = [count(row.exits_before), count(row.exits_after), fewer]
        sheet.rows.append([clean(row.switch), gone, *exits, clean(row.why, _SENTENCES), between(row.saved_total)])
    return sheet


def _foreign(file: FileReport) -> Iterable[Sheet]:
    """Tables that stand in the file in place of lines."""
    for i, table in enumerate(file.tables):
        titles = columns("what", "#times", "#share", "#total?", "#least???", "#mean", "#longest??")
        title = f"{clean(table['kind'])}: {clean(table['title'])}" if table["title"] else clean(table["kind"])
        sheet = Sheet(f"table-{i + 1}", title, titles)
        for row in table["rows"]:
            times = [duration(row[key]) for key in ("total", "minimum", "mean", "maximum")]
            known = share(row["share"]) if row["share"] >= 0 else "-"
            sheet.rows.append([clean(row["label"]), count(row["number"]), known, *times])
        yield _without_empty(sheet)


def _without_empty(sheet: Sheet) -> Sheet:
    """Columns that no row fills say nothing."""
    kept = [i for i in range(len(sheet.columns)) if not i or any(row[i] not in ("", "-") for row in sheet.rows)]
    sheet.columns = [sheet.columns[i] for i in kept]
    sheet.rows = [[row[i] for i in kept] for row in sheet.rows]
    return sheet


def _unreadable(file: FileReport) -> Iterable[Sheet]:
    title = f"Could not be read: {count(file.unreadable, 'line')} of {file.lines:,}"
    sheet = Sheet("unreadable", title, columns("#line", "text"))
    sheet.rows = [[f"{line:,}", clean(text)] for line, text in file.unreadable_first]
    more = file.unreadable - len(file.unreadable_first)
    if more > 0 and sheet.rows:
        sheet.note = f"The first {len(sheet.rows):,} of them are shown."
    yield sheet
