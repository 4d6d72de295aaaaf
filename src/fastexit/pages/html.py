"""A report as one page that needs nothing else: no script, no request, charts drawn into it, a table behind each."""

from __future__ import annotations

import base64
import hashlib
from dataclasses import dataclass, field
from importlib import resources

from fastexit import __version__
from fastexit.answers.report import Report, VmReport
from fastexit.answers.words import clean, count, duration, names, rate, share
from fastexit.pages import sheets, summary
from fastexit.pages.charts import Chart, of_vm
from fastexit.pages.sheets import Column, Sheet

LIMIT = 400
"""Rows of a table in the page."""
HALF = 90
"""Tables of so many characters in a row take half the width."""
CHARTED = 8
"""So many VMs have charts; those with the most exits."""
FINDINGS = 20
"""So many findings are seen at once; the others can be opened."""
TOLD = 60
"""So many VMs have a part of their own."""

_CHARTS = {
    "exits": ("exits",),
    "seconds": ("seconds",),
    "times": (),
    "sent": ("sent",),
    "latency": ("latency",),
    "saved": ("saved",),
}


@dataclass
class _Part:
    chart: Chart | None = None
    sheets: list[Sheet] = field(default_factory=list)

    @property
    def full(self) -> bool:
        """Whether it needs the whole width; what it looks at does not."""
        return any(sheets.width(sheet) > HALF and sheet.name != "clues" for sheet in self.sheets)


@dataclass
class _Vm:
    key: str
    name: str
    parts: list[_Part]


def page(report: Report) -> str:
    """The page. ModuleNotFoundError says what to install where jinja2 or matplotlib is missing."""
    try:
        import jinja2
        import markupsafe
        import matplotlib  # noqa: F401
    except ModuleNotFoundError as error:
        missing = f"the page needs {error.name}: pip install jinja2 matplotlib"
        raise ModuleNotFoundError(missing, name=error.name) from None
    folder = resources.files("fastexit.pages")
    style = folder.joinpath("page.css").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    environment.filters["drawn"] = markupsafe.Markup
    template = environment.from_string(folder.joinpath("page.html.j2").read_text(encoding="utf-8"))
    shown = sorted(report.vms, key=lambda vm: -sum(row.count for row in vm.exits))[:TOLD]
    charted = {id(vm) for vm in shown[:CHARTED]}
    told = {id(vm) for vm in shown}
    alone = len(report.vms) == 1
    called = summary.vm_names(report)
    left_out = len(report.vms) - len(shown)
    return template.render(
        version=__version__,
        style=style,
        style_hash=f"sha256-{digest}",
        title=_title(report),
        lines=_lines(report),
        tiles=_tiles(report.vms[0]) if alone else [],
        findings=summary.findings(report),
        overview=[] if len(report.vms) < 2 else [summary.overview(report), summary.everywhere(report)],
        vms=[
            _vm(report, vm, f"vm{i + 1}", called[id(vm)], id(vm) in charted)
            for i, vm in enumerate(report.vms)
            if id(vm) in told
        ],
        left_out=f"{count(left_out, 'VM')} with fewer exits: in the overview alone" if left_out else "",
        files=_files(report),
        foreign=sheets.of_files(report.files),
        closing=_closing(report),
        limit=LIMIT,
        first=FINDINGS,
    )


def _title(report: Report) -> str:
    called = list(names(file.path for file in report.files).values())
    return ", ".join(called) if 0 < len(called) <= 3 else count(len(called), "trace")


def _lines(report: Report) -> list[str]:
    read = [file for file in report.files if not file.refused]
    events = sum(sum(file.events.values()) for file in read)
    shapes = ", ".join(dict.fromkeys(clean(file.shape) for file in read if file.shape))
    told = [f"{count(sum(file.lines for file in read), 'line')}, {count(events, 'event')}: {shapes}" if read else ""]
    if refused := len(report.files) - len(read):
        told.append(f"{count(refused, 'file')} could not be read")
    return [line for line in told if line]


def _tiles(vm: VmReport) -> list[tuple[str, str]]:
    """What one looks at first."""
    total = sum(row.count for row in vm.exits)
    made = [("recorded", duration(vm.seconds * 1e9))] if vm.seconds else []
    if vm.exits:
        made.append(("exits", f"{total:,}"))
    if vm.seconds and total:
        made.append(("exits a second", rate(total / vm.seconds)))
    if vm.exits and total:
        first = max(vm.exits, key=lambda row: row.count)
        made.append((f"most frequent: {share(first.count / total)}", clean(first.reason)))
    if vm.sent and not vm.exits:
        made.append(("interrupts by IPIs", f"{sum(row.interrupts for row in vm.sent):,}"))
    longest = max(
        (row.time.maximum for row in vm.exits if row.time and row.reason.lower() not in ("hlt", "exit_hlt")),
        default=None,
    )
    if longest is not None:
        made.append(("longest exit but HLT", duration(longest)))
    rows = [row for row in vm.fast if row.total]
    if rows:
        last = [row for row in rows if row.what == rows[0].what][-1]
        made.append((f"{clean(last.what)}s fast in {clean(last.kernel)}", share(last.fast / last.total)))
    return made


def _vm(report: Report, vm: VmReport, key: str, called: str, charted: bool) -> _Vm:
    """Charts with their tables, then what has no chart, in the order in which a terminal has them."""
    clock = next((file.clock for file in report.files if file.path == vm.path), "ns")
    charts = of_vm(vm, clock, key) if charted else {}
    tables = {sheet.name: sheet for sheet in sheets.of_vm(vm, clock)}
    parts = [_Part(sheets=[tables.pop("clues")])] if "clues" in tables else []
    open_tables = {"exits"}
    for name, chart in charts.items():
        wanted = [one for one in tables if one in _CHARTS.get(name, ()) or (name == "fast" and one.startswith("fast-"))]
        behind = [tables[one] for one in wanted if one not in open_tables]
        parts.append(_Part(chart, behind))
        for one in wanted:
            if one not in open_tables:
                del tables[one]
    parts += [_Part(sheets=[sheet]) for sheet in tables.values()]
    parts.sort(key=lambda part: not part.chart and part.full)
    return _Vm(
        key,
        called or ("The virtual machine" if vm.number else "What belongs to no VM in particular"),
        parts,
    )


def _files(report: Report) -> Sheet:
    columns = [Column("file"), Column("written by"), Column("lines", number=True), Column("events", number=True)]
    columns += [Column("unreadable", number=True), Column("lost", number=True), Column("said of it")]
    sheet = Sheet("files", f"{count(len(report.files), 'file')}", columns)
    for file in report.files:
        said = [*([f"refused: {file.refused}"] if file.refused else []), *file.problems, *file.notes]
        sheet.rows.append(
            [
                clean(file.path if file.path != "-" else "standard input"),
                clean(file.shape),
                count(file.lines),
                count(sum(file.events.values())),
                count(file.unreadable),
                count(file.lost),
                "; ".join(clean(one) for one in said),
            ]
        )
    return sheet


def _closing(report: Report) -> list[str]:
    told = [f"Written by fastexit {__version__}."]
    if report.costs:
        told.append(f"Cycles are those of the cost profile {clean(report.costs)}, a range where a stage is assumed.")
    return told
