"""What a naive IOAPIC gets wrong: pins, results, EOIs, the registers, states in and out, storms, the RTC's pin."""

from __future__ import annotations

import pytest

import fastexit as fx
from fastexit import regs as r
from irqchip_scene import (
    BROADCAST,
    EXTINT,
    INIT,
    JUDGES,
    LEVEL,
    LOGICAL,
    MASKED,
    NMI,
    POLARITY,
    REMOTE_IRR,
    RES3,
    SMI,
    STATUS,
    scene,
)

PIN, OTHER, RTC = 17, 19, 8
"""The first two have no PIC behind them."""
VECTOR = 0x41
pytestmark = pytest.mark.parametrize("judge", JUDGES)


def test_trap_01_polarity_is_not_looked_at(judge: str) -> None:
    with scene(judge) as s:
        s.entry(PIN, VECTOR | POLARITY)
        assert s.line(PIN, 1) == 1
        assert s.waits() == {VECTOR}
        assert s.read(0x10 + 2 * PIN) == VECTOR | POLARITY


def test_trap_02_a_down_always_counts(judge: str) -> None:
    with scene(judge) as s:
        assert s.line(PIN, 0) == 1
        assert s.line(4, 0) == 2  # the PIC's pin says 1, too


def test_trap_03_remote_irr_is_set_if_anybody_took_it(judge: str) -> None:
    with scene(judge) as s:
        s.entry(PIN, VECTOR | LEVEL, dest=9)
        assert s.line(PIN, 1) == 0
        assert not s.remote_irr(PIN)
        s.entry(OTHER, VECTOR | LEVEL)
        assert s.line(OTHER, 1) == 1
        assert s.remote_irr(OTHER)


def test_trap_04_a_level_pin_that_is_up_is_serviced_again(judge: str) -> None:
    with scene(judge) as s:
        s.entry(PIN, VECTOR | LEVEL)
        assert s.line(PIN, 1) == 1
        assert s.line(PIN, 1) == -1  # it waits for an EOI
        s.put(irr=0, entries={PIN: VECTOR | LEVEL})
        assert s.line(PIN, 1) == 1


def test_traps_05_06_a_delivered_edge_is_hidden_until_the_next_up(judge: str) -> None:
    with scene(judge) as s:
        s.entry(PIN, VECTOR)
        assert s.line(PIN, 1) == 1
        assert s.chip["irr"] == 0
        assert s.line(PIN, 1) == 0
        assert s.chip["irr"] == 1 << PIN
        s.page()
        s.put()
        assert s.waits() == {VECTOR}
        assert s.chip["irr"] == 0


@pytest.mark.parametrize("status", [True, False])
def test_trap_07_the_rtc_coalesces_with_line_status_alone(judge: str, status: bool) -> None:
    with scene(judge) as s:
        s.entry(RTC, VECTOR)
        s.line(RTC, 1)
        s.line(RTC, 0)
        s.page()
        s.put(irr=0)
        s.line(RTC, 1)
        s.line(RTC, 0)
        s.page(isr=(VECTOR,))
        s.line(RTC, 1, status=status)
        assert s.waits() == (set() if status else {VECTOR})


def test_trap_08_the_rtc_waits_for_every_vcpu(judge: str) -> None:
    with scene(judge) as s:
        s.entry(RTC, VECTOR, dest=BROADCAST)
        s.run(0)
        s.run(1)
        assert s.pulse(RTC) == 3  # the PIC's pin and two vCPUs
        for i in range(2):
            s.serve(i)
        assert s.pulse(RTC) == 0  # at the PIC's pin, too, for nobody has acknowledged
        s.eoi(0)
        assert s.pulse(RTC) == 0
        s.eoi(1)
        assert s.pulse(RTC) == 2


def test_trap_09_set_irqchip_rebuilds_the_rtcs_state(judge: str) -> None:
    with scene(judge) as s:
        s.entry(RTC, VECTOR)
        s.page(isr=(VECTOR,))
        s.put()
        assert s.pulse(RTC) == 1  # the PIC's: the vCPU still has the vector
        assert s.waits() == set()


def test_trap_12_an_eoi_acknowledges_edges_too(judge: str) -> None:
    with scene(judge) as s:
        s.entry(PIN, VECTOR)
        s.entry(OTHER, VECTOR | LEVEL)
        s.run()
        s.do("irqfd", 1, PIN, True)
        s.do("irqfd_signal", 1, 1)
        s.run()
        s.serve()
        s.eoi()
        assert s.model_irqfds[1].resampled == 1


