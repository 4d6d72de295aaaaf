"""Programs in ELF format, as far as the lab has to find its way in one: loaded parts and dynamic symbols.

Models: nothing.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

MAGIC = b"\x7fELF\x02"
"""64 bits."""
LOADED, EXECUTABLE = 1, 1
DYNAMIC_SYMBOLS = 11
_SEGMENT, _SECTION, _SYMBOL = struct.Struct("<IIQQQQ"), struct.Struct("<IIQQQQII"), struct.Struct("<IBBHQQ")
_SEGMENT_BYTES, _SECTION_BYTES = 56, 64


class Segment(NamedTuple):
    """A loaded part of a program."""

    at: int
    """In the file."""
    size: int
    address: int
    executable: bool


def segments(program: bytes) -> list[Segment]:
    """Loaded parts; ValueError for what is no program of 64 bits."""
    if program[:5] != MAGIC:
        raise ValueError("it is no program of 64 bits")
    (table,), (count,) = struct.unpack_from("<Q", program, 32), struct.unpack_from("<H", program, 56)
    parts = (_SEGMENT.unpack_from(program, table + _SEGMENT_BYTES * n) for n in range(count))
    return [
        Segment(at, size, address, bool(flags & EXECUTABLE))
        for kind, flags, at, address, _, size in parts
        if kind == LOADED
    ]


def symbols(program: bytes) -> dict[str, int]:
    """Addresses of the functions and data that a program shows to its plugins."""
    (table,), (count,) = struct.unpack_from("<Q", program, 40), struct.unpack_from("<H", program, 60)
    sections = [_SECTION.unpack_from(program, table + _SECTION_BYTES * n) for n in range(count)]
    found: dict[str, int] = {}
    for _, kind, _, _, at, size, names, _ in sections:
        if kind != DYNAMIC_SYMBOLS:
            continue
        text = sections[names][4]
        for name, _, _, _, address, _ in _SYMBOL.iter_unpack(program[at : at + size]):
            end = program.index(b"\0", text + name)
            found[program[text + name : end].decode(errors="replace")] = address
    return found


def place(parts: list[Segment], address: int) -> int:
    """Where an address is in the file; ValueError where nothing is loaded."""
    for at, size, begin, _ in parts:
        if begin <= address < begin + size:
            return address - begin + at
    raise ValueError(f"it has nothing at {address:#x}")
