"""The GSI routing table: what a line or an eventfd of user space means, in the order of its entries.

Models: kvm_set_irq, kvm_arch_set_irq_inatomic, kvm_set_msi, the irqfd's inject worker, irqfd resamplers; routing.py
has the table's making. Spec: Documentation/virt/kvm/api.rst, KVM_SET_GSI_ROUTING.
"""

from ..jit.declare import kernel
from . import i8259, ioapic, msi, synic
from . import typed as k
from .ipi import NOBODY, UNRESOLVED, combine, deliver, deliver_fast, is_illegal, log_illegal
from .irqlock import lock, unlock
from .shared import ask_all, emit, own


@kernel("u8(words, u8)")
def _first(m, gsi):
    """The row of a GSI's first route; those of one that the table does not reach are none, as are the last one's."""
    gsi = gsi if gsi < m[k.ROUTE_GSIS] and gsi < k.MAX_ROUTES else m[k.ROUTE_GSIS]
    return m[k.ROUTE_FIRST + gsi]


@kernel("u8(words, u8)")
def _routes(m, gsi):
    """How many routes a GSI has."""
    if gsi >= m[k.ROUTE_GSIS] or gsi >= k.MAX_ROUTES:
        return k.ZERO
    return m[k.ROUTE_FIRST + gsi + k.ONE] - m[k.ROUTE_FIRST + gsi]


@kernel("u8(words, u8, u8, u8)")
def _message(m, address, data, me):
    """kvm_msi_to_lapic_irq's trace line."""
    if m[k.H_CONFIG] & k.CONFIG_TRACE:
        hint = msi.redirection_hint(address)
        emit(m, k.TP_MSI_SET_IRQ, me, msi.as_icr(address, data), msi.destination(m, address), hint)
    return k.ZERO


@kernel("u8(words, u8, u8, u8, u8)")
def _set_msi(m, address, data, level, me):
    """kvm_set_msi: a message has no level to take back, and one that is no longer valid reaches nobody."""
    if not level or msi.route_invalid(m, address):
        return NOBODY
    _message(m, address, data, me)
    hint = msi.redirection_hint(address)
    if is_illegal(m, data):
        return log_illegal(m, k.NONE, msi.as_icr(address, data), msi.destination(m, address), hint, me)
    return deliver(m, k.NONE, msi.as_icr(address, data), msi.destination(m, address), hint, me)


@kernel("u8(words, u8, u8, u8, u8, u8)")
def _handle(m, row, level, source, line_status, me):
    """One route's handler: a delivery code, NOBODY for every negative result."""
    kind = m[row + k.ROUTE_KIND] & k.ROUTE_KINDS
    a, b = m[row + k.ROUTE_A], m[row + k.ROUTE_B]
    if kind == k.ROUTE_IOAPIC:
        return ioapic.set_irq(m, a, level, source, line_status, me)
    if kind == k.ROUTE_PIC:
        return i8259.set_irq(m, a, level, source, me)
    if kind == k.ROUTE_MSI:
        return _set_msi(m, a, b, level, me)
    return synic.set_line(m, level, a, b, me)


@kernel("u8(u8, u8)")
def _add(code, more):
    """Two results as one: what is negative is left out as long as anything is not."""
    if more & k.CODE_ACCEPTED_NONE == NOBODY:
        return code | more & k.CODE_EFFECTS
    if code & k.CODE_ACCEPTED_NONE == NOBODY:
        return more | code & k.CODE_EFFECTS
    return combine(code, more)


@kernel("u8(words, u8, u8, u8, u8, u8)")
def set_irq(m, gsi, level, source, line_status, me):
    """kvm_set_irq: traced first, routes or not; ACCEPTED is the sum of what its routes' handlers say, -1 without any.

    The chips' lock is the caller's.
    """
    if m[k.H_CONFIG] & k.CONFIG_TRACE:
        emit(m, k.TP_SET_IRQ, me, gsi, level, source)
    code = NOBODY
    first = _first(m, gsi)
    for i in range(_routes(m, gsi)):
        row = k.ROUTES + (first + k.U(i)) * k.ROUTE_STRIDE
        code = _add(code, _handle(m, row, level, source, line_status, me))
    return code


