"""The command line: ``fastexit walk | replay | demo | info``, each with --json.

Exit code 0: done; 1: replay found damage, or lines that the model did not predict; 2: wrong arguments, unusable input
or nowhere to write to, said in one line on stderr.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from fastexit import __version__
from fastexit.profile import PROFILES, profiles

_EPILOG = """examples:
  fastexit walk                                  one RESCHEDULE IPI, seed-v3 beside 6.18
  fastexit walk --shorthand all-but-self --kernels 5.7,6.18
  fastexit replay guest.trace.xz                 who could take the fast path, and is the model right?
  fastexit demo --output out                     everything, on a real trace

Trace a guest: trace-cmd record -e kvm:kvm_msr -e kvm:kvm_apic -e kvm:kvm_apic_ipi -e kvm:kvm_apic_accept_irq \\
               -e kvm:kvm_eoi -e kvm:kvm_entry -e kvm:kvm_exit -e kvm:kvm_mmio, then trace-cmd report > guest.trace
"""


class UsageError(Exception):
    """Wrong arguments or input: one line for stderr, exit code 2."""


_SHOWN = 40


def _short(text: str) -> str:
    """A word of the user's as an error quotes it: one line, and not a screenful."""
    return repr(text if len(text) <= _SHOWN else f"{text[:_SHOWN]}...")


def _number(text: str) -> int:
    try:
        value = int(text, 0)
    except ValueError:
        digits = text.strip().lstrip("+-")
        # Python converts no more than some thousand decimal digits.
        if not (digits.isdecimal() and len(digits) > _SHOWN):
            raise argparse.ArgumentTypeError(f"{_short(text)} is not a number (decimal or 0x hex)") from None
        value = 1 << 64
    if value.bit_length() > 64:
        raise argparse.ArgumentTypeError(f"{_short(text)} does not fit 64 bits")
    return value


