"""Latency of IPIs by kernel generation, simulated with SimPy: ping-pong, and a storm of TLB shootdowns.

    python examples/simpy_ipi.py                       # some 20 s; build/simpy-ipi.png and .svg
    python examples/simpy_ipi.py --quick --json        # small machines, numbers only where matplotlib is missing

Every vCPU has work of its own. Ping-pong: it asks a random other one, which answers from its interrupt handler, and
polls for the answer; the latency is there and back. Storm: some vCPUs flush the TLB of all others, as Linux does in
x2APIC physical mode, one IPI for each target whose queue was empty, and poll until all have done it.
Both are on machines with posted interrupts. What is simulated is the model's time, under the cost profile's constants.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fastexit as fx
from fastexit.adapters.simpy import Cpu, Simulation

VECTOR = 0xFB
PONG = 0xFA
FLUSH_CYCLES = 300
GENERATIONS = (("5.6", False), ("5.6", True), ("5.8", True), ("6.12", True), ("6.18", True))
"""Kernel, and whether its fast path is on."""


def label(kernel: str, fastpath: bool) -> str:
    return kernel if fastpath else f"{kernel}, generic path"


def simulation(vcpus: int, kernel: str, fastpath: bool, costs: Any, seed: int, apicv: bool) -> Simulation:
    machine = fx.Machine(vcpus=vcpus, kernel=kernel, costs=costs, apicv=apicv, threads=False)
    machine.fastpath = fastpath
    return Simulation(machine, jitter=0.1, seed=seed)


def ping_pong(sim: Simulation, rounds: int) -> list[float]:
    """Round trips in ns; ``rounds`` of them by every vCPU."""
    cpus, took = sim.cpus, []
    askers: list[list[int]] = [[] for _ in cpus]
    pong = [sim.env.event() for _ in cpus]
    over = _when(sim, lambda: len(took) == len(cpus) * rounds)

    def asked(cpu: Cpu, _vector: int):
        while askers[cpu.index]:
            yield from cpu.ipi(dest=askers[cpu.index].pop(0), vector=PONG)

    def guest(cpu: Cpu):
        mine = cpu.index
        for _ in range(rounds):
            yield from cpu.compute(sim.random.expovariate(1 / 50_000))
            peer = sim.random.choice([other.index for other in cpus if other is not cpu])
            began, pong[mine] = sim.env.now, sim.env.event()
            askers[peer].append(mine)
            if len(askers[peer]) == 1:
                yield from cpu.ipi(dest=peer, vector=VECTOR)
            yield from cpu.spin(pong[mine])
            took.append(sim.env.now - began)
        yield from cpu.spin(over)

    def ponged(cpu: Cpu, _vector: int) -> None:
        pong[cpu.index].succeed()

    for cpu in cpus:
        cpu.start(guest, {VECTOR: asked, PONG: ponged})
    sim.run(over)
    return took


def shootdown_storm(sim: Simulation, rounds: int) -> list[float]:
    """Times in ns from the first IPI of a flush to its last acknowledgement."""
    cpus, took = sim.cpus, []
    flushers = cpus[: max(2, min(8, len(cpus) // 4))]
    queues: list[list[Callable[[], None]]] = [[] for _ in cpus]
    over = _when(sim, lambda: len(took) == len(flushers) * rounds)

    def flush(cpu: Cpu, _vector: int):
        while queues[cpu.index]:
            acknowledge = queues[cpu.index].pop(0)
            yield sim.env.timeout(sim.ns(FLUSH_CYCLES))
            acknowledge()

    def flusher(cpu: Cpu):
        for _ in range(rounds):
            yield from cpu.compute(sim.random.expovariate(1 / (2_000 * len(cpus))))
            began, done, left = sim.env.now, sim.env.event(), [len(cpus) - 1]

            def acknowledge(left: list[int] = left, done: Any = done) -> None:
                left[0] -= 1
                if not left[0]:
                    done.succeed()

            for other in cpus:
                if other is cpu:
                    continue
                queues[other.index].append(acknowledge)
                if len(queues[other.index]) == 1:
                    yield from cpu.ipi(dest=other.index, vector=VECTOR)
            yield from cpu.spin(done)
            took.append(sim.env.now - began)
        yield from cpu.spin(over)

    def worker(cpu: Cpu):
        yield from cpu.spin(over)

    for cpu in cpus:
        cpu.start(flusher if cpu in flushers else worker, {VECTOR: flush})
    sim.run(over)
    return took


def _when(sim: Simulation, true: Callable[[], bool]) -> Any:
    """An event that ends the run: the condition is looked at now and then, by nobody's CPU."""
    over = sim.env.event()

    def watch():
        while not true():
            yield sim.env.timeout(10_000)
        over.succeed()

    sim.env.process(watch())
    return over


WORKLOADS = {"ping-pong": ping_pong, "TLB-shootdown storm": shootdown_storm}


def share(values: list[float], at: float) -> float:
    """The value that a share of all is not above."""
    ordered = sorted(values)
    return ordered[min(int(at * len(ordered)), len(ordered) - 1)]


