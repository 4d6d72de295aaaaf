"""The oracle's timers against a real /dev/kvm.

The wall clock cannot be stopped, so it is kept from mattering: a timer is either so short that it has run out before
anybody looks again, or so long that it does not run out at all. The model's clock is the guest's TSC, read before each
operation. TMCCT is compared within `LATE_NS`, everything else exactly; an interrupt shows after KVM_RUN only, and so
the vCPUs run now and then: one OUT in real mode.

`FASTEXIT_KVM_OPS=20000 pytest -m long tests/test_timers_kvm.py` for more (`FASTEXIT_KVM_SEED` picks other sequences).
"""

from __future__ import annotations

import os
import random
import struct
import time

import pytest

import oracle
import strategies as s
from fastexit import regs as r
from kvm_vm import UNUSABLE, RealKvm

pytestmark = [pytest.mark.kvm, pytest.mark.skipif(UNUSABLE is not None, reason=UNUSABLE or "")]

LATE_NS = 30_000_000
"""How far the two clocks may be apart in TMCCT: what a busy host may take between two calls."""
SOON_NS = 5_000_000
SHORT_NS = 4 * SOON_NS
"""What runs out within this time, has run out when the next operation begins."""
SLACK_NS = 300_000
OPS_PER_VM = 60
SHORT_OPS = 1500
LONG_OPS = int(os.environ.get("FASTEXIT_KVM_OPS", "10000"))
TMCCT_MSR = r.MSR_X2APIC_BASE + (r.APIC_TMCCT >> 4)
MODES = (0, r.LVT_TIMER_PERIODIC, r.LVT_TIMER_DEADLINE, r.LVT_TIMER_DEADLINE | r.LVT_TIMER_PERIODIC)


def msr(offset: int) -> int:
    return r.MSR_X2APIC_BASE + (offset >> 4)


def count(rng: random.Random) -> int:
    return rng.choice((0, 1, 100, 200, 0x8000_0000, 0xFFFF_FFFF, 0xC000_0000 | rng.getrandbits(30)))