# ---------------------------------------------------------------------------------------------------------- user space


@kernel("u8(words, u8, u8, u8, u8)")
def irq_line(m, gsi, level, line_status, me):
    """KVM_IRQ_LINE_STATUS, or KVM_IRQ_LINE, which does not want to know: delivery code."""
    m[own(m, me) + k.K_TARGETS] = k.ZERO
    lock(m)
    code = set_irq(m, gsi, level, k.SOURCE_USER, line_status, me)
    unlock(m)
    return code


@kernel("u8(words, u8, u8)")
def _at_once(m, gsi, me):
    """kvm_arch_set_irq_inatomic: the delivery code of a GSI that is one message; UNRESOLVED where a worker has to."""
    if _routes(m, gsi) != k.ONE:
        return UNRESOLVED
    row = k.ROUTES + _first(m, gsi) * k.ROUTE_STRIDE
    kind, a, b = m[row + k.ROUTE_KIND] & k.ROUTE_KINDS, m[row + k.ROUTE_A], m[row + k.ROUTE_B]
    if kind == k.ROUTE_HV_SINT:
        return synic.set_line(m, k.ONE, a, b, me)
    if kind != k.ROUTE_MSI:
        return UNRESOLVED
    if msi.route_invalid(m, a):
        return NOBODY
    if is_illegal(m, b):
        return _set_msi(m, a, b, k.ONE, me)
    _message(m, a, b, me)
    hint = msi.redirection_hint(a)
    return deliver_fast(m, k.NONE, msi.as_icr(a, b), msi.destination(m, a), hint, me)


@kernel("u8(words, u8, u8, u8)")
def signal(m, gsi, resample, me):
    """An irqfd was written to: at once where it is one message, else by the worker. Delivery code.

    The worker pulses the line on user space's own source, so its down takes away what user space holds up. A
    resampling one only rises, until the guest acknowledges.
    """
    m[own(m, me) + k.K_TARGETS] = k.ZERO
    lock(m)
    code = UNRESOLVED if resample else _at_once(m, gsi, me)
    if code == UNRESOLVED and resample:
        code = set_irq(m, gsi, k.ONE, k.SOURCE_RESAMPLE, k.ZERO, me)
    elif code == UNRESOLVED:
        code = set_irq(m, gsi, k.ONE, k.SOURCE_USER, k.ZERO, me)
        code = code | set_irq(m, gsi, k.ZERO, k.SOURCE_USER, k.ZERO, me) & k.CODE_EFFECTS
    unlock(m)
    return code


@kernel("u8(words, u8, u8, u8)")
def resample(m, gsi, on, me):
    """irqfd_resampler: a GSI gets one more resampling irqfd, or one less. Effect code.

    The first and the last one change who listens to acknowledgements, so everybody scans; with the last one its source
    lets go. Of a GSI that can have no route the host tells the first and the last alone.
    """
    m[own(m, me) + k.K_TARGETS] = k.ZERO
    if gsi >= k.MAX_ROUTES:
        return ask_all(m, k.REQ_SCAN_IOAPIC, me)
    at = k.RESAMPLERS + gsi * k.RESAMPLER_STRIDE + k.RESAMPLER_FDS
    lock(m)
    was = m[at]
    m[at] = was + k.ONE if on else was - k.ONE
    effects = k.ZERO
    if not was or not m[at]:
        if not m[k.H_CONFIG] & k.CONFIG_SPLIT_IRQCHIP:
            effects = ask_all(m, k.REQ_SCAN_IOAPIC, me)
        if not on:
            effects = effects | set_irq(m, gsi, k.ZERO, k.SOURCE_RESAMPLE, k.ZERO, me) & k.CODE_EFFECTS
    unlock(m)
    return effects


@kernel("u8(words, u8)")
def rerouted(m, me):
    """kvm_arch_irq_routing_update: with a split irqchip everybody scans the new table. Effect code."""
    m[own(m, me) + k.K_TARGETS] = k.ZERO
    return ask_all(m, k.REQ_SCAN_IOAPIC, me) if m[k.H_CONFIG] & k.CONFIG_SPLIT_IRQCHIP else k.ZERO
