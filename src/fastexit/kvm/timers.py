"""Twins with clocks: what timers do, ticks that wait for KVM_RUN, counts that go down.

Models: nothing. Time cannot be stopped, so it is kept from mattering: a timer is either so short that it has run out
before anybody looks again, or so long that it does not run out at all. The model's clock is the guest's TSC, read
before each operation.
"""

from __future__ import annotations

import random
import struct
from collections.abc import Iterator
from typing import Any, ClassVar

from fastexit import layout as L
from fastexit import regs as r
from fastexit.kvm.host import Host
from fastexit.kvm.judge import Judge
from fastexit.kvm.operations import Op, apply, describe
from fastexit.kvm.twins import TMCCT_MSR, Setup, Twins
from fastexit.kvm.values import chance

LATE_NS = 1_000_000
"""How far the two clocks may be apart in TMCCT, beside the time that passed between the sides' turns."""
SHORT_NS = 20_000_000
"""What is due within this time is waited for; everything else stays far away while twins live."""
SOON_NS = 100_000
WRAPS_NS = 2_000_000
"""What is left of a deadline so far away that the kernel's 64 bits overflow; written later, it is far away indeed."""
SLACK_NS = 100_000
"""How late the host's timer interrupts may be."""
TRIES = 50

WRAPS_TICKS = 1 << 58
"""Times 10^6 this is 0 in 64 bits."""
TSC_MSR = 0x10
MODES = (0, r.LVT_TIMER_PERIODIC, r.LVT_TIMER_DEADLINE, r.LVT_TIMER_DEADLINE | r.LVT_TIMER_PERIODIC)


def msr(offset: int) -> int:
    """The x2APIC MSR of a page offset."""
    return r.MSR_X2APIC_BASE + (offset >> 4)


def count(rng: random.Random) -> int:
    """A count that is over at once, or not while twins live."""
    return rng.choice((0, 1, 100, 200, 0xC000_0000, 0xFFFF_FFFF, 0xC000_0000 | rng.getrandbits(30)))


def setup(rng: random.Random, host: Host, ids: tuple[int, ...] | None) -> Setup:
    """Two vCPUs (or these), any irqchip, mostly with TSC deadlines, now and then with a slow bus."""
    return Setup(
        apic_ids=ids or (0, 1),
        irqchip=rng.choice(("full", "split")),
        x2apic_api=r.X2API_32BIT_IDS,
        tsc_deadline=chance(rng, 0.85),
        bus_cycle_ns=rng.choice((1, 1, 10)) if host.bus_cycles else 1,
    )


