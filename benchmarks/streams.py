"""What the benchmarks feed: ICR writes of one vCPU, each followed by its target taking the interrupt."""

from __future__ import annotations

import numpy as np

import fastexit as fx
from fastexit import layout as L
from fastexit import regs as R
from fastexit.insight.compare import booted

KERNEL = "6.18"


def machine(vcpus: int, *, threads: bool = True, kernel: str = KERNEL) -> fx.Machine:
    """vCPUs in guest mode and x2APIC mode, APICv on, tracing off."""
    return booted(kernel, "vmx", vcpus, threads=threads)


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
