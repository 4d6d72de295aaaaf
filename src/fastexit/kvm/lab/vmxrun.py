"""A guest program of the VMX lab on the real kernel: the request that carries it out, and what came of it.

Models: nothing.
"""

from __future__ import annotations

import re
import struct
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fastexit import regs as R
from fastexit.kvm import ioctl as K
from fastexit.kvm.lab import vmxcode as C
from fastexit.kvm.lab.vmxmodel import HOST, Seen, Setup, told
from fastexit.kvm.lab.vmxsteps import Step
from fastexit.kvm.lab.vmxwire import Answer, Op, Request

TRACE_FILE = "/sys/kernel/tracing/trace_pipe"
"""Reading it empties the buffer, and waits for nobody: `trace` would wait until every processor has been idle."""
SETTLE = 4000
"""Turns of a loop of two instructions: several times what the longest way from a sender to a sleeper takes, and longer
than a window, an injection and an EOI that exits, of each of several interrupts that a sleeper had pending."""
FEATURE_CONTROL, VMXON_ALLOWED = 0x3A, 5
"""IA32_FEATURE_CONTROL: locked, VMXON outside SMX."""
HOST_MICROSECONDS = 1_000
MOST_MICROSECONDS = 400_000
ASLEEP_MICROSECONDS = 5 * HOST_MICROSECONDS
"""What the last steps take, with room to spare."""
Notes = Sequence[tuple[int, int]]
"""Of one vCPU (step, vector) of the interrupts that it took."""
_LINE = re.compile(r"\s*(\S+)-(\d+)\s+\[\d+\]\s+(\S+)\s+(\d+): (\w+: .*)")
_ENTRY = re.compile(r"kvm_entry: vcpu (\d+)")
NAMELESS = "<...>"
"""A thread whose name was not kept: the kernel passes over it while another processor keeps one."""


@dataclass(frozen=True)
class Line:
    """A trace line: its thread, its flags, its stamp, its text."""

    thread: str
    flags: str
    stamp: int
    text: str


def request(
    setup: Setup, steps: Sequence[Step], prepared: Sequence[bytes], cpus: int, notes: Sequence[Notes] = ()
) -> Request:
    """Everything of one program but its end.

    ``prepared``: each vCPU's APIC page at the beginning. ``notes``: the interrupts that each takes on the model.
    """
    asked = Request()
    ids = list(range(setup.vcpus))
    where = [(i + 1) % cpus for i in ids]
    asked.vm(ids, where, split=setup.split)
    image = C.common(setup.vcpus, setup.eoi_mode)
    way = C.Way(
        touch=not setup.x2apic,
        count=SETTLE * C.SLOWER if setup.events else SETTLE,
        taken=Counter(number for taken in notes for number, _ in taken),
        restarts=setup.events,
        paged=setup.paged,
    )
    if setup.events:
        asked.add(Op.SMM)
        C.beginnings(image, setup.vcpus)
    if setup.paged:
        C.paging(image)
    for i in ids:
        image.put(C.CODE_AT + C.CODE_BYTES * i, C.program(i, steps, way))
    for address, data in image.pieces.items():
        asked.store(address, data)
    for i in ids:
        if setup.x2apic:
            base = R.APIC_DEFAULT_PHYS_BASE | R.APICBASE_EN | R.APICBASE_EXTD | R.APICBASE_BSP * (i == 0)
            asked.ioctl(i, K.SET_MSRS, struct.pack("<IIIIQ", 1, 0, R.MSR_APICBASE, 0, base))
        asked.ioctl(i, K.SET_LAPIC, prepared[i])
        pages = []
        if setup.paged:
            asked.ioctl(i, K.SET_MSRS, struct.pack("<IIIIQ", 1, 0, FEATURE_CONTROL, 0, VMXON_ALLOWED))
            pages = [C.PAGES_AT]
        asked.add(Op.SETUP, i, C.CODE_AT + C.CODE_BYTES * i, C.stack(i), C.area(i), *pages)
    for i in ids:
        asked.add(Op.RUN, i)
        asked.add(Op.PARKED, i, MOST_MICROSECONDS)
    asked.add(Op.TRACE, 1)
    for i in ids:
        asked.add(Op.RUN, i)
    for number, step in enumerate(steps):
        if step.kind == "host":
            asked.add(Op.PARKED, step.vcpu, MOST_MICROSECONDS)
            for who, name, *arguments in step.args:
                _call(asked, who, name, arguments)
            asked.add(Op.DELAY, HOST_MICROSECONDS)
            asked.add(Op.SET, C.BATON_AT, number + 1)
            asked.add(Op.RUN, step.vcpu)
    return asked


