"""MSR accesses that end in #GP."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastexit.answers.findings.words import listed, times
from fastexit.answers.msrnames import msr_name
from fastexit.answers.report import Finding, VmReport

if TYPE_CHECKING:
    from fastexit.answers.analyse import Analysis

LOOP = 100
"""So many of one vCPU at one MSR are no probe."""
SHOWN = 5


def find(analysis: Analysis, report: VmReport) -> list[Finding]:
    """The MSRs whose accesses faulted most."""
    places = analysis.follower.of_vm(report.number)
    counts: dict[tuple[int, bool], dict[int, int]] = {}
    lines: dict[tuple[int, bool], int] = {}
    for fault, n in analysis.msrs.faults.items():
        if fault.place in places:
            key = fault.msr, fault.write
            counts.setdefault(key, {})[fault.place] = n
            line = analysis.msrs.first_fault[fault]
            lines[key] = min(line, lines.get(key, line))
    found = [_said(analysis, msr, write, by, lines[msr, write]) for (msr, write), by in counts.items()]
    order = sorted(found, key=lambda pair: -pair[0])
    return [finding for _, finding in order[:SHOWN]]


def _said(analysis: Analysis, msr: int, write: bool, by: dict[int, int], line: int) -> tuple[int, Finding]:
    """How often one vCPU's access faulted at most, and the words for all of them."""
    most = max(by.values())
    ids = analysis.follower.places.places
    vcpus = sorted(ids[place - 1][1] for place in by if place)
    who = f"vCPU {listed(map(str, vcpus[:8]))}" if vcpus else "a vCPU of unknown number"
    name = msr_name(msr)
    called = f"0x{msr:x} ({name})" if name else f"0x{msr:x}"
    verb = ("write" if write else "read") + ("s" if len(by) == 1 else "")
    loop = most >= LOOP
    advice = "A probe most likely; if the guest dies of it, see what in its CPUID promises the MSR."
    if loop:
        advice = (
            "A loop: the guest gets #GP and tries again. Let its CPUID not promise the MSR, or let user space answer it"
            " (KVM_CAP_X86_USER_SPACE_MSR); kvm's ignore_msrs=1 shows whether that is all."
        )
    text = f"{who} {verb} MSR {called} with #GP, {times(sum(by.values()))} in all"
    return most, Finding("msr-fault-loop" if loop else "msr-fault", "warning" if loop else "note", text, [line], advice)
