"""An access to the APIC as the guest's CPU executes it, compiled: what needs no exit ends here, the rest exits.

Models: the border between the CPU and the hypervisor, as exits/hardware.py does with vmx.py and svm.py. apicv.py and
avic.py are the CPU's part, virtualized.py is KVM's of the exits that they make.
"""

from ..jit.declare import kernel
from . import apicv, avic, cr8, meter, steptime, virtualized
from . import typed as k
from .lapicreg import reg
from .loop import come_in, find_row, run_exit, sent
from .shared import begin_targets, hot, own
from .virtualized import LENGTH_SHIFT, OFFSET_SHIFT, WRITE

HW_WRMSR, HW_RDMSR, HW_MMIO_WRITE, HW_MMIO_READ, HW_CR8 = (k.U(i) for i in range(5))
_BYTE = k.U(0xFF)


@kernel("u8(words, u8, u8, u8, u8, u8)")
def _cpu(m, v, access, where, length, value):
    """What the CPU makes of it: CODE_HARDWARE, or CODE_EXIT with the exit's reason and information."""
    if m[k.H_CONFIG] & k.CONFIG_SVM:
        if access == HW_WRMSR:
            return avic.wrmsr(m, v, where, value)
        if access == HW_RDMSR:
            return avic.rdmsr(m, v, where)
        if access == HW_MMIO_WRITE:
            return avic.mmio_write(m, v, where, length, value)
        if access == HW_CR8:
            return cr8.move_to_cr8(m, v, value)
        return avic.mmio_read(m, v, where, length)
    if access == HW_WRMSR:
        return apicv.wrmsr(m, v, where, value)
    if access == HW_RDMSR:
        return apicv.rdmsr(m, v, where)
    if access == HW_MMIO_WRITE:
        return apicv.mmio_write(m, v, where, length, value)
    if access == HW_CR8:
        return apicv.move_to_cr8(m, v, value)
    return apicv.mmio_read(m, v, where, length)


@kernel("u8(words, u8, u8, u8, u8, u8)")
def _plain_exit(m, v, access, where, length, value):
    """The exit of an access of which the CPU virtualises nothing."""
    writes = access == HW_WRMSR or access == HW_MMIO_WRITE
    if access == HW_WRMSR or access == HW_RDMSR:
        if m[k.H_CONFIG] & k.CONFIG_SVM:
            reason = k.SVM_MSR
            info = k.ONE if writes else k.ZERO
        else:
            reason = k.VMX_MSR_WRITE if writes else k.VMX_MSR_READ
            info = k.ZERO
    else:
        reason = k.SVM_NPF if m[k.H_CONFIG] & k.CONFIG_SVM else k.VMX_EPT_MISCONFIG
        info = length | k.MMIO_WRITE if writes else length
        where = (m[own(m, v) + k.K_APIC_BASE] & ~(k.APIC_PAGE_BYTES - k.ONE)) + where
    return run_exit(m, v, find_row(m, reason, info), reason, where, value, info)


@kernel("u8(words, u8, u8, u8, u8)")
def _vmx_exit(m, v, code, how, value):
    """An exit of a virtualised APIC with its qualification."""
    reason = (code >> k.CODE_EXIT_REASON_SHIFT) & k.U(0xFFFF)
    op = virtualized.TPR_BELOW_THRESHOLD
    if reason == k.VMX_APIC_ACCESS:
        op = virtualized.APIC_ACCESS
    elif reason == k.VMX_APIC_WRITE:
        op = virtualized.APIC_WRITE
    elif reason == k.VMX_EOI_INDUCED:
        op = virtualized.EOI_INDUCED
    elif reason == k.VMX_EPT_VIOLATION:
        op = virtualized.EPT_VIOLATION
    return run_exit(m, v, op, reason, how, value, code & k.LOW32)


