"""The lab's comparison for Windows guests: its guest, what a survey tells, what is a difference, planted faults."""

from __future__ import annotations

import ast
import importlib
import os
import random
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import fastexit as fx
from fastexit.jit.declare import JIT
from fastexit.kvm import comparison, judge
from fastexit.kvm.lab import hvguest as G
from fastexit.kvm.lab import hyperv, kernels
from fastexit.kvm.lab.wire import Answer
from fastexit.kvm.twins import Divergence
from mutants import Mutant, parsed

PACKAGE = Path(fx.__file__).parent
MUTANTS = tuple(parsed(Path(__file__).with_name("mutants_hyperv.diff").read_text()))
OPERATIONS = 20_000
EACH = 300


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
    for count, changed in ((None, page), (len(hyperv.SURVEYED), msrs), (None, memory)):
        words += [] if count is None else [count]
        words += [len(changed), *(word for pair in changed.items() for word in pair)]
    return Answer(0, struct.pack(f"<{len(words)}I", *words))


def test_surveys_add_up() -> None:
    eyes = hyperv.Eyes(1)
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
        assert hyperv.unlike(bytes(one), bytes(two)) == found
    two = bytearray(one)
    two[0x305] = 0x92
    assert hyperv.unlike(bytes(one), bytes(two)) == 0x300
    assert hyperv.unlike(bytes(one), bytes(two), leaks=True) is None
    two[0x305] = 0x93
    assert hyperv.unlike(bytes(one), bytes(two), leaks=True) == 0x300


# ------------------------------------------------------------------------------------------------------ planted faults


def functions(text: str) -> dict[str, ast.FunctionDef]:
    """Functions of a module by name."""
    return {node.name: node for node in ast.parse(text).body if isinstance(node, ast.FunctionDef)}


@contextmanager
def planted(mutant: Mutant) -> Iterator[None]:
    """The model has a fault: functions run other code, whoever calls them. For interpreted kernels."""
    text = (PACKAGE / mutant.file).read_text()
    right, wrong = functions(text), functions(mutant.applied(text))
    module = importlib.import_module("fastexit." + mutant.file.removesuffix(".py").replace("/", "."))
    kept: list[tuple[Callable[..., Any], Any]] = []
    for name, node in wrong.items():
        if ast.dump(node) == ast.dump(right[name]):
            continue
        node.decorator_list = []
        space = dict(vars(module))
        exec(compile(ast.Module([node], []), mutant.file, "exec"), space)  # noqa: S102
        kept.append((getattr(module, name), getattr(module, name).__code__))
        getattr(module, name).__code__ = space[name].__code__
    assert kept, mutant.what
    try:
        yield
    finally:
        for function, code in kept:
            function.__code__ = code  # type: ignore[attr-defined]


def operations_until_found(where: judge.Judge, traced: bool) -> int | None:
    """How many operations a fault survives; None: all of them."""
    done = 0
    for number in range(OPERATIONS // EACH):
        rng = random.Random(f"1/hyperv/{number}")
        setup = hyperv.HypervTwins.draw(rng, where.host, None)
        try:
            with hyperv.HypervTwins(setup, object() if traced else None, where) as twins:
                for op in twins.beginning(rng):
                    twins.step(op)
                for _ in range(EACH):
                    twins.step(twins.draw_op(rng))
                twins.finish()
                done += len(twins.steps)
        except Divergence as found:
            return done + len(found.history)
    return None


def test_each_planted_fault_has_its_place() -> None:
    assert len(MUTANTS) >= 25
    for mutant in MUTANTS:
        text = (PACKAGE / mutant.file).read_text()
        assert mutant.applied(text) != text


@pytest.mark.long
@pytest.mark.skipif(JIT or not kernels.cached(), reason="interpreted, with a kernel of the lab in the cache")
def test_planted_faults_are_found() -> None:
    version = os.environ.get("FASTEXIT_LAB_KERNEL", "6.12")
    with fx.kvm.Lab(version, exact=True) as lab:
        where = lab.judge()
        survived = []
        for mutant in MUTANTS:
            with planted(mutant):
                found = operations_until_found(where, mutant.traced)
            print(f"trap {mutant.trap}: {mutant.what}: {found}")
            survived += [mutant.what] * (found is None)
    assert not survived
