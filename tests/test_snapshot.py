"""Snapshots: the machine comes back to the byte and goes on as if nothing had been; bad bytes are refused."""

from __future__ import annotations

import itertools
import struct
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

import fastexit as fx
from fastexit import layout as L
from fastexit import regs as r
from fastexit.checks import U64
from fastexit.profile import since
from fastexit.releases import generation
from fastexit.snapshot import regions
from fastexit.traits import Trait

HEAD = struct.Struct("<8sIIII")


def lived_in(kernel: str = "6.18", vendor: str = "vmx", apicv: bool = True) -> fx.Machine:
    """Four vCPUs in different modes with interrupts posted, pending and in service, an NMI and an INIT under way."""
    far = 200 if vendor == "svm" and apicv and not since(kernel, "6.18") else 300  # AVIC would refuse 300
    m = fx.Machine(apic_ids=[0, 1, far, 3], kernel=kernel, vendor=vendor, apicv=apicv, x2apic_api=1)
    m.boot_x2apic()
    m.vcpus[3].set_msr(0x1B, 0xFEE0_0800)
    m.vcpus[0].wrmsr(0x830, fx.icr(dest=1, vector=0x41))
    m.vcpus[1].ack()
    for vector in (0x31, 0xFD):
        m.vcpus[0].wrmsr(0x830, fx.icr(dest=1, vector=vector))
    m.vcpus[0].wrmsr(0x830, fx.icr(dest=far, delivery=4))
    m.vcpus[0].wrmsr(0x830, fx.icr(dest=1, delivery=5, level=True))
    return m


def go_on(m: fx.Machine) -> list[Any]:
    """What the machine does next, seen from outside."""
    dests = (0, 1, 3, m.vcpus[2].vcpu_id, 77, 0xFFFF_FFFF)
    told: list[Any] = [m.vcpus[0].wrmsr(0x830, fx.icr(dest=dest, vector=0x52)) for dest in dests]
    told += [m.signal_msi(0xFEE0_3000, 0x61), m.signal_msi(0xFEE0_0008, 0x162)]
    told += [(v.pending(), v.ack(), v.eoi(), v.get_mp_state(), v.events(), v.get_lapic()) for v in m.vcpus]
    return told


def forged(data: bytes, change: Callable[[np.ndarray], Any]) -> bytes:
    """A snapshot whose words were changed by somebody who knows how to compute the checksum."""
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


DATA = lived_in().snapshot()
"""A good one, of four vCPUs."""


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
    (result,) = copy.run(np.array([(0, 31, 0x1B, 0, 0, 0)], dtype=fx.EXIT))
    assert result["value"] == copy.vcpus[0].apic_base


def test_vcpu_can_be_added_to_a_copy() -> None:
    """A copy knows which ids are taken, and grows like the original."""
    m = lived_in()
    copy = fx.Machine.restore(m.snapshot())
    for machine in (copy, m):
        with pytest.raises(ValueError, match="APIC id 300 is taken by vCPU 2"):
            machine.add_vcpu(300)
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


@pytest.mark.parametrize("length", range(HEAD.size))
def test_truncated_head(length: int) -> None:
    """Too short for the head."""
    refuses(DATA[:length], f"snapshot is truncated: {length} bytes")


PARTS = [*itertools.accumulate(8 * (rows.stop - rows.start) for rows in regions(4)), len(DATA) - HEAD.size]
ROUTES = PARTS[-2] // 8
"""Where the routes in use begin: first rows of 24 GSIs and of the one behind them, then 40 routes."""


@pytest.mark.parametrize(
    "length", sorted({0, 1, 7, 8, *(end + d for end in PARTS for d in (-8, -1, 0, 1))} - {PARTS[-1]})
)
def test_truncated_body(length: int) -> None:
    """The end is missing, within a word, between two, or whole regions; or a byte is too much."""
    whole = PARTS[-1]
    state = "truncated" if length < whole else "too long"
    data = (DATA + b"\0")[: HEAD.size + length]
    refuses(data, f"snapshot is {state}: {length} of {whole} bytes")


