"""Random machines, random operations on them, and one way to apply an operation to anything with Machine's face.

Models: nothing. An operation is a plain tuple, so that a failing sequence can be printed and replayed. Values are
drawn where they matter (IDs that exist, aliases, broadcasts, reserved bits), not uniformly.
"""

from __future__ import annotations

import os
import random
import struct
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from hypothesis import strategies as st

import oracle
import oracle_apic
from fastexit import regs as r

ID_POOL = (0, 1, 2, 3, 7, 8, 15, 16, 17, 18, 31, 127, 254, 255, 256, 257, 271, 272, 300, 511, 1023, 4080, 4094, 4095)
VECTORS = (0, 1, 15, 16, 0x1F, 0x20, 0x2F, 0x31, 0x41, 0x80, 0x81, 0xEC, 0xF0, 0xFB, 0xFC, 0xFD, 0xFE, 0xFF)
X2APIC_MSRS = tuple(range(r.MSR_X2APIC_BASE, r.MSR_X2APIC_BASE + 0x48))
WRITABLE_OFFSETS = (
    r.APIC_TASKPRI,
    r.APIC_EOI,
    r.APIC_SPIV,
    r.APIC_ESR,
    *oracle_apic.LVTS,
    r.APIC_TMICT,
    r.APIC_TDCR,
    r.APIC_SELF_IPI,
)
XAPIC_OFFSETS = (r.APIC_ID, r.APIC_LDR, r.APIC_DFR, r.APIC_ICR2, *WRITABLE_OFFSETS)

JIT = os.environ.get("NUMBA_DISABLE_JIT", "0") in ("", "0")
"""Without the JIT a kernel costs some hundred times more, so tests take fewer examples."""

LONG_COUNTS = (0, 0xFFFF_FFFF)
FAR_DEADLINE = 1 << 52
"""So far away that nobody gets there, and not so far that the kernel's 64 bits overflow into something near."""

GUEST_OPS = ("guest_wrmsr", "guest_rdmsr", "mmio_write", "mmio_read", "hlt", "host_interrupt", "hypercall")
"""Operations that a vCPU carries out itself."""

Op = tuple[Any, ...]


@dataclass(frozen=True)
class Config:
    """What a machine is built from; the names are Machine's keywords."""

    apic_ids: tuple[int, ...]
    kernel: str = "6.18"
    vendor: str = "vmx"
    apicv: bool = False
    irqchip: str = "full"
    x2apic_api: int = 0
    x2apic: bool = True
    tsc_deadline: bool = True
    boot_cpu_id: int = 0
    disable_quirks: int = 0
    vector_hashing: bool = True
    smm: bool = False
    hv_timer: bool = False
    pi_inject_timer: bool = False
    disable_exits: int = 0
    tsc_khz: int = 1_000_000
    bus_cycle_ns: int = 1
    min_timer_period_us: int = 200

    def build(self, factory: Callable[..., Any]) -> Any:
        return factory(**(asdict(self) | {"apic_ids": list(self.apic_ids)}))


def random_ids(rng: random.Random, least: int, most: int) -> tuple[int, ...]:
    """Distinct IDs in random creation order, mostly with the boot CPU among them."""
    ids = rng.sample(ID_POOL, rng.randint(least, most))
    if rng.random() < 0.9 and 0 not in ids:
        ids[rng.randrange(len(ids))] = 0
    return tuple(ids)


def random_config(rng: random.Random, *, least: int = 2, most: int = 6, **fixed: Any) -> Config:
    """A machine of any generation, vendor and set of capabilities; ``fixed`` pins some of them."""
    drawn: dict[str, Any] = {
        "apic_ids": random_ids(rng, least, most),
        "kernel": rng.choice(oracle.KERNELS),
        "vendor": rng.choice(("vmx", "svm")),
        "apicv": rng.random() < 0.5,
        "irqchip": rng.choice(("full", "split")),
        "x2apic_api": rng.randrange(4) | (r.X2API_NO_SUPPRESS_EOI if rng.random() < 0.1 else 0),
        "x2apic": rng.random() < 0.9,
        "tsc_deadline": rng.random() < 0.7,
        "disable_quirks": rng.choice((0, 0, 0, r.QUIRK_LINT0_REENABLED)),
    }
    if chance(rng, 0.1):
        drawn["boot_cpu_id"] = rng.choice((fixed | drawn)["apic_ids"])
    return Config(**(drawn | fixed))


