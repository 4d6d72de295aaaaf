"""A trace through the model: every APIC access is fed to it, and what KVM printed is compared line by line.

Two passes over the whole file, in constant memory: the first finds threads, VMs and initial state, the second feeds. A
VM may appear at any line, so the first pass leaves nothing out.
"""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Callable, Sequence

from fastexit.checks import integer
from fastexit.profile import NEWEST
from fastexit.releases import generation, release
from fastexit.trace.accesses import Assembler, Lane
from fastexit.trace.events import Kind
from fastexit.trace.files import TraceError
from fastexit.trace.guest import Device, Guest, Recorded
from fastexit.trace.kernels import Dating
from fastexit.trace.reader import Batch, Task, TraceReader
from fastexit.trace.report import NOT_RECORDED, IcrClass, Mismatches, Report, VmReport
from fastexit.trace.threads import Survey

KEPT_LINES = 1 << 20
"""About so many lines from the beginning are kept between the passes; the rest of a longer file is parsed twice."""

_CALLS = {Kind.HV_CALL, Kind.HV_SEND}
_COMPARED = {"kvm_apic_ipi": Kind.IPI, "kvm_apic_accept_irq": Kind.ACCEPT}

Progress = Callable[[int, int], object]
"""What replay() calls now and then: ``progress(done, total)``, in bytes of work."""


def replay(
    path: str | os.PathLike[str],
    *,
    kernel: str | None = None,
    vendor: str = "vmx",
    apicv: bool = False,
    hv_timer: bool | None = None,
    mismatches: int | None = None,
    kernels: Sequence[str] | None = None,
    progress: Progress | None = None,
) -> Report:
    """Replays a trace through the model and compares.

    Args:
        path: the trace: text of ftrace, trace-cmd report, perf script, perf trace or a script of bpftrace, whole or an
            excerpt; plain or compressed; or trace.dat and perf.data, where trace-cmd or perf is installed. "-" is
            standard input.
        kernel: generation of the replayed machine, or a release. None: the newest that the trace's lines allow, see
            Report.evidence. The shares taken fast are reported for all generations.
        vendor: "vmx" or "svm".
        apicv: interrupts are posted.
        hv_timer: the host could use the VMX preemption timer, without which older generations do not take
            TSC_DEADLINE fast. None: as kvm_hv_timer_state lines say; where a VM has none, it could on VMX.
        mismatches: how many are kept in the report, the first by line. None: all.
        kernels: the generations or releases whose fast shares are reported, in that order. None: all generations.
        progress: called as ``progress(done, total)`` now and then.

    Raises TraceError, one line, when the trace cannot be replayed; ValueError for a wrong ``kernel`` or ``vendor``, for
    a preemption timer on SVM, and for a negative number of mismatches.
    """
    if hv_timer and vendor == "svm":
        raise ValueError("hv_timer=True: SVM has no preemption timer")
    if mismatches is not None:
        integer(mismatches, "number of mismatches")
    began = time.perf_counter()
    if kernel is not None:
        generation(kernel)
    for name in kernels or ():
        generation(name)
    dating = Dating()
    reader = TraceReader(path, dating)
    done = _Work(2 * reader.size, progress)
    survey = Survey(reader.path)
    kept: list[Batch] = []
    for batch in reader.batches(done.add):
        survey.learn(batch)
        dating.see_order(batch)
        if batch.first <= KEPT_LINES:
            kept.append(batch)
    if survey.empty:
        raise TraceError(_no_events(reader))
    report = _dated(reader.path, kernel, vendor, apicv, dating)
    kernel = report.kernel
    vms = survey.vms(lambda: reader.again(kept))
    sends = (_CALLS | {Kind.IPI}) & survey.kinds
    recorded = Recorded(
        Kind.IPI in survey.kinds,
        bool(sends) and Kind.ACCEPT in survey.kinds,
        "kvm_msr" in survey.events,
        frozenset(survey.events),
    )
    found = Mismatches(mismatches)
    guests: list[Guest] = []
    lanes: dict[Task, Lane] = {}
    for vm in vms:
        guest = Guest(
            vm,
            kernel=kernel,
            vendor=vendor,
            apicv=apicv,
            hv_timer=hv_timer,
            recorded=recorded,
            mismatches=found,
            kernels=kernels,
        )
        guests.append(guest)
        lanes |= {clues.task: guest.lanes[vcpu] for vcpu, clues in vm.vcpus.items() if clues}
        lanes |= {task: Lane(Device(guest), -1, guest.lanes) for task in vm.others}
    assembler = Assembler(lanes, eois=Kind.EOI in survey.kinds)
    if len(guests) == 1:
        guests[0].stimers.alone = True
        assembler.timers = Device(guests[0]).hyperv
    for batch in reader.again(kept, done.add):
        assembler.feed(batch)
    assembler.finish()
    report.events = survey.events
    report.lines, report.problems, report.notes = reader.lines, reader.problems, reader.notes
    report.left_out = assembler.strays
    report.notes += _notes(survey, assembler)
    if not report.kernels:
        report.notes.append(_disagree(report))
    report.mismatches, report.mismatched = found.first(), found.count
    report.vms = [_without_invented(guest.finish()) for guest in guests]
    report.seconds = time.perf_counter() - began
    done.at(2 * reader.size)
    return report


