"""Who is meant by a destination, with the APIC map and without it: traps 14-26."""

from __future__ import annotations

import pytest

import fastexit as fx
from apics import ICR, LOWEST, NMI, SVR, alias, machine, msi, nmis, receivers, to_x2apic, xapic_ipi
from fastexit import regs as r
from fastexit.profile import since

USE_32BIT_IDS, NO_QUIRK = fx.X2ApicApi.USE_32BIT_IDS, fx.X2ApicApi.DISABLE_BROADCAST_QUIRK
MAPPED, SCANNED = 0, -1
"""What an interrupt for nobody returns: found out by the map, or by the scan of all vCPUs."""


def mixed(*x2apics: int, xapics: tuple[int, ...], **options: int) -> fx.Machine:
    """vCPUs by id: first those in x2APIC mode, then xAPICs."""
    m = machine(*x2apics, *xapics, x2apic=False, **options)
    for v in m.vcpus[: len(x2apics)]:
        to_x2apic(v)
    return m


def x2apic_ipi(v: fx.Vcpu, dest: int, vector: int, **fields: int) -> fx.Outcome:
    return v.wrmsr(ICR, fx.icr(dest=dest, vector=vector, **fields))


def test_trap_14_the_senders_mode_decodes() -> None:
    """An xAPIC's ICR2 holds the destination in its top byte, also for an x2APIC target; an x2APIC's uses 32 bits."""
    m = mixed(5, xapics=(0, 6))
    x2apic, xapic, _ = m.vcpus
    assert xapic_ipi(xapic, 5, 0x41).accepted == 1
    assert receivers(m, 0x41) == {5}
    assert x2apic_ipi(x2apic, 6, 0x42).accepted == 1
    assert receivers(m, 0x42) == {6}
    assert x2apic_ipi(x2apic, 6 << 24, 0x43).accepted == 0


def test_trap_14_the_targets_mode_matches() -> None:
    """One logical destination means another set to each kind of target: LDR's low word there, its top byte here."""
    m = mixed(0, 1, 2, xapics=(5, 6, 7))
    for v, ldr in zip(m.vcpus[3:], (0x02, 0x01, 0x06), strict=True):
        v.mmio_write(r.APIC_LDR, ldr << 24)
    assert x2apic_ipi(m.vcpus[0], 0x02, 0x41, logical=True).accepted == 3
    assert receivers(m, 0x41) == {1, 5, 7}
    xapic_ipi(m.vcpus[3], 0x02, 0x842)
    assert receivers(m, 0x42) == {1, 5, 7}


def test_trap_15_0xff_of_an_xapic_means_xapics() -> None:
    """Physical 0xFF from an xAPIC: every xAPIC, and the x2APIC whose id it is; no other x2APIC."""
    m = mixed(2, 255, xapics=(0, 1))
    assert xapic_ipi(m.vcpus[2], 0xFF, 0x41).accepted == 3
    assert receivers(m, 0x41) == {0, 1, 255}


@pytest.mark.parametrize("quirk", [True, False])
def test_trap_16_msi_0xff_reaches_x2apics(quirk: bool) -> None:
    """A message has no sender: 0xFF is everybody, unless the quirk is off; then it is the id 255."""
    m = machine(0, 1, 255, x2apic_api=0 if quirk else NO_QUIRK)
    assert msi(m, 0xFF, 0x41) == (3 if quirk else 1)
    assert receivers(m, 0x41) == ({0, 1, 255} if quirk else {255})


def test_trap_16_an_x2apic_sender_means_255() -> None:
    """The quirk is for messages: an IPI of an x2APIC to 0xFF is unicast to the id 255, to 0xFFFFFFFF for everybody."""
    m = machine(0, 1, 255)
    out = x2apic_ipi(m.vcpus[0], 0xFF, 0x41)
    assert (out.accepted, out.path) == (1, fx.Path.FAST)
    out = x2apic_ipi(m.vcpus[0], 0xFFFF_FFFF, 0x42)
    assert (out.accepted, out.path) == (3, fx.Path.SLOW)
    assert (receivers(m, 0x41), receivers(m, 0x42)) == ({255}, {0, 1, 255})


def test_trap_17_quirk_disabled_0xff_is_still_broadcast() -> None:
    """Quirk off, but nobody votes for x2APIC logical mode: the resolver takes 0xFF for a broadcast and leaves it to
    the scan, where it is nobody's; with one software-enabled x2APIC the map answers."""
    m = machine(0, 1, x2apic_api=NO_QUIRK)
    assert msi(m, 0xFF, 0, NMI) == MAPPED
    assert x2apic_ipi(m.vcpus[0], 0xFF, 0x41).refusal is fx.Refusal.NONE
    for v in m.vcpus:
        v.set_msr(SVR, 0xFF)
    assert msi(m, 0xFF, 0, NMI) == SCANNED
    assert x2apic_ipi(m.vcpus[0], 0xFF, 0x41).refusal is fx.Refusal.BROADCAST
    assert nmis(m) == set()


