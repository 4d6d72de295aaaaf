"""Reports as analyses give them, for tests of everything that comes out of one."""

from __future__ import annotations

from typing import Any

from fastexit.answers.report import (
    Clue,
    DoorRow,
    ExitRow,
    FastRow,
    FileReport,
    Finding,
    Halts,
    LatencyRow,
    MsrRow,
    Quantiles,
    Report,
    SentRow,
    SwitchRow,
    VcpuRow,
    VectorRow,
    VmReport,
)
from fastexit.profile import PROFILES

HOSTILE = "CPU 2/KVM\x1b[31m\x1b]0;owned\x07<script>alert(1)</script>\u202e\x9b2J&amp;"
"""A thread's name that a terminal or a browser would act on."""

REASONS = {"HLT": 0.42, "MSR_WRITE": 0.31, "EXTERNAL_INTERRUPT": 0.12, "EPT_MISCONFIG": 0.06, "IO_INSTRUCTION": 0.05}
REASONS |= {
    "PREEMPTION_TIMER": 0.02,
    "PAUSE_INSTRUCTION": 0.01,
    "CPUID": 0.006,
    "EPT_VIOLATION": 0.003,
    "VMCALL": 0.001,
}


def quantiles(count: int, median: float) -> Quantiles:
    """Durations with the long tail that exits have."""
    return Quantiles(count, median, 2.4 * median, 11 * median, 620 * median, 1.9 * median * count)


def exits(total: int, seconds: float) -> list[ExitRow]:
    counts = {reason: round(total * share) for reason, share in REASONS.items()}
    durations = {
        reason: quantiles(n, 48_000 if reason == "HLT" else 700 + 60 * len(reason)) for reason, n in counts.items()
    }
    whole = sum(q.total for q in durations.values())
    return [
        ExitRow(reason, n, n / sum(counts.values()), n / seconds, durations[reason], durations[reason].total / whole)
        for reason, n in counts.items()
    ]


def fast(icr_writes: int, deadlines: int) -> list[FastRow]:
    rows = []
    for i, kernel in enumerate(PROFILES):
        taken = icr_writes - (40 if i else 12)
        refusals = {"shorthand": 28 if i else 0, "delivery mode not Fixed": 12}
        each = (380.0 + 20 * i, 640.0 + 55 * i)
        rows.append(
            FastRow(
                kernel,
                "x2APIC ICR write",
                taken,
                icr_writes,
                {reason: n for reason, n in refusals.items() if n},
                each,
                (each[0] * taken, each[1] * taken),
                (each[0] * taken / 12.4, each[1] * taken / 12.4),
                (90.0, 120.0),
                {vcpu: (each[0] * taken / 4, each[1] * taken / 4) for vcpu in range(4)},
            )
        )
        timer = deadlines if i > 2 else 0
        refusals = {} if timer else {"this generation has no fast path for it": deadlines}
        rows.append(FastRow(kernel, "TSC_DEADLINE write", timer, deadlines, refusals))
    return rows


