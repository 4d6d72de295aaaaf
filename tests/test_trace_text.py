"""What each tracepoint says: the text after its name, as each generation prints it, and the task in front.

Every line that can be printed is read back by the trace reader.
"""

from __future__ import annotations

from pathlib import Path

import pytest

import fastexit as fx
from fastexit import layout as L
from fastexit.profile import as_of, since
from fastexit.trace.events import Kind
from fastexit.trace.reader import TraceReader
from fastexit.tracepoints.releases import numbers
from fastexit.tracepoints.text import context_text, formats
from traced import booted

ICR = 0x830
KERNELS = fx.profiles()


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


@pytest.mark.parametrize("vendor", ["vmx", "svm"])
@pytest.mark.parametrize("dispatcher", ["python", "compiled"])
def test_exceptions_show_before_their_entry(vendor: str, dispatcher: str) -> None:
    """kvm_inject_exception: behind kvm_msr; without an error code while CR0.PE is clear (7.3.4 x86.c)."""
    m = fx.Machine(vcpus=2, vendor=vendor, apicv=False, dispatcher=dispatcher)
    v = m.vcpus[0]
    v.set_msr(0x1B, v.apic_base | 0xC00)
    v.run()
    m.trace.enable()
    for real, said, info in ((True, "#GP", 0x8000_030D), (False, "#GP (0x0)", 0x8000_0B0D)):
        assert v.real_mode
        v.real_mode = real
        v.wrmsr(0x80B, 1 << 32)
        *_, msr, exception, entry = m.trace.lines()
        assert msr.endswith("msr_write 80b = 0x100000000 (#GP)")
        assert exception == f"kvm_inj_exception: {said}"
        assert f"intr_info 0x{info:08x} " in entry
        v.real_mode = True


def test_exception_that_is_delivered_again_shows_again() -> None:
    """An exit during the delivery of an exception queues it again (vmx_complete_interrupts)."""
    m = booted()
    m.vcpus[0].exit(fx.VmxExit.EXCEPTION_NMI, intr_info=0x8000_0202, info2=0x8000_0B0E)
    assert line(m, "kvm_inj_exception") == "kvm_inj_exception: #PF (0x0) [reinjected]"


@pytest.mark.parametrize("dispatcher", ["python", "compiled"])
def test_entries_show_what_an_older_one_injected(dispatcher: str) -> None:
    """VMX: a VM exit clears bit 31 of the field and leaves the rest; a cancelled entry and INIT clear it all."""
    m = fx.Machine(vcpus=2, apicv=False, dispatcher=dispatcher)
    m.boot_x2apic()
    v = m.vcpus[0]
    v.run()
    m.trace.enable()

    def shown(v: fx.Vcpu) -> int:
        m.trace.clear()
        v.rdmsr(0x802)
        return int(line(m, "kvm_entry").split("intr_info ")[1].split()[0], 16)

    assert shown(v) == 0
    v.wrmsr(0x80B, 1 << 32)
    assert shown(v) == shown(v) == 0xB0D
    v.wrmsr(ICR, fx.icr(dest=0, delivery=4))
    assert shown(v) == 0x202
    v.rflags |= 1 << 9
    v.wrmsr(ICR, fx.icr(dest=0, vector=0x60))
    assert shown(v) == 0x60
    m.vcpus[1].wrmsr(ICR, fx.icr(dest=0, delivery=5, level=True))
    assert shown(v) == 0


def test_svm_has_no_older_event_in_its_entries() -> None:
    m = booted(vendor="svm")
    m.vcpus[0].wrmsr(0x80B, 1 << 32)
    m.trace.clear()
    m.vcpus[0].rdmsr(0x802)
    assert "intr_info 0x00000000 " in line(m, "kvm_entry")


def test_real_mode_goes_and_comes() -> None:
    """RESET and INIT leave CR0.PE clear, an SMI's handler begins so, and RSM brings back what was."""
    m = fx.Machine(vcpus=2, smm=True)
    assert [v.real_mode for v in m.vcpus] == [True, True]
    m.boot_x2apic()
    v = m.vcpus[1]
    v.run()
    for before in (False, True):
        v.real_mode = before
        m.vcpus[0].wrmsr(ICR, fx.icr(dest=1, delivery=2))
        v.exit(fx.VmxExit.EXTERNAL_INTERRUPT)
        assert (v.smm, v.real_mode) == (True, True)
        v.rsm()
        assert v.real_mode is before
    v.real_mode = False
    m.vcpus[0].wrmsr(ICR, fx.icr(dest=1, delivery=5, level=True))
    assert v.get_mp_state() == fx.regs.MP_INIT_RECEIVED
    assert v.real_mode


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


# ------------------------------------------------------------------------------- every event, generation by generation

