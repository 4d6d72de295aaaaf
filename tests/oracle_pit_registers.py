"""The PIT of the oracle, as far as it is not time: registers, latches, states, port 0x61.

Models: kvm_pit's ports and KVM_GET_PIT2, KVM_SET_PIT2 with a clock that stands. What a count or an output is at a time,
is left out: `live` says which reads depend on that.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field

CHANNEL = struct.Struct("<IH10Bq")
COUNTER_PORTS = range(0x40, 0x43)
CONTROL, SPEAKER = 0x43, 0x61
HPET, SPEAKER_DATA = 1, 2
NO_MODE = 0xFF


@dataclass
class Channel:
    """kvm_pit_channel_state, in its order."""

    count: int = 0x10000
    latched_count: int = 0
    count_latched: int = 0
    status_latched: int = 0
    status: int = 0
    read_state: int = 0
    write_state: int = 0
    write_latch: int = 0
    rw_mode: int = 0
    mode: int = NO_MODE
    bcd: int = 0
    gate: int = 1

    def load(self, value: int) -> None:
        self.count = value or 0x10000

    def latch_count(self) -> None:
        if not self.count_latched:
            self.count_latched = self.rw_mode

    def latch_status(self) -> None:
        if not self.status_latched:
            self.status = (self.rw_mode << 4 | self.mode << 1 | self.bcd) & 0xFF
            self.status_latched = 1

    def write(self, value: int) -> None:
        state = self.write_state
        if state == 2:
            self.load(value << 8)
        elif state == 3:
            self.write_latch = value
            self.write_state = 4
        elif state == 4:
            self.load(self.write_latch | value << 8)
            self.write_state = 3
        else:
            self.load(value)

    def read(self) -> int | None:
        """None for what depends on the time."""
        if self.status_latched:
            self.status_latched = 0
            return self.status
        if self.count_latched:
            self.count_latched = 2 if self.count_latched == 3 else 0
        elif self.read_state in (3, 4):
            self.read_state = 7 - self.read_state
        return None


@dataclass
class Pit:
    """Three channels, and what they share."""

    speaker: bool
    apart: bool = False  # the speaker's bit is no flag
    reinject: bool = True
    flags: int = 0
    sound: int = 0
    channels: list[Channel] = field(default_factory=lambda: [Channel(), Channel(), Channel(gate=0)])

    def acked(self) -> None:
        """An EOI of GSI 0: what that does to ticks is time's."""

    def unmasked(self) -> None:
        """GSI 0 is unmasked: the backlog of ticks is gone."""

    def io_write(self, port: int, value: int, length: int) -> bool:
        if port == SPEAKER and self.speaker and length == 1:
            self.sound = value & SPEAKER_DATA
            if not self.apart:
                self.flags = self.flags & ~SPEAKER_DATA | self.sound
            self.channels[2].gate = value & 1
            return True
        if not (port in COUNTER_PORTS or port == CONTROL) or port + length > CONTROL + 1:
            return False
        value &= 0xFF
        if port != CONTROL:
            self.channels[port - COUNTER_PORTS.start].write(value)
        elif value >> 6 == 3:
            for n, channel in enumerate(self.channels):
                if value >> n + 1 & 1:
                    if not value & 0x20:
                        channel.latch_count()
                    if not value & 0x10:
                        channel.latch_status()
        else:
            self._control(self.channels[value >> 6], value)
        return True

    @staticmethod
    def _control(channel: Channel, value: int) -> None:
        how = value >> 4 & 3
        if how == 0:
            channel.latch_count()
            return
        channel.rw_mode = channel.read_state = channel.write_state = how
        mode = value >> 1 & 7
        channel.mode = mode - 4 if mode > 5 else mode
        channel.bcd = value & 1

    def io_read(self, port: int, length: int) -> int | None:
        if port == SPEAKER and self.speaker and length == 1:
            return self.channels[2].gate | (self.sound if self.apart else self.flags & SPEAKER_DATA)
        if not (port in COUNTER_PORTS or port == CONTROL) or port + length > CONTROL + 1:
            return None
        if port == CONTROL:
            return 0
        return self.channels[port - COUNTER_PORTS.start].read() or 0

    def get(self) -> bytes:
        data = b"".join(CHANNEL.pack(*vars(channel).values(), 0) for channel in self.channels)
        return data + struct.pack("<10I", self.flags, *[0] * 9)

    def set(self, data: bytes) -> None:
        for n in range(3):
            *values, _ = CHANNEL.unpack_from(data, n * CHANNEL.size)
            self.channels[n] = Channel(*values)
            self.channels[n].load(self.channels[n].count)
        (self.flags,) = struct.unpack_from("<I", data, 3 * CHANNEL.size)
