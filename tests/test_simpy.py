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
from fastexit.adapters import simpy as adapter
from fastexit.adapters.simpy import Cpu, Simulation

ROOT = Path(__file__).parents[1]
needs_simpy = pytest.mark.skipif(adapter.simpy is None, reason="SimPy is missing: pip install 'fastexit[sim]'")
COSTS = "skylake-retpoline"
MACHINES = [(kernel, vendor, apicv) for kernel in fx.profiles() for vendor in ("vmx", "svm") for apicv in (True, False)]
LVTT, DEADLINE, VECTOR = 0x832, 0x6E0, 0xFD


def machine(kernel: str = "6.18", vcpus: int = 2, **options: Any) -> fx.Machine:
    return fx.Machine(vcpus=vcpus, kernel=kernel, costs=COSTS, threads=False, **options)


def example() -> Any:
    spec = importlib.util.spec_from_file_location("simpy_ipi", ROOT / "examples" / "simpy_ipi.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_missing_simpy_is_said_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adapter, "simpy", None)
    with pytest.raises(ImportError, match=re.escape("needs SimPy: pip install 'fastexit[sim]'")):
        Simulation(machine())


@needs_simpy
def test_adapter_is_not_simpy() -> None:
    assert adapter.simpy is sys.modules["simpy"] is not adapter


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
@pytest.mark.parametrize("kernel", fx.profiles())
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


def mixed(sim: Simulation, rounds: int = 6) -> tuple[int, int]:
    """Guests that compute, send, sleep by timer and halt at random: questions asked, questions answered."""
    cpus, random = sim.cpus, sim.random
    todo = [0 for _ in cpus]
    asked, answered = 0, 0

    def handler(cpu: Cpu, vector: int):
        nonlocal answered
        while todo[cpu.index]:
            todo[cpu.index] -= 1
            answered += 1
            if random.random() < 0.5:
                yield from cpu.compute(random.randrange(3_000))

    def guest(cpu: Cpu):
        nonlocal asked
        for _ in range(rounds):
            kind = random.random()
            if kind < 0.4:
                yield from cpu.compute(random.expovariate(1 / 8_000))
            elif kind < 0.8:
                one = random.random() < 0.7
                targets = [random.choice(cpus)] if one else [other for other in cpus if other is not cpu]
                for target in targets:
                    todo[target.index] += 1
                asked += len(targets)
                shorthand = fx.Shorthand.NONE if one else fx.Shorthand.ALL_BUT_SELF
                yield from cpu.ipi(dest=targets[0].index if one else 0, vector=VECTOR, shorthand=shorthand)
            else:
                yield from cpu.wrmsr(LVTT, 0xE0 | 2 << 17)
                yield from cpu.wrmsr(DEADLINE, int(sim.env.now) + random.randrange(500, 40_000))
                yield from cpu.halt()
        while True:
            yield from cpu.halt()

    for cpu in cpus:
        cpu.start(guest, {VECTOR: handler})
    sim.run(until=5_000_000)
    return asked, answered


@needs_simpy
@pytest.mark.parametrize("features", [{}, {"apicv": False}, {"ipiv": True}, {"x2avic": True}])
@pytest.mark.parametrize("kernel", fx.profiles())
def test_sleepers_timers_and_multicasts_lose_nothing(kernel: str, features: dict) -> None:
    """Among the seeds are some whose guests leave at once again behind an entry that has injected."""
    vendors = ("vmx", "svm") if "ipiv" not in features and "x2avic" not in features else ("vmx",)
    if "x2avic" in features:
        vendors = ("svm",)
    for vendor in vendors:
        for seed in (2, 63, 110):
            sim = Simulation(machine(kernel, vcpus=5, vendor=vendor, **features), jitter=0.3, seed=seed)
            asked, answered = mixed(sim)
            assert asked == answered > 0, (vendor, seed)


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
    with pytest.raises(SystemExit):
        shown.main(["--costs", "z80"])
    assert "unknown cost profile 'z80'" in capsys.readouterr().err


@needs_simpy
def test_document_runs(capsys: pytest.CaptureFixture[str]) -> None:
    code = re.search(r"```python\n(.*?)```", (ROOT / "docs" / "simpy.md").read_text(), flags=re.DOTALL)[1]
    exec(code, {})
    shown = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in shown] == ["FAST", "vector"]
