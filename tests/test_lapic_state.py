"""The register page: reset and INIT, what user space reads and sets, where the ICR lies, priorities and enable bits."""

from __future__ import annotations

import struct
from typing import Any

import pytest

import fastexit as fx
from fastexit import layout as L
from fastexit import regs as r
from fastexit.traits import Trait
from generations import having, kernels

KERNELS = fx.profiles()
OLD = kernels(before="6.1")
INIT = 5
EN, EXTD, BSP = 1 << 11, 1 << 10, 1 << 8
LVTS = (0x320, 0x330, 0x340, 0x350, 0x360, 0x370)


def registers(v: fx.Vcpu) -> dict[int, int]:
    """The page's non-zero dwords by offset."""
    page = struct.unpack("<256I", v.get_lapic())
    return {4 * i: value for i, value in enumerate(page) if value}


def page_with(v: fx.Vcpu, **changes: int) -> bytes:
    """The vCPU's page with dwords replaced, ``x280=1`` for offset 0x280."""
    page = bytearray(v.get_lapic())
    for offset, value in changes.items():
        struct.pack_into("<I", page, int(offset[1:], 16), value)
    return bytes(page)


def booted(vcpus: int = 2, **options: Any) -> fx.Machine:
    m = fx.Machine(vcpus=vcpus, **options)
    m.boot_x2apic()
    return m


def xapic(apicv: bool = False, **options: Any) -> fx.Machine:
    """Two vCPUs in xAPIC mode, software-enabled."""
    m = fx.Machine(vcpus=2, apicv=apicv, **options)
    for v in m.vcpus:
        v.mmio_write(0xF0, 0x1FF)
    return m


def init(m: fx.Machine, target: fx.Vcpu) -> None:
    """Sends INIT as an MSI and lets the target take it."""
    assert m.signal_msi(0xFEE0_0000 | target.vcpu_id << 12, INIT << 8) == 1
    target.get_mp_state()


AT_RESET = {0x30: 0x50014, 0xE0: 0xFFFF_FFFF, 0xF0: 0xFF} | dict.fromkeys(LVTS, 0x10000)


def test_reset_values() -> None:
    """Every register after reset; the boot CPU has LINT0 open for ExtINT and the BSP bit."""
    m = fx.Machine(apic_ids=[0, 3])
    assert registers(m.vcpus[0]) == AT_RESET | {0x350: 0x700}
    assert registers(m.vcpus[1]) == AT_RESET | {0x20: 3 << 24}
    assert [v.apic_base for v in m.vcpus] == [0xFEE0_0900, 0xFEE0_0800]
    assert [v.get_mp_state() for v in m.vcpus] == [r.MpState.RUNNABLE, r.MpState.UNINITIALIZED]


@pytest.mark.parametrize(
    ("options", "version"),
    [
        ({}, 0x50014),
        ({"cmci": True}, 0x60014),
        ({"irqchip": "split"}, 0x0105_0014),
        ({"irqchip": "split", "x2apic": False}, 0x50014),
        ({"irqchip": "split", "x2apic_api": 8}, 0x50014),
    ],
)
def test_version(options: dict[str, Any], version: int) -> None:
    """VERSION tells of CMCI, and of directed EOI on a split irqchip with x2APIC."""
    m = fx.Machine(vcpus=1, **options)
    found = registers(m.vcpus[0])
    assert found[0x30] == version
    assert found.get(0x2F0) == (0x10000 if options.get("cmci") else None)


def test_id_above_255() -> None:
    """An xAPIC ID has eight bits; the x2APIC ID has all."""
    m = fx.Machine(apic_ids=[0, 300], x2apic_api=1)
    assert registers(m.vcpus[1])[0x20] == 44 << 24
    m.boot_x2apic()
    assert registers(m.vcpus[1])[0x20] == 300
    assert registers(m.vcpus[1])[0xD0] == 18 << 16 | 1 << 12


@pytest.mark.parametrize("apicv", [True, False])
def test_init_in_xapic_mode(apicv: bool) -> None:
    """INIT resets all but APICBASE and the ID that the guest gave itself."""
    m = xapic(apicv)
    v = m.vcpus[1]
    v.mmio_write(0x20, 9 << 24)
    for offset, value in ((0x80, 0x31), (0xD0, 2 << 24), (0xE0, 0), (0x310, 7 << 24), (0x320, 0x200EC), (0x3E0, 3)):
        v.mmio_write(offset, value)
    v.mmio_write(0x300, 0x8041)
    m.signal_msi(0xFEE0_9000, 0x41)
    base = v.apic_base
    assert m.signal_msi(0xFEE0_9000, INIT << 8) == 1
    v.get_mp_state()
    assert registers(v) == AT_RESET | {0x20: 9 << 24}
    assert (v.apic_base, v.pending()) == (base, None)


