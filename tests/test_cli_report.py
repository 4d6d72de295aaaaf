"""``fastexit report``: what it prints and writes, its exit codes, what it says of wrong input."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fastexit.cli import main
from fastexit.cli import report as cli_report
from fastexit.pages.schema import schema

LINES = """\
 CPU 0/KVM-101 [000] d..1. 10.000001: kvm_exit: vcpu 0 reason MSR_WRITE rip 0xffffffff81000000 info1 0x0 info2 0x0
 CPU 0/KVM-101 [000] d..1. 10.000002: kvm_apic_accept_irq: apicid 1 vec 253 (Fixed|edge)
 CPU 0/KVM-101 [000] d..1. 10.000003: kvm_msr: msr_write 830 = 0x1000000fd
 CPU 0/KVM-101 [000] d..1. 10.000004: kvm_entry: vcpu 0, rip 0xffffffff81000002
 CPU 1/KVM-102 [001] d..1. 10.000005: kvm_entry: vcpu 1, rip 0xffffffff81000010
 CPU 1/KVM-102 [001] d..1. 10.000008: kvm_exit: vcpu 1 reason MSR_WRITE rip 0xffffffff81000011 info1 0x0 info2 0x0
 CPU 1/KVM-102 [001] ..... 10.000009: kvm_eoi: apicid 1 vector 253
 CPU 1/KVM-102 [001] ..... 10.000010: kvm_msr: msr_write 80b = 0x0
 CPU 1/KVM-102 [001] d..1. 10.000011: kvm_entry: vcpu 1, rip 0xffffffff81000013
