"""What switches APICv or AVIC off."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastexit.answers.findings.words import times
from fastexit.answers.inhibits import inhibit_name
from fastexit.answers.report import Finding, VmReport

if TYPE_CHECKING:
    from fastexit.answers.analyse import Analysis

_REASONS = {
    "DISABLED": (
        "the module was loaded without it, or the CPU has none",
        "kvm_intel's enable_apicv or kvm_amd's avic says whether it is wanted.",
    ),
    "HYPERV": (
        "the guest's SynIC has a SINT with automatic EOI",
        "Tell the guest that automatic EOI is deprecated: QEMU's hv-avic (hv-apicv), libvirt's <avic state='on'/>.",
    ),
    "ABSENT": ("the VM has no irqchip in the kernel", "Use kernel-irqchip=split or =on."),
    "BLOCKIRQ": ("user space debugs the guest with interrupts blocked", "Detach the debugger."),
    "PHYSICAL_ID_ALIASED": ("two vCPUs have one APIC id as far as xAPIC goes", "Give the guest x2APIC."),
    "APIC_ID_MODIFIED": ("the guest has changed its xAPIC id", "Give the guest x2APIC, where it cannot."),
    "APIC_BASE_MODIFIED": ("the guest has moved its APIC page", "It has to stay at 0xfee00000."),
    "NESTED": ("the guest runs a guest of its own (AVIC cannot serve L2)", "On AMD nothing but no nested guest helps."),
    "IRQWIN": ("KVM waits for an interrupt window, for an ExtINT of a PIC", "A guest that uses no PIC has none."),
    "PIT_REINJ": (
        "the PIT reinjects lost ticks",
        "Give the VM no PIT, or QEMU's -global kvm-pit.lost_tick_policy=discard (libvirt: <timer name='pit'"
        " tickpolicy='discard'/>).",
    ),
    "SEV": ("the guest is an SEV one", "None of KVM's kernels so far can do both."),
    "LOGICAL_ID_ALIASED": ("two vCPUs share a logical xAPIC id", "Give the guest x2APIC."),
    "PHYSICAL_ID_TOO_BIG": ("a vCPU's APIC id is beyond what AVIC's table holds", "Use fewer or lower APIC ids."),
    "X2APIC": ("the guest uses x2APIC, which AVIC of that kernel cannot", "x2AVIC came with 6.0, for Zen 4 and later."),
}  # fmt: skip
FLAPS = 100


def find(analysis: Analysis, report: VmReport) -> list[Finding]:
    """Inhibits that were set, by reason."""
    found = []
    clue = report.clues.get("generation")
    kernel = clue.value if clue is not None else ""
    vm = report.number
    numbers = sorted({number for of, number, on in analysis.inhibits.counts if of == vm and on and number >= 0})
    for number in numbers:
        name = inhibit_name(number, kernel)
        why, advice = _REASONS.get(name, ("a reason that is not known here", ""))
        on = analysis.inhibits.counts[vm, number, True]
        off = analysis.inhibits.counts[vm, number, False]
        stays = analysis.inhibits.standing.get(vm, 0) >> number & 1
        lines = [
            change.line for change in analysis.inhibits.changes.get(vm, []) if change.number == number and change.on
        ]
        how = "and stays off" if stays else f"and on again {times(off)}"
        severity = "note" if name == "DISABLED" or (not stays and on < FLAPS) else "warning"
        text = f"APICv is switched off by {name} {times(on)} {how}: {why}"
        if name == "DISABLED" and stays:
            text = f"this VM has no APICv or AVIC (inhibit {name}): {why}"
        found.append(Finding("apicv-inhibited", severity, text, lines[:3], advice))
    return found
