"""By which door a guest reached its APIC: what a Windows guest may do in five ways, and a Linux one in three.

KVM's exits differ by door, and so does what its fast paths look at: WRMSR of x2APIC's ICR alone. A door is told by the
lines of an access itself (kvm_msr, kvm_mmio, kvm_hv_hypercall, kvm_pv_eoi), else by the kvm_exit line before it.
"""

from __future__ import annotations

from enum import StrEnum

from fastexit import hyperv as HV
from fastexit import regs as R


class Door(StrEnum):
    """A way to the APIC, by its name in reports."""

    X2APIC = "x2APIC MSR"
    """WRMSR 0x830, 0x80B, 0x808 ..."""
    SYNTHETIC = "synthetic MSR"
    """WRMSR 0x40000070 to 0x40000072: Hyper-V's EOI, ICR and TPR; SynIC and synthetic timers."""
    HYPERCALL = "hypercall"
    """HvCallSendSyntheticClusterIpi(Ex), by VMCALL or VMMCALL."""
    PAGE = "xAPIC page"
    """A load or store, which the emulator decodes, or APIC_ACCESS."""
    TRAP = "APIC_WRITE trap"
    """The CPU has done the write, APICv's exit comes behind it."""
    AVIC = "AVIC exit"
    """avic_incomplete_ipi and avic_unaccelerated_access."""
    ASSIST = "EOI assist"
    """No exit: a bit of the VP assist page, or of KVM's PV EOI."""
    INDUCED = "EOI_INDUCED"
    """The CPU has ended the interrupt, and the EOI-exit bitmap wants KVM to know."""
    CR8 = "CR8"
    UNTOLD = "x2APIC or synthetic MSR"
    """kvm_msr was not recorded, and the guest is a Windows."""


class Doing(StrEnum):
    """What an access is for, by its name in reports."""

    IPI = "IPI"
    EOI = "EOI"
    TPR = "TPR"
    TIMER = "timer"
    EOM = "EOM"
    """End of message: a SynIC slot is free again."""
    SINT = "SynIC set-up"
    ASSIST = "VP assist page"


DOING_OF_REGISTER = {R.APIC_TASKPRI: Doing.TPR, R.APIC_TMICT: Doing.TIMER}
"""Writes of these are counted by door; ICR and EOI are counted where their other lines are put together."""
REGISTER_OF_SYNTHETIC = {HV.MSR_HV_EOI: R.APIC_EOI, HV.MSR_HV_ICR: R.APIC_ICR, HV.MSR_HV_TPR: R.APIC_TASKPRI}
"""Synthetic MSR -> the register of the APIC page behind it."""

_EXITS = {"APIC_WRITE": Door.TRAP, "EOI_INDUCED": Door.INDUCED, "APIC_ACCESS": Door.PAGE}
_EXITS |= dict.fromkeys(("avic_incomplete_ipi", "avic_unaccelerated_access"), Door.AVIC)


def door_of_exit(reason: str) -> Door | None:
    """The door that an exit reason names by itself, whatever else was recorded.

    >>> door_of_exit("APIC_WRITE"), door_of_exit("MSR_WRITE")
    (<Door.TRAP: 'APIC_WRITE trap'>, None)
    """
    return _EXITS.get(reason)


def doing_of_synthetic(msr: int) -> Doing | None:
    """What a write of a synthetic MSR that is no APIC register is for, as far as it concerns interrupts."""
    if HV.MSR_HV_STIMER0_CONFIG <= msr <= HV.MSR_HV_STIMER3_COUNT:
        return Doing.TIMER
    if msr == HV.MSR_HV_EOM:
        return Doing.EOM
    if HV.MSR_HV_SCONTROL <= msr < HV.MSR_HV_EOM or HV.MSR_HV_SINT0 <= msr <= HV.MSR_HV_SINT15:
        return Doing.SINT
    return Doing.ASSIST if msr == HV.MSR_HV_VP_ASSIST_PAGE else None
