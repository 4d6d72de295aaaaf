"""Real x86 code on Unicorn, with fastexit as the local APICs of its CPUs.

    machine = fastexit.Machine(vcpus=2)
    host = UnicornHost(machine, memory=1 << 20)
    host.load(0x1000, code)
    host.cpus[0].start(0x1000, rsp=0x8000)
    host.run(until=lambda host: host.memory[0x500] == 1)

WRMSR, RDMSR, the xAPIC page, the IOAPIC's, ports, HLT, MOV CR8 and CPUID of the guest go to the machine; what it
delivers goes through the guest's own IDT. CPUs take turns, so that a run is the same each time. Time goes by
instructions.
"""

from __future__ import annotations

import ctypes
import mmap
import weakref
from collections.abc import Callable
from enum import Enum

from fastexit.adapters.unicorn import firmware as firmware
from fastexit.checks import integer
from fastexit.machine import Machine

try:
    import unicorn as _unicorn  # noqa: F401
except ImportError:
    raise ImportError("unicorn is not installed: pip install unicorn") from None

from fastexit.adapters.unicorn.cpu import UnicornCpu
from fastexit.adapters.unicorn.devices import Devices
from fastexit.adapters.unicorn.fault import GuestError
from fastexit.adapters.unicorn.gate import idt
from fastexit.adapters.unicorn.hook import Native, Stop, native
from fastexit.adapters.unicorn.interrupts import Counters

__all__ = ["Counters", "Devices", "Ended", "GuestError", "Stop", "UnicornCpu", "UnicornHost", "idt"]

PAGE = 0x1000
MOST_MEMORY = 0xFEC0_0000
_HAVE_A_HOST: weakref.WeakSet[Machine] = weakref.WeakSet()
"""Two hosts would move the same clock, and each believe that its CPUs have what a vCPU was given."""


class Ended(Enum):
    """Why UnicornHost.run returned. IDLE: every CPU sleeps, and no timer runs."""

    UNTIL = "until"
    INSTRUCTIONS = "instructions"
    IDLE = "idle"


