"""An own APIC that is a program: the face of `Apics` over a line protocol on its standard input and output.

Models: nothing. docs/apic-protocol.md has the protocol; a line is a request, its answer is a line.
"""

from __future__ import annotations

import os
import select
import shlex
import subprocess
import time
from collections.abc import Sequence
from types import TracebackType
from typing import Any, Self

from fastexit import regs as r
from fastexit.checks import quoted
from fastexit.kvm.apics import DOERS, ApicFailed
from fastexit.kvm.judge import Judge, own_host
from fastexit.outcome import GeneralProtection

VERSION = 1
"""Of the protocol."""
SECONDS = 10.0
"""How long an answer may take."""
LONGEST = 4096
"""Bytes of an answer's line: a page has 2,048 digits."""
CAPABILITIES = (
    *("wrmsr", "rdmsr", "write", "read", "set_msr", "get_msr", "lapic", "set_lapic", "msi", "pending", "ack", "time"),
    *("take", "lowest"),
)
"""What a program may say it knows; unknown words are left for later versions."""
_METHODS = {"write": "mmio_write", "read": "mmio_read", "lapic": "get_lapic", "msi": "signal_msi", "time": "set_time"}
"""Words of the protocol that are called otherwise in `Apics`."""
WORDS = {method: word for word, method in _METHODS.items()}
SIPI = "ok sipi and a vector"
SHOWN = 60
"""Characters of an answer that a message shows."""