def test_trailing_bytes() -> None:
    """Something was appended: that is not called truncated."""
    data = lived_in().snapshot() + b"\0"
    with pytest.raises(ValueError, match="snapshot") as caught:
        fx.Machine.restore(data)
    assert "truncated" not in str(caught.value)


def test_foreign_bytes() -> None:
    """Some other file."""
    refuses(b"\x7fELF" + bytes(5000), "not a fastexit snapshot")


@pytest.mark.parametrize("version", [0, 2, L.ABI_VERSION + 6, 0xFFFF_FFFF])
def test_other_abi_version(version: int) -> None:
    """A snapshot of another version names both."""
    data = bytearray(DATA)
    struct.pack_into("<I", data, 8, version)
    refuses(data, f"snapshot has ABI version {version}, this library has {L.ABI_VERSION}")


def earlier(abi: int, words: int, inner: int | None = None, pending_db: int = 0) -> bytes:
    """DATA as an ABI version had it that had no chips, up to 4 no words of Hyper-V; version 3 with a #DB at vCPU 0."""
    magic, _, n, _, _ = HEAD.unpack_from(DATA)
    length = sum(rows.stop - rows.start for rows in regions(n, abi))
    body = np.frombuffer(DATA, dtype=np.uint64, offset=HEAD.size)[:length].copy()
    body[L.H_ABI], body[L.H_WORDS] = inner or abi, words
    if pending_db:
        body[len(body) - n * L.KVM_STRIDE + 13] = pending_db
    return HEAD.pack(magic, abi, n, zlib.crc32(body.tobytes()), 8 * len(body)) + body.tobytes()


EARLIER = {3: 2_076_672, 4: 6_343_168, 5: 6_670_848}


@pytest.mark.parametrize("abi", EARLIER)
def test_earlier_abi_version(abi: int) -> None:
    """Version 5 has Hyper-V's words, 6 the chips: they are those of a new machine in what an earlier one wrote."""
    assert fx.Machine.restore(earlier(abi, EARLIER[abi])).snapshot() == DATA
    refuses(earlier(abi, L.WORDS), "snapshot is damaged: its header")
    refuses(earlier(abi, EARLIER[abi], inner=abi + 1), "snapshot is damaged: its header")
    magic, _, n, _, length = HEAD.unpack_from(earlier(abi, EARLIER[abi]))
    body = earlier(abi, EARLIER[abi])[HEAD.size :] + bytes(8)
    refuses(HEAD.pack(magic, abi, n, zlib.crc32(body), length + 8) + body, "snapshot is damaged: its size")


def test_abi_version_6() -> None:
    """It had the same words in its snapshots; routes of its own stay."""
    m = fx.Machine(vcpus=2)
    m.set_gsi_routing([("ioapic", 3, 3), ("msi", 30, 0xFEE0_1000, 0x41)])
    data = m.snapshot()
    magic, _, n, _, length = HEAD.unpack_from(data)
    body = np.frombuffer(data, dtype=np.uint64, offset=HEAD.size).copy()

    def of(words: int) -> bytes:
        body[L.H_ABI], body[L.H_WORDS] = 6, words
        return HEAD.pack(magic, 6, n, zlib.crc32(body.tobytes()), length) + body.tobytes()

    assert fx.Machine.restore(of(6_732_800)).snapshot() == data
    refuses(of(L.WORDS), "snapshot is damaged: its header")


def test_whose_eois_an_earlier_version_was_told() -> None:
    """What the embedder had said of user space's IOAPIC stays; the pin of the RTC is no word of his."""
    first = kvm_word(4, L.K_IOAPIC_HANDLED)

    def told(*values: tuple[int, int]) -> list[int]:
        def change(words: np.ndarray) -> None:
            for at, value in values:
                words[first + at] = value

        copy = fx.Machine.restore(forged(earlier(5, EARLIER[5]), change))
        return [copy.mem[L.IRQ + v * L.IRQ_STRIDE + L.IRQ_GIVEN] for v in range(4)]

    assert told((0, 1), (L.KVM_STRIDE, 0)) == [0, 0, 0, 0]
    assert told((0, 3), (L.KVM_STRIDE, 1), (2 * L.KVM_STRIDE + 3, 1 << 63)) == [1, 1, 1, 0]


