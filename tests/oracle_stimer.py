"""The oracle's synthetic timers: their two registers, when they start, what they do when they run out.

Models: stimer_set_config, stimer_set_count, kvm_hv_process_stimers, stimer_expiration, stimer_send_msg.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastexit import hyperv as h
from fastexit import regs as r
from oracle_apic import Irq

if TYPE_CHECKING:
    from oracle_synic import Vcpu

PAGE = 4096
ENOENT, EAGAIN, EFAULT = 2, 11, 14


class Stimer:
    """One of a vCPU's four synthetic timers."""

    def __init__(self, vcpu: Vcpu, index: int) -> None:
        self.v = vcpu
        self.index = index
        self.config = 0
        self.count = 0
        self.expires = 0
        self.hrtimer: int | None = None
        self.stuck = False

    @property
    def enabled(self) -> bool:
        return bool(self.config & h.HV_STIMER_ENABLED)

    @property
    def periodic(self) -> bool:
        return bool(self.config & h.HV_STIMER_PERIODIC)

    @property
    def direct(self) -> bool:
        return bool(self.config & h.HV_STIMER_DIRECT)

    @property
    def sint(self) -> int:
        return self.config >> h.HV_STIMER_SINT_SHIFT & 15

    def enable(self, on: bool) -> None:
        self.config = self.config & ~h.HV_STIMER_ENABLED | (h.HV_STIMER_ENABLED if on else 0)

    def log(self, event: str, rest: str = "") -> None:
        self.v.m.log(f"kvm_hv_stimer_{event}: vcpu_id {self.v.id} timer {self.index}{rest}")

    def mark(self) -> None:
        self.v.stimers_pending.add(self.index)
        self.v.request("HV_STIMER")

    def fire(self) -> None:
        """Its hrtimer ran out."""
        self.hrtimer = None
        self.log("callback")
        self.v.stimers_pending.add(self.index)
        self.v.rouse("HV_STIMER")

    def clean_up(self) -> None:
        self.log("cleanup")
        self.hrtimer = None
        self.v.stimers_pending.discard(self.index)
        self.stuck = False
        self.expires = 0

    def set_config(self, value: int, *, host: bool) -> bool:
        if not self.v.synic and (not host or value):
            return False
        if not host and value & h.HV_STIMER_DIRECT and self.v.denies(h.HvFeature.STIMER_DIRECT):
            return False
        self.log("set_config", f" config {value:#x} host {int(host)}")
        self.clean_up()
        was_enabled = self.enabled
        self.config = value
        if was_enabled and not self.direct and self.sint == 0:
            self.enable(False)
        if self.enabled:
            self.mark()
        return True

    def set_count(self, value: int, *, host: bool) -> bool:
        if not self.v.synic and (not host or value):
            return False
        self.log("set_count", f" count {value} host {int(host)}")
        self.clean_up()
        self.count = value
        if not host and value == 0:
            self.enable(False)
        elif not host and self.config & h.HV_STIMER_AUTO_ENABLE:
            self.enable(True)
        if self.enabled:
            self.mark()
        return True

    def serve(self) -> None:
        """An entry's look at a timer that was marked."""
        if not self.enabled:
            return
        if self.expires and self.v.m.reference() >= self.expires:
            self._expire()
        if not (self.enabled and self.count):
            self.clean_up()
        elif not self.stuck:
            self._start()

    def _start(self) -> None:
        now = self.v.m.reference()
        if self.periodic:
            if not self.expires:
                self.expires = now + self.count
            elif now >= self.expires:
                self.expires = now + self.count - (now - self.expires) % self.count
            self.log("start_periodic", f" time_now {now} exp_time {self.expires}")
            self.hrtimer = self.v.m.now + 100 * (self.expires - now)
            return
        self.expires = self.count
        if now >= self.count:
            self.mark()
            return
        self.log("start_one_shot", f" time_now {now} count {self.count}")
        self.hrtimer = self.v.m.now + 100 * (self.count - now)

    def _expire(self) -> None:
        self.stuck = True
        result = self._interrupt() if self.direct else self._message()
        self.log("expiration", f" direct {int(self.direct)} send result {result}")
        if result == 0:
            self.stuck = False
            if not self.periodic:
                self.enable(False)

    def _interrupt(self) -> int:
        vector = self.config >> h.HV_STIMER_VECTOR_SHIFT & 0xFF
        return 1 - self.v.accept(Irq(vector, r.DM_FIXED, False, False, False, r.SH_NONE, 0))

    def _message(self) -> int:
        m = self.v.m
        if not self.v.simp & h.HV_PAGE_ENABLED:
            return -ENOENT
        slot = (self.v.simp // PAGE * PAGE) + self.sint * h.HV_MESSAGE_BYTES
        there = m.read(slot, 4)
        if there is None:
            return -EFAULT
        if any(there):
            if self.periodic:
                return 0
            m.write(slot + 5, bytes([h.HV_MESSAGE_PENDING]))
            return -EAGAIN
        m.write(slot, self.message())
        status = self.v.raise_sint(self.sint)
        return status if status < 0 else 0 if status else -EFAULT

    def message(self) -> bytes:
        words = (
            (h.HV_MESSAGE_TIMER_EXPIRED, 4),
            (h.HV_MESSAGE_TIMER_PAYLOAD, 1),
            (0, 3 + 8),
            (self.index, 4),
            (0, 4),
            (self.expires, 8),
            (self.v.m.reference(), 8),
        )
        return b"".join(value.to_bytes(size, "little") for value, size in words)
