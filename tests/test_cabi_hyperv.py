"""Windows guests at the C door: the guest's memory, hypercalls, SynIC and its exits are those of the Python door."""

from __future__ import annotations

import random
import struct
from typing import Any

import pytest

import fastexit as fx
from embedded import NOBODY, Door, compiled
from fastexit import hyperv as HV
from fastexit import layout as L
from fastexit.embed.cabi import Open, Status
from test_cabi import check, whom

PAGES = 16
CANARY = 0xA5
KINDS = [
    ({"hyperv": True}, {"flags": Open.HYPERV}),
    ({"hyperv": True, "vendor": "svm", "kernel": "6.1"}, {"flags": Open.HYPERV, "vendor": 1, "kernel": 5}),
    ({"hyperv": True, "apicv": False, "threads": False}, {"flags": Open.HYPERV | Open.NO_APICV | Open.ONE_OWNER}),
    (
        {"hyperv": "enforce", "hyperv_features": ("hypercall", "synic", "cluster_ipi", "vp_index")},
        {"flags": Open.HYPERV_ENFORCE, "hv_features": 1 << 5 | 1 << 2 | 1 << 20 | 1 << 6},
    ),
    ({"kernel": "5.10"}, {"kernel": 8}),
]


class Pair:
    """A machine at each door, and its guest's memory between two rows of canaries."""

    def __init__(self, door: Door, python: dict[str, Any], c: dict[str, Any], pages: int = PAGES) -> None:
        self.door = door
        self.bytes = bytearray([CANARY]) * ((pages + 2) * 4096)
        self.p = fx.Machine(vcpus=3, **python)
        self.p.boot_x2apic()
        self.p.guest_memory = memoryview(self.bytes)[4096:-4096]
        flags = Open(c.get("flags", 0)) | Open.BOOT_X2APIC | Open.QUIET
        self.c = door.open(**{"vcpus": 3, **c, "flags": flags})
        self.room = door.ffi.new("uint8_t[]", bytes(self.bytes))
        assert door.fx.set_guest_memory(self.c, self.room + 4096, pages * 4096) == Status.OK

    def write(self, gpa: int, data: bytes) -> None:
        """The guest writes its memory itself."""
        self.bytes[4096 + gpa : 4096 + gpa + len(data)] = data
        self.door.ffi.memmove(self.room + 4096 + gpa, data, len(data))

    def same(self) -> None:
        """Nobody has written anything else, or beyond."""
        assert bytes(self.door.ffi.buffer(self.room, len(self.bytes))) == self.bytes
        assert set(self.bytes[:4096]) == set(self.bytes[-4096:]) == {CANARY}
        assert self.door.snapshot(self.c) == self.p.snapshot()

    def wrmsr(self, v: int, msr: int, value: int) -> Any:
        out = self.p.vcpus[v].wrmsr(msr, value)
        status, result = self.door.wrmsr(self.c, v, msr, value)
        check(result, status, out)
        whom(self.door, self.c, v, result, self.p.vcpus[v].targets)
        return result

    def rdmsr(self, v: int, msr: int) -> None:
        try:
            expected = self.p.vcpus[v].rdmsr(msr)
        except fx.GeneralProtection:
            assert self.door.rdmsr(self.c, v, msr)[0] == Status.GP
        else:
            assert self.door.rdmsr(self.c, v, msr)[1].value == expected

    def call(self, v: int, control: int, given: int = 0, output: int = 0, xmm: tuple[int, ...] = ()) -> int:
        ffi, cpu = self.door.ffi, self.p.vcpus[v]
        halves = ffi.new("uint64_t[12]", list(xmm)) if xmm else ffi.NULL
        status, result = self.door.hv_hypercall(self.c, v, control, given, output, halves)
        try:
            value = cpu.hv_hypercall(control, given, output, xmm)
        except fx.InvalidOpcode:
            assert (status, result.fault, result.value) == (Status.GP, 6, 0)
            return -1
        assert result.value == value
        assert status == (Status.USER if cpu.user_hypercall else Status.OK)
        assert result.user == (fx.KvmExit.HYPERV + 1 if cpu.user_hypercall else 0)
        whom(self.door, self.c, v, result, cpu.targets)
        return value

    def hv_exit(self, v: int) -> tuple[int, int, int, tuple[int, int]] | None:
        told = self.door.ffi.new("struct fx_hv_exit *")
        if self.door.fx.get_hv_exit(self.c, v, told) == Status.NOTHING:
            return None
        return told.type, told.msr, told.control, (told.params[0], told.params[1])

    def close(self) -> None:
        assert self.door.fx.close(self.c) == Status.OK


