"""A life cut in two by a snapshot goes on as if it had not been: same outcomes, same trace, same memory, to the word.

Operations are those of the property tests, exits one by one and in batches. Both halves belong to one random seed.
"""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings

import fastexit as fx
import oracle
import strategies as s
from fastexit import layout as L
from fastexit import regs as r
from generations import DRAWN
from storms import assert_equal

EXAMPLES = 15 if s.JIT else 2
OPS = 80 if s.JIT else 40

OURS = ("batch", "run", "rflags", "read", "time", "timer")
"""Operations that the oracle does not live through."""

profile = settings(
    derandomize=True,
    deadline=None,
    database=None,
    max_examples=EXAMPLES,
    suppress_health_check=list(HealthCheck),
)


def exits(rng: random.Random, config: s.Config, ops: list[s.Op]) -> np.ndarray:
    """The guest's operations among these as records of a batch, with other exits between them."""
    svm = config.vendor == "svm"
    records = []
    for op in ops:
        if op[0] == "guest_wrmsr":
            records.append((op[1], fx.SvmExit.MSR if svm else fx.VmxExit.MSR_WRITE, op[2], int(svm), op[3], 0))
        elif op[0] == "mmio_write":
            page = fx.SvmExit.NPF if svm else fx.VmxExit.EPT_MISCONFIG
            records.append((op[1], page, 0, op[4] | fx.MMIO_WRITE, op[3], r.APIC_DEFAULT_PHYS_BASE + op[2]))
        else:
            others = (fx.SvmExit.INTERRUPT, fx.SvmExit.CPUID, fx.SvmExit.HLT, fx.SvmExit.MSR)
            if not svm:
                others = (fx.VmxExit.EXTERNAL_INTERRUPT, fx.VmxExit.CPUID, fx.VmxExit.HLT, fx.VmxExit.MSR_READ)
            records.append(
                (rng.randrange(len(config.apic_ids)), rng.choice(others), rng.choice(s.X2APIC_MSRS), 0, 0, 0)
            )
    return np.array(records, dtype=fx.EXIT)


def life(rng: random.Random, config: s.Config, operations: int) -> list[s.Op]:
    """Operations that make sense one after the other; the oracle lives them to know what would."""
    model = config.build(oracle.Machine)
    ops = []

    def add(op: s.Op) -> None:
        ops.append(op)
        if op[0] not in OURS:
            s.apply(model, op)

    for op in s.setup_ops(rng, model):
        add(op)
    while len(ops) < operations:
        kind = rng.random()
        vcpu = rng.randrange(len(model.vcpus))
        if kind < 0.08:
            several = [s.guest_op(rng, model) for _ in range(rng.randint(1, 12))]
            add(("batch", exits(rng, config, several)))
        elif kind < 0.12:
            add(("rflags", vcpu, rng.choice((2, 0x202))))
        elif kind < 0.16:
            add(("run", vcpu))
        elif kind < 0.20:
            add(("read", vcpu, rng.choice(s.X2APIC_MSRS)))
        elif kind < 0.26:
            add(("time", rng.choice((1, 1000, 200_000, rng.getrandbits(20), 1 << 40))))
        elif kind < 0.30:
            add(("timer", vcpu, rng.choice((0, 0x20000, 0x40000)) | s.vector(rng), rng.choice((1000, 1_000_000))))
        else:
            add(s.guest_op(rng, model))
    return ops


def act(m: fx.Machine, op: s.Op) -> Any:
    """Carries out one operation; what can be seen of it."""
    if op[0] == "batch":
        return m.run(op[1]).tolist()
    if op[0] == "time":
        return m.set_time(m.time + op[1]), m.next_timer()
    if op[0] in OURS or op[0] == "guest_wrmsr":
        v = m.vcpus[op[1]]
        if op[0] == "run":
            return v.run()
        if op[0] == "guest_wrmsr":
            return v.wrmsr(*op[2:]), v.rip
        if op[0] == "read":
            try:
                return v.rdmsr(op[2])
            except fx.GeneralProtection:
                return "gp"
        if op[0] == "timer":
            lvtt, tmict = (r.MSR_X2APIC_BASE + (offset >> 4) for offset in (r.APIC_LVTT, r.APIC_TMICT))
            return v.set_msr(lvtt, op[2]), v.wrmsr(tmict, op[3]), v.set_msr(r.MSR_TSC_DEADLINE, m.time + op[3])
        v.rflags = op[2]
        return None
    return s.apply(m, op)


def memory(m: fx.Machine) -> list[np.ndarray]:
    """Everything but the map's scratch area and the trace ring."""
    return [m.words[: L.MAP_SCRATCH], m.words[L.FILTER : L.TRACE]]


def forget_targets(m: fx.Machine) -> None:
    """Empty the lists of whom the last exits were for, which no snapshot carries."""
    rows = m.words[L.KVM : L.KVM + L.SENDERS * L.KVM_STRIDE].reshape(L.SENDERS, L.KVM_STRIDE)
    rows[:, L.K_TARGETS] = 0


def split_life(config: s.Config, seed: int) -> None:
    """Lives half a life, takes a snapshot, and lives the other half twice."""
    rng = random.Random(seed)
    m = config.build(lambda **options: fx.Machine(threads=rng.random() < 0.5, **options))
    ops = life(rng, config, OPS)
    cut = rng.randrange(len(ops) + 1)
    for op in ops[:cut]:
        act(m, op)
    copy = fx.Machine.restore(m.snapshot())
    forget_targets(m)
    for machine in (m, copy):
        machine.trace.clear()
        machine.trace.enable()
    for i, op in enumerate(ops[cut:]):
        was, now = act(m, op), act(copy, op)
        assert now == was, f"operation {cut + i}, {op[0]}, of {s.story(config, [o for o in ops if o[0] != 'batch'])}"
    assert_equal(copy, m)
    for original, restored in zip(memory(m), memory(copy), strict=True):
        different = np.flatnonzero(original != restored)
        assert len(different) == 0, f"words {different[:8]} differ"
    assert [v.events() for v in copy.vcpus] == [v.events() for v in m.vcpus]
    assert_equal(copy, m)


@pytest.mark.parametrize("kernel", DRAWN)
@pytest.mark.parametrize("vendor", ["vmx", "svm"])
@pytest.mark.parametrize("apicv", [True, False], ids=["apicv", "plain"])
@profile
@given(seed=s.seeds)
def test_life_goes_on(kernel: str, vendor: str, apicv: bool, seed: int) -> None:
    rng = random.Random(seed)
    split_life(s.random_config(rng, kernel=kernel, vendor=vendor, apicv=apicv), seed)


@profile
@given(config=s.configs, seed=s.seeds)
def test_any_machine(config: s.Config, seed: int) -> None:
    split_life(config, seed)


def test_a_lost_word_would_show() -> None:
    """The comparison is not blind: a register that a snapshot forgot makes it fail."""
    m = fx.Machine(vcpus=2)
    copy = fx.Machine.restore(m.snapshot())
    copy.words[L.PAGE + (r.APIC_TMICT >> 3)] = 1
    assert not np.array_equal(memory(m)[1], memory(copy)[1])
