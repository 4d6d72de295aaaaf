"""How Python calls an entry: ints in, an int out, nothing else; and the short codes of fast_exit."""

from __future__ import annotations

import ctypes
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

import fastexit as fx
from fastexit import layout as L
from fastexit import regs as r
from fastexit.jit import declare
from fastexit.outcome import (
    ADDRESSED_MOST,
    CODE,
    CODE_ADDRESSED,
    OUTCOMES,
    SHORT,
    SHORT_CODES,
    Effect,
    Fastpath,
    Path,
    addressed,
)

compiled = pytest.mark.skipif(not declare.JIT, reason="interpreted kernels have no door of machine code")


def booted() -> fx.Machine:
    m = fx.Machine(vcpus=3)
    m.boot_x2apic()
    return m


@pytest.mark.parametrize("bad", [1.5, "1", None, b"1", [1]])
@pytest.mark.parametrize("place", [0, 1, 2])
def test_no_int_is_refused(bad: object, place: int) -> None:
    """TypeError before anything happens, at every place; a float is no int."""
    m = booted()
    before = m.snapshot()
    arguments: list = [m.handle, 0x830, 0x1_0000_0041]
    arguments[place] = bad
    with pytest.raises(TypeError):
        declare.load("fast_exit")(*arguments)
    assert m.snapshot() == before


@compiled
@pytest.mark.parametrize("bad", [-1, 1 << 64, -(1 << 70), 1 << 200])
def test_beyond_64_bits_is_refused(bad: int) -> None:
    m = booted()
    with pytest.raises(OverflowError):
        declare.load("fast_exit")(m.handle, 0x830, bad)


@compiled
@pytest.mark.parametrize("count", [0, 1, 2, 4, 9])
def test_number_of_arguments(count: int) -> None:
    m = booted()
    with pytest.raises(TypeError):
        declare.load("fast_exit")(*[m.handle] * count)


@compiled
def test_all_bits_of_a_word_cross() -> None:
    """2**64 - 1 is a value like any other, though the conversion reports errors by it."""
    m = booted()
    assert declare.load("set_msr")(m.handle, 0, r.MSR_TSC_DEADLINE, (1 << 64) - 1) is not None
    assert m.vcpus[0].get_msr(r.MSR_TSC_DEADLINE) in (0, (1 << 64) - 1)
    assert declare.load("pending")(m.handle, 0) == (1 << 64) - 1  # NONE comes back whole


@compiled
def test_an_int_of_any_kind() -> None:
    """bool and enums are ints, as operator.index has it; NumPy's integers are not, and wrmsr() converts them."""
    m = booted()
    assert declare.load("pending")(m.handle, False) == (1 << 64) - 1
    value = np.uint64(fx.icr(dest=1, vector=0x41))
    assert m.vcpus[0].wrmsr(np.uint32(0x830), value).accepted == 1


@compiled
def test_no_reference_is_lost_or_kept() -> None:
    """A thousand calls, among them refused ones, neither free nor keep their arguments."""
    m = booted()
    value, text = fx.icr(dest=1, vector=0x41), "no integer"
    call = declare.load("fast_exit")
    before = sys.getrefcount(value), sys.getrefcount(text)
    for _ in range(1_000):
        call(m.handle, 0x830, value)
        with pytest.raises(TypeError):
            call(m.handle, value, text)
    assert (sys.getrefcount(value), sys.getrefcount(text)) == before


@compiled
def test_ctypes_functions_of_others_are_left_alone() -> None:
    """ctypes.pythonapi is one for the whole process: argument types that are set there are set for everybody."""
    declare.load("pending")
    assert ctypes.pythonapi.PyCFunction_NewEx.argtypes is None
    assert ctypes.pythonapi.PyCFunction_NewEx.restype is ctypes.c_int


@pytest.mark.parametrize("start", [0, 1])
@pytest.mark.parametrize("kind", [bytes, bytearray])
def test_exits_in_memory_of_any_kind(kind: type, start: int) -> None:
    """Read-only or misaligned exits are run as others are."""
    exits = np.zeros(3, dtype=fx.EXIT)
    exits["reason"], exits["msr"], exits["value"] = 32, 0x830, fx.icr(dest=1, vector=0x41)
    lent = kind(bytes(start) + exits.tobytes())
    given = np.frombuffer(lent, dtype=fx.EXIT, offset=start)
    assert given.flags.writeable == (kind is bytearray)
    ours, theirs = booted(), booted()
    assert ours.run(given).tolist() == theirs.run(exits).tolist()
    assert ours.snapshot() == theirs.snapshot()
    if kind is bytearray:
        del given
        lent.clear()  # BufferError if anything still held it


