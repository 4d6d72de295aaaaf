"""IPIs: by which door, of which class, how long they took; and every other access to the APIC by door."""

from __future__ import annotations

from collections import Counter
from typing import NamedTuple

import numpy as np

from fastexit import regs as R
from fastexit.answers.durations import Durations
from fastexit.answers.facts import DOORS, Block, Follower
from fastexit.answers.follow import words as F
from fastexit.answers.report import DoorRow, LatencyRow, MsrRow
from fastexit.answers.tally import Tally, count, often, ranked
from fastexit.trace.doors import DOING_OF_REGISTER, Doing, Door, doing_of_synthetic
from fastexit.trace.report import FAULTED, NOT_RECORDED, IcrClass

TARGETS = 1 << 16
_DOING = {**DOING_OF_REGISTER, R.APIC_EOI: Doing.EOI}
LATENCIES = "exit to accept", "accept to entry", "exit to entry", "entry to EOI", "accept to EOI"
_WHAT = len(LATENCIES)


class Icr(NamedTuple):
    """IPIs that no kernel tells apart, but for vector and destination.

    ``register``: APIC_ICR, APIC_SELF_IPI, or REG_CALL of follow's words for a hypercall. ``icr``: its low 32 bits
    without vector and busy bit; ``broadcast``: the destination is all ones and no shorthand replaces it. ``targets``:
    accept lines, NOT_RECORDED where the trace has none at all or AVIC has delivered without one. ``nested``: L2 wrote
    it. ``faulted``: it ended in #GP.
    """

    vm: int
    door: Door | None
    register: int
    icr: int
    broadcast: bool
    targets: int
    nested: bool
    faulted: bool

    @property
    def windows(self) -> bool:
        """Whether only a guest that knows Hyper-V sends so."""
        return self.door is Door.SYNTHETIC or self.door is Door.UNTOLD

    @property
    def words(self) -> str:
        """The class in words, by which an MSR's values are told.

        >>> Icr(1, Door.X2APIC, R.APIC_ICR, 0xC0000, False, 3, False, False).words
        'Fixed all-but-self, 3 targets'
        """
        if self.faulted:
            return FAULTED.cast
        shorthand = R.Shorthand(self.icr >> 18 & 3).name.lower().replace("_", "-")
        mode = R.DeliveryMode(self.icr >> 8 & 7).name
        if self.register == int(F.REG_CALL):
            way = "VP set"
        else:
            way = shorthand if shorthand != "none" else "logical" if self.icr & 0x800 else "physical"
        cast = IcrClass(mode, "", shorthand, self.targets, self.broadcast).cast
        return f"{mode} {way}, {cast}"


