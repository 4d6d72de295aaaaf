"""Modelled time of the compiled loop: what a vCPU's exit has cost so far, and whom a handler has reached.

A price is a stage of a cost profile, or several that come together; costs/prices.py has the table, layout.PRICES its
words. Every call here and in steptime.py is made under CONFIG_COSTS only. A vCPU's row is its thread's own, so vCPUs of
several threads have their times side by side.
"""

from ..jit.declare import apart, kernel, umin
from . import typed as k
from .shared import clear_words, hv, own


@kernel("u8(u8)")
def row(v):
    """First word of a vCPU's row."""
    return k.METER + v * k.METER_STRIDE


@kernel("u8(words, u8, u8, u8)")
def charge(m, v, price, count):
    """Add a price, so many times: what is spent now."""
    at = row(v) + k.METER_SPENT
    m[at] = m[at] + m[k.PRICES + price] * count
    return m[at]


@apart
@kernel("u8(words, u8)")
def reset(m, v):
    """An exit, an access or a KVM_RUN begins to cost."""
    mine = row(v)
    m[mine + k.METER_SPENT] = k.ZERO
    m[mine + k.METER_IPI] = k.NONE
    m[mine + k.METER_WAITED] = m[own(m, v) + k.K_WAITED]
    return k.ZERO


@apart
@kernel("u8(words, u8)")
def begin(m, v):
    """Look at what a handler will change, in front of it."""
    mine, host = row(v), own(m, v)
    clear_words(m, mine + k.METER_ACCEPTED, k.METER_EOIS - k.METER_ACCEPTED)
    m[mine + k.METER_EOIS] = m[host + k.K_IOAPIC_EOIS]
    m[mine + k.METER_EOIS + k.ONE] = m[host + k.K_HV_DEADLINE]
    m[mine + k.METER_EOIS + k.U(2)] = m[host + k.K_HRTIMER]
    return k.ZERO


# ----------------------------------------------------------------------------------------------------- whom it was for


@kernel("u8(words, u8, u8)")
def _count(m, at, code):
    """Count an interrupt at one APIC, and what the host has to do for it."""
    m[at] = m[at] + k.ONE
    effect = code >> k.CODE_EFFECTS_SHIFT & k.U(0xF)
    if not effect:
        return code
    price = k.P_DOORBELL
    if effect == k.EF_NOTIFY:
        price = k.P_NOTIFY
    elif effect == k.EF_KICK:
        price = k.P_KICK
    elif effect == k.EF_WAKE:
        price = k.P_WAKE
    m[at + k.ONE] = m[at + k.ONE] + k.ONE
    m[at + k.U(2)] = m[at + k.U(2)] + m[k.PRICES + price]
    return code


@kernel("u8(words, u8, u8)")
def accepted(m, me, code):
    """__apic_accept_irq was called by a vCPU, with this delivery code, which is given back."""
    return _count(m, row(me) + k.METER_ACCEPTED, code) if me < k.MAX_VCPUS else code


@kernel("u8(words, u8, u8)")
def reached(m, me, code):
    """AVIC's hardware had set the IRR bit of a target, and this is what was left of its delivery."""
    return _count(m, row(me) + k.METER_AVIC, code) if me < k.MAX_VCPUS else code


@kernel("u8(words, u8, u8, u8)")
def deliveries(m, v, counted, ipi):
    """Charge the targets of an IPI or of a tick as far as they accepted: ``counted``, or NONE for all that were asked.

    Where only some did, it was those for which there is something to do, and the first of the rest.
    """
    mine = row(v)
    at = mine + (k.METER_ACCEPTED if m[mine + k.METER_ACCEPTED] else k.METER_AVIC)
    asked, needy = m[at], m[at + k.ONE]
    if counted == k.NONE or at != mine + k.METER_ACCEPTED:
        counted = asked
    quiet = counted - needy if counted > needy else k.ZERO
    charged = needy + umin(quiet, asked - needy)
    spent = charge(m, v, k.P_ACCEPT, charged) + m[at + k.U(2)]
    m[mine + k.METER_SPENT] = spent
    if ipi and charged:
        m[mine + k.METER_IPI] = spent
    return k.ZERO


# --------------------------------------------------------------------------------------------- on the way to an entry


@apart
@kernel("u8(words, u8)")
def tail(m, v):
    """The loop's tail, with the APIC that accepts a tick."""
    charge(m, v, k.P_LOOP_TAIL, k.ONE)
    return deliveries(m, v, k.NONE, k.ZERO)


@kernel("u8(words, u8, u8)")
def _stimer(m, v, i):
    """Where a synthetic timer has when it fires."""
    return hv(m, v) + k.HV_STIMER + i * k.STIMER_STRIDE + k.STIMER_DEADLINE


@apart
@kernel("u8(words, u8)")
def stimers(m, v):
    """Look at the synthetic timers, in front of their service."""
    begin(m, v)
    for n in range(k.STIMERS):
        m[row(v) + k.METER_STIMERS + k.U(n)] = m[_stimer(m, v, k.U(n))]
    return k.ZERO


@apart
@kernel("u8(words, u8)")
def stimers_served(m, v):
    """Step 2 behind the service of the synthetic timers: what they sent, and those that were started or cancelled."""
    deliveries(m, v, k.NONE, k.ZERO)
    moved = k.ZERO
    for n in range(k.STIMERS):
        if m[_stimer(m, v, k.U(n))] != m[row(v) + k.METER_STIMERS + k.U(n)]:
            moved = moved + k.ONE
    return charge(m, v, k.P_HRTIMER, moved)
