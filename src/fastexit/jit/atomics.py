"""Atomic access to 64-bit words, sequentially consistent, for words that another thread may write.

Each takes the word array and an index; those that change a word return what stood there before. Compiled, each is one
hardware atomic (a compare-exchange loop where the CPU has no such instruction) and takes no lock, so it also meets what
C code does to the same words. Interpreted, they are plain Python and atomic towards nobody. Bounds are checked under
``NUMBA_BOUNDSCHECK=1``.
"""

import numpy as np


def fetch_or(m: np.ndarray, i: np.uint64, value: np.uint64) -> np.uint64:
    """Set the bits of value."""
    old = m[i]
    m[i] = old | value
    return old


def fetch_and(m: np.ndarray, i: np.uint64, value: np.uint64) -> np.uint64:
    """Keep the bits of value only."""
    old = m[i]
    m[i] = old & value
    return old


def fetch_add(m: np.ndarray, i: np.uint64, value: np.uint64) -> np.uint64:
    """Add value, modulo 2**64."""
    old = m[i]
    m[i] = np.uint64((int(old) + int(value)) & 0xFFFF_FFFF_FFFF_FFFF)
    return old


def exchange(m: np.ndarray, i: np.uint64, value: np.uint64) -> np.uint64:
    """Replace the word."""
    old = m[i]
    m[i] = value
    return old


def compare_exchange(m: np.ndarray, i: np.uint64, old: np.uint64, new: np.uint64) -> np.uint64:
    """Replace the word by new if it is old. It happened if and only if the result equals old."""
    was = m[i]
    if was == old:
        m[i] = new
    return was


def test_and_set_bit(m: np.ndarray, i: np.uint64, bit: np.uint64) -> np.uint64:
    """Set bit 0..63 (taken modulo 64); 1 if it was set already, else 0."""
    bit = bit & np.uint64(63)
    return (fetch_or(m, i, np.uint64(1) << bit) >> bit) & np.uint64(1)


def test_and_clear_bit(m: np.ndarray, i: np.uint64, bit: np.uint64) -> np.uint64:
    """Clear bit 0..63 (taken modulo 64); 1 if it was set, else 0."""
    bit = bit & np.uint64(63)
    return (fetch_and(m, i, ~(np.uint64(1) << bit)) >> bit) & np.uint64(1)


test_and_set_bit.__test__ = test_and_clear_bit.__test__ = False  # their names are KVM's, not pytest's


def load_acquire(m: np.ndarray, i: np.uint64) -> np.uint64:
    """Read the word; nothing that follows moves before the read."""
    return m[i]


def store_release(m: np.ndarray, i: np.uint64, value: np.uint64) -> None:
    """Write the word; nothing that precedes moves behind the write."""
    m[i] = value


def prefetch(m: np.ndarray, i: np.uint64) -> None:
    """Ask for the cache line of word i, which need not lie in the array: nothing is read and nothing can fault."""


def fence_after_atomic() -> None:
    """Full barrier behind one of the atomics above that change a word; on x86-64 they are one already."""


def fence() -> np.uint64:
    """Full barrier: every access before it is seen before every access behind it."""
