"""Lines of any shape into canonical ones, given the file's first lines to learn from."""

from __future__ import annotations

import re
from typing import NamedTuple

from fastexit.trace.beside import Beside
from fastexit.trace.events import UNREADABLE, parse
from fastexit.trace.shapes import fields, heads, mail, perftrace
from fastexit.trace.shapes.bulk import BULKS, Bulk
from fastexit.trace.shapes.bytefields import ByteFields
from fastexit.trace.shapes.line import LINE, LONGEST, Parts, canonical, seconds
from fastexit.trace.shapes.tables import Tables

_LONGEST_MENDED = 1 << 10
"""Bytes of the longest line that is worth a look when it is not canonical."""
_STUDIED = 1 << 12
"""So many of a file's first lines are learned from."""

_PREFIX = re.compile(rb" *[^\s:]+: ")
_SYSTEM = re.compile(rb"[a-z]\w*:(?=[a-z]\w*:)")
_NAME = re.compile(rb"[a-zA-Z_]\w*:")
_SPLIT = re.compile(
    rb"(.*?[\s\]])(?P<time>\d{1,20}(?:\.\d{1,9})?)(?P<us>us)? ?[+!#*@$]?: +(?:\(\+-?[\d.]+\) +)?"
    rb"(?:\d+ +(?=\w+:\w))?(?P<body>\S.*)"
)
"""A line with a time, cut before it and behind it."""
_REMEMBERED = 1 << 14
_FEW = 20
"""One in so many lines may be odd in a file that is handed over as it is."""
_VCPU = re.compile(rb"kvm_(?:entry|exit): vcpu (\d{1,4})\b")
_RECORD = b"PERF_RECORD_"
"""What perf prints of its own records: threads that begin, maps, lost events."""
_STACK = re.compile(rb"\s+[0-9a-f]{6,16} \S")
_REPORT = re.compile(rb"(?<=: )kvm_\w+:  +(?=\S)|^ *kvm_\w+:  +(?=\S)", re.MULTILINE)
_REPORTED = 22
"""Columns in which trace-cmd report prints the name of an event."""
_REPORT_SHAPE = "trace-cmd report"
_RAW = re.compile(rb"(?:kvm_apic_ipi: +icr_low|kvm_msi_set_irq: +address|kvm_ioapic_set_irq: +e)=(?!0x)")
_CUT = (
    "trace-cmd report -R cuts icr_low, e and an MSI's data to a byte: what kvm_apic_ipi lines lack is taken from "
    "the ICR writes beside them, of kvm_msi_set_irq and kvm_ioapic_set_irq the vector alone is right; leave -R away"
)
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
    (re.compile(rb"pin \d+ dst \w+ vec \d+ \("), b"kvm_ioapic_set_irq"),
    (re.compile(rb"chip [01] pin \d \("), b"kvm_pic_set_irq"),
    (re.compile(rb"irqchip \w.* pin \d+$"), b"kvm_ack_irq"),
    (re.compile(rb"reason KVM_EXIT_\w+ \(\d+\)$"), b"kvm_userspace_exit"),
    (re.compile(rb"pio_(?:read|write) at 0x"), b"kvm_pio"),
    (re.compile(rb"cr_(?:read|write) \w+ = 0x"), b"kvm_cr"),
    (re.compile(rb"(?:IRQ 0x[0-9a-f]+|irq \d+)(?: \[reinjected\])?$"), b"kvm_inj_virq"),
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
        retold: events' texts were made of their fields, so that they tell nothing of the kernel that recorded.
        bulk: what makes a chunk canonical at once, where all of these lines are so then but for a few.
        plain: all of these lines are canonical, or clearly no events.
    """

    def __init__(self, lines: list[bytes], *, perf: bool) -> None:
        self._perf = perf
        self.shape: str = "ftrace text"
        self.clock: str = "ns"
        self.real: Real = Real(False, False, False, False)
        self.plain: bool = True
        self.retold: bool = False
        self.bulk: Bulk | None = None
        self._hexadecimal = self._cut = False
        self._vcpu = self._first_vcpu = -1
        self._threads: dict[bytes, int] = {}
        self._held: _Held | None = None
        self._out: list[bytes] = []
        self._before: _Held | None = None
        self._bytes: ByteFields | None = None
        self._first = 1
        self._leads: dict[bytes, bytes] = {}
        self._bodies: dict[bytes, bytes] = {}
        self._study(lines[:_STUDIED])
        self.begin(Beside(""))

    def begin(self, beside: Beside) -> None:
        """A new pass over the file, whose notes go to ``beside``."""
        self._beside = beside
        self._held = self._before = None
        self._out = []
        self._first = 1
        self._bytes = ByteFields() if self.shape == _REPORT_SHAPE and self._cut else None
        if self._bytes:
            beside.oddities.append(_CUT)
        self._threads.clear()
        self._leads.clear()
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
                self.retold = self.retold or bool(traced and traced[1]) or _in_fields(_SYSTEM.sub(b"", parts.body))
                if parts.time and not traced and not _NAME.match(parts.body) and _named(parts.body) != parts.body:
                    tool = tool or "perf script"
            odd += parts is not None or _STACK.match(line) is not None or mail.cut(line) or mail.rest(line)
        self.plain = odd * _FEW <= canon
        found += [_WHOLE] * canon
        if not self.plain:
            self._find_bulk(sample)
        self._name(tool, sample)
        self._cut = _RAW.search(sample) is not None
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

    def _find_bulk(self, sample: bytes) -> None:
        for bulk in BULKS:
            lines = [line for line in bulk(sample).split(b"\n") if line.strip() and not line.startswith(b"#")]
            canon = sum(map(self._canonical, lines))
            if (len(lines) - canon) * _FEW <= canon:
                self.bulk, self.plain = bulk, True
                return

    def _name(self, tool: str, sample: bytes) -> None:
        if tool:
            self.shape = tool
        elif b"kvm:kvm_" in sample:
            self.shape = "perf script"
        elif re.search(rb"^(?:\S+: )?(?:cpus=|version = )", sample, re.MULTILINE) or any(
            len(found[0].lstrip()) == _REPORTED for found in _REPORT.finditer(sample)
        ):
            self.shape = _REPORT_SHAPE

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
        if match is None or match["perf_pid"] and not self._perf or _PREFIX.match(line):
            return False
        body: bytes = match["body"]
        if body.startswith(_RECORD):
            return False
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
        self._first += ready
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
        if _STACK.match(line):
            self._let_go()
            out.append(b"")
            return
        cut = _SPLIT.match(line) if len(line) <= _LONGEST_MENDED else None
        made = self._known(cut) if cut else None
        if made is None:
            made = self._make(line, number)
            if made is None and self._joined(line):
                out.append(b"")
                return
            if cut and made is not None and self.real.thread:
                self._remember(cut, made)
        if self._held and not self._held.made:
            self._let_go()
        self._held = _Held(number, len(out), line, made is not None)
        out.append(made or b"")
        if self._bytes and made and (whole := self._bytes.see(made, number)) and whole[0] >= self._first:
            out[whole[0] - self._first] = whole[1]

    def _known(self, cut: re.Match[bytes]) -> bytes | None:
        """The canonical line of one whose beginning was seen before."""
        lead, text = self._leads.get(cut[1]), cut["body"]
        if lead is None:
            return None
        body = self._bodies.get(text)
        if body is None:
            body = self._body(text.rstrip(), b"") if not text.startswith(_RECORD) else None
            if body is None:
                return None
            if len(self._bodies) >= _REMEMBERED:
                self._bodies.clear()
            self._bodies[text] = body
        return b"%b%b: %b" % (lead, _time(cut), body)

    def _remember(self, cut: re.Match[bytes], made: bytes) -> None:
        """What became of a line's beginning, for the next ones that have it."""
        lead, time, _ = made.partition(b" %b: " % _time(cut))
        if time:
            if len(self._leads) >= _REMEMBERED:
                self._leads.clear()
            self._leads[cut[1]] = lead + b" "

    def _joined(self, line: bytes) -> bool:
        """True where this line belongs behind the one before, which now has it."""
        held = self._held
        short = held is not None and len(held.line) <= LONGEST
        joined = mail.joined(held.line, mail.unquoted(line)) if held and short else None
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
        unquoted = mail.unquoted(line)
        for clean in dict.fromkeys((line, unquoted, mail.decoded(unquoted))):
            traced = perftrace.read(clean)
            parts = traced[0] if traced else heads.read(clean)
            if parts is None:
                continue
            if parts.body.startswith(_RECORD):
                return None
            body = self._body(parts.body, traced[1] if traced else b"")
            if body is not None:
                return self._whole(parts._replace(body=body), number)
        return None

    def _body(self, body: bytes, args: bytes) -> bytes | None:
        """KVM's text of an event; None where it cannot be read."""
        body = _SYSTEM.sub(b"", body, count=1)
        if args:
            body = fields.told(body.partition(b":")[0], args, decimal=True) or body
        elif _in_fields(body):
            body = self._fields(body) or body
        elif not _NAME.match(body):
            body = _named(body)
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


def _time(cut: re.Match[bytes]) -> bytes:
    time: bytes = cut["time"]
    return seconds(time, 6) if cut["us"] else time if b"." in time else seconds(time, 9)


def _in_fields(body: bytes) -> bool:
    name, _, payload = body.partition(b":")
    return name.startswith(b"kvm_") and fields.in_fields(payload.lstrip())


def _named(body: bytes) -> bytes:
    """The body of a line without its event's name, with it where it can be told."""
    return next((name + b": " + body for text, name in _NAMELESS if text.match(body)), body)


def _readable(body: bytes) -> bool:
    return b": kvm_" not in body and parse(body) is not UNREADABLE


def _tool(line: bytes) -> str:
    return "bpftrace" if line.startswith(b"Attaching ") else ""
