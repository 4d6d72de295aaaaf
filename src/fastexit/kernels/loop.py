"""The run loop of one vCPU, compiled: vcpu_enter_guest and vcpu_run, from a VM exit to the next VM entry.

Models: what exits/dispatcher.py models, function by function, under the same names and in the same order, on the same
words; a test compares the names, and property tests compare the two byte by byte. steps.py has the steps that both
call, batch.py runs many exits through this loop, cdoor.py opens it to C. ``row`` is the exit's row of exits/table.py in
one word.

Not modelled here: exits of L2, failed entries, vectoring information, and exits without a compiled handler. The Python
dispatcher does those.
"""

import numpy as np

from fastexit.exits.table import SVM, VMX, packed, packed_rows
from fastexit.reasons import VmxExit

from ..jit.atomics import load_acquire
from ..jit.declare import inlined, kernel
from . import bus, hypercall, meter, steps, steptime, virtualized
from . import typed as k
from .cr8 import sync_cr8_to_lapic
from .eoi import take_pv_eoi
from .events import inject_events
from .fastpath import handle_preemption_timer, hlt, preemption_timer, reenter, refuse
from .fastpath import wrmsr as fast_wrmsr
from .halt import emulate_halt
from .msr import emulate_rdmsr, emulate_wrmsr, skip
from .shared import begin_targets, hot, own, sent_on_the_way
from .tick import trace_wait

VMX_ROWS, SVM_ROWS = (np.array(packed_rows(rows), dtype=np.uint64) for rows in (VMX, SVM))
"""exits/table.py as the loop has it, by exit reason: operation, instruction length, shortcut; 0 for what it leaves to
Python."""
WRMSR_ROW = k.U(packed(VMX[VmxExit.MSR_WRITE]))
IN_GUEST, AROUND = k.ZERO, k.NONE
"""Result of vcpu_enter_guest other than a USER code: in the guest, or once more around the loop of vcpu_run."""


@kernel("u8(words, u8, u8)")
def find_row(m, reason, info):
    """Find an exit's row with the operation that it asks for; 0, OP_NONE, when nothing compiled knows it."""
    if m[k.H_CONFIG] & k.CONFIG_SVM:
        row = SVM_ROWS[reason] if reason < k.U(len(SVM_ROWS)) else k.ZERO
    else:
        row = VMX_ROWS[reason] if reason < k.U(len(VMX_ROWS)) else k.ZERO
    if not row & k.ROW_BY_INFO:
        return row
    if row & k.ROW_OPERATION == k.OP_MSR:
        op = k.OP_WRMSR if info else k.OP_RDMSR
    elif row & k.ROW_OPERATION == k.OP_IO:
        op = k.OP_IO_READ if bus.io_reads(m, info) else k.OP_IO_WRITE
    else:
        op = k.OP_MMIO_WRITE if info & k.MMIO_WRITE else k.OP_MMIO_READ
    return row & ~k.ROW_OPERATION | op


@kernel("u8(words, u8, u8)")
def handles(m, v, row):
    """Tell whether this loop does an exit of the row: it has an operation, no handler was replaced, L2 does not run."""
    if not row & k.ROW_OPERATION or m[k.H_HANDLERS] or m[hot(m, v) + k.HOT_FLAGS] & k.FLAG_L2:
        return k.ZERO
    return k.ONE


@kernel("u8(u8)")
def _length(row):
    """Give the length of the instruction that exits."""
    return row >> k.ROW_LENGTH_SHIFT


@kernel("u8(words, u8, u8, u8, u8)")
def _fast_stage(m, v, row, msr, value):
    """Call the fast handler of an exit, wherever this generation hooks it; refuse everything else."""
    op = row & k.ROW_OPERATION
    if op == k.OP_WRMSR:
        if m[k.H_CONFIG] & k.CONFIG_SVM and m[k.H_TRAITS] & k.T_SVM_EXIT_32:
            return refuse(k.RF_SVM_EXIT_CODE if m[k.H_CONFIG] & k.CONFIG_FASTPATH else k.RF_SWITCHED_OFF)
        return fast_wrmsr(m, v, msr, value, _length(row))
    if op == k.OP_HLT:
        return hlt(m, v)
    if op == k.OP_TIMER:
        return preemption_timer(m, v)
    return refuse(k.RF_NOT_AN_MSR_WRITE)


