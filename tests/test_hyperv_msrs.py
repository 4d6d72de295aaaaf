"""Hyper-V's MSRs but for the SynIC: who may use them, the VM's, the APIC's other door, the VP assist page.

What holds was read in arch/x86/kvm/hyperv.c and lapic.c of 5.10.262, 5.15.215, 6.1.192, 6.6.87, 6.8, 6.12.118, 6.18.44,
7.2.13 and 7.3.4; generations before 5.10 are taken to be like it.
"""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest

import fastexit as fx
from fastexit import hyperv as hv
from fastexit import layout as L
from fastexit import regs as r
from fastexit.hyperv import HvFeature
from fastexit.outcome import OUTCOMES
from fastexit.profile import since
from windows import OS_ID, PAGE, VENDORS, booted, deliver, gated, halves, leave, shown, synic

KERNELS = fx.profiles()
MODERN = tuple(kernel for kernel in KERNELS if not halves(kernel))
NO_SYNIC_NEEDED = {
    hv.MSR_HV_GUEST_OS_ID: 0,
    hv.MSR_HV_HYPERCALL: 0,
    hv.MSR_HV_VP_INDEX: 0,
    hv.MSR_HV_RESET: 0,
    hv.MSR_HV_TIME_REF_COUNT: 0,
    hv.MSR_HV_REFERENCE_TSC: 0,
    hv.MSR_HV_TSC_FREQUENCY: 1_000_000_000,
    hv.MSR_HV_APIC_FREQUENCY: 1_000_000_000,
    hv.MSR_HV_ICR: 0,
    hv.MSR_HV_TPR: 0,
    hv.MSR_HV_VP_ASSIST_PAGE: 0,
    hv.MSR_HV_STIMER0_CONFIG: 0,
    hv.MSR_HV_CRASH_P0: 0,
    hv.MSR_HV_REENLIGHTENMENT_CONTROL: 0,
}
HOLES = (0x4000_00A0, 0x4000_00AF, 0x4000_00B8, 0x4000_00F0, 0x4000_00F6, 0x4000_00FE, 0x4000_0109, 0x4000_0119)


def faults(v: fx.Vcpu, msr: int, value: int | None = None) -> bool:
    if value is not None:
        return v.wrmsr(msr, value).fault is not None
    try:
        v.rdmsr(msr)
    except fx.GeneralProtection:
        return True
    return False


# ------------------------------------------------------------------------------------------------------------ the gate


@pytest.mark.parametrize("kernel", KERNELS)
def test_gate(kernel: str) -> None:
    """Without "Hv#1" a guest gets #GP for each, from 5.15 on; user space has them all the same."""
    m = booted(kernel, hyperv=False)
    v = m.vcpus[0]
    for msr, value in NO_SYNIC_NEEDED.items():
        assert faults(v, msr) is gated(kernel), hex(msr)
        assert v.get_msr(msr) == value, hex(msr)
    shown(m)
    assert faults(v, hv.MSR_HV_ICR, 1 << 56 | 0x41) is gated(kernel)
    assert not gated(kernel) or shown(m) == [("msr_write", hv.MSR_HV_ICR, 1 << 56 | 0x41, 1)]


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("hyperv", [False, True])
def test_not_built(kernel: str, hyperv: bool) -> None:
    """Without CONFIG_KVM_HYPERV they are unknown MSRs to everybody; nobody can ask for them then."""
    if hyperv:
        with pytest.raises(ValueError, match="needs kvm_hyperv=True"):
            fx.Machine(kernel=kernel, kvm_hyperv=False, hyperv=True)
        return
    m = booted(kernel, hyperv=False, kvm_hyperv=False)
    v = m.vcpus[0]
    for msr in range(hv.MSR_HV_FIRST, hv.MSR_HV_LAST + 2):
        assert faults(v, msr), hex(msr)
        assert v.get_msr(msr) is None, hex(msr)
        assert not v.set_msr(msr, 0), hex(msr)
    with pytest.raises(ValueError, match="no CONFIG_KVM_HYPERV"):
        v.enable_synic()


def test_names_alone_enable_nothing_more() -> None:
    """No feature bit of the other leaves counts: "Hv#1" is enough."""
    v = booted(hyperv_features=HvFeature(0)).vcpus[0]
    for msr, value in NO_SYNIC_NEEDED.items():
        assert v.rdmsr(msr) == value, hex(msr)


