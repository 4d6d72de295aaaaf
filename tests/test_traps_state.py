"""APICBASE, INIT, and the page that user space gets and sets: traps 30-33, 36, 37, 39, 41-44."""

from __future__ import annotations

import pytest

import fastexit as fx
from apics import BASE, ICR, INIT, PPR, SELF_IPI, SVR, X2APIC, in_service, machine, msi, patched, register, vectors
from fastexit import layout as L
from fastexit import regs as r
from fastexit.profile import since
from fastexit.traits import Trait
from generations import having

GP = fx.Fault.GP
EN = r.APICBASE_EN


def test_trap_30_leaving_x2apic_keeps_its_ldr() -> None:
    """ID becomes an xAPIC's again; LDR stays the x2APIC's, whose top byte is an xAPIC's logical id 0."""
    v = machine(0, 0x112).vcpus[1]
    assert register(v, r.APIC_LDR) == 0x11 << 16 | 1 << 2
    assert v.set_msr(BASE, v.apic_base & ~r.APICBASE_EXTD)
    assert (register(v, r.APIC_LDR), register(v, r.APIC_ID)) == (0x11 << 16 | 1 << 2, 0x12 << 24)


def test_trap_31_the_value_that_is_there_passes_unchecked() -> None:
    """After CPUID took address bits away, APICBASE may be written back as it is, and not with any change."""
    m = machine()
    v = m.vcpus[0]
    far = v.apic_base | 1 << 40
    assert v.set_msr(BASE, far)
    m.mem[L.H_MAXPHYADDR] = 36
    rip = v.rip
    assert v.set_msr(BASE, far)
    assert (v.wrmsr(BASE, far).fault, v.rip, v.apic_base) == (None, rip + 2, far)
    assert not v.set_msr(BASE, far ^ r.APICBASE_BSP)
    assert v.wrmsr(BASE, far ^ r.APICBASE_BSP).fault is GP
    assert v.apic_base == far


@pytest.mark.parametrize(
    ("old", "new", "guest_may"),
    [
        (X2APIC, EN, False),
        (0, X2APIC, False),
        (X2APIC, 0, True),
        (0, EN, True),
        (EN, X2APIC, True),
        (EN, 0, True),
    ],
)
def test_trap_32_transitions_of_guest_and_host(old: int, new: int, guest_may: bool) -> None:
    """x2APIC to xAPIC and off to x2APIC fault for a guest; the host may do all that are no nonsense in themselves."""
    v = machine().vcpus[0]
    base = v.apic_base & ~X2APIC
    assert v.set_msr(BASE, base | old)
    assert v.wrmsr(BASE, base | new).fault is (None if guest_may else GP)
    assert v.apic_base == base | (new if guest_may else old)
    assert v.set_msr(BASE, base | old)
    assert v.set_msr(BASE, base | new)
    assert v.apic_base == base | new
    assert not v.set_msr(BASE, base | r.APICBASE_EXTD)


@pytest.mark.parametrize("x2apic", [True, False])
def test_trap_33_disabling_resets_nothing(x2apic: bool) -> None:
    """Off and on again: every register, vector and the running timer as before, the id of an xAPIC excepted."""
    m = machine(x2apic=x2apic, hv_timer=False)
    v = m.vcpus[1]
    registers = {r.APIC_TASKPRI: 0x75, r.APIC_LVT0: 0x131, r.APIC_TMICT: 5000, r.APIC_LVTT: 0x61, r.APIC_LDR: 0x2000000}
    v.set_lapic(patched(v, registers | in_service(v, 0x71) | {0x220: 2, 0x190: 8, r.APIC_TMCCT: 5000}))
    before, base = patched(v, {r.APIC_ID: 0}), v.apic_base
    assert v.wrmsr(BASE, base & ~X2APIC).fault is None
    assert patched(v, {r.APIC_ID: 0}) == before
    assert msi(m, 1, 0x51) == 0, "it is off"
    assert v.wrmsr(BASE, base & ~r.APICBASE_EXTD).fault is None
    assert patched(v, {r.APIC_ID: 0}) == before
    assert (register(v, r.APIC_ID), m.next_timer()) == (1 << 24, 10_000)


