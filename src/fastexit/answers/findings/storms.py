"""Interrupts that come too often: injected for ever, back at once after their EOI, or simply very many."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastexit.answers.findings.words import times, vector
from fastexit.answers.follow import words as F
from fastexit.answers.report import Finding, VmReport

if TYPE_CHECKING:
    from fastexit.answers.analyse import Analysis

AGAIN = 2
"""Reinjections of a vector in a row that are told where the same page faults before each."""
MANY = 8
"""... and where other exits are the cause: two or three pages may have to be fetched first."""
FOREVER = 100
BACK = 32
"""Level interrupts that came back within 50 us of their EOI, and are at least half of all of their vector."""
RATE = 50_000
"""Interrupts of one vector in a second that no device sends by itself."""


def find(analysis: Analysis, report: VmReport) -> list[Finding]:
    """Storms of a VM."""
    return [*_reinjected(analysis, report), *_levels(analysis, report), *_rates(analysis, report)]


def _reinjected(analysis: Analysis, report: VmReport) -> list[Finding]:
    """Interrupts whose delivery exits again and again."""
    found = []
    for lane, row in analysis.lanes(report.number):
        most, page = row[int(F.L_AGAIN_MOST)], row[int(F.L_AGAIN_PAGE)]
        if most < (AGAIN if page else MANY):
            continue
        lines = [row[int(F.L_AGAIN_FIRST)]]
        why = ""
        if page:
            why = f", each time after a page fault at guest-physical 0x{page:x}"
            lines.append(row[int(F.L_AGAIN_PAGE_LINE)])
        found.append(
            Finding(
                "reinjected",
                "problem" if most >= FOREVER else "warning" if page else "note",
                f"{analysis.vcpu_of_lane(lane)} is injected vector {vector(row[int(F.L_AGAIN_VECTOR)])} again"
                f" {times(most)} in a row{why}: its delivery itself exits and does not complete",
                sorted(lines),
                "KVM handles the exit and injects anew, and the guest makes no step. A page fault that comes back at"
                " the same address is one that KVM believes it has mended: compare kernels, try without ballooning, KSM"
                " and NUMA balancing, and record kvmmmu:* too.",
            )
        )
    return found


def _levels(analysis: Analysis, report: VmReport) -> list[Finding]:
    """Level lines that are still up after the EOI."""
    if analysis.span.ticks:
        return []
    follower = analysis.follower
    found = []
    for place, number in sorted(analysis.vectors.levels):
        if not place or place not in follower.of_vm(report.number):
            continue
        back, line, accepted = (
            int(words[number]) for words in follower.words(place - 1, (F.V_BACK, F.V_BACK_LINE, F.V_ACCEPTED))
        )
        if back >= BACK and 2 * back >= accepted:
            vcpu = follower.places.places[place - 1][1]
            found.append(
                Finding(
                    "level-storm",
                    "warning",
                    f"level interrupt {vector(number)} of vCPU {vcpu} came back within 50 us of its EOI"
                    f" {times(back)} of {accepted:,}",
                    [line],
                    "The line is still up when the guest ends the interrupt: the handler does not quiet its device, or"
                    " the line is shared with one that has no driver.",
                )
            )
    return found


def _rates(analysis: Analysis, report: VmReport) -> list[Finding]:
    """The most interrupts in one second that were no IPIs."""
    places = analysis.follower.of_vm(report.number)
    found = []
    for (place, number), rate in analysis.vectors.busiest.items():
        if place in places and place and rate.accepted >= RATE:
            vcpu = analysis.follower.places.places[place - 1][1]
            found.append(
                Finding(
                    "interrupt-storm",
                    "warning",
                    f"vCPU {vcpu} accepted vector {vector(number)} {rate.accepted:,} times in one second",
                    [rate.line],
                    "No IPI: a timer or a device sends that often. See the vector table for its source.",
                )
            )
    return found
