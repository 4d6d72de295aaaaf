"""Vectors that are accepted again and again, and never ended by an EOI."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from fastexit.answers.findings.words import duration, listed, times, vector
from fastexit.answers.follow import words as F
from fastexit.answers.report import Finding, VmReport

if TYPE_CHECKING:
    from fastexit.answers.analyse import Analysis

FEW = 2
"""So many accept lines are worth a note where nothing of what the vCPUs do was recorded."""
MANY = 8
"""So many are a problem where EOIs were recorded, the vCPU ran, and the last one is LONG after the first."""
LONG = 100_000_000
SHOWN = 4


class Series(NamedTuple):
    """Accept lines of a vector at a vCPU since its last EOI."""

    accepted: int
    ns: int
    vcpu: int
    vector: int
    line: int
    entries: int


def find(analysis: Analysis, report: VmReport) -> list[Finding]:
    """The vectors that wait for an EOI at the end of the trace."""
    places = analysis.follower.of_vm(report.number) - {0}
    if any(analysis.follower.state[place - 1, int(F.P_APICV)] for place in places):
        return []  # the CPU ends what KVM does not have to know of
    recorded = analysis.vectors.eois(report.number) > 0
    series = _open(analysis, report.number, MANY if recorded else FEW)
    if recorded:
        return [_stuck(one) for one in series if one.ns >= LONG and one.entries >= MANY][:SHOWN]
    if not report.number and len(analysis.vms) > 1:
        return []  # host threads served several VMs, and each of those has its EOIs by itself
    blind = not (report.exits or report.msrs or report.doors) and not any(row.rips for row in report.vcpus)
    return [_untold(series)] if series and blind else []


def _open(analysis: Analysis, vm: int, least: int) -> list[Series]:
    """Series that no EOI ended, longest first."""
    follower = analysis.follower
    entered = any(row.time is not None for row in analysis.exits.rows(vm, None))
    found = []
    for place in follower.of_vm(vm) - {0}:
        which = F.V_SINCE, F.V_MOST, F.V_LINE, F.V_MOST_NS, F.V_MOST_ENTRIES, F.V_TAKEN
        since, most, line, ns, entries, taken = follower.words(place - 1, which)
        automatic = analysis.msrs.auto_eoi(place)
        for v in np.flatnonzero((since >= least) & (since == most) & (taken <= 1)).tolist():
            if v in automatic:
                continue
            told = int(ns[v]) if int(ns[v]) < int(F.NONE) else 0
            ran = int(entries[v]) if entered else MANY
            found.append(Series(int(since[v]), told, follower.places.places[place - 1][1], v, int(line[v]), ran))
    return sorted(found, reverse=True)


def _stuck(one: Series) -> Finding:
    reserved = " Vectors below 16 are reserved, and none of them is ever delivered." if one.vector < 16 else ""
    return Finding(
        "stuck-vector",
        "problem",
        f"vCPU {one.vcpu} accepted vector {vector(one.vector)} {times(one.accepted)} in {duration(one.ns)} and ended"
        " none of them: no EOI of it since",
        [one.line],
        "The vector stays in service, and with it everything of the same or a lower priority waits. Look at what its"
        " handler in the guest does; a handler that never runs has its vector masked by a higher TPR." + reserved,
    )


def _untold(series: list[Series]) -> Finding:
    said = [f"{vector(one.vector)} on APIC {one.vcpu} {times(one.accepted)}" for one in series[:SHOWN]]
    more = f" and {len(series) - SHOWN} more" if len(series) > SHOWN else ""
    return Finding(
        "accepted-without-eoi",
        "note",
        f"accepted again without an EOI between: vector {listed(said)}{more}; there is no EOI line in the trace",
        [one.line for one in series[:SHOWN]],
        "Either kvm_eoi was not recorded, or APICv ends interrupts without an exit, or the guest is stuck in that"
        " interrupt: record kvm:kvm_eoi and kvm:kvm_exit too, and see whether the vCPU runs at all.",
    )
