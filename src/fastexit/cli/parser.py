"""The command line: ``fastexit walk | report | replay | verify | kernels | costs | demo | embed | info``.

Each command has --json. Exit code 0: done; 1: replay found damage or lines that the model did not predict, verify found
a difference, report refused a file or a --fail-if holds; 2: wrong arguments, unusable input, no /dev/kvm or nowhere to
write to, said in one line on stderr.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from typing import Any

from fastexit import __version__
from fastexit.checks import QUOTED, quoted
from fastexit.cli import boot, commands, costs, kernels, report, signals
from fastexit.profile import NEWEST, PROFILES, profiles
from fastexit.releases import generation

_EPILOG = f"""examples:
  fastexit walk                                  one RESCHEDULE IPI, seed-v3 beside {NEWEST}
  fastexit walk --shorthand all-but-self --kernels 5.7,6.18
  fastexit report guest.trace.xz                 who exits, why, for how long; what would other kernels do?
  fastexit report old.dat --against new.dat      what changed
  fastexit replay guest.trace.xz                 who could take the fast path, and is the model right?
  fastexit verify --ops 20000                    is the model like the KVM of this very machine?
  fastexit verify --kernel 6.1                   ... like that kernel's, booted in an emulated machine?
  fastexit kernels run 6.1 -- fastexit verify    the same by ioctls of a process there: its kvm_amd is /dev/kvm
  fastexit boot 6.1 --vcpus 4                    a real guest on /dev/kvm whose irqchip is the model
  fastexit demo --output out                     everything, on a real trace
  fastexit embed build -o fx                     a shared library for simulators in C
  fastexit costs template > mine.toml            modelled time by numbers of your own

Trace a guest: trace-cmd record -e kvm:kvm_msr -e kvm:kvm_apic -e kvm:kvm_apic_ipi -e kvm:kvm_apic_accept_irq \\
               -e kvm:kvm_eoi -e kvm:kvm_entry -e kvm:kvm_exit -e kvm:kvm_mmio -e kvm:kvm_hv_timer_state,
               then trace-cmd report > guest.trace
"""


MOST_VCPUS = 4096
VERIFY_KINDS = ("msr", "guest", "runs", "timers", "many", "traces", "hyperv", "irqchip")
OWN_KINDS = ("apic", "ipis", "registers", "interrupts", "messages", "timer", "states", "modes")
"""With an own APIC: all of it, or one group of operations."""
PROGRAM_KINDS = ("plain", "events")
"""Of the VMX lab's programs."""


def _number(text: str) -> int:
    try:
        value = int(text, 0)
    except ValueError:
        digits = text.strip().lstrip("+-")
        # Python converts no more than some thousand decimal digits.
        if not (digits.isdecimal() and len(digits) > QUOTED):
            raise argparse.ArgumentTypeError(f"{quoted(text)} is not a number (decimal or 0x hex)") from None
        value = 1 << 64
    if value.bit_length() > 64:
        raise argparse.ArgumentTypeError(f"{quoted(text)} does not fit 64 bits")
    return value


def _vcpus(text: str) -> tuple[int, ...]:
    """A number of vCPUs, or their APIC ids: 6, or 0,1,300,4095."""
    numbers = tuple(_number(part) for part in text.split(","))
    ids = tuple(range(numbers[0])) if len(numbers) == 1 and numbers[0] <= MOST_VCPUS else numbers
    if not ids or max(ids) >= MOST_VCPUS or len(set(ids)) < len(ids):
        raise argparse.ArgumentTypeError(f"{quoted(text)}: a number from 1 to {MOST_VCPUS}, or different ids below it")
    return ids


def _names(text: str) -> tuple[str, ...]:
    """Names of registers; which ones there are, the comparison says."""
    return tuple(text.split(","))


def _how_many(text: str) -> int:
    """A number of vCPUs."""
    value = _number(text)
    if not 1 <= value <= MOST_VCPUS:
        raise argparse.ArgumentTypeError(f"{quoted(text)} is no number from 1 to {MOST_VCPUS}")
    return value


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{quoted(text)} is not a number of seconds above 0")
    return value


