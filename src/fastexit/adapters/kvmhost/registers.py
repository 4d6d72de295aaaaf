"""The registers with which a vCPU begins: behind a reset, at a SIPI, and where a boot protocol says.

Models: nothing. SDM 3A, table 10-1 (reset and INIT) and 9.4.4.2 (SIPI); Linux' 64-bit boot protocol; Multiboot 1.
"""

from __future__ import annotations

import struct
from typing import Any, NamedTuple

from fastexit import regs as R
from fastexit.adapters.kvmhost.memory import GIB, MIB, PAGE, Memory
from fastexit.kvm import ioctl as K

GDT_AT, TABLES_AT = 0x1000, 0x2000
"""Below everything that a kernel is loaded to. The page tables are six pages."""
CODE, DATA, TASK = 0x10, 0x18, 0x20
"""Selectors, as Linux' boot protocol has them."""
CR0_PE, CR0_ET, CR0_NW, CR0_CD, CR0_PG = 1, 1 << 4, 1 << 29, 1 << 30, 1 << 31
CR4_PAE = 1 << 5
EFER_LONG, EFER_ACTIVE = 1 << 8, 1 << 10
PRESENT_WRITABLE, LARGE = 3, 1 << 7
RESET_SELECTOR, RESET_BASE, RESET_RIP = 0xF000, 0xFFFF_0000, 0xFFF0
SIGNATURE = 0x600
"""EDX behind a reset: a family, as CPUID leaf 1 has it."""
DATA_TYPE, CODE_TYPE, TASK_TYPE, TABLE_TYPE = 3, 11, 11, 2
_SEGMENTS = "cs", "ds", "es", "fs", "gs", "ss"


class Start(NamedTuple):
    """Where a guest begins: ``bits`` is 64 (long mode, memory mapped as it is), 32 (flat, no paging) or 16 (reset)."""

    bits: int
    rip: int
    rax: int = 0
    rbx: int = 0
    rsi: int = 0


def _segment(
    segment: Any, selector: int, kind: int, *, base: int = 0, limit: int = 0xFFFF, system: bool = False
) -> None:
    segment.base, segment.limit, segment.selector = base, limit, selector
    segment.type, segment.present, segment.s = kind, 1, not system
    segment.dpl = segment.db = segment.l = segment.g = segment.avl = segment.unusable = 0


def real_mode(sregs: Any, selector: int, base: int) -> None:
    """Everything that an INIT sets in ``struct kvm_sregs``; code at ``base``."""
    for segment in sregs.segments:
        _segment(segment, 0, DATA_TYPE)
    _segment(sregs.segments[0], selector, CODE_TYPE, base=base)
    _segment(sregs.tr, 0, TASK_TYPE, system=True)
    _segment(sregs.ldt, 0, TABLE_TYPE, system=True)
    for table in (sregs.gdt, sregs.idt):
        table.base, table.limit = 0, 0xFFFF
    sregs.cr0 = CR0_ET | sregs.cr0 & (CR0_NW | CR0_CD)
    sregs.cr2 = sregs.cr3 = sregs.cr4 = sregs.cr8 = sregs.efer = 0
    sregs.interrupt_bitmap[0:4] = [0, 0, 0, 0]


def flat(sregs: Any, bits: int) -> None:
    """Protected mode of 32 bits, or long mode, with segments over everything."""
    for segment in sregs.segments:
        _segment(segment, DATA, DATA_TYPE, limit=0xFFFF_FFFF)
        segment.db = segment.g = 1
    _segment(sregs.segments[0], CODE, CODE_TYPE, limit=0xFFFF_FFFF)
    sregs.segments[0].g, sregs.segments[0].db, sregs.segments[0].l = 1, bits == 32, bits == 64
    _segment(sregs.tr, TASK, TASK_TYPE, system=True)
    _segment(sregs.ldt, 0, TABLE_TYPE, system=True)
    sregs.ldt.unusable = 1
    sregs.gdt.base, sregs.gdt.limit = GDT_AT, 0x28 - 1
    sregs.idt.base, sregs.idt.limit = 0, 0
    sregs.cr0 = CR0_PE | CR0_ET
    sregs.cr3 = sregs.cr4 = sregs.efer = 0
    if bits == 64:
        sregs.cr0 |= CR0_PG
        sregs.cr3, sregs.cr4, sregs.efer = TABLES_AT, CR4_PAE, EFER_LONG | EFER_ACTIVE


