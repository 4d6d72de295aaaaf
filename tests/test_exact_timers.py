"""The comparison of timers to the nanosecond: whoever does what the model does, at whatever times, is never found.

Such a one is a third model here, in the place of the lab's kernel: it carries out operations and is looked at at times
between those that the comparison knows of.
"""

from __future__ import annotations

import random
import struct
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

import fastexit as fx
from fastexit import layout as L
from fastexit import regs as r
from fastexit.kvm import judge
from fastexit.kvm.host import Host
from fastexit.kvm.lab.exact import BEHIND_NS, ExactTimers, Step, advance
from fastexit.kvm.lab.wire import Answer
from fastexit.kvm.operations import Op
from fastexit.kvm.programs import Program
from fastexit.kvm.timers import msr
from fastexit.kvm.twins import Divergence
from fastexit.reasons import SvmExit
from generations import since
from strategies import JIT

LVTT, TMICT, TMCCT, TDCR, SVR = (
    msr(offset) for offset in (r.APIC_LVTT, r.APIC_TMICT, r.APIC_TMCCT, r.APIC_TDCR, r.APIC_SPIV)
)
NEITHER = r.LVT_TIMER_DEADLINE | r.LVT_TIMER_PERIODIC
"""LVTT's fourth mode, in which nothing counts and TMCCT reads as if it did."""


class Nobody:
    """What the comparison asks of the lab before a story begins."""

    def __init__(self, **keywords: Any) -> None:
        self.device = self.fd = None
        vcpu = SimpleNamespace(fd=0, ready=lambda: SimpleNamespace(flatten=lambda: None), tsc_khz=1_000_000)
        self.vcpus = [vcpu for _ in keywords["apic_ids"]]

    def boot_x2apic(self) -> None:
        """The third model has booted."""


def somebody(kernel: str) -> judge.Judge:
    host: Host = replace(judge.plain(kernel), module="kvm_amd", bus_cycles=since(kernel, "6.12"))
    return judge.Judge(Nobody, host, "a third model", "", "")


class Third(ExactTimers):
    """Twins whose kernel is a model: ``slow`` adds as much to each of its counts."""

    rng: random.Random
    slow: int = 0

    def _told(self) -> tuple[int, list[Step]]:
        rng = self.rng
        kernel = fx.Machine(**self.model_keywords())
        for v in kernel.vcpus:
            v.set_events(nmi_pending=0)
            v.set_mp_state(r.MP_RUNNABLE)
        kernel.boot_x2apic()
        now = BEHIND_NS
        kernel.set_time(now)
        steps = []
        for op in self.history:
            before = now + rng.randrange(100)
            if op[0] == "sleep":
                now = before + op[1] + rng.randrange(50_000)
                result = None
            else:
                now = before + rng.randrange(12_000)
                advance(kernel, now)
                if op[0] in ("take", "run_through"):
                    now += rng.randrange(80_000)
                    result = ran(kernel, op, now)
                else:
                    result = self.carry_out_on(kernel, op)
                now += rng.randrange(4_000)
            behind = now
            seen, deadlines = [], []
            for v in kernel.vcpus:
                now += rng.randrange(8_000)
                advance(kernel, now)
                page = bytearray(v.get_lapic())
                if self.slow:
                    (count,) = struct.unpack_from("<I", page, r.APIC_TMCCT)
                    struct.pack_into("<I", page, r.APIC_TMCCT, count + self.slow if count else 0)
                events = bytearray(64)
                events[13] = v.events().nmi_pending
                state = struct.pack("<I", v.get_mp_state())
                seen.append(bytes(page) + bytes(events) + state + bytes(316))
                deadlines.append(Answer(1, bytes(16) + struct.pack("<Q", v.get_msr(r.MSR_TSC_DEADLINE) or 0)))
            end = now + rng.randrange(1_000)
            now = end
            steps.append(Step(op, result, seen, deadlines, [before, behind, end]))
        return BEHIND_NS, steps

    def result(self, step: Step) -> Any:
        return step.answer


