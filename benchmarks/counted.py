"""The process that valgrind watches: each side's IPIs in two lengths, counted between marks. See instructions.py."""

from __future__ import annotations

from typing import Any

import cffi
import streams
from lower_bound import LowerBound, extension

SIDES = (
    "fast",
    "fast one owner",
    "generic",
    "fast 6.1",
    "generic 6.1",
    "bound",
    "bound one owner",
    "irq_line",
    "IOAPIC page access",
    "EOI of a level interrupt",
)
"""6.1 stands for the generations whose fast path goes on through the run loop: no short way is theirs. The last three
are no IPIs: a line up, consumed and down; a read of the IOAPIC's window; a line up, taken by way of its vCPU's APIC,
down, and its EOI.
"""
LENGTHS = 500, 2_500
VCPUS = 64


def marks() -> Any:
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
    return extension(ffi, name).lib


def main() -> None:
    """One dump for each side and length, in order."""
    lib = marks()
    for side in SIDES:
        kernel = "6.1" if side.endswith("6.1") else streams.KERNEL
        m = streams.machine(VCPUS, threads="one owner" not in side, kernel=kernel)
        m.fastpath = not side.startswith("generic")
        if side in streams.OF_DEVICES:
            m = streams.machine(VCPUS, apicv=side != "EOI of a level interrupt")
        run = LowerBound(m).run if side.startswith("bound") else m.run
        for n in LENGTHS:
            exits = streams.OF_DEVICES.get(side, streams.ipis)(m, n)
            run(exits)
            lib.start()
            run(exits)
            lib.stop()


if __name__ == "__main__":
    main()
