"""The scanner: text in, rows out, about as fast as the text can be looked at."""

from __future__ import annotations

import weakref

import numpy as np

import fastexit.records.lines  # noqa: F401  the kernels
from fastexit.jit.declare import load, register, unregister
from fastexit.records import block
from fastexit.records.block import Why
from fastexit.records.columns import RECORD, Rows
from fastexit.records.interning import REGISTERS, Words, kind_of
from fastexit.records.store import joined


class Scanner:
    """Scans one text after the other; ``words`` gathers the threads and names of all of them."""

    def __init__(self, words: Words) -> None:
        self._words = words
        self._memory = np.zeros(block.WORDS, np.uint64)
        self._memory[block.CLASSES : block.CLASSES + 256] = block.classes()
        self._memory[block.LAST_HEAD] = block.HEADS
        self._handle = self._memory.ctypes.data
        self._room = np.zeros(block.PADDING, np.uint8)
        self._heads = self._names = 0
        self._run = load("scan_lines")
        register(self._handle, self._memory)
        weakref.finalize(self, unregister, self._handle)
        self.line: int = 1
        """Number of the line behind all that were scanned."""

    def scan(self, text: bytes, line: int) -> tuple[Rows, list[tuple[int, bytes]]]:
        """Rows of the lines of a text, the first of which has this number, and the lines that could not be read."""
        m = self._memory
        size = len(text)
        room = self.room(text)
        room[:size] = np.frombuffer(text, np.uint8)
        room[size : size + block.PADDING] = 0
        room[size] = ord("\n")
        m[block.AT], m[block.LINE] = 0, line
        parts: list[Rows] = []
        bad: list[tuple[int, bytes]] = []
        address = room.ctypes.data
        while True:
            why = self._run(self._handle, address, size)
            if why == Why.NEW_NAME:
                self._add_name(text, int(m[block.MISSED]) - address)
            elif why == Why.NEW_HEAD:
                self._add_head(text, int(m[block.MISSED]) - address)
            else:
                parts.append(self._take())
                found = m[block.BADS : block.BADS + int(m[block.BAD]) * block.BAD_WORDS].reshape(-1, block.BAD_WORDS)
                bad += [(number, text[at : at + length]) for number, at, length in found.tolist()]
                m[block.BAD] = 0
            if why == Why.DONE:
                self.line = int(m[block.LINE])
                return joined(parts), bad

    def room(self, text: bytes) -> np.ndarray[tuple[int], np.dtype[np.uint8]]:
        """Where a text is put to be scanned, block.PADDING behind it."""
        if len(self._room) < len(text) + block.PADDING:
            self._room = np.zeros(len(text) + len(text) // 4 + block.PADDING, np.uint8)
        return self._room

    def _take(self) -> Rows:
        """The rows that are there, which make room for others."""
        m = self._memory
        rows = m[block.OUT : block.OUT + int(m[block.ROWS]) * block.ROW_WORDS].copy().view(RECORD)
        m[block.ROWS] = 0
        return rows

    def _add_name(self, text: bytes, at: int) -> None:
        m = self._memory
        if self._names > block.NAME_ENTRIES // 2:
            m[block.NAMES : block.NAMES + block.NAME_ENTRIES * block.NAME_WORDS] = 0
            self._names = 0
            return
        self._names += 1
        name = text[at : at + int(m[block.MISSED_LENGTH])]
        entry = int(m[block.MISSED_SLOT])
        kind, event = kind_of(name)
        m[entry + block.NAME_INDEX] = self._words.name(name) & block.NONE
        m[entry + block.NAME_KIND] = kind
        m[entry + block.NAME_EVENT] = event | REGISTERS.get(name, -1) + 1 << 32
        self._keep(entry + block.NAME_BYTES, name)
        m[entry + block.NAME_LENGTH] = len(name)

    def _add_head(self, text: bytes, at: int) -> None:
        m = self._memory
        head = text[at : at + int(m[block.MISSED_LENGTH])]
        thread = self._words.thread(head)
        if thread is None:  # a line of another kind
            end = text.find(b"\n", at)
            end = len(text) if end < 0 else end
            entry = block.BADS + int(m[block.BAD]) * block.BAD_WORDS
            m[entry : entry + block.BAD_WORDS] = m[block.LINE], at, end - at
            m[block.BAD] += np.uint64(1)
            m[block.LINE] += np.uint64(1)
            m[block.AT] = end + 1
            return
        if self._heads > block.HEAD_ENTRIES // 2:
            m[block.HEADS : block.HEADS + block.HEAD_ENTRIES * block.HEAD_WORDS] = 0
            self._heads = 0
            return
        self._heads += 1
        entry = int(m[block.MISSED_SLOT])
        m[entry + block.HEAD_THREAD] = thread & block.NONE
        self._keep(entry + block.HEAD_BYTES, head)
        m[entry + block.HEAD_LENGTH] = len(head)

    def _keep(self, at: int, text: bytes) -> None:
        """The bytes of an entry, zeroes behind them."""
        words = np.frombuffer(text.ljust(-(-len(text) // 8) * 8, b"\0"), "<u8")
        self._memory[at : at + len(words)] = words
