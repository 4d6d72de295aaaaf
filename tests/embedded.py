"""libfastexit for tests: built once into build/embed, opened in this process or by programs of its own."""

from __future__ import annotations

import fcntl
import functools
import hashlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cffi
import pytest

import fastexit
from conftest import INTERPRETED
from fastexit import layout as L
from fastexit.embed import build, cabi

ROOT = Path(__file__).parents[1]
SEVERAL, NOBODY = 0xFFFF_FFFE, 0xFFFF_FFFF
compiled = pytest.mark.skipif(INTERPRETED, reason="C calls compiled kernels only")


def need_compiler() -> None:
    """Skip where a library cannot be made, and say what is missing."""
    try:
        build.compiler()
        build.interpreter()
    except ValueError as missing:
        pytest.skip(str(missing))


def built(flags: str = "") -> Path:
    """The directory of a library with everything that belongs to it; an old one is used while nothing has changed."""
    sources = [cabi.NATIVE / name for name in cabi.SOURCES]
    sources += [Path(str(module.__file__)) for module in (build, cabi)]
    made_of = b"".join(path.read_bytes() for path in sources)
    made_of += repr((sys.executable, sys.version, flags, fastexit.__file__, os.environ.get("PYTHONPATH"))).encode()
    digest = hashlib.sha256(made_of).hexdigest()[:12]
    place = ROOT / "build" / "embed" / digest
    place.mkdir(parents=True, exist_ok=True)
    with (place / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (place / "done").exists():
            build.build(place, flags=flags)
            (place / "done").touch()
    return place


@functools.cache
def declared() -> cffi.FFI:
    """The header, parsed."""
    parser = cffi.FFI()
    parser.cdef("".join(cabi.declarations(name) for name in cabi.HEADERS))
    return parser


class Door:
    """The library in this process: ``d.wrmsr(m, 0, 0x830, icr)`` gives status and result."""

    def __init__(self) -> None:
        self.ffi = declared()
        self.lib = self.ffi.dlopen(str(built() / build.LIBRARY))
        self.fx = self.ffi.new("struct fx_ops *", {"size": self.ffi.sizeof("struct fx_ops"), "abi": L.ABI_VERSION})
        self.result = self.ffi.new("struct fx_result *")

    def config(self, **fields: Any) -> Any:
        head = {"size": self.ffi.sizeof("struct fx_config"), "abi": L.ABI_VERSION, "vcpus": 2}
        return self.ffi.new("struct fx_config *", {**head, "flags": cabi.Open.QUIET, **fields})

    def open(self, hooks: Any = None, ids: list[int] | None = None, **fields: Any) -> Any:
        """A machine; an AssertionError when there is none."""
        place = self.ffi.new("fx_machine **")
        array = self.ffi.new("uint32_t[]", ids) if ids else self.ffi.NULL
        if ids:
            fields |= {"vcpus": len(ids), "apic_ids": array}
        config = self.config(**fields)
        status = self.lib.fx_open(config, hooks or self.ffi.NULL, place, self.fx)
        assert status == 0, (status, self.last_error())
        return place[0]

    def last_error(self) -> str:
        return self.ffi.string(self.lib.fx_last_error()).decode()

    def __getattr__(self, name: str) -> Any:
        call = getattr(self.fx, name)

        def with_result(*args: Any) -> tuple[int, Any]:
            return call(*args, self.result), self.result

        return with_result

    def snapshot(self, m: Any) -> bytes:
        needed = self.ffi.new("uint64_t *")
        assert self.fx.snapshot(m, self.ffi.NULL, 0, needed) == 0
        buffer = self.ffi.new("uint8_t[]", needed[0])
        assert self.fx.snapshot(m, buffer, needed[0], needed) == 0
        return bytes(self.ffi.buffer(buffer))

    def restore(self, data: bytes) -> tuple[int, Any]:
        place = self.ffi.new("fx_machine **")
        return self.lib.fx_restore(self.ffi.from_buffer(data), len(data), self.ffi.NULL, place, self.fx), place[0]

    def vector(self, name: str, m: Any, vcpu: int) -> int | None:
        place = self.ffi.new("uint32_t *")
        status = getattr(self.fx, name)(m, vcpu, place)
        assert status in (0, cabi.Status.NOTHING), status
        return place[0] if status == 0 else None

    def targets(self, m: Any, vcpu: int) -> list[tuple[int, int]]:
        """Whom the last exit or ioctl of a vCPU was for, or with NOBODY the last message; asked without room first."""
        count = self.ffi.new("uint64_t *")
        status = self.fx.targets(m, vcpu, self.ffi.NULL, 0, count)
        found = self.ffi.new("struct fx_target[]", count[0])
        assert status == (cabi.Status.MORE if count[0] else 0)
        assert self.fx.targets(m, vcpu, found, count[0], count) == 0
        return [(target.vcpu, target.effects) for target in found]

    def set_time(self, m: Any, ns: int, room: int = 8) -> Iterator[Any]:
        """Every result, the buffer filled as often as it takes."""
        results, count = self.ffi.new("struct fx_result[]", room), self.ffi.new("uint64_t *")
        while True:
            status = self.fx.set_time(m, ns, results, room, count)
            yield from results[0 : count[0]]
            if status != cabi.Status.MORE:
                assert status == 0, status
                return


def run_host(program: Path, *args: str, timeout: float = 60, **environment: str) -> subprocess.CompletedProcess:
    """A C program with a clean environment, as a stranger would start it."""
    kept = {name: os.environ[name] for name in ("PATH", "HOME", "FASTEXIT_CACHE_DIR") if name in os.environ}
    return subprocess.run(
        [str(program), *args], env=kept | environment, capture_output=True, text=True, timeout=timeout, check=False
    )
