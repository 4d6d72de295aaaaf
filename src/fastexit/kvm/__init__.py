"""The real thing: the in-kernel local APIC behind /dev/kvm, and the model held against it.

ioctl.py calls, host.py says what the running kernel is, guest.py runs real instructions, oracle.py and vcpu.py have the
face of `fastexit.Machine` and its vCPUs; operations.py makes random operations and applies them to either; twins.py,
guests.py, runs.py, timers.py and many.py are the kinds of comparison, verify.py deals them out, shrink.py and script.py
tell what was found; tracefs.py reads what the kernel's tracepoints say meanwhile.

>>> import fastexit as fx
>>> with fx.kvm.Oracle(vcpus=4) as vm:  # doctest: +SKIP
...     vm.boot_x2apic()
...     vm.vcpus[0].set_msr(0x830, fx.icr(dest=1, vector=0xFD))
True
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

_NAMES = {
    "Oracle": "oracle",
    "OracleVcpu": "vcpu",
    "Host": "host",
    "KvmUnavailable": "host",
    "KernelTrace": "tracefs",
    "TraceLost": "tracefs",
    "TraceUnavailable": "tracefs",
}
__all__ = [*_NAMES]


def __getattr__(name: str) -> Any:
    if name not in _NAMES:
        raise AttributeError(f"module 'fastexit.kvm' has no attribute {name!r}")
    return getattr(import_module(f"fastexit.kvm.{_NAMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_NAMES])
