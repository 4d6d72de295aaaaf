"""What a vCPU waits for: HLT exits, the wake-ups behind them, and what else of a VM is simply counted."""

from __future__ import annotations

from collections import Counter

import numpy as np

from fastexit.answers.exits import Exits
from fastexit.answers.facts import Block, Follower, plain_reason
from fastexit.answers.report import Halts
from fastexit.answers.tally import count
from fastexit.records.columns import NO_TIME, Event, Recording

HLT = {"HLT", "IDLE_HALT", "IDLE_HLT"}
_COUNTED = np.zeros(256, bool)
_COUNTED[[Event.WAKEUP, Event.CPUID, Event.HYPERCALL, Event.HV_HYPERCALL, Event.USERSPACE_EXIT]] = True


class Waits:
    """Accumulates kvm_vcpu_wakeup rows and counts of rows that need nothing else."""

    def __init__(self, follower: Follower) -> None:
        self._follower = follower
        self._counts: Counter[tuple[int, int, int]] = Counter()

    def feed(self, block: Block) -> None:
        """A block of rows."""
        at = np.flatnonzero(_COUNTED[block.events])
        if len(at):
            events = block.events[at].astype(np.int64)
            waits = np.where(events == Event.WAKEUP, block.rows["b"][at] & np.uint64(1), 0).astype(np.int64)
            for key, n in count(block.vms[at].astype(np.int64) << 9 | events << 1 | waits):
                self._counts[key >> 9, key >> 1 & 0xFF, key & 1] += n

    def _rows(self, vm: int, event: Event, way: int) -> int:
        return self._counts[self._follower.places.vms.index(vm), int(event), way]

    def halts(self, vm: int, exits: Exits) -> Halts | None:
        """HLT exits of a VM and its wake-ups; None where it has neither."""
        hlts = sum(n for reason, n in exits.counts(vm).items() if plain_reason(reason) in HLT)
        waits, polls = self._rows(vm, Event.WAKEUP, 1), self._rows(vm, Event.WAKEUP, 0)
        return Halts(hlts, waits, polls, exits.time_of(vm, HLT)) if hlts or waits or polls else None

    def lines(self, vm: int) -> dict[str, int]:
        """Lines of a VM that stand for exits, where those were not recorded: "CPUID", "HYPERCALL"."""
        calls = self._rows(vm, Event.HYPERCALL, 0) + self._rows(vm, Event.HV_HYPERCALL, 0)
        return {"CPUID": self._rows(vm, Event.CPUID, 0), "HYPERCALL": calls}


class Span:
    """When a recording begins and ends, and each VM's lines; lines without a time do not count."""

    def __init__(self, recording: Recording, follower: Follower) -> None:
        self._follower = follower
        self.ticks: bool = recording.clock != "ns"
        self.first: int = NO_TIME
        """The first row's time that there is."""
        self.last: int = NO_TIME
        self.events: Counter[int] = Counter()
        self._of: dict[int, tuple[int, int]] = {}
        self._rows: Counter[int] = Counter()

    def feed(self, block: Block) -> None:
        """A block of rows."""
        counts = np.bincount(block.events, minlength=256)
        for event in np.flatnonzero(counts).tolist():
            self.events[event] += int(counts[event])
        alone = len(self._follower.places.vms) == 1
        vms = block.vms
        for vm, n in enumerate([len(vms)] if alone else np.bincount(vms).tolist()):
            if n:
                self._rows[vm] += n
        times = np.ascontiguousarray(block.rows["time"])
        known = times != NO_TIME
        if not known.all():
            times, vms = times[known], vms[known]
        if not len(times):
            return
        if self.first == NO_TIME:
            self.first = int(times[0])
        self.last = max(self.last, int(times.max()))
        for vm in [0] if alone else np.unique(vms).tolist():
            mine = times if alone else times[vms == vm]
            low, high = int(mine.min()), int(mine.max())
            before = self._of.get(vm, (low, high))
            self._of[vm] = min(low, before[0]), max(high, before[1])

    def lines(self, vm: int) -> int:
        """Lines of a VM."""
        return self._rows[self._follower.places.vms.index(vm)]

    def seconds(self, vm: int) -> float | None:
        """Seconds from a VM's first line to its last; None where the clock is no time."""
        found = self._of.get(self._follower.places.vms.index(vm))
        return (found[1] - found[0]) / 1e9 if found and not self.ticks else None
