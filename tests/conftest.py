"""One set of options for all tests.

Compiled kernels are kept in build/kernel-cache from run to run, which is safe: they are keyed by a hash of the sources.
"""

from __future__ import annotations

import os
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import settings

import generations

if TYPE_CHECKING:
    import embedded

ROOT = Path(__file__).parent.parent
INTERPRETED = os.environ.get("NUMBA_DISABLE_JIT", "0") not in ("", "0")
BOUNDS = os.environ.get("NUMBA_BOUNDSCHECK", "0") not in ("", "0")

os.environ.setdefault("FASTEXIT_CACHE_DIR", str(ROOT / "build" / "kernel-cache"))

generations.put_in(os.environ.get("FASTEXIT_TEST_ROWS", ""))

EXAMPLES = 25 if INTERPRETED else 100
settings.register_profile("fastexit", deadline=None, derandomize=True, database=None, max_examples=EXAMPLES)
settings.load_profile("fastexit")


def pytest_configure(config: pytest.Config) -> None:
    if INTERPRETED:  # compiled integers wrap in silence
        config.addinivalue_line("filterwarnings", "ignore:overflow encountered in scalar:RuntimeWarning")


def pytest_report_header() -> str:
    mode = "interpreted" if INTERPRETED else f"compiled, bounds {'checked' if BOUNDS else 'not checked'}"
    return f"kernels: {mode}; numba {version('numba')}, llvmlite {version('llvmlite')}, numpy {version('numpy')}"


@pytest.fixture(scope="session")
def door() -> embedded.Door:
    """The C door in this process."""
    import embedded  # which imports this file

    embedded.need_compiler()
    return embedded.Door()
