"""Guests of the SimPy adapter: timers by name, mistakes that are told, what the statistics say."""

from __future__ import annotations

import json
import re
import runpy
from pathlib import Path
from typing import Any

import pytest

import fastexit as fx
from fastexit.adapters import simpy as adapter
from fastexit.adapters.simpy import Cpu, GuestError, Simulation
from fastexit.profile import since
from generations import DRAWN

pytestmark = pytest.mark.skipif(adapter.simulation.simpy is None, reason="SimPy is missing: pip install simpy")
COSTS = "skylake-retpoline"


def machine(vcpus: int = 1, **options: Any) -> fx.Machine:
    return fx.Machine(vcpus=vcpus, costs=COSTS, threads=False, **options)


def ran(guest: Any, m: fx.Machine | None = None, *vectors: int) -> tuple[Simulation, list[float]]:
    """The simulation of one guest, and when its handlers ran."""
    sim, ticks = Simulation(m or machine()), []
    sim.cpus[0].start(guest, {vector: lambda cpu, vector: ticks.append(cpu.sim.env.now) for vector in vectors})
    sim.run()
    return sim, ticks


# -------------------------------------------------------------------------------------------------------------- timers


@pytest.mark.parametrize(("kernel", "apicv"), [("6.18", True), ("5.6", True), ("5.8", False)])
@pytest.mark.parametrize("length", [{"us": 100}, {"ns": 100_000}])
def test_a_timer_comes_once(length: dict, kernel: str, apicv: bool) -> None:
    began = []

    def guest(cpu: Cpu):
        yield from cpu.compute(1_000)
        assert (yield from cpu.set_timer(vector=0xEC, **length)) is None
        began.append(cpu.sim.env.now)
        yield from cpu.wait(1_000_000)

    _, ticks = ran(guest, machine(kernel=kernel, apicv=apicv), 0xEC)
    (tick,) = ticks
    assert 98_000 < tick - began[0] < 104_000


@pytest.mark.parametrize(("floor", "period"), [(200, 200_000), (0, 100_000), (500, 500_000)])
def test_periods_have_kvms_floor(floor: int, period: int) -> None:
    def guest(cpu: Cpu):
        yield from cpu.set_timer(us=100, vector=0xEC, periodic=True)
        yield from cpu.wait(5 * period + 50_000)
        yield from cpu.stop_timer()
        yield from cpu.wait(5 * period)

    _, ticks = ran(guest, machine(min_timer_period_us=floor), 0xEC)
    assert len(ticks) == 5, "none after stop_timer"
    assert {round(after - before, -2) for before, after in zip(ticks, ticks[1:])} == {period}


@pytest.mark.parametrize(("bus", "seconds"), [(1, 4), (1, 5), (1, 500), (4, 30)])
def test_long_times_take_a_divisor(bus: int, seconds: int) -> None:
    def guest(cpu: Cpu):
        yield from cpu.set_timer(us=seconds * 1_000_000, vector=0xEC)
        yield from cpu.halt()

    _, ticks = ran(guest, machine(bus_cycle_ns=bus), 0xEC)
    assert ticks[0] == pytest.approx(seconds * 1e9, rel=1e-5)


@pytest.mark.parametrize("khz", [1_000_000, 2_500_000, 333_333])
def test_deadlines_are_in_the_guests_tsc(khz: int) -> None:
    """Its offset among them."""
    asked = []

    def guest(cpu: Cpu):
        yield from cpu.wait(70_000)
        yield from cpu.wrmsr(0x10, 123_456_789)
        for vector in (0xED, None):
            began = cpu.sim.env.now
            yield from cpu.tsc_deadline(us=50, vector=vector)
            asked.append(began)
            yield from cpu.wait(100_000)
        yield from cpu.tsc_deadline(ns=50_000)
        yield from cpu.stop_timer()
        yield from cpu.wait(100_000)

    sim, ticks = ran(guest, machine(tsc_khz=khz), 0xED)
    assert len(ticks) == 2, "none of the one that was stopped"
    for began, tick in zip(asked, ticks):
        assert 50_000 < tick - began < 52_500
    assert sim.machine.vcpus[0].tsc > 123_456_789


