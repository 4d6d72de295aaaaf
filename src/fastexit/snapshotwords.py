"""What each word of a snapshot may hold: one line for each word that kernels believe.

Those that kernels use as an index, a shift, a divisor, a loop's end or a lock, those whose readers expect few values,
and counters, which Python adds to. The others may hold anything: they are only stored, compared or shown.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from fastexit import hyperv as HV
from fastexit import layout as L
from fastexit import regs as R
from fastexit.outcome import CODE_EFFECTS

Check = Callable[[np.ndarray], np.ndarray]
_U32 = 0xFFFF_FFFF


def between(least: int, most: int) -> Check:
    """Not less than one number, not more than another."""
    return lambda words: (words >= least) & (words <= most)


def up_to(most: int) -> Check:
    """Not more than a number."""
    return lambda words: words <= most


def bits(mask: int) -> Check:
    """No other bits."""
    others = np.uint64(~int(mask) & L.NONE)  # ~ of an IntFlag would stay among its own bits
    return lambda words: words & others == 0


def among(*values: int) -> Check:
    """One of some numbers."""
    return lambda words: np.isin(words, np.array(values, dtype=np.uint64))


_CONFIG = sum(value for name, value in vars(L).items() if name.startswith("CONFIG_"))
_TIMER_MODES = R.LVT_TIMER_PERIODIC | R.LVT_TIMER_DEADLINE
_HFLAGS = sum(value for name, value in vars(L).items() if name.startswith("HF_"))
_ACCESS = L.ACCESS_LENGTH | L.ACCESS_WRITE | L.ACCESS_PORT | L.ACCESS_INSN
_FLAGS = sum(value for name, value in vars(L).items() if name.startswith("FLAG_"))

HEADER: tuple[tuple[int, Check, str], ...] = (
    (L.H_MAGIC, among(L.MAGIC), "its header"),
    (L.H_ABI, among(L.ABI_VERSION), "its header"),
    (L.H_WORDS, among(L.WORDS), "its header"),
    (L.H_CONFIG, bits(_CONFIG), "the configuration"),
    (L.H_API, up_to(15), "the x2APIC API"),
    (L.H_GUEST_MEMORY, among(0), "the guest's memory"),
    (L.H_GUEST_BYTES, among(0), "the guest's memory"),
    (L.H_HV_FEATURES, bits(HV.ALL_FEATURES), "a Hyper-V feature"),
    (L.H_HV_AUTO_EOI_VCPUS, up_to(L.MAX_VCPUS), "a number of vCPUs with auto-EOI"),
    (L.H_HV_STIMERS, up_to(1), "a synthetic timer"),
    (L.H_HV_VP_INDICES, up_to(L.MAX_VCPUS), "a number of VP indices"),
    (L.H_MAP, among(L.MAP0, L.MAP1), "the map in use"),
    (L.H_MAP_LOCK, among(0), "the map's lock"),
    (L.H_MAP_DIRTY, up_to(1), "the map's state"),
    (L.H_MAXPHYADDR, between(32, 52), "MAXPHYADDR"),
    (L.H_LOST_LOWEST, up_to(1), "a lost interrupt"),
    (L.H_TSC_KHZ, between(1, 10_000_000), "the TSC's frequency"),
    (L.H_BUS_NS, between(1, (1 << 63) // (_U32 * 128)), "the APIC bus cycle"),
    (L.H_MIN_PERIOD_NS, up_to(1_000_000_000), "the shortest period"),
    (L.H_TIMER_ADVANCE_NS, up_to(_U32), "the timer's advance"),
    (L.H_INHIBITS, bits(sum(1 << reason for reason in R.Inhibit)), "an APICv inhibit"),
    (L.H_IRQ_WINDOW_VCPUS, up_to(L.MAX_VCPUS), "a number of interrupt windows"),
    (L.H_DISABLED_EXITS, up_to(15), "a disabled exit"),
    (L.H_USER_MSR, up_to(7), "a reason for MSR exits"),
    (L.H_FILTER_RANGES, up_to(L.FILTER_RANGES), "the number of filter ranges"),
    (L.H_FILTER_DENY, up_to(1), "the filter's default"),
    (L.H_BSP_ID, up_to(L.MAX_VCPU_ID), "the boot CPU's id"),
)
MAP: tuple[tuple[int, Check, str], ...] = (
    (L.MAP_PRESENT, up_to(1), "the map's presence"),
    (L.MAP_MAX_ID, up_to(L.MAX_VCPU_ID), "the map's highest id"),
    (L.MAP_LOGICAL, up_to(R.LOGICAL_DISABLED), "the map's logical mode"),
)
FILTER: tuple[tuple[int, Check, str], ...] = (
    (L.FILTER_FLAGS, bits(R.MSR_FILTER_READ | R.MSR_FILTER_WRITE), "a filter range's flags"),
    (L.FILTER_BASE, up_to(_U32), "a filter range's base"),
    (L.FILTER_COUNT, up_to(8 * L.FILTER_BITMAP_BYTES), "a filter range's length"),
)
HOT: tuple[tuple[int, Check, str], ...] = (
    (L.HOT_MODE, up_to(R.READING_SHADOW_PAGE_TABLES), "a vCPU's mode"),
    (L.HOT_FLAGS, bits(_FLAGS), "a vCPU's flags"),
    (L.HOT_BLOCKED, up_to(1), "a sleeping thread"),
)
VEC: tuple[tuple[int, Check, str], ...] = ((L.VEC_RVI, up_to(255), "RVI"),)
KVM: tuple[tuple[int, Check, str], ...] = (
    (L.K_VCPU_ID, up_to(L.MAX_VCPU_ID), "a vCPU's id"),
    (L.K_AVIC_WINDOW, up_to(1), "an interrupt window"),
    (L.K_ISR_CACHE, lambda words: (words < 256) | (words == L.NONE), "a highest ISR vector"),
    (L.K_MP_STATE, among(*R.MpState), "an mp_state"),
    (L.K_PENDING_EVENTS, bits(R.PENDING_INIT | R.PENDING_SIPI), "a pending event"),
    (L.K_SHADOW, bits(R.SHADOW_STI | R.SHADOW_MOV_SS), "an interrupt shadow"),
    (L.K_EXCEPTION, up_to(256), "an injected vector"),
    (L.K_INTERRUPT, up_to(256), "an injected vector"),
    (L.K_EXTINT, up_to(256), "an injected vector"),
    (L.K_SIPI_VECTOR, up_to(255), "a SIPI vector"),
    (L.K_NMI_PENDING, up_to(2), "a number of pending NMIs"),
    (L.K_SENT, bits(CODE_EFFECTS), "what an entry has sent"),
    (L.K_SVI, up_to(255), "SVI"),
    (L.K_TARGETS, among(0), "a list of targets"),
    (L.K_TIMER_MODE, bits(_TIMER_MODES), "a timer's mode"),
    (L.K_PERIOD, up_to(1 << 63), "a timer's period"),
    (L.K_DIVIDE, among(*(1 << shift for shift in range(8))), "a timer's divisor"),
    (L.K_TIMER_ADVANCE, up_to(_U32), "a timer's advance"),
    (L.K_ENTRY_INFO, up_to(_U32), "an interruption information"),
    (L.K_REINJECT, up_to(_U32), "an interruption information"),
    (L.K_CPU, up_to(_U32), "a pCPU"),
    (L.K_WAKEUP_CPU, up_to(1 << 32), "a pCPU"),
    (L.K_LOADED, up_to(1), "a loaded vCPU"),
    (L.K_HFLAGS, bits(_HFLAGS), "a vCPU's hflags"),
    (L.K_IOAPIC_EOI, up_to(511), "an EOI's vector"),
    (L.K_MSR_INDEX, up_to(_U32), "an MSR's number"),
    (L.K_MSR_LENGTH, up_to(15), "an instruction's length"),
    (L.K_MSR_REASON, up_to(7), "an MSR exit's reason"),
    (L.K_ACCESS_INFO, bits(_ACCESS), "an access of user space's"),
    (L.K_PV_EOI_FLAG, up_to(L.PV_EOI_LOST), "a PV EOI flag"),
    (L.K_AVIC_PLACE, up_to(R.AVIC_MAX_ID + 1), "the place of an AVIC entry"),
    (L.K_EXITS, up_to(1 << 63), "a counter"),
    (L.K_SRCU_LOCKS, up_to(1 << 63), "a counter"),
    (L.K_IRQ_WINDOWS, up_to(1 << 63), "a counter"),
    (L.K_NESTED_EXITS, up_to(1 << 63), "a counter"),
    (L.K_INDIRECT_CALLS, up_to(1 << 63), "a counter"),
)
HYPERV: tuple[tuple[int, Check, str], ...] = (
    (L.HV_VP_INDEX, up_to(L.MAX_VCPUS - 1), "a VP index"),
    (L.HV_SYNIC, bits(L.SYNIC_ACTIVE | L.SYNIC_KEEPS_PAGES), "a SynIC"),
    (L.HV_STIMER_PENDING, bits((1 << L.STIMERS) - 1), "a synthetic timer"),
    (L.HV_STIMER_STUCK, bits((1 << L.STIMERS) - 1), "a synthetic timer"),
    (L.HV_EXIT_TYPE, up_to(HV.HvExit.HCALL), "an exit for Hyper-V"),
    (L.HV_CALL_LENGTH, up_to(15), "an instruction's length"),
    (L.HV_SYSTEM_EVENT, among(0, *map(int, R.SystemEvent)), "a system event"),
)


def require(holds: bool, what: str) -> None:
    """Refuse a snapshot that does not hold what it must."""
    if not holds:
        raise ValueError(f"snapshot is damaged: {what} is out of range")


def check(table: tuple[tuple[int, Check, str], ...], rows: np.ndarray) -> None:
    """Every line of a table, on every row."""
    for word, holds, what in table:
        require(bool(holds(rows[:, word]).all()), what)
