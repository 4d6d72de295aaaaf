"""Steps of vcpu_run and vcpu_enter_guest that touch words other threads write, or that the batch door needs compiled.

Models: request processing, the tail of vcpu_run's loop, vcpu_block, the entry protocol. The Python dispatcher calls
these steps one by one; loop.py strings the same steps together. events.py has what an entry injects.
"""

from ..jit.atomics import exchange, fence
from ..jit.declare import kernel
from . import bus, hypervcall, meter, msr, scan, stimerservice
from . import typed as k
from .clock import hv_in_use
from .eoi import take_pv_eoi
from .events import (
    INTR_INFO_VALID,
    accept_events,
    cancel_injection,
    process_nmi,
    process_smi,
    ready_for_user,
)
from .fastpath import exit_requested
from .halt import end_halt, init_blocked, runnable
from .hvtimer import hv_due
from .inhibit import update_vcpu
from .irq import ioapic_handles
from .pi import post_block, pre_block
from .pid import sync_pir_to_irr
from .sched import vcpu_load, vcpu_put
from .shared import clear_word_bits, emit, hot, hv, make_request, own, take
from .tick import has_pending, inject_if_pending, wait_expired
from .timer import ASLEEP, ASLEEP_HV_TIMER, IN_RUN, restart, settle, start_sw

BLOCKED, AGAIN = k.ONE, k.U(2)
ENTERED = k.ONE
SERVICED = (
    k.REQ_REPORT_TPR_ACCESS
    | k.REQ_SMI
    | k.REQ_NMI
    | k.REQ_IOAPIC_EOI_EXIT
    | k.REQ_SCAN_IOAPIC
    | k.REQ_HV_CRASH
    | k.REQ_HV_RESET
    | k.REQ_HV_EXIT
    | k.REQ_HV_STIMER
    | k.REQ_APICV_UPDATE
    | k.REQ_EVENT
    | k.REQ_UNBLOCK
    | k.REQ_SIGNAL
)
"""Requests that something is done for: each is cleared where that is done, and nowhere else."""


@kernel("u8(words, u8)")
def _tell_user(m, v):
    """What a Windows guest has asked of user space: its crash, a reset, a look at its SynIC. A USER code, or 0."""
    requests = hot(m, v) + k.HOT_REQUESTS
    if clear_word_bits(m, requests, k.REQ_HV_CRASH) & k.REQ_HV_CRASH:
        m[hv(m, v) + k.HV_SYSTEM_EVENT] = k.SYSTEM_EVENT_CRASH
        return k.USER_SYSTEM_EVENT
    if clear_word_bits(m, requests, k.REQ_HV_RESET) & k.REQ_HV_RESET:
        m[hv(m, v) + k.HV_SYSTEM_EVENT] = k.SYSTEM_EVENT_RESET
        return k.USER_SYSTEM_EVENT
    if clear_word_bits(m, requests, k.REQ_HV_EXIT) & k.REQ_HV_EXIT:
        return k.USER_HYPERV
    return k.ZERO


@kernel("u8(words, u8)")
def service_requests(m, v):
    """vcpu_enter_guest step 2, in KVM's order: 0, or the USER code for which it returns; EVENT is the next step's.

    A request behind the one that leaves to user space stays pending.
    """
    requests = hot(m, v) + k.HOT_REQUESTS
    if m[k.H_CONFIG] & k.CONFIG_COSTS:
        meter.charge(m, v, k.P_REQUESTS, k.ONE)
    if clear_word_bits(m, requests, k.REQ_REPORT_TPR_ACCESS) & k.REQ_REPORT_TPR_ACCESS:
        return k.USER_TPR_ACCESS
    if clear_word_bits(m, requests, k.REQ_SMI) & k.REQ_SMI:
        process_smi(m, v)
    if clear_word_bits(m, requests, k.REQ_NMI) & k.REQ_NMI:
        process_nmi(m, v)
    if clear_word_bits(m, requests, k.REQ_IOAPIC_EOI_EXIT) & k.REQ_IOAPIC_EOI_EXIT:
        if ioapic_handles(m, v, m[own(m, v) + k.K_IOAPIC_EOI]):
            return k.USER_IOAPIC_EOI
    if clear_word_bits(m, requests, k.REQ_SCAN_IOAPIC) & k.REQ_SCAN_IOAPIC:
        scan.scan(m, v)
    if m[requests] & (k.REQ_HV_CRASH | k.REQ_HV_RESET | k.REQ_HV_EXIT):
        return _tell_user(m, v)
    if clear_word_bits(m, requests, k.REQ_HV_STIMER) & k.REQ_HV_STIMER:
        if m[k.H_CONFIG] & k.CONFIG_COSTS:
            meter.stimers(m, v)
        stimerservice.process(m, v)
        if m[k.H_CONFIG] & k.CONFIG_COSTS:
            meter.stimers_served(m, v)
    if clear_word_bits(m, requests, k.REQ_APICV_UPDATE) & k.REQ_APICV_UPDATE:
        update_vcpu(m, v)
    # The rest has nothing to do here: timers migrate, EOI bitmaps are read where they are used. One of the above may
    # have come again by now, behind its check: it stays, and cancels the entry.
    clear_word_bits(m, requests, ~SERVICED)
    return k.ZERO


