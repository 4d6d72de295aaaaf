"""The batch door: many exits of any vCPUs in one compiled call, with the outcomes that single exits would have.

The steps are those of the Python dispatcher, in the same order, on the same words; a property test compares the two
byte by byte. What has no compiled handler (or one that an embedder replaced) stops the batch at that exit, and the
caller hands it to the Python dispatcher.
"""

from ..jit.atomics import prefetch
from ..jit.declare import inlined, kernel
from . import typed as k
from . import unicast
from .events import inject_events
from .fastpath import handle_preemption_timer, hlt, preemption_timer, reenter, refuse
from .fastpath import wrmsr as fast_wrmsr
from .halt import emulate_halt
from .irq import take_pv_eoi
from .lapic import mmio_read, mmio_write
from .msr import emulate_rdmsr, emulate_wrmsr, skip
from .pi import process_notification
from .shared import hot, own, vec
from .steps import (
    AGAIN,
    BLOCKED,
    ENTERED,
    begin_run,
    block,
    enter,
    exits_at_once,
    loop_tail,
    return_to_user,
    service_requests,
    trace_entry,
    trace_exit,
    trace_reentry,
    wake_up,
)

OP_NONE, OP_WRMSR, OP_RDMSR, OP_MMIO_WRITE, OP_MMIO_READ, OP_NOTHING, OP_HLT, OP_TIMER = (k.U(i) for i in range(8))
NEAR = k.U(1536)
"""So many vCPUs leave enough of a second-level cache of 1 MiB; to ask for their lines ahead would not pay."""
AHEAD = k.U(12)
"""Records between a prefetch and its use: a few IPIs, some 100 ns."""
IN_GUEST, AROUND = k.ZERO, k.NONE
"""What a try to enter came to: in the guest, or once more around the loop; else a USER code."""


@kernel("u8(words, u8, u8)")
def operation(m, reason, info):
    """What an exit asks for, or OP_NONE when nothing compiled knows it."""
    mmio = OP_MMIO_WRITE if info & k.MMIO_WRITE else OP_MMIO_READ
    if m[k.H_CONFIG] & k.CONFIG_SVM:
        if reason == k.SVM_MSR:
            return OP_WRMSR if info else OP_RDMSR
        if reason == k.SVM_NPF:
            return mmio
        if reason == k.SVM_HLT:
            return OP_HLT
        return OP_NOTHING if reason == k.SVM_INTERRUPT else OP_NONE
    if reason == k.VMX_MSR_WRITE:
        return OP_WRMSR
    if reason == k.VMX_MSR_READ:
        return OP_RDMSR
    if reason == k.VMX_EPT_MISCONFIG:
        return mmio
    if reason == k.VMX_HLT:
        return OP_HLT
    if reason == k.VMX_PREEMPTION_TIMER:
        return OP_TIMER
    return OP_NOTHING if reason == k.VMX_EXTERNAL_INTERRUPT else OP_NONE


@kernel("u8(words, u8, u8, u8, u8)")
def _fast_stage(m, v, op, msr, value):
    """The fast handler of an exit, wherever this generation hooks it; a refusal for everything else."""
    if op == OP_HLT:
        return hlt(m, v)
    if op == OP_TIMER:
        return preemption_timer(m, v)
    if op != OP_WRMSR:
        return refuse(k.RF_NOT_AN_MSR_WRITE)
    if m[k.H_CONFIG] & k.CONFIG_SVM and m[k.H_TRAITS] & k.T_SVM_EXIT_32:
        refusal = k.RF_SVM_EXIT_CODE if m[k.H_CONFIG] & k.CONFIG_FASTPATH else k.RF_SWITCHED_OFF
        return refuse(refusal)
    return fast_wrmsr(m, v, msr, value, k.INSN_LEN_WRMSR)


@kernel("u8(words, u8, u8, u8, u8, u8)")
def _handle_exit(m, v, op, msr, value, info):
    """The generic handlers that are compiled."""
    if op == OP_RDMSR and not m[k.H_CONFIG] & k.CONFIG_SVM or not m[k.H_CONFIG] & k.CONFIG_RETPOLINE:
        # Every other exit here has a retpoline shortcut.
        m[own(m, v) + k.K_INDIRECT_CALLS] = m[own(m, v) + k.K_INDIRECT_CALLS] + k.ONE
    if op == OP_WRMSR:
        return emulate_wrmsr(m, v, msr, value, k.INSN_LEN_WRMSR)
    if op == OP_RDMSR:
        return emulate_rdmsr(m, v, msr, k.INSN_LEN_WRMSR)
    if op == OP_HLT:
        return emulate_halt(m, v)
    if op == OP_TIMER:
        return handle_preemption_timer(m, v)
    if op == OP_NOTHING:
        return k.ZERO
    length = info & ~k.MMIO_WRITE
    code = mmio_write(m, v, msr, length, value) if op == OP_MMIO_WRITE else mmio_read(m, v, msr, length)
    return code if code & k.CODE_USER else code | skip(m, v, k.ZERO)


