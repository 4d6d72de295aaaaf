"""Requests to the init of the VMX lab, and what its answers say.

Models: nothing. vmxinit.c has the same numbers. A request is a list of operations, each a number, a count of words and
the words; an answer is lines.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import IntEnum

BOTH = 0xFFFF_FFFF


class Op(IntEnum):
    """What the init can do."""

    END = 0
    VM = 1
    STORE = 2
    IOCTL = 3
    RUN = 4
    PARKED = 5
    SET = 6
    DELAY = 7
    KICK = 8
    TRACE = 9
    READ = 10
    FILE = 11
    PUT = 12
    QUIT = 13
    CLOCK = 14
    SETUP = 15
    HAS = 16
    SMM = 17


class Request:
    """A request in the making."""

    def __init__(self) -> None:
        self._parts: list[bytes] = []

    def __bytes__(self) -> bytes:
        return b"".join(self._parts) + struct.pack("<II", Op.END, 0)

    def add(self, op: Op, *words: int, data: bytes = b"") -> None:
        """One operation."""
        payload = struct.pack(f"<{len(words)}I", *(word & BOTH for word in words)) + data
        payload += bytes(-len(payload) & 3)
        self._parts.append(struct.pack("<II", op, len(payload) // 4) + payload)

    def vm(
        self,
        ids: Sequence[int],
        cpus: Sequence[int],
        *,
        split: bool = False,
        api: int = 0,
        x2apic: bool = True,
        deadline: bool = True,
        disable_exits: int = 0,
    ) -> None:
        """A new VM with vCPUs on these processors; the one before ends."""
        self.add(Op.VM, split, api, x2apic, deadline, disable_exits, len(ids), *ids, *cpus)

    def store(self, address: int, data: bytes) -> None:
        """Bytes of the VM's memory."""
        self.add(Op.STORE, address, len(data), data=data)

    def ioctl(self, vcpu: int, number: int, data: bytes = b"") -> None:
        """Any ioctl; vCPU -1 is the VM, -2 /dev/kvm."""
        self.add(Op.IOCTL, vcpu, number, len(data), data=data)

    def file(self, name: str) -> None:
        """A file's text."""
        self.add(Op.FILE, data=name.encode() + b"\0")

    def put(self, name: str, text: str) -> None:
        """Text into a file."""
        self.add(Op.PUT, data=name.encode() + b"\0" + text.encode() + b"\0")


@dataclass
class Parked:
    """How a vCPU came back from KVM_RUN."""

    vcpu: int
    error: int
    reason: int
    port: int
    suberror: int


@dataclass
class Answer:
    """What an init said, sorted."""

    ioctls: list[tuple[int, bytes]] = field(default_factory=list)
    reads: list[bytes] = field(default_factory=list)
    parked: list[Parked] = field(default_factory=list)
    files: list[list[str]] = field(default_factory=list)
    stuck: list[str] = field(default_factory=list)
    clocks: list[int] = field(default_factory=list)

    @classmethod
    def of(cls, lines: list[str]) -> Answer:
        """Answers in the order in which they came."""
        found = cls()
        inside: list[str] | None = None
        for line in lines:
            if inside is not None:
                if line == "@end":
                    inside = None
                else:
                    inside.append(line)
                continue
            word, _, rest = line.partition(" ")
            if word == "@ioctl":
                result, _, data = rest.partition(" ")
                found.ioctls.append((int(result), bytes.fromhex(data)))
            elif word == "@read":
                found.reads.append(bytes.fromhex(rest.partition(" ")[2]))
            elif word == "@parked":
                found.parked.append(Parked(*map(int, rest.split())))
            elif word == "@file":
                inside = []
                found.files.append(inside)
            elif word == "@stuck":
                found.stuck.append(rest)
            elif word == "@clock":
                found.clocks.append(int(rest))
        return found
