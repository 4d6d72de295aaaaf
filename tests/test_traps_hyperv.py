"""Windows guests: the 56 behaviours of KVM's Hyper-V part that a naive model gets wrong, one by one.

Those that no test can show have a line in docs/model.md; the last test counts them all.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

import apics
import fastexit as fx
from apics import BASE, ICR, in_service, interrupted, kinds, patched, register, to_x2apic, vectors
from fastexit import hyperv as h
from fastexit import regs as r
from fastexit.hyperv import HvFeature
from generations import kernels

VENDORS = ("vmx", "svm")
MODES = pytest.mark.parametrize("x2apic", [False, True], ids=["xAPIC", "x2APIC"])
GATED = kernels("5.15")
WHOLE_ICR = kernels("6.1")
MEMORY = 1 << 20
ASSIST, MESSAGES, INPUT = 0x3000, 0x4000, 0x5000
FAST = h.HV_CALL_FAST
SEND, SEND_EX, SPIN = h.HvCall.SEND_IPI, h.HvCall.SEND_IPI_EX, h.HvCall.NOTIFY_LONG_SPIN_WAIT
OK, BAD, DENIED = h.HvStatus.SUCCESS, h.HvStatus.INVALID_HYPERCALL_INPUT, h.HvStatus.ACCESS_DENIED
SINT2 = h.MSR_HV_SINT0 + 2
CONFIG0, COUNT0 = h.MSR_HV_STIMER0_CONFIG, h.MSR_HV_STIMER0_CONFIG + 1
DIRECT = h.HV_STIMER_DIRECT
ENABLE, PERIODIC, AUTO = h.HV_STIMER_ENABLED, h.HV_STIMER_PERIODIC, h.HV_STIMER_AUTO_ENABLE
ON_SINT2 = 2 << h.HV_STIMER_SINT_SHIFT
SLOT2 = MESSAGES + 2 * h.HV_MESSAGE_BYTES


def windows(*ids: int, x2apic: bool = True, **options: Any) -> fx.Machine:
    """A guest that has told its name to Hyper-V, with a megabyte of memory; tracing is on from here."""
    m = apics.machine(*ids, x2apic=x2apic, **{"hyperv": True, **options})
    m.guest_memory = bytearray(MEMORY)
    for v in m.vcpus:
        v.rflags = r.RFLAGS_FIXED
    if options.get("hyperv", True):
        assert m.vcpus[0].set_msr(h.MSR_HV_GUEST_OS_ID, 1)
    m.trace.enable()
    return m


def with_synic(version: int = 1, **options: Any) -> tuple[fx.Machine, fx.Vcpu]:
    """Such a guest with SynIC on vCPU 0, its message page in place, GSI 40 + n raises SINT n."""
    m = windows(**options)
    v = m.vcpus[0]
    v.enable_synic(version)
    assert v.set_msr(h.MSR_HV_SIMP, MESSAGES | 1)
    m.set_gsi_routing([("hv_sint", 40 + sint, 0, sint) for sint in range(16)])
    m.trace.clear()
    return m, v


def gp(v: fx.Vcpu, msr: int, value: int) -> bool:
    """Whether the guest's WRMSR faults."""
    return v.wrmsr(msr, value).fault is fx.Fault.GP


def rdmsr(v: fx.Vcpu, msr: int) -> int | None:
    """The guest's RDMSR; None for #GP."""
    try:
        return v.rdmsr(msr)
    except fx.GeneralProtection:
        return None


def serving(v: fx.Vcpu) -> set[int]:
    return vectors(v, r.APIC_ISR)


def serve(v: fx.Vcpu, *numbers: int) -> None:
    """These vectors are in service, by KVM_SET_LAPIC."""
    v.set_lapic(patched(v, in_service(v, *numbers)))


def switch_off(v: fx.Vcpu) -> None:
    """The APIC is globally disabled."""
    assert v.set_msr(BASE, v.apic_base & ~(r.APICBASE_EN | r.APICBASE_EXTD))


def lines(m: fx.Machine, *kinds_of: str) -> list[str]:
    return [line for line in m.trace.lines() if line.split(":")[0] in kinds_of]


def stimer_lines(m: fx.Machine) -> list[str]:
    return [kind.removeprefix("kvm_hv_stimer_") for kind in kinds(m) if kind.startswith("kvm_hv_stimer_")]


