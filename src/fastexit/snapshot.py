"""A whole machine as bytes: version, checksum, then the words of its regions as far as its vCPUs fill them.

Bytes that come back are believed only after every word that kernels use as an index, a shift or a lock has been
checked: the checksum guards against damage, not against a forger.

A snapshot names the kernel generation by its fixed number, and what that generation does is not taken from the bytes:
traits are those of the row in profile.py. So a snapshot of an older fastexit stays readable when a row has been mended
since, and the machine then behaves as the row of today says. What its guest could read before it can read now: where
the writer kept the ICR at another place, it is moved.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable

import numpy as np

from fastexit import hyperv as HV
from fastexit import layout as L
from fastexit import regs as R
from fastexit.checks import U64
from fastexit.config import latest_clock, profile_of
from fastexit.profile import Profile
from fastexit.traits import HYPERV, RULES, Trait

_HEAD = struct.Struct("<8sIIII")
_MAGIC = b"FXSNAP\0\0"
_READABLE = (3, 4, 5, L.ABI_VERSION)
"""ABI versions of snapshots that are read; 3 is that of fastexit 0.1.0. Up to 4 a machine had no words of Hyper-V, up
to 5 none of the irqchip's."""


def _rows(n: int, abi: int = L.ABI_VERSION) -> list[slice]:
    """The parts of a machine's memory that n vCPUs fill."""
    regions = [(L.HOT, L.HOT_STRIDE), (L.VEC, L.VEC_STRIDE), (L.PAGE, L.PAGE_STRIDE), (L.KVM, L.KVM_STRIDE)]
    if abi >= 5:
        regions.append((L.HV, L.HV_STRIDE))
    fixed = [slice(0, L.MAP1 + L.MAP_WORDS), slice(L.FILTER, L.TABLES_END)]
    return [*fixed, *(slice(first, first + n * stride) for first, stride in regions)]


def pack(words: np.ndarray) -> bytes:
    """The snapshot of a machine's words. No other thread may act on the machine meanwhile."""
    n = int(words[L.H_NVCPUS])
    fixed, *most, kvm, hv = (words[rows].copy() for rows in _rows(n))
    kvm.reshape(n, L.KVM_STRIDE)[:, L.K_TARGETS] = 0  # whose list is not in it
    fixed[[L.H_GUEST_MEMORY, L.H_GUEST_BYTES]] = 0  # an address means nothing elsewhere, and what is there is not in it
    body = b"".join(part.tobytes() for part in (fixed, *most, kvm, hv))
    return _HEAD.pack(_MAGIC, L.ABI_VERSION, n, zlib.crc32(body), len(body)) + body


def unpack(data: bytes, words: np.ndarray) -> None:
    """Fill a new machine's zeroed words from a snapshot; ValueError or TypeError, and nothing filled, if unsound."""
    if not isinstance(data, bytes | bytearray | memoryview):
        raise TypeError(f"a snapshot is bytes, not {type(data).__name__}")
    data = bytes(data)
    if data[: len(_MAGIC)] != _MAGIC[: len(data)]:
        raise ValueError("not a fastexit snapshot")
    if len(data) < _HEAD.size:
        raise ValueError(f"snapshot is truncated: {len(data)} bytes")
    _, abi, n, crc, length = _HEAD.unpack_from(data)
    if abi not in _READABLE:
        raise ValueError(f"snapshot has ABI version {abi}, this library has {L.ABI_VERSION}")
    body = data[_HEAD.size :]
    if len(body) != length:
        state = "truncated" if len(body) < length else "too long"
        raise ValueError(f"snapshot is {state}: {len(body)} of {length} bytes")
    if zlib.crc32(body) != crc:
        raise ValueError("snapshot is damaged: checksum differs")
    rows = _rows(n, abi)
    if n > L.MAX_VCPUS or sum(r.stop - r.start for r in rows) * 8 != length:
        raise ValueError("snapshot is damaged: its size does not fit its vCPUs")
    source = np.frombuffer(body, dtype=np.uint64)
    parts, at = [], 0
    for r in rows:
        parts.append(source[at : at + r.stop - r.start])
        at += r.stop - r.start
    if abi < L.ABI_VERSION:
        parts = _from_earlier(abi, parts, n)
        rows = _rows(n)
    fixed, tables, hot, vec, _, kvm, hv = parts
    _check_header(fixed, n)
    known = _generation(fixed)
    _check_tables(tables, n)
    _check(_VEC, vec.reshape(n, L.VEC_STRIDE))
    _check(_HV, hv.reshape(n, L.HV_STRIDE))
    _check_vcpus(kvm.reshape(n, L.KVM_STRIDE), hot.reshape(n, L.HOT_STRIDE), int(fixed[L.H_CONFIG]))
    for r, part in zip(rows, parts, strict=True):
        words[r] = part
    words[L.H_TRAITS], words[L.H_RULES] = known.traits & U64, known.traits >> RULES & U64
    words[L.H_HYPERV_RULES] = known.traits >> HYPERV
    _move_icr(words, n, int(fixed[L.H_TRAITS]))
    words[L.H_TRACE_HEAD] = 0
    words[L.H_HANDLERS] = 0
    words[L.H_FAST_MMIO] = 0
    words[L.H_HV_EVENTFDS] = 0


