"""What an exit reports is what its kvm_exit line shows, through every door; what a handler answers is checked."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import fastexit as fx
from fastexit import layout as L
from fastexit.outcome import CODE_GP

ICR = fx.icr(dest=1, vector=0x41)


def booted(kernel: str = "6.18", vendor: str = "vmx", **more: Any) -> fx.Machine:
    m = fx.Machine(vcpus=2, kernel=kernel, vendor=vendor, **more)
    m.boot_x2apic()
    m.trace.enable()
    return m


def exit_line(m: fx.Machine) -> str:
    (line,) = [line for line in m.trace.lines() if line.startswith("kvm_exit")]
    m.trace.clear()
    return line


def qualification(m: fx.Machine) -> int:
    """info1 of the only exit, which every generation prints in its own way."""
    records = m.trace.records()
    (args,) = records[records["event"] == L.TP_EXIT]["args"]
    m.trace.clear()
    return int(args[2])


def batch(m: fx.Machine, reason: int, info: int, value: int = 0) -> np.ndarray:
    exits = np.zeros(1, dtype=fx.EXIT)
    exits["reason"], exits["info"], exits["msr"], exits["value"] = reason, info, 0x830, value
    return m.run(exits)


@pytest.mark.parametrize("kernel", fx.profiles())
@pytest.mark.parametrize(("vendor", "reason", "info1"), [("vmx", 32, 0x1234), ("svm", 0x7C, 5), ("svm", 0x7C, 0)])
def test_qualification_of_an_msr_exit(kernel: str, vendor: str, reason: int, info1: int) -> None:
    """info1 appears as given, from one exit, from a batch, and from a batch that goes through Python."""
    m = booted(kernel, vendor)
    m.vcpus[0].exit(reason, rcx=0x830, rax=ICR & 0xFFFF_FFFF, rdx=ICR >> 32, info1=info1)
    assert qualification(m) == info1
    batch(m, reason, info1, ICR)
    assert qualification(m) == info1
    m.handlers[0xFFF0] = lambda vcpu, exit: None
    batch(m, reason, info1, ICR)
    assert qualification(m) == info1


def test_vectoring_information_of_a_fast_exit() -> None:
    """info2 is shown where the fast path takes the exit, too."""
    m = booted()
    out = m.vcpus[0].exit(fx.VmxExit.MSR_WRITE, rcx=0x830, rax=0x41, rdx=1, info2=0x5678)
    assert out.path is fx.Path.FAST
    assert "info2 0x0000000000005678" in exit_line(m)


def test_other_exits_in_a_batch() -> None:
    """An external interrupt's info1 is the same through both doors."""
    m = booted()
    m.vcpus[0].exit(fx.VmxExit.EXTERNAL_INTERRUPT, info1=7)
    single = exit_line(m)
    batch(m, fx.VmxExit.EXTERNAL_INTERRUPT, 7)
    assert exit_line(m) == single


@pytest.mark.parametrize("how", ["bit 31", "failed_entry"])
def test_failed_entry_is_said_once(how: str) -> None:
    """Bit 31 of a VMX reason and failed_entry=True are the same exit."""
    m = booted()
    v = m.vcpus[0]
    out = v.exit(33 | 1 << 31) if how == "bit 31" else v.exit(33, failed_entry=True)
    assert out.user == fx.KvmExit.FAIL_ENTRY
    assert "reason INVALID_STATE FAILED_VMENTRY rip" in exit_line(m)


def test_invalid_vmcb() -> None:
    """SVM says it with exit code -1."""
    m = booted(vendor="svm")
    assert m.vcpus[0].exit(fx.SvmExit.ERR).user == fx.KvmExit.FAIL_ENTRY


def test_records_hold_nothing_of_older_ones() -> None:
    """Arguments that an event does not have are 0."""
    m = booted()
    v = m.vcpus[0]
    v.exit(fx.VmxExit.MSR_WRITE, rcx=0x830, rax=0x41, rdx=1, info2=0xDEAD)
    m.trace.clear()
    v.set_msr(0x80B, 0)
    m.trace.clear()
    v.set_msr(0x830, ICR)
    assert 0xDEAD not in m.trace.records()["args"]


@pytest.mark.parametrize("answer", [5, -1, True, "x", 1.5, 1 << 70, (), fx.Fastpath.REENTER_GUEST])
def test_wrong_answer_of_a_handler(answer: Any) -> None:
    """A handler answers None, a KvmExit or a built-in handler's answer; the vCPU is outside the guest afterwards."""
    m = booted()
    v = m.vcpus[0]
    m.handlers[fx.VmxExit.RDPMC] = lambda vcpu, exit: answer
    with pytest.raises(TypeError, match="handler of exit 15 returned .*: neither None nor a KvmExit"):
        v.exit(fx.VmxExit.RDPMC)
    assert v.mode == 0
    assert v.wrmsr(0x830, ICR).accepted == 1


def test_handler_around_the_built_in_one() -> None:
    """What the built-in handler answered may be passed on."""
    m = booted()
    m.fastpath = False
    built_in = m.handlers[fx.VmxExit.MSR_WRITE]
    seen: list[int] = []

    def handler(vcpu: fx.Vcpu, exit: fx.Exit) -> Any:
        seen.append(exit.msr)
        return built_in(vcpu, exit)

    m.handlers[fx.VmxExit.MSR_WRITE] = handler
    assert m.vcpus[0].wrmsr(0x830, ICR).accepted == 1
    assert m.vcpus[0].wrmsr(0x830, 1 << 13).code & CODE_GP
    assert seen == [0x830, 0x830]


def test_tables_can_be_merged() -> None:
    """``handlers | other`` is a plain dictionary, and the machine keeps its own table."""
    m = booted()
    merged = m.handlers | {fx.VmxExit.RDPMC: print}
    assert merged[fx.VmxExit.RDPMC] is print
    assert fx.VmxExit.RDPMC not in m.handlers


def test_length_of_an_msr_access() -> None:
    """RDMSR and WRMSR are two bytes long, and another length is a mistake."""
    v = booted().vcpus[0]
    rip = v.rip
    v.exit(fx.VmxExit.MSR_WRITE, rcx=0x830, rax=0x41, rdx=1, length=2)
    assert v.rip == rip + 2
    with pytest.raises(ValueError, match="length 3 of an MSR access"):
        v.exit(fx.VmxExit.MSR_WRITE, rcx=0x830, rax=0x41, rdx=1, length=3)


def test_switches_that_cannot_be() -> None:
    """SVM has no preemption timer, and no guest has 0 physical address bits."""
    with pytest.raises(ValueError, match="SVM has no preemption timer"):
        booted(vendor="svm", hv_timer=True)
    with pytest.raises(ValueError, match=r"maxphyaddr 0 is out of range 32\.\.52"):
        booted(maxphyaddr=0)


@pytest.mark.parametrize(
    "registers",
    [
        {"msr": 0x830, "value": ICR},
        {"rcx": 0x830, "rax": ICR & 0xFFFF_FFFF, "rdx": ICR >> 32},
        {"ecx": 0x830, "eax": ICR & 0xFFFF_FFFF, "edx": ICR >> 32},
    ],
    ids=["msr", "rcx", "ecx"],
)
def test_names_of_the_guests_registers(registers: dict[str, int]) -> None:
    """An exit takes the MSR and its value, or the registers that hold them."""
    m = booted()
    assert m.vcpus[0].exit(fx.VmxExit.MSR_WRITE, **registers).accepted == 1
    assert m.vcpus[1].pending() == 0x41
