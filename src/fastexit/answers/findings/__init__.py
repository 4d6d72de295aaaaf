"""What is worth saying of a VM in words: one noun a file, each a function from everything known to findings."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastexit.answers.findings import differences, faults, gaps, halts, inhibits, losses, slowness, spins, storms, stuck
from fastexit.answers.findings import windows as windows_ipis
from fastexit.answers.report import Finding, VmReport

if TYPE_CHECKING:
    from fastexit.answers.analyse import Analysis

_ALL = (
    *(stuck.find, storms.find, spins.find, halts.find, inhibits.find, windows_ipis.find, faults.find),
    *(differences.find, slowness.find, losses.find, gaps.find),
)
_ORDER = {"problem": 0, "warning": 1, "note": 2}


def find(analysis: Analysis, report: VmReport) -> list[Finding]:
    """All findings of a VM, worst first."""
    found = [finding for each in _ALL for finding in each(analysis, report)]
    return sorted(found, key=lambda finding: _ORDER[finding.severity])
