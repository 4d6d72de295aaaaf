"""Exits: by reason, vCPU and second, how long each took, and where the guest was."""

from __future__ import annotations

from collections import Counter
from math import fsum
from typing import NamedTuple

import numpy as np

from fastexit.answers.durations import Durations
from fastexit.answers.facts import Block, Facts, Follower, plain_reason
from fastexit.answers.follow import words as F
from fastexit.answers.places import VMS, Longs
from fastexit.answers.report import ExitRow, Quantiles, VcpuRow
from fastexit.answers.tally import Tally, count, often, ranked
from fastexit.records.columns import NO_TIME

SECONDS = 1 << 14
"""Seconds of a recording that are counted each by itself."""
KEPT_SECONDS = 1 << 18
"""Counts by second, VM and reason that are kept, the first of them."""
REASONS = 128
"""Exit reasons that are told apart; what a trace has beyond them is "other"."""
RIPS = 16
"""Addresses that are shown of each vCPU."""
SLOW_NS = 5_000_000
SLOWEST = 64
"""So many of those that took longer are kept."""
IDLE = {"HLT", "IDLE_HALT", "IDLE_HLT", "MWAIT", "MWAIT_INSTRUCTION", "MWAIT_CONDITIONAL"}
"""Exits whose time is the guest's own wish."""


class Slow(NamedTuple):
    """One exit that took long: when its entry came, and on which CPUs the two were (-1: not told)."""

    ns: int
    line: int
    place: int
    reason: str
    cpu: int
    entry_cpu: int


