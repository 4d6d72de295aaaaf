"""``fastexit boot``: a real guest whose interrupts are fastexit's, and what they did."""

from __future__ import annotations

import argparse
import errno
import os
import select
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastexit.checks import quoted
from fastexit.cli import signals
from fastexit.cli.commands import UsageError, abandon, complain, print_json

if TYPE_CHECKING:
    from fastexit.adapters.kvmhost.host import KvmHost

FAILED, TIME_IS_UP, CLOSED, INTERRUPTED = 2, 124, 128 + signal.SIGHUP, 128 + signal.SIGINT
STOPPED = "interrupted"
"""Why a guest is over that did not end itself."""
CONSOLE, EARLY = "console=ttyS0 panic=-1", "earlyprintk=ttyS0"
"""The second one is for hosts on which nothing would be seen for minutes."""
MOST_VCPUS, LEAST_MIB, MOST_MIB = 64, 2, 1 << 16
"""The host's own limits: importing it would make every command slower."""
MANY = 50_000
"""Lines of a trace that take seconds to write."""
PATIENCE = 0.2
"""Seconds between two looks whether a guest that waits for its reader is over."""
MOST_BYTES = 1 << 30
"""Of an image or an initrd."""
SLOW = (
    "this KVM emulates ring 0: Linux takes a minute or more, and cannot run programs"
    " (fastexit kernels run VERSION -- fastexit boot ... can)"
)
_ABOUT = """Boot a guest on /dev/kvm without KVM's irqchip: its local APICs, IOAPIC, PICs and PIT are fastexit.

IMAGE is a Linux kernel (bzImage or vmlinux), a version of one in the cache (fastexit kernels list), or a multiboot
program. A kernel without --initrd gets a static busybox with a shell. The terminal is its serial port; ^C ends it.

  fastexit boot 6.1 --vcpus 4                    a shell; exit switches the machine off
  fastexit boot 6.1 --run 'cat /proc/interrupts' --trace guest.trace.xz
  fastexit boot apic.flat --vcpus 2              kvm-unit-tests: the exit code is the guest's
  fastexit boot 6.1 --irqchip kernel             the same guest on KVM's own irqchip

Exit code: the guest's by port 0xf4 (0 where it switches itself off), 1 for a panic or a triple fault, 2 for what this
host or KVM cannot do, 124 when --seconds are over, 129 for a closed terminal, 130 for ^C, 143 for SIGTERM; counts are
told for the last four, too."""


def _vcpus(text: str) -> int:
    return _within(text, 1, MOST_VCPUS, "a number of vCPUs")


def _mib(text: str) -> int:
    return _within(text, LEAST_MIB, MOST_MIB, "a size in MiB")


def _within(text: str, least: int, most: int, what: str) -> int:
    try:
        value = int(text)
    except ValueError:
        value = -1
    if not least <= value <= most:
        raise argparse.ArgumentTypeError(f"{quoted(text)} is not {what} from {least} to {most}")
    return value


def add(subparsers: Any, raw: Any, kernel: Callable[[str], str], seconds: Any) -> None:
    """Add the command to a parser's."""
    boot: argparse.ArgumentParser = subparsers.add_parser(
        "boot", help="Boot a real guest whose interrupts are fastexit's.", description=_ABOUT, formatter_class=raw
    )
    boot.set_defaults(run=run)
    boot.add_argument("image", metavar="IMAGE", help="a file, or a version of a kernel in the cache: 6.1, 6.1.192")
    boot.add_argument("--vcpus", type=_vcpus, default=1, metavar="N", help=f"default: 1; at most {MOST_VCPUS}")
    boot.add_argument("--memory", type=_mib, default=256, metavar="MIB", help=f"default: 256; at most {MOST_MIB}")
    boot.add_argument("--initrd", type=Path, metavar="FILE", help="an initrd, or the module of a multiboot program")
    boot.add_argument("--run", dest="command_line", metavar="COMMAND", help="run this in place of a shell, and end")
    boot.add_argument("--append", default="", metavar="ARGS", help="more for the guest's command line")
    boot.add_argument("--irqchip", choices=("fastexit", "kernel"), default="fastexit", help="default: fastexit")
    boot.add_argument("--kernel", type=kernel, metavar="VERSION", help="the kernel that fastexit is like (the newest)")
    boot.add_argument("--vendor", choices=("vmx", "svm"), help="of the model (default: vmx)")
    boot.add_argument("--apicv", action="store_true", help="the model posts interrupts, or has AVIC")
    boot.add_argument("--no-x2apic", action="store_true", help="the guest's CPUID has no x2APIC")
    boot.add_argument(
        "--deadline", choices=("yes", "no", "auto"), default="auto", help="the TSC-deadline timer (default: auto)"
    )
    boot.add_argument("--hyperv", action="store_true", help="the guest finds Hyper-V's interface")
    boot.add_argument(
        "--slow-host",
        choices=("yes", "no", "auto"),
        default="auto",
        help="this KVM emulates ring 0: slow time down and fill its gaps (default: auto, for kvm_pvm)",
    )
    boot.add_argument("--seconds", type=seconds, metavar="S", help="end it after so long")
    boot.add_argument(
        "--trace", type=Path, metavar="FILE", help="write the model's tracepoints; .xz and .gz are packed"
    )
    boot.add_argument("--quiet", action="store_true", help="no tables at the end")
    boot.add_argument("--json", action="store_true", help="JSON on standard output; the console goes to stderr")


