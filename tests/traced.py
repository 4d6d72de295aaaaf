"""A booted machine with tracing on, for the tests of what tracepoints print and in which order."""

from __future__ import annotations

from typing import Any

import fastexit as fx
from fastexit import layout as L


def booted(kernel: str = "6.18", vendor: str = "vmx", apicv: bool = False, **options: Any) -> fx.Machine:
    """A machine whose vCPU 0 runs, with tracing on from here."""
    if "apic_ids" not in options:
        options["vcpus"] = 3
    m = fx.Machine(kernel=kernel, vendor=vendor, apicv=apicv, **options)
    m.boot_x2apic()
    m.vcpus[0].wrmsr(0x808, 0)
    m.trace.enable()
    return m


def injected(m: fx.Machine) -> int:
    """Interruption information of the last entry, which the text of older generations does not show."""
    records = m.trace.records()
    return int(records[records["event"] == L.TP_ENTRY][-1]["args"][1])
