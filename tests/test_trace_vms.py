"""Several VMs in one trace: each is found whole, whenever it appears, however its threads begin, however it is read."""

from __future__ import annotations

import lzma
import random
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import fastexit as fx
from fastexit.trace import BUNDLED, files
from fastexit.trace import replay as replay_module
from fastexit.trace.replay import replay
from fastexit.trace.report import Report

Line = tuple[int, str]
"""A thread id and an event."""

BEGINNINGS = (
    "kvm_userspace_exit: reason restart (4)",
    "kvm_fpu: load",
    "kvm_vcpu_wakeup: wait time 4025 ns, polling valid",
    "kvm_entry: vcpu {vcpu}, rip 0xfff0 intr_info 0x00000000 error_code 0x00000000",
    "kvm_exit: vcpu {vcpu} reason EPT_MISCONFIG rip 0xfff0 info1 0x0000000000000000 info2 0x0000000000000000",
    "kvm_halt_poll_ns: vcpu {vcpu}: halt_poll_ns 10000 (grow 0)",
    "kvm_hv_timer_state: vcpu_id {vcpu:x} hv_timer 0",
    "kvm_msr: msr_write 6e0 = 0x1234567890",
)
"""What the first lines of a vCPU's thread may be, long before it touches its APIC."""


def accesses(rng: random.Random, vcpus: int, first_pid: int, names: bool) -> list[Line]:
    """What a running x2APIC guest makes KVM print; without ``names`` only kvm_eoi says which vCPU a thread is."""
    m = fx.Machine(vcpus=vcpus, apicv=False)
    m.boot_x2apic()
    m.trace.enable()
    for v in m.vcpus:  # so every thread shows that its APIC is on, and which vCPU it is
        v.wrmsr(0x83F, 0x40 + v.index)
        v.ack()
        v.wrmsr(0x80B, 0)
    for _ in range(30):
        v = rng.choice(m.vcpus)
        v.wrmsr(0x830, fx.icr(rng.randrange(vcpus), rng.randrange(0x31, 0xFF), shorthand=rng.choice((0, 0, 0, 1, 3))))
        target = rng.choice(m.vcpus)
        if target.ack() is not None:
            target.wrmsr(0x80B, 0)
    found = re.findall(r"-(\d+) .*?\d: (kvm_.*)", m.trace.text())
    lines = [(int(pid) - 1000 + first_pid, event) for pid, event in found]
    return [(pid, event) for pid, event in lines if names or not event.startswith(("kvm_entry", "kvm_exit"))]


def beginning(rng: random.Random, vcpus: int, first_pid: int, names: bool) -> list[Line]:
    """The first lines of a VM's threads: nothing about an APIC yet."""
    lines = []
    for vcpu in range(vcpus):
        for event in rng.sample(BEGINNINGS, rng.randint(1, 4)):
            if names or "{vcpu" not in event:
                lines.append((first_pid + vcpu, event.format(vcpu=vcpu)))
    return lines


def one_after_the_other(rng: random.Random, vms: list[list[Line]]) -> Iterator[Line]:
    """VMs appear one by one; those that are there take turns, each in its own order."""
    waiting = [iter(lines) for lines in vms]
    running: list[Iterator[Line]] = []
    while waiting or running:
        if waiting and (not running or rng.random() < 0.004):
            running.append(waiting.pop(0))
        turn = rng.choice(running)
        for _ in range(rng.randint(1, 40)):
            line = next(turn, None)
            if line is None:
                running.remove(turn)
                break
            yield line


@pytest.fixture(params=range(4))
def host(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, list[int]]:
    """A trace of four VMs that appear late, and their numbers of vCPUs."""
    rng = random.Random(request.param)
    names = request.param % 2 == 0
    sizes = [rng.randint(2, 5) for _ in range(4)]
    vms = []
    for i, vcpus in enumerate(sizes):
        pid = 2000 + 100 * i
        vms.append([*beginning(rng, vcpus, pid, names), *accesses(rng, vcpus, pid, names)])
    # The first VM is long: the others' threads begin when much has been read already.
    busy = [line for line in vms[0] if "kvm_entry" in line[1] or "kvm_eoi: apicid 0 vector -1" in line[1]]
    vms[0] += [(vms[0][0][0], "kvm_userspace_exit: reason io (2)")] * 300 + busy * 3
    path = tmp_path / "host.txt"
    with path.open("w") as out:
        for n, (pid, event) in enumerate(one_after_the_other(rng, vms)):
            out.write(f"            qemu-{pid}    [00{pid % 2}] d..1.  {n // 1000:4d}.{n % 1000 * 1000:06d}: {event}\n")
    return path, sizes


@pytest.fixture(scope="module")
def five(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five runs of a Linux guest one after the other: other thread ids each, 500 s between their beginnings."""
    path = tmp_path_factory.mktemp("five") / "five.txt"
    cut = re.compile(r"(.*?-)(\d+)( +\[\d+\] \S+ +)(\d+\.\d+)(: .*\n)")
    with lzma.open(BUNDLED, "rt") as source:
        lines = source.readlines()
    header = [line for line in lines if line.startswith("#") and "entries" not in line]
    events = [match.groups() for match in map(cut.fullmatch, lines) if match]
    with path.open("w") as out:
        out.writelines(header)
        for i in range(5):
            out.writelines(
                f"{comm}{int(pid) + 100 * i}{cpu}{float(time) + 500 * i:.6f}{event}"
                for comm, pid, cpu, time, event in events
            )
    return path


@pytest.mark.long
@pytest.mark.parametrize("chunk", [files.CHUNK_BYTES, 270_336, 1 << 20])
def test_five_runs_are_five_vms(five: Path, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A real guest, five times over: what is found does not depend on where the file is cut into pieces."""
    monkeypatch.setattr(files, "CHUNK_BYTES", chunk)
    monkeypatch.setattr(replay_module, "KEPT_LINES", 1 << 19)
    report = replay(five)
    assert report.mismatches == []
    assert report.notes == []
    assert [list(vm.threads) for vm in report.vms] == [[0, 1, 2, 3]] * 5
    assert [(vm.ipi.exact, vm.ipi.total) for vm in report.vms] == [(3664, 3664)] * 5
    assert [(vm.accepted.exact, vm.accepted.total) for vm in report.vms] == [(4170, 4170)] * 5
    assert [vm.deadlines for vm in report.vms] == [15_061] * 5


def as_found(report: Report) -> dict:
    return report.as_dict() | {"seconds": 0}


@pytest.mark.parametrize("kept", [0, 150, 1 << 20])
@pytest.mark.parametrize("chunk", [64, 700, 5000, 1 << 18])
def test_late_vms_are_found_whole(
    host: tuple[Path, list[int]], chunk: int, kept: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, sizes = host
    whole = replay(path)
    monkeypatch.setattr(files, "CHUNK_BYTES", chunk)
    monkeypatch.setattr(replay_module, "KEPT_LINES", kept)
    report = replay(path)
    assert [list(vm.threads) for vm in report.vms] == [list(range(vcpus)) for vcpus in sizes]
    assert all(all(vm.threads.values()) for vm in report.vms)
    assert report.mismatches == []
    assert report.notes == []
    assert report.accepted.exact == report.accepted.total > 100
    assert as_found(report) == as_found(whole)
