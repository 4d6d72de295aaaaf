"""What the text of an event is made of: literals, blanks, numbers, words. All of it is compiled.

Each kernel takes the address at which to look and gives the one behind what it found, or 0 where the text says
something else; given 0 it gives 0, so a whole line can be asked for and looked at once. A text ends with a line end and
zeroes (block.PADDING): nothing that is looked for goes beyond a line end, so nothing is read that is not the text's.
"""

from __future__ import annotations

import numpy as np

from fastexit.jit.bytesaddressed import load_byte, load_word
from fastexit.jit.declare import ctz, kernel, msb
from fastexit.records import block

U = np.uint64
ZERO = U(0)
ONE = U(1)
TWO = U(2)
THREE = U(3)
FOUR = U(4)
EIGHT = U(8)
TEN = U(10)
SIXTEEN = U(16)
SIXTY_FOUR = U(64)
FULL = U(0xFFFF_FFFF_FFFF_FFFF)
LOW = U(0x0101_0101_0101_0101)
HIGH = U(0x8080_8080_8080_8080)

TAB = U(ord("\t"))
NEWLINE = U(ord("\n"))
RETURN = U(ord("\r"))
SPACE = U(ord(" "))
MINUS = U(ord("-"))
DIGIT_ZERO = U(ord("0"))
NINE = U(9)
COLON = U(ord(":"))
LETTER_X = U(ord("x"))
OPEN = U(ord("("))
CLOSE = U(ord(")"))
NEWLINES = U(0x0A0A_0A0A_0A0A_0A0A)
COLONS = U(0x3A3A_3A3A_3A3A_3A3A)

