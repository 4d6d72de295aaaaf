"""A machine whose GSIs 0 to 15 are the lines of its PIC pair and nothing else, and what its chips are in."""

from __future__ import annotations

from typing import Any, NamedTuple

import fastexit as fx
from fastexit import layout as L
from fastexit import regs as r

MASTER, SLAVE = 0, 1
COMMAND, DATA = (0x20, 0xA0), (0x21, 0xA1)
ELCR = 0x4D0, 0x4D1
EOI, SPECIFIC_EOI = 0x20, 0x60
LINT0 = 0x835
BASE = 0x30, 0x38
DISPATCHERS = ("python", "compiled")


class Pic(NamedTuple):
    """The 16 bytes of kvm_pic_state."""

    last_irr: int
    irr: int
    imr: int
    isr: int
    priority_add: int
    irq_base: int
    read_reg_select: int
    poll: int
    special_mask: int
    init_state: int
    auto_eoi: int
    rotate_on_auto_eoi: int
    special_fully_nested_mode: int
    init4: int
    elcr: int
    elcr_mask: int


def machine(**options: Any) -> fx.Machine:
    """Two vCPUs in the guest, interrupts off; the first takes the PIC's by LINT0. Vectors from 0x30 on."""
    m = fx.Machine(vcpus=2, **{"apicv": False} | options)
    m.boot_x2apic()
    m.set_gsi_routing([("pic", n, n >> 3, n & 7) for n in range(16)])
    for v in m.vcpus:
        v.set_mp_state(r.MP_RUNNABLE)
        v.run()
    start(m)
    return m


def start(m: fx.Machine, icw4: int = 1) -> None:
    """A guest's BIOS initialises both chips."""
    for chip in (MASTER, SLAVE):
        for port, value in ((COMMAND, 0x11), (DATA, BASE[chip]), (DATA, 4 >> chip), (DATA, icw4)):
            m.vcpus[0].io_write(port[chip], value)


def state(m: fx.Machine, chip: int) -> Pic:
    """What KVM_GET_IRQCHIP says."""
    return Pic(*m.get_irqchip(chip)[: len(Pic._fields)])


def change(m: fx.Machine, chip: int, **fields: int) -> None:
    """KVM_SET_IRQCHIP of what there is, with some fields different."""
    m.set_irqchip(chip, bytes(state(m, chip)._replace(**fields)) + bytes(496))


def take(v: fx.Vcpu) -> int | None:
    """KVM_RUN of a guest that has interrupts on for one instruction: the vector that it is given."""
    v.set_events()  # as a new RFLAGS, it has KVM look
    v.machine.mem[v.own + L.K_INTERRUPT] = 0
    v.rflags = r.RFLAGS_FIXED | r.RFLAGS_IF
    v.run()
    v.set_events()
    v.rflags = r.RFLAGS_FIXED
    return v.injected
