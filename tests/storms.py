"""Machines of all sorts and random exits on them, for tests that hold two ways of making an exit against each other.

Models: nothing. A machine and a storm are the same for the same arguments, so each way gets its own copy.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

import fastexit as fx
from conftest import INTERPRETED
from fastexit import layout as L
from fastexit import regs as r
from fastexit import snapshot
from fastexit.exits.table import SVM, VMX, Op, Row
from fastexit.outcome import CODE_HARDWARE
from fastexit.profile import since
from generations import FILTERS

EXITS = 60 if INTERPRETED else 400
VENDORS = ("vmx", "svm")
IDS = (0, 1, 2, 5, 300)
PV_EOI = 0x3000 | r.PV_EOI_ENABLED
"""MSR_KVM_PV_EOI_EN: a dword's address, and that it is on."""
PAGE = r.APIC_DEFAULT_PHYS_BASE
FAST = 0xFEB0_0000
DEVICES = (FAST, FAST + 4, 0xFEC0_0000, PAGE - 1, PAGE, PAGE + 0x30, PAGE + 0x1000, 0, (1 << 48) - 1)
"""Addresses with an ioeventfd, with nothing, and around the page."""
PORT_ACCESSES = [(0x60, 1, 0), (0x3F8, 2, 1), (0xFFFF, 4, 1)]
PORT_ACCESSES += [(port, 1, reads) for port in (0x20, 0x21, 0xA0, 0xA1, 0x4D0, 0x4D1) for reads in (0, 0, 1)]
PORT_ACCESSES += [(port, length, reads) for port in (0x20, 0xA1, 0x4D0) for length in (2, 4) for reads in (0, 1)]
"""Port, length, and whether it is an IN: user space's, and the PICs'."""


class Numbers:
    """A vendor's exit numbers."""

    def __init__(self, vendor: str) -> None:
        svm = vendor == "svm"
        self.svm = svm
        self.wrmsr = int(fx.SvmExit.MSR if svm else fx.VmxExit.MSR_WRITE)
        self.rdmsr = int(fx.SvmExit.MSR if svm else fx.VmxExit.MSR_READ)
        self.page = int(fx.SvmExit.NPF if svm else fx.VmxExit.EPT_MISCONFIG)
        self.interrupt = int(fx.SvmExit.INTERRUPT if svm else fx.VmxExit.EXTERNAL_INTERRUPT)
        self.memory = [self.page] if svm else [self.page, int(fx.VmxExit.EPT_VIOLATION)]
        self.io = int(fx.SvmExit.IO if svm else fx.VmxExit.IO_INSTRUCTION)
        self.io_infos = [self.io_info(*access) for access in PORT_ACCESSES]
        self.others = [
            int(reason)
            for reason in (
                (fx.SvmExit.HLT, fx.SvmExit.VINTR, fx.SvmExit.CPUID, fx.SvmExit.READ_DR0, fx.SvmExit.SHUTDOWN)
                if svm
                else (fx.VmxExit.HLT, fx.VmxExit.INTERRUPT_WINDOW, fx.VmxExit.CPUID, fx.VmxExit.RDPMC, 0xFFF0)
            )
        ]

    def io_info(self, port: int, length: int, reads: int) -> int:
        """An exit qualification, or EXITINFO1."""
        return port << 16 | (length << 4 | reads if self.svm else length - 1 | reads << 3)


def build(
    kernel: str, vendor: str, apicv: bool, seed: int, *, traced: bool | None = None, **options: Any
) -> fx.Machine:
    """A machine whose vCPUs differ in all that an exit asks about; the same for the same arguments.

    What no argument pins is drawn: the host's and the kernel's configuration, the fast path and tracing, on or off.
    """
    rng = random.Random(f"{kernel} {vendor} {apicv} {seed}")
    drawn: dict[str, Any] = {
        "retpoline": rng.random() < 0.5,
        "nrips": rng.random() < 0.8,
        "hv_timer": vendor == "vmx" and rng.random() < 0.7,
        "timer_advance_ns": rng.choice((0, 300)),
        "disable_exits": rng.choice((0, 0, r.EXITS_HLT)),
        "irqchip": rng.choice(("full", "split")),
        "threads": rng.random() < 0.5,
    }
    refused = vendor == "svm" and apicv and not since(kernel, "6.18")
    ids = [apic_id if apic_id <= r.AVIC_MAX_ID or not refused else 200 for apic_id in IDS]
    m = fx.Machine(apic_ids=ids, kernel=kernel, vendor=vendor, apicv=apicv, smm=True, **(drawn | options))
    m.boot_x2apic()
    m.fastpath = rng.random() < 0.8
    for v in m.vcpus:
        v.rflags |= rng.choice((0, r.RFLAGS_IF))
        assert v.set_msr(r.MSR_KVM_PV_EOI_EN, rng.choice((0, PV_EOI)))
        v.ioapic_handled = {0x31}
        v.request_interrupt_window = rng.random() < 0.1
    if rng.random() < 0.5:
        m.vcpus[1].rflags |= r.RFLAGS_TF
    m.vcpus[2].singlestep = rng.random() < 0.5
    if rng.random() < 0.8:
        m.vcpus[3].set_msr(r.MSR_APICBASE, 0xFEE0_0800)  # to xAPIC mode
    m.vcpus[4].nested = rng.random() < 0.5
    reasons = rng.choice((0, r.MsrExit.INVAL | r.MsrExit.UNKNOWN))
    if m.kernel in FILTERS:
        m.user_space_msr = reasons
    m.fast_mmio.add(FAST)
    if rng.random() < 0.8 if traced is None else traced:
        m.trace.enable()
    return m


