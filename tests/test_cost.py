"""Outcomes with modelled time."""

from __future__ import annotations

import random

import pytest

import fastexit as fx
from fastexit import hyperv as hv
from fastexit import layout as L
from fastexit.costs.profile import cost_profile
from fastexit.insight.walk import STEPS
from timedexits import DEADLINE, EOI, ICR, MACHINES, OFF, RETPOLINE, TPR, booted, ipi, stages


def test_no_costs_no_cycles() -> None:
    m = booted(costs=None)
    out = m.vcpus[0].wrmsr(ICR, fx.icr(dest=1, vector=0xFD))
    assert (out.cycles, out.cycles_ipi) == (None, None)
    assert type(out) is fx.Outcome
    assert type(m.dispatcher).__name__ == "Dispatcher"
    assert type(m.vcpus[0]) is fx.Vcpu
    assert not {"cycles", "cycles_ipi"} & set(out.as_dict())


@pytest.mark.parametrize(("kernel", "vendor", "apicv"), MACHINES)
def test_costs_change_nothing_else(kernel: str, vendor: str, apicv: bool) -> None:
    """The same outcomes and the same memory with and without costs, traced by the user or not."""
    options = {"vendor": vendor, "apicv": apicv, "kernel": kernel}
    plain, timed = booted(costs=None, **options), booted(**options)
    values = [fx.icr(dest=1, vector=0x41), fx.icr(dest=0, vector=0x42), fx.icr(vector=0x43, shorthand=3)]
    accesses = [(ICR, value) for value in values] + [(EOI, 0), (TPR, 0x20), (DEADLINE, 5), (0x83F, 0x50), (0x832, 0xE0)]
    for tracing in (False, True):
        for m in (plain, timed):
            m.trace.enable() if tracing else m.trace.disable()
        for msr, value in accesses:
            for i in (0, 1):
                a, b = (m.vcpus[i].wrmsr(msr, value) for m in (plain, timed))
                assert a == b
                assert b.cycles_spent > 0
        assert plain.trace.lines() == timed.trace.lines()
        keep = [m.mem[L.H_TRACE_HEAD] for m in (plain, timed)]
        assert keep[0] == keep[1]
    assert (plain.words[: L.TRACE] == timed.words[: L.TRACE]).all()


def test_full_trace_ring_does_not_blind_the_clock() -> None:
    plain, timed = booted(costs=None), booted()
    for m in (plain, timed):
        m.trace.enable()
        m.mem[L.H_TRACE_HEAD] = L.TRACE_CAPACITY - 2
        m.words[L.TRACE :] = 7
    outs = [m.vcpus[0].wrmsr(ICR, fx.icr(dest=1, vector=0xFD)) for m in (plain, timed)]
    assert outs[1].cycles_ipi == ipi().cycles_ipi
    assert plain.trace.lost == timed.trace.lost > 0
    assert (plain.words[L.TRACE :] == timed.words[L.TRACE :]).all()


def test_generations_differ_by_what_they_skip() -> None:
    """v1's place is earlier than v3's, which is earlier than the generic path; 6.12 and 6.18 do not go around."""
    seed, generic, early = ipi("seed-v3"), ipi("seed-v3", fast=False), ipi("5.8")
    assert early.cycles_ipi < seed.cycles_ipi < generic.cycles_ipi
    assert early.cycles == seed.cycles  # the sender skips nothing yet
    costs = cost_profile(RETPOLINE)
    between = costs["guest_mode_outside"] + costs["irqoff_handler"] + costs["vendor_call"]
    assert seed.cycles_ipi - early.cycles_ipi == between
    new, again = ipi("6.18"), ipi("6.12")
    assert new.cycles < early.cycles
    assert stages(again)["srcu_lock"] == 1
    assert not {"srcu_lock", "irq_window", "prepare_switch", "guest_mode_outside"} & set(stages(new))
    assert again.cycles - new.cycles == costs["srcu_lock"] + costs["srcu_unlock"] + 0
    assert "vendor_call" in stages(early)
    assert "vendor_call" not in stages(new)


def test_reentry_makes_no_calls_through_pointers() -> None:
    """5.8 jumps back inside vmx_vcpu_run; a trip around goes through four pointers more."""
    m = booted("5.8")
    v = m.vcpus[0]
    v.wrmsr(0x832, 0xE0 | 2 << 17)
    m.set_time(10**6)
    again = v.wrmsr(DEADLINE, 1)
    assert again.reentered
    at = [charge.stage for charge in again.charges].index("reenter")
    assert "vendor_call" not in {charge.stage for charge in again.charges[at:]}
    around = v.wrmsr(TPR, 0)
    assert {c.step for c in around.charges if c.stage == "vendor_call"} >= {"preempt_disable", "enter", "vm_entry"}


