"""Instructions of a guest that exit, or may."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fastexit import regs as R
from fastexit.adapters.simpy.actions import Guest, action
from fastexit.adapters.simpy.interrupts import Interruptible
from fastexit.outcome import Outcome
from fastexit.reasons import SvmExit, VmxExit

_LVTT, _SELF_IPI = (R.MSR_X2APIC_BASE + (reg >> 4) for reg in (R.APIC_LVTT, R.APIC_SELF_IPI))
_TIMER_MSRS = frozenset({R.MSR_TSC_DEADLINE} | {R.MSR_X2APIC_BASE + (reg >> 4) for reg in (0x320, 0x380, 0x390, 0x3E0)})


class Instructions(Interruptible):
    """A vCPU whose guest writes MSRs, reaches devices and halts."""

    @action
    def wrmsr(self, msr: int, value: int) -> Guest:
        """WRMSR as the guest's CPU executes it (Vcpu.hw_wrmsr), until it runs again: the TimedOutcome."""
        return (yield from self._wrmsr(msr, value))

    @action
    def ipi(self, /, dest: int = 0, vector: int = 0, **icr: Any) -> Guest:
        """An ICR write; arguments as for fastexit.icr."""
        return (yield from self._wrmsr(R.MSR_X2APIC_ICR, R.icr(dest, vector, **icr)))

    def _wrmsr(self, msr: int, value: int) -> Guest:
        icr = value if msr == R.MSR_X2APIC_ICR else None
        if msr == _SELF_IPI:
            icr = R.icr(0, value & R.ICR_VECTOR, shorthand=R.Shorthand.SELF)
        if msr in _TIMER_MSRS:
            self.sim.set_time()
            self.sim.ledger.timer_set(self.index, value & 0xFF if msr == _LVTT else None)
        out = yield from self._exit(_named(msr), lambda: self.v.hw_wrmsr(msr, value), icr)
        if msr == _LVTT and not out.fault:
            self._deadline_mode = bool(value & R.LVT.mask("TIMER_MODE") == R.TIMER_DEADLINE)
        yield from self._look()
        return out

    @action
    def mem_write(self, gpa: int, value: int, length: int = 4) -> Guest:
        """A store to a device, such as the IOAPIC: the TimedOutcome. RuntimeError where it is user space's."""
        self.sim.set_time()
        out = yield from self._exit("MMIO", lambda: self.v.mem_write(gpa, value, length))
        yield from self._look()
        return out

    @action
    def mem_read(self, gpa: int, length: int = 4) -> Guest:
        """A load from a device: its value."""
        return (yield from self._read("MMIO", lambda: self.v.mem_read(gpa, length)))

    @action
    def io_write(self, port: int, value: int, length: int = 1) -> Guest:
        """OUT to a device, such as the PICs: the TimedOutcome. RuntimeError where it is user space's."""
        self.sim.set_time()
        out = yield from self._exit("I/O", lambda: self.v.io_write(port, value, length))
        self.sim.arm()
        yield from self._look()
        return out

    @action
    def io_read(self, port: int, length: int = 1) -> Guest:
        """IN from a device: its value."""
        return (yield from self._read("I/O", lambda: self.v.io_read(port, length)))

    def _read(self, cause: str, load: Callable[[], int]) -> Guest:
        """An exit that reads, until the guest has its value."""
        self.sim.set_time()
        found: list[int] = []

        def act() -> Outcome:
            found.append(load())
            assert self.v.timed is not None
            return self.v.timed

        yield from self._exit(cause, act)
        yield from self._look()
        return found[0]

    @action
    def halt(self) -> Guest:
        """HLT with interrupts on: sleeps until woken, and has then taken what woke it."""
        taken = self.interrupts
        yield from self._look()
        if self.interrupts != taken:
            return
        reason = SvmExit.HLT if self._svm else VmxExit.HLT
        yield from self._exit("HLT", lambda: self.v.exit(reason))
        while self.v.mode == R.OUTSIDE_GUEST_MODE:
            while self._arrived and self.v.mode == R.OUTSIDE_GUEST_MODE:
                self._sleeper_gets(self._arrived.popleft())
            if self.v.mode == R.OUTSIDE_GUEST_MODE:
                yield self._bell
                self._rearm()
            else:
                yield self.sim.env.timeout(self.sim.ns(self.v.run_cycles))
        yield from self._look()


def _named(msr: int) -> str:
    """An MSR by the name of its APIC register."""
    if msr == R.MSR_TSC_DEADLINE:
        return "TSC_DEADLINE"
    name = R.REGISTER_NAMES.get((msr - R.MSR_X2APIC_BASE) << 4) if msr >= R.MSR_X2APIC_BASE else None
    return name.removeprefix("APIC_") if name else f"MSR {msr:#x}"
