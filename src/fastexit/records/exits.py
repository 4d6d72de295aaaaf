"""The texts of events about exits, entries, levels of nesting and a vCPU that sleeps. All of it is compiled.

Each kernel takes the address behind an event's name and the index of the row to fill, and gives the address of the line
end, or 0: the text says something else, or a name in it is not known yet (block.MISSED_LENGTH). Forms are those of
arch/x86/kvm/trace.h and include/trace/events/kvm.h from 2.6.36 to 7.3, and what perf and trace-cmd make of them.
"""

from __future__ import annotations

from fastexit.jit.bytesaddressed import load_byte
from fastexit.jit.declare import kernel
from fastexit.records.parts import (
    COLON_TEXT,
    COMMA_TEXT,
    EVENT_NAME,
    NAME,
    OPENING,
    PARENTHESIS,
    VCPU_TEXT,
    WORD32,
    A,
    B,
    C,
    D,
    half,
    name,
    named_vcpu,
    torn,
    vcpu,
)
from fastexit.records.tokens import (
    CLASSES,
    DARK,
    DIGIT,
    LONGEST_NAME,
    ONE,
    SIXTEEN,
    VALUE,
    WORDLIKE,
    ZERO,
    blank,
    decimal,
    end,
    hexadecimal,
    label,
    lead,
    literal,
    rest,
    signed,
    skip,
    text,
    word,
)

ADDRESS = text(b"address")
ERROR_CODE_1 = text(b"error_co")
ERROR_CODE_2 = text(b"de")
GROW = text(b"grow")
HALT_POLL_1 = text(b"halt_pol")
HALT_POLL_2 = text(b"l_ns")
INFO = text(b"info")
INFO1 = text(b"info1")
INFO2 = text(b"info2")
INTR_INFO_1 = text(b"intr_inf")
INTR_INFO_2 = text(b"o")
INVALID = text(b"invalid")
NS = text(b"ns")
POLL = text(b"poll")
POLLING = text(b"polling")
REASON = text(b"reason")
RIP = text(b"rip")
SHRINK = text(b"shrink")
TIME = text(b"time")
VALID = text(b"valid")
WAIT = text(b"wait")


@kernel("u8(words, u8, u8)")
def exit_(m, p, r):
    """kvm_exit. A reason is everything up to the rip: VMX says more than one word where the entry failed."""
    q = lead(p, VCPU_TEXT)
    if q:
        p = blank(vcpu(m, decimal(m, q)))
    p = lead(p, REASON)
    begin = p
    p = word(m, p)
    if p == ZERO:
        return ZERO
    stop = p
    more = skip(p)
    while more != p and m[CLASSES + load_byte(more)] & DARK and lead(more, RIP) == ZERO:
        p = word(m, more)
        stop = p
        more = skip(p)
    if stop - begin > LONGEST_NAME or torn(begin, stop) or name(m, begin, stop) == ZERO:
        return ZERO
    if more == p or lead(more, RIP) == ZERO:
        return end(p)
    p = hexadecimal(m, lead(more, RIP))
    if p == ZERO:
        return ZERO
    m[r + A] = m[VALUE]
    q = label(p, INFO)
    if q:
        p = hexadecimal(m, q)
        if p == ZERO:
            return ZERO
        m[r + B] = m[VALUE]
        q = blank(p)
        if q and m[CLASSES + load_byte(q)] & DIGIT < SIXTEEN:
            p = hexadecimal(m, q)
            m[r + C] = m[VALUE]
        return rest(p)
    q = label(p, INFO1)
    if q == ZERO:
        return rest(p)
    p = hexadecimal(m, q)
    if p == ZERO:
        return ZERO
    m[r + B] = m[VALUE]
    q = label(p, INFO2)
    if q == ZERO:
        return rest(p)
    p = hexadecimal(m, q)
    if p == ZERO:
        return ZERO
    m[r + C] = m[VALUE]
    q = blank(literal(literal(blank(p), INTR_INFO_1), INTR_INFO_2))
    if q == ZERO:
        return rest(p)
    p = half(m, hexadecimal(m, q))
    if p == ZERO:
        return ZERO
    m[r + D] = m[VALUE]
    q = blank(literal(literal(blank(p), ERROR_CODE_1), ERROR_CODE_2))
    if q == ZERO:
        return rest(p)
    p = half(m, hexadecimal(m, q))
    if p:
        m[r + D] = m[r + D] | m[VALUE] << WORD32
    return rest(p)


