"""One set of options for all tests.

FASTEXIT_TEST_DISPATCHER=compiled gives every machine that a test makes the compiled dispatcher, unless it has costs.
Compiled kernels are kept in build/kernel-cache from run to run, which is safe: they are keyed by a hash of the sources.
"""

from __future__ import annotations

import functools
import os
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import settings

import generations

if TYPE_CHECKING:
    import embedded

ROOT = Path(__file__).parent.parent
INTERPRETED = os.environ.get("NUMBA_DISABLE_JIT", "0") not in ("", "0")
DISPATCHER = os.environ.get("FASTEXIT_TEST_DISPATCHER", "python")
BOUNDS = os.environ.get("NUMBA_BOUNDSCHECK", "0") not in ("", "0")

os.environ.setdefault("FASTEXIT_CACHE_DIR", str(ROOT / "build" / "kernel-cache"))

generations.put_in(os.environ.get("FASTEXIT_TEST_ROWS", ""))

EXAMPLES = 25 if INTERPRETED else 100
settings.register_profile("fastexit", deadline=None, derandomize=True, database=None, max_examples=EXAMPLES)
settings.load_profile("fastexit")


def pytest_configure(config: pytest.Config) -> None:
    if INTERPRETED:  # compiled integers wrap in silence
        config.addinivalue_line("filterwarnings", "ignore:overflow encountered in scalar:RuntimeWarning")
    if DISPATCHER != "python":
        dispatch(DISPATCHER)


def dispatch(kind: str) -> None:
    """Make Machine's default dispatcher another one."""
    from fastexit import Machine

    init, restore = Machine.__init__, Machine.restore.__func__

    @functools.wraps(init)
    def __init__(self: Machine, *args: Any, **options: Any) -> None:
        if options.get("costs") is None:
            options.setdefault("dispatcher", kind)
        init(self, *args, **options)

    @functools.wraps(restore)
    def restored(cls: type[Machine], data: bytes, costs: Any = None, **options: Any) -> Machine:
        if costs is None:
            options.setdefault("dispatcher", kind)
        return restore(cls, data, costs, **options)

    Machine.__init__, Machine.restore = __init__, classmethod(restored)  # type: ignore[method-assign,assignment]


def pytest_report_header() -> str:
    mode = "interpreted" if INTERPRETED else f"compiled, bounds {'checked' if BOUNDS else 'not checked'}"
    mode = f"{mode}; dispatcher: {DISPATCHER}"
    return f"kernels: {mode}; numba {version('numba')}, llvmlite {version('llvmlite')}, numpy {version('numpy')}"


@pytest.fixture(scope="session")
def door() -> embedded.Door:
    """The C door in this process."""
    import embedded  # which imports this file

    embedded.need_compiler()
    return embedded.Door()
