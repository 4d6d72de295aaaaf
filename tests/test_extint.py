"""KVM_INTERRUPT: the vector of user space's PIC on its way through LINT0, and windows that it has to wait for."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import fastexit as fx
from fastexit import regs as r
from real_kvm import kvm

VENDORS = ("vmx", "svm")
LINT0, IF = 0x835, 1 << 9
OPEN = fx.KvmExit.IRQ_WINDOW_OPEN


def booted(vendor: str = "vmx", **options: Any) -> fx.Machine:
    """A split irqchip; vCPU 0, whose LINT0 is ExtINT, runs with interrupts on."""
    m = fx.Machine(vcpus=2, vendor=vendor, irqchip="split", **{"apicv": False} | options)
    m.boot_x2apic()
    m.vcpus[0].set_msr(LINT0, 0x700)
    m.vcpus[0].rflags |= IF
    m.vcpus[0].run()
    return m


def run(v: fx.Vcpu) -> fx.Outcome:
    return v.exit(fx.SvmExit.INTERRUPT if v.machine.vendor == "svm" else fx.VmxExit.EXTERNAL_INTERRUPT)


def window(v: fx.Vcpu) -> fx.Outcome:
    return v.exit(fx.SvmExit.VINTR if v.machine.vendor == "svm" else fx.VmxExit.INTERRUPT_WINDOW)


@pytest.mark.parametrize("vendor", VENDORS)
@pytest.mark.parametrize("apicv", [True, False])
def test_vector_comes_in(vendor: str, apicv: bool) -> None:
    """The next entry injects it, with APICv too; neither IRR nor ISR has seen it, and it is used up."""
    m = booted(vendor, apicv=apicv)
    v = m.vcpus[0]
    v.interrupt(0x31)
    m.trace.enable()
    assert v.run()
    assert (v.injected, v.pending(), v.eoi()) == (0x31, None, None)
    assert "kvm_inj_virq: IRQ 0x31" in m.trace.lines()
    v.interrupt(0x32)
    assert v.run()
    assert v.injected == 0x32


def test_goes_before_the_local_apic() -> None:
    """ExtINT is first whatever its vector; the APIC's interrupt behind it gets a window."""
    m = booted()
    v = m.vcpus[0]
    m.vcpus[1].wrmsr(0x830, fx.icr(dest=0, vector=0xFD))
    v.interrupt(0x31)
    v.run()
    assert (v.injected, v.irq_window) == (0x31, True)
    window(v)
    assert (v.injected, v.irq_window) == (0xFD, False)


@pytest.mark.parametrize("hv_timer", [True, False])
def test_delivered_before_the_entry_leaves_again(hv_timer: bool) -> None:
    """An entry may be left at once: the preemption timer has run out, or an injection that a tick cut short goes first.

    The gate has cleared IF by then, so that what is next waits for a window.
    """
    m = booted(hv_timer=hv_timer)
    v = m.vcpus[0]
    m.vcpus[1].wrmsr(0x830, fx.icr(dest=0, vector=0xFD))
    v.set_msr(0x832, 0x41)
    v.set_msr(0x838, 1)
    m.set_time(m.time + 1000)
    v.interrupt(0x31)
    assert v.run()
    assert (v.injected, v.irq_window, v.rflags & IF) == (0x31, True, 0)
    assert v.pending() == 0xFD


@pytest.mark.parametrize("lint0", [0x10700, 0x10000, 0x000, 0x400])
def test_lint0_in_the_way(lint0: int) -> None:
    """Masked or no ExtINT: the vector waits until LINT0 lets it through."""
    v = booted().vcpus[0]
    v.set_msr(LINT0, lint0)
    v.interrupt(0x31)
    v.run()
    assert v.injected is None
    with pytest.raises(ValueError, match="vector 49 still waits"):
        v.interrupt(0x32)
    v.set_msr(LINT0, 0x700)
    v.set_events()  # asks for an EVENT
    v.run()
    assert v.injected == 0x31


