"""A canonical line of a trace, from bytes to a row; and many of them. All of it is compiled.

``comm-pid [cpu] flags secs.frac: event: body``, with a process behind the pid perhaps and flags or not, or perf's
``comm pid [cpu] secs.frac: kvm:event: body``. A line that says anything else is left to the caller, and nothing of it
is kept.
"""

from __future__ import annotations

import numpy as np

from fastexit.jit.bytesaddressed import load_byte
from fastexit.jit.declare import entry as door
from fastexit.jit.declare import kernel, open_words
from fastexit.records import block
from fastexit.records.block import Why
from fastexit.records.bodies import event
from fastexit.records.heads import context, cpu, head, next_bracket, same_head, time
from fastexit.records.tokens import (
    MISSED_LENGTH,
    MISSED_SLOT,
    NEWLINE,
    ONE,
    SPACE,
    TAB,
    TWO,
    VALUE,
    ZERO,
    end,
    line_end,
)

U = np.uint64
AT, LINE, ROWS, BAD = U(block.AT), U(block.LINE), U(block.ROWS), U(block.BAD)
LAST_HEAD, NAME, VCPU, EVENT_NAME = U(block.LAST_HEAD), U(block.NAME), U(block.VCPU), U(block.EVENT_NAME)
NONE = U(block.NONE)
HEADS, HEAD_MASK = U(block.HEADS), U(block.HEAD_ENTRIES - 1)
HEAD_THREAD, HEAD_BYTES, LONGEST_HEAD = U(block.HEAD_THREAD), U(block.HEAD_BYTES), U(block.LONGEST_HEAD)
BADS, BAD_ENTRIES, BAD_WORDS = U(block.BADS), U(block.BAD_ENTRIES), U(block.BAD_WORDS)
OUT, OUT_ROWS, ROW_SHIFT = U(block.OUT), U(block.OUT_ROWS), U(block.ROW_WORDS.bit_length() - 1)
DONE, FULL_UP, NEW_NAME, NEW_HEAD = (U(why.value) for why in (Why.DONE, Why.FULL, Why.NEW_NAME, Why.NEW_HEAD))
BRACKET, BRACKET_END, POINT = U(ord("[")), U(ord("]")), U(ord("."))
LINE_THREAD, CPU_SHIFT, VCPU_SHIFT, FLAGS_SHIFT = U(32), U(32), U(48), U(8)
LOW16, LOW32 = U(0xFFFF), U(0xFFFF_FFFF)
A, B, C, D, WHO, WHERE, WHAT = U(1), U(2), U(3), U(4), U(5), U(6), U(7)


@kernel("u8(words, u8, u8)")
def line(m, p, r):
    """One line into one row. The result is its end; 0 where it cannot be read, or not yet (MISSED_LENGTH)."""
    begin = p
    e = m[LAST_HEAD]
    size = m[e]
    if size == ZERO or load_byte(p + size) != BRACKET or same_head(m, p, size, e) == ZERO:
        e = ZERO
        size = ZERO
    p += size
    while True:
        p = next_bracket(m, p)
        if load_byte(p) == NEWLINE:
            return ZERO
        if p != begin and (load_byte(p - ONE) == SPACE or load_byte(p - ONE) == TAB):
            q = cpu(m, p)
            if q:
                where = m[VALUE]
                q = context(m, q)
                flags = m[VALUE]
                q = time(m, q)
                if q and load_byte(q) != NEWLINE:
                    break
        p += ONE
        e = ZERO
    m[r] = m[VALUE]
    if e == ZERO:
        if p - begin > LONGEST_HEAD:
            return ZERO
        e = head(m, begin, p - begin)
        if e == ZERO:
            return ZERO
        m[LAST_HEAD] = e
    m[NAME] = NONE
    m[VCPU] = NONE
    m[r + A] = ZERO
    m[r + B] = ZERO
    m[r + C] = ZERO
    m[r + D] = ZERO
    q = event(m, q, r)
    m[r + WHO] = m[LINE] & LOW32 | m[e + HEAD_THREAD] << LINE_THREAD
    m[r + WHERE] = m[NAME] & LOW32 | where << CPU_SHIFT | m[VCPU] << VCPU_SHIFT
    m[r + WHAT] = m[r + WHAT] | flags << FLAGS_SHIFT
    return q


@kernel("u8(words, u8, u8)")
def lines(m, begin, size):
    """Lines from AT on, until the text ends or Python is asked for something."""
    p = begin + m[AT]
    stop = begin + size
    while p <= stop:  # a last line that is blank begins where the text ends
        if end(p):
            p = end(p) + ONE
            m[LINE] += ONE
            continue
        if m[ROWS] >= OUT_ROWS or m[BAD] >= BAD_ENTRIES:
            m[AT] = p - begin
            return FULL_UP
        m[MISSED_LENGTH] = ZERO
        q = line(m, p, OUT + (m[ROWS] << ROW_SHIFT))
        if q:
            m[ROWS] += ONE
        elif m[MISSED_LENGTH]:
            m[AT] = p - begin
            return NEW_HEAD if m[MISSED_SLOT] >= HEADS else NEW_NAME
        else:
            q = line_end(p)
            b = BADS + m[BAD] * BAD_WORDS
            m[b] = m[LINE]
            m[b + ONE] = p - begin
            m[b + TWO] = q - p
            m[BAD] += ONE
        m[LINE] += ONE
        p = q + ONE
    m[AT] = p - begin
    return DONE


@door
@kernel("u8(u8, u8, u8)")
def scan_lines(handle, begin, size):
    """Scan a text of so many bytes, which block.PADDING more follow, on the block at ``handle``: a Why."""
    return lines(open_words(handle, U(block.WORDS)), begin, size)
