"""What a notebook shows of a report: short, escaped, nothing that runs."""

from __future__ import annotations

from fastexit.answers.report import ExitRow, FileReport, Finding, Report, VmReport
from markup import Parsed
from reports import file, report, vm
from test_pages_text import hostile_report


def test_fragment() -> None:
    text = report()._repr_html_()
    parsed = Parsed(text)
    assert len(text) < 4000
    assert "vector 0xd1 of vCPU 2" in text
    assert "21,840" in text
    assert "48.0 us" in text
    assert len(parsed.of("table")) == 1
    assert "html" not in {tag for tag, _ in parsed.tags}


def test_worst_first_and_bounded() -> None:
    findings = [Finding("a", "note", f"note {i}") for i in range(50)] + [Finding("b", "problem", "the problem")]
    exits = [ExitRow(f"REASON{i}", 1, 0.02, None, None) for i in range(50)]
    text = report(*(vm(number=i, findings=findings, exits=exits) for i in range(1, 9)))._repr_html_()
    assert text.index("the problem") < text.index("note 0")
    assert text.count("<li>") == 4 * 12
    assert "and 38 reasons more" in text
    assert "and 4 VMs more" in text


def test_foreign_text_is_text() -> None:
    text = hostile_report()._repr_html_()
    assert "<script" not in text
    assert [c for c in text if not c.isprintable()] == []
    Parsed(text)


def test_little() -> None:
    assert "nothing was read" in Report()._repr_html_()
    assert "could not be read: no trace" in Report([FileReport("a", refused="no trace")])._repr_html_()
    Parsed(Report([file("a")], [VmReport("a", 0)])._repr_html_())