@pytest.mark.parametrize("apicv", [True, False])
def test_calls_that_depend_on_apicv(apicv: bool) -> None:
    """sync_pir_to_irr with it, update_cr8_intercept without."""
    v = booted("5.7", apicv=apicv).vcpus[0]
    faulted = v.wrmsr(0x8FF, 1)  # #GP: there is an event to inject
    calls = {charge.step: charge.count for charge in faulted.charges if charge.stage == "vendor_call"}
    assert ("enter" in calls) == apicv
    steps = [charge.step for charge in faulted.charges if charge.stage == "vendor_call"]
    assert steps.count("inject_events") == (1 if apicv else 2)


def test_pointers_become_static_calls() -> None:
    kicks = [stages(ipi(kernel, fast=False, apicv=False))["vendor_call"] for kernel in ("5.8", "6.1", "6.12")]
    assert kicks[0] > kicks[1] > kicks[2] == 1  # smp_ops stays one
    assert "vendor_call" not in stages(ipi("6.12"))


def test_apicv_decides_how_the_target_is_told() -> None:
    assert [sent.effect for sent in ipi().sent] == [fx.Effect.NOTIFY]
    assert [sent.effect for sent in ipi(apicv=False).sent] == [fx.Effect.KICK]
    assert "kick" in stages(ipi(apicv=False))
    assert ipi().sent[0].cycles == ipi().cycles_ipi


def test_multicast_tells_each_target_in_turn() -> None:
    m = booted()
    out = m.vcpus[0].wrmsr(ICR, fx.icr(vector=0x41, shorthand=fx.Shorthand.ALL_BUT_SELF))
    assert [sent.vcpu for sent in out.sent] == [1, 2, 3]
    each = m.costs["accept"] + m.costs["notify"]
    assert out.cycles_ipi - out.sent[0].cycles == 2 * each
    again = m.vcpus[0].wrmsr(ICR, fx.icr(vector=0x41, shorthand=fx.Shorthand.ALL_BUT_SELF))
    assert (again.accepted, again.sent) == (3, ())  # PIR was set already
    assert again.cycles_ipi == out.cycles_ipi - 3 * m.costs["notify"]


def test_who_does_not_run_again_has_no_cycles() -> None:
    m = booted()
    m.vcpus[1].rflags |= 1 << 9
    halted = m.vcpus[1].exit(fx.VmxExit.HLT)
    assert (halted.blocked, halted.cycles, "block" in stages(halted)) == (True, None, True)
    assert halted.cycles_spent > m.costs["vm_exit"]
    woken = m.vcpus[0].wrmsr(ICR, fx.icr(dest=1, vector=0xFD))
    assert [sent.effect for sent in woken.sent] == [fx.Effect.WAKE]
    assert m.vcpus[1].run()
    assert m.vcpus[1].run_cycles > m.costs["vm_entry"]
    out = m.vcpus[0].exit(fx.VmxExit.TRIPLE_FAULT)
    assert (out.cycles, "user_exit" in stages(out)) == (None, True)


def test_discarded_interrupts_cost_no_acceptance() -> None:
    """The first target's APIC is off by software: the second one accepts and is told."""
    m = booted()
    m.vcpus[1].wrmsr(0x80F, 0xFF)
    for v in m.vcpus[2:]:
        v.wrmsr(0x808, 0)  # the new map has kicked them
    out = m.vcpus[0].wrmsr(ICR, fx.icr(vector=0x41, shorthand=fx.Shorthand.ALL_BUT_SELF))
    assert (out.accepted, [sent.vcpu for sent in out.sent], stages(out)["accept"]) == (2, [2, 3], 2)


def test_nobody_there_no_ipi() -> None:
    m = booted()
    out = m.vcpus[0].wrmsr(ICR, fx.icr(dest=99, vector=0x41))
    assert (out.accepted, out.cycles_ipi) == (0, None)
    assert out.cycles > 0
    assert m.vcpus[0].wrmsr(TPR, 0x10).cycles_ipi is None


def test_timers() -> None:
    m = booted("5.8", tsc_khz=1_000_000)
    v = m.vcpus[0]
    v.wrmsr(0x832, 0xE0 | 2 << 17)
    assert "preemption_timer" in stages(v.wrmsr(DEADLINE, 10**9))
    m = booted("5.8", hv_timer=False)
    v = m.vcpus[0]
    v.wrmsr(0x832, 0xE0 | 2 << 17)
    assert "hrtimer" in stages(v.wrmsr(DEADLINE, 10**9))
    assert v.timed.cycles_ipi is None


