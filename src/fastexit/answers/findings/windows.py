"""Windows guests whose IPIs no kernel sends fast, and what to tell them instead.

docs/windows.md has the reasons: a Windows guest uses the doors that Hyper-V's CPUID leaves recommend.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from fastexit.answers.findings.words import listed
from fastexit.answers.report import Finding, VmReport
from fastexit.trace.doors import Doing, Door

if TYPE_CHECKING:
    from fastexit.answers.analyse import Analysis

_MSR = (
    "hv-vapic has Windows write MSRs 0x40000070 to 0x40000072, which always exit and never fast. With APICv or AVIC:"
    " QEMU hv-avic=on,hv-vapic=off (libvirt <avic state='on'/>, <vapic state='off'/>) with hv-synic, hv-stimer and"
    " hv-vpindex. Without them keep it, and add hv-ipi."
)
_CALL = (
    "hv-ipi (libvirt <ipi state='on'/>) has Windows send to many vCPUs by one hypercall, which is never fast. That is"
    " worth it without APICv; with APICv single IPIs are better off by hv-avic."
)
_PAGE = (
    "Give the guest x2APIC (QEMU -cpu ...,+x2apic; libvirt <feature policy='require' name='x2apic'/>), and see in a"
    " trace whether it takes it: MSR 0x830 is the only door with a fast path."
)
_ADVICE = {
    Door.SYNTHETIC: ("MSR 0x40000071 (hv-vapic)", _MSR),
    Door.UNTOLD: ("an MSR that was not recorded, most likely 0x40000071 (hv-vapic)", _MSR),
    Door.HYPERCALL: ("hypercall (hv-ipi)", _CALL),
    Door.PAGE: ("the xAPIC page", _PAGE),
    Door.TRAP: ("the xAPIC page, with APICv's exit behind it (APIC_WRITE)", _PAGE),
    Door.AVIC: ("the APIC, with AVIC's exit", ""),
}


def find(analysis: Analysis, report: VmReport) -> list[Finding]:
    """One finding for a Windows guest whose IPIs go by doors without a fast path."""
    if not analysis.windows(report.number):
        return []
    counts: Counter[Door] = Counter()
    whole = 0
    for row in report.doors:
        if row.doing == Doing.IPI.value:
            whole += row.count
            for door in _ADVICE:
                counts[door] += row.count * (door.value == row.door)
    never = +counts
    if not never:
        return []
    most = sorted(never, key=lambda door: (-never[door], door.value))
    said = [f"{never[door]:,} by {_ADVICE[door][0]}" for door in most]
    share = "none" if never.total() == whole else f"{whole - never.total():,}"
    clue = report.clues.get("guest")
    windows = analysis.exits.windows(report.number) or (clue is not None and clue.value.startswith("Windows"))
    who = "a Windows guest" if windows else "a guest that uses Hyper-V's interface, as Windows does"
    text = f"{who}: of its {whole:,} IPI{'s' * (whole != 1)} {share} can be sent fast by any kernel: {listed(said)}"
    lines = [analysis.ipis.first[report.number, door] for door in never if (report.number, door) in analysis.ipis.first]
    return [Finding("windows-ipis-never-fast", "note", text, sorted(lines)[:3], _ADVICE[most[0]][1])]
