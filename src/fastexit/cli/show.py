"""How the command line shows walks, comparisons and facts about the installation: rich tables, and nothing else."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Sequence

from rich import box
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from fastexit.insight.compare import Comparison
from fastexit.insight.walk import MODELLED, STEPS, Visit, Walk
from fastexit.outcome import Refusal
from fastexit.profile import PROFILES


def profile_table() -> Table:
    """The kernel generations: tree, what is fast, where."""
    from fastexit.traits import Trait

    table = Table(title="Kernel generations", box=box.SIMPLE_HEAVY)
    for column in ("kernel", "tree", "handler runs in", "then", "fast WRMSRs"):
        table.add_column(column)
    for p in PROFILES.values():
        where = "handle_exit_irqoff" if p.traits & Trait.HOOK_IRQOFF else "vendor run"
        then = "guest again" if p.traits & Trait.ICR_REENTERS else "rest of exit"
        table.add_row(p.name, p.tree, where, then, p.summary)
    return table


_OPTIONAL = ("reenter", "return_to_user", "service_requests", "inject_events")
"""Steps that an exit with nothing pending does not have on any path."""
_ROOM_FOR_PAYLOAD = 70


def _event(line: str, width: int) -> str:
    name, _, payload = line.partition(": ")
    if name in ("kvm_exit", "kvm_entry") or width < _ROOM_FOR_PAYLOAD:
        return name
    return f"{name}: {payload}"


def _cell(walk: Walk, step: int, width: int) -> RenderableType:
    visits: list[Visit] = [visit for visit in walk.visits if visit.step == step]
    if not visits:
        skipped = walk.outcome.path and STEPS[step].method and STEPS[step].method not in _OPTIONAL
        return Text("skipped" if skipped else "-", style="dim")
    cell = Text("done", style="green")
    if walk.costs is not None:
        cell.append(f" {sum(visit.cycles or 0 for visit in visits):,} cycles", style="bold")
    for visit in visits:
        for line in visit.lines:
            style = "bold yellow" if "accept_irq" in line or "kvm_apic_ipi" in line else "cyan"
            cell.append("\n" + _event(line, width), style=style)
    if step == walk.ipi_step:
        cell.append("\n<= the IPI has left", style="bold magenta")
    return cell


def walk_table(walks: Sequence[Walk], headline: str, width: int = 50) -> RenderableType:
    """Walks side by side, one row a step in the order of vcpu_enter_guest."""
    table = Table(title=headline, box=box.SIMPLE, show_lines=False, pad_edge=False)
    table.add_column("step", justify="right")
    table.add_column("vcpu_enter_guest", max_width=36)
    for walk in walks:
        table.add_column(walk.title, max_width=width)
    for index, step in enumerate(STEPS):
        if step.method:
            table.add_row(step.number, step.text, *(_cell(walk, index, width) for walk in walks))
    if any(walk.cycles_elsewhere for walk in walks):
        rest = (f"{walk.cycles_elsewhere:,} cycles" if walk.cycles_elsewhere else "" for walk in walks)
        table.add_row("", "step 18, and vcpu_run between two rounds", *rest)
    return Group(table, *(Text(walk_summary(walk)) for walk in walks))


def walk_summary(walk: Walk) -> str:
    """One sentence: path, when the IPI left, what was skipped."""
    out = walk.outcome
    parts = [f"{walk.title}: {out.path.name.lower()} path, {out.completion.name}"]
    if out.refusal and walk.fastpath:
        parts.append(f"fast path declined: {Refusal(out.refusal).text}")
    if out.fault:
        parts.append("#GP(0), RIP stays")
    if walk.ipi_step is None:
        parts.append("no IPI left")
    else:
        before = walk.steps_before_ipi or 0
        parts.append(f"IPI left in step {STEPS[walk.ipi_step].number}, behind {before} other steps")
    parts.append(f"{len(walk.steps_done)} of {MODELLED} modelled steps run")
    if walk.costs is not None:
        if out.cycles_ipi is not None:
            parts.append(f"IPI left after {out.cycles_ipi:,} cycles")
        again = "guest does not run again" if out.cycles is None else f"guest runs again after {out.cycles:,} cycles"
        parts.append(f"{again} ({walk.costs})")
    return "; ".join(parts)


COMPARED = (
    "At the Python door a fast exit that re-enters the guest is one compiled call, by design; the generic side is the "
    "whole run loop in Python and a fast handler call that declines. At the batch door both sides are compiled. "
    "Figures are medians over all rounds, of each side and of the rounds' own ratios."
)
"""What the sides of a comparison are made of: a ratio without it would say too much."""


def comparison_table(rows: Iterable[Comparison]) -> RenderableType:
    """Fast against generic, medians, and what the two sides are."""
    table = Table(title="Fast against generic path: median ns of the model, not of silicon", box=box.SIMPLE_HEAVY)
    for column in ("kernel", "door", "fast", "generic", "generic / fast"):
        table.add_column(column, justify="left" if column in ("kernel", "door") else "right")
    for row in rows:
        table.add_row(row.kernel, row.door, f"{row.fast_ns:,.0f}", f"{row.generic_ns:,.0f}", f"{row.ratio:.2f}x")
    return Group(table, Text(COMPARED))


def facts_table(facts: dict[str, object]) -> Table:
    """Name and value."""
    table = Table(box=None, show_header=False)
    for name, value in facts.items():
        table.add_row(f"[bold]{name}", str(value))
    return table


class _Console(Console):
    """A console that leaves a closed pipe to its caller, where rich would end the process with exit code 1."""

    def on_broken_pipe(self) -> None:
        raise  # rich calls this while it handles the BrokenPipeError


def console(to_stderr: bool = False) -> Console:
    """A console that keeps tables readable in a pipe, and with a COLUMNS that no terminal has."""
    out = _Console(stderr=to_stderr, highlight=False)
    columns = os.environ.get("COLUMNS", "")
    if columns.isdecimal() and int(columns) > 0:
        return out
    if not out.is_terminal:
        return _Console(stderr=to_stderr, highlight=False, width=140)
    if columns:  # rich would take a 0 at its word; shutil asks the terminal
        return _Console(stderr=to_stderr, highlight=False, width=shutil.get_terminal_size().columns)
    return out
