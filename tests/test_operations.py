"""What verify's random operations reach: states that chance alone would hardly ever bring about. Without /dev/kvm."""

from __future__ import annotations

import random
from types import SimpleNamespace

import fastexit as fx
from fastexit import layout as L
from fastexit import regs as r
from fastexit.kvm import shrink
from fastexit.kvm.operations import apply, setup_ops
from fastexit.kvm.twins import View
from fastexit.kvm.values import register_value, xapic_destination

IDS = (0, 1, 300, 2, 7)


def grouped(seed: int) -> tuple[fx.Machine, SimpleNamespace]:
    """A machine behind the operations that give its vCPUs modes, and how they are seen then."""
    machine = fx.Machine(apic_ids=IDS, kernel="6.18", apicv=False, threads=False)
    views = [View(v.vcpu_id, v.apic_base, v.get_lapic()) for v in machine.vcpus]
    seen = SimpleNamespace(vcpus=views, x2apic=True)
    for op in setup_ops(random.Random(seed), seen):
        assert apply(machine, op) in (True, None)
    for view, v in zip(views, machine.vcpus):
        view.page, view.apic_base = v.get_lapic(), v.apic_base
    return machine, seen


def test_setups_reach_every_mode_of_the_logical_map() -> None:
    modes = set()
    for seed in range(60):
        machine, _ = grouped(seed)
        base = int(machine.mem[L.H_MAP])
        if machine.mem[base + L.MAP_PRESENT]:
            modes.add(int(machine.mem[base + L.MAP_LOGICAL]))
    names = ("SW_DISABLED", "CLUSTER", "FLAT", "X2APIC", "DISABLED")
    assert modes == {int(getattr(r, f"LOGICAL_{name}")) for name in names}


def test_destinations_of_xapics_mostly_mean_somebody() -> None:
    """Aimed at nobody, an xAPIC guest's IPIs would show nothing."""
    hits, tries = 0, 400
    rng = random.Random(1)
    for seed in range(20):
        _, seen = grouped(seed)
        somebody = {v.xapic_id for v in seen.vcpus} | {v.reg(r.APIC_LDR) >> 24 for v in seen.vcpus}
        hits += sum(xapic_destination(rng, seen) in somebody for _ in range(tries // 20))
    assert hits > tries // 2


def test_registers_get_reserved_bits_now_and_then() -> None:
    rng = random.Random(1)
    beyond = {r.APIC_TASKPRI: 0xFF, r.APIC_TDCR: r.TDCR_WRITABLE, r.APIC_SPIV: r.SVR_WRITABLE, r.APIC_LVTERR: 0x110FF}
    for offset, known in beyond.items():
        assert any(register_value(rng, offset) & ~known for _ in range(200)), hex(offset)


def test_operations_of_the_vm_keep_their_arguments_when_a_vcpu_goes() -> None:
    """What runs.py draws for the VM has no vCPU's index where others have it."""
    for op in (("route", (17, 18)), ("msr_filter", True, ((1, 0x800, 8, 3),), 7)):
        assert shrink._renamed(op, 0) == op
    assert shrink._renamed(("take", 2), 0) == ("take", 1)