def deadline(rng: random.Random, model: oracle.Machine) -> int:
    """Off, past, so near that it passes at once, far, and so far that the kernel's 64 bits overflow."""
    soon = model.cycles(SOON_NS)
    ahead = rng.choice((soon // 100, 1 << 40, 1 << 50, (1 << 58) + soon, (1 << 58) + (1 << 40)))
    return rng.choice((0, 1, model.tsc() + ahead, model.tsc() + ahead))


def timer_op(rng: random.Random, model: oracle.Machine) -> s.Op:
    i = rng.randrange(len(model.vcpus))
    kind = rng.random()
    if kind < 0.2:
        return ("set_msr", i, msr(r.APIC_TMICT), count(rng))
    if kind < 0.4:
        masked = r.LVT_MASKED if rng.random() < 0.3 else 0
        return ("set_msr", i, msr(r.APIC_LVTT), rng.choice(MODES) | masked | rng.randrange(16, 256))
    if kind < 0.5:
        return ("set_msr", i, msr(r.APIC_TDCR), rng.choice((0, 1, 2, 3, 8, 9, 10, 11)))
    if kind < 0.65:
        return ("set_msr", i, r.MSR_TSC_DEADLINE, deadline(rng, model))
    if kind < 0.7:
        return ("set_msr", i, msr(r.APIC_SPIV), rng.choice((0xFF, 0x1FF, 0x1FF)))
    if kind < 0.8:
        page = bytearray(model.vcpus[i].get_lapic())
        for offset, value in (
            (r.APIC_LVTT, rng.choice(MODES) | rng.randrange(16, 256)),
            (r.APIC_TMICT, count(rng)),
            (r.APIC_TDCR, rng.choice((0, 3, 11))),
            (r.APIC_SPIV, 0x1FF),
        ):
            if rng.random() < 0.5:
                struct.pack_into("<I", page, offset, value)
        if rng.random() < 0.7:
            struct.pack_into("<I", page, r.APIC_TMCCT, count(rng))
        if rng.random() < 0.7:
            page[r.APIC_IRR : r.APIC_IRR + 0x80] = bytes(0x80)
        return ("set_lapic", i, bytes(page))
    if kind < 0.83:
        base = model.vcpus[i].apic_base
        return ("set_msr", i, r.MSR_APICBASE, base & ~0xC00 if base & 0x800 else base | 0xC00)
    if kind < 0.86:
        return ("get_msr", i, rng.choice((msr(r.APIC_TMICT), r.MSR_TSC_DEADLINE, TMCCT_MSR)))
    return ("run_through", i)


class Twins:
    """The oracle and a real VM, the same operations on both."""

    def __init__(self, config: s.Config, real: RealKvm, **more: int) -> None:
        self.config, self.real = config, real
        self.khz = real.tsc_khz()
        keywords = {name: value for name, value in vars(config).items() if name != "apic_ids"}
        keywords |= {"tsc_khz": self.khz} | more
        self.model = oracle.Machine(apic_ids=list(config.apic_ids), **keywords)
        self.history: list[s.Op] = []
        self.finest = [1 << 30] * len(config.apic_ids)
        real.start_guests()
        for i, vcpu in enumerate(self.model.vcpus):
            vcpu.set_mp_state(r.MP_RUNNABLE)
            self.step(("set_msr", i, r.MSR_APICBASE, vcpu.apic_base | r.APICBASE_EXTD))
            self.step(("set_msr", i, msr(r.APIC_SPIV), 0x1FF))

    def pass_time(self) -> None:
        """Brings the model's clock up to the guest's; whatever is short runs out first."""
        self._catch_up()
        after = self.model.next_timer()
        if after is not None and after <= self.model.now + SHORT_NS:
            time.sleep((max(0, after - self.model.now) + SLACK_NS) / 1e9)
            self._catch_up()

    def _catch_up(self) -> None:
        tsc = self.real.vcpus[0].get_msr(0x10)
        self.model.set_time(max(self.model.now, -(-tsc * 1_000_000 // self.khz)))

    def step(self, op: s.Op) -> None:
        self.history.append(op)
        self.pass_time()
        want, got = s.apply(self.model, op), s.apply(self.real, op)
        if op[0] == "get_msr" and op[2] == TMCCT_MSR and want is not None:
            self.counts_agree(op[1], want, got)
        else:
            assert got == want, f"expected {want!r}, KVM says {got!r} after {self.story()}"
        self.pass_time()
        for i, (model, vcpu) in enumerate(zip(self.model.vcpus, self.real.vcpus)):
            page, other = model.get_lapic(), vcpu.get_lapic()
            difference = s.differences(s.masked(page), s.masked(other))
            assert not difference, f"vCPU {i} {difference} after {self.story()}"
            self.counts_agree(i, *(struct.unpack_from("<I", p, r.APIC_TMCCT)[0] for p in (page, other)))
            want, got = (side.get_msr(r.MSR_TSC_DEADLINE) for side in (model, vcpu))
            assert got == want, f"vCPU {i} deadline: expected {want:#x}, KVM says {got:#x} after {self.story()}"

    def counts_agree(self, i: int, want: int, got: int) -> None:
        timer = self.model.vcpus[i].timer
        tick = self.model.bus_cycle_ns * timer.divide
        self.finest[i] = min(self.finest[i], tick)  # rescaling keeps the counts that they were apart
        apart = abs(want - got)
        if timer.period:
            apart = min(apart, timer.period // tick - apart)  # one of them may have begun the next period
        assert apart <= LATE_NS // self.finest[i], (
            f"vCPU {i} TMCCT: expected {want:#x}, KVM says {got:#x} after {self.story()}"
        )

    def story(self) -> str:
        return s.story(self.config, self.history)


def run_timers(operations: int, first_seed: int) -> int:
    """Random machines with random timers; how many operations were compared."""
    done, seed = 0, first_seed
    while done < operations:
        rng = random.Random(seed)
        seed += 1
        config = s.Config(apic_ids=(0, 1), irqchip=rng.choice(("full", "split")), tsc_deadline=rng.random() < 0.85)
        bus = rng.choice((1, 1, 10))
        with RealKvm(apic_ids=[0, 1], irqchip=config.irqchip, tsc_deadline=config.tsc_deadline, bus_cycle_ns=bus) as vm:
            twins = Twins(config, vm, bus_cycle_ns=bus, hv_timer=False)
            for _ in range(min(OPS_PER_VM, operations - done)):
                twins.step(timer_op(rng, twins.model))
                done += 1
    return done


TMICT, LVTT, TDCR, SVR = (msr(offset) for offset in (r.APIC_TMICT, r.APIC_LVTT, r.APIC_TDCR, r.APIC_SPIV))
DEADLINE = r.MSR_TSC_DEADLINE
TICK, OTHER = 0x40, 0x41
PAST, SHORT = 1, 100
WRAPS = "wraps"
"""A deadline 2**58 ticks and SOON_NS away, which times 10**6 is SOON_NS in 64 bits."""

STORIES: dict[str, tuple[list[tuple[int | str, int | str]], bool]] = {
    "a past deadline waits for the run loop": (
        [(LVTT, r.LVT_TIMER_DEADLINE | TICK), (DEADLINE, PAST), ("run", 0)],
        True,
    ),
    "a new deadline takes the tick of the old one with it": (
        [(LVTT, r.LVT_TIMER_DEADLINE | TICK), (DEADLINE, PAST), (DEADLINE, 0), ("run", 0)],
        False,
    ),
    "deadlines overflow": ([(LVTT, r.LVT_TIMER_DEADLINE | TICK), (DEADLINE, WRAPS), ("run", 0)], True),
    "a deadline outside deadline mode is nothing": ([(LVTT, TICK), (DEADLINE, PAST), ("run", 0)], False),
    "software disable drops the tick": (
        [(LVTT, TICK), (TMICT, SHORT), (SVR, 0xFF), (SVR, 0x1FF), (LVTT, TICK), ("run", 0)],
        False,
    ),
    "but not the timer": (
        [
            (LVTT, r.LVT_TIMER_PERIODIC | TICK),
            (TMICT, SHORT),
            (SVR, 0xFF),
            (SVR, 0x1FF),
            (LVTT, r.LVT_TIMER_PERIODIC | TICK),
            ("run", 0),
        ],
        True,
    ),
    "a change of the divider starts a timer that had run out": (
        [(LVTT, OTHER), (TMICT, SHORT), ("run", 0), (LVTT, TICK), (TDCR, 11), ("run", 0)],
        True,
    ),
    "leaving deadline mode drops the tick": (
        [(LVTT, r.LVT_TIMER_DEADLINE | TICK), (DEADLINE, PAST), (LVTT, TICK), ("run", 0)],
        False,
    ),
    "a masked tick does not reach the IRR": (
        [(LVTT, r.LVT_MASKED | TICK), (TMICT, SHORT), ("run", 0)],
        False,
    ),
    "a tick that was masked waits for an iteration that stays in the kernel": (
        [(LVTT, r.LVT_MASKED | TICK), (TMICT, SHORT), ("run", 0), (LVTT, TICK), ("run", 0)],
        False,
    ),
    "unmasked before the vCPU runs at all it is delivered": (
        [(LVTT, r.LVT_MASKED | TICK), (TMICT, SHORT), (LVTT, TICK), ("run", 0)],
        True,
    ),
    "a one-shot that becomes periodic is not started again": (
        [(LVTT, OTHER), (TMICT, SHORT), ("run", 0), (LVTT, r.LVT_TIMER_PERIODIC | TICK), ("run", 0)],
        False,
    ),
    "periodic timers tick again": (
        [
            (LVTT, r.LVT_TIMER_PERIODIC | OTHER),
            (TMICT, SHORT),
            ("run", 0),
            (LVTT, r.LVT_TIMER_PERIODIC | TICK),
            ("run", 0),
        ],
        True,
    ),
    "mode 3 does not start, but what ran before goes on": (
        [(LVTT, TICK), (TMICT, 0xF000_0000), (LVTT, 0x60000 | TICK), (TMICT, 0x8000_0000), (TDCR, 11)],
        False,
    ),
    "an INIT stops the timer and drops the tick": (
        [(LVTT, TICK), (TMICT, SHORT), ("init", 0), (LVTT, TICK), ("run", 0)],
        False,
    ),
}


@pytest.mark.parametrize("story", STORIES)
def test_what_becomes_of_a_tick(story: str) -> None:
    """Each of these is compared with the model at every step; here only the end is said."""
    steps, in_irr = STORIES[story]
    with RealKvm(apic_ids=[0]) as vm:
        twins = Twins(s.Config(apic_ids=(0,)), vm, hv_timer=False)
        for what, value in steps:
            if what == "run":
                twins.step(("run_through", 0))
            elif what == "init":
                twins.step(("set_msr", 0, r.MSR_X2APIC_ICR, r.DM_INIT << r.ICR_DM_SHIFT))
                twins.step(("get_mp_state", 0))
                vm.vcpus[0].flat_real_mode()
                twins.step(("set_msr", 0, SVR, 0x1FF))
            elif value == WRAPS:
                ahead = (1 << 58) + twins.model.cycles(SOON_NS)
                twins.step(("set_msr", 0, what, twins.model.tsc() + ahead))
            else:
                twins.step(("set_msr", 0, what, value))
        page = vm.vcpus[0].get_lapic()
        assert bool(page[r.APIC_IRR + 0x10 * (TICK // 32)] & 1) is in_irr


def test_random_timers() -> None:
    assert run_timers(SHORT_OPS, first_seed=1) >= SHORT_OPS


@pytest.mark.long
def test_random_timers_at_length() -> None:
    assert run_timers(LONG_OPS, int(os.environ.get("FASTEXIT_KVM_SEED", "1000000"))) >= LONG_OPS
