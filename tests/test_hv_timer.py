"""The VMX preemption timer as APIC timer: where it counts, its exit, forced exits, advance, posted ticks."""

from __future__ import annotations

import struct
from typing import Any

import pytest

import fastexit as fx
from fastexit import layout as L
from fastexit import regs as r
from fastexit.profile import since
from fastexit.traits import Trait
from generations import FILTERS, having, kernels

ICR, TPR, LVTT, TMICT, TDCR, DEADLINE = 0x830, 0x808, 0x832, 0x838, 0x83E, 0x6E0
TICK = 0xEC
PERIODIC, DEADLINE_MODE = r.LVT_TIMER_PERIODIC, r.LVT_TIMER_DEADLINE
FAST_TIMER = kernels("5.8")
"""Generations whose run function handles the exit, and the TSC_DEADLINE write, by itself."""
TIMER_EXIT = "reason PREEMPTION_TIMER"


def booted(kernel: str = "6.18", **options: Any) -> fx.Machine:
    """Two vCPUs in the guest, vCPU 1 with a timer that counts ns; tracing is on."""
    m = fx.Machine(vcpus=2, kernel=kernel, **{"apicv": False} | options)
    m.boot_x2apic()
    for v in m.vcpus:
        v.wrmsr(TPR, 0)
    m.vcpus[1].wrmsr(TDCR, 0xB)
    m.trace.enable()
    return m


def start(v: fx.Vcpu, count: int, mode: int = 0) -> fx.Outcome:
    v.wrmsr(LVTT, mode | TICK)
    return v.wrmsr(DEADLINE if mode == DEADLINE_MODE else TMICT, count)


