"""The irqchip at the C door: lines, routes, irqfds, states of IOAPIC, PICs and PIT are those of the Python door."""

from __future__ import annotations

import random
from typing import Any

import pytest

import fastexit as fx
from embedded import NOBODY, Door, compiled
from fastexit import layout as L
from fastexit.embed.cabi import Open, Status
from test_cabi import check, whom

KINDS = [
    ({}, {}),
    ({"vendor": "svm", "kernel": "6.1"}, {"vendor": 1, "kernel": 5}),
    ({"apicv": False, "threads": False}, {"flags": Open.NO_APICV | Open.ONE_OWNER}),
    ({"irqchip": "split"}, {"flags": Open.SPLIT_IRQCHIP}),
    ({"x2apic_api": 1, "kernel": "5.10"}, {"x2apic_api": 1, "kernel": 8}),
]
ROUTES = {"ioapic": 1, "pic": 2, "msi": 3, "hv_sint": 4}
"""FX_ROUTE_*."""


def record(route: tuple[Any, ...]) -> dict[str, int]:
    """A route as struct fx_route has it."""
    kind, gsi, *more = route
    if kind == "pic":
        more = [more[0] * 8 + more[1]]
    return {"gsi": gsi, "kind": ROUTES[kind], "address": more[0], "data": more[1] if len(more) > 1 else 0}


class Pair:
    """A machine at each door."""

    def __init__(self, door: Door, python: dict[str, Any], c: dict[str, Any]) -> None:
        self.door = door
        self.p = fx.Machine(vcpus=3, **python)
        self.p.boot_x2apic()
        flags = Open(c.get("flags", 0)) | Open.BOOT_X2APIC | Open.QUIET
        self.c = door.open(**{"vcpus": 3, **c, "flags": flags})
        self.irqfds: dict[int, Any] = {}

    def same(self) -> None:
        assert self.door.snapshot(self.c) == self.p.snapshot()

    def line(self, gsi: int, level: int) -> Any:
        accepted = self.p.irq_line(gsi, level)
        status, result = self.door.irq_line(self.c, gsi, level)
        assert (status, result.accepted, result.vcpu) == (Status.OK, accepted, NOBODY)
        whom(self.door, self.c, NOBODY, result, self.p.targets)
        return result

    def routing(self, routes: list[tuple[Any, ...]]) -> None:
        ffi = self.door.ffi
        records = ffi.new("struct fx_route[]", [record(route) for route in routes])
        status = self.door.fx.set_gsi_routing(self.c, records, len(routes))
        try:
            self.p.set_gsi_routing(routes)
        except ValueError:
            assert status == Status.E_RANGE
        else:
            assert status == Status.OK
            assert self.door.targets(self.c, NOBODY) == list(self.p.targets)

    def chip(self, chip: int, rng: random.Random) -> None:
        """Get a chip's state, change some of it, set it."""
        fx_ops, ffi = self.door.fx, self.door.ffi
        state = ffi.new("uint8_t[512]")
        status = fx_ops.get_irqchip(self.c, chip, state, 512)
        if status == Status.E_RANGE:
            with pytest.raises(ValueError, match="ENXIO"):
                self.p.get_irqchip(chip)
            return
        assert bytes(ffi.buffer(state)) == self.p.get_irqchip(chip)
        for _ in range(rng.randrange(8)):
            state[rng.randrange(216 if chip == 2 else 16)] = rng.randrange(256)
        assert fx_ops.set_irqchip(self.c, chip, state, 512) == Status.OK
        self.p.set_irqchip(chip, bytes(ffi.buffer(state)))
        assert self.door.targets(self.c, NOBODY) == list(self.p.targets)

    def irqfd(self, gsi: int, resample: bool) -> None:
        key = gsi * 2 + resample
        if key not in self.irqfds:
            self.irqfds[key] = self.p.irqfd(gsi, resample=resample)
            if resample:
                assert self.door.fx.irqfd_resample(self.c, gsi, 1) == Status.OK
        status, result = self.door.irqfd_signal(self.c, gsi, resample)
        self.irqfds[key].signal()
        assert status == Status.OK
        whom(self.door, self.c, NOBODY, result, self.p.targets)

    def resampled(self, gsi: int) -> int:
        count = self.door.ffi.new("uint64_t *")
        assert self.door.fx.irqfd_resampled(self.c, gsi, count) == Status.OK
        return count[0]

    def until(self, ns: int) -> None:
        """Time at both doors: whom the chips' own work is for, the last one's targets tell."""
        happened = [(index, out.effects) for index, out in self.p.set_time(ns)]
        told: list[tuple[int, int]] = []
        for result in self.door.set_time(self.c, ns, room=1):
            if result.vcpu != NOBODY:
                told.append((result.vcpu, result.effects))
            else:
                told += self.door.targets(self.c, NOBODY) or [(0, 0)]
        assert told == happened

    def close(self) -> None:
        assert self.door.fx.close(self.c) == Status.OK


