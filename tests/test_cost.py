"""Cost profiles, outcomes with modelled time, and what a batch's records tell of it."""

from __future__ import annotations

import json
import random
import re
import sys
from pathlib import Path

import numpy as np
import pytest

import fastexit as fx
from fastexit import layout as L
from fastexit.cli import main
from fastexit.cost import STAGES, cost_profile
from fastexit.meter import EFFECT_STAGES, TimedOutcome
from fastexit.walk import STEPS, walk

ROOT = Path(__file__).parents[1]
COSTS = ROOT / "src" / "fastexit" / "costs"
RETPOLINE, OFF = "skylake-retpoline", "skylake-mitigations-off"
CITATION = re.compile(r"commit [0-9a-f]{12}\b|[\w.-]+@[\w.-]+\.\w+|lkml \d{4}\.\d/\d{5}|\bassumed\b")
ICR, EOI, TPR, DEADLINE = 0x830, 0x80B, 0x808, 0x6E0
MACHINES = [(kernel, vendor, apicv) for kernel in fx.profiles() for vendor in ("vmx", "svm") for apicv in (True, False)]


def booted(kernel: str = "6.18", costs: str | fx.CostProfile | None = RETPOLINE, **options: object) -> fx.Machine:
    """Four vCPUs in the guest, nothing pending."""
    m = fx.Machine(vcpus=4, kernel=kernel, costs=costs, **options)
    m.boot_x2apic()
    for v in m.vcpus:
        v.wrmsr(TPR, 0)
        v.wrmsr(TPR, 0)
    return m


def ipi(kernel: str = "6.18", fast: bool = True, **options: object) -> TimedOutcome:
    m = booted(kernel, **options)
    m.fastpath = fast
    return m.vcpus[0].wrmsr(ICR, fx.icr(dest=1, vector=0xFD))


def stages(out: TimedOutcome) -> dict[str, int]:
    counts: dict[str, int] = {}
    for charge in out.charges:
        counts[charge.stage] = counts.get(charge.stage, 0) + charge.count
    return counts


# ------------------------------------------------------------------------------------------------------------ tables


@pytest.mark.parametrize("name", fx.cost_profiles())
def test_every_number_has_a_source(name: str) -> None:
    """A citation or the word "assumed"; what is calibrated says on what, and its profile's file says so itself."""
    profile = cost_profile(name)
    assert set(profile.costs) == set(STAGES)
    assert CITATION.search(profile.ghz_source)
    for stage, cost in profile.costs.items():
        assert CITATION.search(cost.source), f"{stage}: {cost.source}"
        assert "calibrated" not in cost.source or CITATION.search(cost.source.replace("assumed", "")), stage


def test_tables_of_both_vendors_and_both_mitigation_sets() -> None:
    assert {RETPOLINE, OFF, "ipiv-host", "epyc"} <= set(fx.cost_profiles())
    assert cost_profile(RETPOLINE)["vendor_call"] > cost_profile(OFF)["vendor_call"]


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


GHZ = 'ghz = { value = 3, source = "here" }\n'
OTHER = 'base = "epyc"\n'


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "description is missing and 52 more, which base = NAME would give"),
        ("description = 1\n" + OTHER, "description is not a text"),
        (OTHER + 'base2 = "x"', "unknown key 'base2', not base?"),
        (OTHER + "vm_exti = 4", "unknown key 'vm_exti', not vm_exit?"),
        (OTHER + '"\\u001b[31m" = 4', "unknown key '\\x1b[31m'"),
        ('base = "skylake"', "base is none of "),
        ("base = []", "base is none of "),
        (OTHER + "vm_exit = 4", 'vm_exit is not { cycles = NUMBER, source = "..." }'),
        (OTHER + "vm_exit = { cycles = 4 }", "vm_exit: source is missing"),
        (OTHER + 'vm_exit = { source = "x" }', "vm_exit: cycles is missing"),
        (OTHER + 'vm_exit = { cycles = 4, source = "x", unit = "ns" }', "vm_exit: unknown key 'unit'"),
        (OTHER + 'vm_exit = { cycles = "4", source = "x" }', "vm_exit: cycles is not a number"),
        (OTHER + 'vm_exit = { cycles = true, source = "x" }', "vm_exit: cycles is not a number"),
        (OTHER + 'vm_exit = { cycles = 4.5, source = "x" }', "vm_exit: cycles are whole numbers, not 4.5"),
        (OTHER + 'vm_exit = { cycles = -4, source = "x" }', "vm_exit: -4 cycles is negative"),
        (OTHER + 'vm_exit = { cycles = 4, source = " " }', "vm_exit: source is not a text"),
        (
            OTHER + 'vm_exit = { cycles = 99999999999999999999, source = "x" }',
            "99999999999999999999 cycles is too much",
        ),
        (OTHER + 'vm_exit = { cycles = inf, source = "x" }', "vm_exit: cycles are whole numbers, not inf"),
        (OTHER + 'ghz = { value = 2.5e9, source = "x" }', "ghz: 2500000000.0 is no clock rate in GHz"),
        (OTHER + 'ghz = { value = 1e-300, source = "x" }', "ghz: 1e-300 is no clock rate"),
        (OTHER + 'ghz = { value = 0, source = "x" }', "ghz: 0 is no clock rate"),
        (OTHER + 'ghz = { value = nan, source = "x" }', "ghz: nan is no clock rate"),
        (OTHER + "vm_exit = ", "Invalid value"),
    ],
)
def test_bad_table_is_refused_in_one_line(tmp_path: Path, text: str, complaint: str) -> None:
    path = write(tmp_path / "mine.toml", text)
    with pytest.raises(ValueError, match=re.escape(complaint)) as refused:
        fx.CostProfile.load(path)
    assert str(refused.value).startswith(str(path))
    assert "\n" not in str(refused.value)


