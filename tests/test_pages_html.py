"""The page: what is in it, that it runs and fetches nothing, how it reads in a browser, in print and by keyboard."""

from __future__ import annotations

import base64
import hashlib
import re
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import browser
from fastexit.answers.report import FileReport, Finding, Report, SentRow, VmReport
from markup import Parsed
from reports import file, report, table, vm
from test_pages_text import hostile_report

pytest.importorskip("jinja2", reason="jinja2 is not installed: no page")
pytest.importorskip("matplotlib", reason="matplotlib is not installed: no page")

from fastexit.pages import html  # noqa: E402

CHARTS = ["exits", "seconds", "times", "sent", "latency", "fast", "saved"]


def everything() -> Report:
    return report(vm(), files=[file(), table()])


@pytest.fixture(scope="module")
def text() -> str:
    return html.page(everything())


@pytest.fixture(scope="module")
def parsed(text: str) -> Parsed:
    return Parsed(text)


@pytest.fixture(scope="module")
def saved(text: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("page") / "report.html"
    path.write_text(text)
    return path


def test_nothing_of_it_runs_or_is_fetched(text: str, parsed: Parsed) -> None:
    assert not {"script", "iframe", "object", "embed", "img", "form", "base"} & {tag for tag, _ in parsed.tags}
    for tag, attributes in parsed.tags:
        for name, value in attributes.items():
            assert not name.startswith("on"), (tag, name)
            assert name != "style", tag
            if name in ("href", "src", "xlink:href", "action"):
                assert value is not None
                assert value.startswith("#") or value == "data:,", (tag, value)
    assert "url(http" not in text
    assert "@import" not in text


def test_policy_allows_its_own_style_alone(text: str, parsed: Parsed) -> None:
    (policy,) = [m["content"] for m in parsed.of("meta") if m.get("http-equiv") == "Content-Security-Policy"]
    style = re.search(r"<style>(.*?)</style>", text, re.DOTALL)
    assert style
    digest = base64.b64encode(hashlib.sha256(style[1].encode()).digest()).decode()
    assert policy is not None
    assert policy.split("; ")[:2] == ["default-src 'none'", f"style-src 'sha256-{digest}'"]
    assert "unsafe" not in policy


def test_ids_are_unique_and_links_lead_somewhere(parsed: Parsed) -> None:
    ids = Counter(attributes["id"] for _, attributes in parsed.tags if "id" in attributes)
    assert [name for name, n in ids.items() if n > 1] == []
    links = [a["href"] for _, a in parsed.tags if (a.get("href") or "").startswith("#")]
    links += [f"#{name}" for _, a in parsed.tags for name in (a.get("aria-labelledby") or "").split()]
    links += [value[4:-1] for _, a in parsed.tags if (value := a.get("clip-path"))]
    assert links
    assert [link for link in links if link is None or link[1:] not in ids] == []


def test_every_picture_is_told_in_words(text: str, parsed: Parsed) -> None:
    pictures = parsed.of("svg")
    assert len(pictures) == 2 * len(CHARTS)
    assert all(one["role"] == "img" and one["aria-labelledby"] for one in pictures)
    for name in CHARTS:
        assert f'id="vm1-{name}-title"' in text
    assert "HLT 21,840, 42.0 %" in text
    assert len(parsed.of("details")) == len(parsed.of("summary")) == 5


def test_tables_have_captions_and_headers(parsed: Parsed) -> None:
    assert len(parsed.of("table")) == len(parsed.of("caption")) >= 14
    assert {one.get("scope") for one in parsed.of("th")} == {"row", "col"}
    assert all(one["tabindex"] == "0" and one["aria-label"] for one in parsed.of("div") if one.get("class") == "scroll")


def test_foreign_text_is_text() -> None:
    text = html.page(hostile_report())
    parsed = Parsed(text)
    assert parsed.of("script") == []
    assert "alert(1)" in " ".join(parsed.words)
    assert [c for c in text if not c.isprintable() and c != "\n"] == []
    assert "<script" not in text


def test_same_report_same_page() -> None:
    shown = Report([file()], [VmReport("guest.trace", 1, sent=[SentRow(0, 1, 5)])])
    assert html.page(shown) == html.page(shown)


@pytest.mark.parametrize(
    "shown", [Report(), Report([FileReport("a", refused="no trace")]), Report([file("a")], [VmReport("a", 0)])]
)
def test_pages_of_little(shown: Report) -> None:
    Parsed(html.page(shown))


def test_many_vms(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(html, "CHARTED", 1)
    monkeypatch.setattr(html, "TOLD", 3)
    shown = report(*(vm(f"host{i}.trace", exits=vm().exits[i:]) for i in range(5)))
    text = html.page(shown)
    assert len(Parsed(text).of("svg")) == 2 * len(CHARTS)
    assert text.count('<section id="vm') == 3
    assert "2 VMs with fewer exits: in the overview alone" in text
    assert all(f"host{i}.trace" in text for i in range(5))


def test_many_findings_and_vms_can_be_opened(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(html, "CHARTED", 0)
    findings = [Finding("a", "note", f"finding {i}.") for i in range(6)]
    text = html.page(report(*(vm(number=i, findings=findings) for i in range(1, 15))))
    closed = text.split("<details><summary>and 64 more")[1].split("</details>")[0]
    assert closed.count("<li") == 64
    assert text.count("finding 3.") == 14
    assert "<details><summary>14 virtual machines</summary>" in text


@pytest.mark.parametrize("name", ["jinja2", "matplotlib"])
def test_missing_libraries_are_one_line(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ModuleNotFoundError, match=rf"^the page needs {name}: pip install jinja2 matplotlib$"):
        html.page(report())


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    with browser.chromium() as running:
        yield running


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 768, 1400])
def test_in_a_browser(chromium: Any, saved: Path, width: int, scheme: str) -> None:
    with browser.shown(chromium, saved, width, color_scheme=scheme) as (page, heard):
        page.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
        assert page.evaluate(browser.LEAVING) == []
        assert page.evaluate(browser.OVERLAPS) == []
        assert page.evaluate("document.documentElement.scrollWidth") == width
        back = page.evaluate("getComputedStyle(document.body).backgroundColor")
        bar = page.evaluate("getComputedStyle(document.querySelector('svg [fill=\"var(--accent)\"]')).fill")
    dark = scheme == "dark"
    assert (back, bar) == (
        ("rgb(18, 22, 28)", "rgb(110, 163, 221)") if dark else ("rgb(246, 247, 249)", "rgb(63, 116, 181)")
    )
    assert heard == []


def test_one_picture_of_each_is_shown(chromium: Any, saved: Path) -> None:
    for width, shown in ((360, "narrow"), (1400, "wide")):
        with browser.shown(chromium, saved, width) as (page, _):
            seen = page.evaluate(
                "[...document.querySelectorAll('svg')].filter(s => s.clientWidth).map(s => s.parentNode.className)"
            )
        assert seen == [shown] * len(CHARTS)


def test_keyboard(chromium: Any, saved: Path) -> None:
    """Tab reaches the skip link first, then links, tables and details in the order of the page."""
    with browser.shown(chromium, saved, 1400) as (page, _):
        page.keyboard.press("Tab")
        assert page.evaluate("document.activeElement.className") == "skip"
        assert page.evaluate("document.activeElement.getBoundingClientRect().top") >= 0
        assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
        page.keyboard.press("Enter")
        assert page.evaluate("document.activeElement.id") == "main"
        tops = []
        for _ in range(12):
            page.keyboard.press("Tab")
            tops.append(page.evaluate("document.activeElement.getBoundingClientRect().top + window.scrollY"))
            assert page.evaluate("document.activeElement.tagName") in ("DIV", "SUMMARY")
        assert len(set(tops)) > 6
        page.locator("summary").first.focus()
        page.keyboard.press("Enter")
        assert page.locator("details").first.get_attribute("open") is not None


def test_print(chromium: Any, saved: Path, tmp_path: Path) -> None:
    """On paper all tables are open, in light colours."""
    with browser.shown(chromium, saved, 1000, color_scheme="dark") as (page, heard):
        page.emulate_media(media="print")
        assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
        assert page.locator("nav").is_hidden()
        assert page.evaluate(browser.HIDDEN_TABLES) == 0
        page.pdf(path=tmp_path / "report.pdf", format="A4")
    made = (tmp_path / "report.pdf").read_bytes()
    assert made.startswith(b"%PDF")
    assert 2 <= len(re.findall(rb"/Type\s*/Page\b", made)) <= 12
    assert heard == []


@pytest.mark.parametrize("vcpus", [9, 300])
def test_pictures_of_many_vcpus(chromium: Any, tmp_path: Path, vcpus: int) -> None:
    sent = [SentRow(i, (i + d) % vcpus, 10 ** (d % 5)) for i in range(vcpus) for d in range(1, min(vcpus, 6) + 1)]
    seconds = [{"A_REASON_OF_A_VERY_LONG_NAME_INDEED": i % 7, "HLT": 90_000} for i in range(3600)]
    path = tmp_path / "page.html"
    path.write_text(html.page(report(vm(sent=sent, by_second=seconds))))
    assert path.stat().st_size < 1_500_000
    for width in 360, 1400:
        with browser.shown(chromium, path, width) as (page, heard):
            assert page.evaluate(browser.OVERLAPS) == []
        assert heard == []


def test_hostile_page_in_a_browser(chromium: Any, tmp_path: Path) -> None:
    path = tmp_path / "page.html"
    path.write_text(html.page(hostile_report()))
    with browser.shown(chromium, path, 360) as (page, heard):
        assert page.evaluate("document.scripts.length") == 0
        assert page.evaluate(browser.LEAVING) == []
    assert heard == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_no_barrier_that_a_checker_finds(chromium: Any, saved: Path, scheme: str) -> None:
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="axe-playwright-python is not installed")
    with browser.shown(chromium, saved, 1400, color_scheme=scheme) as (page, _):
        page.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
        found = axe.Axe().run(page)
    assert found.violations_count == 0, found.generate_report()
