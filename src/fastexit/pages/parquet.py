"""A report as Parquet: one file a table, typed columns."""

from __future__ import annotations

import os
from pathlib import Path

from fastexit.answers.flat import fitting, tables
from fastexit.answers.report import SCHEMA, Report

_TYPES = {"text": "string", "count": "int64", "real": "float64", "yes": "bool_", "address": "uint64"}


def write(report: Report, folder: str | os.PathLike[str]) -> list[Path]:
    """Writes every table to ``folder``, which is made where there is none; the files written.

    ModuleNotFoundError says what to install where pyarrow is missing.
    """
    try:
        import pyarrow as pa
        from pyarrow import parquet
    except ModuleNotFoundError:
        missing = "Parquet needs pyarrow: pip install pyarrow"
        raise ModuleNotFoundError(missing, name="pyarrow") from None
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for table in tables(report):
        schema = pa.schema(
            [(name, getattr(pa, _TYPES[kind])()) for name, kind in zip(table.columns, table.kinds, strict=True)],
            metadata={"schema": SCHEMA},
        )
        columns = [
            pa.array([_text(fitting(row[i], kind)) for row in table.rows], one.type)
            for i, (kind, one) in enumerate(zip(table.kinds, schema, strict=True))
        ]
        path = folder / f"{table.name}.parquet"
        parquet.write_table(pa.Table.from_arrays(columns, schema=schema), path)
        written.append(path)
    return written


def _text(value: object) -> object:
    """Lone surrogates, which a file name of odd bytes brings, are no UTF-8."""
    return value.encode("utf-8", "backslashreplace").decode() if isinstance(value, str) else value
