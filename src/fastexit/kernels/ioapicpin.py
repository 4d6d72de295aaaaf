"""A pin of KVM's IOAPIC: its line goes up or down, and what it then delivers.

Models: ioapic_set_irq, ioapic_service, ioapic_lazy_update_eoi, kvm_ioapic_eoi_inject_work. ioapic.py has the registers
and EOIs. Results are delivery codes whose ACCEPTED is KVM's result: how many took the interrupt, 0 coalesced, -1
(NOBODY) where the pin is masked or waits for an EOI.

Polarity is not looked at. A pin keeps which sources hold it up, and its line is their OR; of an edge that was delivered
the irr bit stays set until the line goes down, and irr_delivered hides it from user space.
Differs by generation: where APICv swallows EOIs, an edge looks after them itself, the first kernels at every edge and
level, for the whole EOI. Spec: 82093AA datasheet.
"""

from ..jit.declare import kernel
from . import rtc
from . import typed as k
from .ipi import ACCEPT, NOBODY, deliver, is_illegal, log_illegal
from .irqlock import lock, unlock
from .match import matches
from .shared import emit

IRR = k.IOAPIC + k.IOAPIC_IRR
REDIRTBL = k.IOAPIC + k.IOAPIC_REDIRTBL
AS_ICR = k.ICR_VECTOR | k.ICR_DM | k.ICR_LOGICAL | k.ICR_TRIGGER
"""What an entry has at the places where the ICR has it."""


@kernel("u8(words, u8, u8, u8)")
def service(m, pin, line_status, me):
    """ioapic_service: the entry's interrupt to whom it means, for as long as the pin is free to send one.

    An edge counts as delivered even where nobody takes it; a level one waits for an EOI only if somebody, or nobody at
    all (-1), did.
    """
    entry = m[REDIRTBL + pin]
    level = entry & k.REDIR_LEVEL
    if entry & k.REDIR_MASK or (level and entry & k.REDIR_REMOTE_IRR):
        return NOBODY
    if not level:
        at = k.IOAPIC + k.IOAPIC_IRR_DELIVERED
        m[at] = m[at] | k.ONE << pin
    icr = entry & AS_ICR | k.ICR_LEVEL
    dest = entry >> k.REDIR_DEST_SHIFT
    if is_illegal(m, icr):
        return log_illegal(m, k.NONE, icr, dest, k.ZERO, me)
    if pin == rtc.RTC_PIN and line_status:
        code = rtc.deliver(m, icr, dest, me)
    else:
        code = deliver(m, k.NONE, icr, dest, k.ZERO, me)
    if level and code & k.CODE_ACCEPTED_NONE:
        m[REDIRTBL + pin] = m[REDIRTBL + pin] | k.REDIR_REMOTE_IRR
    return code


@kernel("u8(words)")
def swallows_eois(m):
    """kvm_apicv_activated, which the pins of the first kernels did not know."""
    if not m[k.H_TRAITS] & k.T_INHIBITS:
        return k.ZERO
    return k.ZERO if m[k.H_INHIBITS] else k.ONE


@kernel("u8(words, u8)")
def ended_unseen(m, entry):
    """Find the first vCPU that an entry means and that is through with its vector, or NONE."""
    for i in range(m[k.H_NVCPUS]):
        v = k.U(i)
        if matches(m, v, k.NONE, entry & k.ICR_LOGICAL, entry >> k.REDIR_DEST_SHIFT):
            if not rtc.pending_eoi(m, v, entry & k.ICR_VECTOR):
                return v
    return k.NONE


@kernel("u8(words, u8)")
def _end_unseen(m, entry):
    """ioapic_lazy_update_eoi: the CPU has ended the last edge without an exit; only the RTC's pin counts them.

    No vCPU is in its map while the count is 0, so nobody has to be looked for then.
    """
    if not m[k.IOAPIC + k.IOAPIC_RTC_PENDING] or m[k.H_RULES] & k.R_LAZY_EOI_WHOLE or not swallows_eois(m):
        return k.ZERO
    v = ended_unseen(m, entry)
    return rtc.end(m, v, entry & k.ICR_VECTOR) if v != k.NONE else k.ZERO


@kernel("u8(words, u8, u8, u8)")
def _rise(m, pin, line_status, me):
    """A line that is up, whether or not it was."""
    entry = m[REDIRTBL + pin]
    edge = not entry & k.REDIR_LEVEL
    if edge:
        _end_unseen(m, entry)
    if pin == rtc.RTC_PIN and line_status and rtc.coalesces(m):
        return k.ZERO
    bit = k.ONE << pin
    was = m[IRR] & bit
    m[IRR] = m[IRR] | bit
    if edge:
        at = k.IOAPIC + k.IOAPIC_IRR_DELIVERED
        m[at] = m[at] & ~bit
        if was:
            return k.ZERO
    return service(m, pin, line_status, me)


@kernel("u8(words, u8, u8, u8)")
def hold(m, pin, level, source):
    """__kvm_irq_line_state: a source holds a pin up, or lets go; the sources that hold it now.

    Two GSIs that are routed to one pin share its bits, so the one's down takes the other's up away.
    """
    at = k.IOAPIC + k.IOAPIC_SOURCES + pin
    bit = k.ONE << source
    m[at] = m[at] | bit if level else m[at] & ~bit
    return m[at]


@kernel("u8(words, u8, u8, u8, u8)")
def move(m, pin, level, line_status, me):
    """ioapic_set_irq: the pin's line is up or down. Traced with the entry as it was, "coalesced" for a result of 0.

    A down always counts, masked or not, and leaves remote IRR to the EOI.
    """
    entry = m[REDIRTBL + pin]
    if level:
        code = _rise(m, pin, line_status, me)
    else:
        m[IRR] = m[IRR] & ~(k.ONE << pin)
        code = ACCEPT
    if m[k.H_CONFIG] & k.CONFIG_TRACE:
        emit(m, k.TP_IOAPIC_SET_IRQ, me, entry, pin, k.ZERO if code & k.CODE_ACCEPTED_NONE else k.ONE)
    return code


@kernel("u8(words)")
def delayed(m):
    """When the delayed re-delivery of a storm runs; NONE, one less than 0, where it does not."""
    return m[k.IOAPIC + k.IOAPIC_DELAYED] - k.ONE


@kernel("u8(words, u8)")
def inject_delayed(m, me):
    """kvm_ioapic_eoi_inject_work: every level pin that waits, of whichever storm, once. Effect code."""
    lock(m)
    m[k.IOAPIC + k.IOAPIC_DELAYED] = k.ZERO
    effects = k.ZERO
    for i in range(k.IOAPIC_PINS):
        pin = k.U(i)
        entry = m[REDIRTBL + pin]
        waits = m[IRR] & (k.ONE << pin) and not entry & k.REDIR_REMOTE_IRR
        if entry & k.REDIR_LEVEL and waits:
            effects = effects | service(m, pin, k.ZERO, me) & k.CODE_EFFECTS
    unlock(m)
    return effects
