"""How kernels are declared and called.

A kernel is declared with its full signature. The first use of an entry compiles all entries of its module, with every
kernel they reach, into one piece of machine code: each kernel is typed once, and LLVM sees the whole. ``build`` does
that, with ``stages``, ``target``, ``emit`` and ``door``, and they are all that leans on numba and its internals;
``cache`` keeps the code on disk, ``load`` brings it into the process. With ``NUMBA_DISABLE_JIT=1`` every kernel stays a
plain Python function.
"""

from __future__ import annotations

import importlib
import os
import pkgutil
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from functools import cache, update_wrapper
from operator import index
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from .cache import Code, read, switched_on, write
from .cache import cache_directory as cache_directory

if TYPE_CHECKING:
    from .build import Build


JIT: bool = not switched_on("NUMBA_DISABLE_JIT")
BOUNDSCHECK: bool = switched_on("NUMBA_BOUNDSCHECK")


class Kernel(NamedTuple):
    """A declared kernel; ``function`` is what kernels call: a Callee, or ``python`` with the JIT off."""

    name: str
    signature: str
    python: Callable[..., Any]
    function: Any
    nogil: bool


class Callee:
    """What a kernel is to other kernels. ``build`` tells numba what to make of it, once there is one to compile."""

    def __init__(self, python: Callable[..., Any], name: str) -> None:
        update_wrapper(self, python)
        self._name = name
        self.inline = False
        self.apart = False

    def __call__(self, *_values: Any) -> Any:
        raise TypeError(f"kernel {self._name} can be called by kernels only; an @entry, through load()")


KERNELS: list[Kernel] = []
CALLEES: dict[Callee, Kernel] = {}
ENTRIES: dict[str, Kernel] = {}


def kernel(
    signature: str, *, nogil: bool = True, interpreted: Callable[..., Any] | None = None
) -> Callable[[Callable[..., Any]], Any]:
    """Declare a kernel: ``@kernel("u8(words, u8)")``. Nothing is compiled yet; other kernels may call the result.

    Giving up the GIL and taking it back is most of the cost of a short call from Python: an entry that does one exit
    says ``nogil=False``. Called from another kernel there is no difference.

    ``interpreted`` takes the kernel's place where nothing is compiled: a loop over many words is slow there.
    """

    def declare(function: Callable[..., Any]) -> Any:
        name = f"{function.__module__.rpartition('.')[2]}.{function.__qualname__}"
        if interpreted is not None and not JIT:
            function = interpreted
        declared = Kernel(name, signature, function, Callee(function, name) if JIT else function, nogil)
        KERNELS.append(declared)
        if JIT:
            CALLEES[declared.function] = declared
        return declared.function

    return declare


def inlined(function: Any) -> Any:
    """Make a kernel part of every kernel that calls it: ``@inlined`` above ``@kernel``. For the hottest only."""
    if JIT:
        function.inline = True
    return function


def apart(function: Any) -> Any:
    """Keep a kernel out of those that call it: ``@apart`` above ``@kernel``. For what hardly ever runs beside what is
    hot, which would save registers for it.
    """
    if JIT:
        function.apart = True
    return function


def entry(function: Any) -> Any:
    """Let Python reach a kernel by its name through ``load``: ``@entry`` above ``@kernel``. Integers only."""
    declared = next(k for k in reversed(KERNELS) if k.function is function)
    if ENTRIES.setdefault(function.__name__, declared) is not declared:
        raise ValueError(f"two entries are called {function.__name__}")
    return function


@cache
def load(name: str) -> Callable[..., int]:
    """The fastest callable for an entry, compiled or read from the cache now.

    Give it ints: TypeError for anything else, OverflowError for what is beyond 64 bits. An index or an address is
    nothing that it can check.
    """
    declared = ENTRIES[name]
    return _machine_code(declared.python.__module__)[name].call if JIT else _interpreted(declared)


def address(name: str) -> int:
    """A C function pointer to an entry: integers of the declared width, no GIL, no Python. Only with the JIT."""
    return _machine_code(ENTRIES[name].python.__module__)[name].address


def warmup(progress: Callable[[str, int, int], None] | None = None) -> dict[str, float]:
    """Load every entry; the seconds each took, where the first one bears the cost of those compiled along with it.

    ``progress(name, done, total)`` is called before each kernel is compiled.
    """
    global _progress
    package = importlib.import_module("fastexit.kernels")
    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"{package.__name__}.{module.name}")
    seconds = {}
    _progress = progress
    try:
        for name in ENTRIES:
            start = time.perf_counter()
            load(name)
            seconds[name] = time.perf_counter() - start
    finally:
        _progress = None
    return seconds


_progress: Callable[[str, int, int], None] | None = None


