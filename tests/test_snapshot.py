"""Snapshots: the machine comes back to the byte and goes on as if nothing had been; bad bytes are refused."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import fastexit as fx
from fastexit import layout as L

HEAD = struct.Struct("<8sIIII")


def lived_in(kernel: str = "6.18", vendor: str = "vmx", apicv: bool = True) -> fx.Machine:
    """Four vCPUs in different modes with interrupts posted, pending and in service, an NMI and an INIT under way."""
    m = fx.Machine(apic_ids=[0, 1, 300, 3], kernel=kernel, vendor=vendor, apicv=apicv, x2apic_api=1)
    m.boot_x2apic()
    m.vcpus[3].set_msr(0x1B, 0xFEE0_0800)
    m.vcpus[0].wrmsr(0x830, fx.icr(dest=1, vector=0x41))
    m.vcpus[1].ack()
    for vector in (0x31, 0xFD):
        m.vcpus[0].wrmsr(0x830, fx.icr(dest=1, vector=vector))
    m.vcpus[0].wrmsr(0x830, fx.icr(dest=300, delivery=4))
    m.vcpus[0].wrmsr(0x830, fx.icr(dest=1, delivery=5, level=True))
    return m


def go_on(m: fx.Machine) -> list[Any]:
    """What the machine does next, seen from outside."""
    told: list[Any] = [m.vcpus[0].wrmsr(0x830, fx.icr(dest=d, vector=0x52)) for d in (0, 1, 3, 300, 77, 0xFFFF_FFFF)]
    told += [m.signal_msi(0xFEE0_3000, 0x61), m.signal_msi(0xFEE0_0008, 0x162)]
    told += [(v.pending(), v.ack(), v.eoi(), v.get_mp_state(), v.events(), v.get_lapic()) for v in m.vcpus]
    return told


def forged(m: fx.Machine, change: Callable[[np.ndarray], Any]) -> bytes:
    """A snapshot whose words were changed by somebody who knows how to compute the checksum."""
    data = m.snapshot()
    words = np.frombuffer(data, dtype=np.uint64, offset=HEAD.size).copy()
    change(words)
    body = words.tobytes()
    magic, abi, n, _, length = HEAD.unpack_from(data)
    return HEAD.pack(magic, abi, n, zlib.crc32(body), length) + body


def put(index: int, value: int) -> Callable[[np.ndarray], None]:
    def change(words: np.ndarray) -> None:
        words[index] = value

    return change


def kvm_word(n: int, word: int) -> int:
    """Where a vCPU 0 word of KVM's own lies in the snapshot of a machine with n vCPUs."""
    tables = L.TABLES_END - L.FILTER
    return L.MAP1 + L.MAP_WORDS + tables + n * (L.HOT_STRIDE + L.VEC_STRIDE + L.PAGE_STRIDE) + word


def refuses(data: Any, text: str, kind: type[Exception] = ValueError) -> None:
    """Restoring fails in one line that says why."""
    with pytest.raises(kind) as caught:
        fx.Machine.restore(data)
    message = str(caught.value)
    assert type(caught.value) is kind
    assert text in message, message
    assert "\n" not in message


@pytest.mark.parametrize("apicv", [True, False], ids=["apicv", "plain"])
@pytest.mark.parametrize("vendor", ["vmx", "svm"])
@pytest.mark.parametrize("kernel", fx.profiles())
def test_restored_machine_goes_on(kernel: str, vendor: str, apicv: bool) -> None:
    """A restored machine is the same to the byte, and does from there what the original does."""
    m = lived_in(kernel, vendor, apicv)
    data = m.snapshot()
    copy = fx.Machine.restore(data)
    assert copy.snapshot() == data
    assert (copy.kernel, copy.vendor, copy.apicv, copy.threads) == (m.kernel, m.vendor, m.apicv, m.threads)
    assert [(v.index, v.vcpu_id) for v in copy.vcpus] == [(v.index, v.vcpu_id) for v in m.vcpus]
    assert go_on(copy) == go_on(m)
    assert copy.snapshot() == m.snapshot()


def test_snapshot_changes_nothing() -> None:
    """Taking a snapshot leaves the machine alone, whoever is in the guest, and two in a row are equal."""
    m = lived_in()
    modes = [v.mode for v in m.vcpus]
    assert m.snapshot() == m.snapshot()
    assert [v.mode for v in m.vcpus] == modes
    assert modes[0] == 1


def test_restored_machine_is_its_own() -> None:
    """Original and copy share no memory."""
    m = lived_in()
    data = m.snapshot()
    copy = fx.Machine.restore(data)
    go_on(m)
    assert copy.snapshot() == data


def test_snapshot_from_any_buffer() -> None:
    """bytes, bytearray and memoryview restore alike."""
    data = lived_in().snapshot()
    for buffer in (data, bytearray(data), memoryview(data)):
        assert fx.Machine.restore(buffer).snapshot() == data


def test_trace_and_handlers_stay_behind() -> None:
    """The trace is not part of a snapshot, and a copy has the built-in handlers, in the batch door, too."""
    m = lived_in()
    m.trace.enable()
    m.handlers[fx.VmxExit.MSR_READ] = lambda v, exit: fx.KvmExit.X86_RDMSR
    m.vcpus[0].wrmsr(0x808, 0)
    copy = fx.Machine.restore(m.snapshot())
    assert len(m.trace) > 0
    assert len(copy.trace) == 0
    assert copy.vcpus[0].rdmsr(0x802) == 0
    (result,) = copy.run(np.array([(0, 31, 0x1B, 0, 0)], dtype=fx.EXIT))
    assert result["value"] == copy.vcpus[0].apic_base


