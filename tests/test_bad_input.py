"""Bad input: each mistake gets one clear line, and the machine is what it was before."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import fastexit as fx
from fastexit import layout as L
from fastexit.profile import NEWEST

Act = Callable[[fx.Machine, fx.Vcpu], Any]

CALLS: dict[str, tuple[type[Exception], str, Act]] = {
    "wrmsr index negative": (ValueError, "MSR -0x1 is out of range 0..0xffffffff", lambda m, v: v.wrmsr(-1, 0)),
    "wrmsr index 33 bits": (ValueError, "MSR 0x100000000 is out of range", lambda m, v: v.wrmsr(1 << 32, 0)),
    "wrmsr index float": (TypeError, "MSR is float, not an integer", lambda m, v: v.wrmsr(2096.0, 0)),
    "wrmsr index text": (TypeError, "MSR is str, not an integer", lambda m, v: v.wrmsr("0x830", 0)),
    "wrmsr value negative": (ValueError, "MSR value -0x1 is out of range", lambda m, v: v.wrmsr(0x830, -1)),
    "wrmsr value 65 bits": (ValueError, "MSR value 0x10000000000000000 is out", lambda m, v: v.wrmsr(0x830, 1 << 64)),
    "wrmsr value huge": (ValueError, "MSR value (90,001 bits) is out", lambda m, v: v.wrmsr(0x830, 1 << 90_000)),
    "time huge": (ValueError, "time (90,001 bits) is out", lambda m, v: m.set_time(1 << 90_000)),
    "icr huge": (ValueError, "DEST=(90,001 bits) does not fit", lambda m, v: fx.icr(dest=1 << 90_000)),
    "icr dest text": (TypeError, "DEST is str, not an integer", lambda m, v: fx.icr(dest="1")),
    "icr vector float": (TypeError, "VECTOR is float, not an integer", lambda m, v: fx.icr(vector=253.0)),
    "icr logical text": (TypeError, "DEST_MODE is str, not an integer", lambda m, v: fx.icr(logical="yes")),
    "icr level number": (ValueError, "LEVEL=0x2 does not fit 1 bit", lambda m, v: fx.icr(level=2)),
    "icr shorthand unknown": (
        ValueError,
        "unknown shorthand 'others': one of none, self, all, all-but-self",
        lambda m, v: fx.icr(shorthand="others"),
    ),
    "icr shorthand float": (TypeError, "SHORTHAND is float, not an integer", lambda m, v: fx.icr(shorthand=1.0)),
    "icr shorthand number": (ValueError, "SHORTHAND=0x4 does not fit 2 bits", lambda m, v: fx.icr(shorthand=4)),
    "icr delivery unknown": (
        ValueError,
        "unknown delivery mode 'fix': one of fixed, lowprio, smi,",
        lambda m, v: fx.icr(delivery="fix"),
    ),
    "wrmsr value float": (TypeError, "MSR value is float", lambda m, v: v.wrmsr(0x830, 1.5)),
    "wrmsr value None": (TypeError, "MSR value is NoneType", lambda m, v: v.wrmsr(0x830, None)),
    "rdmsr negative": (ValueError, "MSR -0x1 is out of range", lambda m, v: v.rdmsr(-1)),
    "rdmsr float": (TypeError, "MSR is float", lambda m, v: v.rdmsr(1.0)),
    "set_msr index": (ValueError, "MSR 0x100000000 is out of range", lambda m, v: v.set_msr(1 << 32, 0)),
    "set_msr value": (ValueError, "MSR value -0x1 is out of range", lambda m, v: v.set_msr(0x830, -1)),
    "get_msr float": (TypeError, "MSR is float", lambda m, v: v.get_msr(0.5)),
    "mmio_write offset": (ValueError, "xAPIC page offset 0x1000 is out of range", lambda m, v: v.mmio_write(0x1000, 0)),
    "mmio_write negative": (ValueError, "xAPIC page offset -0x10 is out of", lambda m, v: v.mmio_write(-16, 0)),
    "mmio_write length": (ValueError, "access length 3 is not 1, 2, 4 or 8", lambda m, v: v.mmio_write(0x80, 0, 3)),
    "mmio_write length 0": (ValueError, "access length 0 is not 1, 2, 4 or 8", lambda m, v: v.mmio_write(0x80, 0, 0)),
    "mmio_write length huge": (ValueError, "access length 0x10 is out of", lambda m, v: v.mmio_write(0x80, 0, 16)),
    "mmio_write value": (ValueError, "4-byte value 0x100000000 is out", lambda m, v: v.mmio_write(0x80, 1 << 32)),
    "mmio_write value of a byte": (ValueError, "1-byte value 0x100 is out", lambda m, v: v.mmio_write(0x80, 256, 1)),
    "mmio_write value float": (TypeError, "4-byte value is float", lambda m, v: v.mmio_write(0x80, 1.0)),
    "mmio_read offset": (ValueError, "xAPIC page offset 0x1000 is out of range", lambda m, v: v.mmio_read(0x1000)),
    "mmio_read length": (ValueError, "access length 3 is not 1, 2, 4 or 8", lambda m, v: v.mmio_read(0x80, 3)),
    "exit reason": (ValueError, "exit reason -0x1 is out of range", lambda m, v: v.exit(-1)),
    "exit reason text": (TypeError, "exit reason is str", lambda m, v: v.exit("MSR_WRITE")),
    "exit unknown field": (ValueError, "exit information ebx is unknown", lambda m, v: v.exit(32, ebx=0x830)),
    "exit msr": (ValueError, "msr 0x100000000 is out of range", lambda m, v: v.exit(32, msr=1 << 32)),
    "exit rax": (ValueError, "RAX -0x1 is out of range", lambda m, v: v.exit(32, rcx=0x830, rax=-1)),
    "exit rcx": (TypeError, "RCX is float", lambda m, v: v.exit(32, rcx=1.0)),
    "exit offset": (ValueError, "offset 0x1000 is out of range", lambda m, v: v.exit(49, offset=0x1000)),
    "exit size": (ValueError, "access size 3 is not 1, 2, 4 or 8", lambda m, v: v.exit(49, size=3)),
    "exit gpa": (ValueError, "gpa 0x1000000000000 is out of range", lambda m, v: v.exit(49, gpa=1 << 48)),
    "exit offset and gpa": (ValueError, "not both", lambda m, v: v.exit(49, gpa=0xFEE0_0080, offset=0x80)),
    "exit I/O size": (ValueError, "I/O instruction of 8 bytes", lambda m, v: v.exit(30, info1=7)),
    "mem_write gpa": (ValueError, "address 0x1000000000000 is out of", lambda m, v: v.mem_write(1 << 48, 0)),
    "mem_write value": (ValueError, "1-byte value 0x100 is out of range", lambda m, v: v.mem_write(0, 256, 1)),
    "mem_write length": (ValueError, "access length 3 is not 1, 2, 4 or 8", lambda m, v: v.mem_write(0, 0, 3)),
    "mem_read gpa": (TypeError, "guest-physical address is str", lambda m, v: v.mem_read("x")),
    "mem_read length": (ValueError, "access length 0x10 is out of range", lambda m, v: v.mem_read(0, 16)),
    "io_write port": (ValueError, "port 0x10000 is out of range", lambda m, v: v.io_write(1 << 16, 0)),
    "io_write value": (ValueError, "2-byte value 0x10000 is out of range", lambda m, v: v.io_write(0, 1 << 16, 2)),
    "io_read length": (ValueError, "access length 8 is not 1, 2 or 4", lambda m, v: v.io_read(0x60, 8)),
    "complete_access": (ValueError, "no access to memory or to a port waits", lambda m, v: v.complete_access()),
    "ioeventfd address": (ValueError, "guest-physical address -0x1 is out of", lambda m, v: m.fast_mmio.add(-1)),
    "exit length": (ValueError, "length 0x10 is out of range", lambda m, v: v.exit(10, length=16)),
    "exit info1": (ValueError, "info1 -0x1 is out of range", lambda m, v: v.exit(10, info1=-1)),
    "set_lapic short": (ValueError, "a LAPIC page is 1024 bytes, not 1023", lambda m, v: v.set_lapic(bytes(1023))),
    "set_lapic long": (ValueError, "a LAPIC page is 1024 bytes, not 4096", lambda m, v: v.set_lapic(bytes(4096))),
    "set_lapic text": (TypeError, "a LAPIC page is 1024 bytes, not str", lambda m, v: v.set_lapic("x" * 1024)),
    "set_lapic None": (TypeError, "a LAPIC page is 1024 bytes, not NoneType", lambda m, v: v.set_lapic(None)),
    "MSI address negative": (ValueError, "MSI address -0x1 is out of range", lambda m, v: m.signal_msi(-1, 0)),
    "MSI address float": (TypeError, "MSI address is float", lambda m, v: m.signal_msi(4276092928.0, 0)),
    "MSI data 33 bits": (ValueError, "MSI data 0x100000000 is out of", lambda m, v: m.signal_msi(0xFEE00000, 1 << 32)),
    "add_vcpu taken": (ValueError, "APIC id 1 is taken by vCPU 1 (EEXIST)", lambda m, v: m.add_vcpu(1)),
    "add_vcpu id": (ValueError, "APIC id 0x1000 is out of range 0..0xfff", lambda m, v: m.add_vcpu(4096)),
    "add_vcpu negative": (ValueError, "APIC id -0x1 is out of range", lambda m, v: m.add_vcpu(-1)),
    "add_vcpu float": (TypeError, "APIC id is float", lambda m, v: m.add_vcpu(1.0)),
    "rip negative": (ValueError, "RIP -0x1 is out of range", lambda m, v: setattr(v, "rip", -1)),
    "rip 65 bits": (ValueError, "RIP 0x10000000000000000 is out of range", lambda m, v: setattr(v, "rip", 1 << 64)),
    "rflags float": (TypeError, "RFLAGS is float", lambda m, v: setattr(v, "rflags", 2.0)),
    "dr0": (ValueError, "DR0 -0x1 is out of range", lambda m, v: setattr(v, "dr0", -1)),
    "handler no function": (
        TypeError,
        "is int, not a function of (vcpu, exit)",
        lambda m, v: m.handlers.update({12: 1}),
    ),
    "handler assigned": (TypeError, "is str, not a function", lambda m, v: m.handlers.__setitem__(12, "x")),
    "exits a list": (ValueError, "of dtype fastexit.EXIT, not list", lambda m, v: m.run([(0, 1, 0, 0, 0, 0)])),
    "exits None": (ValueError, "of dtype fastexit.EXIT, not NoneType", lambda m, v: m.run(None)),
    "exits of integers": (ValueError, "not uint64 (6,)", lambda m, v: m.run(np.zeros(6, dtype=np.uint64))),
    "exits of outcomes": (ValueError, "must be a one-dimensional array", lambda m, v: m.run(np.zeros(2, fx.OUTCOME))),
    "exits big-endian": (
        ValueError,
        "must be a one-dimensional array",
        lambda m, v: m.run(np.zeros(2, fx.EXIT.newbyteorder(">"))),
    ),
    "exits in two dimensions": (ValueError, "(2, 3)", lambda m, v: m.run(np.zeros((2, 3), dtype=fx.EXIT))),
    "exits without dimension": (ValueError, "()", lambda m, v: m.run(np.zeros((), dtype=fx.EXIT))),
}

MACHINES: dict[str, tuple[type[Exception], str, dict[str, Any]]] = {
    "neither": (ValueError, "either the number of vCPUs or apic_ids", {}),
    "both": (ValueError, "either the number of vCPUs or apic_ids", {"vcpus": 1, "apic_ids": [0]}),
    "no vCPU": (ValueError, "at least one vCPU", {"vcpus": 0}),
    "no id": (ValueError, "at least one vCPU", {"apic_ids": []}),
    "negative": (ValueError, "number of vCPUs -0x1 is out of range", {"vcpus": -1}),
    "too many": (ValueError, "number of vCPUs 0x1001 is out of range", {"vcpus": 4097}),
    "half a vCPU": (TypeError, "number of vCPUs is float", {"vcpus": 1.5}),
    "words for a number": (TypeError, "number of vCPUs is str", {"vcpus": "4"}),
    "ids twice": (ValueError, "APIC id 3 is taken by vCPU 1 (EEXIST)", {"apic_ids": [0, 3, 3]}),
    "id too big": (ValueError, "APIC id 0x1000 is out of range", {"apic_ids": [4096]}),
    "id float": (TypeError, "APIC id is float", {"apic_ids": [0, 1.0]}),
    "ids a number": (TypeError, "apic_ids", {"apic_ids": 5}),
    "kernel": (ValueError, "kernel 4.4 is too old: known are releases from 5.4 to ", {"vcpus": 1, "kernel": "4.4"}),
    "kernel a number": (TypeError, f"kernel is float, not a string such as '{NEWEST}'", {"vcpus": 1, "kernel": 6.18}),
    "kernel a list": (TypeError, f"kernel is list, not a string such as '{NEWEST}'", {"vcpus": 1, "kernel": []}),
    "vendor": (ValueError, "unknown vendor 'arm': one of vmx, svm", {"vcpus": 1, "vendor": "arm"}),
    "vendor a list": (ValueError, "unknown vendor ['vmx']: one of vmx, svm", {"vcpus": 1, "vendor": ["vmx"]}),
    "irqchip": (ValueError, "unknown irqchip 'none': one of full, split", {"vcpus": 1, "irqchip": "none"}),
    "x2apic_api": (ValueError, "x2apic_api 0x10 is out of range", {"vcpus": 1, "x2apic_api": 16}),
    "x2apic_api negative": (ValueError, "x2apic_api -0x1 is out of range", {"vcpus": 1, "x2apic_api": -1}),
    "suppress EOI both ways": (ValueError, "x2apic_api", {"vcpus": 1, "irqchip": "split", "x2apic_api": 12}),
    "suppress EOI on a full irqchip": (ValueError, "x2apic_api", {"vcpus": 1, "irqchip": "full", "x2apic_api": 4}),
    "maxphyaddr": (ValueError, "maxphyaddr 0x40 is out of range", {"vcpus": 1, "maxphyaddr": 64}),
    "maxphyaddr float": (TypeError, "maxphyaddr is float", {"vcpus": 1, "maxphyaddr": 48.0}),
}


def lived_in(**options: Any) -> fx.Machine:
    """A machine with something in every part of its state."""
    m = fx.Machine(vcpus=3, **options)
    m.boot_x2apic()
    m.vcpus[0].wrmsr(0x830, fx.icr(dest=1, vector=0xFD))
    m.vcpus[0].wrmsr(0x808, 0x20)
    m.signal_msi(0xFEE0_2000, 0x41)
    return m


def fails(kind: type[Exception], text: str, act: Callable[[], Any]) -> None:
    """The call raises exactly this kind of error, in one line that says this."""
    with pytest.raises(kind) as caught:
        act()
    message = str(caught.value)
    assert type(caught.value) is kind
    assert text in message, message
    assert "\n" not in message
    assert len(message) < 200


@pytest.mark.parametrize("name", CALLS)
def test_bad_call(name: str) -> None:
    """A call with a bad argument says which and why, and nothing has happened."""
    kind, text, act = CALLS[name]
    m = lived_in()
    before, counters = m.snapshot(), [v.counters() for v in m.vcpus]
    fails(kind, text, lambda: act(m, m.vcpus[0]))
    if name != "add_vcpu taken":  # which rebuilds the map
        assert m.snapshot() == before
    assert [v.counters() for v in m.vcpus] == counters
    assert len(m.vcpus) == 3


@pytest.mark.parametrize("name", MACHINES)
def test_bad_machine(name: str) -> None:
    """A machine that cannot be says which argument is wrong."""
    kind, text, options = MACHINES[name]
    fails(kind, text, lambda: fx.Machine(**options))


@pytest.mark.parametrize(
    ("record", "text"),
    [
        ((3, 32, 0x830, 0, 0, 0), "exit 2 is outside the machine: vCPU 3 of 3"),
        ((0xFFFF_FFFF, 32, 0x830, 0, 0, 0), "exit 2 is outside the machine: vCPU 4294967295 of 3"),
        ((3, 12, 0, 0, 0, 0), "exit 2 is outside the machine: vCPU 3 of 3"),
        ((0, 49, 0, 4, 0, 1 << 48), "outside the machine: access of 4 bytes to guest-physical address 0x1000000000000"),
        ((0, 49, 0, fx.MMIO_WRITE | 3, 0, 0xFEE0_0080), "access of 3 bytes to guest-physical address 0xfee00080"),
        ((0, 49, 0, 0, 0, 0xFEE0_0080), "exit 2 is outside the machine: access of 0 bytes"),
        ((0, 48, 0, 16, 0, 0xFEC0_0000), "exit 2 is outside the machine: access of 16 bytes"),
        ((0, 30, 0, 0x3F8_0002, 0, 0), "exit 2 is outside the machine: I/O instruction of no size, info 0x3f80002"),
    ],
)
@pytest.mark.parametrize("handlers", ["built in", "assigned"])
def test_bad_exit_in_a_batch(record: tuple[int, ...], text: str, handlers: str) -> None:
    """One bad exit stops the whole batch before it begins, whoever would have handled it."""
    m = lived_in()
    if handlers == "assigned":
        m.handlers[fx.VmxExit.HLT] = lambda v, exit: None
    before = m.snapshot()
    good = (0, 32, 0x830, 0, 0x1000000FC, 0)
    fails(ValueError, text, lambda: m.run(np.array([good, good, record, good], dtype=fx.EXIT)))
    assert m.snapshot() == before


@pytest.mark.parametrize("vendor", ["vmx", "svm"])
def test_bad_page_access_alone_in_a_batch(vendor: str) -> None:
    """No other record has to draw attention to it."""
    m = lived_in(vendor=vendor)
    page, before = int(m.dispatcher.vendor.mmio_reason), m.snapshot()
    for info in (3, fx.MMIO_WRITE):
        bad, good = (0, page, 0, info, 0, 0xFEE0_0080), (1, page, 0, 4, 0, 0xFEE0_0080)
        for exits in ([bad], [good, bad]):
            with pytest.raises(ValueError, match=f"^exit {len(exits) - 1} is outside the machine"):
                m.run(np.array(exits, dtype=fx.EXIT))
            assert m.snapshot() == before


@pytest.mark.parametrize(
    "record", [(3, 32, 0x830, 0, 0x1000000FC, 0), (3, 31, 0x802, 0, 0, 0), (3, L.NOTIFICATION, 0, 0, 0, 0)]
)
@pytest.mark.parametrize("traced", [False, True])
def test_records_that_change_behind_the_check(
    record: tuple[int, ...], traced: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The array may belong to another thread too: each vCPU index is looked at again where it is used."""
    m, twin = lived_in(), lived_in()
    if traced:
        m.trace.enable()
        twin.trace.enable()
    good = (0, 32, 0x830, 0, 0x1000000FC, 0)
    exits = np.array([good, (0, int(fx.VmxExit.PAUSE_INSTRUCTION), 0, 0, 0, 0), good, good, good], dtype=fx.EXIT)
    twin.run(exits[:3])
    by_python = m._run_in_python

    def hand(*arguments: Any) -> None:
        by_python(*arguments)
        exits[3] = record

    monkeypatch.setattr(m, "_run_in_python", hand)
    fails(ValueError, "exit 3 is outside the machine: vCPU 3 of 3", lambda: m.run(exits))
    assert m.snapshot() == twin.snapshot()


