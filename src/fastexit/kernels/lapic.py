"""The local APIC's registers as the guest and user space see them.

Models: kvm_lapic_reg_write, kvm_lapic_reg_read, kvm_x2apic_msr_read/write, apic_mmio_read/write, kvm_apic_set_base,
kvm_lapic_reset, kvm_apic_get_state/set_state, SVR and LVT side effects. Not modelled yet: timers run (TMICT stores,
TMCCT reads 0), EOI to the IOAPIC, vapic TPR reports. Spec: SDM vol. 3A 10.4-10.12.

A write returns a delivery code (see ipi.py), with CODE_GP when the register does not take it; xAPIC writes ignore the
latter, since MMIO has no way to fault.
"""

from . import typed as k
from ._jit import kernel
from .apicmap import mark_dirty, recalculate
from .ipi import send
from .irq import compute_ppr, eoi, recount, update_ppr
from .lapicreg import (
    icr_is_split,
    reg,
    set_reg,
    set_x2apic_icr,
    vector_slot,
    version,
    word,
    x2apic_icr,
    x2apic_ldr,
)
from .pid import clear as clear_pid
from .pid import sync_pir_to_irr
from .shared import copy_words, emit, hot, make_request, own, vec


@kernel("u8(words, u8)")
def in_x2apic_mode(m, v):
    return m[hot(m, v) + k.HOT_FLAGS] & k.FLAG_X2APIC


@kernel("u8(words, u8, u8, u8)")
def _set_flag(m, v, flag, on):
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
        _set_flag(m, v, k.FLAG_SW, enabled)
        mark_dirty(m)
    return k.ZERO


@kernel("u8(words)")
def timer_mode_mask(m):
    """LVTT's writable mode bits: TSC deadline only if the guest's CPUID has it."""
    mask = k.LVT_TIMER_PERIODIC
    if m[k.H_CONFIG] & k.CONFIG_DEADLINE_CPUID:
        mask = mask | k.LVT_TIMER_DEADLINE
    return mask


@kernel("u8(words, u8)")
def update_lvtt(m, v):
    """apic_update_lvtt: entering or leaving deadline mode forgets count and deadline."""
    row = own(m, v)
    mode = reg(m, v, k.APIC_LVTT) & timer_mode_mask(m)
    old = m[row + k.K_TIMER_MODE]
    if mode == old:
        return k.ZERO
    if mode == k.TIMER_DEADLINE or old == k.TIMER_DEADLINE:
        set_reg(m, v, k.APIC_TMICT, k.ZERO)
        m[row + k.K_TSC_DEADLINE] = k.ZERO
        m[row + k.K_TIMER_PENDING] = k.ZERO
    m[row + k.K_TIMER_MODE] = mode
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
def _watch_lint0(m, v):
    """apic_manage_nmi_watchdog looks at the value before it is masked; the caller stores that value first."""
    raw = reg(m, v, k.APIC_LVT0)
    counted = raw & (k.LVT_MASKED | k.ICR_DM) == k.DM_NMI << k.ICR_DM_SHIFT
    m[own(m, v) + k.K_LINT0_NMI] = k.ONE if counted else k.ZERO
    return k.ZERO


@kernel("u8(words, u8, u8, u8, u8)")
def _write_lvt(m, v, offset, value, writable):
    if offset == k.APIC_LVT0:
        set_reg(m, v, offset, value)
        _watch_lint0(m, v)
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
    return k.ZERO


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


@kernel("u8(words, u8, u8, u8)")
def _write_timer(m, v, offset, value):
    row = own(m, v)
    if offset == k.APIC_TDCR:
        set_reg(m, v, offset, value & k.TDCR_WRITABLE)
    elif m[row + k.K_TIMER_MODE] != k.TIMER_DEADLINE:
        m[row + k.K_TIMER_PENDING] = k.ZERO
        set_reg(m, v, offset, value)
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
        eoi(m, v)
    elif offset == k.APIC_TASKPRI:
        set_reg(m, v, offset, value & k.U(0xFF))
        update_ppr(m, v)
    elif offset == k.APIC_TMICT or offset == k.APIC_TDCR:
        _write_timer(m, v, offset, value)
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
    recalculate(m)
    return code


