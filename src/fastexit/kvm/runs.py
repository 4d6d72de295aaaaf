"""Twins whose guests run with interrupts on: what they take, what ends a halt, what is left to user space.

Models: nothing. A trial sets a whole state and lets a guest run; each of its steps is an operation of its own.
"""

from __future__ import annotations

import random
import struct
from collections import Counter
from collections.abc import Iterator
from typing import Any, ClassVar

from fastexit import regs as r
from fastexit.kvm.host import Host
from fastexit.kvm.judge import Judge
from fastexit.kvm.operations import Op, apply, describe
from fastexit.kvm.programs import Program
from fastexit.kvm.twins import Setup, Twins
from fastexit.kvm.values import FAR_DEADLINE, chance
from fastexit.reasons import KvmExit

PROGRAMS = ("take", "halt", "run_through", "wrmsr", "rdmsr", "complete_msr")
TICK_SECONDS = 1e-4
"""How long a timer that has run out may take until it is a tick."""
LATELY = 12
"""Operations behind which a late tick no longer counts as an excuse."""
NOBODYS_MSR = 0x1_0002
FILTERED = (0x1B, 0x6DC, 0x6E0, 0x800, 0x830, NOBODYS_MSR & ~7)
"""First MSRs of filter ranges, which have 8 each."""
READ_OR_WRITTEN = (r.MSR_TSC_DEADLINE, r.MSR_APICBASE, r.MSR_X2APIC_ICR, 0x808, 0x805)
WRITTEN = (0, 1, FAR_DEADLINE, 0xFEE0_0D00, 0xFEE0_0900, 0x41, 0x2000)
LVTT_MSR, TMICT_MSR, SPIV_MSR = (r.MSR_X2APIC_BASE + (o >> 4) for o in (r.APIC_LVTT, r.APIC_TMICT, r.APIC_SPIV))
BOTH = r.APICBASE_EN | r.APICBASE_EXTD


