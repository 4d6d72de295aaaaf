"""One row per kernel generation: what it handles fast, where in the exit, in which order.

Profiles are data over one compiled kernel: a row becomes a word of Trait bits in the machine's header, and kernels
test bits. The rows follow the source trees that they name.

A generation has a place and a number. The place is that of its row: rows stand oldest first, and `since` compares
places. The number is what snapshots and the C door keep, so it is written in the row and never changes, whatever rows
come before it later.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple, TypeVar

from fastexit.traits import OLDEST, Trait

_Entry = TypeVar("_Entry")


_T = Trait

# What many rows have, by when it came or went.
_OLD_REGISTERS = _T.SELF_IPI_WRITES_ICR | _T.ICR_SPLIT | _T.TRACE_ICR2_FIRST | _T.PI_KICK
_IRQOFF = _T.HOOK_IRQOFF | _T.SKIP_LATE | _T.TRACE_EXIT_LATE_VMX | _T.TRACE_EXIT_LATE_SVM
_UNICAST = _T.ICR_NO_SHORTHAND | _T.ICR_NO_BROADCAST
_UNTIL_5_8 = (
    _T.HV_TIMER_CANCELLED_FIRST
    | _T.POSTS_TIMER_ANYWAY
    | _T.DEADLINE_READ_DISABLED
    | _T.DEADLINE_WRITTEN_IN_MODE_3
    | _T.TSC_SYNCED_BY_GUEST
)
_UNTIL_5_10 = (
    _T.NV_WHATEVER_IF | _T.SET_LAPIC_KEEPS_WAIT | _T.WAKE_RESTARTS_TIMER | _T.SYNIC_INHIBITS | _T.PIR_WHILE_ACTIVE
)
_UNTIL_5_15 = (
    _T.BLOCKED_INIT_WAKES
    | _T.WAIT_TRACED_LATE
    | _T.AVIC_OLD
    | _T.NV_BEFORE_BLOCKING
    | _T.PV_EOI_ALWAYS_CLEARED
    | _T.PV_EOI_STORED_FIRST
    | _T.PIT_SPEAKER_APART
    | _T.RESTORE_CLEARS_PIR_LAST
)
_UNTIL_6_1 = (
    _T.MAP_BY_VOTES
    | _T.ID_KEPT_ON_LEAVING
    | _T.SMI_ALWAYS
    | _T.X2APIC_READS_UNCHECKED
    | _T.ID_FROM_PAGE
    | _T.AVIC_LDR_LOOSE
    | _T.AVIC_ID_REFUSED
    | _T.PIC_POLL_BARE
)
_UNTIL_6_6 = _T.PIT_ANYWHERE
_UNTIL_6_8 = _T.SET_LAPIC_STORES_BASE | _T.UNHALT_KEPT | _T.PIC_WAKES_ANYWAY
_FROM_5_8 = _T.TMCCT_RESTORED | _T.TICK_POSTED_AT_ONCE
_FROM_5_10 = _FROM_5_8 | _T.TDCR_MASKED | _T.SMI_FOLDED | _T.LVTPC_MASKED
_FROM_5_15 = (
    _FROM_5_10
    | _T.HV_TIMER_CANCELLED
    | _T.INHIBIT_REQUESTS_EVENT
    | _T.APICV_AT_ENTRY
    | _T.REENTRY_COUNTED
    | _T.MSR_UPPER_GP
    | _T.TRACE_REENTRY
    | _T.INHIBITED_PAGE_UNMAPPED
    | _T.GATED
    | _T.EMULATION_STATUS_CLEARED
    | _T.CALL_XMM
    | _T.SIGNAL_PARAMETER
)
_FROM_6_1 = (
    _FROM_5_15
    | _T.ONE_SHOT_RESTORES_EXPIRED
    | _T.INHIBITS
    | _T.INHIBIT_ID_BASE
    | _T.TRACE_DOORBELL
    | _T.GUARD_L2
    | _T.PREEMPTION_TIMER_FAST
    | _T.CALL_VAR_COUNT
)
_FROM_6_6 = (
    _FROM_6_1
    | _T.NMI_COUNTED
    | _T.NMI_MASK_OVER_INIT
    | _T.INHIBIT_MAP
    | _T.TSC_INVARIANT
    | _T.CALL_EXTENDED
    | _T.CALL_FLUSH_LIST
    | _T.SCAN_SPLIT_PENDING
    | _T.RESAMPLER_ASKED
)
# What stable releases of 6.1 and 6.6 took from later kernels.
_BACKPORTED = (
    _T.LVTPC_KEPT_ON_AMD
    | _T.ICR_NO_RESERVED
    | _T.ICR_RESERVED_GP
    | _T.ICR_SPLIT_SVM
    | _T.FORCED_EXIT_HANDLED
    | _T.SVM_NEXT_RIP
    | _T.TIMER_NO_CATCH_UP
    | _T.CR8_FOLLOWS_AVIC
    | _T.TICK_ONLY_IN_RUN
    | _T.SCAN_SPLIT_SYNCS
)
_FROM_6_18 = (
    _FROM_6_6
    | _T.SCAN_STALE
    | _T.SCAN_SPLIT_SYNCS
    | _T.SVM_NEXT_RIP
    | _T.ICR_ANY_RESOLVED
    | _T.ICR_NO_RESERVED
    | _T.ICR_REENTERS
    | _T.SKIP_HONOURED
    | _T.SKIP_AFTER_TRACE
    | _T.TSCDL_ALWAYS
    | _T.FORCED_EXIT_HANDLED
    | _T.HLT_FAST
    | _T.INVD_FAST
    | _T.MSR_IMM
    | _T.TIMER_NO_CATCH_UP
    | _T.ICR_RESERVED_GP
    | _T.ICR_SPLIT_SVM
    | _T.MMIO_NOT_VECTORING
    | _T.LVTPC_KEPT_ON_AMD
    | _T.MP_STATE_CHECKED_IN_RUN
    | _T.SN_ON_EVERY_PUT
    | _T.CR8_FOLLOWS_AVIC
    | _T.TSC_FIRST_WRITE_KEPT
)
_FROM_6_18_39 = _T.CR8_WITH_PPR | _T.X2AVIC_WRITES_EXIT | _T.TICK_ONLY_IN_RUN


class Stable(NamedTuple):
    """A change between two stable releases of one series: what ``release`` brought, and what went with it.

    The traits of the row are those of its ``tree``. A machine that names an earlier release than ``release`` has
    ``removed`` instead of ``added``.
    """

    release: str
    added: Trait = Trait(0)
    removed: Trait = Trait(0)


class Profile(NamedTuple):
    """A kernel generation.

    ``name`` is what Machine(kernel=...) takes, ``number`` what a machine's header and a snapshot have for it (the C
    door's FX_KERNEL_* is one more, for 0 is its default), ``tree`` the source tree whose behaviour it follows,
    ``traits`` its behaviour, ``summary`` what its fast path takes, in words, ``stable`` what changed
    within its series, for machines that name a release, and ``later`` what the series brought that come before the
    next row: its ``release`` is then the first of a series.

    A number is given once and for all. A new generation takes the lowest that was never in use, wherever its row
    stands, and the number of one that is taken out is not used again.
    """

    name: str
    number: int
    tree: str
    traits: Trait
    summary: str
    stable: tuple[Stable, ...] = ()
    later: tuple[Stable, ...] = ()


PROFILES: dict[str, Profile] = {
    p.name: p
    for p in (
        Profile(
            OLDEST,
            0,
            "patch v3, 20 Nov 2019, on 5.4.286",
            _OLD_REGISTERS
            | _IRQOFF
            | _T.SVM_EXIT_32
            | _T.TRACE_WRITE_FIRST
            | _T.LOWEST_REWRITE_FIRST
            | _T.LVTPC_MASKED
            | _T.LATCHED_INIT_WITH_SMM
            | _T.MODE_KEEPS_HV_TIMER
            | _T.V_TPR_KEPT_BY_AVIC
            | _UNTIL_5_8
            | _UNTIL_5_10
            | _UNTIL_5_15
            | _UNTIL_6_1
            | _UNTIL_6_6
            | _UNTIL_6_8,
            "Fixed + physical, any shorthand, broadcast too; no L2 guard; wrong exit code on SVM",
        ),
        Profile(
            "5.6",
            1,
            "5.6.4",
            _OLD_REGISTERS
            | _IRQOFF
            | _T.GUARD_L2
            | _T.ICR_NO_SHORTHAND
            | _T.TRACE_WRITE_FIRST
            | _T.LAZY_EOI_WHOLE
            | _T.LAZY_EOI_LEVEL
            | _T.INHIBITS
            | _T.CR8_KEEPS_TPR_BIT_2
            | _T.DEADLINE_WRITTEN_DISABLED
            | _T.READ_ACROSS_TRACED
            | _T.V_TPR_KEPT_BY_AVIC
            | _UNTIL_5_8
            | _UNTIL_5_10
            | _UNTIL_5_15
            | _UNTIL_6_1
            | _UNTIL_6_6
            | _UNTIL_6_8,
            "Fixed + physical, no shorthand; broadcast too",
        ),
        Profile(
            "5.7",
            2,
            "5.7.6",
            _OLD_REGISTERS
            | _IRQOFF
            | _T.GUARD_L2
            | _UNICAST
            | _T.LAZY_EOI_WHOLE
            | _T.INHIBITS
            | _T.CR8_KEEPS_TPR_BIT_2
            | _T.DEADLINE_WRITTEN_DISABLED
            | _T.READ_ACROSS_TRACED
            | _T.MAP_DIRTY_BY_SVR
            | _T.V_TPR_KEPT_BY_AVIC
            | _T.INHIBIT_X2APIC
            | _UNTIL_5_8
            | _UNTIL_5_10
            | _UNTIL_5_15
            | _UNTIL_6_1
            | _UNTIL_6_6
            | _UNTIL_6_8,
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
            | _T.TRACE_EXIT_LATE_SVM
            | _T.CR8_KEEPS_TPR_BIT_2
            | _T.READ_ACROSS_TRACED
            | _T.V_TPR_KEPT_BY_AVIC
            | _T.INHIBIT_X2APIC
            | _UNTIL_5_8
            | _UNTIL_5_10
            | _UNTIL_5_15
            | _UNTIL_6_1
            | _UNTIL_6_6
            | _UNTIL_6_8
            | _FROM_5_8,
            "Fixed + physical unicast, in the vendor's run function; TSC_DEADLINE with the preemption timer",
        ),
        Profile(
            "5.10",
            7,
            "5.10.262",
            _T.ICR_SPLIT
            | _T.TRACE_ICR2_FIRST
            | _T.PI_KICK
            | _T.GUARD_L2
            | _UNICAST
            | _T.TSCDL_HV_TIMER
            | _T.PREEMPTION_TIMER_FAST
            | _T.SVM_NEXT_RIP
            | _T.INHIBITS
            | _T.TRACE_EXIT_LATE_SVM
            | _T.PI_NOTIFIES_SELF
            | _T.TIMER_NO_CATCH_UP
            | _T.FILTER_RANGES_COUNTED
            | _T.INHIBIT_X2APIC
            | _UNTIL_5_10
            | _UNTIL_5_15
            | _UNTIL_6_1
            | _UNTIL_6_6
            | _UNTIL_6_8
            | _FROM_5_10,
            "as 5.8; SVM only with a next RIP",
            stable=(
                Stable("5.10.13", added=_T.SMI_FOLDED),
                Stable("5.10.38", removed=_T.HV_TIMER_CANCELLED_FIRST),
                Stable("5.10.89", added=_T.PI_NOTIFIES_SELF),
                Stable("5.10.115", removed=_T.SELF_IPI_WRITES_ICR | _T.POSTS_TIMER_ANYWAY),
                Stable("5.10.170", added=_T.SVM_NEXT_RIP),
                Stable("5.10.183", added=_T.FILTER_RANGES_COUNTED),
                Stable("5.10.199", added=_T.LVTPC_MASKED),
                Stable("5.10.245", removed=_T.V_TPR_KEPT_BY_AVIC),
                Stable("5.10.248", added=_T.TIMER_NO_CATCH_UP),
            ),
            # neither 5.10.35 nor 5.15.0 has these
            later=(
                Stable(
                    "5.11",
                    added=_T.V_TPR_KEPT_BY_AVIC,
                    removed=_T.SVM_NEXT_RIP | _T.FILTER_RANGES_COUNTED | _T.LVTPC_MASKED | _T.TIMER_NO_CATCH_UP,
                ),
            ),
        ),
        Profile(
            "5.15",
            8,
            "5.15.215",
            _T.ICR_SPLIT
            | _T.TRACE_ICR2_FIRST
            | _T.PI_KICK
            | _T.GUARD_L2
            | _UNICAST
            | _T.TSCDL_HV_TIMER
            | _T.PREEMPTION_TIMER_FAST
            | _T.SVM_NEXT_RIP
            | _T.INHIBITS
            | _T.TRACE_EXIT_LATE_SVM
            | _T.PI_NOTIFIES_SELF
            | _T.TIMER_NO_CATCH_UP
            | _T.LVTPC_KEPT_ON_AMD
            | _T.INHIBIT_X2APIC
            | _T.SCAN_SPLIT_SYNCS
            | _UNTIL_5_15
            | _UNTIL_6_1
            | _UNTIL_6_6
            | _UNTIL_6_8
            | _FROM_5_15,
            "as 5.10",
            # Trees between .12 and .215 were read one behind the other, not every one of them: a change may have come
            # one to four releases before the one that is named.
            stable=(
                Stable("5.15.12", added=_T.PI_NOTIFIES_SELF),
                Stable("5.15.96", added=_T.SVM_NEXT_RIP),
                Stable("5.15.106", removed=_T.WAKE_RESTARTS_TIMER),
                Stable("5.15.116", added=_T.REENTRY_COUNTED),
                Stable("5.15.137", added=_T.LVTPC_MASKED),
                Stable("5.15.157", added=_T.LVTPC_KEPT_ON_AMD),
                Stable("5.15.162", added=_T.SCAN_SPLIT_SYNCS),
                Stable("5.15.194", removed=_T.V_TPR_KEPT_BY_AVIC),
                Stable("5.15.198", added=_T.TIMER_NO_CATCH_UP),
            ),
            # neither 5.15.0 nor 6.1.0 has these
            later=(
                Stable(
                    "5.16",
                    added=_T.V_TPR_KEPT_BY_AVIC | _T.WAKE_RESTARTS_TIMER,
                    removed=_T.SVM_NEXT_RIP
                    | _T.REENTRY_COUNTED
                    | _T.LVTPC_MASKED
                    | _T.LVTPC_KEPT_ON_AMD
                    | _T.SCAN_SPLIT_SYNCS
                    | _T.TIMER_NO_CATCH_UP,
                ),
            ),
        ),
        Profile(
            "6.1",
            4,
            "6.1.192",
            _UNICAST
            | _BACKPORTED
            | _T.TSCDL_HV_TIMER
            | _T.TRACE_EXIT_LATE_SVM
            | _T.AVIC_MANY_SCANNED
            | _T.STIMER_SATURATES
            | _UNTIL_6_1
            | _UNTIL_6_6
            | _UNTIL_6_8
            | _FROM_6_1,
            "Fixed + physical unicast with reserved bits clear; TSC_DEADLINE with the preemption timer",
            stable=(
                Stable("6.1.14", added=_T.SVM_NEXT_RIP),
                Stable("6.1.16", added=_T.MSR_UPPER_GP),
                Stable("6.1.33", added=_T.REENTRY_COUNTED),
                Stable("6.1.60", added=_T.LVTPC_MASKED),
                Stable("6.1.66", removed=_T.RESTORE_CLEARS_PIR_LAST),
                Stable("6.1.88", added=_T.LVTPC_KEPT_ON_AMD),
                Stable("6.1.96", added=_T.SCAN_SPLIT_SYNCS),
                Stable("6.1.107", added=_T.ONE_SHOT_RESTORES_EXPIRED),
                Stable("6.1.113", added=_T.ICR_NO_RESERVED | _T.ICR_RESERVED_GP),
                Stable("6.1.149", added=_T.ICR_SPLIT_SVM | _T.FORCED_EXIT_HANDLED),
                Stable("6.1.154", removed=_T.V_TPR_KEPT_BY_AVIC),
                Stable("6.1.160", added=_T.TIMER_NO_CATCH_UP),
                Stable("6.1.167", added=_T.CR8_FOLLOWS_AVIC),
                Stable("6.1.184", added=_T.TICK_ONLY_IN_RUN),
                Stable("6.1.192", added=_T.STIMER_SATURATES),
            ),
            # neither 6.1.0 nor 6.6.0 has these
            later=(
                Stable(
                    "6.2",
                    added=_T.V_TPR_KEPT_BY_AVIC | _T.RESTORE_CLEARS_PIR_LAST,
                    removed=_BACKPORTED | _T.STIMER_SATURATES,
                ),
            ),
        ),
        Profile(
            "6.6",
            9,
            "6.6.150",
            _UNICAST
            | _T.SRCU_IN_FASTPATH
            | _BACKPORTED
            | _T.TSCDL_HV_TIMER
            | _T.AVIC_ID_REFUSED
            | _UNTIL_6_6
            | _UNTIL_6_8
            | _FROM_6_6,
            "as 6.1; SRCU taken around it",
            # as with 5.15: the first of the trees read that has it
            stable=(
                Stable("6.6.3", removed=_T.RESTORE_CLEARS_PIR_LAST),
                Stable("6.6.29", added=_T.LVTPC_KEPT_ON_AMD),
                Stable("6.6.36", added=_T.SCAN_SPLIT_SYNCS),
                Stable("6.6.54", added=_T.ICR_NO_RESERVED | _T.ICR_RESERVED_GP),
                Stable("6.6.78", added=_T.ICR_SPLIT_SVM, removed=_T.ID_FROM_PAGE),
                Stable("6.6.103", added=_T.FORCED_EXIT_HANDLED),
                Stable("6.6.108", removed=_T.V_TPR_KEPT_BY_AVIC),
                Stable("6.6.113", added=_T.SVM_NEXT_RIP),
                Stable("6.6.120", added=_T.TIMER_NO_CATCH_UP),
                Stable("6.6.130", added=_T.CR8_FOLLOWS_AVIC),
                Stable("6.6.148", added=_T.TICK_ONLY_IN_RUN),
            ),
            # neither 6.6.0 nor 6.8.0 has what 6.6's stable releases took from later kernels
            later=(Stable("6.7", added=_T.ID_FROM_PAGE | _T.V_TPR_KEPT_BY_AVIC, removed=_BACKPORTED),),
        ),
        Profile(
            "6.8",
            10,
            "6.8.0",
            _UNICAST
            | _T.SRCU_IN_FASTPATH
            | _T.TSCDL_HV_TIMER
            | _T.ID_FROM_PAGE
            | _T.AVIC_ID_REFUSED
            | _UNTIL_6_8
            | _T.V_TPR_KEPT_BY_AVIC
            | _T.TSC_FIRST_WRITE_KEPT
            | _FROM_6_6,
            "as 6.6, reserved bits or not",
            later=(Stable("6.10", added=_T.SCAN_SPLIT_SYNCS),),
        ),
        Profile(
            "6.12",
            5,
            "6.12.118",
            _UNICAST
            | _T.SRCU_IN_FASTPATH
            | _T.ICR_NO_RESERVED
            | _T.ICR_RESERVED_GP
            | _T.ICR_SPLIT_SVM
            | _T.ICR_REENTERS
            | _T.SKIP_HONOURED
            | _T.TSCDL_HV_TIMER
            | _T.SVM_NEXT_RIP
            | _T.FORCED_EXIT_HANDLED
            | _T.TIMER_NO_CATCH_UP
            | _T.HLT_FAST
            | _T.LVTPC_KEPT_ON_AMD
            | _T.UNHALT_KEPT
            | _T.PIC_WAKES_ANYWAY
            | _T.CR8_WITH_PPR
            | _T.CR8_FOLLOWS_AVIC
            | _T.TICK_ONLY_IN_RUN
            | _T.AVIC_ID_REFUSED
            | _T.STIMER_SATURATES
            | _T.TSC_FIRST_WRITE_KEPT
            | _T.SCAN_SPLIT_SYNCS
            | _FROM_6_6,
            "Fixed + physical unicast with reserved bits clear; re-enters the guest; HLT",
            stable=(
                Stable("6.12.49", removed=_T.V_TPR_KEPT_BY_AVIC),
                Stable("6.12.53", added=_T.SVM_NEXT_RIP),
                Stable("6.12.64", added=_T.TIMER_NO_CATCH_UP),
                Stable("6.12.78", added=_T.CR8_FOLLOWS_AVIC),
                Stable("6.12.101", added=_T.TICK_ONLY_IN_RUN),
                Stable("6.12.114", added=_T.CR8_WITH_PPR, removed=_T.SET_LAPIC_STORES_BASE),
                Stable("6.12.118", added=_T.STIMER_SATURATES),
            ),
            # what 6.12's stable releases took from later kernels is not in 6.13 to 6.17
            later=(
                Stable(
                    "6.13",
                    added=_T.V_TPR_KEPT_BY_AVIC,
                    removed=_T.CR8_WITH_PPR
                    | _T.CR8_FOLLOWS_AVIC
                    | _T.TICK_ONLY_IN_RUN
                    | _T.SVM_NEXT_RIP
                    | _T.TIMER_NO_CATCH_UP
                    | _T.STIMER_SATURATES,
                ),
                Stable("6.15", added=_T.SCAN_STALE, removed=_T.UNHALT_KEPT),
                Stable("6.16", added=_T.PI_EMPTY_LOSES_RVI, removed=_T.PIC_WAKES_ANYWAY),
                Stable("6.17", added=_T.MP_STATE_CHECKED_IN_RUN, removed=_T.V_TPR_KEPT_BY_AVIC),
            ),
        ),
        Profile(
            "6.18",
            6,
            "6.18.44",
            _FROM_6_18 | _FROM_6_18_39,
            "whatever the APIC map resolves: any delivery mode, logical, self; no all/all-but-self, no broadcast",
            # 6.18-rc1, .2, .3, .13, .17, .19, .26, .30, .34, .35, .39, .40, .42 and .44 were read
            stable=(
                Stable("6.18.3", added=_T.TIMER_NO_CATCH_UP),
                Stable("6.18.19", added=_T.CR8_FOLLOWS_AVIC),
                Stable("6.18.30", removed=_T.PI_EMPTY_LOSES_RVI),
                Stable("6.18.39", added=_T.CR8_WITH_PPR | _T.X2AVIC_WRITES_EXIT),
                Stable("6.18.42", added=_T.TICK_ONLY_IN_RUN),
            ),
            later=(
                Stable("7.0", added=_T.PI_EMPTY_LOSES_RVI, removed=_FROM_6_18_39),
                Stable(
                    "7.1",
                    added=_T.CR8_WITH_PPR | _T.IRQWIN_COUNTED | _T.X2AVIC_WRITES_EXIT,
                    removed=_T.PI_EMPTY_LOSES_RVI,
                ),
                Stable("7.2", added=_T.TICK_ONLY_IN_RUN | _T.STIMER_SATURATES | _T.SCAN_OLD_MODE),
            ),
        ),
        Profile(
            "7.3",
            11,
            "7.3.4",
            _FROM_6_18 | _FROM_6_18_39 | _T.IRQWIN_COUNTED | _T.STIMER_SATURATES | _T.SCAN_OLD_MODE,
            "as 6.18",
        ),
    )
}


NEWEST = next(reversed(PROFILES))
"""The generation that a machine is like when nobody names one."""

SDM = Profile(
    "sdm",
    255,
    f"SDM vol. 3A, chapter 10; the rest as {PROFILES[NEWEST].tree}",
    PROFILES[NEWEST].traits & ~_T.ICR_ANY_RESOLVED
    | _T.RESERVED_BITS_GP
    | _T.STATUS_READ_ONLY
    | _T.ERRORS_LOGGED
    | _T.MASKED_TICK_LOST
    | _T.ENABLED_RESET,
    "nothing: the manual has no fast path",
)
"""No kernel: a local APIC by the manual, for who tests against that. In all that is not in the manual it is like the
newest generation, and it stands where that does; `profiles` has kernels alone."""

ORDER = {name: place for place, name in enumerate(PROFILES)} | {SDM.name: len(PROFILES) - 1}
"""Generation -> its place, oldest first. Only for comparing: a generation that is put in later moves the places."""


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


def named() -> dict[str, Profile]:
    """Everything that a machine can be made like by name: the generations, oldest first, and the manual."""
    return PROFILES | {SDM.name: SDM}


def numbered(number: int) -> Profile:
    """Find the profile with that number; ValueError lists the numbers that there are."""
    for known in named().values():
        if known.number == number:
            return known
    numbers = ", ".join(f"{known.number} ({known.name})" for known in named().values())
    raise ValueError(f"unknown kernel number {number}: one of {numbers}")


def profiles() -> tuple[str, ...]:
    """Names of the kernel generations, oldest first.

    >>> profiles()[0]
    'seed-v3'
    """
    return tuple(PROFILES)
