"""Shapes that become canonical a chunk at a time, several times as fast as line by line.

A line that does not fit stays as it is, for who reads to ask about. All of it is linear in the length of a line,
whatever stands in it.
"""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np

Bulk = Callable[[bytes], bytes]
"""Makes every line of a chunk canonical that it fits."""

_SCALE = 9
_DIGITS = 20
_ZERO, _COLON, _BLANK, _BRACKET, _POINT, _END = b"0: ].\n"


def _bulk(pattern: bytes, template: bytes) -> Bulk:
    compiled = re.compile(pattern, re.MULTILINE)
    return lambda chunk: compiled.sub(template, chunk)


def _ticks(chunk: bytes) -> bytes:
    """Times without a decimal point get one, nine digits from their end: the first number of a line that a colon and a
    blank follow, ten digits or more behind a blank or the CPU's bracket.
    """
    text = np.frombuffer(chunk, np.uint8)
    if len(text) < _SCALE:
        return chunk
    digit = text - np.uint8(_ZERO) < 10
    ends = np.flatnonzero((text[1:-1] == _COLON) & (text[2:] == _BLANK) & digit[:-2]) + 1
    others = np.flatnonzero(~digit)
    before = others[np.searchsorted(others, ends - 1) - 1]
    length = ends - before - 1
    behind = text[before]
    fits = (length > _SCALE) & (length <= _DIGITS) & ((behind == _BLANK) | (behind == _BRACKET))
    ends, before, behind = ends[fits], before[fits], behind[fits]
    lines = np.searchsorted(np.flatnonzero(text == _END), ends)
    first = np.ones(len(ends), np.bool_)
    first[1:] = lines[1:] != lines[:-1]
    close = before[first & (behind == _BRACKET)] + 1
    points = ends[first] - _SCALE
    letters = np.concatenate([np.full(len(points), _POINT, np.uint8), np.full(len(close), _BLANK, np.uint8)])
    return np.insert(text, np.concatenate([points, close]), letters).tobytes()


_NAME = rb"(?:[a-z]\w*+:(?=[a-z]))?"

BULKS: tuple[Bulk, ...] = (
    _bulk(
        rb"^ *+(\S[^\n]*?)(?<! ) ++(\d{1,10}) ++\[(\d{1,6})\] ++(\d{1,20}\.\d{1,9}): ++" + _NAME,
        rb"       \1-\2 [\3] \4: ",
    ),
    _bulk(
        rb"^ *+(\S[^\n]*?)(?<! ) ++(\d{1,10})/(\d{1,10}) ++\[(\d{1,6})\] ++(\d{1,20}\.\d{1,9}): ++" + _NAME,
        rb"       \1-\3 (\2) [\4] \5: ",
    ),
    _ticks,
    _bulk(rb"^ *+(?:[^\s:]++:){1,2}+ ++(?=[^\n]*?-\d{1,10} ++[(\[])", rb""),
    _bulk(rb": \(\+-?[\d.]++\) ++(?=[a-z])", rb": "),
)
"""perf script without and with processes, a clock that has no decimal point, trace-cmd report with a name in front and
with --ts-diff."""
