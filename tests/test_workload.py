"""Workloads: each IPI costs what the same IPI costs as a single exit, on every kind of machine."""

from __future__ import annotations

import re

import numpy as np
import pytest

import fastexit as fx
from fastexit import workload

COSTS = {"vmx": "skylake-retpoline", "svm": "epyc"}


def single(kernel: str, vendor: str, apicv: bool) -> fx.TimedOutcome:
    """One IPI between two vCPUs that run, by the dispatcher with a clock."""
    m = fx.Machine(vcpus=2, kernel=kernel, vendor=vendor, apicv=apicv, costs=COSTS[vendor])
    m.boot_x2apic()
    for v in m.vcpus:
        v.rflags |= 0x200
        m.dispatcher.start_run(v)
    out = m.vcpus[0].wrmsr(0x830, fx.icr(dest=1, vector=0xFD))
    assert isinstance(out, fx.TimedOutcome)
    return out


@pytest.mark.parametrize("apicv", [True, False])
@pytest.mark.parametrize("vendor", ["vmx", "svm"])
@pytest.mark.parametrize("kernel", fx.profiles())
def test_an_ipi_costs_what_a_single_exit_costs(kernel: str, vendor: str, apicv: bool) -> None:
    m = fx.Machine(vcpus=4, kernel=kernel, vendor=vendor, apicv=apicv)
    measured = workload.ipis(m, 50, senders=(0, 1)).run(COSTS[vendor])
    one = single(kernel, vendor, apicv)
    assert (measured.outcomes["accepted"] == 1).all()
    assert np.unique(measured.outcomes["path"]).tolist() == [one.path]
    assert np.unique(measured.cycles_ipi).tolist() == [one.cycles_ipi]
    assert np.unique(measured.cycles).tolist() == [one.cycles]


def test_targets_and_vectors_are_drawn_from_what_is_given() -> None:
    m = fx.Machine(apic_ids=[7, 300, 2, 5])
    work = workload.ipis(m, 400, senders=[3], targets=[0, 1], vectors=range(0x40, 0x44))
    values = work.exits["value"][work.ipi].astype(int)
    assert set(values >> 32) == {7, 300}
    assert set(values & 0xFF) == set(range(0x40, 0x44))
    assert set(work.exits["vcpu"][work.ipi].tolist()) == {3}
    again = workload.ipis(m, 400, senders=[3], targets=[0, 1], vectors=range(0x40, 0x44))
    assert (again.exits == work.exits).all()


@pytest.mark.parametrize(
    ("keywords", "said"),
    [
        ({"senders": [4]}, "sender 0x4 is out of range 0..0x3"),
        ({"targets": [-1]}, "target -0x1 is out of range 0..0x3"),
        ({"targets": []}, "an IPI needs a sender and a target: 1 senders, 0 targets"),
        ({"vectors": range(0, 256)}, "vectors range(0, 256) are not within 16..255"),
        ({"vectors": range(0)}, "vectors range(0, 0) are not within 16..255"),
    ],
)
def test_refuses_what_is_outside_the_machine(keywords: dict, said: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(said)}$"):
        workload.ipis(fx.Machine(vcpus=4), 1, **keywords)


def test_a_target_that_never_ran_is_told() -> None:
    """Its IPI notifies nobody and so costs less: who asks for cycles hears of it."""
    m = fx.Machine(vcpus=2)
    m.boot_x2apic()
    exits = np.zeros(3, dtype=fx.EXIT)
    exits["reason"], exits["msr"], exits["value"] = fx.VmxExit.MSR_WRITE, 0x830, fx.icr(dest=1, vector=0xFD)
    outcomes = m.run(exits)
    with pytest.warns(RuntimeWarning, match="1 of 2 vCPUs has never run"):
        fx.batch_cycles(m, exits, outcomes, COSTS["vmx"])
