"""What one line of a trace becomes: a row of numbers, whose words stand in tables beside it.

All analyses work on these columns; only what fills them knows what a line looks like.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import IntEnum
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from fastexit.trace.found import Table as Table
from fastexit.trace.found import TableRow as TableRow
from fastexit.trace.found import Unreadable as Unreadable

NO_TIME = -(1 << 63)
"""``time`` of a line that has none."""


class Event(IntEnum):
    """The tracepoint of a line. ``a`` to ``d`` and ``name`` of the row are what is said here; the rest is 0 or -1.

    Where a line names a vCPU (``vcpu 1``, ``vcpu_id 1``, ``apicid 1``), it is the row's ``vcpu``.
    """

    OTHER = 0
    """Of another event system: ``name`` is the event's."""
    OTHER_KVM = 1
    """Of kvm, without a row below: ``name`` is the event's."""
    EXIT = 2
    """kvm_exit: ``name`` reason with what VMX adds ("EPT_VIOLATION FAILED_VMENTRY"), ``a`` rip, ``b`` and ``c`` info 1
    and 2, ``d`` intr_info and error code << 32. Before 5.10 intr_info is info 2."""
    ENTRY = 3
    """kvm_entry: ``a`` rip, where printed."""
    MSR = 4
    """kvm_msr: ``a`` MSR, ``b`` value, ``c`` 1 write, ``d`` 1 #GP."""
    APIC = 5
    """kvm_apic: ``a`` register offset, ``b`` value, ``c`` 1 write, ``name`` the register's."""
    APIC_IPI = 6
    """kvm_apic_ipi: ``a`` destination, ``b`` the low 32 bits of the ICR, as far as the line shows them."""
    ACCEPT = 7
    """kvm_apic_accept_irq: ``a`` APIC id, ``b`` vector, ``c`` delivery and trigger mode in the ICR's bits,
    ``d`` 1 coalesced."""
    EOI = 8
    """kvm_eoi: ``a`` APIC id, ``b`` vector or 2^64 - 1."""
    PV_EOI = 9
    """kvm_pv_eoi: as EOI."""
    INJ_VIRQ = 10
    """kvm_inj_virq: ``a`` vector, ``b`` 1 soft, ``c`` 1 reinjected."""
    INJ_EXCEPTION = 11
    """kvm_inj_exception: ``name`` exception, ``a`` error code, ``c`` 1 reinjected."""
    SET_IRQ = 12
    """kvm_set_irq: ``a`` GSI, ``b`` level, ``c`` source."""
    IOAPIC_SET_IRQ = 13
    """kvm_ioapic_set_irq, kvm_ioapic_delayed_eoi_inj: ``name`` the event's, ``a`` pin, 2^64 - 1 for the second, ``b``
    vector, ``c`` destination, ``d`` 1 coalesced."""
    MSI_SET_IRQ = 14
    """kvm_msi_set_irq: ``a`` destination, ``b`` vector."""
    PIC_SET_IRQ = 15
    """kvm_pic_set_irq: ``a`` chip << 3 | pin, ``c`` 1 masked, ``d`` 1 coalesced."""
    ACK_IRQ = 16
    """kvm_ack_irq: ``name`` irqchip, ``a`` pin."""
    PIO = 17
    """kvm_pio: ``a`` port, ``b`` value, ``c`` 1 write, ``d`` size."""
    MMIO = 18
    """kvm_mmio, kvm_fast_mmio: ``a`` guest-physical address, ``b`` value, ``c`` 1 write, ``d`` length."""
    HYPERCALL = 19
    """kvm_hypercall: ``a`` number, ``b`` to ``d`` the first arguments."""
    HV_HYPERCALL = 20
    """kvm_hv_hypercall: ``a`` call code, ``b`` input, ``c`` output, ``d`` 1 fast."""
    HV_SEND_IPI = 21
    """kvm_hv_send_ipi, kvm_hv_send_ipi_ex: ``name`` the event's, ``a`` vector, ``b`` processor or bank mask, ``c`` the
    second one's format."""
    HV = 22
    """Any other kvm_hv_*: ``name`` the event's."""
    APICV_ACCEPT = 23
    """kvm_apicv_accept_irq: as ACCEPT."""
    APICV_INHIBIT = 24
    """kvm_apicv_inhibit_changed: ``name`` the reason's number as printed, ``a`` 1 set, ``b`` all inhibits. Its
    forerunner kvm_apicv_update_request: ``b`` this one inhibit, ``d`` 1."""
    NESTED_VMEXIT = 25
    """kvm_nested_vmexit, kvm_nested_vmexit_inject, kvm_nested_intercepts, kvm_nested_intr_vmexit: ``name`` reason where
    printed, ``c`` 0 to 3 in this order."""
    NESTED_ENTRY = 26
    """kvm_nested_vmenter, kvm_nested_vmrun."""
    USERSPACE_EXIT = 27
    """kvm_userspace_exit: ``name`` reason."""
    WAKEUP = 28
    """kvm_vcpu_wakeup: ``a`` ns, ``b`` 1 wait, 0 poll, ``c`` 1 valid."""
    HALT_POLL = 29
    """kvm_halt_poll_ns: ``a`` ns, ``b`` ns before, ``c`` 1 grow."""
    PAGE_FAULT = 30
    """kvm_page_fault: ``a`` guest-physical address, ``b`` error code."""
    CPUID = 31
    """kvm_cpuid: ``a`` leaf, ``b`` subleaf."""
    CR = 32
    """kvm_cr: ``a`` register, ``b`` value, ``c`` 1 write."""
    AVIC = 33
    """kvm_avic_incomplete_ipi, kvm_avic_unaccelerated_access, kvm_avic_*: ``name`` the event's; of an incomplete IPI
    ``a`` ICR (high << 32), ``b`` id; of an unaccelerated access ``a`` offset, ``b`` vector, ``c`` 1 write; of a
    doorbell ``a`` APIC id."""
    HV_TIMER = 34
    """kvm_hv_timer_state: ``a`` 1 where the preemption timer serves the vCPU."""
    PI_IRTE = 35
    """kvm_pi_irte_update: ``a`` GSI, ``b`` vector, ``c`` 1 set, ``d`` the host's irq."""
    NMI = 36
    """kvm_nmi_inj and similar lines of an NMI."""
    SMM = 37
    """kvm_smm_transition, kvm_enter_smm: ``a`` 1 entering."""
    SCHED_SWITCH = 38
    """sched_switch: ``a`` previous pid, ``b`` next pid, ``c`` 1 where the previous one stays runnable."""


