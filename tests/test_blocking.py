"""A vCPU that waits for SIPI sleeps, is woken, looks, sleeps again; what comes just before the sleep is not lost."""

from __future__ import annotations

from typing import Any

import pytest

import fastexit as fx
from fastexit import regs as R

INIT = fx.icr(dest=1, delivery=fx.DeliveryMode.INIT, level=True)
SIPI = fx.icr(dest=1, vector=0x9A, delivery=fx.DeliveryMode.SIPI)
NMI = fx.icr(dest=1, delivery=fx.DeliveryMode.NMI)


def booted(vendor: str = "vmx") -> fx.Machine:
    m = fx.Machine(vcpus=2, vendor=vendor)
    m.boot_x2apic()
    assert m.vcpus[0].run()
    return m


def waiting(m: fx.Machine) -> fx.Vcpu:
    """vCPU 1 after an INIT, asleep until a SIPI comes."""
    v = m.vcpus[1]
    m.vcpus[0].wrmsr(0x830, INIT)
    assert not v.run()
    return v


@pytest.mark.parametrize("vendor", ["vmx", "svm"])
def test_every_wake_is_reported(vendor: str) -> None:
    """An NMI wakes the sleeper, which still waits; after it has looked, the SIPI wakes it as well."""
    m = booted(vendor)
    v = waiting(m)
    assert m.vcpus[0].wrmsr(0x830, NMI).effects == fx.Effect.WAKE
    assert not v.run()
    assert v.get_mp_state() == fx.MpState.INIT_RECEIVED
    assert m.vcpus[0].wrmsr(0x830, SIPI).effects == fx.Effect.WAKE
    assert v.run()
    assert v.mode == R.IN_GUEST_MODE
    assert v.rip == 0


def test_a_vcpu_that_was_never_started_waits() -> None:
    """KVM_RUN of an application processor before INIT and SIPI does not enter the guest."""
    m = booted()
    v = m.vcpus[1]
    assert not v.run()
    assert v.mode == R.OUTSIDE_GUEST_MODE
    m.vcpus[0].wrmsr(0x830, SIPI)
    assert not v.run(), "a SIPI without INIT is lost"
    m.vcpus[0].wrmsr(0x830, INIT)
    m.vcpus[0].wrmsr(0x830, SIPI)
    assert v.run()
    assert v.run(), "running already"


def test_sipi_between_the_last_look_and_the_sleep(monkeypatch: pytest.MonkeyPatch) -> None:
    """The sender finds nobody asleep and wakes nobody, so the vCPU must see the SIPI before it sleeps."""
    m = booted()
    v = m.vcpus[1]
    assert v.exit(0xFFFF).user is not None  # it was in the guest, and left
    v.wrmsr(0x80B, 0)
    m.vcpus[0].wrmsr(0x830, INIT)
    block = m.dispatcher.block
    seen: list[Any] = []

    def late(vcpu: fx.Vcpu) -> bool:
        if not seen:
            seen.append(m.vcpus[0].wrmsr(0x830, SIPI).effects)
        return block(vcpu)

    monkeypatch.setattr(m.dispatcher, "block", late)
    out = v.wrmsr(0x80B, 0)
    assert seen == [fx.Effect.NONE]
    assert not out.blocked
    assert v.mode == R.IN_GUEST_MODE
    assert v.get_mp_state() == fx.MpState.RUNNABLE


def test_nmis_after_iret() -> None:
    """One NMI is injected and masks the next, which follows when the guest's IRET unmasks."""
    m = booted()
    v = m.vcpus[1]
    v.wrmsr(0x80B, 0)
    for _ in range(2):
        m.vcpus[0].wrmsr(0x830, NMI)
        v.wrmsr(0x80B, 0)
    assert v.nmi_masked
    assert v.events().nmi_pending == 1
    v.nmi_masked = False
    v.wrmsr(0x80B, 0)
    assert v.nmi_masked
    assert v.events().nmi_pending == 0


@pytest.mark.parametrize("vendor", ["vmx", "svm"])
def test_an_iret_asks_for_nothing_with_virtual_nmis(vendor: str) -> None:
    """VMX unmasks NMIs by itself: the exits behind show requests 0, as 6.18 and 7.3 did. SVM intercepts the IRET."""
    m = booted(vendor=vendor)
    v = m.vcpus[1]
    v.wrmsr(0x80B, 0)
    m.vcpus[0].wrmsr(0x830, NMI)
    v.wrmsr(0x80B, 0)
    assert (v.nmi_masked, v.nmi_window) == (True, False)
    v.nmi_masked = False
    assert bool(v.requests & R.REQ_EVENT) is (vendor == "svm")


def test_signal_behind_an_interrupt_window() -> None:
    """The signal cancels the entry, KVM_RUN returns for the window, takes the signal along, and enters next time."""
    m = fx.Machine(vcpus=1, irqchip="split")
    v = m.vcpus[0]
    v.rflags |= R.RFLAGS_IF
    v.request_interrupt_window = True
    v.signal()
    assert not v.run()
    assert v.exit_reason is fx.KvmExit.IRQ_WINDOW_OPEN
    assert v.mode == R.OUTSIDE_GUEST_MODE
    v.request_interrupt_window = False
    assert v.run(), "no signal is left"
    assert v.exit_reason is None
    assert v.mode == R.IN_GUEST_MODE


def test_exit_behind_a_window_and_a_signal() -> None:
    """The same before an exit: KVM_RUN is called until the vCPU is in the guest, then the exit happens."""
    m = fx.Machine(vcpus=1, irqchip="split")
    v = m.vcpus[0]
    v.rflags |= R.RFLAGS_IF
    v.request_interrupt_window = True
    v.signal()
    m.trace.enable()
    out = v.exit(fx.VmxExit.CPUID)
    kinds = [line.partition(":")[0] for line in m.trace.lines()]
    assert kinds[:3] == ["kvm_userspace_exit", "kvm_entry", "kvm_exit"]
    assert out.user is fx.KvmExit.IRQ_WINDOW_OPEN, "the window is open behind the exit, too"
    assert v.mode == R.OUTSIDE_GUEST_MODE


def test_posted_vector_of_a_vcpu_that_waits_for_init() -> None:
    """A device's vector cannot start it: the wake-up vector is for nothing, and it sleeps on."""
    m = fx.Machine(vcpus=2, vtd_pi=True)
    m.boot_x2apic()
    v = m.vcpus[1]
    v.rflags |= R.RFLAGS_IF
    v.load()
    m.pi_update_irte(7, 24, 0xFEE0_1000, 0x41)
    m.device_interrupt(7)
    assert not v.run()
    assert v.get_mp_state() == fx.MpState.UNINITIALIZED
