"""The user's terminal as the other end of the guest's serial port.

Models: nothing. ^C stays the user's: it ends the machine. All else that is typed is the guest's, which echoes it. A
process in the background leaves the terminal alone, and takes what is typed when it comes to the foreground.
"""

from __future__ import annotations

import os
import select
import signal
import sys
import termios
import threading
from collections.abc import Callable
from contextlib import suppress
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
        if os.isatty(self._input) and self._is_ours():
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
            before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTTOU])  # it may be in the background by now
            with suppress(termios.error):  # its other end may be gone
                termios.tcsetattr(self._input, termios.TCSAFLUSH, self._kept)
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        if self._stop is not None and self._thread is not None:
            os.close(self._stop[1])
            self._thread.join()
            os.close(self._stop[0])

    def _is_ours(self) -> bool:
        """Whether the terminal is this process's to read from; one of another session's is."""
        try:
            return os.tcgetpgrp(self._input) == os.getpgrp()
        except OSError:
            return True

    def _main(self) -> None:
        assert self._stop is not None
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTTIN])  # a read in the background is an error, then
        stop = self._stop[0]
        waits = False
        while True:
            waits = waits or self._room() < AT_ONCE
            watched = [stop] if waits else [stop, self._input]
            ready, _, _ = select.select(watched, [], [], PATIENCE if waits else None)
            if stop in ready:
                return
            waits = False
            if self._input in ready:
                try:
                    data = os.read(self._input, AT_ONCE)
                except OSError:
                    # In the background, unless it came to the foreground since: a terminal that is gone is none.
                    waits = os.isatty(self._input)
                    if waits:
                        continue
                    return
                if not data:
                    return
                self._type(data)
