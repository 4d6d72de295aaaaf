"""The model beside the running kernel, a slice of every kind of twins; `fastexit verify` compares as much as one wants.

What runs here is drawn from fixed seeds, but for the clock. Where /dev/kvm cannot be used these tests skip, saying why.
"""

from __future__ import annotations

import functools
import random
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest

from fastexit import regs as r
from fastexit.kvm import host
from fastexit.kvm.guests import GuestTwins
from fastexit.kvm.many import ManyTwins
from fastexit.kvm.operations import Op
from fastexit.kvm.runs import RunTwins
from fastexit.kvm.timers import WRAPS_NS, WRAPS_TICKS, TimerTwins, msr
from fastexit.kvm.twins import Divergence, Setup, Twins
from real_kvm import WHY_NOT
from strategies import JIT

pytestmark = [pytest.mark.kvm, pytest.mark.skipif(WHY_NOT is not None, reason=WHY_NOT or "")]

OPERATIONS: dict[type[Twins], int] = (
    {Twins: 600, GuestTwins: 400, ManyTwins: 20, TimerTwins: 400, RunTwins: 400}
    if JIT
    else {Twins: 50, GuestTwins: 50, ManyTwins: 5, TimerTwins: 100, RunTwins: 100}
)
FEWER = tuple(range(0, 4096, 41 if JIT else 410))
"""For ManyTwins, whose thousand vCPUs take seconds to make."""


def session(cls: type[Twins], seed: int, operations: int, **model: Any) -> Twins:
    """Twins at their end, nothing found; ``model`` are keywords that make their model another one."""

    class Odd(cls):  # type: ignore[misc, valid-type]
        def model_keywords(self) -> dict[str, Any]:
            return super().model_keywords() | model

    rng = random.Random(f"{cls.kind} {seed}")
    ids = FEWER if cls is ManyTwins else None
    with (Odd if model else cls)(cls.draw(rng, host.running(), ids)) as twins:
        for op in twins.beginning(rng):
            twins.step(op)
        for _ in range(operations):
            twins.step(twins.draw_op(rng))
        twins.settle()
    return twins


def several(cls: type[Twins], operations: int, **model: Any) -> list[Twins]:
    """As many sessions as it takes."""
    each = cls.operations_each
    return [session(cls, at, min(each, operations - at), **model) for at in range(0, operations, each)]


def unless_late(test: Callable[..., None]) -> Callable[..., None]:
    """A host that is late may make twins with clocks differ once; what shows three times is a difference."""

    @functools.wraps(test)
    def patient(*arguments: Any, **keywords: Any) -> None:
        for _ in range(2):
            try:
                return test(*arguments, **keywords)
            except Divergence as found:
                if not found.late:
                    raise
            except TimeoutError:  # it did not come to compare
                pass
        return test(*arguments, **keywords)

    return patient


@pytest.mark.parametrize("cls", OPERATIONS, ids=lambda cls: cls.kind)
@unless_late
def test_model_and_kernel_agree(cls: type[Twins]) -> None:
    for twins in several(cls, OPERATIONS[cls]):
        assert twins.pages >= len(twins.history)


@pytest.mark.parametrize(
    ("cls", "model"),
    [
        (TimerTwins, {"bus_cycle_ns": 3}),
        (TimerTwins, {"tsc_deadline": False}),
        (RunTwins, {"x2apic_api": 0, "irqchip": "full"}),
        (RunTwins, {"x2apic_api": r.X2API_SUPPRESS_EOI, "irqchip": "split"}),
    ],
)
@unless_late
def test_another_model_is_found_out(cls: type[Twins], model: dict[str, Any]) -> None:
    """A model with one setting wrong differs soon, and the story of that is replayed on new twins."""
    with pytest.raises(Divergence) as found:
        several(cls, 20 * cls.operations_each, **model)
    story = found.value
    assert story.kind == cls.kind
    with cls(story.setup) as right:
        right.look()
        for op in story.history:
            right.step(op)


@unless_late
def test_runs_come_to_every_end() -> None:
    """Operations that never slept, never asked, were never refused would show nothing."""
    ends: Counter[str] = Counter()
    for twins in several(RunTwins, 6 * RunTwins.operations_each):
        assert isinstance(twins, RunTwins)
        ends += twins.ends
    assert set(ends) >= {
        *("take taken", "take nothing", "halt taken", "halt asleep", "halt went on"),
        *("interrupt accepted", "interrupt refused", "IOAPIC EOI", "run_through done"),
        *("wrmsr done", "wrmsr #GP", "wrmsr user space", "rdmsr done", "rdmsr #GP", "rdmsr user space"),
        *("complete_msr done", "complete_msr #GP"),
    }


# ---------------------------------------------------------------------------------------------- what becomes of a tick

