"""What was followed, as records: exits, ICR writes, interrupts and accesses, each complete."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

import fastexit.answers.follow.rows  # noqa: F401  the kernels
from fastexit.answers.follow import words as F
from fastexit.answers.places import NAMES_A_TARGET, Ints, Places, Where, Words
from fastexit.jit.declare import JIT, load, register, unregister
from fastexit.records.columns import RECORD, Event, Recording, Rows
from fastexit.trace.doors import Door

FACT = np.dtype(
    {
        "names": ["kind", "door", "source", "flags", "key", "place", "other", "value", "x", "y", "time", "line", "gsi"],
        "formats": ["u1", "u1", "u1", "u1", "<u4", "<i4", "<i4", "<u8", "<i8", "<u8", "<i8", "<u4", "<u4"],
        "offsets": [0, 1, 2, 3, 4, 8, 12, 16, 24, 32, 48, 56, 60],
        "itemsize": 64,
    }
)
"""``place`` and ``other`` are places plus one, 0 for none; durations without a time are NO_TIME. By ``kind``:

EXIT: ``key`` the reason's name plus one, ``value`` rip, ``x`` until the entry, ``y`` intr_info as far as printed,
``flags`` 1 of L2, ``gsi`` the CPUs of exit and entry, each plus one, 16 bits each.
ACCEPT: ``key`` vector, ``source``, ``door`` of an IPI, ``gsi`` plus one, ``other`` the sender, ``value`` its exit until
here, ``y`` delivery and trigger mode, ``flags`` 1 coalesced.
ICR: ``key`` register, ``value`` destination << 32 | ICR, ``x`` targets, ``flags`` 1 of L2, 2 #GP.
ACCESS: ``key`` register, ``door``, ``flags`` 1 of L2.
ENTERED: an IPI's ``key`` vector, ``x`` accept to entry, ``y`` exit to entry.
SERVED: the same, ``x`` entry to EOI, ``y`` accept to EOI.
ENTRY: ``value`` rip, of an entry whose exit was not recorded."""

Facts = npt.NDArray[np.void]
"""An array of FACT."""

DOORS: tuple[Door | None, ...] = (
    None,
    *(Door.X2APIC, Door.SYNTHETIC, Door.HYPERCALL, Door.PAGE, Door.TRAP, Door.AVIC, Door.ASSIST, Door.INDUCED),
    *(Door.CR8, Door.UNTOLD),
)
"""The door of each number."""

_AGAIN = """EXTERNAL_INTERRUPT INTERRUPT INTR PREEMPTION_TIMER PAUSE_INSTRUCTION PAUSE EXCEPTION_NMI NMI
    INTERRUPT_WINDOW PENDING_INTERRUPT VINTR NMI_WINDOW EXCP_GP GP EXCP_DB DB EXCP_UD UD"""
CLASSES = {
    **dict.fromkeys(("MSR_WRITE", "MSR_WRITE_IMM", "MSR"), int(F.CLASS_MSR)),
    **dict.fromkeys(("APIC_WRITE",), int(F.CLASS_TRAP)),
    **dict.fromkeys(("AVIC_INCOMPLETE_IPI", "AVIC_UNACCELERATED_ACCESS"), int(F.CLASS_AVIC)),
    **dict.fromkeys(("APIC_ACCESS", "EPT_MISCONFIG", "NPF"), int(F.CLASS_PAGE)),
    **dict.fromkeys(("EOI_INDUCED",), int(F.CLASS_INDUCED)),
    **dict.fromkeys(("HLT", "IDLE_HALT", "IDLE_HLT"), int(F.CLASS_HLT)),
    **dict.fromkeys(_AGAIN.split(), int(F.CLASS_AGAIN)),
    **dict.fromkeys(("VMCALL", "VMMCALL", "HYPERCALL"), int(F.CLASS_CALL)),
    **dict.fromkeys(("KVM_HV_SYNIC_SET_IRQ",), int(F.CLASS_SYNIC)),
    **dict.fromkeys(("KVM_HV_STIMER_EXPIRATION",), int(F.CLASS_STIMER)),
    **dict.fromkeys(("KVM_AVIC_INCOMPLETE_IPI",), int(F.CLASS_INCOMPLETE)),
}
"""What a name is to ``follow``; other names are nothing."""


def plain_reason(name: str) -> str:
    """An exit reason as all tools and vendors would call it, in capitals.

    >>> [plain_reason(name) for name in ("EXIT_MSR", "idle-halt", "EPT_VIOLATION FAILED_VMENTRY")]
    ['MSR', 'IDLE_HALT', 'EPT_VIOLATION']
    """
    word = name.partition(" ")[0].upper().replace("-", "_")
    return word.removeprefix("EXIT_REASON_").removeprefix("EXIT_")


def class_of(name: str) -> int:
    """What an exit reason or an event's name is to ``follow``."""
    return CLASSES.get(plain_reason(name), 0)


