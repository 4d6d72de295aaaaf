"""The batch door: many exits of any vCPUs in one compiled call, with the outcomes that single exits would have.

The steps are those of the Python dispatcher, in the same order, on the same words; a property test compares the two
byte by byte. What has no compiled handler (or one that an embedder replaced) stops the batch at that exit, and the
caller hands it to the Python dispatcher.
"""

from . import typed as k
from ._jit import kernel
from .fastpath import reenter, refuse
from .fastpath import wrmsr as fast_wrmsr
from .lapic import mmio_read, mmio_write
from .msr import emulate_rdmsr, emulate_wrmsr, skip
from .runloop import (
    BLOCKED,
    ENTERED,
    block,
    enter,
    inject_events,
    service_requests,
    trace_entry,
    trace_exit,
    trace_reentry,
)
from .shared import hot, own

OP_NONE, OP_WRMSR, OP_RDMSR, OP_MMIO_WRITE, OP_MMIO_READ, OP_NOTHING = (k.U(i) for i in range(6))


@kernel("u8(words, u8, u8)")
def operation(m, reason, info):
    """What an exit asks for, or OP_NONE when nothing compiled knows it."""
    mmio = OP_MMIO_WRITE if info & k.MMIO_WRITE else OP_MMIO_READ
    if m[k.H_CONFIG] & k.CONFIG_SVM:
        if reason == k.SVM_MSR:
            return OP_WRMSR if info else OP_RDMSR
        if reason == k.SVM_NPF:
            return mmio
        return OP_NOTHING if reason == k.SVM_INTERRUPT else OP_NONE
    if reason == k.VMX_MSR_WRITE:
        return OP_WRMSR
    if reason == k.VMX_MSR_READ:
        return OP_RDMSR
    if reason == k.VMX_EPT_MISCONFIG:
        return mmio
    return OP_NOTHING if reason == k.VMX_EXTERNAL_INTERRUPT else OP_NONE


@kernel("u8(words, u8, u8)")
def run_to_guest(m, v, forced):
    """Entry half of the loop: BLOCKED when the vCPU has to wait instead, else 0 in guest mode.

    ``forced`` is the caller's word that the vCPU runs guest code, whatever its mp_state said.
    """
    host = own(m, v)
    while True:
        if m[hot(m, v) + k.HOT_REQUESTS]:
            service_requests(m, v)
            inject_events(m, v)
        if m[host + k.K_MP_STATE] == k.MP_INIT_RECEIVED and not forced:
            if block(m, v) == BLOCKED:
                return BLOCKED
            continue  # the sender's EVENT request follows its event at once
        if forced:
            m[host + k.K_MP_STATE] = k.MP_RUNNABLE
        m[host + k.K_PREEMPT_OFF] = k.ONE
        m[host + k.K_IRQS_OFF] = k.ONE
        if enter(m, v) == ENTERED:
            m[host + k.K_GUEST_TIME] = k.ONE
            trace_entry(m, v)
            return k.ZERO
        m[host + k.K_PREEMPT_OFF] = k.ZERO


@kernel("u8(words, u8)")
def start_run(m, v):
    """From user space into the guest: KVM_RUN up to the first entry."""
    host = own(m, v)
    m[hot(m, v) + k.HOT_BLOCKED] = k.ZERO
    m[host + k.K_IN_RUN] = k.ONE
    m[host + k.K_SRCU] = k.ONE
    m[host + k.K_SRCU_LOCKS] = m[host + k.K_SRCU_LOCKS] + k.ONE
    return run_to_guest(m, v, k.ONE)


@kernel("u8(words, u8, u8, u8, u8)")
def _fast_stage(m, v, op, msr, value):
    """The fast handler of a WRMSR exit, wherever this generation hooks it; a refusal for everything else."""
    if op != OP_WRMSR:
        return refuse(k.RF_NOT_AN_MSR_WRITE)
    if m[k.H_CONFIG] & k.CONFIG_SVM and m[k.H_TRAITS] & k.T_SVM_EXIT_32:
        refusal = k.RF_SVM_EXIT_CODE if m[k.H_CONFIG] & k.CONFIG_FASTPATH else k.RF_SWITCHED_OFF
        return refuse(refusal)
    return fast_wrmsr(m, v, msr, value)


@kernel("u8(words, u8, u8, u8, u8, u8)")
def _handle_exit(m, v, op, msr, value, info):
    """The generic handlers that are compiled."""
    if op == OP_WRMSR:
        return emulate_wrmsr(m, v, msr, value)
    if op == OP_RDMSR:
        return emulate_rdmsr(m, v, msr)
    length = info & ~k.MMIO_WRITE
    if op == OP_MMIO_WRITE:
        return mmio_write(m, v, msr, length, value) | skip(m, v, k.ZERO)
    if op == OP_MMIO_READ:
        mmio_read(m, v, msr, length)
        return skip(m, v, k.ZERO)
    return k.ZERO


