"""What an entry injects, and what INIT and SIPI do.

Models: kvm_check_and_inject_events, kvm_apic_accept_events with the nested checks before it, process_nmi, process_smi,
enter_smm, vmx_complete_interrupts and cancel_injection. Interruption information has the VMX and SVM format: vector in
bits 7:0, type in bits 10:8, bit 31 valid. Not modelled: the SMM state save area (RIP and RFLAGS are kept, an interrupt
shadow is not), exceptions of L2, double faults; that L1 intercepts interrupts, NMIs and SMIs of L2, which go into L2.
"""

from ..jit.declare import kernel, umin
from . import picdev
from . import typed as k
from .avictable import init_vmcb
from .halt import has_extint, init_blocked, interrupt_allowed, nmi_allowed, set_mp_state, smi_allowed
from .i8259 import accepts_extint
from .inhibit import irq_window, nested_changed, window_served
from .irq import ack, apicv_active, has_interrupt, offer_pv_eoi, update_cr8_intercept
from .lapicstate import reset
from .shared import clear_word_bits, emit, hot, increment, make_request, or_word, own, take

BLOCKED = k.ONE
INTR_INFO_VALID = k.U(1 << 31)
INTR_TYPE_EXTERNAL, INTR_TYPE_NMI, INTR_TYPE_EXCEPTION, INTR_TYPE_SOFT = (k.U(t << 8) for t in (0, 2, 3, 4))
INTR_TYPE_SOFT_EXCEPTION = k.U(6 << 8)
INTR_TYPE = k.U(7 << 8)
INTR_DELIVER_ERROR_CODE = k.U(1 << 11)
VECTOR_DB, VECTOR_NMI = k.U(1), k.U(2)
ERROR_CODE_VECTORS = k.U(0x2_7D00)
"""Exceptions that push an error code: 8, 10-14, 17."""
SMM_ENTRY_RIP = k.U(0x8000)


@kernel("u8(words, u8, u8)")
def _goes_in(m, v, event):
    """Tell the embedder what its CPU gets. Nobody has to take it: the oldest of six is forgotten."""
    at = k.IRQ + v * k.IRQ_STRIDE + k.IRQ_WENT_IN
    m[at] = (m[at] << k.WENT_IN_BITS | event) & k.WENT_IN_MOST
    return k.ZERO


@kernel("u8(words, u8)")
def take_event(m, v):
    """Give what went in first, and forget it; 0 for nothing."""
    at = k.IRQ + v * k.IRQ_STRIDE + k.IRQ_WENT_IN
    queue = m[at] & k.WENT_IN_MOST
    older = k.ZERO
    while queue >> (older + k.WENT_IN_BITS):
        older = older + k.WENT_IN_BITS
    event = queue >> older
    m[at] = queue & ((k.ONE << older) - k.ONE)
    return event


@kernel("u8(words, u8)")
def process_nmi(m, v):
    """process_nmi: queued NMIs become pending, at most two, or one while NMIs are masked or one is being delivered.

    Up to 6.1 it asks for an EVENT even where none is pending.
    """
    row = own(m, v)
    injecting = m[row + k.K_REINJECT] & (INTR_INFO_VALID | INTR_TYPE) == INTR_INFO_VALID | INTR_TYPE_NMI
    limit = k.ONE if m[row + k.K_NMI_MASKED] or injecting else k.U(2)
    m[row + k.K_NMI_PENDING] = umin(m[row + k.K_NMI_PENDING] + take(m, row + k.K_NMI_QUEUED), limit)
    if m[row + k.K_NMI_PENDING] or not m[k.H_RULES] & k.R_NMI_COUNTED:
        make_request(m, v, k.REQ_EVENT)
    return k.ZERO


@kernel("u8(words, u8)")
def queue_nmi(m, v):
    """kvm_inject_nmi: user space's NMI is counted with those of other vCPUs."""
    increment(m, own(m, v) + k.K_NMI_QUEUED)
    return make_request(m, v, k.REQ_NMI)


@kernel("u8(words, u8)")
def process_smi(m, v):
    """process_smi: delivered by the next injection that may."""
    m[own(m, v) + k.K_SMI_PENDING] = k.ONE
    return make_request(m, v, k.REQ_EVENT)