def test_abi_version_3() -> None:
    """Version 4 changed the batch's exit records, and the place of a queued #DB."""
    m = fx.Machine.restore(earlier(3, EARLIER[3], pending_db=r.DR6_BS))
    v = m.vcpus[0]
    assert (m.mem[v.own + L.K_PENDING_DB], m.mem[v.own + L.K_TARGETS]) == (r.DR6_BS, 0)


@pytest.mark.parametrize("place", [HEAD.size, *(HEAD.size + end - 1 for end in PARTS), *range(30, len(DATA), 9973)])
@pytest.mark.parametrize("bit", [0, 7])
def test_flipped_bit(place: int, bit: int) -> None:
    """One bit of the body is wrong, in whichever region."""
    data = bytearray(DATA)
    data[place] ^= 1 << bit
    refuses(data, "snapshot is damaged: checksum differs")


@pytest.mark.parametrize("bit", range(8 * HEAD.size))
def test_flipped_head_bit(bit: int) -> None:
    """One bit of the head is wrong, whichever: refused."""
    data = bytearray(DATA)
    data[bit // 8] ^= 1 << bit % 8
    refuses(data, "snapshot")


@pytest.mark.parametrize("vcpus", [0, 3, 5, 4096, 4097, 0xFFFF_FFFF])
def test_other_number_of_vcpus(vcpus: int) -> None:
    """A head that speaks of other vCPUs than the body has."""
    magic, abi, _, crc, length = HEAD.unpack_from(DATA)
    what = "the number of vCPUs" if vcpus < 4 else "its size"
    refuses(HEAD.pack(magic, abi, vcpus, crc, length) + DATA[HEAD.size :], f"snapshot is damaged: {what}")


@pytest.mark.parametrize("wrong", ["x" * 2000, 5000, None, 1.5], ids=lambda wrong: type(wrong).__name__)
def test_no_bytes_at_all(wrong: Any) -> None:
    """Not even bytes: a TypeError that names the type."""
    refuses(wrong, f"not {type(wrong).__name__}", TypeError)


TOP = (1 << 64) - 1
FORGED_HEADER: dict[str, tuple[int, ...]] = {
    "H_MAGIC": (0, 1),
    "H_ABI": (99,),
    "H_WORDS": (5,),
    "H_CONFIG": (1 << 63, TOP),
    "H_API": (16, TOP),
    "H_NVCPUS": (0, 3, 5, 5000, TOP),
    "H_MAP": (0, L.MAP0 + 1, L.MAP_SCRATCH, 1 << 40),
    "H_MAP_LOCK": (1, TOP),
    "H_MAP_DIRTY": (2, 3, TOP),
    "H_PROFILE": (1 << 32, TOP),
    "H_MAXPHYADDR": (0, 31, 53, 64, TOP),
    "H_LOST_LOWEST": (2,),
    "H_NOW": (1 << 63, TOP),
    "H_TSC_KHZ": (0, 10_000_001, TOP),
    "H_BUS_NS": (0, 1 << 40, TOP),
    "H_MIN_PERIOD_NS": (1_000_000_001, TOP),
    "H_TIMER_ADVANCE_NS": (1 << 32, TOP),
    "H_INHIBITS": (1 << 14, TOP),
    "H_DISABLED_EXITS": (16, TOP),
    "H_USER_MSR": (8, TOP),
    "H_FILTER_RANGES": (17, TOP),
    "H_FILTER_DENY": (2, TOP),
    "H_BSP_ID": (4096, TOP),
    "H_GUEST_MEMORY": (1, TOP),
    "H_GUEST_BYTES": (4096, TOP),
    "H_HV_FEATURES": (1 << 24, TOP),
    "H_HV_AUTO_EOI_VCPUS": (4097, TOP),
    "H_HV_STIMERS": (2, TOP),
    "H_HV_VP_INDICES": (4097, 1 << 32, TOP),
}
FORGED_MAP: dict[str, tuple[int, ...]] = {
    "MAP_PRESENT": (2, TOP),
    "MAP_MAX_ID": (4096, 1 << 30, TOP),
    "MAP_LOGICAL": (5, TOP),
    "MAP_SLOTS": (5, 0xFFFF, 0xFFFF_FFFF_FFFF_FFFF),
}
FORGED_HOT: dict[str, tuple[int, ...]] = {"HOT_MODE": (4, TOP), "HOT_FLAGS": (1 << 6, TOP), "HOT_BLOCKED": (2, TOP)}
FORGED_KVM: dict[str, tuple[int, ...]] = {
    "K_VCPU_ID": (1, 300, 4096, 1 << 40, TOP),
    "K_ISR_CACHE": (256, 1 << 20, TOP - 1),
    "K_MP_STATE": (5, 8, 10, TOP),
    "K_PENDING_EVENTS": (4, TOP),
    "K_SHADOW": (4, TOP),
    "K_EXCEPTION": (257, TOP),
    "K_INTERRUPT": (257, TOP),
    "K_EXTINT": (257, TOP),
    "K_SIPI_VECTOR": (256, TOP),
    "K_NMI_PENDING": (3, TOP),
    "K_SENT": (1, TOP),
    "K_SVI": (256, TOP),
    "K_TIMER_MODE": (1, 1 << 19, TOP),
    "K_PERIOD": ((1 << 63) + 1, TOP),
    "K_DIVIDE": (0, 3, 127, 256, TOP),
    "K_TIMER_ADVANCE": (1 << 32, TOP),
    "K_ENTRY_INFO": (1 << 32, TOP),
    "K_REINJECT": (1 << 32, TOP),
    "K_CPU": (1 << 32, TOP),
    "K_WAKEUP_CPU": ((1 << 32) + 1, TOP),
    "K_LOADED": (2, TOP),
    "K_HFLAGS": (1 << 6, TOP),
    "K_IOAPIC_EOI": (512, TOP),
    "K_MSR_INDEX": (1 << 32, TOP),
    "K_MSR_REASON": (8, TOP),
    "K_ACCESS_INFO": (1 << 10, 1 << 20, TOP),
    "K_PV_EOI_FLAG": (3, TOP),
    "K_EXITS": (TOP,),
    "K_SRCU_LOCKS": (TOP,),
    "K_IRQ_WINDOWS": (TOP,),
    "K_NESTED_EXITS": (TOP,),
    "K_INDIRECT_CALLS": (TOP,),
}


FORGED_HV: dict[str, tuple[int, ...]] = {
    "HV_VP_INDEX": (4096, 1 << 32, TOP),
    "HV_SYNIC": (4, TOP),
    "HV_STIMER_PENDING": (16, TOP),
    "HV_STIMER_STUCK": (16, TOP),
    "HV_EXIT_TYPE": (3, TOP),
    "HV_CALL_LENGTH": (16, TOP),
    "HV_SYSTEM_EVENT": (1, 4, TOP),
}


FORGED_CHIPS: list[tuple[str, int, tuple[int, ...]]] = [
    ("IOREGSEL", L.IOAPIC + L.IOAPIC_IOREGSEL, (1 << 32, TOP)),
    ("IOAPIC id", L.IOAPIC + L.IOAPIC_ID, (1 << 32, TOP)),
    ("IOAPIC IRR", L.IOAPIC + L.IOAPIC_IRR, (1 << 24, TOP)),
    ("IOAPIC pad", L.IOAPIC + L.IOAPIC_PAD, (1 << 32, TOP)),
    ("IOAPIC delivered", L.IOAPIC + L.IOAPIC_IRR_DELIVERED, (1 << 24, TOP)),
    ("source of pin 0", L.IOAPIC + L.IOAPIC_SOURCES, (8, TOP)),
    ("source of pin 23", L.IOAPIC + L.IOAPIC_SOURCES + 23, (8, TOP)),
    ("EOIs of pin 0", L.IOAPIC + L.IOAPIC_EOIS, (10_000, TOP)),
    ("EOIs of pin 23", L.IOAPIC + L.IOAPIC_EOIS + 23, (10_000, TOP)),
    *((f"PIC {i}", L.PIC + i // 16 * L.PIC_STRIDE + i % 16, (256, TOP)) for i in range(32)),
    ("source of IRQ 0", L.PIC + L.PIC_SOURCES, (8, TOP)),
    ("source of IRQ 15", L.PIC + L.PIC_STRIDE + L.PIC_SOURCES + 7, (8, TOP)),
    ("PIC output", L.PIC_OUTPUT, (2, TOP)),
    ("lock", L.IRQ_LOCK, (1, TOP)),
    ("depth", L.IRQ_DEPTH, (1, TOP)),
    ("count", L.PIT + L.PIT_COUNT, (1 << 32, TOP)),
    ("latched count", L.PIT + L.PIT_LATCHED_COUNT, (1 << 16, TOP)),
    *((f"PIT {i}", L.PIT + i // 16 * L.PIT_STRIDE + i % 16, (256,)) for i in range(48) if 2 <= i % 16 <= L.PIT_GATE),
    ("PIT present", L.PIT_PRESENT, (1, 4, TOP)),
    ("PIT flags", L.PIT_FLAGS, (1 << 32, TOP)),
    ("PIT reinject", L.PIT_REINJECT, (2, TOP)),
    ("PIT ack", L.PIT_IRQ_ACK, (2, TOP)),
    ("PIT pending", L.PIT_PENDING, (TOP,)),
    ("PIT period", L.PIT_PERIOD, (TOP,)),
    ("PIT expires", L.PIT_EXPIRES, (TOP,)),
    ("PIT deadline", L.PIT_DEADLINE, (2, TOP)),
    ("PIT periodic without a period", L.PIT_PERIODIC, (1, 2, TOP)),
    ("PIT work", L.PIT_WORK, (2, TOP)),
    ("PIT speaker", L.PIT_SPEAKER, (2, TOP)),
]


def forgeries() -> Iterator[Any]:
    """Every word that is checked, with values that are not far outside and with some that are."""
    n, tables = 4, L.MAP1 + L.MAP_WORDS
    hot = tables + L.TABLES_END - L.FILTER
    vec = hot + n * L.HOT_STRIDE
    kvm = vec + n * (L.VEC_STRIDE + L.PAGE_STRIDE)
    hv0 = kvm + n * L.KVM_STRIDE
    places = [(name, getattr(L, name), values) for name, values in FORGED_HEADER.items()]
    places += [
        (f"{name} {base}", base + getattr(L, name), v) for name, v in FORGED_MAP.items() for base in (L.MAP0, L.MAP1)
    ]
    places += [("last slot", L.MAP1 + L.MAP_WORDS - 1, (5 << 48, TOP))]
    for i in (0, 15):
        at = tables + i * L.FILTER_STRIDE
        places += [
            (f"filter flags {i}", at + L.FILTER_FLAGS, (4, TOP)),
            (f"filter base {i}", at + L.FILTER_BASE, (1 << 32, TOP)),
            (f"filter length {i}", at + L.FILTER_COUNT, (0x3001, TOP)),
        ]
    first = 8 * L.HOT | 1
    pointers = (1, first - 1, first - 8, first + 8, first + 8 * n * L.HOT_STRIDE, TOP)
    places += [(f"descriptor {i}", tables + L.PID_TABLE - L.FILTER + i, pointers) for i in (0, 4095)]
    logical = (512, 1 << 30, 512 << 32, 1 << 62, TOP)
    places += [(f"logical id {i}", tables + L.AVIC_LOGICAL - L.FILTER + i, logical) for i in (0, 511)]
    for v in (0, 3):
        places += [(f"{k} {v}", hot + v * L.HOT_STRIDE + getattr(L, k), values) for k, values in FORGED_HOT.items()]
        places += [(f"VEC_RVI {v}", vec + v * L.VEC_STRIDE + L.VEC_RVI, (256, TOP))]
        places += [(f"{k} {v}", kvm + v * L.KVM_STRIDE + getattr(L, k), values) for k, values in FORGED_KVM.items()]
        hv = hv0 + v * L.HV_STRIDE
        places += [(f"{k} {v}", hv + getattr(L, k), values) for k, values in FORGED_HV.items()]
    chips = hv0 + n * L.HV_STRIDE
    of_chips = chips - L.IOAPIC
    places += [(name, of_chips + at, values) for name, at, values in FORGED_CHIPS]
    routing = chips + L.ROUTES - L.IOAPIC
    places += [
        ("GSIs", routing, (23, 25, 4097, TOP)),
        ("first pin's GSI", routing + 1, (4097, TOP)),
        ("last pin's GSI", routing + 40, (4097, TOP)),
        ("reserved pins", routing + 41, (256, TOP)),
    ]
    irq = routing + L.RESAMPLERS - L.ROUTE_GSIS
    for v in (0, 3):
        at = irq + v * L.IRQ_STRIDE
        places += [(f"RTC {v}", at + L.IRQ_RTC_VECTOR, (257, TOP)), (f"stale {v}", at + L.IRQ_STALE, (257, TOP))]
        places += [(f"given {v}", at + L.IRQ_GIVEN, (2, TOP)), (f"went in {v}", at + L.IRQ_WENT_IN, (1 << 60, TOP))]
        at = irq + n * L.IRQ_STRIDE + v * L.TSC_STRIDE
        khz = 1_000_000  # XOR the word is the frequency
        places += [(f"TSC {i} {v}", at + i, (khz, khz ^ 10_000_001, TOP)) for i in (L.TSC_KHZ, L.TSC_RATE)]
    places += [("TSC user", ROUTES - L.TSC_WORDS + L.TSC_USER - L.TSC_LAST_NSEC, (2, TOP))]
    routes = ROUTES + 25
    places += [
        ("first row of GSI 0", ROUTES, (1, TOP)),
        ("first row of GSI 1", ROUTES + 1, (0, 1, 3, 5, 41, TOP)),
        ("last row", routes - 1, (39, 41, 4097, 1 << 60, TOP)),
        ("first route", routes, (0, 5, 7, 1 << 8 | 1, 1 << 63 | 1, TOP)),
        ("first route's pin", routes + L.ROUTE_A, (24, TOP)),
        ("second route's pin", routes + L.ROUTE_STRIDE + L.ROUTE_A, (16, TOP)),
    ]
    for name, at, values in places:
        yield from (pytest.param(at, value, id=f"{name} {value:#x}") for value in values)


@pytest.mark.parametrize(("word", "value"), list(forgeries()))
def test_forged_words(word: int, value: int) -> None:
    """Words that contradict this library, or would lead a kernel out of the machine, are refused under any checksum."""
    refuses(forged(DATA, put(word, value)), "snapshot is damaged")


def test_traits_are_the_rows() -> None:
    """What a generation does is not taken from the bytes: its row may have been mended since they were written."""
    where = Trait.ICR_SPLIT | Trait.ICR_SPLIT_SVM
    for kernel in fx.profiles():
        m = lived_in(kernel)
        for traits in (m.profile.traits & where, (m.profile.traits | TOP & ~where) & U64):
            copy = fx.Machine.restore(forged(m.snapshot(), put(L.H_TRAITS, traits)))
            assert (copy.kernel, copy.snapshot()) == (kernel, m.snapshot())


@pytest.mark.parametrize(
    ("vendor", "written", "row"), [("svm", "6.1", "6.12"), ("svm", "6.12", "6.1"), ("vmx", "5.8", "6.1")]
)
def test_icr_is_found_where_the_row_has_it_now(vendor: str, written: str, row: str) -> None:
    """As if a generation's row had been ``written`` and is ``row`` today: guests read the same ICR in either mode."""
    m = lived_in(written, vendor)
    sent = m.vcpus[0].get_msr(0x830)
    m.vcpus[3].mmio_write(0x310, 5 << 24)
    copy = fx.Machine.restore(forged(m.snapshot(), put(L.H_PROFILE, generation(row).number)))
    assert (copy.kernel, sent >> 32) == (row, 1)
    assert copy.vcpus[0].get_msr(0x830) == sent
    icr = fx.icr(dest=m.vcpus[2].vcpu_id, vector=0x77)
    assert copy.vcpus[0].wrmsr(0x830, icr).accepted == 1
    assert copy.vcpus[0].get_msr(0x830) == icr
    assert copy.vcpus[3].mmio_read(0x310) == 5 << 24


def test_generation_that_nobody_knows() -> None:
    """A number that no row has: a newer library may have written it."""
    text = "or of a newer fastexit: unknown kernel number 65536: one of 0 (seed-v3), 1"
    refuses(forged(DATA, put(L.H_PROFILE, 1 << 16)), text)


def test_clock_beyond_the_tsc() -> None:
    """Where the guest's TSC has more than 63 bits a deadline could wrap: as set_time refuses it."""
    data = fx.Machine(vcpus=2, tsc_khz=10_000_000).snapshot()
    end = ((1 << 63) - 1) // 10_000
    refuses(forged(data, put(L.H_NOW, end * 1_000 + 1_000)), "snapshot is damaged: the clock")
    assert fx.Machine.restore(forged(data, put(L.H_NOW, end * 1_000))).time == end * 1_000


@pytest.mark.parametrize("options", [{"vendor": "svm"}, {"hv_timer": False}], ids=["svm", "switched off"])
def test_preemption_timer_of_nobody(options: dict[str, Any]) -> None:
    """A preemption timer counts only where there is one: elsewhere nothing would stop it, entry after entry."""
    data = fx.Machine(vcpus=2, **options).snapshot()
    refuses(forged(data, put(kvm_word(2, L.K_HV_DEADLINE), 0)), "snapshot is damaged: a preemption timer")


@pytest.mark.parametrize("v", range(4))
@pytest.mark.parametrize(
    ("word", "value"),
    [
        (L.K_ISR_CACHE, L.NONE),
        (L.K_EXTINT, 256),
        (L.K_DIVIDE, 128),
        (L.K_TIMER_MODE, r.LVT_TIMER_DEADLINE),
        (L.K_WAKEUP_CPU, 1 << 32),
        (L.K_IOAPIC_EOI, 511),
        (L.K_MP_STATE, 9),
        (L.K_RIP, TOP),
        (L.K_TSC_DEADLINE, TOP),
        (L.K_HRTIMER, L.NONE),
    ],
)
def test_words_at_the_edge_are_good(word: int, value: int, v: int) -> None:
    """What is still right is restored as it is."""
    copy = fx.Machine.restore(forged(DATA, put(kvm_word(4, word) + v * L.KVM_STRIDE, value)))
    assert copy.mem[copy.vcpus[v].own + word] == value


def with_chips(irqchip: str = "full") -> fx.Machine:
    """Two vCPUs, a level interrupt that is served and still up, one that is masked, the RTC's, a ticking PIT, a TSC."""
    m = fx.Machine(vcpus=2, irqchip=irqchip)
    m.boot_x2apic()
    v = m.vcpus[0]
    m.set_time(5_000)
    v.wrmsr(0x10, 1 << 62)
    m.vcpus[1].set_tsc_khz(3_000_000)
    if irqchip == "split":
        m.set_gsi_routing([("msi", 3, 0xFEE0_0000, 0x8055), ("msi", 9, 0xFEE0_1000, 0x56)])
        return m
    m.create_pit()
    m.set_gsi_routing([("ioapic", 0, 2), ("pic", 0, 0, 0), ("ioapic", 8, 8), ("ioapic", 17, 17), ("ioapic", 18, 18)])
    for pin, entry in ((2, 0x30), (8, 0x38), (17, 0x8041), (18, 0x1_8042)):
        for half in (0, 1):
            v.mem_write(0xFEC0_0000, 0x10 + 2 * pin + half)
            v.mem_write(0xFEC0_0010, entry >> 32 * half & 0xFFFF_FFFF)
    for gsi in (8, 17, 18):
        m.irq_line(gsi, 1)
    for port, value in ((0x43, 0x34), (0x40, 0x00), (0x40, 0x10), (0x21, 0xFE), (0x20, 0x11), (0x21, 0x20)):
        v.io_write(port, value)
    m.set_time(10_000_000)
    return m


@pytest.mark.parametrize("irqchip", ["full", "split"])
def test_chips_go_on(irqchip: str) -> None:
    """Chips, routes, source ids, the RTC's map, the PIT's clock and TSCs come back, and the copy goes on alike."""

    def goes_on(m: fx.Machine) -> list[Any]:
        told: list[Any] = [m.irq_line(gsi, level) for gsi in (0, 3, 8, 9, 17, 18, 19) for level in (1, 0, 1)]
        for ns in range(11_000_000, 40_000_000, 7_000_000):
            told += [m.set_time(ns), [(v.pending(), v.ack(), v.wrmsr(0x80B, 0), v.rdmsr(0x10)) for v in m.vcpus]]
        if irqchip == "full":
            told += [m.get_irqchip(chip) for chip in range(3)] + [m.get_pit()]
        return told

    m = with_chips(irqchip)
    data = m.snapshot()
    copy = fx.Machine.restore(data)
    assert copy.snapshot() == data
    assert goes_on(copy) == goes_on(m)
    assert copy.snapshot() == m.snapshot()


@pytest.mark.parametrize("gsis", [0, 1, 4096])
def test_routes_come_back(gsis: int) -> None:
    """As many as are used, however few or many; what an older table left behind them does not."""
    m = fx.Machine(vcpus=2)
    m.words[L.ROUTE_FIRST : L.ROUTE_FIRST + gsis + 1] = range(gsis + 1)
    rows = m.words[L.ROUTES : L.ROUTES + gsis * L.ROUTE_STRIDE].reshape(-1, L.ROUTE_STRIDE)
    rows[:, L.ROUTE_KIND] = [L.ROUTE_MSI | gsi << L.ROUTE_GSI_SHIFT for gsi in range(gsis)]
    rows[:, L.ROUTE_A] = TOP
    m.mem[L.ROUTE_GSIS] = gsis
    data = m.snapshot()
    copy = fx.Machine.restore(data)
    assert copy.snapshot() == data
    for first, size in ((L.ROUTES, gsis * L.ROUTE_STRIDE), (L.ROUTE_FIRST, gsis + 1), (L.ROUTE_GSIS, 49)):
        assert (copy.words[first : first + size] == m.words[first : first + size]).all()
    assert not copy.words[L.ROUTES + gsis * L.ROUTE_STRIDE : L.ROUTE_FIRST].any()
    assert not copy.words[L.ROUTE_FIRST + gsis + 1 : L.ROUTE_GSIS].any()


def test_irqfds_stay_behind() -> None:
    """They are user space's: a copy has no resampler, and nobody was signalled."""
    m = fx.Machine(vcpus=2)
    data = m.snapshot()
    m.words[L.RESAMPLERS : L.RESAMPLERS + 4] = 7
    assert m.snapshot() == data
    assert not fx.Machine.restore(data).words[L.RESAMPLERS : L.IRQ].any()


def test_unchanged_forgery_is_no_forgery() -> None:
    """The forger's tool itself makes good snapshots."""
    assert forged(DATA, lambda words: None) == DATA
