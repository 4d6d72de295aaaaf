"""What kvm-unit-tests and their like find on QEMU: ports that echo, raise a line, and route synthetic interrupts.

Models: QEMU's pc-testdev (0xE0 to 0xEB, 0x2000 to 0x2017) and hyperv-testdev (0x3000) as far as interrupts go.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from fastexit.adapters.kvmhost.ports import Ports

if TYPE_CHECKING:
    from fastexit.machine import Machine

ECHO, FLUSH, ECHO_BYTE, LINES, SINTS = 0xE0, 0xE4, 0xE8, 0x2000, 0x3000
LINE_COUNT = 24
CREATE, DESTROY, RAISE = 1, 2, 3
"""Of hyperv-testdev: bits 23:16 of what is written, VP index in 15:8, SINT in 7:0."""
FIRST_SINT_GSI = 64


class LineDevice:
    """Raises ``line(gsi, level)``, and synthetic interrupts of a machine that has any."""

    def __init__(self, line: Callable[[int, int], object]) -> None:
        self._line = line
        self._kept = {ECHO: 0xFFFF_FFFF, ECHO_BYTE: 0}

    def connect(self, ports: Ports) -> None:
        """Puts it on the bus."""
        ports.add(self, ECHO, 12)
        ports.add(self, LINES, LINE_COUNT)

    def read(self, port: int, size: int) -> int:
        """IN: what was written last."""
        base = port & ~3
        return self._kept.get(base, 0) >> 8 * (port & 3)

    def write(self, port: int, size: int, value: int) -> None:
        """OUT."""
        if port >= LINES:
            self._line(port - LINES, int(value != 0))
            return
        base, shift = port & ~3, 8 * (port & 3)
        if base in self._kept:
            mask = (1 << 8 * size) - 1 << shift
            self._kept[base] = (self._kept[base] & ~mask | value << shift & mask) & 0xFFFF_FFFF


class SintDevice:
    """Routes GSIs to SINTs, and raises them."""

    def __init__(self, machine: Machine, line: Callable[[int, int], object], routes: list[tuple[object, ...]]) -> None:
        self._machine, self._line, self._fixed = machine, line, routes
        self._gsis: dict[tuple[int, int], int] = {}

    def read(self, port: int, size: int) -> int:
        """IN."""
        return 0

    def write(self, port: int, size: int, value: int) -> None:
        """OUT of four bytes."""
        what, vcpu, sint = value >> 16 & 0xFF, value >> 8 & 0xFF, value & 0xFF
        at = vcpu, sint
        if what == CREATE and at not in self._gsis:
            taken = set(self._gsis.values())
            self._gsis[at] = next(gsi for gsi in range(FIRST_SINT_GSI, 1 << 16) if gsi not in taken)
            self._route()
        elif what == DESTROY and self._gsis.pop(at, None) is not None:
            self._route()
        elif what == RAISE and at in self._gsis:
            self._line(self._gsis[at], 1)

    def _route(self) -> None:
        sints = [("hv_sint", gsi, vcpu, sint) for (vcpu, sint), gsi in self._gsis.items()]
        self._machine.set_gsi_routing([*self._fixed, *sints])
