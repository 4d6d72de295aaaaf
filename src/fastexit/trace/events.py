"""The kvm tracepoints that matter for a local APIC, from text to numbers.

`parse` turns the text behind the time stamp into an Event. Events are shared: the same text, and everything that
differs only where nobody looks (RIPs, deadlines), gives the same object, so that millions of lines cost a handful of
objects and can be told apart by identity.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from enum import IntEnum

from fastexit import hyperv as HV
from fastexit import regs as R


class Kind(IntEnum):
    """What an event means here. Everything from MARK up ends what its thread was doing."""

    OTHER = 0
    """Nothing to do with the APIC, or not readable."""
    VCPU = 1
    """Says which vCPU a thread is, nothing else; ``a`` is the vCPU id."""
    HV_TIMER = 2
    """kvm_hv_timer_state: ``a`` is the vCPU id, ``b`` 1 when the VMX preemption timer serves the vCPU's timer."""
    HYPERV = 3
    """Any other line of KVM's Hyper-V side; ``text`` is what it says, where a vCPU's own action prints it."""
    SOURCE = 4
    """Names who raises the interrupts that the thread delivers next: ``text`` is MSI, a hypercall, or IOAPIC where an
    EOI lets it deliver again; ``b`` their vector, -1 where the line does not say it."""
    ACCEPT = 5
    """``a`` vCPU id, ``b`` vector, delivery and trigger mode in their ICR bits."""
    RAISED = 6
    """Names who raised the interrupt of the accept line before it: ``text`` is SynIC or a Hyper-V timer."""
    LINE = 7
    """kvm_set_irq, before what comes of it: ``a`` GSI, ``b`` level, ``c`` who drives the line."""
    PIN = 8
    """kvm_ioapic_set_irq, behind what came of it: ``b`` vector."""
    PIC = 9
    """kvm_pic_set_irq of a pin that is not masked: ``a`` pin, 0 to 15."""
    MARK = 10
    """``a`` vCPU id or -1."""
    IPI = 11
    """``a`` destination, ``b`` low 32 ICR bits, as far as the line shows them."""
    APIC_WRITE = 12
    """``a`` register offset, ``b`` value."""
    APIC_READ = 13
    EOI = 14
    """``a`` vCPU id, ``b`` vector or -1."""
    MSR_WRITE = 15
    """An x2APIC MSR or APICBASE: ``a`` MSR, ``b`` value, ``c`` 1 for #GP."""
    MSR_READ = 16
    MMIO_WRITE = 17
    """``a`` guest physical address, ``b`` value, ``c`` length."""
    MMIO_READ = 18
    INJECT = 19
    """kvm_inj_virq: ``b`` vector, ``c`` 1 when it is no new interrupt."""
    DEADLINE = 20
    """A write of the TSC deadline MSR."""
    EXIT = 21
    """kvm_exit: ``a`` vCPU id or -1, ``text`` the reason, ``c`` 1 where the first such line has a RIP of Windows's."""
    PV_EOI = 22
    """kvm_pv_eoi: the guest ended an interrupt without an exit. ``a`` vCPU id, ``b`` vector."""
    HV_MSR = 23
    """A write of one of Hyper-V's synthetic MSRs: ``a`` MSR, ``b`` value, ``c`` 1 for #GP."""
    HV_CALL = 24
    """An IPI hypercall begins: ``a`` call code, ``b`` input, ``c`` output, ``text`` fast or slow."""
    HV_SEND = 25
    """kvm_hv_send_ipi, kvm_hv_send_ipi_ex: ``a`` format or -1, ``b`` processor or bank mask, ``c`` vector."""
    HV_DONE = 26
    """kvm_hv_hypercall_done: ``b`` result."""
    CR8 = 27
    """A write of CR8."""


BY_BEGINNING = frozenset((Kind.OTHER, Kind.VCPU, Kind.MARK, Kind.DEADLINE, Kind.EXIT, Kind.CR8))
"""Kinds whose event follows from the first three words of the text, of EXIT's from the first five; the rest differs on
almost every line."""


