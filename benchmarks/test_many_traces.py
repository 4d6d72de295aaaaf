"""Row 16: ten traces in two processes over one, each side a program of its own that begins with a warm cache."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from bars import Record
from pytest_benchmark.fixture import BenchmarkFixture
from test_process import _lengthened, _python
from timing import need_times

TRACES = 10
TIMES = 32

REPORT = """
import sys, time
start = time.perf_counter()
import fastexit as fx
found = fx.report(sys.argv[1], jobs=int(sys.argv[2]))
seconds = time.perf_counter() - start
assert len(found.vms) == int(sys.argv[3]) and not any(file.refused for file in found.files)
print(seconds)
"""


def _seconds(folder: Path, jobs: int) -> float:
    return float(_python(REPORT, str(folder), str(jobs), str(TRACES))[0])


def test_ten_traces(benchmark: BenchmarkFixture, record: Record, tmp_path: Path) -> None:
    """pytest-benchmark times the program with two processes, which stands between two runs with one."""
    benchmark.group = "ten traces"
    trace = _lengthened(TIMES if benchmark.enabled else 1)
    for i in range(TRACES):
        (tmp_path / f"{i}.trace").symlink_to(trace)
    one = _seconds(tmp_path, 1)
    two = benchmark.pedantic(_seconds, args=(tmp_path, 2), rounds=1)
    need_times(benchmark)
    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("one CPU: two processes cannot be faster")
    benchmark.extra_info["one over two"] = over = (one + _seconds(tmp_path, 1)) / 2 / two
    record.add("16", "10 traces of 5.1 million lines", over)
