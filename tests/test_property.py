"""The library against the oracle: random machines, the same operations on both, everything visible compared after each.

A failing sequence is reduced to the operations it needs before it is shown; replaying it takes nothing else.
"""

from __future__ import annotations

import os
import random
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings

import fastexit as fx
import oracle
import strategies as s
from fastexit import offers
from fastexit import regs as r
from generations import DRAWN
from pair import SETTLE, Pair, first_difference, minimised

EXAMPLES = 12 if s.JIT else 4
OPS = 120 if s.JIT else 50
VENDORS = ("vmx", "svm")

profile = settings(
    derandomize=True,
    deadline=None,
    database=None,
    max_examples=EXAMPLES,
    suppress_health_check=list(HealthCheck),
)


def play(config: s.Config, rng: random.Random, operations: int) -> None:
    """Drives a pair through a random life; a difference is reported with the shortest sequence that shows it."""
    factory = partial(fx.Machine, threads=rng.random() < 0.5, retpoline=rng.random() < 0.5)
    pair = Pair(config, config.build(factory))
    late = [i for i in s.ID_POOL if i not in config.apic_ids and i < offers.room(config.kernel).ids]
    try:
        for op in s.setup_ops(rng, pair.model):
            pair.step(op)
        for _ in range(operations):
            if rng.random() < 0.01:
                pair.step(("add_vcpu", late.pop(rng.randrange(len(late)))))
            pair.step(s.guest_op(rng, pair.model, timer=False))
        pair.at_rest()
    except AssertionError:
        raise AssertionError(minimised(config, factory, pair.history)) from None


def live(config: s.Config, rng: random.Random, operations: int, names: Sequence[str], *, close: bool) -> None:
    """As play, with all that LIVELY_OPS has; pairs that are not close settle now and then."""
    factory = partial(fx.Machine, threads=rng.random() < 0.5, retpoline=rng.random() < 0.5)
    pair = Pair(config, config.build(factory), close=close)
    try:
        for op in s.setup_ops(rng, pair.model):
            pair.step(op)
        for _ in range(operations):
            pair.step(s.lively_op(rng, pair.model, names))
            if not close and rng.random() < 0.1:
                pair.step(SETTLE)
        pair.at_rest()
    except AssertionError:
        raise AssertionError(minimised(config, factory, pair.history, close=close)) from None


def lively_config(rng: random.Random, *, hv_timer: bool, **fixed: Any) -> s.Config:
    """A machine with clocks, parameters and capabilities of all sorts."""
    return s.random_config(
        rng,
        **({"least": 1, "most": 4} | fixed),
        hv_timer=hv_timer,
        smm=rng.random() < 0.7,
        vector_hashing=rng.random() < 0.7,
        pi_inject_timer=rng.random() < 0.3,
        disable_exits=rng.choice((0, 0, r.EXITS_MWAIT, r.EXITS_HLT, r.EXITS_MWAIT | r.EXITS_HLT)),
        tsc_khz=rng.choice((1_000_000, 2_500_000, 1_234_567)),
        bus_cycle_ns=rng.choice((1, 10)),
        min_timer_period_us=rng.choice((200, 1)),
    )


