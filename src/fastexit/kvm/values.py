"""Values that matter to a local APIC, drawn at random.

IDs that exist and aliases of them, broadcasts, reserved bits, pages that are believable and pages that are not: drawn
where they matter, not uniformly. What is drawn from is anything that has a machine's face as far as `Seen` says.
"""

from __future__ import annotations

import random
import struct
from collections.abc import Sequence
from typing import Protocol

from fastexit import regs as r

ID_POOL = (0, 1, 2, 3, 7, 8, 15, 16, 17, 18, 31, 127, 254, 255, 256, 257, 271, 272, 300, 511, 1023, 4080, 4094, 4095)
VECTORS = (0, 1, 15, 16, 0x1F, 0x20, 0x2F, 0x31, 0x41, 0x80, 0x81, 0xEC, 0xF0, 0xFB, 0xFC, 0xFD, 0xFE, 0xFF)
X2APIC_MSRS = tuple(range(r.MSR_X2APIC_BASE, r.MSR_X2APIC_BASE + 0x48))
LVTS = (r.APIC_LVTT, r.APIC_LVTTHMR, r.APIC_LVTPC, r.APIC_LVT0, r.APIC_LVT1, r.APIC_LVTERR)
BITMAPS = tuple(base + 0x10 * word for base in (r.APIC_ISR, r.APIC_TMR, r.APIC_IRR) for word in range(8))
WRITABLE = (r.APIC_TASKPRI, r.APIC_EOI, r.APIC_SPIV, r.APIC_ESR, *LVTS, r.APIC_TMICT, r.APIC_TDCR, r.APIC_SELF_IPI)
WRITABLE_IN_XAPIC = (r.APIC_ID, r.APIC_LDR, r.APIC_DFR, r.APIC_ICR2, *WRITABLE)
READABLE_IN_XAPIC = (
    *(r.APIC_ID, r.APIC_LVR, r.APIC_TASKPRI, r.APIC_ARBPRI, r.APIC_PROCPRI, r.APIC_LDR, r.APIC_DFR, r.APIC_SPIV),
    *(*BITMAPS, r.APIC_ESR, r.APIC_ICR, r.APIC_ICR2, *LVTS, r.APIC_TMICT, r.APIC_TMCCT, r.APIC_TDCR),
)
LONG_COUNTS = (0, 0xFFFF_FFFF)
FAR_DEADLINE = 1 << 52
"""So far away that nobody gets there, and not so far that the kernel's 64 bits overflow into something near."""


class SeenVcpu(Protocol):
    """What has to be known of a vCPU to hit it."""

    @property
    def id(self) -> int: ...

    @property
    def apic_base(self) -> int: ...

    @property
    def x2apic(self) -> bool: ...

    @property
    def hw_enabled(self) -> bool: ...

    @property
    def xapic_id(self) -> int: ...

    def reg(self, offset: int) -> int:
        """The dword at ``offset`` of the page."""
        ...

    def get_lapic(self) -> bytes:
        """The page."""
        ...


class Seen(Protocol):
    """What has to be known of a machine; ``x2apic``: its guest's CPUID offers it."""

    @property
    def vcpus(self) -> Sequence[SeenVcpu]: ...

    @property
    def x2apic(self) -> bool: ...


def chance(rng: random.Random, probability: float) -> bool:
    """True with a probability."""
    return rng.random() < probability


def word32(rng: random.Random) -> int:
    """A 32-bit value, often a small or a sparse one."""
    kind = rng.randrange(5)
    if kind == 0:
        return rng.getrandbits(32)
    if kind == 1:
        return 1 << rng.randrange(32)
    if kind == 2:
        return rng.choice((0, 0xFFFF_FFFF, 0xFF, 0x1FF, 0x10000))
    return rng.getrandbits(8) | rng.choice((0, 0x100, 0x700, 0x10000, 0x20000, 0x40000, 0x60000, 0x8000, 0x1000))


