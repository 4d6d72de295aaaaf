"""The lab's comparison for Windows guests: its guest, what a survey tells, what is a difference, planted faults."""

from __future__ import annotations

import os
import random
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import fastexit as fx
import windows_mutants
from fastexit import regs as r
from fastexit.jit.declare import JIT
from fastexit.kvm import comparison, judge
from fastexit.kvm.lab import hvguest as G
from fastexit.kvm.lab import hvsurvey, hyperv, kernels
from fastexit.kvm.lab.wire import Answer
from fastexit.kvm.twins import Setup

PACKAGE = Path(fx.__file__).parent
MUTANTS = windows_mutants.MUTANTS
OPERATIONS = 20_000


def test_windows_guests_are_compared_with_kernels_of_the_lab_alone() -> None:
    with pytest.raises(ValueError, match="kernels of the lab alone"):
        comparison.of_kind(judge.of(fx.Machine), "hyperv")


def test_the_guest_has_a_handler_for_each_vector_and_no_program_begins_with_its_out() -> None:
    memory = G.image()
    assert len(memory) == G.DATA_AT
    for vector in range(256):
        low, selector, _, kind = struct.unpack_from("<HHBB", memory, G.IDT_AT + 16 * vector)
        assert (selector, kind) == (G.CS64, 0x8E)
        assert memory[low : low + 3] == bytes((0xB0, vector, 0xE9))
        jump: int = struct.unpack_from("<i", memory, low + 3)[0]
        assert low + 7 + jump == G.COMMON_AT
    for name, at in G.AT.items():
        assert memory[at] != 0xE6, name
        assert bytes((0xE6, G.PORT_DONE)) in memory[at : at + G.PROGRAM_BYTES]
    assert len(set(G.AT.values())) == len(G.AT)


def survey(page: dict[int, int], msrs: dict[int, int], memory: dict[int, int]) -> Answer:
    """A survey's answer for one vCPU with these dwords changed."""
    words: list[int] = []
    for count, changed in ((None, page), (len(hvsurvey.SURVEYED), msrs), (None, memory)):
        words += [] if count is None else [count]
        words += [len(changed), *(word for pair in changed.items() for word in pair)]
    return Answer(0, struct.pack(f"<{len(words)}I", *words))


def test_surveys_add_up() -> None:
    eyes = hvsurvey.Eyes(1)
    eyes.see(survey({8: 0x1000000}, {0: 5, 3: 1}, {0x40: 7}))
    seen = eyes.see(survey({9: 2}, {0: 6}, {}))
    assert struct.unpack_from("<II", seen.pages[0], 32) == (0x1000000, 2)
    assert seen.msrs[0][:2] == (6, 1 << 32)
    assert struct.unpack_from("<I", seen.memory, 0x100) == (7,)


def test_only_times_of_messages_may_differ_and_not_by_much() -> None:
    one = bytearray(4096)
    for at, value, found in ((0x218, 1, None), (0x220, 99, None), (0x218, 1 << 40, 0x218), (0x228, 1, 0x228)):
        two = bytearray(one)
        struct.pack_into("<Q", two, at, value)
        assert hvsurvey.unlike(bytes(one), bytes(two)) == found
    two = bytearray(one)
    two[0x305] = 0x92
    assert hvsurvey.unlike(bytes(one), bytes(two)) == 0x300
    assert hvsurvey.unlike(bytes(one), bytes(two), leaks=True) is None
    two[0x305] = 0x93
    assert hvsurvey.unlike(bytes(one), bytes(two), leaks=True) == 0x300


def told(number: int = 0) -> windows_mutants.Told:
    """Twins without a kernel, as a story begins with them."""
    plain = judge.of(fx.Machine)
    where = replace(plain, host=replace(plain.host, module="kvm_amd"))
    rng = random.Random(f"1/hyperv/{number}")
    return windows_mutants.Told(hyperv.HypervTwins.draw(rng, where.host, None), None, where)


@pytest.mark.parametrize(
    ("op", "ticked", "late"),
    [
        (("take", 0, G.DATA_AT), True, True),
        (("halt", 0, True, G.DATA_AT), True, True),
        (("take", 0, G.DATA_AT), False, False),
        (("take", 0, 0), True, False),
        (("run_through", 0), True, False),
    ],
)
def test_only_a_tick_in_a_program_that_tests_its_assist_bit_excuses_a_difference(
    op: tuple[Any, ...], ticked: bool, late: bool
) -> None:
    answer = struct.pack("<iIIIII18Q", 0, 0, 2, G.PORT_DONE, 0, ticked, *[0] * 18)
    with told() as twins:
        twins._came(op, G.came(answer))
        assert twins.may_be_late() is late


