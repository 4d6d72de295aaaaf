"""Exits one by one: what a handler does, which generation has it, whose it is in L2, what an event cut short means."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import fastexit as fx
from fastexit import layout as L
from fastexit import regs as r
from fastexit.profile import since
from generations import kernels

VENDORS = ("vmx", "svm")
IF = 1 << 9
DEVICE = 0xC000_0000
INJECTED_AGAIN = "kvm_inj_virq: IRQ 0x41 [reinjected]"


def booted(vendor: str = "vmx", kernel: str = "6.18", **options: Any) -> fx.Machine:
    """vCPU 0 runs; tracing is on."""
    m = fx.Machine(vcpus=2, vendor=vendor, kernel=kernel, **{"apicv": False} | options)
    m.boot_x2apic()
    m.vcpus[0].run()
    m.trace.enable()
    return m


def reason(m: fx.Machine, vmx: str, svm: str | None = None) -> int:
    return fx.SvmExit[svm or vmx] if m.vendor == "svm" else fx.VmxExit[vmx]


def count(m: fx.Machine, name: str) -> int:
    return sum(line.startswith(f"{name}:") for line in m.trace.lines())


@pytest.mark.parametrize("kernel", fx.profiles())
def test_msr_instructions_with_an_immediate(kernel: str) -> None:
    """6.18 knows them, the write is fast; RIP moves by 9. Before, the exits mean nothing."""
    m = booted(kernel=kernel)
    v = m.vcpus[0]
    rip = v.rip
    out = v.exit(fx.VmxExit.MSR_WRITE_IMM, msr=0x830, value=fx.icr(dest=1, vector=0x41))
    if not since(kernel, "6.18"):
        assert out.user is fx.KvmExit.INTERNAL_ERROR
        return
    assert (out.path, out.accepted, v.rip - rip) == (fx.Path.FAST, 1, 9)
    assert v.exit(fx.VmxExit.MSR_READ_IMM, msr=0x802).path is fx.Path.SLOW
    assert (v.read_data, v.rip - rip) == (0, 18)
    assert v.exit(fx.VmxExit.MSR_WRITE_IMM, msr=0x802, value=1).fault is fx.Fault.GP
    assert v.rip - rip == 18


@pytest.mark.parametrize("vendor", VENDORS)
@pytest.mark.parametrize("kernel", fx.profiles())
def test_invd(kernel: str, vendor: str) -> None:
    """It does nothing but move RIP, in the fast path since 6.18."""
    m = booted(vendor, kernel)
    v = m.vcpus[0]
    rip = v.rip
    out = v.exit(reason(m, "INVD"))
    assert out.path is (fx.Path.FAST if since(kernel, "6.18") else fx.Path.SLOW)
    assert out.reentered is since(kernel, "6.18")
    assert v.rip - rip == 2


@pytest.mark.parametrize("vendor", VENDORS)
@pytest.mark.parametrize(("vmx", "svm"), [("CPUID", None), ("WBINVD", None), ("PAUSE_INSTRUCTION", "PAUSE")])
def test_instructions_that_are_only_skipped(vendor: str, vmx: str, svm: str | None) -> None:
    """RIP moves by 2 and an interrupt shadow ends; no fast path."""
    m = booted(vendor)
    v = m.vcpus[0]
    rip, v.shadow = v.rip, r.SHADOW_STI
    assert v.exit(reason(m, vmx, svm)).path is fx.Path.SLOW
    assert (v.rip - rip, v.shadow) == (2, 0)


def exception(v: fx.Vcpu, vector: int, kind: int = 3, **more: int) -> fx.Outcome:
    return v.exit(fx.VmxExit.EXCEPTION_NMI, intr_info=1 << 31 | kind << 8 | vector, **more)


@pytest.mark.parametrize(("vector", "kind"), [(2, 2), (18, 3)])
def test_nmi_and_machine_check_are_the_hosts(vector: int, kind: int) -> None:
    """The host's handlers have run; the guest goes on without either."""
    m = booted()
    out = exception(m.vcpus[0], vector, kind)
    assert out.user is None
    assert "intr_info 0x00000000" in m.trace.lines()[-1]


@pytest.mark.parametrize("vector", [1, 6, 7, 13, 14, 17])
def test_exceptions_that_go_back_to_the_guest(vector: int) -> None:
    """With an error code where the vector has one."""
    m = booted()
    assert exception(m.vcpus[0], vector).user is None
    code = 0x800 if vector in (13, 14, 17) else 0
    assert f"intr_info 0x{0x8000_0300 | code | vector:08x}" in m.trace.lines()[-1]