def receivers(m: fx.Machine, vector: int) -> set[int]:
    return {v.index for v in m.vcpus if vector in vectors(v)}


def block(vector: int, *words: int, reserved: int = 0) -> bytes:
    """Input of an IPI hypercall in memory."""
    return b"".join(
        (vector.to_bytes(4, "little"), reserved.to_bytes(4, "little"), *(w.to_bytes(8, "little") for w in words))
    )


def put(m: fx.Machine, gpa: int, data: bytes) -> None:
    m.guest_memory[gpa : gpa + len(data)] = data


def slow(m: fx.Machine, control: int, data: bytes, gpa: int = INPUT) -> int:
    put(m, gpa, data)
    return m.vcpus[0].hv_hypercall(control, gpa)


def variable(count: int) -> int:
    return count << h.HV_CALL_VAR_COUNT_SHIFT


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


# ------------------------------------------------------------------------------------------------------- IPI hypercalls


def test_hv_trap_14_the_vp_index_is_no_apic_id() -> None:
    """It counts vCPUs as they come; the host may change it, to one that another has: both get the IPI then."""
    m = windows(7, 3, 5)
    v = m.vcpus[0]
    assert [one.rdmsr(h.MSR_HV_VP_INDEX) for one in m.vcpus] == [0, 1, 2]
    assert v.hv_hypercall(SEND | FAST, 0x51, 1 << 1) == OK
    assert v.hv_hypercall(SEND | FAST, 0x52, 1 << 3 | 1 << 5 | 1 << 7) == OK
    assert (receivers(m, 0x51), receivers(m, 0x52)) == ({1}, set())
    assert gp(v, h.MSR_HV_VP_INDEX, 1)
    assert m.vcpus[2].set_msr(h.MSR_HV_VP_INDEX, 1)
    assert v.hv_hypercall(SEND | FAST, 0x53, 1 << 1) == OK
    assert receivers(m, 0x53) == {1, 2}


def test_hv_trap_15_targets_in_the_order_of_creation() -> None:
    """Not in that of the mask's bits."""
    m = windows(0, 1, 2)
    for v, index in zip(m.vcpus, (9, 4, 6), strict=True):
        assert v.set_msr(h.MSR_HV_VP_INDEX, index)
    m.trace.clear()
    m.vcpus[1].hv_hypercall(SEND | FAST, 0x51, 1 << 4 | 1 << 6 | 1 << 9)
    assert lines(m, "kvm_apic_accept_irq") == [f"kvm_apic_accept_irq: apicid {i} vec 81 (Fixed|edge)" for i in range(3)]


@pytest.mark.parametrize("vendor", VENDORS)
def test_hv_trap_16_a_hypercall_is_no_icr_write(vendor: str) -> None:
    """The sender's ICR stays, and neither kvm_apic_ipi nor kvm_apic is printed."""
    m = windows(vendor=vendor)
    v = m.vcpus[0]
    v.wrmsr(ICR, fx.icr(dest=2, vector=0x77))
    m.trace.clear()
    assert v.hv_hypercall(SEND | FAST, 0x51, 2) == OK
    assert slow(m, SEND_EX | variable(1), block(0x52, 0, 1, 2)) == OK
    assert not {"kvm_apic_ipi", "kvm_apic"} & set(kinds(m))
    assert v.rdmsr(ICR) == v.rdmsr(h.MSR_HV_ICR) == fx.icr(dest=2, vector=0x77)


def test_hv_trap_17_all_32_bits_of_the_vector_are_compared() -> None:
    """0x10 to 0xFF; not what its low byte says. The line of the send comes all the same."""
    m = windows()
    v = m.vcpus[0]
    wanted = {0x0F: BAD, 0x10: OK, 0xFF: OK, 0x100: BAD, 0x151: BAD, 0x8000_0051: BAD}
    assert {n: v.hv_hypercall(SEND | FAST, n, 2) for n in wanted} == wanted
    assert {n: slow(m, SEND_EX | variable(1), block(n, 0, 1, 2)) for n in wanted} == wanted
    assert len(lines(m, "kvm_hv_send_ipi")) == len(wanted)
    assert vectors(m.vcpus[1]) == {0x10, 0xFF}


