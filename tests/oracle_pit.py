"""The PIT said a second time, plainly: channels as dictionaries, time as a number, ticks as a list."""

from __future__ import annotations

import struct
from typing import Any

HZ, NS = 1_193_181, 1_000_000_000
FIELDS = (
    "count",
    "latched_count",
    "count_latched",
    "status_latched",
    "status",
    "read_state",
    "write_state",
    "write_latch",
    "rw_mode",
    "mode",
    "bcd",
    "gate",
    "load_time",
)
CHANNEL = struct.Struct("<IH10Bq")
HPET, SPEAKER = 1, 2


class Pit:
    """``apart``: the speaker's bit is no flag. ``pulses`` counts those of GSI 0."""

    def __init__(self, *, now: int = 0, least_ns: int = 200_000, speaker: bool = True, apart: bool = False) -> None:
        self.now, self.least, self.speaker, self.apart = now, least_ns, speaker, apart
        self.flags, self.sound, self.pulses = 0, 0, 0
        self.channels: list[dict[str, int]] = [dict.fromkeys(FIELDS, 0) for _ in range(3)]
        self.alarm: int | None = None
        self.expires, self.period, self.periodic = 0, 0, False
        self.reinject, self.pending, self.ack, self.queued = True, 0, True, False
        for i, c in enumerate(self.channels):
            c.update(mode=0xFF, gate=int(i != 2))
            self.load(i, 0)

    # ------------------------------------------------------------------------------------------------------- counting

    def ticks(self, i: int) -> int:
        """Input clocks since the load."""
        if i:
            ns = self.now - self.channels[i]["load_time"]
        else:
            ns = self.period + self.now - self.expires if self.period else 0
        return ns * HZ // NS

    def count(self, i: int) -> int:
        """What a read of the counter gives, more bits than a guest sees."""
        c, d = self.channels[i], self.ticks(i)
        match c["mode"]:
            case 0 | 1 | 4 | 5:
                return c["count"] - d & 0xFFFF
            case 3:
                return c["count"] - 2 * d % c["count"]
            case _:
                return c["count"] - d % c["count"]

    def out(self, i: int) -> bool:
        """The output pin."""
        c, d = self.channels[i], self.ticks(i)
        n = c["count"]
        rules = {1: d < n, 2: d > 0 and d % n == 0, 3: d % n < (n + 1 & 0xFFFF_FFFF) // 2, 4: d == n, 5: d == n}
        return rules.get(c["mode"], d >= n)

    def latch(self, i: int, count: bool, status: bool) -> None:
        """A latch command for one or both; what is latched stays."""
        c = self.channels[i]
        if count and not c["count_latched"]:
            c.update(latched_count=self.count(i) & 0xFFFF, count_latched=c["rw_mode"])
        if status and not c["status_latched"]:
            value = self.out(i) << 7 | c["rw_mode"] << 4 | c["mode"] << 1 | c["bcd"]
            c.update(status=value & 0xFF, status_latched=1)

    def load(self, i: int, value: int, mode: int | None = None) -> None:
        """A count; channel 0 sets its timer by it."""
        c = self.channels[i]
        c["count"] = value or 0x10000
        mode = c["mode"] if mode is None else mode
        if i:
            c["load_time"] = self.now
        elif mode in (0, 1, 2, 3, 4):
            if not self.flags & HPET:
                self.work()
                interval = c["count"] * NS // HZ
                self.periodic = mode in (2, 3)
                self.period = max(interval, self.least) if self.periodic else interval
                self.pending, self.ack = 0, True
                self.alarm = self.expires = self.now + interval
        else:
            self.alarm = None
            self.work()

    # ----------------------------------------------------------------------------------------------------------- time

    def set_time(self, now: int) -> None:
        """All that is due by then, on a host that looks only now."""
        self.now = now
        while self.alarm is not None and self.alarm <= now:
            self.pending += self.reinject
            self.queued = True
            self.alarm = self.alarm + self.period if self.periodic else None
            self.expires = self.expires if self.alarm is None else self.alarm
        self.work()

    def work(self) -> None:
        """The worker's pulse."""
        if self.queued:
            self.queued = False
            if not self.reinject or self.ack:
                self.ack = self.ack and not self.reinject
                self.pulses += 1

    def acked(self) -> None:
        """An EOI of what GSI 0 goes to."""
        if self.reinject:
            self.ack = True
            self.queued = self.queued or self.pending > 1
            self.pending = max(self.pending - 1, 0)

    def unmasked(self) -> None:
        """A pin of GSI 0."""
        if self.reinject:
            self.pending, self.ack = 0, True

    def set_reinject(self, on: bool) -> None:
        """KVM_REINJECT_CONTROL."""
        if on and not self.reinject:
            self.pending, self.ack = 0, True
        self.reinject = on

    # ---------------------------------------------------------------------------------------------------------- ports

    def write(self, port: int, value: int, length: int = 1) -> bool:
        """OUT; False where it is user space's."""
        if port == 0x61 and self.speaker:
            self.sound = value >> 1 & 1
            if not self.apart:
                self.flags = self.flags & ~SPEAKER | self.sound << 1
            c = self.channels[2]
            if c["mode"] in (1, 2, 3, 5) and c["gate"] < (value & 1):
                c["load_time"] = self.now
            c["gate"] = value & 1
            return True
        if not 0x40 <= port or port + length > 0x44:
            return False
        value &= 0xFF
        if port == 0x43:
            self.command(value)
        else:
            self.write_count(port - 0x40, value)
        return True

    def command(self, value: int) -> None:
        """A control word."""
        i, access = value >> 6, value >> 4 & 3
        if i == 3:
            for n in range(3):
                if value >> n + 1 & 1:
                    self.latch(n, not value & 0x20, not value & 0x10)
        elif not access:
            self.latch(i, True, False)
        else:
            mode = value >> 1 & 7
            states = dict.fromkeys(("rw_mode", "read_state", "write_state"), access)
            self.channels[i].update(states, mode=mode & 3 if mode > 5 else mode, bcd=value & 1)

    def write_count(self, i: int, value: int) -> None:
        """One byte of a count."""
        c = self.channels[i]
        match c["write_state"]:
            case 2:
                self.load(i, value << 8)
            case 3:
                c.update(write_latch=value, write_state=4)
            case 4:
                self.load(i, c["write_latch"] | value << 8)
                c["write_state"] = 3
            case _:
                self.load(i, value)

    def read(self, port: int, length: int = 1) -> int | None:
        """IN; None where it is user space's."""
        if port == 0x61 and self.speaker:
            on = self.sound if self.apart else self.flags >> 1 & 1
            return on << 1 | self.channels[2]["gate"] | self.out(2) << 5 | (self.now >> 14 & 1) << 4
        if not 0x40 <= port or port + length > 0x44:
            return None
        if port == 0x43:
            return 0
        c = self.channels[port - 0x40]
        if c["status_latched"]:
            c["status_latched"] = 0
            return c["status"]
        if c["count_latched"]:
            low, high = c["latched_count"] & 0xFF, c["latched_count"] >> 8
            value, left = {2: (high, 0), 3: (low, 2)}.get(c["count_latched"], (low, 0))
            c["count_latched"] = left
            return value
        n = self.count(port - 0x40)
        state = c["read_state"]
        c["read_state"] = {3: 4, 4: 3}.get(state, state)
        return n >> 8 & 0xFF if state in (2, 4) else n & 0xFF

    # ---------------------------------------------------------------------------------------------------------- state

    def get(self) -> bytes:
        """KVM_GET_PIT2."""
        parts = [CHANNEL.pack(*(c[name] for name in FIELDS)) for c in self.channels]
        return b"".join(parts) + struct.pack("<10I", self.flags, *[0] * 9)

    def set(self, data: bytes) -> None:
        """KVM_SET_PIT2, or of 72 bytes KVM_SET_PIT."""
        was = self.flags & HPET
        for i, c in enumerate(self.channels):
            c.update(zip(FIELDS, CHANNEL.unpack_from(data, 24 * i), strict=True))
        if len(data) > 72:
            (self.flags,) = struct.unpack_from("<I", data, 72)
        stops = len(data) > 72 and not was and self.flags & HPET
        for i, c in enumerate(self.channels):
            self.load(i, c["count"], 0xFF if stops and not i else None)


def state(flags: int = 0, **fields: Any) -> bytes:
    """A kvm_pit_state2 whose channels are all like this."""
    one = CHANNEL.pack(*(fields.get(name, 0) for name in FIELDS))
    return one * 3 + struct.pack("<10I", flags, *[0] * 9)
