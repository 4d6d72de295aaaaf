"""Atomics and bit operations: their values in every mode, their machine code, and that threads lose nothing."""

from __future__ import annotations

import ctypes
import platform
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from fastexit.jit import atomics, declare
from fastexit.jit.declare import JIT, apart, ctz, entry, kernel, load, msb, open_words, popcount
from fastexit.kernels.typed import ONE, ZERO, U

MASK = (1 << 64) - 1
WORDS = U(1 << 15)
ROUNDS = 2_000_000

u64 = st.integers(0, MASK) | st.sampled_from([0, 1, 1 << 63, MASK, 0xFFFF_FFFF, 1 << 32])
nonzero = u64.filter(bool)
compiled_only = pytest.mark.skipif(not JIT, reason="interpreted kernels are atomic towards nobody")


@entry
@kernel("u8(u8, u8, u8)")
def word_or(handle, i, value):
    return atomics.fetch_or(open_words(handle, WORDS), i, value)


@entry
@kernel("u8(u8, u8, u8)")
def word_and(handle, i, value):
    return atomics.fetch_and(open_words(handle, WORDS), i, value)


@entry
@kernel("u8(u8, u8, u8)")
def word_add(handle, i, value):
    return atomics.fetch_add(open_words(handle, WORDS), i, value)


@entry
@kernel("u8(u8, u8, u8)")
def word_exchange(handle, i, value):
    return atomics.exchange(open_words(handle, WORDS), i, value)


@entry
@kernel("u8(u8, u8, u8, u8)")
def word_compare_exchange(handle, i, old, new):
    return atomics.compare_exchange(open_words(handle, WORDS), i, old, new)


@entry
@kernel("u8(u8, u8, u8)")
def bit_set(handle, i, bit):
    return atomics.test_and_set_bit(open_words(handle, WORDS), i, bit)


@entry
@kernel("u8(u8, u8, u8)")
def bit_clear(handle, i, bit):
    return atomics.test_and_clear_bit(open_words(handle, WORDS), i, bit)


@entry
@kernel("u8(u8, u8, u8)")
def word_store_load(handle, i, value):
    m = open_words(handle, WORDS)
    atomics.store_release(m, i, value)
    atomics.fence()
    return atomics.load_acquire(m, i)


@entry
@kernel("u8(u8)")
def highest(x):
    return msb(x)


@entry
@kernel("u8(u8)")
def lowest(x):
    return ctz(x)


@entry
@kernel("u8(u8)")
def count(x):
    return popcount(x)


@kernel("u8(words, u8)")
def meet(m, i):
    """Wait until two threads are here."""
    atomics.fetch_add(m, i, ONE)
    while atomics.load_acquire(m, i) != U(2):
        pass
    return ZERO


@entry
@kernel("u8(u8, u8)")
def race_add(handle, rounds):
    m = open_words(handle, WORDS)
    meet(m, ZERO)
    for _ in range(rounds):
        atomics.fetch_add(m, ONE, ONE)
    return ZERO


@entry
@kernel("u8(u8, u8)")
def race_compare_exchange(handle, rounds):
    m = open_words(handle, WORDS)
    meet(m, ZERO)
    for _ in range(rounds):
        old = m[ONE]
        while True:
            was = atomics.compare_exchange(m, ONE, old, old + ONE)
            if was == old:
                break
            old = was
    return ZERO


@entry
@kernel("u8(u8, u8)")
def race_set(handle, bits):
    """How many of the bits from word 1 on this thread was the one to set."""
    m = open_words(handle, WORDS)
    meet(m, ZERO)
    won = ZERO
    for j in range(bits):
        won += ONE - atomics.test_and_set_bit(m, ONE + (U(j) >> U(6)), U(j) & U(63))
    return won


@entry
@kernel("u8(u8, u8)")
def race_clear(handle, bits):
    """How many of the bits from word 1 on this thread was the one to clear."""
    m = open_words(handle, WORDS)
    meet(m, ZERO)
    won = ZERO
    for j in range(bits):
        won += atomics.test_and_clear_bit(m, ONE + (U(j) >> U(6)), U(j) & U(63))
    return won


