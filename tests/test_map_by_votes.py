"""The APIC map up to 6.1, and ids that a page or a host left behind: rules that later kernels do not have.

All figures but those of rebuilt maps were seen on 5.10.262 and 6.1.192, with SVM.
"""

from __future__ import annotations

import pytest

import fastexit as fx
from apics import BASE, INIT, NMI, machine, msi, nmis, patched, receivers, register, to_x2apic
from fastexit import regs as r
from fastexit.traits import Trait
from generations import kernels

OLD, NEW = kernels(before="6.6"), kernels("6.6")
KERNELS = fx.profiles()
FLAT, CLUSTER, LOGICAL = 0xFFFF_FFFF, 0x0FFF_FFFF, 4


def logical(m: fx.Machine, dest: int, vector: int, mode: int = 0) -> int:
    """KVM_SIGNAL_MSI to a logical destination."""
    return m.signal_msi(0xFEE0_0000 | dest << 12 | LOGICAL, mode << 8 | vector)


def with_ldrs(kernel: str, *ldrs: int, dfr: int = FLAT) -> fx.Machine:
    """xAPICs, software-enabled, with these logical ids."""
    m = machine(*range(len(ldrs)), x2apic=False, kernel=kernel)
    for v, ldr in zip(m.vcpus, ldrs, strict=True):
        v.mmio_write(r.APIC_DFR, dfr)
        v.mmio_write(r.APIC_LDR, ldr << 24)
    return m


@pytest.mark.parametrize("kernel", KERNELS)
def test_an_ldr_of_two_bits(kernel: str) -> None:
    """Its lowest bit alone is in the map (6.1.192 kvm_recalculate_apic_map); later it makes the map useless."""
    m = with_ldrs(kernel, 3, 4)
    assert [logical(m, dest, 0x41) for dest in (1, 2, 4)] == ([1, 0, 1] if kernel in OLD else [1, 1, 1])


@pytest.mark.parametrize("kernel", KERNELS)
def test_equal_ldrs(kernel: str) -> None:
    """The last vCPU has the slot; later both get it, by the scan."""
    m = with_ldrs(kernel, 1, 1)
    assert logical(m, 1, 0x41) == (1 if kernel in OLD else 2)
    assert receivers(m, 0x41) == ({1} if kernel in OLD else {0, 1})


@pytest.mark.parametrize("kernel", KERNELS)
def test_equal_cluster_ids(kernel: str) -> None:
    """The same in cluster mode, where the upper four bits are the cluster."""
    m = with_ldrs(kernel, 0x21, 0x23, 0x31, dfr=CLUSTER)
    assert logical(m, 0x21, 0x41) == (1 if kernel in OLD else 2)
    assert receivers(m, 0x41) == ({1} if kernel in OLD else {0, 1})
    assert logical(m, 0x31, 0x42) == 1


@pytest.mark.parametrize("kernel", KERNELS)
def test_equal_xapic_ids(kernel: str) -> None:
    """The map stays, the first vCPU has the id, and an id that nobody has is nobody's (0); later the scan says -1."""
    m = machine(0, 1, x2apic=False, kernel=kernel)
    m.vcpus[1].mmio_write(r.APIC_ID, 0)
    assert [msi(m, dest, 0x41) for dest in (0, 1)] == ([1, 0] if kernel in OLD else [2, -1])
    assert receivers(m, 0x41) == ({0} if kernel in OLD else {0, 1})


@pytest.mark.parametrize("kernel", KERNELS)
def test_an_x2apic_takes_an_xapics_id(kernel: str) -> None:
    """x2APIC ids come before xAPIC ids, whoever was first; later the map is dropped."""
    m = machine(0, 1, x2apic=False, kernel=kernel)
    m.vcpus[0].mmio_write(r.APIC_ID, 1 << 24)
    to_x2apic(m.vcpus[1])
    assert msi(m, 1, 0x41) == (1 if kernel in OLD else 2)
    assert receivers(m, 0x41) == ({1} if kernel in OLD else {0, 1})


@pytest.mark.parametrize("kernel", KERNELS)
def test_no_apic_is_enabled(kernel: str) -> None:
    """Nobody votes, so there is no logical mode and the scan decides: EPERM, and an NMI or INIT arrives all the same.

    5.10.262 kvm_apic_map_get_logical_dest. Later the map says that nobody is meant.
    """
    m = fx.Machine(vcpus=2, kernel=kernel, apicv=False)
    for v in m.vcpus:
        v.mmio_write(r.APIC_LDR, 1 << 24 + v.index)
    old = kernel in OLD
    assert logical(m, 4, 0x41) == (-1 if old else 0)
    assert logical(m, 2, 0x41) == 0
    assert logical(m, 2, 0, NMI) == (1 if old else 0)
    assert nmis(m) == ({1} if old else set())
    assert logical(m, 2, 0, INIT) == (1 if old else 0)


@pytest.mark.parametrize("kernel", KERNELS)
def test_no_apic_is_enabled_and_the_scan_is_traced(kernel: str) -> None:
    """The scan asks every APIC that matches, also one that accepts nothing: its kvm_apic_accept_irq line shows."""
    m = fx.Machine(vcpus=1, kernel=kernel, apicv=False)
    m.vcpus[0].mmio_write(r.APIC_LDR, 1 << 24)
    m.trace.enable()
    logical(m, 1, 0x41)
    lines = [line for line in m.trace.lines() if "kvm_apic_accept_irq" in line]
    assert len(lines) == (1 if kernel in OLD else 0)


