"""The ten defects of the patch under review, one story each: what it does, and what its successor does instead."""

from __future__ import annotations

from typing import Any

import pytest

import fastexit as fx
from generations import kernels

ICR = 0x830
UNICAST = {"rcx": ICR, "rax": 0xFD, "rdx": 1}


def booted(kernel: str = "seed-v3", vendor: str = "vmx", vcpus: int = 4, **options: Any) -> fx.Machine:
    m = fx.Machine(vcpus=vcpus, kernel=kernel, vendor=vendor, **options)
    m.boot_x2apic()
    return m


def pages(m: fx.Machine) -> list[bytes]:
    return [v.get_lapic() for v in m.vcpus]


def test_defect_1_svm_acts_on_dr0_read() -> None:
    """Exit code 32 is a DR0 read on SVM: with ECX = 0x830 it sends an IPI, and the MOV that exited is lost."""
    m = booted(vendor="svm")
    v = m.vcpus[0]
    v.dr0 = 0x1234
    rip, before = v.rip, v.read_data
    out = v.exit(fx.SvmExit.READ_DR0, length=3, **UNICAST)
    assert (out.path, out.completion, out.accepted) == (fx.Path.FAST, fx.Fastpath.SKIP_EMUL_INS, 1)
    assert m.vcpus[1].pending() == 0xFD
    assert (v.read_data, v.rip) == (before, rip + 3)

    m = booted("5.6", "svm")
    v = m.vcpus[0]
    v.dr0 = 0x1234
    rip = v.rip
    out = v.exit(fx.SvmExit.READ_DR0, length=3, **UNICAST)
    assert (out.path, m.vcpus[1].pending()) == (fx.Path.SLOW, None)
    assert (v.dr_intercepts, v.rip) == (False, rip)


def test_defect_1_svm_never_accelerates_a_wrmsr() -> None:
    """The exit that is meant, 0x7C, is never taken; an innocent DR0 read still works."""
    m = booted(vendor="svm")
    v = m.vcpus[0]
    out = v.wrmsr(ICR, fx.icr(dest=1, vector=0xFD))
    assert (out.path, out.refusal, out.accepted) == (fx.Path.SLOW, fx.Refusal.SVM_EXIT_CODE, 1)
    rip = v.rip
    assert v.exit(fx.SvmExit.READ_DR0, rcx=0x831, rax=0xFD, rdx=1, length=3).path is fx.Path.SLOW
    assert (v.dr_intercepts, v.rip) == (False, rip)


@pytest.mark.parametrize("kernel", ["seed-v3", "5.6", "5.10", "7.3"])
@pytest.mark.parametrize("dispatcher", ["python", "compiled"])
def test_dr0_read_is_executed_again_without_intercepts(kernel: str, dispatcher: str) -> None:
    """5.10.262 dr_interception: of two reads in a row only the first exits; the next exit of any kind intercepts anew.

    A guest that user space debugs has its read emulated.
    """
    m = fx.Machine(vcpus=2, vendor="svm", kernel=kernel, apicv=False, dispatcher=dispatcher)
    m.boot_x2apic()
    v = m.vcpus[0]
    v.dr0 = 0x77
    rip = v.rip
    assert v.dr_intercepts
    v.exit(fx.SvmExit.READ_DR0, length=3)
    assert (v.dr_intercepts, v.rip, v.read_data) == (False, rip, 0)
    assert not fx.Machine.restore(m.snapshot()).vcpus[0].dr_intercepts
    v.exit(fx.SvmExit.CPUID)
    assert v.dr_intercepts
    v.singlestep = True
    rip = v.rip
    v.exit(fx.SvmExit.READ_DR0, length=3)
    assert (v.dr_intercepts, v.rip, v.read_data) == (True, rip + 3, 0x77)


@pytest.mark.parametrize("info1", [0, 1])
def test_defect_2_svm_does_not_tell_reads_from_writes(info1: int) -> None:
    """The handler never looks at EXITINFO1; the successor does, so that an RDMSR of the ICR sends nothing."""
    m = booted(vendor="svm")
    assert m.vcpus[0].exit(fx.SvmExit.READ_DR0, info1=info1, **UNICAST).path is fx.Path.FAST

    m = booted("5.6", "svm")
    out = m.vcpus[0].exit(fx.SvmExit.MSR, info1=info1, length=2, **UNICAST)
    assert (out.path is fx.Path.FAST) is bool(info1)
    assert m.vcpus[1].pending() == (0xFD if info1 else None)


