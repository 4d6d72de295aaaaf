"""The guest's page tables as the CPU walks them for itself: for its descriptor tables, its task state, its frames.

Models: 32-bit paging with 4-MiB pages, PAE, 4- and 5-level paging; the rights of supervisor and user, CR0.WP, NX, SMEP,
SMAP for accesses that are no instruction's; accessed and dirty bits; the page fault's error code (SDM 3A, 4.6 to 4.8).
Not modelled: protection keys, reserved bits but NX without EFER.NXE and PS where there are no such pages.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastexit.adapters.unicorn.fault import PF, Fault

if TYPE_CHECKING:
    from fastexit.adapters.unicorn.engine import Engine

PRESENT, WRITE, USER, ACCESSED, DIRTY, PS, NX = 1, 2, 4, 1 << 5, 1 << 6, 1 << 7, 1 << 63
PF_PRESENT, PF_WRITE, PF_USER, PF_RESERVED, PF_FETCH = 1, 2, 4, 8, 16
CR0_PG, CR0_WP = 1 << 31, 1 << 16
CR4_PSE, CR4_PAE, CR4_LA57, CR4_SMEP, CR4_SMAP = 1 << 4, 1 << 5, 1 << 12, 1 << 20, 1 << 21
EFER_LMA, EFER_NXE = 1 << 10, 1 << 11
_FRAME = 0x000F_FFFF_FFFF_F000


def physical(cpu: Engine, linear: int, *, write: bool = False, user: bool = False) -> int:
    """The physical address of a linear one, for an access that no instruction of the guest makes.

    Fault(PF), with CR2 set, where the tables do not allow it.
    """
    cr0 = cpu.read("CR0")
    if not cr0 & CR0_PG:
        return linear & 0xFFFF_FFFF
    cr4, efer = cpu.read("CR4"), cpu.efer()
    long_mode = bool(efer & EFER_LMA)
    if not long_mode:
        linear &= 0xFFFF_FFFF
    size, shifts = _levels(cr4, long_mode)
    rights, entries = WRITE | USER, list[tuple[int, int]]()
    table = cpu.read("CR3") & (_FRAME if long_mode else 0xFFFF_FFE0 if cr4 & CR4_PAE else 0xFFFF_F000)
    for shift in shifts:
        bits = 9 if size == 8 else 10
        at = table + (linear >> shift & (1 << bits) - 1) * size
        entry = int.from_bytes(cpu.physical_memory(at, size), "little")
        if not entry & PRESENT:
            raise _fault(cpu, linear, 0, write, user)
        last = shift == 12 or bool(entry & PS and shift <= 30 and (size == 8 or cr4 & CR4_PSE))
        pointers = shift == 30 and not long_mode  # PAE's four, which have neither rights nor sizes
        if (entry & NX and size == 8 and not efer & EFER_NXE) or (entry & PS and shift > 30):
            raise _fault(cpu, linear, PF_PRESENT | PF_RESERVED, write, user)
        entries.append((at, entry))
        if not pointers:
            rights &= entry
        if last and not pointers:
            break
        table = entry & _FRAME
    _check(cpu, linear, rights, cr0, cr4, write, user)
    for at, entry in entries:
        marked = entry | ACCESSED | (DIRTY if write and at == entries[-1][0] else 0)
        if marked != entry and not (at == entries[0][0] and not long_mode and size == 8):
            cpu.physical_memory(at, size)[:] = marked.to_bytes(size, "little")
    inside = (1 << shift) - 1
    frame = entry & _FRAME & ~inside if size == 8 else _frame_32(entry, shift)
    return frame | linear & inside


def _levels(cr4: int, long_mode: bool) -> tuple[int, tuple[int, ...]]:
    """Bytes of an entry, and where each level's index begins in an address."""
    if long_mode:
        return 8, (48, 39, 30, 21, 12) if cr4 & CR4_LA57 else (39, 30, 21, 12)
    return (8, (30, 21, 12)) if cr4 & CR4_PAE else (4, (22, 12))


def _frame_32(entry: int, shift: int) -> int:
    """Of a page of 4 MiB address bits 32 to 39 are in the entry's bits 13 to 20 (PSE-36)."""
    return entry & 0xFFFF_F000 if shift == 12 else entry & 0xFFC0_0000 | (entry >> 13 & 0xFF) << 32


def _check(cpu: Engine, linear: int, rights: int, cr0: int, cr4: int, write: bool, user: bool) -> None:
    allowed = bool(rights & USER) if user else not (rights & USER and cr4 & CR4_SMAP)
    if write and not rights & WRITE and (user or cr0 & CR0_WP):
        allowed = False
    if not allowed:
        raise _fault(cpu, linear, PF_PRESENT, write, user)


def _fault(cpu: Engine, linear: int, code: int, write: bool, user: bool) -> Fault:
    cpu.write("CR2", linear)
    return Fault(PF, code | PF_WRITE * write | PF_USER * user)
