"""Whom an exit's effects are for: one vCPU and what the host has to do for it, target by target.

The kernels write it down while they deliver (kernels/shared.tell), because an outcome has the effects of all targets in
one, and what each of them needed cannot be seen afterwards.
"""

from __future__ import annotations

from typing import NamedTuple

from fastexit import layout as L
from fastexit.outcome import TARGETS_COUNT_SHIFT, TARGETS_EFFECT_SHIFT, TARGETS_VCPU, Effect


class Target(NamedTuple):
    """A vCPU's index, and what the host has to do for it: one Effect."""

    vcpu: int
    effect: Effect


def told(mem: memoryview, sender: int) -> tuple[Target, ...]:
    """Read the list of a sender (a vCPU's index, or layout.HOST): its targets in the order in which they were told."""
    head = mem[L.KVM + sender * L.KVM_STRIDE + L.K_TARGETS]
    n = min(head >> TARGETS_COUNT_SHIFT, L.MAX_VCPUS)
    if not n:
        return ()
    row = L.TARGETS + sender * L.TARGETS_STRIDE
    return _target(head), *(_target(mem[row + (i >> 2)] >> 16 * (i & 3)) for i in range(1, n))


def _target(entry: int) -> Target:
    return Target(entry & TARGETS_VCPU, Effect(entry >> TARGETS_EFFECT_SHIFT & 0xF))