@pytest.mark.parametrize("vector", [0, 4, 16, 19])
def test_other_exceptions_are_user_spaces(vector: int) -> None:
    """KVM_EXIT_EXCEPTION."""
    assert exception(booted().vcpus[0], vector).user is fx.KvmExit.EXCEPTION


def test_guest_debug() -> None:
    """#DB leaves with KVM_EXIT_DEBUG while user space debugs, else it is the guest's; #BP exits for a debugger only."""
    v = booted().vcpus[0]
    assert exception(v, 1).user is None
    v.singlestep = True
    assert exception(v, 1).user is fx.KvmExit.DEBUG
    assert exception(v, 3).user is fx.KvmExit.DEBUG


def test_exception_during_delivery() -> None:
    """An exit by an exception while an event is delivered is an error, except for a page fault or the host's own."""
    m = booted()
    v = m.vcpus[0]
    assert exception(v, 12, info2=0x8000_0041).user is fx.KvmExit.INTERNAL_ERROR
    assert v.run()
    assert INJECTED_AGAIN in m.trace.lines()
    m.trace.clear()
    assert exception(v, 2, 2, info2=0x8000_0041).user is None
    assert INJECTED_AGAIN in m.trace.lines()
    m.trace.clear()
    assert exception(v, 14, info2=0x8000_0041).user is None
    assert INJECTED_AGAIN not in m.trace.lines(), "the page fault takes its place"


def test_nmi_window() -> None:
    """Of two NMIs the second waits for the window that follows the first one's IRET."""
    m = booted()
    v = m.vcpus[0]
    for _ in range(2):
        m.vcpus[1].wrmsr(0x830, fx.icr(dest=0, delivery=4))
    v.exit(fx.VmxExit.EXTERNAL_INTERRUPT)
    assert v.nmi_window
    m.mem[v.own + L.K_NMI_MASKED] = 0  # the guest's IRET, which VMX sees by itself
    v.exit(fx.VmxExit.NMI_WINDOW)
    assert (v.nmi_window, v.nmi_masked, v.events().nmi_pending) == (False, True, 0)


def test_iret_on_svm() -> None:
    """SVM has no window but the IRET intercept, which unmasks NMIs."""
    m = booted("svm")
    v = m.vcpus[0]
    for _ in range(2):
        m.vcpus[1].wrmsr(0x830, fx.icr(dest=0, delivery=4))
    v.exit(fx.SvmExit.INTERRUPT)
    v.exit(fx.SvmExit.IRET)
    assert (v.nmi_masked, v.events().nmi_pending) == (True, 0)


def mov_cr8(m: fx.Machine, value: int | None) -> fx.Outcome:
    v = m.vcpus[0]
    if m.vendor == "svm":
        return v.exit(fx.SvmExit.READ_CR8 if value is None else fx.SvmExit.WRITE_CR8, value=value or 0)
    return v.exit(fx.VmxExit.CR_ACCESS, info1=0x18 if value is None else 0x08, value=value or 0)


@pytest.mark.parametrize("vendor", VENDORS)
def test_cr8(vendor: str) -> None:
    """A write becomes TPR[7:4] and clears TPR[3:0]; a read gives it back; reserved bits are #GP. 3 bytes."""
    m = booted(vendor)
    v = m.vcpus[0]
    v.wrmsr(0x808, 0x3F)
    rip = v.rip
    assert mov_cr8(m, None).fault is None
    assert v.read_data == 3
    assert mov_cr8(m, 3).fault is None
    assert (v.get_msr(0x808), v.cr8, v.rip - rip) == (0x30, 3, 6)
    assert mov_cr8(m, 0x10).fault is fx.Fault.GP
    assert (v.cr8, v.rip - rip) == (3, 6)
    assert mov_cr8(m, 0x100).fault is (fx.Fault.GP if vendor == "svm" else None), "VMX looks at 8 bits only"


def test_lower_cr8_lets_an_interrupt_in() -> None:
    """Like any write to TPR."""
    m = booted()
    v = m.vcpus[0]
    v.rflags |= IF
    mov_cr8(m, 15)
    m.vcpus[1].wrmsr(0x830, fx.icr(dest=0, vector=0x41))
    mov_cr8(m, 4)
    assert v.injected is None
    mov_cr8(m, 3)
    assert v.injected == 0x41


