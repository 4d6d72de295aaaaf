"""The compiled loop's time against the Python loop's, exit by exit."""

from __future__ import annotations

import random
from contextlib import suppress
from typing import Any

import pytest

import fastexit as fx
from fastexit import layout as L
from fastexit import regs as R
from fastexit.costs.meter import TimedOutcome
from fastexit.costs.prices import PRICES, price_words
from fastexit.costs.profile import STAGES, cost_profile
from fastexit.jit.declare import load
from fastexit.vcpu import Vcpu
from test_instruction import HW_MMIO_READ, HW_MMIO_WRITE, HW_RDMSR, HW_WRMSR, drawn

MACHINES: list[dict[str, Any]] = [
    {"vendor": vendor, "kernel": kernel, **options}
    for kernel in ("seed-v3", "5.6", "5.8", "5.10", "5.15", "6.1", "6.6", "6.12", "6.18", "7.3")
    for vendor, options in (("vmx", {}), ("svm", {}), ("vmx", {"apicv": False, "irqchip": "split"}))
] + [
    {"ipiv": True, "kernel": "6.12"},
    {"vendor": "svm", "x2avic": True, "kernel": "6.6"},
    {"hyperv": True, "kernel": "6.12"},
    {"timer_advance_ns": 1000, "hv_timer": False, "apicv": False},
]


def priced(costs: str, **options: Any) -> fx.Machine:
    """A machine whose compiled loop adds up prices."""
    m = fx.Machine(dispatcher="compiled", **options)
    for word, value in price_words(cost_profile(costs), m.kernel).items():
        m.mem[word] = value
    m.mem[L.H_CONFIG] |= L.CONFIG_COSTS
    return m


def spent(v: Vcpu) -> tuple[int | None, int | None, int]:
    """cycles_ipi, cycles and cycles_spent of the last exit of a vCPU of such a machine."""
    mem, row = v.machine.mem, L.METER + v.index * L.METER_STRIDE
    waited = mem[v.own + L.K_WAITED] - mem[row + L.METER_WAITED]
    ghz = mem[L.PRICES + L.PRICE_GHZ] / (1 << 32)
    total = mem[row + L.METER_SPENT] + round(waited * ghz)
    ipi = mem[row + L.METER_IPI]
    in_guest = mem[v.hot + L.HOT_MODE] != R.OUTSIDE_GUEST_MODE
    return None if ipi == L.NONE else ipi, total if in_guest else None, total


def told(out: TimedOutcome) -> tuple[int | None, int | None, int]:
    return out.cycles_ipi, out.cycles, out.cycles_spent


def exits(v: Vcpu, rng: random.Random) -> tuple[str, tuple[Any, ...]]:
    """A drawn exit: the door, and what it takes."""
    hlt, interrupt = (0x78, 0x60) if v.machine.vendor == "svm" else (12, 1)
    access, where, length, value = drawn(rng)
    kind = rng.random()
    if kind < 0.5 and access in (HW_WRMSR, HW_RDMSR):
        return ("wrmsr", (where, value)) if access == HW_WRMSR else ("rdmsr", (where,))
    if kind < 0.5:
        return ("mmio_write", (where, value, length)) if access == HW_MMIO_WRITE else ("mmio_read", (where, length))
    if kind < 0.6:
        return "wrmsr", rng.choice(
            [(0x6E0, rng.randrange(1, 5000)), (0x832, 0x2_00EC), (0x838, 900), (0x832, 0x4_00EC)]
        )
    if kind < 0.7:
        return "exit", (rng.choice([hlt, interrupt]),)
    if kind < 0.78:
        fast = rng.choice([0, 1 << 16])
        return "hv_hypercall", rng.choice([(0x0B | fast, 0x41, 3), (0x15 | fast, 0x41, 1), (0x5D | fast, 1), (8,)])
    if kind < 0.86:
        gpa = 0xFEC0_0000 + rng.choice([0, 0x10, 0x40])
        return "mem_write", (gpa, rng.choice([0x10, 0x11, 0x12, 0x13, 0x51, 0x80_0031]), 4)
    if kind < 0.92:
        return rng.choice([("io_write", (0x20, 0x20, 1)), ("io_read", (0x21, 1)), ("io_write", (0x80, 1, 1))])
    if not v.apic_base & R.APICBASE_EXTD:
        return "mmio_write", rng.choice([(0x310, rng.randrange(3) << 24, 4), (0x300, 0x41, 4), (0x300, 0xC_0041, 4)])
    return "wrmsr", (0x830, fx.icr(dest=rng.randrange(3), vector=rng.randrange(16, 256)))