def run(args: argparse.Namespace) -> int:
    """``fastexit boot``."""
    from fastexit.adapters.kvmhost.host import KvmHost
    from fastexit.adapters.kvmhost.memory import MIB
    from fastexit.adapters.kvmhost.summary import summary
    from fastexit.cli import commands

    settings = _settings(args)
    path, image = _image(args.image)
    initrd = None if args.initrd is None else _read(args.initrd)
    if args.trace is not None:
        commands._check_file(args.trace, "--trace")
    if args.irqchip == "fastexit":
        commands._compile()
    out = sys.stderr if args.json else sys.stdout
    if out is None:
        raise UsageError("standard error is closed: with --json the guest's console goes there")
    out.flush()
    choice = {"yes": True, "no": False, "auto": None}
    with KvmHost(
        args.vcpus,
        memory=args.memory * MIB,
        irqchip=args.irqchip,
        console=_writer(out.fileno(), lambda: host),
        x2apic=not args.no_x2apic,
        deadline=choice[args.deadline],
        hyperv=args.hyperv,
        slow=choice[args.slow_host],
        **settings,
    ) as host:
        _load(host, path, image, initrd, args)
        trace = None if args.trace is None else host.record(args.trace)
        began = time.monotonic()
        code = _attended(host, args.seconds)
        told = summary(host, time.monotonic() - began) | {"code": code}
        if trace is not None:
            if trace.waiting > MANY and not args.quiet:
                complain(f"writing {trace.waiting:,} more lines of the trace")
            host.close()
            told["trace"] = {"file": str(args.trace), "lines": trace.lines, "lost": trace.lost}
    try:
        if args.json:
            print_json(told)
        elif not args.quiet:
            show(told)
        sys.stdout.flush()
    except OSError:
        if code != CLOSED:
            raise
        abandon(sys.stdout)  # it was the terminal's
    if told["detail"] or code in (INTERRUPTED, FAILED) and told["ended"] != "exit port":
        complain(": ".join(filter(None, (told["ended"], told["detail"]))))
    return code


def _attended(host: KvmHost, seconds: float | None) -> int:
    """The guest runs, with the user's terminal at its serial port; the exit code, behind ^C and a signal, too."""
    from fastexit.adapters.kvmhost.power import Ended
    from fastexit.adapters.kvmhost.terminal import Terminal

    with signals.told(lambda number: host.end(Ended(STOPPED, 128 + number))), Terminal(host.type, host.serial.room):
        ended = host.run(seconds)
    return TIME_IS_UP if ended.reason == "time is up" else ended.code


def _settings(args: argparse.Namespace) -> dict[str, Any]:
    """The model's; UsageError for options that would say nothing."""
    if args.command_line is not None and args.initrd is not None:
        raise UsageError("--run needs the initrd that is made here: leave out --initrd")
    asked = {name: getattr(args, name) for name in ("kernel", "vendor", "apicv") if getattr(args, name)}
    if args.irqchip == "kernel":
        void = [f"--{name}" for name in (*asked, "trace", "hyperv") if getattr(args, name)]
        if void:
            raise UsageError(f"--irqchip kernel: {', '.join(void)}: for the irqchip of fastexit alone")
    return asked


