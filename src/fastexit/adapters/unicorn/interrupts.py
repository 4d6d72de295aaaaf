"""What an emulated CPU does between two instructions: interrupts, NMIs, INIT and SIPI of its vCPU reach the guest.

Vcpu.settle does what the host has to between two instructions, Vcpu.take says what goes in: an interrupt through the
guest's IDT, a reset by INIT and SIPI. An SMI's handler returns at once.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from fastexit import events
from fastexit import layout as L
from fastexit import regs as R
from fastexit.adapters.unicorn import hook as H
from fastexit.adapters.unicorn.engine import Engine
from fastexit.adapters.unicorn.fault import ERROR_CODE
from fastexit.adapters.unicorn.gate import Event, take
from fastexit.adapters.unicorn.hook import Stop
from fastexit.outcome import Path

if TYPE_CHECKING:
    from fastexit.adapters.unicorn.host import UnicornHost
    from fastexit.vcpu import Vcpu

WAITS = frozenset({R.MP_UNINITIALIZED, R.MP_INIT_RECEIVED})
RESET_CS, RESET_IP = 0xF000, 0xFFF0


@dataclass
class Counters:
    """What happened on a CPU.

    ``ipis``: writes to the ICR and SELF_IPI that did not fault, ``ipis_fast`` those that took the fast path; ``paths``:
    accesses to the APIC by their Path, ``refused``: those that faulted; ``devices``: accesses to IOAPIC and ports;
    ``taken``: interrupts that went through the guest's IDT, by vector; ``exceptions`` likewise; ``stops``: why Unicorn
    stopped, how often.
    """

    ipis: int = 0
    ipis_fast: int = 0
    mmio: int = 0
    devices: int = 0
    refused: int = 0
    paths: Counter[Path] = field(default_factory=Counter)
    taken: Counter[int] = field(default_factory=Counter)
    exceptions: Counter[int] = field(default_factory=Counter)
    stops: Counter[Stop] = field(default_factory=Counter)


class Interruptible(Engine):
    """An engine and its vCPU."""

    def __init__(self, host: UnicornHost, index: int) -> None:
        super().__init__(host, index)
        self.vcpu: Vcpu = host.machine.vcpus[index]
        self.counters: Counters = Counters()
        self.started: bool = False
        self.asleep: bool = False
        self.poked: bool = True
        self.waits: bool = self.vcpu.get_mp_state() in WAITS
        self._mem = host.machine.mem
        self._avic = host.machine.vendor == "svm" and host.machine.apicv
        self._flags = R.RFLAGS_FIXED
        self._rip = self._irets = 0
        self._nmi_masked = self.vcpu.nmi_masked

    def _settle(self) -> bool:
        """What the vCPU waits for happens, and what goes in is taken; False when the CPU sleeps."""
        v = self.vcpu
        self._flags = self.read("EFLAGS")
        self._sync()
        while True:
            if v.settle():
                event = v.take()
                if event is None:
                    self.asleep = False
                    return True
                self._goes_in(event)
                self._sync()
            elif v.exit_reason is None:
                self.asleep = True
                return False

    def _goes_in(self, event: events.Event) -> None:
        match event:
            case events.Interrupt(vector) | events.ExtInt(vector):
                self._take(vector)
            case events.Nmi():
                self._nmi_masked, self._irets = True, self.words[H.IRETS]
                self._take(R.VECTOR_NMI)
            case events.Smi():
                self.vcpu.rsm()
            case events.Init():
                self.waits = not self.vcpu.apic_base & R.APICBASE_BSP
                if not self.waits:  # else SIPI says where
                    self._restart(RESET_CS, RESET_IP)
            case events.Sipi(vector):
                self.waits = False
                self._restart(vector << 8, 0)

    def _sync(self) -> None:
        """The vCPU sees the guest's registers, as an exit would save them."""
        v = self.vcpu
        v.rflags, v.shadow, self._rip = self._flags, self.words[H.SHADOW], self.read("RIP")
        v.rip = self._rip
        if self._nmi_masked and self.words[H.IRETS] != self._irets:
            self._nmi_masked = v.nmi_masked = False

    def _armed(self) -> int:
        """Something waits until the guest opens its window."""
        v = self.vcpu
        if v.irq_window or v.nmi_window or self._nmi_masked or self._mem[v.vec + L.VEC_RVI]:
            return 1
        return int(self._avic and v.pending() is not None)

    def _take(self, vector: int) -> None:
        self.counters.taken[vector] += 1
        self._through_idt(Event.EXTERNAL, vector)

    def _exception(self, vector: int) -> None:
        """INT n and its like, which leave RIP behind themselves, or an exception that Unicorn raised at RIP."""
        self._trap = None
        error, software = self._kept.exception() if self._raised else (0, False)
        self._raised = False
        self.counters.exceptions[vector] += 1
        has_error = vector in ERROR_CODE and not software
        self._through_idt(Event.SOFTWARE if software else Event.EXCEPTION, vector, error if has_error else None)

    def _general_protection(self) -> None:
        self.counters.refused += 1
        self.counters.exceptions[R.VECTOR_GP] += 1
        self._through_idt(Event.EXCEPTION, R.VECTOR_GP, 0)

    def _through_idt(self, event: Event, vector: int, error: int | None = None) -> None:
        take(self, event, vector, error)
        self.words[H.SHADOW] = self.words[H.DUE] = 0
        self._flags = self.read("EFLAGS")

    def _restart(self, selector: int, offset: int) -> None:
        """Real mode there, everything else as INIT leaves it."""
        self.real_mode(selector, offset)
        self._flags, self.started, self._nmi_masked = R.RFLAGS_FIXED, True, False