RIP = 0xFFFF_FFFF_8107_F8AA
EXIT_WORDS = (32, RIP, 0x1, 0x8000_00FD, 0x8000_00F2, 0xB, 1 << 63 | 1 << 14)
MSR = "kvm_msr: msr_write 830 = 0x1000040fd"
EVENTS: dict[str, tuple[int, tuple[int, ...], dict[str, str | None]]] = {
    "entry": (
        L.TP_ENTRY,
        (RIP, 0x8000_00FD, 0),
        {
            "seed-v3": "kvm_entry: vcpu 18",
            "5.10": "kvm_entry: vcpu 18, rip 0xffffffff8107f8aa",
            "6.18": "kvm_entry: vcpu 18, rip 0xffffffff8107f8aa intr_info 0x800000fd error_code 0x00000000",
        },
    ),
    "entry that exits at once": (
        L.TP_ENTRY,
        (0xFFF0, 0x8000_0B0D, 1 << 32 | 8),
        {
            "seed-v3": "kvm_entry: vcpu 18",
            "5.10": "kvm_entry: vcpu 18, rip 0xfff0",
            "6.1": "kvm_entry: vcpu 18, rip 0xfff0[immediate exit]",
            "6.8": "kvm_entry: vcpu 18, rip 0xfff0",
            "6.12": "kvm_entry: vcpu 18, rip 0xfff0[immediate exit]",
            "6.18": "kvm_entry: vcpu 18, rip 0xfff0 intr_info 0x80000b0d error_code 0x00000008[immediate exit]",
        },
    ),
    "exit": (
        L.TP_EXIT,
        EXIT_WORDS,
        {
            "seed-v3": "kvm_exit: vcpu 18 reason MSR_WRITE rip 0xffffffff8107f8aa info 1 800000fd",
            "5.10": "kvm_exit: vcpu 18 reason MSR_WRITE rip 0xffffffff8107f8aa info1 0x0000000000000001 "
            "info2 0x00000000800000fd intr_info 0x800000f2 error_code 0x0000000b",
            "6.18": "kvm_exit: vcpu 18 reason MSR_WRITE rip 0xffffffff8107f8aa info1 0x0000000000000001 "
            "info2 0x00000000800000fd intr_info 0x800000f2 error_code 0x0000000b requests 0x0000000000004000",
        },
    ),
    "msr write": (L.TP_MSR_WRITE, (0x830, 0x1_0000_40FD, 0), {"seed-v3": MSR}),
    "msr write that faults": (L.TP_MSR_WRITE, (0x830, 0x1_0000_40FD, 1), {"seed-v3": f"{MSR} (#GP)"}),
    "msr read": (L.TP_MSR_READ, (0x802, 0x12, 0), {"seed-v3": "kvm_msr: msr_read 802 = 0x12"}),
    "apic write": (
        L.TP_APIC_WRITE,
        (0x300, 0x1_0000_40FD),
        {"seed-v3": "kvm_apic: apic_write APIC_ICR = 0x40fd", "6.1": "kvm_apic: apic_write APIC_ICR = 0x1000040fd"},
    ),
    "apic read": (L.TP_APIC_READ, (0x110, 0x8), {"seed-v3": "kvm_apic: apic_read 0x110 = 0x8"}),
    "extended register": (L.TP_APIC_READ, (0x400, 0), {"seed-v3": "kvm_apic: apic_read APIC_EFEAT = 0x0"}),
    "apic ipi": (
        L.TP_APIC_IPI,
        (0x4841, 0x10004),
        {"seed-v3": "kvm_apic_ipi: dst 10004 vec 65 (Fixed|logical|assert|edge|dst)"},
    ),
    "accept": (L.TP_ACCEPT_IRQ, (18, 0x4841), {"seed-v3": "kvm_apic_accept_irq: apicid 12 vec 65 (Fixed|edge)"}),
    "apicv accept": (
        L.TP_APICV_ACCEPT_IRQ,
        (18, 0x8052),
        {"seed-v3": None, "6.1": "kvm_apicv_accept_irq: apicid 12 vec 82 (Fixed|level)"},
    ),
    "eoi": (L.TP_EOI, (65,), {"seed-v3": "kvm_eoi: apicid 12 vector 65"}),
    "eoi of nothing": (L.TP_EOI, (L.NONE,), {"seed-v3": "kvm_eoi: apicid 12 vector -1"}),
    "pv eoi": (L.TP_PV_EOI, (236,), {"seed-v3": "kvm_pv_eoi: apicid 12 vector 236"}),
    "injected interrupt": (
        L.TP_INJ_VIRQ,
        (0xFD, 0, 0),
        {"seed-v3": "kvm_inj_virq: irq 253", "6.1": "kvm_inj_virq: IRQ 0xfd"},
    ),
    "injected again": (
        L.TP_INJ_VIRQ,
        (0xEC, 0, 1),
        {"seed-v3": "kvm_inj_virq: irq 236", "6.1": "kvm_inj_virq: IRQ 0xec [reinjected]"},
    ),
    "software interrupt": (
        L.TP_INJ_VIRQ,
        (0x80, 1, 0),
        {"seed-v3": "kvm_inj_virq: irq 128", "6.1": "kvm_inj_virq: Soft/INTn 0x80"},
    ),
    "software interrupt again": (
        L.TP_INJ_VIRQ,
        (0x80, 1, 1),
        {"seed-v3": "kvm_inj_virq: irq 128", "6.1": "kvm_inj_virq: Soft/INTn 0x80 [reinjected]"},
    ),
    "exception": (
        L.TP_INJ_EXCEPTION,
        (13, 1, 0),
        {"seed-v3": "kvm_inj_exception: #GP (0x0)"},
    ),
    "exception without an error code": (
        L.TP_INJ_EXCEPTION,
        (13, 0, 0),
        {"seed-v3": "kvm_inj_exception: #GP (0x0)", "6.1": "kvm_inj_exception: #GP"},
    ),
    "exception again": (
        L.TP_INJ_EXCEPTION,
        (14, 1, 1),
        {"seed-v3": None, "5.10": "kvm_inj_exception: #PF (0x0) [reinjected]"},
    ),
    "exception without a name before 6.18": (
        L.TP_INJ_EXCEPTION,
        (21, 0, 0),
        {
            "seed-v3": "kvm_inj_exception: 0x15 (0x0)",
            "6.1": "kvm_inj_exception: 0x15",
            "6.18": "kvm_inj_exception: #CP",
        },
    ),
    "msi": (L.TP_MSI_SET_IRQ, (0x8052, 1, 0), {"seed-v3": "kvm_msi_set_irq: dst 1 vec 82 (Fixed|physical|level)"}),
    "msi with hint": (
        L.TP_MSI_SET_IRQ,
        (0x0952, 0x1FF, 1),
        {"seed-v3": "kvm_msi_set_irq: dst 1ff vec 82 (LowPrio|logical|edge|rh)"},
    ),
    "fast mmio": (L.TP_FAST_MMIO, (0xFEE0_1000,), {"seed-v3": "kvm_fast_mmio: fast mmio at gpa 0xfee01000"}),
    "hv timer": (L.TP_HV_TIMER_STATE, (1,), {"seed-v3": "kvm_hv_timer_state: vcpu_id 12 hv_timer 1"}),
    "late": (L.TP_WAIT_LAPIC_EXPIRE, (250,), {"seed-v3": "kvm_wait_lapic_expire: vcpu 18: delta 250 (late)"}),
    "early": (
        L.TP_WAIT_LAPIC_EXPIRE,
        ((1 << 64) - 250,),
        {"seed-v3": "kvm_wait_lapic_expire: vcpu 18: delta -250 (early)"},
    ),
    "inhibit set": (
        L.TP_APICV_INHIBIT_CHANGED,
        (8, 1, 1 << 8),
        {
            "seed-v3": None,
            "5.6": "kvm_apicv_update_request: deactivate bit=3",
            "6.1": "kvm_apicv_inhibit_changed: set reason=7, inhibits=0x80",
            "6.6": "kvm_apicv_inhibit_changed: set reason=8, inhibits=0x100",
            "6.12": "kvm_apicv_inhibit_changed: set reason=8, inhibits=0x100 IRQWIN",
        },
    ),
    "inhibit that leaves others": (
        L.TP_APICV_INHIBIT_CHANGED,
        (8, 0, 1 << 7 | 1 << 9),
        {
            "seed-v3": None,
            "6.1": "kvm_apicv_inhibit_changed: cleared reason=7, inhibits=0x140",
            "6.6": "kvm_apicv_inhibit_changed: cleared reason=8, inhibits=0x280",
            "6.12": "kvm_apicv_inhibit_changed: cleared reason=8, inhibits=0x280 NESTED|PIT_REINJ",
        },
    ),
    "last inhibit": (
        L.TP_APICV_INHIBIT_CHANGED,
        (9, 0, 0),
        {
            "seed-v3": None,
            "5.6": "kvm_apicv_update_request: activate bit=4",
            "6.1": "kvm_apicv_inhibit_changed: cleared reason=8, inhibits=0x0",
            "6.6": "kvm_apicv_inhibit_changed: cleared reason=9, inhibits=0x0",
        },
    ),
    "inhibit of 6.18 only": (
        L.TP_APICV_INHIBIT_CHANGED,
        (12, 1, 1 << 12),
        {
            "seed-v3": None,
            "6.18": "kvm_apicv_inhibit_changed: set reason=12, inhibits=0x1000 PHYSICAL_ID_TOO_BIG",
        },
    ),
    "inhibit of 5.7 to 5.15": (
        L.TP_APICV_INHIBIT_CHANGED,
        (13, 1, 1 << 13),
        {"seed-v3": None, "5.7": "kvm_apicv_update_request: deactivate bit=5", "6.1": None},
    ),
    "incomplete ipi": (
        L.TP_AVIC_INCOMPLETE_IPI,
        (5 << 32 | 0x40FD, 1, 3),
        {"seed-v3": "kvm_avic_incomplete_ipi: vcpu=18, icrh:icrl=0x00000005:000040fd, id=1, index=3"},
    ),
    "doorbell": (L.TP_AVIC_DOORBELL, (18, 3), {"seed-v3": None, "6.1": "kvm_avic_doorbell: vcpuid=18, apicid=3"}),
    "slow path": (
        L.TP_AVIC_KICK_VCPU_SLOWPATH,
        (5 << 32 | 0x40FD, 3),
        {"seed-v3": None, "6.1": "kvm_avic_kick_vcpu_slowpath: icrh:icrl=0x000005:000040fd, index=3"},
    ),
    "user space": (L.TP_USERSPACE_EXIT, (5, 0), {"seed-v3": "kvm_userspace_exit: reason KVM_EXIT_HLT (5)"}),
    "user space MSR": (
        L.TP_USERSPACE_EXIT,
        (30, 0),
        {
            "seed-v3": "kvm_userspace_exit: reason 0x1e (30)",
            "5.10": "kvm_userspace_exit: reason KVM_EXIT_X86_WRMSR (30)",
        },
    ),
    "signal": (L.TP_USERSPACE_EXIT, (10, 4), {"seed-v3": "kvm_userspace_exit: reason restart (4)"}),
    "errno": (L.TP_USERSPACE_EXIT, (0, 14), {"seed-v3": "kvm_userspace_exit: reason error (14)"}),
    "irte posted": (
        L.TP_PI_IRTE_UPDATE,
        (1 << 32 | 42, 18 << 32 | 0x18, 0x52),
        {
            "seed-v3": "kvm_pi_irte_update: VT-d PI is enabled and being updated for irq 42, vcpu 18, gsi: 0x18, "
            f"gvec: 0x52, pi_desc_addr: {8 * (L.HOT + 2 * L.HOT_STRIDE):#x}",
            "6.12": "kvm_pi_irte_update: PI is enabled and being updated for irq 42, vcpu 18, gsi: 0x18, "
            f"gvec: 0x52, pi_desc_addr: {8 * (L.HOT + 2 * L.HOT_STRIDE):#x}",
            "6.18": "kvm_pi_irte_update: PI is enabled and being updated for irq 42, vcpu 18, gsi: 0x18, gvec: 0x52",
        },
    ),
    "irte remapped": (
        L.TP_PI_IRTE_UPDATE,
        (42, 0xFFFF_FFFF << 32 | 0x18, 0),
        {
            "seed-v3": None,
            "6.18": "kvm_pi_irte_update: PI is disabled for irq 42, vcpu -1, gsi: 0x18, gvec: 0x0",
        },
    ),
    "hypercall": (
        L.TP_HYPERCALL,
        (1 << 32 | 10, 0b110, 0, 0xFFFF_FFFF_0000_0001, 0x41, 1),
        {"seed-v3": "kvm_hypercall: nr 0x10000000a a0 0x6 a1 0x0 a2 0xffffffff00000001 a3 0x41"},
    ),
    "hypercall of a 32-bit guest": (
        L.TP_HYPERCALL,
        (1 << 32 | 10, 0b110, 0, 0xFFFF_FFFF_0000_0001, 0x41, 0),
        {
            "seed-v3": "kvm_hypercall: nr 0x10000000a a0 0x6 a1 0x0 a2 0xffffffff00000001 a3 0x41",
            "7.3": "kvm_hypercall: nr 0xa a0 0x6 a1 0x0 a2 0x1 a3 0x41",
        },
    ),
    "set irq": (L.TP_SET_IRQ, (24, 1, 0), {"seed-v3": "kvm_set_irq: gsi 24 level 1 source 0"}),
    "set irq with a level below 0": (
        L.TP_SET_IRQ,
        (4095, 0xFFFF_FFFE, 1),
        {"seed-v3": "kvm_set_irq: gsi 4095 level -2 source 1"},
    ),
    "IOAPIC": (
        L.TP_IOAPIC_SET_IRQ,
        (0x0100_0000_0000_0033, 4, 0),
        {"seed-v3": "kvm_ioapic_set_irq: pin 4 dst 1 vec 51 (Fixed|physical|edge)"},
    ),
    "masked IOAPIC pin": (
        L.TP_IOAPIC_SET_IRQ,
        (0xFF00_0000_0001_F942, 23, 1),
        {"seed-v3": "kvm_ioapic_set_irq: pin 23 dst ff vec 66 (LowPrio|logical|level|masked) (coalesced)"},
    ),
    "delayed EOI": (
        L.TP_IOAPIC_DELAYED_EOI_INJ,
        (0x0A00_0000_0000_8742,),
        {"seed-v3": "kvm_ioapic_delayed_eoi_inj: dst a vec 66 (ExtINT|physical|level)"},
    ),
    "PIC": (L.TP_PIC_SET_IRQ, (3, 0, 0xF7), {"seed-v3": "kvm_pic_set_irq: chip 0 pin 3 (edge)"}),
    "masked PIC pin": (
        L.TP_PIC_SET_IRQ,
        (1 << 8 | 6 | L.TRACE_COALESCED, 0x40, 0x40),
        {"seed-v3": "kvm_pic_set_irq: chip 1 pin 6 (level|masked) (coalesced)"},
    ),
    "ack of the master": (L.TP_ACK_IRQ, (0, 2), {"seed-v3": "kvm_ack_irq: irqchip PIC master pin 2"}),
    "ack of the slave": (L.TP_ACK_IRQ, (1, 15), {"seed-v3": "kvm_ack_irq: irqchip PIC slave pin 15"}),
    "ack of the IOAPIC": (L.TP_ACK_IRQ, (2, 17), {"seed-v3": "kvm_ack_irq: irqchip IOAPIC pin 17"}),
    "port written": (
        L.TP_PIO,
        (0x20 | L.TRACE_PIO_WRITE, 1 | 1 << 8, 0x1F20),
        {"seed-v3": "kvm_pio: pio_write at 0x20 size 1 count 1 val 0x20 "},
    ),
    "port read": (
        L.TP_PIO,
        (0x4D0, 2 | 1 << 8, 0x1_BEEF),
        {"seed-v3": "kvm_pio: pio_read at 0x4d0 size 2 count 1 val 0xbeef "},
    ),
    "string of a port": (
        L.TP_PIO,
        (0x1F0, 4 | 128 << 8, 0x1_DEAD_BEEF),
        {"seed-v3": "kvm_pio: pio_read at 0x1f0 size 4 count 128 val 0xdeadbeef (...)"},
    ),
    "Hyper-V hypercall": (
        L.TP_HV_HYPERCALL,
        (0x0003_0005_0041_0015, 0x51, 0xE),
        {
            "seed-v3": "kvm_hv_hypercall: code 0x15 fast cnt 0x5 idx 0x3 in 0x51 out 0xe",
            "6.1": "kvm_hv_hypercall: code 0x15 fast var_cnt 0x20 rep_cnt 0x5 idx 0x3 in 0x51 out 0xe",
        },
    ),
    "slow Hyper-V hypercall": (
        L.TP_HV_HYPERCALL,
        (0xB, 0x5000, 0),
        {
            "seed-v3": "kvm_hv_hypercall: code 0xb slow cnt 0x0 idx 0x0 in 0x5000 out 0x0",
            "6.1": "kvm_hv_hypercall: code 0xb slow var_cnt 0x0 rep_cnt 0x0 idx 0x0 in 0x5000 out 0x0",
        },
    ),
    "end of a Hyper-V hypercall": (
        L.TP_HV_HYPERCALL_DONE,
        (5 << 32,),
        {"5.15": "kvm_hv_hypercall_done: result 0x500000000"},
    ),
    "Hyper-V IPI": (L.TP_HV_SEND_IPI, (0x51, 0xE), {"seed-v3": "kvm_hv_send_ipi: vector 51 processor_mask 0xe"}),
    "Hyper-V IPI to a set": (
        L.TP_HV_SEND_IPI_EX,
        (0x51, 1, 0xE),
        {"seed-v3": "kvm_hv_send_ipi_ex: vector 51 format 1 valid_bank_mask 0xe"},
    ),
    "Hyper-V flush": (
        L.TP_HV_FLUSH_TLB,
        (0xE, 0x1000, 3),
        {
            "seed-v3": "kvm_hv_flush_tlb: processor_mask 0xe address_space 0x1000 flags 0x3",
            "6.6": "kvm_hv_flush_tlb: processor_mask 0xe address_space 0x1000 flags 0x3 ",
        },
    ),
    "Hyper-V flush of a set": (
        L.TP_HV_FLUSH_TLB_EX,
        (0xE, 1, 0x1000, 3),
        {
            "seed-v3": "kvm_hv_flush_tlb_ex: valid_bank_mask 0xe format 0x1 address_space 0x1000 flags 0x3",
            "6.6": "kvm_hv_flush_tlb_ex: valid_bank_mask 0xe format 0x1 address_space 0x1000 flags 0x3 ",
        },
    ),
    "acked SINT": (L.TP_HV_NOTIFY_ACKED_SINT, (2,), {"seed-v3": "kvm_hv_notify_acked_sint: vcpu_id 18 sint 2"}),
    "SINT": (
        L.TP_HV_SYNIC_SET_IRQ,
        (2, 0x61, L.NONE),
        {"seed-v3": "kvm_hv_synic_set_irq: vcpu_id 18 sint 2 vector 97 ret -1"},
    ),
    "EOI of a SINT": (L.TP_HV_SYNIC_SEND_EOI, (97,), {"seed-v3": "kvm_hv_synic_send_eoi: vcpu_id 18 vector 97"}),
    "SynIC MSR": (
        L.TP_HV_SYNIC_SET_MSR,
        (0x4000_0083, 0x5001, 1),
        {"seed-v3": "kvm_hv_synic_set_msr: vcpu_id 18 msr 0x40000083 data 0x5001 host 1"},
    ),
    "timer's configuration": (
        L.TP_HV_STIMER_SET_CONFIG,
        (3, 0x20001, 0),
        {"seed-v3": "kvm_hv_stimer_set_config: vcpu_id 18 timer 3 config 0x20001 host 0"},
    ),
    "timer's count": (
        L.TP_HV_STIMER_SET_COUNT,
        (3, 1000, 1),
        {"seed-v3": "kvm_hv_stimer_set_count: vcpu_id 18 timer 3 count 1000 host 1"},
    ),
    "periodic timer": (
        L.TP_HV_STIMER_START_PERIODIC,
        (3, 1000, 2000),
        {"seed-v3": "kvm_hv_stimer_start_periodic: vcpu_id 18 timer 3 time_now 1000 exp_time 2000"},
    ),
    "one-shot timer": (
        L.TP_HV_STIMER_START_ONE_SHOT,
        (3, 1000, 2000),
        {"seed-v3": "kvm_hv_stimer_start_one_shot: vcpu_id 18 timer 3 time_now 1000 count 2000"},
    ),
    "timer's callback": (L.TP_HV_STIMER_CALLBACK, (3,), {"seed-v3": "kvm_hv_stimer_callback: vcpu_id 18 timer 3"}),
    "timer's end": (L.TP_HV_STIMER_CLEANUP, (3,), {"seed-v3": "kvm_hv_stimer_cleanup: vcpu_id 18 timer 3"}),
    "timer's message": (
        L.TP_HV_STIMER_EXPIRATION,
        (3, 0, L.NONE - 10),
        {"seed-v3": "kvm_hv_stimer_expiration: vcpu_id 18 timer 3 direct 0 send result -11"},
    ),
}
"""Name -> event, arguments, and from which generation on which line; no line before the event exists.

vCPU 2 has the id 18. Between two entries of a table the text stays as it was.
"""


