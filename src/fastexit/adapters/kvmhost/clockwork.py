"""The thread for what is due at a time and is no vCPU's: ticks of the PIT, the IOAPIC's delayed work.

Models: nothing; the host's kernel has workers for it.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fastexit.adapters.kvmhost.host import KvmHost


class Clockwork:
    """Waits for the machine's next timer; `look` tells it that there may be an earlier one."""

    def __init__(self, host: KvmHost) -> None:
        self._host = host
        self._changed = threading.Event()
        self._until: int | None = None
        """What it waits for."""
        self.thread: threading.Thread = threading.Thread(target=self._main, name="clockwork", daemon=True)

    def look(self) -> None:
        """Something may be due earlier than it was."""
        self._changed.set()

    def ended(self) -> None:
        """An interrupt is ended, which the IOAPIC or the PIT may have waited for."""
        due, until = self._host.machine.next_machine_timer(), self._until
        if due is not None and (until is None or due < until):
            self._changed.set()

    def _main(self) -> None:
        host = self._host
        earliest = 0
        try:
            while host.ended is None:
                self._changed.clear()
                self._until = None  # whoever ends an interrupt meanwhile has it looked at again
                began = host.clock()
                with host.gate:
                    if began >= earliest:
                        earliest = self._fire(began)
                    due = host.machine.next_machine_timer()
                    self._until = due if due is None else max(due, earliest)
                wait = None if self._until is None else max(0, self._until - host.clock()) / 1e9
                if host.ended is None:
                    self._changed.wait(wait)
        except BaseException as error:
            host.fail(error)

    def _fire(self, began: int) -> int:
        """What is due; when there may be more: whoever got something is to have time for it, this thread's among it."""
        host, earliest = self._host, 0
        for vcpu, outcome in host.machine.run_timers():
            pace = host.vcpus[vcpu].pace
            pace.fired()
            earliest = max(earliest, pace.earliest(), 2 * host.clock() - began)
            if outcome.effects:
                host.vcpus[vcpu].kick.kick()
        return earliest
