"""Devices are found by address: the xAPIC page at APICBASE, ioeventfds; what none claims is user space's."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import fastexit as fx
from fastexit import layout as L
from fastexit import regs as r
from fastexit.ioctls import UserIo, UserMmio

VENDORS = ("vmx", "svm")
PAGE = r.APIC_DEFAULT_PHYS_BASE
DEVICE = 0xFED0_0000
RIP = 0x40_1000


def running(vendor: str = "vmx", **options: Any) -> fx.Machine:
    """Two vCPUs in xAPIC mode, in the guest, at RIP."""
    m = fx.Machine(vcpus=2, vendor=vendor, apicv=False, **options)
    for v in m.vcpus:
        v.rdmsr(r.MSR_APICBASE)
        v.rip = RIP
    return m


# ------------------------------------------------------------------------------------------------------- the xAPIC page


@pytest.mark.parametrize("vendor", VENDORS)
def test_the_page_is_where_apicbase_says(vendor: str) -> None:
    """A guest that moves its APIC finds it at the new address, and nothing at the old one; others' stay."""
    m = running(vendor)
    v, other = m.vcpus
    v.wrmsr(r.MSR_APICBASE, 0xFED0_0000 | r.APICBASE_EN | r.APICBASE_BSP)
    assert v.apic_page == 0xFED0_0000
    assert v.mem_read(0xFED0_0000 + r.APIC_LVR) == r.APIC_VERSION
    assert v.mmio_read(r.APIC_LVR) == r.APIC_VERSION
    assert v.user_mmio is None
    assert v.mem_read(PAGE + r.APIC_LVR) == 0
    assert v.user_mmio == (PAGE + r.APIC_LVR, 0, 4, False)
    assert other.mem_read(PAGE + r.APIC_LVR) == r.APIC_VERSION
    assert other.mem_read(0xFED0_0000 + r.APIC_LVR) == 0
    assert other.exit_reason is fx.KvmExit.MMIO


@pytest.mark.parametrize("gpa", [PAGE - 1, PAGE - 4, PAGE + 0x1000])
def test_the_page_ends(gpa: int) -> None:
    """It is 4 KiB."""
    v = running().vcpus[0]
    assert v.mem_write(gpa, 0).user is fx.KvmExit.MMIO


def test_ipi_by_address() -> None:
    """ICR2 and ICR at their addresses send."""
    m = running()
    v, target = m.vcpus
    m.vcpus[1].mem_write(PAGE + r.APIC_SPIV, 0x1FF)
    v.mem_write(PAGE + r.APIC_ICR2, 1 << 24)
    assert v.mem_write(PAGE + r.APIC_ICR, 0x41).accepted == 1
    assert target.pending() == 0x41


@pytest.mark.parametrize("length", [1, 2, 8])
def test_other_lengths(length: int) -> None:
    """Writes that are no dword vanish; a read of 8 bytes gives nothing, shorter ones a part."""
    v = running().vcpus[0]
    assert v.mem_write(PAGE + r.APIC_TASKPRI, 0x20, length).user is None
    assert v.mem_read(PAGE + r.APIC_TASKPRI) == 0
    part = {1: r.APIC_VERSION & 0xFF, 2: r.APIC_VERSION & 0xFFFF, 8: 0}
    assert v.mem_read(PAGE + r.APIC_LVR, length) == part[length]


@pytest.mark.parametrize("length", [1, 2, 4, 8])
def test_hole_reads_as_ones(length: int) -> None:
    """In x2APIC mode KVM swallows the page, with the quirk, and reads all ones."""
    m = running()
    m.boot_x2apic()
    assert m.vcpus[0].mem_read(PAGE, length) == (1 << 8 * length) - 1


# ---------------------------------------------------------------------------------------------------------- user space


