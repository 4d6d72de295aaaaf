"""A workload over many machines: one row each, equal to what a machine of one's own says."""

from __future__ import annotations

import numpy as np
import pytest

import fastexit as fx
from fastexit.insight.sweep import SWEEP
from fastexit.outcome import Path


def test_every_combination_is_a_row_in_the_order_of_the_arguments() -> None:
    rows = fx.sweep(kernels=["5.8", "6.18"], vendors=["vmx", "svm"], vcpus=[2, 3], apicv=[True, False], n=5)
    assert rows.dtype == SWEEP
    assert len(rows) == 16
    assert rows["kernel"].tolist() == ["5.8"] * 8 + ["6.18"] * 8
    assert rows["apicv"].tolist() == [True, False] * 8


@pytest.mark.parametrize("kernel", ["seed-v3", "5.8", "6.18"])
@pytest.mark.parametrize("vendor", ["vmx", "svm"])
def test_a_row_says_what_a_machine_of_ones_own_says(kernel: str, vendor: str) -> None:
    row = fx.sweep(kernels=kernel, vendors=vendor, vcpus=3, apicv=False, n=20)[0]
    load = fx.workload.ipis(fx.Machine(vcpus=3, kernel=kernel, vendor=vendor, apicv=False), 20)
    mine = load.machine.run(load.exits)[load.ipi]
    assert row["fast"] == (mine["path"] == Path.FAST).sum()
    assert row["accepted"] == mine["accepted"].sum() == 20
    assert (row["fast"] == 0) == (kernel == "seed-v3" and vendor == "svm")
    assert row["kicked"] == 20
    assert np.isnan(row["cycles"])


def test_cycles_come_with_costs() -> None:
    row = fx.sweep(kernels="6.18", n=5, costs="skylake-retpoline")[0]
    assert 0 < row["cycles_ipi"] < row["cycles"] < row["cycles_generic"]


def test_a_workload_of_ones_own_and_more_of_the_machine() -> None:
    made: list[fx.Machine] = []

    def logical(machine: fx.Machine) -> fx.workload.Workload:
        made.append(machine)
        load = fx.workload.ipis(machine, 4)
        load.exits["value"][load.ipi] = fx.icr(1 << 1, 0x41, logical=True)
        return load

    row = fx.sweep(kernels=["5.8", "6.18"], workload=logical, irqchip="split")
    assert row["fast"].tolist() == [0, 4]
    with pytest.raises(ValueError, match="split"):
        made[0].get_irqchip(2)


def test_progress_is_told() -> None:
    told: list[tuple[int, int]] = []
    fx.sweep(kernels=["5.8", "6.18"], n=1, progress=lambda done, total: told.append((done, total)))
    assert told == [(1, 2), (2, 2)]


def test_a_picture_has_a_line_for_each_combination() -> None:
    pytest.importorskip("matplotlib")
    rows = fx.sweep(kernels=["5.8", "6.18"], vendors=["vmx", "svm"], n=2)
    axes = rows.plot("share").axes[0]
    assert [line.get_label() for line in axes.get_lines()] == ["vendor vmx", "vendor svm"]
    assert len(axes.get_lines()[0].get_xdata()) == 2
    with pytest.raises(ValueError, match="column"):
        rows.plot("speed")


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"kernels": ["4.0"]}, "4.0"),
        ({"vendors": "arm"}, "vendor"),
        ({"vcpus": 0}, "vCPU"),
        ({"workload": "multicast"}, "workload"),
        ({"n": -1}, "IPIs"),
    ],
)
def test_what_cannot_be_swept_is_said(wrong: dict[str, object], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        fx.sweep(**({"kernels": "6.18", "n": 1} | wrong))  # type: ignore[call-overload]
