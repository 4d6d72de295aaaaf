"""Operations on a machine: drawn at random, carried out on anything with Machine's face, told in words.

An operation is a plain tuple of a method's name, the vCPU's index where it has one, and arguments, so that a sequence
can be kept, shortened, replayed and printed.
"""

from __future__ import annotations

import random
import struct
from collections.abc import Callable, Sequence
from typing import Any

from fastexit import regs as r
from fastexit.jit.declare import load
from fastexit.kvm.guest import MEMORY_BYTES
from fastexit.kvm.programs import Program
from fastexit.kvm.values import (
    FAR_DEADLINE,
    ID_POOL,
    LONG_COUNTS,
    LVTS,
    READABLE_IN_XAPIC,
    WRITABLE,
    WRITABLE_IN_XAPIC,
    X2APIC_MSRS,
    Seen,
    SeenVcpu,
    apic_base,
    chance,
    delivery_mode,
    icr,
    icr_low,
    lapic_page,
    msi_address,
    register_value,
    vector,
    word32,
    xapic_destination,
)
from fastexit.outcome import GeneralProtection, Outcome
from fastexit.vcpu import Vcpu

Op = tuple[Any, ...]

OTHER_MSRS = (r.MSR_APICBASE, r.MSR_TSC_DEADLINE, r.MSR_KVM_PV_EOI_EN, r.MSR_X2APIC_ICR)
PV_EOIS = (0, 0, 2, 0x3000, 0x3002, 0x3004, 1 << 40)
"""Values of MSR_KVM_PV_EOI_EN that do not enable it: KVM would want the guest's memory there."""

MAXPHYADDR = 48
"""Physical address bits of guests, as `Oracle` makes them."""
GUEST_OPS = ("wrmsr", "rdmsr", "mmio_write", "mmio_read")
"""Operations that a vCPU carries out itself: one instruction."""
SMI_OFFSETS = frozenset((*LVTS, r.APIC_LVTCMCI, r.APIC_ICR))
SMI_MSRS = frozenset(r.MSR_X2APIC_BASE + (offset >> 4) for offset in SMI_OFFSETS)
"""Where a delivery mode can be SMI."""
NOT_FOR_GUESTS = (r.DM_NMI, r.DM_INIT)
"""Delivery modes that would take the vCPU away from the instruction under test."""


def setup_ops(rng: random.Random, machine: Seen) -> list[Op]:
    """Brings the vCPUs into modes of a style.

    All x2APIC; all xAPIC with one form of logical ids; nobody with a vote on that form ("quiet"); x2APIC but for some
    who have none ("booting"); any mixture. Left to chance, vCPUs hardly ever agree on a form, and the APIC map then has
    no logical ids at all.
    """
    style = rng.choices(("x2apic", "flat", "cluster", "quiet", "booting", "mixed"), (8, 4, 5, 1, 3, 8))[0]
    if style in ("x2apic", "booting") and not machine.x2apic:
        style = "mixed"
    ops: list[Op] = []
    for i, vcpu in enumerate(machine.vcpus):
        mode = style
        if style == "booting":
            mode = rng.choice(("x2apic", "x2apic", "flat"))
        elif style in ("mixed", "quiet"):
            mode = rng.choices(("x2apic" if machine.x2apic else "flat", "flat", "cluster", "off"), (25, 14, 8, 5))[0]
        base = vcpu.apic_base & ~(r.APICBASE_EN | r.APICBASE_EXTD)
        if mode == "x2apic":
            ops.append(("set_msr", i, r.MSR_APICBASE, base | r.APICBASE_EN | r.APICBASE_EXTD))
            if style == "quiet":
                ops.append(("set_msr", i, r.MSR_X2APIC_BASE + (r.APIC_SPIV >> 4), 0xFF))
            elif style != "mixed" or chance(rng, 0.85):
                ops.append(("set_msr", i, r.MSR_X2APIC_BASE + (r.APIC_SPIV >> 4), 0x1FF))
        elif mode == "off":
            ops.append(("set_msr", i, r.MSR_APICBASE, base))
        else:
            if base | r.APICBASE_EN != vcpu.apic_base:
                ops.append(("set_msr", i, r.MSR_APICBASE, base | r.APICBASE_EN))
            votes = style not in ("quiet", "booting")
            ops.append(("set_lapic", i, _xapic_page(rng, vcpu, i, mode == "cluster", votes)))
    return ops


