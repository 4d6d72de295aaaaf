"""The batch door: Machine.run does what the same exits do one at a time, to the last byte."""

from __future__ import annotations

import os
import random
import threading
import time
from typing import Any

import numpy as np
import pytest

import fastexit as fx
from fastexit import layout as L
from fastexit import regs as r
from fastexit.exits.table import SVM, VMX, Op, Row
from fastexit.outcome import CODE_HARDWARE

INTERPRETED = os.environ.get("NUMBA_DISABLE_JIT", "0") not in ("", "0")
EXITS = 60 if INTERPRETED else 400
VENDORS = ("vmx", "svm")
IDS = (0, 1, 2, 5, 300)
PAGE = r.APIC_DEFAULT_PHYS_BASE
FAST = 0xFEB0_0000
DEVICES = (FAST, FAST + 4, 0xFEC0_0000, PAGE - 1, PAGE, PAGE + 0x30, PAGE + 0x1000, 0, (1 << 48) - 1)
"""Addresses with an ioeventfd, with nothing, and around the page."""


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
        self.io_infos = (0x0060_0010, 0x03F8_0021, 0xFFFF_0041) if svm else (0x0060_0000, 0x03F8_0009, 0xFFFF_0003)
        self.others = [
            int(reason)
            for reason in (
                (fx.SvmExit.HLT, fx.SvmExit.VINTR, fx.SvmExit.CPUID, fx.SvmExit.READ_DR0, fx.SvmExit.SHUTDOWN)
                if svm
                else (fx.VmxExit.HLT, fx.VmxExit.INTERRUPT_WINDOW, fx.VmxExit.CPUID, fx.VmxExit.RDPMC, 0xFFF0)
            )
        ]


def build(kernel: str, vendor: str, apicv: bool, seed: int, **options: Any) -> fx.Machine:
    """A machine whose vCPUs differ in mode, interrupt flag and single stepping; the same for the same arguments."""
    rng = random.Random(seed)
    m = fx.Machine(apic_ids=IDS, kernel=kernel, vendor=vendor, apicv=apicv, smm=True, **options)
    m.boot_x2apic()
    for v in m.vcpus:
        v.rflags |= rng.choice((0, r.RFLAGS_IF))
    m.vcpus[1].rflags |= r.RFLAGS_TF
    m.vcpus[2].singlestep = True
    m.vcpus[3].set_msr(0x1B, 0xFEE0_0800)
    m.vcpus[4].nested = True
    m.fast_mmio.add(FAST)
    m.trace.enable()
    return m


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
    if kind < 0.98:
        return vcpu, on.io, 0, rng.choice(on.io_infos), rng.getrandbits(32), 0
    return vcpu, rng.choice(on.others), 0x830, rng.choice((0, 1)), 0x1000000FD, 0


def storm(seed: int, vendor: str, n: int = EXITS) -> np.ndarray:
    rng = random.Random(seed)
    on = Numbers(vendor)
    return np.array([one(rng, on) for _ in range(n)], dtype=fx.EXIT)


def alone(m: fx.Machine, record: np.void) -> tuple[int | None, int]:
    """One exit through the single door: its outcome code (None where that door gives none) and its second word.

    That is what was read, or whom the effects of an exit that reads nothing are for.
    """
    on = Numbers(m.vendor)
    vcpu, reason, msr, info, value, gpa = (int(record[name]) for name in L.EXIT.names)
    v = m.vcpus[vcpu]
    if reason == L.NOTIFICATION:
        return CODE_HARDWARE if v.hw_notify() else 0, 0
    if reason == on.wrmsr and (info or not on.svm):
        return v.wrmsr(msr, value).code, targets(v)
    if reason == on.rdmsr:
        try:
            return None, v.rdmsr(msr)
        except fx.GeneralProtection:
            return None, 0
    if reason == on.page and info & L.MMIO_WRITE:
        return v.mem_write(gpa, value, info & ~L.MMIO_WRITE).code, targets(v)
    if reason == on.page:
        return None, v.mem_read(gpa, info)
    if reason in on.memory:
        write = bool(info & L.MMIO_WRITE)
        out = v.exit(reason, gpa=gpa, size=info & ~L.MMIO_WRITE, write=write, value=value)
        return out.code, targets(v) if write else v.read_data
    out = v.exit(reason, msr=msr, value=value, info1=info)
    reads = reason == on.io and not m.dispatcher.vendor.io_access(info).write
    return out.code, v.read_data if reads else targets(v)


