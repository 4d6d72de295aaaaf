"""The C door against the Python door: the same calls, the same answers, the same memory; and one declaration of all."""

from __future__ import annotations

import random
import re
from pathlib import Path
from types import SimpleNamespace

import cffi
import numpy as np
import pytest

import fastexit as fx
from conftest import INTERPRETED
from embedded import Door, declared, need_compiler
from fastexit import layout as L
from fastexit import outcome, reasons
from fastexit import regs as R
from fastexit.config import latest_clock
from fastexit.embed import cabi
from fastexit.embed.cabi import Open, Status
from fastexit.kernels import _jit
from fastexit.profile import PROFILES

SEVERAL, NOBODY = 0xFFFF_FFFE, 0xFFFF_FFFF
compiled = pytest.mark.skipif(INTERPRETED, reason="C calls compiled kernels only")


@pytest.fixture(scope="module")
def door() -> Door:
    need_compiler()
    return Door()


# --------------------------------------------------------------------------------------------------- one declaration
def constants(prefix: str) -> dict[str, int]:
    ffi = declared()
    names = re.findall(rf"\b{prefix}(\w+) (?:= |0x)", (cabi.NATIVE / "fastexit.h").read_text())
    return {name: getattr(ffi.dlopen(None), prefix + name) for name in names}


def test_native_is_the_single_source() -> None:
    """What a wheel packs and what a checkout shows are the same bytes."""
    native = Path(__file__).parents[1] / "native"
    assert set(cabi.SOURCES) == {path.name for path in native.glob("*.[ch]")} - {"lower_bound.c"}
    for name in cabi.SOURCES:
        assert (native / name).read_bytes() == (cabi.NATIVE / name).read_bytes()


@pytest.mark.parametrize(
    ("struct", "dtype"),
    [
        ("fx_config", cabi.CONFIG),
        ("fx_result", cabi.RESULT),
        ("fx_exit", L.EXIT),
        ("fx_outcome", L.OUTCOME),
    ],
)
def test_struct_is_dtype(struct: str, dtype: np.dtype) -> None:
    """Same fields in the same order and places, of the same size and sign."""
    ffi = declared()
    fields = ffi.typeof(f"struct {struct}").fields
    assert ffi.sizeof(f"struct {struct}") == dtype.itemsize
    assert [name for name, _ in fields] == [name for name in dtype.names if name != "code"]
    for name, field in fields:
        kind, offset = dtype.fields[name]
        assert (field.offset, ffi.sizeof(field.type)) == (offset, kind.itemsize), name
        if field.type.kind == "primitive":
            assert field.type.cname == f"{'u' if kind.kind == 'u' else ''}int{kind.itemsize * 8}_t", name


@pytest.mark.parametrize("struct", ["fx_config", "fx_hooks", "fx_ops"])
def test_size_and_abi_come_first(struct: str) -> None:
    fields = declared().typeof(f"struct {struct}").fields
    assert [(name, field.offset) for name, field in fields[:2]] == [("size", 0), ("abi", 4)]


def test_result_is_an_outcome_code() -> None:
    """The first eight bytes of a result are those of the code, which the shim copies in one piece."""
    for name in ("completion", "path", "fault", "refusal", "accepted", "user"):
        assert cabi.RESULT.fields[name][1] * 8 == outcome.CODE.shift(name.upper())
    assert cabi.RESULT.fields["effects"][1] * 8 == outcome.CODE.shift("EFFECTS")


def test_statuses_and_flags() -> None:
    assert {name: value for name, value in constants("FX_").items() if name in Status.__members__} == {
        status.name: status.value for status in Status
    }
    assert constants("FX_").items() >= {flag.name: flag.value for flag in Open}.items()
    text = (cabi.NATIVE / "fastexit.h").read_text()
    flags = text[text.index("/* fx_config.flags */") :].partition("};")[0]
    assert set(re.findall(r"FX_(\w+) = ", flags)) == set(Open.__members__)