@pytest.mark.parametrize("kernel", KERNELS)
def test_between_them_are_unknown_msrs(kernel: str) -> None:
    """An MSR that KVM does not leave to Hyper-V fails as one that it does not know."""
    m = booted(kernel)
    v = m.vcpus[0]
    holes = HOLES if since(kernel, "6.6") else (*HOLES, hv.MSR_HV_TSC_INVARIANT_CONTROL)
    for msr in holes:
        assert faults(v, msr), hex(msr)
        assert faults(v, msr, 0), hex(msr)
        assert v.get_msr(msr) is None, hex(msr)
    if not since(kernel, "5.10"):
        return
    m.user_space_msr = r.MsrExit.UNKNOWN
    assert v.wrmsr(HOLES[0], 0).user is fx.KvmExit.X86_WRMSR
    v.complete_msr()
    assert v.wrmsr(hv.MSR_HV_VP_INDEX, 0).user is None, "Hyper-V refuses it: INVAL"
    m.user_space_msr = r.MsrExit.INVAL
    assert v.wrmsr(hv.MSR_HV_VP_INDEX, 0).user is fx.KvmExit.X86_WRMSR


ENFORCED = {
    HvFeature.HYPERCALL: (hv.MSR_HV_GUEST_OS_ID, hv.MSR_HV_HYPERCALL),
    HvFeature.VP_INDEX: (hv.MSR_HV_VP_INDEX,),
    HvFeature.RESET: (hv.MSR_HV_RESET,),
    HvFeature.VP_RUNTIME: (hv.MSR_HV_VP_RUNTIME,),
    HvFeature.TIME_REF_COUNT: (hv.MSR_HV_TIME_REF_COUNT,),
    HvFeature.REFERENCE_TSC: (hv.MSR_HV_REFERENCE_TSC,),
    HvFeature.FREQUENCIES: (hv.MSR_HV_TSC_FREQUENCY, hv.MSR_HV_APIC_FREQUENCY),
    HvFeature.APIC_ACCESS: (hv.MSR_HV_ICR, hv.MSR_HV_TPR, hv.MSR_HV_VP_ASSIST_PAGE),
    HvFeature.SYNIC: (hv.MSR_HV_SCONTROL, hv.MSR_HV_EOM, hv.MSR_HV_SINT0, hv.MSR_HV_SINT15),
    HvFeature.STIMER: (hv.MSR_HV_STIMER0_CONFIG, hv.MSR_HV_STIMER3_COUNT),
    HvFeature.CRASH: (hv.MSR_HV_CRASH_P0, hv.MSR_HV_CRASH_CTL),
    HvFeature.REENLIGHTENMENT: (hv.MSR_HV_REENLIGHTENMENT_CONTROL, hv.MSR_HV_TSC_EMULATION_STATUS),
    HvFeature.TSC_INVARIANT: (hv.MSR_HV_TSC_INVARIANT_CONTROL,),
}


@pytest.mark.parametrize("feature", ENFORCED)
def test_enforced(feature: HvFeature) -> None:
    """KVM_CAP_HYPERV_ENFORCE_CPUID: a feature opens its MSRs and no others, to a guest; user space needs none."""
    m = booted(hyperv="enforce", hyperv_features=feature)
    v = m.vcpus[0]
    v.enable_synic()
    for needs, msrs in ENFORCED.items():
        for msr in msrs:
            assert faults(v, msr) is (needs is not feature), hex(msr)
            assert v.get_msr(msr) is not None, hex(msr)


# ---------------------------------------------------------------------------------------------------------- the VM's


@pytest.mark.parametrize("vendor", VENDORS)
@pytest.mark.parametrize("by_host", [False, True])
def test_hypercall_page(vendor: str, by_host: bool) -> None:
    """Ignored while the guest OS id is 0; then its first four bytes are the call and RET. Id 0 clears bit 0 alone."""
    m = booted(vendor=vendor)
    v, other = m.vcpus[0], m.vcpus[1]

    def write(msr: int, value: int) -> bool:
        return v.set_msr(msr, value) if by_host else v.wrmsr(msr, value).fault is None

    m.guest_memory[PAGE : PAGE + 8] = b"\xcc" * 8
    assert write(hv.MSR_HV_HYPERCALL, PAGE | 1)
    assert (v.rdmsr(hv.MSR_HV_HYPERCALL), m.guest_memory[PAGE]) == (0, 0xCC)
    assert write(hv.MSR_HV_GUEST_OS_ID, OS_ID)
    assert write(hv.MSR_HV_HYPERCALL, PAGE | 0xFF1)
    assert other.rdmsr(hv.MSR_HV_HYPERCALL) == PAGE | 0xFF1, "one for the VM, low bits kept"
    code = b"\x0f\x01\xc1\xc3" if vendor == "vmx" else b"\x0f\x01\xd9\xc3"
    assert m.guest_memory[PAGE : PAGE + 8] == code + b"\xcc" * 4
    assert not write(hv.MSR_HV_HYPERCALL, 1 << 40 | 1), "no memory there"
    assert v.rdmsr(hv.MSR_HV_HYPERCALL) == PAGE | 0xFF1
    assert write(hv.MSR_HV_GUEST_OS_ID, 0)
    assert v.rdmsr(hv.MSR_HV_HYPERCALL) == PAGE | 0xFF0


