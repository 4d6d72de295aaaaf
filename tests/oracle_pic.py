"""The pair of PICs of the oracle: two i8259s as KVM has them, plain and slow.

Models: kvm_pic as far as anybody can see it. `oracle_irqchip.py` has the machine around it.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from oracle_irqchip import Machine

FIELDS = (
    *("last_irr", "irr", "imr", "isr", "priority_add", "irq_base", "read_reg_select", "poll", "special_mask"),
    *("init_state", "auto_eoi", "rotate_on_auto_eoi", "special_fully_nested_mode", "init4", "elcr", "elcr_mask"),
)
"""The 16 bytes of kvm_pic_state."""
PORTS = (0x20, 0x21, 0xA0, 0xA1, 0x4D0, 0x4D1)
ELCR_MASKS = (0xF8, 0xDE)
CASCADE = 2


class Pic:
    """One of the two."""

    def __init__(self, pair: Pair, slave: bool) -> None:
        self.pair = pair
        self.slave = slave
        self.state = dict.fromkeys(FIELDS, 0)
        self.state["elcr_mask"] = ELCR_MASKS[slave]
        self.sources: list[set[int]] = [set() for _ in range(8)]

    def bit(self, field: str, pin: int) -> bool:
        return bool(self.state[field] >> pin & 1)

    def change(self, field: str, pin: int, on: bool) -> None:
        self.state[field] = self.state[field] & ~(1 << pin) | on << pin

    def order(self) -> list[int]:
        """Pins from the most urgent one on."""
        return [(self.state["priority_add"] + n) & 7 for n in range(8)]

    def first(self, bits: int) -> int | None:
        return next((pin for pin in self.order() if bits >> pin & 1), None)

    def wanted(self) -> int | None:
        """The interrupt that goes before all that is in service."""
        pin = self.first(self.state["irr"] & ~self.state["imr"])
        if pin is None:
            return None
        in_service = self.state["isr"]
        if self.state["special_fully_nested_mode"] and not self.slave:
            in_service &= ~(1 << CASCADE)
        before = self.first(in_service)
        order = self.order()
        return pin if before is None or order.index(pin) < order.index(before) else None

    def line(self, pin: int, level: bool) -> int:
        """What kvm_pic_set_irq answers for one chip; the pair is not updated yet."""
        result = 1
        if self.bit("elcr", pin):
            if level:
                result = int(not self.bit("irr", pin))
            self.change("irr", pin, level)
            self.change("last_irr", pin, level)
        elif level:
            if not self.bit("last_irr", pin):
                result = int(not self.bit("irr", pin))
                self.change("irr", pin, True)
            self.change("last_irr", pin, True)
        else:
            self.change("last_irr", pin, False)
        return -1 if self.bit("imr", pin) else result

    def acknowledge(self, pin: int) -> None:
        """The CPU takes a pin's interrupt."""
        self.change("isr", pin, True)
        if not self.bit("elcr", pin):
            self.change("irr", pin, False)
        if self.state["auto_eoi"]:
            if self.state["rotate_on_auto_eoi"]:
                self.state["priority_add"] = pin + 1 & 7
            self.clear_isr(pin)

    def clear_isr(self, pin: int) -> None:
        self.change("isr", pin, False)
        self.pair.machine.acked(int(self.slave), pin)

    def write(self, command: bool, value: int) -> None:
        if not command:
            self.data(value)
        elif value & 0x10:
            self.icw1(value)
        elif value & 8:
            if value & 4:
                self.state["poll"] = 1
            if value & 2:
                self.state["read_reg_select"] = value & 1
            if value & 0x40:
                self.state["special_mask"] = value >> 5 & 1
        else:
            self.ocw2(value >> 5, value & 7)

    def icw1(self, value: int) -> None:
        state = self.state
        edges = state["irr"] & ~state["elcr"]
        state["init4"] = value & 1
        state["last_irr"] = 0
        state["irr"] &= state["elcr"]
        for field in ("imr", "priority_add", "special_mask", "read_reg_select"):
            state[field] = 0
        if not state["init4"]:
            state["special_fully_nested_mode"] = state["auto_eoi"] = 0
        state["init_state"] = 1
        if any(vcpu.accepts_pic() for vcpu in self.pair.machine.vcpus):
            for pin in range(8):
                if edges >> pin & 1:
                    self.clear_isr(pin)

    def ocw2(self, what: int, pin: int) -> None:
        state = self.state
        if what in (0, 4):
            state["rotate_on_auto_eoi"] = what >> 2
        elif what in (1, 5):
            highest = self.first(state["isr"])
            if highest is None:
                return
            if what == 5:
                state["priority_add"] = highest + 1 & 7
            self.clear_isr(highest)
            self.pair.update()
        elif what == 3:
            self.clear_isr(pin)
            self.pair.update()
        elif what in (6, 7):
            state["priority_add"] = pin + 1 & 7
            if what == 7:
                self.clear_isr(pin)
            self.pair.update()

    def data(self, value: int) -> None:
        state = self.state
        if state["init_state"] == 0:
            changed = state["imr"] ^ value
            state["imr"] = value
            for pin in range(8):
                if changed >> pin & 1:
                    self.pair.machine.mask_changed(int(self.slave), pin, bool(value >> pin & 1))
            self.pair.update()
        elif state["init_state"] == 1:
            state["irq_base"] = value & 0xF8
            state["init_state"] = 2
        elif state["init_state"] == 2:
            state["init_state"] = 3 if state["init4"] else 0
        elif state["init_state"] == 3:
            state["special_fully_nested_mode"] = value >> 4 & 1
            state["auto_eoi"] = value >> 1 & 1
            state["init_state"] = 0

    def read(self, command: bool) -> int:
        if self.state["poll"]:
            value = self.polled()
            self.state["poll"] = 0
            return value
        if not command:
            return self.state["imr"]
        return self.state["isr" if self.state["read_reg_select"] else "irr"]

    def polled(self) -> int:
        pin = self.wanted()
        if pin is None:
            self.pair.update()
            return 7
        if self.slave:
            self.pair.chips[0].change("isr", CASCADE, False)
            self.pair.chips[0].change("irr", CASCADE, False)
        self.change("irr", pin, False)
        self.clear_isr(pin)
        if self.slave or pin != CASCADE:
            self.pair.update()
        return pin | (0x80 if self.pair.machine.poll_bit_7 else 0)