def some_routes(rng: random.Random, split: bool) -> list[tuple[Any, ...]]:
    """A table, now and then a bad one."""
    routes: list[tuple[Any, ...]] = []
    for gsi in rng.sample([*range(30), 4095, 5000], rng.randrange(20)):
        if split or rng.random() < 0.4:
            address = 0xFEE0_0000 | rng.randrange(4) << 12 | (rng.random() < 0.02) << 32
            routes.append(("msi", min(gsi, 4095), address, rng.choice([0, 0x8000]) | rng.randrange(16, 256)))
            continue
        chips = [("ioapic", gsi, rng.randrange(24)), *(("pic", gsi, chip, rng.randrange(8)) for chip in (0, 1))]
        routes += rng.sample(chips, rng.randrange(1, 4))
    if rng.random() < 0.1:
        routes.append(("ioapic", 1, 1))
    return [route for route in routes if route[1] < 4096]


def step(pair: Pair, rng: random.Random, split: bool) -> None:
    """One random act at both doors."""
    v, kind, door, p = rng.randrange(3), rng.randrange(12), pair.door, pair.p
    gsi = rng.choice([0, 1, 4, 8, 9, 17, 18, 23, 24, 4095, 5000])
    if kind < 4:
        pair.line(gsi, rng.choice([0, 1, 1, 7]))
    elif kind == 4:
        pair.routing(some_routes(rng, split))
    elif kind == 5:
        pair.chip(rng.randrange(3), rng)
    elif kind == 6:
        pair.irqfd(gsi, not split and gsi < L.MAX_ROUTES and rng.random() < 0.4)
    elif kind == 7:
        pair.until(p.time + rng.choice([0, 54_000, 1_000_000, 12_000_000]))
    elif kind < 10 and not split:
        index, value = rng.choice([0, *range(0x10, 0x40)]), rng.choice([0, 1 << 24, 0x8041, 0x1_0042, 0x31, 0x831])
        for offset, word in ((0, index), (0x10, value)):
            out = p.vcpus[v].mem_write(0xFEC0_0000 + offset, word)
            status, result = door.mem_write(pair.c, v, 0xFEC0_0000 + offset, 4, word)
            check(result, status, out)
            whom(door, pair.c, v, result, p.vcpus[v].targets)
    elif kind == 10 and not split:
        port = rng.choice([0x20, 0x21, 0xA0, 0xA1, 0x4D0, 0x4D1, 0x40, 0x43, 0x61])
        if rng.random() < 0.3:
            read = p.vcpus[v].io_read(port)
            assert door.io_read(pair.c, v, port, 1)[1].value == read
        else:
            value = rng.choice([0x11, 0x20, 0x34, 0xFE, 0, 0x10, rng.randrange(256)])
            out = p.vcpus[v].io_write(port, value)
            status, result = door.io_write(pair.c, v, port, 1, value)
            check(result, status, out)
    else:
        if rng.random() < 0.5:
            assert door.vector("ack", pair.c, v) == p.vcpus[v].ack()
        out = p.vcpus[v].wrmsr(0x80B, 0)
        status, result = door.wrmsr(pair.c, v, 0x80B, 0)
        check(result, status, out)
        whom(door, pair.c, v, result, p.vcpus[v].targets)
        vector, level = door.ffi.new("uint32_t *"), door.ffi.new("uint32_t *")
        status = door.fx.get_ioapic_eoi(pair.c, v, vector, level)
        told = (vector[0], bool(level[0])) if status == Status.OK else None
        assert told == p.vcpus[v].ioapic_eoi


