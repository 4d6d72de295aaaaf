"""The examples, which stay small, and ``make embed-test``, which builds and runs them and names what is missing."""

from __future__ import annotations

import importlib.util
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from conftest import BOUNDS, INTERPRETED
from embedded import need_compiler
from fastexit.embed import build

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
LINES = 60
WORDS = ".py", ".c", ".cpp", ".rs", ".toml", ".txt", ""
RUN_BY_MAKE = "boot_lab.py", "my_apic.py", "unicorn_kernel.py", "unit_tests.py"
"""Examples that ask for more than nothing: a lab, verify, an image."""


def files() -> list[Path]:
    """What a reader of an example reads."""
    found = [path for path in EXAMPLES.rglob("*") if path.is_file() and path.suffix in WORDS]
    return sorted(path for path in found if not {"traces", "build", "__pycache__"} & set(path.parts))


@pytest.fixture(scope="module")
def hosts() -> dict[str, Any]:
    return runpy.run_path(str(ROOT / ".ci" / "embed_test.py"))


@pytest.mark.parametrize("path", files(), ids=lambda path: str(path.relative_to(EXAMPLES)))
def test_an_example_is_short(path: Path) -> None:
    """Every line counts but empty ones."""
    assert len([line for line in path.read_text().splitlines() if line.strip()]) < LINES


def test_every_example_is_run(hosts: dict[str, Any]) -> None:
    """By its name in a step, or by the Makefile of its folder, or by a test."""
    makers = (ROOT / ".ci" / "embed_test.py").read_text() + (ROOT / "Makefile").read_text()
    tests = "".join(path.read_text() for path in (ROOT / "tests").glob("test_unicorn_kernels.py"))
    for path in EXAMPLES.iterdir():
        if path.name not in ("traces", "__pycache__"):
            assert path.name in makers + tests, path


def test_what_is_missing_is_named(
    hosts: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On a machine with nothing but Python: each step that needs more says what, and none fails."""

    def no_compiler() -> None:
        raise ValueError("no C compiler: install gcc or clang, or name one with --cc")

    monkeypatch.setattr(shutil, "which", lambda *_, **__: None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    monkeypatch.setattr(build, "compiler", no_compiler)
    monkeypatch.setitem(hosts["main"].__globals__, "run", lambda *_, **__: "")
    monkeypatch.setitem(hosts["main"].__globals__, "SCRATCH", ROOT / "build" / "nothing")
    assert hosts["main"]() == 0
    summary = capsys.readouterr().out.split("== summary\n")[1].splitlines()
    ended = {line[:26].strip(): line[26:].strip() for line in summary}
    ran = {name for name, how in ended.items() if how.startswith("ok")}
    assert ran == {"event loop", "own APIC: Python"}
    assert all(how.startswith("skipped: no ") for name, how in ended.items() if name not in ran)
    assert ended["SimPy"] == "skipped: no simpy: pip install simpy"
    assert "FASTEXIT_KVM_UNIT_TESTS" in ended["Unicorn: kvm-unit-tests"] or "no unicorn" in ended["Unicorn"]
    (ROOT / "build" / "nothing").rmdir()


@pytest.mark.parametrize(
    "path", [path for path in files() if path.parent == EXAMPLES and path.suffix == ".py"], ids=lambda path: path.stem
)
def test_examples_in_python_run(path: Path) -> None:
    if path.name in RUN_BY_MAKE:
        pytest.skip("asks for more: make embed-test, boot-lab, unit-tests")
    for module in ("simpy", "unicorn"):
        if path.stem.startswith(module):
            pytest.importorskip(module)
    done = subprocess.run([sys.executable, str(path)], capture_output=True, text=True, timeout=300, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout


@pytest.mark.skipif(INTERPRETED or BOUNDS, reason="a host wants kernels as they are meant to run")
def test_example_in_c_runs(tmp_path: Path) -> None:
    """Two threads, a clock that a third moves, and a C compiler that has no warning."""
    need_compiler()
    if shutil.which("make") is None:
        pytest.skip("no make")
    line = ["make", "-s", "check", f"PYTHON={sys.executable}", f"BUILD={tmp_path}"]
    done = subprocess.run(line, cwd=EXAMPLES / "embed_c", capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert "20000 and 20000 IPIs taken" in done.stdout