VALUE = U(block.VALUE)
CLASSES = U(block.CLASSES)
DIGIT = U(31)
WORDLIKE = U(block.WORDLIKE)
DARK = U(block.DARK)
MISSED = U(block.MISSED)
MISSED_LENGTH = U(block.MISSED_LENGTH)
MISSED_SLOT = U(block.MISSED_SLOT)
NAMES = U(block.NAMES)
NAME_MASK = U(block.NAME_ENTRIES - 1)
NAME_SHIFT = U(block.NAME_WORDS.bit_length() - 1)
NAME_BYTES = U(block.NAME_BYTES)
LONGEST_NAME = U(block.LONGEST_NAME)
MULTIPLIER = U(0x9E37_79B9_7F4A_7C15)
FOLD = U(29)
TOP_DIGIT = U(60)
MOST_TENTHS = U((1 << 64) // 10)


def text(literal: bytes) -> np.uint64:
    """A literal of 1 to 8 bytes, as the word that they are in a text."""
    return U(int.from_bytes(literal, "little"))


KVM_BEGINS = text(b" kvm_")
TORN = text(b": kvm_")


@kernel("u8(u8, u8)")
def literal(p, what):
    """Exactly these bytes."""
    if p == ZERO:
        return ZERO
    size = (msb(what) >> THREE) + ONE
    if load_word(p) & FULL >> (SIXTY_FOUR - (size << THREE)) != what:
        return ZERO
    return p + size


@kernel("u8(u8)")
def skip(p):
    """Blanks, if there are any. p is not 0."""
    c = load_byte(p)
    while c == SPACE or c == TAB:
        p += ONE
        c = load_byte(p)
    return p


@kernel("u8(u8)")
def blank(p):
    """One blank or more."""
    if p == ZERO:
        return ZERO
    c = load_byte(p)
    if c != SPACE and c != TAB:
        return ZERO
    return skip(p + ONE)


@kernel("u8(u8, u8)")
def lead(p, what):
    """A literal and blanks."""
    return blank(literal(p, what))


@kernel("u8(u8, u8)")
def label(p, what):
    """A literal between blanks, as what stands in front of a number."""
    return blank(literal(blank(p), what))


@kernel("u8(words, u8)")
def hexadecimal(m, p):
    """A hexadecimal number of up to 64 bits, with 0x or without."""
    if p == ZERO:
        return ZERO
    if load_byte(p) == DIGIT_ZERO and load_byte(p + ONE) == LETTER_X:
        p += TWO
    begin = p
    value = ZERO
    c = m[CLASSES + load_byte(p)]
    while c & DIGIT < SIXTEEN:
        if value >> TOP_DIGIT:
            return ZERO
        value = value << FOUR | c & DIGIT
        p += ONE
        c = m[CLASSES + load_byte(p)]
    if p == begin or c & WORDLIKE:
        return ZERO
    m[VALUE] = value
    return p


@kernel("u8(words, u8)")
def decimal(m, p):
    """A decimal number of up to 64 bits."""
    if p == ZERO:
        return ZERO
    begin = p
    value = ZERO
    digit = load_byte(p) - DIGIT_ZERO
    while digit <= NINE:
        if value > MOST_TENTHS or value * TEN > FULL - digit:
            return ZERO
        value = value * TEN + digit
        p += ONE
        digit = load_byte(p) - DIGIT_ZERO
    if p == begin or m[CLASSES + load_byte(p)] & WORDLIKE:
        return ZERO
    m[VALUE] = value
    return p


@kernel("u8(words, u8)")
def signed(m, p):
    """A decimal number that may be negative, in two's complement."""
    if p == ZERO:
        return ZERO
    if load_byte(p) != MINUS:
        return decimal(m, p)
    p = decimal(m, p + ONE)
    if p == ZERO or m[VALUE] > HIGHEST:
        return ZERO
    m[VALUE] = ZERO - m[VALUE]
    return p


HIGHEST = U(1 << 63)


@kernel("u8(words, u8)")
def word(m, p):
    """Anything that is neither blank nor a control character."""
    if p == ZERO:
        return ZERO
    begin = p
    while m[CLASSES + load_byte(p)] & DARK:
        p += ONE
    return ZERO if p == begin else p


@kernel("u8(u8)")
def end(p):
    """The line end, with blanks before it."""
    if p == ZERO:
        return ZERO
    c = load_byte(p)
    while c == SPACE or c == TAB or c == RETURN:
        p += ONE
        c = load_byte(p)
    return p if c == NEWLINE else ZERO


@kernel("u8(u8)")
def line_end(p):
    """The line end from p on."""
    while True:
        found = load_word(p) ^ NEWLINES
        found = (found - LOW) & ~found & HIGH
        if found:
            return p + (ctz(found) >> THREE)
        p += EIGHT


@kernel("u8(u8)")
def rest(p):
    """Anything up to the line end but zero bytes and a second event of kvm, as in lines that two writers tore."""
    if p == ZERO:
        return ZERO
    while True:
        w = load_word(p)
        ends = w ^ NEWLINES
        colons = w ^ COLONS
        found = ((ends - LOW) & ~ends | (colons - LOW) & ~colons | (w - LOW) & ~w) & HIGH
        if found == ZERO:
            p += EIGHT
            continue
        p += ctz(found) >> THREE
        c = load_byte(p)
        if c == NEWLINE:
            return p
        if c == ZERO or literal(p, TORN):
            return ZERO
        p += ONE


@kernel("u8(u8)")
def without_kvm(p):
    """As rest, of a text that has no event's name in front: no kvm event may stand anywhere in it."""
    while True:
        c = load_byte(p)
        if c == NEWLINE:
            return p
        if c == ZERO or literal(p, KVM_BEGINS):
            return ZERO
        p += ONE


@kernel("u8(u8, u8)")
def hashed(begin, size):
    """A hash of bytes, eight at a time; the text has room to be read beyond its end."""
    h = size
    i = ZERO
    while i < size:
        w = load_word(begin + i)
        if size - i < EIGHT:
            w = w & FULL >> (SIXTY_FOUR - (size - i << THREE))
        h = (h ^ w) * MULTIPLIER
        h = h ^ h >> FOLD
        i += EIGHT
    return h


@kernel("u8(words, u8, u8)")
def entry(m, begin, size):
    """The entry of a name of 1 to LONGEST_NAME bytes, or 0: MISSED then tells Python which."""
    h = hashed(begin, size)
    slot = h & NAME_MASK
    while True:
        e = NAMES + (slot << NAME_SHIFT)
        if m[e] == ZERO:
            m[MISSED] = begin
            m[MISSED_LENGTH] = size
            m[MISSED_SLOT] = e
            return ZERO
        if m[e] == size:
            i = ZERO
            while i < size:
                w = load_word(begin + i)
                if size - i < EIGHT:
                    w = w & FULL >> (SIXTY_FOUR - (size - i << THREE))
                if w != m[e + NAME_BYTES + (i >> THREE)]:
                    break
                i += EIGHT
            if i >= size:
                return e
        slot = (slot + ONE) & NAME_MASK