@compiled
@pytest.mark.parametrize(("python", "c"), KINDS, ids=[",".join(map(str, p.values())) or "vmx" for p, _ in KINDS])
@pytest.mark.parametrize("seed", range(2))
def test_the_same_acts(door: Door, python: dict, c: dict, seed: int) -> None:
    """Random acts of devices, guests and user space: equal results and machines after each of them."""
    pair, split = Pair(door, python, c), python.get("irqchip") == "split"
    rng = random.Random(f"{seed} {c}")
    pair.same()
    if not split:
        pair.p.create_pit()
        assert door.fx.create_pit(pair.c, 1) == Status.OK
        assert door.targets(pair.c, NOBODY) == list(pair.p.targets)
    for _ in range(150):
        step(pair, rng, split)
        pair.same()
    pair.close()


@compiled
def test_a_level_interrupt_from_line_to_eoi(door: Door) -> None:
    """The line, the EOI that the IOAPIC hears of, and what a line that is up still delivers."""
    pair = Pair(door, {}, {})
    for offset, word in ((0, 0x33), (0x10, 1 << 24), (0, 0x32), (0x10, 0x8041)):
        assert door.mem_write(pair.c, 0, 0xFEC0_0000 + offset, 4, word)[0] == Status.OK
        pair.p.vcpus[0].mem_write(0xFEC0_0000 + offset, word)
    assert pair.line(17, 1).accepted == 1
    assert pair.line(17, 1).accepted == -1
    assert door.vector("ack", pair.c, 1) == pair.p.vcpus[1].ack() == 0x41
    assert door.wrmsr(pair.c, 1, 0x80B, 0)[0] == Status.OK
    pair.p.vcpus[1].wrmsr(0x80B, 0)
    vector, level = door.ffi.new("uint32_t *"), door.ffi.new("uint32_t *")
    assert door.fx.get_ioapic_eoi(pair.c, 1, vector, level) == Status.OK
    assert (vector[0], level[0]) == (0x41, 1)
    assert door.vector("pending", pair.c, 1) == 0x41
    assert door.fx.get_ioapic_eoi(pair.c, 0, vector, level) == Status.NOTHING
    pair.same()
    pair.close()


@compiled
def test_a_resampling_irqfd(door: Door) -> None:
    """Its line stays up until the guest's EOI, which counts."""
    pair = Pair(door, {}, {})
    for offset, word in ((0, 0x32), (0x10, 0x8041)):
        door.mem_write(pair.c, 0, 0xFEC0_0000 + offset, 4, word)
    assert door.fx.irqfd_resample(pair.c, 17, 1) == Status.OK
    assert door.irqfd_signal(pair.c, 17, 1)[1].accepted == 1
    assert pair.resampled(17) == 0
    door.fx.enter(pair.c, 0, door.result)
    door.fx.reenter(pair.c, 0, door.result)
    assert door.vector("ack", pair.c, 0) == 0x41
    assert door.wrmsr(pair.c, 0, 0x80B, 0)[0] == Status.OK
    assert pair.resampled(17) == 1
    assert door.vector("pending", pair.c, 0) is None
    assert door.fx.irqfd_resample(pair.c, 17, 0) == Status.OK
    assert door.fx.irqfd_resample(pair.c, 17, 0) == Status.E_RANGE
    pair.close()