def ran(kernel: fx.Machine, op: Op, until: int) -> Any:
    """A program that lasts: a tick that comes during it goes to IRR, for the host's interrupt made the guest exit."""
    v = kernel.vcpus[op[1]]
    program = Lasting(v, until, interrupts=op[0] == "take")
    return program.take() if op[0] == "take" else program.run_through()


class Lasting(Program):
    def __init__(self, v: Any, until: int, **more: Any) -> None:
        super().__init__(v, **more)
        self.until = until

    def _out(self, *port: int) -> None:
        own = self.v.own
        while (due := self.v.machine.next_timer()) is not None and due <= self.until:
            self.v.machine.set_time(due)
            if self.v.machine.mem[own + L.K_TIMER_PENDING]:
                self.v.exit(SvmExit.INTERRUPT)
        self.v.machine.set_time(self.until)
        super()._out(*port)


def follow(kernel: str, seed: Any, story: list[Op] | None = None, slow: int = 0) -> Third:
    """Twins at the end of a story, drawn or given."""
    rng = random.Random(f"{kernel} {seed}")
    judged = somebody(kernel)
    twins = Third(Third.draw(rng, judged.host, None), judge=judged)
    twins.rng, twins.slow = rng, slow
    for _ in range(0 if story is not None else twins.operations_each):
        twins.step(twins.draw_op(rng))
    for op in story or ():
        twins.step(op)
    twins.finish()
    return twins


@pytest.mark.parametrize("kernel", ["5.10", "6.1", "6.18", "7.3"])
def test_a_third_model_is_never_found(kernel: str) -> None:
    done = undecided = 0
    for seed in range(150 if JIT else 8):
        twins = follow(kernel, seed)
        done += len(twins.history)
        undecided += twins.undecided
    assert undecided < done / 2


def page(registers: dict[int, int]) -> bytes:
    data = bytearray(r.LAPIC_PAGE_BYTES)
    for offset, value in ({r.APIC_SPIV: 0x1FF} | registers).items():
        struct.pack_into("<I", data, offset, value)
    return bytes(data)


STORIES: dict[str, list[Op]] = {
    "a target that is many periods away": [
        ("set_msr", 0, TMICT, 0xC000_0000),
        ("set_lapic", 0, page({r.APIC_LVTT: NEITHER | 0x5D, r.APIC_TMICT: 20_000, r.APIC_TDCR: 0xB})),
        ("set_msr", 0, TDCR, 0),
        ("get_msr", 0, TMCCT),
    ],
    "a target that is many short periods away": [
        ("set_msr", 0, TMICT, 0xC000_0000),
        ("set_lapic", 0, page({r.APIC_LVTT: NEITHER | 0x5D, r.APIC_TMICT: 100, r.APIC_TDCR: 3})),
        ("set_msr", 0, TDCR, 0xB),
        ("get_msr", 0, TMCCT),
    ],
    "a period that begins on one model and is stretched on both": [
        ("set_lapic", 0, page({r.APIC_LVTT: r.LVT_TIMER_PERIODIC | 0x5C, r.APIC_TMICT: 20_000, r.APIC_TMCCT: 100})),
        ("set_msr", 0, TDCR, 1),
        ("get_msr", 0, TMCCT),
    ],
    "a tick during a run": [
        ("set_msr", 0, LVTT, r.LVT_TIMER_PERIODIC | 0x41),
        ("set_msr", 0, TDCR, 0xB),
        ("set_msr", 0, TMICT, 300_000),
        ("sleep", 200_000),
        ("take", 0),
        ("take", 0),
        ("run_through", 0),
    ],
    "a count that is read": [
        ("set_msr", 0, LVTT, 0x41),
        ("set_msr", 0, TMICT, 0xC000_0000),
        ("get_msr", 0, TMCCT),
        ("get_msr", 0, TMCCT),
    ],
}


@pytest.mark.parametrize("story", STORIES)
def test_a_third_model_is_never_found_in(story: str) -> None:
    twins = [follow("6.1", seed, STORIES[story]) for seed in range(100 if JIT else 30)]
    assert any(one.undecided < len(one.history) for one in twins)


def test_counts_that_are_too_high_are_found() -> None:
    with pytest.raises(Divergence, match="TMCCT"):
        follow("6.1", 1, STORIES["a count that is read"], slow=30_000)
