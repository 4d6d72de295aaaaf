"""What a replay found: counts, predictions, mismatches. Plain data; render.py and heatmap.py show it."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, NamedTuple

from fastexit.regs import LINUX_VECTORS, XAPIC_BROADCAST, DeliveryMode, Shorthand
from fastexit.trace.doors import Doing, Door


class Evidence(NamedTuple):
    """What one kind of line says: the recording kernel is of release ``since`` or later, and older than ``before``.

    An empty text bounds nothing. ``line`` is the first line that shows it.
    """

    line: int
    says: str
    since: str = ""
    before: str = ""


NOT_RECORDED = -2
"""Targets, where nothing tells who took an IPI."""


class IcrClass(NamedTuple):
    """A kind of ICR write, or an IPI hypercall, whose destination is "VP set".

    ``targets`` is how many APICs its accept lines name; -1 for a write that faulted, NOT_RECORDED where the VM has no
    accept lines at all.
    """

    delivery: str
    destination: str
    shorthand: str
    targets: int
    broadcast: bool

    @property
    def cast(self) -> str:
        """Unicast or multicast, in words."""
        if self.targets == NOT_RECORDED:
            return "targets not recorded"
        if self.targets < 0:
            return "refused with #GP"
        if self.shorthand != "none":
            return f"{self.targets} targets" if self.targets != 1 else "1 target"
        if self.broadcast:
            return f"broadcast, {self.targets} targets"
        return {0: "nobody there", 1: "unicast"}.get(self.targets, f"multicast, {self.targets} targets")


FAULTED = IcrClass("", "", "", -1, False)
"""A write that faulted: what it meant to send plays no part."""


@lru_cache(4096)
def icr_class(icr: int, dest: int, targets: int) -> IcrClass:
    """The class of an ICR value: its low 32 bits, the destination cut to the sender's mode, accept lines."""
    shorthand = Shorthand(icr >> 18 & 3)
    return IcrClass(
        DeliveryMode(icr >> 8 & 7).name,
        "logical" if icr & 0x800 else "physical",
        shorthand.name.lower().replace("_", "-"),
        targets,
        not shorthand and dest in (XAPIC_BROADCAST, 0xFFFF_FFFF),
    )


def call_class(all_vps: bool, targets: int) -> IcrClass:
    """The class of an IPI hypercall: Fixed, to a set of VP indices or to all of them."""
    return IcrClass("Fixed", "VP set", "none", targets, all_vps)


class Mismatch(NamedTuple):
    """A recorded line that the model does not predict, or a predicted line that was not recorded.

    ``recorded`` or ``predicted`` is empty when there is no such line; ``line`` is the line in the file that shows it.
    """

    line: int
    event: str
    vm: int
    recorded: str
    predicted: str


class Mismatches:
    """Collects mismatches in bounded memory: the first ``wanted`` of them by line (None: all), and how many there are.

    >>> found = Mismatches(1)
    >>> for line in 3, 2, 9:
    ...     found.add(Mismatch(line, "kvm_eoi", 1, "", ""))
    >>> found.count, [m.line for m in found.first()]
    (3, [2])
    """

    def __init__(self, wanted: int | None) -> None:
        self.count: int = 0
        self._wanted = wanted
        self._found: list[Mismatch] = []

    def add(self, mismatch: Mismatch) -> None:
        """One more; they come almost in order of lines."""
        self.count += 1
        self._found.append(mismatch)
        if self._wanted is not None and len(self._found) > 2 * self._wanted:
            self._found = self.first()

    def first(self) -> list[Mismatch]:
        """The wanted ones, by line."""
        return sorted(self._found, key=lambda m: m.line)[: self._wanted]


@dataclass
class Lines:
    """Lines of one kind: how many the trace has, and how many of them the model predicts exactly."""

    total: int = 0
    exact: int = 0

    def add(self, exact: bool) -> None:
        self.total += 1
        self.exact += exact

    @property
    def share(self) -> float:
        """Exact share, 0..1; 1 when there is nothing to predict."""
        return self.exact / self.total if self.total else 1.0

    def as_dict(self) -> dict[str, Any]:
        return {"total": self.total, "exact": self.exact}


class DoorUse(NamedTuple):
    """How often the guest went through one door.

    ``fast`` is, for IPIs, kernel -> how many of them it takes fast; for all else the kernels that take it fast, with
    ``count`` each. ``exits`` is False where the guest needs no exit.
    """

    doing: Doing
    door: Door
    count: int  # type: ignore[assignment] # it hides tuple.count
    fast: dict[str, int]
    exits: bool

    def as_dict(self) -> dict[str, Any]:
        """As JSON types."""
        return {
            "access": self.doing.value,
            "door": self.door.value,
            "count": self.count,
            "exits": self.exits,
            "fast": self.fast,
        }


