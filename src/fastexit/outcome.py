"""What one exit came to: enums, and the Outcome value that every door returns.

Kernels return one packed integer, the *code*; an Outcome is its readable form. The few hundred distinct codes that a
workload produces are kept, so that turning a code into an Outcome costs one dictionary look-up.
"""

from __future__ import annotations

from enum import IntEnum, IntFlag
from typing import NamedTuple

from fastexit.reasons import KvmExit
from fastexit.regs import Layout


class Path(IntEnum):
    """Which path emulated the exit. HARDWARE: there was none, the CPU did it."""

    SLOW = 0
    FAST = 1
    HARDWARE = 2


class Fastpath(IntEnum):
    """KVM's fastpath_t / exit_fastpath_completion: how far the fast handler got.

    SKIP_EMUL_INS is what the seed and 5.6-5.7 had: handled, but the instruction is still to be skipped in handle_exit.
    The kernel gave it -1 (seed) or 1; here every member has its own plain value.
    """

    NONE = 0
    REENTER_GUEST = 1
    EXIT_HANDLED = 2
    EXIT_USERSPACE = 3
    SKIP_EMUL_INS = 4


class Fault(IntEnum):
    """Exception that the exit injects into the guest."""

    UD = 6
    GP = 13


class Refusal(IntEnum):
    """Why the fast path declined; NONE when it was taken. Order is the order in which KVM tests."""

    NONE = 0
    NOT_AN_MSR_WRITE = 1
    SWITCHED_OFF = 2
    FAILED_VMENTRY = 3
    NESTED = 4
    NO_NEXT_RIP = 5
    SVM_EXIT_CODE = 6
    MSR = 7
    NOT_X2APIC = 8
    RESERVED_BITS = 9
    SHORTHAND = 10
    LOGICAL = 11
    DELIVERY_MODE = 12
    BROADCAST = 13
    NO_APIC_MAP = 14
    LOGICAL_MAP_UNUSABLE = 15
    NO_HV_TIMER = 16

    @property
    def text(self) -> str:
        """One line that a KVM reader understands."""
        return _REFUSAL_TEXT[self]


_REFUSAL_TEXT = {
    Refusal.NONE: "taken",
    Refusal.NOT_AN_MSR_WRITE: "exit has no fast handler",
    Refusal.SWITCHED_OFF: "fast path switched off",
    Refusal.FAILED_VMENTRY: "VM entry failed",
    Refusal.NESTED: "vCPU runs L2",
    Refusal.NO_NEXT_RIP: "no next RIP from hardware (NRIPS off)",
    Refusal.SVM_EXIT_CODE: "SVM exit code compared with VMX reason 32",
    Refusal.MSR: "MSR has no fast handler",
    Refusal.NOT_X2APIC: "APIC not in x2APIC mode",
    Refusal.RESERVED_BITS: "reserved ICR bits set",
    Refusal.SHORTHAND: "destination shorthand",
    Refusal.LOGICAL: "logical destination",
    Refusal.DELIVERY_MODE: "delivery mode is not Fixed",
    Refusal.BROADCAST: "broadcast destination",
    Refusal.NO_APIC_MAP: "no APIC map (aliased ids)",
    Refusal.LOGICAL_MAP_UNUSABLE: "logical map unusable",
    Refusal.NO_HV_TIMER: "VMX preemption timer not usable",
}


class Effect(IntFlag):
    """What the host has to do for the targets of one exit."""

    NONE = 0
    NOTIFY = 1
    """Send the notification of the target's descriptor: its NV (0xF2, or 0xF1 once it blocks) to its pCPU NDST."""
    WAKE = 2
    """Wake the target's thread, which blocks."""
    KICK = 4
    """Send the reschedule IPI to the target's pCPU: it has to leave the guest."""
    DOORBELL = 8
    """Ring the AVIC doorbell of the target's pCPU."""


class Target(NamedTuple):
    """A vCPU's index, and what the host has to do for it: one Effect."""

    vcpu: int
    effect: Effect


