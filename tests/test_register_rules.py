"""Registers of which generations keep, mask or show other bits."""

from __future__ import annotations

import pytest

import fastexit as fx
from apics import TDCR, TPR, machine, patched, register
from fastexit import regs as r
from generations import kernels

KERNELS = fx.profiles()
VENDORS = ("vmx", "svm")
FROM_5_6, FROM_5_10 = kernels("5.6", before="5.10"), kernels("5.10")
INTELS_ALONE = ("5.15", "6.1", "6.6", *kernels("6.12"))
UNCHECKED = kernels(before="6.6")
NMI_ENTRY = 0x400
"""An LVT entry that delivers NMIs."""


@pytest.mark.parametrize("kernel", KERNELS)
def test_tdcr(kernel: str) -> None:
    """5.8.18 kvm_lapic_reg_write stores all of TDCR, 5.10.262 the three bits that mean something."""
    v = machine(0, kernel=kernel).vcpus[0]
    v.wrmsr(TDCR, 0xFFF4)
    assert v.rdmsr(TDCR) == (0 if kernel in FROM_5_10 else 0xFFF4)
    assert register(v, r.APIC_TDCR) == v.rdmsr(TDCR)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("by", ["guest", "host"])
def test_bit_2_of_tpr_over_a_cr8_write(kernel: str, by: str) -> None:
    """5.6.4 to 5.8.18 kvm_lapic_set_tpr keeps the old bit; 5.4.286 has the fix. KVM_SET_SREGS goes the same way."""
    v = machine(0, kernel=kernel).vcpus[0]
    v.set_msr(TPR, 0x0F)
    if by == "host":
        v.set_sregs(cr8=3)
    else:
        v.exit(fx.VmxExit.CR_ACCESS, info1=0x8, value=3)
    assert v.get_msr(TPR) == (0x34 if kernel in FROM_5_6 else 0x30)
    v.set_msr(TPR, 0x0B)
    v.set_sregs(cr8=3)
    assert v.get_msr(TPR) == 0x30


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("vendor", VENDORS)
def test_lvtpc_masks_itself(kernel: str, vendor: str) -> None:
    """kvm_apic_local_deliver: not from 5.6 to 5.8; in late stable kernels for Intel-compatible guests alone."""
    v = machine(0, kernel=kernel, vendor=vendor).vcpus[0]
    v.set_msr(0x834, NMI_ENTRY)
    masks = kernel not in FROM_5_6 and (vendor == "vmx" or kernel not in INTELS_ALONE)
    assert v.local_interrupt(r.APIC_LVTPC) == 1
    assert v.get_msr(0x834) == (NMI_ENTRY | r.LVT_MASKED if masks else NMI_ENTRY)
    assert v.local_interrupt(r.APIC_LVTPC) == (0 if masks else 1)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("msr", [0x80B, 0x80E, 0x831, 0x840, 0x8FF])
def test_reads_of_no_register(kernel: str, msr: int) -> None:
    """x2APIC virtualisation gives the page's eight bytes for any MSR whose bit in the MSR bitmap is clear, and before
    6.3 all but TMCCT's were (seen on 5.10.223, 6.1.192: neither an exit nor a fault). Without APICv they fault.
    """
    m = machine(0, kernel=kernel, apicv=True)
    v = m.vcpus[0]
    v.run()
    before = v.counters()["exits"]
    if kernel not in UNCHECKED:
        with pytest.raises(fx.GeneralProtection):
            v.hw_rdmsr(msr)
    else:
        assert v.hw_rdmsr(msr) == (0xFFFF_FFFF if msr == 0x80E else 0)
        assert v.counters()["exits"] == before
    with pytest.raises(fx.GeneralProtection):
        v.rdmsr(msr)
    off = machine(0, kernel=kernel, apicv=False).vcpus[0]
    with pytest.raises(fx.GeneralProtection):
        off.hw_rdmsr(msr)


@pytest.mark.parametrize("kernel", UNCHECKED)
def test_reads_of_what_was_written(kernel: str) -> None:
    """SELF_IPI reads as its last vector, ICR high as what KVM keeps there; TMCCT still exits."""
    m = machine(0, kernel=kernel, apicv=True)
    v = m.vcpus[0]
    v.hw_wrmsr(0x83F, 0x41)
    assert v.hw_rdmsr(0x83F) == 0x41
    v.wrmsr(0x830, fx.icr(dest=7, vector=0x41))
    v.set_lapic(patched(v, {}))
    assert v.hw_rdmsr(0x831) == 7
    before = v.counters()["exits"]
    v.hw_rdmsr(0x839)
    assert v.counters()["exits"] == before + 1


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_read_across_a_registers_end(kernel: str) -> None:
    """5.8.18 kvm_lapic_reg_read has no look at the length: the register is read, and traced with the odd offset."""
    m = machine(0, x2apic=False, kernel=kernel)
    v = m.vcpus[0]
    v.run()
    m.trace.enable()
    value = v.mmio_read(0xF1)
    lines = [line for line in m.trace.lines() if "kvm_apic:" in line]
    traced = kernel in FROM_5_6
    assert lines == (["kvm_apic: apic_read 0xf1 = 0x1ff"] if traced else [])
    assert value == (1 if traced else 0)
    m.trace.clear()
    assert v.mmio_read(0x3F1) == 0
    assert not [line for line in m.trace.lines() if "kvm_apic:" in line]
