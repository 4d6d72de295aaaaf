"""The local APIC as a whole: APICBASE, reset, and the 1 KiB page that user space gets and sets.

Models: kvm_apic_set_base, kvm_lapic_reset, kvm_apic_get_state/set_state with kvm_apic_state_fixup.
Spec: SDM vol. 3A 10.4, 10.12.
"""

from ..jit.declare import kernel
from . import rtc
from . import typed as k
from .apicmap import mark_dirty, recalculate
from .avictable import restore
from .inhibit import base_written, id_written
from .irq import recount, update_cr8_intercept, update_ppr
from .irqlock import lock, unlock
from .lapic import (
    in_x2apic_mode,
    lvt_count,
    lvt_offset,
    set_flag,
    set_spiv,
    watch_lint0,
)
from .lapicreg import icr_is_split, reg, set_reg, vector_slot, version, word, x2apic_ldr
from .pid import clear as clear_pid
from .pid import sync_pir_to_irr
from .shared import copy_words, hot, make_request, own, sent_on_the_way, vec
from .timer import cancel, current_count, start, update_divide, update_lvtt


@kernel("u8(words, u8)")
def _set_xapic_id(m, v):
    set_reg(m, v, k.APIC_ID, (m[own(m, v) + k.K_VCPU_ID] & k.U(0xFF)) << k.U(24))
    return mark_dirty(m)


@kernel("u8(words, u8, u8)")
def _store_base(m, v, value):
    """__kvm_apic_set_base: what the change of EN and EXTD does to ID, LDR and APICv. Effect code.

    Where the id is kept (ID_KEPT_ON_LEAVING), the map is, too: it still has the vCPU in x2APIC mode.
    """
    row = own(m, v)
    old = m[row + k.K_APIC_BASE]
    m[row + k.K_APIC_BASE] = value
    set_flag(m, v, k.FLAG_HW, value & k.APICBASE_EN)
    set_flag(m, v, k.FLAG_X2APIC, value & k.APICBASE_EXTD)
    changed = old ^ value
    if changed & k.APICBASE_EN:
        if value & k.APICBASE_EN:
            _set_xapic_id(m, v)
        mark_dirty(m)
    if changed & k.APICBASE_EXTD:
        if value & k.APICBASE_EXTD:
            set_reg(m, v, k.APIC_ID, m[row + k.K_VCPU_ID])
            set_reg(m, v, k.APIC_LDR, x2apic_ldr(m[row + k.K_VCPU_ID]))
            mark_dirty(m)
        elif value & k.APICBASE_EN and not m[k.H_RULES] & k.R_ID_KEPT_ON_LEAVING:
            _set_xapic_id(m, v)
    effects = base_written(m, v, changed)
    if changed & (k.APICBASE_EN | k.APICBASE_EXTD) and not m[k.H_RULES] & k.R_AVIC_OLD:
        restore(m, v)
    return effects


@kernel("u8(words, u8)")
def _clear_pid(m, v):
    """vmx_apicv_pre_state_restore, earlier vmx_apicv_post_state_restore: what was posted is gone."""
    return clear_pid(m, v) if m[k.H_CONFIG] & (k.CONFIG_SVM | k.CONFIG_APICV) == k.CONFIG_APICV else k.ZERO


