"""The run loop with a clock: every step charges what it costs under a CostProfile, where the dispatcher takes it.

A machine made with ``costs`` has this dispatcher and these vCPUs instead of the plain ones, which know nothing of it.
Nothing here knows what a generation skips: steps that do not run are not charged, targets, timers and injections are
seen in the trace records and words that the kernels leave. Not charged: the re-entry loop of a fast exit that finds an
exit requested, the scan's vCPUs that do not match, harvesting PIR beyond the look at it.
One thread at a time acts on such a machine: its trace ring is borrowed while an exit runs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import numpy as np

from fastexit import hyperv as HV
from fastexit import layout as L
from fastexit import regs as R
from fastexit.costs.accepted import IPI_EVENTS, Before, accepting, before, records
from fastexit.costs.meter import (
    EFFECT_STAGES,
    Meter,
    Sent,
    TimedOutcome,
    accesses_msr,
    charge_hyperv,
    pointer_calls,
    work_of,
)
from fastexit.costs.profile import CostProfile
from fastexit.exits.dispatcher import BLOCKED, Dispatcher
from fastexit.exits.exit import Exit, Vendor
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

_Result = TypeVar("_Result")


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
        self.calls: dict[str, int] = pointer_calls(profile.name)
        self.meter: Meter = Meter(costs, self.calls)
        self.wrmsr_fast = False  # the one compiled call of a fast exit has no steps to charge

    # ---------------------------------------------------------------------------------------------- doors

    def run_exit(self, v: Vcpu, exit: Exit) -> int:
        """Dispatcher.run_exit, from the guest's instruction on; the vCPU's ``timed`` is its outcome."""
        if self.mem[v.hot + L.HOT_MODE] == R.OUTSIDE_GUEST_MODE:
            self.come_in(v)
        code, meter = self.metered(lambda: super(TimedDispatcher, self).run_exit(v, exit))
        self.done(v, code, meter)
        return code

    def done(self, v: Vcpu, code: int, meter: Meter) -> None:
        """An exit is over."""
        meter.tell_rest(v.targets)
        in_guest = self.mem[v.hot + L.HOT_MODE] != R.OUTSIDE_GUEST_MODE
        v.timed = TimedOutcome(code, meter, in_guest)  # type: ignore[attr-defined]

    def begin_targets(self, v: Vcpu) -> int:
        """Dispatcher.begin_targets: what an entry has asked of others was before the exit's first cycle."""
        told = super().begin_targets(v)
        if told:
            self.meter.tell_rest(v.targets)
        return told

    def kvm_run(self, v: Vcpu) -> bool:
        """Dispatcher.kvm_run; the vCPU's ``run_cycles`` are what it cost."""
        entered, meter = self.metered(lambda: super(TimedDispatcher, self).kvm_run(v))
        v.run_cycles = meter.spent  # type: ignore[attr-defined]
        return entered

    def metered(self, act: Callable[[], _Result]) -> tuple[_Result, Meter]:
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

    def accepts(self, act: Callable[[], _Result]) -> tuple[_Result, list[tuple[int, int]]]:
        """What an act gives, and whose APICs accepted which vectors meanwhile: APIC id and vector, in order.

        What hardware sends without KVM leaves no record, so it is not among them.
        """

        def watched() -> tuple[_Result, list[tuple[int, int]]]:
            first = self.mem[L.H_TRACE_HEAD]
            result = act()
            last = min(self.mem[L.H_TRACE_HEAD], L.TRACE_CAPACITY)
            if last <= first:
                return result, []
            raw = self.words[L.TRACE + first * L.TRACE_STRIDE : L.TRACE + last * L.TRACE_STRIDE]
            return result, [
                (vcpu_id, icr & R.ICR_VECTOR)
                for event, vcpu_id, icr in raw.reshape(-1, L.TRACE_STRIDE)[:, :3].tolist()
                if event & 0xFF in _ACCEPTS and icr >> R.ICR_DM_SHIFT & 7 in _VECTORED
            ]

        return self.metered(watched)[0]

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
        old = self._before(v)
        locks, waited = self.mem[v.own + L.K_SRCU_LOCKS], self.mem[v.own + L.K_WAITED]
        code = super().vendor_run(v, exit)
        if not self.hook_irqoff and exit.reason in self.vendor.fast_run and not exit.failed_entry:
            charge("vendor_run", "fast_check")
            locks = self.mem[v.own + L.K_SRCU_LOCKS] - locks
            if locks:
                charge("vendor_run", "srcu_lock", locks)
            if code & CODE_FAST:
                self._work(v, exit, code, old, "vendor_run")
            if locks:
                charge("vendor_run", "srcu_unlock", locks)
        if code & CODE_COMPLETION == COMPLETION_REENTER:
            for step, stage in (("reenter", "reenter"), ("vm_entry", "mitigation_entry"), ("vm_entry", "vm_entry")):
                self.meter.direct(step, stage)
            self._waited(v, waited)
        return code

    def guest_mode_outside(self, v: Vcpu) -> None:
        """Step 13."""
        super().guest_mode_outside(v)
        self.meter.charge("guest_mode_outside", "guest_mode_outside")

    def handle_exit_irqoff(self, v: Vcpu, exit: Exit, code: int) -> int:
        """Step 14, with the fast handler of the first generations."""
        self.meter.charge("handle_exit_irqoff", "irqoff_handler")
        old = self._before(v)
        code = super().handle_exit_irqoff(v, exit, code)
        if self.hook_irqoff and exit.reason in self.vendor.fast_irqoff:
            self.meter.charge("handle_exit_irqoff", "fast_check")
            if code & CODE_FAST:
                self._work(v, exit, code, old, "handle_exit_irqoff")
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

    def sync_from_vapic(self, v: Vcpu) -> int:
        """Step 18."""
        effects = super().sync_from_vapic(v)
        self.meter.charge("sync_from_vapic", "vapic_sync")
        return effects

    def handle_exit(self, v: Vcpu, exit: Exit, code: int) -> int:
        """Step 20 up to the tail that both vendors share."""
        self.meter.charge("handle_exit", "exit_checks")
        return super().handle_exit(v, exit, code)

    def generic(self, v: Vcpu, exit: Exit, code: int) -> int:
        """Step 20: dispatch and the generic handler, or what the fast path left to do."""
        completion = code & CODE_COMPLETION
        old, calls = self._before(v), self.mem[v.own + L.K_INDIRECT_CALLS]
        result = super().generic(v, exit, code)
        if completion == COMPLETION_SKIP:
            self.meter.charge("handle_exit", "skip")
        elif completion == COMPLETION_NONE:
            indirect = self.mem[v.own + L.K_INDIRECT_CALLS] != calls
            self.meter.charge("handle_exit", "dispatch_indirect" if indirect else "dispatch_direct")
            self._work(v, exit, result, old, "handle_exit")
        return result

    def return_to_user(self, v: Vcpu, code: int) -> None:
        """KVM_RUN returns."""
        super().return_to_user(v, code)
        self.meter.charge("return_to_user", "user_exit")

    # ------------------------------------------------------------------------------------------ towards VM entry

    def loop_tail(self, v: Vcpu) -> int:
        """Dispatcher.loop_tail, with the APIC that accepts a tick."""
        old = self._before(v)
        code = super().loop_tail(v)
        self.meter.charge("loop_tail", "loop_tail")
        told = accepting(v, records(self.mem, self.words, old), old)
        self._accepted(told, "loop_tail", len(told))
        return code

    def service_requests(self, v: Vcpu) -> int:
        """Step 2, with the synthetic timers that are served."""
        self.meter.charge("service_requests", "requests")
        if not self.mem[v.hot + L.HOT_REQUESTS] & R.REQ_HV_STIMER:
            return super().service_requests(v)
        old, deadlines = self._before(v), self._stimers(v)
        code = super().service_requests(v)
        told = accepting(v, records(self.mem, self.words, old), old)
        self._accepted(told, "service_requests", len(told))
        moved = sum(was != now for was, now in zip(deadlines, self._stimers(v), strict=True))
        if moved:
            self.meter.charge("service_requests", "hrtimer", moved)
        return code

    def inject_events(self, v: Vcpu) -> bool:
        """Step 3."""
        waits = super().inject_events(v)
        self.meter.charge("inject_events", "event_check")
        if not self._apicv(v):
            self.meter.call("inject_events", "cr8_intercept")
        if self.mem[v.own + L.K_ENTRY_INFO] & R.VECTORING_INFO_VALID:
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
        if self._apicv(v):
            self.meter.call("enter", "sync_pir")
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

    def _apicv(self, v: Vcpu) -> int:
        return self.mem[v.hot + L.HOT_FLAGS] & L.FLAG_APICV

    def _stimers(self, v: Vcpu) -> list[int]:
        """The words that say when its synthetic timers fire: one that moved was started or cancelled."""
        first = L.HV + v.index * L.HV_STRIDE + L.HV_STIMER + L.STIMER_DEADLINE
        return [self.mem[first + i * L.STIMER_STRIDE] for i in range(L.STIMERS)]

    def _before(self, v: Vcpu) -> Before:
        return before(self.mem, v)

    def _waited(self, v: Vcpu, before: int) -> None:
        """The busy wait of an entry for a deadline that fired early, which the kernel counts in ns."""
        ns = self.mem[v.own + L.K_WAITED] - before
        if ns:
            self.meter.add("vm_entry", "waited", 1, round(ns * self.costs.ghz))

    def _accepted(self, told: list[tuple[int, Effect]], step: str, accepted: int, ipi: bool = False) -> None:
        """The targets of an IPI or of a timer's tick, one behind the other, as far as they accepted.

        Where only some did, it was those for which there is something to do, and the first of the rest.
        """
        meter = self.meter
        quiet = accepted - sum(1 for _, needs in told if needs)
        for target, needs in told:
            if not needs:
                quiet -= 1
                if quiet < 0:
                    continue
            meter.charge(step, "accept")
            if needs:
                meter.charge(step, EFFECT_STAGES[needs])
            if ipi:
                meter.ipi = meter.spent
            if needs:
                meter.sent.append(Sent(target, needs, meter.spent))

    def _work(self, v: Vcpu, exit: Exit, code: int, old: Before, step: str) -> None:
        """The handler of an exit, fast or generic, by its code and by what it left behind."""
        meter, vendor = self.meter, self.vendor
        work = work_of(vendor, exit)
        if step == "handle_exit" and accesses_msr(vendor, exit.reason):
            meter.charge(step, "msr_access")
        if code & CODE_FAULT or (code & CODE_USER and not code & CODE_FAST):
            return
        written = records(self.mem, self.words, old)
        control = next((control for event, control in written if event == L.TP_HV_HYPERCALL), None)
        if control is not None:
            succeeded = not self.mem[v.own + L.K_MSR_DATA] & HV.HV_CALL_CODE
            charge_hyperv(meter, step, control, self.mem[L.H_NVCPUS], succeeded)
        else:
            for stage in work.stages:
                meter.charge(step, stage)
        if self.mem[v.own + L.K_IOAPIC_EOIS] != old.ioapic_eois:
            meter.charge(step, "ioapic_eoi")
        told = accepting(v, written, old)
        if told:
            ipi = any(event in IPI_EVENTS for event, _ in written) or exit.reason == vendor.hypercall_reason
            avic = not any(event == L.TP_ACCEPT_IRQ for event, _ in written)
            accepted = (code >> CODE_ACCEPTED_SHIFT & 0xFFFF ^ 0x8000) - 0x8000
            self._accepted(told, step, max(accepted, 0) if ipi and not avic else len(told), ipi)
        if work.timer:
            if self.mem[v.own + L.K_HV_DEADLINE] != old.hv_deadline:
                meter.charge(step, "preemption_timer")
            if self.mem[v.own + L.K_HRTIMER] != old.hrtimer:
                meter.charge(step, "hrtimer")
        meter.tell_rest(v.targets)
        if work.skips and code & CODE_COMPLETION != COMPLETION_SKIP:
            meter.charge(step, "skip")


_ACCEPTS = frozenset({L.TP_ACCEPT_IRQ, L.TP_APICV_ACCEPT_IRQ})
_VECTORED = frozenset({R.DM_FIXED, R.DM_LOWEST})
_ROOM = 3 * L.MAX_VCPUS + 4096
"""Records that one exit is sure not to exceed: three for each target."""
