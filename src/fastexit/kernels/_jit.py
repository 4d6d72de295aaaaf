"""How a kernel is declared, compiled, cached and called: the one file that leans on numba's internals.

A kernel is declared with its full signature and compiled for exactly that one, on first use. With
``NUMBA_DISABLE_JIT=1`` every kernel stays a plain Python function. Compiled code is kept on disk, keyed by the
sources of all kernels, because numba's own cache does not notice an edit in a callee's file.

Environment: ``FASTEXIT_CACHE=0`` keeps nothing on disk; ``FASTEXIT_CACHE_DIR`` says where to keep it, otherwise
``fastexit`` in the user's cache directory.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib
import inspect
import os
import pickle
import pkgutil
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import llvmlite
import numba
import numpy as np
from numba.core import cgutils, sigutils
from numba.core.compiler import CompileResult
from numba.core.compiler_lock import global_compiler_lock
from numba.core.registry import cpu_target
from numba.extending import lower_builtin, type_callable
from numba.np.arrayobj import populate_array

try:
    from numba.core.caching import NullCache
    from numba.core.serialize import dumps
except ImportError:  # a numba that keeps them elsewhere: no cache on disk
    NullCache, dumps = object, None

try:
    from numba.core.codegen import CPUCodeLibrary, JITCodeLibrary, JITCPUCodegen
except ImportError:
    CPUCodeLibrary = JITCodeLibrary = JITCPUCodegen = None

JIT: bool = not numba.config.DISABLE_JIT
BELOW = "layout", "outcome", "profile", "regs"
"""The modules of plain data that kernels may import, besides each other; a change in any of them recompiles all."""

WORDS = numba.types.uint64[::1] if numba.config.BOUNDSCHECK else numba.types.CPointer(numba.types.uint64)
"""What ``words`` stands for in a signature: a bare pointer, which crosses a call in one register and is never counted;
an array, which knows its size, where bounds are checked."""


def parse(signature: str) -> tuple[tuple, Any]:
    """Argument types and result of a signature, in which ``words`` is a block of 64-bit words."""
    return sigutils.normalize_signature(eval(signature, {"words": WORDS, **vars(numba.types)}))


class Kernel(NamedTuple):
    """A declared kernel; ``function`` is its numba dispatcher, or the plain function when the JIT is off."""

    name: str
    signature: str
    function: Any


KERNELS: list[Kernel] = []
ENTRIES: dict[str, Kernel] = {}


def kernel(signature: str, *, nogil: bool = True) -> Callable[[Callable], Any]:
    """Declare a kernel: ``@kernel("u8(words, u8)")``. Nothing is compiled yet; other kernels may call the result.

    Giving up the GIL and taking it back is most of the cost of a short call from Python: an entry that does one exit
    says ``nogil=False``. Called from another kernel there is no difference.
    """

    def declare(function: Callable) -> Any:
        name = f"{function.__module__.rpartition('.')[2]}.{function.__qualname__}"
        made = _dispatcher(function, name, signature, nogil) if JIT else function
        KERNELS.append(Kernel(name, signature, made))
        return made

    return declare


def entry(function: Any) -> Any:
    """Let Python reach a kernel by its name through ``load``: ``@entry`` above ``@kernel``. Integers only."""
    declared = next(k for k in reversed(KERNELS) if k.function is function)
    if ENTRIES.setdefault(function.__name__, declared) is not declared:
        raise ValueError(f"two entries are called {function.__name__}")
    return function


@cache
def load(name: str) -> Callable[..., Any]:
    """The fastest callable for an entry, compiled or read from the cache now.

    It does not check types: give it ints of the declared width, validated, and nothing else.
    """
    declared = ENTRIES[name]
    if not JIT:
        return _interpreted(declared)
    declared.function.compile(None)
    (compiled,) = declared.function.overloads.values()
    return getattr(compiled, "entry_point", None) or declared.function


def warmup(progress: Callable[[str, int, int], None] | None = None) -> dict[str, float]:
    """Load every entry; the seconds each took. ``progress(name, done, total)`` comes before each kernel is compiled."""
    global _progress
    package = importlib.import_module(__package__)
    for module in pkgutil.iter_modules(package.__path__, f"{__package__}."):
        importlib.import_module(module.name)
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


def _interpreted(declared: Kernel) -> Callable[..., Any]:
    """An entry without the JIT: arguments become the declared integers, which wrap in silence as compiled ones do."""
    args, _ = parse(declared.signature)
    types = [getattr(np, str(arg)) for arg in args]

    def call(*values: int) -> int | None:
        with np.errstate(over="ignore"):
            result = declared.function(*(convert(value) for convert, value in zip(types, values, strict=True)))
        return None if result is None else int(result)

    return call


def _dispatcher(function: Callable, name: str, signature: str, nogil: bool) -> Any:
    """A dispatcher that compiles the declared signature alone, whoever asks; a calling kernel's int64 is converted."""
    dispatcher = numba.njit(nogil=nogil, error_model="numpy", no_cfunc_wrapper=True)(function)
    uncached = dispatcher._cache
    if dumps and hasattr(dispatcher, "_cache") and os.environ.get("FASTEXIT_CACHE") != "0":
        dispatcher._cache = _Cache(name, dispatcher.targetctx)
    compile_for = dispatcher.compile

    def compile_declared(_: Any) -> Any:
        with global_compiler_lock:
            if not dispatcher.overloads:
                if _progress:
                    _progress(name, sum(bool(k.function.overloads) for k in KERNELS), len(KERNELS))
                args, result = parse(signature)
                callee = bool(_compiling) and not any(e.function is dispatcher for e in ENTRIES.values())
                if callee:
                    dispatcher._cache = uncached
                _compiling.append(name)
                try:
                    with _code_for_callers_only() if callee else nullcontext():
                        compile_for(result(*args))
                finally:
                    _compiling.pop()
                dispatcher.disable_compile()
        return dispatcher  # not the machine code: a Python caller then goes through numba's type check

    dispatcher.compile = compile_declared
    return dispatcher


