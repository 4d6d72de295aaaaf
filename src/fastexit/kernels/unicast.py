"""The exit that nearly every IPI is, in one piece: an x2APIC ICR write for one physical target, Fixed and edge.

It does what fastpath.wrmsr does from guards() to skip(), for machines and values that leave nothing to choose: VMX, a
generation that re-enters the guest, no tracing, a target with APICv. Whatever is not so is declined untouched, and the
general handler does it. What is asked of the machine is asked once a batch; per IPI this reads the sender's flags and
the map, and touches two cache lines of the target.
"""

from ..jit.atomics import load_acquire, prefetch
from ..jit.declare import inlined, kernel
from . import typed as k
from .apicmap import phys, slot
from .lapicreg import word
from .pid import rouse
from .shared import clear_word_bits, hot, own, test_and_set

CONFIG = k.CONFIG_SVM | k.CONFIG_FASTPATH | k.CONFIG_TRACE
TRAITS = (
    k.T_HOOK_IRQOFF
    | k.T_SKIP_LATE
    | k.T_SKIP_HONOURED
    | k.T_ICR_REENTERS
    | k.T_ICR_ANY_RESOLVED
    | k.T_ICR_SPLIT
    | k.T_SRCU_IN_FASTPATH
)
HAS = k.T_SKIP_HONOURED | k.T_ICR_REENTERS | k.T_ICR_ANY_RESOLVED
PLAIN = ~(k.HIGH32 | k.ICR_VECTOR | k.ICR_LEVEL | k.ICR_BUSY)
"""ICR bits that make it another kind of interrupt."""
TARGET = k.FLAG_HW | k.FLAG_SW | k.FLAG_APICV
ACCEPTED = k.SENT | (k.ONE << k.CODE_ACCEPTED_SHIFT)


@kernel("u8(words)")
def possible(m):
    """Whether this machine leaves nothing to choose."""
    if m[k.H_CONFIG] & CONFIG != k.CONFIG_FASTPATH or m[k.H_TRAITS] & TRAITS != HAS:
        return k.ZERO
    return k.ONE


@inlined
@kernel("u8(words, u8, u8)")
def send(m, v, icr):
    """The WRMSR up to the loop's tail: its outcome code, or 0 with nothing touched. Only where possible() says so."""
    row = hot(m, v)
    if icr & PLAIN or m[row + k.HOT_MODE] == k.OUTSIDE_GUEST_MODE:
        return k.ZERO
    if m[row + k.HOT_FLAGS] & (k.FLAG_X2APIC | k.FLAG_L2) != k.FLAG_X2APIC:
        return k.ZERO
    mine = own(m, v)
    if m[mine + k.K_RFLAGS] & k.RFLAGS_TF or m[mine + k.K_EXPIRED_DEADLINE]:
        return k.ZERO
    base = m[k.H_MAP]
    dest = icr >> k.ICR_DEST_SHIFT
    if not m[base + k.MAP_PRESENT] or dest == k.X2APIC_BROADCAST or dest == k.XAPIC_BROADCAST:
        return k.ZERO
    code = k.SENT
    told = k.ZERO
    found = phys(m, base, dest)
    if found:
        target = found - k.ONE
        at = hot(m, target)
        if m[at + k.HOT_FLAGS] & TARGET != TARGET:
            return k.ZERO
        vector = icr & k.ICR_VECTOR
        tmr = at + k.HOT_TMR + (vector >> k.U(6))
        bit = k.ONE << (vector & k.U(63))
        if m[tmr] & bit:
            clear_word_bits(m, tmr, bit)
        code = ACCEPTED
        if not test_and_set(m, at + k.PID_PIR + (vector >> k.U(6)), vector & k.U(63)):
            if not test_and_set(m, at + k.PID_CONTROL_WORD, k.ZERO):
                if load_acquire(m, at + k.HOT_MODE) != k.IN_GUEST_MODE:
                    effect = rouse(m, target, v)
                    if effect:
                        code = code | effect
                        told = k.TARGETS_ONE | effect >> k.TARGETS_FROM_CODE | target
                elif target != v:
                    code = code | k.EFFECT_NOTIFY_CODE
                    told = k.TARGETS_NOTIFY | target
    m[mine + k.K_TARGETS] = told
    m[word(m, v, k.APIC_ICR)] = icr & ~k.ICR_BUSY
    m[mine + k.K_RIP] = m[mine + k.K_RIP] + k.INSN_LEN_WRMSR
    m[mine + k.K_SHADOW] = k.ZERO
    return code


@inlined
@kernel("u8(words, u8)")
def again(m, v):
    """The loop's tail where nothing waits for the sender itself: 1, the exit counted; else 0 and nothing done."""
    row = hot(m, v)
    if m[row + k.HOT_MODE] != k.IN_GUEST_MODE or m[row + k.HOT_REQUESTS] or m[row + k.PID_CONTROL_WORD] & k.PID_ON:
        return k.ZERO
    m[own(m, v) + k.K_EXITS] = m[own(m, v) + k.K_EXITS] + k.ONE
    return k.ONE


@inlined
@kernel("u8(words, u8)")
def look_ahead(m, dest):
    """Ask for the lines of a physical destination's vCPU. A guess: the map may change, and the id need not be in it."""
    at = hot(m, slot(m, m[k.H_MAP], k.MAP_PHYS_SLOT + (dest & k.U(k.MAX_VCPU_ID))) - k.ONE)
    prefetch(m, at)
    prefetch(m, at + k.HOT_TMR)
    return k.ZERO
