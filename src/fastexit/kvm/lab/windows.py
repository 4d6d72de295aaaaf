"""A trace of a guest that uses Hyper-V's doors as a Windows does, recorded from a kernel's own KVM.

Models: nothing. windowsguest.c is the guest: it boots its vCPUs, sends IPIs by MSR and by hypercalls, ends interrupts
by the assist page and by MSR, takes messages and timers, and counts by door what it did. Each vCPU runs in a thread of
its own, and all kvm events are on, with threads, CPUs and times on each line as in any trace.
"""

from __future__ import annotations

import gzip
import lzma
import os
import re
import struct
from contextlib import closing
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import Any

from fastexit import regs as R
from fastexit.kvm import host as H
from fastexit.kvm import ioctl as K
from fastexit.kvm.lab import hvguest as G
from fastexit.kvm.lab.device import LabDevice
from fastexit.kvm.lab.hyperv import sint_routes
from fastexit.kvm.lab.initramfs import init_program
from fastexit.kvm.lab.kernels import Kernel, directory
from fastexit.kvm.lab.qemu import Machine
from fastexit.kvm.lab.trace import ROOT
from fastexit.kvm.lab.wire import Ask
from fastexit.kvm.oracle import Oracle
from fastexit.reasons import KvmExit
from fastexit.trace.doors import Doing, Door

VCPUS, CPUS = 4, 2
ROUNDS = 40
"""What each vCPU does that often: an IPI, a timer, a message, a sleep."""
SECONDS = 120
BUFFER_KIB = 32_768
PIECE = 4 << 20

TALLY_AT, TALLY_WORDS, TALLY_VCPUS = 0x10000, 16, 8
KNOBS_AT = TALLY_AT + 8 * TALLY_WORDS * TALLY_VCPUS
X2APIC = 1
MEMORY_BYTES = 1 << 20
SINT_MESSAGE = 2
FLAGS = (
    *("-nostdlib", "-ffreestanding", "-no-pie", "-fno-pic", "-fno-stack-protector", "-fcf-protection=none"),
    *("-mno-red-zone", "-mgeneral-regs-only", "-fno-asynchronous-unwind-tables"),
    *("-Wl,-Ttext=0x20000,-z,norelro,--build-id=none",),
)
_LIVE = struct.Struct("<IIIIQI8I4x")
_ENDED = struct.Struct("<iIII")
_HEAD = re.compile(r"# guest: (?P<counts>.*)")


class Count(IntEnum):
    """What the guest counts, in the order of windowsguest.c."""

    IPI_MSR = 0
    IPI_CALL = 1
    EOI_MSR = 2
    EOI_ASSIST = 3
    TPR_MSR = 4
    TIMER = 5
    END_OF_MESSAGE = 6
    SINT_SET_UP = 7
    ASSIST_PAGE = 8
    SPIN_WAIT = 9
    TAKEN = 10
    HALTS = 11


DOORS: dict[Count, tuple[Doing, Door]] = {
    Count.IPI_MSR: (Doing.IPI, Door.SYNTHETIC),
    Count.IPI_CALL: (Doing.IPI, Door.HYPERCALL),
    Count.EOI_MSR: (Doing.EOI, Door.SYNTHETIC),
    Count.EOI_ASSIST: (Doing.EOI, Door.ASSIST),
    Count.TPR_MSR: (Doing.TPR, Door.SYNTHETIC),
    Count.TIMER: (Doing.TIMER, Door.SYNTHETIC),
    Count.END_OF_MESSAGE: (Doing.EOM, Door.SYNTHETIC),
    Count.SINT_SET_UP: (Doing.SINT, Door.SYNTHETIC),
    Count.ASSIST_PAGE: (Doing.ASSIST, Door.SYNTHETIC),
}
"""Where a replay of the trace has to find them."""


@dataclass(frozen=True)
class Recording:
    """What was printed, and what the guest counted."""

    kernel: str
    release: str
    counts: dict[Count, int]
    lines: tuple[str, ...]

    @property
    def text(self) -> str:
        """The trace, as tracefs prints it, with the guest's counts before it."""
        counts = ", ".join(f"{count.name} {n}" for count, n in self.counts.items())
        return "\n".join((f"# guest: {counts}", *self.lines, ""))

    def write(self, path: Path) -> None:
        """Into a file, compressed where its name ends in .xz or .gz."""
        data = self.text.encode()
        if path.suffix == ".xz":
            data = lzma.compress(data, preset=9 | lzma.PRESET_EXTREME)
        elif path.suffix == ".gz":
            data = gzip.compress(data)
        path.write_bytes(data)

    def as_dict(self) -> dict[str, Any]:
        """For JSON: everything but the lines."""
        counts = {count.name: n for count, n in self.counts.items()}
        return {"kernel": self.kernel, "release": self.release, "lines": len(self.lines), "counts": counts}


def counts(text: str) -> dict[Count, int]:
    """What a trace's first line says that its guest did; ValueError where it says nothing."""
    head = _HEAD.match(text)
    if head is None:
        raise ValueError("no counts of a guest in the first line")
    pairs = (one.split() for one in head["counts"].split(", "))
    return {Count[name]: int(n) for name, n in pairs}


