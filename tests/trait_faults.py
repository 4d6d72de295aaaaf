"""Every trait flipped, one at a time, in a generation's row: does the generation's own kernel notice?

    python tests/trait_faults.py 5.10 6.1 6.12 6.18 7.3 --operations 20000 > build/verify/faults.json

A row with one wrong cell is a model of a kernel that nobody has. Each fault is given plain operations and then traced
ones, until a difference is found or they are used up. Traits that need what a lab's machine lacks are named in BEYOND,
and are tried all the same with ``--all``.
"""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

import fastexit as fx
from fastexit.profile import PROFILES, Profile
from fastexit.traits import Trait

NEEDS_APICV = "posted interrupts and APICv: the emulated CPU of the SVM lab has none"
NEEDS_AVIC = "AVIC: no emulator has it"
NEEDS_VMX = "a VMX CPU: the VMX lab"
NEEDS_FAST = "fast exits, which SVM takes with a next RIP alone: the emulated CPU saves none"
BEYOND: dict[str, str] = {
    **dict.fromkeys(("AVIC_LDR_LOOSE", "INHIBIT_X2APIC"), NEEDS_AVIC),
    **dict.fromkeys(("HV_TIMER_CANCELLED", "SET_LAPIC_KEEPS_WAIT"), NEEDS_VMX),
    **dict.fromkeys(("SVM_EXIT_32", "SVM_NEXT_RIP", "HLT_FAST", "INVD_FAST"), NEEDS_FAST),
    "NV_WHATEVER_IF": NEEDS_APICV,
    **dict.fromkeys(
        ("PI_KICK", "PI_EMPTY_LOSES_RVI", "PI_NOTIFIES_SELF", "SN_ON_EVERY_PUT", "NV_BEFORE_BLOCKING"), NEEDS_APICV
    ),
    **dict.fromkeys(
        ("RESTORE_CLEARS_PIR_LAST", "TICK_POSTED_AT_ONCE", "TICK_ONLY_IN_RUN", "POSTS_TIMER_ANYWAY"), NEEDS_APICV
    ),
    **dict.fromkeys(
        ("INHIBITS", "INHIBIT_ID_BASE", "INHIBIT_MAP", "INHIBIT_REQUESTS_EVENT", "APICV_AT_ENTRY"), NEEDS_APICV
    ),
    **dict.fromkeys(
        ("AVIC_MANY_SCANNED", "AVIC_OLD", "X2AVIC_WRITES_EXIT", "AVIC_ID_REFUSED", "TRACE_DOORBELL"), NEEDS_AVIC
    ),
    **dict.fromkeys(("V_TPR_KEPT_BY_AVIC", "CR8_FOLLOWS_AVIC", "IRQWIN_COUNTED"), NEEDS_AVIC),
    **dict.fromkeys(("TRACE_EXIT_LATE_VMX", "X2APIC_READS_UNCHECKED", "TSCDL_HV_TIMER", "MSR_IMM"), NEEDS_VMX),
    **dict.fromkeys(("PREEMPTION_TIMER_FAST", "FORCED_EXIT_HANDLED", "HV_TIMER_CANCELLED_FIRST"), NEEDS_VMX),
    **dict.fromkeys(("MODE_KEEPS_HV_TIMER", "REENTRY_COUNTED", "WAIT_TRACED_LATE"), NEEDS_VMX),
    **dict.fromkeys(("ICR_REENTERS", "ICR_NO_SHORTHAND", "ICR_NO_BROADCAST", "ICR_NO_RESERVED"), NEEDS_FAST),
    **dict.fromkeys(("ICR_ANY_RESOLVED", "TSCDL_ALWAYS", "SKIP_AFTER_TRACE", "SKIP_HONOURED"), NEEDS_FAST),
    **dict.fromkeys(("HOOK_IRQOFF", "SKIP_LATE", "GUARD_L2", "TRACE_WRITE_FIRST", "SRCU_IN_FASTPATH"), NEEDS_FAST),
}
"""Traits that the SVM lab cannot show, and what it would take."""


def flipped(row: Profile, release: str, trait: Trait) -> Profile:
    """A generation's row as its judge's release has it, but for one trait."""
    return row._replace(traits=fx.generation(release).traits ^ trait, stable=())


def tried(lab: Any, trait: Trait, operations: int) -> dict[str, Any]:
    """What the judge says of a row with this trait flipped."""
    kernel = lab.host.kernel
    row = PROFILES[kernel]
    told: dict[str, Any] = {"kernel": kernel, "trait": trait.name, "found": False}
    try:
        PROFILES[kernel] = flipped(row, lab.host.version or lab.host.release, trait)
        for traced in (False, True):
            report = fx.kvm.verify(operations, other=lab, traced=traced, shorten=0)
            told["operations"] = report.operations
            if report.divergence is not None:
                found = report.divergence
                return told | {"found": True, "kind": found.kind, "traced": traced, "text": found.text}
    finally:
        PROFILES[kernel] = row
    return told


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("kernels", nargs="+", metavar="KERNEL")
    parser.add_argument("--operations", type=int, default=20_000)
    parser.add_argument("--all", action="store_true", help="those that are beyond this lab, too")
    parser.add_argument("--traits", help="these alone, separated by commas")
    parser.add_argument("--skip", help="a file of earlier results: what was found there is not tried again")
    arguments = parser.parse_args()
    wanted = [t for t in Trait if arguments.all or t.name not in BEYOND]
    if arguments.traits:
        wanted = [Trait[name] for name in arguments.traits.split(",")]
    results = json.load(open(arguments.skip))["tried"] if arguments.skip else []
    known = {told["trait"] for told in results if told["found"]}
    for kernel in arguments.kernels:
        with fx.kvm.Lab(kernel) as lab:
            for trait in wanted:
                if trait.name not in known:
                    told = tried(lab, trait, arguments.operations)
                    results.append(told)
                    known |= {trait.name} if told["found"] else set()
                    print(json.dumps(told), file=sys.stderr, flush=True)
    print(json.dumps({"tried": results, "beyond": BEYOND}, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
