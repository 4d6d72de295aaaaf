"""A headless Chromium that shows a page and tells what it asked for, or one line on what is missing."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = os.environ.get("FASTEXIT_CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")


@contextmanager
def chromium() -> Iterator[Any]:
    """Skips where playwright or a Chromium is missing."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: no browser tests")
    if CHROMIUM is None:
        pytest.skip("no chromium here (Debian: apt-get install chromium): no browser tests")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@contextmanager
def shown(browser: Any, path: Path, width: int = 1400, **context: Any) -> Iterator[tuple[Any, list[str]]]:
    """The page in a window of that width; the list fills with console messages, errors and foreign requests."""
    window = browser.new_context(viewport={"width": width, "height": 900}, **context)
    page = window.new_page()
    heard: list[str] = []
    page.on("console", lambda message: heard.append(f"console: {message.text}"))
    page.on("pageerror", lambda error: heard.append(f"error: {error}"))
    page.on("request", lambda asked: asked.url == path.as_uri() or heard.append(f"request: {asked.url}"))
    page.goto(path.as_uri())
    yield page, heard
    window.close()


OVERLAPS = """() => {
  const found = [];
  for (const svg of document.querySelectorAll('svg')) {
    const frame = svg.getBoundingClientRect();
    if (!frame.width) continue;
    const texts = [...svg.querySelectorAll('text')].map(t => [t.textContent, t.getBoundingClientRect()]);
    for (const [i, [a, r]] of texts.entries()) {
      if (r.left < frame.left - 1 || r.right > frame.right + 1 || r.top < frame.top - 1 || r.bottom > frame.bottom + 1)
        found.push(`${svg.querySelector('title').textContent}: ${a} is cut`);
      for (const [b, s] of texts.slice(i + 1))
        if (r.left < s.right - 0.5 && s.left < r.right - 0.5 && r.top < s.bottom - 3 && s.top < r.bottom - 3)
          found.push(`${svg.querySelector('title').textContent}: ${a} on ${b}`);
    }
  }
  return found;
}"""
"""Words of pictures that lie on each other or leave their picture."""

LEAVING = """() => [...document.querySelectorAll('body *')].filter(e => {
  const r = e.getBoundingClientRect();
  return r.width && r.right > document.documentElement.clientWidth + 1 && !e.closest('.scroll') && !e.closest('svg');
}).map(e => e.outerHTML.slice(0, 80))"""
"""Elements that are wider than the window and not in something that scrolls."""

HIDDEN_TABLES = """() => [...document.querySelectorAll('table')].filter(
  t => !t.offsetHeight || !t.checkVisibility({contentVisibilityAuto: true})).length"""
