"""Cycles that a fast exit saves, as a range: what a cost profile has measured is a number, what it assumes is not.

Models: time. A stage whose number the profile calls assumed counts as half to one and a half times that number; stages
that both ways pay the same cancel out, assumed or not.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from fastexit.costs.profile import CostProfile

LEAST, MOST = 0.5, 1.5
"""What an assumed number may be of itself."""


class Cycles(NamedTuple):
    """From ``least`` to ``most``."""

    least: float
    most: float

    def plus(self, other: Cycles, n: float) -> Cycles:
        """With so many of another."""
        return Cycles(self.least + other.least * n, self.most + other.most * n)

    def over(self, n: float) -> Cycles:
        """For each of so many."""
        return Cycles(self.least / n, self.most / n)


def saved(costs: CostProfile, generic: Mapping[str, int], fast: Mapping[str, int]) -> Cycles:
    """What the stages of the generic way cost above those of the fast way.

    >>> from fastexit.costs.profile import cost_profile
    >>> saved(cost_profile("skylake-mitigations-off"), {"srcu_lock": 40, "icr": 10}, {"icr": 10}).most >= 40
    True
    """
    least = most = 0.0
    for stage in {*generic, *fast}:
        cycles = generic.get(stage, 0) - fast.get(stage, 0)
        factors = (LEAST, MOST) if assumed(costs, stage) else (1.0, 1.0)
        low, high = sorted(cycles * factor for factor in factors)
        least, most = least + low, most + high
    return Cycles(least, most)


def assumed(costs: CostProfile, stage: str) -> bool:
    """Whether the number of a stage has no better source than that."""
    return costs.costs[stage].source.startswith("assumed")
