"""A Linux kernel by its 64-bit boot protocol: a bzImage, what is packed in one, or a bare vmlinux.

Models: nothing. Documentation/arch/x86/boot.rst and zero-page.rst. The kernel proper is unpacked here where its packer
is known, since a guest takes seconds for it, and minutes where ring 0 is emulated.
"""

from __future__ import annotations

import bz2
import lzma
import struct
import zlib
from collections.abc import Callable
from typing import Any, NamedTuple

from cffi import FFI

from fastexit.adapters.kvmhost import elf
from fastexit.adapters.kvmhost.memory import FIRST_MIB_ENDS, PAGE, Memory
from fastexit.adapters.kvmhost.registers import Start, descriptors

MAGIC, BOOT_FLAG = b"HdrS", 0xAA55
FIRST_WITH_64_BITS = 0x20C
"""Protocol 2.12 has xloadflags, which say whether there is a 64-bit entry."""
KERNEL_64, ENTRY_64 = 1, 0x200
HEADER_AT, HEADER_ENDS = 0x1F1, 0x290
ZERO_PAGE_AT, COMMAND_AT, COMMAND_BYTES = 0x1_0000, 0x2_0000, 0x1_0000
MOST_UNPACKED = 1 << 30
ANY_LOADER, LOADED_HIGH = 0xFF, 1
SECTOR = 512
LZ4_MAGIC, LZ4_BLOCK = b"\x02\x21\x4c\x18", 8 << 20
NO_INITRD_LIMIT = 0x7FFF_FFFF


class Image(NamedTuple):
    """What a bzImage says of itself."""

    header: bytes
    """The zero page's bytes from 0x1f1 on."""
    kernel: bytes
    """The protected-mode part."""
    address: int
    memory: int
    """What it takes from there on."""
    command: int
    """The longest command line."""
    initrd: int
    """The last byte that an initrd may be at."""
    payload: bytes


def image(data: bytes) -> Image:
    """A bzImage's parts; ValueError for what is none, is damaged, or has no 64-bit entry."""
    if len(data) < HEADER_ENDS or data[0x202:0x206] != MAGIC or _word(data, 0x1FE, "<H") != BOOT_FLAG:
        raise ValueError("neither a Linux kernel (bzImage, vmlinux) nor a multiboot program")
    version = _word(data, 0x206, "<H")
    if version < FIRST_WITH_64_BITS or not _word(data, 0x236, "<H") & KERNEL_64:
        raise ValueError(f"a bzImage of boot protocol {version >> 8}.{version & 0xFF:02}, without a 64-bit entry")
    begin = ((data[0x1F1] or 4) + 1) * SECTOR
    kernel = data[begin:]
    if len(kernel) <= ENTRY_64:
        raise ValueError("the bzImage is cut off behind its first sectors")
    wanted = 16 * _word(data, 0x1F4)
    if len(kernel) < wanted - 16:
        raise ValueError(f"the bzImage is cut off: {len(kernel):,} bytes of {wanted:,}")
    at, size = _word(data, 0x248), _word(data, 0x24C)
    if at + size > len(kernel):
        raise ValueError("the bzImage's payload is cut off")
    preferred, memory = _word(data, 0x258, "<Q"), _word(data, 0x260)
    ends = min(0x202 + data[0x201], HEADER_ENDS)
    return Image(
        data[HEADER_AT:ends],
        kernel,
        preferred if preferred >= FIRST_MIB_ENDS else FIRST_MIB_ENDS,
        max(memory, len(kernel)),
        _word(data, 0x238),
        _word(data, 0x22C) or NO_INITRD_LIMIT,
        kernel[at : at + size],
    )


def _word(data: bytes, at: int, form: str = "<I") -> int:
    found: int = struct.unpack_from(form, data, at)[0]
    return found


def _bounded(unpack: Callable[[bytes, int], bytes]) -> Callable[[bytes], bytes]:
    return lambda data: unpack(data, MOST_UNPACKED)


def _gzip(data: bytes, most: int) -> bytes:
    return zlib.decompressobj(31).decompress(data, most)


def _xz(data: bytes, most: int) -> bytes:
    return lzma.LZMADecompressor().decompress(data, most)


def _bzip2(data: bytes, most: int) -> bytes:
    return bz2.BZ2Decompressor().decompress(data, most)


def _zstd(data: bytes, most: int) -> bytes:
    try:
        from compression import zstd  # type: ignore[import-not-found,unused-ignore] # from Python 3.14 on
    except ImportError:
        import zstandard

        try:
            return zstandard.ZstdDecompressor().stream_reader(data).read(most)
        except zstandard.ZstdError as error:
            raise ValueError(str(error)) from None
    try:
        unpacked: bytes = zstd.ZstdDecompressor().decompress(data, most)
    except zstd.ZstdError as error:
        raise ValueError(str(error)) from None
    return unpacked


