"""The VM's irqchip behind ioctls: lines, chips, routes, irqfds, the PIT, with the face of `fastexit.Machine`.

Models: nothing.
"""

from __future__ import annotations

import errno
import struct
from collections.abc import Iterable
from typing import Any

from fastexit.checks import U32, integer
from fastexit.kvm import ioctl as K
from fastexit.kvm.device import Device

CHIP_BYTES = 512
PIT_BYTES = 112
ROUTE_KINDS = {"ioapic": (3, K.ROUTE_IRQCHIP), "pic": (4, K.ROUTE_IRQCHIP), "msi": (4, K.ROUTE_MSI)}
"""Length and KVM's type of an entry, by kind."""
CHIP_IOAPIC = 2
_ENTRY = struct.Struct("<12I")
_REFUSED = (errno.EINVAL, errno.ENXIO, errno.EEXIST, errno.EBUSY, errno.ENOENT)


class OracleIrqfd:
    """An eventfd that raises a GSI, KVM_IRQFD; ``resample`` has it lowered at the EOI, which is then told."""

    def __init__(self, device: Device, vm: int, gsi: int, resample: bool) -> None:
        self._device = device
        self._vm = vm
        self._gsi = gsi
        self._fds = [device.eventfd() for _ in range(1 + resample)]
        self._resampled = 0
        try:
            self._ask(K.IRQFD_RESAMPLE if resample else 0)
        except BaseException:
            self._release()
            raise

    def _ask(self, flags: int) -> None:
        one = {"fd": self._fds[0], "gsi": self._gsi, "flags": flags, "resamplefd": self._fds[-1]}
        refusable(self._device, self._vm, "KVM_IRQFD", K.IRQFD, K.ffi.new("struct kvm_irqfd *", one))

    def signal(self, count: int = 1) -> None:
        """Writes to the eventfd: one event, whatever is written. A worker of the kernel's may raise the GSI later."""
        self._device.signal(self._vm, self._fds[0], count)

    @property
    def resampled(self) -> int:
        """How often an EOI has signalled the resamplefd."""
        if self._fds[1:]:
            self._resampled += self._device.drain(self._fds[1])
        return self._resampled

    def close(self) -> None:
        """KVM_IRQFD_FLAG_DEASSIGN; twice does no harm."""
        if self._fds:
            try:
                self._ask(K.IRQFD_DEASSIGN)
            finally:
                self._release()

    def _release(self) -> None:
        while self._fds:
            self._device.close(self._fds.pop())


