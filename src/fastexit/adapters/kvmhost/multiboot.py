"""A kernel by the Multiboot specification, version 1: what it is loaded to, and what it is told.

Models: nothing. Multiboot 0.6.96. Images come from anywhere: a header that lies is refused in one line.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

from fastexit.adapters.kvmhost import elf
from fastexit.adapters.kvmhost.memory import FIRST_MIB_ENDS, PAGE, RAM, Memory
from fastexit.adapters.kvmhost.registers import Start, descriptors

MAGIC, LOADER_MAGIC = 0x1BAD_B002, 0x2BAD_B002
SEARCHED = 8192
WANTS_ADDRESSES, REQUIRED = 1 << 16, 0xFFFC
"""Flags: the header says where to load; those of the low 16 that this loader does not know and may not pass over."""
HAS_MEMORY, HAS_COMMAND, HAS_MODULES, HAS_MAP, HAS_NAME = 1, 1 << 2, 1 << 3, 1 << 6, 1 << 9
INFO_AT, TEXT_AT, TEXT_BYTES = 0x8000, 0x9000, 0x4000
NAME = b"fastexit\0"


class Header(NamedTuple):
    """Where the header is in the file, and its words."""

    at: int
    flags: int
    addresses: tuple[int, ...]
    """header_addr, load_addr, load_end_addr, bss_end_addr, entry_addr."""


def header(image: bytes) -> Header | None:
    """The header in the first 8 KiB, or None."""
    found = -1
    magic = struct.pack("<I", MAGIC)
    while (found := image.find(magic, found + 1, SEARCHED)) >= 0:
        if found % 4 or found + 12 > len(image):
            continue
        _, flags, total = struct.unpack_from("<III", image, found)
        if MAGIC + flags + total & 0xFFFF_FFFF:
            continue
        addresses: tuple[int, ...] = ()
        if flags & WANTS_ADDRESSES:
            if found + 32 > len(image):
                raise ValueError("the multiboot header is cut off")
            addresses = struct.unpack_from("<5I", image, found + 12)
        return Header(found, flags, addresses)
    return None


def parts(image: bytes, found: Header) -> tuple[int, list[elf.Segment]]:
    """Entry and what is loaded where; ValueError for a header or a program that makes no sense."""
    if found.flags & REQUIRED:
        raise ValueError(f"the multiboot header demands what no loader of version 1 knows: flags {found.flags:#x}")
    if not found.flags & WANTS_ADDRESSES:
        program = elf.program(image)
        return program.entry, program.segments
    at, begin, end, bss, entry = found.addresses
    first = found.at - (at - begin)
    stored = (end - begin) if end else len(image) - first
    if at < begin or first < 0 or stored <= 0 or first + stored > len(image):
        raise ValueError(f"the multiboot header's addresses are not in the file: {begin:#x} to {end:#x}")
    memory = max(stored, bss - begin) if bss else stored
    return entry, [elf.Segment(begin, image[first : first + stored], memory)]


def load(image: bytes, memory: Memory, command: str, module: bytes | None = None) -> Start:
    """Puts a kernel, its command line and a module into memory: how the boot CPU begins."""
    found = header(image)
    if found is None:
        raise ValueError("there is no multiboot header in it")
    entry, segments = parts(image, found)
    ends = elf.place(memory, entry, segments)
    line = command.encode() + b"\0"
    if len(line) + len(NAME) + 17 > TEXT_BYTES:
        raise ValueError(f"a command line of {len(line)} bytes is too long")
    memory.write(TEXT_AT, line + NAME)
    flags = HAS_MEMORY | HAS_COMMAND | HAS_MAP | HAS_NAME
    modules = 0, 0
    if module is not None:
        begin = ends + PAGE - 1 & -PAGE
        memory.write(begin, module, "initrd")
        where = TEXT_AT + TEXT_BYTES
        memory.write(where, struct.pack("<IIII", begin, begin + len(module), TEXT_AT + len(line) - 1, 0))
        modules, flags = (1, where), flags | HAS_MODULES
    table = b"".join(
        struct.pack("<IQQI", 20, begin, size, 1 if kind == RAM else 2) for begin, size, kind in memory.ranges()
    )
    where = INFO_AT + 0x100
    memory.write(where, table)
    info = struct.pack("<IIIII", flags, 639, (memory.low - FIRST_MIB_ENDS) // 1024, 0, TEXT_AT)
    info += struct.pack("<II16xII", *modules, len(table), where)
    info += struct.pack("<IIII", 0, 0, 0, TEXT_AT + len(line))
    memory.write(INFO_AT, info)
    descriptors(memory, 32)
    return Start(32, entry, rax=LOADER_MAGIC, rbx=INFO_AT)