@inlined
@kernel("u8(words, u8, u8, u8, u8, u8)")
def operate(m, v, row, msr, value, info):
    """Do what an exit asks for, as its generic handler does: an outcome code.

    A hypercall has RCX in ``info``, RDX in ``value`` and R8 in the place of an MSR; XMM registers are in layout.XMM.
    """
    op = row & k.ROW_OPERATION
    if op == k.OP_WRMSR:
        return emulate_wrmsr(m, v, msr, value, _length(row))
    if op == k.OP_RDMSR:
        return emulate_rdmsr(m, v, msr, _length(row))
    if op == k.OP_HLT:
        return emulate_halt(m, v)
    if op == k.OP_TIMER:
        return handle_preemption_timer(m, v)
    if op == k.OP_MMIO_WRITE or op == k.OP_MMIO_READ:
        access = (info & k.ACCESS_LENGTH) | (k.ACCESS_WRITE if op == k.OP_MMIO_WRITE else k.ZERO)
        return bus.mmio(m, v, msr, access, value, _length(row))
    if op == k.OP_IO_WRITE or op == k.OP_IO_READ:
        return bus.io(m, v, info, value, _length(row))
    if op == k.OP_HYPERCALL:
        how = k.CALL_BITS64 | _length(row)
        return hypercall.emulate(m, v, k.ZERO, k.ZERO, info, value, k.ZERO, k.ZERO, msr, how)
    return virtualized.operate(m, v, op, msr, value, info) if op >= virtualized.APIC_ACCESS else k.ZERO


@kernel("u8(words)")
def traces_late(m):
    """Tell whether kvm_exit comes from handle_exit in this generation."""
    svm = m[k.H_CONFIG] & k.CONFIG_SVM
    return m[k.H_TRAITS] & (k.T_TRACE_EXIT_LATE_SVM if svm else k.T_TRACE_EXIT_LATE_VMX)


# ---------------------------------------------------------------------------------------------------------------- doors


@inlined
@kernel("u8(words, u8, u8, u8, u8, u8, u8)")
def run_exit(m, v, row, reason, msr, value, info):
    """Run one exit until the vCPU is in the guest again, waits, or is back in user space: its outcome code."""
    if m[hot(m, v) + k.HOT_MODE] == k.OUTSIDE_GUEST_MODE:
        come_in(m, v)
    if m[k.H_CONFIG] & k.CONFIG_COSTS:
        meter.reset(m, v)
    begin_targets(m, v)
    told = m[own(m, v) + k.K_SENT]
    code = vendor_run(m, v, row, reason, msr, value, info)
    if code & k.CODE_COMPLETION != k.COMPLETION_REENTER:
        return after_run(m, v, row, reason, msr, value, info, code)
    timer = row & k.ROW_OPERATION == k.OP_TIMER
    if not timer and not told:
        return code
    # The timer's next period may have run out as well.
    again = exit_at_once(m, v) if timer else IN_GUEST
    return code | (sent(m, v) if again == IN_GUEST else go_on(m, v, again))


@kernel("u8(words, u8)")
def kvm_run(m, v):
    """Call KVM_RUN: 0 when the vCPU is in the guest then, CODE_BLOCKED, or the USER code of a return."""
    if m[k.H_CONFIG] & k.CONFIG_COSTS:
        meter.reset(m, v)
    if load_acquire(m, hot(m, v) + k.HOT_MODE) != k.OUTSIDE_GUEST_MODE:
        return k.ZERO
    m[own(m, v) + k.K_TARGETS] = k.ZERO
    user = steps.begin_run(m, v)
    if not user:
        user = steps.pre_run(m, v)
    if user:
        return_to_user(m, v, user)
        return user
    user = vcpu_run(m, v, k.ZERO)
    sent(m, v)  # there is no outcome, only targets
    return user


