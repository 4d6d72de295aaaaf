"""Kernel generations as tests ask for them, so that what a test says stays true when a row is put between two others.

FASTEXIT_TEST_ROWS proves it. It names rows on trial, each a copy of another row under a new name. A copy stands right
behind its original, and all tests have to pass with it:

    FASTEXIT_TEST_ROWS=5.5=seed-v3,5.9=5.8,6.3=6.1,9.9=6.18 python -m pytest -m "not long"

Only tests know of such rows. They are in no document and no header, and a Python that a test starts is without them.
"""

from __future__ import annotations

import os
from typing import Any

from fastexit import offers, profile
from fastexit.profile import PROFILES, since
from fastexit.traits import Trait

ON_TRIAL: list[str] = []
"""Names of the rows on trial."""


def put_in(rows: str) -> None:
    """Put rows on trial in; before any other module of fastexit is imported, for some look at the rows then."""
    names = list(PROFILES)
    for number, row in enumerate(filter(None, rows.split(",")), 1000):
        name, _, original = row.partition("=")
        PROFILES[name] = PROFILES[original]._replace(name=name, number=number)
        names.insert(names.index(original) + 1, name)
        ON_TRIAL.append(name)
    ordered = {name: PROFILES[name] for name in names}
    PROFILES.clear()
    PROFILES.update(ordered)
    profile.ORDER.update((name, place) for place, name in enumerate(names))
    profile.NEWEST = names[-1]
    globals().update(FILTERS=kernels(offers.MSR_FILTER_SINCE), DRAWN=_drawn())


def kernels(first: str = "seed-v3", *, before: str | None = None) -> tuple[str, ...]:
    """The generations from ``first`` on that are older than ``before``, oldest first."""
    return tuple(name for name in PROFILES if since(name, first) and (before is None or not since(name, before)))


def having(trait: Trait) -> tuple[str, ...]:
    """The generations whose row has a trait, oldest first: stable kernels may have what a later series has not."""
    return tuple(name for name, known in PROFILES.items() if known.traits & trait)


def offered(kernel: str, options: dict[str, Any]) -> dict[str, Any]:
    """Machine's keywords without what this generation does not offer, and without vCPU ids that it does not take."""
    usual = {
        "x2apic_api": 0,
        "bus_cycle_ns": 1,
        "cmci": False,
        "ipiv": None,
        "x2avic": False,
        "disable_exits": 0,
        "hyperv": True,
    }
    chosen = usual | {"vendor": "vmx"} | options | {"kernel": kernel}
    left = dict(options)
    for offer in offers.OFFERS:
        if offer.keyword in left and offer.asked(chosen) and offers.lacks(kernel, offer.since):
            masks = {"x2apic_api": ~offers.LATER_API, "disable_exits": 15}
            mask = masks.get(offer.keyword)
            left[offer.keyword] = usual[offer.keyword] if mask is None else left[offer.keyword] & mask
    if "apic_ids" in left:
        most = offers.room(kernel).ids
        left["apic_ids"] = type(left["apic_ids"])(i for i in left["apic_ids"] if i < most) or type(left["apic_ids"])(
            [0]
        )
    return left


FILTERS = kernels(offers.MSR_FILTER_SINCE)
"""Generations with KVM_X86_SET_MSR_FILTER and KVM_CAP_X86_USER_SPACE_MSR."""


_HALF = any(os.environ.get(name, "0") not in ("", "0") for name in ("NUMBA_DISABLE_JIT", "NUMBA_BOUNDSCHECK"))


def _drawn() -> tuple[str, ...]:
    return ("seed-v3", "5.8", "5.10", "6.1", "6.12", profile.NEWEST) if _HALF else kernels()


DRAWN = _drawn()
"""The generations for which random lives are drawn.

All with compiled kernels as users have them; half of them where each life takes long (interpreted), and where the
question is no generation's (whether an index is inside the memory).
"""
