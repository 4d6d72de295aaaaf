"""KVM's interrupt exits as a library: what KVM does when a vCPU exits on WRMSR, bit-exact and fast.

>>> import fastexit as fx
>>> m = fx.Machine(vcpus=4)
>>> m.boot_x2apic()
>>> m.vcpus[0].wrmsr(0x830, fx.icr(dest=1, vector=0xFD)).path.name
'FAST'
>>> hex(m.vcpus[1].pending())
'0xfd'

Names are loaded when they are first used: importing the package imports neither numba nor matplotlib.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_NAMES = {
    "Machine": "machine",
    "Vcpu": "vcpu",
    "Events": "ioctls",
    "Target": "targets",
    "Exit": "exits.exit",
    "GeneralProtection": "outcome",
    "Outcome": "outcome",
    "OUTCOMES": "outcome",
    "Path": "outcome",
    "Fastpath": "outcome",
    "Fault": "outcome",
    "Refusal": "outcome",
    "Effect": "outcome",
    "icr": "regs",
    "DeliveryMode": "regs",
    "Shorthand": "regs",
    "MpState": "regs",
    "X2ApicApi": "regs",
    "KvmExit": "reasons",
    "VmxExit": "reasons",
    "SvmExit": "reasons",
    "EXIT": "layout",
    "OUTCOME": "layout",
    "MMIO_WRITE": "layout",
    "profiles": "profile",
    "CostProfile": "costs.profile",
    "cost_profiles": "costs.profile",
    "TimedOutcome": "costs.meter",
    "batch_cycles": "costs.batch",
}

__all__ = [*_NAMES, "kvm", "warmup", "workload"]


def __getattr__(name: str) -> Any:
    if name in _NAMES:
        value = getattr(import_module(f"fastexit.{_NAMES[name]}"), name)
    elif name == "kvm":
        value = import_module("fastexit.kvm")
    elif name == "workload":
        value = import_module("fastexit.insight.workload")
    elif name == "warmup":
        import_module("fastexit.machine")
        value = import_module("fastexit.jit.declare").warmup
    else:
        raise AttributeError(f"module 'fastexit' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