def _kernels(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    for name in names:
        if name not in PROFILES:
            raise argparse.ArgumentTypeError(f"unknown kernel {_short(name)}: one of {', '.join(profiles())}")
    if not names:
        raise argparse.ArgumentTypeError("no kernel given")
    return names


def _parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog="fastexit",
        description="KVM's interrupt exits: what happens when a vCPU exits on WRMSR, in seven kernel generations.",
        epilog=_EPILOG,
        formatter_class=raw,
    )
    parser.add_argument("--version", action="version", version=f"fastexit {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, run: Callable[[argparse.Namespace], int], text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text, formatter_class=raw)
        sub.add_argument("--json", action="store_true", help="print JSON instead of tables")
        sub.set_defaults(run=run)
        return sub

    def machine_options(sub: argparse.ArgumentParser) -> None:
        sub.add_argument("--vendor", choices=("vmx", "svm"), default="vmx", help="default: vmx")
        sub.add_argument("--no-apicv", action="store_true", help="without posted interrupts or AVIC")

    walk = command("walk", _walk, "One WRMSR exit of vCPU 0, step by step through vcpu_enter_guest.")
    walk.add_argument(
        "--kernels", type=_kernels, default=["seed-v3", "6.18"], metavar="A,B", help="default: seed-v3,6.18"
    )
    walk.add_argument("--generic", action="store_true", help="also with the fast path switched off")
    walk.add_argument("--vcpus", type=_number, default=4, help="default: 4")
    walk.add_argument("--msr", type=_number, default=0x830, help="default: 0x830, the x2APIC ICR")
    walk.add_argument("--value", type=_number, help="EDX:EAX; or describe the ICR:")
    walk.add_argument("--dest", type=_number, default=1, help="destination (default: 1)")
    walk.add_argument("--vector", type=_number, default=0xFD, help="vector (default: 0xfd, RESCHEDULE)")
    walk.add_argument("--mode", default="Fixed", help="Fixed LowPrio SMI Res3 NMI INIT SIPI ExtINT")
    walk.add_argument("--logical", action="store_true", help="logical destination mode")
    walk.add_argument("--shorthand", default="none", choices=("none", "self", "all", "all-but-self"))
    machine_options(walk)

    replay = command("replay", _replay, "Feed a KVM trace to the model: ICR classes, fast shares, predictions.")
    replay.add_argument(
        "trace", metavar="TRACE", help="ftrace, trace-cmd report or perf script text; plain, .gz or .xz"
    )
    replay.add_argument("--picture", metavar="BASE", help="write BASE.png and BASE.svg: sender x target heat map")
    replay.add_argument("--quiet", action="store_true", help="no progress bar")
    replay.add_argument("--kernel", choices=profiles(), default="6.18", help="the kernel that recorded (default: 6.18)")
    replay.add_argument("--vendor", choices=("vmx", "svm"), default="vmx", help="default: vmx")
    replay.add_argument("--apicv", action="store_true", help="recorded with posted interrupts or AVIC")

    demo = command("demo", _demo, "Replay the bundled trace, walk one exit, compare fast with generic, draw.")
    demo.add_argument("--trace", metavar="TRACE", help="another trace than the bundled one")
    demo.add_argument(
        "--output", default="fastexit-demo", metavar="DIR", help="where pictures go (default: fastexit-demo)"
    )

    command("info", _info, "Versions, kernel generations, memory layout, cache, /dev/kvm.")
    return parser


def _compile() -> None:
    """Load the kernels; when that takes more than a second, say so on stderr, with a bar on a terminal."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    import fastexit
    from fastexit.show import console

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


def _print_json(value: Any) -> None:
    json.dump(value, sys.stdout, indent=2)
    print()


def _icr_value(args: argparse.Namespace) -> int:
    from fastexit.regs import DeliveryMode, icr

    if args.value is not None:
        return args.value
    modes = {mode.name.lower(): mode for mode in DeliveryMode}
    if args.mode.lower() not in modes:
        raise UsageError(f"unknown delivery mode {_short(args.mode)}: one of {' '.join(m.name for m in DeliveryMode)}")
    shorthand = ("none", "self", "all", "all-but-self").index(args.shorthand)
    dest = args.dest if shorthand == 0 else 0
    return icr(dest, args.vector, delivery=modes[args.mode.lower()], logical=args.logical, shorthand=shorthand)


def _walk(args: argparse.Namespace) -> int:
    from fastexit.walk import walk

    value = _icr_value(args)
    cases = [(kernel, True) for kernel in args.kernels]
    if args.generic:
        cases += [(kernel, False) for kernel in args.kernels]
    options = {"vendor": args.vendor, "apicv": not args.no_apicv, "vcpus": args.vcpus}
    _compile()
    walks = [walk(args.msr, value, kernel=kernel, fastpath=fast, **options) for kernel, fast in cases]
    if args.json:
        _print_json({"msr": args.msr, "value": value, "vendor": args.vendor, "walks": [w.as_dict() for w in walks]})
        return 0
    from fastexit.show import console, walk_table

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

    from fastexit.show import console
    from fastexit.trace.replay import replay

    out = console(to_stderr=True)
    if quiet or not out.is_terminal:
        return replay(path, **options)
    columns = TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn()
    with Progress(*columns, console=out, transient=True) as bar:
        task = bar.add_task(f"replaying {os.path.basename(path)}", total=None)
        return replay(path, progress=lambda done, total: bar.update(task, completed=done, total=total), **options)


NO_MATPLOTLIB = "pictures need matplotlib: pip install 'fastexit[plot]'"


def _can_draw() -> bool:
    """Whether matplotlib is here; asked before the work, since an answer after it comes too late."""
    try:
        import fastexit.trace.heatmap  # noqa: F401
    except ImportError:
        return False
    return True


def _check_writable(directory: str | Path, option: str) -> None:
    """A directory that pictures go to: nothing less than a file in it shows that it is usable."""
    try:
        with tempfile.TemporaryFile(dir=directory):
            pass
    except OSError as error:
        raise UsageError(f"{option}: cannot write to {str(directory)!r}: {error.strerror}") from None


def _check_picture(base: str) -> None:
    """Everything that can be known about --picture before there is one."""
    if not Path(base).name:
        raise UsageError(f"--picture needs the name of a file, not {_short(base)}")
    if not _can_draw():
        raise UsageError(f"--picture: {NO_MATPLOTLIB}")
    _check_writable(Path(base).parent, "--picture")


def _pictures(report: Any, base: str) -> list[str]:
    from fastexit.trace.heatmap import save

    return [str(path) for path in save(report, base)]


def _replay(args: argparse.Namespace) -> int:
    if args.picture is not None:
        _check_picture(args.picture)
    _compile()
    options = {"kernel": args.kernel, "vendor": args.vendor, "apicv": args.apicv}
    report = _replay_file(args.trace, args.quiet or args.json, **options)
    if args.json:
        _print_json(report.as_dict() | {"pictures": _pictures(report, args.picture) if args.picture else []})
        return 0 if report.exact else 1
    from fastexit.show import console
    from fastexit.trace.render import render

    out = console()
    render(report, out)
    for path in _pictures(report, args.picture) if args.picture else ():
        out.print(f"picture: {path}", markup=False, soft_wrap=True)
    return 0 if report.exact else 1


def _bundled_trace() -> str:
    name = "linux-6.1-4vcpu-x2apic.trace.xz"
    for root in (Path.cwd(), *Path(__file__).resolve().parents):
        if (root / "examples" / "traces" / name).is_file():
            return str(root / "examples" / "traces" / name)
    raise UsageError(f"{name} is not here: run from a checkout of the project, or name a trace with --trace")


def _demo(args: argparse.Namespace) -> int:
    from fastexit.compare import DOORS, compare, compare_until_ipi
    from fastexit.regs import icr
    from fastexit.show import comparison_table, console, profile_table, walk_table
    from fastexit.walk import walk

    trace = _bundled_trace() if args.trace is None else args.trace
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
    report = _replay_file(trace, args.json, vendor="vmx", apicv=False)
    walks = [walk(0x830, icr(dest=1, vector=0xFD), kernel=kernel) for kernel in ("seed-v3", "6.18")]
    kernels = ("seed-v3", "5.8", "6.18")
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
            _complain(no_pictures)
        _print_json(
            {
                "replay": report.as_dict(),
                "walks": [w.as_dict() for w in walks],
                "comparison": [row._asdict() for row in rows],
                "pictures": pictures,
            }
        )
        return 0 if report.exact else 1
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
    return 0 if report.exact else 1


def _cache_fact(directory: Path | None) -> str:
    """Where compiled kernels are kept, and whether they really can be: a failure there is silent elsewhere."""
    if directory is None:
        return "off"
    there = next(path for path in (directory, *directory.parents) if path.exists())
    usable = there.is_dir() and os.access(there, os.W_OK | os.X_OK)
    return str(directory) if usable else f"{directory} (not writable)"


def _info(args: argparse.Namespace) -> int:
    import llvmlite
    import numba
    import numpy

    from fastexit import layout
    from fastexit.kernels import _jit

    kvm = "usable" if os.access("/dev/kvm", os.R_OK | os.W_OK) else "present, not accessible"
    facts: dict[str, object] = {
        "fastexit": __version__,
        "Python": sys.version.split()[0],
        "numba": numba.__version__,
        "llvmlite": llvmlite.__version__,
        "numpy": numpy.__version__,
        "kernels": "compiled" if _jit.JIT else "interpreted (NUMBA_DISABLE_JIT)",
        "kernel cache": _cache_fact(_jit.cache_directory()),
        "ABI version": layout.ABI_VERSION,
        "bytes per vCPU": layout.VCPU_BYTES,
        "vCPUs at most": layout.MAX_VCPUS,
        "/dev/kvm": kvm if os.path.exists("/dev/kvm") else "absent",
    }
    if args.json:
        rows = {p.name: {"tree": p.tree, "summary": p.summary} for p in PROFILES.values()}
        _print_json({**{k: str(v) for k, v in facts.items()}, "profiles": rows})
        return 0
    from fastexit.show import console, facts_table, profile_table

    out = console()
    out.print(facts_table(facts))
    out.print(profile_table())
    return 0


def _complain(text: str) -> None:
    """One line on stderr, where there is one."""
    if sys.stderr is not None:
        print(f"fastexit: {text}", file=sys.stderr)


def _abandon_stdout() -> None:
    """Point stdout elsewhere: what it still holds cannot be written, and its flush at exit would say so again."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, sys.stdout.fileno())
    os.close(null)


def _run(argv: Sequence[str] | None) -> int:
    try:
        args = _parser().parse_args(argv)
        return args.run(args)
    finally:
        # Here, where a closed pipe or a full disk can still be dealt with, and not at exit; --help comes by as well.
        sys.stdout.flush()


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; the exit code."""
    if sys.stdout is None:
        _complain("standard output is closed")
        return 2
    try:
        return _run(argv)
    except BrokenPipeError:  # the reader has seen enough (``| head``)
        _abandon_stdout()
        return 0
    except KeyboardInterrupt:
        _complain("interrupted")
        return 130
    except (UsageError, ValueError, OSError) as error:
        _complain(" ".join(str(error).split()) or type(error).__name__)
        try:
            sys.stdout.flush()
        except OSError:
            _abandon_stdout()
        return 2
