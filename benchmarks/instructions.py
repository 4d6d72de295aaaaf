"""Instructions an IPI, by valgrind: two batches that differ in length only, the difference divided by the IPIs between.

``python instructions.py check`` fails when a number rose by more than 5 % over benchmarks/results/instructions.json,
``python instructions.py store`` writes that file. Time depends on the machine and its neighbours; this does not: code
is made for a fixed CPU, x86-64-v3, with a cache of its own.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from counted import LENGTHS, SIDES

ROOT = Path(__file__).parents[1]
BASELINE = ROOT / "benchmarks" / "results" / "instructions.json"
TOLERANCE = 1.05
CPU = "x86-64-v3"


def _environment() -> dict[str, str]:
    cache = ROOT / "build" / "kernel-cache-valgrind"
    fixed = {"NUMBA_CPU_NAME": CPU, "NUMBA_CPU_FEATURES": "", "FASTEXIT_BOUND_ARCH": CPU, "PYTHONHASHSEED": "0"}
    return {**os.environ, **fixed, "FASTEXIT_CACHE_DIR": str(cache)}


def measure() -> dict[str, float]:
    """Instructions of one IPI, consumed, on every side. The cache is warmed outside valgrind."""
    command = [sys.executable, str(ROOT / "benchmarks" / "counted.py")]
    subprocess.run(command, env=_environment(), check=True)
    with tempfile.TemporaryDirectory() as directory:
        options = ["--tool=callgrind", "--instr-atstart=no", f"--callgrind-out-file={directory}/dump"]
        done = subprocess.run(["valgrind", *options, *command], env=_environment(), capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"valgrind failed: {done.stderr[-500:]}")
        counts = [_total(Path(f"{directory}/dump.{i + 1}")) for i in range(2 * len(SIDES))]
    between = LENGTHS[1] - LENGTHS[0]
    slopes = [(long - short) / between for short, long in zip(counts[::2], counts[1::2], strict=True)]
    return {side: round(slope, 1) for side, slope in zip(SIDES, slopes, strict=True)}


def _total(dump: Path) -> int:
    for line in dump.read_text().splitlines():
        if line.startswith(("summary:", "totals:")):
            return int(line.split()[1])
    raise RuntimeError(f"{dump.name}: callgrind wrote no total")


def main(what: str) -> int:
    """Exit status."""
    if not shutil.which("valgrind"):
        print("bench-instructions: skipped, valgrind is not installed")
        return 0
    found = measure()
    stored = json.loads(BASELINE.read_text()) if BASELINE.exists() else {}
    for side, n in found.items():
        was = stored.get(side)
        print(f"{side:18} {n:8.1f} instructions an IPI" + (f", stored {was:.1f}" if was else ""))
    if what == "store":
        BASELINE.parent.mkdir(exist_ok=True)
        BASELINE.write_text(json.dumps(found, indent=1) + "\n")
        return 0
    risen = [side for side, n in found.items() if side in stored and n > stored[side] * TOLERANCE]
    for side in risen:
        print(f"risen by more than 5 %: {side}", file=sys.stderr)
    return 1 if risen or not stored else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1] if len(sys.argv) > 1 else "check"))