class ApicProgram:
    """A program that is somebody's own APICs; a context manager, and what `verify` takes as ``other``.

    Args:
        command: the program and its arguments, a list or one string that is split as a shell does.
        seconds: how long it may take over an answer.

    It is started at the first request. ApicFailed (an OSError) where it cannot be started, dies, hangs or answers what
    is no answer: one line with the number of the request and the operation.
    """

    def __init__(self, command: Sequence[str] | str, *, seconds: float = SECONDS) -> None:
        self.command: list[str] = shlex.split(command) if isinstance(command, str) else list(command)
        if not self.command:
            raise ValueError("an own APIC is the name of a program, not ''")
        self.seconds: float = seconds
        self.lines: int = 0
        """Requests so far."""
        self.greeting: str = ""
        """What the program calls itself."""
        self.operations: frozenset[str] = frozenset()
        """Names of `Apics` that it knows."""
        self.exchange: list[tuple[str, str]] = []
        """Requests and answers since the last ``machine``; looks at pages are not among them."""
        self._process: subprocess.Popen[bytes] | None = None
        self._buffer = b""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<ApicProgram {shlex.join(self.command)}>"

    @property
    def name(self) -> str:
        """The program's file."""
        return os.path.basename(self.command[0])

    def machine(self, *, apic_ids: Sequence[int], **settings: Any) -> SpokenMachine:
        """A new machine, as after reset; the one before is gone."""
        self.exchange = []
        said = [f"{name}={int(value) if isinstance(value, int) else value}" for name, value in settings.items()]
        self.start()
        request = " ".join(["machine", ",".join(map(str, apic_ids)), *said])
        answer = self.ask(request)
        if answer != "ok":
            raise self.failed(request, answer, "ok")
        return SpokenMachine(self, list(apic_ids))

    def judge(self) -> Judge:
        """Who decides: it is started, so that what it knows is known."""
        self.start()
        return Judge(
            self.machine,
            own_host(),
            self.name,
            "from fastexit.kvm import ApicProgram",
            f"ApicProgram({self.command!r}) as own",
            ("other=own", f"ApicProgram({self.command!r}) as own"),
            face=lambda: self.operations,
            kinds=("apic",),
        )

    def start(self) -> None:
        """Starts it and asks what it knows; nothing if it runs."""
        if self._process is not None:
            return
        try:
            self._process = subprocess.Popen(self.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0)
        except (OSError, ValueError) as error:
            why = getattr(error, "strerror", None) or error
            raise ApicFailed(f"cannot start {quoted(self.command[0])}: {why}") from None
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            os.set_blocking(pipe.fileno(), False)
        request = f"hello fastexit {VERSION}"
        answer = self.ask(request)
        words = answer.split()
        if words[:1] != ["ok"] or len(words) < 3 or not words[1].isdecimal():
            raise self.failed(request, answer, f"ok {VERSION} NAME and what it knows")
        if int(words[1]) != VERSION:
            raise self._broken(request, f"speaks version {words[1]} of the protocol: this is version {VERSION}")
        self.greeting = words[2]
        self.operations = frozenset(_METHODS.get(word, word) for word in words[3:] if word in CAPABILITIES)
        if not self.operations.intersection(DOERS):
            raise self._broken(request, "knows none of wrmsr, set_msr, write: nothing can be done to it")

    def ask(self, request: str) -> str:
        """One request, its answer."""
        return self.ask_all([request])[0]

    def ask_all(self, requests: Sequence[str], *, kept: bool = True) -> list[str]:
        """Requests that do not wait for each other; their answers."""
        if self._buffer:
            raise self._broken(
                requests[0], f"answered before it was asked: {_short(self._buffer.decode(errors='replace'))}"
            )
        answers: list[str] = []
        outgoing = "".join(f"{request}\n" for request in requests).encode()
        until = time.monotonic() + self.seconds
        first = self.lines
        while len(answers) < len(requests):
            self.lines = first + len(answers) + 1
            outgoing = self._exchange(requests[len(answers)], outgoing, until)
            *lines, self._buffer = self._buffer.split(b"\n")
            if len(self._buffer) > LONGEST or any(len(line) > LONGEST for line in lines):
                raise self._broken(requests[len(answers)], f"answered a line of more than {LONGEST} bytes")
            answers += [line.decode("ascii", "replace").strip() for line in lines]
            if len(answers) > len(requests):
                extra = answers[len(requests)]
                raise self._broken(requests[-1], f"answered more than was asked: {_short(extra)}")
            if lines:
                until = time.monotonic() + self.seconds
        if kept:
            self.exchange += zip(requests, answers, strict=True)
        return answers

    def _exchange(self, request: str, outgoing: bytes, until: float) -> bytes:
        """Writes and reads what goes without waiting: what is still to be written."""
        process = self._process
        assert process is not None
        assert process.stdin is not None
        assert process.stdout is not None
        left = until - time.monotonic()
        reading, writing = [process.stdout], [process.stdin] if outgoing else []
        ready, able, _ = select.select(reading, writing, [], max(left, 0))
        if not ready and not able:
            raise self._broken(
                request, f"no answer within {self.seconds:g} s; does it flush its output after each line?"
            )
        if able:
            try:
                outgoing = outgoing[os.write(process.stdin.fileno(), outgoing[:4096]) :]
            except BrokenPipeError:
                outgoing = b""  # what it still said is read first
        if ready:
            got = os.read(process.stdout.fileno(), 1 << 16)
            if not got:
                raise self._broken(request, self._death())
            self._buffer += got
        return outgoing

    def _death(self) -> str:
        assert self._process is not None
        try:
            code = self._process.wait(timeout=SECONDS)
        except subprocess.TimeoutExpired:
            return "closed its output"
        return f"died of signal {-code}" if code < 0 else f"ended with exit code {code}"

    def failed(self, request: str, answer: str, wanted: str) -> ApicFailed:
        """A request was answered by what is no answer to it."""
        return self._broken(request, f"answered {_short(answer)}, not {wanted}")

    def _broken(self, request: str, what: str) -> ApicFailed:
        self.kill()
        return ApicFailed(f"{self.name}, line {self.lines} ({_short(request, '')}): {what}")

    def kill(self) -> None:
        """Ends it at once."""
        if self._process is not None:
            self._process.kill()
            self.close()

    def close(self) -> None:
        """Ends it: end of input, and a signal if that is not enough. The next request starts it again."""
        process, self._process, self._buffer = self._process, None, b""
        if process is None:
            return
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.close()
        process.stdout.close()
        try:
            process.wait(timeout=1)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


class SpokenMachine:
    """A machine of such a program: what `Apics` asks for, as far as it is known."""

    def __init__(self, program: ApicProgram, apic_ids: list[int]) -> None:
        self.program: ApicProgram = program
        self.operations: frozenset[str] = program.operations
        self.vcpus: list[SpokenVcpu] = [SpokenVcpu(program, i) for i in range(len(apic_ids))]

    @property
    def transcript(self) -> list[tuple[str, str]]:
        """What was said since the machine was made."""
        return self.program.exchange

    def pages(self) -> list[bytes]:
        """The page of every vCPU, asked in one go."""
        requests = [f"lapic {vcpu.index}" for vcpu in self.vcpus]
        answers = self.program.ask_all(requests, kept=False)
        return [_page(self.program, *said) for said in zip(requests, answers, strict=True)]

    def signal_msi(self, address: int, data: int) -> int | None:
        """A message: how many accepted it, if it says so."""
        request = f"msi {address:#x} {data:#x}"
        answer = self.program.ask(request)
        return None if answer == "ok" else _number(self.program, request, answer, "ok, or ok and how many accepted it")

    def set_time(self, ns: int) -> None:
        """The clock goes on."""
        _done(self.program, f"time {ns}")


