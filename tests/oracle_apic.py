"""One vCPU of the oracle: its local APIC's registers, what it accepts, what user space reads and sets.

Models: register reads and writes through MSRs and the page, APICBASE, sending, receiving, priorities and EOI, the whole
page in and out, mp_state and events. The timer is in oracle_timer.py, the vCPU's thread in oracle_run.py.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fastexit import regs as r
from fastexit.reasons import KvmExit
from oracle_run import Doors, RunLoop
from oracle_timer import Timer

if TYPE_CHECKING:
    from oracle import Machine

PLAIN_LVTS = {
    r.APIC_LVTTHMR: r.LVT_WRITABLE_LOCAL,
    r.APIC_LVTPC: r.LVT_WRITABLE_LOCAL,
    r.APIC_LVT0: r.LVT_WRITABLE_LINT,
    r.APIC_LVT1: r.LVT_WRITABLE_LINT,
    r.APIC_LVTERR: r.LVT_WRITABLE_ERROR,
}
LVTS = (r.APIC_LVTT, *PLAIN_LVTS)
BITMAP_OFFSETS = {base + 0x10 * word for base in (r.APIC_ISR, r.APIC_TMR, r.APIC_IRR) for word in range(8)}
ZEROES = dict.fromkeys(range(0, r.LAPIC_PAGE_BYTES, 4), 0)
READABLE = BITMAP_OFFSETS | {
    r.APIC_ID,
    r.APIC_LVR,
    r.APIC_TASKPRI,
    r.APIC_PROCPRI,
    r.APIC_LDR,
    r.APIC_SPIV,
    r.APIC_ESR,
    r.APIC_ICR,
    *LVTS,
    r.APIC_TMICT,
    r.APIC_TMCCT,
    r.APIC_TDCR,
}
READABLE_IN_XAPIC = READABLE | {r.APIC_ARBPRI, r.APIC_DFR, r.APIC_ICR2}
XAPIC_ID_MASK = 0xFF00_0000
ENABLED_BITS = r.APICBASE_EN | r.APICBASE_EXTD
DESTINATIONS = ("dst", "self", "all", "all-but-self")
MAX_PENDING_NMIS = 2
AVIC_MAX_ID = 254


@dataclass
class Irq:
    """One interrupt message on its way to the APICs."""

    vector: int
    mode: int
    logical: bool
    level: bool
    trigger_level: bool
    shorthand: int
    dest: int
    redirection_hint: bool = False

    @property
    def wants_lowest(self) -> bool:
        return self.mode == r.DM_LOWEST or self.redirection_hint


@dataclass
class Events:
    """The part of KVM_GET_VCPU_EVENTS that an APIC can change."""

    nmi_pending: int
    latched_init: int
    nmi_masked: bool = False
    smi_pending: bool = False
    exception: int | None = None


class Vcpu(Doors):
    """One vCPU: its APIC registers and the few words KVM keeps beside them."""

    def __init__(self, machine: Machine, apic_id: int, index: int) -> None:
        self.m = machine
        self.id = apic_id
        self.index = index
        self.is_boot_cpu = apic_id == machine.boot_cpu_id
        self.apic_base = 0
        self.words: dict[int, int] = {}  # every dword of the page that is not part of a bitmap
        self.irr: set[int] = set()
        self.isr: set[int] = set()
        self.tmr: set[int] = set()
        self.pir: set[int] = set()
        self.isr_count = 0
        self.isr_cache: int | None = None
        self.timer = Timer(self)
        self.thread = RunLoop(self)
        self.in_guest = False
        self.kicked = False
        self.blocked = False  # its thread sleeps, and nobody has woken it
        self.requests: set[str] = set()
        self.rip = 0xFFF0
        self.cs = 0xF000
        self.rflags = r.RFLAGS_FIXED
        self.shadow = 0
        self.exception: int | None = None
        self.injected: int | None = None  # what was injected last
        self.taken: list[int | None] = []  # and all of that
        self.interrupt_injected = False  # and the guest has not been entered with it
        self.window_inhibits = False  # its interrupt window keeps AVIC off the machine, where windows are counted
        self.extint: int | None = None
        self.nmi_queued = 0
        self.nmi_pending = 0
        self.nmi_masked = False
        self.nmi_injected = False
        self.smi_pending = False
        self.smm = False
        self.before_smm = (0, 0, False)
        self.vmxon = False
        self.gif = True
        self.arb_prio = 0
        self.ioapic_handled: set[int] = set()
        self.ioapic_eoi = 0
        self.pending_init = False
        self.pending_sipi = False
        self.sipi_vector = 0
        self.pv_unhalted = False
        self.mp_state = r.MP_RUNNABLE if self.is_boot_cpu else r.MP_UNINITIALIZED
        self.last_accepted = 0
        self.apicv = machine.apicv
        self.cr8_intercepted = False
        self.v_tpr = 0
        self.irr_pending = False
        self.requests.add("EVENT")
        if machine.apicv:
            self.requests.add("APICV_UPDATE")
        if machine.apicv and machine.svm and apic_id > AVIC_MAX_ID:
            machine.inhibit(r.Inhibit.PHYSICAL_ID_TOO_BIG, True)
            self.apicv = False
        if machine.x2apic:
            machine.inhibit(r.Inhibit.X2APIC, True)
        self.apic_base = r.APICBASE_EN
        self._reset(init=False)

    # ------------------------------------------------------------------------------------------------ small facts

    @property
    def hw_enabled(self) -> bool:
        return bool(self.apic_base & r.APICBASE_EN)

    @property
    def x2apic(self) -> bool:
        return bool(self.apic_base & r.APICBASE_EXTD)

    @property
    def sw_enabled(self) -> bool:
        return bool(self.reg(r.APIC_SPIV) & r.SVR_ENABLE)

    @property
    def xapic_id(self) -> int:
        return self.reg(r.APIC_ID) >> r.XAPIC_DEST_SHIFT

    def _bitmap(self, offset: int) -> tuple[set[int], int]:
        base = next(b for b in (r.APIC_IRR, r.APIC_TMR, r.APIC_ISR) if offset >= b)
        return {r.APIC_IRR: self.irr, r.APIC_TMR: self.tmr, r.APIC_ISR: self.isr}[base], (offset - base) // 0x10 * 32

    def reg(self, offset: int) -> int:
        """The dword at ``offset`` as it stands in the page."""
        if offset in BITMAP_OFFSETS:
            vectors, first = self._bitmap(offset)
            return sum(1 << (v - first) for v in vectors if first <= v < first + 32)
        return self.words.get(offset, 0)

    def put(self, offset: int, value: int) -> None:
        if offset in BITMAP_OFFSETS:
            vectors, first = self._bitmap(offset)
            vectors.difference_update(range(first, first + 32))
            vectors.update(first + bit for bit in range(32) if value >> bit & 1)
        else:
            self.words[offset] = value

    # -------------------------------------------------------------------------------------------- reset and INIT

    def _reset(self, *, init: bool) -> None:
        if not self.m.clears_pir_last:
            self.pir.clear()
        self.pv_eoi_msr = 0  # nothing here enables it
        if init:
            self.nmi_queued = self.nmi_pending = 0
            self.nmi_masked &= self.m.svm and self.m.nmis_counted
            self.nmi_injected = self.smi_pending = self.interrupt_injected = False
            self.exception = None
            self.rip, self.cs, self.rflags, self.shadow = 0xFFF0, 0xF000, r.RFLAGS_FIXED, 0
        else:
            self._set_base(r.APIC_DEFAULT_PHYS_BASE | r.APICBASE_EN | (r.APICBASE_BSP if self.is_boot_cpu else 0))
            self._set_xapic_id(self.id)
        self._set_version()
        for lvt in LVTS:
            self.put(lvt, r.LVT_MASKED)
        self.timer.mode_changed()
        if self.is_boot_cpu and not self.m.disable_quirks & r.QUIRK_LINT0_REENABLED:
            self.put(r.APIC_LVT0, r.LVT0_BOOT)
        self.put(r.APIC_DFR, r.DFR_FLAT)
        self._set_svr(0xFF)
        self.m.map_dirty = True
        self.put(r.APIC_TASKPRI, 0)
        if not self.x2apic:
            self.put(r.APIC_LDR, 0)
        self.put(r.APIC_ESR, 0)
        self.put(r.APIC_ICR, 0)
        if not self.x2apic or self.m.icr_always_split:
            self.put(r.APIC_ICR2, 0)
        else:
            # a 64-bit store, also on the vendor that keeps the high half elsewhere
            self.put(r.APIC_ICR + 4, 0)
        self.put(r.APIC_TDCR, 0)
        self.put(r.APIC_TMICT, 0)
        self.timer.reset()
        self.irr.clear()
        self.isr.clear()
        self.tmr.clear()
        self._recount_isr()
        self.arb_prio = 0
        self._update_ppr()
        if self.m.clears_pir_last and self.apicv:
            self.pir.clear()  # what the lower PPR let through is in the IRR by now
        self.m.rebuild_map()
        self.v_tpr = 0
        if not self.apicv:
            self.cr8_intercepted = True
        elif self.m.cr8_follows_avic:
            self.cr8_intercepted = False

    def _set_version(self) -> None:
        advertised = self.m.x2apic and self.m.split_irqchip and not self.m.x2apic_api & r.X2API_NO_SUPPRESS_EOI
        self.put(r.APIC_LVR, r.APIC_VERSION | (r.LVR_DIRECTED_EOI if advertised else 0))

    def _recount_isr(self) -> None:
        self.irr_pending = True
        self.isr_count = 1 if self.apicv else len(self.isr)
        self.isr_cache = None

    # ---------------------------------------------------------------------------------------------------- APICv

    def update_apicv(self) -> None:
        """APICv on or off, as all reasons together have it."""
        self.requests.discard("APICV_UPDATE")
        enabled = self.hw_enabled or self.x2apic or not self.m.inhibits_by_guest
        active = self.m.apicv and not self.m.inhibits and enabled
        if active != self.apicv:
            self.apicv = active
            self._recount_isr()
            if self.m.cr8_follows_avic:
                self.cr8_intercepted = not active
            if not active and self.m.apicv_changes_at_entry:
                self.request("EVENT")

    def _mode_changed(self) -> None:
        """APICBASE.EN or EXTD changed: 6.1 looks at once, later kernels at the next entry."""
        if self.m.inhibits_by_map:
            self.request("APICV_UPDATE")
        elif self.m.inhibits_by_guest:
            self.update_apicv()

    def _inhibit_moved_page(self) -> None:
        if self.hw_enabled and self.apic_base >> 12 << 12 != r.APIC_DEFAULT_PHYS_BASE:
            self.m.inhibit(r.Inhibit.APIC_BASE_MODIFIED, True)

    @property
    def xapic_id_modified(self) -> bool:
        return not self.x2apic and self.xapic_id != self.id & 0xFF

    def _inhibit_modified_id(self) -> None:
        if not self.m.inhibits_by_map and self.hw_enabled and self.xapic_id_modified:
            self.m.inhibit(r.Inhibit.APIC_ID_MODIFIED, True)

    def _set_svr(self, value: int) -> None:
        if bool(value & r.SVR_ENABLE) != self.sw_enabled:
            self.m.map_dirty = True
        self.put(r.APIC_SPIV, value)

    def _set_xapic_id(self, apic_id: int) -> None:
        self.put(r.APIC_ID, (apic_id & 0xFF) << r.XAPIC_DEST_SHIFT)
        self.m.map_dirty = True

    @staticmethod
    def _x2apic_ldr(apic_id: int) -> int:
        return (apic_id >> 4) << 16 | 1 << (apic_id & 15)

    # ------------------------------------------------------------------------------------------------- APICBASE

    def _set_base(self, value: int) -> None:
        changed = self.apic_base ^ value
        self.apic_base = value
        if changed & r.APICBASE_EN:
            self.m.map_dirty = True
            if value & r.APICBASE_EN:
                self._set_xapic_id(self.id)
        if changed & r.APICBASE_EXTD:
            if value & r.APICBASE_EXTD:
                self.put(r.APIC_ID, self.id)
                self.put(r.APIC_LDR, self._x2apic_ldr(self.id))
                self.m.map_dirty = True
            elif value & r.APICBASE_EN and self.m.generation >= self.m.at("6.6"):
                self._set_xapic_id(self.id)
        if changed & ENABLED_BITS:
            self._mode_changed()
        self._inhibit_moved_page()

    def _write_base(self, value: int, *, host: bool) -> bool:
        if value == self.apic_base:
            return True
        reserved = r.APICBASE_RESERVED | ~((1 << self.m.maxphyaddr) - 1)
        if not self.m.x2apic:
            reserved |= r.APICBASE_EXTD
        old_mode, new_mode = self.apic_base & ENABLED_BITS, value & ENABLED_BITS
        if value & reserved or new_mode == r.APICBASE_EXTD:
            return False
        if not host:
            if old_mode == ENABLED_BITS and new_mode == r.APICBASE_EN:
                return False
            if old_mode == 0 and new_mode == ENABLED_BITS:
                return False
        self._set_base(value)
        self.m.rebuild_map()
        return True

    # ------------------------------------------------------------------------------------------- MSR and MMIO doors

    def set_msr(self, msr: int, value: int) -> bool:
        """KVM_SET_MSRS of one entry; False where the ioctl stops."""
        self.thread.leave()
        return self.write_msr(msr, value, host=True)

    def get_msr(self, msr: int) -> int | None:
        """KVM_GET_MSRS of one entry; None where the ioctl stops."""
        self.thread.leave()
        return self.read_msr(msr)

    def write_msr(self, msr: int, value: int, *, host: bool) -> bool:
        self.last_accepted = 0
        if msr == r.MSR_APICBASE:
            return self._write_base(value, host=host)
        if msr == r.MSR_TSC_DEADLINE:
            self.timer.write_deadline(value)
            return True
        if msr == r.MSR_KVM_PV_EOI_EN:
            if not value & 2:
                self.pv_eoi_msr = value
            return not value & 2
        if not r.MSR_X2APIC_BASE <= msr <= r.MSR_X2APIC_END or not self.x2apic:
            return False
        offset = (msr - r.MSR_X2APIC_BASE) << 4
        if self.m.icr_always_split:
            # these kernels write the destination as a register of its own first, and the oldest look at no upper half
            if offset == r.APIC_ICR2:
                return False
            if offset == r.APIC_ICR:
                self._write_reg(r.APIC_ICR2, value >> 32)
            if offset != r.APIC_ICR and value >> 32 and self.m.upper_halves_fault:
                return False
            return self._write_reg(offset, value & 0xFFFF_FFFF)
        if offset == r.APIC_ICR:
            return self._write_x2apic_icr(value)
        if value >> 32:
            return False
        return self._write_reg(offset, value)

    def read_msr(self, msr: int) -> int | None:
        """What a read gives, whoever reads; None where it faults."""
        if msr == r.MSR_APICBASE:
            return self.apic_base
        if msr == r.MSR_TSC_DEADLINE:
            return self.timer.read_deadline()
        if msr == r.MSR_KVM_PV_EOI_EN:
            return self.pv_eoi_msr
        if not r.MSR_X2APIC_BASE <= msr <= r.MSR_X2APIC_END or not self.x2apic:
            return None
        offset = (msr - r.MSR_X2APIC_BASE) << 4
        if offset == r.APIC_ICR:
            return self.reg(r.APIC_ICR) | self.reg(self._icr_high_at()) << 32
        return self._read_reg(offset)

    def store(self, offset: int, value: int, length: int) -> None:
        """A store to the page, once it is clear that the kernel takes it."""
        self.last_accepted = 0
        if self.hw_enabled and not self.x2apic and length == 4 and offset % 16 == 0:
            self._write_reg(offset, value & 0xFFFF_FFFF)

    def load(self, offset: int, length: int) -> int | None:
        """A load from the page; None where KVM leaves the destination as it was."""
        if not self.hw_enabled or self.x2apic:
            return (1 << 8 * length) - 1
        byte = offset % 16
        beyond = byte + length > 4
        if offset > r.APIC_SELF_IPI or (beyond and not self.m.reads_beyond):
            return None
        value = self._read_reg(offset - byte, traced_as=offset)
        if value is None or beyond or length not in (1, 2, 4):
            return None
        return value >> 8 * byte & (1 << 8 * length) - 1

    def _icr_high_at(self) -> int:
        return r.APIC_ICR2 if self.m.icr_split else r.APIC_ICR + 4

    def _read_reg(self, offset: int, traced_as: int | None = None) -> int | None:
        if offset not in (READABLE if self.x2apic else READABLE_IN_XAPIC):
            return None
        if offset == r.APIC_PROCPRI:
            self._update_ppr()
        if offset == r.APIC_TMCCT:
            value = self.timer.current_count()
        else:
            value = 0 if offset == r.APIC_ARBPRI else self.reg(offset)
        self.m.log(f"kvm_apic: apic_read {register_name(offset if traced_as is None else traced_as)} = {value:#x}")
        return value

    # ---------------------------------------------------------------------------------------------- register writes

    def _write_reg(self, offset: int, value: int) -> bool:
        """One 32-bit register write, x2APIC (False means #GP) or xAPIC (the result is ignored)."""
        self.m.log(f"kvm_apic: apic_write {register_name(offset)} = {value:#x}")
        done = self._apply_write(offset, value)
        self.m.rebuild_map()
        return done

    def _apply_write(self, offset: int, value: int) -> bool:
        if offset in (r.APIC_ID, r.APIC_LDR, r.APIC_DFR):
            if self.x2apic:
                return False
            self.put(offset, value | r.DFR_CLUSTER if offset == r.APIC_DFR else value & XAPIC_ID_MASK)
            self.m.map_dirty = True
            if offset == r.APIC_ID:
                self._inhibit_modified_id()
        elif offset == r.APIC_TASKPRI:
            self.put(offset, value & 0xFF)
            self._update_ppr()
        elif offset == r.APIC_EOI:
            self.eoi()
        elif offset == r.APIC_SPIV:
            writable = r.SVR_WRITABLE
            if self.reg(r.APIC_LVR) & r.LVR_DIRECTED_EOI:
                writable |= r.SVR_SUPPRESS_EOI
            self._set_svr(value & writable)
            if not self.sw_enabled:
                for lvt in LVTS:
                    self.put(lvt, self.reg(lvt) | r.LVT_MASKED)
                self.timer.mode_changed()
                self.timer.software_disabled()
        elif offset == r.APIC_ICR:
            self._send_ipi(value & ~r.ICR_BUSY, self.reg(r.APIC_ICR2))
            self.put(r.APIC_ICR, value & ~r.ICR_BUSY)
        elif offset == r.APIC_ICR2:
            if self.x2apic and not self.m.icr_always_split:
                return False
            self.put(offset, value if self.x2apic else value & XAPIC_ID_MASK)
        elif offset in PLAIN_LVTS:
            self.put(offset, (value | self._forced_mask()) & PLAIN_LVTS[offset])
        elif offset == r.APIC_LVTT:
            self.put(offset, (value | self._forced_mask()) & (r.LVT_WRITABLE_TIMER | self.timer.allowed_modes()))
            self.timer.mode_changed()
        elif offset == r.APIC_TMICT:
            self.timer.write_initial_count(value)
        elif offset == r.APIC_TDCR:
            self.timer.write_divide(value)
        elif offset == r.APIC_ESR:
            return not (self.x2apic and value)
        elif offset == r.APIC_SELF_IPI:
            if not self.x2apic:
                return False
            if self.m.self_ipi_by_icr:
                self._write_reg(r.APIC_ICR, r.SH_SELF << r.ICR_SHORTHAND_SHIFT | value & 0xFF)
            elif value > 0xFF:
                return False
            else:
                self._send_ipi(r.SH_SELF << r.ICR_SHORTHAND_SHIFT | value, 0)
        else:
            return False
        return True

    def _forced_mask(self) -> int:
        return 0 if self.sw_enabled else r.LVT_MASKED

    # --------------------------------------------------------------------------------------------------- sending

    def _write_x2apic_icr(self, value: int) -> bool:
        if self.m.icr_reserved_faults and value & r.ICR_RESERVED:
            return False
        value &= ~r.ICR_BUSY
        self._send_ipi(value & 0xFFFF_FFFF, value >> 32)
        self.put(r.APIC_ICR, value & 0xFFFF_FFFF)
        self.put(self._icr_high_at(), value >> 32)
        self.m.log(f"kvm_apic: apic_write APIC_ICR = {value:#x}")
        return True

    def irq_of(self, low: int, high: int) -> Irq:
        """The message that the two halves of an ICR describe."""
        return Irq(
            vector=low & r.ICR_VECTOR,
            mode=(low & r.ICR_DM) >> r.ICR_DM_SHIFT,
            logical=bool(low & r.ICR_LOGICAL),
            level=bool(low & r.ICR_LEVEL),
            trigger_level=bool(low & r.ICR_TRIGGER),
            shorthand=(low & r.ICR_SHORTHAND) >> r.ICR_SHORTHAND_SHIFT,
            dest=high if self.x2apic else high >> r.XAPIC_DEST_SHIFT,
        )

    def _send_ipi(self, low: int, high: int) -> None:
        irq = self.irq_of(low, high)
        self.m.log(
            f"kvm_apic_ipi: dst {irq.dest:x} vec {irq.vector} ({r.DeliveryMode(irq.mode).name}|"
            f"{'logical' if irq.logical else 'physical'}|{'assert' if irq.level else 'de-assert'}|"
            f"{'level' if irq.trigger_level else 'edge'}|{DESTINATIONS[irq.shorthand]})"
        )
        self.last_accepted = self.m.deliver(self, irq)

    def local_interrupt(self, lvt: int) -> int:
        """A local source signals its LVT entry; KVM masks that of the performance counters when it does."""
        accepted = self.deliver_local(lvt)
        if accepted and lvt == r.APIC_LVTPC and self.m.lvtpc_masked:
            self.put(lvt, self.reg(lvt) | r.LVT_MASKED)
        return accepted

    # -------------------------------------------------------------------------------------------------- receiving

    def accept(self, irq: Irq) -> int:
        """Takes one interrupt message; 1 when it was accepted."""
        trigger = "level" if irq.trigger_level else "edge"
        what = f"apicid {self.id:x} vec {irq.vector} ({r.DeliveryMode(irq.mode).name}|{trigger})"
        self.m.log(f"kvm_apic_accept_irq: {what}")
        if irq.mode == r.DM_LOWEST:
            self.arb_prio += 1
        if irq.mode in (r.DM_FIXED, r.DM_LOWEST):
            if irq.trigger_level and not irq.level:
                return 0
            if not (self.hw_enabled and self.sw_enabled):
                return 0
            if irq.trigger_level:
                self.tmr.add(irq.vector)
            else:
                self.tmr.discard(irq.vector)
            outstanding = bool(self.pir)
            (self.pir if self.apicv and not self.m.svm else self.irr).add(irq.vector)
            self.irr_pending = True
            if self.apicv:
                if self.m.svm or not outstanding:
                    self._posted()
                self.m.log(f"kvm_apicv_accept_irq: {what}")
            else:
                self.rouse("EVENT")
            return 1
        if irq.mode == r.DM_SMI:
            if not self.m.smm:
                return 0
            self.rouse("SMI")
            return 1
        if irq.mode == r.DM_REMRD:
            self.pv_unhalted = True
            self.rouse("EVENT")
            return 1
        if irq.mode == r.DM_NMI:
            self.nmi_queued += 1
            self.rouse("NMI")
            return 1
        if irq.mode == r.DM_INIT:
            if irq.trigger_level and not irq.level:
                return 0
            self.pending_init = True
            self.pending_sipi = False
            self.rouse("EVENT")
            return 1
        if irq.mode == r.DM_STARTUP:
            self.sipi_vector = irq.vector
            self.pending_sipi = True
            self.rouse("EVENT")
            return 1
        return 0  # ExtINT

    def tell(self, what: str) -> None:
        """The host has to do something for this vCPU; the one that runs here sees it anyway, unless it sleeps."""
        if self is not self.m.running or what == "WAKE" or (what == "NOTIFY" and self.m.notifies_itself):
            self.m.told.append((self.index, what))

    def rouse(self, name: str) -> None:
        """A request by somebody else: a sleeper is woken for it, a vCPU in the guest has to come out."""
        if not self.wake() and self.in_guest and not self.kicked:
            self.tell("KICK")
        self.request(name)

    def wake(self) -> bool:
        was, self.blocked = self.blocked, False
        if was:
            self.tell("WAKE")
        return was

    def _posted(self) -> None:
        """A vector waits where the CPU looks for it: one that runs the guest is told, a sleeper is woken.

        Doorbells of old went by AVIC's IsRunning bit, which a vCPU keeps that was kicked out of its guest.
        """
        by_is_running = self.m.svm and self.m.generation < self.m.at("6.1")
        if self.in_guest and (by_is_running or not self.kicked):
            self.tell("DOORBELL" if self.m.svm else "NOTIFY")
        else:
            self.wake()

    def request(self, name: str) -> None:
        """A KVM_REQ_* and a kick: the next entry deals with it, and a vCPU that is in the guest comes out for it."""
        self.requests.add(name)
        self.kicked = self.in_guest

    def deliver_local(self, lvt: int) -> int:
        """An interrupt of the APIC itself, through its LVT entry."""
        value = self.reg(lvt)
        if not self.hw_enabled or value & r.LVT_MASKED:
            return 0
        mode = (value & r.LVT.mask("DM")) >> r.LVT.shift("DM")
        return self.accept(
            Irq(
                vector=value & 0xFF,
                mode=mode,
                logical=False,
                level=True,
                trigger_level=bool(value & r.LVT.mask("TRIGGER")),
                shorthand=r.SH_NONE,
                dest=0,
            )
        )

    def sync_pir(self) -> None:
        """Moves posted interrupts into the IRR; old kernels do not look for any while APICv is inhibited."""
        if self.m.pir_while_active and not self.apicv:
            return
        self.irr |= self.pir
        self.pir.clear()

    # ---------------------------------------------------------------------------------------- priorities and EOI

    def _highest_isr(self) -> int | None:
        if self.isr_count == 0:
            return None
        if self.isr_cache is not None:
            return self.isr_cache
        return max(self.isr, default=None)

    def _store_ppr(self) -> bool:
        """Recomputes the processor priority; True when it fell."""
        tpr, in_service = self.reg(r.APIC_TASKPRI), self._highest_isr() or 0
        ppr = tpr & 0xFF if tpr & 0xF0 >= in_service & 0xF0 else in_service & 0xF0
        fell = ppr < self.reg(r.APIC_PROCPRI)
        self.put(r.APIC_PROCPRI, ppr)
        return fell

    def _update_ppr(self) -> None:
        if self._store_ppr():
            self.sync_pir()  # looking for something that became deliverable looks at posted interrupts too
            if max(self.irr, default=0) & 0xF0 > self.reg(r.APIC_PROCPRI):
                self.requests.add("EVENT")
                return
        if self.m.cr8_follows_ppr:
            self.update_cr8_intercept()

    def update_cr8_intercept(self) -> None:
        """SVM without AVIC: CR8 writes exit while the TPR holds back what waits most urgently."""
        if not self.apicv:
            waiting = max(self.irr, default=None) if self.irr_pending else None
            self.cr8_intercepted = waiting is not None and self.reg(r.APIC_TASKPRI) & 0xF0 >= waiting & 0xF0

    def load_v_tpr(self) -> None:
        """A VM entry."""
        if not (self.apicv and self.m.avic_keeps_v_tpr):
            self.v_tpr = self.reg(r.APIC_TASKPRI) >> 4 & 0xF

    def store_v_tpr(self) -> None:
        """A VM exit: SVM's four bits are the TPR, unless CR8 writes exit anyway."""
        if self.m.svm and not self.cr8_intercepted:
            self._set_cr8(self.v_tpr)

    def _set_cr8(self, cr8: int) -> None:
        rest = self.reg(r.APIC_TASKPRI) & 4 if self.m.tpr_bit_2_stays else 0
        self.put(r.APIC_TASKPRI, (cr8 & 0xF) << 4 | rest)
        self._update_ppr()

    def pending(self) -> int | None:
        """The vector that could be injected now."""
        if not self.hw_enabled:
            return None
        self._store_ppr()
        self.sync_pir()
        vector = max(self.irr, default=0)
        return vector if vector & 0xF0 > self.reg(r.APIC_PROCPRI) else None

    def ack(self) -> int | None:
        """Injects the pending vector: IRR to ISR."""
        vector = self.pending()
        if vector is None:
            return None
        self.irr.discard(vector)
        if not self.apicv:
            self.irr_pending = bool(self.irr)
        if vector not in self.isr:
            self.isr.add(vector)
            if not self.apicv:
                self.isr_count += 1
                self.isr_cache = vector
        self._store_ppr()
        return vector

    def eoi(self) -> int | None:
        """End of interrupt for the highest vector in service: that vector."""
        vector = self._highest_isr()
        self.m.log(f"kvm_eoi: apicid {self.id:x} vector {-1 if vector is None else vector}")
        if vector is None:
            return None
        if vector in self.isr:
            self.isr.discard(vector)
            if not self.apicv:
                self.isr_count -= 1
                self.isr_cache = None
        self._update_ppr()
        self.ended(vector)
        self.requests.add("EVENT")
        return vector

    def ended(self, vector: int) -> None:
        """The EOI goes on to an IOAPIC: user space's is told at the next entry."""
        if vector in self.ioapic_handled and self.m.split_irqchip and not self._suppresses_eoi():
            self.ioapic_eoi = vector
            self.requests.add("IOAPIC_EOI")

    def scan_ioapic(self) -> None:
        """What an entry does when routes or destinations may have changed; here user space says whose EOIs are told."""
        if self.hw_enabled and (not self.m.split_irqchip or self.m.split_scan_syncs):
            self.sync_pir()

    def _suppresses_eoi(self) -> bool:
        return bool(self.m.x2apic_api & r.X2API_SUPPRESS_EOI and self.reg(r.APIC_SPIV) & r.SVR_SUPPRESS_EOI)

    def has_extint(self) -> bool:
        """An interrupt of user space's PIC waits, and LINT0 lets it through."""
        lint0 = self.reg(r.APIC_LVT0)
        open_ = not lint0 & r.LVT_MASKED and lint0 & r.LVT.mask("DM") == r.LVT0_BOOT
        return self.extint is not None and (not self.hw_enabled or open_)

    def take_extint(self) -> int | None:
        vector, self.extint = self.extint, None
        return vector

    def interrupt(self, vector: int) -> None:
        """KVM_INTERRUPT; ValueError for what the ioctl refuses."""
        self.thread.leave()
        if not self.m.split_irqchip or self.extint is not None:
            raise ValueError("ENXIO or EEXIST")
        self.extint = vector
        self.request("EVENT")

    def queue_exception(self, number: int) -> None:
        self.exception = number
        self.request("EVENT")

    # --------------------------------------------------------------------- what a guest of Hyper-V's adds to the loop

    def hyperv_requests(self) -> KvmExit | None:
        """What an entry does for Hyper-V's requests: why it leaves to user space instead."""
        return None

    def offer_pv_eoi(self) -> None:
        """An entry with events is about to be made: the guest may be told that it need not write EOI."""

    def take_pv_eoi(self) -> None:
        """Behind an exit, or an entry that was not made: the guest has not written EOI if it need not."""

    def stimer_waits(self) -> bool:
        """A synthetic timer waits for the next entry."""
        return False

    def clocks(self) -> list[tuple[int, Callable[[], None]]]:
        """The host's timers that run for this vCPU: when each runs out, and what it does then."""
        return [] if self.timer.hrtimer is None else [(self.timer.hrtimer, self.timer.fire)]

    # ---------------------------------------------------------------------------------------------- state in and out

    def get_lapic(self) -> bytes:
        """KVM_GET_LAPIC."""
        if not self.m.drawn_from:
            self.thread.leave()
            self.sync_pir()
        page = ZEROES | self.words
        for base, vectors in ((r.APIC_ISR, self.isr), (r.APIC_TMR, self.tmr), (r.APIC_IRR, self.irr)):
            for v in vectors:
                page[base + 0x10 * (v >> 5)] |= 1 << (v & 31)
        page[r.APIC_TMCCT] = self.timer.saved_count()
        if self.x2apic:
            if self.m.x2apic_api & r.X2API_32BIT_IDS:
                if page[r.APIC_ID] != self.id:
                    raise ValueError("EINVAL")
            else:
                page[r.APIC_ID] = self.reg(r.APIC_ID) << r.XAPIC_DEST_SHIFT & 0xFFFF_FFFF
            page[r.APIC_ICR2] = page[self._icr_high_at()]
        return struct.pack("<256I", *page.values())

    def set_lapic(self, data: bytes) -> None:
        """KVM_SET_LAPIC; ValueError where the ioctl says EINVAL."""
        if len(data) != r.LAPIC_PAGE_BYTES:
            raise ValueError(f"a register page has {r.LAPIC_PAGE_BYTES} bytes, got {len(data)}")
        self.thread.leave()
        page = dict(zip(range(0, r.LAPIC_PAGE_BYTES, 4), struct.unpack("<256I", data)))
        if not self.m.clears_pir_last:
            self.pir.clear()
        if self.m.generation < self.m.at("6.12"):
            self._inhibit_moved_page()
        self._set_svr(page[r.APIC_SPIV])
        if self.x2apic:
            long_ids = self.m.x2apic_api & r.X2API_32BIT_IDS
            if long_ids and page[r.APIC_ID] != self.id:
                self.m.rebuild_map()
                raise ValueError(f"APIC ID {page[r.APIC_ID]:#x} is not {self.id:#x}")
            taken = self.m.id_from_page and not long_ids
            page[r.APIC_ID] = page[r.APIC_ID] >> r.XAPIC_DEST_SHIFT if taken else self.id
            page[r.APIC_LDR] = self._x2apic_ldr(page[r.APIC_ID])
            page[self._icr_high_at()] = page[r.APIC_ICR2]
        for offset, value in page.items():
            self.put(offset, value)
        self._inhibit_modified_id()
        if not self.m.at("5.7") <= self.m.generation < self.m.at("5.8"):
            self.m.map_dirty = True
        self.m.rebuild_map()
        self._set_version()
        self._update_ppr()
        self.timer.restore(page[r.APIC_TMCCT])
        if self.m.clears_pir_last and self.apicv:
            self.pir.clear()
        self._recount_isr()
        self.arb_prio = 0
        self.request("EVENT")
        if not self.m.cr8_follows_ppr:
            self.update_cr8_intercept()

    def get_mp_state(self) -> int:
        """KVM_GET_MP_STATE, which first carries out a pending INIT or SIPI."""
        self.thread.leave()
        self.accept_events()
        if self.mp_state in (r.MP_HALTED, r.MpState.AP_RESET_HOLD) and self.pv_unhalted:
            return r.MP_RUNNABLE
        return self.mp_state

    def set_mp_state(self, state: int) -> None:
        """KVM_SET_MP_STATE."""
        self.thread.leave()
        # an SMI goes before an INIT; later kernels leave it to KVM_RUN
        blocked = self.m.generation < self.m.at("6.17") and (self.smi_pending or not self.init_allowed())
        if state in (r.MP_INIT_RECEIVED, r.MP_SIPI_RECEIVED) and blocked:
            raise ValueError("EINVAL")
        if state == r.MP_SIPI_RECEIVED:
            self.set_mp(r.MP_INIT_RECEIVED)
            self.pending_sipi = True
        else:
            self.set_mp(state)
        self.request("EVENT")

    def set_mp(self, state: int) -> None:
        self.mp_state = state
        if state == r.MP_RUNNABLE and self.m.generation >= self.m.at("6.15"):
            self.pv_unhalted = False

    def init_allowed(self) -> bool:
        return not (self.smm or self.vmxon or not self.gif)

    def accept_events(self) -> None:
        """INIT and SIPI, where they are due."""
        if not self.init_allowed():
            if self.pending_init or self.pending_sipi:
                self.pending_sipi = False
            return
        if self.pending_init:
            self.pending_init = False
            self._reset(init=True)
            self.set_mp(r.MP_RUNNABLE if self.apic_base & r.APICBASE_BSP else r.MP_INIT_RECEIVED)
        if self.pending_sipi:
            self.pending_sipi = False
            if self.mp_state == r.MP_INIT_RECEIVED:
                self.rip, self.cs = 0, self.sipi_vector << 8
                self.set_mp(r.MP_RUNNABLE)

    def process_nmi(self) -> None:
        most = 1 if self.nmi_masked or self.nmi_injected else MAX_PENDING_NMIS
        self.nmi_pending = min(self.nmi_pending + self.nmi_queued, most)
        self.nmi_queued = 0
        if self.nmi_pending or not self.m.nmis_counted:
            self.request("EVENT")

    def enter_smm(self) -> None:
        self.before_smm = self.rip, self.rflags, self.nmi_masked
        self.smm = self.nmi_masked = True
        self.rip, self.rflags, self.shadow = 0x8000, r.RFLAGS_FIXED, 0
        self.requests.add("EVENT")  # as always when KVM sets RFLAGS

    def rsm(self) -> None:
        """The guest leaves system management mode; ValueError where it is not in it."""
        if not self.smm:
            raise ValueError("#UD")
        self.rip, self.rflags, inside_nmi = self.before_smm
        if not inside_nmi:
            self.nmi_masked = False
        self.smm = False
        self.requests.add("EVENT")  # its own thread's: nobody is kicked for it

    def events(self) -> Events:
        """KVM_GET_VCPU_EVENTS; counting the queued NMIs is what limits them."""
        self.thread.leave()
        self.process_nmi()
        if self.m.generation >= self.m.at("5.10") and "SMI" in self.requests:
            self.requests.discard("SMI")
            self.smi_pending = True
            self.requests.add("EVENT")
        return Events(
            self.nmi_pending if self.m.nmis_counted else min(self.nmi_pending, 1),
            int(self.pending_init),
            self.nmi_masked,
            self.smi_pending,
            self.exception,
        )

    def set_events(
        self,
        *,
        nmi_pending: int | None = None,
        nmi_masked: bool = False,
        sipi_vector: int | None = None,
        smm: bool | None = None,
        latched_init: bool = False,
    ) -> None:
        """KVM_SET_VCPU_EVENTS; None leaves out the flag that makes a field count, ``smm`` that of the pending INIT.

        No exception, interrupt or NMI is on its way into the guest then, whatever was before.
        """
        self.thread.leave()
        self.process_nmi()
        if nmi_pending is not None:
            if self.m.nmis_counted:
                self.nmi_pending, self.nmi_queued = 0, nmi_pending
                if nmi_pending:
                    self.request("NMI")
            else:
                self.nmi_pending = nmi_pending
        self.nmi_masked = nmi_masked
        self.nmi_injected = self.interrupt_injected = False
        self.exception = None
        if sipi_vector is not None:
            self.sipi_vector = sipi_vector
        if smm is not None:
            self.smm = smm
            self.smi_pending = False
            if smm or self.m.generation >= self.m.at("5.6"):
                self.pending_init = latched_init
        self.request("EVENT")

    def set_sregs(self, *, apic_base: int, cr8: int) -> None:
        """KVM_SET_SREGS as far as it concerns the APIC; ValueError where the ioctl fails."""
        self.thread.leave()
        if not self._write_base(apic_base, host=True):
            raise ValueError("EINVAL")
        if not cr8 >> 4:
            self._set_cr8(cr8)
        if not self.m.cr8_follows_ppr:
            self.update_cr8_intercept()
        if self.apic_base & r.APICBASE_BSP and self.rip == 0xFFF0 and self.cs == 0xF000:
            self.set_mp(r.MP_RUNNABLE)  # user space of old did not do so when it reset the boot CPU

    @property
    def cr8(self) -> int:
        return self.reg(r.APIC_TASKPRI) >> 4 & 0xF


def register_name(offset: int) -> str:
    """A register as the tracepoints print it."""
    return r.REGISTER_NAMES.get(offset, f"{offset:#x}")