@pytest.mark.parametrize("apicv", [True, False])
@pytest.mark.parametrize("vendor", ["vmx", "svm"])
def test_init_in_x2apic_mode(vendor: str, apicv: bool) -> None:
    """INIT keeps x2APIC mode, ID and LDR; the ICR's word at 0x300 goes, the split layout's high half at 0x310 stays."""
    m = booted(vendor=vendor, apicv=apicv)
    v = m.vcpus[1]
    v.wrmsr(0x830, fx.icr(dest=0x77, vector=0x41))
    v.wrmsr(0x808, 0x31)
    init(m, v)
    expected = AT_RESET | {0x20: 1 << 24, 0xD0: 2}
    assert registers(v) == (expected | {0x310: 0x77} if vendor == "svm" else expected)
    assert v.apic_base & (EN | EXTD) == EN | EXTD
    assert v.get_msr(0x830) == (0x77 << 32 if vendor == "svm" else 0)


@pytest.mark.parametrize("kernel", OLD)
def test_init_clears_both_icr_halves_in_old_kernels(kernel: str) -> None:
    """While ICR and ICR2 were two registers in every mode, INIT cleared both of them."""
    m = booted(kernel=kernel)
    m.vcpus[1].wrmsr(0x830, fx.icr(dest=0x77, vector=0x41))
    init(m, m.vcpus[1])
    assert m.vcpus[1].get_msr(0x830) == 0


@pytest.mark.parametrize(
    ("generations", "vendor", "words"),
    [
        (OLD, "vmx", {0x300: 0x41, 0x310: 0x12345}),
        (OLD, "svm", {0x300: 0x41, 0x310: 0x12345}),
        (kernels("6.1"), "vmx", {0x300: 0x41, 0x304: 0x12345, 0x310: 0x12345}),
        (kernels("6.8", before="6.12"), "svm", {0x300: 0x41, 0x304: 0x12345, 0x310: 0x12345}),
        (having(Trait.ICR_SPLIT_SVM), "svm", {0x300: 0x41, 0x310: 0x12345}),
    ],
)
@pytest.mark.parametrize("fast", [True, False])
def test_where_the_icr_lies(generations: tuple[str, ...], vendor: str, words: dict[int, int], fast: bool) -> None:
    """Two halves in old kernels and on AMD's since 6.12, one word at 0x300 otherwise, which leaks into 0x304."""
    for kernel in generations:
        m = booted(kernel=kernel, vendor=vendor)
        m.fastpath = fast
        v = m.vcpus[0]
        v.wrmsr(0x830, fx.icr(dest=0x12345, vector=0x41, busy=True))
        found = registers(v)
        assert {o: found[o] for o in (0x300, 0x304, 0x310) if o in found} == words, kernel
        assert v.get_msr(0x830) == fx.icr(dest=0x12345, vector=0x41)


def test_icr_word_survives_x2apic_mode() -> None:
    """Leaving x2APIC mode converts nothing: the high half stays at 0x304, ICR2 is what it was."""
    m = booted(apicv=False)
    v = m.vcpus[0]
    v.wrmsr(0x830, fx.icr(dest=0x12345, vector=0x41))
    assert v.set_msr(0x1B, v.apic_base & ~EXTD)
    found = registers(v)
    assert (found[0x300], found[0x304], found.get(0x310, 0)) == (0x41, 0x12345, 0)


@pytest.mark.parametrize("vendor", ["vmx", "svm"])
def test_set_lapic_takes_the_icr_from_its_two_registers(vendor: str) -> None:
    """In x2APIC mode the high half comes from 0x310, whatever 0x304 says; busy and reserved bits can be stuffed."""
    v = booted(vendor=vendor).vcpus[0]
    v.set_lapic(page_with(v, x300=0xFFF3_3041, x304=0xAAAA, x310=0x77))
    assert v.get_msr(0x830) == 0x77_FFF3_3041
    assert registers(v)[0x304] == (0xAAAA if vendor == "svm" else 0x77)