def vm(path: str = "guest.trace", number: int = 1, of: int = 4, **changes: Any) -> VmReport:
    """A VM of so many vCPUs, with something in every table."""
    seconds = 12.4
    rows = exits(52_000, seconds)
    by_reason = {row.reason: row.count // of for row in rows}
    names = [f"CPU {i}/KVM" if i != 2 else HOSTILE for i in range(of)]
    made = VmReport(
        path,
        number,
        clues={
            "vendor": Clue("vmx", "trace", "kvm_exit: reason MSR_WRITE", 3),
            "generation": Clue("6.1 to 6.5", "trace", "kvm_apic_accept_irq: apicid 1 vec 253 (Fixed|edge)", 9),
            "apicv": Clue("off", "assumed", "no kvm_apicv_accept_irq among 5,120 accepted interrupts"),
            "guest": Clue("Windows", "option"),
        },
        seconds=seconds,
        exits=rows,
        vcpus=[
            VcpuRow(
                i, name, sum(by_reason.values()), by_reason, quantiles(9_000, 1_500), [(0xFFFFFFFF810A1B2C - i, 5_200)]
            )
            for i, name in enumerate(names)
        ],
        by_second=[
            {reason: n // 13 + (7 * s + len(reason)) % 90 for reason, n in by_reason.items()} for s in range(13)
        ],
        msrs=[
            MsrRow(
                0x830,
                "x2APIC ICR",
                True,
                9_600,
                0.6,
                0,
                [(0x1_0000_00FD, 6_000), (0x2_0000_00FB, 3_000)],
                [("Fixed physical, unicast", 9_560), ("Fixed, all but self", 40)],
            ),
            MsrRow(0x6E0, "TSC_DEADLINE", True, 6_300, 0.394, 0),
            MsrRow(0xC0010015, "HWCR", False, 100, 0.006, 3, [(0x100_0000, 100)]),
        ],
        vectors=[
            VectorRow(0xFD, "RESCHEDULE", "IPI (x2APIC MSR)", 6_000, 12, 5_990, 0.55),
            VectorRow(0xEC, "LOCAL_TIMER", "timer", 4_800, 0, 4_800, 0.44),
            VectorRow(0x31, "", "IOAPIC gsi 4", 110, 0, 108, 0.01),
        ],
        sent=[SentRow(i, j, 900 // (1 + abs(i - j))) for i in range(of) for j in range(of) if i != j],
        doors=[
            DoorRow("IPI", "x2APIC MSR", 9_600),
            DoorRow("EOI", "x2APIC MSR", 10_900),
            DoorRow("timer", "MSR", 6_300),
        ],
        halts=Halts(21_840, 15_000, 6_800, quantiles(21_800, 48_000)),
        latency=[
            LatencyRow("exit to accept", quantiles(5_900, 310)),
            LatencyRow("accept to entry", quantiles(5_400, 2_100)),
            LatencyRow("entry to EOI", quantiles(5_300, 1_600)),
        ],
        fast=fast(9_600, 6_300),
        switches=[
            SwitchRow(
                "with IPI virtualization",
                {"x2APIC ICR write": 9_560},
                52_000,
                42_440,
                "the CPU itself posts unicast IPIs of a guest in x2APIC mode",
                (4.1e6, 9.8e6),
            )
        ],
        findings=[
            Finding(
                "stuck-vector",
                "problem",
                "vector 0xd1 of vCPU 2 was accepted 11 times without an EOI between",
                [512, 530, 544, 571],
                "look for the driver of GSI 4",
            ),
            Finding(
                "saved-by-kernel",
                "note",
                "6.12 would take 9,560 of 9,600 ICR writes fast and re-enter the guest at once",
            ),
        ],
    )
    for name, value in changes.items():
        setattr(made, name, value)
    return made


def file(path: str = "guest.trace", **changes: Any) -> FileReport:
    made = FileReport(
        path,
        "trace-cmd report",
        lines=160_115,
        events={"kvm_exit": 52_000, "kvm_entry": 52_000, "kvm_msr": 16_000, "sched_switch": 9_000},
        unreadable=3,
        unreadable_first=[(17, "what is this"), (90, HOSTILE)],
        lost=120,
        notes=["times of CPU 3 run backwards at line 901"],
    )
    for name, value in changes.items():
        setattr(made, name, value)
    return made


def report(*vms: VmReport, files: list[FileReport] | None = None, costs: str = "skylake-retpoline") -> Report:
    """One report of one file, or of the given VMs."""
    vms = vms or (vm(),)
    paths = list(dict.fromkeys(one.path for one in vms))
    return Report(files or [file(path) for path in paths], list(vms), costs=costs, seconds=0.31)


def table() -> FileReport:
    """What is read of a table that perf kvm stat printed."""
    rows = [
        {
            "label": "MSR_WRITE",
            "number": 2_000,
            "share": 0.6,
            "total": 2.16e6,
            "minimum": 410,
            "mean": 1_080,
            "maximum": 9e3,
        },
        {"label": "HLT", "number": 900, "share": 0.4, "total": -1, "minimum": -1, "mean": -1, "maximum": -1},
    ]
    return file(
        "stat.txt",
        shape="perf kvm stat",
        tables=[{"kind": "perf kvm stat", "title": "before", "line": 1, "rows": rows}],
    )
