"""One row per kernel generation: what it handles fast, where in the exit, in which order.

Profiles are data over one compiled kernel: a row becomes a word of Trait bits in the machine's header, and kernels
test bits. The rows follow the source trees that they name.

A generation has a place and a number. The place is that of its row: rows stand oldest first, and `since` compares
places. The number is what snapshots and the C door keep, so it is written in the row and never changes, whatever rows
come before it later.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import IntFlag, unique
from typing import NamedTuple, TypeVar

_Entry = TypeVar("_Entry")


@unique
class Trait(IntFlag):
    """A behaviour that differs between generations.

    Traits are grouped by subject, and each has a fixed bit: a new one stands in its group and takes the lowest bit that
    no other has. The machine's header keeps them in one word, which has room for 64.
    """

    # -- where the fast handler runs
    HOOK_IRQOFF = 1 << 0
    """handle_exit_irqoff, with mode OUTSIDE_GUEST_MODE already; otherwise the vendor's run function, IN_GUEST_MODE."""
    SKIP_LATE = 1 << 1
    """The instruction is skipped in handle_exit (SKIP_EMUL_INS), not by the fast handler."""
    SKIP_AFTER_TRACE = 1 << 2
    """The handler traces kvm_msr first and skips then; otherwise it skips first."""
    SKIP_HONOURED = 1 << 3
    """A skip that asks for user space (KVM_EXIT_DEBUG) is honoured; before, it was lost."""
    ICR_REENTERS = 1 << 4
    """A fast ICR write re-enters the guest; otherwise it is EXIT_HANDLED (or SKIP_EMUL_INS)."""
    GUARD_L2 = 1 << 5
    """The handler declines while the vCPU runs L2."""
    SRCU_IN_FASTPATH = 1 << 6
    """SRCU is taken around the fast WRMSR handler."""
    SVM_EXIT_32 = 1 << 7
    """SVM compares its exit code with VMX's 32, which is a DR0 read there."""
    SVM_NEXT_RIP = 1 << 8
    """SVM needs NRIPS and a next RIP: without SRCU nothing may be decoded."""

    # -- what is fast
    ICR_ANY_RESOLVED = 1 << 9
    """Whatever the map-based resolver can finish, traced behind the delivery; otherwise physical and Fixed only."""
    ICR_NO_SHORTHAND = 1 << 10
    ICR_NO_BROADCAST = 1 << 11
    ICR_NO_RESERVED = 1 << 12
    TSCDL_HV_TIMER = 1 << 13
    """TSC_DEADLINE is fast when the VMX preemption timer can be used."""
    TSCDL_ALWAYS = 1 << 14
    PREEMPTION_TIMER_FAST = 1 << 15
    """The VMX preemption timer's exit is handled in the vendor's run function."""
    FORCED_EXIT_HANDLED = 1 << 16
    """An exit that KVM forced by the preemption timer is EXIT_HANDLED there; before, its generic handler ate it."""
    HLT_FAST = 1 << 17
    INVD_FAST = 1 << 18
    MSR_IMM = 1 << 19
    """WRMSR and RDMSR with an immediate are known; the write is fast."""

    # -- what a register write does
    ICR_RESERVED_GP = 1 << 20
    """Reserved ICR bits fault in x2APIC mode."""
    MSR_UPPER_GP = 1 << 21
    """Bits 63:32 of an x2APIC register other than the ICR fault, and SELF_IPI checks bits 31:8."""
    SELF_IPI_WRITES_ICR = 1 << 22
    ICR_SPLIT = 1 << 23
    """x2APIC ICR stored as 0x300/0x310 on every vendor."""
    ICR_SPLIT_SVM = 1 << 24
    """x2APIC ICR stored as 0x300/0x310 on SVM only; else 64 bits at 0x300."""
    LOWEST_REWRITE_FIRST = 1 << 25
    """Lowest priority to physical 0xFF becomes Fixed before the resolver, not after it."""

    TIMER_NO_CATCH_UP = 1 << 26
    """A periodic timer that is late by more than a period goes on from now."""

    # -- posted interrupts
    PI_KICK = 1 << 27
    """A target that is not in guest mode is kicked; later kernels only wake it."""
    PI_EMPTY_LOSES_RVI = 1 << 28
    """ON with an empty PIR reports no pending vector, so RVI becomes 0."""

    # -- APICv inhibits
    INHIBITS = 1 << 29
    """APICv can be inhibited for a whole machine, by user space's reasons and by SVM's interrupt windows."""
    INHIBIT_ID_BASE = 1 << 30
    """A modified xAPIC id or a moved APIC page inhibits APICv; every change of an inhibit is traced, not only the ones
    that switch APICv."""
    INHIBIT_MAP = 1 << 31
    """The APIC map inhibits APICv, for as long as it is dropped or useless; a change of the APIC's mode requests an
    update instead of making it at once."""

    # -- order of tracepoints
    TRACE_ICR2_FIRST = 1 << 32
    """Generic x2APIC path writes ICR2, then ICR, and traces both before the IPI."""
    TRACE_WRITE_FIRST = 1 << 33
    """Fast path traces the raw ICR write before the IPI."""
    TRACE_EXIT_LATE_VMX = 1 << 34
    """kvm_exit comes from handle_exit, after the fast handler."""
    TRACE_EXIT_LATE_SVM = 1 << 35
    TRACE_REENTRY = 1 << 36
    """kvm_entry comes from the vendor's run function, so that every re-entry has its line."""
    TRACE_DOORBELL = 1 << 37
    """AVIC's doorbells and its scan for an IPI's targets have tracepoints."""

    MMIO_NOT_VECTORING = 1 << 38
    """An access to a device during the delivery of an event is an error on both vendors, whichever exit it takes."""


