"""Numbers that leave the library are fixed: generations and traits may be put between others and move none."""

from __future__ import annotations

import ast
import inspect
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import fastexit as fx
from fastexit import layout, outcome, profile, reasons, regs
from fastexit import layout as L
from fastexit.profile import NEWEST, PROFILES, as_of, numbered, since
from fastexit.traits import HYPERV, RULES, Trait
from generations import ON_TRIAL

HERE = Path(__file__).parent
RELEASED = {"seed-v3": 0, "5.6": 1, "5.7": 2, "5.8": 3, "6.1": 4, "6.12": 5, "6.18": 6}
"""The numbers of 0.1.0's generations."""


def test_generations_keep_their_numbers() -> None:
    """Snapshots and C programs have these."""
    assert {name: PROFILES[name].number for name in RELEASED} == RELEASED


def test_a_number_is_one_generations() -> None:
    numbers = [known.number for known in PROFILES.values()]
    assert len(set(numbers)) == len(numbers)
    assert [numbered(number).name for number in numbers] == list(PROFILES)
    with pytest.raises(ValueError, match=r"unknown kernel number 65536: one of 0 \(seed-v3\), 1"):
        numbered(1 << 16)


def test_traits_are_single_bits_of_three_words() -> None:
    """Kernels test them in three words of the header."""
    for trait in Trait:
        assert trait.value.bit_count() == 1, f"Trait.{trait.name} is {trait.value:#x}, not one bit"
        assert trait.value.bit_length() <= 192, f"Trait.{trait.name}: H_HYPERV_RULES ends with bit 191"


@pytest.mark.parametrize("module", sorted((Path(fx.__file__).parent / "kernels").glob("*.py")), ids=lambda p: p.stem)
def test_a_bit_is_tested_in_its_word(module: Path) -> None:
    """k.T_..., k.R_... and k.HVR_... have a word each; a bit that is tested in another word is another's."""
    for number, line in enumerate(module.read_text().splitlines(), 1):
        for word, other in (("H_TRAITS", "R|HVR"), ("H_RULES", "T|HVR"), ("H_HYPERV_RULES", "T|R")):
            assert not re.search(rf"{word}\]\s*&[^|)]*\bk\.({other})_", line), f"line {number}: {line}"


def test_a_machine_has_its_generations_number() -> None:
    for name, known in PROFILES.items():
        m = fx.Machine(vcpus=1, kernel=name)
        traits = int(m.mem[L.H_TRAITS]) | int(m.mem[L.H_RULES]) << RULES | int(m.mem[L.H_HYPERV_RULES]) << HYPERV
        assert (m.kernel, m.mem[L.H_PROFILE], traits) == (name, known.number, known.traits)


@pytest.mark.parametrize("module", [layout, outcome, profile, reasons, regs], ids=lambda module: module.__name__)
def test_numbers_are_written_out(module: ModuleType) -> None:
    """A number that comes from a name's place among others moves with it: no auto(), no names out of range()."""
    for node in ast.walk(ast.parse(inspect.getsource(module))):
        assert not (isinstance(node, ast.Name) and node.id == "auto"), f"line {node.lineno}: auto()"
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Tuple):
            assert isinstance(node.value, ast.Tuple), f"line {node.lineno}: write each number beside its name"


def test_newest_is_the_default() -> None:
    assert NEWEST == fx.profiles()[-1] == fx.Machine(vcpus=1).kernel


def test_since_is_from_then_on() -> None:
    assert [since(name, "6.1") for name in ("seed-v3", "5.8", "6.1", "6.12")] == [False, False, True, True]
    with pytest.raises(KeyError):
        since("6.1", "4.19")


def test_as_of_takes_the_latest_entry_whatever_the_tables_order() -> None:
    for table in ({"5.7": 1, "6.12": 2}, {"6.12": 2, "5.7": 1}):
        assert [as_of(table, name) for name in ("5.6", "5.7", "5.8", "6.1", "6.12", NEWEST)] == [None, 1, 1, 1, 2, 2]


# --------------------------------------------------------------------------------- a generation put between two others

BETWEEN = ",".join(f"{name}.5={name}" if name[0].isdigit() else f"5.5={name}" for name in RELEASED)
"""A copy of every generation, right behind it."""

FINGERPRINTS = """
import hashlib, json, sys
import generations
generations.put_in(sys.argv[1])
import fastexit as fx
from fastexit.embed import cabi

found = {}
for kernel in fx.profiles():
    for vendor in ("vmx", "svm"):
        m = fx.Machine(apic_ids=[0, 1, 200], kernel=kernel, vendor=vendor, x2apic_api=1)
        m.boot_x2apic()
        m.trace.enable()
        for dest in (1, 200, 0xFFFF_FFFF):
            m.vcpus[0].wrmsr(0x830, fx.icr(dest=dest, vector=0xFD))
        if kernel not in generations.ON_TRIAL:
            found[f"{kernel} {vendor}"] = hashlib.sha256(m.snapshot() + m.trace.text().encode()).hexdigest()
print(json.dumps([list(fx.profiles()), found]))
"""


def python(*arguments: str, **environment: str) -> str:
    """What a Python of its own prints, which has no rows on trial but those it puts in."""
    path = os.pathsep.join([str(HERE), *filter(None, sys.path)])
    given = {name: value for name, value in os.environ.items() if not name.startswith(("FASTEXIT_TEST", "PYTEST"))}
    command, environment = [sys.executable, *arguments], given | {"PYTHONPATH": path} | environment
    done = subprocess.run(command, env=environment, cwd=HERE.parent, capture_output=True, text=True, check=False)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    return done.stdout


def test_a_row_between_moves_nothing() -> None:
    """Memory and trace of the machines that there were are the same to the byte, with a new row behind each."""
    before, now = (json.loads(python("-c", FINGERPRINTS, rows)) for rows in ("", BETWEEN))
    assert len(now[0]) == len(before[0]) + len(RELEASED)
    assert now[0][:4] == ["seed-v3", "5.5", "5.6", "5.6.5"]
    assert now[1] == before[1]


@pytest.mark.skipif(bool(ON_TRIAL), reason="rows are on trial already")
def test_tests_pass_with_a_row_between() -> None:
    """Some quick ones that ask every generation; generations.py says how to run all."""
    tests = "numbers.py", "trace_order.py", "profiles.py::test_where_the_ipi_leaves"
    pytest_of_its_own = "-m", "pytest", "-q", "-p", "no:xdist", "-p", "no:cacheprovider"
    files = (f"tests/test_{name}" for name in tests)
    assert "failed" not in python(*pytest_of_its_own, *files, FASTEXIT_TEST_ROWS="6.3=6.1,9.9=6.18")