@pytest.mark.parametrize("kernel", KERNELS)
def test_votes_for_two_modes(kernel: str) -> None:
    """Flat and cluster APICs: no mode has all votes, so the scan decides, in every generation."""
    m = with_ldrs(kernel, 1, 2)
    m.vcpus[1].mmio_write(r.APIC_DFR, CLUSTER)
    assert logical(m, 1, 0x41) == 1
    assert logical(m, 0x10, 0x42) == -1


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("api", [0, fx.X2ApicApi.USE_32BIT_IDS])
def test_another_id_in_an_x2apics_page(kernel: str, api: int) -> None:
    """KVM_SET_LAPIC takes ID and LDR from the page's top byte (6.1.192, 6.8.0 kvm_apic_state_fixup); later it ignores
    them. With 32-bit ids another id is refused.
    """
    m = machine(0, 1, kernel=kernel, x2apic_api=api)
    v = m.vcpus[1]
    page = patched(v, {r.APIC_ID: 9 << 24, r.APIC_LDR: 0xFFFF})
    if api:
        with pytest.raises(ValueError, match="EINVAL"):
            v.set_lapic(page)
        return
    v.set_lapic(page)
    from_page = Trait.ID_FROM_PAGE in m.profile.traits
    assert from_page is (kernel in OLD or kernel == "6.8")
    assert v.get_msr(0x802) == (9 if from_page else 1)
    assert v.get_msr(0x80D) == (1 << 9 if from_page else 1 << 1)
    assert register(v, r.APIC_ID) == (9 << 24 if from_page else 1 << 24)
    assert msi(m, 1, 0x41) == 1


@pytest.mark.parametrize("kernel", KERNELS)
def test_32_bit_ids_behind_another_id(kernel: str) -> None:
    """KVM_GET_LAPIC then says EINVAL until the id is the vCPU's again (seen on 5.10.262)."""
    m = machine(0, 1, kernel=kernel)
    v = m.vcpus[1]
    v.set_lapic(patched(v, {r.APIC_ID: 9 << 24}))
    m.enable_x2apic_api(fx.X2ApicApi.USE_32BIT_IDS)
    if Trait.ID_FROM_PAGE in m.profile.traits:
        with pytest.raises(ValueError, match="EINVAL"):
            v.get_lapic()
        v.set_msr(BASE, 0)
        v.set_msr(BASE, r.APIC_DEFAULT_PHYS_BASE | r.APICBASE_EN | r.APICBASE_EXTD)
    assert register(v, r.APIC_ID) == 1


@pytest.mark.parametrize("kernel", KERNELS)
def test_an_ldr_that_hides_another_vcpu(kernel: str) -> None:
    """The slot of an LDR is a physical one in x2APIC mode, so vCPU 0's goes to the vCPU whose page said 0.

    In 5.7 as soon as the map is rebuilt.
    """
    m = machine(0, 1, kernel=kernel)
    m.vcpus[1].set_lapic(patched(m.vcpus[1], {r.APIC_ID: 0}))
    m.add_vcpu(2)
    msi(m, 0, 0x41)
    assert receivers(m, 0x41) == ({1} if kernel in OLD else {0})


@pytest.mark.parametrize("kernel", KERNELS)
def test_the_host_takes_x2apic_mode_away(kernel: str) -> None:
    """The register keeps the 32-bit id, and the map is not rebuilt (6.1.192 kvm_lapic_set_base): a message still
    arrives. Later the xAPIC id is set.
    """
    m = machine(0, 1, kernel=kernel)
    v = m.vcpus[1]
    assert v.set_msr(BASE, r.APIC_DEFAULT_PHYS_BASE | r.APICBASE_EN)
    old = kernel in OLD
    assert register(v, r.APIC_ID) == (1 if old else 1 << 24)
    assert msi(m, 1, 0x41) == 1
    v.mmio_write(r.APIC_SPIV, 0xFF)
    v.mmio_write(r.APIC_SPIV, 0x1FF)
    assert msi(m, 1, 0x42) == (0 if old else 1)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("toggles", [False, True])
def test_a_page_with_a_new_id(kernel: str, toggles: bool) -> None:
    """5.7 rebuilds the map only if SVR's enable bit changed (5.7.6 kvm_apic_set_state), so the new id is not in it."""
    m = machine(0, 1, x2apic=False, kernel=kernel)
    v = m.vcpus[1]
    page = patched(v, {r.APIC_ID: 7 << 24})
    if toggles:
        v.mmio_write(r.APIC_SPIV, 0xFF)
    v.set_lapic(page)
    stale = kernel == "5.7" and not toggles
    assert [msi(m, dest, 0x41) for dest in (7, 1)] == ([0, 1] if stale else [1, 0])


@pytest.mark.parametrize("kernel", kernels("6.1"))
def test_the_base_is_stored_again(kernel: str) -> None:
    """KVM_SET_LAPIC stores APICBASE once more, so a moved page inhibits APICv again: one line more of the trace."""
    m = machine(0, x2apic=False, kernel=kernel, apicv=True)
    v = m.vcpus[0]
    assert v.set_msr(BASE, 0xFEF0_0000 | r.APICBASE_EN | r.APICBASE_BSP)
    page = v.get_lapic()
    m.trace.enable()
    v.set_lapic(page)
    lines = [line for line in m.trace.lines() if "kvm_apicv_inhibit_changed: set" in line]
    assert len(lines) == (1 if Trait.SET_LAPIC_STORES_BASE in m.profile.traits else 0)
    assert (Trait.SET_LAPIC_STORES_BASE in m.profile.traits) is (kernel in kernels("6.1", before="6.12"))


def test_the_newcomers_svr() -> None:
    """The vote is of software-enabled APICs alone: one that is disabled may have any LDR and r.APIC_DFR."""
    m = with_ldrs("6.1", 1, 1)
    m.vcpus[1].mmio_write(r.APIC_SPIV, 0xFF)
    assert logical(m, 1, 0x41) == 1
    assert receivers(m, 0x41) == {0}
