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

import lower_bound
import pytest
import streams
from bars import SIZES, Record
from timing import interleaved, ratio

IPIS = 4_000
PASSES = 5
ROUNDS = 31
SENDER_ROUNDS = 15
STRETCH_NS = 100_000_000


def _several(run: Callable, exits: object) -> Callable[[], None]:
    def passes() -> None:
        for _ in range(PASSES):
            run(exits)

    return passes


@pytest.mark.parametrize("threads", [True, False], ids=["atomics", "one-owner"])
def test_against_c(benchmark: Callable, record: Record, threads: bool) -> None:
    """Rows 1 and 2, and row 3: all N in turn within each round."""
    name = "atomics" if threads else "one owner"
    sides: dict[str, Callable[[], None]] = {}
    for n in SIZES:
        m = streams.machine(n, threads=threads)
        exits = streams.ipis(m, IPIS)
        sides[f"ours {n}"] = _several(m.run, exits)
        if lower_bound.AVAILABLE:
            bound = lower_bound.LowerBound(m)
            for part in (exits[:200:2].copy(), exits):  # IPIs that stay in PIR, then some that are taken
                assert m.run(part)["code"].tolist() == bound.run(part)["code"].tolist()
                assert not bound.differences(m)
            sides[f"C {n}"] = _several(bound.run, exits)
        generic = streams.machine(n, threads=threads)
        generic.fastpath = False
        sides[f"generic {n}"] = _several(generic.run, exits)
    benchmark.group = "batch door, one IPI, consumed"
    times = benchmark.pedantic(lambda: interleaved(sides, ROUNDS, settle=True), rounds=1)
    for n in SIZES:
        for side in ("ours", "C", "generic"):
            if f"{side} {n}" in times:
                ns = statistics.median(times[f"{side} {n}"]) / IPIS / PASSES
                record.point(f"{'C lower bound' if side == 'C' else 'fast' if side == 'ours' else side}, {name}", n, ns)
        if lower_bound.AVAILABLE:
            record.add("1" if threads else "2", f"N = {n}", ratio(times, f"ours {n}", f"C {n}"))
    if not lower_bound.AVAILABLE:
        record.skip("1" if threads else "2", f"no C compiler ({lower_bound.COMPILER})")
    first, last = SIZES[0], SIZES[-1]
    record.add("3", name, ratio(times, f"ours {last}", f"ours {first}"))


def test_two_senders(benchmark: Callable, record: Record) -> None:
    """Row 6: throughput of two threads with a sender each on disjoint targets, over one thread's.

    Threads send for as long as a stretch lasts, so that none waits for the other at its end. Batches are as long as
    those of rows 1-3: what is timed is IPIs, not the memory that long arrays stream through. ``cpu`` is the same by
    the threads' own CPU time: what it would be if each had a core to itself. ``c`` is what the C program gains by a
    second thread, in turn with ours.
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
        run(exits)
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
