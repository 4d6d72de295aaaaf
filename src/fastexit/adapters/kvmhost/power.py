"""How a guest ends: switched off, reset, or with an exit code.

Models: ACPI's PM1a block and PM timer; the reset ports of a PC (0x92, 0xCF9, the keyboard controller's pulse); QEMU's
isa-debug-exit, without its shift of the code; Bochs' and QEMU's port 0x8900.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from fastexit.adapters.kvmhost.acpi import PM_CONTROL, PM_EVENTS, PM_TIMER, RESET, SLEEP_TYPE
from fastexit.adapters.kvmhost.ports import Ports

EXIT, FAST_RESET, KEYBOARD_DATA, KEYBOARD, BOCHS = 0xF4, 0x92, 0x60, 0x64, 0x8900
PULSE_RESET = 0xFE
SCI_ENABLED, SLEEP, SLEEP_TYPE_AT = 1, 1 << 13, 10
SHUTDOWN = b"Shutdown"
PM_HZ = 3_579_545


class Ended(NamedTuple):
    """Why a guest is over, and the exit code that comes of it; ``detail`` is for whoever has to find out more."""

    reason: str
    code: int
    detail: str = ""


class Power:
    """All ports that end a guest: ``end`` is called with what they say. ``clock`` is the guest's time in ns."""

    def __init__(self, end: Callable[[Ended], object], clock: Callable[[], int]) -> None:
        self._end, self._clock = end, clock
        self._enabled, self._control, self._fast = 0, SCI_ENABLED, 0
        self._bochs = 0

    def connect(self, ports: Ports) -> None:
        """Puts them on the bus."""
        ports.add(self, PM_EVENTS, 12)
        ports.add(self, EXIT, 4)
        for port in (FAST_RESET, KEYBOARD_DATA, KEYBOARD, RESET, BOCHS):
            ports.add(self, port)

    def read(self, port: int, size: int) -> int:
        """IN."""
        if port == PM_TIMER:
            return self._clock() * PM_HZ // 1_000_000_000 & 0xFFFF_FFFF
        if port == PM_EVENTS + 2:
            return self._enabled
        if port == PM_EVENTS:
            return self._enabled << 16
        if port == PM_CONTROL:
            return self._control
        return self._fast if port == FAST_RESET else 0

    def write(self, port: int, size: int, value: int) -> None:
        """OUT."""
        if port == EXIT:
            self._end(Ended("exit port", value & 0xFF))
        elif port == PM_EVENTS + 2:
            self._enabled = value & 0xFFFF
        elif port == PM_EVENTS and size == 4:
            self._enabled = value >> 16
        elif port == PM_CONTROL:
            self._control = value & ~SLEEP | SCI_ENABLED
            if value & SLEEP and value >> SLEEP_TYPE_AT & 7 == SLEEP_TYPE:
                self._end(Ended("switched off", 0))
        elif port == FAST_RESET:
            self._fast = value & ~1
            if value & 1:
                self._end(Ended("reset", 0))
        elif (port == RESET and value & 4) or (port == KEYBOARD and value == PULSE_RESET):
            self._end(Ended("reset", 0))
        elif port == BOCHS:
            self._bochs = self._bochs + 1 if SHUTDOWN[self._bochs] == value & 0xFF else 0
            if self._bochs == len(SHUTDOWN):
                self._bochs = 0
                self._end(Ended("switched off", 0))
