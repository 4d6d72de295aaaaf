"""Tell who listens that a guest has acknowledged an interrupt, or masked one: the PIT and resampling irqfds.

Models: kvm_notify_acked_irq, irqfd_resampler_ack, kvm_notify_irqfd_resampler, kvm_irq_has_notifier,
kvm_fire_mask_notifiers, kvm_irq_map_chip_pin. A chip is 0 for the master PIC, 1 for the slave, whose pins are 8 to 15,
and 2 for the IOAPIC. KVM drops the chip's lock for its notifiers; here everything is under one, and a notifier only
lets lines go, which acknowledges nothing.
"""

from ..jit.declare import kernel
from . import i8259, pitack
from . import typed as k
from .ioapicpin import hold, move
from .shared import emit, increment

IOAPIC_CHIP = k.U(2)
PIT_GSI = k.ZERO


@kernel("u8(words, u8, u8)")
def gsi_of(m, chip, pin):
    """kvm_irq_map_chip_pin: the GSI that was routed to the pin last, or NONE."""
    place = pin if chip == IOAPIC_CHIP else pin + k.IOAPIC_PINS
    return m[k.ROUTE_OF_PIN + place] - k.ONE


@kernel("u8(words, u8)")
def resamplers(m, gsi):
    """How many resampling irqfds a GSI has; NONE has none."""
    return m[k.RESAMPLERS + gsi * k.RESAMPLER_STRIDE + k.RESAMPLER_FDS] if gsi < k.MAX_ROUTES else k.ZERO


@kernel("u8(words)")
def pit_listens(m):
    """The PIT has its notifiers while it injects again what was not acknowledged."""
    return k.ONE if m[k.PIT_PRESENT] and m[k.PIT_REINJECT] else k.ZERO


@kernel("u8(words, u8, u8)")
def has_notifier(m, chip, pin):
    """kvm_irq_has_notifier."""
    gsi = gsi_of(m, chip, pin)
    if resamplers(m, gsi):
        return k.ONE
    return pit_listens(m) if gsi == PIT_GSI else k.ZERO


@kernel("u8(words, u8)")
def signal_resamplefds(m, gsi):
    """irqfd_resampler_notify: every resamplefd of a GSI, all at once."""
    increment(m, k.RESAMPLERS + gsi * k.RESAMPLER_STRIDE + k.RESAMPLER_SIGNALS)
    return k.ZERO


@kernel("u8(words, u8, u8, u8)")
def lower(m, gsi, source, me):
    """kvm_set_irq with a level of 0: a source lets go of a GSI's lines. Effect code.

    A pin that others hold up rises once more, as far as KVM can tell. A message has no level to take back.
    """
    if m[k.H_CONFIG] & k.CONFIG_TRACE:
        emit(m, k.TP_SET_IRQ, me, gsi, k.ZERO, source)
    if gsi >= m[k.ROUTE_GSIS] or gsi >= k.MAX_ROUTES:
        return k.ZERO
    code = k.ZERO
    for i in range(m[k.ROUTE_FIRST + gsi], m[k.ROUTE_FIRST + gsi + k.ONE]):
        row = k.ROUTES + k.U(i) * k.ROUTE_STRIDE
        kind, pin = m[row + k.ROUTE_KIND] & k.ROUTE_KINDS, m[row + k.ROUTE_A]
        if kind == k.ROUTE_IOAPIC:
            code = code | move(m, pin, hold(m, pin, k.ZERO, source), k.ZERO, me)
        elif kind == k.ROUTE_PIC:
            code = code | i8259.set_irq(m, pin, k.ZERO, source, me)
    return code & k.CODE_EFFECTS


@kernel("u8(words, u8, u8, u8)")
def notify_acked(m, chip, pin, me):
    """kvm_notify_acked_irq: traced whoever listens. Effect code.

    Notifiers run from the one that registered last: the PIT, which is there from the start, comes behind resamplers.
    """
    if m[k.H_CONFIG] & k.CONFIG_TRACE:
        emit(m, k.TP_ACK_IRQ, me, chip, pin, k.ZERO)
    gsi = gsi_of(m, chip, pin)
    effects = k.ZERO
    if resamplers(m, gsi):
        effects = lower(m, gsi, k.SOURCE_RESAMPLE, me)
        signal_resamplefds(m, gsi)
    if gsi == PIT_GSI and pit_listens(m):
        effects = effects | pitack.acked(m, me)
    return effects


@kernel("u8(words, u8, u8)")
def notify_resampler(m, chip, pin):
    """kvm_notify_irqfd_resampler: 1 where the pin's GSI has resamplers, which look at their devices now."""
    gsi = gsi_of(m, chip, pin)
    if not resamplers(m, gsi):
        return k.ZERO
    signal_resamplefds(m, gsi)
    return k.ONE


@kernel("u8(words, u8, u8, u8, u8)")
def notify_mask(m, chip, pin, masked, me):
    """kvm_fire_mask_notifiers: only the PIT listens."""
    if gsi_of(m, chip, pin) != PIT_GSI or not pit_listens(m):
        return k.ZERO
    return pitack.mask_changed(m, masked, me)
