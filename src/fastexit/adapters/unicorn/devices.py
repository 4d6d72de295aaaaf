"""What a guest finds where the machine has no device: nobody, or whatever an embedder puts there."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fastexit.adapters.unicorn.cpu import UnicornCpu


class Devices:
    """An embedder's devices, as UnicornHost asks for them; a subclass answers, this one does not.

    An access of the guest to a port or an address that is neither memory nor a device of the machine leaves to user
    space, which is this. ``cpu`` is the CPU that asks. What nobody answers reads as all ones, and a write is lost.
    """

    def port_read(self, cpu: UnicornCpu, port: int, size: int) -> int:
        """IN of ``size`` bytes."""
        return (1 << 8 * size) - 1

    def port_write(self, cpu: UnicornCpu, port: int, value: int, size: int) -> None:
        """OUT."""

    def memory_read(self, cpu: UnicornCpu, address: int, size: int) -> int:
        """A load from a guest-physical address."""
        return (1 << 8 * size) - 1

    def memory_write(self, cpu: UnicornCpu, address: int, value: int, size: int) -> None:
        """A store."""