def record(m: fx.Machine, event: int, args: tuple[int, ...], vcpu: int = 2) -> None:
    """Append a record as kernels do. Words that the event does not use hold what was there before."""
    at = L.TRACE + m.mem[L.H_TRACE_HEAD] * L.TRACE_STRIDE
    words = (event | vcpu + 1 << 8, *args)
    m.words[at : at + L.TRACE_STRIDE] = 0xAAAA_AAAA_AAAA_AAAA
    m.words[at : at + len(words)] = words
    m.mem[L.H_TRACE_HEAD] += 1


def test_every_event_is_here() -> None:
    """A new tracepoint needs an example."""
    numbers = {value for name, value in vars(L).items() if name.startswith("TP_")}
    assert {event for event, _, _ in EVENTS.values()} == numbers


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("name", EVENTS)
def test_text_by_generation(name: str, kernel: str) -> None:
    """Each event in each generation's words; none where the generation does not have it."""
    event, args, table = EVENTS[name]
    m = fx.Machine(apic_ids=[0, 1, 18], kernel=kernel)
    record(m, event, args)
    expected = as_of(table, kernel)
    assert m.trace.lines() == [expected] * (expected is not None)
    assert m.trace.vcpus() == [2] * (expected is not None)
    assert len(m.trace) == 1