@kernel("u8(words, u8)")
def leave_guest(m, v):
    """Steps 13-18: mode OUTSIDE, the IRQ window, preemption on, SRCU retaken, PV EOI."""
    host = own(m, v)
    m[hot(m, v) + k.HOT_MODE] = k.OUTSIDE_GUEST_MODE
    m[host + k.K_EXITS] = m[host + k.K_EXITS] + k.ONE
    m[host + k.K_IRQ_WINDOWS] = m[host + k.K_IRQ_WINDOWS] + k.ONE
    m[host + k.K_GUEST_TIME] = k.ZERO
    m[host + k.K_IRQS_OFF] = k.ZERO
    m[host + k.K_PREEMPT_OFF] = k.ZERO
    m[host + k.K_SRCU] = k.ONE
    m[host + k.K_SRCU_LOCKS] = m[host + k.K_SRCU_LOCKS] + k.ONE
    if m[host + k.K_ATTENTION]:
        take_pv_eoi(m, v)
    return k.ZERO


@kernel("u8(words)")
def _traces_late(m):
    """kvm_exit comes from handle_exit in this generation."""
    svm = m[k.H_CONFIG] & k.CONFIG_SVM
    return m[k.H_TRAITS] & (k.T_TRACE_EXIT_LATE_SVM if svm else k.T_TRACE_EXIT_LATE_VMX)


@kernel("u8(words, u8, u8, u8, u8, u8, u8)")
def _vendor_run(m, v, op, reason, msr, value, info1):
    """Step 11 behind VMEXIT and the loop around it: the code of the fast handler, in the guest again if REENTER."""
    if not _traces_late(m):
        trace_exit(m, v, reason, info1, k.ZERO, k.ZERO)
    if m[k.H_TRAITS] & k.T_HOOK_IRQOFF:
        return k.ZERO
    code = reenter(m, v, _fast_stage(m, v, op, msr, value))
    if code & k.CODE_COMPLETION == k.COMPLETION_REENTER:
        trace_reentry(m, v)
    return code


@kernel("u8(words, u8, u8, u8, u8, u8, u8, u8)")
def _leave_and_handle(m, v, op, reason, msr, value, info, code):
    """Steps 13-20 of an exit that did not re-enter: its outcome code."""
    if m[k.H_TRAITS] & k.T_HOOK_IRQOFF:
        m[hot(m, v) + k.HOT_MODE] = k.OUTSIDE_GUEST_MODE
        code = _fast_stage(m, v, op, msr, value)
    leave_guest(m, v)
    completion = code & k.CODE_COMPLETION
    if completion == k.COMPLETION_USERSPACE:
        return code
    if _traces_late(m):
        mmio = op == OP_MMIO_WRITE or op == OP_MMIO_READ
        trace_exit(m, v, reason, k.ZERO if mmio else info, k.ZERO, k.ZERO)
    if completion == k.COMPLETION_SKIP:
        # The skip's verdict is ignored here as it was in handle_exit: a KVM_EXIT_DEBUG is lost.
        skip(m, v, k.INSN_LEN_WRMSR)
    elif completion == k.COMPLETION_NONE:
        code = code | _handle_exit(m, v, op, msr, value, info)
    m[own(m, v) + k.K_IMMEDIATE] = k.ZERO
    return code


@kernel("u8(words, u8)")
def _exit_at_once(m, v):
    """Exits of a guest that leaves before its first instruction: IN_GUEST, AROUND or a USER code."""
    # KVM forces an exit by the preemption timer, or by a host interrupt where there is none.
    svm = m[k.H_CONFIG] & k.CONFIG_SVM
    op = OP_NOTHING if svm else OP_TIMER
    reason = k.SVM_INTERRUPT if svm else k.VMX_PREEMPTION_TIMER
    while exits_at_once(m, v):
        code = _vendor_run(m, v, op, reason, k.ZERO, k.ZERO, k.ZERO)
        if code & k.CODE_COMPLETION != k.COMPLETION_REENTER:
            code = _leave_and_handle(m, v, op, reason, k.ZERO, k.ZERO, k.ZERO, code)
            return code & k.CODE_USER if code & k.CODE_USER else AROUND
    return IN_GUEST


