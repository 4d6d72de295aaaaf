"""Messages from outside: kvm_send_userspace_msi and kvm_set_msi. Spec: SDM vol. 3A 10.11."""

from . import typed as k
from ._jit import kernel
from .ipi import deliver
from .shared import emit


@kernel("u8(words, u8, u8)")
def signal_msi(m, address, data):
    """kvm_set_msi for KVM_SIGNAL_MSI: delivery code, or CODE_GP where the ioctl says EINVAL.

    Address bits 31:20 are not looked at. Level is always asserted; there is no sender and no running vCPU.
    """
    high = address >> k.U(32)
    dest = (address >> k.U(12)) & k.U(0xFF)
    if m[k.H_API] & k.X2API_32BIT_IDS:
        if high & k.U(0xFF):
            return k.CODE_GP
        dest = dest | (high & k.U(0xFFFF_FF00))
    icr = (data & (k.ICR_VECTOR | k.ICR_DM | k.ICR_TRIGGER)) | k.ICR_LEVEL
    if address & k.U(4):
        icr = icr | k.ICR_LOGICAL
    hint = (address >> k.U(3)) & k.ONE
    if m[k.H_CONFIG] & k.CONFIG_TRACE:
        emit(m, k.TP_MSI_SET_IRQ, k.NONE, icr, dest, hint)
    return deliver(m, k.NONE, icr, dest, hint, k.NONE)
