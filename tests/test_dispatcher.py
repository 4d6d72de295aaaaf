"""The run loop: its steps, the state each leaves, what the fast path skips, and how requests end a re-entry."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

import fastexit as fx
from fastexit import layout as L
from fastexit import regs as r
from fastexit.profile import since
from fastexit.traits import Trait
from generations import having, kernels
from steps import STEPS
from traced import injected

ICR, TPR, EOI = 0x830, 0x808, 0x80B
OUTSIDE, IN_GUEST, EXITING = 0, 1, 2
IF, TF, RF = 1 << 9, 1 << 8, 1 << 16
IN_THE_GUEST = {"mode": IN_GUEST, "irqs_off": 1, "srcu": 0, "preempt_off": 1, "guest_time": 1}


def booted(kernel: str = "6.18", vendor: str = "vmx", apicv: bool = True, **options: Any) -> fx.Machine:
    """A machine with the Python dispatcher, whose steps these tests watch, whatever the suite runs with."""
    options.setdefault("dispatcher", "python")
    m = fx.Machine(vcpus=4, kernel=kernel, vendor=vendor, apicv=apicv, **options)
    m.boot_x2apic()
    return m


def run(v: fx.Vcpu) -> fx.Outcome:
    """Any exit that changes nothing: afterwards the vCPU is in the guest."""
    return v.exit(fx.SvmExit.INTERRUPT if v.machine.vendor == "svm" else fx.VmxExit.EXTERNAL_INTERRUPT)


def host(v: fx.Vcpu) -> dict[str, int]:
    word = v.machine.mem
    return {
        "mode": v.mode,
        "irqs_off": word[v.own + L.K_IRQS_OFF],
        "srcu": word[v.own + L.K_SRCU],
        "preempt_off": word[v.own + L.K_PREEMPT_OFF],
        "guest_time": word[v.own + L.K_GUEST_TIME],
    }


def spent(v: fx.Vcpu, act: Callable[[], Any]) -> dict[str, int]:
    """How far the counters moved."""
    before = v.counters()
    act()
    return {name: after - before[name] for name, after in v.counters().items()}


def watch(m: fx.Machine, v: fx.Vcpu, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, dict[str, int]]]:
    """Every step as it begins, with the state it finds."""
    seen: list[tuple[str, dict[str, int]]] = []

    def spy(name: str) -> Any:
        step = getattr(m.dispatcher, name)

        def call(*args: Any, **named: Any) -> Any:
            seen.append((name, host(v)))
            return step(*args, **named)

        return call

    for name in STEPS:
        monkeypatch.setattr(m.dispatcher, name, spy(name))
    return seen


@pytest.mark.parametrize("kernel", fx.profiles())
def test_generic_exit_takes_every_step(kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """An RDMSR exit: each step finds the state that the steps before it left."""
    m = booted(kernel)
    v = m.vcpus[0]
    run(v)
    seen = watch(m, v, monkeypatch)
    v.rdmsr(0x802)
    names = [name for name, _ in seen]
    assert names == [name for name in STEPS if name not in ("service_requests", "inject_events")]
    found = dict(seen)
    assert found["vendor_run"] == found["guest_mode_outside"] == IN_THE_GUEST
    assert found["handle_exit_irqoff"] == found["irq_window"] == IN_THE_GUEST | {"mode": OUTSIDE}
    assert found["guest_time_stop"] == IN_THE_GUEST | {"mode": OUTSIDE, "irqs_off": 0}
    outside = {"mode": OUTSIDE, "irqs_off": 0, "srcu": 0, "preempt_off": 0, "guest_time": 0}
    assert found["srcu_lock"] == outside
    assert found["handle_exit"] == found["vcpu_enter_guest"] == found["preempt_disable"] == outside | {"srcu": 1}
    assert found["enter"] == outside | {"srcu": 1, "preempt_off": 1, "irqs_off": 1}
    assert found["guest_time_start"] == IN_THE_GUEST | {"guest_time": 0}
    assert host(v) == found["vm_entry"] == IN_THE_GUEST


def test_requests_are_served_before_the_entry(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a request pending two more steps run, between handle_exit and preemption off."""
    m = booted()
    v = m.vcpus[0]
    run(v)
    m.vcpus[1].wrmsr(ICR, fx.icr(dest=0, delivery=4))
    seen = watch(m, v, monkeypatch)
    run(v)
    assert [name for name, _ in seen] == list(STEPS)
    assert v.requests == 0


