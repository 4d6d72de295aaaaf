"""The library against the oracle: random machines, the same operations on both, everything visible compared after each.

A failing sequence is reduced to the operations it needs before it is shown; replaying it takes nothing else.
"""

from __future__ import annotations

import random
from functools import partial

import pytest
from hypothesis import HealthCheck, given, settings

import fastexit as fx
import oracle
import strategies as s
from pair import Pair, minimised

EXAMPLES = 12 if s.JIT else 4
OPS = 120 if s.JIT else 50

profile = settings(
    derandomize=True,
    deadline=None,
    database=None,
    max_examples=EXAMPLES,
    suppress_health_check=list(HealthCheck),
)


def play(config: s.Config, rng: random.Random, operations: int) -> None:
    """Drives a pair through a random life; a difference is reported with the shortest sequence that shows it."""
    factory = partial(fx.Machine, threads=rng.random() < 0.5)
    pair = Pair(config, config.build(factory))
    late = [i for i in s.ID_POOL if i not in config.apic_ids]
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


def test_profiles_are_those_of_the_oracle() -> None:
    assert tuple(fx.profiles()) == oracle.KERNELS


@pytest.mark.parametrize("kernel", oracle.KERNELS)
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
    config = s.random_config(rng, kernel="6.18", vendor=vendor, apicv=apicv)
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
            lines = [line for line in machine.trace.lines() if not line.startswith("kvm_hv_timer_state")]
            assert lines == model.trace, f"after {s.story(config, history)}"


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
