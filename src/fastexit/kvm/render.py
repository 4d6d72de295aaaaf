"""How ``fastexit verify`` shows its report: a table of what was compared, and the script that shows a difference."""

from __future__ import annotations

from rich import box
from rich.console import Console
from rich.table import Table

from fastexit.kvm.comparison import Count, Report, of_kind
from fastexit.kvm.spoken import WORDS


def render(report: Report, out: Console) -> None:
    """The report on a terminal; the script of a difference is not part of it."""
    host = report.host
    module = f", {host.module}" if host.module else ""
    who = report.judge.name
    if report.judge.face is None:
        who += f" (Linux {host.release}{module})"
    table = Table(
        title=f"The model ({host.kernel}) against {who}, seed {report.seed}",
        box=box.SIMPLE_HEAVY,
    )
    table.add_column("kind")
    for column in ("operations", "machines", "pages compared", *["trace lines"] * report.traced, "operations/s"):
        table.add_column(column, justify="right")
    table.add_column("by")
    for kind, count in report.kinds.items():
        if not count.machines:
            continue
        row = [kind, f"{count.operations:,}", f"{count.machines:,}", f"{count.pages:,}"]
        row += [f"{count.trace_lines:,}"] * report.traced
        rate = f"{count.operations / count.seconds:,.0f}" if count.seconds else ""
        table.add_row(*row, rate, of_kind(report.judge, kind)[0].about)
    out.print(table)
    for count in report.kinds.values():
        _names(count, out)
    for kind, names in report.left_out.items():
        out.print(f"{kind}: not compared, {report.judge.name} has no {', '.join(names)}", highlight=False)
    if report.late:
        out.print(f"{len(report.late)} machines given up: what differed did not show again, so the host was late:")
        for text in report.late:
            out.print(f"  {text}", markup=False, highlight=False, soft_wrap=True)
    if report.divergence is not None:
        found = report.divergence
        text = (
            f"different after {report.operations:,} operations: {found.text} ({len(found.history)} operations show it)"
        )
        out.print(text, style="bold red", markup=False, highlight=False, soft_wrap=True)
    elif report.too_late:
        out.print("so many that a late host is no explanation", style="bold red", highlight=False)
    elif report.agreed:
        text = f"no difference in {report.operations:,} operations, {report.seconds:.0f} s"
        out.print(text, style="green", highlight=False)
    else:
        out.print("nothing was compared", style="bold red", highlight=False)


def _names(count: Count, out: Console) -> None:
    """What was compared by operation, and what was not for nobody knows it."""
    if not count.names and not count.left_out:
        return
    table = Table(box=box.SIMPLE_HEAVY)
    for column in ("operation", "compared", "not known, left out"):
        table.add_column(column, justify="left" if column == "operation" else "right")
    for name in sorted({*count.names, *count.left_out}):
        table.add_row(WORDS.get(name, name), f"{count.names[name]:,}", f"{count.left_out[name]:,}")
    out.print(table)
