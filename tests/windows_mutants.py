"""The faults of mutants_hyperv.diff, planted into the model one at a time: does a kernel of the lab notice?

    NUMBA_DISABLE_JIT=1 python tests/windows_mutants.py 6.12

Stories are those of `fastexit verify --kind hyperv`, seed 1. A story that the model tells with the fault as it does
without is one that no kernel can tell them apart by, so it is not carried over; the first one that it tells otherwise
is. What was found is not tried again. build/verify/planted-windows.json has the results, written after each fault.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import fastexit as fx
from fastexit.kvm.judge import Judge
from fastexit.kvm.lab import hyperv
from fastexit.kvm.twins import Divergence
from lab_mutants import planted
from mutants import Mutant, parsed

ROOT = Path(__file__).resolve().parents[1]
KEPT = ROOT / "build" / "verify" / "planted-windows.json"
MUTANTS = tuple(parsed(Path(__file__).with_name("mutants_hyperv.diff").read_text()))
EACH = hyperv.HypervTwins.operations_each
Right = dict[tuple[int, bool], list[hyperv.Step]]
"""Stories as the model tells them, by number and whether they are traced."""


class Nobody:
    """A real machine for those who ask it nothing; anything can be called, and nothing comes of it."""

    def __init__(self, *_: Any, apic_ids: Any = (), **__: Any) -> None:
        self.device = mock.MagicMock()
        self.fd = self.run_bytes = self.memory = 0
        self.vcpus = [SimpleNamespace(fd=0) for _ in apic_ids]

    def close(self) -> None:
        """Nothing to close."""


class Told(hyperv.HypervTwins):
    """A story without a kernel."""

    def __init__(self, setup: Any, witness: Any, judge: Judge) -> None:
        keywords = {**judge.host.keywords(), **setup.keywords()}
        alone = SimpleNamespace(host=judge.host, make=lambda **given: _real(given, keywords))
        with mock.patch.object(hyperv.G, "WindowsGuest", Nobody), mock.patch.object(hyperv, "LabTrace", Nobody):
            super().__init__(setup, witness, alone)  # type: ignore[arg-type]


def _real(given: dict[str, Any], keywords: dict[str, Any]) -> Nobody:
    real = Nobody(**given)
    real.keywords = keywords  # type: ignore[attr-defined]
    return real


def story(cls: type[hyperv.HypervTwins], where: Judge, number: int, traced: bool) -> Iterator[hyperv.Step]:
    """A story's steps on the model, the kernel's part behind them."""
    rng = random.Random(f"1/hyperv/{number}")
    with cls(cls.draw(rng, where.host, None), object() if traced else None, where) as twins:
        for op in twins.beginning(rng):
            twins.step(op)
            yield twins.steps[-1]
        for _ in range(EACH):
            twins.step(twins.draw_op(rng))
            yield twins.steps[-1]
        if cls is not Told:
            twins.finish()


def hunted(
    where: Judge, mutant: Mutant, limit: int, right: dict[tuple[int, bool], list[hyperv.Step]]
) -> dict[str, Any]:
    """Behind how many operations the kernel differs from the model with the fault."""
    done = number = 0
    while done < limit:
        true = right.get((number, mutant.traced))
        if true is None:
            true = right[number, mutant.traced] = list(story(Told, where, number, mutant.traced))
        with planted(mutant):
            told = zip(story(Told, where, number, mutant.traced), true, strict=False)
            if any(one != other for one, other in told):
                try:
                    for _ in story(hyperv.HypervTwins, where, number, mutant.traced):
                        pass
                except Divergence as found:
                    return {
                        "found": True,
                        "operations": done + len(found.history),
                        "kind": "hyperv",
                        "traced": mutant.traced,
                        "text": found.text,
                    }
        done += len(true)
        number += 1
    return {"found": False, "operations": done}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("kernel", metavar="KERNEL")
    parser.add_argument("--operations", type=int, default=20_000, help="for each fault")
    parser.add_argument("--to", type=Path, default=KEPT, help="file of results")
    arguments = parser.parse_args()
    results = json.loads(arguments.to.read_text())["windows"] if arguments.to.exists() else []
    arguments.to.parent.mkdir(parents=True, exist_ok=True)
    right: Right = {}
    with fx.kvm.Lab(arguments.kernel, exact=True) as lab:
        where = lab.judge()
        for mutant in MUTANTS:
            if any(told["what"] == mutant.what and told["found"] for told in results):
                continue
            told = {"kernel": lab.kernel.version, "trap": mutant.trap, "what": mutant.what}
            told |= hunted(where, mutant, arguments.operations, right)
            results = [one for one in results if one["what"] != mutant.what] + [told]
            arguments.to.write_text(json.dumps({"windows": results}, indent=1) + "\n")
            print(json.dumps(told), file=sys.stderr, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
