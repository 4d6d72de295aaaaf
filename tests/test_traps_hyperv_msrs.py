"""Traps of Windows guests 1 to 13: EOI, ICR and TPR by MSR, and what there is for whom."""

from __future__ import annotations

import pytest

import fastexit as fx
from apics import kinds, register
from fastexit import hyperv as h
from fastexit import regs as r
from fastexit.hyperv import HvFeature
from generations import kernels
from windowstraps import (
    CONFIG0,
    DENIED,
    DIRECT,
    FAST,
    GATED,
    MODES,
    OK,
    SEND,
    SEND_EX,
    SINT2,
    SPIN,
    VENDORS,
    WHOLE_ICR,
    gp,
    lines,
    rdmsr,
    receivers,
    serve,
    serving,
    switch_off,
    variable,
    windows,
)

# ---------------------------------------------------------------------------------------------------- EOI, ICR and TPR


@pytest.mark.parametrize("vendor", VENDORS)
@pytest.mark.parametrize("mode", ["xAPIC", "x2APIC", "off"])
def test_hv_trap_01_eoi_icr_and_tpr_work_in_every_mode(mode: str, vendor: str) -> None:
    """The MSRs 0x800 and up want x2APIC mode; these do not, and a globally disabled APIC sends by them too."""
    m = windows(x2apic=mode == "x2APIC", vendor=vendor)
    v = m.vcpus[0]
    serve(v, 0x41)
    if mode == "off":
        switch_off(v)
    assert not gp(v, h.MSR_HV_TPR, 0x20)
    assert v.rdmsr(h.MSR_HV_TPR) == 0x20
    assert not gp(v, h.MSR_HV_EOI, 0)
    assert 0x41 not in serving(v)
    assert not gp(v, h.MSR_HV_ICR, fx.icr(dest=1, vector=0x51) if mode == "x2APIC" else 1 << 56 | 0x51)
    assert receivers(m, 0x51) == {1}


@MODES
def test_hv_trap_02_the_assist_page_is_not_asked(x2apic: bool) -> None:
    """All three work with the assist page off."""
    v = windows(x2apic=x2apic).vcpus[0]
    serve(v, 0x41)
    assert v.rdmsr(h.MSR_HV_VP_ASSIST_PAGE) == 0
    assert [gp(v, msr, 0) for msr in (h.MSR_HV_EOI, h.MSR_HV_TPR)] == [False, False]
    assert serving(v) == set()
    assert v.wrmsr(h.MSR_HV_ICR, 0x51).accepted == 1


def test_hv_trap_03_the_destination_follows_the_mode_of_the_sender() -> None:
    """An xAPIC's stands in bits 63:56, an x2APIC's in bits 63:32; the specification knows the first alone."""
    m = windows(x2apic=False)
    v = m.vcpus[0]
    v.wrmsr(h.MSR_HV_ICR, 0x0100_0000_0000_0051)
    v.wrmsr(h.MSR_HV_ICR, 0x0000_0002_0000_0041)
    assert (receivers(m, 0x51), receivers(m, 0x41)) == ({1}, {0})

    m = windows()
    v = m.vcpus[0]
    v.wrmsr(h.MSR_HV_ICR, 0x0000_0002_0000_0041)
    out = v.wrmsr(h.MSR_HV_ICR, 0x0200_0000_0000_0051)
    assert (receivers(m, 0x51), receivers(m, 0x41)) == (set(), {2})
    assert (out.fault, out.accepted) == (None, 0)
    assert lines(m, "kvm_apic_ipi")[-1].startswith("kvm_apic_ipi: dst 2000000 vec 81")


@pytest.mark.parametrize("vendor", VENDORS)
@pytest.mark.parametrize("kernel", kernels())
def test_hv_trap_04_the_icr_is_never_fast(kernel: str, vendor: str) -> None:
    """No generation's fast path looks at this MSR, whatever it does with 0x830."""
    m = windows(kernel=kernel, vendor=vendor)
    out = m.vcpus[0].wrmsr(h.MSR_HV_ICR, fx.icr(dest=1, vector=0x51))
    assert (out.path, out.completion) == (fx.Path.SLOW, fx.Fastpath.NONE)
    seed_on_amd = kernel == "seed-v3" and vendor == "svm"
    assert out.refusal is (fx.Refusal.SVM_EXIT_CODE if seed_on_amd else fx.Refusal.MSR)
    assert receivers(m, 0x51) == {1}