class UnicornHost:
    """CPUs of a Machine as Unicorn engines, one each, with the same memory.

    Args:
        machine: whose vCPUs they are, as many as it has now. From now on this host alone moves its clock; it has no
            other host.
        memory: bytes of guest memory from address 0, whole pages.
        quantum: instructions a CPU does before it is the next one's turn; an IPI to a CPU that runs arrives no later.
        mips: million instructions a second of each CPU, by which the machine's clock goes.
        devices: what is at ports and addresses where the machine has none; nobody by default.

    ``memory`` is the guest's memory, ``cpus`` the CPUs. CPUs run at the same time as far as the clock goes: a round of
    slices takes as long as its longest slice, and the clock stands still within it; RDTSC does not.
    TypeError or ValueError for what cannot be; ImportError where unicorn is missing or too old.
    """

    def __init__(
        self,
        machine: Machine,
        memory: int = 1 << 20,
        *,
        quantum: int = 1000,
        mips: int = 1000,
        devices: Devices | None = None,
    ) -> None:
        if not isinstance(machine, Machine):
            raise TypeError(f"machine is {type(machine).__name__}, not a fastexit.Machine")
        if machine in _HAVE_A_HOST:
            raise ValueError("the machine has a host already: make another machine")
        self.memory_bytes: int = integer(memory, "memory", MOST_MEMORY)
        if not memory or memory % PAGE:
            raise ValueError(f"memory {memory:#x} is not a whole number of pages of {PAGE:#x} bytes")
        for name, value in (("quantum", quantum), ("mips", mips)):
            if not integer(value, name, 1_000_000_000):
                raise ValueError(f"{name} 0: at least 1")
        self.machine = machine
        self.quantum = quantum
        self.mips = mips
        self.devices: Devices = devices or Devices()
        self.native: Native = native()
        self._block = mmap.mmap(-1, memory)
        self.memory: memoryview[int] = memoryview(self._block)
        self.memory_address: int = ctypes.addressof(ctypes.c_char.from_buffer(self._block))
        self._firmware = mmap.mmap(-1, firmware.BYTES)
        self._firmware[:] = bytes(firmware.image())
        self._firmware_view = memoryview(self._firmware)
        self.firmware_address: int = ctypes.addressof(ctypes.c_char.from_buffer(self._firmware))
        self.clock: int = 0
        self._running = False
        self._began = machine.time
        self.cpus: list[UnicornCpu] = [UnicornCpu(self, index) for index in range(len(machine.vcpus))]
        _HAVE_A_HOST.add(machine)

    def __repr__(self) -> str:
        return f"<UnicornHost {len(self.cpus)} CPUs, {self.memory_bytes:#x} bytes, {self.clock} instructions>"

    # -------------------------------------------------------------------------------------------------------- memory

    def load(self, address: int, data: bytes) -> None:
        """Put bytes into guest memory. Code that a CPU has run already is forgotten; ValueError beyond the memory."""
        try:
            view = memoryview(data).cast("B")
        except TypeError:
            raise TypeError(f"data is {type(data).__name__}, not bytes") from None
        address = integer(address, "address")
        if address + len(view) > self.memory_bytes:
            raise ValueError(f"{len(view):#x} bytes at {address:#x} are beyond the guest's {self.memory_bytes:#x}")
        self.memory[address : address + len(view)] = view
        self.flush()

    def flush(self) -> None:
        """Forget translated code. Needed where one CPU changes code that another has run already."""
        for cpu in self.cpus:
            cpu.uc.ctl_flush_tb()

    def physical(self, address: int, size: int) -> memoryview | None:
        """The memory at a physical address, or None where there is none."""
        if address + size <= self.memory_bytes:
            return self.memory[address : address + size]
        if firmware.BASE <= address and address + size <= firmware.BASE + firmware.BYTES:
            return self._firmware_view[address - firmware.BASE : address - firmware.BASE + size]
        return None

    def write_firmware(self, address: int, data: bytes) -> None:
        """For CPUs that start."""
        self._firmware[address - firmware.BASE : address - firmware.BASE + len(data)] = data

    # ------------------------------------------------------------------------------------------------------- running

    def ns(self, instructions: int) -> int:
        """How long so many instructions take."""
        return instructions * 1000 // self.mips

    def poke(self) -> None:
        """Sleeping CPUs look again. For what the machine is told from outside: signal_msi and the like."""
        for cpu in self.cpus:
            cpu.poked = True

    def run(self, until: Callable[[UnicornHost], object] | None = None, *, instructions: int | None = None) -> Ended:
        """Let the CPUs run, round by round, until ``until(host)`` is true, they sleep for good or time is up.

        ``instructions``: how far the clock goes, in instructions of one CPU. GuestError names the CPU that cannot go
        on, and why; RuntimeError in a device's callback.
        """
        if until is not None and not callable(until):
            raise TypeError(f"until is {type(until).__name__}, not a function of the host")
        goal = None if instructions is None else self.clock + integer(instructions, "instructions")
        if not any(cpu.started for cpu in self.cpus):
            raise ValueError("no CPU has been started: host.cpus[0].start(address)")
        if self._running:
            raise RuntimeError("a CPU is running: a device's callback cannot run the host again")
        self.poke()
        while True:
            if until is not None and until(self):
                return Ended.UNTIL
            if goal is not None and self.clock >= goal:
                return Ended.INSTRUCTIONS
            budget = self._budget(goal)
            done = self._round(budget)
            if done:
                self._advance(done)
            elif all(cpu.asleep and not cpu.poked or not cpu.started for cpu in self.cpus):
                ahead = self._until_timer()
                if ahead is None:
                    return Ended.IDLE
                self._advance(ahead if goal is None else min(ahead, goal - self.clock))

    def _round(self, budget: int) -> int:
        """A slice of each CPU that does not sleep; instructions of the longest one."""
        done = 0
        self._running = True
        try:
            for cpu in self.cpus:
                if (cpu.poked or not cpu.asleep) and cpu.state != "not started":
                    mine = cpu.slice(budget)
                    done = max(done, mine)
                    if cpu.put_off:  # the round ends early, for whoever comes behind it
                        budget = mine
        finally:
            self._running = False
        return done

    def _budget(self, goal: int | None) -> int:
        budget = self.quantum if goal is None else min(self.quantum, goal - self.clock)
        ahead = self._until_timer()
        return budget if ahead is None else min(budget, ahead)

    def _until_timer(self) -> int | None:
        """Instructions until the next timer is due, at least one; None without a timer."""
        due = self.machine.next_timer()
        if due is None:
            return None
        return max(1, -(-(due - self._began) * self.mips // 1000) - self.clock)

    def _advance(self, instructions: int) -> None:
        self.clock += instructions
        if self.machine.set_time(max(self.machine.time, self._began + self.ns(self.clock))):
            self.poke()
