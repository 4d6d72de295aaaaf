"""Traps of Windows guests 27 to 34 and 51 to 55: SINTs, auto-EOI, pages of the SynIC, routes, and APICv beside them."""

from __future__ import annotations

import pytest

import fastexit as fx
from apics import ICR, interrupted, kinds, register, to_x2apic, vectors
from fastexit import hyperv as h
from fastexit import regs as r
from generations import kernels
from windowstraps import (
    FAST,
    GATED,
    OK,
    SEND,
    SINT2,
    VENDORS,
    gp,
    lines,
    put,
    serve,
    serving,
    switch_off,
    windows,
    with_synic,
)

# ------------------------------------------------------------------------------------------------------ auto-EOI, SINTs


@pytest.mark.parametrize("vendor", VENDORS)
def test_hv_trap_27_auto_eoi_is_never_in_service(vendor: str) -> None:
    """Taken out of IRR and put nowhere, PPR stays; the next EOI ends the interrupt that it came into."""
    m, v = with_synic(vendor=vendor)
    assert not gp(v, SINT2, h.HV_SINT_AUTO_EOI | 0x61)
    assert m.irq_line(42, 1) == 1
    assert v.ack() == 0x61
    assert (vectors(v), serving(v), register(v, r.APIC_PROCPRI)) == (set(), set(), 0)
    assert m.irq_line(42, 1) == 1
    assert v.ack() == 0x61, "its class is not held back"

    v.wrmsr(ICR, fx.icr(vector=0x41))
    assert v.ack() == 0x41
    m.irq_line(42, 1)
    assert v.ack() == 0x61
    assert register(v, r.APIC_PROCPRI) == 0x40
    m.trace.clear()
    v.wrmsr(h.MSR_HV_EOI, 0)
    assert lines(m, "kvm_eoi") == ["kvm_eoi: apicid 0 vector 65"]
    v.wrmsr(h.MSR_HV_EOI, 0)
    assert lines(m, "kvm_eoi")[-1] == "kvm_eoi: apicid 0 vector -1"


def test_hv_trap_28_auto_eoi_belongs_to_the_vector() -> None:
    """An ordinary IPI is of that kind too, on that vCPU."""
    m, v = with_synic()
    assert not gp(v, SINT2, h.HV_SINT_AUTO_EOI | 0x61)
    for other, kept in ((v, set()), (m.vcpus[1], {0x61})):
        v.wrmsr(ICR, fx.icr(dest=other.index, vector=0x61))
        assert other.ack() == 0x61
        assert serving(other) == kept


def test_hv_trap_29_a_masked_sint_is_neither() -> None:
    """Neither auto-EOI nor connected: in service like any other, and its EOI tells SynIC nothing."""
    m, v = with_synic()
    assert not gp(v, SINT2, h.HV_SINT_MASKED | h.HV_SINT_AUTO_EOI | 0x61)
    v.wrmsr(ICR, fx.icr(vector=0x61))
    assert v.ack() == 0x61
    assert serving(v) == {0x61}
    m.trace.clear()
    v.wrmsr(h.MSR_HV_EOI, 0)
    assert not [kind for kind in kinds(m) if kind.startswith("kvm_hv_")]
    assert not gp(v, SINT2, 0x61)
    v.wrmsr(ICR, fx.icr(vector=0x61))
    assert v.ack() == 0x61
    m.trace.clear()
    v.wrmsr(h.MSR_HV_EOI, 0)
    assert [kind for kind in kinds(m) if kind.startswith("kvm_hv_")] == [
        "kvm_hv_synic_send_eoi",
        "kvm_hv_notify_acked_sint",
    ]


def test_hv_trap_30_vectors_below_16() -> None:
    """Unmasked: #GP for the guest, taken from the host, in no bitmap; SINTs of an inactive SynIC can be zeroed so."""
    m, v = with_synic()
    assert gp(v, SINT2, 0xF)
    assert not gp(v, SINT2, h.HV_SINT_MASKED | 0xF)
    assert v.set_msr(SINT2, h.HV_SINT_AUTO_EOI | 0xF)
    assert v.get_msr(SINT2) == h.HV_SINT_AUTO_EOI | 0xF
    assert m.irq_line(42, 1) == 1
    serve(v, 0xF)
    m.trace.clear()
    assert v.set_msr(h.MSR_HV_EOI, 0)
    assert kinds(m).count("kvm_eoi") == 1
    assert "kvm_hv_synic_send_eoi" not in kinds(m)

    m = windows()
    v = m.vcpus[0]
    assert (v.set_msr(SINT2, 0x51), v.set_msr(SINT2, 0)) == (False, True), "an inactive SynIC takes 0 alone"


