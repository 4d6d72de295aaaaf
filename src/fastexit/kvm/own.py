"""Twins of the model and somebody's own local APICs: what a guest, a VMM and the CPU do to one, and what it has then.

Models: nothing. What the other side does not know is not drawn, and counted. Registers are compared as the manual has
them: what KVM alone keeps in the page (a PPR of before, the ICR in one piece) is not; what is read is.
"""

from __future__ import annotations

import random
import re
import struct
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

from fastexit import regs as r
from fastexit.events import Nmi, Sipi, Smi
from fastexit.kvm import wellformed
from fastexit.kvm.apics import ApicFailed, face
from fastexit.kvm.host import Host
from fastexit.kvm.judge import Judge
from fastexit.kvm.operations import Op, apply, describe
from fastexit.kvm.twins import BOOTED_NS, Divergence, Setup, Twins, plain, random_ids
from fastexit.kvm.values import (
    BITMAPS,
    LVTS,
    apic_base,
    chance,
    destination,
    differences,
    icr_low,
    msi_address,
    register_name,
    register_value,
    vector,
    xapic_destination,
)
from fastexit.machine import Machine
from fastexit.vcpu import Vcpu

BOTH = r.APICBASE_EN | r.APICBASE_EXTD
QUIRKS = r.QUIRK_LINT0_REENABLED | r.QUIRK_LAPIC_MMIO_HOLE
"""KVM's deviations from a real APIC that can be switched off, and are."""
IN_XAPIC = (r.APIC_DFR, r.APIC_ICR2)
"""Registers that are looked at in xAPIC mode alone."""
COMPARED = (
    *(r.APIC_ID, r.APIC_LVR, r.APIC_TASKPRI, r.APIC_LDR, r.APIC_SPIV, *BITMAPS, r.APIC_ESR, r.APIC_ICR),
    *(*LVTS, r.APIC_TMICT, r.APIC_TDCR, *IN_XAPIC),
)
READ = (*COMPARED, r.APIC_PROCPRI)
WRITTEN = (r.APIC_TASKPRI, r.APIC_SPIV, r.APIC_ESR, *LVTS, r.APIC_TDCR)
WRITTEN_IN_XAPIC = (*WRITTEN, r.APIC_LDR, r.APIC_DFR)
GROUPS = {"ipis": 30, "registers": 28, "interrupts": 20, "messages": 8, "timer": 5, "states": 5, "modes": 4}
"""Groups of operations, and how often each is drawn."""


def short_name(offset: int) -> str:
    """A register's name as --ignore has it: LVR, SPIV, IRR."""
    return register_name(offset).removeprefix("APIC_").partition("[")[0]


IGNORABLE = tuple(dict.fromkeys(map(short_name, READ)))
"""Names of registers that need not be compared."""
TICKS = ("set_time", "wrmsr", "set_msr", "mmio_write")
"""Behind what a tick of a timer may become an interrupt."""
BY_ITSELF = ("wrmsr", "rdmsr", "mmio_write", "mmio_read", "set_msr", "get_msr", "pending", "ack")
"""What a vCPU that waits for SIPI does not do."""
XAPIC_IDS = 0xFF
TRIES = 200


