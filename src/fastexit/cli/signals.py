"""The signals that end a command: ^C, SIGTERM, and SIGHUP, which a closed terminal sends."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

ENDING = (signal.SIGTERM, signal.SIGHUP)
IMPATIENT = 1.0
"""Seconds behind a ^C from which on another one is a second one, and not the same key held down."""


@contextmanager
def ended_in_order() -> Iterator[None]:
    """SIGTERM ends the command as ^C does, emulated machines with it; so does a terminal that is closed.

    A signal that the process was told to ignore (nohup) stays ignored, and in another thread they are the process's.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = _heard(*ENDING)
    for number in before:
        signal.signal(number, _terminated)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def told(tell: Callable[[int], object]) -> Iterator[None]:
    """Inside, a signal raises nothing wherever Python happens to be: a thread calls ``tell`` with its number.

    An exception out of the blue would leave a terminal half set or a guest half begun. Only whoever is impatient, and
    strikes ^C again, gets KeyboardInterrupt. Once something was told, SIGTERM and SIGHUP are not heard behind the block
    either: a shell sends a closed terminal's SIGHUP a second time, and the clean-up is what both of them ask for.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    reads, writes = os.pipe()
    os.set_blocking(writes, False)
    before = _heard(signal.SIGINT, *ENDING)
    told_of: list[int] = []
    struck: list[float] = []

    def main() -> None:
        while number := os.read(reads, 1):
            if number[0] in before and not told_of:
                told_of.append(number[0])
                tell(number[0])

    def heard(number: int, _frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            struck.append(time.monotonic())
            if struck[-1] - struck[0] > IMPATIENT:
                raise KeyboardInterrupt

    teller = threading.Thread(target=main, name="signals", daemon=True)
    teller.start()
    # A handler in Python waits for the main thread, which may be on its way to sleep and would not wake up for it.
    outside = signal.set_wakeup_fd(writes, warn_on_full_buffer=False)
    try:
        for number in before:
            signal.signal(number, heard)
        yield
    finally:
        signal.set_wakeup_fd(outside)
        os.close(writes)
        teller.join()
        os.close(reads)
        for number, handler in before.items():
            signal.signal(number, signal.SIG_IGN if told_of and number in ENDING else handler)


def _heard(*numbers: signal.Signals) -> dict[signal.Signals, Callable[[int, FrameType | None], object] | int]:
    """Their handlers, without those that are ignored, or not Python's to set again."""
    handlers = {number: signal.getsignal(number) for number in numbers}
    return {number: handler for number, handler in handlers.items() if handler not in (signal.SIG_IGN, None)}


def _terminated(number: int, _frame: FrameType | None) -> None:
    for other in _heard(*ENDING):
        signal.signal(other, signal.SIG_IGN)  # a second one would cut short what the first one asked for
    raise SystemExit(128 + number)
