"""Exit handlers that VMX and SVM share, and the table that an embedder can extend."""

from __future__ import annotations

from collections import UserDict
from typing import TYPE_CHECKING, Any

from fastexit import layout as L
from fastexit import regs as R
from fastexit.exits.bus import NOT_MINE, Bus
from fastexit.jit.declare import load
from fastexit.outcome import CODE_REFUSAL_SHIFT, CODE_USER_SHIFT, Refusal
from fastexit.profile import Profile
from fastexit.reasons import KvmExit, VmxExit
from fastexit.traits import Trait

if TYPE_CHECKING:
    from collections.abc import Mapping

    from fastexit.exits.exit import Exit, Handler, PortAccess, Vendor
    from fastexit.vcpu import Vcpu


def user_code(reason: KvmExit) -> int:
    """Outcome code that leaves the run loop with a KVM_EXIT_* reason."""
    return reason + 1 << CODE_USER_SHIFT


class Handlers(UserDict[int, "Handler"]):
    """exit reason -> generic handler. Assign to extend or replace: ``m.handlers[VmxExit.HLT] = handler``.

    A handler takes ``(vcpu, exit)`` and returns None to run on, a KvmExit to leave to user space, or what a built-in
    handler returned to it. Anything else is a TypeError, and the vCPU is then outside the guest. Once a handler was
    assigned, the batch door sends every exit through Python, so that it sees the same handlers; one that raises ends
    the batch, and the exits before it have happened.
    """

    def __init__(self, memory: memoryview, builtin: Mapping[int, Handler]) -> None:
        super().__init__()
        self.data.update((int(reason), handler) for reason, handler in builtin.items())
        self._memory = memory

    def __setitem__(self, reason: int, handler: Handler) -> None:
        if not callable(handler):
            raise TypeError(f"handler of exit {reason!r} is {type(handler).__name__}, not a function of (vcpu, exit)")
        self._memory[L.H_HANDLERS] = 1
        super().__setitem__(int(reason), handler)

    def __or__(self, other: Mapping[int, Handler]) -> dict[int, Handler]:  # type: ignore[override]
        return self.data | dict(other)

    def __ior__(self, other: Mapping[int, Handler]) -> Handlers:  # type: ignore[override]
        self.update(other)
        return self

    def __delitem__(self, reason: int) -> None:
        self._memory[L.H_HANDLERS] = 1
        super().__delitem__(int(reason))


def bound_handlers(vendor: Vendor, common: CommonHandlers, profile: Profile, kind: str) -> dict[int, Any]:
    """Bind the methods that the rows of table.py name, as far as the generation has them: exit reason -> handler.

    ``kind`` is the row's field: handler, fast or irqoff. A vendor's own method goes before the common one.
    """
    found: dict[int, Any] = {}
    for reason, row in vendor.rows.items():
        name = getattr(row, kind)
        if name is not None and profile.traits & row.trait == row.trait:
            found[reason] = getattr(vendor if hasattr(vendor, name) else common, name)
    return found


