"""Synthetic timers that run: started, fired by the host's clock, served at the next entry, delivered.

Models: kvm_hv_process_stimers, stimer_start, stimer_timer_callback, stimer_expiration, stimer_send_msg,
stimer_notify_direct, synic_deliver_msg; and the hrtimers of a machine's vCPUs, local APIC timers among them, in the
order in which they fire. stimer.py has the registers. Spec: TLFS ch. "Timers" and "Synthetic Interrupt Controller".
"""

from ..jit.declare import kernel, umin
from . import guestmemory, hyperv, synic
from . import timer as apic_timer
from . import typed as k
from .ipi import accept
from .shared import clear_word_bits, hv, kick, own
from .stimer import cleanup, mark_pending, timer, trace

ENOENT, EAGAIN, EFAULT = k.U(2), k.U(11), k.U(14)
NOT_DELIVERED = k.ONE
"""Result of a direct timer whose APIC takes nothing."""
MESSAGE_TYPE, MESSAGE_SIZE, MESSAGE_FLAGS = k.ZERO, k.U(4), k.U(5)
MESSAGE_SENDER, MESSAGE_TIMER, MESSAGE_EXPIRATION, MESSAGE_DELIVERY = k.U(8), k.U(16), k.U(24), k.U(32)
LONGEST = k.U((1 << 63) - 1)
"""KTIME_MAX: the host's clock has 63 bits."""
HUNDRED = k.U(100)
WHICH_SHIFT = k.U(12)
"""An hrtimer is a vCPU's index, which is less than MAX_VCPUS, plus, for a synthetic one, its number + 1 above that."""

# -------------------------------------------------------------------------------------------------------------- started


@kernel("u8(words, u8)")
def _deadline(m, delta):
    """The host's clock so many 100 ns from now; NONE where that never comes. stimer_add_delta, or its lack."""
    now = m[k.H_NOW]
    if m[k.H_HYPERV_RULES] & k.HVR_STIMER_SATURATES:
        if delta >= LONGEST // HUNDRED:
            return k.NONE
        then = now + HUNDRED * delta
        return then if then < LONGEST else k.NONE
    then = now + HUNDRED * delta  # 64 bits in KVM too
    return now if then > LONGEST or then < now else then


@kernel("u8(words, u8, u8, u8)")
def _arm(m, v, i, delta):
    m[timer(m, v, i) + k.STIMER_DEADLINE] = _deadline(m, delta) + k.ONE
    m[k.H_HV_STIMERS] = k.ONE
    return k.ZERO


@kernel("u8(words, u8, u8)")
def _start(m, v, i):
    """stimer_start. A periodic timer that is late skips the ticks it has missed, and keeps its phase."""
    at = timer(m, v, i)
    now, count = hyperv.time_ref(m), m[at + k.STIMER_COUNT]
    if m[at + k.STIMER_CONFIG] & k.HV_STIMER_PERIODIC:
        due = m[at + k.STIMER_EXPIRATION]
        if not due:
            due = now + count
        elif now >= due:
            due = now + (count - (now - due) % count)
        m[at + k.STIMER_EXPIRATION] = due
        trace(m, k.TP_HV_STIMER_START_PERIODIC, v, i, now, due)
        return _arm(m, v, i, due - now)
    m[at + k.STIMER_EXPIRATION] = count
    if now >= count:
        return mark_pending(m, v, i)
    trace(m, k.TP_HV_STIMER_START_ONE_SHOT, v, i, now, count)
    return _arm(m, v, i, count - now)


# ------------------------------------------------------------------------------------------------------------ delivered


@kernel("u8(u8)")
def _minus(error):
    return ~error + k.ONE


@kernel("u8(words, u8, u8)")
def _send_message(m, v, i):
    """stimer_send_msg: 0, or minus an errno.

    The message is written before its SINT is raised, so a masked SINT finds its own message in the way. A tick of a
    periodic timer that finds the slot taken is lost; a one-shot asks for an EOM instead: of the byte of flags that says
    so, kernels up to 6.12.95 and 7.2 leave seven bits to what their stack held, which are 0 here.
    """
    simp = m[hv(m, v) + k.HV_SIMP]
    if not simp & k.HV_PAGE_ENABLED:
        return _minus(ENOENT)
    config = m[timer(m, v, i) + k.STIMER_CONFIG]
    sint = (config >> k.HV_STIMER_SINT_SHIFT) & k.U(0xF)
    slot = (simp >> k.HV_PAGE_SHIFT << k.HV_PAGE_SHIFT) + sint * k.HV_MESSAGE_BYTES
    if not guestmemory.reaches(m, slot, k.HV_MESSAGE_BYTES):
        return _minus(EFAULT)
    if guestmemory.load(m, slot + MESSAGE_TYPE, k.U(4)):
        if config & k.HV_STIMER_PERIODIC:
            return k.ZERO
        guestmemory.store(m, slot + MESSAGE_FLAGS, k.ONE, k.HV_MESSAGE_PENDING)
        return _minus(EAGAIN)
    header = k.HV_MESSAGE_TIMER_EXPIRED | k.HV_MESSAGE_TIMER_PAYLOAD << (MESSAGE_SIZE << k.U(3))
    guestmemory.store(m, slot + MESSAGE_TYPE, k.U(8), header)
    guestmemory.store(m, slot + MESSAGE_SENDER, k.U(8), k.ZERO)
    guestmemory.store(m, slot + MESSAGE_TIMER, k.U(8), i)
    guestmemory.store(m, slot + MESSAGE_EXPIRATION, k.U(8), m[timer(m, v, i) + k.STIMER_EXPIRATION])
    guestmemory.store(m, slot + MESSAGE_DELIVERY, k.U(8), hyperv.time_ref(m))
    return synic.set_irq(m, v, sint)


