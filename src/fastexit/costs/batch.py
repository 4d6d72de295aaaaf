"""Modelled time of a batch: cycles of the outcomes that Machine.run gave, as far as the records tell.

The stages are those of dispatcher.py, put together here from an outcome's code instead of being seen; tests compare
the two.
What a record does not tell is NaN: which target of a multicast needed what, where they needed different things, which
timer a write set, what the entry behind an exit that did not re-enter had to do.
"""

from __future__ import annotations

import math
import warnings
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from fastexit import hyperv as HV
from fastexit import layout as L
from fastexit import regs as R
from fastexit.costs.meter import EFFECT_STAGES, Meter, Work, accesses_msr, charge_hyperv, pointer_calls, work_of
from fastexit.costs.profile import CostProfile, Costs, cost_profile
from fastexit.exits.exit import Exit
from fastexit.outcome import CODE_EFFECTS, OUTCOMES, TARGETS_COUNT_SHIFT, Effect, Fastpath, Outcome, Path, Refusal
from fastexit.traits import Trait

if TYPE_CHECKING:
    from fastexit.machine import Machine
    from fastexit.vcpu import Vcpu

_BEFORE_SRCU = frozenset({Refusal.SWITCHED_OFF, Refusal.FAILED_VMENTRY, Refusal.NESTED, Refusal.NO_NEXT_RIP})
_NONE = (math.nan, math.nan)
_MODE = R.ICR.mask("DM")


def batch_cycles(
    machine: Machine,
    exits: np.ndarray,
    outcomes: np.ndarray,
    costs: Costs | None = None,
    *,
    quiet: bool = False,
) -> tuple[np.ndarray, np.ndarray]:
    """``cycles_ipi`` and ``cycles`` of every exit of a batch: float64 arrays, NaN where there is none or none is known.

    ``exits`` and ``outcomes`` are what Machine.run took and gave; ``costs`` is a cost profile or its name, by default
    the machine's. ``quiet``: the caller's word that no vCPU had a request, tick or kick pending when it entered;
    without it, only exits that re-entered the guest have ``cycles``. Timers, EOI, TPR and whatever else may leave a
    request to its own vCPU stay NaN. ValueError for arrays that do not belong together, or without a profile.
    """
    if costs is None and machine.costs is None:
        raise ValueError("no cost profile: give costs, or make the machine with one")
    profile = machine.costs if costs is None else cost_profile(costs)
    for array, dtype, what in ((exits, L.EXIT, "exits"), (outcomes, L.OUTCOME, "outcomes")):
        if not isinstance(array, np.ndarray) or array.dtype != dtype or array.ndim != 1:
            raise ValueError(f"{what} are no one-dimensional array of that dtype of fastexit.layout")
    if len(exits) != len(outcomes):
        raise ValueError(f"{len(exits)} exits and {len(outcomes)} outcomes")
    if len(exits) and int(exits["vcpu"].max()) >= len(machine.vcpus):
        raise ValueError(f"vCPU {exits['vcpu'].max()} of {len(machine.vcpus)}")
    assert profile is not None
    _warn_of_strangers(machine)
    keys = np.empty((len(exits), 4), dtype=np.uint64)
    mmio = exits["reason"] == machine.dispatcher.vendor.mmio_reason
    ioapic = exits["gpa"] >> np.uint64(12) == R.IOAPIC_DEFAULT_BASE >> 12
    page = np.where(ioapic, exits["gpa"], exits["gpa"] & np.uint64(R.APIC_PAGE_BYTES - 1))
    where = np.where(mmio, page, exits["msr"])
    keys[:, 0] = exits["reason"].astype(np.uint64) << np.uint64(32) | where
    keys[:, 1] = exits["info"].astype(np.uint64) << np.uint64(1) | _concerns_sender(machine, exits)
    keys[:, 2] = outcomes["code"]
    keys[:, 3] = np.where(outcomes["code"] & np.uint64(CODE_EFFECTS), outcomes["value"] >> TARGETS_COUNT_SHIFT, 0)
    found, place = np.unique(keys, axis=0, return_inverse=True)
    kinds = found.tolist()
    rows = [_cycles(machine, profile, at, info, code, told, quiet) for at, info, code, told in kinds]
    table = np.array(rows).reshape(-1, 2)
    place = place.reshape(-1)
    return table[place, 0], table[place, 1]


