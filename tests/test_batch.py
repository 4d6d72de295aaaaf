"""The batch door: Machine.run does what the same exits do one at a time, to the last byte."""

from __future__ import annotations

import random
import threading
import time
from typing import Any

import numpy as np
import pytest

import fastexit as fx
from conftest import INTERPRETED
from fastexit import layout as L
from fastexit import regs as r
from fastexit.exits.table import Row
from fastexit.jit import declare
from fastexit.kernels.loop import SVM_ROWS, VMX_ROWS
from fastexit.traits import Trait
from generations import DRAWN, having, offered
from storms import (
    COMPILED,
    EXITS,
    PV_EOI,
    VENDORS,
    Numbers,
    alone,
    assert_equal,
    between,
    build,
    record_of,
    storm,
    timer_exit,
)


def assert_same(together: fx.Machine, single: fx.Machine, exits: np.ndarray) -> None:
    """Runs the exits both ways; outcomes, values, traces and every byte of the machines agree."""
    outcomes = together.run(exits)
    for i, record in enumerate(exits):
        code, value = alone(single, record, by_number=i % 2 == 0)
        if code is not None:
            got = fx.OUTCOMES[int(outcomes[i]["code"])]
            assert got == fx.OUTCOMES[code], f"exit {i}: {record} gave {got}, alone {fx.OUTCOMES[code]}"
        assert outcomes[i]["value"] == value, f"exit {i}: {record}"
    assert_equal(together, single)


def test_a_difference_would_show() -> None:
    """The comparison is not blind: a word of a register page and one of a trace record count, a list of targets not."""
    one, other = (build("6.18", "vmx", True, 7, traced=True) for _ in range(2))
    for m in (one, other):
        m.run(storm(7, "vmx"))
    assert_equal(one, other)
    assert one.trace.lines()
    for word in (L.PAGE + (r.APIC_TMICT >> 3), L.FILTER, L.TRACE + 1):
        other.words[word] ^= np.uint64(1)
        with pytest.raises(AssertionError):
            assert_equal(one, other)
        other.words[word] ^= np.uint64(1)
    other.words[L.KVM + L.K_TARGETS] += np.uint64(1)
    assert_equal(one, other)


