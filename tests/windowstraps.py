"""Windows guests of the numbered traps: machines, where their pages are, and what is looked at."""

from __future__ import annotations

from typing import Any

import pytest

import apics
import fastexit as fx
from apics import BASE, in_service, kinds, patched, vectors
from fastexit import hyperv as h
from fastexit import regs as r
from generations import kernels

VENDORS = ("vmx", "svm")
MODES = pytest.mark.parametrize("x2apic", [False, True], ids=["xAPIC", "x2APIC"])
GATED = kernels("5.15")
WHOLE_ICR = kernels("6.1")
MEMORY = 1 << 20
ASSIST, MESSAGES, INPUT = 0x3000, 0x4000, 0x5000
FAST = h.HV_CALL_FAST
SEND, SEND_EX, SPIN = h.HvCall.SEND_IPI, h.HvCall.SEND_IPI_EX, h.HvCall.NOTIFY_LONG_SPIN_WAIT
OK, BAD, DENIED = h.HvStatus.SUCCESS, h.HvStatus.INVALID_HYPERCALL_INPUT, h.HvStatus.ACCESS_DENIED
SINT2 = h.MSR_HV_SINT0 + 2
CONFIG0, COUNT0 = h.MSR_HV_STIMER0_CONFIG, h.MSR_HV_STIMER0_CONFIG + 1
DIRECT = h.HV_STIMER_DIRECT
ENABLE, PERIODIC, AUTO = h.HV_STIMER_ENABLED, h.HV_STIMER_PERIODIC, h.HV_STIMER_AUTO_ENABLE
ON_SINT2 = 2 << h.HV_STIMER_SINT_SHIFT
SLOT2 = MESSAGES + 2 * h.HV_MESSAGE_BYTES


def windows(*ids: int, x2apic: bool = True, **options: Any) -> fx.Machine:
    """A guest that has told its name to Hyper-V, with a megabyte of memory; tracing is on from here."""
    m = apics.machine(*ids, x2apic=x2apic, **{"hyperv": True, **options})
    m.guest_memory = bytearray(MEMORY)
    for v in m.vcpus:
        v.rflags = r.RFLAGS_FIXED
    if options.get("hyperv", True):
        assert m.vcpus[0].set_msr(h.MSR_HV_GUEST_OS_ID, 1)
    m.trace.enable()
    return m


def with_synic(version: int = 1, **options: Any) -> tuple[fx.Machine, fx.Vcpu]:
    """Such a guest with SynIC on vCPU 0, its message page in place, GSI 40 + n raises SINT n."""
    m = windows(**options)
    v = m.vcpus[0]
    v.enable_synic(version)
    assert v.set_msr(h.MSR_HV_SIMP, MESSAGES | 1)
    m.set_gsi_routing([("hv_sint", 40 + sint, 0, sint) for sint in range(16)])
    m.trace.clear()
    return m, v


def gp(v: fx.Vcpu, msr: int, value: int) -> bool:
    """Whether the guest's WRMSR faults."""
    return v.wrmsr(msr, value).fault is fx.Fault.GP


def rdmsr(v: fx.Vcpu, msr: int) -> int | None:
    """The guest's RDMSR; None for #GP."""
    try:
        return v.rdmsr(msr)
    except fx.GeneralProtection:
        return None


def serving(v: fx.Vcpu) -> set[int]:
    return vectors(v, r.APIC_ISR)


def serve(v: fx.Vcpu, *numbers: int) -> None:
    """These vectors are in service, by KVM_SET_LAPIC."""
    v.set_lapic(patched(v, in_service(v, *numbers)))


def switch_off(v: fx.Vcpu) -> None:
    """The APIC is globally disabled."""
    assert v.set_msr(BASE, v.apic_base & ~(r.APICBASE_EN | r.APICBASE_EXTD))


def lines(m: fx.Machine, *kinds_of: str) -> list[str]:
    return [line for line in m.trace.lines() if line.split(":")[0] in kinds_of]


def stimer_lines(m: fx.Machine) -> list[str]:
    return [kind.removeprefix("kvm_hv_stimer_") for kind in kinds(m) if kind.startswith("kvm_hv_stimer_")]


def receivers(m: fx.Machine, vector: int) -> set[int]:
    return {v.index for v in m.vcpus if vector in vectors(v)}


def block(vector: int, *words: int, reserved: int = 0) -> bytes:
    """Input of an IPI hypercall in memory."""
    return b"".join(
        (vector.to_bytes(4, "little"), reserved.to_bytes(4, "little"), *(w.to_bytes(8, "little") for w in words))
    )


def put(m: fx.Machine, gpa: int, data: bytes) -> None:
    m.guest_memory[gpa : gpa + len(data)] = data


def slow(m: fx.Machine, control: int, data: bytes, gpa: int = INPUT) -> int:
    put(m, gpa, data)
    return m.vcpus[0].hv_hypercall(control, gpa)


def variable(count: int) -> int:
    return count << h.HV_CALL_VAR_COUNT_SHIFT
