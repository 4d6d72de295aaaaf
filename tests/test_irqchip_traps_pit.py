"""What a naive PIT gets wrong at its ports, as far as that is not time."""

from __future__ import annotations

import pytest

from irqchip_scene import JUDGES, scene

MODE_AT, COUNT_LATCHED_AT = 13, 6
pytestmark = pytest.mark.parametrize("judge", JUDGES)


def test_trap_63_a_control_word_leaves_count_and_latches(judge: str) -> None:
    with scene(judge) as s:
        s.do("create_pit", True)
        s.do("io_write", 0, 0x43, 0x74, 1)  # channel 1, both bytes, mode 2
        s.do("io_write", 0, 0x41, 0x34, 1)
        s.do("io_write", 0, 0x41, 0x12, 1)
        s.do("io_write", 0, 0x43, 0x40, 1)  # latch
        s.do("io_write", 0, 0x43, 0x5C, 1)  # low byte, mode 6, which is 2
        channel = s.pit[24:48]
        assert int.from_bytes(channel[:4], "little") == 0x1234
        assert channel[COUNT_LATCHED_AT] == 3
        assert channel[MODE_AT] == 2


def test_trap_64_the_control_port_reads(judge: str) -> None:
    """It is the PIT's: no exit. What the guest gets is nobody's, 0 on a machine that has read nothing else."""
    with scene(judge) as s:
        s.do("create_pit", True)
        s.do("io_read", 0, 0x43, 1)
        assert s.result == (0, (), ())


def test_the_speakers_port(judge: str) -> None:
    with scene(judge) as s:
        s.do("io_read", 0, 0x61, 1)
        assert s.result[2]  # without a PIT it is user space's
        s.do("create_pit", False)
        s.do("io_read", 0, 0x61, 1)
        assert s.result[2]
    with scene(judge) as s:
        s.do("create_pit", True)
        assert s.do("create_pit", True) == "refused"
        s.do("io_write", 0, 0x61, 3, 1)
        assert s.do("io_read", 0, 0x61, 1) & 3 == 3