def test_vp_index() -> None:
    """Creation order whatever the APIC id; read-only to the guest; user space gives any below KVM_MAX_VCPUS, twice."""
    for kernel, most in (("5.10", 288), ("6.1", 1024), ("6.18", 4096)):
        m = booted(kernel, apic_ids=[0, 7, 3])
        assert [v.rdmsr(hv.MSR_HV_VP_INDEX) for v in m.vcpus] == [0, 1, 2]
        v = m.vcpus[1]
        assert faults(v, hv.MSR_HV_VP_INDEX, 1)
        assert v.set_msr(hv.MSR_HV_VP_INDEX, 1 << 32 | 2)
        assert [v.rdmsr(hv.MSR_HV_VP_INDEX) for v in m.vcpus] == [0, 2, 2]
        assert not v.set_msr(hv.MSR_HV_VP_INDEX, most)
        assert v.set_msr(hv.MSR_HV_VP_INDEX, most - 1)


def test_reset_and_crash_go_to_user_space() -> None:
    """Requests, served at the next entry: RIP has moved. RESET of any value but 1 does nothing and reads 0."""
    m = booted()
    v = m.vcpus[0]
    rip = v.rip
    assert v.wrmsr(hv.MSR_HV_RESET, 3).user is None
    assert v.wrmsr(hv.MSR_HV_RESET, 1).user is fx.KvmExit.SYSTEM_EVENT
    assert (v.system_event, v.exit_reason, v.rip) == (r.SystemEvent.RESET, fx.KvmExit.SYSTEM_EVENT, rip + 4)
    assert v.run()
    assert v.rdmsr(hv.MSR_HV_RESET) == 0
    assert v.wrmsr(hv.MSR_HV_CRASH_P0 + 2, 0x1234).fault is None
    assert v.get_msr(hv.MSR_HV_CRASH_P0 + 2) == 0x1234
    assert v.wrmsr(hv.MSR_HV_CRASH_CTL, 1).user is None
    assert v.wrmsr(hv.MSR_HV_CRASH_CTL, 1 << 63).user is fx.KvmExit.SYSTEM_EVENT
    assert (v.system_event, v.rdmsr(hv.MSR_HV_CRASH_CTL)) == (r.SystemEvent.CRASH, 0)
    assert v.set_msr(hv.MSR_HV_CRASH_CTL, (1 << 64) - 1)
    assert v.rdmsr(hv.MSR_HV_CRASH_CTL) == 1 << 63
    assert v.set_msr(hv.MSR_HV_RESET, 1)
    assert not v.run()
    assert v.system_event is r.SystemEvent.RESET


def test_crash_goes_before_reset_and_the_rest_stays() -> None:
    """One request a return of KVM_RUN: crash, reset, then SynIC's exit."""
    m = booted()
    v = m.vcpus[0]
    v.enable_synic()
    v.set_msr(hv.MSR_HV_RESET, 1)
    for request in (r.REQ_HV_EXIT, r.REQ_HV_CRASH):
        m.mem[v.hot + L.HOT_REQUESTS] |= request
    told = []
    while not v.run():
        told.append((v.exit_reason, v.system_event))
    assert told == [
        (fx.KvmExit.SYSTEM_EVENT, r.SystemEvent.CRASH),
        (fx.KvmExit.SYSTEM_EVENT, r.SystemEvent.RESET),
        (fx.KvmExit.HYPERV, r.SystemEvent.RESET),
    ]


def test_clocks() -> None:
    """TIME_REF_COUNT in 100 ns; read-only, though user space's writes are ignored and not refused."""
    m = booted(tsc_khz=2_500_000)
    v = m.vcpus[0]
    m.set_time(123_456)
    assert v.rdmsr(hv.MSR_HV_TIME_REF_COUNT) == 1234
    assert v.rdmsr(hv.MSR_HV_TSC_FREQUENCY) == 2_500_000_000
    for msr in (hv.MSR_HV_TIME_REF_COUNT, hv.MSR_HV_TSC_FREQUENCY, hv.MSR_HV_APIC_FREQUENCY):
        before = v.rdmsr(msr)
        assert faults(v, msr, 5)
        assert v.set_msr(msr, 5)
        assert v.rdmsr(msr) == before
    assert v.set_msr(hv.MSR_HV_VP_RUNTIME, 1_000_000)
    assert faults(v, hv.MSR_HV_VP_RUNTIME, 1)
    m.set_time(m.time + 1000)
    assert v.rdmsr(hv.MSR_HV_VP_RUNTIME) == 1_000_010


