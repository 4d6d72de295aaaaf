"""vCPUs that exit at one address again and again and get no further."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastexit.answers.findings.words import duration, listed, times
from fastexit.answers.follow import words as F
from fastexit.answers.report import Finding, VmReport

if TYPE_CHECKING:
    from fastexit.answers.analyse import Analysis

LEAST = 2
"""Exits in a row at one address that are told in an excerpt of up to EXCERPT exits, if they are half of them."""
EXCERPT = 64
RUN = 32
"""... and in any trace."""
LONG = 1_000_000_000
MANY = 256


def find(analysis: Analysis, report: VmReport) -> list[Finding]:
    """Exits that end no instruction (the host's interrupts, PAUSE, ...) in a row at one address."""
    found = []
    for lane, row in analysis.lanes(report.number):
        run = row[int(F.L_SPIN)]
        if run < LEAST:
            continue
        place = row[int(F.L_PLACE)]
        seen = analysis.exits.seen(place)
        if run < RUN and (seen > EXCERPT or 2 * run < seen):
            continue
        ns = row[int(F.L_SPIN_NS)]
        took = f" over {duration(ns)}" if 0 < ns < int(F.NONE) and not analysis.span.ticks else ""
        hosts = analysis.exits.host_vectors(place)[:3]
        cause = f"; the host's vectors are {listed(f'0x{v:x} {times(n)}' for v, n in hosts)}" if hosts else ""
        long = run >= MANY or (took and ns >= LONG and run >= RUN)
        found.append(
            Finding(
                "spin",
                "warning" if long else "note",
                f"{analysis.vcpu_of_lane(lane)} is at 0x{row[int(F.L_SPIN_RIP)]:x} in {run:,} looks in a"
                f" row{took}{cause}",
                [row[int(F.L_SPIN_LINE)]],
                "Only the host's interrupts and the like bring it out, and it is found at the same instruction: the"
                " guest spins there, or idles without an exit (QEMU's cpu-pm=on, MWAIT). See what lies at that address"
                " (crash, gdb, WinDbg), and whether an interrupt that it waits for was accepted.",
            )
        )
    return found
