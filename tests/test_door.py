"""The C door's own kernels against the methods of Python that they stand for; C is not needed to call them.

test_cabi.py holds the same against each other through C, where kernels are compiled.
"""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest

import fastexit as fx
from conftest import INTERPRETED
from fastexit import layout as L
from fastexit import regs as r
from fastexit.jit import declare
from fastexit.outcome import CODE_BLOCKED, CODE_USER
from generations import DRAWN
from storms import VENDORS, Numbers, assert_equal, between, build, icr, one, timer_exit

CALLS = 40 if INTERPRETED else 300


def same_ipi(rng: random.Random, ours: fx.Vcpu, door: fx.Vcpu) -> bool:
    """An x2APIC ICR write: whether the short way took it on; if not, it is any exit."""
    plain = fx.icr(dest=rng.choice((ours.vcpu_id, 0, 1, 2, 5, 300, 7)), vector=0x41)
    value = icr(rng) if rng.random() < 0.3 else plain
    code = declare.load("door_ipi")(door.where, value)
    got = fx.OUTCOMES[code] if code else door.wrmsr(r.MSR_X2APIC_ICR, value)
    assert got == ours.wrmsr(r.MSR_X2APIC_ICR, value)
    return code != 0


def same_run(ours: fx.Vcpu, door: fx.Vcpu) -> None:
    """KVM_RUN."""
    entered = ours.run()
    code = declare.load("door_run")(door.machine.handle, door.index)
    assert entered is (code == 0)
    if code & CODE_USER:
        assert fx.OUTCOMES[code].user == ours.exit_reason
    elif code:
        assert code == CODE_BLOCKED
    assert door.exit_reason == ours.exit_reason


def same_leave(ours: fx.Vcpu, door: fx.Vcpu) -> None:
    """What every vCPU ioctl begins with."""
    ours.machine.dispatcher.leave_guest(ours)
    declare.load("door_leave")(door.machine.handle, door.index)


@pytest.mark.parametrize("vendor", VENDORS)
@pytest.mark.parametrize("apicv", [True, False], ids=["apicv", "plain"])
@pytest.mark.parametrize("traced", [False, True], ids=["quiet", "traced"])
@pytest.mark.parametrize("kernel", DRAWN)
def test_the_same_bytes(kernel: str, traced: bool, apicv: bool, vendor: str) -> None:
    """IPIs, KVM_RUN and ioctls among exits and time: equal answers, and after each of them equal memory."""
    rng = random.Random(f"{kernel} {apicv} {vendor}")
    on = Numbers(vendor)
    halt = (int(fx.SvmExit.HLT if on.svm else fx.VmxExit.HLT), 0, 0, 0, 0)
    unknown = (on.wrmsr, 0x123, int(on.svm), 5, 0)  # may be user space's, and KVM_RUN then ends a single step
    ours, door = (build(kernel, vendor, apicv, seed=1, traced=traced) for _ in range(2))
    for m in (ours, door):
        m.fastpath |= not traced
    short = 0
    for i in range(CALLS):
        v = rng.randrange(len(ours.vcpus))
        twins = ours.vcpus[v], door.vcpus[v]
        kind = rng.randrange(9)
        if kind < 3:
            short += sum(same_ipi(rng, *twins) for _ in range(3))
        elif kind == 3:
            same_run(*twins)
        elif kind == 4:
            same_leave(*twins)
        elif kind == 8:
            record, goes_on = rng.choice(((halt, same_leave), (unknown, same_run)))
            records = np.array([(v, *record)], dtype=fx.EXIT)
            assert ours.run(records).tobytes() == door.run(records).tobytes()
            goes_on(*twins)
        elif kind == 5:
            between(rng, (ours, door))
        elif kind == 6:
            exits = [one(rng, on) if rng.random() < 0.5 else timer_exit(rng, on, ours.time) for _ in range(4)]
            records = np.array(exits, dtype=fx.EXIT)
            assert ours.run(records).tobytes() == door.run(records).tobytes()
        else:
            now = ours.time + rng.choice((0, 100, 250_000))
            assert ours.set_time(now) == door.set_time(now)
        assert_equal(ours, door, i)
        ours.trace.clear()
        door.trace.clear()
    if (kernel, vendor, apicv, traced) == ("6.18", "vmx", True, False):
        assert short > CALLS // 20


