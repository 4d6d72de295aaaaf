"""Profile ``sdm``: a local APIC by the manual, no kernel. docs/lenient.md has the rules beside KVM's."""

from __future__ import annotations

import numpy as np
import pytest

import fastexit as fx
from fastexit import cli
from fastexit import layout as L
from fastexit import regs as R
from fastexit.exits.table import VMX
from fastexit.jit import declare
from fastexit.kernels import manual
from fastexit.profile import NEWEST, PROFILES, SDM, numbered, since
from fastexit.reasons import VmxExit
from fastexit.releases import generation, has_fast_path, numbers
from fastexit.traits import Trait

ESR, ICR, SELF_IPI, LVTT, LVTERR = 0x828, 0x830, 0x83F, 0x832, 0x837
STRICT = Trait.RESERVED_BITS_GP | Trait.STATUS_READ_ONLY | Trait.ERRORS_LOGGED | Trait.ENABLED_RESET
SEND, RECEIVE, ADDRESS = R.ESR_SEND_ILLEGAL, R.ESR_RECEIVE_ILLEGAL, R.ESR_ILLEGAL_REGISTER


def machine(vcpus: int = 2, *, x2apic: bool = True, **settings: object) -> fx.Machine:
    m = fx.Machine(vcpus=vcpus, **{"kernel": "sdm", "apicv": False, "threads": False} | settings)
    for v in m.vcpus:
        v.set_mp_state(R.MP_RUNNABLE)
        if not x2apic:
            v.mmio_write(R.APIC_SPIV, 0x1FF)
    if x2apic:
        m.boot_x2apic()
    return m


def errors(v: fx.Vcpu) -> int:
    """ESR behind a write of it."""
    assert v.wrmsr(ESR, 0).fault is None
    return v.rdmsr(ESR)


# ---------------------------------------------------------------------------------------------------------- the profile


def test_it_is_no_kernel() -> None:
    assert "sdm" not in fx.profiles()
    assert generation("sdm") is SDM
    assert numbered(SDM.number) is SDM
    assert not any(known.traits & STRICT for known in PROFILES.values())
    assert SDM.traits & STRICT == STRICT
    assert since("sdm", NEWEST)
    assert since(NEWEST, "sdm")
    assert numbers("sdm") == numbers(NEWEST)
    assert not has_fast_path("sdm")
    m = machine()
    assert (m.kernel, m.release) == ("sdm", "sdm")
    with pytest.raises(ValueError, match="no fast path"):
        m.fastpath = True
    m.fastpath = False


def test_it_cannot_be_walked_or_reported(capsys: pytest.CaptureFixture[str]) -> None:
    """Commands about kernels know kernels."""
    with pytest.raises(SystemExit):
        cli.main(["walk", "--kernels", "sdm"])
    assert "unknown kernel 'sdm'" in capsys.readouterr().err


def test_a_snapshot_is_the_manuals_again() -> None:
    m = machine()
    m.vcpus[0].wrmsr(ICR, fx.icr(dest=1, vector=3))
    again = fx.Machine.restore(m.snapshot())
    assert again.kernel == "sdm"
    assert [errors(v) for v in again.vcpus] == [SEND, RECEIVE]


@pytest.mark.parametrize("vendor", ["vmx", "svm"])
@pytest.mark.parametrize("threads", [False, True])
@pytest.mark.parametrize("dispatcher", ["python", "compiled"])
def test_rules_go_by_no_vendor_or_door(vendor: str, threads: bool, dispatcher: str) -> None:
    m = machine(vendor=vendor, threads=threads, dispatcher=dispatcher)
    v, w = m.vcpus
    assert v.wrmsr(0x80F, 0x3FF).fault == fx.Fault.GP
    assert v.wrmsr(ICR, fx.icr(dest=1, vector=9)).accepted == 0
    assert w.pending() is None
    assert (errors(v), errors(w)) == (SEND, RECEIVE)


def test_a_batch_has_them() -> None:
    """The fast path is off, and the short way of an IPI declines."""
    m = machine(apicv=True)
    exits = np.zeros(2, dtype=fx.EXIT)
    exits["reason"], exits["msr"], exits["value"] = VmxExit.MSR_WRITE, ICR, fx.icr(dest=1, vector=5)
    outcomes = m.run(exits)
    assert set(outcomes["path"]) == {fx.Path.SLOW}
    assert VMX[VmxExit.MSR_WRITE].length == R.INSN_LEN_WRMSR
    assert [errors(v) for v in m.vcpus] == [SEND, RECEIVE]
    assert declare.load("possible")(m.handle) == 0 if hasattr(m, "possible") else True


# -------------------------------------------------------------------------------------------------------- reserved bits

