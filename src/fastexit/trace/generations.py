"""Which ICR writes each kernel generation takes fast, asked of the model itself.

One machine per generation lends its fast path; before a question it gets the APIC state of the replayed machine, so
the answer is what that kernel would have done there and then. A question that was asked before is not asked again; what
makes two of them the same is said in `_key`.
"""

from __future__ import annotations

from collections import Counter

import fastexit.layout as L
from fastexit.machine import Machine
from fastexit.outcome import Path, Refusal
from fastexit.profile import PROFILES, profiles
from fastexit.regs import APIC_ICR, ICR_VECTOR, MSR_TSC_DEADLINE, X2APIC_BROADCAST, XAPIC_BROADCAST
from fastexit.trace.report import Generation
from fastexit.traits import Trait

_MMIO = "write to the xAPIC page: "
_PAGE = -1
_DECIDING = 0xFFFF_FFFF & ~ICR_VECTOR
_BROADCAST = (XAPIC_BROADCAST, X2APIC_BROADCAST)

Answer = tuple[str, ...]
"""For each generation "" when taken, else the reason."""


class Generations:
    """Asks every generation about the fast WRMSRs of one VM; ``machine`` is the one that is being replayed.

    ``hv_timer``: the host can use the VMX preemption timer.
    """

    def __init__(self, machine: Machine, ids: list[int], irqchip: str, x2apic_api: int, hv_timer: bool) -> None:
        self._machine = machine
        self._probes = [
            Machine(
                apic_ids=ids,
                kernel=kernel,
                vendor=machine.vendor,
                apicv=machine.apicv,
                irqchip=irqchip,
                x2apic_api=x2apic_api,
                hv_timer=hv_timer,
                threads=False,
            )
            for kernel in profiles()
        ]
        self._answers: dict[tuple[int, ...], Answer] = {}
        self._tally: Counter[Answer] = Counter()

    def count(self, vcpu: int, msr: int, value: int) -> None:
        """One write of an x2APIC MSR (ICR or SELF_IPI) by vCPU index ``vcpu``, about to happen."""
        self._add(self._key(vcpu, msr, value), vcpu, msr, value)

    def count_mmio(self, vcpu: int, value: int) -> None:
        """One write of the ICR in the xAPIC page, about to happen."""
        self._add(self._key(vcpu, _PAGE, 0), vcpu, _PAGE, value)

    def _key(self, vcpu: int, msr: int, value: int) -> tuple[int, ...]:
        """All that an answer can depend on: the ICR without its vector, whether the destination is a broadcast, the
        sender's mode, and whether the APIC map exists and how it stands with logical destinations.
        """
        mem = self._machine.mem
        base = mem[L.H_MAP]
        dest = value >> 32 if value >> 32 in _BROADCAST else 0
        flags = mem[L.HOT + vcpu * L.HOT_STRIDE + L.HOT_FLAGS]
        return msr, value & _DECIDING, dest, flags, mem[base + L.MAP_PRESENT], mem[base + L.MAP_LOGICAL]

    def _add(self, key: tuple[int, ...], vcpu: int, msr: int, value: int) -> None:
        answer = self._answers.get(key)
        if answer is None:
            answer = self._answers[key] = tuple(self._ask(probe, vcpu, msr, value) for probe in self._probes)
        self._tally[answer] += 1

    def _ask(self, probe: Machine, vcpu: int, msr: int, value: int) -> str:
        self._copy_state(probe)
        if msr == _PAGE:
            outcome = probe.vcpus[vcpu].mmio_write(APIC_ICR, value)
        else:
            outcome = probe.vcpus[vcpu].wrmsr(msr, value)
        if outcome.path == Path.FAST:
            return ""
        return (_MMIO if msr == _PAGE else "") + outcome.refusal.text

    def _copy_state(self, probe: Machine) -> None:
        n = len(probe.vcpus)
        source, target = self._machine.words, probe.words
        target[L.H_MAP] = source[L.H_MAP]
        target[L.MAP0 : L.MAP1 + L.MAP_WORDS] = source[L.MAP0 : L.MAP1 + L.MAP_WORDS]
        for first, stride in (
            (L.HOT, L.HOT_STRIDE),
            (L.VEC, L.VEC_STRIDE),
            (L.PAGE, L.PAGE_STRIDE),
            (L.KVM, L.KVM_STRIDE),
        ):
            target[first : first + n * stride] = source[first : first + n * stride]

    def result(self) -> list[Generation]:
        """One Generation per profile, oldest first."""
        total = sum(self._tally.values())
        out = []
        for i, probe in enumerate(self._probes):
            reasons: Counter[str] = Counter()
            for answer, n in self._tally.items():
                reasons[answer[i]] += n
            fast = reasons.pop("", 0)
            out.append(Generation(probe.kernel, fast, total, dict(reasons.most_common())))
        return out

    def deadline_fast(self) -> list[str]:
        """The generations that take a TSC_DEADLINE write fast."""
        taken = []
        for probe in self._probes:
            self._copy_state(probe)
            if probe.vcpus[0].wrmsr(MSR_TSC_DEADLINE, 0).refusal == Refusal.NONE:
                taken.append(probe.kernel)
        return taken

    def deadline_with_timer(self) -> list[str]:
        """The generations that take a TSC_DEADLINE write fast only where the preemption timer can serve it."""
        return [probe.kernel for probe in self._probes if PROFILES[probe.kernel].traits & Trait.TSCDL_HV_TIMER]
