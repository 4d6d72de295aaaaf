"""docs/lenient.md: each of its rows, asked of the manual's profile and of kernels."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

from fastexit.profile import NEWEST, PROFILES, SDM

DOCS = Path(__file__).parents[1] / "docs"


def _lenient() -> ModuleType:
    spec = importlib.util.spec_from_file_location("lenient", DOCS / "lenient.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where NamedTuple looks for it
    spec.loader.exec_module(module)
    return module


lenient = _lenient()
PAGE = (DOCS / "lenient.md").read_text()


@pytest.mark.parametrize("row", lenient.ROWS, ids=lambda row: f"{row.register}, {row.section}, {row.story[-16:]}")
def test_a_row_says_what_is_so(row: lenient.Row) -> None:
    """KVM and the manual differ where the row says so, in one generation at least, and nowhere else."""
    found = lenient.answers(row)
    strict = found.pop(SDM.name)
    assert (set(found.values()) == {strict}) == (row.kvm == lenient.SAME), (strict, found)
    line = f"| `{row.story}` | `{strict}` | {lenient.spans(found)} |"
    assert line in PAGE, f"python docs/generate.py writes it anew: {line}"
    assert f"{row.sdm} ({row.section})" in PAGE


def test_the_page_has_nothing_else() -> None:
    head = PAGE.index("<!-- generated: registers -->")
    rows = [line for line in PAGE[head:].splitlines() if line.startswith("| ") and "`" in line.split("|")[4]]
    assert len(rows) == len(lenient.ROWS)


def test_spans_of_generations() -> None:
    assert lenient.spans(dict.fromkeys(PROFILES, "1")) == "`1`"
    told = {name: "0" if name == NEWEST else "2" if name == "6.8" else "1" for name in PROFILES}
    assert lenient.spans(told) == "seed-v3 to 6.6 `1`; 6.8 `2`; 6.12 to 6.18 `1`; from 7.3 `0`"
