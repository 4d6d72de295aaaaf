"""What a guest's interrupts did: counted while it runs, by vCPU, path and kernel generation.

Models: nothing. Which generation takes an IPI fast is asked of one model of each, as `fastexit replay` does it.
"""

from __future__ import annotations

import threading
from collections import Counter
from typing import TYPE_CHECKING

from fastexit import regs as R
from fastexit.outcome import Outcome, Path
from fastexit.trace.generations import Generations

if TYPE_CHECKING:
    from fastexit.machine import Machine
    from fastexit.trace.report import Generation
    from fastexit.vcpu import Vcpu

EOI_MSR = R.MSR_X2APIC_BASE + (R.APIC_EOI >> 4)


class Recorder:
    """Counts of one machine: per vCPU what it wrote, and by which path."""

    def __init__(self, machine: Machine) -> None:
        count = len(machine.vcpus)
        self._lock = threading.Lock()
        ids = [v.vcpu_id for v in machine.vcpus]
        self._generations = Generations(machine, ids, "full", 0, hv_timer=False)
        self.icr_writes: list[int] = [0] * count
        self.eois: list[int] = [0] * count
        self.deadlines: list[int] = [0] * count
        self.paths: list[Counter[Path]] = [Counter() for _ in range(count)]
        """WRMSRs and writes of the xAPIC page by the path that they took."""

    def ipi(self, v: Vcpu, msr: int, value: int) -> None:
        """An ICR or SELF_IPI is about to be written."""
        self.icr_writes[v.index] += 1
        with self._lock:
            self._generations.count(v.index, msr, value)

    def page(self, v: Vcpu, offset: int, value: int) -> None:
        """The ICR's low half, or EOI, of the xAPIC page is about to be written."""
        if offset == R.APIC_EOI:
            self.eois[v.index] += 1
            return
        self.icr_writes[v.index] += 1
        with self._lock:
            self._generations.count_mmio(v.index, value)

    def wrote(self, vcpu: int, msr: int, outcome: Outcome) -> None:
        """What a write came to."""
        self.paths[vcpu][outcome.path] += 1
        if msr == EOI_MSR:
            self.eois[vcpu] += outcome.fault is None
        elif msr == R.MSR_TSC_DEADLINE:
            self.deadlines[vcpu] += 1

    def generations(self) -> list[Generation]:
        """For each generation how many of the IPIs it takes fast, and why not the others."""
        with self._lock:
            return self._generations.result()
