"""The C door against the Python door: the same calls, the same answers, the same memory."""

from __future__ import annotations

import random

import numpy as np
import pytest

import fastexit as fx
from embedded import NOBODY, SEVERAL, Door, compiled
from fastexit import layout as L
from fastexit import regs as R
from fastexit.embed.cabi import Open, Status


def python_machine(**options: object) -> fx.Machine:
    m = fx.Machine(**{"vcpus": 3, **options})
    m.boot_x2apic()
    return m


MACHINES = [
    ({}, {}),
    ({"threads": False}, {"flags": Open.ONE_OWNER}),
    ({"apicv": False, "kernel": "5.8"}, {"flags": Open.NO_APICV, "kernel": 4}),
    ({"vendor": "svm", "kernel": "6.12"}, {"vendor": 1, "kernel": 6}),
    ({"kernel": "seed-v3", "irqchip": "split"}, {"kernel": 1, "flags": Open.SPLIT_IRQCHIP}),
    (
        {"tsc_khz": 2_000, "timer_advance_ns": 1_000, "disable_exits": 2, "hv_timer": False, "smm": True},
        {"tsc_khz": 2_000, "timer_advance_ns": 1_000, "disable_exits": 2, "flags": Open.NO_HV_TIMER | Open.SMM},
    ),
]


def pair(door: Door, python: dict, c: dict) -> tuple[fx.Machine, object]:
    flags = Open(c.get("flags", 0)) | Open.BOOT_X2APIC | Open.QUIET
    return python_machine(**python), door.open(**{"vcpus": 3, **c, "flags": flags})


def check(result: object, status: int, out: fx.Outcome) -> None:
    """A result of C says what the Outcome of the same exit says."""
    assert result.status == status  # type: ignore[attr-defined]
    for name in ("completion", "path", "refusal", "accepted", "effects"):
        assert getattr(result, name) == getattr(out, name), name
    assert result.fault == (out.fault or 0)  # type: ignore[attr-defined]
    assert result.user == (0 if out.user is None else out.user + 1)  # type: ignore[attr-defined]
    expected = Status.GP if out.fault else Status.USER if out.user is not None else Status.BLOCKED
    assert status == (expected if out.fault or out.user is not None or out.blocked else Status.OK)


def whom(door: Door, m: object, sender: int, result: object, targets: tuple[fx.Target, ...]) -> None:
    """A result and the C door's list name the targets that Python has."""
    assert door.targets(m, sender) == list(targets)
    one = targets[0].vcpu if targets else NOBODY
    assert result.target == (one if len(targets) < 2 else SEVERAL)  # type: ignore[attr-defined]


def some_icr(rng: random.Random) -> int:
    low = rng.choice([0, R.ICR_LOGICAL, 1 << 18, 2 << 18, 3 << 18, 1 << 8, 4 << 8, 5 << 8, 6 << 8, R.ICR_TRIGGER])
    dest = rng.choice([0, 1, 2, 2, 1, 3, 0xFF, 0xFFFF_FFFF])
    return dest << 32 | (low if rng.random() < 0.4 else 0) | rng.randrange(16, 256)


