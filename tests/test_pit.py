"""The PIT: ports, counts, ticks, what user space sees; by every dispatcher, against a model of its own."""

from __future__ import annotations

import random
import struct
from typing import Any

import pytest

import fastexit as fx
from apics import vectors
from fastexit import layout as L
from fastexit import regs as r
from fastexit.exits.bus import NOT_MINE
from fastexit.ioctls import UserIo
from fastexit.jit.declare import load
from oracle_pit import Pit, state

DISPATCHERS = ("python", "compiled")
MS = 1_000_000


def with_pit(speaker: bool = True, **options: Any) -> fx.Machine:
    """Two vCPUs in the guest, and a PIT."""
    m = fx.Machine(2, **{"apicv": False, **options})
    m.create_pit(speaker)
    for v in m.vcpus:
        v.rdmsr(r.MSR_APICBASE)
    return m


def count_to(v: fx.Vcpu, count: int, mode: int = 2, channel: int = 0) -> None:
    """What a guest writes to set up a channel."""
    v.io_write(0x43, channel << 6 | 0x30 | mode << 1)
    v.io_write(0x40 + channel, count & 0xFF)
    v.io_write(0x40 + channel, count >> 8)


# ------------------------------------------------------------------------------------------------------ being created


def test_as_created() -> None:
    """KVM_CREATE_PIT2: no mode, a count of 65536, gates of channels 0 and 1 high, no timer."""
    m = with_pit()
    channel = struct.pack("<IH10Bq", 0x10000, 0, 0, 0, 0, 0, 0, 0, 0, 0xFF, 0, 1, 0)
    assert m.get_pit() == channel * 2 + channel[:15] + b"\0" + channel[16:] + bytes(40)
    assert m.next_timer() is None


def test_refusals() -> None:
    """What KVM says EEXIST, ENOENT and ENXIO to, and states of another size."""
    m = with_pit()
    with pytest.raises(ValueError, match="EEXIST"):
        m.create_pit()
    with pytest.raises(ValueError, match="112 bytes"):
        m.set_pit(bytes(100))
    with pytest.raises(TypeError, match="112 bytes"):
        m.set_pit(7)  # type: ignore[arg-type]
    bare = fx.Machine(1)
    for ask in (bare.get_pit, lambda: bare.set_pit(state()), lambda: bare.reinject_control(False)):
        with pytest.raises(ValueError, match="ENXIO"):
            ask()


@pytest.mark.parametrize(("kernel", "refused"), [("6.6", False), ("6.8", True)])
def test_split_irqchip(kernel: str, refused: bool) -> None:
    """Without an in-kernel PIC there is no PIT; earlier there was one that never ticks."""
    m = fx.Machine(1, irqchip="split", kernel=kernel, apicv=False)
    if refused:
        with pytest.raises(ValueError, match="ENOENT"):
            m.create_pit()
        return
    m.create_pit()
    count_to(m.vcpus[0], 1000)
    assert m.next_timer() is None
    assert m.vcpus[0].io_read(0x40) == 1000 & 0xFF


@pytest.mark.parametrize("dispatcher", DISPATCHERS)
@pytest.mark.parametrize("vendor", ["vmx", "svm"])
def test_ports(vendor: str, dispatcher: str) -> None:
    """Which accesses are the PIT's: none that runs over 0x43; 0x61 if it was asked for; never 0x62 to 0x64."""
    m = with_pit(vendor=vendor, dispatcher=dispatcher)
    v = m.vcpus[0]
    v.io_write(0x43, 0x34)
    assert v.io_read(0x43) == 0
    for port, length in ((0x40, 4), (0x42, 2), (0x41, 1), (0x61, 4)):
        v.io_read(port, length)
        assert v.exit_reason is None
    for port, length in ((0x3F, 1), (0x3F, 2), (0x43, 2), (0x41, 4), (0x44, 1), (0x60, 2), (0x62, 1), (0x64, 1)):
        assert v.io_write(port, 7, length).user is fx.KvmExit.IO
        assert v.user_io == UserIo(port, 7, length, True)
        v.run()
    quiet = with_pit(speaker=False, vendor=vendor, dispatcher=dispatcher).vcpus[0]
    assert quiet.io_write(0x61, 3).user is fx.KvmExit.IO
    bare = fx.Machine(1, vendor=vendor, dispatcher=dispatcher).vcpus[0]
    assert bare.io_write(0x40, 3).user is fx.KvmExit.IO


# ------------------------------------------------------------------------------------------------------------- ticking