def _without_invented(vm: VmReport) -> VmReport:
    """A VM without accept lines: that nobody took its IPIs is not what they say."""
    if not vm.accepted.total and not vm.other_accepts:
        told: Counter[IcrClass] = Counter()
        for one, n in vm.classes.items():
            told[one._replace(targets=NOT_RECORDED) if not one.targets else one] += n
        vm.classes = told
    return vm


def _dated(path: str, kernel: str | None, vendor: str, apicv: bool, dating: Dating) -> Report:
    """A report of the kernel that was asked for, or that the trace tells."""
    kernels, evidence = dating.kernels(), dating.evidence
    if kernel is not None:
        return Report(path, kernel, vendor, apicv, "option", kernels, evidence)
    told = bool(evidence and kernels)
    return Report(
        path, kernels[-1] if told else NEWEST, vendor, apicv, "trace" if told else "assumed", kernels, evidence
    )


def _disagree(report: Report) -> str:
    """Lines that no kernel prints together."""
    last = max((e for e in report.evidence if e.since), key=lambda e: _age(e.since))
    first = min((e for e in report.evidence if e.before), key=lambda e: _age(e.before))
    return (
        f"no kernel has both: {last.says} (line {last.line:,}, since {last.since}) and {first.says} "
        f"(line {first.line:,}, before {first.before}): the trace is of several kernels, or of one with other patches"
    )


def _age(text: str) -> tuple[int, int]:
    found = release(text)
    return (0, 0) if found is None else found.series


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


def _notes(survey: Survey, assembler: Assembler) -> list[str]:
    """What the trace lacks, and what of it has no place."""
    notes = [
        f"no {name} line in the trace: nothing to compare with, deliveries are the model's"
        for name, kind in _COMPARED.items()
        if kind not in survey.kinds and not (kind == Kind.IPI and _CALLS & survey.kinds)
    ]
    notes += [f"a VM was left out: {why.removeprefix(f'{survey.path}: ')}" for why in survey.unresolved]
    if n := assembler.strays:
        notes.append(f"{n:,} interrupts came from threads of no VM in particular: left out")
    if n := assembler.stray_deadlines:
        notes.append(f"{n:,} TSC_DEADLINE writes came from threads whose VM and vCPU no line tells: left out")
    return notes


def _no_events(reader: TraceReader) -> str:
    """Why there is nothing to replay."""
    if not reader.lines and not reader.problems:
        return f"{reader.path}: the file is empty: record a trace and pass its text"
    if tables := reader.text.tables:
        return (
            f"{reader.path}:{tables[0].line}: a table of {tables[0].kind}, and no events: `fastexit report` reads it; "
            "a replay needs the text of a trace"
        )
    if not reader.events:
        nothing = f"{reader.path}: no ftrace text in {reader.lines:,} lines"
        what = reader.problems[0] if reader.problems else reader.text.first_prose or nothing
        return f"{what}: pass the text of a trace (tracefs, trace-cmd report, perf script)"
    return (
        f"{reader.path}: {reader.events:,} events, but none of kvm: record with trace-cmd record -e kvm, or switch "
        "events/kvm/enable on in tracefs"
    )
