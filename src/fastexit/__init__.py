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
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # checkers and editors cannot follow __getattr__
    from fastexit import kvm as kvm
    from fastexit.answers.ask import report as report
    from fastexit.costs.batch import batch_cycles as batch_cycles
    from fastexit.costs.meter import TimedOutcome as TimedOutcome
    from fastexit.costs.profile import CostProfile as CostProfile
    from fastexit.costs.profile import cost_profiles as cost_profiles
    from fastexit.events import ExtInt as ExtInt
    from fastexit.events import Init as Init
    from fastexit.events import Interrupt as Interrupt
    from fastexit.events import Nmi as Nmi
    from fastexit.events import Sipi as Sipi
    from fastexit.events import Smi as Smi
    from fastexit.exits.exit import Exit as Exit
    from fastexit.insight import workload as workload
    from fastexit.insight.sweep import sweep as sweep
    from fastexit.ioctls import Events as Events
    from fastexit.jit.declare import warmup as warmup
    from fastexit.layout import EXIT as EXIT
    from fastexit.layout import MMIO_WRITE as MMIO_WRITE
    from fastexit.layout import OUTCOME as OUTCOME
    from fastexit.machine import Machine as Machine
    from fastexit.outcome import OUTCOMES as OUTCOMES
    from fastexit.outcome import Effect as Effect
    from fastexit.outcome import Fastpath as Fastpath
    from fastexit.outcome import Fault as Fault
    from fastexit.outcome import GeneralProtection as GeneralProtection
    from fastexit.outcome import InvalidOpcode as InvalidOpcode
    from fastexit.outcome import Outcome as Outcome
    from fastexit.outcome import Path as Path
    from fastexit.outcome import Refusal as Refusal
    from fastexit.outcome import Target as Target
    from fastexit.outcome import UserRead as UserRead
    from fastexit.profile import profiles as profiles
    from fastexit.reasons import KvmExit as KvmExit
    from fastexit.reasons import SvmExit as SvmExit
    from fastexit.reasons import VmxExit as VmxExit
    from fastexit.regs import DeliveryMode as DeliveryMode
    from fastexit.regs import MpState as MpState
    from fastexit.regs import Shorthand as Shorthand
    from fastexit.regs import X2ApicApi as X2ApicApi
    from fastexit.regs import icr as icr
    from fastexit.releases import generation as generation
    from fastexit.vcpu import Vcpu as Vcpu

__version__ = "0.1.0"

_NAMES = {
    "Machine": "machine",
    "Vcpu": "vcpu",
    "Events": "ioctls",
    "Target": "outcome",
    "UserRead": "outcome",
    "Exit": "exits.exit",
    "Interrupt": "events",
    "ExtInt": "events",
    "Nmi": "events",
    "Smi": "events",
    "Init": "events",
    "Sipi": "events",
    "GeneralProtection": "outcome",
    "InvalidOpcode": "outcome",
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
    "generation": "releases",
    "CostProfile": "costs.profile",
    "cost_profiles": "costs.profile",
    "TimedOutcome": "costs.meter",
    "batch_cycles": "costs.batch",
    "report": "answers.ask",
    "sweep": "insight.sweep",
}

if not TYPE_CHECKING:  # a checker that saw these would take any name for a right one
    __all__ = [*_NAMES, "kvm", "warmup", "workload"]

    def __getattr__(name: str) -> object:
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
        return sorted({*globals(), *__all__})
