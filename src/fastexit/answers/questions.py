"""Which exits each kernel generation takes fast, asked of the model: one question an exit of a class, not one a line.

Nothing here knows what a generation skips. A machine of that generation runs the exit, with its fast path and without,
and says what became of it and, with a cost profile, what each stage of it cost.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import NamedTuple

from fastexit import regs as R
from fastexit.costs.profile import CostProfile
from fastexit.hyperv import MSR_HV_ICR
from fastexit.machine import Machine
from fastexit.outcome import Outcome, Path
from fastexit.reasons import SvmExit, VmxExit
from fastexit.snapshot import regions
from fastexit.trace.doors import Doing, Door
from fastexit.trace.generations import exit_at
from fastexit.vcpu import Vcpu

VCPUS = 8
"""Of the machines that are asked: enough for a multicast."""
ABSENT = 13
"""An APIC id that none of them has."""
FAR = 1 << 40
"""A TSC deadline that does not come."""
SELF_IPI_VECTOR = 0x41
ASLEEP = "nothing waits for the vCPU: it goes to sleep"
UNTOLD = "kvm_vcpu_wakeup was not recorded: whether the vCPU went to sleep is not told"


class Host(NamedTuple):
    """What a trace's host is like, as far as an answer depends on it."""

    vendor: str = "vmx"
    apicv: bool = False
    hv_timer: bool = True
    irqchip: str = "full"
    ipiv: bool | None = None
    x2avic: bool = False


@dataclass(frozen=True)
class Question:
    """An exit of a class.

    ``what``: "ipi", "deadline", or a reason of the vendor's that a fast path may know. Of an IPI: its door, whether it
    is a SELF_IPI write, the low half of its ICR without vector, whether its destination is a broadcast, how many APICs
    took it (below 0: not recorded, so one is taken). ``nested``: L2 did it. Of a HLT: whether an interrupt waited, so
    that the vCPU goes on at once, None where the trace does not tell.
    """

    what: str
    door: Door | None = None
    self_ipi: bool = False
    icr: int = 0
    broadcast: bool = False
    targets: int = 1
    nested: bool = False
    pending: bool | None = True


class Answer(NamedTuple):
    """What became of it: "" in ``refusal`` where it is fast.

    ``charges``: stage -> cycles, of all of it; ``until_ipi``: until its IPI left. Both are empty without costs.
    """

    refusal: str
    charges: dict[str, int]
    until_ipi: dict[str, int]


