"""List the exit reasons of VMX and SVM, one row each, with everything that depends on the reason alone.

One table, because a reason's name, length, handlers, compiled operation and cost belong together. It is data: vmx.py
and svm.py bind the handlers, kernels/loop.py does the operations, costs/meter.py knows the work, tracepoints/names.py
prints the names. A new exit needs its number in reasons.py, a row here and the handler that the row names. For the
compiled loop it needs an operation, in ``Op`` and in ``operate`` of kernels/loop.py; with the handler "operation" the
Python dispatcher takes the same one.

Sources: kvm_vmx_exit_handlers, svm_exit_handlers, VMX_EXIT_REASONS, SVM_EXIT_REASONS, vmx_exit_handlers_fastpath,
svm_exit_handlers_fastpath, nested_vmx_l0_wants_exit, nested_svm_exit_special.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from enum import IntEnum
from typing import NamedTuple

from fastexit import regs as R
from fastexit.reasons import KvmExit, SvmExit, VmxExit
from fastexit.traits import OLDEST, Trait


class Op(IntEnum):
    """What the compiled run loop does for an exit, in place of the row's ``handler``."""

    NONE = 0
    """Nothing: the exit goes to the Python dispatcher."""
    WRMSR = 1
    RDMSR = 2
    MSR = 3
    """WRMSR or RDMSR, as EXITINFO1 says."""
    MMIO_WRITE = 4
    MMIO_READ = 5
    MMIO = 6
    """A write or a read of memory, as the exit record says."""
    NOTHING = 7
    HLT = 8
    TIMER = 9
    IO_WRITE = 10
    IO_READ = 11
    IO = 12
    """A write to or a read from a port, as the exit qualification or EXITINFO1 says."""
    HYPERCALL = 13


class Row(NamedTuple):
    """One exit reason of one vendor.

    ``name`` is what kvm_exit prints since release ``since``, by default the number's name in reasons.py, and in hex
    where it is empty; ``renamed`` is the release that changed it, and the new name. ``length`` is the length of the
    instruction that exits. ``handler`` and ``fast`` are the generic and the fast handler, ``irqoff`` is the fast one of
    the generations that had it in handle_exit_irqoff: each a method of the vendor (vmx.py, svm.py) or of
    CommonHandlers. An exit with a ``trait`` has its handlers only in generations with it. ``fast_trait`` is what the
    fast handler itself asks for; ``srcu`` says that it takes SRCU where its generation does (SRCU_IN_FASTPATH).
    ``operation`` is the compiled twin of the handlers; a row with a trait has none. ``shortcut``: a retpoline kernel
    calls the generic handler directly. ``l0_wants``: L0 keeps the exit, whatever L1 intercepts. ``vectoring``: on VMX
    it may happen while an event is being delivered. ``user`` is what KVM_RUN returns with where no handler is.
    ``work`` is what the handlers cost, a name in costs/meter.WORKS.
    """

    reason: int
    name: str | None = None
    since: str = OLDEST
    renamed: tuple[str, str] | None = None
    length: int = 0
    handler: str | None = None
    fast: str | None = None
    irqoff: str | None = None
    trait: Trait = Trait(0)
    fast_trait: Trait = Trait(0)
    srcu: bool = False
    operation: Op = Op.NONE
    shortcut: bool = False
    l0_wants: bool = False
    vectoring: bool = False
    user: KvmExit = KvmExit.INTERNAL_ERROR
    work: str = "other"

    def names(self) -> dict[str, str]:
        """Give the names that kvm_exit prints, each under the first release that has it."""
        return {self.since: self.name} | dict([self.renamed] if self.renamed else []) if self.name else {}


class Table(dict[int, Row]):
    """exit reason -> row. A number without one is an exit that nothing handles and that has no name."""

    def __init__(self, rows: Iterable[Row], spelled: Callable[[str], str]) -> None:
        for row in rows:
            if row.reason in self:
                raise ValueError(f"two rows for exit {row.reason!r}")
            name = spelled(row.reason.name) if row.name is None else row.name  # type: ignore[attr-defined]
            self[int(row.reason)] = row._replace(name=name)

    def __missing__(self, reason: int) -> Row:
        return Row(reason, name="")


def _named(*reasons: int) -> list[Row]:
    """Rows of exits that have a name and no handler."""
    return [Row(reason) for reason in reasons]


_V, _S, _T, _K = VmxExit, SvmExit, Trait, KvmExit
_MSR, _MSR_IMM, _MOV_CR, _HLT = R.INSN_LEN_WRMSR, R.INSN_LEN_WRMSR_IMM, R.INSN_LEN_MOV_CR, R.INSN_LEN_HLT
_SKIP = "skip_instruction"