configs: st.SearchStrategy[Config] = st.builds(
    Config,
    apic_ids=st.lists(st.sampled_from(ID_POOL), min_size=1, max_size=6, unique=True).map(tuple),
    kernel=st.sampled_from(oracle.KERNELS),
    vendor=st.sampled_from(("vmx", "svm")),
    apicv=st.booleans(),
    irqchip=st.sampled_from(("full", "split")),
    x2apic_api=st.integers(0, 3),
    x2apic=st.booleans(),
    tsc_deadline=st.booleans(),
)
"""The same machines, for tests that want hypothesis to shrink them."""

seeds: st.SearchStrategy[int] = st.integers(0, 2**32 - 1)
"""Seeds for the generators below: a seed per example costs hypothesis far less than a draw per operation."""


# ------------------------------------------------------------------------------------------------------------- values


def chance(rng: random.Random, probability: float) -> bool:
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
    return rng.choice(VECTORS) if chance(rng, 0.7) else rng.randrange(256)


def delivery_mode(rng: random.Random) -> int:
    return rng.choices(range(8), (45, 20, 4, 5, 8, 6, 7, 3))[0]


def destination(rng: random.Random, machine: oracle.Machine) -> int:
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
        return target.reg(r.APIC_LDR) >> r.XAPIC_DEST_SHIFT
    if kind == 7:
        return rng.choice((r.XAPIC_BROADCAST, r.X2APIC_BROADCAST))
    if kind == 8:
        return rng.getrandbits(8)
    return rng.choice((rng.getrandbits(32), target.id + 1, target.id | 0x100, 256 * 16))


def icr_low(rng: random.Random) -> int:
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


def icr(rng: random.Random, machine: oracle.Machine) -> int:
    """An x2APIC ICR value of any class."""
    return destination(rng, machine) << r.ICR_DEST_SHIFT | icr_low(rng)


def apic_base(rng: random.Random, vcpu: oracle_apic.Vcpu) -> int:
    value = vcpu.apic_base & ~(r.APICBASE_EN | r.APICBASE_EXTD)
    value |= rng.choices((0, r.APICBASE_EN, r.APICBASE_EN | r.APICBASE_EXTD, r.APICBASE_EXTD), (1, 4, 6, 0.3))[0]
    if chance(rng, 0.1):
        value ^= r.APICBASE_BSP
    if chance(rng, 0.05):
        value |= 1 << rng.randrange(64)
    return value


def register_value(rng: random.Random, offset: int) -> int:
    if offset == r.APIC_SPIV and chance(rng, 0.8):
        return word32(rng) | r.SVR_ENABLE
    if offset == r.APIC_ESR and chance(rng, 0.5):
        return 0
    if offset == r.APIC_SELF_IPI and chance(rng, 0.9):
        return vector(rng)
    if offset == r.APIC_TASKPRI:
        return vector(rng) if chance(rng, 0.8) else 0
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


def msi_address(rng: random.Random, machine: oracle.Machine) -> int:
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


def lapic_page(rng: random.Random, vcpu: oracle_apic.Vcpu, *, timer: bool = True) -> bytes:
    """A page to set: the current one with registers changed, believable or not; without ``timer`` none gets armed."""
    page = dict(zip(range(0, r.LAPIC_PAGE_BYTES, 4), struct.unpack("<256I", vcpu.get_lapic())))
    if chance(rng, 0.03):
        page = {offset: rng.getrandbits(32) for offset in page}
    for _ in range(rng.randrange(1, 6)):
        if chance(rng, 0.25):
            offset = rng.choice(sorted(oracle_apic.BITMAP_OFFSETS))
            page[offset] = rng.choice((0, 1 << rng.randrange(32), rng.getrandbits(32) & rng.getrandbits(32)))
        elif chance(rng, 0.08):
            page[rng.randrange(256) * 4] = word32(rng)
        else:
            offset = rng.choice((*XAPIC_OFFSETS, r.APIC_ICR, r.APIC_PROCPRI, r.APIC_SPIV, r.APIC_LDR))
            page[offset] = register_value(rng, offset)
    if chance(rng, 0.8):
        page[r.APIC_SPIV] |= r.SVR_ENABLE
    if vcpu.x2apic and chance(rng, 0.85):
        page[r.APIC_ID] = vcpu.id
    page[r.APIC_TMCCT] = 0
    if not timer:
        page[r.APIC_TMICT] = 0
    return struct.pack("<256I", *page.values())


