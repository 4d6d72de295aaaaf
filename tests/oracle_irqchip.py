"""The VM's irqchip of the oracle: IOAPIC, routes, irqfds, split irqchip, around the local APICs of `oracle.py`.

Models: kvm_set_irq with its routes in order, the IOAPIC's pins, window and EOIs, RTC tracking, handled vectors and
their scan, MSI routes, irqfds with resampling, what of a PIT is not time. Lists and dictionaries, slow and obvious; it
shares nothing but numbers with the library. The PICs are in oracle_pic.py, the PIT is in oracle_pit_registers.py;
irqchip_pair.py holds it against /dev/kvm.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import oracle
import oracle_apic
from fastexit import regs as r
from fastexit.ioctls import Events
from fastexit.reasons import KvmExit
from oracle_apic import Irq
from oracle_pic import Pair
from oracle_pit_registers import Pit
from oracle_run import GUEST

PINS = 24
MASTER, SLAVE, IOAPIC = 0, 1, 2
USER, RESAMPLE, PIT = 0, 1, 2
"""Source ids."""
RTC_PIN = 8
STORM = 10_000
DELAY_NS = 10_000_000
MASK, LEVEL, REMOTE_IRR, STATUS, LOGICAL = 1 << 16, 1 << 15, 1 << 14, 1 << 12, 1 << 11
CHIP_BYTES = 512
WINDOW = range(0xFEC0_0000, 0xFEC0_0100)
MOST_ROUTES = 4096
USUAL_EVENTS: dict[str, Any] = {
    **{"nmi_pending": 0, "nmi_masked": False, "smi_pending": False, "latched_init": False},
    **{"exception": None, "smm": False, "interrupt": None},
}


@dataclass(frozen=True)
class Route:
    """One entry of the routing table."""

    kind: str
    gsi: int
    chip: int = 0
    pin: int = 0
    address: int = 0
    data: int = 0


@dataclass
class Resampler:
    """What irqfds of one GSI share that are told of its EOIs."""

    gsi: int
    irqfds: list[Irqfd] = field(default_factory=list)


@dataclass
class Irqfd:
    """An eventfd that raises a GSI."""

    machine: Machine
    gsi: int
    resample: bool
    resampled: int = 0
    closed: bool = False

    def signal(self, _count: int = 1) -> None:
        if self.resample:
            self.machine.set_irq(self.gsi, 1, RESAMPLE)
        else:
            self.machine.pulse(self.gsi)

    def close(self) -> None:
        if not self.closed:
            self.closed = True
            self.machine.forget(self)


class Vcpu(oracle_apic.Vcpu):
    """A vCPU that a whole irqchip interrupts."""

    m: Machine

    def __init__(self, machine: Machine, apic_id: int, index: int) -> None:
        self.stale = -1
        self.flat = False  # its segments, which an INIT takes away
        super().__init__(machine, apic_id, index)

    def _reset(self, *, init: bool) -> None:
        super()._reset(init=init)
        self.flat = False

    @property
    def vcpu_id(self) -> int:
        return self.id

    def events(self) -> Any:
        known = vars(super().events())
        return Events(**{name: known.get(name, usual) for name, usual in USUAL_EVENTS.items()})

    def set_sregs(self, *, apic_base: int | None = None, cr8: int | None = None) -> None:
        super().set_sregs(
            apic_base=self.apic_base if apic_base is None else apic_base, cr8=self.cr8 if cr8 is None else cr8
        )

    def accepts_pic(self) -> bool:
        lint0 = self.reg(r.APIC_LVT0)
        return not self.hw_enabled or (not lint0 & r.LVT_MASKED and lint0 & r.LVT.mask("DM") == r.LVT0_BOOT)

    def has_extint(self) -> bool:
        if self.m.split_irqchip:
            return super().has_extint()
        return self.accepts_pic() and self.m.pics.output

    def take_extint(self) -> int | None:
        return super().take_extint() if self.m.split_irqchip else self.m.pics.read_irq()

    def accept(self, irq: Irq) -> int:
        accepted = super().accept(irq)
        if accepted and irq.mode in (r.DM_FIXED, r.DM_LOWEST):
            self.m.accepting.append(self)
        return accepted

    def ended(self, vector: int) -> None:
        if vector not in self.ioapic_handled:
            return
        if vector == self.stale:
            self.request("SCAN_IOAPIC")
        if self.m.split_irqchip:
            super().ended(vector)
        else:
            self.m.eoi(self, vector)

    def scan_ioapic(self) -> None:
        super().scan_ioapic()
        if not self.hw_enabled:
            return
        self.ioapic_handled = set()
        self.stale = -1
        if self.m.split_irqchip:
            self._scan_routes()
            return
        if self.index in self.m.rtc:
            self.ioapic_handled.add(self.m.rtc[self.index])
        for pin, entry in enumerate(self.m.table):
            if entry & LEVEL or self.m.has_notifier(self.m.gsi_of(IOAPIC, pin)) or pin == RTC_PIN:
                self._may_handle(message_of(entry), pending_counts=True)

    def _scan_routes(self) -> None:
        for gsi in range(min(self.m.routes_end, PINS)):
            for route in self.m.routes_of(gsi):
                if route.kind == "msi":
                    irq = self.m.msi(route.address, route.data)
                    if irq.trigger_level:
                        self._may_handle(irq, pending_counts=self.m.split_scan_looks_at_pending)

    def _may_handle(self, irq: Irq, *, pending_counts: bool) -> None:
        if self.m.reaches(irq, self):
            self.ioapic_handled.add(irq.vector)
        elif pending_counts and (irq.vector in self.irr or irq.vector in self.isr):
            self.ioapic_handled.add(irq.vector)
            if self.m.stale_eois_rescan:
                self.stale = max(self.stale, irq.vector)

    def set_lapic(self, data: bytes) -> None:
        super().set_lapic(data)
        if not self.m.split_irqchip:
            self.m.rtc_restore(self)

    # ------------------------------------------------------------------------------------------------------ programs

    def enter(self, eois: list[int], *, interrupts: bool = False) -> None:
        """KVM_SET_REGS and KVM_RUN, until the guest runs; EOIs for user space's IOAPIC come before."""
        if self.get_mp_state() != r.MP_RUNNABLE:
            self.set_mp_state(r.MP_RUNNABLE)
        self.request("EVENT")
        self.rflags = r.RFLAGS_FIXED | r.RFLAGS_IF * interrupts
        self.injected = None
        self.interrupt_injected = False
        self.go_on(eois)

    def go_on(self, eois: list[int]) -> None:
        while (state := self.thread.run()) != GUEST:
            if state != KvmExit.IOAPIC_EOI:
                raise AssertionError(f"the guest stopped with {state}")
            eois.append(self.ioapic_eoi)

    def leave(self) -> None:
        """The OUT at a program's end."""
        self.thread.out()
        self.thread.in_kvm_run = False


