"""The commands of ``fastexit``: each takes parsed arguments and returns the exit code."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
import tempfile
import time
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, TextIO

from fastexit import __version__
from fastexit.checks import quoted
from fastexit.profile import NEWEST, PROFILES

SHORTHANDS = ("none", "self", "all", "all-but-self")
"""Names of the ICR's destination shorthands, by number."""

MISMATCHES = 50
"""Mismatches that are shown when nothing else is asked for."""


class UsageError(Exception):
    """Wrong arguments or input: one line for stderr, exit code 2."""


def complain(text: str) -> None:
    """One line on stderr, where there is one; nobody reads one whose terminal is gone."""
    if sys.stderr is not None:
        try:
            print(f"fastexit: {text}", file=sys.stderr, flush=True)
        except OSError:
            abandon(sys.stderr)


def abandon(stream: TextIO) -> None:
    """Points a standard stream elsewhere: what it holds cannot be written, and its flush at exit would say so again."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, stream.fileno())
    os.close(null)


def _compile() -> None:
    """Load the kernels; when that takes more than a second, say so on stderr, with a bar on a terminal."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    import fastexit
    from fastexit.cli.show import console
    from fastexit.jit import declare

    began = time.monotonic()
    out = console(to_stderr=True)
    bar = Progress(
        TextColumn("compiling kernels, once"), BarColumn(), MofNCompleteColumn(), console=out, transient=True
    )
    task = None

    def progress(_name: str, done: int, total: int) -> None:
        nonlocal task
        if task is None and time.monotonic() - began > 1:
            task = bar.add_task("", total=total)
            if out.is_terminal:
                bar.start()
            else:
                out.print("fastexit: compiling kernels, once", soft_wrap=True)
        if task is not None:
            bar.update(task, completed=done, total=total)

    try:
        fastexit.warmup(progress)
    finally:
        if task is not None and out.is_terminal:
            bar.stop()
    kept = declare.cache_directory()
    if task is not None and kept is not None and (why := _unusable(kept)):
        complain(f"kernels cannot be kept in {str(kept)!r}: {why}: every process compiles them (FASTEXIT_CACHE_DIR)")


def print_json(value: Any) -> None:
    """JSON on standard output."""
    json.dump(value, sys.stdout, indent=2)
    print()


def _icr_value(args: argparse.Namespace) -> int:
    """The value that is written: --value, or the ICR that the other options describe. No option may be void."""
    from fastexit.regs import MSR_X2APIC_ICR, DeliveryMode, icr

    described = [name for name in ("dest", "vector", "mode", "logical", "shorthand") if getattr(args, name) is not None]
    if args.value is not None:
        if described:
            raise UsageError(f"--value is the whole value, so --{described[0]} says nothing: leave one of them out")
        return int(args.value)
    if described and args.msr != MSR_X2APIC_ICR:
        raise UsageError(f"--{described[0]} describes the ICR, not MSR {args.msr:#x}: say with --value what to write")
    shorthand = 0 if args.shorthand is None else SHORTHANDS.index(args.shorthand)
    if shorthand and args.dest is not None:
        raise UsageError(f"--shorthand {args.shorthand} has no destination: leave out --dest")
    modes = {mode.name.lower(): mode for mode in DeliveryMode}
    mode = DeliveryMode.Fixed if args.mode is None else modes.get(args.mode.lower())
    if mode is None:
        raise UsageError(f"unknown delivery mode {quoted(args.mode)}: one of {' '.join(m.name for m in DeliveryMode)}")
    dest = 0 if shorthand else 1 if args.dest is None else args.dest
    vector = 0xFD if args.vector is None else args.vector
    return icr(dest, vector, delivery=mode, logical=bool(args.logical), shorthand=shorthand)


