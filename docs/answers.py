"""What `fastexit report` prints for the questions of docs/report.md, which docs/generate.py puts there.

Each answer is a command that works in a clone of the project; of long output the parts that answer are shown.
"""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

from fastexit.cli import main

ROOT = Path(__file__).resolve().parents[1]
PUBLIC, WINDOWS = "tests/data/traces/public", "tests/data/windows"
LINUX = "src/fastexit/data/linux-6.1-4vcpu-x2apic.trace.xz"
PATCH = "docs/traces/patch-before", "docs/traces/patch-after"
COLUMNS = "110"

COMMANDS: dict[str, tuple[list[str], tuple[str, ...]]] = {
    "exits": ([f"{WINDOWS}/kvm-6.12-xapic.trace.xz"], ("Exits: ", "vCPUs")),
    "patch": ([f"{PATCH[0]}.txt", "--against", f"{PATCH[1]}.txt"], ()),
    "mitigations-off": ([f"{PATCH[0]}-mitigations-off.txt", "--against", f"{PATCH[1]}-mitigations-off.txt"], ()),
    "hyperv": (["docs/traces/hv-all.txt", "--against", "docs/traces/hv-no-apic-msrs.txt"], ()),
    "who": ([LINUX], ("MSRs", "Interrupts by", "Who sends")),
    "windows": (
        [f"{WINDOWS}/icr-by-synthetic-msr.txt", "--costs", "skylake-retpoline"],
        ("Findings", "Taken", "What a"),
    ),
    "stuck": ([f"{PUBLIC}/s05b-win2012-trace_pipe-unwrapped.txt"], ("Findings", "Interrupts by")),
    "reinjected": ([f"{PUBLIC}/s12-windows-reinjected-ept.txt"], ("Findings",)),
    "latency": ([f"{WINDOWS}/kvm-6.18-x2apic.trace.xz"], ("Latency", "HLT")),
    "slow": ([f"{PUBLIC}/s16-perfprof-windows-apicwrite.txt"], ("Findings", "Exits: ")),
    "apicv": ([f"{PUBLIC}/s09-nested-win-credguard-perf-decoded.txt"], ("What it looks at",)),
    "nested": ([f"{PUBLIC}/s09-nested-win-credguard-perf-decoded.txt"], ("Exits: ",)),
    "spins": ([f"{PUBLIC}/s07-kafl-windows-tracecmd.txt"], ("Findings", "vCPUs")),
    "fast": ([LINUX, "--costs", "skylake-retpoline"], ("Taken",)),
    "histogram": ([f"{PUBLIC}/s14-perftop-msr-histogram.txt", "--kernels", "5.7,5.8,6.18"], ("Taken",)),
}
"""Name -> arguments of the command, and how the parts begin that are shown; none: all of it."""


def answer(name: str) -> str:
    """The command and what it prints."""
    arguments, parts = COMMANDS[name]
    out = io.StringIO()
    before = Path.cwd()
    os.chdir(ROOT)
    try:
        with patch.dict(os.environ, COLUMNS=COLUMNS, NO_COLOR="1"), contextlib.redirect_stdout(out):
            code = main(["report", *arguments])
    finally:
        os.chdir(before)
    if code:
        raise RuntimeError(f"fastexit report {' '.join(arguments)} ended with {code}")
    text = "\n".join(line.rstrip() for line in out.getvalue().splitlines())
    shown = _shown(text, parts) if parts else text
    return f"```\n$ fastexit report {' '.join(arguments)}\n{shown}\n```"


def _shown(text: str, parts: tuple[str, ...]) -> str:
    """The first line and the wanted parts, which are divided by empty lines."""
    head, *rest = text.split("\n\n")
    kept = [part for part in rest if part.startswith(parts)]
    if len(kept) < len(parts):
        raise RuntimeError(f"the report has no part that begins with one of {parts}")
    left = len(rest) - len(kept)
    return "\n\n".join([head.splitlines()[0], *kept]) + (f"\n\n({left} more tables)" if left else "")


SECTIONS: dict[str, Callable[[], str]] = {name: (lambda name=name: answer(name)) for name in COMMANDS}
