"""Random operations of Windows guests and of the user space beside them.

Models: nothing. Vectors, SINTs and pages come from small pools of each machine's own, so that operations meet: two
SINTs with one vector, an IPI with the vector of an auto-EOI SINT, messages in a slot that is taken.
"""

from __future__ import annotations

import random
import struct
from collections.abc import Iterator
from typing import TYPE_CHECKING

from fastexit import hyperv as hv
from fastexit import layout as L
from fastexit import regs as r
from fastexit.hyperv import HvCall
from fastexit.kvm.lab import hvguest as G
from fastexit.kvm.operations import Op
from fastexit.kvm.values import chance, destination, xapic_destination

if TYPE_CHECKING:
    from fastexit.kvm.lab.hyperv import HypervTwins

SYNTHETIC_ICR, SYNTHETIC_EOI, SYNTHETIC_TPR = hv.MSR_HV_ICR, hv.MSR_HV_EOI, hv.MSR_HV_TPR
BOTH = r.APICBASE_EN | r.APICBASE_EXTD
TICKS = 10_000_000
"""100 ns units a second."""
FAR = 1 << 50
"""A count that nobody lives to see."""
REST_NS = (300_000_000, 1_700_000_000, 3_100_000_000, 6_300_000_000, 12_900_000_000)
MARGIN_NS = 700_000_000
"""How far from the end of a rest no timer is due: the model's clock and the kernel's differ by less."""
UNREADABLE = (G.MEMORY_BYTES, G.MEMORY_BYTES + 0x1000, 0xFEE0_0000, 1 << 32, (1 << 45) + 0x3000, 0xFFFF_FFFF_FFFF_F000)
REFUSED = (0x4000_0004, 0x4000_0024, 0x4000_0085, 0x4000_00A0, 0x4000_00B8, 0x4000_00F0, 0x4000_0074)
READ_ONLY = (hv.MSR_HV_VP_INDEX, hv.MSR_HV_VP_RUNTIME, hv.MSR_HV_TIME_REF_COUNT, hv.MSR_HV_TSC_FREQUENCY)
OF_THE_VM = (
    hv.MSR_HV_RESET,
    hv.MSR_HV_RESET,
    *range(hv.MSR_HV_CRASH_P0, hv.MSR_HV_CRASH_CTL + 1),
    *range(hv.MSR_HV_REENLIGHTENMENT_CONTROL, hv.MSR_HV_TSC_EMULATION_STATUS + 1),
    hv.MSR_HV_TSC_INVARIANT_CONTROL,
    *range(0x4000_00F1, 0x4000_0100),
)
ALL_MSRS = (
    *OF_THE_VM,
    *range(hv.MSR_HV_GUEST_OS_ID, hv.MSR_HV_VP_INDEX + 1),
    *READ_ONLY[1:],
    hv.MSR_HV_APIC_FREQUENCY,
    hv.MSR_HV_REFERENCE_TSC,
    *range(hv.MSR_HV_EOI, hv.MSR_HV_VP_ASSIST_PAGE + 1),
    *range(hv.MSR_HV_SCONTROL, hv.MSR_HV_EOM + 1),
    *range(hv.MSR_HV_SINT0, hv.MSR_HV_SINT15 + 1),
    *range(hv.MSR_HV_STIMER0_CONFIG, hv.MSR_HV_STIMER3_COUNT + 1),
    *REFUSED,
)
MODES = (r.DM_FIXED, r.DM_LOWEST, r.DM_REMRD, r.DM_EXTINT, r.DM_NMI, r.DM_INIT, r.DM_STARTUP)
EVENTFDS = 3
CALLS = (0x0000, 0x0001, 0x0012, 0x0016, 0x0050, 0x0069, 0x006A, 0x006B, 0x00FF, 0x8000, 0x8042, 0xFFFF)
GSIS = 24


class Pools:
    """What one machine's operations draw from."""

    def __init__(self, rng: random.Random) -> None:
        self.vectors: list[int] = rng.sample(
            (0x10, 0x1F, 0x20, 0x31, 0x41, 0x42, 0x50, 0x5F, 0x80, 0x81, 0xE0, 0xF3, 0xFF), 6
        )
        self.sints: list[int] = rng.sample(range(16), 5)
        self.page_of: list[int] = rng.sample(range(8), 8)
        self.connections: list[int] = [0, 1, rng.randrange(1 << 24), 0xFF_FFFF]


