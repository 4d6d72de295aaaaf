"""Bytes by address, for kernels: memory that is the embedder's and not a machine's.

Nothing is checked: a wrong address is a wild pointer. Compiled and interpreted they reach the same bytes.
"""

from ctypes import c_uint8, c_uint64

import numpy as np

_LITTLE = c_uint64.__ctype_le__


def load_byte(address: np.uint64) -> np.uint64:
    """Read a byte."""
    return np.uint64(c_uint8.from_address(int(address)).value)


def load_word(address: np.uint64) -> np.uint64:
    """Read eight bytes, the first of them the lowest; the address need not be a multiple of anything."""
    return np.uint64(_LITTLE.from_address(int(address)).value)


def store_byte(address: np.uint64, value: np.uint64) -> None:
    """Write a byte, the low eight bits of value."""
    c_uint8.from_address(int(address)).value = int(value)