def step(door: Door, p: fx.Machine, c: object, rng: random.Random) -> None:
    """One random call at both doors."""
    v, kind = rng.randrange(3), rng.randrange(14)
    cpu = p.vcpus[v]
    if kind < 4:
        msr, value = rng.choice(
            [(0x830, some_icr(rng))] * 4
            + [(0x80B, 0), (0x808, rng.randrange(256)), (0x83F, rng.randrange(256)), (0x832, 0x2_00EC), (0x838, 900)]
            + [(0x6E0, rng.randrange(1, 5000)), (0x123, 1), (0x830, 1 << 20), (0x1B, 0), (0x832, 0x4_00EC)]
        )
        out = cpu.wrmsr(msr, value)
        status, result = door.wrmsr(c, v, msr, value)
        check(result, status, out)
        assert result.vcpu == v
        assert result.vector == (value & 0xFF if msr == 0x830 else 0)
        whom(door, c, v, result, cpu.targets)
    elif kind == 4:
        msr = rng.choice([0x802, 0x803, 0x808, 0x80A, 0x830, 0x839, 0x6E0, 0x123, 0x1B])
        try:
            expected = cpu.rdmsr(msr)
        except fx.GeneralProtection:
            assert door.rdmsr(c, v, msr)[0] == Status.GP
        else:
            status, result = door.rdmsr(c, v, msr)
            assert (status, result.value) == (Status.OK, expected)
    elif kind == 5:
        offset, length = rng.choice([(0x20, 4), (0x80, 4), (0x300, 4), (0x81, 1), (0xFFC, 4)])
        value = rng.randrange(1 << 8 * length)
        out = cpu.mmio_write(offset, value, length)
        status, result = door.mmio_write(c, v, offset, length, value)
        check(result, status, out)
        whom(door, c, v, result, cpu.targets)
    elif kind == 6:
        offset, length = rng.choice([(0x20, 4), (0x30, 4), (0x81, 1), (0x300, 4), (0xFFC, 2)])
        expected = cpu.mmio_read(offset, length)
        assert door.mmio_read(c, v, offset, length)[1].value == expected
    elif kind == 7:
        address, data = rng.choice([(0xFEE0_0000 | rng.randrange(4) << 12, rng.randrange(256)), (0xFEEF_F00C, 0x41)])
        accepted = p.signal_msi(address, data)
        status, result = door.inject(c, address, data)
        assert (status, result.accepted, result.vcpu) == (Status.OK, accepted, NOBODY)
        whom(door, c, NOBODY, result, p.targets)
    elif kind == 8:
        assert (door.fx.notify(c, v) == Status.OK) == cpu.hw_notify()
    elif kind == 9:
        name = rng.choice(["pending", "ack", "eoi"])
        assert door.vector(name, c, v) == getattr(cpu, name)()
    elif kind == 10:
        when = p.time + rng.choice([0, 500, 1_000, 250_000])
        happened = p.set_time(when)
        results = [(r.vcpu, r.accepted, r.effects) for r in door.set_time(c, when, room=rng.choice([1, 8]))]
        assert results == [(index, out.accepted, out.effects) for index, out in happened]
    elif kind == 11:
        hlt = 0x78 if p.vendor == "svm" else 12
        out = cpu.exit(hlt)
        exit = door.ffi.new("struct fx_exit *", {"vcpu": v, "reason": hlt})
        status, result = door.exit(c, exit)
        check(result, status, out)
    elif kind == 12:
        assert (door.fx.enter(c, v, door.result) == Status.OK) == cpu.run()
    else:
        msr, value = rng.choice([(0x80F, 0x1FF), (0x808, 0x20), (0x1B, 0xFEE0_0C00), (0x123, 0), (0x1B, 0xFEE0_0800)])
        value |= 0x100 if msr == 0x1B and v == 0 else 0
        assert (door.fx.set_msr(c, v, msr, value) == Status.OK) == cpu.set_msr(msr, value)
        assert door.targets(c, v) == list(cpu.targets)


@compiled
@pytest.mark.parametrize(("python", "c"), MACHINES, ids=[",".join(map(str, p)) or "default" for p, _ in MACHINES])
@pytest.mark.parametrize("seed", range(4))
def test_the_same_calls(door: Door, python: dict, c: dict, seed: int) -> None:
    """Random calls at both doors: equal results, and after each of them equal memory."""
    p, m = pair(door, python, c)
    assert door.snapshot(m) == p.snapshot()
    rng = random.Random(f"{seed} {c}")
    for i in range(150):
        step(door, p, m, rng)
        assert door.snapshot(m) == p.snapshot(), i
    door.fx.close(m)


@compiled
def test_pages_and_ioctls(door: Door) -> None:
    p, m = pair(door, {"x2apic_api": 1}, {"x2apic_api": 1})
    for machine_side in (
        lambda: p.vcpus[0].wrmsr(0x830, fx.icr(1, 0x41)),
        lambda: door.wrmsr(m, 0, 0x830, 1 << 32 | 0x41),
    ):
        machine_side()
    page = door.ffi.new("uint8_t[1024]")
    assert door.fx.get_lapic(m, 1, page, 1024) == Status.OK
    assert bytes(door.ffi.buffer(page)) == p.vcpus[1].get_lapic()
    assert door.fx.set_lapic(m, 1, page, 1024) == Status.OK
    p.vcpus[1].set_lapic(bytes(door.ffi.buffer(page)))
    page[0x20] ^= 1
    assert door.fx.set_lapic(m, 1, page, 1024) == Status.E_RANGE
    with pytest.raises(ValueError, match="EINVAL"):
        p.vcpus[1].set_lapic(bytes(door.ffi.buffer(page)))
    value = door.ffi.new("uint64_t *")
    assert door.fx.get_msr(m, 1, 0x802, value) == Status.OK
    assert value[0] == p.vcpus[1].get_msr(0x802) == 1
    assert door.fx.get_msr(m, 1, 0xA30, value) == Status.E_RANGE
    assert p.vcpus[1].get_msr(0xA30) is None
    assert door.snapshot(m) == p.snapshot()
    door.fx.close(m)