CODE = Layout(64, COMPLETION=8, PATH=8, FAULT=8, REFUSAL=8, ACCEPTED=16, USER=8, EFFECTS=4, MSR_WHY=2, BLOCKED=1, _63=1)
"""The packed integer, its fields on byte borders so that layout.OUTCOME can name them. FAULT is the exception vector or
0, ACCEPTED a signed count (-1: nobody matched in the slow scan), USER is KVM_EXIT_* + 1 or 0. MSR_WHY is set between
kernels only: why an MSR access failed, MSR_WHY_* or 0 for a bad value."""
CODE_COMPLETION = CODE.mask("COMPLETION")
CODE_NOT_IN_GUEST = CODE_COMPLETION
"""No outcome: the vCPU has to enter the guest before it can exit."""
CODE_FAST = CODE.mask("PATH") & -CODE.mask("PATH")
CODE_FAULT = CODE.mask("FAULT")
CODE_GP = Fault.GP.value << CODE.shift("FAULT")
CODE_UD = Fault.UD.value << CODE.shift("FAULT")
CODE_REFUSAL_SHIFT = CODE.shift("REFUSAL")
CODE_ACCEPTED_SHIFT = CODE.shift("ACCEPTED")
CODE_ACCEPTED_NONE = CODE.mask("ACCEPTED")
CODE_USER_SHIFT = CODE.shift("USER")
CODE_USER = CODE.mask("USER")
CODE_EFFECTS_SHIFT = CODE.shift("EFFECTS")
CODE_BLOCKED = CODE.mask("BLOCKED")
CODE_HARDWARE = Path.HARDWARE << CODE.shift("PATH")
CODE_MSR_WHY = CODE.mask("MSR_WHY")
CODE_MSR_WHY_SHIFT = CODE.shift("MSR_WHY")
CODE_EXIT = CODE.mask("_63")
"""No outcome: the CPU could not do it. It exits with the reason in bits 47:32; bits 31:0 are the qualification."""
CODE_EXIT_REASON_SHIFT = 32
MSR_WHY_UNKNOWN = 1 << CODE.shift("MSR_WHY")
MSR_WHY_FILTER = 2 << CODE.shift("MSR_WHY")
CODE_EFFECTS = CODE.mask("EFFECTS")
CODE_DELIVERY = CODE.mask("EFFECTS", "ACCEPTED")

TARGETS = Layout(64, VCPU=12, EFFECT=4, _31_16=16, COUNT=32)
"""Whom an exit's effects are for: how many targets there are, and the first one with what the host has to do for it.
The low 16 bits are a target in layout.TARGETS too, where the others are. The same vCPU may be there twice."""
TARGETS_VCPU = TARGETS.mask("VCPU")
TARGETS_EFFECT_SHIFT = TARGETS.shift("EFFECT")
TARGETS_COUNT_SHIFT = TARGETS.shift("COUNT")
TARGETS_ONE = 1 << TARGETS_COUNT_SHIFT
TARGETS_NOTIFY = TARGETS_ONE | Effect.NOTIFY << TARGETS_EFFECT_SHIFT
TARGETS_FROM_CODE = CODE_EFFECTS_SHIFT - TARGETS_EFFECT_SHIFT

COMPLETION_NONE = Fastpath.NONE.value
COMPLETION_REENTER = Fastpath.REENTER_GUEST.value
COMPLETION_HANDLED = Fastpath.EXIT_HANDLED.value
COMPLETION_USERSPACE = Fastpath.EXIT_USERSPACE.value
COMPLETION_SKIP = Fastpath.SKIP_EMUL_INS.value


class Outcome:
    """The result of one exit. Immutable; two are equal when their codes are, whoever the targets were.

    Attributes:
        path: Path.FAST when the fast handler emulated the exit, Path.HARDWARE when there was none, else Path.SLOW.
        completion: Fastpath as the vCPU loop saw it last (a REENTER_GUEST that a pending request turned into
            EXIT_HANDLED shows as EXIT_HANDLED).
        fault: Fault.GP when the guest gets #GP(0) and its RIP did not move, else None.
        accepted: number of APICs that accepted the IPI; -1 when the slow scan matched nobody; 0 without an IPI.
        effects: what the host must do for the targets (Effect flags, united over all targets).
        targets: each target with what the host must do for it, in the order of sending. One that accepted the interrupt
            and needs nothing is not among them.
        refusal: why the fast path declined (Refusal).
        user: the KVM_EXIT_* reason with which the vCPU left to user space, or None when it runs on.
        blocked: True when the vCPU waits for SIPI instead of having entered the guest again.
        reentered: True when the vCPU went straight back into the guest from the fast path.
        cycles_ipi, cycles: modelled time until the IPI left and until the guest runs again; None unless the machine has
            ``costs`` (meter.TimedOutcome).
    """

    __slots__ = (
        "code",
        "path",
        "completion",
        "fault",
        "accepted",
        "effects",
        "refusal",
        "user",
        "blocked",
        "reentered",
        "targets",
    )

    code: int
    path: Path
    completion: Fastpath
    fault: Fault | None
    accepted: int
    effects: Effect
    refusal: Refusal
    user: KvmExit | int | None
    blocked: bool
    reentered: bool
    targets: tuple[Target, ...]
    cycles_ipi: int | None = None
    cycles: int | None = None

    def __init__(self, code: int) -> None:
        f = CODE.decode(code)
        put = object.__setattr__
        put(self, "code", code)
        put(self, "path", Path(f["PATH"]))
        put(self, "completion", Fastpath(f["COMPLETION"]))
        put(self, "fault", Fault(f["FAULT"]) if f["FAULT"] else None)
        put(self, "accepted", (f["ACCEPTED"] ^ 0x8000) - 0x8000)
        put(self, "effects", Effect(f["EFFECTS"]))
        put(self, "refusal", Refusal(f["REFUSAL"]))
        put(self, "user", KvmExit(f["USER"] - 1) if f["USER"] else None)
        put(self, "blocked", bool(f["BLOCKED"]))
        put(self, "reentered", f["COMPLETION"] == COMPLETION_REENTER)
        put(self, "targets", ())

    def to(self, targets: tuple[Target, ...]) -> Outcome:
        """The same outcome, with these targets."""
        told = object.__new__(type(self))
        for name in Outcome.__slots__:
            object.__setattr__(told, name, getattr(self, name))
        object.__setattr__(told, "targets", targets)
        return told

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError("an Outcome cannot be changed")

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Outcome) and other.code == self.code

    def __hash__(self) -> int:
        return hash(self.code)

    def as_dict(self) -> dict[str, object]:
        """All attributes with plain values, for JSON."""
        return {
            "path": self.path.name,
            "completion": self.completion.name,
            "fault": self.fault.name if self.fault else None,
            "accepted": self.accepted,
            "effects": [e.name for e in Effect if e in self.effects],
            "targets": [{"vcpu": target.vcpu, "effect": target.effect.name} for target in self.targets],
            "refusal": self.refusal.name,
            "user": self.user.name if isinstance(self.user, KvmExit) else self.user,
            "blocked": self.blocked,
        }

    def __repr__(self) -> str:
        parts = [self.path.name, self.completion.name, f"accepted={self.accepted}"]
        if self.fault:
            parts.append(f"fault={self.fault.name}")
        if self.effects:
            parts.append(f"effects={'|'.join(e.name or '' for e in Effect if e in self.effects)}")
        if self.refusal:
            parts.append(f"refusal={self.refusal.name}")
        if self.user is not None:
            parts.append(f"user={self.user.name if isinstance(self.user, KvmExit) else self.user}")
        if self.blocked:
            parts.append("blocked")
        return f"Outcome({', '.join(parts)})"


