"""A Report on the terminal: what was predicted, who sent what, what each generation takes fast, and what differs."""

from __future__ import annotations

from pathlib import Path

from rich.box import SIMPLE
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from fastexit.trace.doors import Doing
from fastexit.trace.report import DoorUse, Lines, Mismatch, Report, VmReport, vector_name

_ORDER = list(Doing)
_VECTORS = 16
_THREADS = 8
_HV_TIMER = {
    ("trace", True): "this host used (a kvm_hv_timer_state line says hv_timer 1)",
    ("trace", False): "this host did not use (every kvm_hv_timer_state line says hv_timer 0)",
    ("option", True): "this host used (--hv-timer yes)",
    ("option", False): "this host did not use (--hv-timer no)",
    ("vendor", False): "SVM does not have",
    ("assumed", True): "this host is assumed to have used (no kvm_hv_timer_state line; --hv-timer no if it did not)",
}
"""(VmReport.hv_timer_from, hv_timer) in words."""


def render(report: Report, console: Console) -> None:
    """Prints the whole report; every mismatch that it keeps has its line."""
    rate = report.lines / report.seconds if report.seconds else 0.0
    console.print(
        f"[bold]{escape(Path(report.path).name)}[/]: {report.lines:,} lines, "
        f"{sum(report.events.values()):,} kvm events, {_count(len(report.vms), 'VM')}; "
        f"replayed as {report.kernel} {report.vendor}{' with APICv' if report.apicv else ''} "
        f"in {report.seconds:.2f} s ({rate:,.0f} lines/s)",
        soft_wrap=True,
    )
    console.print(_recorded_by(report), soft_wrap=True)
    if report.doubtful:
        console.print(
            f"[red]doubtful:[/] which thread belongs to which VM: {_count(report.left_out, 'interrupt')} of no VM in "
            "particular were left out, and lines differ",
            soft_wrap=True,
        )
    for problem in report.problems:
        console.print(f"[red]problem:[/] {escape(problem)}", soft_wrap=True)
    for note in report.notes:
        console.print(f"[yellow]note:[/] {escape(note)}", soft_wrap=True)
    for vm in report.vms:
        _vm(vm, console, alone=len(report.vms) == 1)
    _mismatches(report, console)


def _recorded_by(report: Report) -> str:
    """Which kernels print such lines, and what tells."""
    if not report.evidence:
        return "recorded by: no line tells the kernel" + (
            f"; {report.kernel} is assumed (--kernel)" if report.kernel_from == "assumed" else ""
        )
    if not report.kernels:
        return f"recorded by: lines disagree (see the note){'' if report.kernel_from == 'option' else ' (--kernel)'}"
    first, last = report.kernels[0], report.kernels[-1]
    which = first if first == last else f"{first} to {last}"
    tells = "; ".join(
        f"{e.says} (line {e.line:,}: "
        + " and ".join(filter(None, (e.since and f"since {e.since}", e.before and f"before {e.before}")))
        + ")"
        for e in report.evidence
    )
    asked = f"; {report.kernel} was asked for" if report.kernel_from == "option" else ""
    return f"recorded by: {which}{asked}, as the lines tell: {escape(tells)}"


def _count(n: int, noun: str) -> str:
    return f"{n:,} {noun}{'' if n == 1 else 's'}"


def _vm(vm: VmReport, console: Console, *, alone: bool) -> None:
    console.print()
    if not alone:
        console.rule(f"VM {vm.number}", align="left")
    threads = [f"{vcpu} = {thread or 'no thread seen'}" for vcpu, thread in vm.threads.items()]
    more = f", and {len(threads) - _THREADS} more" if len(threads) > _THREADS else ""
    console.print(f"vCPU {escape(', '.join(threads[:_THREADS]))}{more}; {vm.irqchip} irqchip", soft_wrap=True)
    console.print(f"state before the first line: {escape(vm.start)}", soft_wrap=True)
    for assumption in vm.assumptions:
        console.print(f"assumed: {escape(assumption)}", soft_wrap=True)
    console.print(_predictions(vm))
    if vm.door_uses:
        console.print(_doors(vm))
    if not vm.icr_writes and not vm.hypercalls:
        return
    console.print(_classes(vm))
    if vm.vectors:
        console.print(_vectors(vm))
    console.print(_generations(vm))
    if vm.deadlines:
        fast = ", ".join(vm.deadline_fast) or "none"
        console.print(f"{vm.deadlines:,} TSC_DEADLINE writes besides, taken fast by: {fast}")
        needs = ", ".join(vm.deadline_with_timer)
        whether = _HV_TIMER[vm.hv_timer_from, vm.hv_timer]
        console.print(f"{needs}: the fast path needs the preemption timer, which {whether}", soft_wrap=True)


def _table(title: str, *columns: str) -> Table:
    """A table whose columns named with a leading ``#`` hold numbers."""
    table = Table(title=title, title_justify="left", title_style="bold", header_style="dim", box=SIMPLE, pad_edge=False)
    for column in columns:
        if column.startswith("#"):
            table.add_column(column[1:], justify="right", no_wrap=True)
        else:
            table.add_column(column)
    return table


def _share(part: int, whole: int) -> str:
    """A percentage that says 100 only when nothing is missing."""
    if not whole:
        return "-"
    percent = 100 * part / whole
    if part == whole:
        return "100 %"
    return "< 0.1 %" if 0 < percent < 0.05 else f"{min(percent, 99.9):.1f} %"


