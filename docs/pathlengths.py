"""Path lengths of real kernels, as docs/cost-model.md shows them beside modelled cycles.

``fastexit kernels paths VERSION --json > FILE`` measures one; ``python docs/pathlengths.py FILE...`` keeps what was
measured in docs/path-lengths.json.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from costpairs import OFF, booted, ipi

import fastexit as fx
from fastexit.kvm.lab.paths import paths
from fastexit.outcome import Path as Way
from fastexit.releases import generation

ROOT = Path(__file__).resolve().parents[1]
KEPT = ROOT / "docs" / "path-lengths.json"
KINDS = ("physical", "logical", "all-but-self")
DEADLINES = ("TSC deadline", "TSC deadline, no preemption timer")


def kept() -> dict[str, Any]:
    """What is kept, by generation."""
    return json.loads(KEPT.read_text()) if KEPT.exists() else {}


def keep(files: list[str]) -> None:
    """Adds measurements."""
    found = kept()
    for name in files:
        one = json.loads(Path(name).read_text())
        found[generation(one["kernel"]).name] = one
    names = [name for name in fx.profiles() if name in found]
    KEPT.write_text(json.dumps({name: found[name] for name in names}, indent=1) + "\n")


def _of(one: dict[str, Any], name: str, receiver: str) -> dict[str, Any]:
    return next(row for row in one["lengths"] if (row["name"], row["receiver"]) == (name, receiver))


def _is_fast(kernel: str, kind: str) -> bool:
    """Whether the model takes this way fast."""
    path = next(path for path in paths() if path.name == f"ICR, {kind}")
    return booted(kernel, OFF).vcpus[0].wrmsr(path.msr, path.value).path == Way.FAST


def interrupts() -> str:
    """One row a kernel and kind of ICR write."""
    rows = [
        "| kernel | ICR write | way | to the receiver, running | halted | busy | sender's whole exit "
        "| fast saves, to the receiver | modelled cycles saved |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, one in kept().items():
        fast = _of(one, "ICR, physical", "running")["to_receiver_least"]
        for kind in KINDS:
            row, is_fast = _of(one, f"ICR, {kind}", "running"), _is_fast(name, kind)
            halted = _of(one, f"ICR, {kind}", "halted")
            busy = _of(one, f"ICR, {kind}", "busy")["to_receiver_least"]
            others = (f"{halted['to_receiver_least']:,}", f"{busy:,}")
            saved = modelled = ""
            if not is_fast:
                saved = f"{row['to_receiver_least'] - fast:,}"
                cycles = [ipi(name, OFF, on).cycles_ipi for on in (False, True)]
                modelled = f"{cycles[0] - cycles[1]:,}" if kind == "logical" else ""
            rows.append(
                f"| {one['kernel']} | {kind} | {'fast' if is_fast else 'generic'} | {row['to_receiver_least']:,} "
                f"| {' | '.join(others)} | {row['exit_least']:,} | {saved} | {modelled} |"
            )
    return "\n".join(rows)


def deadlines() -> str:
    """One row a kernel: a write of the TSC deadline, on the fast path and beside it."""
    rows = ["| kernel | fast, preemption timer | generic, hrtimer | saved |", "|---|---|---|---|"]
    for one in kept().values():
        fast, generic = (_of(one, name, "none")["exit_least"] for name in DEADLINES)
        rows.append(f"| {one['kernel']} | {fast:,} | {generic:,} | {generic - fast:,} |")
    return "\n".join(rows)


if __name__ == "__main__":
    keep(sys.argv[1:])