@entry
@kernel("u8(u8, u8)")
def race_own_bit(handle, rounds):
    """Set and clear a bit of this thread's own beside another thread's; how often it was not as this thread left it."""
    m = open_words(handle, WORDS)
    bit = ONE << atomics.fetch_add(m, U(2), U(63))
    meet(m, ZERO)
    wrong = ZERO
    for _ in range(rounds):
        if atomics.fetch_or(m, ONE, bit) & bit:
            wrong += ONE
        if not atomics.fetch_and(m, ONE, ~bit) & bit:
            wrong += ONE
    return wrong


class Memory:
    def __init__(self) -> None:
        self.words = np.zeros(int(WORDS), np.uint64)
        self.handle = self.words.ctypes.data

    def __getitem__(self, i: int) -> int:
        return int(self.words[i])

    def __setitem__(self, i: int, value: int) -> None:
        self.words[i] = value


@pytest.fixture(scope="module")
def memory() -> Iterator[Memory]:
    memory = Memory()
    declare.register(memory.handle, memory.words)
    yield memory
    declare.unregister(memory.handle)


@pytest.mark.parametrize(
    ("name", "after"),
    [
        ("word_or", lambda old, value: old | value),
        ("word_and", lambda old, value: old & value),
        ("word_add", lambda old, value: (old + value) & MASK),
        ("word_exchange", lambda old, value: value),
    ],
)
@given(old=u64, value=u64)
@example(old=MASK, value=MASK)
def test_word(memory: Memory, name: str, after: Callable[[int, int], int], old: int, value: int) -> None:
    memory[3] = old
    assert load(name)(memory.handle, 3, value) == old
    assert memory[3] == after(old, value)


@given(word=u64, expected=u64, new=u64)
@example(word=1 << 63, expected=1 << 63, new=0)
def test_compare_exchange(memory: Memory, word: int, expected: int, new: int) -> None:
    memory[3] = word
    assert load("word_compare_exchange")(memory.handle, 3, expected, new) == word
    assert memory[3] == (new if word == expected else word)


@given(word=u64, bit=st.integers(0, 63))
def test_bits(memory: Memory, word: int, bit: int) -> None:
    memory[3] = word
    assert load("bit_set")(memory.handle, 3, bit) == word >> bit & 1
    assert memory[3] == word | 1 << bit
    memory[3] = word
    assert load("bit_clear")(memory.handle, 3, bit) == word >> bit & 1
    assert memory[3] == word & ~(1 << bit)


@pytest.mark.parametrize("bit", [64, 127, MASK])
def test_bit_number_stays_in_its_word(memory: Memory, bit: int) -> None:
    memory.words[2:5] = 0
    assert load("bit_set")(memory.handle, 3, bit) == 0
    assert list(memory.words[2:5]) == [0, 1 << bit % 64, 0]
    assert load("bit_clear")(memory.handle, 3, bit) == 1
    assert not memory.words[2:5].any()


@given(value=u64)
def test_store_load(memory: Memory, value: int) -> None:
    assert load("word_store_load")(memory.handle, 3, value) == value == memory[3]


@given(x=nonzero)
@example(x=1)
@example(x=1 << 63)
@example(x=MASK)
def test_bit_scans(x: int) -> None:
    assert load("highest")(x) == x.bit_length() - 1
    assert load("lowest")(x) == (x & -x).bit_length() - 1
    assert load("count")(x) == x.bit_count()


def test_no_bit() -> None:
    assert load("count")(0) == 0


@pytest.mark.skipif(JIT and not declare.BOUNDSCHECK, reason="bounds are checked with NUMBA_BOUNDSCHECK=1")
@pytest.mark.parametrize("name", ["word_or", "word_exchange", "bit_set", "word_store_load"])
def test_bounds(memory: Memory, name: str) -> None:
    with pytest.raises(IndexError):
        load(name)(memory.handle, int(WORDS), 0)