def test_enums_are_pythons() -> None:
    known = constants("FX_")
    names = [name.upper().replace(".", "_").replace("-", "_") for name in PROFILES]
    assert [known[f"KERNEL_{name}"] for name in names] == list(range(1, len(names) + 1))
    assert [known["VMX"], known["SVM"]] == [cabi.VENDORS.index("vmx"), cabi.VENDORS.index("svm")]
    assert {name: known[name] for name in fx.Effect.__members__ if name != "NONE"} == {
        e.name: e.value for e in fx.Effect if e
    }
    assert all(known[path.name] == path.value for path in fx.Path)
    assert all(known[f"COMPLETION_{name.name}"] == name.value for name in fx.Fastpath)
    assert known["NOBODY"] == known["ALL"] == NOBODY
    assert known["SEVERAL"] == SEVERAL


def shim() -> cffi.FFI:
    parser = cffi.FFI()
    parser.cdef("".join(cabi.declarations(name) for name in (*cabi.HEADERS, cabi.SHIM)))
    return parser


def test_shims_numbers_are_pythons() -> None:
    lib = shim().dlopen(None)
    for name in re.findall(r"FXP_(\w+) = ", cabi.declarations(cabi.SHIM)):
        vendor, _, reason = name.partition("_")
        numbers = {"VMX": reasons.VmxExit, "SVM": reasons.SvmExit}.get(vendor)
        assert getattr(lib, f"FXP_{name}") == (numbers[reason] if numbers else getattr(R, name)), name


def test_shims_code_masks_are_pythons() -> None:
    text = "".join((cabi.NATIVE / name).read_text() for name in cabi.SOURCES)
    for name in ("FAULT", "ACCEPTED", "USER", "EFFECTS", "BLOCKED"):
        value = int(re.search(rf"#define CODE_{name} (0x\w+)ull", text)[1], 16)  # type: ignore[index]
        assert value == outcome.CODE.mask(name), name
    for name, value in (("ICR_VECTOR", R.ICR_VECTOR), ("ICR_MODE", R.ICR_DM), ("ICR_LOGICAL", R.ICR_LOGICAL)):
        assert int(re.search(rf"#define {name} (0x\w+)ull", text)[1], 16) == value  # type: ignore[index]
    assert int(re.search(r"#define ICR_SHORTHAND (0x\w+)ull", text)[1], 16) == R.ICR_SHORTHAND  # type: ignore[index]


def test_table_is_the_entries() -> None:
    """The table's fields are cabi.ENTRIES in order, and each takes what its kernel takes: 64-bit integers."""
    from fastexit.kernels._emit import parse

    ffi = shim()
    fields = ffi.typeof("struct fxp_table").fields[2:]
    assert [name for name, _ in fields] == list(cabi.ENTRIES)
    assert ffi.sizeof("struct fxp_table") == 8 + 8 * len(cabi.ENTRIES)
    for name, field in fields:
        function = field.type
        args, result = parse(_jit.ENTRIES[name].signature)
        assert {str(kind) for kind in (*args, result)} == {"uint64"}, name
        assert [kind.cname for kind in (*function.args, function.result)] == ["uint64_t"] * (len(args) + 1), name


def test_every_keyword_of_a_machine_can_be_said_in_c() -> None:
    """But ``costs``: struct fx_result carries no cycles."""
    config = SimpleNamespace(**dict.fromkeys(cabi.CONFIG.names, 0))
    assert {**cabi.keywords(config), "vcpus": None, "apic_ids": None, "costs": None} == cabi._DEFAULTS