def test_trap_17_xapics_are_reached() -> None:
    """Quirk off among xAPICs: 0xFF remains everybody, software-enabled or not."""
    m = machine(0, 1, x2apic=False, x2apic_api=NO_QUIRK)
    assert msi(m, 0xFF, 0x41) == 2
    for v in m.vcpus:
        v.mmio_write(r.APIC_SPIV, 0xFF)
    assert msi(m, 0xFF, 0, NMI) == 2


@pytest.mark.parametrize("api", [0, USE_32BIT_IDS])
def test_trap_18_an_xapic_is_known_by_its_long_id(api: int) -> None:
    """A destination above 255 finds an APIC that is not in x2APIC mode yet: by the map with 32-bit ids; by the scan
    always. The map without them knows only the id register's eight bits."""
    m = mixed(0, 1, xapics=(300,), x2apic_api=api)
    out = x2apic_ipi(m.vcpus[0], 300, 0x41)
    assert (out.path, out.accepted) == (fx.Path.FAST, 1 if api else 0)
    assert x2apic_ipi(m.vcpus[0], 300 & 0xFF, 0x42).accepted == 1, "by the id register"

    m = mixed(0, 1, xapics=(44, 300))
    out = x2apic_ipi(m.vcpus[0], 300, 0x41)
    assert (out.path, out.refusal, out.accepted) == (fx.Path.SLOW, fx.Refusal.NO_APIC_MAP, 1)
    assert receivers(m, 0x41) == {300}
    assert x2apic_ipi(m.vcpus[0], 44, 0x42).accepted == 2
    assert receivers(m, 0x42) == {44, 300}


def test_trap_19_an_alias_drops_the_map() -> None:
    """Without 32-bit ids two equal ids leave no map at all: even destinations that are unique are scanned for."""
    m = machine(x2apic=False)
    alias(m, 2, 1)
    assert (msi(m, 9, 0x41), msi(m, 1, 0x42)) == (SCANNED, 2)
    assert receivers(m, 0x42) == {1, 2}
    alias(m, 2, 2)
    assert (msi(m, 9, 0x41), msi(m, 1, 0x43)) == (MAPPED, 1), "a new id, a new map"


def test_trap_19_with_32_bit_ids_the_first_xapic_wins() -> None:
    """With 32-bit ids an alias is not even noticed; the xAPIC created first has the slot."""
    m = machine(x2apic=False, x2apic_api=USE_32BIT_IDS)
    alias(m, 2, 1)
    assert (msi(m, 9, 0x41), msi(m, 1, 0x42)) == (MAPPED, 1)
    assert receivers(m, 0x42) == {1}


@pytest.mark.parametrize("order", [(7, 2), (2, 7)])
def test_trap_19_with_32_bit_ids_an_x2apic_beats_an_xapic(order: tuple[int, int]) -> None:
    """An x2APIC takes its slot from any xAPIC that calls itself so, created before or after it."""
    m = machine(0, *order, x2apic=False, x2apic_api=USE_32BIT_IDS)
    xapic, x2apic = (m.vcpus[1 + order.index(n)] for n in (7, 2))
    xapic.mmio_write(r.APIC_ID, 2 << 24)
    to_x2apic(x2apic)
    assert msi(m, 2, 0x42) == 1
    assert receivers(m, 0x42) == {2}


def test_trap_20_who_votes_for_the_logical_mode() -> None:
    """A software-disabled APIC and one with LDR 0 have no vote; one vote against the others and there is no mode."""
    m = machine(x2apic=False)
    _, flat, odd = m.vcpus
    flat.mmio_write(r.APIC_LDR, 0x02 << 24)
    odd.mmio_write(r.APIC_DFR, 0)
    assert msi(m, 0x80, 0x41, logical=True) == MAPPED, "its LDR is 0"
    odd.mmio_write(r.APIC_SPIV, 0xFF)
    odd.mmio_write(r.APIC_LDR, 0x11 << 24)
    assert msi(m, 0x80, 0x41, logical=True) == MAPPED, "it is disabled"
    assert msi(m, 0x02, 0x42, logical=True) == 1
    odd.mmio_write(r.APIC_SPIV, 0x1FF)
    assert msi(m, 0x80, 0x41, logical=True) == SCANNED, "now it votes"
    assert msi(m, 0x80, 0x41) == MAPPED, "physical ids are not concerned"