# fmt: off
VMX = Table(
    [
        Row(_V.EXCEPTION_NMI, handler="_exception", vectoring=True, work="silent"),
        Row(_V.EXTERNAL_INTERRUPT, handler="nothing", operation=Op.NOTHING, shortcut=True, l0_wants=True, work="none"),
        Row(_V.TRIPLE_FAULT, user=_K.SHUTDOWN),
        Row(_V.SIPI_SIGNAL, since="6.1"),
        Row(_V.OTHER_SMI, name=""),
        Row(_V.INTERRUPT_WINDOW, name="PENDING_INTERRUPT", renamed=("5.6", "INTERRUPT_WINDOW"),
            handler="interrupt_window", shortcut=True, work="silent"),
        Row(_V.NMI_WINDOW, handler="nmi_window", work="silent"),
        Row(_V.TASK_SWITCH, vectoring=True),
        Row(_V.CPUID, length=2, handler=_SKIP),
        Row(_V.HLT, length=_HLT, handler="hlt", fast="fast_hlt", fast_trait=_T.HLT_FAST, srcu=True,
            operation=Op.HLT, shortcut=True, work="halt"),
        Row(_V.INVD, length=2, handler=_SKIP, fast="fast_invd", fast_trait=_T.INVD_FAST),
        Row(_V.VMCALL, length=3, handler="hypercall", operation=Op.HYPERCALL, work="hypercall"),
        Row(_V.CR_ACCESS, length=_MOV_CR, handler="_cr_access"),
        Row(_V.IO_INSTRUCTION, handler="_io", operation=Op.IO, work="port"),
        Row(_V.MSR_READ, length=_MSR, handler="rdmsr", operation=Op.RDMSR, work="rdmsr"),
        Row(_V.MSR_WRITE, length=_MSR, handler="wrmsr", fast="fast_wrmsr", irqoff="fast_wrmsr_irqoff", srcu=True,
            operation=Op.WRMSR, shortcut=True, work="wrmsr"),
        Row(_V.PAUSE_INSTRUCTION, length=2, handler=_SKIP),
        Row(_V.MCE_DURING_VMENTRY, l0_wants=True),
        Row(_V.TPR_BELOW_THRESHOLD, handler="_tpr_below_threshold", work="lapic"),
        Row(_V.APIC_ACCESS, handler="_apic_access", vectoring=True, work="apic_access"),
        Row(_V.EOI_INDUCED, handler="_eoi_induced", work="lapic"),
        Row(_V.EPT_VIOLATION, handler="_ept_violation", l0_wants=True, vectoring=True, work="page"),
        Row(_V.EPT_MISCONFIG, handler="mmio", operation=Op.MMIO, shortcut=True, l0_wants=True, work="page"),
        Row(_V.PREEMPTION_TIMER, handler="operation", fast="fast_preemption_timer",
            fast_trait=_T.PREEMPTION_TIMER_FAST, operation=Op.TIMER, shortcut=True, l0_wants=True, work="timer"),
        Row(_V.WBINVD, length=2, handler=_SKIP),
        Row(_V.APIC_WRITE, handler="_apic_write", work="apic_write"),
        Row(_V.VMFUNC, l0_wants=True),
        Row(_V.PML_FULL, l0_wants=True, vectoring=True),
        Row(_V.BUS_LOCK, since="6.1", l0_wants=True, user=_K.X86_BUS_LOCK),
        Row(_V.NOTIFY, since="6.1", l0_wants=True, vectoring=True),
        Row(_V.MSR_READ_IMM, since="6.18", length=_MSR_IMM, handler="rdmsr", trait=_T.MSR_IMM, work="rdmsr"),
        Row(_V.MSR_WRITE_IMM, since="6.18", length=_MSR_IMM, handler="wrmsr", fast="fast_wrmsr", trait=_T.MSR_IMM,
            shortcut=True, work="wrmsr"),
        *_named(
            _V.INIT_SIGNAL, _V.INVLPG, _V.RDPMC, _V.RDTSC, _V.VMCLEAR, _V.VMLAUNCH, _V.VMPTRLD, _V.VMPTRST, _V.VMREAD,
            _V.VMRESUME, _V.VMWRITE, _V.VMOFF, _V.VMON, _V.DR_ACCESS, _V.INVALID_STATE, _V.MSR_LOAD_FAIL,
            _V.MWAIT_INSTRUCTION, _V.MONITOR_TRAP_FLAG, _V.MONITOR_INSTRUCTION, _V.GDTR_IDTR, _V.LDTR_TR, _V.INVEPT,
            _V.RDTSCP, _V.INVVPID, _V.XSETBV, _V.RDRAND, _V.INVPCID, _V.ENCLS, _V.RDSEED, _V.XSAVES, _V.XRSTORS,
            _V.UMWAIT, _V.TPAUSE,
        ),
    ],
    spelled=str,
)

_EXCEPTIONS = {
    0: "DE", 1: "DB", 3: "BP", 4: "OF", 5: "BR", 6: "UD", 7: "NM", 8: "DF", 10: "TS", 11: "NP", 12: "SS", 13: "GP",
    14: "PF", 16: "MF", 17: "AC", 18: "MC", 19: "XF",
}