class Pair:
    """Master and slave, and the one line that both have to the CPU."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.chips = (Pic(self, False), Pic(self, True))
        self.output = False

    def update(self) -> None:
        """What the slave wants pulses the master's pin 2; what the master wants is the output."""
        master, slave = self.chips
        if slave.wanted() is not None:
            master.line(CASCADE, True)
            master.line(CASCADE, False)
        before, self.output = self.output, master.wanted() is not None
        if not before:
            self.wake()

    def wake(self) -> None:
        for vcpu in self.machine.vcpus:
            if vcpu.accepts_pic():
                vcpu.request("EVENT")
                return

    def set_irq(self, pin: int, source: int, level: bool) -> int:
        """A line of the pair, 0 to 15."""
        chip = self.chips[pin >> 3]
        (chip.sources[pin & 7].add if level else chip.sources[pin & 7].discard)(source)
        result = chip.line(pin & 7, bool(chip.sources[pin & 7]))
        self.update()
        self.machine.log(
            f"kvm_pic_set_irq: chip {pin >> 3} pin {pin & 7} ({'level' if chip.bit('elcr', pin & 7) else 'edge'}"
            f"{'|masked' if chip.bit('imr', pin & 7) else ''}){' (coalesced)' if result == 0 else ''}"
        )
        return result

    def read_irq(self) -> int:
        """The CPU acknowledges: the vector."""
        master, slave = self.chips
        self.output = False
        chip, pin = master, master.wanted()
        if pin is None:
            pin = 7
        else:
            master.acknowledge(pin)
            if pin == CASCADE:
                chip, pin = slave, slave.wanted()
                if pin is None:
                    pin = 7
                else:
                    slave.acknowledge(pin)
        vector = chip.state["irq_base"] + pin & 0xFF
        self.update()
        return vector

    def port(self, port: int, length: int) -> tuple[str, Pic] | None:
        """Which register of whom answers; None for what goes to user space."""
        if port not in PORTS:
            return None
        if length != 1:
            return ("swallowed", self.chips[0]) if length == 2 and not port & 1 else None
        if port >= PORTS[4]:
            return "elcr", self.chips[port & 1]
        return ("data" if port & 1 else "command"), self.chips[port >> 7]

    def io_write(self, port: int, value: int, length: int) -> bool:
        found = self.port(port, length)
        if found is None:
            return False
        register, chip = found
        if register == "elcr":
            chip.state["elcr"] = value & chip.state["elcr_mask"]
        elif register != "swallowed":
            chip.write(register == "command", value)
        return True

    def io_read(self, port: int, length: int) -> int | None:
        found = self.port(port, length)
        if found is None:
            return None
        register, chip = found
        if register == "swallowed":
            return 0
        return chip.state["elcr"] if register == "elcr" else chip.read(register == "command")

    def get(self, chip: int) -> bytes:
        return struct.pack("16B", *self.chips[chip].state.values())

    def set(self, chip: int, data: bytes) -> None:
        self.chips[chip].state = dict(zip(FIELDS, struct.unpack_from("16B", data)))
        self.update()
