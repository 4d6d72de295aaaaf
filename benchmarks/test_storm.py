"""Row 7: two threads storm the same four targets while a third takes what they posted. Nothing is lost or invented.

The storm is cut into epochs. In an epoch each sender sends a random half of the vectors, over and over, to all targets;
the consumer takes PIR to IRR all the time, by thousands of notifications a call, and counts what it finds there. When
both senders have come to rest, a PIR bit whose ON bit is clear would never be noticed by its target: lost. Then the
rest is taken. Each pair of target and vector that was sent must have been found at least once behind its last write
(coalescing joins it with one that was pending, and that one is found), and no pair that was not sent may be found.
Each sender has a vector range of its own, so that the last write of a pair has one author.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

import numpy as np
import streams
from bars import Record

import fastexit as fx
from fastexit import layout as L
from fastexit import regs as R

IPIS = 100_000_000
EPOCH = 100_000
TARGETS = range(2, 6)
RANGES = (range(32, 144), range(144, 256))
NOTIFICATIONS = 2_000


class Storm:
    """One machine, two senders (vCPUs 0 and 1), four targets and their consumer."""

    def __init__(self) -> None:
        self.m = streams.machine(6)
        n = len(self.m.vcpus)
        self.irr = self.m.words[L.VEC : L.VEC + n * L.VEC_STRIDE].reshape(n, L.VEC_STRIDE)[TARGETS.start :, :4]
        self.hot = self.m.words[L.HOT : L.HOT + n * L.HOT_STRIDE].reshape(n, L.HOT_STRIDE)[TARGETS.start :]
        self.take = np.zeros(NOTIFICATIONS, dtype=fx.EXIT)
        self.take["vcpu"] = np.resize(np.array(TARGETS), NOTIFICATIONS)
        self.take["reason"] = L.NOTIFICATION
        self.found = np.zeros((len(TARGETS), 256), dtype=np.int64)
        self.wrong = 0
        self.rng = np.random.default_rng(7)

    def consume(self) -> None:
        """The targets' side; nobody else touches their IRR while APICv is active."""
        self.m.run(self.take)
        self.found += np.unpackbits(self.irr.copy().view(np.uint8), axis=1, bitorder="little")
        self.irr[:] = 0

    def writes(self, sender: int, n: int) -> tuple[np.ndarray, np.ndarray]:
        """ICR writes of one epoch, and how often each pair is among them."""
        vectors = self.rng.permutation(np.array(RANGES[sender], dtype=np.uint64))[: len(RANGES[sender]) // 2]
        to, vector = self.rng.integers(len(TARGETS), size=n, dtype=np.uint64), self.rng.choice(vectors, n)
        exits = np.zeros(n, dtype=fx.EXIT)
        exits["vcpu"] = sender
        exits["reason"] = self.m.dispatcher.vendor.wrmsr_reason
        exits["msr"] = R.MSR_X2APIC_ICR
        exits["value"] = (to + np.uint64(TARGETS.start)) << np.uint64(32) | vector
        sent = np.zeros_like(self.found)
        np.add.at(sent, (to, vector), 1)
        return exits, sent

    def epoch(self, n: int) -> None:
        """n IPIs from each sender."""
        storms, counts = zip(*(self.writes(sender, n) for sender in range(2)), strict=True)
        sent = sum(counts)
        self.found[:] = 0
        accepted = [0, 0]

        def send(sender: int) -> None:
            accepted[sender] = int(self.m.run(storms[sender])["accepted"].sum())

        workers = [threading.Thread(target=send, args=(sender,)) for sender in range(2)]
        for worker in workers:
            worker.start()
        while any(worker.is_alive() for worker in workers):
            self.consume()
        for worker in workers:
            worker.join()
        posted = self.hot[:, :4].any(axis=1)
        unannounced = posted & (self.hot[:, L.PID_CONTROL_WORD] & np.uint64(R.PID_ON) == 0)
        before = self.found.copy()
        pending = np.unpackbits(self.hot[:, :4].copy().view(np.uint8), axis=1, bitorder="little")
        self.consume()
        self.wrong += int(unannounced.sum())  # posted, and nobody was told
        self.wrong += int((self.found - before != pending).sum())  # of what was pending in the end, and nothing else
        self.wrong += int(((sent > 0) & (self.found == 0)).sum())  # lost
        self.wrong += int((self.found > sent).sum())  # invented
        self.wrong += 2 * n - sum(accepted)


def test_nothing_is_lost(benchmark: Callable, record: Record) -> None:
    """10^8 IPIs."""
    storm = Storm()
    benchmark.group = "storm"

    def all_epochs() -> None:
        for _ in range(IPIS // EPOCH // 2):
            storm.epoch(EPOCH)

    benchmark.pedantic(all_epochs, rounds=1)
    record.add("7", f"{IPIS:,} IPIs", storm.wrong, seconds=benchmark.stats.stats.total)
    assert storm.wrong == 0
