"""``fastexit verify``: random machines and operations on the model and on a real kernel until one is different.

Models: nothing. Each kind of twins gets its share of the operations, in sessions of some hundred on one machine; what a
session does depends on the seed, its kind and its number alone.
"""

from __future__ import annotations

import datetime
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field, replace
from typing import Any

from fastexit import __version__
from fastexit.checks import one_of
from fastexit.kvm import host as H
from fastexit.kvm import judge as J
from fastexit.kvm.guests import GuestTwins
from fastexit.kvm.irqchip import IrqchipTwins
from fastexit.kvm.many import ManyTwins
from fastexit.kvm.operations import Op
from fastexit.kvm.own import GROUPS, IGNORABLE, OwnTwins
from fastexit.kvm.runs import RunTwins
from fastexit.kvm.shrink import SECONDS, shortened
from fastexit.kvm.timers import TimerTwins
from fastexit.kvm.tracefs import TraceLost
from fastexit.kvm.twins import Divergence, Setup, Twins

KINDS: dict[str, type[Twins]] = {
    twins.kind: twins for twins in (Twins, GuestTwins, RunTwins, TimerTwins, ManyTwins, IrqchipTwins, OwnTwins)
}
SHARES = {"msr": 0.75, "guest": 0.16, "runs": 0.05, "timers": 0.04, "many": 0.0003}
"""How many of the operations are of which kind, unless one is asked for."""
TRACES_SHARE = 0.1
OWN_SHARE = 0.25
"""Of what is somebody's own."""
MANY_FROM = 300_000
"""A thousand vCPUs take seconds to make: runs with fewer operations leave them out."""
MANY_SECONDS = 60.0
DEFAULT_OPERATIONS = 100_000
LATE_AT_LEAST, LATE_SHARE = 3, 0.05
"""More than so many machines, and more than this share of them: that is no late host any more."""

Progress = Callable[[int, int], None]


@dataclass
class Count:
    """What was done of one kind."""

    operations: int = 0
    machines: int = 0
    vcpus: int = 0
    pages: int = 0
    trace_lines: int = 0
    undecided: int = 0
    """Operations that were done and compared with nothing; they are in no other number."""
    late: list[str] = field(default_factory=list)
    """Differences that did not show again, for the host was late; each cost its machine."""
    names: Counter[str] = field(default_factory=Counter)
    """What was compared by operation, where that is counted."""
    left_out: Counter[str] = field(default_factory=Counter)
    """What was drawn and is not known to the other side."""
    seconds: float = 0.0

    def as_dict(self) -> dict[str, Any]:
        """Everything with plain values; what was not counted is not there."""
        shown = vars(self) | {"seconds": round(self.seconds, 1)}
        return {name: value for name, value in shown.items() if not isinstance(value, Counter) or value}


@dataclass
class Report:
    """What a run compared, on which kernel, and what it found."""

    judge: J.Judge
    seed: int
    wanted: int
    traced: bool
    ids: tuple[int, ...] | None
    only: str | None
    began: str
    kinds: dict[str, Count] = field(default_factory=dict)
    seconds: float = 0.0
    divergence: Divergence | None = None
    left_out: dict[str, list[str]] = field(default_factory=dict)
    """Kinds that are not compared, for the other side lacks something, and what that is."""

    @property
    def host(self) -> H.Host:
        """What the model was compared with."""
        return self.judge.host

    @property
    def operations(self) -> int:
        """Operations compared."""
        return sum(count.operations for count in self.kinds.values())

    @property
    def late(self) -> list[str]:
        """Differences that did not show again."""
        return [text for count in self.kinds.values() for text in count.late]

    @property
    def too_late(self) -> bool:
        """Whether there were so many of them that a late host is no explanation."""
        return any(len(c.late) > LATE_AT_LEAST and len(c.late) > LATE_SHARE * c.machines for c in self.kinds.values())

    @property
    def agreed(self) -> bool:
        """Whether something was compared and nothing was found."""
        return self.divergence is None and not self.too_late and self.operations > 0

    def as_dict(self) -> dict[str, Any]:
        """Everything with plain values, for JSON."""
        found = self.divergence
        return {
            "fastexit": __version__,
            "judge": self.judge.name,
            "vendor": self.host.keywords()["vendor"],
            "host": self.host.as_dict(),
            "began": self.began,
            "seed": self.seed,
            "traced": self.traced,
            "ids": self.ids,
            "only": self.only,
            "agreed": self.agreed,
            "operations": self.operations,
            "seconds": round(self.seconds, 1),
            "kinds": {
                kind: count.as_dict() | {"about": of_kind(self.judge, kind)[0].about}
                for kind, count in self.kinds.items()
            },
            **({"left_out": self.left_out} if self.left_out else {}),
            "divergences": 0 if found is None else 1,
            "divergence": None if found is None else told(found),
        }


