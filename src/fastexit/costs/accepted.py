"""Who was asked to accept an interrupt while a handler ran, and what the host has to do for each of them.

The trace records name everybody, the sender's list of targets those for whom there is something to do.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from fastexit import layout as L
from fastexit.outcome import Effect

if TYPE_CHECKING:
    from fastexit.vcpu import Vcpu

IPI_EVENTS = (L.TP_APIC_IPI, L.TP_AVIC_INCOMPLETE_IPI)


class Before(NamedTuple):
    """What is read in front of a handler: records written, targets told, timers and EOIs of the vCPU that exits."""

    head: int
    told: int
    hv_deadline: int
    hrtimer: int
    ioapic_eois: int


def before(mem: memoryview, v: Vcpu) -> Before:
    """Read it."""
    own = v.own
    timers = mem[own + L.K_HV_DEADLINE], mem[own + L.K_HRTIMER]
    return Before(mem[L.H_TRACE_HEAD], len(v.targets), *timers, mem[own + L.K_IOAPIC_EOIS])


def records(mem: memoryview, words: np.ndarray, old: Before) -> list[tuple[int, int]]:
    """Event and first argument of the trace records since then."""
    first, last = old.head, min(mem[L.H_TRACE_HEAD], L.TRACE_CAPACITY)
    raw = words[L.TRACE + first * L.TRACE_STRIDE : L.TRACE + last * L.TRACE_STRIDE]
    return [(event & 0xFF, first) for event, first in raw.reshape(-1, L.TRACE_STRIDE)[:, :2].tolist()]


def accepting(v: Vcpu, written: list[tuple[int, int]], old: Before) -> list[tuple[int, Effect]]:
    """Index and effect of the vCPUs that __apic_accept_irq was called for, in order; of an incomplete IPI of AVIC, of
    those that it roused.
    """
    ids = v.machine._ids
    seen = [ids[vcpu_id] for event, vcpu_id in written if event == L.TP_ACCEPT_IRQ]
    seen = seen or [ids[vcpu_id] for event, vcpu_id in written if event == L.TP_APICV_ACCEPT_IRQ]
    told, found = list(v.targets[old.told :]), []
    for vcpu in seen:
        due = told and told[0].vcpu == vcpu
        found.append((vcpu, told.pop(0).effect if due else Effect.NONE))
    return found
