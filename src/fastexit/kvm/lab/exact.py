"""Timers to the nanosecond: on a machine whose clock counts instructions, the kernel goes first and two models follow.

Models: nothing. A whole story is one batch, so nobody's pace matters. The kernel notes its clock before and behind each
operation and behind each look. One model writes as early and reads as late as can have been, the other one writes late
and reads early. Where both say the same, the kernel has to; a count has to lie between theirs. A story ends where the
two disagree, for then something ran out while the operation was under way.
"""

from __future__ import annotations

import random
import struct
from collections.abc import Iterator
from typing import Any, ClassVar

from fastexit import layout as L
from fastexit import regs as r
from fastexit.kvm import guest as G
from fastexit.kvm import ioctl as K
from fastexit.kvm.host import Host
from fastexit.kvm.judge import Judge
from fastexit.kvm.lab.device import SEEN, LabDevice, LabGuest, ioctl_record, stopped
from fastexit.kvm.lab.wire import Answer, Ask, Record
from fastexit.kvm.operations import Op, apply, describe
from fastexit.kvm.programs import Program
from fastexit.kvm.timers import MODES, msr
from fastexit.kvm.timers import setup as drawn
from fastexit.kvm.twins import TMCCT_MSR, Setup, Twins
from fastexit.kvm.values import chance, differences, masked
from fastexit.machine import Machine

NOMINAL_NS = 5_000
"""What an operation takes while a story is drawn, before anybody knows."""
BEHIND_NS = 10_000_000_000
"""The kernel's clock at the beginning of a story is this of the models'."""
COUNTS = (0, 1, 100, 1000, 20_000, 200_000, 1_000_000, 0xC000_0000, 0xFFFF_FFFF)
SLEEPS = (1_000, 50_000, 200_000, 1_000_000, 5_000_000)
DEADLINES = (1, 1_000, 100_000, 1_000_000, 1 << 40)
UNTIL_NS = 60_000_000_000
"""No model visits ticks for longer than this in one operation."""


class Step:
    """One operation of a story as the kernel had it: its answer, its looks, and the times around them."""

    def __init__(self, op: Op, answer: Answer, seen: list[bytes], deadlines: list[Answer], times: list[int]) -> None:
        self.op = op
        self.answer = answer
        self.seen = seen
        self.deadlines = deadlines
        self.before: int
        self.behind: int
        self.end: int
        self.before, self.behind, self.end = times