@pytest.mark.parametrize(
    ("release", "entry", "exit"),
    [
        ("5.4.286", " immediate=0 rip=0 info=0", "requests=0"),
        ("5.10", " immediate=0 rip=1 info=0", "requests=0"),
        ("6.1.20", " immediate=0 rip=1 info=0", "requests=0"),
        ("6.1.192", " immediate=1 rip=1 info=0", "requests=0"),
        ("6.8", " immediate=0 rip=1 info=0", "requests=0"),
        ("6.12.118", " immediate=1 rip=1 info=0", "requests=0"),
        ("6.16.12", " immediate=1 rip=1 info=1", "requests=1"),
        ("6.17", " immediate=1 rip=1 info=1", "requests=1"),
        ("7.3.4", " immediate=1 rip=1 info=1", "requests=1"),
    ],
)
def test_texts_go_by_release(release: str, entry: str, exit: str) -> None:
    """What changed between two generations, or within a stable series (TP_printk of kvm_entry and kvm_exit).

    The print formats in the modules of 5.10.223, 5.10.262, 6.1.192, 6.12.118, 6.16.12, 6.18.15 and 7.3.4 say so.
    """
    found = formats(numbers(release))
    said = found[L.TP_ENTRY]
    assert f" immediate={'immediate' in said:d} rip={'rip' in said:d} info={'intr_info' in said:d}" == entry
    assert f"requests={'requests' in found[L.TP_EXIT]:d}" == exit


