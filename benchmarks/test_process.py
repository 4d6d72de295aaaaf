"""Rows 8 to 11, 14 and 15, each in processes of its own: import, first exit, memory of a vCPU, traces."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from bars import ROOT, Record
from pytest_benchmark.fixture import BenchmarkFixture
from timing import need_times

from fastexit.answers.analyse import Analysis
from fastexit.answers.identity import identify
from fastexit.records import read
from fastexit.trace import BUNDLED
from fastexit.trace.replay import replay

ROUNDS = 9
REPLAYS = 5

IMPORT = """
import sys, time
start = time.perf_counter()
import {module}
print(time.perf_counter() - start, int("numba" in sys.modules))
"""
FIRST = """
import time
start = time.perf_counter()
import fastexit as fx
m = fx.Machine(vcpus=2)
m.boot_x2apic()
assert m.vcpus[0].wrmsr(0x830, fx.icr(dest=1, vector=0xFD)).path == fx.Path.FAST
print(time.perf_counter() - start)
"""
MEMORY = """
import tracemalloc
import fastexit as fx
from fastexit import layout
def block(m):
    with open("/proc/self/pagemap", "rb") as file:
        file.seek(m.handle // 4096 * 8)
        return 4096 * sum(byte >> 7 for byte in file.read(layout.BYTES // 4096 * 8)[7::8])
def booted(n):
    m = fx.Machine(vcpus=n)
    m.boot_x2apic()
    return m
booted(1)
tracemalloc.start()
sizes = []
for n in 1024, 4096:
    before = tracemalloc.get_traced_memory()[0]
    m = booted(n)
    sizes.append((block(m), tracemalloc.get_traced_memory()[0] - before))
    del m
print(*((large - small) / (4096 - 1024) for small, large in zip(*sizes)))
"""
REPLAY = """
import json, resource, sys, time
from fastexit.trace.replay import replay
rates = []
for _ in range(int(sys.argv[2])):
    start = time.process_time()
    report = replay(sys.argv[1])
    rates.append(report.lines / (time.process_time() - start))
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
print(json.dumps([rates, peak, report.lines, len(report.mismatches)]))
"""

READ = """
import json, resource, sys, time
from fastexit.records import read
read(sys.argv[3])
rates = []
for _ in range(int(sys.argv[2])):
    recording = None
    start = time.process_time()
    recording = read(sys.argv[1])
    rates.append(recording.lines / (time.process_time() - start))
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
print(json.dumps([rates, peak, recording.lines, recording.unreadable_count]))
"""

ANSWER = """
import json, resource, sys, time
from fastexit.answers.analyse import Analysis
from fastexit.answers.identity import identify
from fastexit.records import read
short = read(sys.argv[3])
Analysis(short, identify(short).where)
recording = read(sys.argv[1])
where = identify(recording).where
rates = []
for _ in range(int(sys.argv[2])):
    start = time.process_time()
    reports = [analysis.report(vm) for analysis in [Analysis(recording, where)] for vm in analysis.vms]
    rates.append(recording.lines / (time.process_time() - start))
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
print(json.dumps([rates, peak, recording.lines, sum(row.accepted for report in reports for row in report.vectors)]))
"""


def _python(code: str, *args: str, **environment: str) -> tuple[str, str]:
    """Standard output and standard error of a Python process of its own."""
    command = [sys.executable, "-c", code, *args]
    done = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True, check=True)
    return done.stdout, done.stderr


def _at_a_terminal(code: str, **environment: str) -> tuple[str, str]:
    """The same with standard error at a terminal, which is where the library says that it compiles."""
    ours, theirs = os.openpty()
    heard: list[bytes] = []

    def listen() -> None:
        try:
            while data := os.read(ours, 4096):
                heard.append(data)
        except OSError:  # EIO: the last process at the other end is gone
            pass

    listener = threading.Thread(target=listen)
    try:
        with open(theirs, "wb", buffering=0) as terminal:
            listener.start()
            command = [sys.executable, "-c", code]
            done = subprocess.run(
                command, env={**os.environ, **environment}, stdout=subprocess.PIPE, stderr=terminal, text=True
            )
        listener.join()
    finally:
        os.close(ours)
    said = b"".join(heard).decode()
    if done.returncode:
        raise RuntimeError(f"exit status {done.returncode}: {said}")
    return done.stdout, said


@pytest.mark.parametrize("module", ["fastexit", "numpy"])
def test_import(benchmark: BenchmarkFixture, record: Record, module: str) -> None:
    """Row 8: the import alone, by the processes' own clocks. pytest-benchmark times the processes."""
    benchmark.group = "process that imports"
    benchmark.pedantic(_python, args=(f"import {module}",), rounds=ROUNDS, warmup_rounds=1)
    if module == "numpy":
        return
    need_times(benchmark)
    ratios, loaded = [], set()
    for _ in range(ROUNDS + 1):
        seconds, numba = _python(IMPORT.format(module="fastexit"))[0].split()
        assert numba in ("0", "1")
        ratios.append(float(seconds) / float(_python(IMPORT.format(module="numpy"))[0].split()[0]))
        loaded.add(int(numba))
    benchmark.extra_info["over numpy"] = over = statistics.median(ratios[1:])
    record.add("8", "new process", over)
    record.add("8 numba", "new process", max(loaded))


def test_first_exit(benchmark: BenchmarkFixture, record: Record, tmp_path: Path) -> None:
    """Row 9: the cold cache is a directory of its own, where each process of pytest-benchmark's finds it warm."""
    environment = {}
    if benchmark.enabled:
        environment["FASTEXIT_CACHE_DIR"] = str(tmp_path)
        cold, said = _at_a_terminal(FIRST, **environment)
        record.add("9 cold", "new process", float(cold))
        record.add("9 progress", "new process", int("fastexit: compiling" in said))
    seconds: list[float] = []

    def first_exit() -> None:
        seconds.append(float(_python(FIRST, **environment)[0]))

    benchmark.group = "process with one exit, warm cache"
    benchmark.pedantic(first_exit, rounds=ROUNDS)
    need_times(benchmark)
    record.add("9 warm", "new process", statistics.median(seconds))


def test_memory(record: Record) -> None:
    """Row 10: resident memory of the machine's block, from 1024 vCPUs to 4096; its Python objects are told beside."""
    state, objects = map(float, _python(MEMORY)[0].split())
    record.add("10", "1024 to 4096 vCPUs", state, python_objects=objects)


def _lengthened(times: int) -> Path:
    """The example trace several times in a row, its clock going on and its head left out, as a plain file."""
    import lzma

    path = ROOT / "build" / "bench" / f"trace-{times}.txt"
    if path.exists():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [line for line in lzma.open(BUNDLED).read().split(b"\n") if line and not line.startswith(b"#")]
    cut = [line.partition(b": ") for line in lines]
    stamps = [head.rpartition(b" ") for head, _, _ in cut]
    span = float(stamps[-1][2]) - float(stamps[0][2]) + 1
    with open(path, "wb") as out:
        for i in range(times):
            out.writelines(
                b"%s %.6f: %s\n" % (who, float(stamp) + i * span, body)
                for (who, _, stamp), (_, _, body) in zip(stamps, cut, strict=True)
            )
    return path


def test_replay(benchmark: BenchmarkFixture, record: Record) -> None:
    """Row 11: real ftrace text of a booting guest, by the CPU time of a process; memory at four times the length.

    pytest-benchmark times the replay of the trace as it is, in this process.
    """
    benchmark.group = "replay of a trace"
    report = benchmark.pedantic(replay, args=(str(_lengthened(1)),), rounds=REPLAYS, warmup_rounds=1)
    benchmark.extra_info["lines"] = report.lines
    need_times(benchmark)
    once, four = _lengthened(8), _lengthened(32)
    rates, peak, lines, _ = json.loads(_python(REPLAY, str(once), "2")[0])
    longer, grown, _, _ = json.loads(_python(REPLAY, str(four), "1")[0])
    record.add("11", "a trace 8 times over", statistics.median(rates + longer), lines=lines)
    record.add("11 memory", "four times the length", grown / peak)


def test_read(benchmark: BenchmarkFixture, record: Record) -> None:
    """Row 14: the same text into columns, with the scanner compiled before; memory where rows no longer fit it."""
    benchmark.group = "a trace into columns"
    short = str(_lengthened(1))
    recording = benchmark.pedantic(read, args=(short,), rounds=REPLAYS, warmup_rounds=1)
    benchmark.extra_info["lines"] = recording.lines
    need_times(benchmark)
    once, four = str(_lengthened(8)), str(_lengthened(32))
    rates, peak, lines, unreadable = json.loads(_python(READ, once, "3", short)[0])
    longer, grown, _, _ = json.loads(_python(READ, four, "1", short)[0])
    assert not unreadable
    record.add("14", "a trace 8 times over", statistics.median(rates + longer), lines=lines)
    record.add("14 memory", "four times the length", grown / peak)


def test_answer(benchmark: BenchmarkFixture, record: Record) -> None:
    """Row 15: every table and finding of a report from the columns, who is who being known; memory as in row 14."""
    benchmark.group = "columns into answers"
    short = str(_lengthened(1))
    recording = read(short)
    where = identify(recording).where
    analysis = benchmark.pedantic(Analysis, args=(recording, where), rounds=REPLAYS, warmup_rounds=1)
    benchmark.extra_info["lines"] = recording.lines
    need_times(benchmark)
    once, four = str(_lengthened(8)), str(_lengthened(32))
    rates, peak, lines, accepted = json.loads(_python(ANSWER, once, "3", short)[0])
    longer, grown, _, _ = json.loads(_python(ANSWER, four, "1", short)[0])
    assert accepted == 8 * sum(row.accepted for vm in analysis.vms for row in analysis.report(vm).vectors)
    record.add("15", "a trace 8 times over", statistics.median(rates + longer), lines=lines)
    record.add("15 memory", "four times the length", grown / peak)
