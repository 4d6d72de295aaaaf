"""Registers that take, keep or drop other bits than the manuals say: traps 1-3, 12, 28, 29, 34, 35, 38, 40, 45, 46, 49,
68. Numbers are those of the project's list of 70 KVM behaviours; test_traps.py checks that none is missing.
"""

from __future__ import annotations

import pytest

import fastexit as fx
from apics import (
    BASE,
    EOI,
    ESR,
    ICR,
    LVTT,
    PPR,
    SELF_IPI,
    SVR,
    TMCCT,
    TMICT,
    TPR,
    alias,
    in_service,
    interrupted,
    machine,
    msi,
    patched,
    register,
    to_x2apic,
    vectors,
    xapic_ipi,
)
from fastexit import regs as r
from fastexit.profile import since
from fastexit.traits import Trait
from generations import having

GP = fx.Fault.GP


@pytest.mark.parametrize("kernel", fx.profiles())
def test_trap_01_eoi_takes_any_32_bits(kernel: str) -> None:
    """EOI need not be written as 0; a bit above 31 faults and ends nothing (kernels before 5.15 do not look)."""
    m = machine(kernel=kernel)
    v = m.vcpus[0]
    for value, faults in ((0xFFFF_FFFF, False), (1, False), (1 << 32, since(kernel, "5.15"))):
        v.set_msr(SELF_IPI, 0x41)
        assert v.ack() == 0x41
        assert v.wrmsr(EOI, value).fault is (GP if faults else None)
        assert vectors(v, r.APIC_ISR) == ({0x41} if faults else set())


@pytest.mark.parametrize(
    ("msr", "stored"),
    [
        (TPR, 0xFF),
        (SVR, 0x3FF),
        (LVTT, 0x710FF),
        (0x833, 0x117FF),
        (0x834, 0x117FF),
        (0x835, 0x1F7FF),
        (0x836, 0x1F7FF),
        (0x837, 0x110FF),
        (TMICT, 0xFFFF_FFFF),
        (0x83E, 0xB),
    ],
)
def test_trap_02_reserved_bits_are_dropped_in_silence(msr: int, stored: int) -> None:
    """x2APIC mode or not: all 32 bits may be written, those that exist stay, and RIP moves."""
    v = machine().vcpus[0]
    rip = v.rip
    assert v.wrmsr(msr, 0xFFFF_FFFF).fault is None
    assert (v.rdmsr(msr), v.rip) == (stored, rip + 4)


def test_trap_02_timer_mode_bits_go_by_cpuid() -> None:
    """Without TSC-deadline in CPUID, LVTT bit 18 is one of the bits that are dropped."""
    v = machine(tsc_deadline=False).vcpus[0]
    assert v.wrmsr(LVTT, 0xFFFF_FFFF).fault is None
    assert v.rdmsr(LVTT) == 0x310FF


def test_trap_03_esr_never_changes() -> None:
    """x2APIC: only 0 may be written, and that clears nothing; illegal vectors sent and received leave no error bit."""
    m = machine()
    v = m.vcpus[0]
    v.set_lapic(patched(v, {r.APIC_ESR: 0x60}))
    assert v.wrmsr(ESR, 1).fault is GP
    assert v.wrmsr(ESR, 0).fault is None
    assert v.rdmsr(ESR) == 0x60

    v.wrmsr(ICR, fx.icr(dest=1, vector=3))
    v.wrmsr(SELF_IPI, 5)
    assert (v.rdmsr(ESR), register(m.vcpus[1], r.APIC_ESR)) == (0x60, 0)


def test_trap_03_esr_of_an_xapic_takes_any_write() -> None:
    """xAPIC: every value is accepted, none is stored, none clears what is there."""
    v = machine(x2apic=False).vcpus[0]
    v.set_lapic(patched(v, {r.APIC_ESR: 0x60}))
    for value in (0, 0xFFFF_FFFF):
        v.mmio_write(r.APIC_ESR, value)
        assert v.mmio_read(r.APIC_ESR) == 0x60