@pytest.mark.parametrize(
    ("options", "lint0"),
    [
        ({}, [0x700, 0x10000]),
        ({"disable_quirks": r.QUIRK_LINT0_REENABLED}, [0x10000, 0x10000]),
        ({"boot_cpu_id": 1}, [0x10000, 0x700]),
    ],
)
def test_trap_36_lint0_of_the_boot_vcpu(options: dict[str, int], lint0: list[int]) -> None:
    """RESET leaves the boot vCPU's LINT0 as ExtINT, unmasked, unless the quirk is off; INIT does too."""
    m = fx.Machine(vcpus=2, apicv=False, **options)
    assert [register(v, r.APIC_LVT0) for v in m.vcpus] == lint0
    for v in m.vcpus:
        v.mmio_write(r.APIC_LVT0, 0x10031)
    for v in m.vcpus:
        msi(m, v.vcpu_id, 0, INIT)
        v.get_mp_state()
    assert [register(v, r.APIC_LVT0) for v in m.vcpus] == lint0


def test_trap_37_init_keeps_mode_id_and_x2apic_ldr() -> None:
    """INIT rewrites SVR, LVTs, TPR and DFR, which an x2APIC does not even have; mode, ID and LDR stay."""
    m = machine(0, 18)
    v = m.vcpus[1]
    changed = {r.APIC_DFR: 0x0FFF_FFFF, r.APIC_LVT1: 0x31, r.APIC_TASKPRI: 0x50, r.APIC_ICR: 0x41}
    v.set_lapic(patched(v, changed | in_service(v, 0x61)))
    m.vcpus[0].wrmsr(ICR, fx.icr(dest=18, delivery=INIT))
    assert v.get_mp_state() == fx.MpState.INIT_RECEIVED
    assert v.apic_base & X2APIC == X2APIC
    assert (v.get_msr(0x802), register(v, r.APIC_LDR)) == (18, 1 << 16 | 1 << 2)
    after = [register(v, offset) for offset in (*changed, r.APIC_SPIV)]
    assert after == [0xFFFF_FFFF, 0x10000, 0, 0, 0xFF]
    assert vectors(v, r.APIC_ISR) == set()


def test_trap_37_init_of_an_xapic_clears_ldr_and_keeps_id() -> None:
    """An xAPIC's LDR becomes 0; the id that the guest gave it stays."""
    m = machine(x2apic=False)
    v = m.vcpus[1]
    v.mmio_write(r.APIC_ID, 9 << 24)
    v.mmio_write(r.APIC_LDR, 2 << 24)
    assert msi(m, 9, 0, INIT) == 1
    v.get_mp_state()
    assert (register(v, r.APIC_ID), register(v, r.APIC_LDR)) == (9 << 24, 0)


def test_trap_39_set_lapic_computes_ppr_with_the_old_count() -> None:
    """PPR comes before the ISR is counted: nothing was in service, so the new ISR counts for nothing."""
    v = machine().vcpus[0]
    v.set_lapic(patched(v, in_service(v, 0x91) | {r.APIC_TASKPRI: 0x2F}))
    assert register(v, r.APIC_PROCPRI) == 0x2F
    v.set_lapic(patched(v, in_service(v, 0xA1)))
    assert register(v, r.APIC_PROCPRI) == 0xA0, "a count from a page has no cache: the bits are looked at"
    assert v.get_msr(PPR) == 0xA0


def test_trap_39_set_lapic_computes_ppr_with_the_old_cache() -> None:
    """A vector that was delivered is cached as the highest: its class is PPR, whatever the page says."""
    v = machine().vcpus[0]
    v.set_msr(SELF_IPI, 0x61)
    assert v.ack() == 0x61
    v.set_lapic(patched(v, in_service(v, 0x91)))
    assert (register(v, r.APIC_PROCPRI), v.get_msr(PPR)) == (0x60, 0x90)


def test_trap_39_apicv_always_counts_one() -> None:
    """With APICv the count is a constant 1, so the page's ISR is seen."""
    v = machine(apicv=True).vcpus[0]
    v.set_lapic(patched(v, in_service(v, 0x91)))
    assert register(v, r.APIC_PROCPRI) == 0x90


GARBAGE = {
    r.APIC_SPIV: 0xDEAD_BFFF,
    r.APIC_LVTT: 0xFFF9_0031,
    r.APIC_LVT0: 0xFFFF_FFFF,
    r.APIC_ESR: 0xFFFF_FFFF,
    r.APIC_DFR: 0x1234_5678,
    r.APIC_ICR: 0xFFFF_FFFF,
    r.APIC_TASKPRI: 0xFFFF_FF10,
    r.APIC_ARBPRI: 0x77,
    0x3A0: 0xABCD_EF01,
}


