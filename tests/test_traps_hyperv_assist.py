"""Traps of Windows guests 44 to 50: EOIs that the assist page makes needless."""

from __future__ import annotations

from typing import Any

import pytest

import fastexit as fx
from apics import ICR, interrupted, kinds
from fastexit import hyperv as h
from fastexit import regs as r
from generations import kernels
from windowstraps import ASSIST, MEMORY, SINT2, VENDORS, gp, lines, put, serving, windows, with_synic

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