def test_hv_trap_18_an_empty_set_succeeds_with_any_vector() -> None:
    """SEND_IPI_EX returns before it looks at the vector; SEND_IPI with an empty mask does not."""
    m = windows()
    v = m.vcpus[0]
    assert slow(m, SEND_EX, block(5, 0, 0)) == OK
    assert v.hv_hypercall(SEND_EX | FAST, 5, 0, (0,)) == OK
    assert v.hv_hypercall(SEND | FAST, 5, 0) == BAD


def test_hv_trap_19_an_unknown_format_is_sparse() -> None:
    """1 is all, everything else a sparse set."""
    m = windows()
    for number, form in enumerate((2, 3, 1 << 40)):
        assert slow(m, SEND_EX | variable(1), block(0x51 + number, form, 1, 4)) == OK
        assert receivers(m, 0x51 + number) == {2}
    assert slow(m, SEND_EX, block(0x61, 1, 0)) == OK
    assert receivers(m, 0x61) == {0, 1, 2}


@pytest.mark.parametrize("kernel", ["5.15", *WHOLE_ICR])
def test_hv_trap_20_all_has_to_count_its_banks_too(kernel: str) -> None:
    """From 6.1 on the variable header's words are the mask's bits, used or not; before, nobody looked."""
    m = windows(kernel=kernel)
    wrong = BAD if kernel in WHOLE_ICR else OK
    assert slow(m, SEND_EX | variable(1), block(0x51, 1, 0)) == wrong
    assert slow(m, SEND_EX, block(0x52, 1, 0b11)) == wrong
    assert slow(m, SEND_EX | variable(2), block(0x53, 1, 0b11)) == OK
    assert receivers(m, 0x53) == {0, 1, 2}
    assert receivers(m, 0x51) == (set() if kernel in WHOLE_ICR else {0, 1, 2})


def test_hv_trap_21_reserved_words_of_the_input() -> None:
    """Refused in a fast SEND_IPI alone, before its line; a fast EX and a slow SEND_IPI do not look."""
    m = windows()
    v = m.vcpus[0]
    assert v.hv_hypercall(SEND | FAST, 1 << 32 | 0x51, 2) == BAD
    assert lines(m, "kvm_hv_send_ipi") == []
    assert slow(m, SEND, block(0x52, 2, reserved=7)) == OK
    assert v.hv_hypercall(SEND_EX | FAST | variable(1), 7 << 32 | 0x53, 0, (1, 2)) == OK
    assert vectors(m.vcpus[1]) == {0x52, 0x53}


def test_hv_trap_22_input_lies_anywhere() -> None:
    """Unaligned, across a page's border; only beyond the memory it is invalid."""
    m = windows()
    assert slow(m, SEND, block(0x51, 2), INPUT + 3) == OK
    assert slow(m, SEND, block(0x52, 2), INPUT + 0xFFA) == OK
    assert slow(m, SEND_EX | variable(1), block(0x53, 0, 1, 2), INPUT + 0xFED) == OK
    assert slow(m, SEND, block(0x54, 2), MEMORY - 16) == OK
    assert vectors(m.vcpus[1]) == {0x51, 0x52, 0x53, 0x54}
    m.trace.clear()
    for gpa in (MEMORY - 15, MEMORY, (1 << 64) - 8):
        assert m.vcpus[0].hv_hypercall(SEND, gpa) == BAD
    assert lines(m, "kvm_hv_send_ipi") == []
    assert slow(m, SEND_EX | variable(1), block(0x55, 0, 1), MEMORY - 24) == BAD


@pytest.mark.parametrize("kernel", GATED)
def test_hv_trap_23_eleven_banks_by_registers(kernel: str) -> None:
    """The mask has the first half of XMM0."""
    m = windows(kernel=kernel)
    v = m.vcpus[0]
    banks = (2, *[0] * 10)
    assert v.hv_hypercall(SEND_EX | FAST | variable(12), 0x51, 0, (0xFFF, *banks)) == BAD
    assert v.hv_hypercall(SEND_EX | FAST | variable(11), 0x52, 0, (0x7FF, *banks)) == OK
    assert m.vcpus[2].set_msr(h.MSR_HV_VP_INDEX, 10 * 64 + 3)
    assert v.hv_hypercall(SEND_EX | FAST | variable(11), 0x53, 0, (0x7FF, *[0] * 10, 8)) == OK
    assert (receivers(m, 0x51), receivers(m, 0x52), receivers(m, 0x53)) == (set(), {1}, {2})


