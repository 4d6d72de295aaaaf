"""The SimPy adapter: times add up, nothing is lost, equal seeds give equal runs."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest

import fastexit as fx
from fastexit import layout as L
from fastexit.adapters import simpy as adapter
from fastexit.adapters.simpy import Cpu, Simulation
from fastexit.profile import since
from generations import DRAWN

ROOT = Path(__file__).parents[1]
needs_simpy = pytest.mark.skipif(adapter.simulation.simpy is None, reason="SimPy is missing: pip install simpy")
COSTS = "skylake-retpoline"
MACHINES = [(kernel, vendor, apicv) for kernel in DRAWN for vendor in ("vmx", "svm") for apicv in (True, False)]
LVTT, DEADLINE, VECTOR = 0x832, 0x6E0, 0xFD


def machine(kernel: str = "6.18", vcpus: int = 2, **options: Any) -> fx.Machine:
    return fx.Machine(vcpus=vcpus, kernel=kernel, costs=COSTS, threads=False, **options)


def example() -> Any:
    spec = importlib.util.spec_from_file_location("simpy_ipi", ROOT / "benchmarks" / "simpy_ipi.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_missing_simpy_is_said_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adapter.simulation, "simpy", None)
    with pytest.raises(ImportError, match=re.escape("needs SimPy: pip install simpy")):
        Simulation(machine())


@needs_simpy
def test_adapter_is_not_simpy() -> None:
    assert adapter.simulation.simpy is sys.modules["simpy"] is not adapter


@needs_simpy
def test_refusals() -> None:
    with pytest.raises(ValueError, match="a simulation needs time"):
        Simulation(fx.Machine(vcpus=1))
    with pytest.raises(ValueError, match="jitter 1"):
        Simulation(machine(), jitter=1)
    with pytest.raises(ValueError, match="vector 0x100"):
        Simulation(machine()).cpus[0].start(lambda cpu: iter(()), {256: print})


def one_ipi(m: fx.Machine, halts: bool = False) -> tuple[float, Any, Simulation]:
    """ns from the WRMSR to the handler's first instruction, the sender's outcome, the simulation."""
    sim = Simulation(m)
    seen: list[Any] = []
    got = sim.env.event()

    def sender(cpu: Cpu):
        yield from cpu.wait(20_000)
        began = sim.env.now
        out = yield from cpu.ipi(dest=1, vector=VECTOR)
        yield from cpu.spin(got)
        seen.append((got.value - began, out))

    def target(cpu: Cpu):
        yield from (cpu.halt() if halts else cpu.spin(got))

    sim.cpus[0].start(sender)
    sim.cpus[1].start(target, {VECTOR: lambda cpu, vector: got.succeed(sim.env.now) and None})
    sim.run()
    ((took, out),) = seen
    assert sim.cpus[1].interrupts == 1
    assert sim.machine.vcpus[1].pending() is None
    return took, out, sim


@needs_simpy
@pytest.mark.parametrize("kernel", DRAWN)
def test_posted_ipi_takes_its_stages(kernel: str) -> None:
    took, out, sim = one_ipi(machine(kernel))
    costs = sim.costs
    cycles = out.cycles_ipi + costs["flight"] + costs["posted"] + costs["guest_irq"]
    assert took == pytest.approx(sim.ns(cycles))
    assert (sim.cpus[0].exits, sim.cpus[1].exits) == (1, 0)
    assert sim.cpus[0].exit_ns == pytest.approx(sim.ns(out.cycles))


@needs_simpy
@pytest.mark.parametrize("vendor", ["vmx", "svm"])
def test_kick_costs_the_target_an_exit(vendor: str) -> None:
    took, out, sim = one_ipi(machine("6.18", apicv=False, vendor=vendor))
    costs, target = sim.costs, sim.cpus[1]
    assert target.exits == 2  # the kick's and EOI's
    kick = target.exit_ns - sim.ns(target.v.timed.cycles)
    assert took == pytest.approx(sim.ns(out.cycles_ipi + costs["flight"] + costs["guest_irq"]) + kick)
    assert kick > sim.ns(costs["vm_exit"] + costs["host_irq"] + costs["inject"] + costs["vm_entry"])


@needs_simpy
@pytest.mark.parametrize(("kernel", "vendor", "apicv"), MACHINES)
def test_sleeper_is_woken(kernel: str, vendor: str, apicv: bool) -> None:
    took, out, sim = one_ipi(machine(kernel, vendor=vendor, apicv=apicv), halts=True)
    assert [sent.effect for sent in out.sent] == [fx.Effect.WAKE]
    costs = sim.costs
    entry = sim.ns(sim.machine.vcpus[1].run_cycles)
    assert took == pytest.approx(sim.ns(out.cycles_ipi + costs["schedule"] + costs["guest_irq"]) + entry)


@needs_simpy
@pytest.mark.parametrize(
    ("options", "sender_exits"),
    [({"ipiv": True}, 0), ({"vendor": "svm", "x2avic": True}, 0)],
)
def test_hardware_sends_by_itself(options: dict, sender_exits: int) -> None:
    took, out, sim = one_ipi(machine(**options))
    assert (out.path, sim.cpus[0].exits, sim.cpus[1].exits) == (fx.Path.HARDWARE, sender_exits, 0)
    costs = sim.costs
    assert took == pytest.approx(sim.ns(costs["hw_ipi"] + costs["flight"] + costs["posted"] + costs["guest_irq"]))
    asleep, _, _ = one_ipi(machine(**options), halts=True)
    assert asleep > took + sim.ns(costs["schedule"]) * 0.9


@needs_simpy
def test_interrupts_make_computing_longer() -> None:
    sim = Simulation(machine())
    ends = {}

    def worker(cpu: Cpu):
        yield from cpu.compute(100_000)
        ends[cpu.index] = sim.env.now

    def sender(cpu: Cpu):
        for _ in range(3):
            yield from cpu.ipi(dest=1, vector=VECTOR)
            yield from cpu.compute(5_000)
        yield from worker(cpu)

    def handler(cpu: Cpu, vector: int):
        yield from cpu.compute(1_000)

    sim.cpus[0].start(sender)
    sim.cpus[1].start(worker, {VECTOR: handler})
    sim.run()
    costs = sim.costs
    each = costs["posted"] + costs["guest_irq"] + 1_000 + costs["hw_access"]
    assert ends[1] == pytest.approx(sim.ns(100_000 + 3 * each))


@needs_simpy
@pytest.mark.parametrize(("kernel", "apicv"), [("6.18", True), ("5.8", False), ("5.6", True)])
def test_timer_wakes_its_guest(kernel: str, apicv: bool) -> None:
    sim = Simulation(machine(kernel, apicv=apicv))
    hits = []

    def guest(cpu: Cpu):
        yield from cpu.wrmsr(LVTT, 0xE0 | 2 << 17)
        yield from cpu.wrmsr(DEADLINE, int(sim.env.now) + 50_000)
        yield from cpu.halt()
        yield from cpu.wrmsr(DEADLINE, int(sim.env.now) + 30_000)
        yield from cpu.wait(60_000)

    sim.cpus[0].start(guest, {0xE0: lambda cpu, vector: hits.append(sim.env.now)})
    sim.run()
    assert len(hits) == 2
    assert 50_000 < hits[0] < 60_000
    assert 30_000 < hits[1] - hits[0] < 40_000
    cpu = sim.cpus[0]
    assert cpu.exits == (5 if apicv else 7), "LVTT, twice a deadline, HLT, the timer itself; without APICv EOIs too"
    assert cpu.exit_ns > cpu.exits * sim.ns(sim.costs["vm_exit"] + sim.costs["vm_entry"] - sim.costs["vm_entry"] / 4)


@needs_simpy
def test_user_space_is_not_simulated() -> None:
    sim = Simulation(machine())
    sim.machine.vcpus[0].signal()

    def guest(cpu: Cpu):
        yield from cpu.ipi(dest=1, vector=VECTOR)

    sim.cpus[0].start(guest)
    with pytest.raises(RuntimeError, match="left to user space"):
        sim.run()


@needs_simpy
@pytest.mark.parametrize(("kernel", "vendor", "apicv"), MACHINES)
def test_nothing_is_lost(kernel: str, vendor: str, apicv: bool) -> None:
    """Both workloads come to their end: every question is answered, every flush acknowledged."""
    shown = example()
    for workload, n in ((shown.ping_pong, 12), (shown.shootdown_storm, 6)):
        sim = Simulation(machine(kernel, vcpus=4, vendor=vendor, apicv=apicv), jitter=0.3, seed=3)
        took = workload(sim, 3)
        assert len(took) == n
        assert min(took) > 0


def mixed(sim: Simulation, rounds: int = 6) -> list[int]:
    """Guests that compute, send, sleep by timer and halt at random: questions asked, questions answered."""
    cpus, random = sim.cpus, sim.random
    todo = [0 for _ in cpus]
    count = [0, 0]

    def handler(cpu: Cpu, vector: int):
        while todo[cpu.index]:
            todo[cpu.index] -= 1
            count[1] += 1
            if random.random() < 0.5:
                yield from cpu.compute(random.randrange(3_000))

    def guest(cpu: Cpu):
        for _ in range(rounds):
            kind = random.random()
            if kind < 0.4:
                yield from cpu.compute(random.expovariate(1 / 8_000))
            elif kind < 0.8:
                one = random.random() < 0.7
                targets = [random.choice(cpus)] if one else [other for other in cpus if other is not cpu]
                for target in targets:
                    todo[target.index] += 1
                count[0] += len(targets)
                shorthand = fx.Shorthand.NONE if one else fx.Shorthand.ALL_BUT_SELF
                yield from cpu.ipi(dest=targets[0].index if one else 0, vector=VECTOR, shorthand=shorthand)
            else:
                yield from cpu.wrmsr(LVTT, 0xE0 | 2 << 17)
                yield from cpu.wrmsr(DEADLINE, int(sim.env.now) + random.randrange(500, 40_000))
                yield from cpu.halt()
        while True:
            yield from cpu.halt()

    for cpu in cpus:
        cpu.start(guest, {VECTOR: handler, 0xE0: lambda cpu, vector: None})
    return count


def seen(sim: Simulation) -> list[tuple]:
    """What a run came to, exactly."""
    cpus = [(cpu.exits, cpu.interrupts, cpu.exit_ns) for cpu in sim.cpus]
    return [*cpus, sim.machine.time, sim.machine.words[: L.TRACE].tobytes()]


@needs_simpy
@pytest.mark.parametrize("features", [{}, {"apicv": False}, {"ipiv": True}, {"x2avic": True}])
@pytest.mark.parametrize("kernel", DRAWN)
def test_sleepers_timers_and_multicasts_lose_nothing(kernel: str, features: dict) -> None:
    """Among the seeds are some whose guests leave at once again behind an entry that has injected."""
    vendors = ("vmx", "svm") if "ipiv" not in features and "x2avic" not in features else ("vmx",)
    if "x2avic" in features:
        if not since(kernel, "6.1"):
            pytest.skip("AVIC of these kernels knows no x2APIC mode, and loses IPIs to it")
        vendors = ("svm",)
    if "ipiv" in features and not since(kernel, "6.1"):
        pytest.skip("IPI virtualisation came with 6.1")
    for vendor in vendors:
        for seed in (2, 63, 110):
            sim = Simulation(machine(kernel, vcpus=5, vendor=vendor, **features), jitter=0.3, seed=seed)
            count = mixed(sim)
            sim.run(until=5_000_000)
            assert count[0] == count[1] > 0, (vendor, seed)


@needs_simpy
@pytest.mark.parametrize(("kernel", "vendor", "apicv"), [("5.6", "vmx", False), ("6.12", "svm", True), MACHINES[-4]])
def test_steps_and_neighbours_change_nothing(kernel: str, vendor: str, apicv: bool) -> None:
    """One go, many small steps, and beside another machine in the same environment: the same run to the last bit."""
    options = {"vcpus": 4, "vendor": vendor, "apicv": apicv}
    whole, stepped, beside = (Simulation(machine(kernel, **options), jitter=0.3, seed=5) for _ in range(3))
    beside = Simulation(machine(kernel, **options), stepped.env, jitter=0.3, seed=5)
    counts = [mixed(sim) for sim in (whole, stepped, beside)]
    whole.run(until=400_000)
    while stepped.env.now < 400_000:
        stepped.run(until=min(stepped.env.now + 777.7, 400_000))
    assert counts[0][0] > 0
    assert counts[0] == counts[1] == counts[2]
    assert seen(whole) == seen(stepped) == seen(beside)


@needs_simpy
@pytest.mark.parametrize(("kernel", "vendor", "apicv"), MACHINES)
def test_no_moment_loses_an_interrupt(kernel: str, vendor: str, apicv: bool) -> None:
    """An IPI that drifts, round by round, over all a target does: exits, its handler, the way into sleep, sleep."""
    sim = Simulation(machine(kernel, vendor=vendor, apicv=apicv))
    sent, taken = [], []
    period, drift, rounds = 12_000, 131, 80

    def sender(cpu: Cpu):
        for n in range(rounds):
            yield from cpu.wait(max(n * (period + drift) - sim.env.now, 0))
            sent.append(sim.env.now)
            yield from cpu.ipi(dest=1, vector=VECTOR)

    def target(cpu: Cpu):
        yield from cpu.wrmsr(LVTT, 0xE0 | 2 << 17)
        while len(taken) < rounds:
            began = sim.env.now
            yield from cpu.wrmsr(0x808, 0x10)
            yield from cpu.compute(2_000)
            yield from cpu.wrmsr(DEADLINE, int(began) + period)
            while sim.env.now < began + period and len(taken) < rounds:
                yield from cpu.halt()

    def ipi(cpu: Cpu, vector: int):
        taken.append(sim.env.now)
        yield from cpu.compute(500)

    sim.cpus[0].start(sender)
    sim.cpus[1].start(target, {VECTOR: ipi, 0xE0: lambda cpu, vector: None})
    sim.run(until=3 * rounds * period)
    assert len(taken) == len(sent) == rounds
    late = [there - here for here, there in zip(sent, taken, strict=True)]
    assert 0 < min(late)
    assert max(late) < 10_000 < period


@needs_simpy
@pytest.mark.parametrize("where", ["guest", "handler"])
def test_exceptions_come_out(where: str) -> None:
    """run() raises what a guest or a handler raised, at its time; who waits for the process gets it instead."""

    class Mine(Exception):
        pass

    def guest(cpu: Cpu):
        yield from cpu.compute(50_000)
        if where == "guest":
            raise Mine

    def handler(cpu: Cpu, vector: int):
        yield from cpu.compute(10)
        raise Mine

    def sender(cpu: Cpu):
        yield from cpu.ipi(dest=1, vector=VECTOR)
        yield from cpu.compute(100_000)
        done.append(cpu.index)

    for waits in (False, True):
        sim, done = Simulation(machine()), []
        sim.cpus[0].start(sender)
        process = sim.cpus[1].start(guest, {VECTOR: handler if where == "handler" else lambda cpu, vector: None})

        def waiter(process: Any = process, done: list = done):
            try:
                yield process
            except Mine:
                done.append("caught")

        if waits:
            sim.env.process(waiter())
            sim.run()
            assert done == ["caught", 0]
        else:
            with pytest.raises(Mine):
                sim.run()
            sim.run()  # the rest goes on
            assert done == [0]


@needs_simpy
def test_one_guest_at_a_time() -> None:
    sim = Simulation(machine())
    cpu = sim.cpus[0]
    cpu.start(lambda cpu: cpu.compute(1_000))
    with pytest.raises(RuntimeError, match="vCPU 0 has a guest already"):
        cpu.start(lambda cpu: cpu.compute(1_000))
    sim.run()
    cpu.start(lambda cpu: cpu.compute(1_000))
    sim.run()
    assert sim.env.now == sim.ns(2_000)


@needs_simpy
@pytest.mark.parametrize("cycles", [-1, float("nan"), float("inf")])
def test_time_that_nobody_can_spend(cycles: float) -> None:
    sim = Simulation(machine())
    sim.cpus[0].start(lambda cpu: cpu.compute(cycles))
    with pytest.raises(ValueError, match="no time to spend"):
        sim.run()


@needs_simpy
def test_seeds() -> None:
    shown = example()
    first, again, other = (
        shown.ping_pong(Simulation(machine(vcpus=4), jitter=0.1, seed=seed), 4) for seed in (1, 1, 2)
    )
    assert first == again != other


@needs_simpy
def test_newer_generations_are_not_slower() -> None:
    shown = example()
    storms = {}
    for kernel, fastpath in shown.GENERATIONS:
        sim = shown.simulation(8, kernel, fastpath, COSTS, 1, True)
        storms[shown.label(kernel, fastpath)] = shown.share(shown.shootdown_storm(sim, 6), 0.5)
    assert storms["6.18"] < storms["6.12"] < storms["5.8"] < storms["5.6, generic path"]


@needs_simpy
def test_example(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shown = example()
    arguments = ["--vcpus", "4", "--samples", "8", "--quiet", "--output", str(tmp_path / "picture")]
    assert shown.main([*arguments, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert len(result["rows"]) == 2 * len(shown.GENERATIONS)
    assert all(row["samples"] == len(row["latencies"]) > 0 for row in result["rows"])
    if importlib.util.find_spec("matplotlib"):
        assert [Path(name).suffix for name in result["pictures"]] == [".png", ".svg"]
        assert all(Path(name).stat().st_size > 1000 for name in result["pictures"])
    assert shown.finding(result["rows"]).startswith("6.18 against 5.6, generic path at 4 vCPUs, medians: ping-pong -")


@needs_simpy
@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--costs", "z80"], "unknown cost profile 'z80'"),
        (["--costs", "absent.toml"], "absent.toml"),
        (["--vcpus", "4,x"], "'4,x' is no list of numbers"),
        (["--vcpus", "1"], "an IPI needs two"),
        (["--vcpus", "999999"], "2 to 1024 vCPUs"),
        (["--samples", "0"], "'0' is no number from 1"),
        (["--samples", "-5"], "--samples"),
        (["--output", "/dev/null/picture"], "/dev/null"),
    ],
)
def test_example_refuses_before_it_works(
    arguments: list[str], complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        example().main(arguments)
    assert complaint in capsys.readouterr().err.splitlines()[-1]


@needs_simpy
def test_document_runs(capsys: pytest.CaptureFixture[str]) -> None:
    code = re.search(r"```python\n(.*?)```", (ROOT / "docs" / "simpy.md").read_text(), flags=re.DOTALL)[1]
    exec(code, {})
    shown = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in shown[:5]] == ["FAST", "vector", "tick", "tick", "tick"]
    table = [line for line in shown[5:] if line]
    said = re.search(r"```text\n(.*?)```", (ROOT / "docs" / "simpy.md").read_text(), flags=re.DOTALL)[1]
    assert [line for line in said.splitlines() if line and line != "..." and line not in table] == []


# ------------------------------------------------------------------------------------------------------------- devices


def level_pin(cpu: Cpu, pin: int, vector: int, dest: int) -> Any:
    """Program a level-triggered pin of the IOAPIC, as a guest does: high half, then low half."""
    for index, value in ((0x11 + 2 * pin, dest << 24), (0x10 + 2 * pin, 0x8000 | vector)):
        yield from cpu.mem_write(0xFEC0_0000, index)
        yield from cpu.mem_write(0xFEC0_0010, value)


@needs_simpy
@pytest.mark.parametrize(("kernel", "vendor", "apicv"), MACHINES)
def test_a_device_holds_its_line_until_it_is_served(kernel: str, vendor: str, apicv: bool) -> None:
    """A level interrupt comes again as long as the line is up at its EOI; the driver's port write lets it go."""
    sim = Simulation(machine(kernel, vendor=vendor, apicv=apicv))
    line, served = sim.line(17), []

    def driver(cpu: Cpu, vector: int) -> Any:
        yield from cpu.compute(500)
        served.append(sim.env.now)
        if len(served) == 3:
            line.down()

    def guest(cpu: Cpu) -> Any:
        yield from level_pin(cpu, 17, 0x41, 0)
        assert (yield from cpu.mem_read(0xFEC0_0010)) == 0x8041
        yield from cpu.wait(100_000)

    def device() -> Any:
        yield sim.env.timeout(60_000)
        assert line.up() == 1
        assert line.up() == -1

    sim.cpus[0].start(guest, handlers={0x41: driver})
    sim.env.process(device())
    sim.run()
    assert len(served) == 3 == sim.cpus[0].interrupts
    assert served[0] > 60_000
    assert "up" not in repr(line)


