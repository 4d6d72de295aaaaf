"""MSR accesses that are user space's: the filter, KVM_EXIT_X86_RDMSR and X86_WRMSR, and how they are completed."""

from __future__ import annotations

from typing import Any

import pytest

import fastexit as fx
from fastexit import regs as r
from generations import FILTERS

VENDORS = ("vmx", "svm")
DEADLINE, PV_EOI, UNKNOWN = 0x6E0, r.MSR_KVM_PV_EOI_EN, 0xC000_0080
READ, WRITE = r.MSR_FILTER_READ, r.MSR_FILTER_WRITE
INVAL, FILTER = r.MsrExit.INVAL, r.MsrExit.FILTER
ALL = r.MsrExit(7)


def booted(vendor: str = "vmx", kernel: str = "6.18", **options: Any) -> fx.Machine:
    """vCPU 0 runs, tracing is on, and user space wants every failing access."""
    m = fx.Machine(vcpus=1, vendor=vendor, kernel=kernel, **options)
    m.boot_x2apic()
    m.vcpus[0].wrmsr(0x80B, 0)
    m.user_space_msr = ALL
    m.trace.enable()
    return m


def rdmsr(v: fx.Vcpu, msr: int) -> fx.Outcome:
    return v.exit(fx.SvmExit.MSR if v.machine.vendor == "svm" else fx.VmxExit.MSR_READ, rcx=msr)


def allowed(m: fx.Machine, msr: int, write: bool) -> bool:
    v = m.vcpus[0]
    out = v.wrmsr(msr, 0) if write else rdmsr(v, msr)
    if out.user is None:
        return True
    assert v.user_msr is not None
    assert v.user_msr.reason is FILTER
    v.complete_msr()
    return False


def test_first_range_that_has_the_msr_decides() -> None:
    """By direction: a range for reads says nothing about writes; behind the ranges the default counts."""
    m = booted()
    m.set_msr_filter(ranges=[(READ, PV_EOI - 1, [True, False]), (READ | WRITE, PV_EOI, [True])])
    assert (allowed(m, PV_EOI, write=False), allowed(m, PV_EOI, write=True)) == (False, True)
    m.set_msr_filter(True, [(WRITE, PV_EOI, [True, False])])
    assert (allowed(m, PV_EOI, write=False), allowed(m, PV_EOI, write=True)) == (False, True)
    assert not allowed(m, 0x1B, write=False)
    m.set_msr_filter()
    assert allowed(m, 0x1B, write=False)


def test_range_borders() -> None:
    """The last MSR of a range, past a word of its bitmap; the one behind it; a range whose end wraps has nothing."""
    m = booted()
    m.user_space_msr = FILTER
    m.set_msr_filter(ranges=[(READ, PV_EOI - 64, [True] * 64 + [False])])
    assert not allowed(m, PV_EOI, write=False)
    m.set_msr_filter(ranges=[(READ, PV_EOI - 64, [False] * 64)])
    assert allowed(m, PV_EOI, write=False)
    m.set_msr_filter(ranges=[(READ, 0xFFFF_FFFF, [False])])
    with pytest.raises(fx.GeneralProtection):
        m.vcpus[0].rdmsr(0xFFFF_FFFF)
    assert m.vcpus[0].user_msr is None, "unknown, not filtered"


@pytest.mark.parametrize("kernel", ["5.10", "6.1", "6.18"])
def test_x2apic_registers_are_never_filtered(kernel: str) -> None:
    """0x800-0x8FF pass whatever the filter says; 0x7FF and 0x900 do not."""
    m = booted(kernel=kernel)
    v = m.vcpus[0]
    m.set_msr_filter(True, [(READ | WRITE, 0x7FF, [False] * 0x102)])
    assert v.wrmsr(0x808, 0x30).user is None
    assert v.rdmsr(0x808) == 0x30
    assert v.wrmsr(0x830, fx.icr(dest=0, vector=0x41)).accepted == 1
    for msr in (0x7FF, 0x900):
        assert not allowed(m, msr, write=False)


@pytest.mark.parametrize(("kernel", "fast"), [(kernel, True) for kernel in FILTERS])
def test_deadline_fast_path_does_not_ask_the_filter(kernel: str, fast: bool) -> None:
    """Where TSC_DEADLINE is fast it is written although denied; the generic path leaves it to user space."""
    m = booted(kernel=kernel)
    v = m.vcpus[0]
    v.set_msr(0x832, 0x400EC)
    m.set_msr_filter(True, [(READ, 0x1B, [True])])
    out = v.wrmsr(DEADLINE, 1_000_000)
    assert (out.user is None) is fast
    if fast:
        assert v.get_msr(DEADLINE) == 1_000_000
        m.fastpath = False
        assert v.wrmsr(DEADLINE, 2_000_000).user is fx.KvmExit.X86_WRMSR