def test_hv_trap_24_a_guest_with_a_name_calls() -> None:
    """HYPERCALL need not be enabled; written before the name it stays 0 and faults not, whatever it points to."""
    m = windows()
    v = m.vcpus[0]
    assert v.rdmsr(h.MSR_HV_HYPERCALL) == 0
    assert v.hv_hypercall(SEND | FAST, 0x51, 2) == OK
    assert not gp(v, h.MSR_HV_GUEST_OS_ID, 0)
    assert not gp(v, h.MSR_HV_HYPERCALL, 0xFFFF_FFFF_F001)
    assert (v.rdmsr(h.MSR_HV_HYPERCALL), bytes(m.guest_memory[0x6000:0x6004])) == (0, bytes(4))
    assert not gp(v, h.MSR_HV_GUEST_OS_ID, 5)
    assert gp(v, h.MSR_HV_HYPERCALL, 0xFFFF_FFFF_F001)
    assert not gp(v, h.MSR_HV_HYPERCALL, 0x6001)


@pytest.mark.parametrize("vendor", VENDORS)
def test_hv_trap_25_without_a_name_the_page_stays(vendor: str) -> None:
    """Only the enable bit goes; the instruction is KVM's own from then on: 0xB is a yield, no IPI."""
    m = windows(vendor=vendor)
    v = m.vcpus[0]
    assert not gp(v, h.MSR_HV_HYPERCALL, 0x6001)
    page = b"\x0f\x01\xc1\xc3" if vendor == "vmx" else b"\x0f\x01\xd9\xc3"
    assert bytes(m.guest_memory[0x6000:0x6005]) == page + b"\x00"
    assert not gp(v, h.MSR_HV_GUEST_OS_ID, 0)
    assert (v.rdmsr(h.MSR_HV_HYPERCALL), bytes(m.guest_memory[0x6000:0x6004])) == (0x6000, page)
    m.trace.clear()
    v.hypercall(r.HC_SCHED_YIELD, 1)
    assert v.read_data == 0
    assert not [kind for kind in kinds(m) if kind.startswith("kvm_hv_")]


def test_hv_trap_26_the_spin_wait_succeeds_slow_and_fast() -> None:
    """A yield, whatever its parameters; only counts in the control word are invalid."""
    v = windows().vcpus[0]
    assert [v.hv_hypercall(SPIN, 0xFFFF_FFFF), v.hv_hypercall(SPIN | FAST, 1)] == [OK, OK]
    assert [v.hv_hypercall(SPIN | count) for count in (1 << 32, 1 << 48, variable(1))] == [BAD] * 3


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


# -------------------------------------------------------------------------------------------------- timers and messages


def expired(m: fx.Machine, v: fx.Vcpu, config: int, count: int = 5) -> list[str]:
    """The guest arms timer 0 and the time comes: the lines of what then happens."""
    assert not gp(v, COUNT0, count)
    assert not gp(v, CONFIG0, config)
    m.set_time(m.time + 100 * count + 100)
    m.trace.clear()
    interrupted(v)
    return lines(m, "kvm_hv_stimer_expiration")


def expiration(direct: int, result: int) -> list[str]:
    return [f"kvm_hv_stimer_expiration: vcpu_id 0 timer 0 direct {direct} send result {result}"]


def test_hv_trap_35_unmasking_delivers_nothing() -> None:
    """A timer whose message is stuck waits for EOM, or for the EOI of its SINT."""
    m, v = with_synic()
    assert expired(m, v, ENABLE | ON_SINT2, 100) == expiration(0, -2)
    put(m, SLOT2, bytes(4))
    assert not gp(v, SINT2, 0x61)
    m.trace.clear()
    interrupted(v)
    assert (stimer_lines(m), vectors(v)) == ([], set())
    v.wrmsr(h.MSR_HV_EOM, 0)
    assert lines(m, "kvm_hv_stimer_expiration") == expiration(0, 0)
    assert vectors(v) == {0x61}


