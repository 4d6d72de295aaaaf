"""VMX: exit reasons, handler tables, the order of checks in vmx_handle_exit.

Models: vmx_exit_handlers_fastpath, vmx_handle_exit_irqoff, vmx_handle_exit with its early returns and its retpoline
shortcuts (the same handlers, reached without an indirect call), and the exits of a virtualised APIC:
handle_apic_access, handle_apic_write, handle_apic_eoi_induced, handle_tpr_below_threshold, handle_ept_violation on the
APIC's page. Not modelled: PML, virtual NMIs, bus locks.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from fastexit import layout as L
from fastexit import regs as R
from fastexit.exits.handlers import CommonHandlers, Handlers, user_code
from fastexit.jit.declare import load
from fastexit.outcome import CODE_EXIT_REASON_SHIFT
from fastexit.profile import Profile, Trait
from fastexit.reasons import VMX_FAILED_VMENTRY, KvmExit, VmxExit

if TYPE_CHECKING:
    from fastexit.exits.dispatcher import Dispatcher
    from fastexit.exits.exit import Exit, Handler
    from fastexit.vcpu import Vcpu

# Exits that may happen while an event is being delivered; any other with valid vectoring information is an error. So is
# an access to a device: up to 6.12 by its exit, in 6.18 by the emulator, which covers EPT violations as well.
_WHILE_VECTORING = frozenset(
    {
        VmxExit.EXCEPTION_NMI,
        VmxExit.EPT_VIOLATION,
        VmxExit.PML_FULL,
        VmxExit.APIC_ACCESS,
        VmxExit.TASK_SWITCH,
        VmxExit.NOTIFY,
    }
)

_BEFORE_SIMULTANEOUS = frozenset({R.VECTOR_UD, R.VECTOR_NM, R.VECTOR_GP, R.VECTOR_PF, R.VECTOR_MC})

_PAGE = 0xFFF
_QUALIFICATION = 0xFFFF_FFFF


class Vmx:
    """Intel's side of the dispatcher."""

    wrmsr_reason = int(VmxExit.MSR_WRITE)
    wrmsr_info1 = 0
    rdmsr_reason = int(VmxExit.MSR_READ)
    mmio_reason = int(VmxExit.EPT_MISCONFIG)
    interrupt_reason = int(VmxExit.EXTERNAL_INTERRUPT)
    forced_reason = int(VmxExit.PREEMPTION_TIMER)
    hypercall_reason = int(VmxExit.VMCALL)
    lengths = {
        int(VmxExit.MSR_WRITE): R.INSN_LEN_WRMSR,
        int(VmxExit.MSR_READ): R.INSN_LEN_WRMSR,
        int(VmxExit.MSR_WRITE_IMM): R.INSN_LEN_WRMSR_IMM,
        int(VmxExit.MSR_READ_IMM): R.INSN_LEN_WRMSR_IMM,
        int(VmxExit.HLT): R.INSN_LEN_HLT,
        int(VmxExit.CPUID): 2,
        int(VmxExit.INVD): 2,
        int(VmxExit.WBINVD): 2,
        int(VmxExit.PAUSE_INSTRUCTION): 2,
        int(VmxExit.VMCALL): 3,
        int(VmxExit.CR_ACCESS): R.INSN_LEN_MOV_CR,
    }
    l0_wants = frozenset(
        int(reason)
        for reason in (
            VmxExit.EXTERNAL_INTERRUPT,
            VmxExit.PREEMPTION_TIMER,
            VmxExit.EPT_VIOLATION,
            VmxExit.EPT_MISCONFIG,
            VmxExit.MCE_DURING_VMENTRY,
            VmxExit.VMFUNC,
            VmxExit.PML_FULL,
            VmxExit.BUS_LOCK,
            VmxExit.NOTIFY,
        )
    )
    shortcuts = frozenset(
        int(reason)
        for reason in (
            VmxExit.MSR_WRITE,
            VmxExit.MSR_WRITE_IMM,
            VmxExit.PREEMPTION_TIMER,
            VmxExit.INTERRUPT_WINDOW,
            VmxExit.EXTERNAL_INTERRUPT,
            VmxExit.HLT,
            VmxExit.EPT_MISCONFIG,
        )
    )
    hardware = "apicv"
    user_exits = {
        VmxExit.TRIPLE_FAULT: KvmExit.SHUTDOWN,
        VmxExit.IO_INSTRUCTION: KvmExit.IO,
        VmxExit.EPT_VIOLATION: KvmExit.MMIO,
        VmxExit.BUS_LOCK: KvmExit.X86_BUS_LOCK,
    }

    def __init__(self, profile: Profile, common: CommonHandlers) -> None:
        self.trace_exit_late = bool(profile.traits & Trait.TRACE_EXIT_LATE_VMX)
        self.common = common
        self.fast_run: dict[int, Handler] = {
            self.wrmsr_reason: common.fast_wrmsr,
            int(VmxExit.PREEMPTION_TIMER): common.fast_preemption_timer,
            int(VmxExit.HLT): common.fast_hlt,
            int(VmxExit.INVD): common.fast_invd,
        }
        self.fast_irqoff = {self.wrmsr_reason: common.fast_irqoff}
        self.handlers = Handlers(
            common.memory,
            {
                VmxExit.MSR_WRITE: common.wrmsr,
                VmxExit.MSR_READ: common.rdmsr,
                VmxExit.EPT_MISCONFIG: common.apic_page,
                VmxExit.EPT_VIOLATION: self._ept_violation,
                VmxExit.APIC_ACCESS: self._apic_access,
                VmxExit.APIC_WRITE: self._apic_write,
                VmxExit.EOI_INDUCED: self._eoi_induced,
                VmxExit.TPR_BELOW_THRESHOLD: self._tpr_below_threshold,
                VmxExit.EXTERNAL_INTERRUPT: common.nothing,
                VmxExit.INTERRUPT_WINDOW: common.interrupt_window,
                VmxExit.NMI_WINDOW: common.nmi_window,
                VmxExit.EXCEPTION_NMI: self._exception,
                VmxExit.PREEMPTION_TIMER: common.preemption_timer,
                VmxExit.HLT: common.hlt,
                VmxExit.VMCALL: common.hypercall,
                VmxExit.CR_ACCESS: self._cr_access,
                VmxExit.CPUID: common.skip_instruction,
                VmxExit.INVD: common.skip_instruction,
                VmxExit.WBINVD: common.skip_instruction,
                VmxExit.PAUSE_INSTRUCTION: common.skip_instruction,
            },
        )
        if profile.traits & Trait.MSR_IMM:
            self.fast_run[int(VmxExit.MSR_WRITE_IMM)] = common.fast_wrmsr
            self.handlers.data[int(VmxExit.MSR_WRITE_IMM)] = common.wrmsr
            self.handlers.data[int(VmxExit.MSR_READ_IMM)] = common.rdmsr

    def _cr_access(self, v: Vcpu, exit: Exit) -> int:
        """handle_cr for CR8 (qualification bits 3:0 number, 5:4 type: 0 to, 1 from); other registers are the MMU's."""
        if exit.info1 & 0xF != 8 or exit.info1 >> 4 & 3 > 1:
            return user_code(KvmExit.INTERNAL_ERROR)
        # KVM takes 8 bits of the register here, so that bits above them do not fault as they do on SVM.
        return self.common.cr8(v, replace(exit, value=exit.value & 0xFF), write=exit.info1 >> 4 & 3 == 0)

    def cut_short(self, exit: Exit) -> int:
        """IDT-vectoring information: the event during whose delivery the exit happened."""
        return exit.info2

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
        return self.common.apic_page(v, replace(exit, offset=offset, write=write))

    def _apic_write(self, v: Vcpu, exit: Exit) -> int:
        """handle_apic_write: the instruction is done, the value in the page."""
        return load("write_nodecode")(self.common.handle, v.index, exit.info1 & _PAGE)

    def _eoi_induced(self, v: Vcpu, exit: Exit) -> None:
        """handle_apic_eoi_induced."""
        load("set_eoi_accelerated")(self.common.handle, v.index, exit.info1 & 0xFF)

    def _tpr_below_threshold(self, v: Vcpu, exit: Exit) -> None:
        """handle_tpr_below_threshold."""
        load("tpr_below_threshold")(self.common.handle, v.index)

    def _ept_violation(self, v: Vcpu, exit: Exit) -> int | KvmExit:
        """handle_ept_violation: nothing but the APIC's page is emulated here, other devices are user space's."""
        base = self.common.memory[v.own + L.K_APIC_BASE] & R.APICBASE.mask("BASE")
        if exit.gpa & ~_PAGE != base:
            return KvmExit.INTERNAL_ERROR if self.common.cannot_emulate(v, exit) else KvmExit.MMIO
        return self.common.apic_page(v, replace(exit, offset=exit.gpa & _PAGE, gpa=0))

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
        if exit.info2 & R.VECTORING_INFO_VALID and exit.reason not in _WHILE_VECTORING:
            return code | user_code(KvmExit.INTERNAL_ERROR)
        return loop.generic(v, exit, code)
