"""GSI routing of one machine: what an interrupt line of user space means.

Models: KVM_SET_GSI_ROUTING and KVM_IRQ_LINE_STATUS as far as routes of kind hv_sint go, which raise a synthetic
interrupt source. The table is user space's and in no snapshot.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, NamedTuple

from fastexit import layout as L
from fastexit.checks import U32, integer, quoted
from fastexit.jit.declare import load
from fastexit.outcome import OUTCOMES

if TYPE_CHECKING:
    from fastexit.machine import Machine

MAX_ROUTES = 4096
"""KVM_MAX_IRQ_ROUTES: how many there may be, and what their GSIs have to be below."""
KINDS = ("hv_sint",)
LATER_KINDS = ("ioapic", "pic", "msi")
ENTRY = 4


class HvSint(NamedTuple):
    """A route to a synthetic interrupt source: a VP index that need not exist, and a SINT of any number."""

    vcpu: int
    sint: int


class Routing:
    """One machine's table, by GSI; None until user space sets one."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.routes: dict[int, HvSint] | None = None

    def set(self, entries: Iterable[tuple[Any, ...]]) -> None:
        """KVM_SET_GSI_ROUTING: the whole table anew."""
        routes: dict[int, HvSint] = {}
        for i, entry in enumerate(entries):
            what = f"GSI routing entry {i}"
            if not isinstance(entry, tuple | list) or len(entry) != ENTRY:
                raise TypeError(f"{what} is no (kind, gsi, vcpu, sint)")
            kind, gsi, vcpu, sint = entry
            if kind in LATER_KINDS:
                raise ValueError(f"{what}: kind {kind!r} cannot be routed yet: {', '.join(KINDS)} alone")
            if kind not in KINDS:
                raise ValueError(f"{what}: kind {quoted(str(kind))} is none of {', '.join(KINDS)} (EINVAL)")
            if not self.machine.mem[L.H_CONFIG] & L.CONFIG_KVM_HYPERV:
                raise ValueError(f"{what}: the kernel has no CONFIG_KVM_HYPERV (kvm_hyperv=False; EINVAL)")
            gsi = integer(gsi, f"{what}: GSI", MAX_ROUTES - 1)
            if gsi in routes:
                raise ValueError(f"{what}: GSI {gsi} has a route already (EINVAL)")
            routes[gsi] = HvSint(integer(vcpu, f"{what}: VP index", U32), integer(sint, f"{what}: SINT", U32))
        self.routes = routes

    def line(self, gsi: int, level: int) -> int:
        """KVM_IRQ_LINE_STATUS: its status."""
        gsi, level = integer(gsi, "GSI", U32), integer(level, "level", U32)
        routes = self.routes
        if routes is None:
            if not self.machine.mem[L.H_CONFIG] & L.CONFIG_SPLIT_IRQCHIP:
                raise ValueError(f"GSI {gsi}: the default routes to the IOAPIC and the PICs cannot be used yet")
            routes = {}
        route = routes.get(gsi, HvSint(L.NONE, 0))
        code = load("hv_sint_line")(self.machine.handle, gsi, level, route.vcpu, route.sint, L.HOST)
        return OUTCOMES[code].accepted
