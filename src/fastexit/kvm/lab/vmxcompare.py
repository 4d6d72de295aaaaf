"""What differs between a guest program on the model and on the kernel, and which of it is a fault of Bochs.

Models: nothing. Threads of vCPUs run at once, so lines are compared thread by thread. What is no part of a program is
taken out on both sides: the host's own interrupts, first touches of pages.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from itertools import zip_longest

from fastexit import regs as R
from fastexit.kvm.lab.traces import unwritten
from fastexit.kvm.lab.vmxmodel import Seen, Setup
from fastexit.kvm.lab.vmxrun import Line
from fastexit.kvm.lab.vmxsteps import Step
from fastexit.kvm.values import READABLE_IN_XAPIC

NOT_COMPARED = frozenset({"kvm_wait_lapic_expire", "kvm_pi_irte_update"})
"""What depends on time, or on hardware that is not there."""
_RIP = re.compile(r",? rip 0x[0-9a-f]+")
_DEADLINE = re.compile(r"(kvm_msr: msr_(?:read|write) 6e0 = )0x[0-9a-f]{2,}")
_VIOLATION = re.compile(r"(reason EPT_VIOLATION info1 0x)([0-9a-f]+)")
_ACCESS = R.EPT_VIOLATION_READ | R.EPT_VIOLATION_WRITE | R.EPT_VIOLATION_LINEAR
_NOISE = ("reason EXTERNAL_INTERRUPT", "reason EPT_VIOLATION")


class Fault(StrEnum):
    """What makes a program say nothing of the model: where Bochs 3.0 is not a CPU, where an entry fails."""

    VECTOR_0 = "an EPT violation during delivery reports vector 0"
    SELF_IPI_PAGE = "a virtualised SELF_IPI does not store its value"
    ENTRY = "an entry fails: 6.18.15's TPR threshold outlives an INIT, without APICv"


@dataclass(frozen=True)
class Difference:
    """Where the two part."""

    what: str
    expected: str
    got: str

    def __str__(self) -> str:
        return f"{self.what}: expected {self.expected}, KVM has {self.got}"


def normal(lines: Iterable[str], wanted: frozenset[str]) -> list[str]:
    """Lines of the wanted events without addresses, stamps and noise."""
    kept = [_plain(line) for line in lines if line[2:].partition(":")[0] in wanted - NOT_COMPARED]
    found: list[str] = []
    n = 0
    while n < len(kept):
        line = kept[n]
        if line[2:].startswith("kvm_exit") and any(reason in line for reason in _NOISE):
            external = _NOISE[0] in line
            entry = next((at for at in range(n + 1, len(kept)) if kept[at][2:].startswith("kvm_entry")), None)
            if external or entry == n + 1:
                if entry is not None:
                    kept.pop(entry)
                n += 1
                continue
        found.append(line)
        n += 1
    return found


def _plain(line: str) -> str:
    """Without addresses, deadlines, and what a violation says of page tables and rights."""
    line = _DEADLINE.sub(r"\1deadline", unwritten(_RIP.sub("", line)))
    return _VIOLATION.sub(lambda found: f"{found[1]}{int(found[2], 16) & _ACCESS:016x}", line)


def differences(wanted: frozenset[str], steps: Sequence[Step], expected: Seen, got: Seen) -> list[Difference]:
    """Everything that differs, the most telling first."""
    found = []
    for number, step in enumerate(steps):
        if step.passes_first or step.kind == "host" or left_alone(step):
            continue
        one, other = (compared(step, seen.results.get(number)) for seen in (expected, got))
        if one != other:
            found.append(Difference(f"step {number} ({step.kind} on vCPU {step.vcpu})", str(one), str(other)))
    for i, taken in enumerate(expected.notes):
        others = got.notes[i] if i < len(got.notes) else []
        if taken != others:
            found.append(Difference(f"interrupts of vCPU {i}", _notes(taken), _notes(others)))
    for n, (call, result) in enumerate(zip_longest(expected.calls, got.calls)):
        if call != result:
            found.append(Difference(f"call {n}", str(call), str(result)))
    for thread, lines in expected.lines.items():
        mine, theirs = normal(lines, wanted), normal(got.lines.get(thread, ()), wanted)
        for n, (line, other_line) in enumerate(zip_longest(mine, theirs, fillvalue="nothing")):
            if line != other_line:
                found.append(Difference(f"{thread}, line {n}", line, other_line))
                break
    for i, (page, other_page) in enumerate(zip_longest(expected.pages, got.pages, fillvalue=b"")):
        for at in range(0, R.LAPIC_PAGE_BYTES, 4):
            if page[at : at + 4] != other_page[at : at + 4] and at != R.APIC_TMCCT:
                values = (int.from_bytes(some[at : at + 4], "little") for some in (page, other_page))
                found.append(Difference(f"page of vCPU {i} at {at:#x}", *(f"{value:#x}" for value in values)))
    return found


def compared(step: Step, result: tuple[int, int, int] | None) -> tuple[int, ...] | None:
    """What a step did; of a deadline that it read, whether there is one."""
    if result is None or step.kind != "rdmsr" or step.args[0] != R.MSR_TSC_DEADLINE:
        return result
    return result[0], int(any(result[1:]))


def left_alone(step: Step) -> bool:
    """Whether a step reads what depends on time, or KVM leaves a load's destination undone.

    That one then has whatever the emulator had in its hands.
    """
    if step.kind == "rdmsr":
        return bool(step.args[0] == R.MSR_X2APIC_BASE + (R.APIC_TMCCT >> 4))
    if step.kind != "load":
        return False
    offset, _, length = step.args
    return offset & ~15 not in READABLE_IN_XAPIC or (offset & 15) + length > 4 or offset & ~15 == R.APIC_TMCCT


def unstored(setup: Setup, steps: Sequence[Step], found: Sequence[Difference]) -> list[Difference]:
    """Those differences that come of SELF_IPI values that Bochs did not store: page and RDMSR have 0."""
    if not (setup.apicv and setup.x2apic):
        return []
    selves = {step.vcpu for step in steps if step.kind == "wrmsr" and step.args[0] == R.MSR_X2APIC_SELF_IPI}
    whats = {f"page of vCPU {i} at {R.APIC_SELF_IPI:#x}" for i in selves}
    whats |= {
        f"step {number} (rdmsr on vCPU {step.vcpu})"
        for number, step in enumerate(steps)
        if step.vcpu in selves and step.kind == "rdmsr" and step.args[0] == R.MSR_X2APIC_SELF_IPI
    }
    return [one for one in found if one.what in whats and one.got in ("0x0", str((0, 0, 0)))]


def _notes(notes: Sequence[tuple[int, int]]) -> str:
    return " ".join(f"{vector:#x}@{step}" for step, vector in notes) or "none"


def fault(raw: Sequence[Line]) -> Fault | None:
    """Which fault a program's trace shows; None where what differs is something else."""
    for line in raw:
        if "KVM_EXIT_FAIL_ENTRY" in line.text:  # the checks of a VM entry are not modelled
            return Fault.ENTRY
        if "reason EPT_VIOLATION" in line.text and " info2 0x0000000080000000" in line.text:
            return Fault.VECTOR_0
    return None
