"""Machines for Windows guests, and what their tests look at: records of tracepoints, bytes of the guest's memory."""

from __future__ import annotations

from typing import Any

import fastexit as fx
from fastexit import hyperv as hv
from fastexit import layout as L
from fastexit import regs as r
from fastexit.profile import since

VENDORS = ("vmx", "svm")
OS_ID = 0x0001_0A00_0000_4A61
PAGE = 0x5000
SHOWN = {
    L.TP_APIC_IPI: ("ipi", 2),
    L.TP_ACCEPT_IRQ: ("accept", 2),
    L.TP_APIC_WRITE: ("apic_write", 2),
    L.TP_APIC_READ: ("apic_read", 2),
    L.TP_EOI: ("eoi", 1),
    L.TP_PV_EOI: ("pv_eoi", 1),
    L.TP_MSR_WRITE: ("msr_write", 3),
    L.TP_MSR_READ: ("msr_read", 3),
    L.TP_HV_NOTIFY_ACKED_SINT: ("acked", 1),
    L.TP_HV_SYNIC_SET_IRQ: ("synic_irq", 3),
    L.TP_HV_SYNIC_SEND_EOI: ("synic_eoi", 1),
    L.TP_HV_SYNIC_SET_MSR: ("synic_msr", 3),
    L.TP_SET_IRQ: ("set_irq", 3),
    L.TP_APICV_INHIBIT_CHANGED: ("inhibit", 3),
    L.TP_USERSPACE_EXIT: ("user", 1),
}
"""Event -> a short name, and how many of its arguments tests compare."""


def booted(kernel: str = "6.18", vendor: str = "vmx", x2apic: bool = True, **options: Any) -> fx.Machine:
    """A machine whose CPUID says "Hv#1"; vCPU 0 runs, and tracing is on from here."""
    options = {"apicv": False, "hyperv": True} | options
    if "apic_ids" not in options:
        options.setdefault("vcpus", 3)
    m = fx.Machine(kernel=kernel, vendor=vendor, **options)
    if x2apic:
        m.boot_x2apic()
    else:
        for v in m.vcpus:
            v.mmio_write(r.APIC_SPIV, 0x1FF)
    m.vcpus[0].wrmsr(0xC000_0080, 0)
    m.trace.enable()
    return m


def shown(m: fx.Machine, *names: str) -> list[tuple[Any, ...]]:
    """The records since the last look, each as its short name and arguments; of these names alone, if any are given."""
    found: list[tuple[Any, ...]] = []
    for record in m.trace.records():
        name, n = SHOWN.get(int(record["event"]), ("", 0))
        if name and (not names or name in names):
            found.append((name, *(int(a) for a in record["args"][:n])))
    m.trace.clear()
    return found


def synic(kernel: str = "6.18", version: int = 1, **options: Any) -> fx.Machine:
    """As booted, with a SynIC at every vCPU; vCPU 0 runs."""
    m = booted(kernel, **options)
    for v in m.vcpus:
        v.enable_synic(version)
    m.vcpus[0].wrmsr(hv.MSR_HV_GUEST_OS_ID, OS_ID)
    m.trace.clear()
    return m


def deliver(m: fx.Machine, vector: int, index: int = 0) -> fx.Vcpu:
    """A fixed interrupt is injected into a vCPU: it runs, and takes what waits."""
    v = m.vcpus[index]
    v.rflags |= r.RFLAGS_IF
    m.signal_msi(0xFEE0_0000 | v.vcpu_id << 12, vector)
    v.exit(fx.SvmExit.INTERRUPT if m.vendor == "svm" else fx.VmxExit.EXTERNAL_INTERRUPT)
    return v


def leave(m: fx.Machine, index: int = 0) -> None:
    """An exit that asks for nothing."""
    m.vcpus[index].exit(fx.SvmExit.INTERRUPT if m.vendor == "svm" else fx.VmxExit.EXTERNAL_INTERRUPT)


def gated(kernel: str) -> bool:
    """5.15 began to ask for "Hv#1"."""
    return since(kernel, "5.15")


def halves(kernel: str) -> bool:
    """Before 6.0 the ICR was written and read as two registers."""
    return not since(kernel, "6.1")