def between(pair: list[fx.Machine], rng: random.Random) -> None:
    """What is no exit."""
    kind, index, vector = rng.random(), rng.randrange(3), rng.randrange(16, 256)
    for m in pair:
        v = m.vcpus[index]
        if kind < 0.3:
            m.signal_msi(0xFEE0_0000 | index << 12, vector)
        elif kind < 0.5:
            v.hw_notify()
            v.ack()
        elif kind < 0.7:
            m.set_time(m.time + vector * 10)
        elif kind < 0.8:
            v.rflags ^= R.RFLAGS_IF
        elif kind < 0.9:
            v.nmi()
        elif m.vcpus[0].machine.costs is None:
            load("door_run")(m.handle, index)
        else:
            v.run()
    if 0.9 <= kind:
        timed, plain = (m.vcpus[index] for m in pair)
        assert timed.run_cycles == spent(plain)[2]  # type: ignore[attr-defined]


@pytest.mark.parametrize("options", MACHINES, ids=lambda options: "-".join(map(str, options.values())))
@pytest.mark.parametrize("x2apic", [False, True])
def test_the_same_time(options: dict[str, Any], x2apic: bool) -> None:
    """Exits of every kind, fast and generic, that wait, fault and leave; with timers, ticks and injections."""
    costs = "epyc" if options.get("vendor") == "svm" else "skylake-retpoline"
    pair = [fx.Machine(vcpus=3, costs=costs, **options), priced(costs, vcpus=3, **options)]
    rng = random.Random(f"{options} {x2apic}")
    for m in pair:
        if x2apic:
            m.boot_x2apic()
        if options.get("hyperv"):
            m.guest_memory = bytearray(1 << 16)
            m.vcpus[0].wrmsr(0x4000_0000, 1)
        for v in m.vcpus:
            v.real_mode = False
            if not x2apic:
                v.mmio_write(0xF0, 0x1FF)
    with_ipi = 0
    for step in range(250):
        if rng.random() < 0.25:
            between(pair, rng)
            continue
        index = rng.randrange(3)
        timed, plain = (m.vcpus[index] for m in pair)
        name, args = exits(timed, rng)
        with suppress(fx.GeneralProtection, fx.InvalidOpcode):
            getattr(timed, name)(*args)
        if name == "hv_hypercall":
            load("door_hypercall")(plain.machine.handle, index, *args, *(0,) * (3 - len(args)))
        else:
            with suppress(fx.GeneralProtection):
                getattr(plain, name)(*args)
        assert pair[0].snapshot() == pair[1].snapshot(), (step, name, args)
        assert told(timed.timed) == spent(plain), (step, index, name, args, timed.timed.charges)  # type: ignore[attr-defined]
        with_ipi += timed.timed.cycles_ipi is not None  # type: ignore[attr-defined]
    assert with_ipi


@pytest.mark.parametrize("options", MACHINES, ids=lambda options: "-".join(map(str, options.values())))
def test_hardware(options: dict[str, Any]) -> None:
    """Accesses that the CPU does by itself, and the exits that it makes of others."""
    costs = "epyc" if options.get("vendor") == "svm" else "ipiv-host"
    pair = [fx.Machine(vcpus=3, costs=costs, **options), priced(costs, vcpus=3, **options)]
    rng = random.Random(str(options))
    for m in pair:
        m.boot_x2apic()
        for v in m.vcpus:
            v.ioapic_handled = {0x31, 0x51}
            v.rflags |= R.RFLAGS_IF
    for step in range(200):
        if rng.random() < 0.25:
            between(pair, rng)
            continue
        index, (access, where, length, value) = rng.randrange(3), drawn(rng)
        timed, plain = (m.vcpus[index] for m in pair)
        load("door_access")(plain.machine.handle, index, access, where, length, value)
        if access == HW_WRMSR:
            timed.hw_wrmsr(where, value)
        elif access == HW_MMIO_WRITE:
            timed.hw_mmio_write(where, value, length)
        elif access == HW_MMIO_READ:
            timed.hw_mmio_read(where, length)
        else:
            with suppress(fx.GeneralProtection):
                timed.hw_rdmsr(where)
        assert pair[0].snapshot() == pair[1].snapshot(), (step, access, where)
        if timed.timed is not None:  # type: ignore[attr-defined] # a #GP of the CPU's own has no outcome to a read
            assert told(timed.timed) == spent(plain), (step, access, where)  # type: ignore[attr-defined]


def test_every_price_is_known() -> None:
    """Each price of the layout has its stages, and every stage that a loop charges has a price."""
    prices = {value for name, value in vars(L).items() if name.startswith("P_") and type(value) is int}
    assert prices == set(PRICES)
    charged = {stage for price in PRICES.values() for stage in (*price.stages, *price.direct)}
    assert set(STAGES) - charged == {"vendor_call", "flight", "posted", "schedule", "guest_irq"}