@pytest.mark.parametrize(
    ("release", "name"),
    [
        ("6.1", "immediate"),
        ("6.1.0-57-cloud-amd64", "immediate"),
        ("6.1.20", ""),
        ("6.3", ""),
        ("6.12.3", "immediate"),
        ("6.16", "intr_info immediate"),
        ("v6.16.12", "intr_info immediate"),
        ("6.17.13+deb13-cloud-amd64", "intr_info immediate"),
    ],
)
def test_a_machine_prints_what_its_release_prints(release: str, name: str) -> None:
    """A generation's own name, and a release without a patch level, stand for the tree of the row."""
    m = fx.Machine(apic_ids=[0, 1, 18], kernel=release)
    record(m, L.TP_ENTRY, (0xFFF0, 0x8000_0B0D, 1 << 32))
    assert " ".join(word for word in ("intr_info", "immediate") if word in m.trace.lines()[0]) == name


KINDS = {
    "entry": (Kind.MARK, 18, 0, 0),
    "exit": (Kind.EXIT, 18, 0, 0),
    "msr write": (Kind.MSR_WRITE, 0x830, 0x1_0000_40FD, 0),
    "msr write that faults": (Kind.MSR_WRITE, 0x830, 0x1_0000_40FD, 1),
    "msr read": (Kind.MSR_READ, 0x802, 0x12, 0),
    "apic write": (Kind.APIC_WRITE, 0x300, {"seed-v3": 0x40FD, "6.1": 0x1_0000_40FD}, 0),
    "apic read": (Kind.APIC_READ, 0x110, 8, 0),
    "extended register": (Kind.APIC_READ, 0x400, 0, 0),
    "apic ipi": (Kind.IPI, 0x10004, 0x4841, 0),
    "accept": (Kind.ACCEPT, 18, 0x41, 0),
    "eoi": (Kind.EOI, 18, 65, 0),
    "eoi of nothing": (Kind.EOI, 18, -1, 0),
    "pv eoi": (Kind.PV_EOI, 18, 236, 0),
    "injected interrupt": (Kind.INJECT, -1, 0xFD, 0),
    "injected again": (Kind.INJECT, -1, 0xEC, {"seed-v3": 0, "6.1": 1}),
    "software interrupt": (Kind.INJECT, -1, {"seed-v3": 0x80, "6.1": 0}, {"seed-v3": 0, "6.1": 1}),
    "msi": (Kind.SOURCE, -1, 0x52, 0),
    "hv timer": (Kind.HV_TIMER, 18, 1, 0),
    "late": (Kind.VCPU, 18, 0, 0),
    "user space": (Kind.MARK, -1, 0, 0),
    "fast mmio": (Kind.MARK, -1, 0, 0),
}
"""What the reader makes of them; whatever is not here means nothing to it."""