KEPT = 1 << 16
"""Codes come from kernels and are few; what a caller makes up must not grow a table without bound."""


class _Outcomes(dict[int, Outcome]):
    """code -> Outcome, filled on first sight."""

    def __missing__(self, code: int) -> Outcome:
        outcome = Outcome(code)
        if len(self) < KEPT:
            self[code] = outcome
            if outcome.reentered and not outcome.effects:
                REENTRIES[code] = outcome
        return outcome


REENTRIES: dict[int, Outcome] = {}
"""What a fast exit's door gives -> Outcome, as far as it is known: codes of exits that end in the guest again and have
no effects, and those with CODE_ADDRESSED. A look-up tells all of it."""
OUTCOMES = _Outcomes()
SENT = CODE_FAST | COMPLETION_REENTER
SHORT = [OUTCOMES[SENT | accepted << CODE_ACCEPTED_SHIFT] for accepted in range(2)]
"""What an IPI comes to for which the host has nothing to do, by its short code, which no code is as small as: ACCEPTED.
An int this small exists already, and a list gives its Outcome faster than a dictionary does."""
SHORT_CODES = len(SHORT)
CODE_ADDRESSED = CODE_EXIT
"""No outcome code but what a door makes of one for one target: the target's 16 bits are in ACCEPTED, and what was there
in the two bits of MSR_WHY."""
ADDRESSED_MOST = CODE_MSR_WHY >> CODE_MSR_WHY_SHIFT
"""What ACCEPTED may be at most."""


def addressed(code: int) -> Outcome:
    """The Outcome of CODE_ADDRESSED; it is kept in REENTRIES."""
    target = target_of(code >> CODE_ACCEPTED_SHIFT)
    accepted = (code & CODE_MSR_WHY) >> CODE_MSR_WHY_SHIFT
    plain = code & ~(CODE_ADDRESSED | CODE_MSR_WHY | CODE_ACCEPTED_NONE) | accepted << CODE_ACCEPTED_SHIFT
    outcome = OUTCOMES[plain].to((target,))
    if len(REENTRIES) < KEPT:
        REENTRIES[code] = outcome
    return outcome


def target_of(entry: int) -> Target:
    """One target of a list, from its 16 bits."""
    return Target(entry & TARGETS_VCPU, Effect(entry >> TARGETS_EFFECT_SHIFT & 0xF))


class UserRead(int):
    """What a read gives that is user space's to answer: 0. Vcpu.user_mmio or user_io is the access.

    ``user`` is the KVM_EXIT_* with which the vCPU left. Vcpu.complete_access gives the answer.
    """

    user: KvmExit

    def __repr__(self) -> str:
        return f"<UserRead {self.user.name}>"


_USER_READS: dict[int, UserRead] = {}


def user_read(code: int, got: int) -> int:
    """What a read gives: a UserRead where its outcome code leaves it to user space, else what it got.

    A vCPU may leave for another reason behind a read that is done: a window, a signal, a single step.
    """
    reason = (code & CODE_USER) >> CODE_USER_SHIFT
    if reason - 1 not in (KvmExit.MMIO, KvmExit.IO, KvmExit.X86_RDMSR):
        return got
    if reason not in _USER_READS:
        read = UserRead(0)
        read.user = KvmExit(reason - 1)
        _USER_READS[reason] = read
    return _USER_READS[reason]


class GeneralProtection(Exception):
    """The guest's access faults: #GP(0) is injected and RIP does not move."""


class InvalidOpcode(Exception):
    """The guest's instruction is none here: #UD is injected and RIP does not move."""