def test_trap_13_an_eois_trigger_mode_is_tmrs(judge: str) -> None:
    with scene(judge) as s:
        s.entry(PIN, VECTOR | LEVEL)
        s.run()
        s.line(PIN, 1)
        s.do("signal_msi", 0xFEE0_0000, VECTOR)  # an edge: TMR is clear now
        assert s.do("take", 0) == VECTOR
        if judge == "plain":
            s.do("wrmsr", 0, 0x80B, 0)
        assert s.remote_irr(PIN)


def test_trap_14_svr_bit_12_counts_in_a_full_irqchip(judge: str) -> None:
    with scene(judge) as s:
        s.entry(PIN, VECTOR | LEVEL)
        s.line(PIN, 1)
        s.page(isr=(VECTOR,), SPIV=0x11FF)
        s.run()
        s.eoi()
        assert s.remote_irr(PIN)
        s.page(isr=(VECTOR,), SPIV=0x1FF)
        s.run()
        s.eoi()
        assert s.remote_irr(PIN)  # delivered again, for the line is up
        assert s.waits() == {VECTOR}


def test_trap_23_an_entry_that_becomes_edge_loses_remote_irr(judge: str) -> None:
    with scene(judge) as s:
        s.entry(PIN, VECTOR | LEVEL)
        s.line(PIN, 1)
        s.write(0x10 + 2 * PIN, VECTOR)
        assert not s.remote_irr(PIN)


def test_trap_24_status_and_remote_irr_are_not_the_guests(judge: str) -> None:
    with scene(judge) as s:
        s.entry(PIN, VECTOR | LEVEL | MASKED | STATUS | REMOTE_IRR)
        assert s.read(0x10 + 2 * PIN) == VECTOR | LEVEL | MASKED
        s.put(entries={PIN: VECTOR | LEVEL | MASKED | STATUS | REMOTE_IRR})
        s.write(0x10 + 2 * PIN, VECTOR | LEVEL | MASKED)
        assert s.read(0x10 + 2 * PIN) == VECTOR | LEVEL | MASKED | STATUS | REMOTE_IRR


def test_trap_25_a_pending_edge_is_not_delivered_by_unmasking(judge: str) -> None:
    with scene(judge) as s:
        s.entry(PIN, VECTOR | MASKED)
        assert s.line(PIN, 1) == -1
        s.write(0x10 + 2 * PIN, VECTOR)
        assert s.waits() == set()
        assert s.line(PIN, 1) == 0
        s.line(PIN, 0)
        assert s.line(PIN, 1) == 1


def test_trap_26_unmasking_asks_a_resampler(judge: str) -> None:
    with scene(judge) as s:
        s.do("irqfd", 1, PIN, True)
        s.entry(PIN, VECTOR | LEVEL | MASKED)
        s.line(PIN, 1)
        s.write(0x10 + 2 * PIN, VECTOR | LEVEL)
        assert s.waits() == set()
        assert s.chip["irr"] == 0
        assert s.model_irqfds[1].resampled == 1
        assert s.line(PIN, 1) == 1  # user space holds it up all the time


def test_trap_27_a_base_that_moved_answers_nowhere(judge: str) -> None:
    with scene(judge) as s:
        s.put(base=0xFEC0_1000)
        for gpa in (0xFEC0_0000, 0xFEC0_1000):
            s.do("mem_read", 0, gpa, 4)
            assert [access.address for access in s.result[2]] == [gpa]


def test_trap_28_other_registers_are_all_ones(judge: str) -> None:
    with scene(judge) as s:
        for index in (3, 15, 0x40, 0xFF):
            assert s.read(index) == 0xFFFF_FFFF
            s.write(index, 0)
        assert s.read(0x10) == MASKED


def test_trap_29_a_byte_replaces_the_register(judge: str) -> None:
    with scene(judge) as s:
        s.entry(PIN, VECTOR | LEVEL | MASKED)
        s.write(0x10 + 2 * PIN, 0x55, 1)
        assert s.read(0x10 + 2 * PIN) == 0x55


def test_trap_30_an_id_of_four_bits(judge: str) -> None:
    with scene(judge) as s:
        s.write(0, 0xFF00_0000)
        assert s.chip["id"] == 15
        s.put(id=0x1234_5678)
        assert s.chip["id"] == 0x1234_5678
        assert s.read(0) == s.read(2) == 0x0800_0000


def test_trap_31_no_eoi_register(judge: str) -> None:
    with scene(judge) as s:
        assert s.read(1) == 0x0017_0011
        s.entry(PIN, VECTOR | LEVEL)
        s.line(PIN, 1)
        s.do("mem_write", 0, 0xFEC0_0040, VECTOR, 4)
        assert s.remote_irr(PIN)
        assert s.do("mem_read", 0, 0xFEC0_0040, 4) == 0


