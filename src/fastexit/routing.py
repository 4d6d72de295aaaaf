"""GSI routing of one machine: what an interrupt line of user space means, and the eventfds that stand for one.

Models: KVM_SET_GSI_ROUTING, KVM_IRQ_LINE, KVM_IRQ_LINE_STATUS, KVM_IRQFD. kernels/routes.py has what a line does, and
gsis.py the table's words; eventfds are user space's.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from fastexit import layout as L
from fastexit import regs as R
from fastexit.checks import U32, integer, quoted
from fastexit.gsis import PIC_PINS, Route, table_words
from fastexit.jit.declare import load
from fastexit.outcome import OUTCOMES

if TYPE_CHECKING:
    from fastexit.machine import Machine

MAX_ROUTES = 4096
"""KVM_MAX_IRQ_ROUTES: how many there may be, and what their GSIs have to be below."""
FIELDS = {
    "ioapic": ("gsi", "pin"),
    "pic": ("gsi", "chip", "pin"),
    "msi": ("gsi", "address", "data"),
    "hv_sint": ("gsi", "vcpu", "sint"),
}
"""What the entries of each kind have behind it."""
CHIPS = (L.ROUTE_IOAPIC, L.ROUTE_PIC)


class Routing:
    """One machine's table and irqfds.

    Attributes:
        far: resampling irqfds by GSI, of GSIs that can have no route: their first and last make everybody scan, too.
    """

    def __init__(self, machine: Machine) -> None:
        self.machine: Machine = machine
        self.far: Counter[int] = Counter()

    # --------------------------------------------------------------------------------------------------- the table

    def set(self, entries: Iterable[tuple[Any, ...]]) -> None:
        """KVM_SET_GSI_ROUTING: the whole table anew, or on any error the old one."""
        routes: list[Route] = []
        there: dict[int, list[int]] = {}
        for i, entry in enumerate(entries):
            what = f"GSI routing entry {i}"
            if i == MAX_ROUTES:
                raise ValueError(f"more than {MAX_ROUTES} GSI routing entries (EINVAL)")
            route = self._route(what, entry)
            chip = _chip(route)
            for other in there.setdefault(route.gsi, []):
                if chip < 0 or other < 0 or chip == other:
                    raise ValueError(f"{what}: GSI {route.gsi} has a route already (EINVAL)")
            there[route.gsi].append(chip)
            routes.append(route)
        mem = self.machine.mem
        with self.machine.lock:
            for word, value in table_words(routes).items():
                mem[word] = value
        load("rerouted")(self.machine.handle, self.machine.shared_row())

    def _route(self, what: str, entry: tuple[Any, ...]) -> Route:
        if not isinstance(entry, tuple | list) or not entry:
            raise TypeError(f"{what} is no (kind, gsi, ...)")
        kind = entry[0]
        if not isinstance(kind, str) or kind not in FIELDS:
            raise ValueError(f"{what}: kind {quoted(str(kind))} is none of {', '.join(FIELDS)} (EINVAL)")
        if len(entry) != len(FIELDS[kind]) + 1:
            raise TypeError(f"{what} is no ({', '.join((repr(kind), *FIELDS[kind]))})")
        gsi = integer(entry[1], f"{what}: GSI", MAX_ROUTES - 1)
        if kind == "ioapic":
            return self._ioapic(what, gsi, entry[2])
        makes = {"pic": self._pic, "msi": self._msi, "hv_sint": self._hv_sint}
        return makes[kind](what, gsi, entry[2], entry[3])

    def _ioapic(self, what: str, gsi: int, pin: Any) -> Route:
        self._needs_chips(what)
        return Route(gsi, L.ROUTE_IOAPIC, integer(pin, f"{what}: pin", L.IOAPIC_PINS - 1))

    def _pic(self, what: str, gsi: int, chip: Any, pin: Any) -> Route:
        self._needs_chips(what)
        chip = integer(chip, f"{what}: PIC", 1)
        return Route(gsi, L.ROUTE_PIC, chip * PIC_PINS + integer(pin, f"{what}: pin", PIC_PINS - 1))

    def _needs_chips(self, what: str) -> None:
        if self.machine.mem[L.H_CONFIG] & L.CONFIG_SPLIT_IRQCHIP:
            raise ValueError(f"{what}: IOAPIC and PICs are user space's with irqchip='split' (EINVAL)")

    def _msi(self, what: str, gsi: int, address: Any, data: Any) -> Route:
        address = integer(address, f"{what}: address", L.NONE)
        if self.machine.mem[L.H_API] & R.X2API_32BIT_IDS and address >> 32 & 0xFF:
            raise ValueError(f"{what}: MSI address {address:#x}: bits 39:32 must be 0 with 32-bit ids (EINVAL)")
        return Route(gsi, L.ROUTE_MSI, address, integer(data, f"{what}: data", U32))

    def _hv_sint(self, what: str, gsi: int, vcpu: Any, sint: Any) -> Route:
        if not self.machine.mem[L.H_CONFIG] & L.CONFIG_KVM_HYPERV:
            raise ValueError(f"{what}: the kernel has no CONFIG_KVM_HYPERV (kvm_hyperv=False; EINVAL)")
        return Route(gsi, L.ROUTE_HV_SINT, integer(vcpu, f"{what}: VP index", U32), integer(sint, f"{what}: SINT", U32))

    # --------------------------------------------------------------------------------------------------- the lines

    def line(self, gsi: int, level: int, status: bool) -> int:
        """KVM_IRQ_LINE_STATUS: its status; or without ``status`` KVM_IRQ_LINE, which tells none: 0."""
        gsi, level = integer(gsi, "GSI", U32), integer(level, "level", U32)
        self.machine.look_at_clock()
        code = load("irq_line")(self.machine.handle, gsi, level, int(bool(status)), self.machine.host_row())
        return OUTCOMES[code].accepted if status else 0


def _chip(route: Route) -> int:
    """A number for each chip, of which a GSI may have one route; -1 for what must be alone."""
    return route.a // PIC_PINS + 1 if route.kind == L.ROUTE_PIC else 0 if route.kind in CHIPS else -1


class Irqfd:
    """An eventfd that raises a GSI: ``signal()`` as its device writes to it, ``close()`` as KVM_IRQFD_FLAG_DEASSIGN.

    A resampling one raises the GSI and leaves it up; the guest's EOI lowers it, and ``resampled`` counts.
    """

    def __init__(self, machine: Machine, gsi: int, resample: bool) -> None:
        self.machine: Machine = machine
        self.gsi: int = integer(gsi, "GSI", U32)
        self.resample: bool = bool(resample)
        self.closed: bool = False
        if self.resample:
            if machine.mem[L.H_CONFIG] & L.CONFIG_SPLIT_IRQCHIP:
                raise ValueError("resampling is user space's with irqchip='split' (EINVAL)")
            self._count(1)
        self._before: int = self._signals()

    def __repr__(self) -> str:
        return f"<irqfd of GSI {self.gsi}{', resampling' if self.resample else ''}{', closed' if self.closed else ''}>"

    def _count(self, on: int) -> None:
        far = self.machine.routing.far
        if self.gsi >= L.MAX_ROUTES:
            far[self.gsi] += 1 if on else -1
            if far[self.gsi] != on:  # neither the first nor the last
                return
        load("irqfd_resample")(self.machine.handle, self.gsi, on, self.machine.shared_row())

    def _signals(self) -> int:
        if not self.resample or self.gsi >= L.MAX_ROUTES:
            return 0
        return self.machine.mem[L.RESAMPLERS + self.gsi * L.RESAMPLER_STRIDE + L.RESAMPLER_SIGNALS]

    @property
    def resampled(self) -> int:
        """How often the resamplefd was signalled: by a guest's acknowledgement, or by its unmasking the pin."""
        return self._signals() - self._before if not self.closed else self._before

    def signal(self, count: int = 1) -> int:
        """Write to the eventfd: how many APICs took the interrupt, or irq_line's result for the rise.

        Whatever ``count`` is written, it is one event. ValueError once it is closed. ``Machine.targets`` are those for
        which the host has something to do.
        """
        integer(count, "count", L.NONE - 1)
        if self.closed:
            raise ValueError(f"the irqfd of GSI {self.gsi} is closed")
        m = self.machine
        m.look_at_clock()
        return OUTCOMES[load("irqfd_signal")(m.handle, self.gsi, int(self.resample), m.host_row())].accepted

    def close(self) -> None:
        """Untie the eventfd; the last resampling one of a GSI lowers what it had raised. Twice is once."""
        if not self.closed:
            self._before = self.resampled
            self.closed = True
            if self.resample:
                self._count(0)
