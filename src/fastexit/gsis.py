"""The GSI routing table as words: what each GSI means, in the order in which its routes are worked.

Models: setup_routing_entry, kvm_set_routing_entry, the default table of KVM_CREATE_IRQCHIP.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from fastexit import layout as L

PIC_PINS = 8
"""Of one chip."""


class Route(NamedTuple):
    """A row of the table: what a GSI leads to, as layout.ROUTE_A and ROUTE_B have it."""

    gsi: int
    kind: int
    a: int
    b: int = 0


def default_table() -> list[Route]:
    """Every GSI to the IOAPIC's pin of the same number, the first 16 to the PICs as well, behind it."""
    routes = []
    for gsi in range(L.IOAPIC_PINS):
        routes.append(Route(gsi, L.ROUTE_IOAPIC, gsi))
        if gsi < 2 * PIC_PINS:
            routes.append(Route(gsi, L.ROUTE_PIC, gsi))
    return routes


def table_words(routes: Iterable[Route]) -> dict[int, int]:
    """The words of a table, those of pins without a GSI among them. Of several GSIs a pin belongs to the last."""
    routes = list(routes)
    size = max((route.gsi for route in routes), default=-1) + 1
    words = {L.ROUTE_OF_PIN + pin: 0 for pin in range(L.IOAPIC_PINS + 2 * PIC_PINS)}
    for route in routes:
        if route.kind in (L.ROUTE_IOAPIC, L.ROUTE_PIC):
            first = L.ROUTE_OF_PIN + (L.IOAPIC_PINS if route.kind == L.ROUTE_PIC else 0)
            words[first + route.a] = route.gsi + 1
    row = 0
    for gsi, found in _by_gsi(routes, size):
        words[L.ROUTE_FIRST + gsi] = row
        for route in found:
            at = L.ROUTES + row * L.ROUTE_STRIDE
            words[at + L.ROUTE_KIND] = route.kind | gsi << L.ROUTE_GSI_SHIFT
            words[at + L.ROUTE_A], words[at + L.ROUTE_B] = route.a, route.b
            row += 1
    words[L.ROUTE_FIRST + size] = row
    words[L.ROUTE_GSIS] = size
    return words


def _by_gsi(routes: list[Route], size: int) -> Iterable[tuple[int, list[Route]]]:
    found: list[list[Route]] = [[] for _ in range(size)]
    for route in routes:
        found[route.gsi].append(route)
    return enumerate(found)
