"""The lab's VMX side: random guest programs on the model and on a kernel's own kvm_intel under Bochs, compared.

Models: nothing. A program that differs is run again; one that runs into a fault of Bochs each time is counted
under that fault. What differs otherwise is made shorter and told.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any, NoReturn

from fastexit.checks import one_of
from fastexit.kvm.host import Host, KvmUnavailable, generation
from fastexit.kvm.lab import vmxdraw, vmxhost, vmxrun
from fastexit.kvm.lab.bochs import Tree
from fastexit.kvm.lab.lab import Lab
from fastexit.kvm.lab.vmxcompare import Difference, Fault, differences, fault, unstored
from fastexit.kvm.lab.vmxmachine import Machine
from fastexit.kvm.lab.vmxmodel import EVENTS, Player, Setup
from fastexit.kvm.lab.vmxsteps import Step
from fastexit.kvm.lab.vmxwire import Answer

CPUS, QUANTUM = 3, 8
"""vCPUs 0 and 1 have a processor each, vCPU 2 shares one with the host."""
TRIES = 5
PROGRAMS = 1000
SHORTEN_SECONDS = 40.0
PARAMETERS = ("enable_apicv", "enable_ipiv", "preemption_timer", "unrestricted_guest", "vnmi", "nested")
"""kvm_intel's, of which a kernel may lack some."""
NO_ORACLE = 'the VMX lab has no oracle: use its verify() or run(), or fx.kvm.Lab(VERSION, vendor="svm").oracle()'

MODES = ("x2apic", "xapic")
KINDS = ("plain", "events")
"""Programs without NMI, SMI, INIT, SIPI and VMXON, and those with them."""
SAME = ("kernel", "release", "apicv", "seed")
"""What two runs have in common when one can go on where the other ended."""

Progress = Callable[[int, int], None]


@dataclass
class Story:
    """A program that differs."""

    setup: Setup
    steps: list[Step]
    found: list[Difference]

    def text(self) -> str:
        """The difference and the steps that show it, one a line."""
        lines = [str(self.found[0]), repr(self.setup)]
        lines += [
            f"{n:3} vCPU {step.vcpu}: {step.kind} {step.arguments()}".rstrip() for n, step in enumerate(self.steps)
        ]
        return "\n".join(lines)


@dataclass
class VmxReport:
    """What a run compared and found."""

    kernel: str
    release: str
    apicv: bool
    seed: int
    programs: dict[str, int] = field(default_factory=dict)
    """Mode of the APIC -> programs that were the same."""
    drawn: dict[str, int] = field(default_factory=dict)
    """Mode of the APIC -> programs that were drawn: a run that goes on begins with the next."""
    steps: int = 0
    lines: int = 0
    repeated: int = 0
    """Programs that were the same only in another run."""
    once: list[str] = field(default_factory=list)
    """What was different the first time in those."""
    restarted: int = 0
    """How often the machine stopped and was booted again."""
    faults: dict[str, int] = field(default_factory=dict)
    """Fault of Bochs -> programs that show it."""
    left_out: int = 0
    """Programs that ran into one each time, which says nothing about the model."""
    stories: list[Story] = field(default_factory=list)
    seconds: float = 0.0
    began: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))

    @classmethod
    def of(cls, kept: dict[str, Any]) -> VmxReport:
        """A report of what `as_dict` told, without its stories; KeyError where something is missing."""
        names = ("kernel", "release", "apicv", "seed", "programs", "drawn", "steps", "repeated", "once", "restarted")
        told = {name: kept[name] for name in (*names, "left_out", "seconds", "began")}
        return cls(**told, lines=kept["trace_lines"], faults=kept["faults_of_bochs"])

    def follows(self, other: VmxReport) -> bool:
        """Whether this one's run can go on for the other's: same kernel, same programs."""
        return all(getattr(self, name) == getattr(other, name) for name in SAME)

    def blame(self, known: Fault | None) -> None:
        """Counts a program under a fault."""
        if known is not None:
            self.faults[str(known)] = self.faults.get(str(known), 0) + 1

    @property
    def compared(self) -> int:
        """Programs that were the same."""
        return sum(self.programs.values())

    @property
    def agreed(self) -> bool:
        """Whether something was compared and nothing differs."""
        return not self.stories and self.compared > 0

    def as_dict(self) -> dict[str, Any]:
        """Everything with plain values, for JSON."""
        return {
            "judge": f"Linux {self.kernel} in the VMX lab",
            "vendor": "vmx",
            "kernel": self.kernel,
            "modelled_as": generation(self.kernel),
            "began": self.began,
            "release": self.release,
            "apicv": self.apicv,
            "seed": self.seed,
            "agreed": self.agreed,
            "programs": self.programs,
            "drawn": self.drawn,
            "steps": self.steps,
            "trace_lines": self.lines,
            "repeated": self.repeated,
            "once": self.once,
            "restarted": self.restarted,
            "faults_of_bochs": self.faults,
            "left_out": self.left_out,
            "differences": [story.text() for story in self.stories],
            "seconds": round(self.seconds, 1),
        }


