"""All answers to one recording, in one pass over its rows."""

from __future__ import annotations

from collections import Counter

from fastexit.answers.exits import Exits
from fastexit.answers.facts import Follower
from fastexit.answers.findings import find
from fastexit.answers.identity import Identity, identify
from fastexit.answers.inhibits import Inhibits
from fastexit.answers.ipis import Icr, Ipis
from fastexit.answers.msrs import Msrs
from fastexit.answers.places import Where
from fastexit.answers.report import Clue, VmReport
from fastexit.answers.vectors import Vectors
from fastexit.answers.waits import Span, Waits
from fastexit.records.columns import Recording


class Analysis:
    """What was accumulated of one recording; ``vms`` are the numbers of the VMs that have lines."""

    def __init__(self, recording: Recording, where: Where | None = None) -> None:
        self.recording: Recording = recording
        self.where: Where = identify(recording).where if where is None else where
        self.follower: Follower = Follower(recording, self.where)
        self.span: Span = Span(recording, self.follower)
        self.exits: Exits = Exits(self.follower, recording.names, self.span.ticks)
        self.msrs: Msrs = Msrs(self.follower)
        self.vectors: Vectors = Vectors(self.follower, self.span.ticks)
        self.ipis: Ipis = Ipis(self.follower)
        self.waits: Waits = Waits(self.follower)
        self.inhibits: Inhibits = Inhibits(recording, self.follower)
        for block in self.follower:
            self.span.feed(block)
            self.exits.feed(block, self.span.first)
            self.msrs.feed(block)
            self.vectors.feed(block, self.span.first)
            self.ipis.feed(block)
            self.waits.feed(block)
            self.inhibits.feed(block)
        self.vms: list[int] = [vm for vm in self.follower.places.vms if self.span.lines(vm)]

    def icrs(self) -> Counter[Icr]:
        """IPIs of all VMs by what decides whether a kernel takes them fast."""
        return self.ipis.icrs()

    def deadlines(self, vm: int) -> int:
        """TSC_DEADLINE writes of a VM, those of its nested guests among them."""
        return sum(self.ipis.deadlines(vm))

    def others(self, vm: int) -> Counter[tuple[str, bool]]:
        """What else of a VM a kernel may take fast: "TSC_DEADLINE write", and exits by plain reason; True: of L2.

        Where exits were not recorded, "CPUID" and "HYPERCALL" are lines that stand for them.
        """
        found = self.exits.plain(vm)
        if not found:
            found += Counter({(name, False): n for name, n in self.waits.lines(vm).items() if n})
        for nested, n in enumerate(self.ipis.deadlines(vm)):
            if n:
                found["TSC_DEADLINE write", bool(nested)] += n
        return found

    def lanes(self, vm: int) -> list[tuple[int, list[int]]]:
        """Lanes of a VM's threads with their words, in order of threads."""
        places = self.follower.places
        index = places.vms.index(vm)
        mine = [(thread, lane) for lane, thread in enumerate(places.lanes) if places.vm_of_thread(thread) == index]
        return [(lane, self.follower.lanes[lane].tolist()) for _, lane in sorted(mine)]

    def vcpu_of_lane(self, lane: int) -> str:
        """Its vCPU in words, or the thread's name."""
        place = int(self.follower.lanes[lane, 0])
        if place:
            return f"vCPU {self.follower.places.places[place - 1][1]}"
        thread = self.follower.places.lanes[lane]
        known = self.recording.threads
        return f"thread {known[thread].comm}-{known[thread].pid}" if thread < len(known) else "a vCPU"

    def threads(self, vm: int) -> dict[int, str]:
        """The names of a VM's vCPU threads, by place plus one."""
        places = self.follower.places
        known = self.recording.threads
        found: dict[int, str] = {}
        for lane, words in self.lanes(vm):
            place, thread = words[0], places.lanes[lane]
            if place and thread < len(known):
                found.setdefault(place, known[thread].comm)
        return found

    def report(self, vm: int, clues: dict[str, Clue] | None = None) -> VmReport:
        """The answers of one VM; ``clues`` (vendor, generation, ...) are taken over, and findings speak by them."""
        seconds = self.span.seconds(vm)
        msrs = self.msrs.rows(vm, self.ipis.classes(vm))
        report = VmReport(
            self.recording.path,
            vm,
            clues or {},
            seconds,
            self.exits.rows(vm, seconds),
            vcpus=self.exits.vcpus(vm, self.threads(vm)),
            by_second=self.exits.by_second(vm),
            msrs=msrs,
            vectors=self.vectors.rows(vm, linux=not self.windows(vm)),
            sent=self.vectors.sent(vm),
            doors=self.ipis.doors(vm, msrs),
            halts=self.waits.halts(vm, self.exits),
            latency=self.ipis.latency(vm),
        )
        report.findings = find(self, report)
        return report

    def windows(self, vm: int) -> bool:
        """Whether a VM's exits lie where Windows has its kernel, or it uses Hyper-V's doors."""
        return self.exits.windows(vm) or any(icr.vm == vm and icr.windows for icr in self.icrs())


def analyse(recording: Recording, identity: Identity | None = None) -> list[VmReport]:
    """Answer everything that a recording's rows tell, but for what other kernels would do.

    ``identity``: who is who, by default what the recording says. A VM with number 0 is what belongs to none.
    """
    who = identify(recording) if identity is None else identity
    analysis = Analysis(recording, who.where)
    return [analysis.report(vm, who.clues.get(vm)) for vm in analysis.vms]
