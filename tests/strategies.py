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
from functools import wraps
from typing import Any

from hypothesis import strategies as st

import fastexit as fx
import oracle
import oracle_apic
from fastexit import regs as r
from fastexit.kvm import operations
from fastexit.kvm.operations import Op, describe, host_op, set_events_op, set_mp_state_op, set_sregs_op
from fastexit.kvm.operations import setup_ops as setup_ops
from fastexit.kvm.twins import random_ids
from fastexit.kvm.values import FAR_DEADLINE as FAR_DEADLINE
from fastexit.kvm.values import (
    ID_POOL,
    LONG_COUNTS,
    READABLE_IN_XAPIC,
    WRITABLE_IN_XAPIC,
    apic_base,
    chance,
    icr,
    icr_low,
    msi_address,
    register_value,
    word32,
)
from fastexit.kvm.values import X2APIC_MSRS as X2APIC_MSRS
from fastexit.kvm.values import differences as differences
from fastexit.kvm.values import vector as vector
from fastexit.profile import since
from generations import FILTERS, offered

JIT = os.environ.get("NUMBA_DISABLE_JIT", "0") in ("", "0")
"""Without the JIT a kernel costs some hundred times more, so tests take fewer examples."""

GUEST_OPS = ("guest_wrmsr", "guest_rdmsr", "mmio_write", "mmio_read", "hlt", "host_interrupt", "hypercall")
"""Operations that a vCPU carries out itself."""


@dataclass(frozen=True)
class Config:
    """What a machine is built from; the names are Machine's keywords, and ``fastpath``."""

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
    smm: bool = True
    hv_timer: bool = False
    pi_inject_timer: bool = False
    disable_exits: int = 0
    tsc_khz: int = 1_000_000
    bus_cycle_ns: int = 1
    min_timer_period_us: int = 200
    fastpath: bool = True

    def __post_init__(self) -> None:
        for name, value in offered(self.kernel, asdict(self)).items():
            object.__setattr__(self, name, value)

    def build(self, factory: Callable[..., Any]) -> Any:
        options = asdict(self) | {"apic_ids": list(self.apic_ids)}
        fastpath = options.pop("fastpath")
        if self.vendor == "svm" and not since(self.kernel, "6.18") and max(self.apic_ids) > oracle_apic.AVIC_MAX_ID:
            options["apicv"] = False  # AVIC would refuse the vCPU
        machine = factory(**options)
        machine.fastpath = fastpath
        return machine


def random_config(rng: random.Random, *, least: int = 2, most: int = 6, **fixed: Any) -> Config:
    """A machine of any generation, vendor and set of capabilities; ``fixed`` pins some of them."""
    drawn: dict[str, Any] = {
        "apic_ids": random_ids(rng, least, most),
        "kernel": rng.choice(fx.profiles()),
        "vendor": rng.choice(("vmx", "svm")),
        "apicv": rng.random() < 0.5,
        "irqchip": rng.choice(("full", "split")),
        "x2apic_api": rng.randrange(4) | (r.X2API_NO_SUPPRESS_EOI if rng.random() < 0.1 else 0),
        "x2apic": rng.random() < 0.9,
        "tsc_deadline": rng.random() < 0.7,
        "disable_quirks": rng.choice((0, 0, 0, r.QUIRK_LINT0_REENABLED)),
        "fastpath": rng.random() < 0.85,
    }
    if chance(rng, 0.1):
        drawn["boot_cpu_id"] = rng.choice((fixed | drawn)["apic_ids"])
    return Config(**(drawn | fixed))


configs: st.SearchStrategy[Config] = st.builds(
    Config,
    apic_ids=st.lists(st.sampled_from(ID_POOL), min_size=1, max_size=6, unique=True).map(tuple),
    kernel=st.sampled_from(fx.profiles()),
    vendor=st.sampled_from(("vmx", "svm")),
    apicv=st.booleans(),
    irqchip=st.sampled_from(("full", "split")),
    x2apic_api=st.integers(0, 3),
    x2apic=st.booleans(),
    tsc_deadline=st.booleans(),
    fastpath=st.booleans(),
)
"""The same machines, for tests that want hypothesis to shrink them."""

