"""Where a device's interrupt may go without KVM: one vCPU, or nowhere.

Models: kvm_pi_update_irte, kvm_intr_is_single_vcpu with its map-based half, kvm_irq_is_postable, as of 6.18. Older
kernels traced posted mode only, every time. Spec: VT-d "Interrupt Posting".
"""

from ..jit.declare import ctz, kernel, popcount
from . import typed as k
from .apicmap import MEMBER_BITS, UNRESOLVED, member, members
from .match import delivery_mode, matches
from .msi import as_icr, destination, redirection_hint
from .shared import emit, hot, own


@kernel("u8(words, u8, u8, u8)")
def _single_fast(m, icr, dest, hint):
    """kvm_intr_is_single_vcpu_fast: vCPU index + 1, or 0 when the map cannot tell."""
    base = m[k.H_MAP]
    found = members(m, base, k.NONE, icr, dest, hint)
    bits = found >> MEMBER_BITS
    if found == UNRESOLVED or popcount(bits) != k.ONE:
        return k.ZERO
    return member(m, base, found, ctz(bits))


@kernel("u8(words, u8, u8)")
def target(m, address, data):
    """The one vCPU to which this message can be posted: its index, or NONE."""
    icr = as_icr(address, data)
    if delivery_mode(icr) > k.DM_LOWEST:
        return k.NONE
    dest = destination(m, address)
    found = _single_fast(m, icr, dest, redirection_hint(address))
    if found:
        return found - k.ONE
    one = k.NONE
    n = m[k.H_NVCPUS]
    for i in range(n):
        v = k.U(i)
        if m[hot(m, v) + k.HOT_FLAGS] & k.FLAG_HW and matches(m, v, k.NONE, icr, dest):
            if one != k.NONE:
                return k.NONE
            one = v
    return one


@kernel("u8(words, u8, u8, u8, u8, u8)")
def update(m, host_irq, gsi, address, data, was_posted):
    """kvm_pi_update_irte of an MSI route: the vCPU index for posted mode, NONE for remapped mode.

    What was remapped and stays so is not touched, and not traced.
    """
    v = k.NONE
    if m[k.H_CONFIG] & k.CONFIG_VTD_PI:
        v = target(m, address, data)
    if v == k.NONE and not was_posted:
        return v
    if m[k.H_CONFIG] & k.CONFIG_TRACE:
        posted = v != k.NONE
        vcpu_id = m[own(m, v) + k.K_VCPU_ID] if posted else k.LOW32
        on = k.ONE if posted else k.ZERO
        vector = data & k.ICR_VECTOR
        emit(m, k.TP_PI_IRTE_UPDATE, k.NONE, host_irq | (on << k.U(32)), gsi | (vcpu_id << k.U(32)), vector)
    return v
