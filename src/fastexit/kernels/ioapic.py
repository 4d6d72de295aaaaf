"""KVM's IOAPIC: its pins as GSIs reach them, the registers that a guest sees, what an EOI does behind it.

Models: kvm_ioapic_set_irq, ioapic_mmio_read and _write, ioapic_write_indirect, ioapic_read_indirect,
kvm_ioapic_update_eoi. ioapicpin.py has what a pin does, rtc.py the RTC's, scan.py whose EOIs come here, chipstate.py
what user space gets and sets.

Version 0x11 without an EOI register. A write of one or two bytes replaces the whole register, zero-extended.
Differs by generation: up to 6.3 unmasking a pin that waits delivers it whether or not its device can be asked; before
5.6 every write of an entry asked every vCPU for a scan. Up to 5.8 KVM's set of vCPUs to ask has 64 bits, and what is
beyond is written past it, which is not modelled. Spec: 82093AA data sheet.
"""

from ..jit.declare import ctz, kernel
from . import irqack, rtc
from . import typed as k
from .apicmap import MEMBER_BITS, UNRESOLVED, member, members
from .ioapicpin import IRR, REDIRTBL, ended_unseen, hold, move, service, swallows_eois
from .irqlock import lock, unlock
from .lapicreg import reg
from .match import matches
from .shared import NOT_MINE, ask, ask_all, emit, hot, own

STORM = k.U(10_000)
"""IOAPIC_SUCCESSIVE_IRQ_MAX_COUNT."""
STORM_NS = k.U(10_000_000)
"""HZ / 100 jiffies."""
SELECT, WINDOW = k.ZERO, k.U(0x10)
"""Offsets in the page."""
REG_ID, REG_VERSION, REG_ARBITRATION, REG_REDIRTBL = k.ZERO, k.ONE, k.U(2), k.U(0x10)
KEPT = k.REDIR_STATUS | k.REDIR_REMOTE_IRR
"""Bits of an entry that are not the guest's."""

# ------------------------------------------------------------------------------------------------------ EOIs and pins


@kernel("u8(words, u8, u8, u8, u8)")
def _end_pin(m, v, level, pin, me):
    """kvm_ioapic_update_eoi_one: a vCPU has ended a vector that the pin's entry has. Effect code.

    The trigger mode is the interrupt's, so a held edge whose vector came as level is delivered once more. A line that
    is still up after 10000 EOIs in a row waits for 10 ms, to let a guest that does not serve it make progress.
    """
    effects = irqack.notify_acked(m, irqack.IOAPIC_CHIP, pin, me)
    if not level or reg(m, v, k.APIC_SPIV) & k.SVR_SUPPRESS_EOI:
        return effects
    m[REDIRTBL + pin] = m[REDIRTBL + pin] & ~k.REDIR_REMOTE_IRR
    entry = m[REDIRTBL + pin]
    count = k.IOAPIC + k.IOAPIC_EOIS + pin
    if entry & k.REDIR_MASK or not m[IRR] & (k.ONE << pin):
        m[count] = k.ZERO
        return effects
    m[count] = m[count] + k.ONE
    if m[count] != STORM:
        return effects | service(m, pin, k.ZERO, me) & k.CODE_EFFECTS
    m[count] = k.ZERO
    if not m[k.IOAPIC + k.IOAPIC_DELAYED]:
        m[k.IOAPIC + k.IOAPIC_DELAYED] = m[k.H_NOW] + STORM_NS + k.ONE
    if m[k.H_CONFIG] & k.CONFIG_TRACE:
        emit(m, k.TP_IOAPIC_DELAYED_EOI_INJ, me, entry, k.ZERO, k.ZERO)
    return effects


@kernel("u8(words, u8, u8, u8)")
def update_eoi(m, v, vector, me):
    """kvm_ioapic_update_eoi: every pin whose entry has the vector, whoever raised it. Effect code.

    What TMR says of the vector decides whether a pin waits for this EOI.
    """
    level = (m[hot(m, v) + k.HOT_TMR + (vector >> k.U(6))] >> (vector & k.U(63))) & k.ONE
    lock(m)
    rtc.end(m, v, vector)
    effects = k.ZERO
    for i in range(k.IOAPIC_PINS):
        if m[REDIRTBL + k.U(i)] & k.ICR_VECTOR == vector:
            effects = effects | _end_pin(m, v, level, k.U(i), me)
    unlock(m)
    return effects