def _on_terminal(_name: str, done: int, total: int) -> None:
    """Who waits at a terminal is told why; other programs' output is left alone."""
    with suppress(Exception):  # a stderr of the host's own may be closed, or hardly a file
        if sys.stderr.isatty():
            text = f"fastexit: compiling kernels, once: {done} of {total}" if total else ""
            print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)


def _interpreted(declared: Kernel) -> Callable[..., Any]:
    """An entry without the JIT: arguments become the declared integers, which wrap in silence as compiled ones do."""
    wanted = declared.signature.count("u8") - 1

    def call(*values: int) -> int:
        if len(values) != wanted:
            raise TypeError(f"{declared.name} takes {wanted} integers")
        with np.errstate(over="ignore"):
            return int(declared.function(*(np.uint64(index(value)) for value in values)))

    return call


# ---------------------------------------------------------------------------------------------------------- compilation
class _Callable(NamedTuple):
    """An entry that was compiled: for Python, and for C."""

    call: Callable[..., Any]
    address: int


_lock = threading.RLock()


@cache
def _hold_forks() -> None:
    """From now on a fork waits while another thread compiles: its child would have our lock, and nobody to release it.

    Hooks run last come, first served, and logging's takes a lock that numba's import needs: ours must come behind it.
    """
    import logging  # noqa: F401

    os.register_at_fork(before=_lock.acquire, after_in_parent=_lock.release, after_in_child=_lock.release)


def _machine_code(module: str) -> dict[str, _Callable]:
    """All entries that a Python module declares; by name. Threads that come while one compiles wait for its work."""
    with _lock:
        return _linked(module)


@cache
def _linked(module: str) -> dict[str, _Callable]:
    """Those entries, from the cache or compiled."""
    from .load import link, python_function  # not where kernels are interpreted: it brings LLVM

    entries = {name: k for name, k in ENTRIES.items() if k.python.__module__ == module}
    code = read(module)
    if code is None or code.entries.keys() != entries.keys():
        _hold_forks()
        code = _compile(entries)
        write(module, code)
    address = link(code.objects)
    return {
        name: _Callable(python_function(name, address(python)), address(c))
        for name, (python, c) in code.entries.items()
    }


_under_way: Build | None = None


def _compile(entries: dict[str, Kernel]) -> Code:
    """Machine code of some entries, with every kernel that they reach."""
    global _under_way
    if _under_way is not None:
        raise RuntimeError(
            "kernels are being compiled by this thread already, and a signal handler or a callback asks again"
        )
    from numba.core.compiler_lock import global_compiler_lock  # not before there is something to compile

    from .build import Build

    with global_compiler_lock:
        _under_way = build = Build()
        try:
            with build:
                for declared in entries.values():
                    if declared not in build.made:
                        _add(declared)
                return build.finish(entries)
        finally:
            _under_way = None
            if _progress is None:
                _on_terminal("", 0, 0)


def _add(declared: Kernel) -> None:
    """Compile a kernel into the library that is under way."""
    (_progress or _on_terminal)(declared.name, len(_under_way.made), len(KERNELS))
    _under_way.add(declared)


def called(callee: Callee) -> Any:
    """The signature of a kernel that another one calls; it is compiled along with that one."""
    if _under_way is None:
        callee()
    declared = CALLEES[callee]
    if declared not in _under_way.made:
        _add(declared)
    return _under_way.made[declared].signature


# ------------------------------------------------------ plain functions that emit has machine code for, in kernels
ADDRESSES: dict[int, np.ndarray] = {}


def register(handle: int, array: np.ndarray) -> None:
    """Make an array known as ``handle``, its address, to interpreted kernels, which cannot open memory by address."""
    ADDRESSES[handle] = array


def unregister(handle: int) -> None:
    """Forget an array."""
    ADDRESSES.pop(handle, None)


def open_words(handle: np.uint64, n: np.uint64) -> np.ndarray:
    """The n 64-bit words at an address. Nothing is checked: a wrong address is a wild pointer."""
    return ADDRESSES[int(handle)][: int(n)]


def msb(x: np.uint64) -> np.uint64:
    """Index of the highest set bit. x is not 0."""
    return np.uint64(int(x).bit_length() - 1)


def ctz(x: np.uint64) -> np.uint64:
    """Index of the lowest set bit. x is not 0."""
    word = int(x)
    return np.uint64((word & -word).bit_length() - 1)


def popcount(x: np.uint64) -> np.uint64:
    """Number of set bits."""
    return np.uint64(int(x).bit_count())


def umax(a: np.uint64, b: np.uint64) -> np.uint64:
    """The larger of two words. numba would make a library of its own for max."""
    return a if a > b else b


def umin(a: np.uint64, b: np.uint64) -> np.uint64:
    """The smaller of two words."""
    return a if a < b else b