def test_hv_trap_36_a_masked_sint_has_its_message() -> None:
    """It is written, nobody is interrupted, and the retry finds it in the way."""
    m, v = with_synic()
    assert expired(m, v, ENABLE | ON_SINT2, 100) == expiration(0, -2)
    slot = bytes(m.guest_memory[SLOT2 : SLOT2 + 256])
    assert slot[:8] == bytes.fromhex("10000080 18 00 0000")
    assert (slot[8:24], int.from_bytes(slot[24:32], "little"), slot[40:]) == (bytes(16), 100, bytes(216))
    assert int.from_bytes(slot[32:40], "little") >= 100
    assert vectors(v) == set()
    m.trace.clear()
    v.wrmsr(h.MSR_HV_EOM, 0)
    assert lines(m, "kvm_hv_stimer_expiration") == expiration(0, -11)
    assert m.guest_memory[SLOT2 + 5] == h.HV_MESSAGE_PENDING


@pytest.mark.parametrize("periodic", [False, True])
def test_hv_trap_37_only_one_shots_wait_for_the_slot(periodic: bool) -> None:
    """A periodic timer's tick is dropped without a trace in the slot; a one-shot sets its pending flag and waits."""
    m, v = with_synic()
    assert not gp(v, SINT2, 0x61)
    put(m, SLOT2, b"\x01\x00\x00\x00")
    wanted = expiration(0, 0 if periodic else -11)
    assert expired(m, v, ENABLE | ON_SINT2 | (PERIODIC if periodic else 0), 100) == wanted
    assert m.guest_memory[SLOT2 + 5] == (0 if periodic else h.HV_MESSAGE_PENDING)
    assert v.get_msr(CONFIG0) is not None
    assert v.rdmsr(CONFIG0) & ENABLE
    assert vectors(v) == set()
    put(m, SLOT2, bytes(4))
    m.trace.clear()
    v.wrmsr(h.MSR_HV_EOM, 0)
    assert lines(m, "kvm_hv_stimer_expiration") == ([] if periodic else expiration(0, 0))


def test_hv_trap_38_result_1_is_no_success() -> None:
    """A direct timer whose APIC is off: not accepted, still enabled, and stuck."""
    m, v = with_synic()
    assert expired(m, v, ENABLE | DIRECT | 0x51 << 4, 100) == expiration(1, 0)
    assert not v.rdmsr(CONFIG0) & ENABLE
    switch_off(v)
    assert expired(m, v, ENABLE | DIRECT | 0x51 << 4, 200) == expiration(1, 1)
    assert v.rdmsr(CONFIG0) & ENABLE
    m.set_time(m.time + 100_000)
    m.trace.clear()
    interrupted(v)
    v.wrmsr(h.MSR_HV_EOM, 0)
    assert stimer_lines(m) == []


def test_hv_trap_39_the_hosts_count_does_not_switch() -> None:
    """0 disables when the guest writes it, and a count enables an auto-enabled timer then; not when the host does."""
    _, v = with_synic()
    stopped, running = AUTO | ON_SINT2, ENABLE | AUTO | ON_SINT2
    assert v.set_msr(CONFIG0, stopped)
    assert v.set_msr(COUNT0, 1 << 40)
    assert v.get_msr(CONFIG0) == stopped
    assert not gp(v, COUNT0, 1 << 40)
    assert v.get_msr(CONFIG0) == running
    assert v.set_msr(COUNT0, 0)
    assert v.get_msr(CONFIG0) == running
    assert not gp(v, COUNT0, 0)
    assert v.get_msr(CONFIG0) == stopped


def test_hv_trap_40_enabled_with_sint_0() -> None:
    """Only the write that follows an enabled configuration loses its enable bit; a direct one never."""
    _, v = with_synic()
    for value, kept in (
        (ENABLE | AUTO, ENABLE | AUTO),
        (ENABLE, 0),
        (ENABLE, ENABLE),
        (ENABLE | DIRECT, ENABLE | DIRECT),
    ):
        assert not gp(v, CONFIG0, value)
        assert v.rdmsr(CONFIG0) == kept


