"""Synthetic timers' registers: four timers a vCPU, by CONFIG and COUNT; which one waits for service.

Models: stimer_set_config, stimer_set_count, stimer_mark_pending, stimer_cleanup, and kvm_hv_notify_acked_sint as far as
timers go; stimerservice.py has what happens when one runs out. Not modelled: lazy timers, which KVM treats like others.
Spec: TLFS ch. "Timers".

COUNT and STIMER_EXPIRATION are in 100 ns of the guest's reference clock, STIMER_DEADLINE is in ns of the host's.
"""

from ..jit.declare import kernel
from . import typed as k
from .shared import clear_word_bits, emit, hv, make_request, or_word


@kernel("u8(words, u8, u8)")
def timer(m, v, i):
    """First word of a timer."""
    return hv(m, v) + k.HV_STIMER + i * k.STIMER_STRIDE


@kernel("u8(words, u8, u8, u8, u8, u8)")
def trace(m, event, v, i, b, c):
    """A tracepoint of a timer, with its number and two things more."""
    return emit(m, event, v, i, b, c) if m[k.H_CONFIG] & k.CONFIG_TRACE else k.ZERO


@kernel("u8(words, u8, u8)")
def mark_pending(m, v, i):
    """stimer_mark_pending without its kick: the vCPU looks at the timer before it enters the guest."""
    or_word(m, hv(m, v) + k.HV_STIMER_PENDING, k.ONE << i)
    return make_request(m, v, k.REQ_HV_STIMER)


@kernel("u8(words, u8, u8)")
def cleanup(m, v, i):
    """stimer_cleanup: the timer neither counts nor waits, and no message of it is on its way."""
    trace(m, k.TP_HV_STIMER_CLEANUP, v, i, k.ZERO, k.ZERO)
    row = hv(m, v)
    m[timer(m, v, i) + k.STIMER_DEADLINE] = k.ZERO
    m[timer(m, v, i) + k.STIMER_EXPIRATION] = k.ZERO
    clear_word_bits(m, row + k.HV_STIMER_PENDING, k.ONE << i)
    m[row + k.HV_STIMER_STUCK] = m[row + k.HV_STIMER_STUCK] & ~(k.ONE << i)
    return k.ZERO


@kernel("u8(words, u8, u8, u8)")
def _refuses(m, v, value, host):
    """Tell whether a timer cannot be written: the SynIC is off; user space may write zeroes even then."""
    if m[hv(m, v) + k.HV_SYNIC] & k.SYNIC_ACTIVE:
        return k.ZERO
    return k.ONE if not host or value else k.ZERO


@kernel("u8(words, u8, u8)")
def _mark_enabled(m, v, i):
    """The end of both writes: an enabled timer is started by the service, not here."""
    if m[timer(m, v, i) + k.STIMER_CONFIG] & k.HV_STIMER_ENABLED:
        mark_pending(m, v, i)
    return k.ZERO


@kernel("u8(words, u8, u8, u8, u8)")
def set_config(m, v, i, value, host):
    """stimer_set_config: CODE_GP where it is refused.

    SINT 0 is no SINT for a timer: it disables one that was enabled, but not one that is enabled just now.
    """
    if _refuses(m, v, value, host):
        return k.CODE_GP
    direct = value & k.HV_STIMER_DIRECT
    if direct and not host and m[k.H_CONFIG] & k.CONFIG_HYPERV_ENFORCE:
        if not m[k.H_HV_FEATURES] & k.HVF_STIMER_DIRECT:
            return k.CODE_GP
    trace(m, k.TP_HV_STIMER_SET_CONFIG, v, i, value, host)
    cleanup(m, v, i)
    at = timer(m, v, i) + k.STIMER_CONFIG
    if m[at] & k.HV_STIMER_ENABLED and not direct and not (value >> k.HV_STIMER_SINT_SHIFT) & k.U(0xF):
        value = value & ~k.HV_STIMER_ENABLED
    m[at] = value
    return _mark_enabled(m, v, i)


@kernel("u8(words, u8, u8, u8, u8)")
def set_count(m, v, i, value, host):
    """stimer_set_count: CODE_GP where it is refused. The guest's write switches the timer off or, by itself, on."""
    if _refuses(m, v, value, host):
        return k.CODE_GP
    trace(m, k.TP_HV_STIMER_SET_COUNT, v, i, value, host)
    cleanup(m, v, i)
    at = timer(m, v, i)
    m[at + k.STIMER_COUNT] = value
    config = m[at + k.STIMER_CONFIG]
    if not host:
        if not value:
            m[at + k.STIMER_CONFIG] = config & ~k.HV_STIMER_ENABLED
        elif config & k.HV_STIMER_AUTO_ENABLE:
            m[at + k.STIMER_CONFIG] = config | k.HV_STIMER_ENABLED
    return _mark_enabled(m, v, i)


@kernel("u8(words, u8, u8)")
def retry(m, v, sint):
    """kvm_hv_notify_acked_sint for timers: those whose message found the slot of this SINT taken try again."""
    stuck = m[hv(m, v) + k.HV_STIMER_STUCK]
    if not stuck:
        return k.ZERO
    for n in range(k.STIMERS):
        i = k.U(n)
        config = m[timer(m, v, i) + k.STIMER_CONFIG]
        sends = config & k.HV_STIMER_ENABLED and not config & k.HV_STIMER_DIRECT
        if (stuck >> i) & k.ONE and sends and (config >> k.HV_STIMER_SINT_SHIFT) & k.U(0xF) == sint:
            mark_pending(m, v, i)
    return k.ZERO
