"""The kernel's own tracepoints as a witness: the model's trace lines against the kernel's, line by line.

Where no usable /dev/kvm or no tracefs exists these tests skip and say why.
`FASTEXIT_KVM_OPS=300000 pytest -m long tests/test_trace_kvm.py` compares longer (`FASTEXIT_KVM_SEED` picks the seed).
"""

from __future__ import annotations

import os
import random
import struct
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

import oracle
import strategies as s
from fastexit import Machine
from fastexit import regs as r
from fastexit.kvm import KvmUnavailable, Oracle, OracleVcpu
from fastexit.kvm import host as H
from fastexit.kvm.tracefs import KernelTrace, TraceUnavailable, lines_of_interest
from test_oracle_kvm import tame

SHORT_SECONDS = 2.5
ENDLESS = 1 << 30
BOOTED_NS = 1000
"""So that a deadline at TSC 1 has passed."""
OPS_PER_VM = 400
LONG_OPS = int(os.environ.get("FASTEXIT_KVM_OPS", "100000"))
COUNT_READ = "kvm_apic: apic_read APIC_TMCCT"

EMULATING = ("kvm_pvm",)
"""Modules that carry out a guest in real mode by the emulator, which knows no fast path: there lines of a fast ICR
write lie in another order."""


def unusable() -> str | None:
    """Why there is nothing to compare with here; None when there is."""
    try:
        with KernelTrace(), Oracle(1):
            return None
    except (KvmUnavailable, TraceUnavailable) as error:
        return str(error)


UNUSABLE = unusable()
pytestmark = [pytest.mark.kvm, pytest.mark.skipif(UNUSABLE is not None, reason=UNUSABLE or "")]


class Twins:
    """The same machine in the model and in the kernel, and a plain oracle that operations are drawn from."""

    def __init__(self, config: s.Config, kernel: KernelTrace, fastpath: bool) -> None:
        self.config = config
        self.kernel = kernel
        self.plain = config.build(oracle.Machine)
        self.real = Oracle(
            apic_ids=config.apic_ids,
            irqchip=config.irqchip,
            x2apic_api=config.x2apic_api,
            x2apic=config.x2apic,
            tsc_deadline=config.tsc_deadline,
            boot_cpu_id=config.boot_cpu_id,
            disable_quirks=config.disable_quirks,
        )
        self.model = Machine(apic_ids=config.apic_ids, **self.real.keywords)
        self.model.fastpath = fastpath
        for machine in (self.plain, self.model):
            machine.set_time(BOOTED_NS)
        self.disordered = fastpath and self.real.host.module in EMULATING
        self.history: list[s.Op] = []

    def step(self, op: s.Op) -> None:
        """One operation on all; the kernel's lines have to be the model's."""
        self.history.append(op)
        s.apply(self.plain, op)
        self.model.trace.clear()
        self.model.trace.enable()
        carry_out(self.model, op)
        self.model.trace.disable()
        assert not self.model.trace.lost
        self.kernel.clear()
        carry_out(self.real, op)
        got = [line.partition(" = ")[0] if line.startswith(COUNT_READ) else line for line in self.kernel.read()]
        want = lines_of_interest(self.model.trace.lines(), self.kernel.events)
        want = [line.partition(" = ")[0] if line.startswith(COUNT_READ) else line for line in want]
        if self.disordered:
            want, got = sorted(want), sorted(got)
        assert want == got, f"the kernel prints {got}, the model {want} after {s.story(self.config, self.history)}"

    def make_ready(self) -> None:
        """INIT and SIPI are carried out, and every guest can run again; its flat segments cost TPR[3:0] only now."""
        for vcpu in self.real.vcpus:
            vcpu.ready()
        for machine in (self.model, self.plain):
            for vcpu in machine.vcpus:
                if vcpu.get_mp_state() != r.MP_RUNNABLE:
                    vcpu.set_mp_state(r.MP_RUNNABLE)


def guest_op(rng: random.Random, machine: oracle.Machine) -> s.Op:
    """What a guest does; its timers run out at once or never."""
    if rng.random() < 0.95:
        return s.guest_op(rng, machine, timer=False)
    name, i = rng.choice(("set_msr", "guest_wrmsr")), rng.randrange(len(machine.vcpus))
    return (name, i, r.MSR_TSC_DEADLINE, rng.choice((0, 1, s.FAR_DEADLINE)))


def may_be_run(op: s.Op) -> bool:
    """Whether guests can go on behind an operation, once they are ready again; a tick shall be no NMI and no INIT."""
    if op[0] == "set_lapic" and struct.unpack_from("<I", op[2], r.APIC_LVTT)[0] & r.ICR_DM:
        return False
    sets_deadline = op[0] in ("set_msr", "guest_wrmsr") and op[2] == r.MSR_TSC_DEADLINE
    return sets_deadline or starts_anew(op) or tame(op)


