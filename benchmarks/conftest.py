"""Compile everything before anything is timed, collect what is measured, and say what it was measured on."""

from __future__ import annotations

import platform
import sys
from collections.abc import Iterator
from pathlib import Path

import numba
import numpy
import pytest

sys.path.insert(0, str(Path(__file__).parent))

from bars import Record, unmeasured

import fastexit


@pytest.fixture(scope="session", autouse=True)
def _warm() -> None:
    if numba.config.DISABLE_JIT:
        pytest.exit("benchmarks time compiled kernels: unset NUMBA_DISABLE_JIT", returncode=pytest.ExitCode.USAGE_ERROR)
    fastexit.warmup()


@pytest.fixture(scope="session")
def record() -> Iterator[Record]:
    """Values of the whole run, written to build/bench/results.json when no row is missing at its end.

    A run of a part of the benchmarks leaves the results of the last whole run alone.
    """
    values = Record()
    yield values
    if not unmeasured(values.content()):
        values.write()


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict) -> None:
    """Record what a stored result depends on."""
    machine_info["numba"] = numba.__version__
    machine_info["numpy"] = numpy.__version__
    machine_info["python"] = platform.python_version()
