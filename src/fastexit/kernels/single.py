"""The door for single exits in one compiled call: what Machine(dispatcher="compiled") calls.

Each exit goes through loop.py, as in a batch. What has no compiled handler, or one that an embedder replaced, what runs
L2, and an access that no CPU makes is UNHANDLED, with nothing touched: the caller's Python does it, or says what is
wrong with it.
"""

from ..jit.declare import inlined, kernel
from . import typed as k
from . import unicast
from .batch import outside
from .loop import behind_unicast, find_row, handles, run_exit
from .shared import clear_words, own

UNHANDLED = k.CODE_NOT_IN_GUEST


@kernel("u8(words, u8, u8, u8, u8, u8)")
def run(m, v, reason, where, info, value):
    """Any exit: its outcome code, or UNHANDLED.

    ``where`` is the guest-physical address, a hypercall's R8, or else the MSR; ``info`` is a hypercall's RCX.
    """
    row = find_row(m, reason, info)
    if not handles(m, v, row) or outside(m, reason, info, where):
        return UNHANDLED
    op = row & k.ROW_OPERATION
    if op == k.OP_MMIO_WRITE:
        length = info & k.ACCESS_LENGTH
        if value & ~(k.NONE >> (k.U(64) - (length << k.U(3)))):
            return UNHANDLED
    elif op == k.OP_HYPERCALL:
        clear_words(m, k.XMM + v * k.XMM_STRIDE, k.XMM_WORDS)
    elif op != k.OP_MMIO_READ and where > k.LOW32:
        return UNHANDLED
    return run_exit(m, v, row, reason, where, value, info)


@inlined
@kernel("u8(words, u8, u8)")
def short(m, v, code):
    """What unicast.send came to, for Python: the short code, with the target for which something is to be done."""
    accepted = (code >> k.CODE_ACCEPTED_SHIFT) & k.ONE
    told = m[own(m, v) + k.K_TARGETS]
    return _addressed(code, accepted, told) if told else accepted


@inlined
@kernel("u8(words, u8, u8)")
def with_target(m, v, code):
    """An outcome code; CODE_ADDRESSED where there is one target, so that Python finds the outcome with one look."""
    told = m[own(m, v) + k.K_TARGETS]
    accepted = (code & k.CODE_ACCEPTED_NONE) >> k.CODE_ACCEPTED_SHIFT
    if not code & k.CODE_EFFECTS or told >> k.TARGETS_COUNT_SHIFT != k.ONE or accepted > k.ADDRESSED_MOST:
        return code
    return _addressed(code, accepted, told)


@inlined
@kernel("u8(u8, u8, u8)")
def _addressed(code, accepted, told):
    """CODE_ADDRESSED of a code."""
    target = (told & k.LOW16) << k.CODE_ACCEPTED_SHIFT
    return k.CODE_ADDRESSED | (code & ~k.CODE_ACCEPTED_NONE) | target | accepted << k.CODE_MSR_WHY_SHIFT


@kernel("u8(words, u8, u8, u8)")
def wrmsr(m, v, msr, value):
    """A WRMSR: its outcome code, or a short one: outcome.SHORT, CODE_ADDRESSED; or UNHANDLED."""
    if msr == k.MSR_X2APIC_ICR and unicast.possible(m):
        code = unicast.send(m, v, value)
        if code:
            if unicast.again(m, v):
                return short(m, v, code)
            return with_target(m, v, behind_unicast(m, v, code, value))
    svm = m[k.H_CONFIG] & k.CONFIG_SVM
    return with_target(m, v, run(m, v, k.SVM_MSR if svm else k.VMX_MSR_WRITE, msr, k.ONE if svm else k.ZERO, value))
