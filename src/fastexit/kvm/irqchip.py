"""Twins whose irqchip is driven by lines, messages, eventfds, states and guests: every chip is compared behind each.

Models: nothing. irqdraw.py draws what happens.
"""

from __future__ import annotations

import random
import struct
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar

from fastexit import regs as r
from fastexit.exits.bus import NOT_MINE
from fastexit.kvm import irqdraw as D
from fastexit.kvm.chips import CHIP_BYTES
from fastexit.kvm.guest import MEMORY_BYTES, Access
from fastexit.kvm.host import Host
from fastexit.kvm.judge import Judge
from fastexit.kvm.operations import Op, apply
from fastexit.kvm.programs import Program
from fastexit.kvm.twins import Divergence, Setup, Twins
from fastexit.kvm.values import chance, masked
from fastexit.reasons import KvmExit

IDS = (0, 0, 1, 2, 3, 7, 8, 15, 16, 17, 31, 127, 254, 255, 256, 300)
ACCESSES = frozenset(("mem_write", "mem_read", "io_write", "io_read"))
PROGRAMS = ACCESSES | {"take", "run_through", "wrmsr"}
COUNTERS, CONTROL_PORT, SPEAKER_PORT = range(0x40, 0x43), 0x43, 0x61
STATUS_AT, STATUS_LATCHED_AT = 8, 7
"""Of kvm_pit_channel_state."""
OUTPUT = 0x80
"""Of a status byte: what depends on the time."""
REFRESH_AND_OUTPUT = 0x30
WORKER_SECONDS, WORKER_WAITS = 3e-4, 0.5
"""How long a worker of the kernel's usually takes, and how long it may."""
LATELY = 40
"""Operations behind which such an exit no longer counts as an excuse."""
EOI_WRITTEN = "kvm_apic: apic_write APIC_EOI = 0x0"
"""How an interrupt is ended that is injected (`Host.eoi_at_injection`)."""
IOAPIC_WORDS = ("base", "ioregsel", "id", "irr", "pad")
Ran = tuple[Any, tuple[int, ...], tuple[Access, ...]]
"""What a program came to: a result, EOIs for user space's IOAPIC, accesses that were left to user space."""


class ChipProgram(Program):
    """Programs at devices. ``one_entry``: nothing is looked at between a program's instructions (`Host.one_entry`)."""

    def __init__(self, *arguments: Any, one_entry: bool = False, **more: Any) -> None:
        super().__init__(*arguments, **more)
        self.one_entry = one_entry
        self.left: list[Access] = []

    def access(self, name: str, where: int, value: int | None, length: int) -> int | None:
        """A store, load, OUT or IN: what was read."""
        self._enter()
        port = name.startswith("io")
        read = self._at_once(port, where, value, length) if self.one_entry else self._exits(port, where, value, length)
        self._out()
        return read

    def _at_once(self, port: bool, where: int, value: int | None, length: int) -> int | None:
        v = self.v
        bus: Any = v.machine.dispatcher.vendor.common.bus  # type: ignore[attr-defined]
        write, read = (bus.io_write, bus.io_read) if port else (bus.write, bus.read)
        code = read(v, where, length) if value is None else write(v, where, length, value)
        if code == NOT_MINE:
            self.left.append(Access(port, where, length, value is not None, value or 0))
            return 0 if value is None else None
        return v.read_data & (1 << 8 * length) - 1 if value is None else None

    def _exits(self, port: bool, where: int, value: int | None, length: int) -> int | None:
        v = self.v
        if value is not None:
            (v.io_write if port else v.mem_write)(where, value, length)
            read = None
        else:
            read = (v.io_read if port else v.mem_read)(where, length)
        return self._behind(port, read, value, length)

    def _behind(self, port: bool, read: int | None, value: int | None, length: int) -> int | None:
        """What was read; user space has answered an access that was left to it, and the guest is in again."""
        v = self.v
        for waits in (v.user_mmio, v.user_io):
            if waits is not None:
                self.left.append(Access(port, waits[0], waits.length, waits.write, waits.data))
                v.complete_access()
                self._go_on()
                return 0 if value is None else None
        if v.exit_reason == KvmExit.IOAPIC_EOI:
            self._note_eoi()
            self._go_on()
        return None if read is None or value is not None else read & (1 << 8 * length) - 1