def test_defect_2_does_not_show_in_the_seed() -> None:
    """Defect 1 hides it: an RDMSR of the ICR under the seed reads and sends nothing."""
    m = booted(vendor="svm")
    m.vcpus[0].wrmsr(ICR, fx.icr(dest=2, vector=0x31))
    out = m.vcpus[0].exit(fx.SvmExit.MSR, info1=0, length=2, **UNICAST)
    assert (out.path, m.vcpus[1].pending()) == (fx.Path.SLOW, None)
    assert m.vcpus[0].read_data == fx.icr(dest=2, vector=0x31)


def test_defect_3_l2_sends_through_l1s_apic_and_exits_to_l1() -> None:
    """L2's WRMSR both sends the IPI and is reflected to L1, so L1 will send it a second time."""
    m = booted()
    v = m.vcpus[0]
    v.nested = True
    rip = v.rip
    out = v.wrmsr(ICR, fx.icr(dest=1, vector=0xFD))
    assert (out.path, out.accepted) == (fx.Path.FAST, 1)
    assert m.vcpus[1].pending() == 0xFD
    assert (v.counters()["nested_exits"], v.nested, v.rip) == (1, False, rip)

    m = booted("5.6")
    v = m.vcpus[0]
    v.nested = True
    out = v.wrmsr(ICR, fx.icr(dest=1, vector=0xFD))
    assert (out.refusal, out.accepted, v.counters()["nested_exits"]) == (fx.Refusal.NESTED, 0, 1)
    assert m.vcpus[1].pending() is None


