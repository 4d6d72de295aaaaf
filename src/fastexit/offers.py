"""What a kernel does not offer: options by the release that brought them.

A machine that asks an older kernel for a later one's option is refused by name: KVM would say EINVAL, and a study of an
old kernel would use what it never had. Models: KVM_CHECK_EXTENSION and the checks of KVM_ENABLE_CAP, KVM_CREATE_VCPU.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from typing import Any, NamedTuple

from fastexit import regs as R
from fastexit.profile import as_of
from fastexit.releases import generation, numbers, release

MSR_FILTER_SINCE = "5.10"
"""KVM_X86_SET_MSR_FILTER and KVM_CAP_X86_USER_SPACE_MSR came with it."""
BUS_CYCLES_SINCE = "6.12"
"""KVM_CAP_X86_APIC_BUS_CYCLES_NS came with it."""
LATER_API_SINCE = "6.18.17"
LATER_API = R.X2API_SUPPRESS_EOI | R.X2API_NO_SUPPRESS_EOI
"""Flags of KVM_CAP_X2APIC_API that came later than the others."""


class Offer(NamedTuple):
    """A value of one of Machine's keywords that not every kernel has."""

    keyword: str
    since: str
    """The first release that has it."""
    asked: Callable[[Mapping[str, Any]], Any]
    """Whether these settings want it."""


OFFERS = (
    Offer("x2apic_api", LATER_API_SINCE, lambda s: s["x2apic_api"] & LATER_API),
    Offer("bus_cycle_ns", BUS_CYCLES_SINCE, lambda s: s["bus_cycle_ns"] != 1),
    Offer("cmci", "6.1", lambda s: s["cmci"]),
    Offer("hyperv", "5.15", lambda s: s["hyperv"] == "enforce"),
    Offer("ipiv", "6.1", lambda s: s["ipiv"] and s["vendor"] == "vmx"),
    Offer("x2avic", "6.1", lambda s: s["x2avic"]),
    Offer("disable_exits", "6.18", lambda s: s["disable_exits"] & R.DisableExits.APERFMPERF),
)


class Room(NamedTuple):
    """KVM_CAP_MAX_VCPUS: how many vCPUs a VM may have. KVM_CAP_MAX_VCPU_ID: what their ids must be below."""

    vcpus: int
    ids: int


ROOM = {"seed-v3": Room(288, 1023), "5.15": Room(1024, 4096), "6.12": Room(4096, 16384)}
"""What holds from a generation on; from 6.12 on as distributions configure it."""


@cache
def room(kernel: str) -> Room:
    """How many vCPUs a kernel's VMs may have, with which ids."""
    found = as_of(ROOM, generation(kernel).name)
    assert found is not None  # the first row is in the table
    return found


def check(settings: Mapping[str, Any]) -> None:
    """ValueError for a setting that the settings' own kernel does not know, by name."""
    for offer in OFFERS:
        if offer.asked(settings):
            require(settings["kernel"], offer.since, f"{offer.keyword}={settings[offer.keyword]!r}")


def lacks(kernel: str, first: str) -> bool:
    """Tell whether a kernel is older than a release. A generation counts as its tree, any other release as itself.

    What came with "5.10" came with the series' first release: 5.10.223, older than the tree of "5.10", has it.
    """
    brought = release(first)
    assert brought is not None
    return numbers(kernel) < (*brought.series, brought.patch or 0)


def require(kernel: str, first: str, what: str) -> None:
    """ValueError where a kernel is older than the first release that has ``what``."""
    if lacks(kernel, first):
        raise ValueError(f"{what}: kernel {kernel} has no such option, which came with {first}")
