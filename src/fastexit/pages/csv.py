"""A report as CSV: one file a table, for spreadsheets and scripts."""

from __future__ import annotations

import csv
import os
from pathlib import Path
from typing import Any

from fastexit.answers.flat import tables
from fastexit.answers.report import Report
from fastexit.answers.words import clean

_FORMULA = ("=", "+", "-", "@")


def write(report: Report, folder: str | os.PathLike[str]) -> list[Path]:
    """Writes every table to ``folder``, which is made where there is none; the files written."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for table in tables(report):
        path = folder / f"{table.name}.csv"
        with path.open("w", newline="", encoding="utf-8") as file:
            out = csv.writer(file)
            out.writerow(table.columns)
            out.writerows(
                [_cell(value, kind) for value, kind in zip(row, table.kinds, strict=True)] for row in table.rows
            )
        written.append(path)
    return written


def _cell(value: Any, kind: str) -> Any:
    """Foreign text is no control sequence where it is shown, and no formula where a spreadsheet opens it."""
    if value is None:
        return ""
    if kind == "address":
        return f"0x{value:x}"
    if kind == "yes":
        return int(value)
    if kind != "text":
        return value
    text = clean(value)
    return f"'{text}" if len(text) > 1 and text.startswith(_FORMULA) else text
