"""Accesses as the guest's CPU executes them: the compiled half, which the C door calls, against Vcpu.hw_*."""

from __future__ import annotations

import random
from typing import Any

import pytest

import fastexit as fx
from fastexit import regs as R
from fastexit.jit.declare import load
from fastexit.outcome import CODE_GP, OUTCOMES

HW_WRMSR, HW_RDMSR, HW_MMIO_WRITE, HW_MMIO_READ = range(4)
MACHINES: list[dict[str, Any]] = [
    {"vendor": vendor, "kernel": kernel, **options}
    for kernel in ("seed-v3", "5.10", "6.1", "6.12", "7.3")
    for vendor, options in (
        ("vmx", {}),
        ("vmx", {"apicv": False}),
        ("vmx", {"irqchip": "split"}),
        ("svm", {}),
        ("svm", {"irqchip": "split"}),
    )
] + [
    {"ipiv": True, "kernel": "6.12"},
    {"vendor": "svm", "x2avic": True, "kernel": "6.6"},
    {"vendor": "svm", "ipiv": False},
]


def drawn(rng: random.Random) -> tuple[int, int, int, int]:
    """Access, MSR or offset, length, value."""
    access = rng.choice([HW_WRMSR, HW_WRMSR, HW_MMIO_WRITE, HW_MMIO_WRITE, HW_RDMSR, HW_MMIO_READ])
    icr = (
        rng.choice([0, 1, 2, 3, 0xFF]) << 32
        | rng.choice([0, 0, 0, 0x800, 1 << 18, 3 << 18, 0x4400])
        | rng.randrange(256)
    )
    if access < HW_MMIO_WRITE:
        if rng.random() < 0.3:
            return HW_WRMSR, *rng.choice([(0x808, 0, rng.choice([0, 0xF0])), (0x80B, 0, 0), (0x830, 0, icr & ~0xC4D00)])
        msr = rng.choice(
            [0x830, 0x830, 0x80B, 0x808, 0x83F, 0x80F, 0x802, 0x832, 0x838, 0x839, 0x80A, 0x6E0, 0x123, 0x828]
        )
        value = rng.choice([icr, icr, rng.randrange(256), 0, 1 << 20, 0x2_00EC])
        return access, msr, 0, 0 if access == HW_RDMSR else value
    offset = rng.choice(
        [0x300, 0x310, 0xB0, 0x80, 0xF0, 0x20, 0xD0, 0xE0, 0x320, 0x380, 0x390, 0xA0, 0x280, 0x370, 0xFFC]
    )
    offset, length = (offset, 4) if rng.random() < 0.8 else (offset + rng.randrange(4), rng.choice([1, 2, 4]))
    offset = min(offset, 0xFFF)
    value = rng.choice([icr & 0xFFFF_FFFF, rng.randrange(4) << 24, 0x1FF, rng.randrange(256), 0xFFFF_FFFF])
    return access, offset, length, 0 if access == HW_MMIO_READ else value & (1 << 8 * length) - 1


def by_python(v: fx.Vcpu, access: int, where: int, length: int, value: int) -> tuple[object, int | None]:
    """The outcome of a write, or what was read; None for #GP."""
    if access == HW_WRMSR:
        return v.hw_wrmsr(where, value), None
    if access == HW_MMIO_WRITE:
        return v.hw_mmio_write(where, value, length), None
    if access == HW_MMIO_READ:
        return None, v.hw_mmio_read(where, length)
    try:
        return None, v.hw_rdmsr(where)
    except fx.GeneralProtection:
        return None, None


def by_kernel(v: fx.Vcpu, access: int, where: int, length: int, value: int) -> tuple[object, int | None]:
    code = load("door_access")(v.machine.handle, v.index, access, where, length, value)
    if access in (HW_WRMSR, HW_MMIO_WRITE):
        return OUTCOMES[code], None
    return None, None if code & CODE_GP and access == HW_RDMSR else v.read_data


