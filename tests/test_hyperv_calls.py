"""Hyper-V's hypercalls: whom they reach, what they refuse and with which status, what each generation makes of them.

Expected values are those that real kernels gave (6.1.176, 6.12.95, 7.2.13), or what the sources of others say.
"""

from __future__ import annotations

import random
import struct
from collections.abc import Iterable
from typing import Any

import numpy as np
import pytest

import fastexit as fx
from conftest import INTERPRETED
from fastexit import layout as L
from fastexit import regs as r
from fastexit.hyperv import MSR_HV_GUEST_OS_ID, MSR_HV_VP_INDEX, HvCall, HvFeature, HvStatus
from storms import CALL_INPUT, VENDORS, alone, build, hypercall

FAST = 1 << 16
VAR = 17
REP, START = 32, 48
INPUT = 0x7000
SEND, SEND_EX = HvCall.SEND_IPI, HvCall.SEND_IPI_EX
OK, CODE, BAD, ALIGNMENT, PARAMETER, DENIED = (
    HvStatus.SUCCESS,
    HvStatus.INVALID_HYPERCALL_CODE,
    HvStatus.INVALID_HYPERCALL_INPUT,
    HvStatus.INVALID_ALIGNMENT,
    HvStatus.INVALID_PARAMETER,
    HvStatus.ACCESS_DENIED,
)
NEW = ("6.1", "6.12", "6.18", "7.3")
OLD = ("5.10", "5.15")


def windows(kernel: str = "6.12", **options: Any) -> fx.Machine:
    """Four vCPUs of a guest that has said that it is Windows; APIC ids are no VP indices here."""
    settings = {"apic_ids": [0, 2, 5, 9], "hyperv": True, "apicv": False, "kernel": kernel} | options
    m = fx.Machine(**settings)
    m.boot_x2apic()
    assert m.vcpus[0].set_msr(MSR_HV_GUEST_OS_ID, 0x1234)
    m.trace.enable()
    return m


def put(m: fx.Machine, *words: int, at: int = INPUT) -> int:
    """Input of a slow hypercall, as words of 64 bits: its address."""
    m.guest_memory[at : at + 8 * len(words)] = struct.pack(f"<{len(words)}Q", *words)
    return at


def reached(m: fx.Machine, vector: int) -> list[int]:
    """Which vCPUs have the vector in IRR."""
    at = L.VEC + L.VEC_IRR + (vector >> 6)
    return [v.index for v in m.vcpus if m.mem[at + v.index * L.VEC_STRIDE] >> (vector & 63) & 1]


def names(m: fx.Machine) -> list[str]:
    """What was traced between kvm_exit and kvm_entry, by name."""
    lines = [line.partition(":")[0] for line in m.trace.lines()]
    return [name for name in lines if name not in ("kvm_exit", "kvm_entry")]


# ------------------------------------------------------------------------------------------------------------ SEND_IPI


@pytest.mark.parametrize("vendor", VENDORS)
def test_fast_ipi(vendor: str) -> None:
    """Bits are VP indices; targets come in the order of creation; no kvm_apic_ipi, no change of ICR; RIP moves by 3."""
    m = windows(vendor=vendor)
    v = m.vcpus[0]
    v.wrmsr(0x80B, 0)
    before, rip = v.get_msr(0x830), v.rip
    assert v.run()
    m.trace.clear()
    assert v.hv_hypercall(SEND | FAST, 0x51, 0b1010) == OK
    assert (reached(m, 0x51), v.rip - rip) == ([1, 3], 3)
    assert m.trace.lines()[1:-1] == [
        "kvm_hv_hypercall: code 0xb fast var_cnt 0x0 rep_cnt 0x0 idx 0x0 in 0x51 out 0xa",
        "kvm_hv_send_ipi: vector 51 processor_mask 0xa",
        "kvm_apic_accept_irq: apicid 2 vec 81 (Fixed|edge)",
        "kvm_apic_accept_irq: apicid 9 vec 81 (Fixed|edge)",
        "kvm_hv_hypercall_done: result 0x0",
    ]
    assert v.get_msr(0x830) == before


