"""HLT: who sleeps, what keeps awake, what wakes, and how each generation comes back into the guest."""

from __future__ import annotations

import struct
from typing import Any

import pytest

import fastexit as fx
from fastexit import layout as L
from fastexit import regs as r
from fastexit.profile import since
from generations import kernels

VENDORS = ("vmx", "svm")
FAST = kernels("6.12")
ICR, TPR, LVTT, TMICT = 0x830, 0x808, 0x832, 0x838
TICK = 0xEC


def booted(kernel: str = "6.18", vendor: str = "vmx", apicv: bool = False, **options: Any) -> fx.Machine:
    """Two vCPUs in the guest; vCPU 1 takes interrupts."""
    m = fx.Machine(vcpus=2, kernel=kernel, vendor=vendor, apicv=apicv, **options)
    m.boot_x2apic()
    for v in m.vcpus:
        v.wrmsr(TPR, 0)
    m.vcpus[1].rflags |= r.RFLAGS_IF
    return m


def hlt(v: fx.Vcpu) -> fx.Outcome:
    return v.exit(fx.SvmExit.HLT if v.machine.vendor == "svm" else fx.VmxExit.HLT)


def interrupt(v: fx.Vcpu) -> fx.Outcome:
    return v.exit(fx.SvmExit.INTERRUPT if v.machine.vendor == "svm" else fx.VmxExit.EXTERNAL_INTERRUPT)


def send(m: fx.Machine, **options: Any) -> fx.Outcome:
    return m.vcpus[0].wrmsr(ICR, fx.icr(dest=1, **options))


