"""The PIC pair: what a naive model gets wrong, seen on 6.18 but where said. docs/model.md has the IOAPIC's part."""

from __future__ import annotations

import numpy as np
import pytest

import fastexit as fx
from fastexit import regs as r
from generations import kernels
from pics import (
    BASE,
    COMMAND,
    DATA,
    DISPATCHERS,
    ELCR,
    EOI,
    LINT0,
    MASTER,
    SLAVE,
    SPECIFIC_EOI,
    change,
    machine,
    start,
    state,
    take,
)

BIT_7 = kernels("6.6")


def lines(m: fx.Machine) -> list[str]:
    """What was traced of acknowledgements."""
    return [line for line in m.trace.lines() if "kvm_ack_irq" in line]


@pytest.mark.parametrize("dispatcher", DISPATCHERS)
def test_an_interrupt_of_the_slave(dispatcher: str) -> None:
    """It comes through the master's pin 2, and both are in service until each has its EOI."""
    m = machine(dispatcher=dispatcher)
    v = m.vcpus[0]
    assert m.irq_line(12, 1) == 1
    assert take(v) == BASE[SLAVE] + 4
    assert (state(m, MASTER).isr, state(m, SLAVE).isr) == (1 << 2, 1 << 4)
    assert (v.pending(), v.eoi()) == (None, None), "the local APIC has seen nothing"
    m.trace.enable()
    v.io_write(COMMAND[SLAVE], EOI)
    v.io_write(COMMAND[MASTER], EOI)
    assert (state(m, MASTER).isr, state(m, SLAVE).isr) == (0, 0)
    assert lines(m) == ["kvm_ack_irq: irqchip PIC slave pin 12", "kvm_ack_irq: irqchip PIC master pin 2"]
    assert take(v) is None


def test_trap_32_slave_request_is_a_pulse() -> None:
    """The master keeps the request when the slave's has gone: its irr has bit 2, its last_irr has not."""
    m = machine()
    m.vcpus[0].io_write(ELCR[1], 2)
    m.irq_line(9, 1)
    assert (state(m, MASTER).irr, state(m, MASTER).last_irr) == (4, 0)
    m.irq_line(9, 0)
    assert (state(m, MASTER).irr, state(m, SLAVE).irr) == (4, 0)


def test_trap_33_masked() -> None:
    """-1, and up or down is remembered all the same."""
    m = machine()
    v = m.vcpus[0]
    v.io_write(DATA[MASTER], 0xFF)
    assert [m.irq_line(5, level) for level in (1, 0)] == [-1, -1]
    assert state(m, MASTER).irr == 1 << 5
    v.io_write(DATA[MASTER], 0)
    assert take(v) == BASE[MASTER] + 5


def test_trap_34_edge_up_twice() -> None:
    """An "up" without a "down" before is 1; one behind a "down", with the request still there, is 0."""
    m = machine()
    assert [m.irq_line(5, level) for level in (1, 1, 0, 1)] == [1, 1, 1, 0]
    m.vcpus[0].io_write(ELCR[0], 1 << 6)
    assert [m.irq_line(6, level) for level in (1, 1, 0, 1)] == [1, 0, 1, 1]


def test_trap_35_special_mask_is_stored_only() -> None:
    """In special mask mode a masked pin in service does not let lower ones through."""
    m = machine()
    v = m.vcpus[0]
    m.irq_line(3, 1)
    assert take(v) == BASE[MASTER] + 3
    v.io_write(COMMAND[MASTER], 0x68)
    v.io_write(DATA[MASTER], 1 << 3)
    m.irq_line(5, 1)
    assert state(m, MASTER).special_mask == 1
    assert take(v) is None


def test_traps_36_37_icw1_keeps_isr_and_level_requests() -> None:
    """Edge requests go, level ones and what is in service stay."""
    m = machine()
    v = m.vcpus[0]
    v.io_write(ELCR[0], 1 << 4)
    m.irq_line(3, 1)
    assert take(v) == BASE[MASTER] + 3
    m.irq_line(4, 1)
    m.irq_line(5, 1)
    v.io_write(COMMAND[MASTER], 0x11)
    assert (state(m, MASTER).isr, state(m, MASTER).irr) == (1 << 3, 1 << 4)


def test_trap_38_icw1_leaves_the_output() -> None:
    """It is not looked at anew, so a vCPU acknowledges what is no more: spurious pin 7, nothing in service."""
    m = machine()
    v = m.vcpus[0]
    m.irq_line(3, 1)
    v.io_write(COMMAND[MASTER], 0x11)
    assert take(v) == BASE[MASTER] + 7
    assert state(m, MASTER).isr == 0
    assert take(v) is None


