"""Interrupts: which vector, who raised it, for whom, how often."""

from __future__ import annotations

from collections import Counter
from typing import NamedTuple

import numpy as np

from fastexit import regs as R
from fastexit.answers.facts import DOORS, Block, Facts, Follower
from fastexit.answers.follow import words as F
from fastexit.answers.report import SentRow, VectorRow
from fastexit.answers.tally import Tally, count, ranked
from fastexit.records.columns import NO_TIME, Event

PAIRS = 1 << 16
"""Senders with targets that are kept."""
_SOURCES = {
    int(F.FROM_MSI): "MSI",
    int(F.FROM_IOAPIC): "IOAPIC",
    int(F.FROM_LINE): "line of",
    int(F.FROM_TIMER): "timer",
    int(F.FROM_SYNIC): "SynIC",
    int(F.FROM_STIMER): "Hyper-V timer",
    int(F.FROM_UNTOLD): "not told",
}


class Source(NamedTuple):
    """One kind of interrupt: VM by index, vector, delivery mode, who raised it as ``follow`` says it."""

    vm: int
    vector: int
    mode: int
    source: int
    door: int
    gsi: int

    @property
    def text(self) -> str:
        """Who raised it, in words."""
        if self.source == int(F.FROM_IPI):
            door = DOORS[self.door]
            return f"IPI ({door.value})" if door else "IPI"
        gsi = f" gsi {self.gsi - 1}" if self.gsi else ""
        return _SOURCES.get(self.source, "not told") + gsi


def _unpack(key: int) -> tuple[Source, int]:
    """What a key of `Vectors.feed` is made of, and whether it was coalesced."""
    who = key >> 21 & 15, key >> 17 & 15, key >> 1 & 0xFFFF
    return Source(key >> 36, key >> 28 & 0xFF, key >> 25 & 7, *who), key & 1


class Rate(NamedTuple):
    """The second in which a vCPU accepted most interrupts of a vector."""

    accepted: int
    second: int
    line: int


