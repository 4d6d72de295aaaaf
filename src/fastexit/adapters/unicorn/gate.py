"""An interrupt or exception taken through the guest's own descriptor table, as the CPU takes it.

Models: the interrupt frame of long mode, of 32-bit protected mode and of real mode, with the checks of the gate and of
the code segment; faults on the way, double fault, triple fault (SDM 3A, chapter 6). Not modelled: another code segment
than the current one outside real mode, other rings, task gates, stack segments with a base outside real mode.
"""

from __future__ import annotations

import struct
from collections.abc import Collection, Mapping
from enum import Enum
from typing import TYPE_CHECKING

from fastexit.adapters.unicorn import hook as H
from fastexit.checks import integer
from fastexit.regs import RFLAGS_IF, VECTOR_GP

if TYPE_CHECKING:
    from fastexit.adapters.unicorn.engine import Engine

TF, NT, RF, VM, AC = 1 << 8, 1 << 14, 1 << 16, 1 << 17, 1 << 18
DE, DB, BP, OF, UD, DF, TS, NP, SS, PF, AC_FAULT = 0, 1, 3, 4, 6, 8, 10, 11, 12, 14, 17
ERROR_CODE = frozenset({DF, TS, NP, SS, VECTOR_GP, PF, AC_FAULT})
CONTRIBUTORY = frozenset({DE, TS, NP, SS, VECTOR_GP})
TRAPS = frozenset({DB, BP, OF})
"""Exceptions that do not push RF set, so that what they report is not met again by a debugger."""
PF_PRESENT, PF_WRITE = 1, 2
INTERRUPT_GATE, TRAP_GATE = 0xE, 0xF
IDT, EXTERNAL, TABLE_LDT = 2, 1, 4
LONG_MODE, PROTECTED = 1 << 10, 1
"""EFER.LMA and CR0.PE."""


def idt(handlers: Mapping[int, int], *, selector: int = 0x08, traps: Collection[int] = ()) -> bytes:
    """A long-mode IDT: vector to handler, interrupt gates but for those in ``traps``; all others are not present.

    TypeError or ValueError for vectors over 255, handlers over 64 bits and selectors over 16.
    """
    table = bytearray(256 * 16)
    selector = integer(selector, "selector", 0xFFFF)
    for vector, handler in dict(handlers).items():
        at = 16 * integer(vector, "vector", 0xFF)
        handler = integer(handler, f"handler of vector {vector:#x}")
        kind = TRAP_GATE if vector in traps else INTERRUPT_GATE
        low, middle, high = handler & 0xFFFF, handler >> 16 & 0xFFFF, handler >> 32
        struct.pack_into("<HHBBHII", table, at, low, selector, 0, 0x80 | kind, middle, high, 0)
    return bytes(table)


class Event(Enum):
    """Of what sort a vector is: what it pushes and what a fault on the way comes to depend on it.

    EXTERNAL: an interrupt or NMI. SOFTWARE: INT n, INT3 or INTO, whose RIP is behind them. EXCEPTION: any other.
    """

    EXTERNAL = "external"
    SOFTWARE = "software"
    EXCEPTION = "exception"


class GuestError(RuntimeError):
    """The guest did what its CPU cannot go on from, or what is not modelled; one line that says where."""


class Fault(Exception):
    """An exception on the way: vector and error code."""

    def __init__(self, vector: int, error: int = 0) -> None:
        super().__init__(vector, error)
        self.vector = vector
        self.error = error


def take(cpu: Engine, event: Event, vector: int, error: int | None = None) -> None:
    """Push the frame and go to the handler; faults on the way are taken instead. GuestError: a triple fault."""
    first = vector
    while True:
        try:
            return _through_gate(cpu, event, vector, error)
        except Fault as fault:
            if event is Event.EXCEPTION and vector == DF:
                raise GuestError(f"{cpu.where()}: triple fault, vector {first:#x} has no usable gate") from None
            error = fault.error
            if event is Event.SOFTWARE:  # the instruction has not been carried out
                cpu.write("RIP", cpu.read("RIP") - cpu.words[H.SIZE])
            elif fault.vector != PF:
                error |= EXTERNAL
            double = vector == PF or (vector in CONTRIBUTORY and fault.vector != PF)
            vector, error = (DF, 0) if event is Event.EXCEPTION and double else (fault.vector, error)
            event = Event.EXCEPTION


def _through_gate(cpu: Engine, event: Event, vector: int, error: int | None) -> None:
    flags, rip = cpu.read("EFLAGS"), cpu.read("RIP")
    if event is Event.EXCEPTION and vector not in TRAPS:
        flags |= RF
    if cpu.efer() & LONG_MODE:
        _long_mode(cpu, vector, error, flags, rip)
    elif cpu.read("CR0") & PROTECTED:
        _protected(cpu, vector, error, flags, rip)
    else:
        _real_mode(cpu, vector, flags, rip)


