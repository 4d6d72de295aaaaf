"""The C ABI as Python sees it: which kernels the library calls, the structs of fastexit.h as dtypes, enums by name.

A test compares all of it with the header and with the signatures of the kernels.
"""

from __future__ import annotations

from enum import IntEnum, IntFlag
from pathlib import Path
from typing import Any, cast

import numpy as np

from fastexit import layout as L
from fastexit import offers
from fastexit.config import header as config_header
from fastexit.hyperv import ALL_FEATURES, HvFeature
from fastexit.jit import declare
from fastexit.kernels import entries as _entries
from fastexit.profile import NEWEST, named
from fastexit.settings import SETTINGS, Settings

NATIVE = Path(__file__).parent / "native"
HEADERS = "fastexit_layout.h", "fastexit.h"
SHIPPED = *HEADERS, "fastexit_calls.h", "fastexit.hpp"
"""What a host may include: the ABI, and what calls.py makes of it."""
SHIM = "shim.h"
"""What the library's own C declares for itself: the kernels' table."""
PARTS = (
    *("shim.c", "trace.c", "exits.c", "hardware.c", "vcpu.c", "clock.c", "chips.c", "memory.c", "python.c"),
    *("calls.c", "open.c"),
)
"""The library's own C; the first one includes the others."""
SOURCES = *SHIPPED, SHIM, *PARTS

ENTRIES = (
    "door_ipi",
    "run",
    "first_bad",
    "signal_msi",
    "process_notification",
    "pending",
    "ack",
    "eoi",
    "door_run",
    "door_leave",
    "door_reset",
    "set_msr",
    "get_msr",
    "get_state",
    "set_state",
    "due_timer",
    "fire_timer",
    "hv_timer_exit",
    "next_timer",
    "create_vcpu",
    "door_hypercall",
    "enable_synic",
    "hv_sint_line",
    "irq_line",
    "rerouted",
    "irqfd_signal",
    "irqfd_resample",
    "get_irqchip",
    "set_irqchip",
    "create_pit",
    "get_pit",
    "set_pit",
    "queue_nmi",
    "door_smi",
    "door_interrupt",
    "door_rsm",
    "door_access",
    "deliver_pending",
    "door_window",
    "take_event",
    "advance_clock",
    "due_timer_of",
    "hv_timer_exits",
    "next_timer_of",
    "run_machine_timer",
    "next_machine_timer",
)
"""Kernel entries in the order of struct fxp_table."""


class Status(IntEnum):
    """What C functions return: FX_OK, FX_GP, ...; errors, FX_E_*, are negative."""

    OK = 0
    GP = 1
    USER = 2
    BLOCKED = 3
    NOTHING = 4
    MORE = 5
    UNHANDLED = 6
    E_NULL = -1
    E_SIZE = -2
    E_ABI = -3
    E_MACHINE = -4
    E_VCPU = -5
    E_RANGE = -6
    E_SNAPSHOT = -7
    E_PYTHON = -8
    E_MEMORY = -9


class Open(IntFlag):
    """fx_config.flags: FX_BOOT_X2APIC, ..."""

    BOOT_X2APIC = 1 << 0
    ONE_OWNER = 1 << 1
    NO_APICV = 1 << 2
    SPLIT_IRQCHIP = 1 << 3
    NO_X2APIC = 1 << 4
    NO_TSC_DEADLINE = 1 << 5
    NO_VECTOR_HASHING = 1 << 6
    CMCI = 1 << 7
    SMM = 1 << 8
    NO_NRIPS = 1 << 9
    NO_HV_TIMER = 1 << 10
    IPIV = 1 << 11
    NO_IPIV = 1 << 12
    VTD_PI = 1 << 13
    X2AVIC = 1 << 14
    PI_INJECT_TIMER = 1 << 15
    NO_RETPOLINE = 1 << 16
    QUIET = 1 << 17
    NO_SMM = 1 << 18
    NO_KVM_HYPERV = 1 << 19
    HYPERV = 1 << 20
    HYPERV_ENFORCE = 1 << 21


