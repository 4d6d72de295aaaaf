"""The APIC timer and TSC_DEADLINE: traps 52-57, and what SVR does to it in trap 34 (test_traps_registers.py)."""

from __future__ import annotations

import pytest

import fastexit as fx
from apics import LVTT, TMCCT, TMICT, interrupted, machine, vectors
from fastexit import regs as r

DEADLINE = r.MSR_TSC_DEADLINE
ONE_SHOT, PERIODIC, BY_TSC, MASKED = 0, r.LVT_TIMER_PERIODIC, r.LVT_TIMER_DEADLINE, r.LVT_MASKED
US = 1000


def timer(mode: int, **options: object) -> tuple[fx.Machine, fx.Vcpu]:
    """A vCPU in the guest, its LVTT vector 0x55; hrtimers unless told; TSC and bus at 1 GHz, so TMICT counts 2 ns."""
    m = machine(0, 1, **{"hv_timer": False, **options})
    v = m.vcpus[0]
    assert v.wrmsr(LVTT, mode | 0x55).fault is None
    interrupted(v)
    return m, v


@pytest.mark.parametrize("mode", [ONE_SHOT, PERIODIC])
@pytest.mark.parametrize("fastpath", [True, False])
def test_trap_52_deadline_outside_deadline_mode_is_ignored(mode: int, fastpath: bool) -> None:
    """No fault, no timer, and the MSR reads 0; TMICT's timer runs on, and no change of mode brings it to life."""
    m, v = timer(mode)
    m.fastpath = fastpath
    assert v.wrmsr(DEADLINE, 5000).fault is None
    assert (v.rdmsr(DEADLINE), m.next_timer()) == (0, None)
    v.wrmsr(TMICT, 500_000)
    m.set_time(10 * US)
    assert v.wrmsr(DEADLINE, 50_000).fault is None
    assert (v.rdmsr(DEADLINE), m.next_timer()) == (0, 1000 * US)
    v.wrmsr(LVTT, BY_TSC | 0x55)
    assert (v.rdmsr(DEADLINE), m.next_timer()) == (0, None)


def test_trap_52_a_deadline_that_has_passed_reads_back() -> None:
    """Time does not clear the MSR; the delivery to LVTT does, in the run loop."""
    m, v = timer(BY_TSC)
    v.set_msr(DEADLINE, 5000)
    m.set_time(9000)
    assert v.get_msr(DEADLINE) == 5000
    assert v.run()
    assert (v.get_msr(DEADLINE), vectors(v)) == (0, {0x55})


@pytest.mark.parametrize(
    ("kernel", "vendor", "fast"),
    [
        ("6.1", "vmx", True),
        ("6.12", "vmx", True),
        ("6.18", "vmx", True),
        ("6.18", "svm", True),
        ("6.12", "svm", False),
        ("5.10", "svm", False),
    ],
)
def test_trap_53_the_fast_path_asks_no_msr_filter(kernel: str, vendor: str, fast: bool) -> None:
    """A filter that denies 0x6E0 gives #GP, or leaves to user space; the fast path does not look and arms the timer."""
    m, v = timer(BY_TSC, kernel=kernel, vendor=vendor, hv_timer=vendor == "vmx")
    m.set_msr_filter(ranges=[(r.MSR_FILTER_READ | r.MSR_FILTER_WRITE, DEADLINE, [False])])
    out = v.wrmsr(DEADLINE, 1 << 20)
    assert (out.path is fx.Path.FAST, out.fault) == (fast, None if fast else fx.Fault.GP)
    assert (m.next_timer() is not None) is fast

    m.user_space_msr = fx.regs.MsrExit.FILTER
    assert v.wrmsr(DEADLINE, 1 << 20).user == (None if fast else fx.KvmExit.X86_WRMSR)
    m.fastpath = False
    assert v.wrmsr(DEADLINE, 1 << 20).user == fx.KvmExit.X86_WRMSR


def test_trap_53_x2apic_registers_cannot_be_filtered() -> None:
    """0x800-0x8FF are allowed on both paths, whatever the filter says."""
    m, v = timer(ONE_SHOT)
    m.set_msr_filter(True, [(r.MSR_FILTER_READ | r.MSR_FILTER_WRITE, 0x800, [False] * 0x100)])
    for fastpath in (True, False):
        m.fastpath = fastpath
        assert v.wrmsr(0x830, fx.icr(dest=1, vector=0x41)).fault is None
        assert v.wrmsr(0x808, 0).fault is None


def test_trap_54_a_masked_tick_comes_when_it_is_unmasked() -> None:
    """It waits in KVM, not in IRR; unmasking LVTT is enough, no matter how much later."""
    m, v = timer(ONE_SHOT | MASKED)
    v.wrmsr(TMICT, 500)
    m.set_time(1000)
    interrupted(v)
    assert vectors(v) == set()
    m.set_time(50_000)
    v.wrmsr(LVTT, 0x56)
    assert vectors(v) == {0x56}


