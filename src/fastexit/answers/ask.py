"""Questions to traces: one file, or many, from text to a report."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field

import numpy as np

from fastexit.answers.analyse import Analysis
from fastexit.answers.identity import identify
from fastexit.answers.ipis import Icr
from fastexit.answers.report import Clue, FileReport, Report, VmReport
from fastexit.costs.profile import CostProfile, Costs, cost_profile
from fastexit.records.columns import Event, Recording
from fastexit.records.read import read
from fastexit.releases import generation
from fastexit.trace.files import TraceError

_NAMED = (Event.OTHER, Event.OTHER_KVM, Event.HV, Event.HV_SEND_IPI, Event.AVIC)
"""Events whose rows say the tracepoint's name by themselves."""
_TRACEPOINTS = {
    Event.SCHED_SWITCH: "sched_switch",
    Event.ACCEPT: "kvm_apic_accept_irq",
    Event.APICV_ACCEPT: "kvm_apicv_accept_irq",
    Event.APICV_INHIBIT: "kvm_apicv_inhibit_changed",
    Event.WAKEUP: "kvm_vcpu_wakeup",
    Event.HALT_POLL: "kvm_halt_poll_ns",
    Event.HV_TIMER: "kvm_hv_timer_state",
    Event.PI_IRTE: "kvm_pi_irte_update",
    Event.NMI: "kvm_nmi_inj",
    Event.SMM: "kvm_smm_transition",
    Event.NESTED_ENTRY: "kvm_nested_vmenter",
}
"""Tracepoints that Event does not call by their own names."""

_WANTED = "pass what ftrace, trace-cmd, perf or kvm_stat print"

Progress = Callable[[int], object]


@dataclass(frozen=True)
class Ask:
    """What is asked of every trace.

    ``kernels``: whose fast paths are asked, by default all generations'; none for a report without them. ``costs``:
    what exits cost, for cycles. ``told``: what the caller knows of the hosts ("vendor", "apicv", "irqchip", "hv_timer",
    "generation") better than their traces.
    """

    kernels: tuple[str, ...] | None = None
    costs: CostProfile | None = None
    told: Mapping[str, str] = field(default_factory=dict)


def report(
    paths: str | os.PathLike[str] | Iterable[str | os.PathLike[str]],
    kernels: Sequence[str] | None = None,
    costs: Costs | None = None,
    *,
    told: Mapping[str, str] | None = None,
    jobs: int | None = 1,
) -> Report:
    """Answer what one or many traces tell: exits, MSRs, interrupts, latencies, and what other kernels would do.

    Args:
        paths: a trace or several, of any kind that people have (``fastexit report``); "-" is standard input. A folder
            is all files below it.
        kernels: generations or releases whose fast path is asked about each ICR write, TSC_DEADLINE write, HLT, ...;
            by default all generations, and with an empty list none.
        costs: a cost profile or its name: what a fast exit saves is told in cycles, as a range where a stage is
            assumed.
        told: what is known of the host better than from its trace: "vendor", "apicv", "irqchip", "hv_timer",
            "generation".
        jobs: processes; None is one for each CPU.

    A file that cannot be read is told in its FileReport and does not end the rest. ValueError for an unknown kernel or
    cost profile.
    """
    from fastexit.answers import many

    for name in kernels or ():
        generation(name)
    table = None if costs is None else cost_profile(costs)
    ask = Ask(None if kernels is None else tuple(kernels), table, dict(told or {}))
    given = [paths] if isinstance(paths, str | os.PathLike) else list(paths)
    return many.run([os.fspath(path) for path in given], Answering(ask), jobs=jobs)


@dataclass(frozen=True)
class Answering:
    """Answers about one file; can be sent to another process."""

    ask: Ask

    def __call__(self, path: str, progress: Progress | None = None) -> Report:
        """The file's report; what refuses the file is told in it."""
        try:
            recording = read(path, progress)
        except TraceError as error:
            return Report([FileReport(path, refused=str(error))])
        return of_recording(recording, self.ask)


def of_recording(recording: Recording, ask: Ask | None = None) -> Report:
    """Answer everything about one recording."""
    ask = ask or Ask()
    identity = identify(recording, ask.told)
    analysis = Analysis(recording, identity.where)
    found = Report([_file(recording)], costs=ask.costs.name if ask.costs else "")
    found.files[0].notes += identity.notes
    if not found.files[0].events and not recording.tables:
        lines = "1 line" if recording.lines == 1 else f"{recording.lines:,} lines"
        found.files[0].refused = f"{recording.path}: {lines}, no event and no table among them: {_WANTED}"
    icrs = analysis.icrs()
    for number in analysis.vms:
        vm = analysis.report(number, identity.clues.get(number))
        if ask.kernels != () and number:
            _ask_kernels(vm, [(icr, n) for icr, n in icrs.items() if icr.vm == number], analysis, ask)
        found.vms.append(vm)
    if ask.kernels != () and recording.tables:
        _ask_about_tables(found, recording, ask)
    return found


def _ask_about_tables(found: Report, recording: Recording, ask: Ask) -> None:
    """A histogram of MSR writes has no VM and no vCPUs, but classes of ICR writes."""
    from fastexit.answers import fast

    counted = fast.of_tables(recording.tables)
    if not counted:
        return
    vm = VmReport(recording.path, 0, {key: Clue(value, "option") for key, value in ask.told.items()})
    vm.fast = fast.rows(counted, fast.host_of(vm.clues), None, ask.kernels, ask.costs)
    found.vms.append(vm)


def _ask_kernels(vm: VmReport, icrs: list[tuple[Icr, int]], analysis: Analysis, ask: Ask) -> None:
    """What each generation would do; where a VM has no such exit the model is not even loaded."""
    from fastexit.answers import fast, switches
    from fastexit.answers.findings import in_order, kernels

    counted = fast.classes(icrs, analysis.ipis.deadlines(vm.number), vm)
    if not counted:
        return
    host = fast.host_of(vm.clues)
    vm.fast = fast.rows(counted, host, vm.seconds, ask.kernels, ask.costs)
    if ask.costs is not None:
        fast.by_vcpu(vm.fast, analysis.ipis.by_vcpu(vm.number), host, ask.costs)
    vm.switches = switches.rows(vm, icrs, host, ask.costs)
    vm.findings = in_order([*vm.findings, *kernels.find(vm)])


def _file(recording: Recording) -> FileReport:
    return FileReport(
        recording.path,
        recording.shape,
        recording.clock,
        recording.lines,
        dict(_events(recording).most_common()),
        recording.unreadable_count,
        [(bad.line, bad.text) for bad in recording.unreadable],
        recording.lost,
        list(recording.problems),
        list(recording.notes),
        [{**asdict(table), "rows": [row._asdict() for row in table.rows]} for table in recording.tables],
    )


def _events(recording: Recording) -> Counter[str]:
    """Lines by tracepoint."""
    found: Counter[str] = Counter()
    for rows in recording.blocks:
        for event, n in enumerate(np.bincount(rows["event"])):
            if not n:
                continue
            if event not in _NAMED:
                found[_TRACEPOINTS.get(Event(event), f"kvm_{Event(event).name.lower()}")] += int(n)
                continue
            names = rows["name"][rows["event"] == event]
            for name, m in zip(*np.unique(names, return_counts=True), strict=True):
                found[recording.names[name] if name >= 0 else Event(event).name.lower()] += int(m)
    return found
