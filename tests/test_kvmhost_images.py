"""Images that a guest is booted from: what is loaded where, and that a damaged one is refused in one line."""

from __future__ import annotations

import bz2
import gzip
import lzma
import random
import struct
from collections.abc import Callable

import pytest

from fastexit.adapters.kvmhost import elf, linux, multiboot
from fastexit.adapters.kvmhost.memory import GIB, HOLE, MIB, Memory
from fastexit.adapters.kvmhost.registers import GDT_AT, TABLES_AT, Start

CODE = b"\xf4" * 64


def elf32(segments: list[tuple[int, bytes, int]], entry: int, *, bits: int = 32) -> bytes:
    """An ELF program; segments are address, data, memory."""
    size, one = (52, 32) if bits == 32 else (64, 56)
    at = size + one * len(segments)
    table, data = b"", b""
    for address, content, memory in segments:
        where = at + len(data)
        if bits == 32:
            table += struct.pack("<8I", 1, where, address, address, len(content), memory, 7, 0x1000)
        else:
            table += struct.pack("<IIQQQQQQ", 1, 7, where, address, address, len(content), memory, 0x1000)
        data += content
    ident = b"\x7fELF" + bytes([1 if bits == 32 else 2, 1, 1]) + bytes(9)
    form = "<16sHHIIIIIHHHHHH" if bits == 32 else "<16sHHIQQQIHHHHHH"
    header = struct.pack(
        form, ident, 2, 3 if bits == 32 else 62, 1, entry, size, 0, 0, size, one, len(segments), 0, 0, 0
    )
    return header + table + data


def with_header(flags: int = 0, *addresses: int) -> bytes:
    head = struct.pack("<III", multiboot.MAGIC, flags, -(multiboot.MAGIC + flags) & 0xFFFF_FFFF)
    return head + struct.pack(f"<{len(addresses)}I", *addresses)


def kernel32(at: int = 0x40_0000, memory: int = 0x2000, entry: int | None = None) -> bytes:
    return elf32([(at, with_header() + CODE, memory)], at + 12 if entry is None else entry)


# ------------------------------------------------------------------------------------------------------------- memory


def test_memory_is_laid_round_the_hole() -> None:
    small = Memory(64 * MIB)
    assert [(r.begin, r.size) for r in small.ranges() if r.kind == 1] == [(0, 0x9FC00), (MIB, 63 * MIB)]
    (slot,) = small.slots()
    assert (slot.guest_phys_addr, slot.memory_size) == (0, 64 * MIB)
    large = Memory(5 * GIB)
    assert [(s.guest_phys_addr, s.memory_size) for s in large.slots()] == [(0, HOLE), (4 * GIB, 2 * GIB)]
    assert (large.ranges()[-1].begin, large.ranges()[-1].size) == (4 * GIB, 2 * GIB)


@pytest.mark.parametrize("size", [0, MIB, 3 * MIB + 1, 65 * GIB])
def test_memory_of_no_size(size: int) -> None:
    with pytest.raises(ValueError, match="memory"):
        Memory(size)


def test_memory_is_checked() -> None:
    memory = Memory(2 * MIB)
    memory.write(2 * MIB - 4, b"last")
    assert memory.read(2 * MIB - 4, 4) == b"last"
    for at in (2 * MIB - 3, -1, 1 << 64):
        with pytest.raises(ValueError, match="the guest has memory to 0x200000"):
            memory.write(at, b"last")


# ----------------------------------------------------------------------------------------------------------- multiboot


