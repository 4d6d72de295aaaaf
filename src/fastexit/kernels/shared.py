"""Access to words that other threads may write: locked when the machine is shared, plain when it has one owner.

The choice is a bit of the configuration word, read where it is used; on a machine of one owner a locked instruction
would cost more than all the rest of an IPI.
"""

from ..jit.atomics import (
    compare_exchange,
    exchange,
    fence_after_atomic,
    fetch_add,
    fetch_and,
    fetch_or,
    test_and_set_bit,
)
from ..jit.declare import inlined, kernel
from . import typed as k

NOT_MINE = k.NONE
"""Result of a device's access to an address that is not its own; no code has all bits set."""


@kernel("u8(words, u8)")
def hv(m, v):
    """First word of a vCPU's row of Hyper-V's words."""
    return k.HV + v * k.HV_STRIDE


@kernel("u8(words, u8)")
def vp_index(m, v):
    """kvm_hv_get_vpindex: the order of creation until user space says otherwise."""
    return m[hv(m, v) + k.HV_VP_INDEX] ^ v


@kernel("u8(words, u8, u8)")
def test_and_set(m, i, bit):
    """Set bit 0..63 of word i; 1 when it was set already."""
    if m[k.H_CONFIG] & k.CONFIG_THREADS:
        return test_and_set_bit(m, i, bit)
    old = m[i]
    m[i] = old | (k.ONE << bit)
    return (old >> bit) & k.ONE


@kernel("u8(words, u8, u8)")
def or_word(m, i, value):
    """OR value into word i; the old word."""
    if m[k.H_CONFIG] & k.CONFIG_THREADS:
        return fetch_or(m, i, value)
    old = m[i]
    m[i] = old | value
    return old


@kernel("u8(words, u8, u8)")
def clear_word_bits(m, i, value):
    """Clear the bits of value in word i; the old word."""
    if m[k.H_CONFIG] & k.CONFIG_THREADS:
        return fetch_and(m, i, ~value)
    old = m[i]
    m[i] = old & ~value
    return old


@kernel("u8(words, u8, u8)")
def clear_bits_first(m, i, value):
    """Clear the bits of value in word i before anything that follows is read."""
    if m[k.H_CONFIG] & k.CONFIG_THREADS:
        fetch_and(m, i, ~value)
        fence_after_atomic()
    else:
        m[i] = m[i] & ~value
    return k.ZERO


@kernel("u8(words, u8)")
def take(m, i):
    """Exchange word i with 0; the old word."""
    if m[k.H_CONFIG] & k.CONFIG_THREADS:
        return exchange(m, i, k.ZERO)
    old = m[i]
    m[i] = k.ZERO
    return old


@kernel("u8(words, u8)")
def increment(m, i):
    """Add 1 to word i; the old word."""
    if m[k.H_CONFIG] & k.CONFIG_THREADS:
        return fetch_add(m, i, k.ONE)
    old = m[i]
    m[i] = old + k.ONE
    return old


@kernel("u8(words, u8, u8, u8)")
def replace_if(m, i, old, new):
    """Word i becomes new if it is old; the word that was there."""
    if m[k.H_CONFIG] & k.CONFIG_THREADS:
        return compare_exchange(m, i, old, new)
    was = m[i]
    if was == old:
        m[i] = new
    return was


def _clear_at_once(m, first, n):
    m[first : first + n] = k.ZERO
    return k.ZERO


def _copy_at_once(m, target, source, n):
    m[target : target + n] = m[source : source + n]
    return k.ZERO


@kernel("u8(words, u8, u8)", interpreted=_clear_at_once)
def clear_words(m, first, n):
    """Zero n words that no other thread touches."""
    for i in range(n):
        m[first + k.U(i)] = k.ZERO
    return k.ZERO


@kernel("u8(words, u8, u8, u8)", interpreted=_copy_at_once)
def renew_words(m, target, source, n):
    """Copy n words that one thread writes and others read: what is the same already is not written, and stays in the
    readers' caches.
    """
    for i in range(n):
        word = k.U(i)
        new = m[source + word]
        if m[target + word] != new:
            m[target + word] = new
    return k.ZERO


@kernel("u8(words, u8, u8, u8)", interpreted=_copy_at_once)
def copy_words(m, target, source, n):
    """Copy n words that no other thread touches."""
    for i in range(n):
        m[target + k.U(i)] = m[source + k.U(i)]
    return k.ZERO


@kernel("u8(words, u8)")
def hot(m, v):
    """First word of a vCPU's hot row: its posted-interrupt descriptor, then HOT_*."""
    return k.HOT + v * k.HOT_STRIDE


@kernel("u8(words, u8)")
def vec(m, v):
    """First word of a vCPU's IRR, RVI and irr_pending."""
    return k.VEC + v * k.VEC_STRIDE


@kernel("u8(words, u8)")
def own(m, v):
    """First word of KVM's own words of a vCPU, or of a row of the host's."""
    return k.KVM + v * k.KVM_STRIDE


@kernel("u8(words, u8, u8)")
def make_request(m, v, request):
    """kvm_make_request."""
    return or_word(m, hot(m, v) + k.HOT_REQUESTS, request)


@kernel("u8(words, u8, u8)")
def clear_request(m, v, request):
    """kvm_clear_request; the requests as they were."""
    return clear_word_bits(m, hot(m, v) + k.HOT_REQUESTS, request)