def test_targets_are_told() -> None:
    """Effects are those of any interrupt, and Vcpu.targets has them."""
    m = windows()
    for v in m.vcpus:
        v.wrmsr(0x80B, 0)
    out = m.vcpus[0].exit(fx.VmxExit.VMCALL, rcx=SEND | FAST, rdx=0x51, r8=0b1111)
    assert (out.accepted, out.effects, out.user) == (4, fx.Effect.KICK, None)
    assert [target.vcpu for target in m.vcpus[0].targets] == [1, 2, 3]


def test_slow_ipi() -> None:
    """Sixteen bytes anywhere in memory: no alignment, the reserved word does not matter."""
    m = windows()
    v = m.vcpus[0]
    assert v.hv_hypercall(SEND, put(m, 0xDEAD << 32 | 0x51, 0b0100)) == OK
    assert reached(m, 0x51) == [2]
    assert v.hv_hypercall(SEND, put(m, 0x52, 0b1000, at=0x7FFB)) == OK  # across two pages
    assert reached(m, 0x52) == [3]


@pytest.mark.parametrize(
    ("control", "given", "output", "status", "traced"),
    [
        (SEND | FAST | 1 << VAR, 0x51, 1, BAD, False),
        (SEND | FAST | 1 << REP, 0x51, 1, BAD, False),
        (SEND | FAST | 1 << START, 0x51, 1, BAD, False),
        (SEND | FAST, 1 << 32 | 0x51, 1, BAD, False),
        (SEND, 1 << 40, 0, BAD, False),
        (SEND | FAST, 0x0F, 1, BAD, True),
        (SEND | FAST, 0x10, 1, OK, True),
        (SEND | FAST, 0xFF, 1, OK, True),
        (SEND | FAST, 0x100, 1, BAD, True),
        (SEND | FAST, 0x51, 0, OK, True),
        (SEND | FAST, 0x51, 0xF0, OK, True),
        (SEND | FAST | 1 << 27, 0x51, 1, BAD, False),
        (SEND | FAST | 1 << 31, 0x51, 1, BAD, False),
        (SEND | FAST | 1 << 44, 0x51, 1, BAD, False),
        (SEND | FAST | 1 << 60, 0x51, 1, BAD, False),
    ],
)
@pytest.mark.parametrize("kernel", NEW)
def test_ipi_refused(control: int, given: int, output: int, status: HvStatus, traced: bool, kernel: str) -> None:
    """What makes SEND_IPI invalid, and whether it was looked at closely enough to have its own line."""
    m = windows(kernel)
    assert m.vcpus[0].hv_hypercall(control, given, output) == status
    assert ("kvm_hv_send_ipi" in names(m)) is traced


def test_vp_indices() -> None:
    """The host moves VP indices; two vCPUs with the same one both get it, and bits beyond the last reach nobody."""
    m = windows()
    m.vcpus[1].set_msr(MSR_HV_VP_INDEX, 3)
    m.vcpus[2].set_msr(MSR_HV_VP_INDEX, 65)
    v = m.vcpus[0]
    v.hv_hypercall(SEND | FAST, 0x51, 0b1000)
    v.hv_hypercall(SEND | FAST, 0x52, 0b0110)
    v.hv_hypercall(SEND_EX | FAST | 1 << VAR, 0x53, 0, (0b10, 0b10))
    assert [reached(m, vector) for vector in (0x51, 0x52, 0x53)] == [[1, 3], [], [2]]


def test_disabled_apics() -> None:
    """An APIC that is off has its line and gets nothing; the call succeeds."""
    m = windows()
    m.vcpus[1].set_msr(r.MSR_APICBASE, 0xFEE0_0000)
    m.trace.clear()
    assert m.vcpus[0].hv_hypercall(SEND | FAST, 0x51, 0b0110) == OK
    assert (reached(m, 0x51), names(m).count("kvm_apic_accept_irq")) == ([2], 2)


# --------------------------------------------------------------------------------------------------------- SEND_IPI_EX


