"""Kernel releases, and which generation each belongs to.

A release is what people have: "5.13", "v6.12.3", "5.15.0-105-generic". Its generation is the newest one that is not
later. Where the stable releases of one series differ and the release says its patch level, its traits are its own.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from fastexit.checks import quoted
from fastexit.profile import PROFILES, SDM, Profile, named

FIRST = 5, 4
"""The series on which the patch was written; the oldest one that has a generation."""
FAST_FIRST = 5, 6
"""The first series that has a fast path by itself."""
LONGEST = 63
"""Characters of a release; a header has so many bytes for it."""
_RELEASE = re.compile(r"v?(\d{1,4})\.(\d{1,4})(?:\.(\d{1,5}))?([-+~_.][!-~]*)?", re.ASCII)

DISTRIBUTIONS: dict[str, str] = {
    "5.4": "Ubuntu 20.04",
    "5.10": "Debian 11, Amazon Linux 2",
    "5.14": "RHEL 9 and its kin",
    "5.15": "Ubuntu 22.04, Oracle UEK 7",
    "6.1": "Debian 12, Amazon Linux 2023",
    "6.4": "SLES 15 SP6",
    "6.8": "Ubuntu 24.04",
    "6.12": "Debian 13, RHEL 10 and its kin",
    "7.3": "Debian 13 backports",
}
"""Series -> distributions whose kernels begin with it. Their own backports may change what a generation says."""

LAST_OF_5, LAST_OF_6, LAST_OF_7 = 19, 19, 3


class Release(NamedTuple):
    """A release by its numbers. ``patch`` is None where the name does not say it: "6.1", "6.1.0-57-cloud-amd64"."""

    major: int
    minor: int
    patch: int | None

    @property
    def series(self) -> tuple[int, int]:
        """The first two numbers."""
        return self.major, self.minor


def release(text: str) -> Release | None:
    """Read a release's numbers, or None where the text is no release.

    A distribution's name for its kernel ("5.15.0-105-generic") has a 0 in the patch level's place, whatever fixes it
    has: that tells nothing.

    >>> release("v6.12.3"), release("5.15.0-105-generic")
    (Release(major=6, minor=12, patch=3), Release(major=5, minor=15, patch=None))
    """
    found = _RELEASE.fullmatch(text) if len(text) <= LONGEST else None
    if found is None:
        return None
    major, minor, patch, rest = found.groups()
    told = patch is not None and (int(patch) > 0 or not rest)
    return Release(int(major), int(minor), int(patch) if told and patch is not None else None)


def generation(kernel: str) -> Profile:
    """Find the generation of a kernel: one of `profiles` by name, or the newest that is not later than a release.

    Args:
        kernel: "seed-v3", "6.12", "v6.12.3", "5.15.0-105-generic", ..., or "sdm", which is the manual's and no kernel.

    The row's traits are those of its ``tree``; a release that says its patch level and is older than a change of its
    series has the traits from before it (`Profile.stable`), and one of a later series that has no row has what came
    with it (`Profile.later`). TypeError for what is no text, ValueError for what is no
    release and for one before 5.4.

    >>> generation("5.13").name
    '5.10'
    """
    if not isinstance(kernel, str):
        raise TypeError(f"kernel is {type(kernel).__name__}, not a string such as {next(reversed(PROFILES))!r}")
    if kernel == SDM.name:
        return SDM
    if kernel in PROFILES:
        return PROFILES[kernel]
    asked = release(kernel)
    if asked is None:
        raise ValueError(
            f"unknown kernel {quoted(kernel)}: a release from {_dotted(FIRST)} on, such as 5.13 or v6.12.3, "
            f"or one of {', '.join(named())}"
        )
    if asked.series < FIRST:
        raise ValueError(
            f"kernel {kernel} is too old: known are releases from {_dotted(FIRST)} to {_dotted(_latest())}"
        )
    found, series = next(iter(PROFILES.values())), FIRST
    for known in PROFILES.values():
        begins = series_of(known.name)
        if begins is not None and series <= begins <= asked.series:
            found, series = known, begins
    traits = found.traits
    if asked.series != series:
        for change in found.later:
            if asked.series >= (series_of(change.release) or series):
                traits = traits & ~change.removed | change.added
        return found._replace(traits=traits)
    if asked.patch is None:
        return found
    for change in reversed(found.stable):
        if asked < (release(change.release) or asked):
            traits = traits & ~change.added | change.removed
    return found._replace(traits=traits)


def numbers(kernel: str) -> tuple[int, int, int]:
    """A release's three numbers, to be compared. A generation counts as its tree, and so does a name of its series
    that tells no patch level; that of another series counts as its first release.
    """
    known = generation(kernel)
    asked = release(kernel)
    if asked is not None and (asked.patch is not None or asked.series != series_of(known.name)):
        return asked.major, asked.minor, asked.patch or 0
    tree = release(known.tree.split()[-1])
    return (0, 0, 0) if tree is None else (tree.major, tree.minor, tree.patch or 0)


def has_fast_path(kernel: str) -> bool:
    """Tell whether a kernel has the fast path by itself. 5.4 and 5.5 are as the patch found them, without it, and the
    manual has none.
    """
    if kernel == SDM.name:
        return False
    asked = None if kernel in PROFILES else release(kernel)
    return asked is None or asked.series >= FAST_FIRST


def series_of(name: str) -> tuple[int, int] | None:
    """The series that a generation is named by; None for one that has another name."""
    numbers = release(name)
    return None if numbers is None else numbers.series


def all_series() -> list[str]:
    """Every series from 5.4 to the newest generation's."""
    known = {5: LAST_OF_5, 6: LAST_OF_6, 7: LAST_OF_7}
    return [f"{major}.{minor}" for major, last in known.items() for minor in range(last + 1) if (major, minor) >= FIRST]


def _latest() -> tuple[int, int]:
    return max(series for name in PROFILES if (series := series_of(name)) is not None)


def _dotted(series: tuple[int, int]) -> str:
    return f"{series[0]}.{series[1]}"
