"""The C door's loop for a host with a CPU of its own, settle and take, against Python's."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest

import fastexit as fx
from embedded import Door, compiled
from fastexit import events
from fastexit import layout as L
from fastexit import regs as R
from fastexit.embed.cabi import Open, Status
from fastexit.snapshot import regions
from test_cabi import pair

KINDS: dict[int, type] = {
    1: events.Interrupt,
    2: events.ExtInt,
    3: events.Nmi,
    4: events.Smi,
    5: events.Init,
    6: events.Sipi,
}
MACHINES: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({}, {}),
    ({"apicv": False, "irqchip": "split"}, {"flags": Open.NO_APICV | Open.SPLIT_IRQCHIP}),
    ({"vendor": "svm", "kernel": "6.12"}, {"vendor": 1, "kernel": 6}),
    ({"vendor": "svm", "apicv": False, "kernel": "5.10"}, {"vendor": 1, "kernel": 8, "flags": Open.NO_APICV}),
]


def words(snapshot: bytes) -> bytes:
    """A snapshot without how often SRCU was taken: behind an exit that lets something in, Python enters before it is
    taken, C after it.
    """
    body, at, n = np.frombuffer(snapshot[24:], dtype=np.uint64).copy(), 0, 3
    for part in regions(n):
        if part.start == L.KVM:
            body[at : at + n * L.KVM_STRIDE].reshape(n, L.KVM_STRIDE)[:, L.K_SRCU_LOCKS] = 0
        at += part.stop - part.start
    return body.tobytes()


def settled(door: Door, m: Any, v: int) -> bool:
    """What Vcpu.settle says, by calls of one thing each."""
    while (status := door.fx.settle(m, v, door.result)) == Status.MORE:
        pass
    assert status in (Status.OK, Status.BLOCKED, Status.USER), status
    assert door.result.status == status
    return status == Status.OK


def taken(door: Door, m: Any, v: int) -> events.Event | None:
    event = door.ffi.new("struct fx_event *")
    status = door.fx.take(m, v, event)
    if status != Status.OK:
        assert status == Status.NOTHING
        return None
    kind = KINDS[event.kind]
    return kind(event.vector) if "vector" in kind._fields else kind()  # type: ignore[attr-defined]


def set_cpu(door: Door, m: Any, v: int, **fields: int) -> None:
    cpu = door.ffi.new("struct fx_cpu *")
    assert door.fx.get_cpu(m, v, cpu) == Status.OK
    for name, value in fields.items():
        setattr(cpu, name, value)
    assert door.fx.set_cpu(m, v, cpu) == Status.OK


def both(door: Door, p: fx.Machine, m: Any, v: int, rng: random.Random) -> None:
    """Something happens at both doors."""
    cpu, kind = p.vcpus[v], rng.randrange(9)
    if kind == 0:
        flags = cpu.rflags ^ R.RFLAGS_IF
        cpu.rflags = flags
        set_cpu(door, m, v, rflags=flags)
    elif kind == 1:
        if cpu.nmi_masked:
            cpu.nmi_masked = False
        set_cpu(door, m, v, nmi_masked=0)
    elif kind == 2:
        cpu.shadow = 1 - cpu.shadow
        set_cpu(door, m, v, shadow=cpu.shadow)
    elif kind == 3:
        mode = rng.choice([0, 0, 4 << 8, 5 << 8 | 0x4000, 6 << 8, 2 << 8])
        waiting = [w.index for w in p.vcpus if p.mem[w.own + L.K_MP_STATE] == R.MP_INIT_RECEIVED]
        to, mode = (waiting[0], 6 << 8) if waiting else (rng.randrange(3), mode)
        icr = to << 32 | mode | rng.choice([0x31, 0x91, 0xE1])
        cpu.wrmsr(0x830, icr)
        door.wrmsr(m, v, 0x830, icr)
    elif kind == 4:
        cpu.nmi()
        assert door.fx.nmi(m, v) == Status.OK
    elif kind == 5:
        cpu.cr8 = value = rng.randrange(16)
        assert door.hw_cr8(m, v, value)[0] == Status.OK
    elif kind == 6 and cpu.smm:
        cpu.rsm()
        assert door.fx.rsm(m, v) == Status.OK
    elif kind == 7:
        hlt = 0x78 if p.vendor == "svm" else 12
        cpu.exit(hlt)
        door.exit(m, door.ffi.new("struct fx_exit *", {"vcpu": v, "reason": hlt}))
    else:
        p.signal_msi(0xFEE0_0000 | v << 12, 0x61)
        door.inject(m, 0xFEE0_0000 | v << 12, 0x61)


@compiled
@pytest.mark.parametrize(("python", "c"), MACHINES, ids=lambda given: "-".join(map(str, given.values())) or "default")
def test_the_same_events(door: Door, python: dict[str, Any], c: dict[str, Any]) -> None:
    """What goes in is the same at both doors, in the same order; after each step memory is."""
    p, m = pair(door, python, c)
    rng, seen = random.Random(str(python)), set()
    for step in range(800):
        v = rng.randrange(3)
        both(door, p, m, v, rng)
        assert words(door.snapshot(m)) == words(p.snapshot()), step
        runs = p.vcpus[v].settle()
        assert settled(door, m, v) == runs, step
        assert words(door.snapshot(m)) == words(p.snapshot()), step
        while (event := p.vcpus[v].take()) is not None:
            assert taken(door, m, v) == event, step
            seen.add(type(event))
            if isinstance(event, events.Interrupt) and rng.random() < 0.7:
                p.vcpus[v].wrmsr(0x80B, 0)
                door.wrmsr(m, v, 0x80B, 0)
        assert taken(door, m, v) is None
    assert seen >= {events.Interrupt, events.Nmi, events.Init, events.Sipi}
    door.fx.close(m)


@compiled
def test_numbers_are_pythons(door: Door) -> None:
    lib = door.ffi.dlopen(None)
    for name in ("INTERRUPT", "EXTINT", "NMI", "SMI", "INIT", "SIPI"):
        assert getattr(lib, f"FX_EVENT_{name}") << 8 == getattr(L, f"WENT_IN_{name}")


@compiled
def test_cpu_fields(door: Door) -> None:
    """NMI mask and real mode are set; SMM and CR8 are read."""
    m = door.open(flags=Open.QUIET)
    cpu = door.ffi.new("struct fx_cpu *")
    door.fx.get_cpu(m, 0, cpu)
    assert (cpu.real_mode, cpu.nmi_masked, cpu.smm, cpu.cr8) == (1, 0, 0, 0)
    set_cpu(door, m, 0, real_mode=0, nmi_masked=1)
    assert door.fx.smi(m, 0) == Status.OK
    while door.fx.settle(m, 0, door.result) == Status.MORE:
        pass
    assert taken(door, m, 0) == events.Smi()
    assert door.hw_cr8(m, 0, 9)[0] == Status.OK
    assert door.hw_cr8(m, 0, 16)[0] == Status.GP
    door.fx.get_cpu(m, 0, cpu)
    assert (cpu.real_mode, cpu.nmi_masked, cpu.smm, cpu.cr8) == (1, 1, 1, 9)
    assert door.fx.rsm(m, 0) == Status.OK
    for field in ("nmi_masked", "real_mode"):
        door.fx.get_cpu(m, 0, cpu)
        setattr(cpu, field, 2)
        assert door.fx.set_cpu(m, 0, cpu) == Status.E_RANGE
    door.fx.close(m)