def test_ipi_to_a_set() -> None:
    """Banks lie by rank: behind the header in memory, or from the upper half of XMM0 on."""
    m = windows()
    m.vcpus[3].set_msr(MSR_HV_VP_INDEX, 3 * 64 + 7)
    v = m.vcpus[0]
    banks = (0b0010, 1 << 7)
    assert v.hv_hypercall(SEND_EX | 2 << VAR, put(m, 0x51, 0, 0b1001, *banks)) == OK
    assert v.hv_hypercall(SEND_EX | FAST | 2 << VAR, 0x52, 0, (0b1001, *banks)) == OK
    assert v.hv_hypercall(SEND_EX | FAST | 2 << VAR, 0x7 << 32 | 0x53, 2, (0b1001, *banks)) == OK
    assert [reached(m, vector) for vector in (0x51, 0x52, 0x53)] == [[1, 3]] * 3
    assert "kvm_hv_send_ipi_ex: vector 53 format 2 valid_bank_mask 0x9" in m.trace.lines()


def test_ipi_to_all() -> None:
    """Format 1 means every vCPU, the sender too, but for the size of the mask that it does not use."""
    m = windows()
    v = m.vcpus[0]
    assert v.hv_hypercall(SEND_EX | FAST, 0x51, 1) == OK
    assert v.hv_hypercall(SEND_EX | FAST | 1 << VAR, 0x52, 1, (0b100, 0)) == OK
    assert v.hv_hypercall(SEND_EX | FAST, 0x53, 1, (0b100,)) == BAD
    assert [reached(m, vector) for vector in (0x51, 0x52, 0x53)] == [[0, 1, 2, 3], [0, 1, 2, 3], []]


@pytest.mark.parametrize(
    ("control", "given", "kind", "xmm", "status"),
    [
        (0, 5, 0, (), OK),  # an empty set: the vector is not looked at
        (0, 5, 1, (), BAD),
        (1 << VAR, 5, 0, (1, 1), BAD),
        (0, 0x51, 0, (1, 1), BAD),
        (2 << VAR, 0x51, 0, (1, 1), BAD),
        (1 << REP, 0x51, 1, (), BAD),
        (1 << START, 0x51, 1, (), BAD),
        (11 << VAR, 0x51, 0, (0x7FF, *(1,) * 11), OK),
        (12 << VAR, 0x51, 0, (0xFFF, *(1,) * 11), BAD),
        (12 << VAR, 0x51, 1, (0xFFF, *(1,) * 11), OK),
        (64 << VAR, 0x51, 1, (L.NONE,), OK),
    ],
)
@pytest.mark.parametrize("kernel", NEW)
def test_set_refused(control: int, given: int, kind: int, xmm: tuple[int, ...], status: HvStatus, kernel: str) -> None:
    m = windows(kernel)
    assert m.vcpus[0].hv_hypercall(SEND_EX | FAST | control, given, kind, xmm) == status


def test_slow_set_beyond_memory() -> None:
    """The header may be there and the banks not: then the call has had its line."""
    m = windows()
    m.guest_memory = bytearray(0x2000)
    v = m.vcpus[0]
    assert v.hv_hypercall(SEND_EX | 1 << VAR, put(m, 0x51, 0, 1, 2, at=0x1FE0)) == OK
    assert v.hv_hypercall(SEND_EX | 1 << VAR, put(m, 0x52, 0, 1, at=0x1FE8)) == BAD
    assert names(m).count("kvm_hv_send_ipi_ex") == 2
    assert v.hv_hypercall(SEND_EX | 1 << VAR, 0x1FF0) == BAD
    assert names(m).count("kvm_hv_send_ipi_ex") == 2
    assert [reached(m, vector) for vector in (0x51, 0x52)] == [[1], []]


@pytest.mark.parametrize(("kernel", "status"), [("5.15", BAD), ("6.1", OK), ("6.18", OK)])
def test_banks_of_no_vcpu_are_not_read(kernel: str, status: HvStatus) -> None:
    """A VM of at most 1,024 vCPUs has 16 banks; since 6.1 those behind need not be there, but they are counted."""
    m = windows(kernel)
    m.mem[L.H_HV_VP_INDICES] = 1024
    m.guest_memory = bytearray(0x1000)
    at = put(m, 0x51, 0, (1 << 20) - 1, *(0b100 for _ in range(16)), at=0x1000 - 8 * 19)
    assert m.vcpus[0].hv_hypercall(SEND_EX | 20 << VAR, at) == status
    assert reached(m, 0x51) == ([2] if status is OK else [])


