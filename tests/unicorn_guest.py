"""Small x86-64 guests for tests: a few instructions by name, and a host with an IDT whose handlers count."""

from __future__ import annotations

import struct
from collections.abc import Collection
from typing import Any

import fastexit as fx
from fastexit.adapters.unicorn import UnicornHost, idt

CODE, IDTR, IDT, HANDLERS, STACK, MEMORY = 0x1000, 0x1800, 0x2000, 0x4000, 0x9000, 0x20000
COUNTS = 0x600
"""Handler of vector v adds one to the word at COUNTS + 8 * v, and leaves its return address at RETURNS + 8 * v."""
RETURNS = 0xE000
X2APIC_ICR, X2APIC_EOI, X2APIC_TPR, SELF_IPI = 0x830, 0x80B, 0x808, 0x83F
XAPIC = 0xFEE0_0000

CLI, STI, HLT, NOP, IRETQ, PAUSE = (bytes.fromhex(code) for code in ("fa", "fb", "f4", "90", "48cf", "f390"))
STOP = CLI + HLT + b"\xeb\xfd"  # jmp to the hlt
SPIN = b"\xeb\xfe"


def word(value: int) -> bytes:
    return struct.pack("<I", value & 0xFFFF_FFFF)


def mov_ecx(value: int) -> bytes:
    return b"\xb9" + word(value)


def wrmsr(msr: int, value: int) -> bytes:
    """mov ecx, eax, edx; wrmsr."""
    return mov_ecx(msr) + b"\xb8" + word(value) + b"\xba" + word(value >> 32) + b"\x0f\x30"


def keep(at: int) -> bytes:
    """mov [at], eax; mov [at + 4], edx."""
    return b"\x89\x04\x25" + word(at) + b"\x89\x14\x25" + word(at + 4)


def rdmsr(msr: int, at: int) -> bytes:
    return mov_ecx(msr) + b"\x0f\x32" + keep(at)


def put(at: int, value: int) -> bytes:
    """mov dword [at], value."""
    return b"\xc7\x04\x25" + word(at) + word(value)


def bump(at: int) -> bytes:
    """inc dword [at]."""
    return b"\xff\x04\x25" + word(at)


def poke(address: int, value: int) -> bytes:
    """mov edi, address; mov dword [rdi], value."""
    return b"\xbf" + word(address) + b"\xc7\x07" + word(value)


def peek(address: int, at: int) -> bytes:
    """mov edi, address; mov eax, [rdi]; mov [at], eax."""
    return b"\xbf" + word(address) + b"\x8b\x07" + b"\x89\x04\x25" + word(at)


def handler(vector: int, *, eoi: bool = True, skip: int = 0, error: bool = False) -> bytes:
    """Count, keep the return address and the error code, end the interrupt, step over ``skip`` bytes, return."""
    code = b"\x50\x51\x52" + bump(COUNTS + 8 * vector)  # push rax, rcx, rdx
    frame = 0x20 if error else 0x18
    code += b"\x48\x8b\x44\x24" + bytes((frame,)) + b"\x48\x89\x04\x25" + word(RETURNS + 8 * vector)  # its RIP
    code += b"\x48\x83\x44\x24" + bytes((frame, skip))  # add qword [rsp + frame], skip
    code += wrmsr(X2APIC_EOI, 0) if eoi else b""
    return code + b"\x5a\x59\x58" + (b"\x48\x83\xc4\x08" if error else b"") + IRETQ  # pop; add rsp, 8


def gate(handler: int, *, ist: int = 0, attributes: int = 0x8E, selector: int = 0x08) -> bytes:
    """One descriptor of a long-mode IDT."""
    low, middle, high = handler & 0xFFFF, handler >> 16 & 0xFFFF, handler >> 32
    return struct.pack("<HHBBHII", low, selector, ist, attributes, middle, high, 0)


def keep_frame(at: int) -> bytes:
    """A handler that puts what is on its stack, six words, at ``at``, RSP behind them, and stops."""
    code = b"\x48\x89\x24\x25" + word(at + 48)  # mov [at + 48], rsp
    return code + b"".join(b"\x58\x48\x89\x04\x25" + word(at + 8 * i) for i in range(6)) + STOP  # pop rax; mov


def guest(
    *codes: bytes,
    vectors: Collection[int] = (0x40,),
    traps: Collection[int] = (),
    boot: bool = True,
    xapic: bool = False,
    quantum: int = 1000,
    faults: Collection[int] = (),
    skip: int = 2,
    **machine: Any,
) -> UnicornHost:
    """A host whose CPU i runs ``codes[i]`` behind LIDT, with handlers for ``vectors`` and for exceptions ``faults``."""
    m = fx.Machine(vcpus=len(codes), **machine)
    if boot and xapic:
        for v in m.vcpus:
            v.set_msr(0x1B, v.apic_base | 0x800)
            v.mmio_write(0xF0, 0x1FF)
    elif boot:
        m.boot_x2apic()
    host = UnicornHost(m, MEMORY, quantum=quantum)
    at, gates = HANDLERS, {}
    for vector in (*vectors, *faults):
        fault = vector in faults
        code = handler(vector, eoi=not fault and not xapic, skip=skip if fault else 0, error=vector in (8, 13, 14))
        host.load(at, code)
        gates[vector] = at
        at += 0x80
    host.load(IDT, idt(gates, traps=traps))
    host.load(IDTR, struct.pack("<HQ", 256 * 16 - 1, IDT))
    for i, code in enumerate(codes):
        start = CODE + 0x200 * i
        host.load(start, b"\x0f\x01\x1c\x25" + word(IDTR) + code)  # lidt [IDTR]
        if code:
            host.cpus[i].start(start, rsp=STACK + 0x400 * i)
    return host


def count(host: UnicornHost, vector: int) -> int:
    return read(host, COUNTS + 8 * vector)


def returned(host: UnicornHost, vector: int) -> int:
    return read(host, RETURNS + 8 * vector)


def read(host: UnicornHost, at: int, size: int = 8) -> int:
    return int.from_bytes(host.memory[at : at + size], "little")


def at(*codes: bytes, cpu: int = 0) -> int:
    """Where the code behind these begins."""
    return CODE + 0x200 * cpu + 8 + sum(map(len, codes))
