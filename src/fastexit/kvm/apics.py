"""What somebody's own local APICs have to have to be compared with the model, and what of it they have.

Models: nothing. `Apics` is Oracle's face as far as an APIC goes; whatever is missing of it is not drawn.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

OF_VCPUS = (
    *("wrmsr", "rdmsr", "mmio_write", "mmio_read", "set_msr", "get_msr", "get_lapic", "set_lapic", "pending", "ack"),
    *("lowest", "get_mp_state", "set_mp_state", "events", "set_events", "set_sregs", "cr8", "cs", "ready", "is_flat"),
    *("interrupt", "halt", "take", "run_through", "complete_msr", "tsc_khz"),
)
OF_MACHINES = (
    *("signal_msi", "set_time", "lowest", "add_vcpu", "enable_x2apic_api", "boot_x2apic", "set_msr_filter", "route"),
    *("wait", "irq_line", "get_irqchip"),
)
DOERS = ("wrmsr", "set_msr", "mmio_write")
"""Without one of these nothing can be done to an APIC."""


class ApicFailed(OSError):
    """An own APIC broke the rules of the conversation: it died, hung, or answered what is no answer."""


class ApicVcpu(Protocol):
    """A vCPU of `Apics`. Any method may be missing but one of wrmsr, set_msr and mmio_write.

    A #GP is `fastexit.GeneralProtection`, "#GP" returned, an Outcome whose ``fault`` says so, or, of set_msr and
    get_msr, False and None.
    """

    def wrmsr(self, msr: int, value: int) -> object:
        """A guest's WRMSR of IA32_APICBASE or of an x2APIC register; what it returns counts only if it is a #GP."""

    def rdmsr(self, msr: int) -> int:
        """A guest's RDMSR."""
        ...

    def mmio_write(self, offset: int, value: int, length: int = 4) -> object:
        """A guest's store to its xAPIC page."""

    def mmio_read(self, offset: int, length: int = 4) -> int:
        """A guest's load from its xAPIC page."""
        ...

    def set_msr(self, msr: int, value: int) -> bool:
        """The same by the VMM: KVM_SET_MSRS."""
        ...

    def get_msr(self, msr: int) -> int | None:
        """KVM_GET_MSRS."""
        ...

    def get_lapic(self) -> bytes:
        """The register page, 1,024 bytes, each register the first dword of its 16 bytes: KVM_GET_LAPIC."""
        ...

    def set_lapic(self, data: bytes) -> object:
        """The whole page set: KVM_SET_LAPIC."""

    def pending(self) -> int | None:
        """The vector that an interrupt would have now, the highest in IRR above PPR, or None."""
        ...

    def ack(self) -> int | None:
        """The CPU takes it: out of IRR, into ISR. Its vector, or None."""
        ...

    def take(self) -> str | None:
        """What the CPU takes next that is no interrupt of its APIC: "nmi", "smi", "init", "sipi 0x12", or None.

        INIT resets the APIC then, not before, and a vCPU that is not the BSP waits for SIPI. Handlers are over at once.
        """
        ...


class Apics(Protocol):
    """A machine of somebody's own APICs, as `verify` wants it from a class or any other callable.

    That is called with ``apic_ids=[0, 1, 300]`` and what else is not as usual, by Oracle's names: irqchip="split",
    x2apic_api=3, disable_quirks=..., so it may be ``def __init__(self, apic_ids, **settings)``. A machine is as after
    reset: xAPIC mode, SVR 0xFF, every LVT entry masked; the vCPU with id 0 is the BSP, and all of them run.

    ``lowest = True`` of the machine says that it arbitrates lowest priority as KVM does.
    """

    vcpus: Sequence[Any]
    """`ApicVcpu`, in the order of apic_ids."""

    def signal_msi(self, address: int, data: int) -> int | None:
        """A message: how many APICs accepted it, 0 or less if there are none; None is compared with nothing."""
        ...

    def set_time(self, ns: int) -> object:
        """The clock goes on to ``ns`` since the machine was made; the APIC timer counts one each ns at divisor 1."""


def face(machine: Any) -> frozenset[str]:
    """What of all that a machine has: names of `Apics` and of its vCPUs, and of Oracle's beyond them.

    TypeError for what has no vCPUs or nothing that can be done to them.
    """
    said = getattr(machine, "operations", None)
    if isinstance(said, frozenset):
        return said
    vcpus = getattr(machine, "vcpus", None)
    if not vcpus:
        raise TypeError(f"{type(machine).__name__} has no vcpus: what verify compares has fx.kvm.Apics' face")
    kind, of_vcpu = type(machine), type(vcpus[0])
    names = {name for name in OF_VCPUS if hasattr(of_vcpu, name)} | {n for n in OF_MACHINES if hasattr(kind, n)}
    if not names.intersection(DOERS):
        raise TypeError(f"{of_vcpu.__name__} has none of {', '.join(DOERS)}: nothing can be done to it")
    return frozenset(names) if getattr(machine, "lowest", False) else frozenset(names - {"lowest"})