# --------------------------------------------------------------------------------------------------------- operations


def setup_ops(rng: random.Random, machine: oracle.Machine) -> list[Op]:
    """Brings each vCPU into one of the modes: x2APIC, xAPIC, software-disabled, hardware-disabled."""
    ops: list[Op] = []
    whole_x2apic = chance(rng, 0.4) and machine.x2apic
    for i, vcpu in enumerate(machine.vcpus):
        mode = rng.choices(("x2apic", "xapic", "off"), (5, 4, 1))[0]
        if whole_x2apic or (mode == "x2apic" and machine.x2apic):
            ops.append(("set_msr", i, r.MSR_APICBASE, vcpu.apic_base | r.APICBASE_EN | r.APICBASE_EXTD))
            if whole_x2apic or chance(rng, 0.85):
                ops.append(("set_msr", i, r.MSR_X2APIC_BASE + (r.APIC_SPIV >> 4), 0x1FF))
        elif mode == "off":
            ops.append(("set_msr", i, r.MSR_APICBASE, vcpu.apic_base & ~r.APICBASE_EN))
        else:
            page = bytearray(vcpu.get_lapic())
            spiv = 0x1FF if chance(rng, 0.9) else 0xFF
            struct.pack_into("<I", page, r.APIC_SPIV, spiv)
            struct.pack_into("<I", page, r.APIC_LDR, (1 << i % 8) << 24)
            if chance(rng, 0.2):
                struct.pack_into("<I", page, r.APIC_DFR, r.DFR_CLUSTER)
            ops.append(("set_lapic", i, bytes(page)))
    return ops


def host_op(rng: random.Random, machine: oracle.Machine, *, timer: bool = True) -> Op:
    """One operation that ioctls can carry out.

    With ``timer`` clocks may run out: right where nobody enters the guest, which is where a tick becomes an interrupt.
    """
    i = rng.randrange(len(machine.vcpus))
    vcpu = machine.vcpus[i]
    kind = rng.random()
    if kind < 0.40:
        return ("set_msr", i, r.MSR_X2APIC_ICR, icr(rng, machine))
    if kind < 0.55:
        offset = rng.choice(WRITABLE_OFFSETS)
        high = rng.getrandbits(32) << 32 if chance(rng, 0.03) else 0
        if offset == r.APIC_TMICT and not timer:
            return ("set_msr", i, r.MSR_X2APIC_BASE + (offset >> 4), rng.choice(LONG_COUNTS))
        return ("set_msr", i, r.MSR_X2APIC_BASE + (offset >> 4), register_value(rng, offset) | high)
    if kind < 0.60:
        msr = rng.choice(X2APIC_MSRS) if chance(rng, 0.95) else rng.randrange(r.MSR_X2APIC_BASE, r.MSR_X2APIC_END + 1)
        value = word32(rng)
        if msr == r.MSR_X2APIC_BASE + (r.APIC_TMICT >> 4) and not timer:
            value = rng.choice(LONG_COUNTS)
        return ("set_msr", i, msr, value)
    if kind < 0.70:
        return ("get_msr", i, rng.choice((*X2APIC_MSRS, r.MSR_APICBASE, r.MSR_TSC_DEADLINE, r.MSR_X2APIC_ICR)))
    if kind < 0.76:
        return ("set_msr", i, r.MSR_APICBASE, apic_base(rng, vcpu))
    if kind < 0.88:
        return (
            "signal_msi",
            msi_address(rng, machine),
            vector(rng) | delivery_mode(rng) << 8 | rng.choice((0, 0, 0x8000)),
        )
    if kind < 0.94:
        return ("set_lapic", i, lapic_page(rng, vcpu, timer=timer))
    if kind < 0.97:
        return ("get_mp_state", i)
    if kind < 0.985:
        return ("events", i)
    # a deadline that has passed or is far away: what lies between would depend on when it is looked at
    return ("set_msr", i, r.MSR_TSC_DEADLINE, rng.choice((0, 1, FAR_DEADLINE) if timer else (0, FAR_DEADLINE)))