@needs_simpy
def test_a_line_wakes_a_sleeper() -> None:
    sim = Simulation(machine())
    line, taken = sim.line(4), []

    def guest(cpu: Cpu) -> Any:
        yield from cpu.io_write(0x21, 0xFF)  # the PIC has this line, too
        yield from cpu.mem_write(0xFEC0_0000, 0x18)
        yield from cpu.mem_write(0xFEC0_0010, 0x33)
        yield from cpu.halt()

    def device() -> Any:
        yield sim.env.timeout(1_000_000)
        line.pulse()

    sim.cpus[0].start(guest, handlers={0x33: lambda cpu, vector: taken.append(sim.env.now)})
    sim.env.process(device())
    sim.run()
    assert len(taken) == 1
    assert taken[0] > 1_000_000 + sim.ns(sim.costs["schedule"])


@needs_simpy
def test_the_pit_ticks_and_the_pics_deliver() -> None:
    """A boot by the PICs: ICWs, a periodic channel 0, ticks as ExtINT through LINT0, each acknowledged at port 0x20."""
    m = machine(vcpus=1, apicv=False)
    sim = Simulation(m)
    m.create_pit()
    ticks = []

    def tick(cpu: Cpu, vector: int) -> Any:
        ticks.append(sim.env.now)
        yield from cpu.io_write(0x20, 0x20)

    def guest(cpu: Cpu) -> Any:
        yield from cpu.wrmsr(0x835, 0x700)
        for port, value in ((0x20, 0x11), (0x21, 0x30), (0x21, 4), (0x21, 1), (0x21, 0xFE)):
            yield from cpu.io_write(port, value)
        for port, value in ((0x43, 0x34), (0x40, 0xA9), (0x40, 0x04)):
            yield from cpu.io_write(port, value)
        assert (yield from cpu.io_read(0x21)) == 0xFE
        yield from cpu.wait(10_500_000)

    sim.cpus[0].start(guest, handlers={0x30: tick})
    sim.run(until=12_000_000)
    assert len(ticks) == 10
    gaps = {round(after - before, -5) for before, after in zip(ticks, ticks[1:], strict=False)}
    assert gaps == {1_000_000}


@needs_simpy
def test_devices_cost_time() -> None:
    """Their stages are charged: the register, and the IOAPIC's part of an EOI."""
    m = machine(vcpus=1)
    m.boot_x2apic()
    v = m.vcpus[0]
    v.mem_write(0xFEC0_0000, 0x32)
    out = v.mem_write(0xFEC0_0010, 0x8041)
    assert [charge.stage for charge in out.charges if charge.stage in ("device", "emulator")] == ["emulator", "device"]
    out = v.io_write(0x21, 0xFF)
    assert [charge.stage for charge in out.charges if charge.stage in ("device", "other_exit")] == ["device"]
    m.irq_line(17, 1)
    assert v.ack() == 0x41
    stages = [charge.stage for charge in v.wrmsr(0x80B, 0).charges]
    assert stages.count("ioapic_eoi") == stages.count("lapic_access") == stages.count("accept") == 1
    assert "ioapic_eoi" not in [charge.stage for charge in v.wrmsr(0x80B, 0).charges]
