"""What an exit has cost: stages as they are charged, the outcome that carries them, the work of each exit's handler.

dispatcher.py charges while an exit runs, batch.py from what a record tells.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import NamedTuple

from fastexit import hyperv as HV
from fastexit import regs as R
from fastexit.costs.profile import CostProfile
from fastexit.exits.exit import Exit, Vendor
from fastexit.outcome import OUTCOMES, Effect, Outcome, Target
from fastexit.profile import since

_KVM, _APIC, _SMP = "6.1", "6.12", None
"""First generation whose pointers are static calls: KVM's own since 5.12, the host's APIC driver since 6.6; smp_ops
never."""

POINTERS: dict[str, tuple[str | None, ...]] = {
    "irqoff_handler": (_KVM,),
    "exit_checks": (_KVM,),
    "msr_access": (_KVM,),
    "skip": (_KVM, _KVM),
    "accept": (_KVM,),
    "notify": (_APIC,),
    "kick": (_SMP, _APIC),
    "inject": (_KVM, _KVM),
    "prepare_switch": (_KVM,),
    "vm_entry": (_KVM,),
    "sync_pir": (_KVM,),
    "cr8_intercept": (_KVM,),
}
"""Calls through a pointer that a stage makes, each by the generation that made it a static call. The last two are no
stages: steps 6 to 9 with APICv on, step 3 with it off."""

EFFECT_STAGES = {Effect.NOTIFY: "notify", Effect.KICK: "kick", Effect.WAKE: "wake", Effect.DOORBELL: "doorbell"}
_TIMER_REGISTERS = (R.APIC_LVTT, R.APIC_TMICT, R.APIC_TDCR)


def pointer_calls(kernel: str) -> dict[str, int]:
    """POINTERS, counted as far as they still are pointers in that generation."""
    return {
        stage: sum(1 for first in calls if first is None or not since(kernel, first))
        for stage, calls in POINTERS.items()
    }


class Sent(NamedTuple):
    """One target of an exit's IPI: its vCPU index, what the host has to do for it, cycles until that was done."""

    vcpu: int
    effect: Effect
    cycles: int


class Charge(NamedTuple):
    """One stage as it was charged: the dispatcher's method (walk.STEPS), the stage, how often, cycles in all."""

    step: str
    stage: str
    count: int  # type: ignore[assignment] # it hides tuple.count
    cycles: int


class TimedOutcome(Outcome):
    """An Outcome with its modelled time. Two are equal when their codes are; cycles do not count.

    Attributes:
        cycles_ipi: cycles from the guest's instruction until the IPI has left to its last target; None without an IPI
            that anybody accepted.
        cycles: cycles until the guest runs again; None when it does not: it waits, or is back in user space.
        cycles_spent: cycles that were charged, whatever came of it.
        sent: the targets for which something is to be done, in the order of sending.
        charges: the stages, in order.
    """

    __slots__ = ("charges", "cycles", "cycles_ipi", "cycles_spent", "sent")

    cycles: int | None
    cycles_ipi: int | None
    cycles_spent: int
    sent: tuple[Sent, ...]
    charges: tuple[Charge, ...]

    def __init__(self, code: int, meter: Meter, in_guest: bool) -> None:
        put, plain = object.__setattr__, OUTCOMES[code]
        for name in Outcome.__slots__:
            put(self, name, getattr(plain, name))
        put(self, "targets", tuple(Target(sent.vcpu, sent.effect) for sent in meter.sent))
        put(self, "cycles", meter.spent if in_guest else None)
        put(self, "cycles_ipi", meter.ipi)
        put(self, "cycles_spent", meter.spent)
        put(self, "sent", tuple(meter.sent))
        put(self, "charges", tuple(meter.log))

    def as_dict(self) -> dict[str, object]:
        """All attributes with plain values, for JSON; stages with what each cost in all."""
        stages: dict[str, int] = {}
        for charge in self.charges:
            stages[charge.stage] = stages.get(charge.stage, 0) + charge.cycles
        times = {"cycles_ipi": self.cycles_ipi, "cycles": self.cycles, "cycles_spent": self.cycles_spent}
        return super().as_dict() | times | {"stages": stages}

    def __repr__(self) -> str:
        return f"{super().__repr__()[:-1]}, cycles_ipi={self.cycles_ipi}, cycles={self.cycles})"


class Meter:
    """What one exit has cost so far."""

    def __init__(self, costs: CostProfile, calls: dict[str, int]) -> None:
        self.costs = costs
        self.calls = calls
        self.log: list[Charge] = []
        self.spent: int = 0
        self.ipi: int | None = None
        self.sent: list[Sent] = []

    def tell_rest(self, targets: tuple[Target, ...]) -> None:
        """Targets that no IPI and no tick had, such as a kick for a new APIC map: told by now."""
        if len(targets) == len(self.sent):
            return
        told = Counter(Target(sent.vcpu, sent.effect) for sent in self.sent)
        for target in targets:
            if told[target]:
                told[target] -= 1
            else:
                self.sent.append(Sent(target.vcpu, target.effect, self.spent))

    def charge(self, step: str, stage: str, count: int = 1) -> None:
        """A stage, and the calls through pointers that it makes."""
        self.direct(step, stage, count)
        self.call(step, stage, count)

    def direct(self, step: str, stage: str, count: int = 1) -> None:
        """A stage that is reached without them: a re-entry stays inside the vendor's run function."""
        self.add(step, stage, count, count * self.costs[stage])

    def call(self, step: str, what: str, count: int = 1) -> None:
        """The calls through pointers of ``what`` (POINTERS), as far as the generation has them."""
        calls = count * self.calls.get(what, 0)
        if calls:
            self.add(step, "vendor_call", calls, calls * self.costs["vendor_call"])

    def add(self, step: str, stage: str, count: int, cycles: int) -> None:
        """Cycles under a stage's name."""
        self.log.append(Charge(step, stage, count, cycles))
        self.spent += cycles


