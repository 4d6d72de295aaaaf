"""The texts of events about interrupts of devices: lines, IOAPIC, PICs, MSIs, posted interrupts. All of it is compiled.

As in exits.py: address and row in, the address of the line end out, or 0.
"""

from __future__ import annotations

import numpy as np

from fastexit.jit.declare import kernel
from fastexit.records.parts import (
    COMMA_TEXT,
    EVENT_NAME,
    NAME,
    OPENING,
    PARENTHESIS,
    VCPU_TEXT,
    A,
    B,
    C,
    D,
    coalesced,
    mode,
    name,
    small,
    vcpu,
)
from fastexit.records.tokens import (
    FULL,
    ONE,
    THREE,
    VALUE,
    ZERO,
    blank,
    decimal,
    end,
    hexadecimal,
    label,
    lead,
    literal,
    signed,
    text,
    word,
)

U = np.uint64
AND = text(b"and")
BAR = text(b"|")
BEING = text(b"being")
CHIP = text(b"chip")
DISABLED = text(b"disabled")
DST = text(b"dst")
EDGE = text(b"edge")
ENABLED = text(b"enabled")
FOR = text(b"for")
GSI = text(b"gsi")
GSI_COLON = text(b"gsi:")
GVEC = text(b"gvec:")
IRQCHIP = text(b"irqchip")
IRQ_OLD = text(b"irq")
IS = text(b"is")
LEVEL = text(b"level")
LOGICAL = text(b"logical|")
MASKED = text(b"|masked")
MASTER = text(b"master")
PHYSICAL = text(b"physical")
PI = text(b"PI")
PIC = text(b"PIC")
PIN = text(b"pin")
PI_DESC_1 = text(b"pi_desc_")
PI_DESC_2 = text(b"addr:")
RH = text(b"|rh")
SLAVE = text(b"slave")
SOURCE = text(b"source")
UPDATED = text(b"updated")
VEC = text(b"vec")
VT_D = text(b"VT-d")


@kernel("u8(words, u8, u8)")
def set_irq(m, p, r):
    """kvm_set_irq."""
    p = decimal(m, lead(p, GSI))
    m[r + A] = m[VALUE]
    p = signed(m, label(p, LEVEL))
    m[r + B] = m[VALUE]
    p = decimal(m, label(p, SOURCE))
    m[r + C] = m[VALUE]
    return end(p)


@kernel("u8(words, u8, u8)")
def redirection(m, p, r):
    """What IOAPIC entries and MSIs have in common; the vector into B. It ends behind edge or level."""
    p = small(m, decimal(m, label(p, VEC)))
    m[r + B] = m[VALUE]
    p = mode(m, literal(blank(p), OPENING))
    q = literal(p, LOGICAL)
    p = q if q else literal(literal(p, PHYSICAL), BAR)
    q = literal(p, EDGE)
    return q if q else literal(p, LEVEL)


@kernel("u8(words, u8, u8)")
def ioapic(m, p, r):
    """kvm_ioapic_set_irq."""
    m[NAME] = m[EVENT_NAME]
    p = decimal(m, lead(p, PIN))
    m[r + A] = m[VALUE]
    p = hexadecimal(m, label(p, DST))
    m[r + C] = m[VALUE]
    p = redirection(m, p, r)
    q = literal(p, MASKED)
    return coalesced(m, literal(q if q else p, PARENTHESIS), r)


@kernel("u8(words, u8, u8)")
def delayed_eoi(m, p, r):
    """kvm_ioapic_delayed_eoi_inj, which does not say the pin."""
    m[NAME] = m[EVENT_NAME]
    m[r + A] = FULL
    p = hexadecimal(m, lead(p, DST))
    m[r + C] = m[VALUE]
    p = redirection(m, p, r)
    q = literal(p, MASKED)
    return end(literal(q if q else p, PARENTHESIS))


@kernel("u8(words, u8, u8)")
def msi(m, p, r):
    """kvm_msi_set_irq."""
    p = hexadecimal(m, lead(p, DST))
    m[r + A] = m[VALUE]
    p = redirection(m, p, r)
    q = literal(p, RH)
    return end(literal(q if q else p, PARENTHESIS))


@kernel("u8(words, u8, u8)")
def pic(m, p, r):
    """kvm_pic_set_irq."""
    p = decimal(m, lead(p, CHIP))
    chip = m[VALUE]
    p = decimal(m, label(p, PIN))
    if p == ZERO or chip > ONE or m[VALUE] > U(7):
        return ZERO
    m[r + A] = chip << THREE | m[VALUE]
    p = literal(blank(p), OPENING)
    q = literal(p, EDGE)
    p = q if q else literal(p, LEVEL)
    q = literal(p, MASKED)
    m[r + C] = ONE if q else ZERO
    return coalesced(m, literal(q if q else p, PARENTHESIS), r)


@kernel("u8(words, u8, u8)")
def ack(m, p, r):
    """kvm_ack_irq; two chips have names of two words."""
    begin = blank(literal(p, IRQCHIP))
    p = lead(begin, PIC)
    q = literal(p, MASTER)
    if q == ZERO:
        q = literal(p, SLAVE)
    p = label(q, PIN)
    if p == ZERO:
        q = word(m, begin)
        p = label(q, PIN)
    p = decimal(m, p)
    m[r + A] = m[VALUE]
    p = end(p)
    if p == ZERO or name(m, begin, q) == ZERO:
        return ZERO
    return p


@kernel("u8(words, u8, u8)")
def irte(m, p, r):
    """kvm_pi_irte_update, for which no vCPU is -1."""
    q = lead(p, VT_D)
    p = lead(lead(q if q else p, PI), IS)
    q = lead(p, DISABLED)
    if q == ZERO:
        m[r + C] = ONE
        q = lead(lead(lead(lead(p, ENABLED), AND), BEING), UPDATED)
    p = decimal(m, lead(lead(q, FOR), IRQ_OLD))
    m[r + D] = m[VALUE]
    p = signed(m, lead(blank(literal(p, COMMA_TEXT)), VCPU_TEXT))
    if p == ZERO:
        return ZERO
    if m[VALUE] != FULL:
        p = vcpu(m, p)
    p = hexadecimal(m, lead(blank(literal(p, COMMA_TEXT)), GSI_COLON))
    m[r + A] = m[VALUE]
    p = small(m, hexadecimal(m, lead(blank(literal(p, COMMA_TEXT)), GVEC)))
    m[r + B] = m[VALUE]
    q = literal(blank(literal(p, COMMA_TEXT)), PI_DESC_1)
    return end(hexadecimal(m, lead(q, PI_DESC_2)) if q else p)
