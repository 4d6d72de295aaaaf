"""A guest's memory: mapped here, handed to KVM as memory slots, and described to the guest.

Models: nothing. Addresses are the guest's physical ones. Below 4 GiB there is room for devices, so what does not fit
under the hole lies above it.
"""

from __future__ import annotations

import mmap
from typing import Any, NamedTuple

from fastexit.checks import integer
from fastexit.kvm import ioctl as K

MIB, GIB = 1 << 20, 1 << 30
PAGE = 0x1000
HOLE = 3 * GIB
"""From here to 4 GiB are devices and firmware."""
LEAST, MOST = 2 * MIB, 64 * GIB
RAM, RESERVED = 1, 2
"""Types of the e820 map."""
FIRMWARE, FIRST_MIB_ENDS = 0xE_0000, MIB
BIOS_DATA, VGA = 0x9_FC00, 0xA_0000


class Range(NamedTuple):
    """A line of the memory map."""

    begin: int
    size: int
    kind: int = RAM


class Memory:
    """``size`` bytes of memory from 0 on; ValueError for a size that no guest of ours has."""

    def __init__(self, size: int) -> None:
        size = integer(size, "bytes of memory", MOST)
        if size < LEAST or size % PAGE:
            raise ValueError(f"{size:#x} bytes of memory: whole pages, at least {LEAST // MIB} MiB")
        self.size: int = size
        self.low: int = min(size, HOLE)
        """Where memory below 4 GiB ends."""
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        try:
            self.bytes: mmap.mmap = mmap.mmap(-1, size, flags=flags)
        except OSError as error:
            raise OSError(error.errno, f"{size // MIB} MiB of memory for the guest: {error.strerror}") from None
        self.address: int = int(K.ffi.cast("uintptr_t", K.ffi.from_buffer(self.bytes)))

    def slots(self) -> list[Any]:
        """KVM_SET_USER_MEMORY_REGION's arguments."""
        parts = [(0, 0, self.low)]
        if self.size > self.low:
            parts.append((4 * GIB, self.low, self.size - self.low))
        return [
            K.ffi.new(
                "struct kvm_userspace_memory_region *",
                {"slot": slot, "guest_phys_addr": at, "memory_size": size, "userspace_addr": self.address + inside},
            )
            for slot, (at, inside, size) in enumerate(parts)
        ]

    def ranges(self) -> list[Range]:
        """The memory map as a PC's firmware has it."""
        found = [
            Range(0, BIOS_DATA),
            Range(BIOS_DATA, VGA - BIOS_DATA, RESERVED),
            Range(FIRMWARE, FIRST_MIB_ENDS - FIRMWARE, RESERVED),
            Range(FIRST_MIB_ENDS, self.low - FIRST_MIB_ENDS),
        ]
        if self.size > self.low:
            found.append(Range(4 * GIB, self.size - self.low))
        return found

    def within(self, at: int, size: int) -> bool:
        """Whether all of it is memory below 4 GiB."""
        return 0 <= at and 0 <= size and at + size <= self.low

    def write(self, at: int, data: bytes, what: str = "data") -> None:
        """Stores bytes below 4 GiB; ValueError where there is no memory."""
        if not self.within(at, len(data)):
            raise ValueError(f"{what} at {at:#x}, {len(data):#x} bytes: the guest has memory to {self.low:#x}")
        self.bytes[at : at + len(data)] = data

    def read(self, at: int, size: int) -> bytes:
        """Bytes below 4 GiB; ValueError where there is no memory."""
        if not self.within(at, size):
            raise ValueError(f"{size:#x} bytes at {at:#x}: the guest has memory to {self.low:#x}")
        return self.bytes[at : at + size]
