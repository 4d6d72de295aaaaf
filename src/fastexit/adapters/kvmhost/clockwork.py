"""The thread for what is due at a time and is no vCPU's: ticks of the PIT, the IOAPIC's delayed work.

Models: nothing; the host's kernel has workers for it.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fastexit.adapters.kvmhost.host import KvmHost


class Clockwork:
    """A thread that sleeps until the machine's next timer; `look` tells it that there may be an earlier one."""

    def __init__(self, host: KvmHost) -> None:
        self._host = host
        self._changed = threading.Event()
        self.thread: threading.Thread = threading.Thread(target=self._main, name="clockwork", daemon=True)

    def look(self) -> None:
        """Something may be due earlier than it was."""
        self._changed.set()

    def _main(self) -> None:
        host = self._host
        try:
            while host.ended is None:
                self._changed.clear()
                with host.gate:
                    for vcpu, outcome in host.machine.run_timers():
                        if outcome.effects:
                            host.vcpus[vcpu].kick.kick()
                    due = host.machine.next_machine_timer()
                wait = None if due is None else max(0, due - host.clock()) / 1e9
                if host.ended is None:
                    self._changed.wait(wait)
        except BaseException as error:
            host.fail(error)