LVTT, TMICT, TDCR, SVR = (msr(offset) for offset in (r.APIC_LVTT, r.APIC_TMICT, r.APIC_TDCR, r.APIC_SPIV))
DEADLINE = r.MSR_TSC_DEADLINE
TICK, OTHER = 0x40, 0x41
PAST, SHORT = 1, 100
PERIODIC, DEADLINES = r.LVT_TIMER_PERIODIC, r.LVT_TIMER_DEADLINE
WRAPS = "wraps"
"""A deadline that is near again because it is so far away."""


def write(register: int, value: int) -> Op:
    return ("set_msr", 0, register, value)


RUN: Op = ("run_through", 0)
INIT: Op = write(r.MSR_X2APIC_ICR, r.DM_INIT << r.ICR_DM_SHIFT)

STORIES: dict[str, tuple[list[Op], bool]] = {
    "a past deadline waits for the run loop": (
        [write(LVTT, DEADLINES | TICK), write(DEADLINE, PAST), RUN],
        True,
    ),
    "a new deadline takes the tick of the old one with it": (
        [write(LVTT, DEADLINES | TICK), write(DEADLINE, PAST), write(DEADLINE, 0), RUN],
        False,
    ),
    "deadlines overflow": (
        [write(LVTT, DEADLINES | TICK), ("deadline", 0, WRAPS), RUN],
        True,
    ),
    "a deadline outside deadline mode is nothing": (
        [write(LVTT, TICK), write(DEADLINE, PAST), RUN],
        False,
    ),
    "software disable drops the tick": (
        [write(LVTT, TICK), write(TMICT, SHORT), write(SVR, 0xFF), write(SVR, 0x1FF), write(LVTT, TICK), RUN],
        False,
    ),
    "but not the timer": (
        [
            *(write(LVTT, PERIODIC | TICK), write(TMICT, SHORT), write(SVR, 0xFF), write(SVR, 0x1FF)),
            *(write(LVTT, PERIODIC | TICK), RUN),
        ],
        True,
    ),
    "a change of the divider starts a timer that had run out": (
        [write(LVTT, OTHER), write(TMICT, SHORT), RUN, write(LVTT, TICK), write(TDCR, 11), RUN],
        True,
    ),
    "leaving deadline mode drops the tick": (
        [write(LVTT, DEADLINES | TICK), write(DEADLINE, PAST), write(LVTT, TICK), RUN],
        False,
    ),
    "a masked tick does not reach the IRR": (
        [write(LVTT, r.LVT_MASKED | TICK), write(TMICT, SHORT), RUN],
        False,
    ),
    "a tick that was masked waits for an iteration that stays in the kernel": (
        [write(LVTT, r.LVT_MASKED | TICK), write(TMICT, SHORT), RUN, write(LVTT, TICK), RUN],
        False,
    ),
    "unmasked before the vCPU runs at all it is delivered": (
        [write(LVTT, r.LVT_MASKED | TICK), write(TMICT, SHORT), write(LVTT, TICK), RUN],
        True,
    ),
    "a one-shot that becomes periodic is not started again": (
        [write(LVTT, OTHER), write(TMICT, SHORT), RUN, write(LVTT, PERIODIC | TICK), RUN],
        False,
    ),
    "periodic timers tick again": (
        [write(LVTT, PERIODIC | OTHER), write(TMICT, SHORT), RUN, write(LVTT, PERIODIC | TICK), RUN],
        True,
    ),
    "mode 3 does not start, but what ran before goes on": (
        [
            *(write(LVTT, TICK), write(TMICT, 0xF000_0000), write(LVTT, PERIODIC | DEADLINES | TICK)),
            *(write(TMICT, 0xC000_0000), write(TDCR, 11)),
        ],
        False,
    ),
    "an INIT stops the timer and drops the tick": (
        [
            *(write(LVTT, TICK), write(TMICT, SHORT), INIT, ("get_mp_state", 0), ("ready", 0), write(SVR, 0x1FF)),
            *(write(LVTT, TICK), RUN),
        ],
        False,
    ),
}


@pytest.mark.parametrize("story", STORIES)
@unless_late
def test_what_becomes_of_a_tick(story: str) -> None:
    """Each of these is compared with the kernel at every step; here only the end is said."""
    ops, in_irr = STORIES[story]
    with TimerTwins(Setup(apic_ids=(0,))) as twins:
        for op in (*twins.beginning(random.Random(0)), *ops):
            twins.step((*op[:2], WRAPS_TICKS + twins.ticks(WRAPS_NS)) if op[-1] == WRAPS else op)
        page = twins.real.vcpus[0].get_lapic()
    assert bool(page[r.APIC_IRR + 0x10 * (TICK // 32)] & 1) is in_irr