def _warn_of_strangers(machine: Machine) -> None:
    """Say that vCPUs were never in the guest: an IPI to one notifies nobody, so it costs less than one between vCPUs
    that run.
    """
    strangers = sum(1 for v in machine.vcpus if not machine.mem[v.own + L.K_EXITS] and not _has_run(machine, v))
    if strangers:
        what = f"{strangers} of {len(machine.vcpus)} vCPUs {'has' if strangers == 1 else 'have'} never run"
        warnings.warn(f"{what}: IPIs to them notify nobody (fastexit.workload enters them first)", RuntimeWarning, 3)


def _has_run(machine: Machine, v: Vcpu) -> bool:
    return bool(machine.mem[v.own + L.K_IN_RUN]) or machine.mem[v.hot + L.HOT_MODE] != R.OUTSIDE_GUEST_MODE


def _concerns_sender(machine: Machine, exits: np.ndarray) -> np.ndarray:
    """1 for every write that might leave a request to its own vCPU, were it an ICR."""
    value = exits["value"]
    ids = np.array([v.vcpu_id for v in machine.vcpus], dtype=np.uint64)
    shorthand = (value & np.uint64(R.ICR.mask("SHORTHAND"))) >> np.uint64(R.ICR.shift("SHORTHAND"))
    logical = value & np.uint64(R.ICR.mask("DEST_MODE")) != 0
    dest = value >> np.uint64(32)
    elsewhere = ~logical & (dest != ids[exits["vcpu"]]) & (dest != R.XAPIC_BROADCAST) & (dest != R.X2APIC_BROADCAST)
    # The page's destination is in another register, that of Hyper-V's ICR in bits that go by the sender's mode.
    other = (exits["reason"] == machine.dispatcher.vendor.mmio_reason) | (exits["msr"] == HV.MSR_HV_ICR)
    safe = np.where(shorthand == 0, elsewhere & ~other, shorthand == R.Shorthand.ALL_BUT_SELF)
    posted = all(v.apicv for v in machine.vcpus) & ((value & np.uint64(_MODE)) >> np.uint64(R.ICR.shift("DM")) <= 1)
    concerns: np.ndarray = ~(safe | posted)
    return concerns.astype(np.uint64)


def _cycles(
    machine: Machine, profile: CostProfile, where: int, info: int, code: int, told: int, quiet: bool
) -> tuple[float, float]:
    """The two numbers of one kind of record, for some of whose targets, ``told`` of them, there was something to do."""
    reason, msr = where >> 32, where & 0xFFFF_FFFF
    info, concerns_sender = info >> 1, bool(info & 1)
    if reason in (L.NOTIFICATION, L.IRQ_LINE):
        return _NONE
    loop, config = machine.dispatcher, machine.mem[L.H_CONFIG]
    vendor, out = loop.vendor, OUTCOMES[code]
    if out.path is Path.HARDWARE:
        return _NONE
    mmio = reason == vendor.mmio_reason
    exit = (
        Exit(reason, gpa=msr, size=info & ~L.MMIO_WRITE, write=bool(info & L.MMIO_WRITE))
        if mmio
        else Exit(reason, msr, info1=info)
    )
    work = work_of(vendor, exit)
    control = info << 32 | msr if reason == vendor.hypercall_reason and _runs_on_hyperv(machine) else None
    meter = Meter(profile, pointer_calls(machine.kernel))
    charge = partial(meter.charge, "")
    fast_run = not loop.hook_irqoff and reason in vendor.fast_run
    fast_irqoff = loop.hook_irqoff and reason in vendor.fast_irqoff
    fast = out.path is Path.FAST
    known = True
    for stage in ("vm_exit", "mitigation_exit", "exit_info"):
        charge(stage)
    if fast_run:
        charge("fast_check")
        srcu = _takes_srcu(machine, exit, out)
        if srcu:
            charge("srcu_lock")
        if fast:
            known = _handler(meter, work, out, told, False)
        if srcu:
            charge("srcu_unlock")
    if not out.reentered:
        charge("guest_mode_outside")
        charge("irqoff_handler")
        if fast_irqoff:
            charge("fast_check")
            if fast:
                known = _handler(meter, work, out, told, False)
        if reason == vendor.interrupt_reason:
            charge("host_irq")
        for stage in ("irq_window", "guest_time_stop", "srcu_lock", "vapic_sync"):
            charge(stage)
        if out.completion != Fastpath.EXIT_USERSPACE:
            charge("exit_checks")
            if out.completion == Fastpath.SKIP_EMUL_INS:
                charge("skip")
            elif out.completion == Fastpath.NONE:
                nested = out.refusal is Refusal.NESTED or any(v.nested for v in machine.vcpus)
                if machine.mem[L.H_HANDLERS] or nested:
                    return _NONE
                direct = vendor.rows[reason].shortcut and config & L.CONFIG_RETPOLINE
                charge("dispatch_direct" if direct else "dispatch_indirect")
                known = _handler(meter, work, out, told, accesses_msr(vendor, reason), control, len(machine.vcpus))
    ipi = float(meter.ipi) if known and meter.ipi is not None else math.nan
    if not known or work.timer or out.user is not None or out.blocked:
        return ipi, math.nan
    if machine.mem[L.H_TIMER_ADVANCE_NS]:
        return ipi, math.nan
    if not out.reentered:
        apicvs = {bool(v.apicv) for v in machine.vcpus}
        if not quiet or len(apicvs) > 1 or not _leaves_nothing(machine, exit, work.stages, out, concerns_sender):
            return ipi, math.nan
        charge("loop_tail")
        if out.fault:
            for stage in ("requests", "event_check", "inject"):
                charge(stage)
        for stage in ("prepare_switch", "irqs_off", "enter_mode", "srcu_unlock", "guest_state"):
            charge(stage)
        (apicv,) = apicvs
        meter.call("", "sync_pir" if apicv else "cr8_intercept", int(apicv or out.fault is not None))
        for stage in ("mitigation_entry", "vm_entry"):
            charge(stage)
    else:
        for stage in ("reenter", "mitigation_entry", "vm_entry"):
            meter.direct("", stage)
    return ipi, float(meter.spent)


