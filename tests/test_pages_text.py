"""The terminal's report: its order, its width, where its tables end, and that no foreign text steers a terminal."""

from __future__ import annotations

import io
import re

import pytest
from rich.console import Console

from fastexit.answers.report import (
    Clue,
    ExitRow,
    FileReport,
    Finding,
    LatencyRow,
    MsrRow,
    Report,
    SentRow,
    SwitchRow,
    VcpuRow,
    VectorRow,
    VmReport,
)
from fastexit.pages.text import render
from reports import HOSTILE, file, report, table, vm

SECTIONS = [
    *("Findings", "What it looks at", "Exits: ", "vCPUs: ", "Exits by second", "MSRs", "What is written to the ICR"),
    *(
        "Interrupts by vector",
        "Who sends to whom",
        "How the guest reaches its APIC",
        "HLT and wake-ups",
        "Latency of IPIs",
        "Taken fast: ",
        "What a switch",
    ),
    *("stat.txt: perf kvm stat: before", "guest.trace: Could not be read"),
]


def printed(shown: Report, width: int = 80, limit: int | None = 20, terminal: bool = False) -> str:
    out = io.StringIO()
    render(shown, Console(file=out, width=width, highlight=False, force_terminal=terminal), limit)
    return out.getvalue()


def everything() -> Report:
    return report(vm(), files=[file(), table()])


def test_order_of_sections() -> None:
    lines = printed(everything()).splitlines()
    places = [next(i for i, line in enumerate(lines) if line.startswith(section)) for section in SECTIONS]
    assert places == sorted(places)


@pytest.mark.parametrize("width", [80, 100, 140])
def test_tables_fit(width: int) -> None:
    tables = [line for line in printed(everything(), width).splitlines() if "   " in line]
    assert len(tables) > 60
    assert max(len(line.rstrip()) for line in tables) <= width


def test_numbers_are_never_cut() -> None:
    text = printed(report(), 80)
    assert "21,840" in text
    assert "…" not in text


def test_columns_of_little_weight_go_first() -> None:
    narrow, wide = printed(report(), 80), printed(report(), 160)
    assert "90 %" not in narrow.split("Exits: ")[1].split("vCPUs")[0]
    assert "90 %" in wide.split("Exits: ")[1].split("vCPUs")[0]


def test_long_tables_end() -> None:
    sent = [SentRow(i, j, 1 + i) for i in range(12) for j in range(12) if i != j]
    shown = report(vm(of=12, sent=sent))
    assert "and 112 more (--all)" in printed(shown)
    everything = printed(shown, limit=None)
    assert "more (--all)" not in everything
    assert len(everything.splitlines()) == len(printed(shown).splitlines()) + 112 - 1


def test_generations_that_do_the_same_share_a_row() -> None:
    text = printed(report())
    assert re.search(r"^seed-v3 to 5\.7 +0 +0 % ", text, re.MULTILINE)
    assert re.search(r"^5\.8 to 7\.3 +6,300 +100 % ", text, re.MULTILINE)


def test_exits_of_a_nested_guest_have_a_column() -> None:
    assert "of L2" not in printed(report())
    exits = [ExitRow("CPUID", 10, 1.0, None, None, nested=4)]
    assert re.search(r"^CPUID +10 +4 +100 %", printed(report(vm(exits=exits))), re.MULTILINE)


def test_names_of_reasons_are_whole() -> None:
    long = [ExitRow("EXTERNAL_INTERRUPT", 10**6, 1.0, 10.0, vm().exits[0].time, 1.0)]
    assert "EXTERNAL_INTERRUPT" in printed(report(vm(exits=long)))


def test_seconds_without_exits_are_counted() -> None:
    text = printed(report(vm(by_second=[{"HLT": 1}, {}, {}, {"HLT": 2}])))
    assert re.search(r"^ +0 +1 .*\n +3 +2 .*\nIn 2 other seconds there was no exit\.$", text, re.MULTILINE)


def test_a_clues_line_is_told_once() -> None:
    clues = {"vendor": Clue("vmx", "trace", "an exit (line 1,003)", 1003), "apicv": Clue("off", "trace", "an EOI", 7)}
    text = printed(report(vm(clues=clues)))
    assert "an exit (line 1,003)" in text
    assert text.count("line 1,003") == 1
    assert "an EOI (line 7)" in text


def test_worst_finding_first() -> None:
    findings = [
        Finding("a", "note", "first note"),
        Finding("b", "problem", "the problem", [7]),
        Finding("c", "odd", "odd"),
    ]
    lines = printed(report(vm(findings=findings))).splitlines()
    at = lines.index("Findings")
    assert lines[at + 1 : at + 4] == ["problem: the problem (line 7)", "note: first note", "note: odd"]


