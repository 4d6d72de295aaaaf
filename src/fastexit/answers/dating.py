"""Which kernel recorded a trace, told from its columns and the lines that were kept: what trace.kernels knows."""

from __future__ import annotations

import re
from typing import NamedTuple

import numpy as np

from fastexit import regs as R
from fastexit.records.columns import Event, Recording, Rows
from fastexit.trace import events as E
from fastexit.trace.kernels import ICR_WRITES, Dating
from fastexit.trace.reader import Batch, Task
from fastexit.trace.report import Evidence

ORDERED_ROWS = 1 << 15
"""In so many rows the order of lines is looked at."""

_LINE = re.compile(rb"\][ \t]*(?:(?P<flags>[!-9;-Z\\^-~]{4,8})[ \t]+)?\d+\.\d+:[ \t]+(?P<body>.*)", re.DOTALL)
_BY_PLUGIN = "perf script", "trace-cmd report"
"""libtraceevent prints kvm_exit its own way, which was older kernels' too. An excerpt may not show who printed it."""
_KINDS = {
    Event.OTHER: E.Kind.OTHER,
    Event.MSI_SET_IRQ: E.Kind.SOURCE,
    Event.HV: E.Kind.HYPERV,
    Event.HV_TIMER: E.Kind.HV_TIMER,
    Event.HALT_POLL: E.Kind.VCPU,
    Event.SCHED_SWITCH: E.Kind.OTHER,
}
_BY_NAME = np.zeros(256, bool)
_BY_NAME[[Event.HV, Event.AVIC, Event.OTHER_KVM]] = True
_NAMES = {Event.EXIT: "kvm_exit"}


class Dated(NamedTuple):
    """The generations that may have recorded a trace, oldest first, and why. All of them where nothing tells, none
    where lines disagree.
    """

    kernels: tuple[str, ...]
    evidence: list[Evidence]


def date(recording: Recording) -> Dated:
    """Look at the texts, at the characters before the times, and at the order in which ICR writes leave theirs."""
    dated = _date(recording, by_plugin=recording.shape in _BY_PLUGIN)
    return dated if dated.kernels else _date(recording, by_plugin=True)


def _date(recording: Recording, *, by_plugin: bool) -> Dated:
    dating = Dating()
    for number, line in recording.samples:
        found = _LINE.search(line)
        if found is None:
            continue
        body = found["body"].removeprefix(b"kvm:")
        if not by_plugin or not body.startswith(b"kvm_exit"):
            dating.see_text(body, number)
        if found["flags"] and recording.shape == "ftrace text":
            dating.see_flags(found["flags"], number, by_kernel=True)
    _by_rows(recording, dating)
    return Dated(dating.kernels(), dating.evidence)


def _by_rows(recording: Recording, dating: Dating) -> None:
    """What no single text tells: names of rare events, long ICRs, and orders."""
    names = recording.names
    tasks = [Task(thread.pid, thread.tgid, thread.comm) for thread in recording.threads]
    seen: set[int] = set()
    left, icrs = ORDERED_ROWS, 0
    for rows in recording.blocks:
        events = np.ascontiguousarray(rows["event"])
        named = rows[np.flatnonzero(_BY_NAME[events])]
        named = named[named["name"] >= 0]
        for number, at in zip(*(found.tolist() for found in np.unique(named["name"], return_index=True)), strict=True):
            if number not in seen:
                seen.add(number)
                dating.see_text(names[number].encode() + b":", int(named["line"][at]))
        apic = np.flatnonzero(events == Event.APIC)
        apic = apic[(rows["a"][apic] == R.APIC_ICR) & (rows["c"][apic] == 1)]
        long = rows[apic[rows["b"][apic] >> 32 > 0]]
        if len(long):
            dating.see_text(b"kvm_apic: apic_write APIC_ICR = 0x%x" % int(long["b"][0]), int(long["line"][0]))
        if left > 0 and icrs < ICR_WRITES:
            some = rows[:left]
            left -= len(some)
            icrs += _order(some, names, tasks, dating)


def _order(rows: Rows, names: list[str], tasks: list[Task], dating: Dating) -> int:
    """Show the order of lines to ``dating``; the ICR writes among them."""
    icrs = 0
    columns = (rows[name].tolist() for name in ("event", "a", "b", "c", "d", "name", "line", "thread"))
    for event, a, b, c, d, name, line, thread in zip(*columns, strict=True):
        if thread < 0:
            continue
        kind, text = _KINDS.get(event, E.Kind.MARK), _NAMES.get(event, "")
        if event == Event.APIC:
            kind = E.Kind.APIC_WRITE if c else E.Kind.APIC_READ
        elif event == Event.APIC_IPI:
            kind = E.Kind.IPI
        elif event == Event.ACCEPT:
            kind, b = E.Kind.ACCEPT, b | c
        elif event == Event.MSR:
            kind, c = E.Kind.MSR_WRITE if c else E.Kind.MSR_READ, d
            icrs += a == R.MSR_X2APIC_ICR
        elif event == Event.OTHER_KVM and name >= 0:
            text = names[name]
        dating.see_order(Batch(line, [tasks[thread]], [E.Event(kind, text, a, b, c)]))
    return icrs
