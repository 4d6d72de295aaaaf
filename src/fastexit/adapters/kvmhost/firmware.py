"""What a PC's firmware keeps and tells: CMOS with the clock, and QEMU's fw_cfg.

Models: the MC146818's registers as far as guests read the time; docs/specs/fw_cfg.rst of QEMU by its two I/O ports.
"""

from __future__ import annotations

import struct
import time
from collections.abc import Mapping

from fastexit.adapters.kvmhost.memory import GIB, HOLE, MIB, Memory

CMOS_INDEX, FW_CFG = 0x70, 0x510
STATUS_A, STATUS_B, STATUS_C, STATUS_D, SHUTDOWN = 10, 11, 12, 13, 15
CENTURY = 0x32
HOURS_24, VALID, DIVIDER = 2, 0x80, 0x26
_CLOCK = {0: "tm_sec", 2: "tm_min", 4: "tm_hour", 6: "tm_wday", 7: "tm_mday", 8: "tm_mon", 9: "tm_year"}


class Cmos:
    """128 bytes behind ports 0x70 and 0x71, UTC among them; ``shutdown`` is the byte that says how to go on."""

    def __init__(self, memory: Memory) -> None:
        self._index = 0
        self._bytes = bytearray(128)
        self._bytes[STATUS_A], self._bytes[STATUS_B], self._bytes[STATUS_D] = DIVIDER, HOURS_24, VALID
        extended = min(memory.low - MIB, 63 * MIB) // 1024
        above = max(0, min(memory.low, HOLE) - 16 * MIB) >> 16
        struct.pack_into("<HH", self._bytes, 0x15, 640, extended)
        struct.pack_into("<H", self._bytes, 0x30, extended)
        struct.pack_into("<H", self._bytes, 0x34, above)
        self._bytes[0x5B:0x5E] = (max(0, memory.size - HOLE) >> 16).to_bytes(3, "little")

    @property
    def shutdown(self) -> int:
        """What the guest wants to happen behind a reset."""
        return self._bytes[SHUTDOWN]

    def read(self, port: int, size: int) -> int:
        """IN."""
        if port & 1 == 0:
            return 0xFF
        if self._index in _CLOCK or self._index == CENTURY:
            return self._time()
        return self._bytes[self._index]

    def _time(self) -> int:
        now = time.gmtime()
        if self._index == CENTURY:
            number = now.tm_year // 100
        else:
            number = getattr(now, _CLOCK[self._index])
            if self._index == 9:
                number %= 100
            elif self._index == 6:
                number = (number + 1) % 7 + 1
        return number if self._bytes[STATUS_B] & 4 else number // 10 << 4 | number % 10

    def write(self, port: int, size: int, value: int) -> None:
        """OUT."""
        if port & 1 == 0:
            self._index = value & 0x7F
        elif self._index not in (*_CLOCK, CENTURY, STATUS_C, STATUS_D):
            self._bytes[self._index] = value & 0xFF


SIGNATURE, FEATURES, RAM_SIZE, CPUS, MOST_CPUS, IRQ0_OVERRIDE = 0x00, 0x01, 0x03, 0x05, 0x0F, 0x8002


def configuration(memory: Memory, vcpus: int) -> dict[int, bytes]:
    """What a guest without ACPI is told of the machine."""
    return {
        SIGNATURE: b"QEMU",
        FEATURES: struct.pack("<I", 1),
        RAM_SIZE: struct.pack("<Q", memory.size),
        CPUS: struct.pack("<H", vcpus),
        MOST_CPUS: struct.pack("<H", vcpus),
        IRQ0_OVERRIDE: struct.pack("<I", 0),
    }


class FwCfg:
    """An item is chosen by a word to 0x510, and read byte by byte at 0x511; behind its end are zeros."""

    def __init__(self, items: Mapping[int, bytes]) -> None:
        self._items = dict(items)
        self._chosen, self._at = b"", 0

    def read(self, port: int, size: int) -> int:
        """IN."""
        if port & 1 == 0:
            return 0
        value = int.from_bytes(self._chosen[self._at : self._at + size], "little")
        self._at += size
        return value

    def write(self, port: int, size: int, value: int) -> None:
        """OUT."""
        if port & 1 == 0:
            self._chosen, self._at = self._items.get(value, b""), 0


assert HOLE < 4 * GIB