@kernel("u8(words, u8)")
def enter_smm(m, v):
    """enter_smm: the state that matters here is saved, NMIs are masked.

    New RFLAGS ask for an EVENT (kvm_set_rflags), which cancels the entry: what waits behind the SMI is looked at again,
    and asks for a window where it would have forced an exit.
    """
    row = own(m, v)
    hflags = m[row + k.K_HFLAGS] | k.HF_SMM
    if m[row + k.K_NMI_MASKED]:
        hflags = hflags | k.HF_SMM_INSIDE_NMI
    if hflags & k.HF_REAL_MODE:
        hflags = hflags | k.HF_SMM_INSIDE_REAL
    m[row + k.K_HFLAGS] = hflags | k.HF_REAL_MODE
    m[row + k.K_NMI_MASKED] = k.ONE
    m[row + k.K_SMM_RIP] = m[row + k.K_RIP]
    m[row + k.K_SMM_RFLAGS] = m[row + k.K_RFLAGS]
    m[row + k.K_RIP] = SMM_ENTRY_RIP
    m[row + k.K_RFLAGS] = k.RFLAGS_FIXED
    m[row + k.K_SHADOW] = k.ZERO
    m[row + k.K_SMI_COUNT] = m[row + k.K_SMI_COUNT] + k.ONE
    _goes_in(m, v, k.WENT_IN_SMI)
    return make_request(m, v, k.REQ_EVENT)


@kernel("u8(words, u8)")
def leave_smm(m, v):
    """RSM: kvm_smm_changed looks for an INIT or SMI that had to wait."""
    row = own(m, v)
    hflags = m[row + k.K_HFLAGS]
    if not hflags & k.HF_SMM_INSIDE_NMI:
        m[row + k.K_NMI_MASKED] = k.ZERO
    real = k.HF_REAL_MODE if hflags & k.HF_SMM_INSIDE_REAL else k.ZERO
    m[row + k.K_HFLAGS] = hflags & ~(k.HF_SMM | k.HF_SMM_INSIDE_NMI | k.HF_SMM_INSIDE_REAL | k.HF_REAL_MODE) | real
    m[row + k.K_RIP] = m[row + k.K_SMM_RIP]
    m[row + k.K_RFLAGS] = m[row + k.K_SMM_RFLAGS]
    return make_request(m, v, k.REQ_EVENT)


@kernel("u8(words, u8)")
def reset_vcpu_init(m, v):
    """kvm_vcpu_reset(init_event = true): LAPIC in its INIT flavour, queued events gone, RIP at the reset vector.

    An L2 that INIT could interrupt without L1 (SVM) is forgotten. KVM_INTERRUPT's vector stays: it is the PIC's. SVM's
    NMI mask was one of the flags that INIT clears; since it has a word of its own, it stays. Windows that KVM asked for
    are bits of the VMCB, which is made anew; vmx_vcpu_reset leaves the execution controls alone, so on VMX their exits
    come although nothing waits any more.
    """
    row = own(m, v)
    if m[hot(m, v) + k.HOT_FLAGS] & k.FLAG_L2:
        m[hot(m, v) + k.HOT_FLAGS] = m[hot(m, v) + k.HOT_FLAGS] & ~k.FLAG_L2
        nested_changed(m, v)
    reset(m, v, k.ONE)
    init_vmcb(m, v)
    make_request(m, v, k.REQ_EVENT)
    m[row + k.K_NMI_PENDING] = k.ZERO
    if not (m[k.H_CONFIG] & k.CONFIG_SVM and m[k.H_RULES] & k.R_NMI_MASK_OVER_INIT):
        m[row + k.K_NMI_MASKED] = k.ZERO
    m[row + k.K_SMI_PENDING] = k.ZERO
    m[row + k.K_EXCEPTION] = k.ZERO
    m[row + k.K_PENDING_DB] = k.ZERO
    m[row + k.K_INTERRUPT] = k.ZERO
    if m[k.H_CONFIG] & k.CONFIG_SVM:
        m[row + k.K_IRQ_WINDOW] = k.ZERO
        m[row + k.K_NMI_WINDOW] = k.ZERO
    m[row + k.K_REINJECT] = k.ZERO
    m[row + k.K_SMI_COUNT] = k.ZERO
    m[row + k.K_HFLAGS] = k.HF_REAL_MODE
    m[row + k.K_ENTRY_INFO] = k.ZERO
    m[row + k.K_SHADOW] = k.ZERO
    m[row + k.K_RFLAGS] = k.RFLAGS_FIXED
    m[row + k.K_RIP] = k.U(0xFFF0)
    m[row + k.K_CS] = k.U(0xF000)
    return take(m, row + k.K_NMI_QUEUED)


