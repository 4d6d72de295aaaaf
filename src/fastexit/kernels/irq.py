"""IRR, ISR and PPR of one vCPU, and what PV EOI offers; eoi.py has what ends an interrupt.

Models: apic_find_highest_isr, apic_set_isr/clear_isr, apic_clear_irr, apic_update_ppr, apic_has_interrupt_for_ppr,
kvm_apic_has_interrupt, kvm_apic_ack_interrupt, kvm_ioapic_handles_vector, apic_sync_pv_eoi_to_guest.
Differs by APICv: isr_count is a constant 1 and the cache is never used, because hardware moves the ISR bits. By
generation: up to 5.15 PV EOI's cell becomes 0 whatever the guest has made of it, and its MSR keeps a value that it
refuses.
Spec: SDM vol. 3A 10.8.3-10.8.5; TLFS, "Virtual Interrupt Controller", for auto-EOI and EOI assist.
"""

from ..jit.declare import kernel
from . import guestmemory, sint
from . import typed as k
from .lapicreg import reg, set_reg
from .pid import highest, highest_irr, sync_pir_to_irr
from .shared import clear_word_bits, hot, make_request, or_word, own, vec


@kernel("u8(words, u8)")
def apicv_active(m, v):
    return m[hot(m, v) + k.HOT_FLAGS] & k.FLAG_APICV


@kernel("u8(words, u8)")
def highest_isr(m, v):
    """apic_find_highest_isr: vector or NONE, by count and cache before any scan."""
    row = own(m, v)
    if not m[row + k.K_ISR_COUNT]:
        return k.NONE
    if m[row + k.K_ISR_CACHE] != k.NONE:
        return m[row + k.K_ISR_CACHE]
    return highest(m, own(m, v) + k.K_ISR)


@kernel("u8(words, u8)")
def compute_ppr(m, v):
    """__apic_update_ppr: store PPR when it changed; 1 when it went down."""
    tpr = reg(m, v, k.APIC_TASKPRI)
    isr = highest_isr(m, v)
    if isr == k.NONE:
        isr = k.ZERO
    if tpr & k.U(0xF0) >= isr & k.U(0xF0):
        ppr = tpr & k.U(0xFF)
    else:
        ppr = isr & k.U(0xF0)
    old = reg(m, v, k.APIC_PROCPRI)
    if old != ppr:
        set_reg(m, v, k.APIC_PROCPRI, ppr)
    return k.ONE if ppr < old else k.ZERO


@kernel("u8(words, u8)")
def deliverable(m, v):
    """apic_has_interrupt_for_ppr with the stored PPR: vector or NONE."""
    irr = sync_pir_to_irr(m, v)
    if irr == k.NONE or irr & k.U(0xF0) <= reg(m, v, k.APIC_PROCPRI):
        return k.NONE
    return irr


@kernel("u8(words, u8)")
def update_cr8_intercept(m, v):
    """kvm_lapic_update_cr8_intercept: what makes a lower TPR exit while TPR holds back the highest vector in IRR.

    SVM intercepts CR8 writes, VMX has a TPR threshold. Not while APICv is active, nor in L2, whose TPR is taken to be
    L1's business (V_INTR_MASKING, a TPR shadow).
    """
    at = hot(m, v) + k.HOT_FLAGS
    if m[at] & (k.FLAG_APICV | k.FLAG_L2):
        return k.ZERO
    top = highest_irr(m, v)
    held = top != k.NONE and reg(m, v, k.APIC_TASKPRI) & k.U(0xF0) >= top & k.U(0xF0)
    if not m[k.H_CONFIG] & k.CONFIG_SVM:
        m[own(m, v) + k.K_TPR_THRESHOLD] = top >> k.U(4) if held else k.ZERO
    elif held:
        m[at] = m[at] & ~k.FLAG_CR8_FREE
    else:
        m[at] = m[at] | k.FLAG_CR8_FREE
    return k.ZERO