def step(pair: Pair, rng: random.Random) -> None:
    """One random act at both doors."""
    v, kind, door = rng.randrange(3), rng.randrange(12), pair.door
    page = rng.randrange(PAGES + 2) << 12
    if kind < 4:
        stimer = HV.MSR_HV_STIMER0_CONFIG + rng.randrange(8)
        sint = rng.choice([0, HV.HV_SINT_AUTO_EOI, HV.HV_SINT_MASKED]) | rng.randrange(10, 256)
        msr, value = rng.choice(
            [
                (HV.MSR_HV_GUEST_OS_ID, rng.choice([0, 1, 1])),
                (HV.MSR_HV_HYPERCALL, page | rng.randrange(2)),
                (HV.MSR_HV_ICR, rng.randrange(4) << 32 | rng.randrange(16, 256)),
                (HV.MSR_HV_ICR, 3 << 18 | rng.randrange(16, 256)),
                (HV.MSR_HV_EOI, 0),
                (HV.MSR_HV_TPR, rng.randrange(256)),
                (HV.MSR_HV_VP_ASSIST_PAGE, page | rng.randrange(2)),
                (HV.MSR_HV_SINT0 + rng.randrange(16), sint),
                (HV.MSR_HV_SIMP, page | rng.randrange(2)),
                (HV.MSR_HV_SIEFP, page | rng.randrange(2)),
                (HV.MSR_HV_SCONTROL, 1),
                (HV.MSR_HV_EOM, 0),
                (HV.MSR_HV_RESET, 1),
                (stimer, rng.choice([0, 9, 0x1009 | 0x60 << 4, 3 << 16 | 11, rng.randrange(5000)])),
            ]
        )
        pair.wrmsr(v, msr, value)
    elif kind == 4:
        pair.rdmsr(
            v, HV.MSR_HV_GUEST_OS_ID + rng.choice([0, 1, 2, 0x10, 0x20, 0x70, 0x71, 0x72, 0x73, 0x80, 0x90, 0xB0])
        )
    elif kind < 8:
        code = rng.choice([2, 8, 0xB, 0xB, 0x15, 0x15, 0x5C, 0x5D, 0x8001, 0x7777])
        fast, count = rng.randrange(2) << 16, rng.choice([0, 1, 1, 2])
        vector = rng.randrange(0x10, 0x100)
        if code == 0xB:
            count = 0
            pair.write(0x3000, struct.pack("<QQ", vector, rng.getrandbits(3)))
        else:
            pair.write(0x3000, struct.pack("<QQQQ", vector, rng.randrange(2), 1, rng.getrandbits(3)))
        given, output = (vector, rng.getrandbits(3) if code == 0xB else rng.randrange(2)) if fast else (0x3000, 0)
        xmm = (1, rng.getrandbits(3)) if rng.random() < 0.8 else ()
        pair.call(v, code | fast | count << 17, given, output, xmm)
        if pair.p.vcpus[v].user_hypercall:
            asked = pair.p.vcpus[v].user_hypercall
            assert pair.hv_exit(v) == (HV.HvExit.HCALL, 0, asked.input, asked.params)
            if rng.random() < 0.7:
                assert door.fx.complete_hypercall(pair.c, v, 17) == Status.OK
                pair.p.vcpus[v].complete_hypercall(17)
    elif kind == 8:
        sint, level, index = rng.choice([2, 3, 16]), rng.randrange(2), rng.choice([0, 1, 2, 3])
        pair.p.set_gsi_routing([("hv_sint", 5, index, sint)])
        route = door.ffi.new("struct fx_route *", {"gsi": 5, "kind": L.ROUTE_HV_SINT, "address": index, "data": sint})
        assert door.fx.set_gsi_routing(pair.c, route, 1) == Status.OK
        status, result = door.irq_line(pair.c, 5, level)
        assert (status, result.accepted) == (Status.OK, pair.p.irq_line(5, level))
        whom(door, pair.c, NOBODY, result, pair.p.targets)
    elif kind == 9:
        when = pair.p.time + rng.choice([0, 500, 100_000, 250_000])
        happened = pair.p.set_time(when)
        results = [(r.vcpu, r.effects) for r in door.set_time(pair.c, when, room=rng.choice([1, 8]))]
        assert results == [(index, out.effects) for index, out in happened]
    elif kind == 10:
        name = rng.choice(["ack", "eoi"])
        assert door.vector(name, pair.c, v) == getattr(pair.p.vcpus[v], name)()
    else:
        assert (door.fx.enter(pair.c, v, door.result) == Status.OK) == pair.p.vcpus[v].run()
    synic = pair.p.vcpus[v].user_hyperv
    if synic is not None:
        assert pair.hv_exit(v) == (HV.HvExit.SYNIC, synic.msr, synic.control, (synic.evt_page, synic.msg_page))