def told(found: Divergence) -> dict[str, Any]:
    """A difference with plain values."""
    said = {"transcript": found.transcript} if found.transcript else {}
    return {"kind": found.kind, "text": found.text, "script": found.script(), **said}


def verify(
    operations: int = DEFAULT_OPERATIONS,
    *,
    seconds: float | None = None,
    seed: int = 1,
    ids: tuple[int, ...] | None = None,
    only: str | None = None,
    traced: bool = False,
    progress: Progress | None = None,
    shorten: float = SECONDS,
    other: Any = None,
    kernel: str | None = None,
    well_formed: bool = False,
    ignored: Iterable[str] = (),
) -> Report:
    """Compares the model with a kernel until so many operations or seconds are used up, or they differ.

    Args:
        operations: how many operations.
        seconds: stop after so long, between two operations.
        seed: picks machines and operations; the same seed does the same again.
        ids: APIC ids of every machine instead of random ones.
        only: one kind (KINDS) alone; of "apic" also one of its groups (GROUPS of own.py).
        traced: the kernel's tracepoints are compared, too (needs root).
        progress: called with operations done and wanted.
        shorten: seconds for making the story of a difference shorter; 0 leaves it as it was found.
        other: who is compared; None is /dev/kvm of this machine. A `Lab`; somebody's own APICs: an `ApicProgram`, or
            anything callable, or with a method ``machine``, that makes machines with `Apics`' face from Oracle's
            keywords. What they lack is left out, and the report says so. An attribute ``host`` of the callable, a
            `Host`, says what the model has to be like.
        kernel: whose rules own APICs are held against: a generation, a release, or "sdm" (default: the newest
            kernel's), without APICv.
        well_formed: own APICs are asked nothing with a reserved bit in it, nor what KVM and the manual see differently.
        ignored: names of registers of own APICs (IGNORABLE of own.py) that are not compared.

    KvmUnavailable (an OSError) when there is no KVM; TraceUnavailable (an OSError) when there is no tracefs; TraceLost
    when the kernel's trace has holes.
    """
    judge = _told(J.of(other), kernel, well_formed, tuple(ignored))
    if judge.face is None and only in (OwnTwins.kind, *GROUPS):
        raise ValueError(f"operations of kind {only} are compared with own APICs alone: --against")
    if only in GROUPS:
        judge, only = replace(judge, groups=(only,)), OwnTwins.kind
    shares, left_out = _shares(judge, operations, seconds, only, traced)
    began = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    report = Report(judge, seed, operations, traced, ids, only, began, {kind: Count() for kind in shares})
    report.left_out = left_out
    start = time.monotonic()
    with ExitStack() as stack:
        witness = stack.enter_context(_trace(judge)) if traced or _needs_trace(judge, shares) else None
        dealt = _Dealt(report, shares, None if seconds is None else start + seconds, witness, progress)
        while report.divergence is None and dealt.more():
            dealt.run(judge.sessions)
            # What a late host may have made is looked at again when nobody else is busy.
            for cls, found in dealt.suspects():
                report.divergence = shortened(cls, found, witness, shorten)
                if report.divergence is not None:
                    break
                report.kinds[cls.kind].late.append(found.text)
    report.seconds = time.monotonic() - start
    return report


