"""The posted-interrupt descriptor: post, and PIR to IRR.

Models: pi_test_and_set_pir/on, vmx_deliver_posted_interrupt, vmx_sync_pir_to_irr, __kvm_apic_update_irr.
Load, put, SN and the wake-up vector are in pi.py.
Spec: SDM vol. 3C "Posted-Interrupt Processing".

The order is the protocol. A sender sets PIR, then ON (a full barrier), then reads mode; the target sets mode
IN_GUEST, then (a full barrier) reads ON. So either the sender sees the guest running and notifies, or the target sees
ON before it enters. The target clears ON before it reads PIR: the other way round a vector set in between would find
ON set, stay silent and be lost.
"""

from ..jit.atomics import load_acquire
from ..jit.declare import kernel, msb
from . import typed as k
from .shared import (
    clear_bits_first,
    clear_word_bits,
    hot,
    kick,
    make_request,
    or_word,
    take,
    test_and_set,
    vec,
    wake,
)


@kernel("u8(words, u8, u8, u8)")
def post(m, target, vector, me):
    """vmx_deliver_posted_interrupt: Effect code of what the host has to do. ``me`` is the vCPU that runs here, or NONE.

    A vector whose PIR bit, or a descriptor whose ON bit, was set already needs nothing: whoever set it is on its way.
    SN is not looked at; it silences devices only.
    """
    pid = hot(m, target)
    if test_and_set(m, pid + k.PID_PIR + (vector >> k.U(6)), vector & k.U(63)):
        return k.ZERO
    if test_and_set(m, pid + k.PID_CONTROL_WORD, k.ZERO):
        return k.ZERO
    if load_acquire(m, pid + k.HOT_MODE) != k.IN_GUEST_MODE:
        return rouse(m, target, me)
    # The sender itself is in guest mode only inside its own fast path, with IRQs off: it syncs PIR before it enters
    # again, so a notification to itself finds nothing. Some kernels send it all the same.
    if target == me and not m[k.H_RULES] & k.R_PI_NOTIFIES_SELF:
        return k.ZERO
    return k.EFFECT_NOTIFY_CODE


@kernel("u8(words, u8, u8)")
def rouse(m, target, me):
    """The end of a post to a target that is not in guest mode."""
    return kick(m, target, me) if m[k.H_TRAITS] & k.T_PI_KICK else wake(m, target)


@kernel("u8(words, u8)")
def clear(m, v):
    """apicv_pre_state_restore / reset: ON and PIR emptied."""
    pid = hot(m, v)
    clear_word_bits(m, pid + k.PID_CONTROL_WORD, k.PID_ON)
    for i in range(4):
        take(m, pid + k.PID_PIR + k.U(i))
    return k.ZERO


@kernel("u8(words, u8)")
def posted_words(m, v):
    """Which words of PIR hold something, as bits 3:0.

    A branch for each word would be mispredicted, and one vector load of all four would wait for the sender's store;
    atomic loads are never joined.
    """
    pir = hot(m, v) + k.PID_PIR
    words = k.U(load_acquire(m, pir) != k.ZERO)
    for i in range(1, 4):
        words = words | (k.U(load_acquire(m, pir + k.U(i)) != k.ZERO) << k.U(i))
    return words


@kernel("u8(words, u8)")
def highest(m, base):
    """Highest vector of the 256-bit set at word index base, or NONE."""
    for i in range(4):
        w = k.U(3 - i)
        bits = m[base + w]
        if bits:
            return (w << k.U(6)) | msb(bits)
    return k.NONE


@kernel("u8(words, u8)")
def highest_irr(m, v):
    """apic_find_highest_irr: NONE without a look when irr_pending says that IRR is empty."""
    if not m[vec(m, v) + k.VEC_IRR_PENDING]:
        return k.NONE
    return highest(m, vec(m, v) + k.VEC_IRR)


@kernel("u8(words, u8)")
def sync_pir_to_irr(m, v):
    """sync_pir_to_irr: harvest PIR, update RVI; the highest pending vector, or NONE."""
    if m[k.H_CONFIG] & k.CONFIG_SVM or not m[k.H_CONFIG] & k.CONFIG_APICV:
        return highest_irr(m, v)
    pid = hot(m, v)
    if not m[pid + k.HOT_FLAGS] & k.FLAG_APICV and m[k.H_TRAITS] & k.T_PIR_WHILE_ACTIVE:
        return highest_irr(m, v)
    got = False
    if m[pid + k.PID_CONTROL_WORD] & k.PID_ON:
        clear_bits_first(m, pid + k.PID_CONTROL_WORD, k.PID_ON)
        irr = vec(m, v) + k.VEC_IRR
        newest = k.NONE
        found = False
        for i in range(4):
            w = k.U(i)
            if m[pid + k.PID_PIR + w]:
                bits = take(m, pid + k.PID_PIR + w)
                found = True
                new = bits & ~or_word(m, irr + w, bits)
                if new:
                    newest = (w << k.U(6)) | msb(new)
        if found:
            top = highest(m, irr)
            got = newest == top and newest != k.NONE
        elif m[k.H_TRAITS] & k.T_PI_EMPTY_LOSES_RVI:
            top = k.NONE
        else:
            top = highest_irr(m, v)
    else:
        top = highest_irr(m, v)
    flags = m[pid + k.HOT_FLAGS]
    if flags & k.FLAG_APICV and not flags & k.FLAG_L2:
        m[vec(m, v) + k.VEC_RVI] = k.ZERO if top == k.NONE else top
    elif got:
        m[vec(m, v) + k.VEC_IRR_PENDING] = k.ONE
        make_request(m, v, k.REQ_EVENT)
    return top