def test_msrs_that_are_remembered_are_those_that_would_be_read() -> None:
    rng = random.Random("1/hyperv/0")
    with told() as twins:
        for op in twins.beginning(rng):
            twins.step(op)
        for _ in range(150):
            twins.step(twins.draw_op(rng))
            seen = twins.steps[-1].sight.msrs
            assert seen == tuple(tuple(twins._read_msrs(vcpu)) for vcpu in twins.model.vcpus)


def alone(*ops: tuple[Any, ...]) -> list[hyperv.Step]:
    """What operations come to on a guest with one vCPU in x2APIC mode, all of Hyper-V's features and SVR 0x1FF."""
    plain = judge.of(fx.Machine)
    where = replace(plain, host=replace(plain.host, module="kvm_amd"))
    with windows_mutants.Told(Setup((0,), hyperv=True), None, where) as twins:
        for op in (("set_msr", 0, 0x1B, 0xFEE0_0D00), ("set_msr", 0, 0x80F, 0x1FF), *ops):
            twins.step(op)
        return twins.steps[2:]


def test_what_comes_first_of_a_fault_an_nmi_and_an_interrupt() -> None:
    """As kernel 6.12.118 has it: handlers that were entered one on top of the other, the last one runs."""
    nmi, irq, fault = ("set_msr", 0, 0x4000_0071, 0x400), ("set_msr", 0, 0x4000_0071, 0x41), ("fault", 0, 6)
    for ops, came in (
        ((nmi,), (2, False)),
        ((irq,), (0x41, False)),
        ((irq, nmi), (2, False)),
        ((irq, fault), "#UD"),
        ((irq, nmi, fault), (2, False)),
    ):
        steps = alone(*ops, ("take", 0, 0))
        assert steps[-1].result == came
        assert steps[-1].sight.states[0][:2] == (0, int(nmi in ops))


def test_an_init_takes_a_vcpu_away_until_it_is_made_ready() -> None:
    init = r.DM_INIT << r.ICR_DM_SHIFT | r.ICR_LEVEL
    _, again, program = alone(("set_msr", 0, 0x4000_0071, init), ("signal_msi", 0xFEE0_0000, 0x400), ("run_through", 0))
    assert again.sight.states[0] == (1, 0, 0, 0)
    assert program.readied
    assert program.result is None, "nor is the NMI there any more"


def test_signals_of_a_connection_stay_in_its_eventfd() -> None:
    """Also where it is taken from it, and where it is given to another one."""
    os_id = ("set_msr", 0, 0x4000_0000, 1)
    signal = ("hypercall", 0, 0x1_005D, 7, 0, bytes(96), False, 0)
    results = [
        step.result
        for step in alone(
            os_id,
            ("connect", 1, 7),
            ("connect", 0, 7),
            signal,
            signal,
            ("disconnect", 0, 7),
            ("connect", 0, 7),
            signal,
            *(("signals", n, 0) for n in (1, 1, 0)),
            ("connect", 0, 1 << 24),
            ("disconnect", 0, 8),
        )
    ]
    assert results == [True, None, "EINVAL", 0, 0, None, None, 0, 2, 0, 1, "EINVAL", "EINVAL"]


# ------------------------------------------------------------------------------------------------------ planted faults


def test_each_planted_fault_has_its_place() -> None:
    assert len(MUTANTS) >= 25
    for mutant in MUTANTS:
        text = (PACKAGE / mutant.file).read_text()
        assert mutant.applied(text) != text


@pytest.mark.long
@pytest.mark.skipif(JIT or not kernels.cached(), reason="interpreted, with a kernel of the lab in the cache")
def test_planted_faults_are_found() -> None:
    version = os.environ.get("FASTEXIT_LAB_KERNEL", "6.12")
    stories: windows_mutants.Right = {}
    with fx.kvm.Lab(version, exact=True) as lab:
        where = lab.judge()
        found = [(one.what, windows_mutants.hunted(where, one, OPERATIONS, stories)) for one in MUTANTS]
    assert not [what for what, result in found if not result["found"]]