def finish(asked: Request, setup: Setup, asleep: Sequence[bool]) -> Request:
    """The end of a program: ``asleep`` are the vCPUs that will not come back by themselves."""
    for i in range(setup.vcpus):
        if not asleep[i]:
            asked.add(Op.PARKED, i, MOST_MICROSECONDS)
    if all(asleep):  # nobody is left whose end says that the last one has fallen asleep
        asked.add(Op.DELAY, ASLEEP_MICROSECONDS)
    asked.add(Op.TRACE, 0)
    for i in range(setup.vcpus):
        if asleep[i]:
            asked.add(Op.KICK, i)
            asked.add(Op.PARKED, i, MOST_MICROSECONDS)
        asked.add(Op.READ, C.area(i), C.AREA_BYTES)
    for i in range(setup.vcpus):
        asked.ioctl(i, K.GET_LAPIC, bytes(R.LAPIC_PAGE_BYTES))
    asked.file(TRACE_FILE)
    return asked


def _call(asked: Request, who: int, name: str, arguments: Sequence[Any]) -> None:
    if name == "signal_msi":
        address, data = arguments
        asked.ioctl(who, K.SIGNAL_MSI, struct.pack("<IIII16x", address & 0xFFFF_FFFF, address >> 32, data, 0))
    elif name == "set_msr":
        asked.ioctl(who, K.SET_MSRS, struct.pack("<IIIIQ", 1, 0, arguments[0], 0, arguments[1]))
    elif name == "get_msr":
        asked.ioctl(who, K.GET_MSRS, struct.pack("<IIIIQ", 1, 0, arguments[0], 0, 0))
    elif name == "set_mp_state":
        asked.ioctl(who, K.SET_MP_STATE, struct.pack("<I", arguments[0]))
    elif name in ("nmi", "smi"):
        asked.ioctl(who, K.NMI if name == "nmi" else K.SMI)
    else:
        raise ValueError(f"no call {name}")


def _returned(name: str, result: int, data: bytes) -> Any:
    if name == "signal_msi":
        return result if result >= 0 else -1
    if name == "set_msr":
        return result == 1
    if name in ("set_mp_state", "nmi", "smi"):
        return None if result == 0 else result
    return struct.unpack_from("<Q", data, 16)[0] if result == 1 else None


def parsed(lines: Sequence[str]) -> list[Line]:
    """Lines of a trace file. A thread is that of the vCPU that enters in it, whatever its name; else the host's."""
    matches = [match for match in map(_LINE.match, lines) if match]
    entered = {match[2]: entry[1] for match in matches if (entry := _ENTRY.match(match[5]))}
    found = []
    for match in matches:
        thread, number, flags, stamp, text = match.groups()
        if number in entered:
            thread = f"v{entered[number]}"
        elif thread == NAMELESS:
            thread = HOST
        found.append(Line(thread, flags, int(stamp), text))
    return found


def seen(setup: Setup, steps: Sequence[Step], answer: Answer) -> tuple[Seen, list[Line]]:
    """What the kernel and its guests did, as the model tells it; and the trace as it was."""
    found = Seen(lines={name: [] for name in (*(f"v{i}" for i in range(setup.vcpus)), HOST)})
    skipped = setup.vcpus * (1 + setup.x2apic + setup.paged)
    results = answer.ioctls[skipped:]
    calls = [call for step in steps if step.kind == "host" for call in step.args]
    for (_, name, *_), (result, data) in zip(calls, results, strict=False):
        found.calls.append(_returned(name, result, data))
    found.pages = [data for _, data in results[len(calls) :]]
    for i, data in enumerate(answer.reads):
        words = struct.unpack(f"<{len(data) // 4}I", data)
        count = (words[0] - C.area(i) - C.NOTES) // 4
        notes = words[C.NOTES // 4 : C.NOTES // 4 + count]
        found.notes.append([(word >> 8, word & 0xFF) for word in notes])
        for number, step in enumerate(steps):
            if step.vcpu == i:
                at = (C.RESULTS + C.RESULT_BYTES * number) // 4
                low, high, flag = words[at : at + 3]
                reads = step.kind in ("rdmsr", "load", "vmcall", "vmxon", "vmxoff") and not flag
                found.results[number] = (flag, low, high) if reads else (flag, 0, 0)
    raw = parsed(answer.files[-1] if answer.files else [])
    for line in raw:
        found.lines.setdefault(line.thread, []).append(told(line.flags, line.text))
    return found, raw
