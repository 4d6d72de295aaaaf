"""Events that the recorder lost."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastexit.answers.report import Finding, VmReport

if TYPE_CHECKING:
    from fastexit.answers.analyse import Analysis


def find(analysis: Analysis, _report: VmReport) -> list[Finding]:
    """Say that lines are missing, as counts and pairs suffer from it."""
    recording = analysis.recording
    if not recording.lost:
        return []
    return [
        Finding(
            "lost-events",
            "warning",
            f"the recorder lost {recording.lost:,} events: counts are too low, and times from a line to a later one may"
            " skip some",
            recording.lost_lines[:5],
            "Give it more memory (trace-cmd record -b 20000, perf record -m 4096) or fewer events.",
        )
    ]
