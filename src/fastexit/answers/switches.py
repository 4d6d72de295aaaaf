"""What one switch of the host or of the guest's configuration would change: exits that go away, exits that turn fast.

Models: IPI virtualization and APICv by the model's own hardware (Vcpu.hw_wrmsr, hw_mmio_write), asked for each class of
access; a switch that the trace shows to be on already is not told.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import replace

from fastexit import regs as R
from fastexit.answers.fast import asked
from fastexit.answers.ipis import Icr
from fastexit.answers.questions import ABSENT, SELF_IPI_VECTOR, Asked, Host, Question, icr_value
from fastexit.answers.report import SwitchRow, VmReport
from fastexit.answers.savings import Cycles, saved
from fastexit.costs.profile import CostProfile
from fastexit.outcome import Path
from fastexit.profile import NEWEST
from fastexit.trace.doors import Doing, Door

IPIV, POSTED, NO_VAPIC = "with IPI virtualization", "with APICv and posted interrupts", "without hv-vapic"
WINDOWS = {"INTERRUPT_WINDOW", "PENDING_INTERRUPT", "vintr", "VINTR"}
"""Exits by which KVM waits until it may inject; with APICv the CPU delivers by itself."""
_OFFSETS = {Doing.IPI: R.APIC_ICR, Doing.EOI: R.APIC_EOI, Doing.TPR: R.APIC_TASKPRI}
_SYNTHETIC = Door.SYNTHETIC.value


def rows(
    report: VmReport, icrs: Iterable[tuple[Icr, int]], host: Host, costs: CostProfile | None = None
) -> list[SwitchRow]:
    """What each switch would do to a VM's exits; those without effect are left out."""
    ours = list(icrs)
    found = []
    if host.vendor == "vmx":
        found.append(_hardware(report, ours, host, POSTED, host._replace(apicv=True, ipiv=False), costs))
        found.append(_hardware(report, ours, host, IPIV, host._replace(apicv=True, ipiv=True), costs))
    elif not host.apicv:
        found.append(_hardware(report, ours, host, "with AVIC", host._replace(apicv=True, x2avic=True), costs))
    found.append(_no_vapic(report, ours, host, costs))
    return [row for row in found if row is not None]


def _hardware(
    report: VmReport, icrs: list[tuple[Icr, int]], host: Host, name: str, other: Host, costs: CostProfile | None
) -> SwitchRow | None:
    """A CPU that does more by itself: each access that exits today is tried on it."""
    today, then = asked(NEWEST, host, costs), asked(NEWEST, other, costs)
    gone: Counter[str] = Counter()
    cycles = Cycles(0.0, 0.0)
    for icr, n in icrs:
        if icr.faulted or icr.nested or icr.door not in (Door.X2APIC, Door.PAGE):
            continue
        question = Question("ipi", icr.door, icr.register == R.APIC_SELF_IPI, icr.icr, icr.broadcast, icr.targets)
        if not exits(then, question):
            gone[f"ICR writes ({icr.door.value})"] += n
            cycles = cycles.plus(_cost(costs, today.answer(question).charges), n)
    for used in report.doors:
        doing, door = Doing(used.doing), used.door
        if doing is Doing.IPI or doing not in _OFFSETS or door not in (Door.X2APIC.value, Door.PAGE.value):
            continue
        if not _access_exits(then, _OFFSETS[doing], door == Door.PAGE.value):
            gone[f"{doing.value} writes ({door})"] += used.count
    for exit_row in report.exits:
        if exit_row.reason in WINDOWS:
            gone[exit_row.reason] += exit_row.count
    before = sum(row.count for row in report.exits)
    total = sum(gone.values())
    if not total:
        return None
    why = {
        IPIV: "the CPU sends Fixed IPIs to one target by itself, and does all that APICv does",
        POSTED: "the CPU ends interrupts and delivers posted ones without an exit; IPIs still exit to be sent",
    }.get(name, "the CPU sends IPIs to running vCPUs and ends edge interrupts without an exit")
    row = SwitchRow(name, dict(gone.most_common()), before, max(before - total, 0), why)
    row.saved_total = cycles if costs is not None and any(cycles) else None
    return row


def exits(machine: Asked, question: Question) -> bool:
    """Whether the CPU of such a host leaves the guest for an ICR write of that class."""
    v = machine.fresh()
    if question.self_ipi:
        return bool(v.hw_wrmsr(R.MSR_X2APIC_SELF_IPI, SELF_IPI_VECTOR).path != Path.HARDWARE)
    if question.door is Door.PAGE:
        machine.xapic()
        dest = 0xFF if question.broadcast else 1 if question.targets else ABSENT
        v.mmio_write(R.APIC_ICR2, dest << 24)
        low = question.icr | (0 if question.icr & R.ICR_DM else SELF_IPI_VECTOR)
        return bool(v.hw_mmio_write(R.APIC_ICR, low).path != Path.HARDWARE)
    return bool(v.hw_wrmsr(R.MSR_X2APIC_ICR, icr_value(question)).path != Path.HARDWARE)


def _access_exits(machine: Asked, offset: int, page: bool) -> bool:
    """Whether it leaves the guest for a write of another register, with an interrupt in service that it may end."""
    v = machine.fresh()
    other = machine.machine.vcpus[1]
    if page:
        machine.xapic()
        other.mmio_write(R.APIC_ICR2, 0)
        other.mmio_write(R.APIC_ICR, SELF_IPI_VECTOR)
    else:
        other.wrmsr(R.MSR_X2APIC_ICR, SELF_IPI_VECTOR)
    v.hw_notify()
    v.hw_deliver()
    if page:
        return bool(v.hw_mmio_write(offset, 0).path != Path.HARDWARE)
    return bool(v.hw_wrmsr(R.MSR_X2APIC_BASE + (offset >> 4), 0).path != Path.HARDWARE)


def _no_vapic(report: VmReport, icrs: list[tuple[Icr, int]], host: Host, costs: CostProfile | None) -> SwitchRow | None:
    """A Windows guest that is not offered the synthetic MSRs and writes x2APIC's: the same exits, some of them fast."""
    synthetic = sum(row.count for row in report.doors if row.door == _SYNTHETIC)
    ipis = [(icr, n) for icr, n in icrs if icr.door is Door.SYNTHETIC and not icr.faulted]
    if not synthetic or not ipis:
        return None
    machine = asked(NEWEST, host, costs)
    turned: Counter[str] = Counter()
    cycles = Cycles(0.0, 0.0)
    for icr, n in ipis:
        question = Question("ipi", Door.X2APIC, False, icr.icr, icr.broadcast, icr.targets, icr.nested)
        answer = machine.answer(question)
        if answer.refusal:
            continue
        turned["ICR writes that turn fast"] += n
        if costs is not None:
            now = machine.answer(replace(question, door=Door.SYNTHETIC))
            cycles = cycles.plus(saved(costs, now.charges, answer.charges), n)
    before = sum(row.count for row in report.exits)
    why = f"x2APIC's MSRs in place of 0x40000070 to 0x40000072: as many exits, but {NEWEST} takes these IPIs fast"
    row = SwitchRow(NO_VAPIC, dict(turned), before, before, why)
    row.saved_total = cycles if costs is not None and turned else None
    return row if turned else None


def _cost(costs: CostProfile | None, charges: Mapping[str, int]) -> Cycles:
    return Cycles(0.0, 0.0) if costs is None else saved(costs, charges, {})
