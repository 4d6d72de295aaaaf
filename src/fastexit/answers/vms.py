"""Which thread is which vCPU of which VM.

KVM names the vCPU on lines that only its own thread can cause, and never the VM. So threads are told apart by process
where the trace has one, else by name and by the order of thread ids, since a VMM creates the threads of a VM one after
the other, and last by who answers whose interrupts. What nothing tells is taken in order of thread ids, and said.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict

import numpy as np

from fastexit.answers.census import Census
from fastexit.answers.places import Where

_SURE = 3
"""So many times as many answers to one VM as to any other place a thread."""
_MANY = 512
"""Of more threads, or VMs, only what is told is asked, since each is compared with each."""
_NEAR = 64
"""Threads of one process have ids about so near, where nothing tells the process."""
_OF_THE_HOST = re.compile(r"kworker|ksoftirqd|swapper|<idle>|migration|rcu|irq/|kthreadd|watchdog|cpuhp")
_VHOST = re.compile(r"vhost-(\d+)")
"""vhost's threads are called after the process that they work for."""
_UNNAMED = "<...>"


class Resolved:
    """VMs of a recording: ``where`` for each thread, one more entry for lines without one; ``notes`` what was assumed.

    VMs are numbered from 1 in order of their first lines; 0 is what belongs to none.
    """

    def __init__(self, census: Census) -> None:
        self.notes: list[str] = []
        self._census = census
        self._threads = census.recording.threads
        self._linked: Counter[tuple[int, int]] | None = None
        n = len(self._threads)
        vm, vcpu = np.zeros(n + 1, np.int32), np.full(n + 1, -1, np.int32)
        self._vcpu: dict[int, int] = {}
        groups = self._groups()
        groups.sort(key=lambda group: min(int(census.born[thread]) for thread in group))
        for number, group in enumerate(groups, 1):
            for thread in group:
                vm[thread], vcpu[thread] = number, self._vcpu.get(thread, -1)
        if len(groups) > 1:
            processes = {self._threads[t].tgid: number for number, group in enumerate(groups, 1) for t in group}
            reach = [(self._pid(group[0]) - _NEAR, self._pid(group[-1]) + _NEAR) for group in groups]
            for thread in np.flatnonzero(vm[:n] == 0).tolist():
                vm[thread] = self._by_process(thread, processes, reach)
        else:
            vm[:] = 1
            if not groups and census.accepted:
                self.notes.append("no thread of a vCPU is in the trace: everything is taken for one VM's")
        self.where: Where = Where(vm, vcpu)

    def _pid(self, thread: int) -> int:
        return self._threads[thread].pid

    def _called(self, threads: list[int]) -> str:
        """Threads in words, not too many of them."""
        shown = [f"{ascii(self._threads[t].comm)[1:-1][:20]}-{self._pid(t)}" for t in threads[:4] if self._pid(t) >= 0]
        return ", ".join(shown or ["a thread without a name"]) + (
            f" and {len(threads) - 4:,} more" if len(threads) > 4 else ""
        )

    def _groups(self) -> list[list[int]]:
        """The threads of vCPUs, VM by VM."""
        census = self._census
        named = census.recording.vcpu_of
        actors = [t for t in range(len(self._threads)) if census.named.get(t) or named[t] >= 0 or census.vcpu_like[t]]
        several: list[int] = []
        for thread in actors:
            votes = census.named.get(thread)
            if votes:
                (vcpu, most), *_ = votes.most_common(1)
                self._vcpu[thread] = vcpu
                if most * 11 < votes.total() * 10:
                    several.append(thread)
            elif named[thread] >= 0:
                self._vcpu[thread] = named[thread]
        if several:
            self.notes.append(
                f"{self._called(several)} acts for several vCPUs: lines that do not say which are taken for the one "
                "that it names most often"
            )
        families: dict[object, list[int]] = defaultdict(list)
        for thread in actors:
            known = self._threads[thread]
            families[known.tgid if known.tgid >= 0 else re.sub(r"\d+", "#", known.comm)].append(thread)
        self._adopt(families)
        groups: list[list[int]] = []
        for family in families.values():
            groups += self._split(sorted(family, key=self._pid))
        for group in groups:
            self._name_the_unnamed(group)
        return groups

    def _adopt(self, families: dict[object, list[int]]) -> None:
        """Threads whose name the recorder had forgotten belong to the only family that there is, if they fit in."""
        lost = families.get(_UNNAMED)
        if lost is None or len(families) != 2:
            return
        (other,) = (family for key, family in families.items() if key != _UNNAMED)
        ids = [self._vcpu[t] for t in (*lost, *other) if t in self._vcpu]
        if len(ids) == len(set(ids)):
            other += lost
            del families[_UNNAMED]

    def _split(self, family: list[int]) -> list[list[int]]:
        """The next VM begins where a vCPU comes again."""
        groups: list[list[int]] = [[]]
        taken: set[int] = set()
        for thread in family:
            vcpu = self._vcpu.get(thread, -1)
            if vcpu in taken:
                groups.append([])
                taken = set()
            groups[-1].append(thread)
            if vcpu >= 0:
                taken.add(vcpu)
        uses = Counter(self._vcpu[thread] for thread in family if thread in self._vcpu)
        if len(groups) == max(uses.values(), default=1):
            return groups
        return self._by_answers(family, uses) or self._assumed(family, max(uses.values()))

    def _assumed(self, family: list[int], count: int) -> list[list[int]]:
        """The first thread of each vCPU is the first VM's, and so on."""
        groups: list[list[int]] = [[] for _ in range(count)]
        seen: Counter[int] = Counter()
        for thread in family:
            vcpu = self._vcpu.get(thread, -1)
            groups[seen[vcpu] if vcpu >= 0 else 0].append(thread)
            seen[vcpu] += 1
        self.notes.append(
            f"{len(groups)} VMs' threads are told apart by the order of thread ids alone, among them "
            f"{self._called(groups[0])}: record with the record-tgid option on, or one VM at a time"
        )
        return groups

    def _by_answers(self, family: list[int], uses: Counter[int]) -> list[list[int]]:
        """VMs that were started at the same time: a thread belongs to the one whose interrupts it answers.

        Nothing where that does not tell for every thread.
        """
        if len(family) > _MANY:
            return []
        if self._linked is None:
            self._linked = self._census.answers()
        linked = self._linked
        count = max(uses.values())
        seed = min(vcpu for vcpu, n in uses.items() if n == count)
        groups = [[t] for t in family if self._vcpu.get(t) == seed]
        rest = [t for t in family if self._vcpu.get(t) != seed]
        while rest:
            best: tuple[int, int, list[int]] | None = None
            for thread in rest:
                vcpu = self._vcpu.get(thread, -1)
                scores = [
                    (sum(linked[t, thread] + linked[thread, t] for t in group), i)
                    for i, group in enumerate(groups)
                    if vcpu < 0 or all(self._vcpu.get(t) != vcpu for t in group)
                ]
                scores.sort(reverse=True)
                lead = scores[0][0] - _SURE * (scores[1][0] if len(scores) > 1 else 0) if scores else 0
                if lead > 0 and (best is None or lead > best[0]):
                    best = lead, thread, groups[scores[0][1]]
            if best is None:
                return []
            best[2].append(best[1])
            rest.remove(best[1])
        return groups

    def _name_the_unnamed(self, group: list[int]) -> None:
        """Threads whose vCPU nothing names get the numbers that their places among the others leave."""
        group.sort(key=self._pid)
        unnamed = [thread for thread in group if thread not in self._vcpu]
        if not unnamed or any(self._vcpu.get(thread, i) != i for i, thread in enumerate(group)):
            return
        for i, thread in enumerate(group):
            self._vcpu[thread] = i
        self.notes.append(
            f"nothing names the vCPU of {self._called(unnamed)}: taken by the order of thread ids; kvm_entry names it"
        )

    def _by_process(self, thread: int, processes: dict[int, int], reach: list[tuple[int, int]]) -> int:
        """The VM of a thread that is no vCPU, by its process or by how near its id is; 0 for what is the host's."""
        known = self._threads[thread]
        vhost = _VHOST.fullmatch(known.comm)
        owner = int(vhost[1]) if vhost else known.pid
        if vhost and owner in processes:
            return processes[owner]
        if known.tgid >= 0:
            return processes.get(known.tgid, 0)
        if known.pid <= 0 or len(reach) > _MANY or _OF_THE_HOST.match(known.comm):
            return 0
        near = [number for number, (low, high) in enumerate(reach, 1) if low <= owner <= high]
        return near[0] if len(near) == 1 else 0