_T = Trait

_OLD_REGISTERS = _T.SELF_IPI_WRITES_ICR | _T.ICR_SPLIT | _T.TRACE_ICR2_FIRST | _T.PI_KICK
_IRQOFF = _T.HOOK_IRQOFF | _T.SKIP_LATE | _T.TRACE_EXIT_LATE_VMX | _T.TRACE_EXIT_LATE_SVM
_UNICAST = _T.ICR_NO_SHORTHAND | _T.ICR_NO_BROADCAST


class Profile(NamedTuple):
    """A kernel generation.

    ``name`` is what Machine(kernel=...) takes, ``number`` what a machine's header and a snapshot have for it (the C
    door's FX_KERNEL_* is one more, for 0 is its default), ``tree`` the source tree whose behaviour it follows,
    ``traits`` its behaviour and ``summary`` what its fast path takes, in words.

    A number is given once and for all. A new generation takes the lowest that was never in use, wherever its row
    stands, and the number of one that is taken out is not used again.
    """

    name: str
    number: int
    tree: str
    traits: Trait
    summary: str


PROFILES: dict[str, Profile] = {
    p.name: p
    for p in (
        Profile(
            "seed-v3",
            0,
            "patch v3, 20 Nov 2019, on 5.4",
            _OLD_REGISTERS | _IRQOFF | _T.SVM_EXIT_32 | _T.TRACE_WRITE_FIRST | _T.LOWEST_REWRITE_FIRST,
            "Fixed + physical, any shorthand, broadcast too; no L2 guard; wrong exit code on SVM",
        ),
        Profile(
            "5.6",
            1,
            "5.6.4",
            _OLD_REGISTERS | _IRQOFF | _T.GUARD_L2 | _T.ICR_NO_SHORTHAND | _T.TRACE_WRITE_FIRST | _T.INHIBITS,
            "Fixed + physical, no shorthand; broadcast too",
        ),
        Profile(
            "5.7",
            2,
            "5.7.6",
            _OLD_REGISTERS | _IRQOFF | _T.GUARD_L2 | _UNICAST | _T.INHIBITS,
            "Fixed + physical unicast",
        ),
        Profile(
            "5.8",
            3,
            "5.8.18",
            _OLD_REGISTERS
            | _T.GUARD_L2
            | _UNICAST
            | _T.TSCDL_HV_TIMER
            | _T.PREEMPTION_TIMER_FAST
            | _T.INHIBITS
            | _T.TRACE_EXIT_LATE_SVM,
            "Fixed + physical unicast, in the vendor's run function; TSC_DEADLINE with the preemption timer",
        ),
        Profile(
            "6.1",
            4,
            "6.1.20",
            _T.GUARD_L2
            | _T.TRACE_REENTRY
            | _UNICAST
            | _T.TSCDL_HV_TIMER
            | _T.PREEMPTION_TIMER_FAST
            | _T.SVM_NEXT_RIP
            | _T.MSR_UPPER_GP
            | _T.INHIBITS
            | _T.INHIBIT_ID_BASE
            | _T.TRACE_DOORBELL
            | _T.TRACE_EXIT_LATE_SVM,
            "as 5.8; SVM only with a next RIP",
        ),
        Profile(
            "6.12",
            5,
            "6.12.0",
            _T.GUARD_L2
            | _T.SRCU_IN_FASTPATH
            | _T.TRACE_REENTRY
            | _UNICAST
            | _T.ICR_NO_RESERVED
            | _T.ICR_REENTERS
            | _T.SKIP_HONOURED
            | _T.TSCDL_HV_TIMER
            | _T.PREEMPTION_TIMER_FAST
            | _T.FORCED_EXIT_HANDLED
            | _T.HLT_FAST
            | _T.ICR_RESERVED_GP
            | _T.MSR_UPPER_GP
            | _T.ICR_SPLIT_SVM
            | _T.INHIBITS
            | _T.INHIBIT_ID_BASE
            | _T.INHIBIT_MAP
            | _T.TRACE_DOORBELL,
            "Fixed + physical unicast with reserved bits clear; re-enters the guest; HLT",
        ),
        Profile(
            "6.18",
            6,
            "6.18.26",
            _T.GUARD_L2
            | _T.TRACE_REENTRY
            | _T.SVM_NEXT_RIP
            | _T.ICR_ANY_RESOLVED
            | _T.ICR_NO_RESERVED
            | _T.ICR_REENTERS
            | _T.SKIP_HONOURED
            | _T.SKIP_AFTER_TRACE
            | _T.TSCDL_ALWAYS
            | _T.PREEMPTION_TIMER_FAST
            | _T.FORCED_EXIT_HANDLED
            | _T.HLT_FAST
            | _T.INVD_FAST
            | _T.MSR_IMM
            | _T.TIMER_NO_CATCH_UP
            | _T.ICR_RESERVED_GP
            | _T.MSR_UPPER_GP
            | _T.ICR_SPLIT_SVM
            | _T.PI_EMPTY_LOSES_RVI
            | _T.INHIBITS
            | _T.INHIBIT_ID_BASE
            | _T.INHIBIT_MAP
            | _T.TRACE_DOORBELL
            | _T.MMIO_NOT_VECTORING,
            "whatever the APIC map resolves: any delivery mode, logical, self; no all/all-but-self, no broadcast",
        ),
    )
}


