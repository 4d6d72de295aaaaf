"""What the benchmarks are held to: one Bar a row, and the record of one run that is checked against them."""

from __future__ import annotations

import json
import os
import platform
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "build" / "bench" / "results.json"


SIZES = 4, 64, 1024, 4096
"""Numbers of vCPUs."""
ALL_SIZES = tuple(f"N = {n}" for n in SIZES)


class Bar(NamedTuple):
    """``bar`` is what must hold, ``aim`` what is wanted; ``most``: values must not exceed it, else not fall short.

    ``cases``: each of them must have been measured. ``compiler``: where C cannot be compiled, that cannot be.
    """

    what: str
    unit: str
    bar: float
    aim: float
    most: bool = True
    cases: tuple[str, ...] = ("new process",)
    compiler: bool = False

    def misses(self, value: float) -> bool:
        """Whether a value does not reach the bar."""
        return not (value <= self.bar if self.most else value >= self.bar)


BARS = {
    "1": Bar(
        "batch, atomics: one IPI, consumed, over the locked C lower bound",
        "x",
        1.3,
        1.0,
        cases=ALL_SIZES,
        compiler=True,
    ),
    "2": Bar(
        "batch, one owner: one IPI, consumed, over the plain C lower bound",
        "x",
        1.8,
        1.3,
        cases=ALL_SIZES,
        compiler=True,
    ),
    "3": Bar("batch: N = 4096 over N = 4", "x", 1.35, 1.1, cases=("atomics", "one owner")),
    "4": Bar(
        "Python: wrmsr() with its Outcome, over a bare call with 3 arguments", "x", 10, 5, cases=("N = 64", "N = 2001")
    ),
    "5 python": Bar("Python door: generic over fast", "x", 3, 3, most=False, cases=("6.18",)),
    "5 batch": Bar("batch door: generic over fast", "x", 1.5, 1.5, most=False, cases=("6.18",)),
    "6": Bar("two senders on disjoint targets over one", "x", 1.6, 1.9, most=False, cases=("N = 64",)),
    "7": Bar(
        "two senders on the same targets, a third thread consumes: lost or invented",
        "vectors",
        0,
        0,
        cases=("100,000,000 IPIs",),
    ),
    "8": Bar("import fastexit over import numpy", "x", 1.5, 1.2),
    "8 numba": Bar("import fastexit: numba in sys.modules", "", 0, 0),
    "9 warm": Bar("first wrmsr() of a process, warm cache", "s", 1.0, 0.5),
    "9 cold": Bar("first wrmsr() of a process, cold cache", "s", 20, 8),
    "9 progress": Bar("cold: says that it compiles", "", 1, 1, most=False),
    "10": Bar("memory of one vCPU", "bytes", 2048, 2048, cases=("1024 to 4096 vCPUs",)),
    "11": Bar("replay of ftrace text", "lines/s", 300_000, 1_000_000, most=False, cases=("a trace 8 times over",)),
    "11 memory": Bar(
        "replay: peak memory at four times the length over once", "x", 1.1, 1.0, cases=("four times the length",)
    ),
    "14": Bar("ftrace text into columns", "lines/s", 1_000_000, 2_000_000, most=False, cases=("a trace 8 times over",)),
    "14 memory": Bar(
        "columns: peak memory at four times the length over once", "x", 1.1, 1.0, cases=("four times the length",)
    ),
    "15": Bar("columns into answers", "lines/s", 1_700_000, 3_000_000, most=False, cases=("a trace 8 times over",)),
    "15 memory": Bar(
        "answers: peak memory at four times the length over once", "x", 1.1, 1.0, cases=("four times the length",)
    ),
    "12": Bar(
        "compiled dispatcher: one exit with its Outcome or value, over a bare call with 3 arguments",
        "x",
        8,
        6,
        cases=("EOI", "TPR", "read ID", "read TPR", "ICR, 5.8"),
    ),
    "13 line": Bar(
        "batch: an edge-triggered line up, consumed, down, over one IPI, consumed", "x", 3, 2, cases=("irq_line",)
    ),
    "13": Bar(
        "batch: over an RDMSR of the local APIC that exits",
        "x",
        3,
        2,
        cases=("EOI of a level interrupt", "IOAPIC page access"),
    ),
    "16": Bar(
        "ten traces: one process over two",
        "x",
        1.7,
        1.9,
        most=False,
        cases=("10 traces of 5.1 million lines",),
    ),
}


class Record:
    """Values of one run: (row, case) -> value, curves for the figure, and what could not be measured."""

    def __init__(self) -> None:
        self.values: list[dict[str, Any]] = []
        self.curves: dict[str, dict[int, float]] = {}
        self.skipped: dict[str, str] = {}

    def add(self, row: str, case: str, value: float, **more: Any) -> None:
        """One value of a row."""
        if case not in BARS[row].cases:
            raise KeyError(f"row {row}, {case}")
        self.values.append({"row": row, "case": case, "value": value, **more})

    def point(self, curve: str, n: int, ns: float) -> None:
        """Nanoseconds an IPI at n vCPUs."""
        self.curves.setdefault(curve, {})[n] = ns

    def skip(self, row: str, why: str) -> None:
        """A row that this machine cannot measure, for lack of a C compiler or of what it needs."""
        if not BARS[row].compiler:
            raise KeyError(row)
        self.skipped[row] = why

    def content(self) -> dict[str, Any]:
        """What the run measured."""
        return {"values": self.values, "curves": self.curves, "skipped": self.skipped}

    def write(self, path: Path = RESULTS) -> None:
        """As JSON, with what it depends on."""
        import numba
        import numpy

        machine = {
            "cpu": _cpu(),
            "python": platform.python_version(),
            "numba": numba.__version__,
            "numpy": numpy.__version__,
            "load": f"{os.getloadavg()[0]:.1f} on {os.cpu_count()} CPUs",
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"machine": machine, **self.content()}, indent=1) + "\n")


def excused(content: dict) -> dict[str, str]:
    """Rows that were skipped, and why. That C cannot be compiled is the only excuse there is."""
    return {row: why for row, why in content["skipped"].items() if BARS[row].compiler}


def unmeasured(content: dict) -> list[tuple[str, str]]:
    """Row and case of each value that a run lacks without an excuse."""
    seen = {(entry["row"], entry["case"]) for entry in content["values"]}
    wanted = [(row, case) for row, bar in BARS.items() if row not in excused(content) for case in bar.cases]
    return [case for case in wanted if case not in seen]


def _cpu() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()
