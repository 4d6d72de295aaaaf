"""An instruction as the guest's CPU executes it: what needs no exit ends here, the rest becomes the exit it causes.

Models: the border between the CPU and the hypervisor. The vendor names the compiled half (``hardware``: the prefix of
four entries PREFIX_wrmsr, PREFIX_rdmsr, PREFIX_mmio_write and PREFIX_mmio_read) and makes an Exit of a code that has
CODE_EXIT (``hardware_exit``); a vendor without a prefix exits on every access. Not modelled: instructions other than
accesses to the APIC. Delivery of interrupts by the CPU is Vcpu.hw_deliver, a notification Vcpu.hw_notify.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastexit import layout as L
from fastexit import regs as R
from fastexit.exits.exit import Exit, Vendor
from fastexit.jit.declare import load
from fastexit.outcome import CODE_EXIT

if TYPE_CHECKING:
    from fastexit.exits.dispatcher import Dispatcher
    from fastexit.vcpu import Vcpu


class Hardware:
    """One machine's CPUs. Each access gives an outcome code: CODE_HARDWARE, or that of the exit."""

    def __init__(self, loop: Dispatcher) -> None:
        self.loop = loop
        self.vendor: Vendor = loop.vendor

    def wrmsr(self, v: Vcpu, msr: int, value: int) -> int:
        """WRMSR."""
        vendor = self.vendor
        plain = Exit(vendor.wrmsr_reason, msr, value, vendor.wrmsr_info1, length=R.INSN_LEN_WRMSR)
        return self._execute(v, plain, "wrmsr", msr, value)

    def rdmsr(self, v: Vcpu, msr: int) -> int:
        """RDMSR; the value is v.read_data."""
        plain = Exit(self.vendor.rdmsr_reason, msr, length=R.INSN_LEN_WRMSR)
        return self._execute(v, plain, "rdmsr", msr)

    def mmio_write(self, v: Vcpu, offset: int, value: int, length: int) -> int:
        """A write to the xAPIC page."""
        plain = Exit(self.vendor.mmio_reason, value=value, gpa=v.apic_page + offset, size=length, write=True)
        return self._execute(v, plain, "mmio_write", offset, length, value)

    def mmio_read(self, v: Vcpu, offset: int, length: int) -> int:
        """A read of the xAPIC page; the value is v.read_data."""
        plain = Exit(self.vendor.mmio_reason, gpa=v.apic_page + offset, size=length)
        return self._execute(v, plain, "mmio_read", offset, length)

    def move_to_cr8(self, v: Vcpu, value: int) -> int:
        """MOV to CR8."""
        return self._execute(v, self.vendor.cr8_exit(value), "cr8", value)

    def _execute(self, v: Vcpu, plain: Exit, access: str, *args: int) -> int:
        """``plain`` is the exit that every access would cause if the CPU virtualised nothing."""
        loop = self.loop
        if loop.mem[v.hot + L.HOT_MODE] == R.OUTSIDE_GUEST_MODE:
            loop.come_in(v)
        loop.begin_targets(v)
        if not self.vendor.hardware:
            return loop.run_exit(v, plain)
        code = load(f"{self.vendor.hardware}_{access}")(loop.handle, v.index, *args)
        if not code & CODE_EXIT:
            return code | loop.sent(v)
        return loop.run_exit(v, self.vendor.hardware_exit(v, plain, code))
