"""Raw registers of the 1 KiB page: what reading and storing a word means, without side effects.

Each register is the first dword of a 16-byte slot, so a register is the low half of one 64-bit word; the high half is
0 except in the ICR's slot, where it is KVM's 64-bit x2APIC ICR. IRR, ISR and TMR live in their own words as 256-bit
sets; vector_slot shows them as the page's dwords.
"""

from ..jit.declare import kernel
from . import typed as k
from .shared import hot, own, vec


@kernel("u8(words, u8, u8)")
def word(m, v, offset):
    """Word index of the register at a 16-byte aligned page offset."""
    return k.PAGE + v * k.PAGE_STRIDE + (offset >> k.U(3))


@kernel("u8(words, u8, u8)")
def reg(m, v, offset):
    """kvm_lapic_get_reg."""
    return m[word(m, v, offset)] & k.LOW32


@kernel("u8(words, u8, u8, u8)")
def set_reg(m, v, offset, value):
    """kvm_lapic_set_reg: the dword at 4 above the slot's start keeps its value."""
    i = word(m, v, offset)
    m[i] = (m[i] & k.HIGH32) | (value & k.LOW32)
    return k.ZERO


@kernel("u8(words)")
def icr_is_split(m):
    """Whether the x2APIC ICR is stored as 0x300 and 0x310 instead of as one u64 at 0x300."""
    traits = m[k.H_TRAITS]
    if traits & k.T_ICR_SPLIT:
        return k.ONE
    if traits & k.T_ICR_SPLIT_SVM and m[k.H_CONFIG] & k.CONFIG_SVM:
        return k.ONE
    return k.ZERO


@kernel("u8(words, u8)")
def x2apic_icr(m, v):
    """The 64-bit x2APIC ICR as a read returns it."""
    if icr_is_split(m):
        return reg(m, v, k.APIC_ICR) | (reg(m, v, k.APIC_ICR2) << k.U(32))
    return m[word(m, v, k.APIC_ICR)]


@kernel("u8(words, u8, u8)")
def set_x2apic_icr(m, v, value):
    if icr_is_split(m):
        set_reg(m, v, k.APIC_ICR, value)
        set_reg(m, v, k.APIC_ICR2, value >> k.U(32))
    else:
        m[word(m, v, k.APIC_ICR)] = value
    return k.ZERO


@kernel("u8(words, u8, u8)")
def vector_slot(m, v, offset):
    """The dword of ISR (0x100-0x170), TMR (0x180-0x1F0) or IRR (0x200-0x270) at this offset."""
    if offset < k.APIC_TMR:
        base = own(m, v) + k.K_ISR
    elif offset < k.APIC_IRR:
        base = hot(m, v) + k.HOT_TMR
    else:
        base = vec(m, v) + k.VEC_IRR
    i = (offset >> k.U(4)) & k.U(7)
    return (m[base + (i >> k.ONE)] >> ((i & k.ONE) << k.U(5))) & k.LOW32


@kernel("u8(words, u8)")
def version(m, v):
    """kvm_apic_set_version's value: directed EOI is advertised on a split irqchip unless user space forbade it."""
    config = m[k.H_CONFIG]
    value = k.APIC_VERSION_CMCI if config & k.CONFIG_CMCI else k.APIC_VERSION
    wanted = k.CONFIG_X2APIC_CPUID | k.CONFIG_SPLIT_IRQCHIP
    if config & wanted == wanted and not m[k.H_API] & k.X2API_NO_SUPPRESS_EOI:
        value = value | k.LVR_DIRECTED_EOI
    return value


@kernel("u8(u8)")
def x2apic_ldr(apic_id):
    """The logical id that hardware derives from the x2APIC id (SDM 10.12.10.2)."""
    return ((apic_id >> k.U(4)) << k.U(16)) | (k.ONE << (apic_id & k.U(15)))