@pytest.mark.parametrize("kernel", KERNELS)
def test_emulation_status(kernel: str) -> None:
    """A guest may only clear TSC_EMULATION_STATUS; 5.10 took whatever it wrote."""
    v = booted(kernel).vcpus[0]
    assert faults(v, hv.MSR_HV_TSC_EMULATION_STATUS, 2) is gated(kernel)
    assert v.set_msr(hv.MSR_HV_TSC_EMULATION_STATUS, 3)
    assert not faults(v, hv.MSR_HV_TSC_EMULATION_STATUS, 0)
    assert v.rdmsr(hv.MSR_HV_TSC_EMULATION_STATUS) == 0


@pytest.mark.parametrize("kernel", KERNELS)
def test_tsc_invariant(kernel: str) -> None:
    """Bit 0 alone; a guest cannot take it back. It is in 6.6, and not yet in 6.1."""
    v = booted(kernel).vcpus[0]
    msr = hv.MSR_HV_TSC_INVARIANT_CONTROL
    if not since(kernel, "6.6"):
        assert not v.set_msr(msr, 1)
        return
    assert faults(v, msr, 2)
    assert not v.set_msr(msr, 2)
    assert not faults(v, msr, 1)
    assert faults(v, msr, 0)
    assert v.set_msr(msr, 0)
    assert v.rdmsr(msr) == 0


# -------------------------------------------------------------------------------------------------- EOI, ICR and TPR


@pytest.mark.parametrize("kernel", MODERN)
@pytest.mark.parametrize("vendor", VENDORS)
def test_icr_order(kernel: str, vendor: str) -> None:
    """The slow path's order in every kernel from 6.1 on: IPI, accepted, apic_write, kvm_msr as written."""
    m = booted(kernel, vendor)
    v = m.vcpus[0]
    value = 2 << 32 | r.ICR_BUSY | 0x41
    out = v.wrmsr(hv.MSR_HV_ICR, value)
    assert (out.path, out.accepted, out.refusal) == (fx.Path.SLOW, 1, fx.Refusal.MSR if out.refusal else None)
    assert shown(m, "ipi", "accept", "apic_write", "msr_write") == [
        ("ipi", 0x41, 2),
        ("accept", 2, 0x41),
        ("apic_write", r.APIC_ICR, value & ~r.ICR_BUSY),
        ("msr_write", hv.MSR_HV_ICR, value, 0),
    ]
    assert v.rdmsr(hv.MSR_HV_ICR) == value & ~r.ICR_BUSY
    assert shown(m, "apic_read", "msr_read") == [("msr_read", hv.MSR_HV_ICR, value & ~r.ICR_BUSY, 0)]


@pytest.mark.parametrize("kernel", [kernel for kernel in KERNELS if halves(kernel)])
@pytest.mark.parametrize("x2apic", [True, False])
def test_icr_in_halves(kernel: str, x2apic: bool) -> None:
    """Before 6.0: ICR2's write, in xAPIC mode its top byte alone, then ICR's with bit 12 as written, then the IPI."""
    m = booted(kernel, x2apic=x2apic)
    v = m.vcpus[0]
    high = 2 if x2apic else 0x0200_0005
    value = high << 32 | r.ICR_BUSY | 0x41
    assert v.wrmsr(hv.MSR_HV_ICR, value).accepted == 1
    assert shown(m, "ipi", "accept", "apic_write", "msr_write") == [
        ("apic_write", r.APIC_ICR2, high),
        ("apic_write", r.APIC_ICR, r.ICR_BUSY | 0x41),
        ("ipi", 0x41, 2),
        ("accept", 2, 0x41),
        ("msr_write", hv.MSR_HV_ICR, value, 0),
    ]
    kept = 2 if x2apic else 0x0200_0000
    assert v.rdmsr(hv.MSR_HV_ICR) == kept << 32 | 0x41
    assert shown(m, "apic_read") == [("apic_read", r.APIC_ICR, 0x41), ("apic_read", r.APIC_ICR2, kept)]


@pytest.mark.parametrize("kernel", MODERN)
@pytest.mark.parametrize("vendor", VENDORS)
def test_icr_in_xapic_mode(kernel: str, vendor: str) -> None:
    """The destination is in bits 63:56; all 64 bits are stored, at 0x300 and 0x310 where the ICR is split."""
    m = booted(kernel, vendor, x2apic=False)
    v = m.vcpus[0]
    v.mmio_write(r.APIC_ICR2, 0x0300_0000)
    value = 0x0100_0002_0000_0041
    assert v.wrmsr(hv.MSR_HV_ICR, value).accepted == 1
    assert m.vcpus[1].pending() == 0x41
    assert v.rdmsr(hv.MSR_HV_ICR) == value
    page = v.get_lapic()
    icr2 = int.from_bytes(page[r.APIC_ICR2 : r.APIC_ICR2 + 4], "little")
    split = vendor == "svm" and kernel != "6.8"
    assert icr2 == (0x0100_0002 if split else 0x0300_0000)
    assert int.from_bytes(page[r.APIC_ICR + 4 : r.APIC_ICR + 8], "little") == (0 if split else 0x0100_0002)


