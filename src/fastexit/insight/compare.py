"""Fast against generic on the same machine, interleaved: the quick form of the benchmark suite.

Both sides are this library's real paths. One machine, the same exits, one door; only Machine.fastpath differs. The fast
side and the generic side are timed back to back, each first in its turn, and each such pair gives one ratio; the median
of all pairs counts. A timing takes a fraction of a millisecond, far less than a scheduler's time slice: on a busy
machine most pairs are spared by other processes, and the median is one of those. Every timed IPI is a fresh one: each
exit has a target of its own that nobody has posted to, and the targets are emptied, untimed, before they are used
again. Otherwise nearly all exits would find the descriptor's ON bit set, and what is timed would be the way out of the
post.

What the two sides are made of differs from door to door, and a ratio says no more than that:

- Python door: a fast exit that re-enters the guest is one compiled call, by design: it is the dispatcher's fast route.
  The generic side calls the fast handler, which declines, builds an Exit and walks the whole run loop in Python, about
  a dozen methods. So the ratio counts the Python that the fast route spares, beside the modelled work. Generations that
  do not re-enter walk the run loop in Python on both sides.
- Batch door: compiled code on both sides, so the ratio is that of the modelled paths themselves.
- Until the IPI left: the run loop in Python on both sides, up to the step in which the IPI leaves.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from fastexit import layout as L
from fastexit import regs as R
from fastexit.exits.exit import Exit
from fastexit.insight.walk import STEPS, walk
from fastexit.jit import declare
from fastexit.machine import Machine
from fastexit.offers import room
from fastexit.outcome import CODE_EFFECTS_SHIFT, Effect


class Comparison(NamedTuple):
    """One kernel at one door: median ns per exit of each side, and the median over pairs of generic / fast."""

    kernel: str
    door: str
    fast_ns: float
    generic_ns: float
    ratio: float


def booted(kernel: str, vendor: str = "vmx", vcpus: int = 4, **keywords: Any) -> Machine:
    """A machine after boot with every vCPU in guest mode."""
    machine = Machine(vcpus=vcpus, kernel=kernel, vendor=vendor, **keywords)
    machine.boot_x2apic()
    for v in machine.vcpus:
        machine.dispatcher.start_run(v)
    return machine


def unicasts(machine: Machine, n: int, seed: int = 1) -> np.ndarray:
    """n WRMSR exits of vCPU 0: fixed physical unicast ICR writes, each to a target of its own, vectors 32..255.

    ValueError when the machine has fewer than n targets.
    """
    others = len(machine.vcpus) - 1
    if n > others:
        raise ValueError(f"{n} exits need {n} targets, the machine has {others}")
    rng = np.random.default_rng(seed)
    exits = np.zeros(n, dtype=L.EXIT)
    exits["reason"] = machine.dispatcher.vendor.wrmsr_reason
    exits["info"] = machine.dispatcher.vendor.wrmsr_info1
    exits["msr"] = R.MSR_X2APIC_ICR
    targets = 1 + rng.permutation(others)[:n].astype(np.uint64)
    exits["value"] = targets << np.uint64(32) | rng.integers(32, 256, n, dtype=np.uint64)
    return exits


def consume(machine: Machine) -> None:
    """Empty every posted-interrupt descriptor and IRR, as targets that took their interrupts would have."""
    n = len(machine.vcpus)
    hot = machine.words[L.HOT : L.HOT + n * L.HOT_STRIDE].reshape(n, L.HOT_STRIDE)
    hot[:, L.PID_PIR : L.PID_PIR + 4] = 0
    hot[:, L.PID_CONTROL_WORD] &= ~np.uint64(R.PID_ON)
    vectors = machine.words[L.VEC : L.VEC + n * L.VEC_STRIDE].reshape(n, L.VEC_STRIDE)
    vectors[:, L.VEC_IRR : L.VEC_IRR + 4] = 0


def notified(machine: Machine, codes: Iterable[int]) -> int:
    """How many outcome codes tell the host to notify a target that runs: by vector 0xF2 on VMX, by doorbell on SVM."""
    effect = Effect.DOORBELL if machine.vendor == "svm" else Effect.NOTIFY
    return sum(1 for code in codes if int(code) >> CODE_EFFECTS_SHIFT & effect)


def _python_door(machine: Machine, exits: np.ndarray) -> Callable[[], list[int]]:
    values = [int(value) for value in exits["value"]]
    wrmsr = machine.vcpus[0].wrmsr
    return lambda: [wrmsr(R.MSR_X2APIC_ICR, value).code for value in values]


def _batch_door(machine: Machine, exits: np.ndarray) -> Callable[[], np.ndarray]:
    return lambda: machine.run(exits)["code"]


class Door(NamedTuple):
    """A way in: what makes the callable that takes exits through it, how many exits, how many in one timing.

    A round takes all exits through the door on either side, ``passes`` times.
    """

    make: Callable[[Machine, np.ndarray], Callable[[], Iterable[int]]]
    exits: int
    at_once: int
    passes: int


DOORS: dict[str, Door] = {
    "python": Door(_python_door, 1_000 if declare.JIT else 20, 40, 1),
    "batch": Door(_batch_door, 4_000 if declare.JIT else 20, 4_000, 6 if declare.JIT else 1),
}
"""Door by name. Exits are few with interpreted kernels, whose times mean nothing but which take them all the same."""


AVIC_TARGETS = 250
"""On SVM: a vCPU whose id AVIC's tables have no entry for would switch AVIC off for the whole machine."""