SVM = Table(
    [
        Row(_S.READ_CR8, length=_MOV_CR, handler="_read_cr8"),
        Row(_S.WRITE_CR8, length=_MOV_CR, handler="_write_cr8"),
        Row(_S.READ_DR0, handler="_read_dr0"),
        *(Row(0x40 + vector, name=f"{name} excp") for vector, name in _EXCEPTIONS.items()),
        Row(_S.INTERRUPT, handler="nothing", operation=Op.NOTHING, shortcut=True, l0_wants=True, work="none"),
        Row(_S.NMI, handler="nothing", l0_wants=True, work="silent"),
        Row(_S.VINTR, handler="_interrupt_window", shortcut=True, work="silent"),
        Row(_S.READ_TR, name="read_rt"),
        Row(_S.WRITE_TR, name="write_rt"),
        Row(_S.CPUID, length=2, handler=_SKIP),
        Row(_S.IRET, handler="iret", work="silent"),
        Row(_S.INVD, length=2, handler=_SKIP, fast="fast_invd", fast_trait=_T.INVD_FAST),
        Row(_S.PAUSE, length=2, handler=_SKIP),
        Row(_S.HLT, length=_HLT, handler="hlt", fast="fast_hlt", fast_trait=_T.HLT_FAST, srcu=True,
            operation=Op.HLT, shortcut=True, work="halt"),
        Row(_S.IO, handler="_io", operation=Op.IO, work="port"),
        Row(_S.MSR, length=_MSR, handler="_msr", fast="_fast_msr", irqoff="_fast_msr_irqoff", srcu=True,
            operation=Op.MSR, shortcut=True, work="msr"),
        Row(_S.SHUTDOWN, user=_K.SHUTDOWN),
        Row(_S.VMMCALL, name="hypercall", length=3, handler="hypercall", operation=Op.HYPERCALL, work="hypercall"),
        Row(_S.WBINVD, length=2, handler=_SKIP),
        Row(_S.WRITE_EFER_TRAP, since="6.1"),
        Row(_S.WRITE_CR0_TRAP, since="6.1"),
        Row(_S.WRITE_CR4_TRAP, since="6.1"),
        Row(_S.WRITE_CR8_TRAP, since="6.1"),
        Row(_S.INVPCID, since="5.10"),
        Row(_S.IDLE_HLT, name="idle-halt", since="6.16", length=_HLT, handler="hlt", shortcut=True, work="halt"),
        Row(_S.NPF, handler="mmio", operation=Op.MMIO, shortcut=True, l0_wants=True, work="page"),
        Row(_S.AVIC_INCOMPLETE_IPI, handler="_incomplete_ipi", work="ipi"),
        Row(_S.AVIC_UNACCELERATED_ACCESS, handler="_unaccelerated_access", work="avic_access"),
        Row(_S.VMGEXIT, since="6.1", shortcut=True),
        Row(_S.ERR, name="invalid_guest_state"),
        *_named(
            _S.READ_CR0, _S.READ_CR2, _S.READ_CR3, _S.READ_CR4, _S.WRITE_CR0, _S.WRITE_CR2, _S.WRITE_CR3, _S.WRITE_CR4,
            _S.READ_DR1, _S.READ_DR2, _S.READ_DR3, _S.READ_DR4, _S.READ_DR5, _S.READ_DR6, _S.READ_DR7, _S.WRITE_DR0,
            _S.WRITE_DR1, _S.WRITE_DR2, _S.WRITE_DR3, _S.WRITE_DR4, _S.WRITE_DR5, _S.WRITE_DR6, _S.WRITE_DR7, _S.SMI,
            _S.INIT, _S.CR0_SEL_WRITE, _S.READ_IDTR, _S.READ_GDTR, _S.READ_LDTR, _S.WRITE_IDTR, _S.WRITE_GDTR,
            _S.WRITE_LDTR, _S.RDTSC, _S.RDPMC, _S.PUSHF, _S.POPF, _S.RSM, _S.SWINT, _S.INVLPG, _S.INVLPGA,
            _S.TASK_SWITCH, _S.FERR_FREEZE, _S.VMRUN, _S.VMLOAD, _S.VMSAVE, _S.STGI, _S.CLGI, _S.SKINIT, _S.RDTSCP,
            _S.ICEBP, _S.MONITOR, _S.MWAIT, _S.XSETBV,
        ),
    ],
    spelled=str.lower,
)
# fmt: on

# ------------------------------------------------------------------------------------------------------ for kernels
ROW_OPERATION = 0xFF
ROW_SHORTCUT = 1 << 8
ROW_BY_INFO = 1 << 9
"""The operation is MSR, MMIO or IO, which the exit's information makes a read or a write."""
ROW_LENGTH_SHIFT = 16


def packed(row: Row) -> int:
    """Put what the compiled loop needs of a row into one word: operation, shortcut, length."""
    shortcut = ROW_SHORTCUT if row.shortcut else 0
    by_info = ROW_BY_INFO if row.operation in (Op.MSR, Op.MMIO, Op.IO) else 0
    return row.operation | shortcut | by_info | row.length << ROW_LENGTH_SHIFT


def packed_rows(table: Table) -> list[int]:
    """Pack the rows that have an operation, by reason from 0 on; 0 for every other reason."""
    compiled = {reason: packed(row) for reason, row in table.items() if row.operation}
    return [compiled.get(reason, 0) for reason in range(max(compiled) + 1)]