def in_irr(v: fx.Vcpu, vector: int = TICK) -> bool:
    (word,) = struct.unpack_from("<I", v.get_lapic(), r.APIC_IRR + 0x10 * (vector // 32))
    return bool(word >> vector % 32 & 1)


def lines(m: fx.Machine, what: str) -> list[str]:
    return [line for line in m.trace.lines() if what in line]


def run(v: fx.Vcpu) -> fx.Outcome:
    return v.exit(fx.VmxExit.EXTERNAL_INTERRUPT)


# ------------------------------------------------------------------------------------------------- which timer it is


@pytest.mark.parametrize("mode", [0, PERIODIC, DEADLINE_MODE])
@pytest.mark.parametrize("kernel", fx.profiles())
def test_armed_instead_of_the_hrtimer(kernel: str, mode: int) -> None:
    """On VMX the preemption timer counts: no hrtimer in the host, and the switch is traced."""
    m = booted(kernel)
    v = m.vcpus[1]
    start(v, 300_000, mode)
    assert v.hv_timer
    assert m.mem[v.own + L.K_HRTIMER] == L.NONE
    assert m.next_timer() == 300_000
    assert lines(m, "kvm_hv_timer_state")[-1].endswith("vcpu_id 1 hv_timer 1")


@pytest.mark.parametrize(
    "options",
    [{"hv_timer": False}, {"vendor": "svm"}, {"disable_exits": r.EXITS_MWAIT}],
    ids=["module parameter", "svm", "mwait in the guest"],
)
def test_where_it_cannot_be_used(options: dict[str, Any]) -> None:
    """Without it the hrtimer serves: same time, but an interrupt of the host instead of an exit of the guest."""
    m = booted(**options)
    v = m.vcpus[1]
    start(v, 300_000)
    assert not v.hv_timer
    ((index, out),) = m.set_time(300_000)
    assert (index, out.effects, out.completion) == (1, fx.Effect.KICK, fx.Fastpath.NONE)
    assert not lines(m, TIMER_EXIT)


@pytest.mark.parametrize(("ahead", "fits"), [((1 << 37) - 1, True), (1 << 37, False)])
def test_range(ahead: int, fits: bool) -> None:
    """32 bits at a 32nd of the TSC's rate; what is further off is the hrtimer's."""
    m = booted()
    v = m.vcpus[1]
    start(v, ahead, DEADLINE_MODE)
    assert v.hv_timer is fits
    assert m.next_timer() == ahead


# ----------------------------------------------------------------------------------------------------------- the exit


@pytest.mark.parametrize("apicv", [True, False], ids=["apicv", "plain"])
@pytest.mark.parametrize("kernel", fx.profiles())
def test_exit_in_the_guest(kernel: str, apicv: bool) -> None:
    """It runs out in guest mode: an exit 52, fast from 5.8 on. REENTER becomes HANDLED where the tick is the loop's."""
    m = booted(kernel, apicv=apicv)
    v = m.vcpus[1]
    start(v, 1000)
    assert m.set_time(999) == []
    ((index, out),) = m.set_time(1000)
    fast = kernel in FAST_TIMER
    assert index == 1
    assert out.path is (fx.Path.FAST if fast else fx.Path.SLOW)
    handled = fx.Fastpath.REENTER_GUEST if apicv else fx.Fastpath.EXIT_HANDLED
    assert out.completion is (handled if fast else fx.Fastpath.NONE)
    assert len(lines(m, TIMER_EXIT)) == 1
    assert v.mode == r.IN_GUEST_MODE
    assert not v.hv_timer
    assert in_irr(v)
    assert m.set_time(1000) == []


@pytest.mark.parametrize("kernel", fx.profiles())
def test_periodic_exits(kernel: str) -> None:
    """Each exit arms the next period; the beat does not drift."""
    m = booted(kernel, apicv=True)
    v = m.vcpus[1]
    start(v, 300_000, PERIODIC)
    for n in range(1, 5):
        assert v.hv_timer
        assert m.next_timer() == 300_000 * n
        assert len(m.set_time(300_000 * n)) == 1
        assert v.hw_deliver() is None, "interrupts are off"
        assert in_irr(v)
        assert v.run()


@pytest.mark.parametrize("kernel", fx.profiles())
def test_late_periodic_exit(kernel: str) -> None:
    """Late by periods, it goes on from now, with a second tick at once; others have the hrtimer keep the old beat."""
    m = booted(kernel)
    v = m.vcpus[1]
    start(v, 300_000, PERIODIC)
    assert len(m.set_time(1_000_000)) == 1
    assert m.set_time(1_000_000) == []
    assert v.hv_timer is (kernel in having(Trait.TIMER_NO_CATCH_UP))
    assert m.next_timer() == (1_300_000 if v.hv_timer else 1_200_000)


def test_next_timer_moves_on() -> None:
    """Going from timer to timer ends, even where a period is below the TSC's resolution."""
    m = booted(tsc_khz=1, min_timer_period_us=0)
    start(m.vcpus[1], 1, PERIODIC)
    times = []
    for _ in range(5):
        when = m.next_timer()
        assert when is not None
        m.set_time(when)
        times.append(when)
    assert times == sorted(set(times))


def test_not_outside_the_guest() -> None:
    """In user space it does not count down to anything; the next entry exits at once, before the first instruction."""
    m = booted()
    v = m.vcpus[1]
    start(v, 1000)
    v.get_lapic()
    assert m.next_timer() is None
    assert m.set_time(5000) == []
    assert not in_irr(v)
    m.trace.clear()
    assert v.run()
    assert len(lines(m, TIMER_EXIT)) == 1
    assert in_irr(v)
    assert not v.hv_timer


def test_spurious_exit() -> None:
    """An exit 52 of a timer that nobody uses is eaten."""
    m = booted()
    out = m.vcpus[1].exit(fx.VmxExit.PREEMPTION_TIMER)
    assert out.reentered
    assert not in_irr(m.vcpus[1])


def test_in_l2_it_is_the_slow_path() -> None:
    """A tick that ends in L2 is left to the generic handler: it may have to become an exit to L1."""
    m = booted()
    v = m.vcpus[1]
    start(v, 1000)
    v.nested = True
    ((_, out),) = m.set_time(1000)
    assert out.path is fx.Path.SLOW
    assert out.refusal is fx.Refusal.NESTED
    assert in_irr(v)


# ----------------------------------------------------------------------------------------------------------- the sleep


@pytest.mark.parametrize("apicv", [True, False], ids=["apicv", "plain"])
@pytest.mark.parametrize("kernel", fx.profiles())
def test_sleep_and_back(kernel: str, apicv: bool) -> None:
    """A vCPU that blocks hands its timer to the hrtimer, and takes it back when it wakes for something else."""
    m = booted(kernel, apicv=apicv)
    v = m.vcpus[1]
    v.rflags |= r.RFLAGS_IF
    start(v, 300_000)
    assert v.exit(fx.VmxExit.HLT).blocked
    assert not v.hv_timer
    assert m.next_timer() == 300_000
    m.set_time(100_000)
    m.vcpus[0].wrmsr(ICR, fx.icr(dest=1, vector=0x51))
    assert v.run()
    assert v.hv_timer
    assert m.next_timer() == 300_000
    assert v.rdmsr(0x839) == 200_000
    assert len(m.set_time(300_000)) == 1
    assert in_irr(v) if apicv else v.injected == TICK


def test_run_out_before_the_sleep() -> None:
    """The time is over when the vCPU halts: it does not sleep over its own tick."""
    m = booted()
    v = m.vcpus[1]
    v.rflags |= r.RFLAGS_IF
    start(v, 1000)
    v.get_lapic()
    m.set_time(1000)
    assert v.set_msr(TPR, 0)
    m.mem[v.own + L.K_MP_STATE] = r.MP_HALTED
    assert v.run()
    assert v.injected == TICK


def test_never_twice() -> None:
    """The sleeper's hrtimer has fired: when the thread comes back, no preemption timer repeats the tick."""
    m = booted()
    v = m.vcpus[1]
    v.rflags |= r.RFLAGS_IF
    start(v, 1000)
    assert v.exit(fx.VmxExit.HLT).blocked
    assert len(m.set_time(1000)) == 1
    assert v.run()
    assert v.injected == TICK
    assert not v.hv_timer
    assert v.eoi() == TICK
    run(v)
    assert v.eoi() is None


def test_another_cpu() -> None:
    """Loaded on another pCPU the timer is armed again there: same deadline."""
    m = booted()
    v = m.vcpus[1]
    start(v, 1000)
    m.set_time(400)
    v.load(3)
    assert v.hv_timer
    assert v.run()
    assert m.next_timer() == 1000
    m.set_time(1000)
    assert in_irr(v)


# ------------------------------------------------------------------------------------------------------- forced exits


@pytest.mark.parametrize("vendor", ["vmx", "svm"])
@pytest.mark.parametrize("kernel", fx.profiles())
def test_forced_exit(kernel: str, vendor: str) -> None:
    """Two events, one entry: the NMI goes in, the entry exits at once, and the next one asks for a window.

    The NMI is delivered all the same, and its gate has cleared IF: so a guest of 6.12.118 took them in the lab.
    """
    m = booted(kernel, vendor=vendor)
    v = m.vcpus[1]
    v.rflags |= r.RFLAGS_IF
    m.vcpus[0].wrmsr(ICR, fx.icr(dest=1, vector=0x51))
    m.vcpus[0].wrmsr(ICR, fx.icr(dest=1, delivery=fx.DeliveryMode.NMI))
    m.trace.clear()
    v.exit(fx.SvmExit.INTERRUPT if vendor == "svm" else fx.VmxExit.EXTERNAL_INTERRUPT)
    assert v.nmi_masked
    assert (v.injected, v.rflags & r.RFLAGS_IF, v.irq_window) == (None, 0, True)
    assert v.requests == 0
    entries = lines(m, "kvm_entry")
    assert len(entries) == 2
    if since(kernel, "6.12"):
        assert [line.endswith("[immediate exit]") for line in entries] == [True, False]
    if vendor == "vmx":
        assert len(lines(m, TIMER_EXIT)) == 1


def test_forced_exit_is_no_tick() -> None:
    """The preemption timer that forces an exit leaves the guest's timer alone."""
    m = booted()
    v = m.vcpus[1]
    v.rflags |= r.RFLAGS_IF
    start(v, 1000)
    m.vcpus[0].wrmsr(ICR, fx.icr(dest=1, vector=0x51))
    m.vcpus[0].wrmsr(ICR, fx.icr(dest=1, delivery=fx.DeliveryMode.NMI))
    run(v)
    assert v.hv_timer
    assert m.next_timer() == 1000
    assert not in_irr(v)


# ---------------------------------------------------------------------------------------------- early, and the wait


def test_advance() -> None:
    """A deadline fires early by timer_advance_ns; the entry that takes the tick in waits for the rest and adapts."""
    m = booted(timer_advance_ns=1000)
    v = m.vcpus[1]
    v.rflags |= r.RFLAGS_IF
    start(v, 50_000, DEADLINE_MODE)
    assert m.next_timer() == 49_000
    m.set_time(49_000)
    assert v.injected == TICK
    assert v.waited_ns == 1000
    assert v.timer_advance_ns == 1000 - 1000 // 8
    assert lines(m, "kvm_wait_lapic_expire")[-1].endswith("delta -1000 (early)")


def test_advance_grows_when_late() -> None:
    """A tick that comes in late makes the timer fire earlier the next time; nobody waits."""
    m = booted(timer_advance_ns=1000)
    v = m.vcpus[1]
    v.rflags |= r.RFLAGS_IF
    start(v, 50_000, DEADLINE_MODE)
    m.set_time(50_800)
    assert v.waited_ns == 0
    assert v.timer_advance_ns == 1100


@pytest.mark.parametrize("late", [99, 10_001])
def test_advance_ignores(late: int) -> None:
    """Errors below 100 cycles or above 10000 teach nothing."""
    m = booted(timer_advance_ns=1000)
    v = m.vcpus[1]
    v.rflags |= r.RFLAGS_IF
    start(v, 50_000, DEADLINE_MODE)
    m.set_time(50_000 + late)
    assert v.timer_advance_ns == 1000


def test_advance_starts_again() -> None:
    """Above 5000 ns it is taken for nonsense and begins at 1000 again."""
    m = booted(timer_advance_ns=4900)
    v = m.vcpus[1]
    v.rflags |= r.RFLAGS_IF
    start(v, 50_000, DEADLINE_MODE)
    m.set_time(51_600)
    assert v.timer_advance_ns == 1000


def test_no_wait_for_a_tick_that_stays_out() -> None:
    """Interrupts are off: the vector is not in service, so the entry does not wait for its deadline."""
    m = booted(timer_advance_ns=1000)
    v = m.vcpus[1]
    start(v, 50_000, DEADLINE_MODE)
    m.set_time(49_000)
    assert in_irr(v)
    assert v.waited_ns == 0


# ------------------------------------------------------------------------------------------------------ posted timers


def posted(**options: Any) -> fx.Machine:
    return booted(apicv=True, pi_inject_timer=True, disable_exits=r.EXITS_HLT, **options)


def test_posted_timer() -> None:
    """pi_inject_timer and a guest that keeps its HLTs: the hrtimer posts the tick into the running guest, no exit."""
    m = posted()
    v = m.vcpus[1]
    start(v, 1000)
    assert not v.hv_timer
    exits = v.counters()["exits"]
    ((index, out),) = m.set_time(1000)
    assert (index, out.effects) == (1, fx.Effect.NOTIFY)
    assert v.mode == r.IN_GUEST_MODE
    assert v.counters()["exits"] == exits
    assert v.hw_notify()
    v.rflags |= r.RFLAGS_IF
    assert v.hw_deliver() == TICK


def test_posted_timer_waits_before_it_posts() -> None:
    """Fired early, it waits until the deadline before the vector goes out."""
    m = posted(timer_advance_ns=1000)
    v = m.vcpus[1]
    start(v, 50_000, DEADLINE_MODE)
    m.set_time(49_000)
    assert v.waited_ns == 1000
    assert in_irr(v)


@pytest.mark.parametrize("missing", [{"apicv": False}, {"pi_inject_timer": False}, {"disable_exits": 0}])
def test_what_posting_needs(missing: dict[str, Any]) -> None:
    """Without any one of the three the preemption timer is used as ever."""
    m = booted(**{"apicv": True, "pi_inject_timer": True, "disable_exits": r.EXITS_HLT} | missing)
    start(m.vcpus[1], 1000)
    assert m.vcpus[1].hv_timer


def test_posted_timer_of_a_vcpu_outside() -> None:
    """Outside guest mode the tick waits for the run loop like any other."""
    m = posted()
    v = m.vcpus[1]
    start(v, 1000)
    v.get_lapic()
    ((_, out),) = m.set_time(1000)
    assert out.effects == fx.Effect.NONE
    assert not in_irr(v)
    assert v.run()
    assert in_irr(v)


# ------------------------------------------------------------------------------------- the TSC_DEADLINE fast path


@pytest.mark.parametrize("hv_timer", [True, False])
@pytest.mark.parametrize("kernel", fx.profiles())
def test_deadline_fast_path(kernel: str, hv_timer: bool) -> None:
    """From 5.8 fast where the preemption timer can serve it, in 6.18 always; it goes straight back into the guest."""
    m = booted(kernel, hv_timer=hv_timer)
    v = m.vcpus[1]
    out = start(v, 300_000, DEADLINE_MODE)
    fast = since(kernel, "6.18") or (hv_timer and kernel in FAST_TIMER)
    assert out.reentered is fast
    if not fast:
        assert out.refusal is (fx.Refusal.NO_HV_TIMER if kernel in FAST_TIMER else fx.Refusal.MSR)
    assert v.hv_timer is hv_timer
    assert m.next_timer() == 300_000


@pytest.mark.parametrize("kernel", fx.profiles())
def test_past_deadline_and_reentry(kernel: str) -> None:
    """Without APICv the tick is the run loop's, so REENTER becomes HANDLED; with APICv it is in IRR on re-entry."""
    for apicv in (True, False):
        m = booted(kernel, apicv=apicv)
        v = m.vcpus[1]
        m.set_time(1000)
        out = start(v, 1, DEADLINE_MODE)
        fast = kernel in FAST_TIMER
        expected = fx.Fastpath.REENTER_GUEST if apicv else fx.Fastpath.EXIT_HANDLED
        assert out.completion is (expected if fast else fx.Fastpath.NONE)
        assert v.mode == r.IN_GUEST_MODE
        assert v.requests == 0
        assert in_irr(v)
        assert v.get_msr(DEADLINE) == 0


@pytest.mark.parametrize("kernel", FILTERS)
def test_the_filter_is_not_asked(kernel: str) -> None:
    """User space denies TSC_DEADLINE: the generic path obeys, the fast one writes all the same."""
    m = booted(kernel)
    v = m.vcpus[1]
    v.wrmsr(LVTT, DEADLINE_MODE | TICK)
    m.set_msr_filter(ranges=[(r.MSR_FILTER_WRITE, DEADLINE, [False])])
    fast = kernel in FAST_TIMER
    out = v.wrmsr(DEADLINE, 300_000)
    assert out.fault is (None if fast else fx.Fault.GP)
    assert m.next_timer() == (300_000 if fast else None)
    m.fastpath = False
    assert v.wrmsr(DEADLINE, 400_000).fault is fx.Fault.GP
    assert m.next_timer() == (300_000 if fast else None)
