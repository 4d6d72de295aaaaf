"""No call of any door, whatever its arguments, reads or writes outside a machine's memory, hangs, or fails unclearly.

A crash would take pytest with it, so storms run in a process of their own (hostile.py). The long one, a million calls:
``make test-long``, or ``python -m pytest -m long tests/test_hostile.py``.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import hostile
import strategies as s
from fastexit import layout as L
from fastexit import machine

HERE = Path(__file__).parent
SHORT = 20_000 if s.JIT else 3_000


def python(*arguments: str, timeout: float) -> subprocess.CompletedProcess[str]:
    """A Python of its own, in which tests and library can be imported."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(HERE), *filter(None, sys.path)])}
    return subprocess.run(
        [sys.executable, *arguments], env=environment, capture_output=True, text=True, timeout=timeout, check=False
    )


def play(seed: int, calls: int, timeout: float) -> None:
    """Plays machines from this seed on; a failure names the machine's seed, a hang fails by its timeout."""
    try:
        done = python(str(HERE / "hostile.py"), str(seed), str(calls), timeout=timeout)
    except subprocess.TimeoutExpired as hang:
        said = (hang.stdout or b"").decode().split("\n")
        pytest.fail(f"hangs: {said[-2:]}")
    last = done.stdout.splitlines()[-1:]
    assert done.returncode == 0, f"{last}, exit code {done.returncode}:\n{done.stderr[-3000:]}"
    made = int(last[0].split()[0])
    accepted = int(last[0].split()[2])
    assert made >= calls
    assert accepted > made // 2, "a storm that is refused everything tests nothing"


def test_storm() -> None:
    """A short one: every kind of machine, every door."""
    play(0, SHORT, timeout=240)


@pytest.mark.long
@pytest.mark.parametrize("part", range(4))
def test_long_storm(part: int) -> None:
    """A million calls, in four processes one after the other."""
    play(1_000_000 * (part + 1), 250_000, timeout=1800)


def test_storm_knows_every_address() -> None:
    """An entry that takes an address under a new name would get a number: say in hostile.ARRAYS what it points to."""
    assert hostile.unknown_addresses() == []


TOUCH_AND_DIE = """
import ctypes, os, hostile
from fastexit import layout as L
storm = next(storm for storm in map(hostile.Storm, range(50)) if storm.walled)
handle, (_, exits) = storm.m.handle, storm.buffers["exits"]
storm.m.guest_memory = guest = hostile.guarded(2 * hostile.PAGE)[0]
guest = storm.m.mem[L.H_GUEST_MEMORY]
beyond = guest + storm.m.mem[L.H_GUEST_BYTES]
rows = [handle + 8 * (first + hostile.ROWS * stride) for first, stride in hostile.REGIONS]
behind = exits + hostile.RECORDS * L.EXIT.itemsize
good = [handle, *(row - 8 for row in rows), exits, behind - 8, guest, beyond - 8]
for address in (handle - 8, handle + L.BYTES, *rows, behind, guest - 8, beyond, *good):
    child = os.fork()
    if not child:
        ctypes.c_uint64.from_address(address).value
        os._exit(0)
    print(os.waitpid(child, 0)[1])
"""


def test_walls_stand() -> None:
    """Whoever reads one word too far dies of it, so that a storm that lives has read none; the last words are free."""
    done = python("-c", TOUCH_AND_DIE, timeout=120)
    died = [int(status) for status in done.stdout.split()]
    addresses = 5 + len(hostile.REGIONS)
    assert (died, done.returncode) == ([signal.SIGSEGV] * addresses + [0] * addresses, 0), done.stderr


def test_a_write_to_a_row_of_nobody_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Machines without walls behind their rows are looked at."""
    monkeypatch.setattr(machine, "reserve", machine.reserve)  # storms replace it
    storm = next(storm for storm in map(hostile.Storm, range(50)) if not storm.walled)
    storm.check_empty_rows()
    storm.m.words[L.PAGE + len(storm.m.vcpus) * L.PAGE_STRIDE] = 1
    with pytest.raises(AssertionError, match="a row of nobody"):
        storm.check_empty_rows()
