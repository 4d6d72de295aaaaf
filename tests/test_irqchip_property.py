"""The library beside the plain irqchip: random operations, every chip and page compared behind each, in three modes.

Draws are those of `fastexit verify --kind irqchip`. On a machine with KVM its kernel is compared, too; how much one
wants, that command compares.
"""

from __future__ import annotations

import random
from collections import Counter
from typing import Any

import numpy as np
import pytest

import fastexit as fx
import irqchip_pair
import irqchip_plain
import oracle_irqchip
from fastexit import layout as L
from fastexit.kvm.irqchip import ChipProgram, IrqchipTwins
from fastexit.kvm.judge import local
from fastexit.kvm.tracefs import EVENTS
from generations import kernels
from real_kvm import kvm
from strategies import JIT

OPERATIONS = 1000 if JIT else 200
MODES = ("python", "compiled", "batch")


class BatchProgram(ChipProgram):
    """Accesses as records of the batch door."""

    def _exits(self, port: bool, where: int, value: int | None, length: int) -> int | None:
        machine, vendor = self.v.machine, self.v.machine.dispatcher.vendor
        one = np.zeros(1, L.EXIT)
        one["vcpu"], one["value"] = self.v.index, value or 0
        if port:
            one["reason"], one["info"] = vendor.io_reason, machine.io_info(where, length, value is not None)
        else:
            one["reason"], one["gpa"] = vendor.mmio_reason, where
            one["info"] = length | (0 if value is None else L.MMIO_WRITE)
        read = int(machine.run(one)["value"][0])
        return self._behind(port, read, value, length)


class ModeTwins(IrqchipTwins):
    """Twins whose model is used by one of the doors."""

    mode = "python"

    def make_model(self) -> Any:
        dispatcher = "compiled" if self.mode == "compiled" else "python"
        return fx.Machine(**self.model_keywords(), dispatcher=dispatcher)

    def program(self, i: int, *, interrupts: bool) -> ChipProgram:
        made = super().program(i, interrupts=interrupts)
        if self.mode == "batch":
            made.__class__ = BatchProgram
        return made


def by(mode: str) -> type[IrqchipTwins]:
    return type("By", (ModeTwins,), {"mode": mode})


@pytest.mark.parametrize("vendor", ["svm", "vmx"])
@pytest.mark.parametrize("mode", MODES)
def test_three_modes(mode: str, vendor: str) -> None:
    found = irqchip_pair.played(by(mode), OPERATIONS, judge=irqchip_plain.judge(vendor=vendor))
    assert found is None, found.script()


@pytest.mark.parametrize("kernel", kernels())
def test_generations(kernel: str) -> None:
    found = irqchip_pair.played(IrqchipTwins, OPERATIONS, 2, judge=irqchip_plain.judge(kernel, smm=True))
    assert found is None, found.script()


def test_traces() -> None:
    """Lines of five events, in order."""
    where, witness = irqchip_plain.judge(), irqchip_plain.PlainTrace(frozenset(EVENTS))
    found = irqchip_pair.played(IrqchipTwins, OPERATIONS, 3, judge=where, witness=witness)
    assert found is None, found.script()


def test_one_entry() -> None:
    """A module that emulates a guest's instructions one after the other, and ends what it injects."""
    where = irqchip_plain.judge(one_entry=True, eoi_at_injection=True)
    found = irqchip_pair.played(IrqchipTwins, OPERATIONS, 4, judge=where)
    assert found is None, found.script()


def test_operations_come_to_every_end() -> None:
    """What is never drawn, or never does anything, shows nothing."""
    ends: Counter[str] = Counter()

    class Counting(IrqchipTwins):
        def same_result(self, op: Any, expected: Any, got: Any) -> None:
            super().same_result(op, expected, got)
            kind = expected[0] if isinstance(expected, tuple) else expected
            ends[op[0], "refused" if kind == "refused" else "nothing" if kind in (None, 0, -1) else "something"] += 1
            if isinstance(expected, tuple):
                ends["EOIs"] += len(expected[1])
                ends["left"] += len(expected[2])

    rng = random.Random(0)
    where = irqchip_plain.judge()
    for seed in range(2):
        assert irqchip_pair.played(Counting, 3000 if JIT else 1500, rng.randrange(1000) + seed, judge=where) is None
    wanted = {("irq_line", "something"), ("irq_line", "nothing"), ("take", "something"), ("take", "nothing")}
    wanted |= {
        ("mem_read", "something"),
        ("io_read", "something"),
        ("signal_msi", "something"),
        ("signal_msi", "nothing"),
    }
    wanted |= {("set_gsi_routing", "refused"), ("set_gsi_routing", "nothing"), ("irqfd", "nothing"), "EOIs", "left"}
    assert wanted <= set(ends)


@kvm
def test_the_kernel() -> None:
    """A slice of what the kernel of this machine says."""
    found = irqchip_pair.played(IrqchipTwins, OPERATIONS // 2, 5, judge=local())
    assert found is None, found.script()


@kvm
def test_the_plain_irqchip_is_the_kernels() -> None:
    """What stands for the kernel here does as the kernel does."""
    found = irqchip_pair.played(irqchip_pair.PlainTwins, 500, 6, judge=local())
    assert found is None, found.script()


@pytest.mark.parametrize("kernel", fx.profiles())
def test_the_speakers_bit(kernel: str) -> None:
    """5.15.215 speaker_ioport_write: a word of its own; later a flag that KVM_GET_PIT2 shows."""
    machine, model = fx.Machine(1, kernel=kernel), oracle_irqchip.Machine(1, kernel=kernel)
    machine.create_pit()
    model.create_pit()
    assert model.pit is not None
    machine.vcpus[0].io_write(0x61, 0x1A)
    model.pit.io_write(0x61, 0x1A, 1)
    assert machine.get_pit() == model.get_pit()
    assert int(machine.vcpus[0].io_read(0x61)) & 2 == (model.pit.io_read(0x61, 1) or 0) & 2 == 2
