"""Lines of any shape into canonical ones, in their order."""

from __future__ import annotations

import re
from typing import NamedTuple

from fastexit.trace.beside import Beside
from fastexit.trace.shapes import body as texts
from fastexit.trace.shapes import heads, mail, perftrace
from fastexit.trace.shapes.bytefields import ByteFields
from fastexit.trace.shapes.learned import Learned
from fastexit.trace.shapes.line import LONGEST, LONGEST_MENDED, RECORD, STACK, VCPU, Parts, canonical, seconds

_SPLIT = re.compile(
    rb"(.*?[\s\]])(?P<time>\d{1,20}(?:\.\d{1,9})?)(?P<us>us)? ?[+!#*@$]?: +(?:\(\+-?[\d.]+\) +)?"
    rb"(?:\d+ +(?=\w+:\w))?(?P<body>\S.*)"
)
"""A line with a time, cut before it and behind it."""
_REMEMBERED = 1 << 14
_CUT = (
    "trace-cmd report -R cuts icr_low, e and an MSI's data to a byte: what kvm_apic_ipi lines lack is taken from "
    "the ICR writes beside them, of kvm_msi_set_irq and kvm_ioapic_set_irq the vector alone is right; leave -R away"
)


class _Held(NamedTuple):
    """A line that may go on in the next one."""

    number: int
    at: int
    line: bytes
    made: bool


class Mender:
    """One pass over a file from line ``first`` on: makes lines canonical, and notes in ``beside`` what is none."""

    def __init__(self, learned: Learned, beside: Beside, first: int = 1) -> None:
        self._learned = learned
        self._beside = beside
        self._vcpu = learned.vcpu
        self._threads: dict[bytes, int] = {}
        self._held: _Held | None = None
        self._before: _Held | None = None
        self._out: list[bytes] = []
        self._first = first
        self._bytes = ByteFields() if learned.cut else None
        if learned.cut:
            beside.oddities.append(_CUT)
        self._leads: dict[bytes, bytes] = {}
        self._bodies: dict[bytes, bytes] = {}

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
        if STACK.match(line):
            self._let_go()
            out.append(b"")
            return
        cut = _SPLIT.match(line) if len(line) <= LONGEST_MENDED else None
        made = self._known(cut) if cut else None
        if made is None:
            begun = self._held and not self._held.made and mail.cut(self._held.line)
            made = None if begun else self._make(line, number)
            if made is None and self._joined(line):
                out.append(b"")
                return
            if begun:
                made = self._make(line, number)
            if cut and made is not None and self._learned.real.thread:
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
            body = self._body(text.rstrip()) if not text.startswith(RECORD) else None
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
        joined = mail.joined(held.line, mail.plain(line)) if held and short else None
        if held is None or joined is None or len(joined) > LONGEST:
            return False
        made = self._make(joined, held.number)
        if made is None and (held.made or not mail.begun(joined)):
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
            joined = mail.joined(held.line, mail.plain(line))
            made = self._make(joined, number) if joined is not None else None
            if joined is not None and (made is not None or mail.begun(joined)):
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

    # --------------------------------------------------------------------------------------------------------- one line

    def one(self, line: bytes, number: int) -> bytes | None:
        """The canonical line of one whatever stands around it; None where it may be none."""
        return self._make(line, number)

    def _make(self, line: bytes, number: int) -> bytes | None:
        """The canonical line, or None where no readable event is in it."""
        if len(line) > LONGEST:
            return None
        if self._learned.canonical(line) and texts.whole(line):
            return line
        if len(line) > LONGEST_MENDED:
            return None
        plain = mail.plain(line)
        for clean in dict.fromkeys((plain, mail.plain(mail.decoded(plain)))):
            traced = perftrace.read(clean)
            parts = traced[0] if traced else heads.read(clean)
            if parts is None:
                continue
            if parts.body.startswith(RECORD):
                return None
            body = self._body(parts.body, traced[1] if traced else b"")
            if body is not None:
                return self._whole(parts._replace(body=body), number)
        return None

    def _body(self, body: bytes, args: bytes = b"") -> bytes | None:
        return texts.told(body, args, hexadecimal=self._learned.hexadecimal)

    def _whole(self, parts: Parts, number: int) -> bytes | None:
        """The line with what it does not say put in; None where the file's other lines do say it."""
        real = self._learned.real
        if real.pid and not parts.pid or real.thread and not (parts.comm or parts.pid) or real.time and not parts.time:
            return None
        comm, pid = parts.comm, parts.pid
        if not comm and not pid:
            if named := VCPU.match(parts.body):
                self._vcpu = int(named[1])
            comm, pid = (b"<...>", b"1") if self._vcpu < 0 else (b"CPU %d/KVM" % self._vcpu, b"%d" % (self._vcpu + 1))
        elif not pid:
            pid = b"%d" % self._threads.setdefault(comm, len(self._threads) + 1)
        made = parts._replace(
            comm=comm or b"<...>",
            pid=pid,
            cpu=parts.cpu or b"0",
            time=parts.time if real.time else seconds(b"%d" % number, 6),
        )
        return canonical(made)


def _time(cut: re.Match[bytes]) -> bytes:
    time: bytes = cut["time"]
    return seconds(time, 6) if cut["us"] else time if b"." in time else seconds(time, 9)
