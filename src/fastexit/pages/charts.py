"""The pictures of one VM's report, each in a width for a desk and in one for a phone."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING

from fastexit.answers.report import FastRow, Quantiles, VmReport
from fastexit.answers.words import between, clean, count, duration, share, short
from fastexit.pages.svg import LEVELS, SERIES, color, draw

if TYPE_CHECKING:
    from matplotlib.axes import Axes

WIDE, NARROW = 520, 296
"""CSS pixels."""

_ROW = 23
_LETTER = 7.2
_BARS = 10
_SPANS = 8
_COLUMNS = 60
_CELLS = 32
_NUMBERED = 10


@dataclass(frozen=True)
class Chart:
    """A picture: ``wide`` and ``narrow`` are SVG, ``title`` and ``text`` the same in words, ``note`` how to read it."""

    name: str
    title: str
    text: str
    wide: str
    narrow: str
    note: str = ""


def of_vm(vm: VmReport, clock: str, key: str) -> dict[str, Chart]:
    """The charts that this VM has figures for, by name; ``key`` makes the page's ids unique."""
    made = {}
    for make in (_exits, _seconds, _times, _sent, _latency, _fast, _saved):
        if chart := make(vm, clock, key):
            made[chart.name] = chart
    return made


Paint = Callable[["Axes", bool], None]


def _chart(
    key: str, name: str, title: str, text: str, paint: Paint, height: float, narrow: float = 0, note: str = ""
) -> Chart:
    wide = draw(lambda axes: paint(axes, False), WIDE, height, f"{key}-{name}", title, text)
    small = draw(lambda axes: paint(axes, True), NARROW, narrow or height, f"{key}-{name}-narrow", title, text)
    return Chart(name, title, text, wide, small, note)


def _cut(label: str, most: int) -> str:
    return label if len(label) <= most else label[: most - 1] + "…"


def _largest(counts: Sequence[tuple[str, int]], limit: int) -> list[tuple[str, int]]:
    """The most frequent ones, and all others as one."""
    ordered = sorted(counts, key=lambda pair: -pair[1])
    kept, rest = ordered[:limit], ordered[limit:]
    return [*kept, (f"{len(rest)} others", sum(n for _, n in rest))] if rest else kept


def _rows(axes: Axes, labels: Sequence[str], values: Sequence[str], narrow: bool) -> None:
    """Names on the left, figures on the right, the first one on top."""
    axes.set_yticks(range(len(labels)), [_cut(label, 18 if narrow else 30) for label in labels])
    axes.set_ylim(len(labels) - 0.45, -0.55)
    longest = max(map(len, values), default=0) * _LETTER
    for y, value in enumerate(values):
        axes.annotate(
            value,
            (1, y),
            (longest, 0),
            axes.get_yaxis_transform(),
            textcoords="offset points",
            ha="right",
            va="center_baseline",
            annotation_clip=False,
        )


def _exits(vm: VmReport, clock: str, key: str) -> Chart | None:
    if not vm.exits:
        return None
    rows = _largest([(clean(row.reason), row.count) for row in vm.exits], _BARS)
    total = sum(n for _, n in rows)
    values = [f"{count(n)}, {share(n / total)}" if total else "0" for _, n in rows]

    def paint(axes: Axes, narrow: bool) -> None:
        axes.barh(range(len(rows)), [n for _, n in rows], 0.62, color=color("accent"))
        axes.set_xlim(0, max(n for _, n in rows) or 1)
        axes.set_xticks([])
        told = [share(n / total) if total else "" for _, n in rows] if narrow else values
        _rows(axes, [label for label, _ in rows], told, narrow)

    text = "; ".join(f"{label} {n:,}, {share(n / total) if total else '0 %'}" for label, n in rows)
    return _chart(key, "exits", "Exits by reason", text, paint, _ROW * len(rows) + 8)


