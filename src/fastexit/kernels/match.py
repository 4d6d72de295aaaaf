"""Whom a destination means, without the APIC map; how many of them, by the delivery mode.

Models: kvm_lowest_prio_delivery, kvm_apic_is_broadcast_dest, kvm_apic_match_dest, kvm_apic_mda,
kvm_apic_match_physical_addr and kvm_apic_match_logical_addr. Spec: SDM vol. 3A 10.6.2.
"""

from ..jit.declare import kernel
from . import typed as k
from .lapicreg import reg
from .shared import hot, own


@kernel("u8(u8)")
def delivery_mode(icr):
    return (icr & k.ICR_DM) >> k.ICR_DM_SHIFT


@kernel("u8(u8, u8)")
def lowest_priority(icr, hint):
    """kvm_lowest_prio_delivery."""
    if hint or delivery_mode(icr) == k.DM_LOWEST:
        return k.ONE
    return k.ZERO


@kernel("u8(words, u8, u8, u8)")
def is_broadcast(m, base, src, dest):
    """kvm_apic_is_broadcast_dest, for physical and logical destinations alike."""
    if m[k.H_API] & k.X2API_NO_BROADCAST_QUIRK:
        if dest == k.X2APIC_BROADCAST:
            return k.ONE
        if dest == k.XAPIC_BROADCAST and m[base + k.MAP_LOGICAL] != k.LOGICAL_X2APIC:
            return k.ONE
        return k.ZERO
    broadcast = k.XAPIC_BROADCAST
    if src != k.NONE and m[hot(m, src) + k.HOT_FLAGS] & k.FLAG_X2APIC:
        broadcast = k.X2APIC_BROADCAST
    return k.ONE if dest == broadcast else k.ZERO


@kernel("u8(words, u8, u8, u8, u8)")
def matches(m, v, src, icr, dest):
    """kvm_apic_match_dest: decoding went by the sender's mode, matching goes by the target's."""
    shorthand = (icr & k.ICR_SHORTHAND) >> k.ICR_SHORTHAND_SHIFT
    if shorthand:
        if shorthand == k.SH_ALLINC:
            return k.ONE
        is_source = v == src
        return k.ONE if is_source == (shorthand == k.SH_SELF) else k.ZERO
    x2apic = m[hot(m, v) + k.HOT_FLAGS] & k.FLAG_X2APIC
    mda = dest
    quirk = not m[k.H_API] & k.X2API_NO_BROADCAST_QUIRK
    if quirk and src == k.NONE and dest == k.XAPIC_BROADCAST and x2apic:
        mda = k.X2APIC_BROADCAST
    if mda == (k.X2APIC_BROADCAST if x2apic else k.XAPIC_BROADCAST):
        return k.ONE
    if not icr & k.ICR_LOGICAL:
        # Ids above 0xFF name an APIC that has not switched to x2APIC yet by its x2APIC id (vCPU hot-plug).
        if x2apic or mda > k.XAPIC_BROADCAST:
            return k.ONE if mda == m[own(m, v) + k.K_VCPU_ID] else k.ZERO
        return k.ONE if mda == reg(m, v, k.APIC_ID) >> k.U(24) else k.ZERO
    ldr = reg(m, v, k.APIC_LDR)
    if x2apic:
        hit = ldr >> k.U(16) == mda >> k.U(16) and ldr & mda & k.U(0xFFFF) != k.ZERO
        return k.ONE if hit else k.ZERO
    logical_id = ldr >> k.U(24)
    dfr = reg(m, v, k.APIC_DFR)
    hit = False
    if dfr == k.DFR_FLAT:
        hit = logical_id & mda != k.ZERO
    elif dfr == k.DFR_CLUSTER:
        hit = logical_id >> k.U(4) == mda >> k.U(4) and logical_id & mda & k.U(0xF) != k.ZERO
    return k.ONE if hit else k.ZERO