# --------------------------------------------------------------------------------------------------------- generations


@pytest.mark.parametrize(
    ("kernel", "control", "xmm", "status"),
    [
        ("5.10", SEND_EX | FAST | 1 << VAR, (1, 2), BAD),
        ("5.15", SEND_EX | FAST | 1 << VAR, (1, 2), OK),
        ("5.15", SEND_EX | FAST, (1, 2), OK),
        ("5.15", SEND_EX | FAST | 9 << VAR, (1, 2), OK),
        ("6.1", SEND_EX | FAST, (1, 2), BAD),
        ("5.10", SEND | FAST | 1 << VAR, (), OK),
        ("5.15", SEND | FAST | 1 << 27, (), OK),
        ("6.1", SEND | FAST | 1 << 27, (), BAD),
        ("5.15", HvCall.NOTIFY_LONG_SPIN_WAIT | 1 << VAR, (), OK),
        ("6.1", HvCall.NOTIFY_LONG_SPIN_WAIT | 1 << VAR, (), BAD),
        ("5.10", HvCall.FLUSH_VIRTUAL_ADDRESS_SPACE | FAST, (), BAD),
        ("5.15", HvCall.FLUSH_VIRTUAL_ADDRESS_SPACE | FAST, (), OK),
        ("6.1", HvCall.EXT_CALL_QUERY_CAPABILITIES | FAST, (), CODE),
        ("6.6", HvCall.EXT_CALL_QUERY_CAPABILITIES | FAST, (), PARAMETER),
        ("6.6", HvCall.EXT_CALL_LAST + 1, (), CODE),
    ],
)
def test_by_generation(kernel: str, control: int, xmm: Iterable[int], status: HvStatus) -> None:
    assert windows(kernel).vcpus[0].hv_hypercall(control, 0x51, 0, xmm) == status


def test_old_line() -> None:
    """5.10 prints no end of a call."""
    m = windows("5.10")
    m.vcpus[0].hv_hypercall(SEND | FAST, 0x51, 2)
    assert names(m)[-3:] == ["kvm_hv_hypercall", "kvm_hv_send_ipi", "kvm_apic_accept_irq"]


# -------------------------------------------------------------------------------------------------------- other calls


@pytest.mark.parametrize(
    ("control", "status"),
    [
        (HvCall.NOTIFY_LONG_SPIN_WAIT, OK),
        (HvCall.NOTIFY_LONG_SPIN_WAIT | FAST, OK),
        (HvCall.NOTIFY_LONG_SPIN_WAIT | 1 << REP, BAD),
        (HvCall.POST_MESSAGE, BAD),
        (HvCall.SIGNAL_EVENT | FAST, BAD),
        (0, CODE),
        (1, CODE),
        (HvCall.POST_DEBUG_DATA, CODE),
        (HvCall.POST_DEBUG_DATA | FAST, PARAMETER),
        (HvCall.RETRIEVE_DEBUG_DATA | FAST, PARAMETER),
        (0x6B | FAST, CODE),
        (HvCall.EXT_CALL_LAST | FAST, PARAMETER),
        (0xFFFF, CODE),
        (0x8000, CODE),
    ],
)
def test_others(control: int, status: HvStatus) -> None:
    """Of a vCPU without a SynIC; unknown codes."""
    assert windows().vcpus[0].hv_hypercall(control, 5, 0) == status