class VmxLab(Lab):
    """A kernel booted under Bochs with its own kvm_intel; a context manager.

    Args:
        version: a kernel of the cache, or give ``image`` and ``modules``. apicv: kvm_intel's enable_apicv, on by
            default. exact: nothing to choose, this machine's clock always counts instructions.
        tree: the Bochs to use instead of the cached one.

    Its guests run whole programs, with `run` and `verify`; there is no VM with Oracle's face. KvmUnavailable and
    KernelMissing, both OSErrors of one line, where something is missing.
    """

    def __init__(
        self,
        version: str | None = None,
        *,
        vendor: str = "vmx",
        image: str | Path | None = None,
        modules: str | Path | None = None,
        exact: bool = True,
        apicv: bool | None = None,
        tree: Tree | None = None,
    ) -> None:
        self.vendor: str = one_of(vendor, "vendor", ("vmx",))
        self._find(version, image, modules)
        self.version = version
        self.exact = True
        self.apicv: bool = apicv is not False
        self._tree = tree
        self.machine: Any = self._booted()

    def _booted(self) -> Machine:
        made = parameters(self.kernel.version, self.apicv)
        return Machine(self.kernel, self._tree, cpus=CPUS, quantum=QUANTUM, parameters=made)

    def close(self) -> None:
        """Ends the machine; twice does no harm."""
        self.machine.close()

    @cached_property
    def host(self) -> Host:
        """What the kernel's KVM is: asked, where no experiment is needed, else as all of kvm_intel's are."""
        return vmxhost.of(self.machine, self.kernel)

    def parameters(self) -> dict[str, str]:
        """kvm_intel's parameters that matter here, as the kernel has them."""
        return vmxhost.texts(self.machine, {name: f"{vmxhost.INTEL}/{name}" for name in PARAMETERS})

    def oracle(self, vcpus: int | None = None, **keywords: Any) -> NoReturn:
        """Refused: this machine's init runs programs, it is no device."""
        raise ValueError(NO_ORACLE)

    def trace(self) -> NoReturn:
        """Refused, as `oracle` is."""
        raise ValueError(NO_ORACLE)

    def judge(self) -> NoReturn:
        """Refused, as `oracle` is."""
        raise ValueError(NO_ORACLE)

    def run(self, setup: Setup, steps: Sequence[Step]) -> list[Difference]:
        """A program on both sides: what differs."""
        return self._tried(setup, steps, None)[0]

    def _tried(
        self, setup: Setup, steps: Sequence[Step], player: Player | None
    ) -> tuple[list[Difference], Fault | None, int]:
        """What differs, the fault of Bochs that it may come from, and how many trace lines there were."""
        player = player or played(setup, steps, self.kernel.version)
        asleep = list(player.seen.asleep)
        expected = player.seen if player.seen.pages else player.end()
        asked = vmxrun.request(setup, steps, player.prepared, CPUS, expected.notes)
        answer = Answer.of(self.machine.ask(bytes(vmxrun.finish(asked, setup, asleep))))
        got, raw = vmxrun.seen(setup, steps, answer)
        found = differences(player.machine.trace.events, steps, expected, got)
        found = [Difference("a vCPU", "it comes back", stuck) for stuck in answer.stuck] + found
        told = unstored(setup, steps, found)
        if len(told) == len(found):
            return [], Fault.SELF_IPI_PAGE if found else None, len(raw)
        return found, fault(raw) if found else None, len(raw)

    def verify(
        self,
        programs: int = PROGRAMS,
        *,
        seed: int = 1,
        x2apic: bool | None = None,
        only: str | None = None,
        seconds: float | None = None,
        progress: Progress | None = None,
        shorten: float = SHORTEN_SECONDS,
        report: VmxReport | None = None,
        seen: Callable[[VmxReport], None] | None = None,
        differing: int = 1,
    ) -> VmxReport:
        """Random programs, in x2APIC and xAPIC mode in turn, until so many were the same or one differs.

        ``only``: "plain" ones, or those with "events" (NMI, SMI, INIT, SIPI, VMXON); by default both in turn.

        Those that differ are made shorter for ``shorten`` seconds each, and ``differing`` of them end it; ``seconds``
        later no program begins. With the ``report`` of an earlier run it goes on there; ``seen`` gets the report after
        each program.
        """
        new = VmxReport(self.kernel.version, self.kernel.release, self.apicv, seed)
        report = report if report is not None and report.follows(new) else new
        modes = modes_of(x2apic, only)
        began, before, drawn = time.monotonic(), report.seconds, 0
        while report.compared < programs and drawn < 2 * programs:
            mode = min(modes, key=lambda mode: report.programs.get(mode, 0))
            setup, steps, player = drawn_program(
                seed, mode, report.drawn.get(mode, 0), self.kernel.version, apicv=self.apicv
            )
            story = self._compare(setup, steps, player, report)
            report.drawn[mode], drawn = report.drawn.get(mode, 0) + 1, drawn + 1
            if story is not None:
                report.stories.append(self._shorter(story, shorten))
            report.seconds = before + time.monotonic() - began
            if seen:
                seen(report)
            if progress:
                progress(report.compared, programs)
            if len(report.stories) >= differing or (seconds is not None and time.monotonic() - began > seconds):
                break
        return report

    def _compare(self, setup: Setup, steps: list[Step], player: Player, report: VmxReport) -> Story | None:
        """One program, again where it differs: the story of a difference that is nobody's fault but the model's."""
        blamed: Fault | None = None
        first = ""
        found: list[Difference] = []
        for attempt in range(TRIES):
            try:
                found, known, lines = self._tried(setup, steps, player)
            except KvmUnavailable as stopped:
                found, known, lines = [Difference("the machine", "it answers", str(stopped))], None, 0
                report.restarted += 1
                self.machine.close()
                self.machine = self._booted()
            if not found:
                mode = setup.mode
                report.programs[mode] = report.programs.get(mode, 0) + 1
                report.steps += len(steps)
                report.lines += lines
                if attempt:
                    report.repeated += 1
                    report.once.append(f"{mode} {report.drawn.get(mode, 0)}: {first}")
                report.blame(known)
                return None
            blamed = known or blamed
            first = first or str(found[0])
        if blamed is None:
            return Story(setup, steps, found)
        report.blame(blamed)
        report.left_out += 1
        return None

    def _shorter(self, story: Story, seconds: float) -> Story:
        """Steps left out one after the other, the last first, as long as it differs."""
        until = time.monotonic() + seconds
        best, n = story, len(story.steps)
        while n > 0 and time.monotonic() < until:
            n -= 1
            steps = best.steps[:n] + best.steps[n + 1 :]
            try:
                found, known, _ = self._tried(best.setup, steps, None)
            except ValueError:
                continue  # a step that nobody can do now
            if found and known is None:
                best = Story(best.setup, steps, found)
        return best


