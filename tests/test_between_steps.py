"""Something happens between any two steps of the run loop: it is neither lost nor doubled.

Every step of the dispatcher is a method. Before one of them, once, another vCPU, a device, the clock or a signal acts;
then the vCPU goes on, and in the end what came has reached the guest exactly once.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest

import fastexit as fx
from fastexit import layout as L
from fastexit import regs as r
from fastexit.jit import declare
from fastexit.kernels import steps
from fastexit.profile import since
from steps import STEPS

ICR, TPR, LVTT, TMICT, TDCR, EOI = 0x830, 0x808, 0x832, 0x838, 0x83E, 0x80B
FIRST, LATE, TICK = 0x41, 0x51, 0x61
KERNELS = ("5.6", "5.8", "6.18")
Act = Callable[[fx.Machine], Any]
INTERPRETED = os.environ.get("NUMBA_DISABLE_JIT", "0") not in ("", "0")


def booted(kernel: str = "6.18", vendor: str = "vmx", apicv: bool = False, **options: Any) -> fx.Machine:
    """vCPU 1 in the guest with interrupts on; vCPU 0 acts on it."""
    m = fx.Machine(vcpus=2, kernel=kernel, vendor=vendor, apicv=apicv, **options)
    m.boot_x2apic()
    for v in m.vcpus:
        v.wrmsr(TPR, 0)
    m.vcpus[1].rflags |= r.RFLAGS_IF
    return m


def send(m: fx.Machine, **options: Any) -> fx.Outcome:
    return m.vcpus[0].wrmsr(ICR, fx.icr(dest=1, **options))


def external(v: fx.Vcpu) -> fx.Outcome:
    return v.exit(fx.SvmExit.INTERRUPT if v.machine.vendor == "svm" else fx.VmxExit.EXTERNAL_INTERRUPT)


def between(monkeypatch: pytest.MonkeyPatch, m: fx.Machine, step: str, act: Act) -> list[Any]:
    """Lets ``act`` happen before the first call of the step for vCPU 1; what it gave, once it has."""
    real = getattr(m.dispatcher, step)
    seen: list[Any] = []

    def wrapped(v: fx.Vcpu, *args: Any, **kwargs: Any) -> Any:
        if v.index == 1 and not seen:
            seen.append(None)
            seen[0] = act(m)
        return real(v, *args, **kwargs)

    monkeypatch.setattr(m.dispatcher, step, wrapped)
    return seen


def host_reacts(m: fx.Machine, v: fx.Vcpu) -> None:
    """What the effects ask of the host, in the worst order: a vCPU that runs is kicked or notified, a sleeper woken."""
    if v.mode == r.OUTSIDE_GUEST_MODE:
        v.run()
    elif m.apicv:
        v.hw_notify()
    if v.mode == r.EXITING_GUEST_MODE:
        external(v)


def taken(m: fx.Machine, v: fx.Vcpu) -> list[int]:
    """All vectors that the guest takes from here on, each ended by an EOI."""
    vectors: list[int] = []
    for _ in range(10):
        vector = v.hw_deliver() if v.apicv and m.vendor == "vmx" else None
        if vector is None and not (v.apicv and m.vendor == "vmx"):
            vector = v.eoi()
            external(v)
        elif vector is not None:
            v.eoi()
        if vector is None:
            return vectors
        vectors.append(vector)
    raise AssertionError(f"the guest never stops taking {vectors}")


def exits(v: fx.Vcpu) -> dict[str, Callable[[], fx.Outcome]]:
    """A slow exit in every generation, the same with a request, a fast one that it ends, one that may sleep."""
    hlt = fx.SvmExit.HLT if v.machine.vendor == "svm" else fx.VmxExit.HLT

    def request() -> None:
        declare.load("make_request")(v.machine.handle, v.index, r.REQ_EVENT)

    def asked() -> fx.Outcome:
        request()
        return external(v)

    def icr() -> fx.Outcome:
        request()
        return v.wrmsr(ICR, fx.icr(dest=0, vector=0x33))

    return {"slow": lambda: external(v), "asked": asked, "icr": icr, "hlt": lambda: v.exit(hlt)}


@pytest.mark.parametrize("kind", ["slow", "asked", "icr", "hlt"])
@pytest.mark.parametrize(("vendor", "apicv"), [("vmx", True), ("vmx", False), ("svm", False)])
@pytest.mark.parametrize("kernel", KERNELS)
def test_interrupt_between_steps(
    kernel: str, vendor: str, apicv: bool, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An IPI, posted or not, at every point of an iteration: the guest takes its vector once."""
    happened = 0
    m = booted(kernel, vendor, apicv)
    v = m.vcpus[1]
    for step in STEPS:
        with monkeypatch.context() as patch:
            seen = between(patch, m, step, lambda m: send(m, vector=LATE).effects)
            exits(v)[kind]()
        if not seen:
            external(v)  # asleep before it came to this step: it runs again for the next one
            continue
        happened += 1
        host_reacts(m, v)
        assert v.mode == r.IN_GUEST_MODE, step
        assert v.requests == 0, step
        assert taken(m, v) == [LATE], step
    assert happened >= 13


