"""Operations on a VM's irqchip, drawn at random: few pins, few vectors and destinations that exist, so that they meet.

Models: nothing. What is drawn from is what twins have seen last: pages of vCPUs and images of the chips.
"""

from __future__ import annotations

import random
import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from fastexit import regs as r
from fastexit.kvm import operations as ops
from fastexit.kvm.operations import Op
from fastexit.kvm.values import SeenVcpu, chance, xapic_destination

PINS, PIC_PINS, RTC_PIN = 24, 16, 8
PIC_BYTES = 16
MASTER, SLAVE, IOAPIC = 0, 1, 2
INDEX, WINDOW = r.IOAPIC_DEFAULT_BASE, r.IOAPIC_DEFAULT_BASE + 0x10
COMMANDS, DATAS, ELCRS = (0x20, 0xA0), (0x21, 0xA1), (0x4D0, 0x4D1)
PIC_FLAGS = (6, 7, 8, 10, 11, 12, 13)
"""Bytes of kvm_pic_state that are flags."""
INIT_STATE, IRQ_BASE, PRIORITY_ADD, ELCR_MASK = 9, 5, 4, 15
PIT_CHANNEL_BYTES = 24
PIT_MODE_AT, PIT_FLAGS_AT = 13, 72
NO_TIMER = (5, 0xFF)
"""Modes of channel 0 in which no timer runs."""
HPET_LEGACY = 1
EOI_MSR, ICR_MSR = r.MSR_X2APIC_EOI, r.MSR_X2APIC_ICR
LINT0S = (r.LVT0_BOOT, r.LVT0_BOOT, r.LVT0_BOOT, r.LVT_MASKED, r.LVT0_BOOT | r.LVT_MASKED, 0x41)
SPIVS = (0x1FF, 0x1FF, 0x1FF, 0x1FF, 0x1FF, 0x11FF, 0x11FF, 0xFF)
MOST_IRQFDS = 5


class Chips(Protocol):
    """What has to be known of a machine to hit its irqchip."""

    split: bool
    images: Sequence[bytes]
    """KVM_GET_IRQCHIP of the three chips; none with a split irqchip."""
    pit: bytes
    """KVM_GET_PIT2, or nothing."""
    irqfds: dict[int, Any]
    calm: bool
    """Whether modes that take a vCPU away are left out: with an SMM there is no memory for a handler of it."""
    tells_eoi_at_once: bool
    ends_at_injection: bool
    """`Host.eoi_at_injection`."""

    @property
    def vcpus(self) -> Sequence[SeenVcpu]: ...

    @property
    def x2apic(self) -> bool: ...

    def able(self, i: int) -> bool:
        """Whether a vCPU can run programs."""
        ...


@dataclass
class Pools:
    """What one machine's operations meet at: pins, GSIs, vectors. ``style``: which weights they have."""

    style: str
    pins: list[int]
    gsis: list[int]
    vectors: list[int]
    devices: bool
    """Whether there are irqfds."""
    pit: bool
    planned: list[Op] = field(default_factory=list)

    @classmethod
    def draw(cls, rng: random.Random, split: bool, traced: bool) -> Pools:
        """One machine's: half of all full irqchips are never put into a state by user space, which hides scans."""
        style = "split" if split else rng.choices(("full", "scans", "pic", "pit"), (5, 4, 3, 1))[0]
        pins = sorted({RTC_PIN, *rng.sample((0, 3, 17, 19, *range(PINS)), 2 if style == "scans" else 4)})
        gsis = [*pins, RTC_PIN, rng.randrange(28)] if style != "pic" else list(range(PIC_PINS))
        high = rng.choice((0x30, 0x40, 0x50))
        vectors = (
            [high | 1, high | 4] if style == "scans" else [high | 1, high | 4, high + 0x20, rng.randrange(16, 256)]
        )
        return cls(style, pins, gsis, vectors, chance(rng, 0.5) and not traced, style == "pit" or chance(rng, 0.15))

    def pin(self, rng: random.Random) -> int:
        return rng.choice(self.pins) if chance(rng, 0.92) else rng.randrange(PINS)

    def gsi(self, rng: random.Random) -> int:
        return rng.choice(self.gsis) if chance(rng, 0.95) else rng.choice((rng.randrange(40), 4095, 4096, 1 << 31))

    def vector(self, rng: random.Random) -> int:
        return rng.choice(self.vectors) if chance(rng, 0.93) else rng.randrange(256)