class Event:
    """One kind of line. Compared by identity: `parse` shares equal ones."""

    __slots__ = ("a", "b", "c", "kind", "name", "text")

    def __init__(self, kind: Kind, name: str, a: int = -1, b: int = 0, c: int = 0, text: str = "") -> None:
        self.kind: int = int(kind)
        self.name: str = name
        self.a: int = a
        self.b: int = b
        self.c: int = c
        self.text: str = text

    def __repr__(self) -> str:
        return f"Event({Kind(self.kind).name}, {self.name}: {self.text or (self.a, self.b, self.c)})"


UNREADABLE = Event(Kind.OTHER, "")
"""Stands for a line that is no event."""
DEEPER = Event(Kind.OTHER, "")
"""Stands for a beginning of three words that does not tell, where one of five does."""

_DELIVERY = {mode.name: mode << R.ICR_DM_SHIFT for mode in R.DeliveryMode}
_SHORTHAND = {"dst": 0, "self": 1, "all": 2, "all-but-self": 3}
_REGISTERS = {name.encode(): offset for offset, name in R.REGISTER_NAMES.items()}

_IPI = re.compile(
    r"dst ([0-9a-f]+) vec (\d+) \((\w+)\|(physical|logical)\|(assert|de-assert)\|(edge|level)\|([\w-]+)\)"
)
_ACCEPT = re.compile(r"apicid ([0-9a-f]+) vec (\d+) \((\w+)\|(edge|level)\)( \(coalesced\))?")
_EOI = re.compile(r"apicid ([0-9a-f]+) vector (-?\d+)")
_APIC = re.compile(rb"apic_(read|write) (\w+) = 0x([0-9a-f]+)")
_MSR = re.compile(rb"msr_(read|write) ([0-9a-f]+) = 0x([0-9a-f]+)( \(#GP\))?")
_MMIO = re.compile(rb"mmio (unsatisfied-read|read|write) len (\d+) gpa 0x([0-9a-f]+) val 0x([0-9a-f]+)")
_VCPU = re.compile(rb"vcpu[ =]?(\d+)")
_HV_TIMER = re.compile(rb"vcpu_id ([0-9a-f]+) hv_timer ([01])\s*")
_EXIT = re.compile(rb"(?:vcpu (\d+) )?reason (\w+)(?: rip 0x(\w+))?")
_WINDOWS = re.compile(rb"fffff8\w{10}")
_HV_CALL = re.compile(
    rb"code 0x([0-9a-f]+) (fast|slow) (?:var_cnt 0x[0-9a-f]+ rep_cnt|cnt) 0x[0-9a-f]+ idx 0x[0-9a-f]+ "
    rb"in 0x([0-9a-f]+) out 0x([0-9a-f]+)"
)
_HV_SEND = re.compile(rb"vector ([0-9a-f]+) (?:format ([0-9a-f]+) valid_bank|processor)_mask 0x([0-9a-f]+)")
_HV_DONE = re.compile(rb"result 0x([0-9a-f]+)")
_SYNIC = re.compile(rb"vcpu_id (\d+) sint \d+ vector (\d+) ret (-?\d+)")
_EXPIRED = re.compile(rb"vcpu_id (\d+) timer (\d) direct ([01]) send result (-?\d+)")
_MSI = re.compile(rb"dst [0-9a-f]+ vec (\d+) \(")
_LINE = re.compile(rb"gsi (\d+) level (-?\d+) source (\d+)")
_PIN = re.compile(rb"pin \d+ dst [0-9a-f]+ vec (\d+) \(")
_PIC = re.compile(rb"chip ([01]) pin ([0-7]) \((?:edge|level)(\|masked)?\)")
_INJECT = re.compile(rb"(?:IRQ 0x([0-9a-f]+)|irq (\d+))")


class _Shared(dict[tuple[object, ...], Event]):
    """Arguments of Event -> the one Event with them."""

    def __missing__(self, key: tuple[object, ...]) -> Event:
        if len(self) >= 1 << 16:  # identity matters within a batch only, so forgetting is harmless
            self.clear()
        self[key] = event = Event(*key)  # type: ignore[arg-type]
        return event


_EVENTS = _Shared()