@pytest.mark.parametrize("vendor", VENDORS)
@pytest.mark.parametrize(
    ("msr", "value", "reason"), [(0x808, 1 << 32, "INVAL"), (UNKNOWN, 5, "UNKNOWN"), (PV_EOI, 1, "FILTER")]
)
def test_write_that_user_space_gets(vendor: str, msr: int, value: int, reason: str) -> None:
    """KVM_EXIT_X86_WRMSR with index, data and reason, RIP at the instruction; no kvm_msr line."""
    m = booted(vendor)
    v = m.vcpus[0]
    m.set_msr_filter(ranges=[(WRITE, PV_EOI, [False])])
    rip = v.rip
    out = v.wrmsr(msr, value)
    assert (out.user, out.fault, v.rip) == (fx.KvmExit.X86_WRMSR, None, rip)
    assert v.user_msr == (msr, value, r.MsrExit[reason])
    text = "\n".join(m.trace.lines())
    assert "kvm_msr" not in text
    assert text.endswith("kvm_userspace_exit: reason KVM_EXIT_X86_WRMSR (30)")
    v.complete_msr()
    assert (v.rip, v.user_msr) == (rip + 2, None)


@pytest.mark.parametrize("reason", [INVAL, r.MsrExit.UNKNOWN, FILTER])
def test_only_the_reasons_asked_for(reason: r.MsrExit) -> None:
    """For any other reason the guest gets #GP, and its kvm_msr line says so."""
    m = booted()
    v = m.vcpus[0]
    m.set_msr_filter(ranges=[(WRITE, PV_EOI, [False])])
    m.user_space_msr = ALL & ~reason
    msr, value = {1: (0x808, 1 << 32), 2: (UNKNOWN, 5), 4: (PV_EOI, 1)}[reason]
    out = v.wrmsr(msr, value)
    assert (out.user, out.fault) == (None, fx.Fault.GP)
    assert f"kvm_msr: msr_write {msr:x} = 0x{value:x} (#GP)" in m.trace.lines()
    m.user_space_msr = reason
    assert v.wrmsr(msr, value).user is fx.KvmExit.X86_WRMSR


@pytest.mark.parametrize("vendor", VENDORS)
def test_read_is_completed_with_data(vendor: str) -> None:
    """User space's data is what the guest reads."""
    m = booted(vendor)
    v = m.vcpus[0]
    rip = v.rip
    assert rdmsr(v, UNKNOWN).user is fx.KvmExit.X86_RDMSR
    assert v.user_msr == (UNKNOWN, 0, r.MsrExit.UNKNOWN)
    v.complete_msr(data=0x1234_5678_9ABC_DEF0)
    assert (v.read_data, v.rip) == (0x1234_5678_9ABC_DEF0, rip + 2)
    assert v.run()


def test_completed_with_an_error() -> None:
    """run->msr.error: the guest gets #GP at the instruction."""
    m = booted()
    v = m.vcpus[0]
    rip = v.rip
    v.wrmsr(UNKNOWN, 5)
    v.complete_msr(error=True)
    assert (v.rip, v.events().exception) == (rip, 13)
    assert v.run()
    assert "intr_info 0x80000b0d" in m.trace.lines()[-1]
    with pytest.raises(ValueError, match="no MSR access waits"):
        v.complete_msr()


def test_no_answer_is_success() -> None:
    """KVM_RUN completes what user space did not look at: error and data were 0."""
    m = booted()
    v = m.vcpus[0]
    rip = v.rip
    rdmsr(v, UNKNOWN)
    assert v.run()
    assert (v.rip, v.user_msr, v.read_data) == (rip + 2, None, 0)


def test_single_step_over_a_completed_access() -> None:
    """KVM_EXIT_DEBUG comes when the access is completed, by an answer or without one."""
    m = booted()
    v = m.vcpus[0]
    v.singlestep = True
    v.wrmsr(UNKNOWN, 5)
    v.complete_msr()
    assert v.exit_reason is fx.KvmExit.DEBUG
    v.wrmsr(UNKNOWN, 5)
    assert not v.run()
    assert v.exit_reason is fx.KvmExit.DEBUG


@pytest.mark.parametrize(("reason", "user"), [(84, "X86_RDMSR"), (85, "X86_WRMSR")])
def test_immediate_form_is_nine_bytes_long(reason: int, user: str) -> None:
    """Completion moves RIP by the length of the instruction that exited."""
    m = booted()
    v = m.vcpus[0]
    rip = v.rip
    assert v.exit(reason, rcx=UNKNOWN, rax=5).user is fx.KvmExit[user]
    v.complete_msr()
    assert v.rip == rip + 9


def test_host_accesses_are_not_filtered() -> None:
    """KVM_SET_MSRS and KVM_GET_MSRS never ask the filter nor user space."""
    m = booted()
    m.set_msr_filter(True, [(READ, 0x10, [True])])
    assert m.vcpus[0].set_msr(PV_EOI, 1)
    assert m.vcpus[0].get_msr(PV_EOI) == 1
    assert not m.vcpus[0].set_msr(UNKNOWN, 1)
    assert m.vcpus[0].user_msr is None


def test_filter_arguments() -> None:
    """What KVM calls EINVAL; a range of no MSRs is skipped."""
    m = booted()
    for deny, ranges in ((False, [(0, 0x10, [True])]), (False, [(READ, 0x10, [True] * 12289)]), (True, [])):
        with pytest.raises(ValueError, match="EINVAL"):
            m.set_msr_filter(deny, ranges)
    with pytest.raises(ValueError, match="at most 16"):
        m.set_msr_filter(ranges=[(READ, i, [True]) for i in range(17)])
    m.set_msr_filter(ranges=[(READ, 0x10, [])])
    with pytest.raises(ValueError, match="user_space_msr"):
        m.user_space_msr = 8
