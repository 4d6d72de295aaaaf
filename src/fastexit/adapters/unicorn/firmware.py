"""The last 64 KiB below 4 GiB, which is ours: what brings an emulated CPU into a mode by instructions of its own.

Unicorn sets selectors, not descriptors, so that a segment register, and with it the CPU's mode, changes only by an
instruction. One that starts in long mode comes by an IRETQ; one that starts by SIPI leaves long mode again, as
firmware that returns to real mode does.
"""

from __future__ import annotations

import struct

BASE = 0xFFFF_0000
BYTES = 0x1_0000
IRETQ, REAL_MODE, PROTECTED_MODE, RESET_VECTOR = BASE, BASE + 0x10, BASE + 0x40, BASE + 0xFFF0
GDT, FAR_POINTER, FRAME, PML4 = BASE + 0x100, BASE + 0x200, BASE + 0x800, BASE + 0x1000
CODE64, DATA, CODE16, DATA16, CODE32 = 0x08, 0x10, 0x18, 0x20, 0x28

_PDPT, _PDS = PML4 + 0x1000, PML4 + 0x2000
_PRESENT_WRITE, _LARGE = 3, 0x83
_TO_REAL_MODE = bytes.fromhex(
    "0f22c0"  # mov cr0, eax: paging and protection off, CS keeps its 16-bit descriptor
    "8edb 8ec3 8ed3 8ee3 8eeb"  # mov ds, es, ss, fs, gs, bx
    "2eff2e0002"  # jmp far [cs:0x200]
)
_TO_PROTECTED_MODE = bytes.fromhex(
    "0f22c0"  # mov cr0, eax: paging off, and with it long mode
    "8edb 8ec3 8ed3 8ee3 8eeb"  # mov ds, es, ss, fs, gs, bx
    "ffe7"  # jmp edi
)
STEPS = 8
"""The IRETQ and these, of either."""
CR0_RESET, CR0_PROTECTED, CR0_LONG = 0x10, 0x11, 0x8000_0033  # ET; PE; PG, NE, MP
CR4_LONG = 0x620  # PAE, OSFXSR, OSXMMEXCPT
DESCRIPTORS = (
    0,
    0x00AF_9B00_0000_FFFF,  # 64-bit code
    0x00CF_9300_0000_FFFF,  # data
    0x0000_9B00_0000_FFFF | (BASE & 0xFF_FFFF) << 16 | BASE >> 24 << 56,  # 16-bit code, here
    0x0000_9300_0000_FFFF,  # 16-bit data
    0x00CF_9B00_0000_FFFF,  # 32-bit code
)
GDT_LIMIT = 8 * len(DESCRIPTORS) - 1


def image() -> bytearray:
    """The bytes: code, a GDT, page tables that map 4 GiB as they are, and at the reset vector a HLT."""
    out = bytearray(BYTES)

    def put(at: int, data: bytes) -> None:
        out[at - BASE : at - BASE + len(data)] = data

    put(IRETQ, bytes.fromhex("48cf"))
    put(REAL_MODE, _TO_REAL_MODE)
    put(PROTECTED_MODE, _TO_PROTECTED_MODE)
    put(RESET_VECTOR, bytes.fromhex("fa f4 ebfd"))  # cli; hlt; jmp to the hlt
    put(GDT, struct.pack(f"<{len(DESCRIPTORS)}Q", *DESCRIPTORS))
    put(PML4, struct.pack("<Q", _PDPT | _PRESENT_WRITE))
    put(_PDPT, struct.pack("<4Q", *(_PDS + 0x1000 * i | _PRESENT_WRITE for i in range(4))))
    put(_PDS, struct.pack("<2048Q", *(i << 21 | _LARGE for i in range(2048))))
    return out


def frame(selector: int, rip: int, stack_selector: int, rsp: int, rflags: int = 2) -> bytes:
    """What IRETQ takes from the stack."""
    return struct.pack("<5Q", rip, selector, rflags, rsp, stack_selector)


def far_pointer(selector: int, offset: int) -> bytes:
    """Where the way to real mode ends."""
    return struct.pack("<HH", offset, selector)
