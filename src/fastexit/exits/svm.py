"""SVM: handlers of its own exits, the order of checks in svm_handle_exit. table.py says which exit has which handler.

Models: svm_exit_handlers_fastpath, svm_handle_exit_irqoff, svm_handle_exit. RDMSR and WRMSR share exit code 0x7C;
EXITINFO1 tells them apart. The seed compared the code with VMX's 32 instead, which is a DR0 read here.
AVIC's exits: an incomplete IPI has the ICR in EXITINFO1, its AvicIpi number and index in the halves of EXITINFO2; an
unaccelerated access has the register (bits 11:4) and bit 32 for a write in EXITINFO1, the vector in EXITINFO2.
Not modelled: SEV, intercepted exceptions, virtual interrupt bookkeeping, next-RIP decoding without NRIPS.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastexit import layout as L
from fastexit import regs as R
from fastexit.exits.exit import Exit, FastHandler, PortAccess
from fastexit.exits.handlers import CommonHandlers, Handlers, bound_handlers, user_code
from fastexit.exits.table import SVM
from fastexit.jit.declare import load
from fastexit.outcome import CODE_EXIT, CODE_EXIT_REASON_SHIFT, CODE_REFUSAL_SHIFT, Refusal
from fastexit.profile import Profile
from fastexit.reasons import KvmExit, SvmExit, VmxExit
from fastexit.traits import Trait

if TYPE_CHECKING:
    from fastexit.exits.dispatcher import Dispatcher
    from fastexit.vcpu import Vcpu


class Svm:
    """AMD's side of the dispatcher."""

    wrmsr_reason: int = int(SvmExit.MSR)
    wrmsr_info1: int = 1
    rdmsr_reason: int = int(SvmExit.MSR)
    mmio_reason: int = int(SvmExit.NPF)
    interrupt_reason: int = int(SvmExit.INTERRUPT)
    window_reason: int = int(SvmExit.VINTR)
    nmi_window_reason: int = int(SvmExit.IRET)
    forced_reason: int = int(SvmExit.INTERRUPT)
    hypercall_reason: int = int(SvmExit.VMMCALL)
    io_reason: int = int(SvmExit.IO)
    memory_reasons: frozenset[int] = frozenset({int(SvmExit.NPF)})
    rows = SVM
    hardware = "avic"

    def __init__(self, profile: Profile, common: CommonHandlers) -> None:
        self.trace_exit_late: bool = bool(profile.traits & Trait.TRACE_EXIT_LATE_SVM)
        self.common = common
        self.fast_run: dict[int, FastHandler] = bound_handlers(self, common, profile, "fast")
        self.fast_irqoff: dict[int, FastHandler] = bound_handlers(self, common, profile, "irqoff")
        if profile.traits & Trait.SVM_EXIT_32:
            self.fast_irqoff = {int(VmxExit.MSR_WRITE): common.fast_wrmsr_irqoff, self.wrmsr_reason: self._wrong_code}
        self.handlers: Handlers = Handlers(common.memory, bound_handlers(self, common, profile, "handler"))

    def _fast_msr(self, v: Vcpu, exit: Exit) -> int:
        return self.common.fast_wrmsr(v, exit) if exit.info1 else self.common.declined(v, exit)

    def _fast_msr_irqoff(self, v: Vcpu, exit: Exit) -> int:
        return self.common.fast_wrmsr_irqoff(v, exit) if exit.info1 else self.common.declined(v, exit)

    def _wrong_code(self, v: Vcpu, exit: Exit) -> int:
        """A real WRMSR under a kernel that waits for exit code 32."""
        refusal = Refusal.NOT_AN_MSR_WRITE
        if exit.info1:
            on = self.common.memory[L.H_CONFIG] & L.CONFIG_FASTPATH
            refusal = Refusal.SVM_EXIT_CODE if on else Refusal.SWITCHED_OFF
        return refusal << CODE_REFUSAL_SHIFT

    def _msr(self, v: Vcpu, exit: Exit) -> int:
        return self.common.wrmsr(v, exit) if exit.info1 else self.common.rdmsr(v, exit)

    def _read_dr0(self, v: Vcpu, exit: Exit) -> int:
        """dr_interception for DR0: the intercepts are cleared and the guest reads DR0 by itself, at the same RIP.

        Where user space debugs the guest it is emulated: the destination register, here v.read_data, gets DR0.
        """
        mem = self.common.memory
        if not mem[v.own + L.K_GUEST_DEBUG]:
            mem[v.own + L.K_DR_CLEARED] = mem[v.own + L.K_IRQ_WINDOWS] + 1
            return 0
        mem[v.own + L.K_MSR_DATA] = mem[v.own + L.K_DR0]
        return self.common.skip_instruction(v, exit)

    def _read_cr8(self, v: Vcpu, exit: Exit) -> int:
        return self.common.cr8(v, exit, write=False)

    def _write_cr8(self, v: Vcpu, exit: Exit) -> int:
        return self.common.cr8(v, exit, write=True)

    def cut_short(self, exit: Exit) -> int:
        """EXITINTINFO: the event during whose delivery the exit happened."""
        return exit.intr_info

    def _interrupt_window(self, v: Vcpu, exit: Exit) -> int:
        """interrupt_window_interception: the window that AVIC was inhibited for is open."""
        self.common.interrupt_window(v, exit)
        return load("irq_window")(self.common.handle, v.index, 0)

    def _incomplete_ipi(self, v: Vcpu, exit: Exit) -> int:
        """avic_incomplete_ipi_interception."""
        return load("avic_incomplete_ipi")(self.common.handle, v.index, exit.info1, exit.info2)

    def _unaccelerated_access(self, v: Vcpu, exit: Exit) -> int:
        """avic_unaccelerated_access_interception: a trap's value is in the page already, the rest is emulated."""
        offset = exit.info1 & R.AVIC_OFFSET
        code = load("avic_unaccelerated")(self.common.handle, v.index, offset)
        if not code & CODE_EXIT:
            return code
        write = bool(exit.info1 & R.AVIC_INFO1_WRITE)
        if self.common.memory[v.hot + L.HOT_FLAGS] & L.FLAG_X2APIC:
            access = Exit(self.wrmsr_reason, R.MSR_X2APIC_BASE + (offset >> 4), exit.value, int(write))
            return self._msr(v, access)
        within = exit.gpa & ~R.AVIC_OFFSET & 0xFFF
        access = Exit(
            self.mmio_reason,
            value=exit.value,
            gpa=v.apic_page + (offset | within),
            size=exit.size,
            write=write,
            length=exit.length,
        )
        return self.common.emulate(v, access)

    def _io(self, v: Vcpu, exit: Exit) -> int:
        """io_interception."""
        return self.common.io(v, exit, self.io_access(exit.info1))

    def io_info(self, access: PortAccess) -> int:
        """EXITINFO1 of an I/O instruction."""
        return R.SVM_IO.encode({"SIZE": access.size, "IN": int(not access.write), "PORT": access.port})

    def io_access(self, info1: int) -> PortAccess:
        """What an EXITINFO1 says; ValueError where it names no size."""
        size = (info1 & R.SVM_IO_SIZE) >> R.SVM_IO_SIZE_SHIFT
        if size not in (1, 2, 4):
            raise ValueError(f"I/O instruction of no size: of bits 6:4 of EXITINFO1, here {size:#x}, one is to be set")
        return PortAccess(info1 >> R.IO_PORT_SHIFT & R.IO_PORT, size, not info1 & R.SVM_IO_IN)

    def cr8_exit(self, value: int) -> Exit:
        """MOV to CR8 that exits."""
        return Exit(SvmExit.WRITE_CR8, value=value, length=R.INSN_LEN_MOV_CR)

    def hardware_exit(self, v: Vcpu, plain: Exit, code: int) -> Exit:
        """The exit that the CPU makes of an access; what AVIC has no part in is the plain one."""
        reason = code >> CODE_EXIT_REASON_SHIFT & 0xFFFF
        if reason not in (SvmExit.AVIC_INCOMPLETE_IPI, SvmExit.AVIC_UNACCELERATED_ACCESS):
            return plain
        low, high = code & 0xFF, code >> R.AVIC_INDEX_SHIFT & R.AVIC_INDEX
        if reason == SvmExit.AVIC_INCOMPLETE_IPI:
            mem, page = self.common.memory, L.PAGE + v.index * L.PAGE_STRIDE
            icr, icr2 = (mem[page + (offset >> 3)] & 0xFFFF_FFFF for offset in (R.APIC_ICR, R.APIC_ICR2))
            return Exit(reason, info1=icr2 << 32 | icr, info2=low << 32 | high)
        info1 = (high & 0xFF) << 4 | (R.AVIC_INFO1_WRITE if code >> R.AVIC_WRITE_SHIFT & 1 else 0)
        return Exit(
            reason,
            value=plain.value,
            info1=info1,
            info2=low,
            gpa=plain.gpa,
            size=plain.size,
            write=plain.write,
            length=plain.length,
        )

    def failed_entry(self, reason: int) -> tuple[int, bool]:
        """The exit code, and whether it is the one for an invalid VMCB."""
        return reason, reason == SvmExit.ERR

    def handle_exit(self, loop: Dispatcher, v: Vcpu, exit: Exit, code: int) -> int:
        """svm_handle_exit."""
        if loop.reflect_to_l1(v, exit.reason):
            return code
        if exit.failed_entry:
            return code | user_code(KvmExit.FAIL_ENTRY)
        return loop.generic(v, exit, code)
