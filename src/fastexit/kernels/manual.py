"""Which bits and registers the manual reserves, for machines that are the manual's.

Models: no kernel. Spec: SDM vol. 3A 10.4.1 (table 10-1), 10.5.1, 10.5.4, 10.9, 10.12.1.2 (table 10-6), 10.12.1.3.
"""

from ..jit.declare import kernel
from . import typed as k
from .lapicreg import reg
from .timer import timer_mode_mask


@kernel("u8(words, u8)")
def svr_writable(m, v):
    """Bits of SVR that there are: no focus checking (SDM 10.9), and bit 12 where LVR offers it."""
    suppress = k.SVR_SUPPRESS_EOI if reg(m, v, k.APIC_LVR) & k.LVR_DIRECTED_EOI else k.ZERO
    return k.SVR_WRITABLE & ~k.SVR_FOCUS | suppress


@kernel("u8(words, u8, u8)")
def reserved(m, v, offset):
    """Bits of a register at which an x2APIC write faults; of registers that fault anyway, the upper half."""
    if offset == k.APIC_ICR:
        return k.ICR_RESERVED | k.ICR_BUSY
    if offset == k.APIC_EOI or offset == k.APIC_ESR:
        return k.NONE
    if offset == k.APIC_TASKPRI or offset == k.APIC_SELF_IPI:
        return ~k.ICR_VECTOR
    if offset == k.APIC_SPIV:
        return ~svr_writable(m, v)
    if offset == k.APIC_TDCR:
        return ~k.TDCR_WRITABLE
    if offset == k.APIC_LVTT:
        return ~(k.LVT_WRITABLE_TIMER | timer_mode_mask(m))
    if offset == k.APIC_LVTERR:
        return ~k.LVT_WRITABLE_ERROR
    if offset == k.APIC_LVT0 or offset == k.APIC_LVT1:
        return ~k.LVT_WRITABLE_LINT
    if offset == k.APIC_LVTTHMR or offset == k.APIC_LVTPC or offset == k.APIC_LVTCMCI:
        return ~k.LVT_WRITABLE_LOCAL
    return k.HIGH32


@kernel("u8(words, u8, u8, u8)")
def writable(m, v, offset, value):
    """What a write of a register leaves of a value, where it does not fault: status is the APIC's, the rest reads 0."""
    if offset == k.APIC_SPIV:
        return value & svr_writable(m, v)
    if offset == k.APIC_ICR:
        return value & ~(k.ICR_RESERVED | k.ICR_BUSY)
    if (offset >= k.APIC_LVTT and offset <= k.APIC_LVTERR) or offset == k.APIC_LVTCMCI:
        return value & ~k.LVT_READ_ONLY
    return value


@kernel("u8(words, u8)")
def is_register(m, offset):
    """Tell whether the xAPIC page has a register at an aligned offset (SDM table 10-1)."""
    if offset >= k.APIC_TASKPRI and offset <= k.APIC_ESR:
        return k.ONE
    if offset == k.APIC_LVTCMCI:
        return k.ONE if m[k.H_CONFIG] & k.CONFIG_CMCI else k.ZERO
    if offset >= k.APIC_ICR and offset <= k.APIC_TMCCT:
        return k.ONE
    return k.ONE if offset == k.APIC_ID or offset == k.APIC_LVR or offset == k.APIC_TDCR else k.ZERO
