"""Modelled time at the C door against the Python door's, exit by exit."""

from __future__ import annotations

import random
import threading
from pathlib import Path
from typing import Any

import pytest

import fastexit as fx
from embedded import Door, compiled
from fastexit import layout as L
from fastexit.costs.meter import TimedOutcome
from fastexit.embed.cabi import Open, Status
from test_prices import exits

NO_CYCLES = (1 << 64) - 1
MACHINES: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"costs": "skylake-retpoline"}, {}),
    ({"costs": "skylake-mitigations-off", "kernel": "5.6", "apicv": False}, {"kernel": 2, "flags": Open.NO_APICV}),
    ({"costs": "epyc", "vendor": "svm", "kernel": "6.12"}, {"vendor": 1, "kernel": 6}),
]


def told(result: Any) -> tuple[int | None, ...]:
    three = result.cycles_ipi, result.cycles, result.cycles_spent
    return tuple(None if cycles == NO_CYCLES else cycles for cycles in three)


def expected(out: TimedOutcome) -> tuple[int | None, ...]:
    return out.cycles_ipi, out.cycles, out.cycles_spent


def at_c(door: Door, m: Any, v: int, name: str, args: tuple[Any, ...]) -> Any:
    if name == "exit":
        return door.exit(m, door.ffi.new("struct fx_exit *", {"vcpu": v, "reason": args[0]}))[1]
    if name == "hv_hypercall":
        return door.hv_hypercall(m, v, *args, *(0,) * (3 - len(args)), door.ffi.NULL)[1]
    if name.endswith("write") and name != "wrmsr":  # C names the length first
        args = args[0], args[2], args[1]
    return getattr(door, name)(m, v, *args)[1]


@compiled
@pytest.mark.parametrize(("python", "c"), MACHINES, ids=lambda given: "-".join(map(str, given.values())) or "default")
def test_the_same_cycles(door: Door, python: dict[str, Any], c: dict[str, Any]) -> None:
    """Every exit's cycles are TimedOutcome's; those of enter() are run_cycles."""
    p = fx.Machine(vcpus=3, **python)
    p.boot_x2apic()
    costs = door.ffi.new("char[]", python["costs"].encode())
    flags = Open.BOOT_X2APIC | Open.QUIET | c.get("flags", 0)
    m = door.open(**{"vcpus": 3, **c, "flags": flags, "costs": costs})
    rng, sent = random.Random(str(c)), 0
    for step in range(400):
        index, v = (number := rng.randrange(3)), p.vcpus[number]
        if rng.random() < 0.2:
            v.hw_notify(), v.ack(), p.signal_msi(0xFEE0_0000 | index << 12, 0x51)
            door.fx.notify(m, index), door.vector("ack", m, index)
            assert told(door.inject(m, 0xFEE0_0000 | index << 12, 0x51)[1]) == (None, None, None)
            runs = v.run()
            assert (door.fx.enter(m, index, door.result) == Status.OK) == runs
            assert door.result.cycles_spent == v.run_cycles  # type: ignore[attr-defined]
            continue
        name, args = exits(v, rng)
        try:
            getattr(v, name)(*args)
        except (fx.GeneralProtection, fx.InvalidOpcode):
            pass
        result = at_c(door, m, index, name, args)
        assert told(result) == expected(v.timed), (step, name, args)  # type: ignore[attr-defined]
        assert door.snapshot(m) == p.snapshot(), (step, name, args)
        sent += result.cycles_ipi != NO_CYCLES
    assert sent > 20
    door.fx.close(m)


@compiled
def test_hardware_and_preemption_timers(door: Door) -> None:
    """An IPI that the CPU sends by itself, and an exit that set_time makes."""
    p = fx.Machine(vcpus=2, costs="ipiv-host", ipiv=True, kernel="6.12")
    p.boot_x2apic()
    costs = door.ffi.new("char[]", b"ipiv-host")
    m = door.open(kernel=6, flags=Open.BOOT_X2APIC | Open.IPIV | Open.QUIET, costs=costs)
    for v in range(2):
        p.vcpus[v].wrmsr(0x808, 0)
        door.wrmsr(m, v, 0x808, 0)
    out = p.vcpus[0].hw_wrmsr(0x830, 1 << 32 | 0x41)
    assert told(door.hw_wrmsr(m, 0, 0x830, 1 << 32 | 0x41)[1]) == expected(out) == (150, 150, 150)  # type: ignore[arg-type]
    for msr, value in ((0x832, 0x4_00EC), (0x6E0, 5_000)):
        p.vcpus[1].wrmsr(msr, value)
        assert told(door.wrmsr(m, 1, msr, value)[1]) == expected(p.vcpus[1].timed)  # type: ignore[attr-defined]
    ((_, late),) = p.set_time(10_000)
    (result,) = door.set_time(m, 10_000)
    assert late.path is fx.Path.FAST
    assert told(result) == expected(p.vcpus[1].timed)  # type: ignore[attr-defined]
    door.fx.close(m)