def test_hv_trap_41_an_entry_serves_timers() -> None:
    """The host's timer marks and kicks; the interrupt is made, and taken, at the next entry."""
    m, v = with_synic()
    interrupted(v)
    m.trace.clear()
    v.wrmsr(CONFIG0, ENABLE | DIRECT | 0x51 << 4)
    v.wrmsr(COUNT0, 100)
    armed = [kind.removeprefix("kvm_hv_stimer_") for kind in kinds(m) if kind == "kvm_msr" or "_stimer_" in kind]
    assert armed == ["set_config", "cleanup", "kvm_msr", "cleanup", "set_count", "cleanup", "kvm_msr", "start_one_shot"]
    v.rflags |= r.RFLAGS_IF
    m.trace.clear()
    m.set_time(10_000)
    assert stimer_lines(m) == ["callback"]
    assert "kvm_apic_accept_irq" not in kinds(m)
    interrupted(v)
    assert stimer_lines(m) == ["callback", "expiration", "cleanup"]
    assert v.injected == 0x51


def test_hv_trap_42_a_one_shot_of_the_past() -> None:
    """It is never started: it runs out in one more round of the entry."""
    m, v = with_synic()
    m.set_time(100_000)
    v.wrmsr(CONFIG0, ENABLE | DIRECT | 0x51 << 4)
    m.trace.clear()
    v.wrmsr(COUNT0, 7)
    assert stimer_lines(m) == ["set_count", "cleanup", "expiration", "cleanup"]
    assert vectors(v) == {0x51}


def test_hv_trap_43_timers_are_read_without_synic() -> None:
    """And written with it alone, even 0."""
    v = windows().vcpus[0]
    assert [rdmsr(v, msr) for msr in range(CONFIG0, CONFIG0 + 8)] == [0] * 8
    assert [gp(v, msr, 0) for msr in range(CONFIG0, CONFIG0 + 8)] == [True] * 8
    assert (v.set_msr(CONFIG0, 0), v.set_msr(CONFIG0, 1), v.set_msr(COUNT0, 1)) == (True, False, False)
    assert rdmsr(v, h.MSR_HV_SCONTROL) is None
    v.enable_synic()
    assert not gp(v, CONFIG0, 0)


# --------------------------------------------------------------------------------------------------- PV EOI


def with_assist_page(**options: Any) -> tuple[fx.Machine, fx.Vcpu]:
    """A vCPU in the guest with interrupts on, whose assist page says that nothing is in service."""
    m, v = with_synic(**options)
    v.ioapic_handled = set()
    assert not gp(v, h.MSR_HV_VP_ASSIST_PAGE, ASSIST | 1)
    v.rflags |= r.RFLAGS_IF
    interrupted(v)
    m.trace.clear()
    return m, v


def take(m: fx.Machine, v: fx.Vcpu, *numbers: int) -> int:
    """IPIs of another vCPU come, and the guest is interrupted: the assist page's byte then."""
    for number in numbers:
        m.vcpus[1].wrmsr(ICR, fx.icr(dest=0, vector=number))
    interrupted(v)
    return m.guest_memory[ASSIST]


@pytest.mark.parametrize("vendor", VENDORS)
@pytest.mark.parametrize("kernel", kernels("6.12"))
def test_hv_trap_44_an_exit_takes_pv_eoi_back(kernel: str, vendor: str) -> None:
    """Any that leaves the inner loop; not a fast IPI by 0x830 that re-enters, which one by 0x40000071 never is."""
    m, v = with_assist_page(kernel=kernel, vendor=vendor)
    assert take(m, v, 0x41) == 1
    assert v.wrmsr(ICR, fx.icr(dest=2, vector=0x51)).completion is fx.Fastpath.REENTER_GUEST
    assert m.guest_memory[ASSIST] == 1
    v.wrmsr(h.MSR_HV_ICR, fx.icr(dest=2, vector=0x52))
    assert m.guest_memory[ASSIST] == 0
    assert serving(v) == {0x41}
    interrupted(v)
    assert m.guest_memory[ASSIST] == 0


def test_hv_trap_45_pv_eoi_is_for_the_highest_in_service() -> None:
    """Under auto-EOI that is not the vector just injected: clearing the bit ends the one below."""
    m, v = with_assist_page()
    assert not gp(v, SINT2, h.HV_SINT_AUTO_EOI | 0x61)
    assert take(m, v, 0x41) == 1
    assert take(m, v, 0x61) == 1
    assert v.injected == 0x61
    m.guest_memory[ASSIST] = 0
    m.trace.clear()
    interrupted(v)
    assert lines(m, "kvm_pv_eoi") == ["kvm_pv_eoi: apicid 0 vector 65"]
    assert serving(v) == set()


