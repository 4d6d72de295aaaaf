"""The VM's interrupt chips as user space makes, reads and writes them.

Models: KVM_CREATE_IRQCHIP, KVM_CAP_SPLIT_IRQCHIP, KVM_GET_IRQCHIP and KVM_SET_IRQCHIP. kernels/chipstate.py has what a
state shows and what setting it does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from fastexit import layout as L
from fastexit import regs as R
from fastexit.checks import integer
from fastexit.gsis import default_table, table_words
from fastexit.jit.declare import load

if TYPE_CHECKING:
    from fastexit.machine import Machine

CHIP_BYTES = 512
"""struct kvm_irqchip without its number: the largest chip's state, and nothing behind a smaller one's."""
CHIPS = 2
"""The last chip's number: 0 is the master PIC, 1 the slave, 2 the IOAPIC."""
RESERVED_PINS = 24
"""KVM_CAP_SPLIT_IRQCHIP's argument: user space's IOAPIC has as many pins as KVM's."""


def created(irqchip: str) -> dict[int, int]:
    """The words of new chips that are not 0."""
    if irqchip == "split":
        return {L.ROUTE_RESERVED: RESERVED_PINS}
    words = {L.IOAPIC + L.IOAPIC_BASE: R.IOAPIC_DEFAULT_BASE}
    words |= {L.IOAPIC + L.IOAPIC_REDIRTBL + pin: R.REDIR_MASK for pin in range(L.IOAPIC_PINS)}
    words |= {L.PIC + chip * L.PIC_STRIDE + L.PIC_ELCR_MASK: mask for chip, mask in enumerate(R.PIC_ELCR_MASKS)}
    return words | table_words(default_table())


def get(machine: Machine, chip: int) -> bytes:
    """KVM_GET_IRQCHIP."""
    chip = _checked(machine, chip)
    with machine.lock:
        load("get_irqchip")(machine.handle, chip)
        size = 8 * (3 + L.IOAPIC_PINS) if chip == CHIPS else L.PIC_FIELDS
        stage = machine.words[L.H_STAGE : L.H_STAGE + CHIP_BYTES // 8].tobytes()
    return stage[:size].ljust(CHIP_BYTES, b"\0")


def put(machine: Machine, chip: int, data: bytes) -> None:
    """KVM_SET_IRQCHIP."""
    chip = _checked(machine, chip)
    data = bytes(memoryview(data))
    if len(data) != CHIP_BYTES:
        raise ValueError(f"the state of a chip has {CHIP_BYTES} bytes, not {len(data)}")
    with machine.lock:
        machine.words[L.H_STAGE : L.H_STAGE + CHIP_BYTES // 8] = np.frombuffer(data, dtype=np.uint64)
        load("set_irqchip")(machine.handle, chip, machine.shared_row())


def _checked(machine: Machine, chip: int) -> int:
    if machine.mem[L.H_CONFIG] & L.CONFIG_SPLIT_IRQCHIP:
        raise ValueError("IOAPIC and PICs are user space's with irqchip='split' (ENXIO)")
    return integer(chip, "chip", CHIPS)