@pytest.mark.parametrize("kernel", WHOLE_ICR)
def test_hv_trap_05_the_trace_has_the_slow_paths_order(kernel: str) -> None:
    """IPI, acceptance, register, MSR: also in 6.18, where 0x830's fast path prints the acceptance first."""
    m = windows(kernel=kernel)
    m.vcpus[0].wrmsr(h.MSR_HV_ICR, fx.icr(dest=1, vector=0x51))
    wanted = ("kvm_apic_ipi", "kvm_apic_accept_irq", "kvm_apic", "kvm_msr")
    assert [kind for kind in kinds(m) if kind in wanted] == list(wanted)


@pytest.mark.parametrize("kernel", WHOLE_ICR)
def test_hv_trap_06_kvm_msr_has_the_value_as_written(kernel: str) -> None:
    """The busy bit is gone in kvm_apic's line and in the register, not in kvm_msr's, which names 40000071."""
    m = windows(kernel=kernel)
    v = m.vcpus[0]
    v.wrmsr(h.MSR_HV_ICR, 1 << 32 | r.ICR_BUSY | 0x51)
    assert lines(m, "kvm_apic", "kvm_msr") == [
        "kvm_apic: apic_write APIC_ICR = 0x100000051",
        "kvm_msr: msr_write 40000071 = 0x100001051",
    ]
    assert v.rdmsr(h.MSR_HV_ICR) == 1 << 32 | 0x51


@pytest.mark.parametrize("vendor", VENDORS)
@pytest.mark.parametrize("kernel", ["5.10", "5.15", *WHOLE_ICR])
def test_hv_trap_07_the_high_half_in_xapic_mode(kernel: str, vendor: str) -> None:
    """From 6.1 on all 32 bits are kept; before, the write went by way of ICR2, which keeps bits 31:24."""
    v = windows(x2apic=False, kernel=kernel, vendor=vendor).vcpus[0]
    v.wrmsr(h.MSR_HV_ICR, 0x0134_5678_0000_0051)
    high = 0x0134_5678 if kernel in WHOLE_ICR else 0x0100_0000
    assert v.rdmsr(h.MSR_HV_ICR) == high << 32 | 0x51
    assert v.get_msr(h.MSR_HV_ICR) == high << 32 | 0x51


@pytest.mark.parametrize("kernel", WHOLE_ICR)
def test_hv_trap_08_where_intel_keeps_the_high_half(kernel: str) -> None:
    """Behind the low one, at 0x304: ICR2 is what MMIO wrote last, and an MMIO write of the low half leaves 0x304."""
    v = windows(x2apic=False, kernel=kernel).vcpus[0]
    v.mmio_write(r.APIC_ICR2, 0x0200_0000)
    v.wrmsr(h.MSR_HV_ICR, 0x0134_5678_0000_0051)
    assert v.mmio_read(r.APIC_ICR2) == 0x0200_0000
    assert (register(v, r.APIC_ICR2), register(v, r.APIC_ICR + 4)) == (0x0200_0000, 0x0134_5678)
    v.mmio_write(r.APIC_ICR, 0x52)
    assert v.rdmsr(h.MSR_HV_ICR) == 0x0134_5678_0000_0052


def test_hv_trap_08_where_amd_keeps_it() -> None:
    """At 0x310, with all its bits."""
    v = windows(x2apic=False, vendor="svm").vcpus[0]
    v.wrmsr(h.MSR_HV_ICR, 0x0134_5678_0000_0051)
    assert (register(v, r.APIC_ICR2), register(v, r.APIC_ICR + 4)) == (0x0134_5678, 0)


@MODES
def test_hv_trap_09_host_writes_act(x2apic: bool) -> None:
    """KVM_SET_MSRS of these is no restore: it ends an interrupt, it sends one."""
    m = windows(x2apic=x2apic)
    v = m.vcpus[0]
    serve(v, 0x41, 0x61)
    assert v.set_msr(h.MSR_HV_EOI, 0)
    assert serving(v) == {0x41}
    assert v.set_msr(h.MSR_HV_ICR, (1 << 32 if x2apic else 1 << 56) | 0x51)
    assert receivers(m, 0x51) == {1}