@pytest.mark.parametrize("apicv", [True, False], ids=["apicv", "plain"])
@pytest.mark.parametrize("vendor", VENDORS)
@pytest.mark.parametrize("kernel", DRAWN)
def test_batch_is_one_at_a_time(kernel: str, vendor: str, apicv: bool) -> None:
    """A storm of all kinds of exits over unlike vCPUs: the same outcomes, trace lines and bytes either way."""
    for seed in (1,) if INTERPRETED else (1, 2, 3):
        exits = storm(seed, vendor)
        machines = [build(kernel, vendor, apicv, seed) for _ in range(2)]
        rng = random.Random(seed)
        for first in range(0, EXITS, EXITS // 4):
            assert_same(*machines, exits[first : first + EXITS // 4])
            between(rng, machines)


def run_out(together: fx.Machine, single: fx.Machine, now: int) -> np.ndarray:
    """Moves the clocks alone; the exits of those whose preemption timers have run out by then, perhaps long ago."""
    together.mem[L.H_NOW] = single.mem[L.H_NOW] = now
    exits, index = [], declare.load("hv_timer_exit")(together.handle, 0)
    while index != L.NONE:
        exits.append((index, int(fx.VmxExit.PREEMPTION_TIMER), 0, 0, 0, 0))
        index = declare.load("hv_timer_exit")(together.handle, index + 1)
    return np.array(exits, dtype=fx.EXIT)


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
@pytest.mark.parametrize("kernel", DRAWN)
def test_batch_with_timers(kernel: str, vendor: str, options: dict[str, Any]) -> None:
    """Halts, preemption timers and PAUSE with timers armed, and time that passes in between: the same either way."""
    rng = random.Random(f"{kernel} {vendor} {options}")
    on = Numbers(vendor)
    together, single = (build(kernel, vendor, seed=8, **options) for _ in range(2))
    for _ in range(3 if INTERPRETED else 30):
        exits = np.array([timer_exit(rng, on, together.time) for _ in range(12)], dtype=fx.EXIT)
        assert_same(together, single, exits)
        between(rng, (together, single))
        assert together.next_timer() == single.next_timer()
        later = together.next_timer() or 0
        now = max(together.time, min(later, together.time + 2_000_000)) + rng.choice((0, 0, 1, 400_000))
        if rng.random() < 0.5:
            assert_same(together, single, run_out(together, single, now))
        happened = together.set_time(now)
        assert happened == single.set_time(now)
        for index, out in happened:
            if out.effects & fx.Effect.WAKE:
                assert together.vcpus[index].run() is single.vcpus[index].run()
        assert together.trace.lines() == single.trace.lines()
        together.trace.clear()
        single.trace.clear()
    assert together.snapshot() == single.snapshot()


def random_machines(rng: random.Random, kernel: str, vendor: str) -> tuple[fx.Machine, fx.Machine]:
    """Two equal machines, of any configuration that matters to an exit, and anywhere in what their vCPUs are doing."""
    apicv, seed = rng.random() < 0.5, rng.randrange(1000)
    before = storm(seed, vendor, 20)
    pair = build(kernel, vendor, apicv, seed), build(kernel, vendor, apicv, seed)
    for m in pair:
        words = random.Random(seed)
        m.run(before)
        for v in m.vcpus[:4]:
            v.set_msr(0x832, r.LVT_TIMER_DEADLINE | 0xEC)
            v.set_msr(0x6E0, words.choice((0, m.time + 1, m.time + 5000)))
            m.mem[v.own + L.K_PV_EOI_FLAG] = words.randrange(2)
            if v.get_mp_state() == r.MP_RUNNABLE and words.random() < 0.2:
                v.run()
                m.mem[v.own + L.K_FORCE_EXIT] = 1
    return pair


@pytest.mark.parametrize("kernel", DRAWN)
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
        assert_equal(together, single)


@pytest.mark.parametrize("lvtt", [0xEC, r.LVT_MASKED | 0xEC], ids=["ticks", "masked"])
@pytest.mark.parametrize("apicv", [True, False], ids=["apicv", "plain"])
@pytest.mark.parametrize("kernel", fx.profiles())
def test_a_period_that_ran_out_behind_a_tick(kernel: str, apicv: bool, lvtt: int) -> None:
    """A preemption timer that is late by periods takes the guest out once more before its first instruction."""
    together, single = machines = [fx.Machine(vcpus=1, kernel=kernel, apicv=apicv) for _ in range(2)]
    for m in machines:
        m.boot_x2apic()
        m.trace.enable()
        (v,) = m.vcpus
        for msr, value in ((0x83E, 0xB), (0x832, r.LVT_TIMER_PERIODIC | lvtt), (0x838, 300_000)):
            v.wrmsr(msr, value)
    # where periods are not skipped, the hrtimer counts from the first exit on
    skips = kernel in having(Trait.TIMER_NO_CATCH_UP)
    for now, ran_out in ((1_000_000, 1), (1_100_000, 0), (5_000_000, skips)):
        exits = run_out(together, single, now)
        assert len(exits) == ran_out
        assert_same(together, single, exits)
        assert not skips or (together.next_timer() or 0) > now


@pytest.mark.parametrize("vendor", VENDORS)
@pytest.mark.parametrize("kernel", fx.profiles())
def test_a_guest_ends_its_interrupt_by_pv_eoi(kernel: str, vendor: str) -> None:
    """The next exit, by whichever door, takes the interrupt out of service; any later one finds nothing to take."""
    machines = [fx.Machine(vcpus=1, kernel=kernel, vendor=vendor, apicv=False) for _ in range(2)]
    for m in machines:
        m.boot_x2apic()
        (v,) = m.vcpus
        v.rflags |= r.RFLAGS_IF
        assert v.set_msr(r.MSR_KVM_PV_EOI_EN, PV_EOI)
        assert m.signal_msi(0xFEE0_0000, 0x41) == 1
        assert v.run()
        assert (v.injected, v.pv_eoi) == (0x41, True)
        v.pv_eoi = False
    read = Numbers(vendor).rdmsr, 0x812, 0, 0, 0  # ISR, of vectors 0x40 to 0x5F
    assert_same(*machines, np.array([(0, *read)] * 2, dtype=fx.EXIT))
    assert machines[0].vcpus[0].read_data == 0


@pytest.mark.parametrize("vendor", VENDORS)
def test_reasons_behind_the_last_of_the_table(vendor: str) -> None:
    """No row is looked for where there is none."""
    behind = len(SVM_ROWS if vendor == "svm" else VMX_ROWS)
    machines = [build("6.18", vendor, True, 9) for _ in range(2)]
    reasons = (behind, behind + 1, 0xFFF0, 0x7FFF_FFFF)
    assert_same(*machines, np.array([(0, reason, 0, 0, 0, 0) for reason in reasons], dtype=fx.EXIT))


@pytest.mark.parametrize("vendor", VENDORS)
@pytest.mark.parametrize("kernel", fx.profiles())
def test_batch_of_another_configuration(kernel: str, vendor: str) -> None:
    """One owner, split irqchip, 32-bit ids, no hashing, no MMIO hole, no fast path: still the same."""
    options = {"threads": False, "irqchip": "split", "x2apic_api": 3, "vector_hashing": False, "cmci": True}
    options |= {"disable_quirks": r.QUIRK_LAPIC_MMIO_HOLE}
    machines = [build(kernel, vendor, True, 3, **offered(kernel, options)) for _ in range(2)]
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


# ---------------------------------------------------------------------------------------------------- devices' lines


@pytest.mark.parametrize("options", [{}, {"apicv": False}, {"threads": False}, {"irqchip": "split"}, {"vendor": "svm"}])
def test_lines_of_devices(options: dict[str, Any]) -> None:
    """A record of a line does what irq_line does, between exits of the vCPUs that it interrupts."""
    one, many = (fx.Machine(vcpus=3, **options) for _ in range(2))
    for m in (one, many):
        m.boot_x2apic()
        m.set_gsi_routing([("msi", 30, 0xFEE0_2000, 0x61), ("msi", 31, 0xFEE0_0000, 0x8062)])
        if options.get("irqchip") != "split":
            routes = [("ioapic", 4, 4), ("ioapic", 17, 17), ("pic", 4, 0, 4), ("msi", 30, 0xFEE0_2000, 0x61)]
            m.set_gsi_routing(routes)
            for pin, entry in ((4, 1 << 56 | 0x34), (17, 0x8041)):
                for half in (0, 1):
                    m.vcpus[0].mem_write(0xFEC0_0000, 0x10 + 2 * pin + half)
                    m.vcpus[0].mem_write(0xFEC0_0010, entry >> 32 * half & 0xFFFF_FFFF)
    rng = random.Random(7)
    wrmsr = one.dispatcher.vendor.wrmsr_reason
    records = []
    for _ in range(200):
        if rng.random() < 0.6:
            gsi, level = rng.choice([4, 17, 30, 31, 99, 5000, 0xFFFF_FFFF]), rng.choice([0, 1, 1, 0xFFFF_FFFF])
            records.append((rng.randrange(3), L.IRQ_LINE, gsi, level, 0, 0))
        else:
            info = int(options.get("vendor") == "svm")
            records.append((rng.randrange(3), wrmsr, 0x80B, info, 0, 0))
    outcomes = many.run(np.array(records, dtype=L.EXIT))
    for (v, reason, where, info, _, _), outcome in zip(records, outcomes, strict=True):
        if reason == L.IRQ_LINE:
            assert one.irq_line(where, info) == outcome["accepted"]
            told = [(int(outcome["value"]) & 0xFFF, int(outcome["value"]) >> 12 & 0xF)]
            assert told[: int(outcome["value"]) >> 32 > 0] == list(one.targets)[:1]
        else:
            assert one.vcpus[v].wrmsr(where, 0).code == outcome["code"]
    assert many.snapshot() == one.snapshot()
    assert not many.words[L.HOST_BUSY]
