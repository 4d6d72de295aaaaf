"""native/lower_bound.c in this process: built once into build/, fed with the exits that the library is fed with."""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import os
import shutil
import sysconfig
from pathlib import Path
from types import ModuleType
from typing import Any

import cffi
import numpy as np

import fastexit as fx
from fastexit import layout as L

ROOT = Path(__file__).parents[1]
NATIVE = ROOT / "native"
ARCH = os.environ.get("FASTEXIT_BOUND_ARCH", "native")
FLAGS = ["-O3", f"-march={ARCH}"]
COMPILER = (sysconfig.get_config_var("CC") or "cc").split()[0]
HEADERS = Path(sysconfig.get_path("include"))
BUILT = ROOT / "build" / "native"
SENDER_WORDS = 8


def missing(compiler: str = COMPILER, headers: Path = HEADERS) -> str:
    """Say what an extension cannot be compiled without, if it is not here."""
    if shutil.which(compiler) is None:
        return f"no C compiler ({compiler})"
    return "" if (headers / "Python.h").exists() else f"no Python.h in {headers}: install Python's headers"


def extension(ffi: cffi.FFI, name: str) -> ModuleType:
    """Import an extension from build/, and compile it first if this Python has not done so before."""
    built = BUILT / f"{name}{sysconfig.get_config_var('EXT_SUFFIX')}"
    if not built.exists():
        ffi.compile(tmpdir=str(BUILT))
    spec = importlib.util.spec_from_file_location(name, built)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _declarations(path: Path) -> str:
    text = path.read_text()
    return text[text.index("/* cffi:begin */") : text.index("/* cffi:end */")]


def _cpu() -> list[str]:
    """What -march=native depends on: a build that was copied from another CPU may not run here."""
    told = "vendor_id", "cpu family", "model", "flags"
    first = Path("/proc/cpuinfo").read_text().partition("\n\n")[0].splitlines()
    return [line for line in first if line.startswith(told)] if ARCH == "native" else []


@functools.cache
def library() -> ModuleType:
    """The compiled extension; its name holds a digest of what it was made of, and for which CPU."""
    sources = [NATIVE / "fastexit_layout.h", NATIVE / "lower_bound.c"]
    made_of = b"".join(path.read_bytes() for path in sources) + repr((FLAGS, _cpu())).encode()
    digest = hashlib.sha256(made_of).hexdigest()[:12]
    name = f"fastexit_lower_bound_{digest}"
    ffi = cffi.FFI()
    ffi.cdef("".join(_declarations(path) for path in sources))
    ffi.set_source(name, '#include "lower_bound.c"', include_dirs=[str(NATIVE)], extra_compile_args=FLAGS)
    return extension(ffi, name)


def _aligned(words: int) -> np.ndarray:
    """Zeroed 64-bit words on a page border, each page touched."""
    block = np.empty(words + 512, dtype=np.uint64)
    start = -block.ctypes.data // 8 % 512
    block[:] = 0
    return block[start : start + words]


class LowerBound:
    """The C program with the state of a machine whose vCPUs all run in x2APIC mode; ``run`` as Machine.run."""

    def __init__(self, machine: fx.Machine) -> None:
        module = library()
        self._ffi, self._lib = module.ffi, module.lib
        n = len(machine.vcpus)
        hot = machine.words[L.HOT : L.HOT + n * L.HOT_STRIDE]
        self.hot = _aligned(n * L.HOT_STRIDE)
        self.hot[:] = hot
        rows = self.hot.reshape(n, L.HOT_STRIDE)
        rows[:, L.HOT_BLOCKED] = 0  # RVI stands there
        self.irr = _aligned(n * 4)
        self.sender = _aligned(n * SENDER_WORDS)
        self.sender.reshape(n, SENDER_WORDS)[:, 2] = [v.rflags for v in machine.vcpus]
        self.slots = _aligned((L.MAX_VCPU_ID + 4) // 4)
        base = machine.mem[L.H_MAP]
        slots = machine.words[base + L.MAP_SLOTS : base + L.MAP_WORDS].view(np.uint16)[L.MAP_PHYS_SLOT :]
        self.slots.view(np.uint16)[: len(slots)] = slots
        self.bound = self._ffi.new("struct fx_bound *")
        self.bound.hot = self._pointer("struct fx_bound_hot *", self.hot)
        self.bound.irr = self._pointer("uint64_t (*)[4]", self.irr)
        self.bound.sender = self._pointer("struct fx_bound_sender *", self.sender)
        self.bound.slots = self._pointer("uint16_t *", self.slots)
        self.bound.present = machine.mem[base + L.MAP_PRESENT]
        self.bound.max_id = machine.mem[base + L.MAP_MAX_ID]
        self.bound.vcpus = n
        self._run = self._lib.fx_bound_locked if machine.threads else self._lib.fx_bound_plain

    def _pointer(self, kind: str, array: np.ndarray) -> Any:
        return self._ffi.cast(kind, array.ctypes.data)

    def differences(self, machine: fx.Machine) -> list[str]:
        """Which words of descriptors, IRR and RVI differ from the machine's, once both have run the same exits."""
        n = len(machine.vcpus)

        def rows(words: np.ndarray, stride: int) -> np.ndarray:
            return words[: n * stride].reshape(n, stride)

        mine, words = rows(self.hot, L.HOT_STRIDE), machine.words
        hot, irr = rows(words[L.HOT :], L.HOT_STRIDE), rows(words[L.VEC :], L.VEC_STRIDE)[:, L.VEC_IRR :][:, :4]
        sides = {
            "PIR and control": (mine[:, :8], hot[:, :8]),
            "IRR": (rows(self.irr, 4), irr),
            "RVI": (mine[:, L.HOT_BLOCKED], rows(words[L.VEC :], L.VEC_STRIDE)[:, L.VEC_RVI]),
        }
        return [name for name, (ours, theirs) in sides.items() if not np.array_equal(ours, theirs)]

    def run(self, exits: np.ndarray) -> np.ndarray:
        """One outcome for each record; an error when a record is none that the program knows."""
        outcomes = np.empty(len(exits), dtype=L.OUTCOME)
        done = self._run(
            self.bound,
            self._pointer("struct fx_exit *", exits),
            self._pointer("struct fx_outcome *", outcomes),
            len(exits),
        )
        if done != len(exits):
            raise RuntimeError(f"the lower bound stopped at record {done}: {exits[done]}")
        return outcomes
