"""What a VMX lab's program draws of NMIs, SMIs, INIT, SIPI and VMXON, beside what vmxdraw.py draws for all programs.

Models: nothing. vCPU 0, which INIT would let run at the reset vector, is sent none; nobody else has code there.
"""

from __future__ import annotations

import random
from typing import Any

from fastexit import layout as L
from fastexit import regs as R
from fastexit.kvm.lab.vmxcode import startup_vector
from fastexit.kvm.lab.vmxmodel import Player, Setup
from fastexit.kvm.lab.vmxsteps import Step

SHARE = 0.5
"""How many of a program's turns are about events."""
MSI = 0xFEE0_0000
ENABLED = 0x1FF
"""SVR: INIT disables the APIC."""


def steps(rng: random.Random, made: Setup, player: Player) -> list[Step]:
    """What one vCPU does next; nothing where what was drawn cannot be done."""
    running = [i for i, asleep in enumerate(player.seen.asleep) if not asleep]
    waiting = [i for i in range(made.vcpus) if player.waits[i]]
    i = rng.choice(running)
    if waiting and rng.random() < 0.4:
        return _sipi(rng, made, i, rng.choice(waiting))
    kinds = {_nmi: 0.3, _calls: 0.2, _smi: 0.15, _init: 0.2, _vmx: 0.25 * made.paged}
    drawn = rng.choices(list(kinds), list(kinds.values()))[0]
    return drawn(rng, made, player, i)


def may_spin(player: Player, step: Step) -> bool:
    """Whether a step kicks a vCPU that no halt uses up the kick of.

    A thread that waits for SIPI with a kick left spins until it comes, where the model's sleeps; up to 5.15 its timer
    is then not started again.
    """
    halted = [i for i, asleep in enumerate(player.seen.asleep) if asleep and not player.waits[i]]
    return step.kind == "vmcall" and step.args[2] < len(player.waits) and step.args[2] not in halted


def _icr(made: Setup, i: int, value: int) -> list[Step]:
    if made.x2apic:
        return [Step(i, "wrmsr", (R.MSR_X2APIC_ICR, value))]
    high = (value >> 32) << 24 & 0xFFFF_FFFF
    return [Step(i, "store", (R.APIC_ICR2, high, 4)), Step(i, "store", (R.APIC_ICR, value & 0xFFFF_FFFF, 4))]


def _others(made: Setup, player: Player) -> list[int]:
    """vCPUs that something can be done with."""
    return [i for i in range(made.vcpus) if not player.waits[i]]


def _nmi(rng: random.Random, made: Setup, player: Player, i: int, but: int | None = None) -> list[Step]:
    """To anybody but a vCPU that waits for SIPI, or will: it has no handler where it begins."""
    able = [j for j in _others(made, player) if j != but]
    shorthand = R.SH_NONE
    if len(able) == made.vcpus:
        shorthand = rng.choices((R.SH_NONE, R.SH_SELF, R.SH_ALLINC, R.SH_ALLBUT), (7, 1, 1, 1))[0]
    target = rng.choice(able)
    logical = made.x2apic and rng.random() < 0.2
    dest = 1 << target if logical else target
    value = R.icr(
        dest,
        rng.randrange(256),
        delivery=R.DM_NMI,
        logical=logical,
        level=rng.random() < 0.7,
        shorthand=shorthand,
    )
    return _icr(made, i, value)


def _smi(rng: random.Random, made: Setup, player: Player, i: int) -> list[Step]:
    """To one alone: all of them save their state at the same place."""
    return _icr(made, i, R.icr(rng.choice(_others(made, player)), delivery=R.DM_SMI, level=True))


def _msi(dest: int, delivery: int, vector: int = 0) -> tuple[Any, ...]:
    return -1, "signal_msi", MSI | dest << 12, delivery << 8 | vector


def _calls(rng: random.Random, made: Setup, player: Player, i: int) -> list[Step]:
    """Several events before an entry, which takes one after the other."""
    calls: list[tuple[Any, ...]] = []
    for _ in range(rng.choice((1, 2, 2, 3))):
        kind = rng.random()
        if kind < 0.35:
            calls.append((i, "nmi"))
        elif kind < 0.5:
            calls.append(_msi(i, R.DM_NMI))
        elif kind < 0.7:
            calls.append((i, "smi"))
        elif kind < 0.85:
            calls.append(_msi(i, R.DM_FIXED, rng.randrange(0x20, 0xFF)))
        elif i:
            calls.append(_msi(i, R.DM_INIT))
            if rng.random() < 0.7:
                calls.append(_msi(i, R.DM_STARTUP, startup_vector(i)))
    return [Step(i, "host", tuple(calls))] if calls else []


def _init(rng: random.Random, made: Setup, player: Player, i: int) -> list[Step]:
    """INIT, most often SIPI behind it, most often an APIC that is enabled then."""
    targets = [j for j in _others(made, player) if j and j != i]
    if not targets:
        return []
    target = rng.choice(targets)
    everybody = made.vcpus == 2 and i == 0 and rng.random() < 0.3
    shorthand = R.SH_ALLBUT if everybody else R.SH_NONE
    trigger = rng.random() < 0.5
    level = not trigger or rng.random() < 0.9
    found: list[Step] = []
    if player.machine.vcpus[target].vmxon and not player.seen.asleep[target] and rng.random() < 0.5:
        found.append(Step(target, "halt"))  # which an INIT that is blocked ended in old kernels
    found += _icr(made, i, R.icr(target, delivery=R.DM_INIT, level=level, trigger_level=trigger, shorthand=shorthand))
    if rng.random() < 0.2:
        found += _icr(made, i, R.icr(target, delivery=R.DM_INIT, trigger_level=True, shorthand=shorthand))
    if rng.random() < 0.2:
        found += _nmi(rng, made, player, i, target) if rng.random() < 0.5 and made.vcpus == 2 else []
    return found + _sipi(rng, made, i, target) if rng.random() < 0.8 else found


def _sipi(rng: random.Random, made: Setup, i: int, target: int) -> list[Step]:
    value = R.icr(target, startup_vector(target), delivery=R.DM_STARTUP, level=rng.random() < 0.7)
    if rng.random() < 0.15:
        return [Step(i, "host", (_msi(target, R.DM_STARTUP, startup_vector(target)),))]
    return _icr(made, i, value) * (1 + (rng.random() < 0.2))


def enabled(rng: random.Random, made: Setup, i: int) -> list[Step]:
    """A vCPU that began again, and has an APIC again."""
    if made.x2apic:
        found = [Step(i, "wrmsr", (R.MSR_X2APIC_BASE + (R.APIC_SPIV >> 4), ENABLED))]
    else:
        found = [Step(i, "store", (R.APIC_SPIV, ENABLED, 4))]
    return found + [Step(i, "sti")] * (rng.random() < 0.7)


def _vmx(rng: random.Random, made: Setup, player: Player, i: int) -> list[Step]:
    """VMXON and VMXOFF; with an INIT that had to wait, the latter passes the baton on before that comes."""
    v = player.machine.vcpus[i]
    latched = player.machine.mem[v.own + L.K_PENDING_EVENTS] & R.PENDING_INIT
    if v.vmxon is (rng.random() < 0.9):
        return [Step(i, "vmxoff", (1,) if v.vmxon and latched else ())]
    return [Step(i, "vmxon")]
