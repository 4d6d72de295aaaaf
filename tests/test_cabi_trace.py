"""Tracepoints at the C door: each record once, with its fields and Python's text."""

from __future__ import annotations

import random
import threading
from typing import Any

import pytest

import fastexit as fx
from embedded import NOBODY, Door, compiled
from fastexit import layout as L
from fastexit.embed.cabi import NATIVE, Open, Status
from fastexit.tracepoints.text import ARGUMENTS
from test_cabi import pair, step


class Tracer:
    """What a callback has been told."""

    def __init__(self, door: Door, m: Any) -> None:
        self.records: list[tuple[int, int, int, tuple[int, ...]]] = []
        self.lines: list[str] = []
        self.threads: set[int] = set()

        def record(context: Any, r: Any) -> None:
            self.threads.add(threading.get_ident())
            self.records.append((r.event, r.vcpu, r.context, tuple(r.args)))
            line = door.ffi.new("char[]", 512)
            status = door.fx.trace_text(m, r, line, 512)
            assert status in (Status.OK, Status.NOTHING)
            if status == Status.OK:
                self.lines.append(door.ffi.string(line).decode())

        self.callback = door.ffi.callback("void(void *, const struct fx_trace *)", record)


@compiled
@pytest.mark.parametrize(("python", "c"), [({}, {}), ({"vendor": "svm", "kernel": "6.12"}, {"vendor": 1, "kernel": 6})])
def test_the_same_records_and_lines(door: Door, python: dict[str, Any], c: dict[str, Any]) -> None:
    """The same calls at both doors, traced: Python's ring has what the callback was told, and its lines."""
    p, m = pair(door, python, c)
    tracer = Tracer(door, m)
    assert door.fx.set_trace(m, tracer.callback, door.ffi.NULL) == Status.OK
    p.trace.enable()
    rng = random.Random(str(c))
    for _ in range(150):
        step(door, p, m, rng)
    records = p.trace.records()
    assert [(event, args) for event, _, _, args in tracer.records] == [
        (int(r["event"]), tuple(r["args"].tolist())) for r in records
    ]
    assert [vcpu for _, vcpu, _, _ in tracer.records] == [NOBODY if r["vcpu"] < 0 else r["vcpu"] for r in records]
    assert tracer.lines == p.trace.lines()
    assert len(tracer.lines) > 300
    assert any(context & 1 for _, _, context, _ in tracer.records)
    untraced = fx.Machine.restore(door.snapshot(m))
    assert not untraced.trace.enabled
    assert door.fx.set_trace(m, door.ffi.NULL, door.ffi.NULL) == Status.OK
    before = len(tracer.records)
    door.wrmsr(m, 0, 0x808, 0)
    assert len(tracer.records) == before
    p.trace.disable(), p.trace.clear()
    p.vcpus[0].wrmsr(0x808, 0)
    assert door.snapshot(m) == p.snapshot()
    door.fx.close(m)


@compiled
def test_hooks_may_call_while_a_machine_is_traced(door: Door) -> None:
    """The records of an exit come before its hooks, whose calls have records of their own; a hook may close."""
    told: list[object] = []
    own = door.ffi.new("struct fx_result *")

    @door.ffi.callback("void(void *, uint32_t)")
    def notify(_context: object, vcpu: int) -> None:
        told.append("notify")
        door.fx.wrmsr(m, vcpu, 0x808, 0x10, own)
        if len(told) > 60:
            door.fx.close(m)

    @door.ffi.callback("void(void *, const struct fx_trace *)")
    def trace(_context: object, record: Any) -> None:
        told.append((record.event, record.vcpu))

    head = {"size": door.ffi.sizeof("struct fx_hooks"), "abi": L.ABI_VERSION, "notify": notify}
    m = door.open(door.ffi.new("struct fx_hooks *", head), flags=Open.BOOT_X2APIC | Open.QUIET)
    for v in range(2):
        door.wrmsr(m, v, 0x808, 0)
    assert door.fx.set_trace(m, trace, door.ffi.NULL) == Status.OK
    door.wrmsr(m, 0, 0x830, 1 << 32 | 0x41)
    at = told.index("notify")
    assert {vcpu for _, vcpu in told[:at]} == {0}  # type: ignore[misc]
    assert {vcpu for _, vcpu in told[at + 1 :]} == {1}  # type: ignore[misc]
    assert (L.TP_APIC_IPI, 0) in told[:at]
    while door.fx.notify(m, 1) != Status.E_MACHINE:
        door.wrmsr(m, 0, 0x830, 1 << 32 | 0x41)
    m = door.open(flags=Open.BOOT_X2APIC | Open.QUIET)  # nothing of the tracer is left
    told.clear()
    door.wrmsr(m, 0, 0x808, 0)
    assert not told
    door.fx.close(m)


