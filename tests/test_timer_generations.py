"""What older and patched kernels do with the APIC timer in ways of their own; each test says where it was read."""

from __future__ import annotations

import struct
from typing import Any

import pytest

import fastexit as fx
from fastexit import layout as L
from fastexit import regs as r
from fastexit.profile import as_of, since
from fastexit.traits import Trait
from generations import having, kernels

LVTT, TMICT, TMCCT, TDCR, BASE, DEADLINE = 0x832, 0x838, 0x839, 0x83E, 0x1B, 0x6E0
TICK = 0xEC
PERIODIC, DEADLINE_MODE = r.LVT_TIMER_PERIODIC, r.LVT_TIMER_DEADLINE
MODE_3 = PERIODIC | DEADLINE_MODE
EXPIRE = "kvm_wait_lapic_expire"
ONLY_IN_RUN = {"seed-v3": False, "6.1": True, "6.8": False, "6.12": True}
"""Which generations ask for vcpu->wants_to_run before they post a tick: those whose tree is of summer 2026."""


def booted(kernel: str, **options: Any) -> fx.Machine:
    """One vCPU in the guest, interrupts off, whose timer counts ns; tracing is on."""
    m = fx.Machine(vcpus=1, kernel=kernel, **{"apicv": False} | options)
    m.boot_x2apic()
    m.vcpus[0].wrmsr(TDCR, 0xB)
    m.trace.enable()
    return m


def start(v: fx.Vcpu, count: int, mode: int = 0) -> fx.Outcome:
    v.wrmsr(LVTT, mode | TICK)
    return v.wrmsr(DEADLINE if mode & DEADLINE_MODE else TMICT, count)


def exit_(v: fx.Vcpu) -> fx.Outcome:
    """An exit that stays in the kernel, so the run loop goes round once."""
    return v.exit(fx.SvmExit.INTERRUPT if v.machine.vendor == "svm" else fx.VmxExit.EXTERNAL_INTERRUPT)


def page_of(v: fx.Vcpu, **registers: int) -> bytes:
    page = bytearray(v.get_lapic())
    for name, value in registers.items():
        struct.pack_into("<I", page, getattr(r, f"APIC_{name}"), value)
    return bytes(page)


