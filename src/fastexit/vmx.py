"""VMX: exit reasons, handler tables, the order of checks in vmx_handle_exit.

Models: vmx_exit_handlers_fastpath, vmx_handle_exit_irqoff, vmx_handle_exit with its early returns. Not modelled: PML,
virtual NMIs, bus locks, retpoline shortcuts (same handlers, reached without an indirect call).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastexit import regs as R
from fastexit.dispatcher import user_code
from fastexit.handlers import CommonHandlers, Handlers
from fastexit.profile import Profile, Trait
from fastexit.reasons import VMX_FAILED_VMENTRY, KvmExit, VmxExit

if TYPE_CHECKING:
    from fastexit.dispatcher import Dispatcher, Exit
    from fastexit.vcpu import Vcpu

# Exits that may happen while an event is being delivered; any other with valid vectoring information is an error.
_WHILE_VECTORING = frozenset(
    {
        VmxExit.EXCEPTION_NMI,
        VmxExit.EPT_VIOLATION,
        VmxExit.PML_FULL,
        VmxExit.APIC_ACCESS,
        VmxExit.TASK_SWITCH,
        VmxExit.EPT_MISCONFIG,
        VmxExit.NOTIFY,
    }
)


class Vmx:
    """Intel's side of the dispatcher."""

    wrmsr_reason = int(VmxExit.MSR_WRITE)
    wrmsr_info1 = 0
    rdmsr_reason = int(VmxExit.MSR_READ)
    mmio_reason = int(VmxExit.EPT_MISCONFIG)
    hardware = ""
    user_exits = {
        VmxExit.TRIPLE_FAULT: KvmExit.SHUTDOWN,
        VmxExit.IO_INSTRUCTION: KvmExit.IO,
        VmxExit.HLT: KvmExit.HLT,
        VmxExit.VMCALL: KvmExit.HYPERCALL,
        VmxExit.EPT_VIOLATION: KvmExit.MMIO,
        VmxExit.BUS_LOCK: KvmExit.X86_BUS_LOCK,
    }

    def __init__(self, profile: Profile, common: CommonHandlers) -> None:
        self.trace_exit_late = bool(profile.traits & Trait.TRACE_EXIT_LATE_VMX)
        self.fast_run = {self.wrmsr_reason: common.fast_exit}
        self.fast_irqoff = {self.wrmsr_reason: common.fast_irqoff}
        self.handlers = Handlers(
            common.memory,
            {
                VmxExit.MSR_WRITE: common.wrmsr,
                VmxExit.MSR_READ: common.rdmsr,
                VmxExit.EPT_MISCONFIG: common.apic_page,
                VmxExit.EXTERNAL_INTERRUPT: common.nothing,
                VmxExit.INTERRUPT_WINDOW: common.interrupt_window,
                VmxExit.CPUID: common.skip_instruction,
            },
        )

    def hardware_exit(self, v: Vcpu, plain: Exit, code: int) -> Exit:
        """The exit that the CPU makes of an access."""
        return plain

    def failed_entry(self, reason: int) -> tuple[int, bool]:
        """The basic reason, and whether its bit 31 says that the entry failed."""
        return reason & ~VMX_FAILED_VMENTRY, bool(reason & VMX_FAILED_VMENTRY)

    def handle_exit(self, loop: Dispatcher, v: Vcpu, exit: Exit, code: int) -> int:
        """vmx_handle_exit: each early return happens whether or not the fast path has acted already."""
        if loop.reflect_to_l1(v):
            return code
        if exit.invalid_state:
            return code | user_code(KvmExit.INTERNAL_ERROR)
        if exit.failed_entry:
            return code | user_code(KvmExit.FAIL_ENTRY)
        if exit.info2 & R.VECTORING_INFO_VALID and exit.reason not in _WHILE_VECTORING:
            return code | user_code(KvmExit.INTERNAL_ERROR)
        return loop.generic(v, exit, code)
