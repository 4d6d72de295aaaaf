"""``make bench-check`` lets nothing pass that was not measured."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture
def check(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[ModuleType]:
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "benchmarks")
    import check

    monkeypatch.setattr(check, "RESULTS", tmp_path / "results.json")
    yield check
    del sys.modules["check"], sys.modules["bars"]


def _status(
    check: ModuleType, *, without: tuple[str, str] | None = None, skipped: tuple[str, ...] = (), **values: float
):
    """Exit status when every case lies at its bar, but for what is said."""
    entries = [
        {"row": row, "case": case, "value": values.get(f"row{row}", bar.bar)}
        for row, bar in check.BARS.items()
        for case in bar.cases
        if row not in skipped and (row, case) != without
    ]
    content = {"values": entries, "skipped": dict.fromkeys(skipped, "no C compiler (cc)")}
    check.RESULTS.write_text(json.dumps(content))
    return check.main()


def test_all_measured(check: ModuleType) -> None:
    assert _status(check) == 0


@pytest.mark.parametrize("value", [1.31, float("nan")])
def test_missed(check: ModuleType, capsys: pytest.CaptureFixture[str], value: float) -> None:
    assert _status(check, row1=value) == 1
    assert "row 1, N = 4096: " in capsys.readouterr().err


def test_each_case_is_wanted(check: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    """One case that is missing fails the check and is named."""
    for row, bar in check.BARS.items():
        for case in bar.cases:
            assert _status(check, without=(row, case)) == 1
            assert capsys.readouterr().err == f"row {row}, {case}: not measured\n"


def test_only_a_compiler_is_an_excuse(check: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    assert _status(check, skipped=("1", "2")) == 0
    assert capsys.readouterr().out == "rows 1, 2: not measured, no C compiler (cc)\n"
    assert _status(check, skipped=("1", "3")) == 1
    assert capsys.readouterr().err.splitlines() == [f"row 3, {case}: not measured" for case in ("atomics", "one owner")]