def in_irr(v: fx.Vcpu) -> bool:
    (word,) = struct.unpack_from("<I", v.get_lapic(), r.APIC_IRR + 0x10 * (TICK // 32))
    return bool(word >> TICK % 32 & 1)


def lines(m: fx.Machine, what: str) -> list[str]:
    return [line for line in m.trace.lines() if what in line]


# ------------------------------------------------------------------------------------------------------ saved, restored


@pytest.mark.parametrize("kernel", fx.profiles())
def test_one_shot_restored_without_a_count(kernel: str) -> None:
    """set_target_expiration of 5.8.18, 5.10.262 and 5.15.215: nothing left of a one-shot is a whole period.

    6.1.192 and 6.6 on: it ticks at once.
    """
    m = booted(kernel, hv_timer=False)
    (v,) = m.vcpus
    v.set_lapic(page_of(v, LVTT=TICK, TMICT=300_000, TMCCT=0))
    m.set_time(1)
    exit_(v)
    assert in_irr(v) is since(kernel, "6.1")
    assert m.next_timer() == (None if since(kernel, "6.1") else 300_000)


@pytest.mark.parametrize("mode", [0, PERIODIC], ids=["one-shot", "periodic"])
@pytest.mark.parametrize("kernel", fx.profiles())
def test_count_of_a_saved_timer(kernel: str, mode: int) -> None:
    """5.6.4 and 5.7.6 kvm_apic_get_state copies the page as it is, and set_state starts TMICT all over."""
    here, there = booted(kernel, hv_timer=False), booted(kernel, hv_timer=False)
    (v,), (other,) = here.vcpus, there.vcpus
    start(v, 300_000, mode)
    here.set_time(100_000)
    page = v.get_lapic()
    saved = since(kernel, "5.8")
    assert struct.unpack_from("<I", page, r.APIC_TMCCT) == (200_000 * saved,)
    other.set_lapic(page)
    assert there.next_timer() == (200_000 if saved else 300_000)
    other.set_lapic(page_of(v, TMCCT=7))
    assert there.next_timer() == (7 if saved else 300_000)
    there.set_time(1)
    assert other.get_msr(TMCCT) == (6 if saved else 299_999), "reads compute it everywhere"


@pytest.mark.parametrize("kernel", fx.profiles())
def test_deadline_that_runs_out_in_the_restore(kernel: str) -> None:
    """5.8.18, 5.10.262 and 5.15.215 kvm_apic_set_state: apicv_post_state_restore empties PIR with the tick in it.

    Later kernels clear PIR first. Where the tick is not posted in an ioctl, it waits for KVM_RUN.
    """
    m = booted(kernel, apicv=True)
    (v,) = m.vcpus
    start(v, 1_000_000, DEADLINE_MODE)
    page = v.get_lapic()
    m.set_time(2_000_000)
    v.set_lapic(page)
    lost = since(kernel, "5.8") and not since(kernel, "6.1")
    waits = not since(kernel, "5.8") or bool(as_of(ONLY_IN_RUN, kernel))
    assert v.pending() == (TICK if not lost and not waits else None)
    assert v.get_msr(DEADLINE) == (1_000_000 if waits else 0)
    assert v.run()
    assert in_irr(v) is not lost


@pytest.mark.parametrize("kernel", fx.profiles())
def test_refused_page_and_what_was_posted(kernel: str) -> None:
    """5.7.6 kvm_apic_set_state: EINVAL precedes the emptying of PIR; vmx_apicv_pre_state_restore is before it."""
    m = booted(kernel, apicv=True, x2apic_api=1)
    (v,) = m.vcpus
    page = page_of(v, ID=0x77)
    assert m.signal_msi(0xFEE0_0000, 0x41) == 1
    with pytest.raises(ValueError, match="EINVAL"):
        v.set_lapic(page)
    assert v.pending() == (None if since(kernel, "6.1") else 0x41)


# ----------------------------------------------------------------------------------------------- posted at once, or not


@pytest.mark.parametrize("apicv", [True, False], ids=["apicv", "plain"])
@pytest.mark.parametrize("kernel", fx.profiles())
def test_deadline_in_the_past(kernel: str, apicv: bool) -> None:
    """5.7.6 apic_timer_expired never posts in the vCPU's own context; the branch begins in 5.8.18.

    In the trace the tick then stands behind kvm_hv_timer_state and kvm_msr, where vcpu_run injects it.
    """
    m = booted(kernel, apicv=apicv)
    (v,) = m.vcpus
    m.set_time(1000)
    v.wrmsr(LVTT, DEADLINE_MODE | TICK)
    m.trace.clear()
    v.wrmsr(DEADLINE, 1)
    text = m.trace.text()
    at_once = apicv and since(kernel, "5.8")
    assert (text.index("kvm_apic_accept_irq") < text.index("kvm_hv_timer_state")) is at_once
    assert (text.index("kvm_apic_accept_irq") < text.index("kvm_msr")) is at_once
    assert in_irr(v)


@pytest.mark.parametrize("dispatcher", ["python", "compiled"])
@pytest.mark.parametrize("kernel", kernels("5.8"))
def test_tick_of_a_fast_exit_and_who_is_notified(kernel: str, dispatcher: Any) -> None:
    """5.10.262 and 5.15.215 kvm_vcpu_trigger_posted_interrupt sends to its own pCPU; outcome and targets say so."""
    m = booted(kernel, apicv=True, dispatcher=dispatcher)
    (v,) = m.vcpus
    v.wrmsr(LVTT, DEADLINE_MODE | TICK)
    m.set_time(1000)
    itself = kernel in having(Trait.PI_NOTIFIES_SELF)
    out = v.wrmsr(DEADLINE, 1)
    assert out.reentered
    assert out.effects == (fx.Effect.NOTIFY if itself else fx.Effect.NONE)
    assert list(v.targets) == ([(0, fx.Effect.NOTIFY)] if itself else [])


@pytest.mark.parametrize("kernel", fx.profiles())
def test_deadline_in_the_past_by_an_ioctl(kernel: str) -> None:
    """6.1.192, 6.12.118 and 7.3.4 apic_timer_expired: only a thread in KVM_RUN posts (vcpu->wants_to_run)."""
    m = booted(kernel, apicv=True)
    (v,) = m.vcpus
    v.wrmsr(LVTT, DEADLINE_MODE | TICK)
    m.set_time(1000)
    v.set_msr(DEADLINE, 500)
    at_once = since(kernel, "5.8") and not as_of(ONLY_IN_RUN, kernel)
    assert in_irr(v) is at_once
    assert v.get_msr(DEADLINE) == (0 if at_once else 500)
    assert v.run()
    assert in_irr(v)
    assert v.get_msr(DEADLINE) == 0


@pytest.mark.parametrize("kernel", fx.profiles())
def test_tick_of_a_sleeper_is_its_own_threads(kernel: str) -> None:
    """A halted vCPU is in KVM_RUN: its preemption timer has run out when it goes to sleep, and APICv takes the tick."""
    m = booted(kernel, apicv=True)
    (v,) = m.vcpus
    v.rflags |= r.RFLAGS_IF
    start(v, 1000)
    m.mem[L.H_NOW] = 1000  # the guest gets to its HLT before the exit
    v.exit(fx.VmxExit.HLT)
    assert v.mode == r.IN_GUEST_MODE
    assert v.hw_deliver() == TICK


# ------------------------------------------------------------------------------------ preemption timer, what cancels it


@pytest.mark.parametrize("kernel", fx.profiles())
def test_count_of_zero_and_the_preemption_timer(kernel: str) -> None:
    """5.8.18 and 5.10.262 kvm_lapic_reg_write TMICT is hrtimer_cancel alone: a preemption timer ticks all the same."""
    m = booted(kernel)
    (v,) = m.vcpus
    start(v, 1000)
    v.wrmsr(TMICT, 0)
    counts = not since(kernel, "5.15")
    assert v.hv_timer is counts
    m.set_time(1000)
    assert in_irr(v) is counts


@pytest.mark.parametrize("kernel", fx.profiles())
def test_restore_without_a_count_and_the_preemption_timer(kernel: str) -> None:
    """5.10.262 kvm_apic_set_state: the same; 5.15.215 calls cancel_apic_timer."""
    m = booted(kernel)
    (v,) = m.vcpus
    v.wrmsr(LVTT, TICK)
    page = v.get_lapic()
    start(v, 1000)
    v.set_lapic(page)
    assert v.hv_timer is not since(kernel, "5.15")


@pytest.mark.parametrize("kernel", fx.profiles())
def test_tick_over_a_change_of_mode(kernel: str) -> None:
    """5.10.262 apic_update_lvtt keeps a tick that waits, and vcpu_run delivers it with the new vector."""
    m = booted(kernel, hv_timer=False)
    (v,) = m.vcpus
    start(v, 1000)
    v.get_lapic()
    m.set_time(1000)
    v.set_msr(LVTT, DEADLINE_MODE | 0x55)
    v.run()
    assert v.pending() == (None if since(kernel, "5.15") else 0x55)


@pytest.mark.parametrize("kernel", fx.profiles())
def test_change_of_mode_and_the_preemption_timer(kernel: str) -> None:
    """5.4.286 apic_update_lvtt leaves it running; 5.6.4 and later cancel it."""
    m = booted(kernel)
    (v,) = m.vcpus
    start(v, 1000)
    v.wrmsr(LVTT, DEADLINE_MODE | 0x55)
    counts = not since(kernel, "5.6")
    assert v.hv_timer is counts
    m.set_time(1000)
    assert v.pending() == (0x55 if counts else None)


@pytest.mark.parametrize("mode", [0, PERIODIC, DEADLINE_MODE], ids=["one-shot", "periodic", "deadline"])
@pytest.mark.parametrize("kernel", fx.profiles())
def test_who_waits_for_the_preemption_timer(kernel: str, mode: int) -> None:
    """5.8.18 kvm_lapic_expired_hv_timer cancels first, so apic_timer_expired notes no deadline but the MSR's."""
    m = booted(kernel, timer_advance_ns=1000)
    (v,) = m.vcpus
    v.rflags |= r.RFLAGS_IF
    start(v, 300_000, mode)
    m.set_time(299_000)
    assert v.injected == TICK
    assert v.waited_ns == (1000 if mode & DEADLINE_MODE or since(kernel, "5.10") else 0)


@pytest.mark.parametrize("kernel", fx.profiles())
def test_posted_timers_of_a_guest_that_exits(kernel: str) -> None:
    """5.8.18 kvm_can_post_timer_interrupt asks for no disabled exits; 5.10.223 and later do.

    So a deadline is not fast there, and the preemption timer is not used.
    """
    m = booted(kernel, apicv=True, pi_inject_timer=True)
    (v,) = m.vcpus
    out = start(v, 300_000, DEADLINE_MODE)
    posts = not since(kernel, "5.10")
    assert v.hv_timer is not posts
    assert out.reentered is (since(kernel, "5.8") and not posts)
    if posts:
        exits = v.counters()["exits"]
        ((_, outcome),) = m.set_time(300_000)
        assert outcome.effects == fx.Effect.NOTIFY
        assert v.counters()["exits"] == exits


@pytest.mark.parametrize("kernel", kernels("5.8"))
def test_late_periodic_exit_with_apicv(kernel: str) -> None:
    """A target in the past is no deadline for the preemption timer, so start_sw_period of 5.8.18 ticks a second time.

    Then the hrtimer catches up, which leaves a tick for the loop. (The storm of CVE-2025-71104.)
    """
    m = booted(kernel, apicv=True)
    (v,) = m.vcpus
    start(v, 300_000, PERIODIC)
    m.trace.clear()
    m.set_time(1_000_000)
    skips = kernel in having(Trait.TIMER_NO_CATCH_UP)
    states = [line[-1] for line in lines(m, "kvm_hv_timer_state")]
    assert states == (["1", "1"] if skips else ["0"])
    assert v.hv_timer is skips
    assert m.next_timer() == (1_300_000 if skips else 1_200_000)
    assert len(lines(m, "kvm_apic_accept_irq")) == (2 if skips else 3)


# ------------------------------------------------------------------------------------------------- a sleeper's wake-up


def wakes(m: fx.Machine) -> list[str]:
    """What the timer of a vCPU does that halts, sleeps, and is woken by another vector."""
    (v,) = m.vcpus
    v.rflags = r.RFLAGS_FIXED | r.RFLAGS_IF
    assert v.exit(fx.VmxExit.HLT).blocked
    m.trace.clear()
    m.signal_msi(0xFEE0_0000, 0x41)
    v.run()
    return [line.partition(" vec ")[0] for what in ("hv_timer_state", "kvm_apic_accept_irq") for line in lines(m, what)]


OFF = ["kvm_hv_timer_state: vcpu_id 0 hv_timer 0"]


@pytest.mark.parametrize("hv_timer", [True, False])
@pytest.mark.parametrize("kernel", fx.profiles())
def test_wake_up_restarts_a_timer_that_does_not_count(kernel: str, hv_timer: bool) -> None:
    """vmx_post_block of 5.10.262 asks for set_hv_timer alone; vcpu_block of 5.15.202 and 6.1.192 for what had counted.

    restart_apic_timer then tells of an hrtimer, although no timer runs.
    """
    restarts = hv_timer and kernel in having(Trait.WAKE_RESTARTS_TIMER)
    told = wakes(booted(kernel, hv_timer=hv_timer))
    assert [line for line in told if "hv_timer" in line] == OFF * restarts


@pytest.mark.parametrize("apicv", [False, True])
@pytest.mark.parametrize("kernel", fx.profiles())
def test_wake_up_of_a_one_shot_that_is_over(kernel: str, apicv: bool) -> None:
    """start_sw_period of 5.10.262: a one-shot that was delivered keeps its period, but no target: it ticks again."""
    m = booted(kernel, apicv=apicv)
    (v,) = m.vcpus
    v.rflags = r.RFLAGS_FIXED | r.RFLAGS_IF
    start(v, 300_000)
    m.set_time(300_000)
    assert (v.hw_deliver() if v.apicv else v.injected) == TICK
    v.hw_wrmsr(0x80B, 0)
    told = wakes(m)
    restarts = kernel in having(Trait.WAKE_RESTARTS_TIMER)
    assert told == OFF * restarts + ["kvm_apic_accept_irq: apicid 0"] * (1 + restarts)


@pytest.mark.parametrize(
    ("release", "restarts"), [("5.15.1", True), ("5.15.106", False), ("5.15", False), ("5.16", True)]
)
def test_release_that_restarts_at_a_wake_up(release: str, restarts: bool) -> None:
    """KVM: VMX: Move preemption timer <=> hrtimer dance to common x86: 5.17, and 5.15.106's vcpu_block."""
    assert wakes(booted(release))[:1] == (OFF if restarts else ["kvm_apic_accept_irq: apicid 0"])


# -------------------------------------------------------------------------------------------------- IA32_TSC_DEADLINE


@pytest.mark.parametrize("kernel", fx.profiles())
def test_deadline_of_a_disabled_apic(kernel: str) -> None:
    """kvm_get_lapic_tscdeadline_msr up to 5.8.18 asks only for the mode, kvm_set_... of 5.6.4 and 5.7.6 likewise."""
    m = booted(kernel, hv_timer=False)
    (v,) = m.vcpus
    start(v, 1 << 40, DEADLINE_MODE)
    v.wrmsr(BASE, v.apic_base & ~0xC00)
    assert v.rdmsr(DEADLINE) == (0 if since(kernel, "5.10") else 1 << 40)
    v.wrmsr(DEADLINE, 1 << 41)
    assert v.set_msr(BASE, v.apic_base | 0xC00)
    written = since(kernel, "5.6") and not since(kernel, "5.8")
    assert v.rdmsr(DEADLINE) == 1 << 40 + written


@pytest.mark.parametrize("kernel", fx.profiles())
def test_deadline_in_mode_3(kernel: str) -> None:
    """5.8.18 kvm_set_lapic_tscdeadline_msr refuses one-shot and periodic, 5.10.262 all but deadline mode.

    The preemption timer asks for no mode, an hrtimer is not started. It reads as 0 everywhere.
    """
    m = booted(kernel)
    (v,) = m.vcpus
    start(v, 1000, MODE_3)
    written = not since(kernel, "5.10")
    assert v.hv_timer is written
    assert v.rdmsr(DEADLINE) == 0
    m.set_time(1000)
    assert in_irr(v) is written
    m = booted(kernel, hv_timer=False)
    start(m.vcpus[0], 1000, MODE_3)
    assert m.next_timer() is None


# --------------------------------------------------------------------------------------------------- the wait in traces


@pytest.mark.parametrize("vendor", ["vmx", "svm"])
@pytest.mark.parametrize("kernel", fx.profiles())
def test_where_the_wait_is_traced(kernel: str, vendor: str) -> None:
    """Up to 5.15.215 vcpu_enter_guest traces it behind the exit, so before a kvm_exit that comes from handle_exit.

    6.1.192 and later: where it waits, behind kvm_entry.
    """
    options = {"hv_timer": False} if vendor == "vmx" else {}
    m = booted(kernel, vendor=vendor, timer_advance_ns=1000, **options)
    (v,) = m.vcpus
    v.rflags |= r.RFLAGS_IF
    start(v, 50_000, DEADLINE_MODE)
    exit_(v)
    m.set_time(49_000)
    m.trace.clear()
    exit_(v)
    assert v.injected == TICK
    late = not since(kernel, "6.1")
    assert len(lines(m, EXPIRE)) == (0 if late else 1)
    exit_(v)
    names = [line.partition(":")[0] for line in m.trace.lines()]
    entry = names.index("kvm_entry")
    exit_late = not since(kernel, "5.8") or (vendor == "svm" and not since(kernel, "6.6"))
    at = names.index(EXPIRE)
    assert lines(m, EXPIRE)[0].endswith("delta -1000 (early)")
    if not late:
        assert at == entry + 1
    elif exit_late:
        assert names[entry : entry + 3] == ["kvm_entry", EXPIRE, "kvm_exit"]
    else:
        assert names[entry : entry + 3] == ["kvm_entry", "kvm_exit", EXPIRE]
    assert v.get_lapic()
    assert len(lines(m, EXPIRE)) == 1


@pytest.mark.parametrize("dispatcher", ["python", "compiled"])
def test_last_wait_of_an_iteration(dispatcher: Any) -> None:
    """5.10.262: re-entries wait too, and advance_expire_delta keeps the last one's for the line behind the exit."""
    m = booted("5.10", apicv=True, timer_advance_ns=1000, dispatcher=dispatcher)
    (v,) = m.vcpus
    v.rflags |= r.RFLAGS_IF
    v.wrmsr(LVTT, DEADLINE_MODE | TICK)
    for target, early in (50_000, 600), (100_000, 500):
        assert v.wrmsr(DEADLINE, target).reentered
        m.set_time(target - early)
    assert v.waited_ns == 1100
    assert not lines(m, EXPIRE)
    exit_(v)
    (line,) = lines(m, EXPIRE)
    assert line.endswith("delta -500 (early)")


@pytest.mark.parametrize("kernel", fx.profiles())
def test_wait_over_a_restore(kernel: str) -> None:
    """kvm_apic_set_state forgets expired_tscdeadline in 5.15.215 and later, not in 5.8.18 and 5.10.262."""
    m = booted(kernel, hv_timer=False, timer_advance_ns=1000)
    (v,) = m.vcpus
    v.rflags |= r.RFLAGS_IF
    start(v, 50_000, DEADLINE_MODE)
    m.set_time(49_000)
    v.set_lapic(page_of(v, IRR=0))
    assert m.mem[v.own + L.K_EXPIRED_DEADLINE] == (0 if since(kernel, "5.15") else 50_000)


# ------------------------------------------------------------------------------------------------------ what is counted


@pytest.mark.parametrize("dispatcher", ["python", "compiled"])
@pytest.mark.parametrize("kernel", kernels("5.8"))
def test_fast_reentries_in_stat_exits(kernel: str, dispatcher: Any) -> None:
    """5.8.18 and 5.10.262 count no re-entry; 5.15.215 and 6.1.192 do, in vcpu_enter_guest's loop."""
    m = booted(kernel, dispatcher=dispatcher)
    (v,) = m.vcpus
    v.wrmsr(LVTT, DEADLINE_MODE | TICK)
    before = v.counters()["exits"]
    assert v.wrmsr(DEADLINE, 1 << 30).reentered
    assert v.counters()["exits"] - before == since(kernel, "5.15")


@pytest.mark.parametrize("kernel", kernels("5.10"))
def test_ranges_of_the_filter_in_stat_exits(kernel: str) -> None:
    """5.10.262 kvm_msr_allowed counts an exit for each range that it passes: a backport put the increment there."""
    m = booted(kernel)
    (v,) = m.vcpus
    ranges = [(r.MSR_FILTER_READ, msr, [True]) for msr in (0x10, DEADLINE, 0x20)]
    m.set_msr_filter(ranges=ranges)
    for msr, passed in ((DEADLINE, 1), (BASE, 3), (LVTT, 0)):
        before = v.counters()["exits"]
        v.rdmsr(msr)
        assert v.counters()["exits"] - before == 1 + passed * (not since(kernel, "5.15"))


# ------------------------------------------------------------------------------------------ releases within one series


@pytest.mark.parametrize(
    ("release", "at_once"), [("6.1.106", False), ("6.1.107", True), ("6.1", True), ("5.10.262", False)]
)
def test_release_that_restores_a_one_shot(release: str, at_once: bool) -> None:
    """KVM: x86: fire timer when it is migrated and expired, and in oneshot mode: 6.3, and 6.1.107."""
    m = booted(release, hv_timer=False)
    m.vcpus[0].set_lapic(page_of(m.vcpus[0], LVTT=TICK, TMICT=300_000, TMCCT=0))
    assert m.next_timer() == (None if at_once else 300_000)


@pytest.mark.parametrize(
    ("release", "at_once"), [("6.1.183", True), ("6.1.184", False), ("6.12.100", True), ("6.12.101", False)]
)
def test_release_that_posts_in_an_ioctl(release: str, at_once: bool) -> None:
    """KVM: x86: Only reset TSC Deadline Timer in apic_timer_expired on KVM_RUN: 6.1.184 and 6.12.101."""
    m = booted(release, apicv=True)
    (v,) = m.vcpus
    v.wrmsr(LVTT, DEADLINE_MODE | TICK)
    m.set_time(1000)
    v.set_msr(DEADLINE, 500)
    assert in_irr(v) is at_once


@pytest.mark.parametrize(
    ("release", "skips"),
    [("5.10.247", False), ("5.10.248", True), ("6.1.159", False), ("6.1.160", True), ("6.12.63", False)],
)
def test_release_that_skips_periods(release: str, skips: bool) -> None:
    """CVE-2025-71104: 5.10.248, 6.1.160 and 6.12.64."""
    m = booted(release, hv_timer=False)
    start(m.vcpus[0], 300_000, PERIODIC)
    m.set_time(1_000_000)
    assert m.next_timer() == (1_300_000 if skips else 1_200_000)


@pytest.mark.parametrize(("release", "waits"), [("5.10.37", False), ("5.10.38", True)])
def test_release_that_waits_for_a_one_shot(release: str, waits: bool) -> None:
    """KVM: LAPIC: Accurately guarantee busy wait for timer to expire when using hv_timer: 5.10.38."""
    m = booted(release, timer_advance_ns=1000)
    (v,) = m.vcpus
    v.rflags |= r.RFLAGS_IF
    start(v, 300_000)
    m.set_time(299_000)
    assert v.waited_ns == 1000 * waits