class Generation(NamedTuple):
    """What one kernel generation's fast path would have done with the trace's ICR writes and IPI hypercalls.

    ``fast`` of ``total`` are taken; ``refusals`` says why the others are not: reason -> writes.
    """

    kernel: str
    fast: int
    total: int
    refusals: dict[str, int]

    @property
    def share(self) -> float:
        """Fast share, 0..1."""
        return self.fast / self.total if self.total else 0.0


@dataclass
class VmReport:
    """One VM of the trace.

    Attributes:
        number: from 1, in order of first appearance.
        threads: vCPU id -> thread, ``""`` for a vCPU that is only a target.
        irqchip: "full" or "split".
        start: what the state before the first line was taken to be.
        assumptions: everything else that was assumed, one sentence each.
        icr_writes: writes of ICR and SELF_IPI, by MSR or MMIO, faulting ones included.
        hypercalls: IPI hypercalls of a Windows guest, which are no ICR writes.
        doors: how often the guest went by which door for what, see doors.py; ``door_uses`` has what each is worth.
        hyperv: kvm_hv lines or synthetic MSRs: the guest uses Hyper-V's interface. windows: RIPs of Windows's kernel.
        hv_sends, hv_results: kvm_hv_send_ipi(_ex) and kvm_hv_hypercall_done lines of IPI hypercalls, as far as the
            lines before them tell what they must be. hv_lines: other kvm_hv_* lines that a guest's EOI or MSR write
            prints. hv_timers: what synthetic timers print when they are started, run out and end.
        classes: IcrClass -> writes.
        vectors: (vector, shorthand) of Fixed and lowest-priority IPIs -> writes.
        sent: (sender, target) vCPU ids -> interrupts that IPIs delivered.
        taken_back: ICR values that only their kvm_apic_ipi line shows.
        ipi, accepted: kvm_apic_ipi lines, and kvm_apic_accept_irq lines that IPIs caused.
        other_accepts: kvm_apic_accept_irq lines by cause, when it was no IPI.
        pic_interrupts: kvm_inj_virq lines of what came from the PICs, past the local APIC.
        faults: writes that were recorded with #GP.
        eoi: kvm_eoi lines; host_eois of them are the recorded host's own EOI at injection.
        reads: register reads, the running timer count left out.
        generations: one for each profile.
        deadlines: TSC_DEADLINE writes, and ``deadline_fast`` the profiles that take them fast.
        deadline_with_timer: the profiles that take them fast only where the VMX preemption timer can serve them.
        hv_timer: the host can use the preemption timer, as ``hv_timer_from`` says: "trace" (its kvm_hv_timer_state
            lines), "option", "vendor" (SVM has none), or "assumed".
    """

    number: int
    threads: dict[int, str]
    irqchip: str
    start: str = ""
    assumptions: list[str] = field(default_factory=list)
    icr_writes: int = 0
    hypercalls: int = 0
    doors: Counter[tuple[Doing, Door]] = field(default_factory=Counter)
    door_uses: list[DoorUse] = field(default_factory=list)
    hyperv: bool = False
    windows: bool = False
    hv_sends: Lines = field(default_factory=Lines)
    hv_results: Lines = field(default_factory=Lines)
    hv_lines: Lines = field(default_factory=Lines)
    hv_timers: Lines = field(default_factory=Lines)
    classes: Counter[IcrClass] = field(default_factory=Counter)
    vectors: Counter[tuple[int, str]] = field(default_factory=Counter)
    sent: Counter[tuple[int, int]] = field(default_factory=Counter)
    taken_back: int = 0
    ipi: Lines = field(default_factory=Lines)
    accepted: Lines = field(default_factory=Lines)
    other_accepts: Counter[str] = field(default_factory=Counter)
    pic_interrupts: int = 0
    faults: Lines = field(default_factory=Lines)
    eoi: Lines = field(default_factory=Lines)
    host_eois: int = 0
    reads: Lines = field(default_factory=Lines)
    generations: list[Generation] = field(default_factory=list)
    deadlines: int = 0
    deadline_fast: list[str] = field(default_factory=list)
    deadline_with_timer: list[str] = field(default_factory=list)
    hv_timer: bool = False
    hv_timer_from: str = ""

    def as_dict(self) -> dict[str, Any]:
        """Everything as JSON types."""
        return {
            "vm": self.number,
            "threads": [{"vcpu": vcpu, "thread": thread or None} for vcpu, thread in self.threads.items()],
            "irqchip": self.irqchip,
            "start": self.start,
            "assumptions": self.assumptions,
            "hyperv": self.hyperv,
            "windows": self.windows,
            "icr_writes": self.icr_writes,
            "ipi_hypercalls": self.hypercalls,
            "doors": [use.as_dict() for use in self.door_uses],
            "classes": [{**c._asdict(), "cast": c.cast, "writes": n} for c, n in self.classes.most_common()],
            "vectors": [
                {"vector": v, "name": vector_name(v), "shorthand": s, "writes": n}
                for (v, s), n in self.vectors.most_common()
            ],
            "sent": [{"from": s, "to": t, "interrupts": n} for (s, t), n in sorted(self.sent.items())],
            "kvm_apic_ipi": self.ipi.as_dict(),
            "kvm_apic_accept_irq": {
                "total": self.accepted.total + sum(self.other_accepts.values()),
                "by_ipi": self.accepted.as_dict(),
                "by_other": dict(self.other_accepts.most_common()),
            },
            "pic_interrupts": self.pic_interrupts,
            "kvm_hv_send_ipi": self.hv_sends.as_dict(),
            "kvm_hv_hypercall_done": self.hv_results.as_dict(),
            "kvm_hv_other": self.hv_lines.as_dict(),
            "kvm_hv_stimer": self.hv_timers.as_dict(),
            "faults": self.faults.as_dict(),
            "kvm_eoi": {**self.eoi.as_dict(), "by_recorded_host": self.host_eois},
            "register_reads": self.reads.as_dict(),
            "fast_path": [{**g._asdict(), "share": g.share} for g in self.generations],
            "tsc_deadline": {
                "writes": self.deadlines,
                "fast_in": self.deadline_fast,
                "with_preemption_timer": self.deadline_with_timer,
                "preemption_timer": {"used": self.hv_timer, "from": self.hv_timer_from},
            },
        }