class RunTwins(Twins):
    """Interrupts taken, KVM_INTERRUPT through LINT0, HLT, MSR filters and MSRs of user space, EOIs of its IOAPIC.

    ("take", i) is a guest with interrupts on, ("halt", i, interrupts) one that halts. ("msr_filter", deny, ranges,
    reasons) sets filter and KVM_CAP_X86_USER_SPACE_MSR, a range being flags, first MSR, how many, and their bits.
    ("route", vectors) is user space's IOAPIC on a split irqchip. Where the host ends an interrupt when it injects it,
    the model does, too. ``ends`` counts what operations came to.
    """

    kind = "runs"
    needs: ClassVar[frozenset[str]] = Twins.needs | {
        "wrmsr",
        "rdmsr",
        "take",
        "halt",
        "run_through",
        "complete_msr",
        "is_flat",
        "ready",
        "interrupt",
        "route",
        "set_msr_filter",
        "wait",
    }
    states = True
    traceable = False
    last_questions: ClassVar[tuple[Op, ...]] = Twins.last_questions[:-1]  # the code segment is the programs'
    operations_each = 100
    planned: list[Op]
    about = "interrupts that guests take, KVM_INTERRUPT, HLT, MSR filters and MSRs of user space, KVM_EXIT_IOAPIC_EOI"

    def __init__(self, setup: Setup, witness: Any = None, judge: Judge | None = None) -> None:
        super().__init__(setup, witness, judge)
        self.ends: Counter[str] = Counter()
        self.split: bool = setup.irqchip == "split"
        self.routed: int = setup.apic_ids.index(0) if self.split else 0
        self.model.fastpath = self.host.fastpath

    @classmethod
    def draw(cls, rng: random.Random, host: Host, ids: tuple[int, ...] | None) -> Setup:
        """Two vCPUs (or these), any irqchip, on a split one any of the flags about EOIs.

        Routes of user space's IOAPIC go to id 0: without it there is no split irqchip.
        """
        ids = ids or (0, 1)
        irqchip = rng.choice(("full", "split", "split")) if 0 in ids else "full"
        api = rng.choice((0, 0, *[r.X2API_SUPPRESS_EOI] * 3, r.X2API_NO_SUPPRESS_EOI)) & host.api_split
        return Setup(apic_ids=ids, irqchip=irqchip, x2apic_api=api if irqchip == "split" else 0)

    def beginning(self, rng: random.Random) -> Iterator[Op]:
        for i in range(len(self.vcpus)):
            yield ("ready", i)
        yield ("boot_x2apic",)

    # ------------------------------------------------------------------------------------------------- what is drawn

    def draw_op(self, rng: random.Random) -> Op:
        if not self.planned:
            i = self.routed if self.split else rng.randrange(len(self.vcpus))
            trials = [self._take, self._halt, self._halt, self._msrs, self._msrs]
            if self.split:
                trials += [self._pic, self._pic, self._eoi, self._eoi, self._eoi]
            self.planned = list(rng.choice(trials)(rng, i))
        op = self.planned.pop(0)
        if op[0] in ("wrmsr", "rdmsr") and self.real.vcpus[op[1]].user_msr is not None:
            self.planned.insert(0, op)
            return ("complete_msr", op[1], chance(rng, 0.5), rng.getrandbits(64))
        return op

    def _take(self, rng: random.Random, i: int) -> Iterator[Op]:
        kept = self.vcpus[i].apic_base & ~BOTH
        yield ("set_msr", i, r.MSR_APICBASE, kept | rng.choice((0, r.APICBASE_EN, r.APICBASE_EN, BOTH, BOTH)))
        tpr = rng.choice((0, 0, rng.randrange(256)))
        yield ("set_lapic", i, self._page(rng, i, 0.4, TASKPRI=tpr, SPIV=rng.choice((0xFF, 0x1FF, 0x1FF))))
        for _ in range(rng.randrange(1, 4)):
            yield ("take", i)

    def _pic(self, rng: random.Random, i: int) -> Iterator[Op]:
        yield self._x2apic(i)
        lint0 = rng.choice((0x700, 0x700, 0x10700, 0x400, 0, 0x10000, 0x720))
        yield ("set_lapic", i, self._page(rng, i, 0.12, LVT0=lint0, SPIV=0x1FF))
        for _ in range(rng.randrange(3)):
            yield ("interrupt", i, rng.randrange(16, 256))
        yield ("halt", i, chance(rng, 0.8)) if chance(rng, 0.1) else ("take", i)

    def _halt(self, rng: random.Random, i: int) -> Iterator[Op]:
        yield self._x2apic(i)
        lvtt = rng.choice((0x41, 0x41, r.LVT_MASKED | 0x41, 0xF0))
        tpr = rng.choice((0, 0, 0x50))
        yield ("set_lapic", i, self._page(rng, i, 0.1, LVTT=lvtt, TMICT=0, TMCCT=0, TASKPRI=tpr, SPIV=0x1FF))
        if chance(rng, 0.6):
            yield ("set_msr", i, TMICT_MSR, 1)
        if chance(rng, 0.15):
            unhalt = r.DM_REMRD << r.ICR_DM_SHIFT | r.ICR_LEVEL
            yield ("set_msr", i, r.MSR_X2APIC_ICR, self.vcpus[i].id << r.ICR_DEST_SHIFT | unhalt)
        yield ("halt", i, chance(rng, 0.85))

    def _msrs(self, rng: random.Random, i: int) -> Iterator[Op]:
        yield self._x2apic(i)
        yield ("set_msr", i, SPIV_MSR, 0x1FF)
        yield ("set_msr", i, LVTT_MSR, r.LVT_TIMER_DEADLINE | r.LVT_MASKED | 0x41)
        if chance(rng, 0.4):
            ranges = tuple(
                (rng.randrange(1, 4), first, 8, rng.getrandbits(8))
                for first in rng.sample(FILTERED, rng.randrange(0, 4))
            )
            reasons = rng.choice((0, r.MSR_EXIT_FILTER, r.MSR_EXIT_INVAL, r.MSR_EXIT_UNKNOWN, 7, 7))
            yield ("msr_filter", chance(rng, 0.3), ranges, reasons)
        known = READ_OR_WRITTEN if self.host.ignore_msrs else (*READ_OR_WRITTEN, NOBODYS_MSR)
        for _ in range(rng.randrange(2, 8)):
            msr = rng.choice(known)
            yield ("wrmsr", i, msr, rng.choice(WRITTEN)) if chance(rng, 0.7) else ("rdmsr", i, msr)

    def _eoi(self, rng: random.Random, i: int) -> Iterator[Op]:
        yield self._x2apic(i)
        vectors = rng.sample(range(16, 256), 12)
        yield ("route", tuple(vectors))
        for _ in range(rng.randrange(1, 5)):
            one = rng.choice(vectors) if chance(rng, 0.7) else rng.randrange(16, 256)
            empty = bytearray(self._page(rng, i, 0, SPIV=rng.choice((0x1FF, 0x11FF))))
            for base in (r.APIC_ISR, *[r.APIC_TMR] * chance(rng, 0.8)):
                struct.pack_into("<I", empty, base + one // 32 * 0x10, 1 << one % 32)
            yield ("set_lapic", i, bytes(empty))
            yield ("wrmsr" if chance(rng, 0.5) else "set_msr", i, r.MSR_X2APIC_EOI, 0)
            yield ("take", i) if chance(rng, 0.2) else ("run_through", i)

    def _x2apic(self, i: int) -> Op:
        return ("set_msr", i, r.MSR_APICBASE, self.vcpus[i].apic_base | BOTH)

    def _page(self, rng: random.Random, i: int, pending: float, **registers: int) -> bytes:
        """The vCPU's page with some vectors pending, fewer in service, some called level."""
        page = bytearray(self.vcpus[i].page)
        for base, likely in ((r.APIC_IRR, pending), (r.APIC_ISR, pending / 3), (r.APIC_TMR, pending / 3)):
            for word in range(8):
                bits = 1 << rng.randrange(32) if chance(rng, likely) else 0
                struct.pack_into("<I", page, base + 0x10 * word, bits)
        for name, value in registers.items():
            struct.pack_into("<I", page, getattr(r, f"APIC_{name}"), value)
        return bytes(page)

    def may_be_late(self) -> bool:
        """Only where a clock has been set, or a halt has waited, a short while ago."""
        return any(op[0] == "halt" or op[:3:2] == ("set_msr", TMICT_MSR) for op in self.history[-LATELY:])

    # ------------------------------------------------------------------------------------------------- what is done

    def step(self, op: Op) -> None:
        """One operation on both sides, then a look. A program that comes while an MSR access waits answers it first."""
        name = op[0]
        if name in PROGRAMS and not self.real.vcpus[op[1]].is_flat():
            return  # in a replay that left out what made it able
        self.history.append(op)
        self.model.set_time(self.model.time + 1000)
        if name in PROGRAMS:
            self._program(op)
        elif name == "route":
            self._route(op[1])
        elif name == "msr_filter":
            self.same(describe(op), *(set_filter(side, *op[1:]) for side in (self.model, self.real)))
        else:
            if name == "ready":
                self._answer(op[1])
            expected, got = apply(self.model, op), apply(self.real, op)
            self.same_result(op, expected, got)
            if name == "set_msr" and op[2] == TMICT_MSR:
                self.real.wait(TICK_SECONDS)
            if name == "interrupt":
                self.ends[f"interrupt {'refused' if got else 'accepted'}"] += 1
        self.look()

    def _program(self, op: Op) -> None:
        """A guest runs on both sides; what it came to, and what user space was asked on the way.

        Where KVM emulates one instruction after the other, the EOI that a WRMSR makes is told at the next KVM_RUN.
        """
        name, i = op[:2]
        if name != "complete_msr":
            self._answer(i)
        (expected, eois), (got, others) = self._model_run(op), real_run(self.real, op)
        if op[:3:2] == ("wrmsr", r.MSR_X2APIC_EOI):
            eois += self._model_run(("run_through", i))[1]
            others += real_run(self.real, ("run_through", i))[1]
        self.same(describe(op), expected, got)
        self.same(f"IOAPIC EOIs of {describe(op)}", eois, others)
        self.same(f"user space's MSR of {describe(op)}", *(asked(side.vcpus[i]) for side in (self.model, self.real)))
        self.ends[f"{name} {end_of(name, got)}"] += 1
        self.ends["IOAPIC EOI"] += len(eois)

    def _model_run(self, op: Op) -> tuple[Any, list[int]]:
        name, i, *arguments = op
        interrupts = name == "take" or (name == "halt" and arguments.pop())
        host = self.host
        program = Program(self.model.vcpus[i], interrupts=interrupts, eoi_at_injection=host.eoi_at_injection)
        try:
            return getattr(program, name)(*arguments), program.ioapic_eois
        except ValueError:
            return "EINVAL", program.ioapic_eois

    def _answer(self, i: int) -> None:
        if self.real.vcpus[i].user_msr is not None:
            self._program(("complete_msr", i, False, 0))

    def _route(self, vectors: tuple[int, ...]) -> None:
        """New routes reach a vCPU at KVM_RUN, behind an EOI that waits for the old ones."""
        self._program(("run_through", self.routed))
        self.real.route(vectors)
        self.model.vcpus[self.routed].ioapic_handled = vectors
        self._program(("run_through", self.routed))

    def look_beside_the_page(self, i: int, model: Any, real: Any) -> None:
        super().look_beside_the_page(i, model, real)
        self.same(f"vCPU {i} mp_state", model.get_mp_state(), real.get_mp_state())


def real_run(machine: Any, op: Op) -> tuple[Any, list[int]]:
    """What a program came to, in the words of `Program`, and the EOIs for user space's IOAPIC."""
    name, i, *arguments = op
    vcpu = machine.vcpus[i]
    got: Any
    vcpu.ioapic_eois.clear()
    if name == "halt":
        got = vcpu.halt(interrupts=arguments[0])
    elif name == "complete_msr":
        reads = vcpu.exit_reason == KvmExit.X86_RDMSR
        got = apply(machine, op)
        if got is None and reads:
            got = vcpu.read_data
    else:
        got = apply(machine, op)
        if vcpu.user_msr is not None:
            got = vcpu.exit_reason
    return got, list(vcpu.ioapic_eois)


def asked(vcpu: Any) -> tuple[Any, ...] | None:
    """The MSR access that waits for user space; the data of a read is not there yet."""
    if vcpu.user_msr is None:
        return None
    index, data, reason = vcpu.user_msr
    return vcpu.exit_reason, index, reason, data if vcpu.exit_reason == KvmExit.X86_WRMSR else None


def set_filter(machine: Any, deny: bool, ranges: tuple[tuple[int, int, int, int], ...], reasons: int) -> str | None:
    """KVM_X86_SET_MSR_FILTER and KVM_CAP_X86_USER_SPACE_MSR."""
    machine.user_space_msr = reasons
    rows = [(flags, first, [bits >> n & 1 for n in range(count)]) for flags, first, count, bits in ranges]
    try:
        machine.set_msr_filter(deny, rows)
    except ValueError:
        return "EINVAL"
    return None


def end_of(name: str, got: Any) -> str:
    """What a program came to, in one word or two."""
    if isinstance(got, KvmExit):
        return "user space"
    if isinstance(got, str):
        return got
    if name in ("take", "halt"):
        return "nothing" if got is None else "taken"
    return "done"