def targets(v: fx.Vcpu) -> int:
    """Number of targets of the last exit and the first one, as layout.OUTCOME says."""
    told = v.targets
    return len(told) << 32 | told[0].effect << 12 | told[0].vcpu if told else 0


def assert_same(together: fx.Machine, single: fx.Machine, exits: np.ndarray) -> None:
    """Runs the exits both ways; outcomes, values, traces and every byte of the machines agree."""
    outcomes = together.run(exits)
    for i, record in enumerate(exits):
        code, value = alone(single, record)
        if code is not None:
            got = fx.OUTCOMES[int(outcomes[i]["code"])]
            assert got == fx.OUTCOMES[code], f"exit {i}: {record} gave {got}, alone {fx.OUTCOMES[code]}"
        assert outcomes[i]["value"] == value, f"exit {i}: {record}"
    assert together.trace.lines() == single.trace.lines()
    assert together.snapshot() == single.snapshot()


@pytest.mark.parametrize("apicv", [True, False], ids=["apicv", "plain"])
@pytest.mark.parametrize("vendor", VENDORS)
@pytest.mark.parametrize("kernel", fx.profiles())
def test_batch_is_one_at_a_time(kernel: str, vendor: str, apicv: bool) -> None:
    """A storm of all kinds of exits over unlike vCPUs: the same outcomes, trace lines and bytes either way."""
    for seed in (1, 2):
        exits = storm(seed, vendor)
        assert_same(build(kernel, vendor, apicv, seed), build(kernel, vendor, apicv, seed), exits)


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


@pytest.mark.parametrize(
    "options",
    [
        {"apicv": True},
        {"apicv": False},
        {"apicv": False, "timer_advance_ns": 300, "tsc_khz": 2_300_000},
        {"apicv": True, "pi_inject_timer": True, "disable_exits": r.EXITS_HLT, "timer_advance_ns": 300},
        {"apicv": True, "irqchip": "split", "threads": False, "min_timer_period_us": 0},
    ],
    ids=["apicv", "plain", "early", "posted", "split"],
)
@pytest.mark.parametrize("vendor", VENDORS)
@pytest.mark.parametrize("kernel", fx.profiles())
def test_batch_with_timers(kernel: str, vendor: str, options: dict[str, Any]) -> None:
    """Halts, preemption timers and PAUSE with timers armed, and time that passes in between: the same either way."""
    rng = random.Random(f"{kernel} {vendor} {options}")
    on = Numbers(vendor)
    together, single = (build(kernel, vendor, seed=8, **options) for _ in range(2))
    for _ in range(3 if INTERPRETED else 30):
        exits = np.array([timer_exit(rng, on, together.time) for _ in range(12)], dtype=fx.EXIT)
        assert_same(together, single, exits)
        assert together.next_timer() == single.next_timer()
        later = together.next_timer() or 0
        now = max(together.time, min(later, together.time + 2_000_000)) + rng.choice((0, 0, 1, 400_000))
        happened = together.set_time(now)
        assert happened == single.set_time(now)
        for index, out in happened:
            if out.effects & fx.Effect.WAKE:
                assert together.vcpus[index].run() is single.vcpus[index].run()
        assert together.trace.lines() == single.trace.lines()
        together.trace.clear()
        single.trace.clear()
    assert together.snapshot() == single.snapshot()


COMPILED = [
    pytest.param(vendor, row, id=f"{vendor}-{row.name}")
    for vendor, table in (("vmx", VMX), ("svm", SVM))
    for row in table.values()
    if row.operation
]


