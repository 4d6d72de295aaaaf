"""Checks of what comes from outside: one line that says what was wrong, and nothing has happened."""

from __future__ import annotations

import operator
from collections.abc import Collection
from typing import Any

from fastexit.regs import shown

U64 = (1 << 64) - 1
U32 = (1 << 32) - 1


def integer(value: Any, what: str, top: int = U64) -> int:
    """``value`` as an int in 0..top; TypeError or ValueError otherwise."""
    try:
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"{what} is {type(value).__name__}, not an integer") from None
    if not 0 <= number <= top:
        raise ValueError(f"{what} {shown(number)} is out of range 0..{top:#x}")
    return number


def one_of(value: Any, what: str, known: tuple[str, ...]) -> str:
    """``value`` if it is one of the known names; ValueError lists them."""
    if not isinstance(value, str) or value not in known:
        raise ValueError(f"unknown {what} {value!r}: one of {', '.join(known)}")
    return value


def member(value: Any, what: str, known: Collection[int]) -> int:
    """``value`` if it is one of the known integers; ValueError lists them."""
    if integer(value, what) not in known:
        raise ValueError(f"{what} {value:#x} is none of {', '.join(f'{int(k):#x}' for k in known)}")
    return int(value)


def access_size(size: Any, what: str = "access length", most: int = 4) -> int:
    """A size of 1, 2 or 4 bytes, or with ``most`` 8 of 8."""
    known = tuple(n for n in (1, 2, 4, 8) if n <= most)
    number = integer(size, what, 8)
    if number not in known:
        raise ValueError(f"{what} {number} is not {', '.join(map(str, known[:-1]))} or {known[-1]}")
    return number


QUOTED = 40
"""Characters of a word that an error quotes."""


def quoted(text: str) -> str:
    """A word of the user's as an error quotes it: one line, and not a screenful."""
    return repr(text if len(text) <= QUOTED else f"{text[:QUOTED]}...")
