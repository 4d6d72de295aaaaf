"""The project's list of 70 KVM behaviours that a naive model gets wrong: each has its test, or its excuse.

The tests are in test_traps_*.py and named test_trap_NN_what_happens.
"""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parents[1]
TRAPS = range(1, 71)


def _tested() -> Counter[int]:
    """Number of a trap -> how many test functions it has."""
    found: Counter[int] = Counter()
    for path in sorted((ROOT / "tests").glob("test_traps_*.py")):
        found.update(int(n) for n in re.findall(r"^def test_trap_(\d\d)_\w+\(", path.read_text(), flags=re.MULTILINE))
    return found


def _excused() -> set[int]:
    """Numbers that docs/model.md says are not modelled: ``| trap 7 |`` begins their line."""
    text = (ROOT / "docs" / "model.md").read_text()
    return {int(n) for n in re.findall(r"^\| trap (\d+) \|", text, flags=re.MULTILINE)}


def test_every_trap_is_tested_or_excused() -> None:
    """No number is missing, none is unknown, none is both."""
    tested, excused = set(_tested()), _excused()
    assert tested | excused == set(TRAPS)
    assert not tested & excused


def test_names_are_unique() -> None:
    """Two functions of one name in a file would hide one of them."""
    for path in (ROOT / "tests").glob("test_traps_*.py"):
        names = Counter(re.findall(r"^def (\w+)\(", path.read_text(), flags=re.MULTILINE))
        assert [name for name, n in names.items() if n > 1] == [], path.name
