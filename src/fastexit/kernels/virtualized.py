"""Exits that a CPU makes of an access to its virtualised APIC, and those of windows: their generic handlers, compiled.

Models: handle_apic_access, handle_apic_write, handle_apic_eoi_induced, handle_tpr_below_threshold,
handle_ept_violation at the APIC's page, avic_incomplete_ipi_interception, avic_unaccelerated_access_interception, as
exits/vmx.py and svm.py have them. instruction.py makes these exits; no row of exits/table.py has their operations.

``info`` is the exit qualification, or EXITINFO1. ``where`` is EXITINFO2 of an incomplete IPI; else how the page was
accessed: the vector of EXITINFO2 in bits 7:0, the offset from bit 8 on, the length from bit 24 on, and WRITE.
"""

from fastexit.exits.table import Op

from ..jit.declare import kernel
from . import accelerated, avic, bus, inhibit, msr
from . import typed as k
from .shared import hot, make_request, own

APIC_ACCESS, APIC_WRITE, EOI_INDUCED, TPR_BELOW_THRESHOLD, EPT_VIOLATION, INCOMPLETE_IPI, UNACCELERATED_ACCESS = (
    k.U(max(Op) + 1 + i) for i in range(7)
)
INTERRUPT_WINDOW, NMI_WINDOW, MOVE_TO_CR8 = (UNACCELERATED_ACCESS + k.U(1 + i) for i in range(3))
"""Operations behind those of exits/table.py."""
OFFSET_SHIFT, LENGTH_SHIFT = k.U(8), k.U(24)
WRITE = k.ONE << k.U(32)
_BYTE, _PAGE = k.U(0xFF), k.U(0xFFF)


@kernel("u8(u8, u8)")
def second_info(op, where):
    """EXITINFO2 of AVIC's exits; the others have nothing there."""
    if op == INCOMPLETE_IPI:
        return where
    return where & _BYTE if op == UNACCELERATED_ACCESS else k.ZERO


@kernel("u8(words, u8, u8, u8, u8)")
def _emulate(m, v, offset, where, value):
    """The instruction emulator at the vCPU's page. RIP does not move: the instruction's length is unknown."""
    access = (where >> LENGTH_SHIFT) & _BYTE
    if where & WRITE:
        access = access | k.ACCESS_WRITE
    return bus.emulate(m, v, (m[own(m, v) + k.K_APIC_BASE] & ~_PAGE) + offset, access, value, k.ZERO)


@kernel("u8(words, u8, u8, u8, u8)")
def _apic_access(m, v, where, value, info):
    """handle_apic_access: a write to EOI needs no decoding."""
    offset = info & _PAGE
    if info >> k.APIC_ACCESS_TYPE_SHIFT == k.APIC_ACCESS_WRITE and offset == k.APIC_EOI:
        return accelerated.access_eoi(m, v, k.ZERO)
    return _emulate(m, v, offset, where, value)


@kernel("u8(words, u8, u8, u8, u8)")
def _unaccelerated(m, v, where, value, info):
    """avic_unaccelerated_access_interception: a trap's value is in the page already, the rest is emulated."""
    offset = info & k.AVIC_OFFSET
    code = avic.unaccelerated(m, v, offset)
    if not code & k.CODE_EXIT:
        return code
    if m[hot(m, v) + k.HOT_FLAGS] & k.FLAG_X2APIC:
        number = k.MSR_X2APIC_BASE + (offset >> k.U(4))
        if info & k.AVIC_INFO1_WRITE:
            return msr.emulate_wrmsr(m, v, number, value, k.ZERO)
        return msr.emulate_rdmsr(m, v, number, k.ZERO)
    within = (where >> OFFSET_SHIFT) & _PAGE & ~k.AVIC_OFFSET
    return _emulate(m, v, offset | within, where, value)


@kernel("u8(words, u8, u8)")
def _window(m, v, nmi):
    """handle_interrupt_window, handle_nmi_window; SVM's VINTR, and its IRET, behind which NMIs are unmasked."""
    row, svm = own(m, v), m[k.H_CONFIG] & k.CONFIG_SVM
    m[row + (k.K_NMI_WINDOW if nmi else k.K_IRQ_WINDOW)] = k.ZERO
    if nmi and svm:
        m[row + k.K_NMI_MASKED] = k.ZERO
    make_request(m, v, k.REQ_EVENT)
    return k.ZERO if nmi else inhibit.irq_window(m, v, k.ZERO)


@kernel("u8(words, u8, u8, u8, u8, u8)")
def operate(m, v, op, where, value, info):
    """Do what the exit asks for: an outcome code."""
    if op == APIC_ACCESS:
        return _apic_access(m, v, where, value, info)
    if op == APIC_WRITE:
        return accelerated.write_nodecode(m, v, info & _PAGE)
    if op == EOI_INDUCED:
        return accelerated.set_eoi(m, v, info & _BYTE)
    if op == TPR_BELOW_THRESHOLD:
        accelerated.tpr_below_threshold(m, v)
        return k.ZERO
    if op == EPT_VIOLATION:
        return _emulate(m, v, (where >> OFFSET_SHIFT) & _PAGE, where, value)
    if op == INCOMPLETE_IPI:
        return avic.incomplete_ipi(m, v, info, where)
    if op == INTERRUPT_WINDOW or op == NMI_WINDOW:
        return _window(m, v, k.ONE if op == NMI_WINDOW else k.ZERO)
    if op == MOVE_TO_CR8:
        return msr.emulate_cr8(m, v, value, k.ONE)
    return _unaccelerated(m, v, where, value, info)
