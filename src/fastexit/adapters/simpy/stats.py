"""What a simulation came to, as numbers: exits and their time, interrupts and how long they took to their handlers."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any

import numpy as np

from fastexit.adapters.simpy.ledger import Cause
from fastexit.checks import one_of

if TYPE_CHECKING:
    import pandas as pd

    from fastexit.adapters.simpy.simulation import Simulation

_QUANTILES = (50, 90, 99)


@dataclass(frozen=True)
class VcpuRow:
    """One vCPU: its exits, their time in ns, the interrupts that its guest took."""

    vcpu: int
    exits: int
    exit_ns: float
    interrupts: int


@dataclass(frozen=True)
class ExitRow:
    """Exits of one vCPU (None: of all) with one cause, such as ICR or HLT, on one path; their time in ns."""

    vcpu: int | None
    cause: str
    path: str
    exits: int
    exit_ns: float


@dataclass(frozen=True)
class InterruptRow:
    """Interrupts that one vCPU (None: all) took, by who sent them and, for IPIs, by the path of the sender's exit.

    Latencies are ns from the send, or from when a timer was due, to the handler's first instruction: quantiles that are
    values which occurred (a share of at least so many is not above), None where nobody knows when it was sent.
    """

    vcpu: int | None
    cause: str
    path: str
    vector: int | None
    interrupts: int
    mean_ns: float | None
    p50_ns: float | None
    p90_ns: float | None
    p99_ns: float | None
    max_ns: float | None


@dataclass(frozen=True, repr=False)
class Stats:
    """What a simulation came to.

    Attributes:
        ns: the time that it is about.
        vcpus: a row a vCPU.
        exits: rows by vCPU, cause and path. An exit is counted when its time passes, so counts and times agree.
        interrupts: rows by vCPU, cause, path and vector.
        exit_causes: ``exits`` of all vCPUs together, the costliest first.
        interrupt_causes: ``interrupts`` of all vCPUs and vectors together, quantiles over all of them.
    """

    ns: float
    vcpus: tuple[VcpuRow, ...]
    exits: tuple[ExitRow, ...]
    interrupts: tuple[InterruptRow, ...]
    exit_causes: tuple[ExitRow, ...]
    interrupt_causes: tuple[InterruptRow, ...]

    def as_dict(self) -> dict[str, Any]:
        """All of it with plain values, for JSON."""
        return asdict(self)

    def to_frame(self, table: str = "interrupts") -> pd.DataFrame:
        """One of the tables as a pandas DataFrame: "vcpus", "exits", "interrupts", "exit_causes", "interrupt_causes".

        ModuleNotFoundError says so where pandas is missing.
        """
        one_of(table, "table", ("vcpus", "exits", "interrupts", "exit_causes", "interrupt_causes"))
        try:
            import pandas as pd
        except ModuleNotFoundError:
            raise ModuleNotFoundError("data frames need pandas: pip install pandas", name="pandas") from None
        kind: type[VcpuRow | ExitRow | InterruptRow] = InterruptRow
        if table in ("vcpus", "exits", "exit_causes"):
            kind = VcpuRow if table == "vcpus" else ExitRow
        rows = [asdict(row) for row in getattr(self, table)]
        return pd.DataFrame(rows, columns=[field.name for field in fields(kind)])

    def __repr__(self) -> str:
        exits = sum(row.exits for row in self.vcpus)
        spent = sum(row.exit_ns for row in self.vcpus)
        taken = sum(row.interrupts for row in self.vcpus)
        head = f"{self.ns:,.0f} ns, {len(self.vcpus)} vCPUs: {exits:,} exits in {spent:,.0f} ns, {taken:,} interrupts"
        lines = [
            ("exits", "path", "count", "ns", "ns each"),
            *((row.cause, row.path, f"{row.exits:,}", f"{row.exit_ns:,.0f}", _each(row)) for row in self.exit_causes),
        ]
        latencies = [
            ("interrupts", "path", "count", "p50 ns", "p90 ns", "p99 ns", "max ns"),
            *(
                (
                    row.cause,
                    row.path,
                    f"{row.interrupts:,}",
                    *map(_ns, (row.p50_ns, row.p90_ns, row.p99_ns, row.max_ns)),
                )
                for row in self.interrupt_causes
            ),
        ]
        return "\n".join([head, "", *_aligned(lines), "", *_aligned(latencies)])


def gather(sim: Simulation) -> Stats:
    """The counts of a simulation as they stand."""
    ledger = sim.ledger
    exits = [ExitRow(*key, count.count, count.ns) for key, count in sorted(ledger.exits.items())]
    found = sorted(ledger.interrupts.items(), key=lambda item: (item[0].vcpu, item[0].cause.value, *item[0][2:]))
    together: dict[tuple[Cause, str], array[float]] = {}
    for key, values in found:
        together.setdefault((key.cause, key.path), array("d")).extend(values)
    causes: dict[tuple[str, str], tuple[int, float]] = {}
    for row in exits:
        count, ns = causes.get((row.cause, row.path), (0, 0.0))
        causes[row.cause, row.path] = count + row.exits, ns + row.exit_ns
    return Stats(
        ns=sim.env.now - ledger.since,
        vcpus=tuple(VcpuRow(cpu.index, cpu.exits, cpu.exit_ns, cpu.interrupts) for cpu in sim.cpus),
        exits=tuple(exits),
        interrupts=tuple(
            InterruptRow(key.vcpu, key.cause.value, key.path, key.vector, *_latencies(values)) for key, values in found
        ),
        exit_causes=tuple(
            ExitRow(None, *key, *value) for key, value in sorted(causes.items(), key=lambda item: -item[1][1])
        ),
        interrupt_causes=tuple(
            InterruptRow(None, cause.value, path, None, *_latencies(values))
            for (cause, path), values in sorted(together.items(), key=lambda item: -len(item[1]))
        ),
    )


def _latencies(values: Sequence[float]) -> tuple[Any, ...]:
    """How many, and of those whose send is known: mean, quantiles, maximum."""
    known = np.sort(np.frombuffer(values, dtype=np.float64))  # type: ignore[call-overload]
    known = known[known >= 0]
    if not known.size:
        return len(values), None, None, None, None, None
    at = [max(-(-known.size * share // 100) - 1, 0) for share in _QUANTILES]
    return len(values), float(known.mean()), *(float(known[i]) for i in at), float(known[-1])


def _each(row: ExitRow) -> str:
    return f"{row.exit_ns / row.exits:,.0f}"


def _ns(value: float | None) -> str:
    return "-" if value is None else f"{value:,.0f}"


def _aligned(rows: Iterable[tuple[str, ...]]) -> list[str]:
    """Rows as lines: two columns of words, the rest numbers."""
    table = list(rows)
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return [
        "  ".join(
            cell.ljust(w) if i < 2 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in table
    ]
