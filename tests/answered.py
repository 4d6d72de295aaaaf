"""Small traces and what is made of them, for tests of answers."""

from __future__ import annotations

import lzma
from pathlib import Path

import plain_records
from fastexit.answers.analyse import Analysis
from fastexit.answers.places import Where
from fastexit.answers.report import VmReport
from fastexit.records.columns import Recording

DATA = Path(__file__).parent / "data"


def recorded(text: str, size: int = 0) -> Recording:
    """A trace in lines "THREAD MICROSECONDS EVENT": a thread is a vCPU's number or a name; ``size`` rows a block."""
    lines = []
    for line in filter(str.strip, text.splitlines()):
        who, time, event = line.split(maxsplit=2)
        name, pid = (f"CPU {who}/KVM", 100 + int(who)) if who.isdecimal() else (who, 900 + len(who))
        lines.append(f"{name}-{pid} [000] ..... {int(time) // 10**6}.{int(time) % 10**6:06d}: {event}\n")
    return split(plain_records.read_text("".join(lines).encode()), size)


def split(recording: Recording, size: int) -> Recording:
    """The same rows in blocks of a size, or as they were."""
    if size:
        rows = [row for block in recording.blocks for row in [block[i : i + size] for i in range(0, len(block), size)]]
        recording.blocks = rows
    return recording


def answered(text: str, size: int = 0, where: Where | None = None) -> VmReport:
    """The report of the only VM."""
    analysis = Analysis(recorded(text, size), where)
    [vm] = analysis.vms
    return analysis.report(vm)


def told(text: str) -> list[tuple[str, str]]:
    """Severity and kind of each finding."""
    return [(finding.severity, finding.kind) for finding in answered(text).findings]


def guest(name: str) -> Recording:
    """A recorded guest of tests/data."""
    with lzma.open(DATA / name) as file:
        return plain_records.read_lines(file, name)