@pytest.mark.parametrize("kernel", KERNELS)
def test_icr_reserved_bits(kernel: str) -> None:
    """Refused before any effect where the x2APIC MSR's are, in either mode; others send."""
    refused = kernel not in ("6.8",) and not halves(kernel)
    for x2apic in (True, False):
        m = booted(kernel, x2apic=x2apic)
        v = m.vcpus[0]
        for bit in (0x2000, 0x2_0000, 0x10_0000, 0x8000_0000):
            value = (1 << 32 if x2apic else 1 << 56) | bit | 0x41
            assert faults(v, hv.MSR_HV_ICR, value) is refused, hex(bit)
            assert not refused or shown(m) == [("msr_write", hv.MSR_HV_ICR, value, 1)]
            assert not refused or not v.set_msr(hv.MSR_HV_ICR, value)
            m.trace.clear()


@pytest.mark.parametrize("kernel", KERNELS)
def test_upper_half_of_eoi_and_tpr(kernel: str) -> None:
    """#GP with no effect and no line of the APIC's, from 5.15's stable releases on; 5.10 cut it off."""
    m = booted(kernel)
    v = m.vcpus[0]
    refused = since(kernel, "5.15")
    for msr in (hv.MSR_HV_EOI, hv.MSR_HV_TPR):
        assert faults(v, msr, 1 << 32 | 0x20) is refused
        assert [line[0] for line in shown(m, "apic_write", "msr_write")] == (
            ["msr_write"] if refused else ["apic_write", "msr_write"]
        )


def test_upper_half_came_with_6_1_16() -> None:
    for release, refused in (("6.1.15", False), ("6.1.16", True)):
        assert faults(booted(release).vcpus[0], hv.MSR_HV_TPR, 1 << 32) is refused


@pytest.mark.parametrize("state", ["xapic", "x2apic", "software-disabled", "disabled"])
def test_no_mode_matters(state: str) -> None:
    """EOI, ICR and TPR work in any mode, with the APIC disabled in either way, and without an assist page."""
    m = booted(x2apic=state == "x2apic")
    v = m.vcpus[0]
    if state == "software-disabled":
        v.mmio_write(r.APIC_SPIV, 0xFF)
    elif state == "disabled":
        assert v.set_msr(r.MSR_APICBASE, r.APIC_DEFAULT_PHYS_BASE | r.APICBASE_BSP)
    shown(m)
    dest = 1 << 32 if state == "x2apic" else 1 << 56
    assert v.wrmsr(hv.MSR_HV_ICR, dest | 0x0F).accepted == 1, "vector 15 as well"
    assert m.vcpus[1].get_lapic()[r.APIC_IRR + 1] == 0x80
    assert not faults(v, hv.MSR_HV_TPR, 0x1F0)
    assert v.rdmsr(hv.MSR_HV_TPR) == 0xF0
    assert ("apic_write", r.APIC_TASKPRI, 0x1F0) in shown(m)
    assert not faults(v, hv.MSR_HV_EOI, 0xDEAD)
    assert shown(m, "apic_write", "eoi", "msr_write") == [
        ("apic_write", r.APIC_EOI, 0xDEAD),
        ("eoi", L.NONE),
        ("msr_write", hv.MSR_HV_EOI, 0xDEAD, 0),
    ]


def test_reads() -> None:
    """TPR has its line of the APIC's, EOI cannot be read, by nobody."""
    m = booted()
    v = m.vcpus[0]
    v.rdmsr(hv.MSR_HV_TPR)
    assert shown(m, "apic_read", "msr_read") == [("apic_read", r.APIC_TASKPRI, 0), ("msr_read", hv.MSR_HV_TPR, 0, 0)]
    assert faults(v, hv.MSR_HV_EOI)
    assert shown(m, "apic_read", "msr_read") == [("msr_read", hv.MSR_HV_EOI, 0, 1)]
    assert v.get_msr(hv.MSR_HV_EOI) is None


