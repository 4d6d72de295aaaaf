"""A serial port: the 16550A at COM1, with its FIFO and its interrupt.

Models: the UART's registers as the PC16550D's data sheet has them. Bytes leave at once, so the transmitter is always
empty. Those that come wait on the line until the guest takes interrupts for them, so nothing that was typed, or piped
in, before a driver opens the port is lost when it clears the FIFO.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable

RECEIVE = TRANSMIT = DIVISOR_LOW = 0
INTERRUPTS = DIVISOR_HIGH = 1
IDENTIFY = FIFO = 2
LINE, MODEM, LINE_STATUS, MODEM_STATUS, SCRATCH = 3, 4, 5, 6, 7
DIVISOR_LATCH = 0x80
"""Of LINE: the first two registers are the divisor."""
ON_RECEIVE, ON_EMPTY, ON_LINE_STATUS = 1, 2, 4
OUT2, LOOPBACK = 8, 0x10
"""Of MODEM: the interrupt's gate, and transmitted bytes come back."""
DATA_READY, OVERRUN, EMPTY = 1, 2, 0x60
CONNECTED = 0xB0
"""MODEM_STATUS: carrier, data set ready, clear to send."""
NOTHING, IS_EMPTY, IS_DATA, IS_LINE_STATUS = 1, 2, 4, 6
FIFO_ON, FIFO_CLEARED, FIFO_SHOWN = 1, 2, 0xC0
FIFO_BYTES = 16
WAITING = 1 << 16
"""Bytes that wait for the guest at most."""


class Serial:
    """A port whose bytes go to ``send`` and whose interrupt is ``line(level)``, told when it changes."""

    def __init__(self, send: Callable[[bytes], object], line: Callable[[int], object]) -> None:
        self._send, self._line = send, line
        self._lock = threading.Lock()
        self._received: deque[int] = deque()
        self._looped: deque[int] = deque()
        self._registers = [0] * 8
        self._divisor = [12, 0]
        self._fifo = self._level = 0
        self._empty = False
        self._overrun = 0

    def room(self) -> int:
        """How many bytes `receive` takes now."""
        return WAITING - len(self._received)

    def receive(self, data: bytes) -> None:
        """Bytes for the guest; those that find no room are an overrun."""
        with self._lock:
            room = self.room()
            self._received.extend(data[:room])
            if len(data) > room:
                self._overrun = OVERRUN
            self._tell()

    def _there(self) -> deque[int] | None:
        """Bytes that the guest can read now, if there are any."""
        if self._registers[MODEM] & LOOPBACK:
            return self._looped or None
        return (self._registers[INTERRUPTS] & ON_RECEIVE and self._received) or None

    def read(self, port: int, size: int) -> int:
        """IN of one byte; of a longer access the rest is all ones."""
        register = port & 7
        with self._lock:
            value = self._read(register)
            self._tell()
        return value | (1 << 8 * size) - 0x100

    def _read(self, register: int) -> int:
        if register < 2 and self._registers[LINE] & DIVISOR_LATCH:
            return self._divisor[register]
        if register == RECEIVE:
            there = self._there()
            return there.popleft() if there else 0
        if register == IDENTIFY:
            reason = self._reason()
            if reason == IS_EMPTY:
                self._empty = False
            return reason | (FIFO_SHOWN if self._fifo & FIFO_ON else 0)
        if register == LINE_STATUS:
            status = EMPTY | self._overrun | (DATA_READY if self._there() else 0)
            self._overrun = 0
            return status
        if register == MODEM_STATUS:
            modem = self._registers[MODEM]
            if not modem & LOOPBACK:
                return CONNECTED
            return (modem & 2) << 3 | (modem & 1) << 5 | (modem & 0xC) << 4
        return self._registers[register]

    def write(self, port: int, size: int, value: int) -> None:
        """OUT of one byte, the lowest of a longer access."""
        register, value = port & 7, value & 0xFF
        sent = b""
        with self._lock:
            if register < 2 and self._registers[LINE] & DIVISOR_LATCH:
                self._divisor[register] = value
            elif register == TRANSMIT:
                if self._registers[MODEM] & LOOPBACK:
                    self._looped.append(value)
                    if len(self._looped) > FIFO_BYTES:
                        self._looped.popleft()
                else:
                    sent = bytes([value])
                self._empty = True
            elif register == FIFO:
                self._fifo = value
                if value & FIFO_CLEARED:
                    self._looped.clear()
            elif register == INTERRUPTS:
                self._empty |= bool(value & ON_EMPTY and not self._registers[INTERRUPTS] & ON_EMPTY)
                self._registers[INTERRUPTS] = value & 0xF
            elif register not in (LINE_STATUS, MODEM_STATUS):
                self._registers[register] = value
            self._tell()
        if sent:
            self._send(sent)

    def _reason(self) -> int:
        """What IIR says, the most urgent first."""
        asked = self._registers[INTERRUPTS]
        if asked & ON_LINE_STATUS and self._overrun:
            return IS_LINE_STATUS
        if asked & ON_RECEIVE and self._there():
            return IS_DATA
        return IS_EMPTY if asked & ON_EMPTY and self._empty else NOTHING

    def _tell(self) -> None:
        # Within the lock: whoever raises the line and whoever lowers it must not overtake each other.
        level = int(self._reason() != NOTHING and bool(self._registers[MODEM] & OUT2))
        if level != self._level:
            self._level = level
            self._line(level)
