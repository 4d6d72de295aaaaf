"""Bad input of Windows guests and their user space: one clear line, and no byte outside the guest's memory.

The guest's memory lies in a bigger buffer, whose other bytes are canaries.
"""

from __future__ import annotations

import random
import struct
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import fastexit as fx
import strategies as s
from fastexit import hyperv as h
from fastexit import layout as L
from fastexit import regs as r
from fastexit.profile import NEWEST
from windows import VENDORS

CANARY, PAGE = 0xA5, 4096
TOP = (1 << 64) - 1
NO_FRAMES = (1 << 40, 1 << 51, 1 << 63, TOP & ~0xFFF)
"""Pages that no memory here reaches, the last one of 64 bits among them."""


class Guest:
    """A machine whose guest has some pages of memory, and canaries around it."""

    def __init__(self, pages: int = 4, more: int = 0, **options: Any) -> None:
        self.m = fx.Machine(**({"vcpus": 3, "hyperv": True, "apicv": False} | options))
        self.m.boot_x2apic()
        self.give(pages, more)
        for v in self.m.vcpus:
            v.enable_synic(1)
        self.v = self.m.vcpus[0]
        self.v.set_msr(h.MSR_HV_GUEST_OS_ID, 1)

    def give(self, pages: int, more: int = 0) -> None:
        """Memory of so many pages, and of some bytes more that do not count."""
        self.size = pages * PAGE
        self.all = bytearray([CANARY]) * (2 * PAGE + self.size + more)
        self.all[PAGE : PAGE + self.size] = bytes(self.size)
        self.m.guest_memory = memoryview(self.all)[PAGE : PAGE + self.size + more]

    def check(self) -> None:
        """Nobody has written around it."""
        assert set(self.all[:PAGE]) | set(self.all[PAGE + self.size :]) == {CANARY}

    def wrmsr(self, msr: int, value: int, index: int = 0) -> int | None:
        fault = self.m.vcpus[index].wrmsr(msr, value).fault
        self.check()
        return fault


# -------------------------------------------------------------------------------------------------- the guest's memory


def read_only() -> memoryview:
    return memoryview(bytearray(8192)).toreadonly()


@pytest.mark.parametrize(
    ("buffer", "kind", "says"),
    [
        (lambda: bytearray(4095), ValueError, "guest_memory has 4095 bytes: at least one page of 4096"),
        (lambda: bytearray(0), ValueError, "guest_memory has 0 bytes"),
        (lambda: bytes(8192), TypeError, "guest_memory is bytes, which is read-only"),
        (read_only, TypeError, "guest_memory is memoryview, which is read-only"),
        (lambda: memoryview(bytearray(16384))[::2], ValueError, "guest_memory is not one contiguous piece"),
        (lambda: np.zeros((64, 256), dtype=np.uint8)[:, ::2], ValueError, "guest_memory is not one contiguous piece"),
        (lambda: None, TypeError, "guest_memory is NoneType, not a writable buffer"),
        (lambda: 1 << 20, TypeError, "guest_memory is int, not a writable buffer"),
        (lambda: "x" * 4096, TypeError, "guest_memory is str, not a writable buffer"),
        (lambda: [0] * 4096, TypeError, "guest_memory is list, not a writable buffer"),
    ],
)
def test_no_guests_memory(buffer: Callable[[], Any], kind: type[Exception], says: str) -> None:
    """It is refused in one line, and the guest keeps what it has."""
    guest = Guest()
    with pytest.raises(kind) as refused:
        guest.m.guest_memory = buffer()
    assert str(refused.value).startswith(says)
    assert "\n" not in str(refused.value)
    assert len(guest.m.guest_memory) == guest.size
    assert guest.wrmsr(h.MSR_HV_VP_ASSIST_PAGE, guest.size - PAGE | 1) is None


def test_what_a_caller_lets_go_of_is_its_own() -> None:
    """The machine's buffer cannot be resized or freed under its kernels."""
    m, buffer = fx.Machine(vcpus=1, hyperv=True), bytearray(8192)
    m.guest_memory = buffer
    m.guest_memory.release()
    with m.guest_memory as memory:
        memory[0] = 7
    with pytest.raises(BufferError):
        buffer.clear()
    assert m.guest_memory[0] == 7
    m.guest_memory = np.zeros((2, 512), dtype="<u8")  # any shape, any type
    assert m.guest_memory.nbytes == 8192
    buffer.clear()


