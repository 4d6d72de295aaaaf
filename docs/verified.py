"""What `fastexit verify` found, as docs/verified.md: ``python docs/verified.py build/verify/*.json`` keeps reports.

A report is what `fastexit verify --json` printed, or the mutants' table of `make verify-mutants`. They are kept in
docs/verified.json, from which docs/generate.py writes the page.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
KEPT = ROOT / "docs" / "verified.json"


def runs() -> str:
    """One row a run, then one a kind of operation, over all runs."""
    reports = json.loads(KEPT.read_text())["runs"]
    hosts = sorted({host_text(report["host"]) for report in reports})
    rows = [
        f"Compared with {'; '.join(hosts)}.",
        "",
        f"{sum(r['operations'] for r in reports):,} operations in {len(reports)} runs, "
        f"{sum(r['divergences'] for r in reports)} differences.",
        "",
        "| began | command | operations | machines | most vCPUs | pages | trace lines | minutes | differences |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for report in reports:
        kinds = report["kinds"].values()
        rows.append(
            f"| {report['began'][:16].replace('T', ' ')} UTC | `{command(report)}` | {report['operations']:,} "
            f"| {sum(k['machines'] for k in kinds):,} | {max(k['vcpus'] for k in kinds):,} "
            f"| {sum(k['pages'] for k in kinds):,} | {sum(k['trace_lines'] for k in kinds):,} "
            f"| {report['seconds'] / 60:.1f} | {report['divergences']} |"
        )
    late = sum(len(kind["late"]) for report in reports for kind in report["kinds"].values())
    if late:
        rows += ["", f"{late} machines with clocks were given up: what differed did not show again, the host was late."]
    rows += ["", "| kind | operations | what is done |", "|---|---|---|"]
    names = {name: kind["about"] for report in reports for name, kind in report["kinds"].items()}
    for name, about in names.items():
        total = sum(report["kinds"].get(name, {"operations": 0})["operations"] for report in reports)
        rows.append(f"| {name} | {total:,} | {about} |")
    return "\n".join(rows)


def host_text(host: dict[str, Any]) -> str:
    """A host in one line: kernel, module, what it was read to be."""
    hashing = "on" if host["vector_hashing"] else "off"
    lacks = [name for name in ("smm", "cmci", "apicv") if not host[name]]
    return (
        f"Linux {host['release']}, module {host['module'] or 'unknown'}, modelled as {host['kernel']} "
        f"(KVM_CAP_X2APIC_API flags {host['api']:#x} and {host['api_split']:#x}, "
        f"vector hashing {hashing}, without {', '.join(lacks)})"
    )


def command(report: dict[str, Any]) -> str:
    """How to do it again."""
    only = list(report["kinds"])
    parts = ["fastexit verify", f"--ops {report['operations']}", f"--seed {report['seed']}"]
    return " ".join(parts + [f"--only {only[0]}"] * (len(only) == 1) + ["--trace"] * report["traced"])


def mutants() -> str:
    """One row a planted fault: which trap, what is wrong, how soon it was noticed and by what."""
    kept = json.loads(KEPT.read_text())["mutants"]
    last = max(m["operations"] or 0 for m in kept["mutants"])
    controls = " and ".join(f"{n:,} operations ({name})" for name, n in kept["unmutated"].items())
    rows = [
        f"{len(kept['mutants'])} faults were planted into the model, one at a time, and {kept['caught']} were found, "
        f"the last of them after {last:,} of {kept['limit']:,} operations (seed {kept['seed']}, {kept['began'][:10]}). "
        f"Without a fault, {controls} found nothing.",
        "",
        "| trap | fault | found by | after operations |",
        "|---|---|---|---|",
    ]
    for m in kept["mutants"]:
        kind = f"{m['kind']}{', traced' if m['traced'] else ''}" if m["kind"] else "nobody"
        rows.append(f"| {m['trap']} | {m['what']} | {kind} | {m['operations'] or kept['limit']:,} |")
    return "\n".join(rows)


def main() -> None:
    """Keeps the reports that are named; those of the same sort that were kept before are replaced."""
    kept = json.loads(KEPT.read_text()) if KEPT.exists() else {}
    read = [json.loads(Path(name).read_text()) for name in sys.argv[1:]]
    if not read:
        sys.exit("name the reports to keep")
    reports = [one for one in read if "mutants" not in one]
    for one in reports:
        if one["divergence"] is not None:
            sys.exit(f"seed {one['seed']} found a difference: {one['divergence']['text']}")
    if reports:
        kept["runs"] = sorted(reports, key=lambda one: one["began"])
    for one in read:
        if "mutants" in one:
            kept["mutants"] = one
    KEPT.write_text(json.dumps(kept, indent=1) + "\n")


if __name__ == "__main__":
    main()