def between(rng: random.Random, machines: Sequence[fx.Machine]) -> None:
    """What is no exit: a guest takes PV EOI's offer, a signal or a line comes, user space sets or wants something."""
    gsi, level = rng.randrange(24), rng.randrange(2)
    for m in machines:
        m.irq_line(gsi, level)
    for twins in zip(*(m.vcpus for m in machines)):
        what = rng.randrange(10)
        for v in twins:
            if what < 5:
                v.pv_eoi = False
            elif what == 5:
                v.signal()
            elif what == 6:
                v.set_events(nmi_pending=1)
            elif what == 7:
                v.request_interrupt_window = not v.request_interrupt_window
            elif what == 8:
                v.set_msr(0x832, 0xEC)
                v.set_msr(0x838, 500)
            else:
                v.set_msr(r.MSR_APICBASE, v.apic_base | r.APICBASE_EN | r.APICBASE_EXTD)
                v.set_msr(0x80F, 0x1FF)


def icr(rng: random.Random) -> int:
    value = fx.icr(
        dest=rng.choice((*IDS, 7, 0xFF, 0xFFFF_FFFF, 0x10003, 3)),
        vector=rng.choice((5, 0x20, 0x31, 0x80, 0xEC, 0xFD)),
        delivery=rng.choice((0, 0, 0, 0, 1, 2, 3, 4, 5, 6, 7)),
        logical=rng.random() < 0.2,
        level=rng.random() < 0.5,
        trigger_level=rng.random() < 0.1,
        shorthand=rng.choice((0, 0, 0, 0, 1, 2, 3)),
        busy=rng.random() < 0.1,
    )
    return value | (1 << 13 if rng.random() < 0.05 else 0)


def one(rng: random.Random, on: Numbers) -> tuple[int, int, int, int, int, int]:
    """One exit record of any kind."""
    vcpu = rng.randrange(len(IDS))
    kind = rng.random()
    write = 1 if on.svm else 0
    if kind < 0.40:
        return vcpu, on.wrmsr, 0x830, write, icr(rng), 0
    if kind < 0.60:
        msr, value = rng.choice(
            (
                (0x80B, 0),
                (0x808, rng.randrange(256)),
                (0x80F, rng.choice((0x1FF, 0x1FF, 0xFF))),
                (0x832, rng.choice((0xEC, 0x400EC, 0x200EC))),
                (0x6E0, rng.choice((0, 1 << 62))),
                (0x1B, 0xFEE0_0000 | rng.choice((0xD00, 0xC00, 0x800, 0))),
                (0x83F, 0x41),
                (0x80D, 1),
                (0x123, 5),
                (0x123, 5),
                (rng.getrandbits(32), rng.getrandbits(64)),
            )
        )
        return vcpu, on.wrmsr, msr, write, value, 0
    if kind < 0.72:
        return vcpu, on.rdmsr, rng.choice((0x802, 0x80A, 0x830, 0x827, 0x80B, 0x1B, 0x6E0, 0x10)), 0, 0, 0
    if kind < 0.80:
        offset = rng.choice((0x20, 0x80, 0xB0, 0xD0, 0xE0, 0xF0, 0x300, 0x310, 0x302, 0xFFF))
        value = rng.choice((0, 0x1FF, 0x41, 0xC0041, 1 << 24, rng.getrandbits(32)))
        return vcpu, on.page, 0, L.MMIO_WRITE | 4, value, PAGE + offset
    if kind < 0.88:
        offset = rng.choice((0x20, 0x22, 0x30, 0xA0, 0x220, 0xB0, 0xFFC))
        return vcpu, on.page, 0, rng.choice((1, 2, 4)), 0, PAGE + offset
    if kind < 0.92:
        return vcpu, on.interrupt, 0, 0, 0, 0
    if kind < 0.95:
        return vcpu, L.NOTIFICATION, 0, 0, 0, 0
    if kind < 0.97:
        reason, length, gpa = rng.choice(on.memory), rng.choice((1, 2, 4, 8)), rng.choice(DEVICES)
        return vcpu, reason, 0, length | rng.choice((0, L.MMIO_WRITE)), rng.getrandbits(8 * length), gpa
    if kind < 0.99:
        return vcpu, on.io, 0, rng.choice(on.io_infos), rng.getrandbits(32), 0
    return vcpu, rng.choice(on.others), 0x830, rng.choice((0, 1)), 0x1000000FD, 0


