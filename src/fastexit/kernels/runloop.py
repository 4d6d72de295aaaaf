"""Steps of vcpu_enter_guest and vcpu_run that touch words other threads write, or that the batch door needs compiled.

Models: request processing, event injection, INIT/SIPI acceptance, the entry protocol. The Python dispatcher calls these
steps one by one; batch.py strings the same steps together. Not modelled yet: SMM, blocked INIT (VMXON, GIF=0), timers.
"""

from . import typed as k
from ._jit import kernel
from .atomics import exchange, fence, load_acquire
from .fastpath import exit_requested
from .inhibit import update_vcpu
from .irq import ack, apicv_active, has_interrupt
from .lapicstate import reset
from .pid import sync_pir_to_irr
from .shared import clear_word_bits, emit, hot, make_request, own, take

BLOCKED = k.ONE
ENTERED = k.ONE
INTR_INFO_VALID = k.U(1 << 31)
INTR_TYPE_NMI = k.U(2 << 8)
INTR_TYPE_EXCEPTION = k.U(3 << 8)
INTR_DELIVER_ERROR_CODE = k.U(1 << 11)
VECTOR_DB, VECTOR_NMI = k.U(1), k.U(2)


@kernel("u8(words, u8)")
def process_nmi(m, v):
    """process_nmi: queued NMIs become pending, at most two, or one while NMIs are masked."""
    row = own(m, v)
    limit = k.ONE if m[row + k.K_NMI_MASKED] else k.U(2)
    m[row + k.K_NMI_PENDING] = min(m[row + k.K_NMI_PENDING] + take(m, row + k.K_NMI_QUEUED), limit)
    return make_request(m, v, k.REQ_EVENT)


@kernel("u8(words, u8)")
def service_requests(m, v):
    """vcpu_enter_guest step 2: every request but EVENT, which the next step tests itself."""
    requests = clear_word_bits(m, hot(m, v) + k.HOT_REQUESTS, ~k.REQ_EVENT)
    if requests & k.REQ_SMI:
        m[own(m, v) + k.K_SMI_PENDING] = k.ONE
    if requests & k.REQ_NMI:
        process_nmi(m, v)
    if requests & k.REQ_APICV_UPDATE:
        update_vcpu(m, v)
    return requests


@kernel("u8(words, u8)")
def reset_vcpu_init(m, v):
    """kvm_vcpu_reset(init_event = true): LAPIC in its INIT flavour, all queued events gone, RIP at the reset vector."""
    row = own(m, v)
    reset(m, v, k.ONE)
    m[row + k.K_NMI_PENDING] = k.ZERO
    m[row + k.K_NMI_MASKED] = k.ZERO
    m[row + k.K_SMI_PENDING] = k.ZERO
    m[row + k.K_EXCEPTION] = k.ZERO
    m[row + k.K_PENDING_DB] = k.ZERO
    m[row + k.K_INTERRUPT] = k.ZERO
    m[row + k.K_IRQ_WINDOW] = k.ZERO
    m[row + k.K_SHADOW] = k.ZERO
    m[row + k.K_RFLAGS] = k.RFLAGS_FIXED
    m[row + k.K_RIP] = k.U(0xFFF0)
    m[row + k.K_CS] = k.U(0xF000)
    return take(m, row + k.K_NMI_QUEUED)


@kernel("u8(words, u8)")
def accept_events(m, v):
    """kvm_apic_accept_events: a pending INIT first, then a pending SIPI; each is consumed.

    Whether INIT makes a vCPU run or wait goes by the BSP bit of its APICBASE. A SIPI that finds the vCPU not waiting is
    lost.
    """
    row = own(m, v)
    events = m[row + k.K_PENDING_EVENTS]
    if not events:
        return k.ZERO
    if events & k.PENDING_INIT:
        clear_word_bits(m, row + k.K_PENDING_EVENTS, k.PENDING_INIT)
        reset_vcpu_init(m, v)
        bsp = m[row + k.K_APIC_BASE] & k.APICBASE_BSP
        m[row + k.K_MP_STATE] = k.MP_RUNNABLE if bsp else k.MP_INIT_RECEIVED
    if clear_word_bits(m, row + k.K_PENDING_EVENTS, k.PENDING_SIPI) & k.PENDING_SIPI:
        if m[row + k.K_MP_STATE] == k.MP_INIT_RECEIVED:
            m[row + k.K_CS] = m[row + k.K_SIPI_VECTOR] << k.U(8)
            m[row + k.K_RIP] = k.ZERO
            m[row + k.K_MP_STATE] = k.MP_RUNNABLE
    return events


