"""What `fastexit verify` found, as docs/verified.md: ``python docs/verified.py build/verify/*.json`` keeps reports.

Behind ``--inside`` are those of a verify that ran inside a lab's machine (`fastexit kernels run`).

A report is what `fastexit verify --json` printed, or the mutants' table of `make verify-mutants`. They are kept in
docs/verified.json, from which docs/generate.py writes the page.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from fastexit.profile import PROFILES
from fastexit.traits import Trait

ROOT = Path(__file__).resolve().parents[1]
KEPT = ROOT / "docs" / "verified.json"
INSIDE = "--inside"
PLANTED = ("planted", "windows", "irqchip")
"""Results of the three programs that plant faults and ask a kernel."""


def kept() -> dict[str, Any]:
    """What is kept, by sort."""
    return json.loads(KEPT.read_text()) if KEPT.exists() else {}


def runs() -> str:
    """One row a run, then one a kind of operation, over all runs."""
    reports = kept().get("runs")
    if not reports:
        return "No run is kept yet: `make verify`."
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


def kernels() -> str:
    """One row a kernel of the lab, vendor and kind: how many operations, what was found, when."""
    reports = kept().get("kernels")
    if not reports:
        return "No run is kept yet: `make verify-kernels`."
    rows = [
        "| kernel | modelled as | vendor | kind | operations | machines | pages | trace lines | found | seed, date |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for report in reports:
        host = report["host"]
        found = "0" if report["agreed"] else f"first after {report['operations']:,}"
        for kind, count in report["kinds"].items():
            beside = f" ({count['undecided']:,} undecided)" if count.get("undecided") else ""
            rows.append(
                f"| {host['version'] or host['release']} | {host['kernel']} | {report['vendor'].upper()} | {kind} "
                f"| {count['operations']:,}{beside} | {count['machines']:,} | {count['pages']:,} "
                f"| {count['trace_lines']:,} | {found} | {report['seed']}, {report['began'][:10]} |"
            )
    return "\n".join(rows)


def inside() -> str:
    """One row a kernel and kind: the kernel's /dev/kvm, by ioctls of a process inside its machine."""
    reports = kept().get("inside")
    if not reports:
        return "No run is kept yet: `make verify-inside`."
    rows = [
        f"{sum(report['operations'] for report in reports):,} operations, "
        f"{sum(report['divergences'] for report in reports)} differences.",
        "",
        "| kernel | modelled as | module | kind | operations | machines | pages | found | minutes | seed, date |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for report in reports:
        host = report["host"]
        found = "0" if report["agreed"] else f"first after {report['operations']:,}"
        rows += [
            f"| {host['version'] or host['release']} | {host['kernel']} | {host['module']} | {kind} "
            f"| {count['operations']:,} | {count['machines']:,} | {count['pages']:,} | {found} "
            f"| {report['seconds'] / 60:.1f} | {report['seed']}, {report['began'][:10]} |"
            for kind, count in report["kinds"].items()
        ]
    return "\n".join(rows)


def vmx() -> str:
    """One row a kernel under Bochs, with and without APICv: programs that were the same, left out, different."""
    reports = kept().get("vmx")
    if not reports:
        return "No run is kept yet: `make verify-kernels`."
    rows = [
        "| kernel | modelled as | APICv | x2APIC | xAPIC | with events | steps | trace lines "
        "| same in another run only | left out | found | seed, date |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    faults: dict[str, int] = {}
    for report in reports:
        programs = report["programs"]
        rows.append(
            f"| {report['kernel']} | {report['modelled_as']} | {'on' if report['apicv'] else 'off'} "
            f"| {programs.get('x2apic', 0):,} | {programs.get('xapic', 0):,} "
            f"| {sum(count for mode, count in programs.items() if ' ' in mode):,} | {report['steps']:,} "
            f"| {report['trace_lines']:,} | {report['repeated']:,} | {report['left_out']:,} "
            f"| {len(report['differences'])} | {report['seed']}, {report['began'][:10]} |"
        )
        for name, count in report["faults_of_bochs"].items():
            faults[name] = faults.get(name, 0) + count
    total = sum(sum(report["programs"].values()) for report in reports)
    rows += ["", f"{total:,} programs were the same."]
    if faults:
        rows += ["", "| where Bochs is not a CPU, or an entry fails | programs |", "|---|---|"]
        rows += [f"| {name} | {count:,} |" for name, count in sorted(faults.items())]
    return "\n".join(rows)


def is_vmx(report: dict[str, Any]) -> bool:
    """Whether guests' programs were compared with a kernel under Bochs."""
    return bool("programs" in report and report["vendor"] == "vmx")


def is_labs(report: dict[str, Any]) -> bool:
    """Whether a kernel of the lab was compared, not this machine's."""
    return report.get("judge", "/dev/kvm") != "/dev/kvm"


def host_text(host: dict[str, Any]) -> str:
    """A host in one line: kernel, module, what it was read to be."""
    hashing = "on" if host["vector_hashing"] else "off"
    lacks = [name for name in ("smm", "cmci", "apicv") if not host[name]]
    without = f", without {', '.join(lacks)}" if lacks else ""
    return (
        f"Linux {host['release']}, module {host['module'] or 'unknown'}, modelled as {host['kernel']} "
        f"(KVM_CAP_X2APIC_API flags {host['api']:#x} and {host['api_split']:#x}, "
        f"vector hashing {hashing}{without})"
    )


def command(report: dict[str, Any]) -> str:
    """How to do it again."""
    parts = ["fastexit verify", f"--ops {report['operations']}", f"--seed {report['seed']}"]
    if report["ids"]:
        parts.append(f"--vcpus {','.join(map(str, report['ids']))}")
    return " ".join(parts + [f"--only {report['only']}"] * bool(report["only"]) + ["--trace"] * report["traced"])


def mutants() -> str:
    """One row a planted fault: which trap, what is wrong, how soon it was noticed and by what."""
    table = kept().get("mutants")
    if not table:
        return "No run is kept yet: `make verify-mutants`."
    last = max(m["operations"] or 0 for m in table["mutants"])
    controls = " and ".join(f"{n:,} operations ({name})" for name, n in table["unmutated"].items())
    when = f"seed {table['seed']}, {table['began'][:10]}"
    rows = [
        f"{len(table['mutants'])} faults were planted into the model, one at a time, and {table['caught']} were found, "
        f"the last of them after {last:,} of {table['limit']:,} operations ({when}). "
        f"Without a fault, {controls} found nothing.",
        "",
        "| trap | fault | found by | after operations |",
        "|---|---|---|---|",
    ]
    for m in table["mutants"]:
        kind = f"{m['kind']}{', traced' if m['traced'] else ''}" if m["kind"] else "nobody"
        rows.append(f"| {m['trap']} | {m['what']} | {kind} | {m['operations'] or table['limit']:,} |")
    return "\n".join(rows)


def faults() -> str:
    """What became of each trait flipped in a row: who noticed, or why nobody can."""
    table = kept().get("faults")
    if not table:
        return "No run is kept yet: `python tests/trait_faults.py`."
    found = {told["trait"]: told for told in table["tried"] if told["found"]}
    beyond = {name: why for name, why in table["beyond"].items() if name not in found}
    of_kernels = {trait.name or "" for trait in Trait if any(row.traits & trait for row in PROFILES.values())}
    open_ = sorted(of_kernels - set(found) - set(beyond))
    last = max(told["operations"] for told in found.values())
    rows = [
        f"{len(found)} traits were noticed, the last after {last:,} operations. "
        f"{len(beyond)} are beyond the labs. "
        f"Not noticed yet: {', '.join(f'`{name}`' for name in open_) or 'none'}.",
        "",
        "| trait | kernel | judge | found by | after operations |",
        "|---|---|---|---|---|",
    ]
    for told in found.values():
        traced = ", traced" if told["traced"] else ""
        rows.append(
            f"| `{told['trait']}` | {told['kernel']} | {told['judge']} | {told['kind']}{traced} "
            f"| {told['operations']:,} |"
        )
    rows += ["", "| beyond the labs | it would take |", "|---|---|"]
    rows += [f"| `{name}` | {why} |" for name, why in beyond.items()]
    return "\n".join(rows)


def planted() -> str:
    """What became of each fault of mutants.diff before a kernel of the lab."""
    return _found_or_missed("planted", "tests/lab_mutants.py")


def windows() -> str:
    """What became of each fault of mutants_hyperv.diff before a kernel of the lab."""
    return _found_or_missed("windows", "tests/windows_mutants.py")


def irqchip() -> str:
    """What became of each fault of mutants_irqchip.diff before the plain irqchip or this machine's kernel."""
    return _found_or_missed("irqchip", "tests/irqchip_mutants.py")


def _found_or_missed(sort: str, program: str) -> str:
    table = kept().get(sort)
    if not table:
        return f"No run is kept yet: `python {program}`."
    found = {told["what"]: told for told in table if told["found"]}
    missed = {told["what"]: told for told in table if told["what"] not in found}
    last = max(told["operations"] for told in found.values())
    rows = [
        f"{len(found)} of {len(found) + len(missed)} faults were found, the last after {last:,} operations.",
        "",
        "| trap | fault | kernel | found by | after operations |",
        "|---|---|---|---|---|",
    ]
    for told in [*found.values(), *missed.values()]:
        kind = f"{told['kind']}{', traced' if told['traced'] else ''}" if told["found"] else "nobody yet"
        rows.append(f"| {told['trap']} | {told['what']} | {told['kernel']} | {kind} | {told['operations']:,} |")
    return "\n".join(rows)


def _order(report: dict[str, Any]) -> tuple[list[int], str, str]:
    """Kernels by age, then by vendor and kind."""
    if is_vmx(report):
        version, rest = report["kernel"], "" if report["apicv"] else "without"
    else:
        host = report["host"]
        version, rest = (host["version"] or host["release"]).split("-")[0], report["only"] or ""
    return [int(part) for part in version.split(".") if part.isdigit()], report["vendor"], rest


def _of_what(report: dict[str, Any]) -> tuple[str, ...]:
    """What a run with a kernel of the lab replaces: one of the same generation, vendor, kind, traced or not."""
    return report["host"]["kernel"], report["vendor"], report["only"] or "", str(report["traced"])


def _of_which(report: dict[str, Any]) -> tuple[Any, ...]:
    """What a run of programs replaces: one of the same generation, APICv and sort of programs."""
    return report["modelled_as"], report["apicv"], any(" " in mode for mode in report["programs"])


def _of_run(report: dict[str, Any]) -> tuple[Any, ...]:
    """What a run with this machine's kernel replaces: one of the same operations."""
    return report["seed"], report["only"], report["traced"], str(report["ids"])


def main() -> None:
    """Keeps the reports that are named; those of the same sort that were kept before are replaced.

    Of runs with kernels of the lab, those that compared the same.
    """
    known = kept()
    names, ran_inside = [name for name in sys.argv[1:] if name != INSIDE], INSIDE in sys.argv[1:]
    read = [json.loads(Path(name).read_text()) for name in names]
    if not read:
        sys.exit("name the reports to keep")
    if ran_inside:
        again = {_of_what(one) for one in read}
        before = [one for one in known.get("inside", []) if _of_what(one) not in again]
        known["inside"], read = sorted([*before, *read], key=_order), []
    for one in read:
        if "beyond" in one:
            known["faults"] = one
        for sort in PLANTED:
            if sort in one:
                known[sort] = one[sort]
    read = [one for one in read if not {"beyond", *PLANTED} & set(one)]
    programs = [one for one in read if is_vmx(one)]
    if programs:
        again = {_of_which(one) for one in programs}
        before = [one for one in known.get("vmx", []) if _of_which(one) not in again]
        known["vmx"] = sorted([*before, *programs], key=_order)
    read = [one for one in read if not is_vmx(one)]
    labs = [one for one in read if "mutants" not in one and is_labs(one)]
    if labs:
        again = {_of_what(one) for one in labs}
        before = [one for one in known.get("kernels", []) if _of_what(one) not in again]
        known["kernels"] = sorted([*before, *labs], key=_order)
    reports = [one for one in read if "mutants" not in one and not is_labs(one)]
    for one in reports:
        if not one["agreed"]:
            sys.exit(f"seed {one['seed']} found a difference, which is to be dealt with before anything is kept")
    if reports:
        again = {_of_run(one) for one in reports}
        before = [one for one in known.get("runs", []) if _of_run(one) not in again]
        known["runs"] = sorted([*before, *reports], key=lambda one: one["began"])
    for one in read:
        if "mutants" in one:
            known["mutants"] = one
    KEPT.write_text(json.dumps(known, indent=1) + "\n")


if __name__ == "__main__":
    main()
