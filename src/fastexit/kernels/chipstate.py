"""IOAPIC and PICs as user space gets and sets them: the union of struct kvm_irqchip, on its way through H_STAGE.

Models: kvm_vm_ioctl_get_irqchip, kvm_vm_ioctl_set_irqchip, kvm_get_ioapic, kvm_set_ioapic, kvm_ioapic_inject_all.
Nothing is checked. Who holds pins up, EOI counters, a delayed re-delivery and the PICs' output are in no state; what
a migrated machine then does differently is KVM's own doing.
"""

from ..jit.declare import kernel
from . import i8259, rtc
from . import typed as k
from .ioapicpin import IRR, REDIRTBL, move
from .irqlock import lock, unlock
from .shared import ask_all, own

IOAPIC_CHIP = k.U(2)
WORDS = k.U(27)
"""Of kvm_ioapic_state: base address, IOREGSEL and id, irr and pad, entries. A PIC has 16 bytes."""


@kernel("u8(words)")
def _get_ioapic(m):
    """An edge that was delivered does not show in irr."""
    at = k.IOAPIC
    irr = m[IRR] & ~m[at + k.IOAPIC_IRR_DELIVERED]
    m[k.H_STAGE] = m[at + k.IOAPIC_BASE]
    m[k.H_STAGE + k.ONE] = m[at + k.IOAPIC_IOREGSEL] | m[at + k.IOAPIC_ID] << k.U(32)
    m[k.H_STAGE + k.U(2)] = irr | m[at + k.IOAPIC_PAD] << k.U(32)
    for i in range(k.IOAPIC_PINS):
        m[k.H_STAGE + k.U(3 + i)] = m[REDIRTBL + k.U(i)]
    return k.ZERO


@kernel("u8(words, u8)")
def _set_ioapic(m, me):
    """What waits is raised anew, followed where it is the RTC's; then the RTC's state is what vCPUs have of it."""
    at = k.IOAPIC
    m[at + k.IOAPIC_BASE] = m[k.H_STAGE]
    m[at + k.IOAPIC_IOREGSEL] = m[k.H_STAGE + k.ONE] & k.LOW32
    m[at + k.IOAPIC_ID] = m[k.H_STAGE + k.ONE] >> k.U(32)
    m[at + k.IOAPIC_PAD] = m[k.H_STAGE + k.U(2)] >> k.U(32)
    for i in range(k.IOAPIC_PINS):
        m[REDIRTBL + k.U(i)] = m[k.H_STAGE + k.U(3 + i)]
    m[IRR] = k.ZERO
    m[at + k.IOAPIC_IRR_DELIVERED] = k.ZERO
    effects = ask_all(m, k.REQ_SCAN_IOAPIC, me)
    rtc.reset(m)
    waiting = m[k.H_STAGE + k.U(2)]
    for i in range(k.IOAPIC_PINS):
        if waiting & (k.ONE << k.U(i)):
            effects = effects | move(m, k.U(i), k.ONE, k.ONE, me)
    rtc.restore_all(m)
    return effects


@kernel("u8(words, u8)")
def _get_pic(m, chip):
    at = k.PIC + chip * k.PIC_STRIDE
    m[k.H_STAGE] = k.ZERO
    m[k.H_STAGE + k.ONE] = k.ZERO
    for i in range(k.PIC_FIELDS):
        word = k.H_STAGE + (k.U(i) >> k.U(3))
        m[word] = m[word] | (m[at + k.U(i)] & k.U(0xFF)) << ((k.U(i) & k.U(7)) << k.U(3))
    return k.ZERO


@kernel("u8(words, u8)")
def _set_pic(m, chip):
    at = k.PIC + chip * k.PIC_STRIDE
    for i in range(k.PIC_FIELDS):
        word = m[k.H_STAGE + (k.U(i) >> k.U(3))]
        m[at + k.U(i)] = (word >> ((k.U(i) & k.U(7)) << k.U(3))) & k.U(0xFF)
    return k.ZERO


@kernel("u8(words, u8)")
def get_irqchip(m, chip):
    """KVM_GET_IRQCHIP of chip 0, 1 or 2, into H_STAGE."""
    lock(m)
    if chip == IOAPIC_CHIP:
        _get_ioapic(m)
    else:
        _get_pic(m, chip)
    unlock(m)
    return k.ZERO


@kernel("u8(words, u8, u8)")
def set_irqchip(m, chip, me):
    """KVM_SET_IRQCHIP of chip 0, 1 or 2, from H_STAGE: effect code. The PICs' output is looked at anew in any case."""
    m[own(m, me) + k.K_TARGETS] = k.ZERO
    lock(m)
    effects = k.ZERO
    if chip == IOAPIC_CHIP:
        effects = _set_ioapic(m, me)
    else:
        _set_pic(m, chip)
    effects = effects | i8259.update(m, me)
    unlock(m)
    return effects & k.CODE_EFFECTS
