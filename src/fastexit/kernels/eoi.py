"""The end of an interrupt: ISR, then SynIC and IOAPIC, which may deliver again; and PV EOI, which ends one unseen.

Models: apic_set_eoi, kvm_ioapic_send_eoi, apic_sync_pv_eoi_from_guest. irq.py has what leads to it. Differs by
generation: from 6.15 on the end of a vector that is in the handled set only for an older route asks for another scan.
Spec: SDM vol. 3A 10.8.5; TLFS, "Virtual Interrupt Controller", for EOI assist.
"""

from ..jit.declare import kernel
from . import guestmemory, i8254, ioapic, sint
from . import typed as k
from .irq import clear_isr, highest_isr, ioapic_handles, update_ppr
from .lapicreg import reg
from .shared import emit, hot, make_request, own, take


@kernel("u8(words, u8, u8)")
def send_ioapic_eoi(m, v, vector):
    """kvm_ioapic_send_eoi: to user space's IOAPIC by an exit, to KVM's with the trigger mode that TMR has now.

    Suppress-EOI-broadcast counts only where user space asked for it; by default KVM advertises it on a split irqchip
    and broadcasts all the same. Effect code of what the IOAPIC delivers, and the PIT behind it.
    """
    if not ioapic_handles(m, v, vector):
        return k.ZERO
    row = own(m, v)
    if m[k.IRQ + v * k.IRQ_STRIDE + k.IRQ_STALE] == vector + k.ONE:
        make_request(m, v, k.REQ_SCAN_IOAPIC)
    if m[k.H_CONFIG] & k.CONFIG_SPLIT_IRQCHIP:
        if reg(m, v, k.APIC_SPIV) & k.SVR_SUPPRESS_EOI and m[k.H_API] & k.X2API_SUPPRESS_EOI:
            return k.ZERO
        m[row + k.K_IOAPIC_EOI] = vector
        make_request(m, v, k.REQ_IOAPIC_EOI_EXIT)
        return k.ZERO
    level = (m[hot(m, v) + k.HOT_TMR + (vector >> k.U(6))] >> (vector & k.U(63))) & k.ONE
    m[row + k.K_IOAPIC_EOI] = vector | (level << k.U(8))
    m[row + k.K_IOAPIC_EOIS] = m[row + k.K_IOAPIC_EOIS] + k.ONE
    effects = ioapic.update_eoi(m, v, vector, v)
    return effects | i8254.work(m, v)


@kernel("u8(words, u8)")
def set_eoi(m, v):
    """apic_set_eoi: effect code. With nothing in service only the trace line appears."""
    vector = highest_isr(m, v)
    if m[k.H_CONFIG] & k.CONFIG_TRACE:
        emit(m, k.TP_EOI, v, vector, k.ZERO, k.ZERO)
    if vector == k.NONE:
        return k.ZERO
    clear_isr(m, v, vector)
    update_ppr(m, v)
    if sint.connected(m, v, vector):
        sint.send_eoi(m, v, vector)
    effects = send_ioapic_eoi(m, v, vector)
    make_request(m, v, k.REQ_EVENT)
    return effects


@kernel("u8(words, u8)")
def end(m, v):
    """An EOI by the host: the vector that left service, or NONE. K_TARGETS has whom its effects are for."""
    m[own(m, v) + k.K_TARGETS] = k.ZERO
    vector = highest_isr(m, v)
    set_eoi(m, v)
    return vector


@kernel("u8(words, u8)")
def _withdraw(m, v):
    """pv_eoi_test_and_clr_pending: 1 when the guest has left the offer alone. Of an unreadable cell it stays open."""
    row = own(m, v)
    if not m[k.H_GUEST_BYTES]:
        m[row + k.K_ATTENTION] = k.ZERO
        return take(m, row + k.K_PV_EOI_FLAG)
    cell = m[row + k.K_PV_EOI_MSR] & ~k.PV_EOI_ENABLED
    if not guestmemory.reaches(m, cell, k.ONE):
        return k.ZERO
    left = guestmemory.load(m, cell, k.ONE) & k.ONE
    if left or m[k.H_HYPERV_RULES] & k.HVR_PV_EOI_ALWAYS_CLEARED:
        guestmemory.store(m, cell, k.ONE, k.ZERO)
    m[row + k.K_ATTENTION] = k.ZERO
    return left


@kernel("u8(words, u8)")
def take_pv_eoi(m, v):
    """apic_sync_pv_eoi_from_guest: the offer is withdrawn; a guest that took it has ended its interrupt. Effects."""
    if _withdraw(m, v):
        return k.ZERO
    vector = highest_isr(m, v)
    effects = set_eoi(m, v)
    if m[k.H_CONFIG] & k.CONFIG_TRACE:
        emit(m, k.TP_PV_EOI, v, vector, k.ZERO, k.ZERO)
    return effects
