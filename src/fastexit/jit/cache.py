"""Compiled kernels on disk, keyed by the sources of all kernels.

numba's own cache does not notice an edit in a callee's file, and its index and data can fall apart when two processes
write. Here one file holds the entries of one module: a digest over sources and content, then the content. A file that
is stale, damaged or half there fails the digest and counts as absent; the entries are then compiled and the file is
replaced in one step, so processes that start together only do the same work twice. A directory that cannot be read or
written means no cache.

A source that is edited while its process runs makes that process's code nobody's: it is not kept. What Python itself
takes for a source's code, a stale .pyc, is taken here too.

The digest tells damage, not forgery: whoever can write the directory chooses machine code that runs in this process. It
needs the trust that the installed package has.

Environment: ``FASTEXIT_CACHE=0`` keeps nothing on disk; ``FASTEXIT_CACHE_DIR`` says where to keep it, otherwise
``fastexit`` in the user's cache directory. numba is asked for nothing here: it need not be imported to find its work.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
import sys
import uuid
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import numpy as np

BELOW = "exits.table", "hyperv", "layout", "outcome", "reasons", "regs", "traits"
"""The modules of plain data that kernels may import, besides each other; a change in any of them recompiles all."""

CODE_OPTIONS = "NUMBA_OPT", "NUMBA_CPU_NAME", "NUMBA_CPU_FEATURES", "NUMBA_ENABLE_AVX"
_LENGTH = struct.Struct("<Q")


def switched_on(name: str) -> bool:
    """Whether one of numba's switches is set in the environment, as numba reads it."""
    try:
        return bool(int(os.environ.get(name, "0")))
    except ValueError:
        return False


class Code(NamedTuple):
    """What a compilation comes to: an object file, and by entry the symbols that Python and C call."""

    objects: bytes
    entries: dict[str, tuple[str, str]]


@cache
def cache_directory() -> Path | None:
    """Where this process keeps compiled code; None when it keeps none.

    One directory per interpreter, compiler, CPU and code-changing option.
    """
    user = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    root = os.environ.get("FASTEXIT_CACHE_DIR") or os.path.join(user, "fastexit")
    if switched_on("NUMBA_DISABLE_JIT") or os.environ.get("FASTEXIT_CACHE") == "0" or root.startswith("~"):
        return None
    options = [os.environ.get(name) for name in CODE_OPTIONS]
    variant = hashlib.sha256(repr((_versions(), _cpu(), switched_on("NUMBA_BOUNDSCHECK"), options)).encode())
    return Path(root) / f"{sys.implementation.cache_tag}-{variant.hexdigest()[:16]}"


def _versions() -> list[str]:
    """Of all that makes machine code, as the packages' files say it: to import them would take ten times as long."""
    files = [Path(find_spec(name).origin).with_name("_version.py") for name in ("numba", "llvmlite")]
    return [sys.implementation.cache_tag, np.__version__, *(file.read_text() for file in files)]


def _cpu() -> tuple[str, str, str]:
    """Whose code is made: the CPU that numba is told, otherwise this one. Who is told "generic" can share a cache."""
    import llvmlite.binding as ll

    name, features = os.environ.get("NUMBA_CPU_NAME"), os.environ.get("NUMBA_CPU_FEATURES")
    if features is None:
        features = "" if str(name).lower() == "generic" else ll.get_host_cpu_features().flatten()
    return ll.get_process_triple(), ll.get_host_cpu_name() if name is None else name, features


def read(module: str) -> Code | None:
    """The entries of a module, if they were kept and every source is still what it was."""
    try:
        data = (cache_directory() / module).read_bytes()
        content = data[32:]
        if _digest(module, content) != data[:32]:
            return None
        (length,) = _LENGTH.unpack_from(content)
        entries = json.loads(content[_LENGTH.size : _LENGTH.size + length])
        return Code(content[_LENGTH.size + length :], {name: tuple(symbols) for name, symbols in entries.items()})
    except Exception:  # whatever goes wrong here must cost no more than a compilation
        return None


def write(module: str, code: Code) -> None:
    """Keep the entries of a module, where that is possible."""
    if _hash_sources() != _STAMP:
        return
    try:
        entries = json.dumps(code.entries).encode()
        content = _LENGTH.pack(len(entries)) + entries + code.objects
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


def _digest(module: str, content: bytes) -> bytes:
    folder = Path(sys.modules[module].__file__).parent
    sources = b"".join(hashlib.sha256(source.read_bytes()).digest() for source in sorted(folder.glob("*.py")))
    return hashlib.sha256(_STAMP + sources + content).digest()


def _hash_sources() -> bytes | None:
    """Of everything that a kernel may be made of; None where there are no files to read."""
    package = Path(__file__).parents[1]
    digest = hashlib.sha256()
    try:
        for source in (
            *sorted(package.glob("jit/*.py")),
            *sorted(package.glob("kernels/*.py")),
            *(package / f"{name.replace('.', '/')}.py" for name in BELOW),
        ):
            text = source.read_bytes()
            digest.update(f"{source.name} {len(text)}\n".encode() + text)
    except OSError:
        return None
    return digest.digest()


_STAMP = _hash_sources()  # now, as the sources are imported
