"""Long silences inside an exit: two excerpts in one file, or a machine that stood still."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastexit.answers.findings.words import duration
from fastexit.answers.follow import words as F
from fastexit.answers.report import Finding, VmReport

if TYPE_CHECKING:
    from fastexit.answers.analyse import Analysis


def find(analysis: Analysis, report: VmReport) -> list[Finding]:
    """Where a thread's exit was given up because its next line came too late."""
    if analysis.span.ticks:
        return []
    lines = [row[int(F.L_GAP)] for _, row in analysis.lanes(report.number) if row[int(F.L_GAP)]]
    if not lines:
        return []
    return [
        Finding(
            "gap",
            "note",
            f"an exit is followed by nothing for more than {duration(int(F.GAP))}: it is counted without a time",
            sorted(lines)[:5],
            "Two excerpts in one file are better given as two files; else the VM was stopped.",
        )
    ]
