"""A guest's I/O ports: which device has which.

Models: nothing. What nobody has reads as all ones, and a write to it is dropped, as on a bus without an answer.
"""

from __future__ import annotations

from collections import Counter
from typing import Protocol


class PortDevice(Protocol):
    """What has ports."""

    def read(self, port: int, size: int) -> int:
        """IN of ``size`` bytes."""
        ...

    def write(self, port: int, size: int, value: int) -> None:
        """OUT of ``size`` bytes."""
        ...


class Ports:
    """Devices by port. ``unclaimed`` counts accesses that found none."""

    def __init__(self) -> None:
        self._devices: dict[int, PortDevice] = {}
        self.unclaimed: Counter[int] = Counter()

    def add(self, device: PortDevice, first: int, count: int = 1) -> None:
        """Ports from ``first`` on are the device's."""
        for port in range(first, first + count):
            if port in self._devices:
                raise ValueError(f"port {port:#x} has a device")
            self._devices[port] = device

    def read(self, port: int, size: int) -> int:
        """A guest's IN."""
        device = self._devices.get(port)
        if device is None:
            self.unclaimed[port] += 1
            return (1 << 8 * size) - 1
        return device.read(port, size) & (1 << 8 * size) - 1

    def write(self, port: int, size: int, value: int) -> None:
        """A guest's OUT."""
        device = self._devices.get(port)
        if device is None:
            self.unclaimed[port] += 1
        else:
            device.write(port, size, value)
