"""Messages from outside: kvm_send_userspace_msi, kvm_set_msi, and how KVM reads address and data of a message.

Spec: SDM vol. 3A 10.11.
"""

from ..jit.declare import kernel
from . import typed as k
from .ipi import deliver, is_illegal, log_illegal
from .shared import emit, own


@kernel("u8(words, u8)")
def route_invalid(m, address):
    """kvm_msi_route_invalid: bits 39:32 belong to nobody once ids have 32 bits."""
    return k.ONE if m[k.H_API] & k.X2API_32BIT_IDS and (address >> k.U(32)) & k.U(0xFF) else k.ZERO


@kernel("u8(words, u8)")
def destination(m, address):
    """kvm_msi_to_lapic_irq's dest_id. Address bits 31:20 are not looked at."""
    dest = (address >> k.U(12)) & k.U(0xFF)
    if m[k.H_API] & k.X2API_32BIT_IDS:
        dest = dest | ((address >> k.U(32)) & k.U(0xFFFF_FF00))
    return dest


@kernel("u8(u8, u8)")
def as_icr(address, data):
    """The message as the low half of an ICR; level is always asserted."""
    icr = (data & (k.ICR_VECTOR | k.ICR_DM | k.ICR_TRIGGER)) | k.ICR_LEVEL
    return icr | k.ICR_LOGICAL if address & k.U(4) else icr


@kernel("u8(u8)")
def redirection_hint(address):
    return (address >> k.U(3)) & k.ONE


@kernel("u8(words, u8, u8, u8)")
def signal_msi(m, address, data, me):
    """kvm_set_msi for KVM_SIGNAL_MSI: delivery code, or CODE_GP where the ioctl says EINVAL.

    There is no sending and no running vCPU; ``me``, a number from HOST on, has the list of targets.
    """
    m[own(m, me) + k.K_TARGETS] = k.ZERO
    if route_invalid(m, address):
        return k.CODE_GP
    icr = as_icr(address, data)
    dest = destination(m, address)
    hint = redirection_hint(address)
    if m[k.H_CONFIG] & k.CONFIG_TRACE:
        emit(m, k.TP_MSI_SET_IRQ, k.NONE, icr, dest, hint)
    if is_illegal(m, icr):
        return log_illegal(m, k.NONE, icr, dest, hint, me)
    return deliver(m, k.NONE, icr, dest, hint, me)