@pytest.mark.parametrize("hv_timer", [True, False])
@pytest.mark.parametrize("apicv", [True, False], ids=["apicv", "plain"])
@pytest.mark.parametrize("late", [0, 700], ids=["waiting", "ticked"])
def test_a_sleeper_leaves(late: int, apicv: bool, hv_timer: bool) -> None:
    """A tick that woke a sleeper becomes its interrupt on the way out; to one that waits for SIPI it stays a tick."""
    ours, door = machines = [fx.Machine(vcpus=2, apicv=apicv, hv_timer=hv_timer) for _ in range(2)]
    for m in machines:
        m.boot_x2apic()
        for v in m.vcpus:
            for msr, value in ((0x83E, 0xB), (0x832, 0xEC), (0x838, 500)):
                assert v.set_msr(msr, value)
        m.vcpus[0].exit(fx.VmxExit.HLT)
        assert not m.vcpus[1].run()
        m.set_time(late)
    for twins in zip(ours.vcpus, door.vcpus):
        assert twins[0].mode == r.OUTSIDE_GUEST_MODE
        same_leave(*twins)
        assert ours.snapshot() == door.snapshot()
    ticked, waits = ours.vcpus
    assert (ticked.pending(), waits.pending()) == (0xEC if late else None, None)
    assert ours.mem[waits.own + L.K_TIMER_PENDING] == (late > 0 and not hv_timer)  # that one counts in the guest only


def lived(kernel: str, vendor: str, seed: int, **options: Any) -> fx.Machine:
    """A machine with a past: registers of all sorts, timers, events and interrupts that wait."""
    rng = random.Random(seed)
    m = build(kernel, vendor, rng.random() < 0.5, seed, irqchip="split", **options)
    on = Numbers(vendor)
    for _ in range(5):
        exits = [one(rng, on) if rng.random() < 0.5 else timer_exit(rng, on, m.time) for _ in range(12)]
        m.run(np.array(exits, dtype=fx.EXIT))
        between(rng, (m,))
        m.set_time(m.time + 10_000)
    return m


def state(v: fx.Vcpu) -> dict[str, Any]:
    """What user space can see of a vCPU."""
    events = v.events()
    return {
        "page": v.get_lapic(),
        "base": v.apic_base,
        "mp_state": v.get_mp_state(),
        "deadline": v.get_msr(r.MSR_TSC_DEADLINE),
        "pv_eoi": v.get_msr(r.MSR_KVM_PV_EOI_EN),
        "smm": v.smm,
        "nmis": (events.nmi_pending, events.nmi_masked),
        "latched": events.latched_init,
        "exception": events.exception,
        "rip": v.rip,
        "rflags": v.rflags,
        "shadow": v.shadow,
        "pending": v.pending(),
    }


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("vendor", VENDORS)
def test_power_on(vendor: str, seed: int) -> None:
    """A machine with a past is what KVM_CREATE_VCPU makes: no timer, no event, no interrupt of user space's PIC."""
    fresh = fx.Machine(apic_ids=[0, 1, 2, 5, 300], vendor=vendor, irqchip="split")
    m = lived("6.18", vendor, seed)
    for v in m.vcpus:
        if m.mem[v.own + L.K_EXTINT] == 0:
            v.interrupt(0x77)
    for v in m.vcpus:
        declare.load("door_reset")(m.handle, v.index, 1)
        assert v.mode == r.OUTSIDE_GUEST_MODE
    for v, new in zip(m.vcpus, fresh.vcpus):
        assert m.mem[v.own + L.K_EXTINT] == 0
        assert m.mem[v.own + L.K_TSC_DEADLINE] == 0
        assert not v.hv_timer
        assert state(v) == state(new)
    assert m.next_timer() is None


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("vendor", VENDORS)
def test_init_by_user_space_is_an_init(vendor: str, seed: int) -> None:
    """What a vCPU is after an INIT that it takes itself, without one that still waits."""
    door = lived("6.18", vendor, seed)
    for v in door.vcpus:
        if v.smm:
            v.rsm()
        v.gif, v.vmxon = True, False
    ours = fx.Machine.restore(door.snapshot())
    for v, twin in zip(ours.vcpus, door.vcpus):
        v.get_msr(r.MSR_APICBASE)
        declare.load("latch")(ours.handle, v.index, r.PENDING_INIT, 1)
        declare.load("latch")(ours.handle, v.index, r.PENDING_SIPI, 0)
        declare.load("accept_events")(ours.handle, v.index)
        declare.load("latch")(door.handle, twin.index, r.PENDING_INIT, 1)
        declare.load("latch")(door.handle, twin.index, r.PENDING_SIPI, 1)
        declare.load("door_reset")(door.handle, twin.index, 0)
        assert twin.mode == r.OUTSIDE_GUEST_MODE
        assert door.mem[twin.own + L.K_PENDING_EVENTS] & (r.PENDING_INIT | r.PENDING_SIPI) == 0
        assert state(twin) == state(v)
        boots = twin.apic_base & r.APICBASE_BSP
        assert twin.get_mp_state() == (fx.MpState.RUNNABLE if boots else fx.MpState.INIT_RECEIVED)
