"""How ``fastexit verify`` shows its report: a table of what was compared, and the script that shows a difference."""

from __future__ import annotations

from rich import box
from rich.console import Console
from rich.table import Table

from fastexit.kvm.verify import KINDS, Report


def render(report: Report, out: Console) -> None:
    """The report on a terminal; the script of a difference is not part of it."""
    host = report.host
    module = f", {host.module}" if host.module else ""
    table = Table(
        title=f"The model ({host.kernel}) against /dev/kvm (Linux {host.release}{module}), seed {report.seed}",
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
        table.add_row(*row, rate, KINDS[kind].about)
    out.print(table)
    late = sum(len(count.late) for count in report.kinds.values())
    if late:
        out.print(f"{late} machines given up: the host's clock was late, and nothing showed again", highlight=False)
    if report.divergence is None:
        text = f"no difference in {report.operations:,} operations, {report.seconds:.0f} s"
        out.print(text, style="green", highlight=False)
    else:
        found = report.divergence
        text = (
            f"different after {report.operations:,} operations: {found.text} ({len(found.history)} operations show it)"
        )
        out.print(text, style="bold red", markup=False, highlight=False, soft_wrap=True)