def _lz4(data: bytes, most: int) -> bytes:
    """Of the legacy format: blocks of 8 MiB, each behind its packed length."""
    ffi: Any = FFI()
    ffi.cdef("int LZ4_decompress_safe(const char *from, char *to, int packed, int room);")
    unpack = ffi.dlopen("liblz4.so.1").LZ4_decompress_safe
    out, at, room = bytearray(), len(LZ4_MAGIC), ffi.new("char[]", LZ4_BLOCK)
    while at + 4 <= len(data):
        packed = _word(data, at)
        at += 4
        if not 0 < packed <= len(data) - at:  # the unpacked length stands behind the last block
            break
        size = unpack(data[at : at + packed], room, packed, LZ4_BLOCK)
        if size < 0 or len(out) + size > most:
            raise ValueError("a damaged LZ4 block, or too many")
        out += ffi.buffer(room, size)
        at += packed
    return bytes(out)


PACKERS: dict[bytes, Callable[[bytes], bytes]] = {
    b"\x1f\x8b\x08": _bounded(_gzip),
    b"\xfd7zXZ\0": _bounded(_xz),
    b"\x5d\0\0": _bounded(_xz),
    b"BZh": _bounded(_bzip2),
    b"\x28\xb5\x2f\xfd": _bounded(_zstd),
    LZ4_MAGIC: _bounded(_lz4),
}
"""How payloads begin. Others (LZO), and those whose library is missing, are unpacked by the guest."""


def unpacked(payload: bytes) -> elf.Program | None:
    """The vmlinux in a payload; None where the packer is not known here, or what comes out is none."""
    for magic, unpack in PACKERS.items():
        if payload.startswith(magic):
            try:
                return elf.program(unpack(payload))
            except (ValueError, EOFError, OSError, ImportError, lzma.LZMAError, zlib.error):
                return None
    return None


def is_vmlinux(data: bytes) -> bool:
    """Whether it is a kernel that nobody has packed: an ELF program of 64 bits."""
    return data[:5] == elf.MAGIC + b"\2"


def load(data: bytes, memory: Memory, command: str, *, initrd: bytes | None = None, rsdp: int = 0) -> Start:
    """Puts a kernel, its command line and an initrd into memory: how the boot CPU begins."""
    if is_vmlinux(data):
        program: elf.Program | None = elf.program(data)
        header, longest, highest = bytes(HEADER_ENDS - HEADER_AT), 2047, NO_INITRD_LIMIT
        loaded: list[elf.Segment] = []
        entry = 0
    else:
        found = image(data)
        program = unpacked(found.payload)
        header, longest, highest = found.header, found.command or 255, found.initrd
        loaded = [elf.Segment(found.address, found.kernel, found.memory)]
        entry = found.address + ENTRY_64
    if program is not None:
        loaded, entry = program.segments, program.entry
    ends = elf.place(memory, entry, loaded)
    line = command.encode() + b"\0"
    if len(line) > min(longest + 1, COMMAND_BYTES):
        raise ValueError(f"a command line of {len(line) - 1} bytes: the kernel takes {min(longest, COMMAND_BYTES - 1)}")
    memory.write(COMMAND_AT, line, "command line")
    where = _initrd(memory, initrd, ends, highest) if initrd else 0
    memory.write(ZERO_PAGE_AT, zero_page(memory, header, where, len(initrd or b""), rsdp), "zero page")
    descriptors(memory, 64)
    return Start(64, entry, rsi=ZERO_PAGE_AT)


def _initrd(memory: Memory, initrd: bytes, ends: int, highest: int) -> int:
    """As high as the kernel allows, and above the kernel."""
    at = min(memory.low, highest + 1) - len(initrd) & -PAGE
    if at < ends:
        raise ValueError(
            f"an initrd of {len(initrd):,} bytes does not fit behind the kernel: give the guest more memory"
        )
    memory.write(at, initrd, "initrd")
    return at


def zero_page(memory: Memory, header: bytes, initrd: int, initrd_bytes: int, rsdp: int) -> bytes:
    """``struct boot_params``: the image's own header, what the loader fills in, the memory map."""
    page = bytearray(PAGE)
    page[HEADER_AT : HEADER_AT + len(header)] = header
    struct.pack_into("<H", page, 0x1FE, BOOT_FLAG)
    page[0x202:0x206] = MAGIC
    page[0x210] = ANY_LOADER
    page[0x211] |= LOADED_HIGH
    struct.pack_into("<II", page, 0x218, initrd, initrd_bytes)
    struct.pack_into("<I", page, 0x228, COMMAND_AT)
    struct.pack_into("<Q", page, 0x070, rsdp)
    ranges = memory.ranges()
    page[0x1E8] = len(ranges)
    for number, (begin, size, kind) in enumerate(ranges):
        struct.pack_into("<QQI", page, 0x2D0 + 20 * number, begin, size, kind)
    return bytes(page)