@pytest.mark.parametrize(
    ("wanted", "complaint"),
    [
        (lambda cpu: cpu.set_timer(vector=0xEC), "either us= or ns="),
        (lambda cpu: cpu.set_timer(vector=0xEC, us=1, ns=1), "either us= or ns="),
        (lambda cpu: cpu.set_timer(vector=0x100, us=1), "vector 0x100 is out of range"),
        (lambda cpu: cpu.set_timer(vector=0xEC, us=-1), "-1000 ns is no time"),
        (lambda cpu: cpu.set_timer(vector=0xEC, ns=float("nan")), "nan ns is no time"),
        (lambda cpu: cpu.set_timer(vector=0xEC, ns=0.2), "0.2 ns is no time for the timer: 1 to 549755813760 ns"),
        (lambda cpu: cpu.set_timer(vector=0xEC, us=1e9), "1e+12 ns is no time for the timer"),
        (lambda cpu: cpu.tsc_deadline(us=5), "vCPU 0: the timer is not in deadline mode"),
        (lambda cpu: cpu.tsc_deadline(vector=0xEC), "either us= or ns="),
        (lambda cpu: cpu.set_timer(vector=15, us=1), "vector 15 is none that an APIC delivers: 16 to 255"),
        (lambda cpu: cpu.tsc_deadline(vector=0, us=1), "vector 0 is none that an APIC delivers"),
    ],
)
def test_timers_refuse(wanted: Any, complaint: str) -> None:
    def guest(cpu: Cpu):
        yield from wanted(cpu)

    with pytest.raises(ValueError, match=re.escape(complaint)):
        ran(guest)


# ------------------------------------------------------------------------------------------------------------ mistakes


def sends(cpu: Cpu):
    yield from cpu.compute(1_000)
    yield from cpu.ipi(dest=1, vector=0xFD)


def computes(cpu: Cpu):
    yield from cpu.compute(100_000)


def two(guest: Any, other: Any, strict: bool = True, **handlers: Any) -> Simulation:
    sim = Simulation(machine(2), strict=strict)
    sim.cpus[0].start(guest)
    sim.cpus[1].start(other, **handlers)
    sim.run()
    return sim


def test_a_vector_without_a_handler_is_an_error() -> None:
    with pytest.raises(GuestError, match=r"vCPU 1: interrupt 0xfd at [0-9.]+ ns has no handler: cpu.start\(guest, "):
        two(sends, computes)
    assert two(sends, computes, strict=False).cpus[1].interrupts == 1


def forgets(cpu: Cpu):
    yield from cpu.compute(1_000)
    cpu.ipi(dest=1, vector=0xFD)
    yield from cpu.compute(1_000)


def forgets_last(cpu: Cpu):
    yield from cpu.compute(1_000)
    cpu.ipi(dest=1, vector=0xFD)


def keeps(cpu: Cpu):
    yield from cpu.compute(1_000)
    _out = cpu.ipi(dest=1, vector=0xFD)


@pytest.mark.parametrize("guest", [forgets, forgets_last, keeps])
def test_a_forgotten_yield_from_is_an_error(guest: Any) -> None:
    line = guest.__code__.co_firstlineno + 2
    said = rf"vCPU 0: cpu.ipi\(...\) was made and never run: .*{re.escape(__file__)}:{line}: .*cpu.ipi\(dest=1"
    with pytest.raises(GuestError, match=said):
        two(guest, computes)
    assert two(guest, computes, strict=False).cpus[1].interrupts == 0


def test_a_handler_forgets_too() -> None:
    def handler(cpu: Cpu, vector: int) -> None:
        cpu.ipi(dest=0, vector=0xFC)

    with pytest.raises(GuestError, match=r"vCPU 1: cpu.ipi\(...\) was made and never run"):
        two(sends, computes, handlers={0xFD: handler})


def test_a_callback_forgets_too() -> None:
    sim = Simulation(machine(1))
    sim.after(100, lambda: sim.cpus[0].ipi(vector=0xFD) and None)
    with pytest.raises(GuestError, match=r"cpu.ipi\(...\) was made and never run"):
        sim.run()
    sim.run()