@kernel("u8(words, u8)")
def wake(m, v):
    """kvm_vcpu_wake_up: Effect code WAKE if the vCPU's thread slept, else 0."""
    if take(m, hot(m, v) + k.HOT_BLOCKED):
        return k.EF_WAKE << k.CODE_EFFECTS_SHIFT
    return k.ZERO


@kernel("u8(words, u8, u8)")
def kick(m, v, me):
    """kvm_vcpu_kick: make the target leave the guest. Effect code of what was needed.

    Only the one who moves mode from IN_GUEST to EXITING sends the reschedule IPI, so a target gets one IPI however many
    senders kick it. The vCPU that runs here needs none: it sees EXITING before it enters again.
    """
    woken = wake(m, v)
    if woken:
        return woken
    mode = hot(m, v) + k.HOT_MODE
    if v == me:
        if m[mode] == k.IN_GUEST_MODE:
            m[mode] = k.EXITING_GUEST_MODE
        return k.ZERO
    if replace_if(m, mode, k.IN_GUEST_MODE, k.EXITING_GUEST_MODE) == k.IN_GUEST_MODE:
        return k.EF_KICK << k.CODE_EFFECTS_SHIFT
    return k.ZERO


@kernel("u8(words, u8, u8)")
def _tell_another(m, me, one):
    """A target behind the first one."""
    at = own(m, me) + k.K_TARGETS
    n = m[at] >> k.TARGETS_COUNT_SHIFT
    if n < k.MAX_VCPUS:
        m[at] = m[at] + k.TARGETS_ONE
        at = k.TARGETS + me * k.TARGETS_STRIDE + (n >> k.U(2))
        shift = (n & k.U(3)) << k.U(4)
        m[at] = m[at] & ~(k.U(0xFFFF) << shift) | one << shift
    return k.ZERO


@kernel("u8(words, u8, u8, u8)")
def tell(m, me, target, code):
    """Write down what the sender's host has to do for one target, and return the code that says so.

    Effects of several targets unite in an outcome's code, and what a target needed cannot be seen afterwards: others
    act on it, too. ``me`` is the sender, or NONE where nobody will ask. Rows have a place for every vCPU; whoever is
    beyond that has been told of before.
    """
    effect = code & k.CODE_EFFECTS
    if not effect:
        return code
    if me < k.SENDERS:
        one = effect >> k.TARGETS_FROM_CODE | target
        at = own(m, me) + k.K_TARGETS
        if m[at]:
            _tell_another(m, me, one)
        else:
            m[at] = k.TARGETS_ONE | one
    return code


@inlined
@kernel("u8(words, u8)")
def begin_targets(m, v):
    """An exit begins a list of targets, or goes on with what the entry that it stands for has asked of others."""
    if not m[own(m, v) + k.K_SENT]:
        m[own(m, v) + k.K_TARGETS] = k.ZERO
    return k.ZERO


@kernel("u8(words, u8, u8)")
def sent_on_the_way(m, v, code):
    """Keep effects of what happens on the way to an entry for the outcome of the exit before it: 0."""
    m[own(m, v) + k.K_SENT] = m[own(m, v) + k.K_SENT] | (code & k.CODE_EFFECTS)
    return k.ZERO


@kernel("u8(words, u8, u8, u8)")
def ask(m, v, request, me):
    """kvm_make_vcpus_request_mask for one vCPU: Effect code KICK if it was in the guest. Nobody is woken for it.

    ``me`` is told whom to kick, as in ipi.py. The vCPU that runs here is never in guest mode when it asks, so it is not
    told apart.
    """
    make_request(m, v, request)
    if replace_if(m, hot(m, v) + k.HOT_MODE, k.IN_GUEST_MODE, k.EXITING_GUEST_MODE) == k.IN_GUEST_MODE:
        return tell(m, me, v, k.EF_KICK << k.CODE_EFFECTS_SHIFT)
    return k.ZERO


@kernel("u8(words, u8, u8)")
def ask_all(m, request, me):
    """kvm_make_all_cpus_request: Effect code."""
    effects = k.ZERO
    for i in range(m[k.H_NVCPUS]):
        effects = effects | ask(m, k.U(i), request, me)
    return effects


@kernel("u8(words, u8)")
def _context(m, v):
    """A record's vCPU, and what it may not be interrupted by: what ftrace prints in front of the time stamp."""
    row = own(m, v)
    irqs = k.TRACE_IRQS_OFF if m[row + k.K_IRQS_OFF] else k.ZERO
    preempt = k.TRACE_PREEMPT_OFF if m[row + k.K_PREEMPT_OFF] else k.ZERO
    return (v + k.ONE << k.U(8)) | irqs | preempt


@kernel("u8(words, u8, u8, u8, u8, u8)")
def emit(m, event, v, a, b, c):
    """Append one record of what vCPU v did, or the host (no vCPU's index). A full ring only counts.

    Call only under CONFIG_TRACE.
    """
    n = increment(m, k.H_TRACE_HEAD)
    if n < k.TRACE_CAPACITY:
        at = k.TRACE + n * k.TRACE_STRIDE
        m[at] = event | (_context(m, v) if v < k.MAX_VCPUS else k.ZERO)
        m[at + k.U(1)] = a
        m[at + k.U(2)] = b
        m[at + k.U(3)] = c
    return n
