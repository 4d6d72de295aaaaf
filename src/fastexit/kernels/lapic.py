"""The local APIC's registers as the guest and user space see them.

Models: kvm_lapic_reg_write, kvm_lapic_reg_read, kvm_x2apic_msr_read/write, apic_mmio_read/write, SVR and LVT side
effects; lapicstate.py has APICBASE, reset and the whole page, timer.py what TMICT, TDCR and LVTT do to the timer.
Spec: SDM vol. 3A 10.4-10.12.

A write returns a delivery code (see ipi.py), with CODE_GP when the register does not take it; xAPIC writes ignore the
latter, since MMIO has no way to fault.
"""

from ..jit.declare import apart, kernel
from . import typed as k
from .apicmap import mark_dirty, recalculate
from .eoi import set_eoi
from .inhibit import id_written
from .ipi import is_illegal, log_error, send, send_illegal
from .irq import update_ppr
from .lapicreg import (
    reg,
    set_reg,
    set_x2apic_icr,
    vector_slot,
    word,
    x2apic_icr,
)
from .manual import is_register, reserved, writable
from .shared import NOT_MINE, clear_word_bits, emit, hot, make_request, or_word, own
from .timer import current_count, timer_mode_mask, update_lvtt, write_tdcr, write_tmict


@kernel("u8(words, u8)")
def in_x2apic_mode(m, v):
    return m[hot(m, v) + k.HOT_FLAGS] & k.FLAG_X2APIC


@kernel("u8(words, u8, u8, u8)")
def set_flag(m, v, flag, on):
    i = hot(m, v) + k.HOT_FLAGS
    m[i] = m[i] | flag if on else m[i] & ~flag
    return k.ZERO


# --------------------------------------------------------------------------------------------------------- SVR and LVTs


@kernel("u8(words, u8, u8)")
def set_spiv(m, v, value):
    """apic_set_spiv: a change of the enable bit makes the map dirty."""
    set_reg(m, v, k.APIC_SPIV, value)
    enabled = value & k.SVR_ENABLE
    was = m[hot(m, v) + k.HOT_FLAGS] & k.FLAG_SW
    if (enabled != k.ZERO) != (was != k.ZERO):
        set_flag(m, v, k.FLAG_SW, enabled)
        mark_dirty(m)
    return k.ZERO


@kernel("u8(words)")
def lvt_count(m):
    """Number of LVT entries: CMCI is the seventh."""
    return k.U(7) if m[k.H_CONFIG] & k.CONFIG_CMCI else k.U(6)


@kernel("u8(u8)")
def lvt_offset(i):
    """Page offset of LVT entry i in KVM's order: timer, thermal, PMC, LINT0, LINT1, error, CMCI."""
    if i == k.U(6):
        return k.APIC_LVTCMCI
    return k.APIC_LVTT + (i << k.U(4))


@kernel("u8(words, u8)")
def watch_lint0(m, v):
    """apic_manage_nmi_watchdog looks at the value before it is masked; the caller stores that value first."""
    raw = reg(m, v, k.APIC_LVT0)
    counted = raw & (k.LVT_MASKED | k.ICR_DM) == k.DM_NMI << k.ICR_DM_SHIFT
    m[own(m, v) + k.K_LINT0_NMI] = k.ONE if counted else k.ZERO
    return k.ZERO


@kernel("u8(words, u8, u8, u8, u8)")
def _write_lvt(m, v, offset, value, writable):
    if offset == k.APIC_LVT0:
        set_reg(m, v, offset, value)
        watch_lint0(m, v)
    if not m[hot(m, v) + k.HOT_FLAGS] & k.FLAG_SW:
        value = value | k.LVT_MASKED
    set_reg(m, v, offset, value & writable)
    return k.ZERO


