"""The local APIC's timer by name: what a count, a divisor and a deadline are is worked out here."""

from __future__ import annotations

from fastexit import layout as L
from fastexit import regs as R
from fastexit.adapters.simpy.actions import Guest, action
from fastexit.adapters.simpy.instructions import Instructions
from fastexit.checks import integer

_LVTT, _TMICT, _TDCR = (R.MSR_X2APIC_BASE + (reg >> 4) for reg in (R.APIC_LVTT, R.APIC_TMICT, R.APIC_TDCR))
_DIVISORS = {1: 0b1011, 2: 0b0000, 4: 0b0001, 8: 0b0010, 16: 0b0011, 32: 0b1000, 64: 0b1001, 128: 0b1010}
"""What divides the bus clock, and the divide configuration register's bits for it."""
_FIRST_VECTOR = 16


class Timers(Instructions):
    """A vCPU's timer. The writes are exits of the guest, and take their time before the timer runs."""

    @action
    def set_timer(
        self, *, vector: int, us: float | None = None, ns: float | None = None, periodic: bool = False
    ) -> Guest:
        """Start the timer: ``vector`` comes once after so long, or with ``periodic`` again and again; gives nothing.

        Three WRMSRs: LVTT, TDCR, TMICT. KVM lets no periodic timer tick more often than ``min_timer_period_us``, a
        parameter of its module: 200 us unless the machine was made with another one (``Machine(min_timer_period_us=0)``
        lifts it). ValueError for less than one cycle of the APIC bus, or more than the count and its divisor hold, and
        for a vector below 16, which no APIC delivers.
        """
        length, vector = _length(us, ns), _vector(vector)
        bus = self.v.machine.mem[L.H_BUS_NS]
        divisor = next((divisor for divisor in _DIVISORS if round(length / (bus * divisor)) <= 0xFFFF_FFFF), 0)
        count = round(length / (bus * divisor)) if divisor else 0
        if not count:
            top = 0xFFFF_FFFF * 128 * bus
            raise ValueError(f"{length:g} ns is no time for the timer: {bus} to {top} ns")
        yield from self._wrmsr(_LVTT, vector | (R.TIMER_PERIODIC if periodic else R.TIMER_ONE_SHOT))
        yield from self._wrmsr(_TDCR, _DIVISORS[divisor])
        yield from self._wrmsr(_TMICT, count)

    @action
    def tsc_deadline(self, *, ns: float | None = None, us: float | None = None, vector: int | None = None) -> Guest:
        """Ask for the timer's interrupt that much after now, by a write of IA32_TSC_DEADLINE; gives nothing.

        With ``vector`` LVTT is put into deadline mode first, which a guest does once; ValueError where it never was.
        """
        length = _length(us, ns)
        if vector is not None:
            yield from self._wrmsr(_LVTT, _vector(vector) | R.TIMER_DEADLINE)
        elif not self._deadline_mode:
            raise ValueError(f"vCPU {self.index}: the timer is not in deadline mode: tsc_deadline(..., vector=...)")
        self.sim.set_time()
        ticks = round(length * self.v.get_tsc_khz() / 1_000_000)
        yield from self._wrmsr(R.MSR_TSC_DEADLINE, self.v.tsc + ticks)

    @action
    def stop_timer(self) -> Guest:
        """Stop the timer: 0 into IA32_TSC_DEADLINE or TMICT, whichever it runs by."""
        yield from self._wrmsr(R.MSR_TSC_DEADLINE if self._deadline_mode else _TMICT, 0)


def _vector(vector: int) -> int:
    if integer(vector, "vector", 0xFF) < _FIRST_VECTOR:
        raise ValueError(f"vector {vector} is none that an APIC delivers: {_FIRST_VECTOR} to 255")
    return vector


def _length(us: float | None, ns: float | None) -> float:
    """A time that is given in one of two units."""
    if (us is None) == (ns is None):
        raise ValueError("say how long in one unit: either us= or ns=")
    length = float(ns) if ns is not None else float(us) * 1000  # type: ignore[arg-type]
    if not 0 < length < 1 << 63:
        raise ValueError(f"{length:g} ns is no time for a timer")
    return length
