"""A report as a notebook shows it: findings and exits by reason, short and without anything that runs or is fetched."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape

from fastexit.answers.report import SEVERITIES, Finding, Report, VmReport
from fastexit.answers.words import at_lines, clean, count, duration, names, share

_VMS = 4
_FINDINGS = 12
_REASONS = 12
_COLORS = {"problem": "#c0392b", "warning": "#b9770e"}


def fragment(report: Report) -> str:
    """Some elements of a page, with styles of their own and colours that suit light and dark."""
    parts = [_refused(report), *(_vm(report, vm) for vm in report.vms[:_VMS])]
    more = len(report.vms) - _VMS
    if more > 0:
        parts.append(f"<p>and {escape(count(more, 'VM'))} more: report.vms</p>")
    return f"<div>{''.join(parts) or '<p>nothing was read</p>'}</div>"


def _text(words: object) -> str:
    return escape(clean(words))


def _refused(report: Report) -> str:
    called = names(file.path for file in report.files)
    return "".join(
        f"<p><b>{escape(called[file.path])}</b> could not be read: {_text(file.refused)}</p>"
        for file in report.files
        if file.refused
    )


def _vm(report: Report, vm: VmReport) -> str:
    clock = next((file.clock for file in report.files if file.path == vm.path), "ns")
    total = sum(row.count for row in vm.exits)
    name = f"VM {vm.number}" if vm.number else "no VM in particular"
    called = names(vm.path for vm in report.vms)
    head = f"<p><b>{escape(called[vm.path])}</b>, {name}: {count(total, 'exit')}"
    if vm.seconds:
        head += f" in {duration(vm.seconds * 1e9)}"
    told = sorted(vm.findings, key=_severity)[:_FINDINGS]
    items = "".join(_finding(one) for one in told)
    rows = (
        (row.reason, count(row.count), share(row.share), duration(row.time.median if row.time else None, clock))
        for row in vm.exits[:_REASONS]
    )
    more = f"<p>and {count(len(vm.exits) - _REASONS, 'reason')} more</p>" if len(vm.exits) > _REASONS else ""
    listed = f"<ul>{items}</ul>" if items else ""
    return f"{head}</p>{listed}{_table(rows) if vm.exits else ''}{more}"


def _severity(finding: Finding) -> int:
    return SEVERITIES.index(finding.severity) if finding.severity in SEVERITIES else len(SEVERITIES)


def _finding(one: Finding) -> str:
    color = _COLORS.get(one.severity)
    style = f' style="color:{color}"' if color else ""
    lines = f" ({at_lines(one.lines)})" if one.lines else ""
    return f"<li><b{style}>{_text(one.severity)}</b>: {_text(one.text)}{lines}</li>"


def _table(rows: Iterable[tuple[str, ...]]) -> str:
    heads = "".join(f'<th scope="col">{one}</th>' for one in ("reason", "exits", "share", "median"))
    body = "".join(
        f'<tr><th scope="row" style="text-align:left">{_text(cells[0])}</th>'
        + "".join(f'<td style="text-align:right">{_text(cell)}</td>' for cell in cells[1:])
        + "</tr>"
        for cells in rows
    )
    return f"<table><caption>Exits by reason</caption><thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table>"