def page(rng: random.Random, most: float = 0.85) -> int:
    """A page of the data, now and then one that is not there."""
    return G.DATA_AT + rng.randrange(8) * 0x1000 if chance(rng, most) else rng.choice(UNREADABLE)


def page_msr(rng: random.Random, on: float = 0.8) -> int:
    """A page's MSR: frame, bit 0, and now and then bits between."""
    value = page(rng) | chance(rng, on)
    return value | rng.getrandbits(12) & 0xFFE if chance(rng, 0.15) else value


def vector(rng: random.Random, pools: Pools) -> int:
    """Mostly one of the machine's few."""
    return rng.choice(pools.vectors) if chance(rng, 0.9) else rng.choice((0, 1, 15, 16, 0xFE, rng.randrange(256)))


def sint(rng: random.Random, pools: Pools) -> int:
    """Mostly one of the machine's few."""
    return rng.choice(pools.sints) if chance(rng, 0.85) else rng.randrange(16)


def sint_value(rng: random.Random, pools: Pools) -> int:
    """Vector, masked, auto-EOI, polling, bits that nobody knows."""
    value = vector(rng, pools)
    if chance(rng, 0.2):
        value |= hv.HV_SINT_MASKED
    if chance(rng, 0.35):
        value |= hv.HV_SINT_AUTO_EOI
    if chance(rng, 0.1):
        value |= hv.HV_SINT_POLLING
    if chance(rng, 0.08):
        value |= rng.getrandbits(64) & ~0x300FF
    return value


def icr(rng: random.Random, m: HypervTwins) -> int:
    """An ICR of any delivery mode but SMI, for which guests have no memory; its destination for the mode of whoever
    writes it, or for the other one.
    """
    low = vector(rng, m.pools) | rng.choices(MODES, (80, 16, 4, 4, 8, 2, 6))[0] << 8
    if chance(rng, 0.35):
        low |= r.ICR_LOGICAL
    if chance(rng, 0.4):
        low |= r.ICR_LEVEL
    if chance(rng, 0.1):
        low |= r.ICR_TRIGGER
    if chance(rng, 0.3):
        low |= rng.randrange(1, 4) << r.ICR_SHORTHAND_SHIFT
    if chance(rng, 0.06):
        low |= r.ICR_BUSY
    if chance(rng, 0.05):
        low |= 1 << rng.choice((13, 16, 17, 20, 31))
    if chance(rng, 0.5):
        return destination(rng, m) << 32 | low
    high = xapic_destination(rng, m) << 56
    return high | (rng.getrandbits(24) << 32 if chance(rng, 0.2) else 0) | low


def stimer(m: HypervTwins, i: int, n: int) -> tuple[int, int]:
    """CONFIG and COUNT of a timer as they are."""
    row = L.HV + L.HV_STRIDE * i + L.HV_STIMER + L.STIMER_STRIDE * n
    return m.model.mem[row + L.STIMER_CONFIG], m.model.mem[row + L.STIMER_COUNT]


def config_value(rng: random.Random, m: HypervTwins, i: int, n: int) -> int:
    """CONFIG: never a period that is over in no time."""
    _, count = stimer(m, i, n)
    value = chance(rng, 0.6) | vector(rng, m.pools) << hv.HV_STIMER_VECTOR_SHIFT
    value |= sint(rng, m.pools) << hv.HV_STIMER_SINT_SHIFT if chance(rng, 0.9) else 0
    for bit, likely in ((hv.HV_STIMER_PERIODIC, 0.35), (hv.HV_STIMER_AUTO_ENABLE, 0.4), (hv.HV_STIMER_DIRECT, 0.35)):
        value |= bit if chance(rng, likely) else 0
    if chance(rng, 0.1):
        value |= rng.choice((hv.HV_STIMER_LAZY, 1 << 13, 1 << 20, 1 << 63))
    if count and count < TICKS:
        value &= ~hv.HV_STIMER_PERIODIC
    return value


def count_value(rng: random.Random, m: HypervTwins, i: int, n: int) -> int:
    """COUNT: long ago, in some seconds, never; a period of seconds."""
    config, _ = stimer(m, i, n)
    seconds = rng.randrange(2, 20) * TICKS + rng.randrange(TICKS)
    if config & hv.HV_STIMER_PERIODIC:
        return rng.choice((0, FAR, seconds, seconds, seconds))
    now = m.model.time // 100
    return rng.choice((0, 1, 1, 1000, FAR, now + seconds, now + seconds))


