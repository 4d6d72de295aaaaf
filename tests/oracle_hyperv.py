"""Hyper-V's part of the oracle: what a Windows guest finds beside its local APIC, and what user space sets of it.

Models: the gate and KVM_CAP_HYPERV_ENFORCE_CPUID, the synthetic MSRs from both sides, EOI, ICR and TPR by MSR, the
assist page and PV EOI, SynIC with its bitmaps, auto-EOI, timer messages and EOM, synthetic timers, routes to a SINT,
the IPI hypercalls. Sets stand for bitmaps, a list of four objects for the timers, a bytearray for the guest's memory.

Not modelled: the reference TSC page's contents, crash MSRs, reenlightenment, eventfds, TLB flushes.
"""

from __future__ import annotations

from typing import Any

import oracle
import oracle_apic
from fastexit import hyperv as h
from fastexit import regs as r
from fastexit.reasons import KvmExit
from oracle_apic import Irq
from oracle_run import INSN_LEN, Result, RunLoop

PAGE = 4096
ENOENT, EAGAIN, EFAULT, EINVAL = 2, 11, 14, 22
UD = 6
U64 = (1 << 64) - 1

SINT_MSRS = range(h.MSR_HV_SINT0, h.MSR_HV_SINT15 + 1)
STIMER_MSRS = range(h.MSR_HV_STIMER0_CONFIG, h.MSR_HV_STIMER3_COUNT + 1)
SYNIC_MSRS = {h.MSR_HV_SCONTROL, h.MSR_HV_SVERSION, h.MSR_HV_SIEFP, h.MSR_HV_SIMP, h.MSR_HV_EOM, *SINT_MSRS}
APIC_MSRS = {
    h.MSR_HV_EOI: r.APIC_EOI,
    h.MSR_HV_ICR: r.APIC_ICR,
    h.MSR_HV_TPR: r.APIC_TASKPRI,
}
NEEDS = {
    h.MSR_HV_GUEST_OS_ID: h.HvFeature.HYPERCALL,
    h.MSR_HV_HYPERCALL: h.HvFeature.HYPERCALL,
    h.MSR_HV_VP_INDEX: h.HvFeature.VP_INDEX,
    h.MSR_HV_RESET: h.HvFeature.RESET,
    h.MSR_HV_TIME_REF_COUNT: h.HvFeature.TIME_REF_COUNT,
    h.MSR_HV_REFERENCE_TSC: h.HvFeature.REFERENCE_TSC,
    h.MSR_HV_TSC_FREQUENCY: h.HvFeature.FREQUENCIES,
    h.MSR_HV_APIC_FREQUENCY: h.HvFeature.FREQUENCIES,
    h.MSR_HV_VP_ASSIST_PAGE: h.HvFeature.APIC_ACCESS,
    **dict.fromkeys(APIC_MSRS, h.HvFeature.APIC_ACCESS),
    **dict.fromkeys(SYNIC_MSRS, h.HvFeature.SYNIC),
    **dict.fromkeys(STIMER_MSRS, h.HvFeature.STIMER),
}
"""The MSRs of this model, and which bit of the guest's CPUID each needs where CPUID is enforced."""

CALL_NEEDS = {
    h.HvCall.NOTIFY_LONG_SPIN_WAIT: h.HvFeature.SPIN_WAIT,
    h.HvCall.SEND_IPI: h.HvFeature.CLUSTER_IPI,
    h.HvCall.SEND_IPI_EX: h.HvFeature.CLUSTER_IPI | h.HvFeature.EX_PROCESSOR_MASKS,
    h.HvCall.POST_MESSAGE: h.HvFeature.POST_MESSAGES,
    h.HvCall.SIGNAL_EVENT: h.HvFeature.SIGNAL_EVENTS,
}
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


