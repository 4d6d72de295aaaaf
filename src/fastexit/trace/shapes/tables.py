"""Tables of counts that stand in place of lines: of perf kvm stat, top and stat, kvm_stat, bcc's kvmexit, bpftrace."""

from __future__ import annotations

import re
from collections.abc import Callable

from fastexit.trace.found import Table, TableRow

_SHARE = rb"(\d{1,3}(?:\.\d+)?)%"
_KVM_STAT_HEAD = re.compile(rb"\s*(?:VM-EXIT|\w+ Access|Event name)\s+Samples?\s+Samples?%(.*)", re.IGNORECASE)
_KVM_STAT_ROW = re.compile(rb"\s*(\S.*?)\s+(\d[\d,]{0,24})\s+" + _SHARE + rb"([^(]*)")
_COLUMN = re.compile(rb"(min|max|avg|mean|)\s*time\s*(%|)", re.IGNORECASE)
_CELL = re.compile(rb"(\d{1,15}(?:\.\d+)?) ?(%|[num]?s\b|)")
_STAT_HEAD = re.compile(rb"\s*Event\s+Total\s+%?Total\s+CurAvg/s")
_STAT_ROW = re.compile(rb"\s*([a-z]\w*(?:\s*[\[(]?[\w -]+[\])])?)\s+(\d{1,19})(?:\s+(\d{1,3}\.\d))?(?:\s+\d+)?\s*$")
_BCC_HEAD = re.compile(rb"\s*(?:(?:TG?ID|PID)\s+){0,2}(?:COMM\s+)?(?:KVM_EXIT_REASON|EXIT_REASON)\s+(?:COUNT|STAT)\b")
_BCC_ROW = re.compile(
    rb"\s*(?:\^C)?((?:\d+\s+){0,2})(?:b'[^']*'\s+)?(?:EXIT_REASON_)?([A-Za-z]\w*)\s+(\d{1,19})(?:\s+(\d{1,15}\.\d+))?\s*$"
)
_PROF_HEAD = re.compile(rb"\s*exit_reason\s+calls\s+total\((\ws)\)\s+min\(\ws\)\s+avg\(\ws\)\s+max\(\ws\)")
_PROF_ROW = re.compile(rb"\s*(\w+)\s+(\d{1,19})((?:\s+\d{1,15}\.\d+){4})")
_RULER = re.compile(rb"[\s=-]+$")
_TOP_HEAD = re.compile(rb"#?\s*Overhead\s+.*Trace output")
_TOP_SAMPLES = re.compile(rb"#?\s*Samples: \S+\s+of event '(kvm:\w+)'")
_TOP_COUNT = re.compile(rb"Event count \(approx\.\): (\d{1,19})")
_TOP_ROW = re.compile(rb"\s*" + _SHARE + rb"\s+(.*\S)")
_PERF_STAT_HEAD = re.compile(rb"\s*Performance counter stats for (.*?):?\s*$")
_PERF_STAT_ROW = re.compile(rb"\s*(\d[\d,.]{0,24})\s+(?:kvm:)(\w+)\b")
_MAP_ROW = re.compile(rb"(@\w*)\[([^\]]{1,100})\]: (\d{1,19})\s*$")
_TOTAL = re.compile(rb"\s*Total(?: Samples:|\s+\d+\s+\d+\s*$)")
_LONGEST = 400
_NS = {b"%": 0.0, b"ns": 1.0, b"us": 1e3, b"ms": 1e6, b"s": 1e9}

_COLUMNS = {b"min": "minimum", b"max": "maximum", b"avg": "mean", b"mean": "mean", b"": "total"}

_Reader = Callable[[bytes, tuple[str, ...], int], TableRow | None]
"""Makes a row of a line, given the names of the columns behind the first three and the number of all samples."""


def _words(text: bytes) -> str:
    return text.decode("utf-8", "replace")


def _share(percent: bytes) -> float:
    return round(float(percent) / 100, 6)


def _columns(head: bytes) -> tuple[str, ...]:
    """What the columns of times hold, in their order; "" for a share of time."""
    return tuple("" if percent else _COLUMNS[kind.lower()] for kind, percent in _COLUMN.findall(head))


def _kvm_stat(line: bytes, columns: tuple[str, ...], samples: int) -> TableRow | None:
    """An exit reason: samples and their share, and times as the columns say."""
    match = _KVM_STAT_ROW.match(line)
    if not match:
        return None
    cells = _CELL.findall(match[4])
    times = {
        name: float(value) * _NS[unit or b"ns"] for name, (value, unit) in zip(columns, cells, strict=False) if name
    }
    number, mean = int(match[2].replace(b",", b"")), times.get("mean", -1.0)
    total = times.get("total", number * mean if mean >= 0 else -1.0)
    least, most = times.get("minimum", -1.0), times.get("maximum", -1.0)
    return TableRow(_words(match[1]), number, _share(match[3]), total, least, mean, most)


