"""What texts of several events have in common: names, vCPUs, delivery modes. All of it is compiled."""

from __future__ import annotations

import numpy as np

from fastexit.jit.bytesaddressed import load_byte
from fastexit.jit.declare import kernel
from fastexit.records import block
from fastexit.records.tokens import (
    COLON,
    EIGHT,
    FOUR,
    LONGEST_NAME,
    ONE,
    THREE,
    TWO,
    VALUE,
    ZERO,
    blank,
    decimal,
    end,
    entry,
    literal,
    text,
)

U = np.uint64
A = U(1)
B = U(2)
C = U(3)
COALESCED_1 = text(b"(coalesc")
COALESCED_2 = text(b"ed)")
COLON_TEXT = text(b":")
COMMA_TEXT = text(b",")
D = U(4)
EQUALS = text(b"=")
EVENT_NAME = U(block.EVENT_NAME)
EXTINT = text(b"ExtINT|")
FIXED = text(b"Fixed|")
HIGHEST_VCPU = U(32767)
HIGHEST_VECTOR = U(255)
INIT = text(b"INIT|")
LOW_PRIORITY = text(b"LowPrio|")
NAME = U(block.NAME)
NAME_INDEX = U(block.NAME_INDEX)
NMI = text(b"NMI|")
OPENING = text(b"(")
PARENTHESIS = text(b")")
READ = text(b"read")
REINJECTED_1 = text(b"[reinjec")
REINJECTED_2 = text(b"ted]")
RES3 = text(b"Res3|")
SIPI = text(b"SIPI|")
SMI = text(b"SMI|")
TORN = text(b": kvm_")
U = np.uint64
VCPU = U(block.VCPU)
VCPU_ID = text(b"_id")
VCPU_TEXT = text(b"vcpu")
WORD32 = U(32)
WRITE = text(b"write")


@kernel("u8(words, u8, u8)")
def name(m, begin, stop):
    """Make the bytes from begin to stop the row's name. begin is not 0 where stop is not."""
    if stop == ZERO or stop - begin > LONGEST_NAME:
        return ZERO
    e = entry(m, begin, stop - begin)
    if e == ZERO:
        return ZERO
    m[NAME] = m[e + NAME_INDEX]
    return stop


@kernel("u8(words, u8)")
def vcpu(m, p):
    """Make the number just read the row's vCPU, which has to fit."""
    if p == ZERO or m[VALUE] > HIGHEST_VCPU:
        return ZERO
    m[VCPU] = m[VALUE]
    return p


@kernel("u8(words, u8)")
def small(m, p):
    """The number just read has to be a vector's."""
    return ZERO if p == ZERO or m[VALUE] > HIGHEST_VECTOR else p


@kernel("u8(words, u8)")
def half(m, p):
    """The number just read has to fit 32 bits."""
    return ZERO if p == ZERO or m[VALUE] >> WORD32 else p


@kernel("u8(words, u8)")
def named_vcpu(m, p):
    """The vCPU that a text begins with, as far as it does; nothing else is asked of it."""
    q = literal(p, VCPU_TEXT)
    if q == ZERO:
        return ZERO
    after = literal(q, VCPU_ID)
    if after:
        q = after
    after = literal(q, EQUALS)
    q = after if after else blank(q)
    q = decimal(m, q)
    if q and m[VALUE] <= HIGHEST_VCPU:
        m[VCPU] = m[VALUE]
    return ZERO


@kernel("u8(words, u8)")
def mode(m, p):
    """A delivery mode and the bar behind it; its bits as in the ICR."""
    q = literal(p, FIXED)
    if q:
        m[VALUE] = ZERO
        return q
    q = literal(p, LOW_PRIORITY)
    if q:
        m[VALUE] = ONE << EIGHT
        return q
    q = literal(p, SMI)
    if q:
        m[VALUE] = TWO << EIGHT
        return q
    q = literal(p, RES3)
    if q:
        m[VALUE] = THREE << EIGHT
        return q
    q = literal(p, NMI)
    if q:
        m[VALUE] = FOUR << EIGHT
        return q
    q = literal(p, INIT)
    if q:
        m[VALUE] = U(5) << EIGHT
        return q
    q = literal(p, SIPI)
    if q:
        m[VALUE] = U(6) << EIGHT
        return q
    q = literal(p, EXTINT)
    m[VALUE] = U(7) << EIGHT
    return q


@kernel("u8(u8, u8)")
def torn(begin, stop):
    """1 where a second event of kvm begins in these bytes."""
    while begin < stop:
        if load_byte(begin) == COLON and literal(begin, TORN):
            return ONE
        begin += ONE
    return ZERO


@kernel("u8(words, u8, u8)")
def coalesced(m, p, r):
    """The end of a line that may say so."""
    q = literal(literal(blank(p), COALESCED_1), COALESCED_2)
    m[r + D] = ONE if q else ZERO
    return end(q if q else p)


@kernel("u8(words, u8, u8)")
def reinjected(m, p, r):
    """The end of a line that may say so."""
    q = literal(literal(blank(p), REINJECTED_1), REINJECTED_2)
    m[r + C] = ONE if q else ZERO
    return end(q if q else p)