ORDER = {name: place for place, name in enumerate(PROFILES)}
"""Generation -> its place, oldest first. Only for comparing: a generation that is put in later moves the places."""

OLDEST = next(iter(PROFILES))

NEWEST = next(reversed(PROFILES))
"""The generation that a machine is like when nobody names one."""


def since(kernel: str, first: str) -> bool:
    """Tell whether a generation is ``first`` or a later one. KeyError for a name that is no generation's.

    >>> since("6.18", "6.12"), since("6.12", "6.12"), since("5.8", "6.12")
    (True, True, False)
    """
    return ORDER[kernel] >= ORDER[first]


def as_of(table: Mapping[str, _Entry], kernel: str) -> _Entry | None:
    """Look up what holds in a generation, in a table of what came when.

    That is the entry of the latest generation in the table that is not later than ``kernel``; None without one.

    >>> as_of({"5.6": "old", "6.1": "new"}, "5.8")
    'old'
    """
    held = [first for first in table if since(kernel, first)]
    return table[max(held, key=ORDER.__getitem__)] if held else None


def numbered(number: int) -> Profile:
    """Find the profile with that number; ValueError lists the numbers that there are."""
    for known in PROFILES.values():
        if known.number == number:
            return known
    numbers = ", ".join(f"{known.number} ({known.name})" for known in PROFILES.values())
    raise ValueError(f"unknown kernel number {number}: one of {numbers}")


def profiles() -> tuple[str, ...]:
    """Names of the kernel generations, oldest first.

    >>> profiles()[0]
    'seed-v3'
    """
    return tuple(PROFILES)


def profile(name: str) -> Profile:
    """The profile of that name; TypeError for what is no name, ValueError lists the known ones."""
    if not isinstance(name, str):
        raise TypeError(f"kernel is {type(name).__name__}, not a string such as {profiles()[-1]!r}")
    try:
        return PROFILES[name]
    except KeyError:
        raise ValueError(f"unknown kernel {name!r}: one of {', '.join(PROFILES)}") from None
