"""The library beside the oracle, driven in step, and the shortest story of a difference between them.

Models: nothing; how a vCPU that runs is brought to rest on both sides is said at `Pair`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import oracle
from fastexit import regs as r
from strategies import GUEST_OPS, Config, Op, apply, describe, differences, masked, story


class Pair:
    """A library machine and the oracle, driven in step; every difference in what can be seen is an AssertionError.

    A vCPU that executes an instruction runs through the dispatcher, which takes the vCPU into the guest and so carries
    out what is pending: INIT and SIPI, NMIs, a fresh PPR. The oracle has no run loop, so both sides are brought to
    rest before and after: INIT/SIPI accepted, runnable, PPR recomputed. NMIs of a vCPU that ran are not counted.
    """

    def __init__(self, config: Config, machine: Any) -> None:
        self.config = config
        self.model = config.build(oracle.Machine)
        self.machine = machine
        self.history: list[Op] = []
        self.ran: set[int] = set()

    def step(self, op: Op) -> None:
        """One operation on both, then everything is compared."""
        self.history.append(op)
        if op[0] in GUEST_OPS:
            want, got = self._guest(op)
        else:
            want, got = apply(self.model, op), apply(self.machine, op)
            if op[0] == "events" and op[1] in self.ran:
                want, got = want[1], got[1]
            elif op[0] == "set_msr":
                want, got = (want, self.model.vcpus[op[1]].last_accepted), (got, self.machine.last_accepted)
        self.same(got, want, describe(op))
        for i, (model, vcpu) in enumerate(zip(self.model.vcpus, self.machine.vcpus)):
            page, other = masked(model.get_lapic()), masked(vcpu.get_lapic())
            if page != other:
                raise AssertionError(f"vCPU {i} {differences(page, other)} after {self.story()}")
            self.same(vcpu.apic_base, model.apic_base, f"vCPU {i} APICBASE")

    def at_rest(self) -> None:
        """What only shows when somebody asks: pending vectors, mp_state and events."""
        for i, (model, vcpu) in enumerate(zip(self.model.vcpus, self.machine.vcpus)):
            self.same(vcpu.pending(), model.pending(), f"vCPU {i} pending")
            events, expected = vcpu.events(), model.events()
            if i not in self.ran:
                self.same(events.nmi_pending, expected.nmi_pending, f"vCPU {i} NMIs")
            self.same(vcpu.get_mp_state(), model.get_mp_state(), f"vCPU {i} mp_state")
            deadline = r.MSR_TSC_DEADLINE
            self.same(vcpu.get_msr(deadline), model.get_msr(deadline), f"vCPU {i} deadline")

    def _guest(self, op: Op) -> tuple[Any, Any]:
        name, i, *arguments = op
        model, vcpu = self.model.vcpus[i], self.machine.vcpus[i]
        self.same(vcpu.get_mp_state(), model.get_mp_state(), f"vCPU {i} mp_state")
        self.same(vcpu.pending(), model.pending(), f"vCPU {i} pending")
        model.set_mp_state(r.MP_RUNNABLE)
        self.ran.add(i)
        want = getattr(model, name)(*arguments)
        rip = vcpu.rip
        if name == "guest_wrmsr":
            out = vcpu.wrmsr(*arguments)
            got = "ok" if out.fault is None else "gp", out.accepted
            if not model.pending_init:
                self.same(vcpu.rip - rip, r.INSN_LEN_WRMSR if want == "ok" else 0, f"vCPU {i} RIP")
            want = want, model.last_accepted
        else:
            got = getattr(vcpu, name)(*arguments)
            if name == "mmio_write" or want is None:
                got = want  # a write returns nothing to compare; a read that KVM drops leaves what was there
        self.same(vcpu.get_mp_state(), model.get_mp_state(), f"vCPU {i} mp_state")
        self.same(vcpu.pending(), model.pending(), f"vCPU {i} pending")
        return want, got

    def same(self, got: Any, want: Any, what: str) -> None:
        if got != want:
            raise AssertionError(f"{what}: expected {want!r}, got {got!r} after {self.story()}")

    def story(self) -> str:
        return story(self.config, self.history)


def first_difference(config: Config, factory: Callable[..., Any], ops: list[Op]) -> str | None:
    """Replays operations on a new pair; the text of the first difference."""
    pair = Pair(config, config.build(factory))
    try:
        for op in ops:
            pair.step(op)
        pair.at_rest()
    except AssertionError as difference:
        return str(difference)
    except IndexError:
        pass  # the vCPU that this operation names was created by one that was left out
    return None


def minimised(config: Config, factory: Callable[..., Any], ops: list[Op]) -> str:
    """The difference that a failing sequence shows, after leaving out every operation that it does not need."""
    size = len(ops)
    while size := size // 2:
        at = 0
        while at < len(ops):
            shorter = ops[:at] + ops[at + size :]
            if first_difference(config, factory, shorter) is None:
                at += size
            else:
                ops = shorter
    return first_difference(config, factory, ops) or "the difference does not show again on replay"