# ------------------------------------------------------------------------------------------------------ both doors
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
        assert (result.target == NOBODY) == (out.effects == 0)
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
    elif kind == 6:
        offset, length = rng.choice([(0x20, 4), (0x30, 4), (0x81, 1), (0x300, 4), (0xFFC, 2)])
        expected = cpu.mmio_read(offset, length)
        assert door.mmio_read(c, v, offset, length)[1].value == expected
    elif kind == 7:
        address, data = rng.choice([(0xFEE0_0000 | rng.randrange(4) << 12, rng.randrange(256)), (0xFEEF_F00C, 0x41)])
        accepted = p.signal_msi(address, data)
        status, result = door.inject(c, address, data)
        assert (status, result.accepted, result.vcpu) == (Status.OK, accepted, NOBODY)
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
    exits["reason"][7] = 18  # VMCALL
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
    exits[2].reason, exits[2].msr, exits[2].info = 49, 0x80, 3
    assert (door.fx.run(m, exits, outcomes, 3, done), done[0]) == (Status.E_RANGE, 2)
    exits[1].vcpu = 2
    assert (door.fx.run(m, exits, outcomes, 3, done), done[0]) == (Status.E_VCPU, 1)
    for n in ((1 << 64) - 1, 1 << 63, ((1 << 63) - 1) // 24 + 1):
        assert (door.fx.run(m, exits, outcomes, n, done), done[0]) == (Status.E_SIZE, 0)
    assert door.snapshot(m) == before
    assert door.fx.run(m, exits, outcomes, 1, done) == Status.OK
    door.fx.close(m)


@compiled
@pytest.mark.parametrize("x2apic", [True, False])
def test_whom(door: Door, x2apic: bool) -> None:
    """The target of an IPI is the vCPU that has to be notified; several are walked by attention()."""
    m = door.open(ids=[0, 7, 3, 300], flags=Open.QUIET | (Open.BOOT_X2APIC if x2apic else 0))
    for v in range(4):
        if not x2apic:
            assert door.fx.set_msr(m, v, 0x80F, 0x1FF) == Status.E_RANGE
            assert door.mmio_write(m, v, 0xF0, 4, 0x1FF)[0] == Status.OK
        else:
            assert door.wrmsr(m, v, 0x808, 0)[0] == Status.OK
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
    found, first = [], 0
    vcpu, effects = door.ffi.new("uint32_t *"), door.ffi.new("uint32_t *")
    while door.fx.attention(m, first, vcpu, effects) == Status.OK:
        found.append((vcpu[0], effects[0]))
        first = vcpu[0] + 1
    assert found == [(v, fx.Effect.NOTIFY) for v in (0, 2, 3)]  # the sender has taken its own on the way
    door.fx.close(m)


def notified(door: Door, m: object, first: int = 0) -> list[tuple[int, int]]:
    """Everybody whom attention() names, with what for."""
    vcpu, effects, found = door.ffi.new("uint32_t *"), door.ffi.new("uint32_t *"), []
    while door.fx.attention(m, first, vcpu, effects) == Status.OK:
        found.append((vcpu[0], effects[0]))
        first = vcpu[0] + 1
    return found


@compiled
def test_a_broadcast_is_for_nobody_by_name(door: Door) -> None:
    """0xff in a message is everybody, even where one vCPU alone accepts it and another one has the id."""
    m = door.open(ids=[0, 1, 255], flags=Open.BOOT_X2APIC | Open.QUIET)
    for v in range(3):
        assert door.wrmsr(m, v, 0x80F, 0x1FF if v == 1 else 0xFF)[0] == Status.OK
    _, result = door.inject(m, 0xFEEF_F000, 0x51)
    assert (result.accepted, result.effects, result.target) == (1, fx.Effect.NOTIFY, SEVERAL)
    assert notified(door, m) == [(1, fx.Effect.NOTIFY)]
    assert door.wrmsr(m, 2, 0x80F, 0x1FF)[0] == Status.OK
    _, result = door.wrmsr(m, 0, 0x830, 0xFF << 32 | 0x51)  # by an x2APIC it is an id
    assert (result.accepted, result.effects, result.target) == (1, fx.Effect.NOTIFY, 2)
    door.fx.close(m)


@compiled
def test_the_target_of_a_sender_that_is_reset_behind_its_exit(door: Door) -> None:
    """The INIT that a vCPU takes on its way back clears ICR2, by which its IPI went, and makes a new map."""
    m = door.open(vcpus=4)
    for v in range(4):
        assert door.mmio_write(m, v, 0xF0, 4, 0x1FF)[0] == Status.OK
    assert door.mmio_write(m, 1, 0x310, 4, 3 << 24)[0] == Status.OK
    door.mmio_write(m, 0, 0x310, 4, 1 << 24)
    _, result = door.mmio_write(m, 0, 0x300, 4, 5 << 8)
    assert (result.effects, result.target) == (fx.Effect.KICK, 1)
    status, result = door.mmio_write(m, 1, 0x300, 4, 0x51)
    assert (status, result.effects, result.target) == (Status.BLOCKED, fx.Effect.NOTIFY, SEVERAL)
    assert notified(door, m) == [(3, fx.Effect.NOTIFY)]
    door.fx.close(m)


@compiled
def test_attention_tells_what_an_ioctl_asks_of_others(door: Door) -> None:
    """A moved APIC page inhibits AVIC for the whole machine, and KVM_SET_MSRS has no result to say so."""
    m = door.open(vcpus=3, vendor=1, flags=Open.QUIET)
    for v in range(3):
        assert door.mmio_write(m, v, 0xF0, 4, 0x1FF)[0] == Status.OK
    assert notified(door, m) == []
    assert door.fx.set_msr(m, 0, 0x1B, 0xFEC0_0900) == Status.OK
    assert notified(door, m) == [(1, fx.Effect.KICK), (2, fx.Effect.KICK)]
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
    assert door.exit(m, door.ffi.new("struct fx_exit *", {"vcpu": 0, "reason": 18}))[0] == Status.UNHANDLED
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


# --------------------------------------------------------------------------------------------------------- refusals
@compiled
@pytest.mark.parametrize(
    ("fields", "status", "says"),
    [
        ({"size": 8}, Status.E_SIZE, "sizeof"),
        ({"size": 1 << 20}, Status.E_SIZE, "sizeof"),
        ({"abi": 1}, Status.E_ABI, "fx_config.abi is 1"),
        ({"vcpus": 0}, Status.E_RANGE, "vcpus is 0"),
        ({"vcpus": 4097}, Status.E_RANGE, "vcpus is 4097"),
        ({"vcpus": 0xFFFF_FFFF}, Status.E_RANGE, "vcpus is 4294967295"),
        ({"vendor": 2}, Status.E_RANGE, "vendor 2"),
        ({"kernel": 8}, Status.E_RANGE, "kernel 8"),
        ({"reserved": 1}, Status.E_RANGE, "reserved 1"),
        ({"flags": 1 << 31 | Open.QUIET}, Status.E_RANGE, "flags"),
        ({"flags": Open.NO_X2APIC | Open.BOOT_X2APIC | Open.QUIET}, Status.E_RANGE, "x2APIC"),
        ({"flags": Open.X2AVIC | Open.QUIET}, Status.E_RANGE, "x2avic"),
        ({"maxphyaddr": 60}, Status.E_RANGE, "maxphyaddr 60"),
    ],
)
def test_open_refuses(door: Door, fields: dict, status: Status, says: str) -> None:
    place = door.ffi.new("fx_machine **")
    assert door.lib.fx_open(door.config(**fields), door.ffi.NULL, place, door.fx) == status
    assert place[0] == door.ffi.NULL
    assert says in door.last_error()
    assert "\n" not in door.last_error()


@compiled
def test_places_run_out(door: Door) -> None:
    """4096 machines; the place of a closed one is the next one's when no other is free."""
    machines = [door.open(vcpus=1)]
    place = door.ffi.new("fx_machine **")
    while (status := door.lib.fx_open(door.config(vcpus=1), door.ffi.NULL, place, door.ffi.NULL)) == Status.OK:
        machines.append(place[0])
    assert (status, len(machines) > 4000, place[0]) == (Status.E_MEMORY, True, door.ffi.NULL)
    assert "4096 machines are open" in door.last_error()
    assert door.fx.close(machines[7]) == Status.OK
    assert door.fx.notify(machines[7], 0) == Status.E_MACHINE
    assert door.open(vcpus=1) == machines[7]
    assert {door.fx.close(m) for m in machines} == {Status.OK}


@compiled
def test_ids_are_checked(door: Door) -> None:
    place = door.ffi.new("fx_machine **")
    for ids, says in (([1, 1], "twice"), ([0, 4096], "4096")):
        array = door.ffi.new("uint32_t[]", ids)
        config = door.config(apic_ids=array)
        assert door.lib.fx_open(config, door.ffi.NULL, place, door.fx) == Status.E_RANGE
        assert says in door.last_error()


@compiled
def test_null_and_closed(door: Door) -> None:
    """Every call: no machine, a pointer that is none, a closed machine, no such vCPU, a null result."""
    ffi, null = door.ffi, door.ffi.NULL
    m = door.open()
    room = ffi.new("uint8_t[4096]")
    wild = ffi.cast("fx_machine *", int(ffi.cast("uintptr_t", m)) + 8)
    with_vcpu = {"wrmsr", "rdmsr", "mmio_write", "mmio_read", "notify", "pending", "ack", "eoi", "enter", "reenter"}
    with_vcpu |= {"get_cpu", "set_cpu"}
    with_vcpu |= {"set_msr", "get_msr", "get_lapic", "set_lapic", "reset"}
    for name, field in ffi.typeof("struct fx_ops").fields[2:]:
        if name == "restore":
            continue
        kinds = field.type.args[1:]
        good = [ffi.cast(kind, room) if kind.kind == "pointer" else 1 for kind in kinds]
        call = getattr(door.fx, name)
        assert call(null, *good) == Status.E_NULL, name
        assert call(wild, *good) == Status.E_MACHINE, name
        assert call(ffi.cast("fx_machine *", 1), *good) == Status.E_MACHINE, name
        if name in with_vcpu:
            for vcpu in (2, 4096, 0x8000_0000, 0xFFFF_FFFE):
                assert call(m, vcpu, *good[1:]) == Status.E_VCPU, name
        pointers = [i for i, kind in enumerate(kinds) if kind.kind == "pointer"]
        for i in pointers:
            given = [null if j == i else value for j, value in enumerate(good)]
            expected = {Status.OK, Status.E_SIZE} if (name, i) == ("snapshot", 0) else {Status.E_NULL}
            assert call(m, *given) in expected | ({Status.E_NULL} if name == "snapshot" else set()), (name, i)
    assert door.fx.close(m) == Status.OK
    for name, field in ffi.typeof("struct fx_ops").fields[2:]:
        if name != "restore":
            good = [ffi.cast(kind, room) if kind.kind == "pointer" else 0 for kind in field.type.args[1:]]
            assert getattr(door.fx, name)(m, *good) == Status.E_MACHINE, name
    assert door.lib.fx_open(null, null, null, null) == Status.E_NULL
    assert door.lib.fx_open(door.config(), null, null, null) == Status.E_NULL
    assert door.lib.fx_restore(null, 0, null, null, null) == Status.E_NULL


@compiled
@pytest.mark.parametrize("struct", ["fx_hooks", "fx_ops"])
@pytest.mark.parametrize(("field", "value", "status"), [("size", 4, Status.E_SIZE), ("abi", 9, Status.E_ABI)])
def test_size_and_abi_are_checked(door: Door, struct: str, field: str, value: int, status: Status) -> None:
    ffi = door.ffi
    head = {"size": ffi.sizeof(f"struct {struct}"), "abi": L.ABI_VERSION} | {field: value}
    given, place = ffi.new(f"struct {struct} *", head), ffi.new("fx_machine **")
    args = (given, place, ffi.NULL) if struct == "fx_hooks" else (ffi.NULL, place, given)
    assert door.lib.fx_open(door.config(), *args) == status
    assert place[0] == ffi.NULL


@compiled
@pytest.mark.parametrize("struct", ["fx_config", "fx_hooks", "fx_ops"])
def test_structs_of_a_newer_header(door: Door, struct: str) -> None:
    """Fields that the library does not know: refused if they say something, and calls are NULL."""
    ffi = door.ffi
    assert door.lib.fx_close(door.open()) == Status.OK  # and door.fx is filled in
    known = ffi.sizeof(f"struct {struct}")
    memory = ffi.new("uint64_t[]", known // 8 + 2)
    given, place = ffi.cast(f"struct {struct} *", memory), ffi.new("fx_machine **")
    config = given if struct == "fx_config" else door.config()
    hooks, ops = (given if struct == name else ffi.NULL for name in ("fx_hooks", "fx_ops"))
    if struct == "fx_config":
        given.vcpus, given.flags = 1, Open.QUIET
    given.size, given.abi, memory[known // 8 + 1] = known + 16, L.ABI_VERSION, 1
    status = door.lib.fx_open(config, hooks, place, ops)
    if struct != "fx_ops":
        assert (status, place[0]) == (Status.E_SIZE, ffi.NULL)
        assert f"{struct} has a field" in door.last_error()
        memory[known // 8 + 1] = 0
        status = door.lib.fx_open(config, hooks, place, ops)
    else:
        assert (given.size, given.wrmsr, given.close) == (known + 16, door.fx.wrmsr, door.fx.close)
        assert memory[known // 8 + 1] == 0
    assert status == Status.OK, door.last_error()
    assert door.lib.fx_close(place[0]) == Status.OK


@compiled
@pytest.mark.parametrize(
    ("name", "args"),
    [
        ("mmio_write", (0, 0x1000, 4, 0)),
        ("mmio_write", (0, 0x80, 3, 0)),
        ("mmio_write", (0, 0x80, 1, 0x100)),
        ("mmio_read", (0, 0xFFFF_FFFF, 4)),
        ("mmio_read", (0, 0x80, 8)),
    ],
)
def test_accesses_outside_the_page(door: Door, name: str, args: tuple) -> None:
    m = door.open()
    before = door.snapshot(m)
    assert getattr(door, name)(m, *args)[0] == Status.E_RANGE
    assert door.snapshot(m) == before
    door.fx.close(m)


@compiled
def test_time_never_goes_back(door: Door) -> None:
    m, count = door.open(), door.ffi.new("uint64_t *")
    assert list(door.set_time(m, 100)) == []
    for ns in (99, 1 << 63, (1 << 64) - 1):
        assert door.fx.set_time(m, ns, door.ffi.NULL, 0, count) == Status.E_RANGE
    door.fx.close(m)


@compiled
@pytest.mark.parametrize("khz", [1, 999_999, 1_000_001, 2_500_000, 10_000_000])
def test_the_clock_ends_where_pythons_does(door: Door, khz: int) -> None:
    m, count, end = door.open(tsc_khz=khz), door.ffi.new("uint64_t *"), latest_clock(khz)
    assert door.fx.set_time(m, end + 1, door.ffi.NULL, 0, count) == Status.E_RANGE
    assert list(door.set_time(m, end)) == []
    door.fx.close(m)


def test_every_status_has_words(door: Door) -> None:
    said = {status: door.ffi.string(door.lib.fx_strerror(status)).decode() for status in Status}
    assert len(set(said.values())) == len(Status)
    assert door.ffi.string(door.lib.fx_strerror(99)) == b"unknown status"
    assert door.ffi.string(door.lib.fx_version()).decode() == fx.__version__
    assert door.lib.fx_abi_version() == L.ABI_VERSION


@compiled
def test_interpreted_kernels_are_no_c_door(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_jit, "JIT", False)
    with pytest.raises(RuntimeError, match="NUMBA_DISABLE_JIT"):
        cabi.addresses()