@compiled
def test_tables(door: Door, tmp_path: Path) -> None:
    """By name, by path, none; a wrong one is one line; a snapshot has none."""
    m = door.open(flags=Open.BOOT_X2APIC | Open.QUIET)
    assert told(door.wrmsr(m, 0, 0x808, 0)[1]) == (None, None, None)
    assert door.fx.set_costs(m, b"skylake-retpoline") == Status.OK
    named = told(door.wrmsr(m, 0, 0x808, 0)[1])
    assert named[1] == named[2] > 1000  # type: ignore[operator]
    table = tmp_path / "mine.toml"
    table.write_text('base = "skylake-retpoline"\nvm_exit = { cycles = 100400, source = "assumed" }\n')
    assert door.fx.set_costs(m, str(table).encode()) == Status.OK
    assert told(door.wrmsr(m, 0, 0x808, 0)[1])[1] == named[1] + 100_000  # type: ignore[operator]
    for wrong, says in ((b"nowhere", "no such profile (epyc, "), (str(tmp_path).encode(), "directory")):
        assert door.fx.set_costs(m, wrong) == Status.E_RANGE
        assert says in door.last_error()
        place = door.ffi.new("fx_machine **")
        config = door.config(costs=door.ffi.new("char[]", wrong))
        assert door.lib.fx_open(config, door.ffi.NULL, place, door.ffi.NULL) == Status.E_RANGE
    assert told(door.wrmsr(m, 0, 0x808, 0)[1])[1] == named[1] + 100_000  # type: ignore[operator]
    status, copy = door.restore(door.snapshot(m))
    assert status == Status.OK
    assert told(door.wrmsr(copy, 0, 0x808, 0)[1]) == (None, None, None)
    assert not fx.Machine.restore(door.snapshot(m)).mem[L.H_CONFIG] & L.CONFIG_COSTS
    assert door.fx.set_costs(m, door.ffi.NULL) == Status.OK
    assert told(door.wrmsr(m, 0, 0x808, 0)[1]) == (None, None, None)
    for each in (m, copy):
        door.fx.close(each)


@compiled
def test_each_thread_has_its_time(door: Door) -> None:
    """vCPUs of several threads, at once: every exit costs what it costs alone."""
    vcpus, exits = 4, 500
    costs = door.ffi.new("char[]", b"skylake-retpoline")
    m = door.open(vcpus=vcpus, flags=Open.BOOT_X2APIC | Open.QUIET, costs=costs)
    alone = [(door.wrmsr(m, v, 0x808, 0), told(door.wrmsr(m, v, 0x808, 0x20)[1]))[1] for v in range(vcpus)]
    assert len(set(alone)) == 1
    seen: list[set[tuple[int | None, ...]]] = [set() for _ in range(vcpus)]

    def run(v: int) -> None:
        result = door.ffi.new("struct fx_result *")
        for _ in range(exits):
            assert door.fx.wrmsr(m, v, 0x808, 0x20, result) == Status.OK
            seen[v].add(told(result))

    threads = [threading.Thread(target=run, args=(v,)) for v in range(vcpus)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == [{alone[0]}] * vcpus
    door.fx.close(m)


@compiled
@pytest.mark.parametrize("costs", [None, "skylake-retpoline"])
def test_a_batch_with_whole_results(door: Door, costs: str | None) -> None:
    """run_results says of each record what exit says of it, a line's and a notification's among them."""
    one, other = (
        door.open(vcpus=3, flags=Open.BOOT_X2APIC | Open.QUIET, costs=name)
        for name in [door.ffi.new("char[]", costs.encode()) if costs else door.ffi.NULL] * 2
    )
    rng, wrmsr, n = random.Random(4), int(fx.VmxExit.MSR_WRITE), 300
    exits = door.ffi.new("struct fx_exit[]", n)
    for exit in exits:
        icr = rng.randrange(4) << 32 | rng.randrange(0x30, 0x40) | rng.choice((0, 0, 3 << 18))
        drawn = [
            (wrmsr, 0x830, 0, icr),
            (wrmsr, 0x830, 0, icr),
            (wrmsr, 0x80B, 0, 0),
            (L.NOTIFICATION, 0, 0, 0),
            (L.IRQ_LINE, rng.choice((4, 20)), rng.randrange(2), 0),
            (int(fx.VmxExit.MSR_READ), 0x802, 0, 0),
            (int(fx.VmxExit.EPT_MISCONFIG), 0, 4 | L.MMIO_WRITE, rng.choice((0x38, 0x0002_8000 | 0x51))),
        ]
        exit.vcpu = rng.randrange(3)
        exit.reason, exit.msr, exit.info, exit.value = rng.choice(drawn)
        exit.gpa = 0xFEC0_0000 + rng.choice((0, 0x10)) if exit.reason == fx.VmxExit.EPT_MISCONFIG else 0
    results, done = door.ffi.new("struct fx_result[]", n), door.ffi.new("uint64_t *")
    assert door.fx.run_results(one, exits, results, n, done) == Status.OK
    assert done[0] == n
    several = lines = 0
    for i in range(n):
        _, result = door.exit(other, exits + i)
        assert bytes(door.ffi.buffer(results + i)) == bytes(door.ffi.buffer(result)), i
        several += result.target == 0xFFFF_FFFE
        if exits[i].reason == L.IRQ_LINE:
            lines += result.target < 3
            assert (result.vcpu, result.cycles_spent) == (0xFFFF_FFFF, NO_CYCLES)
        elif exits[i].reason == L.NOTIFICATION or costs is None:
            assert (result.vcpu, result.cycles_spent) == (exits[i].vcpu, NO_CYCLES)
        else:
            assert result.cycles_spent < 1 << 32
    assert door.snapshot(one) == door.snapshot(other)
    assert several
    assert lines

    exits[2].vcpu = 3
    assert door.fx.run_results(one, exits, results, n, done) == Status.E_VCPU
    assert done[0] == 2
    assert door.snapshot(one) == door.snapshot(other), "none has run"
    exits[2].vcpu, exits[2].reason = 0, 0xFFFF
    assert door.fx.run_results(one, exits, results, n, done) == Status.UNHANDLED
    assert done[0] == 2
    assert door.fx.run_results(one, door.ffi.NULL, results, n, done) == Status.E_NULL
    assert door.fx.run_results(one, door.ffi.NULL, door.ffi.NULL, 0, done) == Status.OK
    door.fx.close(one), door.fx.close(other)
