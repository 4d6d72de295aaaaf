"""Rows 1-3 and 6: one IPI through the batch door, consumed, against C; against N; by two threads.

Both sides get the same array: ICR writes, each followed by the notification with which its target takes the vector
(layout.NOTIFICATION), so both clear ON, move PIR to IRR and write an outcome for either record. Machine.run is timed
as users call it: validation of the array and the array of outcomes are its own.
"""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Callable
from itertools import product

import lower_bound
import streams
from bars import SIZES, Record
from timing import interleaved, ratio

IPIS = 4_000
PASSES = 5
ROUNDS = 11
SETS = 3
SENDER_ROUNDS = 60
STRETCH_NS = 100_000_000
KINDS = {"atomics": "1", "one owner": "2"}
"""What a machine is made for, and its row."""


def _several(run: Callable, exits: object) -> Callable[[], None]:
    def passes() -> None:
        for _ in range(PASSES):
            run(exits)

    return passes


def _sides() -> dict[tuple[str, str, int], Callable[[], None]]:
    """What is timed, by side, kind of machine and N; each on memory of its own."""
    sides: dict[tuple[str, str, int], Callable[[], None]] = {}
    for kind, n in product(KINDS, SIZES):
        m = streams.machine(n, threads=kind == "atomics")
        exits = streams.ipis(m, IPIS)
        sides["fast", kind, n] = _several(m.run, exits)
        if lower_bound.AVAILABLE:
            bound = lower_bound.LowerBound(m)
            for part in (exits[:200:2].copy(), exits):  # IPIs that stay in PIR, then some that are taken
                assert m.run(part)["code"].tolist() == bound.run(part)["code"].tolist()
                assert not bound.differences(m)
            sides["C lower bound", kind, n] = _several(bound.run, exits)
        generic = streams.machine(n, threads=kind == "atomics")
        generic.fastpath = False
        sides["generic", kind, n] = _several(generic.run, exits)
    return sides


def test_against_c(benchmark: Callable, record: Record) -> None:
    """Rows 1 and 2, and row 3: atomics and one owner, all N, in turn within each round.

    Which pages a machine gets decides how its lines share the caches, for as long as it lives: several sets of machines
    have a part of the rounds each.
    """
    sets = [_sides() for _ in range(SETS)]
    benchmark.group = "batch door, one IPI, consumed"
    several = benchmark.pedantic(lambda: [interleaved(sides, ROUNDS, settle=True) for sides in sets], rounds=1)
    times = {side: [ns for times in several for ns in times[side]] for side in sets[0]}
    for (side, kind, n), spent in times.items():
        record.point(f"{side}, {kind}", n, statistics.median(spent) / IPIS / PASSES)
    for kind, row in KINDS.items():
        if not lower_bound.AVAILABLE:
            record.skip(row, f"no C compiler ({lower_bound.COMPILER})")
            continue
        for n in SIZES:
            record.add(row, f"N = {n}", ratio(times, ("fast", kind, n), ("C lower bound", kind, n)))
    for kind in KINDS:
        record.add("3", kind, ratio(times, ("fast", kind, SIZES[-1]), ("fast", kind, SIZES[0])))


def test_two_senders(benchmark: Callable, record: Record) -> None:
    """Row 6: throughput of two threads with a sender each on disjoint targets, over one thread's.

    Threads send for as long as a stretch lasts, so that none waits for the other at its end. Batches are as long as
    those of rows 1-3: what is timed is IPIs, not the memory that long arrays stream through. ``cpu`` is the same by
    the threads' own CPU time: what it would be if each had a core to itself. ``c`` is what the C program gains by a
    second thread, in turn with ours. What two cores give together changes from one second to the next where a host has
    other guests, so there are many rounds.
    """
    m = streams.machine(64)
    half = [
        streams.ipis(m, IPIS, senders=range(i, i + 1), targets=range(2 + 31 * i, 33 + 31 * i), seed=i) for i in range(2)
    ]
    sides = {"ours": m.run}
    if lower_bound.AVAILABLE:
        sides["c"] = lower_bound.LowerBound(m).run
    gain: dict[str, list[float]] = {name: [] for name in (*sides, "ours cpu", "c cpu")}

    def compare() -> None:
        for _ in range(SENDER_ROUNDS):
            for name, run in sides.items():
                one, one_cpu = _throughput(run, half[:1])
                two, two_cpu = _throughput(run, half)
                gain[name].append(two / one)
                gain[f"{name} cpu"].append(2 * two_cpu / one_cpu)

    benchmark.group = "two senders"
    benchmark.pedantic(compare, rounds=1)
    more = {"cpu": statistics.median(gain["ours cpu"])}
    if lower_bound.AVAILABLE:
        more["c"] = statistics.median(gain["c"])
    record.add("6", "N = 64", statistics.median(gain["ours"]), **more)


def _throughput(run: Callable, arrays: list) -> tuple[float, float]:
    """Batches a ns of all threads together, one thread for each array; batches a ns of CPU time."""
    sent: list[tuple[float, int, int]] = []
    begin = threading.Barrier(len(arrays))

    def send(exits: object) -> None:
        try:
            run(exits)
        except BaseException:
            begin.abort()
            raise
        begin.wait()
        batches, start, cpu = 0, time.perf_counter_ns(), time.thread_time_ns()
        while (now := time.perf_counter_ns()) < start + STRETCH_NS:
            run(exits)
            batches += 1
        sent.append((batches / (now - start), batches, time.thread_time_ns() - cpu))

    workers = [threading.Thread(target=send, args=(exits,)) for exits in arrays]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return sum(rate for rate, _, _ in sent), sum(n for _, n, _ in sent) / sum(cpu for *_, cpu in sent)