_HAS_A_CLASS = np.zeros(256, bool)
_HAS_A_CLASS[[Event.EXIT, Event.HV, Event.AVIC]] = True


class Block(NamedTuple):
    """A block of rows, and the facts that were complete with it, which stay until the next block is asked for.

    ``events``, ``threads`` and ``vms`` (by index) are of each row, ``kinds`` of each fact.
    """

    rows: Rows
    events: npt.NDArray[np.uint8]
    threads: Ints
    vms: Ints
    facts: Facts
    kinds: npt.NDArray[np.uint8]

    def at(self, event: Event) -> npt.NDArray[np.intp]:
        """Where rows of an event are."""
        return np.flatnonzero(self.events == event)

    def told(self, kind: np.uint64) -> npt.NDArray[np.intp]:
        """Where facts of a kind are."""
        return np.flatnonzero(self.kinds == int(kind))


class Follower:
    """Follows a recording. ``lanes`` and ``state`` keep what ``follow`` has found, for whoever looks at the end."""

    def __init__(self, recording: Recording, where: Where) -> None:
        self._recording = recording
        self.places: Places = Places(where)
        self.lanes: Words = np.zeros((0, int(F.L_STRIDE)), np.uint64)
        self.state: Words = np.zeros((0, int(F.P_STRIDE)), np.uint64)
        self._pool = np.zeros((F.POOL + 1, int(F.POOL_STRIDE)), np.uint64)
        self._pool[:-1, 0] = np.arange(1, F.POOL + 1, dtype=np.uint64) * F.POOL_STRIDE
        self._vm_of_place = np.zeros(0, np.int64)
        self._out = np.zeros((0, 8), np.uint64)
        self._classes = np.zeros(1, np.uint64)
        beside = int(F.BESIDE)
        self._matter = np.array([event > 63 or not beside >> event & 1 for event in range(256)])
        self._matter[int(Event.SCHED_SWITCH) + 1 :] = False

    @property
    def vm_of_place(self) -> npt.NDArray[np.int64]:
        """The VM of each place plus one, by index into ``places.vms``; of none at 0."""
        places = self.places
        known = len(self._vm_of_place)
        if known <= len(places.places):
            index = {number: i for i, number in enumerate(places.vms)}
            new = [index[vm] for vm, _ in places.places[max(known - 1, 0) :]]
            before = self._vm_of_place if known else np.array([places.of_none], np.int64)
            self._vm_of_place = np.concatenate([before, np.array(new, np.int64)])
        return self._vm_of_place

    def of_vm(self, vm: int) -> set[int]:
        """The places, each plus one, of a VM's number, with 0 where lines of no place are its own."""
        found = {i for i, (number, _) in enumerate(self.places.places, 1) if number == vm}
        return found | ({0} if self.places.vms[self.places.of_none] == vm else set())

    def words(self, place: int, which: tuple[np.uint64, ...]) -> list[Words]:
        """Some of a place's words of each vector, as they are now."""
        vectors = self.state[place, int(F.V0) :].reshape(256, int(F.V_STRIDE))
        return [vectors[:, int(word)] for word in which]

    def __iter__(self) -> Iterator[Block]:
        """Every block in order, then an empty one with what the end of the file completes."""
        empty: Rows | None = None
        for rows in self._recording.blocks:
            if rows.dtype != RECORD:  # NumPy's concatenate leaves out what fills a record up
                rows = rows.astype(RECORD)
            empty = rows[:0]
            if len(rows):
                yield self._block(np.ascontiguousarray(rows))
        if empty is not None and len(self.lanes):
            facts = self._call(None, None, len(self.lanes) * 3)
            none = np.zeros(0, np.int32)
            yield Block(empty, empty["event"], none, none, facts, np.ascontiguousarray(facts["kind"]))

    def _block(self, rows: Rows) -> Block:
        """Follow one block."""
        places = self.places
        events = np.ascontiguousarray(rows["event"])
        threads = places.threads_of(rows)
        vms = places.vm_of(threads)
        lanes, new = places.lanes_of(threads, self._matter[events])
        marks = lanes.astype(np.uint32).astype(np.uint64)  # no lane is NOWHERE
        named = np.flatnonzero(NAMES_A_TARGET[events])
        marks[named] |= places.of(vms[named], rows["a"][named]).astype(np.uint64) << np.uint64(32)
        names = self._recording.names
        if len(self._classes) != len(names) + 1:
            self._classes = np.array([*map(class_of, names), 0], np.uint64)
        classed = np.flatnonzero(_HAS_A_CLASS[events])
        marks[classed] |= self._classes[rows["name"][classed]] << np.uint64(56)
        self._grow(new)
        facts = self._call(rows, marks, 2 * len(rows))
        return Block(rows, events, threads, vms, facts, np.ascontiguousarray(facts["kind"]))

    def _grow(self, new: list[tuple[int, int]]) -> None:
        """Memory for lanes and places that this block brings; more than needed, so that it seldom happens."""
        if len(self.places.lanes) > len(self.lanes):
            more = np.zeros((max(2 * len(self.lanes), len(self.places.lanes), 16), int(F.L_STRIDE)), np.uint64)
            more[: len(self.lanes)] = self.lanes
            self.lanes = more
        for lane, place in new:
            self.lanes[lane, int(F.L_PLACE)] = place
        if len(self.places.places) > len(self.state):
            more = np.zeros((max(len(self.state) * 3 // 2, len(self.places.places)), int(F.P_STRIDE)), np.uint64)
            more[: len(self.state)] = self.state
            vectors = more[len(self.state) :, int(F.V0) :].reshape(-1, 256, int(F.V_STRIDE))
            vectors[:, :, [int(w) for w in (F.V_TIME, F.V_SENT, F.V_ENTRY, F.V_EOI)]] = F.NONE
            more[len(self.state) :, int(F.P_CALLED)] = F.NONE
            self.state = more

    def _call(self, rows: Rows | None, marks: Words | None, facts: int) -> Facts:
        """Call the kernel, or with no rows let it finish; beside so many facts there may be those that waited."""
        room = facts + F.POOL + 64
        if room > len(self._out):
            self._vm_of_place = np.zeros(0, np.int64)
        self._out = np.zeros((room, 8), np.uint64)
        out = self._out
        out[0, 0] = 0
        arrays = [self.lanes.reshape(-1), self.state.reshape(-1), self._pool.reshape(-1), out.reshape(-1)]
        if rows is not None and marks is not None:
            arrays += [rows.view(np.uint64), marks]
        at = [array.ctypes.data for array in arrays]
        if not JIT:
            for array in arrays:
                register(array.ctypes.data, array)
        try:
            load("follow_rows")(
                *(at[4:] or (0, 0)),
                0 if rows is None else len(rows),
                at[0],
                len(self.lanes),
                at[1],
                len(self.state),
                at[2],
                at[3],
                len(out),
                int(rows is None),
            )
        finally:
            if not JIT:
                for address in at:
                    unregister(address)
        n = int(out[0, 0])
        return out[1 : n + 1].reshape(-1).view(FACT)
