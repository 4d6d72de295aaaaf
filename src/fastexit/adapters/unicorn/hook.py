"""What is called before every guest instruction: it counts, and stops Unicorn where fastexit has work to do.

The hook is machine code, compiled once in a process, because one that runs Python costs forty times as much. It reads
the instruction's bytes through Unicorn's own page walk, so that any paging, self-modifying code and code that moves are
seen. A Unicorn that can hook RDMSR, WRMSR and RDTSC by name does so, and their bytes are not looked for then. Each CPU
has a block of words that the hook and the host share.
"""

from __future__ import annotations

import ctypes
from enum import IntEnum
from functools import cache
from typing import Any, NamedTuple

from fastexit.regs import SHADOW_MOV_SS, SHADOW_STI

PAGES = 64
"""Entries of the cache of page walks."""

WHY, COUNT, LIMIT, ARMED, DUE, SHADOW, PASS, SIZE, IRETS, NAMED, STALE, REGISTER = range(12)
SELF, MEMORY, MEMORY_BYTES, OUT, RUNNING, LAST, LET, CACHE = range(12, 20)
NAMES = CACHE + 2 * PAGES
WORDS = NAMES + 8
"""A CPU's block. WHY: a Stop, 0 while it runs. COUNT, LIMIT: instructions done, where to stop. ARMED: stop where the
guest may have opened its interrupt window; DUE: instructions until then. SHADOW: how the last instruction
blocks interrupts behind it (regs.SHADOW_STI, SHADOW_MOV_SS). PASS: the next instruction is Unicorn's, whatever it is.
SIZE: bytes of the last instruction that began. REGISTER: of the MOV CR8 that stopped, as instructions number them.
IRETS: seen. NAMED: bit n, Unicorn hooks the instruction of Stop n by name. STALE: the cache of page walks. SELF: the
block's address. MEMORY: words from here to the guest's. RUNNING: no instruction that Unicorn does for our API calls.
LAST: linear address of the last instruction that began. LET: it was passed. NAMES: word n has n, and tells the hook of
Stop n its number and the block.
"""


class Stop(IntEnum):
    """Why the hook stopped Unicorn: before the instruction at RIP, or behind it where Unicorn hooks it by name."""

    LIMIT = 1
    WINDOW = 2
    HLT = 3
    WRMSR = 4
    RDMSR = 5
    RDTSC = 6
    RDTSCP = 7
    CPUID = 8
    CR8_WRITE = 9
    CR8_READ = 10
    SYSCALL = 11
    SYSENTER = 12
    PORT = 13
    HYPERCALL = 14


BY_NAME = (Stop.WRMSR, Stop.RDMSR, Stop.RDTSC)
"""What some Unicorn hooks by name."""


class Native(NamedTuple):
    """Addresses of the compiled hooks; ``on_name`` is given the word at NAMES + Stop instead of the block."""

    on_instruction: int
    on_name: int
    keep: tuple[Any, ...]


def _c_function(library: Any, name: str, *arguments: Any) -> Any:
    """A function of Unicorn's library as compiled code calls it; ImportError when this Unicorn has none."""
    found = getattr(library, name, None)
    if found is None:
        raise ImportError(f"this unicorn has no {name}: unicorn 2.1.4 or newer is needed")
    return ctypes.cast(found, ctypes.CFUNCTYPE(ctypes.c_int, *arguments))


