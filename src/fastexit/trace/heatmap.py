"""Who sends to whom: the IPIs of a trace as a picture, sender by target, on a logarithmic colour scale."""

from __future__ import annotations

import math
import os
from pathlib import Path

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.layout_engine import ConstrainedLayoutEngine

from fastexit.trace.report import Report, VmReport

ANNOTATED = 16
"""Up to this many vCPUs every cell shows its number."""
FORMATS = ("png", "svg")

_PANELS_IN_A_ROW = 3
_TICKS = 16
_WIDTH = 5.2
_EMPTY = "#f1f1f1"
_INK = "#222222"


def matrix(vm: VmReport) -> np.ndarray:
    """Interrupts delivered by IPIs: ``[i, j]`` is how many the i-th vCPU sent to the j-th, vCPUs in id order."""
    place = {vcpu: i for i, vcpu in enumerate(sorted(vm.threads))}
    counts = np.zeros((len(place), len(place)), dtype=np.int64)
    for (sender, target), n in vm.sent.items():
        counts[place[sender], place[target]] += n
    return counts


def draw(report: Report) -> Figure:
    """One panel for each VM of the report that sends IPIs, all on one colour scale.

    ValueError when there is no IPI to show.
    """
    vms = [vm for vm in report.vms if vm.sent]
    if not vms:
        raise ValueError(f"{report.path}: no IPI was delivered, there is nothing to draw")
    columns = min(len(vms), _PANELS_IN_A_ROW)
    rows = math.ceil(len(vms) / columns)
    side = max(_side(vm) for vm in vms)
    width = max(_WIDTH, columns * side + 1.2)
    height = rows * (side + (0.25 if len(vms) > 1 else 0)) + 0.6
    figure = Figure(figsize=(width, height), dpi=120, layout=ConstrainedLayoutEngine(w_pad=0.08, h_pad=0.08))
    counts = [n for vm in vms for n in vm.sent.values()]
    floor = 10 ** math.floor(math.log10(min(counts)))
    norm = LogNorm(vmin=floor, vmax=max(max(counts), 10 * floor))
    axes = [figure.add_subplot(rows, columns, i + 1) for i in range(len(vms))]
    for ax, vm in zip(axes, vms, strict=True):
        image = _panel(ax, vm, norm, alone=len(report.vms) == 1)
    bar = figure.colorbar(image, ax=axes, pad=0.02, aspect=25)
    bar.set_label("interrupts (grey: none)", color=_INK, fontsize=9)
    bar.ax.yaxis.set_major_formatter(_plain)
    bar.ax.yaxis.set_minor_formatter("")
    bar.ax.tick_params(labelsize=8, colors=_INK)
    bar.outline.set_visible(False)
    figure.suptitle(_title(report), fontsize=10, color=_INK)
    return figure


def save(report: Report, path: str | os.PathLike[str]) -> list[Path]:
    """Writes the picture: ``path`` ends in .png or .svg, or without either both are written. The files written."""
    path = Path(path)
    named = path.suffix.lower().lstrip(".") in FORMATS
    files = [path] if named else [path.with_name(f"{path.name}.{suffix}") for suffix in FORMATS]
    # A new figure for each, no date and a fixed salt for the ids: the same report gives the same bytes.
    with rc_context({"svg.hashsalt": "fastexit"}):
        for file in files:
            draw(report).savefig(file, metadata={"Date": None} if file.suffix.lower() == ".svg" else None)
    return files


def _side(vm: VmReport) -> float:
    """Inches of a panel's side: room for numbers where there are any."""
    n = len(vm.threads)
    return max(3.8, 0.62 * n) if n <= ANNOTATED else 6.5


def _plain(value: float, _position: object = None) -> str:
    return f"{value:,.0f}"


def _title(report: Report) -> str:
    delivered = sum(vm.sent.total() for vm in report.vms)
    writes = sum(vm.icr_writes for vm in report.vms)
    return f"{Path(report.path).name}\n{writes:,} ICR writes, {delivered:,} interrupts delivered"


def _panel(ax: Axes, vm: VmReport, norm: LogNorm, *, alone: bool) -> AxesImage:
    counts = matrix(vm)
    n = len(counts)
    ids = sorted(vm.threads)
    shown = np.ma.masked_equal(counts, 0)
    ax.set_facecolor(_EMPTY)
    image = ax.imshow(shown, cmap="YlGnBu", norm=norm, interpolation="nearest", aspect="equal")
    step = max(1, math.ceil(n / _TICKS))
    ax.set_xticks(range(0, n, step), [str(i) for i in ids[::step]])
    ax.set_yticks(range(0, n, step), [str(i) for i in ids[::step]])
    ax.tick_params(length=0, labelsize=8, colors=_INK)
    ax.set_xlabel("target vCPU", color=_INK, fontsize=9)
    ax.set_ylabel("sender vCPU", color=_INK, fontsize=9)
    if not alone:
        ax.set_title(f"VM {vm.number}: {vm.sent.total():,} interrupts", fontsize=9, color=_INK)
    for spine in ax.spines.values():
        spine.set_visible(False)
    if n <= ANNOTATED:
        ax.set_xticks([i - 0.5 for i in range(1, n)], minor=True)
        ax.set_yticks([i - 0.5 for i in range(1, n)], minor=True)
        ax.grid(which="minor", color="white", linewidth=2)
        ax.tick_params(which="minor", length=0)
        for (i, j), count in np.ndenumerate(counts):
            if count:
                red, green, blue, _ = image.cmap(image.norm(count))
                dark = 0.299 * red + 0.587 * green + 0.114 * blue < 0.55
                size = 9 if n <= 8 else 7
                ax.text(j, i, f"{count:,}", ha="center", va="center", fontsize=size, color="white" if dark else _INK)
    return image