@pytest.mark.parametrize("kernel", fx.profiles())
@pytest.mark.parametrize("fastpath", [True, False])
def test_trap_12_busy_is_cleared_and_reserved_bits_fault(kernel: str, fastpath: bool) -> None:
    """x2APIC: bit 12 vanishes; bits 13, 16, 17, 20-31 fault, ICR as it was; older kernels and 6.8 store them."""
    m = machine(kernel=kernel)
    m.fastpath = fastpath
    v = m.vcpus[0]
    sent = fx.icr(dest=1, vector=0x41)
    assert v.wrmsr(ICR, sent | 1 << 12).fault is None
    assert v.rdmsr(ICR) == sent
    for bit in (13, 16, 17, *range(20, 32)):
        faults = kernel in having(Trait.ICR_RESERVED_GP)
        icr = fx.icr(dest=1, vector=0x80 + bit) | 1 << bit
        assert v.wrmsr(ICR, icr).fault is (GP if faults else None)
        assert v.rdmsr(ICR) == (sent if faults else icr)
        assert (0x80 + bit in vectors(m.vcpus[1])) is not faults


def test_trap_12_xapic_stores_reserved_bits() -> None:
    """xAPIC: everything but bit 12 is stored as written, and the IPI leaves."""
    m = machine(x2apic=False)
    assert xapic_ipi(m.vcpus[0], 1, 0xFFF3_3041).accepted == 1
    assert m.vcpus[0].mmio_read(r.APIC_ICR) == 0xFFF3_2041


def test_trap_28_dfr_is_cluster_to_the_map_and_nothing_to_the_scan() -> None:
    """A DFR write sets bits 27:0; a model that is neither 0 nor 15 works through the map, and never without it."""
    m = machine(x2apic=False)
    v = m.vcpus[1]
    v.mmio_write(r.APIC_LDR, 0x1100_0000)
    for written, dfr in ((0x5000_0000, 0x5FFF_FFFF), (0, 0x0FFF_FFFF)):
        v.mmio_write(r.APIC_DFR, written)
        assert v.mmio_read(r.APIC_DFR) == dfr
        assert msi(m, 0x11, 0x41, logical=True) == 1
    alias(m, 2, 0)
    assert msi(m, 0x11, 0x42, logical=True) == 1, "0x0FFFFFFF is what the scan knows as cluster"
    v.mmio_write(r.APIC_DFR, 0x5000_0000)
    assert msi(m, 0x11, 0x43, logical=True) == -1


@pytest.mark.parametrize("register_offset", [r.APIC_ID, r.APIC_LDR])
def test_trap_29_id_and_ldr_keep_their_top_byte(register_offset: int) -> None:
    """xAPIC: bits 31:24 are stored, the rest is dropped."""
    v = machine(x2apic=False).vcpus[1]
    v.mmio_write(register_offset, 0x1234_5678)
    assert v.mmio_read(register_offset) == 0x1200_0000


def test_trap_29_a_written_id_is_lost_with_the_mode() -> None:
    """A guest's own id works until the APIC is enabled again or leaves x2APIC mode: then it is vcpu_id once more."""
    m = machine(0, 1, 2, x2apic=False)
    v = m.vcpus[1]
    alias(m, 1, 9)
    assert (msi(m, 9, 0x41), msi(m, 1, 0x41)) == (1, 0)
    v.wrmsr(BASE, v.apic_base & ~r.APICBASE_EN)
    assert register(v, r.APIC_ID) == 9 << 24, "disabling alone changes nothing"
    v.wrmsr(BASE, v.apic_base | r.APICBASE_EN)
    assert register(v, r.APIC_ID) == 1 << 24

    alias(m, 1, 9)
    to_x2apic(v)
    assert v.set_msr(BASE, v.apic_base & ~r.APICBASE_EXTD)
    assert register(v, r.APIC_ID) == 1 << 24
    assert (msi(m, 9, 0x42), msi(m, 1, 0x42)) == (0, 1)


def test_trap_34_software_disable_masks_for_good_and_keeps_vectors() -> None:
    """Every LVT gets bit 16 and keeps it when the APIC is enabled again; IRR and ISR stay, and are delivered."""
    m = machine()
    v = m.vcpus[0]
    for msr in range(LVTT, 0x838):
        v.wrmsr(msr, 0x55)
    v.set_msr(SELF_IPI, 0x41)
    assert v.ack() == 0x41
    v.set_msr(SELF_IPI, 0x61)
    v.wrmsr(SVR, 0xFF)
    assert (vectors(v), vectors(v, r.APIC_ISR)) == ({0x61}, {0x41})
    v.wrmsr(SVR, 0x1FF)
    assert [v.rdmsr(msr) for msr in range(LVTT, 0x838)] == [0x10055] * 6
    assert v.ack() == 0x61


