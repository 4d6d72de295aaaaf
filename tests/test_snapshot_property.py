"""A life cut in two by a snapshot goes on as if it had not been: same outcomes, same trace, same memory, to the word.

Operations are those of the property tests, exits one by one and in batches. Both halves belong to one random seed.
"""

from __future__ import annotations

import random
from functools import partial
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings

import fastexit as fx
import oracle
import oracle_hyperv
import strategies as s
import test_hyperv_property as windows
from fastexit import hyperv as h
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


# ------------------------------------------------------------------------------------------------------ Windows guests


def windows_act(m: fx.Machine, op: s.Op) -> Any:
    """Carries out one operation of a Windows guest's life, or of its user space; what can be seen of it."""
    name, *args = op
    if name == "poke":
        data = bytes.fromhex(args[1])
        m.guest_memory[args[0] : args[0] + len(data)] = data
    elif name == "routes":
        m.set_gsi_routing([("hv_sint", 40 + 17 * vp + sint, vp, sint) for vp in range(5) for sint in range(17)])
    elif name == "irq_line":
        return m.irq_line(*args), m.targets
    elif name == "set_time":
        return m.set_time(max(m.time, args[0])), m.next_timer()
    elif name in (*s.GUEST_OPS, "run", "enable_synic", "hv_hypercall", "complete_hypercall"):
        v = m.vcpus[args[0]]
        try:
            told = windows_exit(v, name, args[1:])
        except (fx.GeneralProtection, fx.InvalidOpcode) as fault:
            told = str(fault)
        return told, v.targets, v.exit_reason, v.user_hyperv, v.user_hypercall, v.rip, v.read_data
    elif name != "settle":
        return s.apply(m, op)
    return None


def windows_exit(v: fx.Vcpu, name: str, args: list[Any]) -> Any:
    svm = v.machine.vendor == "svm"
    doors = {"guest_wrmsr": v.wrmsr, "guest_rdmsr": v.rdmsr}
    if name == "complete_hypercall" and v.user_hypercall is None:
        return None
    if name == "hv_hypercall":
        v.real_mode = args[0]
        return v.hv_hypercall(*args[1:])
    if name == "hlt":
        return v.exit(fx.SvmExit.HLT if svm else fx.VmxExit.HLT)
    if name == "host_interrupt":
        return v.exit(fx.SvmExit.INTERRUPT if svm else fx.VmxExit.EXTERNAL_INTERRUPT)
    return doors.get(name, getattr(v, name, None))(*args)  # type: ignore[misc]


def windows_life(life: windows.Life, rng: random.Random) -> list[s.Op]:
    """Operations that make sense one after the other: the oracle has lived them."""
    model = life[0].build(partial(oracle_hyperv.Machine, **life[1]))
    pair = windows.HypervPair(life, close=False)
    pair.model.next_op = None
    for op in s.setup_ops(rng, model):
        pair.step(op)
    pair.step(("routes",))
    pair.step(("set_msr", 0, h.MSR_HV_GUEST_OS_ID, 1))
    for i in range(len(model.vcpus)):
        pair.step(("enable_synic", i, rng.choice((1, 2))))
    for _ in range(OPS):
        pair.step(windows.next_op(rng, pair.model))
    return pair.history


def split_windows_life(life: windows.Life, seed: int) -> None:
    """As split_life; the copy's memory is a copy of the guest's."""
    rng = random.Random(seed)
    ops = windows_life(life, rng)
    m = life[0].build(partial(fx.Machine, **life[1]))
    m.guest_memory = bytearray(windows.MEMORY)
    cut = rng.randrange(len(ops) + 1)
    for op in ops[:cut]:
        windows_act(m, op)
    copy = fx.Machine.restore(m.snapshot())
    copy.guest_memory = bytearray(m.guest_memory)
    forget_targets(m)
    for machine in (m, copy):
        machine.trace.clear()
        machine.trace.enable()
    for i, op in enumerate(ops[cut:]):
        was, now = windows_act(m, op), windows_act(copy, op)
        assert now == was, f"operation {cut + i} behind a cut at {cut} of {s.story(life[0], ops)}"
        assert copy.guest_memory == m.guest_memory, op
    assert_equal(copy, m)


@pytest.mark.parametrize("kernel", DRAWN)
@pytest.mark.parametrize("vendor", ["vmx", "svm"])
@profile
@given(seed=s.seeds)
def test_a_windows_guest_goes_on(kernel: str, vendor: str, seed: int) -> None:
    """Timers under way, messages that are stuck, a hypercall that waits for user space, EOI assist offered."""
    rng = random.Random(seed)
    split_windows_life(windows.random_life(rng, kernel=kernel, vendor=vendor, apicv=False), seed)


def test_the_guests_memory_is_not_in_a_snapshot() -> None:
    """Nor is its address: what a restored machine has is its own, empty and private."""
    m = fx.Machine(vcpus=1, hyperv=True)
    m.guest_memory = bytearray(b"\x5a") * 8192
    data = m.snapshot()
    copy = fx.Machine.restore(data)
    assert copy.snapshot() == data
    assert (copy.guest_memory[0], len(copy.guest_memory)) == (0, 3 << 30)
    assert copy.mem[L.H_GUEST_MEMORY] != m.mem[L.H_GUEST_MEMORY] != 0
    m.guest_memory = bytearray(4096)
    assert m.snapshot() == data


def test_a_lost_word_would_show() -> None:
    """The comparison is not blind: a register that a snapshot forgot makes it fail."""
    m = fx.Machine(vcpus=2)
    copy = fx.Machine.restore(m.snapshot())
    copy.words[L.PAGE + (r.APIC_TMICT >> 3)] = 1
    assert not np.array_equal(memory(m)[1], memory(copy)[1])
