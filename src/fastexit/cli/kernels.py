"""``fastexit kernels list | get | boot | run | paths | windows``: the lab's kernels; each takes parsed arguments."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from fastexit.checks import integer
from fastexit.cli import vmx
from fastexit.cli.commands import complain, print_json

_RUN = """Run a command of this machine inside a lab's, where a kernel's own kvm_amd is an ordinary /dev/kvm.

QEMU's TCG boots the kernel with copies of this machine's files under their own paths: this Python, fastexit and what it
imports, the command's program, each file that the command names, and what --with names. Output, input, ^C and the exit
code are the command's (three ^C end the machine); what it writes to files stays there and is gone, but for --fetch.

  fastexit kernels run 6.1 -- fastexit verify --kind guest --ops 2000
  fastexit kernels run 6.18 --cpus 4 --with trace.xz -- python script.py"""


def add(subparsers: Any, raw: Any) -> None:
    """Add the command to a parser's."""
    kernels = subparsers.add_parser("kernels", help="Kernels of other generations, for fastexit verify --kernel.")
    steps = kernels.add_subparsers(dest="step", required=True, metavar="STEP")

    def step(name: str, run: Any, text: str, *, asks_apt: bool = False) -> argparse.ArgumentParser:
        sub: argparse.ArgumentParser = steps.add_parser(name, help=text, description=text, formatter_class=raw)
        sub.add_argument("--json", action="store_true", help="print JSON")
        sub.set_defaults(run=run)
        if asks_apt:
            sub.add_argument(
                "--suite", action="append", default=[], metavar="NAME", help="ask this suite of the system's mirror"
            )
            sub.add_argument("--sources", type=Path, metavar="FILE", help="ask the sources of this file")
            sub.add_argument("--apt-option", action="append", default=[], metavar="NAME=VALUE", help="for apt as it is")
        return sub

    there = step("list", list_kernels, "Kernels in the cache; with --available those that apt has, too.", asks_apt=True)
    there.add_argument("--available", action="store_true", help="ask apt's sources, too")
    get = step("get", get_kernel, "Get a kernel's packages by apt into the cache; nothing is installed.", asks_apt=True)
    get.add_argument("version", metavar="VERSION", help="6.1, 6.1.192, or bochs: what the VMX side runs in")
    boot = step("boot", boot_kernel, "Boot a kernel in an emulated machine and print what its KVM is.")
    boot.add_argument("version", metavar="VERSION", nargs="?", help="6.1, 6.1.192, or a release")
    lab_options(boot)
    inside = steps.add_parser(
        "run",
        help="Run a command of this machine inside a lab's: there a kernel's own kvm_amd is an ordinary /dev/kvm.",
        description=_RUN,
        formatter_class=raw,
        usage="%(prog)s VERSION [OPTION ...] -- COMMAND ...",
    )
    inside.set_defaults(run=run_inside)
    inside.add_argument("version", metavar="VERSION", nargs="?", help="6.1, 6.1.192, or a release")
    inside.add_argument("--cpus", type=int, default=1, metavar="N", help="the machine's CPUs (default: 1)")
    inside.add_argument("--memory", type=int, default=2048, metavar="MIB", help="its memory (default: 2048)")
    inside.add_argument("--timeout", type=float, metavar="SECONDS", help="end the command then, with exit code 124")
    inside.add_argument(
        "--with", dest="files", action="append", default=[], metavar="PATH", help="take a file or folder along"
    )
    inside.add_argument(
        "--fetch", action="append", default=[], metavar="FILE", help="copy this file to here when the command has ended"
    )
    _own_kernel(inside)
    paths = step("paths", vmx.paths, "Instructions of a kernel's own exits, counted in the VMX lab.")
    paths.add_argument("version", metavar="VERSION", nargs="?", help="6.1, 6.1.192, or a release")
    lab_options(paths, vendor="vmx")
    windows = step(
        "windows",
        record_windows,
        "Record the trace of a guest that uses Hyper-V's doors: IPIs by MSR and by hypercalls, EOIs by the assist page "
        "and by MSR, SynIC, synthetic timers.",
    )
    windows.add_argument("version", metavar="VERSION", nargs="?", help="6.1, 6.1.192, or a release")
    windows.add_argument(
        "--output", type=Path, metavar="FILE", required=True, help="where to; .xz and .gz are compressed"
    )
    windows.add_argument("--x2apic", action="store_true", help="the guest puts its APICs into x2APIC mode")
    windows.add_argument("--rounds", type=int, default=40, metavar="N", help="what each vCPU does that often (40)")
    lab_options(windows)


