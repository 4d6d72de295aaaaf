"""SYSCALL and SYSENTER, which Unicorn leaves out: to ring 0, by what MSRs say. Their way back is Unicorn's own.

Models: both in 64-bit, compatibility and 32-bit mode (SDM 2B; APM 3 for SYSCALL outside 64-bit mode).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastexit.adapters.unicorn import hook as H
from fastexit.adapters.unicorn.fault import GP, UD, Fault
from fastexit.adapters.unicorn.gate import LONG_MODE, PROTECTED, RF, VM
from fastexit.adapters.unicorn.state import LONG, SIZE_32, Segment
from fastexit.regs import RFLAGS_IF

if TYPE_CHECKING:
    from fastexit.adapters.unicorn.engine import Engine

SYSENTER_CS, SYSENTER_ESP, SYSENTER_EIP = 0x174, 0x175, 0x176
STAR, LSTAR, CSTAR, FMASK = range(0xC000_0081, 0xC000_0085)
EFER_SCE = 1
_CODE, _DATA = 0x0080_9B00, 0x00C0_9300
"""Flat, present, ring 0; what is set for 64 or 32 bits is not in it."""


def _enter(cpu: Engine, selector: int, long_mode: bool) -> None:
    """Ring 0, flat segments, whatever their descriptors say."""
    code = Segment(selector & 0xFFFC, 0, 0xFFFF_FFFF, _CODE | (LONG if long_mode else SIZE_32))
    cpu.load(0, CS=code, SS=Segment((selector & 0xFFFC) + 8, 0, 0xFFFF_FFFF, _DATA))


def syscall(cpu: Engine, rip: int, flags: int) -> None:
    """SYSCALL at ``rip``. Fault(UD) without EFER.SCE."""
    efer = cpu.efer()
    if not efer & EFER_SCE or not cpu.read("CR0") & PROTECTED:
        raise Fault(UD)
    star, behind = cpu.uc.msr_read(STAR), rip + cpu.words[H.SIZE]
    long_mode = bool(efer & LONG_MODE)
    if long_mode:
        target = cpu.uc.msr_read(LSTAR if cpu.in_64_bit_mode() else CSTAR)
        cpu.write("RCX", behind)
        cpu.write("R11", flags & ~RF)
        flags &= ~(cpu.uc.msr_read(FMASK) | RF)
    else:
        target = star & 0xFFFF_FFFF
        cpu.write("RCX", behind & 0xFFFF_FFFF)
        flags &= ~(RFLAGS_IF | VM | RF)
    _enter(cpu, star >> 32, long_mode)
    cpu.write("EFLAGS", flags)
    cpu.write("RIP", target)


def sysenter(cpu: Engine, rip: int, flags: int) -> None:
    """SYSENTER. Fault(GP) without a code segment for it."""
    selector = cpu.uc.msr_read(SYSENTER_CS)
    if not cpu.read("CR0") & PROTECTED or not selector & 0xFFFC:
        raise Fault(GP)
    long_mode = bool(cpu.efer() & LONG_MODE)
    mask = (1 << 64) - 1 if long_mode else 0xFFFF_FFFF
    rsp, target = (cpu.uc.msr_read(msr) & mask for msr in (SYSENTER_ESP, SYSENTER_EIP))
    _enter(cpu, selector, long_mode)
    cpu.write("RSP", rsp)
    cpu.write("EFLAGS", flags & ~(RFLAGS_IF | VM | RF))
    cpu.write("RIP", target)
