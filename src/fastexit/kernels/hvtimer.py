"""VMX's preemption timer in the place of an hrtimer: when it can be, and whose has run out.

Models: start_hv_timer, vmx_set_hv_timer; what follows its exit is timer.expire_hv.
"""

from ..jit.declare import kernel, umax
from . import typed as k
from .clock import can_use_hv, cycles, guest_of, host_tsc, is_scaled, virtual_khz
from .shared import hot, own
from .tick import expired

PREEMPTION_TIMER_SHIFT = k.U(5)
"""VMX_MISC[4:0]: the preemption timer counts at the TSC's rate shifted right by this. Every Intel core has 5."""


@kernel("u8(words, u8, u8)")
def _host_ticks(m, v, delta):
    """What the host's TSC counts while a scaled one counts so much; more than the preemption timer has, if too much."""
    khz = virtual_khz(m, v)
    whole = delta // khz
    if whole >> (PREEMPTION_TIMER_SHIFT + k.U(32)):
        return k.NONE
    return whole * m[k.H_TSC_KHZ] + delta % khz * m[k.H_TSC_KHZ] // khz


@kernel("u8(words, u8)")
def arm_hv(m, v):
    """start_hv_timer without its trace line: 1 when the preemption timer serves the deadline.

    It counts the host's TSC, so a guest that moves its own afterwards does not move it.
    """
    row = own(m, v)
    deadline = m[row + k.K_TSC_DEADLINE]
    if not can_use_hv(m, v) or not deadline:
        return k.ZERO
    host = host_tsc(m)
    tsc = guest_of(m, v, host)
    delta = umax(deadline, tsc) - tsc
    if m[row + k.K_TIMER_ADVANCE]:
        ahead = cycles(m, v, m[row + k.K_TIMER_ADVANCE])
        delta = delta - ahead if delta > ahead else k.ZERO
    if is_scaled(m, v):
        delta = _host_ticks(m, v, delta)
    if delta >> (PREEMPTION_TIMER_SHIFT + k.U(32)):
        return k.ZERO
    m[row + k.K_HV_DEADLINE] = host + delta
    m[row + k.K_HRTIMER] = k.NONE
    if m[row + k.K_TIMER_MODE] != k.TIMER_PERIODIC:
        # A periodic timer keeps counting even if it has run out: its exit computes the next target.
        if m[row + k.K_TIMER_PENDING]:
            m[row + k.K_HV_DEADLINE] = k.NONE
        elif not delta:
            expired(m, v, k.ZERO)
            m[row + k.K_HV_DEADLINE] = k.NONE
    return k.ONE


@kernel("u8(words, u8)")
def hv_due(m, v):
    """1 when the preemption timer of this vCPU, if it runs, has counted down."""
    row = own(m, v)
    deadline = m[row + k.K_HV_DEADLINE]
    if deadline == k.NONE or deadline > host_tsc(m):
        return k.ZERO
    # A period of no TSC ticks would exit for ever while the clock stands still.
    endless = cycles(m, v, m[row + k.K_PERIOD]) <= cycles(m, v, m[row + k.K_TIMER_ADVANCE])
    return k.ZERO if endless and m[row + k.K_HV_EXITED] == m[k.H_NOW] + k.ONE else k.ONE


@kernel("u8(words, u8)")
def exits_now(m, v):
    """1 when the vCPU is in guest mode with a preemption timer that has counted down."""
    return hv_due(m, v) if m[hot(m, v) + k.HOT_MODE] == k.IN_GUEST_MODE else k.ZERO


@kernel("u8(words, u8)")
def hv_exit(m, first):
    """The vCPU, from index first on, that is in guest mode with a preemption timer that has counted down, or NONE."""
    n = m[k.H_NVCPUS]
    if first >= n:
        return k.NONE  # range(first, n) would count from a negative number where bit 63 is set
    for i in range(first, n):
        if exits_now(m, k.U(i)):
            return k.U(i)
    return k.NONE