def test_trap_20_nobody_votes() -> None:
    """Without any vote a logical destination is nobody's, though an LDR would match and take an NMI."""
    m = machine(0, 1, x2apic=False)
    m.vcpus[1].mmio_write(r.APIC_LDR, 0x02 << 24)
    m.vcpus[1].mmio_write(r.APIC_SPIV, 0xFF)
    assert (msi(m, 0x02, 0, NMI, logical=True), nmis(m)) == (0, set())


def test_trap_21_x2apic_logical_indexes_physical_ids() -> None:
    """x2APIC logical bits name slots of the physical table: an xAPIC without LDR and a disabled x2APIC are hit."""
    m = mixed(0, 2, xapics=(1,))
    m.vcpus[1].set_msr(SVR, 0xFF)
    assert x2apic_ipi(m.vcpus[0], 0b110, 0x41, logical=True).accepted == 1
    assert receivers(m, 0x41) == {1}
    assert x2apic_ipi(m.vcpus[0], 0b110, 0, logical=True, delivery=NMI).accepted == 2
    assert nmis(m) == {1, 2}


def test_trap_22_hashing_counts_empty_slots_of_the_map() -> None:
    """Four bits, three APICs, vector mod 4 = 3: the map chooses the empty slot and drops the interrupt; the scan
    counts only what matches and is enabled, vector mod 3 = 1."""
    m = machine(0, 1, 2)
    assert msi(m, 0b1111, 0x43, LOWEST, logical=True) == 0
    assert receivers(m, 0x43) == set()
    assert msi(m, 0b1111, 0x42, LOWEST, logical=True) == 1
    assert receivers(m, 0x42) == {2}

    m = mixed(0, 1, 2, xapics=(20,))
    m.vcpus[3].mmio_write(r.APIC_LDR, 0x80 << 24)
    assert msi(m, 0b1111, 0x43, LOWEST, logical=True) == 1
    assert receivers(m, 0x43) == {1}
    m.vcpus[1].set_msr(SVR, 0xFF)
    assert msi(m, 0b1111, 0x43, LOWEST, logical=True) == 1
    assert receivers(m, 0x43) == {1, 2}, "67 mod 2 = 1: the second that is enabled"


def test_trap_22_the_map_may_choose_a_disabled_apic() -> None:
    """A software-disabled x2APIC in the chosen slot refuses, and nobody else is asked."""
    m = machine(0, 1, 2)
    m.vcpus[1].set_msr(SVR, 0xFF)
    assert msi(m, 0b111, 0x43, LOWEST, logical=True) == 0
    assert receivers(m, 0x43) == set()


@pytest.mark.parametrize("hashing", [True, False])
def test_trap_23_lowest_priority_to_a_physical_id_is_that_id(hashing: bool) -> None:
    """The map asks for no priority where the destination is one id, even that of a disabled APIC, which refuses."""
    m = machine(vector_hashing=hashing)
    for vector in (0x40, 0x41, 0x42):
        assert msi(m, 1, vector, LOWEST) == 1
        assert receivers(m, vector) == {1}
    m.vcpus[1].set_msr(SVR, 0xFF)
    assert msi(m, 1, 0x43, LOWEST) == MAPPED


def test_trap_23_the_scan_chooses_among_equal_ids() -> None:
    """Without the map the same interrupt goes to one of those that match, and a disabled one is no candidate."""
    m = machine(x2apic=False)
    alias(m, 2, 1)
    assert (msi(m, 1, 0x40, LOWEST), msi(m, 1, 0x41, LOWEST)) == (1, 1)
    assert (receivers(m, 0x40), receivers(m, 0x41)) == ({1}, {2})
    for v in m.vcpus[1:]:
        v.mmio_write(r.APIC_SPIV, 0xFF)
    assert msi(m, 1, 0x42, LOWEST) == SCANNED


def test_trap_24_lowest_priority_to_all_is_fixed() -> None:
    """Physical 0xFF: DM 1 becomes a broadcast to everybody; an NMI with the hint one Fixed vector for one APIC."""
    m = machine()
    assert msi(m, 0xFF, 0x40, LOWEST) == 3
    assert receivers(m, 0x40) == {0, 1, 2}
    assert msi(m, 0xFF, 0x41, NMI, hint=True) == 1
    assert (receivers(m, 0x41), nmis(m)) == ({65 % 3}, set())
    assert msi(m, 0xFF, 0x42, NMI) == 3
    assert nmis(m) == {0, 1, 2}


