"""What Unicorn keeps to itself: error codes, the exception that it takes for undelivered, descriptors of segments.

All of it is in what ``uc_context_save`` copies. Where it is there no header says, so it is looked for once in a
process, on an engine of its own that is made to fault in ways whose outcome is known; a Unicorn where that finds
nothing, or more than one place, is refused.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import unicorn
from unicorn import x86_const
from unicorn.unicorn_py3.unicorn import uclib

_GENERAL = "RAX RCX RDX RBX RSP RBP RSI RDI R8 R9 R10 R11 R12 R13 R14 R15".split()
_AT_HFLAGS, _AT_SEGMENTS, _SEGMENT = 176, 184, 24
"""Behind the general registers: RIP, RFLAGS and how it is computed, the mode, the segments."""
SEGMENTS = ("ES", "CS", "SS", "DS", "FS", "GS", "LDTR", "TR")
CPL, CS32, SS32, ADDS_BASES, CS64 = 3, 1 << 4, 1 << 5, 1 << 6, 1 << 15
"""Of the mode word: the current privilege level, what CS and SS are, whether DS, ES and SS have bases."""
LONG, SIZE_32 = 1 << 21, 1 << 22
"""Of a descriptor's attributes, as its upper half has them: L, and D or B."""
DPL_SHIFT = 13


class Segment(NamedTuple):
    """A segment register: ``attributes`` is the upper half of its descriptor."""

    selector: int
    base: int
    limit: int
    attributes: int

    @property
    def dpl(self) -> int:
        """Its descriptor privilege level."""
        return self.attributes >> DPL_SHIFT & 3


class Places(NamedTuple):
    """Where things are in a saved context, in bytes from its beginning; behind the error code whether it was INT n."""

    registers: int
    error: int
    old_exception: int


class Kept:
    """The saved context of one engine."""

    def __init__(self, uc: Any) -> None:
        places = find()
        self._engine = uc._uch
        self._context: Any = uc.context_save()
        self._saved = self._context.context
        base = _address(self._context) + places.registers
        self._mode = ctypes.c_uint32.from_address(base + _AT_HFLAGS)
        self._segments: int = base + _AT_SEGMENTS
        self._error = ctypes.c_int32.from_address(base - places.registers + places.error)
        self._is_int = ctypes.c_int32.from_address(base - places.registers + places.error + 4)
        self._old = ctypes.c_int32.from_address(base - places.registers + places.old_exception)

    def _save(self) -> None:
        uclib.uc_context_save(self._engine, self._saved)

    def _restore(self) -> None:
        uclib.uc_context_restore(self._engine, self._saved)

    def exception(self) -> tuple[int, bool]:
        """The error code of what stopped Unicorn, and whether it was INT n; Unicorn takes it for delivered then."""
        self._save()
        if self._old.value != -1:
            self._old.value = -1
            self._restore()
        return self._error.value & 0xFFFF_FFFF, bool(self._is_int.value)

    def cpl(self) -> int:
        """The current privilege level."""
        self._save()
        return self._mode.value & CPL

    def segment(self, name: str) -> Segment:
        """A segment register with what it has of its descriptor."""
        self._save()
        selector, base, limit, attributes = _SEGMENT_FIELDS.unpack(ctypes.string_at(self._place(name), _SEGMENT))
        return Segment(selector, base, limit, attributes)

    def load(self, cpl: int, long_mode: bool, **segments: Segment) -> None:
        """Set segment registers and the privilege level, whatever it was, without a check or a fault."""
        self._save()
        for name, segment in segments.items():
            packed = _SEGMENT_FIELDS.pack(*segment)
            ctypes.memmove(self._place(name), packed, _SEGMENT)
        code, stack = self._attributes("CS"), self._attributes("SS")
        mode = self._mode.value & ~(CPL | CS32 | SS32 | ADDS_BASES | CS64) | cpl
        if long_mode and code & LONG:
            mode |= CS64 | CS32 | SS32
        else:
            mode |= (CS32 if code & SIZE_32 else 0) | (SS32 if stack & SIZE_32 else 0)
            bases = any(ctypes.c_uint64.from_address(self._place(name) + 8).value for name in ("ES", "SS", "DS"))
            mode |= ADDS_BASES if bases or not code & SIZE_32 else 0
        self._mode.value = mode
        self._restore()

    def _attributes(self, name: str) -> int:
        return ctypes.c_uint32.from_address(self._place(name) + 20).value

    def _place(self, name: str) -> int:
        return self._segments + _SEGMENT * SEGMENTS.index(name)


