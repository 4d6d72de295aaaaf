"""The local APIC timer: one-shot, periodic and TSC-deadline, on the host's hrtimer or on VMX's preemption timer.

Models: start_apic_timer and everything below it (set_target_expiration, restart_apic_timer, start_sw_timer,
update_target_expiration, advance_periodic_target_expiration), apic_timer_fn, apic_get_tmcct, apic_update_lvtt,
kvm_set_lapic_tscdeadline_msr, kvm_lapic_expired_hv_timer; clock.py has the time, hvtimer.py the preemption timer,
tick.py what a timer that ran out does. Spec: SDM vol. 3A 10.5.4.

An hrtimer that became due between two settings of the clock fires late, at the new time, as on a host that was busy.
Not modelled: the repeated trace lines of an older kernel whose hrtimer posts each tick that it missed.

K_TSC_DEADLINE is KVM's ktimer->tscdeadline: the MSR in deadline mode, and the guest TSC of the target in the others.
"""

from ..jit.declare import kernel, umax, umin
from . import typed as k
from .clock import MILLION, can_use_hv, cycles, guest_tsc, host_tsc, hv_in_use, later, tsc_after, virtual_khz
from .hvtimer import arm_hv
from .lapicreg import reg, set_reg
from .shared import emit, hot, own
from .tick import expired

IN_RUN, ASLEEP, ASLEEP_HV_TIMER = k.ONE, k.U(2), k.U(3)
"""K_IN_RUN: KVM_RUN runs; its thread sleeps; it sleeps and will have the preemption timer in use when it wakes."""

# ------------------------------------------------------------------------------------------------------- start and stop


@kernel("u8(words, u8, u8)")
def _trace_state(m, v, hv):
    if m[k.H_CONFIG] & k.CONFIG_TRACE:
        emit(m, k.TP_HV_TIMER_STATE, v, hv, k.ZERO, k.ZERO)
    return k.ZERO


@kernel("u8(words, u8)")
def cancel(m, v):
    """cancel_apic_timer; before it was there, hrtimer_cancel alone."""
    row = own(m, v)
    m[row + k.K_HRTIMER] = k.NONE
    if m[k.H_RULES] & k.R_HV_TIMER_CANCELLED:
        m[row + k.K_HV_DEADLINE] = k.NONE
        m[row + k.K_TIMER_PENDING] = k.ZERO
    return k.ZERO


@kernel("u8(words, u8)")
def _limit_period(m, v):
    """limit_periodic_timer_frequency: TMICT keeps its value, so TMCCT may exceed it."""
    row = own(m, v)
    if m[row + k.K_TIMER_MODE] == k.TIMER_PERIODIC and m[row + k.K_PERIOD]:
        m[row + k.K_PERIOD] = umax(m[row + k.K_PERIOD], m[k.H_MIN_PERIOD_NS])
    return k.ZERO


@kernel("u8(words, u8, u8)")
def _count_to_ns(m, v, count):
    """tmict_to_ns."""
    return count * m[k.H_BUS_NS] * m[own(m, v) + k.K_DIVIDE]


@kernel("u8(words, u8)")
def update_divide(m, v):
    """update_divide_count: TDCR bits 3, 1, 0 as a power of two, 111b meaning 1."""
    tdcr = reg(m, v, k.APIC_TDCR)
    shift = (((tdcr & k.U(3)) | ((tdcr & k.U(8)) >> k.ONE)) + k.ONE) & k.U(7)
    m[own(m, v) + k.K_DIVIDE] = k.ONE << shift
    return k.ZERO


@kernel("u8(words, u8)")
def advance_period(m, v):
    """advance_periodic_target_expiration: the next tick of a periodic timer.

    A host that is late by more than a period starts again from now; before, the target stayed in the past, and its
    distance, taken as unsigned, gave a deadline that no preemption timer reaches.
    """
    row = own(m, v)
    now = m[k.H_NOW]
    target = m[row + k.K_TARGET] + m[row + k.K_PERIOD]
    late = target < now
    if late and m[k.H_TRAITS] & k.T_TIMER_NO_CATCH_UP:
        target = now
        late = False
    m[row + k.K_TARGET] = target
    m[row + k.K_TSC_DEADLINE] = k.NONE if late else tsc_after(m, v, target - now)
    return k.ZERO