def test_user_space_really_sends_and_ends() -> None:
    """KVM_SET_MSRS of ICR and EOI is no restoring of state; it has the same lines but for kvm_msr."""
    m = booted()
    v = deliver(m, 0x51)
    shown(m)
    assert v.set_msr(hv.MSR_HV_ICR, 2 << 32 | 0x41)
    assert m.vcpus[2].pending() == 0x41
    assert v.set_msr(hv.MSR_HV_EOI, 0)
    assert [line[0] for line in shown(m)] == ["ipi", "accept", "apic_write", "apic_write", "eoi"]
    assert not any(v.get_lapic()[r.APIC_ISR : r.APIC_TMR])


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("vendor", VENDORS)
def test_no_fast_path_takes_the_msr(kernel: str, vendor: str) -> None:
    """The same IPI by 0x830 is fast in every generation but one's on SVM; by Hyper-V's MSR in none."""
    m = booted(kernel, vendor)
    assert m.vcpus[0].wrmsr(hv.MSR_HV_ICR, 1 << 32 | 0x41).path is fx.Path.SLOW


def test_filter_applies() -> None:
    """KVM_X86_SET_MSR_FILTER exempts x2APIC's MSRs alone."""
    m = booted()
    m.set_msr_filter(ranges=[(r.MSR_FILTER_WRITE, hv.MSR_HV_ICR, [False])])
    assert faults(m.vcpus[0], hv.MSR_HV_ICR, 1 << 32 | 0x41)
    assert m.vcpus[0].set_msr(hv.MSR_HV_ICR, 1 << 32 | 0x41)


# ---------------------------------------------------------------------------------------------------- VP assist page


def test_assist_page() -> None:
    """Its first four bytes become 0, the rest stays; low bits are kept; a refused page leaves the old one."""
    m = booted()
    v = m.vcpus[0]
    m.guest_memory[PAGE : PAGE + 8] = b"\xff" * 8
    assert not faults(v, hv.MSR_HV_VP_ASSIST_PAGE, PAGE | 0xFF1)
    assert v.rdmsr(hv.MSR_HV_VP_ASSIST_PAGE) == PAGE | 0xFF1
    assert m.guest_memory[PAGE : PAGE + 8] == bytes(4) + b"\xff" * 4
    assert v.get_msr(r.MSR_KVM_PV_EOI_EN) == PAGE | 1, "one state for both MSRs"
    for bad in (1 << 40 | 1, len(m.guest_memory) | 1, (1 << 64) - 1):
        assert faults(v, hv.MSR_HV_VP_ASSIST_PAGE, bad), hex(bad)
        assert not v.set_msr(hv.MSR_HV_VP_ASSIST_PAGE, bad), hex(bad)
    assert (v.rdmsr(hv.MSR_HV_VP_ASSIST_PAGE), v.get_msr(r.MSR_KVM_PV_EOI_EN)) == (PAGE | 0xFF1, PAGE | 1)
    assert not faults(v, hv.MSR_HV_VP_ASSIST_PAGE, 1 << 40), "disabled: no address is looked at"
    assert (v.rdmsr(hv.MSR_HV_VP_ASSIST_PAGE), v.get_msr(r.MSR_KVM_PV_EOI_EN)) == (1 << 40, 0)
    assert m.vcpus[1].rdmsr(hv.MSR_HV_VP_ASSIST_PAGE) == 0


@pytest.mark.parametrize("vendor", VENDORS)
def test_eoi_assist(vendor: str) -> None:
    """The byte is set behind an injection; a guest that clears it writes no EOI: the next exit ends its interrupt."""
    m = booted(vendor=vendor)
    m.vcpus[0].wrmsr(hv.MSR_HV_VP_ASSIST_PAGE, PAGE | 1)
    v = deliver(m, 0x51)
    assert (m.guest_memory[PAGE], v.assist, v.pv_eoi) == (1, 1, True)
    m.guest_memory[PAGE] = 0
    shown(m)
    leave(m)
    assert shown(m, "eoi", "pv_eoi", "apic_write", "msr_write") == [("eoi", 0x51), ("pv_eoi", 0x51)]
    deliver(m, 0x61)
    assert m.guest_memory[PAGE] == 1
    leave(m)
    assert m.guest_memory[PAGE] == 0, "any exit withdraws the offer"
    assert shown(m, "eoi", "pv_eoi") == []
    v.wrmsr(hv.MSR_HV_EOI, 0)
    assert shown(m, "eoi", "pv_eoi") == [("eoi", 0x61)]


def test_eoi_by_msr_comes_behind_the_assist() -> None:
    """A guest that did both: the assist's EOI first, and the MSR's finds nothing in service."""
    m = booted()
    m.vcpus[0].wrmsr(hv.MSR_HV_VP_ASSIST_PAGE, PAGE | 1)
    v = deliver(m, 0x51)
    v.assist = 0
    shown(m)
    v.wrmsr(hv.MSR_HV_EOI, 0)
    assert shown(m, "eoi", "pv_eoi", "apic_write") == [
        ("eoi", 0x51),
        ("pv_eoi", 0x51),
        ("apic_write", r.APIC_EOI, 0),
        ("eoi", L.NONE),
    ]