def set_events_op(rng: random.Random, machine: oracle.Machine) -> Op:
    """KVM_SET_VCPU_EVENTS; None leaves out the flag that makes a field count."""
    return (
        "set_events",
        rng.randrange(len(machine.vcpus)),
        rng.choice((None, 0, 1, 2, 3)),
        chance(rng, 0.3),
        rng.choice((None, rng.randrange(256))),
        rng.choice((None, None, False, True)),
    )


def set_sregs_op(rng: random.Random, machine: oracle.Machine) -> Op:
    """KVM_SET_SREGS, the two words of it that concern the APIC."""
    i = rng.randrange(len(machine.vcpus))
    vcpu = machine.vcpus[i]
    base = vcpu.apic_base if chance(rng, 0.5) else apic_base(rng, vcpu)
    return ("set_sregs", i, base, rng.randrange(16) if chance(rng, 0.9) else rng.randrange(256))


def set_mp_state_op(rng: random.Random, machine: oracle.Machine) -> Op:
    return ("set_mp_state", rng.randrange(len(machine.vcpus)), rng.randrange(5))


def look_op(rng: random.Random, machine: oracle.Machine) -> Op:
    return (rng.choice(("cr8", "cs", "events", "get_mp_state")), rng.randrange(len(machine.vcpus)))


USER_OPS: dict[str, Callable[[random.Random, oracle.Machine], Op]] = {
    "set_events": set_events_op,
    "set_sregs": set_sregs_op,
    "set_mp_state": set_mp_state_op,
    "look": look_op,
}
"""What user space does to a vCPU beside its APIC."""


def user_op(rng: random.Random, machine: oracle.Machine, names: Sequence[str] = tuple(USER_OPS)) -> Op:
    return USER_OPS[rng.choice(names)](rng, machine)


def guest_op(rng: random.Random, machine: oracle.Machine, *, timer: bool = True) -> Op:
    """One operation, host or guest."""
    i = rng.randrange(len(machine.vcpus))
    vcpu = machine.vcpus[i]
    kind = rng.random()
    if kind < 0.40:
        op = host_op(rng, machine, timer=timer)
        return ("guest_wrmsr", *op[1:]) if op[0] == "set_msr" and chance(rng, 0.6) else op
    if kind < 0.55 and not vcpu.x2apic:
        return ("mmio_write", i, r.APIC_ICR, icr_low(rng), 4)
    if kind < 0.55:
        return ("guest_wrmsr", i, r.MSR_X2APIC_ICR, icr(rng, machine))
    if kind < 0.75:
        offset = rng.choice(XAPIC_OFFSETS)
        value = register_value(rng, offset)
        if offset == r.APIC_TMICT and not timer:
            value = rng.choice(LONG_COUNTS)
        elif chance(rng, 0.05):
            length = rng.choice((1, 2, 4))
            return ("mmio_write", i, rng.randrange(0x1000), value & (1 << 8 * length) - 1, length)
        return ("mmio_write", i, offset, value, 4)
    if kind < 0.80:
        offset = rng.choice(sorted(oracle_apic.READABLE_IN_XAPIC)) + rng.choice((0, 0, 0, 1, 2, 3))
        return ("mmio_read", i, offset if chance(rng, 0.9) else rng.randrange(0x1000), rng.choice((4, 4, 1, 2)))
    if kind < 0.87:
        return ("pending", i)
    if kind < 0.94:
        return ("ack", i)
    return ("eoi", i)


# ----------------------------------------------------------------------------------------------- time and the run loop

LVTT_MSR = r.MSR_X2APIC_BASE + (r.APIC_LVTT >> 4)
TIMER_MODES = (r.TIMER_ONE_SHOT, r.TIMER_PERIODIC, r.TIMER_DEADLINE, r.TIMER_DEADLINE, 0x60000)


def write_op(rng: random.Random, machine: oracle.Machine, i: int, offset: int, value: int) -> Op:
    """A guest's or user space's write of a register, in whichever way the APIC's mode has."""
    if not machine.vcpus[i].x2apic:
        return ("mmio_write", i, offset, value, 4)
    name = "guest_wrmsr" if chance(rng, 0.6) else "set_msr"
    return (name, i, r.MSR_X2APIC_BASE + (offset >> 4), value)


