"""The real thing: the in-kernel local APIC behind /dev/kvm, and the model held against it.

ioctl.py calls, device.py says where to, host.py says what the running kernel is, guest.py runs real instructions,
oracle.py and vcpu.py have the face of `fastexit.Machine` and its vCPUs; operations.py makes random operations and
applies them to either; twins.py, guests.py, runs.py, timers.py and many.py are the kinds of comparison, own.py that
with somebody's own APICs (apics.py is their face, spoken.py one that is a program); judge.py is who decides,
comparison.py deals the kinds out, shrink.py and script.py tell what was found; tracefs.py reads what the kernel's
tracepoints say meanwhile. lab/ has kernels of other generations in emulated machines.

>>> import fastexit as fx
>>> with fx.kvm.Oracle(vcpus=4) as vm:  # doctest: +SKIP
...     vm.boot_x2apic()
...     vm.vcpus[0].set_msr(0x830, fx.icr(dest=1, vector=0xFD))
True
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # checkers and editors cannot follow __getattr__
    from fastexit.kvm.apics import ApicFailed as ApicFailed
    from fastexit.kvm.apics import Apics as Apics
    from fastexit.kvm.apics import ApicVcpu as ApicVcpu
    from fastexit.kvm.comparison import verify as verify
    from fastexit.kvm.device import KvmUnavailable as KvmUnavailable
    from fastexit.kvm.host import Host as Host
    from fastexit.kvm.lab.kernels import KernelMissing as KernelMissing
    from fastexit.kvm.lab.lab import Lab as Lab
    from fastexit.kvm.lab.vmx import VmxLab as VmxLab
    from fastexit.kvm.oracle import Oracle as Oracle
    from fastexit.kvm.spoken import ApicProgram as ApicProgram
    from fastexit.kvm.tracefs import KernelTrace as KernelTrace
    from fastexit.kvm.tracefs import TraceLost as TraceLost
    from fastexit.kvm.tracefs import TraceUnavailable as TraceUnavailable
    from fastexit.kvm.vcpu import OracleVcpu as OracleVcpu

_NAMES = {
    "Oracle": "oracle",
    "OracleVcpu": "vcpu",
    "Host": "host",
    "KvmUnavailable": "device",
    "KernelMissing": "lab.kernels",
    "Lab": "lab.lab",
    "VmxLab": "lab.vmx",
    "verify": "comparison",
    "Apics": "apics",
    "ApicVcpu": "apics",
    "ApicFailed": "apics",
    "ApicProgram": "spoken",
    "KernelTrace": "tracefs",
    "TraceLost": "tracefs",
    "TraceUnavailable": "tracefs",
}

if not TYPE_CHECKING:  # a checker that saw these would take any name for a right one
    __all__ = [*_NAMES]

    def __getattr__(name: str) -> object:
        if name not in _NAMES:
            raise AttributeError(f"module 'fastexit.kvm' has no attribute {name!r}")
        return getattr(import_module(f"fastexit.kvm.{_NAMES[name]}"), name)

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})
