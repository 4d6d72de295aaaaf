"""Timers of guests on Unicorn's CPUs beside the guest's own TSC, and what CPUID says of addresses."""

from __future__ import annotations

import pytest

pytest.importorskip("unicorn", reason="unicorn is not installed")

from fastexit.adapters.unicorn import Ended
from unicorn_guest import CLI, NOP, STI, STOP, bump, count, guest, read, word, wrmsr

TIMER = 0x40
LVTT, TMICT, TDCR, DEADLINE = 0x832, 0x838, 0x83E, 0x6E0
ONE_SHOT, BY_TSC = TIMER, 0x40000 | TIMER
KEEP_TSC = b"\x0f\x31\x48\xc1\xe2\x20\x48\x09\xd0\x48\x89\x04\x25"
"""RDTSC; SHL RDX, 32; OR RAX, RDX; MOV [...], RAX."""
SPIN_ON = b"\x83\x3c\x25" + word(0x600 + 8 * TIMER) + b"\x00\x74\xf6"
"""CMP DWORD [count], 0; JE back to it."""


@pytest.mark.parametrize("before", [0, 1, 700, 999])
@pytest.mark.parametrize("cpus", [1, 2])
def test_no_timer_is_early(before: int, cpus: int) -> None:
    """Wherever in a slice it is set: at least as long by the guest's TSC, and not longer than a round more."""
    code = wrmsr(LVTT, ONE_SHOT) + wrmsr(TDCR, 0xB) + STI + NOP * (before % 400) + KEEP_TSC + word(0x500)
    code += wrmsr(TMICT, 5000) + SPIN_ON + KEEP_TSC + word(0x508) + STOP
    host = guest(code, *[b"\xeb\xfe"] * (cpus - 1), quantum=1000)
    host.run(lambda host: read(host, 0x508), instructions=100_000)
    assert 5000 <= read(host, 0x508) - read(host, 0x500) <= 7500


@pytest.mark.parametrize("machine", [{}, {"apicv": False}, {"vendor": "svm"}, {"kernel": "5.6"}], ids=str)
def test_a_deadline_that_has_passed(machine: dict) -> None:
    """It comes before the next instruction: RDTSC, and a write of what it gave."""
    now = b"\x0f\x31\xb9" + word(DEADLINE) + b"\x0f\x30"  # rdtsc; mov ecx, DEADLINE; wrmsr
    code = wrmsr(LVTT, BY_TSC) + STI + NOP * 100 + now + b"\x8b\x04\x25" + word(0x600 + 8 * TIMER)
    code += b"\x89\x04\x25" + word(0x500) + CLI + STOP  # mov eax, [count]; mov [0x500], eax
    host = guest(code, **machine)
    assert host.run(instructions=10_000) is Ended.IDLE
    assert (read(host, 0x500, 4), count(host, TIMER)) == (1, 1)


def test_a_slice_goes_on_behind_it() -> None:
    """Deadlines one behind the other: each write is made once, and a CPU beside it loses nothing."""
    code = wrmsr(LVTT, BY_TSC) + b"".join(NOP * 3 + wrmsr(DEADLINE, 1 << 40) + bump(0x508) for _ in range(12)) + STOP
    other = b"\xff\x04\x25" + word(0x510) + b"\xeb\xf7"  # inc dword [0x510]; jmp to it
    host = guest(code, other)
    host.run(instructions=5000)
    assert read(host, 0x508, 4) == 12
    assert host.machine.vcpus[0].get_msr(DEADLINE) == 1 << 40
    assert read(host, 0x510, 4) >= 2400


def test_cpuid_has_the_machines_address_bits() -> None:
    code = b"\xb8" + word(0x8000_0008) + b"\x0f\xa2\x89\x04\x25" + word(0x500) + STOP
    host = guest(code, maxphyaddr=43)
    host.run(instructions=100)
    assert read(host, 0x500, 4) & 0xFF == 43
