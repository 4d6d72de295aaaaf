"""Paravirtual IPIs: whom KVM_HC_SEND_IPI reaches and what the guest's RAX says; KVM_HC_KICK_CPU; unknown calls."""

from __future__ import annotations

from typing import Any

import pytest

import fastexit as fx
from fastexit import regs as r

VENDORS = ("vmx", "svm")
FIXED, NMI, INIT = 0, 4 << 8, 5 << 8


def booted(vendor: str = "vmx", **options: Any) -> fx.Machine:
    if "apic_ids" not in options:
        options["vcpus"] = 4
    m = fx.Machine(vendor=vendor, apicv=False, **options)
    m.boot_x2apic()
    return m


def send_ipi(
    m: fx.Machine, low: int, high: int = 0, first: int = 0, icr: int = 0x41, bits64: bool = True
) -> fx.Outcome:
    return m.vcpus[0].hypercall(r.HC_SEND_IPI, low, high, first, icr, bits64=bits64)


def error(number: int, bits: int = 64) -> int:
    return -number & ((1 << bits) - 1)


@pytest.mark.parametrize("vendor", VENDORS)
def test_a_bit_is_an_apic_id(vendor: str) -> None:
    """Bits count from the first id; RAX is how many accepted, RIP moves by 3, and there is no kvm_apic_ipi line."""
    m = booted(vendor)
    v = m.vcpus[0]
    v.wrmsr(0x80B, 0)
    rip = v.rip
    m.trace.enable()
    out = send_ipi(m, 0b101, first=1)
    assert (out.accepted, v.read_data, v.rip - rip) == (2, 2, 3)
    assert [x.pending() for x in m.vcpus] == [None, 0x41, None, 0x41]
    text = "\n".join(m.trace.lines())
    assert text.count("kvm_apic_accept_irq") == 2
    assert "kvm_apic_ipi" not in text


def test_high_bitmap_begins_a_word_further() -> None:
    """64 ids further in long mode, 32 in 32-bit mode, where the upper halves of registers do not count."""
    m = booted(apic_ids=[0, 32, 64, 96])
    send_ipi(m, 0, 1)
    assert [v.pending() for v in m.vcpus] == [None, None, 0x41, None]
    junk = 0xFFFF_FFFF_0000_0000
    out = send_ipi(m, junk, junk | 1, junk, junk | 0x51, bits64=False)
    assert (out.accepted, m.vcpus[0].read_data) == (1, 1)
    assert m.vcpus[1].pending() == 0x51


@pytest.mark.parametrize("icr", [0x41 | 1 << 11, 0x41 | 1 << 18, 0x41 | 2 << 18, 0x41 | 3 << 18])
def test_logical_and_shorthand_are_refused(icr: int) -> None:
    """-EINVAL, and nobody is disturbed."""
    m = booted()
    out = send_ipi(m, 0xF, icr=icr)
    assert (out.accepted, m.vcpus[0].read_data) == (0, error(22))
    assert all(v.pending() is None for v in m.vcpus)


def test_errors_have_the_width_of_the_register() -> None:
    """Outside long mode RAX has 32 bits, the sign of an error among them."""
    m = booted()
    send_ipi(m, 0xF, icr=1 << 11, bits64=False)
    assert m.vcpus[0].read_data == error(22, 32)
    m.vcpus[0].hypercall(99, bits64=False)
    assert m.vcpus[0].read_data == error(1000, 32)


def test_ids_beyond_the_map_are_dropped() -> None:
    """Neither a first id above all others nor bits behind the last one reach anybody; an id may wrap at 2^32."""
    m = booted()
    assert send_ipi(m, (1 << 64) - 1, (1 << 64) - 1, first=4).accepted == 0
    assert send_ipi(m, (1 << 64) - 1).accepted == 4
    assert send_ipi(m, 0, 0b10, first=0xFFFF_FFC0, icr=0x61).accepted == 1
    assert m.vcpus[1].pending() == 0x61
    assert send_ipi(m, 0b11, 0, first=0xFFFF_FFFF).accepted == 0


def test_without_a_map() -> None:
    """-EOPNOTSUPP: two xAPIC ids that are one (0 and 256) drop the map, and there is no slow scan here."""
    m = fx.Machine(apic_ids=[0, 256], apicv=False)
    for v in m.vcpus:
        v.set_msr(0x1B, v.apic_base)
        v.mmio_write(0xF0, 0x1FF)
    send_ipi(m, 1)
    assert m.vcpus[0].read_data == error(95)


@pytest.mark.parametrize("icr", [NMI, INIT])
def test_other_delivery_modes(icr: int) -> None:
    """The low word's mode counts: NMI and INIT go out the same way."""
    m = booted()
    assert send_ipi(m, 0b10, icr=icr).accepted == 1
    got = m.vcpus[1].events()
    assert (got.nmi_pending, got.latched_init) == ((1, False) if icr == NMI else (0, True))


def test_reserved_bits_are_ignored() -> None:
    """Busy, delivery status and everything above the shorthand have no meaning."""
    m = booted()
    assert send_ipi(m, 0b10, icr=0xFFF0_3000 | 0x71).accepted == 1
    assert m.vcpus[1].pending() == 0x71


def test_software_disabled_target_accepts_nothing() -> None:
    """It is counted out, though its accept line appears."""
    m = booted()
    m.vcpus[1].set_msr(0x80F, 0xFF)
    m.trace.enable()
    assert send_ipi(m, 0b110).accepted == 1
    assert sum("kvm_apic_accept_irq" in line for line in m.trace.lines()) == 2


@pytest.mark.parametrize("vendor", VENDORS)
def test_kick_cpu_ends_a_halt(vendor: str) -> None:
    """KVM_HC_KICK_CPU names an APIC id in its second argument; the halted vCPU wakes up and runs. RAX is 0."""
    m = booted(vendor)
    target = m.vcpus[2]
    out = target.exit(fx.SvmExit.HLT if vendor == "svm" else fx.VmxExit.HLT)
    assert out.blocked
    assert m.vcpus[0].hypercall(r.HC_KICK_CPU, 0, 2).effects == fx.Effect.WAKE
    assert m.vcpus[0].read_data == 0
    assert target.run()
    assert target.injected is None


@pytest.mark.parametrize("number", [0, 2, 9, 99, 1 << 32 | 10])
def test_unknown_calls(number: int) -> None:
    """-ENOSYS, and RIP moves all the same."""
    v = booted().vcpus[0]
    v.wrmsr(0x80B, 0)
    rip = v.rip
    v.hypercall(number, 0xF, 0, 0, 0x41)
    assert (v.read_data, v.rip - rip) == (error(1000), 3)


@pytest.mark.parametrize("number", [r.HC_VAPIC_POLL_IRQ, r.HC_SCHED_YIELD])
def test_calls_that_only_schedule(number: int) -> None:
    """They succeed."""
    v = booted().vcpus[0]
    v.hypercall(number)
    assert v.read_data == 0


def test_registers_of_the_exit() -> None:
    """The same call as an exit with its registers."""
    m = booted()
    out = m.vcpus[0].exit(fx.VmxExit.VMCALL, rax=r.HC_SEND_IPI, rbx=0b10, rcx=0, rdx=0, rsi=0x41)
    assert out.accepted == 1