def mode(rng: random.Random, machine: Chips) -> int:
    """A delivery mode: mostly Fixed; NMI and INIT take vCPUs away, so they are rare."""
    found = rng.choices(range(8), (72, 12, 2, 3, 2.5, 1.2, 2, 5))[0]
    return r.DM_FIXED if found == r.DM_SMI and machine.calm else found


def destination(rng: random.Random, machine: Chips) -> int:
    """Eight bits that mean something."""
    if chance(rng, 0.45):
        return rng.choice(machine.vcpus).id & 0xFF
    return xapic_destination(rng, machine)


def entry(rng: random.Random, machine: Chips, pools: Pools) -> int:
    """A redirection entry."""
    how = mode(rng, machine)
    if how == r.DM_INIT and machine.tells_eoi_at_once:
        how = r.DM_FIXED  # a guest whose own store raises it would not come back from that
    value = pools.vector(rng) | how << 8 | destination(rng, machine) << r.REDIR_DEST_SHIFT
    for bit, likely in (
        (r.REDIR_LOGICAL, 0.4),
        (r.REDIR_STATUS, 0.1),
        (1 << 13, 0.25),
        (r.REDIR_REMOTE_IRR, 0.25),
        (r.REDIR_LEVEL, 0.62),
        (r.REDIR_MASK, 0.2),
    ):
        value |= bit if chance(rng, likely) else 0
    return value | (rng.getrandbits(39) << 17 if chance(rng, 0.06) else 0)


def message(rng: random.Random, machine: Chips, pools: Pools) -> tuple[int, int]:
    """Address and data of a message."""
    target = destination(rng, machine)
    address = 0xFEE0_0000 | target << 12
    if chance(rng, 0.15):
        address |= (rng.choice(machine.vcpus).id & 0xFFFF_FF00) << 32
    address |= rng.getrandbits(8) << 32 if chance(rng, 0.03) else 0
    address |= (4 if chance(rng, 0.4) else 0) | (8 if chance(rng, 0.2) else 0)
    address &= ~rng.choice((0, 0, 0xFFF0_0000))
    data = pools.vector(rng) | mode(rng, machine) << 8
    return address, data | (0x8000 if chance(rng, 0.55) else 0) | (0x4000 if chance(rng, 0.5) else 0)


# ---------------------------------------------------------------------------------------------------------- the IOAPIC


def line(rng: random.Random, _machine: Chips, pools: Pools) -> Iterator[Op]:
    """A line goes up or down; KVM_IRQ_LINE now and then."""
    level = rng.choices((1, 0, rng.choice((2, 0x8000_0000, 0xFFFF_FFFF))), (55, 43, 2))[0]
    yield ("irq_line", pools.gsi(rng), level, chance(rng, 0.75))


def redirect(rng: random.Random, machine: Chips, pools: Pools) -> Iterator[Op]:
    """A guest writes half an entry, mostly one bit of it."""
    i, pin = able(rng, machine), pools.pin(rng)
    if i is None:
        yield from recover(rng, machine, pools)
        return
    index = 0x10 + 2 * pin + (high := chance(rng, 0.3))
    (old,) = struct.unpack_from("<Q", machine.images[IOAPIC], 24 + 8 * pin)
    new = entry(rng, machine, pools)
    if chance(rng, 0.5):
        new = old ^ rng.choice((r.REDIR_MASK, r.REDIR_MASK, r.REDIR_LEVEL, r.REDIR_REMOTE_IRR, r.REDIR_LOGICAL))
    yield ("mem_write", i, INDEX, index, 4)
    length = rng.choices((4, 2, 1), (90, 5, 5))[0]
    yield ("mem_write", i, WINDOW, (new >> 32 * high & 0xFFFF_FFFF) & (1 << 8 * length) - 1, length)