def _ipi(name: str, payload: bytes) -> Event | None:
    match = _IPI.fullmatch(payload.decode("ascii", "replace"))
    if not match or match[3] not in _DELIVERY or match[7] not in _SHORTHAND:
        return None
    low = int(match[2]) | _DELIVERY[match[3]] | _SHORTHAND[match[7]] << R.ICR_SHORTHAND_SHIFT
    low |= (match[4] == "logical" and R.ICR_LOGICAL) | (match[5] == "assert" and R.ICR_LEVEL)
    low |= match[6] == "level" and R.ICR_TRIGGER
    return _EVENTS[Kind.IPI, name, int(match[1], 16), low, 0, match[0]]


def _accept(name: str, payload: bytes) -> Event | None:
    match = _ACCEPT.fullmatch(payload.decode("ascii", "replace"))
    if not match or match[3] not in _DELIVERY:
        return None
    low = int(match[2]) | _DELIVERY[match[3]] | (match[4] == "level" and R.ICR_TRIGGER)
    return _EVENTS[Kind.ACCEPT, name, int(match[1], 16), low, 0, match[0]]


def _eoi(name: str, payload: bytes) -> Event | None:
    match = _EOI.fullmatch(payload.decode("ascii", "replace"))
    return _EVENTS[Kind.EOI, name, int(match[1], 16), int(match[2]), 0, ""] if match else None


def _apic(name: str, payload: bytes) -> Event | None:
    match = _APIC.fullmatch(payload)
    if not match:
        return None
    offset = _REGISTERS.get(match[2])
    if offset is None:  # registers without a name print as bare or 0x-prefixed hex
        try:
            offset = int(match[2], 16)
        except ValueError:
            return None
    kind = Kind.APIC_READ if match[1] == b"read" else Kind.APIC_WRITE
    return _EVENTS[kind, name, offset, int(match[3], 16), 0, ""]


def _msr(name: str, payload: bytes) -> Event | None:
    match = _MSR.fullmatch(payload)
    if not match:
        return None
    msr = int(match[2], 16)
    if R.MSR_X2APIC_BASE <= msr <= R.MSR_X2APIC_END or msr == R.MSR_APICBASE:
        kind = Kind.MSR_READ if match[1] == b"read" else Kind.MSR_WRITE
        return _EVENTS[kind, name, msr, int(match[3], 16), 1 if match[4] else 0, ""]
    if msr == R.MSR_TSC_DEADLINE and match[1] == b"write":
        return _EVENTS[Kind.DEADLINE, name, msr, 0, 0, ""]
    if HV.MSR_HV_FIRST <= msr <= HV.MSR_HV_LAST and match[1] == b"write":
        return _EVENTS[Kind.HV_MSR, name, msr, int(match[3], 16), 1 if match[4] else 0, ""]
    return _EVENTS[Kind.MARK, name, -1, 0, 0, ""]


def _mmio(name: str, payload: bytes) -> Event | None:
    match = _MMIO.fullmatch(payload)
    if not match:
        return None
    gpa = int(match[3], 16)
    if match[1] == b"write":
        return _EVENTS[Kind.MMIO_WRITE, name, gpa, int(match[4], 16), int(match[2]), ""]
    return _EVENTS[Kind.MMIO_READ, name, gpa, 0, int(match[2]), ""]


def _mark(name: str, payload: bytes) -> Event:
    match = _VCPU.match(payload)
    return _EVENTS[Kind.MARK, name, int(match[1]) if match else -1, 0, 0, ""]


def _exit(name: str, payload: bytes) -> Event:
    match = _EXIT.match(payload)
    if not match:
        return _mark(name, payload)
    windows = bool(match[3] and _WINDOWS.fullmatch(match[3]))
    return _EVENTS[Kind.EXIT, name, int(match[1] or -1), 0, int(windows), match[2].decode()]


def _vcpu(name: str, payload: bytes) -> Event:
    match = _VCPU.match(payload)
    return _EVENTS[Kind.VCPU, name, int(match[1]) if match else -1, 0, 0, ""]


def _hv_timer(name: str, payload: bytes) -> Event | None:
    match = _HV_TIMER.fullmatch(payload)
    return _EVENTS[Kind.HV_TIMER, name, int(match[1], 16), int(match[2]), 0, ""] if match else None