@pytest.mark.parametrize("pages", [1, 3])
@pytest.mark.parametrize("vendor", VENDORS)
def test_pages_at_the_end(vendor: str, pages: int) -> None:
    """The last page is one, the next is none; what is not a whole page of the buffer does not count."""
    guest = Guest(pages, more=PAGE - 1, vendor=vendor)
    for msr in (h.MSR_HV_VP_ASSIST_PAGE, h.MSR_HV_HYPERCALL, h.MSR_HV_SIMP, h.MSR_HV_SIEFP):
        assert guest.wrmsr(msr, guest.size - PAGE | 1) is None
        for frame in (guest.size, guest.size + PAGE, *NO_FRAMES):
            assert guest.wrmsr(msr, frame | 1) == 13
            assert guest.v.get_msr(msr) == guest.size - PAGE | 1
        assert guest.wrmsr(msr, TOP) == 13
    guest.check()


def test_a_machine_without_memory() -> None:
    """A guest that is no Windows guest gets a private memory when it asks for one; 5.10 has no gate."""
    m = fx.Machine(vcpus=1, kernel="5.10")
    assert m.vcpus[0].wrmsr(h.MSR_HV_VP_ASSIST_PAGE, 0x1001).fault == 13
    assert len(m.guest_memory) == 3 << 30
    assert m.vcpus[0].wrmsr(h.MSR_HV_VP_ASSIST_PAGE, 0x1001).fault is None


@pytest.mark.parametrize("vendor", VENDORS)
@pytest.mark.parametrize("dispatcher", ["python", "compiled"])
def test_pages_that_vanish(vendor: str, dispatcher: str) -> None:
    """Another memory, one page long, while pages beyond its end are enabled and messages on their way."""
    guest = Guest(8, vendor=vendor, dispatcher=dispatcher)
    m = guest.m
    for v in m.vcpus:
        v.rflags |= r.RFLAGS_IF
        assert v.wrmsr(h.MSR_HV_VP_ASSIST_PAGE, 7 * PAGE | 1).fault is None
        v.wrmsr(h.MSR_HV_SIMP, 6 * PAGE | 1)
        v.wrmsr(h.MSR_HV_SIEFP, 5 * PAGE | 1)
        v.wrmsr(h.MSR_HV_SINT0 + 2, 0x61)
        for timer in (0, 1):
            v.wrmsr(h.MSR_HV_STIMER0_CONFIG + 2 * timer, 2 << 16 | (9 if timer else 11))
            v.wrmsr(h.MSR_HV_STIMER0_CONFIG + 2 * timer + 1, 1000)
    guest.check()
    guest.give(1)
    for _ in range(4):
        m.set_time(m.time + 200_000)
        for v in m.vcpus:
            v.run()
            m.signal_msi(0xFEE0_0000 | v.vcpu_id << 12, 0x70)
            v.exit(fx.SvmExit.INTERRUPT if vendor == "svm" else fx.VmxExit.EXTERNAL_INTERRUPT)
            v.wrmsr(h.MSR_HV_EOM, 0)
            v.wrmsr(h.MSR_HV_EOI, 0)
            guest.check()
    assert not any(guest.all[PAGE : PAGE + guest.size])
    guest.give(8)
    for v in m.vcpus:
        v.wrmsr(h.MSR_HV_EOM, 0)
    guest.check()
    assert any(guest.all[PAGE + 6 * PAGE : PAGE + 7 * PAGE])  # messages again


def test_pages_that_user_space_puts_anywhere() -> None:
    """KVM_SET_MSRS takes any SIMP; a message to it is lost, and nothing else happens."""
    guest = Guest(2)
    guest.wrmsr(h.MSR_HV_SINT0 + 3, 0x61)
    for frame in (2 * PAGE, *NO_FRAMES):
        assert guest.v.set_msr(h.MSR_HV_SIMP, frame | 1)
        guest.wrmsr(h.MSR_HV_STIMER0_CONFIG, 3 << 16 | 9)
        guest.wrmsr(h.MSR_HV_STIMER0_CONFIG + 1, 1)
        guest.m.set_time(guest.m.time + 100_000)
        guest.v.run()
        guest.check()
    assert not any(guest.all[PAGE:-PAGE])


# ---------------------------------------------------------------------------------------------------------- hypercalls

EX = h.HvCall.SEND_IPI_EX