class Stimer:
    """One of a vCPU's four synthetic timers."""

    def __init__(self, vcpu: Vcpu, index: int) -> None:
        self.v = vcpu
        self.index = index
        self.config = 0
        self.count = 0
        self.expires = 0
        self.hrtimer: int | None = None
        self.stuck = False

    @property
    def enabled(self) -> bool:
        return bool(self.config & h.HV_STIMER_ENABLED)

    @property
    def periodic(self) -> bool:
        return bool(self.config & h.HV_STIMER_PERIODIC)

    @property
    def direct(self) -> bool:
        return bool(self.config & h.HV_STIMER_DIRECT)

    @property
    def sint(self) -> int:
        return self.config >> h.HV_STIMER_SINT_SHIFT & 15

    def enable(self, on: bool) -> None:
        self.config = self.config & ~h.HV_STIMER_ENABLED | (h.HV_STIMER_ENABLED if on else 0)

    def log(self, event: str, rest: str = "") -> None:
        self.v.m.log(f"kvm_hv_stimer_{event}: vcpu_id {self.v.id} timer {self.index}{rest}")

    def mark(self) -> None:
        self.v.stimers_pending.add(self.index)
        self.v.request("HV_STIMER")

    def fire(self) -> None:
        """Its hrtimer ran out."""
        self.hrtimer = None
        self.log("callback")
        self.v.stimers_pending.add(self.index)
        self.v.rouse("HV_STIMER")

    def clean_up(self) -> None:
        self.log("cleanup")
        self.hrtimer = None
        self.v.stimers_pending.discard(self.index)
        self.stuck = False
        self.expires = 0

    def set_config(self, value: int, *, host: bool) -> bool:
        if not self.v.synic and (not host or value):
            return False
        if not host and value & h.HV_STIMER_DIRECT and self.v.denies(h.HvFeature.STIMER_DIRECT):
            return False
        self.log("set_config", f" config {value:#x} host {int(host)}")
        self.clean_up()
        was_enabled = self.enabled
        self.config = value
        if was_enabled and not self.direct and self.sint == 0:
            self.enable(False)
        if self.enabled:
            self.mark()
        return True

    def set_count(self, value: int, *, host: bool) -> bool:
        if not self.v.synic and (not host or value):
            return False
        self.log("set_count", f" count {value} host {int(host)}")
        self.clean_up()
        self.count = value
        if not host and value == 0:
            self.enable(False)
        elif not host and self.config & h.HV_STIMER_AUTO_ENABLE:
            self.enable(True)
        if self.enabled:
            self.mark()
        return True

    def serve(self) -> None:
        """An entry's look at a timer that was marked."""
        if not self.enabled:
            return
        if self.expires and self.v.m.reference() >= self.expires:
            self._expire()
        if not (self.enabled and self.count):
            self.clean_up()
        elif not self.stuck:
            self._start()

    def _start(self) -> None:
        now = self.v.m.reference()
        if self.periodic:
            if not self.expires:
                self.expires = now + self.count
            elif now >= self.expires:
                self.expires = now + self.count - (now - self.expires) % self.count
            self.log("start_periodic", f" time_now {now} exp_time {self.expires}")
            self.hrtimer = self.v.m.now + 100 * (self.expires - now)
            return
        self.expires = self.count
        if now >= self.count:
            self.mark()
            return
        self.log("start_one_shot", f" time_now {now} count {self.count}")
        self.hrtimer = self.v.m.now + 100 * (self.count - now)

    def _expire(self) -> None:
        self.stuck = True
        result = self._interrupt() if self.direct else self._message()
        self.log("expiration", f" direct {int(self.direct)} send result {result}")
        if result == 0:
            self.stuck = False
            if not self.periodic:
                self.enable(False)

    def _interrupt(self) -> int:
        vector = self.config >> h.HV_STIMER_VECTOR_SHIFT & 0xFF
        return 1 - self.v.accept(Irq(vector, r.DM_FIXED, False, False, False, r.SH_NONE, 0))

    def _message(self) -> int:
        m = self.v.m
        if not self.v.simp & h.HV_PAGE_ENABLED:
            return -ENOENT
        slot = (self.v.simp // PAGE * PAGE) + self.sint * h.HV_MESSAGE_BYTES
        there = m.read(slot, 4)
        if there is None:
            return -EFAULT
        if any(there):
            if self.periodic:
                return 0
            m.write(slot + 5, bytes([h.HV_MESSAGE_PENDING]))
            return -EAGAIN
        m.write(slot, self.message())
        status = self.v.raise_sint(self.sint)
        return status if status < 0 else 0 if status else -EFAULT

    def message(self) -> bytes:
        words = (
            (h.HV_MESSAGE_TIMER_EXPIRED, 4),
            (h.HV_MESSAGE_TIMER_PAYLOAD, 1),
            (0, 3 + 8),
            (self.index, 4),
            (0, 4),
            (self.expires, 8),
            (self.v.m.reference(), 8),
        )
        return b"".join(value.to_bytes(size, "little") for value, size in words)


class Vcpu(oracle_apic.Vcpu):
    """A vCPU with what Hyper-V puts beside its APIC."""

    m: Machine

    def __init__(self, machine: Machine, apic_id: int, index: int) -> None:
        self.vp_index = index
        self.synic = 0
        self.assist_page = 0
        self.scontrol = 0
        self.sversion = 1
        self.siefp = 0
        self.simp = 0
        self.sints = [h.HV_SINT_MASKED] * 16
        self.connected: set[int] = set()
        self.auto_eoi: set[int] = set()
        self.stimers = [Stimer(self, i) for i in range(4)]
        self.stimers_pending: set[int] = set()
        self.pv_eoi_offered = False
        self.hyperv_exit: tuple[int, ...] | None = None
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
            return self._write_synic(msr, value, host=host)
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
            return self._read_synic(msr) if host or self.synic else None
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

    def _read_synic(self, msr: int) -> int:
        if msr in SINT_MSRS:
            return self.sints[msr - h.MSR_HV_SINT0]
        return {
            h.MSR_HV_SCONTROL: self.scontrol,
            h.MSR_HV_SVERSION: self.sversion,
            h.MSR_HV_SIEFP: self.siefp,
            h.MSR_HV_SIMP: self.simp,
            h.MSR_HV_EOM: 0,
        }[msr]

    def _write_synic(self, msr: int, value: int, *, host: bool) -> bool:
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

    # --------------------------------------------------------------------------------------------- auto-EOI and PV EOI

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

    def stimer_waits(self) -> bool:
        return bool(self.stimers_pending)

    def clocks(self) -> list[Any]:
        running = [(timer.hrtimer, timer.fire) for timer in self.stimers if timer.hrtimer is not None]
        return [*super().clocks(), *running]

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


class HypervLoop(RunLoop):
    """The thread of one vCPU of a Windows guest."""

    v: Vcpu
    m: Machine

    def rdmsr(self, msr: int) -> tuple[Result, int | None]:
        if msr not in NEEDS:
            return super().rdmsr(msr)
        self.out()
        why = r.MSR_EXIT_FILTER if self.m.filtered(msr, write=False) else 0
        value = None if why else self.v.read_msr(msr, host=False)
        if value is None and not why:
            why = r.MSR_EXIT_INVAL
        return self._finish(self._msr_outcome(Result(), why, KvmExit.X86_RDMSR)), value

    def hv_hypercall(self, control: int, input: int, output: int, xmm: tuple[int, ...]) -> tuple[Result, int | None]:
        """The status that the guest finds, None where it finds an exception or where user space is asked."""
        self.out()
        if self.v.real_mode:
            self.v.queue_exception(UD)
            return self._finish(Result(fault=True)), None
        call = Call(control, input, output, [*xmm, *[0] * 12][:12], self.m)
        self.m.log(call.line())
        status = self._status(call)
        if status is None:
            if call.to_user:
                self.v.hypercall_asked = True
                self.v.hyperv_exit = (h.HvExit.HCALL, control, input, output)
                return self._finish(Result(user=KvmExit.HYPERV)), None
            self.v.queue_exception(UD)
            return self._finish(Result(fault=True)), None
        self.m.log_done(status)
        self.skip(INSN_LEN["vmcall"])
        return self._finish(Result()), status

    def _status(self, call: Call) -> int | None:
        needed = CALL_NEEDS.get(call.code, h.HvFeature(0))
        if h.HvCall.EXT_CALL_QUERY_CAPABILITIES <= call.code <= h.HvCall.EXT_CALL_LAST and self.m.extended_calls:
            needed = h.HvFeature.EXTENDED_HYPERCALLS
        if self.v.denies(needed):
            return h.HvStatus.ACCESS_DENIED
        if self.m.checks_call_words and call.control & h.HV_CALL_RESERVED:
            return h.HvStatus.INVALID_HYPERCALL_INPUT
        if call.fast and call.code == h.HvCall.SEND_IPI_EX and self.v.denies(h.HvFeature.XMM_INPUT):
            return None
        bad = call.repeated or (self.m.checks_call_words and call.variable_words > 0)
        if call.code == h.HvCall.NOTIFY_LONG_SPIN_WAIT:
            return h.HvStatus.INVALID_HYPERCALL_INPUT if bad else h.HvStatus.SUCCESS
        if call.code == h.HvCall.SEND_IPI:
            return h.HvStatus.INVALID_HYPERCALL_INPUT if bad else self._send_ipi(call)
        if call.code == h.HvCall.SEND_IPI_EX:
            if call.repeated or (call.fast and not self.m.xmm_input):
                return h.HvStatus.INVALID_HYPERCALL_INPUT
            return self._send_ipi_ex(call)
        if call.code in (h.HvCall.SIGNAL_EVENT, h.HvCall.POST_MESSAGE):
            if bad or not self.v.synic:
                return h.HvStatus.INVALID_HYPERCALL_INPUT
            call.to_user = True
            return None
        if h.HvCall.EXT_CALL_QUERY_CAPABILITIES <= call.code <= h.HvCall.EXT_CALL_LAST and self.m.extended_calls:
            if call.fast:
                return h.HvStatus.INVALID_PARAMETER
            call.to_user = True
            return None
        return h.HvStatus.INVALID_HYPERCALL_CODE

    def _send_ipi(self, call: Call) -> int:
        if call.fast:
            vector, mask = call.input, call.output
            if vector >> 32:
                return h.HvStatus.INVALID_HYPERCALL_INPUT
        else:
            block = self.m.read(call.input, 16)
            if block is None:
                return h.HvStatus.INVALID_HYPERCALL_INPUT
            vector, mask = number(block[:4]), number(block[8:])
        self.m.log(f"kvm_hv_send_ipi: vector {vector:x} processor_mask {mask:#x}")
        if not 0x10 <= vector <= 0xFF:
            return h.HvStatus.INVALID_HYPERCALL_INPUT
        self.m.send_to_vps(vector, set(oracle.bits_of(mask)))
        return h.HvStatus.SUCCESS

    def _send_ipi_ex(self, call: Call) -> int:
        bad = h.HvStatus.INVALID_HYPERCALL_INPUT
        if call.fast:
            vector, form, valid, *banks = call.input & 0xFFFF_FFFF, call.output, *call.xmm
        else:
            block = self.m.read(call.input, 24)
            if block is None:
                return bad
            vector, form, valid, banks = number(block[:4]), number(block[8:16]), number(block[16:]), []
        self.m.log(f"kvm_hv_send_ipi_ex: vector {vector:x} format {form:x} valid_bank_mask {valid:#x}")
        present = oracle.bits_of(valid)
        if self.m.checks_call_words and call.variable_words != len(present):
            return bad
        wanted = None
        if form != 1:
            if not present:
                return h.HvStatus.SUCCESS
            if not call.fast:
                block = self.m.read(call.input + 24, 8 * len(present))
                if block is None:
                    return bad
                banks = [number(block[i : i + 8]) for i in range(0, len(block), 8)]
            if len(present) > len(banks):
                return bad
            wanted = {64 * bank + bit for bank, word in zip(present, banks) for bit in oracle.bits_of(word)}
        if not 0x10 <= vector <= 0xFF:
            return bad
        self.m.send_to_vps(vector, wanted)
        return h.HvStatus.SUCCESS


class Call:
    """A hypercall's registers: XMM0 to XMM5 as twelve halves, low ones first."""

    def __init__(self, control: int, input: int, output: int, xmm: list[int], machine: Machine) -> None:
        self.control, self.input, self.output, self.xmm = control, input, output, xmm
        self.code = control & 0xFFFF
        self.fast = bool(control >> 16 & 1)
        self.variable_words = control >> 17 & 0x3FF
        self.count = control >> 32 & 0xFFF
        self.start = control >> 48 & 0xFFF
        self.repeated = self.count > 0 or self.start > 0
        self.to_user = False
        self.knows_variable_words = machine.checks_call_words

    def line(self) -> str:
        kind = "fast" if self.fast else "slow"
        counts = f"cnt {self.count:#x}"
        if self.knows_variable_words:
            counts = f"var_cnt {self.variable_words:#x} rep_cnt {self.count:#x}"
        return (
            f"kvm_hv_hypercall: code {self.code:#x} {kind} {counts} idx {self.start:#x} "
            f"in {self.input:#x} out {self.output:#x}"
        )


def number(data: bytes) -> int:
    return int.from_bytes(data, "little")