def test_entry_that_waits_for_a_deadline() -> None:
    m = booted(timer_advance_ns=1000)
    v = m.vcpus[0]
    v.wrmsr(0x832, 0xE0 | 2 << 17)
    v.wrmsr(DEADLINE, m.time + 10_000)
    m.set_time(9_000)
    assert stages(v.timed).get("waited") or any("waited" in stages(u.timed) for u in m.vcpus)
    (wait,) = [charge for charge in v.timed.charges if charge.stage == "waited"]
    assert wait.cycles == 1000 * m.costs.ghz


def test_ipi_virtualisation_needs_no_exit() -> None:
    m = booted(ipiv=True, costs="ipiv-host")
    out = m.vcpus[0].hw_wrmsr(ICR, fx.icr(dest=1, vector=0xFD))
    assert (out.path, out.cycles, out.cycles_ipi) == (fx.Path.HARDWARE, m.costs["hw_ipi"], m.costs["hw_ipi"])
    assert [(sent.vcpu, sent.effect) for sent in out.sent] == [(1, fx.Effect.NOTIFY)]
    m.vcpus[1].hw_rdmsr(0x80A)
    assert m.vcpus[1].timed.cycles == m.costs["hw_access"]
    with_exit = m.vcpus[0].hw_wrmsr(ICR, fx.icr(vector=0xFD, shorthand=3))
    assert with_exit.cycles > m.costs["vm_exit"]


def test_avic_rings_doorbells() -> None:
    m = fx.Machine(vcpus=3, vendor="svm", costs="epyc")
    for i, v in enumerate(m.vcpus):
        v.mmio_write(0xF0, 0x1FF)
        v.load(i)
    for v in m.vcpus:
        v.mmio_write(0xF0, 0x1FF)
    out = m.vcpus[0].hw_mmio_write(0x300, 0x41 | 3 << 18)
    assert {effect for _, effect, _ in out.sent} <= {fx.Effect.DOORBELL}
    assert [vcpu for vcpu, _, _ in out.sent] == [1, 2]
    assert out.effects is fx.Effect.DOORBELL


@pytest.mark.parametrize(("kernel", "vendor", "apicv"), MACHINES)
def test_targets_account_for_the_effects(kernel: str, vendor: str, apicv: bool) -> None:
    """What each target needs, seen one by one, is what the kernels said of all of them together."""
    rng = random.Random(kernel + vendor)
    m = booted(kernel, vendor=vendor, apicv=apicv)
    seen = fx.Effect.NONE
    for _ in range(50):
        v = rng.choice(m.vcpus)
        if rng.random() < 0.25:
            while v.ack() is not None:
                v.eoi()
            v.rflags |= 1 << 9
            v.exit(fx.VmxExit.HLT if vendor == "vmx" else fx.SvmExit.HLT)
        elif rng.random() < 0.3:
            v.run()
            v.ack(), v.eoi()
        else:
            dest, shorthand = rng.randrange(4), rng.choice((0, 0, 1, 2, 3))
            mode = rng.choice((0, 0, 0, 4))
            value = fx.icr(0 if shorthand else dest, rng.choice((0x41, 0x42)), delivery=mode, shorthand=shorthand)
            out = v.wrmsr(ICR, value)
            union = fx.Effect.NONE
            for sent in out.sent:
                union |= sent.effect
            assert union == out.effects
            assert (out.cycles_ipi is None) == (out.accepted <= 0)
            seen |= union
    assert fx.Effect.WAKE in seen


@pytest.mark.parametrize(("kernel", "vendor"), [("seed-v3", "vmx"), ("5.8", "svm"), ("6.18", "vmx"), ("6.18", "svm")])
def test_charges_add_up(kernel: str, vendor: str) -> None:
    out = ipi(kernel, vendor=vendor)
    costs = cost_profile(RETPOLINE)
    assert out.cycles == out.cycles_spent == sum(charge.cycles for charge in out.charges)
    assert all(charge.cycles == charge.count * costs[charge.stage] for charge in out.charges)
    assert {charge.step for charge in out.charges} <= {step.method for step in STEPS} | {"loop_tail", "sync_from_vapic"}
    assert sum(out.as_dict()["stages"].values()) == out.cycles


def test_outcome_is_still_one() -> None:
    out = ipi()
    assert out == booted(costs=None).vcpus[0].wrmsr(ICR, fx.icr(dest=1, vector=0xFD))
    assert repr(out).endswith(f"cycles_ipi={out.cycles_ipi}, cycles={out.cycles})")
    with pytest.raises(AttributeError):
        out.cycles = 0  # type: ignore[misc]


