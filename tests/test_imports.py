"""Imports point one way, and importing the package is cheap."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import fastexit
from fastexit.jit import cache

PACKAGE = Path(fastexit.__file__).parent
ORACLE = sorted(Path(__file__).parent.glob("oracle*.py"))

LAYERS = (
    {"hyperv", "reasons", "regs", "traits"},
    {"layout", "outcome", "profile", "exits.table"},
    {"jit"},
    {"kernels"},
    {"checks", "events", "guestmemory", "targets"},
    {"releases"},
    {"offers"},
    {"exits", "tracepoints"},
    {
        *("config", "connections", "gsis", "ioctls", "irqchip", "irte", "pit", "routing", "settings"),
        *("snapshot", "snapshotchips", "snapshotwords", "vcpustate"),
    },
    {"settle"},
    {"vcpu"},
    {"clockedvcpu", "compiledvcpu", "costs", "hostrows"},
    {"machine"},
    {"insight"},
    {"adapters", "embed", "kvm", "trace"},
    {"records"},
    {"answers"},
    {"pages"},
    {"cli"},
    {"__main__"},
)
"""A module may import from its own row and from those above it. A folder's file with a place of its own has a dot."""

DATA = LAYERS[0] | LAYERS[1]
UNITS = set().union(*LAYERS)


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts)


SOURCES = {module_name(path): path.read_text() for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py"}


def statements(node: ast.AST) -> Iterator[ast.Import | ast.ImportFrom]:
    """Every import that is carried out, in functions too; not those for type checkers."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import | ast.ImportFrom):
            yield child
        elif not (isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING"):
            yield from statements(child)


def imports(name: str, source: str) -> set[str]:
    """Full names of what ``fastexit.<name>`` imports."""
    package = ["fastexit", *name.split(".")[:-1]]
    found = set()
    for node in statements(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
            continue
        base = package[: len(package) - node.level + 1] if node.level else []
        base = ".".join([*base, *filter(None, [node.module])])
        found |= {f"{base}.{alias.name}" for alias in node.names}
    return found


def ours(names: set[str]) -> set[str]:
    """What LAYERS calls the modules of fastexit among full names."""
    return {unit(name.removeprefix("fastexit.")) for name in names if name.startswith("fastexit.")} - {"__version__"}


def unit(name: str) -> str:
    """The file or folder under which LAYERS has ``fastexit.<name>``."""
    parts = name.split(".")
    return file if (file := ".".join(parts[:2])) in UNITS else parts[0]


def row(name: str) -> int:
    for i, layer in enumerate(LAYERS):
        if unit(name) in layer:
            return i
    raise LookupError(f"fastexit.{name} is in no row of LAYERS")


def violations(sources: dict[str, str]) -> list[str]:
    """What is imported against the direction, one line each."""
    found = []
    for name, source in sorted(sources.items()):
        names = imports(name, source)
        found += [f"{name} imports {other}" for other in sorted(ours(names)) if row(other) > row(name)]
        foreign = {other.split(".")[0] for other in names}
        banned = {"numba", "llvmlite"} | ({"numpy"} if name in LAYERS[0] else set()) if name in DATA else set()
        found += [f"{name} imports {other}" for other in sorted(foreign & banned)]
    return found


def test_imports_point_one_way() -> None:
    assert violations(SOURCES) == []


@pytest.mark.parametrize(
    ("name", "line", "complaint"),
    [
        ("regs", "import fastexit.machine", "regs imports machine"),
        ("regs", "import numpy as np", "regs imports numpy"),
        ("layout", "from numba import njit", "layout imports numba"),
        ("outcome", "import fastexit.kernels.lapic", "outcome imports kernels"),
        ("exits.table", "from fastexit.exits import handlers", "exits.table imports exits"),
        ("exits.table", "import numba", "exits.table imports numba"),
        ("kernels.lapic", "from fastexit import exits", "kernels.lapic imports exits"),
        ("kernels.lapic", "from ..machine import Machine", "kernels.lapic imports machine"),
        ("kernels.lapic", "def f():\n    from .. import machine", "kernels.lapic imports machine"),
        ("machine", "try:\n    import fastexit.trace\nexcept ImportError:\n    pass", "machine imports trace"),
    ],
)
def test_checker_sees(name: str, line: str, complaint: str) -> None:
    assert violations({name: line}) == [complaint]


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("layout", "import numpy as np\nfrom fastexit import regs"),
        ("kernels.lapic", "from . import typed\nfrom fastexit import layout"),
        ("kernels.lapic", "from fastexit.exits import table\nfrom fastexit.exits.table import VMX"),
        ("exits.handlers", "if TYPE_CHECKING:\n    from fastexit.cli import main"),
    ],
)
def test_checker_allows(name: str, line: str) -> None:
    assert violations({name: line}) == []


def test_checker_knows_every_module() -> None:
    with pytest.raises(LookupError, match=r"fastexit\.nowhere"):
        violations({"kernels.lapic": "from fastexit import nowhere"})
    for name in SOURCES:
        row(name)


def test_oracle_shares_declarations_only() -> None:
    found = set().union(*(imports(path.stem, path.read_text()) for path in ORACLE))
    shared = {"fastexit.hyperv", "fastexit.ioctls.Events", "fastexit.regs", "fastexit.reasons.KvmExit"}
    assert {name for name in found if name.startswith("fastexit")} == shared


def test_cache_key_covers_what_kernels_import() -> None:
    folders = {"jit", "kernels"}
    below = set().union(*(ours(imports(name, text)) for name, text in SOURCES.items() if name.split(".")[0] in folders))
    while True:
        wider = below.union(*(ours(imports(name, SOURCES[name])) for name in below - folders))
        if wider == below:
            break
        below = wider
    assert sorted(below - folders) == sorted(cache.BELOW)


def test_import_is_cheap() -> None:
    heavy = {"llvmlite", "matplotlib", "numba", "rich"}
    code = f"import fastexit, sys; print(sorted({heavy} & set(sys.modules)))"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"
