"""What stands above the tables of each VM: all findings, all VMs in a table, and their exits together."""

from __future__ import annotations

from dataclasses import dataclass

from fastexit.answers.report import SEVERITIES, Report, VmReport
from fastexit.answers.words import at_lines, clean, count, most, names, rate, share
from fastexit.pages.sheets import Sheet, columns

_SENTENCES = 4000


def vm_names(report: Report) -> dict[int, str]:
    """What each VM is called beside the others, by id(); nothing where there is but one."""
    if len(report.vms) < 2:
        return {id(vm): "" for vm in report.vms}
    called = names(vm.path for vm in report.vms)
    return {
        id(vm): f"{called[vm.path]}, {f'VM {vm.number}' if vm.number else 'of no VM in particular'}"
        for vm in report.vms
    }


def overview(report: Report) -> Sheet:
    """All VMs of all files, one row each: where to look first among many."""
    titles = columns("file", "#VM", "#exits", "#a second", "most frequent", "fast in the newest kernel??", "#findings")
    sheet = Sheet("overview", f"{count(len(report.vms), 'VM')} of {count(len(report.files), 'file')}", titles)
    called = names(vm.path for vm in report.vms)
    for vm in report.vms:
        total = sum(row.count for row in vm.exits)
        frequent = most(((row.reason, row.count) for row in vm.exits), total, limit=2)
        per_second = rate(total / vm.seconds if vm.seconds and total else None)
        cells = [called[vm.path], str(vm.number), count(total), per_second, frequent, newest(vm)]
        sheet.rows.append([*cells, count(len(vm.findings)) if vm.findings else ""])
    return sheet


def newest(vm: VmReport) -> str:
    """The share of the first class of exits that the newest generation takes fast, in words."""
    rows = [row for row in vm.fast if row.total]
    if not rows:
        return ""
    last = [row for row in rows if row.what == rows[0].what][-1]
    return f"{share(last.fast / last.total)} of {clean(last.what)}s"


def everywhere(report: Report) -> Sheet:
    """Exits by reason over all VMs."""
    totals: dict[str, int] = {}
    where: dict[str, int] = {}
    for vm in report.vms:
        for row in vm.exits:
            totals[row.reason] = totals.get(row.reason, 0) + row.count
            where[row.reason] = where.get(row.reason, 0) + 1
    whole = sum(totals.values())
    sheet = Sheet("everywhere", f"Exits of all of them: {whole:,}", columns("reason", "#exits", "#share", "#in VMs"))
    for reason, n in sorted(totals.items(), key=lambda pair: -pair[1]):
        sheet.rows.append([clean(reason), count(n), share(n / whole if whole else 0), count(where[reason])])
    return sheet


@dataclass(frozen=True)
class Told:
    """A finding in words, with where it was found."""

    severity: str
    text: str
    where: str
    advice: str


def findings(report: Report) -> list[Told]:
    """All findings, worst first."""
    told = []
    called = vm_names(report)
    for vm in report.vms:
        for one in vm.findings:
            severity = one.severity if one.severity in SEVERITIES else SEVERITIES[-1]
            where = "; ".join(filter(None, (called[id(vm)], at_lines(one.lines))))
            told.append(Told(severity, clean(one.text, _SENTENCES), where, clean(one.advice, _SENTENCES)))
    return sorted(told, key=lambda one: SEVERITIES.index(one.severity))