def test_multiboot_program_is_loaded() -> None:
    memory = Memory(32 * MIB)
    start = multiboot.load(kernel32(), memory, "name a b", b"module")
    assert start == Start(32, 0x40_000C, rax=multiboot.LOADER_MAGIC, rbx=multiboot.INFO_AT)
    assert memory.read(0x40_000C, 4) == b"\xf4" * 4
    info = struct.unpack("<9I", memory.read(start.rbx, 36))
    flags, lower, upper, _, line, modules, where = info[:7]
    assert flags == 0x1 | 0x4 | 0x8 | 0x40 | 0x200
    assert (lower, upper, modules) == (639, 31 * 1024, 1)
    assert memory.read(line, 9) == b"name a b\0"
    begin, end = struct.unpack("<II", memory.read(where, 8))
    assert (begin, memory.read(begin, end - begin)) == (0x40_2000, b"module")
    length, table = struct.unpack("<II", memory.read(start.rbx + 44, 8))
    rows = [struct.unpack("<IQQI", memory.read(table + at, 24)) for at in range(0, length, 24)]
    assert rows[0] == (20, 0, 0x9FC00, 1)
    assert rows[-1] == (20, MIB, 31 * MIB, 1)


def test_multiboot_header_says_where() -> None:
    memory = Memory(8 * MIB)
    at = 0x20_0000
    image = b"before__" + with_header(1 << 16, at + 8, at, 0, at + 0x3000, at + 40) + CODE
    start = multiboot.load(image, memory, "")
    assert start.rip == at + 40
    assert memory.read(at, 8) == b"before__"


@pytest.mark.parametrize(
    ("image", "why"),
    [
        (b"", "there is no multiboot header"),
        (with_header(), "not an ELF program"),
        (with_header(2), "demands what no loader of version 1 knows|not an ELF"),
        (with_header(4) + CODE, "demands what no loader"),
        (with_header(1 << 16) + bytes(10), "header is cut off"),
        (with_header(1 << 16, 0x20_0000, 0x30_0000, 0, 0, 0x20_0000) + CODE, "addresses are not in the file"),
        (with_header(1 << 16, 0x20_0000, 0x20_0000, 0x30_0000, 0, 0x20_0000) + CODE, "addresses are not in the file"),
        (with_header(1 << 16, 0x20_0000, 0x1F_0000, 0, 0, 0x20_0000) + CODE, "addresses are not in the file"),
        (kernel32(at=0x8000), "to 0x8000, below 1 MiB"),
        (kernel32(memory=64 * MIB), "the guest has 8 MiB"),
        (kernel32(at=0xFFFF_F000, memory=0x2000), "the guest has 8 MiB"),
        (kernel32(entry=0x10), "entry 0x10 is in nothing that is loaded"),
        (kernel32(memory=8), "has 0x4c bytes for 0x8 of memory"),
        (kernel32()[:-1], "segment 0 is cut off"),
        (kernel32()[:84], "there is no multiboot header|cut off"),
        (
            elf32([(0x20_0000, with_header() + CODE, 0x2000), (0x20_1000, CODE, 64)], 0x20_0000),
            "two ELF segments overlap",
        ),
    ],
)
def test_hostile_multiboot_images_get_one_line(image: bytes, why: str) -> None:
    with pytest.raises(ValueError, match=why) as caught:
        multiboot.load(image, Memory(8 * MIB), "")
    assert "\n" not in str(caught.value)


def test_long_command_line() -> None:
    with pytest.raises(ValueError, match="a command line of 20001 bytes is too long"):
        multiboot.load(kernel32(), Memory(8 * MIB), "x" * 20_000)


def test_module_without_room() -> None:
    with pytest.raises(ValueError, match="initrd at"):
        multiboot.load(kernel32(), Memory(8 * MIB), "", bytes(6 * MIB))


def test_header_behind_the_first_8_KiB_is_none() -> None:
    assert multiboot.header(bytes(8188) + with_header()) is not None
    assert multiboot.header(bytes(8192) + with_header()) is None
    assert multiboot.header(bytes(2) + with_header()) is None


# --------------------------------------------------------------------------------------------------------------- Linux

VMLINUX = elf32([(0x100_0000, CODE, 0x1000), (0x110_0000, b"data", 0x2000)], 0x100_0008, bits=64)


