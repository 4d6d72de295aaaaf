"""Which kernel recorded a trace, as far as its lines tell: their texts, their order, the characters before the time.

Texts and orders changed from release to release (tracepoints/text.py has them all, written); each kind of line that is
found narrows the releases down. The first line of each kind is kept as evidence.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from fastexit import regs as R
from fastexit.profile import PROFILES
from fastexit.releases import FIRST, release
from fastexit.trace.events import Event, Kind
from fastexit.trace.reader import Batch, Task
from fastexit.trace.report import Evidence

ICR_WRITES = 256
"""How many ICR writes are looked at for their order; what the first of them show, all of a kernel's do."""

_ALWAYS, _NEVER = FIRST, (1 << 16, 0)
_Series = tuple[int, int]


class _Shape(NamedTuple):
    """A text that only some releases print."""

    text: re.Pattern[bytes]
    says: str
    since: str = ""
    before: str = ""


def _shape(text: str, says: str, since: str = "", before: str = "") -> _Shape:
    return _Shape(re.compile(text.encode()), says, since, before)


_SHAPES: dict[bytes, tuple[_Shape, ...]] = {
    b"kvm_entry": (
        _shape(r"vcpu \d+$", "kvm_entry without rip", before="5.10"),
        _shape(r"vcpu \d+, rip 0x\w+(?! intr_info|\w)", "kvm_entry with rip, without intr_info", "5.10", "6.16"),
        _shape(r"vcpu \d+, rip 0x\w+ intr_info ", "kvm_entry with intr_info", "6.16"),
    ),
    b"kvm_exit": (
        _shape(r".* rip 0x\w+ info \w+ \w+$", "kvm_exit with info", before="5.10"),
        _shape(r".* error_code 0x\w+$", "kvm_exit with info1, without requests", "5.10", "6.16"),
        _shape(r".* requests 0x", "kvm_exit with requests", "6.16"),
    ),
    b"kvm_inj_virq": (
        _shape(r"irq \d+$", "kvm_inj_virq with irq in decimal", before="6.1"),
        _shape(r"(IRQ|Soft/INTn) 0x", "kvm_inj_virq with IRQ in hex", "6.1"),
    ),
    b"kvm_inj_exception": (_shape(r"#\w+( \[reinjected\])?$", "kvm_inj_exception without an error code", "6.1"),),
    b"kvm_apicv_update_request": (_shape("", "kvm_apicv_update_request", "5.6", "6.1"),),
    b"kvm_apicv_inhibit_changed": (
        _shape(r".*inhibits=0x0$", "kvm_apicv_inhibit_changed", "6.1"),
        _shape(r".*inhibits=0x\w*[1-9a-f]\w*$", "kvm_apicv_inhibit_changed without names", "6.1", "6.12"),
        _shape(r".*inhibits=0x\w+ [A-Z]", "kvm_apicv_inhibit_changed with names", "6.12"),
    ),
    b"kvm_apicv_accept_irq": (_shape("", "kvm_apicv_accept_irq", "6.1"),),
    b"kvm_avic_doorbell": (_shape("", "kvm_avic_doorbell", "6.1"),),
    b"kvm_avic_kick_vcpu_slowpath": (_shape("", "kvm_avic_kick_vcpu_slowpath", "6.1"),),
    b"kvm_enter_smm": (_shape("", "kvm_enter_smm", before="6.1"),),
    b"kvm_smm_transition": (_shape("", "kvm_smm_transition", "6.1"),),
    b"kvm_pi_irte_update": (
        _shape("VT-d ", "kvm_pi_irte_update with VT-d", before="6.12"),
        _shape(r"PI is .*pi_desc_addr", "kvm_pi_irte_update with pi_desc_addr, without VT-d", "6.12", "6.18"),
        _shape(r"PI is (?!.*pi_desc_addr)", "kvm_pi_irte_update without pi_desc_addr", "6.18"),
    ),
    b"kvm_hv_hypercall": (
        _shape(r"code 0x\w+ \w+ cnt ", "kvm_hv_hypercall with cnt", before="6.1"),
        _shape(r"code 0x\w+ \w+ var_cnt ", "kvm_hv_hypercall with var_cnt", "6.1"),
    ),
    b"kvm_hv_hypercall_done": (_shape("", "kvm_hv_hypercall_done", "5.15"),),
    b"kvm_apic": (_shape(r"apic_write APIC_ICR = 0x\w{9,}$", "all 64 bits of an x2APIC ICR", "6.1"),),
}
_FIVE = Evidence(0, "five characters or more before the time", since="5.13")
_FOUR = Evidence(0, "four characters before the time", before="5.13")
_LATE_IPI = Evidence(0, "kvm_apic_accept_irq before its kvm_apic_ipi in an ICR write", since="6.18")
_TWO_HALVES = Evidence(0, "APIC_ICR2 and APIC_ICR before the kvm_apic_ipi of an x2APIC write", before="6.1")
_WRITE_FIRST = Evidence(0, "APIC_ICR alone before the kvm_apic_ipi of an x2APIC write", before="5.7")
_LATE_WAIT = Evidence(0, "kvm_wait_lapic_expire right behind a kvm_exit", before="6.1")
_PARTS = {int(Kind.APIC_WRITE), int(Kind.IPI), int(Kind.ACCEPT)}
_BESIDE = {
    int(kind) for kind in (Kind.OTHER, Kind.VCPU, Kind.SOURCE, Kind.HV_TIMER, Kind.HYPERV, Kind.RAISED, Kind.HV_DONE)
}


