"""The compiled loop is the Python dispatcher, function by function: the same names in the same order."""

from __future__ import annotations

import ast
import inspect
from types import ModuleType

from fastexit.exits import dispatcher
from fastexit.kernels import loop, steps

ELSEWHERE = {
    "wrmsr": "entries.fast_exit and unicast",
    "reflect_to_l1": "no exit of L2 reaches the compiled loop",
    "begin_targets": "shared.begin_targets",
    "skip": "msr.skip",
    "inject_events": "events.inject_events",
    "sync_cr8_to_lapic": "cr8.sync_cr8_to_lapic",
}
"""Methods of the dispatcher whose compiled twin is no function of the loop, and where it is."""
ONLY_COMPILED = {
    "find_row": "vendor.rows in Python",
    "operate": "vendor.handlers in Python",
    "handles": "a fallback of CompiledDispatcher",
    "traces_late": "an attribute of the vendor in Python",
    "behind_unicast": "the end of unicast.send",
}


def functions(module: ModuleType, within: str | None = None) -> list[str]:
    """Public functions of a module, or methods of a class in it, in the order in which they stand."""
    body = ast.parse(inspect.getsource(module)).body
    if within is not None:
        (body,) = (node.body for node in body if isinstance(node, ast.ClassDef) and node.name == within)
    return [node.name for node in body if isinstance(node, ast.FunctionDef) and not node.name.startswith("_")]


def test_names_and_order() -> None:
    called = set(functions(steps))
    methods = [name for name in functions(dispatcher, "Dispatcher") if name not in ELSEWHERE]
    twins = [name for name in functions(loop) if name not in ONLY_COMPILED]
    assert [name for name in methods if name in twins] == twins
    assert [name for name in methods if name not in twins and name not in called] == []


def test_lists_are_of_today() -> None:
    assert set(ELSEWHERE) <= set(functions(dispatcher, "Dispatcher"))
    assert set(ONLY_COMPILED) <= set(functions(loop))
    assert not set(ELSEWHERE) & set(functions(loop))
