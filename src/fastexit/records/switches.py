"""sched_switch, in the two ways in which it is printed. All of it is compiled."""

from __future__ import annotations

import numpy as np

from fastexit.jit.bytesaddressed import load_byte
from fastexit.jit.declare import kernel
from fastexit.records.parts import (
    COLON_TEXT,
    A,
    B,
    C,
)
from fastexit.records.tokens import (
    ONE,
    VALUE,
    ZERO,
    blank,
    decimal,
    end,
    label,
    literal,
    rest,
    signed,
    text,
    word,
)

U = np.uint64
ARROW = text(b"==>")
BRACKET = text(b"[")
BRACKET_END = text(b"]")
BYTE_R = U(ord("R"))
NEXT_1 = text(b"next_")
NEXT_COMM = text(b"comm=")
NEXT_PID = text(b"pid=")
NEXT_PRIO = text(b"prio=")
PREV_1 = text(b"prev_")
PREV_COMM = text(b"comm=")
PREV_PID = text(b"pid=")
PREV_PRIO = text(b"prio=")
PREV_STATE = text(b"state=")
SAVED = U(13)


@kernel("u8(words, u8)")
def priority(m, p):
    """``:123 [120]``; the first number into SAVED."""
    p = decimal(m, literal(p, COLON_TEXT))
    m[SAVED] = m[VALUE]
    return literal(signed(m, literal(blank(p), BRACKET)), BRACKET_END)


@kernel("u8(words, u8, u8, u8)")
def switch_short(m, p, stop, r):
    """As trace-cmd and perf print it."""
    after = ZERO
    while p < stop:
        q = priority(m, p)
        if q:
            pid = m[SAVED]
            q = blank(q)
            runs = ONE if q and load_byte(q) == BYTE_R else ZERO
            q = label(word(m, q), ARROW)
            if q:
                after = q
                m[r + A] = pid
                m[r + C] = runs
        p += ONE
    found = ZERO
    while after and after < stop:
        q = end(priority(m, after))
        if q:
            found = q
            m[r + B] = m[SAVED]
        after += ONE
    return found


@kernel("u8(words, u8, u8, u8)")
def switch_fields(m, p, stop, r):
    """As the kernel prints it."""
    after = ZERO
    while p < stop:
        p += ONE
        q = blank(p)
        if q == ZERO:
            continue
        p = q - ONE
        q = literal(literal(q, PREV_1), PREV_PID)
        if q:
            q = decimal(m, q)
            pid = m[VALUE]
            q = signed(m, literal(literal(blank(q), PREV_1), PREV_PRIO))
            q = literal(literal(blank(q), PREV_1), PREV_STATE)
            if q:
                runs = ONE if load_byte(q) == BYTE_R else ZERO
                q = literal(literal(label(word(m, q), ARROW), NEXT_1), NEXT_COMM)
                if q:
                    after = q
                    m[r + A] = pid
                    m[r + C] = runs
    found = ZERO
    while after and after < stop:
        q = blank(after)
        after = q if q else after + ONE
        q = decimal(m, literal(literal(q, NEXT_1), NEXT_PID))
        if q:
            pid = m[VALUE]
            q = end(signed(m, literal(literal(blank(q), NEXT_1), NEXT_PRIO)))
            if q:
                found = q
                m[r + B] = pid
    return found


@kernel("u8(words, u8, u8)")
def switch(m, p, r):
    """sched_switch. Names of threads may have anything in them, so the last place that fits is taken."""
    stop = rest(p)
    if stop == ZERO:
        return ZERO
    if literal(literal(p, PREV_1), PREV_COMM):
        return switch_fields(m, p, stop, r)
    return switch_short(m, p, stop, r)