@kernel("u8(words, u8)")
def start_run(m, v):
    """Take a vCPU from user space into the guest, on the caller's word that it is there."""
    come_in(m, v)
    sent(m, v)
    return k.ZERO


@kernel("u8(words, u8)")
def come_in(m, v):
    """start_run for an exit that is about to happen: what the entry asks of other vCPUs is for that exit's outcome.

    A return of KVM_RUN that stands before the entry (an EOI for user space's IOAPIC, say) happens, and user space then
    calls KVM_RUN again.
    """
    m[own(m, v) + k.K_TARGETS] = k.ZERO
    while True:
        user = steps.begin_run(m, v)
        steps.wake_up(m, v)
        if user:
            return_to_user(m, v, user)
        elif not vcpu_run(m, v, k.ONE):
            return k.ZERO


@kernel("u8(words, u8)")
def leave_guest(m, v):
    """Take the vCPU out of the guest, or out of its sleep, and out of KVM_RUN, as a signal does.

    What the ioctl then does has a list of targets of its own.
    """
    m[own(m, v) + k.K_TARGETS] = k.ZERO
    if load_acquire(m, hot(m, v) + k.HOT_MODE) != k.OUTSIDE_GUEST_MODE:
        out_of_guest(m, v)
        steps.loop_tail(m, v)
    elif m[own(m, v) + k.K_IN_RUN]:
        steps.wake_up(m, v)
        if m[own(m, v) + k.K_MP_STATE] != k.MP_UNINITIALIZED:
            steps.loop_tail(m, v)
    else:
        return k.ZERO
    return steps.finish_run(m, v, k.NONE, k.ZERO)


@kernel("u8(words, u8)")
def out_of_guest(m, v):
    """Steps 13-18: the host has the pCPU again, the vCPU's thread is still inside KVM_RUN."""
    sync_cr8_to_lapic(m, v)
    guest_mode_outside(m, v)
    irq_window(m, v)
    guest_time_stop(m, v)
    srcu_lock(m, v)
    return sync_from_vapic(m, v)


# ---------------------------------------------------------------------------------------- from VM exit to handle_exit


@inlined
@kernel("u8(words, u8, u8, u8, u8, u8, u8)")
def vendor_run(m, v, row, reason, msr, value, info):
    """Step 11 behind VMEXIT and the loop around it: the code of the fast handler, in the guest again if REENTER."""
    sync_cr8_to_lapic(m, v)
    if not traces_late(m):
        trace_exit(m, v, row, reason, msr, info)
    locks = steptime.exits(m, v) if m[k.H_CONFIG] & k.CONFIG_COSTS else k.ZERO
    code = k.ZERO
    if not m[k.H_TRAITS] & k.T_HOOK_IRQOFF:
        code = reenter(m, v, _fast_stage(m, v, row, msr, value))
        if code & k.CODE_COMPLETION == k.COMPLETION_REENTER:
            steps.trace_reentry(m, v)
    if m[k.H_CONFIG] & k.CONFIG_COSTS:
        steptime.ran(m, v, row & k.ROW_OPERATION, msr, info, code, locks)
    return code


@inlined
@kernel("u8(words, u8, u8, u8, u8, u8, u8, u8)")
def after_run(m, v, row, reason, msr, value, info, code):
    """Steps 13-20, the loop's tail and the next entry: everything that a fast re-entry avoids."""
    code = leave_and_handle(m, v, row, reason, msr, value, info, code)
    return code | go_on(m, v, code & k.CODE_USER if code & k.CODE_USER else AROUND)


@kernel("u8(words, u8, u8)")
def go_on(m, v, user):
    """Go on behind an iteration: out for its USER code, or AROUND the loop again."""
    if user == AROUND:
        user = steps.loop_tail(m, v)
    if user:
        return_to_user(m, v, user)
    else:
        user = vcpu_run(m, v, k.ZERO)
    return user | sent(m, v)


