"""The library beside the oracle, driven in step, and the shortest story of a difference between them.

Models: nothing; what is compared when is said at `Pair`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import oracle
from fastexit import regs as r
from fastexit.outcome import Effect, Fastpath, Outcome
from fastexit.reasons import SvmExit, VmxExit
from oracle_run import GUEST, Result
from strategies import GUEST_OPS, Config, Op, apply, describe, differences, story

COMPLETIONS = {
    Fastpath.NONE: "none",
    Fastpath.REENTER_GUEST: "reenter",
    Fastpath.EXIT_HANDLED: "handled",
    Fastpath.SKIP_EMUL_INS: "skip",
}
SETTLE: Op = ("settle",)
"""Everybody out of the guest, and a look at all of them."""

EXITS = {
    "hlt": {"vmx": VmxExit.HLT, "svm": SvmExit.HLT},
    "host_interrupt": {"vmx": VmxExit.EXTERNAL_INTERRUPT, "svm": SvmExit.INTERRUPT},
}


class Pair:
    """A library machine and the oracle, driven in step; every difference in what can be seen is an AssertionError.

    After each operation what it returned is compared: for exits the path, the fault, how many APICs accepted, why
    user space was asked, whether the vCPU sleeps; and whom an interrupt asks the host to do what for. Looking at a vCPU
    takes it out of the guest: a pair that is *close* looks at all of them after each operation, and one that is not
    only when it settles: between, vCPUs stay in the guest or asleep, where ticks and kicks find them.
    """

    def __init__(self, config: Config, machine: Any, *, close: bool = True) -> None:
        self.config = config
        self.model = config.build(oracle.Machine)
        self.machine = machine
        self.close = close
        self.history: list[Op] = []

    def step(self, op: Op) -> None:
        """One operation on both, then everything that the pair looks at is compared."""
        self.history.append(op)
        if op == SETTLE:
            self.look()
            return
        on_vcpu = op[0] not in ("signal_msi", "set_time", "add_vcpu", "msr_filter", "enable_x2apic_api", "boot_x2apic")
        self.model.running = self.model.vcpus[op[1]] if on_vcpu else None
        self.model.told.clear()
        if op[0] in GUEST_OPS:
            want, got = self._exit(op)
        elif op[0] == "run":
            want, got = (kvm_run(m.vcpus[op[1]]) for m in (self.model, self.machine))
        else:
            want, got = apply(self.model, op), apply(self.machine, op)
            if op[0] == "set_msr":
                want, got = (want, self.model.vcpus[op[1]].last_accepted), (got, self.machine.last_accepted)
        self.same(got, want, "", op)
        if op[0] in GUEST_OPS or op[0] in ("set_msr", "signal_msi"):
            told = self.machine.vcpus[op[1]].targets if on_vcpu else self.machine.targets
            self.same([(vcpu, effect.name) for vcpu, effect in told], self.model.told, "targets of ", op)
        if self.close:
            self.look()

    def look(self) -> None:
        """What ioctls show without changing it, once PPR is fresh."""
        for i, (model, vcpu) in enumerate(zip(self.model.vcpus, self.machine.vcpus)):
            got, want = ((v.pending(), v.get_lapic(), v.apic_base, v.rip) for v in (vcpu, model))
            if got == want:  # as nearly always: no text is made for it
                continue
            self.same(got[0], want[0], f"vCPU {i} pending")
            if got[1] != want[1]:
                raise AssertionError(f"vCPU {i} {differences(want[1], got[1])} after {self.story()}")
            self.same(got[2], want[2], f"vCPU {i} APICBASE")
            self.same(got[3], want[3], f"vCPU {i} RIP")

    def at_rest(self) -> None:
        """Everything, and what is carried out when somebody asks: NMIs, INIT and SIPI."""
        self.look()
        for i, (model, vcpu) in enumerate(zip(self.model.vcpus, self.machine.vcpus)):
            events, expected = vcpu.events(), model.events()
            for name in ("nmi_pending", "nmi_masked", "latched_init", "smi_pending", "exception"):
                self.same(getattr(events, name), getattr(expected, name), f"vCPU {i} {name}")
            self.same(vcpu.get_mp_state(), model.get_mp_state(), f"vCPU {i} mp_state")
            deadline = r.MSR_TSC_DEADLINE
            self.same(vcpu.get_msr(deadline), model.get_msr(deadline), f"vCPU {i} deadline")
        self.same(self.machine.time, self.model.now, "the clock")
        self.look()

    def _exit(self, op: Op) -> tuple[Any, Any]:
        """One instruction or interrupt of a guest: its result on both sides, in the same terms."""
        name, i, *arguments = op
        model, vcpu = self.model.vcpus[i], self.machine.vcpus[i]
        if not model.in_guest and model.mp_state not in (r.MP_RUNNABLE, r.MP_UNINITIALIZED):
            model.set_mp_state(r.MP_RUNNABLE)
            vcpu.set_mp_state(r.MP_RUNNABLE)
        if name == "guest_wrmsr":
            want, got = (model.wrmsr(*arguments), None), (vcpu.wrmsr(*arguments), None)
        elif name in ("guest_rdmsr", "mmio_read"):
            want = (model.rdmsr if name == "guest_rdmsr" else model.page_read)(*arguments)
            code = self._read(name, vcpu, arguments)
            # what faults, or what KVM drops, leaves what was there
            got = code, vcpu.read_data if want[1] is not None and not want[0].fault else want[1]
        elif name == "mmio_write":
            want, got = (model.page_write(*arguments), None), (vcpu.mmio_write(*arguments), None)
        elif name == "hypercall":
            want = model.hypercall(*arguments)
            out = vcpu.hypercall(*arguments)
            got = out, vcpu.read_data
        else:
            want = getattr(model, name)(), None
            got = vcpu.exit(EXITS[name][self.config.vendor]), None
        if name != "guest_wrmsr":
            # an IPI by other ways than the ICR is counted by nobody
            want[0].accepted = got[0].accepted
        united = Effect.NONE
        for _, effect in vcpu.targets:
            united |= effect
        self.same(united, got[0].effects, "effects of ", op)
        self.same(got[0].targets, vcpu.targets, "targets in the outcome of ", op)
        return (spelt(want[0]), want[1]), (spelt(got[0]), got[1])

    def _read(self, name: str, vcpu: Any, arguments: list[Any]) -> Outcome:
        vendor = self.machine.dispatcher.vendor
        if name == "guest_rdmsr":
            return vcpu.exit(vendor.rdmsr_reason, msr=arguments[0])
        return vcpu.exit(vendor.mmio_reason, offset=arguments[0], size=arguments[1])

    def same(self, got: Any, want: Any, what: str, op: Op | None = None) -> None:
        if got != want:
            what += describe(op) if op else ""
            raise AssertionError(f"{what}: expected {want!r}, got {got!r} after {self.story()}")

    def story(self) -> str:
        return story(self.config, self.history)


def kvm_run(vcpu: Any) -> Any:
    """Whether the vCPU is in the guest behind KVM_RUN; "EINVAL" where it is refused."""
    try:
        return vcpu.run() in (GUEST, True)
    except ValueError:
        return "EINVAL"


def spelt(result: Result | Outcome) -> str:
    """A result in words, the same for both sides."""
    if isinstance(result, Outcome):
        completion, fault = COMPLETIONS[result.completion], result.fault is not None
    else:
        completion, fault = result.completion, result.fault
    words = [completion, f"accepted {result.accepted}"]
    words += ["#GP"] * fault + ["sleeps"] * result.blocked
    return ", ".join(words + ([result.user.name] if result.user is not None else []))


def first_difference(config: Config, factory: Callable[..., Any], ops: list[Op], *, close: bool = True) -> str | None:
    """Replays operations on a new pair; the text of the first difference."""
    pair = Pair(config, config.build(factory), close=close)
    try:
        for op in ops:
            if op[0] != "set_time" or op[1] >= pair.model.now:  # time that went back would be no difference
                pair.step(op)
        pair.at_rest()
    except AssertionError as difference:
        return str(difference)
    except (IndexError, ValueError):
        pass  # an operation that this one needs was left out, such as the one that created its vCPU
    return None


def minimised(config: Config, factory: Callable[..., Any], ops: list[Op], *, close: bool = True) -> str:
    """The difference that a failing sequence shows, after leaving out every operation that it does not need."""
    size = len(ops)
    while size := size // 2:
        at = 0
        while at < len(ops):
            shorter = ops[:at] + ops[at + size :]
            if first_difference(config, factory, shorter, close=close) is None:
                at += size
            else:
                ops = shorter
    found = first_difference(config, factory, ops, close=close)
    return found or f"the difference does not show again on replay of {story(config, ops)}"