class Exits:
    """Accumulates EXIT and ENTRY facts. Places are places plus one, as in facts."""

    def __init__(self, follower: Follower, names: list[str], ticks: bool) -> None:
        self._follower = follower
        self._names = names
        self._ticks = ticks
        self.reasons: list[str] = []
        """Exit reasons, as they were met."""
        self._reason_of = np.zeros(0, np.int64)
        self._counts: Counter[tuple[int, int, int]] = Counter()
        self._seconds: Counter[tuple[int, int, int]] = Counter()
        self._times = Durations()
        self._vcpu_times = Durations()
        self._rips: Tally[tuple[int, int]] = Tally()
        self._entry_rips: Tally[tuple[int, int]] = Tally()
        self._vectors: Tally[tuple[int, int]] = Tally()
        self._first: int = NO_TIME
        self.slow: list[Slow] = []
        """The slowest of those that are slow, and not idle."""
        self.slow_count: Counter[int] = Counter()
        """By place."""

    def feed(self, block: Block, first: int) -> None:
        """Facts of one block; ``first`` is the recording's first time."""
        facts = block.facts
        entries = block.told(F.FACT_ENTRY)
        if len(entries):
            self._entry_rips.add(often([facts["place"][entries], facts["value"][entries]], 64))  # type: ignore[arg-type]
        at = block.told(F.FACT_EXIT)
        if not len(at):
            return
        exits = facts[at]
        reasons = self._reasons(exits["key"].astype(np.int64))
        places = exits["place"].astype(np.int64)
        for key, n in count((places * REASONS + reasons) * 2 + (exits["flags"] & 1)):
            self._counts[key // (2 * REASONS), key // 2 % REASONS, key % 2] += n
        self._times.feed(self._follower.vm_of_place[places] * REASONS + reasons, exits["x"])
        self._vcpu_times.feed(places, exits["x"])
        self._rips.add(often([places, exits["value"]], 64))  # type: ignore[arg-type]
        told = exits["y"] >> 31 & 1 == 1
        if told.any():
            host = np.array([plain_reason(name) == "EXTERNAL_INTERRUPT" for name in self.reasons])
            told &= host[reasons]
            self._vectors.add(often([places[told], exits["y"][told] & 0xFF]))  # type: ignore[arg-type]
        times = exits["time"]
        if not self._ticks and first != NO_TIME:
            seconds = (times - first) // 1_000_000_000
            counted = (times != NO_TIME) & (seconds >= 0) & (seconds < SECONDS)
            keys = (seconds * VMS + self._follower.vm_of_place[places]) * REASONS + reasons
            for key, n in count(keys[counted]):
                second = key // REASONS // VMS, key // REASONS % VMS, key % REASONS
                if len(self._seconds) < KEPT_SECONDS or second in self._seconds:
                    self._seconds[second] += n
            slow = np.flatnonzero(exits["x"] > SLOW_NS)
            if len(slow):
                self._keep_slow(exits[slow], reasons[slow])

    def _reasons(self, keys: Longs) -> Longs:
        """Each exit's reason as an index into ``reasons``."""
        if len(self._reason_of) <= len(self._names):
            more = np.full(len(self._names) + 1 - len(self._reason_of), -1, np.int64)
            self._reason_of = np.concatenate([self._reason_of, more])
        found = self._reason_of[keys]
        for key in np.unique(keys[found < 0]).tolist():
            name = self._names[key - 1] if key else "?"
            if len(self.reasons) >= REASONS - 1 and name not in self.reasons:
                name = "other"
            if name not in self.reasons:
                self.reasons.append(name)
            self._reason_of[key] = self.reasons.index(name)
        return self._reason_of[keys]

    def _keep_slow(self, exits: Facts, reasons: Longs) -> None:
        """Exits that took long, of these reasons; HLT's and the like do not count."""
        idle = np.array([plain_reason(name) in IDLE for name in self.reasons])
        exits, reasons = exits[~idle[reasons]], reasons[~idle[reasons]]
        for place, n in count(exits["place"]):
            self.slow_count[place] += n
        if len(self.slow) >= SLOWEST:
            slower = exits["x"] > self.slow[-1].ns
            exits, reasons = exits[slower], reasons[slower]
        for one, reason in zip(exits, reasons.tolist(), strict=True):
            cpus = int(one["gsi"])
            at = int(one["x"]), int(one["line"]), int(one["place"])
            self.slow.append(Slow(*at, self.reasons[reason], (cpus & 0xFFFF) - 1, (cpus >> 16) - 1))
        if len(exits):
            self.slow = sorted(self.slow, key=lambda one: (-one.ns, one.line))[:SLOWEST]

    def _index(self, vm: int) -> int:
        return self._follower.places.vms.index(vm)

    def _of(self, vm: int) -> set[int]:
        return self._follower.of_vm(vm)

    def counts(self, vm: int) -> dict[str, int]:
        """Exits of a VM by reason."""
        found: Counter[str] = Counter()
        places = self._of(vm)
        for (place, reason, _), n in self._counts.items():
            if place in places:
                found[self.reasons[reason]] += n
        return dict(ranked(found))

    def plain(self, vm: int) -> Counter[tuple[str, bool]]:
        """Exits of a VM by the reason that all tools and vendors share, and whether they were of L2."""
        found: Counter[tuple[str, bool]] = Counter()
        places = self._of(vm)
        for (place, reason, nested), n in self._counts.items():
            if place in places:
                name = plain_reason(self.reasons[reason])
                found["HYPERCALL" if name in ("VMCALL", "VMMCALL") else name, bool(nested)] += n
        return found

    def rows(self, vm: int, seconds: float | None) -> list[ExitRow]:
        """The table of exits of a VM, most frequent first."""
        places = self._of(vm)
        counts: Counter[int] = Counter()
        nested: Counter[int] = Counter()
        for (place, reason, of_l2), n in self._counts.items():
            if place in places:
                counts[reason] += n
                nested[reason] += n * of_l2
        whole = sum(counts.values())
        times = {r: self._times.of(self._index(vm) * REASONS + r) for r in counts}
        spent = fsum(time.total for time in times.values() if time is not None)
        return [
            ExitRow(
                self.reasons[reason],
                n,
                n / whole,
                n / seconds if seconds else None,
                time := times[reason],
                time.total / spent if time is not None and spent else None,
                nested[reason],
            )
            for reason, n in sorted(counts.items(), key=lambda pair: (-pair[1], self.reasons[pair[0]]))
        ]

    def time_of(self, vm: int, reasons: set[str]) -> Quantiles | None:
        """How long exits of some reasons took, by their plain names."""
        wanted = [i for i, name in enumerate(self.reasons) if plain_reason(name) in reasons]
        return self._times.of_all([self._index(vm) * REASONS + r for r in wanted])

    def vcpus(self, vm: int, threads: dict[int, str]) -> list[VcpuRow]:
        """One row for each vCPU that has a thread or exits; ``threads`` by place."""
        by_place: dict[int, Counter[str]] = {}
        places = self._of(vm)
        for (place, reason, _), n in self._counts.items():
            if place in places:
                by_place.setdefault(place, Counter())[self.reasons[reason]] += n
        rips: dict[int, list[tuple[int, int]]] = {}
        for tally in (self._rips, self._entry_rips):
            found: dict[int, list[tuple[int, int]]] = {}
            for (place, rip), n in ranked(tally.counts):
                if rip and place in places and len(found.setdefault(place, [])) < RIPS:
                    found[place].append((rip, n))
            for place, most in found.items():
                rips.setdefault(place, most)
        rows = []
        for place in sorted(places & (by_place.keys() | threads.keys() | rips.keys())):
            if place:
                counts = by_place.get(place, Counter())
                vcpu = self._follower.places.places[place - 1][1]
                times = self._vcpu_times.of(place)
                rows.append(
                    VcpuRow(
                        vcpu, threads.get(place, ""), counts.total(), dict(ranked(counts)), times,
                        rips.get(place, []),
                    )
                )  # fmt: skip
        return sorted(rows, key=lambda row: row.vcpu)

    def by_second(self, vm: int) -> list[dict[str, int]]:
        """Exits by reason in each second of the recording, up to the last one that has exits."""
        index = self._index(vm)
        seconds: dict[int, Counter[str]] = {}
        for (second, of, reason), n in self._seconds.items():
            if of == index:
                seconds.setdefault(second, Counter())[self.reasons[reason]] += n
        if not seconds:
            return []
        return [dict(ranked(seconds.get(second, Counter()))) for second in range(max(seconds) + 1)]

    def windows(self, vm: int) -> bool:
        """Whether a VM exits in the range where Windows has its kernel."""
        places = self._of(vm)
        return any(rip >> 40 == 0xFFFFF8 and place in places for place, rip in self._rips.counts)

    def seen(self, place: int) -> int:
        """How often the lines of a place say where its guest is: exits, and entries whose exits were not recorded."""
        exits = sum(n for (at, _, _), n in self._counts.items() if at == place)
        return exits + sum(n for (at, _), n in self._entry_rips.counts.items() if at == place)

    def host_vectors(self, place: int) -> list[tuple[int, int]]:
        """The host's own vectors that made a vCPU exit, most frequent first."""
        found = [(vector, n) for (at, vector), n in self._vectors.counts.items() if at == place]
        return sorted(found, key=lambda pair: -pair[1])