_SEGMENT_FIELDS = struct.Struct("<I4xQII")


def _address(context: Any) -> int:
    """Where a saved context is."""
    address: int = ctypes.cast(context.context, ctypes.c_void_p).value or 0
    return address


@cache
def find() -> Places:
    """Look for the places; ImportError where this Unicorn has them elsewhere."""
    uc: Any = unicorn.Uc(unicorn.UC_ARCH_X86, unicorn.UC_MODE_64)
    uc.mem_map(0, 0x3000)
    marks = [0x1111_0000_0000_0001 * (i + 1) & (1 << 64) - 1 for i in range(len(_GENERAL))]
    for name, mark in zip(_GENERAL, marks, strict=True):
        uc.reg_write(getattr(x86_const, f"UC_X86_REG_{name}"), mark)
    uc.reg_write(x86_const.UC_X86_REG_FS_BASE, marks[0])
    uc.reg_write(x86_const.UC_X86_REG_GS_BASE, marks[1])
    fresh = uc.context_save()
    before = _bytes(fresh)
    registers = _one(before, struct.pack("<16Q", *marks))
    for name, mark in (("FS", marks[0]), ("GS", marks[1])):
        base = registers + _AT_SEGMENTS + _SEGMENT * SEGMENTS.index(name) + 8
        if before[base : base + 8] != mark.to_bytes(8, "little"):
            raise _elsewhere()
    uc.hook_add(unicorn.UC_HOOK_INTR, lambda uc, vector, data: uc.emu_stop())

    def words(code: bytes) -> tuple[int, ...]:
        """The context behind a few instructions, of which the last one faults."""
        uc.context_restore(fresh)
        uc.mem_write(0x1000, code)
        uc.ctl_flush_tb()
        uc.emu_start(0x1000, 0x2000)
        return struct.unpack(f"<{len(before) // 4}i", _bytes(uc.context_save())[: len(before) // 4 * 4])

    at_first = struct.unpack(f"<{len(before) // 4}i", before[: len(before) // 4 * 4])
    one, other = (words(b"\x66\xb8" + struct.pack("<H", selector) + b"\x8e\xd8") for selector in (0xABC8, 0x1230))
    divided = words(b"\x31\xc9\xf7\xf1")  # xor ecx, ecx; div ecx
    software = words(b"\xcd\x77")
    beyond = registers + _AT_SEGMENTS

    def place(matches: Callable[[int], bool]) -> int:
        found = [4 * i for i in range(len(at_first)) if 4 * i >= beyond and matches(i)]
        if len(found) != 1:
            raise _elsewhere()
        return found[0]

    error = place(lambda i: one[i] == 0xABC8 and other[i] == 0x1230)
    old = place(lambda i: (at_first[i], one[i], other[i], divided[i]) == (-1, 13, 13, 0))
    if [found[error // 4 + 1] for found in (one, other, divided, software)] != [0, 0, 0, 1]:
        raise _elsewhere()
    return Places(registers, error, old)


def _bytes(context: Any) -> bytes:
    return ctypes.string_at(_address(context), context.size)


def _one(data: bytes, pattern: bytes) -> int:
    if data.count(pattern) != 1:
        raise _elsewhere()
    return data.find(pattern)


def _elsewhere() -> ImportError:
    return ImportError(f"unicorn {unicorn.__version__} keeps its CPU's state otherwise: unicorn 2.1.4 was tested")