def test_numbers_of_other_types_are_numbers() -> None:
    """NumPy integers and enum members are integers like any other."""
    m, n = lived_in(), lived_in()
    a = m.vcpus[0].wrmsr(np.uint32(0x830), np.uint64(0x1000000FC))
    assert a == n.vcpus[0].wrmsr(0x830, 0x1000000FC)
    assert m.snapshot() == n.snapshot()
    assert m.vcpus[0].exit(fx.VmxExit.CPUID, length=np.int64(2)).fault is None


def test_msi_einval() -> None:
    """With 32-bit ids a dirty byte in the MSI's high word is EINVAL, without them it is not looked at."""
    m = lived_in(x2apic_api=1)
    before = m.snapshot()
    fails(ValueError, "bits 39:32 must be 0 with 32-bit ids (EINVAL)", lambda: m.signal_msi(0x1_FEE0_1000, 0x41))
    assert m.snapshot() == before
    assert lived_in().signal_msi(0x1_FEE0_1000, 0x41) == 1


def test_x2apic_that_the_cpuid_lacks() -> None:
    """boot_x2apic says why it cannot."""
    m = fx.Machine(vcpus=2, x2apic=False)
    before = m.snapshot()
    fails(ValueError, "guest's CPUID does not offer it", m.boot_x2apic)
    assert m.snapshot() == before