@pytest.mark.parametrize("kernel", KERNELS)
def test_reader_reads_every_line(kernel: str, tmp_path: Path) -> None:
    """The text of a machine that traced everything is read without a complaint, and says what was recorded."""
    m = fx.Machine(apic_ids=[0, 1, 18], kernel=kernel)
    shown = []
    for name, (event, args, _) in EVENTS.items():
        before = len(m.trace.lines())
        record(m, event, args)
        if len(m.trace.lines()) > before:
            shown.append(name)
    path = tmp_path / "trace.txt"
    path.write_text(m.trace.text())
    reader = TraceReader(path)
    events = [event for batch in reader.batches() for event in batch.events]
    assert (reader.problems, reader.notes) == ([], [])
    assert [event.name for event in events] == [line.split(":")[0] for line in m.trace.lines()]
    for name, event in zip(shown, events, strict=True):
        if name in KINDS:
            kind, *fields = (as_of(f, kernel) if isinstance(f, dict) else f for f in KINDS[name])
            assert [Kind(event.kind), event.a, event.b, event.c] == [kind, *fields], name


@pytest.mark.parametrize("kernel", KERNELS)
def test_latency_flags_by_generation(kernel: str) -> None:
    """Older kernels print four flags in front of the time stamp."""
    m = booted(kernel)
    m.signal_msi(0xFEE0_1000, 0x52)
    m.vcpus[0].wrmsr(0x808, 0)
    flags = [text.split("]")[1].split()[0] for text in m.trace.text().splitlines()]
    assert flags == m.trace.contexts()
    more = "." if since(kernel, "5.15") else ""
    assert set(flags) == {"...." + more, "d..1" + more}


