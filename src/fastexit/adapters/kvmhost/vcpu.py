"""One vCPU on the real KVM: its thread, KVM_RUN, and the exits that are the host's whoever has the irqchip.

Models: nothing. The subclass says what happens between two runs: modelled.py has fastexit for an irqchip, `KernelVcpu`
has KVM's own.
"""

from __future__ import annotations

import errno
import threading
from abc import ABC, abstractmethod
from collections import Counter
from typing import TYPE_CHECKING, Any

from fastexit.adapters.kvmhost.emulate import complete, instruction, refused
from fastexit.adapters.kvmhost.kick import Kick
from fastexit.adapters.kvmhost.pace import Pace
from fastexit.adapters.kvmhost.power import Ended
from fastexit.adapters.kvmhost.registers import Registers
from fastexit.kvm import ioctl as K
from fastexit.reasons import KvmExit

if TYPE_CHECKING:
    from fastexit.adapters.kvmhost.host import KvmHost

FAILED = 2
"""Exit code of a guest that this KVM, or this host, cannot go on with."""
TRIPLE_FAULT = 1
EMULATION = 1
"""KVM_INTERNAL_ERROR_EMULATION."""


class HostVcpu(ABC):
    """A vCPU of a KvmHost. ``exits`` counts KVM_RUN's returns by their reason, ``kicked`` those by a signal."""

    def __init__(self, host: KvmHost, index: int, fd: int, kvm_run: Any) -> None:
        self.host: KvmHost = host
        self.index: int = index
        self.fd: int = fd
        self.kvm_run: Any = kvm_run
        self.registers: Registers = Registers(self.fd)
        self.kick: Kick = Kick()
        self.pace: Pace = Pace()
        self.exits: Counter[KvmExit] = Counter()
        self.kicked: int = 0
        self.thread: threading.Thread = threading.Thread(target=self._main, name=f"vcpu{index}", daemon=True)
        self._run_area: Any = K.ffi.cast("char *", self.kvm_run)

    def closed(self) -> None:
        """Its VM is closed: ``kvm_run`` is a copy, what would be an ioctl is OSError (EBADF) from now on."""
        self.fd = self.registers.fd = K.CLOSED
        self.kvm_run = K.ffi.new("struct kvm_run *", self.kvm_run[0])
        self._run_area = K.ffi.cast("char *", self.kvm_run)

    def _main(self) -> None:
        host = self.host
        try:
            self.kick.attach(self.fd)
            while host.ended is None:
                self.turn()
        except BaseException as error:
            host.fail(error)
        finally:
            self.kick.detach()

    @abstractmethod
    def turn(self) -> None:
        """What is due between two runs, and a run with its exit."""

    def enter(self) -> bool:
        """KVM_RUN: False where a kick ended it, or it did not begin."""
        try:
            K.call(self.fd, K.RUN)
        except InterruptedError:
            self.kicked += 1
            return False
        except OSError as error:
            if error.errno == errno.EAGAIN:  # a vCPU that waits for its SIPI in the kernel
                return False
            raise
        return True

    def common(self, reason: int) -> bool:
        """An exit that is the same for any irqchip; False where it is none of those."""
        if reason == KvmExit.IO:
            self._ports()
        elif reason == KvmExit.MMIO:
            self._memory()
        elif reason == KvmExit.SHUTDOWN:
            self.host.end(Ended(f"triple fault of vCPU {self.index}", TRIPLE_FAULT, self.registers.describe()))
        elif reason == KvmExit.SYSTEM_EVENT:
            self.host.end(Ended("system event", 0))
        elif reason == KvmExit.INTERNAL_ERROR:
            self._internal_error()
        elif reason == KvmExit.FAIL_ENTRY:
            why = int(self.kvm_run.fail_entry.reason)
            self.host.end(Ended(f"entry of vCPU {self.index} failed, reason {why:#x}", FAILED))
        else:
            return False
        return True

    def _ports(self) -> None:
        io = self.kvm_run.io
        size, port, out = int(io.size), int(io.port), bool(io.direction)
        data = K.ffi.buffer(self._run_area + io.data_offset, size * io.count)
        for at in range(0, size * int(io.count), size):
            if out:
                self.port_write(port, size, int.from_bytes(data[at : at + size], "little"))
            else:
                data[at : at + size] = self.port_read(port, size).to_bytes(size, "little")

    def _memory(self) -> None:
        mmio = self.kvm_run.mmio
        data, size, at = K.ffi.buffer(mmio.data), int(mmio.len), int(mmio.phys_addr)
        if mmio.is_write:
            self.memory_write(at, size, int.from_bytes(data[0:size], "little"))
        else:
            data[0:size] = self.memory_read(at, size).to_bytes(size, "little")

    def port_read(self, port: int, size: int) -> int:
        """IN: what the guest gets."""
        return self.host.ports.read(port, size)

    def port_write(self, port: int, size: int, value: int) -> None:
        """OUT."""
        self.host.ports.write(port, size, value)

    @abstractmethod
    def memory_read(self, at: int, size: int) -> int:
        """A read of what is no memory."""

    @abstractmethod
    def memory_write(self, at: int, size: int, value: int) -> None:
        """A write to what is no memory."""

    def _internal_error(self) -> None:
        """An instruction that this KVM's emulator does not have is done here, if it is one of a few."""
        internal = self.kvm_run.internal
        code = b""
        if internal.suberror == EMULATION:
            code = refused(internal) or instruction(self.host.memory, self.fd, int(self.registers.read().rip))
            done = complete(self.registers, code, self.fd) if self.host.slow else None
            if done is not None:
                self.host.completed[done] += 1
                return
        self.host.end(
            Ended(
                f"KVM cannot emulate what vCPU {self.index} does",
                FAILED,
                f"suberror {internal.suberror}, {code.hex(' ') or 'no memory'} at {self.registers.describe()}",
            )
        )


class KernelVcpu(HostVcpu):
    """A vCPU whose APIC is KVM's own, for comparison."""

    def turn(self) -> None:
        """KVM_RUN, and its exit."""
        self.kick.taken()
        if self.host.ended is not None or not self.enter():
            return
        reason = int(self.kvm_run.exit_reason)
        self.exits[KvmExit(reason)] += 1
        if not self.common(reason) and reason != KvmExit.HLT:
            self.host.end(Ended(f"vCPU {self.index} left with {KvmExit(reason).name}", FAILED))

    def memory_read(self, at: int, size: int) -> int:
        """Nobody answers: all ones."""
        return (1 << 8 * size) - 1

    def memory_write(self, at: int, size: int, value: int) -> None:
        """Nobody takes it."""
