"""Guests of machine code on this machine's /dev/kvm whose irqchip is fastexit: what comes in, once, and is ended."""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from bareguest import (
    CLI,
    COUNTERS,
    FIRST,
    HLT,
    IOAPIC,
    NEXT,
    NMI_VECTOR,
    STI,
    WANTED,
    Guest,
    ever,
    increment,
    jump_back,
    out,
    repeated,
    spin,
    store,
    u32,
)
from conftest import INTERPRETED
from fastexit import Nmi
from fastexit import layout as L
from fastexit.adapters.kvmhost import Ended, KvmHost, ModelVcpu, clock, host, summary
from fastexit.adapters.kvmhost.memory import MIB
from fastexit.kvm import ioctl as K
from fastexit.reasons import KvmExit
from fastexit.trace.replay import replay
from real_kvm import kvm

APICS = "xapic", "x2apic"
SECONDS = 60
TIMER, IPI, LEVEL, TICK, BREAKPOINT = 0xEC, 0x61, 0x51, 0x30, 3


@contextmanager
def guest(vcpus: int = 1, apic: str = "xapic", **options: Any) -> Iterator[Guest]:
    with KvmHost(vcpus, memory=2 * MIB, **options) as made:
        yield Guest(made, apic)


def ran(g: Guest, trace: Path | None = None) -> list[ModelVcpu]:
    """Runs it to its end; EOIs are as many as interrupts taken, and the trace is predicted."""
    g.load()
    if trace is not None:
        g.host.record(trace)
    ended = g.host.run(SECONDS)
    assert (ended.reason, ended.code) == ("exit port", 0), ended.detail
    vcpus = [vcpu for vcpu in g.host.vcpus if isinstance(vcpu, ModelVcpu)]
    assert [g.host.recorder.eois[v.index] for v in vcpus] == [sum(v.taken.values()) for v in vcpus]
    g.host.close()
    if trace is not None:
        report = replay(str(trace))
        assert [mismatch for mismatch in report.mismatches] == []
    return vcpus


@kvm
@pytest.mark.parametrize("apic", APICS)
def test_timer(apic: str, tmp_path: Path) -> None:
    with guest(apic=apic, min_timer_period_us=0) as g:
        code = g.register(0x3E0, 0xB) + g.register(0x320, 0x2_0000 | TIMER) + g.register(0x380, 200_000)
        g.program(0, code + g.wait(0, TIMER, 20) + b"\xfa" + g.register(0x380, 0) + g.finish())
        g.handler(0, TIMER)
        (v,) = ran(g, tmp_path / "trace")
        assert g.host.ended == Ended("exit port", 0)
    assert v.taken[TIMER] >= 20
    assert g.count(0, TIMER) == v.taken[TIMER]


@kvm
def test_deadline(tmp_path: Path) -> None:
    """The guest's TSC is the clock that its deadline is due by."""
    with guest(apic="x2apic", deadline=True) as g:
        arm = b"\x0f\x31\x05\x00\x00\x10\x00\x83\xd2\x00\xb9\xe0\x06\x00\x00\x0f\x30"  # RDTSC + 2^20 into TSC_DEADLINE
        begin = g.register(0x320, 0x4_0000 | TIMER) + FIRST
        again = arm + WANTED + g.until(g.counter(0, TIMER)) + NEXT
        g.program(0, begin + repeated(10, again) + g.finish())
        g.handler(0, TIMER)
        (v,) = ran(g, tmp_path / "trace")
        assert (g.count(0, TIMER), v.taken[TIMER], g.host.recorder.deadlines) == (10, 10, [10])


class Moved(clock.Tsc):
    """Was not what it is now when the machine was made."""

    seconds = 0

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.begin += self.seconds * 1000 * self.khz


