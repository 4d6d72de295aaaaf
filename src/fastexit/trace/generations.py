"""Which ICR writes and other accesses each kernel generation takes fast, asked of the model itself.

One machine per generation lends its fast path; before a question it gets the APIC state of the replayed machine, so
the answer is what that kernel would have done there and then. A question that was asked before is not asked again; what
makes two of them the same is said in `_key`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import fastexit.layout as L
from fastexit.hyperv import MSR_HV_EOI, MSR_HV_ICR, MSR_HV_STIMER3_COUNT, MSR_HV_TPR
from fastexit.machine import Machine
from fastexit.outcome import Outcome, Path, Refusal
from fastexit.profile import PROFILES, profiles
from fastexit.reasons import SvmExit, VmxExit
from fastexit.regs import (
    APIC_EOI,
    APIC_ICR,
    APIC_TASKPRI,
    APIC_TMICT,
    ICR_VECTOR,
    MSR_TSC_DEADLINE,
    MSR_X2APIC_BASE,
    X2APIC_BROADCAST,
    XAPIC_BROADCAST,
)
from fastexit.trace.doors import Doing, Door
from fastexit.trace.report import Generation
from fastexit.traits import Trait
from fastexit.vcpu import Vcpu

_MMIO = "write to the xAPIC page: "
_PAGE = -1
_REGISTER = {Doing.IPI: APIC_ICR, Doing.EOI: APIC_EOI, Doing.TPR: APIC_TASKPRI, Doing.TIMER: APIC_TMICT}
_SYNTHETIC = {Doing.IPI: MSR_HV_ICR, Doing.EOI: MSR_HV_EOI, Doing.TPR: MSR_HV_TPR, Doing.TIMER: MSR_HV_STIMER3_COUNT}
_NO_HANDLER = (Refusal.MSR, Refusal.NOT_AN_MSR_WRITE)
_NOT_FAST = "kvm_msr was not recorded, and a Windows guest most likely wrote the synthetic MSR: no fast handler"
_DECIDING = 0xFFFF_FFFF & ~ICR_VECTOR
_BROADCAST = (XAPIC_BROADCAST, X2APIC_BROADCAST)

Answer = tuple[str, ...]
"""For each generation "" when taken, else the reason."""


class Generations:
    """Asks every generation about the fast WRMSRs of one VM; ``machine`` is the one that is being replayed.

    ``hv_timer``: the host can use the VMX preemption timer. ``kernels``: generations to ask, by default all.
    """

    def __init__(
        self,
        machine: Machine,
        ids: list[int],
        irqchip: str,
        x2apic_api: int,
        hv_timer: bool,
        kernels: Sequence[str] | None = None,
    ) -> None:
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
            for kernel in (profiles() if kernels is None else kernels)
        ]
        self._answers: dict[tuple[int, ...], Answer] = {}
        self._at_doors: dict[tuple[Doing, Door], Answer] = {}
        self._tally: Counter[tuple[Door, Answer]] = Counter()

    def count(self, vcpu: int, msr: int, value: int) -> None:
        """One write of an x2APIC MSR (ICR or SELF_IPI) by vCPU index ``vcpu``, about to happen."""
        self._add(Door.X2APIC, self._key(vcpu, msr, value), vcpu, msr, value)

    def count_mmio(self, vcpu: int, value: int) -> None:
        """One write of the ICR in the xAPIC page, about to happen."""
        self._add(Door.PAGE, self._key(vcpu, _PAGE, 0), vcpu, _PAGE, value)

    def count_door(self, door: Door) -> None:
        """One IPI by a door where its value plays no part."""
        self._tally[door, self.at_door(Doing.IPI, door)] += 1

    def at_door(self, doing: Doing, door: Door) -> Answer:
        """What each generation does with such an access; "" where it takes it fast, or where there is no exit."""
        answer = self._at_doors.get((doing, door))
        if answer is None:
            answer = self._at_doors[doing, door] = tuple(self._try(probe, doing, door) for probe in self._probes)
        return answer

    def fast_at_door(self, doing: Doing, door: Door) -> list[str]:
        """The generations that take such an access fast."""
        answers = self.at_door(doing, door)
        return [probe.kernel for probe, answer in zip(self._probes, answers, strict=True) if not answer]

    def _try(self, probe: Machine, doing: Doing, door: Door) -> str:
        """The exit of that door on one generation: what its fast path says."""
        if door is Door.UNTOLD:
            return _NOT_FAST
        self._copy_state(probe)
        outcome = exit_at(probe.vcpus[0], doing, door)
        if outcome.path == Path.FAST:
            return ""
        return f"{door.value}: {'no fast handler' if outcome.refusal in _NO_HANDLER else outcome.refusal.text}"

    def _key(self, vcpu: int, msr: int, value: int) -> tuple[int, ...]:
        """All that an answer can depend on: the ICR without its vector, whether the destination is a broadcast, the
        sender's mode, and whether the APIC map exists and how it stands with logical destinations.
        """
        mem = self._machine.mem
        base = mem[L.H_MAP]
        dest = value >> 32 if value >> 32 in _BROADCAST else 0
        flags = mem[L.HOT + vcpu * L.HOT_STRIDE + L.HOT_FLAGS]
        return msr, value & _DECIDING, dest, flags, mem[base + L.MAP_PRESENT], mem[base + L.MAP_LOGICAL]

    def _add(self, door: Door, key: tuple[int, ...], vcpu: int, msr: int, value: int) -> None:
        answer = self._answers.get(key)
        if answer is None:
            answer = self._answers[key] = tuple(self._ask(probe, vcpu, msr, value) for probe in self._probes)
        self._tally[door, answer] += 1

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
        """One Generation per profile that is asked."""
        total = sum(self._tally.values())
        out = []
        for i, probe in enumerate(self._probes):
            reasons: Counter[str] = Counter()
            for (_, answer), n in self._tally.items():
                reasons[answer[i]] += n
            fast = reasons.pop("", 0)
            out.append(Generation(probe.kernel, fast, total, dict(reasons.most_common())))
        return out

    def ipis_fast(self, door: Door) -> dict[str, int]:
        """How many IPIs by one door each generation takes fast."""
        return {
            probe.kernel: sum(n for (by, answer), n in self._tally.items() if by is door and not answer[i])
            for i, probe in enumerate(self._probes)
        }

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


def exit_at(v: Vcpu, doing: Doing, door: Door) -> Outcome:
    """The exit that such an access makes."""
    svm = v.machine.vendor == "svm"
    if door is Door.SYNTHETIC:
        return v.wrmsr(_SYNTHETIC[doing], 0)
    if door is Door.X2APIC:
        return v.wrmsr(MSR_X2APIC_BASE + (_REGISTER[doing] >> 4), 0)
    if door is Door.HYPERCALL:
        return v.hypercall(0)
    if door is Door.PAGE:
        return v.mmio_write(_REGISTER[doing], 0)
    if door is Door.CR8:
        return v.exit(SvmExit.WRITE_CR8 if svm else VmxExit.CR_ACCESS)
    if svm:
        return v.exit(SvmExit.AVIC_INCOMPLETE_IPI if doing is Doing.IPI else SvmExit.AVIC_UNACCELERATED_ACCESS)
    return v.exit(VmxExit.EOI_INDUCED if door is Door.INDUCED else VmxExit.APIC_WRITE, info1=_REGISTER[doing])
