"""Threads of a KvmHost that meet at a bad moment: the one for timers of the machine, the one at the terminal."""

from __future__ import annotations

import os
import threading
import time
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest

from fastexit.adapters.kvmhost import terminal
from fastexit.adapters.kvmhost.clockwork import Clockwork
from fastexit.adapters.kvmhost.terminal import Terminal

SECONDS = 60


def test_an_interrupt_that_is_ended_while_timers_are_looked_at() -> None:
    """It makes work due, which the look did not see, and what was waited for before is over."""
    again = threading.Event()
    looks: list[int | None] = []

    def next_machine_timer() -> int | None:
        if threading.current_thread() is not clockwork.thread:
            return time.monotonic_ns() + 1_000_000
        looks.append(None if len(looks) else time.monotonic_ns() + 1_000_000)
        if len(looks) == 2:
            ending = threading.Thread(target=clockwork.ended)
            ending.start()
            ending.join()
        elif len(looks) == 3:
            again.set()
        return looks[-1]

    machine = SimpleNamespace(next_machine_timer=next_machine_timer, run_timers=list)
    host: Any = SimpleNamespace(
        machine=machine, clock=time.monotonic_ns, gate=nullcontext(), ended=None, vcpus=[], fail=print
    )
    clockwork = Clockwork(host)
    clockwork.thread.start()
    seen = again.wait(SECONDS)
    host.ended = True
    clockwork.look()
    clockwork.thread.join(SECONDS)
    assert (seen, looks) == (True, [looks[0], None, None])


def test_a_terminal_that_becomes_ours_behind_a_read_that_was_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the background a read is an error, and the shell's fg may come before anybody asks whose the terminal is."""
    refused: list[int] = []

    def read(fd: int, size: int) -> bytes:
        if not refused:
            refused.append(fd)
            raise OSError(5, "Input/output error")
        return os.read(fd, size)

    here = SimpleNamespace(**{name: getattr(os, name) for name in dir(os) if not name.startswith("__")})
    here.read = read
    monkeypatch.setattr(terminal, "os", here)
    ours, theirs = os.openpty()
    typed: list[bytes] = []
    came = threading.Event()

    def take(data: bytes) -> None:
        typed.append(data)
        came.set()

    with os.fdopen(theirs, "rb", buffering=0) as standard_input:
        monkeypatch.setattr("sys.stdin", standard_input)
        with Terminal(take, lambda: 1024):
            os.write(ours, b"q")
            assert came.wait(SECONDS)
        os.close(ours)
    assert (typed, refused) == ([b"q"], [theirs])