MAY: dict[int, int] = {
    R.APIC_TASKPRI: 0xFF,
    R.APIC_EOI: 0,
    R.APIC_SPIV: 0x1FF,
    R.APIC_ESR: 0,
    R.APIC_ICR: 0xFFFF_FFFF_000C_CFFF,
    R.APIC_LVTT: 0x7_10FF,
    R.APIC_LVTTHMR: 0x1_17FF,
    R.APIC_LVTPC: 0x1_17FF,
    R.APIC_LVT0: 0x1_F7FF,
    R.APIC_LVT1: 0x1_F7FF,
    R.APIC_LVTERR: 0x1_10FF,
    R.APIC_TMICT: 0xFFFF_FFFF,
    R.APIC_TDCR: 0xB,
    R.APIC_SELF_IPI: 0xFF,
}
"""Bits of x2APIC registers that may be set, read out of the manual's figures; read-only ones may, too."""


@pytest.mark.parametrize("offset", MAY, ids=lambda offset: R.REGISTER_NAMES[offset])
def test_every_other_bit_faults(offset: int) -> None:
    m = machine(1, irqchip="full")
    v = m.vcpus[0]
    for bit in range(64):
        faults = v.wrmsr(R.MSR_X2APIC_BASE + (offset >> 4), 1 << bit).fault is not None
        assert faults != bool(MAY[offset] >> bit & 1), bit


def test_a_directed_eoi_goes_by_the_version_register() -> None:
    """SVR bit 12 is there where LVR says so: with user space's IOAPIC."""
    for irqchip, fault in (("full", fx.Fault.GP), ("split", None)):
        v = machine(1, irqchip=irqchip).vcpus[0]
        assert v.wrmsr(0x80F, 0x11FF).fault == fault
    v = machine(1, tsc_deadline=False).vcpus[0]
    assert v.wrmsr(LVTT, R.LVT_TIMER_DEADLINE | 0x41).fault == fx.Fault.GP


def test_what_faults_does_nothing() -> None:
    m = machine()
    v, w = m.vcpus
    v.wrmsr(SELF_IPI, 0x41)
    v.ack()
    before = [one.get_lapic() for one in m.vcpus]
    for msr, value in (
        (0x80B, 1),
        (0x80F, 0x2FF),
        (0x808, 0x1FF),
        (ICR, 1 << 32 | 0x1041),
        (SELF_IPI, 0x141),
        (ESR, 1),
    ):
        assert v.wrmsr(msr, value).fault == fx.Fault.GP
    assert [one.get_lapic() for one in m.vcpus] == before
    assert w.pending() is None


def test_the_host_is_held_to_them_too() -> None:
    v = machine(1).vcpus[0]
    assert not v.set_msr(0x80F, 0x3FF)
    assert v.set_msr(0x80F, 0x1FF)


def test_status_bits_are_the_apics() -> None:
    v = machine(1).vcpus[0]
    for msr in (*range(0x832, 0x838),):
        assert v.wrmsr(msr, 0x10FF).fault is None
        assert v.rdmsr(msr) == 0xFF
    assert v.wrmsr(0x835, 0xC7FF).fault is None
    assert v.rdmsr(0x835) == 0x87FF


# --------------------------------------------------------------------------------------------------------------- errors


def test_a_write_shows_and_clears() -> None:
    v = machine(1).vcpus[0]
    v.wrmsr(SELF_IPI, 5)
    assert v.rdmsr(ESR) == 0  # nothing has been written yet
    assert errors(v) == SEND | RECEIVE
    assert v.rdmsr(ESR) == SEND | RECEIVE  # and stays
    v.wrmsr(ICR, fx.icr(dest=77, vector=5))
    assert v.rdmsr(ESR) == SEND | RECEIVE
    assert errors(v) == SEND  # nobody is there to receive it
    assert errors(v) == 0


def test_only_the_first_error_interrupts() -> None:
    v = machine(1).vcpus[0]
    v.wrmsr(LVTERR, 0xE1)
    v.wrmsr(SELF_IPI, 5)
    assert v.ack() == 0xE1
    v.wrmsr(0x80B, 0)
    v.wrmsr(SELF_IPI, 5)
    assert v.pending() is None
    assert errors(v) == SEND | RECEIVE
    v.wrmsr(SELF_IPI, 5)
    assert v.pending() == 0xE1


def test_a_masked_entry_logs_all_the_same() -> None:
    v = machine(1).vcpus[0]
    v.wrmsr(LVTERR, 0x100E1)
    v.wrmsr(SELF_IPI, 5)
    assert v.pending() is None
    assert errors(v) == SEND | RECEIVE


def test_an_error_interrupt_may_be_an_error() -> None:
    v = machine(1).vcpus[0]
    v.wrmsr(LVTERR, 5)
    v.wrmsr(ICR, fx.icr(dest=77, vector=5))
    assert errors(v) == SEND | RECEIVE
    assert v.pending() is None