class Work(NamedTuple):
    """What the handler of an exit does: its stages, whether it writes the ICR or a timer register, whether it skips."""

    stages: tuple[str, ...]
    timer: bool = False
    skips: bool = True


def _register(offset: int, write: bool) -> tuple[str, bool]:
    if write and offset == R.APIC_ICR:
        return "icr", False
    return "lapic_access", write and offset in _TIMER_REGISTERS


def _msr(msr: int, write: bool) -> Work:
    """RDMSR or WRMSR; generic MSR emulation, which a fast handler avoids, is not among it.

    Of Hyper-V's, which are never fast, the ICR is an ICR, and what only stores a value costs no more than any access.
    """
    if msr == HV.MSR_HV_ICR:
        return Work(("icr" if write else "lapic_access",))
    if msr in (HV.MSR_HV_EOI, HV.MSR_HV_TPR):
        return Work(("lapic_access",))
    if msr == R.MSR_TSC_DEADLINE:
        return Work(("timer",), timer=write)
    if not R.MSR_X2APIC_BASE <= msr < R.MSR_X2APIC_BASE + 0x100:
        return Work(())
    offset = (msr - R.MSR_X2APIC_BASE) << 4
    if write and offset == R.APIC_SELF_IPI:
        return Work(("icr",))
    stage, timer = _register(offset, write)
    return Work((stage,), timer)


def is_ioapic(gpa: int) -> bool:
    """Tell whether an address lies in the IOAPIC's page."""
    return gpa >> 12 == R.IOAPIC_DEFAULT_BASE >> 12


def _page(gpa: int, write: bool) -> Work:
    """An access to the IOAPIC's page, or else to the xAPIC page, by way of the instruction emulator."""
    if is_ioapic(gpa):
        return Work(("emulator", "device"), skips=False)
    stage, timer = _register(gpa & 0xFFF, write)
    return Work(("emulator", stage), timer, skips=False)


def _apic_write(exit: Exit) -> Work:
    """An access that the CPU has made already, to the register that the qualification names."""
    stage, timer = _register(exit.info1 & 0xFFF, True)
    return Work((stage,), timer, skips=False)


WORKS: dict[str, Work | Callable[[Exit], Work]] = {
    "none": Work((), skips=False),
    "other": Work(("other_exit",)),
    "silent": Work(("other_exit",), skips=False),
    "halt": Work(("halt",)),
    "hypercall": Work(("hypercall",)),
    "lapic": Work(("lapic_access",), skips=False),
    "timer": Work(("timer",), timer=True, skips=False),
    "ipi": Work(("icr",), skips=False),
    "rdmsr": lambda exit: _msr(exit.msr, False),
    "wrmsr": lambda exit: _msr(exit.msr, True),
    "msr": lambda exit: _msr(exit.msr, bool(exit.info1)),
    "page": lambda exit: _page(exit.gpa, exit.write),
    "port": Work(("device",)),
    "apic_access": lambda exit: _page(exit.info1 & 0xFFF, exit.write),
    "apic_write": _apic_write,
    "avic_access": lambda exit: Work(("lapic_access",), bool(exit.info1 & R.AVIC_INFO1_WRITE), skips=False),
}
"""The work of exits by its name in exits/table.py, or how to tell it from the exit."""

_MSR_WORKS = frozenset({"rdmsr", "wrmsr", "msr"})


def work_of(vendor: Vendor, exit: Exit) -> Work:
    """Give the work of an exit's built-in handlers."""
    work = WORKS[vendor.rows[exit.reason].work]
    return work if isinstance(work, Work) else work(exit)


_READS = {int(HV.HvCall.SEND_IPI): 1, int(HV.HvCall.SEND_IPI_EX): 2, int(HV.HvCall.SIGNAL_EVENT): 1}
"""Hypercalls with input, and in how many pieces it is read where it is in memory: banks of a set come separately."""


def charge_hyperv(meter: Meter, step: str, control: int, vcpus: int, succeeded: bool) -> None:
    """Charge one of Hyper-V's hypercalls, by its control word, up to its targets.

    An IPI looks at every vCPU of the VM, in turn. What is refused is taken to be refused for its control word.
    """
    meter.charge(step, "hv_hypercall")
    code = control & HV.HV_CALL_CODE
    if not succeeded or code not in _READS:
        return
    if not control & HV.HV_CALL_FAST:
        meter.charge(step, "guest_memory", _READS[code])
    if code != HV.HvCall.SIGNAL_EVENT:
        meter.charge(step, "hv_target", vcpus)


def accesses_msr(vendor: Vendor, reason: int) -> bool:
    """Tell whether an exit is an MSR access, whose generic handler has the stage msr_access."""
    return vendor.rows[reason].work in _MSR_WORKS