@pytest.mark.parametrize("options", MACHINES, ids=lambda options: "-".join(map(str, options.values())))
@pytest.mark.parametrize("x2apic", [False, True])
def test_the_same_accesses(options: dict[str, Any], x2apic: bool) -> None:
    """Equal outcomes, trace lines and, after each access, equal memory; exits, messages and entries come in between."""
    rng = random.Random(f"{options} {x2apic}")
    pair = [fx.Machine(vcpus=3, **options) for _ in range(2)]
    for m in pair:
        if x2apic:
            m.boot_x2apic()
        for v in m.vcpus:
            if not x2apic:
                v.mmio_write(0xF0, 0x1FF)
                v.mmio_write(0xD0, 1 << 24 + v.index)
            v.ioapic_handled = {0x31, 0x51}
            v.rflags |= R.RFLAGS_IF
        m.trace.enable()
    for step in range(120):
        index, kind = rng.randrange(3), rng.random()
        drawing = drawn(rng)
        vector = rng.choice([0x31, 0x51, 0x90, rng.randrange(16, 256)])
        said = []
        for m, act in zip(pair, (by_python, by_kernel), strict=True):
            v = m.vcpus[index]
            if kind < 0.75:
                said.append((act(v, *drawing), v.targets))
            elif kind < 0.85:
                said.append((m.signal_msi(0xFEE0_0000 | index << 12, vector), m.targets))
            elif kind < 0.92:
                said.append((v.hw_notify(), v.ack() if vector == 0x90 else v.hw_deliver()))
            else:
                said.append((v.run(), v.exit_reason))
        assert said[0] == said[1], (step, drawing)
        assert pair[0].snapshot() == pair[1].snapshot(), (step, drawing)
    assert pair[0].trace.lines() == pair[1].trace.lines()
    assert len(pair[0].trace)


def test_l2_and_replaced_handlers_are_left_alone() -> None:
    """What Python alone can do is said so, and nothing has been touched."""
    m = fx.Machine(vcpus=1)
    m.boot_x2apic()
    m.vcpus[0].nested = True
    before = m.snapshot()
    assert load("door_access")(m.handle, 0, HW_WRMSR, 0x830, 0, 0x41) == (1 << 64) - 1
    assert m.snapshot() == before


@pytest.mark.parametrize("options", MACHINES, ids=lambda options: "-".join(map(str, options.values())))
def test_windows_and_cr8(options: dict[str, Any]) -> None:
    """MOV to CR8, and the exits of windows that have opened: equal outcomes, trace lines and memory."""
    rng = random.Random(str(options))
    pair = [fx.Machine(vcpus=2, **options) for _ in range(2)]
    windows = set()
    for m in pair:
        m.boot_x2apic()
        m.trace.enable()
    for step in range(200):
        index, kind, value = rng.randrange(2), rng.random(), rng.randrange(17)
        vector = rng.choice([0x31, 0x91, 0xE1])
        said: list[object] = []
        for m, python in zip(pair, (True, False), strict=True):
            v = m.vcpus[index]
            vendor = m.dispatcher.vendor
            if kind < 0.3 and python:
                said.append(m.hardware.move_to_cr8(v, value))
            elif kind < 0.3:
                said.append(load("door_access")(m.handle, index, 4, 0, 0, value))
            elif kind < 0.5 and (v.irq_window or v.nmi_window):
                nmi = v.nmi_window
                windows.add(nmi)
                reason = vendor.nmi_window_reason if nmi else vendor.window_reason
                code = 0 if python else load("door_window")(m.handle, index, int(nmi))
                said.append(v.exit(reason) if python else OUTCOMES[code])
            elif kind < 0.6:
                v.nmi()
            elif kind < 0.7:
                v.rflags ^= R.RFLAGS_IF
            elif kind < 0.75:
                v.nmi_masked = False
            elif kind < 0.9:
                m.signal_msi(0xFEE0_0000 | index << 12, vector)
            else:
                v.wrmsr(0x80B, 0)
        assert not said or said[0] == said[1], (step, kind)
        assert pair[0].snapshot() == pair[1].snapshot(), (step, kind)
    assert pair[0].trace.lines() == pair[1].trace.lines()
    assert windows