def test_hv_trap_46_no_pv_eoi_while_another_waits() -> None:
    """One that the guest could not take yet counts as well."""
    m, v = with_assist_page()
    assert take(m, v, 0x61, 0x41) == 0
    assert v.injected == 0x61


def test_hv_trap_47_the_lines_of_pv_eoi() -> None:
    """The end of the interrupt, SynIC, then kvm_pv_eoi; no register was written, no MSR."""
    m, v = with_assist_page()
    assert not gp(v, SINT2, 0x41)
    assert take(m, v, 0x41) == 1
    m.guest_memory[ASSIST] = 0
    m.trace.clear()
    interrupted(v)
    told = [kind for kind in kinds(m) if kind not in ("kvm_exit", "kvm_entry")]
    assert told == ["kvm_eoi", "kvm_hv_synic_send_eoi", "kvm_hv_notify_acked_sint", "kvm_pv_eoi"]


def test_hv_trap_48_four_bytes_of_the_page_are_cleared() -> None:
    """The address's low bits are no address: kept in the MSR, not looked at."""
    m = windows()
    v = m.vcpus[0]
    put(m, ASSIST - 16, b"\xaa" * 4200)
    assert not gp(v, h.MSR_HV_VP_ASSIST_PAGE, ASSIST | 0xFF1)
    assert v.rdmsr(h.MSR_HV_VP_ASSIST_PAGE) == ASSIST | 0xFF1
    assert bytes(m.guest_memory[ASSIST - 1 : ASSIST + 5]) == b"\xaa\x00\x00\x00\x00\xaa"
    assert m.guest_memory[ASSIST + 0xFF0] == 0xAA


def test_hv_trap_49_a_page_that_is_not_there_changes_nothing() -> None:
    """#GP, or the ioctl stops: the old page is still used; without bit 0 no address is wrong."""
    m, v = with_assist_page()
    for bad in (MEMORY | 1, 1 << 63 | 1):
        assert gp(v, h.MSR_HV_VP_ASSIST_PAGE, bad)
        assert not v.set_msr(h.MSR_HV_VP_ASSIST_PAGE, bad)
    assert v.rdmsr(h.MSR_HV_VP_ASSIST_PAGE) == ASSIST | 1
    assert take(m, v, 0x41) == 1
    assert not gp(v, h.MSR_HV_VP_ASSIST_PAGE, MEMORY)


def test_hv_trap_50_one_pv_eoi_for_both() -> None:
    """KVM's MSR and the assist page share a state, of the last that was written; either one ends it."""
    m, v = with_assist_page()
    assert v.rdmsr(r.MSR_KVM_PV_EOI_EN) == ASSIST | 1
    assert not gp(v, r.MSR_KVM_PV_EOI_EN, 0x8004 | 1)
    assert v.rdmsr(h.MSR_HV_VP_ASSIST_PAGE) == ASSIST | 1
    assert take(m, v, 0x41) == 0
    assert m.guest_memory[0x8004] == 1
    v.wrmsr(h.MSR_HV_EOI, 0)
    assert not gp(v, h.MSR_HV_VP_ASSIST_PAGE, 0)
    assert v.rdmsr(r.MSR_KVM_PV_EOI_EN) == 0
    assert take(m, v, 0x41) == 0
    assert m.guest_memory[0x8004] == 0
    v.wrmsr(h.MSR_HV_EOI, 0)
    assert not gp(v, h.MSR_HV_VP_ASSIST_PAGE, ASSIST | 1)
    assert not gp(v, r.MSR_KVM_PV_EOI_EN, 0)
    assert take(m, v, 0x41) == 0


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


# ------------------------------------------------------------------------------------------------------ all of them


def test_every_hyperv_trap_is_tested_or_excused() -> None:
    """56 of them; an excuse is a line ``| Hyper-V trap 7 |`` in docs/model.md."""
    text = Path(__file__).read_text()
    tested = {int(n) for n in re.findall(r"^def test_hv_trap_(\d\d)_\w+\(", text, flags=re.MULTILINE)}
    model = (Path(__file__).parents[1] / "docs" / "model.md").read_text()
    excused = {int(n) for n in re.findall(r"^\| Hyper-V trap (\d+) \|", model, flags=re.MULTILINE)}
    assert tested | excused == set(range(1, 57))
    assert not tested & excused
