"""What a Windows-like guest's programs come to on a Machine's vCPU.

Models: KVM_RUN up to the entry, one instruction, exits to user space that are answered at once, and the OUT with which
each program ends.
"""

from __future__ import annotations

import struct
from typing import Any

from fastexit import hyperv as hv
from fastexit import layout as L
from fastexit import regs as R
from fastexit.jit.declare import load
from fastexit.kvm.lab import hvguest as G
from fastexit.kvm.operations import Op
from fastexit.outcome import Outcome
from fastexit.reasons import KvmExit, SvmExit
from fastexit.traits import Trait
from fastexit.vcpu import Vcpu

Exits = list[tuple[int, ...]]
ASLEEP = "asleep"
NO_SUCH_CALL = 0x1234_5678
"""RAX of every hypercall: a number that KVM's own hypercalls have not."""


class WindowsProgram:
    """One program on one vCPU. ``exits`` are those to user space on its way, as hvguest.Came has them."""

    def __init__(self, vcpu: Vcpu, memory: bytearray) -> None:
        self.v = vcpu
        self.memory = memory
        self.exits: Exits = []
        self.answer: int = 0
        self._blocked = False
        """NMIs were blocked when the program began."""
        self._clears = 0
        """Where a handler tests the assist bit, 0: it does not."""

    def run(self, op: Op) -> Any:
        """Carries out an operation: what it came to."""
        name, _, *arguments = op
        return getattr(self, name)(*arguments)

    def run_through(self) -> Any:
        """Nothing but the OUT."""
        return self._enter() or self._handle(None)

    def take(self, clears: int) -> Any:
        """The vector that comes instead of the program, and whether its handler found the assist bit set."""
        self._clears = clears
        return self._enter(interrupts=True) or self._handle(self._taken())

    def halt(self, interrupts: bool, clears: int) -> Any:
        """HLT: as `take` for what ended it or came before it, None where it went on, or "asleep"."""
        self._clears = clears
        nmi = self._enter(interrupts=interrupts)
        if nmi is not None:
            return nmi
        taken = self._taken()
        if taken is None:
            outcome = self.v.exit(SvmExit.HLT)
            if outcome.blocked:
                return ASLEEP
            self._again(outcome)
            taken = self._taken()
        return self._nmi() or self._handle(taken)

    def window(self, clears: int) -> Any:
        """STI with what waits: the interrupt window opens, and the interrupt comes then."""
        self._clears = clears
        nmi = self._enter()
        if nmi is not None:
            return nmi
        v = self.v
        v.rflags = R.RFLAGS_FIXED | R.RFLAGS_IF
        if v.irq_window:
            self._again(v.exit(SvmExit.VINTR))
        return self._nmi() or self._handle(self._taken())

    def test_clear(self, at: int) -> Any:
        """The guest's own test of its assist bit."""
        self._clears = at
        nmi = self._enter()
        if nmi is not None:
            return nmi
        found = self._clear(at)
        self._out()
        return found

    def wrmsr(self, msr: int, value: int) -> Any:
        """WRMSR: "#GP" or None."""
        return self._enter() or self._end(self.v.wrmsr(msr, value))

    def rdmsr(self, msr: int) -> Any:
        """RDMSR: its value or "#GP"."""
        nmi = self._enter()
        if nmi is not None:
            return nmi
        end = self._end(self.v.exit(SvmExit.MSR, info1=0, msr=msr))
        return self.v.read_data if end is None else end

    def mmio_write(self, offset: int, value: int) -> Any:
        """A store to the xAPIC page."""
        return self._enter() or self._end(self.v.mmio_write(offset, value))

    def mmio_read(self, offset: int) -> Any:
        """A load from the xAPIC page."""
        nmi = self._enter()
        if nmi is not None:
            return nmi
        value = self.v.mmio_read(offset)
        self._out()
        return value

    def hypercall(self, control: int, given: int, output: int, xmm: bytes, narrow: bool, answer: int) -> Any:
        """VMMCALL: what RAX (of 32-bit code EDX:EAX) is then, or "#UD"."""
        nmi = self._enter()
        if nmi is not None:
            return nmi
        self.answer = answer
        v = self.v
        registers = {"rax": NO_SUCH_CALL, "rcx": control, "rdx": given, "r8": output}
        if narrow:
            registers = {}
            for value, (high, low) in zip(
                (control, given, output), (("rdx", "rax"), ("rbx", "rcx"), ("rdi", "rsi")), strict=True
            ):
                registers[high], registers[low] = value >> 32, value & 0xFFFF_FFFF
        mem = v.machine.mem
        gated = v.machine.profile.traits & Trait.GATED and not mem[L.H_CONFIG] & L.CONFIG_HYPERV
        is_kvms = gated or not mem[L.H_HV_GUEST_OS_ID]
        outcome = v.exit(SvmExit.VMMCALL, **registers, xmm=struct.unpack("<12Q", xmm), bits64=not narrow)
        end = self._end(outcome)
        if end is not None:
            return end
        # Hyper-V's result is in EDX and EAX, that of KVM's own calls in EAX alone.
        return v.read_data | control >> 32 << 32 if narrow and is_kvms else v.read_data

    # ------------------------------------------------------------------------------------------------------ its parts

    def _enter(self, *, interrupts: bool = False) -> Any:
        """KVM_RUN as the lab's init prepares it: RUNNABLE, KVM_SET_REGS, which asks for events.

        What the handler of an NMI or of a queued fault ends with, which comes instead of the program, or None.
        """
        v = self.v
        self._blocked = v.nmi_masked
        fault = v.events().exception
        if v.get_mp_state() != R.MP_RUNNABLE:
            v.set_mp_state(R.MP_RUNNABLE)
        load("make_request")(v.machine.handle, v.index, R.REQ_EVENT)
        v.rflags = R.RFLAGS_FIXED | R.RFLAGS_IF * interrupts
        v.machine.mem[v.own + L.K_INTERRUPT] = 0
        self._go_on()
        nmi = self._nmi()
        if nmi is None and fault is not None:
            v.rflags = R.RFLAGS_FIXED
            return self._fault(fault)
        return nmi

    def _nmi(self) -> Any:
        """What the handler of an NMI that was taken since the program began ends with, or None."""
        if self._blocked or not self.v.nmi_masked:
            return None
        self.v.rflags = R.RFLAGS_FIXED
        return self._handle(R.VECTOR_NMI)

    def _go_on(self) -> None:
        while not self.v.run():
            self._answer()

    def _again(self, outcome: Outcome) -> None:
        """Back into the guest from an exit to user space."""
        if outcome.user is not None:
            self._answer()
            self._go_on()

    def _answer(self) -> None:
        """Notes why user space was asked, and does what the lab's init does."""
        v = self.v
        reason = v.exit_reason
        assert reason is not None
        if reason == KvmExit.HYPERV:
            row = v.machine.mem[L.HV + L.HV_STRIDE * v.index : L.HV + L.HV_STRIDE * (v.index + 1)]
            kind = row[L.HV_EXIT_TYPE]
            words = [row[L.HV_EXIT_MSR], row[L.HV_EXIT_CONTROL], row[L.HV_EXIT_EVT_PAGE], row[L.HV_EXIT_MSG_PAGE]]
            if kind == hv.HvExit.HCALL:
                words[1] = 0
                v.complete_hypercall(self.answer)
            self.exits.append((int(reason), kind, *words))
        elif reason == KvmExit.SYSTEM_EVENT:
            assert v.system_event is not None
            self.exits.append((int(reason), int(v.system_event), 0, 0, 0, 0))
        elif reason == KvmExit.IOAPIC_EOI:
            assert v.ioapic_eoi is not None
            self.exits.append((int(reason), 0, v.ioapic_eoi[0], 0, 0, 0))
        elif reason == KvmExit.MMIO:
            access = v.user_mmio
            assert access is not None
            self.exits.append((int(reason), int(access.write), access.gpa, 0, 0, 0))
            v.complete_access(0)
        else:
            raise ChildProcessError(f"the guest stopped with {reason}")

    def _taken(self) -> int | None:
        """The interrupt that the guest runs the handler of now, with interrupts off."""
        vector = self.v.injected
        if vector is not None:
            self.v.rflags = R.RFLAGS_FIXED
        return vector

    def _handle(self, vector: int | None) -> Any:
        if vector is None:
            self._out()
            return None
        found = self._clear(self._clears) if self._clears else False
        self._out(G.PORT_INTERRUPT)
        return vector, found

    def _clear(self, at: int) -> bool:
        found = bool(self.memory[at] & 1)
        self.memory[at] &= ~1
        return found

    def _end(self, outcome: Outcome) -> Any:
        """What an instruction came to: its fault, the NMI that came behind it, or None."""
        fault = outcome.fault
        self._again(outcome)
        nmi = None if fault else self._nmi()
        if nmi is not None:
            return nmi
        if fault:
            return self._fault(fault)
        self._out()
        return None

    def _fault(self, fault: int) -> str:
        if self._clears:
            self._clear(self._clears)
        self._out(G.PORT_INTERRUPT)
        return "#GP" if fault == R.VECTOR_GP else "#UD"

    def _out(self, port: int = G.PORT_DONE) -> None:
        self.v.io_write(port, 0)
