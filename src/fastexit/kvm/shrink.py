"""A shorter story of the same difference: operations, vCPUs and settings that it does not need are left out.

Models: nothing. Candidates are replayed on new twins; one that still shows a difference, whichever, is kept.
"""

from __future__ import annotations

import math
import struct
import time
from dataclasses import asdict, replace
from typing import Any

from fastexit import regs as r
from fastexit.kvm.apics import ApicFailed
from fastexit.kvm.operations import Op
from fastexit.kvm.twins import Divergence, Setup, Twins

SECONDS = 60.0
"""No candidate is tried after so long, unless something else is said."""
LATE_TRIES = 2
"""A difference that a late host may have made has to show so often."""
WITHOUT_VCPU = (
    *("sleep", "signal_msi", "add_vcpu", "enable_x2apic_api", "boot_x2apic", "route", "msr_filter"),
    *("rest", "memory", "sint_routes", "irq_line", "set_irqchip", "set_gsi_routing", "irqfd", "irqfd_signal"),
    *("irqfd_close", "create_pit", "set_pit", "reinject_control", "set_time"),
)


class _Search:
    def __init__(self, cls: type[Twins], found: Divergence, witness: Any) -> None:
        self.judge = found.judge
        self.cls = cls
        self.witness = witness
        self.best = found
        self.until = math.inf

    def keeps(self, setup: Setup, ops: list[Op]) -> bool:
        """Whether a candidate differs, each time it is tried; then it is the best one known."""
        found: Divergence | None = None
        for _ in range(LATE_TRIES if self.best.late else 1):
            found = self.difference(setup, ops) if time.monotonic() < self.until else None
            if found is None or not found.what <= self.best.what:
                return False
        assert found is not None
        self.best = found
        return True

    def difference(self, setup: Setup, ops: list[Op]) -> Divergence | None:
        """What new twins show."""
        done = 0
        try:
            with self.cls(setup, self.witness, self.judge) as twins:
                twins.look()
                for op in ops:
                    done += 1
                    twins.step(op)
                twins.finish()
        except Divergence as found:
            # What the step itself added to the history is added again when it is replayed.
            found.history = ops[: min(done, len(found.history)) if twins.deferred else done]
            return found
        except (LookupError, ValueError, TypeError, TimeoutError, RuntimeError, ApicFailed):
            pass  # something that an operation needs was left out, such as the vCPU's creation
        return None

    def operations(self) -> None:
        """Leaves out runs of operations, long ones first."""
        size = len(self.best.history)
        while size := size // 2:
            at = 0
            while at < len(self.best.history):
                ops = self.best.history
                if not self.keeps(self.best.setup, ops[:at] + ops[at + size :]):
                    at += size

    def settings(self) -> None:
        """Puts settings back to the usual."""
        usual = self.cls.usual(self.best.setup.apic_ids)
        for name, value in asdict(usual).items():
            if getattr(self.best.setup, name) != value:
                self.keeps(replace(self.best.setup, **{name: value}), list(self.best.history))

    def vcpus(self) -> None:
        """Leaves out vCPUs that no operation names, last one first."""
        for i in reversed(range(len(self.best.setup.apic_ids))):
            ids, ops = self.best.setup.apic_ids, self.best.history
            named = {op[1] for op in ops if op[0] not in WITHOUT_VCPU}
            if len(ids) > 1 and i not in named:
                self.keeps(replace(self.best.setup, apic_ids=ids[:i] + ids[i + 1 :]), [_renamed(op, i) for op in ops])

    def pages(self) -> None:
        """Zeroes dwords of the pages that are set."""
        for at, op in enumerate(self.best.history):
            for n, argument in enumerate(op):
                if isinstance(argument, bytes) and len(argument) == r.LAPIC_PAGE_BYTES:
                    self._page(at, n)

    def _page(self, at: int, n: int) -> None:
        for offset in range(0, r.LAPIC_PAGE_BYTES, 4):
            if at >= len(self.best.history):
                return  # the difference shows earlier now
            ops = list(self.best.history)
            page = bytearray(ops[at][n])
            if struct.unpack_from("<I", page, offset)[0]:
                struct.pack_into("<I", page, offset, 0)
                ops[at] = (*ops[at][:n], bytes(page), *ops[at][n + 1 :])
                self.keeps(self.best.setup, ops)


def shortened(cls: type[Twins], found: Divergence, witness: Any = None, seconds: float = SECONDS) -> Divergence | None:
    """The shortest story found within ``seconds``, or until Ctrl-C; the one given if it does not show again.

    None if it does not show again and a late host may have made it. What a side raised stays as it was found.
    """
    if found.is_error:
        return found
    search = _Search(cls, found, witness)
    try:
        if not search.keeps(found.setup, list(found.history)):
            return None if found.late else found
        search.until = time.monotonic() + seconds
        search.operations()
        search.vcpus()
        search.settings()
        search.pages()
        search.operations()
    except KeyboardInterrupt:
        pass  # what was found is worth more than what is still to be left out
    return search.best


def _renamed(op: Op, gone: int) -> Op:
    """An operation when the vCPU of index ``gone`` was never made."""
    if op[0] in WITHOUT_VCPU:
        return op
    return (op[0], op[1] - (op[1] > gone), *op[2:])
