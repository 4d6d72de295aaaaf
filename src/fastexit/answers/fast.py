"""What each kernel generation would take fast of a VM's exits, why not the rest, and what that is worth.

Counts come from the trace; whether an exit of their class is fast comes from the model, which is asked once for each
class and generation (questions.py).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from fastexit import regs as R
from fastexit.answers.facts import plain_reason
from fastexit.answers.ipis import Icr
from fastexit.answers.questions import Asked, Host, Question, reasons
from fastexit.answers.report import Clue, FastRow, VmReport
from fastexit.answers.savings import Cycles, saved
from fastexit.costs.profile import CostProfile
from fastexit.profile import profiles
from fastexit.records.columns import Table
from fastexit.trace.doors import Door
from fastexit.trace.report import NOT_RECORDED

ICR_WRITE = "ICR write"
DEADLINE = "TSC_DEADLINE write"
FAULTED = "the write ends in #GP"
OTHER_MSR = "other MSR write"
NO_HANDLER = "MSR has no fast handler"
_KEPT = 64
_WRITE = re.compile(r"msr_write ([0-9a-f]{1,8}) = 0x([0-9a-f]{1,16})$")


def host_of(clues: Mapping[str, Clue]) -> Host:
    """The host that a trace's clues tell; what they do not tell is as Machine has it by default."""

    def told(name: str) -> str:
        return clues[name].value if name in clues else ""

    vendor = "svm" if told("vendor") == "svm" else "vmx"
    return Host(
        vendor=vendor,
        apicv=told("apicv") not in ("", "off", "no"),
        hv_timer=told("hv_timer") not in ("off", "no"),
        irqchip="split" if told("irqchip") == "split" else "full",
    )


_MACHINES: dict[tuple[object, ...], Asked] = {}


def asked(kernel: str, host: Host, costs: CostProfile | None) -> Asked:
    """The machine of a generation and host; made once, for many VMs and files."""
    table = () if costs is None else (costs.name, *costs.values())
    if len(_MACHINES) >= _KEPT:
        _MACHINES.clear()
    key = kernel, host, table
    if key not in _MACHINES:
        _MACHINES[key] = Asked(kernel, host, costs)
    return _MACHINES[key]


def asked_of(icr: Icr) -> Question | str:
    """The question that an IPI is, or why none is needed."""
    if icr.faulted:
        return FAULTED
    self_ipi = icr.register == R.APIC_SELF_IPI
    return Question("ipi", icr.door, self_ipi, icr.icr, icr.broadcast, icr.targets, icr.nested)


def classes(
    icrs: Iterable[tuple[Icr, int]], deadlines: tuple[int, int], report: VmReport
) -> dict[str, Counter[Question | str]]:
    """Class of exits -> question, or a reason that needs none -> exits. ``deadlines``: by the guest, by its guests."""
    found: dict[str, Counter[Question | str]] = {ICR_WRITE: Counter(), DEADLINE: Counter()}
    for icr, n in icrs:
        if icr.door is not Door.ASSIST:
            found[ICR_WRITE][asked_of(icr)] += n
    for nested, n in enumerate(deadlines):
        if n:
            found[DEADLINE][Question("deadline", nested=bool(nested))] += n
    vendor = host_of(report.clues).vendor
    for row in report.exits:
        what = plain_reason(row.reason)
        if what not in reasons(vendor):
            continue
        counts: Counter[Question | str] = Counter()
        counts[Question(what, nested=True)] = row.nested
        own = row.count - row.nested
        if what == "HLT":
            # a wake-up line stands behind a HLT that waited, or for which the host polled
            asleep = min(report.halts.waits + report.halts.polls, own) if report.halts else 0
            counts[Question(what, pending=False)] = asleep
            counts[Question(what, pending=True if asleep else None)] = own - asleep
        else:
            counts[Question(what)] = own
        found[row.reason] = +counts
    written = sum(row.count for row in report.exits if plain_reason(row.reason) in ("MSR_WRITE", "MSR"))
    writes = sum(row.count for row in report.msrs if row.write)
    others = min(written, writes) - sum(found[ICR_WRITE].values()) - sum(deadlines)
    if others > 0:
        found[OTHER_MSR] = Counter({NO_HANDLER: others})
    return {what: counts for what, counts in found.items() if counts}