class Vectors:
    """Accumulates ACCEPT facts, and rows of EOIs, injected NMIs and PIC pins."""

    def __init__(self, follower: Follower, ticks: bool) -> None:
        self._follower = follower
        self._ticks = ticks
        self._counts: Tally[tuple[Source, int]] = Tally()
        self._eois: Counter[tuple[int, int]] = Counter()
        self._pv_eois: Counter[tuple[int, int]] = Counter()
        self._sent: Tally[tuple[int, int]] = Tally(PAIRS)
        self._nmis: Counter[int] = Counter()
        self._pics: Counter[int] = Counter()
        self._second: dict[tuple[int, int], tuple[int, int, int]] = {}
        self.busiest: dict[tuple[int, int], Rate] = {}
        """By place plus one and vector, of interrupts that are no IPIs."""
        self.levels: set[tuple[int, int]] = set()
        """Places plus one and vectors of level interrupts."""

    def feed(self, block: Block, first: int) -> None:
        """One block."""
        rows, facts = block.rows, block.facts
        for event, into in (Event.EOI, self._eois), (Event.PV_EOI, self._pv_eois):
            at = block.at(event)
            vector = rows["b"][at]
            at = at[vector < 256] if len(at) else at
            for key, n in count(block.vms[at].astype(np.int64) << 8 | rows["b"][at].astype(np.int64)):
                into[key >> 8, key & 0xFF] += n
        for event, total in (Event.NMI, self._nmis), (Event.PIC_SET_IRQ, self._pics):
            at = block.at(event)
            if len(at):
                for vm, n in count(block.vms[at[rows["c"][at] == 0]]):
                    total[vm] += n
        told = block.told(F.FACT_ACCEPT)
        if not len(told):
            return
        accepts = facts[told]
        place, sender = accepts["place"].astype(np.int64), accepts["other"].astype(np.int64)
        vms = self._follower.vm_of_place[np.where(place > 0, place, sender)]
        mode, gsi = accepts["y"].astype(np.int64) >> 8 & 7, np.minimum(accepts["gsi"], 0xFFFF).astype(np.int64)
        keys = vms << 8 | accepts["key"]
        widths = (mode, 3), (accepts["source"], 4), (accepts["door"], 4), (gsi, 16), (accepts["flags"] & 1, 1)
        for column, bits in widths:
            keys = keys << bits | column
        self._counts.add((_unpack(key), n) for key, n in count(keys))
        ipis = accepts["source"] == int(F.FROM_IPI)
        sent = np.flatnonzero(ipis & (sender > 0) & (place > 0))
        if len(sent):
            self._sent.add(((key >> 16, key & 0xFFFF), n) for key, n in count(sender[sent] << 16 | place[sent]))
        others = np.flatnonzero(~ipis & (mode <= R.DM_LOWEST))
        if len(others):
            self._rates(accepts[others], first)

    def _rates(self, accepts: Facts, first: int) -> None:
        """How many in a second."""
        level = accepts[accepts["y"] & R.ICR_TRIGGER != 0]
        if len(level):
            self.levels.update(zip(level["place"].tolist(), level["key"].tolist(), strict=True))
        if self._ticks or first == NO_TIME or not len(accepts):
            return
        accepts = accepts[accepts["time"] != NO_TIME]
        seconds = (accepts["time"] - first) // 1_000_000_000
        lines = accepts["line"]
        keys = np.clip(seconds, 0, 1 << 34) << 21 | accepts["place"].astype(np.int64) << 8 | accepts["key"]
        for key, n in count(keys):
            second, place, vector = key >> 21, key >> 8 & 0x1FFF, key & 0xFF
            at = place, vector
            before, seen, line = self._second.get(at, (second, 0, 0))
            if before != second or not line:
                seen, line = 0, int(lines[keys == key][0])
            self._second[at] = second, seen + n, line
            if at not in self.busiest or seen + n > self.busiest[at].accepted:
                self.busiest[at] = Rate(seen + n, second, line)

    def eois(self, vm: int) -> int:
        """EOIs of a VM that name a vector."""
        index = self._follower.places.vms.index(vm)
        return sum(n for (of, _), n in self._ended().items() if of == index)

    def _ended(self) -> Counter[tuple[int, int]]:
        """EOIs by VM and vector; kvm_pv_eoi has a kvm_eoi line before it, where those were recorded."""
        return self._eois or self._pv_eois

    def rows(self, vm: int, linux: bool) -> list[VectorRow]:
        """The table of a VM's vectors, most frequent first; ``linux``: by Linux's names."""
        index = self._follower.places.vms.index(vm)
        merged: Counter[tuple[int, int, str]] = Counter()
        coalesced: Counter[tuple[int, int, str]] = Counter()
        for (source, twice), n in self._counts.counts.items():
            if source.vm == index:
                key = source.vector, source.mode, source.text
                merged[key] += n
                coalesced[key] += n * twice
        whole = merged.total()
        rows = []
        for (vector, mode, text), n in ranked(merged):
            known = mode <= R.DM_LOWEST
            name = R.LINUX_VECTORS.get(vector, "") if known and linux else ""
            if not known:
                name = R.DeliveryMode(mode).name
            eois = self._ended()[index, vector] if known else 0
            rows.append(VectorRow(vector, name, text, n, coalesced[vector, mode, text], eois, n / whole))
        if self._nmis[index]:
            rows.append(VectorRow(2, "NMI", "injected NMI", self._nmis[index], 0, 0, 0.0))
        return rows + self._of_pic(vm, index)

    def _of_pic(self, vm: int, index: int) -> list[VectorRow]:
        """Vectors that were injected and never accepted by a local APIC, where the PICs had something to say."""
        if not self._pics[index] or not self._counts.counts:
            return []
        found: Counter[int] = Counter()
        for place in self._follower.of_vm(vm) - {0}:
            injected, accepted = self._follower.words(place - 1, (F.V_INJECTED, F.V_ACCEPTED))
            for vector in np.flatnonzero((injected > 0) & (accepted == 0)).tolist():
                found[vector] += int(injected[vector])
        return [VectorRow(vector, "", "PIC", n, 0, self._ended()[index, vector], 0.0) for vector, n in ranked(found)]

    def sent(self, vm: int) -> list[SentRow]:
        """Who sent interrupts to whom, most frequent first."""
        places = self._follower.of_vm(vm)
        ids = self._follower.places.places
        rows = [
            SentRow(ids[sender - 1][1], ids[target - 1][1], n)
            for (sender, target), n in self._sent.counts.items()
            if sender in places
        ]
        return sorted(rows, key=lambda row: (-row.interrupts, row.sender, row.target))
