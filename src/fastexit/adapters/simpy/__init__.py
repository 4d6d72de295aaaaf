"""SimPy as a host: vCPUs are processes, an exit takes its modelled time, notifications, kicks and wake-ups are events.

A guest is a generator that gets its Cpu and says what the guest does::

    def guest(cpu):
        yield from cpu.compute(5_000)               # cycles of its own; interrupts are taken in between
        yield from cpu.ipi(dest=1, vector=0xFD)     # WRMSR to the ICR, until the guest runs again
        yield from cpu.set_timer(us=500, vector=0xEC)
        yield from cpu.halt()                       # HLT; sleeps until something wakes it

    sim = Simulation(fx.Machine(vcpus=4, kernel="6.18", costs="skylake-retpoline"))
    sim.cpus[0].start(guest, handlers={0xEC: on_timer})
    sim.cpus[1].start(other, handlers={0xFD: on_reschedule})
    sim.run()
    print(sim.stats())

A device is a process too, or a callback, that has a line::

    line = sim.line(gsi=17)
    line.up()                                       # KVM_IRQ_LINE; pulse() and down() likewise

Time is in ns. What is simplified: the machine's state moves at the beginning of an exit, not in its course; what
arrives while an exit lasts is looked at behind it, where a kick that this exit has not seen yet costs one of its own. A
vector that was posted in the meantime may be taken by an exit of the target's own up to one sender's exit early. Every
vCPU has a pCPU to itself.
"""

from __future__ import annotations

from fastexit.adapters.simpy.actions import Action, Guest, GuestError
from fastexit.adapters.simpy.cpu import Cpu
from fastexit.adapters.simpy.interrupts import Handler
from fastexit.adapters.simpy.ledger import Cause
from fastexit.adapters.simpy.line import Line
from fastexit.adapters.simpy.simulation import Simulation
from fastexit.adapters.simpy.stats import ExitRow, InterruptRow, Stats, VcpuRow

__all__ = [
    "Action",
    "Cause",
    "Cpu",
    "ExitRow",
    "Guest",
    "GuestError",
    "Handler",
    "InterruptRow",
    "Line",
    "Simulation",
    "Stats",
    "VcpuRow",
]
