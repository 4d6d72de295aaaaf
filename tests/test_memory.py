"""A machine's memory: pages that nobody used cost nothing, to the process and to the ones that it forks."""

from __future__ import annotations

import sys

import pytest

import fastexit as fx
from fastexit.guestmemory import MAP_NORESERVE


def test_unused_memory_is_not_reserved() -> None:
    """The kernel does not count the mapping (VM_NORESERVE, "nr"), so a process with many machines can fork."""
    if not sys.platform.startswith("linux"):
        pytest.skip("smaps is Linux's")
    m = fx.Machine(vcpus=1)
    with open("/proc/self/smaps") as smaps:
        flags = []
        for line in smaps:
            words = line.split()
            if "-" in words[0] and not words[0].endswith(":"):
                first, last = (int(end, 16) for end in words[0].split("-"))
                mine = first <= m.handle < last
            elif words[0] == "VmFlags:" and mine:
                flags = words[1:]
    assert MAP_NORESERVE
    assert "nr" in flags
