"""Latency of IPIs by kernel generation, simulated with SimPy: ping-pong, and a storm of TLB shootdowns.

    python benchmarks/simpy_ipi.py                       # some 20 s; build/simpy-ipi.png and .svg
    python benchmarks/simpy_ipi.py --quick --json        # small machines, numbers only where matplotlib is missing

Every vCPU has work of its own. Ping-pong: it asks a random other one, which answers from its interrupt handler, and
polls for the answer; the latency is there and back. Storm: some vCPUs flush the TLB of all others, as Linux does in
x2APIC physical mode, one IPI for each target whose queue was empty, and poll until all have done it.
Both are on machines with posted interrupts unless --no-apicv is given. What is simulated is the model's time, under the
cost profile's constants.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fastexit as fx
from fastexit.adapters.simpy import Cpu, Simulation
from fastexit.costs.profile import cost_profile

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


WHAT = {
    "ping-pong": ("one IPI there, one back", "round trip, us"),
    "TLB-shootdown storm": ("an IPI to every other vCPU", "until all have flushed, us"),
}


def finding(rows: list[dict[str, Any]]) -> str:
    """What the picture shows, in figures: the last generation against the first, at the largest machine."""
    size, parts = max(row["vcpus"] for row in rows), []
    for workload in dict.fromkeys(row["workload"] for row in rows):
        here = [row for row in rows if (row["workload"], row["vcpus"]) == (workload, size)]
        change = 100 * (here[-1]["median_ns"] / here[0]["median_ns"] - 1)
        parts.append(f"{workload} {change:+.0f} %".replace("-", "\N{MINUS SIGN}", workload.count("-") * 0 + 0) or "")
    return f"{rows[-1]['kernel']} against {rows[0]['kernel']} at {size} vCPUs, medians: " + ", ".join(parts)


def draw(rows: list[dict[str, Any]], base: Path, title: str) -> list[str]:
    """A row a workload: cumulative distributions, a column a machine size, and the medians against the size."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import FixedLocator, NullLocator, ScalarFormatter

    sizes = list(dict.fromkeys(row["vcpus"] for row in rows))
    workloads = list(dict.fromkeys(row["workload"] for row in rows))
    plt.rcParams["svg.hashsalt"] = "fastexit"
    columns = len(sizes) + (len(sizes) > 1)
    figure = plt.figure(figsize=(3.1 * columns + 0.4, 7.4), layout="constrained")
    rows_of_it = figure.subfigures(len(workloads), 1, squeeze=False)[:, 0]
    axes = [part.subplots(1, columns, squeeze=False)[0] for part in rows_of_it]
    for i, workload in enumerate(workloads):
        mine = [row for row in rows if row["workload"] == workload]
        what, unit = WHAT[workload]
        rows_of_it[i].suptitle(f"{workload}: {what}", fontsize=12, fontweight="bold")
        for j, n in enumerate(sizes):
            axis = axes[i][j]
            here = [row for row in mine if row["vcpus"] == n]
            for colour, row in zip(COLOURS, here):
                values = sorted(value / 1000 for value in row["latencies"])
                shares = [100 * (k + 1) / len(values) for k in range(len(values))]
                axis.step([values[0], *values], [0, *shares], where="post", color=colour, lw=1.8, label=row["kernel"])
            seen = mine if workload == "ping-pong" else here  # whose latency does not grow with the machine
            low = min(share(row["latencies"], 0.01) for row in seen)
            high = max(share(row["latencies"], 0.98) for row in seen)
            axis.set_xlim((low - 0.05 * (high - low)) / 1000, (high + 0.05 * (high - low)) / 1000)
            axis.set_ylim(0, 101)
            axis.set_title(f"{n} vCPUs", fontsize=11)
            axis.set_xlabel(unit, fontsize=10)
            axis.tick_params(labelleft=j == 0)
        axes[i][0].set_ylabel("% of all that took no longer", fontsize=10)
        if len(sizes) > 1:
            axis = axes[i][-1]
            for k, colour in enumerate(COLOURS[: len(mine) // len(sizes)]):
                every = mine[k :: len(mine) // len(sizes)]
                axis.plot(sizes, [row["median_ns"] / 1000 for row in every], "o-", color=colour, lw=1.8, ms=4)
            axis.set_xscale("log", base=2)
            axis.set_yscale("log")
            for side, places in ((axis.xaxis, sizes), (axis.yaxis, (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000))):
                side.set_major_locator(FixedLocator(places))
                side.set_major_formatter(ScalarFormatter())
                side.set_minor_locator(NullLocator())
            low, high = min(row["median_ns"] for row in mine), max(row["median_ns"] for row in mine)
            axis.set_ylim(min(low / 1400, 1), max(high / 700, 5))
            axis.set_title("medians (log scales)", fontsize=11)
            axis.set_xlabel("vCPUs", fontsize=10)
            axis.set_ylabel(unit, fontsize=10)
    for axis in (axis for row in axes for axis in row):
        axis.grid(color="#e6e6e6", lw=0.7)
        axis.set_axisbelow(True)
        for side in ("top", "right"):
            axis.spines[side].set_visible(False)
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.suptitle(f"{title}\n{finding(rows)}", fontsize=12)
    rows_of_it[-1].legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False, fontsize=10)
    names = [f"{base}.png", f"{base}.svg"]
    figure.savefig(names[0], dpi=130)
    figure.savefig(names[1], metadata={"Date": None})
    plt.close(figure)
    return names


def _sizes(text: str) -> list[int]:
    try:
        sizes = sorted({int(part) for part in text.split(",")})
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no list of numbers such as 4,16") from None
    if not 2 <= sizes[0] <= sizes[-1] <= 1024:
        raise argparse.ArgumentTypeError("machines have 2 to 1024 vCPUs here: an IPI needs two")
    return sizes


def _samples(text: str) -> int:
    if not text.isdecimal() or not 0 < int(text) <= 10**6:
        raise argparse.ArgumentTypeError(f"{text!r} is no number from 1 to a million")
    return int(text)


def _writable(base: Path) -> None:
    """OSError now, not behind the work."""
    base.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=base.parent):
        pass


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--vcpus", type=_sizes, metavar="N,N,...", help="machine sizes (default 4,16,64,256)")
    parser.add_argument("--costs", default="skylake-retpoline", metavar="NAME|FILE", help="cost profile or TOML file")
    parser.add_argument("--samples", type=_samples, metavar="N", help="latencies wanted of each case, about")
    parser.add_argument("--seed", type=int, default=1, metavar="N", help="equal seeds give equal figures")
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
    try:
        is_file = args.costs.endswith(".toml") or "/" in args.costs
        args.costs = fx.CostProfile.load(args.costs) if is_file else cost_profile(args.costs)
        simulation(2, "6.18", True, args.costs, args.seed, True)
        _writable(args.output)
    except (ValueError, OSError, ImportError) as error:
        parser.error(str(error))
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    rows = run(args)
    costs = args.costs.name
    posted = "without posted interrupts" if args.no_apicv else "posted interrupts"
    pictures, missing = [], ""
    try:
        pictures = draw(rows, args.output, f"Modelled IPI latency by kernel generation: cost profile {costs}, {posted}")
    except ModuleNotFoundError:
        missing = "pictures need matplotlib: pip install matplotlib"
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
