"""What happens to a vCPU: effects arrive, entries inject, its CPU takes interrupts; and what an exit costs it."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator
from functools import partial
from typing import TYPE_CHECKING, Any, TypeAlias

from fastexit import regs as R
from fastexit.adapters.simpy.actions import Guest, GuestError
from fastexit.costs.meter import TimedOutcome
from fastexit.costs.vcpu import TimedVcpu
from fastexit.events import Event, ExtInt, Interrupt, Nmi, Smi
from fastexit.outcome import Effect, Outcome, Path
from fastexit.reasons import SvmExit, VmxExit
from fastexit.settle import waits_to_go_in

if TYPE_CHECKING:
    from fastexit.adapters.simpy.cpu import Cpu
    from fastexit.adapters.simpy.simulation import Simulation

Handler: TypeAlias = "Callable[[Cpu, int], Guest | None]"

_TIMER_STAGES = frozenset({"timer", "preemption_timer", "hrtimer"})


class Interruptible:
    """A vCPU as its host sees it; cpu.py has what its guest does.

    Attributes:
        interrupts: how many were taken.
        exits: exits whose time has passed, or passes.
        exit_ns: their time.
        forgotten: what the guest forgot to run, in words, or nothing.
    """

    def __init__(self, sim: Simulation, v: TimedVcpu) -> None:
        self.sim = sim
        self.v = v
        self.index: int = v.index
        self.handlers: dict[int, Handler] = {}
        self.interrupts: int = 0
        self.exits: int = 0
        self.exit_ns: float = 0.0
        self.forgotten: str = ""
        self._deadline_mode = False
        svm = sim.machine.vendor == "svm"
        self._svm = svm
        self._interrupt_reason = SvmExit.INTERRUPT if svm else VmxExit.EXTERNAL_INTERRUPT
        self._window_reason = SvmExit.VINTR if svm else VmxExit.INTERRUPT_WINDOW
        self._arrived: deque[Effect] = deque()
        self._kicked = self._told = False
        self._owed: deque[TimedOutcome] = deque()
        self._bell = sim.env.event()

    def __repr__(self) -> str:
        return f"<Cpu {self.index} at {self.sim.env.now:g} ns>"

    def check(self) -> None:
        """GuestError for what was to be done and never run."""
        if self.forgotten:
            said, self.forgotten = self.forgotten, ""
            raise GuestError(said)

    def arrive(self, effect: Effect, exit: TimedOutcome | None = None) -> None:
        """Something for this vCPU reaches its pCPU; ``exit``: by an exit of its own, whose time is still to pass."""
        if exit is not None:
            self._owed.append(exit)
        self._arrived.append(effect)
        if not self._bell.triggered:
            self._bell.succeed()

    def _rearm(self) -> None:
        if self._bell.triggered:
            self._bell = self.sim.env.event()

    def _sleeper_gets(self, effect: Effect) -> None:
        """A wake-up: KVM_RUN goes on. A notification is 0xF1 then, whose handler wakes the thread."""
        if effect & Effect.WAKE:
            self.sim.ledger.watch(self.v.run)
            self.sim.tell(self.v.targets)
        elif effect & Effect.NOTIFY:
            notification = self.v.notification
            for index in self.sim.machine.host_interrupt(notification.cpu, notification.vector):
                cpu = self.sim.cpus[index]
                self.sim.after(self.sim.ns(self.sim.costs["schedule"]), partial(cpu.arrive, Effect.WAKE))

    def _exit(self, cause: str, act: Callable[[], Outcome], icr: int | None = None) -> Guest:
        """Something that may exit: its effects are on their way to their targets, its time passes."""
        sim = self.sim
        out = sim.ledger.watch(act) if icr is None else sim.ledger.watch_ipi(self.v, icr, act)
        assert isinstance(out, TimedOutcome)
        for sent in out.sent:
            sim.tell([(sent.vcpu, sent.effect)], sim.ns(sent.cycles))
        if any(charge.stage in _TIMER_STAGES for charge in out.charges):
            sim.arm()
        if out.user is not None:
            raise RuntimeError(f"vCPU {self.index} left to user space: {out!r}")
        self._told = True
        yield sim.env.timeout(self._spent(cause, out))
        return out

    def _spent(self, cause: str, out: TimedOutcome) -> float:
        """What it takes, in ns; an exit is counted."""
        took = self.sim.ns(out.cycles_spent)
        if out.path is not Path.HARDWARE:
            self.exits += 1
            self.exit_ns += took
            self.sim.ledger.exit(self, cause, out.path.name, took)
        return took

    def _look(self) -> Guest:
        """Take what has arrived, then interrupts, until there is nothing more."""
        self._rearm()
        v, sim = self.v, self.sim
        while True:
            if self._owed:
                yield sim.env.timeout(self._spent("preemption timer", self._owed.popleft()))
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
                yield from self._exit("kick", lambda: v.exit(self._interrupt_reason))
                continue
            if not v.rflags & R.RFLAGS_IF and not waits_to_go_in(v):
                break  # an injected interrupt is through its gate, which an entry that was left at once has closed
            event = self._next()
            if event is not None:
                yield from self._goes_in(event)
            elif v.irq_window:
                yield from self._exit("interrupt window", lambda: v.exit(self._window_reason))
            else:
                break
        self._rearm()
        if self._arrived and not self._bell.triggered:
            self._bell.succeed()

    def _next(self) -> Event | None:
        """What goes into the guest's CPU now: injected by an entry, or delivered by the virtual APIC."""
        v = self.v
        if waits_to_go_in(v) or not self._svm or not v.apicv:
            return v.take()
        # AVIC's targets have the vector in IRR before the doorbell has reached them.
        event = v.take() if self._told else None
        self._told = event is not None
        return event

    def _goes_in(self, event: Event) -> Guest:
        match event:
            case Interrupt(vector):
                yield from self._interrupt(vector, eoi=True)
            case ExtInt(vector):
                yield from self._interrupt(vector, eoi=False)
            case Nmi():
                masked = ~self.v.rflags & R.RFLAGS_IF
                yield from self._interrupt(R.VECTOR_NMI, eoi=False)
                self.v.nmi_masked = False
                self.v.rflags &= ~masked
            case Smi():
                self.v.rsm()
            case _:
                if self.sim.strict:
                    raise GuestError(f"vCPU {self.index}: {event} at {self.sim.env.now:g} ns; no guest starts over")

    def _interrupt(self, vector: int, eoi: bool) -> Guest:
        """Through the gate, the handler, EOI, IRET."""
        sim, v = self.sim, self.v
        v.rflags &= ~R.RFLAGS_IF
        self.interrupts += 1
        yield sim.env.timeout(sim.ns(sim.costs["guest_irq"]))
        sim.ledger.taken(self, vector)
        yield from self._handle(vector)
        self.check()
        if eoi:
            yield from self._exit("EOI", lambda: v.hw_wrmsr(R.MSR_X2APIC_EOI, 0))
        v.rflags |= R.RFLAGS_IF

    def _handle(self, vector: int) -> Guest:
        """The guest's handler; GuestError where it has none."""
        handler = self.handlers.get(vector)
        if handler is None:
            if self.sim.strict:
                raise GuestError(
                    f"vCPU {self.index}: interrupt {vector:#x} at {self.sim.env.now:g} ns has no handler: "
                    f"cpu.start(guest, handlers={{{vector:#x}: ...}}), or Simulation(..., strict=False) to drop it"
                )
            return
        work: Any = handler(self, vector)  # type: ignore[arg-type] # it is a Cpu
        if work is None:
            return
        if not isinstance(work, Generator):
            raise TypeError(
                f"vCPU {self.index}: the handler of {vector:#x}, {called(handler)}, gives {type(work).__name__}: "
                "a generator function, or None where it takes no time"
            )
        yield from work


def called(function: object) -> str:
    """What a user calls a function."""
    return str(getattr(function, "__qualname__", None) or repr(function)).replace("<locals>.", "")