class OwnTwins(Twins):
    """IPIs, register accesses, messages, interrupts taken and ended, the timer, pages set, changes of mode.

    ``names`` counts what was compared by operation, ``left_out`` what was drawn and is not known to the other side.
    """

    kind = "apic"
    needs: ClassVar[frozenset[str]] = frozenset()
    traceable = False
    last_questions: ClassVar[tuple[Op, ...]] = ()
    planned: list[Op]
    pages: int
    about = "IPIs, registers, messages, interrupts taken and ended, the timer, pages, modes"

    def __init__(self, setup: Setup, witness: Any = None, judge: Judge | None = None) -> None:
        super().__init__(setup, witness, judge)
        self.known: frozenset[str] = face(self.real)
        self.ignored: frozenset[int] = frozenset(offset for offset in READ if short_name(offset) in self.judge.ignored)
        self.masks: dict[bool, int] = {mode: self._mask(mode) for mode in (False, True)}
        """By mode, which bits of a page are compared."""
        self.time: int = BOOTED_NS
        self.waiting: set[int] = set()
        """vCPUs that wait for SIPI."""
        if "set_time" in self.known:
            self.real.set_time(self.time)
        for vcpu in (*self.model.vcpus, *(self.real.vcpus if "set_mp_state" in self.known else ())):
            vcpu.set_mp_state(r.MP_RUNNABLE)

    def _mask(self, x2apic: bool) -> int:
        offsets = [o for o in COMPARED if o not in self.ignored and not (x2apic and o in IN_XAPIC)]
        return sum(0xFFFF_FFFF << 8 * offset for offset in offsets)

    @classmethod
    def draw(cls, rng: random.Random, host: Host, ids: tuple[int, ...] | None) -> Setup:
        """Two to five vCPUs, or these ids."""
        return cls.usual(ids or random_ids(rng, 2, 5, host.max_vcpu_id if chance(rng, 0.5) else XAPIC_IDS))

    @classmethod
    def usual(cls, ids: tuple[int, ...]) -> Setup:
        """User space's IOAPIC, 32-bit ids, and no quirk."""
        return Setup(apic_ids=ids, irqchip="split", x2apic_api=3, disable_quirks=QUIRKS)

    def make_model(self) -> Machine:
        keywords = self.host.keywords() | self.setup.keywords()
        return Machine(**keywords | {"apic_ids": list(self.setup.apic_ids), "threads": False})

    # ------------------------------------------------------------------------------------------------- what is drawn

    def beginning(self, rng: random.Random) -> Iterator[Op]:
        """All vCPUs into one mode, enabled, with a logical id each."""
        self.look()
        small = max(self.setup.apic_ids) < XAPIC_IDS
        can = {"x2apic": self._writes(x2apic=True) is not None, "flat": "mmio_write" in self.known and small}
        style = rng.choice([style for style, possible in can.items() if possible] or ["as it is"])
        cluster = style == "flat" and chance(rng, 0.4)
        for i, vcpu in enumerate(self.vcpus):
            if style == "x2apic":
                yield self._base(i, vcpu.apic_base | BOTH)
            elif style == "flat":
                yield ("mmio_write", i, r.APIC_DFR, r.DFR_CLUSTER if cluster else r.DFR_FLAT, 4)
                logical = (i // 4) << 4 | 1 << i % 4 if cluster else 1 << i % 8
                yield ("mmio_write", i, r.APIC_LDR, logical << r.XAPIC_DEST_SHIFT, 4)
            if style != "as it is":
                yield self._write(i, r.APIC_SPIV, 0x1FF)

    def draw_op(self, rng: random.Random) -> Op:
        """The next operation that the other side knows; those that it does not know are counted."""
        for _ in range(TRIES):
            if not self.planned:
                group = rng.choices(list(GROUPS), list(GROUPS.values()))[0]
                if self.judge.groups and group not in self.judge.groups:
                    continue
                self.planned = getattr(self, f"_{group}")(rng, rng.randrange(len(self.vcpus)))
            if all(op[0] in self.known for op in self.planned):
                if self.planned:
                    return self.planned.pop(0)
                continue
            self.left_out.update(sorted({op[0] for op in self.planned} - self.known))
            self.planned = []
        raise ApicFailed(f"{self.judge.name} knows nothing of what is to be compared: {', '.join(sorted(self.known))}")

    def _writes(self, *, x2apic: bool) -> str | None:
        """How a register is written in a mode, or None."""
        ways = ("wrmsr", "set_msr") if x2apic else ("mmio_write",)
        return next((way for way in ways if way in self.known), None)

    def _write(self, i: int, offset: int, value: int) -> Op:
        if self.vcpus[i].x2apic:
            return (self._writes(x2apic=True) or "wrmsr", i, r.MSR_X2APIC_BASE + (offset >> 4), value)
        return ("mmio_write", i, offset, value, 4)

    def _base(self, i: int, value: int) -> Op:
        return (self._writes(x2apic=True) or "wrmsr", i, r.MSR_APICBASE, value)

    def _ipis(self, rng: random.Random, i: int) -> list[Op]:
        x2apic = self.vcpus[i].x2apic
        if chance(rng, 0.12) and len(self.vcpus) > 1:
            return self._start(rng, i)
        if x2apic and chance(rng, 0.1):
            return [self._write(i, r.APIC_SELF_IPI, self._fit(r.APIC_SELF_IPI, self._value(rng, r.APIC_SELF_IPI)))]
        low = self._icr_low(rng)
        dest = destination(rng, self) & 0xFFFF_FFFF if x2apic else xapic_destination(rng, self)
        return [*self._send(i, dest, low), *self._taken(low)]

    def _send(self, i: int, dest: int, low: int) -> list[Op]:
        """An IPI."""
        if self.vcpus[i].x2apic:
            return [self._write(i, r.APIC_ICR, dest << r.ICR_DEST_SHIFT | low)]
        high = (dest & 0xFF) << r.XAPIC_DEST_SHIFT
        return [("mmio_write", i, r.APIC_ICR2, high, 4), ("mmio_write", i, r.APIC_ICR, low, 4)]

    def _taken(self, low: int) -> list[Op]:
        """What everybody's CPU takes behind an NMI or an SMI, where that is told: nothing of it stays behind."""
        if low >> r.ICR_DM_SHIFT & 7 not in (r.DM_NMI, r.DM_SMI) or "take" not in self.known:
            return []
        return [("take", n) for n in range(len(self.vcpus))] * 2

    def _start(self, rng: random.Random, i: int) -> list[Op]:
        """INIT and SIPI for another vCPU, which takes each at once; then its APIC is enabled again."""
        other = rng.choice([n for n in range(len(self.vcpus)) if n != i])
        dest = self.vcpus[other].id if self.vcpus[i].x2apic else self.vcpus[other].xapic_id
        init, startup = (mode << r.ICR_DM_SHIFT | r.ICR_LEVEL for mode in (r.DM_INIT, r.DM_STARTUP))
        take = ("take", other)
        ops = [*self._send(i, dest, init), take, *self._send(i, dest, startup | rng.randrange(256)), take, take]
        if chance(rng, 0.3):
            ops = ops[len(self._send(i, dest, init)) + 1 :]  # a SIPI that nobody waits for
        return [*ops, self._write(other, r.APIC_SPIV, 0x1FF)]

    def _icr_low(self, rng: random.Random) -> int:
        """The low half of an ICR; no INIT and no SIPI: nobody may be left waiting."""
        low = icr_low(rng) if not self.judge.well_formed else wellformed.icr_low(rng)
        mode = low >> r.ICR_DM_SHIFT & 7
        if mode in (r.DM_INIT, r.DM_STARTUP) or (mode == r.DM_LOWEST and "lowest" not in self.known):
            low &= ~(7 << r.ICR_DM_SHIFT)
        return low

    def _registers(self, rng: random.Random, i: int) -> list[Op]:
        vcpu = self.vcpus[i]
        if chance(rng, 0.4):
            return self._reads(rng, i)
        offset = rng.choice(WRITTEN if vcpu.x2apic else WRITTEN_IN_XAPIC)
        value = self._value(rng, offset)
        if vcpu.x2apic and not self.judge.well_formed:
            if chance(rng, 0.03):
                value |= rng.getrandbits(32) << 32
            if chance(rng, 0.04):  # read-only, reserved, or nobody's
                offset = rng.randrange(0x100) << 4
                if offset in (r.APIC_ICR, r.APIC_TMICT):
                    return []
        return [self._write(i, offset, self._fit(offset, value))]

    def _reads(self, rng: random.Random, i: int) -> list[Op]:
        vcpu = self.vcpus[i]
        offset = rng.choice([o for o in READ if o not in self.ignored and not (vcpu.x2apic and o in IN_XAPIC)])
        if vcpu.x2apic and chance(rng, 0.1) and not self.judge.well_formed:
            offset = rng.choice((r.APIC_EOI, r.APIC_SELF_IPI, r.APIC_DFR, r.APIC_ICR2, 0x440, 0x2F0, 0))
        if vcpu.x2apic:
            way = "rdmsr" if "rdmsr" in self.known or "get_msr" not in self.known else "get_msr"
            return [(way, i, r.MSR_X2APIC_BASE + (offset >> 4))]
        return [("mmio_read", i, offset, 4)]

    def _value(self, rng: random.Random, offset: int) -> int:
        """A value for a register; in xAPIC mode LDR and DFR stay what the others have, mostly."""
        if offset == r.APIC_DFR and (self.judge.well_formed or chance(rng, 0.9)):
            return rng.choice(self.vcpus).reg(r.APIC_DFR)
        return register_value(rng, offset)

    def _fit(self, offset: int, value: int) -> int:
        return wellformed.register(offset, value) if self.judge.well_formed else value

    def _messages(self, rng: random.Random, i: int) -> list[Op]:
        low = self._icr_low(rng) & (0x7FF | r.ICR_TRIGGER | r.ICR_LEVEL)
        return [("signal_msi", self._message_address(rng), low), *self._taken(low)]

    def _message_address(self, rng: random.Random) -> int:
        if not self.judge.well_formed:
            # the redirection hint arbitrates as lowest priority does; bits 39:32 are nobody's, and KVM's ioctl fails
            return msi_address(rng, self) & ~(8 | 0xFF << 32)
        target = rng.choice(self.vcpus)
        return 0xFEE0_0000 | (target.id & 0xFF) << 12 | (target.id & ~0xFF) << 32

    def _interrupts(self, rng: random.Random, i: int) -> list[Op]:
        """What the CPU does; an EOI where something is in service, now and then where nothing is."""
        serving = any(self.vcpus[i].reg(r.APIC_ISR + 0x10 * word) for word in range(8))
        kind = rng.random()
        if kind < 0.35 or (kind < 0.4 and not serving):
            return [("ack", i)]
        if kind < 0.65 and (serving or chance(rng, 0.1)):
            nonzero = not self.judge.well_formed and chance(rng, 0.05)
            return [self._write(i, r.APIC_EOI, vector(rng) if nonzero else 0)]
        return [("pending", i)]

    def _timer(self, rng: random.Random, i: int) -> list[Op]:
        if chance(rng, 0.5):
            stopped = [self._write(n, r.APIC_TMICT, 0) for n in self._held_back()] if self.judge.well_formed else []
            return [*stopped, ("set_time", self.time + rng.randrange(1, 1 << rng.randrange(1, 20)))]
        if "set_time" not in self.known:
            return [("set_time", self.time)]
        if chance(rng, 0.3):
            return [op for op in self._reads_count(i) if op]
        return [self._write(i, r.APIC_TMICT, rng.choice((0, rng.randrange(1, 1 << 18))))]

    def _held_back(self) -> list[int]:
        """Who has a count that may end while nobody is told, of which KVM and the manual think differently."""
        return [
            n
            for n, v in enumerate(self.vcpus)
            if v.reg(r.APIC_TMICT) and (v.reg(r.APIC_LVTT) & r.LVT_MASKED or not v.reg(r.APIC_SPIV) & r.SVR_ENABLE)
        ]

    def _reads_count(self, i: int) -> list[Op]:
        if self.vcpus[i].x2apic:
            way = "rdmsr" if "rdmsr" in self.known or "get_msr" not in self.known else "get_msr"
            return [(way, i, r.MSR_X2APIC_BASE + (r.APIC_TMCCT >> 4))]
        return [("mmio_read", i, r.APIC_TMCCT, 4)]

    def _states(self, rng: random.Random, i: int) -> list[Op]:
        """The page as it is with other priorities and vectors, as a VMM restores it."""
        page = bytearray(self.vcpus[i].page)
        for base in (r.APIC_IRR, r.APIC_ISR, r.APIC_TMR):
            for word in range(8):
                bits = 1 << rng.randrange(32) if chance(rng, 0.15) else 0
                struct.pack_into("<I", page, base + 0x10 * word, bits & (0xFFFF_0000 if word == 0 else 0xFFFF_FFFF))
        for offset in (r.APIC_TASKPRI, *LVTS):
            if chance(rng, 0.3):
                struct.pack_into("<I", page, offset, wellformed.register(offset, register_value(rng, offset)))
        for offset in (r.APIC_TMICT, r.APIC_TMCCT, r.APIC_PROCPRI):
            struct.pack_into("<I", page, offset, 0)
        if self.vcpus[i].x2apic:
            struct.pack_into("<QQ", page, r.APIC_ICR, 0, 0)
            struct.pack_into("<Q", page, r.APIC_ICR2, 0)
        return [("set_lapic", i, bytes(page))]

    def _modes(self, rng: random.Random, i: int) -> list[Op]:
        """APICBASE, allowed or not; most of the time back to where the others are."""
        vcpu = self.vcpus[i]
        others = [v.apic_base & BOTH for n, v in enumerate(self.vcpus) if n != i] or [vcpu.apic_base & BOTH]
        if self.judge.well_formed or chance(rng, 0.5):
            wanted = vcpu.apic_base & ~BOTH | rng.choice(others)
            if wanted & BOTH == r.APICBASE_EN and vcpu.x2apic:
                wanted &= ~r.APICBASE_EN  # by way of off
            return [self._base(i, wanted)]
        value = apic_base(rng, vcpu)
        return [self._base(i, value if value & r.APICBASE_PAGE == vcpu.apic_base & r.APICBASE_PAGE else vcpu.apic_base)]

    # ------------------------------------------------------------------------------------------------- what is done

    def step(self, op: Op) -> None:
        if op[0] not in self.known:
            self.left_out[op[0]] += 1
            return
        if op[0] in BY_ITSELF and op[1] in self.waiting:
            return  # in a replay that left out its SIPI
        super().step(op)
        self.names[op[0]] += 1

    def carry_out(self, op: Op) -> None:
        drained = "take" not in self.known
        expected, got = (carried_out(side, op, drained) for side in (self.model, self.real))
        if op[0] == "set_time":
            self.time = op[1]
        if op[0] == "take" and expected == "init" and self.model.vcpus[op[1]].vcpu_id:
            self.waiting.add(op[1])
        elif op[0] == "take" and str(expected).startswith("sipi"):
            self.waiting.discard(op[1])
        if op[0] == "signal_msi" and (got is None or op[2] & r.ICR_DM):
            return  # who counts is told for Fixed interrupts alone
        self.same_result(op, expected, got)

    def same_result(self, op: Op, expected: Any, got: Any) -> None:
        """As it is: without a clock the count of a timer stands on both sides."""
        if expected != got:
            found = self.divergence(f"{describe(op)}: expected {plain(expected)}, yours says {plain(got)}")
            found.what = frozenset((f"{op[0]} {accessed(op)}",))
            raise found

    # ---------------------------------------------------------------------------------------------- what is compared

    def look(self) -> None:
        """The registers of every vCPU, where the other side shows them."""
        theirs: Callable[[], list[bytes]] | None = getattr(self.real, "pages", None)
        shown = "get_lapic" in self.known
        others = theirs() if theirs and shown else [v.get_lapic() for v in self.real.vcpus] if shown else []
        for i, model in enumerate(self.model.vcpus):
            seen = self.vcpus[i]
            seen.apic_base, seen.page = model.apic_base, model.get_lapic()
            if others:
                mask = self.masks[seen.x2apic]
                page, other = (int.from_bytes(_whole(page), "little") & mask for page in (seen.page, others[i]))
                if page != other:
                    text = differences(*(part.to_bytes(r.LAPIC_PAGE_BYTES, "little") for part in (page, other)))
                    found = self.divergence(f"vCPU {i}: {text}")
                    found.what = frozenset(name for name in IGNORABLE if re.search(rf"\b(APIC_)?{name}\b", text))
                    raise found
        self.pages += len(others)

    def divergence(self, text: str) -> Divergence:
        """The error that carries the story, and what was said to the other side."""
        found = super().divergence(text)
        found.transcript = list(getattr(self.real, "transcript", ()))
        return found


def _whole(page: bytes) -> bytes:
    if len(page) != r.LAPIC_PAGE_BYTES:
        raise ValueError(f"get_lapic gave {len(page)} bytes, not {r.LAPIC_PAGE_BYTES}")
    return page


def settle(vcpu: Vcpu, drained: bool) -> None:
    """What KVM does between two instructions: a tick that waits becomes an interrupt; NMIs and SMIs go in.

    ``drained``: nobody asks for them.
    """
    vcpu.settle()
    while drained and taken(vcpu) != "none":
        pass


def taken(vcpu: Any) -> str:
    """What a CPU takes next that is no interrupt of its APIC: none, nmi, smi, init, sipi and the vector.

    A Machine's comes out of SMM and of the NMI's handler at once.
    """
    if isinstance(vcpu, Vcpu):
        vcpu.settle()
    event = vcpu.take()
    if isinstance(event, Smi) and isinstance(vcpu, Vcpu):
        vcpu.rsm()
    elif isinstance(event, Nmi) and isinstance(vcpu, Vcpu):
        vcpu.nmi_masked = False
    if isinstance(event, Sipi):
        return f"sipi {event.vector:#x}"
    return "none" if event is None else event if isinstance(event, str) else type(event).__name__.lower()


def accessed(op: Op) -> str:
    """The register that an operation is about, or nothing."""
    name, *arguments = op
    if name in ("mmio_write", "mmio_read"):
        return register_name(arguments[1])
    if name in ("wrmsr", "rdmsr", "set_msr", "get_msr"):
        at = arguments[1] - r.MSR_X2APIC_BASE
        return register_name(at << 4) if 0 <= at < r.MSR_X2APIC_END - r.MSR_X2APIC_BASE else f"{arguments[1]:#x}"
    return ""


def carried_out(machine: Any, op: Op, drained: bool) -> Any:
    """What an operation came to, as far as both sides say the same: "#GP", a value, or None."""
    result = taken(machine.vcpus[op[1]]) if op[0] == "take" else apply(machine, op)
    if isinstance(machine, Machine) and op[0] in TICKS:
        for vcpu in machine.vcpus if op[0] == "set_time" else (machine.vcpus[op[1]],):
            settle(vcpu, drained)
    if op[0] in ("wrmsr", "mmio_write", "set_lapic", "set_time"):
        return result if result in ("#GP", "EINVAL") else None
    if op[0] == "set_msr":
        return "#GP" if result is False or result == "#GP" else None
    if op[0] == "get_msr" and result is None:
        return "#GP"
    if op[0] == "signal_msi" and isinstance(result, int):
        return max(result, 0)
    return result
