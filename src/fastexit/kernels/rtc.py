"""The IOAPIC's pin 8, where KVM follows an interrupt until every vCPU that got it has ended it.

Models: rtc_status with its dest_map, rtc_irq_eoi, kvm_rtc_eoi_tracking_restore_one and _all, kvm_apic_pending_eoi. A
guest that counts RTC ticks wants user space to know which ones coalesced. The index is the pin's, not the GSI's.

Which vCPUs took an interrupt is not what a delivery code says, and acceptance itself is the hottest code there is; so
an interrupt that is followed is delivered here, member by member, with the same resolver.
"""

from ..jit.declare import ctz, kernel
from . import typed as k
from .apicmap import MEMBER_BITS, UNRESOLVED, member, members
from .ipi import NOBODY, accept, choose_lowest, combine, rewrite_lowest
from .match import delivery_mode, lowest_priority, matches
from .shared import hot, own, vec

RTC_PIN = k.U(8)
PENDING = k.IOAPIC + k.IOAPIC_RTC_PENDING


@kernel("u8(words, u8)")
def _row(m, v):
    """The word that has the vector + 1 which a vCPU is still to end; 0: none."""
    return k.IRQ + v * k.IRQ_STRIDE + k.IRQ_RTC_VECTOR


@kernel("u8(words, u8, u8)")
def pending_eoi(m, v, vector):
    """kvm_apic_pending_eoi: the vector waits or is in service. What is only posted is not seen."""
    word, bit = vector >> k.U(6), vector & k.U(63)
    return ((m[vec(m, v) + k.VEC_IRR + word] | m[own(m, v) + k.K_ISR + word]) >> bit) & k.ONE


@kernel("u8(words)")
def coalesces(m):
    """rtc_irq_check_coalesced: the last tick has not been ended by everybody."""
    pending = m[PENDING]
    return k.ONE if pending and not pending >> k.U(63) else k.ZERO


# ----------------------------------------------------------------------------------------------------------- delivered


@kernel("u8(words, u8, u8, u8)")
def _accept(m, v, icr, me):
    """One vCPU's delivery code; whoever takes it by its IRR has an EOI to come."""
    code = accept(m, v, icr, me)
    if code & k.CODE_ACCEPTED_NONE and delivery_mode(icr) <= k.DM_LOWEST:
        m[_row(m, v)] = (icr & k.ICR_VECTOR) + k.ONE
    return code


@kernel("u8(words, u8, u8, u8)")
def _scan(m, icr, dest, me):
    """The slow half of kvm_irq_delivery_to_apic."""
    if lowest_priority(icr, k.ZERO):
        best = choose_lowest(m, k.NONE, icr, dest)
        return NOBODY if best == k.NONE else _accept(m, best, icr, me)
    code = NOBODY
    for i in range(m[k.H_NVCPUS]):
        v = k.U(i)
        if m[hot(m, v) + k.HOT_FLAGS] & k.FLAG_HW and matches(m, v, k.NONE, icr, dest):
            if code & k.CODE_ACCEPTED_NONE == NOBODY:
                code = code & ~k.CODE_ACCEPTED_NONE
            code = combine(code, _accept(m, v, icr, me))
    return code


@kernel("u8(words, u8, u8, u8)")
def _resolve(m, icr, dest, me):
    """kvm_irq_delivery_to_apic, with a dest_map."""
    if m[k.H_TRAITS] & k.T_LOWEST_REWRITE_FIRST:
        icr = rewrite_lowest(m, icr, dest, k.ZERO)
    base = m[k.H_MAP]
    found = members(m, base, k.NONE, icr, dest, k.ZERO)
    if found == UNRESOLVED:
        return _scan(m, rewrite_lowest(m, icr, dest, k.ZERO), dest, me)
    bits = found >> MEMBER_BITS
    code = k.ZERO
    while bits:
        target = member(m, base, found, ctz(bits))
        bits = bits & (bits - k.ONE)
        if target:
            code = combine(code, _accept(m, target - k.ONE, icr, me))
    return code


@kernel("u8(words, u8, u8, u8)")
def deliver(m, icr, dest, me):
    """An interrupt of the pin that is followed: its delivery code. What NMI and the like accept nobody ever ends."""
    code = _resolve(m, icr, dest, me)
    accepted = code & k.CODE_ACCEPTED_NONE
    m[PENDING] = k.ZERO if accepted == NOBODY else accepted >> k.CODE_ACCEPTED_SHIFT
    return code


# --------------------------------------------------------------------------------------------------------------- ended


@kernel("u8(words)")
def reset(m):
    """rtc_irq_eoi_tracking_reset."""
    m[PENDING] = k.ZERO
    for i in range(m[k.H_NVCPUS]):
        at = _row(m, k.U(i))
        if m[at]:
            m[at] = k.ZERO
    return k.ZERO


@kernel("u8(words, u8)")
def _restore(m, v):
    """A vCPU that the entry's destination means is followed if its IRR or ISR has the vector; 1: the count is off."""
    entry = m[k.IOAPIC + k.IOAPIC_REDIRTBL + RTC_PIN]
    if not matches(m, v, k.NONE, entry & k.ICR_LOGICAL, entry >> k.REDIR_DEST_SHIFT):
        return k.ZERO
    at = _row(m, v)
    vector = entry & k.ICR_VECTOR
    new = pending_eoi(m, v, vector)
    if (new != k.ZERO) == (m[at] != k.ZERO):
        return k.ZERO
    m[at] = vector + k.ONE if new else k.ZERO
    m[PENDING] = m[PENDING] + k.ONE if new else m[PENDING] - k.ONE
    return m[PENDING] >> k.U(63)


@kernel("u8(words)")
def restore_all(m):
    """kvm_rtc_eoi_tracking_restore_all."""
    reset(m)
    for i in range(m[k.H_NVCPUS]):
        _restore(m, k.U(i))
    return k.ZERO


@kernel("u8(words, u8)")
def restore(m, v):
    """kvm_rtc_eoi_tracking_restore_one, for KVM_SET_LAPIC: of a vCPU that the pin does not mean an old bit stays."""
    return restore_all(m) if _restore(m, v) else k.ZERO


@kernel("u8(words, u8, u8)")
def end(m, v, vector):
    """rtc_irq_eoi: a vCPU ends the vector that it got from the pin."""
    at = _row(m, v)
    if m[at] != vector + k.ONE:
        return k.ZERO
    m[at] = k.ZERO
    m[PENDING] = m[PENDING] - k.ONE
    return restore_all(m) if m[PENDING] >> k.U(63) else k.ZERO
