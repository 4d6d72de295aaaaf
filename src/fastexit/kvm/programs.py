"""What a guest of `guest.py` does, as a Machine's vCPU does it: the doors of `OracleVcpu` that need KVM_RUN.

Models: KVM_RUN up to the entry, one instruction, and the OUT with which each program leaves to user space; user space
that calls KVM_RUN again after an EOI for its IOAPIC.
"""

from __future__ import annotations

from fastexit import layout as L
from fastexit import regs as R
from fastexit.jit.declare import load
from fastexit.kvm.guest import PORT_DONE, PORT_FAULT, PORT_INTERRUPT
from fastexit.outcome import Outcome
from fastexit.reasons import KvmExit, SvmExit, VmxExit
from fastexit.vcpu import Vcpu

HLT = {"vmx": VmxExit.HLT, "svm": SvmExit.HLT}
ASLEEP, WENT_ON = "asleep", "went on"


class Program:
    """One program on one vCPU. ``ioapic_eois``: vectors of KVM_EXIT_IOAPIC_EOI that came on the way.

    Args:
        vcpu: who runs it. interrupts: with RFLAGS.IF.
        eoi_at_injection: the module under KVM ends an interrupt when it injects it (`Host.eoi_at_injection`).
    """

    def __init__(self, vcpu: Vcpu, *, interrupts: bool = False, eoi_at_injection: bool = False) -> None:
        self.v = vcpu
        self.interrupts = interrupts
        self.ended = eoi_at_injection
        self.ioapic_eois: list[int] = []

    def run_through(self) -> list[int]:
        """Nothing but the OUT: vectors of the IOAPIC EOIs that came before it."""
        self._enter()
        self._out()
        return self.ioapic_eois

    def take(self) -> int | None:
        """The vector of the interrupt that comes instead of the program, or None."""
        self._enter()
        vector = self._taken()
        self._out(PORT_DONE if vector is None else PORT_INTERRUPT)
        return vector

    def halt(self) -> int | str:
        """HLT: the vector that ended it (or came before it), "went on" behind it, or "asleep"."""
        self._enter()
        vector = self._taken()
        if vector is None:
            outcome = self.v.exit(HLT[self.v.machine.vendor])
            if outcome.blocked:
                return ASLEEP
            self._again(outcome)
            vector = self._taken()
        self._out(PORT_DONE if vector is None else PORT_INTERRUPT)
        return WENT_ON if vector is None else vector

    def wrmsr(self, msr: int, value: int) -> KvmExit | int | str | None:
        """WRMSR: "#GP", the exit with which it is user space's, or None."""
        self._enter()
        outcome = self.v.wrmsr(msr, value)
        return self._end(outcome)

    def rdmsr(self, msr: int) -> KvmExit | str | int | None:
        """RDMSR: its value, "#GP", or the exit with which it is user space's."""
        self._enter()
        outcome = self.v.exit(self.v.machine.dispatcher.vendor.rdmsr_reason, msr=msr)
        end = self._end(outcome)
        return self.v.read_data if end is None else end

    def complete_msr(self, error: bool, data: int) -> KvmExit | str | int | None:
        """What comes of user space's answer: "#GP", the data of a read, or None."""
        reads = self.v.exit_reason == KvmExit.X86_RDMSR
        self.v.complete_msr(error=error, data=data)
        fault = self.v.events().exception == R.VECTOR_GP
        self._go_on()
        self._out(PORT_FAULT if fault else PORT_DONE)
        return "#GP" if fault else self.v.read_data if reads else None

    def _enter(self) -> None:
        """KVM_RUN as the guest's driver prepares it: RUNNABLE, RFLAGS, the general registers, which asks for events."""
        v = self.v
        if v.get_mp_state() != R.MP_RUNNABLE:
            v.set_mp_state(R.MP_RUNNABLE)
        load("make_request")(v.machine.handle, v.index, R.REQ_EVENT)
        v.rflags = R.RFLAGS_FIXED | R.RFLAGS_IF * self.interrupts
        v.real_mode = True
        v.machine.mem[v.own + L.K_INTERRUPT] = 0
        self._go_on()

    def _go_on(self) -> None:
        while not self.v.run():
            if self.v.exit_reason != KvmExit.IOAPIC_EOI:
                raise RuntimeError(f"the guest stopped with {self.v.exit_reason}")
            self._note_eoi()

    def _note_eoi(self) -> None:
        assert self.v.ioapic_eoi is not None
        self.ioapic_eois.append(self.v.ioapic_eoi[0])

    def _again(self, outcome: Outcome) -> None:
        """Back into the guest where an instruction's exit ended with an EOI for user space's IOAPIC."""
        if outcome.user == KvmExit.IOAPIC_EOI:
            self._note_eoi()
            self._go_on()

    def _taken(self) -> int | None:
        """The interrupt that the guest runs the handler of now, with interrupts off."""
        v = self.v
        vector = v.injected
        if vector is None and v.apicv:
            vector = v.hw_deliver()
        if vector is not None:
            v.rflags = R.RFLAGS_FIXED
            if self.ended:
                v.eoi()
        return vector

    def _end(self, outcome: Outcome) -> KvmExit | int | str | None:
        self._again(outcome)
        if outcome.user is not None and outcome.user != KvmExit.IOAPIC_EOI:
            return outcome.user
        self._out(PORT_FAULT if outcome.fault else PORT_DONE)
        return "#GP" if outcome.fault else None

    def _out(self, port: int = PORT_DONE) -> None:
        """The OUT: KVM_EXIT_IO, an iteration that does not stay in the kernel."""
        self.v.io_write(port, 0)