@kernel("u8(words, u8)")
def leave_l2(m, v):
    """nested_vmx_vmexit, nested_svm_vmexit: the event is L1's. SVM clears GIF on the way."""
    row = own(m, v)
    m[hot(m, v) + k.HOT_FLAGS] = m[hot(m, v) + k.HOT_FLAGS] & ~k.FLAG_L2
    m[row + k.K_NESTED_EXITS] = m[row + k.K_NESTED_EXITS] + k.ONE
    if m[k.H_CONFIG] & k.CONFIG_SVM:
        m[row + k.K_HFLAGS] = m[row + k.K_HFLAGS] | k.HF_GIF_CLEAR
    return nested_changed(m, v)


@kernel("u8(words, u8)")
def _nested_busy(m, v):
    """Events of L2 that would be L1's have to wait for the instruction that was cut short: -EBUSY."""
    row = own(m, v)
    if not m[hot(m, v) + k.HOT_FLAGS] & k.FLAG_L2 or not m[row + k.K_REINJECT] & INTR_INFO_VALID:
        return k.ZERO
    counts = k.PENDING_INIT if m[k.H_CONFIG] & k.CONFIG_SVM else k.PENDING_INIT | k.PENDING_SIPI
    return k.ONE if m[row + k.K_PENDING_EVENTS] & counts else k.ZERO


@kernel("u8(words, u8)")
def _check_nested_init(m, v):
    """check_nested_events for INIT and SIPI in L2: VMX hands INIT to L1 and forgets it, on SVM it stays pending.

    BLOCKED when neither may be looked at, because the instruction that was cut short by an exit has to finish first.
    """
    row = own(m, v)
    if _nested_busy(m, v):
        return BLOCKED
    if m[k.H_CONFIG] & k.CONFIG_SVM:
        if m[row + k.K_PENDING_EVENTS] & k.PENDING_INIT and m[row + k.K_L1_WANTS_EXIT]:
            leave_l2(m, v)
        return k.ZERO
    if clear_word_bits(m, row + k.K_PENDING_EVENTS, k.PENDING_INIT) & k.PENDING_INIT:
        if m[row + k.K_MP_STATE] != k.MP_INIT_RECEIVED:
            leave_l2(m, v)
        return k.ZERO
    if clear_word_bits(m, row + k.K_PENDING_EVENTS, k.PENDING_SIPI) & k.PENDING_SIPI:
        if m[row + k.K_MP_STATE] == k.MP_INIT_RECEIVED:
            leave_l2(m, v)
    return k.ZERO


@kernel("u8(words, u8, u8, u8)")
def latch(m, v, event, on):
    """User space sets or clears a pending INIT or SIPI; other vCPUs may send one at the same time."""
    event = event & (k.PENDING_INIT | k.PENDING_SIPI)
    if on:
        return or_word(m, own(m, v) + k.K_PENDING_EVENTS, event)
    return clear_word_bits(m, own(m, v) + k.K_PENDING_EVENTS, event)