def window(rng: random.Random, machine: Chips, pools: Pools) -> Iterator[Op]:
    """A guest reads and writes any register, in any size, and what is beside the registers."""
    i = able(rng, machine)
    if i is None:
        return
    kind = rng.random()
    length = rng.choices((4, 2, 1), (6, 1, 1))[0]
    value = rng.getrandbits(8 * length)
    if kind < 0.5:
        index = rng.choice((*range(6), 0x10 + rng.randrange(2 * PINS), 0x40, rng.randrange(256)))
        yield ("mem_write", i, INDEX, index | rng.choice((0, 0, 0xAB00)), 4)
        yield ("mem_read", i, WINDOW, length)
        if index < 6:
            yield ("mem_write", i, WINDOW, value, length)
    elif kind < 0.75:
        at = rng.choice((0, 1, 0x10, 0x11, 0x20, 0x40, 0xFC, 0xFE, 0xFF, 0x100, 0x200))
        yield ("mem_read", i, INDEX + at, length)
    else:
        at = rng.choice((1, 0x11, 0x12, 0x20, 0x40, 0x40, 0xFD, 0x100))
        yield ("mem_write", i, INDEX + at, rng.choice(pools.vectors) if at == 0x40 else value, length)


def set_ioapic(rng: random.Random, machine: Chips, pools: Pools) -> Iterator[Op]:
    """KVM_SET_IRQCHIP of the IOAPIC as it is, more or less."""
    yield ("set_irqchip", IOAPIC, ioapic_image(rng, machine, pools))


def ioapic_image(rng: random.Random, machine: Chips, pools: Pools) -> bytes:
    """The IOAPIC's state with some entries and lines changed."""
    base, select, number, irr, pad, *table = struct.unpack_from("<QIIII24Q", machine.images[IOAPIC])
    for pin in {pools.pin(rng) for _ in range(rng.randrange(6))}:
        table[pin] = entry(rng, machine, pools)
    if chance(rng, 0.6):
        irr = sum(1 << pools.pin(rng) for _ in range(rng.randrange(4))) & 0xFFFF_FFFF
    if chance(rng, 0.1):
        irr |= rng.getrandbits(32)
    if chance(rng, 0.1):
        number, select, pad = rng.getrandbits(32), rng.getrandbits(32), rng.getrandbits(32)
    base = rng.choice((0xFEC0_1000, 0x1_FEC0_0000)) if chance(rng, 0.02) else r.IOAPIC_DEFAULT_BASE
    return struct.pack("<QIIII24Q", base, select, number, irr, pad, *table)


# ------------------------------------------------------------------------------------------------------------- the PICs


def set_pic(rng: random.Random, machine: Chips, _pools: Pools) -> Iterator[Op]:
    """KVM_SET_IRQCHIP of one PIC as it is, more or less."""
    chip = rng.randrange(2)
    state = bytearray(machine.images[chip])
    for at in rng.sample(range(16), rng.randrange(1, 6)):
        if at in PIC_FLAGS:
            state[at] = rng.choice((0, 0, 1, rng.getrandbits(8)))
        elif at == INIT_STATE:
            state[at] = rng.choice((0, 0, 0, 1, 2, 3))
        elif at == PRIORITY_ADD:
            state[at] = rng.choice((0, rng.randrange(8)))
        elif at == ELCR_MASK:
            state[at] = rng.choice((*r.PIC_ELCR_MASKS, 0xFF, rng.getrandbits(8)))
        else:
            state[at] = rng.choice((0, 1 << rng.randrange(8), rng.getrandbits(8) & rng.getrandbits(8)))
    yield ("set_irqchip", chip, bytes(state[:PIC_BYTES]))


