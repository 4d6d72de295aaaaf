"""What a survey of Windows guests sees: pages, events, states, synthetic MSRs, memory; and what of it is no difference.

Models: nothing.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass

from fastexit import hyperv as hv
from fastexit import regs as r
from fastexit.kvm import ioctl as K
from fastexit.kvm.lab import hvguest as G
from fastexit.kvm.lab.device import LATCHED_INIT_AT, SEEN, SEEN_BYTES
from fastexit.kvm.lab.hvdraw import MARGIN_NS
from fastexit.kvm.lab.wire import Answer

SURVEYED = (
    hv.MSR_HV_GUEST_OS_ID,
    hv.MSR_HV_HYPERCALL,
    hv.MSR_HV_VP_INDEX,
    hv.MSR_HV_REFERENCE_TSC,
    hv.MSR_HV_VP_ASSIST_PAGE,
    *range(hv.MSR_HV_SCONTROL, hv.MSR_HV_SIMP + 1),
    *range(hv.MSR_HV_SINT0, hv.MSR_HV_SINT15 + 1),
    *range(hv.MSR_HV_STIMER0_CONFIG, hv.MSR_HV_STIMER3_COUNT + 1),
    *range(hv.MSR_HV_CRASH_P0, hv.MSR_HV_TSC_EMULATION_STATUS + 1),
)
"""What every look reads; all of it costs nothing to read."""
TIMES_IN_MESSAGE = (24, 32)
"""Bytes of a timer's message: its expiration and when it was written, in 100 ns."""
UNUSED_FLAGS = 0xFE << 40
"""Of the first eight bytes of a message: flags that nobody has named."""
TOLERANCE = MARGIN_NS // 100


@dataclass(frozen=True)
class Sight:
    """What can be seen of a machine behind an operation."""

    pages: tuple[bytes, ...]
    states: tuple[tuple[int, ...], ...]
    """NMIs pending, NMIs blocked, an INIT pending, and mp_state behind it."""
    msrs: tuple[tuple[int, ...], ...]
    memory: bytes


class Eyes:
    """What surveys have shown so far: each tells only what has changed."""

    def __init__(self, vcpus: int) -> None:
        self._seen = [bytearray(SEEN_BYTES) for _ in range(vcpus)]
        self._msrs = [bytearray(8 * len(SURVEYED)) for _ in range(vcpus)]
        self._memory = bytearray(G.DATA_BYTES)

    def see(self, answer: Answer) -> Sight:
        """What a survey's answer adds up to."""
        if answer.result < 0:
            raise OSError(-answer.result, "a look failed")
        words = memoryview(answer.data).cast("I")
        at = 0
        counts = []
        for seen, msrs in zip(self._seen, self._msrs, strict=True):
            at = _apply(words, at, seen)
            counts.append(words[at])
            at = _apply(words, at + 1, msrs)
        _apply(words, at, self._memory)
        return Sight(
            tuple(bytes(seen[: r.LAPIC_PAGE_BYTES]) for seen in self._seen),
            tuple(tuple(_state(seen)) for seen in self._seen),
            tuple(
                struct.unpack(f"<{count}Q", msrs[: 8 * count]) for count, msrs in zip(counts, self._msrs, strict=True)
            ),
            bytes(self._memory),
        )


def _state(seen: bytearray) -> Iterator[int]:
    """What of struct kvm_vcpu_events is compared, and mp_state."""
    events = SEEN[K.GET_VCPU_EVENTS][0]
    for name in ("pending", "masked"):
        yield seen[events + K.ffi.offsetof("struct kvm_vcpu_events", "nmi", name)]
    yield seen[LATCHED_INIT_AT]
    yield struct.unpack_from("<I", seen, SEEN[K.GET_MP_STATE][0])[0]


def _apply(words: memoryview, at: int, to: bytearray) -> int:
    """Applies a list of changed dwords, of which the first word says how many; where the next one begins."""
    count = words[at]
    dwords = memoryview(to).cast("I")
    for n in range(at + 1, at + 1 + 2 * count, 2):
        dwords[words[n]] = words[n + 1]
    return at + 1 + 2 * int(count)


def unlike(expected: bytes, got: bytes, leaks: bool = False) -> int | None:
    """Where two memories differ, None if it is only in the times of messages, by less than a story's uncertainty.

    ``leaks``: nor does what a kernel's stack had count, in the flags of a message that is in another one's way.
    """
    for page in range(0, len(expected), 4096):
        if expected[page : page + 4096] == got[page : page + 4096]:
            continue
        for at in range(page, page + 4096, 8):
            one, two = (struct.unpack_from("<Q", memory, at)[0] for memory in (expected, got))
            if one == two:
                continue
            if leaks and at % hv.HV_MESSAGE_BYTES == 0 and not (one ^ two) & ~UNUSED_FLAGS:
                continue
            is_time = at % hv.HV_MESSAGE_BYTES in TIMES_IN_MESSAGE
            if not is_time or abs(one - two) > TOLERANCE:
                return at
    return None