class Asked:
    """One generation's machine, put back to the same state before each question."""

    def __init__(self, kernel: str, host: Host, costs: CostProfile | None = None) -> None:
        self.kernel: str = kernel
        self.host: Host = host
        more = {} if host.ipiv is None else {"ipiv": host.ipiv}
        self.machine: Machine = Machine(
            vcpus=VCPUS,
            kernel=kernel,
            vendor=host.vendor,
            apicv=host.apicv,
            hv_timer=host.hv_timer and host.vendor == "vmx",
            irqchip=host.irqchip,
            threads=False,
            hyperv=True,  # a guest that does not use it sees no difference
            x2avic=host.x2avic,
            costs=costs,
            **more,  # type: ignore[arg-type] # a bool, as wanted
        )
        self.machine.boot_x2apic()
        for v in self.machine.vcpus:
            v.rflags |= R.RFLAGS_IF
            self.machine.dispatcher.start_run(v)
            v.wrmsr(R.MSR_X2APIC_BASE + (R.APIC_LVTT >> 4), R.LVT_TIMER_DEADLINE | SELF_IPI_VECTOR)
        for v in self.machine.vcpus:  # a new APIC map has asked everybody for a scan, which an entry does
            v.exit(VmxExit.CPUID if host.vendor == "vmx" else SvmExit.CPUID)
        self._state = [(rows, self.machine.words[rows].copy()) for rows in regions(VCPUS)]
        self._known: dict[tuple[Question, bool], Answer] = {}

    def answer(self, question: Question, fastpath: bool = True) -> Answer:
        """What the generation does with such an exit; without ``fastpath`` as if it had none."""
        key = question, fastpath
        if key not in self._known:
            v = self.fresh()
            self.machine.fastpath = fastpath and self.machine.fastpath
            if question.nested:
                v.nested = True
            outcome = self._carried_out(v, question)
            refusal = _refusal(question, outcome)
            self._known[key] = Answer(refusal, *_stages(outcome))
        return self._known[key]

    def fresh(self) -> Vcpu:
        """vCPU 0 of the machine as it was in the beginning."""
        for rows, words in self._state:
            self.machine.words[rows] = words
        return self.machine.vcpus[0]

    def xapic(self) -> None:
        """All APICs in xAPIC mode; what was set in x2APIC mode is lost."""
        for v in self.machine.vcpus:
            base = v.apic_base & ~(R.APICBASE_EN | R.APICBASE_EXTD)
            v.wrmsr(R.MSR_APICBASE, base)
            v.wrmsr(R.MSR_APICBASE, base | R.APICBASE_EN)
            v.mmio_write(R.APIC_SPIV, 0x1FF)

    def _carried_out(self, v: Vcpu, question: Question) -> Outcome:
        if question.what == "deadline":
            return v.wrmsr(R.MSR_TSC_DEADLINE, FAR)
        if question.what != "ipi":
            if question.what == "HLT" and question.pending:
                self.machine.vcpus[1].wrmsr(R.MSR_X2APIC_ICR, SELF_IPI_VECTOR)
            return v.exit(reasons(self.host.vendor)[question.what])
        if question.door is Door.SYNTHETIC:
            return v.wrmsr(MSR_HV_ICR, icr_value(question))
        if question.door not in (Door.X2APIC, Door.PAGE, None):
            return exit_at(v, Doing.IPI, question.door)
        if question.self_ipi:
            return v.wrmsr(R.MSR_X2APIC_SELF_IPI, SELF_IPI_VECTOR)
        if question.door is Door.PAGE:
            return v.mmio_write(R.APIC_ICR, question.icr | SELF_IPI_VECTOR)
        return v.wrmsr(R.MSR_X2APIC_ICR, icr_value(question))


def icr_value(question: Question) -> int:
    """An ICR of that class, for a machine whose APIC ids are 0 to VCPUS - 1 and whose vCPU 0 sends."""
    low = question.icr & 0xFFFF_FFFF
    if not low & R.ICR_DM:
        low |= SELF_IPI_VECTOR
    if low & R.ICR_SHORTHAND:
        return low
    if question.broadcast:
        return R.X2APIC_BROADCAST << 32 | low
    if low & R.ICR_LOGICAL:
        taken = 1 if question.targets < 0 else min(question.targets, VCPUS - 1)
        return (1 << taken) - 1 << 33 | low
    return (1 if question.targets else ABSENT) << 32 | low


def reasons(vendor: str) -> dict[str, int]:
    """Exit reasons by their plain names (facts.plain_reason), of which some generation takes some fast."""
    if vendor == "svm":
        return {"HLT": SvmExit.HLT, "INVD": SvmExit.INVD, "VMMCALL": SvmExit.VMMCALL}
    return {
        "HLT": VmxExit.HLT,
        "INVD": VmxExit.INVD,
        "PREEMPTION_TIMER": VmxExit.PREEMPTION_TIMER,
        "VMCALL": VmxExit.VMCALL,
    }


def _refusal(question: Question, outcome: Outcome) -> str:
    if outcome.path == Path.FAST:
        return (UNTOLD if question.pending is None else ASLEEP) if outcome.blocked else ""
    text = outcome.refusal.text
    if question.what == "ipi" and question.door not in (Door.X2APIC, None):
        return f"{question.door.value}: no fast handler" if question.door else text
    return text


def _stages(outcome: Outcome) -> tuple[dict[str, int], dict[str, int]]:
    """All stages, and those until the IPI left."""
    every: Counter[str] = Counter()
    until: Counter[str] = Counter()
    left = getattr(outcome, "cycles_ipi", None) or 0
    for charge in getattr(outcome, "charges", ()):
        every[charge.stage] += charge.cycles
        if left > 0:
            until[charge.stage] += charge.cycles
            left -= charge.cycles
    return dict(every), dict(until)