def test_vcpu_can_be_added_to_a_copy() -> None:
    """A copy knows which ids are taken, and grows like the original."""
    m = lived_in()
    copy = fx.Machine.restore(m.snapshot())
    with pytest.raises(ValueError, match="APIC id 300 is taken by vCPU 2"):
        copy.add_vcpu(300)
    assert copy.add_vcpu(9).index == m.add_vcpu(9).index == 4
    assert copy.snapshot() == m.snapshot()


def test_new_vcpu_stays_out_of_the_map() -> None:
    """A vCPU that is not in the APIC map yet is not in the copy's map either."""
    m = fx.Machine(vcpus=2)
    m.boot_x2apic()
    m.add_vcpu(2)
    copy = fx.Machine.restore(m.snapshot())
    for machine in (m, copy):
        assert machine.vcpus[0].wrmsr(0x830, fx.icr(dest=2, delivery=4)).accepted == 0


@pytest.mark.parametrize("length", [0, 1, 8, 23])
def test_truncated_head(length: int) -> None:
    """Too short for the head."""
    refuses(lived_in().snapshot()[:length], f"snapshot is truncated: {length} bytes")


@pytest.mark.parametrize("missing", [1, 8, 1000])
def test_truncated_body(missing: int) -> None:
    """The end is missing."""
    refuses(lived_in().snapshot()[:-missing], "snapshot is truncated: ")
    refuses(lived_in().snapshot()[:24], "snapshot is truncated: 0 of ")


def test_trailing_bytes() -> None:
    """Something was appended: that is not called truncated."""
    data = lived_in().snapshot() + b"\0"
    with pytest.raises(ValueError, match="snapshot") as caught:
        fx.Machine.restore(data)
    assert "truncated" not in str(caught.value)


def test_foreign_bytes() -> None:
    """Some other file."""
    refuses(b"\x7fELF" + bytes(5000), "not a fastexit snapshot")


def test_other_abi_version() -> None:
    """A snapshot of another version names both."""
    data = bytearray(lived_in().snapshot())
    struct.pack_into("<I", data, 8, L.ABI_VERSION + 6)
    refuses(data, f"snapshot has ABI version {L.ABI_VERSION + 6}, this library has {L.ABI_VERSION}")


@pytest.mark.parametrize("place", [24, 25, 1000, -1])
def test_flipped_bit(place: int) -> None:
    """One bit of the body is wrong."""
    data = bytearray(lived_in().snapshot())
    data[place] ^= 0x10
    refuses(data, "snapshot is damaged: checksum differs")


@pytest.mark.parametrize("place", range(8, 24))
@pytest.mark.parametrize("bit", [0, 7])
def test_flipped_head_bit(place: int, bit: int) -> None:
    """One bit of the head is wrong, whichever: refused."""
    data = bytearray(lived_in().snapshot())
    data[place] ^= 1 << bit
    refuses(data, "snapshot ")


@pytest.mark.parametrize("wrong", ["x" * 2000, 5000, None, 1.5], ids=lambda wrong: type(wrong).__name__)
def test_no_bytes_at_all(wrong: Any) -> None:
    """Not even bytes: a TypeError that names the type."""
    refuses(wrong, f"not {type(wrong).__name__}", TypeError)


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(put(L.H_MAGIC, 1), id="magic"),
        pytest.param(put(L.H_ABI, 99), id="ABI version"),
        pytest.param(put(L.H_WORDS, 5), id="words"),
        pytest.param(put(L.H_MAP, 1 << 40), id="map far outside"),
        pytest.param(put(L.H_MAP, L.MAP0 + 1), id="map in the middle"),
        pytest.param(put(L.H_PROFILE, 1000), id="profile"),
        pytest.param(put(L.H_MAXPHYADDR, 64), id="maxphyaddr"),
        pytest.param(put(L.H_MAP_LOCK, 1), id="map lock held"),
        pytest.param(put(L.H_INHIBITS, 1 << 13), id="unknown inhibit"),
        pytest.param(put(L.H_NVCPUS, 5000), id="number of vCPUs"),
        pytest.param(put(L.MAP1 + L.MAP_MAX_ID, 1 << 30), id="largest id of the map"),
        pytest.param(put(L.MAP0 + L.MAP_SLOTS + L.MAP_PHYS_SLOT // 4, 0xFFFF), id="slot of the other map"),
        pytest.param(put(L.MAP1 + L.MAP_SLOTS + L.MAP_PHYS_SLOT // 4, 0xFFFF_FFFF_FFFF_FFFF), id="slot"),
        pytest.param(put(kvm_word(4, L.K_VCPU_ID), 1 << 40), id="vCPU id"),
        pytest.param(put(kvm_word(4, L.K_VCPU_ID), 1), id="vCPU id twice"),
        pytest.param(put(kvm_word(4, L.K_ISR_CACHE), 1 << 20), id="vector in service"),
    ],
)
def test_forged_words(change: Callable[[np.ndarray], None]) -> None:
    """Words that contradict this library, or would lead a kernel out of the machine, are refused under any checksum."""
    refuses(forged(lived_in(), change), "snapshot is damaged")


def test_unchanged_forgery_is_no_forgery() -> None:
    """The forger's tool itself makes good snapshots."""
    m = lived_in()
    assert forged(m, lambda words: None) == m.snapshot()
