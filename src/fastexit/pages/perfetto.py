"""A recording as a Perfetto trace, for ui.perfetto.dev: a track for each vCPU, exits as slices, IPIs as arrows.

Rows become packets as they come, so memory is bounded however long the recording is.
"""

from __future__ import annotations

import gzip
import os
from collections.abc import Callable, Sequence
from typing import IO, Any, Protocol

import numpy as np
import numpy.typing as npt

from fastexit.answers.words import clean
from fastexit.records.columns import NO_TIME, Event, Recording

_PACKETS = 2000
_NAMES = 4096
_ARROWS = 64
_TRACKS = 4096
_SEQUENCE = 1

Values = tuple[int, int, int, int, str]
"""``a`` to ``d`` and ``name`` of a row."""

_ACCEPTS = (Event.ACCEPT, Event.APICV_ACCEPT)
_SOURCES = (Event.MSI_SET_IRQ, Event.IOAPIC_SET_IRQ, Event.SET_IRQ, Event.PIC_SET_IRQ, Event.EXIT, Event.ENTRY)
"""An accepted interrupt behind one of these is no longer that of an IPI before it."""

_NAME: dict[int, Callable[[Values], str]] = {
    Event.MSR: lambda v: f"{'wrmsr' if v[2] else 'rdmsr'} 0x{v[0]:x}{' #GP' if v[3] else ''}",
    Event.APIC: lambda v: f"{'write' if v[2] else 'read'} {v[4] or hex(v[0])}",
    Event.APIC_IPI: lambda v: f"IPI 0x{v[1] & 0xFF:02x}",
    Event.EOI: lambda v: f"EOI 0x{v[1]:02x}" if v[1] < 256 else "EOI",
    Event.PV_EOI: lambda v: f"PV EOI 0x{v[1]:02x}" if v[1] < 256 else "PV EOI",
    Event.INJ_VIRQ: lambda v: f"inject 0x{v[0]:02x}{' again' if v[2] else ''}",
    Event.INJ_EXCEPTION: lambda v: f"inject {v[4]}",
    Event.PIO: lambda v: f"{'out' if v[2] else 'in'} 0x{v[0]:x}",
    Event.MMIO: lambda v: "MMIO write" if v[2] else "MMIO read",
    Event.HYPERCALL: lambda v: f"hypercall {v[0]}",
    Event.HV_HYPERCALL: lambda v: f"Hyper-V hypercall 0x{v[0]:x}",
    Event.HV_SEND_IPI: lambda v: f"Hyper-V IPI 0x{v[0]:02x}",
    Event.USERSPACE_EXIT: lambda v: f"to user space: {v[4]}",
    Event.NESTED_VMEXIT: lambda v: f"exit of L2 {v[4]}".strip(),
    Event.NESTED_ENTRY: lambda v: "entry of L2",
    Event.WAKEUP: lambda v: "woken",
    Event.NMI: lambda v: "NMI",
}
"""Lines that are marks on the track of the vCPU whose thread wrote them."""


Numbers = Sequence[int] | npt.NDArray[np.int32]


class Identity(Protocol):
    """Of each thread of a recording: its VM, 0 for none, and its vCPU, -1 for none; behind them, if it is known, the
    same of lines without a thread.
    """

    @property
    def vm(self) -> Numbers: ...
    @property
    def vcpu(self) -> Numbers: ...


def write(recording: Recording, identity: Identity, path: str | os.PathLike[str]) -> int:
    """Writes the trace, compressed where ``path`` ends in .gz; the number of packets.

    ModuleNotFoundError says what to install where the perfetto package is missing; ValueError where there is nothing to
    draw: lines without times, or no thread of a vCPU.
    """
    try:
        from perfetto.protos.perfetto.trace import perfetto_trace_pb2
    except ModuleNotFoundError:
        missing = "Perfetto traces need its package: pip install perfetto"
        raise ModuleNotFoundError(missing, name="perfetto") from None
    if not any(vcpu >= 0 for vcpu in identity.vcpu):
        raise ValueError(f"{clean(recording.path)}: no thread is a vCPU's, there is nothing to draw")
    opened: Callable[..., Any] = gzip.open if os.fspath(path).endswith(".gz") else open
    with opened(path, "wb") as file:
        drawing = _Drawing(recording, identity, perfetto_trace_pb2, file)
        for rows in recording.blocks:
            for row in zip(*(rows[name].tolist() for name in _FIELDS), strict=True):
                drawing.add(*row)
        drawing.close()
    if not drawing.timed:
        os.unlink(path)
        raise ValueError(f"{clean(recording.path)}: its lines have no times, there is nothing to draw")
    return drawing.packets