@compiled
@pytest.mark.parametrize(("python", "c"), KINDS, ids=[",".join(map(str, p.values())) for p, _ in KINDS])
@pytest.mark.parametrize("seed", range(2))
def test_the_same_acts(door: Door, python: dict, c: dict, seed: int) -> None:
    """Random acts of a Windows guest: equal results, machines and guest's memory after each of them."""
    pair = Pair(door, python, c)
    rng = random.Random(f"{seed} {c}")
    for v in range(3):
        version = rng.randrange(1, 3)
        pair.p.vcpus[v].enable_synic(version)
        assert door.fx.enable_synic(pair.c, v, version) == Status.OK
        whom_kicked = door.targets(pair.c, v)
        assert whom_kicked == list(pair.p.vcpus[v].targets)
    pair.same()
    pair.wrmsr(0, HV.MSR_HV_GUEST_OS_ID, 1)
    for _ in range(150):
        step(pair, rng)
        pair.same()
    pair.close()


@compiled
def test_a_hypercall_tells_whom_and_what(door: Door) -> None:
    """SEND_IPI by registers, SEND_IPI_EX by XMM registers; RAX is the status, effects are those of any IPI."""
    pair = Pair(door, {"hyperv": True}, {"flags": Open.HYPERV})
    for v in range(3):
        pair.wrmsr(v, 0x808, 0)
    pair.wrmsr(0, HV.MSR_HV_GUEST_OS_ID, 1)
    assert pair.call(0, HV.HvCall.SEND_IPI | HV.HV_CALL_FAST, 0x41, 0b110) == HV.HvStatus.SUCCESS
    assert door.targets(pair.c, 0) == [(1, fx.Effect.NOTIFY), (2, fx.Effect.NOTIFY)]
    ex = HV.HvCall.SEND_IPI_EX | HV.HV_CALL_FAST | 1 << HV.HV_CALL_VAR_COUNT_SHIFT
    assert pair.call(1, ex, 0x42, 0, (1, 0b001)) == HV.HvStatus.SUCCESS
    assert door.targets(pair.c, 1) == [(0, fx.Effect.NOTIFY)]
    assert pair.call(1, ex, 0x42, 0) == HV.HvStatus.INVALID_HYPERCALL_INPUT  # no XMM: no bank
    record = door.ffi.new("struct fx_exit *", {"vcpu": 2, "reason": 18, "msr": 0x8888})
    assert (door.exit(pair.c, record)[0], door.result.value) == (Status.OK, HV.HvStatus.INVALID_HYPERCALL_CODE)
    pair.p.vcpus[2].exit(fx.VmxExit.VMCALL, rcx=0x8888)
    result = pair.wrmsr(0, HV.MSR_HV_ICR, 2 << 32 | 0x51)
    assert (result.vector, result.target) == (0x51, 2)
    pair.same()
    pair.close()


@compiled
def test_user_space_is_told(door: Door) -> None:
    """KVM_EXIT_HYPERV for the SynIC and for a hypercall, KVM_EXIT_SYSTEM_EVENT for a reset."""
    m = door.open(flags=Open.HYPERV | Open.BOOT_X2APIC | Open.QUIET)
    memory = door.ffi.new("uint8_t[65536]")
    told = door.ffi.new("struct fx_hv_exit *")
    assert door.fx.set_guest_memory(m, memory, 65536) == Status.OK
    assert door.fx.get_hv_exit(m, 0, told) == Status.NOTHING
    assert door.fx.complete_hypercall(m, 0, 1) == Status.NOTHING
    assert door.fx.enable_synic(m, 0, 1) == Status.OK
    assert door.wrmsr(m, 0, HV.MSR_HV_GUEST_OS_ID, 1)[0] == Status.OK
    status, result = door.wrmsr(m, 0, HV.MSR_HV_SIMP, 0x5001)
    assert (status, result.user) == (Status.USER, fx.KvmExit.HYPERV + 1)
    assert door.fx.get_hv_exit(m, 0, told) == Status.OK
    assert (told.type, told.msr, told.control, *told.params) == (1, HV.MSR_HV_SIMP, 1, 0, 0x5001)
    assert door.fx.enter(m, 0, door.result) == Status.OK
    status, result = door.hv_hypercall(m, 0, HV.HvCall.POST_MESSAGE, 0x4000, 0x6000, door.ffi.NULL)
    assert (status, result.user, result.value) == (Status.USER, fx.KvmExit.HYPERV + 1, 0)
    assert door.fx.get_hv_exit(m, 0, told) == Status.OK
    assert (told.type, told.msr, told.control, *told.params) == (2, 0, HV.HvCall.POST_MESSAGE, 0x4000, 0x6000)
    assert door.fx.complete_hypercall(m, 0, 17) == Status.OK
    assert door.fx.enter(m, 0, door.result) == Status.OK
    assert door.fx.get_hv_exit(m, 0, told) == Status.NOTHING
    status, result = door.wrmsr(m, 0, HV.MSR_HV_RESET, 1)
    assert (status, result.user) == (Status.USER, fx.KvmExit.SYSTEM_EVENT + 1)
    assert door.fx.get_hv_exit(m, 0, told) == Status.OK
    assert (told.type, told.system_event) == (0, 2)
    door.fx.close(m)


