"""What the comparisons time: every IPI is fresh, and goes the way that its side is meant to go."""

from __future__ import annotations

import random
from collections.abc import Callable
from types import SimpleNamespace

import numpy as np
import pytest

import fastexit as fx
from fastexit.insight import compare as c
from fastexit.outcome import CODE_COMPLETION, COMPLETION_REENTER
from fastexit.profile import PROFILES, since
from fastexit.traits import Trait
from generations import having

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
        # an AVIC that x2APIC in the guest's CPUID keeps off rings no doorbell
        off = vendor == "svm" and kernel in having(Trait.INHIBIT_X2APIC)
        assert c.notified(machine, codes) == (0 if off else N)
        taken = fast and (since(kernel, "5.6") or vendor == "vmx")
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


class BusyClock:
    """The clock of a process that loses its CPU to others at the end of each time slice."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.now = 0
        self.left = 0

    def perf_counter_ns(self) -> int:
        return self.now

    def spend(self, ns: int) -> None:
        """Compute for so long."""
        self.now += ns
        self.left -= ns
        while self.left < 0:
            self.now += self.rng.randint(6_000_000, 15_000_000)
            self.left += self.rng.randint(2_800_000, 3_200_000)


@pytest.mark.parametrize("door", c.DOORS)
@pytest.mark.parametrize("seed", range(5))
def test_a_busy_machine_changes_no_verdict(monkeypatch: pytest.MonkeyPatch, door: str, seed: int) -> None:
    """Three of four slices go to other processes; the ratio is what it is on a quiet machine."""
    clock = BusyClock(seed)
    exits_ns = {True: {"python": 4_000, "batch": 60}[door], False: {"python": 4_500, "batch": 67.5}[door]}

    def make(machine: SimpleNamespace, exits: np.ndarray) -> Callable[[], None]:
        return lambda: clock.spend(int(exits_ns[machine.fastpath] * len(exits)))

    monkeypatch.setattr(c, "time", clock)
    monkeypatch.setattr(c, "booted", lambda kernel, vendor, vcpus: SimpleNamespace(fastpath=True))
    monkeypatch.setattr(c, "unicasts", lambda machine, n: np.zeros(n))
    monkeypatch.setattr(c, "consume", lambda machine: clock.spend(250_000))
    monkeypatch.setattr(c, "_check_fresh", lambda machine, codes, n: None)
    at_full_length = {"python": (1_000, 1), "batch": (4_000, 6)}[door]  # interpreted kernels have shorter ones
    monkeypatch.setitem(
        c.DOORS, door, c.DOORS[door]._replace(make=make, exits=at_full_length[0], passes=at_full_length[1])
    )
    assert c.compare("6.18", door, rounds=41).ratio == pytest.approx(1.125, rel=0.01)
