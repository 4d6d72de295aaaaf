"""Guest programs of the VMX lab on the model: each step as the CPU and KVM carry it out, then whatever follows from it.

Models: the CPU of each vCPU as far as interrupts go (delivery, handlers that end them, IRET), and the host's CPUs
(notifications, kicks, threads that wake up). What KVM does is the model's.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from fastexit import layout as L
from fastexit import regs as R
from fastexit.checks import quoted
from fastexit.kvm.lab import vmxcode as C
from fastexit.kvm.lab.vmxguest import UD_INFO, GuestCpus
from fastexit.kvm.lab.vmxsteps import VMXON_POINTER_AT, Step
from fastexit.machine import Machine
from fastexit.outcome import Effect, GeneralProtection
from fastexit.reasons import VmxExit

HOST = "host"
EVENTS = " events"
"""End of the name of a mode whose programs send NMI, SMI, INIT and SIPI."""
IMMEDIATE_PORT = 1 << 6
"""Bit of an I/O exit's qualification: the instruction itself names the port."""
TSC_KHZ = 50_000
BOOTED_NS = 1_000_000_000


@dataclass(frozen=True)
class Setup:
    """What a program's VM is: the same for model and kernel."""

    vcpus: int = 2
    apicv: bool = True
    x2apic: bool = True
    split: bool = False
    eoi: bool = True
    """Handlers end their interrupt."""
    events: bool = False
    """vCPUs may be sent NMI, SMI, INIT and SIPI."""
    paged: bool = False
    """They have paging, and what else it takes to enter VMX operation."""

    @property
    def mode(self) -> str:
        """Mode of its APICs, and whether its programs are those with events: what reports count by."""
        return ("x2apic" if self.x2apic else "xapic") + EVENTS * self.events

    @property
    def eoi_mode(self) -> int:
        """How handlers end an interrupt."""
        return C.NO_EOI if not self.eoi else C.X2APIC_EOI if self.x2apic else C.XAPIC_EOI


@dataclass
class Seen:
    """What a program did: results by step, notes, trace lines of each thread, pages."""

    results: dict[int, tuple[int, int, int]] = field(default_factory=dict)
    """Step -> what faulted (0: nothing), EAX, EDX; registers only where the step reads something."""
    notes: list[list[tuple[int, int]]] = field(default_factory=list)
    """For each vCPU (step, vector) of the interrupts that it took."""
    lines: dict[str, list[str]] = field(default_factory=dict)
    calls: list[Any] = field(default_factory=list)
    """What user space's calls returned."""
    pages: list[bytes] = field(default_factory=list)
    asleep: list[bool] = field(default_factory=list)


def told(context: str, line: str) -> str:
    """A line and whether interrupts were off, which is the fast path's signature."""
    return f"{'d' if context[:1] in 'dD' else '.'} {line}"


