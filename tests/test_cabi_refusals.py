"""What the C door refuses: each with its status, in one line, and nothing has happened."""

from __future__ import annotations

import pytest

import fastexit as fx
from embedded import Door, compiled
from fastexit import layout as L
from fastexit.config import latest_clock
from fastexit.embed import cabi
from fastexit.embed.cabi import Open, Status
from fastexit.jit import declare


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
        ({"kernel": 1 << 16}, Status.E_RANGE, "kernel 65536 is none of FX_KERNEL_*"),
        ({"hv_features": 1 << 24}, Status.E_RANGE, "hv_features"),
        ({"hv_features": (1 << 32) - 1}, Status.E_RANGE, "hv_features"),
        ({"flags": Open.HYPERV | Open.NO_KVM_HYPERV | Open.QUIET}, Status.E_RANGE, "kvm_hyperv"),
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
    with_vcpu |= {"get_cpu", "set_cpu", "targets", "mem_write", "mem_read", "io_write", "io_read"}
    with_vcpu |= {"set_msr", "get_msr", "get_lapic", "set_lapic", "reset"}
    with_vcpu |= {"enable_synic", "hv_hypercall", "get_hv_exit", "complete_hypercall"}
    with_vcpu |= {
        "nmi",
        "smi",
        "interrupt",
        "rsm",
        "hw_wrmsr",
        "hw_rdmsr",
        "hw_mmio_write",
        "hw_mmio_read",
        "hw_deliver",
    }
    with_vcpu |= {"hw_cr8", "settle", "take", "run_timers", "next_timer_of"}
    may_be_null = {("hv_hypercall", 4), ("set_costs", 0)}
    for name, field in ffi.typeof("struct fx_ops").fields[2:]:
        if name in ("restore", "set_trace"):
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
        pointers = [i for i, kind in enumerate(kinds) if kind.kind == "pointer" and (name, i) not in may_be_null]
        for i in pointers:
            given = [null if j == i else value for j, value in enumerate(good)]
            expected = {Status.OK, Status.E_SIZE} if (name, i) == ("snapshot", 0) else {Status.E_NULL}
            assert call(m, *given) in expected | ({Status.E_NULL} if name == "snapshot" else set()), (name, i)
    assert door.fx.close(m) == Status.OK
    for name, field in ffi.typeof("struct fx_ops").fields[2:]:
        if name not in ("restore", "set_trace"):
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
        ("mem_write", (0, 1 << 48, 4, 0)),
        ("mem_write", (0, 0xFEE0_0080, 3, 0)),
        ("mem_write", (0, 0xFEE0_0080, 2, 0x1_0000)),
        ("mem_write", (0, 0xFEE0_0080, 0, 0)),
        ("mem_read", (0, 0xFEE0_0080, 16)),
        ("mem_read", (0, 1 << 63, 4)),
        ("io_write", (0, 0x1_0000, 1, 0)),
        ("io_write", (0, 0x80, 1, 0x100)),
        ("io_write", (0, 0x80, 8, 0)),
        ("io_read", (0, 0xFFFF_FFFF, 4)),
        ("io_read", (0, 0x60, 0)),
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
    monkeypatch.setattr(declare, "JIT", False)
    with pytest.raises(RuntimeError, match="NUMBA_DISABLE_JIT"):
        cabi.addresses()
