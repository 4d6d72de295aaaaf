"""What the PIT's counters show: count, output and the latches that a guest reads, as far as the clock tells.

Models: __kpit_elapsed, kpit_elapsed, pit_get_count, pit_get_out, pit_latch_count, pit_latch_status. Counts follow the
machine's clock; that of channel 0 follows its hrtimer, so it stands where none was ever set, and what an hrtimer was
set to last counts on when it has fired or was cancelled.
"""

from ..jit.declare import kernel
from . import typed as k

SECOND = k.U(1_000_000_000)
WORD = k.U(0xFFFF)
BYTE = k.U(0xFF)


@kernel("u8(u8)")
def channel(i):
    """First word of a channel."""
    return k.PIT + i * k.PIT_STRIDE


@kernel("u8(words, u8)")
def _ticks(m, i):
    """Ticks of the PIT since a channel was loaded."""
    if i:
        ns = m[k.H_NOW] - m[channel(i) + k.PIT_LOADED]
    elif not m[k.PIT_PERIOD]:
        return k.ZERO
    else:
        ns = m[k.PIT_PERIOD] - (m[k.PIT_EXPIRES] - m[k.H_NOW])
    return ns // SECOND * k.PIT_HZ + ns % SECOND * k.PIT_HZ // SECOND


@kernel("u8(words, u8)")
def count(m, i):
    """pit_get_count."""
    at = channel(i)
    loaded, mode, d = m[at + k.PIT_COUNT], m[at + k.PIT_MODE], _ticks(m, i)
    if mode == k.U(3):
        return loaded - (d << k.ONE) % loaded
    if mode == k.U(2) or mode > k.U(5):
        return loaded - d % loaded
    return (loaded - d) & WORD


@kernel("u8(words, u8)")
def out(m, i):
    """pit_get_out: 1 while the output is high."""
    at = channel(i)
    loaded, mode, d = m[at + k.PIT_COUNT], m[at + k.PIT_MODE], _ticks(m, i)
    if mode == k.ONE:
        high = d < loaded
    elif mode == k.U(2):
        high = d != k.ZERO and d % loaded == k.ZERO
    elif mode == k.U(3):
        high = d % loaded < ((loaded + k.ONE) & k.LOW32) >> k.ONE
    elif mode == k.U(4) or mode == k.U(5):
        high = d == loaded
    else:
        high = d >= loaded
    return k.ONE if high else k.ZERO


@kernel("u8(words, u8)")
def latch_count(m, i):
    """pit_latch_count: what is latched already stays; a channel that no command has set up latches nothing."""
    at = channel(i)
    if not m[at + k.PIT_COUNT_LATCHED]:
        m[at + k.PIT_LATCHED_COUNT] = count(m, i) & WORD
        m[at + k.PIT_COUNT_LATCHED] = m[at + k.PIT_RW_MODE]
    return k.ZERO


@kernel("u8(words, u8)")
def latch_status(m, i):
    """pit_latch_status, eight bits, of which bit 6 (null count) is never set."""
    at = channel(i)
    if not m[at + k.PIT_STATUS_LATCHED]:
        status = out(m, i) << k.U(7) | m[at + k.PIT_RW_MODE] << k.U(4) | m[at + k.PIT_MODE] << k.ONE
        m[at + k.PIT_STATUS] = (status | m[at + k.PIT_BCD]) & BYTE
        m[at + k.PIT_STATUS_LATCHED] = k.ONE
    return k.ZERO