def _inject(name: str, payload: bytes) -> Event:
    match = _INJECT.match(payload)
    if not match:  # Soft/INTn: the guest's own INT instruction
        return _EVENTS[Kind.INJECT, name, -1, 0, 1, ""]
    again = b"reinjected" in payload
    return _EVENTS[Kind.INJECT, name, -1, int(match[1], 16) if match[1] else int(match[2]), int(again), ""]


def _msi(name: str, payload: bytes) -> Event | None:
    match = _MSI.match(payload)
    return _EVENTS[Kind.SOURCE, name, -1, int(match[1]), 0, MSI] if match else None


def _line(name: str, payload: bytes) -> Event | None:
    match = _LINE.fullmatch(payload)
    return _EVENTS[Kind.LINE, name, int(match[1]), int(match[2]), int(match[3]), ""] if match else None


def _pin(name: str, payload: bytes) -> Event | None:
    match = _PIN.match(payload)
    return _EVENTS[Kind.PIN, name, -1, int(match[1]), 0, IOAPIC] if match else None


def _pic(name: str, payload: bytes) -> Event | None:
    match = _PIC.match(payload)
    if match is None:
        return None
    kind = Kind.OTHER if match[3] else Kind.PIC
    return _EVENTS[kind, name, int(match[1]) * 8 + int(match[2]), 0, 0, ""]


def _ack(name: str, payload: bytes) -> Event:
    kind = Kind.SOURCE if payload.startswith(b"irqchip IOAPIC ") else Kind.OTHER
    return _EVENTS[kind, name, -1, -1, 0, IOAPIC]


def _hypercall(name: str, payload: bytes) -> Event:
    send_ipi = payload.startswith((b"nr 0xa ", b"nr 10 "))
    return _EVENTS[Kind.SOURCE, name, -1, -1, 0, "hypercall"] if send_ipi else _mark(name, payload)


def _cr(name: str, payload: bytes) -> Event:
    return _EVENTS[Kind.CR8, name, -1, 0, 0, ""] if payload.startswith(b"cr_write 8 ") else _mark(name, payload)


def _pv_eoi(name: str, payload: bytes) -> Event | None:
    match = _EOI.fullmatch(payload.decode("ascii", "replace"))
    return _EVENTS[Kind.PV_EOI, name, int(match[1], 16), int(match[2]), 0, ""] if match else None


def _hv_hypercall(name: str, payload: bytes) -> Event | None:
    match = _HV_CALL.fullmatch(payload)
    if not match:
        return None
    code = int(match[1], 16)
    if code not in (HV.HvCall.SEND_IPI, HV.HvCall.SEND_IPI_EX):
        return _EVENTS[Kind.MARK, name, -1, 0, 0, ""]
    return _EVENTS[Kind.HV_CALL, name, code, int(match[3], 16), int(match[4], 16), match[2].decode()]


def _hv_send(name: str, payload: bytes) -> Event | None:
    match = _HV_SEND.fullmatch(payload)
    if not match:
        return None
    set_format = -1 if match[2] is None else int(match[2], 16)
    return _EVENTS[Kind.HV_SEND, name, set_format, int(match[3], 16), int(match[1], 16), payload.decode()]


def _hv_done(name: str, payload: bytes) -> Event | None:
    match = _HV_DONE.fullmatch(payload)
    return _EVENTS[Kind.HV_DONE, name, -1, int(match[1], 16), 0, ""] if match else None


def _synic(name: str, payload: bytes) -> Event | None:
    match = _SYNIC.fullmatch(payload)
    return _EVENTS[Kind.RAISED, name, int(match[1]), int(match[2]), 0, SYNIC] if match else None


def _expired(name: str, payload: bytes) -> Event | None:
    match = _EXPIRED.fullmatch(payload)
    if match is None:
        return None
    result = int(match[4])
    return _EVENTS[
        Kind.RAISED, name, int(match[1]), -1, (result & 0xFF) << 8 | int(match[3]) << 4 | int(match[2]), STIMER
    ]


