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

import numpy as np

from fastexit import layout as L
from fastexit import regs as R
from fastexit.checks import U64
from fastexit.config import latest_clock, profile_of
from fastexit.profile import Profile
from fastexit.snapshotchips import check_chips, check_tscs, checked_routes, fixed_rows, new_chips, pack_routes
from fastexit.snapshotwords import FILTER, HEADER, HOT, HYPERV, KVM, MAP, VEC, check, require
from fastexit.traits import HYPERV as HYPERV_TRAITS
from fastexit.traits import RULES, Trait

_HEAD = struct.Struct("<8sIIII")
_MAGIC = b"FXSNAP\0\0"
_READABLE = (3, 4, 5, 6, L.ABI_VERSION)
"""ABI versions of snapshots that are read; 3 is that of fastexit 0.1.0. Up to 4 a machine had no words of Hyper-V, up
to 5 none of the irqchip's; since 6 the words of a snapshot have stayed the same."""


_U32 = 0xFFFF_FFFF
_ICR, _ICR2 = R.APIC_ICR >> 3, R.APIC_ICR2 >> 3
_ROUTED = 6
"""From this version on a snapshot ends with the routes in use."""
_KVM = 5
"""Which of the parts has KVM's own words of vCPUs."""


def regions(n: int, abi: int = L.ABI_VERSION) -> list[slice]:
    """The parts of a machine's memory that n vCPUs fill."""
    regions = [(L.HOT, L.HOT_STRIDE), (L.VEC, L.VEC_STRIDE), (L.PAGE, L.PAGE_STRIDE), (L.KVM, L.KVM_STRIDE)]
    if abi >= 5:
        regions.append((L.HV, L.HV_STRIDE))
    fixed = [slice(0, L.MAP1 + L.MAP_WORDS), slice(L.FILTER, L.TABLES_END)]
    chips = fixed_rows(n) if abi >= 6 else []
    return [*fixed, *(slice(first, first + n * stride) for first, stride in regions), *chips]


def pack(words: np.ndarray) -> bytes:
    """The snapshot of a machine's words. No other thread may act on the machine meanwhile."""
    n = int(words[L.H_NVCPUS])
    parts = [words[rows].copy() for rows in regions(n)]
    fixed, kvm = parts[0], parts[_KVM]
    kvm.reshape(n, L.KVM_STRIDE)[:, L.K_TARGETS] = 0  # whose list is not in it
    fixed[L.H_CONFIG] &= np.uint64(~L.CONFIG_COSTS & U64)  # prices stay behind
    fixed[[L.H_GUEST_MEMORY, L.H_GUEST_BYTES]] = 0  # an address means nothing elsewhere, and what is there is not in it
    body = b"".join(part.tobytes() for part in parts) + pack_routes(words)
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
    rows = regions(n, abi)
    least = sum(r.stop - r.start for r in rows) * 8
    if n > L.MAX_VCPUS or length < least or length % 8 or (length > least and abi < _ROUTED):
        raise ValueError("snapshot is damaged: its size does not fit its vCPUs")
    source = np.frombuffer(body, dtype=np.uint64)
    parts, at = [], 0
    for r in rows:
        parts.append(source[at : at + r.stop - r.start])
        at += r.stop - r.start
    routes = source[at:]
    if abi < L.ABI_VERSION:
        parts, earlier = _from_earlier(abi, parts, n)
        routes = routes if earlier is None else earlier
        rows = regions(n)
    fixed, tables, hot, vec, _, kvm, hv, chips, routing, irq, tscs, tsc = parts
    _check_header(fixed, n)
    known = _generation(fixed)
    _check_tables(tables, n)
    check(VEC, vec.reshape(n, L.VEC_STRIDE))
    check(HYPERV, hv.reshape(n, L.HV_STRIDE))
    _check_vcpus(kvm.reshape(n, L.KVM_STRIDE), hot.reshape(n, L.HOT_STRIDE), int(fixed[L.H_CONFIG]))
    check_chips(chips, irq)
    check_tscs(tscs, tsc, int(fixed[L.H_TSC_KHZ]))
    first, routes = checked_routes(routing, routes)
    for r, part in zip(rows, parts, strict=True):
        words[r] = part
    words[L.ROUTE_FIRST : L.ROUTE_FIRST + len(first)] = first
    words[L.ROUTES : L.ROUTES + len(routes)] = routes
    words[L.H_TRAITS], words[L.H_RULES] = known.traits & U64, known.traits >> RULES & U64
    words[L.H_HYPERV_RULES] = known.traits >> HYPERV_TRAITS
    _move_icr(words, n, int(fixed[L.H_TRAITS]))
    words[L.H_TRACE_HEAD] = 0
    words[L.H_HANDLERS] = 0
    words[L.H_FAST_MMIO] = 0
    words[L.H_HV_EVENTFDS] = 0