@dataclass
class Report:
    """The result of a replay.

    Attributes:
        path, kernel, vendor, apicv: what was replayed, and as what.
        kernel_from: who said the generation: "option", "trace" (its lines), or "assumed" (they do not tell).
        kernels: the generations that may have recorded the trace, as its lines tell; none when they disagree.
        evidence: the kinds of lines that tell, each with the first line that shows it.
        lines, events: lines in the file, and how many of them are events of the kvm system by name.
        vms: one VmReport each.
        mismatches: the first of them by line, as many as replay() was asked to keep; ``mismatched`` counts all.
        left_out: interrupts that came from threads of no VM in particular.
        problems: damage of the file. notes: oddities that leave the result good.
        seconds: time the replay took.
    """

    path: str
    kernel: str
    vendor: str
    apicv: bool
    kernel_from: str = "option"
    kernels: tuple[str, ...] = ()
    evidence: list[Evidence] = field(default_factory=list)
    lines: int = 0
    events: Counter[str] = field(default_factory=Counter)
    vms: list[VmReport] = field(default_factory=list)
    mismatches: list[Mismatch] = field(default_factory=list)
    mismatched: int = 0
    left_out: int = 0
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def ipi(self) -> Lines:
        """kvm_apic_ipi lines of all VMs."""
        return _sum([vm.ipi for vm in self.vms])

    @property
    def accepted(self) -> Lines:
        """kvm_apic_accept_irq lines that IPIs caused, of all VMs."""
        return _sum([vm.accepted for vm in self.vms])

    @property
    def exact(self) -> bool:
        """True when the file is sound and the model predicts every line that it can predict."""
        return not self.mismatched and not self.problems

    @property
    def doubtful(self) -> bool:
        """True when lines differ and interrupts belong to no VM: threads may stand at the wrong VM, or at none."""
        return bool(self.mismatched and self.left_out)

    def as_dict(self) -> dict[str, Any]:
        """Everything as JSON types."""
        return {
            "path": self.path,
            "kernel": self.kernel,
            "vendor": self.vendor,
            "apicv": self.apicv,
            "kernel_from": self.kernel_from,
            "kernels": list(self.kernels),
            "evidence": [e._asdict() for e in self.evidence],
            "lines": self.lines,
            "events": dict(self.events.most_common()),
            "seconds": round(self.seconds, 3),
            "kvm_apic_ipi": self.ipi.as_dict(),
            "kvm_apic_accept_irq_by_ipi": self.accepted.as_dict(),
            "vms": [vm.as_dict() for vm in self.vms],
            "mismatched": self.mismatched,
            "mismatches": [m._asdict() for m in self.mismatches],
            "left_out": self.left_out,
            "doubtful": self.doubtful,
            "problems": self.problems,
            "notes": self.notes,
        }


def _sum(parts: list[Lines]) -> Lines:
    return Lines(sum(p.total for p in parts), sum(p.exact for p in parts))


def vector_name(vector: int) -> str:
    """Linux's name of a vector, or an empty string.

    >>> vector_name(0xFD)
    'RESCHEDULE'
    """
    return LINUX_VECTORS.get(vector, "")
