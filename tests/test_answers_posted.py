"""What people posted, and small traces that each show one trap: counted by hand and by grep."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

import pytest

from fastexit.answers.analyse import analyse
from fastexit.answers.report import VmReport
from fastexit.records import read

TRACES = Path(__file__).parent / "data" / "traces"
X2APIC, PAGE, SYNTHETIC = "x2APIC MSR", "xAPIC page", "synthetic MSR"
UNTOLD = "x2APIC or synthetic MSR"


class Told(NamedTuple):
    """Of one VM: exits with their time in us, interrupts, accesses, MSRs with reads and writes, senders, findings."""

    exits: dict[str, tuple[int, int | None]] = {}
    vectors: dict[tuple[int, str], int] = {}
    doors: dict[tuple[str, str], int] = {}
    msrs: dict[str, tuple[int, int]] = {}
    sent: dict[tuple[int, int], int] = {}
    findings: tuple[str, ...] = ()


def told(vm: VmReport) -> Told:
    msrs: dict[str, tuple[int, int]] = {}
    for row in vm.msrs:
        reads, writes = msrs.get(row.name, (0, 0))
        msrs[row.name] = (reads, writes + row.count) if row.write else (reads + row.count, writes)
    return Told(
        {row.reason: (row.count, int(row.time.total) // 1000 if row.time else None) for row in vm.exits},
        {(row.vector, row.source): row.accepted for row in vm.vectors},
        {(row.doing, row.door): row.count for row in vm.doors},
        msrs,
        {(row.sender, row.target): row.interrupts for row in vm.sent},
        tuple(finding.kind for finding in vm.findings),
    )


IDLE_HLT = Told(
    {"msr": (2, None), "vintr": (2, 1), "hlt": (1, 0)},
    {(176, f"IPI ({X2APIC})"): 2},
    {("IPI", X2APIC): 2, ("EOI", X2APIC): 2},
    {"X2APIC_ICR": (0, 2)},
    {(0, 0): 2},
    ("gap",),
)
WINDOWS = ("windows-ipis-never-fast",)
TICK = Told(vectors={(209, "IOAPIC gsi 0"): 2}, findings=("accepted-without-eoi",))
POSTED = {
    "public/s01-kvmwiki-tracing-xapic32": [
        Told({"apic_access": (1, 4), "io_instruction": (1, 5)}, doors={("EOI", PAGE): 1})
    ],
    "public/s02-amd-idlehlt-nothread": [IDLE_HLT],
    "public/s02b-amd-idlehlt-thread-restored": [IDLE_HLT],
    "public/s04-ftrace-tscdeadline": [Told(msrs={"TSC_DEADLINE": (0, 9)})],
    "public/s05-win2012-trace_pipe-wrapped": [TICK],
    "public/s05b-win2012-trace_pipe-unwrapped": [TICK],
    "public/s06-perfscript-ioapic-rustvmm": [
        Told(vectors={(236, "not told"): 3, (33, "IOAPIC gsi 4"): 2}, findings=("accepted-without-eoi",))
    ],
    "public/s07-kafl-windows-tracecmd": [Told({"EXTERNAL_INTERRUPT": (4, 4)}, findings=("spin",))],
    "public/s09-nested-win-credguard-perf-decoded": [
        Told(
            {"MSR_WRITE": (2, 5), "EPT_MISCONFIG": (1, 7), "VMRESUME": (1, 54)},
            {(129, "IOAPIC gsi 19"): 1},
            {("EOI", UNTOLD): 1},
        )
    ],
    "public/s11-nestedl1-ftrace-mmu": [
        Told(
            {
                "EXTERNAL_INTERRUPT": (3, 22),
                "CPUID": (1, None),
                "CR_ACCESS": (1, 10),
                "MSR_READ": (1, 1),
                "MSR_WRITE": (1, 194),
                "TRIPLE_FAULT": (1, None),
            },
            msrs={"EFER": (1, 1)},
            findings=("spin",),
        )
    ],
    "public/s12-windows-reinjected-ept": [Told({"EPT_VIOLATION": (2, 3)}, findings=("reinjected",))],
    "public/s16-perfprof-windows-apicwrite": [Told({"APIC_WRITE": (1, 11628)}, findings=("slow-exit",))],
    "public/s17-firecracker-perfscript": [
        Told(findings=("spin",)),
        Told({"EXTERNAL_INTERRUPT": (1, None)}, msrs={"TSC_DEADLINE": (0, 1)}, findings=("spin",)),
    ],
    "public/s19-hyperv-synic-seabios": [Told(doors={("SynIC set-up", SYNTHETIC): 2}, msrs={"HV_SIMP": (2, 2)})],
    "public/s20-rfc-hyperv-level-nothread-tracecmd": [
        Told({"PREEMPTION_TIMER": (1, None), "VMRESUME": (1, None)}, {(80, "MSI gsi 23"): 1, (96, "MSI"): 1})
    ],
    "public/s23-hostguest-merged-CPU-comm": [Told({"MSR_WRITE": (3, 1), "EXTERNAL_INTERRUPT": (1, None)})],
    "public/s24-amd-tracecmd-gp-loop": [
        Told(
            {"EXIT_MSR": (1, 3), "EXIT_EXCP_GP": (1, 7)},
            msrs={"PLATFORM_INFO": (1, 0)},
            findings=("exception-loop", "msr-fault"),
        )
    ],
    "public/s25-windows-hotplug-msr3a": [Told(msrs={"FEATURE_CONTROL": (4, 4)})],
    "public/s26-msr-hist-gp-nothread": [
        Told({"MSR_WRITE": (1, None)}, msrs={"HV_TSC_INVARIANT_CONTROL": (0, 1)}, findings=("msr-fault",))
    ],
    "derived/d1-cpu2-only": [Told(doors={("IPI", X2APIC): 2}, msrs={"X2APIC_ICR": (0, 2)})],
    "derived/d3-msi-then-ioapic": [
        Told(
            {"MSR_WRITE": (1, None)},
            {(40, "MSI gsi 24"): 1, (41, "MSI gsi 24"): 1, (33, "IOAPIC gsi 4"): 1, (176, f"IPI ({X2APIC})"): 1},
            {("IPI", X2APIC): 1, ("EOI", X2APIC): 1},
            {"X2APIC_EOI": (0, 1), "X2APIC_ICR": (0, 1)},
            {(0, 0): 1},
        )
    ],
    "derived/d5-hv-icr": [
        Told(
            {"MSR_WRITE": (2, 10)},
            {(47, f"IPI ({SYNTHETIC})"): 2},
            {("IPI", SYNTHETIC): 2},
            {"HV_ICR": (0, 2)},
            {(0, 1): 2},
            WINDOWS,
        )
    ],
    "derived/d5c-no-msr-lines": [
        Told(
            {"MSR_WRITE": (2, 10)},
            {(47, f"IPI ({UNTOLD})"): 2},
            {("IPI", UNTOLD): 2},
            sent={(0, 1): 2},
            findings=WINDOWS,
        )
    ],
    "derived/d6-hv-send-ipi-hypercall": [
        Told(
            {"VMCALL": (1, 5)},
            {(47, "IPI (hypercall)"): 1},
            {("IPI", "hypercall"): 1},
            sent={(0, 1): 1},
            findings=WINDOWS,
        )
    ],
    "derived/d7-apicv-apic_write-trap": [
        Told(
            {"APIC_WRITE": (1, 5)},
            {(209, "IPI (APIC_WRITE trap)"): 1},
            {("IPI", "APIC_WRITE trap"): 1},
            sent={(0, 1): 1},
            findings=WINDOWS,
        )
    ],
    "derived/d7b-avic-incomplete": [
        Told(
            {"avic_incomplete_ipi": (1, 5)},
            {(209, "IPI (AVIC exit)"): 1},
            {("IPI", "AVIC exit"): 1},
            sent={(0, 1): 1},
            findings=WINDOWS,
        )
    ],
    "derived/d8-host-with-one-unresolvable-vm": [
        IDLE_HLT,
        Told(doors={("IPI", X2APIC): 2}, msrs={"X2APIC_ICR": (0, 2)}),
    ],
    "derived/d13b-lost-indented": [IDLE_HLT._replace(findings=("lost-events", "gap"))],
    "derived/d16-intel-l2-icr": [
        Told(
            {"MSR_WRITE": (1, 5)},
            {(253, f"IPI ({X2APIC})"): 1},
            {("IPI", X2APIC): 1},
            {"X2APIC_ICR": (0, 1)},
            {(0, 1): 1},
        )
    ],
}


@pytest.mark.parametrize("name", POSTED)
def test_what_was_posted(name: str) -> None:
    assert [told(vm) for vm in analyse(read(TRACES / f"{name}.txt"))] == POSTED[name]


def test_nested_exits_of_what_was_posted() -> None:
    [vm] = analyse(read(TRACES / "public" / "s09-nested-win-credguard-perf-decoded.txt"))
    assert {row.reason: row.nested for row in vm.exits} == {"MSR_WRITE": 1, "EPT_MISCONFIG": 1, "VMRESUME": 0}


def test_where_a_vcpu_spins() -> None:
    [vm] = analyse(read(TRACES / "public" / "s07-kafl-windows-tracecmd.txt"))
    assert vm.vcpus[0].rips == [(0xFFFFF80135CCBA9B, 4)]
    assert "0xec 3 times and 0xfd once" in vm.findings[0].text
    one, two = analyse(read(TRACES / "public" / "s17-firecracker-perfscript.txt"))
    assert [row.rips[0] for row in one.vcpus] == [(0xFFFFFFFF815CF36E, 1), (0xFFFFFFFF81036706, 2)]
    assert [(row.vcpu, row.rips) for row in two.vcpus] == [(1, [(0xFFFFFFFF81036706, 1)])]


RECORDED = sorted(path.stem for path in (TRACES / "recorded").glob("*.txt"))


@pytest.mark.parametrize("name", RECORDED)
def test_what_tools_print_is_counted_as_grep_counts_it(name: str) -> None:
    """Each of these shows the same guest; a last line that head cut is not read."""
    path = TRACES / "recorded" / f"{name}.txt"
    text = path.read_text(errors="replace")
    vms = analyse(read(path))
    # kvm_msr's and kvm_apic_ipi's lines of one ICR write, whatever names the fields: 0x830 is 2096
    writes = len(re.findall(r"kvm_msr\b.*?(?:msr_write 830 =|ecx[=:] ?(?:830|2096|0x830)\b)", text))
    ipis = len(re.findall(r"\bkvm_apic_ipi[:(]", text))
    accepted = len(re.findall(r"\bkvm_apic_accept_irq[:(]", text))
    doors = sum(row.count for vm in vms for row in vm.doors if row.doing == "IPI")
    assert abs(doors - max(writes, ipis)) <= 1
    assert abs(sum(row.accepted for vm in vms for row in vm.vectors) - accepted) <= 1
    assert {row.door for vm in vms for row in vm.doors if row.doing == "IPI"} <= {X2APIC, PAGE, "not told"}
    assert {finding.kind for vm in vms for finding in vm.findings} <= {"apicv-inhibited"}
