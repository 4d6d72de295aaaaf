"""Numbers and foreign text as a reader sees them: durations, shares, ranges, and names without control characters."""

from __future__ import annotations

import os
from collections.abc import Iterable

_LONGEST = 300


def clean(text: object, longest: int = _LONGEST) -> str:
    r"""``text`` with everything that a terminal or a page could act on spelled out, and cut where it has no end.

    Thread names are a guest's or a user's own words: escape sequences, line ends, and marks that turn text around.

    >>> clean("CPU 0/KVM\x1b[31m")
    'CPU 0/KVM\\x1b[31m'
    """
    told = str(text)
    shown = told[:longest] + ("..." if len(told) > longest else "")
    if shown.isprintable():
        return shown
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in shown)


def names(paths: Iterable[str]) -> dict[str, str]:
    """What files are called beside each other: by their last part, or from the folder that all are in.

    >>> names(["a/x.trace", "a/y.trace"]), names(["a/x", "b/x"])
    ({'a/x.trace': 'x.trace', 'a/y.trace': 'y.trace'}, {'a/x': 'a/x', 'b/x': 'b/x'})
    >>> names(["/t/a/x", "/t/b/x", "-"])
    {'/t/a/x': 'a/x', '/t/b/x': 'b/x', '-': 'standard input'}
    """
    given = list(dict.fromkeys(paths))
    files = [path for path in given if path != "-"]
    last = {path: os.path.basename(path) or path for path in files}
    if len(set(last.values())) < len(files):
        try:
            folder = os.path.commonpath([os.path.dirname(path) for path in files])
        except ValueError:  # some from the root, some from here
            folder = ""
        last = {path: os.path.relpath(path, folder) if folder else path for path in files}
    return {path: "standard input" if path == "-" else clean(last[path]) for path in given}


def count(n: int, noun: str = "") -> str:
    """A number, and what it counts.

    >>> count(1, "exit"), count(12000, "exit")
    ('1 exit', '12,000 exits')
    """
    if not noun:
        return f"{n:,}"
    plural = noun[:-1] + "ies" if noun[-1] == "y" else noun + "s"
    return f"{n:,} {noun if n == 1 else plural}"


def share(part: float) -> str:
    """A percentage that says 100 and 0 only when nothing is missing, and when nothing is there.

    >>> share(1.0), share(0.99999), share(0.00001), share(0.0), share(0.421)
    ('100 %', '99.9 %', '< 0.1 %', '0 %', '42.1 %')
    """
    if part in (0, 1):
        return f"{100 * part:.0f} %"
    return "< 0.1 %" if 0 < part < 0.0005 else f"{min(100 * part, 99.9):.1f} %"


_UNITS = ((1e9, "s"), (1e6, "ms"), (1e3, "us"))


def duration(ns: float | None, clock: str = "ns") -> str:
    """A time in the unit that gives three digits; what a clock counts that is no time is "ticks".

    >>> [duration(ns) for ns in (0, 580, 1080, 11_600_000, 2.5e9, 7.2e12)]
    ['0 ns', '580 ns', '1.08 us', '11.6 ms', '2.50 s', '7,200 s']
    >>> duration(1080, "ticks"), duration(None), duration(-1)
    ('1,080 ticks', '-', '-')
    """
    if ns is None or ns < 0:
        return "-"
    if clock != "ns":
        return f"{ns:,.0f} {clock}"
    for unit, name in _UNITS:
        if ns >= 0.9995 * unit:
            value = ns / unit
            digits = 2 if value < 9.995 else 1 if value < 99.95 else 0
            return f"{value:,.{digits}f} {name}"
    return f"{ns:,.0f} ns"


def rate(per_second: float | None) -> str:
    """How often in a second.

    >>> rate(4193.5), rate(2.345), rate(None)
    ('4,194', '2.3', '-')
    """
    return "-" if per_second is None else f"{per_second:,.{0 if per_second >= 10 else 1}f}"


def short(number: float) -> str:
    """A large number in three digits.

    >>> short(950), short(12_345), short(4.1e6), short(7.25e12)
    ('950', '12.3 k', '4.1 M', '7.25 T')
    """
    for unit, name in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= 0.9995 * unit:
            return f"{number / unit:.3g} {name}"
    return f"{number:.3g}"


def between(ends: tuple[float, float] | None) -> str:
    """A range, as one number where both ends read the same.

    >>> between((380.0, 640.0)), between((4.1e6, 4.1e6)), between(None)
    ('380 to 640', '4.1 M', '-')
    """
    if ends is None:
        return "-"
    least, most = short(ends[0]), short(ends[1])
    return least if least == most else f"{least} to {most}"


def most(counts: Iterable[tuple[str, int]], total: int, limit: int = 3) -> str:
    """The most frequent of some things, with their shares.

    >>> most([("HLT", 6), ("MSR_WRITE", 3), ("CPUID", 1)], 10, limit=2)
    'HLT 60.0 %, MSR_WRITE 30.0 %'
    """
    largest = sorted(counts, key=lambda pair: (-pair[1], pair[0]))[:limit]
    return ", ".join(f"{clean(name)} {share(n / total) if total else n}" for name, n in largest)


def at_lines(lines: list[int], limit: int = 4) -> str:
    """Which lines of the trace show something.

    >>> at_lines([3]), at_lines([3, 4]), at_lines([1, 2, 3, 4, 5, 6]), at_lines([])
    ('line 3', 'lines 3, 4', 'lines 1, 2, 3, 4 and 2 more', '')
    """
    if not lines:
        return ""
    more = f" and {len(lines) - limit:,} more" if len(lines) > limit else ""
    return f"line{'s' if len(lines) > 1 else ''} {', '.join(f'{line:,}' for line in lines[:limit])}{more}"
