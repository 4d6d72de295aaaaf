"""Which thread is which vCPU of which VM, and what state its APIC was in before the first line.

A first pass over the trace collects clues per thread. KVM names the vCPU on lines that only the vCPU's own thread can
cause (kvm_entry, kvm_exit, kvm_eoi, the halt-polling and timer lines); it never names the VM, so threads are told
apart by process id where the trace has one, else by name, by the order of thread ids, and by who reacts to whose IPIs.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from fastexit import hyperv as HV
from fastexit import regs as R
from fastexit.layout import MAX_VCPU_ID
from fastexit.trace.doors import REGISTER_OF_SYNTHETIC, Door, door_of_exit
from fastexit.trace.events import Event, Kind
from fastexit.trace.files import TraceError
from fastexit.trace.reader import Batch, Task
from fastexit.trace.threadnames import vcpu_in

_PAGE = R.APIC_DEFAULT_PHYS_BASE >> 12
_BELOW_XAPIC_DEST = (1 << R.XAPIC_DEST_SHIFT) - 1
_LEARNED = {R.APIC_TASKPRI, R.APIC_LDR, R.APIC_DFR, R.APIC_SPIV, R.APIC_ICR, R.APIC_TDCR}
_LEARNED |= set(range(R.APIC_LVTT, R.APIC_LVTERR + 1, 0x10))
_OF_THE_MODE = {R.APIC_LDR, R.APIC_ICR}
_OWN_VCPU = {Kind.VCPU, Kind.HV_TIMER, Kind.MARK, Kind.EOI, Kind.EXIT, Kind.PV_EOI}
_APIC = {Kind.APIC_WRITE, Kind.APIC_READ, Kind.IPI, Kind.EOI, Kind.PV_EOI, Kind.HV_CALL, Kind.HV_SEND}
_HYPERV = {Kind.HYPERV, Kind.RAISED, Kind.HV_MSR, Kind.HV_CALL, Kind.HV_SEND, Kind.HV_DONE}
_RUNS = {Kind.EOI, Kind.PV_EOI, Kind.HV_CALL, Kind.HV_SEND}
_NEEDS_ENABLED = {R.APIC_EOI, R.APIC_ICR, R.APIC_SELF_IPI}
_SETS_UP = {R.APIC_SPIV, R.APIC_ID, R.APIC_LDR, R.APIC_DFR}
_SYNIC_MSRS = range(HV.MSR_HV_SCONTROL, HV.MSR_HV_STIMER3_COUNT + 1)
_TRAPS = (Door.TRAP, Door.AVIC)
_SURE = 3
_NAMED = 4
_MAJORITY = 10


@dataclass(eq=False)
class Clues:
    """What the first pass learned about one thread."""

    task: Task
    named: Counter[int] = field(default_factory=Counter)
    """vCPU ids that its own lines name -> in how many lines."""
    vcpu: int | None = None
    """The one of them that it is."""
    accepted: set[int] = field(default_factory=set)
    """vCPU ids that its interrupts reached."""
    pic: bool = False
    """It changed a pin of the PICs that is not masked."""
    apic: bool = False
    """It accesses a local APIC."""
    born: int = 0
    """Order of its first APIC access among everything seen."""
    x2apic: bool | None = None
    """Mode before its first access; None when it made none."""
    running: bool | None = None
    """True when it begins with what only an enabled APIC is good for, False when it begins by setting one up."""
    registers: dict[int, int] = field(default_factory=dict)
    """Registers it read before it wrote them: offset -> value."""
    written: set[int] = field(default_factory=set)
    split: bool = False
    """VERSION says that EOI broadcasts can be suppressed: split irqchip."""
    moved: bool = False
    """It wrote APICBASE, and what depends on the mode changed."""
    hv_timer: bool | None = None
    """True when a kvm_hv_timer_state line shows the VMX preemption timer in use, False when all of them show it unused.
    """
    hyperv: bool = False
    """Its lines show a guest that knows Hyper-V."""
    synic: bool = False
    """Its lines show a SynIC in use."""
    windows: bool = False
    """It exits at addresses where Windows has its kernel."""
    trapped: bool = False
    """The CPU traps behind its writes of the xAPIC page, or of an x2APIC ICR."""
    init_sent: dict[int, int] = field(default_factory=dict)
    """vCPU id -> order of the first INIT it sent there."""


@dataclass(eq=False)
class Vm:
    """One VM of the trace.

    Attributes:
        number: from 1, in order of first appearance.
        vcpus: vCPU id -> its thread's clues; None for a vCPU that shows up only as a target.
        others: threads that deliver interrupts but are no vCPU.
        assumed: what was assumed about it, one sentence each.
    """

    number: int
    vcpus: dict[int, Clues | None]
    others: list[Task] = field(default_factory=list)
    assumed: list[str] = field(default_factory=list)

    @property
    def split(self) -> bool:
        """True when the guest saw a split irqchip."""
        return any(c.split for c in self.vcpus.values() if c)

    @property
    def hyperv(self) -> bool:
        """True when the guest uses what KVM has for Windows guests."""
        return any(c.hyperv for c in self.vcpus.values() if c)

    @property
    def synic(self) -> bool:
        """True when user space has given it a SynIC."""
        return any(c.synic for c in self.vcpus.values() if c)

    @property
    def windows(self) -> bool:
        """True when RIPs show a Windows kernel."""
        return any(c.windows for c in self.vcpus.values() if c)

    @property
    def hv_timer(self) -> bool | None:
        """Whether the VM's host used the VMX preemption timer, or None when no kvm_hv_timer_state line tells.

        One line with hv_timer 1 is enough: a host that can use it prints 0 as well, when the vCPU blocks or the target
        is in the past. It is asked for the whole VM, because KVM decides by module parameters and disabled exits.
        """
        seen = [c.hv_timer for c in self.vcpus.values() if c and c.hv_timer is not None]
        return any(seen) if seen else None

    def was_reset(self, vcpu: int) -> bool:
        """True when the first thing the trace shows of this vCPU is an INIT, which makes earlier state irrelevant."""
        sent = [c.init_sent[vcpu] for c in self.vcpus.values() if c and vcpu in c.init_sent]
        clues = self.vcpus[vcpu]
        return bool(sent) and (clues is None or not clues.born or min(sent) < clues.born)


class Survey:
    """Collects clues from the whole trace, batch by batch; `vms()` draws the conclusions.

    ``path`` is for messages only; ``kinds`` has the kinds of events that occur, ``events`` their lines by name.
    ``unresolved``: of VMs whose vCPUs cannot be told apart, why, where others can.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self.clues: dict[Task, Clues] = {}
        self.kinds: set[int] = set()
        self.events: Counter[str] = Counter()
        self.unresolved: list[str] = []
        self._seen = 0

    @property
    def empty(self) -> bool:
        """True as long as no kvm event was seen."""
        return not self._seen

    def learn(self, batch: Batch) -> None:
        """Looks at each distinct (thread, event) of a batch once, in order of its first line."""
        for (task, event), n in Counter(zip(batch.tasks, batch.events, strict=True)).items():
            if event.name:
                self.events[event.name] += n
            if task is None or not event.kind:
                continue
            self._seen += 1
            clues = self.clues.get(task)
            if clues is None:
                clues = self.clues[task] = Clues(task)
            if event.kind in _OWN_VCPU and event.a >= 0:
                clues.named[event.a] += n
            self._look(clues, event)

    def _look(self, clues: Clues, event: Event) -> None:
        kind = event.kind
        self.kinds.add(kind)
        mode = _mode_before(event)
        if not clues.apic and (kind in _APIC or mode is not None):
            clues.apic = True
            clues.born = self._seen
        if kind == Kind.ACCEPT:
            clues.accepted.add(event.a)
            if event.b & R.ICR_DM == R.DM_INIT << R.ICR_DM_SHIFT:
                clues.init_sent.setdefault(event.a, self._seen)
        elif kind == Kind.PIC:
            clues.pic = True
        elif kind == Kind.APIC_READ:
            if event.a in _LEARNED - (_OF_THE_MODE if clues.moved else set()) - clues.written:
                clues.registers.setdefault(event.a, event.b)
            if event.a == R.APIC_LVR:
                clues.split = clues.split or bool(event.b & R.LVR_DIRECTED_EOI)
        elif kind == Kind.APIC_WRITE:
            clues.written.add(event.a)
            if clues.running is None and event.a in _NEEDS_ENABLED | _SETS_UP:
                clues.running = event.a in _NEEDS_ENABLED
        elif kind in _RUNS and clues.running is None:
            clues.running = True
        elif kind == Kind.MSR_WRITE and event.a == R.MSR_APICBASE:
            clues.moved = True
        elif kind == Kind.HV_TIMER:
            clues.hv_timer = bool(clues.hv_timer or event.b)
        elif kind == Kind.EXIT:
            clues.windows = clues.windows or bool(event.c)
            clues.trapped = clues.trapped or door_of_exit(event.text) in _TRAPS
        elif kind == Kind.HV_MSR and event.a in REGISTER_OF_SYNTHETIC and not clues.apic:
            clues.apic = True
            clues.born = self._seen
        if kind in _HYPERV:
            clues.hyperv = True
            synic = event.a in _SYNIC_MSRS and not event.c if kind == Kind.HV_MSR else kind <= Kind.RAISED
            clues.synic = clues.synic or synic
        if clues.x2apic is None:
            clues.x2apic = mode

    # --------------------------------------------------------------------------------------------------- conclusions

    def vms(self, again: Callable[[], Iterable[Batch]]) -> list[Vm]:
        """The VMs, every thread at its place. ``again()`` reads the trace once more if only reactions can tell.

        Raises TraceError when the vCPUs cannot be told apart, or when no APIC access is in the trace.
        """
        if not any(c.apic or c.accepted for c in self.clues.values()):
            first = sorted(self.events.items(), key=lambda entry: (-entry[1], entry[0]))[:_NAMED]
            held = ", ".join(f"{n:,} {name}" for name, n in first)
            raise TraceError(
                f"{self.path}: kvm events ({held}), but no local APIC access among them to replay: `fastexit report` "
                "has tables of what is there; for a replay record kvm:kvm_apic, kvm:kvm_apic_ipi, "
                "kvm:kvm_apic_accept_irq, kvm:kvm_msr, kvm:kvm_mmio and kvm:kvm_eoi"
            )
        for clues in self.clues.values():
            self._decide(clues)
            if clues.x2apic is None and clues.trapped:  # an x2APIC ICR would show its destination
                clues.x2apic = False
        actors = [c for c in self.clues.values() if c.apic or c.vcpu is not None]
        order = {c: i for i, c in enumerate(self.clues.values())}
        families: dict[object, list[Clues]] = defaultdict(list)
        for clues in actors:
            task = clues.task
            families[task.tgid if task.tgid >= 0 else re.sub(r"\d+", "#", task.comm)].append(clues)
        groups: list[list[Clues]] = []
        for family in families.values():
            groups += self._split(sorted(family, key=lambda c: c.task.pid), again)
        vms: list[Vm] = []
        for number, group in enumerate(sorted(groups, key=lambda g: min(order[c] for c in g)), 1):
            try:
                assumed = self._name_the_unnamed(group)
            except TraceError as error:
                if number == len(groups) and not vms:
                    raise
                self.unresolved.append(str(error))
                continue
            vcpus: dict[int, Clues | None] = {c.vcpu: c for c in group if c.vcpu is not None}
            for clues in group:
                for vcpu in clues.accepted:
                    vcpus.setdefault(vcpu, None)
            if max(vcpus) > MAX_VCPU_ID:
                raise TraceError(f"{self.path}: vCPU id {max(vcpus)} is beyond the model's highest, {MAX_VCPU_ID}")
            vms.append(Vm(len(vms) + 1, dict(sorted(vcpus.items())), assumed=assumed))
        self._place_others(vms, [c for c in self.clues.values() if c not in actors and (c.accepted or c.pic)])
        return vms

    def _decide(self, clues: Clues) -> None:
        """Which vCPU the thread is. A few lines that say otherwise are damage, which the comparison will show.

        Where no line says it, the thread's name may.
        """
        if not clues.named:
            told = vcpu_in(clues.task.comm)
            clues.vcpu = told if told >= 0 else None
            return
        (clues.vcpu, most), *rest = clues.named.most_common()
        if rest and most < _MAJORITY * sum(n for _, n in rest):
            ids = ", ".join(str(vcpu) for vcpu in sorted(clues.named))
            raise TraceError(
                f"{self.path}: thread {clues.task} acts for vCPUs {ids}, and not every line says for which: record a "
                "VMM with one thread per vCPU"
            )

    def _split(self, family: list[Clues], again: Callable[[], Iterable[Batch]]) -> list[list[Clues]]:
        """VMMs create the threads of a VM one after the other, so the next VM begins where a vCPU id comes again."""
        groups: list[list[Clues]] = [[]]
        for clues in family:
            if clues.vcpu is not None and any(clues.vcpu == c.vcpu for c in groups[-1]):
                groups.append([])
            groups[-1].append(clues)
        uses = Counter(c.vcpu for c in family if c.vcpu is not None)
        if len(groups) == max(uses.values(), default=1):
            return groups
        return self._split_by_reaction(family, uses, reactions(again()))

    def _split_by_reaction(
        self, family: list[Clues], uses: Counter[int], linked: Counter[tuple[Task, Task]]
    ) -> list[list[Clues]]:
        """VMs that were started at the same time: a thread belongs to the one whose interrupts it answers."""
        count = max(uses.values())
        seed = min(vcpu for vcpu, n in uses.items() if n == count)
        groups = [[c] for c in family if c.vcpu == seed]
        rest = [c for c in family if c.vcpu != seed]
        while rest:
            best: tuple[int, Clues, list[Clues]] | None = None
            for clues in rest:
                scores = [
                    (sum(linked[c.task, clues.task] + linked[clues.task, c.task] for c in g), i)
                    for i, g in enumerate(groups)
                    if clues.vcpu is None or all(c.vcpu != clues.vcpu for c in g)
                ]
                scores.sort(reverse=True)
                lead = scores[0][0] - _SURE * (scores[1][0] if len(scores) > 1 else 0) if scores else 0
                if lead > 0 and (best is None or lead > best[0]):
                    best = lead, clues, groups[scores[0][1]]
            if best is None:
                raise TraceError(
                    f"{self.path}: {count} VMs in one trace, and nothing tells to which of them thread {rest[0].task} "
                    "belongs: record with the record-tgid option on, or one VM at a time"
                )
            best[2].append(best[1])
            rest.remove(best[1])
        return [sorted(group, key=lambda c: c.task.pid) for group in groups]

    def _name_the_unnamed(self, group: list[Clues]) -> list[str]:
        """Threads whose vCPU no line names get the ids that their place among the others leaves."""
        unnamed = [c for c in group if c.vcpu is None]
        if not unnamed:
            return []
        where = ", ".join(str(c.task) for c in unnamed)
        misfit = any(c.vcpu not in (None, i) for i, c in enumerate(group))
        if misfit or (len(unnamed) == len(group) > 1):
            raise TraceError(
                f"{self.path}: cannot tell which vCPU thread {where} is: record with kvm:kvm_entry, kvm:kvm_exit or "
                "kvm:kvm_eoi on"
            )
        for i, clues in enumerate(group):
            clues.vcpu = i
        return [f"no line names the vCPU of thread {where}: taken by the order of thread ids"]

    @staticmethod
    def _place_others(vms: list[Vm], others: Iterable[Clues]) -> None:
        """Device threads go to the VM of their process, or to the only VM there is."""
        for clues in others:
            tgid = clues.task.tgid
            same = [vm for vm in vms if any(c and c.task.tgid == tgid >= 0 for c in vm.vcpus.values())]
            for vm in same or (vms if len(vms) == 1 else []):
                vm.others.append(clues.task)
                for vcpu in clues.accepted:
                    vm.vcpus.setdefault(vcpu, None)
                vm.vcpus = dict(sorted(vm.vcpus.items()))


