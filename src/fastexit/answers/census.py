"""What each thread of a trace shows of itself, gathered in one pass: vCPUs that its lines name, and signs.

A sign is the first line of a kind that tells something of the host or the guest.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from enum import IntEnum, auto
from itertools import islice

import numpy as np
import numpy.typing as npt

from fastexit import hyperv as HV
from fastexit import regs as R
from fastexit.exits.table import SVM, VMX
from fastexit.records.columns import Event, Recording, Rows

Marks = npt.NDArray[np.bool_]
_Index = npt.NDArray[np.intp]

LINKED_ROWS = 1 << 18
"""In so many lines it is looked for who answers whose interrupts."""
_FEW_PAIRS = 1 << 20
_KVM_MSRS = range(0x4B56_4D00, 0x4B56_4E00)
_LINUX_TEXT = 0xFFFF_FFFF_8000_0000
_WINDOWS_BASE = 0xFFFFF8
_PAGE = R.APIC_DEFAULT_PHYS_BASE >> 12


class Sign(IntEnum):
    """What a line can tell."""

    VMX = 0
    SVM = auto()
    APICV_ACCEPT = auto()
    TRAPS = auto()
    """Exits behind accesses that APICv has done."""
    AVIC = auto()
    POSTED = auto()
    INJECTS = auto()
    """KVM injects an interrupt at an entry, which with APICv the CPU does."""
    EOI_EXITS = auto()
    ICR_EXITS = auto()
    """A fixed IPI to one vCPU exits, which IPI virtualization would not."""
    SPLIT = auto()
    FULL = auto()
    NO_CHIP = auto()
    NESTED = auto()
    TIMER_ON = auto()
    TIMER_OFF = auto()
    WINDOWS = auto()
    LINUX = auto()
    HYPERV = auto()
    KVM_PV = auto()
    PV_EOI = auto()
    X2APIC = auto()
    XAPIC = auto()
    INHIBITED = auto()
    """APICv is switched off."""


_OWN = (
    *(Event.EXIT, Event.ENTRY, Event.EOI, Event.PV_EOI, Event.HV_TIMER, Event.HALT_POLL, Event.PAGE_FAULT),
    *(Event.SMM, Event.AVIC),
)
"""Events that name the vCPU whose thread it is that prints them."""
_COUNTED = {Sign.VMX, Sign.SVM, Sign.WINDOWS, Sign.LINUX}
_FEW_THREADS = 1 << 12
_ONE = np.uint32(1)
_BY_VCPUS = (
    *(Event.EXIT, Event.ENTRY, Event.MSR, Event.APIC, Event.EOI, Event.PV_EOI, Event.INJ_VIRQ, Event.INJ_EXCEPTION),
    *(Event.PIO, Event.HYPERCALL, Event.HV_HYPERCALL, Event.HV_SEND_IPI, Event.NESTED_VMEXIT, Event.NESTED_ENTRY),
    *(Event.USERSPACE_EXIT, Event.WAKEUP, Event.HALT_POLL, Event.CPUID, Event.CR, Event.HV_TIMER, Event.MMIO),
)
"""Events that only a vCPU's thread causes."""
_VMX_NAMES = {name for row in VMX.values() for name in row.names().values()}
_SVM_NAMES = {name for row in SVM.values() for name in row.names().values()}
_NESTED_REASONS = {"VMRESUME", "VMLAUNCH", "vmrun", "EXIT_VMRUN"}
_TRAPS = {"APIC_WRITE", "EOI_INDUCED"}


def vendor_of(reason: str) -> str:
    """Whose exit reason this is, "vmx" or "svm", or "" where both have one of that name.

    Kernels before 3.x printed VMX's in small letters; perf and trace-cmd print SVM's with EXIT_ in front.

    >>> [vendor_of(reason) for reason in ("MSR_WRITE", "npf", "EXIT_NPF", "io_instruction", "hlt")]
    ['vmx', 'svm', 'svm', 'vmx', '']
    """
    word = reason.partition(" ")[0]
    if word.startswith("EXIT_") and not word.startswith("EXIT_REASON_"):
        return "svm"
    if word in _VMX_NAMES:
        return "vmx"
    small = word.upper() in _VMX_NAMES
    if reason in _SVM_NAMES or word in _SVM_NAMES:
        return "" if small else "svm"
    return "vmx" if small else ""


class _Block:
    """Some rows, sorted by event."""

    def __init__(self, rows: Rows) -> None:
        events = np.ascontiguousarray(rows["event"])
        self.rows: Rows = rows
        self.threads: npt.NDArray[np.int32] = np.ascontiguousarray(rows["thread"])
        self._order = np.argsort(events, kind="stable")
        self._ends = [0, *np.cumsum(np.bincount(events, minlength=256)).tolist()]

    def of(self, event: Event) -> _Index:
        """The rows of an event, by index, in order."""
        found: _Index = self._order[self._ends[event] : self._ends[event + 1]]
        return found


