"""What an embedder's CPU has to do between two instructions: what goes in, in which order, and once."""

from __future__ import annotations

from typing import Any

import pytest

import fastexit as fx
from apics import EOI, ICR, LVTT, SVR, TPR, machine
from fastexit import layout as L
from fastexit import regs as r
from fastexit.jit.declare import load

BOTH = pytest.mark.parametrize("dispatcher", ["python", "compiled"])
VENDORS = pytest.mark.parametrize("vendor", ["vmx", "svm"])
INIT_1, SIPI_1 = (
    fx.icr(dest=1, delivery=fx.DeliveryMode.INIT),
    fx.icr(dest=1, vector=0x9A, delivery=fx.DeliveryMode.SIPI),
)
NMI_1, SMI_1 = fx.icr(dest=1, delivery=fx.DeliveryMode.NMI), fx.icr(dest=1, delivery=fx.DeliveryMode.SMI)


def in_guest(*ids: int, **options: Any) -> tuple[fx.Machine, fx.Vcpu, fx.Vcpu]:
    """vCPUs in the guest that take interrupts, and have taken what began it."""
    m = machine(*(ids or (0, 1)), **options)
    for v in m.vcpus:
        v.set_mp_state(r.MP_RUNNABLE)
        v.rflags |= r.RFLAGS_IF
        assert v.settle()
        assert v.take() is None
    return m, m.vcpus[0], m.vcpus[1]


def events(v: fx.Vcpu) -> list[Any]:
    """All that goes in, while the guest closes its window behind each."""
    got = []
    while v.settle() and (event := v.take()) is not None:
        got.append(event)
        if isinstance(event, fx.Interrupt | fx.ExtInt):
            v.rflags &= ~r.RFLAGS_IF
    return got


@BOTH
@VENDORS
@pytest.mark.parametrize("apicv", [False, True])
def test_an_interrupt_goes_in_once(dispatcher: str, vendor: str, apicv: bool) -> None:
    _, sender, v = in_guest(dispatcher=dispatcher, vendor=vendor, apicv=apicv)
    for vector in (0x51, 0x61):
        sender.wrmsr(ICR, fx.icr(dest=1, vector=vector))
    assert events(v) == [fx.Interrupt(0x61)]
    assert events(v) == []
    v.hw_wrmsr(EOI, 0)
    assert events(v) == []
    v.rflags |= r.RFLAGS_IF
    assert events(v) == [fx.Interrupt(0x51)]


@BOTH
@VENDORS
def test_the_window_opens_when_the_guest_lets_it(dispatcher: str, vendor: str) -> None:
    """Neither with IF clear nor in a shadow; the exit that KVM asked for comes by itself."""
    _, sender, v = in_guest(dispatcher=dispatcher, vendor=vendor)
    v.rflags &= ~r.RFLAGS_IF
    sender.wrmsr(ICR, fx.icr(dest=1, vector=0x51))
    assert (events(v), v.irq_window) == ([], True)
    v.rflags |= r.RFLAGS_IF
    v.shadow = r.SHADOW_STI
    assert (events(v), v.irq_window) == ([], True)
    v.shadow = 0
    assert (events(v), v.irq_window) == ([fx.Interrupt(0x51)], False)


def test_nothing_else_happens_while_something_waits_to_be_taken() -> None:
    """RFLAGS is that from before the interrupt, so an open window would be none."""
    _, sender, v = in_guest()
    sender.wrmsr(ICR, fx.icr(dest=1, vector=0x51))
    assert v.settle()
    sender.wrmsr(ICR, fx.icr(dest=1, vector=0x61))
    exits = v.counters()["exits"]
    assert v.mode == r.EXITING_GUEST_MODE
    for _ in range(3):
        assert v.settle()
    assert v.counters()["exits"] == exits
    assert events(v) == [fx.Interrupt(0x51)]
    assert v.irq_window
    v.rflags |= r.RFLAGS_IF
    assert events(v) == [fx.Interrupt(0x61)]


@BOTH
@VENDORS
def test_init_and_sipi(dispatcher: str, vendor: str) -> None:
    """In their order, and told although the vCPU cannot run; the boot CPU goes on at the reset vector."""
    _, sender, v = in_guest(dispatcher=dispatcher, vendor=vendor)
    assert sender.wrmsr(ICR, INIT_1).targets == ((1, fx.Effect.KICK),)
    assert v.settle()
    assert v.take() == fx.Init()
    assert not v.settle()
    assert (v.take(), v.exit_reason) == (None, None)
    assert sender.wrmsr(ICR, SIPI_1).targets == ((1, fx.Effect.WAKE),)
    assert v.settle()
    assert (v.take(), v.cs, v.rip) == (fx.Sipi(0x9A), 0x9A00, 0)
    sender.wrmsr(ICR, INIT_1)
    sender.wrmsr(ICR, SIPI_1)
    assert events(v) == [fx.Init(), fx.Sipi(0x9A)]
    v.wrmsr(ICR, fx.icr(dest=0, delivery=fx.DeliveryMode.INIT))
    assert events(sender) == [fx.Init()]
    assert (sender.cs, sender.rip) == (0xF000, 0xFFF0)


