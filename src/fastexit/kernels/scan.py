"""Which EOIs of a vCPU the IOAPIC wants to hear of: KVM's ioapic_handled_vectors, rebuilt at an entry that was asked.

Models: vcpu_scan_ioapic, kvm_ioapic_scan_entry, kvm_scan_ioapic_routes, kvm_scan_ioapic_irq. Until the next entry the
old set holds, for EOIs by the host, too. Differs by generation: from 6.15 on a vector that is in the set only because
an earlier entry sent it asks for another scan when it ends; up to 6.1 messages of a split irqchip are in the set by
their destination alone, and up to 6.9, but for stable kernels of 2024 and later, its scan leaves PIR alone.
"""

from ..jit.declare import kernel, umin
from . import irqack, msi
from . import typed as k
from .ioapicpin import REDIRTBL
from .irqlock import lock, unlock
from .match import matches
from .pid import sync_pir_to_irr
from .rtc import RTC_PIN, pending_eoi
from .shared import emit, hot, own


@kernel("u8(words, u8, u8)")
def _want(m, v, vector):
    at = own(m, v) + k.K_IOAPIC_HANDLED + (vector >> k.U(6))
    m[at] = m[at] | k.ONE << (vector & k.U(63))
    return k.ZERO


@kernel("u8(words, u8, u8, u8, u8)")
def _look(m, v, icr, dest, pending):
    """kvm_scan_ioapic_irq: a vector that may come here, or, where ``pending`` counts, is still to be ended here."""
    vector = icr & k.ICR_VECTOR
    if matches(m, v, k.NONE, icr & k.ICR_LOGICAL, dest):
        return _want(m, v, vector)
    if not pending or not pending_eoi(m, v, vector):
        return k.ZERO
    if m[k.H_RULES] & k.R_SCAN_STALE:
        stale = k.IRQ + v * k.IRQ_STRIDE + k.IRQ_STALE
        if vector >= m[stale]:
            m[stale] = vector + k.ONE
    return _want(m, v, vector)


@kernel("u8(words, u8)")
def _scan_pins(m, v):
    """kvm_ioapic_scan_entry: masked or not, whatever the mode. Of edge pins those that somebody listens to."""
    lock(m)
    followed = m[k.IRQ + v * k.IRQ_STRIDE + k.IRQ_RTC_VECTOR]
    if followed:
        _want(m, v, followed - k.ONE)
    for i in range(k.IOAPIC_PINS):
        pin = k.U(i)
        entry = m[REDIRTBL + pin]
        if entry & k.REDIR_LEVEL or pin == RTC_PIN or irqack.has_notifier(m, irqack.IOAPIC_CHIP, pin):
            _look(m, v, entry, entry >> k.REDIR_DEST_SHIFT, k.ONE)
    unlock(m)
    return k.ZERO


@kernel("u8(words, u8)")
def _scan_routes(m, v):
    """kvm_scan_ioapic_routes: level messages of the GSIs that are pins of user space's IOAPIC. All are traced."""
    lock(m)
    pending = m[k.H_RULES] & k.R_SCAN_SPLIT_PENDING
    last = umin(m[k.ROUTE_GSIS], m[k.ROUTE_RESERVED])
    for i in range(m[k.ROUTE_FIRST], m[k.ROUTE_FIRST + last]):
        row = k.ROUTES + k.U(i) * k.ROUTE_STRIDE
        if m[row + k.ROUTE_KIND] & k.ROUTE_KINDS != k.ROUTE_MSI:
            continue
        address, data = m[row + k.ROUTE_A], m[row + k.ROUTE_B]
        icr, dest = msi.as_icr(address, data), msi.destination(m, address)
        if m[k.H_CONFIG] & k.CONFIG_TRACE:
            emit(m, k.TP_MSI_SET_IRQ, v, icr, dest, msi.redirection_hint(address))
        if icr & k.ICR_TRIGGER:
            _look(m, v, icr, dest, pending)
    unlock(m)
    return k.ZERO


@kernel("u8(words, u8)")
def scan(m, v):
    """vcpu_scan_ioapic, for REQ_SCAN_IOAPIC. A set that the embedder gave stays, as does that of a disabled APIC."""
    if not m[hot(m, v) + k.HOT_FLAGS] & k.FLAG_HW:
        return k.ZERO
    split = m[k.H_CONFIG] & k.CONFIG_SPLIT_IRQCHIP
    if not split or m[k.H_TRAITS] & k.T_SCAN_SPLIT_SYNCS:
        sync_pir_to_irr(m, v)
    if m[k.IRQ + v * k.IRQ_STRIDE + k.IRQ_GIVEN]:
        return k.ZERO
    for i in range(4):
        m[own(m, v) + k.K_IOAPIC_HANDLED + k.U(i)] = k.ZERO
    m[k.IRQ + v * k.IRQ_STRIDE + k.IRQ_STALE] = k.ZERO
    if split:
        return _scan_routes(m, v)
    return _scan_pins(m, v)