_compiling: list[str] = []
"""Kernels that are being compiled, callers first; under numba's compiler lock."""


@contextmanager
def _code_for_callers_only() -> Iterator[None]:
    """Compile a callee to LLVM code that its caller takes in, and stop there.

    numba would optimise each callee with all that it calls and make machine code of it, over again at every level; only
    the entries' machine code ever runs, and there LLVM sees the whole of it. That halves the time of a first run. A
    callee so compiled cannot be called from Python: its wrapper answers with a MemoryError instead of a jump to 0.
    """
    if CPUCodeLibrary is None or numba.config.BOUNDSCHECK:
        yield
        return
    refusal = ctypes.cast(ctypes.pythonapi.PyErr_NoMemory, ctypes.c_void_p).value

    def finalized(library: Any) -> None:
        library._finalized = True

    patches = (
        (CPUCodeLibrary, "_optimize_final_module", lambda library: None),
        (CPUCodeLibrary, "_finalize_final_module", finalized),
        (JITCodeLibrary, "get_pointer_to_function", lambda library, name: refusal),
        (JITCPUCodegen, "set_env", lambda codegen, name, env: None),
    )
    saved = [(owner, name, getattr(owner, name)) for owner, name, _ in patches]
    for owner, name, stub in patches:
        setattr(owner, name, stub)
    try:
        yield
    finally:
        for owner, name, original in saved:
            setattr(owner, name, original)


# -------------------------------------------------------------------------------------------------------- cache on disk
_CODE_OPTIONS = "OPT", "BOUNDSCHECK", "LOOP_VECTORIZE", "SLP_VECTORIZE", "DEBUGINFO_DEFAULT", "FULL_TRACEBACKS"


@cache
def _source_stamp() -> bytes:
    """Hash of everything a kernel may import: all kernels, and the modules of plain data below them."""
    here = Path(__file__).parent
    below = [here.parent / f"{name}.py" for name in ("layout", "outcome", "profile", "reasons", "regs")]
    digest = hashlib.sha256()
    for source in sorted(here.glob("*.py")) + below:
        text = source.read_bytes()
        digest.update(f"{source.name} {len(text)}\n".encode() + text)
    return digest.digest()


@cache
def _directory(cpu: tuple) -> Path:
    """Where compiled code lies: one directory per interpreter, compiler, CPU and code-changing option."""
    root = os.environ.get("FASTEXIT_CACHE_DIR")
    if not root:
        root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fastexit"
    options = [getattr(numba.config, name, None) for name in _CODE_OPTIONS]
    versions = sys.implementation.cache_tag, numba.__version__, llvmlite.__version__, np.__version__
    variant = hashlib.sha256(repr((versions, cpu, options)).encode()).hexdigest()[:16]
    return Path(root) / f"{sys.implementation.cache_tag}-{variant}"


