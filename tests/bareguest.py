"""Guests of a few bytes of machine code for a KvmHost: long mode, a program, handlers and a stack for each CPU.

Nothing is tested here. CPU 0 begins by itself; it starts the others with INIT and SIPI, and their start-up code finds
its CPU's program by the APIC id.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field

from fastexit.adapters.kvmhost.host import KvmHost
from fastexit.adapters.kvmhost.registers import CODE, DATA, GDT_AT, TABLES_AT, Start, descriptors

TRAMPOLINE, GDT_POINTER, AP_PROTECTED, AP_LONG, PROGRAMS_AT = 0x8000, 0x8100, 0x8200, 0x8300, 0x8400
PROGRAMS, IDTS, HANDLERS, COUNTERS, STACKS = 0x1_0000, 0x2_0000, 0x3_0000, 0x6_0000, 0x7_0000
IDT_POINTERS = 0x8600
APIC, IOAPIC = 0xFEE0_0000, 0xFEC0_0000
NMI_VECTOR = 2
MOV_EAX, CLI, STI, HLT = b"\xb8", b"\xfa", b"\xfb", b"\xf4"
IRETQ, SAVE, RESTORE = b"\x48\xcf", b"\x50\x51\x52", b"\x5a\x59\x58"
NEXT = b"\xff\xc6"
"""INC ESI."""
FIRST, WANTED = b"\xbe\x01\x00\x00\x00", b"\x89\xf3"
"""MOV ESI, 1; MOV EBX, ESI."""
CODE_32 = 0x28


def u32(value: int) -> bytes:
    return struct.pack("<I", value & 0xFFFF_FFFF)


def store(address: int, value: int) -> bytes:
    """MOV EDX, address; MOV DWORD [RDX], value."""
    return b"\xba" + u32(address) + b"\xc7\x02" + u32(value)


def increment(address: int) -> bytes:
    """LOCK INC DWORD [address]."""
    return b"\xf0\xff\x04\x25" + u32(address)


def spin(address: int) -> bytes:
    """Until the word at ``address`` is EBX or more: CMP [address], EBX; JB."""
    return jump_back(b"\x39\x1c\x25" + u32(address), b"\x72")


def out(port: int, value: int) -> bytes:
    """OUT of a byte."""
    return b"\x66\xba" + struct.pack("<H", port) + b"\xb0" + bytes([value & 0xFF]) + b"\xee"


def wrmsr(msr: int, value: int) -> bytes:
    return b"\xb9" + u32(msr) + MOV_EAX + u32(value) + b"\xba" + u32(value >> 32) + b"\x0f\x30"


def jump_back(body: bytes, condition: bytes = b"\xeb") -> bytes:
    """``body``, and a jump to its beginning: JMP, or another one-byte jump."""
    back = -(len(body) + 2)
    if condition == b"\xeb" and back < -128:
        return body + b"\xe9" + u32(-(len(body) + 5))
    assert back >= -128
    return body + condition + struct.pack("<b", back)


def ever() -> bytes:
    return jump_back(CLI + HLT)


def repeated(times: int, body: bytes) -> bytes:
    """MOV EDI, times; body; DEC EDI; JNZ."""
    inner = body + b"\xff\xcf"
    return b"\xbf" + u32(times) + inner + b"\x0f\x85" + u32(-(len(inner) + 6))


@dataclass
class Guest:
    """``apic`` is "xapic" or "x2apic"."""

    host: KvmHost
    apic: str = "xapic"
    programs: dict[int, bytes] = field(default_factory=dict)
    handlers: dict[tuple[int, int], bytes] = field(default_factory=dict)

    def register(self, offset: int, value: int) -> bytes:
        """Writes a register of the local APIC; the ICR's destination is in bits 63:32 of ``value``."""
        if self.apic == "x2apic":
            return wrmsr(0x800 + (offset >> 4), value)
        high = store(APIC + 0x310, value >> 32 << 24) if offset == 0x300 else b""
        return high + store(APIC + offset, value & 0xFFFF_FFFF)

    def enable(self) -> bytes:
        """APIC on, in its mode."""
        mode = b"\xb9" + u32(0x1B) + b"\x0f\x32\x0d" + u32(0x400) + b"\x0f\x30" if self.apic == "x2apic" else b""
        return mode + self.register(0xF0, 0x1FF)

    def counter(self, cpu: int, vector: int) -> int:
        return COUNTERS + 0x400 * cpu + 4 * vector

    def count(self, cpu: int, vector: int) -> int:
        """How often a CPU's handler ran."""
        return int.from_bytes(self.host.memory.read(self.counter(cpu, vector), 4), "little")

    def until(self, address: int) -> bytes:
        """Sleeps until the word at ``address`` is EBX or more: CLI; CMP; JAE; STI; HLT; again."""
        look = CLI + b"\x39\x1c\x25" + u32(address) + b"\x73\x04" + STI + HLT
        return jump_back(look) + STI

    def wait(self, cpu: int, vector: int, times: int) -> bytes:
        """Sleeps until a handler of this CPU ran so often."""
        return b"\xbb" + u32(times) + self.until(self.counter(cpu, vector))

    def start_others(self, cpus: int) -> bytes:
        """INIT and SIPI to every other CPU, one by one; waits until each has counted itself at vector 0."""
        code = b""
        for cpu in range(1, cpus):
            code += self.register(0x300, cpu << 32 | 0x4500) + self.register(
                0x300, cpu << 32 | 0x4600 | TRAMPOLINE >> 12
            )
            code += jump_back(b"\x83\x3c\x25" + u32(self.counter(cpu, 0)) + b"\x00", b"\x74")
        return code

    def finish(self, code: int = 0) -> bytes:
        return out(0xF4, code) + ever()

    def program(self, cpu: int, code: bytes) -> None:
        """What a CPU does behind its start."""
        self.programs[cpu] = code

    def handler(self, cpu: int, vector: int, body: bytes = b"", *, eoi: bool = True) -> None:
        """Counts, does ``body``, ends the interrupt."""
        end = self.register(0xB0, 0) if eoi else b""
        self.handlers[cpu, vector] = SAVE + increment(self.counter(cpu, vector)) + body + end + RESTORE + IRETQ

    def load(self) -> None:
        """Everything into the guest's memory, and CPU 0 to its program."""
        memory = self.host.memory
        descriptors(memory, 64)
        memory.write(GDT_AT + CODE_32, struct.pack("<Q", 0x00CF_9B00_0000_FFFF))
        memory.write(GDT_POINTER, struct.pack("<HI", CODE_32 + 7, GDT_AT))
        # Real mode: CLI; LGDT [GDT_POINTER]; CR0.PE; a far jump.
        real = CLI + b"\x66\x0f\x01\x16" + struct.pack("<H", GDT_POINTER) + b"\x0f\x20\xc0\x66\x83\xc8\x01\x0f\x22\xc0"
        memory.write(TRAMPOLINE, real + b"\x66\xea" + u32(AP_PROTECTED) + struct.pack("<H", CODE_32))
        # Segments; CR4.PAE, CR3, EFER.LME, CR0.PG; a far jump.
        flat = b"\x66\xb8" + struct.pack("<H", DATA) + b"\x8e\xd8\x8e\xc0\x8e\xd0"
        flat += MOV_EAX + u32(0x20) + b"\x0f\x22\xe0" + MOV_EAX + u32(TABLES_AT) + b"\x0f\x22\xd8"
        flat += b"\xb9" + u32(0xC000_0080) + b"\x0f\x32\x0d" + u32(0x100) + b"\x0f\x30"
        flat += b"\x0f\x20\xc0\x0d" + u32(0x8000_0000) + b"\x0f\x22\xc0\xea" + u32(AP_LONG) + struct.pack("<H", CODE)
        memory.write(AP_PROTECTED, flat)
        # The APIC is in the mode of a reset, so its id is in its page: MOV EAX, [it]; SHR EAX, 24; JMP [8 * RAX + tabl
        which = b"\xba" + u32(APIC + 0x20) + b"\x8b\x02\xc1\xe8\x18\xff\x24\xc5" + u32(PROGRAMS_AT)
        memory.write(AP_LONG, which)
        at = HANDLERS
        for cpu, code in self.programs.items():
            idt = bytearray(256 * 16)
            for (owner, vector), stub in self.handlers.items():
                if owner == cpu:
                    memory.write(at, stub)
                    struct.pack_into("<HHHH", idt, 16 * vector, at & 0xFFFF, CODE, 0x8E00, at >> 16)
                    at += len(stub) + 15 & ~15
            table, pointer = IDTS + 0x1000 * cpu, IDT_POINTERS + 16 * cpu
            memory.write(table, bytes(idt))
            memory.write(pointer, struct.pack("<HQ", 0xFFF, table))
            begin = b"\xbc" + u32(STACKS + 0x1000 * (cpu + 1)) + b"\x0f\x01\x1c\x25" + u32(pointer)
            started = increment(self.counter(cpu, 0))
            where = PROGRAMS + 0x1000 * cpu
            memory.write(where, begin + self.enable() + started + code)
            memory.write(PROGRAMS_AT + 8 * cpu, struct.pack("<Q", where))
        assert at < COUNTERS
        self.host.start(Start(64, PROGRAMS))