class TimerTwins(Twins):
    """TMICT, TMCCT, TDCR, LVTT, TSC deadlines, KVM_SET_LAPIC's restart, what disables an APIC, ticks.

    States are compared exactly, a tick's way into the IRR among them: it goes there at KVM_RUN only, which
    ("run_through", i) is. TMCCT may differ by LATE_NS and the time that was measured between the two sides' turns since
    the twins were made (``apart``, ns), in counts of the finest divider that the timer has had. ("deadline", i, ticks)
    is a TSC deadline so many ticks ahead.
    """

    kind = "timers"
    needs: ClassVar[frozenset[str]] = Twins.needs | {"wait", "tsc_khz"}
    states = True
    traceable = False
    last_questions: ClassVar[tuple[Op, ...]] = Twins.last_questions[:-1]  # the code segment is the programs'
    operations_each = 100
    planned: list[Op]
    about: ClassVar[str] = (
        "TMICT, TMCCT, TDCR, LVTT, TSC deadlines, KVM_SET_LAPIC's restart, SVR, APICBASE, INIT, ticks at KVM_RUN; "
        f"TMCCT within {LATE_NS // 1_000_000} ms beside the time between the two sides' turns"
    )

    def __init__(self, setup: Setup, witness: Any = None, judge: Judge | None = None) -> None:
        super().__init__(setup, witness, judge)
        self.apart: int = 0
        self.finest: list[int] = [1 << 30] * len(self.vcpus)

    @classmethod
    def draw(cls, rng: random.Random, host: Host, ids: tuple[int, ...] | None) -> Setup:
        return setup(rng, host, ids)

    def model_keywords(self) -> dict[str, Any]:
        """The model's TSC is the real one."""
        self.khz: int = self.real.vcpus[0].tsc_khz
        return super().model_keywords() | {"tsc_khz": self.khz}

    def beginning(self, rng: random.Random) -> Iterator[Op]:
        for i in range(len(self.vcpus)):
            yield ("ready", i)
        yield ("boot_x2apic",)

    def draw_op(self, rng: random.Random) -> Op:
        if self.planned:
            return self.planned.pop(0)
        i = rng.randrange(len(self.vcpus))
        if not self.able(i):
            return ("ready", i)
        if chance(rng, 0.03):
            self.planned = self._held_back(rng, i)
        kind = rng.random()
        if kind < 0.2:
            return ("set_msr", i, msr(r.APIC_TMICT), count(rng))
        if kind < 0.4:
            masked = r.LVT_MASKED if chance(rng, 0.3) else 0
            return ("set_msr", i, msr(r.APIC_LVTT), rng.choice(MODES) | masked | rng.randrange(16, 256))
        if kind < 0.5:
            return ("set_msr", i, msr(r.APIC_TDCR), rng.choice((0, 1, 2, 3, 8, 9, 10, 11)))
        if kind < 0.65:
            return self._deadline_op(rng, i)
        if kind < 0.7:
            return ("set_msr", i, msr(r.APIC_SPIV), rng.choice((0xFF, 0x1FF, 0x1FF)))
        if kind < 0.8:
            return ("set_lapic", i, self._page(rng, i))
        if kind < 0.825:
            base = self.vcpus[i].apic_base
            both = r.APICBASE_EN | r.APICBASE_EXTD
            return ("set_msr", i, r.MSR_APICBASE, base & ~both if base & r.APICBASE_EN else base | both)
        if kind < 0.83:
            return ("set_msr", i, r.MSR_X2APIC_ICR, self.vcpus[i].id << r.ICR_DEST_SHIFT | r.DM_INIT << r.ICR_DM_SHIFT)
        if kind < 0.86:
            return ("get_msr", i, rng.choice((msr(r.APIC_TMICT), r.MSR_TSC_DEADLINE, TMCCT_MSR)))
        return ("run_through", i)

    def _held_back(self, rng: random.Random, i: int) -> list[Op]:
        """A short timer whose APIC is disabled by software and enabled again, or whose tick finds LVTT masked.

        Disabling loses the tick and not the timer; a tick that LVTT holds back comes later.
        """
        lvtt = rng.choice((0, r.LVT_TIMER_PERIODIC)) | rng.randrange(16, 256)
        short: Op = ("set_msr", i, msr(r.APIC_TMICT), rng.choice((100, 200)))
        unmasked: Op = ("set_msr", i, msr(r.APIC_LVTT), lvtt)
        run: Op = ("run_through", i)
        if chance(rng, 0.5):
            return [("set_msr", i, msr(r.APIC_LVTT), lvtt | r.LVT_MASKED), short, run, unmasked, run]
        disabled, enabled = (("set_msr", i, msr(r.APIC_SPIV), value) for value in (0xFF, 0x1FF))
        return [unmasked, short, disabled, enabled, unmasked, run]

    def able(self, i: int) -> bool:
        """Whether a vCPU can run a program as it is."""
        return self.model.vcpus[i].get_mp_state() == r.MP_RUNNABLE and self.real.vcpus[i].is_flat()

    def _deadline_op(self, rng: random.Random, i: int) -> Op:
        """Off, past, so near that it passes at once, far, and so far that it is near again."""
        kind = rng.randrange(6)
        if kind < 2:
            return ("set_msr", i, r.MSR_TSC_DEADLINE, kind)
        wraps = WRAPS_TICKS + self.ticks(WRAPS_NS)
        far = (1 << 40, 1 << 50, WRAPS_TICKS + (1 << 40))
        return ("deadline", i, rng.choice((self.ticks(SOON_NS), self.ticks(SOON_NS), wraps, *far)))

    def _page(self, rng: random.Random, i: int) -> bytes:
        page = bytearray(self.vcpus[i].page)
        for offset, value in (
            (r.APIC_LVTT, rng.choice(MODES) | rng.randrange(16, 256)),
            (r.APIC_TMICT, count(rng)),
            (r.APIC_TDCR, rng.choice((0, 3, 11))),
            (r.APIC_SPIV, 0x1FF),
        ):
            if chance(rng, 0.5):
                struct.pack_into("<I", page, offset, value)
        if chance(rng, 0.7):
            struct.pack_into("<I", page, r.APIC_TMCCT, count(rng))
        if chance(rng, 0.7):
            page[r.APIC_IRR : r.APIC_IRR + 0x80] = bytes(0x80)
        return bytes(page)

    def may_be_late(self) -> bool:
        return True

    # ------------------------------------------------------------------------------------------------------- clocks

    def ticks(self, ns: int) -> int:
        """TSC ticks in a time."""
        return ns * self.khz // 1_000_000

    def catch_up(self) -> int:
        """Brings the model's clock to the guest's TSC, which is returned."""
        tsc: int | None = self.real.vcpus[0].get_msr(TSC_MSR)
        assert tsc is not None
        self.model.set_time(max(self.model.time, -(-tsc * 1_000_000 // self.khz)))
        return tsc

    def next_tick(self) -> int | None:
        """How long until everything short has ticked on both sides, ns; None when nothing short counts.

        A tick is no news while one waits already. Periods of the two sides need not begin together.
        """
        mem, now, waits = self.model.mem, self.model.time, []
        for v in self.model.vcpus:
            due = mem[v.own + L.K_HRTIMER]
            if due <= now + SHORT_NS and not mem[v.own + L.K_TIMER_PENDING]:
                periodic = mem[v.own + L.K_TIMER_MODE] == r.LVT_TIMER_PERIODIC
                waits.append(max(due - now, min(mem[v.own + L.K_PERIOD], SHORT_NS) if periodic else 0))
        return max(waits, default=None)

    def pass_time(self, late: int = 0) -> None:
        """Whatever is short runs out, on both sides; ``late``: one of them may have begun so much later, ns."""
        self.catch_up()
        wait = self.next_tick()
        if wait is not None:
            self.real.wait((wait + late + SLACK_NS) / 1e9)
            self.catch_up()

    def step(self, op: Op) -> None:
        """One operation on both sides, with the clocks brought together before it; then a look when time has passed."""
        if op[0] == "run_through" and not self.real.vcpus[op[1]].is_flat():
            return  # in a replay that left out what made it able
        self.history.append(op)
        for _ in range(TRIES):
            self.pass_time()
            began = self.catch_up()
            done = self._absolute(op)
            expected, got = apply(self.model, done), apply(self.real, done)
            took = self.since(began)
            if op[0] != "deadline" or took < WRAPS_NS:
                break
        else:
            raise TimeoutError(f"this host is too busy to write a deadline on both sides within {WRAPS_NS} ns")
        self.apart += took
        self.same_result(op, expected, got)
        self.pass_time(late=took)
        self.look()

    def _absolute(self, op: Op) -> Op:
        if op[0] != "deadline":
            return op
        return ("set_msr", op[1], r.MSR_TSC_DEADLINE, self.catch_up() + op[2])

    def since(self, tsc: int) -> int:
        """Time since then, ns."""
        now: int | None = self.real.vcpus[0].get_msr(TSC_MSR)
        assert now is not None
        return (now - tsc) * 1_000_000 // self.khz

    # ---------------------------------------------------------------------------------------------- what is compared

    def same_result(self, op: Op, expected: Any, got: Any) -> None:
        if op[0] == "get_msr" and op[2] == TMCCT_MSR and None not in (expected, got):
            self.same_count(op[1], expected, got)
        else:
            self.same(describe(op), expected, got)

    def look_beside_the_page(self, i: int, model: Any, real: Any) -> None:
        super().look_beside_the_page(i, model, real)
        self.same(f"vCPU {i} mp_state", model.get_mp_state(), real.get_mp_state())
        counts = (struct.unpack_from("<I", side.get_lapic(), r.APIC_TMCCT)[0] for side in (model, real))
        self.same_count(i, *counts)
        deadlines = (side.get_msr(r.MSR_TSC_DEADLINE) for side in (model, real))
        self.same(f"vCPU {i} TSC deadline", *deadlines)

    def same_count(self, i: int, expected: int, got: int) -> None:
        """Whether two counts are near enough."""
        own, mem = self.model.vcpus[i].own, self.model.mem
        tick = self.setup.bus_cycle_ns * mem[own + L.K_DIVIDE]
        # Rescaling keeps the counts that they were apart.
        self.finest[i] = min(self.finest[i], tick)
        apart = abs(expected - got)
        if 0 < mem[own + L.K_PERIOD] <= SHORT_NS:
            # One of them may have begun the next period. A long one has not: its 0 is far from the whole count.
            apart = min(apart, abs(mem[own + L.K_PERIOD] // tick - apart))
        between = self.since(self.ticks(self.model.time))
        if apart > (LATE_NS + self.apart + between) // self.finest[i]:
            raise self.divergence(f"vCPU {i} TMCCT: expected {expected:#x}, KVM says {got:#x}")
