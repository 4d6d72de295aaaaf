"""One exit, step by step: what each step of vcpu_enter_guest did, and in which one the IPI left.

The dispatcher is pure Python with one method a step, so a walk wraps those methods of one dispatcher and looks at the
machine's words and trace ring before and after each. Nothing here knows what a generation skips; it is seen.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

from fastexit import layout as L
from fastexit import regs as R
from fastexit.checks import U32, integer
from fastexit.costs.profile import Costs
from fastexit.exits.exit import Exit
from fastexit.machine import Machine
from fastexit.outcome import CODE_COMPLETION, COMPLETION_REENTER, Outcome
from fastexit.profile import NEWEST
from fastexit.targets import outcome_of
from fastexit.vcpu import Vcpu


class Step(NamedTuple):
    """A step of one run-loop iteration: its number in the order of vcpu_enter_guest, its text, its method.

    The method is the dispatcher's that does it; "reenter" is a kernel behind the fast handler; empty: not modelled.
    """

    number: str
    text: str
    method: str


STEPS = (
    Step("11", "VM exit; vendor's run function, with the fast handler from 5.8 on", "vendor_run"),
    Step("12", "re-entry loop: stat.exits, PIR to IRR, exit requested?", "reenter"),
    Step("13", "vcpu->mode := OUTSIDE_GUEST_MODE", "guest_mode_outside"),
    Step("14", "handle_exit_irqoff, with the fast handler up to 5.7", "handle_exit_irqoff"),
    Step("15", "IRQ window: host interrupts let in", "irq_window"),
    Step("16", "guest time stops, preemption on", "guest_time_stop"),
    Step("17", "SRCU read lock retaken", "srcu_lock"),
    Step("18", "profiling, TSC catch-up, vAPIC sync (not modelled)", ""),
    Step("19", "EXIT_USERSPACE or KVM_EXIT_*: back to user space", "return_to_user"),
    Step("20", "handle_exit: checks, generic WRMSR emulation or skip", "handle_exit"),
    Step("1", "user space wants an IRQ window? (not modelled)", ""),
    Step("2", "pending requests", "service_requests"),
    Step("3", "INIT/SIPI, event injection", "inject_events"),
    Step("4", "preemption off, prepare switch", "preempt_disable"),
    Step("5", "host IRQs off", "irqs_off"),
    Step("6-9", "mode := IN_GUEST_MODE, SRCU dropped, PIR to IRR, exit requested?", "enter"),
    Step("10", "FPU, debug registers (not modelled); guest time starts", "guest_time_start"),
    Step("11", "VM entry", "vm_entry"),
)

REENTER = next(i for i, step in enumerate(STEPS) if step.method == "reenter")
MODELLED = sum(1 for step in STEPS if step.method)
"""Steps that the model has."""

_MODES = ("OUTSIDE", "IN_GUEST", "EXITING", "READING_PT")


@dataclass
class Visit:
    """One step as it ran: tracepoint lines it emitted, and vcpu->mode, the IRQ flag and SRCU when it was over.

    ``cycles`` is what it cost; None without a cost profile.
    """

    step: int
    lines: list[str]
    mode: str
    irqs_off: bool
    srcu: bool
    cycles: int | None = None

    def as_dict(self) -> dict[str, Any]:
        step = STEPS[self.step]
        return {
            "step": step.number,
            "text": step.text,
            "trace": self.lines,
            "mode": self.mode,
            "irqs_off": self.irqs_off,
            "srcu_held": self.srcu,
            **({} if self.cycles is None else {"cycles": self.cycles}),
        }


@dataclass
class Walk:
    """A walked exit: its kernel, its outcome, and the steps that ran, in order.

    ``ipi_step`` is the index into STEPS of the step in which the IPI was accepted by its first target, or None.
    ``costs`` names the cost profile, if any; ``cycles_elsewhere`` is what step 18 and vcpu_run's part between two
    iterations cost, which a walk does not show.
    """

    kernel: str
    fastpath: bool
    outcome: Outcome
    visits: list[Visit] = field(default_factory=list)
    costs: str | None = None
    cycles_elsewhere: int = 0

    @property
    def title(self) -> str:
        return self.kernel if self.fastpath else f"{self.kernel} generic"

    @property
    def ipi_step(self) -> int | None:
        for visit in self.visits:
            if any(line.startswith("kvm_apic_accept_irq") for line in visit.lines):
                return visit.step
        return None

    @property
    def steps_done(self) -> set[int]:
        return {visit.step for visit in self.visits}

    @property
    def steps_before_ipi(self) -> int | None:
        """Steps that were over when the IPI left, or None when none left."""
        for n, visit in enumerate(self.visits):
            if visit.step == self.ipi_step:
                return n
        return None

    def as_dict(self) -> dict[str, Any]:
        skipped = [STEPS[i].number for i in range(len(STEPS)) if STEPS[i].method and i not in self.steps_done]
        timed = {} if self.costs is None else {"costs": self.costs, "cycles_elsewhere": self.cycles_elsewhere}
        return {
            "kernel": self.kernel,
            "fastpath": self.fastpath,
            **timed,
            "outcome": self.outcome.as_dict(),
            "ipi_left_in_step": None if self.ipi_step is None else STEPS[self.ipi_step].number,
            "steps_before_ipi": self.steps_before_ipi,
            "steps": [visit.as_dict() for visit in self.visits],
            "steps_not_reached": skipped,
        }


class _Recorder:
    """Wraps the step methods of one machine's dispatcher."""

    def __init__(self, machine: Machine, v: Vcpu) -> None:
        self.machine = machine
        self.v = v
        self.visits: list[Visit] = []
        for index, step in enumerate(STEPS):
            if hasattr(machine.dispatcher, step.method or "-"):
                self._wrap(index, step.method)

    def _wrap(self, index: int, method: str) -> None:
        loop = self.machine.dispatcher
        original = getattr(loop, method)

        def recorded(*args: Any, **kwargs: Any) -> Any:
            seen = len(self.machine.trace.lines())
            result = original(*args, **kwargs)
            self.note(index, self.machine.trace.lines()[seen:])
            return result

        setattr(loop, method, recorded)

    def note(self, index: int, lines: list[str]) -> None:
        mem, own = self.machine.mem, self.v.own
        mode = _MODES[mem[self.v.hot + L.HOT_MODE]]
        self.visits.append(Visit(index, lines, mode, bool(mem[own + L.K_IRQS_OFF]), bool(mem[own + L.K_SRCU])))