def test_set_lapic_masks_nothing() -> None:
    """Whatever user space sets comes back, but for VERSION, PPR and the current timer count."""
    m = xapic()
    v = m.vcpus[0]
    odd = {"xd0": 0x1234_5678, "xe0": 0x0F0F_0F0F, "xf0": 0xFFFF_F1FF, "x280": 0x55, "x350": 0xFFFF_FFFF, "x3e0": 0xFF}
    v.set_lapic(page_with(v, **odd, x30=0xDEAD, x90=0x11, xa0=0x99, x300=0x1041, x390=77))
    found = registers(v)
    assert {f"x{offset:x}": found[offset] for offset in (0xD0, 0xE0, 0xF0, 0x280, 0x350, 0x3E0)} == odd
    assert (found[0x30], found[0x90], found[0x300]) == (0x50014, 0x11, 0x1041)
    assert not {0xA0, 0x390} & set(found)


@pytest.mark.parametrize("api", [0, 1])
def test_x2apic_id_in_the_page(api: int) -> None:
    """With 32-bit ids the page must name the id; without, it shows id << 24 and may say anything. LDR is forced."""
    m = booted(x2apic_api=api)
    v = m.vcpus[1]
    assert registers(v)[0x20] == (1 if api else 1 << 24)
    wrong = page_with(v, x20=0x55, xd0=0x66, xf0=0x0FF, x80=0x44)
    if api:
        with pytest.raises(ValueError, match="id 0x55 in the page is not the vCPU's id 0x1") as caught:
            v.set_lapic(wrong)
        assert "\n" not in str(caught.value)
        assert v.get_msr(0x80F) == 0xFF, "SVR is applied although the call fails"
        assert v.get_msr(0x808) == 0
    else:
        v.set_lapic(wrong)
        assert (v.get_msr(0x802), v.get_msr(0x80D), v.get_msr(0x808)) == (1, 2, 0x44)
    assert v.set_msr(0x832, 0xEC)
    assert v.get_msr(0x832) == 0x100EC, "software-disabled either way, so the LVT stays masked"


@pytest.mark.parametrize("apicv", [True, False])
def test_set_lapic_computes_ppr_with_the_old_isr_count(apicv: bool) -> None:
    """Without APICv an ISR that was empty hides the new bits from PPR until the next look; with APICv it never does."""
    v = xapic(apicv).vcpus[0]
    v.set_lapic(page_with(v, x80=0x21, x120=1 << 0x11))
    assert registers(v)[0xA0] == (0x50 if apicv else 0x21)
    assert v.mmio_read(0xA0) == 0x50
    assert registers(v)[0xA0] == 0x50


def test_set_lapic_may_use_a_stale_isr_cache() -> None:
    """With a vector in service before, its cached number stands for the new bits."""
    m = xapic()
    v = m.vcpus[0]
    m.signal_msi(0xFEE0_0000, 0x91)
    assert v.ack() == 0x91
    v.set_lapic(page_with(v, x140=0, x120=1 << 0x11))
    assert registers(v)[0xA0] == 0x90
    assert v.mmio_read(0xA0) == 0x50


def test_get_lapic_does_not_refresh_ppr() -> None:
    """KVM_GET_LAPIC shows PPR as it was stored last."""
    v = xapic().vcpus[0]
    v.set_lapic(page_with(v, x120=1 << 0x11))
    assert 0xA0 not in registers(v)
    assert 0xA0 not in registers(v)
    v.mmio_read(0xA0)
    assert registers(v)[0xA0] == 0x50


def test_set_lapic_brings_interrupts() -> None:
    """IRR bits of the page are pending, ISR bits are in service, and each EOI takes the highest."""
    v = xapic().vcpus[0]
    v.set_lapic(page_with(v, x210=1 << 5, x270=1 << 31, x140=1, x160=1))
    assert v.pending() == 0xFF
    assert v.ack() == 0xFF
    assert [v.eoi() for _ in range(4)] == [0xFF, 0xC0, 0x80, None]
    assert v.pending() == 0x25


@pytest.mark.parametrize(("tpr", "isr", "ppr"), [(0x21, 0x51, 0x50), (0x51, 0x51, 0x51), (0x5F, 0x20, 0x5F), (0, 0, 0)])
def test_ppr(tpr: int, isr: int, ppr: int) -> None:
    """PPR is TPR with its low nibble when its class is at least ISR's, otherwise ISR's class alone."""
    v = xapic().vcpus[0]
    if isr:
        v.set_lapic(page_with(v, **{f"x{0x100 + isr // 32 * 16:x}": 1 << isr % 32}))
    v.mmio_write(0x80, tpr)
    assert v.mmio_read(0xA0) == ppr