def test_disabled_apic_is_not_in_the_way() -> None:
    """With APICBASE.EN clear LINT0 does not count."""
    v = booted().vcpus[0]
    v.set_msr(LINT0, 0x10000)
    v.set_msr(0x1B, v.apic_base & ~(r.APICBASE_EN | r.APICBASE_EXTD))
    v.interrupt(0x31)
    v.run()
    assert v.injected == 0x31


@pytest.mark.parametrize("vendor", VENDORS)
def test_interrupts_off(vendor: str) -> None:
    """With IF clear KVM asks for a window, whose exit injects."""
    v = booted(vendor).vcpus[0]
    v.rflags &= ~IF
    v.interrupt(0x31)
    v.run()
    assert (v.injected, v.irq_window) == (None, True)
    v.rflags |= IF
    window(v)
    assert (v.injected, v.irq_window) == (0x31, False)


def test_avic_is_off_while_the_window_is_awaited() -> None:
    """AVIC cannot inject ExtINT: IRQWIN inhibits it on all vCPUs until the window has opened."""
    m = booted("svm", apicv=True)
    v = m.vcpus[0]
    v.rflags &= ~IF
    v.interrupt(0x31)
    v.run()
    assert m.inhibits == {r.Inhibit.IRQWIN}
    assert not v.apicv
    v.rflags |= IF
    window(v)
    assert m.inhibits == set()
    assert v.injected == 0x31
    run(v)
    assert v.apicv


def test_refusals() -> None:
    """A second vector while the first one waits, a PIC that is KVM's, no vector at all."""
    v = booted().vcpus[0]
    v.interrupt(0x31)
    with pytest.raises(ValueError, match="EEXIST"):
        v.interrupt(0x31)
    with pytest.raises(ValueError, match="ENXIO"):
        fx.Machine(vcpus=1).vcpus[0].interrupt(0x31)
    with pytest.raises(ValueError, match="vector"):
        v.interrupt(256)


def test_ends_a_halt() -> None:
    """A halted vCPU with interrupts on goes on for it; with interrupts off it sleeps on."""
    for flags, wakes in ((IF, True), (0, False)):
        v = booted().vcpus[0]
        v.rflags = 2 | flags
        assert v.exit(fx.VmxExit.HLT).blocked
        v.interrupt(0x31)
        assert v.run() is wakes
        assert v.injected == (0x31 if wakes else None)


@pytest.mark.parametrize("vendor", VENDORS)
def test_user_space_waits_for_a_window(vendor: str) -> None:
    """KVM_EXIT_IRQ_WINDOW_OPEN as soon as the guest would take an interrupt and none of user space's waits."""
    m = booted(vendor)
    v = m.vcpus[0]
    v.rflags &= ~IF
    v.request_interrupt_window = True
    assert run(v).user is None
    assert v.irq_window
    v.rflags |= IF
    m.trace.enable()
    assert window(v).user is OPEN
    assert v.exit_reason is OPEN
    assert m.trace.lines()[-1] == "kvm_userspace_exit: reason KVM_EXIT_IRQ_WINDOW_OPEN (7)"
    v.interrupt(0x31)
    assert v.run()
    assert v.injected == 0x31
    assert run(v).user is OPEN, "the next one may come"
    v.request_interrupt_window = False
    assert run(v).user is None


def test_no_window_while_user_space_could_not_inject() -> None:
    """LINT0 masked: there is nothing that user space could send through it."""
    v = booted().vcpus[0]
    v.set_msr(LINT0, 0x10700)
    v.request_interrupt_window = True
    assert run(v).user is None


def test_no_window_with_an_event_under_way() -> None:
    """An exception or an event cut short is delivered first; then the window counts."""
    m = booted()
    v = m.vcpus[0]
    v.request_interrupt_window = True
    assert v.wrmsr(0x802, 0).fault is fx.Fault.GP
    out = v.exit(fx.VmxExit.EXCEPTION_NMI, intr_info=0x8000_0202, info2=0x8000_0041)
    assert out.user is None
    assert run(v).user is OPEN


