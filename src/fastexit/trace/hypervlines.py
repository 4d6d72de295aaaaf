"""SynIC and synthetic timers of one replayed vCPU: the kvm_hv_* lines of its EOIs and MSR writes, against the model's.

KVM prints them before the kvm_msr line of the write that causes them, and behind the kvm_eoi line of an EOI. What a
timer prints when its time has come is stimerlines.py's.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from fastexit import hyperv as HV
from fastexit import layout as L
from fastexit.trace.events import ACTED, Event
from fastexit.vcpu import Vcpu

if TYPE_CHECKING:
    from fastexit.trace.guest import Guest

_MSRS = range(HV.MSR_HV_SCONTROL, HV.MSR_HV_STIMER3_COUNT + 1)
_SEND_EOI, _NOTIFY = "kvm_hv_synic_send_eoi", "kvm_hv_notify_acked_sint"
_NUMBER = re.compile(r"\d+$")
_KEPT = 64
"""So many lines are kept for the write that they belong to; the largest prints 16."""

Line = tuple[str, str]
"""An event and what it says."""


class HypervLines:
    """The lines that one vCPU's accesses print."""

    def __init__(self, guest: Guest, v: Vcpu) -> None:
        self._guest = guest
        self._v = v
        self._own = re.compile(rf"vcpu_id {v.vcpu_id} ")
        self._seen: list[tuple[int, Event]] = []
        self._due: list[Line] = []
        self._due_since = 0
        self._written: set[int] = set()
        self._learning = -1

    def begin(self) -> None:
        """An access begins in the model: what was still due did not come."""
        self._missing()
        self._learning = -1
        trace = self._guest.machine.trace
        trace.clear()
        trace.enable()

    def ends_itself(self, vector: int) -> bool:
        """Whether a SINT with auto-EOI has the vector."""
        row = L.HV + self._v.index * L.HV_STRIDE + L.HV_AUTO_EOI
        return bool(self._guest.machine.mem[row + (vector >> 6)] >> (vector & 63) & 1)

    def _predicted(self) -> list[Line]:
        """What the model printed since, of the lines that were recorded at all."""
        trace = self._guest.machine.trace
        trace.disable()
        lines = []
        for line in trace.lines():
            name, _, text = line.partition(": ")
            if name in ACTED and name in self._guest.recorded.events:
                lines.append((name, text.replace(" host 1", " host 0")))
        return lines

    def ended(self, line: int, vector: int) -> None:
        """The EOI of a kvm_eoi line was done; ``vector`` is -1 where nothing of the SynIC is told of it."""
        lines = self._predicted()
        told = [i for i, (name, text) in enumerate(lines) if name == _SEND_EOI and text.endswith(f" vector {vector}")]
        self._due = lines[told[-1] :] if told and vector >= 0 else []
        self._due_since = line

    def written(self, line: int, msr: int, value: int, fault: bool) -> None:
        """A write of a synthetic MSR, whose lines stand before its kvm_msr line."""
        seen, self._seen = self._seen, []
        if msr not in _MSRS or fault:
            return
        self.begin()
        self._v.set_msr(msr, value)
        if HV.MSR_HV_SINT0 <= msr <= HV.MSR_HV_SINT15:
            self._written.add(msr - HV.MSR_HV_SINT0)
        predicted = self._predicted()
        seen = seen[max(len(seen) - len(predicted), 0) :]
        for i, (name, text) in enumerate(predicted):
            if i < len(seen):
                self._compare(*seen[i], (name, text))
            else:
                self._guest.differs(line, name, "", text)

    def seen(self, line: int, event: Event) -> None:
        """A recorded line."""
        if not self._own.match(event.text):
            return
        if self._due:
            self._compare(line, event, self._due.pop(0))
        elif event.name == _SEND_EOI:
            self._learning = _last(event.text)
        elif event.name == _NOTIFY and self._learning >= 0:
            self._learn(line, _last(event.text))
        else:
            self._seen = [*self._seen[-_KEPT:], (line, event)]

    def _learn(self, line: int, sint: int) -> None:
        """A SINT that was set up before the first line shows its vector."""
        if sint in self._written:
            self._guest.differs(line, _NOTIFY, f"vcpu_id {self._v.vcpu_id} sint {sint}", "")
            return
        self._written.add(sint)
        self._v.set_msr(HV.MSR_HV_SINT0 + sint, self._learning)
        self._guest.assume(f"line {line}: vCPU {self._v.vcpu_id} had vector {self._learning} in SINT {sint} before")

    def _compare(self, line: int, event: Event, predicted: Line) -> None:
        exact = (event.name, event.text) == predicted
        self._guest.report.hv_lines.add(exact)
        if not exact:
            name, text = predicted
            shown = text if name == event.name else f"{name}: {text}"
            self._guest.differs(line, event.name, event.text, shown)

    def _missing(self) -> None:
        """Lines that did not come."""
        for name, text in self._due:
            self._guest.differs(self._due_since, name, "", text)
        self._due = []


def _last(text: str) -> int:
    """The number at the end."""
    found = _NUMBER.search(text)
    return int(found[0]) if found else -1
