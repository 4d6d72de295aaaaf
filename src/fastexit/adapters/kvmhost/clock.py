"""The machine's time: nanoseconds that go as the guest's TSC does.

Models: nothing. A guest's TSC is the CPU's, moved; the model's TSC is its clock times a frequency. So the clock is the
guest's TSC divided by that frequency, and a deadline in the guest's TSC is due on the model's clock when it is due on
the guest's. Where the CPUs' TSCs are not to be trusted, KVM moves a guest's at every entry, after a clock of the
kernel's: there a deadline means how long it is from now on, by the TSC that the guest sees now.
"""

from __future__ import annotations

import mmap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cffi import FFI

from fastexit.kvm import ioctl as K
from fastexit.kvm.device import LOCAL, Device
from fastexit.regs import MSR_TSC

RDTSC = bytes.fromhex("0f31 48c1e220 4809d0 c3")
"""RDTSC; SHL RDX, 32; OR RAX, RDX; RET."""
NS_PER_MS, LEAST_NS = 1_000_000, 200_000
TSC_CONTROL, TSC_OFFSET = 0, 0
"""KVM_VCPU_TSC_CTRL and its attribute, from Linux 5.16 on."""
CLOCKSOURCE = Path("/sys/devices/system/clocksource/clocksource0/current_clocksource")
U64 = (1 << 64) - 1


def is_steady(device: Device) -> bool:
    """Whether the host's kernel goes by its CPUs' TSCs itself; if it does not, KVM may move those of its guests."""
    return (device.text(CLOCKSOURCE) or "").strip() == "tsc"


_PAGE: list[mmap.mmap] = []
"""RDTSC as code, of the process: a function made of it keeps no page, and stays with whoever holds a machine."""


def _rdtsc() -> Callable[[], int]:
    """Read the CPU's TSC. OSError where nobody may run code of his own."""
    if not _PAGE:
        page = mmap.mmap(-1, mmap.PAGESIZE, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
        page.write(RDTSC)
        _PAGE.append(page)
    ffi: Any = FFI()
    read: Callable[[], int] = ffi.cast("unsigned long (*)(void)", ffi.from_buffer(_PAGE[0]))
    return read


class Tsc:
    """The host's TSC; ``begin`` is what it was when the vCPU's was 0, and still is while the host is ``steady``."""

    def __init__(self, fd: int, device: Device = LOCAL) -> None:
        self.steady: bool = is_steady(device)
        self._told = False
        self.khz: int = K.call(fd, K.GET_TSC_KHZ)
        try:
            self.read: Callable[[], int] = _rdtsc()
        except OSError:
            self.read = lambda: time.clock_gettime_ns(time.CLOCK_MONOTONIC_RAW) * self.khz // NS_PER_MS
        self._offset = K.ffi.new("uint64_t *")
        self._attribute = K.ffi.new("struct kvm_device_attr *", {"group": TSC_CONTROL, "attr": TSC_OFFSET})
        self._attribute.addr = int(K.ffi.cast("uintptr_t", self._offset))
        self._msr = K.ffi.new("struct one_msr *", {"nmsrs": 1, "index": MSR_TSC})
        self.begin: int = self._begin(fd)

    def _begin(self, fd: int) -> int:
        try:
            K.call(fd, K.GET_DEVICE_ATTR, self._attribute)
            self._told = True
            return -int(self._offset[0]) & U64
        except OSError:
            before = self.read()
            K.call(fd, K.GET_MSRS, self._msr)
            return (before + self.read()) // 2 - int(self._msr.data) & U64

    def behind(self, fd: int, moved: int) -> int:
        """How far KVM has put a vCPU's TSC back, beside what the guest has moved it by; less than 0: forward.

        What is less than can be measured is nothing, where KVM does not tell the offset.
        """
        by = self._begin(fd) - self.begin + moved & U64
        by -= (by >> 63) << 64
        return by if self._told or abs(by) > self.khz * LEAST_NS // NS_PER_MS else 0

    def move(self, fd: int, by: int) -> None:
        """Moves a vCPU's TSC."""
        try:
            K.call(fd, K.GET_DEVICE_ATTR, self._attribute)
            self._offset[0] = int(self._offset[0]) + by & U64
            K.call(fd, K.SET_DEVICE_ATTR, self._attribute)
        except OSError:
            K.call(fd, K.GET_MSRS, self._msr)
            self._msr.data = int(self._msr.data) + by & U64
            K.call(fd, K.SET_MSRS, self._msr)


class Clock:
    """Call it for ns since the guest's TSC was 0, by that TSC."""

    def __init__(self, tsc: Tsc) -> None:
        self._khz, self._tsc, self._begin = tsc.khz, tsc.read, tsc.begin

    def __call__(self) -> int:
        return (self._tsc() - self._begin & U64) * NS_PER_MS // self._khz
