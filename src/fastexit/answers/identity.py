"""What a trace shows of host and guest: its VMs, and for each the vendor, the kernel, APICv, the irqchip, the guest.

Each of these is a Clue with the line that tells it; what the caller knows better is given by name and taken as told.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from fastexit.answers.census import Census, Sign
from fastexit.answers.dating import date
from fastexit.answers.inhibits import inhibit_name
from fastexit.answers.places import Where
from fastexit.answers.report import Clue
from fastexit.answers.vms import Resolved
from fastexit.profile import PROFILES
from fastexit.records.columns import Recording

KEYS = (
    *("vendor", "generation", "apicv", "ipiv", "inhibits", "irqchip", "nested", "hv_timer", "guest", "hyperv"),
    *("pv_eoi", "apic_mode"),
)
"""What clues there are."""

_NEVER = 0xFFFF_FFFF


@dataclass
class Identity:
    """Who is who in a recording.

    Attributes:
        where: each thread's VM and vCPU.
        clues: by VM, in order; 0 is what belongs to no VM, and has clues of the host alone.
        notes: what was assumed, one sentence each.
    """

    where: Where
    clues: dict[int, dict[str, Clue]]
    notes: list[str] = field(default_factory=list)


def identify(recording: Recording, told: Mapping[str, str] | None = None) -> Identity:
    """Look at the whole recording once. ``told`` are clues that the caller gives, by KEYS; ValueError for others."""
    given = {key: Clue(value, "option") for key, value in (told or {}).items()}
    if unknown := given.keys() - set(KEYS):
        raise ValueError(f"no such clue: {', '.join(sorted(unknown))}; there are {', '.join(KEYS)}")
    census = Census(recording)
    resolved = Resolved(census)
    host = _host(census, recording) | {key: clue for key, clue in given.items() if key in ("vendor", "generation")}
    clues = {}
    for number, signs in _by_vm(census, resolved.where.vm).items():
        found = {**host, **(_guest(signs, host) if number else {})}
        found |= {key: clue for key, clue in given.items() if number or key in host}
        clues[number] = {key: found[key] for key in KEYS if key in found}
    return Identity(resolved.where, clues, resolved.notes)


class _Signs:
    """The signs of one VM."""

    def __init__(self, lines: list[int], counts: list[int], inhibits: list[tuple[int, str, bool]]) -> None:
        self._lines = lines
        self._counts = counts
        self.inhibits: list[tuple[int, str, bool]] = sorted(inhibits)
        """Lines about APICv inhibits, in order."""

    def line(self, sign: Sign) -> int:
        """Its first line, 0 where there is none."""
        return self._lines[sign]

    def count(self, sign: Sign) -> int:
        """Its lines."""
        return self._counts[sign]

    def clue(self, sign: Sign, value: str, evidence: str) -> Clue | None:
        """What the sign says, if it is there."""
        return Clue(value, "trace", evidence, self._lines[sign]) if self._lines[sign] else None


def _by_vm(census: Census, vm: npt.NDArray[np.int32]) -> dict[int, _Signs]:
    """The signs of each VM that has lines."""
    numbers, index = np.unique(vm, return_inverse=True)
    lines = np.full((len(Sign), len(numbers)), _NEVER, np.uint32)
    counts = np.zeros((len(Sign), len(numbers)), np.int64)
    for sign in Sign:
        first = census.first[sign]
        np.minimum.at(lines[sign], index, np.where(first > 0, first, _NEVER))
        np.add.at(counts[sign], index, census.count[sign])
    lines[lines == _NEVER] = 0
    inhibits: dict[int, list[tuple[int, str, bool]]] = {}
    for thread, found in census.inhibits.items():
        inhibits.setdefault(int(vm[thread]), []).extend(found)
    there = np.unique(vm[census.born > 0]).tolist()
    at = {number: i for i, number in enumerate(numbers.tolist())}
    return {
        number: _Signs(lines[:, at[number]].tolist(), counts[:, at[number]].tolist(), inhibits.get(number, []))
        for number in there
    }


def _first(*clues: Clue | None) -> Clue | None:
    return next((clue for clue in clues if clue is not None), None)


def _host(census: Census, recording: Recording) -> dict[str, Clue]:
    """Vendor and generation, which are the same for all VMs of a host."""
    found: dict[str, Clue] = {}
    (signs,) = _by_vm(census, np.zeros(len(census.born), np.int32)).values() or (None,)
    if signs is not None:
        vmx = signs.clue(Sign.VMX, "vmx", "an exit reason that only VMX has")
        svm = signs.clue(Sign.SVM, "svm", "an exit reason or event that only SVM has")
        if vendor := (vmx if signs.count(Sign.VMX) >= signs.count(Sign.SVM) else svm):
            found["vendor"] = vendor
    dated = date(recording)
    if dated.evidence:
        newest = dated.kernels[-1] if dated.kernels else ""
        value = " to ".join(dict.fromkeys((dated.kernels[0], newest))) if dated.kernels else "unknown"
        why = "; ".join(f"{each.says} (line {each.line})" for each in dated.evidence)
        if not dated.kernels:
            why = f"lines disagree: {why}"
        if len(dated.kernels) < len(PROFILES):
            found["generation"] = Clue(value, "trace", why, min(each.line for each in dated.evidence))
    return found


def _guest(signs: _Signs, host: Mapping[str, Clue]) -> dict[str, Clue]:
    """What one VM's lines tell."""
    generation = host["generation"].value if "generation" in host else ""
    apicv = _apicv(signs)
    windows, linux = signs.count(Sign.WINDOWS), signs.count(Sign.LINUX)
    guest = _first(
        signs.clue(Sign.WINDOWS, "Windows", "exits where Windows has its kernel") if windows >= linux else None,
        signs.clue(Sign.LINUX, "Linux", "exits where Linux has its kernel"),
        signs.clue(Sign.KVM_PV, "Linux", "an MSR of KVM's own guest interface"),
    )
    mode = [
        signs.clue(Sign.X2APIC, "x2APIC", "an MSR of the x2APIC"),
        signs.clue(Sign.XAPIC, "xAPIC", "an access to the xAPIC page"),
    ]
    if mode[0] and mode[1]:
        mode = [Clue("xAPIC, then x2APIC", "trace", mode[0].evidence, mode[0].line)]
    found = {
        "apicv": apicv,
        "ipiv": _ipiv(signs, apicv),
        "inhibits": _inhibits(signs, generation),
        "irqchip": _first(
            signs.clue(Sign.SPLIT, "split", "KVM_EXIT_IOAPIC_EOI, or a version register with directed EOI"),
            signs.clue(Sign.FULL, "full", "a line of KVM's IOAPIC or PICs"),
            signs.clue(Sign.NO_CHIP, "none", "user space is asked for interrupts"),
        ),
        "nested": signs.clue(Sign.NESTED, "yes", "a guest of the guest is entered or left"),
        "hv_timer": _first(
            signs.clue(Sign.TIMER_ON, "on", "the VMX preemption timer serves the APIC's"),
            signs.clue(Sign.TIMER_OFF, "off", "kvm_hv_timer_state with hv_timer 0"),
        ),
        "guest": guest,
        "hyperv": signs.clue(Sign.HYPERV, "yes", "an MSR or event of KVM's Hyper-V interface"),
        "pv_eoi": signs.clue(Sign.PV_EOI, "yes", "kvm_pv_eoi"),
        "apic_mode": _first(*mode),
    }
    return {key: clue for key, clue in found.items() if clue is not None}