def test_trap_34_software_disable_drops_the_tick_but_not_the_timer() -> None:
    """A tick that waits is gone; an hrtimer that runs goes on and its tick comes once LVTT is unmasked again."""
    m = machine(hv_timer=False)
    v = m.vcpus[0]
    v.wrmsr(LVTT, 0x55)
    v.wrmsr(TMICT, 500)
    v.get_msr(SVR)  # outside the guest a tick waits
    m.set_time(1_000)
    v.set_msr(SVR, 0xFF)
    v.set_msr(SVR, 0x1FF)
    v.set_msr(LVTT, 0x55)
    interrupted(v)
    assert vectors(v) == set(), "the tick that had expired is dropped"

    v.wrmsr(TMICT, 500)
    v.set_msr(SVR, 0xFF)
    assert m.next_timer() == 2_000, "still running"
    v.set_msr(SVR, 0x1FF)
    v.set_msr(LVTT, 0x55)
    m.set_time(2_000)
    interrupted(v)
    assert vectors(v) == {0x55}


def test_trap_35_guests_set_status_and_remote_irr() -> None:
    """Delivery status and remote IRR are plain storage."""
    v = machine().vcpus[0]
    v.wrmsr(0x835, 1 << 12 | 1 << 14 | 0x31)
    v.wrmsr(0x833, 1 << 12 | 0x31)
    assert (v.rdmsr(0x835), v.rdmsr(0x833)) == (0x5031, 0x1031)


def test_trap_35_timer_mode_3_is_stored_and_dead() -> None:
    """LVTT mode 11b reads back; it is no timer: TMICT stores, TMCCT reads 0, 0x6E0 is ignored, nothing is armed."""
    m = machine(hv_timer=False)
    v = m.vcpus[0]
    v.wrmsr(LVTT, 0x60031)
    v.wrmsr(TMICT, 1000)
    v.wrmsr(0x6E0, 5000)
    assert (v.rdmsr(LVTT), v.rdmsr(TMICT), v.rdmsr(TMCCT), v.rdmsr(0x6E0)) == (0x60031, 1000, 0, 0)
    assert m.next_timer() is None


def test_trap_38_ppr_in_the_page_is_stale() -> None:
    """A page shows PPR as it was computed last; only reading the register, even by the host, computes and stores it."""
    v = machine().vcpus[0]
    v.set_lapic(patched(v, in_service(v, 0x61)))
    assert register(v, r.APIC_PROCPRI) == 0
    assert register(v, r.APIC_PROCPRI) == 0, "KVM_GET_LAPIC computes nothing"
    assert v.get_msr(PPR) == 0x60
    assert register(v, r.APIC_PROCPRI) == 0x60


@pytest.mark.parametrize(
    ("tpr", "isr", "ppr"),
    [(0x23, None, 0x23), (0x63, 0x61, 0x63), (0x6F, 0x61, 0x6F), (0x53, 0x61, 0x60), (0x5F, 0x6F, 0x60)],
)
def test_trap_40_ppr_keeps_the_low_nibble_of_tpr_only(tpr: int, isr: int | None, ppr: int) -> None:
    """TPR's class wins ties, and then all eight bits of TPR are PPR; from ISR only the class comes."""
    v = machine().vcpus[0]
    if isr is not None:
        v.set_msr(SELF_IPI, isr)
        assert v.ack() == isr
    v.wrmsr(TPR, tpr)
    assert v.rdmsr(PPR) == ppr


def test_trap_40_the_nibble_keeps_a_class_out() -> None:
    """A vector's class is compared with all of PPR: TPR 0x23 lets 0x30 in, not 0x2F."""
    v = machine().vcpus[0]
    v.set_msr(TPR, 0x23)
    v.set_msr(SELF_IPI, 0x2F)
    assert v.pending() is None
    v.set_msr(SELF_IPI, 0x30)
    assert v.pending() == 0x30