def contexts(m: fx.Machine) -> dict[str, str]:
    """Event -> the context of its line."""
    return {line.split(":")[0]: context for line, context in zip(m.trace.lines(), m.trace.contexts(), strict=True)}


@pytest.mark.parametrize("dispatcher", ["python", "compiled"])
@pytest.mark.parametrize("kernel", KERNELS)
def test_fast_path_has_interrupts_off(kernel: str, dispatcher: str) -> None:
    """The signature of a fast IPI, as VMX kernels 5.4 with the patch, 5.6, 5.7, 5.8, 5.10, 6.1 to 7.3 printed it."""
    m = fx.Machine(vcpus=2, kernel=kernel, apicv=False, dispatcher=dispatcher)
    m.boot_x2apic()
    v = m.vcpus[0]
    v.run()
    off = "d..1." if since(kernel, "5.15") else "d..1"
    on = "." * len(off)
    m.trace.enable()
    v.wrmsr(ICR, fx.icr(dest=1, vector=0xFD))
    late = not since(kernel, "5.8")
    fast = dict.fromkeys(("kvm_apic_ipi", "kvm_apic_accept_irq", "kvm_apic", "kvm_msr", "kvm_entry"), off)
    assert contexts(m) == fast | {"kvm_exit": on if late else off}
    m.trace.clear()
    v.wrmsr(ICR, fx.icr(vector=0xFD, shorthand=fx.Shorthand.ALL_BUT_SELF, delivery=1))
    generic = dict.fromkeys(("kvm_apic_ipi", "kvm_apic_accept_irq", "kvm_apic", "kvm_msr"), on)
    assert contexts(m) == generic | {"kvm_exit": on if late else off, "kvm_entry": off}