def _apicv(signs: _Signs) -> Clue | None:
    """APICv and AVIC: what only they print, else what they would have spared."""
    on = _first(
        signs.clue(Sign.APICV_ACCEPT, "on", "kvm_apicv_accept_irq"),
        signs.clue(Sign.AVIC, "on", "an exit or event of AVIC"),
        signs.clue(Sign.TRAPS, "on", "an exit behind an access that APICv did"),
        signs.clue(Sign.POSTED, "on", "kvm_pi_irte_update"),
    )
    off = _first(
        signs.clue(Sign.EOI_EXITS, "off", "an EOI exits"),
        signs.clue(Sign.INJECTS, "off", "KVM injects an interrupt at an entry"),
    )
    if on is not None:
        inhibited = signs.line(Sign.INHIBITED)
        return Clue("at times", "trace", f"{on.evidence}; inhibited", on.line) if inhibited and off else on
    return off


def _ipiv(signs: _Signs, apicv: Clue | None) -> Clue | None:
    """IPI virtualization spares what one vCPU is sent; nothing shows it at work."""
    if apicv is None or apicv.value == "off":
        return apicv and Clue("off", "trace", f"no APICv: {apicv.evidence}", apicv.line)
    return signs.clue(Sign.ICR_EXITS, "off", "a fixed IPI to one vCPU exits")


def _inhibits(signs: _Signs, generation: str) -> Clue | None:
    """What switched APICv off, by name."""
    lines = [line for line in signs.inhibits if line[2]]
    if not lines:
        return None
    known = "" if generation in ("", "unknown") else generation
    names = [inhibit_name(int(name), known) if name.isdecimal() and len(name) < 4 else name for _, name, _ in lines]
    return Clue(", ".join(dict.fromkeys(names)), "trace", "kvm_apicv_inhibit_changed", lines[0][0])
