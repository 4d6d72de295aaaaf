"""A device's interrupt line."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastexit.checks import integer

if TYPE_CHECKING:
    from fastexit.adapters.simpy.simulation import Simulation


class Line:
    """A device's interrupt line: ``level`` is 1 while the device holds it up. It takes no time of any vCPU.

    Whom an interrupt makes something to do for, it reaches ``flight`` later, a sleeper ``schedule``.
    """

    def __init__(self, sim: Simulation, gsi: int) -> None:
        self.sim = sim
        self.gsi: int = integer(gsi, "GSI", 0xFFFF_FFFF)
        self.level: int = 0

    def __repr__(self) -> str:
        return f"<Line of GSI {self.gsi}, {'up' if self.level else 'down'}>"

    def up(self) -> int:
        """Raise it: what KVM_IRQ_LINE_STATUS says, as Machine.irq_line."""
        return self._move(1)

    def down(self) -> int:
        """Lower it."""
        return self._move(0)

    def pulse(self) -> int:
        """Raise and lower it, as an edge-triggered device does: what the rise came to."""
        accepted = self.up()
        self.down()
        return accepted

    def _move(self, level: int) -> int:
        sim = self.sim
        sim.set_time()
        self.level = level
        machine = sim.machine
        accepted = sim.ledger.watch(lambda: machine.irq_line(self.gsi, level))
        sim.tell(machine.targets)
        sim.arm()
        return accepted