_EARLIER_WORDS = {3: 2_076_672, 4: 6_343_168, 5: 6_670_848}
_EARLIER_PENDING_DB = 13
"""Up to version 3 a queued #DB lay where the targets are now."""


def _from_earlier(abi: int, parts: list[np.ndarray], n: int) -> list[np.ndarray]:
    """The parts of an earlier ABI version as today's has them: Hyper-V's words are those of a new vCPU."""
    fixed, *most, kvm = (part.copy() for part in parts)
    _require(fixed[L.H_ABI] == abi and fixed[L.H_WORDS] == _EARLIER_WORDS[abi], "its header")
    fixed[L.H_ABI], fixed[L.H_WORDS] = L.ABI_VERSION, L.WORDS
    if abi == 3:
        rows = kvm.reshape(-1, L.KVM_STRIDE)
        rows[:, L.K_PENDING_DB] = rows[:, _EARLIER_PENDING_DB]
        rows[:, _EARLIER_PENDING_DB] = 0
    hv = np.zeros((n, L.HV_STRIDE), dtype=np.uint64)
    return [fixed, *most, kvm, hv.reshape(-1)]


# ------------------------------------------------------------------------------ what a word may hold, one line for each

_Check = Callable[[np.ndarray], np.ndarray]
_U32 = 0xFFFF_FFFF
_ICR, _ICR2 = R.APIC_ICR >> 3, R.APIC_ICR2 >> 3


def _between(least: int, most: int) -> _Check:
    return lambda words: (words >= least) & (words <= most)


def _up_to(most: int) -> _Check:
    return lambda words: words <= most


def _bits(mask: int) -> _Check:
    others = np.uint64(~int(mask) & L.NONE)  # ~ of an IntFlag would stay among its own bits
    return lambda words: words & others == 0


def _among(*values: int) -> _Check:
    return lambda words: np.isin(words, np.array(values, dtype=np.uint64))


_CONFIG = sum(value for name, value in vars(L).items() if name.startswith("CONFIG_"))
_TIMER_MODES = R.LVT_TIMER_PERIODIC | R.LVT_TIMER_DEADLINE
_HFLAGS = sum(value for name, value in vars(L).items() if name.startswith("HF_"))
_ACCESS = L.ACCESS_LENGTH | L.ACCESS_WRITE | L.ACCESS_PORT | L.ACCESS_INSN
_FLAGS = sum(value for name, value in vars(L).items() if name.startswith("FLAG_"))