@cache
def native() -> Native:
    """The hooks for this process's Unicorn, compiled at the first call."""
    import unicorn
    from numba import cfunc, types
    from unicorn.unicorn_py3.unicorn import uclib

    u64, word, block = ctypes.c_uint64, types.uint64, types.CPointer(types.uint64)
    emu_stop = _c_function(uclib, "uc_emu_stop", u64)
    translate = _c_function(uclib, "uc_vmem_translate", u64, u64, ctypes.c_uint32, u64)
    fetch = unicorn.UC_PROT_EXEC
    shadow_sti, shadow_mov_ss = types.uint64(SHADOW_STI), types.uint64(SHADOW_MOV_SS)
    why_limit, why_window, why_hlt = int(Stop.LIMIT), int(Stop.WINDOW), int(Stop.HLT)
    why_wrmsr, why_rdmsr, why_rdtsc = int(Stop.WRMSR), int(Stop.RDMSR), int(Stop.RDTSC)
    why_rdtscp, why_cpuid = int(Stop.RDTSCP), int(Stop.CPUID)
    why_cr8_write, why_cr8_read = int(Stop.CR8_WRITE), int(Stop.CR8_READ)
    why_syscall, why_sysenter, why_port = int(Stop.SYSCALL), int(Stop.SYSENTER), int(Stop.PORT)
    why_hypercall = int(Stop.HYPERCALL)

    @cfunc(types.void(word, word, types.uint32, block))
    def on_instruction(uc: Any, address: Any, size: Any, s: Any) -> None:
        if s[WHY] != 0:
            return  # a stop is under way, and this instruction is not carried out
        if s[COUNT] >= s[LIMIT]:
            s[WHY] = why_limit
            emu_stop(uc)
            return
        if s[DUE] != 0:
            s[DUE] -= 1
            if s[DUE] == 0 and s[ARMED] != 0:
                s[WHY] = why_window
                emu_stop(uc)
                return
        passed = s[PASS]
        s[PASS] = 0
        s[LET] = passed
        s[LAST] = address
        shadow = word(0)
        if s[STALE] != 0:
            s[STALE] = 0
            for i in range(PAGES):
                s[CACHE + 2 * i] = 0
        # What is behind the prefixes, as far as it may concern us. Unicorn knows the size, so that 40 to 4F are
        # INC and DEC only where nothing follows.
        code, found, rex = word(0), word(0), word(0)
        for i in range(size):
            at = address + word(i)
            page = at >> word(12)
            slot = types.int64(CACHE) + types.int64(page & word(PAGES - 1)) * 2
            if s[slot] != page + word(1):
                if translate(uc, page << word(12), fetch, s[SELF] + word(8 * OUT)) != 0:
                    break
                s[slot] = page + word(1)
                s[slot + 1] = s[OUT]
            physical = s[slot + 1] | (at & word(0xFFF))
            if physical >= s[MEMORY_BYTES]:
                break
            eight = s[types.int64(s[MEMORY]) + types.int64(physical >> word(3))]
            byte = (eight >> ((physical & word(7)) << word(3))) & word(0xFF)
            if found == 0:
                if byte & word(0xF0) == 0x40:
                    rex = byte
                    continue
                if byte & word(0xE7) == 0x26 or byte & word(0xFC) == 0x64 or byte & word(0xFE) == 0xF2:
                    continue  # segments, sizes, repetition
                # 6C to 6F are INS and OUTS, E4 to E7 and EC to EF are IN and OUT.
                port = byte & word(0xFC) == 0x6C or byte & word(0xF4) == 0xE4
                if not port and byte not in (0x0F, 0xF4, 0xFB, 0x9D, 0xCF, 0x17, 0x8E):
                    break
            code |= byte << (found << word(3))
            found += word(1)
            if found == 3:
                break
        if found != 0:
            first, second, third = code & word(0xFF), (code >> word(8)) & word(0xFF), code >> word(16)
            operand = (third >> word(3)) & word(7)
            why = 0
            if first == 0xF4:
                why = why_hlt
            elif first == 0xFB:  # STI, which blocks nothing where the one before it has opened the window
                if s[SHADOW] & shadow_sti == 0:
                    shadow = shadow_sti
            elif first == 0x9D:  # POPF
                s[DUE] = 1
            elif first == 0xCF:  # IRET
                s[DUE] = 1
                s[IRETS] += 1
            elif first == 0x17 or first == 0x8E:  # POP SS, MOV to SS
                if (first == 0x17 or (second >> word(3)) & word(7) == 2) and s[SHADOW] & shadow_mov_ss == 0:
                    shadow = shadow_mov_ss
            elif first != 0x0F:
                why = why_port
            elif second == 0x05:
                why = why_syscall
            elif second == 0x34:
                why = why_sysenter
            elif second == 0x07:  # SYSRET, whose flags come from R11
                s[DUE] = 1
            elif second == 0x30:
                why = why_wrmsr
            elif second == 0x32:
                why = why_rdmsr
            elif second == 0x31:
                why = why_rdtsc
            elif second == 0xA2:
                why = why_cpuid
            elif second == 0x01:
                if third == 0xF9:
                    why = why_rdtscp
                elif third == 0xC1 or third == 0xD9:  # VMCALL, VMMCALL
                    why = why_hypercall
                elif operand == 7 and third < 0xC0:  # INVLPG
                    s[STALE] = 1
            elif second == 0x38 and third == 0x82:  # INVPCID
                s[STALE] = 1
            elif second == 0x22 or second == 0x20:
                if operand == 0 and rex & word(4) != 0:
                    s[REGISTER] = (third & word(7)) | (rex & word(1)) << word(3)
                    why = why_cr8_write if second == 0x22 else why_cr8_read
                else:  # CR0, CR3, CR4
                    s[STALE] = 1
            if shadow != 0:
                s[DUE] = 2
            if why != 0 and passed == 0 and (s[NAMED] >> word(why)) & word(1) == 0:
                s[WHY] = why
                s[SIZE] = size
                emu_stop(uc)
                return
        s[SIZE] = size
        s[SHADOW] = shadow
        s[COUNT] += 1

    @cfunc(types.int32(word, block))
    def on_name(uc: Any, place: Any) -> int:
        why = place[0]
        s = types.int64(why) + types.int64(NAMES)
        if place[RUNNING - s] == 0 or place[WHY - s] != 0 or place[LET - s] != 0:
            return 0
        place[WHY - s] = why
        emu_stop(uc)
        return 1

    assert on_instruction.address is not None
    assert on_name.address is not None
    return Native(on_instruction.address, on_name.address, (on_instruction, on_name, emu_stop, translate))
