"""A slow, obvious model of KVM's local APIC, written to be read and to be right, not to be quick.

Models: the in-kernel local APIC of KVM x86 on the generic path (register reads and writes, IPIs, MSIs, the APIC map,
APICBASE, get/set of the register page, INIT/SIPI/NMI), default behaviour of 6.18, with the older behaviours of seven
kernel generations. Sets stand for bitmaps, a dict for the register page, a dict for the APIC map.

It shares nothing but numbers (`fastexit.regs`) with the library, so an error has to be made twice to go unnoticed.
`test_oracle_kvm.py` holds it against a real `/dev/kvm`; `test_property.py` holds the library against it.

Not modelled: time (TMICT is stored, TMCCT reads 0, nothing expires), CMCI, Hyper-V and Xen, the IOAPIC side of an EOI.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field

from fastexit import regs as r

KERNELS = ("seed-v3", "5.6", "5.7", "5.8", "6.1", "6.12", "6.18")

PLAIN_LVTS = {
    r.APIC_LVTTHMR: r.LVT_WRITABLE_LOCAL,
    r.APIC_LVTPC: r.LVT_WRITABLE_LOCAL,
    r.APIC_LVT0: r.LVT_WRITABLE_LINT,
    r.APIC_LVT1: r.LVT_WRITABLE_LINT,
    r.APIC_LVTERR: r.LVT_WRITABLE_ERROR,
}
LVTS = (r.APIC_LVTT, *PLAIN_LVTS)
BITMAP_OFFSETS = {base + 0x10 * word for base in (r.APIC_ISR, r.APIC_TMR, r.APIC_IRR) for word in range(8)}
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
INHIBITS_OF_5_6 = {r.Inhibit.DISABLED, r.Inhibit.HYPERV}
INHIBITS_OF_5_6_SVM = {r.Inhibit.NESTED, r.Inhibit.IRQWIN, r.Inhibit.PIT_REINJ}
INHIBITS_OF_6_1 = {
    r.Inhibit.ABSENT,
    r.Inhibit.BLOCKIRQ,
    r.Inhibit.APIC_ID_MODIFIED,
    r.Inhibit.APIC_BASE_MODIFIED,
}


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
class ApicMap:
    """What KVM precomputes from the IDs of all present APICs."""

    max_apic_id: int = 0xFF
    phys: dict[int, Vcpu] = field(default_factory=dict)
    logical_mode: int = r.LOGICAL_SW_DISABLED
    flat: dict[int, Vcpu] = field(default_factory=dict)
    cluster: dict[tuple[int, int], Vcpu] = field(default_factory=dict)


@dataclass
class Events:
    """The part of KVM_GET_VCPU_EVENTS that an APIC can change."""

    nmi_pending: int
    latched_init: int


class Vcpu:
    """One vCPU: its APIC registers and the few words KVM keeps beside them."""

    def __init__(self, machine: Machine, apic_id: int, index: int) -> None:
        self.m = machine
        self.id = apic_id
        self.index = index
        self.is_boot_cpu = apic_id == 0
        self.apic_base = 0
        self.words: dict[int, int] = {}  # every dword of the page that is not part of a bitmap
        self.irr: set[int] = set()
        self.isr: set[int] = set()
        self.tmr: set[int] = set()
        self.pir: set[int] = set()
        self.isr_count = 0
        self.isr_cache: int | None = None
        self.lvtt_mode = 0
        self.tsc_deadline = 0
        self.nmi_queued = 0
        self.pending_init = False
        self.pending_sipi = False
        self.sipi_vector = 0
        self.pv_unhalted = False
        self.mp_state = r.MP_RUNNABLE if self.is_boot_cpu else r.MP_UNINITIALIZED
        self.last_accepted = 0
        self.apicv = machine.apicv
        self.apicv_update = machine.apicv
        if machine.apicv and machine.svm and apic_id > AVIC_MAX_ID:
            machine.inhibit(r.Inhibit.PHYSICAL_ID_TOO_BIG, True)
            self.apicv = False
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

    @property
    def deadline_mode(self) -> bool:
        return self.lvtt_mode == r.TIMER_DEADLINE

    def _bitmap(self, offset: int) -> tuple[set[int], int]:
        base = next(b for b in (r.APIC_IRR, r.APIC_TMR, r.APIC_ISR) if offset >= b)
        return {r.APIC_IRR: self.irr, r.APIC_TMR: self.tmr, r.APIC_ISR: self.isr}[base], (offset - base) // 0x10 * 32

    def reg(self, offset: int) -> int:
        """The dword at ``offset`` as it stands in the page."""
        if offset in BITMAP_OFFSETS:
            vectors, first = self._bitmap(offset)
            return sum(1 << (v - first) for v in vectors if first <= v < first + 32)
        return self.words.get(offset, 0)

    def _put(self, offset: int, value: int) -> None:
        if offset in BITMAP_OFFSETS:
            vectors, first = self._bitmap(offset)
            vectors.difference_update(range(first, first + 32))
            vectors.update(first + bit for bit in range(32) if value >> bit & 1)
        else:
            self.words[offset] = value

    # -------------------------------------------------------------------------------------------- reset and INIT

    def _reset(self, *, init: bool) -> None:
        self.pir.clear()
        if not init:
            self._set_base(r.APIC_DEFAULT_PHYS_BASE | r.APICBASE_EN | (r.APICBASE_BSP if self.is_boot_cpu else 0))
            self._set_xapic_id(self.id)
        self._set_version()
        for lvt in LVTS:
            self._put(lvt, r.LVT_MASKED)
        self._update_timer_mode()
        if self.is_boot_cpu:
            self._put(r.APIC_LVT0, r.LVT0_BOOT)
        self._put(r.APIC_DFR, r.DFR_FLAT)
        self._set_svr(0xFF)
        self.m.map_dirty = True
        self._put(r.APIC_TASKPRI, 0)
        if not self.x2apic:
            self._put(r.APIC_LDR, 0)
        self._put(r.APIC_ESR, 0)
        self._put(r.APIC_ICR, 0)
        if not self.x2apic or self.m.icr_always_split:
            self._put(r.APIC_ICR2, 0)
        else:
            # a 64-bit store, also on the vendor that keeps the high half elsewhere
            self._put(r.APIC_ICR + 4, 0)
        self._put(r.APIC_TDCR, 0)
        self._put(r.APIC_TMICT, 0)
        self.irr.clear()
        self.isr.clear()
        self.tmr.clear()
        self._recount_isr()
        self._update_ppr()
        self.m.rebuild_map()

    def _set_version(self) -> None:
        advertised = self.m.x2apic and self.m.split_irqchip and not self.m.x2apic_api & r.X2API_NO_SUPPRESS_EOI
        self._put(r.APIC_LVR, r.APIC_VERSION | (r.LVR_DIRECTED_EOI if advertised else 0))

    def _recount_isr(self) -> None:
        self.isr_count = 1 if self.apicv else len(self.isr)
        self.isr_cache = None

    # ---------------------------------------------------------------------------------------------------- APICv

    def enter(self) -> None:
        """What a VM entry does about APICv: on or off, if somebody asked to look again."""
        if self.apicv_update:
            self.apicv_update = False
            self._update_apicv()

    def _update_apicv(self) -> None:
        enabled = self.hw_enabled or self.x2apic or not self.m.inhibits_by_guest
        active = self.m.apicv and not self.m.inhibits and enabled
        if active != self.apicv:
            self.apicv = active
            self._recount_isr()

    def _mode_changed(self) -> None:
        """APICBASE.EN or EXTD changed: 6.1 looks at once, later kernels at the next entry."""
        if self.m.inhibits_by_map:
            self.apicv_update = True
        elif self.m.inhibits_by_guest:
            self._update_apicv()

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
        self._put(r.APIC_SPIV, value)

    def _set_xapic_id(self, apic_id: int) -> None:
        self._put(r.APIC_ID, (apic_id & 0xFF) << r.XAPIC_DEST_SHIFT)
        self.m.map_dirty = True

    def _x2apic_ldr(self) -> int:
        return (self.id >> 4) << 16 | 1 << (self.id & 15)

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
                self._put(r.APIC_ID, self.id)
                self._put(r.APIC_LDR, self._x2apic_ldr())
                self.m.map_dirty = True
            elif value & r.APICBASE_EN:
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
        return self._write_msr(msr, value, host=True)

    def guest_wrmsr(self, msr: int, value: int) -> str:
        """A guest WRMSR: ``"ok"`` or ``"gp"``."""
        self.enter()
        done = self._write_msr(msr, value, host=False)
        self.enter()
        return "ok" if done else "gp"

    def _write_msr(self, msr: int, value: int, *, host: bool) -> bool:
        self.last_accepted = 0
        if msr == r.MSR_APICBASE:
            return self._write_base(value, host=host)
        if msr == r.MSR_TSC_DEADLINE:
            if self.hw_enabled and self.deadline_mode:
                self.tsc_deadline = value
            return True
        if not r.MSR_X2APIC_BASE <= msr <= r.MSR_X2APIC_END or not self.x2apic:
            return False
        offset = (msr - r.MSR_X2APIC_BASE) << 4
        if self.m.icr_always_split:
            # these kernels write the destination as a register of its own first and look at no upper half elsewhere
            if offset == r.APIC_ICR2:
                return False
            if offset == r.APIC_ICR:
                self._write_reg(r.APIC_ICR2, value >> 32)
            return self._write_reg(offset, value & 0xFFFF_FFFF)
        if offset == r.APIC_ICR:
            return self._write_x2apic_icr(value)
        if value >> 32:
            return False
        return self._write_reg(offset, value)

    def get_msr(self, msr: int) -> int | None:
        """KVM_GET_MSRS of one entry, and equally a guest RDMSR; None where it faults."""
        if msr == r.MSR_APICBASE:
            return self.apic_base
        if msr == r.MSR_TSC_DEADLINE:
            return self.tsc_deadline if self.hw_enabled and self.deadline_mode else 0
        if not r.MSR_X2APIC_BASE <= msr <= r.MSR_X2APIC_END or not self.x2apic:
            return None
        offset = (msr - r.MSR_X2APIC_BASE) << 4
        if offset == r.APIC_ICR:
            return self.reg(r.APIC_ICR) | self.reg(self._icr_high_at()) << 32
        return self._read_reg(offset)

    def mmio_write(self, offset: int, value: int, length: int = 4) -> None:
        """A guest store to the APIC page."""
        self.last_accepted = 0
        self.enter()
        if self.hw_enabled and not self.x2apic and length == 4 and offset % 16 == 0:
            self._write_reg(offset, value & 0xFFFF_FFFF)
        self.enter()

    def mmio_read(self, offset: int, length: int = 4) -> int | None:
        """A guest load from the APIC page; None where KVM leaves the destination as it was."""
        self.enter()
        if not self.hw_enabled or self.x2apic:
            return (1 << 8 * length) - 1
        byte = offset % 16
        if byte + length > 4 or offset > r.APIC_SELF_IPI:
            return None
        value = self._read_reg(offset - byte, traced_as=offset)
        if value is None or length not in (1, 2, 4):
            return None
        return value >> 8 * byte & (1 << 8 * length) - 1

    def _icr_high_at(self) -> int:
        return r.APIC_ICR2 if self.m.icr_split else r.APIC_ICR + 4

    def _read_reg(self, offset: int, traced_as: int | None = None) -> int | None:
        if offset not in (READABLE if self.x2apic else READABLE_IN_XAPIC):
            return None
        if offset == r.APIC_PROCPRI:
            self._update_ppr()
        value = 0 if offset in (r.APIC_ARBPRI, r.APIC_TMCCT) else self.reg(offset)
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
            self._put(offset, value | r.DFR_CLUSTER if offset == r.APIC_DFR else value & XAPIC_ID_MASK)
            self.m.map_dirty = True
            if offset == r.APIC_ID:
                self._inhibit_modified_id()
        elif offset == r.APIC_TASKPRI:
            self._put(offset, value & 0xFF)
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
                    self._put(lvt, self.reg(lvt) | r.LVT_MASKED)
                self._update_timer_mode()
        elif offset == r.APIC_ICR:
            self._send_ipi(value & ~r.ICR_BUSY, self.reg(r.APIC_ICR2))
            self._put(r.APIC_ICR, value & ~r.ICR_BUSY)
        elif offset == r.APIC_ICR2:
            if self.x2apic and not self.m.icr_always_split:
                return False
            self._put(offset, value if self.x2apic else value & XAPIC_ID_MASK)
        elif offset in PLAIN_LVTS:
            self._put(offset, (value | self._forced_mask()) & PLAIN_LVTS[offset])
        elif offset == r.APIC_LVTT:
            self._put(offset, (value | self._forced_mask()) & (r.LVT_WRITABLE_TIMER | self._timer_mode_mask()))
            self._update_timer_mode()
        elif offset == r.APIC_TMICT:
            if not self.deadline_mode:
                self._put(offset, value)
        elif offset == r.APIC_TDCR:
            self._put(offset, value & r.TDCR_WRITABLE)
        elif offset == r.APIC_ESR:
            return not (self.x2apic and value)
        elif offset == r.APIC_SELF_IPI:
            if not self.x2apic:
                return False
            if self.m.icr_always_split:
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

    def _timer_mode_mask(self) -> int:
        return r.LVT_TIMER_PERIODIC | (r.LVT_TIMER_DEADLINE if self.m.tsc_deadline else 0)

    def _update_timer_mode(self) -> None:
        mode = self.reg(r.APIC_LVTT) & self._timer_mode_mask()
        if (mode == r.TIMER_DEADLINE) != self.deadline_mode:
            self._put(r.APIC_TMICT, 0)
            self.tsc_deadline = 0
        self.lvtt_mode = mode

    # --------------------------------------------------------------------------------------------------- sending

    def _write_x2apic_icr(self, value: int) -> bool:
        if self.m.icr_reserved_faults and value & r.ICR_RESERVED:
            return False
        value &= ~r.ICR_BUSY
        self._send_ipi(value & 0xFFFF_FFFF, value >> 32)
        self._put(r.APIC_ICR, value & 0xFFFF_FFFF)
        self._put(self._icr_high_at(), value >> 32)
        self.m.log(f"kvm_apic: apic_write APIC_ICR = {value:#x}")
        return True

    def _send_ipi(self, low: int, high: int) -> None:
        irq = Irq(
            vector=low & r.ICR_VECTOR,
            mode=(low & r.ICR_DM) >> r.ICR_DM_SHIFT,
            logical=bool(low & r.ICR_LOGICAL),
            level=bool(low & r.ICR_LEVEL),
            trigger_level=bool(low & r.ICR_TRIGGER),
            shorthand=(low & r.ICR_SHORTHAND) >> r.ICR_SHORTHAND_SHIFT,
            dest=high if self.x2apic else high >> r.XAPIC_DEST_SHIFT,
        )
        self.m.log(
            f"kvm_apic_ipi: dst {irq.dest:x} vec {irq.vector} ({r.DeliveryMode(irq.mode).name}|"
            f"{'logical' if irq.logical else 'physical'}|{'assert' if irq.level else 'de-assert'}|"
            f"{'level' if irq.trigger_level else 'edge'}|{DESTINATIONS[irq.shorthand]})"
        )
        self.last_accepted = self.m.deliver(self, irq)

    # -------------------------------------------------------------------------------------------------- receiving

    def accept(self, irq: Irq) -> int:
        """Takes one interrupt message; 1 when it was accepted."""
        trigger = "level" if irq.trigger_level else "edge"
        what = f"apicid {self.id:x} vec {irq.vector} ({r.DeliveryMode(irq.mode).name}|{trigger})"
        self.m.log(f"kvm_apic_accept_irq: {what}")
        if irq.mode in (r.DM_FIXED, r.DM_LOWEST):
            if irq.trigger_level and not irq.level:
                return 0
            if not (self.hw_enabled and self.sw_enabled):
                return 0
            if irq.trigger_level:
                self.tmr.add(irq.vector)
            else:
                self.tmr.discard(irq.vector)
            (self.pir if self.apicv and not self.m.svm else self.irr).add(irq.vector)
            if self.apicv:
                self.m.log(f"kvm_apicv_accept_irq: {what}")
            return 1
        if irq.mode == r.DM_REMRD:
            self.pv_unhalted = True
            return 1
        if irq.mode == r.DM_NMI:
            self.nmi_queued += 1
            return 1
        if irq.mode == r.DM_INIT:
            if irq.trigger_level and not irq.level:
                return 0
            self.pending_init = True
            self.pending_sipi = False
            return 1
        if irq.mode == r.DM_STARTUP:
            self.sipi_vector = irq.vector
            self.pending_sipi = True
            return 1
        return 0  # ExtINT, and SMI on a kernel without system management mode

    def sync_pir(self) -> None:
        """Moves posted interrupts into the IRR."""
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
        self._put(r.APIC_PROCPRI, ppr)
        return fell

    def _update_ppr(self) -> None:
        if self._store_ppr():
            self.sync_pir()  # looking for something that became deliverable looks at posted interrupts too

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
        return vector

    # ---------------------------------------------------------------------------------------------- state in and out

    def get_lapic(self) -> bytes:
        """KVM_GET_LAPIC."""
        self.sync_pir()
        page = dict.fromkeys(range(0, r.LAPIC_PAGE_BYTES, 4), 0) | self.words
        for base, vectors in ((r.APIC_ISR, self.isr), (r.APIC_TMR, self.tmr), (r.APIC_IRR, self.irr)):
            bitmap = sum(1 << v for v in vectors)
            for word in range(8):
                page[base + 0x10 * word] = bitmap >> 32 * word & 0xFFFF_FFFF
        page[r.APIC_TMCCT] = 0
        if self.x2apic:
            if not self.m.x2apic_api & r.X2API_32BIT_IDS:
                page[r.APIC_ID] = self.id << r.XAPIC_DEST_SHIFT & 0xFFFF_FFFF
            page[r.APIC_ICR2] = page[self._icr_high_at()]
        return struct.pack("<256I", *page.values())

    def set_lapic(self, data: bytes) -> None:
        """KVM_SET_LAPIC; ValueError where the ioctl says EINVAL."""
        if len(data) != r.LAPIC_PAGE_BYTES:
            raise ValueError(f"a register page has {r.LAPIC_PAGE_BYTES} bytes, got {len(data)}")
        page = dict(zip(range(0, r.LAPIC_PAGE_BYTES, 4), struct.unpack("<256I", data)))
        self.pir.clear()
        self._inhibit_moved_page()
        self._set_svr(page[r.APIC_SPIV])
        if self.x2apic:
            if self.m.x2apic_api & r.X2API_32BIT_IDS and page[r.APIC_ID] != self.id:
                self.m.rebuild_map()
                raise ValueError(f"APIC ID {page[r.APIC_ID]:#x} is not {self.id:#x}")
            page[r.APIC_ID] = self.id
            page[r.APIC_LDR] = self._x2apic_ldr()
            page[self._icr_high_at()] = page[r.APIC_ICR2]
        for offset, value in page.items():
            self._put(offset, value)
        self._inhibit_modified_id()
        self.m.map_dirty = True
        self.m.rebuild_map()
        self._set_version()
        self._update_ppr()
        self._update_timer_mode()
        self._put(r.APIC_TMCCT, 0)
        self._recount_isr()

    def get_mp_state(self) -> int:
        """KVM_GET_MP_STATE, which first carries out a pending INIT or SIPI."""
        self._accept_init_and_sipi()
        if self.mp_state == r.MP_HALTED and self.pv_unhalted:
            return r.MP_RUNNABLE
        return self.mp_state

    def set_mp_state(self, state: int) -> None:
        """KVM_SET_MP_STATE."""
        if state == r.MP_SIPI_RECEIVED:
            self._set_mp(r.MP_INIT_RECEIVED)
            self.pending_sipi = True
        else:
            self._set_mp(state)

    def _set_mp(self, state: int) -> None:
        self.mp_state = state
        if state == r.MP_RUNNABLE:
            self.pv_unhalted = False

    def _accept_init_and_sipi(self) -> None:
        if self.pending_init:
            self.pending_init = False
            self.nmi_queued = 0
            self._reset(init=True)
            self._set_mp(r.MP_RUNNABLE if self.apic_base & r.APICBASE_BSP else r.MP_INIT_RECEIVED)
        if self.pending_sipi:
            self.pending_sipi = False
            if self.mp_state == r.MP_INIT_RECEIVED:
                self._set_mp(r.MP_RUNNABLE)

    def events(self) -> Events:
        """KVM_GET_VCPU_EVENTS; counting the queued NMIs is what limits them."""
        self.nmi_queued = min(self.nmi_queued, MAX_PENDING_NMIS)
        return Events(self.nmi_queued, int(self.pending_init))


class Machine:
    """A VM: its vCPUs in creation order, the APIC map, and delivery between them."""

    def __init__(
        self,
        vcpus: int | None = None,
        *,
        apic_ids: list[int] | None = None,
        kernel: str = "6.18",
        vendor: str = "vmx",
        apicv: bool = False,
        irqchip: str = "full",
        x2apic_api: int = 0,
        x2apic: bool = True,
        tsc_deadline: bool = True,
        maxphyaddr: int = 48,
    ) -> None:
        generation = KERNELS.index(kernel)
        self.icr_always_split = generation <= KERNELS.index("5.8")
        self.icr_split = self.icr_always_split or (generation >= KERNELS.index("6.12") and vendor == "svm")
        self.icr_reserved_faults = generation >= KERNELS.index("6.12")
        self.lowest_broadcast_rewritten_early = kernel == "seed-v3"
        self.apicv = apicv
        self.svm = vendor == "svm"
        self.inhibits: set[int] = set()
        self.inhibits_by_guest = generation >= KERNELS.index("6.1")
        self.inhibits_by_map = generation >= KERNELS.index("6.12")
        self.inhibits_that_count = self._inhibits_that_count(generation)
        self.split_irqchip = irqchip == "split"
        self.x2apic_api = x2apic_api
        self.x2apic = x2apic
        self.tsc_deadline = tsc_deadline
        self.maxphyaddr = maxphyaddr
        self.trace: list[str] = []
        self.vcpus: list[Vcpu] = []
        self.map: ApicMap | None = None
        self.map_dirty = True
        for apic_id in apic_ids if apic_ids is not None else range(vcpus or 1):
            self.add_vcpu(apic_id)

    def add_vcpu(self, apic_id: int) -> Vcpu:
        """KVM_CREATE_VCPU. The newcomer resets, and so rebuilds the map, before anybody can see it."""
        vcpu = Vcpu(self, apic_id, len(self.vcpus))
        self.vcpus.append(vcpu)
        return vcpu

    def boot_x2apic(self) -> None:
        """Every vCPU to x2APIC mode, software-enabled, spurious vector 0xFF."""
        for vcpu in self.vcpus:
            vcpu.set_msr(r.MSR_APICBASE, vcpu.apic_base | ENABLED_BITS)
            vcpu.set_msr(r.MSR_X2APIC_BASE + (r.APIC_SPIV >> 4), r.SVR_ENABLE | 0xFF)

    def log(self, line: str) -> None:
        self.trace.append(line)

    # --------------------------------------------------------------------------------------------- APICv inhibits

    def _inhibits_that_count(self, generation: int) -> set[int]:
        reasons: set[int] = {r.Inhibit.PHYSICAL_ID_TOO_BIG} if self.svm else set()
        if generation >= KERNELS.index("5.6"):
            reasons |= INHIBITS_OF_5_6 | (INHIBITS_OF_5_6_SVM if self.svm else set())
        if self.inhibits_by_guest:
            reasons |= INHIBITS_OF_6_1 | ({r.Inhibit.SEV} if self.svm else set())
        if self.inhibits_by_map:
            reasons |= {r.Inhibit.PHYSICAL_ID_ALIASED} | ({r.Inhibit.LOGICAL_ID_ALIASED} if self.svm else set())
        return reasons

    def inhibit(self, reason: r.Inhibit, on: bool) -> None:
        """Sets or clears one reason against APICv; when the first comes or the last goes, every vCPU looks again."""
        if not self.apicv or reason not in self.inhibits_that_count:
            return
        before = bool(self.inhibits)
        (self.inhibits.add if on else self.inhibits.discard)(reason)
        switches = before != bool(self.inhibits)
        if self.inhibits_by_guest or switches:
            names = "|".join(why.name for why in sorted(self.inhibits))
            mask = sum(1 << why for why in self.inhibits)
            self.log(
                f"kvm_apicv_inhibit_changed: {'set' if on else 'cleared'} reason={int(reason)}, inhibits={mask:#x}"
                + (f" {names}" if names else "")
            )
        if switches:
            for vcpu in self.vcpus:
                vcpu.apicv_update = True

    # ------------------------------------------------------------------------------------------------- APIC map

    def rebuild_map(self) -> None:
        """Rebuilds the map if something it depends on has changed."""
        if not self.map_dirty:
            return
        self.map_dirty = False
        present = [v for v in self.vcpus if v.hw_enabled]
        new: ApicMap | None = ApicMap(max_apic_id=max([0xFF, *(v.id for v in present)]))
        modified = False
        for vcpu in present:
            modified |= vcpu.xapic_id_modified
            if not self._enter_physical(new, vcpu):
                new = None
                break
            self._enter_logical(new, vcpu)
        self.map = new
        if self.inhibits_by_map:
            self.inhibit(r.Inhibit.PHYSICAL_ID_ALIASED, new is None)
            self.inhibit(r.Inhibit.LOGICAL_ID_ALIASED, new is None or new.logical_mode == r.LOGICAL_DISABLED)
            self.inhibit(r.Inhibit.APIC_ID_MODIFIED, modified)

    def _enter_physical(self, new: ApicMap, vcpu: Vcpu) -> bool:
        if self.x2apic_api & r.X2API_32BIT_IDS:
            if vcpu.x2apic or vcpu.id > 0xFF:
                new.phys[vcpu.id] = vcpu
            if not vcpu.x2apic:
                new.phys.setdefault(vcpu.xapic_id, vcpu)
            return True
        slot = vcpu.id if vcpu.x2apic else vcpu.xapic_id
        if slot in new.phys:
            return False
        new.phys[slot] = vcpu
        return True

    def _enter_logical(self, new: ApicMap, vcpu: Vcpu) -> None:
        ldr = vcpu.reg(r.APIC_LDR)
        if new.logical_mode == r.LOGICAL_DISABLED or not vcpu.sw_enabled or not ldr:
            return
        if vcpu.x2apic:
            vote = r.LOGICAL_X2APIC
        elif vcpu.reg(r.APIC_DFR) == r.DFR_FLAT:
            vote = r.LOGICAL_FLAT
        else:
            vote = r.LOGICAL_CLUSTER
        if new.logical_mode not in (r.LOGICAL_SW_DISABLED, vote):
            new.logical_mode = r.LOGICAL_DISABLED
            return
        new.logical_mode = vote
        if vote == r.LOGICAL_X2APIC:
            return  # x2APIC logical IDs follow from the physical table
        logical_id = ldr >> r.XAPIC_DEST_SHIFT
        bits = bits_of(logical_id if vote == r.LOGICAL_FLAT else logical_id & 0xF)
        if not bits:
            return
        if vote == r.LOGICAL_FLAT:
            taken = bits[0] in new.flat
            new.flat.setdefault(bits[0], vcpu)
        else:
            taken = (logical_id >> 4, bits[0]) in new.cluster
            new.cluster.setdefault((logical_id >> 4, bits[0]), vcpu)
        if taken or len(bits) > 1:
            new.logical_mode = r.LOGICAL_DISABLED

    # ------------------------------------------------------------------------------------------------- delivery

    def deliver(self, source: Vcpu | None, irq: Irq) -> int:
        """Sends one message; the number of accepting APICs, or -1 when the slow scan matched none."""
        if irq.shorthand == r.SH_SELF and source is not None:
            return source.accept(irq)
        if self.lowest_broadcast_rewritten_early:
            self._rewrite_lowest_broadcast(irq)
        targets = self._resolve(source, irq)
        if targets is not None:
            return sum(target.accept(irq) for target in targets)
        self._rewrite_lowest_broadcast(irq)
        matching = [v for v in self.vcpus if v.hw_enabled and self._matches(source, irq, v)]
        if irq.wants_lowest:
            candidates = [v for v in matching if v.sw_enabled]
            matching = [candidates[irq.vector % len(candidates)]] if candidates else []
        if not matching:
            return -1
        return sum(target.accept(irq) for target in matching)

    @staticmethod
    def _rewrite_lowest_broadcast(irq: Irq) -> None:
        if not irq.logical and irq.dest == r.XAPIC_BROADCAST and irq.wants_lowest:
            irq.mode = r.DM_FIXED

    def _resolve(self, source: Vcpu | None, irq: Irq) -> list[Vcpu] | None:
        """The targets by the map; None where the map cannot tell."""
        if irq.shorthand or self.map is None or self._is_broadcast(source, irq, self.map):
            return None
        if not irq.logical:
            return [self.map.phys[irq.dest]] if irq.dest in self.map.phys else []
        slots = self._logical_slots(self.map, irq.dest)
        if slots is None:
            return None
        if irq.wants_lowest and slots:
            # empty slots take part in the choice
            slots = [slots[irq.vector % len(slots)]]
        return [target for target in slots if target is not None]

    def _is_broadcast(self, source: Vcpu | None, irq: Irq, apic_map: ApicMap) -> bool:
        if self.x2apic_api & r.X2API_NO_BROADCAST_QUIRK:
            if irq.dest == r.XAPIC_BROADCAST and apic_map.logical_mode != r.LOGICAL_X2APIC:
                return True
            return irq.dest == r.X2APIC_BROADCAST
        from_x2apic = source is not None and source.x2apic
        return irq.dest == (r.X2APIC_BROADCAST if from_x2apic else r.XAPIC_BROADCAST)

    @staticmethod
    def _logical_slots(apic_map: ApicMap, dest: int) -> list[Vcpu | None] | None:
        """What stands in each addressed slot, lowest first; None where the logical map is of no use."""
        if apic_map.logical_mode == r.LOGICAL_DISABLED:
            return None
        if apic_map.logical_mode == r.LOGICAL_FLAT:
            return [apic_map.flat.get(bit) for bit in bits_of(dest & 0xFF)]
        if apic_map.logical_mode == r.LOGICAL_CLUSTER:
            return [apic_map.cluster.get((dest >> 4 & 0xF, bit)) for bit in bits_of(dest & 0xF)]
        if apic_map.logical_mode == r.LOGICAL_X2APIC:
            first = (dest >> 16) * 16
            ids = [first + bit for bit in bits_of(dest & 0xFFFF)]
            return [apic_map.phys.get(apic_id) for apic_id in ids if apic_id <= apic_map.max_apic_id]
        return []

    def _matches(self, source: Vcpu | None, irq: Irq, target: Vcpu) -> bool:
        if irq.shorthand == r.SH_ALLINC:
            return True
        if irq.shorthand == r.SH_ALLBUT:
            return target is not source
        broadcast = r.X2APIC_BROADCAST if target.x2apic else r.XAPIC_BROADCAST
        dest = irq.dest
        if source is None and dest == r.XAPIC_BROADCAST and not self.x2apic_api & r.X2API_NO_BROADCAST_QUIRK:
            dest = broadcast
        if dest == broadcast:
            return True
        if not irq.logical:
            return dest == (target.id if target.x2apic or dest > 0xFF else target.xapic_id)
        ldr = target.reg(r.APIC_LDR)
        if target.x2apic:
            return ldr >> 16 == dest >> 16 and bool(ldr & dest & 0xFFFF)
        logical_id, dfr = ldr >> r.XAPIC_DEST_SHIFT, target.reg(r.APIC_DFR)
        if dfr == r.DFR_FLAT:
            return bool(logical_id & dest)
        if dfr == r.DFR_CLUSTER:
            return logical_id >> 4 == dest >> 4 and bool(logical_id & dest & 0xF)
        return False

    def signal_msi(self, address: int, data: int) -> int:
        """KVM_SIGNAL_MSI: accepting APICs, -1 for EPERM; ValueError for EINVAL."""
        long_ids = self.x2apic_api & r.X2API_32BIT_IDS
        if long_ids and address >> 32 & 0xFF:
            raise ValueError("address bits 39:32 are reserved")
        dest = address >> 12 & 0xFF
        if long_ids:
            dest |= address >> 32 & 0xFFFF_FF00
        irq = Irq(
            vector=data & 0xFF,
            mode=data >> 8 & 7,
            logical=bool(address & 4),
            level=True,
            trigger_level=bool(data & 0x8000),
            shorthand=r.SH_NONE,
            dest=dest,
            redirection_hint=bool(address & 8),
        )
        self.log(
            f"kvm_msi_set_irq: dst {dest:x} vec {irq.vector} ({r.DeliveryMode(irq.mode).name}|"
            f"{'logical' if irq.logical else 'physical'}|{'level' if irq.trigger_level else 'edge'}"
            f"{'|rh' if irq.redirection_hint else ''})"
        )
        return self.deliver(None, irq)


def bits_of(mask: int) -> list[int]:
    """Positions of the set bits, lowest first."""
    return [bit for bit in range(mask.bit_length()) if mask >> bit & 1]


def register_name(offset: int) -> str:
    """A register as the tracepoints print it."""
    return r.REGISTER_NAMES.get(offset, f"{offset:#x}")
