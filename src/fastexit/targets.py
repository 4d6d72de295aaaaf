"""Whom an exit's effects are for: one vCPU and what the host has to do for it, target by target.

The kernels write it down while they deliver (kernels/shared.tell), because an outcome has the effects of all targets in
one, and what each of them needed cannot be seen afterwards.
"""

from __future__ import annotations

from fastexit import layout as L
from fastexit.outcome import (
    CODE_EFFECTS,
    OUTCOMES,
    TARGETS_COUNT_SHIFT,
    TARGETS_EFFECT_SHIFT,
    Outcome,
    Target,
    target_of,
)


def told(mem: memoryview, sender: int) -> tuple[Target, ...]:
    """Read the list of a sender (a vCPU's index, or layout.HOST): its targets in the order in which they were told."""
    head = mem[L.KVM + sender * L.KVM_STRIDE + L.K_TARGETS]
    n = min(head >> TARGETS_COUNT_SHIFT, L.MAX_VCPUS)
    if not n:
        return ()
    row = L.TARGETS + sender * L.TARGETS_STRIDE
    return target_of(head), *(target_of(mem[row + (i >> 2)] >> 16 * (i & 3)) for i in range(1, n))


def tell(mem: memoryview, sender: int, targets: tuple[Target, ...]) -> None:
    """Write the list of a sender, as far as it has room."""
    targets = targets[: L.MAX_VCPUS]
    entries = [target.vcpu | target.effect << TARGETS_EFFECT_SHIFT for target in targets]
    row = L.TARGETS + sender * L.TARGETS_STRIDE
    for i, entry in enumerate(entries[1:], 1):
        at, shift = row + (i >> 2), 16 * (i & 3)
        mem[at] = mem[at] & ~(0xFFFF << shift) | entry << shift
    head = entries[0] if entries else 0
    mem[L.KVM + sender * L.KVM_STRIDE + L.K_TARGETS] = len(targets) << TARGETS_COUNT_SHIFT | head


class _Single(dict[int, Outcome]):
    """Code and target -> Outcome with that one target, filled on first sight."""

    def __missing__(self, key: int) -> Outcome:
        outcome = OUTCOMES[key >> 16].to((target_of(key & 0xFFFF),))
        if len(self) < 1 << 16:
            self[key] = outcome
        return outcome


_SINGLE = _Single()


def outcome_of(mem: memoryview, sender: int, code: int) -> Outcome:
    """The Outcome of a code, with the targets that its sender was told of."""
    if not code & CODE_EFFECTS:
        return OUTCOMES[code]
    head = mem[L.KVM + sender * L.KVM_STRIDE + L.K_TARGETS]
    if head >> TARGETS_COUNT_SHIFT == 1:
        return _SINGLE[code << 16 | head & 0xFFFF]
    return OUTCOMES[code].to(told(mem, sender))


def for_itself(vcpu: int, outcome: Outcome) -> Outcome:
    """The outcome of what had something to do for one vCPU, of which nobody was told: a timer's, for its own."""
    return outcome.to((Target(vcpu, outcome.effects),)) if outcome.effects else outcome
