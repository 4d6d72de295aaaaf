"""Exceptions by number, what they push, and that the guest's CPU met one."""

from __future__ import annotations

from fastexit.regs import VECTOR_GP

DE, DB, BP, OF, UD, DF, TS, NP, SS, GP, PF, AC_FAULT = 0, 1, 3, 4, 6, 8, 10, 11, 12, VECTOR_GP, 14, 17
ERROR_CODE = frozenset({DF, TS, NP, SS, GP, PF, AC_FAULT})
CONTRIBUTORY = frozenset({DE, TS, NP, SS, GP})
TRAPS = frozenset({DB, BP, OF})
"""Exceptions that do not push RF set, so that what they report is not met again by a debugger."""


class GuestError(RuntimeError):
    """The guest did what its CPU cannot go on from, or what is not modelled; one line that says where."""


class Fault(Exception):
    """An exception on the way: vector and error code."""

    def __init__(self, vector: int, error: int = 0) -> None:
        super().__init__(vector, error)
        self.vector = vector
        self.error = error