@pytest.mark.parametrize("vendor", ["vmx", "svm"])
@pytest.mark.parametrize("kernel", kernels("6.12"))
def test_fast_reentry_takes_no_step(kernel: str, vendor: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A re-entered ICR write runs no step at all; the vCPU never leaves the guest's state."""
    m = booted(kernel, vendor)
    v = m.vcpus[0]
    run(v)
    seen = watch(m, v, monkeypatch)
    out = v.wrmsr(ICR, fx.icr(dest=1, vector=0xFD))
    assert (out.reentered, out.completion) == (True, fx.Fastpath.REENTER_GUEST)
    assert seen == []
    assert host(v) == IN_THE_GUEST


@pytest.mark.parametrize("kernel", fx.profiles())
def test_what_a_fast_write_costs(kernel: str) -> None:
    """6.18 skips SRCU and the IRQ window, 6.6 to 6.12 take SRCU in their handler, older ones save nothing."""
    m = booted(kernel)
    v = m.vcpus[0]
    run(v)
    fast = spent(v, lambda: v.wrmsr(ICR, fx.icr(dest=1, vector=0xFD)))
    handler = kernel in having(Trait.SRCU_IN_FASTPATH)
    assert fast["srcu_locks"] == (not since(kernel, "6.12")) + handler
    assert fast["irq_windows"] == (0 if since(kernel, "6.12") else 1)
    assert fast["exits"] == 1
    m.fastpath = False
    generic = spent(v, lambda: v.wrmsr(ICR, fx.icr(dest=1, vector=0xFD)))
    assert generic == fast | {"exits": 1, "srcu_locks": 1, "irq_windows": 1}


def test_handler_runs_with_host_state_restored() -> None:
    """A generic handler finds mode outside, interrupts on and SRCU held, so that it may look at memslots."""
    m = booted()
    found = []
    m.handlers[fx.VmxExit.RDPMC] = lambda v, exit: found.append(host(v))
    m.vcpus[0].exit(fx.VmxExit.RDPMC)
    assert found == [{"mode": OUTSIDE, "irqs_off": 0, "srcu": 1, "preempt_off": 0, "guest_time": 0}]


@pytest.mark.parametrize("mode", [2, 4, 5, 6])
def test_request_to_self_ends_the_reentry(mode: int) -> None:
    """SMI, NMI, INIT or SIPI to itself: the request turns REENTER_GUEST into EXIT_HANDLED."""
    m = booted(smm=True)
    v = m.vcpus[0]
    out = v.wrmsr(ICR, fx.icr(dest=0, delivery=mode, level=True))
    assert (out.path, out.completion, out.reentered) == (fx.Path.FAST, fx.Fastpath.EXIT_HANDLED, False)
    assert (out.accepted, out.effects) == (1, fx.Effect.NONE)
    assert v.mode == IN_GUEST


@pytest.mark.parametrize("vendor", ["vmx", "svm"])
@pytest.mark.parametrize("apicv", [True, False])
def test_fixed_ipi_to_self(vendor: str, apicv: bool) -> None:
    """To itself: with APICv the loop syncs and re-enters; without, EVENT and EXITING mode end it."""
    v = booted(vendor=vendor, apicv=apicv).vcpus[0]
    out = v.wrmsr(ICR, fx.icr(vector=0xFD, shorthand=1))
    assert out.path is fx.Path.FAST
    assert out.completion is (fx.Fastpath.REENTER_GUEST if apicv else fx.Fastpath.EXIT_HANDLED)
    assert (out.accepted, out.effects, v.mode) == (1, fx.Effect.NONE, IN_GUEST)
    assert v.pending() == 0xFD


def test_kick_ends_the_reentry() -> None:
    """A kick from another vCPU is seen at the next fast exit: handled, but not re-entered."""
    m = booted(apicv=False)
    v = m.vcpus[0]
    run(v)
    out = m.vcpus[1].wrmsr(ICR, fx.icr(dest=0, vector=0xFD))
    assert out.effects == fx.Effect.KICK
    assert (v.mode, v.requests) == (EXITING, r.REQ_EVENT)
    again = m.vcpus[2].wrmsr(ICR, fx.icr(dest=0, vector=0xFC))
    assert again.effects == fx.Effect.NONE, "one kick is enough"
    out = v.wrmsr(ICR, fx.icr(dest=1, vector=0xFD))
    assert (out.path, out.completion) == (fx.Path.FAST, fx.Fastpath.EXIT_HANDLED)
    assert (v.mode, v.requests) == (IN_GUEST, 0)


@pytest.mark.parametrize("kernel", fx.profiles())
def test_gp_leaves_rip(kernel: str) -> None:
    """A faulting access injects #GP(0) on the way back in and does not move RIP."""
    m = booted(kernel)
    v = m.vcpus[0]
    m.trace.enable()
    rip = v.rip
    out = v.wrmsr(0x802, 0)
    assert (out.fault, out.user, v.rip) == (fx.Fault.GP, None, rip)
    assert injected(m) == 0x8000_0B0D
    with pytest.raises(fx.GeneralProtection, match="0x80b"):
        v.rdmsr(0x80B)
    assert v.rip == rip
    assert v.events().exception is None, "delivered once, not left pending"
    v.wrmsr(TPR, 0)
    assert v.rip == rip + 2


@pytest.mark.parametrize("kernel", fx.profiles())
@pytest.mark.parametrize("fast", [True, False])
def test_skip_moves_rip_and_ends_the_shadow(kernel: str, fast: bool) -> None:
    """Fast or generic, the skip adds the instruction's length, ends the STI shadow and leaves RFLAGS alone."""
    m = booted(kernel)
    m.fastpath = fast
    v = m.vcpus[0]
    v.rflags |= RF
    m.mem[v.own + L.K_SHADOW] = r.SHADOW_STI | r.SHADOW_MOV_SS
    rip = v.rip
    out = v.wrmsr(ICR, fx.icr(dest=1, vector=0xFD))
    assert (out.path is fx.Path.FAST, v.rip) == (fast, rip + 2)
    assert m.mem[v.own + L.K_SHADOW] == 0
    assert v.rflags == RF | 2


def test_skip_wraps_at_64_bits() -> None:
    """RIP is 64 bits wide and wraps there."""
    v = booted().vcpus[0]
    v.rip = (1 << 64) - 1
    v.wrmsr(ICR, fx.icr(dest=1, vector=0xFD))
    assert v.rip == 1


def test_skip_length_comes_from_the_exit() -> None:
    """CPUID moves RIP by the length that the exit reports, its own two bytes by default; length 0 leaves it."""
    v = booted().vcpus[0]
    rip = v.rip
    v.exit(fx.VmxExit.CPUID, length=3)
    v.exit(fx.VmxExit.CPUID)
    v.exit(fx.VmxExit.CPUID, length=0)
    assert v.rip == rip + 5


@pytest.mark.parametrize("kernel", fx.profiles())
def test_wrmsr_exit_by_number_is_the_wrmsr_call(kernel: str) -> None:
    """exit(MSR_WRITE, rcx, rax, rdx) without a length is wrmsr(): the same outcome, the same RIP."""
    by_call, by_number = booted(kernel), booted(kernel)
    a = by_call.vcpus[0].wrmsr(ICR, fx.icr(dest=1, vector=0xFD))
    b = by_number.vcpus[0].exit(fx.VmxExit.MSR_WRITE, rcx=ICR, rax=0xFD, rdx=1)
    assert a == b
    assert by_call.vcpus[0].rip == by_number.vcpus[0].rip == 0xFFF2


@pytest.mark.parametrize("kernel", ["5.8", "6.18"])
def test_trap_flag_queues_a_debug_exception(kernel: str) -> None:
    """The guest steps itself: the skip queues #DB, whose EVENT request ends a re-entry, and the entry injects it."""
    m = booted(kernel)
    v = m.vcpus[0]
    run(v)
    v.rflags |= TF
    m.trace.enable()
    out = v.wrmsr(ICR, fx.icr(dest=1, vector=0xFD))
    assert (out.completion, out.user) == (fx.Fastpath.EXIT_HANDLED, None)
    assert injected(m) == 0x8000_0301
    assert v.mode == IN_GUEST


def test_handler_may_leave_to_user_space() -> None:
    """A handler of one's own: None runs on, a KvmExit leaves, and the next exit enters the guest again first."""
    m = booted()
    v = m.vcpus[0]
    answers = [None, fx.KvmExit.HLT, None]
    m.handlers[fx.VmxExit.RDPMC] = lambda vcpu, exit: answers.pop(0)
    assert (v.exit(fx.VmxExit.RDPMC).user, v.mode) == (None, IN_GUEST)
    assert (v.exit(fx.VmxExit.RDPMC).user, v.mode) == (fx.KvmExit.HLT, OUTSIDE)
    assert m.mem[v.own + L.K_SRCU] == 0, "nothing is held in user space"
    cost = spent(v, lambda: v.exit(fx.VmxExit.RDPMC))
    assert (cost["exits"], cost["srcu_locks"], cost["irq_windows"], cost["nested_exits"]) == (1, 2, 1, 0)


def test_replaced_handler_sees_what_the_fast_path_leaves() -> None:
    """A handler put in WRMSR's place gets vCPU and exit, but only for writes that were not handled fast."""
    m = booted()
    seen = []
    builtin = m.handlers[fx.VmxExit.MSR_WRITE]

    def handler(v: fx.Vcpu, exit: fx.Exit) -> Any:
        seen.append((v.index, exit.msr, exit.value))
        return builtin(v, exit)

    m.handlers[fx.VmxExit.MSR_WRITE] = handler
    m.vcpus[0].wrmsr(ICR, fx.icr(dest=1, vector=0xFD))
    m.vcpus[2].wrmsr(TPR, 0x31)
    assert seen == [(2, TPR, 0x31)]
    assert m.vcpus[2].rdmsr(TPR) == 0x31


def test_deleted_handler_leaves_to_user_space() -> None:
    """Without its handler even an MSR read goes out."""
    m = booted()
    del m.handlers[fx.VmxExit.MSR_READ]
    assert m.vcpus[0].exit(fx.VmxExit.MSR_READ, rcx=0x802).user is fx.KvmExit.INTERNAL_ERROR


@pytest.mark.parametrize(
    ("vendor", "reason", "info", "user"),
    [
        ("vmx", fx.VmxExit.TRIPLE_FAULT, 0, fx.KvmExit.SHUTDOWN),
        ("vmx", fx.VmxExit.IO_INSTRUCTION, 0, fx.KvmExit.IO),  # OUT of a byte
        ("vmx", fx.VmxExit.EPT_VIOLATION, 0, fx.KvmExit.MMIO),
        ("vmx", 0xFFFF, 0, fx.KvmExit.INTERNAL_ERROR),
        ("svm", fx.SvmExit.SHUTDOWN, 0, fx.KvmExit.SHUTDOWN),
        ("svm", fx.SvmExit.IO, 1 << 4, fx.KvmExit.IO),
        ("svm", 0x555, 0, fx.KvmExit.INTERNAL_ERROR),
    ],
)
def test_exit_without_handler(vendor: str, reason: int, info: int, user: fx.KvmExit) -> None:
    """What the model does not handle goes to user space with KVM's reason, RIP unmoved."""
    v = booted(vendor=vendor).vcpus[0]
    rip = v.rip
    out = v.exit(reason, info1=info)
    assert (out.user, out.path, v.mode, v.rip) == (user, fx.Path.SLOW, OUTSIDE, rip)


def test_vcpu_ioctl_takes_the_vcpu_out_of_the_guest() -> None:
    """Any vCPU ioctl ends KVM_RUN first, as the vcpu mutex demands; asking for RIP does not."""
    v = booted().vcpus[0]
    run(v)
    assert (v.rip, v.mode) == (0xFFF0, IN_GUEST)
    v.get_msr(0x802)
    assert host(v) == {"mode": OUTSIDE, "irqs_off": 0, "srcu": 0, "preempt_off": 0, "guest_time": 0}
