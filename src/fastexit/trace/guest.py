"""One VM of a trace on a Machine: its first state, its vCPUs, and what reaches them from outside."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import ClassVar, NamedTuple

from fastexit import regs as R
from fastexit.machine import Machine
from fastexit.trace.accesses import Lane
from fastexit.trace.doors import Doing, Door
from fastexit.trace.events import TIMED, Event
from fastexit.trace.generations import Generations
from fastexit.trace.guestvcpu import UNTOLD, GuestVcpu
from fastexit.trace.report import DoorUse, Mismatch, Mismatches, VmReport
from fastexit.trace.stimerlines import StimerLines
from fastexit.trace.threads import Vm

DEVICE = "device thread"
"""Cause of an accept line: a thread that is no vCPU."""
_UNTOLD = 1 << 12
MOST_ASSUMPTIONS = 50
"""So many assumptions about a VM are said one by one; the rest is counted."""


class Recorded(NamedTuple):
    """Which events the trace has at all; what was not recorded cannot differ."""

    ipis: bool
    accepts: bool
    msrs: bool = True
    events: frozenset[str] = frozenset()
    """Names of all events that occur."""


class Guest:
    """One VM of the trace on a Machine.

    ``lanes`` has a lane for each vCPU id, ``mismatches`` is where differences go, ``recorded`` says what can differ;
    ``hv_timer`` is None where the trace's lines say whether the host used the VMX preemption timer; ``kernels`` are
    asked what they take fast.
    """

    def __init__(
        self,
        vm: Vm,
        *,
        kernel: str,
        vendor: str,
        apicv: bool,
        hv_timer: bool | None,
        recorded: Recorded,
        mismatches: Mismatches,
        kernels: Sequence[str] | None = None,
    ) -> None:
        ids = list(vm.vcpus)
        irqchip = "split" if vm.split else "full"
        api = R.X2API_32BIT_IDS | R.X2API_NO_BROADCAST_QUIRK if max(ids) > 0xFE else 0
        threads = {vcpu: str(clues.task) if clues else "" for vcpu, clues in vm.vcpus.items()}
        self.report: VmReport = VmReport(vm.number, threads, irqchip, assumptions=list(vm.assumed))
        self.recorded = recorded
        self._unsaid = 0
        self.machine: Machine = Machine(
            apic_ids=ids,
            kernel=kernel,
            vendor=vendor,
            apicv=apicv,
            irqchip=irqchip,
            x2apic_api=api,
            hyperv=vm.hyperv,
            threads=False,
        )
        self.report.hyperv, self.report.windows = vm.hyperv, vm.windows
        if vm.synic:
            for v in self.machine.vcpus:
                v.enable_synic(2)
        self.windows: bool = vm.hyperv or vm.windows
        self.pic_pins: set[int] = set()
        self.trapped: int = 0
        self.by_decimal: int = 0
        self._decide_hv_timer(vm, hv_timer, vendor)
        self.generations: Generations = Generations(self.machine, ids, irqchip, api, self.report.hv_timer, kernels)
        self.stimers: StimerLines = StimerLines(self)
        self.lanes: dict[int, Lane] = {}
        self._mismatches = mismatches
        self.vcpus: list[GuestVcpu] = [GuestVcpu(self, v) for v in self.machine.vcpus]
        for vcpu in self.vcpus:
            self.lanes[vcpu.v.vcpu_id] = vcpu.lane
        self.report.start = self._start(vm)

    def _decide_hv_timer(self, vm: Vm, told: bool | None, vendor: str) -> None:
        """Whether the host can use the preemption timer, and who says so."""
        report = self.report
        if vendor == "svm":
            report.hv_timer, report.hv_timer_from = False, "vendor"
        elif told is not None:
            report.hv_timer, report.hv_timer_from = told, "option"
        elif vm.hv_timer is not None:
            report.hv_timer, report.hv_timer_from = vm.hv_timer, "trace"
        else:
            report.hv_timer, report.hv_timer_from = True, "assumed"  # as KVM does on VMX, unless it is switched off
        if vm.hv_timer is not None and vm.hv_timer is not report.hv_timer:
            self.assume(
                f"the host {'used' if report.hv_timer else 'did not use'} the VMX preemption timer, against the "
                "kvm_hv_timer_state lines of the trace"
            )

    def _start(self, vm: Vm) -> str:
        """Puts every APIC into the state that the trace implies; says what that was."""
        on: list[str] = []
        running: list[str] = []
        known = [clues for clues in vm.vcpus.values() if clues]
        modes = [clues.x2apic for clues in known if clues.x2apic is not None]
        states = [clues.running for clues in known if clues.running is not None]
        for vcpu in self.vcpus:
            clues = vm.vcpus[vcpu.v.vcpu_id]
            if not vm.was_reset(vcpu.v.vcpu_id):
                x2apic = clues.x2apic if clues and clues.x2apic is not None else all(modes)
                enabled = bool(clues.running) if clues else bool(states) and all(states)
                if x2apic:
                    vcpu.put_into_mode(True)
                    on.append(str(vcpu.v.vcpu_id))
                if enabled:
                    running.append(str(vcpu.v.vcpu_id))
                vcpu.load(clues.registers if clues else {}, enabled)
            # A VMM loads each APIC after creating it, which also brings the last vCPU into the map.
            vcpu.v.set_lapic(vcpu.v.get_lapic())
        parts = []
        if on:
            guess = "" if modes else ", as no line tells"
            parts.append(f"x2APIC mode on for vCPU {', '.join(on)} before the first line{guess}")
        if running:
            logical = "" if len(on) == len(self.vcpus) else ", xAPIC logical id 1 << vCPU in the flat model"
            parts.append(f"vCPU {', '.join(running)} already running with SVR 0x1ff{logical}")
        return "assumed: " + "; ".join(parts) if parts else "reset"

    def accept(self, line: int, event: Event, source: str) -> None:
        """An interrupt that is no IPI: counted by cause, and raised in the model so that IRR stays right."""
        if not self.recorded.ipis and source == UNTOLD:
            self.report.other_accepts["unknown, as kvm_apic_ipi was not recorded"] += 1
            return
        if event.b & R.ICR_DM > R.DM_LOWEST << R.ICR_DM_SHIFT:
            self.report.other_accepts[f"{R.DeliveryMode(event.b >> R.ICR_DM_SHIFT & 7).name} from outside"] += 1
            return
        self.report.other_accepts[source] += 1
        if event.a in self.lanes:
            self.raise_irq(event.a, event.b)

    def raise_irq(self, vcpu: int, data: int) -> None:
        """An MSI to one vCPU; ``data`` has vector, delivery and trigger mode."""
        self.machine.signal_msi(vcpu >> 8 << 40 | R.APIC_DEFAULT_PHYS_BASE | (vcpu & 0xFF) << 12, data)

    def differs(self, line: int, event: str, recorded: str, predicted: str) -> None:
        """One more mismatch."""
        self._mismatches.add(Mismatch(line, event, self.report.number, recorded, predicted))

    def assume(self, what: str) -> None:
        """One more assumption; a damaged trace may need one at every line, and the first of them say enough."""
        if len(self.report.assumptions) < MOST_ASSUMPTIONS:
            self.report.assumptions.append(what)
        else:
            self._unsaid += 1

    def finish(self) -> VmReport:
        """The VM's report, complete."""
        report = self.report
        report.host_eois = sum(lane.traced_eois - lane.guest_eois for lane in self.lanes.values() if lane.traced_eois)
        if self._unsaid:
            report.assumptions.append(f"{self._unsaid:,} more things like these, left out here")
        if report.taken_back:
            report.assumptions.append(
                f"{report.taken_back:,} ICR values are taken back from kvm_apic_ipi lines, as the writes were not "
                "recorded: these lines agree by construction"
            )
        if self.trapped:
            report.assumptions.append(
                f"the destinations of {self.trapped:,} ICR writes behind which the CPU trapped are those of their "
                "kvm_apic_ipi lines: a write of ICR2 does not exit there"
            )
        if self.by_decimal:
            report.assumptions.append(
                f"{self.by_decimal:,} kvm_hv_send_ipi lines show their vector in decimal, where KVM prints hex"
            )
        if n := report.doors[Doing.IPI, Door.UNTOLD]:
            report.assumptions.append(
                f"{n:,} ICR writes went to the synthetic MSR 0x40000071 rather than to 0x830: kvm:kvm_msr was not "
                "recorded, and the guest is a Windows, as its RIPs or other lines say"
            )
        report.door_uses = self._door_uses()
        report.generations = self.generations.result()
        if report.deadlines:
            report.deadline_fast = self.generations.deadline_fast()
            report.deadline_with_timer = self.generations.deadline_with_timer()
            if report.hv_timer_from == "assumed":
                report.assumptions.append(
                    "the host used the VMX preemption timer, as the trace has no kvm_hv_timer_state line"
                )
        return report

    def _door_uses(self) -> list[DoorUse]:
        """Each door with what the generations take fast of it, the most used first."""
        uses = []
        for (doing, door), n in self.report.doors.most_common():
            exits = door is not Door.ASSIST
            if doing is Doing.IPI:
                fast = self.generations.ipis_fast(door)
            elif doing in (Doing.EOI, Doing.TPR, Doing.TIMER) and exits:
                fast = dict.fromkeys(self.generations.fast_at_door(doing, door), n)
            else:
                fast = {}
            uses.append(DoorUse(doing, door, n, fast, exits))
        return uses


