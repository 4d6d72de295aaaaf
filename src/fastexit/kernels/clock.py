"""The machine's clock in ns and in the guest's TSC, and which timer of the host counts on it for a vCPU.

Models: nsec_to_cycles, kvm_read_l1_tsc, hv_timer_in_use, kvm_can_use_hv_timer, kvm_can_post_timer_interrupt.

The clock is H_NOW, which only the caller moves, and no further than 63 bits of guest TSC. Guest TSC is the clock times
tsc_khz, computed exactly, where KVM multiplies by a rounded fraction. Not modelled: TSC offsets and scaling.

Times that exceed 64 bits of TSC stay at the last one, where KVM's wrap: a period of centuries does not end at once.
"""

from ..jit.declare import kernel, umin
from . import typed as k
from .shared import hot, own

MILLION = k.U(1_000_000)


@kernel("u8(words, u8)")
def cycles(m, ns):
    """nsec_to_cycles, at most 2^64 - 1."""
    khz = m[k.H_TSC_KHZ]
    whole, rest = ns // MILLION, ns % MILLION * khz // MILLION
    if whole >> k.U(40) and whole > (k.NONE - rest) // khz:  # the frequency has 24 bits
        return k.NONE
    return whole * khz + rest


@kernel("u8(words)")
def guest_tsc(m):
    """The guest's TSC at the machine's clock. kvm_read_l1_tsc."""
    return cycles(m, m[k.H_NOW])


@kernel("u8(words, u8)")
def tsc_after(m, ns):
    """The guest's TSC when so many ns have gone by, at most 2^64 - 1."""
    return later(guest_tsc(m), cycles(m, ns))


@kernel("u8(u8, u8)")
def later(tsc, ticks):
    """The sum, at most 2^64 - 1."""
    return tsc + umin(ticks, k.NONE - tsc)


@kernel("u8(words, u8)")
def nanoseconds(m, tsc):
    """Guest TSC ticks as ns."""
    khz = m[k.H_TSC_KHZ]
    return tsc // khz * MILLION + tsc % khz * MILLION // khz


@kernel("u8(words, u8)")
def hv_in_use(m, v):
    """hv_timer_in_use: the preemption timer, not an hrtimer, counts for this vCPU."""
    return k.ONE if m[own(m, v) + k.K_HV_DEADLINE] != k.NONE else k.ZERO


@kernel("u8(words, u8)")
def can_post(m, v):
    """kvm_can_post_timer_interrupt: a guest that is never interrupted gets its ticks posted by another CPU."""
    if not m[k.H_CONFIG] & k.CONFIG_PI_INJECT_TIMER or not m[hot(m, v) + k.HOT_FLAGS] & k.FLAG_APICV:
        return k.ZERO
    polls = m[k.H_DISABLED_EXITS] & (k.EXITS_MWAIT | k.EXITS_HLT)
    return k.ONE if polls or m[k.H_RULES] & k.R_POSTS_TIMER_ANYWAY else k.ZERO


@kernel("u8(words, u8)")
def can_use_hv(m, v):
    """kvm_can_use_hv_timer."""
    if not m[k.H_CONFIG] & k.CONFIG_HV_TIMER or m[k.H_DISABLED_EXITS] & k.EXITS_MWAIT:
        return k.ZERO
    return k.ZERO if can_post(m, v) else k.ONE
