"""The fast paths: what may be handled in the first moments of an exit, for every generation.

Models: handle_accel_set_msr_irqoff (seed) to handle_fastpath_wrmsr and handle_fastpath_wrmsr_imm (6.18),
handle_fastpath_hlt, handle_fastpath_invd, handle_fastpath_preemption_timer, and the re-entry loop of vcpu_enter_guest.

The handler declines with a Refusal, having touched nothing, or does exactly what the generic path would have done.
"""

from ..jit.declare import kernel
from . import typed as k
from .apicmap import recalculate
from .clock import can_use_hv, hv_in_use
from .halt import emulate_halt
from .ipi import UNRESOLVED, deliver_fast, destination, send
from .lapicreg import reg, set_reg, set_x2apic_icr
from .msr import skip
from .pid import sync_pir_to_irr
from .shared import emit, hot, own
from .timer import expire_hv, set_deadline


@kernel("u8(u8)")
def refuse(refusal):
    """Outcome code of a fast path that declined."""
    return refusal << k.CODE_REFUSAL_SHIFT


@kernel("u8(u8, u8)")
def why_not_icr(traits, icr):
    """The ICR conditions of a generation that takes physical Fixed IPIs, in KVM's order; RF_NONE when they hold."""
    if traits & k.T_ICR_NO_SHORTHAND and icr & k.ICR_SHORTHAND:
        return k.RF_SHORTHAND
    if icr & k.ICR_LOGICAL:
        return k.RF_LOGICAL
    if icr & k.ICR_DM:
        return k.RF_DELIVERY_MODE
    if traits & k.T_ICR_NO_BROADCAST and icr >> k.ICR_DEST_SHIFT == k.X2APIC_BROADCAST:
        return k.RF_BROADCAST
    if traits & k.T_ICR_NO_RESERVED and icr & k.ICR_RESERVED:
        return k.RF_RESERVED_BITS
    return k.RF_NONE


@kernel("u8(words, u8)")
def why_unresolved(m, icr):
    """Which of the resolver's conditions failed, told after the fact."""
    if icr & k.ICR_SHORTHAND:
        return k.RF_SHORTHAND
    base = m[k.H_MAP]
    if not m[base + k.MAP_PRESENT]:
        return k.RF_NO_APIC_MAP
    if icr & k.ICR_LOGICAL and m[base + k.MAP_LOGICAL] == k.LOGICAL_DISABLED:
        return k.RF_LOGICAL_MAP_UNUSABLE
    return k.RF_BROADCAST


@kernel("u8(words, u8, u8)")
def _icr_two_halves(m, v, icr):
    """Seed to 5.8: ICR and ICR2 are two registers.

    The seed and 5.6 store ICR2 in silence and write ICR like any register; from 5.7 on the IPI leaves first and the
    write is traced last, its high half left out.
    """
    if m[k.H_TRAITS] & k.T_TRACE_WRITE_FIRST:
        set_reg(m, v, k.APIC_ICR2, icr >> k.U(32))
        if m[k.H_CONFIG] & k.CONFIG_TRACE:
            emit(m, k.TP_APIC_WRITE, v, k.APIC_ICR, icr & k.LOW32, k.ZERO)
        low = icr & k.LOW32 & ~k.ICR_BUSY
        code = send(m, v, low | (reg(m, v, k.APIC_ICR2) << k.U(32)))
        set_reg(m, v, k.APIC_ICR, low)
        return code | recalculate(m, v)
    icr = icr & ~k.ICR_BUSY
    code = send(m, v, icr)
    set_reg(m, v, k.APIC_ICR2, icr >> k.U(32))
    set_reg(m, v, k.APIC_ICR, icr)
    if m[k.H_CONFIG] & k.CONFIG_TRACE:
        emit(m, k.TP_APIC_WRITE, v, k.APIC_ICR, icr & k.LOW32, k.ZERO)
    return code


