"""What an emulated CPU does between two instructions: interrupts, NMIs, INIT and SIPI of its vCPU reach the guest.

A kick is an external-interrupt exit, an opened window an exit of its own, a notification moves PIR to IRR. What
an entry of the vCPU injects, or APICv delivers, goes through the guest's IDT.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from fastexit import layout as L
from fastexit import regs as R
from fastexit.adapters.unicorn import hook as H
from fastexit.adapters.unicorn.engine import Engine
from fastexit.adapters.unicorn.fault import ERROR_CODE
from fastexit.adapters.unicorn.gate import Event, take
from fastexit.adapters.unicorn.hook import Stop
from fastexit.outcome import Path
from fastexit.reasons import SvmExit, VmxExit

if TYPE_CHECKING:
    from fastexit.adapters.unicorn.host import UnicornHost
    from fastexit.vcpu import Vcpu

WAITS = frozenset({R.MP_UNINITIALIZED, R.MP_INIT_RECEIVED})
MARK = 0xFFFF
"""What Vcpu.cs is while the CPU runs; INIT and SIPI write something else."""


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
        self._mem, self._own, self._hot = host.machine.mem, self.vcpu.own, self.vcpu.hot
        svm = host.machine.vendor == "svm"
        self._window = SvmExit.VINTR if svm else VmxExit.INTERRUPT_WINDOW
        self._nmi_window = SvmExit.IRET if svm else VmxExit.NMI_WINDOW
        self._interrupt = host.machine.dispatcher.vendor.interrupt_reason
        self._avic = svm and host.machine.apicv
        self._flags = R.RFLAGS_FIXED
        self._rip = self._irets = 0
        self._nmi_masked = self.vcpu.nmi_masked

    def _settle(self) -> bool:
        """What the vCPU waits for happens; False when the CPU sleeps."""
        v = self.vcpu
        self._flags = self.read("EFLAGS")
        while True:
            if self._mem[self._own + L.K_CS] != MARK and self._mem[self._own + L.K_MP_STATE] not in WAITS:
                self._restart()
            self._sync()
            mode = self._mem[self._hot + L.HOT_MODE]
            if mode == R.OUTSIDE_GUEST_MODE:
                if not self._run():
                    return False
            elif mode == R.EXITING_GUEST_MODE:
                v.exit(self._interrupt)
            elif v.irq_window and self._takes_interrupts():
                v.exit(self._window)
            elif v.nmi_window and not self._nmi_masked and not self.words[H.SHADOW]:
                v.exit(self._nmi_window)
            else:
                v.hw_notify()
                if not self._deliver():
                    return True

    def _run(self) -> bool:
        """KVM_RUN, as often as it returns without an answer; False when the vCPU sleeps."""
        while not self.vcpu.run():
            if self.vcpu.exit_reason is None:
                self.asleep = True
                return False
        self.asleep = False
        return True

    def _sync(self) -> None:
        """The vCPU sees the guest's registers, as an exit would save them."""
        mem, own = self._mem, self._own
        mem[own + L.K_RFLAGS] = self._flags
        mem[own + L.K_SHADOW] = self.words[H.SHADOW]
        mem[own + L.K_RIP] = self._rip = self.read("RIP")
        if self._nmi_masked and self.words[H.IRETS] != self._irets:
            self._nmi_masked = self.vcpu.nmi_masked = False

    def _takes_interrupts(self) -> bool:
        """The guest takes interrupts."""
        return bool(self._flags & R.RFLAGS_IF) and not self.words[H.SHADOW]

    def _armed(self) -> int:
        """Something waits until the guest opens its window."""
        v = self.vcpu
        if v.irq_window or v.nmi_window or self._nmi_masked or self._mem[v.vec + L.VEC_RVI]:
            return 1
        return int(self._avic and v.pending() is not None)

    def _injected(self) -> bool:
        """What an entry injected goes through the guest's IDT."""
        done = False
        if self.vcpu.nmi_masked and not self._nmi_masked:
            self._nmi_masked, self._irets = True, self.words[H.IRETS]
            self._take(R.VECTOR_NMI)
            done = True
        word = self._own + L.K_INTERRUPT
        if self._mem[word]:
            vector, self._mem[word] = self._mem[word] - 1, 0
            self._take(vector)
            done = True
        return done

    def _deliver(self) -> bool:
        """What the CPU delivers by itself under APICv."""
        if self._injected():
            return True
        if not self._takes_interrupts():
            return False
        vector = self.vcpu.hw_deliver()
        if vector is None and self._avic and self.vcpu.apicv and self.vcpu.pending() is not None:
            vector = self.vcpu.ack()
        if vector is None:
            return False
        self._take(vector)
        return True

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

    def _restart(self) -> None:
        """Real mode where SIPI says, or at the reset vector where the boot CPU took an INIT."""
        self.real_mode(self.vcpu.cs, self.vcpu.rip)
        self._mem[self._own + L.K_CS] = MARK
        self._flags, self.started, self._nmi_masked = R.RFLAGS_FIXED, True, False