def test_what_has_not_run_says_so() -> None:
    def early(cpu: Cpu):
        out = cpu.ipi(dest=1, vector=0xFD)
        yield from cpu.compute(out.cycles)

    with pytest.raises(
        AttributeError, match=r"cycles of what has not run: out = yield from cpu.ipi\(...\); .*:\d+: out"
    ):
        two(early, computes)

    def yields(cpu: Cpu):
        yield cpu.ipi(dest=1, vector=0xFD)

    with pytest.raises(
        GuestError, match=r"vCPU 0: cpu.ipi\(...\) is no event to wait for: yield from cpu.ipi\(...\); .*:\d+"
    ):
        two(yields, computes)


@pytest.mark.parametrize("outside", [False, True])
def test_whom_no_ipi_reaches_is_kicked_too(outside: bool) -> None:
    """An entry of the IOAPIC has its target scan, a new APIC map all others: each of them exits once for it."""
    m = machine(vcpus=3)

    def guest(cpu: Cpu):
        for index, value in ((0x11 + 2 * 20, 1 << 24), (0x10 + 2 * 20, 0x8041)):
            yield from cpu.mem_write(0xFEC0_0000, index)
            yield from cpu.mem_write(0xFEC0_0010, value)
        yield from cpu.wait(10_000)
        if outside:
            cpu.v.get_lapic()
        yield from cpu.wrmsr(0x80F, 0xFF)
        yield from cpu.wait(10_000)

    def computes(cpu: Cpu):
        yield from cpu.compute(100_000)

    sim = Simulation(m)
    for cpu, does in zip(sim.cpus, (guest, computes, computes)):
        cpu.start(does)
    sim.run()
    kicks = {row.vcpu: row.exits for row in sim.stats().exits if row.cause == "kick"}
    assert kicks == {1: 3, 2: 1}
    assert [v.mode for v in m.vcpus] == [1, 1, 1]


def test_a_sleepers_entry_asks_something_of_others() -> None:
    """An INIT wakes it; the new APIC map has everybody else scan."""
    m = machine(vcpus=3)

    def sender(cpu: Cpu):
        yield from cpu.compute(1_000)
        yield from cpu.wrmsr(0x830, fx.icr(dest=1, delivery=fx.DeliveryMode.INIT, level=True))
        yield from cpu.wait(50_000)

    def sleeps(cpu: Cpu):
        yield from cpu.halt()

    def computes(cpu: Cpu):
        yield from cpu.compute(100_000)

    sim = Simulation(m, strict=False)
    for cpu, does in zip(sim.cpus, (sender, sleeps, computes)):
        cpu.start(does)
    sim.run()
    kicks = {row.vcpu: row.exits for row in sim.stats().exits if row.cause == "kick"}
    assert kicks == {0: 1, 2: 1}


def test_actions_may_be_kept_and_run_later() -> None:
    done = []

    def guest(cpu: Cpu):
        for act in [cpu.compute(1_000), cpu.wait(500), cpu.ipi(dest=1, vector=0xFD)]:
            yield from act
        done.append(cpu.sim.env.now)

    two(guest, computes, handlers={0xFD: lambda cpu, vector: cpu.compute(10)})
    assert done
    sim = Simulation(machine(1))
    sim.env.process(sim.cpus[0].wait(500))
    sim.run()
    assert sim.env.now == 500


def test_a_guest_is_a_generator_function() -> None:
    def plain(cpu: Cpu) -> None:
        cpu.v.wrmsr(0x808, 0)

    sim = Simulation(machine(1))
    with pytest.raises(TypeError, match="vCPU 0: the guest test_a_guest_is_a_generator_function.plain gives NoneType"):
        sim.cpus[0].start(plain)
    with pytest.raises(GuestError, match="never run"):
        sim.cpus[0].start(lambda cpu: [cpu.compute(5)].clear())
    with pytest.raises(TypeError, match=r"vCPU 1: the handler of 0xfd, test_.*<lambda>, gives int: a generator"):
        two(sends, computes, handlers={0xFD: lambda cpu, vector: 5})


