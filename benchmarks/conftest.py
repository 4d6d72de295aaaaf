"""Compile everything before anything is timed, and say what was measured on."""

from __future__ import annotations

import platform

import numba
import numpy
import pytest

import fastexit


@pytest.fixture(scope="session", autouse=True)
def _warm() -> None:
    fastexit.warmup()


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict) -> None:
    """Record what a stored result depends on."""
    machine_info["numba"] = numba.__version__
    machine_info["numpy"] = numpy.__version__
    machine_info["python"] = platform.python_version()
