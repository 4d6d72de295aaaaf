"""A trace through the model: every APIC access is fed to it, and what KVM printed is compared line by line.

Two passes over the file, in constant memory: the first finds threads, VMs and initial state, the second feeds.
"""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Callable, Iterator

from fastexit.checks import integer
from fastexit.trace.accesses import Assembler, Lane
from fastexit.trace.events import Event, Kind
from fastexit.trace.files import TraceError
from fastexit.trace.guest import Device, Guest, Recorded
from fastexit.trace.reader import Batch, Task, TraceReader
from fastexit.trace.report import Mismatches, Report
from fastexit.trace.threads import Survey

KEPT_LINES = 1 << 19
"""Files up to this many lines are parsed once and kept between the passes; longer ones are read twice."""

_COMPARED = {"kvm_apic_ipi": Kind.IPI, "kvm_apic_accept_irq": Kind.ACCEPT}

Progress = Callable[[int, int], object]
"""What replay() calls now and then: ``progress(done, total)``, in bytes of work."""


def replay(
    path: str | os.PathLike[str],
    *,
    kernel: str = "6.18",
    vendor: str = "vmx",
    apicv: bool = False,
    mismatches: int | None = None,
    progress: Progress | None = None,
) -> Report:
    """Replays an ftrace, trace-cmd or perf text through the model and compares.

    Args:
        path: the trace, plain or compressed with gzip or xz.
        kernel: generation of the replayed machine; ``fastexit.profiles()`` lists them. The shares taken fast are
            reported for all of them.
        vendor: "vmx" or "svm".
        apicv: interrupts are posted.
        mismatches: how many are kept in the report, the first by line. None: all.
        progress: called as ``progress(done, total)`` now and then.

    Raises TraceError, one line, when the trace cannot be replayed; ValueError for a wrong ``kernel`` or ``vendor``, or
    a negative number of mismatches.
    """
    if mismatches is not None:
        integer(mismatches, "number of mismatches")
    began = time.perf_counter()
    reader = TraceReader(path)
    report = Report(reader.path, kernel, vendor, apicv)
    done = _Work(2 * reader.size, progress)
    survey = Survey(reader.path)
    kept: list[Batch] | None = []
    for batch in reader.batches(done.add, skim=lambda: reader.lines > KEPT_LINES and survey.settled):
        survey.learn(batch)
        if reader.lines > KEPT_LINES:
            kept = None
        elif kept is not None:
            kept.append(batch)
    if survey.empty:
        raise TraceError(_no_events(reader))

    def again() -> Iterator[Batch]:
        return iter(kept) if kept is not None else reader.batches()

    vms = survey.vms(again)
    recorded = Recorded(Kind.IPI in survey.kinds, survey.kinds >= {Kind.IPI, Kind.ACCEPT})
    found = Mismatches(mismatches)
    guests: list[Guest] = []
    lanes: dict[Task, Lane] = {}
    for vm in vms:
        guest = Guest(vm, kernel=kernel, vendor=vendor, apicv=apicv, recorded=recorded, mismatches=found)
        guests.append(guest)
        lanes |= {clues.task: guest.lanes[vcpu] for vcpu, clues in vm.vcpus.items() if clues}
        lanes |= {task: Lane(Device(guest), -1, guest.lanes) for task in vm.others}
    assembler = Assembler(lanes, eois=Kind.EOI in survey.kinds)
    counts: Counter[Event] = Counter()
    for batch in again() if kept is not None else reader.batches(done.add):
        counts.update(batch.events)
        assembler.feed(batch)
        if len(counts) > KEPT_LINES:
            _by_name(report, counts)
        if kept is not None:
            done.at(reader.size + reader.size * (batch.first + len(batch.events) - 1) // reader.lines)
    assembler.finish()
    _by_name(report, counts)
    report.lines, report.problems, report.notes = reader.lines, reader.problems, reader.notes
    for name, kind in _COMPARED.items():
        if kind not in survey.kinds:
            report.notes.append(f"no {name} line in the trace: nothing to compare with, deliveries are the model's")
    if assembler.strays:
        report.notes.append(f"{assembler.strays:,} interrupts came from threads of no VM in particular: left out")
    report.mismatches, report.mismatched = found.first(), found.count
    report.vms = [guest.finish() for guest in guests]
    report.seconds = time.perf_counter() - began
    done.at(2 * reader.size)
    return report


class _Work:
    """Bytes of work done, told to whoever wants to know."""

    def __init__(self, total: int, progress: Progress | None) -> None:
        self._total = total
        self._done = 0
        self._progress = progress

    def add(self, n: int) -> None:
        self.at(self._done + n)

    def at(self, done: int) -> None:
        self._done = done
        if self._progress:
            self._progress(done, self._total)


def _by_name(report: Report, counts: Counter[Event]) -> None:
    """Events by name: different events share a name, and lines that are none have an empty one."""
    for event, n in counts.items():
        if event.name:
            report.events[event.name] += n
    counts.clear()


def _no_events(reader: TraceReader) -> str:
    """Why there is nothing to replay."""
    if not reader.lines and not reader.problems:
        return f"{reader.path}: the file is empty: record a trace and pass its text"
    if not reader.events:
        what = reader.problems[0] if reader.problems else f"{reader.path}: no ftrace text in {reader.lines:,} lines"
        return f"{what}: pass the text of a trace (tracefs, trace-cmd report, perf script)"
    return (
        f"{reader.path}: {reader.events:,} events, but none of kvm: record with trace-cmd record -e kvm, or switch "
        "events/kvm/enable on in tracefs"
    )