def storm(seed: int, vendor: str, n: int = EXITS) -> np.ndarray:
    rng = random.Random(seed)
    on = Numbers(vendor)
    return np.array([one(rng, on) for _ in range(n)], dtype=fx.EXIT)


def timer_exit(rng: random.Random, on: Numbers, now: int) -> tuple[int, int, int, int, int, int]:
    """One exit record around halts and timers: they are armed, changed, run out, and the guest waits for them."""
    vcpu = rng.randrange(len(IDS))
    write = 1 if on.svm else 0
    kind = rng.random()
    if kind < 0.22:
        return vcpu, int(fx.SvmExit.HLT if on.svm else fx.VmxExit.HLT), 0, 0, 0, 0
    if kind < 0.30:
        return vcpu, int(fx.SvmExit.PAUSE if on.svm else fx.VmxExit.PAUSE_INSTRUCTION), 0, 0, 0, 0
    if kind < 0.40 and not on.svm:
        return vcpu, int(fx.VmxExit.PREEMPTION_TIMER), 0, 0, 0, 0
    if kind < 0.50:
        return vcpu, on.wrmsr, 0x830, write, icr(rng), 0
    if kind < 0.60:
        return vcpu, on.interrupt, 0, 0, 0, 0
    if kind < 0.65:
        return vcpu, on.rdmsr, rng.choice((0x839, 0x838, 0x6E0)), 0, 0, 0
    mode = rng.choice((0, 0, r.LVT_TIMER_PERIODIC, r.LVT_TIMER_DEADLINE, r.LVT_TIMER_DEADLINE, 0x60000))
    msr, value = rng.choice(
        (
            (0x832, mode | rng.choice((0xEC, 0xEC, 0x41, r.LVT_MASKED | 0xEC))),
            (0x838, rng.choice((0, 1, 500, 100_000, 0xFFFF_FFFF))),
            (0x838, rng.choice((500, 100_000))),
            (0x838, rng.choice((500, 100_000))),
            (0x838, rng.choice((500, 100_000))),
            (0x83E, rng.choice((0, 3, 0xB))),
            (0x6E0, rng.choice((0, 1, now + 700, now + 200_000, now + (1 << 38), 1 << 62))),
            (0x6E0, now + rng.choice((700, 200_000))),
            (0x808, rng.choice((0, 0, 0xF0))),
            (0x80B, 0),
            (0x80F, rng.choice((0x1FF,) * 9 + (0xFF,))),
        )
    )
    return vcpu, on.wrmsr, msr, write, value, 0


def assert_equal(one: fx.Machine, other: fx.Machine, where: object = None) -> None:
    """Trace lines and every byte of a snapshot agree.

    Lines and snapshots are made of words, so they are only made to tell words apart that differ.
    """
    if not np.array_equal(*(m.words[L.TRACE : L.TRACE + len(m.trace) * L.TRACE_STRIDE] for m in (one, other))):
        assert one.trace.lines() == other.trace.lines(), where
    if not all(np.array_equal(a, b) for a, b in zip(rows(one), rows(other), strict=True)):
        assert one.snapshot() == other.snapshot(), where


def rows(m: fx.Machine) -> list[np.ndarray]:
    """The parts of a machine's memory that a snapshot is made of."""
    return [m.words[part] for part in snapshot.regions(int(m.words[L.H_NVCPUS]))]


COMPILED = [
    pytest.param(vendor, row, id=f"{vendor}-{row.name}")
    for vendor, table in (("vmx", VMX), ("svm", SVM))
    for row in table.values()
    if row.operation
]


