"""Interrupts between accept line and IRR, or IRR and injection line: where things act in another order than printed.

KVM prints kvm_apic_accept_irq before it sets IRR, and kvm_inj_virq after it has taken a vector out of IRR. A thread may
lose its CPU between the two, so lines of one vCPU's interrupts may stand in an order in which they did not act. Where
several orders are possible, the injected vector tells; where only one is, the model's choice is not touched.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastexit import layout as L
from fastexit import regs as R
from fastexit.trace.events import Event
from fastexit.vcpu import Vcpu

if TYPE_CHECKING:
    from fastexit.trace.guest import Guest

NOT_YET = float("inf")


class Arrival:
    """An interrupt on its way into IRR.

    Attributes:
        line: its accept line. by: the sender's next line, when IRR has it; NOT_YET as long as there is none.
    """

    __slots__ = ("by", "line")

    def __init__(self, line: int) -> None:
        self.line: int = line
        self.by: float = NOT_YET


Arriving = dict[int, tuple[Arrival, Arrival]]
"""The first and the last arrival of each vector that was not injected since."""


def vectored(event: Event) -> bool:
    """Whether an accept line is of an interrupt that waits in IRR."""
    return event.b & R.ICR_DM <= R.DM_LOWEST << R.ICR_DM_SHIFT


def irr_bit(v: Vcpu, vector: int) -> tuple[int, int]:
    """Where a vCPU's IRR has a vector: the word of the model's memory, and the bit in it."""
    return L.VEC + v.index * L.VEC_STRIDE + L.VEC_IRR + (vector >> 6), 1 << (vector & 63)


def not_pending(guest: Guest, events: list[Event]) -> list[tuple[int, int]]:
    """Those of the interrupts of accept lines whose bits in IRR are not set, each as `irr_bit`."""
    mem, vcpus = guest.machine.mem, {v.vcpu_id: v for v in guest.machine.vcpus}
    found = [irr_bit(vcpus[one.a], one.b & R.ICR_VECTOR) for one in events if one.a in vcpus and vectored(one)]
    return [(word, bit) for word, bit in found if not mem[word] & bit]


class Injections:
    """What goes into service on one vCPU, in the order of its kvm_inj_virq lines."""

    def __init__(self, guest: Guest, v: Vcpu, arriving: Arriving) -> None:
        self._guest = guest
        self._v = v
        self._mem = guest.machine.mem
        self._arriving = arriving
        self._twice: set[int] = set()  # injected while one more of the vector was on its way: may come again

    def inject(self, line: int, since: int, vector: int) -> None:
        """The vector that was injected; ``since`` is the thread's line before, until when it was in IRR."""
        v, arriving = self._v, self._arriving
        late: list[int] = []
        if len(arriving) > 1 and self._pending(vector):
            late = [w for w, (first, _) in arriving.items() if w > vector and first.by > since and self._pending(w)]
        elif vector in self._twice and not self._pending(vector):
            self._twice.discard(vector)
            self._guest.raise_irq(v.vcpu_id, vector)
        for other in late:
            word, bit = irr_bit(v, other)
            self._mem[word] &= ~bit
        v.ack()
        for other in late:
            self._guest.raise_irq(v.vcpu_id, other)
        self._injected(line, since, vector)

    def _injected(self, line: int, since: int, vector: int) -> None:
        """The vector's arrivals are done, but for those that may have come behind its injection."""
        waiting = self._arriving.pop(vector, None)
        if waiting is None or waiting[1].by <= since:
            return
        first, last = waiting
        if last.line > line:
            self._arriving[vector] = last, last
        elif first is not last:
            self._twice.add(vector)

    def _pending(self, vector: int) -> bool:
        word, bit = irr_bit(self._v, vector)
        return bool(self._mem[word] & bit)