class Flag(IntEnum):
    """Bits of ``flags``: what ftrace says of the context before the time stamp."""

    TOLD = 1
    """The line has such flags at all."""
    IRQS_OFF = 2
    """``d`` or ``D``: the fast path's signature."""
    NEED_RESCHED = 4
    HARDIRQ = 8
    """``h``, ``H``, ``s``, ``z``, ``Z``: an interrupt handler of the host wrote the line."""


RECORD = np.dtype(
    {
        "names": ["time", "a", "b", "c", "d", "line", "thread", "name", "cpu", "vcpu", "event", "flags"],
        "formats": ["<i8", "<u8", "<u8", "<u8", "<u8", "<u4", "<i4", "<i4", "<i2", "<i2", "u1", "u1"],
        "itemsize": 64,
    }
)
"""A row, one cache line. ``line`` counts from 1; ``time`` is in ns (in ticks where Recording.clock says so) or NO_TIME;
``cpu``, ``vcpu`` and ``thread`` (an index into Recording.threads) are -1 where the line does not tell; ``name`` is an
index into Recording.names or -1."""

Rows = npt.NDArray[np.void]
"""An array of RECORD."""


class Thread(NamedTuple):
    """A thread as the trace names it: -1 and ``""`` for what it does not tell."""

    pid: int
    tgid: int
    comm: str


@dataclass
class Recording:
    """One trace, read.

    Attributes:
        path: as given; "-" for standard input.
        blocks: the rows in order of lines, some ten thousand at a time; can be gone through again and again.
        threads, names: what ``thread`` and ``name`` of a row number.
        samples: the first lines of each kind of event, (number, line) as they stand: texts differ between kernels.
        vcpu_of: thread -> the vCPU that its name tells ("CPU 2/KVM", "fc_vcpu 2"), -1 for others.
        tables: tables of counts that stand in place of lines.
        shape: what wrote it, in words: "ftrace text", "trace-cmd report", "perf script", "perf trace", ...
        clock: "ns", or "ticks" for a clock that is no time (x86-tsc, counter).
        lines: lines of the file. unreadable_count: how many of them could not be read; ``unreadable`` are the first.
        lost: events that the recorder says it lost. lost_lines: where, the first of them.
        problems: damage, one line each. notes: oddities that leave the result good.
    """

    path: str
    blocks: Iterable[Rows]
    threads: list[Thread] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    samples: list[tuple[int, bytes]] = field(default_factory=list)
    vcpu_of: list[int] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    shape: str = ""
    clock: str = "ns"
    lines: int = 0
    unreadable_count: int = 0
    unreadable: list[Unreadable] = field(default_factory=list)
    lost: int = 0
    lost_lines: list[int] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