def split(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """A command line's own words, and those of the command that ``kernels run`` has behind ``--``.

    argparse would take the first word of that for a version, or an option of that for its own.
    """
    words = list(argv)
    if words[:2] != ["kernels", "run"] or "--" not in words:
        return words, []
    at = words.index("--")
    return words[:at], words[at + 1 :]


def lab_options(sub: argparse.ArgumentParser, vendor: str = "svm") -> None:
    """What says which lab is meant."""
    sub.add_argument(
        "--vendor", choices=("svm", "vmx"), default=vendor, help=f"whose CPU the machine has (default: {vendor})"
    )
    _own_kernel(sub)


def _own_kernel(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--image", metavar="VMLINUZ", help="a kernel of your own, with --modules")
    sub.add_argument("--modules", metavar="DIR", help="where its irqbypass, kvm and kvm-amd modules are, or below")


def _apt(args: argparse.Namespace) -> Any:
    from fastexit.kvm.lab.kernels import Apt, directory

    return Apt(directory() / "apt", tuple(args.suite), args.sources, tuple(args.apt_option))


def list_kernels(args: argparse.Namespace) -> int:
    """``fastexit kernels list``."""
    from fastexit.cli.show import console
    from fastexit.kvm.lab import kernels

    there = kernels.cached()
    offered: dict[str, list[str]] = {}
    if args.available or args.suite or args.sources or args.apt_option:
        apt = _apt(args)
        apt.update()
        offered = apt.versions()
    if args.json:
        print_json({"cached": [kernel.as_dict() for kernel in there], "available": offered})
        return 0
    table = Table(title=f"Kernels in {kernels.directory()}", box=box.SIMPLE_HEAVY)
    for column in ("version", "release", "package"):
        table.add_column(column)
    for kernel in there:
        table.add_row(kernel.version, kernel.release, kernel.package)
    have = {kernel.package for kernel in there}
    for version, packages in offered.items():
        if " ".join(packages) not in have:
            table.add_row(version, f"not here: fastexit kernels get {version}", " ".join(packages), style="dim")
    console().print(table)
    return 0


def get_kernel(args: argparse.Namespace) -> int:
    """``fastexit kernels get VERSION``."""
    from fastexit.kvm.lab import kernels

    if args.version == vmx.BOCHS:
        return vmx.get_bochs(_apt(args), args.json)
    kernel = kernels.get(args.version, _apt(args))
    if args.json:
        print_json(kernel.as_dict())
    else:
        print(f"{kernel.version}: {kernel.release} in {kernel.modules}")
    return 0


def boot_kernel(args: argparse.Namespace) -> int:
    """``fastexit kernels boot VERSION``."""
    if args.vendor == "vmx":
        return vmx.boot(args)
    from fastexit.kvm.lab.lab import Lab

    with Lab(args.version, vendor=args.vendor, image=args.image, modules=args.modules) as lab:
        seconds, host = lab.machine.boot_seconds, lab.host
    if args.json:
        print_json({"boot_seconds": round(seconds, 1), "kernel": lab.kernel.as_dict(), "host": host.as_dict()})
        return 0
    print(f"{lab.kernel.version} came up in {seconds:.1f} s")
    for name, value in host.as_dict().items():
        print(f"  {name}: {value}")
    return 0


def run_inside(args: argparse.Namespace) -> int:
    """``fastexit kernels run VERSION -- COMMAND``."""
    from fastexit.kvm.lab import inside, kernels

    if not args.words:
        raise ValueError("no command to run: fastexit kernels run VERSION -- COMMAND")
    if (args.version is None) == (args.image is None):
        raise ValueError("give either a version, or --image and --modules")
    if args.timeout is not None and not args.timeout > 0:
        raise ValueError("--timeout: a number of seconds above 0")
    kernel = kernels.find(args.version) if args.version is not None else kernels.own(args.image, args.modules or "")
    stdin = _input()
    ended = inside.run(
        kernel,
        args.words,
        cpus=_from(1, args.cpus, "--cpus", 64),
        memory_mib=_from(inside.LEAST_MIB, args.memory, "--memory", 1 << 20),
        seconds=args.timeout,
        files=args.files,
        fetch=args.fetch,
        terminal=stdin is not None and os.isatty(stdin) and sys.stdout.isatty(),
        stdin=stdin,
    )
    for name, data in ended.files.items():
        Path(name).write_bytes(data)
    missing = [name for name in args.fetch if os.path.abspath(name) not in ended.files]
    if missing:
        complain(f"the command left no file {missing[0]!r}")
    return ended.code


def _input() -> int | None:
    """Standard input's file descriptor, if it has one."""
    try:
        return sys.stdin.fileno()
    except (AttributeError, OSError, ValueError):
        return None


def _from(least: int, value: int, what: str, top: int) -> int:
    if not least <= value <= top:
        raise ValueError(f"{what} {value} is out of range {least}..{top}")
    return value


def record_windows(args: argparse.Namespace) -> int:
    """``fastexit kernels windows VERSION --output FILE``."""
    from fastexit.kvm.lab import kernels
    from fastexit.kvm.lab.windows import record

    if args.vendor != "svm":
        raise ValueError("--vendor vmx: the VMX lab's kernels run one program at a time; this guest takes the SVM lab")
    if (args.version is None) == (args.image is None):
        raise ValueError("give either a version, or --image and --modules")
    if not args.output.absolute().parent.is_dir():
        raise FileNotFoundError(f"no directory {args.output.absolute().parent} for the trace")
    kernel = kernels.find(args.version) if args.version is not None else kernels.own(args.image, args.modules)
    found = record(kernel, rounds=integer(args.rounds, "--rounds", 10_000), x2apic=args.x2apic)
    found.write(args.output)
    if args.json:
        print_json(found.as_dict() | {"output": str(args.output)})
        return 0
    print(f"Linux {found.kernel}: {len(found.lines):,} lines in {args.output}; the guest counted")
    for count, n in found.counts.items():
        print(f"  {count.name.lower().replace('_', ' ')}: {n:,}")
    return 0