@kernel("u8(words, u8)")
def accept_events(m, v):
    """kvm_apic_accept_events: a pending INIT first, then a pending SIPI; each is consumed.

    Whether INIT makes a vCPU run or wait goes by the BSP bit of its APICBASE. A SIPI that finds the vCPU not waiting is
    lost. Where INIT is blocked it stays, and a SIPI is lost as well.
    """
    row = own(m, v)
    events = m[row + k.K_PENDING_EVENTS]
    if not events:
        return k.ZERO
    if m[hot(m, v) + k.HOT_FLAGS] & k.FLAG_L2 and _check_nested_init(m, v) == BLOCKED:
        return events
    if init_blocked(m, v):
        clear_word_bits(m, row + k.K_PENDING_EVENTS, k.PENDING_SIPI)
        return events
    if clear_word_bits(m, row + k.K_PENDING_EVENTS, k.PENDING_INIT) & k.PENDING_INIT:
        reset_vcpu_init(m, v)
        bsp = m[row + k.K_APIC_BASE] & k.APICBASE_BSP
        set_mp_state(m, v, k.MP_RUNNABLE if bsp else k.MP_INIT_RECEIVED)
        _goes_in(m, v, k.WENT_IN_INIT)
    if clear_word_bits(m, row + k.K_PENDING_EVENTS, k.PENDING_SIPI) & k.PENDING_SIPI:
        if m[row + k.K_MP_STATE] == k.MP_INIT_RECEIVED:
            m[row + k.K_CS] = m[row + k.K_SIPI_VECTOR] << k.U(8)
            m[row + k.K_RIP] = k.ZERO
            set_mp_state(m, v, k.MP_RUNNABLE)
            _goes_in(m, v, k.WENT_IN_SIPI | m[row + k.K_SIPI_VECTOR])
    return events


@kernel("u8(words)")
def _nmi_info(m):
    """What an entry that injects an NMI is told: svm_inject_nmi names no vector, vmx_inject_nmi names 2."""
    vector = k.ZERO if m[k.H_CONFIG] & k.CONFIG_SVM else VECTOR_NMI
    return INTR_INFO_VALID | INTR_TYPE_NMI | vector


@kernel("u8(words, u8, u8)")
def requeue(m, v, info):
    """vmx_complete_interrupts: an event whose delivery did not finish is injected again by the next entry.

    Of its information only what the next entry needs is kept; types that KVM does not know are dropped. VMX blocks NMIs
    anew when it injects one, SVM's mask is KVM's own and stays.
    """
    if not info & INTR_INFO_VALID:
        return k.ZERO
    row = own(m, v)
    kind = info & INTR_TYPE
    again = info & (INTR_INFO_VALID | INTR_TYPE | k.ICR_VECTOR)
    if kind == INTR_TYPE_NMI:
        again = _nmi_info(m)
        if not m[k.H_CONFIG] & k.CONFIG_SVM:
            m[row + k.K_NMI_MASKED] = k.ZERO
    elif kind == INTR_TYPE_EXCEPTION or kind == INTR_TYPE_SOFT_EXCEPTION:
        again = again | (info & INTR_DELIVER_ERROR_CODE)
    elif kind != INTR_TYPE_EXTERNAL and kind != INTR_TYPE_SOFT:
        again = k.ZERO
    m[row + k.K_REINJECT] = again
    return make_request(m, v, k.REQ_EVENT)


@kernel("u8(words, u8)")
def cancel_injection(m, v):
    """cancel_injection: the entry does not happen, so what it would have delivered is queued again."""
    row = own(m, v)
    info = m[row + k.K_ENTRY_INFO]
    m[row + k.K_ENTRY_INFO] = k.ZERO
    if info & INTR_INFO_VALID and (info & INTR_TYPE == INTR_TYPE_EXTERNAL or info & INTR_TYPE == INTR_TYPE_NMI):
        at = k.IRQ + v * k.IRQ_STRIDE + k.IRQ_WENT_IN  # it has not gone in
        m[at] = m[at] >> k.WENT_IN_BITS
    if m[row + k.K_FORCE_EXIT]:
        m[row + k.K_FORCE_EXIT] = k.ZERO
        make_request(m, v, k.REQ_EVENT)
    return requeue(m, v, info)


@kernel("u8(words, u8)")
def ready_for_user(m, v):
    """kvm_vcpu_ready_for_interrupt_injection: user space could inject an interrupt, and the guest would take it now."""
    row = own(m, v)
    if m[row + k.K_EXCEPTION] or m[row + k.K_PENDING_DB] or m[row + k.K_REINJECT] & INTR_INFO_VALID:
        return k.ZERO
    return interrupt_allowed(m, v) if _has_room_for_user(m, v) else k.ZERO


@kernel("u8(words, u8)")
def _has_room_for_user(m, v):
    """kvm_cpu_accept_dm_intr: no vector of user space's waits, and LINT0 would let one in."""
    return k.ZERO if has_extint(m, v) or not accepts_extint(m, v) else k.ONE


