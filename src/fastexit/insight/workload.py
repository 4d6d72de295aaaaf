"""Streams of exits that stand for something, and what they cost: IPIs between vCPUs that run and take what they get.

An array of exits says nothing about the other side of an IPI. A target that was never in the guest is not notified, and
one that has not taken its last interrupt need not be notified again; both make an IPI look cheaper than it is. A
workload enters every vCPU first and lets each target take its interrupt before the next one is sent.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from fastexit import layout as L
from fastexit import regs as R
from fastexit.checks import integer
from fastexit.costs.batch import batch_cycles
from fastexit.costs.profile import Costs
from fastexit.machine import Machine


class Measured(NamedTuple):
    """What each IPI of a workload came to, in order: arrays of one element an IPI.

    ``outcomes`` are records of layout.OUTCOME (path, refusal, accepted, ...). ``cycles_ipi`` are modelled cycles until
    the IPI left, ``cycles`` until the sender runs its next instruction; NaN where a cost table cannot tell.
    """

    outcomes: np.ndarray
    cycles_ipi: npt.NDArray[np.float64]
    cycles: npt.NDArray[np.float64]


@dataclass(frozen=True)
class Workload:
    """Exits of one machine: ``exits`` are what Machine.run takes, ``ipi`` marks the records that are the IPIs."""

    machine: Machine
    exits: np.ndarray
    ipi: npt.NDArray[np.bool_]

    def run(self, costs: Costs | None = None) -> Measured:
        """Run all exits in one compiled call and give what the IPIs came to.

        ``costs`` is a cost profile or its name, by default the machine's. ValueError where there is none.
        """
        outcomes = self.machine.run(self.exits)
        cycles_ipi, cycles = batch_cycles(self.machine, self.exits, outcomes, costs, quiet=True)
        return Measured(outcomes[self.ipi], cycles_ipi[self.ipi], cycles[self.ipi])


def enter(machine: Machine) -> None:
    """Bring every vCPU into the guest, as KVM_RUN of a vCPU that runs guest code does."""
    for v in machine.vcpus:
        machine.dispatcher.start_run(v)


def ipis(
    machine: Machine,
    n: int,
    *,
    senders: Iterable[int] = (0,),
    targets: Iterable[int] | None = None,
    vectors: range = range(32, 256),
    seed: int = 1,
) -> Workload:
    """Make ``n`` Fixed, physical IPIs for one target each, and let each target take what it is sent.

    ``senders`` take turns. Each IPI's target is drawn from ``targets`` (by default every vCPU that does not send) and
    its vector from ``vectors``; both are vCPU indices of the machine, which is booted into x2APIC mode unless it is,
    and whose vCPUs all enter the guest now. How a target takes an interrupt depends on the machine: posted on VMX, the
    notification reaches its CPU; with AVIC the CPU needs nothing more; without either, the kick makes it exit, the next
    entry injects and an EOI follows.

    ValueError for an index outside the machine, a machine without a target, or vectors outside 16..255.
    """
    n = integer(n, "number of IPIs", 1 << 40)
    last = len(machine.vcpus) - 1
    sending = np.array([integer(v, "sender", last) for v in senders], dtype=np.uint32)
    others = [v for v in range(last + 1) if v not in set(sending.tolist())] if targets is None else targets
    to = np.array([integer(v, "target", last) for v in others], dtype=np.uint32)
    if not len(sending) or not len(to):
        raise ValueError(f"an IPI needs a sender and a target: {len(sending)} senders, {len(to)} targets")
    if not len(vectors) or min(vectors) < 16 or max(vectors) > 255:
        raise ValueError(f"vectors {vectors} are not within 16..255")
    if not machine.vcpus[0].apic_base & R.APICBASE_EXTD:
        machine.boot_x2apic()
    for v in machine.vcpus:
        v.rflags |= R.RFLAGS_IF
    enter(machine)

    vendor = machine.dispatcher.vendor
    rng = np.random.default_rng(seed)
    dest = rng.choice(to, n)
    ids = np.array([v.vcpu_id for v in machine.vcpus], dtype=np.uint64)
    write = np.zeros(1, dtype=L.EXIT)
    write["reason"], write["info"] = vendor.wrmsr_reason, vendor.wrmsr_info1
    taking = _taking(machine, write)
    exits = np.zeros((n, 1 + len(taking)), dtype=L.EXIT)
    exits[:, 0] = write
    exits["vcpu"][:, 0] = np.resize(sending, n)
    exits["msr"][:, 0] = R.MSR_X2APIC_ICR
    exits["value"][:, 0] = ids[dest] << np.uint64(R.ICR.shift("DEST")) | rng.choice(np.array(vectors), n).astype("u8")
    exits[:, 1:] = taking
    exits["vcpu"][:, 1:] = dest[:, None]
    ipi = np.zeros(exits.shape, dtype=np.bool_)
    ipi[:, 0] = True
    return Workload(machine, exits.reshape(-1), ipi.reshape(-1))


def _taking(machine: Machine, write: np.ndarray) -> np.ndarray:
    """The records by which a target takes one interrupt. APICv may be inhibited, as AVIC is by an old kernel."""
    apicv = all(v.apicv for v in machine.vcpus)
    if apicv and machine.vendor == "svm":
        return np.zeros(0, dtype=L.EXIT)
    if apicv:
        records = np.zeros(1, dtype=L.EXIT)
        records["reason"] = L.NOTIFICATION
        return records
    records = np.zeros(2, dtype=L.EXIT)
    records["reason"][0] = machine.dispatcher.vendor.interrupt_reason
    records[1] = write[0]
    records["msr"][1] = R.MSR_X2APIC_BASE + (R.APIC_EOI >> 4)
    return records
