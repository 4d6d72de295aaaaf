"""Random guest programs of the VMX lab: drawn while the model carries them out, so that each step can be done.

Models: nothing.
"""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

from fastexit import regs as R
from fastexit.kvm.lab import vmxevents
from fastexit.kvm.lab.vmxcode import OPEN, SLOWER
from fastexit.kvm.lab.vmxmodel import TSC_KHZ, Player, Setup
from fastexit.kvm.lab.vmxsteps import Step

STEPS = 16
DEADLINE, SPENT = 400_000, 700_000
"""Ticks; a deadline is far enough for the steps before its end to be over."""
BY_ONE = 0xB
"""TDCR: the timer counts once a nanosecond."""
X2 = R.MSR_X2APIC_BASE
READABLE = (0x02, 0x03, 0x08, 0x0A, 0x0D, 0x0F, 0x28, 0x2F, 0x30, 0x32, 0x33, 0x34, 0x35, 0x36, 0x37, 0x38, 0x3E)
VECTORED = tuple(range(0x10, 0x28))
ODD = (0x00, 0x04, 0x09, 0x0B, 0x0C, 0x0E, 0x2A, 0x31, 0x39, 0x3F, 0x40, 0xFF)
LVTS = (R.APIC_LVTT, R.APIC_LVTTHMR, R.APIC_LVTPC, R.APIC_LVT0, R.APIC_LVT1, R.APIC_LVTERR)
KINDS = ("guest", "posted", "halts", "timers", "host")


def setup(rng: random.Random, *, apicv: bool, x2apic: bool, events: bool = False) -> Setup:
    """A VM; ``events``: of a program with NMI, SMI, INIT, SIPI and VMXON."""
    made = Setup(
        vcpus=rng.choice((2, 2, 3)), apicv=apicv, x2apic=x2apic, split=rng.random() < 0.2, eoi=rng.random() < 0.75
    )
    return replace(made, events=True, paged=rng.random() < 0.5) if events else made


def program(rng: random.Random, made: Setup, kernel: str, count: int = STEPS) -> tuple[list[Step], Player]:
    """Steps, and the model that has done them all: fewer where an INIT has left nobody who goes on."""
    player = Player(made, kernel)
    steps: list[Step] = []
    while len(steps) < count and _awake(player):
        waiting = list(player.waits)
        for step in _drawn(rng, made, player):
            steps.append(step)
            player.step(step)
        for i, waited in enumerate(waiting):
            if waited and not player.seen.asleep[i] and rng.random() < 0.8:
                for step in vmxevents.enabled(rng, made, i):
                    steps.append(step)
                    player.step(step)
    return steps, player


def _drawn(rng: random.Random, made: Setup, player: Player) -> list[Step]:
    """What comes next, of events where the program has any."""
    if made.events and rng.random() < vmxevents.SHARE:
        return vmxevents.steps(rng, made, player)
    found = _next(rng, made, player)
    return [] if made.events and any(vmxevents.may_spin(player, step) for step in found) else found


def _awake(player: Player) -> list[int]:
    return [i for i, asleep in enumerate(player.seen.asleep) if not asleep]


def _next(rng: random.Random, made: Setup, player: Player) -> list[Step]:
    awake = _awake(player)
    i = rng.choice(awake)
    kind = rng.random()
    if kind < 0.36:
        return [_ipi(rng, made, i)]
    if kind < 0.46:
        closes = i != OPEN and not player.masked[i] and rng.random() < 0.4
        return [Step(i, "cli" if closes else "sti")]
    if kind < 0.56 and len(awake) > 1:
        return [Step(i, "halt")]
    if kind < 0.60 and made.x2apic:
        return _timer(rng, made, awake, i)
    if kind < 0.68:
        return [Step(i, "host", _calls(rng, made, i))]
    if kind < 0.72:
        return _kick(rng, made, awake, i)
    if kind < 0.74 and made.x2apic and player.masked[i]:
        return _disabled(rng, made, i)
    return [_register(rng, made, i)]


def _vector(rng: random.Random) -> int:
    return rng.choice((rng.randrange(16, 255), rng.randrange(0x20, 255), 0x31, 0x41, 0xEC, 0xFD))


def _icr(rng: random.Random, made: Setup) -> int:
    logical = rng.random() < 0.3
    if logical:
        dest = rng.choice((1, 2, 3, 4, 7, 0x10001)) if made.x2apic else rng.choice((0, 1, 0xFF))
    else:
        dest = rng.choice((0, 1, 2, 0, 1, 2, 3, 0xFF, R.X2APIC_BROADCAST if made.x2apic else 0xFF))
    vector = _vector(rng) if rng.random() < 0.97 else rng.randrange(16)
    shorthand = rng.choices((R.SH_NONE, R.SH_SELF, R.SH_ALLINC, R.SH_ALLBUT), (8, 1, 1, 1))[0]
    mode = R.DM_LOWEST if logical and rng.random() < 0.15 else R.DM_FIXED
    return R.icr(dest, vector, delivery=mode, logical=logical, level=rng.random() < 0.3, shorthand=shorthand)


def _ipi(rng: random.Random, made: Setup, i: int) -> Step:
    value = _icr(rng, made)
    if made.x2apic:
        if rng.random() < 0.1:
            return Step(i, "wrmsr", (R.MSR_X2APIC_SELF_IPI, _vector(rng)))
        return Step(i, "wrmsr", (R.MSR_X2APIC_ICR, value))
    if rng.random() < 0.4:
        return Step(i, "store", (R.APIC_ICR2, (value >> 32) << 24 & 0xFFFF_FFFF, 4))
    return Step(i, "store", (R.APIC_ICR, value & 0xFFFF_FFFF, 4))


