"""What is worth saying of a VM in words: one noun a file, each a function from everything known to findings."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from fastexit.answers.findings import (
    differences,
    exceptions,
    faults,
    gaps,
    halts,
    inhibits,
    losses,
    slowness,
    spins,
    storms,
    stuck,
)
from fastexit.answers.findings import windows as windows_ipis
from fastexit.answers.report import Finding, VmReport

if TYPE_CHECKING:
    from fastexit.answers.analyse import Analysis

_ALL = (
    *(stuck.find, storms.find, spins.find, exceptions.find, halts.find, inhibits.find, windows_ipis.find, faults.find),
    *(differences.find, slowness.find, losses.find, gaps.find),
)
KINDS = {
    "stuck-vector": "a vector is accepted again and again, and no EOI ends it",
    "accepted-without-eoi": "the same in a trace that shows nothing of the vCPUs",
    "reinjected": "the delivery of an interrupt exits again and again",
    "level-storm": "a level interrupt comes back at once after its EOI",
    "interrupt-storm": "very many interrupts of one vector in a second, and no IPIs",
    "spin": "a vCPU is at one address at exit after exit",
    "exception-loop": "a vCPU is given the same exception at one address again and again",
    "halt-not-woken": "a vCPU sleeps although it accepted an interrupt",
    "apicv-inhibited": "APICv or AVIC is switched off, and by what",
    "windows-ipis-never-fast": "IPIs by doors that no kernel's fast path looks at",
    "fast-elsewhere": "exits that another kernel would take fast",
    "msr-fault": "accesses to an MSR end in #GP",
    "msr-fault-loop": "the same, so often that it is no probe",
    "msr-differs": "an MSR that should be alike differs between vCPUs",
    "msr-lost": "a vCPU reads from an MSR something else than it wrote",
    "slow-exit": "exits that took more than 5 ms, HLT and the like left out",
    "lost-events": "the recorder lost events",
    "gap": "nothing follows an exit for a minute: two excerpts, or a VM that stood still",
}
"""Every kind of finding, which scripts may rely on, and what it is."""
_ORDER = {"problem": 0, "warning": 1, "note": 2}


def find(analysis: Analysis, report: VmReport) -> list[Finding]:
    """All findings of a VM, worst first."""
    return in_order(finding for each in _ALL for finding in each(analysis, report))


def in_order(found: Iterable[Finding]) -> list[Finding]:
    """Findings, worst first."""
    return sorted(found, key=lambda finding: _ORDER[finding.severity])
