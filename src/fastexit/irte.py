"""Interrupt remapping: entries that post a device's interrupt to one vCPU, or leave it to KVM.

Models: an irqfd with its bypass producer as far as kvm_pi_update_irte goes, and the IOMMU that acts on the entry. Like
an IOMMU's, the entries are not part of the machine's memory: a restored machine has none, its user space makes them
anew. An entry keeps its vCPU until it is updated, as KVM updates it when routing changes, not when ids do.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from fastexit.jit.declare import load
from fastexit.layout import K_TARGETS, KVM, KVM_STRIDE, NONE
from fastexit.outcome import (
    CODE_ACCEPTED_SHIFT,
    CODE_EFFECTS_SHIFT,
    CODE_GP,
    CODE_HARDWARE,
    TARGETS_NOTIFY,
    Effect,
)

if TYPE_CHECKING:
    from fastexit.machine import Machine

_POSTED = CODE_HARDWARE | 1 << CODE_ACCEPTED_SHIFT
_NOTIFIED = _POSTED | Effect.NOTIFY << CODE_EFFECTS_SHIFT


class Irte(NamedTuple):
    """A remapping entry: the guest's message, and in posted mode the vCPU and vector (else None, and the message's)."""

    gsi: int
    address: int
    data: int
    vcpu: int | None
    vector: int


class RemappingTable:
    """One machine's entries by host interrupt number."""

    def __init__(self, machine: Machine) -> None:
        self._handle = machine.handle
        self._mem = machine.mem
        self._entries: dict[int, Irte] = {}

    def update(self, host_irq: int, gsi: int, address: int, data: int) -> Irte:
        """Posted mode if the message names exactly one vCPU by Fixed or LowestPrio, else remapped mode."""
        old = self._entries.get(host_irq)
        was_posted = int(old is not None and old.vcpu is not None)
        index = load("update_irte")(self._handle, host_irq, gsi, address, data, was_posted)
        if index == CODE_GP:
            raise ValueError(f"MSI address {address:#x}: bits 39:32 must be 0 with 32-bit ids (EINVAL)")
        entry = Irte(gsi, address, data, None if index == NONE else index, data & 0xFF)
        self._entries[host_irq] = entry
        return entry

    def interrupt(self, host_irq: int, row: int) -> int:
        """The device raises it: the outcome code of posting it, or of KVM's delivery; targets are in ``row``."""
        entry = self._entries.get(host_irq)
        if entry is None:
            raise ValueError(f"host interrupt {host_irq} has no remapping entry: pi_update_irte makes one")
        if entry.vcpu is None:
            return load("signal_msi")(self._handle, entry.address, entry.data, row)
        notify = load("hardware_post")(self._handle, entry.vcpu, entry.vector)
        self._mem[KVM + row * KVM_STRIDE + K_TARGETS] = TARGETS_NOTIFY | entry.vcpu if notify else 0
        return _NOTIFIED if notify else _POSTED
