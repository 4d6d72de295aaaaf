"""What is counted while a simulation runs: exits, and for each interrupt who made it pending and when.

The local APIC has one bit a vector, so an interrupt that is sent again before it is taken is the same one: its time
runs from the first. Who accepted what is read from the machine's trace records, which the clock has anyway; what the
hardware sends by itself leaves none, so there the APICs are looked at.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Callable
from enum import StrEnum
from typing import TYPE_CHECKING, NamedTuple, TypeVar

from fastexit import layout as L
from fastexit import regs as R
from fastexit.costs.dispatcher import TimedDispatcher
from fastexit.costs.vcpu import TimedVcpu
from fastexit.machine import Machine
from fastexit.outcome import Outcome, Path

if TYPE_CHECKING:
    from fastexit.adapters.simpy.interrupts import Interruptible

_Result = TypeVar("_Result")
VECTORED = frozenset({R.DM_FIXED, R.DM_LOWEST})
"""Delivery modes that have a vector."""


class Cause(StrEnum):
    """Who made an interrupt pending."""

    IPI = "IPI"
    TIMER = "timer"
    """The local APIC's; its time runs from when it was due."""
    LINE = "line"
    """A device by its line, the PIT among them, or one whose level was still up at an EOI."""
    OTHER = "other"
    """What a program did to the machine by itself (signal_msi, set_msr); its time is unknown."""


class Pending(NamedTuple):
    """An interrupt on its way: since when, why, by which path of the exit that sent it."""

    since: float
    cause: Cause
    path: str


class ExitKey(NamedTuple):
    """What exits are counted by."""

    vcpu: int
    cause: str
    path: str


class InterruptKey(NamedTuple):
    """What interrupts are counted by."""

    vcpu: int
    cause: Cause
    path: str
    vector: int


class ExitCount:
    """How many exits of one kind there were, and their time."""

    __slots__ = ("count", "ns")

    def __init__(self) -> None:
        self.count: int = 0
        self.ns: float = 0.0


class Ledger:
    """The counts of one simulation. A latency takes 8 bytes; ``clear`` begins anew."""

    def __init__(self, machine: Machine, now: Callable[[], float]) -> None:
        assert isinstance(machine.dispatcher, TimedDispatcher)
        self._dispatcher: TimedDispatcher = machine.dispatcher
        self._index: dict[int, int] = {v.vcpu_id: v.index for v in machine.vcpus}
        self._machine = machine
        self._now = now
        self._pending: list[dict[int, Pending]] = [{} for _ in machine.vcpus]
        self._vectors: list[int] = [-1 for _ in machine.vcpus]
        self._due: list[float] = [math.inf for _ in machine.vcpus]
        self._avic: bool = machine.vendor == "svm"
        self.exits: dict[ExitKey, ExitCount] = {}
        self.interrupts: dict[InterruptKey, array[float]] = {}
        self.since: float = now()

    def clear(self) -> None:
        """Forget what was counted; what is pending stays so."""
        self.exits.clear()
        self.interrupts.clear()
        self.since = self._now()

    # ------------------------------------------------------------------------------------------- who sent what, when

    def timer_set(self, vcpu: int, vector: int | None = None) -> None:
        """A register of the vCPU's timer is written; ``vector``: LVTT's, which it has now."""
        self._vectors[vcpu] = self._vectors[vcpu] if vector is None else vector
        self._due[vcpu] = math.inf

    def watch(self, act: Callable[[], _Result]) -> _Result:
        """Do something that sends no IPI, and write down what the APICs accept meanwhile."""
        result, accepted = self._accepts(act)
        for vcpu, vector in accepted:
            self._raised(vcpu, vector)
        return result

    def watch_time(self, due: float | None, act: Callable[[], list[tuple[int, Outcome]]]) -> list[tuple[int, Outcome]]:
        """As watch, for the clock: ``due`` is when the first timer that fires had to."""
        happened, accepted = self._accepts(act)
        if due is not None:
            for vcpu, _ in happened:
                self._due[vcpu] = due
        for vcpu, vector in accepted:
            self._raised(vcpu, vector)
        return happened

    def watch_ipi(self, v: TimedVcpu, icr: int, act: Callable[[], Outcome]) -> Outcome:
        """As watch, for an ICR write: what hardware did of it is seen at those who were addressed."""
        out, accepted = self._accepts(act)
        vector, sent = icr & R.ICR_VECTOR, Pending(self._now(), Cause.IPI, out.path.name)
        for vcpu, number in accepted:
            if number == vector:
                self._pending[vcpu].setdefault(vector, sent)
            else:
                self._raised(vcpu, number)
        if (out.path is Path.HARDWARE or (self._avic and v.apicv)) and icr >> R.ICR_DM_SHIFT & 7 in VECTORED:
            for vcpu in self._addressed(v.index, icr):
                if vector not in self._pending[vcpu] and self._holds(vcpu, vector):
                    self._pending[vcpu][vector] = sent
        return out

    def _accepts(self, act: Callable[[], _Result]) -> tuple[_Result, list[tuple[int, int]]]:
        """What an act gives, and index and vector of what was accepted meanwhile."""
        result, accepted = self._dispatcher.accepts(act)
        return result, [(self._index[vcpu_id], vector) for vcpu_id, vector in accepted]

    def _addressed(self, sender: int, icr: int) -> list[int]:
        """Indices of those whom an ICR write may be for."""
        shorthand = icr >> R.ICR_SHORTHAND_SHIFT & 3
        if shorthand == R.SH_SELF:
            return [sender]
        everyone = range(len(self._machine.vcpus))
        if not shorthand and not icr & R.ICR_LOGICAL:
            dest = icr >> R.ICR_DEST_SHIFT
            return [v.index for v in self._machine.vcpus if dest in (v.vcpu_id, R.X2APIC_BROADCAST)]
        return [i for i in everyone if i != sender or shorthand != R.SH_ALLBUT]

    def _holds(self, vcpu: int, vector: int) -> bool:
        """The vector is in the vCPU's descriptor or IRR."""
        v = self._machine.vcpus[vcpu]
        word = int(v.pid[vector >> 6]) | self._machine.mem[v.vec + L.VEC_IRR + (vector >> 6)]
        return bool(word >> (vector & 63) & 1)

    def _raised(self, vcpu: int, vector: int) -> None:
        """Somebody who is no vCPU has made an interrupt pending."""
        since, cause = self._now(), Cause.LINE
        if vector == self._vectors[vcpu]:
            since, cause = min(self._due[vcpu], since), Cause.TIMER
            self._due[vcpu] = math.inf
        self._pending[vcpu].setdefault(vector, Pending(since, cause, ""))

    # -------------------------------------------------------------------------------------------------- what happened

    def exit(self, cpu: Interruptible, cause: str, path: str, ns: float) -> None:
        """An exit, and what it takes."""
        row = self.exits.setdefault(ExitKey(cpu.index, cause, path), ExitCount())
        row.count += 1
        row.ns += ns

    def taken(self, cpu: Interruptible, vector: int) -> None:
        """The first instruction of an interrupt's handler."""
        now = self._now()
        sent = self._pending[cpu.index].pop(vector, Pending(-1.0, Cause.OTHER, ""))
        key = InterruptKey(cpu.index, sent.cause, sent.path, vector)
        self.interrupts.setdefault(key, array("d")).append(now - sent.since if sent.since >= 0 else -1.0)
