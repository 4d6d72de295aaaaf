"""The faults of mutants.diff, planted into the model one at a time: does a kernel of the lab notice?

    NUMBA_DISABLE_JIT=1 python tests/lab_mutants.py 6.18

One machine is booted for all of them, so they are planted in this process: kernels are interpreted, and a function's
code is exchanged for that of the wrong one as long as it is asked about. Operations are of the kind that showed the
fault to /dev/kvm first (docs/verified.json), then of the others. build/verify/planted.json has the results; it is
written after each fault, and what was found is not tried again.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import CodeType, FunctionType, ModuleType
from typing import Any

import fastexit as fx
from mutants import MUTANTS, Mutant

ROOT = Path(__file__).resolve().parents[1]
KEPT = ROOT / "build" / "verify" / "planted.json"
PACKAGE = Path(fx.__file__).parent
KINDS = ("msr", "guest", "runs", "traces", "timers")


def functions(code: CodeType, owner: Any) -> Iterator[tuple[str, CodeType]]:
    """Qualified names and code of the functions and methods that a module's code makes."""
    for one in code.co_consts:
        if isinstance(one, CodeType):
            made = getattr(owner, one.co_name, None)
            if isinstance(made, type):
                yield from functions(one, made)
            elif made is not None:
                yield one.co_qualname, one


def same(one: CodeType, other: CodeType) -> bool:
    """Whether two functions do the same, wherever they stand."""
    said = [(code.co_code, code.co_names, code.co_varnames, repr(code.co_consts)) for code in (one, other)]
    return said[0] == said[1]


def function(module: ModuleType, name: str) -> FunctionType:
    """The function that a qualified name means; ValueError for what has no code of its own."""
    found: Any = module
    for part in name.split("."):
        found = inspect.getattr_static(found, part)
    for wrapping in ("fget", "__func__", "__wrapped__", "py_func"):
        found = getattr(found, wrapping, None) or found
    if not isinstance(found, FunctionType):
        raise ValueError(f"{module.__name__}: {name} is no function")
    return found


@contextmanager
def planted(mutant: Mutant) -> Iterator[None]:
    """The fault, for as long as it is asked about; ValueError for one outside of a function."""
    path = PACKAGE / mutant.file
    module: ModuleType = importlib.import_module("fastexit." + mutant.file.removesuffix(".py").replace("/", "."))
    source = path.read_text()
    true, wrong = (
        dict(functions(compile(text, str(path), "exec"), module)) for text in (source, mutant.applied(source))
    )
    changed = {name: code for name, code in wrong.items() if name in true and not same(code, true[name])}
    if not changed:
        raise ValueError(f"{mutant.file}: no function has {mutant.what!r}")
    held = [(function(module, name), code) for name, code in changed.items()]
    kept = [one.__code__ for one, _ in held]
    for one, code in held:
        one.__code__ = code
    try:
        yield
    finally:
        for (one, _), code in zip(held, kept, strict=True):
            one.__code__ = code


def hunted(lab: Any, mutant: Mutant, operations: int, first: str | None) -> dict[str, Any]:
    """What the kernel says: behind how many operations of all kinds it was found."""
    done = 0
    for kind in sorted(KINDS, key=lambda kind: kind != first):
        traced = mutant.traced and kind in ("msr", "guest")
        with planted(mutant):
            report = fx.kvm.verify(operations, other=lab, only=kind, traced=traced, shorten=0)
        done += report.operations
        if report.divergence is not None:
            return {
                "found": True,
                "operations": done + 1,
                "kind": kind,
                "traced": traced,
                "text": report.divergence.text,
            }
    return {"found": False, "operations": done}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("kernels", nargs="+", metavar="KERNEL")
    parser.add_argument("--operations", type=int, default=20_000, help="of each kind, for each fault")
    parser.add_argument("--seconds", type=float, help="no new fault after so long")
    parser.add_argument("--to", type=Path, default=KEPT, help="file of results")
    arguments = parser.parse_args()
    known = {m["what"]: m for m in json.loads((ROOT / "docs" / "verified.json").read_text())["mutants"]["mutants"]}
    results = json.loads(arguments.to.read_text())["planted"] if arguments.to.exists() else []
    arguments.to.parent.mkdir(parents=True, exist_ok=True)
    for kernel in arguments.kernels:
        with fx.kvm.Lab(kernel) as lab:
            for mutant in sorted(MUTANTS, key=lambda m: known.get(m.what, {}).get("operations") or 1 << 30):
                if any(told["what"] == mutant.what and told["found"] for told in results):
                    continue
                told: dict[str, Any] = {"kernel": lab.kernel.version, "trap": mutant.trap, "what": mutant.what}
                try:
                    told |= hunted(lab, mutant, arguments.operations, known.get(mutant.what, {}).get("kind"))
                except ValueError as error:
                    print(error, file=sys.stderr)
                    continue
                results.append(told)
                arguments.to.write_text(json.dumps({"planted": results}, indent=1) + "\n")
                print(json.dumps(told), file=sys.stderr, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
