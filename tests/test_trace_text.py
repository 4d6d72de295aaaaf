"""What each tracepoint says: the text after its name, as a 6.18 kernel prints it, and the task in front."""

from __future__ import annotations

import pytest

import fastexit as fx
from traced import booted

ICR = 0x830


def line(m: fx.Machine, event: str) -> str:
    """The only line of an event."""
    (found,) = (text for text in m.trace.lines() if text.startswith(f"{event}:"))
    return found


def test_lines_seen_on_a_real_host() -> None:
    """The model prints, for the same calls, the very lines that a 6.18 host printed for a VM with ids 0, 1 and 18."""
    m = booted(apic_ids=[0, 1, 18])
    v = m.vcpus[0]

    def said(*expected: str) -> None:
        assert tuple(m.trace.lines()[: len(expected)]) == expected
        m.trace.clear()

    assert v.set_msr(ICR, 0x1_0000_40FD)
    said(
        "kvm_apic_ipi: dst 1 vec 253 (Fixed|physical|assert|edge|dst)",
        "kvm_apic_accept_irq: apicid 1 vec 253 (Fixed|edge)",
        "kvm_apic: apic_write APIC_ICR = 0x1000040fd",
    )
    assert v.set_msr(ICR, 0x1_0004_0000_4841)
    said(
        "kvm_apic_ipi: dst 10004 vec 65 (Fixed|logical|assert|edge|dst)",
        "kvm_apic_accept_irq: apicid 12 vec 65 (Fixed|edge)",
    )
    assert v.set_msr(ICR, 0xC4400)
    said(
        "kvm_apic_ipi: dst 0 vec 0 (NMI|physical|assert|edge|all-but-self)",
        "kvm_apic_accept_irq: apicid 1 vec 0 (NMI|edge)",
        "kvm_apic_accept_irq: apicid 12 vec 0 (NMI|edge)",
    )
    assert v.set_msr(ICR, 0x8C083)
    said("kvm_apic_ipi: dst 0 vec 131 (Fixed|physical|assert|level|all)")
    assert v.set_msr(0x83F, 0x31)
    said(
        "kvm_apic: apic_write APIC_SELF_IPI = 0x31",
        "kvm_apic_ipi: dst 0 vec 49 (Fixed|physical|de-assert|edge|self)",
    )
    assert v.set_msr(0x80B, 0)
    said("kvm_apic: apic_write APIC_EOI = 0x0", "kvm_eoi: apicid 0 vector -1")
    assert not v.set_msr(0x820, 0)
    said("kvm_apic: apic_write APIC_IRR = 0x0")
    assert v.get_msr(0x811) == 0
    said("kvm_apic: apic_read 0x110 = 0x0")
    assert v.wrmsr(ICR, 0x2000).fault is fx.Fault.GP
    assert line(m, "kvm_msr") == "kvm_msr: msr_write 830 = 0x2000 (#GP)"
    m.trace.clear()
    assert m.signal_msi(0xFEE0_1000, 0x8052) == 1
    assert m.trace.lines()[0] == "kvm_msi_set_irq: dst 1 vec 82 (Fixed|physical|level)"


@pytest.mark.parametrize("mode", fx.DeliveryMode)
def test_delivery_mode_names(mode: fx.DeliveryMode) -> None:
    """Delivery modes print as KVM names them, on the IPI and on its acceptance."""
    name = ("Fixed", "LowPrio", "SMI", "Res3", "NMI", "INIT", "SIPI", "ExtINT")[mode]
    m = booted()
    m.vcpus[0].wrmsr(ICR, fx.icr(dest=2, vector=0x80, delivery=mode, level=True))
    assert line(m, "kvm_apic_ipi") == f"kvm_apic_ipi: dst 2 vec 128 ({name}|physical|assert|edge|dst)"
    assert line(m, "kvm_apic_accept_irq") == f"kvm_apic_accept_irq: apicid 2 vec 128 ({name}|edge)"


def test_msi_text() -> None:
    """An MSI shows mode, destination mode, trigger and the redirection hint."""
    m = booted()
    m.signal_msi(0xFEE0_100C, 0x141)
    assert line(m, "kvm_msi_set_irq") == "kvm_msi_set_irq: dst 1 vec 65 (LowPrio|logical|edge|rh)"


