"""What mail and web pages do to lines: quote them, wrap them, encode them; undone as far as it can be told."""

from __future__ import annotations

import re

_QUOTE = re.compile(rb"(?: ?[>|] ?)+")
_ENTITIES = {b"&lt;": b"<", b"&gt;": b">", b"&quot;": b'"', b"&#39;": b"'", b"&nbsp;": b" ", b"&amp;": b"&"}
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
_EVENT = re.compile(rb"[\s\]:]kvm_\w+:\s")
_WORDS = (
    "info info1 info2 intr_info error_code rip requests reason level source vec vector dst apicid irqchip master slave "
    "chip pin val gpa len at a0 a1 a2 a3 nr code fast slow cnt var_cnt rep_cnt idx in out hv_timer count size result "
    "address processor_mask vcpu vcpu_id msr_read msr_write apic_read apic_write mmio read write unsatisfied-read "
    "pio_read pio_write cr_read cr_write func rax rbx rcx rdx time ns wait poll polling valid invalid data msr "
    "host sint"
)
_TOKEN = re.compile(
    rb"(?:" + b"|".join(map(re.escape, _WORDS.encode().split())) + rb")[:,]?"
    rb"|(?:0x)?[0-9a-f]+[:,]?|-\d+|[A-Z][A-Z0-9_]+|\(?#?[\w-]+(?:\|[\w-]+)+\)?|\(#?\w+\)|=|\[reinjected\]"
)
"""A word of an event's text."""
_LONGEST_REST = 200
_MOST_WORDS = 40


def unquoted(line: bytes) -> bytes:
    """The line without ``> `` in front of it, however often."""
    match = _QUOTE.match(line)
    return line[match.end() :] if match else line


def plain(line: bytes) -> bytes:
    """The line without quotes and HTML's escapes, with blanks for a web page's blanks and tabs."""
    if b"&" in line:
        for escape, letter in _ENTITIES.items():
            line = line.replace(escape, letter)
    return unquoted(line.replace(b"\xc2\xa0", b" ").replace(b"\t", b" "))


def quoted(line: bytes) -> bool:
    """True where a quote's mark is in front."""
    return line.lstrip()[:1] in (b">", b"|", b"&")


def decoded(line: bytes) -> bytes:
    """The line with the escapes of quoted-printable undone."""
    return _ENCODED.sub(lambda match: bytes([int(match[1], 16)]), line)


def joined(line: bytes, rest: bytes) -> bytes | None:
    """The line that mail wrapped, or None where ``rest`` is no rest of it."""
    if line.endswith(b"=") and not line.endswith((b" =", b"==")):  # a soft line break of quoted-printable
        return line[:-1] + rest
    more = rest.strip()
    if not more or len(more) > _LONGEST_REST:
        return None
    return line.rstrip() + b" " + more if cut(line) or line.endswith(b" reason") or goes_on(more) else None


def cut(line: bytes) -> bool:
    """True for a line that was cut before or right behind its event's name."""
    return bool(_HEAD.match(line) or _NAME.match(line))


def begun(line: bytes) -> bool:
    """True for a line that was cut, or has an event's name and may go on behind it."""
    return cut(line) or bool(_EVENT.search(line))


def goes_on(line: bytes) -> bool:
    """True for a line that can only be the rest of another: all of its words are of an event's text."""
    words = line.split()
    return 0 < len(words) <= _MOST_WORDS and all(map(_TOKEN.fullmatch, words))