def test_snapshot_takes_costs_again() -> None:
    data = booted().snapshot()
    m = fx.Machine.restore(data, costs=OFF)
    assert m.vcpus[0].wrmsr(ICR, fx.icr(dest=1, vector=0xFD)).cycles > 0
    assert fx.Machine.restore(data).vcpus[0].wrmsr(ICR, fx.icr(dest=1, vector=0xFD)).cycles is None


def on_hyperv(**options: object) -> fx.Machine:
    m = booted(apicv=True, hyperv=True, **options)
    m.vcpus[0].set_msr(hv.MSR_HV_GUEST_OS_ID, 1)
    for v in m.vcpus:
        v.wrmsr(TPR, 0)
        v.wrmsr(TPR, 0)
    return m


def test_an_icr_of_hypervs_is_an_icr_by_the_generic_path() -> None:
    """Same stages as the same write of MSR 0x830 that the fast path declines."""
    m, other = on_hyperv(), on_hyperv()
    other.fastpath = False
    value = fx.icr(dest=1, vector=0xFD)
    windows, linux = m.vcpus[0].wrmsr(hv.MSR_HV_ICR, value), other.vcpus[0].wrmsr(ICR, value)
    assert (windows.cycles_ipi, windows.cycles, stages(windows)) == (linux.cycles_ipi, linux.cycles, stages(linux))
    assert stages(m.vcpus[1].wrmsr(hv.MSR_HV_EOI, 0)) == stages(other.vcpus[1].wrmsr(EOI, 0))
    m.vcpus[2].enable_synic(1)
    m.vcpus[2].wrmsr(TPR, 0)
    sint = m.vcpus[2].wrmsr(hv.MSR_HV_SINT0, 0x41)
    assert stages(sint)["msr_access"] == 1
    assert not {"icr", "lapic_access", "timer"} & stages(sint).keys()


def test_a_hypercall_of_hypervs_looks_at_every_vcpu_and_pays_for_each_target() -> None:
    m, profile = on_hyperv(), cost_profile(RETPOLINE)
    v = m.vcpus[0]

    def call(control: int, given: int, output: int = 0, xmm: tuple[int, ...] = ()) -> dict[str, int]:
        for other in m.vcpus:
            other.hw_notify()
        v.hv_hypercall(control, given, output, xmm)
        out = v.timed
        assert out is not None
        assert out.cycles_spent == sum(charge.cycles for charge in out.charges)
        assert (out.cycles_ipi is None) == (out.accepted < 1)
        return stages(out)

    fast = call(hv.HvCall.SEND_IPI | hv.HV_CALL_FAST, 0x41, 0b0110)
    assert (fast["hv_hypercall"], fast["hv_target"], fast["accept"], fast["notify"]) == (1, 4, 2, 2)
    assert not {"hypercall", "guest_memory", "msr_access", "icr"} & fast.keys()
    one = v.timed
    m.guest_memory[0:16] = bytes([0x42] + [0] * 7 + [0b0110] + [0] * 7)
    slow = call(hv.HvCall.SEND_IPI, 0)
    assert slow == fast | {"guest_memory": 1}
    assert v.timed.cycles_ipi == one.cycles_ipi + profile["guest_memory"]
    ex = hv.HvCall.SEND_IPI_EX | hv.HV_CALL_FAST | 1 << hv.HV_CALL_VAR_COUNT_SHIFT
    assert call(ex, 0x43, 0, (1, 0b0110)) == fast
    refused = call(hv.HvCall.SEND_IPI | hv.HV_CALL_FAST, 0x1, 0b0110)
    assert refused["hv_hypercall"] == 1
    assert not {"accept", "hv_target"} & refused.keys()
    m.vcpus[0].set_msr(hv.MSR_HV_GUEST_OS_ID, 0)
    assert {"hypercall"} == {"hypercall", "hv_hypercall"} & call(0, 0).keys()


def test_a_synthetic_timer_is_set_and_served_at_an_entry() -> None:
    m = on_hyperv()
    v = m.vcpus[0]
    v.enable_synic(1)
    v.wrmsr(hv.MSR_HV_STIMER0_CONFIG, hv.HV_STIMER_DIRECT | 0x61 << 4 | hv.HV_STIMER_AUTO_ENABLE)
    armed = v.wrmsr(hv.MSR_HV_STIMER0_CONFIG + 1, 5_000)
    assert stages(armed)["hrtimer"] == 1
    m.set_time(600_000)
    served = v.exit(fx.VmxExit.EXTERNAL_INTERRUPT)
    assert stages(served)["accept"] == 1
    assert "hrtimer" not in stages(served)
