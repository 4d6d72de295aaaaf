"""Fast against generic on the same machine, interleaved: the quick form of the benchmark suite.

Both sides are this library's real paths. One machine, one exit, one door; only Machine.fastpath differs. A round times
the fast side and the generic side back to back and gives one ratio, so that a noisy neighbour hits both; the median of
all rounds counts.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from fastexit import layout as L
from fastexit import regs as R
from fastexit.dispatcher import Exit
from fastexit.machine import Machine
from fastexit.walk import STEPS, walk


class Comparison(NamedTuple):
    """One kernel at one door: median ns per exit of each side, and the median over rounds of generic / fast."""

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
    """n WRMSR exits of vCPU 0: fixed physical unicast ICR writes, uniform targets, vectors 32..255."""
    rng = np.random.default_rng(seed)
    exits = np.zeros(n, dtype=L.EXIT)
    exits["reason"] = machine.dispatcher.vendor.wrmsr_reason
    exits["info"] = machine.dispatcher.vendor.wrmsr_info1
    exits["msr"] = R.MSR_X2APIC_ICR
    targets = rng.integers(1, len(machine.vcpus), n, dtype=np.uint64)
    exits["value"] = targets << np.uint64(32) | rng.integers(32, 256, n, dtype=np.uint64)
    return exits


def consume(machine: Machine) -> None:
    """Empty every posted-interrupt descriptor, as targets that took their interrupts would have."""
    rows = machine.words[L.HOT : L.HOT + len(machine.vcpus) * L.HOT_STRIDE].reshape(-1, L.HOT_STRIDE)
    rows[:, L.PID_PIR : L.PID_PIR + 4] = 0
    rows[:, L.PID_CONTROL_WORD] &= ~np.uint64(R.PID_ON)


def _python_door(machine: Machine, exits: np.ndarray) -> Callable[[], None]:
    values = [int(value) for value in exits["value"]]
    wrmsr = machine.vcpus[0].wrmsr

    def door() -> None:
        for value in values:
            wrmsr(0x830, value)

    return door


def _batch_door(machine: Machine, exits: np.ndarray) -> Callable[[], None]:
    def door() -> None:
        machine.run(exits)

    return door


DOORS: dict[str, tuple[Callable[[Machine, np.ndarray], Callable[[], None]], int]] = {
    "python": (_python_door, 1_000),
    "batch": (_batch_door, 25_000),
}
"""Door -> how to go through it, and how many exits make one timing."""


def _timed(kernel: str, door: str, machine: Machine, go: Callable[[], float], rounds: int) -> Comparison:
    """Rounds of go(), which returns ns an exit: the fast side, then the generic side. The first round warms both up."""
    fast, generic = [], []
    for _ in range(rounds + 1):
        for side, times in ((True, fast), (False, generic)):
            machine.fastpath = side
            consume(machine)
            times.append(go())
    del fast[0], generic[0]
    ratios = [g / f for f, g in zip(fast, generic, strict=True)]
    return Comparison(kernel, door, *(statistics.median(values) for values in (fast, generic, ratios)))


def compare(kernel: str, door: str, *, vendor: str = "vmx", rounds: int = 25) -> Comparison:
    """Time whole exits of one kernel at one door ("python" or "batch"), fast and generic in turn."""
    machine = booted(kernel, vendor)
    make, n = DOORS[door]
    through = make(machine, unicasts(machine, n))

    def go() -> float:
        start = time.perf_counter_ns()
        through()
        return (time.perf_counter_ns() - start) / n

    return _timed(kernel, f"{door}, whole exit", machine, go, rounds)


def compare_until_ipi(kernel: str, *, vendor: str = "vmx", rounds: int = 25) -> Comparison:
    """Time from the exit until the IPI has left, in the Python dispatcher: what the patch set out to shorten.

    Up to 6.1 a fast exit still does the rest of the exit afterwards, so its whole time says little. The clock stops
    when the step returns in which, as a walk shows, the IPI leaves; that step differs between the two sides.
    """
    machine = booted(kernel, vendor)
    loop, v = machine.dispatcher, machine.vcpus[0]
    values = [int(value) for value in unicasts(machine, DOORS["python"][1])["value"]]
    left: list[int] = [0]

    def stamp(method: str) -> None:
        original = getattr(loop, method)

        def stamped(*args: Any) -> Any:
            result = original(*args)
            left[0] = time.perf_counter_ns()
            return result

        setattr(loop, method, stamped)

    steps = {}
    for side in (True, False):
        ipi_step = walk(R.MSR_X2APIC_ICR, values[0], kernel=kernel, vendor=vendor, fastpath=side).ipi_step
        if ipi_step is None:
            raise ValueError(f"no IPI leaves on kernel {kernel}, vendor {vendor}")
        steps[side] = STEPS[ipi_step].method

    def go() -> float:
        stamp(steps[machine.fastpath])
        spent = 0
        for value in values:
            exit = Exit(loop.vendor.wrmsr_reason, R.MSR_X2APIC_ICR, value, loop.vendor.wrmsr_info1, length=2)
            start = time.perf_counter_ns()
            loop.run_exit(v, exit)
            spent += left[0] - start
        delattr(loop, steps[machine.fastpath])
        return spent / len(values)

    return _timed(kernel, "python, until the IPI left", machine, go, rounds)
