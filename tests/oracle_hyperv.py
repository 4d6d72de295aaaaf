"""Hyper-V's part of the oracle: what a Windows guest finds beside its local APIC, and what user space sets of it.

Models: the gate and KVM_CAP_HYPERV_ENFORCE_CPUID, the synthetic MSRs from both sides, EOI, ICR and TPR by MSR, the
assist page and PV EOI, routes to a SINT. A bytearray stands for the guest's memory. SynIC is in oracle_synic.py, its
timers in oracle_stimer.py, hypercalls in oracle_hvcalls.py.

Not modelled: the reference TSC page's contents, crash MSRs, reenlightenment, eventfds, TLB flushes.
"""

from __future__ import annotations

from typing import Any

import oracle
import oracle_synic
from fastexit import hyperv as h
from fastexit import regs as r
from fastexit.reasons import KvmExit
from oracle_apic import Irq
from oracle_hvcalls import HypervLoop
from oracle_hvmsrs import APIC_MSRS, NEEDS, STIMER_MSRS, SYNIC_MSRS
from oracle_run import INSN_LEN, Result

PAGE = 4096
MOST_VPS = 4096


class Machine(oracle.Machine):
    """A VM whose guest may be told that it runs on Hyper-V."""

    vcpus: list[Vcpu]  # type: ignore[assignment]

    def __init__(self, *args: Any, hyperv: bool | str = True, hyperv_features: Any = h.ALL_FEATURES, **options: Any):
        self.hyperv = bool(hyperv)
        self.enforces = hyperv == "enforce"
        self.features = h.HvFeature(hyperv_features)
        self.memory = bytearray()
        self.os_id = 0
        self.hypercall_page = 0
        self.tsc_page = 0
        self.next_op: tuple[Any, ...] | None = None  # what a test means to do next
        self.routes: dict[int, tuple[int, int]] = {}
        super().__init__(*args, **options)
        at = self.at
        self.gated = self.generation >= at("5.15")
        self.xmm_input = self.generation >= at("5.15")
        self.checks_call_words = self.generation >= at("6.1")
        self.extended_calls = self.generation >= at("6.6")
        self.auto_eoi_inhibits = self.generation >= at("5.15")
        self.clears_pv_eoi_anyway = self.generation < at("5.15")

    def new_vcpu(self, apic_id: int) -> Vcpu:
        return Vcpu(self, apic_id, len(self.vcpus))

    def reference(self) -> int:
        """The partition's clock, in units of 100 ns."""
        return self.now // 100

    def takes_hypercalls(self) -> bool:
        """Whether VMCALL is Hyper-V's, and not KVM's own."""
        return self.os_id != 0 and (self.hyperv or not self.gated)

    # ------------------------------------------------------------------------------------------- the guest's memory

    def read(self, gpa: int, size: int) -> bytes | None:
        return bytes(self.memory[gpa : gpa + size]) if gpa + size <= len(self.memory) // PAGE * PAGE else None

    def write(self, gpa: int, data: bytes) -> bool:
        there = self.read(gpa, len(data)) is not None
        if there:
            self.memory[gpa : gpa + len(data)] = data
        return there

    # ------------------------------------------------------------------------------------------------- routes to SINTs

    def set_gsi_routing(self, routes: list[tuple[str, int, int, int]]) -> None:
        self.routes = {gsi: (vp, sint) for _, gsi, vp, sint in routes}

    def irq_line(self, gsi: int, level: int) -> int:
        """KVM_IRQ_LINE_STATUS: what the route says, or -1 where nobody is raised."""
        self.log(f"kvm_set_irq: gsi {gsi} level {level} source 0")
        if not level or gsi not in self.routes:
            return -1
        vp, sint = self.routes[gsi]
        vcpu = self.by_vp_index(vp)
        return -1 if vcpu is None or not vcpu.synic else max(vcpu.raise_sint(sint), -1)

    def by_vp_index(self, vp: int) -> Vcpu | None:
        """The vCPU that was created with this index if it still has it, else the first one that has it."""
        first = self.vcpus[vp : vp + 1]
        return next((v for v in [*first, *self.vcpus] if v.vp_index == vp), None)

    def log_done(self, status: int) -> None:
        if self.generation >= self.at("5.15"):
            self.log(f"kvm_hv_hypercall_done: result {status:#x}")

    def send_to_vps(self, vector: int, wanted: set[int] | None) -> None:
        irq = Irq(vector, r.DM_FIXED, False, False, False, r.SH_NONE, 0)
        for vcpu in self.vcpus:
            if wanted is None or vcpu.vp_index in wanted:
                vcpu.accept(irq)