def starts_anew(op: s.Op) -> bool:
    """Whether an operation is an INIT from outside: a guest that sends one may get it before it comes back."""
    name, *arguments = op
    if name == "signal_msi":
        return arguments[1] >> 8 & 7 == r.DM_INIT
    return name == "set_msr" and arguments[1] == r.MSR_X2APIC_ICR and arguments[2] >> 8 & 7 == r.DM_INIT


def carry_out(machine: Any, op: s.Op) -> None:
    """An operation on the model or on the kernel, whose guests are always ready to run."""
    name, *arguments = op
    if name == "cs":
        return  # nothing of an APIC's
    if name not in s.GUEST_OPS:
        s.apply(machine, op)
        return
    vcpu = machine.vcpus[arguments.pop(0)]
    if vcpu.get_mp_state() != r.MP_RUNNABLE:
        vcpu.set_mp_state(r.MP_RUNNABLE)
    try:
        getattr(vcpu, name.removeprefix("guest_"))(*arguments)
    except ValueError:
        pass
    if isinstance(vcpu, OracleVcpu):
        vcpu.run_through()  # a tick of the instruction's own becomes an interrupt at the next entry


@contextmanager
def twins(rng: random.Random, kernel: KernelTrace, fastpath: bool = True) -> Iterator[Twins]:
    """A random machine."""
    irqchip = rng.choice(("full", "split"))
    known = H.running().api_split if irqchip == "split" else H.running().api
    api = rng.choice((0, 0, 0, r.X2API_SUPPRESS_EOI, r.X2API_NO_SUPPRESS_EOI)) & known
    config = s.random_config(
        rng,
        least=3,
        most=8,
        kernel="6.18",
        vendor="vmx",
        apicv=False,
        irqchip=irqchip,
        x2apic_api=rng.randrange(4) | api,
    )
    pair = Twins(config, kernel, fastpath)
    try:
        for op in s.setup_ops(rng, pair.plain):
            pair.step(op)
        yield pair
    finally:
        pair.real.close()


def run_ioctls(operations: int, seed: int, seconds: float | None = None) -> int:
    """Operations that ioctls carry out, on random machines; how many were compared."""
    done, start = 0, time.monotonic()
    with KernelTrace() as kernel:
        while done < operations and (seconds is None or time.monotonic() - start < seconds):
            rng = random.Random(seed)
            with twins(rng, kernel) as pair:
                late = [i for i in s.ID_POOL if i not in pair.config.apic_ids]
                for _ in range(min(OPS_PER_VM, operations - done)):
                    op = s.host_op(rng, pair.plain)
                    if rng.random() < 0.004:
                        op = ("add_vcpu", late.pop(rng.randrange(len(late))))
                    elif rng.random() < 0.06:
                        op = s.user_op(rng, pair.plain)
                    pair.step(op)
                    done += 1
            seed += 1
    return done


def run_guests(operations: int, seed: int, seconds: float | None = None, *, fastpath: bool) -> int:
    """As run_ioctls, with instructions of guests among them."""
    done, start = 0, time.monotonic()
    with KernelTrace() as kernel:
        while done < operations and (seconds is None or time.monotonic() - start < seconds):
            rng = random.Random(seed)
            with twins(rng, kernel, fastpath) as pair:
                pair.make_ready()
                for _ in range(min(OPS_PER_VM, operations - done)):
                    op = guest_op(rng, pair.plain)
                    if may_be_run(op):
                        pair.step(op)
                        done += 1
                    if starts_anew(op):
                        pair.make_ready()
            seed += 1
    return done


def test_lines_of_ioctls_are_the_kernels() -> None:
    assert run_ioctls(ENDLESS, 1, SHORT_SECONDS) > 0


@pytest.mark.parametrize("fastpath", [False, True])
def test_lines_of_guests_are_the_kernels(fastpath: bool) -> None:
    if not fastpath and H.running().module not in EMULATING:
        pytest.skip("this host's guests take the fast path")
    assert run_guests(ENDLESS, 1, SHORT_SECONDS, fastpath=fastpath) > 0


@pytest.mark.long
def test_lines_are_the_kernels_at_length() -> None:
    seed = int(os.environ.get("FASTEXIT_KVM_SEED", "1000000"))
    assert run_ioctls(LONG_OPS, seed) >= LONG_OPS
    fastpath = H.running().module not in EMULATING
    assert run_guests(LONG_OPS // 4, seed, fastpath=fastpath) >= LONG_OPS // 4


def test_a_difference_shows() -> None:
    with KernelTrace() as kernel, twins(random.Random(1), kernel) as pair:
        pair.model.trace.enable = pair.model.trace.disable  # type: ignore[method-assign]
        with pytest.raises(AssertionError, match="the kernel prints .* dst 0 vec 253 .* the model \\[\\]"):
            pair.step(("signal_msi", 0xFEE0_0000, 0xFD))