def bzimage(payload: bytes = VMLINUX, *, version: int = 0x20F, flags: int = 1) -> bytes:
    setup = bytearray(5 * 512)
    kernel = bytearray(0x400) + payload
    kernel += bytes(-len(kernel) % 16)
    setup[0x1F1] = 4
    struct.pack_into("<I", setup, 0x1F4, len(kernel) // 16)
    struct.pack_into("<H", setup, 0x1FE, 0xAA55)
    setup[0x200:0x206] = b"\xeb\x6aHdrS"
    struct.pack_into("<H", setup, 0x206, version)
    struct.pack_into("<H", setup, 0x236, flags)
    struct.pack_into("<I", setup, 0x22C, 0x7FFF_FFFF)
    struct.pack_into("<I", setup, 0x238, 2047)
    struct.pack_into("<II", setup, 0x248, 0x400, len(payload))
    struct.pack_into("<Q", setup, 0x258, 0x100_0000)
    struct.pack_into("<I", setup, 0x260, 4 * MIB)
    return bytes(setup + kernel)


PACKED: list[Callable[[bytes], bytes]] = [gzip.compress, lzma.compress, bz2.compress]


@pytest.mark.parametrize("pack", PACKED)
def test_the_kernel_in_a_bzimage_is_unpacked(pack: Callable[[bytes], bytes]) -> None:
    memory = Memory(64 * MIB)
    start = linux.load(bzimage(pack(VMLINUX) + struct.pack("<I", len(VMLINUX))), memory, "quiet", rsdp=0xE_0000)
    assert start == Start(64, 0x100_0008, rsi=linux.ZERO_PAGE_AT)
    assert memory.read(0x100_0000, 64) == CODE
    assert memory.read(0x110_0000, 4) == b"data"


def test_an_unknown_packer_is_left_to_the_guest() -> None:
    memory = Memory(64 * MIB)
    image = bzimage(b"\x89LZO" + bytes(60))
    start = linux.load(image, memory, "")
    assert start == Start(64, 0x100_0200, rsi=linux.ZERO_PAGE_AT)
    assert memory.read(0x100_0000, 0x500) == image[5 * 512 : 5 * 512 + 0x500].ljust(0x500, b"\0")


@pytest.mark.parametrize(
    "damaged",
    [gzip.compress(VMLINUX, mtime=0)[:-40], lzma.compress(VMLINUX)[:40], gzip.compress(b"x", mtime=0)],
    ids=["gzip cut", "xz cut", "no kernel"],
)
def test_a_damaged_payload_is_the_guests_to_refuse(damaged: bytes) -> None:
    assert linux.load(bzimage(damaged), Memory(64 * MIB), "").rip == 0x100_0200


def test_zero_page() -> None:
    memory = Memory(64 * MIB)
    start = linux.load(bzimage(gzip.compress(VMLINUX)), memory, "console=ttyS0", initrd=b"ramdisk", rsdp=0xE_0000)
    page = memory.read(start.rsi, 4096)
    assert (page[0x202:0x206], page[0x210], page[0x211] & 1, page[0x1E8]) == (b"HdrS", 0xFF, 1, 4)
    at, size = struct.unpack_from("<II", page, 0x218)
    assert (at % 4096, memory.read(at, size)) == (0, b"ramdisk")
    (line,), (rsdp,) = struct.unpack_from("<I", page, 0x228), struct.unpack_from("<Q", page, 0x70)
    assert (memory.read(line, 14), rsdp) == (b"console=ttyS0\0", 0xE_0000)
    rows = [struct.unpack_from("<QQI", page, 0x2D0 + 20 * n) for n in range(4)]
    assert rows == [(0, 0x9FC00, 1), (0x9FC00, 0x400, 2), (0xE0000, 0x20000, 2), (MIB, 63 * MIB, 1)]
    assert struct.unpack_from("<H", page, 0x206) == (0x20F,)


def test_long_mode_has_its_tables() -> None:
    memory = Memory(64 * MIB)
    linux.load(VMLINUX, memory, "")
    code, data = struct.unpack("<2Q", memory.read(GDT_AT + 0x10, 16))
    assert (code >> 53 & 1, code >> 43 & 1, data >> 43 & 1) == (1, 1, 0)
    for gib in range(4):
        (directory,) = struct.unpack("<Q", memory.read(TABLES_AT + 0x1000 + 8 * gib, 8))
        (page,) = struct.unpack("<Q", memory.read((directory & ~0xFFF) + 8 * 7, 8))
        assert page == gib * GIB + 7 * 2 * MIB | 0x83


@pytest.mark.parametrize(
    ("image", "why"),
    [
        (b"", "neither a Linux kernel"),
        (bytes(4096), "neither a Linux kernel"),
        (bzimage()[:0x300], "cut off behind its first sectors"),
        (bzimage()[:-2000], "cut off"),
        (bzimage()[: 5 * 512 + 0x200], "cut off behind its first sectors"),
        (bzimage(version=0x20A), "boot protocol 2.10, without a 64-bit entry"),
        (bzimage(flags=0), "without a 64-bit entry"),
        (VMLINUX[:70], "cut off"),
        (elf32([(0x1000, CODE, 64)], 0x1000, bits=64), "to 0x1000, below 1 MiB"),
        (elf32([(0x100_0000, CODE, 1 << 62)], 0x100_0000, bits=64), "the guest has 64 MiB"),
        (elf32([(0x100_0000, CODE, 64)], 0, bits=64), "entry 0x0 is in nothing"),
        (elf32([], 0, bits=64), "0 ELF segments"),
        (b"\x7fELF\x02\x01", "header is cut off"),
    ],
)
def test_hostile_kernels_get_one_line(image: bytes, why: str) -> None:
    with pytest.raises(ValueError, match=why) as caught:
        linux.load(image, Memory(64 * MIB), "")
    assert "\n" not in str(caught.value)


def test_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match="the guest has 8 MiB"):
        linux.load(VMLINUX, Memory(8 * MIB), "")
    with pytest.raises(ValueError, match="does not fit behind the kernel"):
        linux.load(VMLINUX, Memory(32 * MIB), "", initrd=bytes(20 * MIB))
    with pytest.raises(ValueError, match="the kernel takes 2047"):
        linux.load(VMLINUX, Memory(32 * MIB), "x" * 3000)