@compiled
@pytest.mark.parametrize("vendor", ["vmx", "svm"])
def test_devices_by_address(door: Door, vendor: str) -> None:
    """mem_write and its like are those of Python: the page at APICBASE, and user space for the rest and for ports."""
    p = fx.Machine(vcpus=2, vendor=vendor, apicv=False)
    m = door.open(vendor=["vmx", "svm"].index(vendor), flags=Open.NO_APICV | Open.QUIET)
    v, page = p.vcpus[0], 0xFED0_0000
    base = page | R.APICBASE_EN | R.APICBASE_BSP
    check(door.wrmsr(m, 0, R.MSR_APICBASE, base)[1], Status.OK, v.wrmsr(R.MSR_APICBASE, base))
    for gpa, length in ((page + 0x30, 4), (page + 0x30, 1), (page + 0x31, 2), (page, 8), (0xFEC0_0000, 4), (0, 8)):
        status, result = door.mem_read(m, 0, gpa, length)
        assert result.value == v.mem_read(gpa, length)
        assert status == (Status.USER if v.user_mmio else Status.OK)
        assert result.user == (fx.KvmExit.MMIO + 1 if v.user_mmio else 0)
    for gpa, length, value in ((page + 0x80, 4, 0x20), (page + 0x80, 1, 0), (0xFEC0_0000, 8, (1 << 64) - 1)):
        check(door.mem_write(m, 0, gpa, length, value)[1], door.result.status, v.mem_write(gpa, value, length))
    for port, length in ((0x60, 1), (0xCFC, 4), (0xFFFF, 2)):
        status, result = door.io_read(m, 0, port, length)
        assert (status, result.user, result.value) == (Status.USER, fx.KvmExit.IO + 1, v.io_read(port, length))
        check(door.io_write(m, 0, port, length, 0x41)[1], Status.USER, v.io_write(port, 0x41, length))
    assert door.snapshot(m) == p.snapshot()
    door.fx.close(m)


@compiled
def test_batch(door: Door) -> None:
    """run() is Machine.run: same outcomes, same memory, stops at what has no compiled handler."""
    p, m = pair(door, {}, {})
    rng = random.Random(3)
    exits = np.zeros(500, dtype=fx.EXIT)
    exits["vcpu"] = [rng.randrange(3) for _ in exits]
    exits["reason"] = [rng.choice([32, 32, 32, 31, 1, L.NOTIFICATION]) for _ in exits]
    exits["msr"] = [rng.choice([0x830, 0x830, 0x80B, 0x802]) for _ in exits]
    exits["value"] = [rng.randrange(3) << 32 | rng.randrange(16, 256) for _ in exits]
    outcomes, done = np.zeros(500, dtype=fx.OUTCOME), door.ffi.new("uint64_t *")
    ours = door.ffi.from_buffer("struct fx_exit[]", exits), door.ffi.from_buffer("struct fx_outcome[]", outcomes)
    assert door.fx.run(m, *ours, 500, done) == Status.OK
    assert done[0] == 500
    assert (outcomes == p.run(exits)).all()
    assert door.snapshot(m) == p.snapshot()
    exits["reason"][7] = 10  # CPUID
    assert (door.fx.run(m, *ours, 500, done), done[0]) == (Status.UNHANDLED, 7)
    exits["vcpu"][3] = 3
    assert (door.fx.run(m, *ours, 500, done), done[0]) == (Status.E_VCPU, 3)
    assert (door.fx.run(m, *ours, 0, done), done[0]) == (Status.OK, 0)
    door.fx.close(m)