def _timer(rng: random.Random, made: Setup, awake: list[int], i: int) -> list[Step]:
    """A deadline or a one-shot on vCPU i, which may sleep, and time that passes on another, or on itself."""
    vector = _vector(rng)
    deadline, spent = _ticks(made)
    if rng.random() < 0.5:
        steps = [
            Step(i, "wrmsr", (X2 + (R.APIC_LVTT >> 4), R.LVT_TIMER_DEADLINE | vector)),
            Step(i, "deadline", (deadline,)),
        ]
    else:
        steps = [
            Step(i, "wrmsr", (X2 + (R.APIC_LVTT >> 4), vector)),
            Step(i, "wrmsr", (X2 + (R.APIC_TDCR >> 4), BY_ONE)),
            Step(i, "wrmsr", (X2 + (R.APIC_TMICT >> 4), deadline * 1_000_000 // TSC_KHZ)),
        ]
    if len(awake) > 1:
        other = rng.choice([j for j in awake if j != i])
        if rng.random() < 0.5:
            steps.append(Step(i, "halt"))
        steps.append(Step(other, "spend", (spent,)))
    else:
        steps.append(Step(i, "spend", (spent,)))
    return steps


def _kick(rng: random.Random, made: Setup, awake: list[int], i: int) -> list[Step]:
    """A PV kick of any vCPU, which may sleep; of one that runs, and that is told to run before it halts, too."""
    others = [j for j in awake if j != i]
    target = rng.choice(others) if others and rng.random() < 0.5 else rng.randrange(made.vcpus + 1)
    steps = [Step(i, "vmcall", (R.HC_KICK_CPU, 0, target, 0, 0))]
    if target in others:
        if rng.random() < 0.5:
            steps.append(Step(target, "host", ((target, "set_mp_state", R.MP_RUNNABLE),)))
        steps.append(Step(target, "halt"))
    return steps


def _ticks(made: Setup) -> tuple[int, int]:
    """A deadline's and those in which it is over."""
    times = SLOWER if made.events else 1
    return DEADLINE * times, SPENT * times


def _disabled(rng: random.Random, made: Setup, i: int) -> list[Step]:
    """A deadline that is read while the APIC is off; behind it all is as it was, and the deadline over."""
    deadline, spent = _ticks(made)
    off = R.APIC_DEFAULT_PHYS_BASE | R.APICBASE_BSP * (i == 0)
    written: list[Step] = [
        Step(i, "wrmsr", (X2 + (R.APIC_LVTT >> 4), R.LVT_MASKED | R.LVT_TIMER_DEADLINE | _vector(rng)))
    ]
    written.append(Step(i, "deadline", (deadline,)))
    for base in (off, off | R.APICBASE_EN, off | R.APICBASE_EN | R.APICBASE_EXTD):
        written.append(Step(i, "wrmsr", (R.MSR_APICBASE, base)))
        if base == off or rng.random() < 0.5:
            written.append(Step(i, "rdmsr", (R.MSR_TSC_DEADLINE,)))
    return [*written, Step(i, "wrmsr", (X2 + (R.APIC_SPIV >> 4), 0x1FF)), Step(i, "spend", (spent,))]


def _calls(rng: random.Random, made: Setup, i: int) -> tuple[tuple[Any, ...], ...]:
    kind = rng.random()
    if kind < 0.6:
        return ((-1, "signal_msi", 0xFEE0_0000 | rng.randrange(3) << 12, _vector(rng)),)
    if kind < 0.8 and made.x2apic:
        return ((i, "set_msr", R.MSR_X2APIC_ICR, _icr(rng, made)),)
    return ((i, "get_msr", rng.choice((R.MSR_APICBASE, R.MSR_TSC_DEADLINE, X2 + 8, X2 + 0x20))),)


def _register(rng: random.Random, made: Setup, i: int) -> Step:
    offset = rng.choice(READABLE * 2 + VECTORED + ODD)
    writes = rng.random() < 0.5
    tpr = rng.randrange(256) if rng.random() < 0.9 else 0x100
    value = rng.choice((0, rng.getrandbits(8), rng.getrandbits(32)))
    place = rng.choice((0x08, 0x08, 0x0B, *(lvt >> 4 for lvt in LVTS), 0x3E, 0x38, 0x28, offset))
    if place == 0x08:
        value = tpr
    elif place << 4 in LVTS:
        value = R.LVT_MASKED | _vector(rng)
    elif place in (0x0B, 0x28):
        value = 0 if rng.random() < 0.8 else value
    elif place in (0x0F, 0x38):
        writes = False
    elif place << 4 == R.APIC_ICR and value >> 8 & 7 in (R.DM_SMI, R.DM_INIT):
        value &= ~(7 << 8)  # either takes its target away from its program
    if made.x2apic:
        return Step(i, "wrmsr", (X2 + place, value)) if writes else Step(i, "rdmsr", (X2 + offset,))
    length = rng.choices((4, 2, 1), (8, 1, 1))[0]
    if writes:
        return Step(i, "store", (place << 4 & 0xFF0, value & 0xFFFF_FFFF & (1 << 8 * length) - 1, length))
    return Step(i, "load", (offset << 4 & 0xFF0, 0x5A5A_5A5A, length))
