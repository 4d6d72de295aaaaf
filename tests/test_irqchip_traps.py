"""The list of 68 behaviours of KVM's irqchip that a naive model gets wrong: each has its test.

The tests are in test_irqchip_traps_*.py and named test_trap_NN_what_happens, or test_traps_NN_MM_what_happens.
"""

from __future__ import annotations

import re
from pathlib import Path

TESTS = Path(__file__).parent
TRAPS = set(range(1, 69))
BY_PROGRAM = re.compile(r"^def test_traps?((?:_\d\d)+)_[a-z]\w*\(", re.MULTILINE)


def test_every_trap_is_tested() -> None:
    found: set[int] = set()
    for path in TESTS.glob("test_irqchip_traps_*.py"):
        for numbers in BY_PROGRAM.findall(path.read_text()):
            found |= {int(number) for number in numbers.strip("_").split("_")}
    assert found == TRAPS
