"""A clock that goes by itself: the host's function, or a word that it writes."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pytest

import fastexit as fx
from apics import LVTT, TMCCT, TMICT, machine
from conftest import INTERPRETED
from fastexit import layout as L
from fastexit import regs as r
from fastexit.jit.declare import load

PERIODIC = 0x200EC


class Clock:
    """A host's clock that a test moves."""

    def __init__(self) -> None:
        self.ns = 1000

    def __call__(self) -> int:
        return self.ns


def clocked(*ids: int, **options: Any) -> tuple[Clock, fx.Machine]:
    clock = Clock()
    return clock, machine(*ids, clock=clock, hv_timer=False, **options)


@pytest.mark.parametrize("dispatcher", ["python", "compiled"])
def test_each_call_looks_at_it(dispatcher: str) -> None:
    clock, m = clocked(0, 1, dispatcher=dispatcher, min_timer_period_us=0)
    v = m.vcpus[0]
    v.wrmsr(0x83E, 0xB)
    v.wrmsr(LVTT, 0xEC)
    v.wrmsr(TMICT, 500)
    assert (v.next_timer(), m.next_timer(), m.vcpus[1].next_timer()) == (1500, 1500, None)
    clock.ns += 100
    assert v.rdmsr(TMCCT) == 400
    assert v.run_timers() == []
    clock.ns += 400
    assert m.time == 1500
    (fired,) = v.run_timers()
    assert fired.targets == ((0, fx.Effect.KICK),)
    v.rflags |= r.RFLAGS_IF
    assert v.settle()
    assert (v.take(), v.next_timer()) == (fx.Interrupt(0xEC), None)


def test_it_never_goes_back() -> None:
    """Nor does a thread that was late take it back."""
    clock, m = clocked(0)
    clock.ns = 5000
    assert m.time == 5000
    clock.ns = 4000
    assert m.time == 5000


def test_what_is_refused() -> None:
    clock, m = clocked(0)
    with pytest.raises(ValueError, match="the machine's time is its clock's: run_timers fires what is due"):
        m.set_time(5000)
    for bad, kind, why in (
        (-1, ValueError, "time of the host's clock -0x1 is out of range"),
        (1 << 63, ValueError, "time of the host's clock 0x8000000000000000 is out of range"),
        (1.5, TypeError, "time of the host's clock is float"),
    ):
        clock.ns = bad  # type: ignore[assignment]
        with pytest.raises(kind, match=why):
            m.vcpus[0].rdmsr(0x802)
    with pytest.raises(TypeError, match="clock is int, not a function that gives ns"):
        fx.Machine(vcpus=1, clock=5)  # type: ignore[arg-type]


def test_a_word_that_the_host_writes() -> None:
    m = machine(0, hv_timer=False, min_timer_period_us=0)
    (v,) = m.vcpus
    m.clock_word[0] = 700
    v.wrmsr(LVTT, PERIODIC)
    v.wrmsr(TMICT, 100)
    m.clock_word[0] = 950
    assert [out.effects for out in v.run_timers()] == [fx.Effect.KICK]
    assert (v.next_timer(), m.time) == (1100, 950)


def test_the_preemption_timer_is_the_vcpus_too() -> None:
    clock = Clock()
    m = machine(0, clock=clock, hv_timer=True)
    (v,) = m.vcpus
    v.set_mp_state(r.MP_RUNNABLE)
    v.rflags |= r.RFLAGS_IF
    assert v.settle()
    v.wrmsr(LVTT, 0x400EC)
    v.wrmsr(r.MSR_TSC_DEADLINE, 50_000)
    assert v.hv_timer
    due = v.next_timer()
    assert due is not None
    clock.ns = due
    (out,) = v.run_timers()
    assert out.path is fx.Path.FAST
    assert v.settle()
    assert v.take() == fx.Interrupt(0xEC)


