"""Two threads send to the same vCPUs while a third takes the interrupts: nothing is lost, nothing is invented."""

from __future__ import annotations

import threading

import numpy as np
import pytest

import fastexit as fx
from fastexit import layout as L
from fastexit.kernels import _jit

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


@pytest.mark.skipif(not _jit.JIT, reason="interpreted kernels are Python: their accesses are atomic towards nobody")
@pytest.mark.parametrize("vendor", ["vmx", "svm"])
@pytest.mark.parametrize("apicv", [True, False], ids=["apicv", "plain"])
def test_storm(vendor: str, apicv: bool) -> None:
    """Each round, both senders send every vector to both targets; every one arrives, and only while it was sent."""
    machine = fx.Machine(vcpus=4, vendor=vendor, apicv=apicv)
    machine.boot_x2apic()
    exits = [storm(machine, sender, [2, 3], seed=sender) for sender in (0, 1)]
    _jit.warmup()
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
