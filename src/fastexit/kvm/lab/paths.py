"""How many instructions a kernel's own exit takes: from the guest's WRMSR to the receiver's first one, and back.

Models: nothing. In the VMX lab time is counted in instructions, so a guest reads path lengths off its TSC, with tracing
off. The two processors do one instruction each in turn (Bochs' quantum is 1, and one that sleeps counts for one), so a
tick is one instruction of either, whoever of them works. A repeated string instruction counts half of its repetitions.
"""

from __future__ import annotations

import statistics
import struct
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from fastexit import regs as R
from fastexit.kvm import ioctl as K
from fastexit.kvm.lab import vmxcode as C
from fastexit.kvm.lab.kernels import Kernel
from fastexit.kvm.lab.vmxmachine import Machine
from fastexit.kvm.lab.vmxwire import Answer, Op, Request
from fastexit.regs import icr

SENT_AT, ACKNOWLEDGED_AT, BEGAN_AT, TAKEN_AT = 0x8040, 0x8080, 0x80C0, 0x8100
SAMPLES_AT = 0x20000
REPETITIONS = 200
QUANTUM = 1
"""`Machine`'s, with two processors: each does one instruction in turn."""
OVERHEAD = 4
"""Three MOVs between RDTSC and WRMSR, and the RDTSC behind it."""
PAUSE = 10_000
"""Turns of a loop before each exit: a receiver that sleeps has to sleep by then."""
FAR = 1 << 30
"""A deadline that does not come while it is measured."""
VECTOR = 0xE1
PREEMPTION = "preempt=voluntary"
"""Kernels whose preemption is lazy (6.18 on) let a vCPU that was woken wait for the next tick of the clock, half of one
on average, which is no path's length."""
MOST_MICROSECONDS = 20_000_000
MWAIT_IN_GUEST = 1

X2APIC_ICR, TSC_DEADLINE = R.MSR_X2APIC_ICR, R.MSR_TSC_DEADLINE


class Asked(Protocol):
    """What carries requests to a machine's init."""

    def ask(self, request: bytes, seconds: float = ...) -> list[str]: ...


@dataclass(frozen=True)
class Path:
    """A way that is measured: what is written, and what the receiver does meanwhile."""

    name: str
    msr: int
    value: int
    receiver: str = "running"
    """running, halted, busy (it makes exits itself), or none."""
    mwait_in_guest: bool = False
    """The VM may not use the preemption timer, so that deadlines take the generic way."""


def paths() -> list[Path]:
    """All ways, in the order of the table."""
    kinds = {
        "physical": icr(dest=1, vector=VECTOR),
        "logical": icr(dest=2, vector=VECTOR, logical=True),
        "all-but-self": icr(vector=VECTOR, shorthand=R.SH_ALLBUT),
    }
    found = [
        Path(f"ICR, {kind}", X2APIC_ICR, value, receiver)
        for receiver in ("running", "halted", "busy")
        for kind, value in kinds.items()
    ]
    found.append(Path("TSC deadline", TSC_DEADLINE, FAR, "none"))
    found.append(Path("TSC deadline, no preemption timer", TSC_DEADLINE, FAR, "none", mwait_in_guest=True))
    return found


@dataclass(frozen=True)
class Length:
    """What a way took, in instructions: medians and least."""

    name: str
    receiver: str
    exit: int
    """The sender's whole exit, from its WRMSR to its next instruction."""
    exit_least: int
    to_receiver: int | None
    """From the WRMSR to the first instruction of the receiver's handler."""
    to_receiver_least: int | None

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def _sender(path: Path) -> bytes:
    """vCPU 0: waits until the receiver is ready, stamps, writes, stamps, and waits for the receiver."""
    acknowledged = b"\x3b\x1d" + C.u32(ACKNOWLEDGED_AT)  # cmp ebx, [acknowledged]
    waits = C.STI + C.CLI + acknowledged + b"\x75"
    waits += struct.pack("<b", -len(waits) - 1)
    low = b"\xb8" + C.u32(path.value)
    high = b"\xba" + C.u32(path.value >> 32)
    if path.msr == TSC_DEADLINE:
        low, high = b"\x05" + C.u32(path.value), b"\x83\xd2\x00"
    turn = C.STI + C.CLI + C.settle(PAUSE)
    turn += b"\x43\x89\x1d" + C.u32(SENT_AT)  # inc ebx; [sent] = ebx
    turn += b"\xb9" + C.u32(path.msr)
    turn += C.RDTSC + b"\xa3" + C.u32(BEGAN_AT) + low + high + C.WRMSR + C.RDTSC
    turn += b"\x2b\x05" + C.u32(BEGAN_AT) + b"\x89\x06"  # eax -= [began]; [esi] = eax
    if path.receiver != "none":
        turn += waits
    turn += b"\xa1" + C.u32(TAKEN_AT) + b"\x2b\x05" + C.u32(BEGAN_AT) + b"\x89\x46\x04\x83\xc6\x08\x4f"
    begin = C.prelude(False) + b"\x31\xdb\xbe" + C.u32(SAMPLES_AT) + b"\xbf" + C.u32(REPETITIONS)
    return begin + turn + b"\x0f\x85" + C.u32(-len(turn) - 6) + C.out(C.PORT_DONE) + b"\xeb\xfe"