def test_hv_trap_30_an_inactive_sint_is_unmasked_by_0() -> None:
    """The host's 0 is no reset value: once SynIC is on, the SINT raises vector 0."""
    m = windows()
    v = m.vcpus[0]
    assert v.get_msr(SINT2) == h.HV_SINT_MASKED
    assert v.set_msr(SINT2, 0)
    assert v.get_msr(SINT2) == 0
    v.enable_synic()
    m.set_gsi_routing([("hv_sint", 42, 0, 2)])
    assert m.irq_line(42, 1) == 1
    assert vectors(v) == {0}


def test_hv_trap_31_scontrol_gates_nothing() -> None:
    """It is 1 as soon as the capability is on, and 0 does not keep a SINT from being raised."""
    m, v = with_synic()
    assert v.rdmsr(h.MSR_HV_SCONTROL) == 1
    assert not gp(v, SINT2, 0x61)
    assert not gp(v, h.MSR_HV_SCONTROL, 0)
    assert v.rdmsr(h.MSR_HV_SCONTROL) == 0
    assert m.irq_line(42, 1) == 1
    assert vectors(v) == {0x61}


@pytest.mark.parametrize("msr", [h.MSR_HV_SIMP, h.MSR_HV_SIEFP])
@pytest.mark.parametrize("version", [1, 2])
def test_hv_trap_32_who_zeroes_a_page(version: int, msr: int) -> None:
    """The guest's enabling under KVM_CAP_HYPERV_SYNIC; not SYNIC2, not the host, not a write without bit 0."""
    m, v = with_synic(version)
    put(m, 0x7000, b"\xaa" * 0x2000)
    page = m.guest_memory[0x7000:0x8000]
    assert v.set_msr(msr, 0x7001)
    assert v.set_msr(msr, 0xFFFF_F000_0001), "nor does the host's address have to be there"
    assert not gp(v, msr, 0x7000)
    assert set(page) == {0xAA}
    assert not gp(v, msr, 0x7001)
    assert set(page) == ({0} if version == 1 else {0xAA})
    assert m.guest_memory[0x8000] == 0xAA
    assert gp(v, msr, 0xFFFF_F000_0001) is (version == 1)
    assert v.get_msr(msr) == (0x7001 if version == 1 else 0xFFFF_F000_0001)


@pytest.mark.parametrize("msr", [h.MSR_HV_SCONTROL, h.MSR_HV_SIMP, h.MSR_HV_SIEFP])
def test_hv_trap_33_user_space_hears_of_it_afterwards(msr: int) -> None:
    """KVM_EXIT_HYPERV is the next entry's: stored, traced, RIP behind the instruction, and nothing to complete."""
    m, v = with_synic()
    interrupted(v)
    rip = v.rip
    m.trace.clear()
    out = v.wrmsr(msr, 0x7001)
    assert (out.user, out.fault, v.rip - rip) == (fx.KvmExit.HYPERV, None, 2)
    assert f"kvm_msr: msr_write {msr:x} = 0x7001" in m.trace.lines()
    assert v.get_msr(msr) == 0x7001
    assert v.run()
    assert v.rip - rip == 2
    assert v.wrmsr(SINT2, 0x61).user is None
    assert v.wrmsr(h.MSR_HV_EOM, 0).user is None


@pytest.mark.parametrize("value", [0, 1, 1 << 40])
def test_hv_trap_34_eom_is_for_all_sixteen(value: int) -> None:
    """Whatever the value, whether a message waits or not."""
    m, v = with_synic()
    v.wrmsr(h.MSR_HV_EOM, value)
    told = lines(m, "kvm_hv_notify_acked_sint")
    assert told == [f"kvm_hv_notify_acked_sint: vcpu_id 0 sint {sint}" for sint in range(16)]


# ---------------------------------------------------------------------------------------------------------------- APICv


@pytest.mark.parametrize("kernel", GATED)
def test_hv_trap_51_auto_eoi_inhibits_apicv(kernel: str) -> None:
    """Not SynIC as such: while a SINT with auto-EOI is unmasked, on any vCPU."""
    m = windows(kernel=kernel, apicv=True)
    inhibited = []
    for v in m.vcpus[:2]:
        v.enable_synic()
    for v, value in (
        (m.vcpus[0], 0x61),
        (m.vcpus[0], h.HV_SINT_AUTO_EOI | 0x61),
        (m.vcpus[1], h.HV_SINT_AUTO_EOI | 0x62),
        (m.vcpus[0], h.HV_SINT_MASKED | h.HV_SINT_AUTO_EOI | 0x61),
        (m.vcpus[1], 0x62),
    ):
        assert not gp(v, SINT2, value)
        inhibited.append(r.Inhibit.HYPERV in m.inhibits)
    assert inhibited == [False, True, True, True, False]
    assert all(v.apicv for v in m.vcpus) or not interrupted(m.vcpus[0]).fault


