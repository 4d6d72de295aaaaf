"""APICv inhibits: which came and went, and what the trace says of APICv at all."""

from __future__ import annotations

from collections import Counter
from typing import NamedTuple

import numpy as np

from fastexit import regs as R
from fastexit.answers.facts import Block, Follower
from fastexit.records.columns import Event, Recording
from fastexit.tracepoints.names import inhibits as named
from fastexit.tracepoints.releases import numbers

KEPT = 256


class Change(NamedTuple):
    """A line that sets or clears an inhibit, by its number as printed."""

    line: int
    number: int
    on: bool


def inhibit_name(number: int, kernel: str) -> str:
    """What a release calls an inhibit; the newest one, where ``kernel`` does not begin with a release.

    >>> inhibit_name(9, "6.1"), inhibit_name(9, "")
    ('SEV', 'PIT_REINJ')
    """
    words = kernel.split()
    known = (named(numbers(words[0])) if words else None) or tuple(R.Inhibit)
    return known[number].name if number < len(known) else str(number)


class Inhibits:
    """Accumulates kvm_apicv_inhibit_changed and kvm_apicv_update_request rows."""

    def __init__(self, recording: Recording, follower: Follower) -> None:
        self._names = recording.names
        self._follower = follower
        self.changes: dict[int, list[Change]] = {}
        """By VM, the first ones."""
        self.counts: Counter[tuple[int, int, bool]] = Counter()
        """By VM, inhibit, and whether it was set."""
        self.standing: dict[int, int] = {}
        """By VM all inhibits after its last line, a bit each."""

    def feed(self, block: Block) -> None:
        """A block of rows."""
        at = block.at(Event.APICV_INHIBIT)
        if not len(at):
            return
        some = block.rows[at]
        vms = self._follower.places.vms
        columns = [block.vms[at], *(some[name] for name in ("line", "name", "a", "b", "d"))]
        for index, line, name, on, mask, old in zip(*map(np.ndarray.tolist, columns), strict=True):
            text = self._names[name] if 0 <= name < len(self._names) else ""
            number = int(text) if text.isdecimal() and len(text) < 4 else -1
            vm = vms[index]
            self.counts[vm, number, bool(on)] += 1
            changes = self.changes.setdefault(vm, [])
            if len(changes) < KEPT:
                changes.append(Change(line, number, bool(on)))
            if old:
                bit = 1 << max(number, 0)
                before = self.standing.get(vm, 0)
                mask = before | bit if on else before & ~bit
            self.standing[vm] = mask