def expiration(event: Event) -> Event:
    """A kvm_hv_stimer_expiration as a line of its own, from the event that says who raised an interrupt."""
    result = (event.c >> 8 ^ 0x80) - 0x80
    text = f"vcpu_id {event.a} timer {event.c & 0xF} direct {event.c >> 4 & 1} send result {result}"
    return Event(Kind.HYPERV, event.name, -1, 0, 0, text)


def _hyperv(name: str, payload: bytes) -> Event:
    told = name in ACTED or name in TIMED
    return _EVENTS[Kind.HYPERV, name, -1, 0, 0, payload.decode("ascii", "replace") if told else ""]


ACTED = frozenset(
    "kvm_hv_" + name
    for name in "notify_acked_sint synic_send_eoi synic_set_msr stimer_set_config stimer_set_count".split()
)
"""Lines that a guest's own EOI or write of a synthetic MSR prints at once; the rest comes when time has passed."""
TIMED = frozenset(
    "kvm_hv_stimer_" + name
    for name in "set_config set_count start_periodic start_one_shot callback cleanup expiration".split()
)
"""Lines of synthetic timers: of writes of their registers, and of what comes when time has passed."""
SYNIC, STIMER, MSI, IOAPIC, PIT = "SynIC", "Hyper-V timer", "MSI", "IOAPIC", "PIT"
"""Who raised an interrupt, in the text of an event of kind SOURCE, RAISED or PIN."""

_PARSERS: dict[bytes, Callable[[str, bytes], Event | None]] = {
    b"kvm_apic_ipi": _ipi,
    b"kvm_apic_accept_irq": _accept,
    b"kvm_eoi": _eoi,
    b"kvm_pv_eoi": _pv_eoi,
    b"kvm_exit": _exit,
    b"kvm_cr": _cr,
    b"kvm_hv_hypercall": _hv_hypercall,
    b"kvm_hv_hypercall_done": _hv_done,
    b"kvm_hv_send_ipi": _hv_send,
    b"kvm_hv_send_ipi_ex": _hv_send,
    b"kvm_hv_synic_set_irq": _synic,
    b"kvm_hv_stimer_expiration": _expired,
    b"kvm_apic": _apic,
    b"kvm_msr": _msr,
    b"kvm_mmio": _mmio,
    b"kvm_inj_virq": _inject,
    b"kvm_set_irq": _line,
    b"kvm_msi_set_irq": _msi,
    b"kvm_ioapic_set_irq": _pin,
    b"kvm_pic_set_irq": _pic,
    b"kvm_ack_irq": _ack,
    b"kvm_hypercall": _hypercall,
    b"kvm_hv_timer_state": _hv_timer,
    b"kvm_halt_poll_ns": _vcpu,
    b"kvm_wait_lapic_expire": _vcpu,
}
for _name in (
    "entry userspace_exit vcpu_wakeup inj_exception pio cpuid page_fault emulate_insn fast_mmio fpu "
    "pvclock_update track_tsc nested_vmexit nested_vmrun"
).split():
    _PARSERS[b"kvm_" + _name.encode()] = _mark
for _name in (
    "flush_tlb flush_tlb_ex notify_acked_sint synic_send_eoi synic_set_msr stimer_set_config stimer_set_count "
    "stimer_start_periodic stimer_start_one_shot stimer_callback stimer_cleanup"
).split():
    _PARSERS[b"kvm_hv_" + _name.encode()] = _hyperv


def parse(body: bytes) -> Event:
    """The event of one line from its text behind the time stamp.

    ``kvm:`` in front of the name (perf) and padding behind it (trace-cmd) are accepted. Events of other systems give
    an event of kind OTHER; a kvm event of a known name whose arguments make no sense gives UNREADABLE.
    """
    name, _, payload = body.strip().partition(b":")
    if name == b"kvm":
        name, _, payload = payload.partition(b":")
    parser = _PARSERS.get(name)
    if parser is None:
        known = name.startswith(b"kvm_") and name.replace(b"_", b"").isalnum()
        return _EVENTS[Kind.OTHER, name.decode() if known else "", -1, 0, 0, ""]
    return parser(name.decode(), payload.lstrip()) or UNREADABLE