@kernel("u8(words, u8, u8)")
def x2apic_icr_write(m, v, value):
    """Generic x2APIC ICR write: kvm_x2apic_icr_write, or the two register writes of kernels before 6.0."""
    traits = m[k.H_TRAITS]
    if traits & k.T_TRACE_ICR2_FIRST:
        if m[k.H_CONFIG] & k.CONFIG_TRACE:
            emit(m, k.TP_APIC_WRITE, v, k.APIC_ICR2, value >> k.U(32), k.ZERO)
        set_reg(m, v, k.APIC_ICR2, value >> k.U(32))
        return reg_write(m, v, k.APIC_ICR, value & k.LOW32)
    if traits & k.T_ICR_RESERVED_GP and value & k.ICR_RESERVED:
        return k.CODE_GP
    value = value & ~k.ICR_BUSY
    code = send(m, v, value)
    set_x2apic_icr(m, v, value)
    if m[k.H_CONFIG] & k.CONFIG_TRACE:
        emit(m, k.TP_APIC_WRITE, v, k.APIC_ICR, value, k.ZERO)
    return code


@kernel("u8(words, u8, u8, u8)")
def x2apic_msr_write(m, v, msr, value):
    """kvm_x2apic_msr_write for an MSR in 0x800-0x8FF."""
    if not in_x2apic_mode(m, v):
        return k.CODE_GP
    offset = (msr - k.MSR_X2APIC_BASE) << k.U(4)
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
    elif offset == k.APIC_ARBPRI or offset == k.APIC_TMCCT:
        value = k.ZERO
    elif offset >= k.APIC_ISR and offset < k.APIC_ESR:
        value = vector_slot(m, v, offset)
    else:
        value = reg(m, v, offset)
    if m[k.H_CONFIG] & k.CONFIG_TRACE:
        emit(m, k.TP_APIC_READ, v, shown, value, k.ZERO)
    return value


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
    if offset == k.APIC_ICR:
        if m[k.H_TRAITS] & k.T_TRACE_ICR2_FIRST:
            m[out] = reg_read(m, v, offset, offset) | (reg_read(m, v, k.APIC_ICR2, k.APIC_ICR2) << k.U(32))
        else:
            m[out] = x2apic_icr(m, v)
        return k.ZERO
    m[out] = reg_read(m, v, offset, offset)
    return k.ZERO


@kernel("u8(words, u8)")
def mmio_claimed(m, v):
    """apic_mmio_in_range's second half: hardware-enabled and in xAPIC mode."""
    return k.ONE if m[hot(m, v) + k.HOT_FLAGS] & (k.FLAG_HW | k.FLAG_X2APIC) == k.FLAG_HW else k.ZERO


@kernel("u8(words, u8, u8, u8, u8)")
def mmio_write(m, v, offset, length, value):
    """apic_mmio_write: only aligned dwords count, the rest vanishes without a fault."""
    if not mmio_claimed(m, v) or length != k.U(4) or offset & k.U(0xF):
        return k.ZERO
    return reg_write(m, v, offset & k.U(0xFF0), value & k.LOW32) & k.CODE_DELIVERY


@kernel("u8(words, u8, u8, u8)")
def mmio_read(m, v, offset, length):
    """apic_mmio_read: value in K_MSR_DATA; CODE_GP where KVM leaves the destination as it was."""
    out = own(m, v) + k.K_MSR_DATA
    mask = (k.ONE << (length << k.U(3))) - k.ONE
    if not mmio_claimed(m, v):
        m[out] = mask
        return k.ZERO
    m[out] = k.ZERO
    aligned = offset & k.U(0xFF0)
    if (offset & k.U(0xF)) + length > k.U(4) or not readable(m, v, aligned):
        return k.CODE_GP
    value = reg_read(m, v, aligned, offset)
    m[out] = (value >> ((offset & k.U(0xF)) << k.U(3))) & mask
    return k.ZERO


# ----------------------------------------------------------------------------------------------- APICBASE, reset, state


@kernel("u8(words, u8)")
def _set_xapic_id(m, v):
    set_reg(m, v, k.APIC_ID, (m[own(m, v) + k.K_VCPU_ID] & k.U(0xFF)) << k.U(24))
    return mark_dirty(m)


@kernel("u8(words, u8, u8)")
def _store_base(m, v, value):
    """__kvm_apic_set_base: what the change of EN and EXTD does to ID and LDR."""
    row = own(m, v)
    old = m[row + k.K_APIC_BASE]
    m[row + k.K_APIC_BASE] = value
    _set_flag(m, v, k.FLAG_HW, value & k.APICBASE_EN)
    _set_flag(m, v, k.FLAG_X2APIC, value & k.APICBASE_EXTD)
    changed = old ^ value
    if changed & k.APICBASE_EN:
        if value & k.APICBASE_EN:
            _set_xapic_id(m, v)
        mark_dirty(m)
    if changed & k.APICBASE_EXTD:
        if value & k.APICBASE_EXTD:
            set_reg(m, v, k.APIC_ID, m[row + k.K_VCPU_ID])
            set_reg(m, v, k.APIC_LDR, x2apic_ldr(m, v))
            mark_dirty(m)
        elif value & k.APICBASE_EN:
            _set_xapic_id(m, v)
    return k.ZERO


