"""One row per kernel generation: what it handles fast, where in the exit, in which order.

Profiles are data over one compiled kernel: a row becomes a word of Trait bits in the machine's header, and kernels
test bits. The rows follow the source trees that they name.
"""

from __future__ import annotations

from enum import IntFlag, auto
from typing import NamedTuple


class Trait(IntFlag):
    """A behaviour that differs between generations."""

    # -- where the fast handler runs
    HOOK_IRQOFF = auto()
    """handle_exit_irqoff, with mode OUTSIDE_GUEST_MODE already; otherwise the vendor's run function, IN_GUEST_MODE."""
    SKIP_LATE = auto()
    """The instruction is skipped in handle_exit (SKIP_EMUL_INS), not by the fast handler."""
    SKIP_AFTER_TRACE = auto()
    """The handler traces kvm_msr first and skips then; otherwise it skips first."""
    SKIP_HONOURED = auto()
    """A skip that asks for user space (KVM_EXIT_DEBUG) is honoured; before, it was lost."""
    ICR_REENTERS = auto()
    """A fast ICR write re-enters the guest; otherwise it is EXIT_HANDLED (or SKIP_EMUL_INS)."""
    GUARD_L2 = auto()
    """The handler declines while the vCPU runs L2."""
    SRCU_IN_FASTPATH = auto()
    """SRCU is taken around the fast WRMSR handler."""
    SVM_EXIT_32 = auto()
    """SVM compares its exit code with VMX's 32, which is a DR0 read there."""
    SVM_NEXT_RIP = auto()
    """SVM needs NRIPS and a next RIP: without SRCU nothing may be decoded."""

    # -- what is fast
    ICR_ANY_RESOLVED = auto()
    """Whatever the map-based resolver can finish, traced behind the delivery; otherwise physical and Fixed only."""
    ICR_NO_SHORTHAND = auto()
    ICR_NO_BROADCAST = auto()
    ICR_NO_RESERVED = auto()
    TSCDL_HV_TIMER = auto()
    """TSC_DEADLINE is fast when the VMX preemption timer can be used."""
    TSCDL_ALWAYS = auto()
    PREEMPTION_TIMER_FAST = auto()
    """The VMX preemption timer's exit is handled in the vendor's run function."""
    FORCED_EXIT_HANDLED = auto()
    """An exit that KVM forced by the preemption timer is EXIT_HANDLED there; before, its generic handler ate it."""
    HLT_FAST = auto()
    INVD_FAST = auto()
    MSR_IMM = auto()
    """WRMSR and RDMSR with an immediate are known; the write is fast."""

    # -- what a register write does
    ICR_RESERVED_GP = auto()
    """Reserved ICR bits fault in x2APIC mode."""
    MSR_UPPER_GP = auto()
    """Bits 63:32 of an x2APIC register other than the ICR fault, and SELF_IPI checks bits 31:8."""
    SELF_IPI_WRITES_ICR = auto()
    ICR_SPLIT = auto()
    """x2APIC ICR stored as 0x300/0x310 on every vendor."""
    ICR_SPLIT_SVM = auto()
    """x2APIC ICR stored as 0x300/0x310 on SVM only; else 64 bits at 0x300."""
    LOWEST_REWRITE_FIRST = auto()
    """Lowest priority to physical 0xFF becomes Fixed before the resolver, not after it."""

    TIMER_NO_CATCH_UP = auto()
    """A periodic timer that is late by more than a period goes on from now."""

    # -- posted interrupts
    PI_KICK = auto()
    """A target that is not in guest mode is kicked; later kernels only wake it."""
    PI_EMPTY_LOSES_RVI = auto()
    """ON with an empty PIR reports no pending vector, so RVI becomes 0."""

    # -- APICv inhibits
    INHIBITS = auto()
    """APICv can be inhibited for a whole machine, by user space's reasons and by SVM's interrupt windows."""
    INHIBIT_ID_BASE = auto()
    """A modified xAPIC id or a moved APIC page inhibits APICv; every change of an inhibit is traced, not only the ones
    that switch APICv."""
    INHIBIT_MAP = auto()
    """The APIC map inhibits APICv, for as long as it is dropped or useless; a change of the APIC's mode requests an
    update instead of making it at once."""

    # -- order of tracepoints
    TRACE_ICR2_FIRST = auto()
    """Generic x2APIC path writes ICR2, then ICR, and traces both before the IPI."""
    TRACE_WRITE_FIRST = auto()
    """Fast path traces the raw ICR write before the IPI."""
    TRACE_EXIT_LATE_VMX = auto()
    """kvm_exit comes from handle_exit, after the fast handler."""
    TRACE_EXIT_LATE_SVM = auto()
    TRACE_REENTRY = auto()
    """kvm_entry comes from the vendor's run function, so that every re-entry has its line."""
    TRACE_DOORBELL = auto()
    """AVIC's doorbells and its scan for an IPI's targets have tracepoints."""

    MMIO_NOT_VECTORING = auto()
    """An access to a device during the delivery of an event is an error on both vendors, whichever exit it takes."""


_T = Trait

_OLD_REGISTERS = _T.SELF_IPI_WRITES_ICR | _T.ICR_SPLIT | _T.TRACE_ICR2_FIRST | _T.PI_KICK
_IRQOFF = _T.HOOK_IRQOFF | _T.SKIP_LATE | _T.TRACE_EXIT_LATE_VMX | _T.TRACE_EXIT_LATE_SVM
_UNICAST = _T.ICR_NO_SHORTHAND | _T.ICR_NO_BROADCAST


class Profile(NamedTuple):
    """A kernel generation.

    ``name`` is what Machine(kernel=...) takes, ``tree`` the source tree whose behaviour it follows, ``traits`` its
    behaviour and ``summary`` what its fast path takes, in words.
    """

    name: str
    tree: str
    traits: Trait
    summary: str


PROFILES: dict[str, Profile] = {
    p.name: p
    for p in (
        Profile(
            "seed-v3",
            "patch v3, 20 Nov 2019, on 5.4",
            _OLD_REGISTERS | _IRQOFF | _T.SVM_EXIT_32 | _T.TRACE_WRITE_FIRST | _T.LOWEST_REWRITE_FIRST,
            "Fixed + physical, any shorthand, broadcast too; no L2 guard; wrong exit code on SVM",
        ),
        Profile(
            "5.6",
            "5.6.4",
            _OLD_REGISTERS | _IRQOFF | _T.GUARD_L2 | _T.ICR_NO_SHORTHAND | _T.TRACE_WRITE_FIRST | _T.INHIBITS,
            "Fixed + physical, no shorthand; broadcast too",
        ),
        Profile(
            "5.7",
            "5.7.6",
            _OLD_REGISTERS | _IRQOFF | _T.GUARD_L2 | _UNICAST | _T.INHIBITS,
            "Fixed + physical unicast",
        ),
        Profile(
            "5.8",
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


def profiles() -> tuple[str, ...]:
    """Names of the kernel generations, oldest first.

    >>> profiles()[0], profiles()[-1]
    ('seed-v3', '6.18')
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
