"""What a batch's records tell of its time."""

from __future__ import annotations

import random

import numpy as np
import pytest

import fastexit as fx
from fastexit import hyperv as hv
from timedexits import DEADLINE, EOI, ICR, MACHINES, RETPOLINE, TPR, booted


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
        out[i] = (v, reason, msr, info, value, 0)
    return out


def both_doors(kernel: str, vendor: str, apicv: bool, calm: bool, n: int = 60) -> tuple:
    exits = records(vendor, n, 7, calm)
    batch, single = booted(kernel, costs=None, vendor=vendor, apicv=apicv), booted(kernel, vendor=vendor, apicv=apicv)
    outcomes = batch.run(exits)
    seen = []
    for record in exits.tolist():
        v, reason, msr, info, value, _ = record
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
        one_kind = out.accepted > 0 and len({sent.effect for sent in out.sent}) <= 1
        assert not (out.reentered and one_kind and np.isnan(total[i])), out
        assert not (one_kind and not out.user and np.isnan(sent[i])), out
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
        exits[i] = (rng.randrange(4), reason, 0, 4 | fx.MMIO_WRITE, value, 0xFEE0_0000 + offset)
    batch, single = (fx.Machine(vcpus=4, vendor=vendor, apicv=apicv, costs=costs) for costs in (None, RETPOLINE))
    outcomes = batch.run(exits)
    seen = [single.vcpus[v].mem_write(gpa, value) for v, gpa, value in exits[["vcpu", "gpa", "value"]].tolist()]
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


def hypercalls(n: int, svm: bool) -> np.ndarray:
    """IPIs of a Windows guest: by Hyper-V's ICR, by hypercall from registers and from memory; EOIs, other calls."""
    rng, out = random.Random(n), np.zeros(n, dtype=fx.EXIT)
    wrmsr, info, call = (0x7C, 1, 0x81) if svm else (32, 0, 18)
    for i in range(n):
        v, kind = rng.randrange(4), rng.randrange(8)
        if kind < 2:
            out[i] = (v, wrmsr, hv.MSR_HV_ICR, info, fx.icr(rng.randrange(5), rng.randrange(0x31, 0x39)), 0)
        elif kind == 2:
            out[i] = (v, wrmsr, rng.choice((hv.MSR_HV_EOI, hv.MSR_HV_TPR, hv.MSR_HV_GUEST_OS_ID)), info, 1, 0)
        elif kind < 6:
            fast = hv.HvCall.SEND_IPI | hv.HV_CALL_FAST
            out[i] = (v, call, fast, 0, rng.randrange(8, 0x80), rng.getrandbits(4))
        else:
            out[i] = (v, call, rng.choice((hv.HvCall.SEND_IPI, 0x77)), 0, 0x1000, 0)
    return out


@pytest.mark.parametrize("apicv", [True, False])
@pytest.mark.parametrize("vendor", ["vmx", "svm"])
def test_batch_of_a_windows_guest_agrees(vendor: str, apicv: bool) -> None:
    exits = hypercalls(300, vendor == "svm")
    machines = [booted(costs=costs, vendor=vendor, apicv=apicv, hyperv=True) for costs in (None, RETPOLINE)]
    for m in machines:
        m.vcpus[0].set_msr(hv.MSR_HV_GUEST_OS_ID, 1)
        m.guest_memory[0x1000:0x1010] = bytes([0x55] + [0] * 7 + [6] + [0] * 7)
    batch, single = machines
    outcomes = batch.run(exits)
    seen = []
    for v, reason, msr, info, value, gpa in exits.tolist():
        if reason == single.dispatcher.vendor.hypercall_reason:
            seen.append(single.vcpus[v].exit(reason, rcx=msr, rdx=value, r8=gpa))
        else:
            seen.append(single.vcpus[v].exit(reason, msr=msr, value=value, info1=info))
    assert [out.code for out in seen] == outcomes["code"].tolist()
    sent, total = fx.batch_cycles(batch, exits, outcomes, RETPOLINE)
    for i, out in enumerate(seen):
        assert np.isnan(sent[i]) or sent[i] == out.cycles_ipi, (i, exits[i], out)
        assert np.isnan(total[i]) or total[i] == out.cycles, (i, exits[i], out)
        one_kind = out.accepted > 0 and len({sent.effect for sent in out.sent}) <= 1
        assert not (one_kind and not out.user and np.isnan(sent[i])), out
    assert np.isfinite(sent).sum() >= 60


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