@kernel("u8(words, u8, u8)")
def _vcpu_enter_guest(m, v, forced):
    """One try to enter: steps 1-11. IN_GUEST, AROUND or a USER code."""
    host = own(m, v)
    if m[hot(m, v) + k.HOT_REQUESTS] or m[host + k.K_USER_WINDOW]:
        user = service_requests(m, v)
        if user:
            return user
        if inject_events(m, v) == BLOCKED and not forced:
            return AROUND
    if forced:
        m[host + k.K_MP_STATE] = k.MP_RUNNABLE
    m[host + k.K_PREEMPT_OFF] = k.ONE
    m[host + k.K_IRQS_OFF] = k.ONE
    if enter(m, v) == ENTERED:
        m[host + k.K_GUEST_TIME] = k.ONE
        trace_entry(m, v)
        return _exit_at_once(m, v)
    m[host + k.K_PREEMPT_OFF] = k.ZERO
    return AROUND


@kernel("u8(words, u8, u8)")
def to_user(m, v, code):
    """KVM_RUN returns for the USER field of an outcome code; a signal makes it -EINTR."""
    reason = ((code & k.CODE_USER) >> k.CODE_USER_SHIFT) - k.ONE
    return return_to_user(m, v, reason, k.EINTR if code & k.CODE_USER == k.USER_INTR else k.ZERO)


@kernel("u8(words, u8, u8)")
def vcpu_run(m, v, forced):
    """The loop until the vCPU is in the guest (0), waits (CODE_BLOCKED) or KVM_RUN returns (a USER code).

    ``forced`` is the caller's word that the vCPU runs guest code, whatever its mp_state said.
    """
    while True:
        if forced or m[own(m, v) + k.K_MP_STATE] == k.MP_RUNNABLE:
            user = _vcpu_enter_guest(m, v, forced)
            if user == IN_GUEST:
                return k.ZERO
        else:
            user = block(m, v)
            if user == BLOCKED:
                return k.CODE_BLOCKED
            if user == AGAIN:
                continue
            if user == k.ZERO:
                user = AROUND
        if user == AROUND:
            user = loop_tail(m, v)
        if user:
            to_user(m, v, user)
            return user


@kernel("u8(words, u8)")
def start_run(m, v):
    """From user space into the guest, on the caller's word that it is there.

    A return of KVM_RUN that stands before the entry (an EOI for user space's IOAPIC, say) happens, and user space then
    calls KVM_RUN again.
    """
    while True:
        user = begin_run(m, v)
        wake_up(m, v)
        if user:
            to_user(m, v, user)
        elif not vcpu_run(m, v, k.ONE):
            return k.ZERO


@kernel("u8(words, u8, u8)")
def _go_on(m, v, user):
    """Behind an iteration: out for its USER code, or around the loop again."""
    if user == AROUND:
        user = loop_tail(m, v)
    if user:
        to_user(m, v, user)
        return user
    return vcpu_run(m, v, k.ZERO)


@kernel("u8(words, u8, u8, u8, u8, u8, u8)")
def one_exit(m, v, op, reason, msr, value, info):
    """One exit from VM exit to the next entry, sleep or return to user space: its outcome code."""
    if m[hot(m, v) + k.HOT_MODE] == k.OUTSIDE_GUEST_MODE:
        start_run(m, v)
    mmio = op == OP_MMIO_WRITE or op == OP_MMIO_READ
    code = _vendor_run(m, v, op, reason, msr, value, k.ZERO if mmio else info)
    if code & k.CODE_COMPLETION == k.COMPLETION_REENTER:
        # Its next period may have run out as well.
        again = _exit_at_once(m, v) if op == OP_TIMER else IN_GUEST
        return code if again == IN_GUEST else code | _go_on(m, v, again)
    code = _leave_and_handle(m, v, op, reason, msr, value, info, code)
    return code | _go_on(m, v, code & k.CODE_USER if code & k.CODE_USER else AROUND)


@kernel("u8(words, u8, u8, u8)")
def behind_unicast(m, v, code, value):
    """The rest of such an exit whose sender has work of its own: an interrupt posted to itself, a request, a kick."""
    code = reenter(m, v, code)
    if code & k.CODE_COMPLETION == k.COMPLETION_REENTER:
        return code
    code = _leave_and_handle(m, v, OP_WRMSR, k.VMX_MSR_WRITE, k.MSR_X2APIC_ICR, value, k.ZERO, code)
    return code | _go_on(m, v, code & k.CODE_USER if code & k.CODE_USER else AROUND)


