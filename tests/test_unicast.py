"""The short way of a plain IPI is the long way: outcomes and machines agree to the last byte.

kernels/unicast.py serves a machine only while it does not trace, so a machine that traces takes the long way.
"""

from __future__ import annotations

import random

import numpy as np
import pytest

import fastexit as fx
from apics import alias
from fastexit import layout as L
from fastexit import regs as r
from fastexit.insight.compare import booted, consume
from fastexit.jit import declare
from fastexit.kernels import unicast
from fastexit.outcome import CODE_ADDRESSED, SHORT_CODES
from fastexit.profile import since
from fastexit.traits import Trait

EXITS = 2_000 if declare.JIT and not declare.BOUNDSCHECK else 120
AT_ONCE = 15
VCPUS = 12
TICK = 0x60
"""LVTT's vector, masked: its deadline runs out in vain, and an IPI of that vector makes the next entry wait for it."""
SOON = (0, 500, 900)
"""Deadlines so near that they run out at once, timer_advance_ns early."""
SETUPS = {
    "plain": {},
    "one owner": {"threads": False},
    "early timers": {"timer_advance_ns": 1000},
    "early hrtimers": {"timer_advance_ns": 1000, "hv_timer": False, "retpoline": False},
    "split": {"irqchip": "split", "x2apic_api": 3},
    "no APICv": {"apicv": False, "timer_advance_ns": 1000},
    "SVM": {"vendor": "svm"},
    "SVM without AVIC": {"vendor": "svm", "apicv": False},
    "off": {"fastpath": False},
    "no map": {},
}
HAVE_IT = ("plain", "one owner", "early timers", "early hrtimers", "split")
SHORT = [kernel for kernel in fx.profiles() if since(kernel, "6.18")]
"""Machines and generations that have the short way."""
CASES = [(kernel, setup) for kernel in fx.profiles() for setup in (SETUPS if kernel in SHORT else ("plain",))]


def build(kernel: str, seed: int, traced: bool, setup: str) -> fx.Machine:
    """vCPUs in every state that the short way has to ask about; the same for the same arguments."""
    rng = random.Random(seed)
    options = dict(SETUPS[setup])
    fastpath = options.pop("fastpath", True)
    m = fx.Machine(vcpus=VCPUS, kernel=kernel, **options)
    m.boot_x2apic()
    m.fastpath = fastpath
    for v in m.vcpus[: VCPUS - 2]:
        v.rdmsr(0x802)  # in the guest; the last two are not
        v.wrmsr(0x832, r.LVT_TIMER_DEADLINE | r.LVT_MASKED | TICK)
    m.vcpus[2].rflags |= r.RFLAGS_TF
    m.vcpus[3].singlestep = True
    m.vcpus[4].nested = True
    m.vcpus[5].wrmsr(0x80F, 0xFF)  # software-disabled
    m.vcpus[6].set_msr(0x1B, 0xFEE0_0800)  # xAPIC mode
    m.vcpus[7].wrmsr(0x80F, 0x1FF)
    for vector in rng.sample(range(32, 256), 100):
        m.vcpus[7].wrmsr(0x830, fx.icr(dest=7, vector=vector) | r.ICR_TRIGGER | r.ICR_LEVEL)  # TMR bits
    if setup == "no map":
        for v in m.vcpus[-2:]:
            v.set_msr(r.MSR_APICBASE, 0xFEE0_0800)
        alias(m, VCPUS - 1, VCPUS - 2)
        assert bool(m.mem[m.mem[L.H_MAP] + L.MAP_PRESENT]) is (Trait.MAP_BY_VOTES in m.profile.traits)
    if traced:
        m.trace.enable()
    refresh(m)
    return m


def refresh(m: fx.Machine) -> None:
    """What makes the next IPIs special again: interrupts have been taken, one vCPU sleeps, one was kicked, shadows."""
    for v in m.vcpus:
        while v.ack() is not None:
            v.eoi()
    m.vcpus[9].exit(fx.SvmExit.HLT if m.vendor == "svm" else fx.VmxExit.HLT)
    for v in m.vcpus[::2]:
        v.shadow = r.SHADOW_STI
    declare.load("kick")(m.handle, 1, L.NONE)


def somebody(rng: random.Random) -> int:
    """Often one of two, so that what comes of several exits of one vCPU is met."""
    return rng.choice((0, 7, rng.randrange(VCPUS), rng.randrange(VCPUS)))


def storm(m: fx.Machine, seed: int, n: int) -> np.ndarray:
    """Mostly plain IPIs from and to anybody, and what is just not plain; targets that take theirs in between."""
    rng = random.Random(seed)
    exits = np.zeros(n, dtype=fx.EXIT)
    for record in exits:
        kind = rng.random()
        record["vcpu"] = somebody(rng)
        if kind < 0.25:
            record["reason"] = L.NOTIFICATION
            continue
        record["reason"] = m.dispatcher.vendor.wrmsr_reason
        record["info"] = m.dispatcher.vendor.wrmsr_info1
        if kind < 0.35:
            record["msr"], record["value"] = r.MSR_TSC_DEADLINE, rng.choice(SOON)
            continue
        vector = TICK if kind < 0.5 else rng.randrange(256)
        dest = rng.choice((somebody(rng), rng.choice((*range(VCPUS), VCPUS, 0xFF, 0xFFFF_FFFF))))
        value = fx.icr(dest=dest, vector=vector)
        if kind > 0.8:
            value ^= 1 << rng.randrange(64)
        record["msr"] = 0x830
        record["value"] = value
    return exits


def same(short: fx.Machine, long: fx.Machine) -> None:
    long.trace.disable()
    long.trace.clear()
    assert short.snapshot() == long.snapshot()
    long.trace.enable()