_HEADER: tuple[tuple[int, _Check, str], ...] = (
    (L.H_MAGIC, _among(L.MAGIC), "its header"),
    (L.H_ABI, _among(L.ABI_VERSION), "its header"),
    (L.H_WORDS, _among(L.WORDS), "its header"),
    (L.H_CONFIG, _bits(_CONFIG), "the configuration"),
    (L.H_API, _up_to(15), "the x2APIC API"),
    (L.H_GUEST_MEMORY, _among(0), "the guest's memory"),
    (L.H_GUEST_BYTES, _among(0), "the guest's memory"),
    (L.H_HV_FEATURES, _bits(HV.ALL_FEATURES), "a Hyper-V feature"),
    (L.H_HV_AUTO_EOI_VCPUS, _up_to(L.MAX_VCPUS), "a number of vCPUs with auto-EOI"),
    (L.H_HV_STIMERS, _up_to(1), "a synthetic timer"),
    (L.H_HV_VP_INDICES, _up_to(L.MAX_VCPUS), "a number of VP indices"),
    (L.H_MAP, _among(L.MAP0, L.MAP1), "the map in use"),
    (L.H_MAP_LOCK, _among(0), "the map's lock"),
    (L.H_MAP_DIRTY, _up_to(1), "the map's state"),
    (L.H_MAXPHYADDR, _between(32, 52), "MAXPHYADDR"),
    (L.H_LOST_LOWEST, _up_to(1), "a lost interrupt"),
    (L.H_TSC_KHZ, _between(1, 10_000_000), "the TSC's frequency"),
    (L.H_BUS_NS, _between(1, (1 << 63) // (_U32 * 128)), "the APIC bus cycle"),
    (L.H_MIN_PERIOD_NS, _up_to(1_000_000_000), "the shortest period"),
    (L.H_TIMER_ADVANCE_NS, _up_to(_U32), "the timer's advance"),
    (L.H_INHIBITS, _bits(sum(1 << reason for reason in R.Inhibit)), "an APICv inhibit"),
    (L.H_IRQ_WINDOW_VCPUS, _up_to(L.MAX_VCPUS), "a number of interrupt windows"),
    (L.H_DISABLED_EXITS, _up_to(15), "a disabled exit"),
    (L.H_USER_MSR, _up_to(7), "a reason for MSR exits"),
    (L.H_FILTER_RANGES, _up_to(L.FILTER_RANGES), "the number of filter ranges"),
    (L.H_FILTER_DENY, _up_to(1), "the filter's default"),
    (L.H_BSP_ID, _up_to(L.MAX_VCPU_ID), "the boot CPU's id"),
)
_MAP: tuple[tuple[int, _Check, str], ...] = (
    (L.MAP_PRESENT, _up_to(1), "the map's presence"),
    (L.MAP_MAX_ID, _up_to(L.MAX_VCPU_ID), "the map's highest id"),
    (L.MAP_LOGICAL, _up_to(R.LOGICAL_DISABLED), "the map's logical mode"),
)
_FILTER: tuple[tuple[int, _Check, str], ...] = (
    (L.FILTER_FLAGS, _bits(R.MSR_FILTER_READ | R.MSR_FILTER_WRITE), "a filter range's flags"),
    (L.FILTER_BASE, _up_to(_U32), "a filter range's base"),
    (L.FILTER_COUNT, _up_to(8 * L.FILTER_BITMAP_BYTES), "a filter range's length"),
)
_HOT: tuple[tuple[int, _Check, str], ...] = (
    (L.HOT_MODE, _up_to(R.READING_SHADOW_PAGE_TABLES), "a vCPU's mode"),
    (L.HOT_FLAGS, _bits(_FLAGS), "a vCPU's flags"),
    (L.HOT_BLOCKED, _up_to(1), "a sleeping thread"),
)
_VEC: tuple[tuple[int, _Check, str], ...] = ((L.VEC_RVI, _up_to(255), "RVI"),)
_KVM: tuple[tuple[int, _Check, str], ...] = (
    (L.K_VCPU_ID, _up_to(L.MAX_VCPU_ID), "a vCPU's id"),
    (L.K_AVIC_WINDOW, _up_to(1), "an interrupt window"),
    (L.K_ISR_CACHE, lambda words: (words < 256) | (words == L.NONE), "a highest ISR vector"),
    (L.K_MP_STATE, _among(*R.MpState), "an mp_state"),
    (L.K_PENDING_EVENTS, _bits(R.PENDING_INIT | R.PENDING_SIPI), "a pending event"),
    (L.K_SHADOW, _bits(R.SHADOW_STI | R.SHADOW_MOV_SS), "an interrupt shadow"),
    (L.K_EXCEPTION, _up_to(256), "an injected vector"),
    (L.K_INTERRUPT, _up_to(256), "an injected vector"),
    (L.K_EXTINT, _up_to(256), "an injected vector"),
    (L.K_SIPI_VECTOR, _up_to(255), "a SIPI vector"),
    (L.K_NMI_PENDING, _up_to(2), "a number of pending NMIs"),
    (L.K_SENT, _among(0), "what an entry has sent"),
    (L.K_SVI, _up_to(255), "SVI"),
    (L.K_TARGETS, _among(0), "a list of targets"),
    (L.K_TIMER_MODE, _bits(_TIMER_MODES), "a timer's mode"),
    (L.K_PERIOD, _up_to(1 << 63), "a timer's period"),
    (L.K_DIVIDE, _among(*(1 << shift for shift in range(8))), "a timer's divisor"),
    (L.K_TIMER_ADVANCE, _up_to(_U32), "a timer's advance"),
    (L.K_ENTRY_INFO, _up_to(_U32), "an interruption information"),
    (L.K_REINJECT, _up_to(_U32), "an interruption information"),
    (L.K_CPU, _up_to(_U32), "a pCPU"),
    (L.K_WAKEUP_CPU, _up_to(1 << 32), "a pCPU"),
    (L.K_LOADED, _up_to(1), "a loaded vCPU"),
    (L.K_HFLAGS, _bits(_HFLAGS), "a vCPU's hflags"),
    (L.K_IOAPIC_EOI, _up_to(511), "an EOI's vector"),
    (L.K_MSR_INDEX, _up_to(_U32), "an MSR's number"),
    (L.K_MSR_LENGTH, _up_to(15), "an instruction's length"),
    (L.K_MSR_REASON, _up_to(7), "an MSR exit's reason"),
    (L.K_ACCESS_INFO, _bits(_ACCESS), "an access of user space's"),
    (L.K_PV_EOI_FLAG, _up_to(L.PV_EOI_LOST), "a PV EOI flag"),
    (L.K_AVIC_PLACE, _up_to(R.AVIC_MAX_ID + 1), "the place of an AVIC entry"),
    (L.K_EXITS, _up_to(1 << 63), "a counter"),
    (L.K_SRCU_LOCKS, _up_to(1 << 63), "a counter"),
    (L.K_IRQ_WINDOWS, _up_to(1 << 63), "a counter"),
    (L.K_NESTED_EXITS, _up_to(1 << 63), "a counter"),
    (L.K_INDIRECT_CALLS, _up_to(1 << 63), "a counter"),
)
"""Words that kernels use as an index, a shift, a divisor, a loop's end or a lock, those whose readers expect few
values, and counters, which Python adds to. The others may hold anything: they are only stored, compared or shown."""


_HV: tuple[tuple[int, _Check, str], ...] = (
    (L.HV_VP_INDEX, _up_to(L.MAX_VCPUS - 1), "a VP index"),
    (L.HV_SYNIC, _bits(L.SYNIC_ACTIVE | L.SYNIC_KEEPS_PAGES), "a SynIC"),
    (L.HV_STIMER_PENDING, _bits((1 << L.STIMERS) - 1), "a synthetic timer"),
    (L.HV_STIMER_STUCK, _bits((1 << L.STIMERS) - 1), "a synthetic timer"),
    (L.HV_EXIT_TYPE, _up_to(HV.HvExit.HCALL), "an exit for Hyper-V"),
    (L.HV_CALL_LENGTH, _up_to(15), "an instruction's length"),
    (L.HV_SYSTEM_EVENT, _among(0, *map(int, R.SystemEvent)), "a system event"),
)


def _require(holds: bool, what: str) -> None:
    if not holds:
        raise ValueError(f"snapshot is damaged: {what} is out of range")


def _check(table: tuple[tuple[int, _Check, str], ...], rows: np.ndarray) -> None:
    """Every line of a table, on every row."""
    for word, holds, what in table:
        _require(bool(holds(rows[:, word]).all()), what)


def _check_header(words: np.ndarray, n: int) -> None:
    _check(_HEADER, words[None, : L.HEADER_WORDS])
    _require(int(words[L.H_NOW]) <= latest_clock(int(words[L.H_TSC_KHZ])), "the clock")
    _require(n > 0 and int(words[L.H_NVCPUS]) == n, "the number of vCPUs")
    maps = words[L.MAP0 : L.MAP1 + L.MAP_WORDS].reshape(2, L.MAP_WORDS)
    _check(_MAP, maps)
    slots = np.ascontiguousarray(maps[:, L.MAP_SLOTS :]).view(np.uint16)
    _require(int(slots.max()) <= n, "a slot of the map")


def _move_icr(words: np.ndarray, n: int, written: int) -> None:
    """Put each x2APIC ICR to where this generation has it; ``written`` are the traits by which it was stored."""
    svm = int(words[L.H_CONFIG]) & L.CONFIG_SVM

    def split(traits: int) -> bool:
        return bool(traits & Trait.ICR_SPLIT or (svm and traits & Trait.ICR_SPLIT_SVM))

    was, now = split(written), split(int(words[L.H_TRAITS]))
    if was == now:
        return
    low, half = np.uint64(_U32), np.uint64(32)
    for v in range(n):
        if int(words[L.HOT + v * L.HOT_STRIDE + L.HOT_FLAGS]) & L.FLAG_X2APIC:
            page = words[L.PAGE + v * L.PAGE_STRIDE :][: L.PAGE_STRIDE]
            value = page[_ICR] & low | page[_ICR2] << half if was else page[_ICR]
            page[_ICR] = value & low if now else value
            page[_ICR2] = value >> half if now else 0


def _generation(words: np.ndarray) -> Profile:
    try:
        return profile_of(words)
    except ValueError as unknown:
        raise ValueError(f"snapshot is damaged, or of a newer fastexit: {unknown}") from None


def _check_tables(words: np.ndarray, n: int) -> None:
    """The MSR filter and what hardware walks; ``words`` begins at the filter."""
    filters = words[: L.FILTER_RANGES * L.FILTER_STRIDE].reshape(L.FILTER_RANGES, L.FILTER_STRIDE)
    _check(_FILTER, filters)
    pointers = words[L.PID_TABLE - L.FILTER : L.AVIC_PHYSICAL - L.FILTER]
    rows = 8 * (L.HOT + np.arange(n, dtype=np.uint64) * L.HOT_STRIDE) | R.PID_POINTER_VALID
    _require(bool(np.isin(pointers, np.append(rows, np.uint64(0))).all()), "a descriptor's address")
    logical = words[L.AVIC_LOGICAL - L.FILTER : L.TABLES_END - L.FILTER].view(np.uint32)
    known = np.uint32(1 << 31 | L.AVIC_PHYSICAL_ENTRIES - 1)
    _require(bool((logical & ~known == 0).all()), "an AVIC logical id")


def _check_vcpus(rows: np.ndarray, hot: np.ndarray, config: int) -> None:
    _check(_KVM, rows)
    _check(_HOT, hot)
    if config & L.CONFIG_SVM or not config & L.CONFIG_HV_TIMER:  # its exit would have no handler, again and again
        _require(bool((rows[:, L.K_HV_DEADLINE] == L.NONE).all()), "a preemption timer")
    ids = rows[:, L.K_VCPU_ID].tolist()
    _require(len(set(ids)) == len(ids), "a vCPU's id")
