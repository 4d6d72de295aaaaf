"""Stories of Windows guests: operations that belong together and that chance alone would hardly put in a row.

Models: nothing. Each is drawn when those before it are done.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from fastexit import hyperv as hv
from fastexit import regs as r
from fastexit.hyperv import HvCall
from fastexit.kvm.lab import hvdraw as D
from fastexit.kvm.lab import hvguest as G
from fastexit.kvm.operations import Op
from fastexit.kvm.values import chance

if TYPE_CHECKING:
    from fastexit.kvm.lab.hyperv import HypervTwins


def ticking(rng: random.Random, m: HypervTwins, i: int) -> Iterator[Op]:
    """A timer with messages that runs out again and again, with its slot free or taken, and EOMs between."""
    n, s = rng.randrange(4), rng.randrange(1, 16)
    slot = G.DATA_AT + m.pools.page_of[4 + i % 4] * 0x1000
    config, count = hv.MSR_HV_STIMER0_CONFIG + 2 * n, hv.MSR_HV_STIMER0_CONFIG + 2 * n + 1
    yield ("set_msr", i, hv.MSR_HV_SIMP, slot | 1)
    if chance(rng, 0.7):
        yield ("wrmsr", i, hv.MSR_HV_SINT0 + s, D.sint_value(rng, m.pools))
    yield ("set_msr", i, config, 0)
    seconds = rng.randrange(20, 40) * D.TICKS // 10
    periodic = chance(rng, 0.7)
    yield ("set_msr", i, count, seconds if periodic else m.model.time // 100 + seconds)
    yield ("wrmsr", i, config, 1 | periodic * hv.HV_STIMER_PERIODIC | s << hv.HV_STIMER_SINT_SHIFT)
    yield ("run_through", i)
    for _ in range(rng.randrange(1, 4)):
        op = D.rest(rng, m)
        if op is None:
            break
        yield op
        yield rng.choice((("take", i, 0), ("run_through", i), ("run_through", i)))
        if chance(rng, 0.4):
            yield ("memory", slot + hv.HV_MESSAGE_BYTES * s, bytes(4))
        if chance(rng, 0.5):
            yield ("wrmsr", i, hv.MSR_HV_EOM, 0)
            yield ("run_through", i)


def offered(rng: random.Random, m: HypervTwins, i: int) -> Iterator[Op]:
    """Two or three interrupts, one of them perhaps of a SINT with auto-EOI, taken and looked for in the assist page."""
    at = G.DATA_AT + m.pools.page_of[i] * 0x1000
    yield ("wrmsr", i, hv.MSR_HV_VP_ASSIST_PAGE, at | 1)
    yield ("wrmsr", i, hv.MSR_HV_TPR, 0)
    for _ in range(rng.randrange(4)):
        yield ("wrmsr", i, hv.MSR_HV_EOI, 0)
    vectors = sorted(rng.sample(m.pools.vectors, rng.randrange(2, 4)))
    if chance(rng, 0.5):
        yield ("wrmsr", i, hv.MSR_HV_SINT0 + D.sint(rng, m.pools), rng.choice(vectors) | hv.HV_SINT_AUTO_EOI)
    target = m.vcpus[i]
    for one in vectors:
        address = 0xFEE0_0000 | (target.id & 0xFF) << 12 | (target.id & ~0xFF) << 32
        yield ("signal_msi", address, one)
        if chance(rng, 0.7):
            yield ("take", i, at if chance(rng, 0.6) else 0)
    for _ in range(rng.randrange(3)):
        yield rng.choice((("take", i, at), ("run_through", i), ("test_clear", i, at), D.eoi(rng, m, i)))


def _sent(rng: random.Random, m: HypervTwins, i: int, j: int, low: int) -> Op:
    """The synthetic ICR of vCPU i, written by its guest or by user space, for vCPU j alone.

    Of ids that eight bits do not tell apart a guest's might be for itself, and so might one in xAPIC mode, whose
    register may have another id than its own.
    """
    sender, target = m.vcpus[i], m.vcpus[j]
    shift = r.ICR_DEST_SHIFT + (0 if sender.x2apic else r.XAPIC_DEST_SHIFT)
    by_guest = i != j and max(sender.id, target.id) < 0xFF and chance(rng, 0.7) and sender.x2apic
    return ("wrmsr" if by_guest else "set_msr", i, hv.MSR_HV_ICR, (target.id << shift | low) & (1 << 64) - 1)


def starting(rng: random.Random, m: HypervTwins, i: int) -> Iterator[Op]:
    """INIT and SIPI, with what else comes to a vCPU that waits, and a guest that runs there afterwards."""
    j = rng.randrange(len(m.vcpus))
    yield _sent(rng, m, i, j, r.DM_INIT << r.ICR_DM_SHIFT | r.ICR_LEVEL | rng.choice((0, r.ICR_TRIGGER)))
    if chance(rng, 0.3):
        yield _sent(rng, m, i, j, r.DM_INIT << r.ICR_DM_SHIFT | r.ICR_TRIGGER)
    for _ in range(rng.randrange(3)):
        mode = rng.choice((r.DM_NMI, r.DM_FIXED, r.DM_LOWEST))
        yield _sent(rng, m, i, j, mode << r.ICR_DM_SHIFT | rng.choice(m.pools.vectors))
    for _ in range(rng.randrange(3)):
        yield _sent(rng, m, i, j, r.DM_STARTUP << r.ICR_DM_SHIFT | rng.randrange(256))
    yield D.enabled(m, j)
    yield rng.choice((("run_through", j), ("take", j, 0), ("halt", j, True, 0), ("ready", j)))


def alarming(rng: random.Random, m: HypervTwins, i: int) -> Iterator[Op]:
    """NMIs, with interrupts beside them, while NMIs are blocked or not."""
    j = rng.randrange(len(m.vcpus))
    at = D.assist(m, j)
    if chance(rng, 0.7):
        yield ("ready", j)
    for _ in range(rng.randrange(1, 4)):
        yield _sent(rng, m, i, j, r.DM_NMI << r.ICR_DM_SHIFT | rng.choice(m.pools.vectors))
        if chance(rng, 0.4):
            yield _sent(rng, m, i, j, rng.choice(m.pools.vectors))
    for _ in range(rng.randrange(1, 4)):
        yield rng.choice(
            (("take", j, at), ("window", j, at), ("halt", j, chance(rng, 0.5), at), ("run_through", j), ("ready", j))
        )
    if chance(rng, 0.3):
        yield ("fault", j, G.VECTOR_UD)
        yield _sent(rng, m, i, j, rng.choice((r.DM_NMI, r.DM_FIXED)) << r.ICR_DM_SHIFT | rng.choice(m.pools.vectors))
        yield rng.choice((("take", j, at), ("window", j, at), ("halt", j, chance(rng, 0.5), at)))


def connected(rng: random.Random, m: HypervTwins, i: int) -> Iterator[Op]:
    """A connection that is given an eventfd, signalled, read and taken from it again."""
    n, number = rng.randrange(D.EVENTFDS), rng.choice(m.pools.connections)
    yield ("connect", n, number)
    for _ in range(rng.randrange(1, 4)):
        flag = rng.choice((0, 0, 0, 1 << rng.randrange(24, 64)))
        yield ("hypercall", i, HvCall.SIGNAL_EVENT | hv.HV_CALL_FAST, number | flag, 0, bytes(96), False, 0)
    yield ("signals", n, 0)
    if chance(rng, 0.5):
        yield ("disconnect", n, number)
        yield ("signals", n, 0)


STORIES: tuple[Callable[[random.Random, HypervTwins, int], Iterator[Op]], ...] = (
    ticking,
    offered,
    starting,
    alarming,
    connected,
)


def draw(rng: random.Random, m: HypervTwins) -> Iterator[Op]:
    """A story now and then, else what `hvdraw.draw` draws."""
    if chance(rng, 0.03):
        return rng.choice(STORIES)(rng, m, rng.randrange(len(m.vcpus)))
    return D.draw(rng, m)
