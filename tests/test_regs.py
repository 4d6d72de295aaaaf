"""The ICR value of an IPI, from whatever a caller has its parts in."""

from __future__ import annotations

import numpy as np
import pytest

import fastexit as fx
from fastexit.regs import DeliveryMode, Shorthand


@pytest.mark.parametrize("shorthand", Shorthand)
@pytest.mark.parametrize("delivery", DeliveryMode)
def test_icr_takes_names(delivery: DeliveryMode, shorthand: Shorthand) -> None:
    """In any case, and with - or _: the names that the enumerations, KVM's trace lines and the command line have."""
    expected = fx.icr(3, 0x41, delivery=int(delivery), shorthand=int(shorthand))
    for change in (str.lower, str.upper, lambda name: name.lower().replace("_", "-")):
        assert fx.icr(3, 0x41, delivery=change(delivery.name), shorthand=change(shorthand.name)) == expected


def test_icr_takes_numbers_of_numpy() -> None:
    """Elements of arrays: 32-bit ones must not wrap when they are shifted, and a mask's are no integers to Python."""
    mask, dests = np.array([False, True]), np.array([0, 300], dtype=np.uint32)
    value = fx.icr(dests[1], np.uint8(0xFD), logical=mask[1], level=mask[1], busy=mask[0], shorthand=np.int64(0))
    assert value == fx.icr(300, 0xFD, logical=True, level=True)
    assert type(value) is int
