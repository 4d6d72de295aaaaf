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

LINKED_ROWS = 1 << 18
"""In so many lines it is looked for who answers whose interrupts."""
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


class Census:
    """One pass over a recording.

    Attributes:
        named: thread -> vCPUs that its own lines name, with how many lines.
        accepted: threads that print accept lines.
        vcpu_like: whether a thread does what only a vCPU's does.
        born: the first line of each thread, 0 for those without one.
        first: sign -> thread -> its first line, 0 where there is none; the last entry is for lines without a thread.
        count: as first, how many lines.
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
        self._vmx = np.array([vendor_of(name) == "vmx" for name in names])
        self._svm = np.array([vendor_of(name) == "svm" for name in names])
        self._traps = np.array([name in _TRAPS for name in names])
        self._avic = np.array(["avic_" in name for name in names])
        self._nested = np.array([name in _NESTED_REASONS for name in names])
        self._timer = np.array([name == "PREEMPTION_TIMER" for name in names])
        self._split = np.array([name == "KVM_EXIT_IOAPIC_EOI" for name in names])
        self._no_chip = np.array([name in ("KVM_EXIT_IRQ_WINDOW_OPEN", "KVM_EXIT_SET_TPR") for name in names])
        self._own = np.zeros(256, bool)
        self._own[list(_OWN)] = True
        self._by_vcpus = np.zeros(256, bool)
        self._by_vcpus[list(_BY_VCPUS)] = True
        for rows in recording.blocks:
            self._feed(rows)

    def _feed(self, rows: Rows) -> None:
        events, threads = rows["event"], rows["thread"]
        fresh = self.born[threads] == 0
        if fresh.any():
            self.born[threads[fresh][::-1]] = rows["line"][fresh][::-1]
        self.vcpu_like[threads[self._by_vcpus[events]]] = True
        self.vcpu_like[-1] = False
        own = self._own[events] & (rows["vcpu"] >= 0) & (threads >= 0)
        pairs = threads[own].astype(np.int64) << 16 | rows["vcpu"][own]
        for pair, n in zip(*(found.tolist() for found in np.unique(pairs, return_counts=True)), strict=True):
            self.named[pair >> 16][pair & 0xFFFF] += n
        self.accepted.update(np.unique(threads[events == Event.ACCEPT]).tolist())
        self._look(rows, {event: events == event for event in np.unique(events).tolist()})

    def _look(self, rows: Rows, of: dict[int, Marks]) -> None:
        """The signs among some rows; ``of`` has those of each event that is there."""
        none = np.zeros(len(rows), bool)

        def having(event: Event) -> Marks:
            return of.get(int(event), none)

        see = self._see
        name = rows["name"]
        if (exits := having(Event.EXIT)).any():
            see(Sign.VMX, rows, exits & self._vmx[name])
            see(Sign.SVM, rows, exits & self._svm[name])
            see(Sign.TRAPS, rows, exits & self._traps[name])
            see(Sign.AVIC, rows, exits & self._avic[name])
            see(Sign.NESTED, rows, exits & self._nested[name])
            see(Sign.TIMER_ON, rows, exits & self._timer[name])
        if (moves := exits | having(Event.ENTRY)).any():
            see(Sign.WINDOWS, rows, moves & (rows["a"] >> 40 == _WINDOWS_BASE))
            see(Sign.LINUX, rows, moves & (rows["a"] >= _LINUX_TEXT))
        if (msrs := having(Event.MSR)).any():
            msr, write, sound = rows["a"], rows["c"] == 1, rows["d"] == 0
            x2apic = (msr >= R.MSR_X2APIC_BASE) & (msr <= R.MSR_X2APIC_END)
            see(Sign.X2APIC, rows, msrs & x2apic & sound)
            see(Sign.EOI_EXITS, rows, msrs & write & (msr == R.MSR_X2APIC_EOI))
            simple = rows["b"] & (R.ICR_SHORTHAND | R.ICR_DM | R.ICR_LOGICAL) == 0
            see(Sign.ICR_EXITS, rows, msrs & write & simple & (msr == R.MSR_X2APIC_ICR))
            see(Sign.HYPERV, rows, msrs & sound & (msr >= HV.MSR_HV_FIRST) & (msr <= HV.MSR_HV_LAST))
            see(Sign.KVM_PV, rows, msrs & sound & (msr >= _KVM_MSRS.start) & (msr < _KVM_MSRS.stop))
        for event, sign in _SIMPLE:
            if (some := having(event)).any():
                see(sign, rows, some)
        if (avic := having(Event.AVIC)).any():
            see(Sign.SVM, rows, avic)
        if (mmio := having(Event.MMIO)).any():
            page = mmio & (rows["a"] >> 12 == _PAGE)
            see(Sign.XAPIC, rows, page)
            see(Sign.EOI_EXITS, rows, page & (rows["c"] == 1) & (rows["a"] & 0xFFF == R.APIC_EOI))
        if (left := having(Event.USERSPACE_EXIT)).any():
            see(Sign.SPLIT, rows, left & self._split[name])
            see(Sign.NO_CHIP, rows, left & self._no_chip[name])
        if (apic := having(Event.APIC)).any():
            version = apic & (rows["c"] == 0) & (rows["a"] == R.APIC_LVR)
            see(Sign.SPLIT, rows, version & (rows["b"] & R.LVR_DIRECTED_EOI != 0))
        if (timers := having(Event.HV_TIMER)).any():
            see(Sign.TIMER_ON, rows, timers & (rows["a"] == 1))
            see(Sign.TIMER_OFF, rows, timers & (rows["a"] == 0))
        if (posted := having(Event.PI_IRTE)).any():
            see(Sign.POSTED, rows, posted & (rows["c"] == 1))
        if (inhibits := having(Event.APICV_INHIBIT)).any():
            see(Sign.INHIBITED, rows, inhibits & (rows["a"] == 1))
            self._inhibit(rows[inhibits])

    def _see(self, sign: Sign, rows: Rows, which: Marks) -> None:
        threads = rows["thread"][which]
        if not len(threads):
            return
        first = self.first[sign]
        new = first[threads] == 0
        if new.any():
            first[threads[new][::-1]] = rows["line"][which][new][::-1]
        np.add.at(self.count[sign], threads, 1)

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
