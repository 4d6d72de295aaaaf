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
import numpy as np
import pytest
import streams
from bars import SIZES, Record
from pytest_benchmark.fixture import BenchmarkFixture
from timing import WARMUP, interleaved, need_times, ratio

IPIS = 4_000
PASSES = 5
ROUNDS = 11
SETS = 3
CALLS = 200
"""pytest-benchmark's rounds, a batch each."""
SENDER_ROUNDS = 60
BATCHES = 100
STRETCH_NS = 100_000_000
BOUND = "C lower bound"
SIDES = "fast", BOUND, "generic"
MISSING = lower_bound.missing()
KINDS = {"atomics": "1", "one owner": "2"}
"""What a machine is made for, and its row."""


def _call(side: str, kind: str, n: int) -> tuple[Callable, np.ndarray]:
    """What is timed: a run on memory of its own, and the exits for it."""
    m = streams.machine(n, threads=kind == "atomics")
    m.fastpath = side != "generic"
    exits = streams.ipis(m, IPIS)
    if side != BOUND:
        return m.run, exits
    bound = lower_bound.LowerBound(m)
    for part in (exits[:200:2].copy(), exits):  # IPIs that stay in PIR, then some that are taken
        assert m.run(part)["code"].tolist() == bound.run(part)["code"].tolist()
        assert not bound.differences(m)
    return bound.run, exits


def _several(run: Callable, exits: np.ndarray) -> Callable[[], None]:
    def passes() -> None:
        for _ in range(PASSES):
            run(exits)

    return passes


@pytest.fixture(scope="module")
def in_turn(record: Record) -> dict[tuple[str, str, int], list[int]]:
    """Rows 1 to 3: ns of each side, kind of machine and N, all in turn within each round.

    Which pages a machine gets decides how its lines share the caches, for as long as it lives: several sets of machines
    have a part of the rounds each.
    """
    sides = [side for side in SIDES if side != BOUND or not MISSING]
    times: dict[tuple[str, str, int], list[int]] = {}
    for _ in range(SETS):
        calls = {(side, kind, n): _several(*_call(side, kind, n)) for kind, n, side in product(KINDS, SIZES, sides)}
        for case, spent in interleaved(calls, ROUNDS, settle=True).items():
            times.setdefault(case, []).extend(spent)
    for (side, kind, n), spent in times.items():
        record.point(f"{side}, {kind}", n, statistics.median(spent) / IPIS / PASSES)
    for kind, row in KINDS.items():
        if MISSING:
            record.skip(row, MISSING)
            continue
        for n in SIZES:
            record.add(row, f"N = {n}", ratio(times, ("fast", kind, n), (BOUND, kind, n)))
    for kind in KINDS:
        record.add("3", kind, ratio(times, ("fast", kind, SIZES[-1]), ("fast", kind, SIZES[0])))
    return times


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("side", SIDES)
def test_consumed(benchmark: BenchmarkFixture, request: pytest.FixtureRequest, side: str, kind: str, n: int) -> None:
    """One batch. The fast side is the one that is compared."""
    if side == BOUND and MISSING:
        pytest.skip(MISSING)
    run, exits = _call(side, kind, n)
    benchmark.group = f"{IPIS:,} IPIs, consumed, {kind}, N = {n}"
    outcomes = benchmark.pedantic(run, args=(exits,), rounds=CALLS, warmup_rounds=WARMUP)
    assert (outcomes["accepted"][0::2] == 1).all()
    benchmark.extra_info["IPIs"] = IPIS
    if side == "fast":
        need_times(benchmark)
        times = request.getfixturevalue("in_turn")
        for other in SIDES:
            if other != side and (other, kind, n) in times:
                benchmark.extra_info[f"over {other}"] = ratio(times, (side, kind, n), (other, kind, n))


@pytest.mark.parametrize("senders", [1, 2])
@pytest.mark.parametrize("side", ["ours", "c"])
def test_two_senders(benchmark: BenchmarkFixture, record: Record, side: str, senders: int) -> None:
    """Row 6: throughput of two threads with a sender each on disjoint targets, over one thread's.

    For the ratio, threads send for as long as a stretch lasts, so that none waits for the other at its end; our
    program and the C program, each with one and with two threads, in turn. Batches are as long as those of rows 1-3:
    what is timed is IPIs, not the memory that long arrays stream through. ``cpu`` is the same by the threads' own CPU
    time: what it would be if each had a core to itself. ``c`` is what the C program gains by a second thread. What two
    cores give together changes from one second to the next where a host has other guests, so there are many rounds.
    """
    if side == "c" and MISSING:
        pytest.skip(MISSING)
    m = streams.machine(64)
    half = [
        streams.ipis(m, IPIS, senders=range(i, i + 1), targets=range(2 + 31 * i, 33 + 31 * i), seed=i) for i in range(2)
    ]
    sides = {"ours": m.run}
    if not MISSING:
        sides["c"] = lower_bound.LowerBound(m).run

    def send(exits: np.ndarray) -> None:
        for _ in range(BATCHES):
            sides[side](exits)

    benchmark.group = f"senders, {BATCHES} batches of {IPIS:,} IPIs from each"
    benchmark.pedantic(_in_threads, args=(send, half[:senders]), rounds=SENDER_ROUNDS, warmup_rounds=1)
    if (side, senders) != ("ours", 2):
        return
    need_times(benchmark)
    gain: dict[str, list[float]] = {name: [] for name in (*sides, "ours cpu", "c cpu")}
    for _ in range(SENDER_ROUNDS):
        for name, run in sides.items():
            one, one_cpu = _throughput(run, half[:1])
            two, two_cpu = _throughput(run, half)
            gain[name].append(two / one)
            gain[f"{name} cpu"].append(2 * two_cpu / one_cpu)
    more = {name: statistics.median(gain[key]) for name, key in (("cpu", "ours cpu"), ("c", "c")) if key in gain}
    benchmark.extra_info["two over one"] = two_over_one = statistics.median(gain["ours"])
    record.add("6", "N = 64", two_over_one, **more)


def _in_threads(work: Callable[[np.ndarray], None], arrays: list[np.ndarray]) -> None:
    """One thread for each array."""
    workers = [threading.Thread(target=work, args=(exits,)) for exits in arrays]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()


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

    _in_threads(send, arrays)
    return sum(rate for rate, _, _ in sent), sum(n for _, n, _ in sent) / sum(cpu for *_, cpu in sent)
