"""A guest with rings for tests: 4-KiB pages with rights, a GDT with a task state, handlers that keep what they see.

CPU 0 begins in ring 0, loads its tables and goes to ring 3 by IRETQ; SYSCALL is how ring 3 stops.
"""

from __future__ import annotations

import struct
from typing import Any, NamedTuple

import fastexit as fx
from fastexit.adapters.unicorn import UnicornHost, idt
from unicorn_guest import IRETQ, STOP, word, wrmsr

BOOT, HANDLERS, COMMON, DONE, USER, USER_STACK, LOG, LOG_AT, SKIP = (
    *(0x1000, 0x4000, 0x6000, 0x7000, 0x8000, 0x9F80, 0x1_8000, 0x500, 0x508),
)
GDT, GDTR, IDT, IDTR, TASK, RSP0, IST1, CPU_STRIDE = 0x600, 0x700, 0x2000, 0x710, 0x800, 0x1_6000, 0x1_7000, 0x200
PML4, PDPT, PD, PT, MEMORY = 0x1_0000, 0x1_1000, 0x1_2000, 0x1_3000, 0x2_0000
SPARE, GONE, READ_ONLY, SUPERVISOR, NO_EXECUTE = 0xA000, 0xB000, 0xC000, 0xD000, 0xE000
"""User pages, but for the one that is the supervisor's: a good one, one not present, and so on."""
KERNEL_CODE, KERNEL_DATA, USER_DATA, USER_CODE, TASK_SELECTOR = 0x08, 0x10, 0x1B, 0x23, 0x30
LSTAR, STAR, FMASK, EFER = 0xC000_0082, 0xC000_0081, 0xC000_0084, 0xC000_0080
NX = 1 << 63
WITH_ERROR = frozenset({8, 10, 11, 12, 13, 14, 17})
SYSCALL = b"\x0f\x05"


class Seen(NamedTuple):
    """What a handler found: the frame, CR2, and where its stack began."""

    vector: int
    error: int
    rip: int
    cs: int
    rflags: int
    rsp: int
    ss: int
    cr2: int
    own_rsp: int


def _common() -> bytes:
    """Write it down; end an interrupt; map the page of a page fault; step over the instruction of another fault."""
    code = b"\x50\x53\x51\x48\x8b\x1c\x25" + word(LOG_AT)  # push rax, rbx, rcx; mov rbx, [LOG_AT]
    for i in range(7):  # mov rax, [rsp + ...]; mov [rbx + ...], rax
        code += b"\x48\x8b\x44\x24" + bytes((24 + 8 * i,)) + b"\x48\x89\x43" + bytes((8 * i,))
    code += b"\x0f\x20\xd0\x48\x89\x43\x38"  # mov rax, cr2; mov [rbx + 56], rax
    code += b"\x48\x8d\x44\x24\x50\x48\x89\x43\x40"  # lea rax, [rsp + 80]; mov [rbx + 64], rax
    code += b"\x48\x83\x04\x25" + word(LOG_AT) + b"\x48"  # add qword [LOG_AT], 72
    fix = b"\x48\xc1\xe8\x0c\xbb" + word(PT)  # shr rax, 12; mov ebx, PT
    fix += b"\x48\x83\x0c\xc3\x07\x80\x64\xc3\x07\x7f"  # or qword [rbx + 8 * rax], 7; and byte [... + 7], 0x7f
    fix = b"\x0f\x20\xd0" + fix + b"\x0f\x20\xd0\x0f\x01\x38"  # mov rax, cr2; ...; mov rax, cr2; invlpg [rax]
    skip = b"\x48\x8b\x04\x25" + word(SKIP) + b"\x48\x01\x44\x24\x28"  # mov rax, [SKIP]; add [rsp + 40], rax
    eoi = b"\x52" + wrmsr(0x80B, 0) + b"\x5a"  # push rdx; wrmsr; pop rdx
    compare = b"\x48\x83\x7c\x24\x18"  # cmp qword [rsp + 24], ...
    skip += _over(eoi)
    rest = compare + b"\x20\x73" + bytes((len(skip),)) + skip + eoi  # 32: jae
    fix += _over(rest)
    code += compare + b"\x0e\x75" + bytes((len(fix),)) + fix + rest  # 14: jne
    return code + b"\x59\x5b\x58\x48\x83\xc4\x10" + IRETQ  # pop rcx, rbx, rax; add rsp, 16


