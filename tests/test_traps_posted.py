"""The posted-interrupt descriptor: traps 58-61; the self-IPI of trap 62 is in test_traps_fastpath.py."""

from __future__ import annotations

import numpy as np
import pytest

import fastexit as fx
from apics import ICR, interrupted, kinds, msi, vectors
from fastexit import layout as L
from fastexit import regs as r
from fastexit.profile import since

ON, SN = r.PID_ON, r.PID_SN


def posting(kernel: str = "6.18") -> tuple[fx.Machine, fx.Vcpu]:
    """A machine with APICv and its vCPU 1, which is in the guest."""
    m = fx.Machine(vcpus=3, kernel=kernel, apicv=True)
    m.boot_x2apic()
    for v in m.vcpus:
        interrupted(v)
    return m, m.vcpus[1]


def control(v: fx.Vcpu) -> int:
    return int(v.pid[4])


def pir(v: fx.Vcpu) -> set[int]:
    return {n for n in range(256) if int(v.pid[n >> 6]) >> (n & 63) & 1}


def rvi(v: fx.Vcpu) -> int:
    return v.machine.mem[v.vec + L.VEC_RVI]


@pytest.mark.parametrize("kernel", fx.profiles())
def test_trap_58_pir_set_already_ends_the_post(kernel: str) -> None:
    """Somebody else is on its way with this vector: no ON, no notification; accepted and traced like any other."""
    m, v = posting(kernel)
    v.pid[1] |= np.uint64(1 << 0x41 - 64)
    m.trace.enable()
    out = m.vcpus[0].wrmsr(ICR, fx.icr(dest=1, vector=0x41))
    assert (out.accepted, out.effects, control(v) & ON) == (1, fx.Effect.NONE, 0)
    assert kinds(m).count("kvm_apicv_accept_irq") == (1 if since(kernel, "6.1") else 0)
    assert kinds(m).count("kvm_apic_accept_irq") == 1
    out = m.vcpus[0].wrmsr(ICR, fx.icr(dest=1, vector=0x42))
    assert (out.effects, control(v) & ON) == (fx.Effect.NOTIFY, ON)


def test_trap_58_a_sleeper_is_not_woken() -> None:
    """Nor does a vCPU that sleeps wake up for a vector whose PIR bit was there."""
    m, v = posting()
    v.rflags |= r.RFLAGS_IF
    v.exit(fx.VmxExit.HLT)
    assert not v.run()
    v.pid[1] |= np.uint64(1 << 0x41 - 64)
    assert m.vcpus[0].wrmsr(ICR, fx.icr(dest=1, vector=0x41)).effects == fx.Effect.NONE
    assert m.vcpus[0].wrmsr(ICR, fx.icr(dest=1, vector=0x42)).effects == fx.Effect.WAKE


@pytest.mark.parametrize("kernel", fx.profiles())
def test_trap_59_software_does_not_look_at_sn(kernel: str) -> None:
    """SN silences devices: an IPI and a message of user space set ON and notify all the same, and SN stays."""
    m, v = posting(kernel)
    v.pid[4] |= np.uint64(SN)
    assert m.vcpus[0].wrmsr(ICR, fx.icr(dest=1, vector=0x41)).effects == fx.Effect.NOTIFY
    assert (control(v) & (ON | SN), pir(v)) == (ON | SN, {0x41})
    interrupted(v)
    v.pid[4] |= np.uint64(SN)
    assert msi(m, 1, 0x42) == 1
    assert (control(v) & (ON | SN), pir(v)) == (ON | SN, {0x42})


def test_trap_60_only_the_highest_new_vector_counts_as_got() -> None:
    """Where software injects (a vCPU in L2), a sync asks for an EVENT only if what came in is the new maximum."""
    m, v = posting()
    msi(m, 1, 0x80)
    interrupted(v)
    assert vectors(v) == {0x80}
    v.nested = True
    for vector, event in ((0x41, False), (0x80, False), (0x90, True)):
        interrupted(v)
        msi(m, 1, vector)
        v.get_lapic()
        assert bool(v.requests & r.REQ_EVENT) is event, hex(vector)
        assert (vector in vectors(v), pir(v)) == (True, set())


@pytest.mark.parametrize("kernel", [*fx.profiles(), "6.18.26"])
def test_trap_61_on_with_an_empty_pir(kernel: str) -> None:
    """6.18 before 6.18.30 finds nothing and says so to RVI, though IRR has a vector; others fall back on IRR."""
    m, v = posting(kernel)
    msi(m, 1, 0x41)
    interrupted(v)
    assert rvi(v) == 0x41
    v.pid[4] |= np.uint64(ON)
    interrupted(v)
    assert (control(v) & ON, rvi(v)) == (0, 0 if kernel == "6.18.26" else 0x41)
    interrupted(v)
    assert (vectors(v), rvi(v)) == ({0x41}, 0x41), "without ON the next sync looks at IRR"


def test_trap_59_devices_and_vcpu_load_do() -> None:
    """A device that finds SN sets PIR and stays silent; the load that clears SN makes an ON of it."""
    m = fx.Machine(vcpus=3, apicv=True, vtd_pi=True)
    m.boot_x2apic()
    v = m.vcpus[1]
    m.pi_update_irte(40, 40, 0xFEE01000, 0x41)
    interrupted(v)
    v.put(preempted=True)
    assert control(v) & (ON | SN) == SN
    assert m.device_interrupt(40).effects == fx.Effect.NONE
    assert (control(v) & (ON | SN), pir(v)) == (SN, {0x41})
    v.load()
    assert (control(v) & (ON | SN), pir(v)) == (ON, {0x41})
    interrupted(v)
    assert (rvi(v), m.device_interrupt(40).effects) == (0x41, fx.Effect.NOTIFY)