@pytest.mark.parametrize("dispatcher", ["python", "compiled"])
def test_contexts_of_injection_and_return(dispatcher: str) -> None:
    """Injection stands before interrupts go off; KVM_RUN returns with them on; a host call has them on."""
    m = fx.Machine(vcpus=2, apicv=False, dispatcher=dispatcher)
    m.boot_x2apic()
    v = m.vcpus[0]
    v.run()
    m.trace.enable()
    v.rflags |= 1 << 9
    v.wrmsr(ICR, fx.icr(dest=0, vector=0xFD))
    v.wrmsr(0x80B, 1 << 32)
    v.get_mp_state()
    v.set_msr(ICR, fx.icr(dest=1, delivery=4))
    seen = contexts(m)
    assert [seen[event] for event in ("kvm_inj_virq", "kvm_inj_exception", "kvm_apic_ipi")] == ["....."] * 3


def test_a_wait_is_traced_with_interrupts_off() -> None:
    """Behind the exit, too: 5.10.262 vcpu_enter_guest has them off again by then, and preemption is not on yet."""
    assert context_text(L.TP_WAIT_LAPIC_EXPIRE, L.TP_WAIT_LAPIC_EXPIRE | L.TRACE_PREEMPT_OFF, 4) == "d..1"


def test_preemption_timer_is_traced_with_preemption_off() -> None:
    """restart_apic_timer: a 6.18 host showed all its kvm_hv_timer_state lines as ...1. in host calls and exits."""
    m = booted()
    v = m.vcpus[0]
    v.set_msr(0x832, 0x400EC)
    m.trace.clear()
    v.set_msr(0x6E0, 1 << 40)
    assert contexts(m)["kvm_hv_timer_state"] == "...1."
    v.wrmsr(0x6E0, 1 << 41)
    assert contexts(m)["kvm_hv_timer_state"] == "d..2."


@pytest.mark.parametrize(
    ("kernel", "vendor", "reason", "name"),
    [
        ("seed-v3", "vmx", 7, "PENDING_INTERRUPT"),
        ("5.6", "vmx", 7, "INTERRUPT_WINDOW"),
        ("5.8", "vmx", 74, "0x4a"),
        ("6.1", "vmx", 74, "BUS_LOCK"),
        ("5.10", "svm", 0xA2, "invpcid"),
        ("5.10", "svm", 0x403, "0x403"),
        ("6.1", "svm", 0x403, "vmgexit"),
        ("6.12", "vmx", 85, "0x55"),
        ("6.18", "vmx", 6, "0x6"),
        ("6.18", "vmx", 0x8000_0021, "INVALID_STATE FAILED_VMENTRY"),
        ("6.18", "vmx", 0x0800_0030, "EPT_VIOLATION 0x8000000"),
        ("6.18", "svm", 0x4E, "PF excp"),
        ("6.18", "svm", 0x81, "hypercall"),
        ("6.18", "svm", 0xA6, "idle-halt"),
        ("6.12", "svm", 0xA6, "0xa6"),
        ("6.18", "svm", 0x6D, "write_rt"),
        ("6.18", "svm", 0xFFFF_FFFF, "invalid_guest_state"),
    ],
)
def test_exit_names_by_generation(kernel: str, vendor: str, reason: int, name: str) -> None:
    """Exit names came one by one; VMX prints the upper half of a reason behind the name."""
    m = fx.Machine(vcpus=3, kernel=kernel, vendor=vendor)
    record(m, L.TP_EXIT, (reason, *EXIT_WORDS[1:]))
    assert f" reason {name} rip " in m.trace.lines()[0]
