"""Every trait flipped, one at a time, in a generation's row: does the generation's own kernel notice?

    python tests/trait_faults.py 6.12 6.1 5.10                      # kvm_amd under QEMU
    python tests/trait_faults.py 6.12 7.3 --judge vmx               # kvm_intel under Bochs, --no-apicv: without APICv
    python tests/trait_faults.py --judge here                       # this machine's /dev/kvm

A row with one wrong cell is a model of a kernel that nobody has. Each fault is given operations of one kind after the
other, the likeliest first, until a difference is found or they are used up. build/verify/faults.json has the
results. It is written after each fault, and what was found once is not tried again. Traits that no lab can show are
named in BEYOND, with what it would take, and are tried all the same with ``--all``.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import fastexit as fx
from fastexit.kvm.lab.vmx import VmxLab, drawn_program, modes_of, played
from fastexit.kvm.lab.vmxcompare import differences
from fastexit.kvm.lab.vmxmodel import Player, Setup
from fastexit.kvm.lab.vmxsteps import Step
from fastexit.profile import PROFILES
from fastexit.traits import Trait

KEPT = Path(__file__).resolve().parents[1] / "build" / "verify" / "faults.json"
TRIES = 2
"""A program that differs has to do so each time, without a fault of Bochs."""
MODES = modes_of(None, None)
STEPS_EACH = 16
"""Operations of a program of the VMX lab."""

NEEDS_AVIC = "AVIC: no emulator has it"
NEEDS_NEXT_RIP = "fast exits of SVM, which take a next RIP: the emulated CPU saves none"
NEEDS_VT_D = "VT-d posting: no emulator has it"
NEEDS_PMU = "a guest's performance counters: the emulated CPUs have none that KVM offers"
NEEDS_COUNTERS = "stat.exits, which the labs do not read"
NEEDS_LENGTHS = "path lengths: no line, register or interrupt differs"
NEEDS_PROGRAMS = "programs of the VMX lab that nobody draws: "
BEYOND: dict[str, str] = {
    **dict.fromkeys(("AVIC_LDR_LOOSE", "INHIBIT_X2APIC", "AVIC_MANY_SCANNED", "AVIC_OLD"), NEEDS_AVIC),
    **dict.fromkeys(("X2AVIC_WRITES_EXIT", "AVIC_ID_REFUSED", "TRACE_DOORBELL"), NEEDS_AVIC),
    **dict.fromkeys(("V_TPR_KEPT_BY_AVIC", "CR8_FOLLOWS_AVIC"), NEEDS_AVIC),
    **dict.fromkeys(("SVM_EXIT_32", "SVM_NEXT_RIP", "TRACE_EXIT_LATE_SVM"), NEEDS_NEXT_RIP),
    **dict.fromkeys(("SN_ON_EVERY_PUT", "NV_BEFORE_BLOCKING", "NV_WHATEVER_IF"), NEEDS_VT_D),
    **dict.fromkeys(("LVTPC_MASKED", "LVTPC_KEPT_ON_AMD"), NEEDS_PMU),
    **dict.fromkeys(("REENTRY_COUNTED", "FILTER_RANGES_COUNTED"), NEEDS_COUNTERS),
    **dict.fromkeys(("SKIP_LATE", "SKIP_AFTER_TRACE", "ICR_REENTERS", "SRCU_IN_FASTPATH", "HLT_FAST"), NEEDS_LENGTHS),
    "FORCED_EXIT_HANDLED": NEEDS_LENGTHS,
    **dict.fromkeys(
        ("PI_EMPTY_LOSES_RVI", "PI_NOTIFIES_SELF"),
        "a notification that finds nothing: not asked since Bochs was mended there",
    ),
    "PI_KICK": "a kick that finds its vCPU outside: nothing tells it from a wake-up",
    "WAIT_TRACED_LATE": "kvm_wait_lapic_expire, which is not compared: how long it was depends on the time of day",
    "GUARD_L2": NEEDS_PROGRAMS + "a guest's own guest",
    "SKIP_HONOURED": NEEDS_PROGRAMS + "single steps",
    "INVD_FAST": NEEDS_PROGRAMS + "INVD",
    "MSR_IMM": "WRMSR with an immediate: the emulated CPUs have none",
    "ICR_NO_RESERVED": NEEDS_PROGRAMS + "reserved ICR bits on kernels that take them",
    "TRACE_WRITE_FIRST": "the fast path of 5.4 and 5.6, of which there is no package",
    "TIMER_NO_CATCH_UP": NEEDS_PROGRAMS + "a periodic timer that is late by a period",
    **dict.fromkeys(
        ("HV_TIMER_CANCELLED", "HV_TIMER_CANCELLED_FIRST", "MODE_KEEPS_HV_TIMER"),
        NEEDS_PROGRAMS + "timers by TMICT, on the preemption timer",
    ),
    "DEADLINE_WRITTEN_IN_MODE_3": NEEDS_PROGRAMS + "a deadline in the reserved timer mode",
    "DEADLINE_WRITTEN_DISABLED": "a kernel that reads the deadline of a disabled APIC, too",
    "POSTS_TIMER_ANYWAY": "pi_inject_timer, which needs isolated CPUs",
    **dict.fromkeys(
        ("RESTORE_CLEARS_PIR_LAST", "SET_LAPIC_STORES_BASE", "SET_LAPIC_KEEPS_WAIT", "TICK_ONLY_IN_RUN"),
        NEEDS_PROGRAMS + "KVM_SET_LAPIC and deadlines of a vCPU with APICv",
    ),
    **dict.fromkeys(
        ("INHIBIT_REQUESTS_EVENT", "APICV_AT_ENTRY", "PIR_WHILE_ACTIVE"),
        NEEDS_PROGRAMS + "an inhibit while an interrupt waits",
    ),
    "MMIO_NOT_VECTORING": "a guest whose stack or vector table is a device",
}
"""Traits that no lab can show, and what it would take."""

KINDS = ("msr", "guest", "runs", "traces", "timers")
LIKELIEST: dict[str, str] = {
    **dict.fromkeys(
        (t.name or "" for t in Trait if "TIMER" in t.name or "DEADLINE" in t.name or "TICK" in t.name),  # type: ignore[operator]
        "timers",
    ),
    **dict.fromkeys((t.name or "" for t in Trait if "TRACE" in t.name), "traces"),  # type: ignore[operator]
    "ONE_SHOT_RESTORES_EXPIRED": "timers",
    "TMCCT_RESTORED": "timers",
    "UNHALT_KEPT": "runs",
    "BLOCKED_INIT_WAKES": "runs",
}
"""The kind of operations that most likely shows a trait."""


@contextmanager
def flipped(release: str, trait: Trait) -> Iterator[None]:
    """A generation's row as a release of it has it, but for one trait."""
    row = fx.generation(release)
    true = PROFILES[row.name]
    try:
        PROFILES[row.name] = row._replace(traits=row.traits ^ trait, stable=(), later=())
        yield
    finally:
        PROFILES[row.name] = true