@kernel("u8(words, u8)")
def _catch_up(m, v):
    """The hrtimer of a host that is late fires for each target in the past, one behind the other.

    The first of them has left a tick that waits, or a vector that is posted; the others add nothing to it.
    """
    row = own(m, v)
    now = m[k.H_NOW]
    period = m[row + k.K_PERIOD]
    target = m[row + k.K_TARGET]
    if target <= now and not m[k.H_TRAITS] & k.T_TIMER_NO_CATCH_UP:
        target = target + ((now - target) // period + k.ONE) * period
        m[row + k.K_TARGET] = target
        m[row + k.K_TSC_DEADLINE] = tsc_after(m, v, target - now)
    return k.ZERO


@kernel("u8(words, u8)")
def start_sw(m, v):
    """start_sw_timer: the hrtimer takes over. An hrtimer that is due already is left to settle()."""
    row = own(m, v)
    m[row + k.K_HV_DEADLINE] = k.NONE
    mode = m[row + k.K_TIMER_MODE]
    if mode != k.TIMER_PERIODIC and m[row + k.K_TIMER_PENDING]:
        return k.ZERO
    now = m[k.H_NOW]
    if mode == k.TIMER_DEADLINE:
        deadline = m[row + k.K_TSC_DEADLINE]
        tsc = guest_tsc(m, v)
        if deadline:
            # KVM's product has 64 bits: a deadline centuries away may wrap, and then fires early or at once.
            ns = (deadline - tsc) * MILLION // virtual_khz(m, v)
            if deadline > tsc and ns > m[row + k.K_TIMER_ADVANCE]:
                m[row + k.K_HRTIMER] = now + ns - m[row + k.K_TIMER_ADVANCE]
            else:
                expired(m, v, k.ZERO)
    elif (mode == k.TIMER_ONE_SHOT or mode == k.TIMER_PERIODIC) and m[row + k.K_PERIOD]:
        late = now >= m[row + k.K_TARGET]  # KVM looks again, and its clock has moved on by then
        if late:
            expired(m, v, k.ZERO)
            if mode == k.TIMER_PERIODIC:
                advance_period(m, v)
        if not late or mode == k.TIMER_PERIODIC:
            m[row + k.K_HRTIMER] = m[row + k.K_TARGET]
    return _trace_state(m, v, k.ZERO)


@kernel("u8(words, u8)")
def fire(m, v):
    """apic_timer_fn, the hrtimer's callback: Effect code; a periodic timer starts its next period."""
    row = own(m, v)
    m[row + k.K_HRTIMER] = k.NONE
    code = expired(m, v, k.ONE)
    if m[row + k.K_TIMER_MODE] == k.TIMER_PERIODIC and m[row + k.K_PERIOD]:
        advance_period(m, v)
        _catch_up(m, v)
        m[row + k.K_HRTIMER] = m[row + k.K_TARGET]
    return code


@kernel("u8(words, u8)")
def settle(m, v):
    """An hrtimer that was started when it was due fires as soon as the host lets its interrupt in."""
    code = k.ZERO
    while m[own(m, v) + k.K_HRTIMER] <= m[k.H_NOW] and m[own(m, v) + k.K_HRTIMER] != k.NONE:
        code = code | fire(m, v)
    return code


@kernel("u8(words, u8)")
def restart(m, v):
    """restart_apic_timer.

    An ioctl may start the timer of a vCPU that sleeps in KVM_RUN; KVM_RUN would have returned for it and then blocked
    again, on the hrtimer.
    """
    row = own(m, v)
    if m[row + k.K_TIMER_MODE] != k.TIMER_PERIODIC and m[row + k.K_TIMER_PENDING]:
        return k.ZERO
    if m[row + k.K_IN_RUN] >= ASLEEP:
        if can_use_hv(m, v) and m[row + k.K_TSC_DEADLINE]:
            m[row + k.K_IN_RUN] = ASLEEP_HV_TIMER
    elif arm_hv(m, v):
        return _trace_state(m, v, hv_in_use(m, v))
    start_sw(m, v)
    return settle(m, v)


@kernel("u8(words, u8, u8)")
def start(m, v, offset):
    """__start_apic_timer with the count of the register at offset: TMICT, or TMCCT where KVM_SET_LAPIC resumes."""
    row = own(m, v)
    m[row + k.K_TIMER_PENDING] = k.ZERO
    mode = m[row + k.K_TIMER_MODE]
    if mode == k.TIMER_ONE_SHOT or mode == k.TIMER_PERIODIC:
        m[row + k.K_PERIOD] = _count_to_ns(m, v, reg(m, v, k.APIC_TMICT))
        if not m[row + k.K_PERIOD]:
            m[row + k.K_TSC_DEADLINE] = k.ZERO
            return k.ZERO
        _limit_period(m, v)
        period = m[row + k.K_PERIOD]
        ns = period
        if offset != k.APIC_TMICT:
            ns = _count_to_ns(m, v, reg(m, v, offset))
            if not ns and (mode == k.TIMER_PERIODIC or not m[k.H_RULES] & k.R_ONE_SHOT_RESTORES_EXPIRED):
                ns = period
            elif ns > period:
                set_reg(m, v, offset, k.ZERO)
                ns = period
        m[row + k.K_TSC_DEADLINE] = tsc_after(m, v, ns)
        m[row + k.K_TARGET] = m[k.H_NOW] + ns
    return restart(m, v)


@kernel("u8(words, u8)")
def expire_hv(m, v):
    """kvm_lapic_expired_hv_timer."""
    row = own(m, v)
    if not hv_in_use(m, v):
        return k.ZERO
    m[row + k.K_HV_EXITED] = m[k.H_NOW] + k.ONE
    if m[k.H_RULES] & k.R_HV_TIMER_CANCELLED_FIRST:
        m[row + k.K_HV_DEADLINE] = k.NONE
    expired(m, v, k.ZERO)
    m[row + k.K_HV_DEADLINE] = k.NONE
    if m[row + k.K_TIMER_MODE] == k.TIMER_PERIODIC and m[row + k.K_PERIOD]:
        advance_period(m, v)
        restart(m, v)
    return k.ZERO


# ------------------------------------------------------------------------------------------------------------ registers


@kernel("u8(words)")
def timer_mode_mask(m):
    """LVTT's writable mode bits: TSC deadline only if the guest's CPUID has it."""
    mask = k.LVT_TIMER_PERIODIC
    if m[k.H_CONFIG] & k.CONFIG_DEADLINE_CPUID:
        mask = mask | k.LVT_TIMER_DEADLINE
    return mask


@kernel("u8(words, u8, u8)")
def write_tmict(m, v, value):
    """TMICT: ignored in deadline mode; else the timer starts over, masked or not."""
    if m[own(m, v) + k.K_TIMER_MODE] == k.TIMER_DEADLINE:
        return k.ZERO
    cancel(m, v)
    set_reg(m, v, k.APIC_TMICT, value)
    return start(m, v, k.APIC_TMICT)


@kernel("u8(words, u8, u8)")
def write_tdcr(m, v, value):
    """TDCR: a running timer keeps the count that remains, so its time changes by the ratio of the divisors."""
    row = own(m, v)
    old = m[row + k.K_DIVIDE]
    set_reg(m, v, k.APIC_TDCR, value & k.TDCR_WRITABLE if m[k.H_RULES] & k.R_TDCR_MASKED else value)
    update_divide(m, v)
    new = m[row + k.K_DIVIDE]
    if new == old or not m[row + k.K_PERIOD]:
        return k.ZERO
    m[row + k.K_HRTIMER] = k.NONE
    m[row + k.K_PERIOD] = _count_to_ns(m, v, reg(m, v, k.APIC_TMICT))
    _limit_period(m, v)
    now = m[k.H_NOW]
    target = m[row + k.K_TARGET]
    left = target - now if target > now else k.ZERO
    scaled = left // old * new + left % old * new // old
    was, shorter, longer = m[row + k.K_TSC_DEADLINE], cycles(m, v, left), cycles(m, v, scaled)
    if was == k.NONE:  # beyond 64 bits: how far is not known
        m[row + k.K_TSC_DEADLINE] = tsc_after(m, v, scaled)
    else:
        m[row + k.K_TSC_DEADLINE] = later(was, longer - shorter) if longer > shorter else was - (shorter - longer)
    m[row + k.K_TARGET] = now + scaled
    return restart(m, v)


@kernel("u8(words, u8)")
def current_count(m, v):
    """Compute TMCCT for a read. apic_get_tmcct.

    A whole period that is left reads as the full count. KVM's remainder would be 0, which means "expired", but its
    clock has always moved on between the start of a count and the first read; here the clock may stand still.
    """
    row = own(m, v)
    period = m[row + k.K_PERIOD]
    if m[row + k.K_TIMER_MODE] == k.TIMER_DEADLINE or not reg(m, v, k.APIC_TMICT) or not period:
        return k.ZERO
    target, now = m[row + k.K_TARGET], m[k.H_NOW]
    if target <= now:
        return k.ZERO
    left = (target - now - k.ONE) % period + k.ONE
    return (left // (m[k.H_BUS_NS] * m[row + k.K_DIVIDE])) & k.LOW32


@kernel("u8(words, u8)")
def update_lvtt(m, v):
    """apic_update_lvtt: entering or leaving deadline mode stops the timer and forgets count and deadline.

    Between one-shot and periodic nothing restarts; only the shortest period is enforced.
    """
    row = own(m, v)
    mode = reg(m, v, k.APIC_LVTT) & timer_mode_mask(m)
    old = m[row + k.K_TIMER_MODE]
    if mode == old:
        return k.ZERO
    if mode == k.TIMER_DEADLINE or old == k.TIMER_DEADLINE:
        cancel(m, v)
        if not m[k.H_RULES] & k.R_MODE_KEEPS_HV_TIMER:
            m[row + k.K_HV_DEADLINE] = k.NONE
        set_reg(m, v, k.APIC_TMICT, k.ZERO)
        m[row + k.K_PERIOD] = k.ZERO
        m[row + k.K_TSC_DEADLINE] = k.ZERO
    m[row + k.K_TIMER_MODE] = mode
    return _limit_period(m, v)


@kernel("u8(words, u8)")
def get_deadline(m, v):
    """kvm_get_lapic_tscdeadline_msr: 0 outside deadline mode and, in most generations, from a disabled APIC."""
    row = own(m, v)
    if m[row + k.K_TIMER_MODE] != k.TIMER_DEADLINE:
        return k.ZERO
    if m[hot(m, v) + k.HOT_FLAGS] & k.FLAG_HW or m[k.H_RULES] & k.R_DEADLINE_READ_DISABLED:
        return m[row + k.K_TSC_DEADLINE]
    return k.ZERO


@kernel("u8(words, u8)")
def _takes_deadline(m, v):
    """Tell whether a write of TSC_DEADLINE does anything: as kvm_set_lapic_tscdeadline_msr asks."""
    mode = m[own(m, v) + k.K_TIMER_MODE]
    if mode != k.TIMER_DEADLINE:
        counts = mode == k.TIMER_ONE_SHOT or mode == k.TIMER_PERIODIC
        if counts or not m[k.H_RULES] & k.R_DEADLINE_WRITTEN_IN_MODE_3:
            return k.ZERO
    enabled = m[hot(m, v) + k.HOT_FLAGS] & k.FLAG_HW
    return k.ONE if enabled or m[k.H_RULES] & k.R_DEADLINE_WRITTEN_DISABLED else k.ZERO


@kernel("u8(words, u8, u8)")
def set_deadline(m, v, value):
    """kvm_set_lapic_tscdeadline_msr: a write outside deadline mode is dropped in silence; 0 disarms."""
    if not _takes_deadline(m, v):
        return k.ZERO
    m[own(m, v) + k.K_HRTIMER] = k.NONE
    m[own(m, v) + k.K_TSC_DEADLINE] = value
    return start(m, v, k.APIC_TMICT)


# ---------------------------------------------------------------------------------------------- all timers of a machine


@kernel("u8(words)")
def due(m):
    """Which vCPU's hrtimer fires next at or before now: earliest first, then by index; NONE when none does."""
    best = k.NONE
    n = m[k.H_NVCPUS]
    for i in range(n):
        v = k.U(i)
        when = m[own(m, v) + k.K_HRTIMER]
        if when <= m[k.H_NOW] and (best == k.NONE or when < m[own(m, best) + k.K_HRTIMER]):
            best = v
    return best


@kernel("u8(words, u8)")
def next_of(m, v):
    """Clock at which a vCPU's timer fires or exits, or NONE; a preemption timer counts only in guest mode."""
    row = own(m, v)
    deadline = m[row + k.K_HV_DEADLINE]
    if deadline == k.NONE or m[hot(m, v) + k.HOT_MODE] != k.IN_GUEST_MODE:
        return m[row + k.K_HRTIMER]
    tsc, now = host_tsc(m), m[k.H_NOW]
    ahead = deadline - tsc if deadline > tsc else k.ZERO
    # Rounded up: at that ns the deadline has been reached.
    wait = (ahead * MILLION + m[k.H_TSC_KHZ] - k.ONE) // m[k.H_TSC_KHZ]
    if m[row + k.K_HV_EXITED] == now + k.ONE:
        wait = umax(wait, k.ONE)  # it exited at this time already, and does so once
    return umin(m[row + k.K_HRTIMER], now + wait)


@kernel("u8(words)")
def next_event(m):
    """Clock at which the next timer of all vCPUs fires or exits, or NONE."""
    best = k.NONE
    n = m[k.H_NVCPUS]
    for i in range(n):
        best = umin(best, next_of(m, k.U(i)))
    return best
