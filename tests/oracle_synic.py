"""The oracle's SynIC: its MSRs, SINTs that are raised and acknowledged, vectors that end by themselves.

Models: KVM_CAP_HYPERV_SYNIC, synic_set_msr, synic_get_msr, synic_set_irq, kvm_hv_synic_send_eoi,
kvm_hv_notify_acked_sint.
Sets stand for bitmaps, a list of four objects for the timers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import oracle_apic
from fastexit import hyperv as h
from fastexit import regs as r
from oracle_apic import Irq
from oracle_hvmsrs import SINT_MSRS
from oracle_stimer import Stimer

if TYPE_CHECKING:
    from oracle_hyperv import Machine

PAGE = 4096
ENOENT, EINVAL = 2, 22


class Vcpu(oracle_apic.Vcpu):
    """A vCPU with a SynIC and synthetic timers beside its APIC."""

    m: Machine

    def __init__(self, machine: Machine, apic_id: int, index: int) -> None:
        self.synic = 0
        self.scontrol = 0
        self.sversion = 1
        self.siefp = 0
        self.simp = 0
        self.sints = [h.HV_SINT_MASKED] * 16
        self.connected: set[int] = set()
        self.auto_eoi: set[int] = set()
        self.stimers = [Stimer(self, i) for i in range(4)]
        self.stimers_pending: set[int] = set()
        self.hyperv_exit: tuple[int, ...] | None = None
        super().__init__(machine, apic_id, index)

    def denies(self, feature: h.HvFeature) -> bool:
        """The guest's CPUID lacks what it asks for, and that counts."""
        return self.m.enforces and self.m.features & feature != feature

    def enable_synic(self, version: int = 1) -> None:
        """KVM_CAP_HYPERV_SYNIC and SYNIC2."""
        self.thread.leave()
        self.synic = version
        self.scontrol = 1
        if not self.m.auto_eoi_inhibits:
            self.m.inhibit(r.Inhibit.HYPERV, True)

    # --------------------------------------------------------------------------------------------------------- MSRs

    def read_synic(self, msr: int) -> int:
        if msr in SINT_MSRS:
            return self.sints[msr - h.MSR_HV_SINT0]
        return {
            h.MSR_HV_SCONTROL: self.scontrol,
            h.MSR_HV_SVERSION: self.sversion,
            h.MSR_HV_SIEFP: self.siefp,
            h.MSR_HV_SIMP: self.simp,
            h.MSR_HV_EOM: 0,
        }[msr]

    def write_synic(self, msr: int, value: int, *, host: bool) -> bool:
        if not self.synic and (not host or value):
            return False
        self.m.log(f"kvm_hv_synic_set_msr: vcpu_id {self.id} msr {msr:#x} data {value:#x} host {int(host)}")
        if msr in SINT_MSRS:
            return self._write_sint(msr - h.MSR_HV_SINT0, value, host=host)
        if msr == h.MSR_HV_EOM:
            for sint in range(16) if self.synic else ():
                self.acked(sint)
        elif msr == h.MSR_HV_SVERSION:
            if not host:
                return False
            self.sversion = value
        else:
            pages = msr in (h.MSR_HV_SIEFP, h.MSR_HV_SIMP)
            zeroed = pages and not host and self.synic == 1 and value & h.HV_PAGE_ENABLED
            if zeroed and not self.m.write(value // PAGE * PAGE, bytes(PAGE)):
                return False
            if msr == h.MSR_HV_SCONTROL:
                self.scontrol = value
            elif msr == h.MSR_HV_SIEFP:
                self.siefp = value
            else:
                self.simp = value
            if not host:
                self.hyperv_exit = (h.HvExit.SYNIC, msr, self.scontrol, self.siefp, self.simp)
                self.request("HV_EXIT")
        return True

    # -------------------------------------------------------------------------------------------------------- SINTs

    def _write_sint(self, sint: int, value: int, *, host: bool) -> bool:
        vector, masked = value & 0xFF, value & h.HV_SINT_MASKED
        if vector < 16 and not host and not masked:
            return False
        before = self.sints[sint] & 0xFF
        self.sints[sint] = value
        for changed in (before, vector):
            if changed >= 16:
                self._look_again_at(changed)
        self.request("SCAN_IOAPIC")
        return True

    def _look_again_at(self, vector: int) -> None:
        """One vector at a time: auto-EOI that moves to another vector is given up for a moment."""
        having = [one for one in self.sints if not one & h.HV_SINT_MASKED and one & 0xFF == vector]
        had = bool(self.auto_eoi)
        (self.connected.add if having else self.connected.discard)(vector)
        automatic = any(one & h.HV_SINT_AUTO_EOI for one in having)
        (self.auto_eoi.add if automatic else self.auto_eoi.discard)(vector)
        if self.m.auto_eoi_inhibits and had != bool(self.auto_eoi):
            self.m.inhibit(r.Inhibit.HYPERV, any(v.auto_eoi for v in self.m.vcpus))

    def raise_sint(self, sint: int) -> int:
        """Accepting APICs, or the error for which the SINT cannot be raised."""
        if sint > 15:
            return -EINVAL
        if self.sints[sint] & h.HV_SINT_MASKED:
            return -ENOENT
        vector = self.sints[sint] & 0xFF
        accepted = self.accept(Irq(vector, r.DM_FIXED, False, True, False, r.SH_SELF, 0))
        self.m.log(f"kvm_hv_synic_set_irq: vcpu_id {self.id} sint {sint} vector {vector} ret {accepted}")
        return accepted

    def acked(self, sint: int) -> None:
        """The guest has dealt with a SINT: what its timers could not say before is tried again."""
        self.m.log(f"kvm_hv_notify_acked_sint: vcpu_id {self.id} sint {sint}")
        for timer in self.stimers:
            if timer.stuck and timer.enabled and not timer.direct and timer.sint == sint:
                timer.mark()

    # ----------------------------------------------------------------------------------------------------- auto-EOI

    def ack(self) -> int | None:
        vector = self.pending()
        if vector is None or vector not in self.auto_eoi:
            return super().ack()
        self.irr.discard(vector)
        if not self.apicv:
            self.irr_pending = bool(self.irr)
        self._update_ppr()
        return vector

    def eoi(self) -> int | None:
        vector = super().eoi()
        if vector is not None and vector in self.connected:
            self.m.log(f"kvm_hv_synic_send_eoi: vcpu_id {self.id} vector {vector}")
            for sint, value in enumerate(self.sints):
                if not value & h.HV_SINT_MASKED and value & 0xFF == vector:
                    self.acked(sint)
        return vector

    # ------------------------------------------------------------------------------------------------------- timers

    def stimer_waits(self) -> bool:
        return bool(self.stimers_pending)

    def clocks(self) -> list[Any]:
        running = [(timer.hrtimer, timer.fire) for timer in self.stimers if timer.hrtimer is not None]
        return [*super().clocks(), *running]
