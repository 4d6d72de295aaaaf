"""Exceptions that a vCPU is given at one address again and again."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastexit.answers.findings.spins import EXCERPT, LEAST, MANY, RUN
from fastexit.answers.findings.words import times
from fastexit.answers.follow import words as F
from fastexit.answers.report import Finding, VmReport

if TYPE_CHECKING:
    from fastexit.answers.analyse import Analysis


def find(analysis: Analysis, report: VmReport) -> list[Finding]:
    """kvm_inj_exception lines in a row at one address, as many as of a spin."""
    names = analysis.recording.names
    found = []
    for lane, row in analysis.lanes(report.number):
        run, name = row[int(F.L_FAULTS)], row[int(F.L_FAULTS_NAME)] - 1
        if run < LEAST:
            continue
        seen = analysis.exits.seen(row[int(F.L_PLACE)])
        if run < RUN and (seen > EXCERPT or 2 * run < seen):
            continue
        called = names[name] if 0 <= name < len(names) else "an exception"
        found.append(
            Finding(
                "exception-loop",
                "warning" if run >= MANY else "note",
                f"{analysis.vcpu_of_lane(lane)} is given {called} {times(run)} in a row at"
                f" 0x{row[int(F.L_FAULTS_RIP)]:x}",
                [row[int(F.L_FAULTS_LINE)]],
                "Its handler returns to the instruction that faults, or faults itself: see what lies there, and whether"
                " an MSR or an instruction that the guest's CPUID promises is refused.",
            )
        )
    return found
