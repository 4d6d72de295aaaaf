"""A stage for the irqchip's traps: the library beside the plain irqchip or beside /dev/kvm, compared at each step.

Nothing is tested here. What a step came to on the library is returned, so a test says what is right, and the other side
that it is.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

import irqchip_plain
from fastexit import regs as r
from fastexit.kvm.irqchip import IrqchipTwins
from fastexit.kvm.judge import local
from fastexit.kvm.operations import Op
from fastexit.kvm.tracefs import EVENTS
from fastexit.kvm.twins import Setup
from real_kvm import WHY_NOT

INDEX, WINDOW = 0xFEC0_0000, 0xFEC0_0010
LEVEL, MASKED, LOGICAL, REMOTE_IRR, STATUS = 1 << 15, 1 << 16, 1 << 11, 1 << 14, 1 << 12
POLARITY = 1 << 13
SMI, RES3, NMI, INIT, EXTINT = (mode << 8 for mode in (2, 3, 4, 5, 7))
BROADCAST = 0xFF
STATE = struct.Struct("<QIIII24Q")
EOI_MSR = 0x80B

JUDGES = [
    pytest.param("plain", id="plain"),
    pytest.param(
        "kvm", id="kvm", marks=[pytest.mark.kvm, pytest.mark.skipif(WHY_NOT is not None, reason=WHY_NOT or "")]
    ),
]
"""Who says whether the library is right: the plain irqchip, and this machine's kernel."""


class Scene(IrqchipTwins):
    """Twins whose steps return what the library did."""

    result: Any = None

    def same_result(self, op: Op, expected: Any, got: Any) -> None:
        super().same_result(op, expected, got)
        self.result = expected

    def do(self, *op: Any) -> Any:
        """One operation; of a program what it read or took."""
        self.step(op)
        result = self.result
        return result[0] if isinstance(result, tuple) else result

    def line(self, gsi: int, level: int, *, status: bool = True) -> Any:
        return self.do("irq_line", gsi, level, status)

    def pulse(self, gsi: int) -> Any:
        """Up and down: what up said."""
        result = self.line(gsi, 1)
        self.line(gsi, 0)
        return result

    def write(self, index: int, value: int, length: int = 4, i: int = 0) -> None:
        """A guest writes a register of the IOAPIC."""
        self.do("mem_write", i, INDEX, index, 4)
        self.do("mem_write", i, WINDOW, value, length)

    def read(self, index: int, length: int = 4, i: int = 0) -> int:
        self.do("mem_write", i, INDEX, index, 4)
        found: int = self.do("mem_read", i, WINDOW, length)
        return found

    def entry(self, pin: int, low: int, dest: int = 0, i: int = 0) -> None:
        """A guest writes an entry, high half first."""
        self.write(0x11 + 2 * pin, dest << 24, i=i)
        self.write(0x10 + 2 * pin, low, i=i)

    @property
    def chip(self) -> dict[str, Any]:
        """The IOAPIC as user space sees it."""
        base, ioregsel, number, irr, pad, *table = STATE.unpack_from(self.images[2])
        return {"base": base, "ioregsel": ioregsel, "id": number, "irr": irr, "pad": pad, "table": table}

    def remote_irr(self, pin: int) -> bool:
        return bool(self.chip["table"][pin] & REMOTE_IRR)

    def put(self, *, irr: int | None = None, entries: dict[int, int] | None = None, **more: int) -> None:
        """KVM_SET_IRQCHIP of the IOAPIC as it is but for this."""
        state = self.chip | more
        if irr is not None:
            state["irr"] = irr
        for pin, value in (entries or {}).items():
            state["table"][pin] = value
        head = (state["base"], state["ioregsel"], state["id"], state["irr"], state["pad"])
        self.do("set_irqchip", 2, STATE.pack(*head, *state["table"]))

    def page(self, i: int = 0, *, irr: tuple[int, ...] = (), isr: tuple[int, ...] = (), **registers: int) -> None:
        """KVM_SET_LAPIC: these vectors and no others wait or are in service, all of them level."""
        page = bytearray(self.vcpus[i].page)
        for base, vectors in ((r.APIC_IRR, irr), (r.APIC_ISR, isr), (r.APIC_TMR, (*irr, *isr))):
            for word in range(8):
                bits = sum(1 << (v & 31) for v in set(vectors) if v >> 5 == word)
                struct.pack_into("<I", page, base + 0x10 * word, bits)
        for name, value in registers.items():
            struct.pack_into("<I", page, getattr(r, f"APIC_{name}"), value)
        self.do("set_lapic", i, bytes(page))

    def waits(self, i: int = 0) -> set[int]:
        """The IRR."""
        view = self.vcpus[i]
        return {v for v in range(256) if view.reg(r.APIC_IRR + (v >> 5) * 0x10) >> (v & 31) & 1}

    def serve(self, i: int = 0) -> None:
        """All that waits comes into service."""
        self.page(i, isr=tuple(self.waits(i)))

    def run(self, i: int = 0) -> None:
        """KVM_RUN: requests are looked at."""
        self.do("run_through", i)

    def eoi(self, i: int = 0) -> None:
        """By user space."""
        self.do("set_msr", i, EOI_MSR, 0)


@contextmanager
def scene(judge: str, vcpus: int = 2, *, traced: bool = False, kernel: str = "6.18", **setup: Any) -> Iterator[Scene]:
    """Booted x2APIC vCPUs with flat segments, ids from 0 on."""
    where = local() if judge == "kvm" else irqchip_plain.judge(kernel)
    witness = irqchip_plain.PlainTrace(frozenset(EVENTS)) if traced else None
    with Scene(Setup(apic_ids=tuple(range(vcpus)), **setup), witness, where) as twins:
        twins.look()
        for i in range(vcpus):
            twins.do("ready", i)
        twins.do("boot_x2apic")
        yield twins
