"""How soon a vCPU's timers may interrupt it again: some times what serving the last one took, the guest has first.

Models: nothing. Where CPUs are emulated, or shared by many, an exit to user space can take so long that serving a tick
takes longer than the time to the next. A guest whose ticks came when they are due would serve them and do nothing else,
or be kicked, each time, before its first instruction. So those that come too soon come late, as on any busy host.
"""

from __future__ import annotations

LONGEST = 1_000_000_000
"""ns that a timer is kept waiting at most, however long serving the last one took."""
SHARE = 4
"""How many times longer than the serving of a timer the guest has for itself."""
LEAST = 50_000
"""ns for a guest that a kick has kept from doing anything, though what it came for cannot go in yet; doubled, each
time that this was too little."""
NEVER = -1


class Pace:
    """Of one vCPU; times are the clock's, in ns."""

    def __init__(self) -> None:
        self._fired = self._serving = False
        self._began = self._ended = NEVER
        self._least, self._again = 0, NEVER

    def fired(self) -> None:
        """A timer was due."""
        self._fired = True

    def delivered(self, now: int) -> None:
        """Something goes into the guest."""
        if self._fired:
            self._fired, self._serving = False, True
            self._began = self._ended = now
            self._least, self._again = 0, NEVER

    def left(self, now: int, *, free: bool, moved: bool) -> None:
        """The guest is left: whether it could be interrupted, and whether it has done anything since it was entered."""
        self._serving &= not free
        if self._serving:
            self._ended = now
        if moved:
            self._least, self._again = 0, NEVER
        elif self._fired:
            self._least = min(max(2 * self._least, LEAST), LONGEST)
            self._again = now + self._least

    def rests(self) -> None:
        """The guest has nothing to do."""
        self._began, self._serving = NEVER, False

    def earliest(self) -> int:
        """Timers that are due earlier wait until then."""
        if self._began == NEVER:
            return self._again
        until = self._ended + min(SHARE * (self._ended - self._began), LONGEST)
        return max(min(until, self._began + LONGEST) if self._serving else until, self._again)
