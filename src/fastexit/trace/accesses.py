"""From lines to accesses: which lines of a thread are one register access, in the order in which accesses act.

KVM prints several lines for one access, other threads' lines come in between, and the order differs: an x2APIC write
ends with its kvm_msr line, an MMIO write begins with its kvm_mmio line, and accept lines stand behind kvm_apic_ipi in
the generic path, before it in the fast path of 6.18. A write acts at its first line, an IPI at its first accept line:
the target may be served before the sender's last line is printed, but not before it has accepted, and a sender may lose
its CPU in between. So while an access is open, everything later waits for it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from enum import IntEnum
from typing import Any, Protocol

from fastexit import hyperv as HV
from fastexit import regs as R
from fastexit.trace.arrivals import Arrival, Arriving
from fastexit.trace.doors import REGISTER_OF_SYNTHETIC, Doing, Door, door_of_exit
from fastexit.trace.events import IOAPIC, PIT, STIMER, Event, Kind, expiration
from fastexit.trace.reader import Batch, Task

WINDOW = 1 << 14
"""What may wait for an open write; when that many wait, it is taken as complete."""

_EOI_REG, _ICR, _SELF_IPI = R.APIC_EOI, R.APIC_ICR, R.APIC_SELF_IPI
_EOI_MSR, _MSR_BASE = R.MSR_X2APIC_EOI, R.MSR_X2APIC_BASE
_PAGE = R.APIC_DEFAULT_PHYS_BASE >> 12
_IOAPIC_PAGE = R.IOAPIC_DEFAULT_BASE >> 12
_EOI_GPA = R.APIC_DEFAULT_PHYS_BASE + _EOI_REG
_SENDERS = (_ICR, _SELF_IPI)
_INIT = R.DM_INIT << R.ICR_DM_SHIFT
_LOWEST = R.DM_LOWEST << R.ICR_DM_SHIFT
HYPERCALL = -1
"""Stands for the register where an IPI is no register write but a hypercall."""

(
    _VCPU,
    _HV_TIMER,
    _HYPERV,
    _SOURCE,
    _ACCEPT,
    _RAISED,
    _LINE,
    _PIN,
    _PIC,
    _MARK,
    _IPI,
    _WRITE,
    _READ,
    _EOI,
    _MSR,
    _RDMSR,
    _MMIO,
    _RDMMIO,
    _INJECT,
    _DEADLINE,
    _EXIT,
    _PV_EOI,
    _HV_MSR,
    _HV_CALL,
    _HV_SEND,
    _HV_DONE,
    _CR8,
) = (int(kind) for kind in Kind if kind != Kind.OTHER)


class Via(IntEnum):
    """How an access reached the register."""

    NONE = 0
    """No kvm_msr and no kvm_mmio line: the host did it, or hardware with a trap afterwards."""
    MSR = 1
    MMIO = 2
    SYNTHETIC = 3
    """kvm_msr, of one of Hyper-V's."""


class Access:
    """A register write or an IPI hypercall, in the making or complete.

    Attributes:
        line: number of its first line.
        via: Via. reg, value, length: page offset, what was written, bytes of an MMIO write.
        ipi, ipi_line: its kvm_apic_ipi line, or kvm_hv_send_ipi of a hypercall.
        call, result: of a hypercall, its kvm_hv_hypercall and kvm_hv_hypercall_done lines.
        door: what the kvm_exit line before it says, where that tells the door.
        accepts: its kvm_apic_accept_irq lines as (line, event).
        fault: the line says #GP.
        traced: its kvm_apic line was seen.
        cut: the file ended in the middle of it.
        entry: its last one among the calls that wait.
        later: those of its accept lines before which others went on, so that `Sink.reached` has them.
    """

    __slots__ = tuple(
        "line reg value via length ipi ipi_line call result door accepts fault traced cut done entry later".split()
    )

    def __init__(self, line: int, reg: int, door: Door | None, value: int = 0, via: int = 0, length: int = 4) -> None:
        self.line = line
        self.reg = reg
        self.value = value
        self.via = via
        self.length = length
        self.ipi: Event | None = None
        self.ipi_line = 0
        self.call: Event | None = None
        self.result: Event | None = None
        self.door = door
        self.accepts: list[tuple[int, Event]] = []
        self.fault = False
        self.traced = False
        self.cut = False
        self.done = False
        self.entry: list[Any] = []
        self.later: list[Event] = []