def test_hv_trap_10_eoi_is_written_by_the_host_not_read() -> None:
    """KVM_GET_MSRS stops there, KVM_SET_MSRS does not; ICR and TPR can be read."""
    v = windows().vcpus[0]
    assert v.get_msr(h.MSR_HV_EOI) is None
    assert v.set_msr(h.MSR_HV_EOI, 7)
    assert (v.get_msr(h.MSR_HV_ICR), v.get_msr(h.MSR_HV_TPR)) == (0, 0)
    assert rdmsr(v, h.MSR_HV_EOI) is None


# ---------------------------------------------------------------------------------------------------- what there is


@pytest.mark.parametrize("kernel", GATED)
def test_hv_trap_11_the_host_needs_no_hyperv_cpuid(kernel: str) -> None:
    """Where the guest gets #GP, ioctls work."""
    m = windows(kernel=kernel, hyperv=False)
    v = m.vcpus[0]
    for msr in (h.MSR_HV_TPR, h.MSR_HV_GUEST_OS_ID, SINT2):
        assert (gp(v, msr, 0x10), rdmsr(v, msr)) == (True, None)
    assert v.set_msr(h.MSR_HV_TPR, 0x30)
    assert (v.get_msr(h.MSR_HV_TPR), v.cr8) == (0x30, 3)
    assert v.get_msr(SINT2) == h.HV_SINT_MASKED


@pytest.mark.parametrize("kernel", kernels(before="5.15"))
def test_hv_trap_11_no_gate_before_5_15(kernel: str) -> None:
    """Any guest may use the MSRs, told or not."""
    v = windows(kernel=kernel, hyperv=False).vcpus[0]
    assert not gp(v, h.MSR_HV_TPR, 0x30)
    assert v.rdmsr(h.MSR_HV_TPR) == 0x30


def test_hv_trap_11_but_not_without_the_option() -> None:
    """A kernel without CONFIG_KVM_HYPERV knows none of them."""
    v = windows(hyperv=False, kvm_hyperv=False).vcpus[0]
    assert not v.set_msr(h.MSR_HV_TPR, 0x30)
    assert (v.get_msr(h.MSR_HV_TPR), rdmsr(v, h.MSR_HV_TPR)) == (None, None)


def test_hv_trap_12_feature_bits_are_not_asked() -> None:
    """The signature is enough: with every other leaf zero the guest uses everything."""
    m = windows(hyperv_features=HvFeature(0))
    v = m.vcpus[0]
    v.enable_synic()
    assert not gp(v, h.MSR_HV_TPR, 0x30)
    assert not gp(v, SINT2, 0x51)
    assert not gp(v, CONFIG0, DIRECT | 0x51 << 4)
    assert v.hv_hypercall(SEND_EX | FAST | variable(1), 0x51, 0, (1, 2)) == OK
    assert receivers(m, 0x51) == {1}


@pytest.mark.parametrize("kernel", GATED)
def test_hv_trap_13_a_denied_call_has_a_status(kernel: str) -> None:
    """Where CPUID is enforced an MSR is #GP, a call is status 6, missing XMM input is #UD, and a denial comes first."""
    allowed = HvFeature.CLUSTER_IPI | HvFeature.EX_PROCESSOR_MASKS
    m = windows(kernel=kernel, hyperv="enforce", hyperv_features=allowed)
    v = m.vcpus[0]
    assert gp(v, h.MSR_HV_TPR, 0x30)
    assert v.set_msr(h.MSR_HV_TPR, 0x30), "the host's accesses are not asked"
    assert v.hv_hypercall(SPIN) == DENIED
    assert v.hv_hypercall(SEND | FAST, 0x51, 2) == OK
    rip = v.rip
    with pytest.raises(fx.InvalidOpcode):
        v.hv_hypercall(SEND_EX | FAST | variable(1), 0x52, 0, (1, 2))
    assert (v.rip, receivers(m, 0x52)) == (rip, set())

    m = windows(kernel=kernel, hyperv="enforce", hyperv_features=HvFeature.CLUSTER_IPI)
    v = m.vcpus[0]
    assert v.hv_hypercall(SEND_EX | FAST | variable(1), 0x52, 0, (1, 2)) == DENIED