@compiled
def test_a_bad_record_stops_a_batch_before_it_begins(door: Door) -> None:
    m, done = door.open(flags=Open.BOOT_X2APIC | Open.QUIET), door.ffi.new("uint64_t *")
    for v in range(2):
        door.wrmsr(m, v, 0x808, 0)
    before = door.snapshot(m)
    exits = door.ffi.new("struct fx_exit[3]", [{"vcpu": 0, "reason": 32, "msr": 0x830, "value": 1 << 32 | 0x41}] * 3)
    outcomes = door.ffi.new("struct fx_outcome[3]")
    exits[2].reason, exits[2].gpa, exits[2].info = 49, 0xFEE0_0080, 3
    assert (door.fx.run(m, exits, outcomes, 3, done), done[0]) == (Status.E_RANGE, 2)
    exits[1].vcpu = 2
    assert (door.fx.run(m, exits, outcomes, 3, done), done[0]) == (Status.E_VCPU, 1)
    for n in ((1 << 64) - 1, 1 << 63, ((1 << 63) - 1) // 32 + 1):
        assert (door.fx.run(m, exits, outcomes, n, done), done[0]) == (Status.E_SIZE, 0)
    assert door.snapshot(m) == before
    assert door.fx.run(m, exits, outcomes, 1, done) == Status.OK
    door.fx.close(m)


def settle(door: Door, m: object, vcpus: int) -> None:
    """Everybody scans for the new APIC map, which has made him leave the guest."""
    for v in range(vcpus):
        assert door.rdmsr(m, v, 0x1B)[0] == Status.OK


@compiled
@pytest.mark.parametrize("x2apic", [True, False])
def test_whom(door: Door, x2apic: bool) -> None:
    """The target of an IPI is the vCPU that has to be notified; several are named by targets()."""
    m = door.open(ids=[0, 7, 3, 300], flags=Open.QUIET | (Open.BOOT_X2APIC if x2apic else 0))
    for v in range(4):
        if not x2apic:
            assert door.fx.set_msr(m, v, 0x80F, 0x1FF) == Status.E_RANGE
            assert door.mmio_write(m, v, 0xF0, 4, 0x1FF)[0] == Status.OK
        else:
            assert door.wrmsr(m, v, 0x808, 0)[0] == Status.OK
    settle(door, m, 4)
    if x2apic:
        _, result = door.wrmsr(m, 0, 0x830, 300 << 32 | 0x51)
    else:
        door.mmio_write(m, 0, 0x310, 4, 3 << 24)
        _, result = door.mmio_write(m, 0, 0x300, 4, 0x51)
    assert (result.effects, result.target, result.vector) == (fx.Effect.NOTIFY, 3 if x2apic else 2, 0x51)
    assert door.fx.notify(m, result.target) == Status.OK
    assert door.vector("pending", m, result.target) == 0x51
    _, result = door.inject(m, 0xFEE0_7000, 0x61)
    assert (result.effects, result.target, result.vector) == (fx.Effect.NOTIFY, 1, 0x61)
    if x2apic:
        _, result = door.wrmsr(m, 1, 0x830, 3 << 18 | 0x71)
    else:
        _, result = door.mmio_write(m, 1, 0x300, 4, 3 << 18 | 0x71)
    assert (result.effects, result.target) == (fx.Effect.NOTIFY, SEVERAL)
    assert door.targets(m, 1) == notified(door, m) == [(v, fx.Effect.NOTIFY) for v in (0, 2, 3)]
    assert door.targets(m, NOBODY) == [(1, fx.Effect.NOTIFY)]  # of the message before
    few, count = door.ffi.new("struct fx_target[2]"), door.ffi.new("uint64_t *")
    assert (door.fx.targets(m, 1, few, 1, count), count[0]) == (Status.MORE, 3)
    assert [(one.vcpu, one.effects) for one in few] == [(0, fx.Effect.NOTIFY), (0, 0)]
    assert door.fx.targets(m, 4, few, 2, count) == Status.E_VCPU
    assert door.fx.targets(m, 1, door.ffi.NULL, 1, count) == Status.E_NULL
    assert door.rdmsr(m, 1, 0x808 if x2apic else 0x1B)[0] == Status.OK
    assert door.targets(m, 1) == []
    door.fx.close(m)


def notified(door: Door, m: object, first: int = 0) -> list[tuple[int, int]]:
    """Everybody whom attention() names, with what for."""
    vcpu, effects, found = door.ffi.new("uint32_t *"), door.ffi.new("uint32_t *"), []
    while door.fx.attention(m, first, vcpu, effects) == Status.OK:
        found.append((vcpu[0], effects[0]))
        first = vcpu[0] + 1
    return found


@compiled
def test_the_one_target_of_a_broadcast(door: Door) -> None:
    """0xff in a message is everybody: one vCPU alone accepts it, and it is not the one that has the id."""
    m = door.open(ids=[0, 1, 255], flags=Open.BOOT_X2APIC | Open.QUIET)
    for v in range(3):
        assert door.wrmsr(m, v, 0x80F, 0x1FF if v == 1 else 0xFF)[0] == Status.OK
    settle(door, m, 3)
    _, result = door.inject(m, 0xFEEF_F000, 0x51)
    assert (result.accepted, result.effects, result.target) == (1, fx.Effect.NOTIFY, 1)
    assert notified(door, m) == [(1, fx.Effect.NOTIFY)]
    assert door.wrmsr(m, 2, 0x80F, 0x1FF)[0] == Status.OK
    settle(door, m, 3)
    _, result = door.wrmsr(m, 0, 0x830, 0xFF << 32 | 0x51)  # by an x2APIC it is an id
    assert (result.accepted, result.effects, result.target) == (1, fx.Effect.NOTIFY, 2)
    door.fx.close(m)


@compiled
def test_the_target_of_a_sender_that_is_reset_behind_its_exit(door: Door) -> None:
    """The INIT that a vCPU takes on its way back clears ICR2, by which its IPI went, and makes a new map."""
    m = door.open(vcpus=4)
    for v in range(4):
        assert door.mmio_write(m, v, 0xF0, 4, 0x1FF)[0] == Status.OK
    settle(door, m, 4)
    assert door.mmio_write(m, 1, 0x310, 4, 3 << 24)[0] == Status.OK
    door.mmio_write(m, 0, 0x310, 4, 1 << 24)
    _, result = door.mmio_write(m, 0, 0x300, 4, 5 << 8)
    assert (result.effects, result.target) == (fx.Effect.KICK, 1)
    status, result = door.mmio_write(m, 1, 0x300, 4, 0x51)
    assert (status, result.effects) == (Status.BLOCKED, fx.Effect.NOTIFY | fx.Effect.KICK)
    told = door.targets(m, 1)
    assert told[0] == (3, fx.Effect.NOTIFY)
    assert told[1:] == [(v, fx.Effect.KICK) for v in (0, 2, 3)], "all scan for the new map"
    assert notified(door, m) == [(v, fx.Effect.KICK) for v in (0, 2, 3)]
    door.fx.close(m)


@compiled
def test_attention_tells_what_an_ioctl_asks_of_others(door: Door) -> None:
    """A moved APIC page inhibits AVIC for the whole machine, and KVM_SET_MSRS has no result to say so."""
    m = door.open(vcpus=3, vendor=1, flags=Open.QUIET)
    for v in range(3):
        assert door.mmio_write(m, v, 0xF0, 4, 0x1FF)[0] == Status.OK
    settle(door, m, 3)
    assert notified(door, m) == []
    assert door.fx.set_msr(m, 0, 0x1B, 0xFEC0_0900) == Status.OK
    assert notified(door, m) == door.targets(m, 0) == [(1, fx.Effect.KICK), (2, fx.Effect.KICK)]
    assert door.fx.reenter(m, 0, door.result) == Status.NOTHING
    for v in (1, 2):
        assert door.fx.reenter(m, v, door.result) == Status.OK
    assert notified(door, m) == []
    door.fx.close(m)


def cpu_of(door: Door, m: object, v: int) -> object:
    cpu = door.ffi.new("struct fx_cpu *")
    assert door.fx.get_cpu(m, v, cpu) == Status.OK
    return cpu


def may_wake(door: Door, m: object, v: int) -> None:
    """Interrupts on, so that one ends a halt."""
    cpu = cpu_of(door, m, v)
    cpu.rflags |= R.RFLAGS_IF
    assert door.fx.set_cpu(m, v, cpu) == Status.OK


@compiled
def test_cpu(door: Door) -> None:
    p, m = pair(door, {}, {})
    p.vcpus[1].rip, p.vcpus[1].rflags, p.vcpus[1].shadow = 0x1234, 0x202, 1
    cpu = door.ffi.new("struct fx_cpu *", {"rip": 0x1234, "rflags": 0x202, "shadow": 1, "cs": 7, "injected": 9})
    assert door.fx.set_cpu(m, 1, cpu) == Status.OK
    assert door.snapshot(m) == p.snapshot()
    cpu.shadow = 4
    assert door.fx.set_cpu(m, 1, cpu) == Status.E_RANGE
    now, v = cpu_of(door, m, 1), p.vcpus[1]
    assert (now.rip, now.rflags, now.shadow, now.cs) == (v.rip, v.rflags, v.shadow, v.cs)
    assert (now.mp_state, now.mode, now.injected, now.exited) == (v.get_mp_state(), 0, 0, 0)
    door.fx.close(m)


@compiled
def test_hooks(door: Door) -> None:
    """Each hook is called for each vCPU, behind the exit, and any may be missing."""
    called: list[tuple[str, int]] = []

    def hook(name: str) -> object:
        return door.ffi.callback("void(void *, uint32_t)", lambda _context, vcpu: called.append((name, vcpu)))

    keep = {name: hook(name) for name in ("notify", "wake", "kick")}
    head = {"size": door.ffi.sizeof("struct fx_hooks"), "abi": L.ABI_VERSION}
    m = door.open(door.ffi.new("struct fx_hooks *", {**head, **keep}), vcpus=3, flags=Open.BOOT_X2APIC | Open.QUIET)
    for v in range(3):
        door.wrmsr(m, v, 0x808, 0)
    door.wrmsr(m, 0, 0x830, 2 << 32 | 0x51)
    assert called == [("notify", 2)]
    door.fx.notify(m, 2)
    door.wrmsr(m, 0, 0x830, 3 << 18 | 0x52)
    assert called[1:] == [("notify", 1), ("notify", 2)]
    door.fx.notify(m, 1)
    door.fx.notify(m, 2)
    while door.vector("ack", m, 1) is not None:
        door.vector("eoi", m, 1)
    may_wake(door, m, 1)
    assert door.exit(m, door.ffi.new("struct fx_exit *", {"vcpu": 1, "reason": 12}))[0] == Status.BLOCKED
    called.clear()
    door.wrmsr(m, 0, 0x830, 1 << 32 | 0x53)
    assert called == [("wake", 1)]
    assert door.fx.enter(m, 1, door.result) == Status.OK
    called.clear()
    door.wrmsr(m, 0, 0x830, 1 << 32 | 4 << 8)
    assert called == [("kick", 1)]
    assert door.fx.reenter(m, 1, door.result) == Status.OK
    door.fx.close(m)
    m = door.open(door.ffi.new("struct fx_hooks *", head), flags=Open.BOOT_X2APIC | Open.QUIET)
    door.wrmsr(m, 1, 0x808, 0)
    assert door.wrmsr(m, 0, 0x830, 1 << 32 | 0x51)[1].effects == fx.Effect.NOTIFY
    door.fx.close(m)


@compiled
def test_hooks_are_called_for_what_each_target_needs(door: Door) -> None:
    """A sleeper is woken, who runs is notified, and who was told before is left alone; a hook may close the machine."""
    called: list[tuple[str, int]] = []

    def hook(name: str) -> object:
        def call(_context: object, vcpu: int) -> None:
            called.append((name, vcpu))
            if closing and len(called) == 2:
                door.fx.close(m)

        return door.ffi.callback("void(void *, uint32_t)", call)

    closing = False
    keep = {name: hook(name) for name in ("notify", "wake", "kick")}
    head = {"size": door.ffi.sizeof("struct fx_hooks"), "abi": L.ABI_VERSION}
    m = door.open(door.ffi.new("struct fx_hooks *", {**head, **keep}), vcpus=5, flags=Open.BOOT_X2APIC | Open.QUIET)
    for v in range(5):
        assert door.wrmsr(m, v, 0x808, 0)[0] == Status.OK
    for v in (1, 3):
        may_wake(door, m, v)
        assert door.exit(m, door.ffi.new("struct fx_exit *", {"vcpu": v, "reason": 12}))[0] == Status.BLOCKED
    assert door.inject(m, 0xFEE0_2000, 0x51)[1].target == 2
    assert door.wrmsr(m, 0, 0x830, 3 << 18 | 0x52)[1].target == SEVERAL
    assert called == [("notify", 2), ("wake", 1), ("wake", 3), ("notify", 4)]
    for v in (2, 4):
        assert door.fx.notify(m, v) == Status.OK
    called.clear()
    closing = True
    assert door.inject(m, 0xFEEF_F000, 0x53)[0] == Status.OK  # the two sleepers have been woken
    assert called == [("notify", v) for v in (0, 2, 4)]
    assert door.fx.notify(m, 0) == Status.E_MACHINE


@compiled
def test_hooks_may_call_back(door: Door) -> None:
    """The thread of a hook may do what is asked for at once: the target takes its interrupt, and answers it."""
    taken, own = [], door.ffi.new("struct fx_result *")

    @door.ffi.callback("void(void *, uint32_t)")
    def notify(_context: object, vcpu: int) -> None:
        door.fx.notify(m, vcpu)
        vector = door.vector("ack", m, vcpu)
        taken.append((vcpu, vector))
        assert door.vector("eoi", m, vcpu) == vector
        if vector < 0x60:
            door.fx.wrmsr(m, vcpu, 0x830, (1 - vcpu) << 32 | vector + 1, own)
        elif vector == 0x60:
            door.fx.inject(m, 0xFEE0_0000 | vcpu << 12, 0x71, own)

    head = {"size": door.ffi.sizeof("struct fx_hooks"), "abi": L.ABI_VERSION, "notify": notify}
    m = door.open(door.ffi.new("struct fx_hooks *", head), flags=Open.BOOT_X2APIC | Open.QUIET)
    for v in range(2):
        door.wrmsr(m, v, 0x808, 0)
    status, result = door.wrmsr(m, 0, 0x830, 1 << 32 | 0x50)
    assert taken == [((i + 1) % 2, 0x50 + i) for i in range(17)] + [(1, 0x71)]
    assert (status, result.target, result.vector) == (Status.OK, 1, 0x50)
    door.fx.close(m)


@compiled
def test_woken_and_kicked_vcpus_ask_for_attention(door: Door) -> None:
    m = door.open(flags=Open.BOOT_X2APIC | Open.QUIET)
    vcpu, effects = door.ffi.new("uint32_t *"), door.ffi.new("uint32_t *")
    for v in range(2):
        door.wrmsr(m, v, 0x808, 0)
    may_wake(door, m, 1)
    door.exit(m, door.ffi.new("struct fx_exit *", {"vcpu": 1, "reason": 12}))
    assert door.fx.attention(m, 0, vcpu, effects) == Status.NOTHING
    assert door.wrmsr(m, 0, 0x830, 1 << 32 | 0x53)[1].effects == fx.Effect.WAKE
    assert door.fx.attention(m, 0, vcpu, effects) == Status.OK
    assert (vcpu[0], effects[0]) == (1, fx.Effect.WAKE)
    assert door.fx.enter(m, 1, door.result) == Status.OK
    assert door.vector("pending", m, 1) == 0x53  # the CPU delivers it, by APICv
    assert door.fx.attention(m, 0, vcpu, effects) == Status.NOTHING
    assert door.wrmsr(m, 0, 0x830, 1 << 32 | 4 << 8)[1].target == 1
    assert door.fx.attention(m, 0, vcpu, effects) == Status.OK
    assert (vcpu[0], effects[0]) == (1, fx.Effect.KICK)
    door.fx.close(m)


@compiled
def test_regions_are_the_machines_memory(door: Door) -> None:
    m = door.open(vcpus=3, flags=Open.BOOT_X2APIC | Open.QUIET)
    region = door.ffi.new("struct fx_region *")
    door.wrmsr(m, 2, 0x808, 0)
    door.wrmsr(m, 0, 0x830, 2 << 32 | 0x41)

    def row(which: int, v: int) -> memoryview:
        assert door.fx.region(m, which, region) == Status.OK
        assert v < region.rows
        base = door.ffi.cast("uint8_t *", region.base) + v * region.stride
        return memoryview(door.ffi.buffer(base, region.row_bytes))

    assert int(door.ffi.cast("uintptr_t", region.base)) == 0
    pid = row(0, 2).cast("Q")
    assert (pid[1], pid[4] & 1) == (1 << 1, 1)
    door.fx.notify(m, 2)
    assert (pid[1], pid[4] & 1) == (0, 0)
    irr, isr = row(2, 2).cast("Q"), row(3, 2).cast("Q")
    assert (irr[1], irr[4], isr[1]) == (1 << 1, 0x41, 0)
    assert door.vector("ack", m, 2) == 0x41
    assert (irr[1], irr[4], isr[1]) == (0, 0, 1 << 1)
    page = door.ffi.new("uint8_t[1024]")
    door.fx.get_lapic(m, 2, page, 1024)
    whole, kept = bytes(door.ffi.buffer(page)), bytearray(row(1, 2))
    for first, end in ((0x20, 0x24), (0x100, 0x280)):  # ids have 32 bits here; ISR, TMR and IRR live elsewhere
        kept[first:end] = whole[first:end]
    assert kept == whole
    assert whole[0x120] == 1 << 1
    assert [row(which, 0) is not None for which in (4, 5, 6)] == [True] * 3
    assert door.fx.region(m, 7, region) == Status.E_RANGE
    door.fx.close(m)


@compiled
def test_snapshots_cross_both_doors(door: Door) -> None:
    p, m = pair(door, {}, {})
    for v in range(3):
        p.vcpus[v].wrmsr(0x830, fx.icr((v + 1) % 3, 0x41 + v))
    data = p.snapshot()
    status, copy = door.restore(data)
    assert status == Status.OK
    assert door.snapshot(copy) == data
    assert fx.Machine.restore(door.snapshot(copy)).snapshot() == data
    bad = bytearray(data)
    bad[100] ^= 1
    status, none = door.restore(bytes(bad))
    assert (status, none) == (Status.E_SNAPSHOT, door.ffi.NULL)
    assert "checksum" in door.last_error()
    assert door.restore(b"\0" * 8)[0] == Status.E_SNAPSHOT
    for size in (len(data) + 1, len(data) - 1, 1 << 23, 1 << 40, (1 << 64) - 1):
        place = door.ffi.new("fx_machine **")
        held = door.ffi.from_buffer(data + b"\0")
        assert door.lib.fx_restore(held, size, door.ffi.NULL, place, door.ffi.NULL) == Status.E_SNAPSHOT, size
    needed = door.ffi.new("uint64_t *")
    short = door.ffi.new("uint8_t[]", 8)
    assert door.fx.snapshot(m, short, 8, needed) == Status.E_SIZE
    assert needed[0] == len(data)
    door.fx.close(m)
    door.fx.close(copy)


@compiled
def test_l2_is_left_alone(door: Door) -> None:
    """What only Python can do is said so, and has changed nothing; a timer of such a vCPU does not hold up time."""
    p = python_machine(tsc_khz=1_000_000)
    p.vcpus[1].wrmsr(0x832, 0x400EC)
    p.vcpus[1].wrmsr(0x6E0, 5_000)
    assert p.vcpus[1].hv_timer
    p.vcpus[1].nested = True
    status, m = door.restore(p.snapshot())
    assert status == Status.OK
    assert door.wrmsr(m, 1, 0x808, 0x20)[0] == Status.UNHANDLED
    assert door.rdmsr(m, 1, 0x808)[0] == Status.UNHANDLED
    assert door.snapshot(m) == p.snapshot()
    assert list(door.set_time(m, 10_000)) == []
    assert door.exit(m, door.ffi.new("struct fx_exit *", {"vcpu": 0, "reason": 10}))[0] == Status.UNHANDLED
    door.fx.close(m)


@compiled
def test_reset(door: Door) -> None:
    """POWER: as created, but for counters; INIT: kvm_vcpu_reset(init_event), waiting unless it is the boot CPU."""
    fresh = fx.Machine(vcpus=2)
    m = door.open(flags=Open.BOOT_X2APIC | Open.QUIET)
    for v in range(2):
        door.wrmsr(m, v, 0x808, 0x30)
        door.wrmsr(m, v, 0x830, (1 - v) << 32 | 0x91)
    page = door.ffi.new("uint8_t[1024]")
    assert door.fx.reset(m, 1, 0) == Status.OK
    value = door.ffi.new("uint64_t *")
    door.fx.get_msr(m, 1, 0x1B, value)
    assert value[0] & R.APICBASE_EXTD
    assert door.fx.enter(m, 1, door.result) == Status.BLOCKED
    door.wrmsr(m, 0, 0x830, 1 << 32 | 6 << 8 | 0x9A)
    assert door.fx.enter(m, 1, door.result) == Status.OK
    assert door.fx.reset(m, NOBODY, 1) == Status.OK
    for v in range(2):
        door.fx.get_lapic(m, v, page, 1024)
        assert bytes(door.ffi.buffer(page)) == fresh.vcpus[v].get_lapic()
        door.fx.get_msr(m, v, 0x1B, value)
        assert value[0] == fresh.vcpus[v].apic_base
    assert fx.Machine.restore(door.snapshot(m)).vcpus[1].get_mp_state() == fresh.vcpus[1].get_mp_state()
    assert door.fx.reset(m, 2, 0) == Status.E_VCPU
    assert door.fx.reset(m, 0, 2) == Status.E_RANGE
    door.fx.close(m)
