"""Exits that took long."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastexit.answers.exits import SLOW_NS, Slow
from fastexit.answers.findings.words import duration, listed, times
from fastexit.answers.report import Finding, VmReport

if TYPE_CHECKING:
    from fastexit.answers.analyse import Analysis

SHOWN = 5
VERY = 100_000_000


def find(analysis: Analysis, report: VmReport) -> list[Finding]:
    """The slowest exits of a VM, HLT and the like left out."""
    places = analysis.follower.of_vm(report.number)
    slow = [one for one in analysis.exits.slow if one.place in places]
    if not slow:
        return []
    n = sum(count for place, count in analysis.exits.slow_count.items() if place in places)
    moved = [one for one in slow[:SHOWN] if 0 <= one.cpu != one.entry_cpu >= 0]
    advice = "A vCPU thread that loses its CPU looks like a slow exit: record sched:sched_switch too, and see who ran."
    if moved:
        advice = f"The thread moved to another CPU {times(len(moved))} among these: it waited for a CPU. " + advice
    return [
        Finding(
            "slow-exit",
            "warning" if slow[0].ns >= VERY else "note",
            f"{'an exit' if n == 1 else f'{n:,} exits'} took more than {duration(SLOW_NS)}:"
            f" {listed(_said(analysis, one) for one in slow[:SHOWN])}",
            [one.line for one in slow[:SHOWN]],
            advice,
        )
    ]


def _said(analysis: Analysis, one: Slow) -> str:
    who = f" of vCPU {analysis.follower.places.places[one.place - 1][1]}" if one.place else ""
    moved = f" (from CPU {one.cpu} to {one.entry_cpu})" if 0 <= one.cpu != one.entry_cpu >= 0 else ""
    return f"{one.reason}{who} {duration(one.ns)}{moved}"
