"""Where a line belongs: its thread's VM and vCPU as small numbers, and those of the vCPU that it names.

A lane is a thread, a place a vCPU: indices into the memory of ``follow``. KVM's vcpu_id is the APIC id of a vCPU at
reset, so an accept line's APIC id and a thread's vCPU number name the same place. Both are handed out as they are met,
up to a limit: a trace that names more keeps its counts, and what needs memory for each is left out of the rest.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from fastexit.records.columns import Event, Flag, Rows

Ints = npt.NDArray[np.int32]
Longs = npt.NDArray[np.int64]
Words = npt.NDArray[np.uint64]

LANES = 1 << 16
PLACES = 4096
VMS = 1024
IDS = 4096
"""APIC ids below this have places."""

NAMES_A_TARGET = np.zeros(256, bool)
NAMES_A_TARGET[[Event.ACCEPT, Event.APICV_ACCEPT, Event.EOI, Event.PV_EOI]] = True


class Where(NamedTuple):
    """Of each thread of a Recording its VM (0 where it is of none) and its vCPU (-1 where it is none).

    A last entry beyond the threads is that of lines without a thread.
    """

    vm: Ints
    vcpu: Ints


class Places:
    """Hands out lanes and places. ``lanes`` are threads, ``places`` (VM, vCPU id), in order of their numbers."""

    def __init__(self, where: Where) -> None:
        vms = np.unique(where.vm[where.vm != 0])
        self.only_vm: int | None = int(vms[0]) if len(vms) == 1 else None
        """The VM of everything, where there is one; threads that are no vCPU are then taken for its own."""
        vm = where.vm
        vcpu = where.vcpu
        if self.only_vm is None and not (vm == 0).any():
            vm, vcpu = np.append(vm, np.int32(0)), np.append(vcpu, np.int32(-1))
        if self.only_vm is not None:
            vm = np.where(vm == 0, self.only_vm, vm)
        self.vms: list[int] = [int(number) for number in np.unique(vm)[:VMS]]
        """VM numbers by index."""
        self.of_none: int = self.vms.index(0) if 0 in self.vms else 0
        """By index the VM of what names no place: what belongs to no VM, else the only one."""
        self._vm = np.searchsorted(np.array(self.vms), vm).astype(np.int32)
        self._vm[~np.isin(vm, self.vms)] = 0
        self._vcpu = vcpu
        self._lane_of = np.full(len(vm), -1, np.int32)
        self._of = np.zeros((len(self.vms), IDS), np.int32)
        self.lanes: list[int] = []
        self.places: list[tuple[int, int]] = []

    def vm_of_thread(self, thread: int) -> int:
        """A thread's VM, by index."""
        return int(self._vm[thread])

    def threads_of(self, rows: Rows) -> Ints:
        """Each row's thread as an index that is there: the last one is for what is beyond, or for none (-1).

        Beside other VMs, what an interrupt handler of the host prints is nobody's: it may serve any of them, whoever's
        thread it interrupts.
        """
        threads: Ints = np.ascontiguousarray(rows["thread"])
        last = len(self._vm) - 1
        if len(self.vms) > 1 and (handlers := rows["flags"] & Flag.HARDIRQ != 0).any():
            threads = np.where(handlers, last, threads)
        if len(threads) and int(threads.max()) > last:
            return np.where(threads > last, last, threads)
        return threads

    def vm_of(self, threads: Ints) -> Ints:
        """The VM of each thread, by index."""
        if len(self.vms) == 1:
            return np.zeros(len(threads), np.int32)
        found: Ints = self._vm[threads]
        return found

    def of(self, vm: Ints, ids: Words) -> Ints:
        """The place, plus one, of each vCPU id in each VM; 0 where there is room for no more."""
        if not len(ids):
            return np.zeros(0, np.int32)
        flat = self._of.reshape(-1)
        beyond = int(ids.max()) >= IDS
        fits = ids < IDS if beyond else np.ones(len(ids), bool)
        index = vm.astype(np.int64) * IDS + (np.where(fits, ids, 0) if beyond else ids).astype(np.int64)
        found: Ints = flat[index]
        if not beyond and found.all():
            return found
        missing = np.unique(index[fits & (found == 0)])
        if len(missing):
            for key in missing[: max(PLACES - len(self.places), 0)].tolist():
                self.places.append((self.vms[key // IDS], key % IDS))
                flat[key] = len(self.places)
            found = flat[index]
        return np.where(fits, found, 0).astype(np.int32)

    def place_of(self, threads: Ints) -> Ints:
        """The place, plus one, of each thread's own vCPU, or 0."""
        vcpu = self._vcpu[threads]
        ids = np.where(vcpu < 0, IDS, vcpu).astype(np.uint64)
        return self.of(self.vm_of(threads), ids)

    def lanes_of(self, threads: Ints, matter: npt.NDArray[np.bool_]) -> tuple[Ints, list[tuple[int, int]]]:
        """Each thread's lane, and those lanes that are new with their place plus one; only rows that matter get one."""
        lanes: Ints = self._lane_of[threads]
        if len(lanes) and int(lanes.min()) >= 0:
            return lanes, []
        fresh = np.unique(threads[matter & (lanes < 0)] % len(self._vm))
        new: list[tuple[int, int]] = []
        if len(fresh):
            for thread in fresh[: max(LANES - len(self.lanes), 0)].tolist():
                self._lane_of[thread] = len(self.lanes)
                place = 0
                if self._vcpu[thread] >= 0:
                    place = int(self.of(self._vm[[thread]], self._vcpu[[thread]].astype(np.uint64))[0])
                new.append((len(self.lanes), place))
                self.lanes.append(thread)
            lanes = self._lane_of[threads]
        return lanes, new