@pytest.mark.parametrize("vendor", VENDORS)
def test_device_and_fast_mmio(vendor: str) -> None:
    """A write to a device is user space's, unless an ioeventfd listens there: then only RIP moves."""
    m = booted(vendor)
    v = m.vcpus[0]
    exit = reason(m, "EPT_MISCONFIG", "NPF")
    assert v.exit(exit, gpa=DEVICE, write=True).user is fx.KvmExit.MMIO
    m.fast_mmio.add(DEVICE)
    rip = v.rip
    assert v.exit(exit, gpa=DEVICE, write=True, length=3).user is None
    assert v.rip - rip == 3
    assert f"kvm_fast_mmio: fast mmio at gpa 0x{DEVICE:x}" in m.trace.lines()


@pytest.mark.parametrize("quirk", [True, False])
def test_apic_page_in_x2apic_mode(quirk: bool) -> None:
    """KVM swallows accesses to the page that is not there; with the quirk disabled they are user space's."""
    m = booted(disable_quirks=0 if quirk else r.QUIRK_LAPIC_MMIO_HOLE)
    out = m.vcpus[0].mmio_write(0x80, 0x20)
    assert out.user is (None if quirk else fx.KvmExit.MMIO)
    assert m.vcpus[0].get_msr(0x808) == 0


def serve(m: fx.Machine, vector: int, level: bool = False) -> fx.Vcpu:
    """vCPU 0 has the vector in service."""
    v = m.vcpus[0]
    m.vcpus[1].wrmsr(0x830, fx.icr(dest=0, vector=vector, level=True, trigger_level=level))
    v.rflags |= IF
    v.exit(reason(m, "EXTERNAL_INTERRUPT", "INTERRUPT"))
    assert v.injected == vector
    m.trace.clear()
    return v


@pytest.mark.parametrize("level", [True, False])
def test_eoi_for_kvms_ioapic(level: bool) -> None:
    """Only vectors of its routing; the trigger mode is TMR's."""
    m = booted()
    m.vcpus[0].ioapic_handled = {0x41}
    for vector in (0x51, 0x41):
        v = serve(m, vector, level)
        assert v.wrmsr(0x80B, 0).user is None
    assert (v.ioapic_eoi, v.counters()["ioapic_eois"]) == ((0x41, level), 1)


@pytest.mark.parametrize("vendor", VENDORS)
def test_eoi_for_user_spaces_ioapic(vendor: str) -> None:
    """KVM_EXIT_IOAPIC_EOI before the next entry, once."""
    m = booted(vendor, irqchip="split")
    m.vcpus[0].ioapic_handled = {0x41}
    v = serve(m, 0x41)
    assert v.wrmsr(0x80B, 0).user is fx.KvmExit.IOAPIC_EOI
    assert v.ioapic_eoi is not None
    assert v.ioapic_eoi[0] == 0x41
    assert m.trace.lines()[-1] == "kvm_userspace_exit: reason KVM_EXIT_IOAPIC_EOI (26)"
    assert v.run()


@pytest.mark.parametrize("api", [0, 4, 8])
def test_suppressed_eoi_broadcast(api: int) -> None:
    """SVR bit 12 keeps the IOAPIC out where user space enabled that; otherwise KVM broadcasts all the same."""
    m = booted(irqchip="split", x2apic_api=api)
    m.vcpus[0].set_msr(0x80F, 0x11FF)
    m.vcpus[0].ioapic_handled = {0x41}
    v = serve(m, 0x41)
    assert v.wrmsr(0x80B, 0).user is (None if api == 4 else fx.KvmExit.IOAPIC_EOI)


def test_tpr_access_report() -> None:
    """Every access to TPR in the page leaves with KVM_EXIT_TPR_ACCESS, after it was done."""
    m = fx.Machine(vcpus=1, apicv=False)
    v = m.vcpus[0]
    v.mmio_write(0xF0, 0x1FF)
    v.report_tpr_access = True
    assert v.mmio_write(0x80, 0x20).user is fx.KvmExit.TPR_ACCESS
    assert v.mmio_write(0xF0, 0x1FF).user is None
    v.mmio_read(0x80)
    assert (v.read_data, v.exit_reason) == (0x20, fx.KvmExit.TPR_ACCESS)
    v.report_tpr_access = False
    assert v.mmio_write(0x80, 0x30).user is None