@pytest.mark.parametrize(
    ("control", "words", "status"),
    [
        (HvCall.FLUSH_VIRTUAL_ADDRESS_SPACE, (0x1000, 0, 0b10), OK),
        (HvCall.FLUSH_VIRTUAL_ADDRESS_SPACE | 1 << REP, (0, 0, 1), BAD),
        (HvCall.FLUSH_VIRTUAL_ADDRESS_SPACE | 1 << VAR, (0, 0, 1), BAD),
        (HvCall.FLUSH_VIRTUAL_ADDRESS_LIST, (0, 0, 1), BAD),
        (HvCall.FLUSH_VIRTUAL_ADDRESS_LIST | 2 << REP, (0, 0, 1, 0x1000, 0x2000), OK | 2 << REP),
        (HvCall.FLUSH_VIRTUAL_ADDRESS_LIST | 2 << REP | 1 << START, (0, 0, 1, 0x1000, 0x2000), BAD),
        (HvCall.FLUSH_VIRTUAL_ADDRESS_SPACE_EX | 1 << VAR, (0, 0, 0, 1, 2), OK),
        (HvCall.FLUSH_VIRTUAL_ADDRESS_SPACE_EX, (0, 0, 0, 1, 2), BAD),
        (HvCall.FLUSH_VIRTUAL_ADDRESS_SPACE_EX, (0, 0, 5, 0), OK),
        (HvCall.FLUSH_VIRTUAL_ADDRESS_LIST_EX | 1 << VAR | 3 << REP, (0, 0, 0, 1, 2, 1, 2, 3), OK | 3 << REP),
        (HvCall.FLUSH_VIRTUAL_ADDRESS_LIST_EX | 3 << REP, (0, 0, 0, 0), OK | 3 << REP),
    ],
)
@pytest.mark.parametrize("kernel", NEW)
def test_flush(control: int, words: tuple[int, ...], status: int, kernel: str) -> None:
    """A flush says that all repetitions are done."""
    m = windows(kernel)
    assert m.vcpus[0].hv_hypercall(control, put(m, *words)) == status


@pytest.mark.parametrize(("kernel", "status"), [("6.1", OK | 2 << REP), ("6.6", BAD)])
def test_flush_list_beyond_memory(kernel: str, status: int) -> None:
    """The list is read since 6.6, unless it is longer than KVM keeps; of a fast call, XMM registers have to hold it."""
    m = windows(kernel)
    m.guest_memory = bytearray(0x1000)
    v, code = m.vcpus[0], HvCall.FLUSH_VIRTUAL_ADDRESS_LIST
    assert v.hv_hypercall(code | 2 << REP, put(m, 0, 0, 1, 0, at=0xFE0)) == status
    assert v.hv_hypercall(code | 16 << REP, put(m, 0, 0, 1, 0, at=0xFE0)) == OK | 16 << REP
    assert v.hv_hypercall(code | FAST | 11 << REP, 0, 0, (1,)) == OK | 11 << REP
    fast = v.hv_hypercall(code | FAST | 12 << REP, 0, 0, (1,))
    assert fast == (BAD if kernel == "6.6" else OK | 12 << REP)


def test_flush_lines() -> None:
    m = windows("6.18")
    v = m.vcpus[0]
    v.hv_hypercall(HvCall.FLUSH_VIRTUAL_ADDRESS_SPACE | FAST, 0x1000, 3, (0b10,))
    v.hv_hypercall(HvCall.FLUSH_VIRTUAL_ADDRESS_SPACE_EX | FAST | 1 << VAR, 0x1000, 3, (0, 4, 7))
    assert [line for line in m.trace.lines() if "kvm_hv_flush" in line] == [
        "kvm_hv_flush_tlb: processor_mask 0x2 address_space 0x1000 flags 0x3 ",
        "kvm_hv_flush_tlb_ex: valid_bank_mask 0x4 format 0x0 address_space 0x1000 flags 0x3 ",
    ]


# ---------------------------------------------------------------------------------------------------------- user space


