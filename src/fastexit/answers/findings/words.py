"""Numbers as findings say them."""

from __future__ import annotations

from collections.abc import Iterable


def duration(ns: float) -> str:
    """A duration, in the unit that suits it.

    >>> [duration(ns) for ns in (850, 11_628_000, 5_984_000_000_000)]
    ['850 ns', '11.6 ms', '5,984 s']
    """
    for unit, size in ("s", 1e9), ("ms", 1e6), ("us", 1e3):
        if ns >= size:
            value = ns / size
            return f"{value:,.0f} {unit}" if value >= 100 else f"{value:.3g} {unit}"
    return f"{ns:.0f} ns"


def times(n: int) -> str:
    """How often.

    >>> times(1), times(2), times(1234)
    ('once', 'twice', '1,234 times')
    """
    return {1: "once", 2: "twice"}.get(n, f"{n:,} times")


def listed(words: Iterable[str], last: str = "and") -> str:
    """Words as a sentence has them.

    >>> listed(["a", "b", "c"])
    'a, b and c'
    """
    *most, end = words
    return f"{', '.join(most)} {last} {end}" if most else end


def vector(number: int) -> str:
    """A vector both ways, as traces print either.

    >>> vector(209)
    '209 (0xd1)'
    """
    return f"{number} (0x{number:x})"