def _receiver(path: Path) -> bytes:
    """vCPU 1: what it does until an interrupt comes, and between two."""
    busy = {"halted": C.HLT, "busy": b"\x0f\xa2"}.get(path.receiver, b"\x90")
    return C.prelude(False) + C.STI + busy + b"\xeb" + struct.pack("<b", -len(busy) - 2)


def _handler() -> bytes:
    """Its first instruction stamps."""
    end = b"\xb9" + C.u32(R.MSR_X2APIC_BASE + (R.APIC_EOI >> 4)) + b"\x31\xc0\x31\xd2" + C.WRMSR
    return C.RDTSC + b"\xa3" + C.u32(TAKEN_AT) + end + b"\xff\x05" + C.u32(ACKNOWLEDGED_AT) + b"\xcf"


def request(path: Path) -> Request:
    """One way, as often as REPETITIONS says. Both processors are taken: vCPU i runs on processor i."""
    asked = Request()
    asked.vm([0, 1], [0, 1], disable_exits=MWAIT_IN_GUEST * path.mwait_in_guest)
    image = C.common(2, C.X2APIC_EOI)
    image.put(C.STUBS_AT + 16 * VECTOR, b"\xe9" + C.u32(0x4800 - (C.STUBS_AT + 16 * VECTOR) - 5))
    image.put(0x4800, _handler())
    for i, code in enumerate((_sender(path), _receiver(path))):
        image.put(C.CODE_AT + C.CODE_BYTES * i, code)
    for address, data in image.pieces.items():
        asked.store(address, data)
    for i in range(2):
        base = R.APIC_DEFAULT_PHYS_BASE | R.APICBASE_EN | R.APICBASE_EXTD | R.APICBASE_BSP * (i == 0)
        values = [(R.MSR_APICBASE, base), (R.MSR_X2APIC_BASE + (R.APIC_SPIV >> 4), 0x1FF)]
        if path.msr == TSC_DEADLINE:
            values.append((R.MSR_X2APIC_BASE + (R.APIC_LVTT >> 4), R.LVT_TIMER_DEADLINE | VECTOR))
        for msr, value in values:
            asked.ioctl(i, K.SET_MSRS, struct.pack("<IIIIQ", 1, 0, msr, 0, value))
        asked.add(Op.SETUP, i, C.CODE_AT + C.CODE_BYTES * i, C.STACK_AT + 0x1000 * (i + 1) - 16, C.area(i))
        asked.add(Op.RUN, i)
        asked.add(Op.PARKED, i, MOST_MICROSECONDS)
    asked.add(Op.RUN, 1)
    asked.add(Op.DELAY, 2_000)
    asked.add(Op.RUN, 0)
    asked.add(Op.PARKED, 0, MOST_MICROSECONDS)
    asked.add(Op.READ, SAMPLES_AT, 8 * REPETITIONS)
    asked.add(Op.KICK, 1)
    asked.add(Op.PARKED, 1, MOST_MICROSECONDS)
    return asked


def samples(machine: Asked, path: Path) -> list[tuple[int, int]]:
    """(ticks of the exit, ticks to the receiver) of every repetition. ChildProcessError: a guest did not come back."""
    answer = Answer.of(machine.ask(bytes(request(path))))
    if answer.stuck or not answer.reads:
        raise ChildProcessError(f"{path.name}, receiver {path.receiver}: the guest did not come back")
    words = struct.unpack(f"<{2 * REPETITIONS}I", answer.reads[0])
    return list(zip(words[::2], words[1::2], strict=True))


def measure(
    machine: Asked, wanted: Iterable[Path] | None = None, progress: Callable[[str], None] | None = None
) -> list[Length]:
    """Every way on a machine with two processors and QUANTUM."""
    found: list[Length] = []
    for path in paths() if wanted is None else wanted:
        if progress:
            progress(f"{path.name}, receiver {path.receiver}")
        taken = samples(machine, path)
        exits = [sample[0] - OVERHEAD for sample in taken]
        ways = None if path.receiver == "none" else [sample[1] - OVERHEAD for sample in taken]
        found.append(
            Length(
                name=path.name,
                receiver=path.receiver,
                exit=round(statistics.median(exits)),
                exit_least=min(exits),
                to_receiver=None if ways is None else round(statistics.median(ways)),
                to_receiver_least=None if ways is None else min(ways),
            )
        )
    return found


@dataclass(frozen=True)
class Measured:
    """All lengths of one kernel."""

    kernel: str
    release: str
    repetitions: int
    lengths: tuple[Length, ...]

    def as_dict(self) -> dict[str, Any]:
        """For JSON, as docs/path-lengths.json keeps it."""
        return asdict(self)


def measured(kernel: Kernel, progress: Callable[[str], None] | None = None) -> Measured:
    """Boots a kernel with two processors and measures every way."""
    with Machine(
        kernel, cpus=2, quantum=QUANTUM, parameters={"kvm": "halt_poll_ns=0"}, kernel_options=PREEMPTION
    ) as machine:
        return Measured(kernel.version, kernel.release, REPETITIONS, tuple(measure(machine, progress=progress)))