def test_call_of_user_space() -> None:
    """The guest waits behind its instruction; the next KVM_RUN ends it with user space's status."""
    m = windows()
    v = m.vcpus[0]
    v.enable_synic()
    v.wrmsr(0x80B, 0)
    rip = v.rip
    m.trace.clear()
    out = v.exit(fx.VmxExit.VMCALL, rcx=HvCall.POST_MESSAGE, rdx=0x7000, r8=0x8000)
    assert (out.user, v.exit_reason, v.rip - rip) == (fx.KvmExit.HYPERV, fx.KvmExit.HYPERV, 0)
    assert v.user_hypercall == (HvCall.POST_MESSAGE, (0x7000, 0x8000))
    assert names(m) == ["kvm_hv_hypercall", "kvm_userspace_exit"]
    v.complete_hypercall(0x10)
    assert v.rip == rip
    v.run()
    assert (v.rip - rip, v.read_data, v.user_hypercall, names(m)[-1]) == (3, 0x10, None, "kvm_hv_hypercall_done")
    with pytest.raises(ValueError, match="no hypercall waits"):
        v.complete_hypercall(0)


def test_unanswered_call() -> None:
    """What user space leaves lying is the result: SCONTROL of an earlier exit here. The guest may exit at once."""
    m = windows()
    v = m.vcpus[0]
    v.enable_synic()
    assert v.hv_hypercall(HvCall.EXT_CALL_QUERY_CAPABILITIES, 0, 0x8000) == 0
    m.mem[L.HV + L.HV_EXIT_CONTROL] = 0x77
    rip = v.rip
    v.wrmsr(0x80B, 0)
    assert v.rip - rip == 3 + 2
    assert "kvm_hv_hypercall_done: result 0x77" in m.trace.lines()


def test_call_waits_in_a_snapshot() -> None:
    m = windows()
    v = m.vcpus[0]
    v.enable_synic()
    v.hv_hypercall(HvCall.POST_MESSAGE, 0x7000)
    again = fx.Machine.restore(m.snapshot())
    w = again.vcpus[0]
    assert w.user_hypercall == v.user_hypercall
    w.complete_hypercall(8)
    rip = w.rip
    w.run()
    assert (w.rip - rip, w.read_data) == (3, 8)


@pytest.mark.parametrize(
    ("fast", "parameter", "status"),
    [
        (True, 0x1234, None),
        (True, 1 << 32, None),
        (True, 1 << 24, BAD),
        (True, 1 << 48, BAD),
        (False, 0x1234, None),
        (False, 1 << 24, BAD),
    ],
)
def test_signal_event(fast: bool, parameter: int, status: HvStatus | None) -> None:
    """A connection that nobody registered is user space's to look for; what no connection is, is invalid."""
    m = windows()
    v = m.vcpus[0]
    v.enable_synic()
    given = parameter if fast else put(m, parameter)
    got = v.hv_hypercall(HvCall.SIGNAL_EVENT | (FAST if fast else 0), given)
    if status is None:
        assert v.user_hypercall is not None
        assert v.user_hypercall.params[0] == parameter
    else:
        assert (got, v.user_hypercall) == (status, None)


def test_signal_event_alignment() -> None:
    m = windows()
    v = m.vcpus[0]
    for at in (INPUT + 4, 1 << 40):
        assert v.hv_hypercall(HvCall.SIGNAL_EVENT, at) == ALIGNMENT


def test_signal_event_in_5_10() -> None:
    """Before 5.15 user space was told the address of the parameter."""
    m = windows("5.10")
    m.vcpus[0].enable_synic()
    m.vcpus[0].hv_hypercall(HvCall.SIGNAL_EVENT, put(m, 0x1234))
    assert m.vcpus[0].user_hypercall == (HvCall.SIGNAL_EVENT, (INPUT, 0))


# --------------------------------------------------------------------------------------------------------- who may call


def test_until_the_guest_says_what_it_is() -> None:
    """Guest OS id 0: the instruction is KVM's own hypercall, whose number is in RAX; 11 is SCHED_YIELD, not an IPI."""
    m = windows()
    v = m.vcpus[0]
    v.set_msr(MSR_HV_GUEST_OS_ID, 0)
    assert v.hypercall(SEND, 0, 0x51, 0b1110).accepted == 0
    assert (v.read_data, reached(m, 0x51)) == (0, [])
    assert "kvm_hypercall: nr 0xb a0 0x0 a1 0x51 a2 0xe a3 0x0" in m.trace.lines()
    assert v.hv_hypercall(SEND | FAST, 0x51, 0b1110) == -r.HC_ENOSYS & L.NONE


