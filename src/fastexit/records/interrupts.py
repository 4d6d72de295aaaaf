"""The texts of events about the local APIC: its registers and IPIs, what it takes and injects. All of it is compiled.

As in exits.py: each kernel takes the address behind an event's name and the index of the row to fill, and gives the
address of the line end, or 0: the text says something else, or a name in it is not known yet (block.MISSED_LENGTH).
"""

from __future__ import annotations

import numpy as np

from fastexit.jit.bytesaddressed import load_byte
from fastexit.jit.declare import kernel
from fastexit.records import block
from fastexit.records.parts import (
    COLON_TEXT,
    COMMA_TEXT,
    EQUALS,
    EVENT_NAME,
    HIGHEST_VECTOR,
    NAME,
    NAME_INDEX,
    OPENING,
    PARENTHESIS,
    READ,
    WORD32,
    WRITE,
    A,
    B,
    C,
    D,
    coalesced,
    half,
    mode,
    name,
    reinjected,
    small,
    vcpu,
)
from fastexit.records.tokens import (
    CLASSES,
    CLOSE,
    DARK,
    FULL,
    LONGEST_NAME,
    MINUS,
    ONE,
    THREE,
    TWO,
    VALUE,
    ZERO,
    blank,
    decimal,
    end,
    entry,
    hexadecimal,
    label,
    lead,
    literal,
    rest,
    signed,
    text,
    word,
)

U = np.uint64
ACTIVATE = text(b"activate")
ALL = text(b"all")
APICID = text(b"apicid")
APICID_EQUALS = text(b"apicid=")
APIC_READ_1 = text(b"apic_rea")
APIC_READ_2 = text(b"d")
APIC_WRITE_1 = text(b"apic_wri")
APIC_WRITE_2 = text(b"te")
ASSERT = text(b"assert|")
BAR = text(b"|")
BIT = text(b"bit=")
BUT_SELF = text(b"-but-sel")
CLEARED = text(b"cleared")
DE = text(b"de-")
DEACTIVATE_1 = text(b"deactiva")
DEACTIVATE_2 = text(b"te")
DST = text(b"dst")
EDGE = text(b"edge")
EDGE_END = text(b"edge)")
EIGHTEEN = U(18)
ELEVEN = U(11)
F = text(b"f")
FAULT = text(b"fault")
FIFTEEN = U(15)
FORMAT = text(b"format")
FOURTEEN = U(14)
HIGHEST_BIT = U(63)
HV_TIMER = text(b"hv_timer")
ICRH_1 = text(b"icrh:icr")
ICRH_2 = text(b"l=")
ID = text(b"id=")
INDEX = text(b"index=")
INHIBITS_1 = text(b"inhibits")
INHIBITS_2 = text(b"=")
IRQ = text(b"IRQ")
IRQ_OLD = text(b"irq")
LEVEL = text(b"level")
LEVEL_END = text(b"level)")
LOGICAL = text(b"logical|")
NAME_EVENT = U(block.NAME_EVENT)
OFFSET = text(b"offset=")
PHYSICAL = text(b"physical")
PROCESSOR_1 = text(b"processo")
PROCESSOR_2 = text(b"r_mask")
REASON_EQUALS = text(b"reason=")
SELF = text(b"self")
SET = text(b"set")
SOFT_1 = text(b"Soft/INT")
SOFT_2 = text(b"n")
TRAP = text(b"trap")
VALID_BANK_1 = text(b"valid_ba")
VALID_BANK_2 = text(b"nk_mask")
VCPUID = text(b"vcpuid=")
VCPU_EQUALS = text(b"vcpu=")
VCPU_ID_TEXT = text(b"vcpu_id")
VEC = text(b"vec")
VECTOR = text(b"vector")
VEC_EQUALS = text(b"vec=")


@kernel("u8(words, u8, u8)")
def apic(m, p, r):
    """kvm_apic. A register without a name is its offset."""
    q = blank(literal(literal(p, APIC_WRITE_1), APIC_WRITE_2))
    m[r + C] = ONE if q else ZERO
    begin = q if q else blank(literal(literal(p, APIC_READ_1), APIC_READ_2))
    p = word(m, begin)
    if p == ZERO or p - begin > LONGEST_NAME:
        return ZERO
    e = entry(m, begin, p - begin)
    if e == ZERO:
        return ZERO
    m[NAME] = m[e + NAME_INDEX]
    if m[e + NAME_EVENT] >> WORD32:
        m[r + A] = (m[e + NAME_EVENT] >> WORD32) - ONE
    elif hexadecimal(m, begin) == p:
        m[r + A] = m[VALUE]
    else:
        return ZERO
    p = hexadecimal(m, label(p, EQUALS))
    m[r + B] = m[VALUE]
    return end(p)