"""
HLTS = LINES.replace("vcpu 1 reason MSR_WRITE", "vcpu 1 reason HLT")


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    path = tmp_path / "a.trace"
    path.write_text(LINES)
    return path


@pytest.fixture
def other(tmp_path: Path) -> Path:
    path = tmp_path / "b.trace"
    path.write_text(HLTS)
    return path


def said(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> tuple[int, str, str]:
    code = main(["report", *map(str, arguments)])
    out = capsys.readouterr()
    return code, out.out, out.err


def test_tables(capsys: pytest.CaptureFixture[str], trace: Path) -> None:
    code, out, err = said(capsys, trace)
    assert (code, err) == (0, "")
    for text in ("MSR_WRITE", "X2APIC_ICR", "RESCHEDULE", "IPI (x2APIC MSR)", "Taken fast: 1 ICR write", "7.3"):
        assert text in out


def test_json_is_of_the_schema(capsys: pytest.CaptureFixture[str], trace: Path) -> None:
    jsonschema = pytest.importorskip("jsonschema")
    code, out, err = said(capsys, trace, "--json", "--costs", "skylake-retpoline")
    assert (code, err) == (0, "")
    found = json.loads(out)
    assert found["schema"] == "fastexit.report/1"
    assert found.pop("written") == []
    assert found.pop("met") == []
    jsonschema.validate(found, schema())
    (vm,) = found["vms"]
    assert [row["kernel"] for row in vm["fast"] if row["fast"]][0] == "seed-v3"
    assert vm["clues"]["vendor"]["value"] == "vmx"
    assert found["costs"] == "skylake-retpoline"


def test_without_kernels_the_model_is_not_asked(capsys: pytest.CaptureFixture[str], trace: Path) -> None:
    _, out, _ = said(capsys, trace, "--json", "--no-kernels")
    assert json.loads(out)["vms"][0]["fast"] == []
    _, out, _ = said(capsys, trace, "--json", "--kernels", "5.8,6.18")
    assert {row["kernel"] for row in json.loads(out)["vms"][0]["fast"]} == {"5.8", "6.18"}


def test_what_is_known_better_is_taken_over(capsys: pytest.CaptureFixture[str], trace: Path) -> None:
    _, out, _ = said(capsys, trace, "--json", "--vendor", "svm", "--apicv", "off")
    found = json.loads(out)["vms"][0]
    assert (found["clues"]["vendor"]["value"], found["clues"]["vendor"]["source"]) == ("svm", "option")
    assert next(row for row in found["fast"] if row["kernel"] == "seed-v3")["fast"] == 0


def test_two_traces_side_by_side(capsys: pytest.CaptureFixture[str], trace: Path, other: Path) -> None:
    code, out, _ = said(capsys, trace, "--against", other)
    assert code == 0
    for text in ("before: ", "after: ", "HLT", "-50.0 %", "cannot be told"):
        assert text in out
    code, out, _ = said(capsys, trace, "--against", other, "--json")
    assert json.loads(out)["schema"] == "fastexit.difference/1"


def test_conditions_end_with_1(capsys: pytest.CaptureFixture[str], trace: Path, other: Path) -> None:
    code, _, err = said(capsys, trace, "--against", other, "--fail-if", "exits.HLT.share > 0.4")
    assert code == 1
    assert "exits.HLT.share is 0.5" in err
    assert said(capsys, trace, "--against", other, "--fail-if", "exits.HLT.share > 0.6")[0] == 0
    assert said(capsys, trace, "--fail-if", "exits.MSR_WRITE.share >= 1")[0] == 1


def test_files_are_written(capsys: pytest.CaptureFixture[str], trace: Path, tmp_path: Path) -> None:
    pytest.importorskip("jinja2")
    pytest.importorskip("matplotlib")
    page, tables = tmp_path / "page.html", tmp_path / "tables"
    code, out, err = said(capsys, trace, "--html", page, "--csv", tables)
    assert (code, err) == (0, "")
    assert f"written: {page}" in out
    assert "<html" in page.read_text()
    assert (tables / "exits.csv").exists()


def test_a_perfetto_trace_is_written(capsys: pytest.CaptureFixture[str], trace: Path, tmp_path: Path) -> None:
    pytest.importorskip("perfetto")
    path = tmp_path / "t.pftrace"
    assert said(capsys, trace, "--perfetto", path)[0] == 0
    assert path.stat().st_size > 100


def test_a_folder_and_many_files(capsys: pytest.CaptureFixture[str], trace: Path, other: Path) -> None:
    code, out, _ = said(capsys, trace.parent, "--json", "--jobs", "2")
    assert code == 0
    assert [Path(vm["path"]).name for vm in json.loads(out)["vms"]] == ["a.trace", "b.trace"]


def test_one_bad_file_does_not_end_the_rest(capsys: pytest.CaptureFixture[str], trace: Path, tmp_path: Path) -> None:
    missing = tmp_path / "missing"
    code, out, err = said(capsys, trace, missing, "--json", "--jobs", "1")
    found = json.loads(out)
    assert code == 1
    assert len(found["vms"]) == 1
    assert found["files"][1]["refused"]
    assert err.count("\n") == 1
    assert str(missing) in err


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["/nowhere/at/all"], "/nowhere/at/all"),
        (["a", "b", "--perfetto", "x"], "--perfetto"),
        (["a", "--against", "b", "--html", "x"], "--against"),
        (["a", "--fail-if", "much"], "condition"),
    ],
)
def test_wrong_input_is_one_line(capsys: pytest.CaptureFixture[str], arguments: list[str], says: str) -> None:
    code, _, err = said(capsys, *arguments)
    assert code == 2
    assert err.count("\n") == 1
    assert says in err


@pytest.mark.parametrize("arguments", [["a", "--jobs", "0"], ["a", "--kernels", "6.18", "--no-kernels"], []])
def test_wrong_arguments_end_with_2(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["report", *arguments])
    assert ended.value.code == 2


def test_no_escape_sequence_reaches_the_terminal(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    trace = tmp_path / "evil\x1b[31m.trace"
    trace.write_text(LINES.replace("CPU 0/KVM", "\x1b]0;own\x07ed"))
    _, out, err = said(capsys, trace)
    assert "\x1b" not in out + err
    assert "\x07" not in out + err


def test_written_files_are_named_or_counted(capsys: pytest.CaptureFixture[str]) -> None:
    cli_report._written(["a.html", "out/1.csv", "out/2.csv", "out/3.csv", "out/4.csv", "out/5.csv", "x/b\x1b.pftrace"])
    assert capsys.readouterr().out.splitlines() == [
        *("written: a.html", "written: out, 5 files", r"written: x/b\x1b.pftrace")
    ]


def test_the_bar_names_who_keeps_it_waiting() -> None:
    assert cli_report._longest([("/t/a.trace", 41.2), ("/t/b.trace", 3.0)]) == "reading traces, a.trace for 41 s"
    assert cli_report._longest([("/t/b.trace", 3.0)]) == cli_report._longest([]) == "reading traces"


@pytest.mark.parametrize("text", ["hello\n", "\n\n", "# tracer: nop\n"])
def test_a_file_without_events_is_refused(capsys: pytest.CaptureFixture[str], tmp_path: Path, text: str) -> None:
    path = tmp_path / "prose"
    path.write_text(text)
    code, _, err = said(capsys, path)
    assert code == 2
    assert err.count("\n") == 1
    assert "no event and no table among them" in err