def random_machines(rng: random.Random, kernel: str, vendor: str) -> tuple[fx.Machine, fx.Machine]:
    """Two equal machines, of any configuration that matters to an exit, and anywhere in what their vCPUs are doing."""
    options = {
        "apicv": rng.random() < 0.5,
        "retpoline": rng.random() < 0.5,
        "timer_advance_ns": rng.choice((0, 300)),
        "disable_exits": rng.choice((0, r.EXITS_HLT)),
        "irqchip": rng.choice(("full", "split")),
    }
    seed, fastpath = rng.randrange(1000), rng.random() < 0.8
    before = storm(seed, vendor, 20)
    pair = build(kernel, vendor, seed=seed, **options), build(kernel, vendor, seed=seed, **options)
    for m in pair:
        words = random.Random(seed)
        m.fastpath = fastpath
        for v in m.vcpus[:4]:
            v.set_msr(r.MSR_KVM_PV_EOI_EN, words.choice((0, 0x1000 | r.PV_EOI_ENABLED)))
        m.run(before)
        for v in m.vcpus[:4]:
            v.set_msr(0x832, r.LVT_TIMER_DEADLINE | 0xEC)
            v.set_msr(0x6E0, words.choice((0, m.time + 1, m.time + 5000)))
            m.mem[v.own + L.K_PV_EOI_FLAG] = words.randrange(2)
            if v.get_mp_state() == r.MP_RUNNABLE and words.random() < 0.2:
                v.run()
                m.mem[v.own + L.K_FORCE_EXIT] = 1
    return pair


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
    return rng.randrange(4), int(row.reason), msr, info, value, gpa


