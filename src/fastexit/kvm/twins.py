"""The model and a real VM, side by side: each operation on both, then everything that can be seen is compared.

Models: nothing. What a kind of twins draws, applies and compares is its class: host calls here (`Twins`), instructions
in guests.py, a thousand vCPUs in many.py, clocks in timers.py, sleep and interrupts in runs.py.
"""

from __future__ import annotations

import errno
import random
import struct
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from itertools import zip_longest
from types import TracebackType
from typing import Any, ClassVar, Self

from fastexit import regs as r
from fastexit.hyperv import ALL_FEATURES
from fastexit.kvm import operations as ops
from fastexit.kvm.host import Host
from fastexit.kvm.judge import Judge, local
from fastexit.kvm.operations import Op, apply, describe
from fastexit.kvm.script import script
from fastexit.kvm.tracefs import lines_of_interest
from fastexit.kvm.values import ID_POOL, chance, differences, masked
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
    hyperv: bool | str = False
    hyperv_features: int = int(ALL_FEATURES)

    def keywords(self) -> dict[str, Any]:
        """As Machine and Oracle want them, what is as usual left out."""
        usual = {name: value.default for name, value in self.__dataclass_fields__.items()}
        given = {name: value for name, value in asdict(self).items() if value != usual[name]}
        return given | {"apic_ids": list(self.apic_ids)}