@pytest.mark.parametrize("close", [True, False], ids=["looked at", "left alone"])
@pytest.mark.parametrize("timer", ["hrtimer", "preemption timer"])
@pytest.mark.parametrize("kernel", DRAWN)
@profile
@given(seed=s.seeds)
def test_timers(kernel: str, timer: str, close: bool, seed: int) -> None:
    """Counts, deadlines and pages of any length while time passes, vCPUs in the guest, asleep or out of KVM_RUN."""
    rng = random.Random(seed)
    hv_timer = timer == "preemption timer"
    config = lively_config(rng, hv_timer=hv_timer, kernel=kernel, vendor="vmx" if hv_timer else rng.choice(VENDORS))
    live(config, rng, OPS // 2, ("registers", "timers", "time", "exits", "runs"), close=close)


@pytest.mark.parametrize("close", [True, False], ids=["looked at", "left alone"])
@pytest.mark.parametrize("vendor", ["vmx", "svm"])
@pytest.mark.parametrize("apicv", [True, False], ids=["apicv", "plain"])
@profile
@given(seed=s.seeds)
def test_whole_lives(apicv: bool, vendor: str, close: bool, seed: int) -> None:
    """All at once: what guests execute, what user space sets, time, sleep, filters, system management mode."""
    rng = random.Random(seed)
    config = lively_config(rng, hv_timer=vendor == "vmx" and rng.random() < 0.5, vendor=vendor, apicv=apicv)
    live(config, rng, OPS, tuple(s.LIVELY_OPS), close=close)


@pytest.mark.parametrize("vendor", VENDORS)
@pytest.mark.parametrize("apicv", [True, False], ids=["apicv", "plain"])
@profile
@given(seed=s.seeds)
def test_targets(apicv: bool, vendor: str, seed: int) -> None:
    """Whom an interrupt asks the host to do what for: vCPUs in the guest, asleep, kicked already, or out of KVM_RUN."""
    rng = random.Random(seed)
    config = lively_config(rng, hv_timer=False, vendor=vendor, apicv=apicv, least=3, most=6)
    live(config, rng, OPS, ("IPIs", "IPIs", "IPIs", "IPIs", "exits", "exits", "runs", "hypercalls"), close=False)


def test_targets_are_of_every_kind() -> None:
    """The lives of test_targets are not spent on nothing: each effect comes, alone and in company."""
    seen: set[tuple[str, bool]] = set()
    for seed in range(9 if s.JIT else 18):
        rng = random.Random(seed)
        fixed = ({"vendor": "vmx", "apicv": True}, {"vendor": "vmx", "apicv": False}, {"vendor": "svm", "apicv": True})
        config = lively_config(rng, hv_timer=False, kernel="6.18", least=3, most=6, **fixed[seed % 3])
        if config.vendor == "svm":  # AVIC is for xAPICs whose ids are their vCPUs'
            config = replace(config, apic_ids=(0, 1, 2, 3), x2apic=False)
        pair = Pair(config, config.build(fx.Machine), close=False)
        for op in s.setup_ops(rng, pair.model):
            pair.step(op)
        for _ in range(OPS):
            pair.step(s.lively_op(rng, pair.model, ("IPIs", "IPIs", "exits", "runs")))
            seen |= {(what, len(pair.model.told) > 1) for _, what in pair.model.told}
    assert seen == {(effect.name, several) for effect in fx.Effect for several in (False, True) if effect}


@pytest.mark.long
@pytest.mark.parametrize("close", [True, False], ids=["looked at", "left alone"])
def test_whole_lives_at_length(close: bool) -> None:
    """FASTEXIT_LIVES lives of 200 operations, FASTEXIT_SEED the first of their seeds."""
    first = int(os.environ.get("FASTEXIT_SEED", "1000000"))
    for seed in range(first, first + int(os.environ.get("FASTEXIT_LIVES", "1500"))):
        rng = random.Random(seed)
        vendor = rng.choice(VENDORS)
        config = lively_config(rng, hv_timer=vendor == "vmx" and rng.random() < 0.5, vendor=vendor)
        try:
            live(config, rng, 200, tuple(s.LIVELY_OPS), close=close)
        except AssertionError as difference:
            raise AssertionError(f"seed {seed}: {difference}") from None


FOUND: dict[str, list[s.Op]] = {
    "what was posted before an INIT": [
        ("set_msr", 1, r.MSR_APICBASE, 0xFEE0_0C00),
        ("set_msr", 1, 0x80F, 0x1FF),
        ("set_mp_state", 1, r.MP_RUNNABLE),
        ("set_sregs", 1, 0xFEE0_0C00, 3),
        ("set_events", 1, 0, False, None, True),
        ("signal_msi", 0xFEE0_1000, 0x46),
        ("host_interrupt", 1),  # whose entry scans the IOAPIC, too, and empties PIR for that
    ],
    "what was posted before an INIT, no scan to come": [
        ("set_msr", 1, r.MSR_APICBASE, 0xFEE0_0C00),
        ("set_msr", 1, 0x80F, 0x1FF),
        ("set_mp_state", 1, r.MP_RUNNABLE),
        ("set_sregs", 1, 0xFEE0_0C00, 3),
        ("run", 1),
        ("set_events", 1, 0, False, None, True),
        ("signal_msi", 0xFEE0_1000, 0x46),
        ("host_interrupt", 1),
    ],
    "a TPR that user space wrote while AVIC was away": [
        ("set_sregs", 0, 0xFEE0_0100, 3),
        ("host_interrupt", 0),
        ("set_sregs", 0, 0xFEE0_0900, 8),
        ("host_interrupt", 0),
    ],
    "a deadline beside a count, in the reserved mode, when the divide changes": [
        ("mmio_write", 0, r.APIC_SPIV, 0x1FF, 4),
        ("mmio_write", 0, r.APIC_TDCR, 3, 4),
        ("mmio_write", 0, r.APIC_TMICT, 0xFFFF_FFFF, 4),
        ("mmio_write", 0, r.APIC_LVTT, 0x6_00B4, 4),
        ("guest_wrmsr", 0, r.MSR_TSC_DEADLINE, 1_000_000),
        ("mmio_write", 0, r.APIC_TDCR, 1, 4),
    ],
    "a preemption timer that has run out at an entry": [
        ("mmio_write", 0, r.APIC_SPIV, 0x1FF, 4),
        ("mmio_write", 0, r.APIC_TDCR, 11, 4),
        ("mmio_write", 0, r.APIC_LVTT, 0x2_00B4, 4),
        ("mmio_write", 0, r.APIC_TMICT, 300_000, 4),
        ("set_msr", 1, r.MSR_APICBASE, 0xFEE0_0C00),  # whose new map has the other scan: a kick
        ("set_time", 400_000),
        ("mmio_write", 0, r.APIC_ICR, 0x4, 4),
        ("mmio_read", 0, r.APIC_TMCCT, 4),
    ],
    "an exit of a vCPU outside, whose entry finds the timer run out": [
        ("set_msr", 0, r.MSR_APICBASE, 0xFEE0_0D00),
        ("set_msr", 0, 0x80F, 0x1FF),
        ("set_msr", 0, 0x832, 0x2_00EE),
        ("set_msr", 0, 0x838, 1000),
        ("set_time", 5_000_000),
        ("guest_wrmsr", 0, 0x832, 0x4_003F),
    ],
    "two periods that have run out": [
        ("mmio_write", 0, r.APIC_SPIV, 0x1FF, 4),
        ("mmio_write", 0, r.APIC_TDCR, 11, 4),
        ("mmio_write", 0, r.APIC_LVTT, 0x2_00B4, 4),
        ("mmio_write", 0, r.APIC_TMICT, 300_000, 4),
        ("set_time", 2_000_000),
        ("mmio_read", 0, r.APIC_TMCCT, 4),
    ],
}
"""Lives that showed a difference, each reduced to what it needs."""


@pytest.mark.parametrize("name", FOUND)
@pytest.mark.parametrize("apicv", [True, False], ids=["apicv", "plain"])
@pytest.mark.parametrize("vendor", VENDORS)
@pytest.mark.parametrize("kernel", fx.profiles())
def test_what_lives_have_found(kernel: str, vendor: str, apicv: bool, name: str) -> None:
    config = s.Config(apic_ids=(0, 1, 2), kernel=kernel, vendor=vendor, apicv=apicv, hv_timer=vendor == "vmx")
    assert first_difference(config, fx.Machine, FOUND[name], close=False) is None


def test_generations_stand_in_order() -> None:
    """The oracle compares versions, the library places of rows."""
    assert fx.profiles() == tuple(sorted(fx.profiles(), key=oracle.Machine.at))


@pytest.mark.parametrize("kernel", DRAWN)
@pytest.mark.parametrize("vendor", ["vmx", "svm"])
@pytest.mark.parametrize("apicv", [True, False], ids=["apicv", "plain"])
@profile
@given(seed=s.seeds)
def test_every_generation(kernel: str, vendor: str, apicv: bool, seed: int) -> None:
    rng = random.Random(seed)
    play(s.random_config(rng, kernel=kernel, vendor=vendor, apicv=apicv), rng, OPS)


@profile
@given(config=s.configs, seed=s.seeds)
def test_any_machine(config: s.Config, seed: int) -> None:
    play(config, random.Random(seed), OPS)


@pytest.mark.parametrize("vendor", ["vmx", "svm"])
@pytest.mark.parametrize("apicv", [True, False], ids=["apicv", "plain"])
@profile
@given(seed=s.seeds)
def test_tracepoints_of_host_calls(vendor: str, apicv: bool, seed: int) -> None:
    """Text and order of 6.18's tracepoints, for every call of user space."""
    rng = random.Random(seed)
    hv_timer = vendor == "vmx" and rng.random() < 0.5
    config = s.random_config(rng, kernel="6.18", vendor=vendor, apicv=apicv, hv_timer=hv_timer)
    model, machine = config.build(oracle.Machine), config.build(fx.Machine)
    machine.trace.enable()
    history = []
    for number in range(OPS):
        for op in s.setup_ops(rng, model) if number == 0 else [s.host_op(rng, model, timer=False)]:
            history.append(op)
            model.trace.clear()
            machine.trace.clear()
            s.apply(model, op)
            s.apply(machine, op)
            assert machine.trace.lines() == model.trace, f"after {s.story(config, history)}"


def test_boot_x2apic() -> None:
    config = s.Config(apic_ids=(0, 1, 18, 300))
    pair = Pair(config, config.build(fx.Machine))
    pair.model.boot_x2apic()
    pair.machine.boot_x2apic()
    for vcpu in range(4):
        pair.step(("get_msr", vcpu, 0x80F))
    pair.step(("guest_wrmsr", 0, 0x830, fx.icr(dest=300, vector=0xFD)))
    pair.at_rest()


def test_only_counted_vcpus() -> None:
    """Machine(vcpus=n) is apic_ids 0 to n - 1."""
    machine, model = fx.Machine(vcpus=3), oracle.Machine(vcpus=3)
    assert [v.get_lapic() for v in machine.vcpus] == [v.get_lapic() for v in model.vcpus]