CONFIG = np.dtype(
    [
        ("size", "<u4"),
        ("abi", "<u4"),
        ("vcpus", "<u4"),
        ("vendor", "<u4"),
        ("kernel", "<u4"),
        ("flags", "<u4"),
        ("apic_ids", "<u8"),
        ("x2apic_api", "<u4"),
        ("maxphyaddr", "<u4"),
        ("tsc_khz", "<u4"),
        ("bus_cycle_ns", "<u4"),
        ("min_timer_period_us", "<u4"),
        ("timer_advance_ns", "<u4"),
        ("disable_exits", "<u4"),
        ("disable_quirks", "<u4"),
        ("boot_cpu_id", "<u4"),
        ("hv_features", "<u4"),
        ("costs", "<u8"),
    ],
    align=True,
)
"""struct fx_config; ``apic_ids`` and ``costs`` are addresses."""

RESULT = np.dtype(
    [
        ("completion", "u1"),
        ("path", "u1"),
        ("fault", "u1"),
        ("refusal", "u1"),
        ("accepted", "<i2"),
        ("user", "u1"),
        ("effects", "u1"),
        ("value", "<u8"),
        ("status", "<i4"),
        ("vcpu", "<u4"),
        ("target", "<u4"),
        ("vector", "<u4"),
        ("cycles_ipi", "<u8"),
        ("cycles", "<u8"),
        ("cycles_spent", "<u8"),
    ],
    align=True,
)
"""struct fx_result."""

VENDORS = SETTINGS["vendor"].choices
HVF_NONE = 1 << 30
"""FX_HVF_NONE of fx_config.hv_features, in which 0 means all."""


def declarations(name: str) -> str:
    """The part of a C file that cffi can parse."""
    text = (NATIVE / name).read_text()
    return text[text.index("/* cffi:begin */") : text.index("/* cffi:end */")]


def addresses() -> dict[str, int]:
    """Address of each kernel that the library calls; compiled code is kept as long as the process lives."""
    if not declare.JIT:
        raise RuntimeError("kernels are interpreted (NUMBA_DISABLE_JIT), and C can call compiled ones only")
    return {name: declare.address(name) for name in ENTRIES}


def keywords(config: Any) -> Settings:
    """Machine's settings for a struct fx_config, those that it leaves at their defaults left out.

    ValueError for numbers that the header does not know. ``config`` has the struct's fields as attributes.
    """
    kernels = {known.number + 1: name for name, known in named().items()}
    flags = int(config.flags)
    unknown = flags & ~sum(Open)
    for name, value, known in (
        ("vendor", config.vendor, len(VENDORS)),
        ("hv_features", config.hv_features & ~HVF_NONE, int(ALL_FEATURES) + 1),
    ):
        if value >= known:
            raise ValueError(f"fx_config.{name} {value} is out of range 0..{known - 1}")
    if config.kernel and config.kernel not in kernels:
        known_numbers = ", ".join(map(str, [0, *sorted(kernels)]))
        raise ValueError(f"fx_config.kernel {config.kernel} is none of FX_KERNEL_*: {known_numbers}")
    if unknown:
        raise ValueError(f"fx_config.flags has bits that are unknown: {unknown:#x}")
    on = Open(flags)
    given: dict[str, Any] = {"vendor": VENDORS[config.vendor]}
    if config.kernel:
        given["kernel"] = kernels[config.kernel]
    for name, setting in SETTINGS.items():
        for flag, value in setting.flags.items():
            if Open[flag] in on:
                given[name] = value
        if type(setting.default) is int and (number := int(getattr(config, name))):
            given[name] = number
    if config.hv_features:
        given["hyperv_features"] = HvFeature(int(config.hv_features) & ~HVF_NONE)
    return cast(Settings, given)


def header(config: Any, ids: list[int]) -> dict[int, int]:
    """Header words of the machine that a struct fx_config describes; ValueError as Machine has it."""
    settings = keywords(config)
    room = offers.room(settings.get("kernel", NEWEST))
    vcpus, last_id = min(room.vcpus, L.MAX_VCPUS), min(room.ids - 1, L.MAX_VCPU_ID)
    if not 0 < config.vcpus <= vcpus:
        raise ValueError(f"fx_config.vcpus is {config.vcpus}: 1 to {vcpus}")
    if ids:
        if max(ids) > last_id:
            raise ValueError(f"APIC id {max(ids)} is out of range 0..{last_id}")
        if len(set(ids)) < len(ids):
            raise ValueError("an APIC id is there twice (EEXIST)")
    return config_header(settings)


assert _entries.NO_VCPU == L.NONE