class Machine(oracle.Machine):
    """A VM with an irqchip, full or split."""

    vcpus: list[Vcpu]  # type: ignore[assignment]

    def __init__(self, vcpus: int | None = None, *, kernel: str = "6.18", irqchip: str = "full", **more: Any) -> None:
        at, generation = self.at, self.at(kernel)
        self.stale_eois_rescan = generation >= at("6.18")
        self.scans_by_old_mode = generation >= at("7.3")
        self.split_scan_looks_at_pending = generation >= at("6.6")
        self.poll_bit_7 = generation > at("6.1")
        self.unmasking_resamples = generation >= at("6.6")
        self.full = irqchip == "full"
        self.base, self.ioregsel, self.id, self.irr, self.pad = r.IOAPIC_DEFAULT_BASE, 0, 0, 0, 0
        self.delivered = 0
        self.table = [MASK] * PINS
        self.sources: list[set[int]] = [set() for _ in range(PINS)]
        self.eois = [0] * PINS
        self.delayed: int | None = None
        self.rtc: dict[int, int] = {}
        self.rtc_pending = 0
        self.accepting: list[Vcpu] = []
        self.pics = Pair(self)
        self.pit: Pit | None = None
        self.resamplers: list[Resampler] = []
        self.routes: list[Route] = default_routes() if self.full else []
        self.routes_end = PINS if self.full else 0
        super().__init__(vcpus, kernel=kernel, irqchip=irqchip, **more)

    def new_vcpu(self, apic_id: int) -> Vcpu:
        return Vcpu(self, apic_id, len(self.vcpus))

    @staticmethod
    def scan(vcpus: Iterable[Vcpu]) -> None:
        for vcpu in vcpus:
            vcpu.request("SCAN_IOAPIC")

    def reaches(self, irq: Irq, vcpu: Vcpu) -> bool:
        return self._matches(None, irq, vcpu)

    # ------------------------------------------------------------------------------------------------- GSIs and routes

    def routes_of(self, gsi: int) -> list[Route]:
        return [route for route in self.routes if route.gsi == gsi]

    def gsi_of(self, chip: int, pin: int) -> int | None:
        """The GSI that a pin is told by: the last one that was given it."""
        found = [one.gsi for one in self.routes if one.kind != "msi" and (one.chip, one.pin) == (chip, pin)]
        return found[-1] if found else None

    def irq_line(self, gsi: int, level: int, *, status: bool = True) -> int:
        result = self.set_irq(gsi, level, USER, line_status=status)
        return result if status else 0

    def set_irq(self, gsi: int, level: int, source: int, *, line_status: bool = False) -> int:
        signed = (level & 0xFFFF_FFFF ^ 0x8000_0000) - 0x8000_0000
        self.log(f"kvm_set_irq: gsi {gsi} level {signed} source {source}")
        results = [self._by_route(route, bool(level), source, line_status) for route in self.routes_of(gsi)]
        counting = [result for result in results if result >= 0]
        return sum(counting) if counting else -1

    def _by_route(self, route: Route, level: bool, source: int, line_status: bool) -> int:
        if route.kind == "msi":
            if not level or self._invalid(route.address):
                return -1
            return self.deliver(None, self.msi(route.address, route.data))
        if route.chip == IOAPIC:
            return self.pin(route.pin, source, level, line_status)
        return self.pics.set_irq(8 * route.chip + route.pin, source, level)

    def set_gsi_routing(self, entries: Iterable[tuple[Any, ...]]) -> None:
        rows = list(entries)
        if len(rows) > MOST_ROUTES:
            raise ValueError("EINVAL")
        routes: list[Route] = []
        for row in rows:
            route = self._route(*row)
            same = [one for one in routes if one.gsi == route.gsi]
            if any("msi" in (one.kind, route.kind) or one.chip == route.chip for one in same):
                raise ValueError("EINVAL")
            routes.append(route)
        self.routes = routes
        self.routes_end = max((one.gsi for one in routes), default=-1) + 1
        if self.split_irqchip:
            self.scan(self.vcpus)

    def _route(self, kind: str, gsi: int, *rest: int) -> Route:
        if gsi >= MOST_ROUTES:
            raise ValueError("EINVAL")
        if kind == "msi":
            address, data = rest
            if self._invalid(address):
                raise ValueError("EINVAL")
            return Route("msi", gsi, address=address, data=data)
        chip, pin = (IOAPIC, *rest) if kind == "ioapic" else rest
        if self.split_irqchip or chip > IOAPIC or pin >= (PINS if chip == IOAPIC else 8):
            raise ValueError("EINVAL")
        return Route(kind, gsi, chip, pin)

    def _invalid(self, address: int) -> bool:
        return bool(self.x2apic_api & r.X2API_32BIT_IDS and address >> 32 & 0xFF)

    # ------------------------------------------------------------------------------------------------------- irqfds

    def irqfd(self, gsi: int, resample: bool = False) -> Irqfd:
        if resample and self.split_irqchip:
            raise ValueError("EINVAL")
        one = Irqfd(self, gsi, resample)
        if resample:
            found = next((group for group in self.resamplers if group.gsi == gsi), None)
            if found is None:
                found = Resampler(gsi)
                self.resamplers.append(found)
                self.scan(self.vcpus)
            found.irqfds.append(one)
        return one

    def forget(self, irqfd: Irqfd) -> None:
        if not irqfd.resample:
            return
        group = next(one for one in self.resamplers if one.gsi == irqfd.gsi)
        group.irqfds.remove(irqfd)
        if not group.irqfds:
            self.resamplers.remove(group)
            self.scan(self.vcpus)
            self.set_irq(irqfd.gsi, 0, RESAMPLE)

    def pulse(self, gsi: int) -> None:
        """An event: a single message goes at once, all else through a worker."""
        routes = self.routes_of(gsi)
        if len(routes) == 1 and routes[0].kind == "msi":
            if self._invalid(routes[0].address):
                return
            irq = self.msi(routes[0].address, routes[0].data)
            targets = self.resolve(None, irq)
            if targets is not None:
                for target in targets:
                    target.accept(irq)
                return
        self.set_irq(gsi, 1, USER)
        self.set_irq(gsi, 0, USER)

    def has_notifier(self, gsi: int | None) -> bool:
        by_pit = self.pit is not None and self.pit.reinject and gsi == 0
        return by_pit or any(group.gsi == gsi for group in self.resamplers)

    def acked(self, chip: int, pin: int) -> None:
        """An EOI or what a PIC takes for one; ``pin`` of the chip."""
        name = ("PIC master", "PIC slave", "IOAPIC")[chip]
        self.log(f"kvm_ack_irq: irqchip {name} pin {pin + 8 if chip == SLAVE else pin}")
        gsi = self.gsi_of(chip, pin)
        if gsi is None:
            return
        for group in list(self.resamplers):
            if group.gsi == gsi:
                self.set_irq(gsi, 0, RESAMPLE)
                self.resample(group)
        if gsi == 0 and self.pit is not None and self.pit.reinject:
            self.pit.acked()

    @staticmethod
    def resample(group: Resampler) -> None:
        for one in group.irqfds:
            one.resampled += 1

    def mask_changed(self, chip: int, pin: int, masked: bool) -> None:
        if self.pit is not None and self.gsi_of(chip, pin) == 0 and not masked:
            self.pit.unmasked()

    # ------------------------------------------------------------------------------------------------------- the IOAPIC

    def pin(self, pin: int, source: int, level: bool, line_status: bool) -> int:
        (self.sources[pin].add if level else self.sources[pin].discard)(source)
        return self.raised(pin, bool(self.sources[pin]), line_status)

    def raised(self, pin: int, level: bool, line_status: bool) -> int:
        entry, bit = self.table[pin], 1 << pin
        result = self._raised(pin, entry, bit, level, line_status)
        irq = message_of(entry)
        self.log(f"kvm_ioapic_set_irq: pin {pin} {entry_text(irq, entry)}{' (coalesced)' if result == 0 else ''}")
        return result

    def _raised(self, pin: int, entry: int, bit: int, level: bool, line_status: bool) -> int:
        if not level:
            self.irr &= ~bit
            return 1
        if pin == RTC_PIN and line_status and self.rtc_pending > 0:
            return 0
        before = self.irr
        self.irr |= bit
        if not entry & LEVEL:
            self.delivered &= ~bit
            if before & bit:
                return 0
        return self.service(pin, line_status)

    def service(self, pin: int, line_status: bool) -> int:
        entry = self.table[pin]
        if entry & MASK or (entry & LEVEL and entry & REMOTE_IRR):
            return -1
        if not entry & LEVEL:
            self.delivered |= 1 << pin
        irq = message_of(entry)
        self.accepting = []
        result = self.deliver(None, irq)
        if pin == RTC_PIN and line_status:
            for vcpu in self.accepting:
                self.rtc[vcpu.index] = irq.vector
            self.rtc_pending = max(result, 0)
        if result and entry & LEVEL:
            self.table[pin] |= REMOTE_IRR
        return result

    def eoi(self, vcpu: Vcpu, vector: int) -> None:
        level = vector in vcpu.tmr
        if self.rtc.get(vcpu.index) == vector:
            del self.rtc[vcpu.index]
            self.rtc_pending -= 1
            self._rtc_check()
        suppressed = bool(vcpu.reg(r.APIC_SPIV) & r.SVR_SUPPRESS_EOI)
        for pin in range(PINS):
            if self.table[pin] & 0xFF != vector:
                continue
            self.acked(IOAPIC, pin)
            if not level or suppressed:
                continue
            self.table[pin] &= ~REMOTE_IRR
            if not self.table[pin] & MASK and self.irr >> pin & 1:
                self._again(pin)
            else:
                self.eois[pin] = 0

    def _again(self, pin: int) -> None:
        self.eois[pin] += 1
        if self.eois[pin] == STORM:
            self.eois[pin] = 0
            entry = self.table[pin]
            self.log(f"kvm_ioapic_delayed_eoi_inj: {entry_text(message_of(entry), entry)}")
            self.delayed = self.now + DELAY_NS
        else:
            self.service(pin, False)

    def delayed_work(self) -> None:
        self.delayed = None
        for pin in range(PINS):
            if self.table[pin] & LEVEL and self.irr >> pin & 1 and not self.table[pin] & REMOTE_IRR:
                self.service(pin, False)

    def set_time(self, ns: int) -> list[int]:
        if self.delayed is not None and self.delayed <= ns:
            self.delayed_work()
        return super().set_time(ns)

    # --------------------------------------------------------------------------------------------------------- the RTC

    def rtc_restore(self, vcpu: Vcpu) -> None:
        irq = message_of(self.table[RTC_PIN])
        if not self.reaches(irq, vcpu):
            return
        pending = irq.vector in vcpu.irr or irq.vector in vcpu.isr
        if pending == (vcpu.index in self.rtc):
            return
        if pending:
            self.rtc[vcpu.index] = irq.vector
            self.rtc_pending += 1
        else:
            del self.rtc[vcpu.index]
            self.rtc_pending -= 1
            self._rtc_check()

    def _rtc_check(self) -> None:
        if self.rtc_pending < 0:
            self.rtc_restore_all()

    def rtc_restore_all(self) -> None:
        self.rtc, self.rtc_pending = {}, 0
        for vcpu in self.vcpus:
            self.rtc_restore(vcpu)

    # -------------------------------------------------------------------------------------------------------- by guests

    def window_write(self, offset: int, value: int, length: int) -> None:
        value &= 0xFFFF_FFFF
        if offset == 0:
            self.ioregsel = value & 0xFF
        elif offset == 0x10:
            self._register_write(self.ioregsel, value)

    def window_read(self, offset: int, length: int) -> int:
        value = 0
        if offset == 0:
            value = self.ioregsel
        elif offset == 0x10:
            value = self._register(self.ioregsel)
        return value & (1 << 8 * length) - 1

    def _register(self, index: int) -> int:
        if index in (0, 2):
            return (self.id & 15) << 24
        if index == 1:
            return r.IOAPIC_VERSION
        pin = index - 0x10 >> 1
        if not 0 <= pin < PINS:
            return 0xFFFF_FFFF
        return self.table[pin] >> 32 * (index & 1) & 0xFFFF_FFFF

    def _register_write(self, index: int, value: int) -> None:
        if index == 0:
            self.id = value >> 24 & 15
        pin = index - 0x10 >> 1
        if not 0 <= pin < PINS:
            return
        old = self.table[pin]
        shift = 32 * (index & 1)
        new = old & ~(0xFFFF_FFFF << shift) | value << shift
        new = new & ~(STATUS | REMOTE_IRR) | old & (STATUS | REMOTE_IRR)
        if not new & LEVEL:
            new &= ~REMOTE_IRR
        self.table[pin] = new
        if (old ^ new) & MASK:
            self.mask_changed(IOAPIC, pin, bool(new & MASK))
        if new & LEVEL and self.irr >> pin & 1 and not new & (MASK | REMOTE_IRR):
            self._unmasked(pin)
        self._rescan(old, self.table[pin])

    def _unmasked(self, pin: int) -> None:
        gsi = self.gsi_of(IOAPIC, pin)
        group = next((one for one in self.resamplers if one.gsi == gsi), None)
        if group is not None and self.unmasking_resamples:
            self.irr &= ~(1 << pin)
            self.resample(group)
        else:
            self.service(pin, False)

    def _rescan(self, old: int, new: int) -> None:
        irq = message_of(new)
        if irq.mode != r.DM_FIXED:
            self.scan(self.vcpus)
            return
        targets = self._whom(irq)
        if (old ^ new) & (LOGICAL | 0xFF << 56):
            irq.dest = old >> 56
            if self.scans_by_old_mode:
                irq.logical = bool(old & LOGICAL)
            targets += self._whom(irq)
        self.scan(targets)

    def _whom(self, irq: Irq) -> list[Vcpu]:
        targets: Any = self.resolve(None, irq)
        if targets is not None:
            return list(targets)
        return [v for v in self.vcpus if v.hw_enabled and self.reaches(irq, v)]

    # ---------------------------------------------------------------------------------------------- state in and out

    def get_irqchip(self, chip: int) -> bytes:
        if not self.full or chip > IOAPIC:
            raise ValueError("ENXIO or EINVAL")
        if chip != IOAPIC:
            return self.pics.get(chip).ljust(CHIP_BYTES, b"\0")
        head = (self.base, self.ioregsel, self.id, self.irr & ~self.delivered, self.pad)
        return struct.pack("<QIIII24Q", *head, *self.table).ljust(CHIP_BYTES, b"\0")

    def set_irqchip(self, chip: int, data: bytes) -> None:
        if not self.full or chip > IOAPIC:
            raise ValueError("ENXIO or EINVAL")
        if chip == IOAPIC:
            self._set_ioapic(data)
            self.pics.update()
        else:
            self.pics.set(chip, data)

    def _set_ioapic(self, data: bytes) -> None:
        self.base, self.ioregsel, self.id, irr, self.pad, *self.table = struct.unpack_from("<QIIII24Q", data)
        self.irr = self.delivered = 0
        self.scan(self.vcpus)
        self.rtc, self.rtc_pending = {}, 0
        for pin in range(PINS):
            if irr >> pin & 1:
                self.raised(pin, True, True)
        self.rtc_restore_all()

    # ------------------------------------------------------------------------------------------------------- the PIT

    def create_pit(self, speaker: bool = True) -> None:
        if self.pit is not None or not self.full:
            raise ValueError("EEXIST or ENOENT")
        self.pit = Pit(speaker, apart=self.generation < self.at("6.1"))
        self.scan(self.vcpus)

    def reinject_control(self, reinject: bool) -> None:
        if self.pit is None:
            raise ValueError("ENXIO")
        if self.pit.reinject != reinject:
            self.pit.reinject = reinject
            self.scan(self.vcpus)

    def get_pit(self) -> bytes:
        if self.pit is None:
            raise ValueError("ENXIO")
        return self.pit.get()

    def set_pit(self, data: bytes) -> None:
        if self.pit is None:
            raise ValueError("ENXIO")
        self.pit.set(data)

    # -------------------------------------------------------------------------------------------------------- devices

    def guest_access(self, vcpu: Vcpu, op: tuple[Any, ...]) -> tuple[Any, tuple[Any, ...] | None]:
        """An access of a guest's: what it read, and the access if it is left to user space."""
        name, _, where, *value, length = op
        reads = name.endswith("_read")
        device = self._memory if name.startswith("mem") else self._port
        answer = device(vcpu, where, None if reads else value[0], length)
        if answer is not None:
            return answer if reads else None, None
        return 0 if reads else None, (name.startswith("io"), where, length, not reads, 0 if reads else value[0])

    def _memory(self, vcpu: Vcpu, gpa: int, value: int | None, length: int) -> int | None:
        """What was read, 0 of a write; None for what is nobody's."""
        page = vcpu.apic_base >> 12 << 12
        if page <= gpa < page + 0x1000:
            if value is None:
                return vcpu.load(gpa - page, length) or 0
            vcpu.store(gpa - page, value, length)
            return 0
        if not (self.full and gpa in WINDOW and gpa + length - 1 in WINDOW and self.base == WINDOW.start):
            return None
        if value is None:
            return self.window_read(gpa - WINDOW.start, length)
        self.window_write(gpa - WINDOW.start, value, length)
        return 0

    def _port(self, _vcpu: Vcpu, port: int, value: int | None, length: int) -> int | None:
        devices: list[Any] = [self.pics, *[self.pit] * (self.pit is not None)] if self.full else []
        for device in devices:
            if value is None:
                read: int | None = device.io_read(port, length)
                if read is not None:
                    return read
            elif device.io_write(port, value, length):
                return 0
        return None


def default_routes() -> list[Route]:
    """The table of KVM_CREATE_IRQCHIP."""
    routes = []
    for gsi in range(PINS):
        routes.append(Route("ioapic", gsi, IOAPIC, gsi))
        if gsi < 16:
            routes.append(Route("pic", gsi, gsi >> 3, gsi & 7))
    return routes


def message_of(entry: int) -> Irq:
    """The message that a redirection entry sends."""
    return Irq(
        vector=entry & 0xFF,
        mode=entry >> 8 & 7,
        logical=bool(entry & LOGICAL),
        level=True,
        trigger_level=bool(entry & LEVEL),
        shorthand=r.SH_NONE,
        dest=entry >> 56,
    )


def entry_text(irq: Irq, entry: int) -> str:
    """A redirection entry as the tracepoints print it."""
    return (
        f"dst {irq.dest:x} vec {irq.vector} ({r.DeliveryMode(irq.mode).name}|"
        f"{'logical' if irq.logical else 'physical'}|{'level' if irq.trigger_level else 'edge'}"
        f"{'|masked' if entry & MASK else ''})"
    )