@kernel("u8(words, u8, u8)")
def _write_svr(m, v, value):
    writable = k.SVR_WRITABLE
    if reg(m, v, k.APIC_LVR) & k.LVR_DIRECTED_EOI:
        writable = writable | k.SVR_SUPPRESS_EOI
    set_spiv(m, v, value & writable)
    if value & k.SVR_ENABLE:
        return k.ZERO
    for i in range(lvt_count(m)):
        offset = lvt_offset(k.U(i))
        set_reg(m, v, offset, reg(m, v, offset) | k.LVT_MASKED)
    update_lvtt(m, v)
    m[own(m, v) + k.K_TIMER_PENDING] = k.ZERO
    return k.ZERO


# ------------------------------------------------------------------------------------------------------ register writes


@kernel("u8(words, u8, u8)")
def _write_icr(m, v, value):
    """ICR low through the register path: xAPIC, and x2APIC of kernels that store it in two halves.

    The IPI leaves before the value can be read back.
    """
    value = value & ~k.ICR_BUSY
    code = send(m, v, value | (reg(m, v, k.APIC_ICR2) << k.U(32)))
    set_reg(m, v, k.APIC_ICR, value)
    return code


@kernel("u8(words, u8, u8)")
def _write_self_ipi(m, v, value):
    if m[k.H_TRAITS] & k.T_SELF_IPI_WRITES_ICR:
        low = (k.SH_SELF << k.ICR_SHORTHAND_SHIFT) | (value & k.ICR_VECTOR)
        if m[k.H_CONFIG] & k.CONFIG_TRACE:
            emit(m, k.TP_APIC_WRITE, v, k.APIC_ICR, low, k.ZERO)
        return _write_icr(m, v, low)
    if value & ~k.ICR_VECTOR:
        return k.CODE_GP
    return send(m, v, (k.SH_SELF << k.ICR_SHORTHAND_SHIFT) | value)


@kernel("u8(words, u8, u8, u8)")
def _write_xapic_only(m, v, offset, value):
    """ID, LDR, DFR, ICR2: registers that x2APIC mode does not let a guest write."""
    if in_x2apic_mode(m, v):
        return k.CODE_GP
    top_byte = k.U(0xFF00_0000)
    if offset == k.APIC_DFR:
        set_reg(m, v, offset, value | k.DFR_CLUSTER)
    else:
        set_reg(m, v, offset, value & top_byte)
    if offset != k.APIC_ICR2:
        mark_dirty(m)
    return id_written(m, v) if offset == k.APIC_ID else k.ZERO


@kernel("u8(words, u8, u8, u8)")
def _write_lvt_or_fail(m, v, offset, value):
    if offset == k.APIC_LVTT:
        _write_lvt(m, v, offset, value, k.LVT_WRITABLE_TIMER | timer_mode_mask(m))
        return update_lvtt(m, v)
    if offset == k.APIC_LVTERR:
        return _write_lvt(m, v, offset, value, k.LVT_WRITABLE_ERROR)
    if offset == k.APIC_LVT0 or offset == k.APIC_LVT1:
        return _write_lvt(m, v, offset, value, k.LVT_WRITABLE_LINT)
    if offset == k.APIC_LVTTHMR or offset == k.APIC_LVTPC:
        return _write_lvt(m, v, offset, value, k.LVT_WRITABLE_LOCAL)
    if offset == k.APIC_LVTCMCI and m[k.H_CONFIG] & k.CONFIG_CMCI:
        return _write_lvt(m, v, offset, value, k.LVT_WRITABLE_LOCAL)
    return k.CODE_GP


@kernel("u8(words, u8)")
def _report_tpr_access(m, v):
    """report_tpr_access: user space may want to see every access to TPR, to patch the instruction."""
    if m[own(m, v) + k.K_TPR_REPORT]:
        make_request(m, v, k.REQ_REPORT_TPR_ACCESS)
    return k.ZERO