def test_what_is_no_text_is_refused_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Neither UTF-8 nor a file; a byte order mark is no mistake, whatever the locale."""
    path = tmp_path / "mine.toml"
    path.write_bytes(OTHER.encode() + b'description = "\xff"')
    with pytest.raises(ValueError, match=re.escape(f"{path}: byte 29 is not UTF-8")):
        fx.CostProfile.load(path)
    path.write_bytes(b"\xef\xbb\xbf" + OTHER.encode() + 'description = "r\u00e4ck"'.encode())
    assert fx.CostProfile.load(path).description == "r\u00e4ck"
    (tmp_path / "folder.toml").mkdir()
    assert main(["walk", "--costs", str(tmp_path / "folder.toml")]) == 2
    complaint = capsys.readouterr().err
    assert complaint.count("\n") == 1
    assert "folder.toml" in complaint


def test_file_needs_no_suffix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    write(tmp_path / "mine", OTHER)
    monkeypatch.chdir(tmp_path)
    assert main(["walk", "--costs", "mine", "--kernels", "6.18"]) == 0
    assert "(mine)" in capsys.readouterr().out


def test_own_table(tmp_path: Path) -> None:
    path = write(tmp_path / "mine.toml", OTHER + GHZ + 'vm_exit = { cycles = 9, source = "measured" }')
    mine = fx.CostProfile.load(path)
    assert (mine.name, mine["vm_exit"], mine.costs["vm_exit"].source, mine.ghz) == ("mine", 9, "measured", 3.0)
    assert mine["vm_entry"] == cost_profile("epyc")["vm_entry"]
    whole = ['description = "x"', GHZ] + [f'{stage} = {{ cycles = 1, source = "x" }}' for stage in STAGES]
    assert set(fx.CostProfile.load(write(tmp_path / "whole.toml", "\n".join(whole))).values()) == {1}
    out = ipi(costs=mine)
    assert out.cycles is not None
    with pytest.raises(OSError, match="absent"):
        fx.CostProfile.load(tmp_path / "absent.toml")


def test_unknown_profile() -> None:
    with pytest.raises(ValueError, match="unknown cost profile 'z80': one of epyc, "):
        fx.Machine(vcpus=1, costs="z80")
    with pytest.raises(TypeError, match="costs is int"):
        fx.Machine(vcpus=1, costs=1)  # type: ignore[arg-type]


# -------------------------------------------------------------------------------------------------------- one exit


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


# ----------------------------------------------------------------------------------------------------------- batches


def records(vendor: str, n: int, seed: int, calm: bool) -> np.ndarray:
    """WRMSRs and other exits; calm: nothing that could leave a request behind at another vCPU."""
    rng = random.Random(seed)
    svm = vendor == "svm"
    out = np.zeros(n, dtype=fx.EXIT)
    for i in range(n):
        v, kind = rng.randrange(4), rng.random()
        write, read = ((0x7C, 1), (0x7C, 0)) if svm else ((32, 0), (31, 0))
        (reason, info), msr, value = write, ICR, fx.icr(rng.randrange(5), rng.randrange(0x31, 0x39))
        if kind < 0.1:
            value = fx.icr(0, 0x41, shorthand=rng.randrange(1, 4))
        elif kind < 0.15:
            value |= 1 << 13
        elif kind < 0.25:
            (reason, info), msr, value = read, rng.choice((0x802, 0x808, 0x830, 0x1234)), 0
        elif kind < 0.35:
            reason, info, msr, value = (0x60 if svm else 1), 0, 0, 0
        elif kind < 0.5 and not calm:
            msr, value = rng.choice(((EOI, 0), (TPR, 0x30), (0x83F, 0x44), (DEADLINE, 4), (0x832, 0xE0), (0x777, 1)))
        elif kind < 0.55 and not calm:
            value = fx.icr(rng.randrange(4), 0x41, delivery=4)
        out[i] = (v, reason, msr, info, value)
    return out


def both_doors(kernel: str, vendor: str, apicv: bool, calm: bool, n: int = 60) -> tuple:
    exits = records(vendor, n, 7, calm)
    batch, single = booted(kernel, costs=None, vendor=vendor, apicv=apicv), booted(kernel, vendor=vendor, apicv=apicv)
    outcomes = batch.run(exits)
    seen = []
    for record in exits.tolist():
        v, reason, msr, info, value = record
        seen.append(single.vcpus[v].exit(reason, msr=msr, value=value, info1=info))
    assert [out.code for out in seen] == outcomes["code"].tolist()
    return batch, exits, outcomes, seen


@pytest.mark.parametrize(("kernel", "vendor", "apicv"), MACHINES)
def test_batch_agrees_with_the_python_door(kernel: str, vendor: str, apicv: bool) -> None:
    """Where the records tell, both doors say the same, whatever was pending; the rest is NaN."""
    batch, exits, outcomes, seen = both_doors(kernel, vendor, apicv, calm=False)
    sent, total = fx.batch_cycles(batch, exits, outcomes, RETPOLINE)
    for i, out in enumerate(seen):
        assert np.isnan(sent[i]) or sent[i] == out.cycles_ipi, (i, out)
        assert np.isnan(total[i]) or total[i] == out.cycles, (i, out)
        assert not (out.reentered and out.accepted == 1 and np.isnan(total[i])), out
    assert np.isfinite(sent).sum() >= 20
    assert np.isfinite(total).any() == any(out.reentered and out.cycles_ipi is not None for out in seen)


@pytest.mark.parametrize(("vendor", "apicv"), [(vendor, apicv) for vendor in ("vmx", "svm") for apicv in (True, False)])
def test_batch_of_page_accesses_agrees(vendor: str, apicv: bool) -> None:
    """xAPIC mode, with APICs that are switched off by software in between, so that some targets discard."""
    rng = random.Random(vendor)
    reason, n = (0x400 if vendor == "svm" else 49), 300
    exits = np.zeros(n, dtype=fx.EXIT)
    for i in range(n):
        offset, value = rng.choice(
            ((0x300, 0x41), (0x300, 0xC0042), (0x310, rng.randrange(4) << 24), (0xF0, 0xFF), (0xF0, 0x1FF), (0x80, 0))
        )
        exits[i] = (rng.randrange(4), reason, offset, 4 | fx.MMIO_WRITE, value)
    batch, single = (fx.Machine(vcpus=4, vendor=vendor, apicv=apicv, costs=costs) for costs in (None, RETPOLINE))
    outcomes = batch.run(exits)
    seen = [single.vcpus[v].mmio_write(offset, value) for v, offset, value in exits[["vcpu", "msr", "value"]].tolist()]
    assert [out.code for out in seen] == outcomes["code"].tolist()
    sent, _ = fx.batch_cycles(batch, exits, outcomes, RETPOLINE)
    known = np.isfinite(sent)
    assert known.sum() >= 20
    assert [seen[i].cycles_ipi for i in np.flatnonzero(known)] == sent[known].tolist()


@pytest.mark.parametrize("kernel", fx.profiles())
def test_quiet_batch_has_the_slow_exits_too(kernel: str) -> None:
    """With APICv on VMX, IPIs leave no requests: the caller's word is true, and every exit but multicasts is known."""
    batch, exits, outcomes, seen = both_doors(kernel, "vmx", True, calm=True)
    _, total = fx.batch_cycles(batch, exits, outcomes, RETPOLINE, quiet=True)
    _, unsure = fx.batch_cycles(batch, exits, outcomes, RETPOLINE)
    for i, out in enumerate(seen):
        assert np.isnan(total[i]) or total[i] == out.cycles, (i, out)
    assert np.isfinite(total).sum() >= 40
    assert np.isfinite(total).sum() > np.isfinite(unsure).sum()