@pytest.mark.parametrize("vendor", VENDORS)
def test_no_window_where_the_pic_is_kvms(vendor: str) -> None:
    v = fx.Machine(vcpus=1, vendor=vendor, irqchip="full").vcpus[0]
    v.request_interrupt_window = True
    assert not v.request_interrupt_window
    v.rflags |= IF
    assert run(v).user is None


@pytest.mark.parametrize("dispatcher", ["python", "compiled"])
@pytest.mark.parametrize(("kernel", "ends"), [("7.0", True), ("7.1", False), ("7.3", False)])
def test_a_window_that_is_asked_for_and_served_for_ever(kernel: str, ends: bool, dispatcher: str) -> None:
    """From 7.1 on what AVIC delivers again serves user space's window; each cancels the entry till a signal comes."""

    def machine() -> fx.Vcpu:
        m = fx.Machine(vcpus=1, vendor="svm", irqchip="split", kernel=kernel, dispatcher=dispatcher)
        v = m.vcpus[0]
        v.request_interrupt_window = True
        v.set_events(interrupt=0x24)
        return v

    v = machine()
    assert v.run() is ends
    assert v.exit_reason is (None if ends else fx.KvmExit.INTR)
    assert v.request_interrupt_window
    v = machine()
    assert v.rdmsr(0x1B) & r.APICBASE_EN, "who says that it runs guest code asks for no window"
    assert v.request_interrupt_window is ends
    row = np.zeros(1, fx.EXIT)
    row["reason"], row["msr"] = fx.SvmExit.MSR, 0x1B
    v = machine()
    v.machine.run(row)
    assert v.request_interrupt_window is ends


@pytest.mark.parametrize("vendor", VENDORS)
def test_a_window_is_asked_for_by_whoever_could_inject(vendor: str) -> None:
    """kvm_cpu_accept_dm_intr, whether the guest takes interrupts now or not: an entry leaves again at once, if so."""
    v = booted(vendor).vcpus[0]
    v.request_interrupt_window = True
    assert run(v).user is OPEN
    assert v.run()
    assert v.irq_window
    assert window(v).user is OPEN
    v.interrupt(0x31)
    assert v.run()
    assert (v.injected, v.irq_window) == (0x31, False), "its place was taken as the entry began"
    v.set_msr(LINT0, 0x10700)
    assert v.run()
    assert not v.irq_window


@pytest.mark.parametrize("vendor", VENDORS)
def test_settle_ends_where_user_space_may_inject(vendor: str) -> None:
    v = booted(vendor).vcpus[0]
    v.request_interrupt_window = True
    assert run(v).user is OPEN
    assert not v.settle()
    assert v.exit_reason is OPEN
    v.request_interrupt_window = False
    assert v.settle()


@kvm
@pytest.mark.parametrize(("lint0", "interrupts"), [(0x700, True), (0x700, False), (0x10700, True)])
def test_windows_are_like_the_kernels(lint0: int, interrupts: bool) -> None:
    """A guest that does nothing that exits leaves KVM_RUN by its window, or never."""
    with fx.kvm.Oracle(1, irqchip="split") as vm:
        page = bytearray(vm.vcpus[0].get_lapic())
        page[0xF0:0xF4], page[0x350:0x354] = (0x1FF).to_bytes(4, "little"), lint0.to_bytes(4, "little")
        m = fx.Machine(1, **vm.keywords)
        v = m.vcpus[0]
        v.set_lapic(bytes(page))
        v.rflags = 2 | IF * interrupts
        v.request_interrupt_window = True
        assert v.run()
        opens = v.irq_window and interrupts
        vm.vcpus[0].set_lapic(bytes(page))
        guest = vm.vcpus[0].ready()
        guest._run.request_interrupt_window = 1
        with guest.limit(30 if opens else 0.3), pytest.raises((RuntimeError, TimeoutError)) as stopped:
            guest.execute(b"\xeb\xfe", interrupts=interrupts)
    assert ("KVM_EXIT 7" in str(stopped.value)) is opens
    assert (window if opens else run)(v).user is (OPEN if opens else None)
