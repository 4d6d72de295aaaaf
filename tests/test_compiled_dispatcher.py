"""Machine(dispatcher="compiled"): an exit in one compiled call has the outcome and the bytes of the Python dispatcher.

FASTEXIT_TEST_DISPATCHER=compiled runs the rest of the suite with it as well.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import fastexit as fx
from conftest import INTERPRETED
from fastexit import layout as L
from fastexit import regs as r
from fastexit.exits.compiled import CompiledDispatcher
from fastexit.exits.dispatcher import Dispatcher
from fastexit.exits.table import Row
from generations import DRAWN
from storms import COMPILED, VENDORS, Numbers, alone, assert_equal, build, icr, record_of, storm, timer_exit

PAGE = r.APIC_DEFAULT_PHYS_BASE


def pair(kernel: str, vendor: str, seed: int, **options: Any) -> tuple[fx.Machine, fx.Machine]:
    """Two equal machines, one of each dispatcher."""
    compiled, python = (
        build(kernel, vendor, seed=seed, dispatcher=dispatcher, **options) for dispatcher in ("compiled", "python")
    )
    return compiled, python


def assert_same(compiled: fx.Machine, python: fx.Machine, exits: np.ndarray) -> None:
    """Run the exits one at a time on both; outcomes, values, traces and every byte of the machines agree."""
    for i, record in enumerate(exits):
        got, expected = alone(compiled, record), alone(python, record)
        assert got == expected, f"exit {i}: {record}"
    assert_equal(compiled, python)


@pytest.mark.parametrize("apicv", [True, False], ids=["apicv", "plain"])
@pytest.mark.parametrize("vendor", VENDORS)
@pytest.mark.parametrize("kernel", DRAWN)
def test_storm(kernel: str, vendor: str, apicv: bool) -> None:
    """All kinds of exits over unlike vCPUs, one of which runs L2."""
    for seed in (11, 12):
        assert_same(*pair(kernel, vendor, seed, apicv=apicv), storm(seed, vendor))


@pytest.mark.parametrize("vendor", VENDORS)
@pytest.mark.parametrize("kernel", DRAWN)
def test_timers(kernel: str, vendor: str) -> None:
    """Halts, timers that run out in between, sleepers that go on."""
    rng = random.Random(f"{kernel} {vendor}")
    on = Numbers(vendor)
    compiled, python = pair(kernel, vendor, 13, apicv=rng.random() < 0.5, timer_advance_ns=300)
    for _ in range(3 if INTERPRETED else 30):
        exits = np.array([timer_exit(rng, on, compiled.time) for _ in range(12)], dtype=fx.EXIT)
        assert_same(compiled, python, exits)
        later = compiled.next_timer() or 0
        now = max(compiled.time, min(later, compiled.time + 2_000_000)) + rng.choice((0, 0, 1, 400_000))
        happened = compiled.set_time(now)
        assert happened == python.set_time(now)
        for index, out in happened:
            if out.effects & fx.Effect.WAKE:
                assert compiled.vcpus[index].run() is python.vcpus[index].run()
        for m in (compiled, python):
            m.trace.clear()
    assert compiled.snapshot() == python.snapshot()


@pytest.mark.parametrize("kernel", ["5.7", "5.8", "6.1", "6.18"])
@pytest.mark.parametrize(("vendor", "row"), COMPILED)
def test_every_operation(vendor: str, row: Row, kernel: str) -> None:
    """Each exit that has a compiled twin, on machines of all kinds."""
    rng = random.Random(f"{kernel} {vendor} {row.name} alone")
    for _ in range(1 if INTERPRETED else 6):
        options = {
            "apicv": rng.random() < 0.5,
            "retpoline": rng.random() < 0.5,
            "irqchip": rng.choice(("full", "split")),
        }
        compiled, python = pair(kernel, vendor, rng.randrange(1000), **options)
        fastpath = rng.random() < 0.8
        for m in (compiled, python):
            m.fastpath = fastpath
        exits = [record_of(rng, vendor, row, compiled.time) for _ in range(8)]
        assert_same(compiled, python, np.array(exits, dtype=fx.EXIT))


def act_of(rng: random.Random, on: Numbers) -> Callable[[fx.Vcpu], Any]:
    """An exit with what an embedder knows of it, an instruction, or an ioctl."""
    offset, value = rng.choice((0x20, 0x80, 0xB0, 0x300, 0x310)), icr(rng)
    info = {"gpa": PAGE + offset, "write": rng.random() < 0.5, "value": rng.choice((0, 0x41, 1 << 24))}
    info |= {"length": rng.choice((0, 0, 3)), rng.choice(("info2", "intr_info")): rng.choice((0, 0, 0x8000_0041))}
    write = {"rcx": 0x830, "rax": value & 0xFFFF_FFFF, "rdx": value >> 32, "info1": int(on.svm)}
    cr8 = rng.randrange(16)
    return rng.choice(
        (
            lambda v: v.exit(on.page, **info),
            lambda v: v.exit(on.rdmsr, rcx=0x808, length=2),
            lambda v: v.exit(on.wrmsr, **write),
            lambda v: v.exit(on.interrupt),
            lambda v: v.exit(on.interrupt, failed_entry=True),
            lambda v: v.hw_wrmsr(0x80B, 0),
            lambda v: v.hw_mmio_read(offset),
            lambda v: v.mmio_write(offset, 0x41),
            lambda v: v.mmio_read(offset, 2),
            lambda v: v.io_read(0x60),
            lambda v: v.set_sregs(cr8=cr8),
            lambda v: v.get_lapic(),
            lambda v: (v.put(), v.load(3)),
            lambda v: v.signal(),
            lambda v: v.run(),
            lambda v: v.hypercall(10, 3, 0, 0, 0x41),
        )
    )


@pytest.mark.parametrize("vendor", VENDORS)
def test_accesses_and_their_information(vendor: str) -> None:
    """Instruction lengths, vectoring, failed entries, what the CPU does, and ioctls in between."""
    rng = random.Random(vendor)
    compiled, python = pair("6.18", vendor, 14, apicv=False)
    for _ in range(30 if INTERPRETED else 300):
        act, i = act_of(rng, Numbers(vendor)), rng.randrange(5)
        assert act(compiled.vcpus[i]) == act(python.vcpus[i])
    assert_equal(compiled, python)


def test_python_stays_out_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """What has a compiled twin reaches no step of the Python dispatcher; what has none does, and so does everything
    once a handler was replaced."""
    m = fx.Machine(vcpus=2, kernel="5.8", dispatcher="compiled")
    m.boot_x2apic()
    v = m.vcpus[0]
    seen = []
    monkeypatch.setattr(Dispatcher, "vendor_run", lambda self, v, exit: seen.append(exit.reason) or 1)
    monkeypatch.setattr(CompiledDispatcher, "go_on", lambda *_: 0)
    v.wrmsr(0x80B, 0)
    v.wrmsr(0x830, fx.icr(dest=1, vector=0x41))
    assert v.rdmsr(0x802) == 0
    v.mem_write(0xFED0_0000, 1)
    v.mmio_read(0x20)
    v.exit(fx.VmxExit.HLT)
    v.exit(fx.VmxExit.EXTERNAL_INTERRUPT)
    v.exit(fx.VmxExit.IO_INSTRUCTION, info1=0x60_0008)
    assert seen == []
    v.exit(fx.VmxExit.CPUID)
    m.handlers[fx.VmxExit.CPUID] = lambda v, exit: None
    v.rdmsr(0x802)
    assert seen == [fx.VmxExit.CPUID, fx.VmxExit.MSR_READ]


def test_own_handler() -> None:
    """A replaced handler is called, and its KvmExit leaves to user space."""
    m = fx.Machine(vcpus=1, dispatcher="compiled")
    m.handlers[fx.VmxExit.MSR_READ] = lambda v, exit: fx.KvmExit.X86_RDMSR
    assert m.vcpus[0].rdmsr(0x1B) == 0
    assert m.vcpus[0].exit_reason is fx.KvmExit.X86_RDMSR


def test_fault() -> None:
    """Reads that fault raise, as at the Python dispatcher."""
    messages = set()
    for dispatcher in ("python", "compiled"):
        with pytest.raises(fx.GeneralProtection) as caught:
            fx.Machine(vcpus=1, dispatcher=dispatcher).vcpus[0].rdmsr(0x802)
        messages.add(str(caught.value))
    assert messages == {"RDMSR 0x802 on vCPU 0: #GP(0)"}


@pytest.mark.parametrize("value", [-1, 1 << 64, 1.5, "x", None, np.uint64(0x20), True])
def test_odd_values(value: Any) -> None:
    """What is no 64-bit int is checked, or taken, as ever."""

    def tried(m: fx.Machine, door: Any) -> object:
        try:
            return door(m.vcpus[0])
        except (TypeError, ValueError) as error:
            return type(error), str(error)

    machines = [fx.Machine(vcpus=1, apicv=False, dispatcher=dispatcher) for dispatcher in ("python", "compiled")]
    for door in (
        lambda v: v.wrmsr(0x808, value),
        lambda v: v.wrmsr(value, 0),
        lambda v: v.mem_write(PAGE + 0x80, value),
        lambda v: v.mem_write(value, 0),
        lambda v: v.mem_read(PAGE + 0x80, value),
        lambda v: v.mmio_write(value, 0),
        lambda v: v.mmio_write(0x80, 0, value),
        lambda v: v.mmio_read(value),
        lambda v: v.exit(value),
        lambda v: v.rip,
    ):
        python, compiled = (tried(m, door) for m in machines)
        assert python == compiled
    assert machines[0].snapshot() == machines[1].snapshot()


def test_which_one_it_is() -> None:
    m = fx.Machine(vcpus=1, dispatcher="compiled")
    assert repr(m.dispatcher) == f"<dispatcher 'compiled': vmx, kernel {m.kernel}>"
    copy = fx.Machine.restore(m.snapshot(), dispatcher="python")
    assert repr(copy.dispatcher) == f"<dispatcher 'python': vmx, kernel {m.kernel}>"
    assert isinstance(fx.Machine.restore(m.snapshot(), dispatcher="compiled").dispatcher, CompiledDispatcher)


def test_refusals() -> None:
    with pytest.raises(ValueError, match="unknown dispatcher 'fast': one of python, compiled"):
        fx.Machine(vcpus=1, dispatcher="fast")
    with pytest.raises(ValueError, match="costs are seen step by step: they need dispatcher='python'"):
        fx.Machine(vcpus=1, dispatcher="compiled", costs="epyc")


def test_an_index_beyond_the_machine() -> None:
    """The entries find a vCPU's index in the handle, and check it."""
    from fastexit.jit.declare import load

    m = fx.Machine(vcpus=1, dispatcher="compiled")
    assert load("single_exit")(m.handle + 1, 31, 0x1B, 0, 0) == L.NONE
    assert load("single_wrmsr")(m.handle + L.MAX_VCPUS - 1, 0x830, 0) == L.NONE