def timer_op(rng: random.Random, machine: oracle.Machine) -> Op:
    """Something that concerns the timer of a vCPU: counts and deadlines of any length, all modes, whole pages."""
    i = rng.randrange(len(machine.vcpus))
    kind = rng.random()
    if kind < 0.25:
        count = rng.choice((0, 1, 7, 1000, 150_000, 400_000, 3_000_000, 0xFFFF_FFFF, rng.getrandbits(32)))
        return write_op(rng, machine, i, r.APIC_TMICT, count)
    if kind < 0.5:
        masked = r.LVT_MASKED if chance(rng, 0.25) else 0
        return write_op(rng, machine, i, r.APIC_LVTT, rng.choice(TIMER_MODES) | masked | rng.randrange(16, 256))
    if kind < 0.6:
        return write_op(rng, machine, i, r.APIC_TDCR, rng.choice((0, 1, 2, 3, 8, 9, 10, 11)))
    if kind < 0.85:
        ahead = rng.choice((1, 500, 40_000, 1_000_000, 1 << 31, 1 << 40))
        value = rng.choice((0, 1, machine.tsc(), *[machine.tsc() + ahead] * 4))
        return ("guest_wrmsr" if chance(rng, 0.7) else "set_msr", i, r.MSR_TSC_DEADLINE, value)
    if kind < 0.9:
        return write_op(rng, machine, i, r.APIC_SPIV, rng.choice((0x1FF, 0x1FF, 0xFF)))
    page = bytearray(machine.vcpus[i].get_lapic())
    struct.pack_into("<I", page, r.APIC_LVTT, rng.choice(TIMER_MODES) | rng.randrange(16, 256))
    for offset in (r.APIC_TMICT, r.APIC_TMCCT):
        struct.pack_into("<I", page, offset, rng.choice((0, 5, 100_000, 1_000_000, 0xFFFF_FFFF)))
    struct.pack_into("<I", page, r.APIC_TDCR, rng.choice((0, 3, 11)))
    return ("set_lapic", i, bytes(page))


def set_time_op(rng: random.Random, machine: oracle.Machine) -> Op:
    """The clock goes on: a little, to where the next timer is due or just before, or far behind it."""
    after = machine.next_timer()
    steps = [machine.now + rng.choice((0, 1, 50, 1000, 90_000, 250_000, 5_000_000))] * 2
    if after is not None and after < machine.now + 10_000_000_000:
        steps += [max(machine.now, after + late) for late in (-1, 0, 0, 1, 1_000_000)]
    return ("set_time", rng.choice(steps))


def exit_op(rng: random.Random, machine: oracle.Machine) -> Op:
    """An exit that concerns no register."""
    return (rng.choice(("host_interrupt", "host_interrupt", "hlt")), rng.randrange(len(machine.vcpus)))


def run_op(rng: random.Random, machine: oracle.Machine) -> Op:
    return run_of(machine, rng.randrange(len(machine.vcpus)))


def run_of(machine: oracle.Machine, i: int) -> Op:
    """KVM_RUN; not of a vCPU that waits for SIPI with an NMI in hand, whose thread would go round and round."""
    vcpu = machine.vcpus[i]
    if vcpu.mp_state in (r.MP_INIT_RECEIVED, r.MP_UNINITIALIZED) and vcpu.thread.runnable():
        return ("set_mp_state", i, r.MP_RUNNABLE)
    return ("run", i)


def hypercall_op(rng: random.Random, machine: oracle.Machine) -> Op:
    """A paravirtual IPI or kick, or another hypercall."""
    i = rng.randrange(len(machine.vcpus))
    target = rng.choice(machine.vcpus).id
    number = rng.choice((r.HC_SEND_IPI, r.HC_SEND_IPI, r.HC_SEND_IPI, r.HC_KICK_CPU, r.HC_VAPIC_POLL_IRQ, 77))
    if number == r.HC_KICK_CPU:
        return ("hypercall", i, number, 0, target, 0, 0, chance(rng, 0.8))
    icr = icr_low(rng) & ~(r.ICR_SHORTHAND | r.ICR_LOGICAL) | rng.choice((0, 0, 0, r.ICR_LOGICAL, 1 << 18))
    least = rng.choice((0, max(0, target - rng.randrange(128)), 0xFFFF_FFC0, 0xFFFF_FFE0, rng.getrandbits(64)))
    bitmaps = [rng.getrandbits(64) & rng.getrandbits(64) | 1 << rng.randrange(64) for _ in range(2)]
    return ("hypercall", i, number, *bitmaps, least, icr, chance(rng, 0.8))


