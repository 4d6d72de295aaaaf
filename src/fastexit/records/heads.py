"""What stands before an event: its thread, CPU, context and time. All of it is compiled."""

from __future__ import annotations

import numpy as np

from fastexit.jit.bytesaddressed import load_byte, load_word
from fastexit.jit.declare import kernel
from fastexit.records import block
from fastexit.records.columns import Flag
from fastexit.records.tokens import (
    CLASSES,
    COLON,
    DIGIT_ZERO,
    EIGHT,
    FULL,
    MISSED,
    MISSED_LENGTH,
    MISSED_SLOT,
    NEWLINE,
    NINE,
    ONE,
    SIXTY_FOUR,
    TEN,
    THREE,
    TWO,
    VALUE,
    ZERO,
    blank,
    hashed,
    skip,
)

U = np.uint64
HEADS, HEAD_MASK = U(block.HEADS), U(block.HEAD_ENTRIES - 1)
HEAD_SHIFT = U(block.HEAD_WORDS.bit_length() - 1)
HEAD_THREAD, HEAD_BYTES, LONGEST_HEAD = U(block.HEAD_THREAD), U(block.HEAD_BYTES), U(block.LONGEST_HEAD)
FLAGLIKE = U(block.FLAGLIKE)
BRACKET, BRACKET_END, POINT = U(ord("[")), U(ord("]")), U(ord("."))
BRACKETS = U(0x5B5B_5B5B_5B5B_5B5B)
NEWLINES = U(0x0A0A_0A0A_0A0A_0A0A)
LOW, HIGH = U(0x0101_0101_0101_0101), U(0x8080_8080_8080_8080)
HIGHEST_CPU = U(0x7FFF)
LEAST_FLAGS, MOST_FLAGS = U(4), U(8)
LOWER_D, UPPER_D = U(ord("d")), U(ord("D"))
LOWER_H, UPPER_H, LOWER_S, LOWER_Z, UPPER_Z = (U(ord(c)) for c in "hHszZ")
TOLD, IRQS_OFF, NEED_RESCHED, HARDIRQ = (U(flag.value) for flag in Flag)
SECOND = U(1_000_000_000)
MOST_SECONDS = U(((1 << 63) - 1) // 1_000_000_000 - 1)


@kernel("u8(words, u8)")
def next_bracket(m, p):
    """The next opening bracket, or the line end."""
    while True:
        w = load_word(p)
        ends = w ^ NEWLINES
        opens = w ^ BRACKETS
        found = ((ends - LOW) & ~ends | (opens - LOW) & ~opens) & HIGH
        if found:
            break
        p += EIGHT
    c = load_byte(p)
    while c != BRACKET and c != NEWLINE:
        p += ONE
        c = load_byte(p)
    return p


@kernel("u8(words, u8)")
def cpu(m, p):
    """``[003]``; p is at the bracket. The result is behind it and its blanks, or 0."""
    p += ONE
    begin = p
    value = ZERO
    digit = load_byte(p) - DIGIT_ZERO
    while digit <= NINE and value <= HIGHEST_CPU:
        value = value * TEN + digit
        p += ONE
        digit = load_byte(p) - DIGIT_ZERO
    if p == begin or load_byte(p) != BRACKET_END or value > HIGHEST_CPU:
        return ZERO
    m[VALUE] = value
    return skip(p + ONE)


@kernel("u8(words, u8)")
def context(m, p):
    """The characters that ftrace puts before a time, if they are there: their bits are the value."""
    m[VALUE] = ZERO
    begin = p
    while m[CLASSES + load_byte(p)] & FLAGLIKE and p - begin <= MOST_FLAGS:
        p += ONE
    q = blank(p)
    if q == ZERO or p - begin < LEAST_FLAGS or p - begin > MOST_FLAGS:
        return begin
    flags = TOLD
    c = load_byte(begin)
    if c == LOWER_D or c == UPPER_D:
        flags |= IRQS_OFF
    if load_byte(begin + ONE) != POINT:
        flags |= NEED_RESCHED
    begin += TWO
    while begin < p:
        c = load_byte(begin)
        if c == LOWER_H or c == UPPER_H or c == LOWER_S or c == LOWER_Z or c == UPPER_Z:
            flags |= HARDIRQ
        begin += ONE
    m[VALUE] = flags
    return q


@kernel("u8(words, u8)")
def time(m, p):
    """``secs.frac:`` and blanks; the value is in ns."""
    begin = p
    seconds = ZERO
    digit = load_byte(p) - DIGIT_ZERO
    while digit <= NINE and seconds <= MOST_SECONDS:
        seconds = seconds * TEN + digit
        p += ONE
        digit = load_byte(p) - DIGIT_ZERO
    if p == begin or load_byte(p) != POINT or seconds > MOST_SECONDS:
        return ZERO
    p += ONE
    begin = p
    fraction = ZERO
    digit = load_byte(p) - DIGIT_ZERO
    while digit <= NINE and p - begin < NINE:
        fraction = fraction * TEN + digit
        p += ONE
        digit = load_byte(p) - DIGIT_ZERO
    size = p - begin
    if size == ZERO or load_byte(p) != COLON:
        return ZERO
    while size < NINE:
        fraction *= TEN
        size += ONE
    m[VALUE] = seconds * SECOND + fraction
    return blank(p + ONE)


@kernel("u8(words, u8, u8)")
def head(m, begin, size):
    """The entry of what stands before the CPU, or 0: MISSED then tells Python which."""
    h = hashed(begin, size)
    slot = h & HEAD_MASK
    while True:
        e = HEADS + (slot << HEAD_SHIFT)
        if m[e] == ZERO:
            m[MISSED] = begin
            m[MISSED_LENGTH] = size
            m[MISSED_SLOT] = e
            return ZERO
        if m[e] == size and same_head(m, begin, size, e):
            return e
        slot = (slot + ONE) & HEAD_MASK


@kernel("u8(words, u8, u8, u8)")
def same_head(m, begin, size, e):
    """1 where these bytes are an entry's, which are as many."""
    i = ZERO
    while i < size:
        w = load_word(begin + i)
        if size - i < EIGHT:
            w = w & FULL >> (SIXTY_FOUR - (size - i << THREE))
        if w != m[e + HEAD_BYTES + (i >> THREE)]:
            return ZERO
        i += EIGHT
    return ONE