def descriptors(memory: Memory, bits: int) -> None:
    """A GDT with CODE and DATA, and page tables that map the first 4 GiB as they are."""
    code = 0x00AF_9B00_0000_FFFF if bits == 64 else 0x00CF_9B00_0000_FFFF
    memory.write(GDT_AT, struct.pack("<5Q", 0, 0, code, 0x00CF_9300_0000_FFFF, 0x0000_8B00_0000_FFFF), "GDT")
    directories = 4 * GIB // GIB
    top = struct.pack("<Q", TABLES_AT + PAGE | PRESENT_WRITABLE)
    memory.write(TABLES_AT, top.ljust(PAGE, b"\0"), "page tables")
    pointers = [TABLES_AT + (2 + number) * PAGE | PRESENT_WRITABLE for number in range(directories)]
    memory.write(TABLES_AT + PAGE, struct.pack("<4Q", *pointers).ljust(PAGE, b"\0"), "page tables")
    pages = [2 * MIB * number | PRESENT_WRITABLE | LARGE for number in range(directories * 512)]
    memory.write(TABLES_AT + 2 * PAGE, struct.pack(f"<{len(pages)}Q", *pages), "page tables")


class Registers:
    """KVM_SET_REGS and KVM_SET_SREGS of one vCPU."""

    def __init__(self, fd: int) -> None:
        self.fd: int = fd
        self._regs = K.ffi.new("struct kvm_regs *")
        self._sregs = K.ffi.new("struct kvm_sregs *")
        self._debug = K.ffi.new("struct kvm_debugregs *", {"dr6": 0xFFFF_0FF0, "dr7": 0x400})

    def begin(self, start: Start, apic_base: int) -> None:
        """As a boot protocol, or a reset, has them."""
        regs = self._regs
        K.ffi.memmove(regs, bytes(K.ffi.sizeof("struct kvm_regs")), K.ffi.sizeof("struct kvm_regs"))
        regs.rip, regs.rflags = start.rip, R.RFLAGS_FIXED
        regs.rax, regs.rbx, regs.rsi = start.rax, start.rbx, start.rsi
        K.call(self.fd, K.GET_SREGS, self._sregs)
        if start.bits == 16:
            regs.rdx = SIGNATURE
            self._sregs.cr0 |= CR0_NW | CR0_CD
            real_mode(self._sregs, RESET_SELECTOR, RESET_BASE)
        else:
            flat(self._sregs, start.bits)
        self._put(apic_base)

    def init(
        self, apic_base: int, selector: int = RESET_SELECTOR, base: int = RESET_BASE, rip: int = RESET_RIP
    ) -> None:
        """An INIT: the FPU, MSRs and caches stay."""
        regs = self._regs
        K.ffi.memmove(regs, bytes(K.ffi.sizeof("struct kvm_regs")), K.ffi.sizeof("struct kvm_regs"))
        regs.rip, regs.rflags, regs.rdx = rip, R.RFLAGS_FIXED, SIGNATURE
        K.call(self.fd, K.GET_SREGS, self._sregs)
        real_mode(self._sregs, selector, base)
        K.call(self.fd, K.SET_DEBUGREGS, self._debug)
        self._put(apic_base)

    def sipi(self, vector: int, apic_base: int) -> None:
        """Where a startup IPI sends a vCPU: the page of its vector, in real mode."""
        self.init(apic_base, vector << 8, vector << 12, 0)

    def _put(self, apic_base: int) -> None:
        self._sregs.apic_base = apic_base
        K.call(self.fd, K.SET_SREGS, self._sregs)
        K.call(self.fd, K.SET_REGS, self._regs)

    def read(self) -> Any:
        """KVM_GET_REGS."""
        K.call(self.fd, K.GET_REGS, self._regs)
        return self._regs

    def describe(self) -> str:
        """RIP, CS, CR0 to CR4 and EFER in a line, for whoever has to find out what a guest died of."""
        regs = self.read()
        K.call(self.fd, K.GET_SREGS, self._sregs)
        s = self._sregs
        return (
            f"RIP {s.segments[0].selector:#x}:{regs.rip:#x} RSP {regs.rsp:#x} RFLAGS {regs.rflags:#x} "
            f"CR0 {s.cr0:#x} CR2 {s.cr2:#x} CR3 {s.cr3:#x} CR4 {s.cr4:#x} EFER {s.efer:#x}"
        )
