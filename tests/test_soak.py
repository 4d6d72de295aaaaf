"""Four threads, IPIs, timers, level-triggered lines and storms of INIT at full speed: nothing lost, nothing invented.

The program is tests/native/soak.c, which says what it counts; faults that it plants itself must be noticed.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
from pathlib import Path

import pytest

from conftest import BOUNDS, INTERPRETED
from embedded import built, need_compiler
from fastexit import layout as L
from fastexit.embed import build, cabi

SOURCE = Path(__file__).parent / "native" / "soak.c"
FAULTS = ("lost", "invented", "line", "init", "lock", "timer", "late timer", "early timer", "second tick")
WRONG = ("lost", "invented", "lines lost", "timers lost", "registers wrong", "locks held", "accepted wrongly")
pytestmark = pytest.mark.skipif(INTERPRETED or BOUNDS, reason="a host wants kernels as they are meant to run")


@pytest.fixture(scope="module")
def program() -> Path:
    need_compiler()
    cabi.addresses()
    library = built()
    target, half = library / "soak", library / f"soak.{os.getpid()}"
    line = [*build.compiler(), "-O2", "-std=gnu11", "-Wall", "-Wextra", "-Werror", "-pthread"]
    line += [*shlex.split(build.cflags(library)), str(SOURCE), "-o", str(half), *shlex.split(build.libs(library))]
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return half.replace(target)


def soak(program: Path, exits: int, seed: int = 1, planted: str = "") -> tuple[int, dict[str, float]]:
    """Run it: exit code and counts."""
    locks = [str(8 * (word - L.HOT)) for word in (L.IRQ_LOCK, L.H_MAP_LOCK)]
    fault = str(FAULTS.index(planted) + 1 if planted else 0)
    done = subprocess.run(
        [str(program), str(exits), str(seed), fault, *locks], stdout=subprocess.PIPE, text=True, check=False
    )
    return done.returncode, json.loads(done.stdout)


@pytest.mark.parametrize("timers", ["preemption timer", "hrtimer"])
def test_nothing_is_lost(program: Path, timers: str) -> None:
    code, counts = soak(program, 2_000_000, seed=1 + (timers == "hrtimer"))
    assert (code, {name: counts[name] for name in WRONG}) == (0, dict.fromkeys(WRONG, 0))
    timers_too = ("ticks", "periodic_ticks", "meanwhile", "timers_gone_by_init")
    for what in ("fast", "broadcasts", "levels", "again", "resets", "gone_by_init", *timers_too):
        assert counts[what], f"none: {what}"


@pytest.mark.parametrize("planted", FAULTS)
def test_planted_faults_are_noticed(program: Path, planted: str) -> None:
    """Soon, or not so soon: they are planted by chance, and threads have to meet for some."""
    assert any(soak(program, exits, planted=planted)[0] for exits in (300_000, 3_000_000, 30_000_000))


@pytest.mark.long
def test_soak(program: Path) -> None:
    """FASTEXIT_SOAK exits, 10^9 unless told."""
    exits = int(os.environ.get("FASTEXIT_SOAK", "1000000000"))
    code, counts = soak(program, exits, seed=int(os.environ.get("FASTEXIT_SEED", "1")))
    print(json.dumps(counts))
    assert (code, {name: counts[name] for name in WRONG}) == (0, dict.fromkeys(WRONG, 0))
    assert counts["exits"] >= exits
