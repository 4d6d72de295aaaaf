"""The JSON Schema of fastexit.report/1, made from the classes whose fields the JSON is."""

from __future__ import annotations

import json
from dataclasses import fields, is_dataclass
from types import NoneType
from typing import Any, get_args, get_origin, get_type_hints

from fastexit.answers.report import SCHEMA, Report

_PLAIN = {int: "integer", float: "number", str: "string", bool: "boolean", NoneType: "null"}

_WORDS = {"type": "array", "items": {"type": "string"}}
_COMMAND = {
    "written": {"description": "Files that fastexit report wrote besides.", **_WORDS},
    "met": {"description": "Conditions of --fail-if that hold.", **_WORDS},
}
"""What the command adds to a report's own JSON."""


def schema() -> dict[str, Any]:
    """The schema as a dictionary in the order of the fields; every field is always there, and no other."""
    definitions: dict[str, Any] = {}
    whole = _object(Report, definitions)
    whole["required"].insert(0, "schema")
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": SCHEMA,
        **{key: value for key, value in whole.items() if key != "properties"},
        "properties": {"schema": {"const": SCHEMA}, **whole["properties"], **_COMMAND},
        "$defs": definitions,
    }


def _object(cls: type, definitions: dict[str, Any]) -> dict[str, Any]:
    hints = get_type_hints(cls)
    properties = {one.name: _value(hints[one.name], definitions) for one in fields(cls)}
    return {
        "description": " ".join((cls.__doc__ or "").replace("``", "").split()),
        "type": "object",
        "required": list(properties),
        "additionalProperties": False,
        "properties": properties,
    }


def _value(hint: Any, definitions: dict[str, Any]) -> dict[str, Any]:
    origin, parts = get_origin(hint), get_args(hint)
    if is_dataclass(hint) and isinstance(hint, type):
        if hint.__name__ not in definitions:
            definitions[hint.__name__] = {}
            definitions[hint.__name__] = _object(hint, definitions)
        return {"$ref": f"#/$defs/{hint.__name__}"}
    if origin is list:
        return {"type": "array", "items": _value(parts[0], definitions)}
    if origin is dict:
        return {"type": "object", "additionalProperties": _value(parts[1], definitions)}
    if origin is tuple:
        items = [_value(part, definitions) for part in parts]
        return {"type": "array", "prefixItems": items, "minItems": len(items), "maxItems": len(items)}
    if hint is Any:
        return {}
    if parts:
        return {"anyOf": [_value(part, definitions) for part in parts]}
    return {"type": _PLAIN[hint]}


if __name__ == "__main__":
    print(json.dumps(schema(), indent=1))