class Dating:
    """Collects evidence while a trace is read."""

    def __init__(self) -> None:
        self._found: dict[str, Evidence] = {}
        self._open: dict[Task, list[tuple[int, Event]]] = {}
        self._exited: set[Task] = set()
        self._icr_writes = 0

    @property
    def evidence(self) -> list[Evidence]:
        """What was found, by line."""
        return sorted(self._found.values())

    def see_text(self, body: bytes, line: int) -> None:
        """A text that the reader had not seen before."""
        name, _, payload = body.strip().partition(b":")
        if name == b"kvm":
            name, _, payload = payload.partition(b":")
        payload = payload.strip()
        for shape in _SHAPES.get(name, ()):
            if shape.says not in self._found and shape.text.match(payload):
                self._add(Evidence(0, shape.says, shape.since, shape.before), line)

    def see_flags(self, flags: bytes, line: int, *, by_kernel: bool) -> None:
        """The characters before a time stamp; trace-cmd prints four of its own accord."""
        if len(flags) > 4:
            self._add(_FIVE, line)
        elif by_kernel:
            self._add(_FOUR, line)

    def see_order(self, batch: Batch) -> None:
        """The lines of a batch, for the order in which the ICR writes among them left theirs."""
        if self._icr_writes >= ICR_WRITES:
            return
        for line, (task, event) in enumerate(zip(batch.tasks, batch.events, strict=True), batch.first):
            kind = event.kind
            if task is None:
                continue
            if task in self._exited:
                self._exited.discard(task)
                if event.name == "kvm_wait_lapic_expire":
                    self._add(_LATE_WAIT, line)
            if kind in _BESIDE:
                continue
            if event.name == "kvm_exit":
                self._exited.add(task)
            if kind in _PARTS:
                self._open.setdefault(task, []).append((line, event))
                continue
            parts = self._open.pop(task, None)
            if parts and kind == Kind.MSR_WRITE and event.a == R.MSR_X2APIC_ICR and not event.c:
                self._icr_write(parts)

    def _icr_write(self, parts: list[tuple[int, Event]]) -> None:
        self._icr_writes += 1
        sent = [i for i, (_, event) in enumerate(parts) if event.kind == Kind.IPI]
        if len(sent) != 1:
            return
        ipi = parts[sent[0]][1]
        before = parts[: sent[0]]
        written = [event.a for _, event in before if event.kind == Kind.APIC_WRITE]
        if written[-2:] == [R.APIC_ICR2, R.APIC_ICR]:
            self._add(_TWO_HALVES, before[0][0])
        elif written[-1:] == [R.APIC_ICR]:
            self._add(_WRITE_FIRST, before[0][0])
        elif before and before[-1][1].kind == Kind.ACCEPT and not (before[-1][1].b ^ ipi.b) & R.ICR_VECTOR:
            if not any(event.kind == Kind.ACCEPT for _, event in parts[sent[0] :]):
                self._add(_LATE_IPI, before[-1][0])

    def _add(self, evidence: Evidence, line: int) -> None:
        if evidence.says not in self._found:
            self._found[evidence.says] = evidence._replace(line=line)

    def kernels(self) -> tuple[str, ...]:
        """The generations that may have recorded it, oldest first: all when nothing tells, none when lines disagree."""
        since = max((_series(e.since) for e in self._found.values() if e.since), default=_ALWAYS)
        before = min((_series(e.before) for e in self._found.values() if e.before), default=_NEVER)
        names = list(PROFILES)
        begins = [_series(name) for name in names]
        ends = [*begins[1:], _NEVER]
        return tuple(
            name for name, begin, end in zip(names, begins, ends, strict=True) if max(begin, since) < min(end, before)
        )


def _series(text: str) -> _Series:
    found = release(text)
    return _ALWAYS if found is None else found.series