def walk(
    msr: int,
    value: int,
    *,
    kernel: str = NEWEST,
    vendor: str = "vmx",
    apicv: bool = True,
    fastpath: bool = True,
    vcpus: int = 4,
    costs: Costs | None = None,
) -> Walk:
    """Walk one WRMSR of vCPU 0 on a booted x2APIC machine whose vCPUs are all in guest mode.

    ``msr`` and ``value`` are as for Vcpu.wrmsr; the rest are Machine's arguments. ValueError as there.
    """
    msr, value = integer(msr, "MSR", U32), integer(value, "MSR value")
    machine = Machine(vcpus=vcpus, kernel=kernel, vendor=vendor, apicv=apicv, costs=costs)
    machine.boot_x2apic()
    machine.fastpath = fastpath
    for v in machine.vcpus:
        machine.dispatcher.start_run(v)
    v = machine.vcpus[0]
    machine.trace.enable()
    recorder = _Recorder(machine, v)
    loop = machine.dispatcher
    exit = Exit(loop.vendor.wrmsr_reason, msr, value, loop.vendor.wrmsr_info1, length=R.INSN_LEN_WRMSR)
    code = loop.run_exit(v, exit)
    if code & CODE_COMPLETION == COMPLETION_REENTER:
        # The kernel did the loop's tail within its call; it is a step of its own in KVM's order, and so is the entry.
        lines = recorder.visits[-1].lines
        entry = [line for line in lines if line.startswith("kvm_entry")]
        recorder.visits[-1].lines = [line for line in lines if line not in entry]
        recorder.note(REENTER, [])
        recorder.note(len(STEPS) - 1, entry)
    if machine.costs is None:
        return Walk(kernel, fastpath, outcome_of(machine.mem, v.index, code), recorder.visits)
    outcome = v.timed  # type: ignore[attr-defined]
    elsewhere = _share_out(recorder.visits, outcome)
    return Walk(kernel, fastpath, outcome, recorder.visits, machine.costs.name, elsewhere)


def _share_out(visits: list[Visit], outcome: Any) -> int:
    """Each charge goes to the last visit of its step that the exit had; what belongs to no step is returned."""
    at = {STEPS[visit.step].method: visit for visit in visits}
    for visit in visits:
        visit.cycles = 0
    elsewhere = 0
    for charge in outcome.charges:
        bearer = at.get(charge.step)
        if bearer is None:
            elsewhere += charge.cycles
        else:
            bearer.cycles = (bearer.cycles or 0) + charge.cycles
    return elsewhere