SCRIPT = """
import os, sys, threading, time
import numpy as np
import fastexit as fx

m = fx.Machine(vcpus=3)
m.boot_x2apic()
exits = np.zeros(1_000, dtype=fx.EXIT)
exits["reason"], exits["msr"], exits["value"] = 32, 0x830, fx.icr(dest=1, vector=0x41)
m.run(exits)
"""
FORK = """
child = os.fork()
accepted = int(fx.Machine.restore(m.snapshot()).run(exits)["accepted"].sum())
accepted += m.vcpus[0].wrmsr(0x830, 0x41).accepted
if not child:
    os._exit(accepted != 1_001)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) or accepted != 1_001)
"""
DAEMON = """
def send():
    while True:
        m.run(exits)

threading.Thread(target=send, daemon=True).start()
time.sleep(0.05)
"""


@compiled
@pytest.mark.parametrize("end", [FORK, DAEMON], ids=["fork", "daemon"])
def test_machine_code_outlives_what_loaded_it(end: str) -> None:
    """A child has its parent's code; a daemon thread may be in a batch while the interpreter goes away."""
    subprocess.run([sys.executable, "-c", SCRIPT + end], timeout=60, check=True)


@compiled
def test_a_batch_gives_up_the_gil() -> None:
    """Another Python thread runs while a long batch does; during a single exit none could."""
    m = booted()
    exits = np.zeros(1_000_000, dtype=fx.EXIT)
    exits["reason"], exits["msr"] = 32, 0x830
    exits["value"] = fx.icr(dest=1, vector=0x41)
    m.run(exits[:10])
    ticks: list[float] = []
    done = threading.Event()

    def tick() -> None:
        while not done.is_set():
            ticks.append(time.perf_counter())
            time.sleep(0.0005)

    other = threading.Thread(target=tick)
    other.start()
    while not ticks:
        time.sleep(0.001)
    spans = []
    for _ in range(20):
        start = time.perf_counter()
        m.run(exits)
        spans.append((start, time.perf_counter()))
    done.set()
    other.join()
    assert sum(start < tick < end for tick in ticks for start, end in spans) >= 5


def test_short_codes() -> None:
    """Every short code names the outcome that its bits say, and the same object as the full code does."""
    assert len(SHORT) == SHORT_CODES == 2
    for i, outcome in enumerate(SHORT):
        assert outcome is OUTCOMES[outcome.code]
        assert (outcome.path, outcome.completion, outcome.reentered) == (Path.FAST, Fastpath.REENTER_GUEST, True)
        assert (outcome.accepted, outcome.effects, outcome.targets) == (i, Effect.NONE, ())
        assert outcome.code >= SHORT_CODES


@pytest.mark.parametrize("path", [Path.FAST, Path.SLOW])
@pytest.mark.parametrize("completion", [Fastpath.REENTER_GUEST, Fastpath.EXIT_HANDLED])
@pytest.mark.parametrize("accepted", range(ADDRESSED_MOST + 1))
@pytest.mark.parametrize("effect", Effect)
def test_codes_that_name_their_target(effect: Effect, accepted: int, completion: Fastpath, path: Path) -> None:
    """Each names the outcome of one target that its bits say, and is no code of an outcome."""
    fields = {"COMPLETION": completion, "PATH": path, "EFFECTS": effect}
    for vcpu in (0, 1, L.MAX_VCPUS - 1):
        code = CODE_ADDRESSED | CODE.encode({**fields, "ACCEPTED": effect << 12 | vcpu, "MSR_WHY": accepted})
        outcome = addressed(code)
        assert (outcome.path, outcome.completion) == (path, completion)
        assert (outcome.accepted, outcome.effects, outcome.targets) == (accepted, effect, ((vcpu, effect),))
        assert outcome.code == CODE.encode({**fields, "ACCEPTED": accepted})
        assert addressed(code) == outcome == OUTCOMES[outcome.code]


@pytest.mark.parametrize("kernel", fx.profiles())
@pytest.mark.parametrize("vendor", ["vmx", "svm"])
def test_wrmsr_gives_what_the_batch_door_gives(kernel: str, vendor: str) -> None:
    """The Outcome found by a short code is that of the code, for IPIs to a running, a blocked, no and the own vCPU."""
    ours, theirs = (fx.Machine(vcpus=4, kernel=kernel, vendor=vendor) for _ in range(2))
    reason = 32 if vendor == "vmx" else 0x7C
    for m in (ours, theirs):
        m.boot_x2apic()
        for v in m.vcpus[:3]:
            m.dispatcher.start_run(v)
        m.vcpus[2].exit(12 if vendor == "vmx" else 0x78)
    for dest in (1, 2, 3, 0, 200, 0xFFFF_FFFF):
        value = fx.icr(dest=dest, vector=0x51)
        record = np.array([(0, reason, 0x830, vendor == "svm", value, 0)], dtype=fx.EXIT)
        assert ours.vcpus[0].wrmsr(0x830, value).code == int(theirs.run(record)["code"][0])
    assert ours.snapshot() == theirs.snapshot()
