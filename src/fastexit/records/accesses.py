"""The texts of events about what a guest reads and writes: MSRs, ports, memory, registers. All of it is compiled.

As in exits.py: address and row in, the address of the line end out, or 0.
"""

from __future__ import annotations

from fastexit.jit.declare import kernel
from fastexit.records.parts import COLON_TEXT, COMMA_TEXT, EQUALS, READ, VCPU_TEXT, WRITE, A, B, C, D, vcpu
from fastexit.records.tokens import ONE, VALUE, ZERO, blank, decimal, end, hexadecimal, label, lead, literal, rest, text

A0 = text(b"a0")
A1 = text(b"a1")
A2 = text(b"a2")
A3 = text(b"a3")
AT = text(b"at")
CNT = text(b"cnt")
CODE = text(b"code")
COUNT = text(b"count")
CR_READ = text(b"cr_read")
CR_WRITE = text(b"cr_write")
DOTS = text(b"(...)")
ENTERING = text(b"entering")
FAST = text(b"fast")
FUNC = text(b"func")
GP = text(b"(#GP)")
GPA = text(b"gpa")
IDX = text(b"idx")
IN = text(b"in")
LEAVING = text(b"leaving")
LEN = text(b"len")
MMIO = text(b"mmio")
MSR_READ = text(b"msr_read")
MSR_WRITE_1 = text(b"msr_writ")
MSR_WRITE_2 = text(b"e")
NR = text(b"nr")
OUT = text(b"out")
PIO_READ = text(b"pio_read")
PIO_WRITE_1 = text(b"pio_writ")
PIO_WRITE_2 = text(b"e")
REP_CNT = text(b"rep_cnt")
SIZE = text(b"size")
SLOW = text(b"slow")
SMBASE = text(b"smbase")
SMM = text(b"SMM")
UNSATISFIED_1 = text(b"unsatisf")
UNSATISFIED_2 = text(b"ied-")
VAL = text(b"val")
VAR_CNT = text(b"var_cnt")


@kernel("u8(words, u8, u8)")
def msr(m, p, r):
    """kvm_msr."""
    q = blank(literal(literal(p, MSR_WRITE_1), MSR_WRITE_2))
    m[r + C] = ONE if q else ZERO
    p = hexadecimal(m, q if q else lead(p, MSR_READ))
    m[r + A] = m[VALUE]
    p = hexadecimal(m, label(p, EQUALS))
    if p == ZERO:
        return ZERO
    m[r + B] = m[VALUE]
    q = literal(blank(p), GP)
    if q:
        m[r + D] = ONE
        p = q
    return end(p)


@kernel("u8(words, u8, u8)")
def pio(m, p, r):
    """kvm_pio, which had no value at first."""
    q = blank(literal(literal(p, PIO_WRITE_1), PIO_WRITE_2))
    m[r + C] = ONE if q else ZERO
    p = lead(q if q else lead(p, PIO_READ), AT)
    p = hexadecimal(m, p)
    m[r + A] = m[VALUE]
    p = decimal(m, label(p, SIZE))
    m[r + D] = m[VALUE]
    p = decimal(m, label(p, COUNT))
    if p == ZERO:
        return ZERO
    q = label(p, VAL)
    if q:
        p = hexadecimal(m, q)
        if p == ZERO:
            return ZERO
        m[r + B] = m[VALUE]
    q = literal(blank(p), DOTS)
    return end(q if q else p)


@kernel("u8(words, u8, u8)")
def mmio(m, p, r):
    """kvm_mmio."""
    p = lead(p, MMIO)
    q = lead(p, WRITE)
    m[r + C] = ONE if q else ZERO
    if q == ZERO:
        q = literal(literal(p, UNSATISFIED_1), UNSATISFIED_2)
        q = lead(q if q else p, READ)
    p = decimal(m, lead(q, LEN))
    m[r + D] = m[VALUE]
    p = hexadecimal(m, label(p, GPA))
    m[r + A] = m[VALUE]
    p = hexadecimal(m, label(p, VAL))
    m[r + B] = m[VALUE]
    return end(p)


@kernel("u8(words, u8, u8)")
def fast_mmio(m, p, r):
    """kvm_fast_mmio: a write that an eventfd takes."""
    p = hexadecimal(m, lead(lead(lead(lead(p, FAST), MMIO), AT), GPA))
    m[r + A] = m[VALUE]
    m[r + C] = ONE
    return end(p)


@kernel("u8(words, u8, u8)")
def hypercall(m, p, r):
    """kvm_hypercall."""
    p = hexadecimal(m, lead(p, NR))
    m[r + A] = m[VALUE]
    p = hexadecimal(m, label(p, A0))
    m[r + B] = m[VALUE]
    p = hexadecimal(m, label(p, A1))
    m[r + C] = m[VALUE]
    p = hexadecimal(m, label(p, A2))
    m[r + D] = m[VALUE]
    return end(hexadecimal(m, label(p, A3)))


@kernel("u8(words, u8, u8)")
def hv_hypercall(m, p, r):
    """kvm_hv_hypercall, before and after variable headers."""
    p = hexadecimal(m, lead(p, CODE))
    m[r + A] = m[VALUE]
    p = blank(p)
    q = literal(p, FAST)
    m[r + D] = ONE if q else ZERO
    p = blank(q if q else literal(p, SLOW))
    q = hexadecimal(m, lead(p, VAR_CNT))
    p = lead(blank(q), REP_CNT) if q else lead(p, CNT)
    p = hexadecimal(m, p)
    p = hexadecimal(m, label(p, IDX))
    p = hexadecimal(m, label(p, IN))
    m[r + B] = m[VALUE]
    p = hexadecimal(m, label(p, OUT))
    m[r + C] = m[VALUE]
    return end(p)


@kernel("u8(words, u8, u8)")
def cpuid(m, p, r):
    """kvm_cpuid."""
    p = hexadecimal(m, lead(p, FUNC))
    m[r + A] = m[VALUE]
    q = label(p, IDX)
    if q:
        p = hexadecimal(m, q)
        m[r + B] = m[VALUE]
    return rest(p)


@kernel("u8(words, u8, u8)")
def control_register(m, p, r):
    """kvm_cr."""
    q = lead(p, CR_WRITE)
    m[r + C] = ONE if q else ZERO
    p = hexadecimal(m, q if q else lead(p, CR_READ))
    m[r + A] = m[VALUE]
    p = hexadecimal(m, label(p, EQUALS))
    m[r + B] = m[VALUE]
    return end(p)


@kernel("u8(words, u8, u8)")
def smm(m, p, r):
    """kvm_smm_transition and kvm_enter_smm."""
    p = blank(literal(vcpu(m, decimal(m, lead(p, VCPU_TEXT))), COLON_TEXT))
    q = lead(p, ENTERING)
    m[r + A] = ONE if q else ZERO
    p = blank(literal(literal(q if q else lead(p, LEAVING), SMM), COMMA_TEXT))
    return end(hexadecimal(m, lead(p, SMBASE)))
