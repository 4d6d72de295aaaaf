"""The machine's clock in ns and in TSC ticks, the host's and a guest's, and which timer of the host counts for a vCPU.

Models: nsec_to_cycles, kvm_read_l1_tsc, kvm_scale_tsc, hv_timer_in_use, kvm_can_use_hv_timer,
kvm_can_post_timer_interrupt; tsc.py has how a guest's TSC is moved.

The clock is H_NOW, which only callers move, and no further than 63 bits of TSC. A host's that goes by itself may move
it within a call, never back, so a kernel that needs one time twice reads it once. The host's TSC is the clock times
tsc_khz, computed exactly; a guest's runs at that rate, or at the vCPU's own, from the same moment, plus the vCPU's
offset, where KVM multiplies by a rounded fraction.

Times that exceed 64 bits of TSC stay at the last one, where KVM's wrap: a period of centuries does not end at once. An
offset wraps, as KVM's.
"""

from ..jit.declare import kernel, umin
from . import typed as k
from .shared import hot, own, replace_if

MILLION = k.U(1_000_000)
LATEST = k.U((1 << 63) - 1)
"""KTIME_MAX: the host's clock has 63 bits."""


@kernel("u8(u8)")
def tsc_row(v):
    """First word of a vCPU's row of TSC words."""
    return k.TSC + v * k.TSC_STRIDE


@kernel("u8(u8, u8)")
def at_rate(khz, ns):
    """TSC ticks in so many ns, at most 2^64 - 1."""
    whole, rest = ns // MILLION, ns % MILLION * khz // MILLION
    if whole >> k.U(40) and whole > (k.NONE - rest) // khz:  # the frequency has 24 bits
        return k.NONE
    return whole * khz + rest


@kernel("u8(words, u8)")
def advance(m, ns):
    """Move the clock to ``ns``, unless another thread has moved it further: where it is.

    Beyond 63 bits, of ns or of TSC, it does not go: a timer's next target would wrap, and be due for ever.
    """
    now = m[k.H_NOW]
    if ns > LATEST or at_rate(m[k.H_TSC_KHZ], ns) > LATEST:
        return now
    while now < ns:
        was = replace_if(m, k.H_NOW, now, ns)
        now = ns if was == now else was
    return now


@kernel("u8(words)")
def host_tsc(m):
    """The host's TSC at the machine's clock. rdtsc."""
    return at_rate(m[k.H_TSC_KHZ], m[k.H_NOW])


@kernel("u8(words, u8)")
def virtual_khz(m, v):
    """virtual_tsc_khz: what user space has said that a vCPU's TSC runs at."""
    khz = m[k.H_TSC_KHZ]
    return khz ^ m[tsc_row(v) + k.TSC_KHZ] if m[k.H_TSC_MOVED] else khz


@kernel("u8(words, u8)")
def is_scaled(m, v):
    """Whether a vCPU's TSC runs at another rate than the host's."""
    return m[tsc_row(v) + k.TSC_RATE] if m[k.H_TSC_MOVED] else k.ZERO


@kernel("u8(words, u8, u8)")
def _scaled(m, v, host):
    """kvm_scale_tsc of the host's TSC as it is now."""
    rate = m[tsc_row(v) + k.TSC_RATE]
    return at_rate(m[k.H_TSC_KHZ] ^ rate, m[k.H_NOW]) if rate else host


@kernel("u8(words, u8, u8)")
def guest_of(m, v, host):
    """A vCPU's TSC while the host's is ``host``, as it is now."""
    return _scaled(m, v, host) + m[tsc_row(v) + k.TSC_OFFSET] if m[k.H_TSC_MOVED] else host


@kernel("u8(words, u8, u8)")
def cycles(m, v, ns):
    """nsec_to_cycles, at most 2^64 - 1."""
    return at_rate(virtual_khz(m, v), ns)


@kernel("u8(words, u8)")
def guest_tsc(m, v):
    """A vCPU's TSC at the machine's clock. kvm_read_l1_tsc."""
    return guest_of(m, v, host_tsc(m))


@kernel("u8(words, u8, u8)")
def tsc_after(m, v, ns):
    """A vCPU's TSC when so many ns have gone by: before its offset, at most 2^64 - 1."""
    ticks = cycles(m, v, ns)
    if not m[k.H_TSC_MOVED]:
        return later(host_tsc(m), ticks)
    return later(_scaled(m, v, host_tsc(m)), ticks) + m[tsc_row(v) + k.TSC_OFFSET]


@kernel("u8(u8, u8)")
def later(tsc, ticks):
    """The sum, at most 2^64 - 1."""
    return tsc + umin(ticks, k.NONE - tsc)


@kernel("u8(words, u8, u8)")
def nanoseconds(m, v, ticks):
    """TSC ticks of a vCPU as ns."""
    khz = virtual_khz(m, v)
    return ticks // khz * MILLION + ticks % khz * MILLION // khz


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