@pytest.mark.parametrize("accepts", [True, False])
def test_trap_39_icw1_acknowledges_edges_if_anybody_accepts(accepts: bool) -> None:
    """Only pins with an edge request, and those leave service."""
    m = machine()
    v = m.vcpus[0]
    v.io_write(ELCR[0], 1 << 4)
    change(m, MASTER, isr=1 << 3 | 1 << 6, irr=1 << 3 | 1 << 4 | 1 << 5)
    if not accepts:
        v.set_msr(LINT0, 0x10700)
    m.trace.enable()
    v.io_write(COMMAND[MASTER], 0x11)
    told = [f"kvm_ack_irq: irqchip PIC master pin {pin}" for pin in (3, 5)]
    assert lines(m) == (told if accepts else [])
    assert state(m, MASTER).isr == (1 << 6 if accepts else 1 << 3 | 1 << 6)


def test_traps_40_41_icw1_keeps_poll_and_rotation() -> None:
    m = machine()
    v = m.vcpus[0]
    v.io_write(COMMAND[MASTER], 0x80)
    v.io_write(COMMAND[MASTER], 0x0C)
    v.io_write(COMMAND[MASTER], 0x11)
    assert (state(m, MASTER).poll, state(m, MASTER).rotate_on_auto_eoi) == (1, 1)


@pytest.mark.parametrize("init4", [0, 1])
def test_trap_42_icw1_without_icw4(init4: int) -> None:
    """Without an ICW4 to come auto-EOI and special fully nested mode are off; with it they stay until it comes."""
    m = machine()
    start(m, icw4=0x13)
    m.vcpus[0].io_write(COMMAND[MASTER], 0x10 | init4)
    chip = state(m, MASTER)
    assert (chip.auto_eoi, chip.special_fully_nested_mode, chip.init4, chip.init_state) == (init4, init4, init4, 1)


def test_trap_43_specific_eoi_of_an_idle_pin_is_told() -> None:
    """Ack notifiers hear of it."""
    m = machine()
    m.trace.enable()
    m.vcpus[0].io_write(COMMAND[SLAVE], SPECIFIC_EOI | 5)
    assert lines(m) == ["kvm_ack_irq: irqchip PIC slave pin 13"]
    m.vcpus[0].io_write(COMMAND[SLAVE], EOI)
    assert len(lines(m)) == 1, "nothing is in service"


@pytest.mark.parametrize("kernel", fx.profiles())
def test_trap_44_poll(kernel: str) -> None:
    """6.6.150 pic_poll_read sets bit 7 beside the pin, 6.1.166 does not; none is 7."""
    m = machine(kernel=kernel)
    v = m.vcpus[0]
    m.irq_line(5, 1)
    v.io_write(COMMAND[MASTER], 0x0C)
    assert v.io_read(COMMAND[MASTER]) == (0x85 if kernel in BIT_7 else 5)
    v.io_write(COMMAND[MASTER], 0x0C)
    assert v.io_read(COMMAND[MASTER]) == 7
    assert state(m, MASTER).isr == 0, "a poll leaves nothing in service"


@pytest.mark.parametrize("chip", [MASTER, SLAVE])
def test_trap_45_poll_answers_at_either_port(chip: int) -> None:
    """Once; the next read is a register's. The slave's takes the master's request and service away as well."""
    m = machine()
    v = m.vcpus[0]
    v.io_write(DATA[chip], 1 << 7)
    m.irq_line(8 * chip + 5, 1)
    v.io_write(COMMAND[chip], 0x0C)
    assert v.io_read(DATA[chip]) == 0x85
    assert v.io_read(DATA[chip]) == 1 << 7
    assert state(m, MASTER).irr == 0
    assert take(v) is None


def test_trap_46_inta_leaves_a_level_request_and_poll_does_not() -> None:
    m = machine()
    v = m.vcpus[0]
    v.io_write(ELCR[0], 1 << 5)
    m.irq_line(5, 1)
    assert take(v) == BASE[MASTER] + 5
    assert (state(m, MASTER).irr, state(m, MASTER).isr) == (1 << 5, 1 << 5)
    v.io_write(COMMAND[MASTER], EOI)
    assert take(v) == BASE[MASTER] + 5
    v.io_write(COMMAND[MASTER], EOI)
    v.io_write(COMMAND[MASTER], 0x0C)
    assert v.io_read(COMMAND[MASTER]) == 0x85
    assert state(m, MASTER).irr == 0


