"""The local APIC's timer for the oracle: a clock that somebody sets, and what runs out when he does.

Models: TMICT, TDCR, LVTT's mode, TMCCT, the TSC deadline, the host's hrtimer behind them, VMX's preemption timer in its
place, the tick that waits for the run loop, ticks that are delivered at once (APICv in the vCPU's own context, posted
timers), KVM_SET_LAPIC's restart.

Not modelled: timer_advance_ns, the busy wait before an entry.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastexit import regs as r

if TYPE_CHECKING:
    from oracle import Vcpu

U64 = (1 << 64) - 1
COUNTS = (r.TIMER_ONE_SHOT, r.TIMER_PERIODIC)
PREEMPTION_RATE = 5
"""The preemption timer counts once every 2**5 TSC ticks, as on every Intel CPU so far."""


class Timer:
    """One APIC timer. Times are the machine's, in ns; ``deadline`` and ``hv_at`` are the guest's TSC."""

    def __init__(self, vcpu: Vcpu) -> None:
        self.v = vcpu
        self.m = vcpu.m
        self.mode = r.TIMER_ONE_SHOT
        self.divide = 2
        self.period = 0
        self.target = 0
        self.deadline = 0
        self.pending = False
        self.hrtimer: int | None = None
        self.hv_at: int | None = None

    # ------------------------------------------------------------------------------------------------- small facts

    @property
    def in_deadline_mode(self) -> bool:
        return self.mode == r.TIMER_DEADLINE

    @property
    def periodic(self) -> bool:
        return self.mode == r.TIMER_PERIODIC

    @property
    def counts(self) -> bool:
        """Mode 3 is neither of the modes that count down TMICT."""
        return self.mode in COUNTS

    def _since(self, kernel: str) -> bool:
        return self.m.generation >= self.m.at(kernel)

    def _switched(self, *kernels: str) -> bool:
        """What came with the first of these generations, went with the second, came again with the third, ..."""
        return sum(map(self._since, kernels)) % 2 == 1

    def _skips(self) -> bool:
        """Periods that are over are forgotten; older stable kernels took that over."""
        return self._switched("5.10", "6.8", "6.12")

    def _ns(self, ticks: int) -> int:
        return ticks * self.m.bus_cycle_ns * self.divide

    def current_count(self) -> int:
        """TMCCT: at the ns in which a period begins it is whole, since a real clock has moved on by the first read."""
        left = self.target - self.m.now
        if self.in_deadline_mode or not self.v.reg(r.APIC_TMICT) or not self.period or left <= 0:
            return 0
        left = left % self.period or self.period
        return left // (self.m.bus_cycle_ns * self.divide) & 0xFFFF_FFFF

    def allowed_modes(self) -> int:
        return r.LVT_TIMER_PERIODIC | (r.LVT_TIMER_DEADLINE if self.m.tsc_deadline else 0)

    def can_use_hv(self) -> bool:
        return self.m.hv_timer and not self.m.disable_exits & r.EXITS_MWAIT and not self._can_post()

    def _can_post(self) -> bool:
        polls = self.m.disable_exits & (r.EXITS_MWAIT | r.EXITS_HLT)
        return self.m.pi_inject_timer and self.v.apicv and (bool(polls) or not self._since("5.10"))

    # --------------------------------------------------------------------------------------------- register writes

    def write_initial_count(self, value: int) -> None:
        if self.in_deadline_mode:
            return
        self._cancel()
        self.v.put(r.APIC_TMICT, value)
        self._start(value)

    def write_divide(self, value: int) -> None:
        old_kernel = self.v.m.generation < self.v.m.at("5.10")
        self.v.put(r.APIC_TDCR, value if old_kernel else value & r.TDCR_WRITABLE)
        old = self.divide
        self._read_divide()
        if self.divide != old and self.period:
            self.hrtimer = None
            self.period = self._ns(self.v.reg(r.APIC_TMICT))
            self._stretch()
            left = max(0, self.target - self.m.now)
            scaled = left * self.divide // old
            self.deadline = self.deadline + self.m.cycles(scaled) - self.m.cycles(left) & U64
            self.target = self.m.now + scaled
            self._restart()

    def write_deadline(self, value: int) -> None:
        old = not self._since("5.10")
        dropped = self.counts if old else not self.in_deadline_mode
        if dropped or not (self.v.hw_enabled or self._switched("5.6", "5.8")):
            return
        self.hrtimer = None
        self.deadline = value
        self._start()

    def read_deadline(self) -> int:
        shown = self.v.hw_enabled or not self._since("5.10")
        return self.deadline if shown and self.in_deadline_mode else 0

    def saved_count(self) -> int:
        """What KVM_GET_LAPIC shows as TMCCT."""
        return self.current_count() if self._since("5.8") else self.v.reg(r.APIC_TMCCT)

    def mode_changed(self) -> None:
        """LVTT has a new value: by a write, a mask, a reset or a whole page."""
        mode = self.v.reg(r.APIC_LVTT) & self.allowed_modes()
        if mode == self.mode:
            return
        if (mode == r.TIMER_DEADLINE) != self.in_deadline_mode:
            self._cancel()
            if self._since("5.6"):
                self.hv_at = None
            self.v.put(r.APIC_TMICT, 0)
            self.period = 0
            self.deadline = 0
        self.mode = mode
        self._stretch()

    def software_disabled(self) -> None:
        self.pending = False  # but what runs goes on running

    def reset(self) -> None:
        """RESET or INIT, with the registers set already."""
        self.hrtimer = None
        self._read_divide()
        self.pending = False

    def restore(self, remaining: int) -> None:
        """KVM_SET_LAPIC, with the page stored already; ``remaining`` is what it had as TMCCT."""
        self._cancel()
        self.mode_changed()
        self._read_divide()
        if not self._since("5.8"):
            self._start()
            return
        self._start(remaining, restored=True)
        self.v.put(r.APIC_TMCCT, 0)

    def _read_divide(self) -> None:
        tdcr = self.v.reg(r.APIC_TDCR)
        self.divide = 1 << ((tdcr & 3 | (tdcr & 8) >> 1) + 1 & 7)

    def _stretch(self) -> None:
        if self.periodic and self.period:
            self.period = max(self.period, self.m.min_timer_period_us * 1000)

    # ------------------------------------------------------------------------------------------- arming and firing

    def _cancel(self) -> None:
        self.hrtimer = None
        if self._since("5.15"):
            self.hv_at = None
            self.pending = False

    def _start(self, count: int = 0, *, restored: bool = False) -> None:
        self.pending = False
        if self.counts:
            self.period = self._ns(self.v.reg(r.APIC_TMICT))
            if not self.period:
                self.deadline = 0
                return
            self._stretch()
            lasts = self.period
            if restored:
                lasts = self._ns(count)
                if not lasts and (self.periodic or not self._since("6.1")):
                    lasts = self.period
                lasts = min(lasts, self.period)
            self.deadline = min(self.m.tsc() + self.m.cycles(lasts), U64)
            self.target = self.m.now + lasts
        self._restart()

    def _restart(self) -> None:
        if self.pending and not self.periodic:
            return
        if not self._start_hv():
            self.start_hrtimer()

    def start_hrtimer(self) -> None:
        """Counting in the host, which goes on wherever the vCPU is."""
        self.hv_at = None
        if self.pending and not self.periodic:
            return
        self._arm_hrtimer()
        self._tell(hv=False)
        while self.hrtimer is not None and self.hrtimer <= self.m.now:
            self.fire()  # the host takes its interrupt at once

    def _arm_hrtimer(self) -> None:
        if self.counts:
            if not self.period:
                return
            if self.target <= self.m.now:
                self._expire(by_host=False)
                if not self.periodic:
                    return
                self._next_period()
            self.hrtimer = self.target
        elif self.in_deadline_mode and self.deadline:
            # the kernel multiplies before it divides, in 64 bits
            left = ((self.deadline - self.m.tsc()) * 1_000_000 & U64) // self.m.tsc_khz
            if self.deadline > self.m.tsc() and left:
                self.hrtimer = self.m.now + left
            else:
                self._expire(by_host=False)

    def _start_hv(self) -> bool:
        if not self.can_use_hv() or not self.deadline:
            return False
        left = max(0, self.deadline - self.m.tsc())
        if left >> PREEMPTION_RATE + 32:
            return False
        self.hv_at = self.m.tsc() + left
        self.hrtimer = None
        if not self.periodic:
            if self.pending:
                self.hv_at = None
            elif not left:
                self._expire(by_host=False)
                self.hv_at = None
        self._tell(hv=self.hv_at is not None)
        return True

    def _tell(self, *, hv: bool) -> None:
        self.m.log(f"kvm_hv_timer_state: vcpu_id {self.v.id:x} hv_timer {hv:x}")

    def block(self) -> bool:
        """The vCPU stops running: the host counts instead of the CPU. Whether that was a change."""
        if self.hv_at is None:
            return False
        self.start_hrtimer()
        return True

    def unblock(self, was_hv: bool) -> None:
        """vmx_post_block up to 5.10 has a timer start again that nothing of this CPU's had counted."""
        anyway = self.m.hv_timer and not self._since("5.15") and self.v.mp_state != r.MP_UNINITIALIZED
        if was_hv or anyway:
            self._restart()

    def fire(self) -> None:
        """The hrtimer is due."""
        self.hrtimer = None
        self._expire(by_host=True)
        if self.periodic:
            self._next_period()
            while self.target <= self.m.now and not self._skips():
                # it runs out for each of them; one tick waits already, or one vector
                self.target += max(1, (self.m.now - self.target) // self.period) * self.period
                self.deadline = self.m.tsc() + self.m.cycles(self.target - self.m.now)
            self.hrtimer = self.target

    def hv_due(self) -> bool:
        return self.hv_at is not None and self.hv_at <= self.m.tsc()

    def hv_exit(self) -> None:
        """The preemption timer ran out in the guest."""
        if self.hv_at is None:
            return
        if not self._since("5.10"):
            self.hv_at = None
        self._expire(by_host=False)
        self.hv_at = None
        if self.periodic and self.period:
            self._next_period()
            self._restart()

    def _next_period(self) -> None:
        self.target += self.period
        if self.target < self.m.now and self._skips():
            self.target = self.m.now
        ahead = self.target - self.m.now
        # a distance below zero is taken as unsigned
        self.deadline = min(self.m.tsc() + self.m.cycles(ahead), U64) if ahead >= 0 else U64

    def _expire(self, *, by_host: bool) -> None:
        if self.pending:
            return
        in_guest = self.v.in_guest and not self.v.kicked
        if (not by_host and self._taken_at_once()) or (self._can_post() and in_guest):
            self.deliver()
            return
        self.pending = True
        if by_host:
            self.v.rouse("UNBLOCK")
        else:
            self.v.request("UNBLOCK")

    def _taken_at_once(self) -> bool:
        """Whether APICv takes a tick of the vCPU's own thread; an ioctl is not its thread's run."""
        if not self.v.apicv or not self._since("5.8"):
            return False
        return self.v.thread.in_kvm_run or not self._switched("6.1", "6.8", "6.12")

    def deliver(self) -> None:
        """The tick becomes LVTT's interrupt, if that is not masked."""
        self.v.deliver_local(r.APIC_LVTT)
        if self.in_deadline_mode:
            self.deadline = 0
        elif self.mode == r.TIMER_ONE_SHOT:
            self.deadline = 0
            self.target = 0
