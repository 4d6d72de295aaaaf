"""A clock that goes on by itself at the C door: advance, run_timers and next_timer_of, against Python's."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import pytest

import fastexit as fx
from embedded import NOBODY, Door, compiled
from fastexit import regs as R
from fastexit.config import latest_clock
from fastexit.embed.cabi import Open, Status


def run_timers(door: Door, m: Any, v: int, room: int = 2) -> Iterator[Any]:
    results, count = door.ffi.new("struct fx_result[]", room), door.ffi.new("uint64_t *")
    while True:
        status = door.fx.run_timers(m, v, results, room, count)
        yield from results[0 : count[0]]
        if status != Status.MORE:
            assert status == Status.OK
            return


def next_timer(door: Door, m: Any, v: int) -> int | None:
    place = door.ffi.new("uint64_t *")
    status = door.fx.next_timer_of(m, v, place)
    assert status in (Status.OK, Status.NOTHING)
    return place[0] if status == Status.OK else None


@compiled
@pytest.mark.parametrize("hv_timer", [True, False])
def test_the_same_timers(door: Door, hv_timer: bool) -> None:
    """Each vCPU's timers and the machine's, at the same clock: the same results, and the same memory."""
    p = fx.Machine(vcpus=2, hv_timer=hv_timer)
    p.boot_x2apic()
    p.create_pit()
    flags = Open.BOOT_X2APIC | Open.QUIET | (0 if hv_timer else Open.NO_HV_TIMER)
    m = door.open(flags=flags)
    assert door.fx.create_pit(m, 1) == Status.OK
    for port, value in ((0x43, 0x34), (0x40, 0xA9), (0x40, 0x04)):  # 1 ms
        p.vcpus[0].io_write(port, value)
        door.io_write(m, 0, port, 1, value)
    rng, happened, now = random.Random(5), 0, 0
    for step in range(200):
        v, cpu = (number := rng.randrange(2)), p.vcpus[number]
        if rng.random() < 0.5:
            msr, value = rng.choice(
                [(0x832, 0x4_00EC), (0x832, 0x2_00EC), (0x838, 90_000), (0x6E0, now + 50_000), (0x80B, 0)]
            )
            cpu.wrmsr(msr, value)
            door.wrmsr(m, v, msr, value)
        else:
            now += rng.randrange(300_000)
            p.clock_word[0] = now
            assert door.fx.advance(m, now) == Status.OK
            assert door.fx.advance(m, now // 2) == Status.OK  # never back
        assert next_timer(door, m, v) == cpu.next_timer()
        assert next_timer(door, m, NOBODY) == p.next_machine_timer()
        ours = [(v, out.accepted, out.effects) for out in cpu.run_timers()]
        assert [(r.vcpu, r.accepted, r.effects) for r in run_timers(door, m, v)] == ours, step
        happened += len(ours)
        ticks = [(index, out.effects) for index, out in p.run_timers()]
        results = list(run_timers(door, m, NOBODY))
        assert {r.vcpu for r in results} <= {NOBODY}
        assert [(r.target, r.effects) for r in results] == ticks
        cpu.rflags ^= R.RFLAGS_IF
        info = door.ffi.new("struct fx_cpu *")
        door.fx.get_cpu(m, v, info)
        info.rflags = cpu.rflags
        door.fx.set_cpu(m, v, info)
        assert door.snapshot(m) == p.snapshot(), step
    assert happened > 20
    assert door.fx.advance(m, latest_clock(1_000_000) + 1) == Status.E_RANGE
    door.fx.close(m)