class Chips:
    """The half of `Oracle` that is the VM's irqchip. ValueError, in one line, for what the kernel refuses."""

    device: Device
    fd: int

    def irq_line(self, gsi: int, level: int, *, status: bool = True) -> int:
        """KVM_IRQ_LINE_STATUS: its status; without ``status`` KVM_IRQ_LINE, which tells none: 0."""
        level = K.ffi.cast("uint32_t", level)
        line = K.ffi.new("struct kvm_irq_level *", {"irq": integer(gsi, "GSI", U32), "level": level})
        self._refusable("KVM_IRQ_LINE", K.IRQ_LINE_STATUS if status else K.IRQ_LINE, line)
        return int(K.ffi.cast("int32_t", line.irq)) if status else 0

    def get_irqchip(self, chip: int) -> bytes:
        """KVM_GET_IRQCHIP: 512 bytes. Chips 0 and 1 are the PICs, 2 is the IOAPIC."""
        one = K.ffi.new("struct kvm_irqchip *", {"chip_id": integer(chip, "chip", U32)})
        self._refusable("KVM_GET_IRQCHIP", K.GET_IRQCHIP, one)
        return bytes(K.ffi.buffer(one.chip))

    def get_irqchips(self) -> list[bytes]:
        """KVM_GET_IRQCHIP of all three chips, in one go where the kernel is far away."""
        asked = [K.ffi.new("struct kvm_irqchip *", {"chip_id": chip}) for chip in range(CHIP_IOAPIC + 1)]
        self.device.calls(self.fd, [(K.GET_IRQCHIP, one) for one in asked])
        return [bytes(K.ffi.buffer(one.chip)) for one in asked]

    def set_irqchip(self, chip: int, data: bytes) -> None:
        """KVM_SET_IRQCHIP of 512 bytes."""
        if len(data) != CHIP_BYTES:
            raise ValueError(f"a chip's state is {CHIP_BYTES} bytes, not {len(data)}")
        one = K.ffi.new("struct kvm_irqchip *", {"chip_id": integer(chip, "chip", U32), "chip": list(data)})
        self._refusable("KVM_SET_IRQCHIP", K.SET_IRQCHIP, one)

    def set_gsi_routing(self, entries: Iterable[tuple[Any, ...]]) -> None:
        """KVM_SET_GSI_ROUTING: the whole table anew, as `fastexit.Machine.set_gsi_routing` takes it."""
        rows = [_row(i, entry) for i, entry in enumerate(entries)]
        table = K.ffi.from_buffer(struct.pack("<II", len(rows), 0) + b"".join(rows))
        self._refusable("KVM_SET_GSI_ROUTING", K.SET_GSI_ROUTING, table)

    def irqfd(self, gsi: int, resample: bool = False) -> OracleIrqfd:
        """KVM_IRQFD with an eventfd of its own."""
        return OracleIrqfd(self.device, self.fd, integer(gsi, "GSI", U32), resample)

    def create_pit(self, speaker: bool = True) -> None:
        """KVM_CREATE_PIT2."""
        config = K.ffi.new("struct kvm_pit_config *", {"flags": K.PIT_SPEAKER if speaker else 0})
        self._refusable("KVM_CREATE_PIT2", K.CREATE_PIT2, config)

    def get_pit(self) -> bytes:
        """KVM_GET_PIT2: 112 bytes."""
        state = K.ffi.new("struct kvm_pit_state2 *")
        self._refusable("KVM_GET_PIT2", K.GET_PIT2, state)
        return bytes(K.ffi.buffer(state))

    def set_pit(self, data: bytes) -> None:
        """KVM_SET_PIT2 of 112 bytes."""
        if len(data) != PIT_BYTES:
            raise ValueError(f"the PIT's state is {PIT_BYTES} bytes, not {len(data)}")
        state = K.ffi.new("struct kvm_pit_state2 *")
        K.ffi.memmove(state, data, PIT_BYTES)
        self._refusable("KVM_SET_PIT2", K.SET_PIT2, state)

    def reinject_control(self, reinject: bool) -> None:
        """KVM_REINJECT_CONTROL: whether ticks that nobody has acknowledged come again."""
        one = K.ffi.new("struct kvm_reinject_control *", {"pit_reinject": bool(reinject)})
        self._refusable("KVM_REINJECT_CONTROL", K.REINJECT_CONTROL, one)

    def _refusable(self, name: str, request: int, argument: Any) -> None:
        refusable(self.device, self.fd, name, request, argument)


def refusable(device: Device, fd: int, name: str, request: int, argument: Any) -> None:
    """An ioctl whose refusals are ValueErrors."""
    try:
        device.call(fd, request, argument)
    except OSError as error:
        if error.errno not in _REFUSED:
            raise
        raise ValueError(f"{name}: {errno.errorcode[error.errno]}") from error


def _row(i: int, entry: tuple[Any, ...]) -> bytes:
    """One entry as KVM has it: struct kvm_irq_routing_entry."""
    kind, gsi, *rest = entry
    if kind == "hv_sint":
        return _ENTRY.pack(gsi, K.ROUTE_HV_SINT, 0, 0, *rest, *[0] * 6)
    length, number = ROUTE_KINDS.get(kind, (0, 0))
    if len(entry) != length:
        raise ValueError(f"GSI routing entry {i}: {entry!r} is none")
    if kind == "msi":
        address, data = rest
        return _ENTRY.pack(gsi, number, 0, 0, address & U32, address >> 32, data, *[0] * 5)
    chip = CHIP_IOAPIC if kind == "ioapic" else rest[0]
    return _ENTRY.pack(gsi, number, 0, 0, chip, rest[-1], *[0] * 6)