@kernel("u8(words, u8, u8, u8)")
def set_base(m, v, value, host):
    """kvm_apic_set_base: CODE_GP when the value or, for a guest, the transition is not allowed.

    The value that is there already passes unchecked, whatever it is.
    """
    old = m[own(m, v) + k.K_APIC_BASE]
    if value == old:
        return k.ZERO
    mode = k.APICBASE_EN | k.APICBASE_EXTD
    if value & k.APICBASE_RESERVED or value >> m[k.H_MAXPHYADDR] or value & mode == k.APICBASE_EXTD:
        return k.CODE_GP
    if value & k.APICBASE_EXTD and not m[k.H_CONFIG] & k.CONFIG_X2APIC_CPUID:
        return k.CODE_GP
    if not host:
        if old & mode == mode and value & mode == k.APICBASE_EN:
            return k.CODE_GP
        if old & mode == k.ZERO and value & mode == mode:
            return k.CODE_GP
    _store_base(m, v, value)
    recalculate(m)
    return k.ZERO


@kernel("u8(words, u8, u8)")
def reset(m, v, init):
    """kvm_lapic_reset: RESET (vCPU creation) or, with init, the INIT flavour that keeps mode, ID and x2APIC LDR."""
    row = own(m, v)
    if not m[k.H_CONFIG] & k.CONFIG_SVM and m[hot(m, v) + k.HOT_FLAGS] & k.FLAG_APICV:
        clear_pid(m, v)
    if not init:
        base = k.APIC_DEFAULT_PHYS_BASE | k.APICBASE_EN
        if m[row + k.K_VCPU_ID] == k.ZERO:
            base = base | k.APICBASE_BSP
        _store_base(m, v, base)
        _set_xapic_id(m, v)
    set_reg(m, v, k.APIC_LVR, version(m, v))
    for i in range(lvt_count(m)):
        set_reg(m, v, lvt_offset(k.U(i)), k.LVT_MASKED)
    update_lvtt(m, v)
    if m[row + k.K_VCPU_ID] == k.ZERO and m[k.H_CONFIG] & k.CONFIG_LINT0_REENABLED:
        set_reg(m, v, k.APIC_LVT0, k.LVT0_BOOT)
    _watch_lint0(m, v)
    set_reg(m, v, k.APIC_DFR, k.DFR_FLAT)
    set_spiv(m, v, k.U(0xFF))
    set_reg(m, v, k.APIC_TASKPRI, k.ZERO)
    if not in_x2apic_mode(m, v):
        set_reg(m, v, k.APIC_LDR, k.ZERO)
        set_reg(m, v, k.APIC_ICR, k.ZERO)
        set_reg(m, v, k.APIC_ICR2, k.ZERO)
    elif m[k.H_TRAITS] & k.T_ICR_SPLIT:
        set_reg(m, v, k.APIC_ICR, k.ZERO)
        set_reg(m, v, k.APIC_ICR2, k.ZERO)
    else:
        m[word(m, v, k.APIC_ICR)] = k.ZERO
    set_reg(m, v, k.APIC_ESR, k.ZERO)
    set_reg(m, v, k.APIC_TDCR, k.ZERO)
    set_reg(m, v, k.APIC_TMICT, k.ZERO)
    for i in range(4):
        m[vec(m, v) + k.VEC_IRR + k.U(i)] = k.ZERO
        m[vec(m, v) + k.VEC_ISR + k.U(i)] = k.ZERO
        m[hot(m, v) + k.HOT_TMR + k.U(i)] = k.ZERO
    recount(m, v)
    m[row + k.K_TIMER_PENDING] = k.ZERO
    m[row + k.K_ARB_PRIO] = k.ZERO
    m[row + k.K_RVI] = k.ZERO
    mark_dirty(m)
    update_ppr(m, v)
    recalculate(m)
    return k.ZERO