@compiled
def test_what_is_refused(door: Door) -> None:
    """A status for each mistake, and nothing has happened."""
    full, split = door.open(flags=Open.QUIET), door.open(flags=Open.SPLIT_IRQCHIP | Open.QUIET)
    ops, ffi = door.fx, door.ffi
    before = [door.snapshot(m) for m in (full, split)]
    state, count = ffi.new("uint8_t[512]"), ffi.new("uint64_t *")
    vector = ffi.new("uint32_t *")
    for size in (0, 511, 513):
        assert ops.get_irqchip(full, 0, state, size) == ops.set_irqchip(full, 0, state, size) == Status.E_SIZE
    for m, chip in ((full, 3), (full, 0xFFFF_FFFF), (split, 0), (split, 2)):
        assert ops.get_irqchip(m, chip, state, 512) == ops.set_irqchip(m, chip, state, 512) == Status.E_RANGE
    for null in (ops.get_irqchip, ops.set_irqchip):
        assert null(full, 0, ffi.NULL, 512) == Status.E_NULL
    assert ops.create_pit(split, 1) == Status.E_RANGE
    assert ops.get_pit(full, state, 112) == ops.set_pit(full, state, 112) == Status.NOTHING
    assert ops.get_pit(full, state, 72) == ops.set_pit(full, state, 111) == Status.E_SIZE
    assert ops.get_pit(full, ffi.NULL, 112) == ops.set_pit(full, ffi.NULL, 112) == Status.E_NULL
    for m, gsi in ((full, 4096), (full, 0xFFFF_FFFF), (split, 3)):
        assert ops.irqfd_resample(m, gsi, 1) == ops.irqfd_resampled(m, gsi, count) == Status.E_RANGE
    assert ops.irqfd_resample(full, 3, 0) == Status.E_RANGE
    assert ops.irqfd_resampled(full, 3, ffi.NULL) == ops.irq_line(full, 1, 1, ffi.NULL) == Status.E_NULL
    assert ops.get_ioapic_eoi(full, 2, vector, vector) == Status.E_VCPU
    assert ops.get_ioapic_eoi(full, 0, vector, ffi.NULL) == Status.E_NULL
    bad: list[tuple[Any, dict[str, int]]] = [
        (full, {"gsi": 4096, "kind": 1}),
        (full, {"gsi": 1, "kind": 0}),
        (full, {"gsi": 1, "kind": 5}),
        (full, {"gsi": 1, "kind": 1, "address": 24}),
        (full, {"gsi": 1, "kind": 1, "data": 1}),
        (full, {"gsi": 1, "kind": 2, "address": 16}),
        (full, {"gsi": 1, "kind": 2, "address": 1 << 63}),
        (full, {"gsi": 1, "kind": 3, "reserved": 1}),
        (full, {"gsi": 1, "kind": 4, "address": 1 << 32}),
        (split, {"gsi": 1, "kind": 1}),
        (split, {"gsi": 1, "kind": 2}),
    ]
    good = {"gsi": 0, "kind": 3, "address": 0xFEE0_0000, "data": 0x41}
    for m, wrong in bad:
        assert ops.set_gsi_routing(m, ffi.new("struct fx_route[]", [good, wrong]), 2) == Status.E_RANGE, wrong
    for twice in ({"gsi": 0, "kind": 3}, {"gsi": 0, "kind": 1}):
        assert ops.set_gsi_routing(full, ffi.new("struct fx_route[]", [good, twice]), 2) == Status.E_RANGE
    assert ops.set_gsi_routing(full, ffi.new("struct fx_route *"), 4097) == Status.E_RANGE
    assert ops.set_gsi_routing(full, ffi.NULL, 1) == Status.E_NULL
    assert [door.snapshot(m) for m in (full, split)] == before
    assert ops.set_gsi_routing(full, ffi.NULL, 0) == Status.OK
    assert door.irq_line(full, 1, 1)[1].accepted == -1
    assert {ops.close(full), ops.close(split)} == {Status.OK}