@pytest.mark.parametrize(("kernel", "status"), [("5.15", None), ("6.12", None), ("5.10", OK)])
def test_not_hyperv(kernel: str, status: HvStatus | None) -> None:
    """A guest without the CPUID has KVM's own hypercalls alone, whatever user space writes; in 5.10 it need not ask."""
    m = windows(kernel, hyperv=False)
    expected = -r.HC_ENOSYS & L.NONE if status is None else status
    assert m.vcpus[0].hv_hypercall(SEND | FAST, 0x51, 2) == expected
    assert reached(m, 0x51) == ([] if status is None else [1])


def test_not_built() -> None:
    """Without CONFIG_KVM_HYPERV there is nothing to tell the guest OS id to."""
    m = fx.Machine(2, kvm_hyperv=False)
    assert not m.vcpus[0].set_msr(MSR_HV_GUEST_OS_ID, 1)
    assert m.vcpus[0].hv_hypercall(SEND | FAST, 0x51, 2) == -r.HC_ENOSYS & L.NONE


@pytest.mark.parametrize("vendor", VENDORS)
@pytest.mark.parametrize("how", ["cpl", "real mode"])
def test_undefined(vendor: str, how: str) -> None:
    """Outside the kernel or in real mode the guest gets #UD, without a line of Hyper-V's; RIP stays."""
    m = windows(vendor=vendor)
    v = m.vcpus[0]
    v.wrmsr(0x80B, 0)
    v.real_mode = how == "real mode"
    m.trace.clear()
    rip = v.rip
    reason = fx.SvmExit.VMMCALL if vendor == "svm" else fx.VmxExit.VMCALL
    out = v.exit(reason, rcx=SEND | FAST, rdx=0x51, r8=2, cpl=3 if how == "cpl" else 0)
    assert (out.fault, v.rip, names(m)) == (fx.Fault.UD, rip, ["kvm_inj_exception"])
    assert "kvm_inj_exception: #UD" in m.trace.lines()
    if how == "real mode":
        with pytest.raises(fx.InvalidOpcode, match="#UD"):
            v.hv_hypercall(SEND | FAST, 0x51, 2)


def test_own_calls_of_user_mode() -> None:
    """KVM's own hypercalls say EPERM instead."""
    m = windows(hyperv=False)
    m.vcpus[0].exit(fx.VmxExit.VMCALL, rax=r.HC_KICK_CPU, cpl=3)
    assert m.vcpus[0].read_data == -r.HC_EPERM & L.NONE


@pytest.mark.parametrize(
    ("without", "control", "status"),
    [
        (HvFeature.CLUSTER_IPI, SEND | FAST, DENIED),
        (HvFeature.CLUSTER_IPI, SEND_EX | FAST, DENIED),
        (HvFeature.EX_PROCESSOR_MASKS, SEND | FAST, OK),
        (HvFeature.EX_PROCESSOR_MASKS, SEND_EX | FAST, DENIED),
        (HvFeature.REMOTE_TLB_FLUSH, HvCall.FLUSH_VIRTUAL_ADDRESS_SPACE, DENIED),
        (HvFeature.EX_PROCESSOR_MASKS, HvCall.FLUSH_VIRTUAL_ADDRESS_SPACE, OK),
        (HvFeature.EX_PROCESSOR_MASKS, HvCall.FLUSH_VIRTUAL_ADDRESS_SPACE_EX, DENIED),
        (HvFeature.SPIN_WAIT, HvCall.NOTIFY_LONG_SPIN_WAIT, DENIED),
        (HvFeature.POST_MESSAGES, HvCall.POST_MESSAGE, DENIED),
        (HvFeature.SIGNAL_EVENTS, HvCall.SIGNAL_EVENT, DENIED),
        (HvFeature.EXTENDED_HYPERCALLS, HvCall.EXT_CALL_QUERY_CAPABILITIES, DENIED),
        (HvFeature.SYNIC, SEND | FAST, OK),
    ],
)
def test_enforced(without: HvFeature, control: int, status: HvStatus) -> None:
    """KVM_CAP_HYPERV_ENFORCE_CPUID: what the guest's CPUID does not offer is denied, behind the call's line."""
    every = HvFeature((1 << len(HvFeature)) - 1)
    m = windows(hyperv="enforce", hyperv_features=every & ~without)
    assert m.vcpus[0].hv_hypercall(control, 0x51 if control & FAST else INPUT) == status
    assert names(m)[0] == "kvm_hv_hypercall"


