"""A row of the host's for a call of no vCPU: with threads, one that no other call uses meanwhile.

Models: nothing of KVM, where each thread has a stack. exits.c has the same for C. The first row is Python's, which
holds the GIL.
"""

from ..jit.declare import kernel
from . import typed as k
from .shared import clear_word_bits, or_word


@kernel("u8(words)")
def take_row(m):
    """The number of a row, HOST or above."""
    if not m[k.H_CONFIG] & k.CONFIG_THREADS:
        return k.HOST
    row = k.ONE
    while or_word(m, k.HOST_BUSY, k.ONE << row) & (k.ONE << row):
        row = row + k.ONE if row + k.ONE < k.HOSTS else k.ONE
    return k.HOST + row


@kernel("u8(words, u8)")
def give_row(m, me):
    """It is free again."""
    return clear_word_bits(m, k.HOST_BUSY, k.ONE << (me - k.HOST)) if me != k.HOST else k.ZERO
