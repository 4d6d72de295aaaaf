"""The local APIC timer on the host's hrtimer: modes, counts, ticks, and what stops, keeps or moves them."""

from __future__ import annotations

import random
import struct
from typing import Any

import pytest

import fastexit as fx
from fastexit import layout as L
from fastexit import regs as r
from fastexit.profile import since
from fastexit.traits import Trait
from generations import having

LVTT, TMICT, TMCCT, TDCR, SVR, DEADLINE = 0x832, 0x838, 0x839, 0x83E, 0x80F, 0x6E0
TICK = 0xEC
PERIODIC, DEADLINE_MODE, MASKED = r.LVT_TIMER_PERIODIC, r.LVT_TIMER_DEADLINE, r.LVT_MASKED
BY_ONE = 0xB
"""TDCR for a divisor of 1: a count is a bus cycle, here a ns."""


def booted(kernel: str = "6.18", vendor: str = "vmx", **options: Any) -> fx.Machine:
    """vCPUs in the guest, interrupts off, whose timers are hrtimers that count in ns."""
    options = {"vcpus": 1, "apicv": False} | options
    if vendor == "vmx":
        options.setdefault("hv_timer", False)
    m = fx.Machine(kernel=kernel, vendor=vendor, **options)
    m.boot_x2apic()
    for v in m.vcpus:
        v.wrmsr(TDCR, BY_ONE)
    return m


def run(v: fx.Vcpu) -> None:
    """An exit that stays in the kernel, so the run loop goes round once."""
    v.exit(fx.SvmExit.INTERRUPT if v.machine.vendor == "svm" else fx.VmxExit.EXTERNAL_INTERRUPT)


