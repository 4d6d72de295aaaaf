"""A report as flat tables for other programs: one row a thing, columns of one type, keys in front.

Which tables and columns there are follows from the fields of the report's classes: numbers and words become columns,
durations and ranges some columns each, and what a row has many of is a table of its own that repeats the row's key.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from functools import cache
from types import NoneType
from typing import Any, get_args, get_type_hints

from fastexit.answers.report import FileReport, Quantiles, Report, VmReport

KEYS: dict[str, tuple[str, ...]] = {
    "vcpus": ("vcpu",),
    "msrs": ("msr", "write"),
    "fast": ("kernel", "what"),
    "switches": ("switch",),
    "findings": ("kind", "text"),
}
"""What tells the rows of a table apart, in the tables of what such a row has many of."""

MANY: dict[str, tuple[tuple[str, str], ...]] = {
    "by_reason": (("reason", "text"), ("exits", "count")),
    "rips": (("rip", "address"), ("exits", "count")),
    "values": (("value", "address"), ("times", "count")),
    "classes": (("class", "text"), ("times", "count")),
    "saved_by_vcpu": (("vcpu", "count"), ("least", "real"), ("most", "real")),
    "refusals": (("reason", "text"), ("exits", "count")),
    "gone": (("what", "text"), ("exits", "count")),
    "lines": (("line", "count"),),
    "events": (("event", "text"), ("lines", "count")),
    "unreadable_first": (("line", "count"), ("text", "text")),
    "problems": (("text", "text"),),
    "notes": (("text", "text"),),
}
"""The columns of what a row has many of, by the field's name."""

ADDRESSES = {"msr"}
"""Fields that people write in hexadecimal."""

_KINDS = {int: "count", float: "real", str: "text", bool: "yes"}
_FOREIGN = ("label:text", "number:count", "share:real", "total:real", "minimum:real", "mean:real", "maximum:real")


@dataclass
class Flat:
    """One table: ``kinds`` are "text", "count", "real", "yes" and "address" (64 bits, written in hexadecimal)."""

    name: str
    columns: list[str]
    kinds: list[str]
    rows: list[tuple[Any, ...]] = field(default_factory=list)


def tables(report: Report) -> list[Flat]:
    """All tables of a report, the empty ones too: whoever reads them finds the same ones each time."""
    made = {one.name: one for one in _declared()}
    for file in report.files:
        _fill(made, "files", FileReport, file, ())
        for table in file.tables:
            key = (file.path, table["kind"], table["title"], table["line"])
            for row in table["rows"]:
                made["tables"].rows.append((*key, *(row.get(one.split(":")[0], -1) for one in _FOREIGN)))
    for vm in report.vms:
        _fill(made, "vms", VmReport, vm, ())
        whose = (vm.path, vm.number)
        for what, clue in vm.clues.items():
            made["clues"].rows.append((*whose, what, clue.value, clue.source, clue.evidence, clue.line))
        for second, reasons in enumerate(vm.by_second):
            made["seconds"].rows.extend((*whose, second, reason, n) for reason, n in reasons.items())
        for name, row_type in _row_types().items():
            value = getattr(vm, name)
            for row in value if isinstance(value, list) else [] if value is None else [value]:
                _fill(made, name, row_type, row, whose)
    return list(made.values())


def _row_types() -> dict[str, type]:
    """Fields of a VM that are a table: their rows' class."""
    found = {}
    for name, hint in get_type_hints(VmReport).items():
        for one in _alternatives(hint):
            row_type = get_args(one)[0] if getattr(one, "__origin__", None) is list else one
            if hasattr(row_type, "__dataclass_fields__") and name != "clues":
                found[name] = row_type
    return found


def _alternatives(hint: Any) -> tuple[Any, ...]:
    return tuple(one for one in get_args(hint) if one is not NoneType) if NoneType in get_args(hint) else (hint,)