class IrqchipTwins(Twins):
    """Lines, guests at IOAPIC, PIC and PIT, states of all chips, routes, irqfds, EOIs by all doors, messages, IPIs.

    ("irqfd", number, gsi, resample), ("irqfd_signal", number, count) and ("irqfd_close", number) are eventfds.
    ("take", i) and ("run_through", i) are guests that run with interrupts on and off. Pages are compared but for PPR,
    which a run may or may not refresh, and the time.
    """

    kind = "irqchip"
    needs: ClassVar[frozenset[str]] = Twins.needs | {"irq_line", "get_irqchip", "is_flat"}
    operations_each = 250
    states = True
    last_questions: ClassVar[tuple[Op, ...]] = Twins.last_questions[:-1]  # the code segment is the programs'
    about = (
        "IRQ lines, IOAPIC, PIC and PIT ports by guests, KVM_SET_IRQCHIP, routes, irqfds, messages, EOIs, interrupts "
        "taken; chips, pages, exits"
    )

    def __init__(self, setup: Setup, witness: Any = None, judge: Judge | None = None) -> None:
        super().__init__(setup, witness, judge)
        self.split: bool = setup.irqchip == "split"
        self.calm: bool = self.host.smm
        self.tells_eoi_at_once: bool = not self.host.one_entry
        self.ends_at_injection: bool = self.host.eoi_at_injection
        self.model_irqfds: dict[int, Any] = {}
        self.irqfds: dict[int, Any] = {}
        self.images: Sequence[bytes] = []
        self.pit: bytes = b""
        self.pools: D.Pools | None = None

    def close(self) -> None:
        """Closes eventfds and the real VM."""
        for one in getattr(self, "irqfds", {}).values():
            one.close()
        super().close()

    @classmethod
    def draw(cls, rng: random.Random, host: Host, ids: tuple[int, ...] | None) -> Setup:
        """1 to 4 vCPUs (or these), four of five with a full irqchip, any flags about ids and the broadcast."""
        drawn = ids or tuple(dict.fromkeys(rng.sample([i for i in IDS if i < host.max_vcpu_id], rng.randint(1, 5))))
        irqchip = rng.choices(("full", "split"), (4, 1))[0]
        return Setup(
            apic_ids=drawn[:4],
            irqchip=irqchip,
            x2apic_api=rng.randrange(4) & (host.api_split if irqchip == "split" else host.api),
            x2apic=chance(rng, 0.85),
            boot_cpu_id=rng.choice(drawn[:4]) if chance(rng, 0.3) else 0,
        )

    def beginning(self, rng: random.Random) -> Iterator[Op]:
        self.look()
        self.pools = D.Pools.draw(rng, self.split, self.witness is not None)
        for op in D.beginning(rng, self, self.pools):
            yield self.tame(op)

    def draw_op(self, rng: random.Random) -> Op:
        assert self.pools is not None
        while not self.makes_sense(op := self.tame(D.draw(rng, self, self.pools))):
            pass
        return op

    def tame(self, op: Op) -> Op:
        """The same operation without a timer that runs."""
        if op[0] != "set_lapic":
            return op
        page = bytearray(op[2])
        struct.pack_into("<I", page, r.APIC_TMICT, 0)
        return (*op[:2], bytes(page))

    def makes_sense(self, op: Op) -> bool:
        """Whether what an operation needs is there: in a replay it may have been left out."""
        if op[0] in PROGRAMS:
            return self.able(op[1])
        if op[0] in ("irqfd_signal", "irqfd_close"):
            return op[1] in self.irqfds
        return op[0] != "irqfd" or op[1] not in self.irqfds

    def able(self, i: int) -> bool:
        """Whether the next instruction of a vCPU would be the one that is meant."""
        model = self.model.vcpus[i]
        return (
            model.get_mp_state() == r.MP_RUNNABLE
            and not model.events().nmi_pending
            and self.real.vcpus[i].is_flat()
            and MEMORY_BYTES <= model.apic_base & r.APICBASE_PAGE < 1 << 32
        )

    def may_be_late(self) -> bool:
        """A host that is busy may take a guest out between two instructions that are one entry otherwise."""
        return self.host.one_entry and any(op[0] in ACCESSES for op in self.history[-LATELY:])

    # ------------------------------------------------------------------------------------------------- what is done

    def step(self, op: Op) -> None:
        """One operation on both sides, then a look; what a worker of the kernel's does is waited for."""
        if not self.makes_sense(op):
            return
        if op[0] != "irqfd_signal":
            super().step(op)
            return
        self.history.append(op)
        self.carry_out(op)
        self.real.wait(WORKER_SECONDS)
        until = time.monotonic() + WORKER_WAITS
        while True:
            try:
                self.look()
                return
            except Divergence:
                if time.monotonic() > until:
                    raise
                self.real.wait(WORKER_SECONDS * 10)

    def model_does(self, op: Op) -> Any:
        """What an operation comes to on the model."""
        if op[0] in PROGRAMS:
            return self._and_through(self.model_run, op)
        if op[0] == "irqfd_signal":
            self.model_irqfds[op[1]].signal()  # an event is an event, whatever was written
            return None
        return self._chips(self.model, self.model_irqfds, op)

    def real_does(self, op: Op) -> Any:
        """What an operation comes to on the real machine."""
        if op[0] in PROGRAMS:
            return self._and_through(self.real_run, op)
        return self._chips(self.real, self.irqfds, op)

    def _and_through(self, run: Callable[[Op], Ran], op: Op) -> Ran:
        """A program, and behind it another KVM_RUN where EOIs for user space's IOAPIC are told by that or by an exit.

        Such an exit there is on a host that emulates instructions if it is busy.
        """
        result, eois, left = run(op)
        if self.split and self.host.one_entry and op[0] != "run_through":
            _, more, _ = run(("run_through", op[1]))
            eois += more
        return result, eois, left

    def program(self, i: int, *, interrupts: bool) -> ChipProgram:
        """What runs a vCPU's programs on the model."""
        host = self.host
        quirks = {"eoi_at_injection": host.eoi_at_injection, "one_entry": host.one_entry}
        return ChipProgram(self.model.vcpus[i], interrupts=interrupts, **quirks)

    def model_run(self, op: Op) -> Ran:
        """A guest's program on the model."""
        name, i, *arguments = op
        program = self.program(i, interrupts=name == "take")
        if name in ACCESSES:
            where, *value, length = arguments
            result: Any = program.access(name, where, value[0] if value else None, length)
        else:
            result = getattr(program, name)(*arguments)
            if name == "run_through":
                result = None
        return result, tuple(program.ioapic_eois), tuple(program.left)

    def real_run(self, op: Op) -> Ran:
        """A guest's program on the real machine."""
        name, i, *arguments = op
        vcpu = self.real.vcpus[i]
        vcpu.ioapic_eois.clear()
        vcpu.left.clear()
        result = getattr(vcpu, name)(*arguments)
        if name not in ("take", "mem_read", "io_read"):
            result = None
        return result, tuple(vcpu.ioapic_eois), tuple(vcpu.left)

    @staticmethod
    def _chips(machine: Any, irqfds: dict[int, Any], op: Op) -> Any:
        name, *arguments = op
        try:
            if name == "irq_line":
                gsi, level, status = arguments
                result = machine.irq_line(gsi, level, status=status)
                return result if status else None  # KVM_IRQ_LINE tells nothing
            if name == "set_irqchip":
                return machine.set_irqchip(arguments[0], arguments[1].ljust(CHIP_BYTES, b"\0"))
            if name in ("set_gsi_routing", "create_pit", "set_pit", "reinject_control"):
                getattr(machine, name)(*arguments)  # whom the host has to kick is not compared
                return None
            if name == "irqfd":
                number, gsi, resample = arguments
                irqfds[number] = machine.irqfd(gsi, resample=resample)
                return None
            if name == "irqfd_signal":
                irqfds[arguments[0]].signal(arguments[1])
                return None
            if name == "irqfd_close":
                irqfds.pop(arguments[0]).close()
                return None
        except ValueError:
            return "refused"
        return apply(machine, op)

    def carry_out(self, op: Op) -> None:
        if self.witness is None:
            self.same_result(op, self.model_does(op), self.real_does(op))
            return
        trace = self.model.trace
        trace.clear()
        trace.enable()
        expected = self.model_does(op)
        trace.disable()
        self.witness.clear()
        got = self.real_does(op)
        self.same_result(op, expected, got)
        self.same_lines(op, self.model_lines(), self.witness.read())

    def model_lines(self) -> list[str]:
        """What the model's tracepoints printed, as far as the kernel's are looked at."""
        return [line for line in self.model.trace.lines() if line.partition(":")[0] in self.witness.events]

    # ---------------------------------------------------------------------------------------------- what is compared

    def same_lines(self, op: Op, expected: list[str], got: list[str]) -> None:
        if op[0] == "take" and self.host.eoi_at_injection:
            got = [line for line in got if line != EOI_WRITTEN]
        super().same_lines(op, expected, got)

    def same_result(self, op: Op, expected: Any, got: Any) -> None:
        if op[0] == "io_read" and self.pit:
            expected, got = (self._timeless(op[2], result) for result in (expected, got))
        super().same_result(op, expected, got)

    def _timeless(self, port: int, ran: Ran) -> Ran:
        """What a read came to, without what depends on the time."""
        value, eois, left = ran
        if port in COUNTERS:
            latched = self.pit[(port - COUNTERS.start) * D.PIT_CHANNEL_BYTES + STATUS_LATCHED_AT]
            value = value & 0xFF & ~OUTPUT if latched else 0
        elif port == SPEAKER_PORT:
            value &= ~REFRESH_AND_OUTPUT
        elif port == CONTROL_PORT:
            value = 0  # nobody writes it: what the emulator, or the register, had before
        return value, eois, left

    def shown(self, page: bytes) -> bytes:
        page = masked(page)
        return page[: r.APIC_PROCPRI] + bytes(4) + page[r.APIC_PROCPRI + 4 :]

    def look(self) -> None:
        """Pages and events of vCPUs, the three chips, the PIT, what irqfds were told."""
        super().look()
        if not self.split:
            model: Any = self.model
            chips = [model.get_irqchip(chip) for chip in range(3)]
            others = self.real.get_irqchips()
            for chip, (image, other) in enumerate(zip(chips, others, strict=True)):
                if image != other:
                    raise self.divergence(f"KVM_GET_IRQCHIP {chip}: {chip_differences(chip, image, other)}")
            self.images = chips
        self._look_at_pit()
        for number, one in self.irqfds.items():
            self.same(f"irqfd {number}: resampled", self.model_irqfds[number].resampled, one.resampled)

    def _look_at_pit(self) -> None:
        states = [pit_of(side) for side in (self.model, self.real)]
        if states[0] != states[1]:
            self.same("KVM_GET_PIT2", *(state.hex(" ") if state else None for state in states))
        self.pit = states[0] or b""

    def look_beside_the_page(self, i: int, model: Any, real: Any) -> None:
        super().look_beside_the_page(i, model, real)
        self.same(f"vCPU {i} mp_state", model.get_mp_state(), real.get_mp_state())


