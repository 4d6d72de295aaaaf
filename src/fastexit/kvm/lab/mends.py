"""Where Bochs 3.0 takes interrupts otherwise than a CPU: mends of Debian's build of it.

Models: nothing. Three rules of the SDM, volume 3, that the build does not follow. Each function is found by its symbol,
and code that is not what is expected there is refused. Offsets in the emulated CPU are those of that build:

| what | the SDM | the build |
|---|---|---|
| a host interrupt comes while IF is 0 | it exits, "Other Causes of VM Exits" | a virtual one that waits is delivered |
| an entry with IF 0 | IF matters to no host interrupt, ibidem | they and notifications wait until IF changes |
| a notification finds nothing | RVI stays, "Posted-Interrupt Processing" | RVI is 0xFF |

The second kept KVM waiting for ever where it wants all processors of a VM to answer, as for a new set of EOI exits.
"""

from __future__ import annotations

import hashlib
import struct
from dataclasses import dataclass

from fastexit.kvm.lab import elf

_CPU = "_ZN8BX_CPU_C"
TAKES_INTERRUPT = f"{_CPU}18HandleExtInterruptEv"
ENTERS = f"{_CPU}8VMLAUNCHEP15bxInstruction_c"
INJECTS = f"{_CPU}19VMenterInjectEventsEv"
SETS_MASKS = f"{_CPU}25handleInterruptMaskChangeEv"
NOTIFIED = f"{_CPU}31VMX_Posted_Interrupt_ProcessingEh"

IN_VMX_GUEST, PENDING, MASKS, RVI = 0x8EB9, 0x91D8, 0x91DC, 0x8FF9
"""Offsets in the emulated CPU, which RBX points to: whether it is in a VMX guest; events by bit; RVI."""
SECOND, VIRTUAL = 1, 0x02
"""A pending virtual interrupt is bit 9 of the events."""


@dataclass(frozen=True)
class Mend:
    """Code that takes the place of other code of the same length.

    Attributes:
        function, offset: where. was: begin of the SHA-256 of the bytes that are there, and their count. code: what
            comes there. calls: offsets in ``code`` of the four bytes of a relative target, and the target.
    """

    function: str
    offset: int
    was: tuple[str, int]
    code: bytes
    calls: tuple[tuple[int, str, int], ...] = ()


def _at_rbx(opcode: bytes, offset: int, value: bytes = b"") -> bytes:
    """An instruction with an operand at [RBX + offset]."""
    return opcode + struct.pack("<I", offset) + value


_ASKED = (
    _at_rbx(b"\x80\xbb", IN_VMX_GUEST, b"\0")  # cmp byte [in guest], 0
    + b"\x74\x32"  # je: acknowledge
    + b"\x48\x89\xdf"  # mov rdi, rbx
    + _at_rbx(b"\x8a\x83", MASKS + SECOND)  # mov al, [masks]
    + b"\xf6\xd0"  # not al
    + _at_rbx(b"\x22\x83", PENDING + SECOND)  # and al, [pending]
    + bytes((0xA8, VIRTUAL))  # test al, 2
    + b"\x0f\x85\xa9\0\0\0"  # jne: deliver the virtual interrupt
    + b"\xeb\x12"  # jmp: exit
)
"""In the place of a question about SVM, which this CPU has not, and of one that asks only for what is pending."""
_MASKED = b"\x57\xe8\0\0\0\0\x5f\xe9\0\0\0\0" + b"\x90" * 6
"""push rdi; call SETS_MASKS; pop rdi; jmp INJECTS: what an entry calls now, when it is in the guest already."""
_COMPARED = (
    b"\x85\xc0\x78\x0e"  # test eax, eax; js: nothing was found
    + _at_rbx(b"\x3a\x83", RVI)  # cmp al, [rvi]
    + b"\x72\x06"  # jb
    + _at_rbx(b"\x88\x83", RVI)  # mov [rvi], al
    + b"\xe9\0\0\0\0"  # jmp back
)
"""In the place of an assertion that always holds."""
_CALLED_AT, _JUMPED_AT = len(_ASKED) + 2, len(_ASKED) + 8
_INSERTED = 0x0D + len(_ASKED)
_ASSERTION, _BEHIND = 0x1F0, 0x1DA

MENDS = (
    Mend(
        TAKES_INTERRUPT,
        0x0D,
        ("a892b7bfdf4aa6ee", 54),
        _ASKED + _MASKED,
        ((_CALLED_AT, SETS_MASKS, 0), (_JUMPED_AT, INJECTS, 0)),
    ),
    Mend(ENTERS, 0x179, ("e6f207509afa3908", 1), b"\xe8\0\0\0\0", ((1, TAKES_INTERRUPT, _INSERTED),)),
    Mend(NOTIFIED, 0x31, ("72a217a13452b081", 6), b"\x66\x0f\x1f\x44\0\0"),
    Mend(NOTIFIED, 0x1CC, ("fa229800f3883ace", 14), b"\xe9\0\0\0\0", ((1, NOTIFIED, _ASSERTION),)),
    Mend(NOTIFIED, _ASSERTION, ("812e40ad1da341c9", 9), _COMPARED, ((len(_COMPARED) - 4, NOTIFIED, _BEHIND),)),
)


def digest(code: bytes) -> str:
    """What code is known by."""
    return hashlib.sha256(code).hexdigest()[:16]


def mended(program: bytes) -> bytes:
    """A program with all mends; ValueError, in one line, for one that is not the build that they are for."""
    parts, known = elf.segments(program), elf.symbols(program)
    made = bytearray(program)
    for mend in MENDS:
        if missing := {mend.function, *(name for _, name, _ in mend.calls)} - set(known):
            raise ValueError(f"it has no {min(missing)}")
        begin = known[mend.function] + mend.offset
        at = elf.place(parts, begin)
        was, count = mend.was
        if digest(program[at : at + count]) != was:
            raise ValueError(f"it has other code at {mend.function}+{mend.offset:#x}")
        code = bytearray(mend.code)
        for offset, name, beyond in mend.calls:
            struct.pack_into("<i", code, offset, known[name] + beyond - (begin + offset + 4))
        made[at : at + len(code)] = code
    return bytes(made)