_EARLIER_WORDS = {3: 2_076_672, 4: 6_343_168, 5: 6_670_848, 6: 6_732_800}
_EARLIER_PENDING_DB = 13
"""Up to version 3 a queued #DB lay where the targets are now."""


def _from_earlier(abi: int, parts: list[np.ndarray], n: int) -> tuple[list[np.ndarray], np.ndarray | None]:
    """The parts of an earlier ABI version as today's has them: Hyper-V's words and chips are new ones, with routes."""
    parts = [part.copy() for part in parts]
    fixed, kvm = parts[0], parts[_KVM].reshape(n, L.KVM_STRIDE)
    require(fixed[L.H_ABI] == abi and fixed[L.H_WORDS] == _EARLIER_WORDS[abi], "its header")
    fixed[L.H_ABI], fixed[L.H_WORDS] = L.ABI_VERSION, L.WORDS
    if abi >= _ROUTED:
        return parts, None
    if abi == 3:
        kvm[:, L.K_PENDING_DB] = kvm[:, _EARLIER_PENDING_DB]
        kvm[:, _EARLIER_PENDING_DB] = 0
    if abi < 5:
        parts.append(np.zeros(n * L.HV_STRIDE, dtype=np.uint64))
    split = bool(int(fixed[L.H_CONFIG]) & L.CONFIG_SPLIT_IRQCHIP)
    chips, routes = new_chips(split, n)
    chips[2].reshape(n, L.IRQ_STRIDE)[:, L.IRQ_GIVEN] = _told(kvm, split)
    return [*parts, *chips], routes


def _told(kvm: np.ndarray, split: bool) -> np.ndarray:
    """vCPUs whose EOIs user space's IOAPIC wants as it said itself: up to version 5 nothing else changed them."""
    handled = kvm[:, L.K_IOAPIC_HANDLED : L.K_IOAPIC_HANDLED + 4].copy()
    if not split:
        handled[kvm[:, L.K_VCPU_ID] == 0, 0] &= ~np.uint64(1)  # the RTC's pin, as it rests
    return (handled != 0).any(axis=1)  # type: ignore[no-any-return]


def _check_header(words: np.ndarray, n: int) -> None:
    check(HEADER, words[None, : L.HEADER_WORDS])
    require(int(words[L.H_NOW]) <= latest_clock(int(words[L.H_TSC_KHZ])), "the clock")
    require(n > 0 and int(words[L.H_NVCPUS]) == n, "the number of vCPUs")
    maps = words[L.MAP0 : L.MAP1 + L.MAP_WORDS].reshape(2, L.MAP_WORDS)
    check(MAP, maps)
    slots = np.ascontiguousarray(maps[:, L.MAP_SLOTS :]).view(np.uint16)
    require(int(slots.max()) <= n, "a slot of the map")


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
    check(FILTER, filters)
    pointers = words[L.PID_TABLE - L.FILTER : L.AVIC_PHYSICAL - L.FILTER]
    rows = 8 * (L.HOT + np.arange(n, dtype=np.uint64) * L.HOT_STRIDE) | R.PID_POINTER_VALID
    require(bool(np.isin(pointers, np.append(rows, np.uint64(0))).all()), "a descriptor's address")
    logical = words[L.AVIC_LOGICAL - L.FILTER : L.TABLES_END - L.FILTER].view(np.uint32)
    known = np.uint32(1 << 31 | L.AVIC_PHYSICAL_ENTRIES - 1)
    require(bool((logical & ~known == 0).all()), "an AVIC logical id")


def _check_vcpus(rows: np.ndarray, hot: np.ndarray, config: int) -> None:
    check(KVM, rows)
    check(HOT, hot)
    if config & L.CONFIG_SVM or not config & L.CONFIG_HV_TIMER:  # its exit would have no handler, again and again
        require(bool((rows[:, L.K_HV_DEADLINE] == L.NONE).all()), "a preemption timer")
    ids = rows[:, L.K_VCPU_ID].tolist()
    require(len(set(ids)) == len(ids), "a vCPU's id")
