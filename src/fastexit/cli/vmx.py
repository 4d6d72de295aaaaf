"""What the VMX side of the lab adds to the command line; each function takes parsed arguments."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastexit.checks import quoted
from fastexit.cli.commands import print_json

if TYPE_CHECKING:
    from fastexit.kvm.lab.vmx import VmxReport

BOCHS = "bochs"


def _progress(args: argparse.Namespace) -> Any:
    """What shows how far it is, on a terminal."""
    if args.json or getattr(args, "quiet", False) or not sys.stderr.isatty():
        return None
    return lambda done, wanted: print(f"\r{done} of {wanted} programs", end="", file=sys.stderr, flush=True)


def verify(args: argparse.Namespace) -> int:
    """``fastexit verify --kernel VERSION --vendor vmx``: guest programs; 1 when model and kernel differ."""
    from fastexit.kvm.lab.vmx import KINDS, PROGRAMS, VmxLab

    kept = _Kept(args.keep) if args.keep is not None else None
    if args.only is not None and args.only not in KINDS:
        raise ValueError(f"--only {args.only}: programs of the VMX lab are {' or '.join(KINDS)}")
    for name in ("vcpus", "script"):
        if getattr(args, name) is not None:
            raise ValueError(f"--{name}: programs of the VMX lab choose that themselves")
    progress = _progress(args)
    with VmxLab(args.kernel, image=args.image, modules=args.modules, apicv=not args.no_apicv) as lab:
        report = lab.verify(
            args.ops or PROGRAMS,
            seed=args.seed,
            only=args.only,
            seconds=args.seconds,
            progress=progress,
            report=kept.report() if kept else None,
            seen=kept.write if kept else None,
        )
    if progress:
        print(file=sys.stderr)
    if args.json:
        print_json(report.as_dict())
        return 0 if report.agreed else 1
    modes = ", ".join(f"{count:,} {mode}" for mode, count in report.programs.items()) or "none"
    print(f"Linux {report.kernel}, kvm_intel {'with' if report.apicv else 'without'} APICv, seed {report.seed}")
    print(f"  the same: {report.compared:,} programs ({modes}), {report.steps:,} steps, {report.lines:,} trace lines")
    print(f"  the same in a second run: {report.repeated:,}")
    if report.restarted:
        print(f"  the machine stopped and was booted again: {report.restarted:,}")
    for name, count in report.faults.items():
        print(f"  a fault of Bochs: {name}: {count:,}")
    if report.left_out:
        print(f"  left out for such a fault: {report.left_out:,}")
    for story in report.stories:
        print(f"\ndifference: {story.text()}")
    return 0 if report.agreed else 1


class _Kept:
    """A file that has a run's report after each program; a run that is ended goes on there."""

    def __init__(self, name: str) -> None:
        self._file = Path(name)
        if not self._file.parent.is_dir() or self._file.is_dir():
            raise ValueError(f"--keep: {quoted(name)} cannot be a file")

    def report(self) -> VmxReport | None:
        """What is there; None where that is nothing, something else or a difference, which are begun anew."""
        from fastexit.kvm.lab.vmx import VmxReport

        try:
            kept = json.loads(self._file.read_text())
            return None if kept["differences"] else VmxReport.of(kept)
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def write(self, report: VmxReport) -> None:
        """The report so far, whole at any moment."""
        scratch = self._file.with_name(self._file.name + ".new")
        scratch.write_text(json.dumps(report.as_dict(), indent=2) + "\n")
        scratch.replace(self._file)


def get_bochs(apt: Any, as_json: bool) -> int:
    """``fastexit kernels get bochs``."""
    from fastexit.kvm.lab import bochs

    tree = bochs.get(apt)
    version = bochs.version(tree)
    if as_json:
        print_json({"bochs": version, "directory": str(tree.root)})
    else:
        print(f"Bochs {version} in {tree.root}")
    return 0


def boot(args: argparse.Namespace) -> int:
    """``fastexit kernels boot VERSION --vendor vmx``."""
    from fastexit.kvm.lab.vmx import VmxLab

    with VmxLab(args.version, image=args.image, modules=args.modules) as lab:
        seconds, found = lab.machine.boot_seconds, lab.parameters()
    if args.json:
        print_json({"boot_seconds": round(seconds, 1), "kernel": lab.kernel.as_dict(), "kvm_intel": found})
        return 0
    print(f"{lab.kernel.version} came up in {seconds:.1f} s")
    for name, value in found.items():
        print(f"  {name}: {value}")
    return 0


def paths(args: argparse.Namespace) -> int:
    """``fastexit kernels paths VERSION``."""
    from fastexit.kvm.lab import kernels
    from fastexit.kvm.lab.paths import Measured, measured

    if args.version is None and args.image is None:
        raise ValueError("give either a version, or --image and --modules")
    if args.vendor != "vmx":
        raise ValueError(f"--vendor {quoted(args.vendor)[1:-1]}: path lengths are read off in the VMX lab alone")
    kernel = kernels.find(args.version) if args.version is not None else kernels.own(args.image, args.modules)
    found: Measured = measured(kernel)
    if args.json:
        print_json(found.as_dict())
        return 0
    print(f"Linux {found.kernel}: instructions, least and median of {found.repetitions}")
    for one in found.lengths:
        way = "" if one.to_receiver is None else f", to the receiver {one.to_receiver_least:,} ({one.to_receiver:,})"
        print(f"  {one.name}, receiver {one.receiver}: exit {one.exit_least:,} ({one.exit:,}){way}")
    return 0