@pytest.mark.parametrize(("kernel", "setup"), CASES)
def test_batch(kernel: str, setup: str) -> None:
    """Machine.run."""
    short, long = (build(kernel, 1, traced, setup) for traced in (False, True))
    exits = storm(short, 2, EXITS)
    for first in range(0, EXITS, AT_ONCE):
        some = exits[first : first + AT_ONCE]
        assert short.run(some).tobytes() == long.run(some).tobytes()
        same(short, long)
        for m in (short, long):
            refresh(m)
    if setup.startswith("early"):
        assert sum(short.mem[v.own + L.K_WAITED] for v in short.vcpus) >= min(SOON[1:])


@pytest.mark.parametrize(("kernel", "setup"), CASES)
def test_one_at_a_time(kernel: str, setup: str) -> None:
    """Vcpu.wrmsr."""
    short, long = (build(kernel, 3, traced, setup) for traced in (False, True))
    for i, record in enumerate(storm(short, 4, EXITS)):
        a, b = (m.vcpus[record["vcpu"]] for m in (short, long))
        if record["reason"] == L.NOTIFICATION:
            assert a.hw_notify() == b.hw_notify()
        else:
            msr, value = int(record["msr"]), int(record["value"])
            assert a.wrmsr(msr, value) == b.wrmsr(msr, value), record
            assert a.targets == b.targets, record
        if i % AT_ONCE == 0:
            same(short, long)
            refresh(short)
            refresh(long)
    same(short, long)


@pytest.mark.parametrize("kernel", fx.profiles())
def test_generations(kernel: str) -> None:
    """Which machines have the short way: it tells by its code, where the long way gives 0 and leaves all as it was."""
    for setup in SETUPS:
        m = build(kernel, 5, False, setup)
        before = m.snapshot()
        for sender, dest, accepted in ((0, 1, 1), (1, VCPUS, 0)):
            code = declare.load("door_ipi")(m.vcpus[sender].where, fx.icr(dest, 0x41, level=True, busy=True))
            if kernel in SHORT and setup in HAVE_IT:
                assert code
                assert fx.OUTCOMES[code].accepted == accepted
            elif accepted:
                assert not code, setup
                assert m.snapshot() == before


@pytest.mark.skipif(not declare.JIT, reason="interpreted kernels ask for no lines, and 1,600 vCPUs take them long")
def test_more_vcpus_than_near() -> None:
    """With lines asked for ahead, to the last record of the array and behind it."""
    m = booted("6.18", vcpus=1_600)
    exits = np.zeros(64, dtype=fx.EXIT)
    exits["reason"] = m.dispatcher.vendor.wrmsr_reason
    exits["msr"] = 0x830
    exits["value"] = [fx.icr(dest=dest, vector=0x41) for dest in range(1_530, 1_594)]
    exits["reason"][9::10] = L.NOTIFICATION  # of vCPU 0, to which nothing is posted
    exits["value"][20] = fx.icr(dest=0xFFFF_FFF0, vector=0x41)  # beyond the map
    for n in (1, 12, 13, 64):
        consume(m)
        got = m.run(exits[:n])
        ipis = exits["reason"][:n] != L.NOTIFICATION
        assert (got["path"] == np.where(ipis, fx.Path.FAST, fx.Path.SLOW)).all()
        hit = ipis & (np.arange(n) != 20)
        assert (got["accepted"] == hit).all()
        assert [v.index for v in m.vcpus if v.pid[:4].any()] == [int(value >> 32) for value in exits["value"][:n][hit]]


# ---------------------------------------------------------------------------------- for which machines the short way is
HEADER = {
    "trait": (L.H_TRAITS, int(unicast.HAS), int(unicast.IRRELEVANT)),
    "configuration": (L.H_CONFIG, int(unicast.HAS_CONFIG), int(unicast.IRRELEVANT_CONFIG)),
}
"""What unicast.possible reads: the word, the bits that it needs, and those that make no difference."""
IRRELEVANT = [
    pytest.param(word, 1 << bit, id=f"{what} {bit}")
    for what, (word, _, irrelevant) in HEADER.items()
    for bit in range(64)
    if irrelevant >> bit & 1
]


def takes_short_way(m: fx.Machine) -> bool:
    """Whether an IPI to a target that has taken all its vectors is sent by unicast.send."""
    consume(m)
    code = declare.load("fast_exit")(m.vcpus[0].where, 0x830, fx.icr(dest=1, vector=0x41))
    return code < SHORT_CODES or bool(code & CODE_ADDRESSED)


@pytest.mark.parametrize("what", HEADER)
def test_every_bit_that_is_not_known_declines(what: str) -> None:
    """A trait or a switch that is added later may change what an ICR write does, so it has to be listed first."""
    word, needed, irrelevant = HEADER[what]
    m = booted("6.18", vcpus=2)
    usual = m.mem[word]
    assert takes_short_way(m)
    assert usual & needed == needed
    for bit in range(64):
        m.mem[word] = usual ^ 1 << bit
        assert takes_short_way(m) == bool(irrelevant >> bit & 1), f"{what} bit {bit}"


@pytest.mark.parametrize(("word", "bit"), IRRELEVANT)
def test_irrelevant_bits_are_irrelevant(word: int, bit: int) -> None:
    """With any of them turned over, the short way is still the long way."""
    short, long = (build("6.18", 5, traced, "plain") for traced in (False, True))
    for m in (short, long):
        m.mem[word] ^= bit
    exits = storm(short, 6, EXITS)
    assert short.run(exits).tobytes() == long.run(exits).tobytes()
    same(short, long)
