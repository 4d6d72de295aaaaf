"""Compiled kernels on disk, keyed by the sources of all kernels.

numba's own cache does not notice an edit in a callee's file, and its index and data can fall apart when two processes
write. Here one file holds the entries of one module: a digest over sources and content, then the content. A file that
is stale, damaged or half there fails the digest and counts as absent; the entries are then compiled and the file is
replaced in one step, so processes that start together only do the same work twice. A directory that cannot be read or
written means no cache.

Environment: ``FASTEXIT_CACHE=0`` keeps nothing on disk; ``FASTEXIT_CACHE_DIR`` says where to keep it, otherwise
``fastexit`` in the user's cache directory.
"""

from __future__ import annotations

import hashlib
import os
import pickle
import sys
import uuid
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import llvmlite
import llvmlite.binding as ll
import numba
import numpy as np
from numba.core.registry import cpu_target

BELOW = "layout", "outcome", "profile", "reasons", "regs"
"""The modules of plain data that kernels may import, besides each other; a change in any of them recompiles all."""

CODE_OPTIONS = "OPT", "BOUNDSCHECK", "LOOP_VECTORIZE", "SLP_VECTORIZE", "DEBUGINFO_DEFAULT", "FULL_TRACEBACKS"


class Code(NamedTuple):
    """What a compilation comes to: a library of machine code and, by entry, numba's descriptor and environment."""

    library: Any
    entries: dict[str, tuple[Any, Any]]


@cache
def cache_directory() -> Path | None:
    """Where this process keeps compiled code; None when it keeps none.

    One directory per interpreter, compiler, CPU and code-changing option.
    """
    user = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    root = os.environ.get("FASTEXIT_CACHE_DIR") or os.path.join(user, "fastexit")
    if numba.config.DISABLE_JIT or os.environ.get("FASTEXIT_CACHE") == "0" or root.startswith("~"):
        return None
    cpu = cpu_target.target_context.codegen().magic_tuple()
    options = [getattr(numba.config, name, None) for name in CODE_OPTIONS]
    versions = sys.implementation.cache_tag, numba.__version__, llvmlite.__version__, np.__version__
    variant = hashlib.sha256(repr((versions, cpu, options)).encode()).hexdigest()[:16]
    return Path(root) / f"{sys.implementation.cache_tag}-{variant}"


def read(module: str) -> Code | None:
    """The entries of a module, if they were kept and every source is still what it was."""
    try:
        data = (cache_directory() / module).read_bytes()
        if _digest(module, data[32:]) != data[:32]:
            return None
        library, entries = pickle.loads(data[32:])
        if numba.config.BOUNDSCHECK:
            cpu_target.target_context.refresh()  # code that may raise calls numba's runtime, which begins here
        return Code(cpu_target.target_context.codegen().unserialize_library(library), entries)
    except Exception:  # whatever goes wrong here must cost no more than a compilation
        return None


def write(module: str, code: Code) -> None:
    """Keep the entries of a module, where that is possible."""
    try:
        from numba.core.serialize import dumps

        for descriptor, _ in code.entries.values():
            descriptor.typemap = descriptor.calltypes = None
        name, kind, (machine_code, _) = code.library.serialize_using_object_code()
        content = dumps(((name, kind, (machine_code, _symbols(code))), code.entries))
        path = cache_directory() / module
        path.parent.mkdir(parents=True, exist_ok=True)
        half = path.with_name(f"{path.name}.{uuid.uuid4().hex}")
        try:
            half.write_bytes(_digest(module, content) + content)
            half.replace(path)
        finally:
            half.unlink(missing_ok=True)
    except Exception:  # as above
        return


def _symbols(code: Code) -> bytes:
    """Bitcode that defines what the machine code exports: all that numba looks for in the bitcode beside it."""
    names: list[str] = []
    for face, _ in code.entries.values():
        names += face.llvm_func_name, face.llvm_cpython_wrapper_name, face.llvm_cfunc_wrapper_name
    return ll.parse_assembly("".join(f'define void @"{name}"() {{ ret void }}\n' for name in names)).as_bitcode()


def _digest(module: str, content: bytes) -> bytes:
    declared_in = Path(sys.modules[module].__file__).read_bytes()
    return hashlib.sha256(_STAMP + declared_in + content).digest()


def _hash_sources() -> bytes | None:
    """Of everything that a kernel may be made of; None where there are no files to read."""
    here = Path(__file__).parent
    digest = hashlib.sha256()
    try:
        for source in (*sorted(here.glob("*.py")), *(here.parent / f"{name}.py" for name in BELOW)):
            text = source.read_bytes()
            digest.update(f"{source.name} {len(text)}\n".encode() + text)
    except OSError:
        return None
    return digest.digest()


_STAMP = _hash_sources()  # now, as the sources are imported: an edit between here and a compilation makes us stale