def test_the_last_writer_owns_the_cell() -> None:
    """KVM's own MSR and the assist page share one state; either switches it off for both."""
    m = booted()
    v = m.vcpus[0]
    v.wrmsr(hv.MSR_HV_VP_ASSIST_PAGE, PAGE | 1)
    v.wrmsr(r.MSR_KVM_PV_EOI_EN, 0x7004 | 1)
    deliver(m, 0x51)
    assert (m.guest_memory[PAGE], m.guest_memory[0x7004]) == (0, 1)
    v.wrmsr(hv.MSR_HV_EOI, 0)
    v.wrmsr(hv.MSR_HV_VP_ASSIST_PAGE, PAGE | 1)
    deliver(m, 0x61)
    assert (m.guest_memory[PAGE], m.guest_memory[0x7004]) == (1, 0)
    v.wrmsr(hv.MSR_HV_EOI, 0)
    v.wrmsr(r.MSR_KVM_PV_EOI_EN, 0)
    assert v.rdmsr(hv.MSR_HV_VP_ASSIST_PAGE) == PAGE | 1
    deliver(m, 0x71)
    assert not v.pv_eoi


@pytest.mark.parametrize("kernel", KERNELS)
def test_cell_that_the_guest_has_spoilt(kernel: str) -> None:
    """Only bit 0 counts. Up to 5.15 the byte becomes 0 in any case, later only if that bit was left set."""
    m = booted(kernel)
    m.vcpus[0].wrmsr(hv.MSR_HV_VP_ASSIST_PAGE, PAGE | 1)
    deliver(m, 0x51)
    m.guest_memory[PAGE] = 0xFE
    shown(m)
    leave(m)
    assert shown(m, "pv_eoi") == [("pv_eoi", 0x51)]
    assert m.guest_memory[PAGE] == (0 if halves(kernel) else 0xFE)
    deliver(m, 0x61)
    m.guest_memory[PAGE] = 0xFF
    leave(m)
    assert (shown(m, "pv_eoi"), m.guest_memory[PAGE]) == ([], 0)


@pytest.mark.parametrize("kernel", KERNELS)
def test_kvms_own_cell_in_the_guests_memory(kernel: str) -> None:
    """A cell that is not there is refused, and KVM has lost its way to the old one, whose MSR stays as it was.

    Up to 5.15 the MSR keeps the new value all the same. Without a memory any cell will do.
    """
    m = booted(kernel)
    v = m.vcpus[0]
    assert v.wrmsr(r.MSR_KVM_PV_EOI_EN, 0x7000 | 1).fault is None
    nowhere = 1 << 40 | 1
    assert faults(v, r.MSR_KVM_PV_EOI_EN, nowhere)
    assert v.rdmsr(r.MSR_KVM_PV_EOI_EN) == (nowhere if halves(kernel) else 0x7000 | 1)
    deliver(m, 0x51)
    assert m.guest_memory[0x7000] == 0
    leave(m)
    v.eoi()
    assert v.wrmsr(r.MSR_KVM_PV_EOI_EN, 0x7000 | 1).fault is None
    deliver(m, 0x51)
    assert m.guest_memory[0x7000] == 1
    bare = booted(kernel, hyperv=False).vcpus[0]
    assert bare.wrmsr(r.MSR_KVM_PV_EOI_EN, nowhere).fault is None
    bare.pv_eoi = True
    assert (bare.pv_eoi, bare.assist) == (True, 0)


def test_memory_that_shrinks() -> None:
    """A cell that cannot be read any more ends the interrupt at every exit, as KVM's does, and is not offered again."""
    m = booted()
    m.vcpus[0].wrmsr(hv.MSR_HV_VP_ASSIST_PAGE, PAGE | 1)
    v = deliver(m, 0x51)
    m.guest_memory = bytearray(4096)
    shown(m)
    leave(m)
    leave(m)
    assert shown(m, "eoi", "pv_eoi") == [("eoi", 0x51), ("pv_eoi", 0x51), ("eoi", L.NONE), ("pv_eoi", L.NONE)]
    assert v.assist == 0
    with pytest.raises(ValueError, match="no PV EOI is enabled in the guest's memory"):
        v.assist = 1


def test_reset_of_the_apic_switches_it_off() -> None:
    """INIT clears PV EOI's state, and not the assist page's MSR."""
    m = booted()
    v = m.vcpus[1]
    v.set_msr(hv.MSR_HV_VP_ASSIST_PAGE, PAGE | 1)
    m.vcpus[0].wrmsr(0x830, 1 << 32 | r.DM_INIT << 8 | 1 << 14)
    v.get_mp_state()
    assert (v.get_msr(r.MSR_KVM_PV_EOI_EN), v.get_msr(hv.MSR_HV_VP_ASSIST_PAGE)) == (0, PAGE | 1)