def test_xapic_destination_and_id() -> None:
    """In xAPIC mode dst has 8 bits, a raw MMIO ICR shows, and apicid is the vCPU's id, not the id it gave itself."""
    m = fx.Machine(vcpus=2, apicv=False)
    for v in m.vcpus:
        v.mmio_write(0xF0, 0x1FF)
    m.vcpus[1].mmio_write(0x20, 9 << 24)
    m.trace.enable()
    m.vcpus[0].mmio_write(0x310, 9 << 24)
    m.vcpus[0].mmio_write(0x300, 0x1041)
    lines = [text for text in m.trace.lines() if "exit" not in text and "entry" not in text]
    assert lines == [
        "kvm_apic: apic_write APIC_ICR2 = 0x9000000",
        "kvm_apic: apic_write APIC_ICR = 0x1041",
        "kvm_apic_ipi: dst 9 vec 65 (Fixed|physical|de-assert|edge|dst)",
        "kvm_apic_accept_irq: apicid 1 vec 65 (Fixed|edge)",
    ]


def test_mmio_lines() -> None:
    """Aligned dword writes show even to registers that do not exist; reads only of readable registers."""
    m = fx.Machine(vcpus=1)
    m.vcpus[0].mmio_write(0xF0, 0x1FF)
    m.trace.enable()
    v = m.vcpus[0]
    v.mmio_write(0x2F0, 0x31)
    v.mmio_write(0x30, 1)
    v.mmio_write(0x81, 1)
    v.mmio_write(0x80, 1, 1)
    v.mmio_read(0x30)
    v.mmio_read(0xB0)
    assert [text for text in m.trace.lines() if text.startswith("kvm_apic:")] == [
        "kvm_apic: apic_write 0x2f0 = 0x31",
        "kvm_apic: apic_write APIC_LVR = 0x1",
        "kvm_apic: apic_read APIC_LVR = 0x50014",
    ]


def test_mmio_read_shows_the_raw_offset() -> None:
    """A read of one byte shows the offset it was made at, and the whole register."""
    m = fx.Machine(vcpus=1)
    m.trace.enable()
    assert m.vcpus[0].mmio_read(0x32, 1) == 0x05
    assert line(m, "kvm_apic") == "kvm_apic: apic_read 0x32 = 0x50014"


def test_rdmsr_lines() -> None:
    """A read traces the register, then the MSR; one that faults shows no data, no register, and #GP."""
    m = booted()
    m.vcpus[0].rdmsr(0x80F)
    assert [text for text in m.trace.lines() if "exit" not in text and "entry" not in text] == [
        "kvm_apic: apic_read APIC_SPIV = 0x1ff",
        "kvm_msr: msr_read 80f = 0x1ff",
    ]
    m.trace.clear()
    with pytest.raises(fx.GeneralProtection):
        m.vcpus[0].rdmsr(0x80B)
    assert line(m, "kvm_msr") == "kvm_msr: msr_read 80b = 0x0 (#GP)"


def test_eoi_line() -> None:
    """kvm_eoi shows the id in hex and the vector in decimal."""
    m = booted(apic_ids=[0, 18])
    m.vcpus[0].wrmsr(ICR, fx.icr(dest=18, vector=0x41))
    assert m.vcpus[1].ack() == 0x41
    m.trace.clear()
    m.vcpus[1].wrmsr(0x80B, 0)
    lines = [text for text in m.trace.lines() if "exit" not in text and "entry" not in text]
    assert lines == [
        "kvm_apic: apic_write APIC_EOI = 0x0",
        "kvm_eoi: apicid 12 vector 65",
        "kvm_msr: msr_write 80b = 0x0",
    ]


def test_exit_and_entry_text() -> None:
    """kvm_exit shows where the guest was and why it left, kvm_entry where it goes on."""
    m = booted()
    m.vcpus[0].rip = 0xFFFF_FFFF_8107_F8A8
    m.vcpus[0].wrmsr(ICR, fx.icr(dest=1, vector=0xFD))
    assert line(m, "kvm_exit") == (
        "kvm_exit: vcpu 0 reason MSR_WRITE rip 0xffffffff8107f8a8 info1 0x0000000000000000 info2 0x0000000000000000 "
        "intr_info 0x00000000 error_code 0x00000000 requests 0x0000000000000000"
    )
    assert line(m, "kvm_entry") == (
        "kvm_entry: vcpu 0, rip 0xffffffff8107f8aa intr_info 0x00000000 error_code 0x00000000"
    )
    m = booted(vendor="svm")
    m.vcpus[0].wrmsr(ICR, fx.icr(dest=1, vector=0xFD))
    assert "vcpu 0 reason msr rip 0xfff2 info1 0x0000000000000001 info2" in line(m, "kvm_exit")


