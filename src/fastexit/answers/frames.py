"""A report as arrays and data frames: the same tables as in CSV and Parquet, in memory."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from fastexit.answers.flat import Flat, fitting, tables
from fastexit.answers.report import Report

if TYPE_CHECKING:
    import pandas as pd

_TYPES = {"text": "O", "count": "<i8", "real": "<f8", "yes": "?", "address": "<u8"}
_MISSING = {"count": -1, "real": np.nan}


def arrays(report: Report) -> dict[str, npt.NDArray[np.void]]:
    """Each table as a structured array; what the trace does not tell is NaN, or -1 where it counts something."""
    return {table.name: _array(table) for table in tables(report)}


def frames(report: Report) -> dict[str, pd.DataFrame]:
    """Each table as a pandas DataFrame; ModuleNotFoundError says so where pandas is missing."""
    try:
        import pandas as pd
    except ModuleNotFoundError:
        raise ModuleNotFoundError("data frames need pandas: pip install pandas", name="pandas") from None
    return {
        name: pd.DataFrame({column: array[column] for column in array.dtype.names or ()})
        for name, array in arrays(report).items()
    }


def _array(table: Flat) -> npt.NDArray[np.void]:
    array = np.empty(
        len(table.rows), [(name, _TYPES[kind]) for name, kind in zip(table.columns, table.kinds, strict=True)]
    )
    for i, (name, kind) in enumerate(zip(table.columns, table.kinds, strict=True)):
        array[name] = [_known(fitting(row[i], kind), kind) for row in table.rows]
    return array


def _known(value: Any, kind: str) -> Any:
    return _MISSING.get(kind) if value is None else value