@kernel("u8(words, u8, u8, u8)")
def reg_write(m, v, offset, value):
    """kvm_lapic_reg_write of a 32-bit value at a 16-byte aligned offset; the trace line precedes any failure."""
    if m[k.H_CONFIG] & k.CONFIG_TRACE:
        emit(m, k.TP_APIC_WRITE, v, offset, value, k.ZERO)
    code = k.ZERO
    if offset == k.APIC_ICR:
        code = _write_icr(m, v, value)
    elif offset == k.APIC_EOI:
        code = set_eoi(m, v)
    elif offset == k.APIC_TASKPRI:
        _report_tpr_access(m, v)
        set_reg(m, v, offset, value & k.U(0xFF))
        update_ppr(m, v)
    elif offset == k.APIC_TMICT:
        write_tmict(m, v, value)
    elif offset == k.APIC_TDCR:
        write_tdcr(m, v, value)
    elif offset == k.APIC_SPIV:
        _write_svr(m, v, value)
    elif offset == k.APIC_ID or offset == k.APIC_LDR or offset == k.APIC_DFR or offset == k.APIC_ICR2:
        code = _write_xapic_only(m, v, offset, value)
    elif offset == k.APIC_SELF_IPI:
        code = _write_self_ipi(m, v, value) if in_x2apic_mode(m, v) else k.CODE_GP
    elif offset == k.APIC_ESR:
        if in_x2apic_mode(m, v) and value != k.ZERO:
            code = k.CODE_GP
    else:
        code = _write_lvt_or_fail(m, v, offset, value)
    return code | recalculate(m, v)


@kernel("u8(words, u8, u8)")
def x2apic_icr_write(m, v, value):
    """Generic x2APIC ICR write: kvm_x2apic_icr_write, or the two register writes of kernels before 6.0.

    By Hyper-V's MSR in xAPIC mode, too, where the register write keeps the upper half's top byte alone.
    """
    traits = m[k.H_TRAITS]
    if traits & k.T_TRACE_ICR2_FIRST:
        high = value >> k.U(32)
        if m[k.H_CONFIG] & k.CONFIG_TRACE:
            emit(m, k.TP_APIC_WRITE, v, k.APIC_ICR2, high, k.ZERO)
        set_reg(m, v, k.APIC_ICR2, high if in_x2apic_mode(m, v) else high & k.U(0xFF00_0000))
        return reg_write(m, v, k.APIC_ICR, value & k.LOW32)
    if traits & k.T_ICR_RESERVED_GP and value & k.ICR_RESERVED:
        return k.CODE_GP
    value = value & ~k.ICR_BUSY
    code = send(m, v, value)
    set_x2apic_icr(m, v, value)
    if m[k.H_CONFIG] & k.CONFIG_TRACE:
        emit(m, k.TP_APIC_WRITE, v, k.APIC_ICR, value, k.ZERO)
    return code


@kernel("u8(words, u8)")
def _show_errors(m, v):
    """A write of ESR: what has been logged since the last one can be read, and the next error interrupts again."""
    at = word(m, v, k.APIC_ESR)
    errors = clear_word_bits(m, at, k.NONE) >> k.U(32)
    or_word(m, at, errors)
    return k.ZERO


@kernel("u8(words, u8, u8, u8)")
def _trace_write(m, v, offset, value):
    return emit(m, k.TP_APIC_WRITE, v, offset, value, k.ZERO) if m[k.H_CONFIG] & k.CONFIG_TRACE else k.ZERO


@apart
@kernel("u8(words, u8, u8, u8)")
def strict_write(m, v, offset, value):
    """reg_write of a machine that is the manual's: what is reserved or read-only is dropped, errors are logged."""
    value = writable(m, v, offset, value)
    if offset == k.APIC_ESR and not (value and in_x2apic_mode(m, v)):
        _show_errors(m, v)
    icr = value
    if offset == k.APIC_SELF_IPI and in_x2apic_mode(m, v):
        icr = (k.SH_SELF << k.ICR_SHORTHAND_SHIFT) | value
    elif offset == k.APIC_ICR:
        icr = value | (reg(m, v, k.APIC_ICR2) << k.U(32))
    else:
        return reg_write(m, v, offset, value)
    if not is_illegal(m, icr):
        return reg_write(m, v, offset, value)
    _trace_write(m, v, offset, value)
    code = send_illegal(m, v, icr)
    if offset == k.APIC_ICR:
        set_reg(m, v, offset, value)
    return code


