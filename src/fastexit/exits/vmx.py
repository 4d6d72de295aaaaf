"""VMX: handlers of its own exits, the order of checks in vmx_handle_exit. table.py says which exit has which handler.

Models: vmx_exit_handlers_fastpath, vmx_handle_exit_irqoff, vmx_handle_exit with its early returns and its retpoline
shortcuts (the same handlers, reached without an indirect call), and the exits of a virtualised APIC:
handle_apic_access, handle_apic_write, handle_apic_eoi_induced, handle_tpr_below_threshold, handle_ept_violation
without a memslot. Not modelled: PML, virtual NMIs, bus locks.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from fastexit import layout as L
from fastexit import regs as R
from fastexit.exits.exit import Exit, PortAccess
from fastexit.exits.handlers import CommonHandlers, Handlers, bound_handlers, user_code
from fastexit.exits.table import VMX
from fastexit.jit.declare import load
from fastexit.outcome import CODE_EXIT_REASON_SHIFT
from fastexit.profile import Profile
from fastexit.reasons import VMX_FAILED_VMENTRY, KvmExit, VmxExit
from fastexit.traits import Trait

if TYPE_CHECKING:
    from fastexit.exits.dispatcher import Dispatcher
    from fastexit.exits.exit import FastHandler
    from fastexit.vcpu import Vcpu

_BEFORE_SIMULTANEOUS = frozenset({R.VECTOR_UD, R.VECTOR_NM, R.VECTOR_GP, R.VECTOR_PF, R.VECTOR_MC})

_PAGE = 0xFFF
_QUALIFICATION = 0xFFFF_FFFF


class Vmx:
    """Intel's side of the dispatcher."""

    wrmsr_reason: int = int(VmxExit.MSR_WRITE)
    wrmsr_info1: int = 0
    rdmsr_reason: int = int(VmxExit.MSR_READ)
    mmio_reason: int = int(VmxExit.EPT_MISCONFIG)
    interrupt_reason: int = int(VmxExit.EXTERNAL_INTERRUPT)
    window_reason: int = int(VmxExit.INTERRUPT_WINDOW)
    nmi_window_reason: int = int(VmxExit.NMI_WINDOW)
    forced_reason: int = int(VmxExit.PREEMPTION_TIMER)
    hypercall_reason: int = int(VmxExit.VMCALL)
    io_reason: int = int(VmxExit.IO_INSTRUCTION)
    memory_reasons: frozenset[int] = frozenset({int(VmxExit.EPT_MISCONFIG), int(VmxExit.EPT_VIOLATION)})
    rows = VMX
    hardware = "apicv"

    def __init__(self, profile: Profile, common: CommonHandlers) -> None:
        self.trace_exit_late: bool = bool(profile.traits & Trait.TRACE_EXIT_LATE_VMX)
        self.common = common
        self.fast_run: dict[int, FastHandler] = bound_handlers(self, common, profile, "fast")
        self.fast_irqoff: dict[int, FastHandler] = bound_handlers(self, common, profile, "irqoff")
        self.handlers: Handlers = Handlers(common.memory, bound_handlers(self, common, profile, "handler"))

    def _cr_access(self, v: Vcpu, exit: Exit) -> int:
        """handle_cr for CR8 (qualification bits 3:0 number, 5:4 type: 0 to, 1 from); other registers are the MMU's."""
        if exit.info1 & 0xF != 8 or exit.info1 >> 4 & 3 > 1:
            return user_code(KvmExit.INTERNAL_ERROR)
        # KVM takes 8 bits of the register here, so that bits above them do not fault as they do on SVM.
        return self.common.cr8(v, replace(exit, value=exit.value & 0xFF), write=exit.info1 >> 4 & 3 == 0)

    def cut_short(self, exit: Exit) -> int:
        """IDT-vectoring information: the event during whose delivery the exit happened."""
        return exit.info2

    def cr8_exit(self, value: int) -> Exit:
        """MOV to CR8 that exits."""
        return Exit(VmxExit.CR_ACCESS, value=value, info1=8, length=R.INSN_LEN_MOV_CR)

    def hardware_exit(self, v: Vcpu, plain: Exit, code: int) -> Exit:
        """The exit that the CPU makes of an access: the plain one, or one with a qualification. See kernels/apicv.py.

        APIC_WRITE and EOI_INDUCED come after the instruction: there is nothing left to skip.
        """
        reason = code >> CODE_EXIT_REASON_SHIFT & 0xFFFF
        if reason == plain.reason:
            return plain
        length = plain.length if reason == VmxExit.APIC_ACCESS else 0
        return replace(plain, reason=reason, info1=code & _QUALIFICATION, length=length)

    def _apic_access(self, v: Vcpu, exit: Exit) -> int | KvmExit:
        """handle_apic_access: a write to EOI needs no decoding; everything else goes through the emulator."""
        kind = exit.info1 >> R.APIC_ACCESS_TYPE_SHIFT & 0xF
        offset = exit.info1 & _PAGE
        if kind == R.APIC_ACCESS_WRITE and offset == R.APIC_EOI:
            return load("apic_access_eoi")(self.common.handle, v.index, exit.length)
        if kind == R.APIC_ACCESS_FETCH:
            return KvmExit.INTERNAL_ERROR
        write = exit.write if kind > R.APIC_ACCESS_FETCH else kind == R.APIC_ACCESS_WRITE
        return self.common.emulate(v, replace(exit, gpa=v.apic_page + offset, write=write))

    def _apic_write(self, v: Vcpu, exit: Exit) -> int:
        """handle_apic_write: the instruction is done, the value in the page."""
        return load("write_nodecode")(self.common.handle, v.index, exit.info1 & _PAGE)

    def _eoi_induced(self, v: Vcpu, exit: Exit) -> int:
        """handle_apic_eoi_induced."""
        return load("set_eoi_accelerated")(self.common.handle, v.index, exit.info1 & 0xFF)

    def _tpr_below_threshold(self, v: Vcpu, exit: Exit) -> None:
        """handle_tpr_below_threshold."""
        load("tpr_below_threshold")(self.common.handle, v.index)

    def _ept_violation(self, v: Vcpu, exit: Exit) -> int | KvmExit:
        """handle_ept_violation at an address without memory."""
        if self.common.cannot_emulate(v, exit):
            return KvmExit.INTERNAL_ERROR
        return self.common.emulate(v, exit)

    def _io(self, v: Vcpu, exit: Exit) -> int:
        """handle_io."""
        return self.common.io(v, exit, self.io_access(exit.info1))

    def io_info(self, access: PortAccess) -> int:
        """The exit qualification of an I/O instruction."""
        return R.VMX_IO.encode({"SIZE": access.size - 1, "IN": int(not access.write), "PORT": access.port})

    def io_access(self, info1: int) -> PortAccess:
        """What an exit qualification says; ValueError where it names no size."""
        size = (info1 & R.VMX_IO_SIZE) + 1
        if size not in (1, 2, 4):
            raise ValueError(f"I/O instruction of {size} bytes: bits 2:0 of its exit qualification are 0, 1 or 3")
        return PortAccess(info1 >> R.IO_PORT_SHIFT & R.IO_PORT, size, not info1 & R.VMX_IO_IN)

    def _exception(self, v: Vcpu, exit: Exit) -> int | KvmExit | None:
        """handle_exception_nmi: an exception during the delivery of an event is an error, except where KVM is done."""
        kind, vector = exit.intr_info >> 8 & 7, exit.intr_info & 0xFF
        simultaneous = exit.info2 & R.VECTORING_INFO_VALID and vector not in _BEFORE_SIMULTANEOUS
        if kind != R.INTR_TYPE_NMI and simultaneous:
            return KvmExit.INTERNAL_ERROR
        return self.common.exception(v, exit)

    def _l0_wants(self, v: Vcpu, exit: Exit) -> bool:
        """nested_vmx_l0_wants_exit of exceptions: the host's NMIs, and #DB while user space debugs the guest."""
        if exit.reason != VmxExit.EXCEPTION_NMI:
            return False
        kind, vector = exit.intr_info >> 8 & 7, exit.intr_info & 0xFF
        debugged = self.common.memory[v.own + L.K_GUEST_DEBUG]
        return kind == R.INTR_TYPE_NMI or bool(vector == R.VECTOR_DB and debugged)

    def failed_entry(self, reason: int) -> tuple[int, bool]:
        """The basic reason, and whether its bit 31 says that the entry failed."""
        return reason & ~VMX_FAILED_VMENTRY, bool(reason & VMX_FAILED_VMENTRY)

    def handle_exit(self, loop: Dispatcher, v: Vcpu, exit: Exit, code: int) -> int:
        """vmx_handle_exit: each early return happens whether or not the fast path has acted already."""
        nested = self.common.memory[v.hot + L.HOT_FLAGS] & L.FLAG_L2
        if nested and exit.invalid_state:
            load("leave_l2")(self.common.handle, v.index)  # a triple fault of L2, whatever L1 intercepts
            return code
        if not self._l0_wants(v, exit) and loop.reflect_to_l1(v, exit.reason):
            return code
        if exit.invalid_state:
            return code | user_code(KvmExit.INTERNAL_ERROR)
        if exit.failed_entry:
            return code | user_code(KvmExit.FAIL_ENTRY)
        # An access to a device during delivery is an error too: up to 6.12 by its exit, in 6.18 by the emulator, which
        # covers EPT violations as well.
        if exit.info2 & R.VECTORING_INFO_VALID and not self.rows[exit.reason].vectoring:
            return code | user_code(KvmExit.INTERNAL_ERROR)
        return loop.generic(v, exit, code)