@kernel("u8(words, u8)")
def _injectable(m, v):
    """kvm_cpu_has_injectable_intr: with APICv active only the PIC's interrupts are KVM's business."""
    if has_extint(m, v):
        return k.ONE
    if apicv_active(m, v) and not m[hot(m, v) + k.HOT_FLAGS] & k.FLAG_L2:
        return k.ZERO
    return k.ONE if has_interrupt(m, v) != k.NONE else k.ZERO


@kernel("u8(words, u8, u8, u8)")
def _inject_exception(m, v, info, reinjected):
    """kvm_inject_exception: into the next entry, in real mode without an error code. The model's error codes are 0."""
    if m[own(m, v) + k.K_HFLAGS] & k.HF_REAL_MODE:
        info = info & ~INTR_DELIVER_ERROR_CODE
    m[own(m, v) + k.K_ENTRY_INFO] = info
    if m[k.H_CONFIG] & k.CONFIG_TRACE:
        has_error = k.ONE if info & INTR_DELIVER_ERROR_CODE else k.ZERO
        emit(m, k.TP_INJ_EXCEPTION, v, info & k.ICR_VECTOR, has_error, reinjected)
    return k.ONE


@kernel("u8(words, u8, u8, u8)")
def _trace_injection(m, v, info, reinjected):
    if m[k.H_CONFIG] & k.CONFIG_TRACE:
        soft = k.ONE if info & INTR_TYPE == INTR_TYPE_SOFT else k.ZERO
        emit(m, k.TP_INJ_VIRQ, v, info & k.ICR_VECTOR, soft, reinjected)
    return k.ZERO


@kernel("u8(words, u8)")
def _ask_for_window(m, v):
    """enable_irq_window: an exit when the guest takes interrupts again. SVM's needs AVIC out of the way."""
    m[own(m, v) + k.K_IRQ_WINDOW] = k.ONE
    irq_window(m, v, k.ONE)
    return k.ONE


@kernel("u8(words, u8)")
def _get_extint(m, v):
    """kvm_cpu_get_extint: the vector of the PIC, which the vCPU acknowledges, or of KVM_INTERRUPT."""
    if m[k.H_CONFIG] & k.CONFIG_SPLIT_IRQCHIP:
        return take(m, own(m, v) + k.K_EXTINT) - k.ONE
    return picdev.read_irq(m, v)


@kernel("u8(words, u8, u8)")
def _inject_interrupt(m, v, can_inject):
    """External interrupts: now, when the guest opens its window, or (0 returned) behind the event that goes first."""
    row = own(m, v)
    if not _injectable(m, v):
        return k.ONE
    if not can_inject:
        return k.ZERO
    if interrupt_allowed(m, v):
        if has_extint(m, v):
            vector = _get_extint(m, v)
            _goes_in(m, v, k.WENT_IN_EXTINT | vector)
        else:
            vector = ack(m, v)
            _goes_in(m, v, k.WENT_IN_INTERRUPT | vector)
        m[row + k.K_INTERRUPT] = vector + k.ONE
        m[row + k.K_ENTRY_INFO] = INTR_INFO_VALID | INTR_TYPE_EXTERNAL | vector
        if m[row + k.K_AVIC_WINDOW]:
            window_served(m, v, _injectable(m, v))
        _trace_injection(m, v, m[row + k.K_ENTRY_INFO], k.ZERO)
        if not _injectable(m, v):
            return k.ONE
    return _ask_for_window(m, v)


@kernel("u8(words, u8, u8)")
def _inject_nmi(m, v, can_inject):
    """A pending NMI: now, when the window opens, or (0) behind the event that goes first."""
    row = own(m, v)
    if not m[row + k.K_NMI_PENDING]:
        return k.ONE
    if not can_inject:
        return k.ZERO
    if nmi_allowed(m, v):
        m[row + k.K_NMI_PENDING] = m[row + k.K_NMI_PENDING] - k.ONE
        m[row + k.K_NMI_MASKED] = k.ONE
        m[row + k.K_ENTRY_INFO] = _nmi_info(m)
        _goes_in(m, v, k.WENT_IN_NMI)
    if m[row + k.K_NMI_PENDING]:
        m[row + k.K_NMI_WINDOW] = k.ONE
    return k.ONE