@kernel("u8(words, u8, u8, u8, u8)")
def _svm_exit(m, v, code, how, value):
    """One of AVIC's exits with its EXITINFO1 and EXITINFO2."""
    low = code & _BYTE
    high = (code >> k.AVIC_INDEX_SHIFT) & k.AVIC_INDEX
    if (code >> k.CODE_EXIT_REASON_SHIFT) & k.U(0xFFFF) == k.SVM_AVIC_INCOMPLETE_IPI:
        icr = (reg(m, v, k.APIC_ICR2) & k.LOW32) << k.U(32) | (reg(m, v, k.APIC_ICR) & k.LOW32)
        why = low << k.U(32) | high
        return run_exit(m, v, virtualized.INCOMPLETE_IPI, k.SVM_AVIC_INCOMPLETE_IPI, why, value, icr)
    info = (high & _BYTE) << k.U(4)
    if (code >> k.AVIC_WRITE_SHIFT) & k.ONE:
        info = info | k.AVIC_INFO1_WRITE
        how = how | WRITE
    return run_exit(m, v, virtualized.UNACCELERATED_ACCESS, k.SVM_AVIC_UNACCELERATED_ACCESS, how | low, value, info)


@kernel("u8(words, u8, u8, u8, u8, u8)")
def execute(m, v, access, where, length, value):
    """An access by HW_*, to an MSR or to an offset in the page: an outcome code; NONE, with nothing touched, for L2."""
    if m[k.H_HANDLERS] or m[hot(m, v) + k.HOT_FLAGS] & k.FLAG_L2:
        return k.NONE
    if m[hot(m, v) + k.HOT_MODE] == k.OUTSIDE_GUEST_MODE:
        come_in(m, v)
    begin_targets(m, v)
    code = _cpu(m, v, access, where, length, value)
    if not code & k.CODE_EXIT:
        if m[k.H_CONFIG] & k.CONFIG_COSTS:
            meter.reset(m, v)
            msr = access == HW_WRMSR and where == k.MSR_X2APIC_ICR
            icr = msr or (access == HW_MMIO_WRITE and where == k.APIC_ICR)
            steptime.executed(m, v, k.ONE if icr else k.ZERO, code)
        return code | sent(m, v) if m[own(m, v) + k.K_SENT] else code
    how = (where & k.U(0xFFF)) << OFFSET_SHIFT | length << LENGTH_SHIFT
    if access == HW_MMIO_WRITE:
        how = how | WRITE
    reason = (code >> k.CODE_EXIT_REASON_SHIFT) & k.U(0xFFFF)
    if m[k.H_CONFIG] & k.CONFIG_SVM:
        if access == HW_CR8:
            row = virtualized.MOVE_TO_CR8 | k.INSN_LEN_MOV_CR << k.ROW_LENGTH_SHIFT
            return run_exit(m, v, row, k.SVM_WRITE_CR8, k.ZERO, value, k.ZERO)
        if reason == k.SVM_AVIC_INCOMPLETE_IPI or reason == k.SVM_AVIC_UNACCELERATED_ACCESS:
            return _svm_exit(m, v, code, how, value)
    elif reason != k.VMX_MSR_WRITE and reason != k.VMX_MSR_READ and reason != k.VMX_EPT_MISCONFIG:
        return _vmx_exit(m, v, code, how, value)
    return _plain_exit(m, v, access, where, length, value)


@kernel("u8(words, u8, u8)")
def window(m, v, nmi):
    """The exit of an interrupt window that is open, or of an NMI window: an outcome code; NONE as in execute."""
    if m[k.H_HANDLERS] or m[hot(m, v) + k.HOT_FLAGS] & k.FLAG_L2:
        return k.NONE
    svm = m[k.H_CONFIG] & k.CONFIG_SVM
    if nmi:
        reason = k.SVM_IRET if svm else k.VMX_NMI_WINDOW
        return run_exit(m, v, virtualized.NMI_WINDOW, reason, k.ZERO, k.ZERO, k.ZERO)
    reason = k.SVM_VINTR if svm else k.VMX_INTERRUPT_WINDOW
    row = virtualized.INTERRUPT_WINDOW | k.ROW_SHORTCUT
    return run_exit(m, v, row, reason, k.ZERO, k.ZERO, k.ZERO)
