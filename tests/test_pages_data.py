"""What other programs read of a report: JSON by its schema, CSV, Parquet, arrays and data frames."""

from __future__ import annotations

import csv as reader
import json
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest

from fastexit.answers import flat
from fastexit.answers.report import FileReport, Report, VcpuRow, VmReport
from fastexit.pages import csv, parquet, schema
from reports import HOSTILE, file, report, table, vm

SCHEMA_FILE = Path(__file__).parents[1] / "docs" / "report.schema.json"


def everything() -> Report:
    return report(
        vm(), vm(number=2, halts=None, seconds=None), files=[file(), table(), FileReport("x", refused="no trace")]
    )


def test_schema_file_is_current() -> None:
    told = "python -m fastexit.pages.schema > docs/report.schema.json"
    assert json.loads(SCHEMA_FILE.read_text()) == schema.schema(), told


@pytest.mark.parametrize("shown", [everything(), report(vm(exits=[])), Report(), Report([], [VmReport("a", 0)])])
def test_json_is_what_the_schema_says(shown: Report) -> None:
    validation = pytest.importorskip("jsonschema")
    validation.Draft202012Validator.check_schema(schema.schema())
    told = json.loads(json.dumps(shown.as_dict(), allow_nan=False))
    validation.validate(told, schema.schema())
    validation.validate(told | {"written": ["a.csv"], "met": []}, schema.schema())


@pytest.mark.parametrize(
    "spoil",
    [
        lambda told: told.pop("schema"),
        lambda told: told.update(schema="fastexit.report/2"),
        lambda told: told["vms"][0].pop("exits"),
        lambda told: told["vms"][0]["exits"][0].update(count="12"),
        lambda told: told["vms"][0]["exits"][0].update(more=1),
        lambda told: told.update(written="report.html"),
        lambda told: told["vms"][0]["fast"][0].update(saved=[1.0]),
        lambda told: told["vms"][0]["msrs"][0]["values"].append([1, 2, 3]),
    ],
)
def test_schema_refuses_what_is_none(spoil) -> None:
    validation = pytest.importorskip("jsonschema")
    told = json.loads(json.dumps(everything().as_dict()))
    spoil(told)
    with pytest.raises(validation.ValidationError):
        validation.validate(told, schema.schema())


def test_every_field_of_a_vm_has_its_place() -> None:
    made = {one.name: one for one in flat.tables(report(vm()))}
    for one in fields(VmReport):
        name = {"by_second": "seconds"}.get(one.name, one.name)
        in_vms = {"number": "vm"}.get(name, name) in made["vms"].columns
        assert in_vms or made[name].rows, f"VmReport.{one.name} is in no table"


def test_rows_are_as_wide_as_their_columns() -> None:
    for one in flat.tables(everything()):
        assert len(one.kinds) == len(one.columns) == len(set(one.columns)), one.name
        assert {len(row) for row in one.rows} <= {len(one.columns)}, one.name


def test_nothing_is_lost_in_the_tables() -> None:
    shown = everything()
    made = {one.name: one for one in flat.tables(shown)}
    assert len(made["exits"].rows) == sum(len(one.exits) for one in shown.vms)
    place = made["exits"].columns.index("count")
    assert sum(row[place] for row in made["exits"].rows) == sum(row.count for one in shown.vms for row in one.exits)
    assert sum(row[-1] for row in made["seconds"].rows) == sum(
        n for one in shown.vms for second in one.by_second for n in second.values()
    )
    assert {row[0] for row in made["files"].rows} == {"guest.trace", "stat.txt", "x"}


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as opened:
        return list(reader.DictReader(opened))


def test_csv(tmp_path: Path) -> None:
    written = csv.write(everything(), tmp_path / "made" / "here")
    assert sorted(written) == sorted((tmp_path / "made" / "here").iterdir())
    exits = read(tmp_path / "made" / "here" / "exits.csv")
    assert exits[0] | {"time_p90": ""} == exits[0] | {
        **{"path": "guest.trace", "vm": "1", "reason": "HLT", "count": "21840", "time_median": "48000"},
        "time_p90": "",
    }
    assert read(tmp_path / "made" / "here" / "msrs.csv")[0]["msr"] == "0x830"
    assert read(tmp_path / "made" / "here" / "vms.csv")[1]["seconds"] == ""
    assert csv.write(Report(), tmp_path / "empty")


@pytest.mark.parametrize(
    ("name", "cell"),
    [
        ("=HYPERLINK(1)", "'=HYPERLINK(1)"),
        ("@SUM(1)", "'@SUM(1)"),
        ("-", "-"),
        ('a"b,c', 'a"b,c'),
        ("two\nlines", r"two\nlines"),
        ("\x1b[2J", r"\x1b[2J"),
        ("\udcff", r"\udcff"),
    ],
)
def test_names_in_csv_do_nothing(tmp_path: Path, name: str, cell: str) -> None:
    csv.write(report(vm(vcpus=[VcpuRow(0, name, 1, {}, None)])), tmp_path)
    assert read(tmp_path / "vcpus.csv")[0]["thread"] == cell


def test_parquet(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    from pyarrow import parquet as pq

    shown = everything()
    shown.vms[0].vcpus[1].thread = "\udcff"
    shown.vms[0].vcpus[0].rips = [(1 << 63, 4)]
    shown.vms[0].exits[0].count = 1 << 70
    written = parquet.write(shown, tmp_path)
    assert len(written) == len(flat.tables(shown))
    exits = pq.read_table(tmp_path / "exits.parquet")
    assert exits.schema.metadata == {b"schema": b"fastexit.report/1"}
    assert exits["reason"].to_pylist() == [row.reason for one in shown.vms for row in one.exits]
    assert exits["count"][0].as_py() == (1 << 63) - 1
    assert pq.read_table(tmp_path / "vcpus_rips.parquet")["rip"][0].as_py() == 1 << 63
    assert pq.read_table(tmp_path / "vms.parquet")["seconds"].to_pylist() == [12.4, None]
    vcpus = pq.read_table(tmp_path / "vcpus.parquet")
    assert HOSTILE in vcpus["thread"].to_pylist()


def test_missing_pyarrow_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    with pytest.raises(ModuleNotFoundError, match=r"^Parquet needs pyarrow: pip install pyarrow$"):
        parquet.write(report(), tmp_path)


def test_arrays() -> None:
    made = everything().arrays()
    exits = made["exits"]
    assert exits["count"].sum() == 2 * sum(row.count for row in vm().exits)
    assert exits[exits["reason"] == "HLT"]["time_median"].tolist() == [48_000, 48_000]
    assert np.isnan(made["vms"]["seconds"][1])
    assert made["vcpus_rips"]["rip"].dtype == np.uint64
    assert len(Report().arrays()["exits"]) == 0


def test_data_frames() -> None:
    pytest.importorskip("pandas", reason="pandas is not installed")
    made = everything().frames()
    assert made["exits"].groupby("vm")["count"].sum().tolist() == [52_000, 52_000]
    assert made["fast"]["saved_least"].isna().sum() == 24


def test_missing_pandas_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "pandas", None)
    with pytest.raises(ModuleNotFoundError, match="^data frames need pandas: pip install pandas$"):
        report().frames()
