"""The tables of docs/cost-model.md: published figures against modelled ones, generations, constants and sources."""

from __future__ import annotations

from costpairs import IPIV_HOST, OFF, PAIRS, RETPOLINE, ipi

import fastexit as fx
from fastexit.costs.profile import STAGES, cost_profile
from fastexit.profile import PROFILES


def _value(value: float | None, unit: str) -> str:
    if value is None:
        return "?"
    return f"{value:.2f}" if unit == "us" else f"{value:,.0f}"


def pairs() -> str:
    """The table of published pairs, with a remark on each below it."""
    rows = [
        "| | published | modelled | difference, published | difference, modelled | modelled / published "
        "| calibrated on it |",
        "|---|---|---|---|---|---|---|",
    ]
    notes = []
    for n, pair in enumerate(PAIRS, 1):
        before, after = pair.modelled(False), pair.modelled(True)
        difference = after - before
        sides = "" if pair.before is None else f"{_value(pair.before, pair.unit)} -> {_value(pair.after, pair.unit)} "
        if difference:
            ratio = f"{difference / pair.difference:.2f}"
        else:
            assert pair.after is not None
            ratio = f"{after / pair.after:.2f} (after)"
        rows.append(
            f"| {n}. {pair.title} ({pair.profile}) | {sides}{pair.unit if sides else ''} "
            f"| {_value(before, pair.unit)} -> {_value(after, pair.unit)} {pair.unit} "
            f"| {_value(pair.difference, pair.unit)} | {_value(difference, pair.unit)} | {ratio} "
            f"| {pair.calibrates or 'nothing: a prediction'} |"
        )
        notes.append(f"{n}. {pair.source}. {pair.remark}")
    return "\n".join([*rows, "", *notes])


def generations() -> str:
    """Cycles of one unicast IPI for every generation, fast and generic."""
    columns = (
        (RETPOLINE, "vmx", True),
        (RETPOLINE, "vmx", False),
        (IPIV_HOST, "vmx", True),
        ("epyc", "svm", False),
    )
    names = [f"{costs}, {vendor}, {'APICv' if apicv else 'no APICv'}" for costs, vendor, apicv in columns]
    rows = ["| kernel | " + " | ".join(names) + " |", "|---|" + "---|" * len(names)]
    for kernel in PROFILES:
        cells = []
        for costs, vendor, apicv in columns:
            fast, slow = (ipi(kernel, costs, on, vendor=vendor, apicv=apicv) for on in (True, False))
            cells.append(f"{fast.cycles_ipi:,} / {slow.cycles_ipi:,}; {fast.cycles:,} / {slow.cycles:,}")
        rows.append(f"| {kernel} | " + " | ".join(cells) + " |")
    return "\n".join(rows)


def constants() -> str:
    """Every number of every profile; a number that a profile takes from its base is in the base's column only."""
    names = fx.cost_profiles()
    profiles = [cost_profile(name) for name in names]
    base = cost_profile(OFF)
    others = [profile for profile in profiles if profile is not base]
    rows = [
        f"| stage | what | {OFF} | " + " | ".join(p.name for p in others) + " |",
        "|---|---|---|" + "---|" * len(others),
        f"| GHz | | {base.ghz:g} | " + " | ".join(f"{p.ghz:g}" for p in others) + " |",
    ]
    for stage, text in STAGES.items():
        own = [f"{p[stage]:,}" if p.costs[stage] != base.costs[stage] else "" for p in others]
        rows.append(f"| `{stage}` | {text} | {base[stage]:,} | " + " | ".join(own) + " |")
    rows.append("")
    for profile in [base, *others]:
        rows += [f"**{profile.name}**: {profile.description}.", "", f"- GHz {profile.ghz:g}: {profile.ghz_source}"]
        rows += [
            f"- `{stage}` {cost.cycles:,}: {cost.source}"
            for stage, cost in profile.costs.items()
            if profile is base or cost != base.costs[stage]
        ]
        rows.append("")
    return "\n".join(rows).rstrip()