def test_many_findings_end_and_long_ones_do_not() -> None:
    advice = "look at the guest's clock " * 40
    findings = [Finding("a", "note", f"finding {i}.", [], advice) for i in range(50)]
    text = printed(report(vm(findings=findings)))
    assert text.count("note: finding") == 20
    assert "and 30 more (--all)" in text
    assert advice.rstrip() in text
    assert printed(report(vm(findings=findings)), limit=None).count("note: finding") == 50


def hostile_report() -> Report:
    """Every field of text is hostile."""
    bad = vm(
        path=HOSTILE,
        clues={HOSTILE: Clue(HOSTILE, HOSTILE, HOSTILE, 1)},
        exits=[ExitRow(HOSTILE, 1, 1.0, None, None)],
        vcpus=[VcpuRow(0, HOSTILE, 1, {HOSTILE: 1}, None)],
        by_second=[{HOSTILE: 1}, {HOSTILE: 2}],
        msrs=[MsrRow(1, HOSTILE, True, 1, 1.0, 0)],
        vectors=[VectorRow(1, HOSTILE, HOSTILE, 1, 0, 0, 1.0)],
        findings=[Finding(HOSTILE, HOSTILE, HOSTILE, [], HOSTILE)],
        switches=[SwitchRow(HOSTILE, {HOSTILE: 1}, 2, 1, HOSTILE)],
    )
    bad.latency = [LatencyRow(HOSTILE, bad.latency[0].time)]
    for row in bad.fast:
        row.what, row.refusals = HOSTILE, {HOSTILE: 1}
    shape = file(HOSTILE, shape=HOSTILE, problems=[HOSTILE], notes=[HOSTILE], unreadable_first=[(1, HOSTILE)])
    shape.tables = [{"kind": HOSTILE, "title": HOSTILE, "line": 1, "rows": table().tables[0]["rows"]}]
    shape.tables[0]["rows"][0]["label"] = HOSTILE
    return report(bad, bad, files=[shape, FileReport(HOSTILE, refused=HOSTILE)], costs=HOSTILE)


@pytest.mark.parametrize("terminal", [False, True])
def test_foreign_text_steers_no_terminal(terminal: bool) -> None:
    text = printed(hostile_report(), terminal=terminal)
    ours = re.sub(r"\x1b\[[0-9;]*m", "", text) if terminal else text
    assert [c for c in ours if not c.isprintable() and c != "\n"] == []
    assert r"\x1b" in text
    assert "[31m" not in re.sub(r"\\x1b\[31m", "", ours)


def test_no_colours_into_a_pipe() -> None:
    assert "\x1b" not in printed(everything())


def test_refused_file_is_one_line() -> None:
    assert (
        printed(Report([FileReport("a.txt", refused="line 1 is no trace")])) == "a.txt: refused: line 1 is no trace\n"
    )


def test_times_of_a_clock_that_is_none_are_ticks() -> None:
    text = printed(report(vm(), files=[file(clock="ticks")]))
    assert "48,000 ticks" in text
    assert "48.0 us" not in text


def test_several_vms_begin_with_an_overview() -> None:
    text = printed(report(vm(), vm(number=2, exits=[]), vm("other.trace", 0)))
    assert "3 VMs of 2 files" in text
    assert "Exits of all of them: 104,000" in text
    assert "guest.trace, VM 2" in text
    assert "other.trace, of no VM in particular" in text


def test_hundreds_of_files_fit_some_screens() -> None:
    shown = report(*(vm(f"host{i}.trace") for i in range(300)))
    shown.files[150] = FileReport("host150.trace", refused="no trace")
    shown.files[160].problems = ["times run backwards"]
    lines = printed(shown).splitlines()
    assert len(lines) < 260
    assert "host150.trace: refused: no trace" in lines
    assert "problem: times run backwards" in lines
    assert "and 278 more files (--all)" in lines
    assert "300 VMs of 300 files" in lines
    assert "the tables of each VM: --all, or a page (--html), or files (--csv)" in lines
    assert printed(report(*(vm(f"host{i}.trace") for i in range(9))), limit=None).count("Interrupts by vector") == 9


def test_files_of_one_name_are_told_apart() -> None:
    text = printed(report(vm("/t/host1/guest.trace"), vm("/t/host2/guest.trace")))
    assert "host1/guest.trace: trace-cmd report" in text
    assert "(host2/guest.trace, VM 1; lines 512" in text
    assert "/t/" not in text


def test_empty_reports() -> None:
    assert printed(Report()) == ""
    printed(Report([FileReport("a")], [VmReport("a", 1)]))
