"""MSRs: how often each is read and written, with what values, what faults, and what differs between vCPUs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from fastexit import hyperv as HV
from fastexit import regs as R
from fastexit.answers.facts import Block, Follower
from fastexit.answers.msrnames import msr_name
from fastexit.answers.report import MsrRow
from fastexit.answers.tally import Tally, often, ranked
from fastexit.records.columns import Event

VALUES = 8
"""Values that are shown of each MSR."""
UNSTEADY = {R.MSR_TSC, R.MSR_TSC_DEADLINE, R.MSR_X2APIC_ICR, R.MSR_X2APIC_BASE + (R.APIC_TMCCT >> 4)}
UNSTEADY |= {R.MSR_X2APIC_EOI, HV.MSR_HV_EOI, HV.MSR_HV_ICR, HV.MSR_HV_TIME_REF_COUNT, HV.MSR_HV_VP_RUNTIME, 0xE7, 0xE8}
UNSTEADY |= set(range(HV.MSR_HV_STIMER0_CONFIG, HV.MSR_HV_STIMER3_COUNT + 1))
"""MSRs of clocks and of EOI, whose values tell nothing, and the ICR, which is told by class."""
ALIKE = {0x3A, 0x122, 0x174, 0x1A0, 0x277, 0x2FF, 0xC0000081, 0xC0000083, 0xC0000084, 0xDA0}
ALIKE |= {0x250, 0x258, 0x259, *range(0x268, 0x270), *range(0x200, 0x210), 0xC0010010, 0xC0010015, 0xC0011029}
"""MSRs that a sane guest has the same on every vCPU."""
KEPT = {0x3A, 0x4B564D02, 0x4B564D03, 0x4B564D04, HV.MSR_HV_VP_ASSIST_PAGE, HV.MSR_HV_SCONTROL, HV.MSR_HV_SIEFP}
KEPT |= {HV.MSR_HV_SIMP, *range(HV.MSR_HV_SINT0, HV.MSR_HV_SINT15 + 1)}
"""MSRs of a vCPU that nobody but the guest changes: it reads what it wrote, or the vCPU was reset between."""
_ONE, _BEYOND = np.uint64(1), np.uint64(0xFFFF_FFFF)
_WATCHED = np.array(sorted(ALIKE | KEPT), np.uint64)
_UNSTEADY = np.array(sorted(UNSTEADY), np.uint64)


class Held(NamedTuple):
    """What a vCPU has in an MSR, as far as its lines tell."""

    value: int
    line: int
    written: bool


class Lost(NamedTuple):
    """A vCPU reads from an MSR something else than it wrote."""

    place: int
    msr: int
    wrote: int
    write_line: int
    read: int
    read_line: int


class Fault(NamedTuple):
    """Accesses of one vCPU to one MSR that ended in #GP."""

    place: int
    msr: int
    write: bool


class Msrs:
    """Accumulates kvm_msr rows. Places are places plus one, 0 for a thread that is no vCPU."""

    def __init__(self, follower: Follower) -> None:
        self._follower = follower
        self._counts: Tally[tuple[int, ...]] = Tally()
        self._values: Tally[tuple[int, ...]] = Tally()
        self.faults: Counter[Fault] = Counter()
        self.first_fault: dict[Fault, int] = {}
        """The line of the first one."""
        self.held: dict[tuple[int, int], Held] = {}
        """By place and MSR, of those in ALIKE and KEPT."""
        self.lost: list[Lost] = []

    def feed(self, block: Block) -> None:
        """A block of rows."""
        at = block.at(Event.MSR)
        if not len(at):
            return
        rows = block.rows
        msrs = np.minimum(rows["a"][at], _BEYOND)
        writes, faults = rows["c"][at] & _ONE, rows["d"][at] & _ONE
        keys = block.vms[at].astype(np.uint64) << np.uint64(34) | msrs << np.uint64(2) | writes << _ONE | faults
        some, inverse, counts = np.unique(keys, return_inverse=True, return_counts=True)
        self._counts.add(
            ((key >> 34, key >> 2 & 0xFFFF_FFFF, key >> 1 & 1, key & 1), n)
            for key, n in zip(some.tolist(), counts.tolist(), strict=True)
        )
        known = some >> np.uint64(2) & np.uint64(0xFFFF_FFFF)
        sound = some & _ONE == 0
        steady = np.flatnonzero((sound & ~np.isin(known, _UNSTEADY))[inverse])
        self._values.add(
            ((key >> 34, key >> 2 & 0xFFFF_FFFF, key >> 1 & 1, value), n)
            for (key, value), n in often([keys[steady], rows["b"][at[steady]]], 64)
        )
        if not sound.all():
            self._feed_few(block, at[~sound[inverse]], self._fault)
        watched = sound & np.isin(known, _WATCHED)
        if watched.any():
            self._feed_few(block, at[watched[inverse]], self._watch)

    def _feed_few(
        self, block: Block, at: npt.NDArray[np.intp], each: Callable[[int, int, int, bool, int], None]
    ) -> None:
        """Rows that are few."""
        if len(at):
            rows = block.rows[at]
            places = self._follower.places.place_of(block.threads[at])
            columns = [places, rows["a"], rows["b"], rows["c"], rows["line"]]
            for place, msr, value, write, line in zip(*(column.tolist() for column in columns), strict=True):
                each(place, msr, value, bool(write), line)

    def _fault(self, place: int, msr: int, _value: int, write: bool, line: int) -> None:
        if len(self.faults) < 4096 or Fault(place, msr, write) in self.faults:
            self.faults[Fault(place, msr, write)] += 1
            self.first_fault.setdefault(Fault(place, msr, write), line)

    def _watch(self, place: int, msr: int, value: int, write: bool, line: int) -> None:
        before = self.held.get((place, msr))
        if not write and before is not None and before.written and before.value != value and msr in KEPT:
            if place and len(self.lost) < 64:
                self.lost.append(Lost(place, msr, before.value, before.line, value, line))
        self.held[place, msr] = Held(value, line, write or (before is not None and before.value == value))

    def auto_eoi(self, place: int) -> set[int]:
        """The vectors of a vCPU's SINTs that end by themselves."""
        sints = range(HV.MSR_HV_SINT0, HV.MSR_HV_SINT15 + 1)
        held = [self.held[place, msr].value for msr in sints if (place, msr) in self.held]
        return {value & HV.HV_SINT_VECTOR for value in held if value & HV.HV_SINT_AUTO_EOI}

    def rows(self, vm: int, classes: dict[int, list[tuple[str, int]]]) -> list[MsrRow]:
        """The table of a VM's MSRs, most frequent first; ``classes`` are those of ICR writes, by MSR."""
        index = self._follower.places.vms.index(vm)
        counts: Counter[tuple[int, int]] = Counter()
        faults: Counter[tuple[int, int]] = Counter()
        for (of, msr, write, fault), n in self._counts.counts.items():
            if of == index:
                counts[msr, write] += n
                faults[msr, write] += n * fault
        values: dict[tuple[int, int], list[tuple[int, int]]] = {}
        for (of, msr, write, value), n in ranked(self._values.counts):
            if of == index and len(values.setdefault((msr, write), [])) < VALUES:
                values[msr, write].append((value, n))
        whole = counts.total()
        return [
            MsrRow(
                msr, msr_name(msr), bool(write), n, n / whole, faults[msr, write], values.get((msr, write), []),
                classes.get(msr, []) if write else [],
            )
            for (msr, write), n in ranked(counts)
        ]  # fmt: skip
