"""Write the figures of README.md and docs/ from what the library does: ``python docs/generate.py [--check]``.

Only figures that do not depend on a clock are written here; timings come from ``make bench`` and stay out of the text.
With --check nothing is written, and the exit code is 1 when a file is out of date.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import answers
import costmodel
import lenient
import pathlengths
import verified

import fastexit as fx
import windows
from fastexit.insight.walk import MODELLED, walk
from fastexit.profile import PROFILES, named
from fastexit.releases import DISTRIBUTIONS, all_series, generation
from fastexit.trace import BUNDLED
from fastexit.trace.replay import replay
from fastexit.traits import Trait

ROOT = Path(__file__).resolve().parents[1]


def generations() -> str:
    """The table that README opens with: one row a kernel generation, by walking and replaying."""
    report = replay(BUNDLED)
    (vm,) = report.vms
    taken = {generation.kernel: generation for generation in vm.generations}
    rows = [
        "| kernel | WRMSR handled in | steps before the IPI leaves, fast / generic "
        "| steps of the whole exit, fast / generic | ICR writes of a real Linux guest taken fast |",
        "|---|---|---|---|---|",
    ]
    for kernel, profile in PROFILES.items():
        fast = walk(0x830, fx.icr(dest=1, vector=0xFD), kernel=kernel)
        generic = walk(0x830, fx.icr(dest=1, vector=0xFD), kernel=kernel, fastpath=False)
        where = "`handle_exit_irqoff`" if profile.traits & Trait.HOOK_IRQOFF else "vendor's run function"
        after = ", guest re-entered at once" if profile.traits & Trait.ICR_REENTERS else ""
        share = taken[kernel]
        rows.append(
            f"| {kernel} | {where}{after} | {fast.steps_before_ipi} / {generic.steps_before_ipi} "
            f"| {len(fast.steps_done)} / {len(generic.steps_done)} "
            f"| {share.fast:,} of {share.total:,} ({100 * share.share:.1f} %) |"
        )
    ipi, accepted = report.ipi, report.accepted
    rows += [
        "",
        f"Steps are those of `vcpu_enter_guest` that the model has ({MODELLED} of them). The trace has "
        f"{report.lines:,} lines; the model predicts {ipi.exact:,} of its {ipi.total:,} `kvm_apic_ipi` lines and "
        f"{accepted.exact:,} of the {accepted.total:,} `kvm_apic_accept_irq` lines that IPIs caused, character by "
        "character.",
    ]
    return "\n".join(rows)


def releases() -> str:
    """Which releases each generation stands for, with what distributions ship, for README."""
    rows = ["| `Machine(kernel=...)` | releases | follows | distributions that ship them |", "|---|---|---|---|"]
    held: dict[str, list[str]] = {name: [] for name in PROFILES}
    for series in all_series():
        held[generation(series).name].append(series)
    for name, known in PROFILES.items():
        span = held[name][0] if len(held[name]) == 1 else f"{held[name][0]} to {held[name][-1]}"
        ships = "; ".join(f"{text} ({series})" for series, text in DISTRIBUTIONS.items() if series in held[name])
        rows.append(f"| {name} | {span} | {known.tree} | {ships} |")
    return "\n".join(rows)


def stable() -> str:
    """What changed between two releases of one generation, for docs/model.md."""
    rows = ["| release | now | no longer |", "|---|---|---|"]
    for known in PROFILES.values():
        for change in (*known.stable, *known.later):
            now, gone = (", ".join(f"`{t.name}`" for t in Trait if t & side) for side in (change.added, change.removed))
            rows.append(f"| {change.release} | {now} | {gone} |")
    return "\n".join(rows)


def traits() -> str:
    """Which behaviour each generation and the manual's profile have, for docs/model.md."""
    rows = ["| trait | " + " | ".join(named()) + " |", "|---|" + "---|" * len(named())]
    for trait in Trait:
        marks = ("x" if profile.traits & trait else "" for profile in named().values())
        rows.append(f"| `{trait.name}` | " + " | ".join(marks) + " |")
    return "\n".join(rows)


def instructions() -> str:
    """What an IPI takes, for docs/performance.md, as ``benchmarks/instructions.py store`` found it."""
    found = json.loads((ROOT / "benchmarks" / "results" / "instructions.json").read_text())
    rows = [
        "| an IPI, consumed, batch door, N = 64 (x86-64-v3) | instructions, atomics | one owner |",
        "|---|---|---|",
        f"| C lower bound | {found['bound']:.0f} | {found['bound one owner']:.0f} |",
        f"| fast path | {found['fast']:.0f} | {found['fast one owner']:.0f} |",
        f"| generic path | {found['generic']:.0f} | |",
    ]
    return "\n".join(rows)


SECTIONS = {
    ROOT / "README.md": {"generations": generations, "releases": releases},
    ROOT / "docs" / "cost-model.md": {
        "pairs": costmodel.pairs,
        "cycles": costmodel.generations,
        "interrupts": pathlengths.interrupts,
        "deadlines": pathlengths.deadlines,
        "constants": costmodel.constants,
    },
    ROOT / "docs" / "lenient.md": lenient.SECTIONS,
    ROOT / "docs" / "model.md": {"traits": traits, "stable": stable},
    ROOT / "docs" / "performance.md": {"instructions": instructions},
    ROOT / "docs" / "report.md": answers.SECTIONS,
    ROOT / "docs" / "windows.md": {
        "doors": windows.doors,
        "cycles": windows.cycles,
        "published": windows.published,
        "patch": windows.patch,
    },
    ROOT / "docs" / "verified.md": {
        "runs": verified.runs,
        "kernels": verified.kernels,
        "inside": verified.inside,
        "vmx": verified.vmx,
        "mutants": verified.mutants,
        "faults": verified.faults,
        "planted": verified.planted,
        "windows": verified.windows,
        "irqchip": verified.irqchip,
    },
}


def render(text: str, name: str, body: str) -> str:
    """The text with the part between the two markers of that name replaced."""
    begin, end = f"<!-- generated: {name} -->", "<!-- end -->"
    head, found, rest = text.partition(begin)
    _, closed, tail = rest.partition(end)
    if not found or not closed:
        raise ValueError(f"no place for {name}: {begin} ... {end}")
    return f"{head}{begin}\n{body}\n{end}{tail}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="only say what is out of date")
    check = parser.parse_args().check
    stale = []
    for path, sections in SECTIONS.items():
        old = new = path.read_text()
        for name, make in sections.items():
            new = render(new, name, make())
        if new != old:
            stale.append(path.name)
            if not check:
                path.write_text(new)
    if stale:
        print(("out of date: " if check else "written: ") + ", ".join(stale))
    return int(check and bool(stale))


if __name__ == "__main__":
    sys.exit(main())