def tried(judge: Any, release: str, trait: Trait, operations: int, kinds: tuple[str, ...]) -> dict[str, Any]:
    """What a judge says of a row with this trait flipped: what was found, behind how many operations of all kinds."""
    if isinstance(judge, VmxLab):
        return by_programs(judge, release, trait, operations)
    with flipped(release, trait):
        return by_kinds(judge, operations, kinds)


def by_programs(lab: VmxLab, release: str, trait: Trait, operations: int) -> dict[str, Any]:
    """Programs of the VMX lab, those alone that a model of the wrong row carries out in another way.

    A program that both rows carry out alike shows nothing, so it need not be run; its steps count all the same.
    """
    done = 0
    for number in range(operations // STEPS_EACH):
        mode = MODES[number % len(MODES)]
        setup, steps, true = drawn_program(1, mode, number // len(MODES), release, apicv=lab.apicv)
        done += len(steps)
        with flipped(release, trait):
            done_of, player = as_far_as_it_goes(setup, steps, release)
            seen = player.end()
        if len(done_of) < len(steps):
            true = played(setup, done_of, release)
        if not differences(player.machine.trace.events, done_of, seen, true.end()):
            continue
        with flipped(release, trait):
            tries = [lab._tried(setup, done_of, player)[:2] for _ in range(TRIES)]
        if all(found and not known for found, known in tries):
            kind = f"{'x2APIC' if setup.x2apic else 'xAPIC'} programs{' with events' * setup.events}"
            return {"operations": done, "found": True, "kind": kind, "traced": False, "text": str(tries[0][0][0])}
    return {"operations": done, "found": False}


def as_far_as_it_goes(setup: Setup, steps: list[Step], release: str) -> tuple[list[Step], Player]:
    """The steps that a row's model can do, and that model: the next one's vCPU sleeps there, or begins nowhere."""
    player = Player(setup, release)
    for number, step in enumerate(steps):
        if player.seen.asleep[step.vcpu]:
            return steps[:number], player
        try:
            player.step(step)
        except ValueError:
            return steps[:number], played(setup, steps[:number], release)
    return steps, player


def by_kinds(judge: Any, operations: int, kinds: tuple[str, ...]) -> dict[str, Any]:
    """So many operations of each kind, and of those that can be traced once more with their lines."""
    done = 0
    for kind, traced in [(kind, False) for kind in kinds] + [(k, True) for k in ("msr", "guest") if k in kinds]:
        report = fx.kvm.verify(operations, other=judge, only=kind, traced=traced, shorten=0)
        done += report.operations
        if report.divergence is not None:
            found = report.divergence
            return {"operations": done, "found": True, "kind": found.kind, "traced": traced, "text": found.text}
    return {"operations": done, "found": False}


@contextmanager
def judged(judge: str, kernel: str, apicv: bool) -> Iterator[tuple[Any, str, str]]:
    """A judge, its release, and what reports call it."""
    if judge == "here":
        yield None, fx.kvm.host.running().release, "/dev/kvm"
    elif judge == "svm":
        with fx.kvm.Lab(kernel) as lab:
            yield lab, lab.kernel.version, "SVM"
    else:
        with fx.kvm.Lab(kernel, vendor="vmx", apicv=apicv) as lab:
            yield lab, lab.kernel.version, "VMX" if apicv else "VMX without APICv"


def order(trait: Trait, kinds: tuple[str, ...]) -> tuple[str, ...]:
    """Kinds of operations, the likeliest first."""
    first = LIKELIEST.get(trait.name or "")
    return tuple(sorted(kinds, key=lambda kind: kind != first))


def kept(path: Path) -> list[dict[str, Any]]:
    """What is known so far."""
    return json.loads(path.read_text())["tried"] if path.exists() else []


def keep(path: Path, *told: dict[str, Any]) -> None:
    """Adds to it: others may have done so meanwhile."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"tried": [*kept(path), *told], "beyond": BEYOND}, indent=1) + "\n")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("kernels", nargs="*", metavar="KERNEL")
    parser.add_argument("--judge", choices=("svm", "vmx", "here"), default="svm")
    parser.add_argument("--no-apicv", action="store_true", help="kvm_intel without APICv")
    parser.add_argument("--operations", type=int, default=20_000, help="of each kind, for each fault")
    parser.add_argument("--kinds", default=",".join(KINDS), help="these kinds of operations, separated by commas")
    parser.add_argument("--all", action="store_true", help="traits that are beyond the labs, too")
    parser.add_argument("--traits", help="these alone, separated by commas")
    parser.add_argument("--to", type=Path, default=KEPT, help="file of results")
    arguments = parser.parse_args()
    wanted = [t for t in Trait if arguments.all or t.name not in BEYOND]
    if arguments.traits:
        wanted = [Trait[name] for name in arguments.traits.split(",")]
    kinds = tuple(arguments.kinds.split(","))
    for kernel in arguments.kernels or [""] * (arguments.judge == "here"):
        with judged(arguments.judge, kernel, not arguments.no_apicv) as (judge, release, name):
            for trait in wanted:
                if any(told["trait"] == trait.name and told["found"] for told in kept(arguments.to)):
                    continue
                told = {"kernel": release, "judge": name, "trait": trait.name}
                told |= tried(judge, release, trait, arguments.operations, order(trait, kinds))
                keep(arguments.to, told)
                print(json.dumps(told), file=sys.stderr, flush=True)
    keep(arguments.to)
    return 0


if __name__ == "__main__":
    sys.exit(main())