@kernel("u8(words, words, u8)")
def _looks_bad(m, exits, n):
    """0 when no record names a vCPU outside the machine or the xAPIC page: what first_bad has to look at one by one."""
    vcpus = m[k.H_NVCPUS]
    page = k.SVM_NPF if m[k.H_CONFIG] & k.CONFIG_SVM else k.VMX_EPT_MISCONFIG
    found = k.ZERO
    for i in range(n):
        word = exits[k.U(i) * k.EXIT_WORDS]
        found = found | k.U(word & k.LOW32 >= vcpus) | k.U(word >> k.U(32) == page)
    return found


@kernel("u8(words, words, u8)")
def first_bad(m, exits, n):
    """Index of the first exit that names a vCPU or an access outside the machine, or n."""
    if not _looks_bad(m, exits, n):
        return n
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


@inlined
@kernel("u8(words, words, words, u8, u8, u8)")
def _run_unicasts(m, exits, outcomes, first, n, far):
    """As many of the exits first..n-1 as are plain IPIs or notifications; the index of the first other one, or n.

    ``far``: the vCPUs' lines are far away, so what an exit will touch is asked for some exits before.
    """
    i = first
    while i < n:
        at = i * k.EXIT_WORDS
        out = i * k.OUTCOME_WORDS
        v = exits[at] & k.LOW32
        reason = exits[at] >> k.U(32)
        value = exits[at + k.U(2)]
        if v >= m[k.H_NVCPUS]:
            return i
        if far and i + AHEAD < n:
            _look_ahead(m, exits, (i + AHEAD) * k.EXIT_WORDS)
        if reason == k.NOTIFICATION:
            code = k.CODE_HARDWARE if process_notification(m, v) else k.ZERO
        elif reason == k.VMX_MSR_WRITE and exits[at + k.ONE] & k.LOW32 == k.MSR_X2APIC_ICR:
            code = unicast.send(m, v, value)
            if not code:
                return i
            if not unicast.again(m, v):
                code = behind_unicast(m, v, code, value)
        else:
            return i
        outcomes[out] = code
        outcomes[out + k.ONE] = k.ZERO
        i = i + k.ONE
    return n


@inlined
@kernel("u8(words, words, u8)")
def _look_ahead(m, exits, at):
    """Prefetch for the exit whose record begins at a word."""
    if exits[at] >> k.U(32) == k.NOTIFICATION:
        prefetch(m, vec(m, exits[at] & k.LOW32))
    elif exits[at + k.ONE] & k.LOW32 == k.MSR_X2APIC_ICR:
        unicast.look_ahead(m, exits[at + k.U(2)] >> k.ICR_DEST_SHIFT)
    return k.ZERO


@kernel("u8(words, words, words, u8, u8)")
def run(m, exits, outcomes, first, n):
    """Exits first..n-1; the index of the first one that needs the Python dispatcher, or n.

    Every vCPU index is checked again here: the array may belong to another thread that changes it.
    """
    if first >= n:
        return n
    plain = unicast.possible(m) and not m[k.H_HANDLERS]
    i = first
    while True:
        if plain:
            i = _run_unicasts(m, exits, outcomes, i, n, m[k.H_NVCPUS] > NEAR)
        if i >= n:
            return n
        at = i * k.EXIT_WORDS
        out = i * k.OUTCOME_WORDS
        v = exits[at] & k.LOW32
        reason = exits[at] >> k.U(32)
        msr = exits[at + k.ONE] & k.LOW32
        info = exits[at + k.ONE] >> k.U(32)
        if v >= m[k.H_NVCPUS]:
            return i
        outcomes[out + k.ONE] = k.ZERO
        if reason == k.NOTIFICATION:
            outcomes[out] = k.CODE_HARDWARE if process_notification(m, v) else k.ZERO
        else:
            op = operation(m, reason, info)
            if op == OP_NONE or m[k.H_HANDLERS] or m[hot(m, v) + k.HOT_FLAGS] & k.FLAG_L2:
                return i
            outcomes[out] = one_exit(m, v, op, reason, msr, exits[at + k.U(2)], info)
            if op == OP_RDMSR or op == OP_MMIO_READ:
                outcomes[out + k.ONE] = m[own(m, v) + k.K_MSR_DATA]
        i = i + k.ONE