def _seconds(vm: VmReport, clock: str, key: str) -> Chart | None:
    if len(vm.by_second) < 2:
        return None
    totals: dict[str, int] = {}
    for second in vm.by_second:
        for reason, n in second.items():
            totals[reason] = totals.get(reason, 0) + n
    ordered = sorted(totals, key=lambda reason: -totals[reason])
    shown = ordered if len(ordered) <= SERIES else ordered[: SERIES - 1]
    wide = math.ceil(len(vm.by_second) / _COLUMNS)
    bins = [vm.by_second[i : i + wide] for i in range(0, len(vm.by_second), wide)]
    series = [(clean(r), [sum(s.get(r, 0) for s in part) / len(part) for part in bins]) for r in shown]
    if len(shown) < len(ordered):
        others = [sum(sum(s.values()) for s in part) / len(part) for part in bins]
        taken = [sum(values) for values in zip(*(values for _, values in series), strict=True)]
        series.append((f"{len(ordered) - len(shown)} others", [a - b for a, b in zip(others, taken, strict=True)]))
    starts = [i * wide for i in range(len(bins))]

    def paint(axes: Axes, narrow: bool) -> None:
        below = [0.0] * len(bins)
        for i, (label, values) in enumerate(series):
            axes.bar(
                starts,
                values,
                wide * 0.86,
                bottom=below,
                align="edge",
                color=color(f"series-{i}"),
                label=_cut(label, 15 if narrow else 24),
            )
            below = [a + b for a, b in zip(below, values, strict=True)]
        axes.set_xlim(0, len(vm.by_second))
        axes.set_ylim(0, max(below) * 1.04 or 1)
        axes.locator_params(axis="y", nbins=4)
        axes.locator_params(axis="x", nbins=5 if narrow else 9, integer=True)
        axes.yaxis.set_major_formatter(lambda value, _: short(value))
        axes.tick_params(axis="y", labelcolor=color("muted"))
        axes.grid(axis="y", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.set_xlabel("seconds from the first line")
        axes.figure.legend(
            loc="outside upper left",
            ncols=2 if narrow else 3,
            frameon=False,
            handlelength=0.8,
            handleheight=0.8,
            columnspacing=1.4,
            borderaxespad=0.3,
            borderpad=0,
        )

    most = [sum(second.values()) for second in vm.by_second]
    text = f"{len(most):,} seconds; between {min(most):,} and {max(most):,} exits a second; in all " + "; ".join(
        f"{clean(reason)} {totals[reason]:,}" for reason in shown
    )
    legend = math.ceil(len(series) / 3) * 18
    small = math.ceil(len(series) / 2) * 18
    return _chart(key, "seconds", "Exits a second, over time", text, paint, 190 + legend, 170 + small)


def _spans(rows: Sequence[tuple[str, Quantiles]], clock: str, key: str, name: str, title: str) -> Chart | None:
    """Durations as lines from the median to the longest one, on a logarithmic axis."""
    rows = [(label, time) for label, time in rows if time.count]
    if not rows:
        return None
    floor = 1.0
    ends = [(max(time.median, floor), max(time.maximum, floor)) for _, time in rows]

    def paint(axes: Axes, narrow: bool) -> None:
        from matplotlib.ticker import NullLocator

        axes.set_xscale("log")
        axes.grid(axis="x", linewidth=0.8)
        axes.set_axisbelow(True)
        for y, (_, time) in enumerate(rows):
            points = [max(value, floor) for value in (time.median, time.p90, time.p99, time.maximum)]
            axes.plot([points[0], points[-1]], [y, y], color=color("track"), linewidth=6, solid_capstyle="round")
            axes.plot([points[0], points[2]], [y, y], color=color("accent"), linewidth=6, solid_capstyle="round")
            axes.plot(points[:1], [y], "o", color=color("ink"), markersize=7, markeredgewidth=0)
            axes.plot(points[1:3], [y, y], "o", color=color("card"), markersize=3, markeredgewidth=0)
        low, high = min(a for a, _ in ends), max(b for _, b in ends)
        axes.set_xlim(low / 1.6, high * 1.6 if high > low else low * 10)
        decades = range(math.ceil(math.log10(low / 1.6)), math.floor(math.log10(max(high, 10 * low) * 1.6)) + 1)
        shown = decades[:: math.ceil(len(decades) / (3 if narrow else 7)) or 1]
        axes.set_xticks([10.0**i for i in shown], [_tick(10.0**i, clock) for i in shown])
        axes.xaxis.set_minor_locator(NullLocator())
        _rows(axes, [label for label, _ in rows], [duration(time.median, clock) for _, time in rows], narrow)

    text = "; ".join(
        f"{label}: median {duration(time.median, clock)}, 99 % below {duration(time.p99, clock)}, "
        f"longest {duration(time.maximum, clock)}"
        for label, time in rows
    )
    note = "Large dot and figure: the median. Small dots: 90 and 99 of 100 are shorter. Pale: up to the longest one."
    return _chart(key, name, title, text, paint, _ROW * len(rows) + 34, note=note)


def _tick(value: float, clock: str) -> str:
    return duration(value, clock).replace(".00", "").replace(".0", "")


def _times(vm: VmReport, clock: str, key: str) -> Chart | None:
    timed = [(clean(row.reason), row.time) for row in vm.exits if row.time][:_SPANS]
    return _spans(timed, clock, key, "times", "Time from exit to entry")


def _latency(vm: VmReport, clock: str, key: str) -> Chart | None:
    return _spans([(clean(row.what), row.time) for row in vm.latency], clock, key, "latency", "Latency of IPIs")


def _levels(least: int, most: int) -> Callable[[int], int]:
    """The shade of a number: even steps, or even ratios where the numbers are of many sizes."""

    def level(n: int) -> int:
        wide = most > 30 * least
        part = math.log(n / least) / math.log(most / least) if wide and n else n / most
        return 1 + min(LEVELS - 2, int((LEVELS - 1) * part)) if n > 0 else 0

    return level


def _sent(vm: VmReport, clock: str, key: str) -> Chart | None:
    ids = sorted({row.sender for row in vm.sent} | {row.target for row in vm.sent})
    if len(ids) < 2 or not any(row.interrupts > 0 for row in vm.sent):
        return None
    step = math.ceil(len(ids) / _CELLS)
    labels = [
        str(ids[i]) if step == 1 else f"{ids[i]}-{ids[min(i + step, len(ids)) - 1]}" for i in range(0, len(ids), step)
    ]
    place = {vcpu: i // step for i, vcpu in enumerate(ids)}
    counts = [[0] * len(labels) for _ in labels]
    for row in vm.sent:
        counts[place[row.sender]][place[row.target]] += row.interrupts
    level = _levels(min(n for row in counts for n in row if n > 0), max(max(row) for row in counts))

    def paint(axes: Axes, narrow: bool) -> None:
        from matplotlib.colors import ListedColormap

        shades = ListedColormap([color(f"heat-{i}") for i in range(LEVELS)])
        cells = [[level(n) for n in row] for row in counts]
        axes.pcolormesh(cells, cmap=shades, vmin=0, vmax=LEVELS - 1, edgecolors=color("card"), linewidth=1.5)
        axes.set_aspect("equal")
        axes.invert_yaxis()
        every = max(1, math.ceil(len(labels) / (8 if narrow else 16)))
        at = range(0, len(labels), every)
        axes.set_xticks([i + 0.5 for i in at], [labels[i] for i in at], rotation=90 if step > 1 else 0)
        axes.set_yticks([i + 0.5 for i in at], [labels[i] for i in at])
        axes.tick_params(axis="y", labelcolor=color("muted"))
        axes.set_xlabel("to vCPU")
        axes.set_ylabel("from vCPU")
        if len(labels) <= (6 if narrow else _NUMBERED):
            for y, row in enumerate(counts):
                for x, n in enumerate(row):
                    ink = color("on-heat" if level(n) > LEVELS // 2 else "ink")
                    if n:
                        axes.text(x + 0.5, y + 0.5, short(n), ha="center", va="center", color=ink)

    pairs = sorted(vm.sent, key=lambda row: -row.interrupts)[:5]
    text = f"{sum(row.interrupts for row in vm.sent):,} interrupts among {len(ids):,} vCPUs; most from " + "; ".join(
        f"vCPU {row.sender} to {row.target}: {row.interrupts:,}" for row in pairs
    )
    tall = min(380, max(150, 44 * len(labels) + 60))
    return _chart(key, "sent", "Who sends to whom", text, paint, tall, min(300, tall))


def _runs(rows: list[FastRow], alike: Callable[[FastRow], object]) -> list[tuple[str, FastRow]]:
    """Neighbouring generations that do the same, as one."""
    runs = []
    for _, group in groupby(rows, key=alike):
        same = list(group)
        runs.append((same[0].kernel if len(same) == 1 else f"{same[0].kernel} to {same[-1].kernel}", same[-1]))
    return runs


def _grouped(vm: VmReport, alike: Callable[[FastRow], object]) -> list[tuple[str, FastRow | None]]:
    """Rows of a chart: a heading for each class of exits, then its generations."""
    found: list[tuple[str, FastRow | None]] = []
    for what in dict.fromkeys(row.what for row in vm.fast):
        rows = [row for row in vm.fast if row.what == what and row.total]
        if rows:
            found += [(f"{clean(what)}, {rows[0].total:,}", None), *_runs(rows, alike)]
    return found


def _headings(axes: Axes, rows: list[tuple[str, FastRow | None]], narrow: bool) -> None:
    for y, (label, row) in enumerate(rows):
        if row is None:
            said = axes.text(0, y, _cut(label, 26 if narrow else 48), va="center_baseline", weight="bold")
            said.set_in_layout(False)


def _fast(vm: VmReport, clock: str, key: str) -> Chart | None:
    rows = _grouped(vm, lambda row: (row.fast, row.total))
    if not rows:
        return None
    shares = [None if row is None else row.fast / row.total for _, row in rows]

    def paint(axes: Axes, narrow: bool) -> None:
        places = [(y, part) for y, part in enumerate(shares) if part is not None]
        axes.barh([y for y, _ in places], [1] * len(places), 0.55, color=color("track"))
        axes.barh([y for y, _ in places], [part for _, part in places], 0.55, color=color("accent"))
        axes.set_xlim(0, 1)
        axes.set_xticks([])
        labels = ["" if row is None else label for label, row in rows]
        _rows(axes, labels, ["" if part is None else share(part) for part in shares], narrow)
        _headings(axes, rows, narrow)

    text = "; ".join(
        f"{clean(row.what)} in {label}: {row.fast:,} of {row.total:,}, {share(row.fast / row.total)}"
        for label, row in rows
        if row is not None
    )
    return _chart(key, "fast", "Taken fast, by kernel", text, paint, _ROW * len(rows) + 8)


def _saved(vm: VmReport, clock: str, key: str) -> Chart | None:
    """Cycles that the fast path saves, from least to most."""
    priced = [row for row in vm.fast if row.saved_total]
    if not priced:
        return None
    per_second = all(row.saved_per_second for row in priced)

    def ends(row: FastRow) -> tuple[float, float]:
        return (row.saved_per_second if per_second else row.saved_total) or (0.0, 0.0)

    rows = [(label, row) for label, row in _grouped(VmReport("", 0, fast=priced), ends)]
    known = [(y, ends(row)) for y, (_, row) in enumerate(rows) if row is not None]
    if not known:
        return None

    def paint(axes: Axes, narrow: bool) -> None:
        most = max(high for _, (_, high) in known) or 1
        axes.barh([y for y, _ in known], [most] * len(known), 0.1, color=color("track"))
        least = most / 200
        for y, (low, high) in known:
            axes.barh([y], [max(high - low, least)], 0.5, left=low, color=color("accent"))
        lowest = min(0.0, *(low for _, (low, _) in known))
        if lowest < 0:
            axes.axvline(0, color=color("muted"), linewidth=1)
        axes.set_xlim(lowest, most)
        axes.set_xticks([])
        labels = ["" if row is None else label for label, row in rows]
        _rows(axes, labels, ["" if row is None else between(ends(row)) for _, row in rows], narrow)
        _headings(axes, rows, narrow)

    title = f"Cycles saved by the fast path{' a second' if per_second else ', in total'}"
    text = "; ".join(f"{clean(row.what)} in {label}: {between(ends(row))}" for label, row in rows if row is not None)
    return _chart(key, "saved", title, text, paint, _ROW * len(rows) + 8)