@kernel("u8(words, u8)")
def update_ppr(m, v):
    """apic_update_ppr: a PPR that went down may let an interrupt through, which asks for an EVENT."""
    if compute_ppr(m, v) and deliverable(m, v) != k.NONE:
        make_request(m, v, k.REQ_EVENT)
    elif m[k.H_RULES] & k.R_CR8_WITH_PPR:
        update_cr8_intercept(m, v)
    return k.ZERO


@kernel("u8(words, u8)")
def has_interrupt(m, v):
    """kvm_apic_has_interrupt: the vector that would be injected now, or NONE.

    A software-disabled APIC accepts nothing new, but what it has is still injected: only hardware-disable counts.
    """
    if not m[hot(m, v) + k.HOT_FLAGS] & k.FLAG_HW:
        return k.NONE
    compute_ppr(m, v)
    return deliverable(m, v)


@kernel("u8(words, u8, u8)")
def set_irr(m, v, vector):
    """kvm_lapic_set_irr. The bit goes first: clear_irr may have scanned just before and store irr_pending = false."""
    or_word(m, vec(m, v) + k.VEC_IRR + (vector >> k.U(6)), k.ONE << (vector & k.U(63)))
    m[vec(m, v) + k.VEC_IRR_PENDING] = k.ONE
    return k.ZERO


@kernel("u8(words, u8, u8)")
def clear_irr(m, v, vector):
    """apic_clear_irr."""
    irr = vec(m, v) + k.VEC_IRR
    bit = k.ONE << (vector & k.U(63))
    if apicv_active(m, v):
        clear_word_bits(m, irr + (vector >> k.U(6)), bit)
        top = highest(m, irr)
        m[vec(m, v) + k.VEC_RVI] = k.ZERO if top == k.NONE else top
        return k.ZERO
    m[vec(m, v) + k.VEC_IRR_PENDING] = k.ZERO
    clear_word_bits(m, irr + (vector >> k.U(6)), bit)
    if highest(m, irr) != k.NONE:
        m[vec(m, v) + k.VEC_IRR_PENDING] = k.ONE
    return k.ZERO


@kernel("u8(words, u8, u8)")
def set_isr(m, v, vector):
    """apic_set_isr: assumes that an injected vector is the highest in service, as the cache does in KVM."""
    i = own(m, v) + k.K_ISR + (vector >> k.U(6))
    bit = k.ONE << (vector & k.U(63))
    if m[i] & bit:
        return k.ZERO
    m[i] = m[i] | bit
    row = own(m, v)
    if apicv_active(m, v):
        m[row + k.K_SVI] = vector
    else:
        m[row + k.K_ISR_COUNT] = m[row + k.K_ISR_COUNT] + k.ONE
        m[row + k.K_ISR_CACHE] = vector
    return k.ZERO


@kernel("u8(words, u8, u8)")
def clear_isr(m, v, vector):
    """apic_clear_isr."""
    i = own(m, v) + k.K_ISR + (vector >> k.U(6))
    bit = k.ONE << (vector & k.U(63))
    if not m[i] & bit:
        return k.ZERO
    m[i] = m[i] & ~bit
    row = own(m, v)
    if apicv_active(m, v):
        top = highest(m, own(m, v) + k.K_ISR)
        m[row + k.K_SVI] = k.ZERO if top == k.NONE else top
    else:
        # A page from KVM_SET_LAPIC is counted afterwards, so the count cannot be 0 while a bit is set.
        m[row + k.K_ISR_COUNT] = m[row + k.K_ISR_COUNT] - k.ONE
        m[row + k.K_ISR_CACHE] = k.NONE
    return k.ZERO


