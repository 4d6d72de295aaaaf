"""What `fastexit report` found, as plain data: the JSON of schema fastexit.report/1 is these classes, field by field.

Times are in ns, -1 where the trace has no time; shares are 0 to 1; a field that the trace cannot tell is None. Whatever
prints a report reads these classes alone.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import pandas as pd

SCHEMA = "fastexit.report/1"
SEVERITIES = ("problem", "warning", "note")
"""What a finding may be: the guest suffers, it may well, worth knowing."""


@dataclass
class Quantiles:
    """Durations of one kind: how many, and how long."""

    count: int
    median: float
    p90: float
    p99: float
    maximum: float
    total: float


@dataclass
class Clue:
    """What the trace says of the host or the guest, and by which line; ``source`` is "trace", "option", "assumed"."""

    value: str
    source: str
    evidence: str = ""
    line: int = 0


@dataclass
class ExitRow:
    """Exits of one reason. ``time`` is exit to entry, None where entries were not recorded; ``nested`` of them were of
    a nested guest (L2).
    """

    reason: str
    count: int
    share: float
    per_second: float | None
    time: Quantiles | None
    time_share: float | None = None
    nested: int = 0


@dataclass
class VcpuRow:
    """One vCPU: ``thread`` as the trace names it; its exits by reason; ``rips`` are the guest addresses it exits at
    most often, with counts.
    """

    vcpu: int
    thread: str
    exits: int
    by_reason: dict[str, int]
    time: Quantiles | None
    rips: list[tuple[int, int]] = field(default_factory=list)


@dataclass
class MsrRow:
    """Reads or writes of one MSR; ``values`` are the most frequent ones with their counts, ``classes`` those of an ICR
    in words ("Fixed physical, unicast").
    """

    msr: int
    name: str
    write: bool
    count: int
    share: float
    faults: int
    values: list[tuple[int, int]] = field(default_factory=list)
    classes: list[tuple[str, int]] = field(default_factory=list)


@dataclass
class VectorRow:
    """Interrupts of one vector from one source: "IPI (x2APIC MSR)", "MSI gsi 24", "IOAPIC gsi 4", "timer", ...

    ``name`` is what Linux calls the vector, or the delivery mode where that is no vector's. ``eois`` are the vector's,
    whoever raised it.
    """

    vector: int
    name: str
    source: str
    accepted: int
    coalesced: int
    eois: int
    share: float


@dataclass
class SentRow:
    """Interrupts that the IPIs of one vCPU brought to another."""

    sender: int
    target: int
    interrupts: int


@dataclass
class DoorRow:
    """Accesses of one kind ("IPI", "EOI", "TPR", "timer") by one door ("x2APIC MSR", "xAPIC page", ...)."""

    doing: str
    door: str
    count: int


@dataclass
class LatencyRow:
    """From one line of an IPI to a later one: "exit to accept", "accept to entry", "exit to entry", "entry to EOI",
    "accept to EOI".
    """

    what: str
    time: Quantiles


@dataclass
class Halts:
    """HLT exits and what follows: ``waits`` and ``polls`` are kvm_vcpu_wakeup lines, ``asleep`` HLT to next entry."""

    hlts: int
    waits: int
    polls: int
    asleep: Quantiles | None


@dataclass
class FastRow:
    """What one generation does with exits of one class ("x2APIC ICR write", "TSC_DEADLINE write", "HLT", ...).

    ``refusals``: reason -> exits that are not taken fast. ``saved``: cycles a taken exit saves, least and most, None
    without costs or where a cost profile cannot tell; ``saved_total`` over all, ``saved_per_second`` over time,
    ``saved_by_vcpu`` is the total of each vCPU. ``sooner``: cycles by which an IPI leaves earlier.
    """

    kernel: str
    what: str
    fast: int
    total: int
    refusals: dict[str, int]
    saved: tuple[float, float] | None = None
    saved_total: tuple[float, float] | None = None
    saved_per_second: tuple[float, float] | None = None
    sooner: tuple[float, float] | None = None
    saved_by_vcpu: dict[int, tuple[float, float]] = field(default_factory=dict)


@dataclass
class SwitchRow:
    """What one switch of the host would change: "with IPI virtualization", "with posted interrupts", ...

    ``gone``: exits that would not be there, by reason or class. ``why``: in one sentence.
    """

    switch: str
    gone: dict[str, int]
    exits_before: int
    exits_after: int
    why: str
    saved_total: tuple[float, float] | None = None


@dataclass
class Finding:
    """Something to look at, in one sentence of words; ``kind`` is stable, for scripts; ``lines`` show it.

    ``severity`` is "problem" (the guest suffers), "warning" (it may well) or "note" (worth knowing).
    """

    kind: str
    severity: str
    text: str
    lines: list[int] = field(default_factory=list)
    advice: str = ""


@dataclass
class VmReport:
    """One VM of one trace, or what of a trace belongs to no VM (``number`` 0).

    ``clues``: vendor, generation, apicv, irqchip, nested, hv_timer, guest. ``by_second``: second from the first line ->
    exits by reason.
    """

    path: str
    number: int
    clues: dict[str, Clue] = field(default_factory=dict)
    seconds: float | None = None
    exits: list[ExitRow] = field(default_factory=list)
    vcpus: list[VcpuRow] = field(default_factory=list)
    by_second: list[dict[str, int]] = field(default_factory=list)
    msrs: list[MsrRow] = field(default_factory=list)
    vectors: list[VectorRow] = field(default_factory=list)
    sent: list[SentRow] = field(default_factory=list)
    doors: list[DoorRow] = field(default_factory=list)
    halts: Halts | None = None
    latency: list[LatencyRow] = field(default_factory=list)
    fast: list[FastRow] = field(default_factory=list)
    switches: list[SwitchRow] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)


@dataclass
class FileReport:
    """What was read of one file; ``refused`` is why nothing was. ``tables`` as another tool printed them."""

    path: str
    shape: str = ""
    clock: str = "ns"
    lines: int = 0
    events: dict[str, int] = field(default_factory=dict)
    unreadable: int = 0
    unreadable_first: list[tuple[int, str]] = field(default_factory=list)
    lost: int = 0
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    tables: list[dict[str, Any]] = field(default_factory=list)
    refused: str = ""


@dataclass
class Report:
    """Everything that was asked of one or many traces."""

    files: list[FileReport] = field(default_factory=list)
    vms: list[VmReport] = field(default_factory=list)
    costs: str = ""
    seconds: float = 0.0

    def as_dict(self) -> dict[str, Any]:
        """The documented JSON."""
        return {"schema": SCHEMA, **asdict(self)}

    def arrays(self) -> dict[str, npt.NDArray[np.void]]:
        """Every table as a structured array, by name: those of --csv, see docs/report-schema.md."""
        from fastexit.answers.frames import arrays

        return arrays(self)

    def frames(self) -> dict[str, pd.DataFrame]:
        """The same tables as pandas DataFrames; ModuleNotFoundError where pandas is missing."""
        from fastexit.answers.frames import frames

        return frames(self)

    def _repr_html_(self) -> str:
        """What a notebook shows."""
        from fastexit.answers.notebook import fragment

        return fragment(self)