def extint_op(rng: random.Random, machine: oracle.Machine) -> Op:
    """KVM_INTERRUPT, where it is not refused."""
    i = rng.randrange(len(machine.vcpus))
    if not machine.split_irqchip or machine.vcpus[i].extint is not None:
        return ("pending", i)
    return ("interrupt", i, rng.randrange(16, 256))


def switch_op(rng: random.Random, machine: oracle.Machine) -> Op:
    """What the guest's CPU is in or not: VMX operation, GIF, NMIs masked, interrupts on, system management mode."""
    i = rng.randrange(len(machine.vcpus))
    vcpu = machine.vcpus[i]
    if vcpu.smm and chance(rng, 0.7):
        return ("rsm", i)
    switches = ["nmi_masked", "gif" if machine.svm else "vmxon"] + ["interrupts"] * (not machine.apicv)
    return (rng.choice(switches), i, chance(rng, 0.5))


def local_op(rng: random.Random, machine: oracle.Machine) -> Op:
    """A local source signals its LVT entry."""
    return ("local_interrupt", rng.randrange(len(machine.vcpus)), rng.choice(oracle_apic.LVTS[1:]))


def ioapic_op(rng: random.Random, machine: oracle.Machine) -> Op:
    vcpu = rng.choice(machine.vcpus)
    vectors = {*rng.sample(range(256), 20), *vcpu.irr, *vcpu.isr} if chance(rng, 0.8) else set()
    return ("ioapic_handled", vcpu.index, tuple(sorted(vectors)))


def filter_op(rng: random.Random, machine: oracle.Machine) -> Op:
    """KVM_X86_SET_MSR_FILTER and KVM_CAP_X86_USER_SPACE_MSR together."""
    ranges = [
        (rng.randrange(1, 4), first, 8, rng.getrandbits(8))
        for first in rng.sample((0x18, 0x1B, 0x6DC, 0x6E0, 0x800, 0x830), rng.randrange(4))
    ]
    return ("msr_filter", bool(ranges) and chance(rng, 0.3), tuple(ranges), rng.randrange(8))


def odd_msr_op(rng: random.Random, machine: oracle.Machine) -> Op:
    """An access that a filter or user space may have an interest in; or the answer to one that waits."""
    waiting = [v.index for v in machine.vcpus if v.thread.msr_asked]
    if waiting and chance(rng, 0.7):
        return ("complete_msr", rng.choice(waiting), chance(rng, 0.4))
    i = rng.randrange(len(machine.vcpus))
    msr = rng.choice((r.MSR_TSC_DEADLINE, r.MSR_APICBASE, r.MSR_X2APIC_ICR, 0x808, 0x805, 0x8FF))
    if chance(rng, 0.3):
        return ("guest_rdmsr", i, msr)
    return ("guest_wrmsr", i, msr, apic_base(rng, machine.vcpus[i]) if msr == r.MSR_APICBASE else word32(rng))


LIVELY_OPS: dict[str, tuple[float, Callable[[random.Random, oracle.Machine], Op]]] = {
    "registers": (4, guest_op),
    "timers": (4, timer_op),
    "time": (2, set_time_op),
    "exits": (1, exit_op),
    "runs": (1, run_op),
    "hypercalls": (1, hypercall_op),
    "events": (0.5, set_events_op),
    "sregs": (0.5, set_sregs_op),
    "states": (0.3, set_mp_state_op),
    "switches": (0.7, switch_op),
    "locals": (0.5, local_op),
    "extints": (0.3, extint_op),
    "ioapic": (0.3, ioapic_op),
    "filters": (0.2, filter_op),
    "odd MSRs": (1, odd_msr_op),
}
"""What a machine's life is made of, with weights; a test names what it wants."""


