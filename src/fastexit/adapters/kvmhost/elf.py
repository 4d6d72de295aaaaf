"""What an ELF program wants to have loaded, 32 bits or 64, and how a kernel's parts come into a guest's memory.

Models: nothing. Images come from anywhere: every offset and size is checked against the file before it is used.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import NamedTuple

from fastexit.adapters.kvmhost.memory import FIRST_MIB_ENDS, MIB, Memory

MAGIC = b"\x7fELF"
LOADED = 1
MOST_SEGMENTS = 64
_CLASSES = {1: ("<16sHHIIIIIHHH", "<IIIIIIII"), 2: ("<16sHHIQQQIHHH", "<IIQQQQQQ")}


class Segment(NamedTuple):
    """A part to load: its bytes, where they go, and how much memory it takes."""

    address: int
    data: bytes
    memory: int


class Program(NamedTuple):
    """A program: its machine's width in bits, where it begins, what is loaded."""

    bits: int
    entry: int
    segments: list[Segment]


def place(memory: Memory, entry: int, segments: Sequence[Segment]) -> int:
    """Puts segments into a guest's memory: where the last one ends. ValueError, before any is stored, if one cannot be.

    A program begins in one of them, and above 1 MiB: what a boot protocol needs lies below.
    """
    for segment in segments:
        ends = segment.address + segment.memory
        if segment.address < FIRST_MIB_ENDS:
            raise ValueError(f"it wants to be loaded to {segment.address:#x}, below 1 MiB")
        if not memory.within(segment.address, segment.memory):
            raise ValueError(f"it takes memory to {-(-ends // MIB)} MiB: the guest has {memory.low // MIB} MiB")
    if not any(segment.address <= entry < segment.address + segment.memory for segment in segments):
        raise ValueError(f"its entry {entry:#x} is in nothing that is loaded")
    for segment in segments:
        memory.write(segment.address, segment.data, "the kernel")
    return max(segment.address + segment.memory for segment in segments)


def program(image: bytes) -> Program:
    """The program in an image, by physical addresses; ValueError for what is none, or is damaged."""
    kind = _CLASSES.get(image[4]) if len(image) > 4 and image[:4] == MAGIC else None
    if kind is None or image[5:6] != b"\1":
        raise ValueError("not an ELF program for x86")
    header, entry = (struct.Struct(text) for text in kind)
    if len(image) < header.size:
        raise ValueError("the ELF header is cut off")
    _, _, _, _, start, table, _, _, _, size, count = header.unpack_from(image)
    if size != entry.size or not 0 < count <= MOST_SEGMENTS:
        raise ValueError(f"{count} ELF segments of {size} bytes each: 1 to {MOST_SEGMENTS} of {entry.size}")
    if table + size * count > len(image):
        raise ValueError("the table of ELF segments is cut off")
    found = []
    for number in range(count):
        fields = entry.unpack_from(image, table + number * size)
        if fields[0] != LOADED:
            continue
        if entry.size == 32:
            _, at, _, address, stored, memory, _, _ = fields
        else:
            _, _, at, _, address, stored, memory, _ = fields
        if at + stored > len(image):
            raise ValueError(f"ELF segment {number} is cut off: {stored:#x} bytes at {at:#x} of {len(image):#x}")
        if stored > memory:
            raise ValueError(f"ELF segment {number} has {stored:#x} bytes for {memory:#x} of memory")
        if memory:
            found.append(Segment(address, image[at : at + stored], memory))
    if not found:
        raise ValueError("the ELF program has nothing to load")
    placed = sorted(found)
    for before, after in zip(placed, placed[1:], strict=False):
        if before.address + before.memory > after.address:
            raise ValueError(f"two ELF segments overlap at {after.address:#x}")
    return Program(64 if entry.size == 56 else 32, start, found)
