"""SVM's virtual TPR: the VMCB has four bits of it, which every exit writes back to the APIC.

Models: sync_cr8_to_lapic, sync_lapic_to_cr8, and who says whether CR8 writes are intercepted: init_vmcb, AVIC's
(de)activation, KVM_SET_LAPIC and KVM_SET_SREGS; irq.update_cr8_intercept has the rule. What an entry loads is TPR[7:4],
so V_TPR has a word of its own only where KVM does not load it while AVIC is active: exits leave it there, as AVIC may
be active at the next entry. Not modelled: an L1 that leaves V_INTR_MASKING clear, whose L2 would have L1's TPR.
"""

from ..jit.declare import inlined, kernel
from . import typed as k
from .irq import update_cr8_intercept
from .lapicreg import reg
from .msr import set_cr8
from .shared import hot, own


@kernel("u8(words, u8, u8)")
def _keep(m, v, cr8):
    """V_TPR outlives what KVM writes to TPR from now on, if AVIC is active at the next entry."""
    if m[k.H_RULES] & k.R_V_TPR_KEPT_BY_AVIC and m[k.H_CONFIG] & k.CONFIG_APICV:
        m[own(m, v) + k.K_V_TPR] = cr8 + k.ONE
    return cr8


@kernel("u8(words, u8)")
def _loaded(m, v):
    """V_TPR as the guest leaves with it: the entry's TPR, unless AVIC was active then and kept what there was."""
    there = m[own(m, v) + k.K_V_TPR]
    if there and m[hot(m, v) + k.HOT_FLAGS] & k.FLAG_APICV:
        return there - k.ONE
    return (reg(m, v, k.APIC_TASKPRI) >> k.U(4)) & k.U(0xF)


@kernel("u8(words, u8)")
def write_back(m, v):
    """sync_cr8_to_lapic where V_TPR counts: TPR[3:0], and all that a page from user space had above bit 7, is lost."""
    return set_cr8(m, v, _keep(m, v, _loaded(m, v)))


@kernel("u8(words, u8)")
def look(m, v):
    """Behind an exit with CR8 writes intercepted: V_TPR is what it was loaded with, whatever KVM makes of TPR then."""
    if m[k.H_CONFIG] & k.CONFIG_SVM and not m[hot(m, v) + k.HOT_FLAGS] & k.FLAG_L2:
        _keep(m, v, _loaded(m, v))
    return k.ZERO


@inlined
@kernel("u8(words, u8)")
def sync_cr8_to_lapic(m, v):
    """Behind every VM exit, before anybody looks at it; nothing on VMX and in L2."""
    if m[hot(m, v) + k.HOT_FLAGS] & (k.FLAG_CR8_FREE | k.FLAG_L2) == k.FLAG_CR8_FREE:
        return write_back(m, v)
    return look(m, v) if m[k.H_RULES] & k.R_V_TPR_KEPT_BY_AVIC else k.ZERO


@kernel("u8(words, u8, u8)")
def move_to_cr8(m, v, value):
    """MOV to CR8 as the guest executes it: an exit where it is intercepted, else V_TPR.

    The write back belongs to the next exit; nobody looks at TPR until then, so it is made here.
    """
    if m[hot(m, v) + k.HOT_FLAGS] & (k.FLAG_CR8_FREE | k.FLAG_L2) != k.FLAG_CR8_FREE:
        return k.CODE_EXIT | k.SVM_WRITE_CR8 << k.CODE_EXIT_REASON_SHIFT
    if value > k.U(0xF):
        return k.CODE_HARDWARE | k.CODE_GP
    row = own(m, v)
    set_cr8(m, v, _keep(m, v, value))
    m[row + k.K_RIP] = m[row + k.K_RIP] + k.INSN_LEN_MOV_CR
    m[row + k.K_SHADOW] = k.ZERO
    return k.CODE_HARDWARE


@kernel("u8(words, u8, u8)")
def set_sregs_cr8(m, v, cr8):
    """KVM_SET_SREGS's CR8; CODE_GP where it is refused, which the ioctl ignores."""
    code = set_cr8(m, v, cr8)
    if not m[k.H_RULES] & k.R_CR8_WITH_PPR:
        update_cr8_intercept(m, v)
    return code
