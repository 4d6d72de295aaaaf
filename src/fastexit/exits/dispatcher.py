"""The run loop of one vCPU in pure Python: vcpu_enter_guest and vcpu_run, from a VM exit to the next VM entry.

Models: vcpu_run and vcpu_enter_guest of arch/x86/kvm/x86.c, one method a step, each of which really changes the state
it is about: requests, IRQ flag, mode, SRCU, preemption, guest time, statistics. insight/walk.STEPS numbers the steps. A
vCPU rests in guest mode between two exits; so an exit runs the second half of one iteration and, unless the fast path
goes straight back, the first half of the next. Work on the APIC itself is done by the compiled kernels.

Not modelled: MMU, FPU, debug registers, PMU and steal-time steps (no state that an interrupt exit could see).
vmx.py and svm.py hold what differs between vendors.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastexit import layout as L
from fastexit import regs as R
from fastexit.exits.exit import Exit, Vendor
from fastexit.exits.handlers import user_code
from fastexit.jit.declare import load
from fastexit.outcome import (
    CODE_ADDRESSED,
    CODE_BLOCKED,
    CODE_COMPLETION,
    CODE_DELIVERY,
    CODE_EFFECTS,
    CODE_FAULT,
    CODE_NOT_IN_GUEST,
    CODE_REFUSAL_SHIFT,
    CODE_USER,
    CODE_USER_SHIFT,
    COMPLETION_NONE,
    COMPLETION_REENTER,
    COMPLETION_SKIP,
    COMPLETION_USERSPACE,
    REENTRIES,
    SHORT,
    SHORT_CODES,
    Outcome,
    Refusal,
    addressed,
)
from fastexit.profile import Profile
from fastexit.reasons import VMX_FAILED_VMENTRY, KvmExit, VmxExit
from fastexit.targets import outcome_of
from fastexit.traits import Trait

if TYPE_CHECKING:
    from collections.abc import Callable

    from fastexit.vcpu import Vcpu

BLOCKED, AGAIN = 1, 2
"""What vcpu_block came to, as kernels/steps.py has it."""
IN_GUEST, AROUND = 0, L.NONE
"""What a try to enter came to, besides the USER codes."""
_FROM_HANDLERS = CODE_DELIVERY | CODE_FAULT | CODE_USER
_NO_FAST_HANDLER = Refusal.NOT_AN_MSR_WRITE << CODE_REFUSAL_SHIFT
_FAILED_ENTRY = Refusal.FAILED_VMENTRY << CODE_REFUSAL_SHIFT


class Dispatcher:
    """One machine's run loop. ``vendor`` gives the tables, ``profile`` the generation."""

    kind = "python"

    def __init__(self, memory: memoryview, handle: int, vendor: Vendor, profile: Profile) -> None:
        self.mem = memory
        self.handle = handle
        self.vendor = vendor
        self.profile = profile
        self.hook_irqoff: bool = bool(profile.traits & Trait.HOOK_IRQOFF)
        self.v_tpr_stays: bool = bool(profile.traits & Trait.V_TPR_KEPT_BY_AVIC)
        self.fast_exit: Callable[[int, int, int], int] = self._first_fast_exit
        self.kept_entry_info: int = 0 if memory[L.H_CONFIG] & L.CONFIG_SVM else ~R.VECTORING_INFO_VALID & 0xFFFF_FFFF
        self.wrmsr_fast: bool = not self.hook_irqoff and vendor.wrmsr_reason in vendor.fast_run

    def _first_fast_exit(self, where: int, msr: int, value: int) -> int:
        self.fast_exit = load("fast_exit")
        return self.fast_exit(where, msr, value)

    def __repr__(self) -> str:
        vendor = "svm" if self.mem[L.H_CONFIG] & L.CONFIG_SVM else "vmx"
        return f"<dispatcher {self.kind!r}: {vendor}, kernel {self.profile.name}>"

    # ------------------------------------------------------------------------------------------------ doors

    def wrmsr(self, v: Vcpu, msr: int, value: int, code: int | None = None) -> Outcome:
        """A guest WRMSR. Steps 11, 12, 8 and 9 of a fast exit are one kernel call; a re-entry ends here.

        ``code`` is what that call gave, if it has been made.
        """
        if self.wrmsr_fast:
            if code is None:
                code = self.fast_exit(v.where, msr, value)
            if code == CODE_NOT_IN_GUEST:
                self.come_in(v)
                asked = self.mem[v.own + L.K_SENT]  # which the one call does not add to its outcome
                code = CODE_NOT_IN_GUEST if asked else self.fast_exit(v.where, msr, value)
            if code < SHORT_CODES:
                return SHORT[code]
            if code & CODE_ADDRESSED:
                return REENTRIES.get(code) or addressed(code)
            if code & CODE_COMPLETION == COMPLETION_REENTER:
                return outcome_of(self.mem, v.index, code)
        exit = Exit(self.vendor.wrmsr_reason, msr, value, self.vendor.wrmsr_info1, length=R.INSN_LEN_WRMSR)
        code = self.run_exit(v, exit) if code in (None, CODE_NOT_IN_GUEST) else self.after_run(v, exit, code)
        return outcome_of(self.mem, v.index, code)

    def run_exit(self, v: Vcpu, exit: Exit) -> int:
        """Any exit, until the vCPU is in the guest again, waits, or is back in user space: its outcome code."""
        if self.mem[v.hot + L.HOT_MODE] == R.OUTSIDE_GUEST_MODE:
            self.come_in(v)
        told = self.begin_targets(v)
        code = self.vendor_run(v, exit)
        if code & CODE_COMPLETION != COMPLETION_REENTER:
            return self.after_run(v, exit, code)
        timer = exit.reason == self.vendor.forced_reason
        if not timer and not told:
            return code
        # The timer's next period may have run out as well.
        again = self.exit_at_once(v) if timer else IN_GUEST
        return code | (self.sent(v) if again == IN_GUEST else self.go_on(v, again))

    def kvm_run(self, v: Vcpu) -> bool:
        """KVM_RUN as user space calls it, or a sleeper that goes on: True when the vCPU is in the guest then.

        False: it waits (for INIT, SIPI or what ends a halt), or KVM_RUN has returned; Vcpu.exit_reason tells.
        """
        if self.mem[v.hot + L.HOT_MODE] != R.OUTSIDE_GUEST_MODE:
            return True
        self.mem[v.own + L.K_TARGETS] = 0
        user = load("begin_run")(self.handle, v.index) or load("pre_run")(self.handle, v.index)
        if user:
            self.return_to_user(v, user)
            return False
        runs = not self.vcpu_run(v)
        self.sent(v)  # there is no outcome, only targets
        return runs

    def begin_targets(self, v: Vcpu) -> int:
        """An exit's list of targets is empty, or has what the entry that it stands for asked of others: its effects."""
        told = self.mem[v.own + L.K_SENT]
        if not told:
            self.mem[v.own + L.K_TARGETS] = 0
        return told

    def start_run(self, v: Vcpu) -> None:
        """KVM_RUN up to the entry, on the caller's word that the vCPU runs guest code, whatever its mp_state says."""
        self.come_in(v)
        self.sent(v)

    def come_in(self, v: Vcpu) -> None:
        """start_run for an exit that is about to happen: what the entry asks of other vCPUs is for that exit's outcome.

        A return to user space that stands before the entry (an EOI for its IOAPIC, say) happens, and user space calls
        KVM_RUN again.
        """
        self.mem[v.own + L.K_TARGETS] = 0
        code = CODE_USER
        while code:
            code = load("begin_run")(self.handle, v.index)
            load("wake_up")(self.handle, v.index)
            if code:
                self.return_to_user(v, code)
            else:
                code = self.vcpu_run(v, forced=True)

    def leave_guest(self, v: Vcpu) -> None:
        """A signal takes the vCPU out of the guest, or out of its sleep, and out of KVM_RUN, as any vCPU ioctl needs.

        The way out is an iteration that stays in the kernel, so ticks are seen on it. It is not traced. A sleeper's
        HOT_BLOCKED stays: whoever has something for it says WAKE, and user space calls KVM_RUN again. What the ioctl
        then does has a list of targets of its own.
        """
        self.mem[v.own + L.K_TARGETS] = 0
        if self.mem[v.hot + L.HOT_MODE] != R.OUTSIDE_GUEST_MODE:
            self.out_of_guest(v)
            self.loop_tail(v)
        elif self.mem[v.own + L.K_IN_RUN]:
            load("wake_up")(self.handle, v.index)
            if self.mem[v.own + L.K_MP_STATE] != R.MP_UNINITIALIZED:
                self.loop_tail(v)
        else:
            return
        load("finish_run")(self.handle, v.index, L.NONE, 0)

    def out_of_guest(self, v: Vcpu) -> None:
        """Steps 13-18: the host has the pCPU again, the vCPU's thread is still inside KVM_RUN."""
        self.sync_cr8_to_lapic(v)
        self.guest_mode_outside(v)
        self.irq_window(v)
        self.guest_time_stop(v)
        self.srcu_lock(v)
        self.sync_from_vapic(v)

    # ------------------------------------------------------------------------------ from VM exit to handle_exit

    def vendor_run(self, v: Vcpu, exit: Exit) -> int:
        """Step 11 behind VMEXIT: kvm_exit, an event cut short queued again, then the fast handler if there is one."""
        self.sync_cr8_to_lapic(v)
        if not self.vendor.trace_exit_late:
            self.trace_exit(v, exit)
        cut_short = self.vendor.cut_short(exit)
        if cut_short & R.VECTORING_INFO_VALID and not exit.failed_entry:
            load("requeue")(self.handle, v.index, cut_short)
        fast = None if self.hook_irqoff else self.vendor.fast_run.get(exit.reason)
        if fast is not None and not exit.failed_entry:
            return fast(v, exit)
        return _NO_FAST_HANDLER if fast is None else _FAILED_ENTRY

    def sync_cr8_to_lapic(self, v: Vcpu) -> None:
        """SVM: TPR is what the VMCB's four bits of it say."""
        if self.mem[v.hot + L.HOT_FLAGS] & L.FLAG_CR8_FREE or self.v_tpr_stays:
            load("sync_cr8_to_lapic")(self.handle, v.index)

    def after_run(self, v: Vcpu, exit: Exit, code: int) -> int:
        """Steps 13-20, the loop's tail and the next entry: everything that a fast re-entry avoids."""
        code = self.leave_and_handle(v, exit, code)
        return code | self.go_on(v, code & CODE_USER or AROUND)

    def go_on(self, v: Vcpu, user: int) -> int:
        """Behind an iteration: out for its USER code, or AROUND the loop again."""
        if user == AROUND:
            user = self.loop_tail(v)
        if user:
            self.return_to_user(v, user)
        else:
            user = self.vcpu_run(v)
        return user | self.sent(v)

    def sent(self, v: Vcpu) -> int:
        """Effects of what was sent on the way to the entry, for the outcome of the exit before it."""
        effects = self.mem[v.own + L.K_SENT] & CODE_EFFECTS
        self.mem[v.own + L.K_SENT] = 0
        return effects

    def leave_and_handle(self, v: Vcpu, exit: Exit, code: int) -> int:
        """Steps 13-20: out of the guest, and what the exit asked for."""
        self.guest_mode_outside(v)
        code = self.handle_exit_irqoff(v, exit, code)
        self.irq_window(v)
        self.guest_time_stop(v)
        self.srcu_lock(v)
        code |= self.sync_from_vapic(v)
        if code & CODE_COMPLETION != COMPLETION_USERSPACE:
            code = self.handle_exit(v, exit, code)
        return code

    def guest_mode_outside(self, v: Vcpu) -> None:
        """Step 13: vcpu->mode := OUTSIDE_GUEST_MODE."""
        self.mem[v.hot + L.HOT_MODE] = R.OUTSIDE_GUEST_MODE

    def handle_exit_irqoff(self, v: Vcpu, exit: Exit, code: int) -> int:
        """Step 14: the vendor's handler with IRQs still off; the seed, 5.6 and 5.7 handle WRMSR here."""
        if self.hook_irqoff:
            fast = self.vendor.fast_irqoff.get(exit.reason)
            code = fast(v, exit) if fast is not None else _NO_FAST_HANDLER
        if exit.intr_info and exit.reason == VmxExit.EXTERNAL_INTERRUPT and not self.mem[L.H_CONFIG] & L.CONFIG_SVM:
            code |= load("external_interrupt")(self.handle, v.index, exit.intr_info)
        return code

    def irq_window(self, v: Vcpu) -> None:
        """Step 15: host interrupts are let in, among them the one that caused the exit."""
        mem, own = self.mem, v.own
        mem[own + L.K_IRQS_OFF] = 0
        mem[own + L.K_EXITS] += 1
        mem[own + L.K_IRQ_WINDOWS] += 1

    def guest_time_stop(self, v: Vcpu) -> None:
        """Step 16: guest time ends, preemption is on again; a wait before the entry is traced here up to 5.15."""
        mem, own = self.mem, v.own
        mem[own + L.K_GUEST_TIME] = 0
        if mem[own + L.K_WAIT_DELTA]:
            load("trace_wait")(self.handle, v.index)
        mem[own + L.K_PREEMPT_OFF] = 0

    def srcu_lock(self, v: Vcpu) -> None:
        """Step 17: the SRCU read lock is taken again; memslots and MSR filters may be looked at from here."""
        mem, own = self.mem, v.own
        mem[own + L.K_SRCU] = 1
        mem[own + L.K_SRCU_LOCKS] += 1

    def sync_from_vapic(self, v: Vcpu) -> int:
        """Step 18: did the guest end its interrupt by the paravirtual flag? Effect code."""
        return load("take_pv_eoi")(self.handle, v.index) if self.mem[v.own + L.K_ATTENTION] else 0

    def return_to_user(self, v: Vcpu, code: int) -> None:
        """KVM_RUN returns for the USER field of an outcome code; a signal makes it -EINTR, UNKNOWN is -EINVAL."""
        reason = ((code & CODE_USER) >> CODE_USER_SHIFT) - 1
        errno = {KvmExit.INTR: R.EINTR, KvmExit.UNKNOWN: R.EINVAL}.get(KvmExit(reason), 0)
        load("finish_run")(self.handle, v.index, reason, errno)

    def handle_exit(self, v: Vcpu, exit: Exit, code: int) -> int:
        """Step 20: the vendor's checks, then the generic handler unless the fast path was there already."""
        if self.vendor.trace_exit_late:
            self.trace_exit(v, exit)
        return self.vendor.handle_exit(self, v, exit, code)

    def generic(self, v: Vcpu, exit: Exit, code: int) -> int:
        """The tail of both vendors' handle_exit: completion, table, or out to user space."""
        completion = code & CODE_COMPLETION
        if completion == COMPLETION_SKIP:
            # The skip's verdict is ignored, as it was from the seed to 5.7: a KVM_EXIT_DEBUG is lost.
            self.skip(v, exit.length)
            return code
        if completion != COMPLETION_NONE:
            return code
        row = self.vendor.rows[exit.reason]
        if not row.shortcut or not self.mem[L.H_CONFIG] & L.CONFIG_RETPOLINE:
            # Everything else is an indirect call, which a retpoline makes dear.
            self.mem[v.own + L.K_INDIRECT_CALLS] += 1
        handler = self.vendor.handlers.data.get(exit.reason)
        if handler is None:
            return code | user_code(row.user)
        result = handler(v, exit)
        if result is None:
            return code
        if isinstance(result, KvmExit):
            return code | user_code(result)
        if type(result) is not int or result < 0 or result & ~_FROM_HANDLERS:
            raise TypeError(f"handler of exit {exit.reason} returned {result!r:.40}: neither None nor a KvmExit")
        return code | result

    def reflect_to_l1(self, v: Vcpu, reason: int) -> bool:
        """An exit of L2 that L1 wants: it is L1's now, and nothing is skipped. nested_vmx_reflect_vmexit.

        On SVM, L1 then runs with GIF clear until its STGI.
        """
        mem = self.mem
        if not mem[v.hot + L.HOT_FLAGS] & L.FLAG_L2 or not mem[v.own + L.K_L1_WANTS_EXIT]:
            return False
        if self.vendor.rows[reason].l0_wants:
            return False
        load("leave_l2")(self.handle, v.index)
        return True

    def skip(self, v: Vcpu, length: int) -> int:
        """kvm_skip_emulated_instruction: outcome code, non-zero when it asks for user space."""
        return load("skip")(self.handle, v.index, length)

    def trace_exit(self, v: Vcpu, exit: Exit) -> None:
        """kvm_exit."""
        if self.mem[L.H_CONFIG] & L.CONFIG_TRACE:
            # VMX says so in bit 31 of the reason itself.
            failed = VMX_FAILED_VMENTRY if exit.failed_entry and not self.mem[L.H_CONFIG] & L.CONFIG_SVM else 0
            reason = exit.reason | failed
            load("trace_exit")(self.handle, v.index, reason, exit.info1, exit.info2, exit.intr_info)

    # ------------------------------------------------------------------------------------------ towards VM entry

    def vcpu_run(self, v: Vcpu, forced: bool = False) -> int:
        """The loop until the vCPU is in the guest (0), waits (CODE_BLOCKED) or KVM_RUN has returned (a USER code)."""
        mem = self.mem
        rounds = 0
        while True:
            if forced or mem[v.own + L.K_MP_STATE] == R.MP_RUNNABLE:
                code = self.vcpu_enter_guest(v, forced)
                if code == IN_GUEST:
                    return 0
            else:
                code = self.block(v)
                if code == BLOCKED:
                    return CODE_BLOCKED
                if code == AGAIN:
                    continue
                code = code or AROUND
            if code == AROUND:
                code = self.loop_tail(v)
                rounds += 1
                if not code and rounds >= L.MOST_ROUNDS:
                    code = self.give_up(v, forced)
            if code:
                self.return_to_user(v, code)
                return code

    def give_up(self, v: Vcpu, forced: bool) -> int:
        """Entries that only cancel each other end with a signal; before an exit, without user space's window."""
        if not forced:
            return user_code(KvmExit.INTR)
        self.mem[v.own + L.K_USER_WINDOW] = 0
        return 0

    def loop_tail(self, v: Vcpu) -> int:
        """Behind an iteration that stays in the kernel: timer ticks become interrupts, signals are seen."""
        return load("loop_tail")(self.handle, v.index)

    def vcpu_enter_guest(self, v: Vcpu, forced: bool = False) -> int:
        """One try to enter, steps 1-11: IN_GUEST, AROUND (the loop goes round again) or a USER code."""
        mem = self.mem
        if mem[v.hot + L.HOT_REQUESTS] or mem[v.own + L.K_USER_WINDOW]:
            user = self.service_requests(v)
            if user:
                return user
            if self.inject_events(v) and not forced:
                return AROUND
        if forced:
            mem[v.own + L.K_MP_STATE] = R.MP_RUNNABLE
        self.preempt_disable(v)
        self.irqs_off(v)
        if self.enter(v):
            self.guest_time_start(v)
            self.vm_entry(v)
            return self.exit_at_once(v)
        mem[v.own + L.K_PREEMPT_OFF] = 0
        return AROUND

    def exit_at_once(self, v: Vcpu) -> int:
        """A guest may leave before its first instruction: KVM forced it to, or its preemption timer has run out."""
        mem = self.mem
        if not mem[v.own + L.K_IMMEDIATE] and mem[v.own + L.K_HV_DEADLINE] == L.NONE:
            return IN_GUEST
        exit = Exit(self.vendor.forced_reason)
        while load("exits_at_once")(self.handle, v.index):
            code = self.vendor_run(v, exit)
            again = code & CODE_COMPLETION == COMPLETION_REENTER
            if not again:
                code = self.leave_and_handle(v, exit, code)
            mem[v.own + L.K_SENT] |= code & CODE_EFFECTS
            if not again:
                return code & CODE_USER or AROUND
        return IN_GUEST

    def service_requests(self, v: Vcpu) -> int:
        """Step 2: pending requests in KVM's order; a USER code when one of them is user space's."""
        return load("service_requests")(self.handle, v.index)

    def inject_events(self, v: Vcpu) -> bool:
        """Step 3: INIT/SIPI, then one event; True when the vCPU waits for SIPI instead."""
        return bool(load("inject_events")(self.handle, v.index))

    def block(self, v: Vcpu) -> int:
        """The loop goes to vcpu_block: BLOCKED when the thread sleeps, AGAIN, a USER code, or 0 to go round."""
        return load("block")(self.handle, v.index)

    def preempt_disable(self, v: Vcpu) -> None:
        """Step 4: preemption off, the vendor prepares the switch."""
        self.mem[v.own + L.K_PREEMPT_OFF] = 1

    def irqs_off(self, v: Vcpu) -> None:
        """Step 5: host interrupts off. Before mode says IN_GUEST: a notification then stays pending till the entry."""
        self.mem[v.own + L.K_IRQS_OFF] = 1

    def enter(self, v: Vcpu) -> bool:
        """Steps 6-9: IN_GUEST_MODE, SRCU dropped, PIR to IRR, exit requested? In a kernel: a full barrier is needed."""
        return bool(load("enter")(self.handle, v.index))

    def guest_time_start(self, v: Vcpu) -> None:
        """Step 10: guest time is accounted from here."""
        self.mem[v.own + L.K_GUEST_TIME] = 1

    def vm_entry(self, v: Vcpu) -> None:
        """Step 11 up to VMENTER: kvm_entry, injected event and all; the wait for a deadline that fired early."""
        mem, own = self.mem, v.own
        rare = mem[own + L.K_FORCE_EXIT] or mem[own + L.K_EXPIRED_DEADLINE] or mem[own + L.K_IMMEDIATE]
        rare = rare or (mem[own + L.K_ENTRY_INFO] >> 31 and mem[own + L.K_HV_DEADLINE] != L.NONE)
        if rare or mem[L.H_CONFIG] & L.CONFIG_TRACE:
            load("vm_entry")(self.handle, v.index)
        else:
            mem[own + L.K_ENTRY_INFO] &= self.kept_entry_info