@kernel("u8(words, u8, u8)")
def _end_swallowed(m, pin, me):
    """ioapic_lazy_update_eoi of 5.6 and 5.7: the whole of an EOI, and in 5.6 of a level pin too. Effect code."""
    entry = m[REDIRTBL + pin]
    level = entry & k.REDIR_LEVEL
    if (level and not m[k.H_RULES] & k.R_LAZY_EOI_LEVEL) or not swallows_eois(m):
        return k.ZERO
    v = ended_unseen(m, entry)
    if v == k.NONE:
        return k.ZERO
    rtc.end(m, v, entry & k.ICR_VECTOR)
    return _end_pin(m, v, level, pin, me)


@kernel("u8(words, u8, u8, u8, u8, u8)")
def set_irq(m, pin, level, source, line_status, me):
    """kvm_ioapic_set_irq: a delivery code with KVM's result."""
    up = hold(m, pin, level, source)
    effects = k.ZERO
    if up and m[k.H_RULES] & k.R_LAZY_EOI_WHOLE:
        effects = _end_swallowed(m, pin, me)
    return effects | move(m, pin, up, line_status, me)


# ----------------------------------------------------------------------------------------------------------- registers


@kernel("u8(words, u8, u8, u8)")
def _ask_meant(m, icr, dest, me):
    """kvm_bitmap_or_dest_vcpus and the request: whom a destination means is to scan. Effect code."""
    base = m[k.H_MAP]
    found = members(m, base, k.NONE, icr, dest, k.ZERO)
    effects = k.ZERO
    if found == UNRESOLVED:
        for i in range(m[k.H_NVCPUS]):
            v = k.U(i)
            if m[hot(m, v) + k.HOT_FLAGS] & k.FLAG_HW and matches(m, v, k.NONE, icr, dest):
                effects = effects | ask(m, v, k.REQ_SCAN_IOAPIC, me)
        return effects
    bits = found >> MEMBER_BITS
    while bits:
        target = member(m, base, found, ctz(bits))
        bits = bits & (bits - k.ONE)
        if target:
            effects = effects | ask(m, target - k.ONE, k.REQ_SCAN_IOAPIC, me)
    return effects


@kernel("u8(words, u8, u8, u8)")
def _ask_for_scan(m, old, new, me):
    """Whose EOIs come here may have changed with an entry. Up to 7.1 the old destination is read in the new mode."""
    if new & k.ICR_DM or not m[k.H_TRAITS] & k.T_INHIBITS:
        return ask_all(m, k.REQ_SCAN_IOAPIC, me)
    icr = new & (k.ICR_VECTOR | k.ICR_LOGICAL | k.ICR_TRIGGER)
    effects = _ask_meant(m, icr, new >> k.REDIR_DEST_SHIFT, me)
    if (old ^ new) & k.REDIR_LOGICAL or (old ^ new) >> k.REDIR_DEST_SHIFT:
        if m[k.H_RULES] & k.R_SCAN_OLD_MODE:
            icr = icr & ~k.ICR_LOGICAL | old & k.REDIR_LOGICAL
        effects = effects | _ask_meant(m, icr, old >> k.REDIR_DEST_SHIFT, me)
    return effects