class Vcpu(oracle_synic.Vcpu):
    """A vCPU with what Hyper-V puts beside its APIC."""

    m: Machine

    def __init__(self, machine: Machine, apic_id: int, index: int) -> None:
        self.vp_index = index
        self.assist_page = 0
        self.pv_eoi_offered = False
        self.hypercall_asked = False
        self.real_mode = self.real_mode_before_smm = False
        super().__init__(machine, apic_id, index)
        self.thread = HypervLoop(self)

    def _reset(self, *, init: bool) -> None:
        self.real_mode |= init
        self.pv_eoi_offered = False
        super()._reset(init=init)

    def enter_smm(self) -> None:
        self.real_mode_before_smm, self.real_mode = self.real_mode, True
        super().enter_smm()

    def rsm(self) -> None:
        super().rsm()
        self.real_mode = self.real_mode_before_smm

    # --------------------------------------------------------------------------------------------------------- MSRs

    def write_msr(self, msr: int, value: int, *, host: bool) -> bool:
        if msr == r.MSR_KVM_PV_EOI_EN and value & r.PV_EOI_ENABLED:
            if value & r.PV_EOI_RESERVED or self.m.read(value & ~1, 1) is None:
                return False
            self.pv_eoi_msr = value
            return True
        if msr not in NEEDS:
            return super().write_msr(msr, value, host=host)
        self.last_accepted = 0
        if not host and self._hidden(msr):
            return False
        if msr in APIC_MSRS:
            return self._write_apic(APIC_MSRS[msr], value)
        if msr in SYNIC_MSRS:
            return self.write_synic(msr, value, host=host)
        if msr in STIMER_MSRS:
            number, is_count = divmod(msr - h.MSR_HV_STIMER0_CONFIG, 2)
            timer = self.stimers[number]
            return (timer.set_count if is_count else timer.set_config)(value, host=host)
        if msr == h.MSR_HV_VP_ASSIST_PAGE:
            return self._write_assist_page(value)
        return self._write_partition(msr, value, host=host)

    def read_msr(self, msr: int, *, host: bool = True) -> int | None:
        if msr not in NEEDS:
            return super().read_msr(msr)
        if not host and self._hidden(msr):
            return None
        if msr == h.MSR_HV_ICR:
            high_at = r.APIC_ICR2 if self.m.icr_always_split else self._icr_high_at()
            return self.reg(r.APIC_ICR) | self.reg(high_at) << 32
        if msr in APIC_MSRS:
            return self._read_reg(APIC_MSRS[msr])
        if msr in SYNIC_MSRS:
            return self.read_synic(msr) if host or self.synic else None
        if msr in STIMER_MSRS:
            number, is_count = divmod(msr - h.MSR_HV_STIMER0_CONFIG, 2)
            return self.stimers[number].count if is_count else self.stimers[number].config
        return {
            h.MSR_HV_GUEST_OS_ID: self.m.os_id,
            h.MSR_HV_HYPERCALL: self.m.hypercall_page,
            h.MSR_HV_VP_INDEX: self.vp_index,
            h.MSR_HV_RESET: 0,
            h.MSR_HV_TIME_REF_COUNT: self.m.reference(),
            h.MSR_HV_REFERENCE_TSC: self.m.tsc_page,
            h.MSR_HV_TSC_FREQUENCY: self.m.tsc_khz * 1000,
            h.MSR_HV_APIC_FREQUENCY: 1_000_000_000 // self.m.bus_cycle_ns,
            h.MSR_HV_VP_ASSIST_PAGE: self.assist_page,
        }[msr]

    def _hidden(self, msr: int) -> bool:
        return (self.m.gated and not self.m.hyperv) or self.denies(NEEDS[msr])

    def _write_partition(self, msr: int, value: int, *, host: bool) -> bool:
        """MSRs of the whole VM, and the VP index."""
        m = self.m
        if msr == h.MSR_HV_GUEST_OS_ID:
            m.os_id = value
            if not value:
                m.hypercall_page &= ~h.HV_PAGE_ENABLED
        elif msr == h.MSR_HV_HYPERCALL:
            if not m.os_id:
                return True
            call = b"\x0f\x01\xd9\xc3" if m.svm else b"\x0f\x01\xc1\xc3"
            if value & h.HV_PAGE_ENABLED and not m.write(value // PAGE * PAGE, call):
                return False
            m.hypercall_page = value
        elif msr == h.MSR_HV_RESET:
            if value == 1:
                self.request("HV_RESET")
        elif msr == h.MSR_HV_REFERENCE_TSC:
            m.tsc_page = value
        elif not host:
            return False
        elif msr == h.MSR_HV_VP_INDEX:
            if value & 0xFFFF_FFFF >= MOST_VPS:
                return False
            self.vp_index = value & 0xFFFF_FFFF
        return True

    def _write_apic(self, offset: int, value: int) -> bool:
        """EOI, ICR and TPR, whatever mode the APIC is in: only the destination's place follows it."""
        if self.m.icr_always_split:
            if offset == r.APIC_ICR:
                self._write_reg(r.APIC_ICR2, value >> 32)
            elif value >> 32 and self.m.upper_halves_fault:
                return False
            return self._write_reg(offset, value & 0xFFFF_FFFF)
        if offset == r.APIC_ICR:
            return self._write_x2apic_icr(value)
        return not value >> 32 and self._write_reg(offset, value)

    def _write_assist_page(self, value: int) -> bool:
        """One state with KVM's own PV EOI: who writes last has it."""
        page = value // PAGE * PAGE
        if value & h.HV_PAGE_ENABLED:
            if not self.m.write(page, bytes(4)):
                return False
            self.pv_eoi_msr = page | r.PV_EOI_ENABLED
        else:
            self.pv_eoi_msr = 0
        self.assist_page = value
        return True

    # --------------------------------------------------------------------------------------------- PV EOI

    def offer_pv_eoi(self) -> None:
        cached = self.isr_cache
        if not self.pv_eoi_msr & r.PV_EOI_ENABLED or self.irr_pending or cached is None:
            return
        if cached not in self.ioapic_handled and self.m.write(self.pv_eoi_msr & ~1, b"\x01"):
            self.pv_eoi_offered = True

    def take_pv_eoi(self) -> None:
        if not self.pv_eoi_offered:
            return
        cell = self.pv_eoi_msr & ~1
        if not self.pv_eoi_msr & r.PV_EOI_ENABLED:
            self.pv_eoi_offered = False
            return
        byte = self.m.read(cell, 1)
        taken = byte is None or not byte[0] & 1
        if byte is not None:
            self.pv_eoi_offered = False
            if not taken or self.m.clears_pv_eoi_anyway:
                self.m.write(cell, b"\x00")
        if taken:
            vector = self.eoi()
            self.m.log(f"kvm_pv_eoi: apicid {self.id:x} vector {-1 if vector is None else vector}")

    # -------------------------------------------------------------------------------------------------- the run loop

    def hyperv_requests(self) -> KvmExit | None:
        if "HV_RESET" in self.requests:
            self.requests.discard("HV_RESET")
            return KvmExit.SYSTEM_EVENT
        if "HV_EXIT" in self.requests:
            self.requests.discard("HV_EXIT")
            return KvmExit.HYPERV
        if "HV_STIMER" in self.requests:
            self.requests.discard("HV_STIMER")
            for timer in self.stimers:
                if timer.index in self.stimers_pending:
                    self.stimers_pending.discard(timer.index)
                    timer.serve()
        return None

    def hv_hypercall(
        self, control: int, input: int = 0, output: int = 0, xmm: tuple[int, ...] = ()
    ) -> tuple[Result, int | None]:
        self.thread.exit()
        return self.thread.hv_hypercall(control, input, output, xmm)

    def complete_hypercall(self, status: int) -> int:
        """User space has the result; the next KVM_RUN hands it to the guest."""
        self.hypercall_asked = False
        self.m.log_done(status)
        self.thread.skip(INSN_LEN["vmcall"])
        return status
