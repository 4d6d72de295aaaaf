"""A vCPU that looks at its host's clock before each call: what Machine(clock=...) has.

Models: nothing; the host's clock goes on by itself, and no call has to stop the others to set it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

from fastexit.vcpu import Vcpu

DOORS = (
    *("wrmsr", "rdmsr", "exit", "hypercall", "hv_hypercall", "mem_write", "mem_read", "io_write", "io_read"),
    *("hw_wrmsr", "hw_rdmsr", "hw_mmio_write", "hw_mmio_read", "hw_deliver", "settle", "run_timers", "next_timer"),
    *("run", "set_msr", "get_msr", "set_tsc_khz", "get_lapic", "set_lapic", "set_mp_state", "get_mp_state"),
    *("complete_msr", "complete_access", "complete_hypercall", "eoi", "ack", "pending", "local_interrupt"),
)
"""The methods that look; others come to one of these, or have nothing to do with time."""


_CLASSES: dict[str, type[Vcpu]] = {}


def clocked(base: type[Vcpu]) -> type[Vcpu]:
    """The class of vCPUs of a machine with a clock, from that of one without."""
    if base.__name__ not in _CLASSES:
        _CLASSES[base.__name__] = _made(base)
    return _CLASSES[base.__name__]


def _made(base: type[Vcpu]) -> type[Vcpu]:
    looking = {name: _looking(getattr(base, name)) for name in DOORS}
    return type(f"Clocked{base.__name__}", (base,), {"__slots__": (), "__doc__": base.__doc__, **looking})


def _looking(method: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(method)
    def look(self: Vcpu, *args: Any, **named: Any) -> Any:
        self.machine.look_at_clock()
        return method(self, *args, **named)

    return look
