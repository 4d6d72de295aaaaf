"""What hardware reports of an exit, and what each vendor's side of the dispatcher provides."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Protocol

from fastexit.reasons import KvmExit

if TYPE_CHECKING:
    from fastexit.exits.dispatcher import Dispatcher
    from fastexit.exits.handlers import Handlers
    from fastexit.exits.table import Table
    from fastexit.vcpu import Vcpu


@dataclass(slots=True)
class Exit:
    """What hardware reports about one exit.

    ``reason`` is the vendor's exit number; ``msr`` and ``value`` are the guest's ECX and EDX:EAX. ``info1`` is the VMX
    exit qualification or SVM's EXITINFO1; ``info2`` VMX's IDT-vectoring information (bit 31: valid) or SVM's EXITINFO2;
    ``intr_info`` VMX's VM-exit interruption information or SVM's EXITINTINFO. ``gpa``, ``size`` and ``write`` describe
    an access to memory, ``info1`` one to a port; ``value`` is the data. ``args`` are RAX, RBX, RCX, RDX, RSI, RDI and
    R8 of a hypercall, ``xmm`` are XMM0 to XMM5 in halves of 64 bits, the low one first, ``bits64`` says whether all 64
    bits of the others count, ``cpl`` is the guest's privilege level. ``length`` is the instruction's length.
    """

    reason: int
    msr: int = 0
    value: int = 0
    info1: int = 0
    info2: int = 0
    intr_info: int = 0
    gpa: int = 0
    args: tuple[int, ...] = ()
    bits64: bool = True
    size: int = 4
    write: bool = False
    length: int = 0
    failed_entry: bool = False
    invalid_state: bool = False
    xmm: tuple[int, ...] = ()
    cpl: int = 0

    @property
    def registers(self) -> tuple[int, ...]:
        """All seven registers of a hypercall; those that were not given are 0."""
        return (*self.args, 0, 0, 0, 0, 0, 0, 0)[:7]


class PortAccess(NamedTuple):
    """What an I/O instruction does: port, size in bytes, direction."""

    port: int
    size: int
    write: bool


Handler = Callable[["Vcpu", Exit], "int | KvmExit | None"]
"""Generic handler of an exit: None (handled, run on), a KvmExit (leave to user space) or an outcome code."""

FastHandler = Callable[["Vcpu", Exit], int]
"""Fast handler of an exit: its outcome code."""


class Vendor(Protocol):
    """What vmx.py and svm.py provide."""

    wrmsr_reason: int
    wrmsr_info1: int
    rdmsr_reason: int
    mmio_reason: int
    forced_reason: int
    interrupt_reason: int
    window_reason: int
    nmi_window_reason: int
    hypercall_reason: int
    io_reason: int
    memory_reasons: frozenset[int]
    rows: Table
    fast_run: dict[int, FastHandler]
    fast_irqoff: dict[int, FastHandler]
    handlers: Handlers
    trace_exit_late: bool
    hardware: str

    def cr8_exit(self, value: int) -> Exit: ...

    def hardware_exit(self, v: Vcpu, plain: Exit, code: int) -> Exit: ...

    def io_info(self, access: PortAccess) -> int: ...

    def io_access(self, info1: int) -> PortAccess: ...

    def failed_entry(self, reason: int) -> tuple[int, bool]: ...

    def cut_short(self, exit: Exit) -> int: ...

    def handle_exit(self, loop: Dispatcher, v: Vcpu, exit: Exit, code: int) -> int: ...
