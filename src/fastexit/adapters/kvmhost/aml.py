"""A little of ACPI's machine language: names, devices and their resources.

Models: nothing. ACPI 6.5, chapters 20 (encoding) and 6.4 (resources).
"""

from __future__ import annotations

import struct

ZERO, ONE, NAME, SCOPE, BUFFER, PACKAGE, DEVICE = 0x00, 0x01, 0x08, 0x10, 0x11, 0x12, 0x5B82
BYTE, WORD, DWORD, QWORD, STRING = 0x0A, 0x0B, 0x0C, 0x0E, 0x0D
END_TAG = b"\x79\x00"
"""Of a resource template; a checksum of 0 counts as right."""


def length(inside: int) -> bytes:
    """PkgLength: how long a construct is, the length's own bytes counted."""
    if inside + 1 < 0x40:
        return bytes([inside + 1])
    for more in (1, 2, 3):
        whole = inside + 1 + more
        if whole < 1 << 4 + 8 * more:
            return bytes([more << 6 | whole & 0xF]) + (whole >> 4).to_bytes(more, "little")
    raise ValueError(f"{inside} bytes are too many for one AML construct")


def integer(value: int) -> bytes:
    """A number in as few bytes as it takes."""
    if value in (0, 1):
        return bytes([ZERO, ONE][value : value + 1])
    for prefix, size in ((BYTE, 1), (WORD, 2), (DWORD, 4), (QWORD, 8)):
        if value < 1 << 8 * size:
            return bytes([prefix]) + value.to_bytes(size, "little")
    raise ValueError(f"{value:#x} has more than 64 bits")


def text(value: str) -> bytes:
    """A string."""
    return bytes([STRING]) + value.encode("ascii") + b"\0"


def eisa_id(value: str) -> bytes:
    """A compressed identifier, such as PNP0501."""
    letters = [ord(letter) - 0x40 for letter in value[:3]]
    return bytes([DWORD]) + struct.pack(">HH", letters[0] << 10 | letters[1] << 5 | letters[2], int(value[3:], 16))


def name(segment: str, value: bytes) -> bytes:
    """Name(segment, value)."""
    return bytes([NAME]) + segment.encode("ascii") + value


def package(*elements: bytes) -> bytes:
    """Package() {elements}."""
    inside = bytes([len(elements)]) + b"".join(elements)
    return bytes([PACKAGE]) + length(len(inside)) + inside


def buffer(data: bytes) -> bytes:
    """Buffer() {data}."""
    inside = integer(len(data)) + data
    return bytes([BUFFER]) + length(len(inside)) + inside


def scope(path: str, content: bytes) -> bytes:
    """Scope(path) {content}."""
    inside = path.encode("ascii") + content
    return bytes([SCOPE]) + length(len(inside)) + inside


def device(segment: str, *content: bytes) -> bytes:
    """Device(segment) {content}."""
    inside = segment.encode("ascii") + b"".join(content)
    return DEVICE.to_bytes(2, "big") + length(len(inside)) + inside


def io_ports(first: int, count: int) -> bytes:
    """I/O ports, decoded with 16 bits."""
    return struct.pack("<BBHHBB", 0x47, 1, first, first, 1, count)


def irq(number: int) -> bytes:
    """An interrupt line: edge-triggered, active high, not shared."""
    return struct.pack("<BH", 0x22, 1 << number)
