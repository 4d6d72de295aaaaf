"""KvmHost: a machine whose vCPUs the real /dev/kvm runs, and whose interrupts are fastexit's.

Models: nothing; it is the VMM round the model: memory, serial port, firmware, a thread for each vCPU.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import fastexit as fx
from fastexit import hyperv as HV
from fastexit import offers
from fastexit import regs as R
from fastexit.adapters.kvmhost import acpi, cpuid, linux, multiboot
from fastexit.adapters.kvmhost.clock import Clock, Tsc
from fastexit.adapters.kvmhost.clockwork import Clockwork
from fastexit.adapters.kvmhost.firmware import CMOS_INDEX, FW_CFG, Cmos, FwCfg, configuration
from fastexit.adapters.kvmhost.gate import Gate
from fastexit.adapters.kvmhost.memory import MIB, Memory
from fastexit.adapters.kvmhost.modelled import ModelVcpu
from fastexit.adapters.kvmhost.ports import Ports
from fastexit.adapters.kvmhost.power import Ended, Power
from fastexit.adapters.kvmhost.probe import sees_deadlines
from fastexit.adapters.kvmhost.record import Recorder
from fastexit.adapters.kvmhost.registers import Start
from fastexit.adapters.kvmhost.serial import Serial
from fastexit.adapters.kvmhost.slow import SLOWER, is_slow
from fastexit.adapters.kvmhost.testdevice import SINTS, LineDevice, SintDevice
from fastexit.adapters.kvmhost.tracefile import TraceFile
from fastexit.adapters.kvmhost.vcpu import HostVcpu, KernelVcpu
from fastexit.adapters.kvmhost.vm import Vm
from fastexit.checks import integer, one_of
from fastexit.jit import declare
from fastexit.kvm import ioctl as K
from fastexit.kvm import oracle
from fastexit.kvm.device import LOCAL, Device
from fastexit.profile import NEWEST

IRQCHIPS = "fastexit", "kernel"
MOST_VCPUS = 64
PANIC = b"Kernel panic - not syncing"
KEPT = 4096
"""Bytes of the console's end that are kept."""
PINS = 24
OWN = frozenset((R.MSR_APICBASE, R.MSR_TSC, R.MSR_TSC_ADJUST, R.MSR_TSC_DEADLINE))
ROUTES: list[tuple[object, ...]] = [
    entry
    for gsi in range(PINS)
    for entry in ([("pic", gsi, gsi >> 3, gsi & 7), ("ioapic", gsi, gsi)] if gsi < 16 else [("ioapic", gsi, gsi)])
]
"""KVM's own: each line to its pin of the IOAPIC, the first 16 to the PICs, too."""


