"""Twins whose guests carry out instructions: loads and stores at the xAPIC page, RDMSR and WRMSR.

Models: nothing.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any, ClassVar

from fastexit import regs as r
from fastexit.kvm import operations as ops
from fastexit.kvm.guest import MEMORY_BYTES
from fastexit.kvm.host import Host
from fastexit.kvm.operations import Op
from fastexit.kvm.twins import PPR_MSR, Setup, Twins, random_ids
from fastexit.kvm.values import READABLE_IN_XAPIC, chance


class GuestTwins(Twins):
    """Instructions of guests: loads and stores at the xAPIC page in all sizes, RDMSR and WRMSR, by real code.

    Whether a run refreshes PPR depends on what else happens in it, so both sides read PPR before and after.
    """

    kind = "guest"
    needs: ClassVar[frozenset[str]] = Twins.needs | {"wrmsr", "rdmsr", "mmio_write", "mmio_read", "is_flat", "ready"}
    states = True
    last_questions: ClassVar[tuple[Op, ...]] = Twins.last_questions[:-1]  # the code segment is the programs'
    about = "MOV to and from the xAPIC page in all sizes, WRMSR and RDMSR, carried out by guests in real mode"

    @classmethod
    def draw(cls, rng: random.Random, host: Host, ids: tuple[int, ...] | None) -> Setup:
        """As Twins, also with the quirk off that makes a hole of the page in x2APIC mode."""
        setup = asdict(super().draw(rng, host, ids or random_ids(rng, 4, 6, host.max_vcpu_id)))
        quirks = rng.choice((0, 0, r.QUIRK_LAPIC_MMIO_HOLE)) & host.quirks
        return Setup(**setup | {"disable_quirks": quirks})

    def beginning(self, rng: random.Random) -> Iterator[Op]:
        for i in range(len(self.vcpus)):
            yield ("ready", i)
        yield from super().beginning(rng)

    def draw_op(self, rng: random.Random) -> Op:
        op = self._drawn(rng)
        if self.judge.sessions > 1:
            op = ops.without_count(op)  # sessions that share trips take their time
        return ops.without_smi(op) if self.host.smm else op

    def _drawn(self, rng: random.Random) -> Op:
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

    def carry_out(self, op: Op) -> None:
        """As Twins; each program of the real guest has KVM_SET_REGS before it."""
        if op[0] in ops.GUEST_OPS:
            ops.set_regs(self.model.vcpus[op[1]])
        super().carry_out(op)

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