@pytest.mark.parametrize("kernel", fx.profiles())
@pytest.mark.parametrize(("vendor", "row"), COMPILED)
def test_operation_is_what_the_handlers_do(vendor: str, row: Row, kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every exit with a compiled operation, on machines of all kinds: the same by the batch as by its handlers.

    The batch does it itself: nothing of it goes to Python.
    """
    rng = random.Random(f"{kernel} {vendor} {row.name}")
    for _ in range(1 if INTERPRETED else 12):
        together, single = random_machines(rng, kernel, vendor)
        monkeypatch.setattr(together, "_run_in_python", lambda *_: pytest.fail("the batch left an exit to Python"))
        exits = []
        for _ in range(8):
            exits.append(record_of(rng, vendor, row, together.time))
        records = np.array(exits, dtype=fx.EXIT)
        single.mem[L.H_HANDLERS] = 1  # as if one had been assigned: every exit goes through Python
        for i, (got, expected) in enumerate(zip(together.run(records), single.run(records), strict=True)):
            codes = [fx.OUTCOMES[int(outcome["code"])] for outcome in (got, expected)]
            assert codes[0] == codes[1], f"exit {i}: {records[i]}"
            assert got["value"] == expected["value"], f"exit {i}: {records[i]}"
        single.mem[L.H_HANDLERS] = 0
        assert together.trace.lines() == single.trace.lines()
        assert together.snapshot() == single.snapshot()


@pytest.mark.parametrize("vendor", VENDORS)
def test_batch_of_another_configuration(vendor: str) -> None:
    """One owner, split irqchip, 32-bit ids, no hashing, no MMIO hole, no fast path: still the same."""
    options = {"threads": False, "irqchip": "split", "x2apic_api": 3, "vector_hashing": False, "cmci": True}
    options |= {"disable_quirks": r.QUIRK_LAPIC_MMIO_HOLE}
    machines = [build("6.18", vendor, True, 3, **options) for _ in range(2)]
    for m in machines:
        m.fastpath = False
    assert_same(*machines, storm(3, vendor))


@pytest.mark.parametrize("vendor", VENDORS)
def test_cutting_a_batch_changes_nothing(vendor: str) -> None:
    """One run of many exits, or many runs of few: the same outcomes and the same machine."""
    exits = storm(4, vendor)
    whole, pieces = build("6.18", vendor, True, 4), build("6.18", vendor, True, 4)
    expected = whole.run(exits)
    cuts = [0, 1, 2, len(exits) // 3, len(exits)]
    got = b"".join(pieces.run(exits[a:b]).tobytes() for a, b in zip(cuts, cuts[1:]))
    assert got == expected.tobytes()
    assert whole.snapshot() == pieces.snapshot()


@pytest.mark.parametrize("vendor", VENDORS)
def test_reassigned_handlers_change_nothing(vendor: str) -> None:
    """With a handler assigned every exit goes through Python, with the same results as compiled."""
    exits = storm(5, vendor)
    compiled, python = build("6.18", vendor, True, 5), build("6.18", vendor, True, 5)
    for reason, handler in list(python.handlers.items()):
        python.handlers[reason] = handler
    expected, got = compiled.run(exits), python.run(exits)
    assert [fx.OUTCOMES[int(code)] for code in got["code"]] == [fx.OUTCOMES[int(code)] for code in expected["code"]]
    assert got["value"].tolist() == expected["value"].tolist()
    assert python.trace.lines() == compiled.trace.lines()
    python.mem[L.H_HANDLERS] = 0
    assert python.snapshot() == compiled.snapshot()


def test_own_handler_is_called_from_a_batch() -> None:
    """A handler of one's own sees the batch's exits of its kind, in their order, and may end them in user space."""
    m = fx.Machine(vcpus=2)
    m.boot_x2apic()
    seen: list[tuple[int, int]] = []

    def halt(v: fx.Vcpu, exit: fx.Exit) -> fx.KvmExit:
        seen.append((v.index, len(seen)))
        return fx.KvmExit.HLT

    m.handlers[fx.VmxExit.PAUSE_INSTRUCTION] = halt
    exits = np.array([(1, 40, 0, 0, 0, 0), (0, 32, 0x830, 0, 0x1000000FD, 0), (0, 40, 0, 0, 0, 0)], dtype=fx.EXIT)
    users = [fx.OUTCOMES[int(code)].user for code in m.run(exits)["code"]]
    assert users == [fx.KvmExit.HLT, None, fx.KvmExit.HLT]
    assert seen == [(1, 0), (0, 1)]


@pytest.mark.parametrize(
    "change",
    [
        lambda handlers, mine: handlers.update({31: mine}),
        lambda handlers, mine: handlers.__ior__({31: mine}),
        lambda handlers, mine: (handlers.pop(31), handlers.setdefault(31, mine)),
        lambda handlers, mine: (handlers.clear(), handlers.update({31: mine})),
    ],
    ids=["update", "|=", "pop and setdefault", "clear"],
)
def test_handlers_changed_by_any_dict_method(change: Any) -> None:
    """However the table was changed, the batch door obeys it."""
    m = fx.Machine(vcpus=1)
    change(m.handlers, lambda v, exit: fx.KvmExit.X86_RDMSR)
    (code,) = m.run(np.array([(0, 31, 0x1B, 0, 0, 0)], dtype=fx.EXIT))["code"]
    assert fx.OUTCOMES[int(code)].user is fx.KvmExit.X86_RDMSR


def test_outcome_fields_are_the_outcome() -> None:
    """The named fields of a result are the bytes of its code."""
    m = build("6.18", "vmx", True, 6)
    for result in m.run(storm(6, "vmx")):
        out = fx.OUTCOMES[int(result["code"])]
        assert result["completion"] == out.completion
        assert result["path"] == out.path
        assert result["fault"] == (out.fault or 0)
        assert result["refusal"] == out.refusal
        assert result["accepted"] == out.accepted
        assert result["user"] == (0 if out.user is None else out.user + 1)
        assert result["flags"] == out.effects | out.blocked << 6


@pytest.mark.parametrize("handlers", [False, True], ids=["compiled", "python"])
def test_notification_takes_what_was_posted(handlers: bool) -> None:
    """Between two exits a running target takes its vectors; the next sender finds ON clear and notifies again."""
    m = fx.Machine(vcpus=2)
    m.boot_x2apic()
    sender, target = m.vcpus
    target.rdmsr(0x802)
    m.mem[L.H_HANDLERS] = int(handlers)
    write = (0, int(fx.VmxExit.MSR_WRITE), 0x830, 0, fx.icr(dest=1, vector=0x41), 0)
    other = (0, int(fx.VmxExit.MSR_WRITE), 0x830, 0, fx.icr(dest=1, vector=0xF0), 0)
    take = (1, L.NOTIFICATION, 0, 0, 0, 0)
    got = m.run(np.array([write, other, take, write, take], dtype=fx.EXIT))
    assert got["path"].tolist() == [fx.Path.FAST, fx.Path.FAST, fx.Path.HARDWARE, fx.Path.FAST, fx.Path.HARDWARE]
    assert got["flags"].tolist() == [fx.Effect.NOTIFY, 0, 0, fx.Effect.NOTIFY, 0]
    told = 1 << 32 | fx.Effect.NOTIFY << 12 | target.index
    assert got["value"].tolist() == [told, 0, 0, told, 0]
    assert m.mem[target.hot + L.PID_CONTROL_WORD] & r.PID_ON == 0
    assert [v for v in range(256) if m.mem[L.VEC + L.VEC_STRIDE + L.VEC_IRR + (v >> 6)] >> (v & 63) & 1] == [0x41, 0xF0]
    assert m.mem[target.vec + L.VEC_RVI] == 0xF0


@pytest.mark.parametrize("handlers", [False, True], ids=["compiled", "python"])
def test_notification_outside_the_guest_does_nothing(handlers: bool) -> None:
    """The host's handler of 0xF2 is idle: PIR and ON stay for the entry."""
    m = fx.Machine(vcpus=2)
    m.boot_x2apic()
    m.mem[L.H_HANDLERS] = int(handlers)
    m.vcpus[0].wrmsr(0x830, fx.icr(dest=1, vector=0x41))
    before = m.snapshot()
    (got,) = m.run(np.array([(1, L.NOTIFICATION, 0, 0, 0, 0)], dtype=fx.EXIT))
    assert (got["code"], got["value"]) == (0, 0)
    assert m.snapshot() == before


def test_empty_batch() -> None:
    """No exits, no outcomes, nothing changes."""
    m = fx.Machine(vcpus=1)
    before = m.snapshot()
    assert m.run(np.empty(0, dtype=fx.EXIT)).shape == (0,)
    assert m.snapshot() == before


def test_strided_and_read_only_exits() -> None:
    """Exits may be a view with gaps, and read-only: they are read, never written."""
    exits = storm(7, "vmx", 20)
    kept = exits.copy()
    exits.flags.writeable = False
    a, b = build("6.12", "vmx", True, 7), build("6.12", "vmx", True, 7)
    assert a.run(exits[::2]).tobytes() == b.run(exits[::2].copy()).tobytes()
    assert (exits == kept).all()


@pytest.mark.skipif(INTERPRETED, reason="interpreted kernels are Python, they cannot release the GIL")
def test_batch_releases_the_gil() -> None:
    """While one batch runs, another Python thread runs in the middle of it."""
    m = fx.Machine(vcpus=2)
    m.boot_x2apic()
    exits = np.zeros(1_000_000, dtype=fx.EXIT)
    exits["reason"], exits["msr"], exits["value"] = fx.VmxExit.MSR_WRITE, 0x830, fx.icr(dest=1, vector=0xFD)
    m.run(exits[:10])
    ticks: list[float] = []
    stop = threading.Event()

    def tick() -> None:
        while not stop.is_set():
            ticks.append(time.perf_counter())
            time.sleep(0.0005)

    thread = threading.Thread(target=tick)
    thread.start()
    try:
        for _ in range(50):
            start = time.perf_counter()
            m.run(exits)
            quarter = (time.perf_counter() - start) / 4
            if any(start + quarter < t < start + 3 * quarter for t in ticks):
                break
        else:
            raise AssertionError("no other thread ran inside any of 50 batches")
    finally:
        stop.set()
        thread.join()