def test_enforced_xmm() -> None:
    """Without XMM input a call that needs it is #UD behind its line; being denied comes first."""
    every = HvFeature((1 << len(HvFeature)) - 1)
    m = windows(hyperv="enforce", hyperv_features=every & ~HvFeature.XMM_INPUT)
    v = m.vcpus[0]
    assert v.hv_hypercall(SEND | FAST, 0x51, 2) == OK
    with pytest.raises(fx.InvalidOpcode):
        v.hv_hypercall(SEND_EX | FAST, 0x51, 1)
    assert names(m)[-2:] == ["kvm_hv_hypercall", "kvm_inj_exception"]
    m = windows(hyperv="enforce", hyperv_features=every & ~HvFeature.XMM_INPUT & ~HvFeature.CLUSTER_IPI)
    assert m.vcpus[0].hv_hypercall(SEND_EX | FAST, 0x51, 1) == DENIED


# ------------------------------------------------------------------------------------------------------------- by door


def test_32_bits() -> None:
    """Control in EDX:EAX, input in EBX:ECX, output in EDI:ESI, result in EDX:EAX; upper halves do not count."""
    m = windows()
    junk = 0xABCD << 32
    registers = {"rdx": junk, "rax": junk | SEND | FAST, "rbx": junk, "rcx": junk | 0x51, "rdi": junk, "rsi": junk | 6}
    m.vcpus[0].exit(fx.VmxExit.VMCALL, **registers, r8=0x55, bits64=False)
    assert (m.vcpus[0].read_data, reached(m, 0x51)) == (0, [1, 2])
    assert "kvm_hv_send_ipi: vector 51 processor_mask 0x6" in m.trace.lines()


@pytest.mark.parametrize("xmm", ["abc", 5, (1 << 64,), (-1,), (0.5,), (0,) * 13])
def test_bad_xmm(xmm: Any) -> None:
    m = windows()
    with pytest.raises((ValueError, TypeError)) as caught:
        m.vcpus[0].hv_hypercall(SEND_EX | FAST, 0x51, 1, xmm)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("vendor", VENDORS)
@pytest.mark.parametrize("kernel", ["5.10", "5.15", "6.1", "6.6", "6.18"])
def test_doors_agree(kernel: str, vendor: str) -> None:
    """A batch, the compiled run loop and the Python one: same outcomes, lines and bytes."""
    rng = random.Random(f"{kernel} {vendor}")
    reason = int(fx.SvmExit.VMMCALL if vendor == "svm" else fx.VmxExit.VMCALL)
    machines = [
        build(kernel, vendor, apicv=False, seed=5, hyperv=True, traced=True, dispatcher=dispatcher)
        for dispatcher in ("python", "python", "compiled")
    ]
    for m in machines:
        m.vcpus[0].set_msr(MSR_HV_GUEST_OS_ID, 1)
        m.vcpus[1].enable_synic()
        m.vcpus[4].nested = False
        put(m, 0x41, 0b110, 1, 1, 2, at=CALL_INPUT)
    for _ in range(4 if INTERPRETED else 40):
        calls = [(rng.randrange(4), reason, *hypercall(rng)) for _ in range(10)]
        exits = np.array(calls, dtype=fx.EXIT)
        outcomes = machines[0].run(exits)
        for i, record in enumerate(exits):
            got = alone(machines[1], record)
            assert got == (int(outcomes[i]["code"]), int(outcomes[i]["value"])), f"exit {i}: {record}"
            assert alone(machines[2], record) == got, f"exit {i}: {record}"
    for m in machines[1:]:
        assert m.trace.lines() == machines[0].trace.lines()
        assert m.snapshot() == machines[0].snapshot()
