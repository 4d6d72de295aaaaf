"""/dev/kvm that is missing or not ours, what a kernel does not have, and that everything is given back."""

from __future__ import annotations

import gc
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from fastexit import regs as r
from fastexit.kvm import Oracle, device, guest, host
from fastexit.kvm import ioctl as K
from real_kvm import kvm


@pytest.fixture
def forgotten() -> Iterator[None]:
    """What was found out about the host is found out again, before the test and behind it."""
    host.running.cache_clear()
    yield
    host.running.cache_clear()


# ------------------------------------------------------------------------------------------------------ without a KVM


@pytest.mark.parametrize("use", [host.running, lambda: Oracle(2)], ids=["running", "Oracle"])
@pytest.mark.parametrize(
    ("error", "hint"),
    [
        (FileNotFoundError(2, "No such file or directory"), "its module is not loaded"),
        (PermissionError(13, "Permission denied"), "join the group that owns it, or run as root"),
        (OSError(19, "No such device"), "KVM cannot be used here"),
    ],
)
def test_device_cannot_be_opened(
    monkeypatch: pytest.MonkeyPatch, forgotten: None, use: Callable[[], Any], error: OSError, hint: str
) -> None:
    def refuse(*_: Any) -> int:
        raise error

    monkeypatch.setattr(device.os, "open", refuse)
    with pytest.raises(host.KvmUnavailable, match=hint) as found:
        use()
    assert isinstance(found.value, OSError)
    assert found.value.errno == error.errno
    assert len(str(found.value).splitlines()) == 1
    assert device.DEVICE in str(found.value)


@pytest.mark.usefixtures("forgotten")
def test_no_device(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(device, "DEVICE", str(tmp_path / "kvm"))
    with pytest.raises(host.KvmUnavailable, match="this machine has no KVM"):
        Oracle(2)


@pytest.mark.usefixtures("forgotten")
@pytest.mark.skipif(os.geteuid() == 0, reason="root may open anything")
def test_unreadable_device(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "kvm").touch(mode=0)
    monkeypatch.setattr(device, "DEVICE", str(tmp_path / "kvm"))
    with pytest.raises(host.KvmUnavailable, match="run as root"):
        Oracle(2)


def test_alarm_interrupts_again_and_again() -> None:
    """Until its end, and what was set before is set again behind it; alarms inside others do nothing."""
    before = signal.getsignal(signal.SIGALRM)
    with guest.alarm(0.01):
        assert signal.getitimer(signal.ITIMER_REAL)[1] == pytest.approx(0.01, abs=0.005)
        with guest.alarm(100.0):
            assert signal.getitimer(signal.ITIMER_REAL)[1] < 1
        assert signal.getitimer(signal.ITIMER_REAL)[1] < 1
        start = time.monotonic()
        while time.monotonic() < start + 0.03:
            pass
    assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)
    assert signal.getsignal(signal.SIGALRM) is before


def test_alarm_is_undone_by_errors() -> None:
    before = signal.getsignal(signal.SIGALRM)
    with pytest.raises(KeyError), guest.alarm(10.0):
        raise KeyError
    assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)
    assert signal.getsignal(signal.SIGALRM) is before
    with guest.alarm(10.0):
        assert signal.getitimer(signal.ITIMER_REAL)[0] > 0
    assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)


def test_alarm_leaves_other_threads_alone() -> None:
    found = []

    def look() -> None:
        with guest.alarm(10.0):
            found.append(signal.getitimer(signal.ITIMER_REAL))

    thread = threading.Thread(target=look)
    thread.start()
    thread.join()
    assert found == [(0, 0)]


# --------------------------------------------------------------------------------------- what this kernel does not have


@kvm
@pytest.mark.parametrize(
    ("keywords", "text"),
    [
        ({"vcpus": 100_000}, "number of vCPUs"),
        ({"vcpus": 0}, "at least one vCPU"),
        ({"apic_ids": []}, "at least one vCPU"),
        ({"apic_ids": [0, 1, 0]}, "APIC id 0 is taken"),
        ({"apic_ids": [1 << 20]}, "APIC id"),
        ({"vcpus": 1, "apic_ids": [0]}, "either"),
        ({}, "either"),
        ({"vcpus": 1, "irqchip": "none"}, "irqchip"),
        ({"vcpus": 1, "x2apic_api": 16}, "x2apic_api"),
        ({"vcpus": 1, "x2apic_api": r.X2API_SUPPRESS_EOI}, "x2apic_api 0x4: kernel .* takes 0x.* with a full irqchip"),
        ({"vcpus": 1, "disable_quirks": 1 << 40}, "disable_quirks: kernel .* cannot do that"),
    ],
)
def test_what_cannot_be_made(keywords: dict[str, Any], text: str) -> None:
    before = held()
    with pytest.raises(ValueError, match=text) as found:
        Oracle(**keywords)
    assert len(str(found.value).splitlines()) == 1
    assert held() == before