def pic_port(rng: random.Random, machine: Chips, _pools: Pools) -> Iterator[Op]:
    """A guest at the PICs' ports."""
    i = able(rng, machine)
    if i is None:
        return
    chip = rng.randrange(2)
    kind = rng.random()
    if kind < 0.10:
        icw1 = 0x10 | rng.getrandbits(4)
        yield ("io_write", i, COMMANDS[chip], icw1 | 1 if chance(rng, 0.5) else icw1 & ~1, 1)
        if chance(rng, 0.8):
            icw2 = rng.choice((0x20, 0x28, 0x70, rng.getrandbits(8)))
            for value in (icw2, rng.choice((4, 2)), rng.choice((1, 3, 0x11, 0x13, rng.getrandbits(8)))):
                yield ("io_write", i, DATAS[chip], value, 1)
    elif kind < 0.40:
        how = rng.choices(range(8), (1, 4, 1, 3, 1, 3, 1, 3))[0]
        yield ("io_write", i, COMMANDS[chip], how << 5 | rng.randrange(8), 1)
    elif kind < 0.58:
        yield ("io_write", i, COMMANDS[chip], 8 | rng.getrandbits(3) | rng.choice((0, 0x40, 0x60, 0x20)), 1)
        if chance(rng, 0.6):
            yield ("io_read", i, rng.choice((COMMANDS[chip], DATAS[chip])), 1)
    elif kind < 0.74:
        mask = rng.choice((0, 0, 0xFF, 1 << rng.randrange(8), rng.getrandbits(8)))
        yield ("io_write", i, DATAS[chip], mask, 1)
    elif kind < 0.86:
        yield ("io_read", i, rng.choice((*COMMANDS, *DATAS, *ELCRS)), 1)
    elif kind < 0.95:
        yield ("io_write", i, ELCRS[chip], rng.getrandbits(8), 1)
    else:
        port, length = rng.choice((*COMMANDS, *DATAS, *ELCRS, 0x22, 0x1F, 0x4D2)), rng.choice((1, 2, 2, 4))
        if chance(rng, 0.5):
            yield ("io_read", i, port, length)
        else:
            yield ("io_write", i, port, rng.getrandbits(8 * length), length)


# -------------------------------------------------------------------------------------------------------- vCPUs, EOIs


def able(rng: random.Random, machine: Chips) -> int | None:
    """A vCPU that can run programs, or None."""
    found = [i for i in range(len(machine.vcpus)) if machine.able(i)]
    return rng.choice(found) if found else None


def recover(_rng: random.Random, machine: Chips, _pools: Pools) -> Iterator[Op]:
    """vCPUs that cannot run programs become able to."""
    for i in range(len(machine.vcpus)):
        if not machine.able(i):
            yield ("ready", i)
            return


def in_service(vcpu: SeenVcpu) -> bool:
    """Whether an EOI would end anything."""
    return any(vcpu.reg(r.APIC_ISR + 0x10 * word) for word in range(8))


def eoi(rng: random.Random, machine: Chips, pools: Pools) -> Iterator[Op]:
    """An EOI, of user space or of a guest, mostly where something is in service."""
    there = [i for i, vcpu in enumerate(machine.vcpus) if in_service(vcpu) and vcpu.hw_enabled]
    if not there or chance(rng, 0.03):
        there = list(range(len(machine.vcpus)))
    i = rng.choice(there)
    vcpu = machine.vcpus[i]
    if vcpu.x2apic:
        by_guest = machine.tells_eoi_at_once and machine.able(i) and chance(rng, 0.4)
        yield ("wrmsr" if by_guest else "set_msr", i, EOI_MSR, 0)
    elif machine.able(i) and vcpu.hw_enabled:
        yield ("mem_write", i, (vcpu.apic_base & r.APICBASE_PAGE) + r.APIC_EOI, 0, 4)


def set_lapic(rng: random.Random, machine: Chips, pools: Pools) -> Iterator[Op]:
    """KVM_SET_LAPIC: the vectors that are met at wait, are in service, are called level."""
    i = rng.randrange(len(machine.vcpus))
    page = bytearray(machine.vcpus[i].get_lapic())
    for base, likely in ((r.APIC_IRR, 0.25), (r.APIC_ISR, 0.4), (r.APIC_TMR, 0.5)):
        for vector in pools.vectors:
            at = base + (vector >> 5) * 0x10
            (bits,) = struct.unpack_from("<I", page, at)
            bit = 1 << (vector & 31)
            struct.pack_into("<I", page, at, bits | bit if chance(rng, likely) else bits & ~bit)
    if chance(rng, 0.5):
        struct.pack_into("<I", page, r.APIC_SPIV, rng.choice(SPIVS))
    if chance(rng, 0.4):
        struct.pack_into("<I", page, r.APIC_LVT0, rng.choice(LINT0S))
    if chance(rng, 0.2):
        struct.pack_into("<I", page, r.APIC_TASKPRI, rng.choice((0, 0, 0x40, 0x50, 0xF0)))
    yield ("set_lapic", i, bytes(page))


