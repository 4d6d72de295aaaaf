"""Machine: the memory of one VM, what user space asks of it, the batch door.

Models: KVM_CREATE_VM with an in-kernel irqchip as far as APICs go, KVM_CREATE_VCPU, KVM_SIGNAL_MSI, KVM_CAP_X2APIC_API;
the host's own interrupts and those of assigned devices.
"""

from __future__ import annotations

import inspect
import threading
import weakref
from collections.abc import Callable, Iterable
from ctypes import addressof, c_char
from typing import Any, Unpack

import numpy as np

from fastexit import irqchip as chips
from fastexit import layout as L
from fastexit import offers, pit
from fastexit import regs as R
from fastexit.checks import access_size, integer, one_of
from fastexit.clockedvcpu import clocked
from fastexit.compiledvcpu import CompiledVcpu
from fastexit.config import check_api, header, latest_clock, profile_of, release_of
from fastexit.connections import Connection, assign
from fastexit.costs.dispatcher import TimedDispatcher
from fastexit.costs.profile import CostProfile, Costs, cost_profile
from fastexit.costs.vcpu import TimedVcpu
from fastexit.exits.bus import Bus, FastMmio
from fastexit.exits.compiled import CompiledDispatcher
from fastexit.exits.dispatcher import Dispatcher
from fastexit.exits.exit import Exit, PortAccess
from fastexit.exits.handlers import CommonHandlers, Handlers
from fastexit.exits.hardware import Hardware
from fastexit.exits.svm import Svm
from fastexit.exits.vmx import Vmx
from fastexit.guestmemory import DEFAULT_BYTES, PAGE, opened, reserve
from fastexit.hostrows import HostRows
from fastexit.hyperv import MSR_HV_TSC_INVARIANT_CONTROL, MSRS_LISTED
from fastexit.irte import Irte, RemappingTable
from fastexit.jit import declare
from fastexit.jit.declare import load
from fastexit.kernels import entries as _entries
from fastexit.outcome import CODE_ACCEPTED_SHIFT, CODE_EFFECTS_SHIFT, CODE_GP, OUTCOMES, Effect, Outcome, Target
from fastexit.profile import NEWEST, SDM, Profile
from fastexit.reasons import SvmExit, VmxExit
from fastexit.routing import Irqfd, Routing
from fastexit.settings import Settings, documented, refuse_unknown
from fastexit.snapshot import pack, unpack
from fastexit.targets import for_itself, outcome_of, told
from fastexit.tracepoints.ring import Trace
from fastexit.traits import Trait
from fastexit.vcpu import Vcpu