@pytest.mark.parametrize("kernel", kernels("5.6", before="5.15"))
def test_hv_trap_51_before_5_15_synic_did(kernel: str) -> None:
    """From the capability on, and for ever."""
    m = windows(kernel=kernel, apicv=True)
    assert r.Inhibit.HYPERV not in m.inhibits
    m.vcpus[0].enable_synic()
    assert r.Inhibit.HYPERV in m.inhibits


def test_hv_trap_52_an_eoi_by_apicv_tells_synic_nothing() -> None:
    """The CPU exits for a connected vector, and KVM does the IOAPIC's part only: guests rely on EOM."""
    m, v = with_synic(apicv=True)
    assert not gp(v, SINT2, 0x61)
    interrupted(v)
    m.trace.clear()
    v.exit(fx.VmxExit.EOI_INDUCED, info1=0x61)
    assert "kvm_eoi: apicid 0 vector 97" in m.trace.lines()
    assert not [kind for kind in kinds(m) if kind.startswith("kvm_hv_")]


def test_hv_trap_52_the_cpu_exits_for_it() -> None:
    """A connected vector is in the EOI-exit bitmap, another is not."""
    m, v = with_synic(apicv=True)
    v.ioapic_handled = set()
    assert not gp(v, SINT2, 0x61)
    v.rflags |= r.RFLAGS_IF
    for number in (0x62, 0x61):
        interrupted(v)
        m.vcpus[1].wrmsr(ICR, fx.icr(dest=0, vector=number))
        v.hw_notify()
        assert v.hw_deliver() == number
        m.trace.clear()
        v.hw_wrmsr(r.MSR_X2APIC_BASE + (r.APIC_EOI >> 4), 0)
        assert ("kvm_eoi" in kinds(m)) is (number == 0x61)


# --------------------------------------------------------------------------------------------------------------- routes


def test_hv_trap_53_what_an_hv_sint_line_says() -> None:
    """-1 for everything that is not delivered; 1 for what is, pending already or not."""
    m, v = with_synic()
    m.set_gsi_routing([("hv_sint", 40, 0, 2), ("hv_sint", 41, 0, 16), ("hv_sint", 42, 1, 2), ("hv_sint", 43, 99, 2)])
    assert m.irq_line(40, 1) == -1, "masked"
    assert not gp(v, SINT2, 0x61)
    assert [m.irq_line(40, level) for level in (0, 1, 1)] == [-1, 1, 1]
    assert [m.irq_line(gsi, 1) for gsi in (41, 42, 43)] == [-1, -1, -1]
    assert vectors(v) == {0x61}


def test_hv_trap_53_the_lines_of_a_route() -> None:
    """Acceptance, then SynIC; no IPI."""
    m, v = with_synic()
    assert not gp(v, SINT2, 0x61)
    m.trace.clear()
    m.irq_line(42, 1)
    assert kinds(m) == ["kvm_set_irq", "kvm_apic_accept_irq", "kvm_hv_synic_set_irq"]
    assert m.trace.lines()[-1].endswith("kvm_hv_synic_set_irq: vcpu_id 0 sint 2 vector 97 ret 1")


def test_hv_trap_54_an_accept_line_is_no_delivery() -> None:
    """A disabled APIC prints it and drops the interrupt; nobody reports that."""
    m = windows()
    switch_off(m.vcpus[1])
    m.trace.clear()
    assert m.vcpus[0].hv_hypercall(SEND | FAST, 0x51, 2) == OK
    assert lines(m, "kvm_apic_accept_irq") == ["kvm_apic_accept_irq: apicid 1 vec 81 (Fixed|edge)"]
    assert vectors(m.vcpus[1]) == set()


@pytest.mark.parametrize("vendor", VENDORS)
@pytest.mark.parametrize("msr", [h.MSR_HV_EOI, h.MSR_HV_ICR, h.MSR_HV_TPR])
def test_hv_trap_55_apicv_does_not_lift_the_intercepts(msr: int, vendor: str) -> None:
    """These MSRs lie outside the CPU's bitmaps: each access exits."""
    m = windows(vendor=vendor, apicv=True, x2avic=vendor == "svm")
    v = m.vcpus[0]
    v.enable_synic()
    to_x2apic(v)
    interrupted(v)
    assert v.hw_wrmsr(r.MSR_X2APIC_BASE + (r.APIC_TASKPRI >> 4), 0).path is fx.Path.HARDWARE
    assert v.hw_wrmsr(msr, 0x20).path is fx.Path.SLOW
