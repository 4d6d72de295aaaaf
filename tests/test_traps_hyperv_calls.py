"""Traps of Windows guests 14 to 26: IPI hypercalls, and what makes a VMCALL one of Hyper-V's."""

from __future__ import annotations

import pytest

import fastexit as fx
from apics import ICR, kinds, vectors
from fastexit import hyperv as h
from fastexit import regs as r
from windowstraps import (
    BAD,
    FAST,
    GATED,
    INPUT,
    MEMORY,
    OK,
    SEND,
    SEND_EX,
    SPIN,
    VENDORS,
    WHOLE_ICR,
    block,
    gp,
    lines,
    receivers,
    slow,
    variable,
    windows,
)

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
