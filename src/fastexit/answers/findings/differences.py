"""MSRs that differ between vCPUs, and MSRs that a vCPU reads back as something else."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastexit.answers.findings.words import listed
from fastexit.answers.msrnames import msr_name
from fastexit.answers.msrs import ALIKE
from fastexit.answers.report import Finding, VmReport

if TYPE_CHECKING:
    from fastexit.answers.analyse import Analysis

SHOWN = 5


def find(analysis: Analysis, report: VmReport) -> list[Finding]:
    """What differs at the end of the trace, and what was lost on the way."""
    return [*_different(analysis, report), *_lost(analysis, report)]


def _different(analysis: Analysis, report: VmReport) -> list[Finding]:
    places = analysis.follower.of_vm(report.number) - {0}
    ids = analysis.follower.places.places
    found = []
    for msr in sorted(ALIKE):
        held = {place: analysis.msrs.held[place, msr] for place in sorted(places) if (place, msr) in analysis.msrs.held}
        by_value: dict[int, list[int]] = {}
        for place, one in held.items():
            by_value.setdefault(one.value, []).append(place)
        if len(by_value) < 2:
            continue
        said = []
        for value, at in sorted(by_value.items(), key=lambda pair: -len(pair[1])):
            said.append(f"0x{value:x} on vCPU {listed(str(ids[place - 1][1]) for place in at[:8])}")
        found.append(
            Finding(
                "msr-differs",
                "warning",
                f"MSR 0x{msr:x} ({msr_name(msr)}) differs between vCPUs: {'; '.join(said[:4])}",
                [held[at[0]].line for at in by_value.values()][:4],
                "A guest has this MSR alike on all CPUs: one was set up another way, by a hot-plug, a resume or user"
                " space. Windows compares some of them and stops.",
            )
        )
    return found[:SHOWN]


def _lost(analysis: Analysis, report: VmReport) -> list[Finding]:
    places = analysis.follower.of_vm(report.number)
    ids = analysis.follower.places.places
    found = []
    for one in analysis.msrs.lost:
        if one.place in places:
            found.append(
                Finding(
                    "msr-lost",
                    "warning",
                    f"vCPU {ids[one.place - 1][1]} wrote 0x{one.wrote:x} to MSR 0x{one.msr:x} ({msr_name(one.msr)}) and"
                    f" reads 0x{one.read:x}",
                    [one.write_line, one.read_line],
                    "Nobody but the guest changes it, so it was reset or restored between the two lines: user space has"
                    " to keep it over that, or the guest to set it anew.",
                )
            )
    return found[:SHOWN]
