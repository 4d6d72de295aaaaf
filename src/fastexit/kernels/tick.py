"""A tick of the local APIC timer: it runs out, waits for vcpu_run, becomes LVTT's interrupt, comes in on time.

Models: apic_timer_expired, apic_has_pending_timer, kvm_apic_inject_pending_timer_irqs, kvm_apic_local_deliver,
kvm_wait_lapic_expire. Spec: SDM vol. 3A 10.5.4.
"""

from ..jit.declare import kernel
from . import typed as k
from .clock import MILLION, can_post, guest_tsc, hv_in_use, nanoseconds, virtual_khz
from .ipi import accept, log_error
from .lapicreg import reg, set_reg
from .shared import emit, hot, kick, make_request, own, vec

ADJUST_MIN, ADJUST_MAX, ADJUST_STEP = k.U(100), k.U(10_000), k.U(8)
ADVANCE_INIT_NS, ADVANCE_MAX_NS = k.U(1000), k.U(5000)
NO_DELTA = k.ONE << k.U(63)
"""S64_MIN, advance_expire_delta where nothing has waited; K_WAIT_DELTA is the difference from it."""


@kernel("u8(words)")
def _masks_itself(m):
    """Whether LVTPC is masked by its own delivery, as Intel's is; the guest's CPU model is taken to be the vendor's."""
    rules = m[k.H_RULES]
    kept = m[k.H_CONFIG] & k.CONFIG_SVM and rules & k.R_LVTPC_KEPT_ON_AMD
    return k.ONE if rules & k.R_LVTPC_MASKED and not kept else k.ZERO


@kernel("u8(words, u8, u8, u8)")
def local_deliver(m, v, offset, me):
    """kvm_apic_local_deliver: the interrupt of an LVT entry; delivery code, 0 from a masked entry."""
    lvt = reg(m, v, offset)
    if not m[hot(m, v) + k.HOT_FLAGS] & k.FLAG_HW or lvt & k.LVT_MASKED:
        return k.ZERO
    if not lvt & (k.U(0xF0) | k.ICR_DM) and m[k.H_TRAITS] & k.T_ERRORS_LOGGED:
        return log_error(m, v, k.ESR_RECEIVE_ILLEGAL, me)
    code = accept(m, v, (lvt & (k.ICR_VECTOR | k.ICR_DM | k.ICR_TRIGGER)) | k.ICR_LEVEL, me)
    if offset == k.APIC_LVTPC and code & k.CODE_ACCEPTED_NONE and _masks_itself(m):
        set_reg(m, v, offset, lvt | k.LVT_MASKED)
    return code


@kernel("u8(words, u8, u8)")
def inject_pending(m, v, me):
    """kvm_apic_inject_pending_timer_irqs: the tick becomes an interrupt, if LVTT lets it; it is used up either way."""
    row = own(m, v)
    code = local_deliver(m, v, k.APIC_LVTT, me)
    mode = m[row + k.K_TIMER_MODE]
    if mode == k.TIMER_DEADLINE:
        m[row + k.K_TSC_DEADLINE] = k.ZERO
    elif mode == k.TIMER_ONE_SHOT:
        m[row + k.K_TSC_DEADLINE] = k.ZERO
        m[row + k.K_TARGET] = k.ZERO
    return code


@kernel("u8(words, u8)")
def _goes_through(m, v):
    """Tell whether LVTT would let a tick through."""
    enabled = k.FLAG_HW | k.FLAG_SW
    if m[hot(m, v) + k.HOT_FLAGS] & enabled != enabled or reg(m, v, k.APIC_LVTT) & k.LVT_MASKED:
        return k.ZERO
    return k.ONE


@kernel("u8(words, u8)")
def has_pending(m, v):
    """apic_has_pending_timer: a tick that LVTT would let through now; a masked one waits."""
    if not m[own(m, v) + k.K_TIMER_PENDING]:
        return k.ZERO
    return _goes_through(m, v)


@kernel("u8(words, u8)")
def inject_if_pending(m, v):
    """kvm_inject_pending_timer_irqs in vcpu_run: the only place where a tick of an hrtimer reaches IRR."""
    if has_pending(m, v):
        inject_pending(m, v, v)
        m[own(m, v) + k.K_TIMER_PENDING] = k.ZERO
    return k.ZERO


@kernel("u8(words, u8)")
def interrupt_injected(m, v):
    """lapic_timer_int_injected: the timer's vector is on its way into the guest."""
    vector = reg(m, v, k.APIC_LVTT) & k.ICR_VECTOR
    flags = m[hot(m, v) + k.HOT_FLAGS]
    if not flags & k.FLAG_HW:
        return k.ZERO
    base = vec(m, v) + k.VEC_IRR if flags & k.FLAG_APICV else own(m, v) + k.K_ISR
    return (m[base + (vector >> k.U(6))] >> (vector & k.U(63))) & k.ONE