seeds: st.SearchStrategy[int] = st.integers(0, 2**32 - 1)
"""Seeds for the generators below: a seed per example costs hypothesis far less than a draw per operation."""


# --------------------------------------------------------------------------------------------------------- operations

Draw = Callable[..., Op]


def unchanged(draw: Draw) -> Draw:
    """Have a draw leave the machine as it is: KVM_GET_LAPIC, whose page the next one begins with, takes a vCPU out of
    the guest and empties PIR, and the other machine would know nothing of it.
    """

    @wraps(draw)
    def drawn(rng: random.Random, machine: Any, *more: Any, **named: Any) -> Op:
        machine.drawn_from = True
        try:
            return draw(rng, machine, *more, **named)
        finally:
            machine.drawn_from = False

    return drawn


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
        offset = rng.choice(WRITABLE_IN_XAPIC)
        value = register_value(rng, offset)
        if offset == r.APIC_TMICT and not timer:
            value = rng.choice(LONG_COUNTS)
        elif chance(rng, 0.05):
            length = rng.choice((1, 2, 4))
            return ("mmio_write", i, rng.randrange(0x1000), value & (1 << 8 * length) - 1, length)
        return ("mmio_write", i, offset, value, 4)
    if kind < 0.80:
        offset = rng.choice(READABLE_IN_XAPIC) + rng.choice((0, 0, 0, 1, 2, 3))
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
    waits = vcpu.mp_state in (r.MP_INIT_RECEIVED, r.MP_UNINITIALIZED) and vcpu.thread.runnable()
    if waits and not vcpu.thread.refused():
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


def ipi_op(rng: random.Random, machine: oracle.Machine) -> Op:
    """An ICR write by a guest or by user space, or a message: to one, to several, to all, by every delivery mode."""
    i = rng.randrange(len(machine.vcpus))
    if chance(rng, 0.15):
        return ("signal_msi", msi_address(rng, machine), vector(rng) | rng.choice((0, 0, 0, 1, 2, 4)) << 8)
    value = icr(rng, machine)
    if chance(rng, 0.5):  # of the simple kinds, which most vCPUs accept
        value &= ~(r.ICR_DM | r.ICR_SHORTHAND | r.ICR_RESERVED | r.ICR_TRIGGER)
        value |= rng.choice((0, 0, 2, 3, 3)) << r.ICR_SHORTHAND_SHIFT
    if not machine.vcpus[i].x2apic:
        return ("mmio_write", i, r.APIC_ICR, value & 0xFFFF_FFFF, 4)
    return ("guest_wrmsr" if chance(rng, 0.9) else "set_msr", i, r.MSR_X2APIC_ICR, value)


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
    "IPIs": (1, ipi_op),
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


@unchanged
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
    if name == "msr_filter":
        if machine.kernel not in FILTERS:
            return None
        default_deny, ranges, machine.user_space_msr = args
        machine.set_msr_filter(
            default_deny,
            [(flags, first, [bits >> n & 1 for n in range(count)]) for flags, first, count, bits in ranges],
        )
        return None
    if name in SWITCHES:
        return switch(machine.vcpus[args[0]], name, args[1])
    if name == "complete_msr":
        return machine.vcpus[args[0]].complete_msr(error=args[1])
    result = operations.apply(machine, op)
    return (result.nmi_pending, result.latched_init) if name == "events" else result


SWITCHES = ("nmi_masked", "gif", "vmxon", "interrupts", "ioapic_handled")


def switch(vcpu: Any, name: str, value: Any) -> None:
    """Sets an attribute while the vCPU is out of the guest, as if user space had; the next entry looks at events."""
    vcpu.get_msr(r.MSR_APICBASE)
    if name == "interrupts":
        vcpu.rflags = r.RFLAGS_FIXED | r.RFLAGS_IF * value
    else:
        setattr(vcpu, name, set(value) if name == "ioapic_handled" else value)
    vcpu.set_events(nmi_masked=vcpu.nmi_masked)


def story(config: Config, history: list[Op]) -> str:
    """How a machine came to be what it is: enough to replay it, pages reduced to their non-zero dwords."""
    return "\n".join((f"{config}", *(describe(op) for op in history)))
