"""A machine inside a SimPy environment: its clock, its devices' lines, what is counted."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from functools import partial
from typing import TYPE_CHECKING, Any

from fastexit import regs as R
from fastexit.adapters.simpy.cpu import Cpu
from fastexit.adapters.simpy.ledger import Ledger
from fastexit.adapters.simpy.line import Line
from fastexit.adapters.simpy.stats import Stats, gather
from fastexit.costs.profile import CostProfile
from fastexit.machine import Machine
from fastexit.outcome import Effect

if TYPE_CHECKING:
    import simpy
else:
    try:
        import simpy
    except ModuleNotFoundError as missing:
        if missing.name != "simpy":
            raise
        simpy = None


class Simulation:
    """A machine with costs inside a SimPy environment.

    Args:
        machine: made with ``costs``; it is booted into x2APIC mode unless it is already.
        env: a simpy.Environment, or None for one of its own, which then is ``env``.
        jitter: the latency of every event varies by up to this share, both ways.
        seed: of ``random``, the random.Random that jitter and guests draw from: equal seeds give equal runs.
        strict: GuestError for an interrupt that has no handler, and for what a guest wanted to do and forgot to
            ``yield from``.

    ValueError for a machine without costs, ImportError without SimPy.
    """

    def __init__(
        self, machine: Machine, env: Any = None, *, jitter: float = 0.0, seed: int = 0, strict: bool = True
    ) -> None:
        if simpy is None:
            raise ImportError("fastexit.adapters.simpy needs SimPy: pip install simpy")
        if machine.costs is None:
            raise ValueError("a simulation needs time: make the machine with costs")
        if not 0 <= jitter < 1:
            raise ValueError(f"jitter {jitter} is no share from 0 to below 1")
        self.machine = machine
        self.costs: CostProfile = machine.costs
        self.env: simpy.Environment = simpy.Environment() if env is None else env
        self.random: random.Random = random.Random(seed)
        self.jitter = jitter
        self.strict = strict
        self._alarm: float | None = None
        if not machine.vcpus[0].apic_base & R.APICBASE_EXTD:
            machine.boot_x2apic()
        for v in machine.vcpus:
            v.load(v.index)
        self.ledger: Ledger = Ledger(machine, lambda: self.env.now)
        self.cpus: list[Cpu] = [Cpu(self, v) for v in machine.vcpus]  # type: ignore[arg-type]
        for v in machine.vcpus:
            v.rflags |= R.RFLAGS_IF
            machine.dispatcher.start_run(v)

    def run(self, until: Any = None) -> Any:
        """Environment.run: until nothing is left, a time in ns, or an event."""
        result = self.env.run(until)
        for cpu in self.cpus:
            cpu.check()
        return result

    def stats(self) -> Stats:
        """What has happened so far, by vCPU, cause and path: exits with their time, interrupts with their latencies."""
        return gather(self)

    def ns(self, cycles: float) -> float:
        """Cycles as nanoseconds of the cost profile's clock."""
        return self.costs.ns(cycles)

    def line(self, gsi: int) -> Line:
        """A device's interrupt line, by GSI: a pin of IOAPIC and PICs, a message or a SINT, as the routes say."""
        return Line(self, gsi)

    def after(self, ns: float, act: Callable[[], None]) -> None:
        """Call ``act`` that much later, give or take the jitter."""
        if self.jitter:
            ns *= 1 + self.random.uniform(-self.jitter, self.jitter)
        self.env.timeout(ns).callbacks.append(lambda _event: act())

    def tell(self, targets: Iterable[tuple[int, Effect]], ns: float = 0.0) -> None:
        """What the host does for vCPUs reaches them ``flight`` later than ``ns`` from now, a sleeper ``schedule``."""
        for vcpu, effect in targets:
            way = "schedule" if effect & Effect.WAKE else "flight"
            self.after(ns + self.ns(self.costs[way]), partial(self.cpus[vcpu].arrive, effect))

    def set_time(self) -> None:
        """The machine's clock follows the simulation's; timers that are due fire."""
        now = int(self.env.now)
        if now > self.machine.time:
            before = [cpu.v.timed for cpu in self.cpus]
            due = self.machine.next_timer()
            for index, out in self.ledger.watch_time(due, lambda: self.machine.set_time(now)):
                cpu, exit = self.cpus[index], self.cpus[index].v.timed
                if exit is None or exit is before[index]:
                    cpu.arrive(out.effects)
                else:  # a preemption timer's
                    cpu.arrive(out.effects, exit)
                    self.tell(target for target in exit.targets if target.vcpu != index)
        self.arm()

    def arm(self) -> None:
        """Be there when the next timer is due."""
        due = self.machine.next_timer()
        if due is None or (self._alarm is not None and self._alarm <= due):
            return
        self._alarm = due

        def fire() -> None:
            if self._alarm == due:
                self._alarm = None
            self.set_time()

        self.env.timeout(max(due - self.env.now, 0)).callbacks.append(lambda _event: fire())
