"""SimPy as a host: vCPUs are processes, an exit takes its modelled time, notifications, kicks and wake-ups are events.

A guest is a generator that gets its Cpu and says what the guest does::

    def guest(cpu):
        yield from cpu.compute(5_000)               # cycles of its own; interrupts are taken in between
        yield from cpu.ipi(dest=1, vector=0xFD)     # WRMSR to the ICR, until the guest runs again
        yield from cpu.halt()                       # HLT; sleeps until something wakes it

    sim = Simulation(fx.Machine(vcpus=4, kernel="6.18", costs="skylake-retpoline"))
    sim.cpus[0].start(guest)
    sim.cpus[1].start(other, handlers={0xFD: on_reschedule})
    sim.run()

A device is a process too, or a callback, that has a line::

    line = sim.line(gsi=17)
    line.up()                                       # KVM_IRQ_LINE; pulse() and down() likewise

Time is in ns. What is simplified: the machine's state moves at the beginning of an exit, not in its course; what
arrives while an exit lasts is looked at behind it, where a kick that this exit has not seen yet costs one of its own. A
vector that was posted in the meantime may be taken by an exit of the target's own up to one sender's exit early. Every
vCPU has a pCPU to itself.
"""

from __future__ import annotations

import math
import random
from collections import deque
from collections.abc import Callable, Generator, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from fastexit import layout as L
from fastexit import regs as R
from fastexit.checks import integer
from fastexit.costs.meter import TimedOutcome
from fastexit.costs.profile import CostProfile
from fastexit.costs.vcpu import TimedVcpu
from fastexit.machine import Machine
from fastexit.outcome import Effect, Outcome, Path
from fastexit.reasons import SvmExit, VmxExit

if TYPE_CHECKING:
    import simpy
else:
    try:
        import simpy
    except ModuleNotFoundError as missing:
        if missing.name != "simpy":
            raise
        simpy = None

Guest = Generator[Any, Any, Any]
Handler = Callable[["Cpu", int], "Guest | None"]

_TIMER_MSRS = frozenset({R.MSR_TSC_DEADLINE} | {R.MSR_X2APIC_BASE + (reg >> 4) for reg in (0x320, 0x380, 0x390, 0x3E0)})
_TIMER_STAGES = frozenset({"timer", "preemption_timer", "hrtimer"})


class Simulation:
    """A machine with costs inside a SimPy environment.

    Args:
        machine: made with ``costs``; it is booted into x2APIC mode unless it is already.
        env: a simpy.Environment, or None for one of its own, which then is ``env``.
        jitter: the latency of every event varies by up to this share, both ways.
        seed: of ``random``, the random.Random that jitter and guests draw from: equal seeds give equal runs.

    ValueError for a machine without costs, ImportError without SimPy.
    """

    def __init__(self, machine: Machine, env: Any = None, *, jitter: float = 0.0, seed: int = 0) -> None:
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
        self._alarm: float | None = None
        if not machine.vcpus[0].apic_base & R.APICBASE_EXTD:
            machine.boot_x2apic()
        for v in machine.vcpus:
            v.load(v.index)
        self.cpus: list[Cpu] = [Cpu(self, v) for v in machine.vcpus]  # type: ignore[arg-type]
        for v in machine.vcpus:
            v.rflags |= R.RFLAGS_IF
            machine.dispatcher.start_run(v)

    def run(self, until: Any = None) -> Any:
        """Environment.run: until nothing is left, a time in ns, or an event."""
        return self.env.run(until)

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

    def set_time(self) -> None:
        """The machine's clock follows the simulation's; timers that are due fire."""
        now = int(self.env.now)
        if now > self.machine.time:
            before = [cpu.v.timed for cpu in self.cpus]
            for index, out in self.machine.set_time(now):
                cpu = self.cpus[index]
                cpu.arrive(out.effects, None if cpu.v.timed is before[index] else cpu.v.timed)
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
        accepted = sim.machine.irq_line(self.gsi, level)
        for vcpu, effect in sim.machine.targets:
            way = "schedule" if effect & Effect.WAKE else "flight"
            sim.after(sim.ns(sim.costs[way]), partial(sim.cpus[vcpu].arrive, effect))
        sim.arm()
        return accepted


