"""Two reports side by side: every table, rates that differ and rates that only vary, conditions."""

from __future__ import annotations

import json

import pytest

from fastexit.answers.difference import ALIKE, DIFFERENT, UNTOLD, Condition, difference, told
from fastexit.answers.report import (
    DoorRow,
    ExitRow,
    FastRow,
    FileReport,
    Finding,
    Halts,
    LatencyRow,
    MsrRow,
    Quantiles,
    Report,
    VmReport,
)


def times(median: float) -> Quantiles:
    return Quantiles(10, median, 2 * median, 3 * median, 4 * median, 10 * median)


def vm(hlts: int, seconds: float | None = 10.0, median: float = 500.0, number: int = 1) -> VmReport:
    """A VM with so many HLTs a second, and 100 MSR writes."""
    n = int(seconds or 1)
    exits = [
        ExitRow("HLT", hlts * n, hlts / (hlts + 100), float(hlts), times(median)),
        ExitRow("MSR_WRITE", 100 * n, 100 / (hlts + 100), 100.0, None),
    ]
    by_second = [{"HLT": hlts + i % 2, "MSR_WRITE": 100} for i in range(n)] if seconds else []
    return VmReport(
        "t",
        number,
        seconds=seconds,
        exits=exits,
        by_second=by_second,
        msrs=[MsrRow(0x830, "X2APIC_ICR", True, 100 * n, 1.0, 0)],
        doors=[DoorRow("IPI", "x2APIC MSR", 100 * n)],
        latency=[LatencyRow("exit to entry", times(2 * median))],
        halts=Halts(hlts * n, 0, 0, times(9 * median)),
        fast=[FastRow("6.18", "ICR write", hlts, 2 * hlts, {})],
    )


def report(*vms: VmReport, path: str = "t") -> Report:
    return Report([FileReport(path)], list(vms))


def figures(before: Report, after: Report) -> dict[str, tuple[float | None, float | None, str]]:
    return {c.name: (c.before, c.after, c.verdict) for c in difference(before, after).changes}


def test_every_table_has_its_figures() -> None:
    found = figures(report(vm(50)), report(vm(80, median=700)))
    assert found["exits.HLT.per second"] == (50, 80, DIFFERENT)
    assert found["exits.MSR_WRITE.per second"] == (100, 100, ALIKE)
    assert found["exits.all.per second"][2] == DIFFERENT
    assert found["exits.HLT.median ns"] == (500, 700, "")
    assert found["exits.HLT.p99 ns"] == (1500, 2100, "")
    assert found["msrs.X2APIC_ICR write.per second"] == (100, 100, "")
    assert found["doors.IPI by x2APIC MSR.per second"] == (100, 100, "")
    assert found["latency.exit to entry.median ns"] == (1000, 1400, "")
    assert found["latency.asleep.median ns"] == (4500, 6300, "")
    assert found["fast.6.18 ICR write.share"] == (0.5, 0.5, "")


def test_rates_are_by_time_however_long_each_side_is() -> None:
    found = figures(report(vm(50, 10.0)), report(vm(50, 100.0)))
    assert found["exits.HLT.per second"] == (50, 50, ALIKE)


def test_without_time_shares_are_compared() -> None:
    found = difference(report(vm(50, None)), report(vm(50)))
    names = {change.name for change in found.changes}
    assert "exits.HLT.share" in names
    assert "msrs.X2APIC_ICR write.share" in names
    assert not any(name.endswith("per second") for name in names)
    assert "no time" in found.notes[0]


@pytest.mark.parametrize(
    ("before", "after", "verdict"),
    [
        ([100] * 9, [100] * 9, ALIKE),
        ([100] * 9, [101] * 9, ALIKE),
        ([100] * 9, [150] * 9, DIFFERENT),
        ([0, 400, 0, 400, 0, 400, 0, 400, 0], [50, 450] * 5, ALIKE),
        ([100] * 6, [900] * 9, UNTOLD),
        ([], [], UNTOLD),
        ([0] * 9, [0] * 9, ALIKE),
        ([0] * 9, [50] * 9, DIFFERENT),
    ],
)
def test_what_varies_by_itself_is_not_called_different(before: list[int], after: list[int], verdict: str) -> None:
    assert told(before, after) == verdict


def test_a_broken_first_and_last_second_do_not_count() -> None:
    assert told([1, *[100] * 7, 1], [100] * 9) == ALIKE


def test_tables_of_other_tools_are_compared_row_by_row() -> None:
    def table(mean: float) -> Report:
        row = {
            "label": "MSR_WRITE",
            "number": 9,
            "share": 0.5,
            "total": -1.0,
            "minimum": -1.0,
            "mean": mean,
            "maximum": 1,
        }
        return Report([FileReport("t", tables=[{"kind": "perf kvm stat", "title": "", "line": 1, "rows": [row]}])])

    found = figures(table(1080.0), table(580.0))
    assert found["perf kvm stat.MSR_WRITE.mean ns"] == (1080.0, 580.0, "")
    assert "perf kvm stat.MSR_WRITE.total ns" not in found


def test_findings_come_and_go() -> None:
    old, new = vm(50), vm(50)
    old.findings = [Finding("storm", "problem", "a storm")]
    new.findings = [Finding("stuck", "problem", "a vector hangs")]
    found = difference(report(old), report(new))
    assert (found.went, found.came) == (["a storm"], ["a vector hangs"])


def test_vms_go_in_their_order_and_more_of_them_are_told() -> None:
    found = difference(report(vm(50), vm(60, number=2)), report(vm(50)))
    assert {change.vm for change in found.changes} == {1}
    assert "2 VMs before, 1 after" in found.notes[0]


def test_it_is_json() -> None:
    found = difference(report(vm(50)), report(vm(80))).as_dict()
    assert json.loads(json.dumps(found))["schema"] == "fastexit.difference/1"
    row = next(r for r in found["changes"] if r["row"] == "HLT" and r["column"] == "per second")
    assert row["change"] == pytest.approx(0.6)


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("exits.HLT.per second > +10%", ["exits.HLT.per second"]),
        ("exits.HLT.per second > 70", ["exits.HLT.per second"]),
        ("exits.HLT.per second >= 80", ["exits.HLT.per second"]),
        ("exits.HLT.per second > 80", []),
        ("exits.MSR_WRITE.per second > -5 %", []),  # it is not told to be different
        ("exits.HLT.median ns > 30%", ["exits.HLT.median ns"]),
        ("fast.6.18 ICR write<0.6", ["fast.6.18 ICR write.share"]),
        ("findings > 0", []),
        ("exits.HLT < +500%", ["exits.HLT.per second", "exits.HLT.share", "exits.HLT.median ns", "exits.HLT.p99 ns"]),
    ],
)
def test_conditions(text: str, names: list[str]) -> None:
    found = difference(report(vm(50)), report(vm(80, median=700)))
    assert [change.name for change in Condition(text).met(found)] == names


@pytest.mark.parametrize("text", ["", "exits", "exits >", "exits > much", "> 5", "exits = 5"])
def test_what_is_no_condition_is_said(text: str) -> None:
    with pytest.raises(ValueError, match="no condition"):
        Condition(text)


def test_a_condition_about_nothing_is_said() -> None:
    with pytest.raises(ValueError, match="no figure has that name"):
        Condition("exits.HALT > 0").met(difference(report(vm(50)), report(vm(50))))