def test_batch_refuses() -> None:
    m = booted()
    exits = records("vmx", 3, 1, True)
    outcomes = m.run(exits)
    with pytest.raises(ValueError, match="3 exits and 2 outcomes"):
        fx.batch_cycles(m, exits, outcomes[:2])
    with pytest.raises(ValueError, match="exits are no"):
        fx.batch_cycles(m, outcomes, outcomes)
    with pytest.raises(ValueError, match="no cost profile"):
        fx.batch_cycles(booted(costs=None), exits, outcomes)
    assert [len(part) for part in fx.batch_cycles(m, exits[:0], outcomes[:0])] == [0, 0]
    exits["vcpu"][1] = 9
    with pytest.raises(ValueError, match="vCPU 9 of 4"):
        fx.batch_cycles(m, exits, outcomes)


# -------------------------------------------------------------------------------------------------- walk and figures


@pytest.mark.parametrize("kernel", fx.profiles())
def test_walk_shows_where_the_cycles_go(kernel: str) -> None:
    walked = walk(ICR, fx.icr(dest=1, vector=0xFD), kernel=kernel, costs=RETPOLINE)
    out = walked.outcome
    assert sum(visit.cycles for visit in walked.visits) + walked.cycles_elsewhere == out.cycles
    leaving = next(visit for visit in walked.visits if visit.step == walked.ipi_step)
    assert leaving.cycles > cost_profile(RETPOLINE)["notify"]
    plain = walk(ICR, fx.icr(dest=1, vector=0xFD), kernel=kernel)
    assert [visit.step for visit in plain.visits] == [visit.step for visit in walked.visits]
    assert [visit.lines for visit in plain.visits] == [visit.lines for visit in walked.visits]
    assert "cycles" not in plain.as_dict()["steps"][0]


