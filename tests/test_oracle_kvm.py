"""The oracle against a real /dev/kvm: the same random operations on both, everything compared after each.

Where no usable /dev/kvm exists these tests skip and say why. Everything else that is tested against the oracle leans
on this file, so a long run is worth its time: `FASTEXIT_KVM_OPS=300000 pytest -m long tests/test_oracle_kvm.py`
(`FASTEXIT_KVM_SEED` picks other sequences).
"""

from __future__ import annotations

import os
import random
import struct
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

import oracle
import oracle_apic
import strategies as s
from fastexit import regs as r
from kvm_vm import API_FLAGS, MAXPHYADDR, STORES, UNUSABLE, RealKvm, RealVcpu

SHORT_OPS = 4_000
SHORT_SECONDS = 2.5
OPS_PER_VM = 400
LONG_OPS = int(os.environ.get("FASTEXIT_KVM_OPS", "100000"))

pytestmark = [pytest.mark.kvm, pytest.mark.skipif(UNUSABLE is not None, reason=UNUSABLE or "")]


@contextmanager
def pair(config: s.Config) -> Iterator[tuple[oracle.Machine, RealKvm]]:
    """The same machine twice: expected and real."""
    with config.build(RealKvm) as real:
        yield config.build(oracle.Machine), real


def step(expected: oracle.Machine, real: RealKvm, op: s.Op, history: list[s.Op], config: s.Config) -> None:
    """One operation on both sides, then a comparison of all that is visible."""
    history.append(op)
    want, got = s.apply(expected, op), s.apply(real, op)
    if op[0] == "get_msr" and op[2] == r.MSR_X2APIC_BASE + (r.APIC_TMCCT >> 4):
        want, got = want is None, got is None
    assert got == want, f"expected {want!r}, KVM says {got!r} after {s.story(config, history)}"
    for i, (model, vcpu) in enumerate(zip(expected.vcpus, real.vcpus)):
        page, real_page = s.masked(model.get_lapic()), s.masked(vcpu.get_lapic())
        assert page == real_page, f"vCPU {i} {s.differences(page, real_page)} after {s.story(config, history)}"


def run_sequences(operations: int, first_seed: int, seconds: float | None = None) -> int:
    """Random machines until so many operations (or so much time) are used up; how many it were."""
    done, seed, start = 0, first_seed, time.monotonic()
    while done < operations and (seconds is None or time.monotonic() - start < seconds):
        rng = random.Random(seed)
        irqchip = rng.choice(("full", "split"))
        config = s.random_config(
            rng,
            least=4,
            most=9,
            kernel="6.18",
            vendor="vmx",
            apicv=False,
            irqchip=irqchip,
            x2apic_api=rng.randrange(4) | rng.choice((0, 0, 0, r.X2API_NO_SUPPRESS_EOI)) & API_FLAGS,
        )
        late = [i for i in s.ID_POOL if i not in config.apic_ids]
        with pair(config) as (expected, real):
            history: list[s.Op] = []
            for op in s.setup_ops(rng, expected):
                step(expected, real, op, history, config)
            for number in range(min(OPS_PER_VM, operations - done)):
                op = s.host_op(rng, expected)
                if rng.random() < 0.004:
                    op = ("add_vcpu", late.pop(rng.randrange(len(late))))
                elif rng.random() < 0.06:
                    op = s.user_op(rng, expected)
                step(expected, real, op, history, config)
                done += 1
                if seconds is not None and number % 50 == 0 and time.monotonic() - start > seconds:
                    break
            for i in range(len(expected.vcpus)):
                step(expected, real, ("events", i), history, config)
        seed += 1
    return done


PPR_MSR = r.MSR_X2APIC_BASE + (r.APIC_PROCPRI >> 4)
NOT_FOR_GUESTS = (r.DM_NMI, r.DM_INIT)
"""Delivery modes that would take the vCPU away from the instruction under test."""


def tame(op: s.Op) -> bool:
    """Whether an operation leaves every vCPU able to run the next one: no NMI, no INIT, no timer, no other page."""
    name, *arguments = op
    if name == "signal_msi":
        return arguments[1] >> 8 & 7 not in NOT_FOR_GUESTS
    if name in ("set_msr", "guest_wrmsr"):
        _, msr, value = arguments
        if msr == r.MSR_X2APIC_ICR:
            return value >> 8 & 7 not in NOT_FOR_GUESTS
        if msr == r.MSR_APICBASE:
            # bits that fault may stay; a page that moves would have to be followed
            return value & r.APICBASE.mask("BASE") & (1 << MAXPHYADDR) - 1 == r.APIC_DEFAULT_PHYS_BASE
        return msr not in (r.MSR_TSC_DEADLINE, r.MSR_X2APIC_BASE + (r.APIC_TMICT >> 4))
    if name == "mmio_write":
        _, offset, value, length = arguments
        icr_ok = offset != r.APIC_ICR or value >> 8 & 7 not in NOT_FOR_GUESTS
        return icr_ok and offset != r.APIC_TMICT and length in STORES and offset + length <= 0x1000
    if name == "mmio_read":
        return arguments[1] + arguments[2] <= 0x1000
    if name == "set_lapic":
        return struct.unpack_from("<I", arguments[1], r.APIC_TMICT)[0] == 0
    return name not in ("pending", "ack", "eoi", "get_mp_state")