@pytest.mark.parametrize("door", ["one", "batch"])
@pytest.mark.parametrize("vendor", VENDORS)
def test_store_of_user_spaces(vendor: str, door: str) -> None:
    """Address, data, length and direction are there until KVM_RUN is called again."""
    m = running(vendor)
    v = m.vcpus[0]
    if door == "one":
        out = v.mem_write(DEVICE + 0x10, 0x1122_3344_5566_7788, 8)
    else:
        record = (0, m.dispatcher.vendor.mmio_reason, 0, 8 | L.MMIO_WRITE, 0x1122_3344_5566_7788, DEVICE + 0x10)
        out = fx.OUTCOMES[int(m.run(np.array([record], dtype=fx.EXIT))["code"][0])]
    assert out.user is v.exit_reason is fx.KvmExit.MMIO
    assert v.user_mmio == (DEVICE + 0x10, 0x1122_3344_5566_7788, 8, True)
    assert v.user_io is None
    assert v.run()
    assert v.user_mmio is None


def test_store_moves_rip_at_once() -> None:
    """The emulator is through with a store; only a load is finished by user space's answer."""
    v = running().vcpus[0]
    v.shadow = r.SHADOW_STI
    v.exit(fx.VmxExit.EPT_MISCONFIG, gpa=DEVICE, write=True, value=5, length=6)
    assert (v.rip, v.shadow) == (RIP + 6, 0)
    v.run()
    assert v.rip == RIP + 6


@pytest.mark.parametrize("answered", [True, False])
def test_load_ends_with_the_answer(answered: bool) -> None:
    """RIP moves then, and the data is what user space gave; KVM_RUN without an answer reads 0."""
    v = running().vcpus[0]
    assert v.mem_read(PAGE + r.APIC_LVR) == r.APIC_VERSION
    v.exit(fx.VmxExit.EPT_MISCONFIG, gpa=DEVICE, size=2, length=3)
    assert v.user_mmio == UserMmio(gpa=DEVICE, data=0, length=2, write=False)
    assert v.rip == RIP
    if answered:
        v.complete_access(0xBEEF)
        assert v.user_mmio is None
    assert v.run()
    assert v.rip == RIP + 3
    assert v.read_data == (0xBEEF if answered else 0)


@pytest.mark.parametrize("vendor", VENDORS)
@pytest.mark.parametrize("length", [1, 2, 4])
def test_ports(vendor: str, length: int) -> None:
    """No device has a port: OUT and IN are user space's."""
    v = running(vendor).vcpus[0]
    out = v.io_write(0x3F8, 0x41, length)
    assert out.user is v.exit_reason is fx.KvmExit.IO
    assert v.user_io == (0x3F8, 0x41, length, True)
    assert v.io_read(0xCFC, length) == 0
    assert v.user_io == UserIo(port=0xCFC, data=0, length=length, write=False)
    assert v.user_mmio is None
    with pytest.raises(ValueError, match=f"{length}-byte value"):
        v.complete_access(1 << 8 * length)
    v.complete_access((1 << 8 * length) - 1)
    assert v.read_data == (1 << 8 * length) - 1


@pytest.mark.parametrize(
    ("vendor", "reason", "info1"),
    [("vmx", 30, 0x03F8_0000 | 1), ("vmx", 30, 0x03F8_0000 | 8 | 1), ("svm", 0x7B, 0x03F8_0020)]
    + [("svm", 0x7B, 0x03F8_0021)],
    ids=["vmx out", "vmx in", "svm out", "svm in"],
)
def test_what_the_cpu_says_of_an_io_instruction(vendor: str, reason: int, info1: int) -> None:
    """SDM: size less 1 in bits 2:0, IN in bit 3. APM: IN in bit 0, a bit for each size at 6:4. The port is at 31:16."""
    m = running(vendor)
    v = m.vcpus[0]
    read = bool(info1 & (8 if vendor == "vmx" else 1))
    assert m.io_info(0x3F8, 2, write=not read) == info1
    v.exit(reason, info1=info1, value=0xABCD_1234, length=2)
    assert v.user_io == (0x3F8, 0 if read else 0x1234, 2, not read)
    assert v.rip == RIP
    v.run()
    assert v.rip == RIP + 2
    m.run(np.array([(0, reason, 0, info1, 0xABCD_1234, 0)], dtype=fx.EXIT))
    assert v.user_io == (0x3F8, 0 if read else 0x1234, 2, not read)


