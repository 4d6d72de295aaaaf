"""What a handler has left behind: whom it reached, and what the host has to do for each of them.

The kernels say what an exit came to in one code; costs need it target by target. It is seen in the trace records and in
the vCPUs' rows, looked at on both sides of the handler.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from fastexit import layout as L
from fastexit import regs as R
from fastexit.outcome import Effect

if TYPE_CHECKING:
    from fastexit.vcpu import Vcpu

IPI_EVENTS = (L.TP_APIC_IPI, L.TP_AVIC_INCOMPLETE_IPI)


class Before(NamedTuple):
    """A machine as it was: records written, the vCPUs' rows, the timers of the vCPU that exits."""

    head: int
    rows: np.ndarray
    hv_deadline: int
    hrtimer: int


def before(mem: memoryview, words: np.ndarray, v: Vcpu) -> Before:
    """To be asked in front of the handler."""
    rows = words[L.HOT : L.HOT + mem[L.H_NVCPUS] * L.HOT_STRIDE].reshape(-1, L.HOT_STRIDE).copy()
    return Before(mem[L.H_TRACE_HEAD], rows, mem[v.own + L.K_HV_DEADLINE], mem[v.own + L.K_HRTIMER])


def records(mem: memoryview, words: np.ndarray, old: Before) -> list[tuple[int, int]]:
    """Event and first argument of the trace records since then."""
    first, last = old.head, min(mem[L.H_TRACE_HEAD], L.TRACE_CAPACITY)
    raw = words[L.TRACE + first * L.TRACE_STRIDE : L.TRACE + last * L.TRACE_STRIDE]
    return [(event & 0xFF, first) for event, first in raw.reshape(-1, L.TRACE_STRIDE)[:, :2].tolist()]


def targets(v: Vcpu, written: list[tuple[int, int]]) -> list[int]:
    """vCPU indices that __apic_accept_irq was called for; of an incomplete IPI of AVIC, those that it roused."""
    ids = v.machine._ids
    seen = [ids[vcpu_id] for event, vcpu_id in written if event == L.TP_ACCEPT_IRQ]
    return seen or [ids[vcpu_id] for event, vcpu_id in written if event == L.TP_APICV_ACCEPT_IRQ]


def effect(mem: memoryview, v: Vcpu, old: Before, target: int, posted: bool) -> Effect:
    """What the host has to do for one target, by what changed in its row; a doorbell, which changes nothing, by its
    having been ``posted``.
    """
    row = old.rows[target]
    in_guest = int(row[L.HOT_MODE]) == R.IN_GUEST_MODE
    if row[L.HOT_BLOCKED] and not mem[L.HOT + target * L.HOT_STRIDE + L.HOT_BLOCKED]:
        return Effect.WAKE
    if target == v.index or not in_guest:
        return Effect.NONE
    if mem[L.HOT + target * L.HOT_STRIDE + L.HOT_MODE] == R.EXITING_GUEST_MODE:
        return Effect.KICK
    if not int(row[L.HOT_FLAGS]) & L.FLAG_APICV:
        return Effect.NONE
    if mem[L.H_CONFIG] & L.CONFIG_SVM:
        theirs, mine = (mem[L.KVM + i * L.KVM_STRIDE + L.K_CPU] for i in (target, v.index))
        return Effect.DOORBELL if posted and theirs != mine else Effect.NONE
    on = mem[L.HOT + target * L.HOT_STRIDE + L.PID_CONTROL_WORD] & ~int(row[L.PID_CONTROL_WORD])
    return Effect.NOTIFY if on & R.PID_ON else Effect.NONE