def msr_and_value(rng: random.Random, m: HypervTwins, i: int) -> tuple[int, int]:
    """A synthetic MSR with a value that means something to it."""
    kind = rng.random()
    if kind < 0.18:
        return hv.MSR_HV_SINT0 + sint(rng, m.pools), sint_value(rng, m.pools)
    if kind < 0.29:
        n = rng.randrange(4)
        return hv.MSR_HV_STIMER0_CONFIG + 2 * n, config_value(rng, m, i, n)
    if kind < 0.40:
        n = rng.randrange(4)
        return hv.MSR_HV_STIMER0_CONFIG + 2 * n + 1, count_value(rng, m, i, n)
    if kind < 0.54:
        return SYNTHETIC_ICR, icr(rng, m)
    if kind < 0.62:
        return SYNTHETIC_EOI, wide(rng, rng.choice((0, 0, 0, 1, 0xFFFF_FFFF)))
    if kind < 0.68:
        low = rng.choice((0, 0, 0x10, 0x40, 0x50, 0x80, 0x1F0, 0x45, rng.getrandbits(32)))
        return SYNTHETIC_TPR, wide(rng, low)
    if kind < 0.75:
        return hv.MSR_HV_VP_ASSIST_PAGE, page_msr(rng)
    if kind < 0.80:
        return hv.MSR_HV_SIMP, page_msr(rng)
    if kind < 0.83:
        return hv.MSR_HV_SIEFP, page_msr(rng)
    if kind < 0.87:
        return hv.MSR_HV_EOM, rng.choice((0, 0, 1, rng.getrandbits(64)))
    if kind < 0.90:
        return hv.MSR_HV_SCONTROL, rng.choice((0, 1, 1, 2, rng.getrandbits(64)))
    if kind < 0.92:
        return hv.MSR_HV_GUEST_OS_ID, rng.choice((0, 0x8100_0000_0000, rng.getrandbits(64)))
    if kind < 0.94:
        return hv.MSR_HV_HYPERCALL, page_msr(rng)
    if kind < 0.96:
        return hv.MSR_HV_VP_INDEX, rng.choice((0, 1, 2, 3, 5, 63, 64, 127, 200, 1023, 5000, 20000, 1 << 32, i))
    if kind < 0.965:
        value = rng.choice((0, 0x1000, G.TSC_PAGE, rng.getrandbits(64) & ~1))
        return hv.MSR_HV_REFERENCE_TSC, value
    if kind < 0.985:
        return rng.choice(OF_THE_VM), rng.choice((0, 0, 1, 1 << 63, rng.getrandbits(64)))
    return rng.choice((*READ_ONLY, hv.MSR_HV_SVERSION, *REFUSED, hv.MSR_HV_APIC_FREQUENCY)), rng.choice((0, 1, 0x123))


def by_guest(msr: int, value: int) -> tuple[int, int]:
    """The same, but that no INIT takes away the vCPU that writes it."""
    if msr == SYNTHETIC_ICR and value >> r.ICR_DM_SHIFT & 7 == r.DM_INIT:
        value = value & ~r.ICR_SHORTHAND | r.SH_ALLBUT << r.ICR_SHORTHAND_SHIFT
    return msr, value


def wide(rng: random.Random, value: int) -> int:
    """Now and then with bits that a 32-bit register has no room for."""
    return value | 1 << rng.randrange(32, 64) if chance(rng, 0.08) else value