def _mode_before(event: Event) -> bool | None:
    """True for x2APIC mode before this line, False for xAPIC, None when the line does not tell."""
    if event.kind in (Kind.MSR_READ, Kind.MSR_WRITE) and not event.c:
        if event.a >= R.MSR_X2APIC_BASE:
            return True
        if event.a == R.MSR_APICBASE:
            return event.kind == Kind.MSR_READ and bool(event.b & R.APICBASE_EXTD)
    if event.kind in (Kind.MMIO_READ, Kind.MMIO_WRITE) and event.a >> 12 == _PAGE:
        return False
    if event.kind == Kind.IPI and event.a >= R.XAPIC_BROADCAST:
        return event.a > R.XAPIC_BROADCAST
    if event.kind == Kind.APIC_WRITE and event.a in (R.APIC_ID, R.APIC_LDR, R.APIC_DFR):
        return False
    if event.kind == Kind.APIC_WRITE and event.a == R.APIC_ICR2 and event.b:
        # Up to 5.10 the write of an x2APIC ICR shows ICR2 too; an xAPIC destination is in its top byte.
        return bool(event.b << R.XAPIC_DEST_SHIFT & 0xFFFF_FFFF)
    if event.kind == Kind.APIC_WRITE and event.a == R.APIC_ICR and event.b >> 32:
        # In xAPIC mode it has 64 bits when it came by Hyper-V's MSR, with the destination in the top byte.
        return bool(event.b >> 32 & _BELOW_XAPIC_DEST)
    return None


def reactions(batches: Iterable[Batch]) -> Counter[tuple[Task, Task]]:
    """(sender, target) -> how often the target's EOI answered an interrupt that only this sender can have delivered."""
    linked: Counter[tuple[Task, Task]] = Counter()
    waiting: dict[tuple[int, int], set[Task]] = defaultdict(set)
    for batch in batches:
        for task, event in zip(batch.tasks, batch.events, strict=True):
            if task is None:
                continue
            if event.kind == Kind.ACCEPT:
                waiting[event.a, event.b & R.ICR_VECTOR].add(task)
            elif event.kind == Kind.EOI and event.b >= 0:
                senders = waiting.pop((event.a, event.b), set())
                if len(senders) == 1:
                    linked[senders.pop(), task] += 1
    return linked