def run(args: argparse.Namespace) -> list[dict[str, Any]]:
    """One row a workload, machine size and generation, with every latency in it."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    rows = []
    cases = [(w, n, k, f) for w in WORKLOADS for n in args.vcpus for k, f in GENERATIONS]
    console = Console(stderr=True)
    columns = TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn()
    with Progress(*columns, console=console, transient=True, disable=args.quiet or not console.is_terminal) as bar:
        task = bar.add_task("", total=sum(n for _, n, _, _ in cases))
        for workload, n, kernel, fastpath in cases:
            bar.update(task, description=f"{workload}, {n} vCPUs, {label(kernel, fastpath)}")
            sim = simulation(n, kernel, fastpath, args.costs, args.seed, not args.no_apicv)
            rounds = max(args.samples // (n if workload == "ping-pong" else max(2, min(8, n // 4))), 2)
            if workload != "ping-pong":
                rounds = max(min(rounds, 2_000 // n), 2)
            took = WORKLOADS[workload](sim, rounds)
            rows.append(
                {
                    "workload": workload,
                    "vcpus": n,
                    "kernel": label(kernel, fastpath),
                    "samples": len(took),
                    "median_ns": share(took, 0.5),
                    "p99_ns": share(took, 0.99),
                    "mean_ns": sum(took) / len(took),
                    "exits": sum(cpu.exits for cpu in sim.cpus),
                    "interrupts": sum(cpu.interrupts for cpu in sim.cpus),
                    "simulated_ns": sim.env.now,
                    "latencies": took,
                }
            )
            bar.advance(task, n)
    return rows


COLOURS = ("#9a9a9a", "#c2571a", "#e0a526", "#3b8bba", "#1b3f73")


def draw(rows: list[dict[str, Any]], base: Path, title: str) -> list[str]:
    """Cumulative distributions: a row a workload, a column a machine size."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    sizes = list(dict.fromkeys(row["vcpus"] for row in rows))
    workloads = list(dict.fromkeys(row["workload"] for row in rows))
    plt.rcParams["svg.hashsalt"] = "fastexit"
    figure, axes = plt.subplots(
        len(workloads),
        len(sizes),
        figsize=(3.1 * len(sizes) + 0.6, 5.8),
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    for i, workload in enumerate(workloads):
        for j, n in enumerate(sizes):
            axis = axes[i][j]
            here = [row for row in rows if (row["workload"], row["vcpus"]) == (workload, n)]
            for colour, row in zip(COLOURS, here):
                values = sorted(value / 1000 for value in row["latencies"])
                shares = [(k + 1) / len(values) for k in range(len(values))]
                axis.step([values[0], *values], [0, *shares], where="post", color=colour, lw=1.6, label=row["kernel"])
            low = min(min(row["latencies"]) for row in here)
            high = max(share(row["latencies"], 0.98) for row in here)
            axis.set_xlim(0.92 * low / 1000, 1.04 * high / 1000)
            axis.set_ylim(0, 1.01)
            axis.grid(color="#e6e6e6", lw=0.7)
            axis.set_axisbelow(True)
            for side in ("top", "right"):
                axis.spines[side].set_visible(False)
            if i == 0:
                axis.set_title(f"{n} vCPUs", fontsize=11)
            if j == 0:
                axis.set_ylabel(f"{workload}\nshare not slower", fontsize=10)
            unit = "round trip" if workload == "ping-pong" else "until all have flushed"
            axis.set_xlabel(f"{unit}, us", fontsize=9)
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside upper center", ncols=len(labels), frameon=False, fontsize=10, title=title
    )
    base.parent.mkdir(parents=True, exist_ok=True)
    names = [f"{base}.png", f"{base}.svg"]
    figure.savefig(names[0], dpi=130)
    figure.savefig(names[1], metadata={"Date": None})
    plt.close(figure)
    return names


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--vcpus", type=lambda text: [int(part) for part in text.split(",")], metavar="N,N,...")
    parser.add_argument("--costs", default="skylake-retpoline", metavar="NAME|FILE", help="cost profile or TOML file")
    parser.add_argument("--samples", type=int, help="latencies wanted of each case, about")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--no-apicv", action="store_true", help="without posted interrupts")
    parser.add_argument("--quick", action="store_true", help="4 and 16 vCPUs, few samples")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    parser.add_argument(
        "--output", type=Path, default=Path("build") / "simpy-ipi", metavar="BASE", help="BASE.png, .svg"
    )
    args = parser.parse_args(argv)
    args.vcpus = args.vcpus or ([4, 16] if args.quick else [4, 16, 64, 256])
    args.samples = args.samples or (60 if args.quick else 400)
    if min(args.vcpus) < 2:
        parser.error("an IPI needs two vCPUs")
    try:
        args.costs = fx.CostProfile.load(args.costs) if args.costs.endswith(".toml") else args.costs
        simulation(2, "6.18", True, args.costs, args.seed, True)
    except (ValueError, OSError, ImportError) as error:
        parser.error(str(error))
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    rows = run(args)
    costs = args.costs if isinstance(args.costs, str) else args.costs.name
    pictures, missing = [], ""
    try:
        pictures = draw(rows, args.output, f"Modelled IPI latency by kernel generation ({costs})")
    except ModuleNotFoundError:
        missing = "pictures need matplotlib: pip install 'fastexit[plot]'"
    if args.json:
        json.dump({"costs": costs, "seed": args.seed, "rows": rows, "pictures": pictures}, sys.stdout, indent=1)
        print()
        return 0
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"Modelled latencies, {costs}: microseconds of simulated time")
    for column in ("workload", "vCPUs", "kernel", "median", "99 %", "samples", "exits"):
        table.add_column(column, justify="left" if column in ("workload", "kernel") else "right")
    for row in rows:
        times = (f"{row[key] / 1000:,.2f}" for key in ("median_ns", "p99_ns"))
        table.add_row(
            row["workload"], str(row["vcpus"]), row["kernel"], *times, str(row["samples"]), f"{row['exits']:,}"
        )
    out = Console(highlight=False)
    out.print(table)
    for line in [f"picture: {name}" for name in pictures] or [missing]:
        print(line)
    return 0


if __name__ == "__main__":
    sys.exit(main())