@BOTH
@VENDORS
def test_nmis(dispatcher: str, vendor: str) -> None:
    """The second one waits for the guest's IRET."""
    _, sender, v = in_guest(dispatcher=dispatcher, vendor=vendor)
    sender.wrmsr(ICR, NMI_1)
    assert events(v) == [fx.Nmi()]
    sender.wrmsr(ICR, NMI_1)
    assert (events(v), v.nmi_window) == ([], True)
    v.nmi_masked = False
    assert events(v) == [fx.Nmi()]
    sender.wrmsr(ICR, fx.icr(dest=1, vector=0x51))
    v.nmi_masked = False
    sender.wrmsr(ICR, NMI_1)
    assert events(v) == [fx.Nmi()]  # whose gate has closed the window
    v.rflags |= r.RFLAGS_IF
    assert events(v) == [fx.Interrupt(0x51)]


@VENDORS
def test_smi(vendor: str) -> None:
    _, sender, v = in_guest(vendor=vendor)
    sender.wrmsr(ICR, SMI_1)
    sender.wrmsr(ICR, fx.icr(dest=1, vector=0x51))
    assert events(v) == [fx.Smi()]
    assert v.smm
    v.rsm()
    assert events(v) == [fx.Interrupt(0x51)]


def test_the_pic_is_another_source() -> None:
    """Its vector comes by ExtINT, in-kernel and from user space."""
    m, v, _ = in_guest()
    for port, value in ((0x20, 0x11), (0x21, 0x30), (0x21, 4), (0x21, 1), (0x21, 0)):
        v.io_write(port, value)
    assert v.set_msr(0x835, 0x700)
    m.irq_line(4, 1)
    assert events(v) == [fx.ExtInt(0x34)]
    m, v, _ = in_guest(irqchip="split")
    assert v.set_msr(0x835, 0x700)
    v.interrupt(0x77)
    assert events(v) == [fx.ExtInt(0x77)]


def test_a_delivery_that_was_cut_short_goes_in_again() -> None:
    """The CPU says so by the exit's vectoring information."""
    _, sender, v = in_guest()
    sender.wrmsr(ICR, fx.icr(dest=1, vector=0x51))
    assert v.settle()
    assert v.take() == fx.Interrupt(0x51)
    v.exit(fx.VmxExit.EPT_VIOLATION, gpa=0xFEE0_0000, size=4, info2=1 << 31 | 0x51)
    assert events(v) == [fx.Interrupt(0x51)]
    sender.wrmsr(ICR, NMI_1)
    assert events(v) == [fx.Nmi()]
    v.exit(fx.VmxExit.EPT_VIOLATION, gpa=0xFEE0_0000, size=4, info2=1 << 31 | 2 << 8 | 2)
    assert events(v) == [fx.Nmi()]


def test_an_entry_that_was_cancelled() -> None:
    """What it would have injected goes in with the next one, and is told of once."""
    m, sender, v = in_guest()
    v.get_mp_state()
    sender.wrmsr(ICR, fx.icr(dest=1, vector=0x51))
    load("inject_events")(m.handle, 1)
    load("make_request")(m.handle, 1, r.REQ_EVENT)
    assert load("enter")(m.handle, 1) == 0
    assert events(v) == [fx.Interrupt(0x51)]
    assert events(v) == []


def test_five_are_remembered() -> None:
    m = machine(0)
    (v,) = m.vcpus
    for vector in range(0x41, 0x48):
        v.set_events(interrupt=vector)
        v.run()
    assert [v.take() for _ in range(6)] == [*(fx.Interrupt(n) for n in range(0x43, 0x48)), None]


def test_what_a_forged_word_can_do() -> None:
    """No kind that there is not comes out as an event of another."""
    m = machine(0)
    (v,) = m.vcpus
    m.mem[L.IRQ + L.IRQ_WENT_IN] = L.NONE
    data = m.snapshot()
    with pytest.raises(ValueError, match="what a CPU has got is out of range"):
        fx.Machine.restore(data)


def test_targets_of_all_that_settled() -> None:
    """Whom each thing that settle() did was for, in one list: an INIT on the way has all others scan the new map."""
    m, sender, v = in_guest(0, 1, 2, 3)
    sender.wrmsr(ICR, INIT_1)
    assert v.settle()
    assert v.targets == tuple((n, fx.Effect.KICK) for n in (0, 2, 3))
    assert v.take() == fx.Init()
    assert not v.settle()
    assert v.targets == ()
    assert {other.mode for other in m.vcpus if other is not v} == {r.EXITING_GUEST_MODE}