def test_messages_have_no_sender() -> None:
    m = machine(3)
    m.vcpus[2].wrmsr(0x80F, 0xFF)  # hears nothing
    assert m.signal_msi(0xFEE0_1000, 5) == 0
    assert m.signal_msi(0xFEE0_2000, 5) == 0
    assert [errors(v) for v in m.vcpus] == [0, RECEIVE, 0]
    assert m.signal_msi(0xFEE0_1000, 0x405) == 1  # an NMI's vector does not matter
    assert errors(m.vcpus[1]) == 0


def test_an_irqfd_and_a_line_are_messages() -> None:
    m = machine(2)
    m.set_gsi_routing([("msi", 30, 0xFEE0_1000, 5)])
    m.irqfd(30).signal()
    assert errors(m.vcpus[1]) == RECEIVE
    m.irq_line(30, 1)
    assert errors(m.vcpus[1]) == RECEIVE
    assert not any(m.vcpus[1].get_lapic()[R.APIC_IRR : R.APIC_IRR + 4])


def test_the_ioapics_pins_are_messages() -> None:
    m = machine(2, irqchip="full")
    ioregsel, iowin = 0xFEC0_0000, 0xFEC0_0010
    for register, value in ((0x10 + 2 * 5 + 1, 1 << 24), (0x10 + 2 * 5, 9)):  # pin 5: id 1, vector 9
        m.vcpus[0].mem_write(ioregsel, register)
        m.vcpus[0].mem_write(iowin, value)
    m.irq_line(5, 1)
    assert [errors(v) for v in m.vcpus] == [0, RECEIVE]


def test_broadcasts_and_shorthands_reach_everybody() -> None:
    m = machine(3)
    m.vcpus[0].wrmsr(ICR, fx.icr(vector=5, shorthand=fx.Shorthand.ALL_BUT_SELF))
    assert [errors(v) for v in m.vcpus] == [SEND, RECEIVE, RECEIVE]
    m.vcpus[0].wrmsr(ICR, fx.icr(dest=R.X2APIC_BROADCAST, vector=5))
    assert [errors(v) for v in m.vcpus] == [SEND | RECEIVE, RECEIVE, RECEIVE]


def test_lowest_priority_is_received_by_one() -> None:
    m = machine(3)
    m.vcpus[0].wrmsr(ICR, fx.icr(dest=0b111, vector=5, logical=True, delivery=fx.DeliveryMode.LowPrio))
    found = [errors(v) for v in m.vcpus]
    assert sum(bool(e & RECEIVE) for e in found) == 1
    assert found[0] & SEND


def test_a_timer_with_an_illegal_vector() -> None:
    m = machine(1, hv_timer=False)
    v = m.vcpus[0]
    v.wrmsr(LVTT, 5)
    v.wrmsr(0x838, 100)
    m.set_time(1000)
    assert v.settle()
    assert v.pending() is None
    assert errors(v) == RECEIVE
    v.wrmsr(0x835, 0x405)  # LINT0 as NMI: its vector is none
    v.local_interrupt(R.APIC_LVT0)
    assert errors(v) == 0


@pytest.mark.parametrize("deadline", [False, True])
def test_a_masked_tick_is_lost(deadline: bool) -> None:
    m = machine(1, hv_timer=False)
    v = m.vcpus[0]
    mode = R.LVT_TIMER_DEADLINE if deadline else 0
    v.wrmsr(LVTT, 0x10041 | mode)
    v.wrmsr(*((R.MSR_TSC_DEADLINE, 100) if deadline else (0x838, 100)))
    m.set_time(1000)
    assert m.next_timer() is None
    v.wrmsr(LVTT, 0x41 | mode)
    assert v.settle()
    assert v.pending() is None
    v.wrmsr(*((R.MSR_TSC_DEADLINE, 1) if deadline else (0x838, 100)))
    m.set_time(2000)
    assert v.settle()
    assert v.pending() == 0x41


@pytest.mark.parametrize("offset", range(0, 0x1000, 16))
def test_registers_of_the_page(offset: int) -> None:
    """Table 10-1: what it does not have is an illegal address, read or written."""
    there = {0x20, 0x30, *range(0x80, 0x290, 16), *range(0x300, 0x3A0, 16), 0x3E0}
    m = machine(1, x2apic=False)
    v = m.vcpus[0]
    assert bool(manual.is_register(m.mem, np.uint64(offset)) if not declare.JIT else offset in there) == (
        offset in there
    )
    for access in (lambda: v.mmio_read(offset), lambda: v.mmio_write(offset, 0)):
        v.mmio_write(R.APIC_ESR, 0)
        v.mmio_write(R.APIC_ESR, 0)
        access()
        if offset not in (R.APIC_ICR, R.APIC_SPIV, R.APIC_ESR):  # an IPI with vector 0; an APIC that is off
            v.mmio_write(R.APIC_ESR, 0)
            assert v.mmio_read(R.APIC_ESR) == (0 if offset in there else ADDRESS)


