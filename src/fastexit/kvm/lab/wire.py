"""Records in shared memory: what is asked of a lab's machine, and what it answers.

Models: nothing. init.c is the other side and has the same numbers. A batch of records goes over at once. Both sides
look at the memory for some hundred microseconds before they go to sleep; a byte on a serial line wakes the machine.
"""

from __future__ import annotations

import mmap
import os
import struct
import time
from collections.abc import Callable, Sequence
from enum import IntEnum
from typing import NamedTuple

BYTES = 16 << 20
HEADER_BYTES = 4096
READY = 0x4654
ASKED, REQUEST_BYTES, SPINS = 0, 1, 2
DONE, ANSWER_BYTES, SLEEPING, IS_READY = 16, 17, 18, 19
"""Dwords of the header. Those of each side have a cache line of their own."""

LOOKS_BEFORE_SLEEP = 2000
SPINS_OF_THE_MACHINE = 60_000
NAP_SECONDS = 5e-5
LONGEST_NAP_SECONDS = 2e-3

_RECORD = struct.Struct("<HHI")
_ANSWER = struct.Struct("<iI")


class Ask(IntEnum):
    """What a record asks for."""

    OPEN = 1
    CLOSE = 2
    IOCTL = 3
    READ = 4
    WRITE = 5
    MEMORY = 6
    STORE = 7
    GUEST = 8
    FREE = 9
    EXECUTE = 10
    WATCH = 11
    LOOK = 12
    CLOCK = 13
    SLEEP = 14
    QUIT = 15
    ANSWER = 16
    DEADLINE = 17
    PROGRAM = 18
    SURVEY = 19
    LIVE = 20
    EVENTFD = 21
    MAKE_READY = 22


LOOK_STATES, LOOK_SREGS, SET_REGS, ANEW = 1, 2, 1, 1
"""Flags of LOOK, of EXECUTE and of SURVEY."""

Record = tuple[Ask, int, bytes]
"""What is asked for, flags, payload."""


class Answer(NamedTuple):
    """What one record came to: a result, or an error number below 0, and bytes."""

    result: int
    data: bytes


class WireBroken(OSError):
    """The machine is gone, or never came up; its text is one line that says why."""

    def __str__(self) -> str:
        return self.strerror or "the lab's machine is gone"


def pack(records: Sequence[Record]) -> bytes:
    """Records as the machine reads them: op, flags, length, payload up to a multiple of 8."""
    parts: list[bytes] = []
    for op, flags, payload in records:
        parts += (_RECORD.pack(op, flags, len(payload)), payload, bytes(-len(payload) & 7))
    return b"".join(parts)


def unpack(data: bytes) -> list[Answer]:
    """Answers, in the order of their records."""
    answers, at = [], 0
    while at < len(data):
        result, length = _ANSWER.unpack_from(data, at)
        at += _ANSWER.size
        answers.append(Answer(result, data[at : at + length]))
        at += length + 7 & ~7
    return answers


class Wire:
    """One end of the shared memory.

    Args:
        memory: a file descriptor of the shared memory.
        bell: rings the machine's serial line.
        why_gone: None while the machine is alive, else one line that says what became of it.
    """

    def __init__(self, memory: int, bell: Callable[[], object], why_gone: Callable[[], str | None]) -> None:
        os.ftruncate(memory, BYTES)
        self._bytes = mmap.mmap(memory, BYTES)
        self._words = memoryview(self._bytes).cast("I")
        self._bell = bell
        self._why_gone = why_gone
        self._words[SPINS] = SPINS_OF_THE_MACHINE

    @property
    def closed(self) -> bool:
        """Whether nothing can be asked any more."""
        return self._bytes.closed

    def close(self) -> None:
        """Gives the memory back."""
        self._words.release()
        self._bytes.close()

    def wait_for_machine(self, seconds: float) -> None:
        """Returns when the machine answers; WireBroken when it is gone or too slow."""
        until = time.monotonic() + seconds
        while self._words[IS_READY] != READY:
            self._still_there(until, seconds)
            time.sleep(0.02)

    def trip(self, records: Sequence[Record], seconds: float = 60.0) -> list[Answer]:
        """Carries a batch over and its answers back; WireBroken when the machine does not answer in time."""
        data = pack(records)
        if len(data) > BYTES // 2 - HEADER_BYTES:
            raise ValueError(f"{len(data)} bytes are too many for one batch")
        words = self._words
        self._bytes[HEADER_BYTES : HEADER_BYTES + len(data)] = data
        words[REQUEST_BYTES] = len(data)
        asked = words[ASKED] + 1 & 0xFFFF_FFFF
        words[ASKED] = asked
        self._wait(asked, seconds)
        return unpack(self._bytes[BYTES // 2 : BYTES // 2 + words[ANSWER_BYTES]])

    def _wait(self, asked: int, seconds: float) -> None:
        words = self._words
        rung = False
        for _ in range(LOOKS_BEFORE_SLEEP):
            if words[DONE] == asked:
                return
            if not rung and words[SLEEPING]:
                self._bell()
                rung = True
        nap, until = NAP_SECONDS, time.monotonic() + seconds
        while words[DONE] != asked:
            if not rung and words[SLEEPING]:
                self._bell()
                rung = True
            time.sleep(nap)
            if nap < LONGEST_NAP_SECONDS:
                nap *= 1.2
            else:
                self._still_there(until, seconds)

    def _still_there(self, until: float, seconds: float) -> None:
        why = self._why_gone()
        if why is None and time.monotonic() > until:
            why = f"the lab's machine did not answer in {seconds:.0f} s"
        if why is not None:
            raise WireBroken(0, why)
