"""SVM's V_TPR: what every exit writes back to the task priority, and when CR8 writes are intercepted instead.

svm.c's sync_cr8_to_lapic, svm_update_cr8_intercept and init_vmcb, avic.c's avic_activate_vmcb, in 5.10.262, 6.1.192,
6.12.118 and 7.3.4; kernels without AVIC were seen to do so.
"""

from __future__ import annotations

import numpy as np
import pytest

import fastexit as fx
from apics import patched
from fastexit import layout as L
from fastexit import regs as r
from fastexit.releases import generation
from fastexit.traits import Trait

TPR = r.MSR_X2APIC_BASE + (r.APIC_TASKPRI >> 4)
DISPATCHERS = ("python", "compiled")


def has(kernel: str, trait: Trait) -> bool:
    return bool(generation(kernel).traits & trait)


def machine(kernel: str = "6.18", *, apicv: bool = False, dispatcher: str = "python", **options: object) -> fx.Machine:
    m = fx.Machine(2, kernel=kernel, vendor="svm", apicv=apicv, dispatcher=dispatcher, **options)
    m.boot_x2apic()
    return m


def left_of(kernel: str, tpr: int) -> int:
    """What an exit leaves of a TPR: 5.6 to 5.8 keep bit 2, as they do for any CR8 write."""
    return tpr & (0xF4 if has(kernel, Trait.CR8_KEEPS_TPR_BIT_2) else 0xF0)


def xapic(kernel: str) -> fx.Machine:
    """A guest that is not offered x2APIC mode, so that every generation uses AVIC for it."""
    return fx.Machine(1, kernel=kernel, vendor="svm", x2apic=False)


def tpr_of(v: fx.Vcpu) -> int:
    """TPR as the page has it, without an exit."""
    return v.machine.mem[L.PAGE + v.index * L.PAGE_STRIDE + (r.APIC_TASKPRI >> 3)] & 0xFFFF_FFFF


@pytest.mark.parametrize("dispatcher", DISPATCHERS)
@pytest.mark.parametrize("kernel", fx.profiles())
def test_low_nibble_is_lost_at_the_next_exit(kernel: str, dispatcher: str) -> None:
    v = machine(kernel, dispatcher=dispatcher).vcpus[0]
    v.wrmsr(TPR, 0x8D)
    assert tpr_of(v) == 0x8D
    assert v.rdmsr(TPR) == left_of(kernel, 0x8D)
    v.wrmsr(TPR, 0x4B)
    assert v.get_msr(TPR) == 0x40, "a signal is an exit, too"


@pytest.mark.parametrize("kernel", fx.profiles())
def test_batch(kernel: str) -> None:
    m = machine(kernel)
    exits = np.zeros(2, fx.EXIT)
    exits["reason"], exits["msr"] = fx.SvmExit.MSR, TPR
    exits["info"], exits["value"] = (1, 0), (0x8D, 0)
    assert m.run(exits)["value"].tolist()[1] == left_of(kernel, 0x8D)


@pytest.mark.parametrize("dispatcher", DISPATCHERS)
@pytest.mark.parametrize("kernel", fx.profiles())
def test_fast_reentry_is_an_exit(kernel: str, dispatcher: str) -> None:
    """Each run of svm_vcpu_run syncs, whether or not the fast handler takes the exit then."""
    v = machine(kernel, dispatcher=dispatcher).vcpus[0]
    v.wrmsr(TPR, 0x8D)
    v.wrmsr(r.MSR_X2APIC_ICR, fx.icr(dest=1, vector=0xFD))
    assert tpr_of(v) == left_of(kernel, 0x8D)


