"""Lines of any shape into canonical ones, given the file's first lines to learn from."""

from __future__ import annotations

import re
from typing import NamedTuple

from fastexit.trace.beside import Beside
from fastexit.trace.events import UNREADABLE, parse
from fastexit.trace.shapes import fields, heads, mail, perftrace
from fastexit.trace.shapes.line import LINE, LONGEST, Parts, canonical, seconds
from fastexit.trace.shapes.tables import Tables

_LONGEST_MENDED = 1 << 10
"""Bytes of the longest line that is worth a look when it is not canonical."""
_STUDIED = 1 << 12
"""So many of a file's first lines are learned from."""

_PREFIX = re.compile(rb"[^\s:]+: ")
_SYSTEM = re.compile(rb"[a-z]\w*:(?=[a-z]\w*:)")
_NAME = re.compile(rb"[a-zA-Z_]\w*:")
_VCPU = re.compile(rb"kvm_(?:entry|exit): vcpu (\d{1,4})\b")
_STACK = re.compile(rb"\s+[0-9a-f]{6,16} \S")
_REPORT = re.compile(rb"(?<=: )kvm_\w+:  +(?=\S)|^ *kvm_\w+:  +(?=\S)", re.MULTILINE)
_REPORTED = 22
"""Columns in which trace-cmd report prints the name of an event."""
_NAMELESS = (
    (re.compile(rb"msr_(?:read|write) \w+ = "), b"kvm_msr"),
    (re.compile(rb"apic_(?:read|write) \w+ = "), b"kvm_apic"),
    (re.compile(rb"dst \w+ vec \d+ \(\w+\|\w+\|(?:de-)?assert\|"), b"kvm_apic_ipi"),
    (re.compile(rb"apicid \w+ vec \d+ \("), b"kvm_apic_accept_irq"),
    (re.compile(rb"apicid \w+ vector -?\d+$"), b"kvm_eoi"),
    (re.compile(rb"(?:vcpu \d+ )?reason (?!KVM_EXIT)\w+ rip 0x"), b"kvm_exit"),
    (re.compile(rb"vcpu \d+(?:,? rip 0x\w+.*)?$"), b"kvm_entry"),
    (re.compile(rb"mmio (?:unsatisfied-read|read|write) len "), b"kvm_mmio"),
    (re.compile(rb"gsi \d+ level -?\d source \d+$"), b"kvm_set_irq"),
)
"""Texts that only one event has, for lines without the event's name."""


class Real(NamedTuple):
    """Which parts of the lines the file has; False for a part that was put in where the canonical line needs it.

    A thread that is not there is one for each vCPU that lines name, ``CPU n/KVM`` with the pid n + 1, or ``<...>-1``
    where none is named; a pid that is not there is the thread's place among the names; a CPU is 0; a time is the line's
    number in us: in order, and no time.
    """

    thread: bool = True
    pid: bool = True
    cpu: bool = True
    time: bool = True


_WHOLE = Parts(b"", b"x", b"1", cpu=b"0", time=b"0.0")
"""What every canonical line has."""


class _Held(NamedTuple):
    """A line that may go on in the next one."""

    number: int
    at: int
    line: bytes
    made: bool