def costs_option(name: str | None) -> Any:
    """A cost profile by name, or from a file: whatever looks like one."""
    from fastexit.costs.profile import CostProfile, cost_profile, cost_profiles

    if name is None:
        return None
    if name.endswith(".toml") or os.sep in name or (name not in cost_profiles() and os.path.isfile(name)):
        return CostProfile.load(name)
    return cost_profile(name)


def walk(args: argparse.Namespace) -> int:
    """``fastexit walk``."""
    from fastexit.insight.walk import walk

    value = _icr_value(args)
    cases = [(kernel, True) for kernel in args.kernels]
    if args.generic:
        cases += [(kernel, False) for kernel in args.kernels]
    options = {
        "vendor": args.vendor,
        "apicv": not args.no_apicv,
        "vcpus": args.vcpus,
        "costs": costs_option(args.costs),
    }
    _compile()
    walks = [walk(args.msr, value, kernel=kernel, fastpath=fast, **options) for kernel, fast in cases]
    if args.json:
        print_json({"msr": args.msr, "value": value, "vendor": args.vendor, "walks": [w.as_dict() for w in walks]})
        return 0
    from fastexit.cli.show import console, walk_table

    apicv = "without APICv" if args.no_apicv else "APICv on"
    out = console()
    width = max(24, (out.width - 44) // len(walks) - 2)
    out.print(
        walk_table(walks, f"WRMSR {args.msr:#x} = {value:#x} on vCPU 0 of {args.vcpus}, {args.vendor}, {apicv}", width)
    )
    return 0


def _replay_file(path: str, quiet: bool, **options: Any) -> Any:
    """A report, with a progress bar over the bytes of the file as they lie on disk."""
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    from fastexit.cli.show import console
    from fastexit.trace.replay import replay

    out = console(to_stderr=True)
    if quiet or not out.is_terminal:
        return replay(path, **options)
    columns = TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn()
    with Progress(*columns, console=out, transient=True) as bar:
        task = bar.add_task(f"replaying {os.path.basename(path)}", total=None)
        return replay(path, progress=lambda done, total: bar.update(task, completed=done, total=total), **options)


NO_MATPLOTLIB = "pictures need matplotlib: pip install matplotlib"


def _can_draw() -> bool:
    """Whether matplotlib is here; asked before the work, since an answer after it comes too late."""
    try:
        import fastexit.trace.heatmap  # noqa: F401
    except ImportError:
        return False
    return True


def _no_files_in(directory: str | Path) -> str:
    """Why no file can be put there, or nothing: only a file shows that, permissions do not."""
    try:
        with tempfile.TemporaryFile(dir=directory):
            return ""
    except OSError as error:
        return error.strerror or str(error)


def _check_writable(directory: str | Path, option: str) -> None:
    """A directory that pictures go to."""
    if why := _no_files_in(directory):
        raise UsageError(f"{option}: cannot write to {str(directory)!r}: {why}")


def _check_file(path: Path, option: str) -> None:
    """A file that will be written: what can be known about it before there is something to write."""
    if path.is_dir() or (path.exists() and not os.access(path, os.W_OK)):
        raise UsageError(f"{option}: cannot write to {str(path)!r}")
    _check_writable(path.parent, option)


def _written(path: Path, text: str) -> bool:
    """Writes a file after work that must not be lost: whether that went well, else stderr says why not."""
    try:
        path.write_text(text)
    except OSError as error:
        complain(f"cannot write to {str(path)!r}: {error.strerror}")
        return False
    return True


def _check_picture(base: str) -> None:
    """Everything that can be known about --picture before there is one."""
    if not Path(base).name:
        raise UsageError(f"--picture needs the name of a file, not {quoted(base)}")
    if not _can_draw():
        raise UsageError(f"--picture: {NO_MATPLOTLIB}")
    _check_writable(Path(base).parent, "--picture")


def _pictures(report: Any, base: str) -> list[str]:
    from fastexit.trace.heatmap import save

    return [str(path) for path in save(report, base)]


def _replayed(report: Any) -> int:
    """The exit code of a report; the tables show mismatches, and damage of the file is said once more behind them."""
    if report.problems:
        more = len(report.problems) - 1
        complain(f"{report.problems[0]}{f' (and {more} more)' if more else ''}")
    return 0 if report.exact else 1


def replay(args: argparse.Namespace) -> int:
    """``fastexit replay``; 1 when the file is damaged or a line was not predicted."""
    if args.picture is not None:
        _check_picture(args.picture)
    if args.hv_timer == "yes" and args.vendor == "svm":
        raise UsageError("--hv-timer yes and --vendor svm: SVM has no preemption timer, leave one of them out")
    _compile()
    options = {
        "kernel": args.kernel,
        "vendor": args.vendor,
        "apicv": args.apicv,
        "hv_timer": {"yes": True, "no": False, "trace": None}[args.hv_timer],
        "mismatches": args.mismatches,
        "kernels": args.kernels,
    }
    report = _replay_file(args.trace, args.quiet or args.json, **options)
    if args.json:
        print_json(report.as_dict() | {"pictures": _pictures(report, args.picture) if args.picture else []})
        return _replayed(report)
    from fastexit.cli.show import console
    from fastexit.trace.render import render

    out = console()
    render(report, out)
    for path in _pictures(report, args.picture) if args.picture else ():
        out.print(f"picture: {path}", markup=False, soft_wrap=True)
    return _replayed(report)


def demo(args: argparse.Namespace) -> int:
    """``fastexit demo``."""
    from fastexit.cli.show import comparison_table, console, profile_table, walk_table
    from fastexit.insight.compare import DOORS, compare, compare_until_ipi
    from fastexit.insight.walk import walk
    from fastexit.regs import icr
    from fastexit.trace import BUNDLED

    trace = str(BUNDLED) if args.trace is None else args.trace
    if not args.output:
        raise UsageError("--output needs the name of a directory, not ''")
    drawing = _can_draw()
    if drawing:
        try:
            os.makedirs(args.output, exist_ok=True)
        except OSError as error:
            raise UsageError(f"--output: cannot create {args.output!r}: {error.strerror}") from None
        _check_writable(args.output, "--output")
    _compile()
    report = _replay_file(trace, args.json, mismatches=MISMATCHES)
    walks = [walk(0x830, icr(dest=1, vector=0xFD), kernel=kernel) for kernel in ("seed-v3", NEWEST)]
    kernels = ("seed-v3", "5.8", NEWEST)
    rows = [compare(kernel, door) for kernel in kernels for door in DOORS]
    rows += [compare_until_ipi(kernel) for kernel in kernels]
    pictures, no_pictures = [], "" if drawing else NO_MATPLOTLIB
    if drawing:
        try:
            pictures = _pictures(report, os.path.join(args.output, "ipi-heatmap"))
        except ValueError as nothing:  # a trace without IPIs has no picture, but everything else
            no_pictures = str(nothing)
    if args.json:
        if no_pictures:
            complain(no_pictures)
        print_json(
            {
                "replay": report.as_dict(),
                "walks": [w.as_dict() for w in walks],
                "comparison": [row._asdict() for row in rows],
                "pictures": pictures,
            }
        )
        return _replayed(report)
    from fastexit.trace.render import render

    out = console()
    out.rule("1. A real trace, replayed")
    render(report, out)
    out.rule("2. The generations")
    out.print(profile_table())
    out.rule("3. One exit, step by step: vCPU 0 sends RESCHEDULE to vCPU 1")
    out.print(walk_table(walks, "WRMSR 0x830 = 0x1000000fd, VMX, APICv on", max(24, (out.width - 44) // 2 - 2)))
    out.rule("4. Fast against generic on this machine")
    out.print(comparison_table(rows))
    out.rule("5. Who interrupts whom")
    for line in [f"picture: {path}" for path in pictures] or [no_pictures]:
        out.print(line, markup=False, soft_wrap=True)
    return _replayed(report)


def _verified(args: argparse.Namespace, lab: Any) -> Any:
    """A report, with a progress bar over operations or seconds."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    from fastexit.cli.show import console
    from fastexit.kvm.comparison import verify

    options: dict[str, Any] = {
        "other": lab,
        "seconds": args.seconds,
        "seed": args.seed,
        "ids": args.vcpus,
        "only": args.only,
        "traced": args.trace,
    }
    if args.against is not None:
        options |= {"kernel": args.kernel, "well_formed": args.well_formed, "ignored": args.ignore}
    operations = args.ops if args.ops is not None else 1 << 62 if args.seconds is not None else 100_000
    out = console(to_stderr=True)
    if args.quiet or not out.is_terminal:
        return verify(operations, **options)
    who = "/dev/kvm" if lab is None else getattr(lab, "name", None) or f"kernel {lab.kernel.version}"
    text = TextColumn(f"comparing with {who}, {{task.fields[done]:,}} operations")
    with Progress(text, BarColumn(), TimeRemainingColumn(), console=out, transient=True) as bar:
        began, by_time = time.monotonic(), args.ops is None and args.seconds is not None
        task = bar.add_task("", total=args.seconds if by_time else operations, done=0)

        def progress(done: int, _wanted: int) -> None:
            bar.update(task, completed=time.monotonic() - began if by_time else done, done=done)

        return verify(operations, progress=progress, **options)


def _judged(args: argparse.Namespace) -> AbstractContextManager[Any]:
    """The lab or the program that is asked for, or None for /dev/kvm, which is there then."""
    if args.against is not None:
        return _program(args)
    if args.args or args.well_formed or args.ignore:
        what = args.args[0] if args.args else "--well-formed" if args.well_formed else "--ignore"
        raise UsageError(f"{what} is for an own APIC: name it with --against")
    from fastexit.kvm.own import GROUPS, OwnTwins

    if args.only in (OwnTwins.kind, *GROUPS):
        raise UsageError(f"--only {args.only}: it is compared with own APICs alone: --against")
    if args.kernel is not None or args.image is not None or args.modules is not None:
        from fastexit.kvm.lab.lab import Lab

        exact = args.only in ("timers", "hyperv")
        return Lab(args.kernel, vendor=args.vendor, image=args.image, modules=args.modules, exact=exact)
    from fastexit.kvm.host import running
    from fastexit.kvm.tracefs import KernelTrace

    running()
    if args.trace:
        KernelTrace().close()
    return nullcontext()


def _program(args: argparse.Namespace) -> AbstractContextManager[Any]:
    """Somebody's own APIC as a program; it runs from here on."""
    from fastexit.kvm.own import GROUPS, OwnTwins
    from fastexit.kvm.spoken import ApicProgram

    for name in ("image", "modules", "trace", "no_apicv", "keep"):
        if getattr(args, name):
            raise UsageError(f"--{name.replace('_', '-')} is for real kernels, and --against is none: leave one out")
    if args.only is not None and args.only not in (OwnTwins.kind, *GROUPS):
        raise UsageError(f"--only {args.only} is not compared with an own APIC: one of {', '.join(GROUPS)}")
    command = [args.against] if os.path.exists(args.against) else shlex.split(args.against)
    program = ApicProgram([*command, *args.args])
    program.start()
    return program


def verify(args: argparse.Namespace) -> int:
    """``fastexit verify``; 1 when the model and the kernel differ."""
    from fastexit.kvm.tracefs import TraceLost

    if args.against is None and args.vendor == "vmx" and (args.kernel is not None or args.image is not None):
        from fastexit.cli import vmx

        return vmx.verify(args)
    if args.script is not None:
        _check_file(Path(args.script), "--script")
    with _judged(args) as lab:
        _compile()
        try:
            report = _verified(args, lab)
        except TraceLost as lost:
            raise UsageError(f"--trace: {lost}") from None
    found = report.divergence
    written = args.script is not None and found is not None and _written(Path(args.script), found.script())
    if args.json:
        print_json(report.as_dict())
        return 0 if report.agreed else 1
    from fastexit.cli.show import console
    from fastexit.kvm.render import render

    render(report, console())
    if written:
        print(f"script: {args.script}")
    elif found is not None:
        print(f"\n{found.script()}")
    if found is not None:
        for request, answer in found.transcript:
            print(f"> {request}\n< {answer}")
    return 0 if report.agreed else 1


def embed_build(args: argparse.Namespace) -> int:
    """``fastexit embed build``."""
    from fastexit.embed import build

    directory = build.DEFAULT if args.output is None else args.output
    if not directory:
        raise UsageError("--output needs the name of a directory, not ''")
    try:
        os.makedirs(directory, exist_ok=True)
    except OSError as error:
        raise UsageError(f"--output: cannot create {directory!r}: {error.strerror}") from None
    _check_writable(directory, "--output")
    _compile()
    files = build.build(directory, args.cc, args.flags)
    build.remember(directory)
    if args.json:
        print_json(
            {"files": [str(path) for path in files], "cflags": build.cflags(directory), "libs": build.libs(directory)}
        )
        return 0
    for path in files:
        print(path)
    return 0


def _embed_options(args: argparse.Namespace, name: str) -> int:
    from fastexit.embed import build

    directory = build.remembered() if args.output is None else args.output
    options = getattr(build, name)(directory)
    if args.json:
        print_json({name: options})
    else:
        print(options)
    return 0


def embed_cflags(args: argparse.Namespace) -> int:
    """``fastexit embed cflags``."""
    return _embed_options(args, "cflags")


def embed_libs(args: argparse.Namespace) -> int:
    """``fastexit embed libs``."""
    return _embed_options(args, "libs")


def _kvm_fact() -> str:
    """What /dev/kvm is, or why it is of no use."""
    from fastexit.kvm.host import running

    try:
        host = running()
    except OSError as error:
        return " ".join(str(error).split())
    return f"usable: {host.module or 'KVM'} of {host.release}, modelled as {host.kernel}"


def _cache_fact(directory: Path | None) -> str:
    """Where compiled kernels are kept, and whether they really can be: a failure there is silent elsewhere."""
    if directory is None:
        return "off"
    return f"{directory} (not writable)" if _unusable(directory) else str(directory)


def _unusable(directory: Path) -> str:
    """Why kernels cannot be kept in a directory, which need not be there yet, or nothing."""
    return _no_files_in(next(path for path in (directory, *directory.parents) if path.exists()))


def info(args: argparse.Namespace) -> int:
    """``fastexit info``."""
    from importlib.metadata import version

    from fastexit import layout
    from fastexit.jit import declare

    facts: dict[str, object] = {
        "fastexit": __version__,
        "Python": sys.version.split()[0],
        **{name: version(name) for name in ("numba", "llvmlite", "numpy")},
        "kernels": "compiled" if declare.JIT else "interpreted (NUMBA_DISABLE_JIT)",
        "kernel cache": _cache_fact(declare.cache_directory()),
        "ABI version": layout.ABI_VERSION,
        "bytes per vCPU": layout.VCPU_BYTES,
        "vCPUs at most": layout.MAX_VCPUS,
        "/dev/kvm": _kvm_fact(),
    }
    if args.json:
        rows = {p.name: {"tree": p.tree, "summary": p.summary} for p in PROFILES.values()}
        print_json({**{k: str(v) for k, v in facts.items()}, "profiles": rows})
        return 0
    from fastexit.cli.show import console, facts_table, profile_table

    out = console()
    out.print(facts_table(facts))
    out.print(profile_table())
    return 0