def test_trap_54_posted_at_once_a_masked_tick_is_lost() -> None:
    """APICv and the preemption timer: the tick is delivered by the exit, and a masked LVTT drops it for good."""
    m, v = timer(ONE_SHOT | MASKED, apicv=True, hv_timer=True)
    v.wrmsr(TMICT, 500)
    m.set_time(1000)
    v.wrmsr(LVTT, 0x56)
    interrupted(v)
    assert vectors(v) == set()


def test_trap_54_ticks_coalesce() -> None:
    """Three periods while nobody looks are one tick; the period after that is the next."""
    m, v = timer(PERIODIC)
    v.wrmsr(TMICT, 150_000)
    for tick in (1, 2, 3):
        m.set_time(tick * 300 * US)
    interrupted(v)
    assert v.ack() == 0x55
    v.eoi()
    interrupted(v)
    interrupted(v)
    assert vectors(v) == set()
    m.set_time(1200 * US)
    interrupted(v)
    assert v.ack() == 0x55


def test_trap_55_short_periods_are_stretched() -> None:
    """2 us become 200 us; TMICT still says 1000, and TMCCT counts down from far above it."""
    m, v = timer(PERIODIC)
    v.wrmsr(TMICT, 1000)
    assert m.next_timer() == 200 * US
    m.set_time(20 * US)
    assert (v.rdmsr(TMICT), v.rdmsr(TMCCT)) == (1000, 90_000)
    m.set_time(199 * US)
    interrupted(v)
    assert vectors(v) == set()
    m.set_time(200 * US)
    interrupted(v)
    assert vectors(v) == {0x55}


def test_trap_55_one_shots_are_not() -> None:
    """The limit is for periodic timers; the module parameter moves it."""
    m, v = timer(ONE_SHOT)
    v.wrmsr(TMICT, 1000)
    assert m.next_timer() == 2 * US
    m, v = timer(PERIODIC, min_timer_period_us=500)
    v.wrmsr(TMICT, 1000)
    assert m.next_timer() == 500 * US


def test_trap_56_ticks_reach_irr_in_the_run_loop_only() -> None:
    """Ioctls see no interrupt however late it is; an iteration that leaves to user space does not deliver it either."""
    m, v = timer(ONE_SHOT)
    v.wrmsr(TMICT, 500)
    m.set_time(1000)
    assert v.exit(fx.VmxExit.IO_INSTRUCTION).user == fx.KvmExit.IO
    assert (vectors(v), v.pending()) == (set(), None)
    assert v.get_msr(0x822) == 0
    v.run()
    assert vectors(v) == {0x55}


def test_trap_56_an_exit_that_stays_delivers_it() -> None:
    """The same tick behind an exit that KVM handles itself: it is in IRR before the guest goes on."""
    m, v = timer(ONE_SHOT)
    v.wrmsr(TMICT, 500)
    m.set_time(1000)
    assert v.exit(fx.VmxExit.CPUID).user is None
    assert v.pending() == 0x55


@pytest.mark.parametrize(("first", "second"), [(ONE_SHOT, PERIODIC), (PERIODIC, ONE_SHOT)])
def test_trap_57_one_shot_to_periodic_restarts_nothing(first: int, second: int) -> None:
    """The count goes on, the tick comes when it would have come; TMICT keeps its value."""
    m, v = timer(first)
    v.wrmsr(TMICT, 500_000)
    m.set_time(400 * US)
    v.wrmsr(LVTT, second | 0x55)
    assert (v.rdmsr(TMICT), v.rdmsr(TMCCT), m.next_timer()) == (500_000, 300_000, 1000 * US)
    m.set_time(1000 * US)
    assert m.next_timer() == (2000 * US if second == PERIODIC else None), "the new mode decides what follows"


@pytest.mark.parametrize("mode", [ONE_SHOT, PERIODIC])
def test_trap_57_deadline_mode_clears_the_count(mode: int) -> None:
    """Into deadline mode and out of it: TMICT 0, deadline 0, no timer; a TMICT write in deadline mode is ignored."""
    m, v = timer(mode)
    v.wrmsr(TMICT, 500_000)
    v.wrmsr(LVTT, BY_TSC | 0x55)
    assert (v.rdmsr(TMICT), m.next_timer()) == (0, None)
    assert v.wrmsr(TMICT, 700).fault is None
    assert (v.rdmsr(TMICT), m.next_timer()) == (0, None)
    v.wrmsr(DEADLINE, 10_000_000)
    assert m.next_timer() == 10_000_000
    v.wrmsr(LVTT, mode | 0x55)
    assert (v.rdmsr(DEADLINE), v.rdmsr(TMICT), m.next_timer()) == (0, 0, None)
    v.wrmsr(LVTT, BY_TSC | 0x55)
    assert v.rdmsr(DEADLINE) == 0