@pytest.mark.parametrize(
    ("vendor", "reason", "name"),
    [
        ("vmx", 1, "EXTERNAL_INTERRUPT"),
        ("vmx", 7, "INTERRUPT_WINDOW"),
        ("vmx", 12, "HLT"),
        ("vmx", 44, "APIC_ACCESS"),
        ("vmx", 45, "EOI_INDUCED"),
        ("vmx", 52, "PREEMPTION_TIMER"),
        ("vmx", 56, "APIC_WRITE"),
        ("vmx", 85, "MSR_WRITE_IMM"),
        ("vmx", 35, "0x23"),
        ("svm", 0x20, "read_dr0"),
        ("svm", 0x60, "interrupt"),
        ("svm", 0x76, "invd"),
        ("svm", 0x78, "hlt"),
        ("svm", 0x401, "avic_incomplete_ipi"),
        ("svm", 0x402, "avic_unaccelerated_access"),
        ("svm", 0x3FF, "0x3ff"),
    ],
)
def test_exit_reason_names(vendor: str, reason: int, name: str) -> None:
    """VMX reasons print in upper case, SVM codes in lower case, unknown ones in hex."""
    m = booted(vendor=vendor)
    m.vcpus[0].exit(reason)
    assert f" reason {name} rip " in line(m, "kvm_exit")


def test_exit_shows_vectoring_information() -> None:
    """VMX's info2 is the IDT-vectoring information that the exit was reported with."""
    m = booted()
    m.vcpus[0].exit(fx.VmxExit.EPT_VIOLATION, info1=0x181, info2=0x8000_00FD)
    assert "info1 0x0000000000000181 info2 0x00000000800000fd" in line(m, "kvm_exit")


def test_exit_shows_requests() -> None:
    """A kick shows in the requests of the exit that it caused: EVENT is bit 14."""
    m = booted()
    m.vcpus[1].exit(fx.VmxExit.EXTERNAL_INTERRUPT)
    m.vcpus[0].wrmsr(ICR, fx.icr(dest=1, vector=0xFD))
    m.trace.clear()
    m.vcpus[1].exit(fx.VmxExit.EXTERNAL_INTERRUPT)
    assert line(m, "kvm_exit").endswith("requests 0x0000000000004000")


def test_injected_events_show_on_entry() -> None:
    """A #GP, an NMI and an interrupt show as the entry's intr_info, the interrupt as kvm_inj_virq before that."""
    m = booted()
    m.vcpus[0].wrmsr(0x80B, 1 << 32)
    assert "intr_info 0x80000b0d error_code 0x00000000" in line(m, "kvm_entry")

    m.trace.clear()
    m.vcpus[0].wrmsr(ICR, fx.icr(dest=0, delivery=4))
    assert "intr_info 0x80000202 " in line(m, "kvm_entry")

    m.trace.clear()
    m.vcpus[0].rflags |= 1 << 9
    m.vcpus[0].wrmsr(ICR, fx.icr(dest=0, vector=0xFD))
    assert m.trace.lines()[-2] == "kvm_inj_virq: IRQ 0xfd"
    assert "intr_info 0x800000fd " in m.trace.lines()[-1]


def test_ftrace_text_names_the_task_that_ran() -> None:
    """As in ftrace the prefix is the task on the CPU: the sender accepts on its target's behalf, an MSI has no vCPU."""
    m = booted(apicv=True)
    m.vcpus[0].wrmsr(ICR, fx.icr(dest=1, vector=0xFD))
    tasks = [text.split("-")[0].strip() for text in m.trace.text().splitlines()]
    assert tasks == ["vcpu0"] * 7
    m.trace.clear()
    m.signal_msi(0xFEE0_1000, 0x52)
    tasks = [text.split("-")[0].strip() for text in m.trace.text().splitlines()]
    assert tasks == ["host"] * 3