def cache_directory() -> Path | None:
    """Where this process keeps compiled code; None when it keeps none."""
    if not JIT or dumps is None or os.environ.get("FASTEXIT_CACHE") == "0":
        return None
    return _directory(cpu_target.target_context.codegen().magic_tuple())


class _Cache(NullCache):
    """One file per kernel: a digest over source stamp and content, then the content.

    A file that is stale, damaged or half there fails the digest and counts as absent; the kernel is then compiled and
    the file replaced in one step, so processes that start together only do the same work twice. A directory that cannot
    be read or written means no cache. Whatever else goes wrong in here must not cost more than a compilation.
    """

    def __init__(self, name: str, target: Any) -> None:
        self._name = name
        self._target = target

    def _path(self) -> Path:
        return _directory(self._target.codegen().magic_tuple()) / self._name

    def _digest(self, content: bytes) -> bytes:
        return hashlib.blake2b(content, digest_size=32, key=_source_stamp()).digest()

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        try:
            target_context.refresh()
            data = self._path().read_bytes()
            if self._digest(data[32:]) != data[:32]:
                return None
            return CompileResult._rebuild(target_context, *pickle.loads(data[32:]))
        except Exception:
            return None

    def save_overload(self, sig: Any, data: Any) -> None:
        try:
            if data.lifted or data.library.has_dynamic_globals:
                return
            content = dumps(data._reduce())
            path = self._path()
            path.parent.mkdir(parents=True, exist_ok=True)
            half = path.with_name(f"{path.name}.{uuid.uuid4().hex}")
            try:
                half.write_bytes(self._digest(content) + content)
                half.replace(path)
            finally:
                half.unlink(missing_ok=True)
        except Exception:
            return


# ----------------------------------------------------------------------------- functions with machine code of their own
def lowers(function: Callable, signature: str) -> Callable[[Callable], Callable]:
    """Say what a kernel's call of a plain function becomes: ``@lowers(msb, "u8(u8)")`` above an emitter of LLVM code.

    The emitter takes ``(context, builder, *values)``. Called from Python the function stays what it is.
    """
    args, result = parse(signature)

    def declare(emit: Callable) -> Callable:
        @type_callable(function)
        def typing(_context: Any) -> Callable:
            def typer(*_given: Any) -> Any:
                return result(*args)

            typer.__signature__ = inspect.signature(function)
            return typer

        @lower_builtin(function, *args)
        def lowering(context: Any, builder: Any, _sig: Any, values: Any) -> Any:
            return emit(context, builder, *values)

        return emit

    return declare


ADDRESSES: dict[int, np.ndarray] = {}


def register(handle: int, array: np.ndarray) -> None:
    """Make an array known as ``handle``, its address, to interpreted kernels, which cannot open memory by address."""
    ADDRESSES[handle] = array


def unregister(handle: int) -> None:
    """Forget an array."""
    ADDRESSES.pop(handle, None)


def open_words(handle, n):
    """The n 64-bit words at an address. Nothing is checked: a wrong address is a wild pointer."""
    return ADDRESSES[int(handle)][: int(n)]


@lowers(open_words, "words(u8, u8)")
def _open_words(context, builder, handle, n):
    if isinstance(WORDS, numba.types.CPointer):
        return builder.inttoptr(handle, context.get_value_type(WORDS))
    words = context.make_array(WORDS)(context, builder)
    itemsize = context.get_constant(numba.types.intp, 8)
    data = builder.inttoptr(handle, words.data.type)
    populate_array(words, data=data, shape=[n], strides=[itemsize], itemsize=itemsize, meminfo=None)
    return words._getvalue()


def msb(x):
    """Index of the highest set bit. x is not 0."""
    return np.uint64(int(x).bit_length() - 1)


@lowers(msb, "u8(u8)")
def _msb(context, builder, x):
    return builder.xor(builder.ctlz(x, cgutils.true_bit), x.type(63))


def ctz(x):
    """Index of the lowest set bit. x is not 0."""
    x = int(x)
    return np.uint64((x & -x).bit_length() - 1)


@lowers(ctz, "u8(u8)")
def _ctz(context, builder, x):
    return builder.cttz(x, cgutils.true_bit)


def popcount(x):
    """Number of set bits."""
    return np.uint64(int(x).bit_count())


@lowers(popcount, "u8(u8)")
def _popcount(context, builder, x):
    return builder.ctpop(x)