@kernel("u8(words, u8, u8)")
def x2apic_icr(m, v, icr):
    """The x2APIC ICR write, early: delivery code with CODE_FAST, or a refusal.

    Why early: at this point of the exit the host still has interrupts off and does not hold SRCU. Everything between
    here and the generic handler (the IRQ window, SRCU, request processing) would be latency of the IPI, and when posted
    interrupts reach a running target, nothing else is left to wait for. The price is that nothing here may sleep,
    decode guest memory or take long: multicast, whose cost grows with the vCPUs, is left to the generic path.
    """
    traits = m[k.H_TRAITS]
    if not m[hot(m, v) + k.HOT_FLAGS] & k.FLAG_X2APIC:
        return refuse(k.RF_NOT_X2APIC)
    if traits & k.T_ICR_ANY_RESOLVED:
        if icr & k.ICR_RESERVED:
            return refuse(k.RF_RESERVED_BITS)
        icr = icr & ~k.ICR_BUSY
        dest = destination(m, v, icr)
        code = deliver_fast(m, v, icr & k.LOW32, dest, k.ZERO, v)
        if code == UNRESOLVED:
            return refuse(why_unresolved(m, icr))
        if m[k.H_CONFIG] & k.CONFIG_TRACE:
            emit(m, k.TP_APIC_IPI, v, icr & k.LOW32, dest, k.ZERO)
    else:
        refusal = why_not_icr(traits, icr)
        if refusal:
            return refuse(refusal)
        if traits & k.T_ICR_SPLIT:
            return _icr_two_halves(m, v, icr) | k.CODE_FAST
        icr = icr & ~k.ICR_BUSY
        code = send(m, v, icr)
    set_x2apic_icr(m, v, icr)
    if m[k.H_CONFIG] & k.CONFIG_TRACE:
        emit(m, k.TP_APIC_WRITE, v, k.APIC_ICR, icr, k.ZERO)
    return code | k.CODE_FAST


@kernel("u8(words, u8, u8)")
def _of_a_tick(m, v, told):
    """The effects of a fast exit that may have posted its own vCPU's tick, which alone was told behind ``told``."""
    return k.EFFECT_NOTIFY_CODE if m[own(m, v) + k.K_TARGETS] != told else k.ZERO


@kernel("u8(words, u8, u8)")
def tsc_deadline(m, v, value):
    """handle_fastpath_set_tscdeadline: from 5.8 where the preemption timer serves it, in 6.18 always."""
    traits = m[k.H_TRAITS]
    if traits & k.T_TSCDL_ALWAYS or (traits & k.T_TSCDL_HV_TIMER and can_use_hv(m, v)):
        told = m[own(m, v) + k.K_TARGETS]
        set_deadline(m, v, value)
        return k.CODE_FAST | _of_a_tick(m, v, told)
    if traits & k.T_TSCDL_HV_TIMER:
        return refuse(k.RF_NO_HV_TIMER)
    return refuse(k.RF_MSR)


@kernel("u8(words)")
def _lacks_next_rip(m):
    """Tell whether the vendor's fast handlers need a next RIP that this host has not."""
    config = m[k.H_CONFIG]
    if m[k.H_TRAITS] & k.T_SVM_NEXT_RIP and config & k.CONFIG_SVM and not config & k.CONFIG_NRIPS:
        return k.ONE
    return k.ZERO


@kernel("u8(words, u8)")
def guards(m, v):
    """What every MSR's fast handler asks before it looks at the MSR; RF_NONE when nothing stands in the way.

    L2 before the next RIP, or behind it since more than MSR writes is fast.
    """
    traits = m[k.H_TRAITS]
    if not m[k.H_CONFIG] & k.CONFIG_FASTPATH:
        return k.RF_SWITCHED_OFF
    if traits & k.T_GUARD_L2 and m[hot(m, v) + k.HOT_FLAGS] & k.FLAG_L2:
        return k.RF_NO_NEXT_RIP if traits & k.T_HLT_FAST and _lacks_next_rip(m) else k.RF_NESTED
    return k.RF_NO_NEXT_RIP if _lacks_next_rip(m) else k.RF_NONE


@kernel("u8(words, u8, u8, u8, u8)")
def wrmsr(m, v, msr, value, length):
    """handle_fastpath_wrmsr(_imm): outcome code with its completion, or a refusal with COMPLETION_NONE.

    ``length`` is the instruction's. User space's MSR filter is not asked: TSC_DEADLINE is written all the same.
    """
    refusal = guards(m, v)
    if refusal:
        return refuse(refusal)
    traits = m[k.H_TRAITS]
    completion = k.COMPLETION_HANDLED
    if traits & k.T_SRCU_IN_FASTPATH:
        # Taken and dropped around the handler; nothing in it could tell, so only the count is kept.
        m[own(m, v) + k.K_SRCU_LOCKS] = m[own(m, v) + k.K_SRCU_LOCKS] + k.ONE
    if msr == k.MSR_X2APIC_ICR:
        code = x2apic_icr(m, v, value)
        if traits & k.T_ICR_REENTERS:
            completion = k.COMPLETION_REENTER
    elif msr == k.MSR_TSC_DEADLINE:
        code = tsc_deadline(m, v, value)
        completion = k.COMPLETION_REENTER
    else:
        return refuse(k.RF_MSR)
    if not code & k.CODE_FAST:
        return code
    tracing = m[k.H_CONFIG] & k.CONFIG_TRACE
    if traits & k.T_SKIP_LATE:
        if tracing:
            emit(m, k.TP_MSR_WRITE, v, msr, value, k.ZERO)
        return code | k.COMPLETION_SKIP
    if traits & k.T_SKIP_AFTER_TRACE and tracing:
        emit(m, k.TP_MSR_WRITE, v, msr, value, k.ZERO)
    user = skip(m, v, length)
    if not traits & k.T_SKIP_AFTER_TRACE and tracing:
        emit(m, k.TP_MSR_WRITE, v, msr, value, k.ZERO)
    if user and traits & k.T_SKIP_HONOURED:
        return code | user | k.COMPLETION_USERSPACE
    return code | completion