def _descriptor(cpu: Engine, vector: int, size: int) -> bytes:
    _, base, limit = cpu.table("IDTR")
    if vector * size + size - 1 > limit:
        raise Fault(VECTOR_GP, vector << 3 | IDT)
    return cpu.linear_read(base + vector * size, size)


def _check(cpu: Engine, vector: int, attributes: int, selector: int, wants: int) -> None:
    """``wants``: the L and D bits, 54:53, of the code segment's descriptor."""
    if attributes & 0x1F not in (INTERRUPT_GATE, TRAP_GATE):
        raise Fault(VECTOR_GP, vector << 3 | IDT)
    if not attributes & 0x80:
        raise Fault(NP, vector << 3 | IDT)
    _, base, limit = cpu.table("GDTR")
    at = selector & 0xFFF8
    if selector & TABLE_LDT:
        raise GuestError(f"{cpu.where()}: vector {vector:#x} goes to a segment of the LDT, not modelled")
    if not at or at + 7 > limit:
        raise Fault(VECTOR_GP, at)
    code = int.from_bytes(cpu.linear_read(base + at, 8), "little")
    if code >> 43 & 3 != 3 or code >> 45 & 3 or code >> 53 & 3 != wants:
        raise Fault(VECTOR_GP, at)
    if not code >> 47 & 1:
        raise Fault(NP, at)
    current = cpu.read("CS")
    if current & 3:
        raise GuestError(f"{cpu.where()}: vector {vector:#x} in ring {current & 3}, which is not modelled")
    if current & ~3 != at:
        raise GuestError(
            f"{cpu.where()}: vector {vector:#x} goes to code segment {selector:#x} from {current:#x}, not modelled"
        )


def _new_flags(flags: int, attributes: int) -> int:
    flags &= ~(TF | NT | RF | VM)
    return flags & ~RFLAGS_IF if attributes & 0x1F == INTERRUPT_GATE else flags


def canonical(linear: int) -> bool:
    """An address that 4-level paging has."""
    return linear >> 47 in (0, 0x1_FFFF)


def _long_mode(cpu: Engine, vector: int, error: int | None, flags: int, rip: int) -> None:
    low, selector, stack, attributes, middle, high, _ = struct.unpack("<HHBBHII", _descriptor(cpu, vector, 16))
    _check(cpu, vector, attributes, selector, 1)
    handler = high << 32 | middle << 16 | low
    if not canonical(handler):
        raise Fault(VECTOR_GP)
    rsp = before = cpu.read("RSP")
    if stack & 7:
        task, base, limit = cpu.table("TR")
        at = 36 + 8 * ((stack & 7) - 1)
        if at + 7 > limit:
            raise Fault(TS, task & 0xFFF8)
        rsp = int.from_bytes(cpu.linear_read(base + at, 8), "little")
    values = [cpu.read("SS"), before, flags, cpu.read("CS"), rip]
    if error is not None:
        values.append(error)
    rsp = (rsp & ~0xF) - 8 * len(values) & (1 << 64) - 1
    if not canonical(rsp):
        raise Fault(SS)
    cpu.linear_write(rsp, struct.pack(f"<{len(values)}Q", *reversed(values)))
    cpu.write("RSP", rsp)
    cpu.write("EFLAGS", _new_flags(flags, attributes))
    cpu.write("RIP", handler)


def _protected(cpu: Engine, vector: int, error: int | None, flags: int, eip: int) -> None:
    low, selector, _, attributes, high = struct.unpack("<HHBBH", _descriptor(cpu, vector, 8))
    _check(cpu, vector, attributes, selector, 2)
    values = [flags, cpu.read("CS"), eip]
    if error is not None:
        values.append(error)
    esp = (cpu.read("RSP") & 0xFFFF_FFFF) - 4 * len(values) & 0xFFFF_FFFF
    cpu.linear_write(esp, struct.pack(f"<{len(values)}I", *reversed(values)))
    cpu.write("RSP", esp)
    cpu.write("EFLAGS", _new_flags(flags, attributes))
    cpu.write("RIP", high << 16 | low)


def _real_mode(cpu: Engine, vector: int, flags: int, ip: int) -> None:
    offset, selector = struct.unpack("<HH", _descriptor(cpu, vector, 4))
    esp = cpu.read("RSP")
    sp = esp - 6 & 0xFFFF
    stack = cpu.read("SS") << 4
    cpu.linear_write(stack + sp, struct.pack("<HHH", ip & 0xFFFF, cpu.read("CS"), flags & 0xFFFF))
    cpu.write("RSP", esp & ~0xFFFF | sp)
    cpu.write("EFLAGS", flags & ~(AC | RF))
    cpu.real_mode_jump(selector, offset, flags & 0xFFFF & ~(RFLAGS_IF | TF))
