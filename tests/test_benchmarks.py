"""``pytest benchmarks`` works as a user of pytest-benchmark expects, and fails when the fast path does not win."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import BOUNDS, INTERPRETED, ROOT

pytestmark = pytest.mark.skipif(INTERPRETED or BOUNDS, reason="benchmarks time compiled kernels, bounds not checked")

RESULTS = ROOT / "build" / "bench" / "results.json"
QUICK = "whole_exit and 6.18 and batch"


def _benchmarks(*options: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """A run from the root of the project, as from a shell: nothing of the pytest that runs this test is passed on."""
    ours = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    command = [sys.executable, "-m", "pytest", "benchmarks", "-p", "no:cacheprovider", *options]
    return subprocess.run(command, cwd=ROOT, env=ours | environment, capture_output=True, text=True)


def _spoilt(how: str, *options: str) -> subprocess.CompletedProcess[str]:
    return _benchmarks("-p", "spoilt_fastpath", *options, FASTEXIT_SPOIL=how, PYTHONPATH=str(ROOT / "tests"))


def _failed(done: subprocess.CompletedProcess[str]) -> set[str]:
    return set(re.findall(r"^FAILED benchmarks/\w+\.py::(\S+)", done.stdout, flags=re.MULTILINE))


def _has_both_sides(done: subprocess.CompletedProcess[str]) -> None:
    """The table of pytest-benchmark has a row for each side."""
    assert done.returncode == 0, done.stdout
    assert "2 passed" in done.stdout
    assert re.search(r"^-+ benchmark 'whole exit, .*6\.18': 2 tests -+$", done.stdout, flags=re.MULTILINE)
    for side in "fast", "generic":
        assert re.search(rf"^test_whole_exit\[6\.18-batch-{side}\] +\d", done.stdout, flags=re.MULTILINE)


@pytest.mark.long
@pytest.mark.parametrize("option", [None, "--benchmark-only", "--benchmark-disable-gc"])
def test_times_both_sides(option: str | None) -> None:
    _has_both_sides(_benchmarks("-k", QUICK, *([option] if option else [])))


def test_table_and_json_have_stats(tmp_path: Path) -> None:
    """Many rounds of real calls, the ratio beside them; a part of the benchmarks leaves the results of all alone."""
    before = RESULTS.read_bytes() if RESULTS.exists() else None
    done = _benchmarks("-k", QUICK, f"--benchmark-json={tmp_path / 'out.json'}")
    _has_both_sides(done)
    found = {entry["params"]["side"]: entry for entry in json.loads((tmp_path / "out.json").read_text())["benchmarks"]}
    assert found.keys() == {"fast", "generic"}
    for entry in found.values():
        assert entry["stats"]["rounds"] >= 100
        assert 0 < entry["stats"]["min"] <= entry["stats"]["median"]
    assert found["fast"]["extra_info"]["ratio"] > 1
    assert (RESULTS.read_bytes() if RESULTS.exists() else None) == before


@pytest.mark.parametrize("option", ["--benchmark-disable", pytest.param("-n1", marks=pytest.mark.long)])
def test_nothing_timed(option: str) -> None:
    """Each call is made once, and what is left out is said."""
    done = _benchmarks("-k", QUICK, option)
    assert done.returncode == 0, done.stdout
    assert "1 passed, 1 skipped" in done.stdout
    assert "called once, not compared: pytest-benchmark times nothing (--benchmark-disable, or xdist)" in done.stdout
    assert "- benchmark '" not in done.stdout


def test_slow_fast_path_fails() -> None:
    """Whatever the door, a fast path that is slower than the generic one is a failure that says so."""
    done = _spoilt("slow", "-k", "fast_beats_generic and 6.18")
    assert done.returncode == 1, done.stdout
    sides = (
        "whole_exit[6.18-python",
        "whole_exit[6.18-batch",
        "ipi_leaves_earlier[6.18-vmx",
        "ipi_leaves_earlier[6.18-svm",
    )
    assert _failed(done) == {f"test_{side}-fast]" for side in sides}
    assert len(re.findall(r"generic over fast 0\.\d+, at least [13]\.\d", done.stdout)) >= len(sides)


def test_no_fast_path_fails() -> None:
    """Two generic sides are no comparison: neither passes for a fast one."""
    done = _spoilt("off", "-k", "fast_beats_generic and 5.7 and (batch or vmx)")
    assert done.returncode == 1, done.stdout
    assert _failed(done) == {"test_whole_exit[5.7-batch-fast]", "test_ipi_leaves_earlier[5.7-vmx-fast]"}


def test_interpreted_kernels_are_refused() -> None:
    """Interpreted kernels would take hours, and their times mean nothing."""
    done = _benchmarks("-k", QUICK, NUMBA_DISABLE_JIT="1")
    assert done.returncode == 4
    assert "benchmarks time compiled kernels: unset NUMBA_DISABLE_JIT" in done.stdout + done.stderr


def test_without_a_compiler() -> None:
    """Our side is timed, C's is skipped, and why is said."""
    done = _benchmarks("-k", "consumed and atomics-4]", "--benchmark-disable", PATH="")
    assert done.returncode == 0, done.stdout
    assert re.search(r"^SKIPPED \[1\] benchmarks/test_ipi\.py:\d+: no C compiler \(", done.stdout, flags=re.MULTILINE)


def test_without_headers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A distribution's Python without its development package cannot compile an extension either."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import lower_bound

    assert lower_bound.missing(sys.executable, tmp_path) == f"no Python.h in {tmp_path}: install Python's headers"
    (tmp_path / "Python.h").touch()
    assert lower_bound.missing(sys.executable, tmp_path) == ""


def test_each_python_has_its_own_build(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """An extension that another Python has compiled is not this one's."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import lower_bound

    name = "fastexit_tried"
    (tmp_path / f"{name}.cpython-27-other.so").write_bytes(b"not of this Python")
    asked: list[str] = []

    class Recipe:
        """Stands for a cffi.FFI."""

        def compile(self, tmpdir: str) -> None:
            asked.append(tmpdir)

    monkeypatch.setattr(lower_bound, "BUILT", tmp_path)
    with pytest.raises(ImportError):
        lower_bound.extension(Recipe(), name)
    assert asked == [str(tmp_path)]
