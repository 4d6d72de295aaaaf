"""Steps of the VMX lab's guest programs: what one vCPU does at its turn, or what the host does meanwhile.

Models: nothing. A step is data; vmxcode.py makes instructions of it, vmxmodel.py carries it out on the model.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from typing import Any

from fastexit import regs as R

VMXON_AT, VMXON_POINTER_AT = 0x13000, 0x1030
"""The VMXON region, which all vCPUs share (KVM looks at its revision alone), and the operand of VMXON."""
SLEEPING = ("halt",)
"""Kinds that pass the baton on before they do what they do."""


@dataclass(frozen=True)
class Step:
    """``vcpu`` does ``kind`` with ``args``; kind "host" are calls of user space while it has left the guest.

    | kind | args |
    |---|---|
    | wrmsr, rdmsr | MSR, value |
    | store, load | offset in the xAPIC page, value, length |
    | sti, cli, halt | |
    | deadline | ticks from now on |
    | spend | ticks that pass |
    | vmcall | number, four arguments |
    | vmxon, vmxoff | 1 where the vCPU begins anew before it could pass the baton on |
    | host | calls: (vCPU or -1, name, arguments ...) |
    """

    vcpu: int
    kind: str
    args: tuple[Any, ...] = ()
    code: bytes = field(default=b"", compare=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "code", _code(self.kind, self.args))

    def arguments(self) -> str:
        """Its arguments as text, numbers in hex."""
        return " ".join(f"{arg:#x}" if isinstance(arg, int) else str(arg) for arg in self.args)

    @property
    def passes_first(self) -> bool:
        """Whether others go on before it is done."""
        return self.kind in SLEEPING or (self.kind == "vmxoff" and self.args == (1,))


def _u32(value: int) -> bytes:
    return struct.pack("<I", value & 0xFFFF_FFFF)


FLAGS = b"\x9c\x58\x83\xe0\x41\x31\xd2"
"""pushfd; pop eax; eax &= CF | ZF; edx = 0."""


def _code(kind: str, args: tuple[Any, ...]) -> bytes:
    """Instructions, 32-bit code."""
    if kind == "wrmsr":
        msr, value = args
        return b"\xb9" + _u32(msr) + b"\xb8" + _u32(value) + b"\xba" + _u32(value >> 32) + b"\x0f\x30"
    if kind == "rdmsr":
        return b"\xb9" + _u32(args[0]) + b"\x0f\x32"
    if kind in ("store", "load"):
        offset, value, length = args
        at = _u32(R.APIC_DEFAULT_PHYS_BASE + offset)
        wide = b"\x66" if length == 2 else b""
        op = (0x88 if kind == "store" else 0x8A) + (length > 1)
        return b"\xb8" + _u32(value) + b"\x31\xd2" + wide + bytes((op, 0x05)) + at
    if kind == "vmcall":
        loaded = zip((b"\xb8", b"\xbb", b"\xb9", b"\xba", b"\xbe"), args, strict=True)
        return b"".join(opcode + _u32(arg) for opcode, arg in loaded) + b"\x0f\x01\xc1\x31\xd2"
    if kind == "deadline":
        added = b"\x05" + _u32(args[0]) + b"\x83\xd2\x00"
        return b"\x0f\x31" + added + b"\xb9" + _u32(R.MSR_TSC_DEADLINE) + b"\x0f\x30\x31\xc0\x31\xd2"
    if kind == "spend":
        # until the low word of the TSC has moved on: rdtsc; esi = eax; again: rdtsc; eax -= esi; cmp eax, ticks; jb
        loop = b"\x0f\x31\x29\xf0\x3d" + _u32(args[0])
        return b"\x0f\x31\x89\xc6" + loop + b"\x72" + struct.pack("<b", -len(loop) - 2) + b"\x31\xc0\x31\xd2"
    if kind == "vmxon":
        return b"\xf3\x0f\xc7\x35" + _u32(VMXON_POINTER_AT) + FLAGS
    if kind == "vmxoff":
        return b"\x0f\x01\xc4" + FLAGS
    return {"sti": b"\xfb", "cli": b"\xfa", "halt": b"\xfb\xf4", "host": b""}[kind]