def _declared() -> Iterator[Flat]:
    path, vm = ("path", "text"), ("vm", "count")
    yield from _of_class("files", FileReport, ())
    columns = [path, ("kind", "text"), ("title", "text"), ("line", "count")]
    yield _flat("tables", [*columns, *((one.split(":")[0], one.split(":")[1]) for one in _FOREIGN)])
    yield from _of_class("vms", VmReport, ())
    clue = [("what", "text"), ("value", "text"), ("source", "text"), ("evidence", "text"), ("line", "count")]
    yield _flat("clues", [path, vm, *clue])
    yield _flat("seconds", [path, vm, ("second", "count"), ("reason", "text"), ("exits", "count")])
    for name, row_type in _row_types().items():
        yield from _of_class(name, row_type, (path, vm))


def _flat(name: str, columns: list[tuple[str, str]]) -> Flat:
    return Flat(name, [column for column, _ in columns], [kind for _, kind in columns])


def _of_class(name: str, row_type: type, key: tuple[tuple[str, str], ...]) -> Iterator[Flat]:
    own = _scalars(row_type)
    yield _flat(name, [*key, *((column, kind) for column, kind, _ in own)])
    keyed = {column: kind for column, kind, _ in own}
    for many in _many(row_type):
        keys = [(column, keyed[column]) for column in _keys(name)]
        yield _flat(f"{name}_{many}", [*key, *keys, *MANY[many]])


def _keys(name: str) -> tuple[str, ...]:
    return KEYS.get(name, ("path",))


@cache
def _many(row_type: type) -> list[str]:
    hints = get_type_hints(row_type)
    return [one.name for one in fields(row_type) if one.name in MANY and hints[one.name] not in _KINDS]


@cache
def _scalars(row_type: type) -> list[tuple[str, str, tuple[str | int, ...]]]:
    """Column, kind, and the way to it from a row."""
    hints = get_type_hints(row_type)
    found: list[tuple[str, str, tuple[str | int, ...]]] = []
    for one in fields(row_type):
        (hint,) = _alternatives(hints[one.name])
        if hint in _KINDS:
            kind = "address" if one.name in ADDRESSES else _KINDS[hint]
            name = "vm" if row_type is VmReport and one.name == "number" else one.name
            found.append((name, kind, (one.name,)))
        elif hint is Quantiles:
            for part in fields(Quantiles):
                kind = "count" if part.name == "count" else "real"
                found.append((f"{one.name}_{part.name}", kind, (one.name, part.name)))
        elif hint == tuple[float, float]:
            for i, end in enumerate(("least", "most")):
                found.append((f"{one.name}_{end}", "real", (one.name, i)))
    return found


def _at(row: Any, way: tuple[str | int, ...]) -> Any:
    for step in way:
        if row is None:
            return None
        row = row[step] if isinstance(step, int) else getattr(row, step)
    return row


def _fill(made: dict[str, Flat], name: str, row_type: type, row: Any, key: tuple[Any, ...]) -> None:
    made[name].rows.append((*key, *(_at(row, way) for _, _, way in _scalars(row_type))))
    own = tuple(getattr(row, column) for column in _keys(name)) if _many(row_type) else ()
    for many in _many(row_type):
        value = getattr(row, many)
        for item in value.items() if isinstance(value, dict) else value:
            made[f"{name}_{many}"].rows.append((*key, *own, *_level(item)))


def _level(item: Any) -> tuple[Any, ...]:
    """(1, (2, 3)) as (1, 2, 3)."""
    return tuple(one for part in item for one in _level(part)) if isinstance(item, tuple | list) else (item,)


def fitting(value: Any, kind: str) -> Any:
    """The value in a column of 64 bits: a number from a trace may have more."""
    if kind == "count" and value is not None:
        return max(-(1 << 63), min(value, (1 << 63) - 1))
    return min(value, (1 << 64) - 1) if kind == "address" and value is not None else value
