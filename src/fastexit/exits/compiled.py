"""The run loop of one vCPU in compiled calls, one an exit: the twin of dispatcher.py for hosts that make many exits.

``Machine(dispatcher="compiled")`` has it. Outcomes and bytes are those of the Python dispatcher, which stays what it is
compared with, and which still does what kernels/single.py declines: exits without a compiled twin or with a replaced
handler, L2, failed entries, events that were cut short. Its steps cannot be watched or overridden one by one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastexit import layout as L
from fastexit import regs as R
from fastexit.exits.dispatcher import Dispatcher
from fastexit.exits.exit import Exit
from fastexit.jit.declare import load
from fastexit.outcome import (
    CODE_ADDRESSED,
    CODE_EFFECTS,
    CODE_NOT_IN_GUEST,
    KEPT,
    REENTRIES,
    SHORT,
    Outcome,
    addressed,
)
from fastexit.targets import outcome_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from fastexit.exits.exit import Vendor
    from fastexit.profile import Profile
    from fastexit.vcpu import Vcpu

UNHANDLED = CODE_NOT_IN_GUEST
"""Result of a compiled call that did nothing: kernels/single.py says for what."""


ENDED: dict[int, Outcome] = dict(enumerate(SHORT))
"""What a compiled call gave -> Outcome, as far as it has no targets or has them in its code, and is known."""


def ended(v: Vcpu, code: int) -> Outcome:
    """The Outcome of what a compiled call gave, which was not UNHANDLED."""
    outcome = ENDED.get(code)
    if outcome is not None:
        return outcome
    if code & CODE_ADDRESSED:
        outcome = REENTRIES.get(code) or addressed(code)
    else:
        outcome = outcome_of(v.machine.mem, v.index, code)
    if len(ENDED) < KEPT and (code & CODE_ADDRESSED or not code & CODE_EFFECTS):
        ENDED[code] = outcome
    return outcome


class CompiledDispatcher(Dispatcher):
    """One machine's run loop, compiled."""

    kind = "compiled"
    fast_exit: Callable[[int, int, int], int]

    def __init__(self, memory: memoryview, handle: int, vendor: Vendor, profile: Profile) -> None:
        super().__init__(memory, handle, vendor, profile)
        self.wrmsr_fast = True

    def _first_fast_exit(self, where: int, msr: int, value: int) -> int:
        self.fast_exit = load("single_wrmsr")
        return self.fast_exit(where, msr, value)

    def wrmsr(self, v: Vcpu, msr: int, value: int, code: int | None = None) -> Outcome:
        """Dispatcher.wrmsr: the compiled call is all of the exit."""
        if code is None:
            code = self.fast_exit(v.where, msr, value)
        if code != UNHANDLED:
            return ended(v, code)
        exit = Exit(self.vendor.wrmsr_reason, msr, value, self.vendor.wrmsr_info1, length=R.INSN_LEN_WRMSR)
        return outcome_of(self.mem, v.index, super().run_exit(v, exit))

    def run_exit(self, v: Vcpu, exit: Exit) -> int:
        """Dispatcher.run_exit."""
        code, single_exit = UNHANDLED, load("single_exit")
        if not (exit.info2 or exit.intr_info or exit.failed_entry or exit.invalid_state):
            if exit.reason == self.vendor.hypercall_reason:
                rax, rbx, rcx, rdx, rsi, rdi, r8 = exit.registers
                more = rax or rbx or rsi or rdi or any(exit.xmm) or exit.cpl or not exit.bits64 or exit.info1
                if not more and exit.length == self.vendor.rows[exit.reason].length:
                    code = single_exit(v.where, exit.reason, r8, rcx, rdx)
            elif exit.reason in self.vendor.memory_reasons:
                if not (exit.length or exit.info1):
                    info = exit.size | (L.MMIO_WRITE if exit.write else 0)
                    code = single_exit(v.where, exit.reason, exit.gpa, info, exit.value)
            elif exit.length == self.vendor.rows[exit.reason].length:
                code = single_exit(v.where, exit.reason, exit.msr, exit.info1, exit.value)
        return super().run_exit(v, exit) if code == UNHANDLED else code

    def kvm_run(self, v: Vcpu) -> bool:
        """Dispatcher.kvm_run."""
        return not load("door_run")(self.handle, v.index)

    def come_in(self, v: Vcpu) -> None:
        """Dispatcher.come_in."""
        load("come_in")(self.handle, v.index)

    def leave_guest(self, v: Vcpu) -> None:
        """Dispatcher.leave_guest."""
        load("door_leave")(self.handle, v.index)

    def out_of_guest(self, v: Vcpu) -> None:
        """Dispatcher.out_of_guest."""
        load("out_of_guest")(self.handle, v.index)
