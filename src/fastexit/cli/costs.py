"""``fastexit costs list | show | diff | template``: the tables of modelled time; each takes parsed arguments."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from typing import Any

from rich import box
from rich.table import Table

from fastexit.cli.commands import costs_option, print_json
from fastexit.costs.profile import STAGES, CostProfile, cost_profile, cost_profiles


def add(subparsers: Any, raw: Any) -> None:
    """Add the command to a parser's."""
    text = "Cost profiles: what each stage of an exit costs, and where the number comes from."
    costs = subparsers.add_parser("costs", help=text, description=text)
    steps = costs.add_subparsers(dest="step", required=True, metavar="STEP")

    def step(name: str, run: Any, text: str) -> argparse.ArgumentParser:
        sub: argparse.ArgumentParser = steps.add_parser(name, help=text, description=text, formatter_class=raw)
        sub.add_argument("--json", action="store_true", help="print JSON")
        sub.set_defaults(run=run)
        return sub

    step("list", list_costs, "The tables that come with fastexit.")
    show = step("show", show_costs, "One table: cycles and sources by stage.")
    show.add_argument("name", metavar="NAME|FILE", help="a cost profile or a TOML file")
    diff = step("diff", diff_costs, "The stages in which two tables differ.")
    diff.add_argument("old", metavar="A", help="a cost profile or a TOML file")
    diff.add_argument("new", metavar="B", help="another one")
    made = step(
        "template", template, "A TOML file to fill in, on standard output: every stage of a base, commented out."
    )
    made.add_argument("--base", metavar="NAME", default="skylake-retpoline", help="default: skylake-retpoline")


def list_costs(args: argparse.Namespace) -> int:
    """``fastexit costs list``."""
    tables = [cost_profile(name) for name in cost_profiles()]
    if args.json:
        print_json([{"name": table.name, "ghz": table.ghz, "description": table.description} for table in tables])
        return 0
    _print(
        "Cost profiles",
        ("profile", "GHz", "of"),
        ((table.name, f"{table.ghz:g}", table.description) for table in tables),
    )
    return 0


def show_costs(args: argparse.Namespace) -> int:
    """``fastexit costs show``."""
    table = costs_option(args.name)
    if args.json:
        print_json(
            {
                "name": table.name,
                "description": table.description,
                "ghz": {"value": table.ghz, "source": table.ghz_source},
                "stages": {
                    stage: {"cycles": cost.cycles, "source": cost.source, "what": STAGES[stage]}
                    for stage, cost in table.costs.items()
                },
            }
        )
        return 0
    _print(
        f"{table.name}: {table.description}; {table.ghz:g} GHz ({table.ghz_source})",
        ("stage", "cycles", "source"),
        ((stage, f"{table[stage]:,}", table.costs[stage].source) for stage in STAGES),
    )
    return 0


def diff_costs(args: argparse.Namespace) -> int:
    """``fastexit costs diff``; 0 whether they differ or not."""
    old, new = costs_option(args.old), costs_option(args.new)
    stages = [stage for stage in STAGES if old[stage] != new[stage]]
    if args.json:
        print_json(
            {
                "old": old.name,
                "new": new.name,
                "ghz": [old.ghz, new.ghz],
                "stages": {stage: [old[stage], new[stage]] for stage in stages},
            }
        )
        return 0
    _print(
        f"{old.name} ({old.ghz:g} GHz) and {new.name} ({new.ghz:g} GHz): {len(stages)} of {len(STAGES)} stages differ",
        ("stage", old.name, new.name, "change", f"source in {new.name}"),
        (
            (stage, f"{old[stage]:,}", f"{new[stage]:,}", f"{new[stage] - old[stage]:+,}", new.costs[stage].source)
            for stage in stages
        ),
        numbers=3,
    )
    return 0


def template(args: argparse.Namespace) -> int:
    """``fastexit costs template``: a file that CostProfile.load takes as it is."""
    base = cost_profile(args.base)
    text = _template(base)
    if args.json:
        print_json({"base": base.name, "toml": text})
    else:
        print(text, end="")
    return 0


def _template(base: CostProfile) -> str:
    lines = [
        f'base = "{base.name}"  # what is commented out is as there',
        'description = "say which machine, which mitigations"',
        f'# ghz = {{ value = {base.ghz:g}, source = "measured" }}',
        "",
    ]
    width = max(map(len, STAGES))
    lines += [
        f'# {stage:<{width}} = {{ cycles = {base[stage]}, source = "measured" }}  # {what}'
        for stage, what in STAGES.items()
    ]
    return "\n".join(lines) + "\n"


def _print(title: str, columns: tuple[str, ...], rows: Iterable[tuple[str, ...]], numbers: int = 1) -> None:
    """A table: words, ``numbers`` columns of numbers, words."""
    from fastexit.cli.show import console

    table = Table(title=title, box=box.SIMPLE_HEAVY)
    for i, column in enumerate(columns):
        table.add_column(column, justify="right" if 1 <= i <= numbers else "left", no_wrap=i <= numbers)
    for row in rows:
        table.add_row(*row)
    console().print(table)
