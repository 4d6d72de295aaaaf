"""Synthetic interrupt sources of one vCPU as its APIC sees them: the vectors they have, and that an EOI tells them so.

Models: kvm_hv_synic_has_vector, kvm_hv_synic_auto_eoi_set, kvm_hv_synic_send_eoi, kvm_hv_notify_acked_sint. Not
modelled: resample irqfds of hv_sint routes. Spec: TLFS, "Virtual Interrupt Controller"; synic.py has the MSRs.

Both sets are of vectors, not of sources: whatever raises such a vector is treated as the source's.
"""

from ..jit.declare import kernel
from . import stimer
from . import typed as k
from .shared import emit, hv


@kernel("u8(words, u8, u8)")
def connected(m, v, vector):
    """1 when an unmasked SINT has the vector. Masked, as in auto_eoi: the index may come from memory."""
    return (m[hv(m, v) + k.HV_CONNECTED + ((vector >> k.U(6)) & k.U(3))] >> (vector & k.U(63))) & k.ONE


@kernel("u8(words, u8, u8)")
def auto_eoi(m, v, vector):
    """1 when an unmasked SINT has the vector and auto-EOI: it never comes into service."""
    return (m[hv(m, v) + k.HV_AUTO_EOI + ((vector >> k.U(6)) & k.U(3))] >> (vector & k.U(63))) & k.ONE


@kernel("u8(words, u8, u8)")
def vector_of(m, v, sint):
    """synic_get_sint_vector: NONE while it is masked."""
    value = m[hv(m, v) + k.HV_SINT + sint] ^ k.HV_SINT_MASKED
    return k.NONE if value & k.HV_SINT_MASKED else value & k.HV_SINT_VECTOR


@kernel("u8(words, u8, u8)")
def notify_acked(m, v, sint):
    """kvm_hv_notify_acked_sint: timers whose message did not fit try again."""
    if m[k.H_CONFIG] & k.CONFIG_TRACE:
        emit(m, k.TP_HV_NOTIFY_ACKED_SINT, v, sint, k.ZERO, k.ZERO)
    return stimer.retry(m, v, sint)


@kernel("u8(words, u8, u8)")
def send_eoi(m, v, vector):
    """kvm_hv_synic_send_eoi: every SINT that has the vector now is told, in ascending order."""
    if m[k.H_CONFIG] & k.CONFIG_TRACE:
        emit(m, k.TP_HV_SYNIC_SEND_EOI, v, vector, k.ZERO, k.ZERO)
    for i in range(k.SINTS):
        if vector_of(m, v, k.U(i)) == vector:
            notify_acked(m, v, k.U(i))
    return k.ZERO