@kernel("u8(words, u8)")
def sent(m, v):
    """Effects of what was sent on the way to the entry, for the outcome of the exit before it."""
    effects = m[own(m, v) + k.K_SENT] & k.CODE_EFFECTS
    m[own(m, v) + k.K_SENT] = k.ZERO
    return effects


@inlined
@kernel("u8(words, u8, u8, u8, u8, u8, u8, u8)")
def leave_and_handle(m, v, row, reason, msr, value, info, code):
    """Steps 13-20 of an exit that did not re-enter: its outcome code."""
    if m[k.H_CONFIG] & k.CONFIG_COSTS:
        steptime.leaves(m, v)
    guest_mode_outside(m, v)
    code = handle_exit_irqoff(m, v, row, msr, value, code)
    if m[k.H_CONFIG] & k.CONFIG_COSTS:
        steptime.left(m, v, row & k.ROW_OPERATION, msr, info, code)
    irq_window(m, v)
    guest_time_stop(m, v)
    srcu_lock(m, v)
    code = code | sync_from_vapic(m, v)
    if code & k.CODE_COMPLETION != k.COMPLETION_USERSPACE:
        code = handle_exit(m, v, row, reason, msr, value, info, code)
    return code


@kernel("u8(words, u8)")
def guest_mode_outside(m, v):
    """Step 13: vcpu->mode := OUTSIDE_GUEST_MODE."""
    m[hot(m, v) + k.HOT_MODE] = k.OUTSIDE_GUEST_MODE
    return k.ZERO


@kernel("u8(words, u8, u8, u8, u8, u8)")
def handle_exit_irqoff(m, v, row, msr, value, code):
    """Step 14: the vendor's handler with IRQs still off; the seed, 5.6 and 5.7 handle WRMSR here."""
    return _fast_stage(m, v, row, msr, value) if m[k.H_TRAITS] & k.T_HOOK_IRQOFF else code


@kernel("u8(words, u8)")
def irq_window(m, v):
    """Step 15: host interrupts are let in, among them the one that caused the exit."""
    host = own(m, v)
    m[host + k.K_IRQS_OFF] = k.ZERO
    m[host + k.K_EXITS] = m[host + k.K_EXITS] + k.ONE
    m[host + k.K_IRQ_WINDOWS] = m[host + k.K_IRQ_WINDOWS] + k.ONE
    return k.ZERO


@kernel("u8(words, u8)")
def guest_time_stop(m, v):
    """Step 16: guest time ends, preemption is on again; a wait before the entry is traced here up to 5.15."""
    m[own(m, v) + k.K_GUEST_TIME] = k.ZERO
    if m[own(m, v) + k.K_WAIT_DELTA]:
        trace_wait(m, v)
    m[own(m, v) + k.K_PREEMPT_OFF] = k.ZERO
    return k.ZERO


@kernel("u8(words, u8)")
def srcu_lock(m, v):
    """Step 17: the SRCU read lock is taken again."""
    host = own(m, v)
    m[host + k.K_SRCU] = k.ONE
    m[host + k.K_SRCU_LOCKS] = m[host + k.K_SRCU_LOCKS] + k.ONE
    return k.ZERO


@kernel("u8(words, u8)")
def sync_from_vapic(m, v):
    """Step 18: did the guest end its interrupt by the paravirtual flag? Effect code."""
    return take_pv_eoi(m, v) if m[own(m, v) + k.K_ATTENTION] else k.ZERO


@kernel("u8(words, u8, u8)")
def return_to_user(m, v, code):
    """Return from KVM_RUN for the USER field of an outcome code; a signal makes it -EINTR, UNKNOWN is -EINVAL."""
    user = code & k.CODE_USER
    if m[k.H_CONFIG] & k.CONFIG_COSTS:
        meter.charge(m, v, k.P_USER_EXIT, k.ONE)
    errno = k.EINTR if user == k.USER_INTR else k.EINVAL if user == k.USER_UNKNOWN else k.ZERO
    return steps.finish_run(m, v, (user >> k.CODE_USER_SHIFT) - k.ONE, errno)