@kernel("u8(words, u8)")
def loop_tail(m, v):
    """vcpu_run behind an iteration that stays in the kernel: 0, or the USER code with which KVM_RUN returns.

    UNBLOCK has done its work; a tick becomes an interrupt here and nowhere else; then user space's interrupt window,
    then signals. An iteration that left to user space does not come here, so its tick waits.
    """
    requests = hot(m, v) + k.HOT_REQUESTS
    if m[requests] & k.REQ_UNBLOCK:
        clear_word_bits(m, requests, k.REQ_UNBLOCK)
    if m[k.H_CONFIG] & k.CONFIG_COSTS:
        meter.begin(m, v)
    inject_if_pending(m, v)
    if m[k.H_CONFIG] & k.CONFIG_COSTS:
        meter.tail(m, v)
    if m[own(m, v) + k.K_USER_WINDOW] and ready_for_user(m, v):
        return k.USER_IRQ_WINDOW_OPEN
    return k.USER_INTR if m[requests] & k.REQ_SIGNAL else k.ZERO


@kernel("u8(words, u8)")
def _awake(m, v):
    """kvm_vcpu_check_block: a reason not to sleep."""
    requests = hot(m, v) + k.HOT_REQUESTS
    if m[own(m, v) + k.K_MP_STATE] == k.MP_UNINITIALIZED:
        # A tick ends KVM_RUN with EAGAIN over and over; here it is left where it is, and UNBLOCK with it.
        if not has_pending(m, v):
            clear_word_bits(m, requests, k.REQ_UNBLOCK)
        return runnable(m, v) if not m[requests] & k.REQ_SIGNAL else k.ONE
    if m[requests] & (k.REQ_UNBLOCK | k.REQ_SIGNAL):
        return k.ONE
    return runnable(m, v) | has_pending(m, v)


@kernel("u8(words, u8)")
def _leave_halt(m, v):
    """The end of vcpu_block for a vCPU that can go on: INIT and SIPI are taken, a halted vCPU runs."""
    accept_events(m, v)
    state = m[own(m, v) + k.K_MP_STATE]
    if state == k.MP_HALTED or state == k.MP_AP_RESET_HOLD:
        end_halt(m, v)
    return k.ZERO


@kernel("u8(words, u8)")
def _posted_meanwhile(m, v):
    """The sleeper is scheduled out: 1 when a device posted before the descriptor said whom to wake.

    vcpu_put then sends 0xF1 to the very pCPU, whose handler wakes the thread at once.
    """
    if not vcpu_put(m, v, k.ONE) & k.EFFECT_NOTIFY_CODE:
        return k.ZERO
    if not runnable(m, v):
        return k.ZERO  # woken for a vector that it cannot take: it sleeps on
    return vcpu_load(m, v, m[own(m, v) + k.K_CPU]) | k.ONE


@kernel("u8(words, u8)")
def _restarts_any(m, v):
    """vmx_post_block: 1 where whatever timer there is starts again; a vCPU that waits for INIT sleeps without it."""
    if not m[k.H_RULES] & k.R_WAKE_RESTARTS_TIMER or not m[k.H_CONFIG] & k.CONFIG_HV_TIMER:
        return k.ZERO
    return k.ONE if m[own(m, v) + k.K_MP_STATE] != k.MP_UNINITIALIZED else k.ZERO


@kernel("u8(words, u8)")
def wake_up(m, v):
    """A sleeper's thread goes on: the preemption timer counts again if it did before.

    With WAKE_RESTARTS_TIMER vmx_post_block asks only whether there is one, so any timer starts again: a one-shot that
    has run out ticks once more, for its target is in the past.
    """
    host = own(m, v)
    state = m[host + k.K_IN_RUN]
    m[host + k.K_IN_RUN] = IN_RUN
    if state == ASLEEP_HV_TIMER or (state >= ASLEEP and _restarts_any(m, v)):
        restart(m, v)
    return post_block(m, v) if m[host + k.K_WAKEUP_CPU] else k.ZERO