@kernel("u8(words, u8)")
def get_state(m, v):
    """kvm_apic_get_state: the page into H_STAGE. PIR is synced first; PPR is not recomputed."""
    if m[hot(m, v) + k.HOT_FLAGS] & k.FLAG_APICV:
        sync_pir_to_irr(m, v)
    page = k.PAGE + v * k.PAGE_STRIDE
    copy_words(m, k.H_STAGE, page, k.PAGE_STRIDE)
    offset = k.APIC_ISR
    while offset < k.APIC_ESR:
        at = k.H_STAGE + (offset >> k.U(3))
        m[at] = (m[at] & k.HIGH32) | vector_slot(m, v, offset)
        offset = offset + k.U(16)
    at = k.H_STAGE + (k.APIC_TMCCT >> k.U(3))
    m[at] = m[at] & k.HIGH32
    if in_x2apic_mode(m, v):
        if not m[k.H_API] & k.X2API_32BIT_IDS:
            at = k.H_STAGE + (k.APIC_ID >> k.U(3))
            m[at] = (m[at] & k.HIGH32) | ((reg(m, v, k.APIC_ID) << k.U(24)) & k.LOW32)
        if not icr_is_split(m):
            high = m[word(m, v, k.APIC_ICR)] >> k.U(32)
            at = k.H_STAGE + (k.APIC_ICR2 >> k.U(3))
            m[at] = (m[at] & k.HIGH32) | high
    return k.ZERO


@kernel("u8(words, u8)")
def _fix_up_stage(m, v):
    """kvm_apic_state_fixup for a set: ID, LDR and ICR of a page that is meant for x2APIC mode; CODE_GP for EINVAL."""
    row = own(m, v)
    at = k.H_STAGE + (k.APIC_ID >> k.U(3))
    if m[k.H_API] & k.X2API_32BIT_IDS and m[at] & k.LOW32 != m[row + k.K_VCPU_ID]:
        return k.CODE_GP
    m[at] = (m[at] & k.HIGH32) | m[row + k.K_VCPU_ID]
    at = k.H_STAGE + (k.APIC_LDR >> k.U(3))
    m[at] = (m[at] & k.HIGH32) | x2apic_ldr(m, v)
    if not icr_is_split(m):
        at = k.H_STAGE + (k.APIC_ICR >> k.U(3))
        high = m[k.H_STAGE + (k.APIC_ICR2 >> k.U(3))] & k.LOW32
        m[at] = (m[at] & k.LOW32) | (high << k.U(32))
    return k.ZERO


@kernel("u8(words, u8, u8, u8)")
def _store_vectors(m, v, offset, base):
    """Eight staged dwords into a 256-bit set at word index base."""
    for i in range(4):
        at = k.H_STAGE + (offset >> k.U(3)) + (k.U(i) << k.U(2))
        m[base + k.U(i)] = (m[at] & k.LOW32) | ((m[at + k.U(2)] & k.LOW32) << k.U(32))
    return k.ZERO


@kernel("u8(words, u8)")
def set_state(m, v):
    """kvm_apic_set_state of the page in H_STAGE: CODE_GP for EINVAL, and even then SVR has been applied.

    Nothing is masked. PPR is recomputed before the ISR bits are counted, so it may still show the old ISR.
    """
    if not m[k.H_CONFIG] & k.CONFIG_SVM and m[hot(m, v) + k.HOT_FLAGS] & k.FLAG_APICV:
        clear_pid(m, v)
    set_spiv(m, v, m[k.H_STAGE + (k.APIC_SPIV >> k.U(3))] & k.LOW32)
    if in_x2apic_mode(m, v) and _fix_up_stage(m, v):
        recalculate(m)
        return k.CODE_GP
    page = k.PAGE + v * k.PAGE_STRIDE
    copy_words(m, page, k.H_STAGE, k.PAGE_STRIDE)
    _store_vectors(m, v, k.APIC_ISR, vec(m, v) + k.VEC_ISR)
    _store_vectors(m, v, k.APIC_TMR, hot(m, v) + k.HOT_TMR)
    _store_vectors(m, v, k.APIC_IRR, vec(m, v) + k.VEC_IRR)
    mark_dirty(m)
    recalculate(m)
    set_reg(m, v, k.APIC_LVR, version(m, v))
    compute_ppr(m, v)
    row = own(m, v)
    m[row + k.K_TIMER_PENDING] = k.ZERO
    update_lvtt(m, v)
    _watch_lint0(m, v)
    set_reg(m, v, k.APIC_TMCCT, k.ZERO)
    recount(m, v)
    m[row + k.K_ARB_PRIO] = k.ZERO
    make_request(m, v, k.REQ_EVENT)
    return k.ZERO