def test_trap_47_elcr_mask_is_state() -> None:
    """0xF8 and 0xDE at first; user space may let all lines be level-triggered."""
    m = machine()
    v = m.vcpus[0]
    for chip, mask in ((MASTER, 0xF8), (SLAVE, 0xDE)):
        v.io_write(ELCR[chip], 0xFF)
        assert v.io_read(ELCR[chip]) == mask
    change(m, MASTER, elcr_mask=0xFF)
    v.io_write(ELCR[0], 0xFF)
    assert v.io_read(ELCR[0]) == 0xFF


def test_trap_48_spurious_slave() -> None:
    """The slave's lowest vector, nothing in service there, and the master's bit 2 until its EOI."""
    m = machine()
    v = m.vcpus[0]
    v.io_write(ELCR[1], 2)
    m.irq_line(9, 1)
    m.irq_line(9, 0)
    assert take(v) == BASE[SLAVE] + 7
    assert (state(m, MASTER).isr, state(m, SLAVE).isr) == (1 << 2, 0)


@pytest.mark.parametrize("dispatcher", DISPATCHERS)
def test_trap_59_the_first_that_accepts_is_woken(dispatcher: str) -> None:
    """In the order of creation; others sleep on, although they would take it."""
    m = machine(dispatcher=dispatcher)
    first, second = m.vcpus
    second.set_msr(LINT0, 0x700)
    for v in m.vcpus:
        v.rflags |= r.RFLAGS_IF
        assert v.exit(fx.VmxExit.HLT).blocked
    m.irq_line(3, 1)
    assert m.targets == ((0, fx.Effect.WAKE),)
    assert not second.requests & r.REQ_EVENT
    first.set_msr(LINT0, 0x10700)
    m.irq_line(3, 0)
    m.vcpus[0].io_write(COMMAND[MASTER], SPECIFIC_EOI)
    assert m.targets == ()


def test_trap_60_before_the_local_apic_whatever_its_priority() -> None:
    """TPR does not hold it, and IRR has to wait."""
    m = machine()
    v = m.vcpus[0]
    v.set_msr(0x808, 0xFF)
    m.irq_line(3, 1)
    assert take(v) == BASE[MASTER] + 3
    v.io_write(COMMAND[MASTER], EOI)
    v.set_msr(0x808, 0)
    m.vcpus[1].wrmsr(0x830, fx.icr(dest=0, vector=0xFD))
    m.irq_line(4, 1)
    assert take(v) == BASE[MASTER] + 4
    assert take(v) == 0xFD


def test_trap_68_vectors_have_eight_bits() -> None:
    """A base of 254, which only KVM_SET_IRQCHIP can give, and pin 5."""
    m = machine()
    change(m, MASTER, irq_base=254)
    m.irq_line(5, 1)
    assert take(m.vcpus[0]) == 3


def two_that_accept(dispatcher: str) -> fx.Vcpu:
    """vCPU 1, which is about to take an auto-EOI interrupt; behind it waits another, of which vCPU 0 will be told.

    The latter sleeps with interrupts off.
    """
    m = machine(dispatcher=dispatcher)
    start(m, icw4=3)
    first, second = m.vcpus
    first.set_msr(LINT0, 0x10700)
    second.set_msr(LINT0, 0x700)
    m.irq_line(3, 1)
    m.irq_line(4, 1)
    first.set_msr(LINT0, 0x700)
    assert first.exit(fx.VmxExit.HLT).blocked
    second.rflags |= r.RFLAGS_IF
    return second


@pytest.mark.parametrize("dispatcher", DISPATCHERS)
def test_who_acknowledges_may_wake_another(dispatcher: str) -> None:
    """The outcome of the exit before the entry says so, and only that."""
    v = two_that_accept(dispatcher)
    assert v.run()
    assert (v.injected, v.targets) == (BASE[MASTER] + 3, ((0, fx.Effect.WAKE),))
    out = v.exit(fx.VmxExit.EXTERNAL_INTERRUPT)
    assert (out.effects, v.targets) == (fx.Effect.NONE, ())


@pytest.mark.parametrize("dispatcher", DISPATCHERS)
def test_who_acknowledges_behind_an_exit_may_wake_another(dispatcher: str) -> None:
    v = two_that_accept(dispatcher)
    v.rflags &= ~r.RFLAGS_IF
    assert v.run()
    assert v.irq_window
    v.rflags |= r.RFLAGS_IF
    out = v.exit(fx.VmxExit.INTERRUPT_WINDOW)
    assert v.injected == BASE[MASTER] + 3
    assert (out.effects, v.targets) == (fx.Effect.WAKE, ((0, fx.Effect.WAKE),))