@pytest.mark.parametrize("kernel", fx.profiles())
@pytest.mark.parametrize("dispatcher", DISPATCHERS)
def test_held_back_interrupt_intercepts(kernel: str, dispatcher: str) -> None:
    """0x41 waits behind TPR 8: the store's own PPR update intercepts CR8 in 6.12.118 and 7.3.4; elsewhere an entry
    does, and only one with an EVENT request, so TPR is written back.
    """
    v = machine(kernel, dispatcher=dispatcher).vcpus[0]
    v.run()
    v.set_msr(r.MSR_X2APIC_ICR, fx.icr(shorthand=fx.Shorthand.SELF, vector=0x41))
    v.run()
    v.wrmsr(TPR, 0x8D)
    assert v.rdmsr(TPR) == (0x8D if has(kernel, Trait.CR8_WITH_PPR) else left_of(kernel, 0x8D))
    v.wrmsr(TPR, 0x8D)
    v.set_msr(r.MSR_X2APIC_ICR, fx.icr(shorthand=fx.Shorthand.SELF, vector=0x31))
    v.run()
    v.rdmsr(TPR)
    kept = tpr_of(v)
    v.wrmsr(TPR, 0x8D)
    assert v.rdmsr(TPR) == 0x8D, "the second vector's EVENT intercepts in every generation"
    assert kept in (left_of(kernel, 0x8D), 0x8D)


@pytest.mark.parametrize("kernel", fx.profiles())
def test_set_lapic(kernel: str) -> None:
    """A page's TPR counts, with bits that no guest can set, until the first exit."""
    v = machine(kernel).vcpus[0]
    v.set_lapic(patched(v, {r.APIC_TASKPRI: 0xABCD_EF2B}))
    assert tpr_of(v) == 0xABCD_EF2B
    v.run()
    assert v.get_msr(TPR) == 0x20


@pytest.mark.parametrize("kernel", fx.profiles())
def test_disabled_apic(kernel: str) -> None:
    """PPR is recomputed even where the APIC is off: nothing but the exit looks at ISR F2."""
    v = machine(kernel).vcpus[0]
    v.run()
    v.set_msr(r.MSR_APICBASE, 0)
    v.set_lapic(patched(v, {r.APIC_ISR + 0x70: 1 << 18, r.APIC_SPIV: 0xFF}))
    ppr = L.PAGE + (r.APIC_PROCPRI >> 3)
    assert v.machine.mem[ppr] & 0xFF == 0
    v.run()
    v.get_lapic()
    assert v.machine.mem[ppr] & 0xFF == 0xF0


@pytest.mark.parametrize("kernel", fx.profiles())
def test_init_intercepts(kernel: str) -> None:
    """init_vmcb: intercepted from creation and from INIT on, until something looks."""
    m = machine(kernel)
    v = m.vcpus[0]
    assert not m.mem[v.hot + L.HOT_FLAGS] & L.FLAG_CR8_FREE
    v.run()
    assert m.mem[v.hot + L.HOT_FLAGS] & L.FLAG_CR8_FREE
    m.vcpus[1].set_msr(r.MSR_X2APIC_ICR, fx.icr(dest=0, delivery=fx.DeliveryMode.INIT, level=True))
    v.get_mp_state()
    assert not m.mem[v.hot + L.HOT_FLAGS] & L.FLAG_CR8_FREE


@pytest.mark.parametrize("kernel", fx.profiles())
def test_set_sregs(kernel: str) -> None:
    """KVM_SET_SREGS looks, here at an APIC that is off, which no entry does."""
    m = fx.Machine(1, kernel=kernel, vendor="svm", apicv=False)
    v = m.vcpus[0]
    v.run()
    v.get_lapic()
    flags = v.hot + L.HOT_FLAGS
    assert not m.mem[flags] & L.FLAG_CR8_FREE
    v.set_sregs(cr8=0)
    assert m.mem[flags] & L.FLAG_CR8_FREE


@pytest.mark.parametrize("kernel", fx.profiles())
def test_vmx_keeps_it(kernel: str) -> None:
    m = fx.Machine(1, kernel=kernel, apicv=False)
    m.boot_x2apic()
    v = m.vcpus[0]
    v.wrmsr(TPR, 0x8D)
    assert v.rdmsr(TPR) == 0x8D == v.get_msr(TPR)


def test_l2_has_a_tpr_of_its_own() -> None:
    v = machine().vcpus[0]
    v.run()
    v.set_msr(TPR, 0x8D)
    v.nested = True
    v.run()
    v.get_lapic()
    assert tpr_of(v) == 0x8D


