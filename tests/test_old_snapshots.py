"""Snapshots that earlier versions of fastexit wrote stay readable, each with its generation and all of its state.

tests/data/snapshot-VERSION-KERNEL.xz are machines of three vCPUs that have lived a little: VMX and SVM in turn, with
and without APICv, with interrupts posted, pending and in service, an NMI and a deadline under way. The JSON beside them
is what that version said of them. A version that writes snapshots in another way adds files of its own.
"""

from __future__ import annotations

import json
import lzma
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fastexit as fx
from fastexit import layout as L
from fastexit.profile import PROFILES

DATA = Path(__file__).parent / "data"
BODY = struct.calcsize("<8sIIII")
VCPUS = 3
SAID = {
    (version, kernel): state
    for version in ("0.1.0",)
    for kernel, state in json.loads((DATA / f"snapshot-{version}.json").read_text()).items()
}


def stored(version: str, kernel: str) -> bytes:
    return lzma.decompress((DATA / f"snapshot-{version}-{kernel}.xz").read_bytes())


def state(v: fx.Vcpu) -> dict[str, Any]:
    """What the JSON says of a vCPU; its ICR is left out, for where it lies is the generation's affair."""
    told = {
        "id": v.vcpu_id,
        "apic_base": v.apic_base,
        "rip": v.rip,
        "rflags": v.rflags,
        "mode": v.mode,
        "exits": v.counters()["exits"],
        "requests": v.requests,
    }
    page = struct.unpack("<256I", v.get_lapic())  # which takes it out of the guest
    return told | {"registers": {f"{4 * i:#05x}": word for i, word in enumerate(page) if word and not 0xC0 <= i < 0xC8}}


def state_words(data: bytes) -> np.ndarray:
    """The words of a snapshot, but for those that say what its writer knew: version, size, traits."""
    words = np.frombuffer(data, dtype=np.uint64, offset=BODY).copy()
    words[[L.H_ABI, L.H_WORDS, L.H_TRAITS, L.H_RULES, L.H_HYPERV_RULES]] = 0
    return words


@pytest.mark.parametrize(("version", "kernel"), SAID)
def test_state_is_the_same(version: str, kernel: str) -> None:
    """All that was told of the machine then is told of it now, and not a word of its state has changed."""
    said, data = SAID[version, kernel], stored(version, kernel)
    m = fx.Machine.restore(data)
    now, before = state_words(m.snapshot()), state_words(data)
    assert (now[: len(before)] == before).all()
    added = slice(len(before), len(before) + VCPUS * L.HV_STRIDE)  # Hyper-V's; the chips are behind
    assert (now[added] == state_words(fx.Machine(vcpus=VCPUS).snapshot())[added]).all()
    assert m.get_irqchip(2) == fx.Machine(vcpus=VCPUS, kernel=kernel).get_irqchip(2)
    assert (m.kernel, m.vendor, m.apicv) == (kernel, said["vendor"], said["apicv"])
    assert (m.time, m.next_timer()) == (said["time"], said["next_timer"])
    assert [state(v) for v in m.vcpus] == said["vcpus"]


@pytest.mark.parametrize(("version", "kernel"), SAID)
def test_it_goes_on_as_the_row_of_today(version: str, kernel: str) -> None:
    """Its traits are those that a new machine of that generation has, and the timer goes off when it is due."""
    m = fx.Machine.restore(stored(version, kernel))
    assert m.mem[L.H_TRAITS] == fx.Machine(vcpus=1, kernel=kernel).mem[L.H_TRAITS]
    assert m.profile is PROFILES[kernel]
    assert m.vcpus[2].events().nmi_pending
    assert [index for index, _ in m.set_time(500_000_000)] == [0]
