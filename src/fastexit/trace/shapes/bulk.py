"""Shapes that become canonical by one substitution in a whole chunk, several times as fast as line by line.

A line that the pattern does not fit stays as it is, for who reads to ask about. Patterns are linear in the length of a
line, whatever stands in it.
"""

from __future__ import annotations

import re
from typing import NamedTuple


class Bulk(NamedTuple):
    """A pattern, and what stands in place of each match."""

    pattern: re.Pattern[bytes]
    template: bytes

    def __call__(self, chunk: bytes) -> bytes:
        """The chunk with every line that fits made canonical."""
        return self.pattern.sub(self.template, chunk)


def _bulk(pattern: bytes, template: bytes) -> Bulk:
    return Bulk(re.compile(pattern, re.MULTILINE), template)


_NAME = rb"(?:[a-z]\w*+:(?=[a-z]))?"
_DASHED = rb"^([^\n]*?-\d{1,10} ++(?:\([ \d-]++\) ++)?\[\d{1,6}\](?: ++[^\s:\[\]]{4,8}(?= ))?)"

BULKS = (
    _bulk(
        rb"^ *+(\S[^\n]*?)(?<! ) ++(\d{1,10}) ++\[(\d{1,6})\] ++(\d{1,20}\.\d{1,9}): ++" + _NAME,
        rb"       \1-\2 [\3] \4: ",
    ),
    _bulk(
        rb"^ *+(\S[^\n]*?)(?<! ) ++(\d{1,10})/(\d{1,10}) ++\[(\d{1,6})\] ++(\d{1,20}\.\d{1,9}): ++" + _NAME,
        rb"       \1-\3 (\2) [\4] \5: ",
    ),
    _bulk(_DASHED + rb" *+(\d{1,11})(\d{9}): ", rb"\1 \2.\3: "),
    _bulk(rb"^ *+(?:[^\s:]++:){1,2}+ ++(?=[^\n]*?-\d{1,10} ++[(\[])", rb""),
    _bulk(_DASHED + rb" ++(\d{1,20}\.\d{1,9}): \(\+-?[\d.]++\) ++", rb"\1 \2: "),
)
"""perf script without and with processes, a clock that has no decimal point, trace-cmd report with a name in front and
with --ts-diff."""