def test_trap_45_odd_mmio_writes_vanish() -> None:
    """Only an aligned dword is a write; anything else changes nothing, traces nothing, and is no fault."""
    m = machine(x2apic=False)
    v = m.vcpus[0]
    v.mmio_write(r.APIC_TASKPRI, 0x55)
    m.trace.enable()
    for offset, length in ((0x80, 1), (0x80, 2), (0x84, 4), (0x88, 4), (0x81, 1)):
        assert v.mmio_write(offset, 0x11, length=length).fault is None
    assert v.mmio_read(r.APIC_TASKPRI) == 0x55
    assert not [line for line in m.trace.lines() if "apic_write" in line]


def test_trap_45_reads_that_do_not_fit_read_nothing() -> None:
    """A byte or word inside a register's dword is read; an access past it, or to no register, leaves no trace line."""
    m = machine(x2apic=False)
    v = m.vcpus[0]
    v.mmio_write(r.APIC_LDR, 0x1200_0000)
    assert (v.mmio_read(0xD3, 1), v.mmio_read(0xD2, 2)) == (0x12, 0x1200)
    m.trace.enable()
    for offset, length in ((0xD3, 2), (0xD4, 4), (r.APIC_EOI, 4), (r.APIC_SELF_IPI, 4), (0x400, 4)):
        v.mmio_read(offset, length)
    assert not [line for line in m.trace.lines() if "apic_read" in line]
    assert v.mmio_read(0xD3, 1) == 0x12
    assert "kvm_apic: apic_read 0xd3 = 0x12000000" in m.trace.lines(), "raw offset, whole register"


def test_trap_46_a_write_that_fails_is_traced() -> None:
    """The line comes before the register says no; only reserved ICR bits and bits 63:32 fail before it."""
    m = machine()
    m.trace.enable()
    for msr, value, line in (
        (0x820, 0, ["kvm_apic: apic_write APIC_IRR = 0x0"]),
        (ESR, 7, ["kvm_apic: apic_write APIC_ESR = 0x7"]),
        (SELF_IPI, 0x100, ["kvm_apic: apic_write APIC_SELF_IPI = 0x100"]),
        (0x80D, 1, ["kvm_apic: apic_write APIC_LDR = 0x1"]),
        (ICR, 1 << 13, []),
        (TPR, 1 << 32, []),
        (0x820, 1 << 32, []),
    ):
        m.trace.clear()
        assert m.vcpus[0].wrmsr(msr, value).fault is GP
        assert [text for text in m.trace.lines() if text.startswith("kvm_apic:")] == line


def test_trap_46_xapic_traces_writes_to_nothing() -> None:
    """In the page every aligned dword that is written has its line, register or not."""
    m = machine(x2apic=False)
    m.trace.enable()
    m.vcpus[0].mmio_write(0x3A0, 5)
    assert "kvm_apic: apic_write 0x3a0 = 0x5" in m.trace.lines()


@pytest.mark.parametrize("vendor", ["vmx", "svm"])
def test_trap_49_cr8_and_set_sregs_clear_the_low_nibble(vendor: str) -> None:
    """CR8 holds four bits: whoever writes it, be it with what it read, loses TPR[3:0]."""
    v = machine(vendor=vendor).vcpus[0]
    v.wrmsr(TPR, 0x3F)
    v.set_sregs()
    assert (v.rdmsr(TPR), v.cr8) == (0x30, 3)
    v.wrmsr(TPR, 0x3F)
    if vendor == "svm":
        v.exit(fx.SvmExit.WRITE_CR8, rax=3)
    else:
        v.exit(fx.VmxExit.CR_ACCESS, info1=8, rax=3)
    assert v.rdmsr(TPR) == 0x30


@pytest.mark.parametrize(("irqchip", "api", "sticks"), [("full", 0, False), ("split", 0, True), ("split", 8, False)])
def test_trap_68_svr_bit_12_needs_version_bit_24(irqchip: str, api: int, sticks: bool) -> None:
    """EOI-broadcast suppression is stored where VERSION advertises it; bit 9, which no CPU has any more, always."""
    v = machine(irqchip=irqchip, x2apic_api=api).vcpus[0]
    assert bool(v.rdmsr(0x803) >> 24 & 1) is sticks
    v.wrmsr(SVR, 0xFFFF_FFFF)
    assert v.rdmsr(SVR) == (0x13FF if sticks else 0x3FF)