def fresh_targets(door: str, vendor: str, kernel: str) -> int:
    """How many exits of one pass through a door can have a target of their own."""
    most = min(DOORS[door].exits, room(kernel).vcpus - 1)
    return min(most, AVIC_TARGETS) if vendor == "svm" else most


def _timed(
    kernel: str, door: str, machine: Machine, gos: Sequence[Callable[[], float]], rounds: int, passes: int = 1
) -> Comparison:
    """Pairs of go(), which returns ns an exit: both sides, each first in its turn. The first round warms both up."""
    times: dict[bool, list[float]] = {True: [], False: []}
    for i, go in enumerate(list(gos) * passes * (rounds + 1)):
        for side in (True, False) if i % 2 else (False, True):
            machine.fastpath = side
            times[side].append(go())
    fast, generic = (times[side][len(gos) * passes :] for side in (True, False))
    ratios = [g / f for f, g in zip(fast, generic, strict=True)]
    return Comparison(kernel, door, *(statistics.median(values) for values in (fast, generic, ratios)))


def _check_fresh(machine: Machine, codes: Iterable[int], n: int) -> None:
    """A comparison whose IPIs were not all fresh would time something else."""
    found = notified(machine, codes)
    if found != n:
        raise RuntimeError(f"{found} of {n} IPIs notified their target: the others found one pending")


def compare(kernel: str, door: str, *, vendor: str = "vmx", rounds: int = 25) -> Comparison:
    """Time whole exits of one kernel at one door ("python" or "batch"), fast and generic in turn."""
    make, _, at_once, passes = DOORS[door]
    n = fresh_targets(door, vendor, kernel)
    machine = booted(kernel, vendor, n + 1)
    exits = unicasts(machine, n)
    consume(machine)
    _check_fresh(machine, make(machine, exits)(), n)

    def timing(part: np.ndarray) -> Callable[[], float]:
        through = make(machine, part)

        def go() -> float:
            consume(machine)
            start = time.perf_counter_ns()
            through()
            return (time.perf_counter_ns() - start) / len(part)

        return go

    gos = [timing(exits[at : at + at_once]) for at in range(0, n, at_once)]
    return _timed(kernel, f"{door}, whole exit", machine, gos, rounds, passes)


def step_of_ipi(kernel: str, vendor: str, *, fastpath: bool) -> str:
    """Name the Dispatcher method in which the IPI of an ICR write leaves, as a walk shows it.

    ValueError when no IPI leaves.
    """
    walked = walk(R.MSR_X2APIC_ICR, R.icr(dest=1, vector=0xFD), kernel=kernel, vendor=vendor, fastpath=fastpath)
    if walked.ipi_step is None:
        raise ValueError(f"no IPI leaves on kernel {kernel}, vendor {vendor}")
    return STEPS[walked.ipi_step].method


def compare_until_ipi(kernel: str, *, vendor: str = "vmx", rounds: int = 25) -> Comparison:
    """Time from the exit until the IPI has left, in the Python dispatcher: what the patch set out to shorten.

    Up to 6.1 a fast exit still does the rest of the exit afterwards, so its whole time says little. The clock stops
    when the step returns in which, as a walk shows, the IPI leaves; that step differs between the two sides.
    """
    n = fresh_targets("python", vendor, kernel)
    machine = booted(kernel, vendor, n + 1)
    loop, v = machine.dispatcher, machine.vcpus[0]
    values = [int(value) for value in unicasts(machine, n)["value"]]
    left: list[int] = [0]

    def stamp(method: str) -> None:
        original = getattr(loop, method)

        def stamped(*args: Any) -> Any:
            result = original(*args)
            left[0] = time.perf_counter_ns()
            return result

        setattr(loop, method, stamped)

    steps = {side: step_of_ipi(kernel, vendor, fastpath=side) for side in (True, False)}

    def through() -> tuple[list[int], list[int]]:
        spent, codes = [], []
        for value in values:
            exit = Exit(loop.vendor.wrmsr_reason, R.MSR_X2APIC_ICR, value, loop.vendor.wrmsr_info1, length=2)
            start = time.perf_counter_ns()
            code = loop.run_exit(v, exit)
            spent.append(left[0] - start)
            codes.append(code)
        return spent, codes

    def go() -> float:
        consume(machine)
        stamp(steps[machine.fastpath])
        spent, _ = through()
        delattr(loop, steps[machine.fastpath])
        return statistics.median(spent)

    consume(machine)
    _check_fresh(machine, through()[1], n)
    return _timed(kernel, "python, until the IPI left", machine, [go], rounds)