@pytest.mark.parametrize("kernel", fx.profiles())
def test_avic(kernel: str) -> None:
    """CR8 writes are free while AVIC is active from the start. Read in source only."""
    m = xapic(kernel)
    v = m.vcpus[0]
    v.run()
    v.hw_mmio_write(r.APIC_SPIV, 0x1FF)
    v.hw_mmio_write(r.APIC_TASKPRI, 0x8D)
    assert v.hw_mmio_read(r.APIC_TASKPRI) == 0x8D
    v.exit(fx.SvmExit.INTERRUPT)
    assert v.hw_mmio_read(r.APIC_TASKPRI) == left_of(kernel, 0x8D)


@pytest.mark.parametrize("kernel", fx.profiles())
def test_avic_and_what_kvm_writes(kernel: str) -> None:
    """AVIC's V_TPR outlived KVM_SET_LAPIC before sync_lapic_to_cr8 was mended: 5.15.194, 6.6.108, not 6.8.0, 6.16.1."""
    m = xapic(kernel)
    v = m.vcpus[0]
    v.run()
    v.hw_mmio_write(r.APIC_TASKPRI, 0x80)
    v.set_lapic(patched(v, {r.APIC_TASKPRI: 0x30}))
    v.run()
    kept = has(kernel, Trait.V_TPR_KEPT_BY_AVIC)
    v.get_lapic()
    assert tpr_of(v) == (0x80 if kept else 0x30)


@pytest.mark.parametrize("kernel", [k for k in fx.profiles() if has(k, Trait.INHIBITS)])
def test_avic_comes_and_goes(kernel: str) -> None:
    """avic_activate_vmcb and avic_deactivate_vmcb say who has CR8 since a fix that stable kernels took in March 2026;
    before, an INIT without AVIC left it intercepted for good.
    """
    m = xapic(kernel)
    v = m.vcpus[0]
    v.run()
    m.set_inhibit(r.Inhibit.DISABLED, True)
    v.exit(fx.SvmExit.INTERRUPT)
    assert not v.apicv
    v.get_lapic()
    v.set_events(latched_init=True, smm=False)
    v.get_mp_state()
    m.set_inhibit(r.Inhibit.DISABLED, False)
    v.run()
    assert v.apicv
    v.hw_mmio_write(r.APIC_TASKPRI, 0x8D)
    v.exit(fx.SvmExit.INTERRUPT)
    assert tpr_of(v) == (left_of(kernel, 0x8D) if has(kernel, Trait.CR8_FOLLOWS_AVIC) else 0x8D)


@pytest.mark.parametrize("intercepted", [False, True], ids=["free", "intercepted"])
@pytest.mark.parametrize("kernel", [k for k in fx.profiles() if has(k, Trait.INHIBITS)])
def test_avic_comes_back_to_what_kvm_wrote(kernel: str, intercepted: bool) -> None:
    """6.8.0 sync_lapic_to_cr8: V_TPR is that of the last entry without AVIC, for one with AVIC does not load it."""
    m = xapic(kernel)
    v = m.vcpus[0]
    m.set_inhibit(r.Inhibit.DISABLED, True)
    v.set_lapic(patched(v, {r.APIC_TASKPRI: 0x50}))
    if intercepted:
        m.signal_msi(0xFEE0_0000, 0x41)
    v.exit(fx.SvmExit.INTERRUPT)
    assert not v.apicv
    v.set_lapic(patched(v, {r.APIC_TASKPRI: 0x30}))
    m.set_inhibit(r.Inhibit.DISABLED, False)
    v.run()
    assert v.apicv
    v.get_lapic()
    assert tpr_of(v) == (0x50 if has(kernel, Trait.V_TPR_KEPT_BY_AVIC) else 0x30)


def test_snapshot_keeps_it() -> None:
    m = machine()
    m.vcpus[0].wrmsr(TPR, 0x8D)
    again = fx.Machine.restore(m.snapshot())
    assert again.vcpus[0].rdmsr(TPR) == 0x80 == m.vcpus[0].rdmsr(TPR)