@pytest.mark.parametrize("vendor", ["vmx", "svm"])
@pytest.mark.parametrize("kernel", KERNELS)
def test_nmi_between_steps(kernel: str, vendor: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """An NMI at every point of an iteration is delivered once."""
    m = booted(kernel, vendor)
    v = m.vcpus[1]
    for step in STEPS:
        with monkeypatch.context() as patch:
            seen = between(patch, m, step, lambda m: send(m, delivery=fx.DeliveryMode.NMI).effects)
            exits(v)["asked"]()
        assert seen, step
        host_reacts(m, v)
        external(v)
        assert v.nmi_masked, step
        assert v.events().nmi_pending == 0, step
        assert m.mem[v.own + L.K_REINJECT] == 0, step
        v.nmi_masked = False


@pytest.mark.parametrize("kernel", KERNELS)
def test_kick_between_steps(kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bare request at every point of an iteration: serviced, and the vCPU is in the guest in the end."""
    m = booted(kernel)
    v = m.vcpus[1]
    for step in STEPS:

        def act(m: fx.Machine) -> None:
            declare.load("make_request")(m.handle, 1, r.REQ_SCAN_IOAPIC)
            declare.load("kick")(m.handle, 1, L.NONE)

        with monkeypatch.context() as patch:
            seen = between(patch, m, step, act)
            exits(v)["asked"]()
        assert seen, step
        host_reacts(m, v)
        assert v.requests == 0, step
        assert v.mode == r.IN_GUEST_MODE, step


@pytest.mark.parametrize("vendor", ["vmx", "svm"])
@pytest.mark.parametrize("kernel", KERNELS)
def test_signal_between_steps(kernel: str, vendor: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A signal at every point ends KVM_RUN exactly once, and takes no interrupt with it."""
    m = booted(kernel, vendor)
    v = m.vcpus[1]
    for step in STEPS:
        send(m, vector=LATE)
        ends = []
        with monkeypatch.context() as patch:
            seen = between(patch, m, step, lambda m: m.vcpus[1].signal())
            ends.append(exits(v)["asked"]().user)
        assert seen, step
        if v.mode == r.EXITING_GUEST_MODE:
            ends.append(external(v).user)
        assert ends.count(fx.KvmExit.INTR) == 1, step
        assert v.run(), step
        assert v.exit_reason is None
        assert taken(m, v) == [LATE], step


@pytest.mark.parametrize("hv_timer", [True, False])
@pytest.mark.parametrize("apicv", [True, False], ids=["apicv", "plain"])
@pytest.mark.parametrize("kernel", KERNELS)
def test_tick_between_steps(kernel: str, apicv: bool, hv_timer: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The clock passes the timer's end at every point of an iteration: one tick, on either timer."""
    m = booted(kernel, apicv=apicv, hv_timer=hv_timer)
    v = m.vcpus[1]
    v.wrmsr(TDCR, 0xB)
    v.wrmsr(LVTT, TICK)
    for step in STEPS:
        for kind in ("asked", "hlt"):
            v.wrmsr(TMICT, 1000)
            end = m.time + 1000

            def pass_time(m: fx.Machine, end: int = end) -> None:
                # In the middle of the step the vCPU's thread has the pCPU: only hrtimers can interrupt it.
                m.mem[L.H_NOW] = end
                while (index := declare.load("due_timer")(m.handle)) != L.NONE:
                    declare.load("fire_timer")(m.handle, index)

            with monkeypatch.context() as patch:
                seen = between(patch, m, step, pass_time)
                exits(v)[kind]()
            assert seen or kind == "hlt", step
            m.set_time(end)
            host_reacts(m, v)
            assert v.mode == r.IN_GUEST_MODE, (step, kind)
            assert taken(m, v) == [TICK], (step, kind)
            assert m.next_timer() is None, (step, kind)
            assert m.mem[v.own + L.K_TIMER_PENDING] == 0


@pytest.mark.parametrize("vendor", ["vmx", "svm"])
@pytest.mark.parametrize("kernel", KERNELS)
def test_cancelled_injection(kernel: str, vendor: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A request behind the injection cancels the entry: the vector, in service already, goes in again, once."""
    for step in ("preempt_disable", "irqs_off", "enter"):
        m = booted(kernel, vendor)
        v = m.vcpus[1]
        send(m, vector=FIRST)
        m.trace.enable()
        with monkeypatch.context() as patch:
            between(patch, m, step, lambda m: send(m, vector=LATE).effects)
            external(v)
        injections = [line for line in m.trace.lines() if line.startswith("kvm_inj_virq")]
        assert len(injections) == 2, (step, injections)
        for line in injections:
            assert f"{FIRST:#x}" in line or str(FIRST) in line, "what was begun comes first, though less urgent"
        if since(kernel, "6.18"):
            assert [line.endswith("[reinjected]") for line in injections] == [False, True]
        assert (v.injected, v.irq_window) == (FIRST, True), "its gate cleared IF, so the other one waits"
        v.rflags |= r.RFLAGS_IF
        v.exit(fx.SvmExit.VINTR if vendor == "svm" else fx.VmxExit.INTERRUPT_WINDOW)
        assert (v.injected, v.irq_window) == (LATE, False)
        assert taken(m, v) == [LATE, FIRST], step


@pytest.mark.parametrize("kernel", KERNELS)
def test_cancelled_nmi(kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same for an NMI: not lost, and not two."""
    m = booted(kernel)
    v = m.vcpus[1]
    send(m, delivery=fx.DeliveryMode.NMI)
    with monkeypatch.context() as patch:
        between(patch, m, "enter", lambda m: send(m, vector=LATE).effects)
        external(v)
    assert v.nmi_masked
    assert v.events().nmi_pending == 0
    assert taken(m, v) == [], "the NMI's gate cleared IF"
    v.rflags |= r.RFLAGS_IF
    v.exit(fx.VmxExit.INTERRUPT_WINDOW)
    assert taken(m, v) == [LATE]


@pytest.mark.parametrize("vendor", ["vmx", "svm"])
def test_reenter_becomes_handled(vendor: str) -> None:
    """6.18: an ICR write to oneself without APICv asks for an exit, so its REENTER_GUEST converts to EXIT_HANDLED."""
    m = booted("6.18", vendor)
    v = m.vcpus[1]
    out = v.wrmsr(ICR, fx.icr(dest=1, vector=LATE))
    assert (out.path, out.completion) == (fx.Path.FAST, fx.Fastpath.EXIT_HANDLED)
    assert v.injected == LATE
    out = v.wrmsr(ICR, fx.icr(dest=0, vector=LATE))
    assert out.completion is fx.Fastpath.REENTER_GUEST
    m.vcpus[0].wrmsr(ICR, fx.icr(dest=1, vector=0x71))
    out = v.wrmsr(ICR, fx.icr(dest=0, vector=LATE))
    assert out.completion is fx.Fastpath.EXIT_HANDLED, "a kick that came while the guest ran"


@pytest.mark.skipif(not INTERPRETED, reason="a compiled kernel cannot be interrupted in the middle")
def test_nmi_while_requests_are_serviced(monkeypatch: pytest.MonkeyPatch) -> None:
    """An NMI comes behind the check for NMIs, before the last request is done: its request cancels the entry."""
    m = booted(apicv=True)
    v = m.vcpus[1]
    update_vcpu = steps.update_vcpu

    def late(words: Any, index: Any) -> Any:
        send(m, delivery=fx.DeliveryMode.NMI)
        return update_vcpu(words, index)

    monkeypatch.setattr(steps, "update_vcpu", late)
    declare.load("make_request")(m.handle, 1, r.REQ_APICV_UPDATE)
    external(v)
    assert v.nmi_masked
    assert m.mem[v.own + L.K_NMI_PENDING] == 0
    assert m.mem[v.own + L.K_NMI_QUEUED] == 0