def run(rng: random.Random, machine: Chips, pools: Pools) -> Iterator[Op]:
    """A guest runs: requests are looked at, an interrupt is taken."""
    i = able(rng, machine)
    if i is None:
        yield from recover(rng, machine, pools)
    else:
        yield ("take", i) if chance(rng, 0.55) else ("run_through", i)


def lint0(rng: random.Random, machine: Chips, _pools: Pools) -> Iterator[Op]:
    """Whether a vCPU takes what the PICs have."""
    i = rng.randrange(len(machine.vcpus))
    page = bytearray(machine.vcpus[i].get_lapic())
    struct.pack_into("<I", page, r.APIC_LVT0, rng.choice(LINT0S))
    yield ("set_lapic", i, bytes(page))


def elsewhere(rng: random.Random, machine: Chips, pools: Pools) -> Iterator[Op]:
    """A vector that the IOAPIC also has comes from somebody else: a message, an IPI."""
    x2apics = [i for i, vcpu in enumerate(machine.vcpus) if vcpu.x2apic]
    if x2apics and chance(rng, 0.3):
        target = rng.choice(machine.vcpus).id
        yield ("set_msr", rng.choice(x2apics), ICR_MSR, target << r.ICR_DEST_SHIFT | pools.vector(rng))
    else:
        yield ("signal_msi", *message(rng, machine, pools))


def rest_of_vcpu(rng: random.Random, machine: Chips, pools: Pools) -> Iterator[Op]:
    """What changes the APIC map, and what user space asks."""
    i = rng.randrange(len(machine.vcpus))
    vcpu = machine.vcpus[i]
    kind = rng.random()
    if kind < 0.25 and vcpu.x2apic:
        yield ("set_msr", i, r.MSR_X2APIC_BASE + (r.APIC_SPIV >> 4), rng.choice(SPIVS))
    elif kind < 0.4:
        base = vcpu.apic_base & ~(r.APICBASE_EN | r.APICBASE_EXTD)
        both = r.APICBASE_EN | r.APICBASE_EXTD
        yield ("set_msr", i, r.MSR_APICBASE, base | rng.choice((0, r.APICBASE_EN, both if machine.x2apic else 0)))
        if not machine.vcpus[i].hw_enabled:
            yield ("set_msr", i, r.MSR_APICBASE, base | r.APICBASE_EN)
    elif kind < 0.5 and vcpu.hw_enabled and not vcpu.x2apic and machine.able(i):
        page = vcpu.apic_base & r.APICBASE_PAGE
        offset = rng.choice((r.APIC_LDR, r.APIC_SPIV, r.APIC_LVT0, r.APIC_TASKPRI))
        value = {r.APIC_SPIV: rng.choice(SPIVS), r.APIC_LVT0: rng.choice(LINT0S), r.APIC_TASKPRI: 0}.get(offset)
        yield ("mem_write", i, page + offset, 1 << 24 + rng.randrange(8) if value is None else value, 4)
    elif kind < 0.6 and vcpu.x2apic:
        yield ("set_msr", i, r.MSR_X2APIC_BASE + (r.APIC_LVT0 >> 4), rng.choice(LINT0S))
    elif kind < 0.7:
        yield ("interrupt", i, rng.randrange(16, 256))
    else:
        yield from recover(rng, machine, pools)


# ------------------------------------------------------------------------------------------------------ routes, irqfds


