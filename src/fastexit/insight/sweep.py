"""One workload over kernels, vendors, sizes and APICv: what becomes of its IPIs on each, as one array."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import product
from typing import TYPE_CHECKING, Any, Literal, overload

import numpy as np
import numpy.typing as npt

from fastexit.checks import integer, one_of
from fastexit.costs.profile import Costs
from fastexit.insight.workload import Workload, ipis
from fastexit.machine import Machine
from fastexit.outcome import Effect, Path
from fastexit.profile import profiles

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

SWEEP = np.dtype(
    [
        ("kernel", "U12"),
        ("vendor", "U3"),
        ("vcpus", "i4"),
        ("apicv", "?"),
        ("ipis", "i8"),
        ("fast", "i8"),
        ("share", "f8"),
        ("accepted", "i8"),
        ("notified", "i8"),
        ("kicked", "i8"),
        ("cycles_ipi", "f8"),
        ("cycles", "f8"),
        ("cycles_generic", "f8"),
    ]
)
"""A row of a sweep. ``fast`` of ``ipis`` took the fast path; ``accepted``: interrupts that APICs accepted; ``notified``
and ``kicked``: targets that were told by a posted-interrupt notification or doorbell, and by a kick. With costs medians
of modelled cycles: until the IPI left, until its sender ran again, and the latter without a fast path; else NaN."""

WORKLOADS = ("unicast",)
Builder = Callable[[Machine], Workload]


class Sweep(np.ndarray[Any, Any]):
    """Rows of SWEEP, with a picture and a data frame."""

    def frame(self) -> pd.DataFrame:
        """The rows as a pandas DataFrame; ModuleNotFoundError without pandas."""
        import pandas as pd

        return pd.DataFrame({name: np.asarray(self[name]) for name in SWEEP.names or ()})

    def plot(self, y: str = "share", x: str = "kernel") -> Figure:
        """Draw one column over another, a line for each combination of the rest; needs matplotlib.

        ValueError for a column that there is not.
        """
        from matplotlib.figure import Figure

        columns = SWEEP.names or ()
        one_of(x, "column", columns)
        one_of(y, "column", columns)
        figure = Figure(figsize=(8, 4.5), layout="constrained")
        axes = figure.add_subplot()
        rest = [name for name in ("kernel", "vendor", "vcpus", "apicv") if name != x and len(np.unique(self[name])) > 1]
        keys = dict.fromkeys(tuple(row[name].item() for name in rest) for row in np.asarray(self))
        for key in keys:
            mine = np.ones(len(self), bool)
            for name, value in zip(rest, key, strict=True):
                mine &= np.asarray(self[name]) == value
            label = ", ".join(f"{name} {value}" for name, value in zip(rest, key, strict=True))
            axes.plot(np.asarray(self[x][mine]).astype(str), np.asarray(self[y][mine]), marker="o", label=label or y)
        axes.set_xlabel(x)
        axes.set_ylabel(y)
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
        if keys and rest:
            axes.legend()
        return figure


@overload
def sweep(
    *,
    kernels: Iterable[str] | None = ...,
    vendors: Iterable[str] = ...,
    vcpus: Iterable[int] = ...,
    apicv: Iterable[bool] = ...,
    workload: str | Builder = ...,
    n: int = ...,
    costs: Costs | None = ...,
    frame: Literal[False] = ...,
    progress: Callable[[int, int], object] | None = ...,
    **keywords: Any,
) -> Sweep: ...


@overload
def sweep(
    *,
    kernels: Iterable[str] | None = ...,
    vendors: Iterable[str] = ...,
    vcpus: Iterable[int] = ...,
    apicv: Iterable[bool] = ...,
    workload: str | Builder = ...,
    n: int = ...,
    costs: Costs | None = ...,
    frame: Literal[True],
    progress: Callable[[int, int], object] | None = ...,
    **keywords: Any,
) -> pd.DataFrame: ...


def sweep(
    *,
    kernels: Iterable[str] | None = None,
    vendors: Iterable[str] = ("vmx",),
    vcpus: Iterable[int] = (4,),
    apicv: Iterable[bool] = (True,),
    workload: str | Builder = "unicast",
    n: int = 1000,
    costs: Costs | None = None,
    frame: bool = False,
    progress: Callable[[int, int], object] | None = None,
    **keywords: Any,
) -> Sweep | pd.DataFrame:
    """Run a workload on a machine of every combination, and say what became of its IPIs.

    Args:
        kernels: generations or releases; by default all generations.
        vendors: "vmx" or "svm", or both; one value may stand without a list, here and below.
        vcpus: numbers of vCPUs.
        apicv: with posted interrupts or AVIC, and without.
        n: IPIs of the library's own workload.
        workload: "unicast" (``n`` Fixed IPIs to random vCPUs, see workload.ipis), or what makes a Workload for a
            machine: it enters the vCPUs, fills in the vendor's reasons, lets targets take what they are sent.
        costs: a cost profile or its name, for cycles.
        frame: a pandas DataFrame instead of an array.
        progress: called as ``progress(done, total)`` after each machine.
        keywords: more of Machine's, the same for all.

    The rows are in the order of the arguments, ``apicv`` running fastest. ValueError as Machine has it, TypeError for a
    workload that is none.
    """
    integer(n, "number of IPIs", 1 << 40)
    if isinstance(workload, str):
        one_of(workload, "workload", WORKLOADS)
        build: Builder = lambda machine: ipis(machine, n)  # noqa: E731
    else:
        build = workload
    wanted = list(
        product(
            _each(profiles() if kernels is None else kernels),
            _each(vendors),
            [integer(count, "number of vCPUs", 1 << 12) for count in _each(vcpus)],
            _each(apicv),
        )
    )
    rows = np.zeros(len(wanted), SWEEP)
    for i, (kernel, vendor, count, on) in enumerate(wanted):
        rows[i] = _row(kernel, vendor, count, bool(on), build, costs, keywords)
        if progress:
            progress(i + 1, len(wanted))
    found = rows.view(Sweep)
    return found.frame() if frame else found


def _each(values: Any) -> list[Any]:
    return [values] if isinstance(values, str | int) else list(values)


def _row(
    kernel: str,
    vendor: str,
    vcpus: int,
    apicv: bool,
    build: Builder,
    costs: Costs | None,
    keywords: dict[str, Any],
) -> tuple[Any, ...]:
    made: dict[str, Any] = {
        "vcpus": vcpus,
        "kernel": kernel,
        "vendor": vendor,
        "apicv": apicv,
        "costs": costs,
    } | keywords
    load = build(Machine(**made))
    if costs is None:
        measured, outcomes = None, load.machine.run(load.exits)[load.ipi]
    else:
        measured = load.run()
        outcomes = measured.outcomes
    fast = int((outcomes["path"] == Path.FAST).sum())
    effects = outcomes["flags"]
    cycles = [float("nan")] * 3
    if measured is not None:
        plain = Machine(**made)
        plain.fastpath = False
        cycles = [_median(some) for some in (measured.cycles_ipi, measured.cycles, build(plain).run().cycles)]
    return (
        kernel,
        vendor,
        vcpus,
        apicv,
        len(outcomes),
        fast,
        fast / len(outcomes) if len(outcomes) else float("nan"),
        int(outcomes["accepted"].sum()),
        int((effects & (Effect.NOTIFY | Effect.DOORBELL) != 0).sum()),
        int((effects & Effect.KICK != 0).sum()),
        *cycles,
    )


def _median(values: npt.NDArray[np.float64]) -> float:
    told = values[~np.isnan(values)]
    return float(np.median(told)) if len(told) else float("nan")