@apart
@kernel("u8(words, u8, u8, u8)")
def _strict_msr_write(m, v, offset, value):
    """x2apic_msr_write by the manual: every reserved bit faults."""
    if value & reserved(m, v, offset):
        return k.CODE_GP
    if offset != k.APIC_ICR:
        return strict_write(m, v, offset, value)
    if not is_illegal(m, value):
        return x2apic_icr_write(m, v, value)
    code = send_illegal(m, v, value)
    set_x2apic_icr(m, v, value)
    _trace_write(m, v, k.APIC_ICR, value)
    return code


@kernel("u8(words, u8, u8, u8)")
def x2apic_msr_write(m, v, msr, value):
    """kvm_x2apic_msr_write for an MSR in 0x800-0x8FF."""
    if not in_x2apic_mode(m, v):
        return k.CODE_GP
    offset = (msr - k.MSR_X2APIC_BASE) << k.U(4)
    if m[k.H_TRAITS] & k.T_RESERVED_BITS_GP:
        return _strict_msr_write(m, v, offset, value)
    if offset == k.APIC_ICR:
        return x2apic_icr_write(m, v, value)
    if offset == k.APIC_ICR2:
        # Before 6.0 this was refused ahead of the trace line; later it fails as any register does.
        if m[k.H_TRAITS] & k.T_TRACE_ICR2_FIRST:
            return k.CODE_GP
    if value >> k.U(32) and m[k.H_TRAITS] & k.T_MSR_UPPER_GP:
        return k.CODE_GP
    return reg_write(m, v, offset, value & k.LOW32)


# ------------------------------------------------------------------------------------------------------- register reads


@kernel("u8(words, u8, u8)")
def readable(m, v, offset):
    """kvm_lapic_readable_reg_mask: 1 when the register at an aligned offset can be read in the vCPU's mode."""
    if offset >= k.APIC_ISR and offset < k.APIC_ESR:
        return k.ONE
    if offset >= k.APIC_LVTT and offset <= k.APIC_TMCCT:
        return k.ONE
    if offset == k.APIC_ID or offset == k.APIC_LVR or offset == k.APIC_TASKPRI or offset == k.APIC_PROCPRI:
        return k.ONE
    if offset == k.APIC_LDR or offset == k.APIC_SPIV or offset == k.APIC_ESR or offset == k.APIC_TDCR:
        return k.ONE
    if offset == k.APIC_ICR:
        return k.ONE
    if offset == k.APIC_LVTCMCI:
        return k.ONE if m[k.H_CONFIG] & k.CONFIG_CMCI else k.ZERO
    if offset == k.APIC_ARBPRI or offset == k.APIC_DFR or offset == k.APIC_ICR2:
        return k.ZERO if in_x2apic_mode(m, v) else k.ONE
    return k.ZERO


@kernel("u8(words, u8, u8, u8)")
def reg_read(m, v, offset, shown):
    """__apic_read of a readable register at an aligned offset; the trace line shows the offset as the guest gave it."""
    if offset == k.APIC_PROCPRI:
        update_ppr(m, v)
        value = reg(m, v, offset)
    elif offset == k.APIC_ARBPRI:
        value = k.ZERO
    elif offset == k.APIC_TMCCT:
        value = current_count(m, v)
    elif offset >= k.APIC_ISR and offset < k.APIC_ESR:
        value = vector_slot(m, v, offset)
    else:
        if offset == k.APIC_TASKPRI:
            _report_tpr_access(m, v)
        value = reg(m, v, offset)
    if m[k.H_CONFIG] & k.CONFIG_TRACE:
        emit(m, k.TP_APIC_READ, v, shown, value, k.ZERO)
    return value


@kernel("u8(words, u8)")
def icr_read(m, v):
    """kvm_x2apic_icr_read, or the two register reads of kernels before 6.0, each with its trace line."""
    if m[k.H_TRAITS] & k.T_TRACE_ICR2_FIRST:
        low = reg_read(m, v, k.APIC_ICR, k.APIC_ICR)
        return low | (reg_read(m, v, k.APIC_ICR2, k.APIC_ICR2) << k.U(32))
    return x2apic_icr(m, v)