@pytest.mark.parametrize("made", [VMLINUX, kernel32(), bzimage(gzip.compress(VMLINUX))], ids=["elf", "multiboot", "bz"])
def test_a_byte_changed_anywhere_is_loaded_or_refused(made: bytes) -> None:
    """Never anything but a Start or a ValueError."""
    rng = random.Random(5)
    memory = Memory(32 * MIB)
    load = multiboot.load if made is kernel32 or multiboot.header(made) else linux.load
    for _ in range(300):
        image = bytearray(made[: rng.choice((len(made), rng.randrange(len(made))))])
        for _ in range(rng.choice((0, 1, 4))):
            if image:
                image[rng.randrange(min(len(image), 0x280))] = rng.randrange(256)
        try:
            made_of_it = load(bytes(image), memory, "")
        except ValueError as error:
            why = str(error)
        else:
            assert isinstance(made_of_it, Start)
            why = ""
        assert "\n" not in why


def test_nothing_is_stored_of_a_program_that_does_not_fit() -> None:
    memory, program = Memory(32 * MIB), elf.program(VMLINUX)
    assert elf.place(memory, program.entry, program.segments) == 0x110_2000
    there = [memory.read(segment.address, len(segment.data)) for segment in program.segments]
    assert there == [segment.data for segment in program.segments]
    memory = Memory(32 * MIB)
    with pytest.raises(ValueError, match="takes memory to 33 MiB: the guest has 32 MiB"):
        elf.place(memory, program.entry, [*program.segments, elf.Segment(31 * MIB, b"x", MIB + 1)])
    assert not any(memory.read(16 * MIB, 2 * MIB))
    assert elf.program(VMLINUX).bits == 64
    assert elf.program(kernel32()).bits == 32