def test_an_illegal_address_interrupts() -> None:
    v = machine(1, x2apic=False).vcpus[0]
    v.mmio_write(R.APIC_LVTERR, 0xE1)
    v.mmio_read(0x40)
    assert v.ack() == 0xE1
    v.mmio_write(R.APIC_EOI, 0)
    v.mmio_write(R.APIC_ESR, 0)
    v.mmio_write(0x3F0, 0x41)
    assert v.ack() == 0xE1


def test_accesses_of_other_sizes_log_nothing() -> None:
    v = machine(1, x2apic=False).vcpus[0]
    v.mmio_read(0x40, 1)
    v.mmio_read(0x44, 4)
    v.mmio_write(0x40, 1, 2)
    v.mmio_write(R.APIC_ESR, 0)
    assert v.mmio_read(R.APIC_ESR) == 0


# --------------------------------------------------------------------------------------------------------------- states


def test_an_apic_that_is_enabled_anew_has_its_id_alone() -> None:
    m = fx.Machine(apic_ids=[0, 7], kernel="sdm", apicv=False)
    m.boot_x2apic()
    v = m.vcpus[1]
    v.set_mp_state(R.MP_RUNNABLE)
    for msr, value in ((0x808, 0x40), (LVTT, 0x41), (0x838, 1 << 30), (SELF_IPI, 0x81), (SELF_IPI, 5)):
        v.wrmsr(msr, value)
    v.ack()
    base = v.apic_base & ~(R.APICBASE_EN | R.APICBASE_EXTD)
    v.wrmsr(R.MSR_APICBASE, base)
    v.wrmsr(R.MSR_APICBASE, base | R.APICBASE_EN)
    page = bytearray(v.get_lapic())
    fresh = bytearray(fx.Machine(apic_ids=[0, 7], kernel="sdm", apicv=False).vcpus[1].get_lapic())
    assert page == fresh
    assert page[R.APIC_ID + 3] == 7
    assert m.next_timer() is None


def test_a_mode_that_stays_keeps_everything() -> None:
    v = machine(1, x2apic=False).vcpus[0]
    v.mmio_write(R.APIC_TASKPRI, 0x40)
    v.wrmsr(R.MSR_APICBASE, v.apic_base | R.APICBASE_EXTD)
    assert v.rdmsr(0x808) == 0x40


def test_an_init_forgets_errors() -> None:
    m = machine(2)
    v = m.vcpus[1]
    v.wrmsr(SELF_IPI, 5)
    m.vcpus[0].wrmsr(ICR, fx.icr(dest=1, delivery=fx.DeliveryMode.INIT))
    v.get_mp_state()
    v.set_mp_state(R.MP_RUNNABLE)
    assert errors(v) == 0


def test_kvms_own_deviations_are_off() -> None:
    m = fx.Machine(vcpus=1, kernel="sdm")
    assert not m.mem[L.H_CONFIG] & (L.CONFIG_LINT0_REENABLED | L.CONFIG_MMIO_HOLE)
    assert m.mem[L.H_API] == R.X2API_32BIT_IDS | R.X2API_NO_BROADCAST_QUIRK
    assert m.mem[L.H_MIN_PERIOD_NS] == 0
    assert fx.Machine(vcpus=1, kernel="sdm", min_timer_period_us=500).mem[L.H_MIN_PERIOD_NS] == 500_000


# ---------------------------------------------------------------------------------------------------------- against KVM


def of(kernel: str) -> type[fx.Machine]:
    """Own APICs that are a kernel's."""

    class Own(fx.Machine):
        def __init__(self, **settings: object) -> None:
            plain = {"kernel": kernel, "apicv": False, "threads": False, "hv_timer": False, "min_timer_period_us": 0}
            super().__init__(**plain | settings)

    return Own


@pytest.mark.parametrize("seed", range(3))
def test_nothing_that_is_well_formed_tells_them_apart(seed: int) -> None:
    """Random machines and operations without a reserved bit: the manual and KVM agree in every register."""
    report = fx.kvm.verify(700, other=of(NEWEST), only="apic", kernel="sdm", well_formed=True, seed=seed, shorten=1)
    assert report.agreed, report.divergence
    assert report.operations == 700


def test_what_is_not_does() -> None:
    found = fx.kvm.verify(2000, other=of(NEWEST), only="apic", kernel="sdm", shorten=2).divergence
    assert found is not None


def test_it_agrees_with_itself() -> None:
    report = fx.kvm.verify(700, other=of("sdm"), only="apic", kernel="sdm", shorten=1)
    assert report.agreed, report.divergence