def _over(code: bytes) -> bytes:
    return b"\xeb" + bytes((len(code),))


def _stub(vector: int) -> bytes:
    """push 0 where there is no error code; push vector; jmp COMMON."""
    push = (b"" if vector in WITH_ERROR else b"\x6a\x00") + b"\x68" + word(vector)
    return push + b"\xe9"


def to_ring_3(rip: int = USER, rsp: int = USER_STACK, rflags: int = 0x202) -> bytes:
    """push SS, RSP, RFLAGS, CS, RIP; iretq."""
    return b"".join(b"\x68" + word(value) for value in (USER_DATA, rsp, rflags, USER_CODE, rip)) + IRETQ


def boot(cpu: int = 0) -> bytes:
    """Ring 0: tables, task state, EFER.SCE and NXE, SYSCALL's MSRs."""
    code = b"\x0f\x01\x14\x25" + word(GDTR) + b"\x0f\x01\x1c\x25" + word(IDTR)  # lgdt; lidt
    code += b"\xb8" + word(PML4) + b"\x0f\x22\xd8"  # mov cr3
    code += wrmsr(EFER, 0xD01) + wrmsr(STAR, 0x13 << 48 | KERNEL_CODE << 32) + wrmsr(LSTAR, DONE) + wrmsr(FMASK, 0x200)
    return code + b"\xb8" + word(TASK_SELECTOR + 16 * cpu) + b"\x0f\x00\xd8"  # mov eax; ltr ax


def rings(
    user: bytes, *others: bytes, kernel: bytes = b"", skip: int = 0, users: tuple[int, ...] = (0x80,), **machine: Any
) -> UnicornHost:
    """A host whose CPU 0 runs ``kernel`` and then ``user`` in ring 3, and whose CPU i runs ``others`` in ring 0."""
    m = fx.Machine(vcpus=1 + len(others), **machine)
    m.boot_x2apic()
    host = UnicornHost(m, MEMORY)
    gates = {}
    for vector in range(256):
        at = HANDLERS + 16 * vector
        stub = _stub(vector)
        host.load(at, stub + word(COMMON - at - len(stub) - 4))
        gates[vector] = at
    host.load(COMMON, _common())
    host.load(DONE, STOP)
    host.load(IDT, idt(gates, users=users))
    host.load(IDTR, struct.pack("<HQ", 0xFFF, IDT))
    segments = [0, 0x00AF_9B00_0000_FFFF, 0x00CF_9300_0000_FFFF, 0x00CF_F300_0000_FFFF, 0x00AF_FB00_0000_FFFF, 0]
    for cpu in range(1 + len(others)):
        at = TASK + 0x80 * cpu
        segments += [0x0000_8900_0000_0067 | at << 16, 0]
        host.load(at, struct.pack("<I3QQ7QQHH", 0, RSP0 - 0x400 * cpu, 0, 0, 0, IST1, *[0] * 7, 0, 0x68))
    host.load(GDT, struct.pack(f"<{len(segments)}Q", *segments))
    host.load(GDTR, struct.pack("<HQ", 8 * len(segments) - 1, GDT))
    host.load(PML4, struct.pack("<Q", PDPT | 7))
    host.load(PDPT, struct.pack("<Q", PD | 7))
    host.load(PD, struct.pack("<Q", PT | 7))
    rights = {page: 7 for page in (USER, USER_STACK & ~0xFFF, SPARE)}
    rights |= {GONE: 0, READ_ONLY: 5, SUPERVISOR: 3, NO_EXECUTE: 7 | NX}
    host.load(PT, struct.pack("<32Q", *(page | rights.get(page, 3) for page in range(0, MEMORY, 0x1000))))
    host.load(LOG_AT, struct.pack("<QQ", LOG, skip))
    host.load(USER, user)
    for cpu, code in enumerate((kernel + to_ring_3(), *others)):
        start = BOOT + CPU_STRIDE * cpu
        host.load(start, boot(cpu) + code)
        host.cpus[cpu].start(start, rsp=RSP0 - 0x400 * cpu - 0x200)
    return host


def seen(host: UnicornHost) -> list[Seen]:
    """What handlers wrote down, in order."""
    end = int.from_bytes(host.memory[LOG_AT : LOG_AT + 8], "little")
    return [Seen(*struct.unpack_from("<9Q", host.memory, at)) for at in range(LOG, end, 72)]
