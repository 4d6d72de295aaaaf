"""KVM's half of APIC accesses that the CPU has begun: the exits of hardware-virtualised APICs.

Models: kvm_apic_write_nodecode, kvm_apic_set_eoi_accelerated, kvm_lapic_set_eoi, kvm_apic_update_ppr. The CPU's half is
apicv.py's. Kernels up to 5.10 read the register through the path of a guest's read, trace line and all.
"""

from ..jit.declare import kernel
from . import typed as k
from .eoi import send_ioapic_eoi
from .irq import update_ppr
from .lapic import in_x2apic_mode, readable, reg_read, reg_write, x2apic_icr_write
from .lapicreg import reg, vector_slot, x2apic_icr
from .msr import skip
from .shared import emit, make_request


@kernel("u8(words, u8, u8)")
def _in_page(m, v, offset):
    """What the CPU has stored; the page ends at 0x3FF here, and beyond it nothing is ever stored."""
    if offset >= k.LAPIC_PAGE_BYTES:
        return k.ZERO
    if m[k.H_TRAITS] & k.T_TRACE_ICR2_FIRST:
        return reg_read(m, v, offset, offset) if readable(m, v, offset) else k.ZERO
    if offset >= k.APIC_ISR and offset < k.APIC_ESR:
        return vector_slot(m, v, offset)
    return reg(m, v, offset)


@kernel("u8(words, u8, u8)")
def write_nodecode(m, v, offset):
    """kvm_apic_write_nodecode: the value is in the page already, now it is written once more, with its side effects.

    Nothing is taken back: what KVM ignores (ESR, TMICT in deadline mode) stays as the CPU stored it. A delivery code.
    """
    offset = offset & k.U(0xFF0)
    if offset == k.APIC_ICR and in_x2apic_mode(m, v):
        return x2apic_icr_write(m, v, x2apic_icr(m, v)) & k.CODE_DELIVERY
    return reg_write(m, v, offset, _in_page(m, v, offset)) & k.CODE_DELIVERY


@kernel("u8(words, u8, u8)")
def set_eoi(m, v, vector):
    """kvm_apic_set_eoi_accelerated: ISR and PPR are the CPU's work; the IOAPIC and a next interrupt are KVM's.

    Effect code.
    """
    vector = vector & k.ICR_VECTOR
    if m[k.H_CONFIG] & k.CONFIG_TRACE:
        emit(m, k.TP_EOI, v, vector, k.ZERO, k.ZERO)
    effects = send_ioapic_eoi(m, v, vector)
    make_request(m, v, k.REQ_EVENT)
    return effects


@kernel("u8(words, u8, u8)")
def access_eoi(m, v, length):
    """handle_apic_access for a write to EOI: no decoding, the value does not matter; what the skip says."""
    return reg_write(m, v, k.APIC_EOI, k.ZERO) | skip(m, v, length)


@kernel("u8(words, u8)")
def tpr_below_threshold(m, v):
    """handle_tpr_below_threshold: the TPR shadow fell below the vector that waits."""
    return update_ppr(m, v)
