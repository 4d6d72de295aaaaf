"""Eventfds of Hyper-V's connections: which SIGNAL_EVENT hypercalls need no user space.

Models: KVM_HYPERV_EVENTFD. They are user space's and in no snapshot.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastexit import layout as L
from fastexit.checks import integer

if TYPE_CHECKING:
    from fastexit.machine import Machine

CONNECTION = 0xFF_FFFF
"""KVM_HYPERV_CONN_ID_MASK."""


class Connection:
    """One connection's eventfd: ``take()`` as read(2) does, ``close()`` as KVM_HYPERV_EVENTFD_DEASSIGN."""

    def __init__(self, machine: Machine, number: int) -> None:
        self.machine = machine
        self.number = number

    def __repr__(self) -> str:
        return f"<connection {self.number:#x}>"

    def take(self) -> int:
        """How often the guest has signalled it since the last time; 0 where a read would block. No guest may run."""
        mem = self.machine.mem
        at = self._place() + L.HV_EVENTFD_SIGNALS
        signals, mem[at] = mem[at], 0
        return signals

    def close(self) -> None:
        """Let KVM forget it; ValueError where it has already (ENOENT). No guest may run meanwhile."""
        mem, at = self.machine.mem, self._place()
        end = L.H_HV_EVENTFD + mem[L.H_HV_EVENTFDS] * L.HV_EVENTFD_STRIDE
        kept = mem[at + L.HV_EVENTFD_STRIDE : end].tolist()
        for i, word in enumerate(kept):
            mem[at + i] = word
        mem[L.H_HV_EVENTFDS] -= 1

    def _place(self) -> int:
        places = assigned(self.machine)
        if self.number not in places:
            raise ValueError(f"connection {self.number:#x} has no eventfd (ENOENT)")
        return places[self.number]


def assigned(machine: Machine) -> dict[int, int]:
    """Connection -> word index of its entry."""
    mem, first = machine.mem, L.H_HV_EVENTFD
    return {mem[at]: at for at in range(first, first + mem[L.H_HV_EVENTFDS] * L.HV_EVENTFD_STRIDE, L.HV_EVENTFD_STRIDE)}


def assign(machine: Machine, number: int) -> Connection:
    """KVM_HYPERV_EVENTFD; ValueError where KVM refuses it."""
    number = integer(number, "connection", CONNECTION)
    mem = machine.mem
    if not mem[L.H_CONFIG] & L.CONFIG_KVM_HYPERV:
        raise ValueError("the kernel has no CONFIG_KVM_HYPERV (kvm_hyperv=False; ENOTTY)")
    if number in assigned(machine):
        raise ValueError(f"connection {number:#x} has an eventfd already (EEXIST)")
    n = mem[L.H_HV_EVENTFDS]
    if n == L.HV_EVENTFDS:
        raise ValueError(f"a machine has room for {L.HV_EVENTFDS} connections with an eventfd")
    at = L.H_HV_EVENTFD + n * L.HV_EVENTFD_STRIDE
    mem[at], mem[at + L.HV_EVENTFD_SIGNALS] = number, 0
    mem[L.H_HV_EVENTFDS] = n + 1
    return Connection(machine, number)