@kernel("u8(words, u8, u8)")
def _inject_interrupt(m, v, can_inject):
    """External interrupts without APICv: IRR to ISR when the guest takes one now, else ask for an IRQ window."""
    row = own(m, v)
    if apicv_active(m, v) or has_interrupt(m, v) == k.NONE:
        return k.ZERO
    open_window = m[row + k.K_RFLAGS] & k.RFLAGS_IF and not m[row + k.K_SHADOW]
    if not can_inject or not open_window:
        m[row + k.K_IRQ_WINDOW] = k.ONE
        return k.ZERO
    vector = ack(m, v)
    m[row + k.K_INTERRUPT] = vector + k.ONE
    m[row + k.K_ENTRY_INFO] = INTR_INFO_VALID | vector
    if m[k.H_CONFIG] & k.CONFIG_TRACE:
        emit(m, k.TP_INJ_VIRQ, v, vector, k.ZERO, k.ZERO)
    return k.ONE


@kernel("u8(words, u8)")
def inject_events(m, v):
    """Step 3 under an EVENT request: INIT/SIPI, then exception, NMI, interrupt. BLOCKED: the vCPU waits for SIPI.

    An injected exception or NMI is delivered by the entry itself, so its queue is empty afterwards.
    """
    if not clear_word_bits(m, hot(m, v) + k.HOT_REQUESTS, k.REQ_EVENT) & k.REQ_EVENT:
        return k.ZERO
    row = own(m, v)
    accept_events(m, v)
    if m[row + k.K_MP_STATE] == k.MP_INIT_RECEIVED:
        return BLOCKED
    can_inject = k.ONE
    if m[row + k.K_EXCEPTION]:
        vector = m[row + k.K_EXCEPTION] - k.ONE
        m[row + k.K_ENTRY_INFO] = INTR_INFO_VALID | INTR_TYPE_EXCEPTION | INTR_DELIVER_ERROR_CODE | vector
        m[row + k.K_EXCEPTION] = k.ZERO
        can_inject = k.ZERO
    elif m[row + k.K_PENDING_DB]:
        m[row + k.K_ENTRY_INFO] = INTR_INFO_VALID | INTR_TYPE_EXCEPTION | VECTOR_DB
        m[row + k.K_PENDING_DB] = k.ZERO
        can_inject = k.ZERO
    if m[row + k.K_NMI_PENDING] and not m[row + k.K_NMI_MASKED] and can_inject:
        m[row + k.K_NMI_PENDING] = m[row + k.K_NMI_PENDING] - k.ONE
        m[row + k.K_NMI_MASKED] = k.ONE
        m[row + k.K_ENTRY_INFO] = INTR_INFO_VALID | INTR_TYPE_NMI | VECTOR_NMI
        can_inject = k.ZERO
    _inject_interrupt(m, v, can_inject)
    return k.ZERO


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
        return k.ZERO
    return ENTERED


@kernel("u8(words, u8)")
def block(m, v):
    """A vCPU that waits for INIT or SIPI goes to sleep: BLOCKED, or 0 when one has come and it must look again.

    HOT_BLOCKED is published before the pending events are read, with a full barrier; a sender sets its event before it
    looks whether the thread sleeps. So either it sees the sleeper and wakes it, or the sleeper sees the event.
    """
    host = own(m, v)
    exchange(m, hot(m, v) + k.HOT_BLOCKED, k.ONE)
    if load_acquire(m, host + k.K_PENDING_EVENTS):
        take(m, hot(m, v) + k.HOT_BLOCKED)
        return k.ZERO
    m[host + k.K_SRCU] = k.ZERO
    m[host + k.K_IN_RUN] = k.ZERO
    return BLOCKED


@kernel("u8(words, u8)")
def trace_entry(m, v):
    """kvm_entry, with the event that the entry injects."""
    row = own(m, v)
    info = m[row + k.K_ENTRY_INFO]
    m[row + k.K_ENTRY_INFO] = k.ZERO
    if m[k.H_CONFIG] & k.CONFIG_TRACE:
        emit(m, k.TP_ENTRY, v, m[row + k.K_RIP], info, k.ZERO)
    return k.ZERO


@kernel("u8(words, u8)")
def trace_reentry(m, v):
    """kvm_entry of a fast re-entry, in the generations that trace it."""
    if m[k.H_TRAITS] & k.T_TRACE_REENTRY:
        return trace_entry(m, v)
    m[own(m, v) + k.K_ENTRY_INFO] = k.ZERO
    return k.ZERO


@kernel("u8(words, u8, u8, u8, u8)")
def trace_exit(m, v, reason, info1, info2):
    """kvm_exit; the model raises no exit that has intr_info."""
    if m[k.H_CONFIG] & k.CONFIG_TRACE:
        at = emit(m, k.TP_EXIT, v, reason, m[own(m, v) + k.K_RIP], info1)
        if at < k.TRACE_CAPACITY:
            at = k.TRACE + at * k.TRACE_STRIDE
            m[at + k.U(4)] = info2
            m[at + k.U(5)] = k.ZERO
            m[at + k.U(6)] = k.ZERO
            m[at + k.U(7)] = m[hot(m, v) + k.HOT_REQUESTS]
    return k.ZERO