@documented
class Machine:
    """A virtual machine: vCPUs, their local APICs, the APIC map.

    Args:
        vcpus: number of vCPUs, ids 0..n-1; or give ``apic_ids``, one x2APIC id (0..4095) a vCPU in creation order.
        costs: the name of a cost profile (``fastexit.cost_profiles()``), a CostProfile, or a dict with a base and what
            differs (CostProfile.of), for outcomes that have their modelled time (Outcome.cycles); None: no time at all.
        dispatcher: "python", the run loop step by step, or "compiled": any exit in one compiled call, for hosts that
            make many single exits. Same outcomes, same bytes. No costs with it: they are seen step by step.
        clock: the host's monotonic clock, a function that gives ns. Each call looks at it, so that none has to stop the
            others to set it; run_timers of vCPUs and machine fire what is due. None: ``set_time`` or ``clock_word``
            moves the machine's.
        {settings}

    Each vCPU is created as by KVM_CREATE_VCPU, so the last one is missing from the APIC map until a register write that
    concerns the map, such as boot_x2apic makes. ValueError for every argument out of range, TypeError for a keyword
    that is none. fastexit.settings.Settings declares the ``settings``.
    """

    def __init__(
        self,
        vcpus: int | None = None,
        *,
        apic_ids: Iterable[int] | None = None,
        costs: Costs | None = None,
        dispatcher: str = "python",
        clock: Callable[[], int] | None = None,
        **settings: Unpack[Settings],
    ) -> None:
        refuse_unknown(settings, inspect.signature(Machine).parameters)
        words = header(settings)
        if (vcpus is None) == (apic_ids is None):
            raise ValueError("give either the number of vCPUs or apic_ids")
        if vcpus is not None:
            most = offers.room(settings.get("kernel", NEWEST)).vcpus
            ids = list(range(integer(vcpus, "number of vCPUs", min(most, L.MAX_VCPUS))))
        else:
            if not isinstance(apic_ids, Iterable):
                raise TypeError(f"apic_ids is {type(apic_ids).__name__}, not a list of ids")
            ids = [integer(i, "APIC id", L.MAX_VCPU_ID) for i in apic_ids]
        if not ids:
            raise ValueError("a machine needs at least one vCPU")
        costs = _checked(costs, dispatcher)
        self._map_memory()
        for word, value in words.items():
            self.mem[word] = value
        self._assemble(costs, dispatcher, clock)
        for vcpu_id in ids:
            self.add_vcpu(vcpu_id)

    def _map_memory(self) -> None:
        self._block = reserve(L.BYTES)
        self.words: np.ndarray = np.frombuffer(self._block, dtype=np.uint64)
        self.mem: memoryview[int] = memoryview(self._block).cast("Q")
        self.handle: int = self.words.ctypes.data
        if not declare.JIT:
            declare.register(self.handle, self.words)
            weakref.finalize(self, declare.unregister, self.handle)

    def _assemble(self, costs: CostProfile | None, dispatcher: str, clock: Callable[[], int] | None) -> None:
        """The Python objects around the memory, from what its header says."""
        if clock is not None and not callable(clock):
            raise TypeError(f"clock is {type(clock).__name__}, not a function that gives ns")
        config = self.mem[L.H_CONFIG]
        self.profile: Profile = profile_of(self.words)
        bus = Bus(self.mem, self.handle)
        common = CommonHandlers(self.mem, self.handle, bus)
        vendor = (Svm if config & L.CONFIG_SVM else Vmx)(self.profile, common)
        self.costs = costs
        self._vcpu_class: type[Vcpu] = Vcpu
        self.dispatcher: Dispatcher = Dispatcher(self.mem, self.handle, vendor, self.profile)
        if costs is not None:
            self._vcpu_class = TimedVcpu
            self.dispatcher = TimedDispatcher(self.mem, self.handle, vendor, self.profile, self.words, costs)
        elif dispatcher == "compiled":
            self._vcpu_class = CompiledVcpu
            self.dispatcher = CompiledDispatcher(self.mem, self.handle, vendor, self.profile)
        if clock is not None:
            self._vcpu_class = clocked(self._vcpu_class)
        self._clock = clock
        self._latest = latest_clock(self.mem[L.H_TSC_KHZ])
        self._rows = HostRows.of(self.handle, bool(config & L.CONFIG_THREADS))
        self.hardware: Hardware = Hardware(self.dispatcher)
        self.irtes: RemappingTable = RemappingTable(self)
        self.routing: Routing = Routing(self)
        self.trace: Trace = Trace(self)
        self.vcpus: list[Vcpu] = []
        self._ids: dict[int, int] = {}
        self.lock: threading.Lock = threading.Lock()
        self.fast_mmio: FastMmio = bus.fast_mmio
        self.last_host_code = 0
        self._guest_memory: memoryview | None = None
        if config & L.CONFIG_HYPERV:
            self.guest_memory = reserve(DEFAULT_BYTES)

    def __repr__(self) -> str:
        return f"<Machine {len(self.vcpus)} vCPUs, {self.vendor}, kernel {self.kernel}, apicv={self.apicv}>"

    # ----------------------------------------------------------------------------------------------------- state

    def _config(self, bit: int) -> bool:
        return bool(self.mem[L.H_CONFIG] & bit)

    @property
    def kernel(self) -> str:
        """Name of the kernel generation."""
        return self.profile.name

    @property
    def release(self) -> str:
        """The kernel release that was asked for, without a leading v; else the generation's name."""
        return release_of(self.words) or self.profile.name

    @property
    def vendor(self) -> str:
        """Name of the vendor: vmx or svm."""
        return "svm" if self._config(L.CONFIG_SVM) else "vmx"

    @property
    def apicv(self) -> bool:
        """Whether interrupts are posted."""
        return self._config(L.CONFIG_APICV)

    @property
    def guest_memory(self) -> memoryview:
        """The guest's memory from guest-physical address 0 on, for what KVM itself reads and writes there.

        Assign any writable buffer, of which whole pages count; it stays alive with the machine and is in no snapshot.
        By default a private sparse one of 3 GiB, made for Windows guests (hyperv) at once and for others when it is
        first asked for. TypeError or ValueError for what is no writable, contiguous buffer of at least a page. No other
        thread may run exits while another one is assigned: what is replaced may be gone at once.
        """
        if self._guest_memory is None:
            self.guest_memory = reserve(DEFAULT_BYTES)
        assert self._guest_memory is not None
        return self._guest_memory[:]  # of its own: a caller that releases it must not let go of the machine's

    @guest_memory.setter
    def guest_memory(self, buffer: Any) -> None:
        view, address = opened(buffer)
        self.mem[L.H_GUEST_BYTES] = 0  # never the old size with the new address
        self._guest_memory, self.mem[L.H_GUEST_MEMORY] = view, address
        self.mem[L.H_GUEST_BYTES] = view.nbytes // PAGE * PAGE

    @property
    def threads(self) -> bool:
        """Whether shared words are accessed with atomics."""
        return self._config(L.CONFIG_THREADS)

    @property
    def fastpath(self) -> bool:
        """The fast path is on; switch it off to see every exit take the generic path."""
        return self._config(L.CONFIG_FASTPATH)

    @fastpath.setter
    def fastpath(self, on: bool) -> None:
        if on and self.profile is SDM:
            raise ValueError("kernel 'sdm' is the manual, which has no fast path")
        config = self.mem[L.H_CONFIG]
        self.mem[L.H_CONFIG] = config | L.CONFIG_FASTPATH if on else config & ~L.CONFIG_FASTPATH

    @property
    def handlers(self) -> Handlers:
        """Generic exit handlers by exit number; assign to extend or replace."""
        return self.dispatcher.vendor.handlers

    @property
    def inhibits(self) -> set[R.Inhibit]:
        """Reasons for which APICv is off; DISABLED alone on a machine that was made without it."""
        return {reason for reason in R.Inhibit if self.mem[L.H_INHIBITS] >> reason & 1}

    @property
    def avic_physical(self) -> np.ndarray:
        """AVIC's physical APIC id table: a word a vCPU id (regs.AVIC_PHYSICAL_ENTRY), shared with the machine."""
        return self.words[L.AVIC_PHYSICAL : L.AVIC_PHYSICAL + L.AVIC_PHYSICAL_ENTRIES]

    @property
    def avic_logical(self) -> np.ndarray:
        """AVIC's logical APIC id table: 32-bit entries (regs.AVIC_LOGICAL_ENTRY), shared with the machine."""
        return self.words[L.AVIC_LOGICAL : L.TABLES_END].view(np.uint32)

    @property
    def last_accepted(self) -> int:
        """APICs that accepted the IPI of the last set_msr; -1 when the slow scan matched nobody."""
        return (self.last_host_code >> CODE_ACCEPTED_SHIFT & 0xFFFF ^ 0x8000) - 0x8000

    @property
    def targets(self) -> tuple[Target, ...]:
        """Whom the last signal_msi, irq_line, device_interrupt or set_inhibit has effects for, in the order of sending.

        As Vcpu.targets, which has those of a vCPU's exits. Each thread has a list of its own calls (``threads``; 32
        threads at a time, those beyond share one).
        """
        return told(self.mem, self._rows.last)

    # ----------------------------------------------------------------------------------------------- VM ioctls

    def add_vcpu(self, vcpu_id: int) -> Vcpu:
        """KVM_CREATE_VCPU: the new vCPU. It is missing from the APIC map until something makes the map dirty.

        ValueError for an id that is taken, and the map has been rebuilt even so.
        """
        room = offers.room(self.release)
        vcpu_id = integer(vcpu_id, "APIC id", min(room.ids - 1, L.MAX_VCPU_ID))
        with self.lock:
            if len(self.vcpus) >= room.vcpus:
                raise ValueError(f"a VM of kernel {self.release} has at most {room.vcpus} vCPUs (EINVAL)")
            if vcpu_id in self._ids:
                load("refuse_vcpu")(self.handle)
                raise ValueError(f"APIC id {vcpu_id} is taken by vCPU {self._ids[vcpu_id]} (EEXIST)")
            index = load("create_vcpu")(self.handle, vcpu_id)
            if index == L.NONE:
                if len(self.vcpus) < L.MAX_VCPUS:
                    raise ValueError(f"APIC id {vcpu_id} is beyond AVIC's table: EINVAL in kernel {self.kernel}")
                raise ValueError(f"a machine holds at most {L.MAX_VCPUS} vCPUs")
            self._ids[vcpu_id] = index
            v = self._vcpu_class(self, index, vcpu_id)
            self.vcpus.append(v)
        return v

    def boot_x2apic(self) -> None:
        """Every vCPU as a booted x2APIC guest has it: protected mode, EN and EXTD in APICBASE, SVR 0x1FF."""
        for v in self.vcpus:
            if not v.set_msr(R.MSR_APICBASE, v.apic_base | R.APICBASE_EN | R.APICBASE_EXTD):
                raise ValueError("x2APIC cannot be enabled: the guest's CPUID does not offer it (x2apic=False)")
            v.real_mode = False
            v.set_msr(R.MSR_X2APIC_BASE + (R.APIC_SPIV >> 4), 0x1FF)

    def enable_x2apic_api(self, flags: R.X2ApicApi | int) -> None:
        """KVM_ENABLE_CAP of KVM_CAP_X2APIC_API, late: flags are added, and nothing is recomputed because of them.

        ``ENABLE_`` and ``DISABLE_SUPPRESS_EOI_BROADCAST`` replace each other. ValueError where KVM says EINVAL.
        """
        check_api(flags, "split" if self._config(L.CONFIG_SPLIT_IRQCHIP) else "full")
        if flags & offers.LATER_API:
            offers.require(self.release, offers.LATER_API_SINCE, f"x2apic_api={int(flags)}")
        kept = self.mem[L.H_API]
        either = R.X2API_SUPPRESS_EOI | R.X2API_NO_SUPPRESS_EOI
        self.mem[L.H_API] = (kept & ~either if flags & either else kept) | int(flags)

    def set_inhibit(self, reason: R.Inhibit | int, on: bool = True) -> Effect:
        """kvm_set_apicv_inhibit or kvm_clear_apicv_inhibit: Effect.KICK if the host has to kick anybody (``targets``).

        Nothing happens on a machine without APICv, nor for a reason that does not count for its vendor and kernel.
        vCPUs follow at their next entry (Vcpu.apicv). ValueError for a number that is no regs.Inhibit.
        """
        reason = R.Inhibit(integer(reason, "inhibit reason", max(R.Inhibit)))
        self.shared_row()
        return OUTCOMES[load("set_inhibit")(self.handle, int(reason), int(bool(on)))].effects

    def signal_msi(self, address: int, data: int) -> int:
        """KVM_SIGNAL_MSI: number of APICs that accepted, 0, or -1 (EPERM: nobody matched in the slow scan).

        ``address`` is 64 bits, high word included; ValueError where KVM says EINVAL. ``targets`` are those for which
        the host has something to do.
        """
        address = integer(address, "MSI address", L.NONE)
        self.look_at_clock()
        code = load("signal_msi")(self.handle, address, integer(data, "MSI data", 0xFFFF_FFFF), self.host_row())
        if code & CODE_GP:
            raise ValueError(f"MSI address {address:#x}: bits 39:32 must be 0 with 32-bit ids (EINVAL)")
        return OUTCOMES[code].accepted

    def set_gsi_routing(self, entries: Iterable[tuple[Any, ...]]) -> None:
        """KVM_SET_GSI_ROUTING: the whole table anew.

        Each entry is ("ioapic", gsi, pin), ("pic", gsi, chip 0 or 1, pin 0..7), ("msi", gsi, address of 64 bits, data)
        or ("hv_sint", gsi, VP index, SINT). A GSI may have one route to each of the three chips, which are worked in
        the order given, or one of another kind. TypeError or ValueError, in which case the table stays as it was: for
        what is none of these, for chips with irqchip="split", for hv_sint without CONFIG_KVM_HYPERV. A VP index or SINT
        that there is not is found out by irq_line.
        """
        self.routing.set(entries)

    def hyperv_eventfd(self, connection: int) -> Connection:
        """KVM_HYPERV_EVENTFD: SIGNAL_EVENT hypercalls for a connection (24 bits) succeed and are counted.

        ``take()`` says how often, ``close()`` ends it. ValueError for one that has an eventfd already, and where all
        64 places are taken.
        """
        return assign(self, connection)

    @property
    def msr_index_list(self) -> tuple[int, ...]:
        """KVM_GET_MSR_INDEX_LIST as far as the model's MSRs go: what user space saves when it migrates a guest.

        x2APIC registers and IA32_APICBASE have ioctls of their own. Of Hyper-V's those of the APIC, the SynIC but for
        SCONTROL, and the timers but for the first one's CONFIG are not in it, and can be saved all the same.
        """
        known = {R.MSR_TSC, R.MSR_TSC_ADJUST, R.MSR_TSC_DEADLINE, R.MSR_KVM_PV_EOI_EN}
        if self._config(L.CONFIG_KVM_HYPERV):
            known.update(MSRS_LISTED)
            if self.profile.traits & Trait.TSC_INVARIANT:
                known.add(MSR_HV_TSC_INVARIANT_CONTROL)
        return tuple(sorted(known))

    def irq_line(self, gsi: int, level: int, status: bool = True) -> int:
        """KVM_IRQ_LINE_STATUS: the sum of what a GSI's routes say, -1 where none says anything else.

        A pin of the IOAPIC or of a PIC says 1 to a level of 0; to any other how many APICs took the interrupt (a PIC:
        1), 0 where it coalesced with one that waits, or nobody took it, -1 where it is masked, or level-triggered and
        still to be ended. A message and a SINT say -1 to a level of 0; a SINT 1 where it was raised, 0 where its APIC
        is disabled, -1 for an unknown VP index, a SynIC that is not enabled, a SINT that is masked or that there is
        not. A GSI without a route gives -1. With ``status=False`` it is KVM_IRQ_LINE, which says 0 and does not
        follow RTC interrupts (pin 8 of the IOAPIC) to their end. ``targets`` are those for which the host has something
        to do.
        """
        return self.routing.line(gsi, level, status)

    def irqfd(self, gsi: int, resample: bool = False) -> Irqfd:
        """KVM_IRQFD: an eventfd that raises a GSI when it is signalled.

        A plain one pulses its line, or sends its message; a resampling one (KVM_IRQFD_FLAG_RESAMPLE) holds the line up
        until a guest acknowledges the interrupt. ValueError for the latter with irqchip="split".
        """
        return Irqfd(self, gsi, resample)

    def get_irqchip(self, chip: int) -> bytes:
        """KVM_GET_IRQCHIP: 512 bytes, of which the PICs (0 master, 1 slave) fill 16 and the IOAPIC (2) 216.

        ValueError with irqchip="split".
        """
        return chips.get(self, chip)

    def set_irqchip(self, chip: int, data: bytes) -> None:
        """KVM_SET_IRQCHIP of 512 bytes: nothing in them is checked, and what waits at the IOAPIC is delivered.

        ValueError for another length, and with irqchip="split".
        """
        chips.put(self, chip, data)

    def create_pit(self, speaker: bool = True) -> None:
        """KVM_CREATE_PIT2: the PIT at ports 0x40 to 0x43, whose channel 0 is GSI 0; with ``speaker``, port 0x61, too.

        Its timer is one of the machine's (next_timer, set_time). It begins in reinject mode, which AVIC cannot have:
        ``targets`` are those whom the host has to kick. ValueError where there is one already, and without an in-kernel
        PIC.
        """
        pit.create(self, speaker)

    def get_pit(self) -> bytes:
        """KVM_GET_PIT2: 112 bytes, kvm_pit_state2; times in it are the machine's. ValueError where there is no PIT."""
        return pit.get(self)

    def set_pit(self, data: bytes) -> None:
        """KVM_SET_PIT2 of 112 bytes, or KVM_SET_PIT of 72, which leaves the flags alone: counts begin anew.

        ``targets`` are those of a tick whose work was still to be done. ValueError for another length, and where there
        is no PIT.
        """
        pit.put(self, data)

    def reinject_control(self, on: bool) -> None:
        """KVM_REINJECT_CONTROL: ticks that a guest is late for wait for its acknowledgements (on), or are lost.

        ``targets`` are those whom the host has to kick. ValueError where there is no PIT.
        """
        pit.reinject(self, on)

    def set_msr_filter(
        self, default_deny: bool = False, ranges: Iterable[tuple[int, int, Iterable[bool]]] = ()
    ) -> None:
        """KVM_X86_SET_MSR_FILTER. ``ranges`` are (flags, first MSR, one bool an MSR: allowed).

        ``flags`` are regs.MSR_FILTER_READ and _WRITE; the first range that has the MSR decides, ``default_deny`` says
        what becomes of all others; without either there is no filter. At most 16 ranges of 12288 MSRs; one of no MSRs
        is skipped, and one that reaches MSR 0xFFFFFFFF matches nothing, for its end has 32 bits. x2APIC registers are
        never filtered, and fast paths do not ask. ValueError where KVM says EINVAL: denying all by default without a
        range, too.
        """
        offers.require(self.release, offers.MSR_FILTER_SINCE, "set_msr_filter")
        rows = []
        for flags, first, bits in ranges:
            flags = integer(flags, "flags of a filter range", R.MSR_FILTER_READ | R.MSR_FILTER_WRITE)
            allowed = [bool(bit) for bit in bits]
            first = integer(first, "first MSR", 0xFFFF_FFFF)
            if not allowed:
                continue
            if not flags or len(allowed) > L.FILTER_BITMAP_BYTES * 8:
                raise ValueError(f"filter range at {first:#x}: flags {flags}, {len(allowed)} MSRs (EINVAL)")
            rows.append((flags, first, allowed))
        if len(rows) > L.FILTER_RANGES:
            raise ValueError(f"{len(rows)} filter ranges: at most {L.FILTER_RANGES} (EINVAL)")
        if default_deny and not rows:
            raise ValueError("a filter that denies by default needs a range (EINVAL)")
        for i, (flags, first, allowed) in enumerate(rows):
            at = L.FILTER + i * L.FILTER_STRIDE
            self.mem[at + L.FILTER_FLAGS] = flags
            self.mem[at + L.FILTER_BASE] = first
            self.mem[at + L.FILTER_COUNT] = len(allowed)
            packed = np.packbits(allowed, bitorder="little").tobytes().ljust(L.FILTER_BITMAP_BYTES, b"\0")
            self.words[at + L.FILTER_BITMAP : at + L.FILTER_STRIDE] = np.frombuffer(packed, dtype=np.uint64)
        self.mem[L.H_FILTER_RANGES] = len(rows)
        self.mem[L.H_FILTER_DENY] = int(bool(default_deny))

    @property
    def user_space_msr(self) -> R.MsrExit:
        """KVM_CAP_X86_USER_SPACE_MSR: which failing MSR accesses of guests leave to user space."""
        return R.MsrExit(self.mem[L.H_USER_MSR])

    @user_space_msr.setter
    def user_space_msr(self, reasons: int) -> None:
        offers.require(self.release, offers.MSR_FILTER_SINCE, "user_space_msr")
        self.mem[L.H_USER_MSR] = integer(reasons, "user_space_msr", 7)

    # ---------------------------------------------------------------------------------------------------------- time

    @property
    def time(self) -> int:
        """The host's monotonic clock in ns, as ``clock`` says or set_time left it.

        The host's TSC is this times tsc_khz / 10^6, and a guest's is the same until somebody writes it (Vcpu.set_msr,
        set_tsc_khz).
        """
        self.look_at_clock()
        return self.mem[L.H_NOW]

    @property
    def clock_word(self) -> memoryview:
        """The machine's clock as one word of 64 bits that a host may write at any time, from any thread: ns.

        What is due then fires by Vcpu.run_timers and run_timers. That it never goes back, and that it and the guest's
        TSC have 63 bits, is not checked.
        """
        return self.mem[L.H_NOW : L.H_NOW + 1]

    def look_at_clock(self) -> None:
        """Move the machine's clock to what ``clock`` says; each call does it. ValueError beyond 63 bits."""
        if self._clock is not None:
            load("advance_clock")(self.handle, integer(self._clock(), "time of the host's clock", self._latest))

    def host_row(self) -> int:
        """Where a call of no vCPU that this thread makes has its list of targets: ``sender`` for kernels."""
        return self._rows.own()

    def shared_row(self) -> int:
        """The same for a call that nobody else makes meanwhile, such as those that set a chip up."""
        return self._rows.shared()

    def set_time(self, ns: int) -> list[tuple[int, Outcome]]:
        """Move the host's clock; what the timers that are due by then did, as (vCPU index, Outcome) in order.

        An hrtimer, of a local APIC timer or a synthetic one, fires, at the new time, however long ago it was due: its
        outcome tells the host whom to wake, kick or notify. Then the host's threads do their work, such as a tick of
        the PIT: a line for each vCPU that it has effects for, or one of vCPU 0 without any. Then a preemption timer
        that has run out makes its vCPU, if that is in guest mode, exit. Times between are not visited: set them one by
        one (next_timer()) where that matters. No other thread may act on the machine meanwhile. ValueError for a time
        that has passed already, and for one at which it or the guest's TSC has more than 63 bits.
        """
        if self._clock is not None:
            raise ValueError("the machine's time is its clock's: run_timers fires what is due")
        ns, khz = integer(ns, "time"), self.mem[L.H_TSC_KHZ]
        if ns > self._latest:
            too_late = f"time {ns} is later than {self._latest}"
            raise ValueError(f"{too_late}: ns and TSC ticks at {khz} kHz would exceed 63 bits")
        if ns < self.time:
            raise ValueError(f"time {ns} has passed: the clock is at {self.time}")
        self.mem[L.H_NOW] = ns
        self.shared_row()
        happened = []
        while (index := load("due_timer")(self.handle)) != L.NONE:
            outcome = OUTCOMES[load("fire_timer")(self.handle, index)]
            if index // L.MAX_VCPUS < L.HOST_TIMERS:
                vcpu = index & L.MAX_VCPUS - 1
                happened.append((vcpu, for_itself(vcpu, outcome)))
            elif index // L.MAX_VCPUS >= L.HOST_WORK_PIT:
                happened += self._one_each() or [(0, outcome)]
        index = load("hv_timer_exit")(self.handle, 0)
        while index != L.NONE:
            exit = Exit(self.dispatcher.vendor.forced_reason)
            code = self.dispatcher.run_exit(self.vcpus[index], exit)
            happened.append((index, outcome_of(self.mem, index, code)))
            index = load("hv_timer_exit")(self.handle, index)
        return happened

    def run_timers(self) -> list[tuple[int, Outcome]]:
        """Do what is due and is no vCPU's: ticks of the PIT, the IOAPIC's delayed work; as set_time's lines.

        Beside other calls, and by several threads at once, if need be. vCPUs' own timers are Vcpu.run_timers'.
        """
        self.look_at_clock()
        row, happened = self.host_row(), []
        while load("run_machine_timer")(self.handle, row) != L.NONE:
            happened += self._one_each()
        return happened

    def _one_each(self) -> list[tuple[int, Outcome]]:
        """This thread's targets, each with an outcome of its own."""
        return [(one.vcpu, for_itself(one.vcpu, OUTCOMES[one.effect << CODE_EFFECTS_SHIFT])) for one in self.targets]

    def next_machine_timer(self) -> int | None:
        """When run_timers has something to do next, ns, or None."""
        ns = load("next_machine_timer")(self.handle)
        return None if ns == L.NONE else ns

    def next_timer(self) -> int | None:
        """When the next timer is due, ns, or None. A preemption timer counts only while its vCPU is in guest mode."""
        self.look_at_clock()
        ns = load("next_timer")(self.handle)
        return None if ns == L.NONE else ns

    # ----------------------------------------------------------------------------------------- host and its devices

    def host_interrupt(self, cpu: int, vector: int) -> list[int]:
        """The host takes a posted-interrupt vector on a pCPU, outside any guest: indices of the vCPUs that it wakes.

        0xF1 wakes those that block on the pCPU's wake-up list with ON set; 0xF2 comes too late and does nothing.
        """
        cpu, vector = integer(cpu, "pCPU", 0xFFFF_FFFF), integer(vector, "host vector", 0xFF)
        woken: list[int] = []
        if vector != R.POSTED_INTR_WAKEUP_VECTOR:
            return woken
        wake_next = load("pi_wake_next")
        index = wake_next(self.handle, cpu, 0)
        while index != L.NONE:
            woken.append(index)
            index = wake_next(self.handle, cpu, index + 1)
        return woken

    def pi_update_irte(self, host_irq: int, gsi: int, address: int, data: int) -> Irte:
        """The MSI of an assigned device, as routed now: posted to one vCPU if it can be (vtd_pi), else remapped.

        ValueError where KVM refuses the route (EINVAL).
        """
        host_irq, gsi = integer(host_irq, "host interrupt", 0xFFFF_FFFF), integer(gsi, "GSI", 0xFFFF_FFFF)
        address = integer(address, "MSI address", L.NONE)
        return self.irtes.update(host_irq, gsi, address, integer(data, "MSI data", 0xFFFF_FFFF))

    def device_interrupt(self, host_irq: int) -> Outcome:
        """An assigned device raises its interrupt: Path.HARDWARE when it is posted, else KVM delivers the message.

        Effect.NOTIFY: the IOMMU sends ``notification`` of the vCPU that pi_update_irte named, which ``targets`` has.
        """
        self.look_at_clock()
        row = self.host_row()
        code = self.irtes.interrupt(integer(host_irq, "host interrupt", 0xFFFF_FFFF), row)
        return outcome_of(self.mem, row, code)

    # ----------------------------------------------------------------------------------------------- batch door

    def run(self, exits: np.ndarray) -> np.ndarray:
        """Many exits in one compiled call, the GIL released: an array of layout.OUTCOME, one for each exit, in order.

        ``exits`` is a one-dimensional array of dtype layout.EXIT, which says what its fields mean: vcpu, reason, msr,
        info, value, gpa. Results are those of the same exits one at a time; the ``value`` of one that reads nothing
        says whom its effects are for (layout.OUTCOME). ValueError names the first exit that lies outside the machine,
        and then none is run.
        """
        if not isinstance(exits, np.ndarray) or exits.dtype != L.EXIT or exits.ndim != 1:
            raise ValueError(f"exits must be a one-dimensional array of dtype fastexit.EXIT, not {_kind(exits)}")
        self.look_at_clock()
        exits = np.ascontiguousarray(exits)
        n = len(exits)
        outcomes = np.empty(n, dtype=L.OUTCOME)
        if n == 0:
            return outcomes
        source, target = self._open(exits), self._open(outcomes)
        try:
            run = load("run")
            done = run(self.handle, source, target, 0, n)
            if done > n:
                bad = done ^ L.NONE
                raise ValueError(f"exit {bad} is outside the machine: {_describe(exits[bad], len(self.vcpus))}")
            while done < n:
                self._run_in_python(exits[done], outcomes, done)
                done = run(self.handle, source, target, done + 1, n)
            return outcomes
        finally:
            if not declare.JIT:
                declare.unregister(source)
                declare.unregister(target)

    def io_info(self, port: int, length: int = 1, write: bool = False) -> int:
        """``info`` of an I/O instruction's exit record: exit qualification (VMX) or EXITINFO1 (SVM)."""
        access = PortAccess(integer(port, "port", R.IO_PORT), access_size(length), bool(write))
        return self.dispatcher.vendor.io_info(access)

    @staticmethod
    def _open(array: np.ndarray) -> int:
        words = array.view(np.uint64)
        # array.ctypes.data tells the same in twice the time, which short batches feel. That an array has the buffer
        # protocol is in numpy's stubs for Python 3.12 and later alone.
        if words.flags.writeable:
            address = addressof(c_char.from_buffer(words))  # type: ignore[arg-type]
        else:
            address = array.ctypes.data
        if not declare.JIT:
            declare.register(address, words)
        return address

    def _run_in_python(self, record: np.void, outcomes: np.ndarray, at: int) -> None:
        vcpu, reason, msr, info, value = (int(record[name]) for name in ("vcpu", "reason", "msr", "info", "value"))
        if vcpu >= len(self.vcpus):
            raise ValueError(f"exit {at} is outside the machine: {_describe(record, len(self.vcpus))}")
        v, vendor = self.vcpus[vcpu], self.dispatcher.vendor
        if reason in vendor.memory_reasons:
            size, write = info & ~L.MMIO_WRITE, bool(info & L.MMIO_WRITE)
            exit = Exit(reason, value=value, gpa=int(record["gpa"]), size=size, write=write)
        elif reason == vendor.hypercall_reason:
            args = 0, 0, info << 32 | msr, value, 0, 0, int(record["gpa"])
            exit = Exit(reason, args=args, length=vendor.rows[reason].length)
        else:
            exit = Exit(reason, msr, value, info, length=vendor.rows[reason].length)
        code = self.dispatcher.run_exit(v, exit)
        outcomes[at]["code"] = code
        if reason in vendor.memory_reasons:
            is_read = not exit.write
        elif reason == vendor.io_reason:
            is_read = not vendor.io_access(info).write
        else:
            is_read = reason == vendor.rdmsr_reason and (reason != vendor.wrmsr_reason or not info)
        outcomes[at]["value"] = v.read_data if is_read else self.mem[v.own + L.K_TARGETS]

    # ------------------------------------------------------------------------------------------ snapshot and restore

    def snapshot(self) -> bytes:
        """The whole machine as bytes, without its trace. No other thread may act on it meanwhile."""
        return pack(self.words)

    @classmethod
    def restore(
        cls,
        data: bytes,
        costs: Costs | None = None,
        *,
        dispatcher: str = "python",
        clock: Callable[[], int] | None = None,
    ) -> Machine:
        """A machine from its snapshot; ValueError says what is wrong with the bytes.

        The kernel generation is the snapshot's. What it does is what this version of fastexit knows of it, which may be
        more than the version knew that took the snapshot.

        Handlers are the built-in ones; ioeventfds (``fast_mmio``), irqfds and remapping entries of devices are user
        space's, which makes them anew; ``costs``, ``dispatcher`` and ``clock`` are Machine's, which no snapshot has.
        """
        profile = _checked(costs, dispatcher)
        m = cls.__new__(cls)
        m._map_memory()
        unpack(data, m.words)
        m._assemble(profile, dispatcher, clock)
        for index in range(m.mem[L.H_NVCPUS]):
            vcpu_id = m.mem[L.KVM + index * L.KVM_STRIDE + L.K_VCPU_ID]
            m._ids[vcpu_id] = index
            m.vcpus.append(m._vcpu_class(m, index, vcpu_id))
        return m


def _checked(costs: Costs | None, dispatcher: str) -> CostProfile | None:
    """The cost profile of a machine with this dispatcher."""
    if one_of(dispatcher, "dispatcher", ("python", "compiled")) == "compiled" and costs is not None:
        raise ValueError("costs are seen step by step: they need dispatcher='python'")
    return None if costs is None else cost_profile(costs)


def _kind(exits: Any) -> str:
    """What an argument is that should have been an array of exits, in a few words."""
    if not isinstance(exits, np.ndarray):
        return type(exits).__name__
    if exits.dtype == L.EXIT:
        return f"shape {exits.shape}"
    return f"{'another structured dtype' if exits.dtype.names else exits.dtype} {exits.shape}"


def _describe(record: np.void, vcpus: int) -> str:
    if record["vcpu"] >= vcpus:
        return f"vCPU {record['vcpu']} of {vcpus}"
    if record["reason"] in (VmxExit.IO_INSTRUCTION, SvmExit.IO):
        return f"I/O instruction of no size, info {int(record['info']):#x}"
    length = int(record["info"]) & ~L.MMIO_WRITE
    return f"access of {length} bytes to guest-physical address {int(record['gpa']):#x}"


assert _entries.NO_VCPU == L.NONE
