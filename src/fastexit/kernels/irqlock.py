"""The lock around IOAPIC, PIC pair, PIT and routes of a machine with threads; other machines have one owner and none.

KVM has a spinlock for each chip. One word is enough here, because each is held for as long as a line's change takes.
Only what Python, C or the run loop calls takes it: what chips call of each other goes on under it.
"""

from ..jit.atomics import store_release
from ..jit.declare import kernel
from . import typed as k
from .shared import replace_if


@kernel("u8(words)")
def lock(m):
    """Wait for the chips. Not twice in a row: there is no count."""
    if m[k.H_CONFIG] & k.CONFIG_THREADS:
        while replace_if(m, k.IRQ_LOCK, k.ZERO, k.ONE):
            pass
    return k.ZERO


@kernel("u8(words)")
def unlock(m):
    """Let others have the chips."""
    if m[k.H_CONFIG] & k.CONFIG_THREADS:
        store_release(m, k.IRQ_LOCK, k.ZERO)
    return k.ZERO
