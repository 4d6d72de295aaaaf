"""A guest's TSC: IA32_TSC, IA32_TSC_ADJUST, KVM_SET_TSC_KHZ, and deadlines that count in it."""

from __future__ import annotations

import random
from typing import Any

import pytest

import fastexit as fx
from apics import LVTT, vectors
from fastexit import layout as L
from fastexit import regs as r
from generations import since

TSC, ADJUST, DEADLINE = r.MSR_TSC, r.MSR_TSC_ADJUST, r.MSR_TSC_DEADLINE
DISPATCHERS = ("python", "compiled")
MS, SECOND = 1_000_000, 1_000_000_000
U64 = (1 << 64) - 1


def running(vcpus: int = 3, **options: Any) -> fx.Machine:
    """vCPUs in x2APIC mode, in the guest; a host of 2 GHz."""
    m = fx.Machine(vcpus, **{"apicv": False, "tsc_khz": 2_000_000, **options})
    m.boot_x2apic()
    for v in m.vcpus:
        v.run()
    return m


def tsc(v: fx.Vcpu) -> int:
    """What RDMSR of IA32_TSC gives."""
    value = v.rdmsr(TSC)
    assert value is not None
    return value


@pytest.mark.parametrize("dispatcher", DISPATCHERS)
def test_clock(dispatcher: str) -> None:
    """From the beginning it is the clock, for the guest and for user space."""
    m = running(dispatcher=dispatcher)
    m.set_time(7 * MS)
    v = m.vcpus[1]
    assert tsc(v) == 14 * MS
    assert v.get_msr(TSC) == 14 * MS
    assert v.get_msr(ADJUST) == v.rdmsr(ADJUST) == 0
    assert v.get_tsc_khz() == 2_000_000
    assert {TSC, ADJUST} <= set(m.msr_index_list)


@pytest.mark.parametrize("dispatcher", DISPATCHERS)
def test_guest_writes(dispatcher: str) -> None:
    """A guest moves its own TSC; IA32_TSC_ADJUST tells by how much, and moves it too."""
    m = running(dispatcher=dispatcher, kernel="6.18")
    m.set_time(5 * SECOND)
    v, other, _ = m.vcpus
    assert not v.wrmsr(TSC, 100).fault
    assert tsc(v) == 100
    assert v.rdmsr(ADJUST) == 100 - 10 * SECOND & U64
    assert tsc(other) == 10 * SECOND
    m.set_time(m.time + 3)
    assert tsc(v) == 106
    v.wrmsr(ADJUST, 0)
    assert tsc(v) == tsc(other) == 10 * SECOND + 6
    v.wrmsr(ADJUST, 1000)
    assert tsc(v) == tsc(other) + 1000
    v.wrmsr(TSC, U64)
    m.set_time(m.time + 1)
    assert tsc(v) == 1


def test_user_space_says_what_adjust_reads() -> None:
    """KVM_SET_MSRS of IA32_TSC_ADJUST moves nothing."""
    m = running()
    v = m.vcpus[0]
    assert v.set_msr(ADJUST, 12345)
    assert v.get_msr(ADJUST) == 12345
    assert tsc(v) == 0
    v.wrmsr(ADJUST, 0)
    assert tsc(v) == -12345 & U64