@pytest.mark.parametrize(
    ("xmm", "kind", "says"),
    [
        ((0,) * 13, ValueError, "xmm has 13 numbers: XMM0 to XMM5 have 12 halves"),
        ("x" * 12, TypeError, "xmm is str, not up to 12 numbers"),
        (bytes(96), TypeError, "xmm is bytes, not up to 12 numbers"),
        (5, TypeError, "xmm is int, not up to 12 numbers"),
        (None, TypeError, "xmm is NoneType, not up to 12 numbers"),
        ((1 << 64,), ValueError, "half of an XMM register 0x10000000000000000 is out of range"),
        ((-1,), ValueError, "half of an XMM register -0x1 is out of range"),
        ((1.5,), TypeError, "half of an XMM register is float, not an integer"),
    ],
)
def test_xmm_registers_that_are_none(xmm: Any, kind: type[Exception], says: str) -> None:
    guest = Guest()
    before = guest.m.snapshot()
    reason = guest.m.dispatcher.vendor.hypercall_reason
    for call in (
        lambda: guest.v.hv_hypercall(EX | h.HV_CALL_FAST, 0x41, 1, xmm),
        lambda: guest.v.exit(reason, rcx=EX, xmm=xmm),
    ):
        with pytest.raises(kind) as refused:
            call()
        assert str(refused.value).startswith(says)
    assert guest.m.snapshot() == before


@pytest.mark.parametrize("name", ["control", "input", "output"])
@pytest.mark.parametrize(
    ("value", "kind"), [(-1, ValueError), (1 << 64, ValueError), (1.5, TypeError), ("x", TypeError)]
)
def test_registers_that_are_none(name: str, value: Any, kind: type[Exception]) -> None:
    guest = Guest()
    before = guest.m.snapshot()
    with pytest.raises(kind) as refused:
        guest.v.hv_hypercall(**({"control": 0} | {name: value}))
    assert str(refused.value).split()[0] == {"control": "RCX", "input": "RDX", "output": "R8"}[name]
    assert guest.m.snapshot() == before


@pytest.mark.parametrize("count", [0, 1, 63, 65, 66, 1023])
def test_more_banks_than_there_are(count: int) -> None:
    """A mask has 64 bits: a count that is not theirs is invalid, and beyond the last bank nothing is read."""
    guest = Guest(1)
    control = EX | count << h.HV_CALL_VAR_COUNT_SHIFT
    guest.m.guest_memory[: 8 * 3] = struct.pack("<QQQ", 0x41, 0, TOP)
    assert guest.v.hv_hypercall(control, 0) == h.HvStatus.INVALID_HYPERCALL_INPUT
    whole = EX | 64 << h.HV_CALL_VAR_COUNT_SHIFT
    assert guest.v.hv_hypercall(whole, 0) == h.HvStatus.SUCCESS
    block = 8 * (3 + 64)
    for at, status in (
        (PAGE - block, 0),
        (PAGE - block + 1, 3),
        (PAGE - 24, 3),
        (PAGE - 23, 3),
        (TOP - 23, 3),
        (TOP, 3),
    ):
        if at < PAGE - 23:
            guest.m.guest_memory[at : at + 24] = struct.pack("<QQQ", 0x41, 0, TOP)
        assert guest.v.hv_hypercall(whole, at) == status, hex(at)
    fast = EX | h.HV_CALL_FAST | 12 << h.HV_CALL_VAR_COUNT_SHIFT
    assert guest.v.hv_hypercall(fast, 0x41, 0, (0xFFF, *(TOP,) * 11)) == h.HvStatus.INVALID_HYPERCALL_INPUT


@pytest.mark.skipif(not s.JIT, reason="four thousand vCPUs take compiled kernels")
def test_as_many_virtual_processors_as_there_can_be() -> None:
    """4,096 of them, all in a set of 64 banks; indices are below 4,096, and any number of vCPUs may have the same."""
    guest = Guest(1, vcpus=4096, kernel=NEWEST, dispatcher="compiled")
    guest.m.guest_memory[: 8 * 67] = struct.pack("<QQQ", 0x41, 0, TOP) + b"\xff" * 512
    whole = EX | 64 << h.HV_CALL_VAR_COUNT_SHIFT
    assert guest.v.hv_hypercall(whole, 0) == h.HvStatus.SUCCESS
    assert sum(v.pending() == 0x41 for v in guest.m.vcpus) == 4096
    assert [guest.v.set_msr(h.MSR_HV_VP_INDEX, index) for index in (4095, 4096, 0xFFFF_FFFF)] == [True, False, False]
    for v in guest.m.vcpus:
        v.set_msr(h.MSR_HV_VP_INDEX, 4095)
    guest.m.guest_memory[: 8 * 4] = struct.pack("<QQQQ", 0x42, 0, 1 << 63, 1 << 63)
    assert guest.v.hv_hypercall(EX | 1 << h.HV_CALL_VAR_COUNT_SHIFT, 0) == h.HvStatus.SUCCESS
    assert guest.v.targets == () or len(guest.v.targets) == 4095
    assert sum(v.pending() == 0x42 for v in guest.m.vcpus) == 4096
    guest.check()


