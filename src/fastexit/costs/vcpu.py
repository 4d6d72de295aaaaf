"""A vCPU whose doors return outcomes with their modelled time. dispatcher.py has the run loop below them."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

from fastexit import layout as L
from fastexit import regs as R
from fastexit.checks import integer
from fastexit.costs.meter import Meter, TimedOutcome
from fastexit.exits.exit import Exit
from fastexit.outcome import Outcome, Path
from fastexit.vcpu import Vcpu

if TYPE_CHECKING:
    from fastexit.costs.dispatcher import TimedDispatcher

_Result = TypeVar("_Result", Outcome, int)


class TimedVcpu(Vcpu):
    """A vCPU of a machine with costs: its doors return TimedOutcome.

    ``timed`` is the outcome of its last exit, reads and timers among them; ``run_cycles`` is what its last run() cost.
    """

    __slots__ = ("run_cycles", "timed")

    timed: TimedOutcome | None
    run_cycles: int

    if TYPE_CHECKING:
        _loop: TimedDispatcher

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.timed = None
        self.run_cycles = 0

    def wrmsr(self, msr: int, value: int) -> Outcome:
        """Vcpu.wrmsr, timed."""
        msr, value = integer(msr, "MSR", 0xFFFF_FFFF), integer(value, "MSR value", L.NONE)
        vendor = self._loop.vendor
        exit = Exit(vendor.wrmsr_reason, msr, value, vendor.wrmsr_info1, length=R.INSN_LEN_WRMSR)
        return self._timed(self._loop.run_exit(self, exit))

    def exit(self, reason: int, **info: Any) -> Outcome:
        """Vcpu.exit, timed."""
        return self._timed(super().exit(reason, **info))

    def hypercall(self, *args: Any, **named: Any) -> Outcome:
        """Vcpu.hypercall, timed."""
        return self._timed(super().hypercall(*args, **named))

    def mem_write(self, gpa: int, value: int, length: int = 4) -> Outcome:
        """Vcpu.mem_write, timed; so is mmio_write."""
        return self._timed(super().mem_write(gpa, value, length))

    def io_write(self, port: int, value: int, length: int = 1) -> Outcome:
        """Vcpu.io_write, timed."""
        return self._timed(super().io_write(port, value, length))

    def hw_wrmsr(self, msr: int, value: int) -> Outcome:
        """Vcpu.hw_wrmsr, timed: hw_ipi or hw_access where there is no exit."""
        return self._hardware(lambda: super(TimedVcpu, self).hw_wrmsr(msr, value), msr == R.MSR_X2APIC_ICR)

    def hw_mmio_write(self, offset: int, value: int, length: int = 4) -> Outcome:
        """Vcpu.hw_mmio_write, timed."""
        return self._hardware(lambda: super(TimedVcpu, self).hw_mmio_write(offset, value, length), offset == R.APIC_ICR)

    def hw_rdmsr(self, msr: int) -> int:
        """Vcpu.hw_rdmsr; ``timed`` has its time."""
        return self._hardware(lambda: super(TimedVcpu, self).hw_rdmsr(msr), False)

    def hw_mmio_read(self, offset: int, length: int = 4) -> int:
        """Vcpu.hw_mmio_read; ``timed`` has its time."""
        return self._hardware(lambda: super(TimedVcpu, self).hw_mmio_read(offset, length), False)

    def _timed(self, _plain: object) -> Outcome:
        assert self.timed is not None
        return self.timed

    def _hardware(self, act: Callable[[], _Result], icr: bool) -> _Result:
        """An instruction that may not exit: then nothing was charged, and the CPU's own time is."""
        loop = self._loop
        if loop.mem[self.hot + L.HOT_MODE] == R.OUTSIDE_GUEST_MODE:
            loop.come_in(self)
        self.timed = None
        result = act()
        if self.timed is None:
            meter = Meter(loop.costs, loop.calls)
            meter.charge("hardware", "hw_ipi" if icr else "hw_access")
            if icr and isinstance(result, Outcome) and result.path is Path.HARDWARE and not result.fault:
                if result.accepted > 0:
                    meter.ipi = meter.spent
            loop.done(self, result.code if isinstance(result, Outcome) else 0, meter)
        return self._timed(result) if isinstance(result, Outcome) else result
