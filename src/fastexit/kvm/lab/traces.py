"""All of KVM's trace lines while guests run: entries, exits, what is injected, what user space is asked.

Models: nothing. The model writes down what it prints for the same programs. What the emulated machine adds of itself is
left out: nested page faults of the guest's own memory, and exits that the host's interrupts make.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterable, Iterator
from itertools import zip_longest
from typing import Any, ClassVar

from fastexit import regs as r
from fastexit.kvm import operations as ops
from fastexit.kvm.judge import Judge
from fastexit.kvm.operations import Op, describe
from fastexit.kvm.runs import RunTwins
from fastexit.kvm.twins import COUNT_READ, Setup
from fastexit.kvm.values import chance, icr

NOISE = ("npf", "interrupt", "vintr")
"""Reasons of exits that the emulated machine makes, or an interrupt window that an earlier program opened: with the
entry behind them they are left out, and so is what they cut off when it is injected again."""
IMMEDIATE, MAYBE = "[immediate exit]", "[immediate exit?]"
"""An entry that injects again leaves at once when more is waiting, whether or not the first one did."""
INJECTIONS = ("kvm_inj_virq", "kvm_inj_exception")
UNKNOWN = "requests ?"
"""An injection that was cut off asks for EVENT by itself."""
_PLACE = re.compile(r"rip 0x[0-9a-f]+")
_STALE = re.compile(r"intr_info 0x[0-7][0-9a-f]{7}")
_REQUESTS = re.compile(r"requests 0x([0-9a-f]+)")
_NEXT_RIP = re.compile(r"info2 0x[0-9a-f]+|(?<=info )([0-9a-f]+) [0-9a-f]+")
_WRITTEN = re.compile(r"(kvm_pio: pio_write at 0x[0-9a-f]+ size \d+ count \d+ val )0x[0-9a-f]+")
_REASON = re.compile(r"kvm_exit: (?:vcpu \d+ )?reason (\S+)")


class TraceTwins(RunTwins):
    """Programs of `RunTwins` that do not wait, more WRMSRs among them, with all events that the model has.

    Where a program is does not matter, so RIPs are left out; nor does what TCG leaves in exit_int_info without its
    valid bit.
    """

    kind = "traces"
    traceable = True
    needs_trace = True
    operations_each = 100
    about: ClassVar[str] = (
        "WRMSR and RDMSR of every x2APIC register, interrupts taken, MSR filters, KVM_INTERRUPT, EOIs: every line, "
        "entries and exits among them"
    )

    def __init__(self, setup: Setup, witness: Any = None, judge: Judge | None = None) -> None:
        super().__init__(setup, witness, judge)
        # KVM looks through the routes of user space's IOAPIC whenever it may have to, and the model has none of them.
        # How long a deadline was waited for depends on the time of day.
        self.events: frozenset[str] = self.model.trace.events - {"kvm_msi_set_irq", "kvm_wait_lapic_expire"}
        self._told = False

    def draw_op(self, rng: random.Random) -> Op:
        if not self.planned:
            i = self.routed if self.split else rng.randrange(len(self.vcpus))
            trials = [self._take, self._writes, self._writes, self._msrs]
            if self.split:
                trials += [self._pic, self._eoi]
            self.planned: list[Op] = [op for op in rng.choice(trials)(rng, i) if op[0] != "halt"]
            if not self.planned:
                return ("get_mp_state", i)
        return ops.without_count(ops.without_smi(super().draw_op(rng)))

    def _writes(self, rng: random.Random, i: int) -> Iterator[Op]:
        """A guest writes registers, ICR most of all: to itself, to others, to nobody, refused."""
        yield self._x2apic(i)
        yield ("set_msr", i, r.MSR_X2APIC_BASE + (r.APIC_SPIV >> 4), 0x1FF)
        for _ in range(rng.randrange(2, 8)):
            if chance(rng, 0.6):
                yield ("wrmsr", i, r.MSR_X2APIC_ICR, self._tame(icr(rng, self)))
            elif chance(rng, 0.6):
                op = ops.guest_msr_op(rng, self, i)
                if op[:3:2] == ("wrmsr", r.MSR_X2APIC_ICR):
                    op = (*op[:3], self._tame(op[3]))
                yield op if op[0] in ("wrmsr", "rdmsr") and op[2] != r.MSR_APICBASE else ("run_through", i)
            else:
                yield ("take", i)

    def _tame(self, value: int) -> int:
        """Nobody gets an INIT, which would take his segments away, or an NMI, for which there is no handler."""
        return value & ~(7 << r.ICR_DM_SHIFT) if value >> r.ICR_DM_SHIFT & 7 in ops.NOT_FOR_GUESTS else value

    def step(self, op: Op) -> None:
        """One operation on both sides; every line that it printed is compared, then the look follows."""
        trace = self.model.trace
        trace.clear()
        trace.enable()
        self.witness.clear()
        self._told = False
        try:
            super().step(op)
        finally:
            trace.disable()

    def look(self) -> None:
        """Lines first: what a look prints is nobody's business."""
        if self.model.trace.enabled and not self._told:
            self._told = True
            self.model.trace.disable()
            self._same_trace(self.history[-1])
        super().look()

    def _same_trace(self, op: Op) -> None:
        expected = plain(self.model.trace.lines(), self.events)
        got = plain(self.witness.read_all(), self.events)
        self.trace_lines: int = self.trace_lines + len(got)
        for n, (line, other) in enumerate(zip_longest(expected, got, fillvalue="nothing")):
            if not same(line, other):
                raise self.divergence(f"{describe(op)}, trace line {n}: expected {line}, KVM prints {other}")