class CommonHandlers:
    """Handlers over the kernels: MSR accesses, devices, windows, and exits that need nothing done."""

    def __init__(self, memory: memoryview, handle: int, bus: Bus) -> None:
        self.memory = memory
        self.handle = handle
        self.bus = bus

    def fast_wrmsr(self, v: Vcpu, exit: Exit) -> int:
        """Fast WRMSR handler and re-entry in the vendor's run function."""
        return load("fast_wrmsr")(self.handle, v.index, exit.msr, exit.value, exit.length)

    def fast_hlt(self, v: Vcpu, exit: Exit) -> int:
        """handle_fastpath_hlt."""
        return load("fast_hlt")(self.handle, v.index)

    def fast_invd(self, v: Vcpu, exit: Exit) -> int:
        """handle_fastpath_invd."""
        return load("fast_invd")(self.handle, v.index, exit.length)

    def fast_preemption_timer(self, v: Vcpu, exit: Exit) -> int:
        """handle_fastpath_preemption_timer."""
        return load("fast_preemption_timer")(self.handle, v.index)

    def fast_wrmsr_irqoff(self, v: Vcpu, exit: Exit) -> int:
        """Fast handler in handle_exit_irqoff."""
        return load("fast_irqoff")(self.handle, v.index, exit.msr, exit.value)

    def declined(self, v: Vcpu, exit: Exit) -> int:
        """An exit that shares its number with a fast one."""
        return Refusal.NOT_AN_MSR_WRITE << CODE_REFUSAL_SHIFT

    def wrmsr(self, v: Vcpu, exit: Exit) -> int:
        """kvm_emulate_wrmsr."""
        return load("emulate_wrmsr")(self.handle, v.index, exit.msr, exit.value, exit.length)

    def rdmsr(self, v: Vcpu, exit: Exit) -> int:
        """kvm_emulate_rdmsr; the value is v.read_data."""
        return load("emulate_rdmsr")(self.handle, v.index, exit.msr, exit.length)

    def mmio(self, v: Vcpu, exit: Exit) -> int:
        """handle_ept_misconfig, npf_interception: an address that is known to be a device's.

        Where a fast-MMIO ioeventfd listens no emulator is needed: the write happened, RIP moves.
        """
        if self.cannot_emulate(v, exit):
            return user_code(KvmExit.INTERNAL_ERROR)
        if exit.gpa not in self.bus.fast_mmio:
            return self.emulate(v, exit)
        self._emit(L.TP_FAST_MMIO, v, exit.gpa)
        return self.skip_instruction(v, exit)

    def emulate(self, v: Vcpu, exit: Exit) -> int:
        """The instruction emulator at a device. RIP is its business and moves by ``exit.length``."""
        if exit.write:
            code = self.bus.write(v, exit.gpa, exit.size, exit.value)
        else:
            code = self.bus.read(v, exit.gpa, exit.size)
        if code != NOT_MINE:
            return code | self.skip_instruction(v, exit)
        return self._to_user(v, exit.gpa, exit.size, exit.write, exit)

    def io(self, v: Vcpu, exit: Exit, access: PortAccess) -> int:
        """kvm_fast_pio. What is read is traced when it is there."""
        port, size, write = access
        if write:
            self._emit(L.TP_PIO, v, port | L.TRACE_PIO_WRITE, size | 1 << 8, exit.value)
            code = self.bus.io_write(v, port, size, exit.value)
        else:
            code = self.bus.io_read(v, port, size)
            if code != NOT_MINE:
                self._emit(L.TP_PIO, v, port, size | 1 << 8, v.read_data)
        if code != NOT_MINE:
            return code | self.skip_instruction(v, exit)
        return self._to_user(v, port, size | L.ACCESS_PORT, write, exit)

    def _to_user(self, v: Vcpu, address: int, access: int, write: bool, exit: Exit) -> int:
        """KVM_EXIT_MMIO or KVM_EXIT_IO."""
        access |= (L.ACCESS_WRITE if write else 0) | exit.length << L.ACCESS_INSN_SHIFT
        return load("access_to_user")(self.handle, v.index, address, exit.value, access)

    def cannot_emulate(self, v: Vcpu, exit: Exit) -> bool:
        """kvm_can_emulate_event_vectoring, since 6.14: an event cannot be delivered to a stack or IDT that is a device.

        APIC_ACCESS is no page fault, and its instruction is emulated all the same.
        """
        machine = v.machine
        vendor = machine.dispatcher.vendor
        if not machine.profile.traits & Trait.MMIO_NOT_VECTORING or exit.reason == VmxExit.APIC_ACCESS:
            return False
        return bool(vendor.cut_short(exit) & R.VECTORING_INFO_VALID)

    def _emit(self, event: int, v: Vcpu, a: int, b: int = 0, c: int = 0) -> None:
        if self.memory[L.H_CONFIG] & L.CONFIG_TRACE:
            load("emit")(self.handle, event, v.index, a, b, c)

    def hlt(self, v: Vcpu, exit: Exit) -> int:
        """kvm_emulate_halt."""
        return load("emulate_halt")(self.handle, v.index)

    def operation(self, v: Vcpu, exit: Exit) -> int:
        """The operation of the exit's row in table.py: what ``operate`` of kernels/loop.py does for it."""
        return load("operate")(self.handle, v.index, exit.reason, exit.msr, exit.value, exit.info1, exit.length)

    def hypercall(self, v: Vcpu, exit: Exit) -> int:
        """kvm_emulate_hypercall; RAX is v.read_data afterwards."""
        at = L.XMM + v.index * L.XMM_STRIDE
        for i, half in enumerate((*exit.xmm, *(0,) * L.XMM_WORDS)[: L.XMM_WORDS]):
            self.memory[at + i] = half
        how = exit.length | (L.CALL_BITS64 if exit.bits64 else 0) | exit.cpl * (L.CALL_CPL & -L.CALL_CPL)
        return load("emulate_hypercall")(self.handle, v.index, *exit.registers, how)

    def cr8(self, v: Vcpu, exit: Exit, write: bool) -> int:
        """MOV to or from CR8; what was read is v.read_data."""
        return load("emulate_cr8")(self.handle, v.index, exit.value, int(write))

    def exception(self, v: Vcpu, exit: Exit) -> int | KvmExit | None:
        """An exception the guest does not get by itself, or a host NMI: back to the guest, or to its debugger."""
        kind, vector = exit.intr_info >> 8 & 7, exit.intr_info & 0xFF
        if kind == R.INTR_TYPE_NMI or vector == R.VECTOR_MC:
            return None  # the host's handler ran with interrupts still off
        debugged = self.memory[v.own + L.K_GUEST_DEBUG]
        if vector == R.VECTOR_BP or (vector == R.VECTOR_DB and debugged):
            return KvmExit.DEBUG
        if vector not in R.REFLECTED_VECTORS:
            return KvmExit.EXCEPTION
        self.memory[v.own + L.K_EXCEPTION] = vector + 1
        self.event(v, exit)
        return None

    def event(self, v: Vcpu, exit: Exit) -> None:
        """Something may be injected now: look at the next entry."""
        load("make_request")(self.handle, v.index, R.REQ_EVENT)

    def nmi_window(self, v: Vcpu, exit: Exit) -> None:
        """The guest can take an NMI now."""
        self.memory[v.own + L.K_NMI_WINDOW] = 0
        self.event(v, exit)

    def iret(self, v: Vcpu, exit: Exit) -> None:
        """SVM's IRET intercept: NMIs are unmasked behind the instruction, here at once."""
        self.memory[v.own + L.K_NMI_MASKED] = 0
        self.nmi_window(v, exit)

    def interrupt_window(self, v: Vcpu, exit: Exit) -> None:
        """The guest can take interrupts now: close the window, look again."""
        self.memory[v.own + L.K_IRQ_WINDOW] = 0
        self.event(v, exit)

    def nothing(self, v: Vcpu, exit: Exit) -> None:
        """External interrupts: the IRQ window has handled them."""

    def skip_instruction(self, v: Vcpu, exit: Exit) -> int:
        """Only RIP moves."""
        return load("skip")(self.handle, v.index, exit.length)
