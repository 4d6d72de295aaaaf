"""The plain irqchip of oracle_irqchip.py in the model's place: twins of it and of a real kernel; no tests are here.

NUMBA_DISABLE_JIT=1 python tests/irqchip_pair.py 100000 [SEED [traced]]
"""

from __future__ import annotations

import random
import sys
import time
from collections import Counter
from typing import Any

import oracle_irqchip
from fastexit.kvm.irqchip import IrqchipTwins, Ran
from fastexit.kvm.judge import Judge, local
from fastexit.kvm.operations import Op, describe
from fastexit.kvm.shrink import shortened
from fastexit.kvm.tracefs import KernelTrace
from fastexit.kvm.twins import Divergence
from irqchip_plain import made, run

MOST_SHOWN = 30


class Lines(list[str]):
    """The oracle's trace with the face of the library's."""

    def enable(self) -> None:
        """It always is."""

    def disable(self) -> None:
        """It never is."""

    def lines(self) -> list[str]:
        return list(self)


class PlainTwins(IrqchipTwins):
    """As IrqchipTwins, the model being the plain one."""

    machine: type[oracle_irqchip.Machine] = oracle_irqchip.Machine

    def make_model(self) -> Any:
        machine = made(self.machine, self.model_keywords())
        machine.trace = Lines()
        return machine

    def model_run(self, op: Op) -> Ran:
        host = self.host
        result, eois, left = run(self.model, op, eoi_at_injection=host.eoi_at_injection, one_entry=host.one_entry)
        return result, tuple(eois), tuple(left)


def played(
    cls: type[IrqchipTwins],
    operations: int,
    seed: int = 1,
    *,
    judge: Judge | None = None,
    witness: Any = None,
    ends: Counter[str] | None = None,
) -> Divergence | None:
    """Sessions as `fastexit verify` makes them: the first difference, or None."""
    where = judge or local()
    done = number = 0
    while done < operations:
        rng = random.Random(f"{seed}/{cls.kind}/{number}")
        number += 1
        try:
            with cls(cls.draw(rng, where.host, None), witness, where) as twins:
                for op in twins.beginning(rng):
                    twins.step(op)
                for _ in range(min(cls.operations_each, operations - done)):
                    op = twins.draw_op(rng)
                    done += 1
                    twins.step(op)
                    if ends is not None:
                        ends[op[0]] += 1
                twins.settle()
        except Divergence as found:
            if found.late and shortened(cls, found, witness, 0) is None:
                print(f"late: {found.text}", file=sys.stderr)
                continue
            found.operations = done  # type: ignore[attr-defined]
            return found
    return None


def main() -> int:
    operations, seed, traced = (int(sys.argv[1]), int((sys.argv[2:] or ["1"])[0]), sys.argv[3:] == ["traced"])
    ends: Counter[str] = Counter()
    began = time.monotonic()
    witness = KernelTrace() if traced else None
    found = played(PlainTwins, operations, seed, ends=ends, witness=witness)
    print(dict(ends), f"{time.monotonic() - began:.0f} s")
    if found is None:
        print(f"no difference in {operations:,} operations")
        return 0
    print(f"behind {found.operations}: {found.text}")  # type: ignore[attr-defined]
    short = shortened(PlainTwins, found, witness, 30) or found
    print(short.setup, short.text)
    for op in short.history[-MOST_SHOWN:]:
        print("   ", describe(op))
    return 1


if __name__ == "__main__":
    sys.exit(main())
