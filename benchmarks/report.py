"""docs/results.md and its figure from build/bench/results.json: ``python benchmarks/report.py``."""

from __future__ import annotations

import json
import math
import sys

from bars import BARS, RESULTS, ROOT

DOCS = ROOT / "docs"
FIGURE = "ipi-cost"
PEERS = {
    "KVM 7.1.8 in user space, consumed": {4: 39.1, 64: 45.5, 1024: 67.3},
    "OpenVMM, consumed": {4: 44.0, 64: 52.7, 1024: 52.8},
    "Bochs, consumed": {4: 52.0, 64: 75.7, 1024: 721},
    "QEMU 10.2.2, consumed": {4: 97.6, 64: 156, 1024: 1260},
}
"""Measured beforehand on a machine of the same kind, each with its own consumer path, not in the run that is shown."""

HEAD = """# Results

Written by `benchmarks/report.py` from one run of `make bench`; `make bench-check` compares it with the bars.
Every value is a ratio of sides that were timed in turn, or what one process of its own needed; medians of all rounds.
All our rows of the second table were timed in turn too, so they may be compared with each other.
Vectors are uniform 32..255, targets uniform over the other vCPUs, kernel {kernel}, VMX, APICv on, tracing off. Each IPI
is consumed before the next one is sent. Where the time goes is in [performance.md](performance.md).

CPU {cpu}; Python {python}, numba {numba}, numpy {numpy}. Load average at the end: {load}.

| row | what | case | measured | bar | aim | |
|---|---|---|---|---|---|---|
"""


def _number(value: float, unit: str) -> str:
    text = f"{value:,.0f}" if abs(value) >= 1000 or value == int(value) else f"{value:.2f}"
    return f"{text} {unit}".rstrip()


def table(content: dict) -> str:
    """The page."""
    text = HEAD.format(kernel="6.18", **{"load": "unknown", **content["machine"]})
    for entry in sorted(content["values"], key=lambda entry: list(BARS).index(entry["row"])):
        bar = BARS[entry["row"]]
        sign = "≤" if bar.most else "≥"
        beside = {
            "cpu": "x by CPU time",
            "c": "x for the C program",
            "python_objects": "bytes of Python objects beside it",
        }
        notes = [f"; {_number(entry[name], text)}" for name, text in beside.items() if name in entry]
        cells = [entry["row"], bar.what, entry["case"], _number(entry["value"], bar.unit) + "".join(notes)]
        cells += [f"{sign} {_number(bar.bar, bar.unit)}", _number(bar.aim, bar.unit)]
        text += "| " + " | ".join([*cells, "**missed**" if bar.misses(entry["value"]) else "holds"]) + " |\n"
    for row, why in content["skipped"].items():
        text += f"\nNot measured, row {row}: {why}.\n"
    text += f"\n![Nanoseconds an IPI against the number of vCPUs]({FIGURE}.svg)\n\n"
    sizes = sorted({n for curve in content["curves"].values() for n in map(int, curve)})
    text += "| ns an IPI, consumed | " + " | ".join(f"N = {n}" for n in sizes) + " |\n"
    text += "|---|" + "---|" * len(sizes) + "\n"
    for name, curve in {**content["curves"], **PEERS}.items():
        known = {int(n): ns for n, ns in curve.items()}
        text += f"| {name} | " + " | ".join(f"{known[n]:.1f}" if n in known else "" for n in sizes) + " |\n"
    return text + (
        "\nThe last four rows were measured once, on a machine of the same kind, with each program's own code for its "
        "consumer;\nthey show the order of magnitude and are no part of this run.\n"
    )


def figure(content: dict) -> None:
    """SVG and PNG."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "fastexit"
    from matplotlib import pyplot as plt

    fig, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    colours = {"fast": "C0", "C lower bound": "C2", "generic": "C1"}
    for name, curve in content["curves"].items():
        side, _, kind = name.partition(", ")
        points = sorted((int(n), ns) for n, ns in curve.items())
        style = "-o" if kind == "atomics" else "--o"
        axes.plot(*zip(*points, strict=True), style, color=colours[side], label=name, markersize=4)
    for marker, (name, curve) in zip("sv^D", PEERS.items(), strict=True):
        axes.plot(list(curve), list(curve.values()), marker, color="0.5", label=name, markersize=5, linestyle="none")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    sizes = sorted({int(n) for curve in content["curves"].values() for n in curve})
    axes.set_xticks(sizes, [str(n) for n in sizes])
    low = min(ns for curve in content["curves"].values() for ns in curve.values())
    axes.set_ylim(bottom=10 ** math.floor(math.log10(low)))
    axes.set_xlabel("vCPUs")
    axes.set_ylabel("ns an IPI, consumed")
    axes.grid(visible=True, which="both", alpha=0.3)
    axes.legend(fontsize=8)
    fig.savefig(DOCS / f"{FIGURE}.svg", metadata={"Date": None})
    fig.savefig(DOCS / f"{FIGURE}.png", dpi=120)
    plt.close(fig)


def main() -> int:
    """Exit status."""
    if not RESULTS.exists():
        print("no results of a whole run: run make bench first", file=sys.stderr)
        return 1
    content = json.loads(RESULTS.read_text())
    (DOCS / "results.md").write_text(table(content))
    figure(content)
    return 0


if __name__ == "__main__":
    sys.exit(main())
