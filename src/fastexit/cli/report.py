"""``fastexit report``: what traces tell, in words, tables, files and pages."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

from fastexit.cli.commands import UsageError, complain, costs_option, print_json

PATIENCE = 5.0
"""Seconds after which the bar names the trace that it waits for."""
FEW = 4
"""Up to so many written files are named one by one."""
CLUES = {
    "vendor": ("vmx", "svm"),
    "apicv": ("on", "off"),
    "irqchip": ("full", "split"),
    "hv-timer": ("on", "off"),
}
"""What of a trace's host may be said better than the trace does: option -> choices."""


def add(command: Callable[..., argparse.ArgumentParser], kernel: Callable[[str], str], kernels: Any) -> None:
    """The command and its options; ``kernel`` and ``kernels`` are the types of a generation and of a list of them."""
    sub = command("report", report, "What traces tell: exits, interrupts, latencies, and what other kernels would do.")
    sub.add_argument(
        "traces",
        metavar="TRACE",
        nargs="+",
        help="ftrace, trace-cmd, perf: text, trace.dat or perf.data; .gz .xz .zst .bz2; a folder; - for standard input",
    )
    sub.add_argument("--against", metavar="TRACE", nargs="+", help="compare: TRACE is before, these are after")
    sub.add_argument(
        "--fail-if",
        metavar="COND",
        action="append",
        default=[],
        help='exit code 1 where it holds: "exits.HLT.per second > +10%%", "findings > 0"; may be given again',
    )
    asked = sub.add_mutually_exclusive_group()
    asked.add_argument("--kernels", type=kernels, metavar="A,B", help="whose fast paths are asked (default: all)")
    asked.add_argument("--no-kernels", action="store_true", help="what the trace itself tells, and nothing else")
    sub.add_argument("--costs", metavar="NAME|FILE", help="cycles saved: a cost profile or a TOML file")
    for name, choices in CLUES.items():
        sub.add_argument(f"--{name}", choices=choices, help="of the host, if the trace is wrong or silent")
    sub.add_argument("--kernel", type=kernel, help="the kernel that recorded, if the trace is wrong or silent")
    sub.add_argument("--csv", metavar="DIR", help="write every table as DIR/TABLE.csv")
    sub.add_argument("--parquet", metavar="DIR", help="write every table as DIR/TABLE.parquet (pyarrow)")
    sub.add_argument("--html", metavar="FILE", help="write one page with charts, for any browser")
    sub.add_argument("--perfetto", metavar="FILE", help="write vCPUs, exits and IPIs for ui.perfetto.dev; one TRACE")
    sub.add_argument("--jobs", type=_jobs, metavar="N", help="processes for many traces (default: one a CPU)")
    sub.add_argument("--dask", metavar="ADDRESS", help="read the traces on this Dask scheduler's workers")
    sub.add_argument("--all", action="store_true", help="every row of every table")
    sub.add_argument("--quiet", action="store_true", help="no progress bar")


def _jobs(text: str) -> int:
    if not (text.isdecimal() and 0 < int(text[:9]) <= 4096 and len(text) < 9):
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is no number of processes from 1 to 4096")
    return int(text)


def report(args: argparse.Namespace) -> int:
    """``fastexit report``; 1 when a condition of --fail-if holds or a trace was refused, 2 when all were."""
    from fastexit.answers.ask import Ask
    from fastexit.answers.difference import Condition, difference

    conditions = [Condition(text) for text in args.fail_if]
    if args.perfetto and (len(args.traces) > 1 or os.path.isdir(args.traces[0])):
        raise UsageError("--perfetto draws one trace: pass one")
    if args.against and (args.html or args.csv or args.parquet or args.perfetto):
        raise UsageError("--against prints tables or --json: leave out --html, --csv, --parquet and --perfetto")
    told = {name.replace("-", "_"): getattr(args, name.replace("-", "_")) for name in CLUES}
    told |= {"generation": args.kernel}
    kernels = () if args.no_kernels else None if args.kernels is None else tuple(args.kernels)
    ask = Ask(kernels, costs_option(args.costs), {name: value for name, value in told.items() if value})
    quiet = args.quiet or args.json
    found = _read(args.traces, ask, args, quiet)
    if args.against:
        other = _read(args.against, ask, args, quiet)
        compared = difference(found, other)
        met = [change for condition in conditions for change in condition.met(compared)]
        if args.json:
            print_json(compared.as_dict() | {"met": [change.name for change in met]})
        else:
            _printed(compared, args)
        return _ended([found, other], met)
    compared = difference(found, found)
    met = [change for condition in conditions for change in condition.met(compared)]
    files = _files(found, args)
    if args.json:
        print_json(found.as_dict() | {"written": files, "met": [change.name for change in met]})
    else:
        _printed(found, args)
        _written(files)
    return _ended([found], met)


