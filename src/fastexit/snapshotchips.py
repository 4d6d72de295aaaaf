"""The irqchip's part of a snapshot: IOAPIC, PIC pair, PIT, what they keep about each vCPU, the routes in use, TSCs.

The routing table of a machine has room for 4096 routes, of which a VM uses a few dozen; a snapshot has those alone.
Irqfds are user space's, like other eventfds: the machine that comes back has none, so no resamplers either.
"""

from __future__ import annotations

import numpy as np

from fastexit import layout as L
from fastexit import regs as R
from fastexit.irqchip import created
from fastexit.snapshotwords import Check, among, bits, check, require, up_to

_U32 = 0xFFFF_FFFF
_PINS = bits((1 << L.IOAPIC_PINS) - 1)
_SOURCES = bits(7)
_BYTE = up_to(0xFF)
_FAR = 1 << 63
_STORM = 10_000
_GSI_SHIFT = L.ROUTE_GSI_SHIFT

_IOAPIC: tuple[tuple[int, Check, str], ...] = (
    (L.IOAPIC_IOREGSEL, up_to(_U32), "the IOAPIC's index"),
    (L.IOAPIC_ID, up_to(_U32), "the IOAPIC's id"),
    (L.IOAPIC_IRR, _PINS, "the IOAPIC's IRR"),
    (L.IOAPIC_PAD, up_to(_U32), "the IOAPIC's padding"),
    (L.IOAPIC_IRR_DELIVERED, _PINS, "the IOAPIC's IRR"),
    *((L.IOAPIC_SOURCES + pin, _SOURCES, "a pin's source") for pin in range(L.IOAPIC_PINS)),
    *((L.IOAPIC_EOIS + pin, up_to(_STORM - 1), "a number of EOIs") for pin in range(L.IOAPIC_PINS)),
)
_PIC: tuple[tuple[int, Check, str], ...] = (
    *((field, _BYTE, "a PIC's register") for field in range(L.PIC_FIELDS)),
    *((L.PIC_SOURCES + pin, _SOURCES, "a pin's source") for pin in range(L.PIC_PINS // 2)),
)
_PAIR: tuple[tuple[int, Check, str], ...] = (
    (L.PIC_OUTPUT, up_to(1), "the PICs' output"),
    (L.IRQ_LOCK, among(0), "the irqchip's lock"),
    (L.IRQ_DEPTH, among(0), "the irqchip's lock"),
)
_CHANNEL: tuple[tuple[int, Check, str], ...] = (
    (L.PIT_COUNT, up_to(_U32), "a count of the PIT"),
    (L.PIT_LATCHED_COUNT, up_to(0xFFFF), "a count of the PIT"),
    *((field, _BYTE, "a register of the PIT") for field in range(L.PIT_COUNT_LATCHED, L.PIT_GATE + 1)),
)
_PIT: tuple[tuple[int, Check, str], ...] = (
    (L.PIT_PRESENT, up_to(3), "the PIT's presence"),
    (L.PIT_FLAGS, up_to(_U32), "a flag of the PIT"),
    (L.PIT_REINJECT, up_to(1), "a flag of the PIT"),
    (L.PIT_IRQ_ACK, up_to(1), "a flag of the PIT"),
    (L.PIT_PENDING, up_to(_FAR), "a number of the PIT's ticks"),
    (L.PIT_PERIOD, up_to(_FAR), "the PIT's period"),
    (L.PIT_EXPIRES, up_to(_FAR), "the PIT's timer"),
    (L.PIT_PERIODIC, up_to(1), "a flag of the PIT"),
    (L.PIT_WORK, up_to(1), "a flag of the PIT"),
    (L.PIT_SPEAKER, up_to(1), "a flag of the PIT"),
)
_TSC: tuple[tuple[int, Check, str], ...] = ((L.TSC_USER, up_to(1), "who wrote a TSC"),)
_IRQ: tuple[tuple[int, Check, str], ...] = (
    (L.IRQ_RTC_VECTOR, up_to(256), "a vector of the RTC"),
    (L.IRQ_STALE, up_to(256), "a vector that is stale"),
    (L.IRQ_GIVEN, up_to(1), "whose EOIs the IOAPIC wants"),
    (L.IRQ_WENT_IN, up_to(L.WENT_IN_MOST), "what a CPU has got"),
)
_ROUTING: tuple[tuple[int, Check, str], ...] = (
    (L.ROUTE_GSIS, up_to(L.MAX_ROUTES), "a number of GSIs"),
    (L.ROUTE_RESERVED, up_to(0xFF), "a number of GSIs"),
    *((L.ROUTE_OF_PIN + pin, up_to(L.MAX_ROUTES), "a pin's GSI") for pin in range(L.IOAPIC_PINS + L.PIC_PINS)),
)
_LAST_PIN = {L.ROUTE_IOAPIC: L.IOAPIC_PINS - 1, L.ROUTE_PIC: L.PIC_PINS - 1}


def fixed_rows(n: int) -> list[slice]:
    """The parts that every machine with n vCPUs has."""
    return [
        slice(L.IOAPIC, L.ROUTES),
        slice(L.ROUTE_GSIS, L.RESAMPLERS),
        slice(L.IRQ, L.IRQ + n * L.IRQ_STRIDE),
        slice(L.TSC, L.TSC + n * L.TSC_STRIDE),
        slice(L.TSC_LAST_NSEC, L.TSC_LAST_NSEC + L.TSC_WORDS),
    ]


def pack_routes(words: np.ndarray) -> bytes:
    """The routes in use: where each GSI's begin, then they."""
    gsis = int(words[L.ROUTE_GSIS])
    first = words[L.ROUTE_FIRST : L.ROUTE_FIRST + gsis + 1]
    used = int(first[-1]) * L.ROUTE_STRIDE
    return first.tobytes() + words[L.ROUTES : L.ROUTES + used].tobytes()


def checked_routes(routing: np.ndarray, words: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What `pack_routes` has written for the table of ``routing``: where each GSI's begin, and the routes."""
    _check(_ROUTING, routing, L.ROUTE_GSIS)
    gsis = int(routing[0])
    first, rows = words[: gsis + 1], words[gsis + 1 :]
    require(len(first) == gsis + 1 and not first[0], "a GSI's routes")
    require(bool((first[1:] >= first[:-1]).all()), "a GSI's routes")
    require(int(first[-1]) <= L.MAX_ROUTES and len(rows) == int(first[-1]) * L.ROUTE_STRIDE, "the number of routes")
    table = rows.reshape(-1, L.ROUTE_STRIDE)
    kinds, gsi = (
        table[:, L.ROUTE_KIND] & np.uint64(L.ROUTE_KINDS),
        table[:, L.ROUTE_KIND] >> np.uint64(_GSI_SHIFT),
    )
    owners = np.repeat(np.arange(gsis, dtype=np.uint64), np.diff(first).astype(np.int64))
    require(bool((gsi == owners).all()), "a GSI's routes")
    require(bool(((kinds >= L.ROUTE_IOAPIC) & (kinds <= L.ROUTE_HV_SINT)).all()), "a route's kind")
    for kind, last in _LAST_PIN.items():
        require(bool((table[kinds == kind, L.ROUTE_A] <= last).all()), "a route's pin")
    return first, rows


def check_chips(words: np.ndarray, irq: np.ndarray) -> None:
    """IOAPIC, PICs, PIT, and a row a vCPU. What else a register holds is any guest's, or user space's, to set."""
    _check(_IOAPIC, words[: L.IOAPIC_WORDS])
    for chip in range(2):
        _check(_PIC, words[L.PIC - L.IOAPIC + chip * L.PIC_STRIDE :])
    _check(_PAIR, words, L.IOAPIC)
    channels = words[L.PIT - L.IOAPIC :][: L.PIT_CHANNELS * L.PIT_STRIDE].reshape(-1, L.PIT_STRIDE)
    check(_CHANNEL, channels)
    _check(_PIT, words, L.IOAPIC)
    counts = words[L.PIT_PRESENT - L.IOAPIC] == 0 or bool((channels[:, L.PIT_COUNT] > 0).all())
    require(bool(counts), "a count of the PIT")
    deadline, expires = int(words[L.PIT_DEADLINE - L.IOAPIC]), int(words[L.PIT_EXPIRES - L.IOAPIC])
    require(deadline in (0, expires + 1), "the PIT's timer")
    require(bool(words[L.PIT_PERIOD - L.IOAPIC] or not words[L.PIT_PERIODIC - L.IOAPIC]), "the PIT's period")
    check(_IRQ, irq.reshape(-1, L.IRQ_STRIDE))


def check_tscs(rows: np.ndarray, shared: np.ndarray, host_khz: int) -> None:
    """Frequencies divide; offsets may be any."""
    _check(_TSC, shared, L.TSC_LAST_NSEC)
    for word in (L.TSC_KHZ, L.TSC_RATE):
        khz = rows.reshape(-1, L.TSC_STRIDE)[:, word] ^ np.uint64(host_khz)
        require(bool(((khz >= 1) & (khz <= R.TSC_MOST_KHZ)).all()), "a TSC's frequency")


def _check(table: tuple[tuple[int, Check, str], ...], words: np.ndarray, first: int = 0) -> None:
    """Every line of a table whose words are counted from the machine's ``-first``-th on."""
    check(tuple((word - first, holds, what) for word, holds, what in table), words[None, :])


def new_chips(split: bool, n: int) -> tuple[list[np.ndarray], np.ndarray]:
    """The parts of a machine whose chips are new: those of `fixed_rows`, and what `pack_routes` writes of it."""
    words = np.zeros(L.WORDS - L.IOAPIC, dtype=np.uint64)
    for at, value in created("split" if split else "full").items():
        words[at - L.IOAPIC] = value
    parts = [words[rows.start - L.IOAPIC : rows.stop - L.IOAPIC] for rows in fixed_rows(n)]
    gsis = int(words[L.ROUTE_GSIS - L.IOAPIC])
    first = words[L.ROUTE_FIRST - L.IOAPIC :][: gsis + 1]
    routes = words[L.ROUTES - L.IOAPIC :][: int(first[-1]) * L.ROUTE_STRIDE]
    return parts, np.concatenate((first, routes))