def of_tables(tables: Iterable[Table]) -> dict[str, Counter[Question | str]]:
    """The classes of a histogram of kvm_msr lines, as perf top prints one: counts by MSR and value, and no more."""
    found: dict[str, Counter[Question | str]] = {ICR_WRITE: Counter(), DEADLINE: Counter()}
    for table in tables:
        for row in table.rows:
            if (match := _WRITE.match(row.label)) is None or row.number <= 0:
                continue
            msr, value = int(match[1], 16), int(match[2], 16)
            if msr in (R.MSR_X2APIC_ICR, R.MSR_X2APIC_SELF_IPI):
                low = value & 0xFFFF_FFFF & ~(R.ICR_VECTOR | R.ICR_BUSY)
                wide = value >> 32 == R.X2APIC_BROADCAST and not low & R.ICR_SHORTHAND
                question = Question("ipi", Door.X2APIC, msr == R.MSR_X2APIC_SELF_IPI, low, wide, NOT_RECORDED)
                found[ICR_WRITE][question] += row.number
            elif msr == R.MSR_TSC_DEADLINE:
                found[DEADLINE][Question("deadline")] += row.number
    return {what: counts for what, counts in found.items() if counts}


def rows(
    counted: Mapping[str, Counter[Question | str]],
    host: Host,
    seconds: float | None,
    kernels: Sequence[str] | None = None,
    costs: CostProfile | None = None,
) -> list[FastRow]:
    """A row for each class and generation: ``kernels``, by default all."""
    found: list[FastRow] = []
    for kernel in profiles() if kernels is None else kernels:
        machine = asked(kernel, host, costs)
        for what, counts in counted.items():
            found.append(_row(machine, what, counts, seconds, costs))
    return found


def by_vcpu(found: Iterable[FastRow], sent: Mapping[int, Counter[Icr]], host: Host, costs: CostProfile) -> None:
    """Fill in what each vCPU saves: of ICR writes, whose sender the trace tells; ``sent`` are IPIs by vCPU."""
    counted = {vcpu: _questions(icrs) for vcpu, icrs in sent.items()}
    for row in found:
        if row.what != ICR_WRITE or not row.fast:
            continue
        machine = asked(row.kernel, host, costs)
        for vcpu, counts in counted.items():
            mine = _row(machine, ICR_WRITE, counts, None, costs)
            if mine.saved_total:
                row.saved_by_vcpu[vcpu] = mine.saved_total


def _questions(icrs: Counter[Icr]) -> Counter[Question | str]:
    counts: Counter[Question | str] = Counter()
    for icr, n in icrs.items():
        if icr.door is not Door.ASSIST:
            counts[asked_of(icr)] += n
    return counts


def _row(
    machine: Asked, what: str, counts: Counter[Question | str], seconds: float | None, costs: CostProfile | None
) -> FastRow:
    refusals: Counter[str] = Counter()
    fast = 0
    spared = sooner = Cycles(0.0, 0.0)
    for question, n in counts.items():
        if isinstance(question, str):
            refusals[question] += n
            continue
        answer = machine.answer(question)
        if answer.refusal:
            refusals[answer.refusal] += n
            continue
        fast += n
        if costs is not None:
            other = machine.answer(question, fastpath=False)
            spared = spared.plus(saved(costs, other.charges, answer.charges), n)
            sooner = sooner.plus(saved(costs, other.until_ipi, answer.until_ipi), n)
    row = FastRow(machine.kernel, what, fast, sum(counts.values()), dict(refusals.most_common()))
    if costs is not None and fast:
        row.saved, row.saved_total = spared.over(fast), spared
        row.saved_per_second = spared.over(seconds) if seconds else None
        row.sooner = sooner.over(fast) if what == ICR_WRITE else None
    return row