def lively_op(rng: random.Random, machine: oracle.Machine, names: Sequence[str] = tuple(LIVELY_OPS)) -> Op:
    weights = [LIVELY_OPS[name][0] for name in names]
    op = LIVELY_OPS[rng.choices(names, weights)[0]][1](rng, machine)
    if op[0] in GUEST_OPS and machine.vcpus[op[1]].thread.msr_asked:
        return ("complete_msr", op[1], chance(rng, 0.4))  # the access comes first
    if op[0] in GUEST_OPS and machine.vcpus[op[1]].mp_state != r.MP_RUNNABLE:
        # who waits or sleeps carries out nothing
        return run_of(machine, op[1]) if chance(rng, 0.5) else ("set_mp_state", op[1], r.MP_RUNNABLE)
    return op


def apply(machine: Any, op: Op) -> Any:
    """Carries out one operation on an oracle or a real VM; what it returns can be compared between them."""
    name, *args = op
    if name == "set_time":
        machine.set_time(args[0])
        return None
    if name in ("signal_msi", "add_vcpu"):
        try:
            result = getattr(machine, name)(*args)
        except ValueError:
            return "einval"
        return result if name == "signal_msi" else None
    if name == "msr_filter":
        default_deny, ranges, machine.user_space_msr = args
        machine.set_msr_filter(
            default_deny,
            [(flags, first, [bits >> n & 1 for n in range(count)]) for flags, first, count, bits in ranges],
        )
        return None
    vcpu = machine.vcpus[args[0]]
    if name in SWITCHES:
        return switch(vcpu, name, args[1])
    if name == "complete_msr":
        return vcpu.complete_msr(error=args[1])
    if name == "set_lapic":
        try:
            vcpu.set_lapic(args[1])
        except ValueError:
            return "einval"
        return None
    if name in ("cr8", "cs"):
        return getattr(vcpu, name)
    if name == "set_events":
        nmi_pending, nmi_masked, sipi_vector, latched_init = args[1:]
        more = {} if latched_init is None else {"smm": False, "latched_init": latched_init}
        return vcpu.set_events(nmi_pending=nmi_pending, nmi_masked=nmi_masked, sipi_vector=sipi_vector, **more)
    try:
        if name == "set_sregs":
            return vcpu.set_sregs(apic_base=args[1], cr8=args[2])
        result = getattr(vcpu, name)(*args[1:])
    except ValueError:
        return "einval"
    if name == "events":
        return result.nmi_pending, result.latched_init
    return result


SWITCHES = ("nmi_masked", "gif", "vmxon", "interrupts", "ioapic_handled")


def switch(vcpu: Any, name: str, value: Any) -> None:
    """Sets an attribute while the vCPU is out of the guest, as if user space had; the next entry looks at events."""
    vcpu.get_msr(r.MSR_APICBASE)
    if name == "interrupts":
        vcpu.rflags = r.RFLAGS_FIXED | r.RFLAGS_IF * value
    else:
        setattr(vcpu, name, set(value) if name == "ioapic_handled" else value)
    vcpu.set_events(nmi_masked=vcpu.nmi_masked)


def masked(page: bytes) -> bytes:
    """A register page without the one register that depends on the time of day."""
    return page[: r.APIC_TMCCT] + bytes(4) + page[r.APIC_TMCCT + 4 :]


def differences(expected: bytes, got: bytes) -> str:
    """The dwords in which two pages differ, in words."""
    dwords = zip(range(0, r.LAPIC_PAGE_BYTES, 4), struct.unpack("<256I", expected), struct.unpack("<256I", got))
    return ", ".join(f"{oracle_apic.register_name(o)}: expected {e:#x}, got {g:#x}" for o, e, g in dwords if e != g)


def story(config: Config, history: list[Op]) -> str:
    """How a machine came to be what it is: enough to replay it, pages reduced to their non-zero dwords."""
    return "\n".join((f"{config}", *(describe(op) for op in history)))


def describe(op: Op) -> str:
    """One operation, readable."""
    shown = []
    for argument in op[1:]:
        if isinstance(argument, bytes):
            dwords = zip(range(0, r.LAPIC_PAGE_BYTES, 4), struct.unpack("<256I", argument))
            shown.append("{" + " ".join(f"{o:x}:{value:x}" for o, value in dwords if value) + "}")
        else:
            shown.append(f"{argument:#x}" if isinstance(argument, int) and argument > 9 else str(argument))
    return f"{op[0]} " + " ".join(shown)