def pit_of(machine: Any) -> bytes | None:
    """KVM_GET_PIT2 without what depends on the time; None where there is no PIT."""
    try:
        state = bytearray(machine.get_pit())
    except ValueError:
        return None
    for n in range(3):
        at = n * D.PIT_CHANNEL_BYTES
        state[at + 4 : at + 6] = bytes(2)
        state[at + STATUS_AT] &= ~OUTPUT & 0xFF
        state[at + 16 : at + 24] = bytes(8)
    return bytes(state)


def chip_differences(chip: int, expected: bytes, got: bytes) -> str:
    """Where two images differ, in words."""
    if chip != D.IOAPIC:
        names = [f"{name} expected {e:#x}, got {g:#x}" for name, e, g in zip(PIC_WORDS, expected, got) if e != g]  # noqa: B905
        return ", ".join(names)
    layout = struct.Struct("<QIIII24Q")
    words = zip(layout.unpack_from(expected), layout.unpack_from(got), strict=True)
    names = [*IOAPIC_WORDS, *(f"entry {pin}" for pin in range(D.PINS))]
    return ", ".join(f"{name} expected {e:#x}, got {g:#x}" for name, (e, g) in zip(names, words, strict=True) if e != g)


PIC_WORDS = (
    *("last_irr", "irr", "imr", "isr", "priority_add", "irq_base", "read_reg_select", "poll", "special_mask"),
    *("init_state", "auto_eoi", "rotate_on_auto_eoi", "special_fully_nested_mode", "init4", "elcr", "elcr_mask"),
)