@kernel("u8(words, u8, u8, u8, u8, u8, u8, u8)")
def handle_exit(m, v, row, reason, msr, value, info, code):
    """Step 20: the generic handler unless the fast path was there already."""
    if traces_late(m):
        trace_exit(m, v, row, reason, msr, info)
    if m[k.H_CONFIG] & k.CONFIG_COSTS:
        meter.charge(m, v, k.P_EXIT_CHECKS, k.ONE)
    return generic(m, v, row, msr, value, info, code)


@kernel("u8(words, u8, u8, u8, u8, u8, u8)")
def generic(m, v, row, msr, value, info, code):
    """The tail of both vendors' handle_exit: completion, or the operation that is the generic handler."""
    completion = code & k.CODE_COMPLETION
    if completion == k.COMPLETION_SKIP:
        # The skip's verdict is ignored, as it was from the seed to 5.7: a KVM_EXIT_DEBUG is lost.
        skip(m, v, _length(row))
        if m[k.H_CONFIG] & k.CONFIG_COSTS:
            meter.charge(m, v, k.P_SKIP, k.ONE)
        return code
    if completion != k.COMPLETION_NONE:
        return code
    direct = row & k.ROW_SHORTCUT and m[k.H_CONFIG] & k.CONFIG_RETPOLINE
    if not direct:
        # Everything else is an indirect call, which a retpoline makes dear.
        m[own(m, v) + k.K_INDIRECT_CALLS] = m[own(m, v) + k.K_INDIRECT_CALLS] + k.ONE
    if m[k.H_CONFIG] & k.CONFIG_COSTS:
        steptime.dispatched(m, v, k.ONE if direct else k.ZERO)
    code = code | operate(m, v, row, msr, value, info)
    if m[k.H_CONFIG] & k.CONFIG_COSTS:
        steptime.work(m, v, row & k.ROW_OPERATION, msr, info, code, k.ONE)
    return code


@kernel("u8(words, u8, u8, u8, u8, u8)")
def trace_exit(m, v, row, reason, msr, info):
    """kvm_exit. What ``info`` has of an access to memory or of a hypercall is no exit information."""
    op = row & k.ROW_OPERATION
    other = op == k.OP_MMIO_WRITE or op == k.OP_MMIO_READ or op == k.OP_HYPERCALL
    info2 = virtualized.second_info(op, msr) if op >= virtualized.APIC_ACCESS else k.ZERO
    return steps.trace_exit(m, v, reason, k.ZERO if other else info, info2, k.ZERO)


# ------------------------------------------------------------------------------------------------- towards VM entry


@kernel("u8(words, u8, u8)")
def vcpu_run(m, v, forced):
    """Loop until the vCPU is in the guest (0), waits (CODE_BLOCKED) or KVM_RUN returns (a USER code).

    ``forced`` is the caller's word that the vCPU runs guest code, whatever its mp_state said.
    """
    rounds = k.ZERO
    while True:
        if forced or m[own(m, v) + k.K_MP_STATE] == k.MP_RUNNABLE:
            user = vcpu_enter_guest(m, v, forced)
            if user == IN_GUEST:
                return k.ZERO
        else:
            user = steps.block(m, v)
            if user == steps.BLOCKED:
                if m[k.H_CONFIG] & k.CONFIG_COSTS:
                    meter.charge(m, v, k.P_BLOCK, k.ONE)
                return k.CODE_BLOCKED
            if user == steps.AGAIN:
                continue
            if user == k.ZERO:
                user = AROUND
        if user == AROUND:
            user = steps.loop_tail(m, v)
            rounds = rounds + k.ONE
            if not user and rounds >= k.MOST_ROUNDS:
                user = give_up(m, v, forced)
        if user:
            return_to_user(m, v, user)
            return user