@kernel("u8(words, u8)")
def recount(m, v):
    """kvm_apic_update_apicv: isr_count, cache and irr_pending from scratch."""
    row = own(m, v)
    m[vec(m, v) + k.VEC_IRR_PENDING] = k.ONE
    m[row + k.K_ISR_CACHE] = k.NONE
    if apicv_active(m, v):
        m[row + k.K_ISR_COUNT] = k.ONE
        top = highest(m, own(m, v) + k.K_ISR)
        m[row + k.K_SVI] = k.ZERO if top == k.NONE else top
        return k.ZERO
    count = k.ZERO
    for i in range(4):
        bits = m[own(m, v) + k.K_ISR + k.U(i)]
        while bits:
            bits = bits & (bits - k.ONE)
            count = count + k.ONE
    m[row + k.K_ISR_COUNT] = count
    return k.ZERO


@kernel("u8(words, u8)")
def ack(m, v):
    """kvm_apic_has_interrupt and kvm_apic_ack_interrupt: IRR to ISR; the vector, or NONE when none is deliverable.

    A vector with auto-EOI is never in service, so PPR stays as it was.
    """
    vector = has_interrupt(m, v)
    if vector == k.NONE:
        return k.NONE
    clear_irr(m, v, vector)
    if sint.auto_eoi(m, v, vector):
        update_ppr(m, v)
        return vector
    set_isr(m, v, vector)
    compute_ppr(m, v)
    return vector


@kernel("u8(words, u8, u8)")
def ioapic_handles(m, v, vector):
    """kvm_ioapic_handles_vector: 1 when the routing wants this vector's EOI. Masked: the index may come from memory."""
    return (m[own(m, v) + k.K_IOAPIC_HANDLED + ((vector >> k.U(6)) & k.U(3))] >> (vector & k.U(63))) & k.ONE


# ------------------------------------------------------------------------------------------------------------- PV EOI


@kernel("u8(words, u8, u8)")
def set_pv_eoi(m, v, value):
    """kvm_lapic_set_pv_eoi: where the guest's cell is, bit 0 enables. KVM's own MSR and Hyper-V's share this state.

    The cell is a byte of the guest's memory, where the machine has one; else it is a word of the machine's. A cell that
    is not there is refused, and KVM has lost its way to the old one by then, which stays enabled and unused.
    """
    if value & k.PV_EOI_RESERVED:
        return k.CODE_GP
    cell = value & ~k.PV_EOI_ENABLED
    lost = value & k.PV_EOI_ENABLED and m[k.H_GUEST_BYTES] and not guestmemory.reaches(m, cell, k.ONE)
    if value & k.PV_EOI_ENABLED and m[k.H_GUEST_BYTES]:
        m[own(m, v) + k.K_PV_EOI_FLAG] = k.PV_EOI_LOST if lost else k.ZERO
    if not lost or m[k.H_HYPERV_RULES] & k.HVR_PV_EOI_STORED_FIRST:
        m[own(m, v) + k.K_PV_EOI_MSR] = value
    return k.CODE_GP if lost else k.ZERO


@kernel("u8(words, u8)")
def offer_pv_eoi(m, v):
    """apic_sync_pv_eoi_to_guest: one interrupt in service, none behind it, nobody to tell: EOI may be skipped.

    What is offered is the end of the highest vector in service, which one with auto-EOI never is.
    """
    row = own(m, v)
    if not m[row + k.K_PV_EOI_MSR] & k.PV_EOI_ENABLED or m[vec(m, v) + k.VEC_IRR_PENDING]:
        return k.ZERO
    vector = m[row + k.K_ISR_CACHE]
    if vector == k.NONE or ioapic_handles(m, v, vector):
        return k.ZERO
    if m[k.H_GUEST_BYTES]:
        cell = m[row + k.K_PV_EOI_MSR] & ~k.PV_EOI_ENABLED
        if not guestmemory.reaches(m, cell, k.ONE) or m[row + k.K_PV_EOI_FLAG] & k.PV_EOI_LOST:
            return k.ZERO
        guestmemory.store(m, cell, k.ONE, k.ONE)
    else:
        m[row + k.K_PV_EOI_FLAG] = k.ONE
    m[row + k.K_ATTENTION] = k.ONE
    return k.ZERO
