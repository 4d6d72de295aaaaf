"""What the comparisons time: every IPI is fresh, and goes the way that its side is meant to go."""

from __future__ import annotations

import numpy as np
import pytest

import fastexit as fx
from fastexit.insight import compare as c
from fastexit.outcome import CODE_COMPLETION, COMPLETION_REENTER
from fastexit.profile import PROFILES, Trait

N = 20


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, door in c.DOORS.items():
        monkeypatch.setitem(c.DOORS, name, door._replace(exits=N, passes=2))


@pytest.mark.parametrize("n", [1, 7, N])
def test_every_exit_has_a_target_of_its_own(n: int) -> None:
    exits = c.unicasts(c.booted("6.18", vcpus=N + 1), n)
    targets, vectors = exits["value"] >> np.uint64(32), exits["value"] & np.uint64(0xFFFF_FFFF)
    assert len(set(targets.tolist())) == n
    assert targets.min() >= 1
    assert targets.max() <= N
    assert vectors.min() >= 32
    assert vectors.max() <= 255


def test_more_exits_than_targets_are_refused() -> None:
    with pytest.raises(ValueError, match="5 exits need 5 targets, the machine has 3"):
        c.unicasts(c.booted("6.18"), 5)


@pytest.mark.parametrize("vendor", ["vmx", "svm"])
@pytest.mark.parametrize("door", c.DOORS)
@pytest.mark.parametrize("kernel", fx.profiles())
def test_every_ipi_is_fresh_on_both_sides(kernel: str, door: str, vendor: str) -> None:
    machine = c.booted(kernel, vendor, N + 1)
    through = c.DOORS[door].make(machine, c.unicasts(machine, N))
    reenters = PROFILES[kernel].traits & Trait.ICR_REENTERS
    for fast in (True, False, True):
        machine.fastpath = fast
        c.consume(machine)
        codes = [int(code) for code in through()]
        assert c.notified(machine, codes) == N
        taken = fast and (kernel, vendor) != ("seed-v3", "svm")
        assert all(fx.OUTCOMES[code].path == taken for code in codes)
        assert all((code & CODE_COMPLETION == COMPLETION_REENTER) == bool(fast and reenters) for code in codes)


def test_stale_ipis_notify_nobody() -> None:
    """Without consume the second round finds ON set at every target: what a comparison must not time."""
    machine = c.booted("6.18", vcpus=N + 1)
    through = c.DOORS["batch"].make(machine, c.unicasts(machine, N))
    assert [c.notified(machine, through()) for _ in range(2)] == [N, 0]


@pytest.mark.usefixtures("few")
@pytest.mark.parametrize("door", c.DOORS)
def test_a_comparison_that_would_time_stale_ipis_stops(monkeypatch: pytest.MonkeyPatch, door: str) -> None:
    unicasts = c.unicasts
    monkeypatch.setattr(c, "unicasts", lambda machine, n: np.repeat(unicasts(machine, 1), n))
    with pytest.raises(RuntimeError, match=f"1 of {N} IPIs notified their target"):
        c.compare("6.18", door)


@pytest.mark.usefixtures("few")
def test_a_comparison_gives_medians() -> None:
    for row in (c.compare("6.18", "batch", rounds=3), c.compare_until_ipi("5.7", rounds=3)):
        assert min(row.fast_ns, row.generic_ns, row.ratio) > 0
    assert row.door == "python, until the IPI left"