def vector(rng: random.Random) -> int:
    """Any vector, often one at a border or one that Linux uses."""
    return rng.choice(VECTORS) if chance(rng, 0.7) else rng.randrange(256)


def delivery_mode(rng: random.Random) -> int:
    """Mostly Fixed, each of the others often enough."""
    return rng.choices(range(8), (45, 20, 4, 5, 8, 6, 7, 3))[0]


def destination(rng: random.Random, machine: Seen) -> int:
    """A destination that means something to this machine, in whichever format."""
    target = rng.choice(machine.vcpus)
    kind = rng.randrange(10)
    if kind < 3:
        return target.id
    if kind == 3:
        return target.xapic_id
    if kind == 4:
        return target.reg(r.APIC_LDR) | rng.choice((0, 1, 3, 0xF, 0xFFFF))
    if kind == 5:
        return (target.id >> 4) << 16 | rng.getrandbits(16)
    if kind == 6:
        return xapic_destination(rng, machine)
    if kind == 7:
        return rng.choice((r.XAPIC_BROADCAST, r.X2APIC_BROADCAST))
    if kind == 8:
        return rng.getrandbits(8)
    return rng.choice((rng.getrandbits(32), target.id + 1, target.id | 0x100, 256 * 16))


def xapic_destination(rng: random.Random, machine: Seen) -> int:
    """Eight bits that mean something to this machine: an id, logical ids, more or fewer of them, everybody."""
    target = rng.choice(machine.vcpus)
    kind = rng.randrange(6)
    if kind == 0:
        return target.xapic_id
    if kind == 1:
        return rng.choice((r.XAPIC_BROADCAST, rng.getrandbits(8)))
    logical = target.reg(r.APIC_LDR) >> r.XAPIC_DEST_SHIFT
    if kind == 2:
        return logical | rng.getrandbits(4)
    if kind == 3:
        return logical & ~(1 << rng.randrange(4))
    return logical


def icr_low(rng: random.Random) -> int:
    """The low half of an ICR, reserved bits now and then."""
    low = vector(rng) | delivery_mode(rng) << r.ICR_DM_SHIFT
    if chance(rng, 0.45):
        low |= r.ICR_LOGICAL
    if chance(rng, 0.5):
        low |= r.ICR_LEVEL
    if chance(rng, 0.25):
        low |= r.ICR_TRIGGER
    if chance(rng, 0.3):
        low |= rng.randrange(1, 4) << r.ICR_SHORTHAND_SHIFT
    if chance(rng, 0.05):
        low |= r.ICR_BUSY
    if chance(rng, 0.06):
        low |= rng.getrandbits(32) & r.ICR_RESERVED & 0xFFFF_FFFF
    return low


def icr(rng: random.Random, machine: Seen) -> int:
    """An x2APIC ICR value of any class."""
    return destination(rng, machine) << r.ICR_DEST_SHIFT | icr_low(rng)


def apic_base(rng: random.Random, vcpu: SeenVcpu) -> int:
    """An APICBASE that changes the mode, in all directions, allowed or not."""
    value = vcpu.apic_base & ~(r.APICBASE_EN | r.APICBASE_EXTD)
    value |= rng.choices((0, r.APICBASE_EN, r.APICBASE_EN | r.APICBASE_EXTD, r.APICBASE_EXTD), (1, 4, 6, 0.3))[0]
    if chance(rng, 0.1):
        value ^= r.APICBASE_BSP
    if chance(rng, 0.05):
        value |= 1 << rng.randrange(64)
    return value


