"""The Perfetto trace: tracks, slices that nest, arrows with two ends, and bounded memory."""

from __future__ import annotations

import gzip
import sys
import tracemalloc
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

from fastexit.pages import perfetto
from fastexit.records.columns import NO_TIME, RECORD, Event, Recording, Rows, Thread
from reports import HOSTILE

messages = pytest.importorskip("perfetto.protos.perfetto.trace.perfetto_trace_pb2", reason="perfetto is not installed")

NAMES = ["HLT", "MSR_WRITE", HOSTILE]
THREADS = [Thread(10, 10, "CPU 0/KVM"), Thread(11, 10, "CPU 1/KVM"), Thread(5, 5, "vhost-9"), Thread(12, 10, HOSTILE)]


class Where(NamedTuple):
    vm: list[int]
    vcpu: list[int]


WHERE = Where([1, 1, 0, 1], [0, 1, -1, 2])


def rows(*told: tuple[int, Event, int, dict[str, int]]) -> Rows:
    """Rows of (time, event, thread, other fields)."""
    made = np.zeros(len(told), RECORD)
    made["name"] = made["vcpu"] = -1
    for i, (time, event, thread, more) in enumerate(told):
        made[i]["time"], made[i]["event"], made[i]["thread"], made[i]["line"] = time, event, thread, i + 1
        for name, value in more.items():
            made[i][name] = value
    return made


IPI = rows(
    (900, Event.EXIT, 1, {"name": 0, "a": 0x1000}),
    (1000, Event.EXIT, 0, {"name": 1, "a": 0xFFFF_FFFF_8100_0000}),
    (1100, Event.APIC_IPI, 0, {"a": 1, "b": 0xFD}),
    (1150, Event.ACCEPT, 0, {"a": 1, "b": 0xFD}),
    (1200, Event.MSR, 0, {"a": 0x830, "b": 0x1_0000_00FD, "c": 1}),
    (1300, Event.ENTRY, 0, {}),
    (1500, Event.ENTRY, 1, {}),
    (1600, Event.EXIT, 1, {"name": 1}),
    (1610, Event.EOI, 1, {"a": 1, "b": 0xFD}),
    (1650, Event.ENTRY, 1, {}),
    (1700, Event.MSI_SET_IRQ, 2, {"a": 0, "b": 0x31}),
    (1710, Event.ACCEPT, 2, {"a": 0, "b": 0x31}),
)


def recording(*blocks: Rows) -> Recording:
    return Recording("guest.trace", list(blocks), list(THREADS), list(NAMES), [0, 1, -1, 2])


class Told(NamedTuple):
    time: int
    kind: str
    track: str
    name: str
    flows: list[int]
    ends: list[int]
    notes: dict[str, int]


def read(path: Path) -> list[Told]:
    """What a reader makes of the file: tracks and names resolved."""
    data = gzip.open(path).read() if path.suffix == ".gz" else path.read_bytes()
    tracks: dict[int, str] = {}
    names: dict[int, str] = {}
    found = []
    for packet in messages.Trace.FromString(data).packet:
        assert packet.trusted_packet_sequence_id == 1
        if packet.HasField("track_descriptor"):
            one = packet.track_descriptor
            if one.parent_uuid:
                assert one.parent_uuid in tracks
            tracks[one.uuid] = one.name or one.process.process_name
        names |= {one.iid: one.name for one in packet.interned_data.event_names}
        if packet.HasField("track_event"):
            one = packet.track_event
            name = names[one.name_iid] if one.name_iid else one.name
            kind = messages.TrackEvent.Type.Name(one.type).removeprefix("TYPE_")
            notes = {note.name: note.uint_value or note.pointer_value for note in one.debug_annotations}
            flows, ends = list(one.flow_ids), list(one.terminating_flow_ids)
            found.append(Told(packet.timestamp, kind, tracks[one.track_uuid], name, flows, ends, notes))
    return found


def drawn(tmp_path: Path, *blocks: Rows) -> list[Told]:
    perfetto.write(recording(*blocks), WHERE, tmp_path / "out.pftrace")
    return read(tmp_path / "out.pftrace")


def test_exits_are_slices(tmp_path: Path) -> None:
    told = drawn(tmp_path, IPI)
    on = [(one.time, one.kind, one.name) for one in told if one.track == "vCPU 0 (CPU 0/KVM)" and "SLICE" in one.kind]
    assert on == [(1000, "SLICE_BEGIN", "MSR_WRITE"), (1300, "SLICE_END", "")]
    (exit_,) = [one for one in told if one.time == 1000]
    assert exit_.notes == {"line": 2, "rip": 0xFFFF_FFFF_8100_0000}


def test_an_ipi_is_an_arrow_from_its_sender_to_the_entry_of_its_target(tmp_path: Path) -> None:
    told = drawn(tmp_path, IPI)
    (start,) = [one for one in told if one.flows]
    (end,) = [one for one in told if one.ends]
    assert (start.time, start.track, start.name) == (1150, "vCPU 0 (CPU 0/KVM)", "accept 0xfd at vCPU 1")
    assert (end.time, end.track, end.name) == (1500, "vCPU 1 (CPU 1/KVM)", "enters with 0xfd")
    assert start.flows == end.ends


def test_a_devices_interrupt_is_a_mark_on_its_target(tmp_path: Path) -> None:
    assert [(one.track, one.kind, one.name) for one in drawn(tmp_path, IPI) if one.time == 1710] == [
        ("vCPU 0 (CPU 0/KVM)", "INSTANT", "accept 0x31")
    ]