@kernel("u8(words, u8, u8)")
def x2apic_msr_read(m, v, msr):
    """kvm_x2apic_msr_read: value in K_MSR_DATA; CODE_GP when it faults."""
    out = own(m, v) + k.K_MSR_DATA
    m[out] = k.ZERO
    if not in_x2apic_mode(m, v):
        return k.CODE_GP
    offset = (msr - k.MSR_X2APIC_BASE) << k.U(4)
    if not readable(m, v, offset):
        return k.CODE_GP
    m[out] = icr_read(m, v) if offset == k.APIC_ICR else reg_read(m, v, offset, offset)
    return k.ZERO


@kernel("u8(words, u8, u8)")
def _page_offset(m, v, gpa):
    """apic_mmio_in_range's first half: an offset below APIC_PAGE_BYTES where the address is in the vCPU's page."""
    return gpa - (m[own(m, v) + k.K_APIC_BASE] & k.APICBASE_PAGE)


@kernel("u8(words, u8)")
def _claimed(m, v):
    """apic_mmio_in_range's second half: hardware-enabled and in xAPIC mode."""
    return k.ONE if m[hot(m, v) + k.HOT_FLAGS] & (k.FLAG_HW | k.FLAG_X2APIC) == k.FLAG_HW else k.ZERO


@kernel("u8(words)")
def _unclaimed(m):
    """An access to a page that no APIC is behind: into KVM_X86_QUIRK_LAPIC_MMIO_HOLE, or NOT_MINE without it."""
    return k.ZERO if m[k.H_CONFIG] & k.CONFIG_MMIO_HOLE else NOT_MINE


@kernel("u8(words, u8, u8, u8, u8)")
def mmio_write(m, v, gpa, length, value):
    """apic_mmio_write: only aligned dwords count, the rest vanishes without a fault. NOT_MINE: another device's.

    RIP is the caller's.
    """
    offset = _page_offset(m, v, gpa)
    if offset >= k.APIC_PAGE_BYTES:
        return NOT_MINE
    if not _claimed(m, v):
        return _unclaimed(m)
    if length != k.U(4) or offset & k.U(0xF):
        return k.ZERO
    if m[k.H_TRAITS] & k.T_ERRORS_LOGGED:
        if not is_register(m, offset):
            return log_error(m, v, k.ESR_ILLEGAL_REGISTER, v)
        return strict_write(m, v, offset, value & k.LOW32) & k.CODE_DELIVERY
    return reg_write(m, v, offset, value & k.LOW32) & k.CODE_DELIVERY


@kernel("u8(words, u8, u8, u8)")
def mmio_read(m, v, gpa, length):
    """apic_mmio_read: value in K_MSR_DATA, 0 where KVM leaves the destination alone; or NOT_MINE, and 0.

    For the manual's machines a register that there is not is an error, whose interrupt is the code.
    5.6 to 5.8 read over the register's end: what was on KVM's stack is 0 here.
    """
    out = own(m, v) + k.K_MSR_DATA
    m[out] = k.ZERO
    offset = _page_offset(m, v, gpa)
    if offset >= k.APIC_PAGE_BYTES:
        return NOT_MINE
    mask = k.NONE >> (k.U(64) - (length << k.U(3)))
    if not _claimed(m, v):
        code = _unclaimed(m)
        if code != NOT_MINE:
            m[out] = mask
        return code
    aligned = offset & k.U(0xFF0)
    across = (offset & k.U(0xF)) + length > k.U(4)
    if across and (not m[k.H_RULES] & k.R_READ_ACROSS_TRACED or offset > k.APIC_SELF_IPI):
        return k.ZERO
    if not readable(m, v, aligned):
        if m[k.H_TRAITS] & k.T_ERRORS_LOGGED and length == k.U(4) and not is_register(m, aligned):
            return log_error(m, v, k.ESR_ILLEGAL_REGISTER, v)
        return k.ZERO
    value = reg_read(m, v, aligned, offset)
    m[out] = (value >> ((offset & k.U(0xF)) << k.U(3))) & mask
    return k.ZERO