@kernel("u8(words, u8, u8)")
def give_up(m, v, forced):
    """Give up entering behind MOST_ROUNDS: the USER code of the signal that alone ends such rounds in KVM, too.

    From 7.1 on an interrupt that AVIC has to deliver again serves the window that user space asked for, which is then
    asked for again, and both have the entry cancelled. Where the caller says that the vCPU runs guest code, user space
    has asked for no window.
    """
    if not forced:
        return k.USER_INTR
    m[own(m, v) + k.K_USER_WINDOW] = k.ZERO
    return k.ZERO


@kernel("u8(words, u8, u8)")
def vcpu_enter_guest(m, v, forced):
    """Try to enter, steps 1-11: IN_GUEST, AROUND (the loop goes round again) or a USER code."""
    host = own(m, v)
    if m[hot(m, v) + k.HOT_REQUESTS] or m[host + k.K_USER_WINDOW]:
        user = steps.service_requests(m, v)
        if user:
            return user
        waits = inject_events(m, v)
        if m[k.H_CONFIG] & k.CONFIG_COSTS:
            steptime.injected(m, v)
        if waits == steps.BLOCKED and not forced:
            return AROUND
    if forced:
        m[host + k.K_MP_STATE] = k.MP_RUNNABLE
    preempt_disable(m, v)
    irqs_off(m, v)
    runs = steps.enter(m, v)
    if m[k.H_CONFIG] & k.CONFIG_COSTS:
        steptime.entered(m, v, runs)
    if runs == steps.ENTERED:
        guest_time_start(m, v)
        steps.vm_entry(m, v)
        return exit_at_once(m, v)
    m[host + k.K_PREEMPT_OFF] = k.ZERO
    return AROUND


@kernel("u8(words, u8)")
def exit_at_once(m, v):
    """Run the exits of a guest that leaves before its first instruction: IN_GUEST, AROUND or a USER code.

    KVM forces an exit by the preemption timer, or by a host interrupt where there is none.
    """
    svm = m[k.H_CONFIG] & k.CONFIG_SVM
    reason = k.SVM_INTERRUPT if svm else k.VMX_PREEMPTION_TIMER
    while steps.exits_at_once(m, v):
        row = find_row(m, reason, k.ZERO)
        code = vendor_run(m, v, row, reason, k.ZERO, k.ZERO, k.ZERO)
        again = code & k.CODE_COMPLETION == k.COMPLETION_REENTER
        if not again:
            code = leave_and_handle(m, v, row, reason, k.ZERO, k.ZERO, k.ZERO, code)
        sent_on_the_way(m, v, code)
        if not again:
            return code & k.CODE_USER if code & k.CODE_USER else AROUND
    return IN_GUEST


@kernel("u8(words, u8)")
def preempt_disable(m, v):
    """Step 4: preemption off, the vendor prepares the switch."""
    m[own(m, v) + k.K_PREEMPT_OFF] = k.ONE
    return k.ZERO


@kernel("u8(words, u8)")
def irqs_off(m, v):
    """Step 5: host interrupts off. Before mode says IN_GUEST: a notification then stays pending till the entry."""
    m[own(m, v) + k.K_IRQS_OFF] = k.ONE
    return k.ZERO


@kernel("u8(words, u8)")
def guest_time_start(m, v):
    """Step 10: guest time is accounted from here."""
    m[own(m, v) + k.K_GUEST_TIME] = k.ONE
    return k.ZERO


# ------------------------------------------------------------------------------------------- behind the short way


@kernel("u8(words, u8, u8, u8)")
def behind_unicast(m, v, code, value):
    """Finish an IPI sent by unicast.send when the sender cannot re-enter at once.

    It has an interrupt that was posted to itself, a request or a kick.
    """
    code = reenter(m, v, code)
    if code & k.CODE_COMPLETION == k.COMPLETION_REENTER:
        return code
    return after_run(m, v, WRMSR_ROW, k.VMX_MSR_WRITE, k.MSR_X2APIC_ICR, value, k.ZERO, code)