def _read(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            data = file.read(MOST_BYTES + 1)
    except OSError as error:
        raise UsageError(f"{quoted(str(path))}: {error.strerror}") from None
    if len(data) > MOST_BYTES:
        raise UsageError(f"{quoted(str(path))} has more than {MOST_BYTES >> 20} MiB")
    return data


def _image(name: str) -> tuple[Path, bytes]:
    """The image's file and bytes: a version of a kernel in the cache is its file."""
    from fastexit.kvm.lab import kernels

    if not name:
        raise UsageError("IMAGE is empty: name a file, or a version of a kernel in the cache")
    path = Path(name)
    if not path.exists() and os.sep not in name and name[:1].isdigit():
        path = kernels.find(name).image
    return path, _read(path)


def _load(host: KvmHost, path: Path, image: bytes, initrd: bytes | None, args: argparse.Namespace) -> None:
    from fastexit.adapters.kvmhost import linux, multiboot, slow, userland

    try:
        if multiboot.header(image) is not None and not linux.is_vmlinux(image):
            if args.command_line is not None:
                raise ValueError("--run is for Linux kernels")
            host.load(image, f"{path.name} {args.append}".rstrip(), initrd)
            return
        if not linux.is_vmlinux(image):
            linux.image(image)  # what is none is told before a busybox is missed for it
        if initrd is None:
            initrd = userland.initramfs(args.command_line)
        line = CONSOLE
        if host.slow:
            line = f"{CONSOLE} {EARLY} {slow.parameters(host.tsc.khz)}"
        host.load(image, f"{line} {args.append}".rstrip(), initrd)
        if host.slow and not args.quiet:
            complain(SLOW)
    except ValueError as error:
        raise UsageError(f"{quoted(str(path))}: {error}") from None


def _writer(fd: int, host: Callable[[], KvmHost]) -> Callable[[bytes], None]:
    """Writes all of it; what nobody reads keeps no guest that is over."""
    from fastexit.adapters.kvmhost.power import Ended

    terminal = os.isatty(fd)

    def write(data: bytes) -> None:
        while data:
            if select.select([], [fd], [], PATIENCE)[1]:
                try:
                    data = data[os.write(fd, data) :]
                except OSError as error:
                    if not terminal or error.errno != errno.EIO:
                        raise
                    host().end(Ended(STOPPED, CLOSED))  # its SIGHUP may come later
                    return
            elif host().ended is not None:
                return

    return write


def show(told: dict[str, Any]) -> None:
    """Tables of what `summary` has."""
    from rich import box
    from rich.table import Table

    from fastexit.cli.show import console

    out = console()
    print()
    chip = "KVM's own irqchip"
    if told["irqchip"] == "fastexit":
        chip = f"fastexit like {told['kernel']} ({told['vendor']}, APICv {'on' if told['apicv'] else 'off'})"
    print(f"{told['ended']} after {told['seconds']:.1f} s; {chip}")
    rows = told["vcpus"]
    table = Table(box=box.SIMPLE_HEAVY)
    table.add_column("")
    for row in rows:
        table.add_column(f"vCPU {row['vcpu']}", justify="right")

    def line(name: str, values: list[int]) -> None:
        if any(values):
            table.add_row(name, *(f"{value:,}" for value in values))

    for name in ("interrupts", "eois", "icr_writes", "deadlines", "kicked"):
        line(_NAMES[name], [row.get(name, 0) for row in rows])
    for kind, text in (("paths", "writes, {} path"), ("exits", "exit {}"), ("events", "into the guest: {}")):
        for name in dict.fromkeys(name for row in rows for name in row.get(kind, {})):
            line(text.format(name), [row.get(kind, {}).get(name, 0) for row in rows])
    vectors = sorted({vector for row in rows for vector in row.get("vectors", {})}, key=lambda text: int(text, 16))
    for vector in vectors:
        line(f"vector {vector}", [row["vectors"].get(vector, 0) for row in rows])
    out.print(table)
    if told.get("kernels") and told["kernels"][0]["ipis"]:
        shares = Table(title="IPIs that each kernel would take fast", box=box.SIMPLE_HEAVY)
        for column in ("kernel", "fast", "of", "share", "why not"):
            shares.add_column(column, justify="left" if column in ("kernel", "why not") else "right")
        for row in told["kernels"]:
            why = ", ".join(f"{reason} {count:,}" for reason, count in row["refusals"].items())
            share = f"{100 * row['fast'] / row['ipis']:.1f} %"
            shares.add_row(row["kernel"], f"{row['fast']:,}", f"{row['ipis']:,}", share, why)
        out.print(shares)
    if "trace" in told:
        trace = told["trace"]
        lost = f", {trace['lost']:,} lost" if trace["lost"] else ""
        print(f"{trace['lines']:,} trace lines{lost} in {trace['file']}: fastexit report, fastexit replay")


_NAMES = {
    "interrupts": "interrupts taken",
    "eois": "EOIs",
    "icr_writes": "ICR writes",
    "deadlines": "TSC_DEADLINE writes",
    "kicked": "KVM_RUNs ended by a kick",
}
