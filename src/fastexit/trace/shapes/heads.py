"""What stands before an event, whichever tool wrote it: thread, process, CPU, flags, time, any of them missing.

A head is read from its end to its beginning, since a thread's name may hold anything. What is read:

- ftrace, also in latency format (``0..... 234434us :``), without irq-info, without context, with a clock that has no
  decimal point, without time;
- trace-cmd report, also with -l, -t, --ts-diff, a name of a buffer or a file in front;
- perf script with any fields, a date in front, flags before the CPU;
- the function graph tracer's comments, and ftrace's buffer as an oops prints it, with the kernel log's time in front.
"""

from __future__ import annotations

import re

from fastexit.trace.shapes.line import PREFIX, Parts, seconds

_TIMED = re.compile(
    rb"(?<![^\s\]])(?P<time>\d{1,20}(?:\.\d{1,9})?)(?P<us>us)? ?[+!#*@$]?: +"
    rb"(?:\(\+-?[\d.]+\) +)?(?:\d+ +(?=\w+:\w))?(?P<body>\S.*)"
)
_NAMED = re.compile(rb"(?:[a-zA-Z_]\w*:)?[a-zA-Z_]\w*:(?:\s|$)")
_SYSTEM = re.compile(rb"[a-z]\w*:[a-z]\w*:(?:\s|$)")
_EVENT = re.compile(
    rb"(?<!\S)(?:\d+ +)?(?P<body>(?P<perf>[a-z]\w*:)?(?:kvm_\w+|vcpu_match_mmio|(?(perf)[a-z]\w+|(?!)))(?:: .*|:$))"
)
_CPU = re.compile(rb"(.*?)(?<!\S)\[(\d{1,6})\]$", re.DOTALL)
_LATENCY = re.compile(rb"(.*-\d{1,10}(?: +\([ \d-]+\))?) +(\d{1,4})([a-zA-Z.#][a-zA-Z.#\d]{3,9})$", re.DOTALL)
_FLAGS = re.compile(rb"(.*?)(?<!\S)([a-zA-Z.#\d]*[.a-zA-Z#][a-zA-Z.#\d]*)$", re.DOTALL)
_DATE = re.compile(rb"\d{4}-\d\d-\d\d[ T]\d\d:\d\d:\d\d(?:[.,]\d+)? +")
_LOGGED = re.compile(rb"\[ *\d+\.\d+\] +")
_GRAPH = re.compile(
    rb"\s*(?:(?P<time>\d{1,20}\.\d{1,9}) +\| +)?(?P<cpu>\d{1,6})\) .*\| +/\* (?P<body>[a-z]\w*: .*\S) +\*/\s*$"
)
_GRAPHED = re.compile(rb"\) +([^\s|][^|]*-\d{1,10}) +\|")
_TGID = re.compile(rb"(.*\S) +\( *(\d{1,10}|-+)\)$", re.DOTALL)
_DASHED = re.compile(rb"(.*)-(\d{1,10})$", re.DOTALL)
_SPACED = re.compile(rb"(?:(.*)(?<!\S))?(?:(\d{1,10})/)?(\d{1,10})$", re.DOTALL)
_COMM = 16
_LONGEST_HEAD = 200
_CUT = re.compile(rb"CPU \d+/(?:K|KV)?$")
_CUT_AT = 8
_FLAGS_LEAST, _FLAGS_MOST = 4, 8
_NUMBERED = re.compile(rb"(?:fc_)?vcpu \d{1,4}$")


def read(line: bytes) -> Parts | None:
    """The parts of a line, or None where no event stands in it."""
    if graph := _GRAPH.match(line):
        return _graphed(graph)
    line = _LOGGED.sub(b"", line, count=1)
    time, ticks = b"", False
    found = _TIMED.search(line)
    while found and b"." not in found["time"] and not _NAMED.match(found["body"]):
        found = _TIMED.search(line, found.end("time"))
    if found:
        time = found["time"]
        if found["us"]:
            time = seconds(time, 6)
        elif b"." not in time:
            time, ticks = seconds(time, 9), True
    else:
        found = _EVENT.search(line)
        if not found:
            return None
    if found.start() > _LONGEST_HEAD:
        return None
    head = line[: found.start()].rstrip()
    head = _DATE.sub(b"", head.lstrip(), count=1)
    if prefix := PREFIX.match(head + b" x"):
        head = head[prefix.end() :]
    cpu = flags = b""
    if latency := _LATENCY.match(head):
        head, cpu, flags = latency.groups()
    else:
        head, cpu, flags = _middle(head)
    who = _who(head)
    if who is None:
        return None
    comm, pid, tgid = who
    if comm and not pid and not _SYSTEM.match(found["body"]):  # words, or half a line
        return None
    if len(comm) == _CUT_AT and _CUT.match(comm):  # latency format cuts names
        comm = comm.partition(b"/")[0] + b"/KVM"
    flags = flags[:_FLAGS_MOST] if len(flags) >= _FLAGS_LEAST else b""
    return Parts(found["body"].rstrip(), comm, pid, tgid, cpu, flags, time, ticks)


def _graphed(graph: re.Match[bytes]) -> Parts | None:
    """A line of the function graph tracer, which has other events as comments."""
    named = _GRAPHED.search(graph[0])
    who = _who(named[1]) if named else (b"", b"", b"")
    if who is None:
        return None
    return Parts(graph["body"], *who, cpu=graph["cpu"], time=graph["time"] or b"")


def _middle(head: bytes) -> tuple[bytes, bytes, bytes]:
    """Head without, and the CPU and the flags at its end, in either order."""
    cpu = flags = b""
    if found := _CPU.match(head):
        head, cpu = found[1].rstrip(), found[2]
        if (before := _FLAGS.match(head)) and b"." in before[2] and len(before[2]) >= 4:  # perf-prof's order
            head, flags = before[1].rstrip(), before[2]
        return head, cpu, flags
    if (behind := _FLAGS.match(head)) and len(behind[2]) <= 10:
        rest = behind[1].rstrip()
        if found := _CPU.match(rest):
            return found[1].rstrip(), found[2], behind[2]
        if re.fullmatch(rb"[.a-zA-Z\d#]*\.[.a-zA-Z\d#]*", behind[2]) and len(behind[2]) >= 4 and _DASHED.match(rest):
            return rest, cpu, behind[2]
    return head, cpu, flags


def _who(head: bytes) -> tuple[bytes, bytes, bytes] | None:
    """Name, thread id and process id; None where it is too long for a name."""
    tgid = b""
    if found := _TGID.match(head):
        head, tgid = found[1], found[2]
    if found := _DASHED.match(head):
        return found[1].strip() or b"<...>", found[2], tgid
    if (found := _SPACED.match(head)) and not _NUMBERED.match(head.strip()):
        return (found[1] or b"").strip(), found[3], found[2] or tgid
    comm = head.strip()
    return (comm, b"", tgid) if len(comm) <= _COMM else None