def _read(paths: list[str], ask: Any, args: argparse.Namespace, quiet: bool) -> Any:
    from fastexit.answers import many
    from fastexit.answers.ask import Answering

    one = Answering(ask)
    single = len(paths) == 1 and not os.path.isdir(paths[0]) and args.dask is None
    with _bar(quiet) as bar:
        if single:
            size = os.path.getsize(paths[0]) if os.path.isfile(paths[0]) else None
            found = one(paths[0], bar(f"reading {os.path.basename(paths[0])}", size))
        else:
            tell = bar("reading traces", None)
            found = many.run(paths, one, args.jobs, args.dask, lambda p: tell(p.done, p.total, _longest(p.running)))
    return found


def _longest(running: list[tuple[str, float]]) -> str:
    """What the bar says of the traces that are being read: which one keeps it waiting."""
    path, seconds = running[0] if running else ("", 0.0)
    return f"reading traces, {os.path.basename(path)} for {seconds:,.0f} s" if seconds > PATIENCE else "reading traces"


@contextlib.contextmanager
def _bar(quiet: bool) -> Iterator[Callable[[str, int | None], Callable[..., object]]]:
    """Progress on stderr, where that is a terminal: ``tell(n)`` is n more, ``tell(done, total, what)`` how far."""
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

    from fastexit.cli.show import console

    out = console(to_stderr=True)
    if quiet or not out.is_terminal:
        yield lambda _what, _total: lambda *_: None
        return
    columns = TextColumn("{task.description}", markup=False), BarColumn(), TaskProgressColumn(), TimeElapsedColumn()
    with Progress(*columns, console=out, transient=True) as bar:

        def begin(what: str, total: int | None) -> Callable[..., object]:
            from fastexit.answers.words import clean

            task = bar.add_task(clean(what), total=total)

            def tell(n: int, of: int | None = None, what: str = what) -> None:
                if of is None:
                    bar.advance(task, n)
                else:
                    bar.update(task, completed=n, total=of, description=clean(what))

            return tell

        yield begin


def _printed(found: Any, args: argparse.Namespace) -> None:
    from fastexit.answers.difference import Difference
    from fastexit.cli.show import console
    from fastexit.pages import difference, text

    limit = None if args.all else text.LIMIT
    if isinstance(found, Difference):
        difference.render(found, console(), limit)
    else:
        text.render(found, console(), limit)


def _files(found: Any, args: argparse.Namespace) -> list[str]:
    """What was written, by path; UsageError where it cannot be."""
    written: list[str] = []
    try:
        if args.csv:
            from fastexit.pages import csv

            written += map(str, csv.write(found, args.csv))
        if args.parquet:
            from fastexit.pages import parquet

            written += map(str, parquet.write(found, args.parquet))
        if args.html:
            from fastexit.pages import html

            Path(args.html).write_text(html.page(found), encoding="utf-8")
            written.append(args.html)
        if args.perfetto:
            written.append(_perfetto(args.traces[0], args.perfetto))
    except OSError as error:
        raise UsageError(f"cannot write {error.filename!r}: {error.strerror}") from None
    except ImportError as error:
        raise UsageError(" ".join(str(error).split())) from None
    return written


def _written(files: list[str]) -> None:
    """A line a file, or a folder of them."""
    from fastexit.answers.words import clean

    for folder, paths in groupby(files, os.path.dirname):
        here = list(paths)
        if len(here) > FEW:
            print(f"written: {clean(folder or '.')}, {len(here)} files")
        else:
            print(*(f"written: {clean(path)}" for path in here), sep="\n")


def _perfetto(trace: str, path: str) -> str:
    from fastexit.answers.identity import identify
    from fastexit.pages import perfetto
    from fastexit.records.read import read

    if trace == "-":
        raise UsageError("--perfetto reads the trace again: pass a file, not standard input")
    recording = read(trace)
    perfetto.write(recording, identify(recording, {}).where, path)
    return path


def _ended(reports: list[Any], met: list[Any]) -> int:
    """The exit code; conditions that hold and refused files are said on stderr."""
    files = [file for found in reports for file in found.files]
    refused = [file for file in files if file.refused]
    for change in met:
        value = "-" if change.after is None else f"{change.after:,.6g}"
        more = "" if change.change is None or change.before == change.after else f" ({100 * change.change:+.1f} %)"
        complain(f"--fail-if: {change.name} is {value}{more}")
    for file in refused:
        complain(file.refused)
    sys.stderr.flush()
    if refused and len(refused) == len(files):
        return 2
    return 1 if met or refused else 0