def _xapic_page(rng: random.Random, vcpu: SeenVcpu, i: int, cluster: bool, votes: bool) -> bytes:
    """The page of a vCPU that boots in xAPIC mode, with an id and a logical id of its own.

    A software-disabled one or one with LDR 0 has no vote on the form of logical ids.
    """
    page = bytearray(vcpu.get_lapic())
    logical = (i // 4) << 4 | 1 << i % 4 if cluster else 1 << i % 8
    if chance(rng, 0.12):
        logical |= 1 << rng.randrange(8)
    form = r.DFR_CLUSTER if cluster else r.DFR_FLAT
    if cluster and chance(rng, 0.2):
        form = rng.choice((form | rng.randrange(15) << 28, 0xF000_0000 | rng.getrandbits(28)))
    enabled = chance(rng, 0.9 if votes else 0.5)
    if enabled and not votes:
        logical = 0
    for offset, value in (
        (r.APIC_ID, (i if chance(rng, 0.5) else vcpu.id & 0xFF) << r.XAPIC_DEST_SHIFT),
        (r.APIC_LDR, logical << r.XAPIC_DEST_SHIFT),
        (r.APIC_DFR, form),
        (r.APIC_SPIV, 0x1FF if enabled else 0xFF),
        (r.APIC_TMICT, 0),
        (r.APIC_TMCCT, 0),
    ):
        struct.pack_into("<I", page, offset, value)
    return bytes(page)


def host_op(rng: random.Random, machine: Seen, *, timer: bool = True) -> Op:
    """One operation that ioctls can carry out.

    With ``timer`` clocks may run out: right where nobody enters the guest, which is where a tick becomes an interrupt.
    """
    i = rng.randrange(len(machine.vcpus))
    vcpu = machine.vcpus[i]
    kind = rng.random()
    if kind < 0.40:
        return ("set_msr", i, r.MSR_X2APIC_ICR, icr(rng, machine))
    if kind < 0.55:
        offset = rng.choice(WRITABLE)
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
        return ("get_msr", i, rng.choice((*X2APIC_MSRS, *OTHER_MSRS)))
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
    if kind < 0.98:
        return ("events", i)
    if kind < 0.99:
        return ("set_msr", i, r.MSR_KVM_PV_EOI_EN, rng.choice(PV_EOIS))
    # A deadline that has passed or is far away: what lies between would depend on when it is looked at
    return ("set_msr", i, r.MSR_TSC_DEADLINE, rng.choice((0, 1, FAR_DEADLINE) if timer else (0, FAR_DEADLINE)))


def without_smi(op: Op) -> Op:
    """The same operation with Fixed delivery where it says SMI: guests here have no memory for a handler of that."""
    name, *arguments = op
    if name == "signal_msi":
        return (name, arguments[0], _fixed(arguments[1]))
    if name == "set_lapic":
        page = bytearray(arguments[1])
        for offset in LVTS:
            struct.pack_into("<I", page, offset, _fixed(struct.unpack_from("<I", page, offset)[0]))
        return (name, arguments[0], bytes(page))
    if name in ("set_msr", "wrmsr") and arguments[1] in SMI_MSRS:
        return (name, arguments[0], arguments[1], _fixed(arguments[2]))
    if name == "mmio_write" and arguments[1] & ~15 in SMI_OFFSETS:
        at = 8 * (arguments[1] & 3)
        return (name, *arguments[:2], _fixed(arguments[2] << at) >> at, *arguments[3:])
    return op


def without_count(op: Op) -> Op:
    """The same operation without what runs out in seconds: for guests that live longer than any count lasts.

    A timer's count is 0 then, and a TSC deadline has passed or is centuries away.
    """
    name, *arguments = op
    if name in ("set_msr", "wrmsr") and arguments[1] == r.MSR_TSC_DEADLINE and 1 < arguments[2] < FAR_DEADLINE:
        return (name, arguments[0], arguments[1], FAR_DEADLINE)
    if name in ("set_msr", "wrmsr") and arguments[1] == r.MSR_X2APIC_BASE + (r.APIC_TMICT >> 4):
        return (name, arguments[0], arguments[1], 0)
    if name == "mmio_write" and arguments[1] & ~15 == r.APIC_TMICT:
        return (name, arguments[0], arguments[1], 0, *arguments[3:])
    return op


def _fixed(value: int) -> int:
    return value & ~(7 << r.ICR_DM_SHIFT) if value >> r.ICR_DM_SHIFT & 7 == r.DM_SMI else value


def set_events_op(rng: random.Random, machine: Seen) -> Op:
    """KVM_SET_VCPU_EVENTS; None leaves out the flag that makes a field count."""
    return (
        "set_events",
        rng.randrange(len(machine.vcpus)),
        rng.choice((None, 0, 1, 2, 3)),
        chance(rng, 0.3),
        rng.choice((None, rng.randrange(256))),
        rng.choice((None, None, False, True)),
    )


def set_sregs_op(rng: random.Random, machine: Seen) -> Op:
    """KVM_SET_SREGS, the two words of it that concern the APIC."""
    i = rng.randrange(len(machine.vcpus))
    vcpu = machine.vcpus[i]
    base = vcpu.apic_base if chance(rng, 0.5) else apic_base(rng, vcpu)
    return ("set_sregs", i, base, rng.randrange(16) if chance(rng, 0.9) else rng.randrange(256))


def set_mp_state_op(rng: random.Random, machine: Seen) -> Op:
    """KVM_SET_MP_STATE, allowed or not."""
    return (
        "set_mp_state",
        rng.randrange(len(machine.vcpus)),
        rng.choice((*range(5), r.MP_INIT_RECEIVED, r.MP_HALTED)),
    )


def look_op(rng: random.Random, machine: Seen) -> Op:
    """Something that user space reads beside the page."""
    return (rng.choice(("cr8", "cs", "events", "get_mp_state")), rng.randrange(len(machine.vcpus)))


USER_OPS: dict[str, Callable[[random.Random, Seen], Op]] = {
    "set_events": set_events_op,
    "set_sregs": set_sregs_op,
    "set_mp_state": set_mp_state_op,
    "look": look_op,
}
"""What user space does to a vCPU beside its APIC."""


def user_op(rng: random.Random, machine: Seen, names: Sequence[str] = tuple(USER_OPS)) -> Op:
    """One of USER_OPS."""
    return USER_OPS[rng.choice(names)](rng, machine)


def rare_op(rng: random.Random, known: int, below: int = 4096) -> Op:
    """What changes the VM itself, allowed or not: one more vCPU, flags of KVM_CAP_X2APIC_API that come late.

    ``known`` flags and ids ``below`` are those that the host has.
    """
    if chance(rng, 0.6):
        pool = [vcpu_id for vcpu_id in ID_POOL if vcpu_id < below]
        return ("add_vcpu", rng.choice(pool) if chance(rng, 0.8) else rng.randrange(below))
    flags = (1, 2, 3, r.X2API_SUPPRESS_EOI, r.X2API_NO_SUPPRESS_EOI, r.X2API_SUPPRESS_EOI | r.X2API_NO_SUPPRESS_EOI)
    return ("enable_x2apic_api", rng.choice(flags) & known)


def greeting(rng: random.Random, machine: Seen, apic_id: int) -> Op:
    """What may or may not reach a vCPU that was just created: not its IRR, for nobody has enabled its APIC."""
    icr = rng.randrange(16, 256) | rng.choice((r.DM_NMI, r.DM_INIT, r.DM_STARTUP, r.DM_REMRD)) << r.ICR_DM_SHIFT
    if chance(rng, 0.5):
        return ("signal_msi", 0xFEE0_0000 | (apic_id & 0xFF) << 12 | (apic_id & ~0xFF) << 32, icr)
    return ("set_msr", rng.randrange(len(machine.vcpus)), r.MSR_X2APIC_ICR, apic_id << r.ICR_DEST_SHIFT | icr)


def guest_op(rng: random.Random, machine: Seen, i: int) -> Op:
    """One instruction of a vCPU, mostly at its APIC in whichever mode it is; none that would take the vCPU away."""
    vcpu = machine.vcpus[i]
    kind = rng.random()
    if vcpu.x2apic or kind < 0.04:
        return guest_msr_op(rng, machine, i)
    if kind < 0.07:
        return ("wrmsr", i, r.MSR_APICBASE, _reachable(apic_base(rng, vcpu)))
    if kind < 0.35:
        return ("mmio_write", i, r.APIC_ICR, tame(icr_low(rng)), 4)
    if kind < 0.70:
        if kind < 0.45:
            return ("mmio_write", i, r.APIC_ICR2, xapic_destination(rng, machine) << r.XAPIC_DEST_SHIFT, 4)
        offset = rng.choice(WRITABLE_IN_XAPIC)
        return ("mmio_write", i, offset, _guest_value(rng, offset), 4)
    if kind < 0.80:
        length = rng.choice((1, 2, 4, 4))
        offset = rng.randrange(0x1000 - length + 1) if chance(rng, 0.5) else rng.choice(WRITABLE_IN_XAPIC)
        offset = min(offset + rng.randrange(16), 0x1000 - length)
        if offset >> 4 in (r.APIC_TMICT >> 4, r.APIC_ICR >> 4):
            return ("mmio_write", i, offset | 4, rng.getrandbits(8 * length), length)
        return ("mmio_write", i, offset, rng.getrandbits(8 * length), length)
    length = rng.choice((4, 4, 1, 2))
    offset = rng.choice(READABLE_IN_XAPIC) + rng.choice((0, 0, 0, 1, 2, 3))
    return ("mmio_read", i, offset if chance(rng, 0.9) else rng.randrange(0x1000 - length + 1), length)


def guest_msr_op(rng: random.Random, machine: Seen, i: int) -> Op:
    """WRMSR or RDMSR of a guest, now and then a store to the xAPIC page."""
    kind = rng.random()
    if kind < 0.35:
        return ("wrmsr", i, r.MSR_X2APIC_ICR, tame(icr(rng, machine)))
    if kind < 0.6:
        offset = rng.choice(WRITABLE)
        high = rng.getrandbits(32) << 32 if chance(rng, 0.03) else 0
        return ("wrmsr", i, r.MSR_X2APIC_BASE + (offset >> 4), _guest_value(rng, offset) | high)
    if kind < 0.7:
        return ("wrmsr", i, r.MSR_APICBASE, _reachable(apic_base(rng, machine.vcpus[i])))
    if kind < 0.78:
        offset = rng.choice(WRITABLE_IN_XAPIC)
        return ("mmio_write", i, offset, _guest_value(rng, offset), 4)
    if kind < 0.82:
        msr = rng.randrange(r.MSR_X2APIC_BASE, r.MSR_X2APIC_END + 1)
        if msr not in (r.MSR_X2APIC_ICR, r.MSR_X2APIC_BASE + (r.APIC_TMICT >> 4)):
            return ("wrmsr", i, msr, word32(rng))
    if kind < 0.86:
        return ("wrmsr", i, r.MSR_TSC_DEADLINE, rng.choice((0, FAR_DEADLINE)))
    if kind < 0.88:
        return ("wrmsr", i, r.MSR_KVM_PV_EOI_EN, rng.choice(PV_EOIS))
    return ("rdmsr", i, rng.choice((*X2APIC_MSRS, *OTHER_MSRS)))


def _guest_value(rng: random.Random, offset: int) -> int:
    """A register's value with which no timer runs out: the kernel would look at the clock."""
    return rng.choice(LONG_COUNTS) if offset == r.APIC_TMICT else register_value(rng, offset)


def tame(value: int) -> int:
    """An ICR value that leaves its sender alone: NMI and INIT go to all but self."""
    if value >> r.ICR_DM_SHIFT & 7 in NOT_FOR_GUESTS:
        return value & ~r.ICR_SHORTHAND | r.SH_ALLBUT << r.ICR_SHORTHAND_SHIFT
    return value


def _reachable(value: int) -> int:
    """An APICBASE whose page 32-bit code reaches; one that faults may have it anywhere."""
    page = value & r.APICBASE_PAGE
    if MEMORY_BYTES <= page < 1 << 32 or page >> MAXPHYADDR:
        return value
    return value & ~r.APICBASE_PAGE | r.APIC_DEFAULT_PHYS_BASE


def apply(machine: Any, op: Op) -> Any:
    """Carries out one operation on a Machine or an Oracle; the result can be compared between them."""
    name, *arguments = op
    try:
        if name in ("signal_msi", "enable_x2apic_api", "boot_x2apic", "set_time"):
            return getattr(machine, name)(*arguments)
        if name == "add_vcpu":
            machine.add_vcpu(arguments[0])
            return None
        vcpu = machine.vcpus[arguments[0]]
        if name in ("cr8", "cs"):
            return getattr(vcpu, name)
        if name == "set_events":
            return _set_events(vcpu, *arguments[1:])
        if name == "set_sregs":
            return vcpu.set_sregs(apic_base=arguments[1], cr8=arguments[2])
        if name == "ready":
            return ready(vcpu)
        if name == "run_through" and isinstance(vcpu, Vcpu):
            return Program(vcpu).run_through()
        result = getattr(vcpu, name)(*arguments[1:])
    except GeneralProtection:
        return "#GP"
    except ValueError:
        return "EINVAL"
    if isinstance(result, Outcome):
        return "#GP" if result.fault else result.user
    return result


def _set_events(vcpu: Any, nmi_pending: Any, nmi_masked: bool, sipi_vector: Any, latched_init: Any) -> None:
    more = {} if latched_init is None else {"smm": False, "latched_init": latched_init}
    vcpu.set_events(nmi_pending=nmi_pending, nmi_masked=nmi_masked, sipi_vector=sipi_vector, **more)


def ready(vcpu: Any) -> None:
    """Makes a vCPU able to run instructions: no NMI, nothing latched, RUNNABLE, and KVM_SET_SREGS of what it has."""
    vcpu.set_events(nmi_pending=0)
    vcpu.get_mp_state()
    vcpu.set_mp_state(r.MP_RUNNABLE)
    if hasattr(vcpu, "ready"):
        vcpu.ready(again=True)
    else:
        vcpu.set_sregs()


def set_regs(vcpu: Any) -> None:
    """KVM_SET_REGS, which asks for events, as a real vCPU has it before each program; that one does it by itself."""
    if isinstance(vcpu, Vcpu):
        vcpu.get_mp_state()
        load("make_request")(vcpu.machine.handle, vcpu.index, r.REQ_EVENT)


def describe(op: Op) -> str:
    """One operation, readable; of a page its dwords that are not 0."""
    shown = []
    for argument in op[1:]:
        if isinstance(argument, bytes) and len(argument) != r.LAPIC_PAGE_BYTES:
            shown.append(argument.rstrip(b"\0").hex() or "0")
        elif isinstance(argument, bytes):
            dwords = zip(range(0, r.LAPIC_PAGE_BYTES, 4), struct.unpack("<256I", argument), strict=True)
            shown.append("{" + " ".join(f"{o:x}:{value:x}" for o, value in dwords if value) + "}")
        elif isinstance(argument, int) and not isinstance(argument, bool):
            shown.append(f"{int(argument):#x}" if argument > 9 else str(int(argument)))
        else:
            shown.append(str(argument))
    return " ".join((op[0], *shown))