def hypercall(rng: random.Random) -> tuple[int, int, int, int]:
    """What a record has of one of Hyper-V's hypercalls: two halves of RCX, RDX, R8."""
    code = rng.choice((0xB, 0xB, 0xB, 0x15, 0x15, 0x15, 0x8, 0x5C, 0x5D, 2, 3, 0x13, 0x14, 0x8001, 0x8041, 0x99))
    low = code | rng.choice((0, 0, 1)) << 16 | rng.choice((0, 0, 0, 1, 2)) << 17 | rng.choice((0, 0, 0, 0, 1)) << 27
    high = rng.choice((0, 0, 0, 0, 1, 1 << 16, 0x5000))
    given = rng.choice((0x41, 0x41, 0x5, 0xFF, 0x100, 1 << 32 | 0x41, CALL_INPUT, CALL_INPUT, CALL_INPUT + 9, 1 << 40))
    return low, high, given, rng.choice((0, 1, 2, 0b110, 0x1F, rng.getrandbits(64)))


CALL_INPUT = 0x7000
"""Where inputs of slow hypercalls lie, in a machine that has some there."""


def record_of(rng: random.Random, vendor: str, row: Row, now: int) -> tuple[int, int, int, int, int, int]:
    """An exit of a row, with anything that belongs to it."""
    msr = rng.choice((0x830, 0x830, 0x808, 0x80B, 0x832, 0x6E0, 0x1B, 0x10))
    value = rng.choice((icr(rng), 0, rng.randrange(256), now + 700, rng.getrandbits(64)))
    info, gpa = rng.choice((0, 1)), 0
    if row.operation is Op.MMIO:
        offset = rng.choice((0x20, 0x80, 0xB0, 0x300, 0x310, 0x380, 0x302, 0xFFC))
        gpa = rng.choice((*(PAGE + offset for _ in range(9)), *DEVICES))
        info = rng.choice((1, 2, 4, 4)) | rng.choice((0, L.MMIO_WRITE))
        value &= (1 << 8 * (info & 7)) - 1
    elif row.operation is Op.IO:
        info = rng.choice(Numbers(vendor).io_infos)
    elif row.operation is Op.HYPERCALL:
        msr, info, value, gpa = hypercall(rng)
    return rng.randrange(4), int(row.reason), msr, info, value, gpa


def alone(m: fx.Machine, record: np.void, *, by_number: bool = False) -> tuple[int | None, int]:
    """One exit through the single door: its outcome code (None where that door gives none) and its second word.

    That is what was read, or whom the effects of an exit that reads nothing are for. ``by_number``: reads by Vcpu.exit,
    which has their outcome code, and not by the method for the instruction.
    """
    on = Numbers(m.vendor)
    vcpu, reason, msr, info, value, gpa = (int(record[name]) for name in L.EXIT.names)
    v = m.vcpus[vcpu]
    if reason == L.NOTIFICATION:
        return CODE_HARDWARE if v.hw_notify() else 0, 0
    if reason == on.wrmsr and (info or not on.svm):
        return v.wrmsr(msr, value).code, targets(v)
    if reason == on.rdmsr and by_number:
        return v.exit(reason, msr=msr, info1=info).code, v.read_data
    if reason == on.rdmsr:
        try:
            return None, v.rdmsr(msr)
        except fx.GeneralProtection:
            return None, 0
    if reason == on.page and info & L.MMIO_WRITE:
        return v.mem_write(gpa, value, info & ~L.MMIO_WRITE).code, targets(v)
    if reason == on.page and by_number:
        return v.exit(reason, gpa=gpa, size=info).code, v.read_data
    if reason == on.page:
        return None, v.mem_read(gpa, info)
    if reason in on.memory:
        write = bool(info & L.MMIO_WRITE)
        out = v.exit(reason, gpa=gpa, size=info & ~L.MMIO_WRITE, write=write, value=value)
        return out.code, targets(v) if write else v.read_data
    if reason == m.dispatcher.vendor.hypercall_reason:
        return v.exit(reason, rcx=info << 32 | msr, rdx=value, r8=gpa).code, targets(v)
    out = v.exit(reason, msr=msr, value=value, info1=info)
    reads = reason == on.io and not m.dispatcher.vendor.io_access(info).write
    return out.code, v.read_data if reads else targets(v)


def targets(v: fx.Vcpu) -> int:
    """Number of targets of the last exit and the first one, as layout.OUTCOME says."""
    told = v.targets
    return len(told) << 32 | told[0].effect << 12 | told[0].vcpu if told else 0
