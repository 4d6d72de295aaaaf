"""What the first lines of a file tell of all of them: which tool wrote them, what they have, how they are best read."""

from __future__ import annotations

import re
from typing import NamedTuple

from fastexit.trace.shapes import heads, mail, perftrace
from fastexit.trace.shapes.body import NAME, SYSTEM, from_fields, in_fields, named, whole
from fastexit.trace.shapes.bulk import BULKS, Bulk
from fastexit.trace.shapes.fields import in_hex
from fastexit.trace.shapes.line import LINE, LONGEST, LONGEST_MENDED, PREFIX, RECORD, STACK, VCPU, Parts
from fastexit.trace.shapes.tables import Tables

_STUDIED = 1 << 9
"""So many of a file's first lines are learned from."""
_FEW = 20
"""One in so many lines may be odd in a file that is handed over as it is."""

_PERIOD = re.compile(rb"\d+ +[a-z]\w*:")
_REPORT = re.compile(rb"(?<=: )kvm_\w+:  +(?=\S)|^ *kvm_\w+:  +(?=\S)", re.MULTILINE)
_REPORTED = 22
"""Columns in which trace-cmd report prints the name of an event."""
_REPORT_SHAPE = "trace-cmd report"
_BY_REPORT = re.compile(rb"^(?:\S+: )?(?:cpus=|version = )", re.MULTILINE)
_RAW = re.compile(rb"(?:kvm_apic_ipi: +icr_low|kvm_msi_set_irq: +address|kvm_ioapic_set_irq: +e)=(?!0x)")


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


class Learned:
    """What is known of a file.

    Args:
        lines: the first lines of the file.
        perf: perf script's lines with thread, CPU and time are handed over as they are.

    Attributes:
        shape, clock, real, retold: as TraceText has them.
        hexadecimal: numbers without 0x are hexadecimal, as a script printed them.
        cut: fields are cut to a byte, as trace-cmd report -R prints them.
        empty: no line among them is of a trace.
        vcpu: the first vCPU that a line names, or -1.
        plain: the lines are canonical but for a few, so that the file is best handed over as it is; ``bulk`` is what
            makes them so, where it takes that.
    """

    def __init__(self, lines: list[bytes], *, perf: bool) -> None:
        self._perf = perf
        self.shape: str = "ftrace text"
        self.clock: str = "ns"
        self.real: Real = Real()
        self.retold: bool = False
        self.bulk: Bulk | None = None
        lines = lines[:_STUDIED]
        sample = b"\n".join(lines)
        self.hexadecimal: bool = in_hex(sample)
        found, canon, odd = self._study(lines)
        self.plain: bool = odd * _FEW <= canon
        if not self.plain:
            self._find_bulk(sample)
        self._name(sample)
        self.cut: bool = self.shape == _REPORT_SHAPE and _RAW.search(sample) is not None
        first = VCPU.search(sample)
        self.vcpu: int = int(first[1]) if first else -1
        self.empty: bool = not found
        if found:
            self._count(found)
        else:
            self._tabled(lines)

    def _study(self, lines: list[bytes]) -> tuple[list[Parts], int, int]:
        """The parts that lines have, how many are canonical, and how many are of a trace and are not."""
        found: list[Parts] = []
        canon = odd = told = 0
        tool = ""
        for line in lines:
            if not line.strip() or line.startswith(b"#") or len(line) > LONGEST_MENDED:
                continue
            if self.canonical(line):
                found.append(_WHOLE)
                canon += whole(line)
                odd += not whole(line)
                continue
            clean = mail.plain(line)
            traced = perftrace.read(clean)
            parts = traced[0] if traced else heads.read(clean)
            tool = tool or ("perf trace" if traced else "bpftrace" if line.startswith(b"Attaching ") else "")
            cut = mail.cut(clean)
            if cut:
                found.append(_WHOLE)
            elif parts is not None:
                found.append(parts)
                told += bool(traced and traced[1]) or in_fields(SYSTEM.sub(b"", parts.body))
                if parts.time and not traced and not NAME.match(parts.body) and named(parts.body) != parts.body:
                    tool = tool or "perf script"
            odd += parts is not None or STACK.match(line) is not None or cut or mail.goes_on(clean)
        self.shape = tool or self.shape
        self.retold = 2 * told > len(found)  # perf has an event or two that it prints so
        return found, canon, odd

    def _count(self, found: list[Parts]) -> None:
        most = len(found) / 2
        self.real = Real(
            thread=sum(bool(parts.comm or parts.pid) for parts in found) >= most,
            pid=sum(bool(parts.pid) for parts in found) >= most,
            cpu=any(parts.cpu for parts in found),
            time=sum(bool(parts.time) for parts in found) >= most,
        )
        if sum(parts.ticks for parts in found) >= most:
            self.clock = "ticks"

    def _find_bulk(self, sample: bytes) -> None:
        for bulk in BULKS:
            lines = [line for line in bulk(sample).split(b"\n") if line.strip() and not line.startswith(b"#")]
            canon = sum(map(self.canonical, lines))
            if (len(lines) - canon) * _FEW <= canon:
                self.bulk, self.plain = bulk, True
                return

    def _name(self, sample: bytes) -> None:
        if self.shape != "ftrace text":
            return
        if b"kvm:kvm_" in sample:
            self.shape = "perf script"
        elif _BY_REPORT.search(sample) or any(len(name[0].lstrip()) == _REPORTED for name in _REPORT.finditer(sample)):
            self.shape = _REPORT_SHAPE

    def _tabled(self, lines: list[bytes]) -> None:
        """The shape of a file without an event is that of its table."""
        tables = Tables()
        for number, line in enumerate(lines):
            if line.strip():
                tables.see(line, number)
        if tables.found:
            self.shape = tables.found[0].kind

    def canonical(self, line: bytes) -> bool:
        """True for a line that is to be handed over as it is."""
        match = LINE.fullmatch(line) if len(line) <= LONGEST else None
        if match is None or match["perf_pid"] and not self._perf or PREFIX.match(line) or mail.quoted(line):
            return False
        body: bytes = match["body"]
        if body.startswith((RECORD, b"(")) or not match["perf_pid"] and body.startswith(b"kvm:"):
            return False
        if not NAME.match(body) and (named(body) != body or _PERIOD.match(body)):
            return False
        body = SYSTEM.sub(b"", body, count=1)
        return not (in_fields(body) and from_fields(body, hexadecimal=self.hexadecimal))