class Sink(Protocol):
    """What takes the accesses of one vCPU, or of a thread that is none."""

    def write(self, access: Access) -> None:
        """A register write other than EOI."""

    def read(self, line: int, reg: int, value: int) -> None:
        """A register read."""

    def eoi(self, line: int, vector: int, induced: bool) -> None:
        """A kvm_eoi line. ``induced``: the CPU had ended the interrupt before."""

    def silent_eoi(self) -> None:
        """An EOI write in a trace that has no kvm_eoi lines."""

    def accept(self, line: int, event: Event, source: str) -> None:
        """An accept line of no IPI."""

    def inject(self, line: int, since: int, vector: int) -> None:
        """kvm_inj_virq. ``since`` is the thread's line before: KVM took the vector out of IRR between the two."""

    def apicbase(self, line: int, value: int, fault: bool) -> None:
        """A write of APICBASE."""

    def deadline(self) -> None:
        """A write of the TSC deadline."""

    def call(self, access: Access) -> None:
        """An IPI hypercall."""

    def synthetic(self, line: int, msr: int, value: int, fault: bool) -> None:
        """A write of a synthetic MSR that is no APIC register."""

    def hyperv(self, line: int, event: Event) -> None:
        """A line of the SynIC or of a synthetic timer that the vCPU's EOI or MSR write prints."""

    def raised(self, vector: int, source: str, since: int) -> None:
        """Who raised the interrupts of a vector whose accept lines stand behind line ``since``."""

    def pic(self, pin: int) -> None:
        """A pin of the PIC pair, 0 to 15, that is not masked has changed."""

    def count(self, doing: Doing, door: Door) -> None:
        """One access, of which nothing but its door matters."""

    def ran(self) -> None:
        """The first line after an INIT reached this vCPU."""

    def reached(self, *events: Event) -> None:
        """Further accept lines of an IPI, before which others have gone on."""


class Lane:
    """One thread: where its accesses go, and what of it is open.

    ``vcpu`` is its vCPU id or -1, ``mates`` the lanes of its VM by vCPU id. ``traced_eois`` counts EOI writes,
    ``guest_eois`` those of them that the guest made; ``door`` is what its last kvm_exit line tells. ``arriving`` has
    the first and the last accept line of each vector for this vCPU that was not injected since, ``sent`` those that
    this thread printed and no other line since; ``last`` is its last line. ``source`` raises what the thread delivers
    next, with ``vector`` or any (-1). ``on_line``: it is between kvm_set_irq of source id ``driven`` and what that ends
    with. Of accept lines up to ``told`` nothing that comes tells whose they are.
    """

    __slots__ = tuple(
        "arriving door driven guest_eois last loose mates on_line open reset sent sink source told traced_eois vcpu "
        "vector".split()
    )

    def __init__(self, sink: Sink, vcpu: int, mates: dict[int, Lane]) -> None:
        self.sink: Sink = sink
        self.vcpu: int = vcpu
        self.mates: dict[int, Lane] = mates
        self.open: Access | None = None
        self.loose: list[list[Any]] = []
        self.source: str = ""
        self.vector: int = -1
        self.driven: int = -1
        self.on_line: bool = False
        self.told: int = 0
        self.door: Door | None = None
        self.reset: bool = False
        self.arriving: Arriving = {}
        self.last: int = 0
        self.sent: list[Arrival] = []
        self.traced_eois: int = 0
        self.guest_eois: int = 0


def _belongs(ipi: Event, accept: Event) -> bool:
    """An IPI is accepted with its own vector, mode and trigger; lowest priority to 0xFF turns into Fixed."""
    if (ipi.b ^ accept.b) & (R.ICR_VECTOR | R.ICR_TRIGGER):
        return False
    mode = accept.b & R.ICR_DM
    return ipi.b & R.ICR_DM == mode or (not mode and ipi.b & R.ICR_DM == _LOWEST)