def run_guests(operations: int, first_seed: int, seconds: float | None = None) -> int:
    """As run_sequences, with operations that vCPUs carry out themselves: MMIO and WRMSR by real instructions."""
    done, seed, start = 0, first_seed, time.monotonic()
    while done < operations and (seconds is None or time.monotonic() - start < seconds):
        rng = random.Random(seed)
        api = rng.randrange(4)
        config = s.random_config(rng, least=3, most=6, kernel="6.18", vendor="vmx", apicv=False, x2apic_api=api)
        with pair(config) as (expected, real):
            real.start_guests()
            for model in expected.vcpus:
                model.set_mp_state(r.MP_RUNNABLE)
            history: list[s.Op] = []
            for op in s.setup_ops(rng, expected):
                step(expected, real, op, history, config)
            for _ in range(min(OPS_PER_VM, operations - done)):
                op = s.guest_op(rng, expected)
                if not tame(op):
                    continue
                guest_step(expected, real, op, history, config)
                done += 1
        seed += 1
    return done


def guest_step(expected: oracle.Machine, real: RealKvm, op: s.Op, history: list[s.Op], config: s.Config) -> None:
    """One operation; running a vCPU may or may not refresh its PPR, so both sides do so before and after."""
    history.append(op)
    runs = op[0] in s.GUEST_OPS
    if runs:
        refresh_ppr(expected.vcpus[op[1]], real.vcpus[op[1]])
    want, got = s.apply(expected, op), s.apply(real, op)
    if runs:
        expected.vcpus[op[1]].get_mp_state()  # the run carried out what was pending
        refresh_ppr(expected.vcpus[op[1]], real.vcpus[op[1]])
    unknown = op[0] == "mmio_read" and want is None
    assert unknown or got == want, f"expected {want!r}, KVM says {got!r} after {s.story(config, history)}"
    for i, (model, vcpu) in enumerate(zip(expected.vcpus, real.vcpus)):
        page, real_page = s.masked(model.get_lapic()), s.masked(vcpu.get_lapic())
        assert page == real_page, f"vCPU {i} {s.differences(page, real_page)} after {s.story(config, history)}"


def refresh_ppr(model: oracle_apic.Vcpu, vcpu: RealVcpu) -> None:
    """Reads PPR on both sides, which stores it; a disabled APIC offers no way to."""
    for side in (model, vcpu):
        if model.x2apic:
            side.get_msr(PPR_MSR)
        elif model.hw_enabled:
            side.mmio_read(r.APIC_PROCPRI)


def test_guest_instructions() -> None:
    """Stores, loads and WRMSRs that a guest really executes."""
    assert run_guests(SHORT_OPS, first_seed=1, seconds=SHORT_SECONDS) > 0


def run_interrupts(trials: int, seed: int) -> None:
    """Pages at random: what the oracle calls pending is what a guest with interrupts on takes."""
    rng = random.Random(seed)
    config = s.Config(apic_ids=(0, 1))
    with pair(config) as (expected, real):
        real.start_guests()
        model, vcpu = expected.vcpus[0], real.vcpus[0]
        for _ in range(trials):
            base = r.APIC_DEFAULT_PHYS_BASE | r.APICBASE_BSP | rng.choice((0, r.APICBASE_EN, r.APICBASE_EN, 0xC00))
            page = bytearray(model.get_lapic())
            for words, chance in ((r.APIC_IRR, 0.4), (r.APIC_ISR, 0.1), (r.APIC_TMR, 0.1)):
                for word in range(8):
                    bits = 1 << rng.randrange(32) if rng.random() < chance else 0
                    struct.pack_into("<I", page, words + 0x10 * word, bits)
            struct.pack_into("<I", page, r.APIC_TASKPRI, rng.choice((0, 0, rng.randrange(256))))
            struct.pack_into("<I", page, r.APIC_SPIV, rng.choice((0xFF, 0x1FF)))
            story = f"APICBASE {base:#x}, {s.describe(('set_lapic', 0, bytes(page)))}"
            for side in (model, vcpu):
                side.set_msr(r.MSR_APICBASE, base)
                side.set_lapic(bytes(page))
            want, got = model.pending(), vcpu.taken()
            assert got == want, f"expected {want}, the guest took {got}; {story}"


def test_pending_is_what_a_guest_takes() -> None:
    run_interrupts(300, seed=1)


def test_random_sequences() -> None:
    """A few seconds' worth, so that every run of the suite looks at the real kernel at all."""
    assert run_sequences(SHORT_OPS, first_seed=1, seconds=SHORT_SECONDS) > 0


@pytest.mark.long
def test_random_sequences_at_length() -> None:
    first_seed = int(os.environ.get("FASTEXIT_KVM_SEED", "1000000"))
    assert run_sequences(LONG_OPS, first_seed) >= LONG_OPS
    assert run_guests(LONG_OPS // 4, first_seed) >= LONG_OPS // 4
    run_interrupts(LONG_OPS // 20, first_seed)