_FIELDS = ("time", "event", "thread", "vcpu", "line", "name", "a", "b", "c", "d")


class _Track:
    """One vCPU: its slice, if it is in one, and the arrows that end where it next enters the guest."""

    def __init__(self, uuid: int) -> None:
        self.uuid = uuid
        self.last = 0
        self.open = False
        self.arrows: list[tuple[int, int]] = []


class _Drawing:
    """Packets of one recording."""

    def __init__(self, recording: Recording, identity: Identity, messages: Any, file: IO[bytes]) -> None:
        self.packets: int = 0
        self.timed: bool = False
        self._recording = recording
        self._messages = messages
        self._file = file
        self._batch = messages.Trace()
        self._names: dict[str, int] = {}
        self._tracks: dict[tuple[int, int], _Track] = {}
        self._vms: dict[int, int] = {}
        self._sending: dict[int, int] = {}
        self._flows = 0
        self._where = [(int(vm), int(vcpu)) for vm, vcpu in zip(identity.vm, identity.vcpu, strict=True)]
        if len(self._where) == len(recording.threads):
            self._where.append((0, -1))
        numbers = {vm for vm, vcpu in self._where if vcpu >= 0}
        self._only = next(iter(numbers)) if len(numbers) == 1 else 0
        first = self._packet()
        first.sequence_flags = messages.TracePacket.SEQ_INCREMENTAL_STATE_CLEARED
        self._threads = {
            place: recording.threads[i].comm for i, place in enumerate(self._where) if i < len(recording.threads)
        }

    def add(
        self, time: int, event: int, thread: int, vcpu: int, line: int, name: int, a: int, b: int, c: int, d: int
    ) -> None:
        """One row."""
        if time == NO_TIME:
            return
        self.timed = True
        place = self._where[thread] if thread < len(self._where) else (0, -1)
        if event in _SOURCES:
            self._sending.pop(thread, None)
        if event in _ACCEPTS:
            self._accept(time, place, thread, line, a, b, d)
            return
        if place[1] < 0:
            return
        track = self._track(place)
        if event == Event.EXIT:
            self._end(track, time)
            slice_ = self._event(track, time, "TYPE_SLICE_BEGIN", self._word(name) or "exit", line)
            self._note(slice_, "rip", a)
            track.open = True
        elif event == Event.ENTRY:
            self._end(track, time)
            self._arrive(track, time, line)
        elif event in _NAME:
            values = (a, b, c, d, self._word(name))
            mark = self._event(track, time, "TYPE_INSTANT", _NAME[event](values), line)
            if event in (Event.MSR, Event.MMIO, Event.PIO, Event.APIC):
                self._note(mark, "value", b)
            if event == Event.MMIO:
                self._note(mark, "address", a)
            if event == Event.APIC_IPI:
                self._sending[thread] = b & 0xFF
            if event in (Event.EOI, Event.PV_EOI):
                self._arrive(track, time, line, vector=b)

    def _word(self, name: int) -> str:
        return clean(self._recording.names[name]) if 0 <= name < len(self._recording.names) else ""

    def close(self) -> None:
        """Ends every slice, and writes what is left."""
        for track in self._tracks.values():
            self._end(track, track.last)
        self._flush()

    def _accept(
        self, time: int, place: tuple[int, int], thread: int, line: int, target: int, vector: int, coalesced: int
    ) -> None:
        """An interrupt is in a vCPU's IRR: a mark on its track, or of an IPI, an arrow from the sender."""
        vm = place[0] or self._only
        if not vm or ((vm, target) not in self._tracks and len(self._tracks) >= _TRACKS):
            return
        there = self._track((vm, target))
        name = f"{'again' if coalesced else 'accept'} 0x{vector:02x}"
        if self._sending.get(thread) != vector & 0xFF or place[1] < 0:
            self._event(there, time, "TYPE_INSTANT", name, line)
            return
        here = self._track(place)
        mark = self._event(here, time, "TYPE_INSTANT", f"{name} at vCPU {target}", line)
        if not coalesced:
            self._flows += 1
            mark.track_event.flow_ids.append(self._flows)
            there.arrows.append((vector, self._flows))
            del there.arrows[:-_ARROWS]

    def _arrive(self, track: _Track, time: int, line: int, vector: int | None = None) -> None:
        """Arrows end: all at an entry, those of its vector at an EOI."""
        ended = [arrow for arrow in track.arrows if vector is None or arrow[0] == vector]
        if ended:
            track.arrows = [arrow for arrow in track.arrows if arrow not in ended]
            names = ", ".join(dict.fromkeys(f"0x{v:02x}" for v, _ in ended[:4]))
            mark = self._event(
                track, time, "TYPE_INSTANT", f"enters with {names}" if vector is None else f"took {names}", line
            )
            mark.track_event.terminating_flow_ids.extend(flow for _, flow in ended)

    def _end(self, track: _Track, time: int) -> None:
        if track.open:
            self._event(track, time, "TYPE_SLICE_END", "", 0)
            track.open = False

    def _packet(self) -> Any:
        if len(self._batch.packet) >= _PACKETS:
            self._flush()
        self.packets += 1
        packet = self._batch.packet.add()
        packet.trusted_packet_sequence_id = _SEQUENCE
        return packet

    def _flush(self) -> None:
        self._file.write(self._batch.SerializeToString())
        self._batch = self._messages.Trace()

    def _event(self, track: _Track, time: int, kind: str, name: str, line: int) -> Any:
        """A packet; a clock that runs backwards stands still on its track."""
        track.last = max(track.last, time, 0)
        packet = self._packet()
        packet.timestamp = track.last
        packet.sequence_flags = self._messages.TracePacket.SEQ_NEEDS_INCREMENTAL_STATE
        event = packet.track_event
        event.type = getattr(self._messages.TrackEvent, kind)
        event.track_uuid = track.uuid
        if name:
            event.categories.append("kvm")
            self._call(packet, name)
        if line:
            note = event.debug_annotations.add()
            note.name, note.uint_value = "line", line
        return packet

    def _call(self, packet: Any, name: str) -> None:
        """Names are told once and then numbered, up to a limit."""
        number = self._names.get(name)
        if number is None:
            if len(self._names) >= _NAMES:
                packet.track_event.name = name
                return
            number = self._names[name] = len(self._names) + 1
            interned = packet.interned_data.event_names.add()
            interned.iid, interned.name = number, name
        packet.track_event.name_iid = number

    @staticmethod
    def _note(packet: Any, name: str, value: int) -> None:
        note = packet.track_event.debug_annotations.add()
        note.name, note.pointer_value = name, value

    def _track(self, place: tuple[int, int]) -> _Track:
        track = self._tracks.get(place)
        if track is None:
            vm, vcpu = place
            if vm not in self._vms:
                self._vms[vm] = 1 + len(self._vms)
                descriptor = self._packet().track_descriptor
                descriptor.uuid = self._vms[vm]
                descriptor.process.pid = self._vms[vm]
                descriptor.process.process_name = f"VM {vm} of {clean(os.path.basename(self._recording.path))}"
            track = self._tracks[place] = _Track((1 << 32) + len(self._tracks))
            descriptor = self._packet().track_descriptor
            descriptor.uuid, descriptor.parent_uuid = track.uuid, self._vms[vm]
            thread = clean(self._threads.get(place, ""))
            descriptor.name = f"vCPU {vcpu}" + (f" ({thread})" if thread else "")
            descriptor.sibling_order_rank = min(vcpu, (1 << 31) - 1)
        return track
