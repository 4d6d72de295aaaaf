"""Proof that `fastexit.kvm.verify` can fail: each fault of mutants.diff, planted into a copy of the model, is found.

`make verify-mutants` runs the long test, which needs /dev/kvm, prints a table and writes build/verify/mutants.json. A
fault that survives means that verify's operations are blind there.
"""

from __future__ import annotations

import ast
import json
import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

import fastexit
from conftest import ROOT
from fastexit.kvm.tracefs import KernelTrace, TraceUnavailable
from mutants import MUTANTS, TABLE, Mutant, parsed
from real_kvm import kvm

PACKAGE = Path(fastexit.__file__).parent
OPERATIONS = 20_000
SEED = int(os.environ.get("FASTEXIT_KVM_SEED", "1"))
SHORTEN_SECONDS = 3.0
AT_ONCE = 2
TRAPS = range(1, 71)

VERIFY = """
import json, sys
from fastexit.kvm.comparison import verify
operations, seed, seconds, traced = sys.argv[1:]
report = verify(int(operations), seed=int(seed), shorten=float(seconds), traced=traced == "True")
print(json.dumps(report.as_dict()))
"""


def verified(directory: Path, mutant: Mutant | None, *, traced: bool = False) -> dict[str, Any]:
    """The report of verify on a copy of the package with one fault, or with none; kernels are interpreted."""
    copy = directory / "fastexit"
    shutil.copytree(PACKAGE, copy, ignore=shutil.ignore_patterns("__pycache__"))
    if mutant is not None:
        path = copy / mutant.file
        path.write_text(mutant.applied(path.read_text()))
    env = os.environ | {"PYTHONPATH": str(directory), "NUMBA_DISABLE_JIT": "1", "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, "-c", VERIFY, *map(str, (OPERATIONS, SEED, SHORTEN_SECONDS, traced))]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=1800, check=False)
    shutil.rmtree(copy)
    if done.returncode:
        raise RuntimeError(f"{mutant}: {done.stderr[-2000:]}")
    return json.loads(done.stdout)


def traces() -> bool:
    """Whether this kernel's tracepoints can be read."""
    try:
        KernelTrace().close()
    except TraceUnavailable:
        return False
    return True


def line(number: int, mutant: Mutant, report: dict[str, Any]) -> dict[str, Any]:
    """What is kept of one fault."""
    found = report["divergence"]
    return {
        "number": number,
        "trap": mutant.trap,
        "what": mutant.what,
        "file": mutant.file,
        "operations": report["operations"] + 1 if found else None,
        "kind": found["kind"] if found else None,
        "shown": found["text"] if found else None,
        "traced": mutant.traced,
        "seconds": report["seconds"],
    }


def shown(entry: dict[str, Any]) -> str:
    """One fault as a line of the table."""
    if entry["operations"] is None:
        return f"trap {entry['trap']:2}  {entry['what']:<58} SURVIVED"
    return f"trap {entry['trap']:2}  {entry['what']:<58} {entry['operations']:>6,} {entry['kind']:<7} {entry['shown']}"


def selected(words: str, traced: bool) -> list[tuple[int, Mutant]]:
    """Faults whose number is among the words, or all of them; without trace lines not those that need them."""
    wanted = [int(word) for word in words.split()] or range(len(MUTANTS))
    return [(n, mutant) for n, mutant in enumerate(MUTANTS) if n in wanted and (traced or not mutant.traced)]


@pytest.mark.long
@kvm
def test_every_fault_is_found(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """FASTEXIT_MUTANTS="3 17" looks at some of them alone."""
    traced = traces()
    chosen = selected(os.environ.get("FASTEXIT_MUTANTS", ""), traced)
    start = time.monotonic()

    def hunt(item: tuple[int, Mutant]) -> dict[str, Any]:
        number, mutant = item
        entry = line(number, mutant, verified(tmp_path / str(number), mutant, traced=mutant.traced))
        with capfd.disabled():
            print(f"{number:3} {shown(entry)}", flush=True)
        return entry

    with ThreadPoolExecutor(AT_ONCE) as pool:
        hunts = [pool.submit(hunt, item) for item in chosen]
        controls = {
            name: pool.submit(verified, tmp_path / name, None, traced=name == "traced")
            for name in ("plain", *["traced"] * traced)
        }
        entries = [one.result() for one in hunts]
        reports = {name: control.result() for name, control in controls.items()}
    result = {
        "host": reports["plain"]["host"],
        "began": reports["plain"]["began"],
        "seed": SEED,
        "limit": OPERATIONS,
        "unmutated": {name: report["operations"] for name, report in reports.items()},
        "caught": sum(entry["operations"] is not None for entry in entries),
        "seconds": round(time.monotonic() - start, 1),
        "mutants": entries,
    }
    path = ROOT / "build" / "verify" / "mutants.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")
    with capfd.disabled():
        print(f"{result['caught']} of {len(entries)} faults found in {result['seconds']} s; {path.relative_to(ROOT)}")
    for report in reports.values():
        assert report["divergence"] is None
        assert report["operations"] >= OPERATIONS
    assert [entry["what"] for entry in entries if entry["operations"] is None] == []


def test_every_fault_can_be_planted() -> None:
    """One place each, and the result is Python that does something else."""
    for mutant in MUTANTS:
        source = (PACKAGE / mutant.file).read_text()
        assert ast.dump(ast.parse(mutant.applied(source))) != ast.dump(ast.parse(source)), mutant


def test_a_fault_without_a_place_is_refused() -> None:
    for text in ("three\n", "two\ntwo\n", "two, three\n"):
        with pytest.raises(ValueError, match="places"):
            Mutant(1, "x", "regs.py", "two\n", "three\n").applied(text)


def test_table_is_read_as_a_diff() -> None:
    table = "Words.\n@@ 1 regs.py: wrong\n one\n-two\n+three\n@@ 2 regs.py traced: too\n+four\n five"
    first, second = parsed(table)
    assert first == (1, "wrong", "regs.py", "one\ntwo\n", "one\nthree\n", False)
    assert second == (2, "too", "regs.py", "five\n", "four\nfive\n", True)
    assert first.applied("zero\none\ntwo\n") == "zero\none\nthree\n"
    assert len(MUTANTS) == TABLE.read_text().count("\n@@")
    with pytest.raises(ValueError, match="no lines of a diff below 'wrong'"):
        list(parsed("@@ 1 regs.py: wrong\n\none\ntwo"))


def test_faults_are_many_and_different() -> None:
    assert len(MUTANTS) >= 25
    assert len({(m.file, m.before, m.after) for m in MUTANTS}) == len(MUTANTS)
    assert len({m.what for m in MUTANTS}) == len(MUTANTS)
    assert {m.trap for m in MUTANTS} <= set(TRAPS)
