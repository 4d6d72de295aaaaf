"""The faults of mutants_irqchip.diff, planted into the model one at a time: does the comparison of irqchips notice?

    NUMBA_DISABLE_JIT=1 python tests/irqchip_mutants.py [--kvm] [--seed N] [--only TEXT]

They are planted in this process, as lab_mutants.py does it. Operations are those of `fastexit verify --kind irqchip`;
the kernel is the plain one of irqchip_plain.py, or with ``--kvm`` that of this machine, which agree. What was found is
not tried again. build/verify/planted-irqchip.json has the results, written after each fault.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import irqchip_plain
from fastexit.kvm.irqchip import IrqchipTwins
from fastexit.kvm.judge import Judge, local
from fastexit.kvm.tracefs import EVENTS, KernelTrace
from irqchip_pair import played
from lab_mutants import planted
from mutants import Mutant, parsed

ROOT = Path(__file__).resolve().parents[1]
KEPT = ROOT / "build" / "verify" / "planted-irqchip.json"
MUTANTS = tuple(parsed(Path(__file__).with_name("mutants_irqchip.diff").read_text()))
OPERATIONS = 20_000


def told(where: Judge, witness: Any, operations: int, seed: int) -> tuple[int, str | None]:
    """How many operations it took to see a difference, and which one; all of them and None."""
    done: Counter[str] = Counter()
    try:
        found = played(IrqchipTwins, operations, seed, judge=where, witness=witness, ends=done)
    except Exception as error:  # a side that raises what it may not is as good a difference as any
        return done.total() + 1, f"{type(error).__name__}: {error}"
    return done.total() + (found is not None), None if found is None else found.text


def hunted(where: Judge, mutant: Mutant, operations: int, seed: int) -> dict[str, Any]:
    """What became of one fault."""
    real = where.name.startswith("/dev")
    witness = (KernelTrace() if real else irqchip_plain.PlainTrace(frozenset(EVENTS))) if mutant.traced else None
    with planted(mutant):
        done, text = told(where, witness, operations, seed)
    return {"found": text is not None, "operations": done, "text": text}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kvm", action="store_true")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--operations", type=int, default=OPERATIONS)
    parser.add_argument("--only", default="", help="faults that are told with this text")
    parser.add_argument("--to", type=Path, default=KEPT, help="file of results")
    arguments = parser.parse_args()
    where = local() if arguments.kvm else irqchip_plain.judge()
    results = json.loads(arguments.to.read_text())["irqchip"] if arguments.to.exists() else []
    arguments.to.parent.mkdir(parents=True, exist_ok=True)
    survived = 0
    for mutant in MUTANTS:
        if arguments.only not in mutant.what:
            continue
        if any(one["what"] == mutant.what and one["found"] for one in results):
            continue
        told_of: dict[str, Any] = {"trap": mutant.trap, "what": mutant.what, "kernel": where.name, "kind": "irqchip"}
        told_of |= {"traced": mutant.traced} | hunted(where, mutant, arguments.operations, arguments.seed)
        survived += not told_of["found"]
        results.append(told_of)
        arguments.to.write_text(json.dumps({"irqchip": results}, indent=1) + "\n")
        print(json.dumps(told_of), file=sys.stderr, flush=True)
    return survived


if __name__ == "__main__":
    sys.exit(main())
