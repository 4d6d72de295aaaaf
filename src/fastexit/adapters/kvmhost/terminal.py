"""The user's terminal as the other end of the guest's serial port.

Models: nothing. ^C stays the user's: it ends the machine. All else that is typed is the guest's, which echoes it.
"""

from __future__ import annotations

import os
import select
import sys
import termios
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self

AT_ONCE = 512
PATIENCE = 0.05
"""Seconds between two looks whether the guest has room for more."""


class Terminal:
    """A context manager: what comes from standard input goes to ``type`` while ``room()`` says that there is room."""

    def __init__(self, type: Callable[[bytes], object], room: Callable[[], int]) -> None:
        self._type, self._room = type, room
        self._stop: tuple[int, int] | None = None
        self._kept: list[Any] | None = None
        self._thread: threading.Thread | None = None
        self._input = -1

    def __enter__(self) -> Self:
        try:
            self._input = sys.stdin.fileno()
        except (AttributeError, OSError, ValueError):
            return self  # there is none
        if os.isatty(self._input):
            if os.tcgetpgrp(self._input) != os.getpgrp():
                return self  # in the background, where reading would stop this process
            self._kept = termios.tcgetattr(self._input)
            typed = termios.tcgetattr(self._input)
            typed[0] &= ~termios.ICRNL
            typed[3] &= ~(termios.ICANON | termios.ECHO)
            termios.tcsetattr(self._input, termios.TCSANOW, typed)
        self._stop = os.pipe()
        self._thread = threading.Thread(target=self._main, name="terminal", daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._kept is not None:
            termios.tcsetattr(self._input, termios.TCSAFLUSH, self._kept)
        if self._stop is not None and self._thread is not None:
            os.close(self._stop[1])
            self._thread.join()
            os.close(self._stop[0])

    def _main(self) -> None:
        assert self._stop is not None
        stop = self._stop[0]
        while True:
            full = self._room() < AT_ONCE
            watched = [stop] if full else [stop, self._input]
            ready, _, _ = select.select(watched, [], [], PATIENCE if full else None)
            if stop in ready:
                return
            if self._input in ready:
                data = os.read(self._input, AT_ONCE)
                if not data:
                    return
                self._type(data)
