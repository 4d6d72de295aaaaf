"""Threads on one machine: storms lose and invent nothing, a map that is rebuilt loses nobody, pages stay apart."""

from __future__ import annotations

import threading

import numpy as np
import pytest

import fastexit as fx
from fastexit import layout as L
from fastexit.jit import declare

VECTORS = range(32, 256)
ROUNDS = 40


def storm(machine: fx.Machine, sender: int, targets: list[int], seed: int) -> np.ndarray:
    """Every vector to every target, in random order, from one vCPU."""
    pairs = [(target, vector) for target in targets for vector in VECTORS]
    np.random.default_rng(seed).shuffle(pairs)
    exits = np.zeros(len(pairs), dtype=fx.EXIT)
    exits["vcpu"] = sender
    exits["reason"] = machine.dispatcher.vendor.wrmsr_reason
    exits["info"] = machine.dispatcher.vendor.wrmsr_info1
    exits["msr"] = 0x830
    exits["value"] = [fx.icr(dest=target, vector=vector) for target, vector in pairs]
    return exits


def drain(machine: fx.Machine, target: int, taken: dict[int, set[int]]) -> int:
    """Take what target has; how many it was."""
    count = 0
    while (vector := machine.vcpus[target].ack()) is not None:
        taken[target].add(vector)
        machine.vcpus[target].eoi()
        count += 1
    return count


@pytest.mark.skipif(not declare.JIT, reason="interpreted kernels are Python: their accesses are atomic towards nobody")
@pytest.mark.parametrize("vendor", ["vmx", "svm"])
@pytest.mark.parametrize("apicv", [True, False], ids=["apicv", "plain"])
def test_storm(vendor: str, apicv: bool) -> None:
    """Each round, both senders send every vector to both targets; every one arrives, and only while it was sent."""
    machine = fx.Machine(vcpus=4, vendor=vendor, apicv=apicv)
    machine.boot_x2apic()
    exits = [storm(machine, sender, [2, 3], seed=sender) for sender in (0, 1)]
    declare.warmup()
    for _ in range(ROUNDS):
        taken: dict[int, set[int]] = {2: set(), 3: set()}
        failures: list[BaseException] = []

        def send(batch: np.ndarray, failures: list[BaseException] = failures) -> None:
            try:
                assert (machine.run(batch)["accepted"] == 1).all()
            except BaseException as failure:
                failures.append(failure)

        threads = [threading.Thread(target=send, args=(batch,)) for batch in exits]
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads):
            for target in taken:
                drain(machine, target, taken)
        for thread in threads:
            thread.join()
        assert not failures, failures
        for target, vectors in taken.items():
            drain(machine, target, taken)
            assert vectors == set(VECTORS)
            assert machine.vcpus[target].pending() is None
            assert not machine.vcpus[target].pid[L.PID_PIR : L.PID_PIR + 4].any()


@pytest.mark.skipif(not declare.JIT, reason="interpreted kernels are Python: their accesses are atomic towards nobody")
def test_map_rebuilt_under_fire() -> None:
    """vCPU 1 changes its id over and over; unicasts to vCPU 2, which nobody touches, are accepted every time."""
    machine = fx.Machine(vcpus=3)
    machine.boot_x2apic()
    changer = machine.vcpus[1]
    changer.set_msr(0x1B, 0xFEE00800)
    batch = np.concatenate([storm(machine, 0, [2], seed=seed) for seed in range(100)])
    changes = np.zeros(400, dtype=fx.EXIT)
    changes["vcpu"], changes["reason"] = 1, machine.dispatcher.vendor.mmio_reason
    changes["gpa"], changes["info"] = 0xFEE0_0020, 4 | fx.MMIO_WRITE
    changes["value"] = [(5 + i % 2) << 24 for i in range(len(changes))]
    stop = threading.Event()
    rebuilt = 0

    def change() -> None:
        nonlocal rebuilt
        while not stop.is_set():
            machine.run(changes)
            rebuilt += len(changes)

    thread = threading.Thread(target=change)
    thread.start()
    try:
        accepted = [(machine.run(batch)["accepted"] == 1).all() for _ in range(800)]
    finally:
        stop.set()
        thread.join()
    assert all(accepted)
    assert rebuilt > 0


def test_pages_of_two_vcpus_at_once() -> None:
    """KVM_GET_LAPIC and KVM_SET_LAPIC of different vCPUs in different threads keep the pages apart."""
    machine = fx.Machine(vcpus=2)
    wrong: list[str] = []

    def own_page(index: int) -> None:
        vcpu = machine.vcpus[index]
        for number in range(300 if declare.JIT else 20):
            page = bytearray(vcpu.get_lapic())
            if page[0x23] != index:
                wrong.append(f"vCPU {index} got id {page[0x23]}")
            page[0x80] = number % 16
            vcpu.set_lapic(bytes(page))

    threads = [threading.Thread(target=own_page, args=(index,)) for index in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_vcpus_created_at_once() -> None:
    """Index, id and place in the list agree, however many threads add vCPUs."""
    machine = fx.Machine(vcpus=1)
    threads = [
        threading.Thread(target=lambda first=first: [machine.add_vcpu(first + i) for i in range(15)])
        for first in (100, 200, 300)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [vcpu.index for vcpu in machine.vcpus] == list(range(46))
    assert len({vcpu.vcpu_id for vcpu in machine.vcpus}) == 46


@pytest.mark.skipif(not declare.JIT, reason="interpreted kernels are Python: their accesses are atomic towards nobody")
def test_lines_while_a_guest_programs_the_ioapic() -> None:
    """A guest masks and unmasks a level pin that waits, over and over; an edge of another pin arrives each time."""
    machine = fx.Machine(vcpus=3, apicv=False)
    machine.boot_x2apic()
    v = machine.vcpus[0]
    for index, value in (
        (0x11 + 2 * 18, 2 << 24),
        (0x10 + 2 * 18, 0x42),
        (0x11 + 2 * 17, 1 << 24),
        (0x10 + 2 * 17, 0x1_8041),
    ):
        v.mem_write(0xFEC0_0000, index)
        v.mem_write(0xFEC0_0010, value)
    exits = np.zeros(4000, dtype=fx.EXIT)
    exits["reason"], exits["gpa"], exits["info"] = fx.VmxExit.EPT_MISCONFIG, 0xFEC0_0010, 4 | L.MMIO_WRITE
    exits["value"][::2], exits["value"][1::2] = 0x1_8041, 0x8041
    declare.warmup()
    for _ in range(ROUNDS):
        programmer = threading.Thread(target=machine.run, args=(exits,))
        programmer.start()
        while programmer.is_alive():
            for level in (1, 0):
                machine.irq_line(17, level)
                assert machine.irq_line(18, level) == 1
            assert machine.vcpus[2].ack() == 0x42
            machine.vcpus[2].eoi()
        programmer.join()
        base = L.IOAPIC + L.IOAPIC_REDIRTBL
        assert machine.mem[base + 18] == 2 << 56 | 0x42
        assert machine.mem[L.IOAPIC + L.IOAPIC_IRR] & 1 << 17 == 0
        remote_irr = bool(machine.mem[base + 17] & 1 << 14)
        assert remote_irr is (machine.vcpus[1].pending() == 0x41)
        if machine.vcpus[1].ack() is not None:
            machine.vcpus[1].eoi()
        for value in (0x1_0041, 0x1_8041):  # edge in between: that clears remote IRR
            v.mem_write(0xFEC0_0010, value)