class Assembler:
    """Turns lines into calls of sinks. ``lanes`` finds a thread's lane; ``eois``: the trace has kvm_eoi lines.

    ``strays`` counts the accept lines, ``stray_deadlines`` the TSC_DEADLINE writes of threads that have no lane.
    """

    def __init__(self, lanes: dict[Task, Lane], *, eois: bool) -> None:
        self._lanes = lanes
        self._eois = eois
        self._held: deque[list[Any]] = deque()
        self.strays: int = 0
        self.stray_deadlines: int = 0
        self.timers: Callable[..., None] | None = None
        """Takes lines of synthetic timers from threads that have no lane: an hrtimer fires on any, the idle one too."""

    def feed(self, batch: Batch) -> None:
        """A batch of lines."""
        lane_of = self._lanes.get
        held = self._held
        line = batch.first - 1
        for task, event in zip(batch.tasks, batch.events, strict=True):
            line += 1
            kind = event.kind
            if kind < _HYPERV:
                continue
            lane = lane_of(task)  # type: ignore[arg-type]
            if lane is None:
                self.strays += kind == _ACCEPT
                self.stray_deadlines += kind == _DEADLINE
                if kind == _HYPERV and event.text and self.timers is not None:
                    self._call(self.timers, line, event)
                continue
            if lane.sent:
                for arrival in lane.sent:
                    arrival.by = line
                lane.sent = []
            if lane.reset:
                lane.reset = False
                self._call(lane.sink.ran)
            if kind < _MARK:
                self._beside(lane, line, event)
                continue
            before, lane.last = lane.last, line
            if kind == _EXIT:
                lane.door = door_of_exit(event.text)
            if lane.loose or lane.source or lane.on_line:
                self._settle(lane, event)
            if lane.open is not None and self._continues(lane, line, event):
                continue
            if kind == _EOI:
                induced = lane.door is Door.INDUCED
                if induced:
                    lane.sink.count(Doing.EOI, Door.INDUCED)
                if held:
                    held.append([lane.sink.eoi, line, event.b, induced])
                else:
                    lane.sink.eoi(line, event.b, induced)
            elif kind == _WRITE:
                if event.a == _EOI_REG:
                    lane.traced_eois += 1
                    if lane.door is not None:
                        self._trapped_eoi(lane)
                else:
                    access = Access(line, event.a, lane.door, event.b)
                    access.traced = True
                    self._begin(lane, access, lane.sink.write)
            elif kind == _MSR:
                if event.a == _EOI_MSR and not event.c:
                    self._guest_eoi(lane, Door.X2APIC)
                else:
                    self._msr_write(lane, line, event)
            elif kind == _MMIO:
                if event.a == _EOI_GPA:
                    self._guest_eoi(lane, Door.PAGE)
                    lane.door = None  # its kvm_apic line is no second one
                elif event.a >> 12 == _PAGE:
                    access = Access(line, event.a & 0xFFF, None, event.b, int(Via.MMIO), event.c)
                    self._begin(lane, access, lane.sink.write)
                elif event.a >> 12 == _IOAPIC_PAGE:
                    lane.source, lane.vector = IOAPIC, -1  # a pin that waited is served
            elif kind == _READ:
                self._call(lane.sink.read, line, event.a, event.b)
            elif kind == _IPI:
                access = Access(line, _ICR, lane.door)
                access.ipi, access.ipi_line = event, line
                self._begin(lane, access, lane.sink.write)
            elif kind == _DEADLINE:
                lane.sink.deadline()
            elif kind == _INJECT and not event.c:
                self._call(lane.sink.inject, line, before, event.b)
            elif kind >= _PV_EOI:
                self._of_hyperv(lane, line, event)

    def finish(self) -> None:
        """The file has ended; what is still open is handed over as cut."""
        for lane in self._lanes.values():
            self._let_go(lane)
            if lane.open is not None:
                lane.open.cut = True
                self._close(lane)

    # ------------------------------------------------------------------------------------------------------- the order

    def _call(self, function: Callable[..., None], *args: Any) -> None:
        """Now, or behind the open write that everything waits for."""
        if self._held:
            self._held.append([function, *args])
        else:
            function(*args)

    def _flush(self) -> None:
        """Makes the calls that wait for nothing any more: an entry waits that has no function yet or an open access."""
        held = self._held
        while held:
            entry = held[0]
            if entry[0] is None or (len(entry) == 2 and isinstance(entry[1], Access) and not entry[1].done):
                if len(held) <= WINDOW:
                    return
                self._give_up(entry)
            held.popleft()
            entry[0](*entry[1:])

    def _give_up(self, entry: list[Any]) -> None:
        """Too much waits for this one: it is taken as it stands."""
        for lane in self._lanes.values():
            if len(entry) == 2 and lane.open is entry[1]:
                lane.open.done = True
                lane.open = None
            elif any(waiting is entry for waiting in lane.loose):
                entry[0] = lane.sink.accept
                lane.loose = [waiting for waiting in lane.loose if waiting is not entry]

    # ------------------------------------------------------------------------------------------------------ one thread

    def _close(self, lane: Lane) -> None:
        """The open access is complete."""
        access = lane.open
        assert access is not None
        lane.open = None
        access.done = True
        self._flush()

    def _continues(self, lane: Lane, line: int, event: Event) -> bool:
        """Whether the event is part of the open access; if not, that one is closed."""
        access = lane.open
        assert access is not None
        kind = event.kind
        if access.reg == HYPERCALL:
            return self._continues_call(lane, line, event)
        if kind == _WRITE and access.reg == event.a and not access.traced:
            access.traced = True
            if not access.via:
                access.value = event.b
            elif access.reg not in _SENDERS:
                self._close(lane)
            return True
        if kind == _WRITE and event.a == _ICR and access.reg == _SELF_IPI and access.ipi is None:
            return True  # up to 5.16 SELF_IPI is written as an ICR write
        if kind == _IPI and access.ipi is None and access.reg in _SENDERS:
            access.ipi, access.ipi_line = event, line
            return True
        if kind == _MSR and event.a == R.MSR_X2APIC_SELF_IPI and access.ipi is not None and not access.traced:
            access.reg = _SELF_IPI  # kvm_apic lines were not recorded, so the IPI came first
        if kind == _MSR and not access.via and event.a == _MSR_BASE + (access.reg >> 4):
            access.via, access.value, access.fault = int(Via.MSR), event.b, bool(event.c)
            self._close(lane)
            return True
        if kind == _HV_MSR and not access.via and REGISTER_OF_SYNTHETIC.get(event.a) == access.reg:
            access.via, access.value, access.fault = int(Via.SYNTHETIC), event.b, bool(event.c)
            access.door = Door.SYNTHETIC
            self._close(lane)
            return True
        self._close(lane)
        return False

    def _continues_call(self, lane: Lane, line: int, event: Event) -> bool:
        """The same of a hypercall, which its accept lines follow until kvm_hv_hypercall_done."""
        access = lane.open
        assert access is not None
        if event.kind == _HV_SEND and access.ipi is None:
            access.ipi, access.ipi_line = event, line
            return True
        if event.kind == _HV_DONE:
            access.result = event
        self._close(lane)
        return event.kind == _HV_DONE

    def _of_hyperv(self, lane: Lane, line: int, event: Event) -> None:
        """What mostly Windows does: synthetic MSRs, IPI hypercalls, EOI without an exit, CR8."""
        kind = event.kind
        if kind == _HV_MSR:
            self._synthetic(lane, line, event)
        elif kind == _HV_CALL or kind == _HV_SEND:
            access = Access(line, HYPERCALL, Door.HYPERCALL)
            if kind == _HV_CALL:
                access.call = event
            else:
                access.ipi, access.ipi_line = event, line
            self._begin(lane, access, lane.sink.call)
        elif kind == _PV_EOI:
            lane.sink.count(Doing.EOI, Door.ASSIST)
            if not self._eois:
                self._call(lane.sink.silent_eoi)
        elif kind == _CR8:
            lane.sink.count(Doing.TPR, Door.CR8)

    def _synthetic(self, lane: Lane, line: int, event: Event) -> None:
        """A kvm_msr line of a synthetic MSR that ends no access that is open."""
        if event.a not in REGISTER_OF_SYNTHETIC:
            self._call(lane.sink.synthetic, line, event.a, event.b, bool(event.c))
        elif event.a == HV.MSR_HV_EOI and not event.c:
            self._guest_eoi(lane, Door.SYNTHETIC)
        else:
            access = Access(line, REGISTER_OF_SYNTHETIC[event.a], Door.SYNTHETIC, event.b, int(Via.SYNTHETIC))
            access.fault = bool(event.c)
            access.done = True
            self._call(lane.sink.write, access)

    def _trapped_eoi(self, lane: Lane) -> None:
        """An EOI that the exit's reason shows, and no line behind it."""
        if lane.door is Door.AVIC or lane.door is Door.PAGE:
            self._guest_eoi(lane, lane.door)

    def _guest_eoi(self, lane: Lane, door: Door) -> None:
        lane.guest_eois += 1
        lane.sink.count(Doing.EOI, door)
        if not self._eois:
            self._call(lane.sink.silent_eoi)

    def _msr_write(self, lane: Lane, line: int, event: Event) -> None:
        """A kvm_msr line with nothing before it: APICBASE, a write that faulted, an access begun before the file."""
        if event.a == R.MSR_APICBASE:
            self._call(lane.sink.apicbase, line, event.b, bool(event.c))
            return
        access = Access(line, (event.a - _MSR_BASE) << 4, None, event.b, int(Via.MSR))
        access.fault = bool(event.c)
        access.done = True
        self._call(lane.sink.write, access)

    def _beside(self, lane: Lane, line: int, event: Event) -> None:
        """An accept line, one that says where accept lines come from, one of Hyper-V's: none ends an access."""
        kind = event.kind
        if kind == _SOURCE:
            lane.source, lane.vector = (PIT if lane.on_line and lane.driven == R.SOURCE_PIT else event.text), event.b
            return
        if kind == _LINE:
            if event.b:  # a line that goes down delivers nothing
                lane.source, lane.driven, lane.on_line, lane.told = "", event.c, True, line
            return
        if kind == _RAISED or kind == _PIN:
            self._raised(lane, line, event)
            if event.text == STIMER:
                self._call(lane.sink.hyperv, line, expiration(event))
            return
        if kind == _PIC:
            self._call(lane.sink.pic, event.a)
            return
        if kind == _HYPERV:
            if event.text:
                self._call(lane.sink.hyperv, line, event)
            return
        target = lane.mates.get(event.a)
        if target is not None:
            arrival = Arrival(line)
            lane.sent.append(arrival)
            vector = event.b & R.ICR_VECTOR
            waiting = target.arriving.get(vector)
            target.arriving[vector] = (waiting[0] if waiting else arrival), arrival
            if event.b & R.ICR_DM == _INIT:
                target.reset = True
        access, source = lane.open, lane.source
        if lane.vector >= 0 and lane.vector != event.b & R.ICR_VECTOR:
            source = ""
        if (
            access is not None
            and not lane.on_line
            and (access.reg == HYPERCALL or (access.ipi is not None and _belongs(access.ipi, event)))
        ):
            self._accepted(lane, access, line, event)
        elif lane.vcpu < 0 or source:
            self._call(lane.sink.accept, line, event, source)
        else:
            # In the fast path of 6.18 the IPI comes after what it caused: the thread's next line tells.
            entry = [None, line, event, ""]
            lane.loose.append(entry)
            self._held.append(entry)

    def _begin(self, lane: Lane, access: Access, function: Callable[[Access], None]) -> None:
        """An access is open, and acts here."""
        lane.open = access
        access.entry = [function, access]
        self._held.append(access.entry)

    def _accepted(self, lane: Lane, access: Access, line: int, event: Event) -> None:
        """An accept line of an open access; where others have gone on since its last line, it acts here."""
        if self._held[-1] is not access.entry:
            if access.accepts:
                access.entry = [lane.sink.reached, event]
                access.later.append(event)
            else:
                before, access.entry = access.entry, access.entry[:]
                before[:] = [_nothing]
            self._held.append(access.entry)
        elif access.later:
            access.later.append(event)
            access.entry.append(event)
        access.accepts.append((line, event))

    def _raised(self, lane: Lane, line: int, event: Event) -> None:
        """Who raised the interrupts whose accept lines came before; a timer's message goes through the SynIC."""
        source = PIT if lane.on_line and lane.driven == R.SOURCE_PIT else event.text
        since, lane.told, lane.on_line = lane.told, line, False
        if lane.vcpu < 0:
            self._call(lane.sink.raised, event.b, source, since)
        for entry in reversed(lane.loose):
            if event.text == STIMER:
                entry[3] = STIMER
                return
            if entry[1] > since and not entry[3] and entry[2].b & R.ICR_VECTOR == event.b:
                entry[3] = source

    def _let_go(self, lane: Lane) -> None:
        """Accept lines that turned out to belong to no IPI."""
        for entry in lane.loose:
            entry[0] = lane.sink.accept
        lane.loose = []
        self._flush()

    def _settle(self, lane: Lane, event: Event) -> None:
        """The line after accept lines: the IPI that they belong to, or not."""
        mine = [e for e in lane.loose if event.kind == _IPI and not e[3] and _belongs(event, e[2])]
        if mine:
            if lane.open is not None:
                self._close(lane)
            lane.open = access = Access(mine[0][1], _ICR, lane.door)
            access.accepts = [(entry[1], entry[2]) for entry in mine]
            lane.loose = [entry for entry in lane.loose if entry[3] or not _belongs(event, entry[2])]
            for entry in mine[1:]:
                if access.later or entry[1] - mine[0][1] >= len(mine):
                    access.later.append(entry[2])
                    entry[:] = [lane.sink.reached, entry[2]]
                else:
                    entry[:] = [_nothing]
            mine[0][:] = [lane.sink.write, access]
            access.entry = mine[-1]
        self._let_go(lane)
        lane.source, lane.on_line = "", False


def _nothing() -> None:
    """Stands where an accept line was that went to its IPI."""