def test_snapshot_keeps_them() -> None:
    """All but the guest's memory, which the embedder gives again."""
    m = booted()
    v = m.vcpus[0]
    values: dict[int, Any] = {
        hv.MSR_HV_GUEST_OS_ID: OS_ID,
        hv.MSR_HV_VP_INDEX: 9,
        hv.MSR_HV_VP_ASSIST_PAGE: PAGE | 1,
        hv.MSR_HV_CRASH_P0: 5,
        hv.MSR_HV_TSC_EMULATION_CONTROL: 6,
        hv.MSR_HV_TSC_INVARIANT_CONTROL: 1,
        hv.MSR_HV_SYNDBG_OPTIONS: 7,
        hv.MSR_HV_SYNDBG_CONTROL: 8,
    }
    for msr, value in values.items():
        assert v.set_msr(msr, value), hex(msr)
    again = fx.Machine.restore(m.snapshot()).vcpus[0]
    assert {msr: again.get_msr(msr) for msr in values} == values


# ------------------------------------------------------------------------------------------------------- all doors


def _storm(rng: random.Random, n: int) -> list[tuple[int, int, int | None]]:
    """Accesses of guests as (vCPU, MSR, value to write or None for a read)."""
    sints = range(hv.MSR_HV_SINT0, hv.MSR_HV_SINT0 + 4)
    others = (hv.MSR_HV_EOI, hv.MSR_HV_ICR, hv.MSR_HV_TPR, hv.MSR_HV_VP_ASSIST_PAGE, hv.MSR_HV_SIMP, hv.MSR_HV_EOM)
    rare = (hv.MSR_HV_SCONTROL, hv.MSR_HV_RESET, hv.MSR_HV_GUEST_OS_ID, hv.MSR_HV_HYPERCALL, hv.MSR_HV_CRASH_CTL)
    values = (0, 1, 0x20, 0x41, 0x50, 0x60, PAGE | 1, 1 << 40 | 1, hv.HV_SINT_AUTO_EOI | 0x50, 1 << 63, 0x2041)
    found: list[tuple[int, int, int | None]] = []
    for _ in range(n):
        msr = rng.choice((*sints, *others, *others, *rare))
        value = rng.choice(values) | (rng.randrange(3) << 32 if msr == hv.MSR_HV_ICR else 0)
        found.append((rng.randrange(3), msr, None if rng.random() < 0.1 else value))
    return found


@pytest.mark.parametrize("kernel", ["5.10", "6.1", "6.18"])
@pytest.mark.parametrize("vendor", VENDORS)
def test_doors_agree(kernel: str, vendor: str) -> None:
    """Both dispatchers and the batch do the same: outcomes, the state, the guest's memory, the records."""
    accesses = _storm(random.Random(f"{kernel} {vendor}"), 600)
    machines = [synic(kernel, vendor=vendor, dispatcher=kind) for kind in ("python", "compiled", "python")]
    for m in machines:
        for v in m.vcpus:
            v.rflags |= r.RFLAGS_IF
    one_by_one = []
    for m in machines[:2]:
        outcomes = []
        for index, msr, value in accesses:
            v = m.vcpus[index]
            if value is None:
                reason = fx.SvmExit.MSR if vendor == "svm" else fx.VmxExit.MSR_READ
                outcomes.append((v.exit(reason, rcx=msr), v.read_data))
            else:
                outcomes.append((v.wrmsr(msr, value), 0))
        one_by_one.append(outcomes)
    assert one_by_one[0] == one_by_one[1]
    write = vendor == "svm"
    reasons = (fx.SvmExit.MSR,) * 2 if vendor == "svm" else (fx.VmxExit.MSR_READ, fx.VmxExit.MSR_WRITE)
    records = np.zeros(len(accesses), dtype=fx.EXIT)
    for record, (index, msr, value) in zip(records, accesses, strict=True):
        record["vcpu"], record["msr"], record["value"] = index, msr, value or 0
        record["reason"] = reasons[value is not None]
        record["info"] = int(write and value is not None)
    codes = machines[2].run(records)
    assert [OUTCOMES[int(code)] for code in codes["code"]] == [outcome for outcome, _ in one_by_one[0]]
    first, *others = machines
    for m in others:
        assert m.snapshot() == first.snapshot()
        assert m.guest_memory[: 4 * PAGE] == first.guest_memory[: 4 * PAGE]
        assert (m.trace.records() == first.trace.records()).all()
    assert len(first.trace) > 1000