def _told(judge: J.Judge, kernel: str | None, well_formed: bool, ignored: tuple[str, ...]) -> J.Judge:
    """A judge with what is said of somebody's own APICs; ValueError for what is said of others, or unknown."""
    if judge.face is None:
        if kernel is not None or well_formed or ignored:
            raise ValueError("kernel, well_formed and ignored are for own APICs: a real kernel has its own rules")
        return judge
    for name in ignored:
        one_of(name, "register", IGNORABLE)
    argument, opens = judge.replayed
    if kernel is not None:
        judge, argument = replace(judge, host=J.own_host(kernel)), f"{argument}, kernel={kernel!r}"
    if ignored:
        argument += f", ignored={ignored!r}"
    return replace(judge, well_formed=well_formed, ignored=ignored, replayed=(argument, opens))


def of_kind(judge: J.Judge, kind: str) -> tuple[type[Twins], J.Judge]:
    """How a kind of operations is compared with a judge, and by whom."""
    special = judge.special.get(kind)
    if special is not None:
        return special()
    if kind not in KINDS:
        raise ValueError(f"operations of kind {kind} are compared with kernels of the lab alone: --kernel")
    return KINDS[kind], judge


class _Dealt:
    """Sessions, dealt out to as many threads as the judge has machines for; the caller's alone, if that is one."""

    def __init__(
        self,
        report: Report,
        shares: dict[str, float],
        deadline: float | None,
        witness: Any,
        progress: Progress | None,
    ) -> None:
        self.report = report
        self._shares = shares
        self._deadline = deadline
        self._witness = witness
        self._progress = progress
        self._lock = threading.Lock()
        self._operations = dict.fromkeys(shares, 0)
        self._numbers = dict.fromkeys(shares, 0)
        self._found: list[tuple[type[Twins], int, Divergence]] = []
        self._error: BaseException | None = None
        self._stopped = False

    def more(self) -> bool:
        """Whether there is anything left to do."""
        used_up = self._deadline is not None and time.monotonic() >= self._deadline
        return sum(self._operations.values()) < self.report.wanted and not used_up

    def run(self, threads: int) -> None:
        """Sessions until there are no more or one of them differs."""
        self._stopped = False
        if threads == 1:
            self._one_after_the_other()
        else:
            pool = [threading.Thread(target=self._one_after_the_other, daemon=True) for _ in range(threads)]
            try:
                for thread in pool:
                    thread.start()
                for thread in pool:
                    thread.join()
            finally:
                self._stopped = True
                for thread in pool:
                    thread.join()
        if self._error is not None:
            raise self._error

    def suspects(self) -> list[tuple[type[Twins], Divergence]]:
        """What was found, in the order in which sessions were dealt out."""
        found, self._found = sorted(self._found, key=lambda one: one[1]), []
        return [(cls, divergence) for cls, _, divergence in found]

    def _one_after_the_other(self) -> None:
        try:
            while not self._stopped:
                with self._lock:
                    if not self.more():
                        return
                    kind, number, wanted = self._next()
                cls, judge = of_kind(self.report.judge, kind)
                with judge.inside():
                    self._session(cls, judge, number, wanted)
        except BaseException as error:
            self._error, self._stopped = error, True

    def _next(self) -> tuple[str, int, int]:
        """A kind that is behind with its share, the number of its session, and how many operations that has."""
        kind = min(self._shares, key=lambda kind: self._operations[kind] / self._shares[kind])
        wanted = min(
            of_kind(self.report.judge, kind)[0].operations_each, self.report.wanted - sum(self._operations.values())
        )
        number = self._numbers[kind]
        self._numbers[kind] += 1
        self._operations[kind] += wanted
        return kind, number, wanted

    def _session(self, cls: type[Twins], judge: J.Judge, number: int, wanted: int) -> None:
        """One machine, from its making to its end."""
        report = self.report
        rng = random.Random(f"{report.seed}/{cls.kind}/{number}")
        try:
            witness = self._witness if report.traced or cls.needs_trace else None
            with cls(cls.draw(rng, judge.host, report.ids), witness, judge) as twins:
                self._life(twins, rng, wanted)
        except Divergence as found:
            with self._lock:
                self._found.append((cls, number, found))
            self._stopped |= not found.late or report.judge.sessions == 1

    def _life(self, twins: Twins, rng: random.Random, wanted: int) -> None:
        """What one machine goes through."""
        count = self.report.kinds[twins.kind]
        began, done = time.monotonic(), 0
        try:
            for op in twins.beginning(rng):
                twins.step(op)
            for number in range(wanted):
                twins.step(twins.draw_op(rng))
                done += 1
                if number % 32 == 0 and self._is_over(done):
                    break
            twins.settle()
        except (Divergence, TraceLost):
            raise
        except TimeoutError as error:
            raise twins.failed(error) from error  # a guest that does not come back
        except OSError:
            raise
        except Exception as error:
            raise twins.failed(error) from error
        finally:
            with self._lock:
                # a story that nobody can decide is no comparison: another machine does as many again
                undecided = min(done, twins.undecided)
                self._operations[twins.kind] -= undecided
                count.undecided += undecided
                count.operations += done - undecided
                count.machines += 1
                count.vcpus = max(count.vcpus, len(twins.vcpus))
                count.pages += twins.pages
                count.trace_lines += twins.trace_lines
                count.names.update(twins.names)
                count.left_out.update(twins.left_out)
                count.seconds += time.monotonic() - began

    def _is_over(self, done: int) -> bool:
        """Whether a machine's life ends early; tells how far all of them are."""
        if self._progress is not None:
            with self._lock:
                self._progress(self.report.operations + done, self.report.wanted)
        return self._stopped or (self._deadline is not None and time.monotonic() > self._deadline)