def test_a_sleeper() -> None:
    _, sender, v = in_guest()
    assert v.exit(fx.VmxExit.HLT).blocked
    assert not v.settle()
    sender.wrmsr(ICR, fx.icr(dest=1, vector=0x51))
    assert events(v) == [fx.Interrupt(0x51)]


def test_a_notification_moves_something_or_says_no() -> None:
    m = fx.Machine(vcpus=2)
    m.boot_x2apic()
    a, b = m.vcpus
    b.run()
    b.wrmsr(TPR, 0)
    assert not b.hw_notify()
    a.wrmsr(ICR, fx.icr(dest=1, vector=0x51))
    assert b.hw_notify()
    assert not b.hw_notify()


# ---------------------------------------------------------------------------------------------------------------- CR8


@BOTH
@pytest.mark.parametrize("apicv", [False, True])
@pytest.mark.parametrize("x2apic", [False, True])
def test_cr8_is_the_tpr_without_an_exit(dispatcher: str, apicv: bool, x2apic: bool) -> None:
    """VMX has a TPR shadow; what waited for a lower TPR comes with the exit below the threshold."""
    m, sender, v = in_guest(dispatcher=dispatcher, apicv=apicv, x2apic=x2apic)
    exits, rip = v.counters()["exits"], v.rip
    v.cr8 = 7
    assert (v.cr8, v.counters()["exits"], v.rip) == (7, exits, rip + r.INSN_LEN_MOV_CR)
    sender.set_msr(ICR, fx.icr(dest=1, vector=0x51)) if x2apic else m.signal_msi(0xFEE0_1000, 0x51)
    assert events(v) == []
    exits = v.counters()["exits"]
    v.cr8 = 6
    assert v.counters()["exits"] == exits
    v.cr8 = 2
    assert (v.counters()["exits"] == exits) == apicv
    assert events(v) == [fx.Interrupt(0x51)]


@BOTH
def test_cr8_on_svm(dispatcher: str) -> None:
    """Intercepted only while an interrupt waits for a lower TPR."""
    _, sender, v = in_guest(dispatcher=dispatcher, vendor="svm")
    exits = v.counters()["exits"]
    v.cr8 = 7
    assert (v.cr8, v.counters()["exits"]) == (7, exits)
    sender.wrmsr(ICR, fx.icr(dest=1, vector=0x51))
    assert events(v) == []
    exits = v.counters()["exits"]
    v.cr8 = 2
    assert v.counters()["exits"] > exits
    assert events(v) == [fx.Interrupt(0x51)]


@VENDORS
def test_cr8_has_four_bits(vendor: str) -> None:
    _, v, _ = in_guest(vendor=vendor)
    rip = v.rip
    with pytest.raises(fx.GeneralProtection, match="MOV of 0x10 to CR8 on vCPU 0"):
        v.cr8 = 16
    assert (v.rip, v.cr8) == (rip, 0)
    with pytest.raises(TypeError, match="CR8 is str"):
        v.cr8 = "7"  # type: ignore[assignment]


# --------------------------------------------------------------------------------------------- reads of user space's


@BOTH
def test_reads_that_user_space_answers(dispatcher: str) -> None:
    _, v, _ = in_guest(dispatcher=dispatcher, disable_quirks=r.QUIRK_LAPIC_MMIO_HOLE)
    m = v.machine
    reads = [
        (lambda: v.mem_read(0xFEB0_0000, 8), fx.KvmExit.MMIO),
        (lambda: v.mmio_read(0x20), fx.KvmExit.MMIO),
        (lambda: v.mmio_read(0x20, 8), fx.KvmExit.MMIO),
        (lambda: v.hw_mmio_read(0x20), fx.KvmExit.MMIO),
        (lambda: v.io_read(0x3F8), fx.KvmExit.IO),
    ]
    for read, reason in reads:
        got = read()
        assert isinstance(got, fx.UserRead)
        assert (got, got.user, repr(got)) == (0, reason, f"<UserRead {reason.name}>")
        v.complete_access(0x5A)
        assert v.read_data == 0x5A
    assert type(v.io_read(0x21)) is int
    m.user_space_msr = r.MsrExit.UNKNOWN
    got = v.rdmsr(0x1234)
    assert isinstance(got, fx.UserRead)
    assert got.user is fx.KvmExit.X86_RDMSR
    v.complete_msr(data=9)
    assert type(v.rdmsr(LVTT)) is int
    assert type(v.rdmsr(SVR)) is int


def test_no_window_opens_while_gif_is_clear() -> None:
    """SVM: behind CLGI an NMI waits for STGI, whatever the mask says; settle comes to an end all the same."""
    m = fx.Machine(vcpus=1, vendor="svm", kernel="6.6", apicv=False)
    m.boot_x2apic()
    v = m.vcpus[0]
    v.wrmsr(0x808, 0)
    v.rflags |= 0x200
    v.gif = False
    v.nmi()
    assert v.settle()
    assert v.nmi_window
    assert v.take() is None
    v.gif = True
    assert v.settle()
    assert v.take() == fx.Nmi()