@kernel("u8(words, u8, u8)")
def ipi(m, p, r):
    """kvm_apic_ipi."""
    p = hexadecimal(m, lead(p, DST))
    m[r + A] = m[VALUE]
    p = small(m, decimal(m, label(p, VEC)))
    low = m[VALUE]
    p = mode(m, literal(blank(p), OPENING))
    if p == ZERO:
        return ZERO
    low |= m[VALUE]
    q = literal(p, LOGICAL)
    if q:
        low |= ONE << ELEVEN
        p = q
    else:
        p = literal(literal(p, PHYSICAL), BAR)
    q = literal(p, ASSERT)
    if q:
        low |= ONE << FOURTEEN
        p = q
    else:
        p = literal(literal(p, DE), ASSERT)
    q = literal(p, LEVEL)
    if q:
        low |= ONE << FIFTEEN
        p = q
    else:
        p = literal(p, EDGE)
    p = literal(p, BAR)
    q = literal(p, DST)
    if q == ZERO:
        q = literal(p, SELF)
        if q:
            low |= ONE << EIGHTEEN
        else:
            q = literal(p, ALL)
            after = literal(literal(q, BUT_SELF), F)
            low |= (THREE if after else TWO) << EIGHTEEN
            q = after if after else q
    m[r + B] = low
    return end(literal(q, PARENTHESIS))


@kernel("u8(words, u8, u8)")
def accept(m, p, r):
    """kvm_apic_accept_irq and kvm_apicv_accept_irq: apicid is the vCPU's id."""
    p = vcpu(m, hexadecimal(m, lead(p, APICID)))
    m[r + A] = m[VALUE]
    p = small(m, decimal(m, label(p, VEC)))
    m[r + B] = m[VALUE]
    p = mode(m, literal(blank(p), OPENING))
    how = m[VALUE]
    q = literal(p, LEVEL_END)
    if q:
        how |= ONE << FIFTEEN
    else:
        q = literal(p, EDGE_END)
    m[r + C] = how
    return coalesced(m, q, r)


@kernel("u8(words, u8, u8)")
def eoi(m, p, r):
    """kvm_eoi and kvm_pv_eoi."""
    p = vcpu(m, hexadecimal(m, lead(p, APICID)))
    m[r + A] = m[VALUE]
    q = label(p, VECTOR)
    p = signed(m, q)
    if p == ZERO or m[VALUE] > HIGHEST_VECTOR and (m[VALUE] != FULL or load_byte(q) != MINUS):
        return ZERO
    m[r + B] = m[VALUE]
    return end(p)


@kernel("u8(words, u8, u8)")
def inject(m, p, r):
    """kvm_inj_virq, in decimal up to 5.x."""
    q = lead(p, IRQ_OLD)
    if q:
        q = small(m, decimal(m, q))
        m[r + A] = m[VALUE]
        return end(q)
    q = lead(p, IRQ)
    if q == ZERO:
        q = blank(literal(literal(p, SOFT_1), SOFT_2))
        m[r + B] = ONE
    q = small(m, hexadecimal(m, q))
    m[r + A] = m[VALUE]
    return reinjected(m, q, r)


@kernel("u8(words, u8, u8)")
def exception(m, p, r):
    """kvm_inj_exception."""
    begin = p
    p = name(m, begin, word(m, p))
    if p == ZERO:
        return ZERO
    q = literal(blank(p), OPENING)
    if q:
        q = literal(hexadecimal(m, q), PARENTHESIS)
        m[r + A] = m[VALUE]
        p = q
    return reinjected(m, p, r)