class Player:
    """A program on the model, step by step."""

    def __init__(self, setup: Setup, kernel: str, **settings: Any) -> None:
        self.setup = setup
        irqchip = "split" if setup.split else "full"
        self.machine: Machine = Machine(
            setup.vcpus,
            kernel=kernel,
            vendor="vmx",
            apicv=setup.apicv,
            irqchip=irqchip,
            tsc_khz=TSC_KHZ,
            smm=True,
            threads=False,
            **settings,
        )
        self.machine.set_time(BOOTED_NS)
        self.seen: Seen = Seen(
            notes=[[] for _ in range(setup.vcpus)],
            lines={name: [] for name in (*(f"v{i}" for i in range(setup.vcpus)), HOST)},
            asleep=[False] * setup.vcpus,
        )
        self.masked: list[bool] = [i != C.OPEN for i in range(setup.vcpus)]
        self.waits: list[bool] = [False] * setup.vcpus
        """Which vCPUs wait for SIPI."""
        self.cpus: GuestCpus = GuestCpus(self.machine, setup.paged)
        self.baton: int = 0
        self._due: deque[tuple[int, Effect]] = deque()
        self._begin()

    def _begin(self) -> None:
        m = self.machine
        for v in m.vcpus:
            v.set_mp_state(R.MP_RUNNABLE)
            v.real_mode = False
            if self.setup.x2apic:
                v.set_msr(R.MSR_APICBASE, v.apic_base | R.APICBASE_EXTD)
            page = bytearray(v.get_lapic())
            page[R.APIC_SPIV : R.APIC_SPIV + 4] = (0x1FF).to_bytes(4, "little")
            v.set_lapic(bytes(page))
        self.prepared: list[bytes] = [v.get_lapic() for v in m.vcpus]
        for v in m.vcpus:
            v.rflags = R.RFLAGS_FIXED
            v.run()
            if not self.setup.x2apic:
                v.hw_mmio_read(R.APIC_LVR)
            self._out(v.index, C.PORT_READY)
        m.trace.clear()
        m.trace.enable()
        for v in m.vcpus:
            self._act(v.index, v.run)
            self._set_flags(v.index)
        self._settle()

    # ------------------------------------------------------------------------------------------------------ steps

    def step(self, step: Step) -> None:
        """One step and all that comes of it."""
        v = self.machine.vcpus[step.vcpu]
        number = self.baton
        result: tuple[int, int, int] = (0, 0, 0)
        if step.kind == "wrmsr":
            outcome = self._act(v.index, lambda: v.hw_wrmsr(*step.args))
            result = (C.FAULTED_GP if outcome.fault else 0, 0, 0)
        elif step.kind == "rdmsr":
            result = self._read(v.index, lambda: v.hw_rdmsr(step.args[0]), wide=True)
        elif step.kind == "store":
            offset, value, length = step.args
            self._act(v.index, lambda: v.hw_mmio_write(offset, value & (1 << 8 * length) - 1, length))
        elif step.kind == "load":
            offset, before, length = step.args
            _, low, _ = self._read(v.index, lambda: v.hw_mmio_read(offset, length))
            mask = (1 << 8 * length) - 1
            result = (0, before & ~mask | low & mask, 0)
        elif step.kind in ("sti", "cli"):
            self.masked[v.index] = step.kind == "cli"
            self._set_flags(v.index)
        elif step.kind == "halt":
            self.baton += 1
            self._halt(v.index)
        elif step.kind == "deadline":
            value = (self.machine.time * TSC_KHZ // 1_000_000) + step.args[0]
            outcome = self._act(v.index, lambda: v.hw_wrmsr(R.MSR_TSC_DEADLINE, value))
            result = (C.FAULTED_GP if outcome.fault else 0, 0, 0)
        elif step.kind == "vmcall":
            number_of_call, a0, a1, a2, a3 = step.args
            self._act(v.index, lambda: v.hypercall(number_of_call, a0, a1, a2, a3, bits64=False))
            result = (0, v.read_data & 0xFFFF_FFFF, 0)
        elif step.kind == "spend":
            self._spend(step.args[0])
        elif step.kind in ("vmxon", "vmxoff"):
            self.baton += step.passes_first
            reason, at = (VmxExit.VMON, VMXON_POINTER_AT) if step.kind == "vmxon" else (VmxExit.VMOFF, 0)
            self._act(v.index, lambda: v.exit(reason, info1=at))
            result = self.cpus.results[v.index]
            if step.passes_first and result[0]:
                raise ValueError(f"vCPU {v.index} is not in VMX operation, and a fault has nowhere to go on")
        elif step.kind == "host":
            self._host(v.index, step.args)
        else:
            raise ValueError(f"no step {quoted(step.kind)}")
        if self.waits[v.index] and not step.passes_first and step.kind != "host":
            raise ValueError(f"vCPU {v.index} begins anew before it has passed the baton on")
        self.seen.results[number] = result
        self._settle()
        self.baton = number + 1

    def _read(self, i: int, read: Callable[[], int], wide: bool = False) -> tuple[int, int, int]:
        try:
            value = self._act(i, read)
        except GeneralProtection:
            return C.FAULTED_GP, 0, 0
        return 0, value & 0xFFFF_FFFF, value >> 32 if wide else 0

    def _halt(self, i: int) -> None:
        v = self.machine.vcpus[i]
        self.masked[i] = False
        v.rflags = R.RFLAGS_FIXED | R.RFLAGS_IF
        outcome = self._act(i, lambda: v.exit(VmxExit.HLT))
        self.seen.asleep[i] = outcome.blocked

    def _host(self, i: int, calls: tuple[tuple[Any, ...], ...]) -> None:
        """Calls while the vCPU is outside; it enters again when their effects on others are over."""
        v = self.machine.vcpus[i]
        self._out(i, C.PORT_HOST)
        for who, name, *arguments in calls:
            target: Any = self.machine if who < 0 else self.machine.vcpus[who]
            self.seen.calls.append(self._act(HOST, partial(getattr(target, name), *arguments)))
            effects = self.machine.targets if who < 0 else target.targets
            self._due += [(t.vcpu, t.effect) for t in effects]
        self._settle()
        self.baton += 1
        self._act(i, v.run)

    def _spend(self, ticks: int) -> None:
        m = self.machine
        m.trace.clear()
        happened = m.set_time(m.time + ticks * 1_000_000 // TSC_KHZ)
        self._sort()
        for index, outcome in happened:
            self._due += [(index, effect) for effect in Effect if effect & outcome.effects]

    def end(self) -> Seen:
        """The end: whoever runs leaves, pages are looked at."""
        for v in self.machine.vcpus:
            if not self.seen.asleep[v.index]:
                self._out(v.index, C.PORT_DONE)
        self.machine.trace.disable()
        self.seen.pages = [v.get_lapic() for v in self.machine.vcpus]
        return self.seen

    # ---------------------------------------------------------------------------------------- what follows from it

    def _act(self, who: int | str, action: Callable[[], Any]) -> Any:
        """Does something in a vCPU's thread: its trace lines are that thread's."""
        trace = self.machine.trace
        trace.clear()
        if isinstance(who, int):
            v = self.machine.vcpus[who]
            self.machine.mem[v.own + L.K_INTERRUPT] = 0
        try:
            return action()
        finally:
            thread = who if isinstance(who, str) else f"v{who}"
            self.seen.lines[thread] += [told(line.context, line.text) for line in trace.lines_of(trace.drain())]
            if isinstance(who, int):
                self._due += [(t.vcpu, t.effect) for t in self.machine.vcpus[who].targets]
                if self.machine.vcpus[who].real_mode:
                    self._begin_anew(who)

    def _begin_anew(self, i: int) -> None:
        """A vCPU took an INIT: it waits for SIPI, or goes on with its next step, in protected mode.

        ValueError where it would run where it has no code.
        """
        v = self.machine.vcpus[i]
        if v.smm:
            return
        self.waits[i] = self.machine.mem[v.own + L.K_MP_STATE] == R.MP_INIT_RECEIVED
        self.cpus.able[i] = False
        self.seen.asleep[i] = self.waits[i]
        if self.waits[i] or v.mode == R.OUTSIDE_GUEST_MODE:
            return
        if v.cs >> 8 != C.startup_vector(i):
            raise ValueError(f"vCPU {i} has no code where it begins")
        self._act(i, lambda: v.exit(VmxExit.CR_ACCESS))
        self.masked[i] = i != C.OPEN
        self._set_flags(i)

    def _sort(self) -> None:
        """Lines of what happened by itself, each to the thread of its vCPU."""
        trace = self.machine.trace
        for line in trace.lines_of(trace.drain()):
            thread = f"v{line.vcpu}" if line.vcpu >= 0 else HOST
            self.seen.lines[thread].append(told(line.context, line.text))

    def _out(self, i: int, port: int) -> None:
        v = self.machine.vcpus[i]
        info = R.VMX_IO.encode({"SIZE": 0, "IN": 0, "PORT": port}) | IMMEDIATE_PORT
        self._act(i, lambda: v.exit(VmxExit.IO_INSTRUCTION, info1=info, size=1))

    def _set_flags(self, i: int) -> None:
        self.machine.vcpus[i].rflags = R.RFLAGS_FIXED | R.RFLAGS_IF * (not self.masked[i])

    def _settle(self) -> None:
        """Notifications, kicks and wake-ups until there are none, and every interrupt that a guest can take."""
        while True:
            while self._due:
                self._follow(*self._due.popleft())
            # An INIT that a vCPU takes on its way in makes a new APIC map: whom that kicks, no exit tells.
            self._due += [(v.index, Effect.KICK) for v in self.machine.vcpus if v.mode == R.EXITING_GUEST_MODE]
            if self._due:
                continue
            if not any([self._deliver(i) for i in range(self.setup.vcpus)]) and not self._due:
                return

    def _follow(self, i: int, effect: Effect) -> None:
        v = self.machine.vcpus[i]
        if effect == Effect.WAKE and self.seen.asleep[i]:
            self._wake(i)
        elif effect == Effect.NOTIFY:
            if v.notification.vector == R.POSTED_INTR_WAKEUP_VECTOR:
                for woken in self.machine.host_interrupt(v.notification.cpu, R.POSTED_INTR_WAKEUP_VECTOR):
                    self._wake(woken)
            else:
                v.hw_notify()
        elif effect == Effect.KICK and v.mode != R.OUTSIDE_GUEST_MODE:
            self._act(i, lambda: v.exit(VmxExit.EXTERNAL_INTERRUPT))

    def _wake(self, i: int) -> None:
        self.seen.asleep[i] = not self._act(i, self.machine.vcpus[i].run)

    def _deliver(self, i: int) -> bool:
        """Lets a vCPU take one interrupt, if it can: whether it did."""
        v = self.machine.vcpus[i]
        if self.seen.asleep[i] or v.mode == R.OUTSIDE_GUEST_MODE:
            return False
        if v.smm:
            self._act(i, lambda: v.exit(VmxExit.EXCEPTION_NMI, intr_info=UD_INFO))
            return True
        if v.nmi_masked:
            self._nmi(i)
            return True
        vector = v.injected
        if vector is None and not self.masked[i]:
            if v.irq_window:
                self._act(i, lambda: v.exit(VmxExit.INTERRUPT_WINDOW))
                return True
            vector = v.hw_deliver() if v.apicv else None
        if vector is None:
            return False
        self.machine.mem[v.own + L.K_INTERRUPT] = 0
        self.seen.notes[i].append((self.baton, vector))
        v.rflags = R.RFLAGS_FIXED
        if self.setup.eoi:
            if self.setup.x2apic:
                self._act(i, lambda: v.hw_wrmsr(R.MSR_X2APIC_BASE + (R.APIC_EOI >> 4), 0))
            else:
                self._act(i, lambda: v.hw_mmio_write(R.APIC_EOI, 0))
        self._set_flags(i)
        return True

    def _nmi(self, i: int) -> None:
        """The NMI's handler, to its IRET: NMIs get in again, and KVM may have asked to be told of that."""
        v = self.machine.vcpus[i]
        self.seen.notes[i].append((self.baton, R.VECTOR_NMI))
        self.machine.mem[v.own + L.K_NMI_MASKED] = 0
        self._set_flags(i)
        if v.nmi_window:
            self._act(i, lambda: v.exit(VmxExit.NMI_WINDOW))