@kernel("u8(words, u8)")
def block(m, v):
    """vcpu_block of a vCPU that does not run: BLOCKED when its thread sleeps now, else 0: the loop goes round.

    One that was never initialised waits in KVM_RUN itself, which then returns EAGAIN for user space to call it AGAIN,
    or EINTR (a USER code).

    HOT_BLOCKED is published before events and requests are read, with a full barrier; a sender sets its event before
    it looks whether the thread sleeps. So either it sees the sleeper and wakes it, or the sleeper sees the event. The
    preemption timer counts in the guest only, so a sleeper uses the hrtimer.
    """
    host = own(m, v)
    if not runnable(m, v):
        if m[host + k.K_IN_RUN] < ASLEEP:
            state = m[host + k.K_MP_STATE]
            if state != k.MP_UNINITIALIZED and pre_block(m, v) and state == k.MP_HALTED:
                return _leave_halt(m, v)  # any other state has KVM's thread go round until ON is cleared
            switches = hv_in_use(m, v) and m[host + k.K_MP_STATE] != k.MP_UNINITIALIZED
            m[host + k.K_IN_RUN] = ASLEEP_HV_TIMER if switches else ASLEEP
            if switches:
                start_sw(m, v)
                settle(m, v)
        exchange(m, hot(m, v) + k.HOT_BLOCKED, k.ONE)
        if not _awake(m, v) and not _posted_meanwhile(m, v):
            m[host + k.K_SRCU] = k.ZERO
            return BLOCKED
        take(m, hot(m, v) + k.HOT_BLOCKED)
        wake_up(m, v)
        if m[host + k.K_MP_STATE] != k.MP_UNINITIALIZED and not runnable(m, v):
            return k.ZERO
    wake_up(m, v)
    if m[host + k.K_MP_STATE] == k.MP_UNINITIALIZED:
        accept_events(m, v)
        return k.USER_INTR if m[hot(m, v) + k.HOT_REQUESTS] & k.REQ_SIGNAL else AGAIN
    return _leave_halt(m, v)


@kernel("u8(words, u8)")
def begin_run(m, v):
    """KVM_RUN begins, or a sleeper's thread wakes up inside it: vcpu_load, SRCU taken.

    What user space left without an answer counts as done: an MSR access (run->msr.error was 0), a hypercall, an access
    to memory or to a port. The USER code if the instruction's end is user space's business again.
    """
    host = own(m, v)
    if m[host + k.K_IN_RUN] < ASLEEP or m[host + k.K_MP_STATE] == k.MP_RUNNABLE:
        wake_up(m, v)
    was = m[host + k.K_USER_EXIT]
    m[host + k.K_USER_EXIT] = k.ZERO
    m[hot(m, v) + k.HOT_BLOCKED] = k.ZERO
    vcpu_load(m, v, m[host + k.K_CPU])
    m[host + k.K_SRCU] = k.ONE
    m[host + k.K_SRCU_LOCKS] = m[host + k.K_SRCU_LOCKS] + k.ONE
    if m[host + k.K_MSR_REASON]:
        return msr.complete(m, v, k.ZERO)
    if was == k.USER_HYPERV >> k.CODE_USER_SHIFT and m[hv(m, v) + k.HV_CALL_LENGTH]:
        return hypervcall.complete(m, v)
    return bus.complete(m, v) if m[host + k.K_ACCESS_INFO] else k.ZERO


@kernel("u8(words, u8)")
def pre_run(m, v):
    """kvm_x86_vcpu_pre_run, behind begin_run: 0, or USER_UNKNOWN where KVM_RUN fails with EINVAL.

    User space may say that a vCPU waits for SIPI where INIT is blocked, and only KVM_RUN minds. A sleeper that goes on
    has been inside all the time.
    """
    host = own(m, v)
    if not m[k.H_RULES] & k.R_MP_STATE_CHECKED_IN_RUN or m[host + k.K_IN_RUN] >= ASLEEP:
        return k.ZERO
    waits = m[host + k.K_MP_STATE] == k.MP_INIT_RECEIVED
    return k.USER_UNKNOWN if waits and init_blocked(m, v) else k.ZERO


@kernel("u8(words, u8, u8, u8)")
def finish_run(m, v, reason, errno):
    """KVM_RUN returns: SRCU dropped, kvm_userspace_exit (not for NONE), vcpu_put. A signal is taken on the way."""
    host = own(m, v)
    clear_word_bits(m, hot(m, v) + k.HOT_REQUESTS, k.REQ_SIGNAL)
    m[host + k.K_SRCU] = k.ZERO
    m[host + k.K_IN_RUN] = k.ZERO
    m[host + k.K_USER_EXIT] = reason + k.ONE
    if m[k.H_CONFIG] & k.CONFIG_TRACE and reason != k.NONE:
        emit(m, k.TP_USERSPACE_EXIT, v, reason, errno, k.ZERO)
    return vcpu_put(m, v, k.ZERO)