@kernel("u8(words, u8, u8)")
def hv_send_ipi(m, p, r):
    """kvm_hv_send_ipi and kvm_hv_send_ipi_ex."""
    m[NAME] = m[EVENT_NAME]
    p = hexadecimal(m, lead(p, VECTOR))
    m[r + A] = m[VALUE]
    q = label(p, FORMAT)
    if q:
        p = hexadecimal(m, q)
        m[r + C] = m[VALUE]
        p = blank(literal(literal(blank(p), VALID_BANK_1), VALID_BANK_2))
    else:
        p = blank(literal(literal(blank(p), PROCESSOR_1), PROCESSOR_2))
    p = hexadecimal(m, p)
    m[r + B] = m[VALUE]
    return end(p)


@kernel("u8(words, u8, u8)")
def inhibit(m, p, r):
    """kvm_apicv_inhibit_changed."""
    q = lead(p, SET)
    m[r + A] = ONE if q else ZERO
    begin = literal(q if q else lead(p, CLEARED), REASON_EQUALS)
    q = decimal(m, begin)
    p = hexadecimal(m, literal(literal(blank(literal(q, COMMA_TEXT)), INHIBITS_1), INHIBITS_2))
    m[r + B] = m[VALUE]
    p = rest(p)
    if p == ZERO or name(m, begin, q) == ZERO:
        return ZERO
    return p


@kernel("u8(words, u8, u8)")
def inhibit_request(m, p, r):
    """kvm_apicv_update_request, of 5.6 to 6.0."""
    q = blank(literal(literal(p, DEACTIVATE_1), DEACTIVATE_2))
    m[r + A] = ONE if q else ZERO
    begin = literal(q if q else lead(p, ACTIVATE), BIT)
    q = decimal(m, begin)
    p = end(q)
    if p == ZERO or m[VALUE] > HIGHEST_BIT:
        return ZERO
    m[r + B] = m[r + A] << m[VALUE]
    m[r + D] = ONE
    return p if name(m, begin, q) else ZERO


@kernel("u8(words, u8, u8)")
def incomplete_ipi(m, p, r):
    """kvm_avic_incomplete_ipi."""
    m[NAME] = m[EVENT_NAME]
    p = vcpu(m, decimal(m, literal(p, VCPU_EQUALS)))
    p = half(m, hexadecimal(m, literal(literal(blank(literal(p, COMMA_TEXT)), ICRH_1), ICRH_2)))
    high = m[VALUE]
    p = half(m, hexadecimal(m, literal(p, COLON_TEXT)))
    m[r + A] = high << WORD32 | m[VALUE]
    p = decimal(m, literal(blank(literal(p, COMMA_TEXT)), ID))
    m[r + B] = m[VALUE]
    return end(decimal(m, literal(blank(literal(p, COMMA_TEXT)), INDEX)))


@kernel("u8(words, u8, u8)")
def unaccelerated(m, p, r):
    """kvm_avic_unaccelerated_access."""
    m[NAME] = m[EVENT_NAME]
    p = vcpu(m, decimal(m, literal(p, VCPU_EQUALS)))
    p = hexadecimal(m, literal(blank(literal(p, COMMA_TEXT)), OFFSET))
    m[r + A] = m[VALUE]
    p = literal(p, OPENING)
    if p == ZERO:
        return ZERO
    c = load_byte(p)
    while c != CLOSE and m[CLASSES + c] & DARK:
        p += ONE
        c = load_byte(p)
    p = blank(literal(literal(p, PARENTHESIS), COMMA_TEXT))
    q = literal(p, TRAP)
    p = blank(literal(q if q else literal(p, FAULT), COMMA_TEXT))
    q = literal(p, WRITE)
    m[r + C] = ONE if q else ZERO
    p = hexadecimal(m, literal(blank(literal(q if q else literal(p, READ), COMMA_TEXT)), VEC_EQUALS))
    m[r + B] = m[VALUE]
    return end(p)


@kernel("u8(words, u8, u8)")
def doorbell(m, p, r):
    """kvm_avic_doorbell."""
    m[NAME] = m[EVENT_NAME]
    p = vcpu(m, decimal(m, literal(p, VCPUID)))
    p = decimal(m, literal(blank(literal(p, COMMA_TEXT)), APICID_EQUALS))
    m[r + A] = m[VALUE]
    return end(p)


@kernel("u8(words, u8, u8)")
def hv_timer(m, p, r):
    """kvm_hv_timer_state, with the vCPU in hexadecimal."""
    p = vcpu(m, hexadecimal(m, lead(p, VCPU_ID_TEXT)))
    p = hexadecimal(m, label(p, HV_TIMER))
    m[r + A] = m[VALUE]
    return end(p)