class Device:
    """A thread that is no vCPU, as a sink: it delivers interrupts and nothing else."""

    def __init__(self, guest: Guest) -> None:
        self._guest = guest
        self._untold: deque[tuple[int, int]] = deque(maxlen=_UNTOLD)

    def accept(self, line: int, event: Event, source: str) -> None:
        if not source and event.b & R.ICR_DM <= R.DM_LOWEST << R.ICR_DM_SHIFT:
            self._untold.append((line, event.b & R.ICR_VECTOR))
        self._guest.accept(line, event, source or DEVICE)

    def raised(self, vector: int, source: str, since: int) -> None:
        causes = self._guest.report.other_accepts
        n = sum(line > since and one == vector for line, one in self._untold)
        if n:
            causes[DEVICE] -= n
            causes[source] += n
            self._guest.report.other_accepts = +causes
        self._untold.clear()

    def pic(self, pin: int) -> None:
        self._guest.pic_pins.add(pin)

    def hyperv(self, line: int, event: Event) -> None:
        """A synthetic timer's hrtimer fires on any thread."""
        if event.name in TIMED:
            self._guest.stimers.seen(line, event)

    def nothing(self, *args: object) -> None:
        """Whatever else such a thread shows."""

    write: ClassVar[Callable[..., None]] = nothing
    read: ClassVar[Callable[..., None]] = nothing
    eoi: ClassVar[Callable[..., None]] = nothing
    silent_eoi: ClassVar[Callable[..., None]] = nothing
    inject: ClassVar[Callable[..., None]] = nothing
    apicbase: ClassVar[Callable[..., None]] = nothing
    deadline: ClassVar[Callable[..., None]] = nothing
    call: ClassVar[Callable[..., None]] = nothing
    synthetic: ClassVar[Callable[..., None]] = nothing
    count: ClassVar[Callable[..., None]] = nothing
    ran: ClassVar[Callable[..., None]] = nothing
    reached: ClassVar[Callable[..., None]] = nothing
