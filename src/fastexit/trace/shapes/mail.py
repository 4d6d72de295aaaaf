"""What mail does to lines: quotes them, wraps them, encodes them; undone as far as it can be told."""

from __future__ import annotations

import re

_QUOTE = re.compile(rb"(?: ?[>|] ?)+")
_ENCODED = re.compile(rb"=([0-9A-F]{2})")
_TIME = rb"(?:\s+\d+(?:\.\d+|us)?\s*:)?\s*$"
_HEAD = re.compile(
    rb".*\[\d{1,6}\](?:\s+[.\w#]{3,10})?"
    + _TIME
    + rb"|.*-\d{1,10} +\d{1,4}[.a-zA-Z#][.\w#]{3,9}"
    + _TIME
    + rb"|.*\s\d+\.\d+:\s*$"
)
"""All of a line that was cut before its event."""
_NAME = re.compile(rb".*[\s\]](?:kvm:)?kvm_\w+:\s*$")
"""All of a line that was cut behind its event's name."""
_WORDS = (
    rb"info[12]?|intr_info|error_code|rip|requests|reason|level|source|vec|vector|dst|apicid|chip|pin|val|gpa|len|"
    rb"a[0-3]|rep_cnt|idx|in|out|hv_timer|count|size|result|address|processor_mask"
)
_GOES_ON = re.compile(
    rb"\s*(?:(?:" + _WORDS + rb")\s+\S|\(?(?:Fixed|LowPrio|SMI|NMI|INIT|SIPI|ExtINT|edge|level)\||=\s*0x|= |"
    rb"\((?:#GP|coalesced|edge|level)|\[reinjected)"
)
_LONGEST_REST = 200


def unquoted(line: bytes) -> bytes:
    """The line without ``> `` in front of it, however often."""
    match = _QUOTE.match(line)
    return line[match.end() :] if match else line


def decoded(line: bytes) -> bytes:
    """The line with the escapes of quoted-printable undone."""
    return _ENCODED.sub(lambda match: bytes([int(match[1], 16)]), line)


def joined(line: bytes, rest: bytes) -> bytes | None:
    """The line that mail wrapped, or None where ``rest`` is no rest of it."""
    if line.endswith(b"=") and not line.endswith((b" =", b"==")):  # a soft line break of quoted-printable
        return line[:-1] + rest
    more = rest.strip()
    if more and len(more) <= _LONGEST_REST and (cut(line) or _GOES_ON.match(more)):
        return line.rstrip() + b" " + more
    return None


def cut(line: bytes) -> bool:
    """True for a line that was cut before or right behind its event's name."""
    return bool(_HEAD.match(line) or _NAME.match(line))


def rest(line: bytes) -> bool:
    """True for a line that can only be the rest of another."""
    return bool(_GOES_ON.match(line))
