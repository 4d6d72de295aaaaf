"""Find the device that answers to a guest-physical address or to a port; what none claims is user space's.

Models: vcpu_mmio_write and vcpu_mmio_read, which ask the vCPU's own APIC first and then kvm_io_bus; KVM_FAST_MMIO_BUS;
kernel_pio. kernels/bus.py is the compiled twin, and says what is not modelled. A device is a row of ``Bus.devices`` or
of ``Bus.ports``.
"""

from __future__ import annotations

from collections.abc import Iterator, MutableSet
from typing import TYPE_CHECKING, Protocol

from fastexit import layout as L
from fastexit.checks import integer
from fastexit.jit.declare import load

if TYPE_CHECKING:
    from fastexit.vcpu import Vcpu

NOT_MINE = L.NONE
"""Result of a device's access to an address that is not its own."""


class Device(Protocol):
    """What kvm_iodevice_ops are: an access's outcome code, or NOT_MINE. What was read is v.read_data.

    ``gpa`` is the port of a device that has ports.
    """

    def write(self, v: Vcpu, gpa: int, size: int, value: int) -> int: ...

    def read(self, v: Vcpu, gpa: int, size: int) -> int: ...


class LocalApic:
    """The xAPIC page of the vCPU that accesses it, at its APICBASE."""

    def __init__(self, handle: int) -> None:
        self.handle = handle

    def write(self, v: Vcpu, gpa: int, size: int, value: int) -> int:
        """apic_mmio_write."""
        return load("mmio_write")(self.handle, v.index, gpa, size, value)

    def read(self, v: Vcpu, gpa: int, size: int) -> int:
        """apic_mmio_read."""
        return load("mmio_read")(self.handle, v.index, gpa, size)


class IoApic:
    """The IOAPIC's page, with a full irqchip."""

    def __init__(self, handle: int) -> None:
        self.handle = handle

    def write(self, v: Vcpu, gpa: int, size: int, value: int) -> int:
        """ioapic_mmio_write."""
        return load("ioapic_write")(self.handle, v.index, gpa, size, value)

    def read(self, v: Vcpu, gpa: int, size: int) -> int:
        """ioapic_mmio_read."""
        return load("ioapic_read")(self.handle, v.index, gpa, size)


class PicPair:
    """Ports 0x20, 0x21, 0xA0, 0xA1, 0x4D0 and 0x4D1, with a full irqchip."""

    def __init__(self, handle: int) -> None:
        self.handle = handle

    def write(self, v: Vcpu, gpa: int, size: int, value: int) -> int:
        """picdev_write."""
        return load("pic_write")(self.handle, v.index, gpa, size, value)

    def read(self, v: Vcpu, gpa: int, size: int) -> int:
        """picdev_read."""
        return load("pic_read")(self.handle, v.index, gpa, size)


class Pit:
    """Ports 0x40 to 0x43, and 0x61 if it was given to the PIT."""

    def __init__(self, handle: int) -> None:
        self.handle = handle

    def write(self, v: Vcpu, gpa: int, size: int, value: int) -> int:
        """pit_ioport_write, speaker_ioport_write."""
        return load("pit_write")(self.handle, v.index, gpa, size, value)

    def read(self, v: Vcpu, gpa: int, size: int) -> int:
        """pit_ioport_read, speaker_ioport_read."""
        return load("pit_read")(self.handle, v.index, gpa, size)


class FastMmio(MutableSet[int]):
    """Addresses of the ioeventfds without a length, a set: m.fast_mmio.add(0xFEB0_0000). ValueError for a 129th one."""

    def __init__(self, memory: memoryview) -> None:
        self._memory = memory

    def _all(self) -> list[int]:
        first = L.H_FAST_MMIO_GPA
        return self._memory[first : first + self._memory[L.H_FAST_MMIO]].tolist()

    def __contains__(self, gpa: object) -> bool:
        return gpa in self._all()

    def __iter__(self) -> Iterator[int]:
        return iter(self._all())

    def __len__(self) -> int:
        return self._memory[L.H_FAST_MMIO]

    def __repr__(self) -> str:
        return f"{{{', '.join(map(hex, self._all()))}}}"

    def add(self, value: int) -> None:
        """KVM_IOEVENTFD with length 0: a guest's access there needs no emulator, and a write tells user space."""
        gpa = integer(value, "guest-physical address")
        if gpa in self:
            return
        n = len(self)
        if n == L.FAST_MMIO:
            raise ValueError(f"at most {L.FAST_MMIO} fast-MMIO ioeventfds (ENOSPC)")
        self._memory[L.H_FAST_MMIO_GPA + n] = gpa
        self._memory[L.H_FAST_MMIO] = n + 1

    def discard(self, value: int) -> None:
        """KVM_IOEVENTFD with KVM_IOEVENTFD_FLAG_DEASSIGN."""
        left = [gpa for gpa in self if gpa != value]
        for i, gpa in enumerate(left):
            self._memory[L.H_FAST_MMIO_GPA + i] = gpa
        self._memory[L.H_FAST_MMIO] = len(left)

    def write(self, _v: Vcpu, gpa: int, _size: int, _value: int) -> int:
        """ioeventfd_write, of an access that went through the emulator all the same."""
        return 0 if gpa in self else NOT_MINE

    def read(self, _v: Vcpu, _gpa: int, _size: int) -> int:
        """Nobody can read an ioeventfd."""
        return NOT_MINE


class Bus:
    """One machine's devices, in the order in which KVM asks them."""

    def __init__(self, memory: memoryview, handle: int) -> None:
        self.fast_mmio: FastMmio = FastMmio(memory)
        self.devices: list[Device] = [LocalApic(handle), IoApic(handle), self.fast_mmio]
        self.ports: list[Device] = [PicPair(handle), Pit(handle)]

    def write(self, v: Vcpu, gpa: int, size: int, value: int) -> int:
        """vcpu_mmio_write."""
        return _write(self.devices, v, gpa, size, value)

    def read(self, v: Vcpu, gpa: int, size: int) -> int:
        """vcpu_mmio_read."""
        return _read(self.devices, v, gpa, size)

    def io_write(self, v: Vcpu, port: int, size: int, value: int) -> int:
        """kernel_pio of an OUT."""
        return _write(self.ports, v, port, size, value)

    def io_read(self, v: Vcpu, port: int, size: int) -> int:
        """kernel_pio of an IN."""
        return _read(self.ports, v, port, size)


def _write(devices: list[Device], v: Vcpu, gpa: int, size: int, value: int) -> int:
    """kvm_io_bus_write: the code of the first device that claims the access, or NOT_MINE."""
    for device in devices:
        code = device.write(v, gpa, size, value)
        if code != NOT_MINE:
            return code
    return NOT_MINE


def _read(devices: list[Device], v: Vcpu, gpa: int, size: int) -> int:
    """kvm_io_bus_read."""
    for device in devices:
        code = device.read(v, gpa, size)
        if code != NOT_MINE:
            return code
    return NOT_MINE