@pytest.mark.parametrize(
    ("shorthand", "targets"), [(1, [0]), (2, [0, 1, 2, 3, 4, 5, 6, 7]), (3, [1, 2, 3, 4, 5, 6, 7])]
)
def test_defect_4_any_shorthand_with_irqs_off(
    shorthand: int, targets: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A multicast goes to every vCPU before the host lets interrupts in; who gets it is right."""
    m = booted(vcpus=8)
    posted_with_irqs_off: list[int] = []
    irq_window = m.dispatcher.irq_window

    def spy(v: fx.Vcpu) -> None:
        posted_with_irqs_off.extend(target.index for target in m.vcpus if target.pid[3])
        irq_window(v)

    monkeypatch.setattr(m.dispatcher, "irq_window", spy)
    out = m.vcpus[0].wrmsr(ICR, fx.icr(vector=0xFD, shorthand=shorthand))
    assert (out.path, out.accepted) == (fx.Path.FAST, len(targets))
    assert posted_with_irqs_off == targets
    assert booted("5.6").vcpus[0].wrmsr(ICR, fx.icr(vector=0xFD, shorthand=shorthand)).refusal is fx.Refusal.SHORTHAND


def test_defect_5_broadcast_with_irqs_off() -> None:
    """A broadcast is taken, too; what it delivers is what the generic path delivers."""
    fast, generic = booted(), booted()
    generic.fastpath = False
    value = fx.icr(dest=0xFFFF_FFFF, vector=0xFD)
    a, b = fast.vcpus[0].wrmsr(ICR, value), generic.vcpus[0].wrmsr(ICR, value)
    assert (a.path, b.path) == (fx.Path.FAST, fx.Path.SLOW)
    assert a.accepted == b.accepted == 4
    assert pages(fast) == pages(generic)
    assert [v.pending() for v in fast.vcpus] == [0xFD] * 4
    assert booted("5.7").vcpus[0].wrmsr(ICR, value).refusal is fx.Refusal.BROADCAST


@pytest.mark.parametrize("kernel", kernels(before="6.12"))
def test_defect_6_single_step_is_lost(kernel: str) -> None:
    """A debugger that steps over a fast WRMSR never hears of it; over a generic one it does."""
    m = booted(kernel)
    v = m.vcpus[0]
    v.singlestep = True
    rip = v.rip
    out = v.wrmsr(ICR, fx.icr(dest=1, vector=0xFD))
    assert (out.path, out.user, out.blocked) == (fx.Path.FAST, None, False)
    assert (v.rip, v.mode) == (rip + 2, 1)

    m.fastpath = False
    out = v.wrmsr(ICR, fx.icr(dest=1, vector=0xFC))
    assert (out.path, out.user, v.rip, v.mode) == (fx.Path.SLOW, fx.KvmExit.DEBUG, rip + 4, 0)


@pytest.mark.parametrize("kernel", kernels("6.12"))
def test_defect_6_is_mended_in_6_12(kernel: str) -> None:
    """From 6.12 on the fast path itself goes to user space with KVM_EXIT_DEBUG, after the IPI and the skip."""
    m = booted(kernel)
    v = m.vcpus[0]
    v.singlestep = True
    rip = v.rip
    out = v.wrmsr(ICR, fx.icr(dest=1, vector=0xFD))
    assert (out.path, out.completion, out.user) == (fx.Path.FAST, fx.Fastpath.EXIT_USERSPACE, fx.KvmExit.DEBUG)
    assert (out.accepted, v.rip, v.mode) == (1, rip + 2, 0)


@pytest.mark.parametrize(
    ("trouble", "user"),
    [
        ({"info2": 1 << 31}, fx.KvmExit.INTERNAL_ERROR),
        ({"failed_entry": True}, fx.KvmExit.FAIL_ENTRY),
        ({"invalid_state": True}, fx.KvmExit.INTERNAL_ERROR),
    ],
    ids=["vectoring", "failed entry", "invalid state"],
)
def test_defect_7_early_returns_come_after_the_ipi(trouble: dict[str, Any], user: fx.KvmExit) -> None:
    """handle_exit gives up on the exit when the IPI has left already; RIP stays, so the guest would send it again."""
    m = booted()
    v = m.vcpus[0]
    rip = v.rip
    out = v.exit(fx.VmxExit.MSR_WRITE, length=2, **UNICAST, **trouble)
    assert (out.path, out.accepted, out.user) == (fx.Path.FAST, 1, user)
    assert (m.vcpus[1].ack(), v.rip) == (0xFD, rip)
    m.vcpus[1].eoi()
    v.wrmsr(ICR, fx.icr(dest=1, vector=0xFD))
    assert (m.vcpus[1].pending(), v.rip) == (0xFD, rip + 2)


def test_defect_7_generic_path_sends_once() -> None:
    """Without the fast path the same troubles come before anything was sent."""
    for trouble in ({"info2": 1 << 31}, {"failed_entry": True}):
        m = booted()
        m.fastpath = False
        out = m.vcpus[0].exit(fx.VmxExit.MSR_WRITE, length=2, **UNICAST, **trouble)
        assert (out.accepted, m.vcpus[1].pending()) == (0, None)
        assert out.user is not None


def test_defect_8_traces_precede_their_exit() -> None:
    """kvm_msr and kvm_apic_ipi come before the kvm_exit that they belong to, and no line tells of ICR2."""
    m = booted()
    m.vcpus[0].wrmsr(0x808, 0)
    m.trace.enable()
    m.vcpus[0].wrmsr(ICR, fx.icr(dest=1, vector=0xFD))
    fast = m.trace.lines()
    at = {name: i for i, name in enumerate(line.split(":")[0] for line in fast)}
    assert at["kvm_apic"] < at["kvm_apic_ipi"] < at["kvm_msr"] < at["kvm_exit"] < at["kvm_entry"]
    assert not any("APIC_ICR2" in line for line in fast)

    m.trace.clear()
    m.fastpath = False
    m.vcpus[0].wrmsr(ICR, fx.icr(dest=1, vector=0xFD))
    generic = m.trace.lines()
    assert generic[0].startswith("kvm_exit:")
    assert "kvm_apic: apic_write APIC_ICR2 = 0x1" in generic


def test_defect_9_the_enum_value_changes_nothing() -> None:
    """-1 for SKIP_EMUL_INS had no effect: here it is a plain value, the seed and 5.6 end alike, RIP moves once."""
    assert sorted(int(c) for c in fx.Fastpath) == [0, 1, 2, 3, 4]
    seed, successor = booted(), booted("5.6")
    outcomes = [m.vcpus[0].wrmsr(ICR, fx.icr(dest=1, vector=0xFD)) for m in (seed, successor)]
    assert outcomes[0] == outcomes[1]
    assert outcomes[0].completion is fx.Fastpath.SKIP_EMUL_INS
    assert pages(seed) == pages(successor)
    assert seed.vcpus[0].rip == successor.vcpus[0].rip == 0xFFF2


@pytest.mark.parametrize("apicv", [True, False])
def test_defect_10_xapic_never_reaches_it(apicv: bool) -> None:
    """An ICR write by MMIO never gets there; Intel's APICv of the time still lets the x2APIC MSR exit, so that does."""
    m = fx.Machine(vcpus=2, kernel="seed-v3", apicv=apicv)
    for v in m.vcpus:
        v.mmio_write(0xF0, 0x1FF)
    m.vcpus[0].mmio_write(0x310, 1 << 24)
    out = m.vcpus[0].mmio_write(0x300, 0xFD)
    assert (out.path, out.refusal, out.accepted) == (fx.Path.SLOW, fx.Refusal.NOT_AN_MSR_WRITE, 1)
    assert booted(apicv=apicv).vcpus[0].wrmsr(ICR, fx.icr(dest=1, vector=0xFD)).path is fx.Path.FAST