def _needs_trace(judge: J.Judge, kinds: Iterable[str]) -> bool:
    return any(of_kind(judge, kind)[0].needs_trace for kind in kinds)


def _shares(
    judge: J.Judge, operations: int, seconds: float | None, only: str | None, traced: bool
) -> tuple[dict[str, float], dict[str, list[str]]]:
    """Which kinds run, and how much of all operations each gets; and for which ones somebody's own APICs lack what."""
    face = None if judge.face is None else judge.face()
    if only is not None:
        cls = of_kind(judge, only)[0]
        if traced and not cls.traceable:
            raise ValueError(
                f"operations of kind {only} are not compared by trace lines: their order is the host's own"
            )
        if face is not None and not cls.needs <= face:
            raise ValueError(f"{judge.name} has no {', '.join(sorted(cls.needs - face))}: {only} needs that")
        return {only: 1.0}, {}
    many = operations >= MANY_FROM and (seconds is None or seconds >= MANY_SECONDS)
    known = SHARES if judge.trace is None or not judge.special else SHARES | {"traces": TRACES_SHARE}
    if face is not None:
        known = SHARES | {OwnTwins.kind: OWN_SHARE}
        known = {kind: share for kind, share in known.items() if kind in (judge.kinds or known)}
    shares = {
        kind: share
        for kind, share in known.items()
        if (kind != "many" or many) and (not traced or of_kind(judge, kind)[0].traceable)
    }
    if face is None:
        return shares, {}
    lacking = {kind: sorted(of_kind(judge, kind)[0].needs - face) for kind in shares}
    return (
        {kind: share for kind, share in shares.items() if not lacking[kind]},
        {kind: names for kind, names in lacking.items() if names},
    )


def _trace(judge: J.Judge) -> AbstractContextManager[Any]:
    """The kernel's tracepoints; ValueError for a judge that has none."""
    if judge.trace is None:
        raise ValueError(f"{judge.name} has no trace lines to compare")
    return judge.trace()


def replay(
    kind: str,
    keywords: dict[str, Any],
    ops: list[Op],
    *,
    traced: bool = False,
    other: Any = None,
    kernel: str | None = None,
    ignored: Iterable[str] = (),
) -> Divergence | None:
    """Carries out operations on new twins: where they differ, or None. The rest as for `verify`."""
    judge = _told(J.of(other), kernel, False, tuple(ignored))
    setup = Setup(**keywords | {"apic_ids": tuple(keywords["apic_ids"])})
    with ExitStack() as stack:
        cls, judge = of_kind(judge, kind)
        witness = stack.enter_context(_trace(judge)) if traced or cls.needs_trace else None
        twins = stack.enter_context(cls(setup, witness, judge))
        try:
            twins.look()
            for op in ops:
                twins.step(op)
            twins.finish()
        except Divergence as found:
            return found
    return None