class Census:
    """One pass over a recording.

    Attributes:
        named: thread -> vCPUs that its own lines name, with how many lines.
        accepted: threads that print accept lines.
        vcpu_like: whether a thread does what only a vCPU's does.
        born: the first line of each thread, 0 for those without one.
        first: sign -> thread -> its first line, 0 where there is none; the last entry is for lines without a thread.
        count: as first, how many lines, for those signs of which the more frequent one is believed.
        inhibits: thread -> (line, number, set) of its APICv inhibits, the first ones.
    """

    def __init__(self, recording: Recording) -> None:
        n = len(recording.threads) + 1
        self.recording: Recording = recording
        self.named: defaultdict[int, Counter[int]] = defaultdict(Counter)
        self.accepted: set[int] = set()
        self.vcpu_like: Marks = np.zeros(n, bool)
        self.born: npt.NDArray[np.uint32] = np.zeros(n, np.uint32)
        self.first: npt.NDArray[np.uint32] = np.zeros((len(Sign), n), np.uint32)
        self.count: npt.NDArray[np.uint32] = np.zeros((len(Sign), n), np.uint32)
        self.inhibits: dict[int, list[tuple[int, str, bool]]] = {}
        names = [*recording.names, ""]
        self._by_reason: list[tuple[Sign, Marks]] = [
            (Sign.VMX, np.array([vendor_of(name) == "vmx" for name in names])),
            (Sign.SVM, np.array([vendor_of(name) == "svm" for name in names])),
            (Sign.TRAPS, np.array([name in _TRAPS for name in names])),
            (Sign.AVIC, np.array(["avic_" in name for name in names])),
            (Sign.NESTED, np.array([name in _NESTED_REASONS for name in names])),
            (Sign.TIMER_ON, np.array([name == "PREEMPTION_TIMER" for name in names])),
        ]
        self._split = np.array([name == "KVM_EXIT_IOAPIC_EOI" for name in names])
        self._no_chip = np.array([name in ("KVM_EXIT_IRQ_WINDOW_OPEN", "KVM_EXIT_SET_TPR") for name in names])
        for rows in recording.blocks:
            self._feed(rows)

    def _feed(self, rows: Rows) -> None:
        block = _Block(rows)
        threads = block.threads
        fresh = np.flatnonzero(self.born[threads] == 0)[::-1]
        self.born[threads[fresh]] = rows["line"][fresh]
        for event in _BY_VCPUS:
            self.vcpu_like[threads[block.of(event)]] = True
        self.vcpu_like[-1] = False
        for event in _OWN:
            if len(own := block.of(event)):
                self._vote(threads[own], rows["vcpu"][own])
        self.accepted.update(np.unique(threads[block.of(Event.ACCEPT)]).tolist())
        self._look(block)

    def _vote(self, threads: npt.NDArray[np.int32], vcpus: npt.NDArray[np.int16]) -> None:
        """Lines of these threads that name these vCPUs as their own."""
        pairs = threads.astype(np.int64) << 16 | vcpus
        pairs = pairs[(threads >= 0) & (vcpus >= 0)]
        if len(pairs) and int(pairs.max()) < _FEW_PAIRS:
            counts = np.bincount(pairs)
            found = np.flatnonzero(counts)
            counts = counts[found]
        else:
            found, counts = np.unique(pairs, return_counts=True)
        for pair, n in zip(found.tolist(), counts.tolist(), strict=True):
            self.named[pair >> 16][pair & 0xFFFF] += n

    def _look(self, block: _Block) -> None:
        """The signs among some rows."""
        see, rows = self._see, block.rows
        if len(exits := block.of(Event.EXIT)):
            name = rows["name"][exits]
            for sign, names in self._by_reason:
                see(sign, block, exits[names[name]])
        for event in (Event.EXIT, Event.ENTRY):
            if len(moves := block.of(event)):
                rip = rows["a"][moves]
                see(Sign.WINDOWS, block, moves[rip >> 40 == _WINDOWS_BASE])
                see(Sign.LINUX, block, moves[rip >= _LINUX_TEXT])
        if len(msrs := block.of(Event.MSR)):
            self._look_at_msrs(block, msrs)
        for event, sign in _SIMPLE:
            see(sign, block, block.of(event))
        if len(mmio := block.of(Event.MMIO)):
            page = mmio[rows["a"][mmio] >> 12 == _PAGE]
            see(Sign.XAPIC, block, page)
            see(Sign.EOI_EXITS, block, page[(rows["c"][page] == 1) & (rows["a"][page] & 0xFFF == R.APIC_EOI)])
        if len(left := block.of(Event.USERSPACE_EXIT)):
            name = rows["name"][left]
            see(Sign.SPLIT, block, left[self._split[name]])
            see(Sign.NO_CHIP, block, left[self._no_chip[name]])
        if len(apic := block.of(Event.APIC)):
            version = apic[(rows["c"][apic] == 0) & (rows["a"][apic] == R.APIC_LVR)]
            see(Sign.SPLIT, block, version[rows["b"][version] & R.LVR_DIRECTED_EOI != 0])
        if len(timers := block.of(Event.HV_TIMER)):
            used = rows["a"][timers] == 1
            see(Sign.TIMER_ON, block, timers[used])
            see(Sign.TIMER_OFF, block, timers[~used])
        if len(posted := block.of(Event.PI_IRTE)):
            see(Sign.POSTED, block, posted[rows["c"][posted] == 1])
        if len(inhibits := block.of(Event.APICV_INHIBIT)):
            see(Sign.INHIBITED, block, inhibits[rows["a"][inhibits] == 1])
            self._inhibit(rows[inhibits])

    def _look_at_msrs(self, block: _Block, msrs: _Index) -> None:
        see, rows = self._see, block.rows
        msr, value = rows["a"][msrs], rows["b"][msrs]
        write, sound = rows["c"][msrs] == 1, rows["d"][msrs] == 0
        x2apic = (msr >= R.MSR_X2APIC_BASE) & (msr <= R.MSR_X2APIC_END)
        see(Sign.X2APIC, block, msrs[x2apic & sound])
        see(Sign.EOI_EXITS, block, msrs[write & (msr == R.MSR_X2APIC_EOI)])
        simple = value & (R.ICR_SHORTHAND | R.ICR_DM | R.ICR_LOGICAL) == 0
        see(Sign.ICR_EXITS, block, msrs[write & simple & (msr == R.MSR_X2APIC_ICR)])
        see(Sign.HYPERV, block, msrs[sound & (msr >= HV.MSR_HV_FIRST) & (msr <= HV.MSR_HV_LAST)])
        see(Sign.KVM_PV, block, msrs[sound & (msr >= _KVM_MSRS.start) & (msr < _KVM_MSRS.stop)])

    def _see(self, sign: Sign, block: _Block, which: _Index) -> None:
        if not len(which):
            return
        threads = block.threads[which]
        first, lines = self.first[sign], block.rows["line"][which]
        new = np.flatnonzero(first[threads] - _ONE > lines - _ONE)[::-1]  # 0, which is none, is above all
        if len(new):
            first[threads[new]] = lines[new]
        if sign in _COUNTED:
            n = len(first)
            if n > _FEW_THREADS:
                np.add.at(self.count[sign], threads, 1)
            else:
                self.count[sign] += np.bincount(threads % n, minlength=n).astype(np.uint32)

    def _inhibit(self, rows: Rows) -> None:
        for row in islice(rows, 256):
            thread = int(row["thread"])
            found = self.inhibits.setdefault(thread if thread >= 0 else len(self.born) - 1, [])
            if len(found) < 64:
                name = self.recording.names[row["name"]] if row["name"] >= 0 else ""
                found.append((int(row["line"]), name, bool(row["a"])))

    def answers(self) -> Counter[tuple[int, int]]:
        """(sender, target), two threads -> how often the target's EOI answered an interrupt that only this sender can
        have delivered.
        """
        linked: Counter[tuple[int, int]] = Counter()
        waiting: dict[tuple[int, int], set[int]] = defaultdict(set)
        left = LINKED_ROWS
        for rows in self.recording.blocks:
            some = rows[np.isin(rows["event"], (Event.ACCEPT, Event.EOI)) & (rows["thread"] >= 0)][:left]
            left -= len(some)
            columns = (some[name].tolist() for name in ("event", "thread", "a", "b"))
            for event, thread, apic_id, vector in zip(*columns, strict=True):
                if event == Event.ACCEPT:
                    waiting[apic_id, vector].add(thread)
                else:
                    senders = waiting.pop((apic_id, vector), set())
                    if len(senders) == 1:
                        linked[senders.pop(), thread] += 1
            if left <= 0:
                break
        return linked


_SIMPLE = (
    (Event.APICV_ACCEPT, Sign.APICV_ACCEPT),
    (Event.AVIC, Sign.AVIC),
    (Event.AVIC, Sign.SVM),
    (Event.INJ_VIRQ, Sign.INJECTS),
    (Event.IOAPIC_SET_IRQ, Sign.FULL),
    (Event.PIC_SET_IRQ, Sign.FULL),
    (Event.ACK_IRQ, Sign.FULL),
    (Event.NESTED_VMEXIT, Sign.NESTED),
    (Event.NESTED_ENTRY, Sign.NESTED),
    (Event.HV_HYPERCALL, Sign.HYPERV),
    (Event.HV_SEND_IPI, Sign.HYPERV),
    (Event.HV, Sign.HYPERV),
    (Event.PV_EOI, Sign.PV_EOI),
)
"""Events that are signs whatever they say."""