def routes(rng: random.Random, machine: Chips, pools: Pools) -> Iterator[Op]:
    """A routing table: the default one, with changes, or one that is refused."""
    rows: list[tuple[Any, ...]] = []
    if machine.split:
        for gsi in sorted(rng.sample(range(30), rng.randrange(3, 14))):
            rows.append(("msi", gsi, *message(rng, machine, pools)))
    elif chance(rng, 0.9):
        for gsi in range(PINS):
            rows.append(("ioapic", gsi, gsi))
            if gsi < PIC_PINS:
                rows.append(("pic", gsi, gsi >> 3, gsi & 7))
    if not machine.split and chance(rng, 0.75):
        for _ in range(rng.randrange(1, 6)):
            gsi = pools.gsi(rng) & 0xFFF
            rows = [row for row in rows if row[1] != gsi]
            kind = rng.random()
            if kind < 0.3:
                rows.append(("msi", gsi, *message(rng, machine, pools)))
                continue
            new: list[tuple[Any, ...]] = [("ioapic", gsi, pools.pin(rng))]
            new.append(("pic", gsi, chip := rng.randrange(2), rng.randrange(8)))
            if chance(rng, 0.3):
                new.append(("pic", gsi, 1 - chip, rng.randrange(8)))
            rng.shuffle(new)
            rows += new[: rng.randrange(1, len(new) + 1)]
    if chance(rng, 0.12):
        rows.append(
            rng.choice(
                (
                    ("ioapic", 4096, 0),
                    ("ioapic", 3, PINS),
                    ("pic", 3, 1, 8),
                    ("pic", 3, 3, 1),
                    ("ioapic", 5, 3),
                    ("msi", 5, 0x12_FEE0_0000, 0x41),
                )
            )
        )
    if chance(rng, 0.2):
        rng.shuffle(rows)
    yield ("set_gsi_routing", tuple(rows))


def irqfd(rng: random.Random, machine: Chips, pools: Pools) -> Iterator[Op]:
    """An eventfd comes, is written to, or goes."""
    known = list(machine.irqfds)
    kind = rng.random()
    if not known or (kind < 0.25 and len(known) < MOST_IRQFDS):
        number = max(known, default=0) + 1
        yield ("irqfd", number, pools.gsi(rng), chance(rng, 0.7))
    elif kind < 0.85:
        yield ("irqfd_signal", rng.choice(known), rng.choice((1, 1, 3)))
    else:
        yield ("irqfd_close", rng.choice(known))


# -------------------------------------------------------------------------------------------------------------- the PIT


def pit_stops(machine: Chips) -> bool:
    """Whether channel 0 may be loaded without a timer that runs."""
    return machine.pit[PIT_MODE_AT] in NO_TIMER or bool(machine.pit[PIT_FLAGS_AT] & HPET_LEGACY)


def pit(rng: random.Random, machine: Chips, pools: Pools) -> Iterator[Op]:
    """The PIT's ports and states, with a timer that never runs."""
    if not machine.pit:
        yield ("create_pit", chance(rng, 0.8))
        return
    kind = rng.random()
    i = able(rng, machine)
    if kind < 0.06:
        yield ("reinject_control", chance(rng, 0.5))
    elif kind < 0.16:
        state = bytearray(machine.pit)
        for n in range(3):
            for at in range(6, 16):
                if chance(rng, 0.25):
                    state[n * PIT_CHANNEL_BYTES + at] = rng.choice((0, 1, 2, 3, rng.getrandbits(8)))
        state[PIT_FLAGS_AT] = rng.choice((0, 1, 2, 3))
        if not state[PIT_FLAGS_AT] & HPET_LEGACY:
            state[PIT_MODE_AT] = rng.choice(NO_TIMER)
        yield ("set_pit", bytes(state))
    elif i is None:
        yield from recover(rng, machine, pools)
    elif kind < 0.45:
        control = rng.getrandbits(8)
        if chance(rng, 0.6):
            control = rng.choice((0xC0, rng.randrange(3) << 6)) | rng.getrandbits(6)
        yield ("io_write", i, 0x43, control, 1)
    elif kind < 0.65:
        port = 0x40 + rng.randrange(3)
        if port == 0x40 and not pit_stops(machine):
            port = 0x41
        length = rng.choice((1, 1, 1, 2))
        if not (length == 2 and port == 0x40):
            yield ("io_write", i, port, rng.getrandbits(8 * length), length)
    elif kind < 0.85:
        yield ("io_read", i, rng.choice((0x40, 0x41, 0x42, 0x43, 0x3F, 0x44)), rng.choice((1, 1, 1, 2)))
    elif kind < 0.93:
        yield ("io_write", i, rng.choice((0x61, 0x61, 0x62)), rng.getrandbits(8), 1)
    else:
        yield ("io_read", i, 0x61, 1)