@kernel("u8(words, u8, u8)")
def enter(m, p, r):
    """kvm_entry."""
    p = vcpu(m, decimal(m, lead(p, VCPU_TEXT)))
    if p == ZERO:
        return ZERO
    q = literal(p, COMMA_TEXT)
    q = label(q if q else p, RIP)
    if q:
        p = hexadecimal(m, q)
        m[r + A] = m[VALUE]
    return rest(p)


@kernel("u8(words, u8, u8)")
def nested(m, p, r):
    """kvm_nested_vmexit and its kin: what is asked for is the reason, wherever it stands."""
    named_vcpu(m, p)
    stop = rest(p)
    if stop == ZERO:
        return ZERO
    before = ZERO
    while p < stop:
        q = ZERO if before & WORDLIKE else literal(p, REASON)
        if q:
            after = literal(q, COLON_TEXT)
            begin = blank(after if after else q)
            q = word(m, begin)
            if q:
                return stop if name(m, begin, q) else ZERO
        before = m[CLASSES + load_byte(p)]
        p += ONE
    return stop


@kernel("u8(words, u8, u8)")
def userspace(m, p, r):
    """kvm_userspace_exit."""
    begin = lead(p, REASON)
    stop = word(m, begin)
    p = stop
    q = literal(blank(p), OPENING)
    if q:
        p = literal(signed(m, q), PARENTHESIS)
    p = end(p)
    if p == ZERO or name(m, begin, stop) == ZERO:
        return ZERO
    return p


@kernel("u8(words, u8, u8)")
def wakeup(m, p, r):
    """kvm_vcpu_wakeup."""
    q = lead(p, WAIT)
    m[r + B] = ONE if q else ZERO
    p = decimal(m, lead(q if q else lead(p, POLL), TIME))
    m[r + A] = m[VALUE]
    p = literal(blank(p), NS)
    q = lead(blank(literal(p, COMMA_TEXT)), POLLING)
    if q:
        p = literal(q, VALID)
        m[r + C] = ONE if p else ZERO
        p = p if p else literal(q, INVALID)
    return end(p)


@kernel("u8(words, u8, u8)")
def halt_poll(m, p, r):
    """kvm_halt_poll_ns."""
    p = vcpu(m, decimal(m, lead(p, VCPU_TEXT)))
    p = literal(literal(blank(literal(p, COLON_TEXT)), HALT_POLL_1), HALT_POLL_2)
    p = decimal(m, blank(p))
    m[r + A] = m[VALUE]
    p = literal(blank(p), OPENING)
    q = lead(p, GROW)
    m[r + C] = ONE if q else ZERO
    p = decimal(m, q if q else lead(p, SHRINK))
    m[r + B] = m[VALUE]
    return end(literal(p, PARENTHESIS))


@kernel("u8(words, u8, u8)")
def page_fault(m, p, r):
    """kvm_page_fault."""
    q = lead(p, VCPU_TEXT)
    if q:
        p = blank(hexadecimal(m, label(vcpu(m, decimal(m, q)), RIP)))
    p = hexadecimal(m, lead(p, ADDRESS))
    m[r + A] = m[VALUE]
    p = hexadecimal(m, blank(literal(literal(blank(p), ERROR_CODE_1), ERROR_CODE_2)))
    m[r + B] = m[VALUE]
    return end(p)


@kernel("u8(words, u8, u8)")
def generic(m, p, r):
    """Any other event, by its name and the vCPU in front."""
    m[NAME] = m[EVENT_NAME]
    named_vcpu(m, p)
    return rest(p)
