"""The model and a real VM, side by side: each operation on both, then everything that can be seen is compared.

Models: nothing. What a kind of twins draws, applies and compares is its class: host calls here (`Twins`), instructions
of guests (`GuestTwins`), a thousand vCPUs (`ManyTwins`); clocks are in timers.py, sleep and interrupts in runs.py.
"""

from __future__ import annotations

import random
import struct
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from itertools import zip_longest
from types import TracebackType
from typing import Any, ClassVar, Self

from fastexit import regs as r
from fastexit.kvm import operations as ops
from fastexit.kvm.guest import MEMORY_BYTES
from fastexit.kvm.host import Host
from fastexit.kvm.operations import Op, apply, describe
from fastexit.kvm.oracle import Oracle
from fastexit.kvm.script import script
from fastexit.kvm.tracefs import KernelTrace, lines_of_interest
from fastexit.kvm.values import ID_POOL, READABLE_IN_XAPIC, chance, differences, masked
from fastexit.machine import Machine

TMCCT_MSR = r.MSR_X2APIC_BASE + (r.APIC_TMCCT >> 4)
COUNT_READ = "kvm_apic: apic_read APIC_TMCCT = "
BOOTED_NS = 1000
"""So that a deadline at TSC 1 has passed."""
PPR_MSR = r.MSR_X2APIC_BASE + (r.APIC_PROCPRI >> 4)


@dataclass(frozen=True)
class Setup:
    """What twins are made from; the names are Machine's and Oracle's keywords."""

    apic_ids: tuple[int, ...]
    irqchip: str = "full"
    x2apic_api: int = 0
    x2apic: bool = True
    tsc_deadline: bool = True
    disable_quirks: int = 0
    boot_cpu_id: int = 0
    bus_cycle_ns: int = 1
    cmci: bool = False

    def keywords(self) -> dict[str, Any]:
        """As Machine and Oracle want them, what is as usual left out."""
        usual = {name: value.default for name, value in self.__dataclass_fields__.items()}
        given = {name: value for name, value in asdict(self).items() if value != usual[name]}
        return given | {"apic_ids": list(self.apic_ids)}


class Divergence(AssertionError):
    """The model is not like the kernel: what differs, and the operations that show it, on twins of some kind."""

    def __init__(self, text: str, kind: str, setup: Setup, history: list[Op], host: Host, traced: bool) -> None:
        super().__init__(text)
        self.is_error = False
        """One side raised what no operation may raise: a story that is not made shorter."""
        self.late = False
        """A host that was late may have made it."""
        self.text = text
        self.kind = kind
        self.setup = setup
        self.history = history
        self.host = host
        self.traced = traced

    def script(self) -> str:
        """A Python script that shows the difference, on both sides."""
        where = self.host.release, self.host.module or "KVM"
        return script(self.text, self.kind, self.setup.keywords(), self.history, *where, traced=self.traced)


@dataclass
class View:
    """A vCPU as it was seen last, for drawing operations that hit it."""

    id: int
    apic_base: int = 0
    page: bytes = field(default=bytes(r.LAPIC_PAGE_BYTES), repr=False)

    @property
    def x2apic(self) -> bool:
        return bool(self.apic_base & r.APICBASE_EXTD)

    @property
    def hw_enabled(self) -> bool:
        return bool(self.apic_base & r.APICBASE_EN)

    @property
    def xapic_id(self) -> int:
        return self.reg(r.APIC_ID) >> r.XAPIC_DEST_SHIFT

    def reg(self, offset: int) -> int:
        return struct.unpack_from("<I", self.page, offset)[0]

    def get_lapic(self) -> bytes:
        return self.page


