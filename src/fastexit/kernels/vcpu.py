"""A vCPU's first moments, and the MSI that reaches vCPUs from outside.

Models: kvm_arch_vcpu_create as far as APIC state goes, kvm_send_userspace_msi / kvm_set_msi.
"""

from . import typed as k
from ._jit import kernel
from .ipi import deliver
from .lapic import reset
from .shared import emit, hot, own


@kernel("u8(words, u8)")
def create(m, vcpu_id):
    """A new vCPU after the existing ones: its index.

    Its own reset rebuilds the map before other vCPUs can see it, so it is missing from the map until something else
    makes the map dirty.
    """
    v = m[k.H_NVCPUS]
    row = own(m, v)
    pid = hot(m, v)
    m[row + k.K_VCPU_ID] = vcpu_id
    m[pid + k.PID_CONTROL_WORD] = k.PID_SN | (k.POSTED_INTR_VECTOR << k.PID_NV_SHIFT)
    m[pid + k.HOT_FLAGS] = k.FLAG_APICV if m[k.H_CONFIG] & k.CONFIG_APICV else k.ZERO
    m[row + k.K_MP_STATE] = k.MP_UNINITIALIZED if vcpu_id else k.MP_RUNNABLE
    m[row + k.K_RFLAGS] = k.RFLAGS_FIXED
    m[row + k.K_RIP] = k.U(0xFFF0)
    m[row + k.K_CS] = k.U(0xF000)
    m[row + k.K_L1_WANTS_EXIT] = k.ONE
    reset(m, v, k.ZERO)
    m[k.H_NVCPUS] = v + k.ONE
    return v


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