class Divergence(AssertionError):
    """The model is not like the kernel: what differs, and the operations that show it, on twins of some kind."""

    def __init__(self, text: str, kind: str, setup: Setup, history: list[Op], judge: Judge, traced: bool) -> None:
        super().__init__(text)
        self.is_error = False
        """One side raised what no operation may raise: a story that is not made shorter."""
        self.late = False
        """A host that was late may have made it."""
        self.text = text
        self.kind = kind
        self.setup = setup
        self.history = history
        self.judge = judge
        self.host: Host = judge.host
        self.traced = traced
        self.transcript: list[tuple[str, str]] = []
        """What was said to an own APIC that is a program, and its answers."""
        self.what: frozenset[str] = frozenset()
        """What differs; a shorter story has to show nothing else. Empty: any difference will do."""

    def script(self) -> str:
        """A Python script that shows the difference, on both sides."""
        return script(self.text, self.kind, self.setup.keywords(), self.history, self.judge, traced=self.traced)


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
        value: int = struct.unpack_from("<I", self.page, offset)[0]
        return value

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
    needs_trace: ClassVar[bool] = False
    """Whether trace lines are what is compared, so that there is no such comparison without them."""
    deferred: ClassVar[bool] = False
    """Whether operations are carried out by `finish`, all at once."""
    states: ClassVar[bool] = False
    """Whether a look asks for mp_state, which carries out INIT and SIPI."""
    last_questions: ClassVar[tuple[Op, ...]] = (
        ("get_mp_state",),
        ("get_msr", r.MSR_APICBASE),
        ("get_msr", r.MSR_TSC_DEADLINE),
        ("cr8",),
        ("cs",),
    )
    needs: ClassVar[frozenset[str]] = frozenset(
        (
            *("set_msr", "get_msr", "get_lapic", "set_lapic", "get_mp_state", "set_mp_state", "events", "set_events"),
            *("set_sregs", "cr8", "cs", "signal_msi", "add_vcpu", "enable_x2apic_api", "boot_x2apic"),
        )
    )
    """What the other side has to have of Oracle's face."""
    about: ClassVar[str] = "KVM_SET_MSRS, KVM_GET_MSRS, KVM_SIGNAL_MSI, KVM_SET_LAPIC, KVM_SET_SREGS, states, events"

    def __init__(self, setup: Setup, witness: Any = None, judge: Judge | None = None) -> None:
        self.setup = setup
        self.judge: Judge = judge or local()
        self.host: Host = self.judge.host
        self.witness: Any = witness
        self.history: list[Op] = []
        self.planned: list[Op] = []
        self.pages: int = 0
        self.trace_lines: int = 0
        self.undecided: int = 0
        """Operations of a story behind the point at which nobody knows what the kernel should say."""
        self.names: Counter[str] = Counter()
        """What was compared by operation, where that is counted."""
        self.left_out: Counter[str] = Counter()
        """What was drawn and is not known to the other side."""
        self.x2apic: bool = setup.x2apic
        self.real: Any = self.judge.make(**setup.keywords())
        try:
            there, ids = len(getattr(self.real, "vcpus", setup.apic_ids)), len(setup.apic_ids)
            if there != ids:
                raise TypeError(f"{type(self.real).__name__} has {there} vcpus for {ids} apic_ids")
            self.model: Machine = self.make_model()
        except BaseException:
            self.close()
            raise
        if witness is not None and hasattr(witness, "of"):
            self.witness = witness.of(self.real)
        if hasattr(self.real, "watch"):
            self.real.watch(states=self.states)
        self.model.set_time(BOOTED_NS)
        if witness is not None and not self.host.fastpath:
            self.model.fastpath = False  # whose lines come in another order
        self.vcpus: list[View] = [View(vcpu.vcpu_id) for vcpu in self.model.vcpus]

    @classmethod
    def draw(cls, rng: random.Random, host: Host, ids: tuple[int, ...] | None) -> Setup:
        """A machine with 4 to 9 vCPUs, or with these ids, any irqchip, flags and CPUID that the host has."""
        irqchip = rng.choice(("full", "split"))
        known = host.api_split if irqchip == "split" else host.api
        api = rng.randrange(4)
        if chance(rng, 0.3):
            api |= rng.choice((r.X2API_SUPPRESS_EOI, r.X2API_NO_SUPPRESS_EOI)) & known
        ids = ids or random_ids(rng, 4, 9, host.max_vcpu_id)
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

    @classmethod
    def usual(cls, ids: tuple[int, ...]) -> Setup:
        """The settings that a story has unless it needs others."""
        return Setup(ids)

    def make_model(self) -> Machine:
        """What is held against the kernel."""
        return Machine(**self.model_keywords())

    def model_keywords(self) -> dict[str, Any]:
        """Keywords of the model: the host's and the VM's."""
        known = getattr(self.real, "keywords", self.host.keywords() | self.setup.keywords())
        return known | {"apic_ids": list(self.setup.apic_ids), "threads": False}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Closes the real VM."""
        getattr(self.real, "close", bool)()

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
        op = ops.rare_op(rng, self.host.api_split, self.host.max_vcpu_id)
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
            page, other = page_of(model), page_of(real)
            seen = self.vcpus[i]
            seen.apic_base = model.apic_base
            if page and other:
                if page != other and self.shown(page) != self.shown(other):
                    raise self.divergence(f"vCPU {i}: {differences(self.shown(page), self.shown(other))}")
                seen.page = page
            else:
                self.same(f"vCPU {i}: KVM_GET_LAPIC", page and "1024 bytes", other and "1024 bytes")
            self.look_beside_the_page(i, model, real)
        self.pages += len(self.vcpus)

    def shown(self, page: bytes) -> bytes:
        """A register page as far as it is compared."""
        return masked(page)

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

    def finish(self) -> None:
        """The end of a story, for twins that carry out nothing before that."""

    def same(self, what: str, expected: Any, got: Any) -> None:
        """Divergence when two results differ."""
        if expected != got:
            raise self.divergence(f"{what}: expected {plain(expected)}, KVM says {plain(got)}")

    def divergence(self, text: str) -> Divergence:
        """The error that carries the whole story."""
        found = Divergence(text, self.kind, self.setup, list(self.history), self.judge, self.witness is not None)
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


def random_ids(rng: random.Random, least: int, most: int, below: int = 4096) -> tuple[int, ...]:
    """Distinct IDs in random creation order, all of them ``below``, mostly with the boot CPU among them."""
    ids = rng.sample([vcpu_id for vcpu_id in ID_POOL if vcpu_id < below], rng.randint(least, most))
    if chance(rng, 0.9) and 0 not in ids:
        ids[rng.randrange(len(ids))] = 0
    return tuple(ids)


def page_of(vcpu: Any) -> bytes | None:
    """KVM_GET_LAPIC, or None where it says EINVAL."""
    try:
        page: bytes = vcpu.get_lapic()
    except ValueError:
        return None
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return None
    return page


def plain(result: Any) -> str:
    """A result in a few words."""
    if isinstance(result, bool) or result is None or isinstance(result, tuple):
        return str(result)
    return f"{result:#x}" if isinstance(result, int) else str(result)