class Cpu:
    """One vCPU: ``v``. Its methods are what its guest does; each is to be called as ``yield from cpu.method(...)``.

    ``interrupts`` counts interrupts taken, ``exits`` exits, ``exit_ns`` the time in them.
    """

    def __init__(self, sim: Simulation, v: TimedVcpu) -> None:
        self.sim = sim
        self.v = v
        self.index: int = v.index
        self.handlers: dict[int, Handler] = {}
        self.interrupts: int = 0
        self.exits: int = 0
        self.exit_ns: float = 0.0
        svm = sim.machine.vendor == "svm"
        self._svm = svm
        self._interrupt_reason = SvmExit.INTERRUPT if svm else VmxExit.EXTERNAL_INTERRUPT
        self._window_reason = SvmExit.VINTR if svm else VmxExit.INTERRUPT_WINDOW
        self._halt_reason = SvmExit.HLT if svm else VmxExit.HLT
        self._arrived: deque[Effect] = deque()
        self._injected: deque[int] = deque()
        self._kicked = self._told = False
        self._owed = 0.0
        self._bell = sim.env.event()
        self._process: Any = None

    def __repr__(self) -> str:
        return f"<Cpu {self.index} at {self.sim.env.now:g} ns>"

    def start(self, guest: Callable[[Cpu], Guest], handlers: Mapping[int, Handler] | None = None) -> Any:
        """The guest's process. ``handlers``: vector -> function of (cpu, vector), a generator if it takes time.

        An exception of the guest or of a handler is the process's, so that run() raises it unless somebody waits for
        the process. A guest that is over takes no interrupts; another one may be started then. RuntimeError while one
        runs: it would be two instruction streams on one vCPU.
        """
        if self._process is not None and self._process.is_alive:
            raise RuntimeError(f"vCPU {self.index} has a guest already")
        for vector, handler in (handlers or {}).items():
            self.handlers[integer(vector, "vector", 0xFF)] = handler
        self._process = self.sim.env.process(guest(self))
        return self._process

    # --------------------------------------------------------------------------------------------- what a guest does

    def compute(self, cycles: float) -> Guest:
        """Guest code of that length; interrupts are taken in between and make it longer. ValueError below 0."""
        yield from self.wait(self.sim.ns(cycles))

    def wait(self, ns: float) -> Guest:
        """As compute, in ns."""
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

    def spin(self, event: Any) -> Guest:
        """Guest code that polls memory until a SimPy event has happened; interrupts are taken meanwhile."""
        yield from self._look()
        while not event.triggered:
            yield event | self._bell
            yield from self._look()

    def wrmsr(self, msr: int, value: int) -> Guest:
        """WRMSR as the guest's CPU executes it (Vcpu.hw_wrmsr), until it runs again: the TimedOutcome."""
        if msr in _TIMER_MSRS:
            self.sim.set_time()
        out = yield from self._exit(lambda: self.v.hw_wrmsr(msr, value))
        yield from self._look()
        return out

    def ipi(self, dest: int = 0, vector: int = 0, **icr: Any) -> Guest:
        """An ICR write; arguments as for fastexit.icr."""
        return (yield from self.wrmsr(R.MSR_X2APIC_ICR, R.icr(dest, vector, **icr)))

    def mem_write(self, gpa: int, value: int, length: int = 4) -> Guest:
        """A store to a device, such as the IOAPIC: the TimedOutcome. RuntimeError where it is user space's."""
        self.sim.set_time()
        out = yield from self._exit(lambda: self.v.mem_write(gpa, value, length))
        yield from self._look()
        return out

    def mem_read(self, gpa: int, length: int = 4) -> Guest:
        """A load from a device: its value."""
        return (yield from self._read(lambda: self.v.mem_read(gpa, length)))

    def io_write(self, port: int, value: int, length: int = 1) -> Guest:
        """OUT to a device, such as the PICs: the TimedOutcome. RuntimeError where it is user space's."""
        self.sim.set_time()
        out = yield from self._exit(lambda: self.v.io_write(port, value, length))
        self.sim.arm()
        yield from self._look()
        return out

    def io_read(self, port: int, length: int = 1) -> Guest:
        """IN from a device: its value."""
        return (yield from self._read(lambda: self.v.io_read(port, length)))

    def _read(self, load: Callable[[], int]) -> Guest:
        """An exit that reads, until the guest has its value."""
        self.sim.set_time()
        found: list[int] = []

        def act() -> Outcome:
            found.append(load())
            assert self.v.timed is not None
            return self.v.timed

        yield from self._exit(act)
        yield from self._look()
        return found[0]

    def halt(self) -> Guest:
        """HLT with interrupts on: sleeps until woken, and has then taken what woke it."""
        taken = self.interrupts
        yield from self._look()
        if self.interrupts != taken:
            return
        yield from self._exit(lambda: self.v.exit(self._halt_reason))
        while self.v.mode == R.OUTSIDE_GUEST_MODE:
            while self._arrived and self.v.mode == R.OUTSIDE_GUEST_MODE:
                self._sleeper_gets(self._arrived.popleft())
            if self.v.mode == R.OUTSIDE_GUEST_MODE:
                yield self._bell
                self._rearm()
            else:
                yield self.sim.env.timeout(self.sim.ns(self.v.run_cycles))
        yield from self._look()

    # -------------------------------------------------------------------------------------------- what happens to it

    def arrive(self, effect: Effect, exit: TimedOutcome | None = None) -> None:
        """Something for this vCPU reaches its pCPU; ``exit``: by an exit of its own, whose time is still to pass."""
        if exit is not None:
            self._injected.extend(self._entered())
            self.exits += 1
            self._owed += self.sim.ns(exit.cycles_spent)
        self._arrived.append(effect)
        if not self._bell.triggered:
            self._bell.succeed()

    def _rearm(self) -> None:
        if self._bell.triggered:
            self._bell = self.sim.env.event()

    def _sleeper_gets(self, effect: Effect) -> None:
        """A wake-up: KVM_RUN goes on. A notification is 0xF1 then, whose handler wakes the thread."""
        if effect & Effect.WAKE:
            self.v.run()
            self._injected.extend(self._entered())
        elif effect & Effect.NOTIFY:
            notification = self.v.notification
            for index in self.sim.machine.host_interrupt(notification.cpu, notification.vector):
                cpu = self.sim.cpus[index]
                self.sim.after(self.sim.ns(self.sim.costs["schedule"]), partial(cpu.arrive, Effect.WAKE))

    def _exit(self, act: Callable[[], Outcome]) -> Guest:
        """Something that may exit: its effects are on their way to their targets, its time passes."""
        out = act()
        assert isinstance(out, TimedOutcome)
        self._injected.extend(self._entered())
        sim, ns = self.sim, self.sim.ns
        for sent in out.sent:
            way = "schedule" if sent.effect & Effect.WAKE else "flight"
            target = sim.cpus[sent.vcpu]
            delay = ns(sent.cycles) + ns(sim.costs[way])
            sim.after(delay, partial(target.arrive, sent.effect))
        if any(charge.stage in _TIMER_STAGES for charge in out.charges):
            sim.arm()
        if out.user is not None:
            raise RuntimeError(f"vCPU {self.index} left to user space: {out!r}")
        self._told = True
        took = ns(out.cycles_spent)
        if out.path is not Path.HARDWARE:
            self.exits += 1
            self.exit_ns += took
        yield sim.env.timeout(took)
        return out

    def _entered(self) -> list[int]:
        """The vector that the last entry injected, once."""
        vector = self.v.injected
        if vector is None:
            return []
        self.v.machine.mem[self.v.own + L.K_INTERRUPT] = 0
        return [vector]

    def _look(self) -> Guest:
        """Take what has arrived, then interrupts, until there is nothing more."""
        self._rearm()
        v, sim = self.v, self.sim
        while True:
            if self._owed:
                took, self._owed = self._owed, 0.0
                self.exit_ns += took
                yield sim.env.timeout(took)
            if self._arrived:
                effect = self._arrived.popleft()
                if effect & Effect.NOTIFY and not self._svm and v.hw_notify():
                    yield sim.env.timeout(sim.ns(sim.costs["posted"]))
                elif effect & Effect.DOORBELL:
                    yield sim.env.timeout(sim.ns(sim.costs["posted"]))
                self._kicked |= bool(effect & Effect.KICK)
                self._told = True
                continue
            if self._kicked:
                self._kicked = False
                if v.mode != R.EXITING_GUEST_MODE:  # an exit of its own has answered
                    continue
                yield from self._exit(lambda: v.exit(self._interrupt_reason))
                continue
            if not v.rflags & R.RFLAGS_IF and not self._injected:
                break  # an injected interrupt is through its gate, which an entry that was left at once has closed
            vector = self._next()
            if vector is not None:
                yield from self._interrupt(vector)
            elif v.irq_window:
                yield from self._exit(lambda: v.exit(self._window_reason))
            else:
                break
        self._rearm()
        if self._arrived and not self._bell.triggered:
            self._bell.succeed()

    def _next(self) -> int | None:
        """The interrupt that the guest's CPU takes now: injected by an entry, or delivered by the virtual APIC."""
        if self._injected:
            return self._injected.popleft()
        if not self.v.apicv:
            return None
        if not self._svm:
            return self.v.hw_deliver()
        # AVIC's targets have the vector in IRR before the doorbell has reached them.
        vector = self.v.ack() if self._told else None
        self._told = vector is not None
        return vector

    def _interrupt(self, vector: int) -> Guest:
        """Through the gate, the handler, EOI, IRET."""
        sim, v = self.sim, self.v
        v.rflags &= ~R.RFLAGS_IF
        self.interrupts += 1
        yield sim.env.timeout(sim.ns(sim.costs["guest_irq"]))
        handler = self.handlers.get(vector)
        if handler is not None:
            work = handler(self, vector)
            if work is not None:
                yield from work
        yield from self._exit(lambda: v.hw_wrmsr(R.MSR_X2APIC_EOI, 0))
        v.rflags |= R.RFLAGS_IF