def _takes_srcu(machine: Machine, exit: Exit, out: Outcome) -> bool:
    """The fast handler took SRCU: it is a generation that does, and no guard stood before it."""
    if not machine.profile.traits & Trait.SRCU_IN_FASTPATH or out.refusal in _BEFORE_SRCU:
        return False
    row = machine.dispatcher.vendor.rows[exit.reason]
    return row.srcu and (row.work != "msr" or bool(exit.info1))


def _runs_on_hyperv(machine: Machine) -> bool:
    """Whether the guest's hypercalls are Hyper-V's, as things are behind the batch."""
    mem = machine.mem
    gated = machine.profile.traits & Trait.GATED and not mem[L.H_CONFIG] & L.CONFIG_HYPERV
    return bool(mem[L.H_HV_GUEST_OS_ID] and mem[L.H_CONFIG] & L.CONFIG_KVM_HYPERV and not gated)


def _handler(
    meter: Meter,
    work: Work,
    out: Outcome,
    told: int,
    generic_msr: bool,
    control: int | None = None,
    vcpus: int = 0,
) -> bool:
    """What TimedDispatcher._work charges; False when the record does not tell."""
    if generic_msr:
        meter.charge("", "msr_access")
    if out.fault or (out.user is not None and out.path is not Path.FAST):
        return True
    if control is not None:
        charge_hyperv(meter, "", control, vcpus, out.accepted > 0)
    else:
        for stage in work.stages:
            meter.charge("", stage)
    if ("icr" in work.stages or control is not None) and out.accepted > 0:
        effects = [effect for effect in Effect if effect & out.effects]
        if len(effects) > 1 or told > out.accepted:
            return False
        meter.charge("", "accept", out.accepted)
        for effect in effects:
            meter.charge("", EFFECT_STAGES[effect], told)
        meter.ipi = meter.spent
    if work.timer:
        return False
    if work.skips and out.completion != Fastpath.SKIP_EMUL_INS:
        meter.charge("", "skip")
    return True


def _leaves_nothing(machine: Machine, exit: Exit, stages: tuple[str, ...], out: Outcome, concerns_sender: bool) -> bool:
    """The exit itself has left no request that its entry had to serve, except for the #GP that the code tells of."""
    if not {"lapic_access", "device", "halt", "hypercall"}.isdisjoint(stages):
        return False
    if "icr" in stages and out.accepted and (concerns_sender or exit.msr == R.MSR_X2APIC_SELF_IPI):
        return False
    msr = accesses_msr(machine.dispatcher.vendor, exit.reason)
    return not msr or bool(stages) or out.fault is not None