@compiled
def test_threads_of_a_traced_machine(door: Door) -> None:
    """Calls of several threads come one at a time; every record arrives, and those of an exit stay together."""
    vcpus, exits = 4, 200
    m = door.open(vcpus=vcpus, flags=Open.BOOT_X2APIC | Open.QUIET)
    for v in range(vcpus):
        door.wrmsr(m, v, 0x808, 0)
    seen: list[tuple[int, int]] = []

    @door.ffi.callback("void(void *, const struct fx_trace *)")
    def trace(_context: object, record: Any) -> None:
        seen.append((record.event, record.vcpu))

    assert door.fx.set_trace(m, trace, door.ffi.NULL) == Status.OK

    def run(v: int) -> None:
        result = door.ffi.new("struct fx_result *")
        for _ in range(exits):
            assert door.fx.wrmsr(m, v, 0x808, 0x20, result) == Status.OK

    threads = [threading.Thread(target=run, args=(v,)) for v in range(vcpus)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [seen.count((L.TP_EXIT, v)) for v in range(vcpus)] == [exits] * vcpus
    each = len(seen) // (vcpus * exits)
    assert all(len({vcpu for _, vcpu in seen[i : i + each]}) == 1 for i in range(0, len(seen), each))
    door.fx.close(m)


@compiled
def test_text_is_careful(door: Door) -> None:
    """A record that no kernel has written, a line that does not fit, no machine."""
    m, null = door.open(flags=Open.BOOT_X2APIC | Open.QUIET), door.ffi.NULL
    assert door.fx.set_trace(null, null, null) == Status.E_NULL
    assert door.fx.set_trace(door.ffi.cast("fx_machine *", 1), null, null) == Status.E_MACHINE
    line = door.ffi.new("char[]", 200)
    record = door.ffi.new("struct fx_trace *", {"event": L.TP_ENTRY, "vcpu": 1})
    assert door.fx.trace_text(m, record, line, 200) == Status.OK
    assert door.ffi.string(line).startswith(b"kvm_entry: vcpu 1, rip 0x0")
    assert door.fx.trace_text(m, record, line, 10) == Status.E_SIZE
    for event in range(260):
        record.event, record.vcpu = event, 0xFFFF_FFF0
        for i in range(7):
            record.args[i] = (1 << 64) - 1 - i
        assert door.fx.trace_text(m, record, line, 200) in (Status.OK, Status.NOTHING, Status.E_SIZE, Status.E_RANGE)
    door.fx.close(m)


def test_numbers_of_arguments_are_pythons() -> None:
    """trace.c's table is tracepoints/text.py's."""
    text = (NATIVE / "trace.c").read_text()
    table = text[text.index("arguments[] = {") :].partition("};")[0]
    for event, n in ARGUMENTS.items():
        (name,) = (name for name, value in vars(L).items() if name.startswith("TP_") and value == event)
        assert f"[FX_{name}] = {n}" in table
    assert table.count("[FX_") == len(ARGUMENTS)
