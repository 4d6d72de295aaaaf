"""Runs IPIs through one side and exits: what valgrind counts. ``python counted.py SIDE IPIS``, see instructions.py."""

from __future__ import annotations

import sys

import streams
from lower_bound import LowerBound

SIDES = "fast", "fast one owner", "generic", "bound", "bound one owner"
VCPUS = 64


def main(side: str, n: int) -> None:
    """One pass over n IPIs, behind a short one that compiles and touches everything."""
    m = streams.machine(VCPUS, threads="one owner" not in side)
    m.fastpath = side != "generic"
    run = LowerBound(m).run if side.startswith("bound") else m.run
    run(streams.ipis(m, 100))
    exits = streams.ipis(m, n)
    run(exits)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