@kvm
@pytest.mark.parametrize("seconds", [-30, 30])
def test_deadline_where_kvm_moves_the_tsc(seconds: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As it does where CPUs' TSCs are not to be trusted: a deadline is neither early nor late, and reads as written."""
    monkeypatch.setattr(clock, "is_steady", lambda device: False)
    monkeypatch.setattr(Moved, "seconds", seconds)
    monkeypatch.setattr(host, "Tsc", Moved)
    wrong = 0x9A
    with guest(apic="x2apic", deadline=True) as g:
        now = b"\x0f\x31\x48\xc1\xe2\x20\x48\x09\xd0"  # RDTSC into RAX
        later = now + b"\x48\x05\x00\x00\x00\x01\x49\x89\xc0"  # ADD RAX, 2^24; MOV R8, RAX
        arm = later + b"\x48\x89\xc2\x48\xc1\xea\x20\xb9\xe0\x06\x00\x00\x0f\x30"  # into TSC_DEADLINE
        read = b"\xb9\xe0\x06\x00\x00\x0f\x32\x48\xc1\xe2\x20\x48\x09\xd0"  # RDMSR of it
        kept = read + b"\x74\x0a\x4c\x39\xc0\x74\x05"  # JZ, for one that is due; CMP RAX, R8; JE
        early = now + b"\x4c\x39\xc0\x73\x05"  # CMP RAX, R8; JAE
        tell = b"\x48\x31\xc0\xe6" + bytes([wrong])
        body = arm + kept + tell + WANTED + g.until(g.counter(0, TIMER)) + early + tell + NEXT
        begin = g.register(0x320, 0x4_0000 | TIMER) + FIRST
        g.program(0, begin + repeated(10, body) + g.finish())
        g.handler(0, TIMER)
        (v,) = ran(g, tmp_path / "trace")
        assert (g.count(0, TIMER), v.taken[TIMER], g.host.ports.unclaimed[wrong]) == (10, 10, 0)


@kvm
@pytest.mark.parametrize("apic", APICS)
@pytest.mark.parametrize("vcpus", [1, 2, 4])
def test_ipis_go_round(vcpus: int, apic: str, tmp_path: Path) -> None:
    """Each CPU sleeps until the one before has sent to it, and sends to the next; one lost would stop them all."""
    rounds = 30 if INTERPRETED else 200
    with guest(vcpus, apic) as g:
        for cpu in range(vcpus):
            send = g.register(0x300, (cpu + 1) % vcpus << 32 | 0x4000 | IPI)
            receive = WANTED + g.until(g.counter(cpu, IPI)) + NEXT
            begin = FIRST
            if cpu == 0:
                g.program(0, g.start_others(vcpus) + begin + repeated(rounds, send + receive) + g.finish())
            else:
                g.program(cpu, begin + repeated(rounds, receive + send) + ever())
            g.handler(cpu, IPI)
        vcpu = ran(g, tmp_path / "trace")
        assert [g.count(cpu, IPI) for cpu in range(vcpus)] == [rounds] * vcpus
        told = summary(g.host, 1.0)
        assert [row["icr_writes"] for row in told["vcpus"]] == [rounds + 2 * (vcpus - 1), *[rounds] * (vcpus - 1)]
        fast = {row["kernel"]: row["fast"] for row in told["kernels"]}
        assert fast["6.1"] == (rounds * vcpus if apic == "x2apic" else 0)
    assert [v.events["Sipi"] for v in vcpu] == [0] + [1] * (vcpus - 1)


@kvm
@pytest.mark.parametrize("apic", APICS)
def test_a_priority_lowered_before_a_halt(apic: str, tmp_path: Path) -> None:
    """CR8 keeps an IPI to oneself off, IF keeps it off when CR8 no longer does: HLT has to be woken by it."""
    times = 20
    raised, lowered = (b"\xb8" + bytes([value, 0, 0, 0]) + b"\x44\x0f\x22\xc0" for value in (15, 0))  # MOV CR8, RAX
    with guest(apic=apic) as g:
        again = CLI + raised + g.register(0x300, 0x4_4000 | IPI) + lowered + STI + HLT
        g.program(0, repeated(times, again) + g.finish())
        g.handler(0, IPI)
        (v,) = ran(g, tmp_path / "trace")
        assert (g.count(0, IPI), v.taken[IPI]) == (times, times)


@kvm
@pytest.mark.parametrize("apic", APICS)
def test_level_interrupt_by_ioapic(apic: str, tmp_path: Path) -> None:
    """A device holds its line until the handler tells it; the EOI reaches the IOAPIC, or it would not come again."""
    pin, times = 17, 20
    with guest(apic=apic) as g:
        entry = b"".join(
            store(IOAPIC, 0x10 + 2 * pin + half) + store(IOAPIC + 0x10, value)
            for half, value in ((1, 0), (0, 0x8000 | LEVEL))
        )
        raised = out(0x2000 + pin, 1) + WANTED + g.until(g.counter(0, LEVEL)) + NEXT
        g.program(0, entry + FIRST + repeated(times, raised) + g.finish())
        g.handler(0, LEVEL, out(0x2000 + pin, 0))
        (v,) = ran(g, tmp_path / "trace")
        assert (g.count(0, LEVEL), v.taken[LEVEL]) == (times, times)


@kvm
def test_pic_and_pit(tmp_path: Path) -> None:
    with guest() as g:
        pics = b"".join(
            out(p, v) for p, v in ((0x20, 0x11), (0x21, TICK), (0x21, 4), (0x21, 1), (0x21, 0xFE), (0xA1, 0xFF))
        )
        pit = out(0x43, 0x34) + out(0x40, 0xA9) + out(0x40, 4)  # 1 kHz
        g.program(0, pics + g.register(0x350, 0x700) + pit + g.wait(0, TICK, 10) + b"\xfa" + g.finish())
        g.handler(0, TICK, out(0x20, 0x20), eoi=False)
        (v,) = ran(g, tmp_path / "trace")
        assert g.count(0, TICK) == v.external[TICK] >= 10


@kvm
@pytest.mark.parametrize("vcpus", [1, 2])
def test_nmis(vcpus: int, tmp_path: Path) -> None:
    times, to = 20, vcpus - 1
    with guest(vcpus, "x2apic") as g:
        send = g.register(0x300, to << 32 | 0x4400) + WANTED
        seen = spin(g.counter(to, NMI_VECTOR))
        again = send + seen + NEXT
        g.program(0, g.start_others(vcpus) + FIRST + repeated(times, again) + g.finish())
        g.handler(0, NMI_VECTOR, eoi=False)
        if vcpus > 1:
            g.program(1, ever())
            g.handler(1, NMI_VECTOR, eoi=False)
        v = ran(g, tmp_path / "trace")
        assert (g.count(to, NMI_VECTOR), v[to].events["Nmi"]) == (times, times)


@kvm
def test_an_nmi_that_kvm_still_has_ends_a_halt() -> None:
    """STI; HLT keeps it off until the CPU has left with HLT; a handler of an NMI that halts waits for the next."""
    with guest() as g:
        g.program(0, g.finish())
        g.load()
        (v,) = (vcpu for vcpu in g.host.vcpus if isinstance(vcpu, ModelVcpu))
        halts = [v._wakes()]
        v._deliver(Nmi())
        halts.append(v._wakes())
        events = K.ffi.new("struct kvm_vcpu_events *")
        K.call(v.fd, K.GET_VCPU_EVENTS, events)
        events.nmi.masked, events.flags = 1, 0
        K.call(v.fd, K.SET_VCPU_EVENTS, events)
        halts.append(v._wakes())
        ended = g.host.run(SECONDS)
    assert (halts, ended.reason) == ([False, True, False], "exit port")


@kvm
def test_init_of_a_running_cpu() -> None:
    """INIT takes it out of an endless loop, SIPI starts it again, as often as it is asked."""
    times = 10
    with guest(2) as g:
        init = g.register(0x300, 1 << 32 | 0x4500) + g.register(0x300, 1 << 32 | 0x4608) + WANTED
        seen = spin(g.counter(1, 0))
        g.program(0, FIRST + repeated(times, init + seen + NEXT) + g.finish())
        g.program(1, b"\xeb\xfe")
        vcpus = ran(g)
        assert (g.count(1, 0), vcpus[1].events["Init"], vcpus[1].events["Sipi"]) == (times, times, times)


@kvm
def test_a_storm_loses_nothing() -> None:
    """Timers on all CPUs, IPIs to everybody and a level line at once."""
    vcpus, times = 4, 20 if INTERPRETED else 300
    with guest(vcpus, "x2apic", min_timer_period_us=0) as g:
        timer = g.register(0x3E0, 0xB) + g.register(0x320, 0x2_0000 | TIMER) + g.register(0x380, 2_000_000)
        for cpu in range(vcpus):
            # One that still waits in the target's IRR would swallow the next: the last one has to have been taken.
            send = b"".join(
                WANTED + b"\xff\xcb" + spin(g.counter(to, IPI + cpu)) + g.register(0x300, to << 32 | 0x4000 | IPI + cpu)
                for to in range(vcpus)
                if to != cpu
            )
            answered = b"".join(WANTED + g.until(g.counter(cpu, IPI + other)) for other in range(vcpus) if other != cpu)
            work = FIRST + repeated(times, send + answered + NEXT)
            first = g.start_others(vcpus) if cpu == 0 else b""
            first += b"\xbb\x01\x00\x00\x00" + b"".join(spin(g.counter(other, 0)) for other in range(vcpus))
            done = increment(g.counter(0, 255))
            last = g.wait(0, 255, vcpus) + g.finish() if cpu == 0 else b"\xfb\xf4\xeb\xfd"
            g.program(cpu, first + timer + work + done + last)
            g.handler(cpu, TIMER)
            for other in range(vcpus):
                g.handler(cpu, IPI + other)
        g.load()
        assert g.host.run(SECONDS) == Ended("exit port", 0)
        for cpu in range(vcpus):
            assert [g.count(cpu, IPI + other) for other in range(vcpus) if other != cpu] == [times] * (vcpus - 1)


@kvm
@pytest.mark.parametrize("irqchip", ["fastexit", "kernel"])
def test_a_breakpoint_that_another_cpu_takes_away_again(irqchip: str) -> None:
    """As Linux rewrites code. Where KVM's emulator has no INT3, memory may have another byte when it is done here."""
    times, at = 2_000, COUNTERS + 0xF000
    with guest(2, irqchip=irqchip) as g:
        call, look = b"\xb8" + u32(at) + b"\xff\xd0", b"\x39\x1c\x25" + u32(g.counter(0, BREAKPOINT))
        g.program(0, g.start_others(2) + b"\xbb" + u32(times) + jump_back(call + look, b"\x72") + g.finish())
        g.program(1, jump_back(b"".join(b"\xc6\x04\x25" + u32(at) + byte for byte in (b"\xcc", b"\x90"))))
        g.handler(0, BREAKPOINT, eoi=False)
        g.load()
        g.host.memory.write(at, b"\x90\xc3")
        assert g.host.run(SECONDS) == Ended("exit port", 0)
        assert g.count(0, BREAKPOINT) == times


@kvm
def test_same_guest_on_kvms_own_irqchip() -> None:
    with guest(2, irqchip="kernel") as g:
        g.program(0, g.start_others(2) + g.finish(7))
        g.program(1, ever())
        g.load()
        assert g.host.run(SECONDS) == Ended("exit port", 7)
        with pytest.raises(ValueError, match="trace-cmd record -e kvm"):
            g.host.record(Path("nowhere"))


@kvm
def test_triple_fault_says_where() -> None:
    with guest() as g:
        g.program(0, b"\x0f\x0b")
        g.load()
        ended = g.host.run(SECONDS)
        assert (ended.reason, ended.code) == ("triple fault of vCPU 0", 1)
        assert "RIP 0x10:0x1" in ended.detail


@kvm
def test_time_is_up_and_threads_end() -> None:
    with guest(4) as g:
        g.program(0, b"\xeb\xfe")
        g.load()
        began = time.monotonic()
        assert g.host.run(0.2).reason == "time is up"
        assert time.monotonic() - began < SECONDS
    assert not [thread for thread in threading.enumerate() if thread.name.startswith(("vcpu", "clockwork"))]


@kvm
def test_what_is_closed_can_be_looked_at() -> None:
    """Its vCPUs have what their run areas had at the end; an area itself stays as long as somebody has it."""

    def mapped() -> int:
        return Path("/proc/self/maps").read_text().count("kvm-vcpu")

    gc.collect()
    before = mapped()
    with guest() as g:
        g.program(0, g.finish())
        g.load()
        assert g.host.run(SECONDS).reason == "exit port"
        mine = g.host.vcpus[0].kvm_run
    assert mapped() == before + 1
    assert g.host.vcpus[0].kvm_run.exit_reason == mine.exit_reason == KvmExit.IO
    del mine
    assert mapped() == before
    assert g.host.vcpus[0].kvm_run.exit_reason == KvmExit.IO


@kvm
def test_the_clock_outlives_its_host() -> None:
    with guest() as g:
        machine, read = g.host.machine, g.host.tsc.read
    del g
    gc.collect()
    assert machine.time < machine.time
    assert read() < read()


@kvm
def test_what_is_closed_is_no_other_host() -> None:
    """A new one gets the numbers of its files."""
    with guest() as g:
        closed = g.host
    with guest():
        for access in closed.vcpus[0].registers.read, closed.vcpus[0].enter, lambda: closed.vm.irq_line(1, 1):
            with pytest.raises(OSError, match="Bad file descriptor"):
                access()


@kvm
@pytest.mark.parametrize("way", ["close", "run"])
def test_a_thread_of_the_guests_does_not_wait_for_itself(way: str) -> None:
    said: list[str] = []

    def console(_data: bytes) -> None:
        with pytest.raises(RuntimeError, match="use end") as refused:
            getattr(g.host, way)()
        said.append(str(refused.value))

    with guest(2, console=console) as g:
        g.program(0, g.start_others(2) + b"\xbb\x01\x00\x00\x00" + spin(g.counter(1, 255)) + g.finish())
        g.program(1, out(0x3F8, 0x78) + increment(g.counter(1, 255)) + ever())
        g.load()
        g.host.gate.serialise(list)
        assert g.host.run(SECONDS) == Ended("exit port", 0)
    assert len(said) == 1


@kvm
def test_an_error_of_a_thread_is_the_callers() -> None:
    with guest() as g:
        g.program(0, out(0x99, 1) + ever())
        g.load()

        def broken(port: int, size: int, value: int) -> None:
            raise RuntimeError("a device's own fault")

        g.host.ports.write = broken  # type: ignore[method-assign]
        with pytest.raises(RuntimeError, match="a device's own fault"):
            g.host.run(SECONDS)


@kvm
def test_typed_bytes_come_by_interrupt() -> None:
    """The guest echoes what its serial port's interrupt brings, until it reads a q."""
    got: list[bytes] = []
    with guest(console=got.append) as g:
        entry = store(IOAPIC, 0x18 + 1) + store(IOAPIC + 0x10, 0) + store(IOAPIC, 0x18) + store(IOAPIC + 0x10, LEVEL)
        setup = out(0x21, 0xFF) + out(0xA1, 0xFF) + out(0x3FC, 8) + out(0x3F9, 1)
        g.program(0, entry + setup + b"\xfb\xf4\xeb\xfc")
        read = b"\x66\xba\xf8\x03\xec\x3c\x71\x75\x04\xe6\xf4\xfa\xf4\xee"  # IN; CMP 'q'; JNE; OUT F4; CLI HLT; OUT
        more = b"\x66\xba\xfd\x03\xec\xa8\x01\x75" + (-(len(read) + 9) & 0xFF).to_bytes(1, "little")
        g.handler(0, LEVEL, read + more)
        g.load()
        g.host.type(b"hello q")
        assert g.host.run(SECONDS) == Ended("exit port", ord("q"))
    assert b"".join(got) == b"hello "


@kvm
def test_who_types_and_a_guest_that_reads_do_not_wait_for_each_other(tmp_path: Path) -> None:
    """Where one exit is done after the other, as for a trace: the port's lock and the gate, in one order."""
    with guest() as g:
        g.host.record(tmp_path / "trace")
        for port, value in ((0x3FC, 8), (0x3F9, 1)):
            g.host.ports.write(port, 1, value)
        typed = threading.Thread(target=g.host.type, args=(b"x",), daemon=True)
        read = threading.Thread(target=g.host.ports.read, args=(0x3FD, 1), daemon=True)
        with g.host.gate:
            typed.start()
            typed.join(0.2)
            assert typed.is_alive()
            read.start()
            read.join(SECONDS)
            assert not read.is_alive()
        typed.join(SECONDS)
        assert not typed.is_alive()


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"vcpus": 0}, "at least one vCPU"),
        ({"vcpus": 65}, "out of range 0..0x40"),
        ({"irqchip": "split"}, "unknown irqchip 'split'"),
        ({"irqchip": "kernel", "hyperv": True}, "irqchip='fastexit'"),
    ],
)
def test_what_is_no_host(options: dict[str, Any], why: str) -> None:
    with pytest.raises(ValueError, match=why):
        KvmHost(**options)


