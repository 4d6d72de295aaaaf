"""Exits that another kernel would take fast, once it is known what each of them does with them."""

from __future__ import annotations

from fastexit.answers.report import FastRow, Finding, VmReport
from fastexit.profile import profiles
from fastexit.releases import generation

LEAST = 0.01
"""Of all exits, or of all of their class where exits were not recorded."""


def find(report: VmReport) -> list[Finding]:
    """Compare the kernel of the trace with later ones that take more of a class fast; needs ``report.fast``.

    One finding for each class of exits. Nothing where the trace does not tell its kernel.
    """
    words = _generations(report)
    if not words:
        return []
    exits = sum(row.count for row in report.exits)
    by_class: dict[str, list[FastRow]] = {}
    for row in report.fast:
        by_class.setdefault(row.what, []).append(row)
    found = []
    for what, rows in by_class.items():
        here = [row for row in rows if row.kernel in words]
        if not here:
            continue
        now = max(here, key=lambda row: row.fast)
        newest = max(map(profiles().index, words))
        later = [row for row in rows if row.kernel in profiles() and profiles().index(row.kernel) > newest]
        best = max(later, key=lambda row: row.fast, default=now)  # the first of those that are alike
        more = best.fast - now.fast
        if more <= 0 or more < LEAST * (exits or now.total):
            continue
        if best.saved_total is not None and best.saved_total[0] < 0:
            continue  # it is fast, and by these costs it may not be worth it
        found.append(Finding("fast-elsewhere", "note", _said(report, what, now, best), [], _advice(now, best)))
    return found


def _generations(report: VmReport) -> set[str]:
    """The generations that the trace's kernel may be: those of "6.1 to 6.12", or that of a release."""
    clue = report.clues.get("generation")
    words = clue.value.split() if clue is not None else []
    if not words or words[0] == "unknown":
        return set()
    try:
        first, last = (profiles().index(generation(words[at]).name) for at in (0, -1))
    except ValueError:
        return set()
    return set(profiles()[first : last + 1])


def _said(report: VmReport, what: str, now: FastRow, best: FastRow) -> str:
    rate = f", {(best.fast - now.fast) / report.seconds:,.0f} a second" if report.seconds else ""
    saved = f" and save {best.saved_total[0]:,.0f} to {best.saved_total[1]:,.0f} cycles" if best.saved_total else ""
    return (
        f"{best.kernel} would take {best.fast:,} of {now.total:,} exits of class {what} fast{saved}; this kernel takes"
        f" {now.fast:,}: {best.fast - now.fast:,} more{rate}"
    )


def _advice(now: FastRow, best: FastRow) -> str:
    why = ", ".join(f"{reason} ({n:,})" for reason, n in sorted(now.refusals.items(), key=lambda pair: -pair[1])[:3])
    return f"Run the host on {best.kernel} or later." + (f" What refuses them here: {why}." if why else "")