@pytest.mark.parametrize("vendor", VENDORS)
@pytest.mark.parametrize("kernel", ["5.10", "5.15", NEWEST])
def test_any_control_word(kernel: str, vendor: str) -> None:
    """Random calls with random input, by both doors: a status, #UD or an exit to user space, and no stray byte."""
    rng = random.Random(f"{kernel} {vendor}")
    guest = Guest(2, kernel=kernel, vendor=vendor)
    known = {int(status) for status in h.HvStatus}
    reason = guest.m.dispatcher.vendor.hypercall_reason
    for _ in range(2000 if s.JIT else 150):
        code = rng.choice((*h.HvCall, rng.getrandbits(16)))
        control = code | (rng.getrandbits(64) & rng.choice((0xFFFF << 16, 0x7FE_0000, 0xFFF << 32, TOP)))
        given, output = (rng.choice((0, PAGE, 2 * PAGE, TOP)) - rng.randrange(80) & TOP for _ in range(2))
        size = min(64, guest.size - given)
        if size > 0:
            guest.m.guest_memory[given : given + size] = rng.randbytes(size)
        kept = bytes(guest.m.guest_memory)
        if rng.random() < 0.3:
            record = np.array([(0, reason, control & 0xFFFF_FFFF, control >> 32, given, output)], dtype=fx.EXIT)
            guest.m.run(record)
        else:
            xmm = tuple(rng.getrandbits(64) for _ in range(rng.randrange(13)))
            try:
                assert guest.v.hv_hypercall(control, given, output, xmm) & 0xFFFF in known
            except fx.InvalidOpcode:
                assert control & h.HV_CALL_FAST
        if guest.v.user_hypercall:
            guest.v.complete_hypercall(0)
            guest.v.run()
        guest.check()
        assert bytes(guest.m.guest_memory) == kept


# -------------------------------------------------------------------------------------------------- user space's calls

Call = Callable[[fx.Machine, fx.Vcpu], Any]


@pytest.mark.parametrize(
    ("kind", "says", "call"),
    [
        (ValueError, "SynIC version 0x3 is none of 0x1, 0x2", lambda m, v: v.enable_synic(3)),
        (TypeError, "SynIC version is str", lambda m, v: v.enable_synic("x")),
        (ValueError, "no hypercall waits for user space", lambda m, v: v.complete_hypercall(0)),
        (TypeError, "GSI routing entry 0 is no", lambda m, v: m.set_gsi_routing([("hv_sint", 1)])),
        (TypeError, "GSI routing entry 0 is no", lambda m, v: m.set_gsi_routing(["hv_sint"])),
        (ValueError, "GSI routing entry 0: kind 'x'", lambda m, v: m.set_gsi_routing([("x", 1, 0, 0)])),
        (ValueError, "GSI routing entry 0: GSI 0x1000", lambda m, v: m.set_gsi_routing([("hv_sint", 4096, 0, 0)])),
        (ValueError, "GSI routing entry 0: SINT -0x1", lambda m, v: m.set_gsi_routing([("hv_sint", 0, 0, -1)])),
        (ValueError, "GSI -0x1 is out of range", lambda m, v: m.irq_line(-1, 1)),
        (TypeError, "level is float", lambda m, v: m.irq_line(1, 1.0)),
    ],
)
def test_user_space_is_told(kind: type[Exception], says: str, call: Call) -> None:
    guest = Guest()
    guest.m.set_gsi_routing([("hv_sint", 1, 0, 2)])
    before = guest.m.snapshot()
    with pytest.raises(kind) as refused:
        call(guest.m, guest.v)
    assert says in str(refused.value)
    assert "\n" not in str(refused.value)
    assert guest.m.snapshot() == before


def test_lines_to_nobody() -> None:
    """A VP index or a SINT that there is not is found out when the line is raised: -1, and nothing has happened."""
    guest = Guest()
    entries = [
        ("hv_sint", gsi, vp, sint) for gsi, (vp, sint) in enumerate([(3, 2), (4095, 2), (0xFFFF_FFFF, 2), (0, 16)])
    ]
    guest.m.set_gsi_routing([*entries, ("hv_sint", 9, 0, 0xFFFF_FFFF)])
    words = guest.m.words[L.HV : L.HV + 3 * L.HV_STRIDE].copy()
    assert [guest.m.irq_line(gsi, 1) for gsi in (0, 1, 2, 3, 9, 77)] == [-1] * 6
    assert np.array_equal(words, guest.m.words[L.HV : L.HV + 3 * L.HV_STRIDE])
