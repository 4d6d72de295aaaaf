"""The short way of a plain IPI is the long way: outcomes and machines agree to the last byte.

kernels/unicast.py serves a machine only while it does not trace, so a machine that traces takes the long way.
"""

from __future__ import annotations

import random

import numpy as np
import pytest

import fastexit as fx
from fastexit import layout as L
from fastexit import regs as r
from fastexit.insight.compare import booted, consume
from fastexit.jit import declare
from fastexit.kernels import unicast
from fastexit.outcome import SHORT_CODES
from fastexit.profile import since

EXITS = 2_000 if declare.JIT else 120
VCPUS = 12


def build(kernel: str, seed: int, traced: bool, *, threads: bool) -> fx.Machine:
    """vCPUs in every state that the short way has to ask about; the same for the same arguments."""
    rng = random.Random(seed)
    m = fx.Machine(vcpus=VCPUS, kernel=kernel, threads=threads)
    m.boot_x2apic()
    for v in m.vcpus[: VCPUS - 2]:
        v.rdmsr(0x802)  # in the guest; the last two are not
    m.vcpus[2].rflags |= r.RFLAGS_TF
    m.vcpus[3].singlestep = True
    m.vcpus[4].nested = True
    m.vcpus[5].wrmsr(0x80F, 0xFF)  # software-disabled
    m.vcpus[6].set_msr(0x1B, 0xFEE0_0800)  # xAPIC mode
    m.vcpus[7].wrmsr(0x80F, 0x1FF)
    for vector in rng.sample(range(32, 256), 100):
        m.vcpus[7].wrmsr(0x830, fx.icr(dest=7, vector=vector) | r.ICR_TRIGGER | r.ICR_LEVEL)  # TMR bits
    if traced:
        m.trace.enable()
    return m


def storm(m: fx.Machine, seed: int, n: int) -> np.ndarray:
    """Mostly plain IPIs from and to anybody, and what is just not plain; targets that take theirs in between."""
    rng = random.Random(seed)
    exits = np.zeros(n, dtype=fx.EXIT)
    for record in exits:
        kind = rng.random()
        record["vcpu"] = rng.randrange(VCPUS)
        if kind < 0.25:
            record["reason"] = L.NOTIFICATION
            continue
        value = fx.icr(dest=rng.choice((*range(VCPUS), VCPUS, 0xFF, 0xFFFF_FFFF)), vector=rng.randrange(256))
        if kind > 0.8:
            value ^= 1 << rng.randrange(64)
        record["reason"] = m.dispatcher.vendor.wrmsr_reason
        record["msr"] = 0x830
        record["value"] = value
    return exits


def same(short: fx.Machine, long: fx.Machine) -> None:
    long.trace.disable()
    long.trace.clear()
    assert short.snapshot() == long.snapshot()


@pytest.mark.parametrize("threads", [True, False], ids=["atomics", "one-owner"])
@pytest.mark.parametrize("kernel", fx.profiles())
def test_batch(kernel: str, threads: bool) -> None:
    """Machine.run."""
    short, long = (build(kernel, 1, traced, threads=threads) for traced in (False, True))
    exits = storm(short, 2, EXITS)
    got, expected = short.run(exits), long.run(exits)
    assert got.tobytes() == expected.tobytes()
    same(short, long)
    if since(kernel, "6.18"):
        plain = (exits["msr"] == 0x830) & (got["path"] == fx.Path.FAST)
        assert plain.sum() > EXITS // 5


@pytest.mark.parametrize("kernel", fx.profiles())
def test_one_at_a_time(kernel: str) -> None:
    """Vcpu.wrmsr."""
    short, long = (build(kernel, 3, traced, threads=True) for traced in (False, True))
    for record in storm(short, 4, EXITS):
        a, b = (m.vcpus[record["vcpu"]] for m in (short, long))
        if record["reason"] == L.NOTIFICATION:
            assert a.hw_notify() == b.hw_notify()
        else:
            assert a.wrmsr(0x830, int(record["value"])) == b.wrmsr(0x830, int(record["value"])), record
            assert a.targets == b.targets, record
    same(short, long)


@pytest.mark.skipif(not declare.JIT, reason="interpreted kernels ask for no lines, and 1,600 vCPUs take them long")
def test_more_vcpus_than_near() -> None:
    """With lines asked for ahead, to the last record of the array and behind it."""
    m = booted("6.18", vcpus=1_600)
    exits = np.zeros(64, dtype=fx.EXIT)
    exits["reason"] = m.dispatcher.vendor.wrmsr_reason
    exits["msr"] = 0x830
    exits["value"] = [fx.icr(dest=dest, vector=0x41) for dest in range(1_530, 1_594)]
    exits["reason"][9::10] = L.NOTIFICATION
    exits["value"][20] = fx.icr(dest=0xFFFF_FFF0, vector=0x41)  # beyond the map
    for n in (1, 12, 13, 64):
        consume(m)
        got = m.run(exits[:n])
        ipis = exits["reason"][:n] != L.NOTIFICATION
        assert (got["path"] == np.where(ipis, fx.Path.FAST, fx.Path.HARDWARE)).all()
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
    return declare.load("fast_exit")(m.vcpus[0].where, 0x830, fx.icr(dest=1, vector=0x41)) < SHORT_CODES


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
    short, long = (build("6.18", 5, traced, threads=True) for traced in (False, True))
    for m in (short, long):
        m.mem[word] ^= bit
    exits = storm(short, 6, EXITS)
    assert short.run(exits).tobytes() == long.run(exits).tobytes()
    same(short, long)