def test_single_step_over_a_port() -> None:
    """KVM_RUN returns at once with KVM_EXIT_DEBUG, where the instruction ends; a store to memory forgets it."""
    v = running().vcpus[0]
    v.rflags |= r.RFLAGS_TF
    v.singlestep = True
    v.io_write(0x80, 1)
    assert not v.run()
    assert v.exit_reason is fx.KvmExit.DEBUG
    v.run()
    v.mem_write(DEVICE, 1)
    assert v.run()
    v.mem_read(DEVICE)
    v.complete_access(7)
    assert v.exit_reason is fx.KvmExit.DEBUG


def test_a_write_has_no_answer() -> None:
    v = running().vcpus[0]
    v.mem_write(DEVICE, 1)
    with pytest.raises(ValueError, match="a write has no data"):
        v.complete_access(1)
    v.complete_access()
    assert v.user_mmio is None


def test_snapshot_between_access_and_answer() -> None:
    """What waits for user space is in the snapshot."""
    m = running()
    m.vcpus[0].exit(fx.VmxExit.EPT_MISCONFIG, gpa=DEVICE, size=2, length=3)
    copy = fx.Machine.restore(m.snapshot())
    copy.vcpus[0].complete_access(9)
    assert copy.vcpus[0].rip == RIP + 3


# --------------------------------------------------------------------------------------------------------- ioeventfds


def test_fast_mmio_is_a_set() -> None:
    """It lies in the machine's memory, where kernels look it up, with room for 128."""
    m = running()
    for i in range(L.FAST_MMIO):
        m.fast_mmio.add(DEVICE + 4 * i)
    m.fast_mmio.add(DEVICE)
    assert len(m.fast_mmio) == L.FAST_MMIO
    with pytest.raises(ValueError, match="at most 128"):
        m.fast_mmio.add(0)
    m.fast_mmio.remove(DEVICE + 4)
    assert m.fast_mmio == {DEVICE + 4 * i for i in range(L.FAST_MMIO) if i != 1}
    with pytest.raises(KeyError):
        m.fast_mmio.remove(DEVICE + 4)
    assert m.vcpus[0].mem_write(DEVICE + 4 * 127, 1).user is None
    assert m.vcpus[0].mem_write(DEVICE + 4, 1).user is fx.KvmExit.MMIO
    m.fast_mmio.clear()
    assert repr(m.fast_mmio) == "{}"
    assert m.vcpus[0].mem_write(DEVICE, 1).user is fx.KvmExit.MMIO


def test_ioeventfds_are_in_no_snapshot() -> None:
    """They are user space's, which makes them anew."""
    m = running()
    m.fast_mmio.add(DEVICE)
    assert not fx.Machine.restore(m.snapshot()).fast_mmio


def test_emulator_finds_an_ioeventfd_for_writes() -> None:
    """An EPT violation goes through the emulator: a store is claimed there, without kvm_fast_mmio, a load is not."""
    m = running()
    m.trace.enable()
    m.fast_mmio.add(DEVICE)
    v = m.vcpus[0]
    assert v.exit(fx.VmxExit.EPT_VIOLATION, gpa=DEVICE, write=True, length=3).user is None
    assert v.rip == RIP + 3
    assert v.exit(fx.VmxExit.EPT_VIOLATION, gpa=DEVICE, length=3).user is fx.KvmExit.MMIO
    assert not any("kvm_fast_mmio" in line for line in m.trace.lines())


@pytest.mark.parametrize("vendor", VENDORS)
def test_fast_bus_goes_before_the_apic(vendor: str) -> None:
    """KVM_FAST_MMIO_BUS is asked before the emulator, whatever is at the address."""
    m = running(vendor)
    v = m.vcpus[0]
    m.fast_mmio.add(PAGE + r.APIC_TASKPRI)
    v.mem_write(PAGE + r.APIC_TASKPRI, 0x20)
    m.fast_mmio.clear()
    assert v.mem_read(PAGE + r.APIC_TASKPRI) == 0
