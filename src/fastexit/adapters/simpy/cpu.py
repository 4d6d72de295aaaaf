"""One vCPU for those who write guests: it runs one, computes, waits, polls; timers and instructions lie below."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Mapping
from typing import Any

from fastexit.adapters.simpy.actions import Guest, action
from fastexit.adapters.simpy.interrupts import Handler, called
from fastexit.adapters.simpy.timer import Timers
from fastexit.checks import integer


class Cpu(Timers):
    """One vCPU: ``v``. Its methods are what its guest does; each is to be called as ``yield from cpu.method(...)``.

    ``interrupts`` counts interrupts taken, ``exits`` exits, ``exit_ns`` the time in them; Simulation.stats has more.
    """

    _process: Any = None

    def start(self, guest: Callable[[Cpu], Guest], handlers: Mapping[int, Handler] | None = None) -> Any:
        """The guest's process. ``handlers``: vector -> function of (cpu, vector), a generator if it takes time.

        An exception of the guest or of a handler is the process's, so that run() raises it unless somebody waits for
        the process. A guest that is over takes no interrupts; another one may be started then. RuntimeError while one
        runs: it would be two instruction streams on one vCPU. TypeError for a guest that is no generator function.
        """
        if self._process is not None and self._process.is_alive:
            raise RuntimeError(f"vCPU {self.index} has a guest already")
        for vector, handler in (handlers or {}).items():
            self.handlers[integer(vector, "vector", 0xFF)] = handler
        work: Any = guest(self)
        if not isinstance(work, Generator):
            self.check()
            raise TypeError(
                f"vCPU {self.index}: the guest {called(guest)} gives {type(work).__name__}, is no generator function: "
                "what it does, it does with yield from, such as yield from cpu.compute(1_000)"
            )
        self._process = self.sim.env.process(self._life(work))
        return self._process

    def _life(self, work: Guest) -> Guest:
        """The guest from its first instruction to its last."""
        result = yield from work
        self.check()
        return result

    @action
    def compute(self, cycles: float) -> Guest:
        """Guest code of that length; interrupts are taken in between and make it longer. ValueError below 0."""
        yield from self._wait(self.sim.ns(cycles))

    @action
    def wait(self, ns: float) -> Guest:
        """As compute, in ns."""
        yield from self._wait(ns)

    def _wait(self, ns: float) -> Guest:
        if not 0 <= ns < math.inf:
            raise ValueError(f"{ns} is no time to spend")
        env = self.sim.env
        left = ns
        yield from self._look()
        while left > 0:
            began = env.now
            yield env.timeout(left) | self._bell
            left -= env.now - began
            if left < 1e-6:
                left = 0
            yield from self._look()

    @action
    def spin(self, event: Any) -> Guest:
        """Guest code that polls memory until a SimPy event has happened; interrupts are taken meanwhile."""
        yield from self._look()
        while not event.triggered:
            yield event | self._bell
            yield from self._look()