def same(line: str, other: str) -> bool:
    """Whether the kernel's line is the model's, but for the time of day and what nobody knows."""
    if UNKNOWN in line or UNKNOWN in other:
        line, other = (_REQUESTS.sub(UNKNOWN, text) for text in (line, other))
    if line.endswith(MAYBE) or other.endswith(MAYBE):
        line, other = (text.removesuffix(MAYBE).removesuffix(IMMEDIATE) for text in (line, other))
    return line == other or (line.startswith(COUNT_READ) and other.startswith(COUNT_READ))


def plain(lines: Iterable[str], events: Iterable[str]) -> list[str]:
    """Lines of ``events`` without what the emulated machine adds, and without what depends on where programs are."""
    wanted = frozenset(events)
    kept: list[str] = []
    skips, again, cut, asked = False, False, False, 0
    injected = ""
    for line in lines:
        name = line.partition(":")[0]
        if name not in wanted:
            continue
        # Kernels before 6.1 do not say that they inject something again.
        if line.endswith("[reinjected]") or line == injected:
            again = cut = True
            continue
        if name in INJECTIONS:
            injected = line
        if again and name == "kvm_entry":
            line = line.removesuffix(IMMEDIATE) + MAYBE
            again = False
        reason = _REASON.match(line)
        if reason is not None and reason[1] in NOISE:
            skips = True
            asked |= _requests(line)
        elif skips and name == "kvm_entry":
            skips = False
        else:
            if reason is not None:
                injected = ""
            if reason is not None and cut:
                line = _REQUESTS.sub(UNKNOWN, line)
            elif reason is not None and asked:
                line = _REQUESTS.sub(f"requests 0x{asked | _requests(line):016x}", line)
                asked = 0
            kept.append(_told(unwritten(_PLACE.sub("rip", line)), None if reason is None else reason[1]))
    return kept


def unwritten(line: str) -> str:
    """One line without what a guest's program tells user space by a port, which is compared as its result."""
    return _WRITTEN.sub(r"\1", line)


def _requests(line: str) -> int:
    """What was asked for at an exit; an exit of the machine's own comes before the one that would have shown it."""
    found = _REQUESTS.search(line)
    return 0 if found is None else int(found[1], 16)


def _told(line: str, reason: str | None) -> str:
    """One line with what means nothing at 0."""
    if reason is None:
        return line
    if reason == "io":
        line = _NEXT_RIP.sub("info2 0", line)
    return _STALE.sub("intr_info 0x00000000", line)