@pytest.mark.parametrize("x2apic", [True, False])
def test_trap_41_set_lapic_masks_nothing(x2apic: bool) -> None:
    """Reserved bits, ESR, the busy ICR, holes of the page: all come back as they were set, a read shows them too."""
    v = machine(x2apic=x2apic).vcpus[0]
    v.set_lapic(patched(v, GARBAGE))
    assert {offset: register(v, offset) for offset in GARBAGE} == GARBAGE
    if x2apic:
        assert (v.get_msr(SVR), v.get_msr(0x828), v.get_msr(ICR)) == (0xDEAD_BFFF, 0xFFFF_FFFF, 0xFFFF_FFFF)


def test_trap_41_svr_is_applied_even_by_a_call_that_fails() -> None:
    """EINVAL for a wrong 32-bit id: no register of the page is taken, but SVR has switched the APIC off."""
    m = machine(x2apic_api=fx.X2ApicApi.USE_32BIT_IDS)
    v = m.vcpus[1]
    with pytest.raises(ValueError, match="EINVAL"):
        v.set_lapic(patched(v, {r.APIC_ID: 7, r.APIC_SPIV: 0xF7, r.APIC_TASKPRI: 0x50}))
    assert (register(v, r.APIC_SPIV), register(v, r.APIC_TASKPRI)) == (0xF7, 0)
    assert msi(m, 1, 0x41) == 0, "software-disabled"


@pytest.mark.parametrize("irqchip", ["full", "split"])
def test_trap_42_version_cannot_be_set(irqchip: str) -> None:
    """KVM_SET_LAPIC writes it over with its own."""
    v = machine(irqchip=irqchip).vcpus[0]
    version = register(v, r.APIC_LVR)
    v.set_lapic(patched(v, {r.APIC_LVR: version ^ 0x0103_0001}))
    assert (register(v, r.APIC_LVR), v.get_msr(0x803)) == (version, version)


@pytest.mark.parametrize("long_ids", [False, True])
def test_trap_43_the_id_in_an_x2apic_page(long_ids: bool) -> None:
    """ID<<24 without 32-bit ids, and then a page with any id is taken; else the id itself, and it has to be right."""
    v = machine(0, 18, x2apic_api=int(long_ids)).vcpus[1]
    assert register(v, r.APIC_ID) == (18 if long_ids else 18 << 24)
    wrong = patched(v, {r.APIC_ID: 0x0500_0005, r.APIC_LDR: 7})
    if long_ids:
        with pytest.raises(ValueError, match="EINVAL"):
            v.set_lapic(wrong)
    else:
        v.set_lapic(wrong)
    assert (v.get_msr(0x802), v.get_msr(0x80D)) == (18, 1 << 16 | 1 << 2)


@pytest.mark.parametrize("vendor", ["vmx", "svm"])
@pytest.mark.parametrize("kernel", fx.profiles())
def test_trap_44_the_icrs_high_word_leaks_at_0x304(kernel: str, vendor: str) -> None:
    """Where the x2APIC ICR is one u64, its high word shows at 0x304 and 0x310, and survives the mode at 0x304."""
    one_word = since(kernel, "6.1") and (vendor == "vmx" or kernel not in having(Trait.ICR_SPLIT_SVM))
    v = machine(0, 1, 9, kernel=kernel, vendor=vendor).vcpus[0]
    v.wrmsr(ICR, fx.icr(dest=9, vector=0x41))
    leaked = 9 if one_word else 0
    assert [register(v, offset) for offset in (0x300, 0x304, 0x310)] == [0x41, leaked, 9]
    assert v.set_msr(BASE, v.apic_base & ~r.APICBASE_EXTD)
    assert [register(v, offset) for offset in (0x300, 0x304, 0x310)] == [0x41, leaked, 0 if one_word else 9]


def test_trap_44_set_lapic_takes_the_high_word_from_0x310() -> None:
    """VMX: what the page says at 0x304 is written over with 0x310."""
    v = machine().vcpus[0]
    v.set_lapic(patched(v, {0x300: 0x41, 0x304: 5, 0x310: 6}))
    assert (v.get_msr(ICR), register(v, 0x304)) == (6 << 32 | 0x41, 6)