class Twins:
    """Host calls: MSRs, messages, whole pages, states and events, late vCPUs and flags.

    With a ``witness`` the lines that the kernel's tracepoints print are compared, too. A context manager; ``pages`` and
    ``trace_lines`` count what was compared.
    """

    kind: ClassVar[str] = "msr"
    operations_each: ClassVar[int] = 400
    traceable: ClassVar[bool] = True
    last_questions: ClassVar[tuple[Op, ...]] = (
        ("get_mp_state",),
        ("get_msr", r.MSR_APICBASE),
        ("get_msr", r.MSR_TSC_DEADLINE),
        ("cr8",),
        ("cs",),
    )
    about: ClassVar[str] = "KVM_SET_MSRS, KVM_GET_MSRS, KVM_SIGNAL_MSI, KVM_SET_LAPIC, KVM_SET_SREGS, states, events"

    def __init__(self, setup: Setup, witness: KernelTrace | None = None) -> None:
        self.setup = setup
        self.witness = witness
        self.history: list[Op] = []
        self.planned: list[Op] = []
        self.pages = 0
        self.trace_lines = 0
        self.x2apic = setup.x2apic
        self.real = Oracle(**setup.keywords())
        self.model = Machine(**self.model_keywords())
        self.model.set_time(BOOTED_NS)
        if witness is not None and not self.real.host.fastpath:
            self.model.fastpath = False  # whose lines come in another order
        self.vcpus = [View(vcpu.vcpu_id) for vcpu in self.model.vcpus]

    @classmethod
    def draw(cls, rng: random.Random, host: Host, ids: tuple[int, ...] | None) -> Setup:
        """A machine with 4 to 9 vCPUs, or with these ids, any irqchip, flags and CPUID that the host has."""
        irqchip = rng.choice(("full", "split"))
        known = host.api_split if irqchip == "split" else host.api
        api = rng.randrange(4)
        if chance(rng, 0.3):
            api |= rng.choice((r.X2API_SUPPRESS_EOI, r.X2API_NO_SUPPRESS_EOI)) & known
        ids = ids or random_ids(rng, 4, 9)
        return Setup(
            apic_ids=ids,
            irqchip=irqchip,
            x2apic_api=api & known,
            x2apic=chance(rng, 0.9),
            tsc_deadline=chance(rng, 0.7),
            disable_quirks=rng.choice((0, 0, 0, r.QUIRK_LINT0_REENABLED & host.quirks)),
            boot_cpu_id=rng.choice(ids) if chance(rng, 0.1) else 0,
            cmci=host.cmci and chance(rng, 0.3),
        )

    def model_keywords(self) -> dict[str, Any]:
        """Keywords of the model: the host's and the VM's."""
        return self.real.keywords | {"apic_ids": list(self.setup.apic_ids), "threads": False}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Closes the real VM."""
        self.real.close()

    # ------------------------------------------------------------------------------------------------- what is done

    def beginning(self, rng: random.Random) -> Iterator[Op]:
        """Operations that bring vCPUs into one of the modes each."""
        self.look()
        yield from ops.setup_ops(rng, self)

    def draw_op(self, rng: random.Random) -> Op:
        """The next operation."""
        kind = rng.random()
        if self.planned or kind > 0.985:
            return self.regrouping(rng)
        if kind < 0.005:
            return self.rarity(rng)
        if kind < 0.07:
            return ops.user_op(rng, self)
        return ops.host_op(rng, self)

    def rarity(self, rng: random.Random) -> Op:
        """What changes the VM itself; a new vCPU is greeted before anything puts it into the APIC map."""
        op = ops.rare_op(rng, self.real.host.api_split)
        if op[0] == "add_vcpu":
            self.planned = [ops.greeting(rng, self, op[1])]
        return op

    def regrouping(self, rng: random.Random) -> Op:
        """The next one of operations that give all vCPUs modes that go together: chance takes them apart soon."""
        self.planned = self.planned or ops.setup_ops(rng, self)
        return self.planned.pop(0)

    def step(self, op: Op) -> None:
        """One operation on both sides, then a look; Divergence where they are not the same."""
        self.history.append(op)
        self.carry_out(op)
        if op[0] == "add_vcpu" and len(self.vcpus) < len(self.model.vcpus):
            self.vcpus.append(View(op[1]))
        self.look()

    def carry_out(self, op: Op) -> None:
        """One operation on both sides; what it returned and what it printed is compared."""
        if self.witness is None:
            self.same_result(op, apply(self.model, op), apply(self.real, op))
            return
        trace = self.model.trace
        trace.clear()
        trace.enable()
        expected = apply(self.model, op)
        trace.disable()
        self.witness.clear()
        got = apply(self.real, op)
        self.same_result(op, expected, got)
        self.same_lines(op, lines_of_interest(trace.lines(), self.witness.events), self.witness.read())

    def same_lines(self, op: Op, expected: list[str], got: list[str]) -> None:
        """Compares trace lines one by one; the value of TMCCT depends on the time of day."""
        self.trace_lines += len(got)
        if expected == got:
            return
        for n, (line, other) in enumerate(zip_longest(expected, got, fillvalue="nothing")):
            if line != other and not (line.startswith(COUNT_READ) and other.startswith(COUNT_READ)):
                raise self.divergence(f"{describe(op)}, trace line {n}: expected {line}, KVM prints {other}")

    def same_result(self, op: Op, expected: Any, got: Any) -> None:
        """Compares what an operation returned, as far as it does not depend on the time of day."""
        if op[0] in ("get_msr", "rdmsr") and op[2] == TMCCT_MSR:
            expected, got = (type(result).__name__ for result in (expected, got))
        self.same(describe(op), expected, got)

    # ---------------------------------------------------------------------------------------------- what is compared

    def look(self) -> None:
        """The page and the pending events of every vCPU."""
        for i, (model, real) in enumerate(zip(self.model.vcpus, self.real.vcpus, strict=True)):
            page, other = model.get_lapic(), real.get_lapic()
            if page != other and masked(page) != masked(other):
                raise self.divergence(f"vCPU {i}: {differences(masked(page), masked(other))}")
            seen = self.vcpus[i]
            seen.page, seen.apic_base = page, model.apic_base
            self.look_beside_the_page(i, model, real)
        self.pages += len(self.vcpus)

    def look_beside_the_page(self, i: int, model: Any, real: Any) -> None:
        """What a vCPU has waiting."""
        self.same(f"vCPU {i} events", model.events(), real.events())

    def settle(self) -> None:
        """What asking changes: INIT and SIPI are carried out, the rest of what ioctls show is compared."""
        for i in range(len(self.vcpus)):
            for name, *arguments in self.last_questions:
                op = (name, i, *arguments)
                self.history.append(op)
                self.carry_out(op)
        self.look()

    def same(self, what: str, expected: Any, got: Any) -> None:
        """Divergence when two results differ."""
        if expected != got:
            raise self.divergence(f"{what}: expected {plain(expected)}, KVM says {plain(got)}")

    def divergence(self, text: str) -> Divergence:
        """The error that carries the whole story."""
        found = Divergence(text, self.kind, self.setup, list(self.history), self.real.host, self.witness is not None)
        found.late = self.may_be_late()
        return found

    def may_be_late(self) -> bool:
        """Whether a host that is late may have made them differ: then a difference counts if it shows again."""
        return False

    def failed(self, error: Exception) -> Divergence:
        """What one side raised, as a difference."""
        last = describe(self.history[-1]) if self.history else "the beginning"
        found = self.divergence(f"{last}: {type(error).__name__}: {error}")
        found.is_error = True
        return found


class GuestTwins(Twins):
    """Instructions of guests: loads and stores at the xAPIC page in all sizes, RDMSR and WRMSR, by real code.

    Whether a run refreshes PPR depends on what else happens in it, so both sides read PPR before and after.
    """

    kind = "guest"
    last_questions = Twins.last_questions[:-1]  # the code segment is the programs'
    about = "MOV to and from the xAPIC page in all sizes, WRMSR and RDMSR, carried out by guests in real mode"

    @classmethod
    def draw(cls, rng: random.Random, host: Host, ids: tuple[int, ...] | None) -> Setup:
        """As Twins, also with the quirk off that makes a hole of the page in x2APIC mode."""
        setup = asdict(super().draw(rng, host, ids or random_ids(rng, 4, 6)))
        quirks = rng.choice((0, 0, r.QUIRK_LAPIC_MMIO_HOLE)) & host.quirks
        return Setup(**setup | {"disable_quirks": quirks})

    def beginning(self, rng: random.Random) -> Iterator[Op]:
        for i in range(len(self.vcpus)):
            yield ("ready", i)
        yield from super().beginning(rng)

    def draw_op(self, rng: random.Random) -> Op:
        if self.planned or chance(rng, 0.01):
            return self.regrouping(rng)
        if chance(rng, 0.15):
            return ops.host_op(rng, self, timer=False)
        i = rng.randrange(len(self.vcpus))
        if not self.able(i):
            base = self.vcpus[i].apic_base & ~r.APICBASE_PAGE | r.APIC_DEFAULT_PHYS_BASE
            return rng.choice((("ready", i), ("set_msr", i, r.MSR_APICBASE, base)))
        return ops.guest_op(rng, self, i)

    def able(self, i: int) -> bool:
        """Whether the next instruction of a vCPU would be the one under test."""
        model = self.model.vcpus[i]
        return (
            model.get_mp_state() == r.MP_RUNNABLE
            and not model.events().nmi_pending
            and self.real.vcpus[i].is_flat()
            and MEMORY_BYTES <= model.apic_base & r.APICBASE_PAGE < 1 << 32
        )

    def step(self, op: Op) -> None:
        if op[0] not in ops.GUEST_OPS:
            super().step(op)
            return
        i = op[1]
        if not self.able(i):
            return  # in a replay that left out what made it able
        self.refresh_ppr(i)
        super().step(op)
        self.refresh_ppr(i)

    def same_result(self, op: Op, expected: Any, got: Any) -> None:
        if op[0] == "mmio_read" and self.is_left_alone(*op[1:]):
            return
        super().same_result(op, expected, got)

    def is_left_alone(self, i: int, offset: int, length: int) -> bool:
        """Whether KVM leaves the destination of a load as it was, or the load depends on the time of day."""
        claimed = self.vcpus[i].hw_enabled and not self.vcpus[i].x2apic
        readable = offset & ~15 in READABLE_IN_XAPIC or (self.setup.cmci and offset & ~15 == r.APIC_LVTCMCI)
        return claimed and (not readable or (offset & 15) + length > 4 or offset & ~15 == r.APIC_TMCCT)

    def refresh_ppr(self, i: int) -> None:
        """Reads PPR, which stores it; a disabled APIC offers no way to."""
        if self.vcpus[i].x2apic:
            op: Op = ("get_msr", i, PPR_MSR)
        elif self.vcpus[i].hw_enabled:
            op = ("mmio_read", i, r.APIC_PROCPRI, 4)
        else:
            return
        self.carry_out(op)

    def look_beside_the_page(self, i: int, model: Any, real: Any) -> None:
        super().look_beside_the_page(i, model, real)
        self.same(f"vCPU {i} mp_state", model.get_mp_state(), real.get_mp_state())


class ManyTwins(Twins):
    """A thousand vCPUs with ids up to 4095: broadcasts, all but self, clusters, lowest priority."""

    kind = "many"
    operations_each = 100
    about = (
        "1,000 vCPUs (as many as the host has) with ids up to 4095: all-but-self, broadcast, cluster, lowest priority"
    )

    @classmethod
    def draw(cls, rng: random.Random, host: Host, ids: tuple[int, ...] | None) -> Setup:
        count = min(1000, host.max_vcpus)
        ids = ids or (0, *rng.sample(range(1, min(4096, host.max_vcpu_id) - 1), count - 2), host.max_vcpu_id - 1)
        irqchip = rng.choice(("full", "split"))
        return Setup(apic_ids=ids, irqchip=irqchip, x2apic_api=r.X2API_32BIT_IDS | rng.choice((0, 2)))

    def beginning(self, rng: random.Random) -> Iterator[Op]:
        yield ("boot_x2apic",)

    def draw_op(self, rng: random.Random) -> Op:
        i = rng.randrange(len(self.vcpus))
        vector = rng.randrange(16, 256)
        mode = rng.choices((r.DM_FIXED, r.DM_LOWEST, r.DM_NMI, r.DM_STARTUP), (5, 4, 1, 0.3))[0]
        icr = vector | mode << r.ICR_DM_SHIFT | r.ICR_LEVEL
        target = rng.choice(self.vcpus).id
        form = rng.randrange(6)
        if form == 0:
            icr |= rng.choice((r.SH_ALLBUT, r.SH_ALLINC)) << r.ICR_SHORTHAND_SHIFT
        elif form == 1:
            icr |= rng.choice((r.X2APIC_BROADCAST, r.XAPIC_BROADCAST)) << r.ICR_DEST_SHIFT
        elif form == 2:
            icr |= target << r.ICR_DEST_SHIFT
        elif form == 3:
            return ("signal_msi", 0xFEE0_0000 | (target & 0xFF) << 12 | (target & 0xFFFF_FF00) << 32, vector)
        else:
            icr |= r.ICR_LOGICAL | ((target >> 4) << 16 | rng.getrandbits(16)) << r.ICR_DEST_SHIFT
        return ("set_msr", i, r.MSR_X2APIC_ICR, icr)


def random_ids(rng: random.Random, least: int, most: int) -> tuple[int, ...]:
    """Distinct IDs in random creation order, mostly with the boot CPU among them."""
    ids = rng.sample(ID_POOL, rng.randint(least, most))
    if chance(rng, 0.9) and 0 not in ids:
        ids[rng.randrange(len(ids))] = 0
    return tuple(ids)


def plain(result: Any) -> str:
    """A result in a few words."""
    if isinstance(result, bool) or result is None or isinstance(result, tuple):
        return str(result)
    return f"{result:#x}" if isinstance(result, int) else str(result)
