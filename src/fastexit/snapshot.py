"""A whole machine as bytes: version, checksum, then the words of its regions as far as its vCPUs fill them.

Bytes that come back are believed only after every word that kernels use as an index, a shift or a lock has been
checked: the checksum guards against damage, not against a forger.
"""

from __future__ import annotations

import struct
import zlib

import numpy as np

from fastexit import layout as L
from fastexit import regs as R
from fastexit.profile import PROFILES

_HEAD = struct.Struct("<8sIIII")
_MAGIC = b"FXSNAP\0\0"


def _rows(n: int) -> list[slice]:
    """The parts of a machine's memory that n vCPUs fill."""
    regions = (L.HOT, L.HOT_STRIDE), (L.VEC, L.VEC_STRIDE), (L.PAGE, L.PAGE_STRIDE), (L.KVM, L.KVM_STRIDE)
    fixed = [slice(0, L.MAP1 + L.MAP_WORDS), slice(L.FILTER, L.TABLES_END)]
    return [*fixed, *(slice(first, first + n * stride) for first, stride in regions)]


def pack(words: np.ndarray) -> bytes:
    """The snapshot of a machine's words. No other thread may act on the machine meanwhile."""
    n = int(words[L.H_NVCPUS])
    body = b"".join(words[rows].tobytes() for rows in _rows(n))
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
    if abi != L.ABI_VERSION:
        raise ValueError(f"snapshot has ABI version {abi}, this library has {L.ABI_VERSION}")
    body = data[_HEAD.size :]
    if len(body) != length:
        state = "truncated" if len(body) < length else "too long"
        raise ValueError(f"snapshot is {state}: {len(body)} of {length} bytes")
    if zlib.crc32(body) != crc:
        raise ValueError("snapshot is damaged: checksum differs")
    rows = _rows(n)
    if n > L.MAX_VCPUS or sum(r.stop - r.start for r in rows) * 8 != length:
        raise ValueError("snapshot is damaged: its size does not fit its vCPUs")
    source = np.frombuffer(body, dtype=np.uint64)
    _check_header(source, n)
    parts, at = [], 0
    for r in rows:
        parts.append(source[at : at + r.stop - r.start])
        at += r.stop - r.start
    _check_vcpus(parts[-1].reshape(n, L.KVM_STRIDE), parts[2].reshape(n, L.HOT_STRIDE))
    for r, part in zip(rows, parts, strict=True):
        words[r] = part
    words[L.H_TRACE_HEAD] = 0
    words[L.H_HANDLERS] = 0


def _require(holds: bool, what: str) -> None:
    if not holds:
        raise ValueError(f"snapshot is damaged: {what} is out of range")


def _check_header(words: np.ndarray, n: int) -> None:
    header = [int(word) for word in words[: L.HEADER_WORDS]]
    profiles = list(PROFILES.values())
    _require((header[L.H_MAGIC], header[L.H_ABI], header[L.H_WORDS]) == (L.MAGIC, L.ABI_VERSION, L.WORDS), "its header")
    _require(header[L.H_NVCPUS] == n and n > 0, "the number of vCPUs")
    _require(header[L.H_MAP] in (L.MAP0, L.MAP1) and header[L.H_MAP_LOCK] == 0, "the map in use")
    _require(header[L.H_PROFILE] < len(profiles), "the kernel")
    _require(header[L.H_TRAITS] == profiles[header[L.H_PROFILE]].traits, "the kernel's traits")
    _require(header[L.H_API] <= 15, "the x2APIC API")
    known = sum(value for name, value in vars(L).items() if name.startswith("CONFIG_"))
    _require(header[L.H_CONFIG] & ~known == 0, "the configuration")
    _require(header[L.H_MAXPHYADDR] <= 63, "MAXPHYADDR")
    _require(header[L.H_INHIBITS] >> len(R.Inhibit) == 0, "an APICv inhibit")
    for base in (L.MAP0, L.MAP1):
        _require(words[base + L.MAP_MAX_ID] <= L.MAX_VCPU_ID, "the map's highest id")
        _require(words[base + L.MAP_LOGICAL] <= R.LOGICAL_DISABLED, "the map's logical mode")
        slots = words[base + L.MAP_SLOTS : base + L.MAP_WORDS].view(np.uint16)
        _require(int(slots.max()) <= n, "a slot of the map")


def _check_vcpus(rows: np.ndarray, hot: np.ndarray) -> None:
    ids = rows[:, L.K_VCPU_ID]
    _require(bool((ids <= L.MAX_VCPU_ID).all()) and len(set(ids.tolist())) == len(ids), "a vCPU's id")
    caches = rows[:, L.K_ISR_CACHE]
    _require(bool(((caches < 256) | (caches == L.NONE)).all()), "a highest ISR vector")
    _require(bool((rows[:, [L.K_EXCEPTION, L.K_INTERRUPT]] <= 256).all()), "an injected vector")
    _require(bool((rows[:, L.K_SIPI_VECTOR] < 256).all()), "a SIPI vector")
    _require(bool(np.isin(rows[:, L.K_MP_STATE], [int(state) for state in R.MpState]).all()), "an mp_state")
    _require(bool((hot[:, L.HOT_MODE] <= R.READING_SHADOW_PAGE_TABLES).all()), "a vCPU's mode")