@kernel("u8(words, u8)")
def hlt(m, v):
    """handle_fastpath_hlt: straight back into the guest when something wakes it at once, else HANDLED: it blocks."""
    if not m[k.H_TRAITS] & k.T_HLT_FAST:
        return refuse(k.RF_NOT_AN_MSR_WRITE)
    refusal = guards(m, v)
    if refusal:
        return refuse(refusal)
    if m[k.H_TRAITS] & k.T_SRCU_IN_FASTPATH:
        m[own(m, v) + k.K_SRCU_LOCKS] = m[own(m, v) + k.K_SRCU_LOCKS] + k.ONE
    user = emulate_halt(m, v)
    if user:
        return k.CODE_FAST | user | k.COMPLETION_USERSPACE
    running = m[own(m, v) + k.K_MP_STATE] == k.MP_RUNNABLE
    return k.CODE_FAST | (k.COMPLETION_REENTER if running else k.COMPLETION_HANDLED)


@kernel("u8(words, u8, u8)")
def invd(m, v, length):
    """handle_fastpath_invd: an INVD does nothing but move RIP."""
    if not m[k.H_TRAITS] & k.T_INVD_FAST:
        return refuse(k.RF_NOT_AN_MSR_WRITE)
    refusal = guards(m, v)
    if refusal:
        return refuse(refusal)
    user = skip(m, v, length)
    return k.CODE_FAST | (user | k.COMPLETION_USERSPACE if user else k.COMPLETION_REENTER)


@kernel("u8(words, u8)")
def preemption_timer(m, v):
    """handle_fastpath_preemption_timer: a tick of the guest's timer, an exit that KVM forced, or a spurious one.

    Unlike the others it is looked at in L2 too, where only the tick itself is left to the generic handler.
    """
    traits = m[k.H_TRAITS]
    forced = m[own(m, v) + k.K_IMMEDIATE]
    if not traits & k.T_PREEMPTION_TIMER_FAST:
        return refuse(k.RF_NOT_AN_MSR_WRITE)
    if not m[k.H_CONFIG] & k.CONFIG_FASTPATH:
        return refuse(k.RF_SWITCHED_OFF)
    if not traits & k.T_FORCED_EXIT_HANDLED:
        if forced or not hv_in_use(m, v) or m[hot(m, v) + k.HOT_FLAGS] & k.FLAG_L2:
            return refuse(k.RF_NOT_AN_MSR_WRITE)
    elif forced:
        return k.CODE_FAST | k.COMPLETION_HANDLED
    elif m[hot(m, v) + k.HOT_FLAGS] & k.FLAG_L2 and hv_in_use(m, v):
        return refuse(k.RF_NESTED)
    told = m[own(m, v) + k.K_TARGETS]
    expire_hv(m, v)
    return k.CODE_FAST | k.COMPLETION_REENTER | _of_a_tick(m, v, told)


@kernel("u8(words, u8)")
def handle_preemption_timer(m, v):
    """handle_preemption_timer, the generic handler: nothing to do for an exit that was forced."""
    if not m[own(m, v) + k.K_IMMEDIATE]:
        expire_hv(m, v)
    return k.ZERO


@kernel("u8(words, u8)")
def exit_requested(m, v):
    """kvm_vcpu_exit_request: a kick, a request or a signal that came while the guest ran."""
    row = hot(m, v)
    if m[row + k.HOT_MODE] == k.EXITING_GUEST_MODE or m[row + k.HOT_REQUESTS]:
        return k.ONE
    return k.ZERO


@kernel("u8(words, u8, u8)")
def reenter(m, v, code):
    """The loop's tail after a fast REENTER_GUEST: sync PIR, then run again or, if an exit is requested, leave.

    The completion tells which: a REENTER_GUEST that must leave becomes EXIT_HANDLED.
    """
    if code & k.CODE_COMPLETION != k.COMPLETION_REENTER:
        return code
    row = hot(m, v)
    if m[row + k.PID_CONTROL_WORD] & k.PID_ON:
        enabled = k.FLAG_HW | k.FLAG_SW
        if m[row + k.HOT_FLAGS] & enabled == enabled:
            sync_pir_to_irr(m, v)
    if exit_requested(m, v):
        return (code & ~k.CODE_COMPLETION) | k.COMPLETION_HANDLED
    if m[k.H_RULES] & k.R_REENTRY_COUNTED:
        m[own(m, v) + k.K_EXITS] = m[own(m, v) + k.K_EXITS] + k.ONE
    return code