@pytest.mark.parametrize("kernel", fx.profiles())
def test_trap_24_the_map_comes_first_since_5_6(kernel: str) -> None:
    """Where 0xFF is an id, the map delivers the NMI as it is; 5.4, on which the seed stands, rewrote it before."""
    m = machine(0, 255, x2apic_api=NO_QUIRK, kernel=kernel)
    assert msi(m, 0xFF, 0x41, NMI, hint=True) == 1
    rewritten = not since(kernel, "5.6")
    assert (receivers(m, 0x41), nmis(m)) == (({255}, set()) if rewritten else (set(), {255}))


def test_trap_25_nobody_is_0_or_minus_1() -> None:
    """The map's nobody is 0, the scan's is -1 (EPERM); guests see neither."""
    m = machine(x2apic=False)
    assert msi(m, 9, 0x41) == 0
    assert xapic_ipi(m.vcpus[0], 9, 0x41).accepted == 0
    alias(m, 2, 1)
    assert msi(m, 9, 0x41) == -1
    assert msi(m, 9, 0x41, LOWEST) == -1
    out = xapic_ipi(m.vcpus[0], 9, 0x41)
    assert (out.accepted, out.fault) == (-1, None)
    m.vcpus[1].mmio_write(r.APIC_SPIV, 0xFF)
    m.vcpus[2].mmio_write(r.APIC_SPIV, 0xFF)
    assert msi(m, 1, 0x41) == 0, "the scan found somebody, who refused"


def test_trap_26_a_new_vcpu_is_not_in_the_map() -> None:
    """Unicast to it is lost, NMI and INIT included, while broadcast finds it; any change of the map lets it in."""
    m = machine(0, 1)
    new = m.add_vcpu(5)
    assert (msi(m, 5, 0, NMI), x2apic_ipi(m.vcpus[0], 5, 0, delivery=5).accepted) == (0, 0)
    assert (nmis(m), new.events().latched_init) == (set(), False)
    assert msi(m, 0xFF, 0, NMI) == 3
    assert nmis(m) == {0, 1, 5}

    m.vcpus[0].set_lapic(m.vcpus[0].get_lapic())
    assert x2apic_ipi(m.vcpus[0], 5, 0, delivery=5).accepted == 1
    assert new.events().latched_init


def test_trap_26_the_vcpu_before_it_is_in() -> None:
    """Creating the next vCPU rebuilds the map with all that were there."""
    m = fx.Machine(vcpus=2, apicv=False)
    assert (msi(m, 0, 0, NMI), msi(m, 1, 0, NMI)) == (1, 0)
    m.add_vcpu(2)
    assert (msi(m, 1, 0, NMI), msi(m, 2, 0, NMI)) == (1, 0)


def test_trap_26_a_refused_vcpu_brings_in_the_one_before_it() -> None:
    """KVM_CREATE_VCPU notices that an id is taken only when the new vCPU's reset has rebuilt the map."""
    m = fx.Machine(vcpus=2, apicv=False)
    assert msi(m, 1, 0, NMI) == 0
    with pytest.raises(ValueError, match="taken"):
        m.add_vcpu(0)
    assert (len(m.vcpus), msi(m, 1, 0, NMI)) == (2, 1)


def test_flags_that_come_late_change_no_map() -> None:
    """KVM_CAP_X2APIC_API with vCPUs there: the map that aliases made impossible comes back with the next change."""
    m = fx.Machine(apic_ids=[4080, 4094, 254, 9], apicv=False)
    assert m.vcpus[0].set_msr(r.MSR_APICBASE, 0xFEE0_0C00)
    alias(m, 2, 9)
    assert msi(m, 0x55, 0x41) == -1
    m.enable_x2apic_api(r.X2API_32BIT_IDS | r.X2API_NO_BROADCAST_QUIRK)
    assert msi(m, 0x55, 0x41) == -1
    m.vcpus[0].set_lapic(m.vcpus[0].get_lapic())
    assert msi(m, 0x55, 0x41) == 0
    with pytest.raises(ValueError, match="split irqchip"):
        m.enable_x2apic_api(r.X2API_SUPPRESS_EOI)


def test_flags_about_eois_replace_each_other() -> None:
    m = fx.Machine(vcpus=1, irqchip="split", x2apic_api=r.X2API_SUPPRESS_EOI | r.X2API_32BIT_IDS)
    m.enable_x2apic_api(r.X2API_NO_SUPPRESS_EOI)
    v = m.vcpus[0]
    v.set_lapic(v.get_lapic())
    assert not int.from_bytes(v.get_lapic()[r.APIC_LVR : r.APIC_LVR + 4], "little") & r.LVR_DIRECTED_EOI