def _predictions(vm: VmReport) -> Table:
    table = _table("Predicted by the model", "lines", "#recorded", "#exact", "#share")

    def row(what: str, lines: Lines) -> None:
        if lines.total:
            color = "green" if lines.exact == lines.total else "red"
            table.add_row(
                what, f"{lines.total:,}", f"{lines.exact:,}", f"[{color}]{_share(lines.exact, lines.total)}[/]"
            )

    row("kvm_apic_ipi", vm.ipi)
    row("kvm_apic_accept_irq, caused by IPIs", vm.accepted)
    for cause, n in vm.other_accepts.most_common():
        table.add_row(f"kvm_apic_accept_irq, caused by: {escape(cause)}", f"{n:,}", "", "not IPIs")
    if vm.pic_interrupts:
        table.add_row("kvm_inj_virq, from the PICs", f"{vm.pic_interrupts:,}", "", "not the APIC's")
    row("kvm_hv_send_ipi", vm.hv_sends)
    row("kvm_hv_hypercall_done", vm.hv_results)
    row("kvm_hv_*, SynIC and writes of synthetic timers", vm.hv_lines)
    row("kvm_hv_stimer_*, timers that run", vm.hv_timers)
    row("kvm_eoi", vm.eoi)
    if vm.host_eois:
        table.add_row("  of them the recorded host's own EOI at injection", f"{vm.host_eois:,}", "", "")
    row("register reads", vm.reads)
    row("writes with #GP", vm.faults)
    return table


def _doors(vm: VmReport) -> Table:
    """By which door the guest reached its APIC, and what the generations' fast paths make of it."""
    what = ", which uses Hyper-V's interface" if vm.hyperv else ", a Windows by its RIPs" if vm.windows else ""
    table = _table(f"Doors of this guest{what}", "access", "door", "#accesses", "taken fast")
    for use in sorted(vm.door_uses, key=lambda use: _ORDER.index(use.doing)):
        table.add_row(use.doing.value, use.door.value, f"{use.count:,}", _fast(use))
    return table


def _fast(use: DoorUse) -> str:
    """By which generations, in words."""
    if not use.exits:
        return "needs no exit"
    taken = [kernel for kernel, n in use.fast.items() if n]
    if not taken:
        return "in no generation"
    if use.doing is not Doing.IPI:
        return f"by {', '.join(taken)}"
    return "see the generations below"


def _classes(vm: VmReport) -> Table:
    what = [_count(vm.icr_writes, "ICR write")] if vm.icr_writes else []
    what += [_count(vm.hypercalls, "IPI hypercall")] if vm.hypercalls else []
    table = _table(
        f"{' and '.join(what)} by class", "delivery", "destination", "shorthand", "cast", "#writes", "#share"
    )
    for kind, n in vm.classes.most_common():
        table.add_row(
            kind.delivery or "-",
            kind.destination or "-",
            kind.shorthand or "-",
            kind.cast,
            f"{n:,}",
            _share(n, vm.icr_writes + vm.hypercalls),
        )
    return table


def _vectors(vm: VmReport) -> Table:
    table = _table(
        "Vectors of Fixed and lowest-priority IPIs", "vector", "name in Linux", "shorthand", "#writes", "#share"
    )
    total = vm.vectors.total()
    for (vector, shorthand), n in vm.vectors.most_common(_VECTORS):
        table.add_row(f"0x{vector:02x}", vector_name(vector), shorthand, f"{n:,}", _share(n, total))
    rest = len(vm.vectors) - _VECTORS
    if rest > 0:
        n = total - sum(count for _, count in vm.vectors.most_common(_VECTORS))
        table.add_row(_count(rest, "other"), "", "", f"{n:,}", _share(n, total))
    return table


def _generations(vm: VmReport) -> Table:
    table = _table("Taken fast, by kernel generation", "kernel", "#fast", "#share", "why not the others")
    for generation in vm.generations:
        reasons = "; ".join(f"{n:,} {reason}" for reason, n in generation.refusals.items())
        table.add_row(
            generation.kernel, f"{generation.fast:,}", _share(generation.fast, generation.total), escape(reasons)
        )
    return table


def _mismatches(report: Report, console: Console) -> None:
    if not report.mismatched:
        console.print("\nno mismatch in what could be read" if report.problems else "\n[green]no mismatch[/]")
        return
    console.print()
    all_of_them = f"{report.mismatched:,} mismatch{'es' if report.mismatched > 1 else ''}"
    more = report.mismatched - len(report.mismatches)
    if not report.mismatches:
        console.print(f"[red]{all_of_them}[/], none shown (--mismatches N or all)")
        return
    table = _table(
        all_of_them + (f", the first {len(report.mismatches):,} of them" if more else ""),
        "#line",
        "#VM",
        "event",
        "recorded",
        "predicted",
    )
    for m in report.mismatches:
        table.add_row(*_row(m))
    console.print(table)
    if more:
        console.print(f"left out: {more:,} (--mismatches N or all)")


def _row(m: Mismatch) -> tuple[str, ...]:
    return f"{m.line:,}", str(m.vm), m.event, escape(m.recorded or "(no line)"), escape(m.predicted or "(no line)")
