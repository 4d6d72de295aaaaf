"""What a lab's kernel boots: a cpio archive with one program and KVM's modules.

Models: nothing. Format: "newc" of the kernel's Documentation/driver-api/early-userspace/buffer-format.rst. Modes and
device numbers are only numbers in a header, so it takes no root to write them.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import struct
import subprocess
import tempfile
from collections.abc import Iterable, Iterator
from importlib.resources import files
from itertools import chain
from pathlib import Path
from typing import NamedTuple

DIRECTORY, FILE, PROGRAM, LINK, CHARACTER_DEVICE = 0o040755, 0o100644, 0o100755, 0o120777, 0o020600
CONSOLE = 5, 1
NAME_OF_LAST = "TRAILER!!!"
SIGNED, SIGNATURE_HEADER = b"~Module signature appended~\n", 12
"""How a signed module ends: the signature, struct module_signature, whose last word is its length, this text."""
_INCLUDED = re.compile(r'^#include "(.+)"$', re.M)


class Entry(NamedTuple):
    """One file of the archive; a link's data are where it leads."""

    name: str
    mode: int
    data: bytes = b""
    device: tuple[int, int] = (0, 0)


def cpio(entries: Iterable[Entry]) -> bytes:
    """The archive in memory."""
    return b"".join(parts(entries))


def parts(entries: Iterable[Entry]) -> Iterator[bytes]:
    """The archive: headers of hexadecimal numbers, names and contents each filled up to four bytes.

    Its length is a multiple of four, so another one can follow: the kernel unpacks both.
    """
    for number, entry in enumerate(chain(entries, (Entry(NAME_OF_LAST, 0),)), 1):
        name = os.fsencode(entry.name) + b"\0"
        fields = (number, entry.mode, 0, 0, 1, 0, len(entry.data), 0, 0, *entry.device, len(name), 0)
        head = b"070701" + b"".join(b"%08X" % field for field in fields) + name
        yield head + bytes(-len(head) & 3)
        yield entry.data
        yield bytes(-len(entry.data) & 3)


def unsigned(module: bytes) -> bytes:
    """A module without its signature, which an emulated machine takes seconds to check."""
    if not module.endswith(SIGNED):
        return module
    (length,) = struct.unpack_from(">I", module, len(module) - len(SIGNED) - 4)
    return module[: -len(SIGNED) - SIGNATURE_HEADER - length]


def initramfs(init: bytes, modules: Iterable[tuple[str, bytes, str]]) -> bytes:
    """An archive whose init loads ``modules`` in this order: names, contents, parameters."""
    return cpio(first_entries(init, modules))


def first_entries(init: bytes, modules: Iterable[tuple[str, bytes, str]]) -> list[Entry]:
    """What every archive has: a console, an init, the modules that it loads, and their list."""
    loaded = list(modules)
    lines = "".join(f"/{name} {parameters}".rstrip() + "\n" for name, _, parameters in loaded)
    return [
        Entry("dev", DIRECTORY),
        Entry("dev/console", CHARACTER_DEVICE, device=CONSOLE),
        Entry("init", PROGRAM, init),
        Entry("modules", FILE, lines.encode()),
        *(Entry(name, FILE, unsigned(data)) for name, data, _ in loaded),
    ]


def init_program(directory: Path, source: str = "init.c", flags: Iterable[str] = ()) -> bytes:
    """The static init, compiled when it is not in ``directory`` yet; OSError, in one line, where it cannot be.

    ``$CC`` is the compiler, otherwise cc.
    """
    folder = files("fastexit.kvm.lab")
    names = [source, *_INCLUDED.findall(folder.joinpath(source).read_text())]
    texts = {name: folder.joinpath(name).read_bytes() for name in names}
    kept = directory / f"{Path(source).stem}-{hashlib.sha256(b''.join(texts.values())).hexdigest()[:16]}"
    if kept.exists():
        return kept.read_bytes()
    compiler = os.environ.get("CC", "cc")
    if shutil.which(compiler.split()[0] if compiler.split() else "") is None:
        raise FileNotFoundError(f"no C compiler {compiler!r}: the lab's init is compiled once (CC names another)")
    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory) as scratch:
        there, made = Path(scratch) / source, Path(scratch) / "init"
        for name, text in texts.items():
            (Path(scratch) / name).write_bytes(text)
        command = [*compiler.split(), "-static", "-O2", *flags, "-o", str(made), str(there)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            lines = [line for line in done.stderr.splitlines() if "error" in line or "cannot find" in line]
            why = (lines or ["no reason given"])[0]
            hint = "; a static C library is needed (Debian: libc6-dev)" if "-lc" in done.stderr else ""
            raise OSError(f"the lab's init cannot be compiled: {why}{hint}")
        made.replace(kept)
    return kept.read_bytes()