def modes_of(x2apic: bool | None, only: str | None) -> list[str]:
    """Names of the modes that a run has."""
    kinds = KINDS if only is None else (one_of(only, "only", KINDS),)
    modes = MODES if x2apic is None else (MODES[not x2apic],)
    return [mode + EVENTS * (kind == "events") for kind in kinds for mode in modes]


def drawn_program(seed: int, mode: str, number: int, kernel: str, *, apicv: bool) -> tuple[Setup, list[Step], Player]:
    """The program of a number: what is drawn depends on seed, mode and number alone."""
    plain, _, events = mode.partition(" ")
    rng = random.Random(f"{seed}/{mode}/{2 * number + MODES.index(plain)}")
    setup = vmxdraw.setup(rng, apicv=apicv, x2apic=plain == "x2apic", events=bool(events))
    return setup, *vmxdraw.program(rng, setup, kernel)


def parameters(version: str, apicv: bool) -> dict[str, str]:
    """Module parameters that leave nothing to time."""
    return {"kvm": "halt_poll_ns=0", "kvm-intel": "" if apicv else "enable_apicv=0 flexpriority=0"}


def played(setup: Setup, steps: Sequence[Step], kernel: str) -> Player:
    """A program on the model; ValueError for a step of a vCPU that sleeps."""
    player = Player(setup, kernel)
    for step in steps:
        if player.seen.asleep[step.vcpu]:
            raise ValueError(f"vCPU {step.vcpu} sleeps when its step comes")
        player.step(step)
    return player


def verify(
    kernel: str,
    programs: int = PROGRAMS,
    *,
    seed: int = 1,
    apicv: bool = True,
    x2apic: bool | None = None,
    only: str | None = None,
    seconds: float | None = None,
    progress: Progress | None = None,
    tree: Tree | None = None,
) -> VmxReport:
    """Boots a kernel of the cache and compares ``programs`` with it; the machine is gone afterwards."""
    with VmxLab(kernel, apicv=apicv, tree=tree) as lab:
        return lab.verify(programs, seed=seed, x2apic=x2apic, only=only, seconds=seconds, progress=progress)