def test_pv_eoi() -> None:
    """One interrupt in service, nobody behind it: the guest clears a flag instead of writing EOI."""
    m = booted()
    m.vcpus[0].wrmsr(r.MSR_KVM_PV_EOI_EN, 1)
    v = serve(m, 0x41)
    assert v.pv_eoi
    v.pv_eoi = False
    v.exit(fx.VmxExit.EXTERNAL_INTERRUPT)
    at = m.trace.lines().index("kvm_eoi: apicid 0 vector 65")
    assert m.trace.lines()[at + 1] == "kvm_pv_eoi: apicid 0 vector 65"
    v = serve(m, 0x51)
    v.exit(fx.VmxExit.EXTERNAL_INTERRUPT)
    assert (count(m, "kvm_eoi"), v.get_msr(0x812)) == (0, 1 << 17), "a guest that did not take the offer"
    m.vcpus[0].ioapic_handled = {0x61}
    v.eoi()
    assert not serve(m, 0x61).pv_eoi, "the IOAPIC wants its EOI"


@pytest.mark.parametrize("retpoline", [True, False])
@pytest.mark.parametrize("vendor", VENDORS)
def test_indirect_calls(vendor: str, retpoline: bool) -> None:
    """Common exits are compared by name where an indirect call is dear; CPUID is none of them."""
    m = booted(vendor, retpoline=retpoline)
    v = m.vcpus[0]
    before = v.counters()["indirect_calls"]
    v.wrmsr(0x80B, 0)
    v.exit(reason(m, "EXTERNAL_INTERRUPT", "INTERRUPT"))
    v.exit(reason(m, "CPUID"))
    assert v.counters()["indirect_calls"] - before == (1 if retpoline else 3)


@pytest.mark.parametrize(
    ("vendor", "name", "reflected"),
    [
        ("vmx", "CPUID", True),
        ("vmx", "MSR_WRITE", True),
        ("vmx", "EXTERNAL_INTERRUPT", False),
        ("vmx", "PREEMPTION_TIMER", False),
        ("vmx", "NOTIFY", False),
        ("svm", "CPUID", True),
        ("svm", "INTERRUPT", False),
        ("svm", "NMI", False),
        ("svm", "NPF", False),
    ],
)
def test_exits_of_l2(vendor: str, name: str, reflected: bool) -> None:
    """L1 gets what it intercepts, with nothing skipped, and on SVM with GIF clear; some exits are L0's alone."""
    m = booted(vendor)
    v = m.vcpus[0]
    v.nested = True
    rip = v.rip
    v.exit(reason(m, name))
    assert (v.nested, v.counters()["nested_exits"]) == (not reflected, int(reflected))
    assert v.gif is not (reflected and vendor == "svm")
    if reflected:
        assert v.rip == rip


@pytest.mark.parametrize(("vector", "kind", "debugger", "reflected"), [(2, 2, 0, 0), (1, 3, 0, 1), (1, 3, 1, 0)])
def test_exceptions_of_l2(vector: int, kind: int, debugger: int, reflected: int) -> None:
    """The host's NMI and a debugger's #DB are L0's."""
    v = booted().vcpus[0]
    v.nested, v.singlestep = True, bool(debugger)
    out = exception(v, vector, kind)
    assert v.counters()["nested_exits"] == reflected
    assert out.user is (fx.KvmExit.DEBUG if debugger else None)


@pytest.mark.parametrize("vendor", VENDORS)
def test_event_cut_short(vendor: str) -> None:
    """The next entry injects it again; the kvm_exit line does not show the request that this makes."""
    m = booted(vendor)
    v = m.vcpus[0]
    if vendor == "svm":
        v.exit(fx.SvmExit.NMI, intr_info=0x8000_0041)
    else:
        exception(v, 2, 2, info2=0x8000_0041)
    lines = m.trace.lines()
    assert lines[-2] == INJECTED_AGAIN
    assert "intr_info 0x80000041" in lines[-1]
    assert "requests 0x0000000000000000" in lines[0]
    assert v.injected is None, "it was delivered before"


def test_external_interrupt_of_svm_has_no_host_vector() -> None:
    """EXITINTINFO is the guest's event, even with the number of the host's wake-up vector."""
    m = booted("svm")
    out = m.vcpus[0].exit(fx.SvmExit.INTERRUPT, intr_info=0x8000_00F1)
    assert out.effects == fx.Effect.NONE
    assert "kvm_inj_virq: IRQ 0xf1 [reinjected]" in m.trace.lines()


