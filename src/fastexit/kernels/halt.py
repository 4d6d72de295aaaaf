"""HLT: what keeps a vCPU awake, and what a halted one waits for.

Models: kvm_emulate_halt, kvm_vcpu_has_events, kvm_arch_vcpu_runnable, the vendors' interrupt_allowed and nmi_allowed,
kvm_cpu_has_extint. Not modelled: asynchronous page faults, Xen timers.
"""

from ..jit.declare import kernel
from . import typed as k
from .i8259 import accepts_extint
from .irq import has_interrupt
from .msr import skip
from .shared import hot, hv, own


@kernel("u8(words, u8)")
def interrupt_allowed(m, v):
    """The guest takes external interrupts now: RFLAGS.IF, no shadow, GIF."""
    row = own(m, v)
    if m[row + k.K_HFLAGS] & k.HF_GIF_CLEAR or m[row + k.K_SHADOW]:
        return k.ZERO
    return k.ONE if m[row + k.K_RFLAGS] & k.RFLAGS_IF else k.ZERO


@kernel("u8(words, u8)")
def nmi_allowed(m, v):
    """The guest takes an NMI now: none is being handled, no shadow, GIF."""
    row = own(m, v)
    blocked = m[row + k.K_NMI_MASKED] | m[row + k.K_SHADOW] | (m[row + k.K_HFLAGS] & k.HF_GIF_CLEAR)
    return k.ZERO if blocked else k.ONE


@kernel("u8(words, u8)")
def smi_allowed(m, v):
    """The guest takes an SMI now: not in SMM already, GIF."""
    return k.ZERO if m[own(m, v) + k.K_HFLAGS] & (k.HF_SMM | k.HF_GIF_CLEAR) else k.ONE


@kernel("u8(words, u8)")
def init_blocked(m, v):
    """kvm_apic_init_sipi_allowed, negated: SMM, VMX root operation outside L2, GIF clear."""
    hflags = m[own(m, v) + k.K_HFLAGS]
    if hflags & k.HF_SMM:
        return k.ONE
    if m[k.H_CONFIG] & k.CONFIG_SVM:
        return k.ONE if hflags & k.HF_GIF_CLEAR else k.ZERO
    return k.ONE if hflags & k.HF_VMXON and not m[hot(m, v) + k.HOT_FLAGS] & k.FLAG_L2 else k.ZERO


@kernel("u8(words, u8)")
def has_extint(m, v):
    """kvm_cpu_has_extint: the PIC pair's output is up, or KVM_INTERRUPT left a vector, and it can come in."""
    split = m[k.H_CONFIG] & k.CONFIG_SPLIT_IRQCHIP
    waits = m[own(m, v) + k.K_EXTINT] if split else m[k.PIC_OUTPUT]
    return k.ONE if waits and accepts_extint(m, v) else k.ZERO


@kernel("u8(words, u8)")
def has_events(m, v):
    """kvm_vcpu_has_events: something for which a halted vCPU goes on."""
    row = own(m, v)
    requests = m[hot(m, v) + k.HOT_REQUESTS]
    if m[row + k.K_PENDING_EVENTS] and (m[k.H_RULES] & k.R_BLOCKED_INIT_WAKES or not init_blocked(m, v)):
        return k.ONE
    if m[row + k.K_PV_UNHALTED] or m[row + k.K_EXCEPTION] or m[row + k.K_PENDING_DB]:
        return k.ONE
    if requests & (k.REQ_NMI | k.REQ_SMI):
        return k.ONE
    if requests & k.REQ_HV_STIMER and m[hv(m, v) + k.HV_STIMER_PENDING]:
        return k.ONE
    if m[row + k.K_NMI_PENDING] and nmi_allowed(m, v):
        return k.ONE
    if m[row + k.K_SMI_PENDING] and smi_allowed(m, v):
        return k.ONE
    if interrupt_allowed(m, v) and (has_extint(m, v) or has_interrupt(m, v) != k.NONE):
        return k.ONE
    return k.ZERO


@kernel("u8(words, u8)")
def runnable(m, v):
    """kvm_arch_vcpu_runnable.

    A vCPU that waits for INIT or SIPI goes on for nothing else. KVM calls it runnable for an NMI too, and its thread
    then spins until the SIPI comes; here it sleeps.
    """
    row = own(m, v)
    state = m[row + k.K_MP_STATE]
    if state == k.MP_RUNNABLE:
        return k.ONE
    if state == k.MP_HALTED or state == k.MP_AP_RESET_HOLD:
        return has_events(m, v)
    return k.ONE if m[row + k.K_PENDING_EVENTS] and not init_blocked(m, v) else k.ZERO


@kernel("u8(words, u8, u8)")
def set_mp_state(m, v, state):
    """kvm_set_mp_state: a vCPU that runs has used up its unhalt, or (UNHALT_KEPT) only one that has left a halt."""
    m[own(m, v) + k.K_MP_STATE] = state
    if state == k.MP_RUNNABLE and not m[k.H_RULES] & k.R_UNHALT_KEPT:
        m[own(m, v) + k.K_PV_UNHALTED] = k.ZERO
    return k.ZERO


@kernel("u8(words, u8)")
def end_halt(m, v):
    """A vCPU goes on behind its HLT, or never slept for it."""
    m[own(m, v) + k.K_MP_STATE] = k.MP_RUNNABLE
    m[own(m, v) + k.K_PV_UNHALTED] = k.ZERO
    return k.ZERO


@kernel("u8(words, u8)")
def emulate_halt(m, v):
    """kvm_emulate_halt: HALTED unless something is pending; the USER code of the skip."""
    user = skip(m, v, k.INSN_LEN_HLT)
    if has_events(m, v):
        end_halt(m, v)
    else:
        m[own(m, v) + k.K_MP_STATE] = k.MP_HALTED
    return user
