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

HAS_CONFIG = k.CONFIG_FASTPATH
IRRELEVANT_CONFIG = (
    k.CONFIG_APICV
    | k.CONFIG_THREADS
    | k.CONFIG_SPLIT_IRQCHIP
    | k.CONFIG_X2APIC_CPUID
    | k.CONFIG_DEADLINE_CPUID
    | k.CONFIG_VECTOR_HASHING
    | k.CONFIG_CMCI
    | k.CONFIG_NRIPS
    | k.CONFIG_HV_TIMER
    | k.CONFIG_SMM
    | k.CONFIG_KVM_HYPERV
    | k.CONFIG_HYPERV
    | k.CONFIG_HYPERV_ENFORCE
    | k.CONFIG_LINT0_REENABLED
    | k.CONFIG_IPIV
    | k.CONFIG_VTD_PI
    | k.CONFIG_X2AVIC
    | k.CONFIG_MMIO_HOLE
    | k.CONFIG_PI_INJECT_TIMER
    | k.CONFIG_RETPOLINE
)
"""Configuration that makes no difference here. CONFIG_SVM and CONFIG_TRACE do, and so may any bit that is new."""
HAS = k.T_SKIP_HONOURED | k.T_ICR_REENTERS | k.T_ICR_ANY_RESOLVED
IRRELEVANT = (
    k.T_SKIP_AFTER_TRACE
    | k.T_GUARD_L2
    | k.T_SVM_EXIT_32
    | k.T_SVM_NEXT_RIP
    | k.T_ICR_NO_SHORTHAND
    | k.T_ICR_NO_BROADCAST
    | k.T_ICR_NO_RESERVED
    | k.T_TSCDL_HV_TIMER
    | k.T_TSCDL_ALWAYS
    | k.T_PREEMPTION_TIMER_FAST
    | k.T_FORCED_EXIT_HANDLED
    | k.T_HLT_FAST
    | k.T_INVD_FAST
    | k.T_MSR_IMM
    | k.T_ICR_RESERVED_GP
    | k.T_MSR_UPPER_GP
    | k.T_SELF_IPI_WRITES_ICR
    | k.T_ICR_SPLIT_SVM
    | k.T_LOWEST_REWRITE_FIRST
    | k.T_TIMER_NO_CATCH_UP
    | k.T_PI_KICK
    | k.T_PI_EMPTY_LOSES_RVI
    | k.T_PIR_WHILE_ACTIVE
    | k.T_INHIBITS
    | k.T_INHIBIT_ID_BASE
    | k.T_INHIBIT_MAP
    | k.T_TRACE_ICR2_FIRST
    | k.T_TRACE_WRITE_FIRST
    | k.T_TRACE_EXIT_LATE_VMX
    | k.T_TRACE_EXIT_LATE_SVM
    | k.T_TRACE_REENTRY
    | k.T_TRACE_DOORBELL
    | k.T_MMIO_NOT_VECTORING
    | k.T_INHIBITED_PAGE_UNMAPPED
    | k.T_SCAN_SPLIT_SYNCS
)
"""Traits that make no difference here: of other exits, of values that are declined, of traces, of the other vendor, and
PI_KICK, which pid.rouse looks at. A generation with any other trait, one that is not listed yet included, is declined.
"""
IRRELEVANT_RULES = (
    k.R_TDCR_MASKED
    | k.R_CR8_KEEPS_TPR_BIT_2
    | k.R_LVTPC_MASKED
    | k.R_LVTPC_KEPT_ON_AMD
    | k.R_X2APIC_READS_UNCHECKED
    | k.R_MAP_BY_VOTES
    | k.R_ID_FROM_PAGE
    | k.R_ID_KEPT_ON_LEAVING
    | k.R_MAP_DIRTY_BY_SVR
    | k.R_NMI_COUNTED
    | k.R_SMI_FOLDED
    | k.R_NMI_MASK_OVER_INIT
    | k.R_MP_STATE_CHECKED_IN_RUN
    | k.R_SMI_ALWAYS
    | k.R_UNHALT_KEPT
    | k.R_BLOCKED_INIT_WAKES
    | k.R_LATCHED_INIT_WITH_SMM
    | k.R_INHIBIT_REQUESTS_EVENT
    | k.R_APICV_AT_ENTRY
    | k.R_TMCCT_RESTORED
    | k.R_ONE_SHOT_RESTORES_EXPIRED
    | k.R_TICK_POSTED_AT_ONCE
    | k.R_TICK_ONLY_IN_RUN
    | k.R_HV_TIMER_CANCELLED
    | k.R_HV_TIMER_CANCELLED_FIRST
    | k.R_WAIT_TRACED_LATE
    | k.R_POSTS_TIMER_ANYWAY
    | k.R_DEADLINE_READ_DISABLED
    | k.R_DEADLINE_WRITTEN_DISABLED
    | k.R_DEADLINE_WRITTEN_IN_MODE_3
    | k.R_MODE_KEEPS_HV_TIMER
    | k.R_SET_LAPIC_KEEPS_WAIT
    | k.R_FILTER_RANGES_COUNTED
    | k.R_SET_LAPIC_STORES_BASE
    | k.R_RESTORE_CLEARS_PIR_LAST
    | k.R_SN_ON_EVERY_PUT
    | k.R_NV_BEFORE_BLOCKING
    | k.R_NV_WHATEVER_IF
    | k.R_CR8_WITH_PPR
    | k.R_CR8_FOLLOWS_AVIC
    | k.R_V_TPR_KEPT_BY_AVIC
    | k.R_AVIC_MANY_SCANNED
    | k.R_AVIC_OLD
    | k.R_AVIC_LDR_LOOSE
    | k.R_INHIBIT_X2APIC
    | k.R_X2AVIC_WRITES_EXIT
    | k.R_AVIC_ID_REFUSED
    | k.R_IRQWIN_COUNTED
    | k.R_READ_ACROSS_TRACED
    | k.R_TSC_SYNCED_BY_GUEST
    | k.R_TSC_FIRST_WRITE_KEPT
    | k.R_PIT_SPEAKER_APART
    | k.R_PIT_ANYWHERE
    | k.R_PIC_POLL_BARE
    | k.R_PIC_WAKES_ANYWAY
    | k.R_SCAN_STALE
    | k.R_SCAN_SPLIT_PENDING
    | k.R_SCAN_OLD_MODE
    | k.R_RESAMPLER_ASKED
    | k.R_LAZY_EOI_WHOLE
    | k.R_LAZY_EOI_LEVEL
)
"""The same for the rules: PI_NOTIFIES_SELF is the one that an IPI would see."""
HAS_RULES = k.R_REENTRY_COUNTED
PLAIN = ~(k.HIGH32 | k.ICR_VECTOR | k.ICR_LEVEL | k.ICR_BUSY)
"""ICR bits that make it another kind of interrupt."""
TARGET = k.FLAG_HW | k.FLAG_SW | k.FLAG_APICV
ACCEPTED = k.SENT | (k.ONE << k.CODE_ACCEPTED_SHIFT)


@kernel("u8(words)")
def possible(m):
    """Tell whether this machine leaves nothing to choose. An allow-list: what is not known here is declined."""
    if m[k.H_CONFIG] & ~IRRELEVANT_CONFIG != HAS_CONFIG or m[k.H_TRAITS] & ~IRRELEVANT != HAS:
        return k.ZERO
    return k.ONE if m[k.H_RULES] & ~IRRELEVANT_RULES == HAS_RULES else k.ZERO


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
