"""Instructions that a software KVM's emulator of ring 0 does not have, done in its place.

Models: FWAIT and LDMXCSR, as far as a kernel that has no floating-point error to wait for sees them: nothing happens.
CLAC and STAC. INT3: KVM injects its exception (KVM_SET_VCPU_EVENTS). kvm_pvm is such a KVM.
"""

from __future__ import annotations

from typing import Any

from fastexit.adapters.kvmhost.memory import Memory
from fastexit.adapters.kvmhost.registers import Registers
from fastexit.kvm import ioctl as K

LONGEST = 15
HAS_BYTES = 1
"""KVM_INTERNAL_ERROR_EMULATION_FLAG_INSTRUCTION_BYTES."""
FWAIT, INT3 = 0x9B, 0xCC
CLAC, STAC = b"\x0f\x01\xca", b"\x0f\x01\xcb"
RFLAGS_AC = 1 << 18
BREAKPOINT = 3
PREFIXES = frozenset({0x26, 0x2E, 0x36, 0x3E, 0x64, 0x65, 0x66, 0x67, 0xF0, 0xF2, 0xF3})


def complete(registers: Registers, code: bytes, fd: int) -> str | None:
    """Does the instruction that begins with ``code`` if it is one of those: its name; None where it is not."""
    regs = registers.read()
    at = 0
    while at < len(code) and code[at] in PREFIXES:
        at += 1
    rex = code[at] if at < len(code) and code[at] & 0xF0 == 0x40 else 0
    at += bool(rex)
    name, length = None, 0
    if code[at : at + 1] == bytes([FWAIT]):
        name, length = "FWAIT", at + 1
    elif code[at : at + 1] == bytes([INT3]):
        name, length = "INT3", at + 1
        events = K.ffi.new("struct kvm_vcpu_events *")
        events.exception.injected, events.exception.nr = 1, BREAKPOINT
        K.call(fd, K.SET_VCPU_EVENTS, events)
    elif code[at : at + 3] in (CLAC, STAC):
        name, length = ("CLAC" if code[at : at + 3] == CLAC else "STAC"), at + 3
        regs.rflags = regs.rflags & ~RFLAGS_AC | (RFLAGS_AC if name == "STAC" else 0)
    elif code[at : at + 2] == b"\x0f\xae" and at + 2 < len(code):
        modrm = code[at + 2]
        if modrm >> 6 != 3 and modrm >> 3 & 7 == 2:
            name, length = "LDMXCSR", at + 2 + _modrm_bytes(code, at + 2)
    if name is None:
        return None
    regs.rip += length
    K.call(fd, K.SET_REGS, regs)
    return name


def _modrm_bytes(code: bytes, at: int) -> int:
    """Of a memory operand: ModRM, SIB and displacement."""
    mode, base = code[at] >> 6, code[at] & 7
    size = 1
    if base == 4:
        size += 1
        if mode == 0 and at + 1 < len(code) and code[at + 1] & 7 == 5:
            return size + 4
    elif mode == 0 and base == 5:
        return size + 4
    return size + (0, 1, 4)[mode]


def refused(internal: Any) -> bytes:
    """The bytes that KVM's emulator gave up at (KVM_INTERNAL_ERROR_EMULATION), and may be more; none if it tells none.

    What is in memory by now may be another instruction: Linux puts INT3 in front of what it rewrites while other CPUs
    run there.
    """
    if internal.ndata < 3 or not internal.data[0] & HAS_BYTES:
        return b""
    told = bytes(K.ffi.buffer(internal.data))[8:24]
    return told[1 : 1 + min(told[0], LONGEST)]


def instruction(memory: Memory, fd: int, rip: int) -> bytes:
    """The 15 bytes at RIP, or as many of them as are mapped to memory."""
    found = b""
    where = K.ffi.new("struct kvm_translation *")
    while len(found) < LONGEST:
        where.linear_address = rip + len(found)
        K.call(fd, K.TRANSLATE, where)
        page = 0x1000 - (rip + len(found) & 0xFFF)
        size = min(page, LONGEST - len(found))
        if not where.valid or not memory.within(where.physical_address, size):
            break
        found += memory.read(where.physical_address, size)
    return found