def test_accepts_behind_another_source_are_no_ipis(tmp_path: Path) -> None:
    told = drawn(
        tmp_path,
        rows(
            (1, Event.APIC_IPI, 0, {"a": 1, "b": 0xFD}),
            (2, Event.MSI_SET_IRQ, 0, {"a": 1, "b": 0xFD}),
            (3, Event.ACCEPT, 0, {"a": 1, "b": 0xFD}),
            (4, Event.ENTRY, 1, {}),
        ),
    )
    assert [one for one in told if one.flows or one.ends] == []


def test_posted_interrupts_arrive_by_their_eoi(tmp_path: Path) -> None:
    told = drawn(
        tmp_path,
        rows(
            (1, Event.APIC_IPI, 0, {"a": 1, "b": 0xFD}),
            (2, Event.APICV_ACCEPT, 0, {"a": 1, "b": 0xFD}),
            (5, Event.EOI, 1, {"a": 1, "b": 0x31}),
            (6, Event.EOI, 1, {"a": 1, "b": 0xFD}),
        ),
    )
    assert [(one.time, one.name) for one in told if one.ends] == [(6, "took 0xfd")]


def random_rows(seed: int, n: int) -> Rows:
    """Any order of any events, times that run backwards or are missing."""
    rng = np.random.default_rng(seed)
    made = np.zeros(n, RECORD)
    made["time"] = np.cumsum(rng.integers(-50, 200, n)) + 1000
    made["time"][rng.random(n) < 0.02] = NO_TIME
    made["event"] = rng.choice([2, 2, 2, 3, 3, 3, *range(39)], n)
    made["thread"] = rng.integers(-1, 6, n)
    made["name"] = rng.integers(-1, 5, n)
    for name in "abcd":
        made[name] = rng.integers(0, 1 << 63, n, dtype=np.uint64) >> rng.integers(0, 63, n).astype(np.uint64)
    made["a"][made["event"] == Event.ACCEPT] %= 3
    made["line"] = np.arange(1, n + 1)
    return made


@pytest.mark.parametrize("seed", range(4))
def test_slices_nest_whatever_comes(tmp_path: Path, seed: int) -> None:
    blocks = np.array_split(random_rows(seed, 3000), 7)
    told = drawn(tmp_path, *blocks)
    depth: Counter[str] = Counter()
    last: dict[str, int] = {}
    for one in told:
        assert one.time >= last.get(one.track, 0)
        last[one.track] = one.time
        depth[one.track] += {"SLICE_BEGIN": 1, "SLICE_END": -1}.get(one.kind, 0)
        assert 0 <= depth[one.track] <= 1
        assert one.name.isprintable()
        assert one.track.isprintable()
    assert set(depth.values()) == {0}
    begun = [flow for one in told for flow in one.flows]
    ended = [flow for one in told for flow in one.ends]
    assert len(begun) == len(set(begun))
    assert len(ended) == len(set(ended))
    assert set(ended) <= set(begun)


def test_tracks_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(perfetto, "_TRACKS", 5)
    told = drawn(tmp_path, rows(*((i, Event.ACCEPT, 2, {"a": i << 40, "b": 0x31}) for i in range(1, 50))))
    assert len({one.track for one in told}) == 5


def test_lines_without_a_thread(tmp_path: Path) -> None:
    perfetto.write(
        recording(rows((1, Event.EXIT, -1, {"name": 0}))), Where([1, 1, 0, 1, 1], [0, 1, -1, 2, 3]), tmp_path / "o"
    )
    assert [(one.track, one.name) for one in read(tmp_path / "o")] == [("vCPU 3", "HLT"), ("vCPU 3", "")]


def test_compressed(tmp_path: Path) -> None:
    n = perfetto.write(recording(IPI), WHERE, tmp_path / "out.pftrace.gz")
    perfetto.write(recording(IPI), WHERE, tmp_path / "out.pftrace")
    assert read(tmp_path / "out.pftrace.gz") == read(tmp_path / "out.pftrace")
    assert n == len(read(tmp_path / "out.pftrace")) + 1 + 3  # the first packet; a VM and two vCPUs


def test_memory_is_bounded(tmp_path: Path) -> None:
    class Blocks:
        def __init__(self, n: int) -> None:
            self.n = n

        def __iter__(self) -> Iterator[Rows]:
            return (random_rows(i, 500) for i in range(self.n))

    def peak(n: int) -> int:
        one = recording()
        one.blocks = Blocks(n)
        tracemalloc.start()
        perfetto.write(one, WHERE, tmp_path / "out.pftrace")
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return most

    assert peak(40) < peak(10) + 500_000


def test_nothing_to_draw_is_one_line(tmp_path: Path) -> None:
    bare = IPI.copy()
    bare["time"] = NO_TIME
    with pytest.raises(ValueError, match=r"^guest\.trace: its lines have no times, there is nothing to draw$"):
        perfetto.write(recording(bare), WHERE, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ValueError, match=r"^guest\.trace: no thread is a vCPU's, there is nothing to draw$"):
        perfetto.write(recording(IPI), Where([0] * 4, [-1] * 4), tmp_path / "out")


def test_missing_package_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name == "perfetto" or name.startswith("perfetto.")]:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ModuleNotFoundError, match=r"^Perfetto traces need its package: pip install perfetto$"):
        perfetto.write(recording(IPI), WHERE, tmp_path / "out")