class ExactTimers(Twins):
    """TMICT, TMCCT, TDCR, LVTT, TSC deadlines, KVM_SET_LAPIC's restart, disabling, ticks taken; every count exact.

    Operations are only noted until `finish`. ("deadline", i, ticks) is a TSC deadline so far ahead, ("sleep", ns) time
    that passes. ``undecided`` are the operations behind the end of a story that ended early.
    """

    kind = "timers"
    traceable = False
    states = True
    operations_each = 16
    deferred: ClassVar[bool] = True
    about: ClassVar[str] = (
        "TMICT, TMCCT, TDCR, LVTT, TSC deadlines, KVM_SET_LAPIC's restart, SVR, APICBASE, INIT, ticks taken; "
        "the machine's clock counts instructions, and TMCCT is compared within the time that each operation took"
    )

    def __init__(self, setup: Setup, witness: Any = None, judge: Judge | None = None) -> None:
        super().__init__(setup, witness, judge)
        self._lost: set[int] = set()
        """vCPUs whose timers were stretched while periodic: the models are in whichever period since then."""
        self._device: LabDevice = self.real.device
        self._fds: list[int] = [vcpu.fd for vcpu in self.real.vcpus]
        self._guests: list[LabGuest] = [vcpu.ready() for vcpu in self.real.vcpus]
        for i, guest in enumerate(self._guests):
            guest.flatten()
            apply(self.model, ("ready", i))
        self._boot()
        self.models: list[Machine] = [Machine(**self.model_keywords()) for _ in range(2)]
        for model in self.models:
            for i in range(len(self._fds)):
                apply(model, ("ready", i))
            model.boot_x2apic()

    def _boot(self) -> None:
        self.real.boot_x2apic()
        self.model.boot_x2apic()

    @classmethod
    def draw(cls, rng: random.Random, host: Host, ids: tuple[int, ...] | None) -> Setup:
        return drawn(rng, host, ids)

    def model_keywords(self) -> dict[str, Any]:
        """The model's TSC ticks as the kernel says that the real one does."""
        return super().model_keywords() | {"tsc_khz": self.real.vcpus[0].tsc_khz}

    # ------------------------------------------------------------------------------------------------- what is drawn

    def beginning(self, rng: random.Random) -> Iterator[Op]:
        self._see()
        return iter(())

    def _see(self) -> None:
        for i, vcpu in enumerate(self.model.vcpus):
            self.vcpus[i].page, self.vcpus[i].apic_base = vcpu.get_lapic(), vcpu.apic_base

    def draw_op(self, rng: random.Random) -> Op:
        i = rng.randrange(len(self.vcpus))
        kind = rng.random()
        if kind < 0.2:
            return ("set_msr", i, msr(r.APIC_TMICT), rng.choice(COUNTS))
        if kind < 0.4:
            mask = r.LVT_MASKED if chance(rng, 0.25) else 0
            return ("set_msr", i, msr(r.APIC_LVTT), rng.choice(MODES) | mask | rng.randrange(16, 256))
        if kind < 0.46:
            return ("set_msr", i, msr(r.APIC_TDCR), rng.choice((0, 1, 2, 3, 8, 9, 10, 11)))
        if kind < 0.53:
            return ("deadline", i, rng.choice(DEADLINES))
        if kind < 0.56:
            return ("set_msr", i, r.MSR_TSC_DEADLINE, rng.choice((0, 1)))
        if kind < 0.6:
            return ("set_msr", i, msr(r.APIC_SPIV), rng.choice((0xFF, 0x1FF, 0x1FF)))
        if kind < 0.7:
            return ("set_lapic", i, self._page(rng, i))
        if kind < 0.72:
            base = self.vcpus[i].apic_base
            both = r.APICBASE_EN | r.APICBASE_EXTD
            return ("set_msr", i, r.MSR_APICBASE, base & ~both if base & r.APICBASE_EN else base | both)
        if kind < 0.73:
            init = self.vcpus[i].id << r.ICR_DEST_SHIFT | r.DM_INIT << r.ICR_DM_SHIFT
            return ("set_msr", i, r.MSR_X2APIC_ICR, init)
        if kind < 0.78:
            return ("get_msr", i, rng.choice((msr(r.APIC_TMICT), TMCCT_MSR)))
        if kind < 0.88 or not self._runs(i):
            return ("sleep", rng.choice(SLEEPS))
        return (rng.choice(("take", "run_through")), i)

    def _runs(self, i: int) -> bool:
        """Whether a vCPU can run a program: an INIT takes its segments away."""
        return all(op[2:3] != (r.MSR_X2APIC_ICR,) for op in self.history) and (
            self.model.vcpus[i].get_mp_state() == r.MP_RUNNABLE
        )

    def _page(self, rng: random.Random, i: int) -> bytes:
        page = bytearray(self.vcpus[i].page)
        for offset, value in (
            (r.APIC_LVTT, rng.choice(MODES) | rng.randrange(16, 256)),
            (r.APIC_TMICT, rng.choice(COUNTS)),
            (r.APIC_TDCR, rng.choice((0, 3, 11))),
            (r.APIC_SPIV, 0x1FF),
        ):
            if chance(rng, 0.5):
                struct.pack_into("<I", page, offset, value)
        if chance(rng, 0.7):
            struct.pack_into("<I", page, r.APIC_TMCCT, rng.choice(COUNTS))
        if chance(rng, 0.7):
            page[r.APIC_IRR : r.APIC_IRR + 0x80] = bytes(0x80)
        return bytes(page)

    def step(self, op: Op) -> None:
        """Notes an operation; the model that stories are drawn on carries it out at a time of its own."""
        self.history.append(op)
        advance(self.model, self.model.time + NOMINAL_NS)
        self.carry_out_on(self.model, op)
        self._see()

    def look(self) -> None:
        """Nothing to see before the end."""
        self._see()

    def settle(self) -> None:
        """The end of a story."""
        self.finish()

    # ------------------------------------------------------------------------------------------------- what is done

    def finish(self) -> None:
        """Carries the whole story over, then lets both models follow; Divergence at the first difference."""
        began, steps = self._told()
        for model in self.models:
            advance(model, BEHIND_NS)
        for number, step in enumerate(steps, 1):
            times = [time - began + BEHIND_NS for time in (step.before, step.behind, step.end)]
            if not self._followed(step, number, times):
                self.undecided: int = len(steps) - number + 1
                return

    def _told(self) -> tuple[int, list[Step]]:
        """What the kernel did: its clock at the beginning, and each step."""
        clock: Record = (Ask.CLOCK, 0, b"")
        look = self._device.look_record(self.real.fd)
        ones = [K.ffi.new("struct one_msr *", {"nmsrs": 1, "index": r.MSR_TSC_DEADLINE}) for _ in self._fds]
        deadlines = [ioctl_record(fd, K.GET_MSRS, one) for fd, one in zip(self._fds, ones, strict=True)]
        records: list[Record] = [clock]
        for op in self.history:
            records += [clock, self._record(op), clock, look, *deadlines, clock]
        answers = iter(self._device.turnstile.trip(records, 120.0))

        def time() -> int:
            ns: int = struct.unpack("<q", next(answers).data)[0]
            return ns

        began, steps = time(), []
        for op in self.history:
            before, answer, behind = time(), next(answers), time()
            seen = self._device.looked(self.real.fd, next(answers))
            steps.append(Step(op, answer, seen, [next(answers) for _ in self._fds], [before, behind, time()]))
        return began, steps

    def _record(self, op: Op) -> Record:
        name, *arguments = op
        if name == "sleep":
            return (Ask.SLEEP, 0, struct.pack("<I", arguments[0]))
        i, *rest = arguments
        if name == "deadline":
            return (Ask.DEADLINE, 0, struct.pack("<IIQ", self._fds[i], 0, rest[0]))
        if name in ("take", "run_through"):
            return self._guests[i].program_record(G.NOTHING, interrupts=name == "take")
        if name == "set_lapic":
            page = K.ffi.new("struct kvm_lapic_state *")
            K.ffi.buffer(page)[:] = rest[0]
            return ioctl_record(self._fds[i], K.SET_LAPIC, page)
        one = K.ffi.new("struct one_msr *", {"nmsrs": 1, "index": rest[0]})
        if name == "set_msr":
            one.data = rest[1]
        return ioctl_record(self._fds[i], K.SET_MSRS if name == "set_msr" else K.GET_MSRS, one)

    def carry_out_on(self, model: Machine, op: Op) -> Any:
        """One operation on a model: what can be compared with `result`."""
        name, *arguments = op
        if name == "sleep":
            return None
        if name == "deadline":
            tsc = model.time * model.mem[L.H_TSC_KHZ] // 1_000_000
            return model.vcpus[arguments[0]].set_msr(r.MSR_TSC_DEADLINE, int(tsc) + arguments[1])
        if name == "take":
            return Program(model.vcpus[arguments[0]], interrupts=True).take()
        return apply(model, op)

    def result(self, step: Step) -> Any:
        """What the kernel's answer to an operation means, in the words of `apply`."""
        name, result = step.op[0], step.answer.result
        if result < 0:
            return "EINVAL"
        if name in ("set_msr", "deadline"):
            return result == 1
        if name == "get_msr":
            return struct.unpack_from("<Q", step.answer.data, 16)[0] if result == 1 else None
        if name in ("take", "run_through"):
            came, _, _, eois = stopped(step.answer.data)
            if came is None:
                raise TimeoutError("the guest did not come back")
            return came.interrupt if name == "take" else list(eois)
        return None

    # ---------------------------------------------------------------------------------------------- what is compared

    def _followed(self, step: Step, number: int, times: list[int]) -> bool:
        """Both models do a step and are compared with the kernel; False where they disagree with one another."""
        before, behind, end = times
        early, late = self.models
        results = []
        if self._races(step.op, before, behind):
            return False
        stretches = self._stretches(step.op, before)
        if stretches and self._is_periodic(step.op[1]):
            self._lost.add(step.op[1])
        reads = step.op[0] == "get_msr" and step.op[2] == TMCCT_MSR
        order, left = (behind, before) if stretches or reads else (before, behind), []
        for model, when in zip(self.models, order, strict=True):
            advance(model, when)
            results.append(self.carry_out_on(model, step.op))
            left.append(self._left(model, step.op[1]) if reads else 0)
        advance(early, end)
        advance(late, behind)
        got = self.result(step)
        if reads:
            self._same_count(number, f"{describe(step.op)}", step.op[1], results, left, got)
        elif results[0] != results[1]:
            return False
        else:
            self._same(number, describe(step.op), results[0], got)
        for i, seen in enumerate(step.seen):
            if not self._same_vcpu(number, i, seen, step.deadlines[i]):
                return False
        self.pages: int = self.pages + len(step.seen)
        return True

    def _stretches(self, op: Op, before: int) -> bool:
        """Whether a divider grows while its timer runs: the later, the less is left that grows with it."""
        if op[:3:2] != ("set_msr", msr(r.APIC_TDCR)):
            return False
        shift = ((op[3] & 3 | op[3] >> 1 & 4) + 1) & 7
        own = self.models[0].vcpus[op[1]].own
        return any(
            1 << shift > model.mem[own + L.K_DIVIDE] and model.mem[own + L.K_TARGET] > before for model in self.models
        )

    def _same_vcpu(self, number: int, i: int, seen: bytes, deadline: Answer) -> bool:
        early, late = (model.vcpus[i] for model in self.models)
        page = seen[: r.LAPIC_PAGE_BYTES]
        pages = early.get_lapic(), late.get_lapic()
        events = early.events(), late.events()
        states = early.get_mp_state(), late.get_mp_state()
        if masked(pages[0]) != masked(pages[1]) or events[0] != events[1] or states[0] != states[1]:
            return False
        if masked(pages[0]) != masked(page):
            raise self._at(number, f"vCPU {i}: {differences(masked(pages[0]), masked(page))}")
        at, _ = SEEN[K.GET_VCPU_EVENTS]
        nmi = seen[at + 13]
        self._same(number, f"vCPU {i} NMIs pending", events[0].nmi_pending, nmi)
        at, _ = SEEN[K.GET_MP_STATE]
        self._same(number, f"vCPU {i} mp_state", int(states[0]), struct.unpack_from("<I", seen, at)[0])
        counts = [struct.unpack_from("<I", one, r.APIC_TMCCT)[0] for one in pages]
        left = [self._left(model, i) for model in self.models]
        self._same_count(number, f"vCPU {i} TMCCT", i, counts, left, struct.unpack_from("<I", page, r.APIC_TMCCT)[0])
        expected = [vcpu.get_msr(r.MSR_TSC_DEADLINE) for vcpu in (early, late)]
        if bool(expected[0]) != bool(expected[1]):
            return False
        got = struct.unpack_from("<Q", deadline.data, 16)[0] if deadline.result == 1 else None
        self._same(number, f"vCPU {i} waits for a TSC deadline", bool(expected[0]), bool(got))
        return True

    def _races(self, op: Op, before: int, behind: int) -> bool:
        """Whether a timer may run out while an operation changes it or runs its vCPU, or has on one model alone.

        Where it ran out first it ended as what it was, or is there in time for the run; else it goes on as what the
        operation makes of it, or its tick comes during the run or behind it. The real one is due between those of the
        models.
        """
        if op[0] not in ("set_msr", "set_lapic", "deadline", "take", "run_through"):
            return False
        runs = op[0] in ("take", "run_through")
        early, late = self._due(op[1])
        if early is None or late is None:
            return early is not late and not (runs and (early or late or 0) < before)
        if self._is_periodic(op[1]):
            if runs and op[1] in self._lost:
                return True
            # The same tick on both, and the first one that is not over on both.
            period = self._period(self.models[0], op[1])
            early -= round((early - late) / period) * period
            over = max(0, before - max(early, late) + period - 1) // period * period
            early, late = early + over, late + over
        return min(early, late) <= behind and max(early, late) >= before

    def _is_periodic(self, i: int) -> bool:
        mem = self.models[0].mem
        return bool(mem[self.models[0].vcpus[i].own + L.K_TIMER_MODE] == r.LVT_TIMER_PERIODIC)

    @staticmethod
    def _period(model: Machine, i: int) -> int:
        return int(model.mem[model.vcpus[i].own + L.K_PERIOD])

    @staticmethod
    def _left(model: Machine, i: int) -> int:
        """Time until the target of a vCPU's timer, ns. TMCCT is what a division by the period leaves of it."""
        return max(0, int(model.mem[model.vcpus[i].own + L.K_TARGET]) - int(model.time))

    def _due(self, i: int) -> list[int | None]:
        """When the timer of a vCPU is due on each model, None for one that has stopped."""
        due = (model.mem[model.vcpus[i].own + L.K_HRTIMER] for model in self.models)
        return [None if at == L.NONE else at for at in due]

    def _same_count(self, number: int, what: str, i: int, counts: list[Any], left: list[int], got: Any) -> None:
        """A count lies between those of the models; one of them may have begun the next period already.

        A target can be many periods away, where a page changed TMICT and restarted nothing. Then any count is right
        once the models are a period apart.
        """
        low, high = counts
        if None in (low, high, got):
            self._same(number, what, low, got)
            return
        if i in self._lost or left[1] - left[0] >= self._period(self.models[0], i) > 0:
            return
        if not (low <= got <= high if low <= high else got <= high or got >= low):
            raise self._at(number, f"{what}: expected {low:#x} to {high:#x}, KVM says {got:#x}")

    def _same(self, number: int, what: str, expected: Any, got: Any) -> None:
        if expected != got:
            raise self._at(number, f"{what}: expected {expected}, KVM says {got}")

    def _at(self, number: int, text: str) -> Any:
        """The difference that shows behind so many operations."""
        found = self.divergence(text)
        found.history = found.history[:number]
        return found


def advance(model: Machine, until: int) -> None:
    """Moves a model's clock, from one timer to the next."""
    if until - model.time < UNTIL_NS:
        while (due := model.next_timer()) is not None and due < until:
            model.set_time(max(due, model.time))
    model.set_time(max(until, model.time))