def test_machine_is_full() -> None:
    """The highest id fits, the one after it does not; a machine with every id refuses one more."""
    m = fx.Machine(apic_ids=[0, 4095])
    fails(ValueError, "APIC id 0x1000 is out of range", lambda: m.add_vcpu(4096))
    assert m.add_vcpu(4094).index == 2


def test_icr_helper() -> None:
    """fx.icr refuses what does not fit its field."""
    fails(ValueError, "VECTOR=0x100 does not fit 8 bits", lambda: fx.icr(vector=256))
    fails(ValueError, "DEST=0x100000000 does not fit 32 bits", lambda: fx.icr(dest=1 << 32))
    fails(ValueError, "DEST=-0x1 does not fit 32 bits", lambda: fx.icr(dest=-1))
    fails(ValueError, "SHORTHAND=0x4 does not fit 2 bits", lambda: fx.icr(shorthand=4))


def test_outcome_is_constant() -> None:
    """An Outcome is shared by all exits that ended like it, so it cannot be changed."""
    out = lived_in().vcpus[0].wrmsr(0x830, fx.icr(dest=1, vector=0xFC))
    with pytest.raises(AttributeError, match="cannot be changed"):
        out.accepted = 7
    assert out.accepted == 1


def test_unknown_name() -> None:
    """The package says which name it lacks."""
    with pytest.raises(AttributeError, match="module 'fastexit' has no attribute 'Mashine'"):
        fx.Mashine  # noqa: B018
