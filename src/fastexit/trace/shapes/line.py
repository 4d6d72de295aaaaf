"""The canonical line, and the parts that it is made of."""

from __future__ import annotations

import re
from typing import NamedTuple

LONGEST = 1 << 12
"""Bytes of the longest line that is looked at; KVM's are a tenth of that."""

LONGEST_MENDED = 1 << 10
"""Bytes of the longest line that is worth a look when it is not canonical."""
PREFIX = re.compile(rb" *(?:[^\s:]+:){1,2} +(?=\S)")
"""What trace-cmd report puts in front of lines of a buffer or of one of several files, and grep of a file's lines."""
RECORD = b"PERF_RECORD_"
"""How perf names its own records: threads that begin, maps, lost events."""
STACK = re.compile(rb"\s+[0-9a-f]{6,16} \S|\s*=> ")
"""A line of a call chain."""
VCPU = re.compile(rb"kvm_(?:entry|exit): vcpu (\d{1,4})\b")
"""Where a line names the vCPU whose thread printed it."""

LINE = re.compile(
    rb"(?P<comm>.*?)"
    rb"(?:-(?P<pid>\d{1,10}) +(?:\( *(?P<tgid>\d{1,10}|-+)\) +)?"
    rb"|(?<! ) +(?:(?P<perf_tgid>\d{1,10})/)?(?P<perf_pid>\d{1,10}) +)"
    rb"\[\d{1,6}\] +(?:(?P<flags>[^\s:\[\]]{4,8}) +)?(?P<time>\d{1,20}\.\d{1,9}): +(?P<body>\S.*)"
)
"""A line that ftrace or, with all of its fields, perf script prints: what is read as it is."""


class Parts(NamedTuple):
    """What a line says before its text; empty is what it does not say. ``time`` is canonical, ``secs.frac``."""

    body: bytes
    comm: bytes = b""
    pid: bytes = b""
    tgid: bytes = b""
    cpu: bytes = b""
    flags: bytes = b""
    time: bytes = b""
    ticks: bool = False


def canonical(parts: Parts) -> bytes:
    """The line that says it, its parts all there."""
    tgid = b" (%7b)" % parts.tgid if parts.tgid else b""
    flags = b" %b" % parts.flags if parts.flags else b""
    return b"%b-%b%b [%03d]%b %b: %b" % (
        parts.comm.rjust(16),
        parts.pid,
        tgid,
        int(parts.cpu),
        flags,
        parts.time,
        parts.body,
    )


def seconds(digits: bytes, scale: int) -> bytes:
    """A number of units of 10^-scale s as ``secs.frac``, with no rounding: b"234434", 6 -> b"0.234434"."""
    digits = digits.rjust(scale + 1, b"0")
    return b"%b.%b" % (digits[:-scale].lstrip(b"0") or b"0", digits[-scale:])