@pytest.mark.parametrize("dispatcher", DISPATCHERS)
@pytest.mark.parametrize("port", [0x20, 0xA0, 0x4D0])
def test_two_bytes_at_once_are_swallowed(port: int, dispatcher: str) -> None:
    """Read as 0 and written to nothing; at an odd port, or four, they are user space's, as are the ports around."""
    m = machine(dispatcher=dispatcher)
    v = m.vcpus[0]
    v.io_write(DATA[MASTER], 0xFF)
    before = [state(m, chip) for chip in (MASTER, SLAVE)]
    assert v.io_write(port, 0xFFFF, 2).user is None
    assert (v.io_read(port, 2), v.user_io) == (0, None)
    assert v.io_write(port, 0xFFFF_FFFF, 4).user is fx.KvmExit.IO
    assert v.io_write(port + 1, 0xFFFF, 2).user is fx.KvmExit.IO
    for near in (port - 1, port + 2):
        assert v.io_write(near, 0xFF).user is fx.KvmExit.IO
    assert [state(m, chip) for chip in (MASTER, SLAVE)] == before


@pytest.mark.parametrize("dispatcher", DISPATCHERS)
def test_with_a_split_irqchip_the_ports_are_user_spaces(dispatcher: str) -> None:
    v = fx.Machine(vcpus=1, irqchip="split", dispatcher=dispatcher).vcpus[0]
    for port in (*COMMAND, *DATA, *ELCR):
        assert v.io_write(port, 0x11).user is fx.KvmExit.IO
        assert v.io_read(port) == 0
        assert v.exit_reason is fx.KvmExit.IO


@pytest.mark.parametrize("vendor", ["vmx", "svm"])
def test_ports_by_batch(vendor: str) -> None:
    """Records do what single accesses do, and RIP moves."""
    m, other = machine(vendor=vendor), machine(vendor=vendor)
    writes = ((0x20, 0x11), (0x21, 0x40), (0x21, 4), (0x21, 1), (0x21, 0xF7), (0x4D1, 0xFF), (0xA1, 0x55))
    rip = m.vcpus[0].rip
    reason = m.dispatcher.vendor.io_reason
    records = [(0, reason, 0, m.io_info(port, 1, write=True), value, 0) for port, value in writes]
    for port, value in writes:
        other.vcpus[0].io_write(port, value)
    done = m.run(np.array(records, dtype=fx.EXIT))
    assert {int(code) for code in done["code"]} == {int(other.vcpus[0].io_write(0x21, 0xF7).code)}
    assert [state(m, chip) for chip in (MASTER, SLAVE)] == [state(other, chip) for chip in (MASTER, SLAVE)]
    assert (m.vcpus[0].rip > rip) is (other.vcpus[0].rip > rip)


@pytest.mark.parametrize("dispatcher", DISPATCHERS)
def test_ports_are_traced(dispatcher: str) -> None:
    """What a write gives at once, what a read gives when it is there: user space's with the next KVM_RUN."""
    m = machine(dispatcher=dispatcher)
    v = m.vcpus[0]
    m.trace.enable()
    v.io_write(0x21, 0xFB)
    v.io_read(0x21)
    v.io_write(0x80, 0x1234, 2)
    v.io_read(0x60)
    before = len(m.trace.lines())
    v.complete_access(0xAB)
    pio = [line for line in m.trace.lines() if "kvm_pio" in line]
    assert [line.removeprefix("kvm_pio: ").strip() for line in pio] == [
        "pio_write at 0x21 size 1 count 1 val 0xfb",
        "pio_read at 0x21 size 1 count 1 val 0xfb",
        "pio_write at 0x80 size 2 count 1 val 0x1234",
        "pio_read at 0x60 size 1 count 1 val 0xab",
    ]
    assert len(m.trace.lines()) == before + 1


@pytest.mark.parametrize("kernel", fx.profiles())
def test_a_look_at_the_output_wakes(kernel: str) -> None:
    """Up to 6.12 pic_irq_request asks for a vCPU whenever the output was low (6.12.15); 6.16.1 only if it rises."""
    m = machine(kernel=kernel)
    v = m.vcpus[0]
    assert v.exit(fx.VmxExit.HLT).blocked
    m.irq_line(3, 0)
    assert m.targets == (((0, fx.Effect.WAKE),) if kernel not in kernels("6.18") else ())


def test_kvm_interrupt_is_not_for_this_irqchip() -> None:
    with pytest.raises(ValueError, match="ENXIO"):
        machine().vcpus[0].interrupt(0x31)