@compiled_only
def test_c_function_pointer(memory: Memory) -> None:
    add = ctypes.CFUNCTYPE(ctypes.c_uint64, *[ctypes.c_uint64] * 3)(declare.address("word_add"))
    memory[3] = 1 << 63
    assert add(memory.handle, 3, 5) == 1 << 63
    assert memory[3] == (1 << 63) + 5


@compiled_only
def test_only_entries_are_callable() -> None:
    with pytest.raises(TypeError, match="called by kernels only"):
        meet(0, 0)


@compiled_only
def test_kernels_are_integers_only() -> None:
    kernel("u8(u8)")(lambda x: x * 0.5)
    with pytest.raises(TypeError, match="computes with floats"):
        declare._compile({"half": declare.KERNELS.pop()})


@pytest.mark.skipif(not JIT or platform.machine() != "x86_64", reason="machine code of x86-64")
@pytest.mark.parametrize(
    ("name", "instruction"),
    [
        ("bit_set", r"lock\s+btsq"),
        ("bit_clear", r"lock\s+btrq"),
        ("word_add", r"lock\s+xaddq"),
        ("word_exchange", r"xchgq"),
        ("word_compare_exchange", r"lock\s+cmpxchgq"),
    ],
)
def test_one_instruction(monkeypatch: pytest.MonkeyPatch, name: str, instruction: str) -> None:
    from fastexit.jit import build

    monkeypatch.setattr(build, "_machine_code", lambda machine, module: machine.emit_assembly(module))
    code = declare._compile({name: declare.ENTRIES[name]}).objects
    assert re.search(instruction, code)
    assert ("cmpxchg" in code) == ("cmpxchg" in instruction)


@pytest.mark.skipif(
    not JIT or declare.BOUNDSCHECK or platform.machine() != "x86_64", reason="machine code of x86-64, no bounds checked"
)
def test_a_kernel_returns_in_a_register(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is stored for its caller to load, and there is no status, which no kernel would set."""
    from fastexit.jit import build

    monkeypatch.setattr(build, "_machine_code", lambda machine, module: machine.emit_assembly(module))
    successor = apart(kernel("u8(u8)")(lambda x: x + np.uint64(1)))
    kernel("u8(u8)")(lambda x: successor(x))
    try:
        code = declare._compile({"twice": declare.KERNELS.pop()}).objects
    finally:
        declare.CALLEES.pop(declare.KERNELS.pop().function)
    assert re.search(r"leaq\s+1\(%rdi\), %rax\s+retq", code)
    assert not re.search(r"\(%rsp\), %rax", code)


def race(name: str, memory: Memory, rounds: int) -> int:
    """Run an entry in two threads at once; the sum of what they return."""
    memory[0] = 0
    function = load(name)
    with ThreadPoolExecutor(2) as pool:
        return sum(run.result() for run in [pool.submit(function, memory.handle, rounds) for _ in range(2)])


@compiled_only
@pytest.mark.parametrize("name", ["race_add", "race_compare_exchange"])
def test_no_increment_is_lost(memory: Memory, name: str) -> None:
    memory[1] = MASK - 9
    race(name, memory, ROUNDS)
    assert memory[1] == 2 * ROUNDS - 10


@compiled_only
def test_every_bit_has_one_winner(memory: Memory) -> None:
    memory.words[:] = 0
    assert race("race_set", memory, ROUNDS) == ROUNDS
    assert (memory.words[1 : 1 + ROUNDS // 64] == MASK).all()
    assert race("race_clear", memory, ROUNDS) == ROUNDS
    assert not memory.words[1:].any()


@compiled_only
def test_neighbours_in_a_word(memory: Memory) -> None:
    memory.words[:3] = 0
    assert race("race_own_bit", memory, ROUNDS) == 0
    assert memory[1] == 0
