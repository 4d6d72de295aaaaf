"""Timers that come faster than they are served leave a guest half of the time; those that do not come when due."""

from __future__ import annotations

import pytest

from fastexit.adapters.kvmhost.pace import LONGEST, Pace

US = 1_000


class Cpu:
    """One vCPU with a periodic timer, in a world where all that is done takes its time.

    ``entry``: from the decision to enter until the guest's first instruction, and as long back. ``exits``: of a
    handler. A kick that is due within the entry ends it before the guest has done anything.
    """

    def __init__(self, period: int, entry: int, exits: int, *, begins_free: bool = True) -> None:
        self.period, self.entry, self.exits = period, entry, exits
        self.pace = Pace()
        self.now = self.due = 0
        self.left_of_handler = 0
        self.free = begins_free
        self.steps_to_free = 0 if begins_free else 1
        self.pending = False
        self.own = self.ticks = 0
        self.late: list[int] = []

    def turn(self) -> None:
        """Timers, delivery, and a run until the handler's next exit, or the kick."""
        pace = self.pace
        if self.due <= self.now and self.now >= pace.earliest():
            self.late.append(self.now - self.due)
            self.due += self.period * (1 + (self.now - self.due) // self.period)
            self.pending = True
            pace.fired()
        if self.pending and self.free:
            self.pending, self.free = False, False
            self.ticks += 1
            self.left_of_handler = self.exits
            pace.delivered(self.now)
        kick = max(self.due, pace.earliest(), self.now + 1)
        begin, self.now = self.now, self.now + self.entry
        if kick <= self.now:
            self.now += self.entry
            pace.left(self.now, free=self.free, moved=False)
            return
        if self.steps_to_free:
            self.steps_to_free, self.free = 0, True
        elif self.left_of_handler:
            self.left_of_handler -= 1
            self.now += self.entry
            pace.left(self.now, free=False, moved=True)
            return
        self.free = True
        if not self.pending:
            self.own += kick - self.now
            self.now = kick
        self.now += self.entry
        pace.left(self.now, free=True, moved=True)
        assert self.now > begin


@pytest.mark.parametrize("exits", [0, 1, 3])
@pytest.mark.parametrize("entry", [10 * US, 100 * US, 3_000 * US])
@pytest.mark.parametrize("begins_free", [True, False])
def test_a_guest_comes_to_its_own(entry: int, exits: int, begins_free: bool) -> None:
    """However much shorter than its service a timer's period is."""
    cpu = Cpu(entry // 5, entry, exits, begins_free=begins_free)
    for _ in range(3000):
        cpu.turn()
    assert cpu.ticks > 100
    assert cpu.own > cpu.now / 10


def test_the_share_is_the_guests() -> None:
    """Ticks of a shorter period than their service: the guest has several times what they take."""
    cpu = Cpu(100 * US, 1_000 * US, 3)
    for _ in range(3000):
        cpu.turn()
    assert cpu.own > cpu.now / 2


def test_timers_that_are_served_in_time_are_not_late() -> None:
    cpu = Cpu(4_000 * US, 20 * US, 3)
    for _ in range(3000):
        cpu.turn()
    assert max(cpu.late[1:]) <= 2 * cpu.entry


def test_no_timer_waits_for_ever() -> None:
    """A handler that never ends, and a guest that stands still, are no reason."""
    pace = Pace()
    pace.fired()
    pace.delivered(0)
    pace.left(5 * LONGEST, free=False, moved=True)
    assert pace.earliest() <= LONGEST
    pace.fired()
    for _ in range(100):
        pace.left(5 * LONGEST, free=False, moved=False)
    assert pace.earliest() <= 6 * LONGEST


def test_who_rests_is_woken_in_time() -> None:
    pace = Pace()
    pace.fired()
    pace.delivered(0)
    pace.left(1_000 * US, free=False, moved=True)
    pace.rests()
    assert pace.earliest() < 1_000 * US
