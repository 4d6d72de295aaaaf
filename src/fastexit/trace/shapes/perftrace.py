"""Lines of perf trace: a time in ms, who, and the event with its fields in parentheses."""

from __future__ import annotations

import re

from fastexit.trace.shapes.line import Parts, seconds

_LINE = re.compile(
    rb" *(?P<ms>\d{1,17})\.(?P<us>\d{3}) +(?:\([ \d.]*+(?:ms *+)?\): *)?"
    rb"(?:(?P<comm>\S(?:.*?\S)?)/(?P<pid>\d{1,10}) +)?(?P<name>kvm:\w+|[a-z]\w*:\w+)(?P<args>[(:].*)"
)


def read(line: bytes) -> tuple[Parts, bytes] | None:
    """The parts of a line and, where the event is told by its fields, these; None where it is no such line.

    Older releases print KVM's own text behind the name, which has no fields.
    """
    match = _LINE.match(line)
    if not match:
        return None
    name = match["name"].partition(b":")[2]
    args = match["args"].strip()
    body, fields = name + b": " + args[1:].strip(), b""
    if args.startswith(b"(") and args.endswith(b")"):
        body, fields = name + b": " + args[1:-1], args[1:-1]
    elif args.startswith(b"("):
        return None
    time = seconds(match["ms"] + match["us"], 6)
    return Parts(body, match["comm"] or b"", match["pid"] or b"", time=time), fields