@kvm
def test_settings_are_the_machines() -> None:
    with guest(kernel="6.1", vendor="svm", slow=False) as g:
        assert (g.host.machine.kernel, g.host.machine.vendor) == ("6.1", "svm")
    with pytest.raises(TypeError, match="no setting of a Machine"):
        KvmHost(kernal="6.1")


@kvm
@pytest.mark.parametrize("apic", APICS)
def test_timers_leave_time_for_the_guest(apic: str) -> None:
    """A periodic timer that is due again before anybody could serve it: the program under it comes to its end."""
    with guest(apic=apic, min_timer_period_us=0, bus_cycle_ns=1) as g:
        timer = g.register(0x3E0, 0xB) + g.register(0x320, 0x2_0000 | TIMER) + g.register(0x380, 5_000)
        g.program(0, timer + g.wait(0, TIMER, 11) + repeated(100_000, b"") + b"\xfa" + g.finish())
        g.handler(0, TIMER)
        (v,) = ran(g)
        assert v.taken[TIMER] > 10


@kvm
def test_pit_leaves_time_for_the_guest() -> None:
    with guest() as g:
        pics = b"".join(
            out(p, v) for p, v in ((0x20, 0x11), (0x21, TICK), (0x21, 4), (0x21, 1), (0x21, 0xFE), (0xA1, 0xFF))
        )
        pit = out(0x43, 0x34) + out(0x40, 0x40) + out(0x40, 0)  # 54 us
        ticks = g.wait(0, TICK, 10) + repeated(100_000, b"") + b"\xfa"
        g.program(0, pics + g.register(0x350, 0x700) + pit + ticks + g.finish())
        g.handler(0, TICK, out(0x20, 0x20), eoi=False)
        (v,) = ran(g)
        assert v.external[TICK] >= 10


@kvm
def test_a_storm_that_the_ioapic_puts_off_goes_on() -> None:
    """Behind 10,000 EOIs of a line that stays up it waits 10 ms: somebody has to look then."""
    pin, seen = 17, 30
    with guest() as g:
        entry = b"".join(
            store(IOAPIC, 0x10 + 2 * pin + half) + store(IOAPIC + 0x10, value)
            for half, value in ((1, 0), (0, 0x8000 | LEVEL))
        )
        g.program(
            0, out(0x21, 0xFF) + out(0xA1, 0xFF) + entry + out(0x2000 + pin, 1) + g.wait(0, LEVEL, seen) + g.finish()
        )
        g.handler(0, LEVEL)
        g.host.machine.mem[L.IOAPIC + L.IOAPIC_EOIS + pin] = 10_000 - seen // 2
        (v,) = ran(g)
        assert v.taken[LEVEL] >= seen