def pends(v: fx.Vcpu, vector: int) -> bool:
    """The vector is in IRR or in service."""
    page = v.get_lapic()
    at = 0x10 * (vector // 32)
    words = struct.unpack_from("<I", page, r.APIC_IRR + at) + struct.unpack_from("<I", page, r.APIC_ISR + at)
    return any(word >> vector % 32 & 1 for word in words)


@pytest.mark.parametrize("apicv", [True, False], ids=["apicv", "plain"])
@pytest.mark.parametrize("vendor", VENDORS)
@pytest.mark.parametrize("kernel", fx.profiles())
def test_nothing_to_do(kernel: str, vendor: str, apicv: bool) -> None:
    """The vCPU sleeps behind its HLT; from 6.12 on the fast path has seen to it. An interrupt wakes it for good."""
    m = booted(kernel, vendor, apicv)
    v = m.vcpus[1]
    rip = v.rip
    out = hlt(v)
    assert out.blocked
    assert (out.path is fx.Path.FAST) is (kernel in FAST)
    assert out.completion is (fx.Fastpath.EXIT_HANDLED if kernel in FAST else fx.Fastpath.NONE)
    assert v.rip == rip + 1
    assert v.mode == r.OUTSIDE_GUEST_MODE
    assert v.get_mp_state() == fx.MpState.HALTED
    assert not v.run(), "nothing happened: it sleeps on"
    assert send(m, vector=0x51).effects & (fx.Effect.WAKE | fx.Effect.NOTIFY)
    assert v.run()
    assert v.mode == r.IN_GUEST_MODE
    assert pends(v, 0x51)
    assert v.get_mp_state() == fx.MpState.RUNNABLE


@pytest.mark.parametrize("vendor", VENDORS)
@pytest.mark.parametrize("kernel", fx.profiles())
def test_something_is_pending(kernel: str, vendor: str) -> None:
    """With an interrupt there already a HLT does not sleep. Without APICv its kick makes REENTER a HANDLED."""
    m = booted(kernel, vendor)
    v = m.vcpus[1]
    send(m, vector=0x51)
    out = hlt(v)
    assert not out.blocked
    assert out.completion is (fx.Fastpath.EXIT_HANDLED if kernel in FAST else fx.Fastpath.NONE)
    assert v.mode == r.IN_GUEST_MODE
    assert v.injected == 0x51


@pytest.mark.parametrize("kernel", fx.profiles())
def test_posted_interrupt_before_hlt_reenters(kernel: str) -> None:
    """A posted vector asks for no exit: the fast HLT goes straight back, with the vector synced for delivery."""
    m = booted(kernel, apicv=True)
    v = m.vcpus[1]
    assert send(m, vector=0x51).effects == fx.Effect.NOTIFY
    out = hlt(v)
    assert out.reentered is (kernel in FAST)
    assert not out.blocked
    assert v.mode == r.IN_GUEST_MODE
    assert v.hw_deliver() == 0x51


@pytest.mark.parametrize("vendor", VENDORS)
def test_interrupts_off(vendor: str) -> None:
    """With IF clear no interrupt wakes: the thread looks, and sleeps again. An NMI does wake it."""
    m = booted(vendor=vendor)
    v = m.vcpus[1]
    v.rflags &= ~r.RFLAGS_IF
    assert hlt(v).blocked
    assert send(m, vector=0x51).effects == fx.Effect.WAKE
    assert not v.run()
    assert v.get_mp_state() == fx.MpState.HALTED
    assert send(m, delivery=fx.DeliveryMode.NMI).effects == fx.Effect.WAKE
    assert v.run()
    assert v.nmi_masked
    assert pends(v, 0x51), "it waits for IF"


def test_masked_by_priority() -> None:
    """An interrupt below the TPR wakes nobody for good."""
    m = booted()
    v = m.vcpus[1]
    v.wrmsr(TPR, 0x60)
    assert hlt(v).blocked
    send(m, vector=0x51)
    assert not v.run()
    send(m, vector=0x71)
    assert v.run()
    assert v.injected == 0x71


def test_shadow_ends_with_the_hlt() -> None:
    """STI; HLT: the HLT is the instruction that the shadow covers, so a pending interrupt keeps it awake."""
    m = booted()
    v = m.vcpus[1]
    v.shadow = r.SHADOW_STI
    send(m, vector=0x51)
    out = hlt(v)
    assert not out.blocked
    assert v.shadow == 0
    assert v.injected == 0x51


def test_nmi_while_nmis_are_masked() -> None:
    """A second NMI cannot come in before IRET, so it does not end a HLT inside the handler."""
    m = booted()
    v = m.vcpus[1]
    send(m, delivery=fx.DeliveryMode.NMI)
    interrupt(v)
    assert v.nmi_masked
    assert hlt(v).blocked
    send(m, delivery=fx.DeliveryMode.NMI)
    assert v.run(), "the request wakes it: KVM does not ask whether the NMI can come in"
    assert hlt(v).blocked, "now it pends, and cannot"
    assert v.events().nmi_pending == 1


@pytest.mark.parametrize("vendor", VENDORS)
def test_paravirtual_kick(vendor: str) -> None:
    """KVM_HC_KICK_CPU ends a HLT; one that comes before the HLT is not lost."""
    m = booted(vendor=vendor)
    v = m.vcpus[1]
    v.rflags &= ~r.RFLAGS_IF
    assert hlt(v).blocked
    assert m.vcpus[0].hypercall(r.HC_KICK_CPU, 0, 1).effects == fx.Effect.WAKE
    assert v.run()
    m.vcpus[0].hypercall(r.HC_KICK_CPU, 0, 1)
    assert not hlt(v).blocked
    assert hlt(v).blocked, "it was good for one HLT"


@pytest.mark.parametrize("apicv", [True, False], ids=["apicv", "plain"])
@pytest.mark.parametrize("vendor", VENDORS)
@pytest.mark.parametrize("kernel", fx.profiles())
def test_timer_wakes(kernel: str, vendor: str, apicv: bool) -> None:
    """The tick of a halted vCPU wakes its thread, which delivers it."""
    m = booted(kernel, vendor, apicv)
    v = m.vcpus[1]
    v.wrmsr(LVTT, TICK)
    v.wrmsr(TMICT, 500_000)
    assert hlt(v).blocked
    assert not v.hv_timer, "the preemption timer does not count in the host"
    assert m.next_timer() == 1_000_000
    assert m.set_time(999_999) == []
    ((index, out),) = m.set_time(1_000_000)
    assert (index, out.effects) == (1, fx.Effect.WAKE)
    assert v.run()
    assert pends(v, TICK)
    assert m.set_time(2_000_000) == []


def test_timer_with_interrupts_off() -> None:
    """The tick reaches IRR, but a guest with IF clear sleeps on; a later tick finds the vector there."""
    m = booted()
    v = m.vcpus[1]
    v.rflags &= ~r.RFLAGS_IF
    v.wrmsr(LVTT, r.LVT_TIMER_PERIODIC | TICK)
    v.wrmsr(TMICT, 500_000)
    assert hlt(v).blocked
    for now in (1_000_000, 2_000_000):
        ((_, out),) = m.set_time(now)
        assert out.effects == fx.Effect.WAKE
        assert not v.run()
        assert m.mem[v.own + L.K_TIMER_PENDING] == 0
    assert pends(v, TICK)


def test_ioctl_starts_the_timer_of_a_sleeper() -> None:
    """User space sets the count of a sleeper, which ends its KVM_RUN; in the next one the hrtimer counts, and wakes."""
    m = booted()
    v = m.vcpus[1]
    v.wrmsr(LVTT, TICK)
    assert hlt(v).blocked
    assert v.set_msr(TMICT, 500_000)
    assert (v.hv_timer, m.next_timer()) == (True, None)
    assert not v.run()
    assert (v.hv_timer, m.next_timer()) == (False, 1_000_000)
    ((index, out),) = m.set_time(1_000_000)
    assert (index, out.effects) == (1, fx.Effect.WAKE)
    assert v.run()
    assert pends(v, TICK)


def test_signal_ends_the_sleep() -> None:
    """KVM_RUN returns with EINTR, the vCPU stays halted, and the next KVM_RUN sleeps again."""
    m = booted()
    v = m.vcpus[1]
    assert hlt(v).blocked
    assert v.signal() == fx.Effect.WAKE
    assert not v.run()
    assert v.exit_reason is fx.KvmExit.INTR
    assert v.get_mp_state() == fx.MpState.HALTED
    assert not v.run()
    assert v.exit_reason is None


@pytest.mark.parametrize("kernel", fx.profiles())
def test_single_step_over_hlt(kernel: str) -> None:
    """A debugger's step ends at the HLT in user space; only afterwards does the vCPU sleep, if nothing pends."""
    m = booted(kernel)
    v = m.vcpus[1]
    v.singlestep = True
    out = hlt(v)
    assert out.user is fx.KvmExit.DEBUG
    assert out.completion is (fx.Fastpath.EXIT_USERSPACE if kernel in FAST else fx.Fastpath.NONE)
    assert not out.blocked
    assert not v.run()
    assert v.get_mp_state() == fx.MpState.HALTED


@pytest.mark.parametrize("kernel", FAST)
def test_srcu_of_the_fast_hlt(kernel: str) -> None:
    """6.12 takes SRCU around the emulation of a fast HLT, 6.18 has found that nothing in it needs that."""
    m = booted(kernel, apicv=True)
    v = m.vcpus[1]
    send(m, vector=0x51)
    before = v.counters()["srcu_locks"]
    assert hlt(v).reentered
    assert v.counters()["srcu_locks"] - before == (not since(kernel, "6.18"))


def test_not_the_guests_hlt() -> None:
    """In L2 the fast path leaves HLT alone; an L1 that wants it gets the exit, and nobody sleeps."""
    m = booted()
    v = m.vcpus[1]
    v.nested = True
    v.l1_wants_exits = True
    out = hlt(v)
    assert out.refusal is fx.Refusal.NESTED
    assert not out.blocked
    assert v.counters()["nested_exits"] == 1


def test_init_ends_a_halt() -> None:
    """INIT wakes a halted vCPU, which then waits for SIPI instead."""
    m = booted()
    v = m.vcpus[1]
    assert hlt(v).blocked
    assert send(m, delivery=fx.DeliveryMode.INIT, level=True).effects == fx.Effect.WAKE
    assert not v.run()
    assert v.get_mp_state() == fx.MpState.INIT_RECEIVED
    send(m, delivery=fx.DeliveryMode.SIPI, vector=0x9A)
    assert v.run()
    assert v.rip == 0