@compiled
def test_a_snapshot_leaves_the_guests_memory_where_it_is(door: Door) -> None:
    """It is in no snapshot; the machine keeps it, and a restored one has none until it gets some."""
    pair = Pair(door, {"hyperv": True}, {"flags": Open.HYPERV})
    pair.wrmsr(0, HV.MSR_HV_VP_ASSIST_PAGE, 0x2001)
    pair.same()
    assert bytes(door.ffi.buffer(pair.room + 0x3000, 5)) == bytes([0, 0, 0, 0, CANARY])
    pair.wrmsr(1, HV.MSR_HV_VP_ASSIST_PAGE, 0x3001)
    status, copy = door.restore(door.snapshot(pair.c))
    assert status == Status.OK
    assert door.snapshot(copy) == pair.p.snapshot()
    assert door.wrmsr(copy, 0, HV.MSR_HV_VP_ASSIST_PAGE, 0x3001)[0] == Status.GP
    own = door.ffi.new("uint8_t[8192]", b"\xff" * 8192)
    assert door.fx.set_guest_memory(copy, own, 8192) == Status.OK
    assert door.wrmsr(copy, 0, HV.MSR_HV_VP_ASSIST_PAGE, 0x1001)[0] == Status.OK
    assert bytes(door.ffi.buffer(own + 4096, 5)) == b"\0\0\0\0\xff"
    assert door.fx.set_guest_memory(copy, door.ffi.NULL, 0) == Status.OK
    assert door.wrmsr(copy, 0, HV.MSR_HV_VP_ASSIST_PAGE, 0x1001)[0] == Status.GP
    assert door.wrmsr(copy, 0, 0x808, 0)[0] == Status.OK
    assert door.fx.close(copy) == Status.OK
    back = fx.Machine.restore(door.snapshot(pair.c))
    assert back.snapshot() == pair.p.snapshot()
    pair.close()


@compiled
def test_what_is_refused(door: Door) -> None:
    """A status for each mistake, and nothing has happened."""
    m, plain = door.open(flags=Open.HYPERV | Open.QUIET), door.open(flags=Open.NO_KVM_HYPERV | Open.QUIET)
    memory = door.ffi.new("uint8_t[8192]")
    before = door.snapshot(m)
    for size in (1, 4095):
        assert door.fx.set_guest_memory(m, memory, size) == Status.E_SIZE
    assert door.fx.set_guest_memory(m, memory, (1 << 64) - 1) == Status.E_SIZE
    assert door.fx.set_guest_memory(m, door.ffi.NULL, 4096) == Status.E_NULL
    for version in (0, 3, 0xFFFF_FFFF):
        assert door.fx.enable_synic(m, 0, version) == Status.E_RANGE
    assert door.fx.enable_synic(plain, 0, 1) == Status.E_RANGE
    assert door.snapshot(m) == before
    assert door.fx.set_guest_memory(m, memory, 8191) == Status.OK
    assert door.wrmsr(m, 0, HV.MSR_HV_VP_ASSIST_PAGE, 0x0001)[0] == Status.OK
    for page in (0x1000, 0x2000, 1 << 51, ((1 << 52) - 1) << 12):
        assert door.wrmsr(m, 0, HV.MSR_HV_VP_ASSIST_PAGE, page | 1)[0] == Status.GP
    assert door.hv_hypercall(m, 2, 0, 0, 0, door.ffi.NULL)[0] == Status.E_VCPU
    door.wrmsr(m, 0, HV.MSR_HV_GUEST_OS_ID, 1)
    status, result = door.hv_hypercall(m, 0, HV.HvCall.SEND_IPI | HV.HV_CALL_FAST, 0x41, 1, door.ffi.NULL)
    assert (status, result.fault, result.value) == (Status.GP, 6, 0)  # in real mode: #UD
    status, result = door.hv_sint_line(m, 0, 0xFFFF_FFFF, 1)
    assert (status, result.accepted, result.target) == (Status.OK, -1, NOBODY)
    assert {door.fx.close(m), door.fx.close(plain)} == {Status.OK}
