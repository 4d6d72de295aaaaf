"""The plain irqchip of oracle_irqchip.py with the face of `fastexit.kvm.Oracle`, to hold the library against it.

Where it agrees with a kernel (irqchip_pair.py), it stands for that kernel: without KVM, and in a fraction of
the time. Nothing is tested here.
"""

from __future__ import annotations

import inspect
from dataclasses import replace
from typing import Any

import oracle
import oracle_irqchip
from fastexit import regs as r
from fastexit import releases
from fastexit.kvm.guest import Access
from fastexit.kvm.irqchip import ACCESSES
from fastexit.kvm.judge import Judge, plain
from fastexit.kvm.operations import Op

KEYWORDS = frozenset(inspect.signature(oracle.Machine.__init__).parameters)


def made(cls: type[oracle_irqchip.Machine], keywords: dict[str, Any]) -> oracle_irqchip.Machine:
    """A plain machine by the library's keywords, as far as it knows them."""
    known = {name: value for name, value in keywords.items() if name in KEYWORDS}
    known["kernel"] = releases.generation(known["kernel"]).name
    return cls(**known)


def run(machine: Any, op: Op, *, eoi_at_injection: bool, one_entry: bool) -> tuple[Any, list[int], list[Access]]:
    """A guest's program: what it read or took, EOIs for user space's IOAPIC, accesses that user space got."""
    name, i, *arguments = op
    vcpu: oracle_irqchip.Vcpu = machine.vcpus[i]
    eois: list[int] = []
    left: list[Access] = []
    result: Any = None
    vcpu.enter(eois, interrupts=name == "take")
    if name == "take":
        result = vcpu.injected
        if result is not None:
            vcpu.rflags = r.RFLAGS_FIXED
            if eoi_at_injection:
                vcpu.eoi()
    elif name in ACCESSES:
        result, access = machine.guest_access(vcpu, op)
        left += [Access(*access)] if access else []
        between(vcpu, eois, one_entry and not access)
    elif name == "wrmsr":
        vcpu.write_msr(*arguments, host=False)
        between(vcpu, eois, one_entry)
    vcpu.leave()
    return result, eois, left


def between(vcpu: oracle_irqchip.Vcpu, eois: list[int], one_entry: bool) -> None:
    """From one instruction to the next: an exit and an entry, where the kernel makes them."""
    if not one_entry:
        vcpu.thread.out()
        vcpu.go_on(eois)


class RealVcpu:
    """A plain vCPU as a real one is seen: with programs, flat segments, lists of what came to user space."""

    def __init__(self, real: PlainReal, vcpu: Any) -> None:
        self._real = real
        self._vcpu = vcpu
        self.ioapic_eois: list[int] = []
        self.left: list[Access] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._vcpu, name)

    def is_flat(self) -> bool:
        return bool(self._vcpu.flat)

    def ready(self, *, again: bool = False) -> None:
        if again or not self._vcpu.flat:
            self._vcpu.set_sregs()
            self._vcpu.flat = True

    def _run(self, name: str, *arguments: Any) -> Any:
        host = self._real.host
        op = (name, self._vcpu.index, *arguments)
        modes = {"eoi_at_injection": host.eoi_at_injection, "one_entry": host.one_entry}
        result, eois, left = run(self._real.machine, op, **modes)
        self.ioapic_eois += eois
        self.left += left
        return result

    def take(self) -> Any:
        return self._run("take")

    def run_through(self) -> None:
        self._run("run_through")

    def wrmsr(self, msr: int, value: int) -> None:
        self._run("wrmsr", msr, value)

    def mem_write(self, gpa: int, value: int, length: int) -> None:
        self._run("mem_write", gpa, value, length)

    def mem_read(self, gpa: int, length: int) -> Any:
        return self._run("mem_read", gpa, length)

    def io_write(self, port: int, value: int, length: int) -> None:
        self._run("io_write", port, value, length)

    def io_read(self, port: int, length: int) -> Any:
        return self._run("io_read", port, length)


class PlainReal:
    """A plain machine in a real one's place."""

    def __init__(self, host: Any, cls: type[oracle_irqchip.Machine], keywords: dict[str, Any]) -> None:
        self.host = host
        self.machine = made(cls, host.keywords() | keywords)
        self.machine.set_time(1000)
        self.vcpus = [RealVcpu(self, vcpu) for vcpu in self.machine.vcpus]

    def __getattr__(self, name: str) -> Any:
        return getattr(self.machine, name)

    def get_irqchips(self) -> list[bytes]:
        return [self.machine.get_irqchip(chip) for chip in range(3)]

    def wait(self, _seconds: float) -> None:
        """Nothing here happens later."""

    def close(self) -> None:
        """Nothing is held."""


class PlainWitness:
    """What a plain machine's tracepoints print, as `fastexit.kvm.KernelTrace` tells it."""

    def __init__(self, machine: Any, events: frozenset[str]) -> None:
        self._trace: list[str] = machine.trace
        self.events = events

    def clear(self) -> None:
        self._trace.clear()

    def read(self) -> list[str]:
        return [line for line in self._trace if line.partition(":")[0] in self.events]


class PlainTrace:
    """The witness of whichever machine is compared."""

    def __init__(self, events: frozenset[str]) -> None:
        self.events = events

    def of(self, real: PlainReal) -> PlainWitness:
        return PlainWitness(real.machine, self.events)


def judge(
    kernel: str = "6.18",
    *,
    cls: type[oracle_irqchip.Machine] = oracle_irqchip.Machine,
    vendor: str = "svm",
    one_entry: bool = False,
    eoi_at_injection: bool = False,
    smm: bool = False,
) -> Judge:
    """Plain machines of a generation as a judge."""
    module = {"svm": "kvm_amd", "vmx": "kvm_intel"}[vendor]
    host = replace(
        plain(kernel), module=module, one_entry=one_entry, eoi_at_injection=eoi_at_injection, smm=smm, cmci=False
    )
    return Judge(lambda **keywords: PlainReal(host, cls, keywords), host, f"plain {kernel}", "", "")