@pytest.mark.parametrize("options", [{}, {"apicv": False}, {"vendor": "svm"}], ids=str)
def test_nmis_have_handlers_too(options: dict) -> None:
    """One comes while a handler of an interrupt computes; no interrupt nests in it, and the NMI ends no interrupt."""
    said = []

    def sender(cpu: Cpu):
        yield from cpu.ipi(dest=1, vector=0xFD)
        yield from cpu.wait(10_000)
        for _ in range(2):
            yield from cpu.ipi(dest=1, delivery="nmi")
            yield from cpu.ipi(dest=1, vector=0xFC)
            yield from cpu.wait(20_000)

    def handler(cpu: Cpu, vector: int):
        said.append((vector, "in"))
        yield from cpu.wait(50_000)
        said.append((vector, "out"))

    sim = Simulation(machine(2, **options))
    sim.cpus[0].start(sender)
    nmi = {2: lambda cpu, vector: said.append((vector, "at once"))}
    sim.cpus[1].start(lambda cpu: cpu.wait(300_000), {0xFD: handler, 0xFC: handler} | nmi)
    sim.run()
    assert said[0] == (0xFD, "in")
    assert said[-2:] == [(0xFC, "in"), (0xFC, "out")]
    assert said.count((2, "at once")) == 2
    assert [what for what in said if what[0] != 2] == [(0xFD, "in"), (0xFD, "out"), (0xFC, "in"), (0xFC, "out")]
    assert sim.machine.vcpus[1].pending() is None


def test_init_is_an_error() -> None:
    def sender(cpu: Cpu):
        yield from cpu.ipi(dest=1, delivery="init", level=True)

    with pytest.raises(GuestError, match=r"vCPU 1: Init\(\) at [0-9.]+ ns; no guest starts over"):
        two(sender, computes)


# ---------------------------------------------------------------------------------------------------------- statistics