Drawer = Callable[[random.Random, Chips, Pools], Iterator[Op]]

WEIGHTS: dict[str, dict[Drawer, float]] = {
    "full": {
        line: 24,
        redirect: 13,
        window: 4,
        set_ioapic: 5,
        set_pic: 3,
        pic_port: 7,
        eoi: 14,
        set_lapic: 11,
        run: 14,
        elsewhere: 7,
        rest_of_vcpu: 4,
        routes: 1.5,
    },
    "scans": {
        line: 26,
        redirect: 24,
        window: 2,
        eoi: 1,
        run: 26,
        elsewhere: 18,
        rest_of_vcpu: 0.4,
        recover: 3,
        routes: 0.6,
    },
    "pic": {line: 26, set_pic: 6, pic_port: 40, run: 16, lint0: 5, rest_of_vcpu: 2, routes: 1, redirect: 2, eoi: 2},
    "split": {
        line: 18,
        routes: 8,
        eoi: 18,
        set_lapic: 14,
        run: 24,
        elsewhere: 10,
        rest_of_vcpu: 5,
        pic_port: 1,
        window: 1,
    },
    "pit": {pit: 60, line: 10, pic_port: 8, run: 10, redirect: 6, rest_of_vcpu: 2, recover: 2},
}
"""How often what is drawn, by style."""
IRQFD_WEIGHT, PIT_WEIGHT, EOI_WEIGHT = 8, 1.5, 14


def beginning(rng: random.Random, machine: Chips, pools: Pools) -> Iterator[Op]:
    """vCPUs that can run programs, in modes that go together; entries of the pins, and PICs that are initialised."""
    for i in range(len(machine.vcpus)):
        yield ("ready", i)
    yield from ops.setup_ops(rng, machine)
    if machine.split:
        yield from routes(rng, machine, pools)
        return
    if pools.style in ("full", "scans"):
        yield ("set_irqchip", IOAPIC, ioapic_image(rng, machine, pools))
        if pools.style == "scans":
            base, select, number, _, pad, *table = struct.unpack_from("<QIIII24Q", machine.images[IOAPIC])
            for pin in pools.pins:
                table[pin] = entry(rng, machine, pools) & ~r.REDIR_REMOTE_IRR
            image = struct.pack("<QIIII24Q", r.IOAPIC_DEFAULT_BASE, select, number, 0, pad, *table)
            yield ("set_irqchip", IOAPIC, image)
    for chip in (MASTER, SLAVE):
        state = bytearray(machine.images[chip])
        state[IRQ_BASE] = 0x20 + 8 * chip if chance(rng, 0.8) else rng.getrandbits(8)
        state[2] = rng.choice((0, 0xFF, rng.getrandbits(8))) if pools.style != "pic" else 0
        yield ("set_irqchip", chip, bytes(state[:PIC_BYTES]))


def draw(rng: random.Random, machine: Chips, pools: Pools) -> Op:
    """The next operation; some come in a row."""
    while not pools.planned:
        weights = dict(WEIGHTS[pools.style])
        if not machine.ends_at_injection:
            weights[eoi] = max(EOI_WEIGHT, weights.get(eoi, 0))
        if pools.devices:
            weights[irqfd] = IRQFD_WEIGHT
        if pools.pit and pools.style == "full":
            weights[pit] = PIT_WEIGHT
        one = rng.choices(list(weights), list(weights.values()))[0]
        pools.planned = list(one(rng, machine, pools))
    return pools.planned.pop(0)