def hypercall(rng: random.Random, m: HypervTwins, i: int) -> Iterator[Op]:
    """A hypercall, and what it reads."""
    kind = rng.random()
    fast = chance(rng, 0.5)
    var = rep = 0
    xmm = bytes(96)
    number = rng.choice(m.pools.vectors) if chance(rng, 0.8) else rng.choice((0, 5, 15, 16, 255, 256, 0x141, 1 << 31))
    answer = rng.choice((0, 0, 3, 0x11, 1 << 32))
    if kind < 0.42:
        code: int = HvCall.SEND_IPI
        mask = vps(rng)
        high = 1 << rng.randrange(32) if chance(rng, 0.08) else 0
        data = struct.pack("<IIQ", number, high, mask)
        inputs = (number | high << 32, mask)
    elif kind < 0.8:
        code = HvCall.SEND_IPI_EX
        form = rng.choices((0, 1, 2, 1 << 32, rng.getrandbits(64)), (12, 4, 1, 1, 1))[0]
        valid = rng.choices(
            (1, 0, 2, 3, 1 << 63, 6, 1 | 1 << 15, rng.getrandbits(64), (1 << rng.randrange(9, 14)) - 1, (1 << 64) - 1),
            (20, 3, 2, 5, 2, 2, 2, 2, 3, 1),
        )[0]
        var = valid.bit_count()
        if chance(rng, 0.1):
            var = rng.choice((0, 1, 2, 11, 12, var + 1, max(var - 1, 0)))
        banks = [vps(rng) for _ in range(66)]
        data = struct.pack("<IIQQ", number, rng.choice((0, 0, 7)), form, valid) + struct.pack("<66Q", *banks)
        if not chance(rng, 0.2):
            data = data[: 24 + 8 * min(var, 66)]
        inputs = (number | (rng.getrandbits(32) << 32 if chance(rng, 0.2) else 0), form)
        xmm = struct.pack("<12Q", valid, *banks[:11])
    else:
        code = rng.choice(
            (
                HvCall.NOTIFY_LONG_SPIN_WAIT,
                HvCall.NOTIFY_LONG_SPIN_WAIT,
                HvCall.POST_MESSAGE,
                HvCall.POST_MESSAGE,
                HvCall.SIGNAL_EVENT,
                HvCall.SIGNAL_EVENT,
                HvCall.EXT_CALL_QUERY_CAPABILITIES,
                HvCall.EXT_CALL_LAST,
                *m.flushes,
                rng.choice(CALLS),
                rng.choice(CALLS),
            )
        )
        parameter = rng.choice((*m.pools.connections, 1 << 40, m.pools.connections[2] | 1 << rng.randrange(24, 64)))
        data = struct.pack("<QQQ", parameter, rng.getrandbits(3), vps(rng))
        inputs = (parameter, rng.getrandbits(16))
        xmm = rng.randbytes(96)
    if chance(rng, 0.06):
        var = rng.randrange(1, 12)
    if chance(rng, 0.08):
        rep = rng.randrange(1, 8)
    control = code | fast << 16 | var << 17 | rep << 32
    if chance(rng, 0.04):
        control |= rng.randrange(1, 8) << 48
    if chance(rng, 0.05):
        control |= 1 << rng.choice((27, 28, 30, 31, 44, 47, 60, 63))
    inside = G.DATA_BYTES - len(data)
    at = G.DATA_AT + rng.choice(
        (rng.randrange(0, inside, 8), rng.randrange(inside), 0x1000 - 8, 0x3000 - len(data) // 2)
    )
    if chance(rng, 0.1):
        at = rng.choice((*UNREADABLE, G.MEMORY_BYTES - 8, G.MEMORY_BYTES - 20, G.MEMORY_BYTES - 24, (1 << 64) - 8))
    if not fast:
        if G.DATA_AT <= at <= G.MEMORY_BYTES - len(data):
            yield ("memory", at, data)
        inputs = (at, rng.choice((0, G.DATA_AT)))
    narrow = chance(rng, 0.12) and all(value < 1 << 32 for value in inputs)
    if narrow and not fast and at >= 1 << 32:
        narrow = False
    yield ("hypercall", i, control, *inputs, xmm, narrow, answer)


def vps(rng: random.Random) -> int:
    """A mask of VP indices, mostly of those that exist."""
    value = rng.getrandbits(6)
    if chance(rng, 0.2):
        value |= 1 << rng.choice((63, 8, 31, 32))
    return rng.getrandbits(64) if chance(rng, 0.05) else value


def interrupt(rng: random.Random, m: HypervTwins) -> Op:
    """An interrupt from outside: a message, or a SINT's line."""
    if m.routes and chance(rng, 0.6):
        return ("irq_line", rng.choice(m.routes), chance(rng, 0.9))
    target = rng.choice(m.vcpus)
    address = 0xFEE0_0000 | (target.id & 0xFF if chance(rng, 0.9) else 0xFF) << 12 | (target.id & ~0xFF) << 32
    return ("signal_msi", address, vector(rng, m.pools) | rng.choice((0, 0, 0, 1)) << 8 | rng.choice((0, 0, 0x8000)))


def lapic(rng: random.Random, m: HypervTwins, i: int) -> Op:
    """The page as it is, with registers that matter changed."""
    data = bytearray(m.vcpus[i].page)

    def put(offset: int, value: int) -> None:
        struct.pack_into("<I", data, offset, value)

    if chance(rng, 0.5):
        for base, likely in ((r.APIC_IRR, 0.6), (r.APIC_ISR, 0.4), (r.APIC_TMR, 0.2)):
            for word in range(8):
                put(base + 0x10 * word, 0)
            for one in rng.sample(m.pools.vectors, rng.randrange(3)) if chance(rng, likely) else ():
                at = base + one // 32 * 0x10
                put(at, struct.unpack_from("<I", data, at)[0] | 1 << one % 32)
    if chance(rng, 0.6):
        put(r.APIC_TASKPRI, rng.choice((0, 0, 0x10, 0x40, 0x50, 0x80, 0xE0)))
    put(r.APIC_SPIV, 0x1FF if chance(rng, 0.9) else 0xFF)
    if not m.vcpus[i].x2apic and chance(rng, 0.4):
        put(r.APIC_LDR, rng.choice((1 << i, 3, 0x11, 0xFF)) << 24)
    return ("set_lapic", i, bytes(data))


def beginning(rng: random.Random, m: HypervTwins) -> Iterator[Op]:
    """Modes, SynICs, pages, SINTs, routes: what a guest and its user space set up, most of it."""
    style = rng.choice(("x2apic", "xapic", "xapic", "mixed"))
    for i, vcpu in enumerate(m.vcpus):
        mode = rng.choice(("x2apic", "xapic", "off")) if style == "mixed" else style
        base = vcpu.apic_base & ~BOTH
        if mode == "x2apic":
            yield ("set_msr", i, r.MSR_APICBASE, base | BOTH)
        elif mode == "off":
            yield ("set_msr", i, r.MSR_APICBASE, base)
        yield enabled(m, i)
        if chance(rng, 0.85):
            yield ("enable_synic", i, rng.randrange(1, 3))
    if chance(rng, 0.95):
        yield ("set_msr", 0, hv.MSR_HV_GUEST_OS_ID, 0x8100_0000_0000)
    for i in range(len(m.vcpus)):
        if chance(rng, 0.85):
            yield ("set_msr", i, hv.MSR_HV_VP_ASSIST_PAGE, G.DATA_AT + m.pools.page_of[i] * 0x1000 | 1)
        if chance(rng, 0.85):
            yield ("set_msr", i, hv.MSR_HV_SIMP, G.DATA_AT + m.pools.page_of[4 + i % 4] * 0x1000 | 1)
        if chance(rng, 0.3):
            yield ("set_msr", i, hv.MSR_HV_VP_INDEX, rng.choice((0, 1, 2, 3, 7, 63, 64, 70)))
        for n in m.pools.sints:
            yield ("set_msr", i, hv.MSR_HV_SINT0 + n, sint_value(rng, m.pools))
    yield routes(rng, m)


def enabled(m: HypervTwins, i: int) -> Op:
    """SVR 0x1FF."""
    if m.vcpus[i].x2apic:
        return ("set_msr", i, r.MSR_X2APIC_BASE + (r.APIC_SPIV >> 4), 0x1FF)
    data = bytearray(m.vcpus[i].page)
    struct.pack_into("<I", data, r.APIC_SPIV, 0x1FF)
    return ("set_lapic", i, bytes(data))


def routes(rng: random.Random, m: HypervTwins) -> Op:
    """KVM_SET_GSI_ROUTING: lines of SINTs, some of nobody's."""
    pairs = []
    for gsi in range(GSIS):
        if chance(rng, 0.5):
            vp = rng.randrange(len(m.vcpus)) if chance(rng, 0.8) else rng.choice((5, 63, 64, 1 << 20, 0xFFFF_FFFF))
            pairs.append((gsi, vp, sint(rng, m.pools) if chance(rng, 0.95) else rng.choice((16, 255))))
    return ("sint_routes", tuple(pairs))


def assist(m: HypervTwins, i: int) -> int:
    """Where the vCPU's assist page is, 0: it has none that a guest could write."""
    value = m.model.mem[L.HV + L.HV_STRIDE * i + L.HV_VP_ASSIST_PAGE]
    at = value & ~0xFFF
    return at if value & 1 and G.DATA_AT <= at < G.MEMORY_BYTES else 0


def rest(rng: random.Random, m: HypervTwins) -> Op | None:
    """Time that passes, at whose end nothing is due; None where something is."""
    ns = rng.choice(REST_NS)
    mem = m.model.mem
    for i in range(len(m.vcpus)):
        for n in range(L.STIMERS):
            due = mem[L.HV + L.HV_STRIDE * i + L.HV_STIMER + L.STIMER_STRIDE * n + L.STIMER_DEADLINE]
            if due and abs(due - 1 - m.model.time - ns) < MARGIN_NS:
                return None
    return ("rest", ns)


def draw(rng: random.Random, m: HypervTwins) -> Iterator[Op]:
    """The next operation, or a few that belong together: each is drawn when those before it are done."""
    i = rng.randrange(len(m.vcpus))
    kind = rng.random()
    clears = assist(m, i) if chance(rng, 0.7) else 0
    if kind < 0.14:
        yield ("set_msr", i, *msr_and_value(rng, m, i))
    elif kind < 0.18:
        yield ("get_msr", i, rng.choice(ALL_MSRS))
    elif kind < 0.36:
        yield ("wrmsr", i, *by_guest(*msr_and_value(rng, m, i)))
    elif kind < 0.40:
        yield ("rdmsr", i, rng.choice(ALL_MSRS))
    elif kind < 0.50:
        yield interrupt(rng, m)
    elif kind < 0.66:
        yield from hypercall(rng, m, i)
    elif kind < 0.78:
        yield ("take", i, clears)
    elif kind < 0.81:
        yield ("test_clear", i, clears) if clears else ("run_through", i)
    elif kind < 0.83:
        yield ("halt", i, chance(rng, 0.7), clears)
    elif kind < 0.85:
        yield ("window", i, clears)
    elif kind < 0.91:
        yield eoi(rng, m, i)
    elif kind < 0.95:
        yield lapic(rng, m, i)
    elif kind < 0.96:
        base = m.vcpus[i].apic_base & ~BOTH
        yield ("set_msr", i, r.MSR_APICBASE, base | rng.choice((0, r.APICBASE_EN, BOTH)))
    elif kind < 0.9625:
        yield connection(rng, m)
    elif kind < 0.965:
        yield ("enable_synic", i, rng.randrange(1, 3))
    elif kind < 0.97:
        yield routes(rng, m)
    elif kind < 0.977:
        at = rng.choice((0, page(rng) & ~3 | rng.choice((0, 0x40, 2)) | 1, page(rng) | 1))
        yield (rng.choice(("set_msr", "wrmsr")), i, r.MSR_KVM_PV_EOI_EN, at)
    elif kind < 0.985:
        op = rest(rng, m)
        yield op or ("run_through", i)
    else:
        taken = bytes((1, 0, 0, 0, 0x18, rng.choice((0, 0x80, 0xFE)), 0, 0))
        yield ("memory", page(rng, 1.0) + 0x100 * sint(rng, m.pools), rng.choice((bytes(4), bytes(4), taken)))


def connection(rng: random.Random, m: HypervTwins) -> Op:
    """KVM_HYPERV_EVENTFD, mostly of a connection that is in that state."""
    n = rng.randrange(EVENTFDS)
    kind = rng.random()
    if kind < 0.4:
        return ("signals", n, 0)
    known = list(m.connections)
    number = rng.choice(m.pools.connections) if chance(rng, 0.9) else rng.choice((1 << 24, 1 << 31, 2))
    if kind < 0.75 or not known:
        return ("connect", n, number)
    return ("disconnect", n, rng.choice(known) if chance(rng, 0.8) else number)


def eoi(rng: random.Random, m: HypervTwins, i: int) -> Op:
    """The end of an interrupt by one of its doors."""
    if m.vcpus[i].x2apic:
        return rng.choice((("wrmsr", i, r.MSR_X2APIC_EOI, 0), ("wrmsr", i, SYNTHETIC_EOI, 0)))
    if m.vcpus[i].hw_enabled:
        return rng.choice((("mmio_write", i, r.APIC_EOI, 0), ("wrmsr", i, SYNTHETIC_EOI, 0)))
    return ("wrmsr", i, SYNTHETIC_EOI, 0)
