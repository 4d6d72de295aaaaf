"""A vCPU whose doors are one compiled call each. exits/compiled.py has the run loop below them."""

from __future__ import annotations

from typing import Any

from fastexit import layout as L
from fastexit import regs as R
from fastexit.exits.compiled import ENDED, UNHANDLED, ended
from fastexit.jit.declare import load
from fastexit.outcome import CODE_GP, CODE_USER, Outcome, user_read
from fastexit.vcpu import Vcpu

_DECLINED = (TypeError, OverflowError)
"""What comes of arguments that are no integers of 64 bits."""


class CompiledVcpu(Vcpu):
    """A vCPU of a machine with the compiled dispatcher.

    A door that gets what is out of range, or what the compiled loop declines, goes on as Vcpu's, which checks it.
    """

    __slots__ = ("_base", "_data", "_exit", "_mmio", "_rdmsr", "_wrmsr")

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._exit, self._wrmsr = load("single_exit"), load("single_wrmsr")
        self._rdmsr, self._mmio = self._loop.vendor.rdmsr_reason, self._loop.vendor.mmio_reason
        self._data, self._base = self.own + L.K_MSR_DATA, self.own + L.K_APIC_BASE

    def wrmsr(self, msr: int, value: int) -> Outcome:
        """Vcpu.wrmsr."""
        try:
            code = self._wrmsr(self.where, msr, value)
            return ENDED[code]
        except KeyError:
            pass
        except _DECLINED:
            code = UNHANDLED
        return super().wrmsr(msr, value) if code == UNHANDLED else ended(self, code)

    def rdmsr(self, msr: int) -> int:
        """Vcpu.rdmsr."""
        try:
            code = self._exit(self.where, self._rdmsr, msr, 0, 0)
        except _DECLINED:
            code = UNHANDLED
        if code == UNHANDLED:
            return super().rdmsr(msr)
        return self._got(code, msr) if code & (CODE_GP | CODE_USER) else self._mem[self._data]

    def exit(self, reason: int, **info: Any) -> Outcome:
        """Vcpu.exit; one without information is one compiled call."""
        if not info:
            try:
                code = self._exit(self.where, reason, 0, 0, 0)
            except _DECLINED:
                code = UNHANDLED
            if code != UNHANDLED:
                return ended(self, code)
        return super().exit(reason, **info)

    def mem_write(self, gpa: int, value: int, length: int = 4) -> Outcome:
        """Vcpu.mem_write."""
        try:
            code = self._exit(self.where, self._mmio, gpa, length | L.MMIO_WRITE, value)
            return ENDED[code]
        except KeyError:
            pass
        except _DECLINED:
            code = UNHANDLED
        return super().mem_write(gpa, value, length) if code == UNHANDLED else ended(self, code)

    def mem_read(self, gpa: int, length: int = 4) -> int:
        """Vcpu.mem_read."""
        try:
            code = self._exit(self.where, self._mmio, gpa, length, 0)
        except _DECLINED:
            code = UNHANDLED
        if code == UNHANDLED:
            return super().mem_read(gpa, length)
        return user_read(code, self._mem[self._data]) if code & CODE_USER else self._mem[self._data]

    def mmio_write(self, offset: int, value: int, length: int = 4) -> Outcome:
        """Vcpu.mmio_write."""
        if type(offset) is int and 0 <= offset < R.APIC_PAGE_BYTES and length == 4:
            return self.mem_write((self._mem[self._base] & R.APICBASE_PAGE) + offset, value)
        return super().mmio_write(offset, value, length)

    def mmio_read(self, offset: int, length: int = 4) -> int:
        """Vcpu.mmio_read."""
        if type(offset) is int and 0 <= offset < R.APIC_PAGE_BYTES and length == 4:
            return self.mem_read((self._mem[self._base] & R.APICBASE_PAGE) + offset)
        return super().mmio_read(offset, length)