class Ipis:
    """Accumulates ICR, ACCESS, ENTERED, SERVED and ACCEPT facts."""

    def __init__(self, follower: Follower) -> None:
        self._follower = follower
        self._icrs: Tally[tuple[int, ...]] = Tally(TARGETS)
        self._by_place: Tally[tuple[int, ...]] = Tally(4 * TARGETS)
        self._accesses: Counter[tuple[int, int, int, int]] = Counter()
        self._latency = Durations()
        self._accepted: set[int] = set()
        self.first: dict[tuple[int, Door], int] = {}
        """By VM and door, the line of its first IPI."""

    def feed(self, block: Block) -> None:
        """Facts of one block."""
        facts = block.facts
        vm_of = self._follower.vm_of_place
        at = block.told(F.FACT_ICR)
        if len(at):
            icrs = facts[at]
            value = icrs["value"]
            low = value & np.uint64(0xFFFF_FFFF & ~R.ICR_VECTOR & ~R.ICR_BUSY)
            high = value >> np.uint64(32)
            wide = icrs["door"] == F.DOOR_X2APIC
            broadcast = np.where(wide, high == R.X2APIC_BROADCAST, (high == 0xFF) | (high == R.X2APIC_BROADCAST))
            broadcast &= (low >> np.uint64(18) & np.uint64(3)) == 0
            columns = [vm_of[icrs["place"]], icrs["door"], icrs["key"], low, broadcast, icrs["x"], icrs["flags"]]
            self._icrs.add(often(columns))
            self._by_place.add(often([icrs["place"], *columns[1:]]))
            numbers = self._follower.places.vms
            pairs, firsts = np.unique(vm_of[icrs["place"]] * len(DOORS) + icrs["door"], return_index=True)
            for pair, line in zip(pairs.tolist(), icrs["line"][firsts].tolist(), strict=True):
                door = DOORS[pair % len(DOORS)]
                if door is not None:
                    self.first.setdefault((numbers[pair // len(DOORS)], door), line)
        at = block.told(F.FACT_ACCESS)
        if len(at):
            keys = vm_of[facts["place"][at]] << 17 | facts["key"][at] << 5 | facts["door"][at] << 1 | facts["flags"][at]
            for key, n in count(keys):
                self._accesses[key >> 17, key >> 5 & 0xFFF, key >> 1 & 15, key & 1] += n
        at = block.told(F.FACT_ACCEPT)
        if len(at):
            place = facts["place"][at]
            vms = vm_of[np.where(place > 0, place, facts["other"][at])]
            self._accepted.update(np.unique(vms).tolist())
            self._latency.feed(vms * _WHAT, facts["value"][at].view(np.int64))
        for kind, x, y in (F.FACT_ENTERED, 1, 2), (F.FACT_SERVED, 3, 4):
            at = block.told(kind)
            if len(at):
                vms = vm_of[facts["place"][at]]
                self._latency.feed(vms * _WHAT + x, facts["x"][at])
                self._latency.feed(vms * _WHAT + y, facts["y"][at].view(np.int64))

    def icrs(self) -> Counter[Icr]:
        """All IPIs by what decides over them."""
        found: Counter[Icr] = Counter()
        for (vm, *told), n in self._icrs.counts.items():
            found[self._icr(vm, *told)] += n
        return found

    def by_vcpu(self, vm: int) -> dict[int, Counter[Icr]]:
        """IPIs of a VM by the vCPU that sent them."""
        found: dict[int, Counter[Icr]] = {}
        places, index = self._follower.places, self._follower.places.vms.index(vm)
        for (place, *told), n in self._by_place.counts.items():
            if place and places.places[place - 1][0] == vm:
                found.setdefault(places.places[place - 1][1], Counter())[self._icr(index, *told)] += n
        return dict(sorted(found.items()))

    def _icr(self, vm: int, door: int, register: int, low: int, broadcast: int, targets: int, flags: int) -> Icr:
        kicked = DOORS[door] is Door.AVIC and not targets  # AVIC has set IRR itself, and no line says whose
        told = NOT_RECORDED if kicked or vm not in self._accepted else targets
        number = self._follower.places.vms[vm]
        return Icr(number, DOORS[door], register, low, bool(broadcast), told, bool(flags & 1), bool(flags & 2))

    def doors(self, vm: int, msrs: list[MsrRow]) -> list[DoorRow]:
        """The table of a VM's doors: what it did by which, most frequent first; ``msrs`` are all of its MSRs."""
        index = self._follower.places.vms.index(vm)
        counts: Counter[tuple[str, str]] = Counter()
        for icr, n in self.icrs().items():
            if icr.vm == vm:
                counts[Doing.IPI.value, icr.door.value if icr.door else "not told"] += n
        for (of, register, door, _), n in self._accesses.items():
            at = DOORS[door]
            if of == index and at is not None and register in _DOING:
                counts[_DOING[register].value, at.value] += n
        for row in msrs:
            doing = doing_of_synthetic(row.msr)
            if row.write and doing is not None and doing is not Doing.TIMER:
                counts[doing.value, Door.SYNTHETIC.value] += row.count - row.faults
        return [DoorRow(doing, door, n) for (doing, door), n in ranked(+counts)]

    def deadlines(self, vm: int) -> tuple[int, int]:
        """TSC_DEADLINE writes of a VM, and of its nested guests."""
        index, door = self._follower.places.vms.index(vm), int(F.DOOR_X2APIC)
        own, nested = (self._accesses[index, int(F.REG_DEADLINE), door, l2] for l2 in (0, 1))
        return own, nested

    def classes(self, vm: int) -> dict[int, list[tuple[str, int]]]:
        """ICR writes of a VM by class, under the MSR that was written, most frequent first."""
        counts: dict[int, Counter[str]] = {}
        for icr, n in self.icrs().items():
            msr = {Door.X2APIC: R.MSR_X2APIC_ICR, Door.SYNTHETIC: 0x4000_0071}.get(icr.door) if icr.door else None
            if icr.vm == vm and msr is not None:
                msr = R.MSR_X2APIC_SELF_IPI if icr.register == R.APIC_SELF_IPI else msr
                counts.setdefault(msr, Counter())[icr.words] += n
        return {msr: ranked(found) for msr, found in counts.items()}

    def latency(self, vm: int) -> list[LatencyRow]:
        """How long IPIs took from one line to a later one, as far as the lines allow."""
        index = self._follower.places.vms.index(vm)
        times = [(what, self._latency.of(index * _WHAT + i)) for i, what in enumerate(LATENCIES)]
        return [LatencyRow(what, time) for what, time in times if time is not None]
