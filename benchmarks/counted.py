"""The process that valgrind watches: each side's IPIs in two lengths, counted between marks. See instructions.py."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import cffi
import streams
from lower_bound import LowerBound

SIDES = "fast", "fast one owner", "generic", "bound", "bound one owner"
LENGTHS = 500, 2_500
VCPUS = 64
DIRECTORY = Path(__file__).parents[1] / "build" / "native"


def marks() -> ModuleType:
    """Valgrind's client requests: start() counts from 0, stop() writes what was counted to a file of its own."""
    name = "fastexit_marks"
    ffi = cffi.FFI()
    ffi.cdef("void start(void); void stop(void);")
    ffi.set_source(
        name,
        "#include <valgrind/callgrind.h>\n"
        "static void start(void) { CALLGRIND_START_INSTRUMENTATION; CALLGRIND_ZERO_STATS; }\n"
        "static void stop(void) { CALLGRIND_DUMP_STATS; CALLGRIND_STOP_INSTRUMENTATION; }\n",
    )
    built = next(DIRECTORY.glob(f"{name}.*.so"), None) or ffi.compile(tmpdir=str(DIRECTORY))
    spec = importlib.util.spec_from_file_location(name, built)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.lib


def main() -> None:
    """One dump for each side and length, in order."""
    lib = marks()
    for side in SIDES:
        m = streams.machine(VCPUS, threads="one owner" not in side)
        m.fastpath = side != "generic"
        run = LowerBound(m).run if side.startswith("bound") else m.run
        for n in LENGTHS:
            exits = streams.ipis(m, n)
            run(exits)
            lib.start()
            run(exits)
            lib.stop()


if __name__ == "__main__":
    main()