@kernel("u8(words, u8, u8, u8)")
def _write_entry(m, pin, value, me):
    """The half of an entry that IOREGSEL names. Effect code.

    An entry that becomes edge loses its remote IRR: an explicit EOI, to guests. Of a level pin that waits, unmasked,
    the device is asked whether its line is up still, where a resampler can; else it is delivered. A pending edge is
    not.
    """
    at = REDIRTBL + pin
    old = m[at]
    if m[k.IOAPIC + k.IOAPIC_IOREGSEL] & k.ONE:
        new = (old & k.LOW32) | value << k.U(32)
    else:
        new = (old & k.HIGH32) | value
    new = (new & ~KEPT) | (old & KEPT)
    if not new & k.REDIR_LEVEL:
        new = new & ~k.REDIR_REMOTE_IRR
    m[at] = new
    if (old ^ new) & k.REDIR_MASK:
        irqack.notify_mask(m, irqack.IOAPIC_CHIP, pin, k.ONE if new & k.REDIR_MASK else k.ZERO, me)
    effects = k.ZERO
    waits = m[IRR] & (k.ONE << pin) and not new & (k.REDIR_MASK | k.REDIR_REMOTE_IRR)
    if new & k.REDIR_LEVEL and waits:
        asks = m[k.H_RULES] & k.R_RESAMPLER_ASKED
        if asks and irqack.notify_resampler(m, irqack.IOAPIC_CHIP, pin):
            m[IRR] = m[IRR] & ~(k.ONE << pin)
        else:
            effects = service(m, pin, k.ZERO, me) & k.CODE_EFFECTS
    return effects | _ask_for_scan(m, old, m[at], me)


@kernel("u8(words, u8, u8)")
def _write_register(m, value, me):
    """ioapic_write_indirect."""
    index = m[k.IOAPIC + k.IOAPIC_IOREGSEL]
    if index == REG_ID:
        m[k.IOAPIC + k.IOAPIC_ID] = (value >> k.U(24)) & k.U(0xF)
        return k.ZERO
    pin = (index - REG_REDIRTBL & k.LOW32) >> k.ONE
    return _write_entry(m, pin, value, me) if pin < k.IOAPIC_PINS else k.ZERO


@kernel("u8(words)")
def _read_register(m):
    """ioapic_read_indirect: all ones where there is no register."""
    index = m[k.IOAPIC + k.IOAPIC_IOREGSEL]
    if index == REG_VERSION:
        return k.IOAPIC_VERSION
    if index == REG_ID or index == REG_ARBITRATION:
        return (m[k.IOAPIC + k.IOAPIC_ID] & k.U(0xF)) << k.U(24)
    pin = (index - REG_REDIRTBL & k.LOW32) >> k.ONE
    if pin >= k.IOAPIC_PINS:
        return k.LOW32
    entry = m[REDIRTBL + pin]
    return entry >> k.U(32) if index & k.ONE else entry & k.LOW32


@kernel("u8(words, u8, u8)")
def _answers(m, gpa, length):
    """1 for an access that the bus gives to the IOAPIC and that it takes: a base that user space moved is neither's."""
    if m[k.H_CONFIG] & k.CONFIG_SPLIT_IRQCHIP:
        return k.ZERO
    if gpa < k.IOAPIC_DEFAULT_BASE or gpa - k.IOAPIC_DEFAULT_BASE > k.IOAPIC_BYTES - length:
        return k.ZERO
    return k.ONE if gpa - m[k.IOAPIC + k.IOAPIC_BASE] < k.IOAPIC_BYTES else k.ZERO


@kernel("u8(words, u8, u8, u8, u8)")
def mmio_write(m, v, gpa, length, value):
    """ioapic_mmio_write: the effects of what it delivers, or NOT_MINE."""
    if not _answers(m, gpa, length):
        return NOT_MINE
    if length < k.U(4):
        value = value & ((k.ONE << (length << k.U(3))) - k.ONE)
    value = value & k.LOW32
    offset = gpa & k.U(0xFF)
    lock(m)
    code = k.ZERO
    if offset == SELECT:
        m[k.IOAPIC + k.IOAPIC_IOREGSEL] = value & k.U(0xFF)
    elif offset == WINDOW:
        code = _write_register(m, value, v)
    unlock(m)
    return code


@kernel("u8(words, u8, u8, u8)")
def mmio_read(m, v, gpa, length):
    """ioapic_mmio_read: the value in K_MSR_DATA, or NOT_MINE."""
    if not _answers(m, gpa, length):
        return NOT_MINE
    offset = gpa & k.U(0xFF)
    value = k.ZERO
    lock(m)
    if offset == SELECT:
        value = m[k.IOAPIC + k.IOAPIC_IOREGSEL]
    elif offset == WINDOW:
        value = _read_register(m)
    unlock(m)
    if length < k.U(4):
        value = value & ((k.ONE << (length << k.U(3))) - k.ONE)
    m[own(m, v) + k.K_MSR_DATA] = value
    return k.ZERO
