"""Spoil the fast path of every machine, as a pytest plugin for runs of the benchmarks, which have to fail then.

``FASTEXIT_SPOIL=slow`` makes every call that a fast exit goes through wait. ``off`` keeps the fast path switched off,
whatever a benchmark sets.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any

from fastexit.exits.dispatcher import Dispatcher
from fastexit.machine import Machine
from fastexit.vcpu import Vcpu

ONE_EXIT_NS = 20_000
BATCH_NS = 1_000_000
"""Several times what the generic path needs, for one exit and for a batch of 4,000."""


def _slowed(call: Callable, ns: int, machine: Callable[..., Machine]) -> Callable:
    def slow(*args: Any, **keywords: Any) -> Any:
        if machine(*args).fastpath:
            until = time.perf_counter_ns() + ns
            while time.perf_counter_ns() < until:
                pass
        return call(*args, **keywords)

    return slow


def spoil(how: str) -> None:
    """Change the classes for the rest of the process."""
    if how == "off":
        honest = Machine.fastpath
        Machine.fastpath = honest.setter(lambda m, on: honest.fset(m, False))
        return
    Machine.run = _slowed(Machine.run, BATCH_NS, lambda m, exits: m)
    Vcpu.wrmsr = _slowed(Vcpu.wrmsr, ONE_EXIT_NS, lambda v, msr, value: v.machine)
    Dispatcher.run_exit = _slowed(Dispatcher.run_exit, ONE_EXIT_NS, lambda loop, v, exit: v.machine)


if "FASTEXIT_SPOIL" in os.environ:  # pytest looks for doctests here, too
    spoil(os.environ["FASTEXIT_SPOIL"])
