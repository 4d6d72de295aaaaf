"""Fast equals generic: two machines in the same state take the same exit, one with the fast path, one without.

The fast path may decline or do exactly what the generic path does; whatever it does, nobody can tell afterwards.
"""

from __future__ import annotations

import random
from functools import partial
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings

import fastexit as fx
import oracle
import strategies as s
from fastexit import regs as r
from fastexit.profile import since
from generations import DRAWN
from pair import EXITS

EXAMPLES = 25 if s.JIT else 4
WRITES = 40 if s.JIT else 15
PREPARATIONS = 3
RESERVED_BITS = [bit for bit in range(32) if r.ICR_RESERVED >> bit & 1]
LVTT_MSR = r.MSR_X2APIC_BASE + (r.APIC_LVTT >> 4)
BETWEEN = ("timers", "time", "events", "sregs", "locals", "ioapic", "extints", "switches")
"""What happens between two exits; no filter, which the fast path of TSC_DEADLINE does not ask."""

profile = settings(
    derandomize=True,
    deadline=None,
    database=None,
    max_examples=EXAMPLES,
    suppress_health_check=list(HealthCheck),
)


def guest_write(rng: random.Random, model: oracle.Machine) -> tuple[int, int, int]:
    """vCPU, MSR and value of a write that some generation handles fast, or that looks like one."""
    in_x2apic = [i for i, v in enumerate(model.vcpus) if v.x2apic]
    i = rng.choice(in_x2apic) if in_x2apic and rng.random() < 0.95 else rng.randrange(len(model.vcpus))
    if rng.random() < 0.15:
        return i, r.MSR_TSC_DEADLINE, rng.choice((0, 1, model.tsc(), model.tsc() + 1000, s.FAR_DEADLINE))
    value = s.icr(rng, model)
    if rng.random() < 0.6:
        value &= ~(r.ICR_DM | r.ICR_LOGICAL | r.ICR_SHORTHAND)  # the class that every generation takes
        if rng.random() < 0.15:
            value |= 1 << rng.choice(RESERVED_BITS)
    return i, r.MSR_X2APIC_ICR, value


def visible(machine: Any) -> list[tuple[Any, ...]]:
    """All that anybody can see of a machine's vCPUs; NMIs and INIT/SIPI are counted and carried out on the way."""
    return [
        (
            v.get_lapic(),
            v.pending(),
            v.rip,
            v.events().nmi_pending,
            v.get_mp_state(),
            v.apic_base,
            v.get_msr(r.MSR_TSC_DEADLINE),
        )
        for v in machine.vcpus
    ]


def compare(config: s.Config, rng: random.Random) -> int:
    """A random life of two machines that differ in the fast path; how often that path was taken."""
    model = config.build(oracle.Machine)
    factory = partial(fx.Machine, threads=rng.random() < 0.5)
    fast, generic = config.build(factory), config.build(factory)
    generic.fastpath = False
    taken = 0
    history: list[s.Op] = []

    def everywhere(op: s.Op) -> None:
        history.append(op)
        for machine in (model, fast, generic):
            s.apply(machine, op)

    for op in s.setup_ops(rng, model):
        everywhere(op)
    for _ in range(WRITES):
        for _ in range(rng.randrange(PREPARATIONS)):
            op = s.host_op(rng, model) if rng.random() < 0.5 else s.lively_op(rng, model, BETWEEN)
            if op[0] not in (*s.GUEST_OPS, "run"):
                everywhere(op)
        i, msr, value = guest_write(rng, model)
        if msr == r.MSR_TSC_DEADLINE and rng.random() < 0.7:
            everywhere(("set_msr", i, LVTT_MSR, r.LVT_TIMER_DEADLINE | 0xEC))
        if rng.random() < 0.1:
            history.append(("hlt", i))
            model.vcpus[i].hlt()
            a, b = (machine.vcpus[i].exit(EXITS["hlt"][config.vendor]) for machine in (fast, generic))
        else:
            history.append(("guest_wrmsr", i, msr, value))
            model.vcpus[i].guest_wrmsr(msr, value)
            a, b = fast.vcpus[i].wrmsr(msr, value), generic.vcpus[i].wrmsr(msr, value)
        taken += a.path is fx.Path.FAST
        assert b.path is fx.Path.SLOW, f"switched off, and yet {b} after {s.story(config, history)}"
        same = (a.fault, a.accepted, a.user, a.blocked) == (b.fault, b.accepted, b.user, b.blocked)
        assert same, f"{a} or {b} after {s.story(config, history)}"
        for v, (x, y) in enumerate(zip(visible(fast), visible(generic))):
            assert x == y, (
                f"vCPU {v}: fast {x[1:]}, generic {y[1:]}; {s.differences(y[0], x[0])} after {s.story(config, history)}"
            )
    return taken


@pytest.mark.parametrize("kernel", DRAWN)
@pytest.mark.parametrize("vendor", ["vmx", "svm"])
@pytest.mark.parametrize("apicv", [True, False], ids=["apicv", "plain"])
def test_fast_is_generic(kernel: str, vendor: str, apicv: bool) -> None:
    taken = 0

    @profile
    @given(seed=s.seeds)
    def run(seed: int) -> None:
        nonlocal taken
        rng = random.Random(seed)
        hv_timer = vendor == "vmx" and rng.random() < 0.5
        config = s.random_config(
            rng, kernel=kernel, vendor=vendor, apicv=apicv, x2apic=True, hv_timer=hv_timer, fastpath=True
        )
        taken += compare(config, rng)

    run()
    if vendor == "svm" and not since(kernel, "5.6"):
        assert taken == 0, "its SVM hook tests for the wrong exit code"
    else:
        assert taken > 0, "nothing was handled fast, so nothing was compared"