@pytest.mark.parametrize("kernel", ["5.8", "5.10", "6.6", "6.8", "6.18"])
def test_synchronising(kernel: str) -> None:
    """Within a second of what others have, a value means theirs; 0 always does. New kernels take the first as it is."""
    m = running(kernel=kernel)
    first, second, third = m.vcpus
    m.set_time(SECOND // 2)
    assert first.set_msr(TSC, 5 * MS)
    kept = since(kernel, "6.8")
    assert tsc(first) == (5 * MS if kept else SECOND)
    m.set_time(m.time + 100 * MS)
    second.set_msr(TSC, 5 * MS)
    assert tsc(second) == tsc(first)
    third.set_msr(TSC, 7 * SECOND)
    assert tsc(third) == 7 * SECOND
    first.set_msr(TSC, 0)
    assert tsc(first) == tsc(third)
    assert second.get_msr(ADJUST) == 0


@pytest.mark.parametrize(("kernel", "joins"), [("5.8", True), ("5.10", False), ("6.18", False)])
def test_guests_that_synchronise(kernel: str, joins: bool) -> None:
    """Up to 5.8 a guest's write was taken as user space's, but that its 0 is 0."""
    m = running(kernel=kernel)
    v = m.vcpus[0]
    m.set_time(SECOND // 4)
    v.wrmsr(TSC, 5)
    assert tsc(v) == (SECOND // 2 if joins else 5)
    assert v.rdmsr(ADJUST) == (0 if joins else 5 - SECOND // 2 & U64)
    m.set_time(10 * SECOND)
    v.wrmsr(TSC, 0)
    assert tsc(v) == 0


def test_another_frequency_is_not_synchronised() -> None:
    """Only vCPUs of one frequency share a TSC."""
    m = running()
    first, second, _ = m.vcpus
    second.set_tsc_khz(3_000_000)
    m.set_time(SECOND)
    first.set_msr(TSC, 50 * SECOND)
    second.set_msr(TSC, 50 * SECOND + 9)
    assert tsc(second) == 50 * SECOND + 9


def test_a_late_vcpu() -> None:
    """KVM_CREATE_VCPU gives a new vCPU the TSC of those that are synchronised."""
    m = running(2)
    m.set_time(SECOND)
    m.vcpus[0].set_msr(TSC, 100 * SECOND)
    m.set_time(2 * SECOND)
    assert tsc(m.add_vcpu(2)) == 102 * SECOND


@pytest.mark.parametrize("vendor", ["vmx", "svm"])
def test_frequencies(vendor: str) -> None:
    """KVM_SET_TSC_KHZ: 0 is the host's; within 250 ppm nothing is scaled; hardware has its limit."""
    m = running(vendor=vendor, tsc_khz=1000)
    v = m.vcpus[0]
    m.set_time(SECOND)
    for khz, rate in ((500, 500), (1001, 1001), (2000, 2000)):
        v.set_tsc_khz(khz)
        assert (v.get_tsc_khz(), tsc(v)) == (khz, rate * 1000)
    v.set_tsc_khz(0)
    assert (v.get_tsc_khz(), tsc(v)) == (1000, MS)
    most = 1000 * (1 << 8 if vendor == "svm" else 1 << 16) - 1
    for khz in (most, 10_000_001) if vendor == "svm" else (10_000_001, most):
        with pytest.raises(ValueError, match="EINVAL"):
            v.set_tsc_khz(khz)
    near = running(tsc_khz=2_000_000).vcpus[0]
    near.machine.set_time(SECOND)
    for khz, scaled in ((2_000_500, False), (1_999_500, False), (2_000_501, True), (1_999_499, True)):
        near.set_tsc_khz(khz)
        assert (near.get_tsc_khz(), tsc(near)) == (khz, (khz if scaled else 2_000_000) * 1000)


# ----------------------------------------------------------------------------------------------------------- deadlines


def deadline_in(v: fx.Vcpu, ticks: int) -> None:
    """A TSC deadline so far from now."""
    v.wrmsr(DEADLINE, tsc(v) + ticks & U64)


@pytest.mark.parametrize("dispatcher", DISPATCHERS)
@pytest.mark.parametrize("vendor", ["vmx", "svm"])
@pytest.mark.parametrize("offset", [0, 1 << 40, -(1 << 40), (1 << 63) - 5])
def test_deadlines_count_in_the_guests_tsc(offset: int, vendor: str, dispatcher: str) -> None:
    """A deadline comes when the guest's own TSC has it, on the preemption timer and on the hrtimer."""
    m = running(vendor=vendor, dispatcher=dispatcher)
    m.set_time(SECOND)
    v = m.vcpus[0]
    v.wrmsr(ADJUST, offset & U64)
    assert tsc(v) == 2 * SECOND + offset & U64
    v.wrmsr(LVTT, 0x4_0040)
    deadline_in(v, 10 * MS)
    assert m.next_timer() == SECOND + 5 * MS
    m.set_time(SECOND + 5 * MS - 1)
    assert vectors(v) == set()
    v.run()
    m.set_time(SECOND + 5 * MS)
    v.run()
    assert vectors(v) == {0x40}
    assert v.get_msr(DEADLINE) == 0


@pytest.mark.parametrize("vendor", ["vmx", "svm"])
def test_deadlines_of_a_scaled_tsc(vendor: str) -> None:
    """Twice as fast: half as long, and rounded down as KVM's fraction is."""
    m = running(vendor=vendor)
    v = m.vcpus[0]
    v.set_tsc_khz(4_000_000)
    m.set_time(SECOND)
    v.run()
    assert tsc(v) == 4 * SECOND
    v.wrmsr(LVTT, 0x4_0040)
    deadline_in(v, 10 * MS)
    assert m.next_timer() == SECOND + 10 * MS // 4


@pytest.mark.parametrize("hv_timer", [True, False])
def test_a_running_timer_is_left_alone(hv_timer: bool) -> None:
    """A TSC that is moved moves no deadline that counts already, as in KVM."""
    m = running(hv_timer=hv_timer)
    v = m.vcpus[0]
    v.wrmsr(LVTT, 0x4_0040)
    deadline_in(v, 10 * MS)
    v.wrmsr(TSC, 1 << 50)
    assert m.next_timer() == 5 * MS
    v.wrmsr(ADJUST, 0)
    assert m.next_timer() == 5 * MS


def test_the_filter_is_asked() -> None:
    """Both MSRs can be filtered."""
    m = running(kernel="6.18")
    m.set_msr_filter(ranges=[(r.MSR_FILTER_READ | r.MSR_FILTER_WRITE, 0x10, [False]), (3, 0x3B, [False])])
    v = m.vcpus[0]
    for msr in (TSC, ADJUST):
        assert v.wrmsr(msr, 1).fault is fx.Fault.GP
        assert v.set_msr(msr, 1)


# ---------------------------------------------------------------------------------------------------- against a model


class Model:
    """kvm_synchronize_tsc and the rest, plainly."""

    def __init__(self, kernel: str, vcpus: int, khz: int) -> None:
        self.host, self.now = khz, 0
        self.guests = not since(kernel, "5.10")
        self.first_kept = since(kernel, "6.8")
        self.offset, self.adjust = [0] * vcpus, [0] * vcpus
        self.khz = [khz] * vcpus
        self.last = (0, 0, khz)
        self.current, self.user = 0, False

    def rate(self, i: int) -> int:
        """What the TSC runs at: the host's within 250 ppm, as KVM cuts them."""
        low, high = (self.host * (MS + d) // MS for d in (-250, 250))
        return self.host if low <= self.khz[i] <= high else self.khz[i]

    def plain(self, i: int) -> int:
        """Without the offset."""
        return self.now * self.rate(i) // MS

    def read(self, i: int) -> int:
        """IA32_TSC."""
        return self.plain(i) + self.offset[i] & U64

    def sync(self, i: int, value: int, host: bool) -> None:
        """The offset that a value means."""
        then, wrote, khz = self.last
        expected = wrote + (self.now - then) * self.khz[i] // MS & U64
        hz = self.khz[i] * 1000
        near = value < (expected + hz & U64) and (value + hz & U64) > expected
        if self.first_kept and not self.user:
            near = False
        if ((host and value == 0) or near) and khz == self.khz[i]:
            offset = self.current
        else:
            offset = self.current = value - self.plain(i) & U64
        self.last = (self.now, value, self.khz[i])
        self.offset[i] = offset

    def write(self, i: int, value: int, host: bool) -> None:
        """IA32_TSC."""
        was = self.offset[i]
        if host:
            self.sync(i, value, True)
            self.user = True
            return
        if self.guests:
            self.sync(i, value, False)
        else:
            self.offset[i] = value - self.plain(i) & U64
        self.adjust[i] = self.adjust[i] + self.offset[i] - was & U64

    def write_adjust(self, i: int, value: int, host: bool) -> None:
        """IA32_TSC_ADJUST."""
        if not host:
            self.offset[i] = self.offset[i] + value - self.adjust[i] & U64
        self.adjust[i] = value


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("dispatcher", DISPATCHERS)
@pytest.mark.parametrize("kernel", ["5.8", "6.6", "6.18"])
def test_against_the_model(kernel: str, dispatcher: str, seed: int) -> None:
    """Writes by guests and user space, frequencies and time at random: every vCPU's TSC and ADJUST are the same."""
    rng = random.Random(seed)
    m = running(kernel=kernel, dispatcher=dispatcher)
    model = Model(kernel, 3, 2_000_000)
    for _ in range(150):
        i = rng.randrange(3)
        v = m.vcpus[i]
        near = model.read(rng.randrange(3)) + rng.choice((-1, 1)) * rng.choice((0, 1, MS, 2 * SECOND - 1, 2 * SECOND))
        value = rng.choice((0, 1, near & U64, rng.getrandbits(64), rng.getrandbits(33), U64))
        match rng.randrange(7):
            case 0 | 1:
                assert v.set_msr(TSC, value)
                model.write(i, value, True)
            case 2:
                assert not v.wrmsr(TSC, value).fault
                model.write(i, value, False)
            case 3:
                host = rng.random() < 0.5
                assert v.set_msr(ADJUST, value) if host else not v.wrmsr(ADJUST, value).fault
                model.write_adjust(i, value, host)
            case 4:
                model.khz[i] = rng.choice((2_000_000, 2_000_000, 2_000_400, 1_000_000, 3_000_000))
                v.set_tsc_khz(model.khz[i])
            case _:
                model.now += rng.choice((1, 1000, MS, SECOND, rng.randrange(2 * SECOND)))
                m.set_time(model.now)
        for j, w in enumerate(m.vcpus):
            assert w.get_msr(TSC) == model.read(j)
            assert w.get_msr(ADJUST) == model.adjust[j]
            assert w.get_tsc_khz() == model.khz[j]
    assert m.mem[L.TSC_CURRENT] == model.current
