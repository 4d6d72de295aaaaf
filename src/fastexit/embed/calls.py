"""What is written from struct fx_ops of fastexit.h: for each call an exported symbol, and a method of fastexit.hpp.

``python -m fastexit.embed.calls`` writes the files into native/; a test compares them, so neither can drift from the
table of calls.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from fastexit.embed import cabi

_FIELD = re.compile(r"int32_t \(\*(\w+)\)\(([^)]*)\);")
_COMMENT = re.compile(r"/\*.*?\*/", re.DOTALL)
_METHODS = re.compile(r"(?<=    // calls:begin\n).*?(?=    // calls:end\n)", re.DOTALL)
_MACHINE = "fx_machine *m"
_WIDTH = 118


class Call(NamedTuple):
    """One call of the table: its name, and its parameters as they are declared."""

    name: str
    params: tuple[str, ...]

    @property
    def arguments(self) -> tuple[str, ...]:
        """The parameters' names."""
        return tuple(param.replace("*", " ").split()[-1] for param in self.params)

    @property
    def given(self) -> bool:
        """Whether fastexit.h declares the symbol itself: fx_restore and fx_close."""
        return f"int32_t fx_{self.name}(" in cabi.declarations("fastexit.h")


def calls() -> tuple[Call, ...]:
    """The calls of struct fx_ops, in order."""
    text = _COMMENT.sub("", cabi.declarations("fastexit.h"))
    table = text[text.index("struct fx_ops {") :]
    fields = _FIELD.findall(table[: table.index("\n};")])
    return tuple(Call(name, tuple(" ".join(p.split()) for p in params.split(","))) for name, params in fields)


def _wrapped(head: str, params: tuple[str, ...], tail: str) -> str:
    """A declaration, its parameters on further lines where they do not fit."""
    lines, line = [], head
    for i, param in enumerate(params):
        word = param + (tail if i + 1 == len(params) else ",")
        if len(line) + len(word) > _WIDTH:
            lines.append(line.rstrip())
            line = " " * len(head)
        line += word + " "
    return "\n".join([*lines, line.rstrip()])


def header() -> str:
    """fastexit_calls.h."""
    declared = [_wrapped(f"int32_t fx_{c.name}(", c.params, ");") for c in calls() if not c.given]
    return "\n".join([*_HEADER_HEAD, *declared, *_HEADER_TAIL])


def source() -> str:
    """calls.c."""
    functions, rows = [], []
    for call in calls():
        rows.append(f"    .{call.name} = fx_{call.name},")
        if not call.given:
            head = f"CFFI_DLLEXPORT int32_t fx_{call.name}("
            done = f"op_{call.name}({', '.join(call.arguments)})"
            body = [f"    return {done};"] if call.name in _NOT_HELD else _HELD.replace("DONE", done).splitlines()
            functions += [_wrapped(head, call.params, ")"), "{", *body, "}", ""]
    return "\n".join([*_SOURCE_HEAD, *functions, *_TABLE_HEAD, *rows, "};", ""])


_NOT_HELD = frozenset({"set_trace", "trace_text"})
_HELD = """\
    int held = hold(m);
    int32_t status = DONE;

    if (held)
        let_go(m);
    return status;
"""
"""Around each call: what tracing takes."""

_RETURNED = {
    "struct fx_result *result": "Result &result",
    "fx_machine **machine": "Machine &machine",
    "uint64_t *value": "uint64_t &value",
    "uint64_t *count": "uint64_t &count",
    "uint64_t *needed": "uint64_t &needed",
    "uint64_t *done": "uint64_t &done",
    "uint64_t *ns": "uint64_t &ns",
    "uint32_t *vector": "uint32_t &vector",
    "uint32_t *level": "uint32_t &level",
    "uint32_t *vcpu": "uint32_t &vcpu",
    "uint32_t *effects": "uint32_t &effects",
}
"""Parameters that a call fills in, one of each: a reference in C++, which cannot be null."""


def _method(call: Call) -> str:
    params = tuple(_RETURNED.get(p, _reference(p)) for p in call.params[1:])
    passed = ["m", *(("&" if "&" in p else "") + p.replace("*", " ").replace("&", " ").split()[-1] for p in params)]
    head, body = f"    [[nodiscard]] Status {call.name}(", f"return Status{{fx_{call.name}({', '.join(passed)})}};"
    short = f"{head}{', '.join(params)}) noexcept {{ {body} }}\n"
    if len(short) <= _WIDTH:
        return short
    return f"{_wrapped(head, params or ('',), ') noexcept')}\n    {{\n        {body}\n    }}\n"


def _reference(param: str) -> str:
    """A struct that is one: a reference; an array keeps its pointer."""
    one = re.fullmatch(r"(const )?struct (fx_exit|fx_cpu|fx_region|fx_hv_exit|fx_event|fx_trace) \*(\w+)", param)
    return f"{one[1] or ''}struct {one[2]} &{one[3]}" if one and one[3] != "exits" else param


def methods() -> str:
    """The methods of fastexit.hpp's Machine that are calls; those with a better form of their own are written there."""
    return "".join(_method(call) for call in calls() if not call.given)


def cpp() -> str:
    """fastexit.hpp with its methods anew."""
    return _METHODS.sub(lambda _: methods(), (cabi.NATIVE / "fastexit.hpp").read_text())


FILES = {"fastexit_calls.h": header, "calls.c": source, "fastexit.hpp": cpp}

_HEADER_HEAD = """\
/*
 * Each call of struct fx_ops as a symbol of its own, for bindings and for hosts that need no table. fastexit.h says
 * what they do. Generated from it: python -m fastexit.embed.calls
 */
#ifndef FASTEXIT_CALLS_H
#define FASTEXIT_CALLS_H

#include "fastexit.h"

#ifdef __cplusplus
extern "C" {
#endif
#ifdef __GNUC__ /* C++: a function may be called as a struct, which then is always struct fx_exit */
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wshadow"
#endif

/* cffi:begin */""".splitlines()
_HEADER_TAIL = """\
/* cffi:end */

#ifdef __GNUC__
#pragma GCC diagnostic pop
#endif
#ifdef __cplusplus
}
#endif

#endif
""".split("\n")
_SOURCE_HEAD = """\
/*
 * The calls as symbols, and the table of them. Generated from fastexit.h: python -m fastexit.embed.calls
 */
#include "fastexit_calls.h"
#include "shim.h"
""".split("\n")
_TABLE_HEAD = """\
static const struct fx_ops calls = {
    .size = sizeof(struct fx_ops),
    .abi = FX_ABI_VERSION,""".splitlines()


def write() -> None:
    """Write all of them into native/."""
    for name, text in {name: make() for name, make in FILES.items()}.items():
        (cabi.NATIVE / name).resolve().write_text(text)


if __name__ == "__main__":
    write()