@kernel("u8(words, u8, u8)")
def _notify_direct(m, v, config):
    """stimer_notify_direct: an interrupt of the timer's own vector, straight into the vCPU's APIC."""
    vector = (config >> k.HV_STIMER_VECTOR_SHIFT) & k.ICR_VECTOR
    return k.ZERO if accept(m, v, vector, v) & k.CODE_ACCEPTED_NONE else NOT_DELIVERED


@kernel("u8(words, u8, u8)")
def _expire(m, v, i):
    """stimer_expiration. A timer that could not deliver stays stuck, and enabled."""
    at = timer(m, v, i) + k.STIMER_CONFIG
    stuck = hv(m, v) + k.HV_STIMER_STUCK
    m[stuck] = m[stuck] | k.ONE << i
    direct = m[at] & k.HV_STIMER_DIRECT
    result = _notify_direct(m, v, m[at]) if direct else _send_message(m, v, i)
    trace(m, k.TP_HV_STIMER_EXPIRATION, v, i, k.ONE if direct else k.ZERO, result)
    if not result:
        m[stuck] = m[stuck] & ~(k.ONE << i)
        if not m[at] & k.HV_STIMER_PERIODIC:
            m[at] = m[at] & ~k.HV_STIMER_ENABLED
    return k.ZERO


@kernel("u8(words, u8)")
def process(m, v):
    """kvm_hv_process_stimers, under REQ_HV_STIMER: the timers that wait, by number.

    A one-shot that is due when it is started asks for one more round.
    """
    pending = hv(m, v) + k.HV_STIMER_PENDING
    for n in range(k.STIMERS):
        i = k.U(n)
        at = timer(m, v, i)
        waits = clear_word_bits(m, pending, k.ONE << i) & (k.ONE << i)
        if waits and m[at + k.STIMER_CONFIG] & k.HV_STIMER_ENABLED:
            due = m[at + k.STIMER_EXPIRATION]
            if due and hyperv.time_ref(m) >= due:
                _expire(m, v, i)
            if not m[at + k.STIMER_CONFIG] & k.HV_STIMER_ENABLED or not m[at + k.STIMER_COUNT]:
                cleanup(m, v, i)
            elif not m[hv(m, v) + k.HV_STIMER_STUCK] & k.ONE << i:
                _start(m, v, i)
    return k.ZERO


# ------------------------------------------------------------------------------------------- hrtimers of the vCPUs


@kernel("u8(words, u8, u8)")
def _fires(m, v, i):
    """When a synthetic timer's hrtimer fires; NONE, one less than 0, where it does not."""
    return m[timer(m, v, i) + k.STIMER_DEADLINE] - k.ONE


@kernel("u8(words, u8)")
def when(m, which):
    """When an hrtimer fires; NONE for which NONE."""
    if which == k.NONE:
        return k.NONE
    v, number = which & (k.MAX_VCPUS - k.ONE), which >> WHICH_SHIFT
    return _fires(m, v, number - k.ONE) if number else m[own(m, v) + k.K_HRTIMER]


@kernel("u8(words, u8)")
def due_of(m, v):
    """Which hrtimer of a vCPU fires next at or before now, by its number above the index; NONE when none does."""
    first = m[own(m, v) + k.K_HRTIMER]
    best = v if first <= m[k.H_NOW] and first != k.NONE else k.NONE
    if not m[k.H_HV_STIMERS]:
        return best
    if best == k.NONE:
        first = k.NONE
    for number in range(k.STIMERS):
        then = _fires(m, v, k.U(number))
        if then <= m[k.H_NOW] and then < first:
            first, best = then, v | k.U(number) + k.ONE << WHICH_SHIFT
    return best


@kernel("u8(words, u8)")
def next_of(m, v):
    """Clock at which the next timer of a vCPU fires or exits, or NONE."""
    best = apic_timer.next_of(m, v)
    if m[k.H_HV_STIMERS]:
        for number in range(k.STIMERS):
            best = umin(best, _fires(m, v, k.U(number)))
    return best


@kernel("u8(words)")
def due(m):
    """Which hrtimer fires next at or before now: earliest first, local APIC timers before others; NONE when none."""
    best = apic_timer.due(m)
    if not m[k.H_HV_STIMERS]:
        return best
    first = when(m, best)
    n = m[k.H_NVCPUS]
    for index in range(n):
        v = k.U(index)
        for number in range(k.STIMERS):
            then = _fires(m, v, k.U(number))
            if then <= m[k.H_NOW] and then < first:
                first, best = then, v | k.U(number) + k.ONE << WHICH_SHIFT
    return best


@kernel("u8(words, u8)")
def fire(m, which):
    """The callback of an hrtimer that ``due`` named: Effect code. stimer_timer_callback kicks and does no more."""
    v, number = which & (k.MAX_VCPUS - k.ONE), which >> WHICH_SHIFT
    if not number:
        return apic_timer.fire(m, v)
    i = number - k.ONE
    m[timer(m, v, i) + k.STIMER_DEADLINE] = k.ZERO
    trace(m, k.TP_HV_STIMER_CALLBACK, v, i, k.ZERO, k.ZERO)
    mark_pending(m, v, i)
    return kick(m, v, k.NONE)


@kernel("u8(words)")
def next_event(m):
    """Clock at which the next timer fires or exits, or NONE."""
    best = apic_timer.next_event(m)
    if m[k.H_HV_STIMERS]:
        n = m[k.H_NVCPUS]
        for index in range(n):
            for number in range(k.STIMERS):
                best = umin(best, _fires(m, k.U(index), k.U(number)))
    return best
