"""Fields that ``trace-cmd report -R`` cuts to a byte, made whole by the lines beside them.

It prints a field as KVM's text casts it, and of ``icr_low`` the text casts the vector out first: delivery mode,
destination mode and shorthand are not in the line. They are in the write of the ICR that caused it, which the same
thread printed just before or just behind.
"""

from __future__ import annotations

import re

from fastexit.tracepoints.text import ipi_text

_IPI = re.compile(rb"(.*?-(\d+) .*?: )kvm_apic_ipi: dst ([0-9a-f]+) vec (\d+) \(")
_ICR = re.compile(rb".*?-(\d+) .*?: kvm_(?:(apic): apic_write APIC_ICR|msr: msr_write 830) = 0x([0-9a-f]+)")
_LOW = 0xFFFF_FFFF


class ByteFields:
    """Looks at canonical lines in their order, and says which of them are to be others."""

    def __init__(self) -> None:
        self._waiting: dict[bytes, tuple[int, re.Match[bytes]]] = {}
        self._written: dict[bytes, int] = {}

    def see(self, line: bytes, number: int) -> tuple[int, bytes] | None:
        """A line's number and what it is to be, once this line tells."""
        if ipi := _IPI.match(line):
            icr = self._written.pop(ipi[2], None)
            if icr is not None and icr & 0xFF == int(ipi[4]):
                return number, _whole(ipi, icr)
            self._waiting[ipi[2]] = number, ipi
        elif write := _ICR.match(line):
            thread, icr = write[1], int(write[3], 16)
            waiting = self._waiting.pop(thread, None)
            if waiting and icr & 0xFF == int(waiting[1][4]):
                return waiting[0], _whole(waiting[1], icr)
            if write[2]:  # kvm_msr comes behind kvm_apic, which has been asked
                self._written[thread] = icr
        return None


def _whole(ipi: re.Match[bytes], icr: int) -> bytes:
    return ipi[1] + b"kvm_apic_ipi: " + ipi_text(icr & _LOW, int(ipi[3], 16)).encode()
