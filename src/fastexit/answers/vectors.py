"""Interrupts: which vector, who raised it, for whom, how often."""

from __future__ import annotations

from collections import Counter
from typing import NamedTuple

import numpy as np

from fastexit import regs as R
from fastexit.answers.facts import DOORS, Facts, Follower
from fastexit.answers.follow import words as F
from fastexit.answers.report import SentRow, VectorRow
from fastexit.answers.tally import Tally, often
from fastexit.records.columns import NO_TIME, Event, Rows

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
        self.counts: Counter[Source] = Counter()
        self._coalesced: Counter[Source] = Counter()
        self._eois: Counter[tuple[int, int]] = Counter()
        self._sent: Tally[tuple[int, int]] = Tally(PAIRS)
        self._nmis: Counter[int] = Counter()
        self._pics: Counter[int] = Counter()
        self._second: dict[tuple[int, int], tuple[int, int, int]] = {}
        self.busiest: dict[tuple[int, int], Rate] = {}
        """By place plus one and vector, of interrupts that are no IPIs."""
        self.levels: set[tuple[int, int]] = set()
        """Places plus one and vectors of level interrupts."""

    def feed(self, rows: Rows, facts: Facts, first: int) -> None:
        """One block."""
        events = rows["event"]
        places = self._follower.places
        eois = rows[((events == Event.EOI) | (events == Event.PV_EOI)) & (rows["b"] < 256)]
        eois = eois[eois["event"] == Event.EOI] if (eois["event"] == Event.EOI).any() else eois
        for key, n in often([places.vm_of(eois), eois["b"]]):
            self._eois[key[0], key[1]] += n
        for event, into in (Event.NMI, self._nmis), (Event.PIC_SET_IRQ, self._pics):
            some = rows[(events == event) & (rows["c"] == 0)]
            for (vm,), n in often([places.vm_of(some)]):
                into[vm] += n
        accepts = facts[facts["kind"] == F.FACT_ACCEPT]
        if not len(accepts):
            return
        vms = self._follower.vm_of_place[np.where(accepts["place"] > 0, accepts["place"], accepts["other"])]
        mode = accepts["y"] >> 8 & 7
        columns = [vms, accepts["key"], mode, accepts["source"], accepts["door"], accepts["gsi"], accepts["flags"] & 1]
        for key, n in often(columns):
            source = Source(*key[:6])
            self.counts[source] += n
            self._coalesced[source] += n * key[6]
        ipis = accepts["source"] == F.FROM_IPI
        sent = accepts[ipis & (accepts["other"] > 0) & (accepts["place"] > 0)]
        self._sent.add(often([sent["other"], sent["place"]]))  # type: ignore[arg-type]
        self._rates(accepts[~ipis & (mode <= R.DM_LOWEST)], first)

    def _rates(self, accepts: Facts, first: int) -> None:
        """How many in a second."""
        level = accepts[accepts["y"] & R.ICR_TRIGGER != 0]
        for key, _ in often([level["place"], level["key"]]):
            self.levels.add((key[0], key[1]))
        if self._ticks or first == NO_TIME or not len(accepts):
            return
        seconds = (accepts["time"] - first) // 1_000_000_000
        lines = accepts["line"]
        for (second, place, vector), n in often([seconds, accepts["place"], accepts["key"]]):
            at = place, vector
            before, seen, line = self._second.get(at, (second, 0, 0))
            if before != second or not line:
                seen, line = 0, int(lines[(seconds == second) & (accepts["key"] == vector)][0])
            self._second[at] = second, seen + n, line
            if at not in self.busiest or seen + n > self.busiest[at].accepted:
                self.busiest[at] = Rate(seen + n, second, line)

    def eois(self, vm: int) -> int:
        """EOIs of a VM that name a vector."""
        index = self._follower.places.vms.index(vm)
        return sum(n for (of, _), n in self._eois.items() if of == index)

    def rows(self, vm: int, linux: bool) -> list[VectorRow]:
        """The table of a VM's vectors, most frequent first; ``linux``: by Linux's names."""
        index = self._follower.places.vms.index(vm)
        merged: Counter[tuple[int, int, str]] = Counter()
        coalesced: Counter[tuple[int, int, str]] = Counter()
        for source, n in self.counts.items():
            if source.vm == index:
                key = source.vector, source.mode, source.text
                merged[key] += n
                coalesced[key] += self._coalesced[source]
        whole = merged.total()
        rows = []
        for (vector, mode, text), n in merged.most_common():
            known = mode <= R.DM_LOWEST
            name = R.LINUX_VECTORS.get(vector, "") if known and linux else ""
            if not known:
                name = R.DeliveryMode(mode).name
            eois = self._eois[index, vector] if known else 0
            rows.append(VectorRow(vector, name, text, n, coalesced[vector, mode, text], eois, n / whole))
        if self._nmis[index]:
            rows.append(VectorRow(2, "NMI", "injected NMI", self._nmis[index], 0, 0, 0.0))
        return rows + self._of_pic(vm, index)

    def _of_pic(self, vm: int, index: int) -> list[VectorRow]:
        """Vectors that were injected and never accepted by a local APIC, where the PICs had something to say."""
        if not self._pics[index] or not self.counts:
            return []
        found: Counter[int] = Counter()
        for place in self._follower.of_vm(vm) - {0}:
            injected, accepted = self._follower.words(place - 1, (F.V_INJECTED, F.V_ACCEPTED))
            for vector in np.flatnonzero((injected > 0) & (accepted == 0)).tolist():
                found[vector] += int(injected[vector])
        return [VectorRow(vector, "", "PIC", n, 0, self._eois[index, vector], 0.0) for vector, n in found.most_common()]

    def sent(self, vm: int) -> list[SentRow]:
        """Who sent interrupts to whom, most frequent first."""
        places = self._follower.of_vm(vm)
        ids = self._follower.places.places
        return [
            SentRow(ids[sender - 1][1], ids[target - 1][1], n)
            for (sender, target), n in self._sent.counts.most_common()
            if sender in places
        ]
