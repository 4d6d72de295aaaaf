"""The memory that the scanner works in: one block of 64-bit words, with tables that Python fills when it is asked.

A name's entry (NAMES) is known by its bytes: an event's name, an exit reason. A head's entry (HEADS) is what stands
before the CPU on a line, and says which thread that is. Both are open-addressed; an entry with no length is free.
"""

from __future__ import annotations

from enum import IntEnum

import numpy as np

U = np.uint64

# --------------------------------------------------------------------------------------------------- between two calls
AT = 0
"""Where the next line begins, in bytes from the beginning of the text."""
LINE = 1
"""Its number."""
ROWS = 2
"""Rows that are there."""
BAD = 3
"""Lines that could not be read: entries in BADS."""
MISSED, MISSED_LENGTH, MISSED_SLOT = 4, 5, 6
"""Bytes that no table knows, their length, and the free entry that they would have."""
# --------------------------------------------------------------------------------------------------- within one line
VALUE = 8
"""What the token before stands for."""
NAME, VCPU = 9, 10
"""Of the row, NONE at first."""
EVENT_NAME = 11
"""Index of the event's own name."""
LAST_HEAD = 12
"""Entry of the head before: most lines have the same."""

CLASSES = 64
"""What each byte is: the value of a hexadecimal digit or 16; bits 5 up: WORDLIKE, FLAGLIKE, DARK."""
WORDLIKE, FLAGLIKE, DARK = 1 << 5, 1 << 6, 1 << 7

NAMES = 512
NAME_ENTRIES = 1 << 12
NAME_WORDS = 16
NAME_LENGTH, NAME_INDEX, NAME_KIND, NAME_EVENT, NAME_BYTES = 0, 1, 2, 3, 4
LONGEST_NAME = 64
"""Bytes: no name in KVM is half as long."""

HEADS = NAMES + NAME_ENTRIES * NAME_WORDS
HEAD_ENTRIES = 1 << 11
HEAD_WORDS = 32
HEAD_LENGTH, HEAD_THREAD, HEAD_BYTES = 0, 1, 2
LONGEST_HEAD = 200

BADS = HEADS + HEAD_ENTRIES * HEAD_WORDS
BAD_ENTRIES = 1 << 12
BAD_WORDS = 3
"""A line that could not be read: its number, where it begins, its length."""

OUT = BADS + BAD_ENTRIES * BAD_WORDS
OUT_ROWS = 1 << 14
ROW_WORDS = 8

WORDS = OUT + OUT_ROWS * ROW_WORDS

NONE = 0xFFFF_FFFF
PADDING = 256
"""Bytes behind a text, the first of them a line end: what looks ahead stays among them."""


class Why(IntEnum):
    """Why the scanner came back."""

    DONE = 0
    """The text is at its end."""
    FULL = 1
    """So is the room for rows or for bad lines."""
    NEW_NAME = 2
    NEW_HEAD = 3


class Kind(IntEnum):
    """How the text behind an event's name is read."""

    OTHER = 0
    KVM = 1
    """Of kvm, perhaps with a vCPU in front."""
    EXIT = 2
    ENTRY = 3
    MSR = 4
    APIC = 5
    IPI = 6
    ACCEPT = 7
    EOI = 8
    INJ_VIRQ = 9
    INJ_EXCEPTION = 10
    SET_IRQ = 11
    IOAPIC = 12
    DELAYED_EOI = 13
    MSI = 14
    PIC = 15
    ACK = 16
    PIO = 17
    MMIO = 18
    FAST_MMIO = 19
    HYPERCALL = 20
    HV_HYPERCALL = 21
    HV_SEND_IPI = 22
    INHIBIT = 23
    INHIBIT_REQUEST = 24
    NESTED_VMEXIT = 25
    NESTED_INJECT = 26
    NESTED_INTERCEPTS = 27
    NESTED_INTR = 28
    NAMED = 29
    """Nothing but the event's own name."""
    USERSPACE = 30
    WAKEUP = 31
    HALT_POLL = 32
    PAGE_FAULT = 33
    CPUID = 34
    CR = 35
    INCOMPLETE_IPI = 36
    UNACCELERATED = 37
    DOORBELL = 38
    HV_TIMER = 39
    PI_IRTE = 40
    SMM = 41
    SWITCH = 42


def classes() -> np.ndarray[tuple[int], np.dtype[np.uint64]]:
    """The words of CLASSES."""
    found = np.full(256, 16, U)
    for i in range(16):
        found[ord(f"{i:x}")] = found[ord(f"{i:X}")] = i
    for byte in range(256):
        character = chr(byte)
        if byte < 128 and (character.isalnum() or character == "_"):
            found[byte] |= U(WORDLIKE)
        if 0x20 < byte < 0x7F and character not in ":[]":
            found[byte] |= U(FLAGLIKE)
        if byte > 0x20:
            found[byte] |= U(DARK)
    return found
