"""Tables of what a kernel release brought to the texts of tracepoints.

A text may change within a series, and a change may come to a stable series long after it came to a later one; so texts
go by releases, where all other behaviour goes by generations.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

from fastexit.releases import generation, release

_Entry = TypeVar("_Entry")

Numbers = tuple[int, int, int]

_FROM_THE_FIRST = -1, -1, -1
_LATEST = 1 << 16
"""The patch level of a series whose release does not say it: the latest, as generations follow the latest."""


def numbers(text: str) -> Numbers:
    """Give a release as numbers that compare; a name that is no release, such as the seed's, is before all of them.

    >>> numbers("6.12.118"), numbers("6.2")
    ((6, 12, 118), (6, 2, 0))
    """
    found = release(text)
    return _FROM_THE_FIRST if found is None else (found.major, found.minor, found.patch or 0)


def printed_as(kernel: str, named: str) -> Numbers:
    """Tell whose texts a machine prints: the release's that was named, or those of its generation's tree.

    >>> printed_as("6.1", "6.1"), printed_as("6.1", "6.1.0-57-cloud-amd64"), printed_as("6.1", "6.1.20")
    ((6, 1, 192), (6, 1, 192), (6, 1, 20))
    """
    tree, found = numbers(generation(kernel).tree.split()[-1]), release(named)
    if named == kernel or found is None:
        return tree
    if found.patch is not None:
        return found.major, found.minor, found.patch
    return tree if found.series == tree[:2] else (found.major, found.minor, _LATEST)


def held(table: Mapping[str, _Entry], at: Numbers) -> _Entry | None:
    """Look up what holds in a release: the entry of the latest one in the table that is not later; None without one.

    >>> held({"6.1.176": "new", "6.2": "old", "6.12": "new"}, (6, 8, 0))
    'old'
    """
    known = [first for first in table if numbers(first) <= at]
    return table[max(known, key=numbers)] if known else None