def test_walk_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["walk", "--costs", RETPOLINE]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    out = ipi()
    assert f"IPI left after {out.cycles_ipi:,} cycles" in shown
    assert f"guest runs again after {out.cycles:,} cycles" in shown
    mine = write(tmp_path / "mine.toml", 'base = "epyc"')
    assert main(["walk", "--costs", str(mine), "--json", "--kernels", "6.18"]) == 0
    (walked,) = json.loads(capsys.readouterr().out)["walks"]
    assert walked["costs"] == "mine"
    assert walked["outcome"]["cycles"] == sum(step["cycles"] for step in walked["steps"]) + walked["cycles_elsewhere"]
    assert main(["walk", "--costs", "z80"]) == 2
    assert "unknown cost profile 'z80'" in capsys.readouterr().err
    assert main(["walk", "--costs", str(tmp_path / "absent.toml")]) == 2
    assert main(["walk", "--costs", str(write(tmp_path / "bad.toml", "x = 1"))]) == 2
    assert "unknown key 'x'" in capsys.readouterr().err


def test_published_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is calibrated fits; each prediction has the sign of what was published, and its miss has a bound here."""
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    pairs = __import__("costmodel").PAIRS
    bounds = {
        "v2 and v3": (1, 1.5),
        "shortest MSR_WRITE, retpolines": (0.9, 1.1),
        "tscdeadline_immed, APICv": (0.9, 1.2),
        "its injection put together": (0.5, 0.8),
        "ipi, x2APIC": (0.8, 1.2),
    }
    sides = {pair.title: (pair.before, pair.modelled(False)) for pair in pairs}
    with_apicv, without = (
        next(found for title, found in sides.items() if title.startswith(start))
        for start in ("tscdeadline_immed, APICv, v1", "tscdeadline_immed, no APICv, v1, against")
    )
    assert without[1] - with_apicv[1] == pytest.approx(without[0] - with_apicv[0], abs=1)
    for pair in pairs:
        before, after = pair.modelled(False), pair.modelled(True)
        assert after <= before
        for title, (low, high) in bounds.items():
            if title in pair.title:
                assert low <= (after - before) / pair.difference <= high, pair.title
        if "figure after" in pair.calibrates:
            assert after == pytest.approx(pair.after, rel=0.001)
    assert sum(1 for pair in pairs if not pair.calibrates) > sum(1 for pair in pairs if pair.calibrates)
    sys.modules.pop("costmodel")


def test_readme_of_the_cost_model_runs() -> None:
    text = (ROOT / "docs" / "cost-model.md").read_text()
    code = re.search(r"```python\n(.*?)```", text, flags=re.DOTALL)[1]
    scope: dict = {}
    exec(code, scope)
    assert f"# {scope['out'].cycles_ipi}, {scope['out'].cycles}\n" in code


def test_every_effect_has_its_stage() -> None:
    assert set(EFFECT_STAGES) == set(fx.Effect)
    assert set(EFFECT_STAGES.values()) <= set(STAGES)
