"""What the chips tell the PIT: that its interrupt was acknowledged, that its line was masked or unmasked.

Models: kvm_pit_ack_irq, pit_mask_notifier, kvm_pit_reset_reinject. i8254.py has the PIT itself, whose worker raises
lines and therefore stands above the chips; these notifiers stand below them.
"""

from ..jit.declare import kernel
from . import typed as k
from .shared import or_word, replace_if


@kernel("u8(words)")
def reset_reinject(m):
    """kvm_pit_reset_reinject: nothing is left to be acknowledged."""
    m[k.PIT_PENDING] = k.ZERO
    m[k.PIT_IRQ_ACK] = k.ONE
    return k.ZERO


@kernel("u8(words)")
def _one_less(m):
    """atomic_dec_if_positive: how many ticks are left; 0 also where there was none."""
    while True:
        pending = m[k.PIT_PENDING]
        if not pending:
            return k.ZERO
        if replace_if(m, k.PIT_PENDING, pending, pending - k.ONE) == pending:
            return pending - k.ONE


@kernel("u8(words, u8)")
def acked(m, me):
    """kvm_pit_ack_irq, the ack notifier of GSI 0, which is there in reinject mode only: no effects.

    A tick that is left goes out by the worker, behind whatever is going on: the chips' locks are held here.
    """
    if not m[k.PIT_REINJECT]:
        return k.ZERO
    or_word(m, k.PIT_IRQ_ACK, k.ONE)
    if _one_less(m):
        or_word(m, k.PIT_WORK, k.ONE)
    return k.ZERO


@kernel("u8(words, u8, u8)")
def mask_changed(m, masked, me):
    """pit_mask_notifier, of a pin on GSI 0: whoever unmasks it does not want old ticks."""
    return k.ZERO if masked or not m[k.PIT_REINJECT] else reset_reinject(m)
