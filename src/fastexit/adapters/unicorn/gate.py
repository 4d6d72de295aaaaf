"""An interrupt or exception taken through the guest's own descriptor table, as the CPU takes it.

Models: the interrupt frame of long mode, of protected mode with 32- and 16-bit gates and of real mode, with the checks
of the gate, of the code segment and of the stack; the way to an inner ring over the task state's stacks; faults on the
way, double fault, triple fault (SDM 3A, chapter 6). Not modelled: task gates, VM86, limits of stack segments.
"""

from __future__ import annotations

import struct
from collections.abc import Collection, Mapping
from enum import Enum
from typing import TYPE_CHECKING

from fastexit.adapters.unicorn import hook as H
from fastexit.adapters.unicorn.fault import CONTRIBUTORY, DF, GP, NP, PF, SS, TRAPS, TS, Fault, GuestError
from fastexit.adapters.unicorn.state import DPL_SHIFT, LONG, SIZE_32, Segment
from fastexit.checks import integer
from fastexit.regs import RFLAGS_IF

if TYPE_CHECKING:
    from fastexit.adapters.unicorn.engine import Engine

TF, NT, RF, VM, AC = 1 << 8, 1 << 14, 1 << 16, 1 << 17, 1 << 18
INTERRUPT_GATE, TRAP_GATE = 0xE, 0xF
_GATES_16 = 0x6, 0x7
IDT, EXTERNAL, TABLE_LDT = 2, 1, 4
LONG_MODE, PROTECTED = 1 << 10, 1
"""EFER.LMA and CR0.PE."""
_PRESENT, _CODE_OR_DATA, _CODE, _CONFORMING, _WRITABLE, _GRANULAR = 1 << 15, 1 << 12, 1 << 11, 1 << 10, 1 << 9, 1 << 23
"""Of a descriptor's upper half."""


def idt(
    handlers: Mapping[int, int], *, selector: int = 0x08, traps: Collection[int] = (), users: Collection[int] = ()
) -> bytes:
    """A long-mode IDT: vector to handler, interrupt gates but for those in ``traps``; all others are not present.

    Ring 3 may call those in ``users`` by INT n. TypeError or ValueError for vectors over 255, handlers over 64 bits and
    selectors over 16.
    """
    table = bytearray(256 * 16)
    selector = integer(selector, "selector", 0xFFFF)
    for vector, handler in dict(handlers).items():
        at = 16 * integer(vector, "vector", 0xFF)
        handler = integer(handler, f"handler of vector {vector:#x}")
        attributes = 0x80 | (TRAP_GATE if vector in traps else INTERRUPT_GATE) | (0x60 if vector in users else 0)
        low, middle, high = handler & 0xFFFF, handler >> 16 & 0xFFFF, handler >> 32
        struct.pack_into("<HHBBHII", table, at, low, selector, 0, attributes, middle, high, 0)
    return bytes(table)


class Event(Enum):
    """Of what sort a vector is: what it pushes and what a fault on the way comes to depend on it.

    EXTERNAL: an interrupt or NMI. SOFTWARE: INT n, INT3 or INTO, whose RIP is behind them. EXCEPTION: any other.
    """

    EXTERNAL = "external"
    SOFTWARE = "software"
    EXCEPTION = "exception"


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
        _long_mode(cpu, event, vector, error, flags, rip)
    elif not cpu.read("CR0") & PROTECTED:
        _real_mode(cpu, vector, flags, rip)
    elif flags & VM:
        raise GuestError(f"{cpu.where()}: vector {vector:#x} in virtual-8086 mode, which is not modelled")
    else:
        _protected(cpu, event, vector, error, flags, rip)


def _descriptor(cpu: Engine, vector: int, size: int) -> bytes:
    _, base, limit = cpu.table("IDTR")
    if vector * size + size - 1 > limit:
        raise Fault(GP, vector << 3 | IDT)
    return cpu.linear_read(base + vector * size, size)


def _check_gate(event: Event, vector: int, attributes: int, cpl: int, kinds: tuple[int, ...]) -> None:
    if attributes & 0x1F not in kinds or (event is Event.SOFTWARE and attributes >> 5 & 3 < cpl):
        raise Fault(GP, vector << 3 | IDT)
    if not attributes & 0x80:
        raise Fault(NP, vector << 3 | IDT)


def _segment(cpu: Engine, selector: int, wrong: int) -> Segment:
    """What a selector's descriptor makes of a segment register; Fault(wrong) where there is none."""
    at = selector & 0xFFF8
    _, base, limit = cpu.table("LDTR" if selector & TABLE_LDT else "GDTR")
    if not selector & 0xFFFC or at + 7 > limit:
        raise Fault(wrong, selector & 0xFFFC)
    low, high = struct.unpack("<II", cpu.linear_read(base + at, 8))
    size = low & 0xFFFF | high & 0xF_0000
    if high & _GRANULAR:
        size = size << 12 | 0xFFF
    return Segment(selector, low >> 16 | (high & 0xFF) << 16 | high & 0xFF00_0000, size, high)


def _code(cpu: Engine, selector: int, cpl: int, long_mode: bool) -> tuple[Segment, int]:
    """The handler's code segment, and the ring that it runs in."""
    code = _segment(cpu, selector, GP)
    is_code = code.attributes & (_CODE_OR_DATA | _CODE) == _CODE_OR_DATA | _CODE
    long_code = code.attributes & (LONG | SIZE_32) == LONG
    if not is_code or code.dpl > cpl or (long_mode and not long_code):
        raise Fault(GP, selector & 0xFFFC)
    if not code.attributes & _PRESENT:
        raise Fault(NP, selector & 0xFFFC)
    ring = cpl if code.attributes & _CONFORMING else code.dpl
    return code._replace(selector=selector & 0xFFFC | ring), ring