@kernel("u8(words, u8, u8, u8)")
def _adapt_advance(m, v, error, early):
    """adjust_lapic_timer_advance: a step of an eighth against the error, tiny and wild ones ignored."""
    if error > ADJUST_MAX or error < ADJUST_MIN:
        return k.ZERO
    row = own(m, v)
    step = error * MILLION // virtual_khz(m, v) // ADJUST_STEP
    # 32 bits in KVM too: a step below zero wraps and is then reset as too large.
    advance = m[row + k.K_TIMER_ADVANCE]
    advance = (advance - step if early else advance + step) & k.LOW32
    m[row + k.K_TIMER_ADVANCE] = ADVANCE_INIT_NS if advance > ADVANCE_MAX_NS else advance
    return k.ZERO


@kernel("u8(words, u8)")
def _wait(m, v):
    """__kvm_wait_lapic_expire. The clock is the caller's, so the wait is only counted, in K_WAITED."""
    row = own(m, v)
    deadline = m[row + k.K_EXPIRED_DEADLINE]
    m[row + k.K_EXPIRED_DEADLINE] = k.ZERO
    tsc = guest_tsc(m, v)
    early = k.ONE if tsc < deadline else k.ZERO
    error = deadline - tsc if early else tsc - deadline
    if m[k.H_RULES] & k.R_WAIT_TRACED_LATE:
        m[row + k.K_WAIT_DELTA] = (tsc - deadline) ^ NO_DELTA
    elif m[k.H_CONFIG] & k.CONFIG_TRACE:
        emit(m, k.TP_WAIT_LAPIC_EXPIRE, v, tsc - deadline, k.ZERO, k.ZERO)
    if early:
        m[row + k.K_WAITED] = m[row + k.K_WAITED] + nanoseconds(m, v, error)
    return _adapt_advance(m, v, error, early)


@kernel("u8(words, u8)")
def wait_expired(m, v):
    """kvm_wait_lapic_expire: a timer that fired ahead of its deadline makes the entry wait, if it is what comes in."""
    row = own(m, v)
    if m[row + k.K_EXPIRED_DEADLINE] and m[row + k.K_TIMER_ADVANCE] and interrupt_injected(m, v):
        return _wait(m, v)
    return k.ZERO


@kernel("u8(words, u8)")
def trace_wait(m, v):
    """kvm_wait_lapic_expire where vcpu_enter_guest traces it behind the exit: the last wait since the one before."""
    at = own(m, v) + k.K_WAIT_DELTA
    if m[k.H_CONFIG] & k.CONFIG_TRACE:
        emit(m, k.TP_WAIT_LAPIC_EXPIRE, v, m[at] ^ NO_DELTA, k.ZERO, k.ZERO)
    m[at] = k.ZERO
    return k.ZERO


@kernel("u8(words, u8)")
def _posted_at_once(m, v):
    """Tell whether a timer that runs out in the vCPU's own context is an interrupt at once: APICv takes it."""
    rules = m[k.H_RULES]
    if not rules & k.R_TICK_POSTED_AT_ONCE or not m[hot(m, v) + k.HOT_FLAGS] & k.FLAG_APICV:
        return k.ZERO
    return k.ONE if m[own(m, v) + k.K_IN_RUN] or not rules & k.R_TICK_ONLY_IN_RUN else k.ZERO


@kernel("u8(words, u8, u8)")
def expired(m, v, from_hrtimer):
    """apic_timer_expired: Effect code. A tick that finds one pending is dropped: ticks coalesce to one."""
    row = own(m, v)
    if m[row + k.K_TIMER_PENDING]:
        return k.ZERO
    if m[k.H_TRAITS] & k.T_MASKED_TICK_LOST and not _goes_through(m, v):
        return inject_pending(m, v, k.NONE) & ~k.CODE_ACCEPTED_NONE
    if m[row + k.K_TIMER_MODE] == k.TIMER_DEADLINE or hv_in_use(m, v):
        m[row + k.K_EXPIRED_DEADLINE] = m[row + k.K_TSC_DEADLINE]
    if not from_hrtimer and _posted_at_once(m, v):
        return inject_pending(m, v, v) & ~k.CODE_ACCEPTED_NONE
    if can_post(m, v) and m[hot(m, v) + k.HOT_MODE] == k.IN_GUEST_MODE:
        # The guest runs: the wait has to come before the interrupt, whose bit is therefore not asked for.
        if m[row + k.K_EXPIRED_DEADLINE] and m[row + k.K_TIMER_ADVANCE]:
            _wait(m, v)
        return inject_pending(m, v, k.NONE if from_hrtimer else v) & ~k.CODE_ACCEPTED_NONE
    m[row + k.K_TIMER_PENDING] = k.ONE
    make_request(m, v, k.REQ_UNBLOCK)
    return kick(m, v, k.NONE) if from_hrtimer else k.ZERO
