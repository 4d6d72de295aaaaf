"""All timers of a machine, and what the host's own threads have to do: which is next, and do it.

First the hrtimers that are due, in the order in which they fire: local APIC timers, synthetic timers, the PIT's; then
work that was queued, because a host's interrupt goes before its threads. What to do is named by one word: a vCPU's
index, which is less than MAX_VCPUS, plus a number above it: 0 is the local APIC timer, 1 to STIMERS are synthetic
timers, from HOST_TIMERS on it is a timer or work of the machine's, with no vCPU.
"""

from ..jit.declare import kernel, umin
from . import i8254, ioapicpin, stimerservice
from . import typed as k
from .irqlock import lock, unlock

WHICH_SHIFT = stimerservice.WHICH_SHIFT
PIT_TIMER = k.HOST_TIMER_PIT << WHICH_SHIFT
PIT_WORK = k.HOST_WORK_PIT << WHICH_SHIFT
IOAPIC_WORK = k.HOST_WORK_IOAPIC << WHICH_SHIFT
LATEST = k.NONE - k.ONE
"""A clock that a host has written without sense must not reach what never comes."""


@kernel("u8(words)")
def due(m):
    """What is to be done at or before now: hrtimers, earliest first, then work; NONE when there is nothing."""
    best = stimerservice.due(m)
    when = i8254.fires(m)
    if when <= m[k.H_NOW] and when < stimerservice.when(m, best):
        best = PIT_TIMER
    if best != k.NONE:
        return best
    if m[k.PIT_WORK]:
        return PIT_WORK
    return IOAPIC_WORK if ioapicpin.delayed(m) <= m[k.H_NOW] else k.NONE


@kernel("u8(words, u8, u8)")
def fire(m, which, me):
    """Do what ``due`` named: Effect code; ``me`` has the list of targets of what belongs to no vCPU."""
    if which == PIT_TIMER:
        return i8254.fire(m)
    if which == PIT_WORK:
        return i8254.work(m, me)
    if which == IOAPIC_WORK:
        return ioapicpin.inject_delayed(m, me)
    return stimerservice.fire(m, which) if which >> WHICH_SHIFT < k.HOST_TIMERS else k.ZERO


@kernel("u8(words, u8)")
def run_one(m, me):
    """Do one thing of the machine's own that is due, beside threads that do the same: Effect code, NONE for nothing."""
    now = umin(m[k.H_NOW], LATEST)
    if i8254.fires(m) <= now:
        lock(m)
        is_mine = i8254.fires(m) <= now
        if is_mine:
            i8254.fire(m)
        unlock(m)
        if is_mine:
            return k.ZERO
    if m[k.PIT_WORK]:
        return i8254.work(m, me)
    return ioapicpin.inject_delayed(m, me) if ioapicpin.delayed(m) <= now else k.NONE


@kernel("u8(words)")
def next_of_machine(m):
    """Clock at which there is something to do next that is no vCPU's; NONE for never."""
    return m[k.H_NOW] if m[k.PIT_WORK] else umin(i8254.fires(m), ioapicpin.delayed(m))


@kernel("u8(words)")
def next_event(m):
    """Clock at which there is something to do next, or a preemption timer exits; NONE for never."""
    if m[k.PIT_WORK]:
        return m[k.H_NOW]
    return umin(umin(stimerservice.next_event(m), i8254.fires(m)), ioapicpin.delayed(m))