def in_irr(v: fx.Vcpu, vector: int = TICK) -> bool:
    (word,) = struct.unpack_from("<I", v.get_lapic(), r.APIC_IRR + 0x10 * (vector // 32))
    return bool(word >> vector % 32 & 1)


def ticked(v: fx.Vcpu) -> bool:
    """Takes the tick out of IRR, if the run loop put one there."""
    run(v)
    got = v.ack() == TICK
    if got:
        v.eoi()
    return got


def saved_count(v: fx.Vcpu) -> int:
    """TMCCT of KVM_GET_LAPIC's page."""
    return struct.unpack_from("<I", v.get_lapic(), r.APIC_TMCCT)[0]


def start(v: fx.Vcpu, count: int, mode: int = 0) -> None:
    v.wrmsr(LVTT, mode | TICK)
    v.wrmsr(DEADLINE if mode == DEADLINE_MODE else TMICT, count)


# ----------------------------------------------------------------------------------------------------------- the modes


@pytest.mark.parametrize("vendor", ["vmx", "svm"])
@pytest.mark.parametrize("kernel", fx.profiles())
def test_one_shot(kernel: str, vendor: str) -> None:
    """The count runs down once; the host's hrtimer kicks the vCPU, whose run loop makes the tick an interrupt."""
    m = booted(kernel, vendor)
    (v,) = m.vcpus
    start(v, 1000)
    assert m.next_timer() == 1000
    assert m.set_time(999) == []
    assert v.rdmsr(TMCCT) == 1
    ((index, out),) = m.set_time(1000)
    assert (index, out.effects) == (0, fx.Effect.KICK)
    assert v.requests & r.REQ_UNBLOCK
    assert ticked(v)
    assert v.rdmsr(TMCCT) == 0
    assert v.rdmsr(TMICT) == 1000
    assert m.next_timer() is None
    assert m.set_time(1 << 40) == []
    assert not ticked(v)


@pytest.mark.parametrize("kernel", fx.profiles())
def test_periodic(kernel: str) -> None:
    """Tick after tick, a period apart however late the last one was fetched."""
    m = booted(kernel)
    (v,) = m.vcpus
    start(v, 300_000, PERIODIC)
    for n in range(1, 5):
        assert m.next_timer() == n * 300_000
        m.set_time(n * 300_000 - 1)
        assert not ticked(v)
        assert len(m.set_time(n * 300_000)) == 1
        assert v.rdmsr(TMCCT) == 300_000, "a full period is left, not none"
        m.set_time(n * 300_000 + 100_000)
        assert v.rdmsr(TMCCT) == 200_000
        assert ticked(v)


@pytest.mark.parametrize("hv_timer", [False, True], ids=["hrtimer", "preemption timer"])
@pytest.mark.parametrize("mode", [0, PERIODIC], ids=["one-shot", "periodic"])
@pytest.mark.parametrize("kernel", fx.profiles())
def test_count_begins_whole(kernel: str, mode: int, hv_timer: bool) -> None:
    """At the ns of its start a count reads as it was written, however it is read: 0 would say that it has run out."""
    m = booted(kernel, hv_timer=hv_timer)
    (v,) = m.vcpus
    m.set_time(12_345)
    start(v, 300_000, mode)
    assert v.hv_timer is hv_timer
    assert v.rdmsr(TMCCT) == 300_000
    assert v.get_msr(TMCCT) == 300_000
    saved = since(kernel, "5.8")
    assert saved_count(v) == 300_000 * saved
    m.set_time(12_346)
    assert (v.get_msr(TMCCT), saved_count(v)) == (299_999, 299_999 * saved)
    v.run()
    m.set_time(312_345)
    left = 300_000 if mode else 0
    assert v.rdmsr(TMCCT) == left
    assert saved_count(v) == left * saved


@pytest.mark.parametrize("tdcr", [BY_ONE, 0, 0xA])
@pytest.mark.parametrize("bus_cycle_ns", [1, 10])
def test_count_begins_whole_in_any_unit(bus_cycle_ns: int, tdcr: int) -> None:
    """Divisor and bus cycle scale the time and not the count, to the largest one and in the xAPIC page."""
    m = booted(bus_cycle_ns=bus_cycle_ns)
    (v,) = m.vcpus
    v.wrmsr(TDCR, tdcr)
    for count in (1, 2, 0xFFFF_FFFF):
        start(v, count)
        assert (v.rdmsr(TMCCT), saved_count(v)) == (count, count)
    v.set_msr(r.MSR_APICBASE, 0xFEE0_0900)
    v.set_msr(r.MSR_APICBASE, 0xFEE0_0100 | r.APICBASE_EN)
    v.mmio_write(r.APIC_TMICT, 700)
    assert v.mmio_read(r.APIC_TMCCT) == 700


def test_count_of_several_whole_periods() -> None:
    """A stretched period that became one-shot may leave many of the new period: each of them begins whole."""
    m = booted()
    (v,) = m.vcpus
    start(v, 1000, PERIODIC)
    v.wrmsr(LVTT, TICK)
    v.wrmsr(TDCR, 0)  # by 2: 200 us become 400, and a period 2
    assert m.next_timer() == 400_000
    assert (v.rdmsr(TMCCT), saved_count(v)) == (1000, 1000)
    m.set_time(1)
    assert v.rdmsr(TMCCT) == 999
    m.set_time(2000)
    assert v.rdmsr(TMCCT) == 1000


@pytest.mark.parametrize("khz", [1_000_000, 2_500_000, 333, 1])
def test_deadline(khz: int) -> None:
    """The tick comes when the guest's TSC is there; the MSR reads as written until the tick is delivered."""
    m = booted(tsc_khz=khz)
    (v,) = m.vcpus
    v.wrmsr(LVTT, DEADLINE_MODE | TICK)
    v.wrmsr(DEADLINE, 5 * khz)
    assert m.next_timer() == 5_000_000
    assert m.set_time(4_999_999) == []
    assert len(m.set_time(5_000_000)) == 1
    assert v.rdmsr(DEADLINE) == 5 * khz
    assert v.rdmsr(DEADLINE) == 0, "the run loop behind the first read has delivered the tick"
    assert in_irr(v)


def test_deadline_reads_back_until_delivered() -> None:
    """The host reads a deadline that has passed as long as KVM_RUN has not delivered its tick."""
    m = booted()
    (v,) = m.vcpus
    start(v, 5000, DEADLINE_MODE)
    v.get_msr(DEADLINE)  # outside the guest a tick waits for the next KVM_RUN
    m.set_time(5000)
    assert v.get_msr(DEADLINE) == 5000
    run(v)
    assert v.get_msr(DEADLINE) == 0


@pytest.mark.parametrize("value", [1, 5000])
def test_deadline_in_the_past(value: int) -> None:
    """A deadline that has passed already is a tick at once, not lost and not delivered twice."""
    m = booted()
    (v,) = m.vcpus
    m.set_time(5000)
    start(v, value, DEADLINE_MODE)
    assert m.next_timer() is None
    assert ticked(v)
    assert not ticked(v)


def test_deadline_of_zero_disarms() -> None:
    """Writing 0 stops the timer, and takes a tick with it that nobody has delivered yet."""
    m = booted()
    (v,) = m.vcpus
    start(v, 5000, DEADLINE_MODE)
    v.wrmsr(DEADLINE, 0)
    assert m.next_timer() is None
    v.set_msr(DEADLINE, 1)
    assert v.set_msr(DEADLINE, 0)
    assert not ticked(v)


def test_deadline_msr_in_other_modes() -> None:
    """Outside deadline mode a write is dropped in silence and the MSR reads 0."""
    m = booted()
    (v,) = m.vcpus
    assert v.wrmsr(DEADLINE, 5000).fault is None
    assert v.rdmsr(DEADLINE) == 0
    assert m.next_timer() is None


def test_count_in_deadline_mode() -> None:
    """In deadline mode TMICT cannot be written and stays 0, and TMCCT reads 0."""
    m = booted()
    (v,) = m.vcpus
    start(v, 5000, DEADLINE_MODE)
    assert v.wrmsr(TMICT, 77).fault is None
    assert v.rdmsr(TMICT) == 0
    assert v.rdmsr(TMCCT) == 0
    assert m.next_timer() == 5000


def test_deadline_mode_without_cpuid() -> None:
    """Without the CPUID bit, LVTT's bit 18 is no mode: the timer stays what bit 17 says."""
    m = booted(tsc_deadline=False)
    (v,) = m.vcpus
    start(v, 1000, 0)
    v.wrmsr(LVTT, DEADLINE_MODE | TICK)
    assert m.next_timer() == 1000


def test_mode_3_does_not_count() -> None:
    """LVTT's reserved mode can be stored, but a count written then starts nothing; what ran before runs on."""
    m = booted()
    (v,) = m.vcpus
    start(v, 1000)
    v.wrmsr(LVTT, PERIODIC | DEADLINE_MODE | TICK)
    assert m.next_timer() == 1000
    v.wrmsr(TMICT, 2000)
    assert m.next_timer() is None


# --------------------------------------------------------------------------------------------------------- the counting


@pytest.mark.parametrize(
    ("tdcr", "divisor"), [(0, 2), (1, 4), (2, 8), (3, 16), (8, 32), (9, 64), (0xA, 128), (0xB, 1), (0xFFF4, 2)]
)
def test_divide(tdcr: int, divisor: int) -> None:
    """TDCR bits 3, 1, 0 give the divisor; the others are not stored."""
    m = booted()
    (v,) = m.vcpus
    v.wrmsr(TDCR, tdcr)
    assert v.rdmsr(TDCR) == tdcr & 0xB
    start(v, 1000)
    assert m.next_timer() == 1000 * divisor
    m.set_time(250 * divisor)
    assert v.rdmsr(TMCCT) == 750


def test_bus_cycle() -> None:
    """KVM_CAP_X86_APIC_BUS_CYCLES_NS: a count lasts longer, the register counts the same."""
    m = booted(bus_cycle_ns=10)
    (v,) = m.vcpus
    start(v, 1000)
    assert m.next_timer() == 10_000
    m.set_time(2_509)
    assert v.rdmsr(TMCCT) == 749


def test_longest_bus_cycle() -> None:
    """The slowest bus and the largest count and divisor fit the clock: no wrap to a tick at once."""
    largest = 0
    for power in range(40, -1, -1):
        try:
            fx.Machine(vcpus=1, bus_cycle_ns=largest | 1 << power)
        except ValueError:
            continue
        largest |= 1 << power
    m = booted(bus_cycle_ns=largest)
    (v,) = m.vcpus
    v.wrmsr(TDCR, 0xA)
    for mode in (0, PERIODIC):
        start(v, 0xFFFF_FFFF, mode)
        assert m.next_timer() == m.time + largest * 0xFFFF_FFFF * 128
        assert m.set_time((1 << 63) - 1 if mode else 1 << 62) == []
        assert v.rdmsr(TMCCT) > 0


def test_divide_changes_while_it_counts() -> None:
    """The remaining count stays, so the remaining time changes by the ratio; the same divisor changes nothing."""
    m = booted()
    (v,) = m.vcpus
    start(v, 1000)
    m.set_time(400)
    v.wrmsr(TDCR, BY_ONE)
    assert m.next_timer() == 1000
    v.wrmsr(TDCR, 1)
    assert m.next_timer() == 400 + 600 * 4
    assert v.rdmsr(TMCCT) == 600
    v.wrmsr(TDCR, BY_ONE)
    assert m.next_timer() == 1000


def test_divide_restarts_what_had_run_out() -> None:
    """A one-shot timer that is over has a period still: a new divisor makes it tick again at once."""
    m = booted()
    (v,) = m.vcpus
    start(v, 1000)
    m.set_time(1000)
    assert ticked(v)
    v.wrmsr(TDCR, 0)
    assert ticked(v)
    assert not ticked(v)


def test_shortest_period() -> None:
    """Periodic timers below 200 us are stretched; TMICT keeps its value and TMCCT may exceed it."""
    m = booted()
    (v,) = m.vcpus
    start(v, 1000, PERIODIC)
    assert m.next_timer() == 200_000
    assert v.rdmsr(TMICT) == 1000
    m.set_time(50_000)
    assert v.rdmsr(TMCCT) == 150_000
    start(v, 1000)
    assert m.next_timer() == 51_000, "a one-shot timer is not"


def test_other_shortest_periods() -> None:
    """min_timer_period_us is a module parameter; 0 leaves every period alone."""
    assert _first_tick(min_timer_period_us=500) == 500_000
    assert _first_tick(min_timer_period_us=0) == 1000


def _first_tick(**options: Any) -> int | None:
    m = booted(**options)
    start(m.vcpus[0], 1000, PERIODIC)
    return m.next_timer()


def test_a_new_count_starts_over() -> None:
    """A second TMICT forgets the first, an undelivered tick of it too; 0 stops."""
    m = booted()
    (v,) = m.vcpus
    start(v, 1000)
    m.set_time(500)
    v.wrmsr(TMICT, 1000)
    assert m.next_timer() == 1500
    v.get_msr(TMICT)
    m.set_time(1500)
    assert v.set_msr(TMICT, 700)
    assert not ticked(v)
    assert m.next_timer() == 2200
    v.wrmsr(TMICT, 0)
    assert m.next_timer() is None
    assert v.rdmsr(TMCCT) == 0


# ------------------------------------------------------------------------------------------------ masks, modes, disable


def test_expiry_while_masked() -> None:
    """The tick of a masked LVTT waits, and is delivered when the guest unmasks."""
    m = booted()
    (v,) = m.vcpus
    start(v, 1000, MASKED)
    m.set_time(1000)
    run(v)
    assert not in_irr(v)
    v.wrmsr(LVTT, TICK + 1)
    assert v.ack() == TICK + 1, "with the vector that LVTT has then"


def test_ticks_coalesce() -> None:
    """Many periods without delivery are one tick."""
    m = booted()
    (v,) = m.vcpus
    start(v, 200_000, PERIODIC | MASKED)
    for n in range(1, 6):
        m.set_time(n * 200_000)
    v.wrmsr(LVTT, PERIODIC | TICK)
    assert v.ack() == TICK
    v.eoi()
    assert not ticked(v)


def test_one_shot_and_periodic() -> None:
    """Between these two nothing restarts; the mode at expiry counts. Becoming periodic stretches the next period."""
    m = booted()
    (v,) = m.vcpus
    start(v, 1000)
    v.wrmsr(LVTT, PERIODIC | TICK)
    assert m.next_timer() == 1000
    m.set_time(1000)
    assert m.next_timer() == 201_000
    v.wrmsr(LVTT, TICK)
    m.set_time(201_000)
    assert m.next_timer() is None


@pytest.mark.parametrize("there", [0, PERIODIC])
def test_into_deadline_mode_and_back(there: int) -> None:
    """Entering or leaving deadline mode stops the timer and zeroes count and deadline; an undelivered tick goes too."""
    m = booted()
    (v,) = m.vcpus
    start(v, 300_000, there)
    v.wrmsr(LVTT, DEADLINE_MODE | TICK)
    assert m.next_timer() is None
    assert v.rdmsr(TMICT) == 0
    v.set_msr(DEADLINE, 1 if m.time else 0)
    m.set_time(10)
    assert v.set_msr(DEADLINE, 5)
    assert v.set_msr(LVTT, there | TICK)
    assert not ticked(v)
    v.wrmsr(LVTT, DEADLINE_MODE | TICK)
    assert v.rdmsr(DEADLINE) == 0


def test_software_disable() -> None:
    """SVR drops the pending tick and masks LVTT, but what counts goes on, and the deadline reads back."""
    m = booted()
    (v,) = m.vcpus
    start(v, 1000, DEADLINE_MODE)
    v.get_msr(SVR)
    m.set_time(1000)
    assert v.set_msr(SVR, 0xFF)
    assert v.get_msr(DEADLINE) == 1000
    assert v.set_msr(SVR, 0x1FF)
    assert v.set_msr(LVTT, DEADLINE_MODE | TICK)
    assert not ticked(v)
    v.wrmsr(DEADLINE, 2000)
    v.wrmsr(SVR, 0xFF)
    v.wrmsr(SVR, 0x1FF)
    assert len(m.set_time(2000)) == 1
    v.wrmsr(LVTT, DEADLINE_MODE | TICK)
    assert v.ack() == TICK


def test_hardware_disable_keeps_the_tick() -> None:
    """A tick of a hardware-disabled APIC waits until the APIC is enabled again."""
    m = booted()
    (v,) = m.vcpus
    start(v, 1000)
    assert v.set_msr(0x1B, 0xFEE0_0000)
    m.set_time(1000)
    run(v)
    assert not in_irr(v)
    assert v.set_msr(0x1B, 0xFEE0_0D00)
    assert ticked(v)


def test_init_stops_the_timer() -> None:
    """INIT cancels the hrtimer and drops its tick; the registers are those of reset."""
    m = booted(vcpus=2)
    v = m.vcpus[1]
    for late in (True, False):
        start(v, 1000, PERIODIC)
        if late:
            m.set_time(m.time + 200_000)
        m.vcpus[0].wrmsr(0x830, fx.icr(dest=1, delivery=fx.DeliveryMode.INIT, level=True))
        run(v)
        assert v.get_mp_state() == fx.MpState.INIT_RECEIVED
        assert m.next_timer() is None
        assert v.get_msr(TMICT) == 0
        assert v.get_msr(LVTT) == MASKED
        assert v.set_msr(SVR, 0x1FF)
        assert not ticked(v)


# ------------------------------------------------------------------------------------------------------------ migration


def page_of(v: fx.Vcpu, **registers: int) -> bytes:
    page = bytearray(v.get_lapic())
    for name, value in registers.items():
        struct.pack_into("<I", page, getattr(r, f"APIC_{name}"), value)
    return bytes(page)


@pytest.mark.parametrize(
    ("mode", "left", "first"),
    [
        (0, 400, 400),
        (PERIODIC, 250_000, 250_000),
        (PERIODIC, 0, 300_000),
        (PERIODIC, 999_999, 300_000),
        (0, 400_000, 300_000),
    ],
)
def test_restored_timer_goes_on(mode: int, left: int, first: int) -> None:
    """KVM_SET_LAPIC resumes with the TMCCT of the page; 0, or more than a period, is a full period."""
    m = booted()
    (v,) = m.vcpus
    m.set_time(1000)
    v.set_lapic(page_of(v, LVTT=mode | TICK, TMICT=300_000, TMCCT=left))
    assert m.next_timer() == 1000 + first
    assert v.rdmsr(TMCCT) == first
    m.set_time(1000 + first)
    assert ticked(v)
    assert m.next_timer() == (1000 + first + 300_000 if mode else None)


def test_restored_one_shot_that_had_run_out() -> None:
    """A one-shot timer with nothing left ticks at once."""
    m = booted()
    (v,) = m.vcpus
    v.set_lapic(page_of(v, LVTT=TICK, TMICT=300_000, TMCCT=0))
    assert ticked(v)
    assert not ticked(v)


def test_saved_and_restored() -> None:
    """What KVM_GET_LAPIC says of a running timer makes another machine tick at the same time."""
    here, there = booted(), booted()
    start(here.vcpus[0], 300_000, PERIODIC)
    here.set_time(100_000)
    there.set_time(5_000_000)
    there.vcpus[0].set_lapic(here.vcpus[0].get_lapic())
    assert there.next_timer() == 5_200_000


@pytest.mark.parametrize("mode", [0, PERIODIC], ids=["one-shot", "periodic"])
def test_saved_when_it_began_and_restored(mode: int) -> None:
    """A page that was saved at the ns of a start, or of a tick, goes on with the whole count elsewhere."""
    here, there = booted(), booted()
    (v,) = here.vcpus
    start(v, 300_000, mode)
    if mode:
        here.set_time(300_000)
        assert ticked(v)
    there.set_time(5_000_000)
    (other,) = there.vcpus
    other.set_lapic(v.get_lapic())
    assert there.next_timer() == 5_300_000
    assert other.get_msr(TMCCT) == 300_000
    assert not ticked(other)
    assert len(there.set_time(5_300_000)) == 1
    assert ticked(other)


def test_snapshot_keeps_the_timer() -> None:
    """A machine from a snapshot has the clock and its timers."""
    m = booted()
    start(m.vcpus[0], 300_000, PERIODIC)
    m.set_time(100_000)
    again = fx.Machine.restore(m.snapshot())
    assert (again.time, again.next_timer()) == (100_000, 300_000)
    again.set_time(300_000)
    assert ticked(again.vcpus[0])


# ------------------------------------------------------------------------------------------------------------ the clock


def test_set_time_goes_forwards() -> None:
    """The clock stands where it was set; the same time again does nothing, an earlier one is refused."""
    m = booted()
    start(m.vcpus[0], 1000)
    assert len(m.set_time(1000)) == 1
    assert m.set_time(1000) == []
    with pytest.raises(ValueError, match="has passed"):
        m.set_time(999)
    assert m.time == 1000
    for bad in (-1, 1 << 63):
        with pytest.raises(ValueError, match="time"):
            m.set_time(bad)


def test_order_over_vcpus() -> None:
    """Timers fire in the order in which they were due, equal ones by index."""
    m = booted(vcpus=4)
    for v, count in zip(m.vcpus, (3000, 1000, 3000, 2000), strict=True):
        start(v, count)
    assert m.next_timer() == 1000
    assert [index for index, _ in m.set_time(5000)] == [1, 3, 0, 2]
    assert all(ticked(v) for v in m.vcpus)


@pytest.mark.parametrize("kernel", fx.profiles())
def test_late_by_many_periods(kernel: str) -> None:
    """Where it does not catch up, a timer ticks once at once and counts from now; else it stays on its beat."""
    m = booted(kernel)
    (v,) = m.vcpus
    start(v, 300_000, PERIODIC)
    fired = m.set_time(1_000_000)
    assert {index for index, _ in fired} == {0}
    assert m.next_timer() == (1_300_000 if kernel in having(Trait.TIMER_NO_CATCH_UP) else 1_200_000)
    assert ticked(v)
    assert not ticked(v)


def test_late_by_centuries() -> None:
    """The longest leap the clock can make ends, whatever the period, in every generation."""
    for kernel in fx.profiles():
        m = booted(kernel, min_timer_period_us=0)
        start(m.vcpus[0], 1, PERIODIC)
        assert 1 <= len(m.set_time((1 << 63) - 1)) <= 2
        assert m.next_timer() == 1 << 63


@pytest.mark.parametrize(
    ("khz", "now", "count"),
    [
        (10_000_000, 10**9, 1_717_986_919),
        (3_000_000, 10**9, 2_863_311_531),
        (2_500_000, 2 * 10**9, 3_435_973_836),
    ],
)
@pytest.mark.parametrize("mode", [0, PERIODIC])
def test_periods_of_centuries(khz: int, now: int, count: int, mode: int) -> None:
    """A period that is longer than 64 bits of TSC does not end at once; the hrtimer counts it in ns."""
    m = booted(tsc_khz=khz, bus_cycle_ns=1 << 24, hv_timer=True)
    (v,) = m.vcpus
    v.wrmsr(TDCR, 0xA)  # by 128
    m.set_time(now)
    start(v, count, mode)
    assert not v.hv_timer
    assert m.next_timer() == now + (count * 128 << 24)
    v.wrmsr(TDCR, BY_ONE)  # what is left is divided too, and fits
    assert m.next_timer() == now + (count << 24)
    assert m.mem[v.own + L.K_TSC_DEADLINE] == now * khz // 10**6 + (count << 24) * khz // 10**6


@pytest.mark.parametrize("khz", [1, 1_000_000, 2_500_000, 10_000_000])
def test_the_clock_ends_before_the_tsc_does(khz: int) -> None:
    """63 bits of ns and of TSC: no deadline lies before the TSC that it is counted from, so no guest makes us hang."""
    m = booted(tsc_khz=khz, hv_timer=True)
    (v,) = m.vcpus
    end = min((1 << 63) - 1, ((1 << 63) - 1) * 10**6 // khz)
    with pytest.raises(ValueError, match=f"time {end + 1} is later than {end}: .* would exceed 63 bits"):
        m.set_time(end + 1)
    m.set_time(end)
    assert end * khz // 10**6 < 1 << 63
    for mode in (PERIODIC, 0, DEADLINE_MODE):
        start(v, 1000, mode)
        run(v)
        assert len(m.set_time(end)) <= 1


def test_user_space_exit_keeps_the_tick_waiting() -> None:
    """An iteration that ends in user space does not deliver; the next one that stays in the kernel does."""
    m = booted()
    (v,) = m.vcpus
    start(v, 1000)
    m.set_time(1000)
    out = v.exit(fx.VmxExit.IO_INSTRUCTION)
    assert out.user is fx.KvmExit.IO
    assert not in_irr(v)
    assert m.mem[v.own + L.K_TIMER_PENDING]
    assert ticked(v)


def test_tick_of_a_vcpu_in_user_space() -> None:
    """Only ioctls, no KVM_RUN: the expired timer changes no register."""
    m = booted()
    (v,) = m.vcpus
    assert v.set_msr(LVTT, TICK)
    assert v.set_msr(TMICT, 1000)
    ((_, out),) = m.set_time(1000)
    assert out.effects == fx.Effect.NONE
    assert not in_irr(v)
    assert v.run()
    run(v)
    assert in_irr(v)


@pytest.mark.parametrize("mode", [0, PERIODIC, DEADLINE_MODE])
@pytest.mark.parametrize("kernel", ["5.6", "6.18"])
def test_hostile_words_end(kernel: str, mode: int) -> None:
    """Timer words of a forged snapshot, at the edges of 64 bits: the clock moves, few ticks come, nothing hangs."""
    edges = (0, 1, 1000, (1 << 63) - 1, 1 << 63, L.NONE - 1, L.NONE)
    words = (L.K_TARGET, L.K_HRTIMER, L.K_HV_DEADLINE, L.K_TSC_DEADLINE, L.K_EXPIRED_DEADLINE)
    rng = random.Random(f"{kernel} {mode}")
    m = booted(kernel, hv_timer=True, timer_advance_ns=1000)
    (v,) = m.vcpus
    start(v, 1000, mode)
    for period in (0, 1, 1000, 1 << 63):
        for now in (0, 1000, 1 << 62, (1 << 63) - 1):
            for word in words:
                m.mem[v.own + word] = rng.choice(edges)
            m.mem[v.own + L.K_PERIOD] = period
            m.mem[L.H_NOW] = rng.choice((0, 1000))
            v.run()
            assert len(m.set_time(max(now, m.time))) <= 3
            v.rdmsr(TMCCT)
            v.wrmsr(TDCR, rng.choice((0, BY_ONE)))
            run(v)
            assert len(m.set_time(m.time)) <= 2
            v.exit(fx.VmxExit.HLT)
            m.next_timer()