class SpokenVcpu:
    """One of its vCPUs."""

    def __init__(self, program: ApicProgram, index: int) -> None:
        self.program: ApicProgram = program
        self.index: int = index

    def wrmsr(self, msr: int, value: int) -> str | None:
        """WRMSR."""
        return _done(self.program, f"wrmsr {self.index} {msr:#x} {value:#x}", "gp")

    def rdmsr(self, msr: int) -> int:
        """RDMSR."""
        return self._read(f"rdmsr {self.index} {msr:#x}")

    def set_msr(self, msr: int, value: int) -> str | None:
        """KVM_SET_MSRS."""
        return _done(self.program, f"set_msr {self.index} {msr:#x} {value:#x}", "gp")

    def get_msr(self, msr: int) -> int:
        """KVM_GET_MSRS."""
        return self._read(f"get_msr {self.index} {msr:#x}")

    def mmio_write(self, offset: int, value: int, length: int = 4) -> str | None:
        """A store to the xAPIC page."""
        return _done(self.program, f"write {self.index} {offset:#x} {value:#x} {length}")

    def mmio_read(self, offset: int, length: int = 4) -> int:
        """A load from the xAPIC page."""
        request = f"read {self.index} {offset:#x} {length}"
        return _number(self.program, request, self.program.ask(request), "ok and a value")

    def get_lapic(self) -> bytes:
        """The page."""
        request = f"lapic {self.index}"
        return _page(self.program, request, self.program.ask(request))

    def set_lapic(self, data: bytes) -> None:
        """The page set."""
        _done(self.program, f"set_lapic {self.index} {data.hex()}")

    def pending(self) -> int | None:
        """The vector that would be taken."""
        return self._vector(f"pending {self.index}")

    def ack(self) -> int | None:
        """The vector that is taken."""
        return self._vector(f"ack {self.index}")

    def take(self) -> str:
        """What the CPU takes that is no interrupt of the APIC."""
        request = f"take {self.index}"
        answer = self.program.ask(request)
        ok, _, event = answer.partition(" ")
        if ok == "ok" and event in ("none", "nmi", "smi", "init"):
            return event
        if ok == "ok" and event.startswith("sipi "):
            return f"sipi {_number(self.program, request, f'ok {event[5:]}', SIPI):#x}"
        raise self.program.failed(request, answer, f"ok and none, nmi, smi, init; {SIPI}")

    def _vector(self, request: str) -> int | None:
        answer = self.program.ask(request)
        if answer == "ok none":
            return None
        return _number(self.program, request, answer, "ok and a vector, or ok none")

    def _read(self, request: str) -> int:
        answer = self.program.ask(request)
        if answer == "gp":
            raise GeneralProtection(f"{request}: #GP(0)")
        return _number(self.program, request, answer, "ok and a value, or gp")


def _done(program: ApicProgram, request: str, fault: str = "ok") -> str | None:
    """None for ok, "#GP" for gp where that may be."""
    answer = program.ask(request)
    if answer not in ("ok", fault):
        raise program.failed(request, answer, "ok" if fault == "ok" else f"ok or {fault}")
    return "#GP" if answer == "gp" else None


def _number(program: ApicProgram, request: str, answer: str, wanted: str) -> int:
    """The number behind ok."""
    ok, _, value = answer.partition(" ")
    try:
        found = int(value, 0)
    except ValueError:
        found = -1
    if ok != "ok" or not 0 <= found < 1 << 64:
        raise program.failed(request, answer, wanted)
    return found


def _page(program: ApicProgram, request: str, answer: str) -> bytes:
    """The page behind ok."""
    ok, _, digits = answer.partition(" ")
    try:
        data = bytes.fromhex(digits)
    except ValueError:
        data = b""
    if ok != "ok" or not data:
        raise program.failed(request, answer, f"ok and {2 * r.LAPIC_PAGE_BYTES:,} hex digits")
    if len(data) != r.LAPIC_PAGE_BYTES:
        raise program.failed(request, answer, f"{r.LAPIC_PAGE_BYTES:,} bytes: there are {len(data):,}")
    return data


def _short(text: str, mark: str = "'") -> str:
    return f"{mark}{text if len(text) <= SHOWN else text[:SHOWN] + '...'}{mark}"