class Mender:
    """Makes lines canonical, and notes in ``beside`` what is none.

    Args:
        lines: the first lines of the file.
        perf: perf script's lines with thread, CPU and time are handed over as they are.

    Attributes:
        shape, clock, real: as TraceText has them.
        plain: all of these lines are canonical, or clearly no events.
    """

    def __init__(self, lines: list[bytes], *, perf: bool) -> None:
        self._perf = perf
        self.shape: str = "ftrace text"
        self.clock: str = "ns"
        self.real: Real = Real(False, False, False, False)
        self.plain: bool = True
        self._hexadecimal = False
        self._vcpu = self._first_vcpu = -1
        self._threads: dict[bytes, int] = {}
        self._held: _Held | None = None
        self._out: list[bytes] = []
        self._before: _Held | None = None
        self._study(lines[:_STUDIED])
        self.begin(Beside(""))

    def begin(self, beside: Beside) -> None:
        """A new pass over the file, whose notes go to ``beside``."""
        self._beside = beside
        self._held = self._before = None
        self._out = []
        self._threads.clear()
        self._vcpu = self._first_vcpu

    # ------------------------------------------------------------------------------------------------- what it learns

    def _study(self, lines: list[bytes]) -> None:
        sample = b"\n".join(lines)
        self._hexadecimal = fields.in_hex(sample)
        found: list[Parts] = []
        tool, canon, odd = "", 0, 0
        for line in lines:
            if not line.strip() or line.startswith(b"#"):
                continue
            if self._canonical(line):
                canon += 1
                continue
            if len(line) > _LONGEST_MENDED:
                continue
            clean = mail.unquoted(line)
            traced = perftrace.read(clean)
            parts = traced[0] if traced else heads.read(clean)
            tool = tool or ("perf trace" if traced else _tool(line))
            if parts is not None:
                found.append(parts)
            odd += parts is not None or _STACK.match(line) is not None or mail.cut(line) or mail.rest(line)
        self.plain = odd * 20 <= canon
        found += [_WHOLE] * canon
        self._name(tool, sample)
        if not found:
            self._tabled(lines)
            self.real = Real()
            return
        most = len(found) / 2
        self.real = Real(
            thread=sum(bool(parts.comm or parts.pid) for parts in found) >= most,
            pid=sum(bool(parts.pid) for parts in found) >= most,
            cpu=any(parts.cpu for parts in found),
            time=sum(bool(parts.time) for parts in found) >= most,
        )
        if sum(parts.ticks for parts in found) >= most:
            self.clock = "ticks"
        if named := _VCPU.search(sample):
            self._vcpu = self._first_vcpu = int(named[1])

    def _name(self, tool: str, sample: bytes) -> None:
        if tool:
            self.shape = tool
        elif b"kvm:kvm_" in sample:
            self.shape = "perf script"
        elif re.search(rb"^(?:cpus=|version = )", sample, re.MULTILINE) or any(
            len(found[0].lstrip()) == _REPORTED for found in _REPORT.finditer(sample)
        ):
            self.shape = "trace-cmd report"

    def _tabled(self, lines: list[bytes]) -> None:
        """The shape of a file without an event is that of its table."""
        tables = Tables()
        for number, line in enumerate(lines):
            if line.strip():
                tables.see(line, number)
        if tables.found:
            self.shape = tables.found[0].kind

    def _canonical(self, line: bytes) -> bool:
        """True for a line that is to be handed over as it is."""
        match = LINE.fullmatch(line) if len(line) <= LONGEST else None
        if match is None or match["perf_pid"] and not self._perf or line[:1] != b" " and _PREFIX.match(line):
            return False
        body: bytes = match["body"]
        if not match["perf_pid"] and body.startswith(b"kvm:") or body.startswith(b"("):
            return False
        return not (
            body.startswith(b"kvm") and fields.in_fields(body.partition(b":")[2].lstrip()) and self._fields(body)
        )

    # --------------------------------------------------------------------------------------------------- lines in turn

    def rewrite(self, lines: list[bytes], first: int) -> list[bytes]:
        """Canonical lines for these and those held back before, empty for what is no event.

        What may go on in the next line is held back; `rest` gives it in the end.
        """
        for number, line in enumerate(lines, first):
            self._one(line, number)
        ready = self._held.at if self._held else len(self._out)
        done, self._out = self._out[:ready], self._out[ready:]
        if self._held:
            self._held = self._held._replace(at=0)
        return done

    def rest(self) -> list[bytes]:
        """The lines that were held back, when there are no more."""
        self._let_go()
        done, self._out = self._out, []
        return done

    def _one(self, line: bytes, number: int) -> None:
        out = self._out
        if not line.strip() or line.startswith(b"#"):
            if line:
                self._beside.note(line, number)
            self._let_go()
            out.append(b"")
            return
        made = self._make(line, number)
        if made is None and self._joined(line):
            out.append(b"")
            return
        self._let_go()
        self._held = _Held(number, len(out), line, made is not None)
        out.append(made or b"")

    def _joined(self, line: bytes) -> bool:
        """True where this line belongs behind the one before, which now has it."""
        held = self._held
        joined = mail.joined(held.line, mail.unquoted(line)) if held else None
        if held is None or joined is None or len(joined) > LONGEST:
            return False
        made = self._make(joined, held.number)
        if made is None and not mail.cut(joined):
            return False
        self._held = held._replace(line=joined, made=made is not None)
        self._out[held.at] = made or b""
        return True

    def _let_go(self) -> None:
        """The line that was held does not go on."""
        if self._held and not self._held.made:
            self._beside.note(self._held.line, self._held.number)
        self._held = None

    def mend(self, line: bytes, number: int) -> bytes | None:
        """One line of a file that is canonical otherwise; None where it is no event, and noted."""
        if not line.strip() or line.startswith(b"#"):
            self._beside.note(line, number)
            return None
        made = self._make(line, number)
        if made is not None and made != line:
            return made
        held = self._before
        self._before = None
        if held is not None and held.number + held.at == number:
            joined = mail.joined(held.line, mail.unquoted(line))
            made = self._make(joined, number) if joined is not None else None
            if joined is not None and (made is not None or mail.cut(joined)):
                self._beside.forgive(held.number)
                if made is not None:
                    return made
                self._before = held._replace(line=joined, at=held.at + 1)
                self._beside.refuse(joined, held.number)
                return None
        if len(line) <= LONGEST:
            self._before = _Held(number, 1, line, False)
        self._beside.note(line, number)
        return None

    def whole(self, line: bytes, number: int) -> bytes | None:
        """The canonical line of a file's last one, which has no line end; None where it may be cut."""
        return self._make(line, number)

    # --------------------------------------------------------------------------------------------------------- one line

    def _make(self, line: bytes, number: int) -> bytes | None:
        """The canonical line, or None where no readable event is in it."""
        if len(line) > LONGEST:
            return None
        if self._canonical(line):
            match = LINE.fullmatch(line)
            return line if match and _readable(match["body"]) else None
        if len(line) > _LONGEST_MENDED:
            return None
        for clean in (line, mail.unquoted(line), mail.decoded(mail.unquoted(line))):
            traced = perftrace.read(clean)
            parts = traced[0] if traced else heads.read(clean)
            if parts is None:
                continue
            body = self._body(parts.body, traced[1] if traced else b"")
            if body is not None:
                return self._whole(parts._replace(body=body), number)
        return None

    def _body(self, body: bytes, args: bytes) -> bytes | None:
        """KVM's text of an event; None where it cannot be read."""
        body = _SYSTEM.sub(b"", body, count=1)
        if args:
            body = fields.told(body.partition(b":")[0], args, decimal=True) or body
        elif body.startswith(b"kvm") and fields.in_fields(body.partition(b":")[2].lstrip()):
            body = self._fields(body) or body
        elif not _NAME.match(body):
            body = next((name + b": " + body for text, name in _NAMELESS if text.match(body)), body)
        return body if _readable(body) else None

    def _fields(self, body: bytes) -> bytes | None:
        name, _, payload = body.partition(b":")
        return fields.told(name, payload, hexadecimal=self._hexadecimal)

    def _whole(self, parts: Parts, number: int) -> bytes | None:
        """The line with what it does not say put in; None where the file's other lines do say it."""
        real = self.real
        if real.pid and not parts.pid or real.thread and not (parts.comm or parts.pid) or real.time and not parts.time:
            return None
        comm, pid = parts.comm, parts.pid
        if not comm and not pid:
            if named := _VCPU.match(parts.body):
                self._vcpu = int(named[1])
            comm, pid = (b"<...>", b"1") if self._vcpu < 0 else (b"CPU %d/KVM" % self._vcpu, b"%d" % (self._vcpu + 1))
        elif not pid:
            pid = b"%d" % self._threads.setdefault(comm, len(self._threads) + 1)
        made = parts._replace(
            comm=comm or b"<...>",
            pid=pid,
            cpu=parts.cpu or b"0",
            time=parts.time or seconds(b"%d" % number, 6),
        )
        return canonical(made)


def _readable(body: bytes) -> bool:
    return b": kvm_" not in body and parse(body) is not UNREADABLE


def _tool(line: bytes) -> str:
    return "bpftrace" if line.startswith(b"Attaching ") else ""