@kernel("u8(words, u8)")
def _inject_first(m, v):
    """A pending exception, or else the event whose delivery was cut short; 1 when the entry has its event.

    An event cut short that meets a new exception is lost, as in KVM, whose next exit empties the queues.
    """
    row = own(m, v)
    if m[row + k.K_EXCEPTION] or m[row + k.K_PENDING_DB]:
        m[row + k.K_REINJECT] = k.ZERO
    if m[row + k.K_EXCEPTION]:
        vector = m[row + k.K_EXCEPTION] - k.ONE
        info = INTR_INFO_VALID | INTR_TYPE_EXCEPTION | vector
        if vector < k.U(32) and (ERROR_CODE_VECTORS >> vector) & k.ONE:
            info = info | INTR_DELIVER_ERROR_CODE
        m[row + k.K_EXCEPTION] = k.ZERO
        return _inject_exception(m, v, info, k.ZERO)
    if m[row + k.K_PENDING_DB]:
        m[row + k.K_PENDING_DB] = k.ZERO
        return _inject_exception(m, v, INTR_INFO_VALID | INTR_TYPE_EXCEPTION | VECTOR_DB, k.ZERO)
    info = m[row + k.K_REINJECT]
    if not info & INTR_INFO_VALID:
        return k.ZERO
    m[row + k.K_REINJECT] = k.ZERO
    kind = info & INTR_TYPE
    if kind == INTR_TYPE_EXCEPTION or kind == INTR_TYPE_SOFT_EXCEPTION:
        return _inject_exception(m, v, info, k.ONE)
    m[row + k.K_ENTRY_INFO] = info
    if kind == INTR_TYPE_NMI:
        m[row + k.K_NMI_MASKED] = k.ONE
        _goes_in(m, v, k.WENT_IN_NMI)
    elif kind == INTR_TYPE_EXTERNAL:
        _goes_in(m, v, k.WENT_IN_INTERRUPT | info & k.ICR_VECTOR)
    if kind == INTR_TYPE_EXTERNAL or kind == INTR_TYPE_SOFT:
        if m[row + k.K_AVIC_WINDOW]:
            window_served(m, v, _injectable(m, v))
        _trace_injection(m, v, info, k.ONE)
    return k.ONE


@kernel("u8(words, u8)")
def inject_events(m, v):
    """Step 3 under an EVENT request or for user space's window: BLOCKED when the vCPU now waits for SIPI, else 0.

    One event an entry, in this order: exception, event to deliver again, SMI, NMI, interrupt. If another could go in at
    once behind it, the entry is made to exit immediately; if the guest must open a window first, that is asked for.
    An injected event is delivered by the entry itself, so its queue is empty afterwards.
    """
    row = own(m, v)
    asked = clear_word_bits(m, hot(m, v) + k.HOT_REQUESTS, k.REQ_EVENT) & k.REQ_EVENT
    window = _has_room_for_user(m, v) if m[row + k.K_USER_WINDOW] else k.ZERO  # before an INIT resets LINT0
    if not asked and not window:
        return k.ZERO
    accept_events(m, v)
    if m[row + k.K_MP_STATE] == k.MP_INIT_RECEIVED:
        return BLOCKED
    force = _nested_busy(m, v)
    can_inject = k.ZERO if _inject_first(m, v) or m[row + k.K_REINJECT] & INTR_INFO_VALID else k.ONE
    if m[row + k.K_SMI_PENDING] and not force:
        if not can_inject:
            force = k.ONE
        elif smi_allowed(m, v):
            m[row + k.K_SMI_PENDING] = k.ZERO
            enter_smm(m, v)
            can_inject = k.ZERO
    if not force:
        if not _inject_nmi(m, v, can_inject):
            force = k.ONE
        else:
            if m[row + k.K_ENTRY_INFO] & INTR_INFO_VALID:
                can_inject = k.ZERO
            if not _inject_interrupt(m, v, can_inject):
                force = k.ONE
    m[row + k.K_FORCE_EXIT] = force
    if window:
        _ask_for_window(m, v)
    enabled = k.FLAG_HW | k.FLAG_SW
    if m[hot(m, v) + k.HOT_FLAGS] & enabled == enabled:
        update_cr8_intercept(m, v)
        offer_pv_eoi(m, v)
    return k.ZERO