def register_value(rng: random.Random, offset: int) -> int:
    """A value for the register at a page offset."""
    if offset == r.APIC_SPIV and chance(rng, 0.8):
        return word32(rng) | r.SVR_ENABLE
    if offset == r.APIC_ESR and chance(rng, 0.5):
        return 0
    if offset == r.APIC_SELF_IPI and chance(rng, 0.9):
        return vector(rng)
    if offset == r.APIC_TASKPRI:
        return word32(rng) if chance(rng, 0.1) else vector(rng) if chance(rng, 0.8) else 0
    if offset == r.APIC_LDR:
        return (
            rng.choice((1 << rng.randrange(8), rng.randrange(16) << 4 | 1 << rng.randrange(4), rng.getrandbits(8)))
            << 24
        )
    if offset == r.APIC_DFR:
        return rng.choice((r.DFR_FLAT, r.DFR_FLAT, r.DFR_CLUSTER, word32(rng)))
    if offset in (r.APIC_ID, r.APIC_ICR2):
        return rng.choice((rng.randrange(4), rng.choice(ID_POOL) & 0xFF, 0xFF)) << 24 | rng.choice(
            (0, rng.getrandbits(24))
        )
    return word32(rng)


def msi_address(rng: random.Random, machine: Seen) -> int:
    """The 64-bit address of a message."""
    dest = destination(rng, machine)
    address = 0xFEE0_0000 | (dest & 0xFF) << 12
    if chance(rng, 0.6):
        address |= (dest & 0xFFFF_FF00) << 32
    if chance(rng, 0.4):
        address |= 4
    if chance(rng, 0.25):
        address |= 8
    if chance(rng, 0.03):
        address |= rng.getrandbits(8) << 32
    return address


def lapic_page(rng: random.Random, vcpu: SeenVcpu, *, timer: bool = True) -> bytes:
    """A page to set: the current one with registers changed, believable or not; without ``timer`` none gets armed."""
    page = dict(zip(range(0, r.LAPIC_PAGE_BYTES, 4), struct.unpack("<256I", vcpu.get_lapic()), strict=True))
    if chance(rng, 0.03):
        page = {offset: rng.getrandbits(32) for offset in page}
    for _ in range(rng.randrange(1, 6)):
        if chance(rng, 0.25):
            offset = rng.choice(BITMAPS)
            page[offset] = rng.choice((0, 1 << rng.randrange(32), rng.getrandbits(32) & rng.getrandbits(32)))
        elif chance(rng, 0.08):
            page[rng.randrange(256) * 4] = word32(rng)
        else:
            offset = rng.choice((*WRITABLE_IN_XAPIC, r.APIC_ICR, r.APIC_PROCPRI, r.APIC_SPIV, r.APIC_LDR))
            page[offset] = register_value(rng, offset)
    if chance(rng, 0.8):
        page[r.APIC_SPIV] |= r.SVR_ENABLE
    if vcpu.x2apic and chance(rng, 0.85):
        page[r.APIC_ID] = vcpu.id
    page[r.APIC_TMCCT] = 0
    if not timer:
        page[r.APIC_TMICT] = 0
    return struct.pack("<256I", *page.values())


def masked(page: bytes) -> bytes:
    """A register page without the one register that depends on the time of day."""
    return page[: r.APIC_TMCCT] + bytes(4) + page[r.APIC_TMCCT + 4 :]


def differences(expected: bytes, got: bytes) -> str:
    """The dwords in which two pages differ, in words."""
    dwords = zip(
        range(0, r.LAPIC_PAGE_BYTES, 4), struct.unpack("<256I", expected), struct.unpack("<256I", got), strict=True
    )
    return ", ".join(f"{register_name(o)}: expected {e:#x}, got {g:#x}" for o, e, g in dwords if e != g)


def register_name(offset: int) -> str:
    """Name of a page offset as KVM's tracepoints print it, hex where it has none."""
    for base, name in ((r.APIC_ISR, "ISR"), (r.APIC_TMR, "TMR"), (r.APIC_IRR, "IRR")):
        if offset in range(base, base + 0x80, 0x10):
            return f"{name}[{(offset - base) // 0x10}]"
    return r.REGISTER_NAMES.get(offset, f"{offset:#x}")