@kernel("u8(words, u8)")
def enter(m, v):
    """Steps 6-9: ENTERED, or 0 when a request or kick came in between and the entry was cancelled.

    IN_GUEST_MODE is published before ON and the requests are read, with a full barrier between; pid.py says why.
    """
    row = hot(m, v)
    host = own(m, v)
    m[row + k.HOT_MODE] = k.IN_GUEST_MODE
    m[host + k.K_SRCU] = k.ZERO
    fence()
    # Whether or not APICv is active on this vCPU: it may have been when a vector was posted.
    enabled = k.FLAG_HW | k.FLAG_SW
    if m[k.H_CONFIG] & k.CONFIG_APICV and m[row + k.HOT_FLAGS] & enabled == enabled:
        sync_pir_to_irr(m, v)
    if exit_requested(m, v):
        m[row + k.HOT_MODE] = k.OUTSIDE_GUEST_MODE
        m[host + k.K_IRQS_OFF] = k.ZERO
        m[host + k.K_SRCU] = k.ONE
        m[host + k.K_SRCU_LOCKS] = m[host + k.K_SRCU_LOCKS] + k.ONE
        cancel_injection(m, v)
        if m[host + k.K_ATTENTION]:
            m[host + k.K_SENT] = m[host + k.K_SENT] | take_pv_eoi(m, v)
        return k.ZERO
    return ENTERED


@kernel("u8(words, u8)")
def _injected(m, info):
    """What an entry leaves of its interruption information: the VM exit behind it clears bit 31 of VMX's field."""
    return k.ZERO if m[k.H_CONFIG] & k.CONFIG_SVM else info & ~INTR_INFO_VALID


@kernel("u8(words, u8)")
def vm_entry(m, v):
    """VM entry: kvm_entry with the event that it injects, then the wait for a deadline that came early.

    An entry that is forced to exit at once leaves an EVENT request behind: the event for which it was forced is to be
    looked for again. What is injected is delivered even where the guest leaves again at once: its gate, taken to be an
    interrupt gate, has cleared RFLAGS.IF, so an interrupt that waits behind an exception or NMI waits for a window.
    """
    row = own(m, v)
    info = m[row + k.K_ENTRY_INFO]
    m[row + k.K_ENTRY_INFO] = _injected(m, info)
    m[row + k.K_IMMEDIATE] = m[row + k.K_FORCE_EXIT]
    if info & INTR_INFO_VALID and (m[row + k.K_FORCE_EXIT] or hv_due(m, v)):
        m[row + k.K_RFLAGS] = m[row + k.K_RFLAGS] & ~k.RFLAGS_IF
    if m[row + k.K_FORCE_EXIT]:
        make_request(m, v, k.REQ_EVENT)
    m[row + k.K_FORCE_EXIT] = k.ZERO
    if m[k.H_CONFIG] & k.CONFIG_TRACE:
        emit(m, k.TP_ENTRY, v, m[row + k.K_RIP], info, m[row + k.K_IMMEDIATE] << k.U(32))
    if m[row + k.K_EXPIRED_DEADLINE]:
        wait_expired(m, v)
    return k.ZERO


@kernel("u8(words, u8)")
def trace_reentry(m, v):
    """kvm_entry of a fast re-entry, in the generations that trace it."""
    if m[k.H_TRAITS] & k.T_TRACE_REENTRY:
        return vm_entry(m, v)
    m[own(m, v) + k.K_ENTRY_INFO] = _injected(m, m[own(m, v) + k.K_ENTRY_INFO])
    if m[own(m, v) + k.K_EXPIRED_DEADLINE]:
        wait_expired(m, v)
    return k.ZERO


@kernel("u8(words, u8)")
def exits_at_once(m, v):
    """1 when the guest that was just entered leaves again before its first instruction: forced, or a timer ran out."""
    return k.ONE if m[own(m, v) + k.K_IMMEDIATE] else hv_due(m, v)


@kernel("u8(words, u8, u8, u8, u8, u8)")
def trace_exit(m, v, reason, info1, info2, intr_info):
    """kvm_exit; no exit of the model has an error code."""
    if m[k.H_CONFIG] & k.CONFIG_TRACE:
        at = emit(m, k.TP_EXIT, v, reason, m[own(m, v) + k.K_RIP], info1)
        if at < k.TRACE_CAPACITY:
            at = k.TRACE + at * k.TRACE_STRIDE
            m[at + k.U(4)] = info2
            m[at + k.U(5)] = intr_info
            m[at + k.U(6)] = k.ZERO
            m[at + k.U(7)] = m[hot(m, v) + k.HOT_REQUESTS]
    return k.ZERO