@pytest.mark.parametrize(
    "options",
    [
        *({"kernel": kernel, "vendor": vendor} for kernel in DRAWN for vendor in ("vmx", "svm")),
        {"apicv": False},
        {"ipiv": True},
        {"vendor": "svm", "x2avic": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("halts", [False, True])
def test_latencies_are_those_of_the_handlers(options: dict, halts: bool) -> None:
    """By a clock of the test's own: from the guest's WRMSR to the handler's first instruction."""
    sim, sent, took = Simulation(machine(3, **options), seed=4), {}, {}

    def sender(cpu: Cpu):
        for n in range(40):
            yield from cpu.wait(sim.random.randrange(20_000, 40_000))
            sent[n % 2 + 1] = sim.env.now
            yield from cpu.ipi(dest=n % 2 + 1, vector=0xFD)

    def target(cpu: Cpu):
        while sim.env.now < 2_000_000 and len(took.get(cpu.index, ())) < 20:
            yield from (cpu.halt() if halts else cpu.compute(10_000))

    def handler(cpu: Cpu, vector: int) -> None:
        took.setdefault(cpu.index, []).append(sim.env.now - sent[cpu.index])

    sim.cpus[0].start(sender)
    for cpu in sim.cpus[1:]:
        cpu.start(target, {0xFD: handler})
    sim.run()
    rows = sim.stats().interrupts
    assert [(row.vcpu, row.cause, row.vector) for row in rows] == [(1, "IPI", 0xFD), (2, "IPI", 0xFD)]
    for row in rows:
        values = sorted(took[row.vcpu])
        assert row.interrupts == len(values) == 20
        assert row.mean_ns == pytest.approx(sum(values) / 20)
        assert (row.p50_ns, row.p90_ns, row.p99_ns, row.max_ns) == (values[9], values[17], values[19], values[19])
    hardware = "ipiv" in options or "x2avic" in options
    svm = options.get("vendor") == "svm"
    if hardware and not (halts and svm):  # AVIC leaves the guest for a target that does not run
        assert {row.path for row in rows} == {"HARDWARE"}
    elif not hardware and (not svm or since(options["kernel"], "5.10")):
        assert {row.path for row in rows} == {"FAST"}


def test_causes() -> None:
    sim = Simulation(machine(2))
    line = sim.line(17)

    def guest(cpu: Cpu):
        for index, value in ((0x33, 0), (0x32, 0x41)):
            yield from cpu.mem_write(0xFEC0_0000, index)
            yield from cpu.mem_write(0xFEC0_0010, value)
        yield from cpu.set_timer(us=50, vector=0xEC)
        yield from cpu.wait(100_000)
        line.pulse()
        yield from cpu.ipi(vector=0xFD, shorthand="all")
        yield from cpu.wait(100_000)
        sim.machine.signal_msi(0xFEE0_0000, 0x51)
        yield from cpu.wait(100_000)
        yield from cpu.tsc_deadline(us=50, vector=0xEC)
        yield from cpu.halt()

    vectors = (0x41, 0xEC, 0xFD, 0x51)
    sim.cpus[0].start(guest, {vector: lambda cpu, vector: None for vector in vectors})
    sim.cpus[1].start(lambda cpu: cpu.halt(), {0xFD: lambda cpu, vector: cpu.wait(50)})
    sim.run(until=300_000)
    sim.run()
    stats = sim.stats()
    found = {(row.vcpu, row.cause, row.vector): row for row in stats.interrupts}
    assert {key: row.interrupts for key, row in found.items()} == {
        (0, "IPI", 0xFD): 1,
        (0, "line", 0x41): 1,
        (0, "other", 0x51): 1,
        (0, "timer", 0xEC): 2,
        (1, "IPI", 0xFD): 1,
    }
    assert found[0, "other", 0x51].max_ns is None
    assert found[0, "timer", 0xEC].max_ns < 5_000
    assert all(row.max_ns > 0 for row in stats.interrupts if row.cause != "other")
    assert {row.cause for row in stats.interrupt_causes} == {"IPI", "line", "other", "timer"}
    assert [row.interrupts for row in stats.interrupt_causes] == sorted(
        (row.interrupts for row in stats.interrupt_causes), reverse=True
    )


def test_counts_and_times_are_of_one_moment() -> None:
    """The exit of a preemption timer that comes when its guest is over has not passed, so it is not counted."""
    sim = Simulation(machine(1))

    def guest(cpu: Cpu):
        yield from cpu.set_timer(us=5, vector=0xEC)

    sim.cpus[0].start(guest, {0xEC: lambda cpu, vector: None})
    sim.run()
    cpu, stats = sim.cpus[0], sim.stats()
    assert sim.env.now >= 5_000
    assert cpu.exits == sum(row.exits for row in stats.exits) == 3
    assert cpu.exit_ns == sum(row.exit_ns for row in stats.exits) == stats.vcpus[0].exit_ns


def test_stats_in_every_form() -> None:
    sim = two(sends, computes, handlers={0xFD: lambda cpu, vector: None})
    stats = sim.stats()
    shown = repr(stats).splitlines()
    assert re.fullmatch(r"[\d,]+ ns, 2 vCPUs: 1 exits in [\d,]+ ns, 1 interrupts", shown[0])
    assert shown[3].split()[:3] == ["ICR", "FAST", "1"]
    assert shown[6].split()[:3] == ["IPI", "FAST", "1"]
    assert len({len(line) for line in shown[2:4]}) == 1
    as_dict = json.loads(json.dumps(stats.as_dict()))
    assert as_dict["interrupts"][0]["cause"] == "IPI"
    assert as_dict["vcpus"][1] == {"vcpu": 1, "exits": 0, "exit_ns": 0.0, "interrupts": 1}
    empty = Simulation(machine(1)).stats()
    assert "0 exits" in repr(empty)
    with pytest.raises(ValueError, match="unknown table 'exit'"):
        stats.to_frame("exit")


def test_frames() -> None:
    pytest.importorskip("pandas")
    stats = two(sends, computes, handlers={0xFD: lambda cpu, vector: None}).stats()
    frame = stats.to_frame()
    assert list(frame["vector"]) == [0xFD]
    assert frame["p50_ns"][0] == stats.interrupts[0].p50_ns
    assert len(stats.to_frame("exits")) == 1
    assert list(Simulation(machine(1)).stats().to_frame().columns) == list(frame.columns)


def test_counting_begins_anew() -> None:
    sim = two(sends, computes, handlers={0xFD: lambda cpu, vector: None})
    sim.ledger.clear()
    assert (sim.stats().exits, sim.stats().interrupts, sim.stats().ns) == ((), (), 0)


def test_small_example(capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(Path(__file__).parents[1] / "examples" / "simpy_timers.py"))
    shown = {line.split()[0]: line.split() for line in capsys.readouterr().out.splitlines() if line}
    assert shown["timer"][1] == shown["preemption"][3] == "20"
    assert int(shown["line"][1]) > 5