def _new_flags(flags: int, attributes: int) -> int:
    flags &= ~(TF | NT | RF | VM)
    return flags & ~RFLAGS_IF if attributes & 1 == 0 else flags


def canonical(linear: int) -> bool:
    """An address that 4-level paging has."""
    return linear >> 47 in (0, 0x1_FFFF)


def _from_task_state(cpu: Engine, at: int, size: int) -> int:
    """A stack pointer or selector of the task state."""
    task, base, limit = cpu.table("TR")
    if at + size - 1 > limit:
        raise Fault(TS, task & 0xFFFC)
    return int.from_bytes(cpu.linear_read(base + at, size), "little")


def _long_mode(cpu: Engine, event: Event, vector: int, error: int | None, flags: int, rip: int) -> None:
    low, selector, stack, attributes, middle, high, _ = struct.unpack("<HHBBHII", _descriptor(cpu, vector, 16))
    current, cpl = cpu.read("CS"), cpu.ring()
    _check_gate(event, vector, attributes, cpl, (INTERRUPT_GATE, TRAP_GATE))
    code, ring = _code(cpu, selector, cpl, True)
    handler = high << 32 | middle << 16 | low
    if not canonical(handler):
        raise Fault(GP)
    rsp = before = cpu.read("RSP")
    if stack & 7:
        rsp = _from_task_state(cpu, 36 + 8 * ((stack & 7) - 1), 8)
    elif ring != cpl:
        rsp = _from_task_state(cpu, 4 + 8 * ring, 8)
    values = [cpu.read("SS"), before, flags, current, rip]
    if error is not None:
        values.append(error)
    rsp = (rsp & ~0xF) - 8 * len(values) & (1 << 64) - 1
    if not canonical(rsp):
        raise Fault(SS)
    cpu.linear_write(rsp, struct.pack(f"<{len(values)}Q", *reversed(values)), user=ring == 3)
    if ring != cpl:
        cpu.load(ring, CS=code, SS=Segment(ring, 0, 0, ring << DPL_SHIFT))
    elif code.selector != current:
        cpu.load(ring, CS=code)
    cpu.write("RSP", rsp)
    cpu.write("EFLAGS", _new_flags(flags, attributes))
    cpu.write("RIP", handler)


def _inner_stack(cpu: Engine, ring: int) -> tuple[Segment, int]:
    """Stack segment and pointer of an inner ring, from a 32-bit or 16-bit task state."""
    wide = bool(cpu.segment("TR").attributes & 1 << 11)
    esp = _from_task_state(cpu, 4 + 8 * ring if wide else 2 + 4 * ring, 4 if wide else 2)
    selector = _from_task_state(cpu, 8 + 8 * ring if wide else 4 + 4 * ring, 2)
    stack = _segment(cpu, selector, TS)
    writable = stack.attributes & (_CODE_OR_DATA | _CODE | _WRITABLE) == _CODE_OR_DATA | _WRITABLE
    if selector & 3 != ring or stack.dpl != ring or not writable:
        raise Fault(TS, selector & 0xFFFC)
    if not stack.attributes & _PRESENT:
        raise Fault(SS, selector & 0xFFFC)
    return stack, esp


def _protected(cpu: Engine, event: Event, vector: int, error: int | None, flags: int, eip: int) -> None:
    low, selector, _, attributes, high = struct.unpack("<HHBBH", _descriptor(cpu, vector, 8))
    current, cpl = cpu.read("CS"), cpu.ring()
    _check_gate(event, vector, attributes, cpl, (INTERRUPT_GATE, TRAP_GATE, *_GATES_16))
    code, ring = _code(cpu, selector, cpl, False)
    wide = bool(attributes & 8)
    stack, esp = (cpu.segment("SS"), cpu.read("RSP") & 0xFFFF_FFFF)
    values = [flags, current, eip]
    if ring != cpl:
        values = [stack.selector, esp, *values]
        stack, esp = _inner_stack(cpu, ring)
    if error is not None:
        values.append(error)
    mask = 0xFFFF_FFFF if stack.attributes & SIZE_32 else 0xFFFF
    below = esp - (4 if wide else 2) * len(values) & mask
    each, top = ("I", 0xFFFF_FFFF) if wide else ("H", 0xFFFF)
    frame = struct.pack(f"<{len(values)}{each}", *(value & top for value in reversed(values)))
    cpu.linear_write(stack.base + below & 0xFFFF_FFFF, frame, user=ring == 3)
    if ring != cpl:
        cpu.load(ring, CS=code, SS=stack)
    elif code.selector != current:
        cpu.load(ring, CS=code)
    cpu.write("RSP", esp & ~mask | below)
    cpu.write("EFLAGS", _new_flags(flags, attributes))
    cpu.write("RIP", (high << 16 if wide else 0) | low)


def _real_mode(cpu: Engine, vector: int, flags: int, ip: int) -> None:
    offset, selector = struct.unpack("<HH", _descriptor(cpu, vector, 4))
    esp = cpu.read("RSP")
    sp = esp - 6 & 0xFFFF
    code = cpu.segment("CS")
    frame = struct.pack("<HHH", ip & 0xFFFF, code.selector, flags & 0xFFFF)
    cpu.linear_write(cpu.segment("SS").base + sp, frame)
    cpu.load(0, CS=code._replace(selector=selector, base=selector << 4))
    cpu.write("RSP", esp & ~0xFFFF | sp)
    cpu.write("EFLAGS", flags & ~(AC | RF | RFLAGS_IF | TF))
    cpu.write("RIP", offset)
