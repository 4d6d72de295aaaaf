"""Synthetic timers of a replayed VM: what they print when their time has come, against what KVM's rules make of it.

Models: stimer_start, stimer_timer_callback, kvm_hv_process_stimers, stimer_expiration as far as lines tell. They tell
the time: kvm_hv_stimer_start_* say when they were printed, and the rest of such a line follows from CONFIG and COUNT.
Whether a message finds its slot free lies in the guest's memory, which no line shows: the result of such an expiration
is taken over, and what follows from it is predicted again.

A timer is known from its first line of a write on.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from fastexit import hyperv as HV
from fastexit.trace.events import Event

if TYPE_CHECKING:
    from fastexit.trace.guest import Guest

_LINE = re.compile(r"vcpu_id (\d+) timer (\d+)(?: (.*))?")
_CONFIG = re.compile(r"config 0x([0-9a-f]+) host ([01])")
_COUNT = re.compile(r"count (\d+) host ([01])")
_STARTED = re.compile(r"time_now (\d+) (?:exp_time|count) (\d+)")
_EXPIRED = re.compile(r"direct ([01]) send result (-?\d+)")
_PREFIX = "kvm_hv_stimer_"
_MESSAGE_RESULTS = frozenset((0, -2, -11, -14))
_U64 = (1 << 64) - 1


class _Stimer:
    """One timer, as its lines have shown it."""

    def __init__(self) -> None:
        self.config: int | None = None
        self.count: int | None = None
        self.expiration: int | None = None
        """stimer->exp_time; None: not known."""
        self.armed: bool | None = None
        """Its hrtimer runs; None: not known."""
        self.cleanup_due = False

    @property
    def known(self) -> bool:
        return self.config is not None and self.count is not None

    @property
    def enabled(self) -> bool:
        return bool((self.config or 0) & HV.HV_STIMER_ENABLED)

    @property
    def periodic(self) -> bool:
        return bool((self.config or 0) & HV.HV_STIMER_PERIODIC)

    def write_config(self, value: int) -> None:
        """stimer_set_config; its SINT 0 disables a timer that was enabled before."""
        direct = value & HV.HV_STIMER_DIRECT
        if self.enabled and not direct and not value >> HV.HV_STIMER_SINT_SHIFT & 0xF:
            value &= ~HV.HV_STIMER_ENABLED
        self.config = value

    def write_count(self, value: int, host: bool) -> None:
        """stimer_set_count, which user space's writes do not enable or disable."""
        self.count = value
        if host or self.config is None:
            return
        if not value:
            self.config &= ~HV.HV_STIMER_ENABLED
        elif self.config & HV.HV_STIMER_AUTO_ENABLE:
            self.config |= HV.HV_STIMER_ENABLED

    def started(self, now: int) -> int | None:
        """exp_time of a periodic timer that starts now, COUNT of a one-shot; None: it cannot start."""
        assert self.count is not None
        if not self.enabled or not self.count:
            return None
        if not self.periodic:
            self.expiration = self.count
            return self.count if now < self.count else None
        if not self.expiration:
            self.expiration = now + self.count & _U64
        elif now >= self.expiration:
            self.expiration = now + self.count - (now - self.expiration) % self.count & _U64
        return self.expiration


class StimerLines:
    """The timers of one VM. Their hrtimers fire on any thread, so they are not a vCPU's alone."""

    def __init__(self, guest: Guest) -> None:
        self._guest = guest
        self.alone: bool = False
        """There is no other VM whose hrtimer it might be that fires on a thread."""
        self._timers: dict[tuple[int, int], _Stimer] = {}

    def seen(self, line: int, event: Event) -> None:
        """A recorded kvm_hv_stimer line."""
        found = _LINE.fullmatch(event.text)
        if found is None:
            return
        vcpu, n, rest = int(found[1]), int(found[2]), found[3] or ""
        if event.name == f"{_PREFIX}callback" and not self.alone:
            return
        timer = self._timers.setdefault((vcpu, n), _Stimer())
        what = event.name.removeprefix(_PREFIX)
        if timer.cleanup_due and what != "cleanup" and f"{_PREFIX}cleanup" in self._guest.recorded.events:
            self._guest.differs(line, f"{_PREFIX}cleanup", "", f"vcpu_id {vcpu} timer {n}")
            timer.cleanup_due = False
        predicted = getattr(self, f"_{what}")(timer, rest)
        if predicted is None:
            return
        exact = predicted == rest
        self._guest.report.hv_timers.add(exact)
        if not exact:
            text = "" if predicted is _NOT else f"vcpu_id {vcpu} timer {n} {predicted}"
            self._guest.differs(line, event.name, event.text, text)

    # Each of these says what the rest of the line is to be: None is that nobody knows, _NOT that there should be none.

    def _set_config(self, timer: _Stimer, rest: str) -> None:
        if (found := _CONFIG.fullmatch(rest)) is not None:
            timer.write_config(int(found[1], 16))
            timer.cleanup_due = True

    def _set_count(self, timer: _Stimer, rest: str) -> None:
        if (found := _COUNT.fullmatch(rest)) is not None:
            timer.write_count(int(found[1]), found[2] == "1")
            timer.cleanup_due = True

    def _cleanup(self, timer: _Stimer, rest: str) -> str | None:
        """Behind each write, and where a timer that was served does not go on."""
        due, timer.cleanup_due = timer.cleanup_due, False
        over = not timer.enabled or not timer.count
        timer.expiration, timer.armed = 0, False
        if due or not timer.known:
            return "" if due else None
        return "" if over else _NOT

    def _start_periodic(self, timer: _Stimer, rest: str) -> str | None:
        return self._start(timer, rest, "exp_time", True)

    def _start_one_shot(self, timer: _Stimer, rest: str) -> str | None:
        return self._start(timer, rest, "count", False)

    def _start(self, timer: _Stimer, rest: str, word: str, periodic: bool) -> str | None:
        found = _STARTED.fullmatch(rest)
        if found is None:
            return None
        timer.armed = True
        now, then = int(found[1]), int(found[2])
        if not timer.known or (periodic and timer.expiration is None):
            timer.expiration = then
            return None
        predicted = timer.started(now) if periodic is timer.periodic else None
        timer.expiration = then
        return _NOT if predicted is None else f"time_now {now} {word} {predicted}"

    def _callback(self, timer: _Stimer, rest: str) -> str | None:
        armed, timer.armed = timer.armed, False
        return None if armed is None else "" if armed else _NOT

    def _expiration(self, timer: _Stimer, rest: str) -> str | None:
        found = _EXPIRED.fullmatch(rest)
        if found is None or timer.config is None:
            return None
        enabled, direct, result = timer.enabled, bool(timer.config & HV.HV_STIMER_DIRECT), int(found[2])
        if not result and not timer.periodic:
            timer.config &= ~HV.HV_STIMER_ENABLED
        if not enabled:
            return _NOT
        possible = (0, 1) if direct else _MESSAGE_RESULTS
        return f"direct {int(direct)} send result {result if result in possible else 0}"


_NOT = "is not due"
"""In place of what a line should say: there should be none."""