@kvm
@pytest.mark.parametrize(
    ("name", "value", "keywords"),
    [
        ("bus_cycles", False, {"bus_cycle_ns": 10}),
        ("cmci", False, {"cmci": True}),
        ("quirks", 0, {"disable_quirks": r.QUIRK_LINT0_REENABLED}),
        ("max_vcpus", 1, {}),
    ],
)
def test_lesser_hosts(monkeypatch: pytest.MonkeyPatch, name: str, value: Any, keywords: dict[str, Any]) -> None:
    """What another kernel lacks is refused before anything is made."""
    lesser = host.Host(**vars(host.running()) | {name: value})
    monkeypatch.setattr(host, "running", lambda: lesser)
    with pytest.raises(ValueError, match=f"kernel {lesser.release}") as found:
        Oracle(2, **keywords)
    assert len(str(found.value).splitlines()) == 1


@kvm
def test_refused_calls() -> None:
    with Oracle(2, irqchip="split") as vm:
        for call, arguments in (
            (vm.set_msr_filter, (True,)),
            (vm.set_msr_filter, (False, [(3, 0x10, [True])] * 17)),
            (vm.route, (range(25),)),
            (vm.enable_x2apic_api, (0x10,)),
            (vm.add_vcpu, (1,)),
            (vm.vcpus[0].complete_msr, ()),
            (vm.vcpus[0].set_lapic, (b"",)),
            (vm.vcpus[0].set_mp_state, (77,)),
        ):
            with pytest.raises(ValueError, match=r"\S") as found:
                call(*arguments)
            assert len(str(found.value).splitlines()) == 1
        with pytest.raises(ValueError, match="user_space_msr"):
            vm.user_space_msr = 8


# ------------------------------------------------------------------------------------------- what is held is given back


def held() -> tuple[list[str], int]:
    """Open files that are KVM's, and mappings of run areas."""
    files = []
    for fd in os.listdir("/proc/self/fd"):
        try:
            target = os.readlink(f"/proc/self/fd/{fd}")
        except FileNotFoundError:
            continue
        files += [target] * ("kvm" in target)
    return sorted(files), Path("/proc/self/maps").read_text().count("kvm-vcpu")


def used(vcpus: int = 3) -> Oracle:
    vm = Oracle(vcpus)
    for vcpu in vm.vcpus:
        vcpu.run_through()
    return vm


@kvm
def test_nothing_is_left() -> None:
    """Closed twice, by a with, or held by nobody any more."""
    host.running()
    before = held()
    vm = used()
    files, mappings = held()
    assert len(files) > len(before[0]) + 3
    assert mappings == before[1] + 3
    vm.close()
    assert held() == before
    vm.close()
    with used():
        assert held() != before
    assert held() == before
    vm = used()
    del vm
    gc.collect()
    assert held() == before


@kvm
def test_what_is_closed_is_no_other_vm() -> None:
    """A new one gets the numbers of its files."""
    closed = used(1)
    closed.close()
    with Oracle(1) as other:
        before = other.vcpus[0].get_lapic()
        for access in (
            lambda: closed.vcpus[0].set_msr(0x808, 0x30),
            lambda: closed.vcpus[0].wrmsr(0x808, 0x30),
            closed.vcpus[0].get_lapic,
            lambda: closed.signal_msi(0xFEE0_0000, 0x41),
            lambda: closed.add_vcpu(7),
        ):
            with pytest.raises(OSError, match="Bad file descriptor"):
                access()
        assert bytes(other.vcpus[0].get_lapic()) == bytes(before)
        assert other.vcpus[0].wrmsr(0x808, 0x20)


@kvm
@pytest.mark.parametrize("name", ["SET_CPUID2", "CREATE_VCPU", "CREATE_IRQCHIP", "GET_VCPU_MMAP_SIZE"])
def test_nothing_is_left_by_errors(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """An ioctl fails half-way through; of those that come for each vCPU, the second."""
    host.running()
    before = held()
    fails(monkeypatch, name, 2 if name in ("SET_CPUID2", "CREATE_VCPU") else 1)
    with pytest.raises(OSError, match="allocate"):
        Oracle(3)
    assert held() == before


@kvm
@pytest.mark.parametrize("name", ["SET_USER_MEMORY_REGION", "SET_SREGS", "RUN"])
def test_errors_of_guests_leave_nothing_behind_close(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    host.running()
    before = held()
    with Oracle(3) as vm:
        vm.vcpus[1].get_lapic()
        fails(monkeypatch, name, 1)
        with pytest.raises(OSError, match="allocate"):
            vm.vcpus[0].run_through()
        assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)
    assert held() == before


def fails(monkeypatch: pytest.MonkeyPatch, name: str, nth: int) -> None:
    """Makes the nth call of an ioctl fail."""
    request, call, count = getattr(K, name), K.call, 0

    def fail(fd: int, number: int, argument: Any = None) -> int:
        nonlocal count
        count += number == request
        if number == request and count == nth:
            raise OSError(12, "Cannot allocate memory")
        return call(fd, number, argument)

    monkeypatch.setattr(K, "call", fail)


@kvm
def test_scratch_machines_are_given_back(forgotten: None) -> None:
    before = held()
    host.running()
    assert held() == before
