"""The run loop with a clock: every step charges what it costs under a CostProfile, where the dispatcher takes it.

A machine made with ``costs`` has this dispatcher and these vCPUs instead of the plain ones, which know nothing of it.
Nothing here knows what a generation skips: steps that do not run are not charged, targets, timers and injections are
seen in the trace records and words that the kernels leave. Not charged: the re-entry loop of a fast exit that finds an
exit requested, the scan's vCPUs that do not match, harvesting PIR beyond the look at it.
One thread at a time acts on such a machine: its trace ring is borrowed while an exit runs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from fastexit import layout as L
from fastexit import regs as R
from fastexit.cost import CostProfile
from fastexit.dispatcher import BLOCKED, Dispatcher, Exit, Vendor
from fastexit.meter import EFFECT_STAGES, MSR_REASONS, Meter, Sent, TimedOutcome, pointer_calls, work_of
from fastexit.outcome import (
    CODE_ACCEPTED_SHIFT,
    CODE_COMPLETION,
    CODE_FAST,
    CODE_FAULT,
    CODE_USER,
    COMPLETION_NONE,
    COMPLETION_REENTER,
    COMPLETION_SKIP,
    Effect,
)
from fastexit.profile import Profile
from fastexit.vcpu import Vcpu

_IPI_EVENTS = (L.TP_APIC_IPI, L.TP_AVIC_INCOMPLETE_IPI)


class _Before(NamedTuple):
    """What is looked at on both sides of a handler."""

    head: int
    rows: np.ndarray
    hv_deadline: int
    hrtimer: int


class TimedDispatcher(Dispatcher):
    """The run loop of a machine with costs."""

    def __init__(
        self,
        memory: memoryview,
        handle: int,
        vendor: Vendor,
        profile: Profile,
        words: np.ndarray,
        costs: CostProfile,
    ) -> None:
        super().__init__(memory, handle, vendor, profile)
        self.words = words
        self.costs = costs
        self.calls = pointer_calls(profile.name)
        self.meter = Meter(costs, self.calls)
        self.wrmsr_fast = False  # the one compiled call of a fast exit has no steps to charge

    # ---------------------------------------------------------------------------------------------- doors

    def run_exit(self, v: Vcpu, exit: Exit) -> int:
        """Dispatcher.run_exit, from the guest's instruction on; the vCPU's ``timed`` is its outcome."""
        if self.mem[v.hot + L.HOT_MODE] == R.OUTSIDE_GUEST_MODE:
            self.start_run(v)
        code, meter = self.metered(lambda: super(TimedDispatcher, self).run_exit(v, exit))
        self.done(v, code, meter)
        return code

    def done(self, v: Vcpu, code: int, meter: Meter) -> None:
        """An exit is over."""
        in_guest = self.mem[v.hot + L.HOT_MODE] != R.OUTSIDE_GUEST_MODE
        v.timed = TimedOutcome(code, meter, in_guest)  # type: ignore[attr-defined]

    def kvm_run(self, v: Vcpu) -> bool:
        """Dispatcher.kvm_run; the vCPU's ``run_cycles`` are what it cost."""
        entered, meter = self.metered(lambda: super(TimedDispatcher, self).kvm_run(v))
        v.run_cycles = meter.spent  # type: ignore[attr-defined]
        return entered

    def metered(self, act: Callable[[], Any]) -> tuple[Any, Meter]:
        """What an act gives and costs. Records that nobody asked for are taken off the trace ring again."""
        mem, outer = self.mem, self.meter
        self.meter = meter = Meter(self.costs, self.calls)
        asked, head = mem[L.H_CONFIG] & L.CONFIG_TRACE, mem[L.H_TRACE_HEAD]
        kept = None
        if head > L.TRACE_CAPACITY - _ROOM:  # a ring that is full would show nothing
            kept = self.words[L.TRACE : L.TRACE + _ROOM * L.TRACE_STRIDE].copy()
            mem[L.H_TRACE_HEAD] = 0
        mem[L.H_CONFIG] |= L.CONFIG_TRACE
        try:
            return act(), meter
        finally:
            self.meter = outer
            if not asked:
                mem[L.H_CONFIG] &= ~L.CONFIG_TRACE
            if kept is not None:
                self._give_back(kept, head if asked else None)
                if not asked:
                    mem[L.H_TRACE_HEAD] = head
            elif not asked:
                mem[L.H_TRACE_HEAD] = head

    def _give_back(self, kept: np.ndarray, head: int | None) -> None:
        """The ring's oldest records return to their place; with a head, what was written meanwhile goes behind it."""
        new = min(self.mem[L.H_TRACE_HEAD], _ROOM)
        place = self.words[L.TRACE : L.TRACE + L.TRACE_CAPACITY * L.TRACE_STRIDE]
        written = place[: new * L.TRACE_STRIDE].copy()
        place[: len(kept)] = kept
        if head is not None:
            fits = max(min(new, L.TRACE_CAPACITY - head), 0) * L.TRACE_STRIDE
            place[head * L.TRACE_STRIDE :][:fits] = written[:fits]
            self.mem[L.H_TRACE_HEAD] += head

    # ---------------------------------------------------------------------------- from VM exit to handle_exit

    def vendor_run(self, v: Vcpu, exit: Exit) -> int:
        """Step 11, with a fast handler and the re-entry behind it where the generation has them there."""
        charge = self.meter.charge
        for stage in ("vm_exit", "mitigation_exit", "exit_info"):
            charge("vendor_run", stage)
        before = self._before(v)
        locks, waited = self.mem[v.own + L.K_SRCU_LOCKS], self.mem[v.own + L.K_WAITED]
        code = super().vendor_run(v, exit)
        if not self.hook_irqoff and exit.reason in self.vendor.fast_run and not exit.failed_entry:
            charge("vendor_run", "fast_check")
            locks = self.mem[v.own + L.K_SRCU_LOCKS] - locks
            if locks:
                charge("vendor_run", "srcu_lock", locks)
            if code & CODE_FAST:
                self._work(v, exit, code, before, "vendor_run")
            if locks:
                charge("vendor_run", "srcu_unlock", locks)
        if code & CODE_COMPLETION == COMPLETION_REENTER:
            charge("reenter", "reenter")
            charge("vm_entry", "mitigation_entry")
            charge("vm_entry", "vm_entry")
            self._waited(v, waited)
        return code

    def guest_mode_outside(self, v: Vcpu) -> None:
        """Step 13."""
        super().guest_mode_outside(v)
        self.meter.charge("guest_mode_outside", "guest_mode_outside")

    def handle_exit_irqoff(self, v: Vcpu, exit: Exit, code: int) -> int:
        """Step 14, with the fast handler of the first generations."""
        self.meter.charge("handle_exit_irqoff", "irqoff_handler")
        before = self._before(v)
        code = super().handle_exit_irqoff(v, exit, code)
        if self.hook_irqoff and exit.reason in self.vendor.fast_irqoff:
            self.meter.charge("handle_exit_irqoff", "fast_check")
            if code & CODE_FAST:
                self._work(v, exit, code, before, "handle_exit_irqoff")
        if exit.reason == self.vendor.interrupt_reason:
            self.meter.charge("handle_exit_irqoff", "host_irq")
        return code

    def irq_window(self, v: Vcpu) -> None:
        """Step 15."""
        super().irq_window(v)
        self.meter.charge("irq_window", "irq_window")

    def guest_time_stop(self, v: Vcpu) -> None:
        """Step 16."""
        super().guest_time_stop(v)
        self.meter.charge("guest_time_stop", "guest_time_stop")

    def srcu_lock(self, v: Vcpu) -> None:
        """Step 17."""
        super().srcu_lock(v)
        self.meter.charge("srcu_lock", "srcu_lock")

    def sync_from_vapic(self, v: Vcpu) -> None:
        """Step 18."""
        super().sync_from_vapic(v)
        self.meter.charge("sync_from_vapic", "vapic_sync")

    def handle_exit(self, v: Vcpu, exit: Exit, code: int) -> int:
        """Step 20 up to the tail that both vendors share."""
        self.meter.charge("handle_exit", "exit_checks")
        return super().handle_exit(v, exit, code)

    def generic(self, v: Vcpu, exit: Exit, code: int) -> int:
        """Step 20: dispatch and the generic handler, or what the fast path left to do."""
        completion = code & CODE_COMPLETION
        before, calls = self._before(v), self.mem[v.own + L.K_INDIRECT_CALLS]
        result = super().generic(v, exit, code)
        if completion == COMPLETION_SKIP:
            self.meter.charge("handle_exit", "skip")
        elif completion == COMPLETION_NONE:
            indirect = self.mem[v.own + L.K_INDIRECT_CALLS] != calls
            self.meter.charge("handle_exit", "dispatch_indirect" if indirect else "dispatch_direct")
            self._work(v, exit, result, before, "handle_exit")
        return result

    def return_to_user(self, v: Vcpu, code: int) -> None:
        """KVM_RUN returns."""
        super().return_to_user(v, code)
        self.meter.charge("return_to_user", "user_exit")

    # ------------------------------------------------------------------------------------------ towards VM entry

    def loop_tail(self, v: Vcpu) -> int:
        """O4-O7, with the APIC that accepts a tick."""
        before = self._before(v)
        code = super().loop_tail(v)
        self.meter.charge("loop_tail", "loop_tail")
        self._accepted(v, before, "loop_tail", len(self._targets(v, self._records(before))))
        return code

    def service_requests(self, v: Vcpu) -> int:
        """Step 2."""
        self.meter.charge("service_requests", "requests")
        return super().service_requests(v)

    def inject_events(self, v: Vcpu) -> bool:
        """Step 3."""
        waits = super().inject_events(v)
        self.meter.charge("inject_events", "event_check")
        if self.mem[v.own + L.K_ENTRY_INFO]:
            self.meter.charge("inject_events", "inject")
        return waits

    def block(self, v: Vcpu) -> int:
        """vcpu_block; a vCPU that does not get to sleep has hardly begun."""
        code = super().block(v)
        if code == BLOCKED:
            self.meter.charge("block", "block")
        return code

    def preempt_disable(self, v: Vcpu) -> None:
        """Step 4."""
        super().preempt_disable(v)
        self.meter.charge("preempt_disable", "prepare_switch")

    def irqs_off(self, v: Vcpu) -> None:
        """Step 5."""
        super().irqs_off(v)
        self.meter.charge("irqs_off", "irqs_off")

    def enter(self, v: Vcpu) -> bool:
        """Steps 6-9; an entry that is cancelled takes SRCU again."""
        entered = super().enter(v)
        self.meter.charge("enter", "enter_mode")
        self.meter.charge("enter", "srcu_unlock")
        if not entered:
            self.meter.charge("enter", "srcu_lock")
        return entered

    def guest_time_start(self, v: Vcpu) -> None:
        """Step 10."""
        super().guest_time_start(v)
        self.meter.charge("guest_time_start", "guest_state")

    def vm_entry(self, v: Vcpu) -> None:
        """Step 11 up to VMENTER, and the entry itself."""
        waited = self.mem[v.own + L.K_WAITED]
        super().vm_entry(v)
        self.meter.charge("vm_entry", "mitigation_entry")
        self.meter.charge("vm_entry", "vm_entry")
        self._waited(v, waited)

    # ------------------------------------------------------------------------------------------ what a handler did

    def _before(self, v: Vcpu) -> _Before:
        mem = self.mem
        rows = self.words[L.HOT : L.HOT + mem[L.H_NVCPUS] * L.HOT_STRIDE].reshape(-1, L.HOT_STRIDE).copy()
        return _Before(mem[L.H_TRACE_HEAD], rows, mem[v.own + L.K_HV_DEADLINE], mem[v.own + L.K_HRTIMER])

    def _waited(self, v: Vcpu, before: int) -> None:
        """The busy wait of an entry for a deadline that fired early, which the kernel counts in ns."""
        ns = self.mem[v.own + L.K_WAITED] - before
        if ns:
            self.meter.add("vm_entry", "waited", 1, round(ns * self.costs.ghz))

    def _records(self, before: _Before) -> list[tuple[int, int]]:
        """Event and first argument of the records since then."""
        first, last = before.head, min(self.mem[L.H_TRACE_HEAD], L.TRACE_CAPACITY)
        raw = self.words[L.TRACE + first * L.TRACE_STRIDE : L.TRACE + last * L.TRACE_STRIDE]
        return [(event & 0xFF, first) for event, first in raw.reshape(-1, L.TRACE_STRIDE)[:, :2].tolist()]

    def _targets(self, v: Vcpu, records: list[tuple[int, int]]) -> list[int]:
        """vCPU indices that __apic_accept_irq was called for; of an incomplete IPI of AVIC, those that it roused."""
        ids = v.machine._ids
        seen = [ids[vcpu_id] for event, vcpu_id in records if event == L.TP_ACCEPT_IRQ]
        return seen or [ids[vcpu_id] for event, vcpu_id in records if event == L.TP_APICV_ACCEPT_IRQ]

    def _effect(self, v: Vcpu, before: _Before, target: int, posted: bool) -> Effect:
        """What the host has to do for one target, by what changed in its row; a doorbell, which changes nothing, by
        its having been ``posted``.
        """
        old = before.rows[target]
        now = self.mem[L.HOT + target * L.HOT_STRIDE + L.HOT_MODE]
        in_guest = int(old[L.HOT_MODE]) == R.IN_GUEST_MODE
        if old[L.HOT_BLOCKED] and not self.mem[L.HOT + target * L.HOT_STRIDE + L.HOT_BLOCKED]:
            return Effect.WAKE
        if target == v.index or not in_guest:
            return Effect.NONE
        if now == R.EXITING_GUEST_MODE:
            return Effect.KICK
        if not int(old[L.HOT_FLAGS]) & L.FLAG_APICV:
            return Effect.NONE
        if self.mem[L.H_CONFIG] & L.CONFIG_SVM:
            theirs, mine = (self.mem[L.KVM + i * L.KVM_STRIDE + L.K_CPU] for i in (target, v.index))
            return Effect.DOORBELL if posted and theirs != mine else Effect.NONE
        on = self.mem[L.HOT + target * L.HOT_STRIDE + L.PID_CONTROL_WORD] & ~int(old[L.PID_CONTROL_WORD])
        return Effect.NOTIFY if on & R.PID_ON else Effect.NONE

    def _accepted(self, v: Vcpu, before: _Before, step: str, accepted: int, ipi: bool = False) -> None:
        """The targets of an IPI or of a timer's tick, one behind the other, as far as they accepted.

        Where only some did, it was those for which there is something to do, and the first of the rest.
        """
        meter = self.meter
        records, ids = self._records(before), v.machine._ids
        posted = {ids[vcpu_id] for event, vcpu_id in records if event == L.TP_APICV_ACCEPT_IRQ}
        targets = [(target, self._effect(v, before, target, target in posted)) for target in self._targets(v, records)]
        quiet = accepted - sum(1 for _, effect in targets if effect)
        for target, effect in targets:
            if not effect:
                quiet -= 1
                if quiet < 0:
                    continue
            meter.charge(step, "accept")
            if effect:
                meter.charge(step, EFFECT_STAGES[effect])
            if ipi:
                meter.ipi = meter.spent
            if effect:
                meter.sent.append(Sent(target, effect, meter.spent))

    def _work(self, v: Vcpu, exit: Exit, code: int, before: _Before, step: str) -> None:
        """The handler of an exit, fast or generic, by its code and by what it left behind."""
        meter, vendor = self.meter, self.vendor
        work = work_of(vendor, exit)
        if step == "handle_exit" and exit.reason in MSR_REASONS[vendor.hardware]:
            meter.charge(step, "msr_access")
        if code & CODE_FAULT or (code & CODE_USER and not code & CODE_FAST):
            return
        for stage in work.stages:
            meter.charge(step, stage)
        records = self._records(before)
        targets = self._targets(v, records)
        if targets:
            ipi = any(event in _IPI_EVENTS for event, _ in records) or exit.reason == vendor.hypercall_reason
            avic = not any(event == L.TP_ACCEPT_IRQ for event, _ in records)
            accepted = (code >> CODE_ACCEPTED_SHIFT & 0xFFFF ^ 0x8000) - 0x8000
            self._accepted(v, before, step, max(accepted, 0) if ipi and not avic else len(targets), ipi)
        if work.timer:
            if self.mem[v.own + L.K_HV_DEADLINE] != before.hv_deadline:
                meter.charge(step, "preemption_timer")
            if self.mem[v.own + L.K_HRTIMER] != before.hrtimer:
                meter.charge(step, "hrtimer")
        if work.skips and code & CODE_COMPLETION != COMPLETION_SKIP:
            meter.charge(step, "skip")


_ROOM = 3 * L.MAX_VCPUS + 4096
"""Records that one exit is sure not to exceed: three for each target."""
