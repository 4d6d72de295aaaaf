"""A slow, obvious model of KVM's local APIC, written to be read and to be right, not to be quick.

Models: a VM with an in-kernel irqchip as far as its APICs go (the APIC map and delivery, MSIs, paravirtual IPIs, MSR
filters, time), default behaviour of 6.18, with the older behaviours of every kernel generation. Sets stand for
bitmaps, a dict for the register page, a dict for the APIC map. A vCPU is in oracle_apic.py, its timer in
oracle_timer.py, its thread in oracle_run.py.

It shares nothing but numbers (`fastexit.regs`, `fastexit.reasons`) with the library, so an error has to be made twice
to go unnoticed. `test_property.py` holds the library against it, and `fastexit verify` the library against a real
`/dev/kvm`.

Not modelled: CMCI, Hyper-V and Xen, nested guests.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from fastexit import regs as r
from oracle_apic import AVIC_MAX_ID, ENABLED_BITS, Irq, Vcpu

INHIBITS_OF_5_6 = {r.Inhibit.DISABLED, r.Inhibit.HYPERV}
INHIBITS_OF_5_6_SVM = {r.Inhibit.NESTED, r.Inhibit.IRQWIN, r.Inhibit.PIT_REINJ}
INHIBITS_OF_6_1 = {
    r.Inhibit.ABSENT,
    r.Inhibit.BLOCKIRQ,
    r.Inhibit.APIC_ID_MODIFIED,
    r.Inhibit.APIC_BASE_MODIFIED,
}


@dataclass
class MsrRange:
    """One range of KVM_X86_SET_MSR_FILTER; bits of ``bitmap`` allow."""

    flags: int
    base: int
    count: int
    bitmap: int


@dataclass
class ApicMap:
    """What KVM precomputes from the IDs of all present APICs."""

    max_apic_id: int = 0xFF
    phys: dict[int, Vcpu] = field(default_factory=dict)
    logical_mode: int = r.LOGICAL_SW_DISABLED
    flat: dict[int, Vcpu] = field(default_factory=dict)
    cluster: dict[tuple[int, int], Vcpu] = field(default_factory=dict)


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
        vector_hashing: bool = True,
        smm: bool = True,
        hv_timer: bool | None = None,
        pi_inject_timer: bool = False,
        tsc_khz: int = 1_000_000,
        bus_cycle_ns: int = 1,
        min_timer_period_us: int = 200,
        disable_exits: int = 0,
        disable_quirks: int = 0,
        boot_cpu_id: int = 0,
        fastpath: bool = True,
    ) -> None:
        self.kernel = kernel
        self.generation = generation = self.at(kernel)
        self.icr_always_split = generation < self.at("6.1")
        self.self_ipi_by_icr = generation < self.at("5.10")
        self.upper_halves_fault = generation >= self.at("5.15")
        # later than 6.8, and in stable kernels of the two series before it that users have
        self.icr_reserved_faults = generation >= self.at("6.1") and generation != self.at("6.8")
        self.icr_split = self.icr_always_split or (self.icr_reserved_faults and vendor == "svm")
        # since SVM has virtual NMIs, KVM counts NMIs and keeps the mask of SVM apart from what INIT clears
        self.nmis_counted = generation >= self.at("6.4")
        self.tpr_bit_2_stays = self.reads_beyond = self.at("5.6") <= generation < self.at("5.10")
        self.split_scan_syncs = generation >= self.at("5.15") and generation != self.at("6.8")
        kept_on_amd = generation >= self.at("5.15") and generation != self.at("6.8")
        self.lvtpc_masked = not (self.tpr_bit_2_stays or (kept_on_amd and vendor == "svm"))
        self.id_from_page = generation < self.at("6.6") or generation == self.at("6.8")
        self.lowest_broadcast_rewritten_early = generation < self.at("5.6")
        self.fastpath = fastpath
        self.svm = vendor == "svm"
        self.vector_hashing = vector_hashing
        self.smm = smm or generation < self.at("6.2")
        self.hv_timer = vendor == "vmx" if hv_timer is None else hv_timer
        self.pi_inject_timer = pi_inject_timer
        self.now = 0
        self.tsc_khz = tsc_khz
        self.bus_cycle_ns = bus_cycle_ns
        self.min_timer_period_us = min_timer_period_us
        self.disable_exits = disable_exits
        self.disable_quirks = disable_quirks
        self.boot_cpu_id = boot_cpu_id
        self.user_space_msr = 0
        self.msr_filter: tuple[bool, list[MsrRange]] | None = None
        self.cr8_follows_ppr = generation >= self.at("6.12")
        self.cr8_follows_avic = generation >= self.at("6.1") and generation != self.at("6.8")
        self.avic_keeps_v_tpr = generation < self.at("5.10") or generation == self.at("6.8")
        self.apicv = apicv
        self.inhibits: set[r.Inhibit] = set()
        self.inhibits_by_guest = generation >= self.at("6.1")
        self.inhibits_by_map = generation >= self.at("6.6")
        self.avic_refuses_ids = generation < self.at("6.18")
        self.inhibits_that_count = self._inhibits_that_count()
        self.apicv_changes_at_entry = generation >= self.at("5.15")
        self.windows_are_counted = generation >= self.at("7.3")
        self.notifies_itself = self.at("5.10") <= generation <= self.at("5.15")
        self.split_irqchip = irqchip == "split"
        self.x2apic_api = x2apic_api
        self.x2apic = x2apic
        self.tsc_deadline = tsc_deadline
        self.maxphyaddr = maxphyaddr
        self.pir_while_active = generation < self.at("5.15")
        self.clears_pir_last = generation < self.at("6.1")
        self.trace: list[str] = []
        self.running: Vcpu | None = None  # on the CPU where an operation happens
        self.drawn_from = False  # somebody looks at it to draw an operation, which changes nothing
        self.told: list[tuple[int, str]] = []  # whom the host was asked to do something for since then, and what
        self.vcpus: list[Vcpu] = []
        self.map: ApicMap | None = None
        self.map_dirty = True
        for apic_id in apic_ids if apic_ids is not None else range(vcpus or 1):
            self.add_vcpu(apic_id)

    def add_vcpu(self, apic_id: int) -> Vcpu:
        """KVM_CREATE_VCPU. The newcomer resets, and so rebuilds the map, before anybody can see it.

        ValueError where AVIC has no place for it.
        """
        if self.apicv and self.svm and self.avic_refuses_ids and apic_id > AVIC_MAX_ID:
            raise ValueError("EINVAL")
        vcpu = self.new_vcpu(apic_id)
        self.vcpus.append(vcpu)
        return vcpu

    def new_vcpu(self, apic_id: int) -> Vcpu:
        return Vcpu(self, apic_id, len(self.vcpus))

    def boot_x2apic(self) -> None:
        """Every vCPU to x2APIC mode, software-enabled, spurious vector 0xFF."""
        for vcpu in self.vcpus:
            vcpu.set_msr(r.MSR_APICBASE, vcpu.apic_base | ENABLED_BITS)
            vcpu.set_msr(r.MSR_X2APIC_BASE + (r.APIC_SPIV >> 4), r.SVR_ENABLE | 0xFF)

    def log(self, line: str) -> None:
        self.trace.append(line)

    @staticmethod
    def at(kernel: str) -> tuple[int, ...]:
        """A generation as a version, to be compared; the seed is a patch on 5.4."""
        return (5, 4) if kernel == "seed-v3" else tuple(map(int, kernel.split(".")))

    # --------------------------------------------------------------------------------------------- APICv inhibits

    def _inhibits_that_count(self) -> set[r.Inhibit]:
        reasons = {r.Inhibit.PHYSICAL_ID_TOO_BIG} if self.svm and not self.avic_refuses_ids else set()
        if self.svm and self.at("5.7") <= self.generation < self.at("6.1"):
            reasons.add(r.Inhibit.X2APIC)
        if self.generation >= self.at("5.6"):
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
        before = set(self.inhibits)
        changes = {reason: on}
        if self.windows_are_counted:
            changes[r.Inhibit.IRQWIN] = any(vcpu.window_inhibits for vcpu in self.vcpus)
        after = (before | {why for why in changes if changes[why]}) - {why for why in changes if not changes[why]}
        switches = bool(before) != bool(after)
        for why, there in changes.items():
            self._inhibit(why, there, switches)
        if switches:
            self.ask_all("APICV_UPDATE")

    def ask_all(self, name: str) -> None:
        """A KVM_REQ_* of every vCPU; nobody is woken for it."""
        for vcpu in self.vcpus:
            if vcpu.in_guest and not vcpu.kicked:
                vcpu.tell("KICK")
            vcpu.request(name)

    def _inhibit(self, reason: r.Inhibit, on: bool, switches: bool) -> None:
        (self.inhibits.add if on else self.inhibits.discard)(reason)
        if self.inhibits_by_guest or switches:
            names = "|".join(why.name for why in sorted(self.inhibits))
            mask = sum(1 << why for why in self.inhibits)
            self.log(
                f"kvm_apicv_inhibit_changed: {'set' if on else 'cleared'} reason={int(reason)}, inhibits={mask:#x}"
                + (f" {names}" if names else "")
            )

    # ----------------------------------------------------------------------------------------------------- time

    def cycles(self, ns: int) -> int:
        return ns * self.tsc_khz // 1_000_000

    def tsc(self) -> int:
        """The guest's TSC."""
        return self.cycles(self.now)

    def next_timer(self) -> int | None:
        """When the next timer of the host runs out."""
        return min((when for v in self.vcpus for when, _ in v.clocks()), default=None)

    def set_time(self, ns: int) -> list[int]:
        """Time passes; whose preemption timer took him out of the guest, in order."""
        if ns < self.now:
            raise ValueError("time does not go back")
        self.now = ns
        left = []
        while True:
            fires = [(when, v.index, fire) for v in self.vcpus for when, fire in v.clocks() if when <= ns]
            if fires:
                min(fires, key=lambda clock: clock[:2])[2]()
                continue
            # who has been kicked leaves the guest for that, before his timer runs out
            inside = [v for v in self.vcpus if v.in_guest and not v.kicked]
            due = [v for v in inside if v.timer.hv_at is not None and v.timer.hv_at <= self.tsc()]
            if not due:
                return left
            left.append(due[0].index)
            due[0].thread.preemption_timer()

    # ---------------------------------------------------------------------------------------------- MSRs and hypercalls

    def set_msr_filter(self, default_deny: bool, ranges: list[tuple[int, int, list[int]]]) -> None:
        """KVM_X86_SET_MSR_FILTER: flags, first MSR, and for each MSR whether it is allowed."""
        self.msr_filter = (
            default_deny,
            [
                MsrRange(flags, first, len(bits), sum(bool(bit) << n for n, bit in enumerate(bits)))
                for flags, first, bits in ranges
            ],
        )

    def filtered(self, msr: int, *, write: bool) -> bool:
        """Whether the MSR filter denies this access to the guest."""
        if self.msr_filter is None or r.MSR_X2APIC_BASE <= msr <= r.MSR_X2APIC_END:
            return False
        deny, ranges = self.msr_filter
        for one in ranges:
            if one.base <= msr < one.base + one.count and one.flags & (2 if write else 1):
                return not one.bitmap >> msr - one.base & 1
        return deny

    def pv_ipi(self, low: int, high: int, least: int, icr: int, width: int) -> int:
        """KVM_HC_SEND_IPI: how many accepted, or an error."""
        if icr & (r.ICR_LOGICAL | r.ICR_SHORTHAND):
            return -r.HC_EINVAL
        if self.map is None:
            return -r.HC_EOPNOTSUPP
        irq = Irq(
            vector=icr & r.ICR_VECTOR,
            mode=(icr & r.ICR_DM) >> r.ICR_DM_SHIFT,
            logical=False,
            level=bool(icr & r.ICR_LEVEL),
            trigger_level=bool(icr & r.ICR_TRIGGER),
            shorthand=r.SH_NONE,
            dest=0,
        )
        accepted = 0
        for bitmap in (low, high):
            for bit in bits_of(bitmap):
                target = self.map.phys.get(least + bit) if least + bit <= self.map.max_apic_id else None
                if target is not None:
                    accepted += target.accept(irq)
            least = least + width & 0xFFFF_FFFF
        return accepted

    def pv_kick(self, apic_id: int) -> None:
        """KVM_HC_KICK_CPU."""
        self.deliver(
            None,
            Irq(
                vector=0,
                mode=r.DM_REMRD,
                logical=False,
                level=False,
                trigger_level=False,
                shorthand=r.SH_NONE,
                dest=apic_id,
            ),
        )

    # ------------------------------------------------------------------------------------------------- APIC map

    def rebuild_map(self) -> None:
        """Rebuilds the map if something it depends on has changed; whose EOIs the IOAPIC wants may have, too."""
        if self.map_dirty:
            self.map_dirty = False
            self._build_map()
            self.ask_all("SCAN_IOAPIC")

    def _build_map(self) -> None:
        present = [v for v in self.vcpus if v.hw_enabled]
        if self.generation < self.at("6.6"):
            self.map = self._map_up_to_6_1(present)
            return
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

    @staticmethod
    def _map_up_to_6_1(present: list[Vcpu]) -> ApicMap:
        """The map of the kernels that never drop one: what does not agree has no logical half, aliases hide others."""
        new = ApicMap(max_apic_id=max([0xFF, *(v.id for v in present)]))
        modes: set[int] = set()
        for vcpu in present:
            if vcpu.x2apic or vcpu.id > 0xFF:
                new.phys[vcpu.id] = vcpu
            if not vcpu.x2apic:
                new.phys.setdefault(vcpu.xapic_id, vcpu)
            ldr = vcpu.reg(r.APIC_LDR)
            if not vcpu.sw_enabled:
                continue
            if vcpu.x2apic:
                modes.add(r.LOGICAL_X2APIC)
            elif ldr:
                modes.add(r.LOGICAL_FLAT if vcpu.reg(r.APIC_DFR) == r.DFR_FLAT else r.LOGICAL_CLUSTER)
            logical = ldr if vcpu.x2apic else ldr >> 24
            if modes == {r.LOGICAL_X2APIC}:
                first = (logical >> 16) * 16
                there = [first + bit for bit in bits_of(logical & 0xFFFF) if first + bit <= new.max_apic_id]
                new.phys.update(dict.fromkeys(there[:1], vcpu))
            elif modes == {r.LOGICAL_FLAT}:
                new.flat.update(dict.fromkeys(bits_of(logical)[:1], vcpu))
            elif modes == {r.LOGICAL_CLUSTER}:
                new.cluster.update({(logical >> 4, bit): vcpu for bit in bits_of(logical & 0xF)[:1]})
        new.logical_mode = modes.pop() if len(modes) == 1 else r.LOGICAL_DISABLED
        return new

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
        targets = self.resolve(source, irq)
        if targets is not None:
            return sum(target.accept(irq) for target in targets)
        self._rewrite_lowest_broadcast(irq)
        matching = [v for v in self.vcpus if v.hw_enabled and self._matches(source, irq, v)]
        if irq.wants_lowest:
            matching = self._lowest(irq, [v for v in matching if v.sw_enabled])
        if not matching:
            return -1
        return sum(target.accept(irq) for target in matching)

    def _lowest(self, irq: Irq, candidates: list[Any]) -> list[Any]:
        if not candidates:
            return []
        if self.vector_hashing:
            return [candidates[irq.vector % len(candidates)]]
        return [min(candidates, key=lambda v: v.arb_prio)]

    @staticmethod
    def _rewrite_lowest_broadcast(irq: Irq) -> None:
        if not irq.logical and irq.dest == r.XAPIC_BROADCAST and irq.wants_lowest:
            irq.mode = r.DM_FIXED

    def resolve(self, source: Vcpu | None, irq: Irq) -> list[Vcpu] | None:
        """The targets by the map; None where the map cannot tell."""
        if irq.shorthand or self.map is None or self._is_broadcast(source, irq, self.map):
            return None
        if not irq.logical:
            return [self.map.phys[irq.dest]] if irq.dest in self.map.phys else []
        slots = self._logical_slots(self.map, irq.dest)
        if slots is None:
            return None
        if irq.wants_lowest and slots:
            # empty slots take part in the choice by vector, but not in the one by priority
            slots = self._lowest(irq, slots if self.vector_hashing else [v for v in slots if v is not None])
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
        if self.x2apic_api & r.X2API_32BIT_IDS and address >> 32 & 0xFF:
            raise ValueError("address bits 39:32 are reserved")
        return self.deliver(None, self.msi(address, data))

    def msi(self, address: int, data: int) -> Irq:
        """A message, told to whoever traces."""
        dest = address >> 12 & 0xFF
        if self.x2apic_api & r.X2API_32BIT_IDS:
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
        return irq


def bits_of(mask: int) -> list[int]:
    """Positions of the set bits, lowest first."""
    return [bit for bit in range(mask.bit_length()) if mask >> bit & 1]
