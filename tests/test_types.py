"""What checkers and editors know of the public names: each has its type, and what is wrong with their use is found."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import fastexit
from fastexit import kvm

LOADED_OTHERWISE = {"kvm": "kvm", "workload": "insight.workload", "warmup": "jit.declare.warmup"}
"""The names that fastexit.__getattr__ knows besides those of its table, and where they are."""

WRONG = [
    ("fx.Machine(vcpu=2)", "call-arg"),
    ("fx.Machine(vcpus='two')", "arg-type"),
    ("fx.Machine(vcpus=2, kernal='6.18')", "call-arg"),
    ("fx.Machine(vcpus=2, hv_timer='on')", "arg-type"),
    ("m.boot_x2apc()", "attr-defined"),
    ("v.wrmsr(0x830)", "call-arg"),
    ("v.wrmsr('ICR', 0)", "arg-type"),
    ("out.pth", "attr-defined"),
    ("name: str = out.path", "assignment"),
    ("fx.Path.GENERIC", "attr-defined"),
    ("fx.icr(destination=1)", "call-arg"),
    ("fx.NoSuchThing", "attr-defined"),
    ("fx.kvm.NoSuchThing", "attr-defined"),
    ("fx.workload.no_such_thing()", "attr-defined"),
]

RIGHT = """
import fastexit as fx

m = fx.Machine(vcpus=2, kernel="6.1", vendor="svm", apicv=False)
m.boot_x2apic()
v = m.vcpus[0]
out = v.wrmsr(0x830, fx.icr(dest=1, vector=0xFD))
fast: bool = out.path is fx.Path.FAST
with fx.kvm.Oracle(vcpus=1) as vm:
    value: int | None = vm.vcpus[0].get_msr(0x1B)
reveal_type(m)
reveal_type(v)
reveal_type(out)
reveal_type(out.path)
reveal_type(fx.icr)
reveal_type(vm)
"""

REVEALED = [
    "fastexit.machine.Machine",
    "fastexit.vcpu.Vcpu",
    "fastexit.outcome.Outcome",
    "fastexit.outcome.Path",
    "def (dest: int =, vector: int =, ",
    "fastexit.kvm.oracle.Oracle",
]


def shown_to_checkers(package: ModuleType) -> dict[str, str]:
    """The names that a package imports for type checkers alone, each with the module that it is from."""
    (block,) = (
        node
        for node in ast.parse(Path(str(package.__file__)).read_text()).body
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
    )
    found = {}
    for node in block.body:
        assert isinstance(node, ast.ImportFrom)
        (alias,) = node.names
        assert alias.asname == alias.name, f"{alias.name} is not exported: import {alias.name} as {alias.name}"
        found[alias.name] = f"{node.module}.{alias.name}"
    return found


@pytest.mark.parametrize(("package", "others"), [(fastexit, LOADED_OTHERWISE), (kvm, {})])
def test_checkers_are_shown_what_is_loaded(package: ModuleType, others: dict[str, str]) -> None:
    loaded = {name: f"{module}.{name}" for name, module in package._NAMES.items()} | others
    assert shown_to_checkers(package) == {name: f"{package.__name__}.{place}" for name, place in loaded.items()}
    assert sorted(loaded) == sorted(package.__all__)


@pytest.mark.parametrize("package", [fastexit, kvm])
def test_every_public_name_is_there(package: ModuleType) -> None:
    for name in package.__all__:
        assert getattr(package, name) is not None
    listed = dir(package)
    assert set(package.__all__) <= set(listed)
    assert len(listed) == len(set(listed))
    with pytest.raises(AttributeError, match="no_such_thing"):
        _ = package.no_such_thing


@pytest.mark.parametrize("name", ["fastexit", "fastexit.kvm"])
def test_star_import(name: str) -> None:
    code = f"from {name} import *\nimport {name} as package\nprint(sorted(set(package.__all__) - set(globals())))"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[str, int, str, str]]:
    """Everything that mypy says of the programs above: file, line, error or note, text."""
    pytest.importorskip("mypy", reason="mypy is not installed: pip install 'fastexit[test]'")
    place = tmp_path_factory.mktemp("types")
    setting = "import fastexit as fx\nm = fx.Machine(vcpus=2)\nv = m.vcpus[0]\nout = v.wrmsr(0x830, 0)\n"
    (place / "wrong.py").write_text(setting + "".join(f"{line}\n" for line, _ in WRONG))
    (place / "right.py").write_text(RIGHT)
    command = [sys.executable, "-m", "mypy", "--strict", "--config-file=", f"--cache-dir={place / 'cache'}"]
    command += ["--no-error-summary", "--no-pretty", "wrong.py", "right.py"]
    result = subprocess.run(command, cwd=place, capture_output=True, text=True)
    assert result.stderr == ""
    found = []
    for line in result.stdout.splitlines():
        parts = re.fullmatch(r"(\S+?):(\d+): (error|note): (.*)", line)
        assert parts is not None, line
        found.append((parts[1], int(parts[2]), parts[3], parts[4]))
    return found


def test_mypy_finds_what_is_wrong(said: list[tuple[str, int, str, str]]) -> None:
    first = 5
    wanted = {(first + i, line, code) for i, (line, code) in enumerate(WRONG)}
    found = {
        (at, WRONG[at - first][0], text.rpartition("[")[2].rstrip("]"))
        for file, at, kind, text in said
        if file == "wrong.py" and kind == "error"
    }
    assert found == wanted


def test_mypy_knows_the_types_of_a_right_program(said: list[tuple[str, int, str, str]]) -> None:
    of_right = [(kind, text) for file, _, kind, text in said if file == "right.py"]
    assert [text for kind, text in of_right if kind == "error"] == []
    types = [text.removeprefix('Revealed type is "').replace("builtins.", "") for _, text in of_right]
    assert len(types) == len(REVEALED)
    for shown, wanted in zip(types, REVEALED, strict=True):
        assert shown.startswith(wanted)