def pulses(m: fx.Machine) -> int:
    """Ticks that went out to GSI 0 since the trace was cleared; each is up, then down, from the PIT's own source."""
    lines = [line.split("kvm_set_irq: ")[1] for line in m.trace.lines() if "kvm_set_irq" in line]
    assert lines == ["gsi 0 level 1 source 2", "gsi 0 level 0 source 2"] * (len(lines) // 2)
    return len(lines) // 2


@pytest.mark.parametrize("dispatcher", DISPATCHERS)
def test_period(dispatcher: str) -> None:
    """1 kHz; the first tick comes after the interval, in whole ns, rounded down."""
    m = with_pit(dispatcher=dispatcher)
    m.trace.enable()
    count_to(m.vcpus[0], 1193)
    ns = 1193 * 10**9 // r.PIT_HZ
    assert m.next_timer() == ns
    assert m.set_time(ns - 1) == []
    assert [index for index, _ in m.set_time(ns)] == [0]
    assert m.next_timer() == 2 * ns
    assert pulses(m) == 1


def test_one_shot() -> None:
    """Modes 0, 1 and 4 tick once, and what is left of the count goes on below zero."""
    for mode in (0, 1, 4):
        m = with_pit()
        m.trace.enable()
        count_to(m.vcpus[0], 100, mode)
        due = m.next_timer()
        assert due is not None
        m.set_time(due)
        m.set_time(due + MS)
        assert m.next_timer() is None
        assert pulses(m) == 1
        d = (due + MS) * r.PIT_HZ // 10**9
        assert m.vcpus[0].io_read(0x40) | m.vcpus[0].io_read(0x40) << 8 == 100 - d & 0xFFFF


def test_shortest_period() -> None:
    """min_timer_period_us: the first tick comes as it was programmed, the next ones later."""
    m = with_pit(min_timer_period_us=500)
    count_to(m.vcpus[0], 100)
    first = 100 * 10**9 // r.PIT_HZ
    assert m.next_timer() == first
    m.set_time(first)
    assert m.next_timer() == first + 500_000


def test_backlog() -> None:
    """Reinject mode: one tick is out, the others wait for it. Without, those that the host is late for are lost."""
    m = with_pit()
    m.trace.enable()
    count_to(m.vcpus[0], 1193)
    for _ in range(7):
        m.set_time(m.next_timer() or 0)
    assert pulses(m) == 1
    assert m.mem[L.PIT_PENDING] == 7
    m.reinject_control(False)
    for _ in range(7):
        m.set_time(m.next_timer() or 0)
    assert pulses(m) == 8
    m.set_time(m.time + 100 * MS)
    assert pulses(m) == 9
    m.reinject_control(True)
    assert m.mem[L.PIT_PENDING] == 0


def test_hpet_legacy() -> None:
    """KVM_SET_PIT2 with the flag stops channel 0, and while it is set no load starts it."""
    m = with_pit()
    count_to(m.vcpus[0], 1193)
    m.set_pit(m.get_pit()[:72] + struct.pack("<10I", r.PIT_FLAG_HPET_LEGACY, *[0] * 9))
    assert m.next_timer() is None
    count_to(m.vcpus[0], 1193)
    assert m.next_timer() is None
    m.set_pit(m.get_pit()[:72])
    assert m.next_timer() is None
    m.set_pit(m.get_pit()[:72] + bytes(40))
    assert m.next_timer() is not None


@pytest.mark.parametrize("vendor", ["vmx", "svm"])
@pytest.mark.parametrize(("kernel", "kept"), [("5.4", True), ("5.10", False), ("6.18", False)])
def test_avic(vendor: str, kernel: str, kept: bool) -> None:
    """AVIC keeps EOIs from KVM, so reinject mode inhibits it; seed kernels know no inhibits, and VMX needs none."""
    m = fx.Machine(2, vendor=vendor, kernel=kernel, apicv=True)
    for v in m.vcpus:
        v.rdmsr(r.MSR_APICBASE)
    m.create_pit()
    off = vendor == "svm" and not kept
    assert (r.Inhibit.PIT_REINJ in m.inhibits) == off
    assert [target.effect for target in m.targets][:2] == [fx.Effect.KICK] * 2
    m.reinject_control(False)
    assert r.Inhibit.PIT_REINJ not in m.inhibits


def test_nmi_watchdog() -> None:
    """Once one vCPU has LVT0 in NMI mode, every tick delivers LVT0 on all of them, whatever its mode there."""
    m = with_pit()
    first, second = m.vcpus
    for v in m.vcpus:
        v.mmio_write(r.APIC_SPIV, 0x1FF)
    first.mmio_write(r.APIC_LVT0, 0x0000_0055)
    second.mmio_write(r.APIC_LVT0, 0x0001_0400)
    count_to(first, 1193)
    m.set_time(m.next_timer() or 0)
    assert not second.events().nmi_pending
    assert vectors(first) == set()
    second.mmio_write(r.APIC_LVT0, 0x0000_0400)
    m.reinject_control(False)
    m.set_time(m.next_timer() or 0)
    assert second.events().nmi_pending == 1
    assert not first.events().nmi_pending
    assert vectors(first) == {0x55}


# ------------------------------------------------------------------------------------------------------ acknowledged


def take(v: fx.Vcpu) -> int | None:
    """The vector that a guest with interrupts on is given at the next entry."""
    v.set_events()
    v.machine.mem[v.own + L.K_INTERRUPT] = 0
    v.rflags = r.RFLAGS_FIXED | r.RFLAGS_IF
    v.run()
    v.set_events()
    v.rflags = r.RFLAGS_FIXED
    return v.injected


def with_pic(**options: Any) -> fx.Machine:
    """A PIC pair that a BIOS has started, vectors from 0x30 on, GSI 0 routed to it alone."""
    m = with_pit(**options)
    m.set_gsi_routing([("pic", 0, 0, 0)])
    for port, value in ((0x20, 0x11), (0x21, 0x30), (0x21, 4), (0x21, 1)):
        m.vcpus[0].io_write(port, value)
    return m


def late(m: fx.Machine, ticks: int) -> None:
    """So many periods of 1 kHz go by, one by one."""
    for _ in range(ticks):
        m.set_time(m.next_timer() or 0)


@pytest.mark.parametrize("dispatcher", DISPATCHERS)
@pytest.mark.parametrize("reinject", [True, False])
def test_backlog_by_the_pic(reinject: bool, dispatcher: str) -> None:
    """Each end of an interrupt brings the next tick that is due, until there is none left."""
    m = with_pic(dispatcher=dispatcher)
    m.reinject_control(reinject)
    v = m.vcpus[0]
    count_to(v, 1193)
    late(m, 5)
    taken = 0
    while take(v) == 0x30:
        taken += 1
        v.io_write(0x20, 0x20)
    assert taken == (5 if reinject else 1)
    late(m, 1)
    assert take(v) == 0x30


@pytest.mark.parametrize("dispatcher", DISPATCHERS)
def test_automatic_end(dispatcher: str) -> None:
    """In automatic EOI mode the acknowledging vCPU itself is what brings the next tick."""
    m = with_pic(dispatcher=dispatcher)
    v = m.vcpus[0]
    for port, value in ((0x20, 0x11), (0x21, 0x30), (0x21, 4), (0x21, 3)):
        v.io_write(port, value)
    count_to(v, 1193)
    late(m, 4)
    assert [take(v) for _ in range(6)] == [0x30] * 4 + [None] * 2


@pytest.mark.parametrize("dispatcher", DISPATCHERS)
@pytest.mark.parametrize("vendor", ["vmx", "svm"])
@pytest.mark.parametrize("level", [False, True])
def test_backlog_by_the_ioapic(level: bool, vendor: str, dispatcher: str) -> None:
    """The EOI of the pin that GSI 0 goes to is an acknowledgement; a pulse is all that a level pin sees, too."""
    m = fx.Machine(2, vendor=vendor, dispatcher=dispatcher, apicv=False)
    m.create_pit()
    m.boot_x2apic()
    v = m.vcpus[0]
    m.set_gsi_routing([("ioapic", 0, 2)])
    for index, value in ((0x14, 0x50 | level << 15), (0x15, 0)):
        v.mem_write(0xFEC0_0000, index)
        v.mem_write(0xFEC0_0010, value)
    count_to(v, 1193)
    late(m, 5)
    assert m.mem[L.PIT_PENDING] == 5
    taken = 0
    while take(v) == 0x50:
        taken += 1
        v.wrmsr(0x80B, 0)
    assert taken == 5
    assert m.mem[L.PIT_PENDING] == 0


def test_unmasking_forgets() -> None:
    """Whoever unmasks the pin does not get what came before."""
    m = with_pic()
    v = m.vcpus[0]
    count_to(v, 1193)
    v.io_write(0x21, 1)
    late(m, 50)
    assert m.mem[L.PIT_PENDING] == 50
    v.io_write(0x21, 0)
    assert m.mem[L.PIT_PENDING] == 0
    assert take(v) == 0x30
    v.io_write(0x20, 0x20)
    assert take(v) is None


def test_nobody_acknowledges_without_reinjection() -> None:
    """The PIT listens in reinject mode alone."""
    m = with_pic()
    v = m.vcpus[0]
    count_to(v, 1193)
    late(m, 3)
    m.reinject_control(False)
    assert take(v) == 0x30
    v.io_write(0x20, 0x20)
    assert m.mem[L.PIT_PENDING] == 3


# --------------------------------------------------------------------------------------------------- against the model


def random_state(rng: random.Random) -> bytes:
    """A kvm_pit_state2 with anything in it that user space may set."""
    parts = []
    for _ in range(3):
        count = rng.choice((0, 1, 2, 3, 1000, 0xFFFF, 0x10000, 0x10001, rng.getrandbits(32)))
        small = [rng.choice((0, 1, 2, 3, 4, 5, rng.getrandbits(8))) for _ in range(10)]
        small[7] = rng.choice((0, 1, 2, 3, 4, 5, 6, 0xFF))
        parts.append(struct.pack("<IH10Bq", count, rng.getrandbits(16), *small, rng.getrandbits(40)))
    flags = rng.choice((0, 0, 1, 2, 3, rng.getrandbits(32)))
    return b"".join(parts) + struct.pack("<10I", flags, *[0] * 9)


def one_operation(rng: random.Random, m: fx.Machine, pit: Pit) -> None:
    """The same thing asked of both."""
    v = rng.choice(m.vcpus)
    match rng.randrange(12):
        case 0 | 1 | 2:
            port, length = rng.choice((0x40, 0x41, 0x42)), rng.choice((1, 1, 1, 2, 4))
            assert v.io_read(port, length) == (pit.read(port, length) or 0)
        case 3:
            port, length = rng.choice((0x43, 0x61)), rng.choice((1, 2))
            assert v.io_read(port, length) == (pit.read(port, length) or 0)
        case 4 | 5:
            port, value, length = rng.choice((0x40, 0x41, 0x42)), rng.getrandbits(8), rng.choice((1, 1, 2))
            left = v.io_write(port, value, length).user is fx.KvmExit.IO
            assert left != pit.write(port, value, length)
        case 6 | 7:
            value = rng.getrandbits(8)
            v.io_write(0x43, value)
            pit.write(0x43, value)
        case 8:
            value = rng.getrandbits(8)
            v.io_write(0x61, value)
            pit.write(0x61, value)
        case 9:
            data = random_state(rng)
            data = data if rng.random() < 0.7 else data[:72]
            m.set_pit(data)
            pit.set(data)
        case 10:
            on = rng.random() < 0.5
            m.reinject_control(on)
            pit.set_reinject(on)
        case _:
            due = m.next_timer()
            assert due == pit.alarm
            ns = m.time + rng.choice((1, 838, 54_925_401, rng.randrange(3 * MS)))
            ns = ns if due is None or rng.random() < 0.5 else max(due, m.time)
            m.set_time(ns)
            pit.set_time(ns)
            pit.work()


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("dispatcher", DISPATCHERS)
@pytest.mark.parametrize("kernel", ["5.15", "6.18"])
def test_against_the_model(kernel: str, dispatcher: str, seed: int) -> None:
    """Ports, states, time and reinjection at random: bytes read, states, ticks and when they are due are the same."""
    rng = random.Random(seed)
    m = with_pit(kernel=kernel, dispatcher=dispatcher, vendor=rng.choice(("vmx", "svm")))
    pit = Pit(apart=kernel == "5.15")
    m.trace.enable()
    for _ in range(250):
        one_operation(rng, m, pit)
        assert m.get_pit() == pit.get()
        assert (m.mem[L.PIT_PENDING], bool(m.mem[L.PIT_IRQ_ACK])) == (pit.pending, pit.ack)
        assert m.next_timer() == pit.alarm
    assert pulses(m) == pit.pulses


@pytest.mark.parametrize(("port", "length"), [(2**64 - 1, 1), (0x44, 1), (0x43, 2), (0x3F, 1), (0x40, 2**64 - 1)])
def test_ports_beside_it_are_not_its_own_however_large(port: int, length: int) -> None:
    m = fx.Machine(vcpus=1)
    m.create_pit()
    assert load("pit_read")(m.handle, 0, port, length) == NOT_MINE
    assert load("pit_write")(m.handle, 0, port, length, 1) == NOT_MINE