class KvmHost:
    """A PC with ``vcpus`` CPUs; a context manager, and `close`d at the end.

    Args:
        vcpus: 1 to 64. memory: bytes of it.
        irqchip: "fastexit", or "kernel", which is KVM's own, for comparison.
        console: takes what the guest writes to its serial port.
        x2apic, deadline: whether the guest's CPUID offers x2APIC and the TSC-deadline timer; None: if this KVM lets
            user space see that one.
        hyperv: the guest's CPUID has Hyper-V's leaves, and their MSRs are the model's.
        slow: this KVM emulates ring 0: its gaps are filled, and the guest's time goes slower. None: found out.
        settings: of `fastexit.Machine`: kernel, vendor, apicv and others.

    ``machine`` is the model, ``vcpus`` are the CPUs.
    """

    machine: fx.Machine
    recorder: Recorder

    def __init__(
        self,
        vcpus: int = 1,
        *,
        memory: int = 256 * MIB,
        irqchip: str = "fastexit",
        console: Callable[[bytes], object] = lambda _: None,
        x2apic: bool = True,
        deadline: bool | None = None,
        hyperv: bool = False,
        slow: bool | None = None,
        device: Device = LOCAL,
        **settings: Any,
    ) -> None:
        count = integer(vcpus, "number of vCPUs", MOST_VCPUS)
        if not count:
            raise ValueError("a machine needs at least one vCPU")
        self.in_kernel: bool = one_of(irqchip, "irqchip", IRQCHIPS) == "kernel"
        if hyperv and self.in_kernel:
            raise ValueError("hyperv: the synthetic interrupts of this host are the model's: irqchip='fastexit'")
        self.ended: Ended | None = None
        self.trace: TraceFile | None = None
        self.completed: Counter[str] = Counter()
        """Instructions that the host did for a KVM that does not have them."""
        self.unknown_msrs: Counter[int] = Counter()
        """MSRs that neither KVM nor the model knows: the guest got #GP."""
        self.written: bytes = b""
        """The end of what the guest wrote to its serial port."""
        self._console = console
        self._panicked = False
        self._over = threading.Event()
        self._error: BaseException | None = None
        self._lock = threading.Lock()
        self.gate: Gate = Gate(alone=not declare.JIT)
        self.slow: bool = is_slow(device) if slow is None else slow
        if deadline is None:
            deadline = self.in_kernel or sees_deadlines(device)
        self.memory: Memory = Memory(memory)
        self.vcpus: list[HostVcpu] = []
        self.vm: Vm = Vm(self.memory, in_kernel=self.in_kernel, hyperv=hyperv, device=device)
        try:
            self._create(count, x2apic, deadline, hyperv, settings)
        except BaseException:
            self.vm.close()
            raise

    def _create(self, count: int, x2apic: bool, deadline: bool, hyperv: bool, settings: dict[str, Any]) -> None:
        """CPUs, clock, model and devices."""
        table = cpuid.supported(self.vm.device, self.vm.system)
        if hyperv:
            oracle.add_hyperv(table, HV.ALL_FEATURES)
        files = [self.vm.vcpu(index) for index in range(count)]
        slower = SLOWER if self.slow else 1
        self.tsc: Tsc = Tsc(files[0][0], self.vm.device)
        self.clock: Clock = Clock(self.tsc)
        for index, (fd, _) in enumerate(files):
            made = cpuid.guest(
                table,
                index,
                count,
                x2apic=x2apic,
                deadline=deadline,
                in_kernel=self.in_kernel,
                tsc_khz=self.tsc.khz * SLOWER if self.slow else 0,
            )
            K.call(fd, K.SET_CPUID2, made)
        self._connect(slower)
        if self.in_kernel:
            self.vcpus = [KernelVcpu(self, index, *made) for index, made in enumerate(files)]
            return
        self.machine = fx.Machine(
            vcpus=count,
            clock=self.clock,
            tsc_khz=self.tsc.khz,
            x2apic=x2apic,
            tsc_deadline=deadline,
            hyperv=hyperv,
            **{"dispatcher": "compiled", "apicv": False, "hv_timer": False, **_bus(slower, settings), **settings},
        )
        self.machine.guest_memory = memoryview(self.memory.bytes)[: self.memory.low]
        self.machine.create_pit()
        self.recorder = Recorder(self.machine)
        self.clockwork: Clockwork = Clockwork(self)
        self.vcpus = [ModelVcpu(self, index, *made) for index, made in enumerate(files)]
        self._hyperv = hyperv
        if hyperv:
            for v in self.machine.vcpus:
                v.enable_synic(version=2)
            self.ports.add(SintDevice(self.machine, self.line, ROUTES), SINTS, 4)

    def _connect(self, slower: int) -> None:
        """Devices on the guest's bus."""
        self.ports: Ports = Ports()
        self.serial: Serial = Serial(self._write, lambda level: self.line(acpi.COM1_IRQ, level))
        self.ports.add(self.serial, acpi.COM1, 8)
        self.ports.add(Cmos(self.memory), CMOS_INDEX, 2)
        Power(self.end, lambda: self.clock() // slower).connect(self.ports)
        LineDevice(self.line).connect(self.ports)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<KvmHost {len(self.vcpus)} vCPUs, {self.ended.reason if self.ended else 'running'}>"

    # -------------------------------------------------------------------------------------- what devices and CPUs ask

    def line(self, gsi: int, level: int) -> None:
        """A device's interrupt line, from any thread."""
        if self.in_kernel:
            self.vm.irq_line(gsi, level)
            return
        with self.gate:
            self.machine.irq_line(gsi, level)
            targets = self.machine.targets
        for vcpu, _ in targets:
            self.vcpus[vcpu].kick.kick()
        self.clockwork.look()

    def models_msr(self, msr: int) -> bool:
        """Whether an MSR that KVM leaves to user space is the model's."""
        x2apic = R.MSR_X2APIC_BASE <= msr < R.MSR_X2APIC_BASE + 0x100
        return x2apic or msr in OWN or (self._hyperv and 0x4000_0000 <= msr < 0x4000_0200)

    def _write(self, data: bytes) -> None:
        self.written = (self.written + data)[-KEPT:]
        if data == b"\n" and PANIC in self.written[-256:]:
            self._panicked = True
        self._console(data)

    # -------------------------------------------------------------------------------------------------- what it runs

    def load(self, image: bytes, command: str = "", initrd: bytes | None = None) -> None:
        """A Linux kernel (bzImage or vmlinux) or a multiboot program; ValueError for what is neither, or is damaged."""
        rsdp = acpi.install(self.memory, range(len(self.vcpus)))
        self.ports.add(FwCfg(configuration(self.memory, len(self.vcpus))), FW_CFG, 2)
        if multiboot.header(image) is not None and not linux.is_vmlinux(image):
            self.start(multiboot.load(image, self.memory, command, initrd))
        else:
            self.start(linux.load(image, self.memory, command, initrd=initrd, rsdp=rsdp))

    def start(self, start: Start) -> None:
        """Where the boot CPU begins; the others wait for INIT and SIPI."""
        for vcpu in self.vcpus:
            base = R.APIC_DEFAULT_PHYS_BASE | R.APICBASE_EN | (0 if vcpu.index else R.APICBASE_BSP)
            vcpu.registers.begin(start if vcpu.index == 0 else RESET, base)

    def record(self, path: Path) -> TraceFile:
        """The machine's tracepoints go to a file from now on, one exit after the other; before `run`.

        ValueError where the irqchip is KVM's, whose tracepoints are tracefs's.
        """
        if self.in_kernel:
            raise ValueError("a trace of KVM's own irqchip is tracefs's to give: trace-cmd record -e kvm")
        self.trace = TraceFile(path, self.machine, self.clock)
        self.gate.serialise(self.trace.drain)
        return self.trace

    def type(self, data: bytes) -> None:
        """Bytes for the guest's serial port."""
        with self.gate:  # before the port's own lock, as a vCPU that accesses it
            self.serial.receive(data)

    def run(self, seconds: float | None = None) -> Ended:
        """Lets the guest run until it ends, or for so long: why it is over. In the thread that ^C goes to.

        RuntimeError in a thread of its own.
        """
        self._outside()
        try:
            for thread in self._threads():
                thread.start()
            self._over.wait(seconds)
        except BaseException:
            self.end(Ended("interrupted", 130))
            raise
        finally:
            self.end(Ended("time is up", 0))
            self._stop()
        if self._error is not None:
            raise self._error
        assert self.ended is not None
        return self.ended

    def _threads(self) -> list[threading.Thread]:
        threads = [vcpu.thread for vcpu in self.vcpus]
        return threads if self.in_kernel else [*threads, self.clockwork.thread]

    def end(self, why: Ended) -> None:
        """The guest is over. The first reason counts."""
        with self._lock:
            if self.ended is None:
                if self._panicked and why.reason == "reset":
                    why = Ended("panic", 1)
                self.ended = why
        self._over.set()
        for vcpu in self.vcpus:
            vcpu.kick.kick()
        if not self.in_kernel and self.vcpus:
            self.clockwork.look()

    def fail(self, error: BaseException) -> None:
        """A thread of the host's cannot go on."""
        with self._lock:
            self._error = self._error or error
        self.end(Ended("error", 2))

    def _stop(self) -> None:
        for thread in self._threads():
            while thread.ident is not None and thread.is_alive():
                thread.join(0.5)

    def close(self) -> None:
        """Ends the guest if it runs, and gives back files and memory. RuntimeError in a thread of its own."""
        self._outside()
        self.end(Ended("closed", 0))
        if self.vcpus:
            self._stop()
        trace, self.trace = self.trace, None  # whoever is interrupted does not begin again
        try:
            if trace is not None:
                trace.close()
        finally:
            self.vm.close()
            for vcpu in self.vcpus:
                vcpu.closed()

    def _outside(self) -> None:
        """Who waits for the guest's threads may be none of them: a device's callback, for one."""
        if self.vcpus and threading.current_thread() in self._threads():
            raise RuntimeError("a thread of the guest's own cannot wait for its end: use end()")


RESET = Start(16, 0xFFF0)


def _bus(cycle_ns: int, settings: dict[str, Any]) -> dict[str, int]:
    """The bus cycle of a machine, if its kernel can have any but KVM's own."""
    older = offers.lacks(settings.get("kernel", NEWEST), offers.BUS_CYCLES_SINCE)
    return {} if older else {"bus_cycle_ns": cycle_ns}