@kernel("u8(words, u8)")
def leave_guest(m, v):
    """Steps 13-17: mode OUTSIDE, the IRQ window, preemption on, SRCU retaken."""
    host = own(m, v)
    m[hot(m, v) + k.HOT_MODE] = k.OUTSIDE_GUEST_MODE
    m[host + k.K_EXITS] = m[host + k.K_EXITS] + k.ONE
    m[host + k.K_IRQ_WINDOWS] = m[host + k.K_IRQ_WINDOWS] + k.ONE
    m[host + k.K_GUEST_TIME] = k.ZERO
    m[host + k.K_IRQS_OFF] = k.ZERO
    m[host + k.K_PREEMPT_OFF] = k.ZERO
    m[host + k.K_SRCU] = k.ONE
    m[host + k.K_SRCU_LOCKS] = m[host + k.K_SRCU_LOCKS] + k.ONE
    return k.ZERO


@kernel("u8(words, u8)")
def return_to_user(m, v):
    """KVM_RUN returns: SRCU dropped, no longer in the run loop."""
    host = own(m, v)
    m[host + k.K_SRCU] = k.ZERO
    m[host + k.K_IN_RUN] = k.ZERO
    return k.ZERO


@kernel("u8(words, u8, u8, u8, u8, u8, u8)")
def one_exit(m, v, op, reason, msr, value, info):
    """One exit from VM exit to the next entry, block or return to user space: its outcome code."""
    if m[hot(m, v) + k.HOT_MODE] == k.OUTSIDE_GUEST_MODE:
        start_run(m, v)
    traits = m[k.H_TRAITS]
    svm = m[k.H_CONFIG] & k.CONFIG_SVM
    info1 = k.ZERO if op == OP_MMIO_WRITE or op == OP_MMIO_READ else info
    late = traits & (k.T_TRACE_EXIT_LATE_SVM if svm else k.T_TRACE_EXIT_LATE_VMX)
    if not late:
        trace_exit(m, v, reason, info1, k.ZERO)
    code = k.ZERO
    if not traits & k.T_HOOK_IRQOFF:
        code = reenter(m, v, _fast_stage(m, v, op, msr, value))
        if code & k.CODE_COMPLETION == k.COMPLETION_REENTER:
            trace_reentry(m, v)
            return code
    else:
        m[hot(m, v) + k.HOT_MODE] = k.OUTSIDE_GUEST_MODE
        code = _fast_stage(m, v, op, msr, value)
    leave_guest(m, v)
    completion = code & k.CODE_COMPLETION
    if completion == k.COMPLETION_USERSPACE:
        return_to_user(m, v)
        return code
    if late:
        trace_exit(m, v, reason, info1, k.ZERO)
    if completion == k.COMPLETION_SKIP:
        # The skip's verdict is ignored here as it was in handle_exit: a KVM_EXIT_DEBUG is lost.
        skip(m, v, k.INSN_LEN_WRMSR)
    elif completion == k.COMPLETION_NONE:
        code = code | _handle_exit(m, v, op, msr, value, info)
    if code & k.CODE_USER:
        return_to_user(m, v)
        return code
    if run_to_guest(m, v, k.ZERO) == BLOCKED:
        code = code | k.CODE_BLOCKED
    return code


@kernel("u8(words, words, u8)")
def first_bad(m, exits, n):
    """Index of the first exit that names a vCPU or an access outside the machine, or n."""
    for i in range(n):
        at = k.U(i) * k.EXIT_WORDS
        if exits[at] & k.LOW32 >= m[k.H_NVCPUS]:
            return k.U(i)
        info = exits[at + k.ONE] >> k.U(32)
        op = operation(m, exits[at] >> k.U(32), info)
        if op == OP_MMIO_WRITE or op == OP_MMIO_READ:
            length = info & ~k.MMIO_WRITE
            if exits[at + k.ONE] & k.LOW32 > k.U(0xFFF) or (length != k.ONE and length != k.U(2) and length != k.U(4)):
                return k.U(i)
    return n


@kernel("u8(words, words, words, u8, u8)")
def run(m, exits, outcomes, first, n):
    """Exits first..n-1; the index of the first one that needs the Python dispatcher, or n.

    Every vCPU index is checked again here: the array may belong to another thread that changes it.
    """
    if first >= n:
        return n  # and not range(first, n), which counts from a negative number where bit 63 is set
    for j in range(first, n):
        i = k.U(j)
        at = i * k.EXIT_WORDS
        v = exits[at] & k.LOW32
        reason = exits[at] >> k.U(32)
        msr = exits[at + k.ONE] & k.LOW32
        info = exits[at + k.ONE] >> k.U(32)
        op = operation(m, reason, info)
        if op == OP_NONE or m[k.H_HANDLERS] or v >= m[k.H_NVCPUS] or m[hot(m, v) + k.HOT_FLAGS] & k.FLAG_L2:
            return i
        out = i * k.OUTCOME_WORDS
        outcomes[out] = one_exit(m, v, op, reason, msr, exits[at + k.U(2)], info)
        if op == OP_RDMSR or op == OP_MMIO_READ:
            outcomes[out + k.ONE] = m[own(m, v) + k.K_MSR_DATA]
        else:
            outcomes[out + k.ONE] = k.ZERO
    return n