@pytest.mark.parametrize("kind", [1, 5, 7])
def test_unknown_event_is_dropped(kind: int) -> None:
    """KVM injects again only what it knows."""
    m = booted()
    exception(m.vcpus[0], 2, 2, info2=1 << 31 | kind << 8 | 0x41)
    assert "intr_info 0x00000000" in m.trace.lines()[-1]


@pytest.mark.parametrize("vendor", VENDORS)
def test_nmi_cut_short(vendor: str) -> None:
    """It is injected again, by VMX with vector 2, by SVM with none, and masks NMIs as before."""
    m = booted(vendor)
    v = m.vcpus[0]
    if vendor == "svm":
        v.exit(fx.SvmExit.NMI, intr_info=0x8000_0202)
    else:
        exception(v, 2, 2, info2=0x8000_0202)
    assert f"intr_info {'0x80000200' if vendor == 'svm' else '0x80000202'}" in m.trace.lines()[-1]
    assert v.nmi_masked


def test_msr_write_during_delivery() -> None:
    """No instruction can exit while an event is delivered: KVM_EXIT_INTERNAL_ERROR, too late for a fast IPI."""
    m = booted()
    v = m.vcpus[0]
    out = v.exit(fx.VmxExit.MSR_WRITE, rcx=0x808, info2=0x8000_0041)
    assert out.user is fx.KvmExit.INTERNAL_ERROR
    assert m.trace.lines()[-1] == "kvm_userspace_exit: reason KVM_EXIT_INTERNAL_ERROR (17)"


@pytest.mark.parametrize("kernel", kernels("5.8"))
@pytest.mark.parametrize(("vendor", "name"), [("vmx", "EPT_MISCONFIG"), ("vmx", "EPT_VIOLATION"), ("svm", "NPF")])
def test_device_access_during_delivery(vendor: str, name: str, kernel: str) -> None:
    """A stack in a device: 6.18 refuses on every way, before only the misconfiguration was looked at."""
    m = booted(vendor, kernel)
    v = m.vcpus[0]
    m.fast_mmio.add(DEVICE)
    info = {"intr_info" if vendor == "svm" else "info2": 0x8000_0041}
    out = v.exit(reason(m, name, name), gpa=DEVICE, **info)
    error = since(kernel, "6.18") or name == "EPT_MISCONFIG"
    assert (out.user is fx.KvmExit.INTERNAL_ERROR) is error


def test_failed_entry_queues_nothing() -> None:
    """Vectoring information of an entry that failed is not looked at."""
    m = booted()
    v = m.vcpus[0]
    v.exit(fx.VmxExit.INVALID_STATE, failed_entry=True, info2=0x8000_0041)
    assert v.events().interrupt is None


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("IO_INSTRUCTION", "KVM_EXIT_IO (2)"),
        ("TRIPLE_FAULT", "KVM_EXIT_SHUTDOWN (8)"),
        ("RDPMC", "KVM_EXIT_INTERNAL_ERROR (17)"),
    ],
)
def test_userspace_exit_lines(name: str, text: str) -> None:
    """The last line of a KVM_RUN names run->exit_reason; a signal is a restart."""
    m = booted()
    v = m.vcpus[0]
    v.exit(fx.VmxExit[name])
    assert m.trace.lines()[-1] == f"kvm_userspace_exit: reason {text}"
    v.run()
    v.signal()
    v.exit(fx.VmxExit.EXTERNAL_INTERRUPT)
    assert m.trace.lines()[-1] == "kvm_userspace_exit: reason restart (4)"


@pytest.mark.parametrize("vendor", VENDORS)
def test_a_page_read_that_is_user_spaces_gives_0(vendor: str) -> None:
    """Not what an earlier read left behind, at either door."""
    m = fx.Machine(vcpus=1, vendor=vendor, apicv=False, disable_quirks=r.QUIRK_LAPIC_MMIO_HOLE)
    v = m.vcpus[0]
    assert v.mmio_read(r.APIC_LVR) == r.APIC_VERSION
    m.boot_x2apic()
    assert v.mmio_read(r.APIC_LVR) == 0
    assert v.rdmsr(0x803) == r.APIC_VERSION
    reason = m.dispatcher.vendor.mmio_reason
    (outcome,) = m.run(np.array([(0, reason, 0, 4, 0, 0xFEE0_0000 + r.APIC_LVR)], dtype=fx.EXIT))
    assert (outcome["value"], fx.OUTCOMES[int(outcome["code"])].user) == (0, fx.KvmExit.MMIO)