def _count(text: str) -> int:
    value = _number(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{quoted(text)} operations compare nothing")
    return value


def _kernel(text: str) -> str:
    """A generation or a release."""
    try:
        generation(text)
    except ValueError as unknown:
        raise argparse.ArgumentTypeError(str(unknown)) from None
    return text


def _kernels(text: str) -> list[str]:
    """Different kernels, separated by commas."""
    names = [name.strip() for name in text.split(",")]
    for number, name in enumerate(names):
        if not name:
            raise argparse.ArgumentTypeError(
                f"{quoted(text)} has an empty name: kernels separated by single commas, such as 5.8,6.18"
            )
        if name not in PROFILES:
            raise argparse.ArgumentTypeError(f"unknown kernel {quoted(name)}: one of {', '.join(profiles())}")
        if name in names[:number]:
            raise argparse.ArgumentTypeError(f"{quoted(text)} names {name} twice: name each kernel once")
    return names


def _mismatches(text: str) -> int | None:
    """How many mismatches are shown; None for all."""
    if text == "all":
        return None
    try:
        value = _number(text)
    except argparse.ArgumentTypeError:
        value = -1
    if value < 0:
        raise argparse.ArgumentTypeError(f"{quoted(text)} is neither a number from 0 on nor 'all'")
    return value


class _Parser(argparse.ArgumentParser):
    """Name the choice that a misspelt word is nearest to: argparse itself does that from Python 3.14 on, when asked."""

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        try:
            super()._check_value(action, value)
        except argparse.ArgumentError as error:
            choices = [str(choice) for choice in action.choices or ()]
            for near in get_close_matches(str(value), choices, n=1):
                error.message += f": did you mean {near}?"
            raise


def _parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = _Parser(
        prog="fastexit",
        description="KVM's interrupt exits: what happens when a vCPU exits on WRMSR, by kernel generation.",
        epilog=_EPILOG,
        formatter_class=raw,
    )
    parser.add_argument("--version", action="version", version=f"fastexit {__version__}")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, run: Callable[[argparse.Namespace], int], text: str) -> argparse.ArgumentParser:
        sub = subparsers.add_parser(name, help=text, description=text, formatter_class=raw)
        sub.add_argument("--json", action="store_true", help="print JSON instead of tables")
        sub.set_defaults(run=run)
        return sub

    def machine_options(sub: argparse.ArgumentParser) -> None:
        sub.add_argument("--vendor", choices=("vmx", "svm"), default="vmx", help="default: vmx")
        sub.add_argument("--no-apicv", action="store_true", help="without posted interrupts or AVIC")

    walk = command("walk", commands.walk, "One WRMSR exit of vCPU 0, step by step through vcpu_enter_guest.")
    walk.add_argument(
        "--kernels", type=_kernels, default=["seed-v3", NEWEST], metavar="A,B", help=f"default: seed-v3,{NEWEST}"
    )
    walk.add_argument("--generic", action="store_true", help="also with the fast path switched off")
    walk.add_argument("--vcpus", type=_how_many, default=4, help="default: 4")
    walk.add_argument("--msr", type=_number, default=0x830, help="default: 0x830, the x2APIC ICR")
    walk.add_argument("--value", type=_number, help="EDX:EAX; or describe the ICR:")
    # No defaults here: commands.walk has to know which of them were given.
    walk.add_argument("--dest", type=_number, help="destination (default: 1)")
    walk.add_argument("--vector", type=_number, help="vector (default: 0xfd, RESCHEDULE)")
    walk.add_argument("--mode", help="Fixed LowPrio SMI Res3 NMI INIT SIPI ExtINT (default: Fixed)")
    walk.add_argument("--logical", action="store_true", default=None, help="logical destination mode")
    walk.add_argument("--shorthand", choices=commands.SHORTHANDS, help="default: none; the others have no --dest")
    walk.add_argument("--costs", metavar="NAME|FILE", help="modelled cycles: a cost profile or a TOML file")
    machine_options(walk)

    report.add(command, _kernel, _kernels)

    replay = command("replay", commands.replay, "Feed a KVM trace to the model: ICR classes, fast shares, predictions.")
    replay.add_argument(
        "trace",
        metavar="TRACE",
        help="text of ftrace, trace-cmd report, perf script or perf trace, plain or .gz, .xz, .bz2, .zst; trace.dat or "
        "perf.data; - for standard input",
    )
    replay.add_argument("--picture", metavar="BASE", help="write BASE.png and BASE.svg: sender x target heat map")
    replay.add_argument("--quiet", action="store_true", help="no progress bar")
    replay.add_argument(
        "--kernel", type=_kernel, help="the kernel that recorded (default: the newest that the trace's lines allow)"
    )
    replay.add_argument(
        "--kernels", type=_kernels, metavar="A,B", help="whose fast shares are reported (default: every generation)"
    )
    replay.add_argument("--vendor", choices=("vmx", "svm"), default="vmx", help="default: vmx")
    replay.add_argument("--apicv", action="store_true", help="recorded with posted interrupts or AVIC")
    replay.add_argument(
        "--hv-timer",
        choices=("yes", "no", "trace"),
        default="trace",
        help="the host could use the VMX preemption timer (default: trace, as its kvm_hv_timer_state lines say)",
    )
    replay.add_argument(
        "--mismatches",
        type=_mismatches,
        default=commands.MISMATCHES,
        metavar="N|all",
        help=f"how many mismatches are shown; all are counted (default: {commands.MISMATCHES})",
    )

    verify = command(
        "verify",
        commands.verify,
        "Random operations on the model and on a real kernel, or on an APIC of your own, compared after each.",
    )
    verify.add_argument(
        "--kernel", metavar="VERSION", help="a kernel of the lab (fastexit kernels) instead of /dev/kvm: 6.1, 6.1.192"
    )
    kernels.lab_options(verify)
    verify.add_argument(
        "--against",
        metavar="PROGRAM",
        help="an own APIC instead of a kernel, which speaks docs/apic-protocol.md; --kernel is then whose rules it is "
        "held against: 6.18, sdm (the manual's)",
    )
    verify.add_argument("args", nargs="*", metavar="ARG", help="arguments of that program, behind --")
    verify.add_argument("--well-formed", action="store_true", help="with --against: no reserved bit is ever set")
    verify.add_argument(
        "--ignore", type=_names, default=(), metavar="A,B", help="with --against: registers not compared: LVR,ESR"
    )
    verify.add_argument("--ops", type=_count, metavar="N", help="operations (default: 100000, or as many as fit)")
    verify.add_argument("--seconds", type=_seconds, metavar="S", help="stop after so long")
    verify.add_argument("--seed", type=_number, default=1, metavar="K", help="which operations (default: 1)")
    verify.add_argument(
        "--vcpus", type=_vcpus, metavar="LIST", help="a number, or APIC ids: 0,1,300 (default: 4 to 9 random ones)"
    )
    verify.add_argument(
        "--only",
        "--kind",
        choices=VERIFY_KINDS + OWN_KINDS + PROGRAM_KINDS,
        help="one kind of operations (default: all); with --against from ipis to modes; with --vendor vmx plain, "
        "events (NMI, SMI, INIT, SIPI, VMXON)",
    )
    verify.add_argument("--trace", action="store_true", help="compare the kernel's tracepoints, too (root)")
    verify.add_argument("--script", metavar="FILE", help="where the script goes that shows a difference")
    verify.add_argument("--no-apicv", action="store_true", help="with --vendor vmx: kvm_intel without APICv")
    verify.add_argument(
        "--keep", metavar="FILE", help="with --vendor vmx: a report, kept while it runs; a run that ended goes on"
    )
    verify.add_argument("--quiet", action="store_true", help="no progress bar")

    demo = command("demo", commands.demo, "Replay the bundled trace, walk one exit, compare fast with generic, draw.")
    demo.add_argument("--trace", metavar="TRACE", help="another trace than the bundled one")
    demo.add_argument(
        "--output", default="fastexit-demo", metavar="DIR", help="where pictures go (default: fastexit-demo)"
    )

    boot.add(subparsers, raw, _kernel, _seconds)

    embed = subparsers.add_parser("embed", help="The C door: build libfastexit, and what to compile a host with.")
    steps = embed.add_subparsers(dest="step", required=True, metavar="STEP")

    def step(name: str, run: Callable[[argparse.Namespace], int], text: str) -> argparse.ArgumentParser:
        sub = steps.add_parser(name, help=text, description=text, formatter_class=raw)
        sub.add_argument("--json", action="store_true", help="print JSON")
        sub.set_defaults(run=run)
        return sub

    build = step("build", commands.embed_build, "Make libfastexit.so, its headers, fastexit.pc and a CMake package.")
    build.add_argument("-o", "--output", metavar="DIR", help="where they go (default: fastexit-embed)")
    build.add_argument("--cc", metavar="CC", help="the C compiler (default: $CC, or the one that built Python)")
    build.add_argument("--flags", default="", metavar="FLAGS", help="more options for it")
    for name, run, text in (
        ("cflags", commands.embed_cflags, "Print the options to compile a host with, as python3-config does."),
        ("libs", commands.embed_libs, "Print the options to link a host with, as python3-config does."),
    ):
        sub = step(name, run, text)
        sub.add_argument("-o", "--output", metavar="DIR", help="where it was built (default: where it was built last)")

    kernels.add(subparsers, raw)
    costs.add(subparsers, raw)

    command("info", commands.info, "Versions, kernel generations, memory layout, cache, /dev/kvm.")
    return parser


def _run(argv: Sequence[str] | None) -> int:
    try:
        own, words = kernels.split(sys.argv[1:] if argv is None else argv)
        args = _parser().parse_args(own, argparse.Namespace(words=words))
        return int(args.run(args))
    finally:
        # Here, where a closed pipe or a full disk can still be dealt with, and not at exit; --help comes by as well.
        sys.stdout.flush()


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; the exit code."""
    if sys.stdout is None:
        commands.complain("standard output is closed")
        return 2
    try:
        with signals.ended_in_order():
            return _run(argv)
    except BrokenPipeError:  # the reader has seen enough (``| head``)
        commands.abandon(sys.stdout)
        return 0
    except KeyboardInterrupt:
        commands.complain("interrupted")
        return 130
    except (commands.UsageError, ValueError, OSError) as error:
        commands.complain(" ".join(str(error).split()) or type(error).__name__)
        try:
            sys.stdout.flush()
        except OSError:
            commands.abandon(sys.stdout)
        return 2