@kernel("u8(words, u8, u8)")
def reset(m, v, init):
    """kvm_lapic_reset: RESET (vCPU creation) or, with init, the INIT flavour that keeps mode, ID and x2APIC LDR.

    An INIT happens on the way to an entry: whom its new map asks for a scan is told by the outcome before it.
    """
    row = own(m, v)
    if not m[k.H_RULES] & k.R_RESTORE_CLEARS_PIR_LAST:
        _clear_pid(m, v)
    # The hrtimer only: a preemption timer that counts goes on, and its tick waits for LVTT to be unmasked.
    m[row + k.K_HRTIMER] = k.NONE
    if not init:
        base = k.APIC_DEFAULT_PHYS_BASE | k.APICBASE_EN
        if m[row + k.K_VCPU_ID] == m[k.H_BSP_ID]:
            base = base | k.APICBASE_BSP
        _store_base(m, v, base)
        _set_xapic_id(m, v)
    set_reg(m, v, k.APIC_LVR, version(m, v))
    for i in range(lvt_count(m)):
        set_reg(m, v, lvt_offset(k.U(i)), k.LVT_MASKED)
    update_lvtt(m, v)
    if m[row + k.K_VCPU_ID] == m[k.H_BSP_ID] and m[k.H_CONFIG] & k.CONFIG_LINT0_REENABLED:
        set_reg(m, v, k.APIC_LVT0, k.LVT0_BOOT)
    watch_lint0(m, v)
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
    if m[k.H_TRAITS] & k.T_ERRORS_LOGGED:
        m[word(m, v, k.APIC_ESR)] = k.ZERO
    set_reg(m, v, k.APIC_TDCR, k.ZERO)
    set_reg(m, v, k.APIC_TMICT, k.ZERO)
    update_divide(m, v)
    for j in range(4):
        m[vec(m, v) + k.VEC_IRR + k.U(j)] = k.ZERO
        m[own(m, v) + k.K_ISR + k.U(j)] = k.ZERO
        m[hot(m, v) + k.HOT_TMR + k.U(j)] = k.ZERO
    recount(m, v)
    m[row + k.K_TIMER_PENDING] = k.ZERO
    m[row + k.K_ARB_PRIO] = k.ZERO
    m[vec(m, v) + k.VEC_RVI] = k.ZERO
    m[row + k.K_PV_EOI_MSR] = k.ZERO
    m[row + k.K_ATTENTION] = k.ZERO
    mark_dirty(m)
    update_ppr(m, v)
    if m[k.H_RULES] & k.R_RESTORE_CLEARS_PIR_LAST and m[hot(m, v) + k.HOT_FLAGS] & k.FLAG_APICV:
        _clear_pid(m, v)
    restore(m, v)
    effects = recalculate(m, v)
    return sent_on_the_way(m, v, effects) if init else effects


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
    effects = _store_base(m, v, value)
    if m[k.H_TRAITS] & k.T_ENABLED_RESET and value & k.APICBASE_EN and not old & k.APICBASE_EN:
        effects = effects | reset(m, v, k.ONE)
    return effects | recalculate(m, v)


@kernel("u8(words, u8)")
def get_state(m, v):
    """kvm_apic_get_state: the page into H_STAGE. PIR is synced first; PPR is not recomputed.

    CODE_GP for EINVAL: an id that a page gave (ID_FROM_PAGE) is not the vCPU's, and ids have 32 bits since then.
    """
    sync_pir_to_irr(m, v)
    page = k.PAGE + v * k.PAGE_STRIDE
    copy_words(m, k.H_STAGE, page, k.PAGE_STRIDE)
    offset = k.APIC_ISR
    while offset < k.APIC_ESR:
        at = k.H_STAGE + (offset >> k.U(3))
        m[at] = (m[at] & k.HIGH32) | vector_slot(m, v, offset)
        offset = offset + k.U(16)
    if m[k.H_RULES] & k.R_TMCCT_RESTORED:
        at = k.H_STAGE + (k.APIC_TMCCT >> k.U(3))
        m[at] = (m[at] & k.HIGH32) | current_count(m, v)
    if in_x2apic_mode(m, v):
        apic_id = reg(m, v, k.APIC_ID)
        if not m[k.H_API] & k.X2API_32BIT_IDS:
            at = k.H_STAGE + (k.APIC_ID >> k.U(3))
            m[at] = (m[at] & k.HIGH32) | ((apic_id << k.U(24)) & k.LOW32)
        elif apic_id != m[own(m, v) + k.K_VCPU_ID]:
            return k.CODE_GP
        if not icr_is_split(m):
            high = m[word(m, v, k.APIC_ICR)] >> k.U(32)
            at = k.H_STAGE + (k.APIC_ICR2 >> k.U(3))
            m[at] = (m[at] & k.HIGH32) | high
    return k.ZERO