@pytest.mark.parametrize(("vector", "tpr", "pending"), [(0x2F, 0x23, None), (0x30, 0x2F, 0x30), (0xFF, 0xF0, None)])
def test_class_must_exceed_ppr(vector: int, tpr: int, pending: int | None) -> None:
    """A vector is deliverable when its class exceeds the whole of PPR."""
    m = xapic()
    m.vcpus[0].mmio_write(0x80, tpr)
    assert m.signal_msi(0xFEE0_0000, vector) == 1
    assert m.vcpus[0].pending() == pending


def test_software_disable() -> None:
    """Clearing SVR bit 8 masks every LVT for good and keeps IRR and ISR; nothing new is accepted meanwhile."""
    m = xapic()
    v = m.vcpus[0]
    v.mmio_write(0x320, 0xEC)
    v.mmio_write(0x360, 0x400)
    for vector in (0x91, 0x41):
        m.signal_msi(0xFEE0_0000, vector)
    assert v.ack() == 0x91
    v.mmio_write(0xF0, 0xFF)
    found = registers(v)
    assert all(found[offset] & 0x10000 for offset in LVTS)
    assert (found[0x140], found[0x220]) == (1 << 0x11, 1 << 1)
    assert (m.signal_msi(0xFEE0_0000, 0x51), v.pending()) == (0, None)
    v.mmio_write(0xF0, 0x1FF)
    assert v.mmio_read(0x320) == 0x100EC
    assert v.eoi() == 0x91
    assert v.pending() == 0x41


@pytest.mark.parametrize(
    ("start", "end", "guest"),
    [
        (EN, EN | EXTD, True),
        (EN, 0, True),
        (0, EN, True),
        (EN | EXTD, 0, True),
        (EN | EXTD, EN, False),
        (0, EN | EXTD, False),
        (EN, EXTD, None),
        (EN | EXTD, EXTD, None),
    ],
)
def test_apicbase_transitions(start: int, end: int, guest: bool | None) -> None:
    """The guest may not leave x2APIC for xAPIC nor enter it from disabled; the host may; EXTD alone nobody."""
    for host in (True, False):
        m = fx.Machine(vcpus=2)
        v = m.vcpus[1]
        assert v.set_msr(0x1B, 0xFEE0_0000 | start)
        allowed = guest is not None and (host or guest)
        if host:
            assert v.set_msr(0x1B, 0xFEE0_0000 | end) is allowed
        else:
            assert (v.wrmsr(0x1B, 0xFEE0_0000 | end).fault is None) is allowed
        assert v.apic_base == 0xFEE0_0000 | (end if allowed else start)


@pytest.mark.parametrize(
    ("bits", "allowed"), [(1, False), (1 << 9, False), (BSP, True), (1 << 47, True), (1 << 48, False)]
)
def test_apicbase_bits(bits: int, allowed: bool) -> None:
    """BSP and the address may change; reserved bits and address bits beyond MAXPHYADDR may not."""
    v = fx.Machine(vcpus=2, maxphyaddr=48).vcpus[1]
    assert v.set_msr(0x1B, 0xFEE0_0800 | bits) is allowed
    assert v.set_msr(0x1B, v.apic_base), "the value that is there always passes"


def test_ids_over_mode_changes() -> None:
    """Leaving x2APIC restores the xAPIC ID and keeps the x2APIC LDR; enabling forgets an ID that the guest wrote."""
    m = xapic()
    v = m.vcpus[1]
    v.mmio_write(0x20, 9 << 24)
    v.set_msr(0x1B, 0xFEE0_0000)
    assert registers(v)[0x20] == 9 << 24
    v.set_msr(0x1B, 0xFEE0_0800)
    assert registers(v)[0x20] == 1 << 24
    v.set_msr(0x1B, 0xFEE0_0C00)
    v.set_msr(0x1B, 0xFEE0_0800)
    assert (registers(v)[0x20], registers(v)[0xD0]) == (1 << 24, 2)
    assert registers(v)[0xF0] == 0x1FF, "no transition resets a register"


def test_lint0_counts_as_watchdog() -> None:
    """LINT0 with NMI delivery, unmasked, counts as NMI watchdog; the raw value decides."""
    v = xapic().vcpus[0]
    counted = v.own + L.K_LINT0_NMI
    for value, expected in ((0x400, 1), (0x10400, 0), (0x700, 0), (0x4F0, 1)):
        v.mmio_write(0x350, value)
        assert v.machine.mem[counted] == expected
