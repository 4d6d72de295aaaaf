"""The guest's memory as KVM sees it: a buffer of the embedder's, which kernels reach by its address."""

from __future__ import annotations

import mmap
import sys
from ctypes import addressof, c_char
from typing import Any

PAGE = 4096
DEFAULT_BYTES = 3 << 30
"""A private memory ends where a PC's devices begin. It is sparse: pages that nobody touches cost nothing."""
MAP_NORESERVE: int = getattr(mmap, "MAP_NORESERVE", 0x4000 if sys.platform == "linux" else 0)
"""Python names it from 3.13 on. Without it a process with some hundred machines cannot fork: their memory counts."""


def reserve(size: int) -> mmap.mmap:
    """Zeroed, page-aligned memory of this process; pages cost nothing until they are used."""
    return mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE)


def opened(buffer: Any) -> tuple[memoryview, int]:
    """A buffer as bytes, and its address. TypeError or ValueError for one that no guest can have."""
    try:
        view = memoryview(buffer)
    except TypeError:
        raise TypeError(f"guest_memory is {type(buffer).__name__}, not a writable buffer") from None
    if view.readonly:
        raise TypeError(f"guest_memory is {type(buffer).__name__}, which is read-only: a guest writes its memory")
    if not view.c_contiguous:
        raise ValueError("guest_memory is not one contiguous piece")
    if view.nbytes < PAGE:
        raise ValueError(f"guest_memory has {view.nbytes} bytes: at least one page of {PAGE}")
    view = view.cast("B")
    return view, addressof(c_char.from_buffer(view))
