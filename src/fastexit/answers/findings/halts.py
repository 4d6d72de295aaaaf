"""vCPUs that sleep although an interrupt has come."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastexit.answers.findings.words import duration
from fastexit.answers.follow import words as F
from fastexit.answers.report import Finding, VmReport

if TYPE_CHECKING:
    from fastexit.answers.analyse import Analysis

LONG = 1_000_000_000


def find(analysis: Analysis, report: VmReport) -> list[Finding]:
    """HLT exits at the end of the trace whose vCPU accepted an interrupt and was not entered again."""
    if analysis.span.ticks:
        return []
    found = []
    for place in sorted(analysis.follower.of_vm(report.number) - {0}):
        words = analysis.follower.state[place - 1]
        called = int(words[int(F.P_CALLED)])
        if not words[int(F.P_HALTED)] or called == int(F.NONE):
            continue
        waited = analysis.span.last - called
        if waited >= LONG:
            vcpu = analysis.follower.places.places[place - 1][1]
            found.append(
                Finding(
                    "halt-not-woken",
                    "problem",
                    f"vCPU {vcpu} halted and accepted an interrupt, and was not entered again in the {duration(waited)}"
                    " that are left of the trace",
                    [int(words[int(F.P_HALTED)]), int(words[int(F.P_CALLED_LINE)])],
                    "A lost wake-up, or the interrupt is masked by the TPR or RFLAGS.IF: look at the vCPU's registers,"
                    " and whether its thread still runs.",
                )
            )
    return found
