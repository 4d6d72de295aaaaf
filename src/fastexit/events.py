"""What goes into a guest's CPU: the values of Vcpu.take().

An embedder's CPU gets them between two instructions, in the order in which they are told.
"""

from __future__ import annotations

from typing import NamedTuple

from fastexit import layout as L


class Interrupt(NamedTuple):
    """An interrupt of the local APIC: injected by the entry, or delivered by the virtual APIC. SDM vol. 3A 10.8."""

    vector: int


class ExtInt(NamedTuple):
    """An interrupt of the PIC, or of user space by KVM_INTERRUPT: the APIC has no part in it, and gets no EOI."""

    vector: int


class Nmi(NamedTuple):
    """An NMI. Until the guest's IRET, which sets ``Vcpu.nmi_masked`` to False, the next one waits."""


class Smi(NamedTuple):
    """A system management interrupt: the CPU enters SMM; Vcpu.rsm() is the way back."""


class Init(NamedTuple):
    """INIT: the CPU is reset, but for what INIT leaves alone. One that is no boot CPU waits for SIPI."""


class Sipi(NamedTuple):
    """A start-up IPI that the CPU waited for: real mode at ``vector`` times 0x1000."""

    vector: int


Event = Interrupt | ExtInt | Nmi | Smi | Init | Sipi

_BARE: dict[int, Event] = {L.WENT_IN_NMI: Nmi(), L.WENT_IN_SMI: Smi(), L.WENT_IN_INIT: Init()}
_VECTORED: dict[int, type[Interrupt | ExtInt | Sipi]] = {
    L.WENT_IN_INTERRUPT: Interrupt,
    L.WENT_IN_EXTINT: ExtInt,
    L.WENT_IN_SIPI: Sipi,
}


def decode(word: int) -> Event:
    """The event that a kernel names by its kind and vector."""
    kind, vector = word & ~L.WENT_IN_VECTOR, word & L.WENT_IN_VECTOR
    return _BARE[kind] if kind in _BARE else _VECTORED[kind](vector)
