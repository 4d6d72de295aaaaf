"""Machines with a clock, and one IPI on them."""

from __future__ import annotations

import fastexit as fx
from fastexit.costs.meter import TimedOutcome

RETPOLINE, OFF = "skylake-retpoline", "skylake-mitigations-off"
ICR, EOI, TPR, DEADLINE = 0x830, 0x80B, 0x808, 0x6E0
MACHINES = [(kernel, vendor, apicv) for kernel in fx.profiles() for vendor in ("vmx", "svm") for apicv in (True, False)]


def booted(kernel: str = "6.18", costs: str | fx.CostProfile | None = RETPOLINE, **options: object) -> fx.Machine:
    """Four vCPUs in the guest, nothing pending."""
    m = fx.Machine(vcpus=4, kernel=kernel, costs=costs, **options)
    m.boot_x2apic()
    for v in m.vcpus:
        v.wrmsr(TPR, 0)
        v.wrmsr(TPR, 0)
    return m


def ipi(kernel: str = "6.18", fast: bool = True, **options: object) -> TimedOutcome:
    m = booted(kernel, **options)
    m.fastpath = fast
    return m.vcpus[0].wrmsr(ICR, fx.icr(dest=1, vector=0xFD))


def stages(out: TimedOutcome) -> dict[str, int]:
    counts: dict[str, int] = {}
    for charge in out.charges:
        counts[charge.stage] = counts.get(charge.stage, 0) + charge.count
    return counts