def segments(elf: bytes) -> tuple[int, list[tuple[int, bytes]]]:
    """Where a program of 64 bits begins, and what belongs where in memory."""
    entry, headers = struct.unpack_from("<QQ", elf, 24)
    size, number = struct.unpack_from("<HH", elf, 54)
    found = []
    for n in range(number):
        kind, _, offset, address, _, length = struct.unpack_from("<IIQQQQ", elf, headers + n * size)
        if kind == 1 and length:
            found.append((address, elf[offset : offset + length]))
    return entry, found


def record(
    kernel: Kernel, *, vcpus: int = VCPUS, rounds: int = ROUNDS, x2apic: bool = False, cpus: int = CPUS, seed: int = 1
) -> Recording:
    """Boots a kernel and the guest in it, in xAPIC mode or in x2APIC mode; what it printed.

    OSError, one line, where the guest does not come to its end; ValueError for a number of vCPUs that it has not.
    """
    if not 2 <= vcpus <= TALLY_VCPUS:
        raise ValueError(f"{vcpus} vCPUs: the guest takes 2 to {TALLY_VCPUS}")
    with closing(Machine(kernel, cpus=cpus)) as machine:
        device = LabDevice(machine.wire, f"/dev/kvm of the lab's {kernel.release}")
        host = H.of(device)
        with Oracle(vcpus, device=device, host=host, hyperv=True) as vm:
            return _record(kernel, device, vm, (vcpus, rounds, X2APIC * x2apic, seed))


def _record(kernel: Kernel, device: LabDevice, vm: Oracle, knobs: tuple[int, int, int, int]) -> Recording:
    vcpus, rounds, mode, seed = knobs
    memory = device.take_memory()
    slots = []
    device.ask((Ask.MEMORY, 0, struct.pack("<III", vm.fd, memory, MEMORY_BYTES)))
    entry, parts = segments(init_program(directory(), "windowsguest.c", FLAGS))
    for at, data in (
        (0, G.image()),
        *parts,
        (KNOBS_AT, struct.pack("<8I", vcpus, rounds, mode, 0, 0, 0, 0, seed)),
    ):
        device.ask((Ask.STORE, 0, struct.pack("<IIII", memory, at, len(data), 0) + data))
    for vcpu in vm.vcpus:
        slots.append(device.take_guest())
        device.ask((Ask.GUEST, 0, struct.pack("<III", vcpu.fd, slots[-1], vm.run_bytes)))
        enable = K.ffi.new("struct kvm_enable_cap *", {"cap": K.CAP_HYPERV_SYNIC2})
        device.call(vcpu.fd, K.ENABLE_CAP, enable)
    device.call(vm.fd, K.SET_GSI_ROUTING, sint_routes(tuple((i, i, SINT_MESSAGE) for i in range(vcpus))))
    first = vm.vcpus[0].fd
    sregs = K.ffi.new("struct kvm_sregs *")
    device.call(first, K.GET_SREGS, sregs)
    G.long_mode(sregs)
    device.call(first, K.SET_SREGS, sregs)
    device.call(first, K.SET_REGS, K.ffi.new("struct kvm_regs *", {"rip": entry, "rflags": R.RFLAGS_FIXED}))
    for name, value in (
        ("trace_clock", "global"),
        ("buffer_size_kb", str(BUFFER_KIB)),
        ("events/kvm/enable", "1"),
        ("tracing_on", "1"),
    ):
        _write(device, name, value)
    tally_bytes = 8 * TALLY_WORDS * TALLY_VCPUS
    live = _LIVE.pack(vm.fd, memory, TALLY_AT, tally_bytes, SECONDS * 10**9, vcpus, *slots, *(0,) * (8 - vcpus))
    (answer,) = device.turnstile.trip([(Ask.LIVE, 0, live)], 5.0 * SECONDS)
    _write(device, "tracing_on", "0")
    if answer.result < 0:
        raise OSError(-answer.result, os.strerror(-answer.result))
    reason, port, value, late = _ENDED.unpack_from(answer.data)
    if late or reason != KvmExit.IO or port != G.PORT_DONE:
        raise OSError(
            f"the guest did not come to its end: KVM_EXIT {reason}, port {port:#x}, {value:#x}"
            + (f", after {SECONDS} s" if late else "")
        )
    words = struct.unpack_from(f"<{TALLY_WORDS * TALLY_VCPUS}Q", answer.data, _ENDED.size)
    found = {count: sum(words[count::TALLY_WORDS]) for count in Count}
    for slot in slots:
        device.give_guest(slot)
    text = _read(device, "trace")
    if "LOST" in text:
        raise OSError("the kernel lost events: fewer rounds, or fewer vCPUs")
    return Recording(kernel.version, kernel.release, found, tuple(text.splitlines()))


def _write(device: LabDevice, name: str, value: str) -> None:
    fd = device.open(f"{ROOT}/{name}", os.O_WRONLY)
    try:
        device.write(fd, value.encode())
    finally:
        device.close(fd)


def _read(device: LabDevice, name: str) -> str:
    """A whole file, in pieces that fit into an answer."""
    fd = device.open(str(Path(ROOT) / name), os.O_RDONLY)
    try:
        pieces = []
        while piece := device.read(fd, PIECE):
            pieces.append(piece)
    finally:
        device.close(fd)
    return b"".join(pieces).decode(errors="replace")