@pytest.mark.parametrize("mode", [EXTINT, SMI])
def test_traps_49_51_extint_reaches_nobody_and_is_told_as_coalesced(judge: str, mode: int) -> None:
    if judge == "kvm":
        pytest.skip("trace lines of the kernel take root, and fastexit verify --trace compares them")
    with scene(judge, traced=True) as s:
        s.entry(PIN, VECTOR | LEVEL | mode)
        for _ in range(2):
            assert s.line(PIN, 1) == 0
            assert not s.remote_irr(PIN)
        assert s.model_lines()[-1].endswith("(coalesced)")


def test_modes_that_are_accepted_set_remote_irr(judge: str) -> None:
    with scene(judge, 3) as s:
        for pin, mode in ((16, NMI), (PIN, RES3), (18, INIT)):
            s.entry(pin, VECTOR | LEVEL | mode, dest=2)
            assert s.line(pin, 1) == 1
            assert s.remote_irr(pin)


def test_trap_50_lines_survive_set_irqchip(judge: str) -> None:
    with scene(judge) as s:
        s.do("irqfd", 1, PIN, True)
        s.entry(PIN, VECTOR | LEVEL | MASKED)
        s.do("irqfd_signal", 1, 1)
        s.put(irr=0)
        s.line(PIN, 0)
        assert s.chip["irr"] == 1 << PIN  # the other source holds it


def test_traps_52_53_a_storm_is_counted_by_eois(judge: str) -> None:
    """10,000 in a row, whatever happens in between; then silence until the delayed work runs."""
    if judge == "kvm":
        pytest.skip("the library alone: 10,000 EOIs")
    m = fx.Machine(vcpus=1, apicv=False)
    m.boot_x2apic()
    v = m.vcpus[0]
    for index, value in ((0x11 + 2 * PIN, 0), (0x10 + 2 * PIN, VECTOR | LEVEL)):
        v.mem_write(0xFEC0_0000, index)
        v.mem_write(0xFEC0_0010, value)
    assert m.irq_line(PIN, 1) == 1
    for n in range(10_000):
        assert v.ack() == VECTOR, n
        v.wrmsr(0x80B, 0)
        if n == 5_000:
            m.set_irqchip(2, m.get_irqchip(2))
            for mask in (MASKED, 0):
                v.mem_write(0xFEC0_0010, VECTOR | LEVEL | mask)
    assert v.pending() is None
    assert m.next_timer() is not None
    m.set_time(m.next_timer() or 0)
    assert v.pending() == VECTOR


def test_trap_54_a_redelivery_has_an_accept_line_alone(judge: str) -> None:
    if judge == "kvm":
        pytest.skip("trace lines of the kernel take root, and fastexit verify --trace compares them")
    with scene(judge, traced=True) as s:
        s.entry(PIN, VECTOR | LEVEL)
        s.line(PIN, 1)
        s.serve()
        s.run()
        s.eoi()
        assert [line.partition(":")[0] for line in s.model_lines()] == [
            *("kvm_apic", "kvm_eoi", "kvm_ack_irq", "kvm_apic_accept_irq"),
        ]


def test_trap_66_states_leave_things_out(judge: str) -> None:
    """Delivered edges and who holds lines up are in no state: SET of what GET gave is not nothing."""
    with scene(judge) as s:
        s.entry(PIN, VECTOR)
        s.line(PIN, 1)
        s.put()
        assert s.line(PIN, 1) == 1  # the edge is forgotten
        s.entry(OTHER, VECTOR | LEVEL | MASKED)
        s.line(OTHER, 1)
        assert s.chip["irr"] == 1 << OTHER


def test_trap_67_an_eoi_is_for_every_pin_with_the_vector(judge: str) -> None:
    with scene(judge) as s:
        s.entry(PIN, VECTOR | LEVEL)
        s.entry(OTHER, VECTOR | LEVEL, dest=1)
        s.entry(18, VECTOR, dest=1)
        for pin in (PIN, OTHER, 18):
            s.line(pin, 1)
        s.line(OTHER, 0)
        s.page(1)
        s.serve(0)
        s.run(0)
        s.eoi(0)
        assert not s.remote_irr(OTHER)  # another vCPU's
        assert s.remote_irr(PIN)  # delivered again
        assert s.waits(1) == {VECTOR}  # a held edge, again


@pytest.mark.parametrize("logical", [0, LOGICAL])
def test_everybody_counts(judge: str, logical: int) -> None:
    with scene(judge, 3) as s:
        s.entry(PIN, VECTOR | logical, dest=BROADCAST)
        assert s.line(PIN, 1) == 3
        assert all(s.waits(i) == {VECTOR} for i in range(3))
        assert r.XAPIC_BROADCAST == BROADCAST