@kernel("u8(words, u8)")
def _fix_up_stage(m, v):
    """kvm_apic_state_fixup for a set: ID, LDR and ICR of a page that is meant for x2APIC mode; CODE_GP for EINVAL."""
    apic_id = m[own(m, v) + k.K_VCPU_ID]
    at = k.H_STAGE + (k.APIC_ID >> k.U(3))
    if m[k.H_API] & k.X2API_32BIT_IDS:
        if m[at] & k.LOW32 != apic_id:
            return k.CODE_GP
    elif m[k.H_RULES] & k.R_ID_FROM_PAGE:
        apic_id = (m[at] & k.LOW32) >> k.U(24)
    m[at] = (m[at] & k.HIGH32) | apic_id
    at = k.H_STAGE + (k.APIC_LDR >> k.U(3))
    m[at] = (m[at] & k.HIGH32) | x2apic_ldr(apic_id)
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

    Nothing is masked. PPR is recomputed before the ISR bits are counted, so it may still show the old ISR; where the
    page's was higher, what was posted goes to IRR, and stays there when PIR is emptied later.
    """
    if not m[k.H_RULES] & k.R_RESTORE_CLEARS_PIR_LAST:
        _clear_pid(m, v)
    effects = base_written(m, v, k.ZERO) if m[k.H_RULES] & k.R_SET_LAPIC_STORES_BASE else k.ZERO
    set_spiv(m, v, m[k.H_STAGE + (k.APIC_SPIV >> k.U(3))] & k.LOW32)
    if in_x2apic_mode(m, v) and _fix_up_stage(m, v):
        return k.CODE_GP | effects | recalculate(m, v)
    page = k.PAGE + v * k.PAGE_STRIDE
    copy_words(m, page, k.H_STAGE, k.PAGE_STRIDE)
    _store_vectors(m, v, k.APIC_ISR, own(m, v) + k.K_ISR)
    _store_vectors(m, v, k.APIC_TMR, hot(m, v) + k.HOT_TMR)
    _store_vectors(m, v, k.APIC_IRR, vec(m, v) + k.VEC_IRR)
    effects = effects | id_written(m, v)
    if not m[k.H_RULES] & k.R_MAP_DIRTY_BY_SVR:
        mark_dirty(m)
    effects = effects | recalculate(m, v)
    set_reg(m, v, k.APIC_LVR, version(m, v))
    update_ppr(m, v)
    row = own(m, v)
    cancel(m, v)
    if not m[k.H_RULES] & k.R_SET_LAPIC_KEEPS_WAIT:
        m[row + k.K_EXPIRED_DEADLINE] = k.ZERO
    update_lvtt(m, v)
    watch_lint0(m, v)
    update_divide(m, v)
    if m[k.H_RULES] & k.R_TMCCT_RESTORED:
        start(m, v, k.APIC_TMCCT)
        set_reg(m, v, k.APIC_TMCCT, k.ZERO)
    else:
        start(m, v, k.APIC_TMICT)
    recount(m, v)
    if m[k.H_RULES] & k.R_RESTORE_CLEARS_PIR_LAST and m[hot(m, v) + k.HOT_FLAGS] & k.FLAG_APICV:
        _clear_pid(m, v)
    restore(m, v)
    make_request(m, v, k.REQ_EVENT)
    if not m[k.H_CONFIG] & k.CONFIG_SPLIT_IRQCHIP:
        lock(m)
        rtc.restore(m, v)
        unlock(m)
    m[row + k.K_ARB_PRIO] = k.ZERO
    if not m[k.H_RULES] & k.R_CR8_WITH_PPR:
        update_cr8_intercept(m, v)
    return effects
