"""What the benchmarks feed: ICR writes of one vCPU, each followed by its target taking the interrupt."""

from __future__ import annotations

import numpy as np

import fastexit as fx
from fastexit import layout as L
from fastexit import regs as R
from fastexit.insight.compare import booted

KERNEL = "6.18"


def machine(vcpus: int, *, threads: bool = True, kernel: str = KERNEL, apicv: bool = True) -> fx.Machine:
    """vCPUs in guest mode and x2APIC mode, tracing off."""
    return booted(kernel, "vmx", vcpus, threads=threads, apicv=apicv)


def ipis(m: fx.Machine, n: int, *, senders: range | None = None, targets: range | None = None, seed: int = 1):
    """2n records: a fixed physical unicast, target and vector (32..255) uniform, then the target's notification.

    No IPI is cheap because another one is pending: its target took everything that was posted to it before.
    Senders take turns and never hit themselves; by default vCPU 0 sends to all others.
    """
    senders = senders or range(1)
    targets = targets or range(1, len(m.vcpus))
    rng = np.random.default_rng(seed)
    to = rng.integers(targets.start, targets.stop, n, dtype=np.uint64)
    exits = np.zeros(2 * n, dtype=L.EXIT)
    exits["vcpu"][0::2] = np.resize(np.array(senders, dtype=np.uint32), n)
    exits["reason"][0::2] = m.dispatcher.vendor.wrmsr_reason
    exits["msr"][0::2] = R.MSR_X2APIC_ICR
    exits["value"][0::2] = to << np.uint64(32) | rng.integers(32, 256, n, dtype=np.uint64)
    exits["vcpu"][1::2] = to
    exits["reason"][1::2] = L.NOTIFICATION
    return exits


PINS = range(16, L.IOAPIC_PINS)
"""Of the IOAPIC, without a PIC behind their GSIs: each has a vCPU and a vector of its own in `wired`."""


def wired(m: fx.Machine, level: bool = False) -> fx.Machine:
    """A machine whose pins of the IOAPIC are programmed: pin n, vector 0x30 + n, to vCPU n - 15."""
    v = m.vcpus[0]
    for pin in PINS:
        entry = (pin - 15) << R.REDIR_DEST_SHIFT | (R.REDIR_LEVEL if level else 0) | 0x30 + pin
        for half in (0, 1):
            v.mem_write(R.IOAPIC_DEFAULT_BASE, 0x10 + 2 * pin + half)
            v.mem_write(R.IOAPIC_DEFAULT_BASE + 0x10, entry >> 32 * half & 0xFFFF_FFFF)
    for other in m.vcpus:  # who was told to look for its vectors has left the guest for it
        other.wrmsr(R.MSR_X2APIC_BASE + (R.APIC_TASKPRI >> 4), 0)
    return m


def lines(m: fx.Machine, n: int) -> np.ndarray:
    """3n records: the line of an edge-triggered pin goes up, its vCPU takes what was posted, the line goes down."""
    wired(m)
    pins = np.resize(np.array(PINS, dtype=np.uint32), n)
    exits = np.zeros(3 * n, dtype=L.EXIT)
    exits["reason"][0::3] = exits["reason"][2::3] = L.IRQ_LINE
    exits["msr"][0::3] = exits["msr"][2::3] = pins
    exits["info"][0::3] = 1
    exits["vcpu"][1::3] = pins - 15
    exits["reason"][1::3] = L.NOTIFICATION
    return exits


def ioapic_reads(m: fx.Machine, n: int) -> np.ndarray:
    """n records: a guest reads the IOAPIC's window."""
    exits = np.zeros(n, dtype=L.EXIT)
    exits["reason"] = m.dispatcher.vendor.mmio_reason
    exits["info"] = 4
    exits["gpa"] = R.IOAPIC_DEFAULT_BASE + 0x10
    return exits


def level_eois(m: fx.Machine, n: int) -> np.ndarray:
    """4n records, without APICv: a level-triggered line up, its kicked vCPU takes it, the line down, the vCPU's EOI."""
    wired(m, level=True)
    for v in m.vcpus:
        v.rflags |= R.RFLAGS_IF
    pins = np.resize(np.array(PINS, dtype=np.uint32), n)
    exits = np.zeros(4 * n, dtype=L.EXIT)
    exits["reason"][0::4] = exits["reason"][2::4] = L.IRQ_LINE
    exits["msr"][0::4] = exits["msr"][2::4] = pins
    exits["info"][0::4] = 1
    exits["vcpu"][1::4] = exits["vcpu"][3::4] = pins - 15
    exits["reason"][1::4] = m.dispatcher.vendor.interrupt_reason
    exits["reason"][3::4] = m.dispatcher.vendor.wrmsr_reason
    exits["msr"][3::4] = R.MSR_X2APIC_BASE + (R.APIC_EOI >> 4)
    return exits


OF_DEVICES = {"irq_line": lines, "IOAPIC page access": ioapic_reads, "EOI of a level interrupt": level_eois}
"""Streams of counted.py that are no IPIs."""
