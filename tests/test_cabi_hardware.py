"""The C door's accesses that hardware virtualises, and user space's events, against the Python door."""

from __future__ import annotations

import random
from typing import Any

import pytest

import fastexit as fx
from embedded import Door, compiled
from fastexit import regs as R
from fastexit.embed.cabi import Open, Status
from test_cabi import check, pair, whom
from test_instruction import HW_MMIO_READ, HW_MMIO_WRITE, HW_RDMSR, HW_WRMSR, drawn

MACHINES: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({}, {}),
    ({"apicv": False, "kernel": "5.10"}, {"flags": Open.NO_APICV, "kernel": 8}),
    ({"ipiv": True, "kernel": "6.12"}, {"flags": Open.IPIV, "kernel": 6}),
    ({"vendor": "svm", "kernel": "6.12", "irqchip": "split"}, {"vendor": 1, "kernel": 6, "flags": Open.SPLIT_IRQCHIP}),
]


def access(door: Door, p: fx.Machine, c: object, v: int, rng: random.Random) -> None:
    """One drawn access at both doors."""
    cpu, (kind, where, length, value) = p.vcpus[v], drawn(rng)
    if kind == HW_WRMSR:
        out = cpu.hw_wrmsr(where, value)
        status, result = door.hw_wrmsr(c, v, where, value)
        assert result.vector == (value & 0xFF if where == 0x830 else 0)
    elif kind == HW_MMIO_WRITE:
        out = cpu.hw_mmio_write(where, value, length)
        status, result = door.hw_mmio_write(c, v, where, length, value)
    else:
        try:
            read = cpu.hw_rdmsr(where) if kind == HW_RDMSR else cpu.hw_mmio_read(where, length)
        except fx.GeneralProtection:
            read = None
        status, result = door.hw_rdmsr(c, v, where) if kind == HW_RDMSR else door.hw_mmio_read(c, v, where, length)
        assert (status == Status.GP) == (read is None)
        assert result.value == (read or 0)
        assert kind in (HW_RDMSR, HW_MMIO_READ)
        return
    check(result, status, out)
    whom(door, c, v, result, cpu.targets)


def event(door: Door, p: fx.Machine, c: object, v: int, rng: random.Random) -> None:
    """One of user space's events, or what a guest's CPU does."""
    cpu, name = p.vcpus[v], rng.choice(["nmi", "smi", "interrupt", "rsm", "hw_deliver", "run", "wrmsr"])
    if name in ("nmi", "smi"):
        getattr(cpu, name)()
        assert getattr(door.fx, name)(c, v) == Status.OK
    elif name == "interrupt":
        vector, accepted = rng.randrange(256), True
        try:
            cpu.interrupt(vector)
        except ValueError:  # ENXIO or EEXIST
            accepted = False
        assert (door.fx.interrupt(c, v, vector) == Status.OK) == accepted
    elif name == "rsm":
        inside = cpu.smm
        if inside:
            cpu.rsm()
        assert door.fx.rsm(c, v) == (Status.OK if inside else Status.NOTHING)
    elif name == "hw_deliver":
        assert door.vector("hw_deliver", c, v) == cpu.hw_deliver()
    elif name == "run":
        assert (door.fx.enter(c, v, door.result) == Status.OK) == cpu.run()
    else:
        check(door.wrmsr(c, v, 0x808, 0)[1], door.result.status, cpu.wrmsr(0x808, 0))


@compiled
@pytest.mark.parametrize(("python", "c"), MACHINES, ids=[",".join(map(str, p)) or "default" for p, _ in MACHINES])
def test_the_same_accesses_and_events(door: Door, python: dict[str, Any], c: dict[str, Any]) -> None:
    """Equal answers and, after each, equal memory."""
    p, m = pair(door, python, c)
    rng = random.Random(str(python))
    for v in range(3):
        cpu = door.ffi.new("struct fx_cpu *")
        door.fx.get_cpu(m, v, cpu)
        p.vcpus[v].rflags |= R.RFLAGS_IF
        cpu.rflags |= R.RFLAGS_IF
        door.fx.set_cpu(m, v, cpu)
    for step in range(400):
        (access if rng.random() < 0.7 else event)(door, p, m, rng.randrange(3), rng)
        assert door.snapshot(m) == p.snapshot(), step
    door.fx.close(m)


@compiled
def test_refusals(door: Door) -> None:
    """Arguments that no CPU has, a kernel without SMM, L2."""
    m = door.open(kernel=6, flags=Open.BOOT_X2APIC | Open.NO_SMM | Open.QUIET)
    before = door.snapshot(m)
    assert door.fx.smi(m, 0) == Status.E_RANGE
    assert door.fx.interrupt(m, 0, 256) == Status.E_RANGE
    for offset, length, value in ((0x1000, 4, 0), (0x80, 0, 0), (0x80, 3, 0), (0x80, 8, 0), (0x80, 1, 0x100)):
        assert door.hw_mmio_write(m, 0, offset, length, value)[0] == Status.E_RANGE
        if not value:
            assert door.hw_mmio_read(m, 0, offset, length)[0] == Status.E_RANGE
    assert door.snapshot(m) == before
    door.fx.close(m)
    p = fx.Machine(vcpus=1)
    p.vcpus[0].nested = True
    status, m = door.restore(p.snapshot())
    assert status == Status.OK
    assert door.hw_wrmsr(m, 0, 0x830, 0x41)[0] == Status.UNHANDLED
    assert door.snapshot(m) == p.snapshot()
    door.fx.close(m)