def _stat(line: bytes, columns: tuple[str, ...], samples: int) -> TableRow | None:
    match = _STAT_ROW.match(line)
    if not match:
        return None
    return TableRow(_words(match[1]), int(match[2]), _share(match[3]) if match[3] else -1.0)


def _bcc(line: bytes, columns: tuple[str, ...], samples: int) -> TableRow | None:
    """A reason, with the thread where the table has it."""
    match = _BCC_ROW.match(line)
    if not match:
        return None
    thread = match[1].split()[-1:]
    label = _words(match[2])
    label = f"{label}, thread {_words(thread[0])}" if thread else label
    number, mean = int(match[3]), float(match[4]) if match[4] else -1.0
    return TableRow(label, number, -1.0, number * mean if match[4] else -1.0, mean=mean)


def _prof(line: bytes, columns: tuple[str, ...], samples: int) -> TableRow | None:
    """An exit reason of perf-prof: calls, then total, shortest, mean and longest time in us."""
    match = _PROF_ROW.match(line)
    if not match:
        return None
    total, least, mean, most = (float(cell) * _NS[b"us"] for cell in match[3].split())
    return TableRow(_words(match[1]), int(match[2]), -1.0, total, least, mean, most)


def _top(line: bytes, columns: tuple[str, ...], samples: int) -> TableRow | None:
    """A text of an event with its share; the number that it makes, where the header told how many there are."""
    match = _TOP_ROW.match(line)
    if not match:
        return None
    share = _share(match[1])
    return TableRow(_words(match[2]), round(share * samples) if samples >= 0 else -1, share)


def _perf_stat(line: bytes, columns: tuple[str, ...], samples: int) -> TableRow | None:
    """An event and how often it was."""
    match = _PERF_STAT_ROW.match(line)
    return TableRow(_words(match[2]), int(re.sub(rb"[,.]", b"", match[1])), -1.0) if match else None


def _map(line: bytes, columns: tuple[str, ...], samples: int) -> TableRow | None:
    """A key of a map and its count."""
    match = _MAP_ROW.match(line)
    return TableRow(_words(match[2]), int(match[3]), -1.0) if match else None


class Tables:
    """Looks at lines in their order, and keeps the tables among them.

    Attributes:
        found: tables that have a row.
    """

    def __init__(self) -> None:
        self.found: list[Table] = []
        self._table: Table | None = None
        self._read: _Reader = _stat
        self._columns: tuple[str, ...] = ()
        self._above = b""
        self._samples: tuple[str, int] = ("", -1)

    def see(self, line: bytes, number: int) -> bool:
        """True for a line that belongs to a table. Blank lines need not be shown."""
        if len(line) > _LONGEST:
            self._table = None
            return False
        if self._head(line, number):
            return True
        if line.startswith(b"#"):
            return False
        table = self._table
        if table is None:
            self._above = line
            return False
        if _TOTAL.match(line):
            self._table = None
            return True
        if _RULER.match(line):
            return True
        row = self._read(line, self._columns, self._samples[1])
        if row is None:
            self._table = None
            self._above = line
            return False
        if not table.rows:
            self.found.append(table)
        table.rows.append(row)
        return True

    def _head(self, line: bytes, number: int) -> bool:
        if self._samples[0] and line.startswith(b"#") and (count := _TOP_COUNT.search(line)):
            self._samples = self._samples[0], int(count[1])
            return True
        if stat := _PERF_STAT_HEAD.match(line):
            self._table = Table("perf stat", _words(stat[1]).strip("'"), number)
            self._read = _perf_stat
            return True
        if (row := _MAP_ROW.match(line)) and (self._table is None or self._table.title != _words(row[1])):
            self._table = Table("bpftrace map", _words(row[1]), number)
            self._read = _map
        if samples := _TOP_SAMPLES.match(line):
            count = _TOP_COUNT.search(line)
            self._samples = _words(samples[1]), int(count[1]) if count else -1
            self._table = None
            return True
        for kind, head, read in _KINDS:
            if head.match(line):
                title = self._samples[0] if kind == "perf top" else _words(self._above).strip(" :")
                self._table = Table(kind, title, number)
                self._read = read
                self._columns = _columns(line)
                return True
        return False


_KINDS: tuple[tuple[str, re.Pattern[bytes], _Reader], ...] = (
    ("perf kvm stat", _KVM_STAT_HEAD, _kvm_stat),
    ("kvm_stat", _STAT_HEAD, _stat),
    ("bcc kvmexit", _BCC_HEAD, _bcc),
    ("perf-prof kvm-exit", _PROF_HEAD, _prof),
    ("perf top", _TOP_HEAD, _top),
)