@pytest.mark.parametrize("kernel", ["5.8", "6.18"])
def test_the_same_as_set_time(kernel: str) -> None:
    """A machine whose clock is set and one that looks at it come to the same words, timer by timer."""
    clock, ours = clocked(0, 1, kernel=kernel, hyperv=True)
    theirs = machine(0, 1, hv_timer=False, kernel=kernel, hyperv=True)
    theirs.set_time(1000)
    for m in (ours, theirs):
        m.create_pit()
        for v in m.vcpus:
            v.set_mp_state(r.MP_RUNNABLE)
            v.rflags |= r.RFLAGS_IF
            v.settle()
            v.wrmsr(LVTT, PERIODIC)
            v.wrmsr(TMICT, 300_000 + v.index)
        for port, value in ((0x43, 0x34), (0x40, 0), (0x40, 4)):
            m.vcpus[0].io_write(port, value)
    while clock.ns < 3_000_000:
        ns = theirs.next_timer()
        assert ns == ours.next_timer() is not None
        assert ns == min(filter(None, (ours.next_machine_timer(), *(v.next_timer() for v in ours.vcpus))))
        clock.ns = ns
        there = [(vcpu, out.effects) for vcpu, out in theirs.set_time(ns) if out.effects]
        here = [(v.index, out.effects) for v in ours.vcpus for out in v.run_timers() if out.effects]
        here += [(vcpu, out.effects) for vcpu, out in ours.run_timers()]
        assert here == there
        for m in (ours, theirs):
            for v in m.vcpus:
                while v.settle() and v.take() is not None:
                    v.wrmsr(0x80B, 0)
    assert np.flatnonzero(ours.words[: L.TARGETS] != theirs.words[: L.TARGETS]).tolist() == [L.H_GUEST_MEMORY]


def test_threads_have_lists_of_their_own() -> None:
    """Two devices at once: each thread's targets are those of its own message."""
    m = fx.Machine(vcpus=4, threads=True)
    m.boot_x2apic()
    for v in m.vcpus:
        v.wrmsr(0x808, 0)
    seen: dict[int, Any] = {}
    barrier = threading.Barrier(3)

    def device(dest: int) -> None:
        m.signal_msi(0xFEE0_0000 | dest << 12, 0x51)
        barrier.wait(20)
        seen[dest] = m.targets
        barrier.wait(20)

    threads = [threading.Thread(target=device, args=(dest,)) for dest in (1, 2, 3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == {dest: ((dest, fx.Effect.NOTIFY),) for dest in (1, 2, 3)}
    assert m.targets == ()
    rows = m.mem[L.HOST_BUSY]
    for _ in range(50):  # rows of threads that have ended are used again
        last = threading.Thread(target=m.signal_msi, args=(0xFEE0_1000, 0x51))
        last.start()
        last.join()
    assert m.mem[L.HOST_BUSY] == rows


@pytest.mark.skipif(INTERPRETED, reason="interpreted kernels are Python: their accesses are atomic towards nobody")
def test_ticks_of_the_pit_are_nobodys_twice() -> None:
    """Threads that all look for what is due: as many ticks as there were periods."""
    clock, m = clocked(0, threads=True)
    m.create_pit()
    m.reinject_control(True)
    v = m.vcpus[0]
    for port, value in ((0x43, 0x34), (0x40, 0), (0x40, 4)):  # 1024 / 1193182 s
        v.io_write(port, value)
    first = m.next_machine_timer()
    assert first is not None
    stop = threading.Event()

    def look() -> None:
        while not stop.is_set():
            m.run_timers()

    threads = [threading.Thread(target=look) for _ in range(3)]
    for thread in threads:
        thread.start()
    period = m.mem[L.PIT_PERIOD]
    for n in range(200):
        clock.ns = first + n * period
        while (m.next_machine_timer() or 0) <= clock.ns:
            pass
    stop.set()
    for thread in threads:
        thread.join()
    assert m.mem[L.PIT_PENDING] == 200


def test_a_clock_of_more_than_63_bits_stands_still() -> None:
    """A timer's next target would wrap, and be due for ever."""
    m = fx.Machine(vcpus=1)
    m.boot_x2apic()
    m.vcpus[0].wrmsr(0x832, 0x2_00EC)
    load("advance_clock")(m.handle, 1_000)
    for ns in (1 << 63, (1 << 64) - 1):
        assert load("advance_clock")(m.handle, ns) == m.time == 1_000
