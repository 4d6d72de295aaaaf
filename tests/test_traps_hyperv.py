"""The 56 behaviours of KVM's Hyper-V part that a naive model gets wrong: each has a test or an excuse.

Their tests are in test_traps_hyperv_*.py, by what they are about; those that no test can show have a line in
docs/model.md.
"""

from __future__ import annotations

import re
from pathlib import Path


def test_every_hyperv_trap_is_tested_or_excused() -> None:
    """56 of them; an excuse is a line ``| Hyper-V trap 7 |`` in docs/model.md."""
    text = "".join(path.read_text() for path in Path(__file__).parent.glob("test_traps_hyperv_*.py"))
    tested = {int(n) for n in re.findall(r"^def test_hv_trap_(\d\d)_\w+\(", text, flags=re.MULTILINE)}
    model = (Path(__file__).parents[1] / "docs" / "model.md").read_text()
    excused = {int(n) for n in re.findall(r"^\| Hyper-V trap (\d+) \|", model, flags=re.MULTILINE)}
    assert tested | excused == set(range(1, 57))
    assert not tested & excused
